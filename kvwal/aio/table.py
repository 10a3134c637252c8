"""A table for tasks: as `kvwal.Table`, awaited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Generic, Literal, TypeVar, overload

from kvwal.aio.commits import Commits
from kvwal.aio.committer import say_committed
from kvwal.aio.index import AsyncIndex
from kvwal.aio.reading import AsyncReading
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.stored import AsyncRecallingTable, AsyncStored, ReadParts
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.typed import AsyncTypedReading
from kvwal.aio.within import AsyncSnapshotTable, AsyncTransactionTable, in_snapshot, in_transaction
from kvwal.aio.workers import Workers, in_thread, to_the_end
from kvwal.api.store import Store
from kvwal.api.table import Table
from kvwal.batch import WriteBatch
from kvwal.codecs import KeyCodec
from kvwal.engine.request import Operation
from kvwal.engine.value import Value
from kvwal.errors import TableNotFoundError
from kvwal.keys import KeyRange, Seqno
from kvwal.options import Durability
from kvwal.pages import NotCached
from kvwal.tables.migration import MIGRATION_BATCH, Migration, MigrationReport, Progress
from kvwal.tables.spec import TableSpec
from kvwal.tables.stored import StoredTable
from kvwal.tables.within import BatchTable, refuse_other_store
from kvwal.tables.writing import How, Target, Writing, bring_back, made

__all__ = ["AsyncTable", "TaskParts"]

I = TypeVar("I")  # noqa: E741  # an index key, beside K and V
K = TypeVar("K")
V = TypeVar("V")


class TaskParts(ReadParts):
    """What the tables of an `AsyncStore` have of it."""

    __slots__ = ("commits",)

    def __init__(self, commits: Commits, workers: Workers, owner: Store) -> None:
        super().__init__(workers, owner, commits.refuse_if_closing)
        self.commits = commits


class AsyncStoredTable(AsyncStored):
    """The bytes of a table, of now, and the way of a task to it (see kvwal/tables/writing.py)."""

    __slots__ = ("ahead",)

    _parts: TaskParts

    def __init__(self, parts: TaskParts, stored: StoredTable) -> None:
        super().__init__(parts, stored)
        self.ahead = 1

    def now_us(self) -> int:
        """See `Way`."""
        return self._parts.engine.reads.moments.clock.now_us()

    async def to_write(self) -> Target | None:
        """See `Way`."""
        self._parts.refuse_if_closing()
        try:
            return self._stored.to_write(cached_only=True)
        except NotCached:
            return await self._workers.submit(self._stored.to_write)

    async def read_edge(self, bounds: KeyRange, most: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        """See `Way`."""
        return [pair async for pair in self.scan(*bounds, reverse=reverse, limit=most)]

    async def put(self, key: bytes, value: bytes, durability: Durability | None) -> Seqno | None:
        """See `Way`."""
        found = await self.to_write()
        if found is None or found.lasts_us or found.is_indexed:
            return None
        try:
            return await self._parts.commits.put(key, value, durability, found.id, found.names)
        except TableNotFoundError:
            return None

    async def index_keys(self, writes: Mapping[bytes, Value]) -> dict[int, dict[bytes, bytes]] | None:
        """See `Way`."""
        try:
            return self._stored.index_keys(writes, cached_only=True)
        except NotCached:
            return await self._workers.submit(self._stored.index_keys, writes)

    async def commit(self, batch: WriteBatch, how: How) -> Seqno:
        """See `Way`."""
        return await self._parts.commits.batch(batch, how.durability, how.extension)

    async def operate(self, operation: Operation, how: How) -> Seqno:
        """See `Way`."""
        try:
            return await self._parts.commits.operation(operation, how.durability)
        finally:
            self._stored.ask_again()


class AsyncTable(Writing[K, V], AsyncRecallingTable[K, V], Generic[K, V]):
    """A named, ordered map of one store, with keys and values of Python's types. Made by `AsyncStore.table`.

    Any task of its loop may use it. It reads and writes as the store does: each write is a commit of its own, which
    rides with those of other tasks, and `within` takes part in a transaction, a batch or a snapshot. The table comes
    to be with the first commit that puts something into it. If it has other codecs, the first use of it raises
    TableCodecError. Cancellation: see `AsyncStore`.
    """

    __slots__ = ("__weakref__", "_owner", "_parts", "_table", "_way")

    _way: AsyncStoredTable

    def __init__(self, parts: TaskParts, spec: TableSpec[K, V], owner: object) -> None:
        """`owner`, the `AsyncStore`, stays as long as this: when it goes, no commit is made any more."""
        self._owner = owner
        AsyncTypedReading.__init__(self, spec)
        self._parts = parts
        self._way = AsyncStoredTable(parts, StoredTable(parts.engine, spec))
        # What a worker reads the past with.
        self._table: Table[K, V] = Table(parts.engine, spec, parts.owner)

    def raw(self) -> AsyncReading:
        """The same table as bytes, for reading: where a value cannot be decoded, it is there."""
        return self._way

    async def id(self) -> int | None:
        """The number that stands for the table in `changes` and `commits`; None while there is none."""
        return await self._way.id()

    @overload
    async def within(self, other: AsyncTransaction) -> AsyncTransactionTable[K, V]: ...
    @overload
    async def within(self, other: AsyncSnapshot) -> AsyncSnapshotTable[K, V]: ...
    @overload
    async def within(self, other: WriteBatch) -> BatchTable[K, V]: ...
    async def within(self, other: AsyncTransaction | AsyncSnapshot | WriteBatch) -> Any:
        """This table as a part of something larger: see `kvwal.Table.within`. The table is looked up here."""
        state = self._parts.engine.state
        if isinstance(other, AsyncTransaction):
            refuse_other_store(state, other._mine())
            return await in_transaction(self._spec, other, self._parts.workers)
        if isinstance(other, AsyncSnapshot):
            refuse_other_store(state, other._snapshot)
            return await in_snapshot(self._spec, other, self._parts.workers)
        if isinstance(other, WriteBatch):
            refuse_other_store(state, other)
            return BatchTable.of(self._spec, other, state, self._way, await made(self._way, self._spec))
        raise TypeError(f"a transaction, a snapshot or a batch is expected, not {type(other).__name__}")

    # -- the past -----------------------------------------------------------------------------

    async def revert(
        self,
        key: K,
        *,
        to: int | datetime,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Bring back what `key` was at a past moment, in a new commit. As `kvwal.Table.revert`."""
        self._parts.refuse_if_over()
        how = How(durability, meta)
        encoded, value = await in_thread(self._table.past, key, to)
        return await bring_back(self._way, self._spec, encoded, value, how)

    async def migrate(
        self,
        *,
        batch: int = MIGRATION_BATCH,
        dry_run: bool = False,
        progress: Progress | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> MigrationReport:
        """Rewrite the values that are of former versions of the codec in the newest: `Table.migrate`.

        Threads take the steps, and call the codec; the loop calls `progress`. A task that is cancelled waits for the
        end of a step. What was done then is kept, and the next call goes on there.
        """
        self._parts.refuse_if_over()
        going = await in_thread(
            Migration, self._parts.engine, self._spec, batch=batch, dry_run=dry_run, durability=durability, meta=meta
        )
        more = True
        while more:
            self._parts.refuse_if_over()
            more, cancelled = await to_the_end(going.step)
            if cancelled is not None:
                raise cancelled
            if progress is not None:
                progress(going.report.examined, going.total)
        return going.report

    # -- indexes ------------------------------------------------------------------------------

    @overload
    async def index(
        self, name: str, *, key: Callable[[V], I | None], codec: type[I] | KeyCodec[I], many: Literal[False] = False
    ) -> AsyncIndex[I, K, V]: ...
    @overload
    async def index(
        self, name: str, *, key: Callable[[V], Iterable[I]], codec: type[I] | KeyCodec[I], many: Literal[True]
    ) -> AsyncIndex[I, K, V]: ...
    async def index(
        self, name: str, *, key: Callable[[V], Any], codec: Any, many: bool = False
    ) -> AsyncIndex[Any, K, V]:
        """Declare an index. As `kvwal.Table.index`, in a thread; `key` is called in the loop's thread, or a worker.

        A task that is cancelled waits for the end; the index is declared then.
        """
        self._parts.refuse_if_over()
        declare = partial(self._table.index, name, key=key, codec=codec, many=many)
        index, cancelled = await to_the_end(declare)
        if cancelled is not None:
            raise cancelled
        return AsyncIndex(index, self._parts.workers, self._parts.refuse_if_over, self._owner)

    async def drop_index(self, name: str, *, meta: Mapping[str, str] | None = None) -> Seqno:
        """Remove an index. As `kvwal.Table.drop_index`, in a thread. Cancellation: as in `AsyncStore.drop_table`."""
        self._parts.refuse_if_over()
        seqno, cancelled = await to_the_end(partial(self._table.drop_index, name, meta=meta))
        if cancelled is not None:
            say_committed(cancelled, seqno)
            raise cancelled
        return seqno

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncTable {self._spec}>"
