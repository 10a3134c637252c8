"""The key index of a sealed segment: which commits changed a key, without reading the segment.

The file is derived. It has the segment's name with `.keys` and is written by the writer alone; one that is missing or
not valid is made again. Little-endian but for the rows, no padding:

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
| 40 | 4 | n | number of rows: the puts and deletes of all tables |
| 44 | 4 | m | number of deleted ranges |
| 48 | 8 | size | of the ranges, in bytes |
| 56 | 24 x blocks | blocks | of 256 rows each, the last one smaller: its first row, then the CRC-32C of its rows |
| - | size | ranges | one after the other, in the order of the commits |
| - | 4 | crc | CRC-32C of all before it |
| - | 20 x n | rows | ascending as bytes: hash 8 bytes, then big-endian seqno less the first one u32, offset u64 |

A range is its seqno less the first one u32, the offset of its record u64, its table u32, the lengths of start and stop
u16, a u8 that is 1 if it has no stop, start, and stop.

An index is valid when
1. its size is what it announces, magic and CRC are right and its version is known,
2. salt, marker, revision, first_seqno and last_seqno are the segment's,
3. the ranges fill their part exactly.
A block is valid when its CRC is right; it is checked each time it is read, so that a look-up reads only the block that
it needs. The hash is the first 8 bytes of BLAKE2b over the table id (u32) and the key. Two keys may have the same: what
a row leads to is asked for its keys.

Invariant: a valid index has a row for each put and delete of its segment, and each of its ranges, whatever was lost,
since it is written only when the segment was read up to its last commit.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from heapq import merge
from itertools import chain, islice
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.files import Directory, File
from kvwal.files.names import keys_name
from kvwal.keys import KeyRange
from kvwal.log.intents import Columns, decode_put_key
from kvwal.log.record import COMMIT, Record
from kvwal.log.segment import SegmentHeader

__all__ = ["DamagedIndex", "KeyIndex", "KeyTable", "hash_of"]

# On disk: never change.
MAGIC: Final = b"kvwalkey"
VERSION: Final = 1
HEADER = struct.Struct("<8sHHIIIQQIIQ")
HEADER_BYTES: Final = 56
BLOCK_ROWS: Final = 256
ROW = struct.Struct(">8sIQ")
ROW_BYTES: Final = 20
# Of a row, behind the hash.
_PLACE = struct.Struct(">IQ")
BLOCK = struct.Struct(f"<{ROW_BYTES}sI")
RANGE = struct.Struct("<IQIHHB")
CRC = struct.Struct("<I")
assert HEADER.size == HEADER_BYTES
assert ROW.size == ROW_BYTES
_HASH_BYTES: Final = 8
_REVISION: Final = 0

# Head of an index that is read at once: that of a segment of 16 MiB has 10 KiB.
_HEAD_BYTES: Final = 16 << 10
# Most intents in a step of making an index, after which other threads may run.
_STEP_INTENTS: Final = 32
# Most rows that a step sorts.
_STEP_ROWS: Final = 1024
_DEFAULT_TABLE: Final = bytes(4)


class DamagedIndex(Exception):
    """A block of a key index is not as it was written."""


class Range(NamedTuple):
    """A range that a commit deleted."""

    seqno: int
    offset: int
    table: int
    bounds: KeyRange


def hash_of(table: int, key: bytes) -> bytes:
    """The hash of a key of a table."""
    return blake2b(table.to_bytes(4, "little") + key, digest_size=_HASH_BYTES).digest()


class KeyTable:
    """What a key index will hold of a segment: its rows and ranges, in memory."""

    __slots__ = ("_buckets", "_first", "ranges")

    def __init__(self, header: SegmentHeader) -> None:
        self._first = header.first_seqno
        # Rows by the first byte of their hash; those of one hash in the order of the commits.
        self._buckets: list[list[bytes]] = [[] for _ in range(256)]
        self.ranges: list[Range] = []

    def extend(self, records: Iterable[Record]) -> Iterator[None]:
        """Add commits, in their order, in steps. Raises as `Record.columns`."""
        buckets, first, pack = self._buckets, self._first, _PLACE.pack
        left = _STEP_INTENTS
        for record in records:
            key = decode_put_key(record.body) if record.kind == COMMIT else None
            if key is None:
                yield from self._add(record, record.columns())
                continue
            digest = blake2b(_DEFAULT_TABLE + key, digest_size=_HASH_BYTES).digest()
            buckets[digest[0]].append(digest + pack(record.seqno - first, record.offset))
            left -= 1
            if not left:
                left = _STEP_INTENTS
                yield

    def _add(self, record: Record, columns: Columns) -> Iterator[None]:
        seqno, offset, keys = record.seqno, record.offset, columns.keys
        tables: Sequence[int] = columns.tables if columns.tables is not None else (0,) * len(keys)
        n_ranges = len(columns.ranges)
        for table, bounds in zip(tables, columns.ranges, strict=False):
            self.ranges.append(Range(seqno, offset, table, bounds))
        place = _PLACE.pack(seqno - self._first, offset)
        for i in range(n_ranges, len(keys)):
            digest = hash_of(tables[i], keys[i])
            self._buckets[digest[0]].append(digest + place)
            if not i % _STEP_INTENTS:
                yield
        yield

    def rows(self, digest: bytes, after: int, until: int, *, reverse: bool) -> Iterator[tuple[int, int]]:
        """Seqno and offset of the commits beyond `after` up to `until` that have a row of this hash, in order."""
        bucket = self._buckets[digest[0]]
        found = [row for row in bucket if row.startswith(digest)]
        yield from _between(found, self._first, digest, after, until, reverse=reverse)

    def encode(self, header: SegmentHeader, last_seqno: int) -> Iterator[bytes]:
        """The index of the segment, in pieces; empty ones while it is being put in order."""
        blocks: list[bytes] = []
        table: list[bytes] = []
        rows = chain.from_iterable(map(_in_order, self._buckets))
        while block := b"".join(islice(rows, BLOCK_ROWS)):
            blocks.append(block)
            table.append(BLOCK.pack(block[:ROW_BYTES], crc32c(block)))
            yield b""
        parts = []
        for seqno, offset, of_table, (start, stop) in self.ranges:
            sizes = len(start), len(stop or b"")
            parts.append(RANGE.pack(seqno - self._first, offset, of_table, *sizes, stop is None))
            parts += (start, stop or b"")
        ranges = b"".join(parts)
        n = sum(map(len, self._buckets))
        identity = header.salt, header.marker, _REVISION, header.first_seqno, last_seqno
        head = HEADER.pack(MAGIC, VERSION, 0, *identity, n, len(self.ranges), len(ranges))
        head += b"".join(table) + ranges
        yield head + CRC.pack(crc32c(head))
        yield from blocks


def _in_order(rows: list[bytes]) -> Iterable[bytes]:
    """Rows in order; of a large bucket piece by piece, since sorting keeps other threads out."""
    if len(rows) <= _STEP_ROWS:
        return sorted(rows)
    return merge(*(sorted(rows[i : i + _STEP_ROWS]) for i in range(0, len(rows), _STEP_ROWS)))


def _between(
    rows: Sequence[bytes], first: int, digest: bytes, after: int, until: int, *, reverse: bool
) -> Iterator[tuple[int, int]]:
    """What rows in order say of a hash and the commits beyond `after` up to `until`."""
    low = bisect_left(rows, digest + _PLACE.pack(max(after + 1 - first, 0), 0))
    high = bisect_left(rows, digest + _PLACE.pack(until + 1 - first, 0))
    for i in range(high - 1, low - 1, -1) if reverse else range(low, high):
        _, seqno, offset = ROW.unpack(rows[i])
        yield first + seqno, offset


class KeyIndex:
    """A valid key index. It keeps which rows each block begins with, and the ranges."""

    __slots__ = ("_crcs", "_first", "_firsts", "_name", "_rows_at", "_size", "ranges", "size")

    def __init__(self, header: SegmentHeader, firsts: list[bytes], crcs: list[int], ranges: list[Range]) -> None:
        self._name = keys_name(header.first_seqno)
        self._first = header.first_seqno
        self._firsts = firsts
        self._crcs = crcs
        self.ranges = ranges
        self._rows_at = 0
        self._size = 0
        #: Bytes of what is kept, roughly.
        self.size = 0

    @classmethod
    def load(cls, directory: Directory, header: SegmentHeader, last_seqno: int) -> KeyIndex | None:
        """The segment's index, if there is a valid one. A file that cannot be read is as good as none."""
        try:
            file = directory.open(keys_name(header.first_seqno))
        except OSError:
            return None
        try:
            return cls._load(file, header, last_seqno)
        except (OSError, ValueError):
            return None
        finally:
            file.close()

    @classmethod
    def _load(cls, file: File, header: SegmentHeader, last_seqno: int) -> KeyIndex | None:
        size = file.size()
        head = file.pread(_HEAD_BYTES, 0)
        if len(head) < HEADER_BYTES:
            return None
        magic, version, _, *identity, n, m, ranges_size = HEADER.unpack_from(head)
        if magic != MAGIC or version != VERSION:
            return None
        if identity != [header.salt, header.marker, _REVISION, header.first_seqno, last_seqno]:
            return None
        n_blocks = -(-n // BLOCK_ROWS)
        ranges_at = HEADER_BYTES + BLOCK.size * n_blocks
        end = ranges_at + ranges_size
        if size != end + CRC.size + ROW_BYTES * n:
            return None
        if len(head) < end + CRC.size:
            head += file.pread(end + CRC.size - len(head), len(head))
        if len(head) < end + CRC.size or CRC.unpack_from(head, end)[0] != crc32c(head[:end]):
            return None
        blocks = list(BLOCK.iter_unpack(head[HEADER_BYTES:ranges_at]))
        ranges = list(_decode_ranges(head[ranges_at:end], m, header.first_seqno))
        index = cls(header, [first for first, _ in blocks], [crc for _, crc in blocks], ranges)
        index._rows_at, index._size, index.size = end + CRC.size, size, end
        return index

    def rows(
        self, directory: Directory, digest: bytes, after: int, until: int, *, reverse: bool
    ) -> Iterator[tuple[int, int]]:
        """As `KeyTable.rows`. DamagedIndex for a block that is not valid, or cannot be read."""
        first = self._first
        low = bisect_right(self._firsts, digest + _PLACE.pack(max(after + 1 - first, 0), 0)) - 1
        high = bisect_left(self._firsts, digest + _PLACE.pack(until + 1 - first, 0))
        blocks = range(max(low, 0), high)
        if not blocks:
            return
        try:
            file = directory.open(self._name)
        except OSError:
            raise DamagedIndex from None
        try:
            for i in reversed(blocks) if reverse else blocks:
                yield from _between(self._block(file, i), first, digest, after, until, reverse=reverse)
        finally:
            file.close()

    def _block(self, file: File, i: int) -> tuple[bytes, ...]:
        at = self._rows_at + i * BLOCK_ROWS * ROW_BYTES
        size = min(BLOCK_ROWS * ROW_BYTES, self._size - at)
        try:
            block = file.pread(size, at)
        except OSError:
            raise DamagedIndex from None
        if len(block) != size or crc32c(block) != self._crcs[i]:
            raise DamagedIndex
        rows: tuple[bytes, ...] = struct.unpack(f"{ROW_BYTES}s" * (size // ROW_BYTES), block)
        return rows


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
