"""What a store remembers, for tasks: past moments, what became of keys, the commits, and the feed of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Literal

from kvwal.aio.committer import Committer
from kvwal.aio.consumer import AsyncConsumer
from kvwal.aio.recalling import AsyncRecalling
from kvwal.aio.workers import in_thread, to_the_end
from kvwal.api.remembering import reverting
from kvwal.api.store import Store
from kvwal.batch import WriteBatch
from kvwal.feed.asked import Asked, Start
from kvwal.feed.change import Prefixes
from kvwal.feed.chosen import AnyTables, table_ids
from kvwal.feed.lag import ConsumerInfo
from kvwal.keys import BytesLike, Seqno
from kvwal.options import Durability

__all__ = ["AsyncRemembering"]


class AsyncRemembering(AsyncRecalling):
    """The part of `AsyncStore` that looks back, and tells what happens."""

    __slots__ = ()

    _committer: Committer
    _store: Store

    @abstractmethod
    async def commit(
        self, batch: WriteBatch, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """See `AsyncStore.commit`."""

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

    # -- consumers of the feed ------------------------------------------------------------------

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
