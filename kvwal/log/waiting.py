"""Who waits for commits to be durable, and how they are woken.

A flush wakes one thread, and each thread that was woken wakes the next. To wake ten of them takes 75 us, which the
commit would wait for; and they would then take the interpreter from the next one, all at once.

Invariant: a thread whose turn has come passes it on, whatever it was woken by or interrupted in. What a leader that was
interrupted left undone is done by the next flush, idle mark, or thread that begins to wait or has waited.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from kvwal.keys import Seqno

__all__ = ["Waiting"]

_FOR_EVER: Final = -1


class _Turn:
    """A thread that waits for its turn."""

    __slots__ = ("_lock", "is_over")

    def __init__(self) -> None:
        #: It waits no more.
        self.is_over = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        """It has come. Idempotent."""
        with suppress(RuntimeError):
            self._lock.release()

    def wait(self, timeout_s: float | None) -> None:
        """Wait for it, at most so long (None: for ever)."""
        self._lock.acquire(timeout=_FOR_EVER if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX))


class Waiting:
    """Those who wait for a log. From any thread, but for `wake`."""

    __slots__ = ("_is_beyond", "due", "tell", "those")

    def __init__(self, is_beyond: Callable[[Seqno], bool]) -> None:
        """`is_beyond`: whether commits beyond this one are durable. It raises if none ever will be."""
        self._is_beyond = is_beyond
        #: Called by the next flush, if there are any.
        self.those: deque[Callable[[], object]] = deque()
        #: Threads that need not wait any longer. The first one was woken, unless that was interrupted.
        self.due: deque[_Turn] = deque()
        #: Called by each flush, after those: it never raises.
        self.tell: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return bool(self.those or self.due)

    def await_beyond(self, seqno: Seqno, timeout_s: float | None) -> bool:
        """Wait until commits beyond `seqno` are durable; whether they are. PoisonedError if none ever will be."""
        self.pass_on()
        turn = _Turn()
        try:
            self.when_beyond(seqno, turn)
            turn.wait(timeout_s)
        finally:
            # First: a flush may be about to make it due.
            turn.is_over = True
            self._take_back(turn)
            self.pass_on()
        return self._is_beyond(seqno)

    def when_beyond(self, seqno: Seqno, wake: Callable[[], object]) -> Callable[[], bool]:
        """Have `wake` called, once, when commits beyond `seqno` are durable, or none ever will be.

        Returns what takes that back, and says whether it was still to come. The leader calls `wake`, so it must be
        short and not raise. PoisonedError if none ever will be.
        """
        self.those.append(wake)
        # Looked at after it is there: a flush either calls it, or came before and is seen here.
        try:
            beyond = self._is_beyond(seqno)
        except BaseException:
            self._take_back(wake)
            raise
        if beyond and self._take_back(wake):
            wake()
        return partial(self._take_back, wake)

    def _take_back(self, wake: Callable[[], object]) -> bool:
        """Whether it was there. If not, it is called just now, or was."""
        found = False
        for each in (self.those, self.due):
            with suppress(ValueError):
                each.remove(wake)  # type: ignore[arg-type]  # of the second, it is a turn
                found = True
        return found

    def wake(self) -> None:
        """A flush made commits durable, or none ever will be. One caller at a time."""
        those = self.those
        # What is added meanwhile looks for itself whether it is late.
        for _ in range(len(those)):
            try:
                wake = those[0]
                if isinstance(wake, _Turn):
                    # First: interrupted in between, it is in both, and woken all the same.
                    self.due.append(wake)
                those.remove(wake)
            except (IndexError, ValueError):
                # It gave up just now.
                continue
            if not isinstance(wake, _Turn):
                wake()
        self.pass_on()
        tell = self.tell
        if tell is not None:
            tell()

    def pass_on(self) -> None:
        """Wake the next thread, if there is one."""
        # It stays there until it has woken up: what is interrupted here is done again by the next caller.
        while self.due:
            try:
                turn = self.due[0]
            except IndexError:
                return
            if not turn.is_over:
                turn()
                return
            with suppress(ValueError):
                self.due.remove(turn)
