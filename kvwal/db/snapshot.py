"""A snapshot: the store as it was at one commit, for as long as it is held.

It costs a registration and holds what it needs: the memtable of its moment, and the pages of its generation. What is
written after the next checkpoint's freeze goes to another memtable, so a long-held snapshot does not grow. What all of
them hold is bounded by `max_snapshot_bytes`: the oldest are given up. `Store.pins` shows who reads what since when.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Self

from kvwal.db.handle import Closing
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk, Pairs
from kvwal.engine.readers import Reader
from kvwal.engine.reads import Reads, has_expired
from kvwal.engine.state import State
from kvwal.errors import closed
from kvwal.keys import Seqno

__all__ = ["Snapshot", "SnapshotPart", "is_snapshot_of"]


class _Held:
    """The registration of a snapshot's moment; None once it is closed."""

    __slots__ = ("reader",)

    def __init__(self) -> None:
        self.reader: Reader | None = None


class SnapshotPart(OrderedMapping):
    """A table at the moment of a snapshot, for as long as that is open."""

    __slots__ = ("_held", "_reads", "_table")

    def __init__(self, held: _Held, reads: Reads, table: int) -> None:
        self._held = held
        self._reads = reads
        self._table = table

    @property
    def table(self) -> int:
        """The id of the table."""
        return self._table

    @property
    def reader(self) -> Reader:
        """The registration of its moment. ClosedError if the snapshot is closed."""
        reader = self._held.reader
        if reader is None:
            raise closed("snapshot")
        return reader

    def _read(self, key: bytes) -> bytes | None:
        try:
            return self._reads.read_at(self.reader, key, table=self._table)
        finally:
            # Closed by another thread meanwhile, what was read may be of no moment at all: say that it is closed.
            self.reader  # noqa: B018

    def _lasting(self, key: bytes) -> bytes | None:
        try:
            return self._reads.lasting(key, table=self._table, reader=self.reader)
        finally:
            self.reader  # noqa: B018  # as in `_read`

    def _may_expire(self) -> bool:
        return self._reads.moments.clock.in_use

    def _has_expired(self) -> bool:
        return has_expired(self._reads, self.reader, self._table)

    def _cached(self, bounds: Bounds) -> Pairs | None:
        seqno = self.reader.seqno
        return self._reads.cached_range(
            bounds.start, bounds.stop, bounds.limit, seqno, reverse=bounds.reverse, table=self._table
        )

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        # The iterator has a registration of its own, so that it may outlive the snapshot.
        reader = self._reads.moments.again(self.reader, "scan")
        return self._reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse, table=self._table)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        return self._reads.count_at(self.reader, start, stop, table=self._table)

    def _key_at(self, rank: int) -> bytes | None:
        return self._reads.key_of(self.reader, rank, table=self._table)


class Snapshot(SnapshotPart, Closing):
    """A read-only ordered map of one moment.

    Use it in a `with` block, or `close` it; a forgotten one is released when it is collected. All
    methods may be called from any thread. They raise `ClosedError` once it, or its store, is closed, and
    `SnapshotTooOld` once it was given up because it held too much.
    """

    __slots__ = ("__weakref__", "_state", "seqno")

    def __init__(self, engine: Engine, *, at: Seqno | datetime | None = None, owner: object = None) -> None:
        super().__init__(_Held(), engine.reads, 0)
        self._state = engine.state
        if at is None:
            engine.reads.moments.now.ready()
            reader = engine.reads.moments.reader("snapshot", owner=owner)
        else:
            reader = engine.upkeep.past.reader(at, "snapshot", owner)
        self._held.reader = reader
        #: The last commit this snapshot contains.
        self.seqno: Seqno = reader.seqno

    def part(self, table: int) -> SnapshotPart:
        """A table at this moment, by its id."""
        self.reader  # noqa: B018  # it is over without one
        return SnapshotPart(self._held, self._reads, table) if table else self

    def close(self) -> None:
        """Let go of the moment. Idempotent."""
        reader, self._held.reader = self._held.reader, None
        if reader is not None:
            reader.release()

    def __enter__(self) -> Self:
        self.reader  # noqa: B018  # it is over without one
        return self

    def __repr__(self) -> str:
        return f"<Snapshot at seqno {self.seqno}{' (closed)' if self._held.reader is None else ''}>"


def is_snapshot_of(snapshot: Snapshot, state: State) -> bool:
    """Whether it is one of the store that has this state, also of a follower: there a name means the same table."""
    own = snapshot._state
    return own is state or own.version.tree.meta.store_id == state.version.tree.meta.store_id
