"""The commit queue: who leads, and the steps of a commit. How one ends that was interrupted or failed: ending.py.

How a commit travels:

1. A thread appends its request to the queue. The thread of the first request in the queue leads; the others sleep.
2. The leader takes the queue as its group (see group.py), and for the group: validates; appends the records with one
   write; flushes once if any member wants it; publishes; wakes the members, and the head of what was queued meanwhile.
3. A put that finds the queue empty needs no request, or no group: it holds the leader's lock for as long as it takes.

Durability: with durability "commit" nothing is published before the flush returned, so no reader sees a commit that a
power cut could take back. A group with one such member is flushed before any is published.

A group with listeners (see kvwal/events.py) is told once its members are awake, by the leader while it leads, so that
listeners hear of the commits in their order. A put then makes a request even where the queue is empty.

Invariant: only the owner of `lock` touches the log, validates and publishes. A request stays in the queue until it is
done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from kvwal.engine.ending import CommitEnding, is_of_the_system
from kvwal.engine.group import Group, Pressure
from kvwal.engine.judge import Judge
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES
from kvwal.engine.occ import History
from kvwal.engine.own_commits import note
from kvwal.engine.publish import Publisher
from kvwal.engine.reads import Reads
from kvwal.engine.request import CommitRequest, say_written
from kvwal.engine.row_cache import Row
from kvwal.engine.state import State
from kvwal.engine.value import MISSING, Value
from kvwal.engine.window import Window
from kvwal.engine.writes import IndexedPut, LonePut
from kvwal.errors import Error, PoisonedError, TableNotFoundError
from kvwal.events import Events
from kvwal.keys import Seqno
from kvwal.locks import Lock, collect_first, is_nested, new_lock, refuse_reentry, release, wake
from kvwal.log import LogWriter

__all__ = ["CommitQueue"]

# One group: enough for one flush to serve all that wait, not so much that the first waits for the last.
_MAX_GROUP_BYTES: Final = 32 << 20
# The objects that the collector counts and that a small group, or a put alone, has at a time.
_GROUP_OBJECTS: Final = 40
_PUT_OBJECTS: Final = 8


class CommitQueue(CommitEnding):
    """Takes commits from any thread, one at a time in seqno order, many to a flush."""

    def __init__(
        self,
        log: LogWriter,
        state: State,
        reads: Reads,
        publisher: Publisher,
        history: History,
        pressure: Pressure,
        events: Events,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(log, state, pressure, events)
        self._publisher = publisher
        self._judging = partial(Judge, reads, history, state)
        self._history = history
        self._listeners = events.listeners
        self._now_s = now_s
        self._thread = threading.local()
        self._window = Window()

    def is_busy(self) -> bool:
        """Whether a commit is under way just now."""
        lock = self.lock
        try:
            if self._queue or not lock.acquire(False):
                return True
            lock.release()
            return False
        except BaseException:
            release(lock)
            raise

    # -- one put, alone -------------------------------------------------------------------------

    def put(
        self,
        key: bytes,
        value: bytes,
        sync: bool,
        table: int = 0,
        names: object = None,
        indexed: IndexedPut | None = None,
    ) -> Seqno:
        """Commit one put; key and value must have passed `as_key` and `as_value`.

        `names`: as `WriteBatch.names`, of a table other than 0. TableNotFoundError if they have changed. `indexed`: the
        same put, if the table has indexes.
        """
        lock, state = self.lock, self._state
        collect_first(lock, _PUT_OBJECTS if indexed is None else _GROUP_OBJECTS)
        if lock._is_owned() or state.lock._is_owned():
            self.refuse_reentry("a put")
        target = 0
        try:
            if (
                self._queue
                or self._listeners
                or (sync and self._window.expected > 1)
                or not lock.acquire(False)
                or self._left is not None
            ):
                release(lock)
                queued = LonePut(key, value, table, names) if indexed is None else indexed.general
                return self.commit(CommitRequest(queued, sync=sync))
            if table and names is not state.cache.names.now:
                lock.release()
                raise TableNotFoundError(table)
            if indexed is not None and not _holds(indexed, state.cache.rows):
                lock.release()
                return self.commit(CommitRequest(indexed.general, sync=sync))
            log = self._log
            target = log.last_seqno + 1
            seqno = log.append_put(key, value, table, None if indexed is None else indexed.whole)
            if sync:
                log.sync()
            if indexed is None:
                self._publisher.publish_put(seqno, key, value, len(key) + len(value) + ENTRY_OVERHEAD_BYTES, table)
            else:
                self._publisher.publish_writes(seqno, indexed)
            lock.release()
        except BaseException as error:
            # Up to three times: see ending.py.
            failure: BaseException | None = None
            try:
                failure = self._end_put(indexed, (key, value, table, names), sync, target, error)
            except BaseException:  # noqa: BLE001  # the interruption that is handled here goes on
                try:
                    failure = self._end_put(indexed, (key, value, table, names), sync, target, error)
                except BaseException:  # noqa: BLE001  # as above
                    try:
                        failure = self._end_put(indexed, (key, value, table, names), sync, target, error)
                    except BaseException:  # noqa: BLE001  # as above
                        self._hand_over(error, (), target, sync, key, value, table, names, indexed)
            if failure is not None:
                raise failure from error
            if is_of_the_system(error):
                raise self.poison(error) from error
            raise
        return seqno

    def _put_alone(self, request: CommitRequest) -> bool:
        """What `put` does, for a request of a put into table 0, which may have read. False: it has to queue."""
        put, lock, state = request.writes, self.lock, self._state
        # That of an operation which met a full disk is what it would have written then.
        if type(put) is not LonePut or put.table or request.operation is not None:
            return False
        collect_first(lock, _PUT_OBJECTS)
        if lock._is_owned() or state.lock._is_owned():
            return False
        target, sync = 0, request.sync
        try:
            if (
                self._queue
                or self._listeners
                or (sync and self._window.expected > 1)
                or not lock.acquire(False)
                or self._left is not None
            ):
                release(lock)
                return False
            if request.reads is not None:
                request.error = self._history.conflict(request.reads)
            if request.error is None:
                log = self._log
                target = log.last_seqno + 1
                seqno = log.append_put(put.key, put.value)
                if sync:
                    log.sync()
                request.let_go()
                self._publisher.publish_put(seqno, put.key, put.value, put.size + ENTRY_OVERHEAD_BYTES)
                request.seqno = seqno
            request.done = True
            lock.release()
        except BaseException as error:
            # Up to twice: see ending.py.
            try:
                self._end_alone(request, target, error)
            except BaseException:  # noqa: BLE001  # the interruption that is handled here goes on
                try:
                    self._end_alone(request, target, error)
                except BaseException:  # noqa: BLE001  # as above
                    self._hand_over(error, (), target, sync, put.key, put.value)
            if request.error is not None and request.error is not error:
                raise request.error from error
            if is_of_the_system(error):
                raise self.poison(error) from error
            raise
        return True

    # -- requests -------------------------------------------------------------------------------

    def commit(self, request: CommitRequest) -> Seqno:
        """Commit, and return the seqno (0 for a request without writes). Raises what went wrong with it."""
        try:
            if not self._put_alone(request):
                self.submit((request,))
            if self._listeners:
                note(self.events, request.seqno)
        except BaseException as error:
            if request.seqno:
                note(self.events, request.seqno)
                say_written(error, request.seqno)
            raise
        if request.error is not None:
            raise request.error
        return request.seqno

    def submit(self, requests: Sequence[CommitRequest]) -> None:
        """Commit each of the requests; what went wrong with one is its own `error`. On return all are done.

        Raises ReentrancyError, and what interrupted the thread; a request that was not begun then has that as its
        error.
        """
        for each in self._waited_for():
            if each._is_owned():
                self.refuse_reentry("a commit")
        lock, queue, last = self.lock, self._queue, requests[-1]
        # As in `put`: more than a group makes while it is under way.
        collect_first(lock, _GROUP_OBJECTS)
        waiter = self._waiter()
        # How many calls of this thread are here already, each interrupted by the next.
        depth: int = getattr(self._thread, "depth", 0)
        try:
            self._thread.depth = depth + 1
            for request in requests:
                request.waiter = waiter
            queue.extend(requests)
            if self._window.is_open:
                self._window.arrived(len(queue))
            while not last.done:
                if self._left is not None or self._leads(waiter):
                    # Not in a `with` block: on an exception the lock is held until `_resolve` has ended the group.
                    lock.acquire()
                    self._end_left()
                    # A put alone, or a thread that led before us, may have had it until now.
                    if self._leads(waiter):
                        self._lead()
                    lock.release()
                else:
                    waiter.acquire()
            self._leave(waiter, depth)
        except BaseException as error:
            # Up to twice: see ending.py.
            try:
                self._after_exception(requests, error)
            except BaseException:  # noqa: BLE001  # the interruption that is handled here goes on
                try:
                    self._after_exception(requests, error)
                except BaseException:  # noqa: BLE001  # as above
                    self._hand_over(error, requests)
            self._leave(waiter, depth)
            if is_of_the_system(error):
                raise self.poison(error) from error
            if isinstance(error, Error) and isinstance(last.error, PoisonedError) and last.error is not error:
                raise last.error from error
            raise

    def _leave(self, waiter: threading.Lock, depth: int) -> None:
        self._thread.depth = depth
        if depth:
            # The call that this one interrupted may have missed its own wake-up.
            wake(waiter)

    def sync(self) -> None:
        """Flush everything committed so far."""
        self.commit(CommitRequest(sync=True))

    def run(self, action: Callable[[], Any]) -> None:
        """Run something while no commit can be under way."""
        self.commit(CommitRequest(sync=False, action=action))

    def _waiter(self) -> threading.Lock:
        """What the calling thread sleeps on. One for each thread: a nested call leads for the one it interrupted."""
        waiter: threading.Lock | None = getattr(self._thread, "waiter", None)
        if waiter is None:
            waiter = threading.Lock()
            waiter.acquire()
            self._thread.waiter = waiter
        return waiter

    def _leads(self, waiter: threading.Lock) -> bool:
        try:
            head = self._queue[0].waiter
            # None: its thread is gone from here, so any leads.
            return head is waiter or head is None
        except IndexError:
            # All are done, and the thread has been woken.
            return False

    def refuse_reentry(self, what: str) -> None:
        """ReentrancyError if the calling thread leads, or is in a section that a leader may wait for."""
        if self.lock._is_owned() and not is_nested():
            # A second interruption came into the handler of the first one, and left the lead with a thread that is gone
            # from here. Its commits are ended as that handler would have done.
            waiter = self._waiter()
            left = [request for request in list(self._queue) if request.waiter is waiter]
            self._after_exception(left, KeyboardInterrupt())
        for lock in self._waited_for():
            refuse_reentry(lock, what)

    def _waited_for(self) -> list[Lock]:
        # The owner of one of these keeps a leader from going on, and so must not wait for it.
        return [self.lock, self.queue_lock, self._pressure.lock, *self._state.locks()]

    # -- a group --------------------------------------------------------------------------------

    def _lead(self) -> None:
        """Requires: lock, and that a request of this thread is the head of the queue."""
        if self._window.expected > 1 and self._queue[0].sync:
            self._window.wait(self._queue)
        self._group = group = self._next_group()
        self._commit_group(group)
        self._finish(group)

    def _next_group(self) -> Group:
        with self.queue_lock:
            members: list[CommitRequest] = []
            size = 0
            for member in list(self._queue):
                if size > _MAX_GROUP_BYTES:
                    break
                if member.waiter is None:
                    # Its thread has left, and was not told that it is written.
                    self._queue.remove(member)
                    member.done = True
                    continue
                size += member.writes.size
                members.append(member)
                member.taken = True
            return Group(members)

    def _commit_group(self, group: Group) -> None:
        """The steps of a commit. May be begun anew after an interruption."""
        group.validate(self._log.last_seqno, self._judging)
        if self._listeners and not group.began:
            group.began_s = self._now_s()
        if not group.logged:
            log = self._log
            group.append(log, self._pressure, self._judging)
            if group.sync:
                began_s = self._now_s()
                log.sync()
                self._window.flushed(self._now_s() - began_s)
            group.logged = True
        group.publish(self._state, self._publisher)
        if group.began_s is not None:
            group.event = group.as_event(self._now_s() - group.began_s)
        self._run_actions(group)

    def _run_actions(self, group: Group) -> None:
        for member in group.members:
            if member.action is not None:
                try:
                    member.action()
                except (OSError, Error) as error:
                    # Its own: the other members were written, and must not hear that they were not.
                    member.error = error if isinstance(error, Error) else self.poison(error)
                member.action = None

    def _finish(self, group: Group) -> None:
        """The group is over: wake its threads, and the next leader. Harmless when done again."""
        queue = self._queue
        # From here on it can only be ended.
        group.began = True
        for member in group.members:
            member.done = True
        with self.queue_lock:
            try:
                while queue[0].done:
                    queue.popleft()
            except IndexError:
                pass  # No request is left.
        waiters = {member.waiter for member in group.members}
        self._window.expected = len(waiters) + len(queue)
        for waiter in waiters:
            if waiter is not None:
                wake(waiter)
        # Taken first, so that it is told once however often this is done.
        event, group.event = group.event, None
        if event is not None:
            self.events.tell(event)
        self._group = None
        self._wake_head()

    def abandon_in_child(self, log: LogWriter) -> None:
        """After a fork, in the child: the leader does not exist here."""
        self._log = log
        self.lock = new_lock()
        self.queue_lock = new_lock()
        self._window = Window()
        self._queue = deque()
        self._group = self._left = None


def _holds(indexed: IndexedPut, rows: Mapping[Row, Value]) -> bool:
    """Whether what it was made for is still so. Requires: the lead."""
    for row, value in indexed.was:  # noqa: SIM110  # a generator takes twice the time
        if rows.get(row, MISSING) is not value:
            return False
    return True
