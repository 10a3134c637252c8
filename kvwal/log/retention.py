"""Which part of the log may go: named holds decide it, and nothing else.

A segment may be removed when neither recovery nor a hold needs it. It goes from the oldest on, and never the newest.

Invariant: `hold` registers before it looks at what is gone, and `release_before` says what is gone before it looks at
the holds again. So of a hold and a removal that come at the same time one sees the other, without a lock.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple
from weakref import ref

from kvwal.errors import FeedGap
from kvwal.keys import Seqno
from kvwal.locks import shared_items
from kvwal.log.segment import SegmentInfo
from kvwal.times import time_of

__all__ = ["ArchiveLimits", "Hold", "HoldInfo", "Limits", "Retention", "refuse_gap", "sealed_beyond"]

_log = logging.getLogger("kvwal")


class Limits(NamedTuple):
    """What a hold may keep before it is dropped. None: no limit, until the disk is full.

    Attributes:
        max_bytes: of the sealed segments beyond the one that its next commit is in.
        max_us: age of the youngest commit in the segment that its next commit is in.
    """

    max_bytes: int | None
    max_us: int | None


class ArchiveLimits(Limits):
    """Of an archive's hold, which a full disk drops after those of consumers and after the window."""

    __slots__ = ()


@dataclass(slots=True)
class HoldInfo:
    """Who holds log, as `SegmentLog.holds` lists it.

    Attributes:
        name: what for: "history", or what the caller of `SegmentLog.read` says; of a consumer its name.
        after: commits beyond this one are held.
        since_us: since when, microseconds since 1970 UTC.
        limits: of a consumer, whose hold may be dropped. None of the others.
    """

    name: str
    after: Seqno
    since_us: int
    limits: Limits | None = None


class Hold:
    """Keeps the commits beyond a seqno until it is released or collected.

    That it is collected runs no code of its own, so a signal handler cannot interrupt it.
    """

    __slots__ = ("__weakref__", "_holds", "after", "key")

    def __init__(self, holds: dict[int, tuple[HoldInfo, ref[Hold]]], key: int, after: Seqno) -> None:
        self._holds = holds
        self.key = key
        #: The commits beyond this one are held.
        self.after = after

    def advance(self, after: Seqno) -> None:
        """What is up to `after` is held no longer."""
        info, _ = self._holds.get(self.key, (None, None))
        if info is not None and after > info.after:
            # Not a new one in its place: that would bring back one that was dropped just now.
            info.after = self.after = after

    @property
    def is_held(self) -> bool:
        """Whether it was neither released nor dropped."""
        return self.key in self._holds

    def release(self) -> None:
        """Hold nothing any more. Idempotent; from any thread, and from a finalizer."""
        self._holds.pop(self.key, None)


class Retention:
    """The holds on one log."""

    def __init__(self, now_us: Callable[[], int]) -> None:
        # Tells the age of what is kept.
        self._now_us = now_us
        # Those that were collected go when the next look finds them.
        self._holds: dict[int, tuple[HoldInfo, ref[Hold]]] = {}
        self._keys = itertools.count()
        # Commits up to this one may be gone.
        self._gone = Seqno(0)
        #: Called whenever a segment was sealed, by the thread that did it. It must not raise.
        self.when_sealed: Callable[[], object] | None = None

    def hold(
        self,
        name: str,
        after: Seqno | None,
        segments: Sequence[SegmentInfo],
        newest: Seqno,
        time_us: int,
        limits: Limits | None = None,
    ) -> Hold:
        """Hold the commits beyond `after` (None: all that are kept). FeedGap if one of them is gone.

        Args:
            segments: what is there now. newest: the last commit. time_us: of that commit.
        """
        hold = Hold(self._holds, next(self._keys), Seqno(0) if after is None else after)
        self._holds[hold.key] = HoldInfo(name, hold.after, self._now_us(), limits), ref(hold)
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
        return [replace(info) for _, info in self._held()]

    def _held(self) -> list[tuple[int, HoldInfo]]:
        """Those that are neither released nor collected, by key."""
        held: list[tuple[int, HoldInfo]] = []
        for key, (info, hold) in shared_items(self._holds):
            if hold() is None:
                self._holds.pop(key, None)
            else:
                held.append((key, info))
        return held

    def drop_late(self, segments: Sequence[SegmentInfo]) -> None:
        """Drop the holds that are beyond their limits, as a segment was sealed."""
        if self.when_sealed is not None:
            self.when_sealed()
        for key, info in self._held():
            if info.limits is not None:
                why = self._late(info.after, info.limits, segments)
                if why:
                    self._drop(key, info, why)

    def _late(self, after: Seqno, limits: Limits, segments: Sequence[SegmentInfo]) -> str:
        """Which limit is exceeded, in words; nothing if none is. The newest segment is not sealed."""
        size = sealed_beyond(segments, after)
        if limits.max_bytes is not None and size > limits.max_bytes:
            return f"{size} bytes of log are beyond its position, and the limit is {limits.max_bytes}"
        next_us = next((segment.wall_us for segment in segments if segment.first_seqno > after + 1), None)
        if limits.max_us is not None and next_us is not None:
            age_us = self._now_us() - next_us
            if age_us > limits.max_us:
                limit_s = limits.max_us / 1e6
                return f"commits beyond its position are {age_us / 1e6:.15g} s old, and the limit is {limit_s:.15g} s"
        return ""

    def drop_laziest(self, below: Seqno, segments: Sequence[SegmentInfo], *, archives: bool = False) -> bool:
        """Drop the holds of consumers that are furthest behind, as many as let a segment go. False if none does.

        `archives`: those of archives first, where those of consumers alone were not enough.
        """
        limited = {key: info for key, info in self._held() if info.limits is not None}
        kept = self._removable(below, segments)
        dropped: list[int] = []
        for key in sorted(limited, key=lambda key: (not _of_archive(limited[key]), limited[key].after)):
            if _of_archive(limited[key]) and not archives:
                continue
            dropped.append(key)
            if self._removable(below, segments, without=dropped) > kept:
                for each in dropped:
                    self._drop(each, limited[each], "the disk is full")
                return True
        return False

    def _drop(self, key: int, info: HoldInfo, why: str) -> None:
        if self._holds.pop(key, None) is not None:
            lost = "the archive gets a gap behind" if _of_archive(info) else f"consumer {info.name!r} is lost at"
            _log.warning("%s commit %d: %s", lost, info.after, why)

    def release_before(self, below: Seqno, segments: Sequence[SegmentInfo]) -> int:
        """How many of the segments, from the oldest on, go: recovery needs only the commits from `below` on."""
        before = self._gone
        n = self._removable(below, segments)
        if n:
            self._gone = Seqno(segments[n].first_seqno - 1)
            n = min(n, self._removable(below, segments))
            self._gone = Seqno(max(before, segments[n].first_seqno - 1))
        return n

    def _removable(self, below: Seqno, segments: Sequence[SegmentInfo], without: Sequence[int] = ()) -> int:
        needed = min([below - 1, *(info.after for key, info in self._held() if key not in without)])
        n = 0
        while n + 1 < len(segments) and segments[n + 1].first_seqno <= needed + 1:
            n += 1
        return n


def sealed_beyond(segments: Sequence[SegmentInfo], after: Seqno) -> int:
    """Bytes of the sealed segments beyond the one that the next commit after `after` is in."""
    return sum(segment.size for segment in segments[:-1] if segment.first_seqno > after + 1)


def _of_archive(info: HoldInfo) -> bool:
    return isinstance(info.limits, ArchiveLimits)


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
    return None if time_us is None else time_of(time_us)
