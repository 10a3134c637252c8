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
- Interruptions (an exception out of a signal handler, in the loop's thread) may come between any two steps, and lose
  any callback. So nothing is counted: what is pending is what the groups hold, and `_go_on`, the only place where
  groups move, does what is to be done by what it finds. It comes again after an interruption, and a cancelled commit
  and `drain` call it before they wait for an end. It may give a group to the thread twice; the thread takes it once.
  Where its own call is lost, a timer calls it, each second for as long as something is pending; and no call is relied
  on for longer than that, should a timer be lost, too.

What was tried: a future of `call_soon_threadsafe` for each commit (a write to the loop's wake-up pipe each, 5 us),
and a thread pool (two thread switches for each commit, 30 us and more). Without a gain: an awaitable of our own that
runs the task's next step directly instead of through `call_soon` (0.3 us of 9), and `put` without its own coroutine.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from queue import SimpleQueue
from typing import Final, TypeAlias

from kvwal.aio.workers import refuse_other_loops, resolve
from kvwal.engine.engine import Engine
from kvwal.engine.own_commits import note
from kvwal.engine.request import CommitRequest
from kvwal.errors import ClosedError, DiskFullError, closed
from kvwal.files import start_thread
from kvwal.keys import Seqno

__all__ = ["Committer", "committed_seqno", "say_committed"]

# What its task waits for, and the bytes that it was admitted with: an operation sets its writes later.
_Entry: TypeAlias = tuple[asyncio.Future[None], int]

_SEQNO_ATTRIBUTE: Final = "kvwal_seqno"
# A callback that is this late may be lost. If it is not, another one is harmless.
_LOST_S: Final = 1.0


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

    __slots__ = ("entries", "failure", "finished", "size", "taken")

    def __init__(self) -> None:
        self.entries: dict[CommitRequest, _Entry] = {}
        #: The bytes of its entries, for the limit; an interruption may leave it wrong until the group has ended.
        self.size = 0
        #: Set by the thread: it has the group.
        self.taken = False
        #: Every request has its outcome. Set by the thread, or where there is none.
        self.finished = False
        #: What went wrong, if it was more than a commit.
        self.failure: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Whatever of it was not done has failed."""
        self.failure = error
        for request in self.entries:
            if not request.done and request.error is None:
                request.error = error


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
        #: Those who wait to be admitted, first come first served.
        self._turns: OrderedDict[CommitRequest, _Entry] = OrderedDict()
        self._open = _Group()
        #: The group that is handed over, which the thread has, or is to have, or has finished without the loop knowing.
        self._current: _Group | None = None
        #: Groups that are finished, and whose tasks are to be woken.
        self._ended: deque[_Group] = deque()
        #: By the loop's clock: until then `_go_on` is about to be called; and so is it by a timer.
        self._scheduled_until_s = self._timer_until_s = -inf
        #: Told when a group has ended, or nothing is pending.
        self._watchers: set[asyncio.Future[None]] = set()
        self._is_ending = False
        #: What commits raise from `end` on.
        self.over: Callable[[], ClosedError] = closed
        # What the thread is to do, None to end; there is no queue as long as there is no thread.
        self._jobs: SimpleQueue[_Group | None] | None = None

    # -- in the loop --------------------------------------------------------------------------

    @property
    def pending_commits(self) -> int:
        """Commits that are admitted, and whose task was not woken yet."""
        current = self._current
        return len(self._open.entries) + (0 if current is None else len(current.entries))

    @property
    def pending_bytes(self) -> int:
        """The bytes that these were admitted with."""
        current = self._current
        return self._open.size + (0 if current is None else current.size)

    async def commit(self, request: CommitRequest) -> Seqno:
        """Commit, and return the seqno (0 for a request without writes)."""
        # First: in a forked child there is no running loop.
        self._engine.state.refuse_if_gone()
        if asyncio.get_running_loop() is not self._loop:
            refuse_other_loops(self._loop)
        # Also of a transaction that was begun before, or a batch that a worker was encoding.
        self._refuse_if_ending()
        size = request.writes.size
        future = self._loop.create_future()
        try:
            if self._turns or not self._fits(size):
                self._turns[request] = future, size
            else:
                self._add(request, (future, size))
            # While the thread is busy, its end is waited for.
            current = self._current
            if (current is None or current.finished) and self._loop.time() >= self._scheduled_until_s:
                self._look_again()
            await future
        except asyncio.CancelledError as error:
            await self._cancelled(request, error)
            raise
        except BaseException:
            # Interrupted: no task is told of it any more.
            self._withdraw(request)
            raise
        if request.error is not None:
            # The pipeline gives all of a group the same exception: begin its traceback anew.
            raise request.error.with_traceback(None)
        if self._events.listeners:
            note(self._events, request.seqno)
        return request.seqno

    def _fits(self, size: int) -> bool:
        """Whether it may be pending beside what is. One that alone is beyond the limit may, when nothing else is."""
        commits = self.pending_commits
        return not commits or (commits < self._max_commits and self.pending_bytes + size <= self._max_bytes)

    def _add(self, request: CommitRequest, entry: _Entry) -> None:
        group = self._open
        # First: no interruption is to let in more than the limit.
        group.size += entry[1]
        group.entries[request] = entry

    def _withdraw(self, request: CommitRequest) -> bool:
        """Forget a commit that was not begun; False if there is none."""
        # From both: an interruption may have come while it was admitted.
        group = self._open
        turn, entry = self._turns.pop(request, None), group.entries.pop(request, None)
        if not group.entries:
            group.size = 0
        elif entry is not None:
            group.size -= entry[1]
        return turn is not None or entry is not None

    def _look_again(self) -> None:
        self._set_timer()
        # After all tasks that are ready now: what they commit belongs into this group.
        self._loop.call_soon(self._go_on)
        self._scheduled_until_s = self._loop.time() + _LOST_S

    def _set_timer(self) -> None:
        now_s = self._loop.time()
        if now_s >= self._timer_until_s:
            self._loop.call_later(_LOST_S, self._go_on)
            self._timer_until_s = now_s + _LOST_S

    def _go_on(self) -> None:
        """Do what is to be done by what is there. Harmless when it comes twice."""
        try:
            self._scheduled_until_s = -inf
            current = self._current
            if current is not None and current.finished:
                self._take_back(current)
            # Before the hand-over, which is not to take one whose admission was interrupted, and leave it its turn.
            self._admit()
            # First of all keep the thread busy.
            self._hand_over()
            self._tell()
            if not self._is_idle():
                self._set_timer()
        except BaseException:
            self._look_again()
            raise

    def _take_back(self, group: _Group) -> None:
        self._ended.append(group)
        if not group.entries and group.failure is not None:
            # Nothing in the open group can be written: memory is short, an archive behind, or no thread is to be had.
            self._open.fail(group.failure)
            self._ended.append(self._open)
            self._open = _Group()
        self._current = None

    def _admit(self) -> None:
        """Let in those whose turn it is."""
        turns = self._turns
        while turns:
            request, entry = next(iter(turns.items()))
            if request not in self._open.entries:
                if not self._fits(entry[1]):
                    return
                self._add(request, entry)
            turns.pop(request, None)

    def _hand_over(self) -> None:
        if self._current is None:
            group = self._open
            # Their tasks were cancelled, and did not run since.
            for request in [request for request, (future, _) in group.entries.items() if future.cancelled()]:
                self._withdraw(request)
            if not group.entries:
                return
            pressure = self._engine.pressure
            if pressure.is_on and pressure.would_wait():
                self._current = _Group()
            else:
                # No interruption comes between the two.
                self._current, self._open = group, _Group()
        group = self._current
        if group.taken:
            return
        try:
            jobs = self._jobs or self._start()
        except Exception as error:  # noqa: BLE001  # it goes to the tasks, which wait for an answer
            group.fail(error)
            group.finished = True
            self._look_again()
        else:
            jobs.put(group)

    def _tell(self) -> None:
        """Wake the tasks of what has ended, and those who wait for an end."""
        ended = self._ended
        while ended:
            for future, _ in ended[0].entries.values():
                resolve(future, None)
            self._wake_watchers()
            ended.popleft()
        if self._is_idle():
            self._wake_watchers()

    def _wake_watchers(self) -> None:
        for watcher in self._watchers:
            resolve(watcher, None)

    async def _watch(self) -> None:
        """Sleep until a group has ended or nothing is pending, or until this task is cancelled."""
        watcher = self._loop.create_future()
        self._watchers.add(watcher)
        try:
            with suppress(asyncio.CancelledError):
                await watcher
        finally:
            self._watchers.discard(watcher)

    async def _cancelled(self, request: CommitRequest, error: asyncio.CancelledError) -> None:
        """The task was cancelled: withdraw the commit, or wait for its end and say how it ended."""
        if self._withdraw(request):
            # Others may fit where this one did not.
            self._look_again()
            return
        while True:
            self._go_on()
            current = self._current
            if current is None or current.finished or request not in current.entries:
                break
            await self._watch()
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

    def _is_idle(self) -> bool:
        return not self._turns and not self.pending_commits

    async def drain(self) -> None:
        """Wait until nothing is pending, even when cancelled."""
        while True:
            self._go_on()
            if self._is_idle():
                return
            await self._watch()

    # -- in the thread ------------------------------------------------------------------------

    def _start(self) -> SimpleQueue[_Group | None]:
        """Start the thread, with a queue of its own."""
        jobs: SimpleQueue[_Group | None] = SimpleQueue()
        # A daemon, so that it keeps no process alive: a commit under way is ended by Store.close at exit.
        thread = threading.Thread(target=self._run, args=(jobs,), name="kvwal-aio-committer", daemon=True)
        try:
            start_thread(thread)
            self._jobs = jobs
        except BaseException:
            # The next group may get one. Where this was interrupted, it may run all the same: then it ends.
            self._jobs = None
            jobs.put(None)
            raise
        return jobs

    def stop(self) -> None:
        """Let the thread end when it has done what it was given. From any thread, and from a finalizer."""
        jobs = self._jobs
        if jobs is not None:
            jobs.put(None)

    def _run(self, jobs: SimpleQueue[_Group | None]) -> None:
        while (group := jobs.get()) is not None:
            if not group.taken:
                group.taken = True
                try:
                    self._work(group)
                except BaseException as error:  # noqa: BLE001  # whatever it is, tasks wait for an answer
                    group.fail(error)
                group.finished = True
                try:
                    self._loop.call_soon_threadsafe(self._go_on)
                except RuntimeError:
                    pass  # The loop is closed: the commits are made, and no task is left to be told.
            del group

    def _work(self, group: _Group) -> None:
        queue, pressure = self._engine.queue, self._engine.pressure
        requests = list(group.entries)
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
