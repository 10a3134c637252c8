"""The segment: a preallocated file of records, its header page, and how it is walked.

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from crc32c import crc32c

from kvwal.batch import Seqno
from kvwal.files import Files
from kvwal.log.record import (
    CLOSED,
    COMMIT,
    RECORD_HEADER,
    RECORD_HEADER_BYTES,
    WATERMARK,
    Record,
    decode_put,
    segment_name,
)

__all__ = [
    "HEADER_PAGE_BYTES",
    "SLOT_OFFSET",
    "Cursor",
    "Found",
    "HeaderFault",
    "Puts",
    "Readable",
    "SegmentHeader",
    "SegmentInfo",
    "Slot",
    "Stop",
    "closed_record",
    "decode_header",
    "decode_slot",
    "encode_header",
    "encode_slot",
    "last_written",
    "list_segments",
    "new_marker",
    "search",
    "walk",
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

_CHUNK_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK_BYTES)
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


class Readable(Protocol):
    """What a walk needs of a file."""

    def pread(self, size: int, offset: int) -> bytes:
        """As `File.pread`."""
        ...


class Stop(enum.Enum):
    """Why a walk ended."""

    REACHED = "the last commit asked for"
    CLOSED = "a closed record"
    END = "the end of the file"
    CUT = "the file ends inside of a record"
    INVALID = "no record verifies here"
    DISORDER = "the record here verifies, but does not follow the one before it"
    UNKNOWN = "the record here is of a kind that this version does not know"


class Cursor:
    """Where a walk begins and, when it is over, where and why it ended."""

    __slots__ = ("last_seqno", "offset", "stop", "time_us", "watermark")

    def __init__(self, offset: int, last_seqno: int, watermark: int, time_us: int) -> None:
        self.offset = offset
        #: The last commit before `offset`.
        self.last_seqno = last_seqno
        #: The highest watermark read.
        self.watermark = watermark
        #: Time of the last record read.
        self.time_us = time_us
        self.stop = Stop.INVALID


class Puts:
    """Where a walk leaves the commits that are one put, if it is not to hand them out one by one."""

    __slots__ = ("content", "size")

    def __init__(self, content: dict[bytes, bytes | None]) -> None:
        #: Changed by each of them in its turn; a commit that is handed out finds all before it here.
        self.content = content
        #: Their bytes in the log. Counted when the walk has come to its end.
        self.size = 0


def walk(
    file: Readable,
    header: SegmentHeader,
    limit: int,
    cursor: Cursor,
    *,
    after: int = 0,
    until: int | None = None,
    puts: Puts | None = None,
) -> Iterator[Record]:
    """The commits beyond `after`, from the cursor on to `until`, `limit` or the first byte that is not in order.

    Every record on the way is verified. The cursor is moved when the walk has come to its end.
    A failing read raises: it says nothing about where the log ends.
    """
    content = None if puts is None else puts.content
    size_of_puts = 0
    unpack = RECORD_HEADER.unpack_from
    marker = header.marker
    salt = header.salt
    segment = header.first_seqno
    base = cursor.offset
    last = cursor.last_seqno
    watermark = cursor.watermark
    time_us = cursor.time_us
    stop = Stop.REACHED if last == until else None
    while stop is None:
        chunk = file.pread(min(_CHUNK_BYTES, limit - base), base) if base < limit else b""
        size = len(chunk)
        seed = salt + base
        pos = 0
        while size - pos >= RECORD_HEADER_BYTES:
            found, crc, length, kind, seqno, marked, made = unpack(chunk, pos)
            if found != marker:
                stop = Stop.INVALID
                break
            end = pos + RECORD_HEADER_BYTES + length
            if end > size:
                if base + end > limit or pos:
                    break
                # A record larger than the chunk: only now is it known how much to read.
                chunk += file.pread(end - size, base + size)
                if len(chunk) < end:
                    break
            rest = chunk[pos + 8 : end]
            if crc32c(rest, (seed + pos) & 0xFFFFFFFF) != crc:
                stop = Stop.INVALID
                break
            if kind == COMMIT:
                if seqno != last + 1 or marked > last:
                    stop = Stop.DISORDER
                    break
                last = seqno
                if last > after:
                    put = None if content is None else decode_put(rest, 32)
                    if put is None or content is None:
                        yield Record(COMMIT, seqno, marked, made, segment, base + pos, rest[32:])
                    else:
                        content[put[0]] = put[1]
                        size_of_puts += RECORD_HEADER_BYTES + length
            elif kind in (WATERMARK, CLOSED):
                if seqno != last or marked > last or length:
                    stop = Stop.DISORDER
                    break
            else:
                stop = Stop.UNKNOWN
                break
            if marked > watermark:
                watermark = marked
            time_us = made
            pos = end
            if last == until:
                stop = Stop.REACHED
                break
            if kind == CLOSED:
                stop = Stop.CLOSED
                break
        base += pos
        if stop is None and pos == 0:
            stop = _why_nothing(chunk, base, limit, marker)
    cursor.offset = base
    cursor.last_seqno = last
    cursor.watermark = watermark
    cursor.time_us = time_us
    cursor.stop = stop
    if puts is not None:
        puts.size += size_of_puts


def _why_nothing(chunk: bytes, base: int, limit: int, marker: int) -> Stop:
    """The stop of a walk that found no whole record at `base`, of which `chunk` was read."""
    if not chunk:
        return Stop.END
    # A record that announces more than the file holds is cut off, or its length is damaged. Which of the
    # two does not matter here: what lies behind it is searched either way.
    return Stop.CUT if chunk[:4] == marker.to_bytes(4, "little")[: len(chunk)] else Stop.INVALID


class Found(NamedTuple):
    """A record that verifies, wherever it lies."""

    offset: int
    end: int
    kind: int
    seqno: Seqno
    watermark: Seqno
    time_us: int


def search(file: Readable, header: SegmentHeader, start: int, limit: int) -> Iterator[Found]:
    """Every record that verifies between `start` and `limit`, in order, however much damage lies between."""
    needle = header.marker.to_bytes(4, "little")
    base = start
    while base < limit:
        wanted = min(_CHUNK_BYTES, limit - base)
        chunk = file.pread(wanted, base)
        # A marker may lie across the border of two chunks; at the end of the file there is no next chunk.
        ended = len(chunk) < wanted or base + wanted == limit
        next_base = limit if ended else base + wanted - 3
        at = chunk.find(needle)
        while at >= 0:
            found = _verify(file, header, base + at, limit)
            if found is None:
                at = chunk.find(needle, at + 1)
            else:
                yield found
                next_base = max(next_base, found.end)
                at = chunk.find(needle, found.end - base)
        base = next_base


def _verify(file: Readable, header: SegmentHeader, offset: int, limit: int) -> Found | None:
    data = file.pread(RECORD_HEADER_BYTES, offset)
    if len(data) < RECORD_HEADER_BYTES:
        return None
    marker, crc, length, kind, seqno, watermark, time_us = RECORD_HEADER.unpack(data)
    if marker != header.marker:
        return None
    end = offset + RECORD_HEADER_BYTES + length
    # Most false markers are told here, without reading what they announce.
    if end > limit or watermark > seqno or seqno + 1 < header.first_seqno:
        return None
    if length:
        data += file.pread(length, offset + RECORD_HEADER_BYTES)
    if crc32c(data[8:], (header.salt + offset) & 0xFFFFFFFF) != crc:
        return None
    return Found(offset, end, kind, seqno, watermark, time_us)


def closed_record(file: Readable, header: SegmentHeader, limit: int) -> Found | None:
    """The record of a clean close that ends at `limit`, if there is one."""
    if limit < HEADER_PAGE_BYTES + RECORD_HEADER_BYTES:
        return None
    found = _verify(file, header, limit - RECORD_HEADER_BYTES, limit)
    return found if found is not None and found.kind == CLOSED else None


def last_written(file: Readable, start: int, limit: int) -> int:
    """The end of the last byte that is not zero between `start` and `limit`; `start` if there is none."""
    written = start
    base = start
    while base < limit:
        chunk = file.pread(min(_CHUNK_BYTES, limit - base), base)
        if not chunk:
            break
        if chunk != _ZEROS[: len(chunk)]:
            written = base + len(chunk.rstrip(b"\0"))
        base += len(chunk)
    return written
