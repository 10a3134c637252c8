"""A cursor for tasks."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from kvwal.aio.workers import Workers
from kvwal.db.cursor import Cursor
from kvwal.db.handle import Uncopied

__all__ = ["AsyncCursor"]

K = TypeVar("K")
V = TypeVar("V")


class AsyncCursor(Uncopied, Generic[K, V]):
    """A `kvwal.Cursor` that is moved by awaiting: each move is made by a worker. For one task at a time."""

    __slots__ = ("_cursor", "_refuse_if_over", "_workers")

    def __init__(self, cursor: Cursor[K, V], workers: Workers, refuse_if_over: Callable[[], None]) -> None:
        """`refuse_if_over` raises what a use of the store after its end raises."""
        self._cursor = cursor
        self._workers = workers
        self._refuse_if_over = refuse_if_over

    async def _move(self, move: Callable[..., bool], *key: K) -> bool:
        self._refuse_if_over()
        return await self._workers.submit(move, *key)

    @property
    def pair(self) -> tuple[K, V] | None:
        """The key and the value that it is at; None if it is at none."""
        return self._cursor.pair

    @property
    def key(self) -> K:
        """The key that it is at. LookupError if it is at none."""
        return self._cursor.key

    @property
    def value(self) -> V:
        """The value of that key, as of when the cursor came to it. LookupError if it is at none."""
        return self._cursor.value

    async def first(self) -> bool:
        """Go to the smallest key."""
        return await self._move(self._cursor.first)

    async def last(self) -> bool:
        """Go to the largest key."""
        return await self._move(self._cursor.last)

    async def seek(self, key: K) -> bool:
        """Go to `key`, or else to the smallest key above it."""
        return await self._move(self._cursor.seek, key)

    async def seek_last(self, key: K) -> bool:
        """Go to `key`, or else to the largest key below it."""
        return await self._move(self._cursor.seek_last, key)

    async def next(self) -> bool:
        """Go to the next larger key."""
        return await self._move(self._cursor.next)

    async def prev(self) -> bool:
        """Go to the next smaller key."""
        return await self._move(self._cursor.prev)

    async def close(self) -> None:
        """Let go of the moment that it reads. It may be placed again. Idempotent."""
        self._cursor.close()

    async def __aenter__(self) -> AsyncCursor[K, V]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cursor.close()

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncCursor{repr(self._cursor)[13:]}"
