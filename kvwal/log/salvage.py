"""Salvage of one segment: what verifies, whatever lies between.

A block that cannot be read counts as damage here, and as nothing else anywhere else.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

from kvwal.log.record import Record, segment_name
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader
from kvwal.log.tail import Damage
from kvwal.log.walk import Cursor, Readable, Stop, last_written, search, walk

__all__ = ["salvage_segment"]


def salvage_segment(
    readable: Readable, header: SegmentHeader, limit: int, until: int | None
) -> Generator[Record | Damage, None, int]:
    """The commits of a segment up to `until`, and the damage between them; returns the last commit there is."""
    file = _Forgiving(readable)
    name = segment_name(header.first_seqno)
    cursor = Cursor(HEADER_PAGE_BYTES, header.first_seqno - 1, 0, header.created_us)
    end = last_written(file, HEADER_PAGE_BYTES, limit)
    while True:
        yield from walk(file, header, limit, cursor, until=until)
        if cursor.stop in (Stop.REACHED, Stop.CLOSED) or cursor.offset >= end:
            break
        damaged, last = cursor.offset, cursor.last_seqno
        found = next(
            (
                found
                for found in search(file, header, damaged + 1, limit)
                if found.is_commit and found.seqno > last and (until is None or found.seqno <= until)
            ),
            None,
        )
        if found is None:
            yield Damage(name, damaged, f"{end - damaged} bytes do not verify: {cursor.stop.value}")
            break
        missing = f"; commits {last + 1} to {found.seqno - 1} are missing" if found.seqno > last + 1 else ""
        yield Damage(name, damaged, f"{found.offset - damaged} bytes do not verify{missing}")
        cursor = Cursor(found.offset, found.seqno - 1, 0, found.time_us)
    for block in file.unreadable:
        yield Damage(name, block, "cannot be read")
    return cursor.last_seqno


class _Forgiving:
    """A file in which blocks that cannot be read are zeros."""

    _BLOCK_BYTES: Final = 4096

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.unreadable: list[int] = []

    def pread(self, size: int, offset: int) -> bytes:
        try:
            return self._file.pread(size, offset)
        except OSError:
            return b"".join(
                self._block(min(self._BLOCK_BYTES, size - at), offset + at)
                for at in range(0, size, self._BLOCK_BYTES)
            )

    def _block(self, size: int, offset: int) -> bytes:
        try:
            return self._file.pread(size, offset)
        except OSError:
            if offset not in self.unreadable:
                self.unreadable.append(offset)
            return bytes(size)
