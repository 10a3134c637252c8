"""A store that is archived, a model of all its moments, and the check that each of them can be restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvwal.backup.archiver import Archiver
from kvwal.backup.chain import Held, list_held, replay
from kvwal.backup.names import BaseName
from kvwal.backup.port import Destination
from kvwal.engine.engine import Engine
from kvwal.keys import Seqno
from kvwal.log.record import Record

OPTIONS: dict[str, Any] = {
    "background": False,
    "keep_history_s": 0,
    "keep_history_bytes": 0,
    "segment_bytes": 16 << 10,
    "cache_bytes": 1 << 20,
}
Model = dict[Seqno, dict[bytes, bytes]]


def fake_base(engine: Engine, destination: Destination, tick: Callable[[], object]) -> None:
    """A base that has a name and no pages: what is in it, the model tells."""
    meta = engine.state.version.tree.meta
    tick()
    line = engine.upkeep.consumers.line
    destination.put_new(str(BaseName(line, meta.seqno, meta.generation + 1, 0)), b"base")


def archiver_of(db: Any, destination: Any, *, make_base: Any = fake_base, **more: Any) -> Archiver:
    more = {"rpo_s": 1.0, "max_behind_bytes": 1 << 30, **more}
    return Archiver(db.engine, destination, make_base, **more)


class Writer:
    """Writes to a store and remembers what it held after each commit."""

    def __init__(self, db: Any, model: Model | None = None) -> None:
        self.db = db
        self.model: Model = {Seqno(0): {}} if model is None else model

    def put(self, key: bytes, value: bytes) -> Seqno:
        seqno = self.db.put(key, value)
        self.model[seqno] = {**self.model[Seqno(seqno - 1)], key: value}
        return seqno

    def some(self, n: int, size: int = 20) -> None:
        for _ in range(n):
            i = len(self.model)
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
    for at in range(first, last + 1):
        plan = held.plan(Seqno(at))
        found = model[plan.after]
        for commit in replay(destination, store_id, plan.units, plan.after, Seqno(at)):
            found = state_after(found, commit.kind, commit.body)
        assert found == model[Seqno(at)], f"moment {at}"
