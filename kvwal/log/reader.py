"""Reads the log: replay, search by seqno and time, verification, salvage.

Rules:
- It writes nothing, not even an index; it may read while a writer appends, in this process or another.
- A read that fails is an `OSError`, never the end of the log.
- Nothing is accused before it was read twice: what looks damaged may be just being written.
- The links between all segments are checked before the first record is handed out.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Generator, Iterator
from typing import Final, NamedTuple

from kvwal.errors import CorruptionError, FormatError
from kvwal.files import Directory
from kvwal.keys import Seqno
from kvwal.log.index import Index, index_name, load_index
from kvwal.log.record import LogPosition, Record, segment_name
from kvwal.log.salvage import salvage_segment
from kvwal.log.segment import (
    HEADER_PAGE_BYTES,
    HeaderFault,
    SegmentHeader,
    SegmentInfo,
    Slot,
    decode_header,
    decode_slot,
    list_segments,
)
from kvwal.log.tail import (
    Damage,
    Link,
    LogEnd,
    Tail,
    TailRow,
    Verdict,
    describe,
    failure,
    judge,
    missing_file,
)
from kvwal.log.walk import Cursor, Found, Puts, Readable, Stop, closed_record, last_written, search, walk

__all__ = ["LogReader"]

_MAX_CACHED_INDEXES: Final = 64
_VERIFY_ATTEMPTS: Final = 10
_NO_SLOT: Final = Slot(None, damaged=False)


class _Segment(NamedTuple):
    """A segment as found: by name, header page read, records not yet."""

    first_seqno: Seqno
    header: SegmentHeader | HeaderFault
    slot: Slot
    size: int

    @property
    def name(self) -> str:
        return segment_name(self.first_seqno)

    @property
    def known(self) -> SegmentHeader:
        assert isinstance(self.header, SegmentHeader)
        return self.header

    @property
    def limit(self) -> int:
        """Where records must end. Bytes beyond the capacity were never the log's."""
        return min(self.size, self.known.capacity)


class LogReader:
    """The log of one store, for reading. Thread-safe, but for `end`, which belongs to the last `records` call."""

    def __init__(self, directory: Directory, store_id: bytes | None) -> None:
        self._directory = directory
        self._store_id = store_id
        #: How the log ended; set when an iteration of `records` is exhausted.
        self.end: LogEnd | None = None
        # Guards the indexes, which grow as they are used.
        self._lock = threading.Lock()
        self._indexes: dict[int, tuple[int, Index]] = {}

    # -- replay -------------------------------------------------------------------------------

    def records(self, after: Seqno, floor: Seqno, puts: Puts | None = None) -> Iterator[Record]:
        """Every commit beyond `after`, in order, until the log ends; then `end` is set.

        `floor` is the highest seqno known to be durable from elsewhere; a log that ends before it is damaged.
        With `puts`, commits that are one put go there, in their turn, and are not handed out.

        Raises:
            CorruptionError: for every corrupt row of the tables in `tail`.
            FormatError: the log is another store's, or of a newer format.
            OSError: a read failed.
        """
        self.end = None
        return self._records(after, floor, clamp=False, puts=puts)

    def _records(self, after: int, floor: Seqno, *, clamp: bool, puts: Puts | None = None) -> Iterator[Record]:
        names, chain = self._chain(after, clamp=clamp)
        watermark = floor
        for i, segment in enumerate(chain):
            until = chain[i + 1].first_seqno - 1 if i + 1 < len(chain) else None
            cursor = self._start(segment, after)
            tail, row = yield from self._read(segment, cursor, after, until, watermark, puts=puts)
            watermark = Seqno(max(watermark, cursor.watermark))
        self.end = LogEnd(
            row=row,
            last_seqno=Seqno(cursor.last_seqno),
            watermark=Seqno(tail.durable),
            last_time_us=max(cursor.time_us, segment.known.created_us),
            position=LogPosition(segment.first_seqno, cursor.offset),
            cut_bytes=tail.written,
            detail=describe(row, tail),
            segments=tuple(self._infos(names, chain)),
            features=segment.known.required,
        )

    def _start(self, segment: _Segment, after: int) -> Cursor:
        """Where to begin in a segment: at the last indexed commit that is not too far, or at a clean close."""
        header = segment.known
        if segment.size < header.capacity and (closed := self._closed(segment)) is not None and closed.seqno == after:
            # Nothing in it is asked for but how it ended. (From the index on it would be the last commit, which may
            # be large, to find the same.) Whatever is not as it should be is left to the walk from further ahead.
            return Cursor(closed.offset, after, header.first_seqno - 1, header.created_us)
        if after >= header.first_seqno and (index := self._index(header)) is not None:
            with self._lock:
                entry = index.at_or_before(after + 1)
            if entry is not None:
                return Cursor(entry.offset, entry.seqno - 1, header.first_seqno - 1, entry.time_us)
        return Cursor(HEADER_PAGE_BYTES, header.first_seqno - 1, header.first_seqno - 1, header.created_us)

    def _closed(self, segment: _Segment) -> Found | None:
        """The record of a clean close, if that is what the file ends with."""
        file = self._directory.open(segment.name)
        try:
            return closed_record(file, segment.known, segment.limit)
        finally:
            file.close()

    def _read(
        self,
        segment: _Segment,
        cursor: Cursor,
        after: int,
        until: int | None,
        floor: int,
        skipped: list[int] | None = None,
        puts: Puts | None = None,
    ) -> Generator[Record, None, tuple[Tail, TailRow]]:
        """The commits of one segment; returns the evidence and the row of its end, or raises what the row says.

        Offsets of damaged watermark records, which do no harm, are added to `skipped`.
        """
        header, limit = segment.known, segment.limit
        accused = -1
        file = self._directory.open(segment.name)
        try:
            while True:
                yield from walk(file, header, limit, cursor, after=after, until=until, puts=puts)
                tail, resume_offset = _gather(file, segment, cursor, until, floor)
                row, verdict = judge(tail)
                if row is TailRow.DAMAGED_MARK:
                    if skipped is not None and resume_offset != cursor.offset:
                        skipped.append(cursor.offset)
                    cursor.offset = resume_offset
                elif verdict in (Verdict.CONTINUE, Verdict.END):
                    return tail, row
                elif accused == cursor.offset:
                    found = self._load(segment.first_seqno)
                    empty = cursor.last_seqno < segment.first_seqno
                    if empty and found.header != segment.header and isinstance(found.header, SegmentHeader):
                        # A writer has put a new segment in the place of one without commits: its header is not the
                        # one that was read.
                        file.close()
                        segment, header, limit = found, found.known, found.limit
                        file = self._directory.open(segment.name)
                        cursor.offset = HEADER_PAGE_BYTES
                        continue
                    raise failure(row, verdict, segment.name, cursor.offset, describe(row, tail))
                else:
                    accused = cursor.offset
        finally:
            file.close()

    # -- links --------------------------------------------------------------------------------

    def _chain(self, after: int, *, clamp: bool) -> tuple[list[Seqno], list[_Segment]]:
        """The names of all segments, and those that hold what is beyond `after`, checked to hang together.

        With `clamp` it is no fault if the oldest of them begins later.
        """
        names = list_segments(self._directory)
        while True:
            try:
                return names, self._checked(names, max(after, names[0] - 1) if clamp and names else after)
            except (CorruptionError, FileNotFoundError):
                # A writer may have made or retired a segment meanwhile. If not, it is true.
                before, names = names, list_segments(self._directory)
                if names == before:
                    raise

    def _checked(self, names: list[Seqno], after: int) -> list[_Segment]:
        if not names:
            raise CorruptionError(segment_name(1), None, "the log has no segments")
        first = max(bisect_right(names, after + 1) - 1, 0)
        chain = [self._load(name) for name in names[first:]]
        for i in range(len(chain)):
            link = _link(chain, i, after)
            row, verdict = judge(link)
            if verdict in (Verdict.CORRUPT, Verdict.FORMAT):
                raise self._link_failure(chain[i], link, row, verdict)
        return chain

    def _link_failure(self, segment: _Segment, link: Link, row: TailRow, verdict: Verdict) -> Exception:
        if row in (TailRow.MISSING_OLDEST_SEGMENT, TailRow.MISSING_MIDDLE_SEGMENT, TailRow.MISSING_NEWEST_SEGMENT):
            return failure(row, verdict, missing_file(link, row), None, describe(row))
        return failure(row, verdict, segment.name, 2048 if row is TailRow.BAD_SUCCESSOR else 0, describe(row))

    def _load(self, first_seqno: Seqno) -> _Segment:
        file = self._directory.open(segment_name(first_seqno))
        try:
            page = file.pread(HEADER_PAGE_BYTES, 0)
            size = file.size()
        finally:
            file.close()
        header = decode_header(page, first_seqno, self._store_id)
        slot = decode_slot(page, header.salt) if isinstance(header, SegmentHeader) else _NO_SLOT
        return _Segment(first_seqno, header, slot, size)

    def segments(self) -> list[SegmentInfo]:
        """Every segment there is, oldest first. One whose header is damaged has created_us 0."""
        return self._infos(list_segments(self._directory), [])

    def _infos(self, names: list[Seqno], loaded: list[_Segment]) -> list[SegmentInfo]:
        known = {segment.first_seqno: segment for segment in loaded}
        infos: list[SegmentInfo] = []
        for name in names:
            try:
                segment = known.get(name) or self._load(name)
            except FileNotFoundError:
                continue
            except OSError:
                # Nobody asked for what is in it. Whoever does meets the error again.
                infos.append(SegmentInfo(name, 0, 0, sealed=name != names[-1]))
                continue
            header = segment.header
            if isinstance(header, SegmentHeader):
                sealed = name != names[-1] or segment.size < header.capacity
                infos.append(SegmentInfo(name, segment.size, header.created_us, sealed, header.previous))
            else:
                infos.append(SegmentInfo(name, segment.size, 0, sealed=name != names[-1]))
        return infos

    def history(self, after: Seqno, until: Seqno) -> Iterator[Record]:
        """The commits beyond `after` up to `until` that the log still holds; `until` must be in it.

        The first may come later than asked for, if segments were retired; none between the first and `until` is
        left out. Raises as `records`; FileNotFoundError if segments are retired that were to be read.
        """
        if until <= after:
            return
        for record in self._records(after, until, clamp=True):
            if record.seqno <= until:
                yield record
            if record.seqno >= until:
                return

    # -- search -------------------------------------------------------------------------------

    def seek(self, seqno: Seqno) -> LogPosition:
        """Where a commit is. ValueError if the log does not hold it (any more, or yet)."""
        names = list_segments(self._directory)
        i = bisect_right(names, seqno) - 1
        if i < 0:
            raise ValueError(f"commit {seqno} is older than the log")
        for record in self._from_entry(names, i, seqno=seqno):
            if record.seqno >= seqno:
                return record.position
        raise ValueError(f"commit {seqno} is not in the log")

    def seek_time(self, time_us: int) -> LogPosition:
        """Where the first commit made after `time_us` is, or will be."""
        return self._first_after(time_us)[1]

    def seqno_at(self, time_us: int) -> Seqno:
        """The last commit made at `time_us` or before; the one before the oldest in the log if there is none."""
        return Seqno(self._first_after(time_us)[0] - 1)

    def _first_after(self, time_us: int) -> tuple[int, LogPosition]:
        names = list_segments(self._directory)
        if not names:
            raise CorruptionError(segment_name(1), None, "the log has no segments")
        # The last segment created at that time or before; only O(log n) headers are read.
        low, high = 0, len(names)
        while low < high:
            middle = (low + high) // 2
            if self._header(names[middle]).created_us <= time_us:
                low = middle + 1
            else:
                high = middle
        i = max(low - 1, 0)
        last, end = names[i] - 1, LogPosition(names[i], HEADER_PAGE_BYTES)
        for record in self._from_entry(names, i, time_us=time_us):
            if record.time_us > time_us:
                return record.seqno, record.position
            last, end = record.seqno, LogPosition(names[i], record.offset + record.size)
        if i + 1 < len(names):
            return names[i + 1], LogPosition(names[i + 1], HEADER_PAGE_BYTES)
        return last + 1, end

    def _header(self, first_seqno: Seqno) -> SegmentHeader:
        segment = self._load(first_seqno)
        if isinstance(segment.header, HeaderFault):
            link = Link(first_seqno, fault=segment.header)
            raise self._link_failure(segment, link, *judge(link))
        return segment.header

    def _from_entry(
        self, names: list[Seqno], i: int, *, seqno: int | None = None, time_us: int = 0
    ) -> Iterator[Record]:
        """The commits of segment i, from the last indexed one at or before the seqno or time on.

        What is read on the way makes the index longer, so that the next search is short.
        """
        header = self._header(names[i])
        index = self._index(header) or Index()
        with self._lock:
            entry = index.made_by(time_us) if seqno is None else index.at_or_before(seqno)
            if header.first_seqno not in self._indexes:
                while len(self._indexes) >= _MAX_CACHED_INDEXES:
                    del self._indexes[next(iter(self._indexes))]
            self._indexes[header.first_seqno] = (header.salt, index)
        segment = self._load(names[i])
        cursor = Cursor(HEADER_PAGE_BYTES, header.first_seqno - 1, header.first_seqno - 1, header.created_us)
        if entry is not None:
            cursor = Cursor(entry.offset, entry.seqno - 1, header.first_seqno - 1, entry.time_us)
        until = names[i + 1] - 1 if i + 1 < len(names) else None
        for record in self._read(segment, cursor, 0, until, 0):
            if record.offset >= index.next_offset:
                with self._lock:
                    if record.offset >= index.next_offset:
                        index.add(record.seqno, record.time_us, record.offset)
            yield record

    def _index(self, header: SegmentHeader) -> Index | None:
        """The segment's index as far as it is known; a segment that was replaced has another salt."""
        with self._lock:
            salt, index = self._indexes.get(header.first_seqno, (None, None))
        if salt == header.salt:
            return index
        return load_index(self._directory, header)

    # -- verification and salvage -------------------------------------------------------------

    def verify(self) -> Iterator[Damage]:
        """Everything in the log, read and decoded: what is damaged. A cut-off tail is not damage."""
        found: list[Damage] = []
        for _ in range(_VERIFY_ATTEMPTS):
            before = self._headers()
            found = list(self._verify())
            # A writer may have put a segment in the place of an empty one of the same name, made one or retired one
            # meanwhile: then what was seen may be half of the one and half of the other.
            if not found or self._headers() == before:
                break
        yield from found

    def _headers(self) -> list[tuple[Seqno, SegmentHeader | HeaderFault | None]]:
        headers: list[tuple[Seqno, SegmentHeader | HeaderFault | None]] = []
        for name in list_segments(self._directory):
            try:
                headers.append((name, self._load(name).header))
            except OSError:
                headers.append((name, None))
        return headers

    def _verify(self) -> Iterator[Damage]:
        names = list_segments(self._directory)
        chain: list[_Segment] = []
        unreadable: set[int] = set()
        for name in names:
            try:
                chain.append(self._load(name))
            except OSError as error:
                unreadable.add(name)
                yield Damage(segment_name(name), None, f"cannot be read: {error}")
        for i, segment in enumerate(chain):
            link = _link(chain, i, 0, oldest=True)
            row, verdict = judge(link)
            # One that cannot be read is not missing.
            if verdict in (Verdict.CORRUPT, Verdict.FORMAT) and link.slot.next not in unreadable:
                problem = self._link_failure(segment, link, row, verdict)
                yield _as_damage(problem, segment.name)
            if isinstance(segment.header, SegmentHeader):
                following = segment.slot.next or (chain[i + 1].first_seqno if i + 1 < len(chain) else None)
                yield from self._verify_segment(segment, None if following is None else following - 1)

    def _verify_segment(self, segment: _Segment, until: int | None) -> Iterator[Damage]:
        header = segment.known
        cursor = Cursor(HEADER_PAGE_BYTES, header.first_seqno - 1, header.first_seqno - 1, header.created_us)
        seqnos: dict[int, int] = {}
        skipped: list[int] = []
        try:
            for record in self._read(segment, cursor, 0, until, 0, skipped):
                seqnos[record.offset] = record.seqno
                try:
                    record.batch()
                except CorruptionError as error:
                    yield _as_damage(error, segment.name)
        except (CorruptionError, FormatError) as error:
            yield _as_damage(error, segment.name)
            return
        except OSError as error:
            yield Damage(segment.name, None, f"cannot be read: {error}")
            return
        for offset in skipped:
            yield Damage(segment.name, offset, describe(TailRow.DAMAGED_MARK))
        # An index that is no index was torn by a crash, and is not used. One that is must tell the truth.
        index = load_index(self._directory, header)
        if index is not None and any(seqnos.get(o) != s for s, o in zip(index.seqnos, index.offsets, strict=True)):
            yield Damage(index_name(segment.first_seqno), None, "the index lies about where commits are; remove it")

    def salvage(self) -> Iterator[Record | Damage]:
        """Every commit that verifies, oldest first, and a `Damage` for whatever does not. Raises for no damage."""
        names = list_segments(self._directory)
        last = names[0] - 1 if names else 0
        for i, name in enumerate(names):
            until = names[i + 1] - 1 if i + 1 < len(names) else None
            if name != last + 1:
                yield Damage(segment_name(name), None, f"commits {last + 1} to {name - 1} before it are missing")
            last = name - 1
            try:
                segment = self._load(name)
                if isinstance(segment.header, HeaderFault):
                    row, _ = judge(Link(name, fault=segment.header))
                    yield Damage(segment.name, 0, f"{describe(row)}; nothing in it can be told from damage")
                    continue
                file = self._directory.open(segment.name)
            except OSError as error:
                yield Damage(segment_name(name), None, f"cannot be read: {error}")
                continue
            try:
                last = yield from salvage_segment(file, segment.known, segment.limit, until)
            finally:
                file.close()
            if until is not None and last < until:
                yield Damage(segment.name, None, f"commits {last + 1} to {until} are missing")
                last = until


def _link(chain: list[_Segment], i: int, after: int, *, oldest: bool = False) -> Link:
    segment = chain[i]
    if isinstance(segment.header, HeaderFault):
        return Link(segment.first_seqno, fault=segment.header)
    following = chain[i + 1] if i + 1 < len(chain) else None
    return Link(
        segment.first_seqno,
        reaches=i > 0 or oldest or segment.first_seqno <= after + 1,
        slot=segment.slot,
        next=None if following is None else following.first_seqno,
        next_previous=(
            following.header.previous
            if following is not None and isinstance(following.header, SegmentHeader)
            else None
        ),
        previous=segment.header.previous,
    )


def _gather(file: Readable, segment: _Segment, cursor: Cursor, until: int | None, floor: int) -> tuple[Tail, int]:
    """The evidence about the end of the good records, and where they go on, if they do."""
    limit = segment.limit
    short = segment.size < segment.known.capacity
    last = cursor.last_seqno
    following = None if until is None else until + 1
    durable = max(floor, cursor.watermark)
    if cursor.stop not in (Stop.END, Stop.CUT, Stop.INVALID):
        return Tail(cursor.stop, last, durable, short=short, next=following), cursor.offset
    written = last_written(file, cursor.offset, limit) - cursor.offset
    if not written:
        return Tail(cursor.stop, last, durable, short=short, next=following), cursor.offset
    start = file.pread(min(limit - cursor.offset, HEADER_PAGE_BYTES), cursor.offset)
    zeros = len(start) - len(start.lstrip(b"\0"))
    later = False
    for found in search(file, segment.known, cursor.offset, limit):
        if not later and found.seqno == last + found.is_commit:
            tail = Tail(cursor.stop, last, durable, True, True, short, zeros, written, following)
            return tail, found.offset
        later = True
        durable = max(durable, found.watermark)
        if durable > last:
            break
    return Tail(cursor.stop, last, durable, later, False, short, zeros, written, following), cursor.offset


def _as_damage(error: Exception, file: str) -> Damage:
    if isinstance(error, CorruptionError):
        return Damage(error.file, error.offset, error.reason)
    return Damage(file, None, str(error))
