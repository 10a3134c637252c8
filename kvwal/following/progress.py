"""How a follower comes from commit to commit.

Its state is the tree of one generation and a memtable of the commits behind it, as after a recovery. `Progress.refresh`
moves it in one of two ways, both up to the last commit that the files say is on disk, and never back:

- The newest generation is the one that is read: the commits that came are published, as their writer publishes them.
- There is a newer one: a version of it is made beside, from its tree and the log behind it, and reads go over to it.

Requires of the writer: the orders of its writes that docs/processes.md lists.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Final, NamedTuple, TypeVar
from weakref import ref

from kvwal.engine.create import is_marked
from kvwal.engine.keeping import Keeping
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES, Memtable
from kvwal.engine.publish import Publisher
from kvwal.engine.readers import Moments, Now
from kvwal.engine.state import State
from kvwal.engine.succession import Succession
from kvwal.engine.version import Version
from kvwal.errors import FeedGap, SnapshotTooOld, StoreRemovedError, not_followed
from kvwal.files import Directory, Files, rooted
from kvwal.files.names import DATA
from kvwal.following.doubt import until_still
from kvwal.following.past import FollowedPast
from kvwal.following.waiting import Freshness, Waiting
from kvwal.keys import Seqno
from kvwal.locks import locked, locked_by_state, new_lock
from kvwal.log import FollowedCursor, Heard, Hold, LogReader, Record, Run, SegmentCursor, Watch
from kvwal.log.segment import SegmentHeader
from kvwal.pages import FollowedPages, Tree
from kvwal.pages.followed import Guard
from kvwal.pages.pager import Pager
from kvwal.readers.now import NowReader

__all__ = ["Lag", "Progress", "fill"]

_T = TypeVar("_T")

# How long one that waits sleeps between two looks: at least, as a share of the time that it has waited, and at most.
_LEAST_SLEEP_S: Final = 0.001
_SLEPT_SHARE: Final = 1 / 8
_MOST_SLEEP_S: Final = 0.05
# How long what the writer says is enough, and its files are not looked at; nor is what is at their path.
_LOOKED_S: Final = 0.5


class Lag(NamedTuple):
    """How far a follower is behind what is in the files.

    Attributes:
        commits: how many are in the log and not shown; those that are not on disk for sure cannot be.
        seconds: how long ago the newest of these was made; 0 if there are none.
    """

    commits: int
    seconds: float


class Progress(Now):
    """How a follower comes from one moment to the next. Thread-safe."""

    def __init__(
        self,
        files: Files,
        directory: Directory,
        pages: FollowedPages,
        state: State,
        reader: LogReader,
        watch: Watch,
        newest_us: int,
    ) -> None:
        """`newest_us`: the time of the last commit of the log that is shown; 0 if there is none."""
        self._directory = directory
        self._pages = pages
        self._state = state
        self._reader = reader
        self._watch = watch
        #: Owned by the thread that moves it. Before `State.lock` in the order of locks.
        self.lock = new_lock()
        #: Whether what is shown may be too old.
        self.freshness = Freshness(self.refresh)
        #: Those to be told of commits.
        self.waiting = Waiting(lambda: state.seqno)
        #: How often reads went over to a newer generation.
        self.rebases = 0
        self._parts: tuple[Publisher, Succession, Keeping] | None = None
        # What the writer says while something is pinned; and when files were looked at last.
        self._now = NowReader(files, directory, pages.meta.store_id, pages.meta.line)
        self._now_s = files.monotonic_s
        self._looked_s = 0.0
        # Where the store was when it was opened, and when it was seen last that no other one is there.
        self._files, self._path = files, rooted(directory.path, files)
        self._path_s = files.monotonic_s()
        self._moments: Moments | None = None
        # The newest segment, as it was when the page file was seen to be in its place after something was read of it.
        self._vouched: SegmentHeader | None = None
        # The generation whose bases were looked at.
        self._bases_of = pages.meta
        # The time of the newest commit that is shown, and that of the last one that came later than the one before it.
        self._newest_us = max(pages.meta.time_us, newest_us)
        self._told_us = 0

    def begin(
        self, publisher: Publisher, succession: Succession, keeping: Keeping, moments: Moments, past: FollowedPast
    ) -> None:
        """The engine is put together."""
        past.refresh, past.renew_bases, past.until_still = self.refresh, self._renew_bases, self._until_still
        past.newest_us = lambda: self._newest_us
        past.refuse_if_removed = self._refuse_if_removed
        self._moments = moments
        moments.now = self
        moments.clock.now_us = partial(self._now_us, moments.clock.now_us)
        self._parts = publisher, succession, keeping
        self._watch_pages(self._pages.guard, self._pages.pager)
        self._pages.when_bases_gone = lambda pager: self._give_up(ref(pager))

    @locked
    def refresh(self) -> Seqno:
        """Move to the last commit that is on disk; returns its seqno.

        StoreRemovedError if the store was removed or replaced, CorruptionError if what is needed does not verify,
        ClosedError. Reads go on from the moment before.
        """
        state = self._state
        state.refuse_if_gone()
        self._looked_s = self._now_s()
        before, began_s = (state.seqno, state.version), time.monotonic()
        if self._parts is not None:
            # Of versions that were read when that was looked at last, and are read no more.
            self._parts[1].release_pages()
            self._pages.let_go()
        try:
            is_all = self._until_still(lambda: self._move(in_short=self.freshness.max_lag_s is None))
            if not is_all and before == (state.seqno, state.version):
                is_all = self._until_still(self._move)
            if before == (state.seqno, state.version):
                self._refuse_if_removed()
                self._refuse_if_elsewhere()
            if is_all and self._watch.is_sure and self._watch.last < state.seqno:
                # Commits that are on disk never go away.
                raise removed(self._directory)
        except OSError:
            # It may be that it was closed meanwhile.
            state.refuse_if_gone()
            raise
        # First what an earlier look found: then this one's may take its place.
        self.freshness.shows(state.seqno)
        if is_all and self._watch.saw_all:
            self.freshness.found_all(began_s, max(self._watch.written, self._watch.durable))
            self.freshness.shows(state.seqno)
        self.waiting.wake()
        return state.seqno

    def _until_still(self, action: Callable[[], _T]) -> _T:
        """See the function of this name."""
        return until_still(self._directory, action, self._refuse_if_removed)

    def _refuse_if_removed(self) -> None:
        """StoreRemovedError where the store is gone, or another one was put in its place.

        To be called after files that were opened by their names were read, and before that is shown, or a failure of it
        is raised: what a writer writes into the other store, it writes when the other page file is there.
        """
        # In this order: once the marker is gone, so is the page file that was read.
        if is_marked(self._directory) or self._pages.is_replaced():
            raise removed(self._directory)

    def _refuse_if_elsewhere(self) -> None:
        """StoreRemovedError where another store has its path: it was moved away, to put that one in its place.

        Where none is there, it goes on: its directory may have been moved with its writer, or a mount be away. Looks
        only where the last look is a while ago.
        """
        if (now_s := self._now_s()) - self._path_s < _LOOKED_S:
            return
        try:
            there = self._files.open_directory(self._path)
            try:
                is_other = there != self._directory and there.kind(DATA) == "file"
            finally:
                there.close()
        except OSError:
            # What may not be looked at says nothing.
            is_other = False
        if is_other:
            raise removed(self._directory)
        self._path_s = now_s

    def _move(self, *, in_short: bool = False) -> bool:
        """Whether all that there is was looked at: `in_short`, what the writer says is enough."""
        # Before the log is looked at: what is said to be on disk then is in a segment that is found.
        said = self._now.look() if self.pinned else None
        # Durability: the writer said it after a flush.
        heard = None if said is None else Heard(said.durable, said.segment, said.salt, said.session)
        is_all = self._watch.look(self._publish_next, heard, in_short=in_short)
        if said is not None and said.durable > self._watch.durable:
            self._now.disbelieve(said)
        pages = self._pages
        if self._state.version.tree.meta is not pages.meta:
            # An interruption came between installing the generation and going over to it.
            self._rebase()
            return is_all
        # Something may have failed after it went over.
        self._refresh_bases()
        is_newest = not is_all and said is not None and said.generation == pages.meta.generation
        if is_newest or not pages.has_moved() or not self._rebase():
            self._advance()
        return is_all

    def _advance(self) -> None:
        """Publish what came and was not told."""
        state, watch = self._state, self._watch
        if state.seqno < watch.durable:
            cursor = commits_beyond(self._reader, state.seqno, lambda: watch.durable)
            is_first = True
            while (part := cursor.next_part(watch.durable)) is not None:
                if is_first:
                    self._refuse_if_removed()
                    is_first = False
                self._publish(part)

    def _publish_next(self, part: Record | Run) -> None:
        """Publish what the watch has passed, if it is what comes next. What is left out is read by a cursor."""
        state = self._state
        if self._parts is None or state.version.tree.meta is not self._pages.meta:
            return
        segment = self._watch.segment
        if segment is not self._vouched:
            self._refuse_if_removed()
            self._vouched = segment
        following = state.seqno + 1
        if isinstance(part, Run) and part.seqnos[0] < following <= part.seqnos[-1]:
            part = part.part(following - part.seqnos[0])
        if (part.seqno if isinstance(part, Record) else part.seqnos[0]) == following:
            self._publish(part)

    def _publish(self, part: Record | Run) -> None:
        assert self._parts is not None, "it has not begun"
        if isinstance(part, Run):
            size = len(part.keys[0]) + len(part.values[0]) + ENTRY_OVERHEAD_BYTES
            self._parts[0].publish_puts(part.seqnos[-1], part.keys, part.values, len(part.keys) * size)
            self._is_told(part.times_us[-1])
        else:
            self._parts[0].publish(part.seqno, part.batch(), part.size)
            self._is_told(part.time_us)

    def _rebase(self) -> bool:
        """Go over to the newest generation. False if it is the one that is read: the other slot is being written."""
        assert self._parts is not None, "it has not begun"
        state, pages, watch = self._state, self._pages, self._watch
        found = pages.look()
        meta = found.choice.meta
        if meta == pages.meta and state.version.tree.meta is pages.meta:
            return False
        # Durability: the log was flushed so far before the flip.
        if meta.replay_through > watch.durable:
            watch.know(meta.replay_through)
            # Before more is shown: feeds go by the newest segment that was found, and these may be in a newer one.
            watch.look()
        until = watch.durable
        memtable = Memtable(meta.seqno, *state.locks())
        newest_us = fill(memtable, self._reader, meta.seqno, until)
        self._refuse_if_removed()
        version = Version(memtable, None, Tree(found.pager, meta, meta.root, meta.height))
        self._watch_pages(found.guard, found.pager)
        pages.install(found)
        self._parts[1].go_over(version, until)
        self._is_told(max(meta.time_us, newest_us))
        self.rebases += 1
        self._refresh_bases()
        return True

    def _refresh_bases(self) -> None:
        """Look at the bases of the generation that is read, unless that was done."""
        meta = self._pages.meta
        if self._bases_of is not meta:
            assert self._parts is not None, "it has not begun"
            self._pages.let_go()
            self._parts[2].refresh()
            self._bases_of = meta

    def _renew_bases(self) -> None:
        """Wait until the bases are those of the generation that is read, and have their log. Raises as `refresh`."""
        if not self._has_bases():
            self.refresh()

    @locked
    def _has_bases(self) -> bool:
        """Whether the bases are those of the generation that is read. If so, those whose log was retired go."""
        if not (self._bases_of is self._pages.meta is self._state.version.tree.meta):
            return False
        assert self._parts is not None, "it has not begun"
        keeping = self._parts[2]
        try:
            for oldest in keeping.bases[:1]:
                keeping.hold(oldest.seqno, "window").close()
        except FeedGap:
            keeping.refresh()
        return True

    def _watch_pages(self, guard: Guard, pager: Pager) -> None:
        guard.when_gone = partial(self._give_up, ref(pager))

    def _is_told(self, time_us: int) -> None:
        # One with the time of the commit before it may be of a clock that was set back, and says nothing.
        if time_us > self._newest_us:
            self._newest_us = self._told_us = time_us

    def _now_us(self, own_us: Callable[[], int]) -> int:
        """The follower's time: not before that of a commit that came while it followed."""
        return max(own_us(), self._told_us)

    @locked_by_state
    def _give_up(self, of: ref[Pager]) -> None:
        """The pages that this reads are gone, and so are the moments of its readers."""
        pager, newest = of(), self._state.seqno
        assert self._moments is not None, "it has not begun"
        for reader in self._moments.readers.all():
            if reader.version.tree.pager is pager:
                reader.give_up(SnapshotTooOld(reader.seqno, newest, newest, while_read=True))

    @property
    def pinned(self) -> bool:
        """Whether the writer keeps the pages of the newest version. One system call."""
        return self._pages.guard.is_pinned()

    # -- reading of now -------------------------------------------------------------------------

    def ready(self) -> None:
        """Move if the pages of the newest version are gone, or it may be too old. One system call. StaleError."""
        self.freshness.ensure()
        if not self._pages.guard.is_whole():
            self.refresh()

    def again(self, read: Callable[[], _T]) -> _T:
        """What a read of now gives, from a newer moment where pages went under it."""
        while True:
            try:
                return read()
            except SnapshotTooOld:
                self.refresh()

    def begun(self, walk: Callable[[], Iterator[_T]]) -> Iterator[_T]:
        """A walk of now that has its first chunk, and began when its pages were whole."""

        def begin() -> Iterator[_T]:
            self.ready()
            chunks = walk()
            first = next(chunks, None)
            return chunks if first is None else chain((first,), chunks)

        return self.again(begin)

    # -- waiting --------------------------------------------------------------------------------

    def await_beyond(self, seqno: int, timeout_s: float | None) -> bool:
        """Move until there is a commit beyond this one, for at most so long (None: for ever). Whether there is one.

        Raises as `refresh`.
        """
        # What is shown already counts only where it is.
        self._state.refuse_if_gone()
        began_s = time.monotonic()
        while self._state.seqno <= seqno and self._look_again() <= seqno:
            waited_s = time.monotonic() - began_s
            sleep_s = min(max(_LEAST_SLEEP_S, waited_s * _SLEPT_SHARE), _MOST_SLEEP_S)
            if timeout_s is not None:
                sleep_s = min(sleep_s, timeout_s - waited_s)
                if sleep_s <= 0:
                    return False
            time.sleep(sleep_s)
        return True

    def _look_again(self) -> Seqno:
        """As `refresh`; one system call where the writer says that there is nothing new."""
        if self._now_s() - self._looked_s < _LOOKED_S and self._is_still():
            return self._state.seqno
        return self.refresh()

    @locked
    def _is_still(self) -> bool:
        said = self._now.look() if self._now.is_open else None
        state = self._state
        return said is not None and (said.durable, said.generation) == (state.seqno, self._pages.meta.generation)

    @locked
    def lag(self, now_us: int) -> Lag:
        """How far it is behind. Reads the end of the log, and moves nothing. Raises as `refresh`."""
        self._state.refuse_if_gone()
        watch = self._watch
        self._until_still(watch.look)
        self._refuse_if_removed()
        self._refuse_if_elsewhere()
        commits = watch.written - self._state.seqno
        return Lag(commits, max(0.0, (now_us - watch.written_us) / 1e6)) if commits > 0 else Lag(0, 0.0)

    def feed(self, after: Seqno | None, until: Seqno | None) -> SegmentCursor:
        """The commits beyond `after`, up to `until` or as they are shown. FeedGap if some are no longer kept."""
        state, watch = self._state, self._watch
        shown, newest = lambda: state.seqno, lambda: watch.segment
        waits = self.await_beyond, self.waiting.when_beyond
        how = self._refuse_if_removed, self._until_still
        return self._until_still(lambda: FollowedCursor(self._reader, after, until, shown, *waits, newest, *how))

    def feed_now(self, after: Seqno | None, until: Seqno | None) -> SegmentCursor:
        """The same for what does not wait. ReadOnlyError where commits that are still to come are asked for."""
        if until is None:
            raise not_followed()
        return self.feed(after, until)

    def close(self) -> None:
        """Let go of the log's files."""
        self._watch.close()
        self._now.close()


def removed(directory: Directory) -> StoreRemovedError:
    """What a follower says where its store is not there any more."""
    text = "the store was removed or replaced while it was followed; follow it again"
    return StoreRemovedError(errno.ENOENT, text, directory.path)


def commits_beyond(reader: LogReader, after: Seqno, durable: Callable[[], Seqno]) -> SegmentCursor:
    """The commits beyond `after`, up to the last one that is on disk; asked again later, it goes on."""
    return SegmentCursor(reader, Hold({}, 0, after), None, durable, lambda seqno, timeout_s: False)


def fill(memtable: Memtable, reader: LogReader, after: Seqno, until: Seqno) -> int:
    """Bring the commits beyond `after`, up to `until`, into the memtable; returns the time of the last one, or 0.

    Requires: `until` is on disk.
    """
    newest_us = 0
    cursor = commits_beyond(reader, after, lambda: until)
    while (part := cursor.next_part(until)) is not None:
        if isinstance(part, Run):
            writes = dict(zip(part.keys, part.values, strict=True))
            memtable.write(part.seqnos[-1], writes, len(part.offsets) * part.offsets.step)
            newest_us = part.times_us[-1]
        else:
            batch = part.batch()
            memtable.write(part.seqno, batch.writes, part.size, batch.ranges, batch.parts())
            newest_us = part.time_us
    memtable.last_seqno = until
    return newest_us
