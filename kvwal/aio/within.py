"""A table within a transaction of tasks, and at the moment of a snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from kvwal.aio.reading import AsyncReading
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.typed import AsyncTypedReading
from kvwal.aio.workers import Workers
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.merge import Chunk
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.tables import NEXT_IDS_KEY, row_key
from kvwal.engine.value import Value
from kvwal.keys import BytesLike, as_key
from kvwal.pages import NotCached
from kvwal.tables.spec import TableSpec
from kvwal.tables.within import Empty, InTransaction, Unmade, row_in

__all__ = ["AsyncSnapshotTable", "AsyncTransactionTable", "in_snapshot", "in_transaction"]

K = TypeVar("K")
V = TypeVar("V")


class _AsyncEmpty(AsyncReading):
    """A table that does not exist in the whole that it would be a part of."""

    __slots__ = ("_whole", "_workers")

    def __init__(self, whole: AsyncReading, workers: Workers) -> None:
        self._whole = whole
        self._workers = workers

    def _refuse_if_over(self) -> None:
        self._whole._refuse_if_over()

    async def _read(self, key: bytes) -> None:
        self._refuse_if_over()

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        self._refuse_if_over()
        return [None for _ in map(as_key, keys)]

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        return iter(())

    @property
    def _mapping(self) -> OrderedMapping:
        return Empty()


class _AsyncUnmade(AsyncReading):
    """A table that a transaction has found none of: empty until the transaction makes it."""

    __slots__ = ("_own", "_txn", "_workers")

    def __init__(self, own: InTransaction[Any, Any], txn: AsyncTransaction, workers: Workers) -> None:
        self._own = own
        self._txn = txn
        self._workers = workers

    def _now(self) -> AsyncReading:
        part = self._own.find()
        return _AsyncEmpty(self._txn, self._workers) if part is None else self._txn.part(part.table)

    def _refuse_if_over(self) -> None:
        self._txn._refuse_if_over()

    async def _read(self, key: bytes) -> bytes | None:
        return await self._now()._read(key)

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        return await self._now().get_many(keys)

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._now()._chunks(bounds)

    @property
    def _mapping(self) -> OrderedMapping:
        return Unmade(self._own.find)


class AsyncSnapshotTable(AsyncTypedReading[K, V]):
    """A table as it was at the moment of a snapshot; empty if there was none."""

    __slots__ = ("_part",)

    def __init__(self, spec: TableSpec[K, V], part: AsyncReading) -> None:
        super().__init__(spec)
        self._part = part

    def raw(self) -> AsyncReading:
        """The same table as bytes."""
        return self._part

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncSnapshotTable {self._spec}>"


async def in_snapshot(spec: TableSpec[K, V], snapshot: AsyncSnapshot, workers: Workers) -> AsyncSnapshotTable[K, V]:
    """A table at the moment of a snapshot."""
    if spec.is_default:
        return AsyncSnapshotTable(spec, snapshot)
    rows = await _rows(snapshot.part(SYSTEM_TABLE), row_key(spec.name))
    row = row_in(rows.get, spec)
    return AsyncSnapshotTable(spec, _AsyncEmpty(snapshot, workers) if row is None else snapshot.part(row.id))


async def _rows(system: AsyncReading, *keys: bytes) -> dict[bytes, Value]:
    return dict(zip(keys, await system.get_many(keys), strict=True))


class AsyncTransactionTable(AsyncTypedReading[K, V], Generic[K, V]):
    """A table within a transaction: what it reads is validated when that commits, and so is that the table is there.

    Reads are awaited and writes are not. It is made when something is put into it.
    """

    __slots__ = ("_own", "_txn", "_workers")

    def __init__(
        self, spec: TableSpec[K, V], txn: AsyncTransaction, workers: Workers, own: InTransaction[K, V]
    ) -> None:
        super().__init__(spec)
        self._txn = txn
        self._workers = workers
        self._own = own

    def raw(self) -> AsyncReading:
        """The same table as bytes."""
        part = self._own.find()
        if part is None:
            return _AsyncUnmade(self._own, self._txn, self._workers)
        return self._txn.part(part.table)

    def put(self, key: K, value: V, *, expire_s: float | None = None) -> None:
        """Set `key` to `value` when the transaction commits. `expire_s`: see `Table.put`."""
        self._own.put(key, value, expire_s)

    async def touch(self, key: K, *, expire_s: float | None) -> bool:
        """Let `key` expire `expire_s` seconds from this call on: see `Transaction.touch`."""
        encoded = self._spec.encode_key(key)
        part = self._own.find()
        return part is not None and await self._txn.part(part.table).touch(encoded, expire_s=expire_s)

    def delete(self, key: K) -> None:
        """Remove `key`, if it is there, when the transaction commits. It is not read: no conflict comes of it."""
        self._own.delete(key)

    def delete_range(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> None:
        """Remove every key of a range (see `scan`) when the transaction commits."""
        self._own.delete_range(start, stop, prefix)

    def update(self, other: Mapping[K, V] | Iterable[tuple[K, V]] = (), /) -> None:
        """Put every pair when the transaction commits. None of them if one cannot be stored."""
        self._own.update(other)

    def clear(self) -> None:
        """Remove every key when the transaction commits."""
        self._own.delete_range(None, None, None)

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncTransactionTable {self._spec}>"


async def in_transaction(
    spec: TableSpec[K, V], txn: AsyncTransaction, workers: Workers
) -> AsyncTransactionTable[K, V]:
    """A table within a transaction."""
    # What is read of table 1 is read here, so that no write waits: of one moment, it stays as it is.
    rows: dict[bytes, Value] = {}
    if not spec.is_default:
        system = txn.part(SYSTEM_TABLE)
        rows = await _rows(system, row_key(spec.name))
        if rows[row_key(spec.name)] is None:
            rows |= await _rows(system, NEXT_IDS_KEY)

    def read(key: bytes) -> Value:
        try:
            # With what the transaction itself has written by then.
            return txn._mine().part(SYSTEM_TABLE).peek(key)
        except NotCached:
            return rows[key]

    return AsyncTransactionTable(spec, txn, workers, InTransaction(spec, txn._mine, read))
