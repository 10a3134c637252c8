"""Who waits for commits to be durable, and how they are woken.

A flush wakes one thread, and each thread that was woken wakes the next. To wake ten of them takes 75 us, which the
commit would wait for; and they would then take the interpreter from the next one, all at once.

Invariant: a thread whose turn has come passes it on, whatever it was woken by or interrupted in. Where that fails, in
the few instructions before it, the next flush, idle mark or thread that begins to wait goes on with those left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from kvwal.keys import Seqno

__all__ = ["Waiting"]

_FOR_EVER: Final = -1


def _nothing() -> None:
    """Nothing waits."""


class _Turn:
    """A thread that waits for its turn."""

    __slots__ = ("_lock", "is_over")

    def __init__(self) -> None:
        #: It waits no more.
        self.is_over = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        """It has come."""
        self._lock.release()

    def wait(self, timeout_s: float | None) -> None:
        """Wait for it, at most so long (None: for ever)."""
        self._lock.acquire(timeout=_FOR_EVER if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))


class Waiting:
    """Those who wait for a log. From any thread, but for `wake`."""

    __slots__ = ("_due", "_is_beyond", "_tell", "those")

    def __init__(self, is_beyond: Callable[[Seqno], bool]) -> None:
        """`is_beyond`: whether commits beyond this one are durable. It raises if none ever will be."""
        self._is_beyond = is_beyond
        #: Called by the next flush, if there are any.
        self.those: deque[Callable[[], object]] = deque()
        # Threads that need not wait any longer, and were not told.
        self._due: deque[_Turn] = deque()
        # Called by each flush, after those.
        self._tell: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return bool(self.those)

    def await_beyond(self, seqno: Seqno, timeout_s: float | None) -> bool:
        """Wait until commits beyond `seqno` are durable; whether they are. PoisonedError if none ever will be."""
        self.pass_on()
        turn = _Turn()
        take_back = self.when_beyond(seqno, turn)
        try:
            turn.wait(timeout_s)
        finally:
            # First: a flush may have it in its hands.
            turn.is_over = True
            if not take_back():
                self.pass_on()
        return self._is_beyond(seqno)

    def when_beyond(self, seqno: Seqno, wake: Callable[[], object]) -> Callable[[], bool]:
        """Have `wake` called, once, when commits beyond `seqno` are durable, or none ever will be.

        Returns what takes that back, and says whether it was still to come. The leader calls `wake`, so it must be
        short and not raise. PoisonedError if none ever will be.
        """
        self.those.append(wake)

        def take_back() -> bool:
            for each in (self.those, self._due):
                try:
                    each.remove(wake)  # type: ignore[arg-type]  # of the second, it is a turn
                except ValueError:
                    continue
                return True
            return False  # It was called just now.

        # Looked at after it is there: a flush either calls it, or came before and is seen here.
        try:
            beyond = self._is_beyond(seqno)
        except BaseException:
            take_back()
            raise
        if beyond and take_back():
            wake()
        return take_back

    def tell_flushes(self, tell: Callable[[], None] | None) -> None:
        """Have `tell` called after each flush from now on; None: nothing. The leader calls it: it never raises."""
        self._tell = tell
        if tell is not None and not self.those:
            # So that a flush looks here; one without need not ask for more.
            self.those.append(_nothing)

    def wake(self) -> None:
        """A flush made commits durable, or none ever will be. One caller at a time."""
        # What is added meanwhile looks for itself whether it is late.
        for _ in range(len(self.those)):
            try:
                wake = self.those.popleft()
            except IndexError:
                break
            if isinstance(wake, _Turn):
                self._due.append(wake)
            else:
                wake()
        self.pass_on()
        tell = self._tell
        if tell is not None:
            self.those.append(_nothing)
            tell()

    def pass_on(self) -> None:
        """Wake the next thread, if there is one."""
        while self._due:
            try:
                turn = self._due.popleft()
            except IndexError:
                return
            if not turn.is_over:
                turn()
                return
