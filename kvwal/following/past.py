"""Past moments of a store that another process writes, and what became of its keys.

Nothing is held: what was retired, or written over, while it was asked for raises SnapshotTooOld, and what was moved is
looked for once more.

Invariant: a commit is looked for in the segments that were listed after it was known to be on disk. Commits that a
newer segment supersedes were never on disk for sure; so that segment had its name by then, or begins later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from kvwal.engine.followers import Followers
from kvwal.engine.keeping import Keeping
from kvwal.engine.past import Past
from kvwal.engine.readers import Moments, Reader
from kvwal.engine.recovery import Recovered
from kvwal.engine.succession import Succession
from kvwal.errors import CorruptionError, FeedGap, FormatError, SnapshotTooOld
from kvwal.keys import KeyRange, Seqno
from kvwal.log import Hold, KeyCursor, KeyHistory, KeyRecord, LogReader, Stretch, hold_kept
from kvwal.log.chain import no_segments
from kvwal.log.ranges import Cover
from kvwal.log.segment import SegmentHeader
from kvwal.pages import FollowedPages, Tree
from kvwal.pages.meta import Meta
from kvwal.pages.pager import Pager

__all__ = ["FollowedHistory", "FollowedPast"]

_T = TypeVar("_T")

# What a retired or a replaced segment fails with.
_DOUBTS = (CorruptionError, FormatError, FileNotFoundError)


class UntilStill(Protocol):
    """Gives what a function gives, once it does not fail for what is just being changed, or the store is gone."""

    def __call__(self, action: Callable[[], _T], /) -> _T: ...


class _Segments(NamedTuple):
    """The segments that there were, and what is known of their keys."""

    #: The last commit that may be looked for there.
    until: Seqno
    names: list[Seqno]
    newest: SegmentHeader
    history: KeyHistory


class FollowedHistory(KeyHistory):
    """The key history of a log that another process writes. Thread-safe."""

    def __init__(
        self, reader: LogReader, shown: Callable[[], Seqno], until_still: UntilStill, refuse: Callable[[], object]
    ) -> None:
        """`shown`: the last commit that is known to be on disk. `refuse`: asked for each list; see `hold_kept`."""
        self._reader = reader
        self._until_still = until_still
        self._refuse = refuse
        self._shown = shown
        self._view: _Segments | None = None

    def _for(self, after: int, until: int) -> _Segments:
        """Where commits beyond `after` up to `until` are looked for. SnapshotTooOld if some are no longer there."""
        view = self._view
        if view is None or until > view.until:
            view = self._look()
        if view.names[0] > after + 1 and after < until:
            raise SnapshotTooOld(after, view.names[0], until)
        return view

    def _look(self) -> _Segments:
        """The segments as they are. What fails as one of these is read is asked after here, before it is raised."""
        until, chain, last = self._shown(), self._reader.chain, self._view
        names, newest = self._until_still(self._listed)
        if last is not None and (last.names, last.newest) == (names, newest):
            view = last._replace(until=until)
        else:
            history = KeyHistory(chain, None, lambda: names, partial(self._held, until=until))
            view = _Segments(until, names, newest, history)
        self._view = view
        return view

    def _listed(self) -> tuple[list[Seqno], SegmentHeader]:
        chain = self._reader.chain
        names = chain.names()
        if not names:
            raise no_segments()
        newest = chain.header(names[-1])
        self._refuse()
        return names, newest

    def _held(self, after: Seqno | None, until: Seqno) -> Hold:
        return self._until_still(lambda: hold_kept(self._reader, after, until, self._refuse))

    def has_moved(self, view: _Segments) -> bool:
        """Whether there are other segments than those of a view."""
        return self._look().history is not view.history

    def find(self, table: int, key: bytes, after: Seqno | None, until: Seqno, *, reverse: bool) -> KeyCursor:
        """As `KeyHistory.find`."""
        hold = self._held(after, until)
        return KeyCursor(hold, self._found(table, key, hold.after, until, reverse))

    def _found(self, table: int, key: bytes, after: Seqno, until: Seqno, reverse: bool) -> Iterator[KeyRecord]:
        while True:
            view = self._for(after, until)
            try:
                for each in view.history.find(table, key, after, until, reverse=reverse):
                    yield each
                    if reverse:
                        until = Seqno(each.record.seqno - 1)
                    else:
                        after = each.record.seqno
                return
            except FeedGap as gap:
                raise SnapshotTooOld(after, gap.oldest, until) from None
            except _DOUBTS:
                if not self.has_moved(view):
                    raise

    def last(self, table: int, key: bytes, after: Seqno, until: Seqno) -> KeyRecord | None:
        """As `KeyHistory.last`; SnapshotTooOld if some of these commits are gone."""
        while True:
            view = self._for(after, until)
            try:
                return view.history.last(table, key, after, until)
            except _DOUBTS:
                if not self.has_moved(view):
                    raise

    def stretches(self, table: int, after: Seqno, until: Seqno) -> list[Stretch]:
        """As `KeyHistory.stretches`. What is read of them raises SnapshotTooOld if it is gone, or was moved."""
        view = self._for(after, until)
        gone = SnapshotTooOld(after, view.names[0], until, while_read=True)
        return [_Stretch(each, self, view, gone) for each in view.history.stretches(table, after, until)]

    def close(self) -> None:
        """As `KeyHistory.close`."""
        if self._view is not None:
            self._view.history.close()


class _Stretch(Stretch):
    """A stretch that may go while it is read."""

    __slots__ = ("_gone", "_history", "_of", "_view")

    def __init__(self, of: Stretch, history: FollowedHistory, view: _Segments, gone: SnapshotTooOld) -> None:
        self._of = of
        self._history = history
        self._view = view
        self._gone = gone

    @property
    def ranges(self) -> list[KeyRange]:
        """As `Stretch.ranges`."""
        try:
            return self._of.ranges
        except _DOUBTS:
            self._refuse_if_moved()
            raise

    @property
    def covers(self) -> list[Cover]:
        """As `Stretch.covers`."""
        try:
            return self._of.covers
        except _DOUBTS:
            self._refuse_if_moved()
            raise

    def chunks(
        self, start: bytes | None, stop: bytes | None, *, reverse: bool
    ) -> Iterator[tuple[list[bytes], list[bytes | None]]]:
        """As `Stretch.chunks`."""
        try:
            yield from self._of.chunks(start, stop, reverse=reverse)
        except _DOUBTS:
            self._refuse_if_moved()
            raise

    def _refuse_if_moved(self) -> None:
        if self._history.has_moved(self._view):
            raise self._gone from None


class FollowedPast(Past):
    """The past moments that the files have."""

    #: Moves to the newest commit.
    refresh: Callable[[], object]
    #: StoreRemovedError where the store is gone, or another one was put in its place.
    refuse_if_removed: Callable[[], object]
    #: Waits until the bases are those of the generation that is read, and lets go of those whose log was retired.
    renew_bases: Callable[[], object]
    #: Gives what a function gives, once it does not fail for what is just being changed.
    until_still: UntilStill
    #: Gives the time of the newest commit that is shown.
    newest_us: Callable[[], int]

    def __init__(
        self, parts: Recovered, moments: Moments, succession: Succession, keeping: Keeping, followers: Followers
    ) -> None:
        super().__init__(parts, moments, succession, keeping, followers)
        assert isinstance(parts.pages, FollowedPages)
        self._followed = parts.pages
        shown, refuse = lambda: parts.state.seqno, lambda: self.refuse_if_removed()
        self._history = FollowedHistory(parts.reader, shown, lambda action: self.until_still(action), refuse)

    def reader(self, at: Seqno | datetime, purpose: str, owner: object = None, *, ahead: bool = False) -> Reader:
        """As `Past.reader`."""
        # The newest generation says where bases are, and by its slot it is seen that their pages are there.
        self._moments.now.ready()
        if not self._followed.guard.is_in_slot():
            self.refresh()
        while True:
            bases = self._keeping.bases
            try:
                return super().reader(at, purpose, owner, ahead=ahead)
            except SnapshotTooOld:
                # It may have looked while another thread went over to a newer generation, which has other bases. Or the
                # writer has a newer one, and shortened its window since: then what is said to be kept is what is there.
                self.renew_bases()
                if self._keeping.bases is bases:
                    raise

    def _pager_of(self, meta: Meta, tree: Tree) -> Pager:
        return tree.pager if meta.generation == tree.meta.generation else self._followed.pager_of_bases(tree.pager)

    def _seqno_at(self, at: datetime, newest: Seqno) -> Seqno:
        found = self.until_still(lambda: super(FollowedPast, self)._seqno_at(at, newest))
        self.refuse_if_removed()
        return found

    def _judged_at_us(self, at: Seqno | datetime, seqno: Seqno, base: Meta) -> int:
        at_us = self.until_still(lambda: super(FollowedPast, self)._judged_at_us(at, seqno, base))
        self.refuse_if_removed()
        return at_us

    def _newest_us(self) -> int:
        return self.newest_us()
