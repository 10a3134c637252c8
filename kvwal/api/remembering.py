"""What a store remembers: past moments, what became of keys, the commits, and the feed of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Literal

from kvwal.batch import MAX_TABLE_ID, WriteBatch
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.engine.past import Window
from kvwal.errors import SnapshotTooOld
from kvwal.expiring import Expiring
from kvwal.feed.asked import Asked, Start
from kvwal.feed.change import Filter, Prefixes, Selection
from kvwal.feed.changes import Bootstrap, Changes
from kvwal.feed.chosen import AnyTables, table_ids
from kvwal.feed.claim import remove_consumer
from kvwal.feed.commits import Commit, commits
from kvwal.feed.consumer import Consumer
from kvwal.feed.difference import Difference, differences, past_value
from kvwal.feed.key_versions import KeyVersions
from kvwal.feed.lag import ConsumerInfo, consumers
from kvwal.feed.line import moment_of, seqno_of
from kvwal.feed.previous import WithPrevious
from kvwal.feed.quiet import Quiet
from kvwal.keys import Bound, BytesLike, Seqno, as_int, as_key
from kvwal.log import Record
from kvwal.options import Durability

__all__ = ["Remembering", "reverting"]


def reverting(engine: Engine, key: BytesLike, to: int | datetime, table: int) -> WriteBatch:
    """What `Store.revert` commits; it raises as that does."""
    name, moment = as_key(key), moment_of(engine, "to", to)
    table = as_int("table", table, 0, MAX_TABLE_ID)
    value = past_value(engine, name, moment, table)
    batch = WriteBatch()
    part = batch.table(table) if table else batch
    if value is None:
        part.delete(name)
    elif type(value) is Expiring:
        part.put_until(name, value.value, value.expires_us)
    else:
        part.put(name, value)
    return batch


class Remembering(OrderedMapping):
    """The part of `Store` that looks back, and tells what happens."""

    engine: Engine

    @abstractmethod
    def commit(
        self,
        batch: WriteBatch,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """See `Store.commit`."""

    # -- past moments -------------------------------------------------------------------------

    def snapshot(self, *, at: int | datetime | None = None) -> Snapshot:
        """The store as it was at one moment, as a read-only map that stays so. Close it, or use it in a `with` block.

        Args:
            at: a seqno, for the moment of that commit; or a time, for that of the last commit made then or before.
                None: now.

        A past moment is read from the base before it and the log between: see `window` for the moments there are. What
        it needs stays while it is open, within `max_snapshot_bytes`. `len` of it is O(keys).

        Raises: SnapshotTooOld for a moment before the window; ValueError for a commit that is not there yet, and for
        a time that is still to come or has no time zone; TypeError.
        """
        return Snapshot(self.engine, at=None if at is None else moment_of(self.engine, "at", at), owner=self)

    @property
    def window(self) -> Window:
        """The moments that can be read with `snapshot(at=)`, without a gap, and what is kept for them."""
        return self.engine.upkeep.past.window()

    def history(self, after: int | None = None) -> Iterator[Record]:
        """The commits beyond seqno `after` that were made before the call, in order; None: all that the log still has.

        The log is kept as far back as recovery and the window (see `window`) need it, and while an
        iterator that this returned is alive and not exhausted, as far back as that has come.

        FeedGap, at the call, if commits beyond `after` are no longer kept, or there is no commit `after` yet.
        """
        position = None if after is None else seqno_of(self.engine, "after", after)
        self.engine.state.refuse_if_gone()
        if not self.engine.upkeep.is_read_only:
            # What a commit that is under way appends is in the log when this returns.
            self.engine.queue.run(lambda: None)
        return self.engine.upkeep.read(position, self.engine.state.seqno, "history")

    def versions(
        self,
        key: BytesLike,
        *,
        since: int | None = None,
        until: int | None = None,
        reverse: bool = True,
        limit: int | None = None,
        table: int = 0,
    ) -> KeyVersions:
        """What each commit made of `key`, newest first, without reading the whole log.

        Args:
            since: the first commit that counts, by seqno; None: the oldest that the log still has.
            until: the last one; None: the newest that a read sees.
            reverse: newest first; False: oldest first.
            limit: at most this number.
            table: id of the table; 0 is the default one.

        Raises, at the call: SnapshotTooOld if a commit from `since` on is no longer kept; TypeError or ValueError for
        other arguments. The first call may have to read segments that have no key index yet.
        """
        return KeyVersions(
            self.engine,
            as_key(key),
            table=as_int("table", table, 0, MAX_TABLE_ID),
            since=None if since is None else seqno_of(self.engine, "since", since, SnapshotTooOld),
            until=None if until is None else seqno_of(self.engine, "until", until, SnapshotTooOld),
            reverse=reverse,
            limit=None if limit is None else as_int("limit", limit, 0),
            owner=self,
        )

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
    ) -> Iterator[Difference]:
        """The keys whose values at moment `b` are others than at moment `a`, in order, with both.

        Args:
            a, b: moments as `snapshot(at=)` takes them; `b` None: now. `a` may be the later one.
            start, stop, prefix, reverse: as in `scan`.
            table: id of the table; 0 is the default one.

        It costs two look-ups for each key that was written, or deleted with a range, between the two, whatever the
        size of the store. Both moments stay until it is exhausted, closed or collected. Raises, at the call, as
        `snapshot`.
        """
        bounds = Bounds(start, stop, prefix, reverse, None)
        first, last = moment_of(self.engine, "a", a), None if b is None else moment_of(self.engine, "b", b)
        return differences(self.engine, first, last, bounds, as_int("table", table, 0, MAX_TABLE_ID), self)

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
    ) -> Changes:
        """What the durable commits beyond `after` changed, in their order, each change once.

        Args:
            after: a position, or a seqno of this store; None: everything that the log still has (with `previous` and
                `expand`: from the beginning of the window on).
            prefix: only keys with this prefix, or with one of several. A deleted range is cut to them.
            tables: only these tables, one or several: ids, names or `Table`s; None: the default one and all of users.
            previous: give each change the value that its key had before the commit, for one look-up each.
            expand: tell a deleted range as a "delete" of each key that it held, less those that the commit wrote.
            follow: wait for what comes. Without it, it ends with the last commit that is durable at the call.
            timeout_s: with `follow`, stop (StopIteration) when no change came for this long; iterating again goes on.
            heartbeat_s: with `follow`, tell a change of kind "heartbeat" when none came for this long. None: never.

        Raises, at the call: FeedGap if commits beyond `after` are no longer kept, there is no commit `after` yet, or it
        is on another line; SnapshotTooOld for `previous` and `expand` if `after` is a moment before the window;
        ReadOnlyError for `follow` in a store opened with flag "r"; TableNotFoundError; TypeError or ValueError for
        other arguments.
        """
        position = None if after is None else seqno_of(self.engine, "after", after)
        wanted: Selection = Filter(prefix, table_ids(self.engine, tables))
        quiet = Quiet(timeout_s, heartbeat_s)
        if previous or expand:
            position = self.engine.upkeep.past.oldest() if position is None else position
            wanted = WithPrevious(self.engine, wanted, position, values=previous, keys=expand, owner=self)
        return Changes(self.engine, position, wanted, follow=follow, quiet=quiet, owner=self)

    def commits(
        self,
        after: int | None = None,
        *,
        since: datetime | None = None,
        until: int | datetime | None = None,
        meta: Mapping[str, str] | None = None,
        tables: AnyTables | None = None,
    ) -> Iterator[Commit]:
        """The durable commits beyond `after` that changed a user's table, in their order, without what they wrote.

        It ends with the last commit that is durable at the call. What is not read yet is held in the log meanwhile.

        Args:
            after: a position, or a seqno of this store; None: everything that the log still has.
            since: only commits made then or later.
            until: only commits up to this seqno, or made then or before.
            meta: only commits with all of these pairs.
            tables: only commits that changed one of these, as in `changes`; `Commit.changes` counts theirs.

        A datetime needs a time zone. FeedGap, at the call, if commits beyond `after` are gone (without `after`: if some
        since `since` may be), or there is no commit `after` yet; TypeError or ValueError for other arguments.
        """
        position = None if after is None else seqno_of(self.engine, "after", after)
        last = until if until is None or isinstance(until, datetime) else seqno_of(self.engine, "until", until)
        wanted = Filter(b"", table_ids(self.engine, tables))
        return commits(self.engine, position, since=since, until=last, meta=meta, wanted=wanted, owner=self)

    def bootstrap(self) -> Bootstrap:
        """A snapshot, and the position from which `changes` goes on: no change between them, and none in both.

        Flushes what the snapshot shows, where that is not durable yet. Close it, or use it in a `with` block.
        """
        return Bootstrap(self.engine, owner=self)

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
                with the first that was made at a time, or later. It is stored before this returns.
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

        LockedError if it is in use.
        """
        return remove_consumer(self.engine, name)
