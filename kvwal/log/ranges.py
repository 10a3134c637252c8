"""The ranges that the commits of a segment deleted: which of them a key is in, by table and by commit.

Those of a table are cut into blocks of `_WIDTH`, these into larger ones, and so on. Each block that is full says of
every key which of its ranges is the newest that has it: it is made when it is first asked for, and never changes. So a
question about any stretch of commits takes a few blocks, however many ranges there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from operator import attrgetter
from typing import Final, NamedTuple, TypeAlias

from kvwal.keys import KeyRange

__all__ = ["AFTER", "RANGE_BYTES", "Cover", "Range", "Ranges", "newest_at"]

_WIDTH: Final = 32
# Freed in a step.
_STEP_RANGES: Final = 512
#: What a range takes in memory beside its bounds, with its part of the blocks, roughly.
RANGE_BYTES: Final = 500
#: Beyond all commits.
AFTER: Final = 1 << 64
_START: Final = attrgetter("bounds.start")
_SEQNO: Final = attrgetter("seqno")

Cover: TypeAlias = list[tuple[bytes, int]]
"""From each of these keys up to the next one: the last commit that deleted them as a part of a range, or 0."""


class Range(NamedTuple):
    """A range that a commit deleted."""

    seqno: int
    offset: int
    table: int
    bounds: KeyRange


def newest_at(cover: Cover, key: bytes) -> int:
    """The last commit that deleted a range with this key; 0 if none did."""
    return cover[bisect_right(cover, (key, AFTER)) - 1][1]


class Ranges(list[Range]):
    """All of a segment, in the order of the commits. One thread at a time appends; others may look meanwhile."""

    __slots__ = ("_tables",)

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        super().__init__()
        self._tables: dict[int, _OfTable] = {}
        for each in ranges:
            self.append(each)

    def append(self, each: Range) -> None:
        """Add the next one."""
        super().append(each)
        of_table = self._tables.get(each.table)
        if of_table is None:
            of_table = self._tables[each.table] = _OfTable()
        of_table.ranges.append(each)

    def freed(self) -> Iterator[None]:
        """Forget all, in steps. Requires: no one else has this, and nothing was asked."""
        self._tables.clear()
        while self:
            del self[-_STEP_RANGES:]
            yield

    def between(self, table: int, after: int, until: int) -> list[Range]:
        """Those of a table that commits beyond `after` up to `until` deleted."""
        of_table = self._tables.get(table, _NONE)
        low, high = of_table.between(after, until)
        return of_table.ranges[low:high]

    def covers(self, table: int, after: int, until: int) -> list[Cover]:
        """What hides keys of them, newest first. They are not to be changed."""
        of_table = self._tables.get(table, _NONE)
        return [of_table.cover(*block) for block in of_table.blocks(*of_table.between(after, until))]

    def with_key(self, table: int, key: bytes, after: int, until: int) -> Iterator[Range]:
        """Those of them that a key is in, newest first."""
        of_table = self._tables.get(table, _NONE)
        for low, high in of_table.blocks(*of_table.between(after, until)):
            yield from of_table.with_key(key, low, high)


class _OfTable:
    """The ranges of one table, and blocks of them by which are in them: from one position up to another."""

    __slots__ = ("_covers", "ranges")

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self._covers: dict[tuple[int, int], Cover] = {}

    def between(self, after: int, until: int) -> tuple[int, int]:
        """The positions of those beyond `after` up to `until`."""
        if not self.ranges:
            return 0, 0
        low = bisect_right(self.ranges, after, key=_SEQNO)
        return low, bisect_right(self.ranges, until, low, key=_SEQNO)

    @staticmethod
    def blocks(low: int, high: int) -> Iterator[tuple[int, int]]:
        """What is between two positions: the largest full blocks, and parts of the smallest ones. Newest first."""
        while low < high:
            size = _WIDTH
            first = max(low, (high - 1) // size * size)
            while not high % size and high - size >= low:
                first = high - size
                size *= _WIDTH
            yield first, high
            high = first

    def cover(self, low: int, high: int) -> Cover:
        """What hides keys of a block, or of a part of one."""
        kept = self._covers.get((low, high))
        if kept is None:
            kept = _cover_of(self.ranges[low:high])
            if high - low >= _WIDTH:
                self._covers[low, high] = kept
        return kept

    def with_key(self, key: bytes, low: int, high: int) -> Iterator[Range]:
        """Those of a block that a key is in, newest first."""
        size = high - low
        if size >= _WIDTH and not newest_at(self.cover(low, high), key):
            return
        if size <= _WIDTH:
            yield from (each for each in reversed(self.ranges[low:high]) if each.bounds.contains(key))
            return
        size //= _WIDTH
        for at in range(high - size, low - size, -size):
            yield from self.with_key(key, at, at + size)


_NONE: Final = _OfTable()


def _cover_of(ranges: Sequence[Range]) -> Cover:
    starts = sorted(ranges, key=_START)
    stops = (each.bounds.stop for each in ranges)
    # From each point up to the next one the answer is the same.
    points = sorted({b"", *map(_START, ranges), *(stop for stop in stops if stop is not None)})
    cover: Cover = []
    # Those that have begun, newest first, and some that have ended.
    begun: list[tuple[int, int, bytes | None]] = []
    i = 0
    for point in points:
        while i < len(starts) and starts[i].bounds.start == point:
            heappush(begun, (-starts[i].seqno, i, starts[i].bounds.stop))
            i += 1
        while begun and (stop := begun[0][2]) is not None and stop <= point:
            heappop(begun)
        cover.append((point, -begun[0][0] if begun else 0))
    return cover
