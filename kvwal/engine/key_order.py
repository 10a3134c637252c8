"""The keys of a memtable in order, which is made lazily, in bulk, when something scans.

Keeping a sorted container in order would cost 20 times a dict insert on every put (measured: 3.9 us against 0.22).

Rules:

- A key never leaves the table, and a dict keeps the order in which keys came. So the keys that came since the order was
  last made are the last ones of the dict, and a key's number says when it came.
- The commit leader adds keys meanwhile, and takes the lock here only where an operation, such as `popitem`, scans.
- A checkpoint does not use the order, which is made in one go, but `sorting.sorted_in_steps`.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from sortedcontainers import SortedList

from kvwal.engine.value import Value
from kvwal.locks import Lock, locked

if TYPE_CHECKING:
    from kvwal.engine.count import Census

__all__ = ["KeyOrder"]


class KeyOrder:
    """The keys of one memtable, for those who scan and count them. Thread-safe."""

    __slots__ = ("_broken", "_latest", "_order", "_ordered", "census", "lock")

    def __init__(self, latest: dict[bytes, Value], lock: Lock) -> None:
        self._latest = latest
        self._order: SortedList[bytes] = SortedList()
        self._ordered = 0
        # Set while keys are brought into the order. Left set by an interruption, it says that the order is to be made
        # anew.
        self._broken = False
        #: Guards the order.
        self.lock = lock
        #: For count.py: what counting knows of the keys, once something was counted.
        self.census: Census | None = None

    @locked
    def between(
        self, start: bytes | None, stop: bytes | None, *, after: bytes | None, reverse: bool, most: int
    ) -> list[bytes]:
        """Up to `most` keys of [start, stop) in order, beyond `after` (exclusive) in that direction."""
        self._fold()
        inclusive = (True, False)
        if after is not None:
            if reverse:
                stop = after
            else:
                start = after
                inclusive = (False, False)
        return list(islice(self._order.irange(start, stop, inclusive, reverse), most))

    @locked
    def middle(self, after: bytes | None, before: bytes | None) -> bytes | None:
        """The key in the middle of those between these two (None: of all); None if there is none. O(log keys)."""
        self._fold()
        order = self._order
        low = 0 if after is None else order.bisect_right(after)
        high = len(order) if before is None else order.bisect_left(before)
        return order[(low + high) // 2] if low < high else None

    def added(self, first: int, stop: int) -> list[bytes]:
        """The keys that came as number `first` (from 0) up to but without `stop`.

        Needs no lock. O(how many, and the fewer of those before and those behind).
        """
        latest = self._latest
        while first < stop:
            behind = len(latest) - stop
            try:
                # From the nearer end: what comes before is walked.
                if behind < 0 or first < behind:
                    return list(islice(latest, first, stop))
                found = list(islice(reversed(latest), behind, behind + stop - first))
                if len(latest) - stop == behind:
                    return found[::-1]
            except RuntimeError:
                # The leader added a key after the iterator was made and before it was used up.
                continue
        return []

    def _fold(self) -> None:
        # Requires: lock. The leader may add a key meanwhile; then the last `new` would not be all: count again.
        if self._broken:
            self._order, self._ordered, self._broken = SortedList(), 0, False
        latest = self._latest
        while new := len(latest) - self._ordered:
            try:
                keys = list(islice(reversed(latest), new))
            except RuntimeError:
                # A key was added after the iterator was made and before it was used up.
                continue
            if len(latest) == self._ordered + new:
                self._broken = True
                self._order.update(keys)
                self._ordered += new
                self._broken = False
                break

    def _check(self) -> None:
        """Raise AssertionError where order and dict disagree (for the tests)."""
        keys = self.between(None, None, after=None, reverse=False, most=len(self._latest) + 1)
        assert keys == sorted(self._latest), "order and dict disagree"
