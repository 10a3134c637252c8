"""Walking the records of one segment: in order, by search behind damage, and back from its end.

Rules:
- A failing read raises. It says nothing about where the log ends.
- Whatever a walk hands out has verified and is in order; what it stopped at is told by `Place.stop`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol, cast

from crc32c import crc32c

from kvwal.keys import Seqno
from kvwal.log.columns import decode_put, decode_uniform
from kvwal.log.record import CLOSED, COMMIT, PAUSED, RECORD_HEADER, RECORD_HEADER_BYTES, WATERMARK, Record, is_commit
from kvwal.log.run import LEAST_RECORDS, MOST_RECORD_BYTES, Run, read_run
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader

__all__ = [
    "CHUNK_BYTES",
    "Found",
    "Place",
    "Puts",
    "Readable",
    "Stop",
    "closed_record",
    "in_order",
    "last_written",
    "mark_at",
    "search",
    "walk",
    "walk_parts",
    "without_zeros",
]

#: Read at a time.
CHUNK_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(CHUNK_BYTES)
# Where no run begins, this number of records is passed before one is looked for again; twice as many the next time.
_MOST_PASSED: Final = 1024


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


class Place:
    """Where a walk begins and, when it is over, where and why it ended."""

    __slots__ = ("kinds", "last_seqno", "offset", "paused", "stop", "time_us", "watermark")

    def __init__(self, offset: int, last_seqno: int, watermark: int, time_us: int) -> None:
        self.offset = offset
        #: The last commit before `offset`.
        self.last_seqno = last_seqno
        #: The highest watermark read.
        self.watermark = watermark
        #: Time of the last record read.
        self.time_us = time_us
        #: Where the last record of a pause ends; 0 if none was read.
        self.paused = 0
        #: Every bit that the kind of a commit that was read has.
        self.kinds = 0
        self.stop = Stop.INVALID


class Puts:
    """Where a walk leaves the commits that are one put or a uniform batch, if it is not to hand them out one by one."""

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
    place: Place,
    *,
    after: int = 0,
    until: int | None = None,
    puts: Puts | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Record]:
    """As `walk_parts`, each commit alone."""
    parts = walk_parts(
        file, header, limit, place, after=after, until=until, puts=puts, runs=False, chunk_bytes=chunk_bytes
    )
    return cast("Iterator[Record]", parts)


def walk_parts(
    file: Readable,
    header: SegmentHeader,
    limit: int,
    place: Place,
    *,
    after: int = 0,
    until: int | None = None,
    puts: Puts | None = None,
    runs: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Record | Run]:
    """The commits beyond `after`, from the place on to `until`, `limit` or the first byte that is not in order.

    Every record on the way is verified. The place is moved when the walk has come to its end. It reads `chunk_bytes` at
    a time, and more where one record has more. With `runs`, some commits are handed out as one run.
    A failing read raises: it says nothing about where the log ends.
    """
    content = None if puts is None else puts.content
    size_of_puts = 0
    # From which offset on a run is looked for.
    look_at = place.offset if runs or puts is not None else limit
    passed = LEAST_RECORDS
    unpack = RECORD_HEADER.unpack_from
    marker = header.marker
    salt = header.salt
    segment = header.first_seqno
    base = place.offset
    last = place.last_seqno
    watermark = place.watermark
    time_us = place.time_us
    stop = Stop.REACHED if last == until else None
    while stop is None:
        chunk = file.pread(min(chunk_bytes, limit - base), base) if base < limit else b""
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
            if base + pos >= look_at and kind == COMMIT and length < MOST_RECORD_BYTES and last >= after:
                run = read_run(chunk, pos, header, base, last, until)
                if run is None:
                    look_at = base + pos + passed * (end - pos)
                    passed = min(2 * passed, _MOST_PASSED)
                else:
                    passed = LEAST_RECORDS
                    last = run.seqnos[-1]
                    watermark = max(watermark, *run.watermarks)
                    time_us = run.times_us[-1]
                    pos = run.offsets.stop - base
                    if content is None:
                        yield run
                    else:
                        content.update(zip(run.keys, run.values, strict=True))
                        size_of_puts += len(run.offsets) * run.offsets.step
                    if last == until:
                        stop = Stop.REACHED
                        break
                    continue
            rest = chunk[pos + 8 : end]
            if crc32c(rest, (seed + pos) & 0xFFFFFFFF) != crc:
                stop = Stop.INVALID
                break
            if kind == COMMIT or is_commit(kind):
                if seqno != last + 1 or marked > last:
                    stop = Stop.DISORDER
                    break
                last = seqno
                if kind != COMMIT:
                    place.kinds |= kind
                if last > after:
                    if content is None or kind != COMMIT:
                        yield Record(kind, seqno, marked, made, segment, base + pos, rest[32:])
                    elif (put := decode_put(rest, 32)) is not None:
                        content[put[0]] = put[1]
                        size_of_puts += RECORD_HEADER_BYTES + length
                    elif (batch := decode_uniform(rest, 32)) is not None:
                        content.update(zip(*batch, strict=True))
                        size_of_puts += RECORD_HEADER_BYTES + length
                    else:
                        yield Record(kind, seqno, marked, made, segment, base + pos, rest[32:])
            elif kind in (WATERMARK, CLOSED, PAUSED):
                if seqno != last or marked > last or length:
                    stop = Stop.DISORDER
                    break
                if kind == PAUSED:
                    place.paused = base + end
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
    place.offset = base
    place.last_seqno = last
    place.watermark = watermark
    place.time_us = time_us
    place.stop = stop
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

    @property
    def is_commit(self) -> bool:
        """Whether it is a commit of a kind that is known."""
        return bool(is_commit(self.kind))


def search(file: Readable, header: SegmentHeader, start: int, limit: int) -> Iterator[Found]:
    """Every record that verifies between `start` and `limit`, in order, however much damage lies between."""
    needle = header.marker.to_bytes(4, "little")
    base = start
    while base < limit:
        wanted = min(CHUNK_BYTES, limit - base)
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


def mark_at(file: Readable, header: SegmentHeader, offset: int) -> Found | None:
    """The record here, if it verifies and is one without a body."""
    return _verify(file, header, offset, offset + RECORD_HEADER_BYTES)


def in_order(
    file: Readable, header: SegmentHeader, start: int, stop: int, last: int, most: int
) -> tuple[int, int] | None:
    """Up to where the records from `start` to `stop`, behind commit `last`, follow each other; None: not all do.

    The headers of `most` are looked at, and none is verified. Returns the offset, and the last commit before it.
    """
    for _ in range(most):
        if start >= stop:
            break
        data = file.pread(RECORD_HEADER_BYTES, start)
        if len(data) < RECORD_HEADER_BYTES:
            return None
        marker, _, length, kind, seqno, _, _ = RECORD_HEADER.unpack(data)
        last += bool(is_commit(kind))
        if marker != header.marker or seqno != last:
            return None
        start += RECORD_HEADER_BYTES + length
    return start, last


def closed_record(file: Readable, header: SegmentHeader, limit: int) -> Found | None:
    """The record of a clean close that ends at `limit`, if there is one."""
    if limit < HEADER_PAGE_BYTES + RECORD_HEADER_BYTES:
        return None
    found = _verify(file, header, limit - RECORD_HEADER_BYTES, limit)
    return found if found is not None and found.kind == CLOSED else None


def without_zeros(data: bytes) -> int:
    """Where the last byte ends that is not zero. Halves are compared, which takes 1/10 of the time of `rstrip`.

    Requires: it is no longer than CHUNK_BYTES.
    """
    begin, end = 0, len(data)
    while end - begin > 64:
        middle = (begin + end) // 2
        if data[middle:end] == _ZEROS[: end - middle]:
            end = middle
        else:
            begin = middle
    return begin + len(data[begin:end].rstrip(b"\0"))


def last_written(file: Readable, start: int, limit: int) -> int:
    """The end of the last byte that is not zero between `start` and `limit`; `start` if there is none."""
    written = start
    base = start
    while base < limit:
        chunk = file.pread(min(CHUNK_BYTES, limit - base), base)
        if not chunk:
            break
        if chunk != _ZEROS[: len(chunk)]:
            written = base + without_zeros(chunk)
        base += len(chunk)
    return written
