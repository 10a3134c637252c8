"""What a store remembers: past moments, what became of keys, the commits, and the feed of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from kvwal.api.recalling import Recalling
from kvwal.batch import MAX_TABLE_ID, WriteBatch
from kvwal.engine.engine import Engine
from kvwal.expiring import Expiring
from kvwal.feed.asked import Asked, Start
from kvwal.feed.change import Prefixes
from kvwal.feed.chosen import AnyTables, table_ids
from kvwal.feed.claim import remove_consumer
from kvwal.feed.consumer import Consumer
from kvwal.feed.difference import past_value, users_table
from kvwal.feed.lag import ConsumerInfo, consumers
from kvwal.feed.line import moment_of
from kvwal.keys import BytesLike, Seqno, as_int, as_key
from kvwal.options import Durability

__all__ = ["Remembering", "reverting"]


def reverting(engine: Engine, key: BytesLike, to: int | datetime, table: int) -> WriteBatch:
    """What `Store.revert` commits; it raises as that does."""
    name, moment = as_key(key), moment_of(engine, "to", to)
    table = as_int("table", table, 0, MAX_TABLE_ID)
    value = past_value(engine, name, moment, users_table(table))
    batch = WriteBatch()
    part = batch.table(table) if table else batch
    if value is None:
        part.delete(name)
    elif type(value) is Expiring:
        part.put_until(name, value.value, value.expires_us)
    else:
        part.put(name, value)
    return batch


class Remembering(Recalling):
    """The part of `Store` that looks back, and tells what happens."""

    @abstractmethod
    def commit(
        self,
        batch: WriteBatch,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """See `Store.commit`."""

    def revert(
        self,
        key: BytesLike,
        *,
        to: int | datetime,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
        table: int = 0,
    ) -> Seqno:
        """Bring back what `key` was at a past moment, in a new commit: put its value, or delete it. Returns the seqno.

        A value that was to expire expires when it was to; where that time has come the key is deleted.

        Args:
            to: the moment, as `snapshot(at=)` takes it.
            durability, meta: as in `put`.
            table: id of the table; 0 is the default one.

        Raises as `snapshot` and `put`.
        """
        return self.commit(reverting(self.engine, key, to, table), durability=durability, meta=meta)

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
    ) -> Consumer:
        """A named reader of the feed, whose position the store keeps: iterate and `ack`, or `project`.

        An existing name continues where it is; then `start` is not looked at, and limits that are not given stay.

        Args:
            name: 1 to 255 bytes in UTF-8.
            prefix, tables: as in `changes`.
            start: where a new one begins: "now", with the "oldest" commit of the log, after a commit, by its seqno, or
                with the first that was made at a time, or later; a time to come is as "now". It is stored before this
                returns.
            max_lag_bytes: more bytes of log than this, and up to two segments, beyond its position are not kept for
                it: it is lost then. None: as many as the disk has. Default: 1 GiB, or 10 % of the free space if that
                is less.
            max_lag_s: it is also lost when what is beyond its position is older than this. Default: None, no limit.
            own: tell it its own commits, which `project` makes, too.
            replace: let an existing one go on with another filter.
            steal: take it over from an owner in this process, which is fenced.
            on_error: what `project` does with a commit for which its function raises again: "stop", or "park" it, so
                that `replay_parked` may try it later, and go on.
            ack_interval_s: the position is written at most this often.
            timeout_s: iterating gives a batch without changes when none came for this long. None: never.
            heartbeat_s: it also gives one when none came for this long, and says that it is a `heartbeat`. None: never.

        Raises: LockedError if it is in use, with the name of the thread; ConsumerExistsError for another filter;
        FeedGap if `start` is not kept, or no commit; ReadOnlyError; TypeError or ValueError for other arguments.
        """
        asked = Asked(
            name,
            prefix,
            table_ids(self.engine, tables),
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
        return Consumer(self.engine, asked, owner=self)

    def consumers(self) -> list[ConsumerInfo]:
        """The consumers, by name: how far each is behind, what it holds, who has it, and why it stopped."""
        return consumers(self.engine)

    def remove_consumer(self, name: str) -> bool:
        """Forget a consumer, its position and its hold on the log. Returns whether there was one.

        LockedError if it is in use; ReadOnlyError; TypeError or ValueError for what can be no name.
        """
        return remove_consumer(self.engine, name)
