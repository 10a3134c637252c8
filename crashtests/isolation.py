"""Part 6: concurrent transactions whose history has no cycle, and interruptions at any point of a commit.

Rounds alternate between threads and asyncio tasks that append to lists; the power is cut in the middle of an operation,
or the process dies, and others go on with what is found, several times. `cycles` then judges the whole history.

The other half raises KeyboardInterrupt or MemoryError at every call and return inside of one commit, as a signal or a
failing allocation would. The commit must then be written or not written, as a note on the exception says; the store
must go on; and a power cut right after must not change what it showed.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from random import Random
from types import FrameType
from typing import Any

import kvwal
import kvwal.aio
from crashtests.console import Result
from crashtests.cycles import ListTxn, anomalies
from crashtests.explorer import Tally
from crashtests.history import History, Violation
from crashtests.session import OPTIONS, PATH, Session
from crashtests.workers import Run, Share, spread
from kvwal.errors import ConflictError, Error, PoisonedError
from kvwal.testing import Operation, SimulatedDisk

_KEYS = [b"list%d" % number for number in range(5)]
_WORKERS = 4
_LIVES = 4


class _Death(OSError):
    """The process is dead: nothing it asks of the disk is done."""


def _decode(value: bytes | None) -> tuple[int, ...]:
    return tuple(int(part) for part in value.split(b",")) if value else ()


def _encode(values: tuple[int, ...]) -> bytes:
    return b",".join(b"%d" % value for value in values)


class _Round:
    """One history, through several lives of the process."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.disk = SimulatedDisk(seed=seed)
        self.txns: list[ListTxn] = []
        self.lock = threading.Lock()
        self.dead = False
        self.next_value = 0

    def run(self) -> list[str]:
        threading.excepthook = self._unhandled
        try:
            return self._run()
        finally:
            threading.excepthook = threading.__excepthook__

    def _unhandled(self, arguments: threading.ExceptHookArgs) -> None:
        # What threads of a dead process say does not matter.
        if not (self.dead and isinstance(arguments.exc_value, Error | OSError)):
            threading.__excepthook__(arguments)

    def _run(self) -> list[str]:
        for life in range(_LIVES):
            self.dead = False
            found: list[SimulatedDisk] = []
            self.disk.watcher = self._executioner(found, self.random.randrange(5, 150))
            try:
                (self._threads if self.random.random() < 0.5 else self._tasks)()
            except (Error, OSError):
                if not self.dead:
                    raise
            self.disk.watcher = None
            if not found:
                found.append(self.disk.crash(0))
                self.disk.kill()
            self.disk = found[0]
            del life
        with kvwal.open(PATH, files=self.disk, **OPTIONS) as store:
            final = {key: _decode(store.get(key)) for key in _KEYS}
        return anomalies(self.txns, final)

    def _executioner(self, found: list[SimulatedDisk], after: int) -> Callable[[Operation], None]:
        left = after
        by_power = self.random.random() < 0.7
        random = Random(self.random.random())

        def watch(operation: Operation) -> None:
            nonlocal left
            left -= 1
            if left > 0:
                return
            with self.lock:
                # What was acknowledged up to here must survive; what comes later was told to nobody.
                if not self.dead:
                    self.dead = True
                    found.append(self.disk.crash(random) if by_power else self.disk.copy())
                    self.disk.kill()
            raise _Death(5, f"killed before {operation}")

        return watch

    def _begin(self) -> ListTxn:
        with self.lock:
            txn = ListTxn(len(self.txns))
            self.txns.append(txn)
            return txn

    def _value(self) -> int:
        with self.lock:
            self.next_value += 1
            return self.next_value

    def _end(self, txn: ListTxn, status: str) -> None:
        with self.lock:
            if not self.dead:
                txn.status = status

    def _plan(self, random: Random) -> list[tuple[bytes, int]]:
        """(key, how often to append): 0 is a read only."""
        return [(key, random.choice((0, 0, 1, 1, 2))) for key in random.sample(_KEYS, random.randrange(1, 4))]

    # --- threads ---

    def _threads(self) -> None:
        store = kvwal.open(PATH, files=self.disk, **(OPTIONS | {"background": self.random.random() < 0.5}))
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=self._client, args=(store, Random(self.random.random()), failures), daemon=True)
            for _ in range(_WORKERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                raise Violation("a committer waits for ever")
        if store._background is not None:
            store._background.stop()
        if failures:
            raise failures[0]
        if not self.dead:
            store.close()

    def _client(self, store: Any, random: Random, failures: list[BaseException]) -> None:
        try:
            for number in range(30):
                if self.dead:
                    return
                if number == 20 and random.random() < 0.3:
                    store.checkpoint()
                self._transact(store, random)
        except (Error, OSError) as error:
            if not self.dead:
                failures.append(error)
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    def _transact(self, store: Any, random: Random) -> None:
        txn = self._begin()
        try:
            with store.transaction() as transaction:
                for key, appends in self._plan(random):
                    values = _decode(transaction.get(key))
                    txn.reads.append((key, values))
                    for _ in range(appends):
                        value = self._value()
                        txn.appends.append((key, value))
                        values = (*values, value)
                        transaction.put(key, _encode(values))
        except ConflictError:
            self._end(txn, "aborted")
        else:
            self._end(txn, "ok")

    # --- asyncio ---

    def _tasks(self) -> None:
        asyncio.run(self._gather())

    async def _gather(self) -> None:
        store = await kvwal.aio.open(PATH, files=self.disk, **OPTIONS)
        try:
            results = await asyncio.wait_for(
                asyncio.gather(
                    *(self._task(store, Random(self.random.random())) for _ in range(_WORKERS)), return_exceptions=True
                ),
                60,
            )
        finally:
            try:
                await store.close()
            except (Error, OSError):
                if not self.dead:
                    raise
        for result in results:
            if isinstance(result, BaseException) and not (self.dead and isinstance(result, Error | OSError)):
                raise result

    async def _task(self, store: Any, random: Random) -> None:
        for _ in range(30):
            if self.dead:
                return
            txn = self._begin()
            try:
                async with store.transaction() as transaction:
                    for key, appends in self._plan(random):
                        values = _decode(await transaction.get(key))
                        txn.reads.append((key, values))
                        if random.random() < 0.5:
                            await asyncio.sleep(0)
                        for _ in range(appends):
                            value = self._value()
                            txn.appends.append((key, value))
                            values = (*values, value)
                            transaction.put(key, _encode(values))
            except ConflictError:
                self._end(txn, "aborted")
            else:
                self._end(txn, "ok")


# --- interruptions ---

_SETUP: list[Any] = [["batch", [[n, 30] for n in range(8)]], ["checkpoint"], ["put", 2, 40]]

_INTERRUPTED: dict[str, list[Any]] = {
    "put": ["put", 1, 50],
    "weak": ["weak", 1, 50],
    "delete": ["del", 2],
    "range": ["range", 2, 5],
    "batch": ["batch", [[1, 20], [9, 600], [3, None]]],
    "move": ["move", 1, 2],
    "rotation": ["put", 1, 14000],
    "checkpoint": ["checkpoint"],
    "sync": ["sync"],
}

_ERRORS = {"K": KeyboardInterrupt, "M": MemoryError}


class _Interrupter:
    """Raises at the nth place where a signal could arrive, or an allocation fail, in the store's own code."""

    def __init__(self, nth: int, error: type[BaseException]) -> None:
        self.left = nth
        self.error = error
        self.raised = False
        # A signal arrives when a call is over or a function begins; an allocation fails before a call does anything.
        self.events = ("call", "return", "c_return") if error is KeyboardInterrupt else ("call", "c_call")

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if self.raised or event not in self.events:
            return
        if not _is_ours(frame) or (event == "return" and not _is_ours(frame.f_back)):
            # Once the outermost call is over, nobody can tell an interruption from one of the caller's own code.
            return
        if event == "c_call" and getattr(argument, "__name__", "") in ("__exit__", "release"):
            # These allocate nothing.
            return
        self.left -= 1
        if self.left == 0:
            self.raised = True
            raise self.error


def _is_ours(frame: FrameType | None) -> bool:
    name = "" if frame is None else frame.f_code.co_filename
    return "kvwal" in name and "testing" not in name


def interrupt(name: str, nth: int, kind: str) -> bool:
    """Interrupt one step at its nth place. False if it has no such place. Raises what is wrong."""
    session = Session(SimulatedDisk(seed=1))
    session.open()
    session.run(_SETUP)
    interrupter = _Interrupter(nth, _ERRORS[kind])
    history = session.history
    before = history.begun
    caught: BaseException | None = None
    sys.unraisablehook = lambda _: None
    sys.setprofile(interrupter)
    try:
        session.step(_INTERRUPTED[name])
    except (KeyboardInterrupt, MemoryError) as error:
        caught = error
    finally:
        sys.setprofile(None)
        sys.unraisablehook = sys.__unraisablehook__
    if not interrupter.raised:
        session.abandon()
        return False
    _judge(session, history, before, caught)
    session.abandon()
    return True


def _judge(session: Session, history: History, before: int, caught: BaseException | None) -> None:
    shown = session.store.last_seqno
    if shown not in (before, history.begun) or dict(session.store.scan()) != history.states[shown]:
        raise Violation(f"after an interruption the store shows neither commit {before} nor {history.begun}")
    said = any("was written" in note for note in getattr(caught, "__notes__", ()))
    if said and shown == before:
        # The other way round is possible: in the last calls, when the commit is over, nobody is left to say it.
        raise Violation("the interruption says that the commit was written, and it was not")
    del history.states[shown + 1 :]
    history.returned = shown
    history.durable = min(history.durable, shown)
    session.look()
    try:
        session.step(["put", 7, 70])
    except PoisonedError:
        # A flush of the pages was interrupted, and tells what became of it only once.
        session.step(["kill"])
        session.step(["put", 7, 70])
    session.step(["batch", [[6, 10], [5, None]]])
    session.look()
    try:
        session.step(["checkpoint"])
    except PoisonedError:
        session.step(["kill"])
        session.step(["checkpoint"])
    session.step(["cut", 0])
    session.verify()
    session.look()


def interruptions(seed: int) -> Iterator[tuple[str, int, str]]:
    """Every place of every step, in a mixed order; steps end at the first place that they do not have."""
    random = Random(seed)
    places = [(name, nth, kind) for name in _INTERRUPTED for kind in _ERRORS for nth in range(1, 600)]
    random.shuffle(places)
    yield from places


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    over: dict[tuple[str, str], int] = {}
    cases = share.mine(interruptions(run.seed))
    number = 0
    while not run.over():
        tally = Tally()
        seed = run.seed * 10_000 + number * share.count + share.index
        number += 1
        try:
            for text in _Round(seed).run():
                tally.violations.append((text, f"--seed {run.seed} --case round:{seed}"))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is a violation
            tally.violations.append((f"{type(error).__name__}: {error}", f"--case round:{seed}"))
        tally.states += _LIVES
        for _ in range(40):
            case = next(cases, None)
            if case is None:
                break
            name, nth, kind = case
            if nth >= over.get((name, kind), 10_000):
                continue
            try:
                if interrupt(name, nth, kind):
                    tally.states += 1
                    tally.faults += 1
                else:
                    over[name, kind] = min(nth, over.get((name, kind), 10_000))
            except Exception as error:  # noqa: BLE001
                tally.violations.append((f"{type(error).__name__}: {error}", f"--case {name}:{nth}:{kind}"))
        yield tally


def run(run: Run) -> Result:
    """Run the part."""
    return spread("isolation", work, run)


def replay(text: str, run: Run) -> int:
    """Run one case with its traceback. Rounds have threads: they may go another way."""
    name, _, rest = text.partition(":")
    if name == "round":
        found = _Round(int(rest)).run()
        print("\n".join(found) or "nothing is wrong")
        return int(bool(found))
    nth, kind = rest.split(":")
    if not interrupt(name, int(nth), kind):
        print(f"{name} has no place {nth}")
        return 2
    print("nothing is wrong")
    return 0
