"""Reading single commits of a segment, whose places are known, and single intents of them."""

from __future__ import annotations

from typing import Final

from crc32c import crc32c

from kvwal.keys import Seqno
from kvwal.log.chain import FoundSegment
from kvwal.log.columns import decode_put
from kvwal.log.cut import Cut
from kvwal.log.record import COMMIT, RECORD_HEADER, RECORD_HEADER_BYTES, Record, is_commit
from kvwal.log.walk import Readable

__all__ = ["RECORD_BYTES", "Fetched", "fetch"]

#: Most records are smaller.
RECORD_BYTES: Final = 4096


def fetch(file: Readable, segment: FoundSegment, seqno: int, offset: int) -> Record | None:
    """The commit of this number at this offset of a segment; None if none verifies there. OSError if reading fails."""
    size = min(RECORD_BYTES, segment.limit - offset)
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


class Fetched:
    """A commit that was read, and its intents."""

    __slots__ = ("_cut", "_put", "record", "size")

    def __init__(self, record: Record) -> None:
        """Raises as `Record.columns`."""
        self.record = record
        self._put = decode_put(record.body) if record.kind == COMMIT else None
        self._cut = Cut(record) if self._put is None else None
        #: As `Cut.size`.
        self.size = record.size + self._cut.size if self._cut is not None and self._cut.size else 0

    def intent(self, table: int, number: int) -> tuple[bytes, bytes | None] | None:
        """As `Cut.intent`."""
        if self._cut is None:
            return self._put if number == table == 0 else None
        return self._cut.intent(self.record.body, 0, table, number)
