"""The rewritten tail: what recovery read and cannot know to be on disk is written again before it is served.

Commits beyond the durable watermark may be only in the page cache, since a flush of them may have failed before the
crash, and a flush that is tried again would then succeed and write nothing. So they go into a new segment, which
appears whole or not at all. It begins
- where the newest segment begins, if that holds little: then it takes its place, and a program that crashes again and
  again does not leave a segment each time;
- behind the watermark otherwise: then what the older segment holds beyond that is superseded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, repeat
from operator import add, and_
from typing import Final, Protocol

from crc32c import crc32c

from kvwal.errors import CorruptionError, InternalError
from kvwal.files import File
from kvwal.keys import Seqno
from kvwal.log.commits import Commit, Commits
from kvwal.log.index import Index
from kvwal.log.record import RECORD_HEAD, RECORD_HEADER_BYTES, RECORD_REST, WATERMARK, Record, encode_record
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader
from kvwal.log.tail import LogEnd

__all__ = ["Carry", "RecordSource", "write_records"]

# A newest segment that holds no more than this is rewritten from its beginning.
_WHOLE_BYTES: Final = 256 << 10
#: What is written at a time, about.
WRITE_BYTES: Final = 1 << 20


class RecordSource(Protocol):
    """What a carry needs of the reader."""

    def replay(self, after: Seqno, floor: Seqno) -> Iterable[Record]:
        """The commits beyond `after`."""
        ...


class Carry:
    """What the segment that a recovery makes begins with, and how it is written there.

    Attributes:
        first_seqno: of that segment. created_us, wall_us: its times, or None for the time of the last record and now.
    """

    def __init__(self, end: LogEnd, source: RecordSource) -> None:
        self._end = end
        self._records: Iterable[Record] = ()
        newest = end.header
        self.first_seqno = newest.first_seqno
        self.created_us = newest.created_us
        self.wall_us: int | None = newest.wall_us
        whole = self._whole(source)
        if whole is not None:
            self._records = whole
            return
        self.first_seqno = Seqno(end.watermark + 1)
        self.created_us = end.last_time_us
        self.wall_us = None
        if end.last_seqno > end.watermark:
            self._records = source.replay(end.watermark, end.watermark)
            # No record of a segment is older than the segment.
            self.created_us = next(iter(self._records)).time_us

    def _whole(self, source: RecordSource) -> Sequence[Record] | None:
        """All records of the newest segment, if they are few and can be read."""
        end = self._end
        if end.position.offset - HEADER_PAGE_BYTES > _WHOLE_BYTES:
            return None
        try:
            return list(source.replay(Seqno(self.first_seqno - 1), end.watermark))
        except CorruptionError:
            # What recovery does not need may be damaged.
            return None

    def fill(self, file: File, header: SegmentHeader, index: Index) -> int:
        """Write the records into a segment that is being made; returns where they end. Requires: as `write_records`."""
        end = self._end
        before = Seqno(self.first_seqno - 1)
        offset, last = write_records(
            file, header, index, _stretches(self._records), before, end.watermark, end.last_time_us
        )
        if last != end.last_seqno:
            raise InternalError(f"recovery read the log up to commit {end.last_seqno}, and then up to {last}")
        return offset


def _stretches(records: Iterable[Record]) -> Iterator[Commits]:
    commits: list[Commit] = []
    size = 0
    for each in records:
        commits.append((each.kind, each.seqno, each.time_us, each.body))
        size += len(each.body)
        if size >= WRITE_BYTES:
            yield Commits.of(commits)
            commits, size = [], 0
    if commits:
        yield Commits.of(commits)


def _small(stretches: Iterable[Commits]) -> Iterator[Commits]:
    """The same in stretches of which each has about `WRITE_BYTES` at most: what is made of one is in memory."""
    for commits in stretches:
        if sum(map(len, commits.bodies)) <= WRITE_BYTES:
            yield commits
            continue
        begin = size = 0
        for i, body in enumerate(commits.bodies):
            if i > begin and size + len(body) > WRITE_BYTES:
                yield commits.part(begin, i)
                begin, size = i, 0
            size += len(body)
        yield commits.part(begin)


def write_records(
    file: File,
    header: SegmentHeader,
    index: Index,
    stretches: Iterable[Commits],
    last: Seqno,
    watermark: Seqno,
    time_us: int,
) -> tuple[int, Seqno]:
    """Write commits into a segment that is being made, and that they are on disk. Where they end, and the last one.

    Args:
        index: gets their entries.
        stretches: the commits, some at a time.
        last, time_us: the commit before them, and its time.
        watermark: up to this one they are known to be on disk already.

    Requires: the segment gets its name when all of it is on disk. So a reader of the watermark record at its end may
    believe it.
    """
    start = offset = HEADER_PAGE_BYTES
    frames: list[bytes] = []
    for commits in _small(stretches):
        # As `encode_record`, by calls in C: a restore writes all its commits here.
        sizes, seqnos = tuple(map(len, commits.bodies)), commits.seqnos
        marks = repeat(watermark) if watermark <= last else map(min, repeat(watermark), (last, *seqnos))
        headers = map(RECORD_REST.pack, sizes, commits.kinds, seqnos, marks, commits.times_us)
        rests = tuple(map(add, headers, commits.bodies))
        *offsets, offset = accumulate(map(add, sizes, repeat(RECORD_HEADER_BYTES)), initial=offset)
        seeds = map(and_, map(add, offsets, repeat(header.salt)), repeat(0xFFFFFFFF))
        heads = map(RECORD_HEAD.pack, repeat(header.marker), map(crc32c, rests, seeds))
        frames += chain.from_iterable(zip(heads, rests, strict=True))
        i = 0
        while (i := bisect_left(offsets, index.next_offset, i)) < len(offsets):
            index.add(seqnos[i], commits.times_us[i], offsets[i])
        last, time_us = seqnos[-1], commits.times_us[-1]
        if offset - start >= WRITE_BYTES:
            file.pwrite(b"".join(frames), start)
            frames.clear()
            start = offset
    file.pwrite(b"".join(frames), start)
    if last >= header.first_seqno:
        # A write of its own: if the disk loses the one before, this one tells.
        file.pwrite(encode_record(header.marker, header.salt + offset, WATERMARK, last, last, time_us), offset)
        offset += RECORD_HEADER_BYTES
    return offset, last
