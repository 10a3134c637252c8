"""Asynchronous iteration over a range: chunks are fetched by a worker thread, entries are taken from memory.

Invariant: the iterator pins its moment from the call that made it until it is exhausted, closed or dropped. The
pin is held by the chunk iterator beneath; the loop or the worker, the one that drops it last, gives it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain, islice
from typing import Final, Generic, TypeVar

from kvwal.aio.workers import Workers, untold
from kvwal.db.handle import Uncopied
from kvwal.engine.merge import Chunk

__all__ = ["Scan", "items_of", "keys_of", "listed", "values_of"]

_T = TypeVar("_T")

# Entries of one trip to a worker: this many after the first trip, doubled each time, up to the second figure.
_FIRST_ENTRIES: Final = 64
_MAX_ENTRIES: Final = 4096
# Of what a worker lists at once.
_LISTED_AT_ONCE: Final = 512


class Scan(Uncopied, AsyncIterator[_T], Generic[_T]):
    """An iterator for `async for`. One task at a time; dropping it, or `aclose`, gives its moment back."""

    __slots__ = ("__weakref__", "_chunks", "_entries", "_fetched", "_left", "_most", "_of", "_running", "_workers")

    def __init__(
        self, workers: Workers, chunks: Iterator[Chunk], of: Callable[[Chunk], Iterator[_T]], limit: int | None
    ) -> None:
        self._workers = workers
        self._chunks: Iterator[Chunk] | None = chunks
        self._of = of
        self._left = limit
        self._most = 1
        self._entries: Iterator[_T] = iter(())
        #: What a worker is bringing.
        self._fetched: asyncio.Future[tuple[list[Chunk], int, bool]] | None = None
        self._running = False

    def __aiter__(self) -> Scan[_T]:
        return self

    async def __anext__(self) -> _T:
        while True:
            try:
                for entry in self._entries:
                    return entry
            except BaseException:
                # A codec's: as that of a thread, the iteration ends, since the rest of the chunk is gone.
                self._end()
                raise
            if self._chunks is None:
                raise StopAsyncIteration
            await self._fetch()

    async def _fetch(self) -> None:
        if self._running:
            raise RuntimeError("this scan is being iterated by another task; make one for each task")
        fetched = self._fetched
        if fetched is None:
            assert self._chunks is not None
            fetched = self._fetched = untold(self._workers.submit(_fetch, self._chunks, self._most))
        self._running = True
        try:
            # A task that is cancelled here loses nothing: the next iteration awaits the same chunks.
            got, count, over = await asyncio.shield(fetched)
        finally:
            self._running = False
        if self._chunks is None:
            # Closed by another task meanwhile.
            return
        # Only now: a cancellation may come after the chunks are there. An error stays, and is raised again.
        self._fetched = None
        self._most = min(max(2 * self._most, _FIRST_ENTRIES), _MAX_ENTRIES)
        entries: Iterator[_T] = chain.from_iterable(map(self._of, got))
        if self._left is not None:
            entries = islice(entries, self._left)
            self._left = max(0, self._left - count)
            over = over or not self._left
        self._entries = entries
        if over:
            self._chunks = None

    async def aclose(self) -> None:
        """End the iteration and give its moment back. Idempotent."""
        self._end()

    def _end(self) -> None:
        self._chunks = None
        self._fetched = None
        self._entries = iter(())


def _fetch(chunks: Iterator[Chunk], most: int) -> tuple[list[Chunk], int, bool]:
    """Some chunks, how many entries they have, and whether there are no more."""
    got: list[Chunk] = []
    count = 0
    for chunk in chunks:
        got.append(chunk)
        count += len(chunk[0])
        if count >= most:
            return got, count, False
    return got, count, True


def keys_of(chunk: Chunk) -> Iterator[bytes]:
    """The keys of a chunk."""
    return iter(chunk[0])


def values_of(chunk: Chunk) -> Iterator[bytes]:
    """The values of a chunk."""
    return iter(chunk[1])


def items_of(chunk: Chunk) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a chunk."""
    return zip(*chunk, strict=True)


async def listed(workers: Workers, refuse_if_over: Callable[[], None], found: Iterator[_T]) -> AsyncIterator[_T]:
    """What an iterator gives, which workers step. `refuse_if_over` is asked before a worker is."""
    while True:
        refuse_if_over()
        some, error = await workers.submit(_next_of, found)
        for each in some:
            yield each
        if error is not None:
            raise error
        if not some:
            return


def _next_of(found: Iterator[_T]) -> tuple[list[_T], Exception | None]:
    """Some of them, and what is wrong behind them."""
    some: list[_T] = []
    try:
        some.extend(islice(found, _LISTED_AT_ONCE))
    except Exception as error:  # noqa: BLE001  # raised when what came before it was handed out
        return some, error
    return some, None
