"""Commits of many tasks, taken to the disk by one thread: one flush, and one way back to the loop, for a group.

How a commit travels:

1. A task encodes its writes and adds them to the *open group*. If too much is pending it first waits for its turn
   (back-pressure, first come first served).
2. When the thread is idle, the loop *hands over* the open group, once all tasks that can run now have run; while
   the thread is busy, the group goes on growing.
3. The thread takes the group through the store's commit pipeline, among the commits of ordinary threads: one
   write, one flush. Then it tells the loop, with one call, and the loop wakes every task of the group.

Rules:

- The queue belongs to the loop: only the loop's thread touches it, hence no lock. The thread sees a group from the
  hand-over on, and the loop looks at the group's requests again when it is *finished*.
- Cancellation. Before the hand-over a commit is withdrawn: nothing of it was, or will be, written. From the
  hand-over on it is *begun*, and the task waits for its end, whatever is cancelled; then the `CancelledError` goes
  on its way and says what became of the commit (see `committed_seqno`).
- Where a store is short of memory, or an archive behind, the thread waits *before* the hand-over, so that what waits
  longest can be withdrawn.
- The end. From `end` on no commit is taken, and none waits for an archive: those that would have to are refused, before
  anything of them is written. The thread ends when nothing is pending; what came to it later would wait for ever.
- Interruptions (KeyboardInterrupt in the loop's thread) may lose any callback. What was finished is seen by the flag
  that the thread sets, not by the callback alone.

What was tried: a future of `call_soon_threadsafe` for each commit (a write to the loop's wake-up pipe each, 5 us),
and a thread pool (two thread switches for each commit, 30 us and more). Without a gain: an awaitable of our own that
runs the task's next step directly instead of through `call_soon` (0.3 us of 9), and `put` without its own coroutine.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Final, TypeAlias

from kvwal.aio.workers import refuse_other_loops, resolve
from kvwal.engine.engine import Engine
from kvwal.engine.own_commits import note
from kvwal.engine.request import CommitRequest
from kvwal.errors import ClosedError, DiskFullError, InternalError, closed
from kvwal.files import start_thread
from kvwal.keys import Seqno

__all__ = ["Committer", "committed_seqno", "say_committed"]

# With the bytes that it was admitted with: an operation sets its writes later.
_Entry: TypeAlias = tuple[CommitRequest, asyncio.Future[None], int]

_SEQNO_ATTRIBUTE: Final = "kvwal_seqno"
# Stands as the error of a request that was withdrawn; it is never raised.
_WITHDRAWN: Final = InternalError("the commit was withdrawn")


def committed_seqno(error: BaseException | None) -> Seqno | None:
    """The seqno of a commit that was written although its task was cancelled; None if nothing was written.

    Args:
        error: the `CancelledError`, or what it became: the `TimeoutError` of `asyncio.timeout` or `wait_for`.
    """
    seen: set[int] = set()
    # Only to the cancellation that it comes from: behind that one are those of other commits.
    while isinstance(error, TimeoutError) and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return getattr(error, _SEQNO_ATTRIBUTE, None)


def say_committed(error: BaseException, seqno: Seqno) -> None:
    """Note on a cancellation that a commit was written: see `committed_seqno`."""
    setattr(error, _SEQNO_ATTRIBUTE, seqno)
    error.add_note(f"kvwal: commit {seqno} was written")


class _Group:
    """Commits that go to the disk together. Without any, it asks the thread to wait until the next ones need not."""

    __slots__ = ("begun", "entries", "failure", "finished", "waiters")

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        #: Handed over: from here on its commits may be on disk.
        self.begun = False
        #: Set by the thread: every request has its outcome.
        self.finished = False
        #: What went wrong, if it was more than a commit.
        self.failure: BaseException | None = None
        #: Cancelled tasks that wait for the end.
        self.waiters: list[asyncio.Future[None]] = []


class Committer:
    """Takes the commits of one event loop to the store. All methods but `stop`: in the loop's thread."""

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        *,
        max_commits: int,
        max_bytes: int,
    ) -> None:
        self._engine = engine
        self._events = engine.queue.events
        self._loop = loop
        self._max_commits = max_commits
        self._max_bytes = max_bytes
        #: Pending: admitted, and their task not woken yet.
        self.pending_commits = 0
        self.pending_bytes = 0
        #: Those who wait to be admitted, first come first served, and the bytes they bring.
        self._turns: deque[tuple[asyncio.Future[None], int]] = deque()
        self._open = _Group()
        #: The group that the thread has, or has finished without the loop knowing yet.
        self._current: _Group | None = None
        self._scheduled = False
        self._is_ending = False
        #: What commits raise from `end` on.
        self.over: Callable[[], ClosedError] = closed
        self._idle: list[asyncio.Future[None]] = []
        # What the thread is to do; None ends it.
        self._jobs: SimpleQueue[_Group | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    # -- in the loop --------------------------------------------------------------------------

    async def commit(self, request: CommitRequest) -> Seqno:
        """Commit, and return the seqno (0 for a request without writes)."""
        # First: in a forked child there is no running loop.
        self._engine.state.refuse_if_gone()
        if asyncio.get_running_loop() is not self._loop:
            refuse_other_loops(self._loop)
        # Also of a transaction that was begun before, or a batch that a worker was encoding.
        self._refuse_if_ending()
        size = request.writes.size
        if (
            self.pending_commits >= self._max_commits
            or self.pending_bytes + size > self._max_bytes
            or self._turns
        ) and not self._may_pass(size):
            await self._turn(size)
        else:
            self.pending_commits += 1
            self.pending_bytes += size
        future = self._loop.create_future()
        group = self._open
        group.entries.append((request, future, size))
        if not self._scheduled:
            self._schedule()
        try:
            await future
        except asyncio.CancelledError as error:
            await self._cancelled(request, size, group, error)
            raise
        if request.error is not None:
            # The pipeline gives all of a group the same exception: begin its traceback anew.
            raise request.error.with_traceback(None)
        if self._events.listeners:
            note(self._events, request.seqno)
        return request.seqno

    def _may_pass(self, size: int) -> bool:
        # One that alone is larger than the limit goes when nothing else does.
        return not self.pending_commits

    async def _turn(self, size: int) -> None:
        turn = self._loop.create_future()
        self._turns.append((turn, size))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                # Others may fit where this one did not.
                self._admit()
            else:
                self._leave(1, size)
            raise

    def _admit(self) -> None:
        """Let in those whose turn it is. They count from now on, not from when they run."""
        turns = self._turns
        while turns:
            turn, size = turns[0]
            if not turn.done():
                if self.pending_commits and (
                    self.pending_commits >= self._max_commits or self.pending_bytes + size > self._max_bytes
                ):
                    return
                if resolve(turn, None):
                    self.pending_commits += 1
                    self.pending_bytes += size
            turns.popleft()

    def _leave(self, commits: int, size: int) -> None:
        self.pending_commits -= commits
        self.pending_bytes -= size
        if self._turns:
            self._admit()
        if not self.pending_commits and not self._turns:
            idle, self._idle = self._idle, []
            for waiter in idle:
                resolve(waiter, None)

    def _schedule(self) -> None:
        current = self._current
        if current is not None:
            if not current.finished:
                return
            # Its callback is still to come, or an interruption swallowed it.
            self._deliver(current)
        if not self._scheduled:
            # After all tasks that are ready now: they belong into this group.
            self._loop.call_soon(self._hand_over)
            self._scheduled = True

    def _hand_over(self) -> None:
        self._scheduled = False
        group = self._open
        if self._current is not None or not group.entries:
            return
        if self._thread is None:
            try:
                self._start()
            except Exception as error:  # noqa: BLE001  # it goes to the tasks, which wait for an answer
                self._refuse(error)
                return
            except BaseException:
                # Interrupted: what waits is not to wait for a later commit.
                self._schedule()
                raise
        pressure = self._engine.pressure
        if pressure.is_on and pressure.would_wait():
            self._current = _Group()
            self._jobs.put(self._current)
            return
        self._open = _Group()
        if any(future.cancelled() for _, future, _ in group.entries):
            self._withdraw(group)
            if not group.entries:
                return
        group.begun = True
        self._current = group
        self._jobs.put(group)

    def _withdraw(self, group: _Group) -> None:
        """Leave out those whose task was cancelled."""
        entries, group.entries = group.entries, []
        for entry in entries:
            if entry[1].cancelled():
                entry[0].error = _WITHDRAWN
            else:
                group.entries.append(entry)

    def _deliver(self, group: _Group) -> None:
        """The thread is done with the group. Harmless when it comes twice."""
        if self._current is group:
            self._current = None
            if not group.entries and group.failure is not None:
                self._refuse(group.failure)
            elif self._open.entries:
                # First of all keep the thread busy.
                self._hand_over()
        entries, group.entries = group.entries, []
        size = 0
        try:
            for _, future, admitted in entries:
                size += admitted
                resolve(future, None)
            for waiter in group.waiters:
                resolve(waiter, None)
        except BaseException:
            # Interrupted: a task that was not woken yet must not sleep for ever.
            group.entries = entries
            self._loop.call_soon(self._deliver, group)
            raise
        if entries:
            self._leave(len(entries), size)

    def _refuse(self, failure: BaseException) -> None:
        """Nothing in the open group can be written: memory is short, an archive behind, or no thread is to be had."""
        group, self._open = self._open, _Group()
        for request, _, _ in group.entries:
            request.error = failure
        group.begun = group.finished = True
        self._deliver(group)

    async def _cancelled(
        self, request: CommitRequest, size: int, group: _Group, error: asyncio.CancelledError
    ) -> None:
        """The task was cancelled: withdraw the commit, or wait for its end and say how it ended."""
        if not group.begun or request.error is _WITHDRAWN:
            # Its future is cancelled, which the hand-over sees.
            self._leave(1, size)
            return
        while not group.finished:
            waiter = self._loop.create_future()
            group.waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                continue
        if request.error is not None:
            error.add_note(f"kvwal: its commit failed: {request.error}")
        elif request.seqno:
            say_committed(error, request.seqno)
            note(self._events, request.seqno)

    def end(self) -> None:
        """From here on refuse every commit that comes, and those that wait for an archive. Idempotent."""
        self._is_ending = True

    def _refuse_if_ending(self) -> None:
        if self._is_ending:
            raise self.over()

    async def drain(self) -> None:
        """Wait until nothing is pending, even when cancelled."""
        while self.pending_commits or self._turns:
            current = self._current
            if current is not None and current.finished:
                # As in `_schedule`.
                self._deliver(current)
                continue
            waiter = self._loop.create_future()
            self._idle.append(waiter)
            with suppress(asyncio.CancelledError):
                await waiter

    # -- in the thread ------------------------------------------------------------------------

    def _start(self) -> None:
        # A daemon, so that it keeps no process alive: a commit under way is ended by Store.close at exit.
        thread = threading.Thread(target=self._run, args=(self._jobs,), name="kvwal-aio-committer", daemon=True)
        try:
            start_thread(thread)
            self._thread = thread
        except BaseException:
            # The next group may get one. Where this was interrupted, it may run all the same: then it ends.
            jobs, self._jobs, self._thread = self._jobs, SimpleQueue(), None
            jobs.put(None)
            raise

    def stop(self) -> None:
        """Let the thread end when it has done what it was given. From any thread, and from a finalizer."""
        self._jobs.put(None)

    def _run(self, jobs: SimpleQueue[_Group | None]) -> None:
        while (group := jobs.get()) is not None:
            try:
                self._work(group)
            except BaseException as error:  # noqa: BLE001  # whatever it is, tasks wait for an answer
                group.failure = error
                for request, _, _ in group.entries:
                    if not request.done and request.error is None:
                        request.error = error
            group.finished = True
            try:
                self._loop.call_soon_threadsafe(self._deliver, group)
            except RuntimeError:
                pass  # The loop is closed: the commits are made, and no task is left to be told.
            del group

    def _work(self, group: _Group) -> None:
        queue, pressure = self._engine.queue, self._engine.pressure
        requests = [request for request, _, _ in group.entries]
        if pressure.is_on:
            deleting = all(request.writes.only_deletes for request in requests)
            pressure.relieve(deleting=deleting, may_wait=self._refuse_if_ending)
        while requests:
            queue.submit(requests)
            # As `Engine.commit`: a consumer loses its hold on the log before a commit is refused for want of space.
            requests = [request for request in requests if isinstance(request.error, DiskFullError)]
            if not requests or not pressure.free_space():
                return
            for request in requests:
                request.renew()
