"""Nodes of the tree as bytes: how a leaf and an inner node lie in their pages.

The page file is an array of pages of 4096 bytes. A *node* is an extent of one or more consecutive
pages, padded with zeros. Everything is little-endian.

Node (leaf and inner):

    offset  size  field
         0     1  kind: 1 leaf, 2 inner, 3 leaf with values that expire
         1     1  level: 0 leaf, 1 parent of leaves, ...
         2     1  key column: 0 uniform, 2 narrow, 4 wide
         3     1  value column: 0 uniform, 2 narrow, 4 wide (inner: 0)
         4     4  n: entries of a leaf, children of an inner node; at least 1
         8     8  generation that wrote the node
        16     4  keys: offset of the key bytes
        20     4  values: offset of the value bytes; the key bytes end here
        24     4  end: offset where the value bytes end
        28     4  m: values of this leaf that are overflow references (inner: 0)
        32        boundaries of the keys, then of the values, each only if its column is not uniform:
                  count + 1 absolute offsets of 2 (narrow) or 4 (wide) bytes: item i is [b[i], b[i+1])
      keys        key bytes, one after the other (inner: the n - 1 separators)
    values        value bytes, one after the other (inner: n pointers of 20 bytes)
       end        m x u32: which entries are overflow references, ascending
                  kind 3: u32 k, at least 1, then k x u32: which entries expire, ascending
                  zeros up to the end of the last page

A uniform column holds items of one size, which is its length divided by their number. Separator i
is greater than every key below child i and not greater than any key below child i + 1.

The value of an entry that expires begins with its time (see kvwal/expiring.py). If it is too large for a leaf, that
holds for what lies in its extent, and not for the reference.

Pointer (to a node, 20 bytes): page u32, crc u32, pages u16, flags u16 (bit 0: overflow references
below, bit 1: values that expire below), count u64 (entries below). Page 0 holds a meta slot, so a pointer with page 0
points nowhere.

Overflow reference (in place of a value, 20 bytes): page u32, crc u32, length u32, generation u64.
The value lies alone in an extent from that page on; what follows it in its last page is ignored.

What makes bytes a node:

1. They lie wholly inside the file.
2. CRC-32C of the whole extent, seeded with its first page's number, equals the pointer's crc. So a
   lost, misplaced or stale write never verifies: the parent says what must be there.
3. The level is the parent's less one, the kind fits the level, and the columns have widths that are known.
4. The pointers of an inner node lie where its header says.

Beyond that the content is trusted: only a writer's own bug could break it, and `check` would tell. What cannot be
decoded is corruption too.
For an overflow value, 2 covers its `length` bytes only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product
from struct import Struct, error
from typing import Final, NamedTuple, NewType, NoReturn, TypeAlias

from kvwal.errors import CorruptionError
from kvwal.expiring import Expiring
from kvwal.files.names import DATA

__all__ = [
    "ADDRESS",
    "HAS_EXPIRING",
    "HAS_OVERFLOW",
    "INNER_CAPACITY",
    "LEAF_CAPACITY",
    "NODE_HEADER",
    "NO_POINTER",
    "OVERFLOW_REF",
    "OVERFLOW_THRESHOLD",
    "PAGE_SIZE",
    "PLAIN_LEAVES",
    "POINTER",
    "POINTER_SIZE",
    "ExpiringRef",
    "Inner",
    "Leaf",
    "OverflowRef",
    "PageId",
    "Pointer",
    "cut_points",
    "decode_inner",
    "decode_leaf",
    "encode_inner",
    "encode_leaf",
    "find_in_leaf",
    "generation_of",
    "node_fault",
    "pairs_in_leaf",
    "shortest_separator",
]

PageId = NewType("PageId", int)
"""Number of a page in the page file; its byte offset divided by `PAGE_SIZE`."""

# On disk: never change.
PAGE_SIZE: Final = 4096
LEAF: Final = 1
INNER: Final = 2
EXPIRING_LEAF: Final = 3
HAS_OVERFLOW: Final = 1
HAS_EXPIRING: Final = 2
NODE_HEADER: Final = Struct("<BBBBIQIIII")
POINTER: Final = Struct("<IIHHQ")
OVERFLOW_REF: Final = Struct("<IIIQ")
POINTER_SIZE: Final = 20
NO_POINTER: Final = bytes(POINTER_SIZE)
#: Page and crc of a pointer read as one number: the name under which a node is cached.
ADDRESS: Final = Struct("<Q")

_HEADER_SIZE: Final = 32
assert NODE_HEADER.size == _HEADER_SIZE
assert POINTER.size == POINTER_SIZE

# Free to change: nodes of any size are read. Measured with 16-byte keys and 100-byte values: against
# 8 KiB, leaves of 4 KiB make a scan and a load a fifth dearer and a merge two thirds, and a cold get no
# cheaper; leaves of 16 KiB make scans cheaper by a third, and gets and small checkpoints dearer.
LEAF_BYTES: Final = 2 * PAGE_SIZE
INNER_BYTES: Final = 2 * PAGE_SIZE
#: What entries may take of a node of the wished size; a node is larger only if one entry is.
LEAF_CAPACITY: Final = LEAF_BYTES - _HEADER_SIZE - 4
INNER_CAPACITY: Final = INNER_BYTES - _HEADER_SIZE - 2
#: A longer value gets an extent of its own. Three of these still fit into a leaf; at 2048, values just above
#: took twice their size and a scan four times as long.
OVERFLOW_THRESHOLD: Final = 2600

_UNIFORM: Final = 0
_NARROW: Final = 2
_WIDE: Final = 4
_MAX_NARROW: Final = 0xFFFF
_WIDTHS: Final = (_UNIFORM, _NARROW, _WIDE)
#: How a leaf without values that expire begins, and how any leaf does: kind, level, and columns of known width.
PLAIN_LEAVES: Final = frozenset(bytes([LEAF, 0, *each]) for each in product(_WIDTHS, _WIDTHS))
_LEAVES: Final = PLAIN_LEAVES | {bytes([EXPIRING_LEAF]) + each[1:] for each in PLAIN_LEAVES}
#: What decoding raises where counts and offsets in verified bytes do not fit each other.
_ODD: Final = (error, ArithmeticError, LookupError, ValueError)
_NARROW_PAIR: Final = Struct("<HH")
_WIDE_PAIR: Final = Struct("<II")

#: A decoded inner node: separators, packed pointers, generation that wrote it.
Inner: TypeAlias = tuple[tuple[bytes, ...], bytes, int]
#: The keys and the values of a leaf, which no reader can change.
Columns: TypeAlias = tuple[tuple[bytes, ...], tuple[bytes, ...]]
#: A decoded leaf: keys, values, generation that wrote it, pairs (see `pairs_in_leaf`). Shared by all who read it.
Leaf: TypeAlias = tuple[tuple[bytes, ...], tuple[bytes, ...], int, list[tuple[bytes, bytes]]]


class Pointer(NamedTuple):
    """A child pointer, unpacked."""

    page: int
    crc: int
    pages: int
    flags: int
    entries: int


class OverflowRef(bytes):
    """A packed overflow reference that stands for a value. It never leaves this package."""

    __slots__ = ()


class ExpiringRef(OverflowRef):
    """One that stands for a value that expires."""

    __slots__ = ()


# Structs are made once per shape; a program meets few shapes, and an odd one costs a rebuild.
_MAX_SHAPES: Final = 1024
_boundaries: dict[tuple[int, int], Struct] = {}
_items: dict[tuple[int, int], Struct] = {}


def _boundary_struct(width: int, count: int) -> Struct:
    found = _boundaries.get((width, count))
    if found is None:
        if len(_boundaries) >= _MAX_SHAPES:
            _boundaries.clear()
        found = _boundaries[width, count] = Struct(f"<{count}{'H' if width == _NARROW else 'I'}")
    return found


def _item_struct(size: int, count: int) -> Struct:
    found = _items.get((size, count))
    if found is None:
        if len(_items) >= _MAX_SHAPES:
            _items.clear()
        found = _items[size, count] = Struct(f"{size}s" * count)
    return found


def _slices(raw: bytes, column: int, at: int, begin: int, end: int, n: int) -> tuple[bytes, ...]:
    """The n items of a column whose boundaries, if any, lie at `at` and whose bytes at [begin, end)."""
    if column == _UNIFORM:
        if n > len(raw):
            raise ValueError(f"{n} items do not lie in {len(raw)} bytes")
        return _item_struct((end - begin) // n, n).unpack_from(raw, begin) if n else ()
    bounds = _boundary_struct(column, n + 1).unpack_from(raw, at)
    return tuple([raw[a:b] for a, b in pairwise(bounds)])


def _encode(
    kind: int,
    level: int,
    n: int,
    generation: int,
    keys: Sequence[bytes],
    key_size: int,
    values: Sequence[bytes],
    value_size: int,
    overflow: Sequence[int],
    expiring: Sequence[int] = (),
) -> bytes:
    """A node; a size is the length of all items of that column, or -1 if it is not known or they differ."""
    key_sizes = _sizes(keys) if key_size < 0 else None
    value_sizes = _sizes(values) if value_size < 0 else None
    key_bytes = b"".join(keys)
    value_bytes = b"".join(values)
    body = len(key_bytes) + len(value_bytes)
    bounds = (len(keys) + 1 if key_sizes else 0) + (len(values) + 1 if value_sizes else 0)
    width = _NARROW
    begin = _HEADER_SIZE + bounds * _NARROW
    if begin + body > _MAX_NARROW:
        width = _WIDE
        begin = _HEADER_SIZE + bounds * _WIDE
    middle = begin + len(key_bytes)
    parts = [
        NODE_HEADER.pack(
            kind,
            level,
            width if key_sizes else _UNIFORM,
            width if value_sizes else _UNIFORM,
            n,
            generation,
            begin,
            middle,
            middle + len(value_bytes),
            len(overflow),
        )
    ]
    if key_sizes:
        parts.append(_boundary_struct(width, len(keys) + 1).pack(*accumulate(key_sizes, initial=begin)))
    if value_sizes:
        parts.append(_boundary_struct(width, len(values) + 1).pack(*accumulate(value_sizes, initial=middle)))
    parts.append(key_bytes)
    parts.append(value_bytes)
    if overflow:
        parts.append(_boundary_struct(_WIDE, len(overflow)).pack(*overflow))
    if expiring:
        parts.append(_boundary_struct(_WIDE, 1 + len(expiring)).pack(len(expiring), *expiring))
    return b"".join(parts)


def _sizes(items: Sequence[bytes]) -> list[int] | None:
    """The lengths; None if they are all the same."""
    sizes = list(map(len, items))
    return None if not sizes or sizes.count(sizes[0]) == len(sizes) else sizes


def encode_leaf(
    keys: Sequence[bytes],
    values: Sequence[bytes],
    key_size: int,
    value_size: int,
    overflow: Sequence[int],
    generation: int,
    expiring: Sequence[int] = (),
) -> bytes:
    """The bytes of a leaf, without padding.

    Args:
        key_size, value_size: the length of all keys, of all values; -1 if it is not known or they differ.
        overflow: which values are overflow references, ascending.
        expiring: which values expire, ascending.
    """
    kind = EXPIRING_LEAF if expiring else LEAF
    return _encode(kind, 0, len(keys), generation, keys, key_size, values, value_size, overflow, expiring)


def encode_inner(separators: Sequence[bytes], pointers: bytes, level: int, generation: int) -> bytes:
    """The bytes of an inner node, without padding: n packed pointers and the n - 1 separators between them."""
    return _encode(INNER, level, len(separators) + 1, generation, separators, -1, (pointers,), 0, ())


def node_fault(raw: bytes, level: int) -> str | None:
    """Why verified bytes are not a node of this level; None if they are."""
    # For a leaf, which is what is read most, by one look.
    if not level and raw[:4] in _LEAVES:
        return None
    if len(raw) < _HEADER_SIZE:
        return "is too short for a node"
    kind, has_level, key_column, value_column, n, _, begin, middle, end, _ = NODE_HEADER.unpack_from(raw)
    if has_level != level or kind not in ((INNER,) if level else (LEAF, EXPIRING_LEAF)):
        return f"holds a node of kind {kind} and level {has_level} where one of level {level} belongs"
    if key_column not in _WIDTHS or value_column not in (_WIDTHS if not level else (_UNIFORM,)):
        return f"holds a node with columns of width {key_column} and {value_column}, which are not known"
    lies = _HEADER_SIZE + n * key_column <= begin <= middle and middle + n * POINTER_SIZE == end <= len(raw)
    if not n or not lies:
        return f"holds a node with {n} children that do not lie where its header says"
    return None


def _undecodable(raw: bytes, failure: BaseException) -> NoReturn:
    what = f"a node of generation {generation_of(raw)} cannot be decoded ({type(failure).__name__}: {failure})"
    raise CorruptionError(DATA, None, what) from failure


def generation_of(raw: bytes | Leaf) -> int:
    """The generation that wrote the node."""
    if isinstance(raw, tuple):
        return raw[2]
    return int.from_bytes(raw[8:16], "little")


def decode_leaf(raw: bytes | Leaf) -> Columns:
    """All keys and values; overflow references as `OverflowRef`. CorruptionError if they cannot be decoded."""
    if isinstance(raw, tuple):
        return raw[0], raw[1]
    try:
        return _decoded_leaf(raw)
    except _ODD as failure:
        _undecodable(raw, failure)


def _decoded_leaf(raw: bytes) -> Columns:
    kind, _, key_column, value_column, n, _, begin, middle, end, m = NODE_HEADER.unpack_from(raw)
    keys = _slices(raw, key_column, _HEADER_SIZE, begin, middle, n)
    at = _HEADER_SIZE + (n + 1) * key_column
    values = _slices(raw, value_column, at, middle, end, n)
    if not m and kind != EXPIRING_LEAF:
        return keys, values
    marked = list(values)
    for index in _boundary_struct(_WIDE, m).unpack_from(raw, end):
        marked[index] = _reference(marked[index])
    if kind == EXPIRING_LEAF:
        for index in _expiring(raw, end + _WIDE * m):
            value = marked[index]
            marked[index] = ExpiringRef(value) if type(value) is OverflowRef else Expiring(value)
    return keys, tuple(marked)


def _reference(value: bytes) -> OverflowRef:
    if len(value) != OVERFLOW_REF.size:
        raise CorruptionError(DATA, None, f"an overflow reference has {len(value)} bytes")
    return OverflowRef(value)


def _expiring(raw: bytes, at: int) -> Sequence[int]:
    """Which entries expire, of a leaf that says so at this offset."""
    (k,) = _boundary_struct(_WIDE, 1).unpack_from(raw, at)
    return _boundary_struct(_WIDE, k).unpack_from(raw, at + _WIDE)


def pairs_in_leaf(leaf: Leaf) -> list[tuple[bytes, bytes]]:
    """The leaf's entries as tuples, made when they are first asked for. Never to be changed."""
    pairs = leaf[3]
    if not pairs:
        # One C call changes the list, so another thread finds it empty or whole; two that make it make the same.
        pairs[:] = zip(leaf[0], leaf[1], strict=True)
    return pairs


def decode_inner(raw: bytes) -> Inner:
    """Separators, packed pointers and generation. CorruptionError if they cannot be decoded."""
    _, _, key_column, _, n, generation, begin, middle, end, _ = NODE_HEADER.unpack_from(raw)
    try:
        return _slices(raw, key_column, _HEADER_SIZE, begin, middle, n - 1), raw[middle:end], generation
    except _ODD as failure:
        _undecodable(raw, failure)


def find_in_leaf(leaf: bytes | Leaf, key: bytes) -> bytes | None:
    """The key's value (or `OverflowRef`) without decoding the leaf; None if the key is not there.

    CorruptionError if the leaf cannot be decoded.
    """
    if isinstance(leaf, tuple):
        keys, values, _, _ = leaf
        at = bisect_left(keys, key)
        return values[at] if at < len(keys) and keys[at] == key else None
    raw = leaf
    # Where nothing is raised this costs nothing.
    try:
        kind, _, key_column, value_column, n, _, begin, middle, end, m = NODE_HEADER.unpack_from(raw)
        # The search for the bytes runs in C. A hit that is not at a boundary may hide the true one.
        at = raw.find(key, begin, middle)
        if at < 0:
            return None
        size = len(key)
        if key_column == _UNIFORM:
            if size * n != middle - begin:
                return None
            index = 0
            if n > 1:
                index, rest = divmod(at - begin, size)
                if rest:
                    index = _search_uniform(raw, key, begin, n)
                    if index < 0:
                        return None
        else:
            # Where one boundary is the hit's begin and the next its end, the hit is a key: a search again in C.
            pair = (_NARROW_PAIR if key_column == _NARROW else _WIDE_PAIR).pack(at, at + size)
            index, rest = divmod(raw.find(pair, _HEADER_SIZE, begin) - _HEADER_SIZE, key_column)
            if rest or not 0 <= index < n:
                bounds = _boundary_struct(key_column, n + 1).unpack_from(raw, _HEADER_SIZE)
                index = _search_bounds(raw, key, bounds, n)
                if index < 0:
                    return None
        if value_column == _UNIFORM:
            size = (end - middle) // n
            value = raw[middle + index * size : middle + (index + 1) * size]
        else:
            offset = _HEADER_SIZE + (n + 1) * key_column + index * value_column
            first, last = (_NARROW_PAIR if value_column == _NARROW else _WIDE_PAIR).unpack_from(raw, offset)
            value = raw[first:last]
        is_ref = m and index in _boundary_struct(_WIDE, m).unpack_from(raw, end)
        if kind == EXPIRING_LEAF and index in _expiring(raw, end + _WIDE * m):
            return ExpiringRef(_reference(value)) if is_ref else Expiring(value)
        return _reference(value) if is_ref else value
    except _ODD as failure:
        _undecodable(raw, failure)


def _search_uniform(raw: bytes, key: bytes, begin: int, n: int) -> int:
    size = len(key)
    low, high = 0, n
    while low < high:
        mid = (low + high) >> 1
        at = begin + mid * size
        if raw[at : at + size] < key:
            low = mid + 1
        else:
            high = mid
    at = begin + low * size
    return low if low < n and raw[at : at + size] == key else -1


def _search_bounds(raw: bytes, key: bytes, bounds: Sequence[int], n: int) -> int:
    low, high = 0, n
    while low < high:
        mid = (low + high) >> 1
        if raw[bounds[mid] : bounds[mid + 1]] < key:
            low = mid + 1
        else:
            high = mid
    return low if low < n and raw[bounds[low] : bounds[low + 1]] == key else -1


def shortest_separator(before: bytes, after: bytes) -> bytes:
    """The shortest s with before < s <= after."""
    # By halving, not by a loop over bytes: keys may share 65,000 of them.
    low, high = 0, min(len(before), len(after))
    while low < high:
        mid = (low + high + 1) >> 1
        if before[:mid] == after[:mid]:
            low = mid
        else:
            high = mid - 1
    return after[: low + 1]


def cut_points(ends: Sequence[int], capacity: int, hold: int, least: int) -> Iterator[int]:
    """Where to cut a run of entries into nodes: the index after the last entry of each.

    Args:
        ends: running total of the entries' sizes.
        capacity: what a node should hold at most; it holds more only to have `least` entries.
        hold: stop when what is left is at most this, or makes no two nodes; 0 to cut everything, evenly.
        least: entries a node must have, unless there are fewer.
    """
    n = len(ends)
    start = base = 0
    while start < n:
        rest = ends[-1] - base
        if hold:
            if rest <= hold or n - start < 2 * least:
                return
            stop = bisect_left(ends, base + capacity + 1, start)
        else:
            nodes = -(-rest // capacity)
            if nodes <= 1:
                stop = n
            else:
                stop = bisect_left(ends, base + -(-rest // nodes), start) + 1
                if ends[stop - 1] - base > capacity:
                    stop -= 1
        stop = max(stop, start + least)
        if n - stop < least:
            stop = n
        yield stop
        start = stop
        base = ends[stop - 1]
