"""Opening a store for tasks: in a thread, and closed again if the task that asked is cancelled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar, Unpack

import kvwal.api.following
import kvwal.api.open
import kvwal.api.shared
from kvwal.aio.follower import AsyncFollower
from kvwal.aio.store import MAX_PENDING_BYTES, MAX_PENDING_COMMITS, AsyncStore, owning
from kvwal.aio.workers import to_the_end
from kvwal.api.following import CACHE_BYTES
from kvwal.api.store import Store
from kvwal.db.handle import Uncopied
from kvwal.files import Files, PathArgument
from kvwal.options import Flag, OpenOptions, taking_options

__all__ = ["Opening", "follow", "open", "shared"]


class _Closed(Protocol):
    """What can be closed."""

    def close(self) -> Any: ...


_S = TypeVar("_S", bound=_Closed)
_A = TypeVar("_A", bound=_Closed)


class Opening(Uncopied, Generic[_A]):
    """What `kvwal.aio.open` returns: `await` it for the store, or use it in `async with`, which also closes it."""

    __slots__ = ("_made", "_opened")

    def __init__(self, opener: Callable[[], _S], over: Callable[[_S], _A]) -> None:
        """`opener`: opens a store in a thread. `over`: what is made of that in the loop."""
        self._opened = functools.partial(_opened, opener, over)
        self._made: _A | None = None

    def __await__(self) -> Generator[Any, Any, _A]:
        return self._opened().__await__()

    async def __aenter__(self) -> _A:
        self._made = await self
        return self._made

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._made is not None
        await self._made.close()


async def _opened(opener: Callable[[], _S], over: Callable[[_S], _A]) -> _A:
    store, cancelled = await to_the_end(opener)
    try:
        if cancelled is not None:
            raise cancelled
        return over(store)
    except BaseException:
        await to_the_end(store.close)
        raise


def _owning(opener: Callable[[], Store], commits: int, size: int) -> Opening[AsyncStore]:
    return Opening(opener, lambda store: owning(store, max_pending_commits=commits, max_pending_bytes=size))


@taking_options
def open(
    path: PathArgument,
    flag: Flag = "c",
    mode: int = 0o600,
    *,
    max_pending_commits: int = MAX_PENDING_COMMITS,
    max_pending_bytes: int = MAX_PENDING_BYTES,
    **options: Unpack[OpenOptions],
) -> Opening[AsyncStore]:
    """Open a store for the running loop: `async with kvwal.aio.open(path) as db:`, or `db = await open(path)`.

    Args: those of `kvwal.open`, and two of its own.
        max_pending_commits: number of pending commits from which on the next one waits for its turn.
        max_pending_bytes: the same for the bytes of their keys and values. One commit that has more goes alone.

    Opening, with recovery, runs in a thread. If the task is cancelled meanwhile, the store is closed again first.
    Raises what `kvwal.open` raises.
    """
    opener = functools.partial(kvwal.api.open.open, path, flag, mode, **options)
    return _owning(opener, max_pending_commits, max_pending_bytes)


@taking_options
def shared(
    path: PathArgument,
    flag: Flag = "c",
    mode: int = 0o600,
    *,
    max_pending_commits: int = MAX_PENDING_COMMITS,
    max_pending_bytes: int = MAX_PENDING_BYTES,
    **options: Unpack[OpenOptions],
) -> Opening[AsyncStore]:
    """`kvwal.shared` for the running loop: other tasks, loops and threads of the process may hold the store as well.

    Each call makes an `AsyncStore` of its own, for its own loop and with its own limits. Args as for `open`.
    """
    opener = functools.partial(kvwal.api.shared.shared, path, flag, mode, **options)
    return _owning(opener, max_pending_commits, max_pending_bytes)


def follow(
    path: PathArgument,
    *,
    pin: bool = True,
    name: str | None = None,
    max_lag_s: float | None = None,
    cache_bytes: int = CACHE_BYTES,
    files: Files | None = None,
) -> Opening[AsyncFollower]:
    """Follow a store for the running loop: `async with kvwal.aio.follow(path) as live:`, or await it.

    Args: those of `kvwal.follow`.

    It begins in a thread. If the task is cancelled meanwhile, the follower is closed again first. Raises what
    `kvwal.follow` raises.
    """
    follow = kvwal.api.following.follow
    opener = functools.partial(
        follow, path, pin=pin, name=name, max_lag_s=max_lag_s, cache_bytes=cache_bytes, files=files
    )
    return Opening(opener, AsyncFollower)
