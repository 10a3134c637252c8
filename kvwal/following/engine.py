"""The engine of a follower: that of a store opened read-only, without a lock, which goes on from commit to commit.

Its state is the tree of one generation and a memtable of the commits behind it, as after a recovery. `Progress.refresh`
moves it in one of two ways, both up to the last commit that the files say is on disk, and never back:

- The newest generation is the one that is read: the commits that came are published, as their writer publishes them.
- There is a newer one: a version of it is made beside, from its tree and the log behind it, and reads go over to it.

Doubt is not damage. What does not verify, or is missing, may be what the writer is just changing. So it is looked at
again, and is an error only if nothing has moved between two failures.

Requires of the writer: the orders of its writes that docs/processes.md lists.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import ClassVar, Final, NamedTuple, TypeVar
from weakref import ref

from kvwal.engine.create import create_if_missing, erase, is_marked, open_directory
from kvwal.engine.engine import Engine
from kvwal.engine.keeping import Keeping
from kvwal.engine.memtable import Memtable
from kvwal.engine.past import Past
from kvwal.engine.publish import Publisher
from kvwal.engine.readers import Moments, Now
from kvwal.engine.reads import Reads
from kvwal.engine.recovery import Recovered, RecoveryReport, failures_at
from kvwal.engine.state import State
from kvwal.engine.succession import Succession
from kvwal.engine.value import Value
from kvwal.engine.version import Version
from kvwal.errors import (
    CorruptionError,
    FormatError,
    SnapshotTooOld,
    StaleError,
    StoreRemovedError,
    not_followed,
    read_only,
)
from kvwal.events import Events
from kvwal.files import Directory, Files
from kvwal.files.names import DATA, segment_name
from kvwal.following.past import FollowedPast
from kvwal.keys import Seqno
from kvwal.locks import locked, locked_by_state, new_lock
from kvwal.log import FollowedCursor, Hold, LogReader, RefusingLog, SegmentCursor, Watch
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader, list_segments
from kvwal.options import Options
from kvwal.pages import FollowedPages, Tree
from kvwal.pages.followed import Guard
from kvwal.pages.meta import Meta
from kvwal.pages.pager import Pager
from kvwal.readers.now import NowReader
from kvwal.readers.pin import HeldPin, PinMaker

__all__ = ["FollowedEngine", "Lag", "Progress", "recovered_beside", "signs"]

_T = TypeVar("_T")

# How long one that waits sleeps between two looks: at least, as a share of the time that it has waited, and at most.
_LEAST_SLEEP_S: Final = 0.001
_SLEPT_SHARE: Final = 1 / 8
_MOST_SLEEP_S: Final = 0.05
# How long what the writer says is enough, and its files are not looked at.
_LOOKED_S: Final = 0.5
# What is under way is over after a few looks. After this many, what failed is raised.
_MOST_LOOKS: Final = 1000
# The two slots of a page file.
_SLOTS_BYTES: Final = 8192


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
        #: What is shown may lack no commit that was made longer ago than this, in seconds; None: any.
        self.max_lag_s: float | None = None
        # Those to be told of a commit beyond one, and who moves it meanwhile.
        self._waiting: dict[object, tuple[Seqno, Callable[[], object]]] = {}
        #: Called before one is added; it may raise.
        self.asked: Callable[[], object] = lambda: None
        # When it last showed all there was, by the monotonic clock.
        self._current_s = -math.inf
        #: How often reads went over to a newer generation.
        self.rebases = 0
        # Where `refresh` reads on, and the newest segment when it began there.
        self._cursor: SegmentCursor | None = None
        self._cursor_in: SegmentHeader | None = None
        self._parts: tuple[Publisher, Succession, Keeping] | None = None
        # What the writer says while something is pinned; and when files were looked at last.
        self._now = NowReader(files, directory, pages.meta.store_id, pages.meta.line)
        self._now_s = files.monotonic_s
        self._looked_s = 0.0
        self._moments: Moments | None = None
        # The generation whose bases were looked at.
        self._bases_of = pages.meta
        # The time of the newest commit that is shown, and that of the last one that came later than the one before it.
        self._newest_us = max(pages.meta.time_us, newest_us)
        self._told_us = 0

    def begin(self, publisher: Publisher, succession: Succession, keeping: Keeping, moments: Moments) -> None:
        """The engine is put together."""
        self._moments = moments
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
            self.until_still(self._move)
            if before == (state.seqno, state.version):
                self._refuse_if_removed()
        except OSError:
            # It may be that it was closed meanwhile.
            state.refuse_if_gone()
            raise
        if self._watch.written <= state.seqno and self._watch.is_sure:
            self._current_s = began_s
        self._wake(state.seqno)
        return state.seqno

    def until_still(self, action: Callable[[], _T]) -> _T:
        """See the function of this name."""
        return until_still(self._directory, action, self._refuse_if_removed)

    def _refuse_if_removed(self) -> None:
        if is_marked(self._directory) or self._pages.is_replaced():
            raise StoreRemovedError(
                errno.ENOENT,
                "the store was removed or replaced while it was followed; follow it again",
                self._directory.path,
            )

    def _move(self) -> None:
        # Before the log is looked at: what is said to be on disk then is in a segment that is found.
        said = self._now.look() if self.pinned else None
        self._watch.look()
        if said is not None:
            # Durability: the writer said it after a flush.
            self._watch.know(said.durable)
        pages = self._pages
        if self._state.version.tree.meta is not pages.meta:
            # An interruption came between installing the generation and going over to it.
            self._rebase()
            return
        # Something may have failed after it went over.
        self._refresh_bases()
        if not pages.has_moved() or not self._rebase():
            self._advance()

    def _advance(self) -> None:
        """Publish what came."""
        assert self._parts is not None, "it has not begun"
        publisher, state, cursor, watch = self._parts[0], self._state, self._cursor, self._watch
        if cursor is None or cursor.position != state.seqno or self._cursor_in is not watch.segment:
            # The first one; or an interruption came between reading a commit and publishing it; or it may stand where
            # the log was superseded.
            cursor = commits_beyond(self._reader, state.seqno, lambda: watch.durable)
            self._cursor_in = watch.segment
        # It is gone if it fails.
        self._cursor = None
        for record in cursor:
            publisher.publish(record.seqno, record.batch(), record.size)
            self._is_told(record.time_us)
        self._cursor = cursor

    def _rebase(self) -> bool:
        """Go over to the newest generation. False if it is the one that is read: the other slot is being written."""
        assert self._parts is not None, "it has not begun"
        state, pages, watch = self._state, self._pages, self._watch
        found = pages.look()
        meta = found.choice.meta
        if meta == pages.meta and state.version.tree.meta is pages.meta:
            return False
        # Durability: the log was flushed so far before the flip.
        watch.know(meta.replay_through)
        until = watch.durable
        memtable = Memtable(meta.seqno, *state.locks())
        newest_us = fill(memtable, self._reader, meta.seqno, until)
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

    def await_bases(self) -> None:
        """Wait until the bases are those of the generation that is read. Raises as `refresh`."""
        if not self._has_bases():
            self.refresh()

    @locked
    def _has_bases(self) -> bool:
        return self._bases_of is self._pages.meta is self._state.version.tree.meta

    def _watch_pages(self, guard: Guard, pager: Pager) -> None:
        guard.when_gone = partial(self._give_up, ref(pager))

    def _is_told(self, time_us: int) -> None:
        # One with the time of the commit before it may be of a clock that was set back, and says nothing.
        if time_us > self._newest_us:
            self._newest_us = self._told_us = time_us

    def _now_us(self, own_us: Callable[[], int]) -> int:
        """The follower's time: not before that of a commit that came while it followed."""
        return max(own_us(), self._told_us)

    def newest_us(self) -> int:
        """The time of the newest commit that is shown."""
        return self._newest_us

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
        self.ensure_fresh()
        if not self._pages.guard.is_whole():
            self.refresh()

    def is_fresh(self) -> bool:
        """Whether what is shown is not older than `max_lag_s`."""
        return self.max_lag_s is None or time.monotonic() - self._current_s <= self.max_lag_s

    def ensure_fresh(self) -> None:
        """Move if what is shown may be older than `max_lag_s`. StaleError if it may be then, too."""
        if self.is_fresh():
            return
        self.refresh()
        lag_s = time.monotonic() - self._current_s
        if self.max_lag_s is not None and lag_s > self.max_lag_s:
            raise StaleError(lag_s, self.max_lag_s)

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

    def when_beyond(self, seqno: Seqno, wake: Callable[[], object]) -> Callable[[], object]:
        """Have `wake` called once there is a commit beyond this one. Returns what takes that back.

        The thread that moves it calls it, so it must be short and not raise. Nothing moves it but what is told by
        `asked`.
        """
        self.asked()
        token = object()
        self._waiting[token] = seqno, wake
        self._wake(self._state.seqno)
        return partial(self._waiting.pop, token, None)

    @property
    def is_waited_for(self) -> bool:
        """Whether one is to be told."""
        return bool(self._waiting)

    def wake_all(self) -> None:
        """Tell each of those, whatever there is: it asks again, and gets what is wrong."""
        for _, wake in list(self._waiting.values()):
            wake()

    def _wake(self, newest: Seqno) -> None:
        for seqno, wake in list(self._waiting.values()) if self._waiting else ():
            if seqno < newest:
                wake()

    @locked
    def lag(self, now_us: int) -> Lag:
        """How far it is behind. Reads the end of the log, and moves nothing. Raises as `refresh`."""
        self._state.refuse_if_gone()
        watch = self._watch
        self.until_still(watch.look)
        commits = watch.written - self._state.seqno
        return Lag(commits, max(0.0, (now_us - watch.written_us) / 1e6)) if commits > 0 else Lag(0, 0.0)

    def feed(self, after: Seqno | None, until: Seqno | None) -> SegmentCursor:
        """The commits beyond `after`, up to `until` or as they are shown. FeedGap if some are no longer kept."""
        state, watch = self._state, self._watch
        shown, newest = lambda: state.seqno, lambda: watch.segment
        return FollowedCursor(self._reader, after, until, shown, self.await_beyond, newest, self.when_beyond)

    def feed_now(self, after: Seqno | None, until: Seqno | None) -> SegmentCursor:
        """The same for what does not wait. ReadOnlyError where commits that are still to come are asked for."""
        if until is None:
            raise not_followed()
        return self.feed(after, until)

    def close(self) -> None:
        """Let go of the log's files."""
        self._watch.close()
        self._now.close()


class FollowedReads(Reads):
    """Reads of a follower: those of now begin again where pages went under them."""

    progress: Progress

    def read(
        self,
        key: bytes,
        *,
        table: int = 0,
        cached_only: bool = False,
        raw: bool = False,
        at_us: int | None = None,
    ) -> Value:
        """As `Reads.read`."""
        found = partial(super().read, key, table=table, cached_only=cached_only, raw=raw, at_us=at_us)
        return self.progress.again(found)

    def count(self, start: bytes | None = None, stop: bytes | None = None, *, table: int = 0) -> int:
        """As `Reads.count`."""
        return self.progress.again(lambda: super(FollowedReads, self).count(start, stop, table=table))

    def key_at(self, rank: int, *, table: int = 0) -> bytes | None:
        """As `Reads.key_at`."""
        return self.progress.again(lambda: super(FollowedReads, self).key_at(rank, table=table))


class _FollowedLog(RefusingLog):
    """Takes no commits. But there will be more, so that one who waits for them is not refused."""

    __slots__ = ()

    def sync(self) -> None:  # type: ignore[override]  # that one never returns
        """Nothing to flush."""


class FollowedEngine(Engine):
    """What a follower reads: an engine without lock, log and thread."""

    _reads_type: ClassVar[type[Reads]] = FollowedReads
    _past_type: ClassVar[type[Past]] = FollowedPast
    #: Whether one may wait for commits.
    _waits: ClassVar[bool] = True

    @classmethod
    def attach(cls, path: str, options: Options, *, pin: bool = True, name: str | None = None) -> FollowedEngine:
        """Begin with the newest moment. See `kvwal.follow` for the arguments, and for what is raised."""
        with failures_at(path):
            directory, _ = open_directory(path, "r", options)
            try:
                pins = PinMaker(options.files, directory, name) if pin else None
                return until_still(directory, lambda: cls._begun(directory, options, pins), lambda: None)
            except BaseException:
                directory.close()
                raise

    @classmethod
    def _begun(cls, directory: Directory, options: Options, pins: PinMaker | None) -> FollowedEngine:
        recovered, progress = cls._recovered(directory, options, pins)
        try:
            return cls(recovered, progress, options)
        except BaseException:
            progress.close()
            recovered.pages.close()
            raise

    def __init__(self, recovered: Recovered, progress: Progress, options: Options) -> None:
        #: How it moves.
        self.progress = progress
        recovered.feed = progress.feed if self._waits else progress.feed_now
        super().__init__(recovered, options)
        progress.begin(self._publisher, self._succession, self._keeping, self.reads.moments)
        past = self.upkeep.past
        assert isinstance(past, FollowedPast)
        past.refresh, past.await_bases, past.until_still = progress.refresh, progress.await_bases, progress.until_still
        past.newest_us = progress.newest_us
        self.reads.moments.now = progress
        assert isinstance(self.reads, FollowedReads)
        self.reads.progress = progress
        if self._waits:
            self.queue.refuse(_FollowedLog(read_only, self.state.seqno))

    @classmethod
    def _recovered(
        cls, directory: Directory, options: Options, pins: PinMaker | None
    ) -> tuple[Recovered, Progress]:
        """The newest moment, and how it moves on from there."""
        return recovered_beside(directory, options, pins)

    def _let_go(self) -> None:
        super()._let_go()
        self.progress.close()

    def _abandon_files(self) -> None:
        super()._abandon_files()
        self.progress.close()

    def _leave_to_parent(self) -> None:
        super()._leave_to_parent()
        self.progress.lock = new_lock()


def recovered_beside(
    directory: Directory, options: Options, pins: PinMaker | None = None
) -> tuple[Recovered, Progress]:
    """The newest moment, as recovery would find it, up to the last commit that is on disk for sure."""
    started_s = options.files.monotonic_s()
    erase(directory, "r", options)
    create_if_missing(directory, "r", options)

    def make_pin(meta: Meta) -> HeldPin | None:
        return None if pins is None else pins.pin(meta.store_id, meta.line, meta.generation, meta.seqno)

    pages = FollowedPages(directory, cache_bytes=options.cache_bytes, make_pin=make_pin)
    watch: Watch | None = None
    try:
        meta = pages.meta
        state = State(pages, cache_bytes=options.cache_bytes)
        reader = LogReader(directory, meta.store_id)
        # Durability: the log was flushed so far before the flip.
        watch = Watch(reader, meta.replay_through)
        watch.look()
        last = watch.durable
        newest_us = fill(state.version.memtable, reader, meta.seqno, last)
        state.horizon = state.seqno = last
        detail, size = f"the log is followed from commit {last} on", state.version.memtable.bytes_used
        # Nothing is cut off or written again.
        read = str(pages.choice), meta.seqno, "followed", detail, last - meta.seqno, size, 0, last, last, 0
        report = RecoveryReport(False, *read, max(0, watch.written - last), options.files.monotonic_s() - started_s)
        events = Events(options.listeners)
        recovered = Recovered(directory, pages, None, reader, state, report, events, expires=True)
        return recovered, Progress(options.files, directory, pages, state, reader, watch, newest_us)
    except BaseException:
        if watch is not None:
            watch.close()
        pages.close()
        raise


def commits_beyond(reader: LogReader, after: Seqno, durable: Callable[[], Seqno]) -> SegmentCursor:
    """The commits beyond `after`, up to the last one that is on disk; asked again later, it goes on."""
    return SegmentCursor(reader, Hold({}, 0, after), None, durable, lambda seqno, timeout_s: False)


def fill(memtable: Memtable, reader: LogReader, after: Seqno, until: Seqno) -> int:
    """Bring the commits beyond `after`, up to `until`, into the memtable; returns the time of the last one, or 0.

    Requires: `until` is on disk.
    """
    newest_us = 0
    for record in commits_beyond(reader, after, lambda: until):
        batch = record.batch()
        memtable.write(record.seqno, batch.writes, record.size, batch.ranges, batch.parts())
        newest_us = record.time_us
    memtable.last_seqno = until
    return newest_us


def until_still(directory: Directory, action: Callable[[], _T], refuse: Callable[[], None]) -> _T:
    """What `action` returns, once it does not fail. Raises what it raises if nothing moved between two failures.

    `refuse` raises what is wrong, where it can tell, after a failure.
    """
    blamed: object = None
    for _ in range(_MOST_LOOKS):
        try:
            return action()
        except SnapshotTooOld as error:
            failure: Exception = error
        except (CorruptionError, FormatError, FileNotFoundError) as error:
            failure = error
            refuse()
            found = signs(directory)
            if found == blamed:
                raise
            blamed = found
    raise failure


def signs(directory: Directory) -> object:
    """What changes with each step of a writer that can make a reader fail."""
    try:
        segments = list_segments(directory)
    except FileNotFoundError:
        return None
    newest = b"" if not segments else _head(directory, segment_name(segments[-1]), HEADER_PAGE_BYTES)
    return segments, newest, _head(directory, DATA, _SLOTS_BYTES), is_marked(directory)


def _head(directory: Directory, name: str, size: int) -> bytes:
    try:
        file = directory.open(name)
    except FileNotFoundError:
        return b""
    try:
        return file.pread(size, 0)
    finally:
        file.close()
