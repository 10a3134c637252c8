"""The commit pipeline: validate, number, append, sync, publish; in groups, led by one of the committers.

How a commit travels:

1. A committer encodes its writes, outside of any lock.
2. It tries to take the *baton*. Whoever finds it free leads: alone, it pays one dict hit for that. Who
   finds it taken queues up and sleeps.
3. The leader takes the whole queue as its group, and for the group: validates each transaction against
   what committed since its snapshot, and against the members before it; appends the records with one
   write; flushes once if any member wants it; publishes each in order; wakes the members.
4. It hands the baton to the first of those who queued up meanwhile, or puts it down.

Durability: with durability "commit" nothing is published before the flush returned, so no reader sees a
commit that a power cut could take back. A group with one such member is flushed before any is published.

Invariant: only the holder of the baton touches the log, and validates.

Interruptions. A signal handler may raise (KeyboardInterrupt) between any two bytecodes of the main
thread, and an allocation may fail anywhere (MemoryError). So a step never relies on "the next line runs":

- The baton is a dict entry that names its holder: taking and attributing it is one C call.
- Each step of a group is written so that doing it again is harmless, and the job says which was begun.
  After an interruption before the append began, the commit is dropped: not written. After it, the job is
  carried to its end first: written. Then the interruption goes on its way, with a note that says which.
- A failure of the disk is another matter: the log refuses all further work and the store is poisoned.

What was tried: a lock for leadership (a signal between acquire and try leaves it held for ever); handing
every commit to a committer thread (two thread switches, 20 us, for a lone writer).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from kvwal.batch import WriteBatch
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES
from kvwal.engine.occ import History
from kvwal.engine.present import Present
from kvwal.engine.refusal import Refusal, poisoned_error
from kvwal.engine.request import CommitRequest, open_gate, say_written
from kvwal.errors import DiskFullError, EnvironmentFailure, Error, PoisonedError
from kvwal.files import Buffer
from kvwal.keys import Seqno
from kvwal.log import encode_put

__all__ = ["CommitPipeline", "Log"]

_BATON: Final = 0
# Members of one group: enough for one flush to serve everybody, not so much that the first waits for the last.
_MAX_GROUP_BYTES: Final = 32 << 20
# How long a leader waits for the others to come back, as a part of the time of a flush.
_CROWD_WAIT: Final = 0.5
# How often a step is tried again after interruptions before the store gives up and asks for a reopen.
_MAX_INTERRUPTIONS: Final = 100


class Log(Protocol):
    """What the pipeline needs of the log writer, or of what stands in for a log that refuses."""

    @property
    def last_seqno(self) -> Seqno: ...
    @property
    def durable_seqno(self) -> Seqno: ...
    def append(self, bodies: Sequence[bytes | list[Buffer]], *, small: bool = False) -> Seqno: ...
    def append_put(self, key: bytes, value: bytes) -> Seqno: ...
    def sync(self) -> None: ...


class _Job:
    """A group being worked on: everything needed to go on after an interruption."""

    __slots__ = ("accepted", "began", "durable", "first", "fitting", "group", "published", "target", "validated")

    def __init__(self, group: Sequence[CommitRequest]) -> None:
        self.group = group
        self.validated = False
        self.accepted: list[CommitRequest] = []
        self.first = 0
        self.target = 0
        #: From here on the records may be on disk.
        self.began = False
        self.durable = False
        #: After the disk was found full: members that are still to be written one by one.
        self.fitting: list[CommitRequest] | None = None
        self.published = 0


class CommitPipeline:
    """Takes commits from any thread, one at a time in seqno order, many to a flush."""

    def __init__(
        self,
        log: Log,
        present: Present,
        *,
        release_reserve: Callable[[], bool],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._present = present
        self._publish_put = present.publish_put
        self._release_reserve = release_reserve
        # One entry, whose value says who leads. Rule: taken with setdefault, passed on with assignment, put down
        # with del; each a single C call.
        self._baton: dict[int, object] = {}
        # Guards the hand-over between queue and group; not needed while nobody waits.
        self._queue_lock = threading.Lock()
        self._queue: deque[CommitRequest] = deque()
        self._job: _Job | None = None
        self._now_s = now_s
        # How many committers there were last time, and how long a flush takes: see `_await_crowd`.
        self._crowd = 0
        self._flush_s = 0.0
        self._awaited = False
        self._crowd_gate = threading.Lock()

    def is_busy(self) -> bool:
        """Whether a commit is under way just now."""
        return _BATON in self._baton

    # -- the fast path ------------------------------------------------------------------------

    def put(self, key: bytes, value: bytes, sync: bool) -> Seqno:
        """Commit one put; key and value must have passed `as_key` and `as_value`."""
        baton = self._baton
        # A fresh object, to name the baton's holder by.
        entry = (key, value)
        target = 0
        try:
            if (sync and self._crowd > 1) or baton.setdefault(_BATON, entry) is not entry:
                return self.commit(CommitRequest.of_put(key, value, encode_put(key, value), sync=sync))
            log = self._log
            target = log.last_seqno + 1
            seqno = log.append_put(key, value)
            if sync:
                log.sync()
            self._publish_put(seqno, key, value, len(key) + len(value) + ENTRY_OVERHEAD_BYTES)
            del baton[_BATON]
            if self._queue:
                self._promote()
        except BaseException as error:
            self._rescue_put(entry, target, sync, error)
            if isinstance(error, OSError) and not isinstance(error, Error):
                raise self._poison(error) from error
            raise
        return seqno

    def _rescue_put(self, entry: tuple[bytes, bytes], target: int, sync: bool, error: BaseException) -> None:
        """The fast path was left by an exception: finish or drop the put, then put the baton down."""
        if self._baton.get(_BATON) is not entry:
            # Not ours (any more): we never led, or everything was done.
            if target and self._present.seqno >= target:
                say_written(error, target)
            if self._queue:
                self._promote()
            return
        request = CommitRequest.of_put(*entry, encode_put(*entry), sync=sync)
        job = _Job((request,))
        job.validated = True
        job.accepted = [request]
        job.first = job.target = target
        # Before `target` was known nothing was begun. After it, the record may be there.
        job.began = bool(target)
        if isinstance(error, DiskFullError):
            self._present.short_of_space = self._present.attention = True
        self._job = job
        self._baton[_BATON] = request
        self._after_exception(request, error)
        if request.error is not None and request.error is not error:
            raise request.error from error

    # -- commits ------------------------------------------------------------------------------

    def commit(self, request: CommitRequest, company: Sequence[CommitRequest] = ()) -> Seqno:
        """Commit, and return the seqno (0 for a request without writes). `company` rides along.

        Raises what went wrong with this request; those in company have their own `error`.
        """
        try:
            if company:
                self._queue.extend(company)
            if self._baton.setdefault(_BATON, request) is request or self._wait(request):
                self._lead(request)
        except BaseException as error:
            self._after_exception(request, error)
            self._dismiss(company, error)
            if isinstance(error, OSError) and not isinstance(error, Error):
                raise self._poison(error) from error
            raise
        if request.error is not None:
            raise request.error
        return request.seqno

    def sync(self) -> None:
        """Flush everything committed so far."""
        self.commit(CommitRequest(WriteBatch(), sync=True))

    def run(self, action: Callable[[], Any]) -> None:
        """Run something while no commit can be under way."""
        self.commit(CommitRequest(WriteBatch(), sync=False, action=action))

    def _wait(self, request: CommitRequest) -> bool:
        """Queue up. True: we were made leader; False: the request is done."""
        gate = threading.Lock()
        gate.acquire()
        request.gate = gate
        self._queue.append(request)
        if self._awaited and len(self._queue) + 1 >= self._crowd:
            open_gate(self._crowd_gate)
        # The leader looks at the queue after it put the baton down: either it sees us, or we find the baton free.
        if self._baton.setdefault(_BATON, request) is request:
            return not self._leave_if_done(request)
        gate.acquire()
        return not request.done

    def _leave_if_done(self, request: CommitRequest) -> bool:
        if request.done:
            self._put_down()
            return True
        return False

    def _lead(self, request: CommitRequest) -> None:
        """Requires: `request` holds the baton and is not done."""
        if request.sync and self._crowd > 1:
            self._await_crowd()
        group = [request]
        # Before anybody is taken out of the queue: whoever is must not be forgotten with this frame.
        self._job = job = _Job(group)
        with self._queue_lock:
            size = request.size
            while self._queue and size <= _MAX_GROUP_BYTES:
                member = self._queue[0]
                # One that is done was interrupted while it led, or was made to: it has been told how it ended.
                if member is not request and not member.done:
                    group.append(member)
                    size += member.size
                self._queue.popleft()
        self._advance(job)
        self._finish(request)

    def _await_crowd(self) -> None:
        """Let those whom the last flush served come back for the next, so that it serves all.

        Without this, threads that commit in a loop fall into two halves, each waiting for the flush of the other,
        and twice as many flushes are made. The wait is a part of what a flush takes, and ends as soon as as many
        are here as there were; a thread alone never waits.
        """
        gate = self._crowd_gate
        if gate.acquire(blocking=False):
            # Looked at before it is waited for: whoever completes the crowd opens it, and may have been here already.
            self._awaited = True
            if len(self._queue) + 1 < self._crowd:
                gate.acquire(timeout=self._flush_s * _CROWD_WAIT)
            self._awaited = False
        open_gate(gate)

    def _finish(self, request: CommitRequest) -> None:
        # May be done again: it is the job that says whom to wake, so it goes when all are awake.
        job = self._job
        if job is not None:
            # Threads, that is: those who came in company of another (asyncio's tasks) come back in company.
            self._crowd = 1 + len(self._queue)
            for member in job.group:
                self._crowd += member.gate is not None and member is not request
            for member in job.group:
                member.wake()
        self._job = None
        if self._baton.get(_BATON) is request:
            self._put_down()

    def _put_down(self) -> None:
        # Requires: the baton is ours.
        if self._queue:
            # Passed on without putting it down: a newcomer in between would flush for itself alone.
            with self._queue_lock:
                waiters = list(self._queue)
                waiter = next((member for member in waiters if member.gate is not None and not member.done), None)
                if waiter is not None and waiter.gate is not None:
                    self._baton[_BATON] = waiter
                    open_gate(waiter.gate)
                    return
        del self._baton[_BATON]
        if self._queue:
            self._promote()

    def _promote(self) -> None:
        """Somebody queued up while the baton was held: make the first of them leader.

        May be done again: one who got the baton and was not woken, since an interruption came in between, is now.
        """
        with self._queue_lock:
            # A copy in one C call: others queue up without the lock, and a deque may not change under a loop.
            waiters = list(self._queue)
            # Others ride with a member of the queue that has a thread to lead.
            waiter = next((member for member in waiters if member.gate is not None and not member.done), None)
            if waiter is None:
                return
            holder = self._baton.setdefault(_BATON, waiter)
            for member in waiters:
                if member is holder and member.gate is not None:
                    open_gate(member.gate)

    # -- the steps of a group -----------------------------------------------------------------

    def _advance(self, job: _Job) -> None:
        """Carry the job to its end. Every step may be entered again."""
        if not job.validated:
            self._validate(job)
        log = self._log
        if (job.accepted or job.fitting is not None) and not job.durable:
            try:
                if job.fitting is None:
                    self._write(job, log)
            except DiskFullError as error:
                self._refuse_puts(job, error)
            if job.fitting is not None:
                self._write_what_fits(job, job.fitting, log)
        elif not job.durable and any(member.sync for member in job.group):
            log.sync()
            job.durable = True
        present = self._present
        for index in range(job.published, len(job.accepted)):
            member = job.accepted[index]
            member.seqno = Seqno(job.first + index)
            if member.seqno > present.seqno:
                if member.key is not None:
                    self._publish_put(member.seqno, member.key, member.value, member.size + ENTRY_OVERHEAD_BYTES)
                else:
                    present.publish(member.seqno, member.batch, member.size)
            job.published = index + 1
        for member in job.group:
            if member.action is not None and not member.done:
                try:
                    member.action()
                except (OSError, Error) as error:
                    # Its own: the other members were written, and must not hear that they were not.
                    member.error = error if isinstance(error, Error) else self._poison(error)
                member.action = None
            member.done = True

    def _validate(self, job: _Job) -> None:
        history = self._present.history
        first = self._log.last_seqno + 1
        accepted: list[CommitRequest] = []
        # What the members before it write; looked up by key, since a group may have a thousand members.
        group_history: History | None = None
        if len(job.group) > 1 and any(member.since is not None for member in job.group):
            group_history = History()
            group_history.begin(Seqno(first - 1))
        for member in job.group:
            if member.since is not None:
                conflict = history.conflict(member.since, member.reads, member.ranges)
                if conflict is None and group_history is not None:
                    conflict = group_history.conflict(Seqno(first - 1), member.reads, member.ranges)
                if conflict is not None:
                    member.error = conflict
                    continue
            if member.body is not None:
                if group_history is not None:
                    group_history.record(Seqno(first + len(accepted)), member.batch)
                accepted.append(member)
        job.accepted = accepted
        job.first = first
        job.target = first + len(accepted) - 1
        job.validated = True

    def _write(self, job: _Job, log: Log) -> None:
        job.began = True
        # After an interruption the append may have been finished: then the log has counted it.
        if log.last_seqno < job.target:
            if len(job.accepted) == 1 and job.accepted[0].key is not None:
                log.append_put(job.accepted[0].key, job.accepted[0].value)
            else:
                log.append([member.body for member in job.accepted if member.body is not None])
        if any(member.sync for member in job.group):
            if len(job.group) > 1 or self._crowd > 1:
                began_s = self._now_s()
                log.sync()
                self._flush_s += (self._now_s() - began_s - self._flush_s) / 8
            else:
                log.sync()
        job.durable = True

    def _refuse_puts(self, job: _Job, error: DiskFullError) -> None:
        """No room for the group. Members that only delete make room: they may use the reserve."""
        self._present.short_of_space = self._present.attention = True
        deleting = [member for member in job.accepted if member.only_deletes]
        for member in job.accepted:
            if member not in deleting:
                member.error = error
        job.accepted, job.fitting = [], deleting

    def _write_what_fits(self, job: _Job, fitting: list[CommitRequest], log: Log) -> None:
        """Write the members that are left, one by one. May be entered again, so each is done before it is taken off."""
        while fitting:
            member = fitting[0]
            if job.accepted[-1:] != [member] and member.error is None:
                try:
                    # After an interruption the append may have been finished: then the log has counted it.
                    if log.last_seqno < job.first + len(job.accepted):
                        self._append_small(member, log)
                except DiskFullError as full:
                    member.error = full
                else:
                    job.accepted.append(member)
            del fitting[0]
        job.target = job.first + len(job.accepted) - 1
        if any(member.sync for member in job.group):
            log.sync()
        job.durable = True

    def _append_small(self, member: CommitRequest, log: Log) -> None:
        assert member.body is not None
        try:
            log.append([member.body], small=True)
        except DiskFullError:
            if not self._release_reserve():
                raise
            log.append([member.body], small=True)

    # -- interruptions and failures -----------------------------------------------------------

    def _after_exception(self, request: CommitRequest, error: BaseException) -> None:
        """`commit` was left by an exception: see to it that the request ends, one way or the other."""
        for _ in range(_MAX_INTERRUPTIONS):
            try:
                self._settle(request, error)
            except (KeyboardInterrupt, SystemExit, MemoryError):
                continue
            except Exception as bug:  # noqa: BLE001  # whatever it is, others wait for the baton
                self._give_up(request, bug)
            break
        else:
            self._give_up(request, error)
        if request.seqno:
            say_written(error, request.seqno)

    def _give_up(self, request: CommitRequest, cause: BaseException) -> None:
        """Our own bug, or more interruptions than can be: what became of the group is unknown. Nobody waits for it."""
        self.refuse(Refusal(lambda: poisoned_error(cause), self._log.last_seqno))
        if self._baton.get(_BATON) is not request:
            return
        if self._job is not None:
            for member in self._job.group:
                if not member.done:
                    member.seqno = Seqno(0)
                    member.error = poisoned_error(cause)
        request.done = True
        self._finish(request)

    def _dismiss(self, company: Sequence[CommitRequest], error: BaseException) -> None:
        """Those in company that nobody has begun go the way of the one they came with: not written."""
        for member in company:
            with self._queue_lock:
                waiting = not member.done and member in self._queue
                if waiting:
                    self._queue.remove(member)
                    member.error = error
            if waiting:
                member.wake()

    def _settle(self, request: CommitRequest, error: BaseException) -> None:
        if self._baton.get(_BATON) is request:
            job = self._job
            if job is not None:
                self._settle_job(job, request, error)
            request.done = True
            self._leave_queue(request)
            self._finish(request)
            return
        self._leave_queue(request)
        gate = request.gate
        if gate is not None and not request.done:
            # Another thread leads a group with our commit in it: its outcome is known in a moment.
            gate.acquire()
            request.done = True
        if self._baton.get(_BATON) is request:
            # Made leader while interrupted: nothing of ours is under way, somebody else leads the others.
            self._put_down()
        elif self._queue:
            # We may have been interrupted while we passed the baton on.
            self._promote()

    def _leave_queue(self, request: CommitRequest) -> None:
        # Under the lock: the baton is passed only to who is in the queue, and not done.
        with self._queue_lock:
            if request in self._queue:
                request.done = True
                self._queue.remove(request)

    def _settle_job(self, job: _Job, request: CommitRequest, error: BaseException) -> None:
        if all(member.done for member in job.group):
            # It is over, but for waking them.
            return
        failure = _disk_failure(error)
        if failure is None and job.began and not isinstance(error, Error):
            # Interrupted with records perhaps on disk: carry the whole group to its end. It is written.
            self._present.recount()
            try:
                self._advance(job)
                self._present.recount()
                return
            except (OSError, Error) as later:
                failure = later
        if failure is not None:
            for member in job.group:
                if not member.done:
                    member.error = failure if isinstance(failure, Error) else poisoned_error(failure)
                    member.done = True
            return
        # Nothing was begun: our own request is dropped; the others go back to the head of the queue.
        with self._queue_lock:
            for member in reversed(job.group):
                if member is not request and not member.done and member not in self._queue:
                    self._queue.appendleft(member)
        for member in job.group:
            if member.done:
                member.wake()
        self._job = None

    def _poison(self, cause: OSError) -> PoisonedError:
        """A failure that the log did not see (it makes PoisonedErrors of its own): refuse all that comes after."""
        self.refuse(Refusal(lambda: poisoned_error(cause), self._log.last_seqno))
        return poisoned_error(cause)

    # -- ends ---------------------------------------------------------------------------------

    def refuse(self, log: Log) -> None:
        """From now on, let `log` (which raises) answer every commit."""
        self._log = log

    def abandon_in_child(self, log: Log) -> None:
        """After a fork, in the child: whoever held the baton does not exist here."""
        self._log = log
        self._baton = {}
        self._queue_lock = threading.Lock()
        self._crowd_gate = threading.Lock()
        self._queue = deque()
        self._job = None


def _disk_failure(error: BaseException) -> BaseException | None:
    """The exception, if it is a failure of the disk: then nothing may be tried again.

    What is looked at is the exception alone, never what it was raised in the handling of: that may be the caller's own
    business. A log that failed refuses to try again by itself, so nothing is lost by asking it.
    """
    if isinstance(error, EnvironmentFailure | OSError) and not isinstance(error, InterruptedError):
        return error
    return None
