"""The sparse index of a sealed segment: where a commit is, without reading all before it.

The file is derived. It has the segment's name with `.idx` and is written by the writer alone; a reader that finds it
missing or not valid reads the segment instead. Little-endian, no padding:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwalidx` |
| 8 | 2 | version | 1 |
| 10 | 2 | - | zero |
| 12 | 4 | salt | the segment's |
| 16 | 4 | marker | the segment's |
| 20 | 4 | n | number of entries |
| 24 | 8 | first_seqno | the segment's |
| 32 | 8 x n | seqnos | of the commits that have an entry, ascending |
| - | 8 x n | times | of these commits, microseconds since 1970 UTC, never decreasing |
| - | 8 x n | offsets | of these commits in the segment, ascending |
| - | 4 | crc | CRC-32C of all before it |

An index is valid when
1. its size is what n announces, magic and CRC are right and its version is known, and n commits have space in the
   segment,
2. salt, marker and first_seqno are the segment's, so that it was not made for another file of this name.
The first commit 64 KiB behind the beginning of the records has an entry, then the first one 64 KiB behind that, and so
on. A segment without entries has no such file.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.files import Directory
from kvwal.files.names import index_name
from kvwal.keys import Seqno
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader

__all__ = ["INDEX_STRIDE_BYTES", "Entry", "Index", "load_index"]

# On disk: never change.
MAGIC: Final = b"kvwalidx"
VERSION: Final = 1
HEADER = struct.Struct("<8sHHIIIQ")
CRC = struct.Struct("<I")
HEADER_BYTES: Final = 32
assert HEADER.size == HEADER_BYTES
_ENTRY_BYTES: Final = 24

INDEX_STRIDE_BYTES: Final = 64 << 10


class Entry(NamedTuple):
    """One commit that can be found at once."""

    seqno: Seqno
    time_us: int
    offset: int


@dataclass(slots=True)
class Index:
    """Entries of one segment, in the order of its commits."""

    seqnos: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, seqno: int, time_us: int, offset: int) -> None:
        """Append an entry."""
        # An entry is there once its offset is, which comes last. A signal handler that raised before that left the
        # other columns longer.
        n = len(self.offsets)
        del self.seqnos[n:]
        del self.times[n:]
        self.seqnos.append(seqno)
        self.times.append(time_us)
        self.offsets.append(offset)

    @property
    def next_offset(self) -> int:
        """The next entry is due for the first commit that begins here or later."""
        return (self.offsets[-1] if self.offsets else HEADER_PAGE_BYTES) + INDEX_STRIDE_BYTES

    def at_or_before(self, seqno: int) -> Entry | None:
        """The last entry whose commit is not after `seqno`."""
        return self._entry(bisect_right(self.seqnos, seqno) - 1)

    def made_by(self, time_us: int) -> Entry | None:
        """The last entry whose commit was made at `time_us` or before."""
        return self._entry(bisect_right(self.times, time_us) - 1)

    def _entry(self, i: int) -> Entry | None:
        i = min(i, len(self.offsets) - 1)
        return Entry(Seqno(self.seqnos[i]), self.times[i], self.offsets[i]) if i >= 0 else None

    def encode(self, header: SegmentHeader) -> bytes:
        """The index file of the segment with this header."""
        n = len(self.offsets)
        head = HEADER.pack(MAGIC, VERSION, 0, header.salt, header.marker, n, header.first_seqno)
        data = head + struct.pack(f"<{3 * n}Q", *self.seqnos[:n], *self.times[:n], *self.offsets)
        return data + CRC.pack(crc32c(data))

    @classmethod
    def decode(cls, data: bytes, header: SegmentHeader) -> Index | None:
        """The index in these bytes; None if they are not a valid index of the segment."""
        n = _entries_of(data, header)
        if n is None or len(data) != _size_of(n):
            return None
        size = HEADER_BYTES + _ENTRY_BYTES * n
        if CRC.unpack_from(data, size)[0] != crc32c(data[:size]):
            return None
        columns: tuple[int, ...] = struct.unpack_from(f"<{3 * n}Q", data, HEADER_BYTES)
        return cls(list(columns[:n]), list(columns[n : 2 * n]), list(columns[2 * n :]))


def _entries_of(data: bytes, header: SegmentHeader) -> int | None:
    """How many entries an index that begins like this announces; None if it is none of the segment."""
    if len(data) < HEADER_BYTES:
        return None
    magic, version, _, salt, marker, n, first_seqno = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        return None
    if (salt, marker, first_seqno) != (header.salt, header.marker, header.first_seqno):
        return None
    return n if n * RECORD_HEADER_BYTES < header.capacity else None


def _size_of(n: int) -> int:
    """Bytes of an index with n entries."""
    return HEADER_BYTES + _ENTRY_BYTES * n + CRC.size


def load_index(directory: Directory, header: SegmentHeader) -> Index | None:
    """The segment's index, if there is a valid one. A file that cannot be read is as good as none."""
    try:
        file = directory.open(index_name(header.first_seqno))
    except OSError:
        return None
    try:
        # A file of this name may be of any length. No more is read of it than an index of the segment has.
        n = _entries_of(file.pread(HEADER_BYTES, 0), header)
        if n is None or file.size() != _size_of(n):
            return None
        return Index.decode(file.pread(_size_of(n), 0), header)
    except OSError:
        return None
    finally:
        file.close()
