"""The commit window: a leader waits for the threads that the last flush served, so that the next one serves all.

Without it, threads that commit in a loop fall into two halves, each waiting for the flush of the other, and twice as
many flushes are made. The wait is a part of what a flush takes, and ends as soon as as many are here as there were; a
thread alone never waits.
"""

from __future__ import annotations

import threading
from collections.abc import Sized
from typing import Final

from kvwal.locks import wake

__all__ = ["Window"]

# How long a leader waits, as a part of the time of a flush.
_PART: Final = 0.5


class Window:
    """How many threads commit at a time, and how long a flush takes."""

    __slots__ = ("_flush_s", "_sleeper", "expected", "is_open")

    def __init__(self) -> None:
        self.expected = 0
        self.is_open = False
        self._flush_s = 0.0
        # What the leader sleeps on.
        self._sleeper = threading.Lock()

    def wait(self, queue: Sized) -> None:
        """Until as many requests are in the queue as are expected, or too long. Requires: the lead."""
        self._sleeper.acquire(blocking=False)
        self.is_open = True
        # Checked again: the last committer may have arrived before the window was open.
        if len(queue) < self.expected:
            self._sleeper.acquire(timeout=self._flush_s * _PART)
        self.is_open = False

    def arrived(self, count: int) -> None:
        """The queue has `count` requests now. Requires: `is_open`."""
        if count >= self.expected:
            wake(self._sleeper)

    def flushed(self, seconds: float) -> None:
        """A flush took this long."""
        self._flush_s += (seconds - self._flush_s) / 8
