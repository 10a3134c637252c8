"""A snapshot: the store as it was at one commit, for as long as it is held.

It costs a registration and holds what it needs: the memtable of its moment, and the pages of its generation. What is
written after the next checkpoint's freeze goes to another memtable, so a long-held snapshot does not grow. What all of
them hold is bounded by `max_snapshot_bytes`: the oldest are given up. `Store.pins` shows who reads what since when.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from types import TracebackType

from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk, Pairs
from kvwal.engine.readers import Reader
from kvwal.errors import closed
from kvwal.keys import Seqno

__all__ = ["Snapshot"]


class Snapshot(OrderedMapping):
    """A read-only ordered map of one moment.

    Use it in a `with` block, or `close` it; a forgotten one is released when it is collected. All
    methods may be called from any thread. They raise `ClosedError` once it, or its store, is closed, and
    `SnapshotTooOld` once it was given up because it held too much.
    """

    __slots__ = ("__weakref__", "_reader", "_reads", "seqno")

    def __init__(self, engine: Engine, *, at: Seqno | datetime | None = None, owner: object = None) -> None:
        self._reader: Reader | None = None
        self._reads = engine.reads
        if at is None:
            self._reader = engine.reads.moments.reader("snapshot", owner=owner)
        else:
            self._reader = engine.upkeep.past.reader(at, "snapshot", owner)
        #: The last commit this snapshot contains.
        self.seqno: Seqno = self._reader.seqno

    @property
    def reader(self) -> Reader:
        """The registration of its moment. ClosedError if the snapshot is closed."""
        if self._reader is None:
            raise closed("snapshot")
        return self._reader

    def _read(self, key: bytes) -> bytes | None:
        try:
            return self._reads.read_at(self.reader, key)
        finally:
            # Closed by another thread meanwhile, what was read may be of no moment at all: say that it is closed.
            self.reader  # noqa: B018

    def _cached(self, bounds: Bounds) -> Pairs | None:
        seqno = self.reader.seqno
        return self._reads.cached_range(bounds.start, bounds.stop, bounds.limit, seqno, reverse=bounds.reverse)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        # The iterator has a registration of its own, so that it may outlive the snapshot.
        reader = self._reads.moments.again(self.reader, "scan")
        return self._reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        return self._reads.count_at(self.reader, start, stop)

    def close(self) -> None:
        """Let go of the moment. Idempotent."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.release()

    def __enter__(self) -> Snapshot:
        self.reader  # noqa: B018  # it is over without one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot at seqno {self.seqno}{' (closed)' if self._reader is None else ''}>"
