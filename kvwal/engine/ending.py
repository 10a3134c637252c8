"""How a commit ends that was interrupted or failed, and how all that come after are refused.

Interruptions (see kvwal/locks.py). Of the thread that was interrupted, `_resolve` drops the commit if it was not begun,
and carries the group to its end if it was; then the interruption goes on its way, with a note that says which. What
fails while that is done poisons the store.

Another interruption may come while that is done. The interpreter raises it after a call, as a function begins and where
a loop goes back, also outside of the `try` in that function. So each of these steps may be begun anew, and is called in
a `try` of its caller, which does that: once, and twice for a put alone, of which nothing else knows.

Where the last of these tries fails too, the thread leaves the lead, and what there is of a group, to the next one that
leads, which ends that first (`_hand_over`, `_end_left`). Without frames (RecursionError) or memory (MemoryError) all
tries fail; `_hand_over` needs neither. It wakes those that sleep, one of which is to lead then. The requests of the
thread have no waiter from then on: any thread leads where one is the head of the queue, and drops it if it was not
begun.

If even that is interrupted, the next call of the thread goes on with the group (`CommitQueue.refuse_reentry`). If there
is no group, and the log has a commit that memory has not, the store is poisoned.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Final

from kvwal.engine.group import Group, Pressure
from kvwal.engine.request import CommitRequest, say_written
from kvwal.engine.state import State
from kvwal.engine.writes import IndexedPut, LonePut
from kvwal.errors import DiskFullError, EnvironmentFailure, Error, PoisonedError, poisoned
from kvwal.events import Events
from kvwal.keys import Seqno
from kvwal.locks import new_lock, release, wake
from kvwal.log import LogWriter, RefusingLog

__all__ = ["CommitEnding", "is_of_the_system"]

# How often the end of an interrupted commit is tried before the store gives up and asks for a reopen.
_MAX_INTERRUPTIONS: Final = 1000
_MAX_BUGS: Final = 3
# How often a thread whose commit another one leads looks whether that has left the lead.
_LOOK_S: Final = 1.0
# How often waking a thread may fail before no more are woken.
_MOST_FAILURES: Final = 10
_UNKNOWN: Final = "kvwal: whether the commit is written is not known here: its end is left to the next one"


class _LeftPut:
    """What a put alone puts that was handed over. Made before: then there may be no memory."""

    __slots__ = ("indexed", "key", "names", "sync", "table", "target", "value")

    def __init__(self) -> None:
        self.indexed: IndexedPut | None = None
        self.key = self.value = b""
        self.table = self.target = 0
        self.names: object = None
        self.sync = False

    def as_group(self) -> Group:
        """The put as a group that was begun."""
        writes = self.indexed or LonePut(self.key, self.value, self.table, self.names)
        return Group.of_put(CommitRequest(writes, sync=self.sync), Seqno(self.target))


class CommitEnding(ABC):
    """The ending half of `CommitQueue`."""

    def __init__(self, log: LogWriter, state: State, pressure: Pressure, events: Events) -> None:
        self._log = log
        self._state = state
        self._pressure = pressure
        #: Who hears of the commits.
        self.events = events
        #: Whether a feed, which waited for commits, has said that the disk failed.
        self.told_feed = False
        #: Owned by the thread that leads.
        self.lock = new_lock()
        #: Guards `taken` of the requests in the queue.
        self.queue_lock = new_lock()
        self._queue: deque[CommitRequest] = deque()
        self._group: Group | None = None
        # What ended the commit of a thread that left the lead, until that is ended; and its put. Guarded by `lock`.
        self._left: BaseException | None = None
        self._left_put = _LeftPut()

    @abstractmethod
    def _commit_group(self, group: Group) -> None:
        """The steps of a commit. May be begun anew after an interruption."""

    @abstractmethod
    def _finish(self, group: Group) -> None:
        """The group is over: wake its threads, and the next leader. Harmless when done again."""

    def _wake_head(self) -> None:
        try:
            waiter = self._queue[0].waiter
        except IndexError:
            return
        if waiter is not None:
            wake(waiter)

    # -- interruptions and failures -------------------------------------------------------------

    def _end_put(
        self,
        indexed: IndexedPut | None,
        put: tuple[bytes, bytes, int, object],
        sync: bool,
        target: int,
        error: BaseException,
    ) -> BaseException | None:
        """`put` was left by an exception. Returns what it is to raise instead, if something."""
        if not self.lock._is_owned():
            if target and self._state.seqno >= target:
                say_written(error, target)
            return None
        request = CommitRequest(indexed or LonePut(*put), sync=sync)
        self._end_alone(request, target, error)
        return None if request.error is error else request.error

    def _end_alone(self, request: CommitRequest, target: int, error: BaseException) -> None:
        """A put alone was left by an exception: if it led, it goes on as a group of one."""
        if not self.lock._is_owned():
            return
        self._group = Group.of_put(request, Seqno(target))
        if isinstance(error, DiskFullError):
            self._pressure.disk_is_full()
        self._after_exception((request,), error)

    def _after_exception(self, requests: Sequence[CommitRequest], error: BaseException) -> None:
        """`submit` was left by an exception: see to it that its requests end, one way or the other."""
        # An interruption that comes as the loop there goes back leaves it.
        try:
            self._insist(requests, error)
        except BaseException:  # noqa: BLE001  # the interruption that is handled here goes on
            self._insist(requests, error)
        for request in requests:
            if request.seqno:
                say_written(error, request.seqno)

    def _insist(self, requests: Sequence[CommitRequest], error: BaseException) -> None:
        bugs = 0
        for _ in range(_MAX_INTERRUPTIONS):
            try:
                self._resolve(requests, error)
                break
            except MemoryError:
                continue
            except RecursionError:
                # It comes again here, and not elsewhere: see `_hand_over`.
                raise
            except Exception as bug:  # noqa: BLE001  # whatever it is, other threads wait
                # What a handler raises comes once; a bug of our own comes again.
                bugs += 1
                if bugs == _MAX_BUGS:
                    self._give_up(requests, bug)
                    break
            except BaseException:  # noqa: BLE001  # an interruption, by a signal handler or a listener
                continue
        else:
            self._give_up(requests, error)

    def _resolve(self, requests: Sequence[CommitRequest], error: BaseException) -> None:
        release(self._state.lock)
        release(self.queue_lock)
        if self.lock._is_owned():
            self._end_left()
            self._end_group(error)
            self._withdraw(requests, error)
            release(self.lock)
        else:
            self._withdraw(requests, error)
        # We may have been the head, or interrupted before we woke it.
        self._wake_head()
        # What another thread leads has its outcome in a moment.
        for request in requests:
            while not request.done and request.waiter is not None:
                request.waiter.acquire(timeout=_LOOK_S)
                if self._left is not None:
                    self.lock.acquire()
                    self._end_left()
                    release(self.lock)

    def _end_group(self, error: BaseException) -> None:
        """The group was left by an exception: it ends, or was not begun. Requires: the lead."""
        group = self._group
        if group is not None and self._end_of(group, error):
            self._finish(group)
        else:
            # Nothing was begun: what was taken is waiting again.
            with self.queue_lock:
                for member in list(self._queue):
                    member.taken = False
                self._group = None
            if self._is_log_ahead():
                # Interrupted again and again, a put alone was left in the log, and what it put is not known here.
                self.poison(error)

    def _hand_over(
        self,
        error: BaseException,
        requests: Sequence[CommitRequest] = (),
        target: int = 0,
        sync: bool = False,
        key: bytes = b"",
        value: bytes = b"",
        table: int = 0,
        names: object = None,
        indexed: IndexedPut | None = None,
    ) -> None:
        """What this thread could not end is left to the next one that leads.

        `requests` of `submit`, or a put alone, whose seqno is `target` if it was begun. Makes no object but a note, and
        calls nothing of Python's: all that is called here, the caller could call before it took the lead.
        """
        # In steps of one: to set many at once may make a tuple, and to iterate makes an iterator.
        i = len(requests)
        is_unknown = i > 0
        while i:
            i -= 1
            requests[i].waiter = None
        lock = self.lock
        state_lock = self._state.lock
        queue_lock = self.queue_lock
        while state_lock._is_owned():
            state_lock.release()
        while queue_lock._is_owned():
            queue_lock.release()
        if lock._is_owned():
            # Else this thread could not even end what another one left, which comes first.
            if self._left is None:
                put = self._left_put
                put.target = target
                put.sync = sync
                put.key = key
                put.value = value
                put.table = table
                put.names = names
                put.indexed = indexed
                self._left = error
            is_unknown = True
            while lock._is_owned():
                lock.release()
            # Whichever of them comes first is to lead.
            queue = self._queue
            i = failures = 0
            while i < len(queue) and failures < _MOST_FAILURES:
                try:
                    waiter = queue[i].waiter
                    i += 1
                    if waiter is not None:
                        waiter.release()
                except RuntimeError:
                    continue  # It is awake.
                except BaseException:  # noqa: BLE001  # what is handled here goes on
                    failures += 1
        if is_unknown:
            try:
                error.add_note(_UNKNOWN)
            except BaseException:  # noqa: BLE001  # what is handled here goes on
                return

    def _end_left(self) -> None:
        """End what another thread has left. Harmless when done again. Requires: the lead."""
        error = self._left
        if error is None:
            return
        if self._group is None and self._left_put.target > self._state.seqno:
            self._group = self._left_put.as_group()
        self._end_group(error)
        self._left_put.target = 0
        self._left = None
        self._wake_head()

    def _end_of(self, group: Group, error: BaseException) -> bool:
        """Carry an interrupted group to its end. False if nothing of it was begun: it stays in the queue."""
        if all(member.done for member in group.members):
            return True
        failure = _disk_failure(error)
        if failure is None and group.began and not isinstance(error, Error):
            # Records may be on disk: the whole group is written.
            try:
                self._commit_group(group)
                return True
            except (OSError, Error) as later:
                failure = later
        if failure is not None:
            # Durability: what a part of the group has written is not in memory, and the others may not go on over it.
            known = isinstance(failure, PoisonedError) or (isinstance(failure, Error) and not self._is_log_ahead())
            error = failure if known else self.poison(failure)
            group.fail(error)
            return True
        return False

    def _is_log_ahead(self) -> bool:
        """Whether the log has a commit that memory has not. Requires: the lead."""
        return self._log.last_seqno > self._state.seqno and not isinstance(self._log, RefusingLog)

    def _withdraw(self, requests: Sequence[CommitRequest], error: BaseException) -> None:
        """Requests that no leader has taken are not written."""
        with self.queue_lock:
            for request in requests:
                if not request.taken and not request.done:
                    request.error = error
                    if request in self._queue:
                        self._queue.remove(request)
                    request.done = True

    def _give_up(self, requests: Sequence[CommitRequest], cause: BaseException) -> None:
        """Our own bug, or more interruptions than can be: what became of the group is unknown. It poisons the store."""
        self._refuse_for(cause)
        group = self._group
        if self.lock._is_owned() and group is not None:
            group.fail(poisoned(cause))
            # What a listener raises must not keep the others from their end.
            group.event = None
            self._finish(group)
        self._withdraw(requests, cause)
        release(self.queue_lock)
        release(self.lock)
        self._wake_head()
        self.events.tell_poison(cause)

    def poison(self, cause: BaseException) -> PoisonedError:
        """Refuse all that comes after, since what is on disk is unknown. Returns the error that says so."""
        self._refuse_for(cause)
        self.events.tell_poison(cause)
        return poisoned(cause)

    def _refuse_for(self, cause: BaseException) -> None:
        self.refuse(RefusingLog(lambda: poisoned(cause), self._log.last_seqno))

    def refuse_if_ended(self) -> None:
        """Raise why commits are refused, if they all are: the store is closed, read-only or poisoned."""
        if isinstance(self._log, RefusingLog):
            self._log.sync()

    def refuse(self, log: LogWriter) -> None:
        """From now on, let `log` (which raises) answer every commit."""
        self._log = log


def _disk_failure(error: BaseException) -> BaseException | None:
    """The exception, if it is a failure of the disk: then nothing may be tried again.

    What is looked at is the exception alone, never what it was raised in the handling of: that may be the caller's own
    business. A log that failed refuses to try again by itself, so nothing is lost by asking it.
    """
    return error if isinstance(error, EnvironmentFailure) or is_of_the_system(error) else None


def is_of_the_system(error: BaseException) -> bool:
    """Whether a system call failed. What a signal handler raises, a TimeoutError for one, has no errno."""
    return (
        isinstance(error, OSError) and error.errno is not None and not isinstance(error, InterruptedError | Error)
    )
