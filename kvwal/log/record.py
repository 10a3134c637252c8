"""The record: one commit, or one statement about the log, as bytes.

A record at byte `offset` of its segment, little-endian, without padding:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 4 | marker | the segment's marker, never zero: damage is skipped by searching for it |
| 4 | 4 | crc | CRC-32C of the bytes from 8 to the end, seeded with (salt + offset) modulo 2**32 |
| 8 | 4 | body length | bytes after the 40 of this header |
| 12 | 4 | kind | bits 0 to 7: 1 commit, 2 watermark, 3 closed, 4 paused; bits 8 to 31, of a commit: see `intents` |
| 16 | 8 | seqno | of this commit; the others repeat the last commit's and take no number |
| 24 | 8 | watermark | the last seqno known to be durable when this was written |
| 32 | 8 | time_us | microseconds since 1970 UTC, never decreasing |
| 40 | - | body | of a commit: see `intents`; of the others: nothing |

A record verifies when
1. its marker is the segment's,
2. it ends inside the segment,
3. its CRC matches. The seed makes sure that bytes of another segment or of another place never do.
A clean close ends with one of two records: `closed`, which is the last of its segment for good, since the file is then
shortened to end with it; or `paused`, behind which the next writer goes on. Both say that all before them is on disk.

Being in place is more than verifying: a commit follows the one before it by one, the others repeat it.
A kind or a bit that is not known here was written by a newer version and is refused as `FormatError`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError, FormatError
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log.columns import Columns, Piece, decode_intents, pieces
from kvwal.log.extension import CAUSE, EXPIRE, UnknownToUs, decode_extension, meta_of
from kvwal.log.intents import EXTENDED, ONE, SYSTEM, TABLE_BYTES, TABLES

__all__ = [
    "CLOSED",
    "COMMIT",
    "PAUSED",
    "RECORD_HEADER_BYTES",
    "WATERMARK",
    "LogPosition",
    "Record",
    "encode_record",
    "is_commit",
    "is_expiry",
    "is_system",
    "pieces_of",
]

# On disk: never change.
COMMIT: Final = 1
WATERMARK: Final = 2
CLOSED: Final = 3
PAUSED: Final = 4
_KIND: Final = 0xFF

RECORD_HEADER = struct.Struct("<IIIIQQQ")
RECORD_HEADER_BYTES: Final = 40
# The CRC is written before, and does not cover, what is packed by the first of these.
RECORD_HEAD = struct.Struct("<II")
RECORD_REST = struct.Struct("<IIQQQ")
assert RECORD_HEADER.size == RECORD_HEADER_BYTES == RECORD_HEAD.size + RECORD_REST.size

# Header and intent of a commit that is one put, behind the CRC; and of one into another table than 0.
RECORD_PUT = struct.Struct("<IIQQQIBHI")
RECORD_TABLE_PUT = struct.Struct("<IIQQQIBHII")
assert RECORD_PUT.size == RECORD_REST.size + ONE.size == RECORD_TABLE_PUT.size - TABLE_BYTES


class LogPosition(NamedTuple):
    """Where a record begins: its segment, by first seqno, and the byte offset in that file."""

    segment: Seqno
    offset: int

    @property
    def file(self) -> str:
        """Name of the segment's file."""
        return segment_name(self.segment)


class Record:
    """A record as it was read and verified. Do not change it."""

    __slots__ = ("body", "kind", "offset", "segment", "seqno", "time_us", "watermark")

    def __init__(
        self, kind: int, seqno: Seqno, watermark: Seqno, time_us: int, segment: Seqno, offset: int, body: bytes
    ) -> None:
        self.kind = kind
        self.seqno = seqno
        self.watermark = watermark
        self.time_us = time_us
        self.segment = segment
        self.offset = offset
        self.body = body

    @property
    def position(self) -> LogPosition:
        """Where the record begins."""
        return LogPosition(self.segment, self.offset)

    @property
    def size(self) -> int:
        """Bytes in the log, header included."""
        return RECORD_HEADER_BYTES + len(self.body)

    def batch(self) -> WriteBatch:
        """What the commit wrote. CorruptionError if the body is not valid, FormatError if it is of a newer format."""
        try:
            return decode_intents(self.body, self.kind & ~_KIND)
        except ValueError as error:
            raise self._refused(error) from None

    def columns(self) -> Columns:
        """What the commit wrote, without the values. Raises as `batch`."""
        try:
            return Columns(self.body, self.kind & ~_KIND)
        except ValueError as error:
            raise self._refused(error) from None

    def meta(self) -> dict[str, str]:
        """The user's pairs that it was committed with. Raises as `batch`."""
        if not self.kind & EXTENDED:
            return {}
        try:
            return meta_of(decode_extension(self.body)[0])
        except ValueError as error:
            raise self._refused(error) from None

    def extension(self) -> dict[int, bytes]:
        """The items of its extension block, by type; those of types from 128 on are left out. Raises as `batch`."""
        if not self.kind & EXTENDED:
            return {}
        try:
            return decode_extension(self.body)[0]
        except ValueError as error:
            raise self._refused(error) from None

    def _refused(self, error: ValueError) -> Exception:
        name = segment_name(self.segment)
        if isinstance(error, UnknownToUs):
            return FormatError(f"{name} at byte {self.offset}: {error}, which this version of kvwal does not know")
        return CorruptionError(name, self.offset, str(error))

    def __repr__(self) -> str:
        return f"<Record kind {self.kind}, seqno {self.seqno}, at {self.offset} of {segment_name(self.segment)}>"


def pieces_of(record: Record, most: int) -> Iterator[Piece | None]:
    """As its columns, at most `most` intents in a step: see `pieces`. Raises as `batch`, also behind some pieces."""
    try:
        yield from pieces(record.body, record.kind & ~_KIND, most)
    except ValueError as error:
        raise record._refused(error) from None


def is_system(record: Record) -> bool:
    """Whether a commit changed only what the store keeps for itself, and no user's table."""
    return bool(record.kind & SYSTEM)


def is_expiry(record: Record) -> bool:
    """Whether a commit removed what had expired. Raises as `Record.batch`."""
    return bool(record.kind & EXTENDED) and record.extension().get(CAUSE) == EXPIRE


def is_commit(kind: int) -> bool | None:
    """Whether a record of this kind is a commit; None if the kind, or a bit of it, is not known."""
    if kind in (WATERMARK, CLOSED, PAUSED):
        return False
    known = kind & _KIND == COMMIT and not kind & ~(_KIND | EXTENDED | TABLES | SYSTEM)
    return True if known and (kind & TABLES or not kind & SYSTEM) else None


def encode_record(
    marker: int, seed: int, kind: int, seqno: int, watermark: int, time_us: int, body: bytes = b""
) -> bytes:
    """A whole record; `seed` is the segment's salt plus the record's offset."""
    rest = RECORD_REST.pack(len(body), kind, seqno, watermark, time_us) + body
    return RECORD_HEAD.pack(marker, crc32c(rest, seed & 0xFFFFFFFF)) + rest
