"""An index of a table for tasks: as `kvwal.Index`, awaited. What it reads comes from a worker thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

from kvwal.aio.scanning import listed
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.workers import Workers, in_thread
from kvwal.db.handle import Handle
from kvwal.db.snapshot import Snapshot
from kvwal.db.transaction import Transaction
from kvwal.tables.index import Index, IndexEntry, IndexReading, IndexWithin, state_of
from kvwal.tables.within import refuse_other_store

__all__ = ["AsyncIndex", "AsyncIndexReading"]

I = TypeVar("I")  # noqa: E741  # an index key, beside K and V
K = TypeVar("K")
V = TypeVar("V")


class AsyncIndexReading(Handle, Generic[I, K, V]):
    """An index, for reading: its entries are in the order of index keys, and then of the keys of the table."""

    __slots__ = ("_reading", "_refuse_if_over", "_workers")

    def __init__(
        self, reading: IndexReading[I, K, V], workers: Workers, refuse_if_over: Callable[[], None]
    ) -> None:
        self._reading = reading
        self._workers = workers
        self._refuse_if_over = refuse_if_over

    @property
    def name(self) -> str:
        """The name of the index."""
        return self._reading.name

    def scan(
        self,
        start: I | Any = None,
        stop: I | Any = None,
        *,
        prefix: Any = None,
        equal: I | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> AsyncIterator[IndexEntry[I, K, V]]:
        """Iterate over (index key, key, value), as of when the iteration begins. As `kvwal.Index.scan`."""
        return self._listed(
            lambda: self._reading.scan(start, stop, prefix=prefix, equal=equal, reverse=reverse, limit=limit)
        )

    def keys(
        self,
        start: I | Any = None,
        stop: I | Any = None,
        *,
        prefix: Any = None,
        equal: I | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> AsyncIterator[tuple[I, K]]:
        """Iterate over (index key, key). As `kvwal.Index.keys`."""
        return self._listed(
            lambda: self._reading.keys(start, stop, prefix=prefix, equal=equal, reverse=reverse, limit=limit)
        )

    async def _listed(self, begin: Callable[[], Any]) -> AsyncIterator[Any]:
        self._refuse_if_over()
        found = await self._workers.submit(begin)
        async for each in listed(self._workers, self._refuse_if_over, found):
            yield each

    async def get(self, index_key: I) -> list[tuple[K, V]]:
        """The pairs of the table that have this index key, in the order of their keys."""
        self._refuse_if_over()
        return await self._workers.submit(self._reading.get, index_key)

    async def count(
        self, start: I | Any = None, stop: I | Any = None, *, prefix: Any = None, equal: I | None = None
    ) -> int:
        """Number of entries of a range. As `kvwal.Index.count`."""
        self._refuse_if_over()
        return await self._workers.submit(self._reading.count, start, stop, prefix=prefix, equal=equal)

    def __repr__(self) -> str:
        return f"<kvwal.aio.Async{repr(self._reading).partition('.')[2]}"


class AsyncIndex(AsyncIndexReading[I, K, V], Generic[I, K, V]):
    """An index of a table. Made by `AsyncTable.index`. Any task of the loop may use it."""

    __slots__ = ("_index", "_owner")

    def __init__(
        self, index: Index[I, K, V], workers: Workers, refuse_if_over: Callable[[], None], owner: object
    ) -> None:
        """`owner`, the `AsyncStore`, stays as long as this."""
        super().__init__(index, workers, refuse_if_over)
        self._index = index
        self._owner = owner

    def within(self, other: AsyncTransaction | AsyncSnapshot) -> AsyncIndexReading[I, K, V]:
        """The index at the moment of a snapshot, or in a transaction. As `kvwal.Index.within`."""
        if not isinstance(other, AsyncTransaction | AsyncSnapshot):
            raise TypeError(f"a transaction or a snapshot is expected, not {type(other).__name__}")
        whole = other._mine() if isinstance(other, AsyncTransaction) else other._snapshot
        refuse_other_store(state_of(self._index), whole)
        of: Callable[[], Transaction | Snapshot]
        if isinstance(other, AsyncTransaction):
            of = other._mine
        else:
            snapshot = other._snapshot
            of = lambda: snapshot  # noqa: E731  # one line, as the other branch
        reading = IndexWithin(self._index._spec, of)
        return AsyncIndexReading(reading, self._workers, other._refuse_if_over)

    async def progress(self) -> tuple[int, int]:
        """How many keys of the table it has, and how many there are. As `kvwal.Index.progress`."""
        self._refuse_if_over()
        return await self._workers.submit(lambda: self._index.progress)

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is built. As `kvwal.Index.wait`; use `asyncio.timeout`, or `timeout_s`."""
        self._refuse_if_over()
        return await in_thread(self._index.wait, timeout_s)
