"""A store that is archived, a model of all its moments, and the check that each of them can be restored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import kvwal
from kvwal.backup.archive import make_base
from kvwal.backup.archiver import Archiver
from kvwal.backup.bases import read_header
from kvwal.backup.chain import Held, list_held
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
