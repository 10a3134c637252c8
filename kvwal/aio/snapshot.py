"""A snapshot for tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType

from kvwal.aio.reading import AsyncReading, read_again
from kvwal.aio.workers import Workers
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import Snapshot, SnapshotPart
from kvwal.engine.merge import Chunk
from kvwal.engine.reads import Reads
from kvwal.keys import BytesLike, Seqno, as_key
from kvwal.pages import NotCached

__all__ = ["AsyncSnapshot", "AsyncSnapshotPart"]


class AsyncSnapshotPart(AsyncReading):
    """A table at the moment of a snapshot, for as long as that is open."""

    __slots__ = ("_part", "_reads", "_workers")

    def __init__(self, part: SnapshotPart, reads: Reads, workers: Workers) -> None:
        self._part = part
        self._reads = reads
        self._workers = workers

    def _refuse_if_over(self) -> None:
        self._workers.refuse_other_loops()
        self._part.reader  # noqa: B018  # closed without one

    async def _read(self, key: bytes) -> bytes | None:
        return (await self._read_all([key]))[0]

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing."""
        return await self._read_all(list(map(as_key, keys)))

    async def _read_all(self, keys: list[bytes]) -> list[bytes | None]:
        reader, reads, table = self._part.reader, self._reads, self._part.table
        try:
            return [reads.read_at(reader, key, table=table, cached_only=True) for key in keys]
        except NotCached:
            # A registration of its own: the snapshot may be closed while the worker reads.
            return await self._workers.submit(read_again, reads, reads.moments.again(reader, "get"), table, keys)

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._part._chunks(bounds)

    @property
    def _mapping(self) -> OrderedMapping:
        return self._part


class AsyncSnapshot(AsyncSnapshotPart):
    """A read-only ordered map of one moment. Use it in an `async with` block, or `close` it.

    Any task of the loop may use it, several at a time. A forgotten one is released when it is collected.
    """

    __slots__ = ("__weakref__", "_snapshot")

    def __init__(self, snapshot: Snapshot, reads: Reads, workers: Workers) -> None:
        super().__init__(snapshot, reads, workers)
        self._snapshot = snapshot

    @property
    def seqno(self) -> Seqno:
        """The last commit this snapshot contains."""
        return self._snapshot.seqno

    def part(self, table: int) -> AsyncSnapshotPart:
        """A table at this moment, by its id."""
        return AsyncSnapshotPart(self._snapshot.part(table), self._reads, self._workers)

    async def close(self) -> None:
        """Let go of the moment. Idempotent."""
        self._snapshot.close()

    async def __aenter__(self) -> AsyncSnapshot:
        self._refuse_if_over()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._snapshot.close()

    def __repr__(self) -> str:
        return f"<Async{repr(self._snapshot)[1:]}"
