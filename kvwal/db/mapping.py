"""What every readable thing offers: the store, a snapshot and a transaction read alike.

`OrderedMapping` turns four primitives, a point read, a short range that lies in memory, a stream of
ordered chunks, and a count, into a full `Mapping` with ranges, prefixes, reverse order and limits. Iteration
stays in C: a `zip` of two lists per chunk, chained.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from itertools import chain, islice, starmap
from operator import itemgetter
from typing import TypeVar, overload

from kvwal.db.cursor import Cursor
from kvwal.db.handle import Handle
from kvwal.engine.merge import Chunk, Pairs, chunks_in
from kvwal.expiring import Expiring
from kvwal.keys import END, Bound, BytesLike, KeyRange, as_int, as_key, as_value, stop_of_prefix
from kvwal.times import time_of

__all__ = ["Bounds", "ItemsRange", "KeysRange", "Lasting", "OrderedMapping", "ValuesRange", "expiries", "has_expired"]

_T = TypeVar("_T")

_keys_of = itemgetter(0)
_values_of = itemgetter(1)


class Bounds:
    """A checked half-open range of keys, a direction and a limit."""

    __slots__ = ("limit", "reverse", "start", "stop")

    def __init__(
        self,
        start: Bound,
        stop: Bound,
        prefix: BytesLike | None,
        reverse: bool,
        limit: int | None,
    ) -> None:
        # Not by `KeyRange.of` and `clip`, which would take a third of a scan of ten keys.
        if start is END:
            start = stop = b""
        first = None if start is None else as_key(start)
        end = None if stop is None or stop is END else as_key(stop)
        if prefix is not None:
            head = as_key(prefix)
            first = head if first is None else max(first, head)
            head_stop = stop_of_prefix(head)
            if head_stop is not None:
                end = head_stop if end is None else min(end, head_stop)
        if limit is not None:
            # `islice` takes no more, and no store has more.
            limit = min(as_int("limit", limit, 0), sys.maxsize)
        self.start = first
        self.stop = end
        self.reverse = bool(reverse)
        self.limit = limit

    def is_empty(self) -> bool:
        """Whether no key can lie inside."""
        if self.limit == 0:
            return True
        return KeyRange(self.start or b"", self.stop).is_empty()

    def contains(self, key: bytes) -> bool:
        """Whether the key lies in the range (the limit aside)."""
        return KeyRange(self.start or b"", self.stop).contains(key)

    def reversed(self) -> Bounds:
        """The same range in the other direction."""
        return Bounds(self.start, self.stop, None, not self.reverse, self.limit)


class Lasting:
    """What tells when a key expires."""

    __slots__ = ()

    @abstractmethod
    def _lasting(self, key: bytes) -> bytes | None:
        """The value of a checked key, or None; `Expiring`, if it is to expire."""

    def expires(self, key: BytesLike) -> datetime | None:
        """When `key` expires, in UTC; None if it does not. KeyError if it is not there (any more)."""
        return self._expires(as_key(key))

    def _may_expire(self) -> bool:
        """Whether any key may expire."""
        return True

    def _has_expired(self) -> bool:
        """Whether any key may have expired that is not removed yet."""
        return True

    def _expires(self, key: bytes) -> datetime | None:
        value = self._lasting(key)
        if value is None:
            raise KeyError(key)
        return time_of(value.expires_us) if type(value) is Expiring else None


class OrderedMapping(Handle, Lasting, Mapping[bytes, bytes]):
    """An ordered map of bytes, for reading. Keys and values come back as `bytes`."""

    __slots__ = ()

    @abstractmethod
    def _read(self, key: bytes) -> bytes | None:
        """The value of a checked key, or None."""

    def _cached(self, bounds: Bounds) -> Pairs | None:
        """The pairs of a range at once, if it is short and lies in memory. The limit may be exceeded."""
        return None

    @abstractmethod
    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        """Chunks of a range, in its direction, from one moment. The limit may be exceeded."""

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        pairs = self._cached(bounds)
        return self._walk(bounds) if pairs is None else chunks_in(pairs)

    def _pairs(self, bounds: Bounds) -> Iterator[tuple[bytes, bytes]]:
        if bounds.is_empty():
            return iter(())
        cached = self._cached(bounds)
        pairs = chain.from_iterable(starmap(zip, self._walk(bounds))) if cached is None else iter(cached)
        return pairs if bounds.limit is None else islice(pairs, bounds.limit)

    @abstractmethod
    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        """Number of keys in [start, stop)."""

    def _count_of(self, bounds: Bounds) -> int:
        """Number of keys of a range that is not empty, up to its limit."""
        count = self._count(bounds.start, bounds.stop)
        return count if bounds.limit is None else min(count, bounds.limit)

    def _key_at(self, rank: int) -> bytes | None:
        """The key that has `rank` others before it, or None."""
        return next(islice(self.keys(), rank, None), None) if rank >= 0 else None

    @overload
    def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for what is not bytes-like."""
        value = self._read(as_key(key))
        return default if value is None else value

    def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        return [self._read(as_key(key)) for key in keys]

    def __getitem__(self, key: BytesLike) -> bytes:
        checked = as_key(key)
        value = self._read(checked)
        if value is None:
            raise KeyError(checked)
        return value

    def __contains__(self, key: object) -> bool:
        try:
            checked = as_key(key)
        except (TypeError, ValueError):
            return False
        return self._read(checked) is not None

    def _lasting(self, key: bytes) -> bytes | None:
        return self._read(key)

    def __len__(self) -> int:
        """Number of keys. O(log n), and a look-up for each key written since it was asked last."""
        return self._count(None, None)

    def __bool__(self) -> bool:
        return self.first() is not None

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.keys())

    def __reversed__(self) -> Iterator[bytes]:
        return iter(self.keys(reverse=True))

    def scan(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[bytes, bytes]]:
        """Iterate over (key, value) pairs in key order, as of the moment of the call.

        Args:
            start: first key, inclusive; None for the smallest, `kvwal.END` for none.
            stop: end of the range, exclusive; None, or `kvwal.END`, for no end.
            prefix: only keys that begin with it; combines with `start` and `stop`.
            reverse: from the largest key down.
            limit: the number of pairs at the most.

        Writers go on meanwhile and are not seen. Thread-safe to call; use one iterator from one thread. An
        iterator that is dropped lets go of its moment at once.
        """
        return self._pairs(Bounds(start, stop, prefix, reverse, limit))

    def keys(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> KeysRange:
        """The keys, all or of a range (see `scan`), as a view that reads afresh each time it is iterated."""
        return KeysRange(self, Bounds(start, stop, prefix, reverse, limit))

    def values(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> ValuesRange:
        """The values, all or of a range (see `scan`)."""
        return ValuesRange(self, Bounds(start, stop, prefix, reverse, limit))

    def items(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> ItemsRange:
        """The (key, value) pairs, all or of a range (see `scan`)."""
        return ItemsRange(self, Bounds(start, stop, prefix, reverse, limit))

    def first(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
    ) -> tuple[bytes, bytes] | None:
        """The pair with the smallest key (of the range), or None."""
        return next(self.scan(start, stop, prefix=prefix, limit=1), None)

    def last(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
    ) -> tuple[bytes, bytes] | None:
        """The pair with the largest key (of the range), or None."""
        return next(self.scan(start, stop, prefix=prefix, reverse=True, limit=1), None)

    # -- positions ----------------------------------------------------------------------------

    def count(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
    ) -> int:
        """Number of keys of a range (see `scan`). O(log n), as `len`."""
        return len(self.keys(start, stop, prefix=prefix))

    def rank(self, key: BytesLike) -> int:
        """Number of keys before `key`, which need not be there. O(log n), as `len`."""
        return self._count(None, as_key(key))

    def key_at(
        self,
        n: int,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
    ) -> bytes:
        """The key number `n` of all, or of a range (see `scan`): 0 is the first one, -1 the last.

        IndexError if there is none. O(log^2 n); in a transaction, and at a past moment, O(n).
        """
        n = as_int("n", n, -(1 << 63), (1 << 63) - 1)
        bounds = Bounds(start, stop, prefix, False, None)
        low = 0 if not bounds.start else self._count(None, bounds.start)
        high = self._count(None, bounds.stop)
        key = self._key_at(low + n if n >= 0 else high + n)
        if key is None or not bounds.contains(key):
            raise IndexError(f"there is no key {n} of {max(high - low, 0)}")
        return key

    def cursor(self) -> Cursor[bytes, bytes]:
        """A place among the keys that can be moved: see `kvwal.Cursor`."""
        return Cursor(lambda: self, KeyRange.of, lambda pair: pair)


def has_expired(mapping: Lasting) -> bool:
    """Whether any key of it may have expired that is not removed yet."""
    return mapping._has_expired()


def expiries(mapping: Lasting, keys: Iterable[bytes]) -> list[int | None]:
    """When keys expire, in microseconds since 1970 UTC: None of one that does not, 0 of one that is not there."""
    if not mapping._may_expire():
        return [None for _ in keys]
    found = map(mapping._lasting, keys)
    return [0 if value is None else value.expires_us if type(value) is Expiring else None for value in found]


def _or_none(check: Callable[[object], bytes], data: object) -> bytes | None:
    """What `check` makes of it; None for what can be no key or value, and so is not there, as in a dict."""
    try:
        return check(data)
    except (TypeError, ValueError):
        return None


class _RangeView:
    """What the views of a range have in common: they read afresh each time they are used."""

    __slots__ = ()

    _source: OrderedMapping
    _bounds: Bounds

    def _chunks(self) -> Iterator[Chunk]:
        return iter(()) if self._bounds.is_empty() else self._source._chunks(self._bounds)

    def _limited(self, entries: Iterator[_T]) -> Iterator[_T]:
        return entries if self._bounds.limit is None else islice(entries, self._bounds.limit)

    def __len__(self) -> int:
        """O(log n), and a look-up for each key written since something was counted last.

        Within a transaction that writes, of a range with a limit: a scan up to that.
        """
        return 0 if self._bounds.is_empty() else self._source._count_of(self._bounds)


class KeysRange(_RangeView, KeysView[bytes]):
    """A dict-like view of the keys of a range."""

    __slots__ = ("_bounds", "_source")

    def __init__(self, source: OrderedMapping, bounds: Bounds) -> None:
        KeysView.__init__(self, source)
        self._source = source
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        return self._limited(chain.from_iterable(map(_keys_of, self._chunks())))

    def __reversed__(self) -> Iterator[bytes]:
        return iter(KeysRange(self._source, self._bounds.reversed()))

    def __contains__(self, key: object) -> bool:
        checked = _or_none(as_key, key)
        if checked is None:
            return False
        if self._bounds.limit is not None:
            return any(own == checked for own in self)
        return self._bounds.contains(checked) and checked in self._source


class ValuesRange(_RangeView, ValuesView[bytes]):
    """A dict-like view of the values of a range."""

    __slots__ = ("_bounds", "_source")

    def __init__(self, source: OrderedMapping, bounds: Bounds) -> None:
        ValuesView.__init__(self, source)
        self._source = source
        self._bounds = bounds

    def __iter__(self) -> Iterator[bytes]:
        return self._limited(chain.from_iterable(map(_values_of, self._chunks())))

    def __reversed__(self) -> Iterator[bytes]:
        return iter(ValuesRange(self._source, self._bounds.reversed()))

    def __contains__(self, value: object) -> bool:
        checked = _or_none(as_value, value)
        return checked is not None and any(own == checked for own in self)


class ItemsRange(_RangeView, ItemsView[bytes, bytes]):
    """A dict-like view of the pairs of a range."""

    __slots__ = ("_bounds", "_source")

    def __init__(self, source: OrderedMapping, bounds: Bounds) -> None:
        ItemsView.__init__(self, source)
        self._source = source
        self._bounds = bounds

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return self._source._pairs(self._bounds)

    def __reversed__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(ItemsRange(self._source, self._bounds.reversed()))

    def __contains__(self, item: object) -> bool:
        if not (isinstance(item, tuple) and len(item) == 2):
            return False
        key, value = _or_none(as_key, item[0]), _or_none(as_value, item[1])
        if key is None or value is None:
            return False
        if self._bounds.limit is not None:
            return any(own == (key, value) for own in self)
        return self._bounds.contains(key) and self._source.get(key) == value
