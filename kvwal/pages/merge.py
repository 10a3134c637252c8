"""Merging a sorted run of updates into the tree, copy-on-write, in one pass from left to right.

The old tree is walked; a subtree in which nothing happens is kept by its pointer. The others are
streamed through a `TreeBuilder`, which says when enough has come together for a subtree to be kept
after it (`ready`); otherwise the subtree is opened instead, and its first node absorbed. A subtree that
lies wholly in a deleted range is dropped. Its leaves are read only where their pointer says that they
hold overflow references.

Nothing is changed in place: what is no longer part of the tree goes into `freed`, for the free list.
Requires: the updates are sorted by key, no key twice (InternalError otherwise).

Rules of the stream: columns instead of pairs, and no Python call per entry where a C loop over lists will do; a batch
is small, so that a stream larger than memory can be merged.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import lt
from typing import Final, TypeAlias

from kvwal.errors import InternalError
from kvwal.keys import KeyRange
from kvwal.pages.freelist import Freed
from kvwal.pages.node import (
    HAS_EXPIRING,
    HAS_OVERFLOW,
    OVERFLOW_REF,
    OVERFLOW_THRESHOLD,
    PAGE_SIZE,
    POINTER,
    POINTER_SIZE,
    Leaf,
    OverflowRef,
    decode_leaf,
    generation_of,
)
from kvwal.pages.pager import Pager
from kvwal.pages.writer import PageWriter, TreeBuilder

__all__ = ["Columns", "Merge", "MergeJob"]

#: A run of keys, ascending, and their values; None deletes.
Columns: TypeAlias = tuple[list[bytes], list[bytes | None]]

#: Updates are taken from their iterator in batches of about this many bytes.
_BATCH_BYTES: Final = 1 << 18
#: Updates in a batch, at most: no other thread has the interpreter meanwhile, and more fall out of the
#: processor's cache.
_MAX_BATCH: Final = 256
#: Updates are put into a leaf one by one if there are at most 1/8 as many as entries; more go by way of a dict.
_ONE_BY_ONE: Final = 8


@dataclass(frozen=True, slots=True)
class MergeJob:
    """What is to be done to a tree.

    Attributes:
        updates: runs of keys and their values (None: delete), sorted by key, no key twice.
        ranges: deleted before the updates apply; disjoint and sorted (`keys.disjoint`).
        rewrites: keys whose leaves are written anew though nothing in them changes; sorted.
        moved_from: overflow extents that reach beyond this page are moved, in leaves that are rewritten.
        yield_to_writers: called at least once a leaf.
        expiring: whether values of the updates may expire.
    """

    updates: Iterable[Columns] = ()
    ranges: Sequence[KeyRange] = ()
    rewrites: Sequence[bytes] = ()
    moved_from: int | None = None
    yield_to_writers: Callable[[], None] = lambda: None
    expiring: bool = False


class Merge:
    """One merge; used once, by `run`. Not thread-safe."""

    def __init__(self, pager: Pager, writer: PageWriter, freed: Freed, job: MergeJob) -> None:
        """Prepare. `freed` takes the extents of the old tree that the new one does not have."""
        self._pager = pager
        self._writer = writer
        self._freed = freed
        self._job = job
        self._updates = Updates(job.updates, writer, HAS_EXPIRING if job.expiring else 0)
        self._builder = TreeBuilder(writer, job.yield_to_writers)
        # The first deleted range, and the first rewrite, that lies not wholly before the place of the walk.
        self._range = 0
        self._rewrite = 0

    def run(self, root: bytes, height: int) -> tuple[bytes, int]:
        """Merge into the tree; the packed pointer to the new root, and the height."""
        if height:
            self._children(height - 1, [], root, b"", None)
        self._push_updates(None)
        root, height = self._builder.finish()
        # A root with one child only is not needed.
        while height > 1:
            separators, children, born = self._pager.node(root, 0, height - 1, keep=False)
            if separators:
                break
            self._freed.add_node(root, 0, born)
            root = children
            height -= 1
        return root, height

    def _children(self, level: int, separators: list[bytes], pointers: bytes, low: bytes, high: bytes | None) -> None:
        """Take over the children, which have `level` and hold the keys in [low, high)."""
        builder = self._builder
        n = len(separators) + 1
        index = 0
        while index < n:
            begin = separators[index - 1] if index else low
            event = self._next_event(begin)
            target = n if event is None else bisect_right(separators, event, index)
            if high is not None and event is not None and event >= high:
                target = n
            if target > index and builder.ready(level):
                kept = pointers[index * POINTER_SIZE : target * POINTER_SIZE]
                floor = separators[target - 1] if target < n else high or b""
                builder.keep(level, [begin, *separators[index : target - 1]], kept, floor)
                index = target
                continue
            if level == 0:
                builder.absorbed = builder.absorbed + 1 if target > index else 0
            end = separators[index] if index < n - 1 else high
            self._open(level, pointers, index * POINTER_SIZE, begin, end)
            index += 1

    def _next_event(self, begin: bytes) -> bytes | None:
        """The first key from `begin` on at which something happens; None if nothing does any more."""
        event = self._updates.next
        ranges = self._job.ranges
        while self._range < len(ranges):
            start, stop = ranges[self._range]
            if stop is None or stop > begin:
                start = max(start, begin)
                if event is None or start < event:
                    event = start
                break
            self._range += 1
        rewrites = self._job.rewrites
        self._rewrite = bisect_left(rewrites, begin, self._rewrite)
        if self._rewrite < len(rewrites) and (event is None or rewrites[self._rewrite] < event):
            event = rewrites[self._rewrite]
        return event

    def _open(self, level: int, pointers: bytes, at: int, low: bytes, high: bytes | None) -> None:
        """Take over a node by its content: something in it changes, or its neighbour needs it."""
        if self._covered(low, high):
            self._drop(level, pointers, at)
            self._push_updates(high)
            self._job.yield_to_writers()
            return
        node = self._pager.node(pointers, at, level, keep=False)
        if level:
            separators, children, born = node
            self._freed.add_node(pointers, at, born)
            self._children(level - 1, separators, children, low, high)
        else:
            self._freed.add_node(pointers, at, generation_of(node))
            self._leaf(node, high, POINTER.unpack_from(pointers, at)[3])
            self._job.yield_to_writers()

    def _push_updates(self, high: bytes | None) -> None:
        for keys, values in self._updates.take(high):
            self._builder.push(*without_deletes(keys, values), self._updates.flags)

    def _leaf(self, raw: bytes | Leaf, high: bytes | None, flags: int) -> None:
        updates, push = self._updates, self._builder.push
        overflow = flags & HAS_OVERFLOW
        keys, values = map(list, decode_leaf(raw))
        gone: set[bytes] = {value for value in values if isinstance(value, OverflowRef)} if overflow else set()
        self._cut(keys, values, high)
        at = 0
        for new_keys, new_values in updates.take(high):
            stop = bisect_right(keys, new_keys[-1], at)
            merged_keys, merged_values = merged(keys[at:stop], values[at:stop], new_keys, new_values)
            at = stop
            if overflow:
                merged_values = self._still(merged_values, gone)
            push(merged_keys, merged_values, flags | updates.flags)
        if at:
            keys, values = keys[at:], values[at:]
        push(keys, self._still(values, gone) if overflow else values, flags)
        for ref in gone:
            self._freed.add_overflow(ref)

    def _still(self, values: list[bytes], gone: set[bytes]) -> list[bytes]:
        """The values; references of the old leaf that are among them are not gone, unless they are moved."""
        moved_from = self._job.moved_from
        result = []
        for value in values:
            if isinstance(value, OverflowRef) and value in gone:
                page, _, length, _ = OVERFLOW_REF.unpack(value)
                if moved_from is None or page + -(-length // PAGE_SIZE) <= moved_from:
                    gone.discard(value)
                else:
                    value = self._writer.overflow(self._pager.overflow(value))
            result.append(value)
        return result

    def _covered(self, low: bytes, high: bytes | None) -> bool:
        """Whether [low, high) lies in one deleted range. Requires: `_next_event(low)` was called."""
        if self._range == len(self._job.ranges):
            return False
        start, stop = self._job.ranges[self._range]
        return start <= low and (stop is None or (high is not None and high <= stop))

    def _cut(self, keys: list[bytes], values: list[bytes], high: bytes | None) -> None:
        """Take the deleted ranges out of a leaf's entries."""
        ranges = self._job.ranges
        for index in range(self._range, len(ranges)):
            start, stop = ranges[index]
            if high is not None and start >= high:
                break
            first = bisect_left(keys, start)
            last = len(keys) if stop is None else bisect_left(keys, stop)
            del keys[first:last], values[first:last]

    def _drop(self, level: int, pointers: bytes, at: int) -> None:
        """Free a subtree."""
        if level == 0 and not POINTER.unpack_from(pointers, at)[3] & HAS_OVERFLOW:
            # Not read, so it is not known when it was born: assume it always was.
            self._freed.add_node(pointers, at, 0)
            return
        node = self._pager.node(pointers, at, level, keep=False)
        if level:
            _, children, born = node
            self._freed.add_node(pointers, at, born)
            for child in range(0, len(children), POINTER_SIZE):
                self._drop(level - 1, children, child)
            self._job.yield_to_writers()
        else:
            self._freed.add_node(pointers, at, generation_of(node))
            for value in decode_leaf(node)[1]:
                if isinstance(value, OverflowRef):
                    self._freed.add_overflow(value)


class Updates:
    """The updates, taken from their iterator in batches; values too large for a leaf are written at once."""

    def __init__(self, columns: Iterable[Columns], writer: PageWriter, flags: int = 0) -> None:
        self._columns = iter(columns)
        self._writer = writer
        self._want = 16
        # The column that batches are cut from, and how far it was.
        self._column: Columns = ([], [])
        self._cut = 0
        # The batch, and how far it was taken.
        self._keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self._at = 0
        # Whether values may expire.
        self._flags = flags
        #: What the values of the batch may be: flags as in pointers.
        self.flags = flags
        #: The first key not taken yet; None when there is none.
        self.next: bytes | None = None
        self._fill(None)

    def take(self, stop: bytes | None) -> Iterator[Columns]:
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
        while self._cut == len(self._column[0]):
            column = next(self._columns, None)
            if column is None:
                self.next = None
                return
            self._column, self._cut = column, 0
        start, stop = self._cut, self._cut + self._want
        keys, values = self._column[0][start:stop], self._column[1][start:stop]
        self._cut += len(keys)
        self._at = 0
        if len(keys) != len(values) or (last is not None and keys[0] <= last) or not all(map(lt, keys, keys[1:])):
            raise InternalError("the updates of a checkpoint are not sorted, or name a key twice")
        sizes = list(map(len, filter(None, values)))
        self.flags = self._flags
        if sizes and max(sizes) > OVERFLOW_THRESHOLD:
            self.flags |= HAS_OVERFLOW
            overflow = self._writer.overflow
            for index, value in enumerate(values):
                if value is not None and len(value) > OVERFLOW_THRESHOLD:
                    values[index] = overflow(value)
        taken = sum(sizes) + sum(map(len, keys))
        self._want = max(1, min(_MAX_BATCH, 4 * self._want, self._want * _BATCH_BYTES // (taken + 1)))
        self._keys, self._values, self.next = keys, values, keys[0]


def merged(
    keys: list[bytes], values: list[bytes], new_keys: list[bytes], new_values: list[bytes | None]
) -> tuple[list[bytes], list[bytes]]:
    """Old entries and updates in one sorted run, without the deleted ones. May change the old lists."""
    if not keys:
        return without_deletes(new_keys, new_values)
    if keys[-1] < new_keys[0]:
        return without_deletes(keys + new_keys, [*values, *new_values])
    if len(new_keys) * _ONE_BY_ONE < len(keys):
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
