"""What goes into a merge: sorted updates as a stream of batches, deleted ranges, and how a leaf takes them.

Rules: no Python call per entry where a C loop over lists will do; a batch is small, so that a stream
larger than memory can be merged.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, islice
from operator import lt
from typing import Final

from kvwal.batch import KeyRange
from kvwal.errors import InternalError
from kvwal.pages.node import OVERFLOW_THRESHOLD
from kvwal.pages.pager import PageWriter

__all__ = ["Updates", "joined_ranges", "merged", "one_size", "without_deletes"]

#: Updates are taken from their iterator in batches of about this many bytes.
_BATCH_BYTES: Final = 1 << 18
#: No other thread has the interpreter meanwhile; and larger ones fall out of the processor's cache.
_MAX_BATCH: Final = 256
#: So many times fewer updates than entries in a leaf are put in one by one, more by way of a dict.
_FEW: Final = 8


class Updates:
    """The updates, taken from their iterator in batches; values too large for a leaf are written at once."""

    def __init__(self, items: Iterable[tuple[bytes, bytes | None]], writer: PageWriter) -> None:
        self._items = iter(items)
        self._writer = writer
        self._want = 16
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self._at = 0
        #: Whether the present batch holds an overflow reference.
        self.overflow = False
        #: The first key not taken yet; None when there is none.
        self.next: bytes | None = None
        self._fill(None)

    def take(self, stop: bytes | None) -> Iterator[tuple[list[bytes], list[bytes | None]]]:
        """All updates below `stop` (None: to the end) that were not taken yet, batch by batch."""
        while self.next is not None and (stop is None or self.next < stop):
            keys, at = self._keys, self._at
            end = len(keys) if stop is None else bisect_left(keys, stop, at)
            batch = keys[at:end], self._values[at:end]
            if end < len(keys):
                self._at = end
                self.next = keys[end]
                yield batch
                return
            # What was given must be used before the next batch says whether it holds large values.
            yield batch
            self._fill(keys[-1])

    def _fill(self, last: bytes | None) -> None:
        batch = list(islice(self._items, self._want))
        self._at = 0
        if not batch:
            self.next = None
            self._keys, self._values = [], []
            return
        keys = [key for key, _ in batch]
        values = [value for _, value in batch]
        if (last is not None and keys[0] <= last) or not all(map(lt, keys, islice(keys, 1, None))):
            raise InternalError("the updates of a checkpoint are not sorted, or name a key twice")
        sizes = list(map(len, filter(None, values)))
        self.overflow = bool(sizes) and max(sizes) > OVERFLOW_THRESHOLD
        if self.overflow:
            overflow = self._writer.overflow
            for index, value in enumerate(values):
                if value is not None and len(value) > OVERFLOW_THRESHOLD:
                    values[index] = overflow(value)
        taken = sum(sizes) + sum(map(len, keys))
        self._want = max(1, min(_MAX_BATCH, 4 * self._want, self._want * _BATCH_BYTES // (taken + 1)))
        self._keys, self._values, self.next = keys, values, keys[0]


def one_size(items: Sequence[bytes]) -> int:
    """The length that all have; -1 if they differ. Requires: not empty."""
    sizes = set(map(len, items))
    return sizes.pop() if len(sizes) == 1 else -1


def merged(
    keys: list[bytes], values: list[bytes], new_keys: list[bytes], new_values: list[bytes | None]
) -> tuple[list[bytes], list[bytes]]:
    """Old entries and updates in one sorted run, without the deleted ones. May change the old lists."""
    if not keys:
        return without_deletes(new_keys, new_values)
    if keys[-1] < new_keys[0]:
        return without_deletes(keys + new_keys, [*values, *new_values])
    if len(new_keys) * _FEW < len(keys):
        for key, value in zip(new_keys, new_values, strict=False):
            at = bisect_left(keys, key)
            if at < len(keys) and keys[at] == key:
                if value is None:
                    del keys[at], values[at]
                else:
                    values[at] = value
            elif value is not None:
                keys.insert(at, key)
                values.insert(at, value)
        return keys, values
    entries: dict[bytes, bytes | None] = dict(zip(keys, values, strict=False))
    entries.update(zip(new_keys, new_values, strict=False))
    if len(entries) != len(keys):
        # Two sorted runs one after the other, which is what the sort is best at.
        keys = sorted(entries)
    return without_deletes(keys, list(map(entries.__getitem__, keys)))


def without_deletes(keys: list[bytes], values: list[bytes | None]) -> tuple[list[bytes], list[bytes]]:
    if None in values:
        live = [value is not None for value in values]
        return list(compress(keys, live)), list(compress(values, live))  # type: ignore[arg-type]
    return keys, values  # type: ignore[return-value]


def joined_ranges(ranges: Iterable[KeyRange]) -> list[KeyRange]:
    """The same keys as disjoint, sorted ranges."""
    joined: list[KeyRange] = []
    for start, stop in sorted(ranges, key=lambda bounds: bounds[0]):
        if stop is not None and stop <= start:
            continue
        if joined:
            first, last = joined[-1]
            if last is None:
                break
            if start <= last:
                joined[-1] = (first, None if stop is None else max(stop, last))
                continue
        joined.append((start, stop))
    return joined
