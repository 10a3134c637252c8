"""What every table offers for reading: of now, of a snapshot, and within a transaction.

It is a `Mapping` with ranges, prefixes, reverse order and limits, as the store is; keys and values are of the table's
types. A value is decoded when it is handed out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import Any, Generic, TypeVar, overload

from kvwal.db.cursor import Cursor
from kvwal.db.handle import Handle
from kvwal.db.mapping import Bounds, ItemsRange, KeysRange, OrderedMapping, ValuesRange
from kvwal.engine.value import Value
from kvwal.keys import END, KeyRange
from kvwal.tables.spec import OfTable, TableSpec

__all__ = ["TypedReading"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
R = TypeVar("R")


class TypedReading(Handle, OfTable[K, V], Mapping[K, V], Generic[K, V]):
    """A table, for reading."""

    __slots__ = ("_decode", "_encode", "_spec")

    def __init__(self, spec: TableSpec[K, V]) -> None:
        self._spec = spec
        # Hot: taken out of the codecs once.
        self._encode = spec.key.encode
        self._decode = spec.value.decode

    @abstractmethod
    def raw(self) -> OrderedMapping:
        """The same table as bytes: what to read where a value cannot be decoded."""

    @overload
    def get(self, key: K) -> V | None: ...
    @overload
    def get(self, key: K, default: V | T) -> V | T: ...
    def get(self, key: K, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for a key of another type; CodecError."""
        value = self._read(self._encode(key))
        return default if value is None else self._decode(value)

    def _read(self, key: bytes) -> Value:
        return self.raw().get(key)

    def get_many(self, keys: Iterable[K]) -> list[V | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        decode = self._decode
        found = self.raw().get_many([self._encode(key) for key in keys])
        return [None if value is None else decode(value) for value in found]

    def __getitem__(self, key: K) -> V:
        value = self._read(self._encode(key))
        if value is None:
            raise KeyError(key)
        return self._decode(value)

    def __contains__(self, key: object) -> bool:
        encoded = self._spec.key_of(key)
        return encoded is not None and self._read(encoded) is not None

    def expires(self, key: K) -> datetime | None:
        """When `key` expires, in UTC; None if it does not. KeyError if it is not there (any more)."""
        try:
            return self.raw()._expires(self._encode(key))
        except KeyError:
            raise KeyError(key) from None

    def __len__(self) -> int:
        """Number of keys. O(log n), and a look-up for each key written since it was asked last."""
        return len(self.keys())

    def __bool__(self) -> bool:
        return next(iter(KeysRange(self.raw(), self._bounds(None, None, None, False, 1))), None) is not None

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys())

    def __reversed__(self) -> Iterator[K]:
        return iter(self.keys(reverse=True))

    def scan(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[K, V]]:
        """Iterate over (key, value) pairs in key order, as of the moment of the call.

        Args:
            start: first key, inclusive; None for the smallest, `kvwal.END` for none. Of tuples also leading parts, as a
                tuple.
            stop: end of the range, exclusive; None, or `kvwal.END`, for no end. The same.
            prefix: only keys that begin with it: a str or bytes, or leading parts of a tuple.
            reverse: from the largest key down.
            limit: the number of pairs at the most.
        """
        return _each(self._spec.pair, self._items(start, stop, prefix, reverse, limit))

    def _bounds(self, start: Any, stop: Any, prefix: Any, reverse: bool, limit: int | None) -> Bounds:
        return self._spec.bounds(start, stop, prefix, reverse, limit)

    def _items(self, start: Any, stop: Any, prefix: Any, reverse: bool, limit: int | None) -> ItemsRange:
        return ItemsRange(self.raw(), self._bounds(start, stop, prefix, reverse, limit))

    def keys(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> KeysView[K]:
        """The keys, all or of a range (see `scan`), as a view that reads afresh each time it is iterated."""
        return _Keys(self, KeysRange(self.raw(), self._bounds(start, stop, prefix, reverse, limit)))

    def values(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> ValuesView[V]:
        """The values, all or of a range (see `scan`)."""
        return _Values(self, ValuesRange(self.raw(), self._bounds(start, stop, prefix, reverse, limit)))

    def items(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> ItemsView[K, V]:
        """The (key, value) pairs, all or of a range (see `scan`)."""
        return _Items(self, self._items(start, stop, prefix, reverse, limit))

    def first(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> tuple[K, V] | None:
        """The pair with the smallest key (of the range), or None."""
        return next(self.scan(start, stop, prefix=prefix, limit=1), None)

    def last(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> tuple[K, V] | None:
        """The pair with the largest key (of the range), or None."""
        return next(self.scan(start, stop, prefix=prefix, reverse=True, limit=1), None)

    # -- positions ----------------------------------------------------------------------------

    def count(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> int:
        """Number of keys of a range (see `scan`). O(log n), as `len`."""
        return len(self.keys(start, stop, prefix=prefix))

    def rank(self, key: K) -> int:
        """Number of keys before `key`, which need not be there. O(log n), as `len`.

        TypeError for None and `kvwal.END`, which are no keys.
        """
        if key is None or key is END:
            raise TypeError(f"rank takes a key, not {key!r}; len() is the number of all keys")
        return self.count(stop=key)

    def key_at(self, n: int, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> K:
        """The key number `n` of all, or of a range: 0 is the first one, -1 the last. IndexError if there is none.

        O(log^2 n); in a transaction, and at a past moment, O(n).
        """
        bounds = self._bounds(start, stop, prefix, False, None)
        return self._spec.key.decode(self.raw().key_at(n, bounds.start, bounds.stop))

    def cursor(self) -> Cursor[K, V]:
        """A place among the keys that can be moved: see `kvwal.Cursor`."""
        return Cursor(self.raw, self._range, self._spec.pair)

    def _range(self, start: Any, stop: Any) -> KeyRange:
        bounds = self._bounds(start, stop, None, False, None)
        return KeyRange(bounds.start or b"", bounds.stop)


def _each(decode: Callable[[R], T], raw: Iterable[R]) -> Iterator[T]:
    # Not by `map`, which a codec that raises StopIteration would end as if nothing came behind.
    return (decode(each) for each in raw)


class _Keys(KeysView[K], Generic[K]):
    __slots__ = ("_range", "_table")

    def __init__(self, table: TypedReading[K, Any], raw: KeysRange) -> None:
        super().__init__(table)
        self._table = table
        self._range = raw

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[K]:
        return _each(self._table._spec.key.decode, self._range)

    def __reversed__(self) -> Iterator[K]:
        return _each(self._table._spec.key.decode, reversed(self._range))

    def __contains__(self, key: object) -> bool:
        return self._table._spec.key_of(key) in self._range


class _Values(ValuesView[V], Generic[V]):
    __slots__ = ("_range", "_table")

    def __init__(self, table: TypedReading[Any, V], raw: ValuesRange) -> None:
        super().__init__(table)
        self._table = table
        self._range = raw

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[V]:
        return _each(self._table._spec.value.decode, self._range)

    def __reversed__(self) -> Iterator[V]:
        return _each(self._table._spec.value.decode, reversed(self._range))

    def __contains__(self, value: object) -> bool:
        return any(own == value for own in self)


class _Items(ItemsView[K, V], Generic[K, V]):
    __slots__ = ("_range", "_table")

    def __init__(self, table: TypedReading[K, V], raw: ItemsRange) -> None:
        super().__init__(table)
        self._table = table
        self._range = raw

    def __len__(self) -> int:
        return len(self._range)

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return _each(self._table._spec.pair, self._range)

    def __reversed__(self) -> Iterator[tuple[K, V]]:
        return _each(self._table._spec.pair, reversed(self._range))

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2):
            return False
        spec = self._table._spec
        raw = self._range
        key = spec.key_of(item[0])
        if raw._bounds.limit is not None:
            return any(own == item for own in self)
        value = raw._source.get(key) if key is not None and raw._bounds.contains(key) else None
        return value is not None and bool(spec.value.decode(value) == item[1])
