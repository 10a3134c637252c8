"""Salvage of a log: every commit that verifies, whatever lies between.

A block that cannot be read counts as damage here, and as nothing else anywhere else.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final

from kvwal.errors import Finding, RefusedError
from kvwal.files.names import segment_name
from kvwal.log.chain import Chain
from kvwal.log.record import Record
from kvwal.log.segment import HEADER_PAGE_BYTES, SLOT_OFFSET, HeaderFault, SegmentHeader
from kvwal.log.tail import Link, TailRow, describe, judge
from kvwal.log.walk import Place, Readable, Stop, last_written, search, walk

__all__ = ["salvage_log", "salvage_segment"]


def salvage_log(chain: Chain) -> Iterator[Record | Finding]:
    """Every commit that verifies, oldest first, and a `Finding` for what does not. Raises for no damage."""
    names = chain.names()
    last = names[0] - 1 if names else 0
    for i, name in enumerate(names):
        until = names[i + 1] - 1 if i + 1 < len(names) else None
        if name != last + 1:
            yield Finding(segment_name(name), None, f"commits {last + 1} to {name - 1} before it are missing")
        last = name - 1
        try:
            segment = chain.load(name)
            if isinstance(segment.header, HeaderFault):
                row, _ = judge(Link(name, fault=segment.header))
                reason = f"{describe(row)}{segment.detail}; nothing in it can be told from damage"
                yield Finding(segment.name, 0, reason)
                continue
            file = chain.open(segment)
        except RefusedError:
            raise  # No descriptor, or no permission: that says nothing about the bytes.
        except OSError as error:
            yield Finding(segment_name(name), None, f"cannot be read: {error}")
            continue
        try:
            last = yield from salvage_segment(file, segment.known, segment.limit, until)
        finally:
            file.close()
        if until is not None and last < until:
            yield Finding(segment.name, None, f"commits {last + 1} to {until} are missing")
            last = until
        if until is None and segment.slot.next is not None:
            missing = segment.slot.next
            yield Finding(segment_name(missing), None, f"it is missing, and with it the commits from {missing} on")
        elif until is None and segment.slot.damaged:
            yield Finding(segment.name, SLOT_OFFSET, describe(TailRow.BAD_SUCCESSOR))


def salvage_segment(
    readable: Readable, header: SegmentHeader, limit: int, until: int | None
) -> Generator[Record | Finding, None, int]:
    """The commits of a segment up to `until`, and the damage between them; returns the last commit there is."""
    file = _Forgiving(readable)
    name = segment_name(header.first_seqno)
    place = Place(HEADER_PAGE_BYTES, header.first_seqno - 1, 0, header.created_us)
    end = last_written(file, HEADER_PAGE_BYTES, limit)
    while True:
        yield from walk(file, header, limit, place, until=until)
        if place.stop in (Stop.REACHED, Stop.CLOSED) or place.offset >= end:
            break
        damaged, last = place.offset, place.last_seqno
        found = next(
            (
                found
                for found in search(file, header, damaged + 1, limit)
                if found.is_commit and found.seqno > last and (until is None or found.seqno <= until)
            ),
            None,
        )
        if found is None:
            yield Finding(name, damaged, f"{end - damaged} bytes do not verify: {place.stop.value}")
            break
        missing = f"; commits {last + 1} to {found.seqno - 1} are missing" if found.seqno > last + 1 else ""
        yield Finding(name, damaged, f"{found.offset - damaged} bytes do not verify{missing}")
        place = Place(found.offset, found.seqno - 1, 0, found.time_us)
    for block in file.unreadable:
        yield Finding(name, block, "cannot be read")
    return place.last_seqno


class _Forgiving:
    """A file in which blocks that cannot be read are zeros."""

    _BLOCK_BYTES: Final = 4096

    def __init__(self, file: Readable) -> None:
        self._file = file
        self.unreadable: list[int] = []

    def pread(self, size: int, offset: int) -> bytes:
        try:
            return self._file.pread(size, offset)
        except RefusedError:
            raise
        except OSError:
            return b"".join(
                self._block(min(self._BLOCK_BYTES, size - at), offset + at) for at in range(0, size, self._BLOCK_BYTES)
            )

    def _block(self, size: int, offset: int) -> bytes:
        try:
            return self._file.pread(size, offset)
        except RefusedError:
            raise
        except OSError:
            if offset not in self.unreadable:
                self.unreadable.append(offset)
            return bytes(size)
