"""The time of one open store, by which its commits are stamped, and what expires and what is kept is judged.

It is the wall clock, but never goes back:

| the wall clock | the time |
|---|---|
| goes on, or steps ahead by an hour at most | is the wall clock |
| stepped ahead by more | goes on by the monotonic clock, until the step has stood for ten minutes |
| was set back | goes on by nine tenths of the monotonic clock, until the wall clock has caught up |

Opening begins anew: whatever the wall clock says then is believed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

__all__ = ["StoreClock"]

_log = logging.getLogger("kvwal")

_MAX_STEP_US: Final = 3_600_000_000
_BELIEVED_AFTER_S: Final = 600.0
_US_PER_S: Final = 1_000_000
# Slower, since at the full pace it would stay ahead for as long as the store is open.
_BEHIND_US_PER_S: Final = 900_000


class StoreClock:
    """The time of one open store. From any thread."""

    __slots__ = ("_ahead_since_s", "_base", "_last_us", "_limit_us", "_monotonic_s", "_pace", "_wall_us")

    def __init__(self, wall_us: Callable[[], int], monotonic_s: Callable[[], float]) -> None:
        self._wall_us = wall_us
        self._monotonic_s = monotonic_s
        self._last_us = 0
        self._ahead_since_s: float | None = None
        self._believe(wall_us(), monotonic_s())

    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""
        wall_us = self._wall_us()
        # Up to an hour after the base no step of more than an hour is possible, so the monotonic clock is not asked.
        if self._last_us <= wall_us < self._limit_us:
            self._last_us = wall_us
            return wall_us
        return self._judged(wall_us, self._monotonic_s())

    def _judged(self, wall_us: int, at_s: float) -> int:
        base_us, base_s = self._base
        # What is expected of a clock that goes on.
        now_us = max(self._last_us, base_us + int((at_s - base_s) * self._pace))
        if wall_us < self._last_us:
            if self._pace != _BEHIND_US_PER_S:
                self._go_on_from(now_us, at_s, _BEHIND_US_PER_S)
            self._ahead_since_s = None
        elif wall_us - now_us <= _MAX_STEP_US:
            self._believe(wall_us, at_s)
            return wall_us
        elif self._ahead_since_s is None:
            self._go_on_from(now_us, at_s, self._pace)
            self._ahead_since_s = at_s
        elif at_s - self._ahead_since_s >= _BELIEVED_AFTER_S:
            _log.warning("the wall clock went ahead by %.0f s; believed now", (wall_us - now_us) / _US_PER_S)
            self._believe(wall_us, at_s)
            return wall_us
        self._last_us = now_us
        return now_us

    def _believe(self, wall_us: int, at_s: float) -> None:
        self._go_on_from(wall_us, at_s, _US_PER_S)
        self._ahead_since_s = None
        self._last_us = wall_us
        self._limit_us = wall_us + _MAX_STEP_US

    def _go_on_from(self, us: int, at_s: float, pace: int) -> None:
        # Each look comes here from now on, so that a step which is taken back is seen to be.
        self._limit_us = 0
        # In one object, so that another thread finds both.
        self._base = us, at_s
        self._pace = pace
