"""Past moments: which can be read, and readers of them.

Invariant: while a reader of a past moment is registered, the pages of its base are pinned and the log beyond the base
is held. Both are let go of as for any version that has no reader any more (succession.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from kvwal.engine.followers import FOLLOWER, Followers
from kvwal.engine.keeping import Keeping
from kvwal.engine.past_version import PastVersion
from kvwal.engine.readers import Moments, Reader
from kvwal.engine.recovery import Recovered
from kvwal.engine.state import UnlessGone
from kvwal.engine.stats import Pin
from kvwal.engine.succession import Succession
from kvwal.errors import FeedGap, SnapshotTooOld
from kvwal.keys import Seqno
from kvwal.locks import locked_by_state
from kvwal.log import ArchiveLimits, KeyCursor, KeyHistory, Seek, SegmentCursor, Stretch
from kvwal.pages import Tree
from kvwal.pages.meta import Meta
from kvwal.pages.pager import Pager
from kvwal.times import time_of, us_of

__all__ = ["Past", "Window"]


@dataclass(frozen=True, slots=True)
class Window:
    """The moments that can be read: that of each commit from `oldest` to `newest`.

    Attributes:
        oldest, newest: commits, by seqno. 0 is the moment before the first one.
        oldest_time: that of the commit `oldest`, in UTC. None if there is no such commit, or nothing is kept but now.
        bases: how many bases there are, from which reading begins.
        held_bytes: what is on disk for past moments alone: pages that only bases reach, and log that recovery does not
            need.
    """

    oldest: Seqno
    newest: Seqno
    oldest_time: datetime | None
    bases: int
    held_bytes: int


class _NotKeptError(Exception):
    """The pages of a base are no longer kept."""


class Past:
    """The past moments of one open store. Thread-safe."""

    def __init__(
        self, parts: Recovered, moments: Moments, succession: Succession, keeping: Keeping, followers: Followers
    ) -> None:
        self._state, self._pages = parts.state, parts.pages
        self._moments = moments
        self._succession = succession
        self._keeping = keeping
        self._followers = followers
        #: Of a store that is not written here, a subclass has one.
        self._history: KeyHistory
        if parts.log is not None:
            self._history = parts.log.key_history
        self._seek = Seek(parts.reader.chain)
        self._segments = parts.reader.segments
        self._log = parts.log

    # -- moments --------------------------------------------------------------------------------

    def window(self) -> Window:
        """The moments that can be read now."""
        self._state.refuse_if_gone()
        bases, newest = self._keeping.bases, self._state.seqno
        if not bases:
            return Window(newest, newest, None, 0, 0)
        oldest = bases[0]
        oldest_time = time_of(oldest.time_us) if oldest.seqno else None
        return Window(oldest.seqno, newest, oldest_time, len(bases), self._keeping.held_bytes())

    def pins(self) -> list[Pin]:
        """What holds a moment, or log, but for consumers. O(extents) for each reader of a former version."""
        self._state.refuse_if_gone()
        with UnlessGone(self._state):
            return self._pins()

    def _pins(self) -> list[Pin]:
        pins: list[Pin] = []
        for reader in self._moments.readers.all():
            generation, size = reader.version.tree.meta.generation, self._succession.held_bytes(reader.version)
            moment = reader.purpose, reader.seqno, reader.since_us, size
            pins.append(Pin(*moment, generation=generation, thread_name=reader.thread_name))
        for oldest in self._keeping.bases[:1]:
            # Of a store that is gone there are none.
            since_us = oldest.time_us or min((each.created_us for each in self._segments()[:1]), default=0)
            pins.append(Pin("window", oldest.seqno, since_us, self._keeping.held_bytes()))
        for hold in [] if self._log is None else self._log.retention.holds():
            # What a past moment holds was counted with its reader, and what a follower does with its pin.
            of_consumer = hold.limits is not None and not isinstance(hold.limits, ArchiveLimits)
            if not of_consumer and hold.name not in ("snapshot", "window", FOLLOWER):
                pins.append(Pin(hold.name, hold.after, hold.since_us, self._keeping.held_log_bytes(hold.after)))
        return pins + self._followers.pins()

    def oldest(self) -> Seqno:
        """The oldest moment behind which nothing is missing, in the window as in the log."""
        with self.hold_log(None) as cursor:
            return max(self.window().oldest, cursor.position)

    def hold_log(self, after: Seqno | None) -> SegmentCursor:
        """Hold the log beyond a commit (None: all of it) until what this returns is closed or collected."""
        with UnlessGone(self._state):
            return self._keeping.hold(after, "diff")

    @contextmanager
    def generation(self, *, oldest: bool = False) -> Iterator[tuple[Meta, Pager]]:
        """The newest generation, or the base that the window begins with: what it says, and its pages as they are on
        disk. They stay while the block runs; those of a follower may go, and its pager raises SnapshotTooOld then.

        SnapshotTooOld if it went just now: try again.
        """
        self._state.refuse_if_gone()
        pins, tree = self._pages.pins, self._state.version.tree
        bases = self._keeping.bases if oldest else ()
        meta = tree.meta
        if bases and bases[0].seqno <= meta.seqno:
            meta = bases[0].meta(meta)
        holder = object()
        try:
            try:
                # That of the moment before the first commit has no page.
                pins.hold(holder, {meta.generation} if meta.height or meta.catalogue_height else ())
            except ValueError:
                raise SnapshotTooOld(meta.seqno, meta.seqno + 1, self._state.seqno, while_read=True) from None
            yield meta, self._pager_of(meta, tree).uncached()
        finally:
            pins.hold(holder, ())

    def _pager_of(self, meta: Meta, tree: Tree) -> Pager:
        """What reads a base, or the generation of the newest tree."""
        del meta
        return tree.pager

    def reader(self, at: Seqno | datetime, purpose: str, owner: object = None, *, ahead: bool = False) -> Reader:
        """Register a reader of the moment of a commit, or of a time. Give it back with `Reader.release`, or drop it.

        Args:
            ahead: its version is to serve the moments after it, too, which it does where the window has this one.

        Raises:
            SnapshotTooOld: it is older than the window.
            ValueError: there is no such commit yet, or the time is still to come, or has no time zone.
        """
        self._state.refuse_if_gone()
        with UnlessGone(self._state):
            return self._reader(at, purpose, owner, ahead)

    def _reader(self, at: Seqno | datetime, purpose: str, owner: object, ahead: bool) -> Reader:
        newest = self._state.seqno
        seqno = self._seqno_at(at, newest) if isinstance(at, datetime) else at
        if seqno > newest:
            raise ValueError(f"there is no commit {seqno}; the newest is {newest}")
        if seqno == newest and not (ahead and self._keeping.bases):
            reader = self._moments.reader(purpose, owner=owner)
            if reader.seqno == seqno:
                # A past moment, though nothing came after it: what has expired it judges as it will later on.
                reader.at_us = self._judged_at_us(at, seqno, self._pages.meta)
                return reader
            reader.release()
        since_us = self._moments.clock.now_us()
        while True:
            bases = self._keeping.bases
            try:
                version = self._version(seqno, at)
                at_us = self._judged_at_us(at, seqno, version.tree.meta)
                return self._register(version, seqno, purpose, since_us, owner, at_us)
            except (FeedGap, _NotKeptError):
                # The window has moved on meanwhile, unless another program removed a file.
                if self._keeping.bases is bases:
                    raise self._too_old(at) from None

    def _version(self, seqno: Seqno, at: Seqno | datetime) -> PastVersion:
        """The read path of the moment. FeedGap if its log is gone."""
        newest = self._state.version.tree
        meta, bases = newest.meta, self._keeping.bases
        n = bisect_right(bases, seqno, key=lambda base: base.seqno)
        if not n:
            # Also when what is read happens to be there.
            raise self._too_old(at)
        # A generation of a checkpoint in parts has some of the commits up to the one that it is to be replayed through.
        if meta.seqno > seqno or seqno < meta.replay_through:
            meta = bases[n - 1].meta(meta)
        # Held first, and looked for after.
        hold = self._keeping.hold(meta.seqno, "snapshot")
        return PastVersion(Tree(self._pager_of(meta, newest), meta, meta.root, meta.height), self._history, hold)

    @locked_by_state
    def _register(
        self, made: PastVersion, seqno: Seqno, purpose: str, since_us: int, owner: object, at_us: int
    ) -> Reader:
        self._state.refuse_if_gone()
        try:
            version = self._succession.past(made)
        except ValueError:
            raise _NotKeptError from None
        reader = Reader(version, seqno, purpose, since_us, owner, at_us)
        reader.register(version.memtable.older.readers, version.readers, self._moments.readers)
        return reader

    def _too_old(self, at: Seqno | datetime) -> SnapshotTooOld:
        window = self.window()
        return SnapshotTooOld(
            at, window.oldest, window.newest, oldest_time=window.oldest_time, nearest=(None, window.oldest)
        )

    def close(self) -> None:
        """Let go of the files of the log that are kept open."""
        self._history.close()

    # -- times ----------------------------------------------------------------------------------

    def _seqno_at(self, at: datetime, newest: Seqno) -> Seqno:
        """The last commit at that time."""
        at_us = _us_since_1970(at)
        newest_us = self._newest_us()
        # A commit is younger than the clock says where that was set back before the store was opened.
        now_us = max(self._moments.clock.now_us(), newest_us)
        if at_us > now_us:
            now = time_of(now_us).isoformat()
            raise ValueError(f"{at.isoformat()} is still to come: the store's time is {now}")
        bases = self._keeping.bases
        if at_us < (bases[0].time_us if bases else newest_us):
            raise self._too_old(at)
        # Held, since it is read by name.
        with self.hold_log(None):
            return min(self._seek.seqno_at(at_us), newest)

    def _judged_at_us(self, at: Seqno | datetime, seqno: Seqno, base: Meta) -> int:
        """The time by which it is judged what has expired: the one asked for, or that of the commit.

        It is not later than now: commits may be stamped so after the clock stood ahead, and what lives now lived then.
        It is not looked for where nothing expires.
        """
        clock = self._moments.clock
        if not clock.in_use:
            return 0
        if isinstance(at, datetime):
            at_us = _us_since_1970(at)
        else:
            try:
                at_us = self._seek.time_of(seqno)
            except ValueError:
                # Its log is gone. So it is the last one of the generation, which says when it was made.
                at_us = base.time_us
        return min(at_us, clock.now_us())

    def stretches(self, table: int, after: Seqno, until: Seqno) -> list[Stretch]:
        """What each segment changed in a table between two moments. Requires: a reader of one not above `after`."""
        return self._history.stretches(table, after, until)

    def _newest_us(self) -> int:
        return self._pages.meta.time_us if self._log is None else self._log.last_time_us

    # -- versions of a key ----------------------------------------------------------------------

    def versions(
        self, table: int, key: bytes, since: Seqno | None, until: Seqno | None, *, reverse: bool
    ) -> KeyCursor:
        """The commits from `since` on (None: all that the log has) to `until` that changed the key.

        `until`: at most, and by default, the newest that a read sees. SnapshotTooOld if one from `since` on is gone.
        """
        self._state.refuse_if_gone()
        newest = self._state.seqno
        until = newest if until is None else min(until, newest)
        after = None if since is None else Seqno(max(since - 1, 0))
        try:
            with UnlessGone(self._state):
                return self._history.find(table, key, after, until, reverse=reverse)
        except FeedGap as gap:
            raise SnapshotTooOld(
                gap.asked + 1 if isinstance(gap.asked, int) else gap.asked,
                gap.oldest,
                gap.newest,
                oldest_time=gap.oldest_time,
                newest_time=gap.newest_time,
                lost_commits=gap.lost_commits,
            ) from None


def _us_since_1970(at: datetime) -> int:
    """As `us_of`; 0 for a time before, as no commit has, since the moment before the first one has this time."""
    return max(us_of("at", at), 0)
