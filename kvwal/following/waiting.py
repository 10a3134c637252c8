"""Who waits for commits of a follower without a thread of its own, and whether what it shows may be too old."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from kvwal.errors import StaleError
from kvwal.keys import Seqno

__all__ = ["Freshness", "Waiting"]

# It is renewed once it may be older than this share of what is allowed. Until that helps, looks come so often.
_RENEWED_SHARE: Final = 1 / 2
_LOOKED_SHARE: Final = 1 / 16
# A read that comes too late for that waits at most so long, and sleeps between two looks: at first, and at most.
_MOST_WAIT_S: Final = 0.25
_FIRST_SLEEP_S: Final = 0.002
_MOST_SLEEP_S: Final = 0.02


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
    """Whether what is shown is not too old.

    Beside a writer that commits all the time no look finds that all there is can be shown: the last commits are not on
    disk yet. So a look remembers what there was when it began. Once that is shown, no commit is missing that was made
    before that look, however many came since.

    Invariant: commits that are on disk stay, in their order. So those that were there, and are not lost since, have at
    most the number that was the last one then, whatever a recovery cut off and gave the number of.
    """

    def __init__(self, refresh: Callable[[], object]) -> None:
        self._refresh = refresh
        #: What is shown may lack no commit that was made longer ago than this, in seconds; None: any.
        self.max_lag_s: float | None = None
        # When all there was was shown last, by the monotonic clock; until when no read looks; when one waited in vain
        # last.
        self._current_s = self._young_until_s = self._waited_s = -math.inf
        # The last commit that a look found which is not shown yet, and when that look began.
        self._found: tuple[Seqno, float] | None = None

    def found_all(self, at_s: float, last: Seqno) -> None:
        """All commits that there were at this time were found, up to this one. To be followed by `shows`."""
        if self._found is None:
            self._found = last, at_s
        elif last < self._found[0]:
            # What a recovery cut off is waited for no longer.
            self._found = last, self._found[1]

    def shows(self, seqno: Seqno) -> None:
        """All commits up to this one are shown."""
        if self._found is not None and self._found[0] <= seqno:
            self._current_s, self._found = self._found[1], None
            if self.max_lag_s is not None:
                self._young_until_s = self._current_s + self.max_lag_s * _RENEWED_SHARE

    def holds(self) -> bool:
        """Whether what is shown is young, and no look is due."""
        return self.max_lag_s is None or time.monotonic() <= self._young_until_s

    def ensure(self) -> None:
        """Move if what is shown may soon be older than `max_lag_s`. StaleError if it may be then, too."""
        if self.holds():
            return
        self._refresh()
        now_s, most_s = time.monotonic(), self.max_lag_s
        if most_s is None or now_s <= self._young_until_s:
            return
        if now_s - self._current_s > most_s:
            self._await_young(now_s, most_s)
        else:
            # What this look found is shown by one of the next.
            self._young_until_s = min(now_s + most_s * _LOOKED_SHARE, self._current_s + most_s)

    def _await_young(self, now_s: float, most_s: float) -> None:
        """Look until what there was just now is shown: its writer is about to say that it is on disk. StaleError.

        One that waited in vain has the next ones not wait, for as long as what is shown may be old.
        """
        waits = now_s - self._waited_s > most_s
        sleep_s, until_s = _FIRST_SLEEP_S, now_s + min(most_s, _MOST_WAIT_S) if waits else now_s
        while now_s - self._current_s > most_s:
            if now_s >= until_s:
                if waits:
                    self._waited_s = now_s
                raise StaleError(now_s - self._current_s, most_s)
            time.sleep(min(sleep_s, until_s - now_s))
            sleep_s = min(2 * sleep_s, _MOST_SLEEP_S)
            self._refresh()
            now_s = time.monotonic()
