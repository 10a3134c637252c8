"""The keys of a memtable in order, which is made lazily, in bulk, when something scans.

Keeping a sorted container in order would cost 20 times a dict insert on every put (measured: 3.9 us against 0.22).

Rules:

- A key never leaves the table, and a dict keeps the order in which keys came. So the keys that came since the order was
  last made are the last ones of the dict, and a key's number says when it came.
- The commit leader adds keys meanwhile, and takes the lock here only where an operation, such as `popitem`, scans.
- A checkpoint does not use the order, which is made in one go, but `sorted_in_steps`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

from sortedcontainers import SortedList

from kvwal.engine.value import Value
from kvwal.locks import Lock, locked

if TYPE_CHECKING:
    from kvwal.engine.count import Census

__all__ = ["KeyOrder", "sorted_in_steps"]

# This many keys are sorted in half a millisecond, during which no other thread has the interpreter.
_STEP: Final = 1024
# One key in 128, but at most 4,096 keys, say where the steps part.
_SAMPLED: Final = 128
_MOST_SAMPLES: Final = 4096


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


def sorted_in_steps(keys: Collection[bytes], yield_to_writers: Callable[[], None]) -> Iterator[list[bytes]]:
    """The keys in order, in lists of about `_STEP`: `sorted` of a million would stop all other threads for a second.

    They are dealt out between bounds that a sample gives, and then each list is sorted; in all that takes no longer.
    """
    every = max(_SAMPLED, len(keys) // _MOST_SAMPLES)
    rest = iter(keys)
    parts: list[list[bytes]] = []
    sample: list[bytes] = []
    while part := list(islice(rest, every)):
        # Not always the same place: keys may come from a few sources in turn.
        sample.append(part[37 * len(parts) % len(part)])
        parts.append(part)
        if not len(parts) % (_STEP // _SAMPLED):
            yield_to_writers()
    sample.sort()
    per_step = max(1, _STEP // every)
    bounds = sample[per_step::per_step]
    steps: list[list[bytes]] = [[] for _ in range(len(bounds) + 1)]
    put_into = [step.append for step in steps]
    for part in parts:
        for key in part:
            put_into[bisect_right(bounds, key)](key)
        yield_to_writers()
    for step in steps:
        step.sort()
        yield_to_writers()
        yield step
