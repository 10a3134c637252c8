"""Reading one tree of a generation: point, range and count.

A `Tree` is a root and nothing else, so it is cheap to make and never changes. Reads take no lock.

Requires: the generation is pinned, or is one of the two newest, for as long as the tree is used.
Otherwise its pages may be written over, and a read raises CorruptionError (never wrong data).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import itemgetter
from struct import Struct
from typing import Final

from crc32c import crc32c

from kvwal.pages.cache import NotCached
from kvwal.pages.meta import Meta
from kvwal.pages.node import (
    ADDRESS,
    HAS_EXPIRING,
    HAS_OVERFLOW,
    NODE_HEADER,
    OVERFLOW_REF,
    PAGE_SIZE,
    PLAIN_LEAVES,
    POINTER,
    POINTER_SIZE,
    Inner,
    Leaf,
    OverflowRef,
    decode_leaf,
    find_in_leaf,
    generation_of,
    pairs_in_leaf,
)
from kvwal.pages.pager import Pager

__all__ = ["Tree"]

#: Neighbouring leaves that a scan reads in one call, at most; it begins with one.
_READ_AHEAD: Final = 32
#: Small leaves are combined until a chunk has this many entries, because each chunk costs its readers the same.
_CHUNK_ENTRIES: Final = 64
#: Bytes of large values a chunk holds before it is cut, so that a leaf full of them fits in memory.
_CHUNK_OVERFLOW_BYTES: Final = 4 << 20
_COUNT: Final = Struct("<12xQ")
_address_at: Final = ADDRESS.unpack_from
_FIRST: Final[Callable[[tuple[int, ...]], int]] = itemgetter(0)

_Chunk = tuple[Sequence[bytes], Sequence[bytes]]
_Pointer = tuple[int, int, int, int, int]
#: A leaf as it lies in the cache, its address, and whether it holds overflow references.
_Found = tuple[bytes | Leaf, int, int]


class Tree:
    """An immutable view of one table in one generation. Thread-safe."""

    __slots__ = ("_address", "_cache", "_count", "_pager", "_root", "has_expiring", "height", "meta")

    def __init__(self, pager: Pager, meta: Meta, root: bytes, height: int) -> None:
        self._pager = pager
        self._cache = pager.cache
        #: The generation; of all its tables this is one.
        self.meta = meta
        self.height = height
        self._root = root
        self._address: int = ADDRESS.unpack_from(root)[0]
        self._count: int
        _, _, _, flags, self._count = POINTER.unpack(root)
        #: Whether it has a value that expires.
        self.has_expiring = bool(flags & HAS_EXPIRING)

    def is_as_good_as(self, other: Tree) -> bool:
        """Whether it is of the same generation, and read in the same way."""
        return self._pager is other._pager and self.meta.generation == other.meta.generation

    def beside(self, root: bytes, height: int) -> Tree:
        """Another tree of the same generation, read in the same way."""
        return Tree(self._pager, self.meta, root, height)

    @property
    def pager(self) -> Pager:
        """What reads its nodes. Trees that have one lose their pages at the same time."""
        return self._pager

    def get(self, key: bytes) -> bytes | None:
        """The key's value; None if the key is not there. CorruptionError if a node does not verify."""
        level = self.height - 1
        if level < 0:
            return None
        cache = self._cache
        pointers = self._root
        at = 0
        address = self._address
        while level:
            node = cache.young.get(address)
            if node is None:
                node = self._pager.node(pointers, at, level)
            separators, pointers, _ = node
            at = bisect_right(separators, key) * POINTER_SIZE
            (address,) = _address_at(pointers, at)
            level -= 1
        leaf = cache.young.get(address)
        if leaf is None:
            if address not in cache.old:
                return self._get_uncached(key, pointers, at, address)
            leaf = self._pager.node(pointers, at, 0)
        else:
            cache.hits += 1
        value = find_in_leaf(leaf, key)
        if isinstance(value, OverflowRef):
            return self._pager.overflow(value)
        return value

    def _get_uncached(self, key: bytes, pointers: bytes, at: int, address: int) -> bytes | None:
        """The rest of `get` where the leaf has to be read.

        It does what `Pager.node` and `find_in_leaf` do, without calls in between, for a leaf of uniform columns: a
        get that misses takes an eighth less. Whatever is not as usual goes the general way.
        """
        pager, cache = self._pager, self._cache
        page, crc, pages, _, _ = POINTER.unpack_from(pointers, at)
        size = pages * PAGE_SIZE
        try:
            raw = pager.file.pread(size, page * PAGE_SIZE)
        except (OSError, ValueError):
            raw = b""
        if not page or len(raw) != size or crc32c(raw, page) != crc or raw[:4] not in PLAIN_LEAVES:
            leaf = pager.node(pointers, at, 0)
        else:
            cache.misses += 1
            if cache.admits(address):
                cache.keep(address, raw)
            _, _, key_column, value_column, n, _, begin, middle, end, overflows = NODE_HEADER.unpack_from(raw)
            if n and not (key_column or value_column or overflows):
                found = raw.find(key, begin, middle) - begin
                if found < 0:
                    return None
                key_size, value_size = (middle - begin) // n, (end - middle) // n
                # A hit that is no key hides the true one.
                if len(key) == key_size and key_size and not found % key_size:
                    first = middle + found // key_size * value_size
                    return raw[first : first + value_size]
            leaf = raw
        value = find_in_leaf(leaf, key)
        return pager.overflow(value) if isinstance(value, OverflowRef) else value

    def peek(self, key: bytes) -> bytes | None:
        """`get` for a thread that must not wait for a disk: raises NotCached where a page would have to be read."""
        level = self.height - 1
        if level < 0:
            return None
        pager = self._pager
        pointers = self._root
        at = 0
        while level >= 0:
            if self._cache.get(ADDRESS.unpack_from(pointers, at)[0]) is None:
                raise NotCached
            node = pager.node(pointers, at, level)
            if level:
                separators, pointers, _ = node
                at = bisect_right(separators, key) * POINTER_SIZE
            level -= 1
        value = find_in_leaf(node, key)
        if not isinstance(value, OverflowRef):
            return value
        if self._cache.get(ADDRESS.unpack_from(value)[0]) is None:
            raise NotCached
        return pager.overflow(value)

    def __len__(self) -> int:
        """Number of entries, without reading anything."""
        return self._count

    def count(self, start: bytes | None = None, stop: bytes | None = None) -> int:
        """Number of keys from `start` on, below `stop`; reads one path for each bound."""
        low = 0 if start is None else self.rank(start)
        high = self._count if stop is None else self.rank(stop)
        return max(0, high - low)

    def rank(self, key: bytes) -> int:
        """Number of keys below `key`; reads one path."""
        level = self.height - 1
        if level < 0:
            return 0
        rank = 0
        pointers = self._root
        at = 0
        while level:
            separators, pointers, _ = self._node(pointers, at, level)
            at = bisect_right(separators, key) * POINTER_SIZE
            rank += sum(map(_FIRST, _COUNT.iter_unpack(pointers[:at])))
            level -= 1
        return rank + bisect_left(self._leaf_keys(pointers, at), key)

    def key_at(self, rank: int) -> bytes:
        """The key with this many keys below it; reads one path. IndexError if there are not that many."""
        if not 0 <= rank < self._count:
            raise IndexError(f"there is no key {rank} of {self._count}")
        pointers = self._root
        at = 0
        for level in range(self.height - 1, 0, -1):
            _, pointers, _ = self._node(pointers, at, level)
            ends = list(accumulate(map(_FIRST, _COUNT.iter_unpack(pointers))))
            index = bisect_right(ends, rank)
            rank -= ends[index - 1] if index else 0
            at = index * POINTER_SIZE
        return self._leaf_keys(pointers, at)[rank]

    def middle(self, after: bytes | None, before: bytes | None) -> bytes | None:
        """The key in the middle of those between these two (None: of all); None if there is none. Reads three paths."""
        low = 0 if after is None else self.rank(after + b"\0")
        high = self._count if before is None else self.rank(before)
        return self.key_at((low + high) // 2) if low < high else None

    def _leaf_keys(self, pointers: bytes, at: int) -> Sequence[bytes]:
        leaf = self._cache.young.get(ADDRESS.unpack_from(pointers, at)[0])
        if leaf is None:
            leaf = self._pager.node(pointers, at, 0)
        return decode_leaf(leaf)[0]

    def cached_pairs(
        self, start: bytes | None, stop: bytes | None, most: int, *, reverse: bool
    ) -> tuple[list[tuple[bytes, bytes]], bool] | None:
        """The first `most` pairs of a range, in its direction, and whether they are the whole range.

        None where it does not all lie decoded in the cache, below one inner node. So this is short and waits for
        nothing.
        """
        pairs: list[tuple[bytes, bytes]] = []
        level = self.height - 1
        if level < 0 or (start is not None and stop is not None and stop <= start):
            return pairs, True
        young, old = self._cache.young, self._cache.old
        pointers = self._root
        at = 0
        # Whether nothing beyond the lowest inner node can belong to the range.
        edge = True
        while level:
            (address,) = _address_at(pointers, at)
            node = young.get(address)
            if node is None and (node := old.get(address)) is None:
                return None
            separators, pointers, _ = node
            if reverse:
                index = len(separators) if stop is None else bisect_left(separators, stop)
            else:
                index = 0 if start is None else bisect_right(separators, start)
            level -= 1
            if level and index != (0 if reverse else len(separators)):
                edge = False
            at = index * POINTER_SIZE
        end = len(pointers)
        while 0 <= at < end:
            (address,) = _address_at(pointers, at)
            leaf = young.get(address)
            if leaf is None:
                leaf = old.get(address)
            if type(leaf) is not tuple:
                return None
            keys = leaf[0]
            low, high = 0, len(keys)
            if start is not None and keys[0] < start:
                low = bisect_left(keys, start)
            if stop is not None and keys[-1] >= stop:
                high = bisect_left(keys, stop)
            found = leaf[3] or pairs_in_leaf(leaf)
            left = most - len(pairs)
            if reverse:
                begin = max(low, high - left)
                pairs += found[begin:high][::-1]
                if begin > low:
                    return pairs, False
                if low:
                    return pairs, True
                at -= POINTER_SIZE
                # Of the leaves to come only the other bound can cut anything.
                stop = None
            else:
                if high - low > left:
                    pairs += found[low : low + left]
                    return pairs, False
                pairs += found[low:high] if low or high < len(keys) else found
                if high < len(keys):
                    return pairs, True
                at += POINTER_SIZE
                start = None
            if len(pairs) == most:
                return pairs, False
        return (pairs, True) if edge else None

    def chunks(
        self, start: bytes | None = None, stop: bytes | None = None, *, reverse: bool = False
    ) -> Iterator[_Chunk]:
        """Keys and values of the range, a leaf or a few small ones at a time, never an empty list.

        Args:
            start: first key, included; None for the beginning.
            stop: where the range ends, excluded; None for the end.
            reverse: from the end; the lists themselves descend too.
        """
        if self.height == 0 or (start is not None and stop is not None and stop <= start):
            return
        pager = self._pager
        # A quarter of what was taken already, since how much the reader wants is not known.
        taken = want = 0
        held_keys: list[bytes] = []
        held_values: list[bytes] = []
        for leaf, address, overflow in self._leaves(start, stop, reverse):
            if isinstance(leaf, tuple):
                keys, values, _, _ = leaf
            else:
                keys, values = decode_leaf(leaf)
                if not overflow:
                    self._cache.keep_decoded(address, (keys, values, generation_of(leaf), []))
            low = bisect_left(keys, start) if start is not None and keys[0] < start else 0
            high = bisect_left(keys, stop) if stop is not None and keys[-1] >= stop else len(keys)
            if low or high < len(keys):
                if low >= high:
                    continue
                keys = keys[low:high]
                values = values[low:high]
            if reverse:
                keys = keys[::-1]
                values = values[::-1]
            if overflow:
                if held_keys:
                    yield held_keys, held_values
                    held_keys, held_values = [], []
                yield from _resolved(pager, keys, list(values))
                continue
            taken += len(keys)
            if not held_keys and len(keys) >= want:
                yield keys, values
            else:
                held_keys += keys
                held_values += values
                if len(held_keys) < want:
                    continue
                yield held_keys, held_values
                held_keys, held_values = [], []
            want = min(taken >> 2, _CHUNK_ENTRIES)
        if held_keys:
            yield held_keys, held_values

    def _node(self, pointers: bytes, at: int, level: int, keep: bool = True) -> Inner:
        found: Inner | None = self._cache.young.get(ADDRESS.unpack_from(pointers, at)[0])
        if found is None:
            found = self._pager.node(pointers, at, level, keep=keep)
        return found

    def _leaves(self, start: bytes | None, stop: bytes | None, reverse: bool) -> Iterator[_Found]:
        """The leaves that may hold keys of the range."""
        ahead = 1
        keep = True
        for pointers in self._parents(self._root, self.height - 1, start, stop, reverse, True):
            left = len(pointers) // POINTER_SIZE
            at = 0
            while left:
                # No more are unpacked than may be read in one call: a short scan looks at few.
                window = min(ahead, left)
                part = left - window if reverse else at
                run = [*POINTER.iter_unpack(pointers[part * POINTER_SIZE : (part + window) * POINTER_SIZE])]
                left -= window
                at += window
                if reverse:
                    run.reverse()
                yield from self._run(run, reverse, keep)
                keep = False
                ahead = min(2 * ahead, _READ_AHEAD)

    def _run(self, run: list[_Pointer], reverse: bool, keep: bool) -> Iterator[_Found]:
        """These leaves, from the cache or with one call for those that lie side by side."""
        pager = self._pager
        at = 0
        while at < len(run):
            page, crc, pages, flags, _ = run[at]
            address = page | crc << 32
            leaf = self._cache.get(address)
            if leaf is not None:
                yield leaf, address, flags & HAS_OVERFLOW
                at += 1
                continue
            end = at + 1
            first, last = page, page + pages
            while end < len(run) and (run[end][0] == last if not reverse else run[end][0] + run[end][2] == first):
                first, last = min(first, run[end][0]), max(last, run[end][0] + run[end][2])
                end += 1
            if end == at + 1:
                yield pager.node(POINTER.pack(*run[at]), 0, 0, keep=keep), address, flags & HAS_OVERFLOW
            else:
                raw = pager.pread((last - first) * PAGE_SIZE, first)
                for page, crc, pages, flags, _ in run[at:end]:
                    begin = (page - first) * PAGE_SIZE
                    size = pages * PAGE_SIZE
                    yield pager.leaf(raw[begin : begin + size], page, size, crc), page | crc << 32, flags & HAS_OVERFLOW
            at = end

    def _parents(
        self, pointers: bytes, level: int, start: bytes | None, stop: bytes | None, reverse: bool, keep: bool
    ) -> Iterator[bytes]:
        """Packed pointers to leaves, one parent's at a time; only the first path stays in the cache."""
        if level == 0:
            yield pointers
            return
        separators, children, _ = self._node(pointers, 0, level, keep)
        low = 0 if start is None else bisect_right(separators, start)
        high = len(separators) if stop is None else bisect_left(separators, stop)
        if level == 1:
            yield children[low * POINTER_SIZE : (high + 1) * POINTER_SIZE]
            return
        order = range(high, low - 1, -1) if reverse else range(low, high + 1)
        for index in order:
            child = children[index * POINTER_SIZE : (index + 1) * POINTER_SIZE]
            # The bounds cut nothing in the children between the outer ones; looking is cheap.
            yield from self._parents(child, level - 1, start, stop, reverse, keep)
            keep = False


def _resolved(pager: Pager, keys: Sequence[bytes], values: list[bytes]) -> Iterator[_Chunk]:
    """The entries with large values read, cut so that a chunk holds few of them."""
    at = 0
    left = _CHUNK_OVERFLOW_BYTES
    for index, value in enumerate(values):
        if not isinstance(value, OverflowRef):
            continue
        length: int = OVERFLOW_REF.unpack(value)[2]
        if length > left and index > at:
            yield keys[at:index], values[at:index]
            # The values just given must not stay in memory for the rest of the leaf.
            values[at:index] = [b""] * (index - at)
            at = index
            left = _CHUNK_OVERFLOW_BYTES
        left -= length
        values[index] = pager.overflow(value)
    yield keys[at:], values[at:]
