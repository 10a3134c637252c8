"""Deleted ranges as an interval map: which range delete, if any, was the last to cover a key.

The keys are cut into segments; each says the seqno of the newest delete that covers it, or 0. Looking a key up is a
bisection, and so is adding a range, however many there are (the list moves in one C call).

Invariant: a reader that was registered before a range is added goes on with the segments as they were: `add` copies
the list where such a reader exists, and changes it in place where none does.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from kvwal.keys import KeyRange, Seqno

__all__ = ["Cover", "RangeMap"]

_Segment: TypeAlias = tuple[bytes, int]
_NO_SEGMENTS: Final[list[_Segment]] = [(b"", 0)]
_AFTER: Final = 1 << 64


class Cover:
    """The deleted ranges at one moment, as something that hides keys of older sources."""

    __slots__ = ("_segments",)

    def __init__(self, segments: list[_Segment]) -> None:
        self._segments = segments

    def __bool__(self) -> bool:
        return len(self._segments) > 1 or bool(self._segments[0][1])

    @classmethod
    def of(cls, ranges: Iterable[KeyRange], cover: Cover | None = None) -> Cover:
        """The union of some ranges, and of a cover, which stays as it is."""
        made = RangeMap()
        if cover is not None:
            made.newest = cls(cover._segments.copy())
        for bounds in ranges:
            made.add(Seqno(1), bounds, copy=False)
        return made.newest

    def at(self, key: bytes) -> int:
        """Seqno of the newest delete that covers the key; 0 if none does. O(log ranges)."""
        segments = self._segments
        return segments[bisect_right(segments, (key, _AFTER)) - 1][1]

    def stretch(self, key: bytes) -> KeyRange | None:
        """The covered stretch that the key lies in, as far as it goes to both sides; None if it is not covered."""
        segments = self._segments
        low = high = bisect_right(segments, (key, _AFTER)) - 1
        if not segments[low][1]:
            return None
        while low and segments[low - 1][1]:
            low -= 1
        while high + 1 < len(segments) and segments[high + 1][1]:
            high += 1
        return KeyRange(segments[low][0], segments[high + 1][0] if high + 1 < len(segments) else None)

    def newest_within(self, bounds: KeyRange) -> int:
        """Seqno of the newest delete that covers some key of the range; 0 if none does."""
        segments = self._segments
        first = bisect_right(segments, (bounds[0], _AFTER)) - 1
        last = len(segments) if bounds[1] is None else bisect_left(segments, (bounds[1], 0))
        return max((seqno for _, seqno in segments[first:last]), default=0)

    def ranges(self) -> list[KeyRange]:
        """What is covered, as disjoint ranges in order."""
        found: list[KeyRange] = []
        start: bytes | None = None
        for bound, seqno in self._segments:
            if seqno and start is None:
                start = bound
            elif not seqno and start is not None:
                found.append(KeyRange(start, bound))
                start = None
        if start is not None:
            found.append(KeyRange(start, None))
        return found

    def hide(
        self, keys: Sequence[bytes], values: Sequence[bytes | None]
    ) -> tuple[Sequence[bytes], Sequence[bytes | None]]:
        """A sorted chunk (in either direction) less what is covered. O(log ranges) where nothing is."""
        segments = self._segments
        low, high = (keys[0], keys[-1]) if keys[0] <= keys[-1] else (keys[-1], keys[0])
        first = bisect_right(segments, (low, _AFTER)) - 1
        last = bisect_right(segments, (high, _AFTER), first) - 1
        if not any(seqno for _, seqno in segments[first : last + 1]):
            return keys, values
        if first == last:
            return (), ()
        at = self.at
        kept = [(key, value) for key, value in zip(keys, values, strict=True) if not at(key)]
        return [key for key, _ in kept], [value for _, value in kept]


def _bound_of(entry: tuple[Seqno, Cover]) -> Seqno:
    return entry[0]


class RangeMap:
    """The deleted ranges of one memtable, at its newest moment and at those that readers are registered for."""

    __slots__ = ("_former", "added", "last_seqno", "newest")

    def __init__(self) -> None:
        self.newest = Cover(_NO_SEGMENTS)
        #: Every range that was added, in that order.
        self.added: list[KeyRange] = []
        self.last_seqno = Seqno(0)
        # What held until before a seqno, ascending.
        self._former: list[tuple[Seqno, Cover]] = []

    def __bool__(self) -> bool:
        return bool(self.added)

    def add(self, seqno: Seqno, bounds: KeyRange, *, copy: bool) -> None:
        """A range was deleted. `copy`: a registered reader may need the map as it is now.

        O(log ranges), and a copy of the list with `copy`.
        """
        segments = self.newest._segments
        if copy or segments is _NO_SEGMENTS:
            if not self._former or self._former[-1][0] < seqno:
                self._former.append((seqno, self.newest))
            segments = segments.copy()
        start, stop = bounds
        first = bisect_left(segments, (start, 0))
        new = [(start, int(seqno))]
        if stop is None:
            last = len(segments)
        else:
            last = bisect_left(segments, (stop, 0))
            if last == len(segments) or segments[last][0] != stop:
                new.append((stop, segments[last - 1][1]))
        segments[first:last] = new
        self.newest = Cover(segments)
        self.last_seqno = seqno
        self.added.append(bounds)

    def at(self, seqno: Seqno) -> Cover:
        """The map as of a commit. Requires: a reader at `seqno` has been registered since."""
        # First, since `add` changes it last: so no lock is needed.
        newest, former = self.newest, self._former
        if not former or former[-1][0] <= seqno:
            return newest
        return former[bisect_right(former, seqno, key=_bound_of)][1]

    def forget_former(self, oldest: Seqno | None) -> None:
        """No reader of an older moment than `oldest` is left; None: of any."""
        if self._former:
            self._former = [] if oldest is None else [entry for entry in self._former if entry[0] > oldest]
