"""What the tables of a store and of a follower have in common, for tasks: their bytes of now, and what was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Generic, TypeVar

from kvwal.aio.reading import AsyncReading
from kvwal.aio.scanning import listed
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.typed import AsyncTypedReading
from kvwal.aio.workers import Workers, in_thread
from kvwal.api.opened import Opened
from kvwal.api.table import RecallingTable, TableDifference, TableVersion
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.merge import Chunk
from kvwal.engine.readers import Reader
from kvwal.feed.change import Change
from kvwal.following.waiting import Freshness
from kvwal.keys import BytesLike, as_key
from kvwal.pages import NotCached
from kvwal.tables.stored import StoredTable

__all__ = ["AsyncRecallingTable", "AsyncStored", "ReadParts"]

K = TypeVar("K")
V = TypeVar("V")


class ReadParts:
    """What tables have of the store, or the follower, that they are of."""

    __slots__ = ("engine", "freshness", "owner", "refuse_if_closing", "workers")

    def __init__(
        self,
        workers: Workers,
        owner: Opened,
        refuse_if_closing: Callable[[], None],
        freshness: Freshness | None = None,
    ) -> None:
        """
        Args:
            owner: of the threads' surface.
            refuse_if_closing: raises ClosedError once the asyncio one is closed.
            freshness: of a follower.
        """
        self.freshness = freshness
        self.engine = owner.engine
        self.workers = workers
        self.owner = owner
        self.refuse_if_closing = refuse_if_closing

    def refuse_if_over(self) -> None:
        """Raise what a use after the end, or from another loop, raises."""
        # First: in a forked child there is no running loop.
        self.engine.state.refuse_if_gone()
        self.refuse_if_closing()
        self.workers.refuse_other_loops()

    async def young(self) -> None:
        """Have a worker move a follower whose moment may be too old. Raises as `Follower.refresh`, and StaleError."""
        if self.freshness is not None and not self.freshness.holds():
            self.refuse_if_over()
            await self.workers.submit(self.freshness.ensure)


class AsyncStored(AsyncReading):
    """The bytes of a table, of now."""

    __slots__ = ("_parts", "_stored", "_workers")

    def __init__(self, parts: ReadParts, stored: StoredTable) -> None:
        self._parts = parts
        self._workers = parts.workers
        self._stored = stored

    def _refuse_if_over(self) -> None:
        self._parts.refuse_if_over()

    async def id(self) -> int | None:
        """See `StoredTable.id`."""
        self._parts.refuse_if_closing()
        await self._parts.young()
        try:
            return self._stored.id(cached_only=True)
        except NotCached:
            return await self._workers.submit(self._stored.id)

    async def read(self, key: bytes) -> bytes | None:
        """See `Way`."""
        self._parts.refuse_if_closing()
        await self._parts.young()
        try:
            return self._stored.read(key, cached_only=True)
        except NotCached:
            return await self._workers.submit(self._stored.read, key)

    _read = read

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        self._parts.refuse_if_closing()
        wanted = list(map(as_key, keys))
        await self._parts.young()
        try:
            return self._stored.get_many(wanted, cached_only=True)
        except NotCached:
            return await self._workers.submit(self._stored.get_many, wanted)

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        try:
            self._stored.id(cached_only=True)
        except NotCached:
            chunks = self._chunks_at(self._parts.engine.reads.moments.reader("scan", owner=self._parts.owner), bounds)
            # As in `Reads.chunks`: a generator that never started would not give its reader back.
            next(chunks)
            return chunks
        return self._stored._chunks(bounds)

    def _chunks_at(self, reader: Reader, bounds: Bounds) -> Iterator[Chunk]:
        """The same for a worker, which looks the table up, as of a reader."""
        try:
            yield [], []
            table = self._stored.id_at(reader)
            if table is not None:
                yield from self._parts.engine.reads.chunks(
                    reader, bounds.start, bounds.stop, reverse=bounds.reverse, table=table
                )
        finally:
            reader.release()

    @property
    def _mapping(self) -> OrderedMapping:
        return self._stored


class AsyncRecallingTable(AsyncTypedReading[K, V], Generic[K, V]):
    """The part of a table that looks back."""

    __slots__ = ()

    _parts: ReadParts
    #: What a worker reads the past with.
    _table: RecallingTable[K, V]

    async def versions(
        self,
        key: K,
        *,
        since: int | None = None,
        until: int | None = None,
        reverse: bool = True,
        limit: int | None = None,
    ) -> list[TableVersion[V]]:
        """What each commit made of `key`, newest first: `Table.versions`, as a list. See `AsyncStore.versions`."""
        self._parts.refuse_if_over()
        return await in_thread(
            lambda: list(self._table.versions(key, since=since, until=until, reverse=reverse, limit=limit))
        )

    def diff(
        self,
        a: int | datetime,
        b: int | datetime | None = None,
        *,
        start: K | Any = None,
        stop: K | Any = None,
        prefix: Any = None,
        reverse: bool = False,
    ) -> AsyncIterator[TableDifference[K, V]]:
        """The keys whose values at moment `b` are others than at `a`: `async for key, old, new in table.diff(a, b)`.

        Arguments and errors as in `Table.diff`.
        """
        self._parts.refuse_if_over()
        found = self._table.diff(a, b, start=start, stop=stop, prefix=prefix, reverse=reverse)
        return listed(self._parts.workers, self._parts.refuse_if_over, found)

    def at(self, at: int | datetime) -> AsyncSnapshot:
        """The store at a past moment: `await users.within(users.at(moment))` is the table then."""
        self._parts.refuse_if_over()
        return AsyncSnapshot(self._table.at(at), self._parts.engine.reads, self._parts.workers)

    def of(self, change: Change) -> tuple[K, V | None]:
        """The key and the value of a change of this table, as the feed tells it. As `kvwal.Table.of`."""
        return self._table.of(change)
