"""Stretches without a live key, so that a queue's head is not searched among everything that was taken off before.

Tombstones stay in the memtable until the next checkpoint. A scan that has to pass many of them before the first live
key says so; the stretch is remembered, the next scan begins behind it, and a put into it cuts it.

Requires: `written`, `propose` and `clear` under State.lock. `skip` needs none: the list is replaced, never changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.keys import KeyRange, Seqno

__all__ = ["WORTHWHILE", "Gaps", "TableGaps"]

#: A scan that passed this many tombstones before the first live key proposes a gap: 64 cost about 5 us to pass.
WORTHWHILE: Final = 64
# Copying a list of this length takes 10 us. Longer bounds would take memory that nothing accounts for.
_MOST_GAPS: Final = 4096
_LONGEST_BOUND: Final = 512
_STRIDE: Final = 1021
# Puts that are remembered to judge a proposal by; a scan that more puts overtook proposes in vain.
_RECENT_PUTS: Final = 4096
# At most this number of tables has some at a time.
_MOST_TABLES: Final = 64
_start_of: Final[Callable[[KeyRange], bytes]] = itemgetter(0)


class Gaps:
    """Disjoint stretches that have no live key now."""

    __slots__ = ("_active_since", "_dropped", "_gaps", "_recent")

    def __init__(self) -> None:
        self._gaps: list[KeyRange] = []
        self._active_since: Seqno | None = None
        self._dropped = 0
        self._recent: deque[tuple[Seqno, bytes]] = deque(maxlen=_RECENT_PUTS)

    @property
    def active(self) -> bool:
        """Whether puts must be told: from the first proposal on."""
        return self._active_since is not None

    def clear(self) -> None:
        """A checkpoint took the tombstones away."""
        self._gaps = []
        self._active_since = None
        self._recent.clear()

    def written(self, seqno: Seqno, keys: Iterable[bytes]) -> None:
        """Keys were put."""
        for key in keys:
            self._recent.append((seqno, key))
            gaps = self._gaps
            if gaps:
                index = bisect_right(gaps, key, key=_start_of) - 1
                if index >= 0 and gaps[index].contains(key):
                    gap = gaps[index]
                    parts = [KeyRange(gap.start, key), KeyRange(key + b"\0", gap.stop)]
                    if len(gaps) >= _MOST_GAPS or len(key) > _LONGEST_BOUND:
                        parts = []
                    self._gaps = [*gaps[:index], *(part for part in parts if not part.is_empty()), *gaps[index + 1 :]]

    def propose(self, gap: KeyRange, seqno: Seqno, now: Seqno) -> None:
        """A scan as of `seqno` found no live key in the gap; it is remembered if none was put since."""
        if self._active_since is None:
            self._active_since = now
        recent = self._recent
        if gap.is_empty() or seqno < self._active_since or max(len(gap.start), len(gap.stop or b"")) > _LONGEST_BOUND:
            return
        if len(recent) == _RECENT_PUTS and recent[0][0] > seqno:
            return
        for at, key in reversed(recent):
            if at <= seqno:
                break
            if gap.contains(key):
                return
        gaps = self._gaps
        # Those from `first` to before `last` overlap or touch it.
        first = bisect_right(gaps, gap.start, key=_start_of)
        if first:
            before = gaps[first - 1].stop
            first -= before is None or before >= gap.start
        last = len(gaps) if gap.stop is None else bisect_right(gaps, gap.stop, key=_start_of)
        if first < last:
            start, stop = min(gaps[first].start, gap.start), gaps[last - 1].stop
            gap = KeyRange(start, None if stop is None or gap.stop is None else max(stop, gap.stop))
        gaps = [*gaps[:first], gap, *gaps[last:]]
        if len(gaps) > _MOST_GAPS:
            # Which one hardly matters; not always that of the same queue.
            self._dropped = (self._dropped + _STRIDE) % _MOST_GAPS
            del gaps[self._dropped]
        self._gaps = gaps

    def skip(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> tuple[bytes | None, bytes | None]:
        """The same range less a gap at the end that a scan begins at. Requires: the scan is of now."""
        gaps = self._gaps
        if not gaps:
            return start, stop
        if reverse:
            # The gap that ends at or behind the stop, and begins before it.
            index = len(gaps) - 1 if stop is None else bisect_right(gaps, stop, key=_start_of) - 1
            if index >= 0:
                gap = gaps[index]
                inside = gap.stop is None or (stop is not None and gap.stop >= stop)
                if inside and (stop is None or gap.start < stop):
                    return start, gap.start
            return start, stop
        first = start or b""
        index = bisect_right(gaps, first, key=_start_of) - 1
        if index >= 0 and gaps[index].contains(first):
            beyond = gaps[index].stop
            # Nothing at all is left where the gap has no end: a range from the stop of nothing.
            return (beyond, stop) if beyond is not None else (first, first)
        return start, stop


class TableGaps:
    """Those of each table, and of what is derived from it; 0: of the default table."""

    __slots__ = ("_dropped", "_of")

    def __init__(self) -> None:
        self._of: dict[int, Gaps] = {}
        self._dropped = 0

    @property
    def active(self) -> bool:
        """Whether puts must be told: from the first proposal on."""
        return bool(self._of)

    def clear(self) -> None:
        """A checkpoint took the tombstones away."""
        self._of = {}

    def written(self, seqno: Seqno, keys: Iterable[bytes], parts: Sequence[tuple[int, WriteBatch]]) -> None:
        """Keys were put, of the default table and of others."""
        of = self._of
        if 0 in of:
            of[0].written(seqno, keys)
        for table, part in parts:
            if table in of:
                of[table].written(seqno, part.writes)

    def propose(self, table: int, gap: KeyRange, seqno: Seqno, now: Seqno) -> None:
        """See `Gaps.propose`."""
        gaps = self._of.get(table)
        if gaps is None:
            if len(self._of) >= _MOST_TABLES:
                # As above. The one used longest ago would be the next of those that take turns.
                self._dropped = (self._dropped + _STRIDE) % _MOST_TABLES
                del self._of[list(self._of)[self._dropped]]
            gaps = self._of[table] = Gaps()
        gaps.propose(gap, seqno, now)

    def skip(
        self, table: int, start: bytes | None, stop: bytes | None, *, reverse: bool
    ) -> tuple[bytes | None, bytes | None]:
        """See `Gaps.skip`."""
        gaps = self._of.get(table)
        return (start, stop) if gaps is None else gaps.skip(start, stop, reverse=reverse)
