"""Looking back: what a store and a follower have in common. Past moments, what became of keys, commits, the feed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime

from kvwal.batch import MAX_TABLE_ID
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.engine.past import Window
from kvwal.engine.state import UnlessGone
from kvwal.errors import SnapshotTooOld
from kvwal.feed.change import Filter, Prefixes, Selection
from kvwal.feed.changes import Bootstrap, Changes
from kvwal.feed.chosen import AnyTables, table_ids
from kvwal.feed.commits import Commit, commits
from kvwal.feed.difference import Difference, differences, users_table
from kvwal.feed.key_versions import KeyVersions
from kvwal.feed.line import moment_of, seqno_of
from kvwal.feed.previous import WithPrevious
from kvwal.feed.quiet import Quiet
from kvwal.keys import Bound, BytesLike, as_int, as_key
from kvwal.log import Record, SegmentCursor

__all__ = ["Recalling"]


class Recalling(OrderedMapping):
    """The part of a store, or of a follower, that looks back, and tells what happens."""

    engine: Engine

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
        """The moments that can be read with `snapshot(at=)`, without a gap, and what is kept for them.

        Where another process writes the store, as that was looked at last: the oldest ones may have gone since. The
        SnapshotTooOld of one that is gone says what is left, and so does this then.
        """
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
        return _recorded(self.engine, self.engine.upkeep.read(position, self.engine.state.seqno, "history"))

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
        if until is None:
            self._freshen()
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
        size of the store, and a look at the rows of the key index of each segment that it wants only a part of. Both
        moments stay until it is exhausted, closed or collected. Raises, at the call, as `snapshot`.
        """
        bounds = Bounds(start, stop, prefix, reverse, None)
        first, last = moment_of(self.engine, "a", a), None if b is None else moment_of(self.engine, "b", b)
        meant = users_table(as_int("table", table, 0, MAX_TABLE_ID))
        return differences(self.engine, first, last, bounds, meant, self)

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

        A feed of a follower begins with what is durable at the call, and moves the follower while it waits. It holds no
        log: FeedGap, at the call or later, if commits beyond its position were retired.

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
        is on another line; SnapshotTooOld for `previous` and `expand` if `after` is a moment before the window (and
        later if what the feed holds for them was given up: see `max_snapshot_bytes`);
        ReadOnlyError for `follow` in a store opened with flag "r"; TableNotFoundError; TypeError or ValueError for
        other arguments.
        """
        self._catch_up()
        position = None if after is None else seqno_of(self.engine, "after", after)
        wanted: Selection = Filter(prefix, table_ids(self.engine, tables))
        quiet = Quiet(timeout_s, heartbeat_s)
        if previous or expand:
            position = self.engine.upkeep.past.oldest() if position is None else position
            wanted = WithPrevious(self.engine, wanted, position, values=previous, keys=expand, owner=self)
        return Changes(self.engine, position, wanted, follow=follow, quiet=quiet, owner=self)

    def _catch_up(self) -> None:
        """Show what is durable now, where commits do not come by themselves."""

    def _freshen(self) -> None:
        """The same only where what is shown may be older than was allowed."""

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
        if until is None:
            self._freshen()
        position = None if after is None else seqno_of(self.engine, "after", after)
        last = until if until is None or isinstance(until, datetime) else seqno_of(self.engine, "until", until)
        wanted = Filter(b"", table_ids(self.engine, tables))
        return commits(self.engine, position, since=since, until=last, meta=meta, wanted=wanted, owner=self)

    def bootstrap(self) -> Bootstrap:
        """A snapshot, and the position from which `changes` goes on: no change between them, and none in both.

        Flushes what the snapshot shows, where that is not durable yet. Close it, or use it in a `with` block.
        """
        return Bootstrap(self.engine, owner=self)


def _recorded(engine: Engine, cursor: SegmentCursor) -> Iterator[Record]:
    with cursor, UnlessGone(engine.state):
        for record in cursor:
            engine.state.refuse_if_gone()
            yield record
