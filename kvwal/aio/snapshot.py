"""A snapshot for tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType

from kvwal.aio.reading import AsyncReading, read_again
from kvwal.aio.workers import Workers
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import Snapshot
from kvwal.engine.merge import Chunk
from kvwal.engine.reads import Reads
from kvwal.keys import BytesLike, Seqno, as_key
from kvwal.pages import NotCached

__all__ = ["AsyncSnapshot"]


class AsyncSnapshot(AsyncReading):
    """A read-only ordered map of one moment. Use it in an `async with` block, or `close` it.

    Any task of the loop may use it, several at a time. A forgotten one is released when it is collected.
    """

    __slots__ = ("__weakref__", "_reads", "_snapshot", "_workers")

    def __init__(self, snapshot: Snapshot, reads: Reads, workers: Workers) -> None:
        self._snapshot = snapshot
        self._reads = reads
        self._workers = workers

    @property
    def seqno(self) -> Seqno:
        """The last commit this snapshot contains."""
        return self._snapshot.seqno

    def _refuse_if_over(self) -> None:
        self._workers.refuse_other_loops()
        self._snapshot.reader  # noqa: B018  # closed without one

    async def _read(self, key: bytes) -> bytes | None:
        return (await self._read_all([key]))[0]

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing."""
        return await self._read_all(list(map(as_key, keys)))

    async def _read_all(self, keys: list[bytes]) -> list[bytes | None]:
        reader, reads = self._snapshot.reader, self._reads
        try:
            return [reads.read_at(reader, key, cached_only=True) for key in keys]
        except NotCached:
            # A registration of its own: the snapshot may be closed while the worker reads.
            return await self._workers.submit(read_again, reads, reads.moments.again(reader, "get"), keys)

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._snapshot._chunks(bounds)

    @property
    def _mapping(self) -> OrderedMapping:
        return self._snapshot

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
