"""One open store without a user surface: what is put together when a store is opened, and taken apart when it ends.

`Store`, `AsyncStore`, snapshots and transactions see only this. One put, followed: `Store.put` checks,
`CommitQueue.put` takes the lead, the log numbers, writes and flushes, `Publisher.publish_put` makes it visible; later
the background thread brings it into the pages. One get: the row cache, one dict hit; else `Reads.read`: memtable,
frozen memtable, tree.

Invariant: nothing here refers to a `Store`, so that one that is forgotten is collected, and lets go of its files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from kvwal.engine.background import Background
from kvwal.engine.checkpoint import Checkpointer
from kvwal.engine.commit import CommitQueue
from kvwal.engine.consumers import Consumers
from kvwal.engine.ending import is_of_the_system
from kvwal.engine.expirer import Expirer
from kvwal.engine.expiry import ExpiryClock
from kvwal.engine.followers import Followers
from kvwal.engine.gaps import TableGaps
from kvwal.engine.indexing import Indexes
from kvwal.engine.keeping import Keeping
from kvwal.engine.past import Past
from kvwal.engine.pressure import Reserve, WritePressure
from kvwal.engine.publish import Publisher
from kvwal.engine.readers import Moments
from kvwal.engine.reads import Reads
from kvwal.engine.recovery import Recovered, RecoveryReport, open_store
from kvwal.engine.request import CommitRequest
from kvwal.engine.state import State
from kvwal.engine.succession import Succession
from kvwal.engine.tables import Tables
from kvwal.engine.telling import Telling
from kvwal.engine.upkeep import Upkeep
from kvwal.errors import (
    DiskFullError,
    Error,
    LockedError,
    PoisonedError,
    RefusedError,
    StoreRemovedError,
    closed,
    forked,
    read_only,
)
from kvwal.events import Events, Recovery
from kvwal.files import start_thread
from kvwal.keys import Seqno
from kvwal.locks import is_nested, new_lock, refuse_reentry, release
from kvwal.log import RefusingLog, SegmentLog, StoreClock
from kvwal.options import Durability, Flag, Options
from kvwal.readers.listing import PinListing
from kvwal.readers.now import NowPage

__all__ = ["Engine", "wait_for_abandoned"]


# Background threads of stores that were dropped without being closed.
_abandoned: list[Background] = []
# A checkpoint that is under way is finished first.
_ABANDONED_WAIT_S = 10.0
# Stores that were closed from within another call: each waits for that call if it is one of its own.
_closing: list[threading.Thread] = []
# Short, as the call may be one that this thread must return to.
_CLOSING_WAIT_S = 1.0


def wait_for_abandoned() -> bool:
    """Wait until no dropped or closing store of this process works any more. False if there is none."""
    waited = False
    while _abandoned:
        background = _abandoned.pop()
        waited = background.join(_ABANDONED_WAIT_S) or waited
    while _closing:
        thread = _closing.pop()
        # A listener of the store that it closes may open one.
        if thread is not threading.current_thread():
            thread.join(_CLOSING_WAIT_S)
            waited = True
    return waited


class Engine:
    """The parts of one open store, and how they end. Thread-safe."""

    #: What reads are made by.
    _reads_type: ClassVar[type[Reads]] = Reads
    #: And of past moments.
    _past_type: ClassVar[type[Past]] = Past

    @classmethod
    def open(
        cls, path: str, flag: Flag, options: Options, describe: Callable[[Engine], dict[str, Any]] | None = None
    ) -> Engine:
        """Lock, make or recover the store at `path`. See `kvwal.open` for what is raised.

        `describe`: makes the figures that other processes may ask for.
        """
        try:
            recovered = open_store(path, flag, options)
        except LockedError:
            # A store that was dropped without being closed holds its lock until its background thread is done, and one
            # that was closed from within a call until its closing thread is.
            if not wait_for_abandoned():
                raise
            recovered = open_store(path, flag, options)
        try:
            engine = cls(recovered, options)
            if describe is not None and engine._telling is not None:
                engine._telling.describe = partial(describe, engine)
            return engine
        except BaseException:
            recovered.abandon()
            raise

    def __init__(self, recovered: Recovered, options: Options) -> None:
        self._directory = recovered.directory
        self._options = options
        self._pages = recovered.pages
        self._log = recovered.log
        self.state: State = recovered.state
        files = options.files
        # Without a log nothing is stamped.
        time = StoreClock(files.now_us, files.monotonic_s) if recovered.log is None else recovered.log.clock
        clock = ExpiryClock(time.now_us)
        clock.in_use = recovered.expires
        gaps, moments = TableGaps(), Moments(self.state, files.now_us, clock)
        self.reads: Reads = self._reads_type(self.state, moments, gaps)
        #: Whom this store tells of what it does.
        self.events: Events = recovered.events
        # Whether a commit without a durability of its own is flushed before it returns.
        self._syncs = options.wants_sync()
        #: Guards the end. Owned while the store is being closed, or abandoned.
        self.lock = new_lock()
        self.is_closed = False
        # A close has begun; all is let go of. A close may be left between the two, and then another thread ends it.
        self._is_ending = self._is_over = False
        self._closer: threading.Thread | None = None
        # Whether a call was told before the close that the disk had failed; None: that has not begun.
        self._was_told: bool | None = None
        # What that thread met, until a close tells it.
        self._untold: Exception | None = None
        reserve = Reserve(self._directory, options.mode)
        self.pressure = WritePressure(self.state, reserve, self.events, options)
        log = self._log
        # Before a checkpoint may retire anything.
        self._keeping = Keeping(self._pages, log, recovered.hold, recovered.directory.free_bytes, options)
        # Their pins are looked for by the first checkpoint, before it frees anything.
        listing = PinListing(self._directory)
        self._followers = Followers(listing, self._pages, self._keeping, options)
        self._succession = Succession(self.state, gaps, self._pages, self.pressure, self._keeping)
        self._checkpointer: Checkpointer | None = None
        self._background: Background | None = None
        self._telling: Telling | None = None
        #: Those that have a name.
        self.tables = Tables(self.state, self.reads)
        self._publisher = Publisher(self.state, moments, gaps, self.pressure)
        self.queue = CommitQueue(
            RefusingLog(read_only, self.state.seqno) if log is None else log,
            self.state,
            self.reads,
            self._publisher,
            moments.history,
            self.pressure,
            self.events,
            now_s=options.files.monotonic_s,
        )
        self.tables.indexes = Indexes(self.state, self.reads, self.tables, self.queue, self.pressure)
        # This as well.
        consumers = Consumers(recovered, self.reads)
        if self.events.listeners:
            self._tell_recovery(recovered.report)
        #: Removes what has expired.
        self.expirer = Expirer(self.reads, self.queue, sync=self._syncs)
        if log is not None:
            self._begin(log, reserve)
        #: What may be asked for beside reads and commits.
        jobs = self._checkpointer, self._background
        past = self._past_type(recovered, moments, self._succession, self._keeping, self._followers)
        parts = recovered, moments.readers, self.queue, consumers, past
        self.upkeep = Upkeep(*parts, *jobs, self.tables, options.files, self.expirer, self.pressure.archives)

    def _tell_recovery(self, report: RecoveryReport) -> None:
        generation = self._pages.meta.generation
        self.events.tell(
            Recovery(generation, report.checkpoint_seqno, report.last_seqno, report.commits, report.seconds)
        )

    def _begin(self, log: SegmentLog, reserve: Reserve) -> None:
        state, options = self.state, self._options
        self.tables.indexes.load()
        if not reserve.hold():
            self.pressure.is_on = True
        checkpointer = Checkpointer(
            state,
            self._succession,
            self._pages,
            self.queue,
            log,
            self.pressure,
            self._keeping,
            self._followers,
            options,
            self.events,
            partial(self.expirer.remove_beside, options.files.monotonic_s),
        )
        self._checkpointer = checkpointer
        if self.pressure.is_full():
            try:
                checkpointer.checkpoint()
            except DiskFullError:
                pass  # It can wait: reading, and deleting what takes the space, comes first.
        if options.background:
            checkpointer.checkpoint_if_due("window")
            indexes = self.tables.indexes
            meta, session = self._pages.meta, log.session
            page = NowPage(options.files, self._directory, meta.store_id, meta.line, session, options.mode)
            self._telling = telling = Telling(
                self._directory, page, log, self._pages, checkpointer, self._followers, options
            )
            self._background = Background(
                checkpointer, state, self.queue, log, indexes, self.expirer, telling, options
            )
            indexes.wake = self._background.wake
            self._background.start()
        else:
            # Commits make the checkpoints that the log asks for, and remove what has expired.
            log.retention.when_sealed = partial(setattr, self.pressure, "is_on", True)
        self.pressure.relief = _Relief(checkpointer, self._background, self.queue)

    # -- commits --------------------------------------------------------------------------------

    def wants_sync(self, durability: Durability | None) -> bool:
        """Whether a commit at this durability is flushed before it returns; None: at the store's own."""
        return self._syncs if durability is None else self._options.wants_sync(durability)

    def commit(self, request: CommitRequest) -> Seqno:
        """Commit, and return the seqno; that of the last visible commit if nothing is written."""
        if self.pressure.is_on:
            self.pressure.relieve(deleting=request.writes.only_deletes)
        while True:
            try:
                return self.queue.commit(request) or self.state.seqno
            except DiskFullError:
                if not self.pressure.free_space():
                    raise
                request.renew()

    # -- ending ---------------------------------------------------------------------------------

    def close(self, *, wait_s: float = 0.0) -> bool:
        """Flush, checkpoint if the log's tail is long, and let go of everything. Idempotent.

        Returns whether everything is let go of. Where another thread is closing it already, it waits for that for
        `wait_s` seconds, and then it may not be.

        Called from within another call of this thread (by a signal handler, or a finalizer), it refuses new calls and
        returns; another thread closes the store when that call is over. So it does where this is interrupted. What that
        thread meets is raised by the next close.
        """
        if self._directory.inherited and not self.is_closed:
            # A fork that the interpreter did not see: the threads of the parent, and their locks, are not here.
            self.abandon(in_child=True)
        if self._is_over:
            untold = self._untold
            # Who waits for the close of another is not the one to tell.
            if untold is not None and not wait_s:
                self._untold = None
                raise untold
            return True
        if self.lock._is_owned():
            return False
        if self.is_closed and self._is_being_closed(wait_s):
            return self._is_over
        if is_nested():
            # The interrupted call may own any lock, so another thread waits for it to end.
            self._close_elsewhere()
            return False
        self._close()
        return True

    def _is_being_closed(self, wait_s: float) -> bool:
        """Whether another thread is closing it. Waits for that for so long."""
        closer = self._closer
        if closer is not None and closer.is_alive():
            closer.join(wait_s)
            return True
        try:
            # The thread that closes it owns the lock until then.
            return not self.lock.acquire(timeout=wait_s)
        finally:
            release(self.lock)

    def _close_elsewhere(self) -> None:
        self.state.refuse(closed)
        self.pressure.is_on = True
        self._closer = thread = threading.Thread(target=self._close, name="kvwal-close")
        start_thread(thread)
        _closing[:] = [each for each in _closing if each.is_alive()] + [thread]

    def _close(self) -> None:
        try:
            with self.lock:
                if not self._is_over:
                    self._end()
        except BaseException:
            release(self.lock)
            # What fails in that other thread fails in the next one as well.
            if self._is_ending and not self._is_over and self._closer is not threading.current_thread():
                # Interrupted. Commits of other threads go on, so the lock of the store is held until they are over.
                with suppress(RefusedError):  # The next close ends it.
                    self._close_elsewhere()
            raise

    def _end(self) -> None:
        """The steps of a close. May be begun anew, by another thread, where an interruption left it."""
        is_again, self._is_ending = self._is_ending, True
        if self._background is not None:
            self._background.stop()
        self.is_closed = True
        failure: Exception | None = None
        if self._log is not None:
            if self._was_told is None:
                # What the background thread heard, it told no caller. Nor is what this hears told if it is interrupted.
                heard_by = self._log.heard_by - (self._background.numbers() if self._background else set())
                self._was_told = self.queue.told_feed or bool(heard_by)
            # Not again: nothing is lost without it, since the next open replays the log instead.
            failure = None if is_again else self._checkpoint_at_close()
            failure = self._end_log(self._log, is_told=self._was_told) or failure
        self._let_go_when_idle()
        if failure is not None:
            if self._closer is threading.current_thread():
                self._untold = failure
            raise failure

    def _checkpoint_at_close(self) -> Exception | None:
        """Make the checkpoint that saves the next open time. Returns why not, if a user is to hear of it."""
        checkpointer = self._checkpointer
        assert checkpointer is not None
        try:
            if checkpointer.is_due_at_close(self.upkeep.recovery.bytes_replayed):
                checkpointer.checkpoint()
        except (DiskFullError, PoisonedError):
            pass
        except Error as error:
            return error
        return None

    def _end_log(self, log: SegmentLog, *, is_told: bool) -> PoisonedError | None:
        """Flush and end the log. Returns why acknowledged commits may be lost, unless a caller `is_told` of it."""
        refusing = RefusingLog(closed, log.last_seqno)
        try:
            # In the queue, so that no commit is under way; after it every commit is refused.
            self.queue.run(lambda: self.queue.refuse(refusing))
            log.close()
        except (OSError, PoisonedError, DiskFullError) as error:
            if not isinstance(error, Error) and not is_of_the_system(error):
                raise  # By a signal handler: a commit may be under way.
            log.abandon()
        if log.durable_seqno < self.state.seqno and not is_told:
            # Acknowledged at "os" or "interval": no later call is there to say it.
            try:
                log.sync()
            except PoisonedError as error:
                # The store was removed, whatever the durability of its commits was.
                return None if isinstance(error.__cause__, StoreRemovedError) else error
        return None

    def _let_go_when_idle(self) -> None:
        if self._checkpointer is None:
            self._let_go()
        else:
            # A checkpoint of a call that a signal handler interrupted to close is still unwinding.
            self._checkpointer.while_idle(self._let_go)

    def _let_go(self) -> None:
        if self._telling is not None:
            self._telling.end()
        self.state.close(closed)
        self.queue.refuse(RefusingLog(closed, self.state.seqno))
        self.events.end()
        self.upkeep.past.close()
        self._pages.close()
        self._directory.close()
        self._is_over = True

    def abandon(self, *, in_child: bool = False) -> bool:
        """Let go of everything and write nothing: for a finalizer. Waits for no lock, and for nothing else.

        `in_child`: after a fork, in the child; the threads, and the owners of locks, do not exist here.

        Returns False, and does nothing, where another thread is closing the store.
        """
        if in_child:
            self._leave_to_parent()
        owned = self.lock._is_owned()
        try:
            # Owned, so that a thread which has to wait until the files are let go of can.
            if not owned and not self.lock.acquire(False):
                return False
            self._abandon()
            return True
        finally:
            if not owned:
                release(self.lock)

    def _abandon(self) -> None:
        if self._is_over:
            return
        self.is_closed = self._is_ending = True
        if self._background is not None:
            # The thread may be writing: the lock of the store is held until it is done.
            _abandoned.append(self._background)
            self._background.stop(wait=False, then=self._abandon_files)
        else:
            self._abandon_files()
        # Last: until here another thread that closes it waits for the lock.
        self._is_over = True

    def _abandon_files(self) -> None:
        if self._telling is not None:
            # Before the log wakes those that wait, and would tell followers.
            self._telling.abandon()
        if self._log is not None:
            self._log.abandon()
        self.upkeep.past.close()
        self._pages.close()
        self._directory.close()

    def _leave_to_parent(self) -> None:
        self.state.lock = new_lock()
        self.state.refuse(forked)
        self.queue.abandon_in_child(RefusingLog(forked, self.state.seqno))
        self._background = None
        self._checkpointer = None
        self.pressure.relief = None
        self.lock = new_lock()


class _Relief:
    """What write pressure asks for (see pressure.py)."""

    def __init__(self, checkpointer: Checkpointer, background: Background | None, queue: CommitQueue) -> None:
        self._checkpointer = checkpointer
        self._background = background
        self._queue = queue

    def refuse_commit(self) -> None:
        """ReentrancyError if the calling thread is in a section that a commit may have to wait for."""
        self._queue.refuse_reentry("a commit")

    def is_here(self) -> bool:
        """Whether `start` makes the checkpoint itself, and returns when it is made."""
        in_background = self._background is not None and not self._background.is_here()
        return not in_background and not self._checkpointer.lock._is_owned()

    def start(self) -> BaseException | None:
        """Have a checkpoint made, here or in the background. Returns why none can be made, if that is known."""
        if self._background is not None and not self._background.is_here():
            self._background.wake()
            return self._background.failure
        if self._checkpointer.lock._is_owned():
            return None
        try:
            self._checkpointer.checkpoint()
        except DiskFullError as error:
            # Deletes may still fit into the log, and are the way out: refuse only when memory is short as well.
            return error
        return None

    def shorten_log(self) -> None:
        """Make the checkpoint that the log asks for, where no background thread does."""
        if self._background is None:
            self._checkpointer.checkpoint_if_due("log")

    def refuse_reentry(self) -> None:
        """ReentrancyError if the calling thread is in the middle of a checkpoint, for which it cannot wait."""
        refuse_reentry(self._checkpointer.lock, "a commit that must wait for a checkpoint")

    def reclaim(self) -> bool:
        """Get the space back that deletes have freed. False if there was nothing to do."""
        return self._checkpointer.reclaim()

    def free_space(self) -> bool:
        """Free what a consumer, or else the window, holds. False if there is neither."""
        return not self._checkpointer.lock._is_owned() and self._checkpointer.free_space()
