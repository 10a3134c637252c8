"""Threads for what may wait for a disk: a few that live long for short reads, one of its own for a long task.

A read of one page costs about as much as handing it to a thread, so reads that queue up are taken by the
handful, and all results of a handful go back to the loop with one call.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, ParamSpec, TypeAlias, TypeVar

from kvwal.errors import UsageError
from kvwal.files import start_thread

__all__ = ["Workers", "in_thread", "refuse_other_loops", "resolve", "the_end_of", "to_the_end", "untold"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

_Job: TypeAlias = "tuple[Callable[[], Any], asyncio.Future[Any]]"
_Result: TypeAlias = "tuple[asyncio.Future[Any], Any, BaseException | None]"

# Enough to keep a disk busy with reads; more only wait for the interpreter's lock.
_MAX_THREADS: Final = 4
_MAX_HANDFUL: Final = 32


class Workers:
    """Runs short functions of one loop in its threads, which are started when they are needed.

    Every function that is given is run, even if its task was cancelled: it may hold a pin to be given back. So is one
    that comes after `stop`, for what is still read of a store that stays open, by a thread of its own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        #: Those that have not been told to end.
        self._threads = 0
        self._stopped = False
        #: What the loop is to be told.
        self._finished: deque[_Result] = deque()
        #: Jobs that were given and are not answered yet; the loop's thread counts.
        self._waiting = 0

    def submit(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> asyncio.Future[_T]:
        """Run the function soon. Cancelling the future only means that no task sees the result."""
        self.refuse_other_loops()
        future: asyncio.Future[_T] = self._loop.create_future()
        self._waiting += 1
        job: _Job = (lambda: function(*args, **kwargs), future)
        # First: a finalizer may call `stop` at any place here, and the threads that it ends do what was given before.
        self._jobs.put(job)
        if self._stopped or self._waiting > self._threads < _MAX_THREADS:
            try:
                self._start()
            except Exception:
                # Without a thread more, those that run do it.
                if not self._threads and self._take_back(job):
                    self._waiting -= 1
                    raise
            else:
                if self._stopped:
                    self._jobs.put(None)
                else:
                    self._threads += 1
        return future

    async def to_the_end(
        self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> tuple[_T, BaseException | None]:
        """Run the function soon, and wait for its end even when cancelled: as the function of this name."""
        return await the_end_of(self.submit(function, *args, **kwargs), self._answer)

    def _take_back(self, job: _Job) -> bool:
        """Take a job out of the queue; False if a thread has it."""
        others: list[_Job | None] = []
        try:
            while True:
                others.append(self._jobs.get_nowait())
        except Empty:
            pass
        is_there = job in others
        for other in others:
            if other is not job:
                self._jobs.put(other)
        return is_there

    def _start(self) -> None:
        start_thread(threading.Thread(target=self._work, name="kvwal-aio-reader", daemon=True))

    def refuse_other_loops(self) -> None:
        """UsageError if the caller does not run in this loop."""
        refuse_other_loops(self._loop)

    def stop(self) -> None:
        """Let the threads end when they have done what they were given. From any thread, and from a finalizer."""
        self._stopped = True
        threads, self._threads = self._threads, 0
        for _ in range(threads):
            self._jobs.put(None)

    def _work(self) -> None:
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            results = [_run(job)]
            # A fair share of what waits.
            for _ in range(min(jobs.qsize() // _MAX_THREADS, _MAX_HANDFUL)):
                try:
                    job = jobs.get_nowait()
                except Empty:
                    break
                if job is None:
                    jobs.put(None)
                    break
                results.append(_run(job))
            # Nothing of a job may stay behind while this thread sleeps: it may hold a pin.
            job = None
            self._finished.extend(results)
            del results
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:
                # The loop is closed: no task waits any more.
                self._finished.clear()

    def _answer(self) -> None:
        """Deliver what the threads have finished. Harmless when it comes twice; an interruption may lose a call."""
        finished = self._finished
        try:
            while finished:
                resolve(*finished[0])
                finished.popleft()
                self._waiting -= 1
        except BaseException:
            self._loop.call_soon(self._answer)
            raise


def _run(job: _Job) -> _Result:
    function, future = job
    try:
        return future, function(), None
    except BaseException as error:  # noqa: BLE001  # it goes to the task that asked
        return future, None, error


def resolve(future: asyncio.Future[_T], result: _T, error: BaseException | None = None) -> bool:
    """End a future that may have been cancelled; False if it was.

    A look at the future beforehand is not enough: the handler of SIGINT of `asyncio.run` cancels the main task, and
    through it whatever that one awaits, between any two instructions of this thread.
    """
    try:
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):
            # A future refuses this one.
            future.set_exception(RuntimeError("StopIteration"))
        else:
            future.set_exception(error)
    except asyncio.InvalidStateError:
        return False
    return True


def refuse_other_loops(loop: asyncio.AbstractEventLoop) -> None:
    """UsageError if the caller does not run in `loop`."""
    if asyncio.get_running_loop() is not loop:
        raise UsageError(
            "this belongs to another event loop; give each loop an AsyncStore of its own, over the same Store: "
            "kvwal.aio.AsyncStore(store)"
        )


async def in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The result of a function that may take long, run in a thread of its own. Cancelling does not stop it."""
    return await asyncio.shield(untold(_started(function, *args, **kwargs)))


def untold(future: asyncio.Future[_T]) -> asyncio.Future[_T]:
    """The same future. If it fails when no task awaits it any more, asyncio does not complain."""

    def look(future: asyncio.Future[_T]) -> None:
        if not future.cancelled():
            future.exception()

    future.add_done_callback(look)
    return future


async def to_the_end(
    function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> tuple[_T, BaseException | None]:
    """Like `in_thread`, but as `the_end_of`: it waits for the end even when cancelled."""
    return await the_end_of(_started(function, *args, **kwargs))


async def the_end_of(
    future: asyncio.Future[_T], look: Callable[[], object] | None = None
) -> tuple[_T, BaseException | None]:
    """The result of a future, which is waited for even when cancelled, and the cancellation if there was.

    A cancellation that comes before the future fails is raised in place of the failure, which is its cause. `look` ends
    the future if its end was not told: all tasks are cancelled after an interruption, which may lose a callback.
    """
    cancelled: BaseException | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            if look is not None:
                look()
    if cancelled is not None and not future.cancelled() and (failure := future.exception()) is not None:
        raise cancelled from failure
    return future.result(), cancelled


def _started(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> asyncio.Future[_T]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()
    # So that what it commits is one of the task's own commits.
    context = contextvars.copy_context()

    def work() -> None:
        result = _run((lambda: context.run(function, *args, **kwargs), future))
        # A loop that is closed has no task that waits.
        with suppress(RuntimeError):
            # Twice: an interruption of the loop may lose a callback.
            for _ in range(2):
                loop.call_soon_threadsafe(resolve, *result)

    start_thread(threading.Thread(target=work, name="kvwal-aio-task", daemon=True))
    return future
