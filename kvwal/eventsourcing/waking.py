"""Waiting for commits without looking for them again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

from kvwal.db.handle import Uncopied
from kvwal.engine.engine import Engine
from kvwal.errors import poisoned
from kvwal.events import CommitGroup, Poison, Waiting
from kvwal.eventsourcing.failures import raising_persistence_errors
from kvwal.finalizing import quiet_at_exit
from kvwal.locks import wake

__all__ = ["Following", "Wakeups"]

_T = TypeVar("_T")


class Wakeups(Waiting):
    """Wakes one thread whenever commits have become visible, or none can come any more. Use it in a `with` block.

    The commit leader calls it. What it does is one step in C: a signal handler that commits never finds it half done.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiter = threading.Lock()
        self._waiter.acquire()
        self._cause: BaseException | None = None
        engine.queue.events.add(self)
        try:
            # A group that was under way is not told.
            engine.queue.run(lambda: None)
        except BaseException:
            self.end()
            raise

    def commit_group(self, event: CommitGroup) -> None:
        """See `Listener`."""
        wake(self._waiter)

    def poison(self, event: Poison) -> None:
        """See `Listener`."""
        # Kept, since this comes before commits are refused.
        self._cause = event.cause
        wake(self._waiter)

    def wake(self) -> None:
        """See `Waiting`."""
        wake(self._waiter)

    @raising_persistence_errors
    def wait(self, timeout_s: float | None = None) -> None:
        """Wait, at most so long, for what came since it was waited last. OperationalError if nothing can come."""
        if self._cause is not None:
            # So a close need not say it.
            self._engine.queue.told_feed = True
            raise poisoned(self._cause)
        self._waiter.acquire(timeout=-1 if timeout_s is None else min(max(timeout_s, 0), threading.TIMEOUT_MAX))

    def end(self) -> None:
        """Hear no more. Idempotent."""
        self._engine.queue.events.remove(self)

    def __enter__(self) -> Wakeups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Following(Uncopied, Generic[_T]):
    """What there is beyond a position, and then what comes, for one thread, which a commit or `end` wakes.

    `read_on` gives what there is beyond a position, and the position up to which there is nothing else. It raises where
    nothing can come any more.
    """

    def __init__(self, wakeups: Wakeups, read_on: Callable[[int], tuple[list[_T], int]], after: int | None) -> None:
        self._wakeups = wakeups
        self._read_on = read_on
        # What was read and not given yet, and the position behind it. Set in one step: an interruption between the two
        # would lose what was read.
        self._read: tuple[Iterator[_T], int] = iter(()), max(after or 0, 0)
        self._ended = False

    def next(self) -> _T:
        """The next one, once it is there. StopIteration after `end`."""
        while not self._ended:
            left, position = self._read
            for each in left:
                return each
            found, position = self._read_on(position)
            self._read = iter(found), position
            if not found:
                self._wakeups.wait()
        raise StopIteration

    def end(self) -> None:
        """Wait no more, in whatever thread that is. Idempotent."""
        self._ended = True
        self._wakeups.end()
        self._wakeups.wake()

    @quiet_at_exit
    def __del__(self) -> None:
        self._wakeups.end()
