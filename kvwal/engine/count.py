"""How many keys a range has, without walking it.

The tree knows the count of every subtree. A memtable above it changes that count: its live keys that are not below it
add, its deleted keys that are below it take away, and its deleted ranges hide what is below them. Whether a key is
below needs one look-up, and blind puts must not pay for it, so it is made when something is counted, once for each key.
What was found is kept in a `Census`, ordered, so a range takes two bisections; a later count costs only what was
written since.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import NamedTuple, Protocol

from sortedcontainers import SortedList

from kvwal.engine.memtable import Memtable
from kvwal.engine.range_map import Cover
from kvwal.engine.value import MISSING
from kvwal.keys import KeyRange, Seqno
from kvwal.locks import locked, new_lock
from kvwal.pages import Tree

__all__ = ["Below", "Census", "Counted", "Extent", "TreeBelow"]


class Below(Protocol):
    """What lies under a memtable."""

    def has(self, key: bytes) -> bool:
        """Whether the key exists there."""
        ...

    def count(self, start: bytes | None, stop: bytes | None) -> int:
        """Number of keys in [start, stop)."""
        ...


class TreeBelow:
    """The tree, as what lies under the oldest memtable."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def has(self, key: bytes) -> bool:
        """Whether the key exists there."""
        return bool(self._tree.count()) and self._tree.get(key) is not None

    def count(self, start: bytes | None, stop: bytes | None) -> int:
        """Number of keys in [start, stop). O(log n)."""
        return self._tree.count(start, stop)


class Extent(NamedTuple):
    """How much a memtable has at a moment: the number of its keys and deleted ranges then."""

    keys: int
    ranges: int

    @classmethod
    def of(cls, memtable: Memtable) -> Extent:
        """As it is now. Requires: State.lock, or a frozen table, or a reader of an older moment."""
        return cls(len(memtable.latest), len(memtable.ranges.added))


class Census:
    """What a memtable adds to, and takes from, the keys below it, at one moment, which only moves on."""

    __slots__ = (
        "_added",
        "_at",
        "_broken",
        "_hidden",
        "_known",
        "_pending",
        "_ranges_seen",
        "_removed",
        "_seen",
        "dirty",
        "lock",
    )

    def __init__(self, known: dict[bytes, bool] | None = None) -> None:
        self.lock = new_lock()
        #: Keys written since the last `mark`. The commit leader adds to it, under State.lock.
        self.dirty: set[bytes] = set()
        # What was dirty at a mark, with the moment of the mark, and not looked at since.
        self._pending: list[tuple[Seqno, set[bytes]]] = []
        # Whether a key exists below: that never changes while the memtable lives, since a checkpoint moves, and
        # changes nothing.
        self._known: dict[bytes, bool] = {} if known is None else known
        self._start_over()

    def _start_over(self) -> None:
        self._at = Seqno(0)
        self._seen = 0
        self._ranges_seen = 0
        self._added: SortedList[bytes] = SortedList()
        self._removed: SortedList[bytes] = SortedList()
        # Of which cover, where its ranges start, and how many keys they hide up to there.
        self._hidden: tuple[Cover, list[KeyRange], list[int]] | None = None
        # Set while keys are looked at. Left set by an interruption, it says that all are to be looked at again.
        self._broken = False

    def of_older_moment(self) -> Census:
        """An empty census of another moment, which needs no look-up that was made for this one."""
        return Census(self._known)

    def mark(self, seqno: Seqno) -> None:
        """A count at the newest moment begins. Requires: State.lock."""
        if self.dirty:
            self._pending.append((seqno, self.dirty))
            self.dirty = set()

    @locked
    def count(
        self,
        memtable: Memtable,
        seqno: Seqno,
        below: Below,
        extent: Extent,
        start: bytes | None,
        stop: bytes | None,
        *,
        last: bool,
    ) -> int | None:
        """Number of keys of [start, stop) in the memtable, as of `seqno`, and what is below it.

        None if the census has moved beyond that moment. `extent`: what the memtable had then. `last`: it is frozen, and
        this is its last moment.
        """
        if self._broken:
            self._start_over()
        if seqno < self._at:
            return None
        cover = memtable.ranges.at(seqno) or None
        pending = [entry for entry in self._pending if entry[0] <= seqno]
        changed = set().union(*(keys for _, keys in pending))
        if last:
            # No later count marks it.
            changed |= self.dirty
        changed.update(memtable.order.added(self._seen, extent.keys))
        for bounds in memtable.ranges.added[self._ranges_seen : extent.ranges]:
            for known in (self._added, self._removed):
                changed.update(known.irange(bounds[0], bounds[1], (True, False)))
        if changed:
            self._broken = True
            for key in sorted(changed):
                self._classify(key, memtable, seqno, below, cover)
            self._seen = max(self._seen, extent.keys)
            del self._pending[: len(pending)]
            if last:
                self.dirty = set()
            self._broken = False
        self._ranges_seen = max(self._ranges_seen, extent.ranges)
        self._at = seqno
        total = below.count(start, stop) + _between(self._added, start, stop) - _between(self._removed, start, stop)
        return total if cover is None else total - self._hidden_between(below, cover, start, stop)

    def _classify(self, key: bytes, memtable: Memtable, seqno: Seqno, below: Below, cover: Cover | None) -> None:
        self._added.discard(key)
        self._removed.discard(key)
        value = memtable.get_at(key, seqno)
        if value is MISSING:
            return
        exists = False
        if cover is None or not cover.at(key):
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = below.has(key)
            exists = known
        if value is None and exists:
            self._removed.add(key)
        elif value is not None and not exists:
            self._added.add(key)

    def _hidden_between(self, below: Below, cover: Cover, start: bytes | None, stop: bytes | None) -> int:
        if self._hidden is None or self._hidden[0] is not cover:
            ranges = cover.ranges()
            self._hidden = (cover, ranges, [0, *accumulate(below.count(*bounds) for bounds in ranges)])
        _, ranges, sums = self._hidden

        def hidden_before(key: bytes) -> int:
            index = bisect_left(ranges, (key,))
            if not index:
                return 0
            bounds = ranges[index - 1]
            if bounds.stop is not None and bounds.stop <= key:
                return sums[index]
            return sums[index - 1] + below.count(bounds.start, key)

        return (sums[-1] if stop is None else hidden_before(stop)) - (0 if start is None else hidden_before(start))


class Counted:
    """A memtable at one moment, and what is below it."""

    def __init__(
        self, memtable: Memtable, seqno: Seqno, below: Below, census: Census, extent: Extent, *, last: bool = False
    ) -> None:
        self._last = last
        self._memtable = memtable
        self._seqno = seqno
        self._below = below
        self._census = census
        self._extent = extent

    def has(self, key: bytes) -> bool:
        """Whether the key exists."""
        value = self._memtable.get_at(key, self._seqno)
        return self._below.has(key) if value is MISSING else value is not None

    def count(self, start: bytes | None, stop: bytes | None) -> int:
        """Number of keys in [start, stop). O(log n), and a look-up for each key written since the last count."""
        if start is not None and stop is not None and stop <= start:
            return 0
        arguments = (self._memtable, self._seqno, self._below, self._extent, start, stop)
        counted = self._census.count(*arguments, last=self._last)
        if counted is None:
            # Another thread has counted at a later moment meanwhile.
            self._census = self._census.of_older_moment()
            counted = self._census.count(*arguments, last=self._last)
        assert counted is not None
        return counted


def _between(keys: SortedList[bytes], start: bytes | None, stop: bytes | None) -> int:
    high = len(keys) if stop is None else keys.bisect_left(stop)
    return high - (0 if start is None else keys.bisect_left(start))
