"""What a store and a follower have in common for tasks while they are open. As `kvwal.api.opened`, for threads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Self, TypeVar, overload

from kvwal.aio.reading import AsyncReading
from kvwal.aio.stored import ReadParts
from kvwal.api.opened import Opened
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk
from kvwal.finalizing import quiet_at_exit
from kvwal.keys import BytesLike, as_key
from kvwal.pages import NotCached

__all__ = ["AsyncOpened"]

_T = TypeVar("_T")


class AsyncOpened(AsyncReading):
    """An open store, or what follows one, in one loop."""

    __slots__ = ("__weakref__", "_cache", "_engine", "_parts", "_reads", "_state", "_store", "_workers")

    _engine: Engine
    _parts: ReadParts
    _store: Opened

    def __init__(self, store: Opened, parts: ReadParts) -> None:
        self._store = store
        self._parts = parts
        self._engine = engine = store.engine
        self._state = engine.state
        self._reads = engine.reads
        self._cache = engine.state.cache
        self._workers = parts.workers

    @property
    def path(self) -> str:
        """The store's directory, as it was given."""
        return self._store.path

    def _refuse_if_over(self) -> None:
        self._parts.refuse_if_over()

    # -- reading ------------------------------------------------------------------------------

    @overload
    async def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    async def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    async def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key`, or `default` if it is not there. TypeError for what is not bytes-like."""
        # Hot path: one dict hit, as in `Store.get`.
        try:
            value = self._cache.rows[key]  # type: ignore[index]  # what is no row raises
        except (KeyError, TypeError, ValueError):
            value = await self._read(as_key(key))
        return default if value is None else value

    async def _read(self, key: bytes) -> bytes | None:
        self._parts.refuse_if_closing()
        try:
            return self._reads.read(key, cached_only=True)
        except NotCached:
            return await self._workers.submit(self._reads.read, key)

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._store._chunks(bounds)

    @property
    def _mapping(self) -> OrderedMapping:
        return self._store

    # -- ending -------------------------------------------------------------------------------

    @abstractmethod
    async def close(self) -> None:
        """Let go of what it holds. Idempotent."""

    def _stop(self) -> None:
        """Let the threads end."""
        self._workers.stop()

    async def __aenter__(self) -> Self:
        self._refuse_if_over()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @quiet_at_exit
    def __del__(self) -> None:
        # Forgotten: only let the threads end. What is beneath warns, and lets go of its files.
        if getattr(self, "_workers", None) is not None:
            self._stop()
