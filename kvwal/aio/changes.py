"""The feed for tasks: a worker reads what is there, and the flush that makes more of it durable wakes the loop.

Invariant: `position` counts what was handed out, and not what a worker has read ahead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Final

from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.workers import Workers
from kvwal.db.handle import Uncopied
from kvwal.engine.engine import Engine
from kvwal.feed.change import Change, Prefixes
from kvwal.feed.changes import STEP_S, Bootstrap, Changes, forget_in_forked_child, heartbeat
from kvwal.feed.chosen import AnyTables
from kvwal.feed.line import position_at
from kvwal.feed.quiet import Quiet
from kvwal.keys import Seqno
from kvwal.positions import Position

__all__ = ["AsyncBootstrap", "AsyncChanges", "wait_until_ready"]

# Changes of one trip to a worker, and from how many bytes of keys and values on it brings no more.
_MOST: Final = 1024
_MOST_BYTES: Final = 1 << 20


class AsyncChanges(Uncopied, AsyncIterator[Change]):
    """What commits changed, for `async for`. Made by `AsyncStore.changes`; use it in an `async with` block.

    One task at a time. An error, or a cancellation while it waits, closes it: `changes(after=position)` goes on, and
    nothing is lost.
    """

    __slots__ = (
        "__weakref__",
        "_ahead",
        "_changes",
        "_engine",
        "_error",
        "_follow",
        "_quiet",
        "_read_to",
        "_refuse_if_over",
        "_running",
        "_position",
        "_workers",
    )

    def __init__(
        self,
        engine: Engine,
        changes: Changes,
        workers: Workers,
        refuse_if_over: Callable[[], None],
        *,
        follow: bool,
        quiet: Quiet,
    ) -> None:
        """`refuse_if_over`: asked before a worker is, and keeps the workers."""
        self._engine = engine
        self._changes = changes
        self._workers = workers
        self._refuse_if_over = refuse_if_over
        self._follow = follow
        self._quiet = quiet
        self._running = False
        # What a worker met behind what it has read.
        self._error: Exception | None = None
        # What a worker has read and was not handed out, and the position behind it.
        self._ahead: deque[Change] = deque()
        self._read_to = changes.position.seqno
        self._position = self._read_to
        forget_in_forked_child(self)

    @property
    def position(self) -> Position:
        """The last commit that was wholly handed out or passed over: the place to go on after."""
        return position_at(self._engine, self._position)

    def __aiter__(self) -> AsyncChanges:
        return self

    async def __anext__(self) -> Change:
        if not self._ahead:
            await self._fetch()
        if not self._ahead:
            raise StopAsyncIteration
        change = self._ahead.popleft()
        if not self._ahead:
            self._position = self._read_to
        elif change.last:
            self._position = change.seqno
        return change

    @property
    def alive(self) -> bool:
        """Whether more may come: see `Changes.alive`."""
        return bool(self._ahead) or self._changes.alive

    @property
    def last_poll_s(self) -> float:
        """How long ago it asked for a commit, in seconds. It asks all the time while a task waits for one."""
        return self._changes.last_poll_s

    async def _fetch(self) -> None:
        """Have something ahead, if something is there, or comes within the time."""
        if self._running:
            raise RuntimeError("this feed is being iterated by another task; make one for each task")
        self._running = True
        quiet = self._quiet
        quiet.begin()
        try:
            while True:
                if self._error is not None:
                    raise self._error
                self._refuse_if_over()
                self._ahead, self._read_to, self._error = await self._workers.submit(_read, self._changes)
                if self._ahead:
                    quiet.end()
                    return
                if self._error is not None:
                    continue
                self._position = self._read_to
                left_s = quiet.left_s(STEP_S)
                if self._follow and left_s > 0:
                    await wait_until_ready(self._changes.when_ready, left_s)
                    continue
                if self._follow and not quiet.is_over():
                    self._ahead.append(heartbeat(self._engine, self._position))
                return
        except BaseException:
            self._changes.close()
            raise
        finally:
            self._running = False

    def forget_ahead(self) -> None:
        """For `forget_in_forked_child`."""
        self._ahead.clear()

    async def aclose(self) -> None:
        """Let go of the log that it holds. Idempotent."""
        self._ahead.clear()
        self._changes.close()

    async def __aenter__(self) -> AsyncChanges:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


async def wait_until_ready(
    when_ready: Callable[[Callable[[], object]], Callable[[], object]], timeout_s: float | None
) -> None:
    """Wait at most so long (None: for ever) for what `Changes.when_ready` waits for. Raises what ended the wait."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()

    def wake() -> None:
        # The loop may be closed: then no task waits any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(woken.set)

    take_back = when_ready(wake)
    try:
        async with asyncio.timeout(timeout_s):
            await woken.wait()
    except TimeoutError:
        pass
    finally:
        ended_by = take_back()
    if isinstance(ended_by, Exception):
        raise ended_by


def _read(changes: Changes) -> tuple[deque[Change], Seqno, Exception | None]:
    """Some of what is there now, the position behind it, and what is wrong there."""
    found: deque[Change] = deque()
    size = 0
    try:
        while len(found) < _MOST and size < _MOST_BYTES and (change := changes.poll()) is not None:
            found.append(change)
            size += len(change.key) + len(change.value or b"")
    except Exception as error:  # noqa: BLE001  # raised when what came before it was handed out
        return found, changes.position.seqno, error
    return found, changes.position.seqno, None


class AsyncBootstrap(Uncopied):
    """A snapshot, and the position from which `changes` goes on where it ends: see `kvwal.Bootstrap`."""

    __slots__ = ("_base", "_engine", "_refuse_if_over", "_workers", "position", "snapshot")

    def __init__(
        self,
        engine: Engine,
        base: Bootstrap,
        snapshot: AsyncSnapshot,
        workers: Workers,
        refuse_if_over: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._base = base
        self._workers = workers
        self._refuse_if_over = refuse_if_over
        #: The store as `position` left it.
        self.snapshot = snapshot
        #: The last commit that the snapshot contains.
        self.position: Position = base.position

    def changes(
        self,
        *,
        prefix: Prefixes = b"",
        tables: AnyTables | None = None,
        follow: bool = False,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
    ) -> AsyncChanges:
        """What came after the snapshot. Arguments as in `AsyncStore.changes`."""
        quiet = Quiet(timeout_s, heartbeat_s)
        changes = self._base.changes(prefix=prefix, tables=tables, follow=follow)
        return AsyncChanges(self._engine, changes, self._workers, self._refuse_if_over, follow=follow, quiet=quiet)
