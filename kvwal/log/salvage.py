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

__all__ = ["missing", "salvage_log", "salvage_segment"]


def salvage_log(chain: Chain) -> Iterator[Record | Finding]:
    """Every commit that verifies, oldest first, and a `Finding` for what does not. Raises for no damage."""
    names = chain.names()
    for i, name in enumerate(names):
        until = names[i + 1] - 1 if i + 1 < len(names) else None
        # What is told with a segment of which nothing can be read.
        gone = "" if until is None else f"; {missing(name, until)}"
        try:
            segment = chain.load(name)
            if isinstance(segment.header, HeaderFault):
                row, _ = judge(Link(name, fault=segment.header))
                reason = f"{describe(row)}{segment.detail}; nothing in it can be told from damage{gone}"
                yield Finding(segment.name, 0, reason)
                continue
            file = chain.open(segment)
        except RefusedError:
            raise  # No descriptor, or no permission: that says nothing about the bytes.
        except OSError as error:
            yield Finding(segment_name(name), None, f"cannot be read: {error}{gone}")
            continue
        try:
            last = yield from salvage_segment(file, segment.known, segment.limit, until)
        finally:
            file.close()
        if until is not None and last < until:
            yield Finding(segment.name, None, missing(last + 1, until))
        if until is None and segment.slot.next is not None:
            beyond = segment.slot.next
            yield Finding(segment_name(beyond), None, f"it is missing, and with it the commits from {beyond} on")
        elif until is None and segment.slot.damaged:
            yield Finding(segment.name, SLOT_OFFSET, describe(TailRow.BAD_SUCCESSOR))


def salvage_segment(
    readable: Readable, header: SegmentHeader, limit: int, until: int | None
) -> Generator[Record | Finding, None, int]:
    """The commits of a segment up to `until`, and the damage between them.

    Returns the last commit of which it is told whether it is there.
    """
    file = _Forgiving(readable)
    name = segment_name(header.first_seqno)
    place = Place(HEADER_PAGE_BYTES, header.first_seqno - 1, 0, header.created_us)
    last = place.last_seqno
    end = last_written(file, HEADER_PAGE_BYTES, limit)
    while True:
        yield from walk(file, header, limit, place, until=until)
        last = place.last_seqno
        if place.stop in (Stop.REACHED, Stop.CLOSED) or place.offset >= end:
            break
        damaged = place.offset
        found = next(
            (
                found
                for found in search(file, header, damaged + 1, limit)
                if found.is_commit and found.seqno > last and (until is None or found.seqno <= until)
            ),
            None,
        )
        if found is None:
            reason = f"{end - damaged} bytes do not verify: {place.stop.value}"
            if until is not None and last < until:
                reason += f"; {missing(last + 1, until)}"
                last = until
            yield Finding(name, damaged, reason)
            break
        what = f"; {missing(last + 1, found.seqno - 1)}" if found.seqno > last + 1 else ""
        yield Finding(name, damaged, f"{found.offset - damaged} bytes do not verify{what}")
        place = Place(found.offset, found.seqno - 1, 0, found.time_us)
    for block in file.unreadable:
        yield Finding(name, block, "cannot be read")
    return last


def missing(first: int, last: int) -> str:
    """That the commits `first` to `last` are missing."""
    return f"commit {first} is missing" if first == last else f"commits {first} to {last} are missing"


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
