"""Checkpoints and the other work that is due after commits: what moves data from the log to the pages.

A checkpoint, step by step, and why a crash between any two steps loses nothing:

1. Freeze: the memtable is set aside, a new one takes the commits. Nothing on disk changed.
2. Merge: new pages are written where no readable generation has any. Nothing refers to them yet.
3. The log is flushed up to the frozen table's last commit. Otherwise the pages could hold a commit that the log
   lost, and recovery would go on from a seqno that never was.
4. The pages are flushed, then the meta slot of the *older* generation is overwritten, and flushed. A torn slot does
   not verify, and the newer of the two that were there before still does; the log reaches back to it.
5. Settle: readers move to the new tree.
6. Retire: log segments that end before the now *older* generation are unlinked. Only now, since until the flip was
   durable recovery could have needed them.

A failure in 2 with a full disk leaves the frozen table where it is, and the next attempt merges the same one.
Any other failure of the disk poisons the store: which pages reached the disk is unknown.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Final

from kvwal.engine.commit import CommitPipeline
from kvwal.engine.memtable import Memtable
from kvwal.engine.present import Present
from kvwal.errors import DiskFullError, EnvironmentFailure, Error, RefusedError
from kvwal.files import Directory, is_full
from kvwal.files.names import RESERVE
from kvwal.keys import Seqno, disjoint
from kvwal.log import LogWriter
from kvwal.options import RESERVE_BYTES, Options
from kvwal.pages import Columns, Meta, PageFile

__all__ = ["COMPACT_PASSES", "Background", "Checkpointer", "Reserve"]


# The page file is compacted when nothing was committed for so long, more than one page in so many is not in use, and
# it has at least so many.
_IDLE_S: Final = 1.0
_SPARSE: Final = 10
_LEAST_COMPACT_PAGES: Final = 1024
# Generations from moving a page to cutting the file behind it.
COMPACT_PASSES: Final = 3

# How long a checkpoint works before it lets other threads run, and for how long it does: while a commit is under way,
# and otherwise. A thread needs about 100 us to wake up and take the interpreter; who comes back earlier has it again.
_BUSY_WORK_S: Final = 0.0003
_BUSY_PAUSE_S: Final = 0.0002
_IDLE_WORK_S: Final = 0.0005
_IDLE_PAUSE_S: Final = 0.0

# How often the background thread looks while commits come in. Idle, it sleeps until the next one.
_TICK_S: Final = 0.05


def _stay() -> None:
    """Nobody to give way to."""


def _updates(memtable: Memtable, give_way: Callable[[], None]) -> Iterator[Columns]:
    """What a frozen table holds, in order."""
    value_of = memtable.latest.__getitem__
    return ((keys, list(map(value_of, keys))) for keys in memtable.in_order(give_way))


class Reserve:
    """A file that only holds space, given up when the disk is full so that deleting can go on."""

    def __init__(self, directory: Directory, mode: int) -> None:
        self._directory = directory
        self._mode = mode
        self._held = directory.kind(RESERVE) == "file"
        # Guards what is above; the last of all locks.
        self._lock = threading.Lock()

    def hold(self) -> bool:
        """Take the space, if it is not held. False if there is none; other failures are let pass."""
        with self._lock:
            if self._held:
                return True
            try:
                file = self._directory.open(RESERVE, create=True, mode=self._mode)
            except OSError as error:
                return not is_full(error)
            try:
                file.allocate(0, RESERVE_BYTES)
            except OSError as error:
                file.close()
                self._directory.unlink(RESERVE)
                return not is_full(error)
            file.close()
            self._held = True
            return True

    def release(self) -> bool:
        """Give the space back. False if none is held."""
        with self._lock:
            if not self._held:
                return False
            try:
                self._directory.unlink(RESERVE)
            except OSError:
                # A copy-on-write file system may need space even for that: then there is no reserve.
                return False
            self._held = False
            # The space is only free for others once the removal is on disk.
            self._directory.sync()
            return True


class Checkpointer:
    """Runs checkpoints, one at a time."""

    def __init__(
        self,
        present: Present,
        pages: PageFile,
        pipeline: CommitPipeline,
        log: LogWriter,
        reserve: Reserve,
        options: Options,
        *,
        poison: Callable[[BaseException], Error],
    ) -> None:
        self._present = present
        self._pages = pages
        self._pipeline = pipeline
        self._log = log
        self._reserve = reserve
        self._options = options
        self._poison = poison
        #: Held during a checkpoint; taken before anything else (lock order: this, baton, Present.lock).
        self.lock = threading.Lock()
        self.log_bytes_at_last = log.tail_bytes
        self.last_s = options.files.monotonic_s()
        self._gave_way_s = 0.0
        self._reclaimed_seqno = Seqno(0)

    def checkpoint(self) -> Meta | None:
        """Bring everything committed so far into the pages. None if there was nothing new.

        Raises DiskFullError if there is no space (nothing changed, may be tried again); any other failure of the disk
        poisons the store, and is raised as PoisonedError.
        """
        with self.lock:
            try:
                # A frozen table that is still there belongs to an attempt that met a full disk: it goes first, and
                # what was committed since goes with a checkpoint of its own.
                if self._present.levels.frozen is not None:
                    self._checkpoint_or_release()
                return self._checkpoint_or_release()
            finally:
                self._present.relieved()

    def reclaim(self) -> None:
        """Get the space back that deletes have freed: from the next generation but one neither pages nor log need it.

        Does nothing if it was done since the last commit, and stops quietly where the disk is full.
        """
        with self.lock:
            seqno = self._present.seqno
            if seqno == self._reclaimed_seqno:
                return
            self._reclaimed_seqno = seqno
            try:
                for _ in range(3 if self._present.levels.frozen is not None else 2):
                    self._checkpoint_or_release(even_if_empty=True)
            except DiskFullError:
                pass
            finally:
                self._present.relieved()

    def is_sparse(self) -> bool:
        """Whether compacting is worth its while: a good part of a file that is not small is not in use."""
        pages = self._pages.meta.page_count
        unused = self._pages.reclaimable_bytes() // self._pages.meta.page_size
        return pages >= _LEAST_COMPACT_PAGES and unused * _SPARSE > pages

    def compact(self, *, passes: int) -> bool:
        """Move what lies at the end of the page file into free pages before it, and cut the file. True if it shrank.

        What moved is free, and the file can be cut, two generations later: `passes` counts generations.
        """
        with self.lock:
            try:
                # What was committed goes first: it lets the file grow, which says nothing of what compacting does.
                if self._present.levels.frozen is not None:
                    self._checkpoint(even_if_empty=False)
                self._checkpoint(even_if_empty=False)
                before = self._pages.meta.page_count
                for _ in range(passes):
                    self._checkpoint(even_if_empty=True, compact=True)
            finally:
                self._present.relieved()
            return self._pages.meta.page_count < before

    def _checkpoint_or_release(self, *, even_if_empty: bool = False) -> Meta | None:
        try:
            return self._checkpoint(even_if_empty)
        except DiskFullError:
            if not self._reserve.release():
                raise
            # Commits are to see to it that the reserve is held again before they put anything.
            self._present.attention = True
            return self._checkpoint(even_if_empty)

    def _checkpoint(self, even_if_empty: bool, *, compact: bool = False) -> Meta | None:
        present = self._present
        memtable = present.levels.frozen
        # Not `or`: a table of nothing but deleted ranges has no keys, and is false.
        if memtable is None:
            memtable = present.freeze()
        if memtable is None:
            if not even_if_empty:
                return None
            memtable = Memtable(self._pages.meta.seqno)
        log_bytes = self._log.tail_bytes
        give_way = self._give_way if self._options.background else _stay
        files = self._options.files
        try:
            meta = self._pages.checkpoint(
                _updates(memtable, give_way),
                disjoint(memtable.masks_at(memtable.last_seqno)),
                seqno=memtable.last_seqno,
                time_us=files.now_us(),
                before_flip=lambda: self._flush_log(memtable.last_seqno),
                yield_to_writers=give_way,
                compact=compact,
            )
        except DiskFullError:
            raise
        except (OSError, EnvironmentFailure) as error:
            if isinstance(error, RefusedError) and not self._pages.poisoned:
                raise  # Nothing was changed.
            raise self._poison(error) from error
        present.settle(self._pages.tree(meta))
        self.log_bytes_at_last = log_bytes
        self.last_s = files.monotonic_s()
        self._retire()
        self._reserve.hold()
        return meta

    def _give_way(self) -> None:
        # Giving way costs 60 us or more even when nobody waits, so not after every leaf.
        files = self._options.files
        worked_s = files.monotonic_s() - self._gave_way_s
        if worked_s < _BUSY_WORK_S:
            return
        if self._pipeline.is_busy():
            files.give_way(_BUSY_PAUSE_S)
        elif worked_s >= _IDLE_WORK_S:
            files.give_way(_IDLE_PAUSE_S)
        else:
            return
        self._gave_way_s = files.monotonic_s()

    def _flush_log(self, seqno: Seqno) -> None:
        # Durability: a commit must be in the log, for good, before the pages may say that they have it.
        if self._log.durable_seqno < seqno:
            self._pipeline.sync()

    def _retire(self) -> None:
        older = self._pages.older
        if older is None:
            return
        options = self._options
        keep_after_us = 0
        if options.retain_log_s:
            now_us = options.files.now_us()
            keep_after_us = max(1, now_us - int(min(options.retain_log_s * 1e6, now_us)))
        below = Seqno(older.seqno + 1)
        self._pipeline.run(
            lambda: self._log.retire(below, keep_bytes=options.retain_log_bytes, keep_after_us=keep_after_us)
        )

    def is_due(self) -> bool:
        """Whether a checkpoint should start: by memory, by log bytes or by age."""
        memtable = self._present.levels.memtable
        if memtable.is_empty() and self._present.levels.frozen is None:
            self.last_s = self._options.files.monotonic_s()
            return False
        return (
            self._present.levels.frozen is not None
            or memtable.bytes_used >= self._options.memtable_bytes
            or self._log.tail_bytes - self.log_bytes_at_last >= self._options.checkpoint_log_bytes
            or self._options.files.monotonic_s() - self.last_s >= self._options.checkpoint_interval_s
        )


class Background:
    """The store's one thread: checkpoints, bounded flush delay, idle watermarks, the next segment.

    While commits come in it looks every 50 ms; when none came since it last looked it dozes, and the next commit
    wakes it (the log rings). It holds no reference to the `Store`, so a forgotten store can be
    collected, and it is a daemon, so it keeps no process alive.
    """

    def __init__(
        self, checkpointer: Checkpointer, present: Present, pipeline: CommitPipeline, log: LogWriter, options: Options
    ) -> None:
        self._checkpointer = checkpointer
        self._present = present
        self._pipeline = pipeline
        self._log = log
        self._options = options
        self._tick_s = min(_TICK_S, max(options.sync_delay_s / 2, 0.001))
        self._stopping = False
        # Whether compacting may help: until it did not, and then again after a checkpoint.
        self._may_compact = True
        self._then: Callable[[], None] | None = None
        # Not an Event: that is Python code over a lock, which a signal handler that raises in the thread that wakes us
        # can leave held for ever, and which a finalizer may find held by its own thread. Putting is one C call.
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._seen_seqno = log.last_seqno
        self._synced_s = options.files.monotonic_s()
        #: The last failure of this thread's work; a commit or `Store.checkpoint` meets it again and raises it.
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvwal-background", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """There is work."""
        self._bell.put(None)

    def stop(self, *, wait: bool = True, then: Callable[[], None] | None = None) -> None:
        """Let the thread end; a checkpoint under way is finished first. `then` is called after it."""
        self._then = then
        self._stopping = True
        if not self._thread.is_alive():
            if then is not None:
                then()
            return
        self._bell.put(None)
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._work_until_stopped()
        except BaseException as error:
            # Our own bug. Those who wait for this thread must not do so for ever.
            self.failure = error
            raise
        finally:
            if self._then is not None:
                self._then()

    def _work_until_stopped(self) -> None:
        while not self._stopping:
            try:
                quiet = self._work()
            except (OSError, Error) as error:
                # Not lost: the store is poisoned, damaged or its disk is full, and whoever must wait for this
                # work, or asks for a checkpoint, is told so.
                self.failure = error
                quiet = True
            if quiet:
                self._doze()
            else:
                self._rung(self._tick_s)

    def _rung(self, timeout_s: float | None) -> bool:
        """Wait for the bell, however often it was rung; False if it was not."""
        try:
            self._bell.get(timeout=timeout_s)
        except Empty:
            return False
        while not self._bell.empty():
            self._bell.get_nowait()
        return True

    def _doze(self) -> None:
        # As a commit of its own, so between two others: each was either appended before, and is seen below, or is
        # appended after, and rings. (What a commit looks at before it has the baton may be long ago when it appends.)
        try:
            self._pipeline.run(lambda: self._log.ring_at_next_append(self.wake))
        except (OSError, Error) as error:
            # Poisoned: nothing will be appended any more.
            self.failure = error
        if self._stopping:
            return
        if self._log.last_seqno != self._seen_seqno or (self._checkpointer.is_due() and self.failure is None):
            self._rung(self._tick_s)
            return
        waiting = not self._present.levels.memtable.is_empty()
        # No longer than can be waited for: "never" may well be written as infinity.
        timeout_s = min(self._options.checkpoint_interval_s, threading.TIMEOUT_MAX) if waiting else None
        if self._may_compact and self._checkpointer.is_sparse():
            timeout_s = min(_IDLE_S, timeout_s or _IDLE_S)
        if not self._rung(timeout_s):
            self._compact_if_idle()

    def _compact_if_idle(self) -> None:
        """Nobody has committed anything while we dozed: give unused space back to the system."""
        if not self._may_compact or self._log.last_seqno != self._seen_seqno or not self._checkpointer.is_sparse():
            return
        try:
            # As long as it helps; the next checkpoint of new commits makes it worth trying again.
            self._may_compact = self._checkpointer.compact(passes=COMPACT_PASSES)
        except (OSError, Error) as error:
            self._may_compact = False
            self.failure = None if isinstance(error, DiskFullError) else error

    def _work(self) -> bool:
        """Do what is due. True if nothing was committed since the last time."""
        last = self._log.last_seqno
        quiet = last == self._seen_seqno
        self._seen_seqno = last
        if self._log.durable_seqno < last and self._options.durability != "os":
            now = self._options.files.monotonic_s()
            if quiet or now - self._synced_s >= self._options.sync_delay_s - self._tick_s:
                self._pipeline.sync()
                self._synced_s = now
        if quiet and self._log.durable_seqno == last:
            # The log fell idle: say on disk that all of it is durable, so that damage to the last commits can be told
            # from a torn tail.
            self._pipeline.run(self._log.mark_idle)
        if self._checkpointer.is_due():
            self._checkpointer.checkpoint()
            self.failure = None
            self._may_compact = True
        self._log.prepare_next()
        return quiet
