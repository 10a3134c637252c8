"""Merging a sorted run of updates into the tree, copy-on-write, in one pass from left to right.

The old tree is walked; a subtree that nothing touches is kept by its pointer. What is touched is
streamed, entries through one builder of leaves and pointers through one builder per inner level:

1. A builder cuts nodes off its front while it holds more than two nodes' worth, so that what is left
   can always be shared out evenly over one or two nodes. A bulk load fills its nodes; neighbouring
   leaves that all change are packed anew, full.
2. Before an untouched subtree is kept, the builders below it are emptied (`_ready`). If what they
   hold would make nodes less than `_FILL` full, the subtree is opened instead and its first node
   absorbed: a split next to a full leaf makes three of two, a leaf shrunk by deletes joins its
   neighbour. After `_MAX_ABSORBED` of them it is given up, so one update never costs a long run.
3. A subtree that lies wholly in a deleted range is dropped. Its leaves are read only where their
   pointer says that they hold overflow references.

Separators: between two new leaves the shortest that separates; next to a kept subtree the separator
it had, which still bounds it, because every update on its side of it went into the subtree.

Nothing is changed in place: what is no longer part of the tree goes into `freed`, for the free list.
Requires: the updates are sorted by key, no key twice (InternalError otherwise).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from operator import add
from typing import Final

from kvwal.batch import KeyRange
from kvwal.pages.freelist import Freed
from kvwal.pages.meta import Meta
from kvwal.pages.node import (
    ADDRESS,
    HAS_OVERFLOW,
    INNER_ROOM,
    LEAF_ROOM,
    NO_POINTER,
    OVERFLOW_REF,
    PAGE_SIZE,
    POINTER,
    POINTER_SIZE,
    Leaf,
    OverflowRef,
    cut_points,
    decode_leaf,
    encode_inner,
    encode_leaf,
    generation_of,
    shortest_separator,
)
from kvwal.pages.pager import Pager, PageWriter
from kvwal.pages.updates import Updates, merged, one_size, without_deletes

__all__ = ["Merge"]

_FILL: Final = 0.66
_MAX_ABSORBED: Final = 3
#: Entries are cut into leaves when this many rooms have come together; fewer cuts cost less.
_EMIT_ROOMS: Final = 6
#: An inner node has so many children even if its separators are huge; else the tree grew too high.
_LEAST_CHILDREN: Final = 4


class Merge:
    """One merge; used once, by `run`. Not thread-safe."""

    def __init__(
        self,
        pager: Pager,
        writer: PageWriter,
        updates: Iterable[tuple[bytes, bytes | None]],
        ranges: Sequence[KeyRange],
        touches: Sequence[bytes] = (),
        moved_from: int | None = None,
        give_way: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare.

        Args:
            updates: keys and values (None: delete), sorted by key.
            ranges: deleted before the updates apply; disjoint and sorted (`joined_ranges`).
            touches: keys whose leaves are written anew though nothing in them changes; sorted.
            moved_from: overflow extents that reach beyond this page are moved, in leaves that are touched.
            give_way: called at least once a leaf.
        """
        self._pager = pager
        self._writer = writer
        self._updates = Updates(updates, writer)
        self._ranges = ranges
        self._range = 0
        self._touches = touches
        self._touch = 0
        self._moved_from = moved_from
        self._give_way = give_way
        # Giving way costs more than a leaf does, so a leaf that is read and written pays once.
        self._paid = 0
        #: Extents of the old tree that the new one does not have.
        self.freed = Freed(writer.generation)
        # The builder of leaves.
        self._keys: list[bytes] = []
        self._values: list[bytes] = []
        # The one length that all of them have; -1 if they differ. Most stores have keys or values of one
        # length, and then a million of them need not be measured again and again.
        self._key_size = -1
        self._value_size = -1
        self._size = 0
        self._overflow = False
        # The last key of the leaf before, or None: then `_floor` separates what was kept before.
        self._last: bytes | None = None
        self._floor = b""
        self._absorbed = 0
        # Builders of inner levels: children of level 0 are in [0], and so on.
        self._levels: list[_Level] = []

    def run(self, meta: Meta) -> tuple[bytes, int]:
        """Merge into the tree of `meta`; the packed pointer to the new root, and the height."""
        if meta.height:
            self._children(meta.height - 1, [], meta.root, b"", None)
        for keys, values in self._updates.take(None):
            self._push(*without_deletes(keys, values))
        return self._finish()

    # The walk over the old tree.

    def _children(self, level: int, separators: list[bytes], pointers: bytes, low: bytes, high: bytes | None) -> None:
        """Take over the children, which have `level` and hold the keys in [low, high)."""
        n = len(separators) + 1
        index = 0
        while index < n:
            begin = separators[index - 1] if index else low
            event = self._next_event(begin)
            target = n if event is None else bisect_right(separators, event, index)
            if high is not None and event is not None and event >= high:
                target = n
            if target > index and self._ready(level):
                self._keep(level, pointers, index, target, [begin, *separators[index : target - 1]])
                self._floor = separators[target - 1] if target < n else high or b""
                index = target
                continue
            if level == 0:
                self._absorbed = self._absorbed + 1 if target > index else 0
            end = separators[index] if index < n - 1 else high
            self._open(level, pointers, index * POINTER_SIZE, begin, end)
            index += 1

    def _next_event(self, begin: bytes) -> bytes | None:
        """The first key from `begin` on at which something happens; None if nothing does any more."""
        event = self._updates.next
        ranges = self._ranges
        while self._range < len(ranges):
            start, stop = ranges[self._range]
            if stop is None or stop > begin:
                start = max(start, begin)
                if event is None or start < event:
                    event = start
                break
            self._range += 1
        touches = self._touches
        while self._touch < len(touches):
            touch = touches[self._touch]
            if touch >= begin:
                if event is None or touch < event:
                    event = touch
                break
            self._touch += 1
        return event

    def _keep(self, level: int, pointers: bytes, index: int, target: int, separators: list[bytes]) -> None:
        parents = self._level(level)
        parents.separators += separators
        kept = pointers[index * POINTER_SIZE : target * POINTER_SIZE]
        parents.pointers += [kept[at : at + POINTER_SIZE] for at in range(0, len(kept), POINTER_SIZE)]
        parents.size += sum(map(len, separators)) + (POINTER_SIZE + 2) * len(separators)
        self._last = None
        self._absorbed = 0
        if parents.size > _EMIT_ROOMS * INNER_ROOM:
            self._emit_inner(level, hold=True)

    def _open(self, level: int, pointers: bytes, at: int, low: bytes, high: bytes | None) -> None:
        """Take over a node by its content: something in it changes, or its neighbour needs it."""
        if self._ranges and self._covered(low, high):
            self._drop(level, pointers, at)
            for keys, values in self._updates.take(high):
                self._push(*without_deletes(keys, values))
            self._give_way()
            return
        node = self._pager.node(pointers, at, level, keep=False)
        if level:
            separators, children, born = node
            self._free(pointers, at, born)
            self._children(level - 1, separators, children, low, high)
        else:
            self._free(pointers, at, generation_of(node))
            self._leaf(node, high, bool(POINTER.unpack_from(pointers, at)[3] & HAS_OVERFLOW))
            self._paid += 1
            self._give_way()

    def _leaf(self, raw: bytes | Leaf, high: bytes | None, overflow: bool) -> None:
        keys, values = decode_leaf(raw)
        gone: set[bytes] = {value for value in values if type(value) is OverflowRef} if overflow else set()
        if self._ranges:
            self._cut(keys, values, high)
        at = 0
        for new_keys, new_values in self._updates.take(high):
            stop = bisect_right(keys, new_keys[-1], at)
            merged_keys, merged_values = merged(keys[at:stop], values[at:stop], new_keys, new_values)
            at = stop
            self._push(merged_keys, self._still(merged_values, gone) if overflow else merged_values, overflow)
        if at:
            keys, values = keys[at:], values[at:]
        self._push(keys, self._still(values, gone) if overflow else values, overflow)
        for ref in gone:
            self._free_overflow(ref)

    def _still(self, values: list[bytes], gone: set[bytes]) -> list[bytes]:
        """The values; references of the old leaf that are among them are not gone, unless they are moved."""
        result = []
        for value in values:
            if type(value) is OverflowRef and value in gone:
                page, _, length, _ = OVERFLOW_REF.unpack(value)
                if self._moved_from is None or page + -(-length // PAGE_SIZE) <= self._moved_from:
                    gone.discard(value)
                else:
                    value = self._writer.overflow(self._pager.overflow(value))
            result.append(value)
        return result

    def _covered(self, low: bytes, high: bytes | None) -> bool:
        """Whether [low, high) lies in one deleted range. Requires: `_next_event(low)` was called."""
        if self._range == len(self._ranges):
            return False
        start, stop = self._ranges[self._range]
        return start <= low and (stop is None or (high is not None and high <= stop))

    def _cut(self, keys: list[bytes], values: list[bytes], high: bytes | None) -> None:
        """Take the deleted ranges out of a leaf's entries."""
        for index in range(self._range, len(self._ranges)):
            start, stop = self._ranges[index]
            if high is not None and start >= high:
                break
            first = bisect_left(keys, start)
            last = len(keys) if stop is None else bisect_left(keys, stop)
            del keys[first:last], values[first:last]

    def _drop(self, level: int, pointers: bytes, at: int) -> None:
        """Free a subtree."""
        overflow = POINTER.unpack_from(pointers, at)[3] & HAS_OVERFLOW
        if level == 0 and not overflow:
            # Not read, so it is not known when it was born: assume it always was.
            self._free(pointers, at, 0)
            return
        node = self._pager.node(pointers, at, level, keep=False)
        if level:
            _, children, born = node
            self._free(pointers, at, born)
            for child in range(0, len(children), POINTER_SIZE):
                self._drop(level - 1, children, child)
            self._give_way()
        else:
            self._free(pointers, at, generation_of(node))
            for value in decode_leaf(node)[1]:
                if type(value) is OverflowRef:
                    self._free_overflow(value)

    def _free(self, pointers: bytes, at: int, born: int) -> None:
        page, _, pages, _, _ = POINTER.unpack_from(pointers, at)
        (address,) = ADDRESS.unpack_from(pointers, at)
        self.freed.add(page, pages, born, address)

    def _free_overflow(self, ref: bytes) -> None:
        page, _, length, born = OVERFLOW_REF.unpack(ref)
        (address,) = ADDRESS.unpack_from(ref)
        self.freed.add(page, -(-length // PAGE_SIZE), born, address)

    # The builders of the new tree.

    def _level(self, level: int) -> _Level:
        while len(self._levels) <= level:
            self._levels.append(_Level())
        return self._levels[level]

    def _push(self, keys: list[bytes], values: list[bytes], overflow: bool = False) -> None:
        """Append entries to the builder of leaves."""
        if not keys:
            return
        self._give_way()
        size = one_size(keys)
        value_size = one_size(values)
        if not self._keys:
            self._key_size, self._value_size = size, value_size
        else:
            if size != self._key_size:
                self._key_size = -1
            if value_size != self._value_size:
                self._value_size = -1
        self._keys += keys
        self._values += values
        self._size += (
            (sum(map(len, keys)) if size < 0 else size * len(keys))
            + (sum(map(len, values)) if value_size < 0 else value_size * len(keys))
        )
        self._overflow = self._overflow or overflow or self._updates.overflow
        if self._size > _EMIT_ROOMS * LEAF_ROOM:
            self._emit_leaves(hold=True)

    def _ready(self, level: int) -> bool:
        """Empty the builders below `level`; False if that would make a node that is too empty."""
        exhausted = self._absorbed >= _MAX_ABSORBED
        if self._keys:
            if not exhausted and not _filled(self._leaf_bytes(), LEAF_ROOM):
                return False
            self._emit_leaves(hold=False)
        for below in range(min(level, len(self._levels))):
            parents = self._levels[below]
            if parents.pointers:
                if not exhausted and not _filled(parents.size, INNER_ROOM):
                    self._absorbed += 1
                    return False
                self._emit_inner(below, hold=False)
        return True

    def _extra(self) -> int:
        """Bytes an entry takes in a leaf beside its key and value."""
        return (2 if self._key_size < 0 else 0) + (2 if self._value_size < 0 else 0) + (4 if self._overflow else 0)

    def _leaf_bytes(self) -> int:
        return self._size + self._extra() * len(self._keys)

    def _emit_leaves(self, *, hold: bool) -> None:
        """Write leaves from the entries that have come together, all of them or down to two rooms."""
        keys, values = self._keys, self._values
        if not keys:
            return
        extra = self._extra()
        ends: Sequence[int]
        if self._key_size >= 0 and self._value_size >= 0:
            entry = self._key_size + self._value_size + extra
            ends = range(entry, entry * len(keys) + 1, entry) if entry else [0]
        else:
            ends = list(accumulate(map(add, map(len, keys), map(len, values))))
            ends = list(map(add, ends, range(extra, extra * len(ends) + 1, extra)))
        start = 0
        for stop in cut_points(ends, LEAF_ROOM, 2 * LEAF_ROOM if hold else 0, 1):
            self._write_leaf(keys[start:stop], values[start:stop])
            start = stop
        self._size = ends[-1] - ends[start - 1] - extra * (len(keys) - start)
        del keys[:start], values[:start]
        if not keys:
            self._overflow = False

    def _write_leaf(self, keys: list[bytes], values: list[bytes]) -> None:
        refs: list[int] = []
        if self._overflow:
            refs = [index for index, value in enumerate(values) if type(value) is OverflowRef]
        data = encode_leaf(keys, values, self._key_size, self._value_size, refs, self._writer.generation)
        pointer = self._writer.node(data, HAS_OVERFLOW if refs else 0, len(keys))
        separator = self._floor if self._last is None else shortest_separator(self._last, keys[0])
        self._last = keys[-1]
        self._add_child(0, separator, pointer)
        if self._paid:
            self._paid -= 1
        else:
            self._give_way()

    def _add_child(self, level: int, separator: bytes, pointer: bytes) -> None:
        parents = self._level(level)
        parents.separators.append(separator)
        parents.pointers.append(pointer)
        parents.size += len(separator) + POINTER_SIZE + 2
        if parents.size > _EMIT_ROOMS * INNER_ROOM:
            self._emit_inner(level, hold=True)

    def _emit_inner(self, level: int, *, hold: bool) -> None:
        """Write nodes from the pointers to nodes of `level` that have come together."""
        parents = self._levels[level]
        separators, pointers = parents.separators, parents.pointers
        ends = list(accumulate(len(separator) + POINTER_SIZE + 2 for separator in separators))
        start = 0
        for stop in cut_points(ends, INNER_ROOM, 2 * INNER_ROOM if hold else 0, _LEAST_CHILDREN):
            children = b"".join(pointers[start:stop])
            flags = count = 0
            for _, _, _, child_flags, child_count in POINTER.iter_unpack(children):
                flags |= child_flags
                count += child_count
            data = encode_inner(separators[start + 1 : stop], children, level + 1, self._writer.generation)
            self._add_child(level + 1, separators[start], self._writer.node(data, flags, count))
            start = stop
        parents.size -= ends[start - 1] if start else 0
        del separators[:start], pointers[:start]

    def _finish(self) -> tuple[bytes, int]:
        """Empty all builders; the root is what is left alone at the top."""
        self._emit_leaves(hold=False)
        level = 0
        while level < len(self._levels):
            parents = self._levels[level]
            above = any(higher.pointers for higher in self._levels[level + 1 :])
            if len(parents.pointers) == 1 and not above:
                return self._shortened(parents.pointers[0], level + 1)
            if parents.pointers:
                self._emit_inner(level, hold=False)
            level += 1
        return NO_POINTER, 0

    def _shortened(self, root: bytes, height: int) -> tuple[bytes, int]:
        """The root, or what is below it as long as it has one child only."""
        self._writer.flush()
        while height > 1:
            separators, children, born = self._pager.node(root, 0, height - 1, keep=False)
            if separators:
                break
            self._free(root, 0, born)
            root = children
            height -= 1
        return root, height


class _Level:
    """Pointers that wait to become inner nodes. The first separator bounds the first child from below."""

    __slots__ = ("pointers", "separators", "size")

    def __init__(self) -> None:
        self.separators: list[bytes] = []
        self.pointers: list[bytes] = []
        self.size = 0


def _filled(size: int, room: int) -> bool:
    """Whether so many bytes, shared out evenly, make nodes that are full enough."""
    return size >= _FILL * room * -(-size // room)
