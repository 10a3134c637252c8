"""Looking back, for tasks: what the store and a follower have in common. As `kvwal.api.recalling`, for threads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime

from kvwal.aio.changes import AsyncBootstrap, AsyncChanges
from kvwal.aio.opened import AsyncOpened
from kvwal.aio.scanning import listed
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.workers import in_thread
from kvwal.engine.past import Window
from kvwal.feed.change import Prefixes
from kvwal.feed.chosen import AnyTables
from kvwal.feed.commits import Commit
from kvwal.feed.difference import Difference
from kvwal.feed.key_versions import KeyVersion
from kvwal.feed.quiet import Quiet
from kvwal.keys import Bound, BytesLike

__all__ = ["AsyncRecalling"]


class AsyncRecalling(AsyncOpened):
    """The part of `AsyncStore`, and of `AsyncFollower`, that looks back, and tells what happens."""

    __slots__ = ()

    # -- past moments -------------------------------------------------------------------------

    def snapshot(self, *, at: int | datetime | None = None) -> AsyncSnapshot:
        """The store as it was at one moment, as a map that stays so: `async with db.snapshot() as snapshot:`.

        Arguments and errors as in `Store.snapshot`. A time is looked up in the log at the call: a few milliseconds.
        """
        self._refuse_if_over()
        return AsyncSnapshot(self._store.snapshot(at=at), self._reads, self._workers)

    @property
    def window(self) -> Window:
        """The moments that can be read with `snapshot(at=)`, without a gap, and what is kept for them.

        Where another process writes the store, as that was looked at last: the oldest ones may have gone since. The
        SnapshotTooOld of one that is gone says what is left, and so does this then.
        """
        self._refuse_if_over()
        return self._store.window

    def diff(
        self,
        a: int | datetime,
        b: int | datetime | None = None,
        *,
        start: Bound = None,
        stop: Bound = None,
        prefix: BytesLike | None = None,
        reverse: bool = False,
        table: int = 0,
    ) -> AsyncIterator[Difference]:
        """The keys whose values at moment `b` are others than at `a`: `async for key, old, new in db.diff(a, b)`.

        Arguments and errors as in `Store.diff`.
        """
        self._refuse_if_over()
        found = self._store.diff(a, b, start=start, stop=stop, prefix=prefix, reverse=reverse, table=table)
        return listed(self._workers, self._refuse_if_over, found)

    async def versions(
        self,
        key: BytesLike,
        *,
        since: int | None = None,
        until: int | None = None,
        reverse: bool = True,
        limit: int | None = None,
        table: int = 0,
    ) -> list[KeyVersion]:
        """What each commit made of `key`, newest first: `Store.versions`, as a list.

        All of it is in memory, so ask for a key of many versions by `limit`, and on with `until`. If the task is
        cancelled, reading goes on.
        """
        self._refuse_if_over()
        found = self._store.versions(key, since=since, until=until, reverse=reverse, limit=limit, table=table)
        return await in_thread(list, found)

    # -- the feed -----------------------------------------------------------------------------

    def changes(
        self,
        after: int | None = None,
        *,
        prefix: Prefixes = b"",
        tables: AnyTables | None = None,
        previous: bool = False,
        expand: bool = False,
        follow: bool = False,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
    ) -> AsyncChanges:
        """What the durable commits beyond `after` changed, each change once: `async for change in db.changes(...)`.

        Arguments and errors as in `Store.changes`. A task that is cancelled as it waits for a change closes it.
        """
        self._refuse_if_over()
        quiet = Quiet(timeout_s, heartbeat_s)
        changes = self._store.changes(
            after, prefix=prefix, tables=tables, previous=previous, expand=expand, follow=follow
        )
        return AsyncChanges(self._engine, changes, self._workers, self._refuse_if_over, follow=follow, quiet=quiet)

    def commits(
        self,
        after: int | None = None,
        *,
        since: datetime | None = None,
        until: int | datetime | None = None,
        meta: Mapping[str, str] | None = None,
        tables: AnyTables | None = None,
    ) -> AsyncIterator[Commit]:
        """The durable commits beyond `after`, without what they wrote: `async for commit in db.commits(...)`.

        Arguments and errors as in `Store.commits`.
        """
        self._refuse_if_over()
        found = self._store.commits(after, since=since, until=until, meta=meta, tables=tables)
        return listed(self._workers, self._refuse_if_over, found)

    def bootstrap(self) -> AbstractAsyncContextManager[AsyncBootstrap]:
        """A snapshot, and the position from which `changes` goes on: `async with db.bootstrap() as base`."""
        self._refuse_if_over()
        return self._bootstrap()

    @asynccontextmanager
    async def _bootstrap(self) -> AsyncIterator[AsyncBootstrap]:
        with await in_thread(self._store.bootstrap) as base:
            snapshot = AsyncSnapshot(base.snapshot, self._reads, self._workers)
            yield AsyncBootstrap(self._engine, base, snapshot, self._workers, self._refuse_if_over)
