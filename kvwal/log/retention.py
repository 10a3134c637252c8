"""Which part of the log may go: named holds, and the settings. Nothing else decides it.

A segment may be removed when recovery does not need it, no hold does, and it is not among what `retain_bytes` and
`retain_s` keep. It goes from the oldest on, and never the newest.

Age is judged by wall clocks, and a wall clock may be wrong: a segment began when the smallest wall clock of it and of
all later segments says. So one that was made while the clock stood a year ahead looks a year young only until the next
one is made. What the clock says *now* is believed as `TrustedClock` says.

Invariant: `hold` registers before it looks at what is gone, and `release_before` says what is gone before it looks at
the holds again. So of a hold and a removal that come at the same time one sees the other, without a lock.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from kvwal.errors import FeedGap
from kvwal.keys import Seqno
from kvwal.log.protocol import LogOptions
from kvwal.log.segment import SegmentInfo

__all__ = ["Hold", "HoldInfo", "Retention", "TrustedClock", "refuse_gap"]

_log = logging.getLogger("kvwal")

#: A wall clock that ran ahead of the monotonic one by more than this, in seconds, is believed only after it has stood
#: so for `_BELIEVED_AFTER_S`.
MAX_CLOCK_STEP_S: Final = 3600.0
_BELIEVED_AFTER_S: Final = 600.0


class TrustedClock:
    """The wall clock, but for a step ahead of more than an hour, which must have stood for ten minutes."""

    def __init__(self, now_us: Callable[[], int], monotonic_s: Callable[[], float]) -> None:
        self._now_us = now_us
        self._monotonic_s = monotonic_s
        self._wall_us = now_us()
        self._at_s = monotonic_s()
        self._ahead_since_s: float | None = None

    def now_us(self) -> int:
        """Microseconds since 1970 UTC, as far as they are to be believed."""
        wall_us, at_s = self._now_us(), self._monotonic_s()
        expected_us = self._wall_us + int((at_s - self._at_s) * 1e6)
        if wall_us - expected_us > MAX_CLOCK_STEP_S * 1e6:
            if self._ahead_since_s is None:
                self._ahead_since_s = at_s
            if at_s - self._ahead_since_s < _BELIEVED_AFTER_S:
                return expected_us
            _log.warning("the wall clock went ahead by %.0f s; believed now", (wall_us - expected_us) / 1e6)
        self._wall_us, self._at_s, self._ahead_since_s = wall_us, at_s, None
        return wall_us


@dataclass(frozen=True, slots=True)
class HoldInfo:
    """Who holds log, as `SegmentLog.holds` lists it.

    Attributes:
        name: what for: "history", or what the caller of `SegmentLog.read` says.
        after: commits beyond this one are held.
        since_us: since when, microseconds since 1970 UTC.
    """

    name: str
    after: Seqno
    since_us: int


class Hold:
    """Keeps the commits beyond a seqno until it is released or collected."""

    __slots__ = ("_holds", "key", "after")

    def __init__(self, holds: dict[int, HoldInfo], key: int, after: Seqno) -> None:
        self.key = key
        #: The commits beyond this one are held.
        self.after = after
        # Last: a finalizer that finds it finds the others.
        self._holds = holds

    def advance(self, after: Seqno) -> None:
        """What is up to `after` is held no longer."""
        info = self._holds.get(self.key)
        if info is not None and after > info.after:
            self._holds[self.key] = HoldInfo(info.name, after, info.since_us)
            self.after = after

    def release(self) -> None:
        """Hold nothing any more. Idempotent; from any thread, and from a finalizer."""
        holds = getattr(self, "_holds", None)
        if holds is not None:
            holds.pop(self.key, None)

    __del__ = release


class Retention:
    """The holds on one log."""

    def __init__(self, options: LogOptions, now_us: Callable[[], int], monotonic_s: Callable[[], float]) -> None:
        self._retain_bytes = options.retain_bytes
        self._retain_us = int(min(options.retain_s * 1e6, 1 << 62))
        self._clock = TrustedClock(now_us, monotonic_s)
        self._holds: dict[int, HoldInfo] = {}
        self._keys = itertools.count()
        # Commits up to this one may be gone.
        self._gone = Seqno(0)

    def hold(
        self, name: str, after: Seqno | None, segments: Sequence[SegmentInfo], newest: Seqno, time_us: int
    ) -> Hold:
        """Hold the commits beyond `after` (None: all that are kept). FeedGap if one of them is gone.

        Args:
            segments: what is there now. newest: the last commit. time_us: of that commit.
        """
        hold = Hold(self._holds, next(self._keys), Seqno(0) if after is None else after)
        self._holds[hold.key] = HoldInfo(name, hold.after, self._clock.now_us())
        oldest = Seqno(max(self._gone, segments[0].first_seqno - 1))
        if after is None:
            hold.advance(oldest)
            return hold
        try:
            refuse_gap(after, oldest, segments, newest, time_us)
        except FeedGap:
            hold.release()
            raise
        return hold

    def holds(self) -> list[HoldInfo]:
        """Who holds what, since when; in no order."""
        return list(self._holds.values())

    def release_before(self, below: Seqno, segments: Sequence[SegmentInfo]) -> int:
        """How many of the segments, from the oldest on, go: recovery needs only the commits from `below` on."""
        before = self._gone
        n = self._removable(below, segments)
        if n:
            self._gone = Seqno(segments[n].first_seqno - 1)
            n = min(n, self._removable(below, segments))
            self._gone = Seqno(max(before, segments[n].first_seqno - 1))
        return n

    def _removable(self, below: Seqno, segments: Sequence[SegmentInfo]) -> int:
        needed = min([below - 1, *(hold.after for hold in list(self._holds.values()))])
        n = 0
        while n + 1 < len(segments) and segments[n + 1].first_seqno <= needed + 1:
            n += 1
        kept = 0
        while n and kept < self._retain_bytes:
            n -= 1
            kept += segments[n].size
        return min(n, self._old_enough(segments)) if self._retain_us else n

    def _old_enough(self, segments: Sequence[SegmentInfo]) -> int:
        """How many segments, from the oldest on, have no commit that is younger than is kept."""
        young_us = self._clock.now_us() - self._retain_us
        n = len(segments) - 1
        began_us = segments[n].wall_us
        # No commit of a segment is younger than the one after it.
        while n and began_us >= young_us:
            n -= 1
            began_us = min(began_us, segments[n].wall_us)
        return n


def refuse_gap(
    after: Seqno, oldest: Seqno, segments: Sequence[SegmentInfo], newest: Seqno, time_us: int | None
) -> None:
    """FeedGap if the commits beyond `after` are asked for, and only those beyond `oldest` are kept."""
    if after >= oldest:
        return
    oldest_us = next((segment.created_us for segment in segments if segment.first_seqno > oldest), time_us)
    raise FeedGap(
        after,
        oldest + 1,
        newest,
        oldest_time=_moment(oldest_us),
        newest_time=_moment(time_us),
        lost_commits=oldest - after,
    )


def _moment(time_us: int | None) -> datetime | None:
    return None if time_us is None else datetime.fromtimestamp(time_us / 1e6, UTC)
