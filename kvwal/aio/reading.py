"""What every readable thing offers to tasks: the store, a snapshot and a transaction read alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TypeVar, overload

from kvwal.aio.cursor import AsyncCursor
from kvwal.aio.scanning import Scan, items_of, keys_of, values_of
from kvwal.aio.workers import Workers, in_thread
from kvwal.db.handle import Handle
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.merge import Chunk
from kvwal.engine.readers import Reader
from kvwal.engine.reads import Reads
from kvwal.keys import Bound, BytesLike, as_key

__all__ = ["AsyncReading", "read_again"]

_T = TypeVar("_T")


def read_again(reads: Reads, reader: Reader, table: int, keys: list[bytes]) -> list[bytes | None]:
    """For a worker: the values as of a reader that was registered for it, and is given back."""
    try:
        return [reads.read_at(reader, key, table=table) for key in keys]
    finally:
        reader.release()


class AsyncReading(Handle, ABC):
    """Point reads and ranges. What is in memory is answered without leaving the loop; pages are read by a worker."""

    __slots__ = ()

    _workers: Workers

    @abstractmethod
    async def _read(self, key: bytes) -> bytes | None:
        """The value of a checked key, or None."""

    @abstractmethod
    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        """Chunks of a range, from the moment of the call. Does not wait; iterating over it does."""

    @abstractmethod
    def _refuse_if_over(self) -> None:
        """Raise what a use after the end, or from another loop, raises."""

    @overload
    async def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    async def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    async def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for what is not bytes-like."""
        value = await self._read(as_key(key))
        return default if value is None else value

    async def contains(self, key: object) -> bool:
        """Whether `key` is there: what `in` is elsewhere, so False for what can be no key."""
        try:
            checked = as_key(key)
        except (TypeError, ValueError):
            return False
        return await self._read(checked) is not None

    @abstractmethod
    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""

    def scan(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan[tuple[bytes, bytes]]:
        """`async for key, value in db.scan(...)`: pairs in key order, as of the moment of the call.

        Args: as in `kvwal.Store.scan`. Writers go on meanwhile and are not seen. An iterator that is dropped lets go
        of its moment at once; `aclose` does so explicitly.
        """
        return self._scan(Bounds(start, stop, prefix, reverse, limit), items_of)

    items = scan

    def keys(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan[bytes]:
        """Iterate over the keys, all or of a range (see `scan`)."""
        return self._scan(Bounds(start, stop, prefix, reverse, limit), keys_of)

    def values(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Scan[bytes]:
        """Iterate over the values, all or of a range (see `scan`)."""
        return self._scan(Bounds(start, stop, prefix, reverse, limit), values_of)

    def __aiter__(self) -> Scan[bytes]:
        return self.keys()

    async def first(
        self, start: Bound = None, stop: Bound = None, *, prefix: BytesLike | None = None
    ) -> tuple[bytes, bytes] | None:
        """The pair with the smallest key (of the range), or None."""
        return await anext(self.scan(start, stop, prefix=prefix, limit=1), None)

    async def last(
        self, start: Bound = None, stop: Bound = None, *, prefix: BytesLike | None = None
    ) -> tuple[bytes, bytes] | None:
        """The pair with the largest key (of the range), or None."""
        return await anext(self.scan(start, stop, prefix=prefix, reverse=True, limit=1), None)

    @property
    @abstractmethod
    def _mapping(self) -> OrderedMapping:
        """What threads read of the same. Raises what a use after the end raises."""

    async def count(
        self, start: Bound = None, stop: Bound = None, *, prefix: BytesLike | None = None
    ) -> int:
        """Number of keys, or of those of a range: what `len` is elsewhere. See `OrderedMapping.count`."""
        self._refuse_if_over()
        return await in_thread(self._mapping.count, start, stop, prefix=prefix)

    async def rank(self, key: BytesLike) -> int:
        """Number of keys before `key`, which need not be there."""
        self._refuse_if_over()
        return await in_thread(self._mapping.rank, key)

    async def key_at(
        self,
        n: int,
        start: Bound = None,
        stop: Bound = None,
        *,
        prefix: BytesLike | None = None,
    ) -> bytes:
        """The key number `n` of all, or of a range: 0 is the first one, -1 the last. IndexError if there is none."""
        self._refuse_if_over()
        return await in_thread(self._mapping.key_at, n, start, stop, prefix=prefix)

    async def expires(self, key: BytesLike) -> datetime | None:
        """When `key` expires, in UTC; None if it does not. KeyError if it is not there (any more)."""
        return await self._expires(as_key(key))

    async def _expires(self, key: bytes) -> datetime | None:
        self._refuse_if_over()
        return await in_thread(self._mapping._expires, key)

    def cursor(self) -> AsyncCursor[bytes, bytes]:
        """A place among the keys that can be moved: see `kvwal.aio.AsyncCursor`."""
        self._refuse_if_over()
        return AsyncCursor(self._mapping.cursor(), self._workers, self._refuse_if_over)

    def _scan(self, bounds: Bounds, of: Callable[[Chunk], Iterator[_T]]) -> Scan[_T]:
        """A scan that hands out what `of` makes of a chunk."""
        self._refuse_if_over()
        chunks = iter(()) if bounds.is_empty() else self._chunks(bounds)
        return Scan(self._workers, chunks, of, bounds.limit)
