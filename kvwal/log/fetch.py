"""Reading single commits of a segment, whose places are known."""

from __future__ import annotations

from typing import Final

from crc32c import crc32c

from kvwal.keys import Seqno
from kvwal.log.chain import FoundSegment
from kvwal.log.record import COMMIT, RECORD_HEADER, RECORD_HEADER_BYTES, Record, is_commit
from kvwal.log.walk import Readable

__all__ = ["fetch"]

# Most records are smaller.
_RECORD_BYTES: Final = 4096


def fetch(file: Readable, segment: FoundSegment, seqno: int, offset: int) -> Record | None:
    """The commit of this number at this offset of a segment; None if none verifies there. OSError if reading fails."""
    size = min(_RECORD_BYTES, segment.limit - offset)
    data = file.pread(size, offset) if size >= RECORD_HEADER_BYTES else b""
    if len(data) < RECORD_HEADER_BYTES:
        return None
    header = segment.known
    marker, crc, length, kind, found, watermark, time_us = RECORD_HEADER.unpack_from(data)
    end = RECORD_HEADER_BYTES + length
    if marker != header.marker or found != seqno or offset + end > segment.limit:
        return None
    if end > len(data):
        data += file.pread(end - len(data), offset + len(data))
        if len(data) < end:
            return None
    rest = data[8:end]
    if crc32c(rest, (header.salt + offset) & 0xFFFFFFFF) != crc or not (kind == COMMIT or is_commit(kind)):
        return None
    return Record(kind, Seqno(seqno), watermark, time_us, segment.first_seqno, offset, rest[32:])
