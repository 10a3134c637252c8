"""Reads the log from a commit on: what recovery replays, and what cursors fall back on.

Rules:
- It writes nothing, not even an index; it may read while a writer appends, in this process or another.
- A read that fails is an `OSError`, never the end of the log.
- Damage is reported only after a second read, since a writer may still be appending.
- The links between all segments are checked before the first record is handed out.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Generator, Iterator
from typing import Final, cast

from kvwal.errors import InternalError
from kvwal.files import Directory
from kvwal.files.names import POISONED, segment_name
from kvwal.keys import Seqno
from kvwal.log.chain import Chain, FoundSegment
from kvwal.log.index import load_index
from kvwal.log.intents import features_of
from kvwal.log.record import LogPosition, Record
from kvwal.log.run import Run
from kvwal.log.segment import HEADER_PAGE_BYTES, IndexSizes, SegmentHeader, SegmentInfo
from kvwal.log.tail import LogEnd, Tail, TailRow, Verdict, describe, failure, judge
from kvwal.log.walk import (
    CHUNK_BYTES,
    Found,
    Place,
    Puts,
    Readable,
    Stop,
    closed_record,
    last_written,
    search,
    walk_parts,
)

# A reason is a line.
_MOST_WORD_BYTES: Final = 1 << 16

__all__ = [
    "LogReader",
    "Replay",
    "gather",
    "pass_over_mark",
    "place_before",
    "read_parts",
    "read_segment",
    "start_in",
    "start_of",
]


class LogReader:
    """The log of one store, for reading. Thread-safe."""

    def __init__(self, directory: Directory, store_id: bytes | None) -> None:
        #: The segments as they are found on disk.
        self.chain = Chain(directory, store_id)

    def replay(
        self,
        after: Seqno,
        floor: Seqno,
        puts: Puts | None = None,
        when_read: Callable[[Seqno, int], object] | None = None,
    ) -> Replay:
        """Every commit beyond `after`, in order, until the log ends, and how it ended.

        `floor` is the highest seqno known to be durable from elsewhere; a log that ends before it is damaged.
        With `puts`, commits that are one put go there, in their turn, and are not handed out. `when_read` is called
        behind each segment, with the last commit and its time in microseconds.
        """
        return Replay(self.chain, after, floor, puts, when_read)

    def flush(self, end: LogEnd) -> tuple[Seqno, str]:
        """Bring on disk what was read beyond the watermark, by descriptors that only read.

        Durability: as of its writer's flush, unless one of those failed: the system may take what it could not write
        for written. A writer that met that left word.

        Returns: the last commit that is on disk for sure, and why those after it may not be.
        """
        directory = self.chain.directory
        try:
            if directory.kind(POISONED) == "file":
                sure = min(max(end.watermark, _durable_then(directory)), end.last_seqno)
                return Seqno(sure), "a write or flush of their writer failed"
            # A segment that follows another attests that the one before is on disk.
            file = directory.open(segment_name(end.segments[-1].first_seqno))
            try:
                file.datasync()
            finally:
                file.close()
            directory.sync()
        except OSError as error:
            return end.watermark, f"flushing them failed: {error}"
        return end.last_seqno, ""

    def flush_names(self) -> None:
        """Bring the names of the segments on disk that are seen now. OSError if that fails.

        Durability: a recovery names the segment that it has written again before it flushes the directory. What only
        that segment says is on disk is there once its name is.
        """
        try:
            self.chain.directory.sync()
        except OSError as error:
            # A file system that cannot be written may flush no directory, and loses none of its names.
            if error.errno not in (errno.EINVAL, errno.EROFS):
                raise

    def segments(self, *, with_indexes: bool = False) -> list[SegmentInfo]:
        """Every segment there is, oldest first; `with_indexes`: the size of its indexes in its own.

        One whose header is damaged has created_us 0.
        """
        segments = self.chain.infos(self.chain.names(), [])
        return IndexSizes(self.chain.directory).added_to(segments) if with_indexes else segments


class Replay:
    """One pass over the log: iterate it to its end, then ask how it ended.

    Iterating raises
        CorruptionError: for every corrupt row of the tables in `tail`.
        FormatError: the log is another store's, or of a newer format.
        OSError: a read failed.
    """

    def __init__(
        self,
        chain: Chain,
        after: Seqno,
        floor: Seqno,
        puts: Puts | None,
        when_read: Callable[[Seqno, int], object] | None,
    ) -> None:
        self._when_read = when_read
        self._chain = chain
        self._after = after
        self._floor = floor
        self._puts = puts
        self._end: LogEnd | None = None

    @property
    def end(self) -> LogEnd:
        """How the log ended. Requires: the iteration came to its end."""
        if self._end is None:
            raise InternalError("the log was not read to its end")
        return self._end

    def __iter__(self) -> Iterator[Record]:
        self._end = None
        names, chain = self._chain.beyond(self._after)
        watermark = self._floor
        kinds = 0
        for i, segment in enumerate(chain):
            until = chain[i + 1].first_seqno - 1 if i + 1 < len(chain) else None
            place = start_in(self._chain, segment, self._after)
            tail, row = yield from read_segment(
                self._chain, segment, place, after=self._after, until=until, floor=watermark, puts=self._puts
            )
            watermark = Seqno(max(watermark, place.watermark))
            kinds |= place.kinds
            if self._when_read is not None:
                self._when_read(Seqno(place.last_seqno), place.time_us)
        self._end = LogEnd(
            row=row,
            last_seqno=Seqno(place.last_seqno),
            watermark=Seqno(tail.durable),
            last_time_us=max(place.time_us, segment.known.created_us),
            position=LogPosition(segment.first_seqno, place.offset),
            cut_bytes=tail.written,
            detail=describe(row, tail),
            segments=tuple(self._chain.infos(names, chain)),
            header=segment.known,
            required=segment.known.required | features_of(kinds),
            goes_on=tail.stop is not Stop.CLOSED and not tail.short,
        )


def start_in(chain: Chain, segment: FoundSegment, after: int) -> Place:
    """Where reading what is beyond `after` begins in a segment: at the last indexed commit that is not too far, or at a
    clean close.
    """
    header = segment.known
    if segment.size < header.capacity and (closed := _closed(chain, segment)) is not None and closed.seqno == after:
        # Nothing in it is asked for but how it ended. (From the index on it would be the last commit, which may
        # be large, to find the same.) A close that is not as it should be is left to the walk from further ahead.
        return Place(closed.offset, after, header.first_seqno - 1, header.created_us)
    return place_before(chain, header, after)


def _closed(chain: Chain, segment: FoundSegment) -> Found | None:
    """The record of a clean close, if that is what the file ends with."""
    file = chain.open(segment)
    try:
        return closed_record(file, segment.known, segment.limit)
    finally:
        file.close()


def start_of(header: SegmentHeader) -> Place:
    """The place before a segment's first record."""
    return Place(HEADER_PAGE_BYTES, header.first_seqno - 1, header.first_seqno - 1, header.created_us)


def place_before(chain: Chain, header: SegmentHeader, after: int) -> Place:
    """The place of the last indexed commit of a segment that is not too far for what is beyond `after`."""
    index = load_index(chain.directory, header) if after >= header.first_seqno else None
    entry = None if index is None else index.at_or_before(after + 1)
    if entry is None:
        return start_of(header)
    return Place(entry.offset, entry.seqno - 1, header.first_seqno - 1, entry.time_us)


def read_segment(
    chain: Chain,
    segment: FoundSegment,
    place: Place,
    *,
    after: int = 0,
    until: int | None,
    floor: int = 0,
    skipped: list[int] | None = None,
    puts: Puts | None = None,
) -> Generator[Record, None, tuple[Tail, TailRow]]:
    """As `read_parts`, each commit alone."""
    parts = read_parts(
        chain, segment, place, after=after, until=until, floor=floor, skipped=skipped, puts=puts, runs=False
    )
    return cast("Generator[Record, None, tuple[Tail, TailRow]]", parts)


def read_parts(
    chain: Chain,
    segment: FoundSegment,
    place: Place,
    *,
    after: int = 0,
    until: int | None,
    floor: int = 0,
    skipped: list[int] | None = None,
    puts: Puts | None = None,
    runs: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Generator[Record | Run, None, tuple[Tail, TailRow]]:
    """The commits of one segment; returns the evidence and the row of its end, or raises what the row says.

    With `runs`, some commits are handed out as one run. It reads `chunk_bytes` at a time.

    Offsets of damaged watermark records, which do no harm, are added to `skipped`.
    """
    header, limit = segment.known, segment.limit
    accused = -1
    file = chain.open(segment)
    try:
        while True:
            yield from walk_parts(
                file, header, limit, place, after=after, until=until, puts=puts, runs=runs, chunk_bytes=chunk_bytes
            )
            tail, resume_offset = gather(file, segment, place, until, floor)
            row, verdict = judge(tail)
            if row is TailRow.DAMAGED_MARK:
                if skipped is not None and resume_offset != place.offset:
                    skipped.append(place.offset)
                place.offset = resume_offset
            elif verdict in (Verdict.CONTINUE, Verdict.END):
                return tail, row
            elif accused == place.offset:
                found = chain.load(segment.first_seqno)
                empty = place.last_seqno < segment.first_seqno
                if empty and found.header != segment.header and isinstance(found.header, SegmentHeader):
                    # A writer has put a new segment in the place of one without commits: its header is not the one
                    # that was read.
                    file.close()
                    segment, header, limit = found, found.known, found.limit
                    file = chain.open(segment)
                    place.offset = HEADER_PAGE_BYTES
                    continue
                raise failure(row, verdict, segment.name, place.offset, describe(row, tail))
            else:
                accused = place.offset
    finally:
        file.close()


def gather(file: Readable, segment: FoundSegment, place: Place, until: int | None, floor: int) -> tuple[Tail, int]:
    """The evidence about the end of the good records, and where they go on, if they do. Reads all that lies behind."""
    limit = segment.limit
    short = segment.size < segment.known.capacity
    last = place.last_seqno
    following = None if until is None else until + 1
    durable = max(floor, place.watermark)
    if place.stop not in (Stop.END, Stop.CUT, Stop.INVALID):
        return Tail(place.stop, last, durable, short=short, next=following), place.offset
    written = last_written(file, place.offset, limit) - place.offset
    if not written:
        paused = place.paused == place.offset
        return Tail(place.stop, last, durable, short=short, next=following, paused=paused), place.offset
    start = file.pread(min(limit - place.offset, HEADER_PAGE_BYTES), place.offset)
    zeros = len(start) - len(start.lstrip(b"\0"))
    later = False
    for found in search(file, segment.known, place.offset, limit):
        if not later and found.seqno == last + found.is_commit:
            tail = Tail(place.stop, last, durable, True, True, short, zeros, written, following)
            return tail, found.offset
        later = True
        durable = max(durable, found.watermark)
        if durable > last:
            break
    return Tail(place.stop, last, durable, later, False, short, zeros, written, following), place.offset


def pass_over_mark(file: Readable, segment: FoundSegment, place: Place) -> bool:
    """Move a place at which a walk stopped behind the damaged mark that is there. False if it is something else."""
    tail, offset = gather(file, segment, place, None, 0)
    if judge(tail)[0] is not TailRow.DAMAGED_MARK or offset == place.offset:
        return False
    place.offset = offset
    return True


def _durable_then(directory: Directory) -> int:
    """What a writer whose write or flush failed knew to be on disk; 0 if its word cannot be read."""
    file = directory.open(POISONED)
    try:
        said = json.loads(file.pread(_MOST_WORD_BYTES, 0))
    except (ValueError, RecursionError):
        # It was not flushed, so it may be anything.
        return 0
    finally:
        file.close()
    durable = said.get("durable_seqno") if isinstance(said, dict) else None
    return durable if type(durable) is int else 0
