"""The key index of a sealed segment: which commits changed a key, and its keys in order, without reading the segment.

The file is derived. It has the segment's name with `.keys` and is written by the writer alone; one that is missing or
not valid is made again. Little-endian, no padding:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwalkey` |
| 8 | 2 | version | 1 |
| 10 | 2 | - | zero |
| 12 | 4 | salt | the segment's |
| 16 | 4 | marker | the segment's |
| 20 | 4 | revision | the segment's |
| 24 | 8 | first_seqno | the segment's |
| 32 | 8 | last_seqno | the segment's |
| 40 | 4 | n | number of order rows: the puts and deletes of all tables |
| 44 | 4 | k | number of hash rows: the distinct keys of all tables |
| 48 | 4 | t | number of tables with order rows |
| 52 | 4 | m | number of deleted ranges |
| 56 | 8 | size | of the ranges, in bytes |
| 64 | 4 | f | size of the fences, in bytes |
| 68 | 4 | marks | their size: 2 x k, or 0 if it was written without |
| 72 | 8 x t | tables | ascending: id u32, number of its order rows u32 |
| - | 8 x blocks | order blocks | of 256 order rows each, the last one smaller: next u32, CRC-32C of its rows |
| - | 10 x blocks | hash blocks | of 256 hash rows each, the last one smaller: its first hash, CRC-32C of its rows |
| - | 2 x k or 0 | marks | of each hash row the bytes 2 and 3 of its hash |
| - | f | fences | for each block of order rows a length u8, and the beginning of its first row's key: up to 64 bytes |
| - | size | ranges | one after the other, in the order of the commits |
| - | 4 | crc | CRC-32C of all before it |
| - | 12 x n | order rows | by table, key and seqno: seqno u32, offset of the record u32, number u32 |
| - | 10 x k | hash rows | ascending as bytes: hash 6 bytes, position of the key's first order row u32, big-endian |

The seqno of an order row is less the first one, and its top bit is set where a key begins; the number is that of the
intent in its commit. `next` is the position of the first order row, in this block or behind, where a key begins (n:
there is none). A range is its seqno less the first one u32, the offset of its record u64, its table u32, the lengths of
start and stop u16, a u8 that is 1 if it has no stop, start, and stop. The hash is the first 6 bytes of BLAKE2b over the
table id (u32) and the key. Two keys may have the same: what a row leads to is asked for its keys.

An index is valid when
1. its size is what it announces, magic and CRC are right and its version is known, and what lies before its rows has at
   most 16 KiB and 32 times the capacity of the segment,
2. salt, marker, revision, first_seqno and last_seqno are the segment's,
3. the tables have n rows, and fences and ranges fill their parts exactly.
A block is valid when its CRC is right; it is checked each time it is read, so that a look-up reads only the blocks that
it needs.

Invariant: a valid index has an order row for each put and delete of its segment, a hash row for each key, and each of
its ranges, whatever was lost, since it is written only when the segment was read up to its last commit.
"""

from __future__ import annotations

import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from hashlib import blake2b
from heapq import merge
from itertools import compress, count
from typing import Final, TypeAlias

from crc32c import crc32c

from kvwal.files.names import keys_name
from kvwal.keys import KeyRange
from kvwal.log.kept import KeptFiles
from kvwal.log.ranges import RANGE_BYTES, Range, Ranges
from kvwal.log.segment import SegmentHeader

__all__ = ["DamagedIndex", "KeyIndex", "Spot", "hash_of", "hashes_of", "marks_of"]

# On disk: never change.
MAGIC: Final = b"kvwalkey"
VERSION: Final = 1
HEADER = struct.Struct("<8sHHIIIQQIIIIQII")
HEADER_BYTES: Final = 72
BLOCK_ROWS: Final = 256
TABLE = struct.Struct("<II")
ORDER_BLOCK = struct.Struct("<II")
HASH_BLOCK = struct.Struct("<6sI")
RANGE = struct.Struct("<IQIHHB")
CRC = struct.Struct("<I")
ORDER_ROW = struct.Struct("<III")
ORDER_ROW_BYTES: Final = 12
HASH_ROW = struct.Struct(">6sI")
HASH_ROW_BYTES: Final = 10
HASH_BYTES: Final = 6
_MARK: Final = slice(2, 4)
MARK_BYTES: Final = 2
FENCE_BYTES: Final = 64
#: Of the first field of an order row: a key begins here.
BEGINS: Final = 1 << 31
assert HEADER.size == HEADER_BYTES
assert ORDER_ROW.size == ORDER_ROW_BYTES
assert HASH_ROW.size == HASH_ROW_BYTES

REVISION: Final = 0
# Head of an index that is read at once: that of a segment of 16 MiB has 10 KiB, and 2 bytes a key.
_HEAD_BYTES: Final = 16 << 10
# The head of an index is at most this much larger than the segment that it is made of: what says most of little is a
# deleted range, by 23 bytes and its bounds.
_MOST_HEAD_TIMES: Final = 32
_ORDER_BLOCK_BYTES: Final = BLOCK_ROWS * ORDER_ROW_BYTES
_HASH_BLOCK_BYTES: Final = BLOCK_ROWS * HASH_ROW_BYTES
_SEQNO: Final = BEGINS - 1
_ids = count()
# Of the last bytes of the first fields of rows: one of a row that begins a key; whether it is one; what it is without
# that bit.
_BEGIN = re.compile(rb"[\x80-\xff]")
_BEGINS: Final = bytes(128) + b"\1" * 128
_CLEARED: Final = bytes(range(128)) * 2


class DamagedIndex(Exception):
    """A block of a key index is not as it was written, or what it leads to is not there."""


Spot: TypeAlias = tuple[int, int, int]
"""Where a put or delete is: the seqno of its commit, the offset of that one's record, its number among the intents."""


def hash_of(table: int, key: bytes) -> bytes:
    """The hash of a key of a table."""
    return blake2b(table.to_bytes(4, "little") + key, digest_size=HASH_BYTES).digest()


def hashes_of(table: int, keys: list[bytes]) -> list[bytes]:
    """As `hash_of`, of several."""
    prefix = table.to_bytes(4, "little")
    return [blake2b(prefix + key, digest_size=HASH_BYTES).digest() for key in keys]


def marks_of(rows: bytes) -> bytes:
    """The marks of hash rows: of each the bytes of its hash that say most about which block does not have it."""
    marks = bytearray(MARK_BYTES * len(rows) // HASH_ROW_BYTES)
    for i in range(MARK_BYTES):
        marks[i::MARK_BYTES] = rows[_MARK.start + i :: HASH_ROW_BYTES]
    return bytes(marks)


class KeyIndex:
    """A valid key index. It keeps its head; a block is read when it is needed, and kept among those of all indexes."""

    __slots__ = (
        "_fences", "_files", "_first", "_hash_crcs", "_hashes", "_hashes_at", "_id", "_last", "_marks", "_name",
        "_nexts", "_order_at", "_order_crcs", "_size", "_tables", "ranges", "size",
    )  # fmt: skip

    def __init__(self, files: KeptFiles, first_seqno: int, last_seqno: int) -> None:
        self._files = files
        self._name = keys_name(first_seqno)
        self._first = first_seqno
        self._last = last_seqno
        self._id = next(_ids)
        # By table: the positions of its order rows.
        self._tables: dict[int, range] = {}
        self._nexts = array("I")
        self._order_crcs = array("I")
        self._fences: list[bytes] = []
        self._hashes = array("Q")
        self._hash_crcs = array("I")
        # None: it was written without.
        self._marks: bytes | None = None
        self._order_at = self._hashes_at = self._size = 0
        #: The ranges that commits deleted, in their order.
        self.ranges = Ranges()
        #: Bytes of what is kept of it, roughly.
        self.size = 0

    @classmethod
    def load(cls, files: KeptFiles, header: SegmentHeader, last_seqno: int) -> KeyIndex | None:
        """The segment's index, if there is a valid one. A file that cannot be read is as good as none."""
        try:
            return cls._load(files, header, last_seqno)
        except (OSError, ValueError):
            return None

    @classmethod
    def _load(cls, files: KeptFiles, header: SegmentHeader, last_seqno: int) -> KeyIndex | None:
        file = files.open_anew(keys_name(header.first_seqno))
        size = file.size()
        head = file.pread(_HEAD_BYTES, 0)
        if len(head) < HEADER_BYTES:
            return None
        magic, version, _, *identity, n, k, t, m, ranges_size, fences_size, marks_size = HEADER.unpack_from(head)
        if magic != MAGIC or version != VERSION or marks_size not in (0, MARK_BYTES * k):
            return None
        if identity != [header.salt, header.marker, REVISION, header.first_seqno, last_seqno]:
            return None
        orders_at = HEADER_BYTES + TABLE.size * t
        hashes_at = orders_at + ORDER_BLOCK.size * -(-n // BLOCK_ROWS)
        marks_at = hashes_at + HASH_BLOCK.size * -(-k // BLOCK_ROWS)
        fences_at = marks_at + marks_size
        ranges_at = fences_at + fences_size
        end = ranges_at + ranges_size
        if size != end + CRC.size + ORDER_ROW_BYTES * n + HASH_ROW_BYTES * k:
            return None
        # What it announces is not proved yet, and is read at once.
        if end > _HEAD_BYTES + _MOST_HEAD_TIMES * header.capacity:
            return None
        if len(head) < end + CRC.size:
            head += file.pread(end + CRC.size - len(head), len(head))
        if len(head) < end + CRC.size or CRC.unpack_from(head, end)[0] != crc32c(head[:end]):
            return None
        index = cls(files, header.first_seqno, last_seqno)
        rows = 0
        for table, of_table in TABLE.iter_unpack(head[HEADER_BYTES:orders_at]):
            index._tables[table] = range(rows, rows + of_table)
            rows += of_table
        if rows != n:
            return None
        for position, crc in ORDER_BLOCK.iter_unpack(head[orders_at:hashes_at]):
            index._nexts.append(position)
            index._order_crcs.append(crc)
        for digest, crc in HASH_BLOCK.iter_unpack(head[hashes_at:marks_at]):
            index._hashes.append(int.from_bytes(digest, "big"))
            index._hash_crcs.append(crc)
        if marks_size:
            index._marks = head[marks_at:fences_at]
        index._fences = list(_decode_fences(head[fences_at:ranges_at], len(index._nexts)))
        index.ranges = Ranges(_decode_ranges(head[ranges_at:end], m, header.first_seqno))
        index._order_at = end + CRC.size
        index._hashes_at = index._order_at + ORDER_ROW_BYTES * n
        # Of objects for each block, and of the marks.
        index._size, index.size = size, 4 * (end - marks_size) + marks_size + m * RANGE_BYTES
        return index

    def check(self) -> None:
        """DamagedIndex if one of its blocks is not valid, or cannot be read."""
        for i in range(len(self._nexts)):
            self._block(i)
        for j in range(len(self._hashes)):
            self._block(-1 - j)

    @property
    def has_marks(self) -> bool:
        """Whether it was written with marks."""
        return self._marks is not None

    # -- one key ------------------------------------------------------------------------------

    def rows(self, table: int, key: bytes, after: int, until: int, *, reverse: bool) -> Iterator[Spot]:
        """The puts and deletes beyond `after` up to `until` of each key with the hash of this one, in their order.

        DamagedIndex, also while it is iterated, for a block that is not valid, or cannot be read.
        """
        found = [self._positions(first, after, until) for first in self._begins(hash_of(table, key))]
        in_order = [map(self._spot, reversed(each) if reverse else each) for each in found]
        return merge(*in_order, reverse=reverse)

    def newest(self, table: int, key: bytes, digest: bytes, after: int, until: int) -> list[Spot]:
        """The newest one of them of each key, in no order. Raises as `rows`."""
        found = []
        for first in self._begins(digest):
            positions = self._positions(first, after, until)
            if positions:
                found.append(self._spot(positions[-1]))
        return found

    def may_have(self, digest: bytes) -> bool:
        """False if no key has this hash: that is found out without a read, of all but one in 100 that have not."""
        marks = self._marks
        if marks is None:
            return True
        # Of the blocks that may have it. That two halves of marks look like one is as rare as that another key has it.
        number, of_a_block = int.from_bytes(digest, "big"), MARK_BYTES * BLOCK_ROWS
        start = of_a_block * max(bisect_left(self._hashes, number) - 1, 0)
        return marks.find(digest[_MARK], start, of_a_block * bisect_right(self._hashes, number)) >= 0

    def _begins(self, digest: bytes) -> list[int]:
        """Positions of the first rows of the keys with this hash."""
        number = int.from_bytes(digest, "big")
        low = max(bisect_left(self._hashes, number) - 1, 0)
        found = []
        for i in range(low, bisect_right(self._hashes, number)):
            block = self._block(-1 - i)
            at = block.find(digest)
            while at >= 0:
                if at % HASH_ROW_BYTES == 0:
                    found.append(HASH_ROW.unpack_from(block, at)[1])
                at = block.find(digest, at + 1)
        return found

    def _positions(self, first: int, after: int, until: int) -> range:
        """Of the rows of the key that begins at this position, those beyond `after` up to `until`."""
        i, row = divmod(first, BLOCK_ROWS)
        if i >= len(self._nexts):
            raise DamagedIndex
        begin = _BEGIN.search(self._block(i)[3::ORDER_ROW_BYTES], row + 1)
        if begin is not None:
            stop = i * BLOCK_ROWS + begin.start()
        else:
            stop = self._nexts[i + 1] if i + 1 < len(self._nexts) else self._rows
        rows = range(first, stop)
        low = bisect_right(rows, after, key=self._seqno)
        return rows[low : bisect_right(rows, until, low, key=self._seqno)]

    def _seqno(self, position: int) -> int:
        return self._spot(position)[0]

    def _spot(self, position: int) -> Spot:
        i, row = divmod(position, BLOCK_ROWS)
        try:
            seqno, offset, number = ORDER_ROW.unpack_from(self._block(i), row * ORDER_ROW_BYTES)
        except (IndexError, struct.error):
            # Under the right CRC, so it was not written by us.
            raise DamagedIndex from None
        return self._first + (seqno & _SEQNO), offset, number

    # -- keys in order ------------------------------------------------------------------------

    def spots(
        self,
        table: int,
        bounds: tuple[bytes | None, bytes | None],
        after: int,
        until: int,
        key_of: Callable[[Spot], bytes],
        *,
        reverse: bool,
    ) -> tuple[int, Iterator[list[Spot]]]:
        """For each key in [start, stop) its newest put or delete beyond `after` up to `until`, in order, in lists.

        Returns: in how many rows they are found, and the lists. Raises as `rows`, and as `key_of`, which reads the key
        that a spot leads to.
        """
        start, stop = bounds
        rows = self._tables.get(table, range(0))
        low = self._begin_of(rows, start, key_of) if start else rows.start
        high = rows.stop if stop is None else self._begin_of(rows, stop, key_of)
        rows = range(low, max(low, high))
        if after < self._first and until >= self._last:
            return len(rows), self._last_of_each(rows, reverse)
        return len(rows), self._newest_of_each(rows, after - self._first, until - self._first, reverse)

    def _begin_of(self, rows: range, key: bytes, key_of: Callable[[Spot], bytes]) -> int:
        """The position among these of the first row of this key, or of those beyond it."""
        # Of the blocks that begin among them, those that begin before the key, and those that do not begin beyond it. A
        # fence that the key begins with says neither.
        first, stop = -(-rows.start // BLOCK_ROWS), -(-rows.stop // BLOCK_ROWS)
        before = bisect_left(self._fences, key[:FENCE_BYTES], first, stop) - 1
        beyond = bisect_right(self._fences, key[:FENCE_BYTES], first, stop)
        low = before * BLOCK_ROWS if before >= first else rows.start
        high = beyond * BLOCK_ROWS if beyond < stop else rows.stop
        return low + bisect_left(range(low, high), key, key=lambda position: key_of(self._spot(position)))

    def _last_of_each(self, positions: range, reverse: bool) -> Iterator[list[Spot]]:
        """As `_newest_of_each`, of all commits, in half the time: no row is looked at by itself."""
        first = self._first
        blocks = range(positions.start // BLOCK_ROWS, -(-positions.stop // BLOCK_ROWS))
        for i in reversed(blocks) if reverse else blocks:
            at = i * BLOCK_ROWS
            block = bytearray(self._block(i))
            tops = block[3::ORDER_ROW_BYTES]
            block[3::ORDER_ROW_BYTES] = tops.translate(_CLEARED)
            # The last row of a key is the one before a row that begins the next one.
            following = i + 1 == len(self._nexts) or self._nexts[i + 1] == at + BLOCK_ROWS
            is_last = tops.translate(_BEGINS)[1:] + bytes((following,))
            within = slice(max(positions.start - at, 0), positions.stop - at)
            fields = struct.unpack(f"<{3 * len(tops)}I", block)
            seqnos, offsets, numbers = (fields[column::3][within] for column in range(3))
            spots = zip(map(first.__add__, seqnos), offsets, numbers, strict=True)
            found = list(compress(spots, is_last[within]))
            if reverse:
                found.reverse()
            if found:
                yield found

    def _newest_of_each(self, positions: range, after: int, until: int, reverse: bool) -> Iterator[list[Spot]]:
        if not positions:
            return
        first = self._first
        blocks = range(positions.start // BLOCK_ROWS, (positions.stop - 1) // BLOCK_ROWS + 1)
        newest: Spot | None = None
        taken = False
        for i in reversed(blocks) if reverse else blocks:
            at = i * BLOCK_ROWS
            rows = list(ORDER_ROW.iter_unpack(self._block(i)))
            rows = rows[max(positions.start - at, 0) : positions.stop - at]
            found: list[Spot] = []
            if reverse:
                for seqno, offset, number in reversed(rows):
                    begins = seqno >= BEGINS
                    if not taken and after < seqno & _SEQNO <= until:
                        found.append((first + (seqno & _SEQNO), offset, number))
                        taken = True
                    if begins:
                        taken = False
            else:
                for seqno, offset, number in rows:
                    if seqno >= BEGINS:
                        if newest is not None:
                            found.append(newest)
                            newest = None
                        seqno &= _SEQNO
                    if after < seqno <= until:
                        newest = first + seqno, offset, number
            if found:
                yield found
        if newest is not None:
            yield [newest]

    # -- blocks -------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        return (self._hashes_at - self._order_at) // ORDER_ROW_BYTES

    def _block(self, i: int) -> bytes:
        """The rows of order block i; of hash block j if i is -1 - j."""
        kept = self._files.blocks.get((self._id, i))
        if kept is not None:
            return kept
        if i >= 0:
            crc, at, size, end = self._order_crcs[i], self._order_at, _ORDER_BLOCK_BYTES, self._hashes_at
        else:
            crc, at, size, end = self._hash_crcs[-1 - i], self._hashes_at, _HASH_BLOCK_BYTES, self._size
        at += (i if i >= 0 else -1 - i) * size
        size = min(size, end - at)
        try:
            block = self._files.open(self._name).pread(size, at)
        except OSError:
            raise DamagedIndex from None
        if len(block) != size or crc32c(block) != crc:
            raise DamagedIndex
        self._files.blocks.put((self._id, i), block, size)
        return block


def _decode_fences(data: bytes, count: int) -> Iterator[bytes]:
    """The fences of an index. ValueError if they do not fill their part exactly."""
    at = 0
    for _ in range(count):
        if at == len(data):
            break
        end = at + 1 + data[at]
        yield data[at + 1 : end]
        at = end
    else:
        if at == len(data):
            return
    raise ValueError("the fences do not fill their part")


def _decode_ranges(data: bytes, m: int, first: int) -> Iterator[Range]:
    """The ranges of an index. ValueError if they do not fill their part exactly."""
    at = 0
    for _ in range(m):
        if at + RANGE.size > len(data):
            raise ValueError("the ranges are cut short")
        seqno, offset, table, start_size, stop_size, is_open = RANGE.unpack_from(data, at)
        at += RANGE.size
        split, end = at + start_size, at + start_size + stop_size
        yield Range(first + seqno, offset, table, KeyRange(data[at:split], None if is_open else data[split:end]))
        at = end
    if at != len(data):
        raise ValueError("the ranges do not fill their part")
