"""A store that is archived, a model of all its moments, and the check that each of them can be restored."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import chain
from typing import Any

import kvwal
from kvwal.backup.archive import make_base
from kvwal.backup.archiver import Archiver
from kvwal.backup.bases import read_header
from kvwal.backup.chain import Held, list_held
from kvwal.backup.keeping import Keep, Merging
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.replaying import replay_units
from kvwal.keys import Seqno
from kvwal.log.record import Record
from kvwal.testing import Operation, SimulatedDisk

OPTIONS: dict[str, Any] = {
    "background": False,
    "keep_history_s": 0,
    "keep_history_bytes": 0,
    "segment_bytes": 16 << 10,
    "cache_bytes": 1 << 20,
}
Model = dict[Seqno, dict[bytes, bytes]]


def archiver_of(db: Any, destination: Any, *, make_base: Any = make_base, **more: Any) -> Archiver:
    more = {"rpo_s": 1.0, "max_behind_bytes": 1 << 30, **more}
    return Archiver(db.engine, destination, make_base, **more)


class Writer:
    """Writes to a store and remembers what it held after each commit."""

    def __init__(self, db: Any, model: Model | None = None) -> None:
        self.db = db
        self.model: Model = {Seqno(0): {}} if model is None else model

    def put(self, key: bytes, value: bytes) -> Seqno:
        before = self.db.last_seqno
        # Told before it is made: it may be durable when the power is cut in the middle.
        self.model[Seqno(before + 1)] = {**self.model[before], key: value}
        seqno = self.db.put(key, value)
        assert seqno == before + 1
        return Seqno(seqno)

    def some(self, n: int, size: int = 20) -> None:
        for _ in range(n):
            i = self.db.last_seqno + 1
            self.put(b"k%d" % (i % 17), b"%d" % i * (1 + size // 4))


class BusyDestination(DirectoryDestination):
    """Something happens before each of the calls by which units and bases are put, read back and merged."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def put_new(self, name: str, data: Any) -> bool:
        self.meanwhile()
        return super().put_new(name, data)

    def get(self, name: str, **where: Any) -> bytes:
        self.meanwhile()
        return super().get(name, **where)

    def swap(self, name: str, old: bytes | None, new: bytes) -> bool:
        self.meanwhile()
        return super().swap(name, old, new)


class Program:
    """Commits, checkpoints, steps of the archiver, merging and reopening, the same ones for a seed."""

    def __init__(self, seed: int, turns: int, *, is_busy: bool = False) -> None:
        """`is_busy`: commits come in the middle of the archiver's steps, too."""
        self.seed, self.turns, self.is_busy = seed, turns, is_busy
        self.model: Model = {Seqno(0): {}}
        self.line = self.store_id = b""

    def __call__(self, disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        # By the seed, so that a failing run can be made again.
        draw, claims = random.Random(self.seed), random.Random(self.seed)
        place = BusyDestination("/b", files=disk)
        now_s = [0.0]

        def opened() -> tuple[Any, Any]:
            db = kvwal.open("/kv", files=disk, **OPTIONS)
            self.line = db.engine.upkeep.consumers.line
            self.store_id = db.engine.state.version.tree.meta.store_id
            more = {"base_bytes": 1500, "codec": "none", "keep": Keep(), "monotonic_s": lambda: now_s[0]}
            return db, archiver_of(db, place, random_bytes=claims.randbytes, **more)

        db, archiver = opened()
        writer = Writer(db, self.model)

        def commit_or_not() -> None:
            try:
                writer.some(1 if draw.random() < 0.15 else 0)
            except kvwal.PoisonedError as error:
                # The store was killed: the archiver is not to take that for a failure of the destination.
                raise Killed from error

        if self.is_busy:
            place.meanwhile = commit_or_not
        for _ in range(self.turns):
            what = draw.randrange(8)
            if what < 3:
                writer.some(draw.randint(1, 3))
            elif what < 6:
                disk.pass_time(draw.randint(1, 20))
                now_s[0] += draw.choice([1, 31])
                while archiver.step(now=True) == 0.0:
                    pass
                # The first base may have come after some commits.
                first = list_held(place, self.line).stretches()[0].first
                acknowledged.append((first, archiver.mark))
            elif what == 6:
                db.checkpoint()
            else:
                archiver.close()
                db.close()
                db, archiver = opened()
                writer.db = db
        db.close()

    def check(self, disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        place = DirectoryDestination("/b", files=disk)
        mark = None
        if acknowledged:
            first, mark = acknowledged[-1]
            check_all(list_held(place, self.line), place, self.store_id, self.model, first, mark)
        with kvwal.open("/kv", files=disk, **OPTIONS) as db:
            line = db.engine.upkeep.consumers.line
            if self.line and line != self.line:
                assert mark is None, "the store is gone, and was archived"
                return
            # What was committed after the cut is of another history than what the program did.
            model = {seqno: state for seqno, state in self.model.items() if seqno <= db.last_seqno}
            archiver = archiver_of(db, place)
            archiver.step()
            assert archiver.mark is not None
            assert mark is None or archiver.mark >= mark
            writer = Writer(db, model)
            writer.put(b"after", b"the cut")
            archiver.step(now=True)
            assert archiver.mark == db.last_seqno
            held = list_held(place, line)
            assert held.gaps() == []
            first = held.stretches()[0].first
            store_id = db.engine.state.version.tree.meta.store_id
            check_all(held, place, store_id, model, first, archiver.mark)
            merging = Merging(place, store_id, line)
            while merging.step(archiver.mark):
                pass
            check_all(list_held(place, line), place, store_id, model, first, archiver.mark)


def state_after(state: dict[bytes, bytes], kind: int, body: bytes) -> dict[bytes, bytes]:
    batch = Record(kind, Seqno(1), Seqno(0), 0, Seqno(1), 0, body).batch()
    state = dict(state)
    state.update({key: value for key, value in batch.writes.items() if value is not None})
    return state


def held_of(db: Any, destination: Any) -> Held:
    return list_held(destination, db.engine.upkeep.consumers.line)


def check_all(held: Held, destination: Any, store_id: bytes, model: Model, first: int, last: int) -> None:
    """Each moment from `first` to `last` is restored by its plan, and is the model's."""
    replayed: dict[Any, dict[int, dict[bytes, bytes]]] = {}
    for at in range(first, last + 1):
        plan = held.plan(Seqno(at), begins=lambda base: read_header(destination, str(base)).seqno)
        key = plan.after, plan.units
        if key not in replayed:
            # All that these units have; each moment is a beginning of that.
            found = replayed[key] = {plan.after: model[plan.after]}
            until = plan.units[-1].last if plan.units else plan.after
            runs = replay_units(destination, store_id, plan.units, plan.after, until, held)
            for kind, seqno, _, body in chain.from_iterable(runs):
                found[seqno] = state_after(found[Seqno(seqno - 1)], kind, body)
        assert replayed[key][at] == model[Seqno(at)], f"moment {at}"


def restored(files: Any, at: int, into: str = "/restored") -> dict[bytes, bytes]:
    """What a store has that is restored from `/b`."""
    kvwal.restore(DirectoryDestination("/b", files=files), into, at=at, files=files)
    with kvwal.open(into, files=files, background=False) as db:
        return dict(db)


class Killed(BaseException):
    """The process is killed: nothing that it would still do is done."""


def kill_before(disk: SimulatedDisk, nth: int, program: Callable[[], object]) -> bool:
    """Run a program and kill it before its nth change of the disk; False if it ended before that."""
    seen = 0

    def watch(operation: Operation) -> None:
        nonlocal seen
        seen += 1
        if seen >= nth:
            raise Killed

    disk.watcher = watch
    try:
        program()
    except Killed:
        pass
    finally:
        disk.watcher = None
    disk.kill()
    return seen >= nth


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """A store on one disk, its archive on another."""

    def __init__(self, **options: Any) -> None:
        self.disk = SimulatedDisk(seed=1)
        self.other = SimulatedDisk(seed=2)
        self.db: Any = kvwal.open("/kv", files=self.disk, **{**OPTIONS, **options})
        self.writer = Writer(self.db)
        self.place: Any = DirectoryDestination("/b", files=self.other)
        self.clock = Clock()

    @property
    def store_id(self) -> bytes:
        return self.db.engine.state.version.tree.meta.store_id

    def archiver(self, **more: Any) -> Any:
        return archiver_of(self.db, self.place, monotonic_s=self.clock, **more)

    def check(self, first: int, last: int) -> None:
        check_all(held_of(self.db, self.place), self.place, self.store_id, self.writer.model, first, last)

    def units(self) -> list[tuple[int, int]]:
        return [(unit.first, unit.last) for unit in held_of(self.db, self.place).units]

    def reopen(self, **options: Any) -> None:
        self.db.close()
        self.db = kvwal.open("/kv", files=self.disk, **{**OPTIONS, **options})
        self.writer.db = self.db


class Destination:
    """A destination, of which a test changes what it answers."""

    def __init__(self, there: Any) -> None:
        self.there = there

    def __getattr__(self, name: str) -> Any:
        return getattr(self.there, name)


class Named(Destination):
    """One with the methods of a destination by name: from CPython 3.12 on a protocol looks at no `__getattr__`."""

    def put_new(self, name: str, data: Any) -> Any:
        return self.there.put_new(name, data)

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> Any:
        return self.there.get(name, start=start, size=size)

    def list_after(self, prefix: str, after: str = "") -> Any:
        return self.there.list_after(prefix, after)

    def delete(self, name: str) -> None:
        self.there.delete(name)

    def swap(self, name: str, old: bytes | None, new: bytes) -> Any:
        return self.there.swap(name, old, new)


class Gated(Named):
    """A destination that a test can make fail, hang and go on."""

    def __init__(self, there: Any) -> None:
        super().__init__(there)
        self.open = threading.Event()
        self.open.set()
        self.error: BaseException | None = None
        # Whether what it has is listed.
        self.lists = True
        self.before: Callable[[], object] = lambda: None

    def __getattribute__(self, name: str) -> Any:
        if name not in ("put_new", "get", "list_after", "delete", "swap"):
            return super().__getattribute__(name)

        def guarded(*arguments: Any, **more: Any) -> Any:
            self.before()
            assert self.open.wait(60)
            if self.error is not None:
                raise self.error
            if name == "list_after" and not self.lists:
                return iter(())
            return getattr(self.there, name)(*arguments, **more)

        return guarded

    def __repr__(self) -> str:
        return "<a destination>"
