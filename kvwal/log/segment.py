"""The segment: a preallocated file of records, and its header page.

The first 4096 bytes are the header page; records follow, one after the other. Little-endian, no padding:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwallog` |
| 8 | 2 | version | 1 |
| 10 | 2 | size | of this header, CRC included |
| 12 | 4 | flags | zero |
| 16 | 16 | store_id | the store this log belongs to |
| 32 | 8 | first_seqno | the first commit of the segment; its file name says the same |
| 40 | 8 | created_us | microseconds since 1970 UTC; no record in it is older, none before it is younger |
| 48 | 4 | salt | random; seeds the CRC of everything in this file |
| 52 | 4 | marker | random, no byte of it zero; opens every record |
| 56 | 8 | capacity | size of the file as it was preallocated |
| 64 | 8 | previous | first_seqno of the segment before, 0 if there was none |
| 72 | 4 | crc | CRC-32C of the header before it |

At 2048 of the header page is the successor slot, all zeros until it is written, always with the same bytes:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 8 | magic | `kvwalnxt` |
| 8 | 8 | next | first_seqno of the segment that follows this one |
| 16 | 4 | crc | CRC-32C of the slot before it, seeded with the salt |

A header is valid when
1. magic and CRC are right; a version other than 1 is then a newer format, whatever else it says,
2. its store_id is the store's,
3. its first_seqno is the one in the file's name.

Invariant: no byte of a segment but those of the slot is written twice, and the file is never renamed again.
A segment gets its name only when its header (and, after a recovery, the records it starts with) is on disk.
Durability: a segment that exists attests that every commit before its first is on disk.
What a segment holds of its successor's commits, or behind them, is superseded and never looked at.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.batch import Seqno
from kvwal.files import Files
from kvwal.log.record import segment_name

__all__ = [
    "HEADER_PAGE_BYTES",
    "SLOT_OFFSET",
    "HeaderFault",
    "SegmentHeader",
    "SegmentInfo",
    "Slot",
    "decode_header",
    "decode_slot",
    "encode_header",
    "encode_slot",
    "list_segments",
    "new_marker",
    "store_id_of_log",
]

# On disk: never change.
MAGIC: Final = b"kvwallog"
VERSION: Final = 1
HEADER_PAGE_BYTES: Final = 4096
SLOT_OFFSET: Final = 2048
SLOT_MAGIC: Final = b"kvwalnxt"

HEADER = struct.Struct("<8sHHI16sQQIIQQ")
SLOT = struct.Struct("<8sQ")
CRC = struct.Struct("<I")
HEADER_BYTES: Final = 76
SLOT_BYTES: Final = 20
assert HEADER.size + CRC.size == HEADER_BYTES
assert SLOT.size + CRC.size == SLOT_BYTES

_NO_SLOT: Final = bytes(SLOT_BYTES)


class SegmentHeader(NamedTuple):
    """What the header of a segment says."""

    store_id: bytes
    first_seqno: Seqno
    created_us: int
    salt: int
    marker: int
    capacity: int
    previous: Seqno


class HeaderFault(enum.Enum):
    """Why a header cannot be used."""

    DAMAGED = enum.auto()
    NEWER = enum.auto()
    FOREIGN = enum.auto()
    MISPLACED = enum.auto()


class Slot(NamedTuple):
    """What the successor slot holds: `next` if it is valid, nothing yet, or damage."""

    next: Seqno | None
    damaged: bool


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A segment as others see it.

    Attributes:
        first_seqno: its first commit, and its name.
        size: bytes of the file.
        created_us: when it was made; 0 if its header could not be read.
        sealed: nothing more will be written to it.
        previous: first seqno of the segment before, as it says; 0 if there was none.
    """

    first_seqno: Seqno
    size: int
    created_us: int
    sealed: bool
    previous: Seqno = Seqno(0)  # noqa: RUF009  # immutable

    @property
    def name(self) -> str:
        """The name of its file."""
        return segment_name(self.first_seqno)


def new_marker(random: bytes) -> int:
    """A marker out of four random bytes. None of its own is zero, so a search flies over empty space."""
    return int.from_bytes(bytes(byte % 255 + 1 for byte in random), "little")


def encode_header(header: SegmentHeader) -> bytes:
    """The whole header page, with an empty slot."""
    data = HEADER.pack(
        MAGIC,
        VERSION,
        HEADER_BYTES,
        0,
        header.store_id,
        header.first_seqno,
        header.created_us,
        header.salt,
        header.marker,
        header.capacity,
        header.previous,
    )
    return (data + CRC.pack(crc32c(data))).ljust(HEADER_PAGE_BYTES, b"\0")


def decode_header(page: bytes, name_seqno: int, store_id: bytes | None) -> SegmentHeader | HeaderFault:
    """The header, or why it is none. Without a store_id, any store's will do."""
    if len(page) < HEADER_PAGE_BYTES or page[:8] != MAGIC:
        return HeaderFault.DAMAGED
    version, size = struct.unpack_from("<HH", page, 8)
    # Where the CRC stands is said by the size, so that a newer header is not taken for a damaged one.
    if not 16 <= size <= SLOT_OFFSET or CRC.unpack_from(page, size - 4)[0] != crc32c(page[: size - 4]):
        return HeaderFault.DAMAGED
    if version != VERSION:
        return HeaderFault.NEWER
    if size != HEADER_BYTES:
        return HeaderFault.DAMAGED
    _, _, _, _, found_id, first_seqno, created_us, salt, marker, capacity, previous = HEADER.unpack_from(page)
    if store_id not in (None, found_id):
        return HeaderFault.FOREIGN
    if first_seqno != name_seqno:
        return HeaderFault.MISPLACED
    return SegmentHeader(found_id, first_seqno, created_us, salt, marker, capacity, previous)


def encode_slot(salt: int, next_seqno: int) -> bytes:
    """The bytes of the slot that name the successor."""
    data = SLOT.pack(SLOT_MAGIC, next_seqno)
    return data + CRC.pack(crc32c(data, salt))


def decode_slot(page: bytes, salt: int) -> Slot:
    """What the slot of this header page says."""
    data = page[SLOT_OFFSET : SLOT_OFFSET + SLOT_BYTES]
    if data == _NO_SLOT:
        return Slot(None, damaged=False)
    magic, next_seqno = SLOT.unpack_from(data)
    if magic != SLOT_MAGIC or CRC.unpack_from(data, SLOT.size)[0] != crc32c(data[: SLOT.size], salt):
        return Slot(None, damaged=True)
    return Slot(next_seqno, damaged=False)


def list_segments(files: Files, directory: str) -> list[Seqno]:
    """First seqnos of the segments there are by name, ascending."""
    return sorted(
        Seqno(int(name[:20]))
        for name in files.list_directory(directory)
        if len(name) == 24 and name.endswith(".log") and name[:20].isascii() and name[:20].isdigit()
    )


def store_id_of_log(files: Files, directory: str) -> bytes | None:
    """The store_id of the newest segment whose header verifies; None if there is none."""
    for first_seqno in reversed(list_segments(files, directory)):
        file = files.open(files.join(directory, segment_name(first_seqno)))
        try:
            page = file.pread(HEADER_PAGE_BYTES, 0)
        finally:
            file.close()
        header = decode_header(page, first_seqno, None)
        if isinstance(header, SegmentHeader):
            return header.store_id
    return None
