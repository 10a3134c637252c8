"""Checkpoints: what moves data from the log to the pages.

A checkpoint, step by step, and why a crash between any two steps loses nothing:

1. Freeze: the memtable is set aside, a new one takes the commits. Nothing on disk changed.
2. Merge: new pages are written where no readable generation has any. Nothing refers to them yet.
3. The log is flushed up to the frozen table's last commit. Otherwise the pages could hold a commit that the log
   lost, and recovery would go on from a seqno that never was.
4. The pages are flushed, then the meta slot of the *older* generation is overwritten, and flushed. A torn slot does
   not verify, and the newer of the two that were there before still does; the log reaches back to it.
5. Install: readers move to the new tree.
6. Retire: log segments that end before the now *older* generation are unlinked. Only now, since until the flip was
   durable recovery could have needed them.

A failure in 2 with a full disk leaves the frozen table where it is, and the next attempt merges the same one, or, where
that does not fit, it and what was committed since, which may have deleted most of it.
Any other failure of the disk poisons the store: which pages reached the disk is unknown.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final, Literal, TypeVar

from kvwal.engine.commit import CommitQueue
from kvwal.engine.followers import Followers
from kvwal.engine.keeping import Keeping
from kvwal.engine.memtable import Memtable, deletes_something
from kvwal.engine.pressure import WritePressure
from kvwal.engine.state import State
from kvwal.engine.succession import Succession
from kvwal.errors import CorruptionError, DiskFullError, EnvironmentFailure, Error, FormatError, RefusedError
from kvwal.events import Checkpoint, Events
from kvwal.keys import Seqno
from kvwal.locks import if_free, locked, new_lock
from kvwal.log import SegmentLog, replay_count
from kvwal.options import RESERVE_BYTES, Options
from kvwal.pages import Changes, Columns, Meta, PageFile
from kvwal.sorting import sorted_in_steps

__all__ = ["COMPACT_PASSES", "REST_S", "Checkpointer", "merge_into"]

_T = TypeVar("_T")

# The page file is worth compacting when more than 1/10 of its pages are unused, and it has 256 pages (1 MiB).
_SPARSE: Final = 10
_LEAST_COMPACT_PAGES: Final = 256
#: Generations from moving a page to cutting the file behind it.
COMPACT_PASSES: Final = 3
#: A generation that only compacting while idle, or a clean close, asks for comes at least so long after the one before:
#: a reader in another process loses the pages of its own two generations later.
REST_S: Final = 1.0
# A checkpoint starts when a replay would read this many segments: opening each costs a few system calls.
_MOST_SEGMENTS: Final = 64

# A clean close leaves at most this much log to replay; more is checkpointed first, so that opening stays quick.
_CLOSE_REPLAY_BYTES: Final = 256 << 10
# The same within a second of the last checkpoint: readers in other processes are to have theirs for longer.
_CLOSE_REPLAY_BYTES_AT_ONCE: Final = 2 << 20

# What a checkpoint that no memory asks for has to find free, in what the memtable takes.
_SPACE_TIMES: Final = 2

# An open makes the first base itself where it replayed at most so much, in memory: that takes a few milliseconds.
_BEGIN_BYTES: Final = 1 << 20

# How long a checkpoint works before it lets other threads run, and for how long it does: while a commit is under way,
# and otherwise. A thread needs about 100 us to wake up and take the interpreter; who comes back earlier has it again.
_BUSY_WORK_S: Final = 0.0003
_BUSY_PAUSE_S: Final = 0.0002
_IDLE_WORK_S: Final = 0.0005
_IDLE_PAUSE_S: Final = 0.0


def _go_on() -> None:
    """There is no background thread, hence no other thread to let run, and nothing that it does meanwhile."""


def _updates(memtable: Memtable, yield_to_writers: Callable[[], None]) -> Iterator[Columns]:
    """What a frozen table holds, in order."""
    if not memtable.ranges:
        value_of: Callable[[bytes], Any] = memtable.latest.__getitem__
    else:
        # Its own keys are never MISSING.
        value_of = memtable.get
    for keys in sorted_in_steps(memtable.latest):
        yield_to_writers()
        if keys:
            yield keys, list(map(value_of, keys))


def merge_into(pages: PageFile, memtable: Memtable, yield_to_writers: Callable[[], None], **more: Any) -> Meta:
    """Make the next generation, with all that a memtable holds. `more`: as for `PageFile.checkpoint`."""
    return pages.checkpoint(
        _updates(memtable, yield_to_writers),
        memtable.ranges.newest.ranges(),
        tables={
            table: Changes(_updates(part, yield_to_writers), part.ranges.newest.ranges(), part.has_expiring)
            for table, part in memtable.parts.written()
        },
        seqno=memtable.last_seqno,
        yield_to_writers=yield_to_writers,
        expiring=memtable.has_expiring,
        **more,
    )


class Checkpointer:
    """Runs checkpoints, one at a time."""

    def __init__(
        self,
        state: State,
        succession: Succession,
        pages: PageFile,
        queue: CommitQueue,
        log: SegmentLog,
        pressure: WritePressure,
        keeping: Keeping,
        followers: Followers,
        options: Options,
        events: Events,
        beside_log: Callable[[], object] = _go_on,
    ) -> None:
        """`beside_log`: what a commit does that looks after the log, where space is plenty. It must not raise."""
        self._state = state
        self._succession = succession
        self._pages = pages
        self._queue = queue
        self._log = log
        self._pressure = pressure
        self._keeping = keeping
        self._followers = followers
        self._options = options
        self._events = events
        #: Held during a checkpoint. Lock order: docs/architecture.md.
        self.lock = new_lock()
        self._log_bytes_at_last = log.tail_bytes
        self._last_s = options.files.monotonic_s()
        self._yielded_s = 0.0
        #: Called where a checkpoint lets other threads run, by the thread that makes it.
        self.meanwhile: Callable[[], object] = _go_on
        self._beside_log = beside_log
        self._reclaimed_seqno = Seqno(0)

    def checkpoint_if_due(self, only: Literal["log", "window"] | None = None) -> bool:
        """As `checkpoint`, if one is due. False, at once, if one is under way: it may be the one that was due.

        `only`: "log": if the log is long, or the last one was long ago, and there is plenty of space: what is done
        about a full disk comes first.
        "window": if past moments are to be kept and there is no base. Where much was replayed, or none can be made,
        that is left to the checkpoint that is due then.
        """

        def seen_to() -> bool:
            if only == "log":
                self._shorten_log()
                if self._keeping.has_space(RESERVE_BYTES):
                    self._beside_log()
            elif only == "window":
                self._begin_window()
            elif self.is_due():
                self._checkpoint()
            return True

        return bool(if_free(self.lock, seen_to))

    def _shorten_log(self) -> None:
        version = self._state.version
        frozen = version.frozen
        size = version.memtable.bytes_used + (0 if frozen is None else frozen.bytes_used)
        # Keys that lie far apart take a page each, and the inner pages of it.
        is_due = self._is_log_long() or self._is_late()
        if size and is_due and self._keeping.has_space(_SPACE_TIMES * size + RESERVE_BYTES):
            try:
                # One that was left by a failure, or an interruption, goes first.
                for _ in range(1 if frozen is None else 2):
                    self._run()
            except DiskFullError:
                pass
            except (CorruptionError, FormatError, RefusedError) as error:
                # The commit does not need it, and goes on.
                logging.getLogger("kvwal").warning("a checkpoint that the log asks for cannot be made: %s", error)

    def _begin_window(self) -> None:
        if self._keeping.lacks_base() and self._state.version.memtable.bytes_used <= _BEGIN_BYTES:
            # An open does not fail for it. What poisons is told by the next commit.
            with suppress(Error):
                self._run(even_if_empty=True)

    def _is_log_long(self) -> bool:
        return (
            self._log.tail_bytes - self._log_bytes_at_last >= self._options.checkpoint_log_bytes
            or replay_count(self._log.segments(), self._pages.meta.seqno) >= _MOST_SEGMENTS
        )

    @locked
    def checkpoint(self) -> None:
        """Bring everything committed so far into the pages.

        Raises DiskFullError if there is no space (nothing changed, may be tried again); any other failure of the disk
        poisons the store, and is raised as PoisonedError.
        """
        self._checkpoint()

    def _checkpoint(self) -> None:
        try:
            # A frozen table that is still there belongs to an attempt that met a full disk: it goes first. What was
            # committed since goes with a checkpoint of its own, or with it (`_combine`).
            if self._state.version.frozen is not None:
                self._run_with_reserve()
            self._run_with_reserve()
        finally:
            self._pressure.checkpoint_ended()

    @locked
    def reclaim(self) -> bool:
        """Get the space back that deletes have freed: from the next generation but one neither pages nor log need it.

        If it was done since the last commit, that did not help: then what readers of former moments hold goes as well,
        and where they hold nothing it does nothing (False). It stops quietly where the disk is full.
        """
        seqno = self._state.seqno
        in_vain = seqno == self._reclaimed_seqno
        if in_vain and not self._followers.give_up() and not self._give_up_readers():
            return False
        self._reclaimed_seqno = seqno
        try:
            for _ in range(3 if self._state.version.frozen is not None else 2):
                self._run_with_reserve(even_if_empty=True, compact=in_vain)
        except DiskFullError:
            pass
        finally:
            self._pressure.checkpoint_ended()
        return True

    @locked
    def free_space(self) -> bool:
        """Free what the consumer that is furthest behind holds, which is lost then; or else what the window's beginning
        holds; or else what followers hold; or what an archive does, which has a gap then. False if there is none of
        them.
        """
        # What was read, and is read no more, holds nothing.
        self._succession.release_pages()
        older = self._pages.older
        if older is not None and self._log.retention.drop_laziest(Seqno(older.seqno + 1), self._log.segments()):
            self._retire()
            return True
        return self._shorten_window() or self._give_up_followers() or self._give_up_archive()

    def _give_up_followers(self) -> bool:
        if not self._followers.give_up():
            return False
        self._retire()
        return True

    def _give_up_archive(self) -> bool:
        older = self._pages.older
        if older is None or not self._log.retention.drop_laziest(
            Seqno(older.seqno + 1), self._log.segments(), archives=True
        ):
            return False
        self._retire()
        return True

    def _shorten_window(self) -> bool:
        """Give up bases until a segment is retired, or there is none. False if there was none."""
        shortened = False
        while self._keeping.shorten():
            shortened = True
            if self._retire():
                break
        return shortened

    def is_sparse(self) -> bool:
        """Whether compacting is worth its while."""
        meta = self._pages.meta
        if self._followers.must_append:
            return False
        unused = self._pages.space.reclaimable_bytes(meta) // meta.page_size
        return meta.page_count >= _LEAST_COMPACT_PAGES and unused * _SPARSE > meta.page_count

    def _has_rested(self) -> bool:
        """Whether the newest generation is old enough for one that no data asks for. Whichever process made it."""
        return not 0 <= self._options.files.now_us() - self._pages.meta.wall_us < REST_S * 1e6

    @locked
    def compact(self, *, passes: int) -> bool:
        """Move what lies at the end of the page file into free pages before it, and cut the file. True if it shrank.

        What moved is free, and the file can be cut, two generations later: `passes` counts generations.
        """
        compacting = self._compacting(passes)
        while (shrank := self._compact_once(compacting)) is None:
            pass
        return shrank

    def compacting(self, *, passes: int) -> Iterator[bool | None]:
        """The same by one generation at a time: whether the file shrank, once it is over, and None until then.

        It makes none where a checkpoint is under way, or the newest generation has not rested.
        """
        compacting = self._compacting(passes)
        while True:
            yield if_free(self.lock, lambda: self._compact_once(compacting)) if self._has_rested() else None

    def _compact_once(self, compacting: Iterator[bool | None]) -> bool | None:
        try:
            return next(compacting)
        finally:
            self._pressure.checkpoint_ended()

    def _compacting(self, passes: int) -> Iterator[bool | None]:
        # What was committed goes first: it lets the file grow, which says nothing of what compacting does.
        if self._state.version.frozen is not None:
            self._run()
            yield None
        if self._state.version.memtable:
            self._run()
            yield None
        before, bases = self._pages.meta.page_count, len(self._pages.bases.all())
        for _ in range(passes):
            self._run(even_if_empty=True, compact=True)
            yield None
            if self._followers.must_append:
                # Nothing can be moved.
                yield False
        if len(self._pages.bases.all()) < bases:
            # What only they reached became free while this was under way.
            for _ in range(passes):
                self._run(even_if_empty=True, compact=True)
                yield None
        yield self._pages.meta.page_count < before

    @locked
    def while_idle(self, action: Callable[[], _T]) -> _T:
        """Run something while no checkpoint can be under way."""
        return action()

    def is_due(self) -> bool:
        """Whether a checkpoint should start: by memory, by log bytes or by age."""
        options, version = self._options, self._state.version
        if not version.memtable and version.frozen is None:
            self._last_s = options.files.monotonic_s()
            return False
        return (
            version.frozen is not None
            or version.memtable.bytes_used >= options.memtable_bytes
            or self._is_log_long()
            or self._is_late()
            or self._keeping.lacks_base()
        )

    def _is_late(self) -> bool:
        return self._options.files.monotonic_s() - self._last_s >= self._options.checkpoint_interval_s

    def is_due_at_close(self, replayed_bytes: int) -> bool:
        """Whether the next open would have much to replay. `replayed_bytes`: what this one had."""
        tail_bytes = self._log.tail_bytes - self._log_bytes_at_last + replayed_bytes
        return tail_bytes > (_CLOSE_REPLAY_BYTES if self._has_rested() else _CLOSE_REPLAY_BYTES_AT_ONCE)

    def _run_with_reserve(self, *, even_if_empty: bool = False, compact: bool = False) -> None:
        failure: DiskFullError | None = None
        # Nothing, and then what may help: the reserve, what was deleted since the freeze, what past moments hold, and
        # followers, and readers.
        remedies: list[Callable[[], bool]] = [lambda: True, self._pressure.take_reserve_for_checkpoint]
        for remedy in [*remedies, self._combine, self._shorten_window, self._followers.give_up, self._give_up_readers]:
            if remedy():
                try:
                    self._run(even_if_empty=even_if_empty, compact=compact)
                    return
                except DiskFullError as error:
                    failure = error
        assert failure is not None
        raise failure

    def _give_up_readers(self) -> bool:
        return self._succession.bound_readers(0)

    def _combine(self) -> bool:
        """Take what was committed since into the frozen table, if that makes it smaller. False if it does not."""
        version = self._state.version
        if version.frozen is None or not deletes_something(version.memtable):
            return False
        self._queue.run(self._succession.combine)
        return self._state.version is not version

    def _run(self, *, even_if_empty: bool = False, compact: bool = False) -> None:
        """One checkpoint: the steps at the top of this file. ClosedError where a close came before it."""
        self._state.refuse_if_gone()
        succession, files = self._succession, self._options.files
        began_s = files.monotonic_s()
        memtable = self._state.version.frozen
        if memtable is None:
            memtable = succession.freeze()
        if memtable is None:
            if not even_if_empty:
                return
            memtable = Memtable(self._pages.meta.seqno)
            time_us = self._pages.meta.time_us
        else:
            time_us = self._time_of(memtable.last_seqno)
        log_bytes = self._log.tail_bytes
        yield_to_writers = self._yield_to_writers if self._options.background else _go_on
        last_seqno = memtable.last_seqno
        succession.release_pages()
        # Before anything is written: what is not pinned now may be written over from here on.
        self._followers.look()
        try:
            keep, drop = self._keeping.plan(last_seqno)
            meta = merge_into(
                self._pages,
                memtable,
                yield_to_writers,
                time_us=time_us,
                wall_us=files.now_us(),
                session=self._log.session,
                required=self._log.required,
                before_flip=lambda: self._flush_log(last_seqno),
                compact=compact,
                append=self._followers.must_append,
                keep=keep,
                drop=drop,
            )
        except DiskFullError:
            raise
        except (OSError, EnvironmentFailure) as error:
            if isinstance(error, RefusedError) and not self._pages.poisoned:
                raise  # Nothing was changed.
            raise self._queue.poison(error) from error
        succession.install(self._pages.tree(meta))
        self._keeping.refresh()
        succession.bound_readers(self._options.max_snapshot_bytes)
        self._log_bytes_at_last = log_bytes
        self._last_s = files.monotonic_s()
        if self._events.listeners:
            self._events.tell(Checkpoint(meta.generation, last_seqno, len(memtable), self._last_s - began_s))
        self._retire()
        self._pressure.hold_reserve()

    def _yield_to_writers(self) -> None:
        # Letting other threads run costs 60 us or more even when none waits, so not after every leaf.
        files = self._options.files
        worked_s = files.monotonic_s() - self._yielded_s
        if worked_s < _BUSY_WORK_S:
            return
        if self._queue.is_busy():
            files.give_way(_BUSY_PAUSE_S)
        elif worked_s >= _IDLE_WORK_S:
            files.give_way(_IDLE_PAUSE_S)
        else:
            return
        self.meanwhile()
        self._yielded_s = files.monotonic_s()

    def _time_of(self, seqno: Seqno) -> int:
        """When a commit was made that is not in the pages yet. The log's own last time may be that of a later one, or
        that at which its segment began.
        """
        try:
            return self._log.time_of(seqno)
        except (CorruptionError, FormatError, OSError):
            # Who reads the log is told of that. Nothing is lost by a later time but moments before it.
            return self._log.last_time_us

    def _flush_log(self, seqno: Seqno) -> None:
        # Durability: a commit must be in the log, for good, before the pages may say that they have it.
        if self._log.durable_seqno < seqno:
            self._queue.sync()

    def _retire(self) -> bool:
        """Remove log that nothing needs. Whether some was removed."""
        older = self._pages.older
        return older is not None and bool(self._log.retire(Seqno(older.seqno + 1)))
