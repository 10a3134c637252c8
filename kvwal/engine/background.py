"""The background thread of a store, and its jobs.

While commits come in it looks every 50 ms; when none came since it last looked it waits, and the next append wakes it.
It holds no reference to the `Store`, so a forgotten store can be collected, and it is a daemon, so it keeps no process
alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Final

from kvwal.engine.checkpoint import COMPACT_PASSES, REST_S, Checkpointer
from kvwal.engine.commit import CommitQueue
from kvwal.engine.expirer import Expirer
from kvwal.engine.indexing import ALL, Indexes
from kvwal.engine.state import State
from kvwal.engine.telling import Telling
from kvwal.errors import DiskFullError, Error
from kvwal.files import start_thread
from kvwal.locks import new_lock
from kvwal.log import SegmentLog
from kvwal.options import Options
from kvwal.readers.now import HEARTBEAT_S

__all__ = ["Background", "Job"]

# The page file is compacted when nothing was committed for so long, by one generation at a time.
_IDLE_S: Final = REST_S
# How often the thread looks while commits come in.
_TICK_S: Final = 0.05
# How long key indexes are made before the other jobs are looked at, and in a tick while commits come in, so that they
# cost a writer at full speed a tenth, and are made when it rests; after what time of it other threads run, and for how
# long while a commit is under way: a thread needs about 100 us to wake up and take the interpreter.
_INDEXING_S: Final = 0.02
_BUSY_INDEXING_S: Final = 0.005
# Before that a store that was opened makes none: one that is closed at once would wait for work that is thrown away.
_OPENED_S: Final = 0.1
_EXPIRING_S: Final = 0.02
_STEP_S: Final = 0.0003
_PAUSE_S: Final = 0.0002
# Where letting others run takes longer than it does alone, as beside a thread that reads pages, indexes rest so long.
_TAKEN_S: Final = 0.0002
_TAKEN_REST_S: Final = 0.0012
# Between two stretches of building indexes of tables while a commit is under way.
_TABLES_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Job:
    """Something that the background thread does. `due` says whether now; it must be quick, and not fail."""

    name: str
    due: Callable[[], bool]
    run: Callable[[], object]


class Background:
    """The store's one thread: flushes, idle watermark, checkpoints, the next segment, indexes, compaction."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: State,
        queue: CommitQueue,
        log: SegmentLog,
        indexes: Indexes,
        expirer: Expirer,
        telling: Telling,
        options: Options,
    ) -> None:
        self._checkpointer = checkpointer
        self._state = state
        self._queue = queue
        self._log = log
        self._expirer = expirer
        self._telling = telling
        self._options = options
        self._tick_s = min(_TICK_S, max(options.sync_delay_s / 2, 0.001))
        self._stopping = False
        self._ended = False
        # Whether compacting may help: until it did not, and then again after a checkpoint.
        self._may_compact = True
        # The generations that are left of a round of it.
        self._compacting: Iterator[bool | None] | None = None
        self._then: Callable[[], None] | None = None
        #: Owned while the thread works, so that a finalizer can tell whether it may let go of the files at once.
        self.lock = new_lock()
        # Not an Event: that is Python code over a lock, which a signal handler that raises in the thread that wakes us
        # can leave held for ever, and which a finalizer may find held by its own thread. Putting is one C call.
        self._wake_ups: SimpleQueue[None] = SimpleQueue()
        self._seen_seqno = log.last_seqno
        self._quiet = False
        self._synced_s = options.files.monotonic_s()
        #: The last failure of this thread's work; a commit or `Store.checkpoint` meets it again and raises it.
        self.failure: BaseException | None = None
        self._jobs: Sequence[Job] = (
            Job("flush", self._flush_is_due, self._flush),
            Job("idle watermark", self._mark_is_due, self._mark),
            Job("followers", telling.is_due, telling.look),
            Job("checkpoint", checkpointer.is_due, self._checkpoint),
            Job("expiry", expirer.may_be_due, self._expire),
            Job("indexes", self._table_indexes_are_due, self._see_to_table_indexes),
            Job("next segment", lambda: True, log.prepare_next),
            Job("key indexes", self._indexes_are_due, self._make_indexes),
        )
        # What does not wait for the end of a checkpoint.
        self._pressing = self._jobs[0], self._jobs[2]
        checkpointer.meanwhile = self._meanwhile
        self._table_indexes = indexes
        self._indexing_tables: Generator[None, None, None] = indexes.steps()
        # Key indexes are made where history is kept; elsewhere when they are needed.
        self._keeps_log = options.keeps_history
        self._opened_s = self._synced_s
        # Is suspended between two runs of its job.
        self._indexing: Generator[None, None, None] = log.key_history.make_indexes()
        self._thread = threading.Thread(target=self._run, name="kvwal-background", daemon=True)

    def start(self) -> None:
        """Start the thread. RefusedError if the system has none left."""
        start_thread(self._thread)

    def wake(self) -> None:
        """There is work."""
        self._wake_ups.put(None)

    def numbers(self) -> set[int]:
        """The number of this thread, once it has one."""
        return set() if self._thread.ident is None else {self._thread.ident}

    def is_here(self) -> bool:
        """Whether the caller is this thread, by way of a finalizer. It cannot wait for itself."""
        return self._thread is threading.current_thread()

    def stop(self, *, wait: bool = True, then: Callable[[], None] | None = None) -> None:
        """Let the thread end; a job under way is finished first. `then` is called as soon as none is."""
        self._stopping = True
        if then is not None:
            if not self.is_here() and self.lock.acquire(False):
                # It sleeps, and will do nothing when it wakes up.
                self.lock.release()
                then()
            else:
                self._then = then
                if self._ended and self._take_then() is not None:
                    then()
        self._wake_ups.put(None)
        if wait and not self.is_here():
            self._thread.join()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end. False if the caller is that thread."""
        if self.is_here():
            return False
        self._thread.join(timeout_s)
        return True

    def _take_then(self) -> Callable[[], None] | None:
        then, self._then = self._then, None
        return then

    # -- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                with self.lock:
                    if self._stopping:
                        break
                    wait_s = self._work()
                if not self._woken(wait_s) and self._quiet:
                    with self.lock:
                        self._give_back_if_idle()
                        self._compact_if_idle()
        except BaseException as error:
            # Our own bug. Threads that wait for this one must not do so for ever.
            self.failure = error
            raise
        finally:
            for steps in (self._indexing, self._indexing_tables):
                try:
                    steps.close()
                except (OSError, Error):
                    pass  # The files are closed already.
            self._ended = True
            then = self._take_then()
            if then is not None:
                then()

    def _woken(self, timeout_s: float | None) -> bool:
        """Wait to be woken; False if that did not happen."""
        try:
            self._wake_ups.get(timeout=timeout_s)
        except Empty:
            return False
        while not self._wake_ups.empty():
            self._wake_ups.get_nowait()
        return True

    def _work(self) -> float | None:
        """Do what is due. Returns how long to wait for the next append; None: until there is one."""
        last = self._log.last_seqno
        self._quiet = last == self._seen_seqno
        self._seen_seqno = last
        if not self._quiet:
            self._compacting = None
        try:
            for job in self._jobs:
                if self._stopping:
                    return 0.0
                if job.due():
                    job.run()
        except (OSError, Error) as error:
            # Not lost: the store is poisoned, damaged or its disk is full, and a commit that must wait for this work,
            # or a call that asks for a checkpoint, is told so.
            self.failure = self._table_indexes.failures[ALL] = error
            self._quiet = True
        if self.failure is None and (self._expirer.may_be_due() or self._flush_is_due()):
            # There was more than could be removed while the other jobs waited, or one of them has put a flush off.
            self._quiet = False
            return 0.0
        if self._indexes_are_due():
            wait_s = 0.0 if self._quiet else self._tick_s
            self._quiet = False
            return wait_s
        if self._table_indexes_are_due():
            # Its own commits are no writer that it must leave time to.
            self._quiet = False
            return _TABLES_PAUSE_S if self._queue.is_busy() else 0.0
        if self._quiet:
            idle_s = self._wait_idle()
            # Then it looks for followers.
            return HEARTBEAT_S if idle_s is None else min(idle_s, HEARTBEAT_S)
        return self._tick_s

    def _wait_idle(self) -> float | None:
        # As a commit of its own, so between two others: each was either appended before, and is seen below, or is
        # appended after, and wakes this thread.
        try:
            self._queue.run(lambda: self._log.notify_on_append(self.wake))
        except (OSError, Error) as error:
            # Poisoned: nothing will be appended any more.
            self.failure = error
        if self._log.last_seqno != self._seen_seqno or (self._checkpointer.is_due() and self.failure is None):
            self._quiet = False
            return self._tick_s
        if self._wants_compacting() or self._log.can_give_back:
            return _IDLE_S
        version = self._state.version
        waits_s = [threading.TIMEOUT_MAX]
        if version.memtable or version.frozen is not None:
            # Not this alone: "never" may well be written as infinity.
            waits_s.append(self._options.checkpoint_interval_s)
        elif not self._expirer.in_use:
            return None
        if self.failure is None:
            waits_s.append(self._expirer.due_in_s())
        return min(waits_s)

    # -- the jobs ---------------------------------------------------------------------------------

    def _meanwhile(self) -> None:
        """A checkpoint lets other threads run. If this one makes it, it does what has to be done in time."""
        if self.is_here():
            self._quiet = self._quiet and self._log.last_seqno == self._seen_seqno
            for job in self._pressing:
                if job.due():
                    job.run()

    def _flush_is_due(self) -> bool:
        if self._log.durable_seqno >= self._log.last_seqno or self._options.durability == "os":
            return False
        waited_s = self._options.files.monotonic_s() - self._synced_s
        return self._quiet or waited_s >= self._options.sync_delay_s - self._tick_s

    def _flush(self) -> None:
        self._queue.sync()
        self._synced_s = self._options.files.monotonic_s()

    def _mark_is_due(self) -> bool:
        return self._quiet and self._log.durable_seqno == self._seen_seqno

    def _mark(self) -> None:
        # The log fell idle: say on disk that all of it is durable, so that damage to the last commits can be told from
        # a torn tail.
        self._queue.run(self._log.mark_idle)

    def _checkpoint(self) -> None:
        if not self._checkpointer.checkpoint_if_due():
            return
        self.failure = None
        self._table_indexes.failures.pop(ALL, None)
        self._may_compact = True

    def _expire(self) -> None:
        """Remove what has expired, for as long as the other jobs can wait."""
        now_s, give_way = self._options.files.monotonic_s, self._options.files.give_way
        began_s = now_s()
        while self._expirer.remove() and not self._stopping and now_s() - began_s < _EXPIRING_S:
            give_way(_PAUSE_S if self._queue.is_busy() else 0.0)

    def _indexes_are_due(self) -> bool:
        if not self._keeps_log or self.failure is not None or not self._log.key_history.lacks_indexes():
            return False
        return self._options.files.monotonic_s() - self._opened_s >= _OPENED_S

    def _make_indexes(self) -> None:
        """Go on making key indexes, for as long as the other jobs can wait."""
        now_s = self._options.files.monotonic_s
        began_s = yielded_s = now_s()
        most_s = _INDEXING_S if self._quiet else _BUSY_INDEXING_S
        for indexing in (self._indexing, self._log.key_history.make_indexes()):
            self._indexing = indexing
            for _ in indexing:
                at_s = now_s()
                # A writer that wakes this thread may wait for a checkpoint.
                if self._stopping or at_s - began_s >= most_s or not self._wake_ups.empty():
                    return
                if at_s - yielded_s >= _STEP_S:
                    # Beside a writer they have little time as it is.
                    self._let_others_run(_PAUSE_S if self._queue.is_busy() else 0.0, rests=self._quiet)
                    yielded_s = now_s()

    def _let_others_run(self, pause_s: float, *, rests: bool) -> None:
        """Between two steps of what can wait. `rests`: for longer where another thread took the interpreter."""
        files = self._options.files
        began_s = files.monotonic_s()
        files.give_way(pause_s)
        if rests and files.monotonic_s() - began_s >= _TAKEN_S:
            files.give_way(_TAKEN_REST_S)

    def _table_indexes_are_due(self) -> bool:
        return ALL not in self._table_indexes.failures and self._table_indexes.is_due()

    def _see_to_table_indexes(self) -> None:
        """Go on building the indexes of tables, for as long as the other jobs can wait."""
        files = self._options.files
        began_s = files.monotonic_s()
        for steps in (self._indexing_tables, self._table_indexes.steps()):
            self._indexing_tables = steps
            for _ in steps:
                is_over = files.monotonic_s() - began_s >= _BUSY_INDEXING_S
                if self._stopping or is_over or not self._table_indexes.is_due():
                    return
                self._let_others_run(0.0, rests=True)

    def checkpoint_was_made(self) -> None:
        """By another thread: compacting may help again."""
        self._may_compact = True
        self.wake()

    def _give_back_if_idle(self) -> None:
        """No thread has committed anything while this one waited: give back the log that only commits need."""
        if self._stopping or self._log.last_seqno != self._seen_seqno or not self._log.can_give_back:
            return
        try:
            self._queue.run(self._log.give_back)
        except (OSError, Error) as error:
            self.failure = None if isinstance(error, DiskFullError) else error

    def _wants_compacting(self) -> bool:
        return self._may_compact and (self._compacting is not None or self._checkpointer.is_sparse())

    def _compact_if_idle(self) -> None:
        """No thread has committed anything while this one waited: give unused space back to the system, bit by bit."""
        if self._stopping or self._log.last_seqno != self._seen_seqno or not self._wants_compacting():
            return
        if self._compacting is None:
            self._compacting = self._checkpointer.compacting(passes=COMPACT_PASSES)
        try:
            shrank = next(self._compacting)
        except (OSError, Error) as error:
            self._compacting, self._may_compact = None, False
            self.failure = None if isinstance(error, DiskFullError) else error
            return
        if shrank is not None:
            # As long as it helps; the next checkpoint of new commits makes it worth trying again.
            self._compacting, self._may_compact = None, shrank
