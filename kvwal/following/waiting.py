"""Who waits for commits of a follower without a thread of its own, and whether what it shows may be too old."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from kvwal.errors import StaleError
from kvwal.keys import Seqno

__all__ = ["Freshness", "Waiting"]


class _Wait:
    """One that waits for a commit beyond this one."""

    __slots__ = ("failure", "seqno", "wake")

    def __init__(self, seqno: Seqno, wake: Callable[[], object]) -> None:
        self.seqno = seqno
        self.wake = wake
        #: What ended it.
        self.failure: Exception | None = None


class Waiting:
    """Those to be told of a commit beyond one. From any thread."""

    def __init__(self, newest: Callable[[], Seqno]) -> None:
        """`newest`: the last commit that is shown."""
        self._newest = newest
        self._those: dict[_Wait, None] = {}
        #: Called before one is added; it may raise.
        self.asked: Callable[[], object] = lambda: None

    def __bool__(self) -> bool:
        return bool(self._those)

    def when_beyond(self, seqno: Seqno, wake: Callable[[], object]) -> Callable[[], Exception | None]:
        """Have `wake` called once there is a commit beyond this one, or `wake_all` is.

        Returns what takes that back, and gives what `wake_all` was told of meanwhile.

        The thread that moves the follower calls it, so it must be short and not raise. Nothing moves it but what is
        told by `asked`.
        """
        self.asked()
        wait = _Wait(seqno, wake)
        self._those[wait] = None
        self.wake()
        return partial(self._take_back, wait)

    def _take_back(self, wait: _Wait) -> Exception | None:
        self._those.pop(wait, None)
        return wait.failure

    def wake(self) -> None:
        """Tell those for whom there is a commit now."""
        newest = self._newest()
        for wait in list(self._those) if self._those else ():
            if wait.seqno < newest:
                wait.wake()

    def wake_all(self, failure: Exception | None = None) -> None:
        """Tell each of those, and no one who comes later, that this is wrong; None: they find out as they go on."""
        for wait in list(self._those):
            wait.failure = failure
            wait.wake()


class Freshness:
    """Whether what is shown is not too old."""

    def __init__(self, refresh: Callable[[], object]) -> None:
        self._refresh = refresh
        #: What is shown may lack no commit that was made longer ago than this, in seconds; None: any.
        self.max_lag_s: float | None = None
        # When all there was was shown last, by the monotonic clock.
        self._current_s = -math.inf

    def showed_all(self, at_s: float) -> None:
        """All there was at this time is shown."""
        self._current_s = at_s

    def holds(self) -> bool:
        """Whether what is shown is not older than `max_lag_s`."""
        return self.max_lag_s is None or time.monotonic() - self._current_s <= self.max_lag_s

    def ensure(self) -> None:
        """Move if what is shown may be older than `max_lag_s`. StaleError if it may be then, too."""
        if self.holds():
            return
        self._refresh()
        lag_s = time.monotonic() - self._current_s
        if self.max_lag_s is not None and lag_s > self.max_lag_s:
            raise StaleError(lag_s, self.max_lag_s)
