"""A follower for tasks: as `kvwal.Follower`, awaited. However many tasks wait for commits, one looks for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar, cast, overload

from kvwal.aio.changes import wait_until_ready
from kvwal.aio.index import AsyncIndex
from kvwal.aio.reading import AsyncReading
from kvwal.aio.recalling import AsyncRecalling
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.stored import AsyncRecallingTable, AsyncStored, ReadParts
from kvwal.aio.within import AsyncSnapshotTable, in_snapshot
from kvwal.aio.workers import Workers, in_thread, to_the_end
from kvwal.api.followed_table import FollowedTable
from kvwal.api.follower import Follower
from kvwal.api.naming import TableInfo
from kvwal.backup.making import BackupReport, BaseKind
from kvwal.backup.port import Where
from kvwal.codecs import Codec, KeyCodec
from kvwal.engine.row_cache import Row, RowCache
from kvwal.engine.value import Value
from kvwal.errors import closed, left_open
from kvwal.feed.line import seqno_of
from kvwal.following.engine import FollowedEngine
from kvwal.following.progress import Lag, Progress
from kvwal.following.waiting import Freshness
from kvwal.keys import BytesLike, Seqno, as_key, as_seconds
from kvwal.positions import Position
from kvwal.tables.spec import TableSpec
from kvwal.tables.within import refuse_other_store

__all__ = ["AsyncFollowedTable", "AsyncFollower"]

I = TypeVar("I")  # noqa: E741  # an index key, beside K and V
K = TypeVar("K")
V = TypeVar("V")
_T = TypeVar("_T")

# How long the task that looks sleeps between two looks: at first, and at most.
_LEAST_SLEEP_S: Final = 0.001
_MOST_SLEEP_S: Final = 0.05


class _Looking:
    """Moves a follower while tasks wait for commits of it. In the loop's thread."""

    def __init__(self, progress: Progress, workers: Workers) -> None:
        self._refresh = progress.refresh
        self._waiting = progress.waiting
        self._workers = workers
        self._task: asyncio.Task[None] | None = None
        self._waiting.asked = self.begin

    def begin(self) -> None:
        """A task is going to wait."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._look())

    async def _look(self) -> None:
        sleep_s, before = _LEAST_SLEEP_S, None
        # Those who are woken ask again, and may be there once more.
        await asyncio.sleep(0)
        while self._waiting:
            try:
                newest = await self._workers.submit(self._refresh)
            except Exception as error:  # noqa: BLE001  # for those who wait
                self._waiting.wake_all(error)
                return
            sleep_s, before = _LEAST_SLEEP_S if newest != before else min(2 * sleep_s, _MOST_SLEEP_S), newest
            await asyncio.sleep(sleep_s)

    def end(self) -> None:
        """Look no more, and let those go who wait."""
        if self._task is not None:
            # That of a loop that was closed before it ended does not go on.
            with suppress(RuntimeError):
                self._task.cancel()
        self._waiting.wake_all()


class _YoungRows:
    """The rows of a follower that has a `max_lag_s`: none that may be too old. What is no row is read the long way."""

    __slots__ = ("_cache", "_freshness")

    def __init__(self, cache: RowCache, freshness: Freshness) -> None:
        self._cache = cache
        self._freshness = freshness

    @property
    def rows(self) -> dict[Row, Value]:
        return self._cache.rows if self._freshness.holds() else {}


class AsyncFollower(AsyncRecalling):
    """A store that another process may be writing, for reading by the tasks of one loop. Made by `kvwal.aio.follow`.

    As `kvwal.Follower`: it shows the state after one durable commit, and moves when it is told to (`refresh`, `wait`),
    when a feed of it waits, and when what it reads is no longer there. Any task of its loop may use it. Where pages are
    read, a worker does; `snapshot`, `table`, and the beginnings of scans and feeds may look at the files in the loop,
    for a few milliseconds.
    """

    __slots__ = ("_closing", "_ending", "_looking")

    _engine: FollowedEngine
    _store: Follower

    def __init__(self, follower: Follower) -> None:
        """From here on it is this one's to close."""
        self._closing = False
        # Of the task that closes it.
        self._ending = asyncio.Lock()
        workers = Workers(asyncio.get_running_loop())
        progress = follower.engine.progress
        super().__init__(follower, ReadParts(workers, follower, self._refuse_if_closing, progress.freshness))
        self._looking = _Looking(progress, workers)
        if progress.freshness.max_lag_s is not None:
            self._cache = cast("RowCache", _YoungRows(self._cache, progress.freshness))

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise closed() if self._store.closed or self._ending.locked() else left_open()

    # -- where it is ----------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._closing or self._store.closed

    @property
    def seqno(self) -> Seqno:
        """The last commit that reads see."""
        return self._state.seqno

    @property
    def position(self) -> Position:
        """The same with its line: what a feed goes on after."""
        return self._store.position

    @property
    def pinned(self) -> bool:
        """Whether the writer keeps what this shows now. One system call, made in the loop."""
        return self._store.pinned

    @property
    def rebases(self) -> int:
        """How often it went over to a newer checkpoint of the writer."""
        return self._store.rebases

    async def refresh(self) -> Seqno:
        """Move to the newest commit that is said to be on disk; returns its seqno. As `Follower.refresh`."""
        self._refuse_if_over()
        return await self._workers.submit(self._store.refresh)

    async def wait(self, position: int, timeout_s: float | None = None) -> bool:
        """Move until it shows a commit, at most for `timeout_s` seconds (None: for ever). Whether it does.

        As `Follower.wait`. All tasks that wait, for this or for changes, have one that looks.
        """
        seqno = seqno_of(self._engine, "position", position)
        until_s = None if timeout_s is None else time.monotonic() + as_seconds("timeout_s", timeout_s)
        # What is shown already counts only where it is open.
        self._refuse_if_over()
        if self._state.seqno < seqno:
            await self.refresh()
        ready = partial(self._engine.progress.waiting.when_beyond, Seqno(seqno - 1))
        while self._state.seqno < seqno:
            self._refuse_if_over()
            left_s = None if until_s is None else until_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            await wait_until_ready(ready, left_s)
        return True

    async def lag(self) -> Lag:
        """How far it is behind what is in the writer's files. As `Follower.lag`."""
        self._refuse_if_over()
        return await self._workers.submit(self._store.lag)

    async def backup(
        self,
        dest: Where,
        *,
        base: BaseKind = "auto",
        history: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> BackupReport:
        """`Follower.backup`, in a thread, which also calls `progress`. If the task is cancelled, it goes on."""
        self._refuse_if_over()
        return await in_thread(self._store.backup, dest, base=base, history=history, progress=progress)

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncFollower of {self.path!r}{' (closed)' if self.closed else ''}, seqno {self.seqno}>"

    # -- reading ------------------------------------------------------------------------------

    async def _read(self, key: bytes) -> bytes | None:
        await self._parts.young()
        return await super()._read(key)

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        self._refuse_if_over()
        return await self._workers.submit(self._store.get_many, list(map(as_key, keys)))

    @overload
    def table(self, name: str) -> AsyncFollowedTable[bytes, bytes]: ...
    @overload
    def table(self, name: str, key: type[K] | KeyCodec[K]) -> AsyncFollowedTable[K, bytes]: ...
    @overload
    def table(self, name: str, *, value: type[V] | Codec[V]) -> AsyncFollowedTable[bytes, V]: ...
    @overload
    def table(self, name: str, key: type[K] | KeyCodec[K], value: type[V] | Codec[V]) -> AsyncFollowedTable[K, V]: ...
    def table(self, name: str, key: Any = bytes, value: Any = bytes) -> Any:
        """A named table, for reading. As `Follower.table`, but that TableCodecError comes with the first use of it."""
        self._refuse_if_over()
        return AsyncFollowedTable(self._parts, self._store.unchecked(TableSpec(name, key, value)), self)

    async def tables(self) -> list[TableInfo]:
        """The tables that there are, by name. In a thread."""
        self._refuse_if_over()
        return await in_thread(self._store.tables)

    # -- ending -------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let go of the files. Idempotent. Those who wait get `ClosedError`.

        Where another task is at it, it waits for the end of that.
        """
        async with self._ending:
            # Where no thread was to be had for it, the next call tries again.
            if self._closing and self._store.closed:
                return
            self._closing = True
            try:
                self._looking.end()
                _, cancelled = await to_the_end(self._store.close)
                if cancelled is not None:
                    raise cancelled
            finally:
                self._stop()


class AsyncFollowedTable(AsyncRecallingTable[K, V], Generic[K, V]):
    """A named table of a followed store, of now. Made by `AsyncFollower.table`; empty as long as there is none."""

    __slots__ = ("__weakref__", "_bytes", "_owner", "_parts", "_table")

    _table: FollowedTable[K, V]

    def __init__(self, parts: ReadParts, table: FollowedTable[K, V], owner: AsyncFollower) -> None:
        """`table`: what a worker reads the past with. `owner` stays as long as this."""
        super().__init__(table.spec)
        self._owner = owner
        self._parts = parts
        self._table = table
        self._bytes = AsyncStored(parts, table.raw())

    def raw(self) -> AsyncReading:
        """The same table as bytes."""
        return self._bytes

    async def id(self) -> int | None:
        """The number that stands for the table in `changes`; None while there is none."""
        return await self._bytes.id()

    async def within(self, snapshot: AsyncSnapshot) -> AsyncSnapshotTable[K, V]:
        """The table at the moment of a snapshot. UsageError if that is of another store."""
        if not isinstance(snapshot, AsyncSnapshot):
            raise TypeError(f"a snapshot is expected, not {type(snapshot).__name__}")
        refuse_other_store(self._parts.engine.state, snapshot._snapshot)
        return await in_snapshot(self._spec, snapshot, self._parts.workers)

    async def index(
        self, name: str, *, codec: type[I] | KeyCodec[I], key: Callable[[V], Any] | None = None, many: bool = False
    ) -> AsyncIndex[I, K, V]:
        """An index of the table, for reading. As `kvwal.FollowedTable.index`, looked up by a worker."""
        self._parts.refuse_if_over()
        found = await self._parts.workers.submit(self._table.index, name, codec=codec, key=key, many=many)
        return AsyncIndex(found, self._parts.workers, self._parts.refuse_if_over, self._owner)

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncFollowedTable {self._spec}>"
