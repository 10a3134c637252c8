"""A table within a transaction, at the moment of a snapshot, and in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any, Generic, TypeVar

from kvwal.batch import WriteBatch, pairs_of
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.part import TransactionPart
from kvwal.db.snapshot import Snapshot, is_snapshot_of
from kvwal.db.transaction import Transaction, is_transaction_of, put_row
from kvwal.engine.merge import Chunk
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.state import State
from kvwal.engine.tables import TableRow, check_codecs, decode_row, keep_asked, make_row, row_key
from kvwal.engine.value import Value
from kvwal.errors import other_store
from kvwal.expiring import Expiring, expire_us
from kvwal.keys import STAMP
from kvwal.tables.reading import TypedReading
from kvwal.tables.spec import OfTable, TableSpec
from kvwal.tables.writing import Target, Way, into

__all__ = [
    "BatchTable",
    "Empty",
    "InTransaction",
    "SnapshotTable",
    "TransactionTable",
    "Unmade",
    "refuse_other_store",
    "row_in",
]

K = TypeVar("K")
V = TypeVar("V")


class Empty(OrderedMapping):
    """A table that does not exist."""

    __slots__ = ()

    def _read(self, key: bytes) -> None:
        return None

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        return iter(())

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        return 0


class Unmade(OrderedMapping):
    """A table that a transaction has found none of: empty until the transaction makes it."""

    __slots__ = ("_find",)

    def __init__(self, find: Callable[[], TransactionPart | None]) -> None:
        self._find = find

    def _now(self) -> OrderedMapping:
        part = self._find()
        return Empty() if part is None else part

    def _read(self, key: bytes) -> bytes | None:
        return self._now()._read(key)

    def _lasting(self, key: bytes) -> bytes | None:
        return self._now()._lasting(key)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._now()._walk(bounds)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        return self._now()._count(start, stop)

    def _count_of(self, bounds: Bounds) -> int:
        return self._now()._count_of(bounds)


def row_in(read: Callable[[bytes], Value], spec: TableSpec[Any, Any]) -> TableRow | None:
    """The row of a table, by what `read` says of table 1; None if there is none. TableCodecError."""
    key = row_key(spec.name)
    value = read(key)
    if value is None:
        return None
    row = decode_row(key, value)
    check_codecs(row, spec.asked)
    return row


def refuse_other_store(state: State, other: Transaction | Snapshot | WriteBatch) -> None:
    """UsageError if what a table is to take part in is of another open store than the one that has this state.

    A snapshot may be one of a follower of the same store.
    """
    if isinstance(other, Transaction):
        is_own = is_transaction_of(other, state)
    else:
        is_own = is_snapshot_of(other, state) if isinstance(other, Snapshot) else other.is_of(state)
    if not is_own:
        raise other_store(type(other).__name__.removeprefix("Write").lower())


class SnapshotTable(TypedReading[K, V]):
    """A table as it was at the moment of a snapshot; empty if there was none. Thread-safe."""

    __slots__ = ("_part",)

    def __init__(self, spec: TableSpec[K, V], snapshot: Snapshot) -> None:
        super().__init__(spec)
        self._part: OrderedMapping = snapshot
        if not spec.is_default:
            row = row_in(snapshot.part(SYSTEM_TABLE).get, spec)
            self._part = Empty() if row is None else snapshot.part(row.id)

    def raw(self) -> OrderedMapping:
        """The same table as bytes."""
        return self._part

    def __repr__(self) -> str:
        return f"<kvwal.SnapshotTable {self._spec}>"


class InTransaction(Generic[K, V]):
    """A table in a transaction: found there, and made when something is put into it. Nothing here waits."""

    __slots__ = ("_lasts_us", "_part", "_read", "_row", "_spec", "_txn")

    def __init__(
        self, spec: TableSpec[K, V], txn: Callable[[], Transaction], read: Callable[[bytes], Value]
    ) -> None:
        """`txn` gives the transaction, and raises where it is over; `read` reads table 1 within it."""
        self._spec = spec
        self._txn = txn
        self._read = read
        self._part: TransactionPart | None = txn().part(0) if spec.is_default else None
        # What is to be known before a first write.
        self._row: TableRow | None = None
        # The default expiry; 0: none.
        self._lasts_us = 0
        self.find()

    def find(self) -> TransactionPart | None:
        """The table; None if there is none."""
        txn = self._txn()
        if self._part is None:
            self._row = row = row_in(self._read, self._spec)
            self._part = None if row is None else txn.part(row.id)
        return self._part

    def _made(self) -> TransactionPart:
        part, row = self.find(), self._row
        if part is not None and row is None:
            return part
        spec, txn, rows = self._spec, self._txn(), WriteBatch()
        if row is None:
            row = make_row(spec.name, spec.asked, self._read, rows)
        else:
            keep_asked(row, spec.asked, rows)
        self._lasts_us = spec.asked.lasts_us(row)
        for key, value in rows.writes.items():
            assert value is not None, "a row is deleted"
            put_row(txn, key, value)
        self._row = None
        self._part = part = txn.part(row.id)
        return part

    def put(self, key: K, value: V, expire_s: float | None = None) -> None:
        """Set `key` to `value`."""
        puts = WriteBatch()
        # Checked before a table is made.
        expires_us = None if expire_s is None else self._txn().clock.now_us() + expire_us(expire_s)
        self._spec.put_into(puts, key, value, expires_us)
        self._add(puts)

    def update(self, other: Mapping[K, V] | Iterable[tuple[K, V]]) -> None:
        """Put every pair."""
        puts = self._spec.puts(other)
        if puts.writes:
            self._add(puts)

    def _add(self, puts: WriteBatch) -> None:
        part = self._made()
        if self._lasts_us:
            puts.expire_others(self._txn().clock.now_us() + self._lasts_us)
        for encoded, data in puts.writes.items():
            assert data is not None, "it is a put"
            if puts.stamped is not None and encoded in puts.stamped:
                part.put_stamped(encoded[: -STAMP.size], data)
            elif type(data) is Expiring:
                part._put_until(encoded, data.value, data.expires_us, 0)
            else:
                part.put(encoded, data)

    def touch(self, key: K, expire_s: float | None) -> bool:
        """Let a key expire at another time; whether it is there."""
        encoded = self._spec.encode_key(key)
        part = self.find()
        if part is None:
            return False
        return part.touch(encoded, expire_s=expire_s)

    def delete(self, key: K) -> None:
        """Remove `key`, which is not read."""
        encoded = self._spec.encode_key(key)
        part = self.find()
        if part is not None:
            part.delete(encoded)

    def delete_range(self, start: Any, stop: Any, prefix: Any) -> None:
        """Remove every key of a range."""
        bounds = self._spec.bounds(start, stop, prefix, False, None)
        part = self.find()
        if part is not None:
            part.delete_range(bounds.start, bounds.stop)


class TransactionTable(TypedReading[K, V], MutableMapping[K, V], Generic[K, V]):
    """A table within a transaction: what it reads is validated when that commits, and so is that the table is there.

    It is made when something is put into it. For one thread at a time, and only while the transaction is open.
    """

    __slots__ = ("_own",)

    def __init__(self, spec: TableSpec[K, V], txn: Transaction) -> None:
        super().__init__(spec)
        self._own: InTransaction[K, V] = InTransaction(spec, lambda: txn, txn.part(SYSTEM_TABLE).get)

    def raw(self) -> OrderedMapping:
        """The same table as bytes."""
        part = self._own.find()
        return Unmade(self._own.find) if part is None else part

    def put(self, key: K, value: V, *, expire_s: float | None = None) -> None:
        """Set `key` to `value` when the transaction commits. `expire_s`: see `Table.put`."""
        self._own.put(key, value, expire_s)

    def touch(self, key: K, *, expire_s: float | None) -> bool:
        """Let `key` expire `expire_s` seconds from this call on: see `Transaction.touch`."""
        return self._own.touch(key, expire_s)

    def __setitem__(self, key: K, value: V) -> None:
        self._own.put(key, value)

    def delete(self, key: K) -> None:
        """Remove `key`, if it is there, when the transaction commits. It is not read: no conflict comes of it."""
        self._own.delete(key)

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        self._own.delete(key)

    def delete_range(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> None:
        """Remove every key of a range (see `scan`) when the transaction commits."""
        self._own.delete_range(start, stop, prefix)

    def update(  # type: ignore[override]  # what has `keys` and `[]` is taken too, and has no type of its own
        self, other: Mapping[K, V] | Iterable[tuple[K, V]] = (), /, **keywords: V
    ) -> None:
        """Put every pair when the transaction commits. None of them if one cannot be stored."""
        self._own.update(chain[Any](pairs_of(other), keywords.items()))

    def clear(self) -> None:
        """Remove every key when the transaction commits."""
        self.delete_range()

    def popitem(self) -> tuple[K, V]:
        """Remove the pair with the largest key, and return it; KeyError if there is none."""
        pair = self.last()
        if pair is None:
            raise KeyError(f"popitem(): table {self.name!r} is empty")
        self.delete(pair[0])
        return pair

    def __repr__(self) -> str:
        return f"<kvwal.TransactionTable {self._spec}>"


class BatchTable(OfTable[K, V], Generic[K, V]):
    """What a batch writes to a table."""

    __slots__ = ("_lasts_us", "_part", "_spec")

    def __init__(self, spec: TableSpec[K, V], part: WriteBatch, lasts_us: int) -> None:
        """`lasts_us`: the default expiry; 0: none."""
        self._spec = spec
        self._part = part
        self._lasts_us = lasts_us

    @classmethod
    def of(cls, spec: TableSpec[K, V], batch: WriteBatch, state: State, way: Way, found: Target) -> BatchTable[K, V]:
        """What a batch writes to a table that an open store, which has this state, has found by its name."""
        part = batch.part(found.id)
        part.store, part.now_us = state, way.now_us
        return cls(spec, part, found.lasts_us)

    def put(self, key: K, value: V, *, expire_s: float | None = None) -> None:
        """Set `key` to `value`. TypeError or ValueError if either cannot be stored. `expire_s`: see `Table.put`."""
        lasts_us = self._lasts_us if expire_s is None else expire_us(expire_s)
        self._spec.put_into(self._part, key, value, self._part.now_us() + lasts_us if lasts_us else None)

    def __setitem__(self, key: K, value: V) -> None:
        self.put(key, value)

    def delete(self, key: K) -> None:
        """Remove `key` if it is there."""
        self._part.delete(self._spec.key.encode(key))

    def delete_range(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> None:
        """Remove every key of a range: see `Table.scan`."""
        bounds = self._spec.bounds(start, stop, prefix, False, None)
        self._part.delete_range(bounds.start, bounds.stop)

    def clear(self) -> None:
        """Remove every key of the table, and not only what the batch puts, as `WriteBatch.clear` does."""
        self.delete_range()

    def update(self, other: Mapping[K, V] | Iterable[tuple[K, V]] = (), /) -> None:
        """Put every pair; none of them if one cannot be stored."""
        puts = self._spec.puts(other)
        if self._lasts_us:
            puts.expire_others(self._part.now_us() + self._lasts_us)
        into(puts, self._part)

    def __repr__(self) -> str:
        return f"<kvwal.BatchTable {self._spec}, {len(self._part)} writes>"
