"""Opening a store for tasks: in a thread, and closed again if the task that asked is cancelled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Unpack

import kvwal.api.open
import kvwal.api.shared
from kvwal.aio.store import MAX_PENDING_BYTES, MAX_PENDING_COMMITS, AsyncStore, owning
from kvwal.aio.workers import to_the_end
from kvwal.api.store import Store
from kvwal.files import PathArgument
from kvwal.options import Flag, OpenOptions, taking_options

__all__ = ["Opening", "open", "shared"]


class Opening:
    """What `kvwal.aio.open` returns: `await` it for the store, or use it in `async with`, which also closes it."""

    __slots__ = ("_limits", "_open", "_store")

    def __init__(self, opener: Callable[[], Store], **limits: int) -> None:
        self._open = opener
        self._limits = limits
        self._store: AsyncStore | None = None

    def __await__(self) -> Generator[Any, Any, AsyncStore]:
        return self._opened().__await__()

    async def _opened(self) -> AsyncStore:
        store, cancelled = await to_the_end(self._open)
        try:
            if cancelled is not None:
                raise cancelled
            return owning(store, **self._limits)
        except BaseException:
            await to_the_end(store.close)
            raise

    async def __aenter__(self) -> AsyncStore:
        self._store = await self
        return self._store

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._store is not None
        await self._store.close()


@taking_options
def open(
    path: PathArgument,
    flag: Flag = "c",
    mode: int = 0o600,
    *,
    max_pending_commits: int = MAX_PENDING_COMMITS,
    max_pending_bytes: int = MAX_PENDING_BYTES,
    **options: Unpack[OpenOptions],
) -> Opening:
    """Open a store for the running loop: `async with kvwal.aio.open(path) as db:`, or `db = await open(path)`.

    Args: those of `kvwal.open`, and two of its own.
        max_pending_commits: number of pending commits from which on the next one waits for its turn.
        max_pending_bytes: the same for the bytes of their keys and values. One commit that has more goes alone.

    Opening, with recovery, runs in a thread. If the task is cancelled meanwhile, the store is closed again first.
    Raises what `kvwal.open` raises.
    """
    opener = functools.partial(kvwal.api.open.open, path, flag, mode, **options)
    return Opening(opener, max_pending_commits=max_pending_commits, max_pending_bytes=max_pending_bytes)


@taking_options
def shared(
    path: PathArgument,
    flag: Flag = "c",
    mode: int = 0o600,
    *,
    max_pending_commits: int = MAX_PENDING_COMMITS,
    max_pending_bytes: int = MAX_PENDING_BYTES,
    **options: Unpack[OpenOptions],
) -> Opening:
    """`kvwal.shared` for the running loop: other tasks, loops and threads of the process may hold the store as well.

    Each call makes an `AsyncStore` of its own, for its own loop and with its own limits. Args as for `open`.
    """
    opener = functools.partial(kvwal.api.shared.shared, path, flag, mode, **options)
    return Opening(opener, max_pending_commits=max_pending_commits, max_pending_bytes=max_pending_bytes)
