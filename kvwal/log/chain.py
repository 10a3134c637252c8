"""The segments of a log as they are found on disk, and whether they hang together.

Rules:
- Nothing here writes, or reads a record.
- Links are checked from the segment that holds the first commit asked for on to the newest.
- A link that looks broken is looked at again, since a writer may have made or retired a segment meanwhile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Final, NamedTuple

from kvwal.errors import CorruptionError
from kvwal.files import Directory, File
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log.segment import (
    HEADER_PAGE_BYTES,
    SLOT_OFFSET,
    HeaderFault,
    SegmentHeader,
    SegmentInfo,
    Slot,
    decode_header,
    decode_slot,
    list_segments,
    newer_features,
    newest_segment,
)
from kvwal.log.tail import Link, TailRow, Verdict, describe, failure, judge, missing_file

__all__ = ["Chain", "FoundSegment", "no_segments"]

# Beyond every commit.
_NOTHING: Final = 1 << 64
_NO_SLOT: Final = Slot(None, damaged=False)
_MISSING: Final = (TailRow.MISSING_OLDEST_SEGMENT, TailRow.MISSING_MIDDLE_SEGMENT, TailRow.MISSING_NEWEST_SEGMENT)


class FoundSegment(NamedTuple):
    """A segment as found: by name, header page read, records not yet."""

    first_seqno: Seqno
    header: SegmentHeader | HeaderFault
    slot: Slot
    size: int
    #: What to say behind the reason why the header cannot be used.
    detail: str = ""

    @property
    def name(self) -> str:
        """The name of its file."""
        return segment_name(self.first_seqno)

    @property
    def known(self) -> SegmentHeader:
        """The header. Requires: it can be used."""
        assert isinstance(self.header, SegmentHeader)
        return self.header

    @property
    def limit(self) -> int:
        """Where records must end. Bytes beyond the capacity were never the log's."""
        return min(self.size, self.known.capacity)


class Chain:
    """The segments in one directory. Stateless: each call looks anew."""

    def __init__(self, directory: Directory, store_id: bytes | None) -> None:
        self.directory = directory
        self._store_id = store_id

    def names(self) -> list[Seqno]:
        """First seqnos of the segments, ascending."""
        return list_segments(self.directory)

    def open(self, segment: FoundSegment) -> File:
        """The segment's file, for reading."""
        return self.directory.open(segment.name)

    def load(self, first_seqno: Seqno) -> FoundSegment:
        """The segment of this name; OSError if it cannot be read."""
        file = self.directory.open(segment_name(first_seqno))
        try:
            page = file.pread(HEADER_PAGE_BYTES, 0)
            size = file.size()
        finally:
            file.close()
        header = decode_header(page, first_seqno, self._store_id)
        if isinstance(header, SegmentHeader):
            return FoundSegment(first_seqno, header, decode_slot(page, header.salt), size)
        detail = newer_features(page) if header is HeaderFault.NEWER else ""
        return FoundSegment(first_seqno, header, _NO_SLOT, size, detail)

    def header(self, first_seqno: Seqno) -> SegmentHeader:
        """The header of the segment of this name; CorruptionError or FormatError if it cannot be used."""
        segment = self.load(first_seqno)
        if isinstance(segment.header, HeaderFault):
            link = Link(first_seqno, fault=segment.header)
            raise link_failure(segment, link, *judge(link))
        return segment.header

    def beyond(self, after: int) -> tuple[list[Seqno], list[FoundSegment]]:
        """The names of all segments, and those that hold what is beyond `after`, checked to hang together.

        CorruptionError or FormatError for a broken link, OSError for a read that failed.
        """
        return self._confirmed(list_segments, after)

    def newest(self) -> FoundSegment:
        """The newest segment, checked by itself. Raises as `beyond`."""
        return self._confirmed(newest_segment, _NOTHING)[1][0]

    def _confirmed(
        self, list_names: Callable[[Directory], list[Seqno]], after: int
    ) -> tuple[list[Seqno], list[FoundSegment]]:
        names = list_names(self.directory)
        while True:
            try:
                return names, self._checked(names, after)
            except (CorruptionError, FileNotFoundError):
                # A writer may have made or retired a segment meanwhile. If not, it is true.
                before, names = names, list_names(self.directory)
                if names == before:
                    raise

    def _checked(self, names: list[Seqno], after: int) -> list[FoundSegment]:
        if not names:
            raise no_segments()
        first = max(bisect_right(names, after + 1) - 1, 0)
        chain = [self.load(name) for name in names[first:]]
        for i, segment in enumerate(chain):
            link = link_of(chain, i, reaches=i > 0 or segment.first_seqno <= after + 1)
            row, verdict = judge(link)
            if verdict in (Verdict.CORRUPT, Verdict.FORMAT):
                raise link_failure(segment, link, row, verdict)
        return chain

    def infos(self, names: list[Seqno], loaded: list[FoundSegment]) -> list[SegmentInfo]:
        """What there is to say of these segments, of which some are loaded. A damaged header has created_us 0."""
        known = {segment.first_seqno: segment for segment in loaded}
        infos: list[SegmentInfo] = []
        for name in names:
            try:
                segment = known.get(name) or self.load(name)
            except FileNotFoundError:
                continue
            except OSError:
                # This only lists. Reading the segment will raise it.
                infos.append(SegmentInfo(name, 0, 0, 0, sealed=name != names[-1]))
                continue
            header = segment.header
            if isinstance(header, SegmentHeader):
                sealed = name != names[-1] or segment.size < header.capacity
                times = header.created_us, header.wall_us
                infos.append(SegmentInfo(name, segment.size, *times, sealed, header.previous))
            else:
                infos.append(SegmentInfo(name, segment.size, 0, 0, sealed=name != names[-1]))
        return infos


def no_segments() -> CorruptionError:
    """The error for a log without any segment."""
    return CorruptionError(segment_name(1), None, "the log has no segments")


def link_of(chain: list[FoundSegment], i: int, *, reaches: bool) -> Link:
    """The evidence about segment i of the chain and its neighbours."""
    segment = chain[i]
    if isinstance(segment.header, HeaderFault):
        return Link(segment.first_seqno, fault=segment.header)
    following = chain[i + 1] if i + 1 < len(chain) else None
    return Link(
        segment.first_seqno,
        reaches=reaches,
        slot=segment.slot,
        next=None if following is None else following.first_seqno,
        next_previous=(
            following.header.previous if following is not None and isinstance(following.header, SegmentHeader) else None
        ),
        previous=segment.header.previous,
    )


def link_failure(segment: FoundSegment, link: Link, row: TailRow, verdict: Verdict) -> Exception:
    """The error for a link that is broken."""
    if row in _MISSING:
        return failure(row, verdict, missing_file(link, row), None, describe(row))
    offset = SLOT_OFFSET if row is TailRow.BAD_SUCCESSOR else 0
    return failure(row, verdict, segment.name, offset, describe(row) + segment.detail)
