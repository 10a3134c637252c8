"""What a store remembers, for tasks: past moments, what became of keys, the commits, and the feed of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Literal

from kvwal.aio.changes import AsyncBootstrap, AsyncChanges
from kvwal.aio.committer import Committer
from kvwal.aio.consumer import AsyncConsumer
from kvwal.aio.reading import AsyncReading
from kvwal.aio.scanning import listed
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.workers import in_thread, to_the_end
from kvwal.api.remembering import reverting
from kvwal.api.store import Store
from kvwal.batch import WriteBatch
from kvwal.engine.engine import Engine
from kvwal.engine.past import Window
from kvwal.engine.reads import Reads
from kvwal.feed.asked import Asked, Start
from kvwal.feed.change import Prefixes
from kvwal.feed.chosen import AnyTables, table_ids
from kvwal.feed.commits import Commit
from kvwal.feed.difference import Difference
from kvwal.feed.key_versions import KeyVersion
from kvwal.feed.lag import ConsumerInfo
from kvwal.feed.quiet import Quiet
from kvwal.keys import Bound, BytesLike, Seqno
from kvwal.options import Durability

__all__ = ["AsyncRemembering"]


class AsyncRemembering(AsyncReading):
    """The part of `AsyncStore` that looks back, and tells what happens."""

    __slots__ = ()

    _committer: Committer
    _engine: Engine
    _reads: Reads
    _store: Store

    @abstractmethod
    async def commit(
        self, batch: WriteBatch, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """See `AsyncStore.commit`."""

    # -- past moments -------------------------------------------------------------------------

    def snapshot(self, *, at: int | datetime | None = None) -> AsyncSnapshot:
        """The store as it was at one moment, as a map that stays so: `async with db.snapshot() as snapshot:`.

        Arguments and errors as in `Store.snapshot`. A time is looked up in the log at the call: a few milliseconds.
        """
        self._refuse_if_over()
        return AsyncSnapshot(self._store.snapshot(at=at), self._reads, self._workers)

    @property
    def window(self) -> Window:
        """The moments that can be read with `snapshot(at=)`, without a gap, and what is kept for them."""
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

    async def revert(
        self,
        key: BytesLike,
        *,
        to: int | datetime,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
        table: int = 0,
    ) -> Seqno:
        """Bring back what `key` was at a past moment, in a new commit. Arguments and errors as in `Store.revert`."""
        self._refuse_if_over()
        batch = await in_thread(reverting, self._engine, key, to, table)
        return await self.commit(batch, durability=durability, meta=meta)

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

    def consumer(
        self,
        name: str,
        *,
        prefix: Prefixes = b"",
        tables: AnyTables | None = None,
        start: Start = "now",
        max_lag_bytes: int | Literal["default"] | None = "default",
        max_lag_s: float | Literal["default"] | None = "default",
        own: bool = False,
        replace: bool = False,
        steal: bool = False,
        on_error: Literal["stop", "park"] = "stop",
        ack_interval_s: float = 1.0,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
    ) -> AbstractAsyncContextManager[AsyncConsumer]:
        """A named reader of the feed, whose position the store keeps: `async with db.consumer(name) as consumer:`.

        Arguments and errors as in `Store.consumer`.
        """
        self._refuse_if_over()
        asked = Asked(
            name,
            prefix,
            table_ids(self._engine, tables),
            start=start,
            max_lag_bytes=max_lag_bytes,
            max_lag_s=max_lag_s,
            own=own,
            replace=replace,
            steal=steal,
            on_error=on_error,
            ack_interval_s=ack_interval_s,
            timeout_s=timeout_s,
            heartbeat_s=heartbeat_s,
        )
        return self._consumer(asked)

    @asynccontextmanager
    async def _consumer(self, asked: Asked) -> AsyncIterator[AsyncConsumer]:
        self._refuse_if_over()
        parts = self._committer, self._workers, self._refuse_if_over
        made, cancelled = await to_the_end(AsyncConsumer, self._engine, asked, *parts, owner=self._store)
        async with made as consumer:
            if cancelled is not None:
                raise cancelled
            yield consumer

    async def consumers(self) -> list[ConsumerInfo]:
        """The consumers, by name: `Store.consumers`, in a thread."""
        self._refuse_if_over()
        return await in_thread(self._store.consumers)

    async def remove_consumer(self, name: str) -> bool:
        """`Store.remove_consumer`, in a thread. If the task is cancelled, it goes on, and how it ended is not told."""
        self._refuse_if_over()
        return await in_thread(self._store.remove_consumer, name)
