"""Part 6: concurrent list-append transactions, their history searched for cycles, across kills and power cuts.

A round is one disk, some lists, and a few *lives* of the machine. In each life several clients run transactions that
read lists in every way there is, and append to them; before a chosen operation of the disk, or when a client has just
been told that it committed, the machine dies (the power is cut, with a random choice of what was pending, or the
process is killed), with transactions in flight and commits in groups half-way; in a part of the cases it dies again
during recovery. The next life opens what is found, reads all the lists, and goes on with them. At every opening and at
the end the whole history is searched (`crashtests.cycles`): strictly serializable, nothing acknowledged missing,
nothing in part, nothing of what failed.

Three ways to be concurrent:

- "steps": all clients in one thread, which takes turns by a seed: the same every time;
- "threads": one for each client, changing places every few bytecodes, in half of them with the store's own thread in
  the background; a replay tries many times;
- "tasks": asyncio, over `kvwal.aio`, whose commits go through a thread of their own; likewise.

Durability is "commit" in all of them, and "os" where the process is only killed.

The other half of the part is `crashtests.interruptions`.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import kvwal
import kvwal.aio
from crashtests import interruptions
from crashtests.console import Result
from crashtests.cycles import List, Observed, decode, encode, find
from crashtests.explorer import BARRIERS, Tally
from crashtests.history import Violation
from crashtests.looked import OPTIONS, PATH
from crashtests.workers import Run, Share, beginning, spread
from kvwal.errors import ConflictError, Error
from kvwal.testing import Operation, SimulatedDisk

WAYS = ("steps", "threads", "tasks")

_KEYS = tuple(b"list%d" % number for number in range(5))
_HANG_S = 60.0
_REPLAYS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """What a transaction does, drawn beforehand, so that it does not depend on what the others do."""

    kind: str
    steps: tuple[tuple[str, bytes], ...]
    aborts: bool

    @classmethod
    def draw(cls, random: Random) -> Plan:
        kind = random.choices(["write", "read", "snapshot"], [6, 1, 1])[0]
        acts = ["get", "append", "append", "append", "scan", "back", "many"] if kind == "write" else ["get", "scan"]
        steps = tuple((random.choice(acts), random.choice(_KEYS)) for _ in range(random.randint(1, 4)))
        return cls(kind, steps, kind == "write" and random.random() < 0.1)


class Machine:
    """The disk, and the moment at which it dies."""

    def __init__(self, disk: SimulatedDisk, random: Random, *, killed_only: bool) -> None:
        self.disk = disk
        self.found: SimulatedDisk | None = None
        self._random = random
        self._killed_only = killed_only
        self._left = 0
        self._moment = "operation"

    def die_in(self, operations: int) -> None:
        """Die before this number of operations is done.

        Or only at the next flush, where whole groups wait; or only when a client was told that it has committed, and
        something in the log is pending.
        """
        self.found = None
        self._left = operations
        self._moment = self._random.choice(["operation", "flush", "told"])
        self.disk.watcher = self._watch

    def _watch(self, operation: Operation) -> None:
        self._left -= 1
        due = self._moment == "operation" or (self._moment == "flush" and operation.name in BARRIERS)
        if self.found is not None or (self._left <= 0 and due):
            # From here on nothing is done on this disk, not even for a process that is started late.
            self.die()
            raise OSError(errno.EIO, "the machine died")

    def told(self) -> None:
        """A client was told that it has committed."""
        if self._moment == "told" and self._left <= 0:
            with self.disk.mutex:
                # The commit that the client was told of must not be among what is pending.
                if any(piece.path.endswith(".log") for piece in self.disk.pending()):
                    self.die()

    def die(self) -> None:
        """The disk as it is found becomes `found`, unless it was before; nothing is done on this one any more."""
        with self.disk.mutex:
            if self.found is None:
                if self._killed_only or self._random.random() < 0.3:
                    self.found = self.disk.copy()
                else:
                    survivors = self._random.choice([0, -1, self._random])
                    self.found = self.disk.crash(survivors, stale=self._random.random() < 0.3)
                self.disk.kill()

    def restart(self) -> None:
        """Go on with what was found."""
        assert self.found is not None
        self.disk, self.found = self.found, None
        self._moment = ""


class Round:
    """One history, over several lives of a machine."""

    def __init__(self, way: str, seed: int, *, lives: int = 4, clients: int = 4) -> None:
        self.random = Random(f"{way} {seed}")
        self.way = way
        self.lives = lives
        self.clients = clients
        # At "os" a power cut may take what was seen: there only processes are killed.
        weak = self.random.random() < 0.25
        self.options = OPTIONS | {"durability": "os" if weak else "commit", "checkpoint_log_bytes": 4 << 10}
        if way == "threads":
            self.options["background"] = self.random.random() < 0.5
        self.machine = Machine(SimulatedDisk(seed=seed), self.random, killed_only=weak)
        self.history: list[Observed] = []
        self.deaths = 0
        self._clock = itertools.count(1)
        self._numbers = itertools.count(1)

    def run(self) -> None:
        """Raises `Violation`."""
        act = {"steps": self._in_steps, "threads": self._in_threads, "tasks": self._in_tasks}[self.way]
        for life in range(self.lives):
            store = self._open()
            self._check(store)
            if self.way == "tasks":
                # It opens the store itself.
                store.close()
            if life < self.lives - 1:
                self.machine.die_in(self.random.randrange(2, 120))
                act(store)
                self.machine.die()
                self.deaths += 1
                self.machine.restart()
            else:
                act(store)
                store.close()
        store = kvwal.open(PATH, files=self.machine.disk, **self.options)
        self._check(store)
        report = store.verify()
        if not report.ok:
            raise Violation(f"verify: {report.problems[:3]}")
        store.close()

    def _open(self) -> Any:
        """Recover; the machine may die again while it does."""
        while self.random.random() < 0.3:
            self.machine.die_in(self.random.randrange(1, 14))
            try:
                kvwal.open(PATH, files=self.machine.disk, **self.options)
            except (OSError, Error):
                if self.machine.found is None:
                    raise
            self.machine.die()
            self.deaths += 1
            self.machine.restart()
        return kvwal.open(PATH, files=self.machine.disk, **self.options)

    def _check(self, store: Any) -> None:
        """Read all the lists, and search the history so far."""
        txn = self._begin()
        final = {key: decode(store.get(key)) for key in _KEYS}
        for key, elements in final.items():
            txn.read(key, elements)
        txn.outcome, txn.ended = "ok", next(self._clock)
        # The reads say now how transactions without an answer ended.
        for other in self.history:
            if other.outcome == "maybe":
                there = any(element in final[key] for key, elements in other.appends.items() for element in elements)
                other.outcome = "ok" if there else "failed"
                other.ended = txn.begun
        problems = find(final, self.history)
        if problems:
            raise Violation("; ".join(problems[:3]))

    def _begin(self) -> Observed:
        txn = Observed(next(self._numbers), next(self._clock))
        self.history.append(txn)
        return txn

    # -- clients ------------------------------------------------------------------------------

    def _plans(self, life_seed: int, client: int) -> Iterator[Plan]:
        random = Random(f"{life_seed} {client}")
        for _ in range(random.randint(5, 25)):
            yield Plan.draw(random)

    def _failed(self, txn: Observed, error: BaseException) -> bool:
        """A transaction was left by this. Is the machine dead?"""
        if isinstance(error, ConflictError):
            txn.outcome, txn.ended = "failed", next(self._clock)
            return False
        if self.machine.found is None or not isinstance(error, OSError | Error):
            raise Violation(f"transaction {txn.number} failed: {type(error).__name__}: {error}") from error
        return True

    def _client(self, store: Any, plans: Iterator[Plan]) -> Iterator[None]:
        """Runs the plans, one after the other; others may come in at each yield."""
        for plan in plans:
            txn = self._begin()
            try:
                yield from self._perform(store, plan, txn)
            except Exception as error:  # noqa: BLE001  # judged there
                if self._failed(txn, error):
                    return
            if txn.number % 40 == 0:
                try:
                    store.checkpoint()
                except (OSError, Error):
                    if self.machine.found is None:
                        raise
                    return

    def _perform(self, store: Any, plan: Plan, seen: Observed) -> Iterator[None]:
        begin = {"write": store.transaction, "read": lambda: store.transaction(read_only=True)}
        with begin.get(plan.kind, store.snapshot)() as txn:
            for act, key in plan.steps:
                yield
                if act == "get":
                    seen.read(key, decode(txn.get(key)))
                elif act == "many":
                    for one, value in zip(_KEYS, txn.get_many(_KEYS), strict=True):
                        seen.read(one, decode(value))
                elif act == "append":
                    elements = decode(txn.get(key))
                    seen.read(key, elements)
                    txn.put(key, encode((*elements, seen.append(key))))
                else:
                    _scanned(seen, dict(txn.scan(prefix=b"list", reverse=act == "back")))
            yield
            if plan.aborts:
                txn.abort()
                # An aborted transaction's reads count, its appends must never be seen.
                seen.outcome, seen.ended = "failed", next(self._clock)
                return
        self._committed(seen, getattr(txn, "commit_seqno", None))

    def _committed(self, seen: Observed, seqno: int | None) -> None:
        seen.seqno = seqno
        seen.outcome, seen.ended = "ok", next(self._clock)
        self.machine.told()

    # -- ways ---------------------------------------------------------------------------------

    def _in_steps(self, store: Any) -> None:
        seed = self.random.getrandbits(32)
        clients = [self._client(store, self._plans(seed, client)) for client in range(self.clients)]
        while clients:
            client = self.random.choice(clients)
            # Now and then one gets far ahead of the others.
            for _ in range(self.random.choice([1, 1, 1, 8])):
                try:
                    next(client)
                except StopIteration:
                    clients.remove(client)
                    break

    def _in_threads(self, store: Any) -> None:
        seed = self.random.getrandbits(32)
        wrong: list[BaseException] = []

        def run(client: int) -> None:
            try:
                for _ in self._client(store, self._plans(seed, client)):
                    pass
            except BaseException as error:  # noqa: BLE001  # raised again in the main thread
                wrong.append(error)

        threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in range(self.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_HANG_S)
            if thread.is_alive():
                frame = sys._current_frames().get(thread.ident or 0)
                where = "".join(traceback.format_stack(frame)[-4:]) if frame else ""
                raise Violation(f"a thread hangs:\n{where}")
        if self.machine.found is not None and store.engine._background is not None:
            # The process is dead, its thread is not.
            store.engine._background.stop()
        if wrong:
            raise wrong[0]

    def _in_tasks(self, store: Any) -> None:
        try:
            asyncio.run(asyncio.wait_for(self._in_loop(), _HANG_S))
        except TimeoutError as error:
            raise Violation("the tasks hang") from error

    async def _in_loop(self) -> None:
        try:
            db = await kvwal.aio.open(PATH, files=self.machine.disk, **self.options)
        except (OSError, Error):
            if self.machine.found is None:
                raise
            return
        seed = self.random.getrandbits(32)
        try:
            await asyncio.gather(
                *(self._task(db, self._plans(seed, client), Random(client)) for client in range(self.clients))
            )
        finally:
            try:
                await db.close()
            except (OSError, Error):
                if self.machine.found is None:
                    raise

    async def _task(self, db: Any, plans: Iterator[Plan], random: Random) -> None:
        for plan in plans:
            txn = self._begin()
            try:
                await self._perform_async(db, plan, txn, random)
            except Exception as error:  # noqa: BLE001  # judged there
                if self._failed(txn, error):
                    return

    async def _perform_async(self, db: Any, plan: Plan, seen: Observed, random: Random) -> None:
        begin = {"write": db.transaction, "read": lambda: db.transaction(read_only=True)}
        async with begin.get(plan.kind, db.snapshot)() as txn:
            for act, key in plan.steps:
                for _ in range(random.randrange(3)):
                    await asyncio.sleep(0)
                if act == "get":
                    seen.read(key, decode(await txn.get(key)))
                elif act == "many":
                    for one, value in zip(_KEYS, await txn.get_many(_KEYS), strict=True):
                        seen.read(one, decode(value))
                elif act == "append":
                    elements = decode(await txn.get(key))
                    seen.read(key, elements)
                    txn.put(key, encode((*elements, seen.append(key))))
                else:
                    pairs = txn.scan(prefix=b"list", reverse=act == "back")
                    _scanned(seen, {one: value async for one, value in pairs})
            if plan.aborts:
                txn.abort()
                seen.outcome, seen.ended = "failed", next(self._clock)
                return
        self._committed(seen, getattr(txn, "commit_seqno", None))


def _scanned(seen: Observed, pairs: dict[bytes, bytes]) -> None:
    found: dict[bytes, List] = {key: decode(value) for key, value in pairs.items()}
    for key in _KEYS:
        seen.read(key, found.get(key, ()))


# -- the part -------------------------------------------------------------------------------------


def rounds(seed: int) -> Iterator[str]:
    """The ways in turn, the deterministic one twice as often: "round:", way, seed."""
    for number in itertools.count(seed * 1_000_000):
        for turn, way in enumerate(("steps", "threads", "steps", "tasks")):
            yield f"round:{way}:{number * 2 + turn // 2}"


def try_round(way: str, seed: int) -> tuple[Round, BaseException | None]:
    """Run one round, threads changing places often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6 if way != "steps" else interval)
    played = Round(way, seed)
    try:
        played.run()
    except Exception as error:  # noqa: BLE001  # every exception is a violation
        return played, error
    finally:
        sys.setswitchinterval(interval)
    return played, None


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    cases = share.mine(beginning(run.first, lambda: rounds(run.seed), str))
    places = share.mine(beginning(run.first, lambda: interruptions.cases(run.seed), str))
    while not share.over():
        # About as much time for the one as for the other.
        for case in itertools.islice(cases, 40 if run.first.startswith("round:") else 4):
            tally = Tally()
            _, way, seed = case.split(":")
            played, error = try_round(way, int(seed))
            tally.states += played.deaths + 1
            tally.nested += played.deaths
            if error is not None:
                tally.violations.append((f"{type(error).__name__}: {error}", _command(run, case)))
            yield tally
        tally = Tally()
        for place in itertools.islice(places, 40):
            try:
                # A way has fewer places when it was gone before: what it made lazily is there.
                happened = interruptions.examine(place)
                tally.states += happened
                tally.faults += happened
            except Exception as error:  # noqa: BLE001  # every exception is a violation
                tally.violations.append((f"{type(error).__name__}: {error}", _command(run, str(place))))
        yield tally


def _command(run: Run, case: str) -> str:
    return f"--seed {run.seed} --case {case}"


def run(run: Run) -> Result:
    """Run the part."""
    result = spread("isolation", work, run)
    result.notes.append(
        f"isolation: {result.states - result.faults:,} lives of a machine with concurrent transactions, "
        f"{result.faults:,} interruptions"
    )
    return result


def replay(text: str, run: Run) -> int:
    """Run one case with its traceback; one of threads or tasks until it shows."""
    what, one, other = text.split(":")
    if what != "round":
        if not interruptions.examine(interruptions.Case.parse(text)):
            print(f"{what} has no place {one}")
            return 2
        print("nothing is wrong")
        return 0
    way, seed = one, other
    tries = 1 if way == "steps" else _REPLAYS
    for number in range(tries):
        _, error = try_round(way, int(seed))
        if error is not None:
            print(f"at try {number + 1}")
            raise error
    print(f"nothing is wrong in {tries} tries")
    return 0


__all__: list[Any] = ["Machine", "Plan", "Round", "replay", "rounds", "run", "try_round"]
