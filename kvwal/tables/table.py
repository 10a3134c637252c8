"""A table of a store: what `kvwal.api.table` adds the past to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, Generic, TypeVar, overload

from kvwal.batch import WriteBatch
from kvwal.db.mapping import OrderedMapping
from kvwal.db.snapshot import Snapshot
from kvwal.db.transaction import Transaction
from kvwal.engine.engine import Engine
from kvwal.engine.value import MISSING, Value
from kvwal.keys import Seqno
from kvwal.options import Durability
from kvwal.tables.reading import TypedReading
from kvwal.tables.spec import TableSpec, is_stamped
from kvwal.tables.stored import StoredTable, Waiting
from kvwal.tables.within import BatchTable, SnapshotTable, TransactionTable, refuse_other_store
from kvwal.tables.writing import How, Way, Writing, at_once, made, put_bytes, remove

__all__ = ["WritableTable"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")

_MISSING: Any = object()

class _Writes(Writing[K, V], Generic[K, V]):
    __slots__ = ("_spec", "_way")

    def __init__(self, spec: TableSpec[K, V], way: Way) -> None:
        self._spec = spec
        self._way = way


class WritableTable(TypedReading[K, V], MutableMapping[K, V], Generic[K, V]):
    """A named, ordered map of one store, with keys and values of Python's types. Made by `Store.table`.

    Thread-safe, every method. It reads and writes as the store does: reads never wait for writers, each write is a
    commit of its own, and `within` takes part in a transaction, a batch or a snapshot. The table comes to be with the
    first commit that puts something into it.
    """

    __slots__ = ("__weakref__", "_cache", "_owner", "_state", "_stored", "_way", "_writes")

    def __init__(self, engine: Engine, spec: TableSpec[K, V], owner: object) -> None:
        """`owner` stays as long as this."""
        super().__init__(spec)
        self._state = engine.state
        self._cache = engine.state.cache
        self._stored = StoredTable(engine, spec)
        self._way = Waiting(engine, self._stored)
        self._writes = _Writes(spec, self._way)
        self._owner = owner

    def raw(self) -> OrderedMapping:
        """The same table as bytes, for reading: where a value cannot be decoded, it is there."""
        return self._stored

    def _read(self, key: bytes) -> Value:
        return self._stored.read(key)

    @overload
    def get(self, key: K) -> V | None: ...
    @overload
    def get(self, key: K, default: V | T) -> V | T: ...
    def get(self, key: K, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for a key of another type; CodecError."""
        data, known = self._encode(key), self._stored.known
        if known is not None:
            # Hot: one dict hit, as in `StoredTable.read`.
            try:
                value: Value = self._cache.rows[known[2], data]
            except (KeyError, TypeError, ValueError):
                known = None
        if known is None or known[0] is not self._cache.names.now:
            value = self._stored.read(data)
        return default if value is None else self._decode(value)

    def __getitem__(self, key: K) -> V:
        value = self.get(key, _MISSING)
        if value is _MISSING:
            raise KeyError(key)
        return value

    @property
    def id(self) -> int | None:
        """The number that stands for the table in `changes` and `commits`; None while there is none."""
        return self._stored.id()

    # -- taking part --------------------------------------------------------------------------

    @overload
    def within(self, other: Transaction) -> TransactionTable[K, V]: ...
    @overload
    def within(self, other: Snapshot) -> SnapshotTable[K, V]: ...
    @overload
    def within(self, other: WriteBatch) -> BatchTable[K, V]: ...
    def within(self, other: Transaction | Snapshot | WriteBatch) -> Any:
        """This table as a part of something larger.

        Args:
            other: a transaction, of which reads and writes of the table are then a part; a snapshot, for the table at
                its moment; or a batch, for writes that are committed with its others. A batch needs the table to be
                there: if it is not, an empty one is made at once, in a commit of its own.

        Raises: UsageError if that is of another open store than the table, or is a batch with a table of another one.
        """
        if not isinstance(other, Transaction | Snapshot | WriteBatch):
            raise TypeError(f"a transaction, a snapshot or a batch is expected, not {type(other).__name__}")
        refuse_other_store(self._state, other)
        if isinstance(other, Transaction):
            return TransactionTable(self._spec, other)
        if isinstance(other, Snapshot):
            return SnapshotTable(self._spec, other)
        return BatchTable.of(self._spec, other, self._state, self._way, at_once(made, self._way, self._spec))

    # -- writing: see kvwal/tables/writing.py ---------------------------------------------------

    def put(
        self,
        key: K,
        value: V,
        *,
        expire_s: float | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Set `key` to `value`, and return the commit's seqno. As `Store.put`; TypeError for values of other types.

        The last part of a tuple may be `kvwal.SEQNO`: the commit fills in `Versionstamp(seqno, 0)`. So what is put with
        such keys is in the order of the commits, from any number of threads and without a conflict.
        """
        spec = self._spec
        if meta is None and expire_s is None and not is_stamped(spec.key, key):
            encoded, data = spec.encode_key(key), spec.encode_value(value)
            seqno = self._stored.put(encoded, data, durability)
            if seqno is not None:
                return seqno
            return at_once(put_bytes, self._way, spec, encoded, data, How(durability))
        return at_once(self._writes.put, key, value, expire_s=expire_s, durability=durability, meta=meta)

    def touch(
        self,
        key: K,
        *,
        expire_s: float | None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Let `key` expire `expire_s` seconds from this call on (None: never); its value stays. As `Store.touch`."""
        return at_once(self._writes.touch, key, expire_s=expire_s, durability=durability, meta=meta)

    def __setitem__(self, key: K, value: V) -> None:
        self.put(key, value)

    def delete(
        self, key: K, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Remove `key` if it is there, and return the commit's seqno. It is not looked up first.

        Where there is no table nothing is committed, and the last visible seqno is returned.
        """
        return at_once(self._writes.delete, key, durability=durability, meta=meta)

    def delete_range(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Remove every key of a range (see `scan`). One small record however many keys there are.

        Returns as `delete`.
        """
        return at_once(self._writes.delete_range, start, stop, prefix=prefix, durability=durability, meta=meta)

    def update(  # type: ignore[override]  # it returns the commit
        self,
        other: Mapping[K, V] | Iterable[tuple[K, V]] = (),
        /,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> None:
        """Put every pair of a mapping or of an iterable, in one commit. None of them if one cannot be stored."""
        at_once(self._writes.update, other, durability=durability, meta=meta)

    def clear(self) -> None:
        """Remove every key, in one commit; the table stays."""
        self.delete_range()

    # -- writes that depend on what is there --------------------------------------------------

    def __delitem__(self, key: K) -> None:
        if not at_once(remove, self._way, self._spec, key):
            raise KeyError(key)

    def setdefault(self, key: K, default: V = None) -> V:  # type: ignore[assignment]  # as `MutableMapping` has it
        """The value of `key`; if there is none, put `default` first. Atomic, and never a conflict."""
        return at_once(self._writes.setdefault, key, default)

    @overload
    def pop(self, key: K) -> V: ...
    @overload
    def pop(self, key: K, default: V) -> V: ...
    @overload
    def pop(self, key: K, default: T) -> V | T: ...
    def pop(self, key: K, default: object = MISSING) -> object:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there. Atomic.

        A value that cannot be decoded stays (CodecError).
        """
        return at_once(self._writes.pop, key, default)

    def popitem(
        self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None, last: bool = True
    ) -> tuple[K, V]:
        """Remove the pair with the largest key (with `last=False` the smallest), of a range or of all, and return it.

        KeyError if there is none. Atomic, and never a conflict, however many threads take from one queue. A pair that
        cannot be decoded stays (CodecError).
        """
        return at_once(self._writes.popitem, start, stop, prefix=prefix, last=last)

    def put_if_absent(
        self, key: K, value: V, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> bool:
        """Set `key` to `value` if it is not there. Returns whether it was set. Atomic, and never a conflict."""
        return at_once(self._writes.put_if_absent, key, value, durability=durability, meta=meta)

    def compare_and_set(
        self,
        key: K,
        expected: V | None,
        value: V | None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` (None: delete it) if its value is `expected` (None: if it is not there).

        Returns whether it was. What is compared are values, not bytes. Atomic, and never a conflict. As after `put`,
        another value expires by the default of the table, or never: `touch` it. A value that is None itself, as JSON's
        null, is neither compared nor put by it: do that in a transaction.
        """
        return at_once(self._writes.compare_and_set, key, expected, value, durability=durability, meta=meta)

    def add(
        self, key: K, delta: int, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> int:
        """Add to a counter and return what it is then. A missing one counts as 0. Atomic, and never a conflict.

        For tables with values of type `int` or `kvwal.codecs.counter`: 8 bytes, little-endian, signed. TypeError for
        others; OverflowError if the sum does not fit. Nothing is changed then.
        """
        return at_once(self._writes.add, key, delta, durability=durability, meta=meta)

    def __repr__(self) -> str:
        return f"<kvwal.Table {self._spec}>"
