"""What every table offers to tasks for reading: of now, of a snapshot, and within a transaction.

As `kvwal.tables.reading` has it for threads. A value is decoded in the loop, when it is handed out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, Generic, TypeVar, overload

from kvwal.aio.cursor import AsyncCursor
from kvwal.aio.reading import AsyncReading
from kvwal.aio.scanning import Scan, items_of, keys_of, values_of
from kvwal.aio.workers import in_thread
from kvwal.db.handle import Handle
from kvwal.db.mapping import OrderedMapping
from kvwal.engine.merge import Chunk
from kvwal.tables.reading import TypedReading
from kvwal.tables.spec import OfTable, TableSpec

__all__ = ["AsyncTypedReading"]

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
R = TypeVar("R")


def _each_of(decode: Callable[[R], T], of: Callable[[Chunk], Iterator[R]]) -> Callable[[Chunk], Iterator[T]]:
    """What a scan makes of a chunk. Not by `map`, which a codec that raises StopIteration would end."""
    return lambda chunk: (decode(each) for each in of(chunk))


class AsyncTypedReading(Handle, OfTable[K, V], Generic[K, V]):
    """A table, for reading by tasks."""

    __slots__ = ("_spec",)

    def __init__(self, spec: TableSpec[K, V]) -> None:
        self._spec = spec

    @abstractmethod
    def raw(self) -> AsyncReading:
        """The same table as bytes: what to read where a value cannot be decoded."""

    @overload
    async def get(self, key: K) -> V | None: ...
    @overload
    async def get(self, key: K, default: V | T) -> V | T: ...
    async def get(self, key: K, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for a key of another type; CodecError."""
        value = await self.raw().get(self._spec.key.encode(key))
        return default if value is None else self._spec.value.decode(value)

    async def contains(self, key: object) -> bool:
        """Whether `key` is there: what `in` is elsewhere, so False for what can be no key."""
        encoded = self._spec.key_of(key)
        return encoded is not None and await self.raw().contains(encoded)

    async def expires(self, key: K) -> datetime | None:
        """When `key` expires, in UTC; None if it does not. KeyError if it is not there (any more)."""
        try:
            return await self.raw()._expires(self._spec.key.encode(key))
        except KeyError:
            raise KeyError(key) from None

    async def get_many(self, keys: Iterable[K]) -> list[V | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        spec = self._spec
        found = await self.raw().get_many([spec.key.encode(key) for key in keys])
        return [None if value is None else spec.value.decode(value) for value in found]

    def scan(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan[tuple[K, V]]:
        """`async for key, value in table.scan(...)`: pairs in key order, as of the moment of the call.

        Args: as in `kvwal.Table.scan`.
        """
        return self._scan(start, stop, prefix, reverse, limit, _each_of(self._spec.pair, items_of))

    items = scan

    def keys(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan[K]:
        """Iterate over the keys, all or of a range (see `scan`)."""
        return self._scan(start, stop, prefix, reverse, limit, _each_of(self._spec.key.decode, keys_of))

    def values(
        self,
        start: K | Any = None,
        stop: K | Any = None,
        *,
        prefix: Any = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan[V]:
        """Iterate over the values, all or of a range (see `scan`)."""
        return self._scan(start, stop, prefix, reverse, limit, _each_of(self._spec.value.decode, values_of))

    def __aiter__(self) -> Scan[K]:
        return self.keys()

    def _scan(
        self,
        start: Any,
        stop: Any,
        prefix: Any,
        reverse: bool,
        limit: int | None,
        of: Callable[[Chunk], Iterator[T]],
    ) -> Scan[T]:
        return self.raw()._scan(self._spec.bounds(start, stop, prefix, reverse, limit), of)

    async def first(
        self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None
    ) -> tuple[K, V] | None:
        """The pair with the smallest key (of the range), or None."""
        return await anext(self.scan(start, stop, prefix=prefix, limit=1), None)

    async def last(
        self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None
    ) -> tuple[K, V] | None:
        """The pair with the largest key (of the range), or None."""
        return await anext(self.scan(start, stop, prefix=prefix, reverse=True, limit=1), None)

    # -- positions ----------------------------------------------------------------------------

    def _for_threads(self) -> TypedReading[K, V]:
        raw = self.raw()
        raw._refuse_if_over()
        return _Typed(self._spec, raw._mapping)

    async def count(self, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> int:
        """Number of keys, or of those of a range: what `len` is elsewhere."""
        return await in_thread(self._for_threads().count, start, stop, prefix=prefix)

    async def rank(self, key: K) -> int:
        """Number of keys before `key`, which need not be there."""
        return await in_thread(self._for_threads().rank, key)

    async def key_at(self, n: int, start: K | Any = None, stop: K | Any = None, *, prefix: Any = None) -> K:
        """The key number `n` of all, or of a range: 0 is the first one, -1 the last. IndexError if there is none."""
        return await in_thread(self._for_threads().key_at, n, start, stop, prefix=prefix)

    def cursor(self) -> AsyncCursor[K, V]:
        """A place among the keys that can be moved: see `kvwal.aio.AsyncCursor`."""
        raw = self.raw()
        return AsyncCursor(self._for_threads().cursor(), raw._workers, raw._refuse_if_over)


class _Typed(TypedReading[K, V]):
    """What a worker reads of the same."""

    __slots__ = ("_mapping",)

    def __init__(self, spec: TableSpec[K, V], mapping: OrderedMapping) -> None:
        super().__init__(spec)
        self._mapping = mapping

    def raw(self) -> OrderedMapping:
        return self._mapping
