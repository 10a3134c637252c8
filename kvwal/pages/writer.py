"""Writing the tree of the next generation: nodes into pages, entries and pointers into nodes.

`PageWriter` puts nodes and large values, in long runs, into pages that nothing refers to. `TreeBuilder` packs
what a merge streams through it, entries through one builder of leaves and pointers through one builder per
inner level:

1. A builder cuts nodes off its front while it holds more than two nodes' worth, so that what is left
   can always be shared out evenly over one or two nodes. A bulk load fills its nodes; neighbouring
   leaves that all change are packed anew, full.
2. Before an untouched subtree is kept, the builders below it are emptied (`ready`). If what they
   hold would make nodes less than `_FILL` full, `ready` refuses: the merge opens the subtree instead and its
   first node is absorbed. A split next to a full leaf makes three of two, a leaf shrunk by deletes joins its
   neighbour. After `_MAX_ABSORBED` of them `ready` gives up, so one update never costs a long run.

Separators: between two new leaves the shortest that separates; next to a kept subtree the separator
it had, which still bounds it, because every update on its side of it went into the subtree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import add
from typing import Final

from crc32c import crc32c

from kvwal.expiring import Expiring
from kvwal.files import Buffer, File
from kvwal.pages.freelist import Allocator
from kvwal.pages.node import (
    HAS_EXPIRING,
    HAS_OVERFLOW,
    INNER_CAPACITY,
    LEAF_CAPACITY,
    NO_POINTER,
    OVERFLOW_REF,
    PAGE_SIZE,
    POINTER,
    POINTER_SIZE,
    ExpiringRef,
    OverflowRef,
    cut_points,
    encode_inner,
    encode_leaf,
    shortest_separator,
)

__all__ = ["PageWriteError", "PageWriter", "TreeBuilder", "one_size"]

#: Bytes written in one call; more gains nothing.
_RUN_BYTES: Final = 1 << 20
#: Bytes that are flushed at once: a commit, or a flush that is due, may have to wait for so much of the disk's time.
_FLUSH_BYTES: Final = 8 << 20
_ZEROS: Final = bytes(PAGE_SIZE)
#: How full a node must be before what follows it is kept.
_FILL: Final = 0.66
_MAX_ABSORBED: Final = 3
#: Nodes are cut off a builder that holds this many nodes' worth; fewer cuts cost less.
_EMIT_NODES: Final = 6
#: Children an inner node has even if its separators are huge; else the tree grew too high.
_LEAST_CHILDREN: Final = 4


class PageWriteError(Exception):
    """A write or flush failed. Tells it from a failed read; `PageFile.checkpoint` turns it into what users see."""

    def __init__(self, cause: OSError, *, is_of_flush: bool = False) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.is_of_flush = is_of_flush


class PageWriter:
    """Writes the nodes of one checkpoint into pages that nothing refers to. Not thread-safe.

    Nothing it writes matters before the meta is flipped, so a failure needs no clean-up on disk.
    """

    def __init__(self, file: File, allocator: Allocator, generation: int) -> None:
        self._file = file
        self._allocator = allocator
        self.generation = generation
        self._run: list[Buffer] = []
        self._run_at = 0
        self._run_end = 0
        self._unflushed_bytes = 0

    def node(self, data: bytes, flags: int, count: int) -> bytes:
        """Write a node; the packed pointer to it."""
        pages = -(-len(data) // PAGE_SIZE)
        data = data.ljust(pages * PAGE_SIZE, b"\0")
        page = self._place(self._allocator.take(pages), pages)
        crc = crc32c(data, page)
        self._run.append(data)
        return POINTER.pack(page, crc, pages, flags, count)

    def overflow(self, value: bytes) -> OverflowRef:
        """Write a value into an extent of its own; the reference to it."""
        pages = -(-len(value) // PAGE_SIZE)
        page = self._place(self._allocator.take(pages), pages)
        self._run.append(value)
        kind = ExpiringRef if type(value) is Expiring else OverflowRef
        padding = pages * PAGE_SIZE - len(value)
        if padding:
            self._run.append(_ZEROS[:padding])
        return kind(OVERFLOW_REF.pack(page, crc32c(value, page), len(value), self.generation))

    def at(self, page: int, data: bytes) -> int:
        """Write whole pages at a place that was taken before; their crc."""
        self._place(page, len(data) // PAGE_SIZE)
        self._run.append(data)
        return crc32c(data, page)

    def _place(self, page: int, pages: int) -> int:
        """Make what comes next go to these pages."""
        if page != self._run_end or (self._run_end - self._run_at + pages) * PAGE_SIZE > _RUN_BYTES:
            self.flush()
            self._run_at = page
        self._run_end = page + pages
        return page

    def flush(self) -> None:
        """Hand everything to the file, which is flushed now and then. Not durable on return. Raises PageWriteError."""
        run, self._run = self._run, []
        if not run:
            return
        at = self._run_at * PAGE_SIZE
        size = self._run_end * PAGE_SIZE - at
        self._run_at = self._run_end
        try:
            if size <= _RUN_BYTES:
                self._file.pwrite(b"".join(run), at)
            else:
                # A large value is not copied.
                self._file.pwrite_all(run, at)
        except OSError as failure:
            raise PageWriteError(failure) from failure
        self._unflushed_bytes += size
        if self._unflushed_bytes >= _FLUSH_BYTES:
            # Durability: none is needed yet, and the last flush, before the flip, is of what is left.
            try:
                self._file.datasync()
            except OSError as failure:
                raise PageWriteError(failure, is_of_flush=True) from failure
            self._unflushed_bytes = 0


class TreeBuilder:
    """The new tree, from left to right. Not thread-safe."""

    def __init__(self, writer: PageWriter, yield_to_writers: Callable[[], None]) -> None:
        self._writer = writer
        self._yield_to_writers = yield_to_writers
        #: Neighbours opened in a row because what came before them was too little for a node.
        self.absorbed = 0
        # The entries that wait to become leaves.
        self._keys: list[bytes] = []
        self._values: list[bytes] = []
        # The one length that all of them have; -1 if they differ. Most stores have keys or values of one
        # length, and then a million of them need not be measured again and again.
        self._key_size = -1
        self._value_size = -1
        self._size = 0
        # What the values may be: `HAS_OVERFLOW`, `HAS_EXPIRING`.
        self._flags = 0
        # The last key of the leaf before, or None: then `_floor` separates what was kept before.
        self._last: bytes | None = None
        self._floor = b""
        # Inner levels: children of level 0 wait in [0], and so on.
        self._levels: list[_Level] = []

    def push(self, keys: list[bytes], values: list[bytes], flags: int) -> None:
        """Append entries; `flags` (those of pointers) tell whether values may be overflow references, or expire."""
        if not keys:
            return
        self._yield_to_writers()
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
        self._size += (sum(map(len, keys)) if size < 0 else size * len(keys)) + (
            sum(map(len, values)) if value_size < 0 else value_size * len(keys)
        )
        self._flags |= flags
        if self._size > _EMIT_NODES * LEAF_CAPACITY:
            self._emit_leaves(hold=True)

    def keep(self, level: int, separators: list[bytes], pointers: bytes, floor: bytes) -> None:
        """Append subtrees of `level` that stay as they are; `floor` bounds what comes next. Requires: `ready`."""
        parents = self._level(level)
        parents.separators += separators
        parents.pointers += [pointers[at : at + POINTER_SIZE] for at in range(0, len(pointers), POINTER_SIZE)]
        parents.size += sum(map(len, separators)) + (POINTER_SIZE + 2) * len(separators)
        self._last = None
        self._floor = floor
        self.absorbed = 0
        if parents.size > _EMIT_NODES * INNER_CAPACITY:
            self._emit_inner(level, hold=True)

    def ready(self, level: int) -> bool:
        """Empty the builders below `level`; False if that would make a node that is too empty."""
        exhausted = self.absorbed >= _MAX_ABSORBED
        if self._keys:
            if not exhausted and not _filled(self._size + self._extra() * len(self._keys), LEAF_CAPACITY):
                return False
            self._emit_leaves(hold=False)
        for below in range(min(level, len(self._levels))):
            parents = self._levels[below]
            if parents.pointers:
                if not exhausted and not _filled(parents.size, INNER_CAPACITY):
                    self.absorbed += 1
                    return False
                self._emit_inner(below, hold=False)
        return True

    def finish(self) -> tuple[bytes, int]:
        """Empty all builders and write; what is left alone at the top is the root, with its height."""
        self._emit_leaves(hold=False)
        level = 0
        root, height = NO_POINTER, 0
        while level < len(self._levels):
            parents = self._levels[level]
            above = any(higher.pointers for higher in self._levels[level + 1 :])
            if len(parents.pointers) == 1 and not above:
                root, height = parents.pointers[0], level + 1
                break
            if parents.pointers:
                self._emit_inner(level, hold=False)
            level += 1
        self._writer.flush()
        return root, height

    def _level(self, level: int) -> _Level:
        while len(self._levels) <= level:
            self._levels.append(_Level())
        return self._levels[level]

    def _extra(self) -> int:
        """Bytes an entry takes in a leaf beside its key and value."""
        return (2 if self._key_size < 0 else 0) + (2 if self._value_size < 0 else 0) + 4 * self._flags.bit_count()

    def _emit_leaves(self, *, hold: bool) -> None:
        """Write leaves from the waiting entries, all of them or down to two nodes' worth."""
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
        # Before the numbers of those that expire stands how many there are.
        capacity = LEAF_CAPACITY - 4 if self._flags & HAS_EXPIRING else LEAF_CAPACITY
        for stop in cut_points(ends, capacity, 2 * LEAF_CAPACITY if hold else 0, 1):
            self._write_leaf(keys[start:stop], values[start:stop])
            start = stop
        self._size = ends[-1] - ends[start - 1] - extra * (len(keys) - start)
        del keys[:start], values[:start]
        if not keys:
            self._flags = 0

    def _write_leaf(self, keys: list[bytes], values: list[bytes]) -> None:
        refs: list[int] = []
        expiring: list[int] = []
        if self._flags & HAS_OVERFLOW:
            refs = [index for index, value in enumerate(values) if isinstance(value, OverflowRef)]
        if self._flags & HAS_EXPIRING:
            expiring = [index for index, value in enumerate(values) if isinstance(value, Expiring | ExpiringRef)]
        data = encode_leaf(keys, values, self._key_size, self._value_size, refs, self._writer.generation, expiring)
        flags = (HAS_OVERFLOW if refs else 0) | (HAS_EXPIRING if expiring else 0)
        pointer = self._writer.node(data, flags, len(keys))
        separator = self._floor if self._last is None else shortest_separator(self._last, keys[0])
        self._last = keys[-1]
        self._add_child(0, separator, pointer)
        self._yield_to_writers()

    def _add_child(self, level: int, separator: bytes, pointer: bytes) -> None:
        parents = self._level(level)
        parents.separators.append(separator)
        parents.pointers.append(pointer)
        parents.size += len(separator) + POINTER_SIZE + 2
        if parents.size > _EMIT_NODES * INNER_CAPACITY:
            self._emit_inner(level, hold=True)

    def _emit_inner(self, level: int, *, hold: bool) -> None:
        """Write nodes from the waiting pointers to nodes of `level`."""
        parents = self._levels[level]
        separators, pointers = parents.separators, parents.pointers
        ends = list(accumulate(len(separator) + POINTER_SIZE + 2 for separator in separators))
        start = 0
        for stop in cut_points(ends, INNER_CAPACITY, 2 * INNER_CAPACITY if hold else 0, _LEAST_CHILDREN):
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


class _Level:
    """Pointers that wait to become inner nodes. The first separator bounds the first child from below."""

    __slots__ = ("pointers", "separators", "size")

    def __init__(self) -> None:
        self.separators: list[bytes] = []
        self.pointers: list[bytes] = []
        self.size = 0


def one_size(items: Sequence[bytes]) -> int:
    """The length that all have; -1 if they differ. Requires: not empty."""
    sizes = set(map(len, items))
    return sizes.pop() if len(sizes) == 1 else -1


def _filled(size: int, capacity: int) -> bool:
    """Whether this many bytes, shared out evenly, make nodes that are full enough."""
    return size >= _FILL * capacity * -(-size // capacity)
