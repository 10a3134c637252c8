"""Where in the log a commit is, by seqno or by time, without reading all before it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from kvwal.keys import Seqno
from kvwal.locks import locked, new_lock
from kvwal.log.chain import Chain, no_segments
from kvwal.log.index import Entry, Index, load_index
from kvwal.log.reader import read_segment, start_of
from kvwal.log.record import LogPosition, Record
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader
from kvwal.log.walk import Place

__all__ = ["Seek"]

_MAX_CACHED_INDEXES: Final = 64


class Seek:
    """Searches in one log. Thread-safe. It keeps the indexes that it read, and makes them longer as it searches."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        #: Guards the indexes, which grow as they are used.
        self.lock = new_lock()
        self._indexes: dict[int, tuple[int, Index]] = {}

    def seek(self, seqno: Seqno) -> LogPosition:
        """Where a commit is. ValueError if the log does not hold it (any more, or yet)."""
        return self._record(seqno).position

    def time_of(self, seqno: Seqno) -> int:
        """When a commit was made, in us. ValueError as `seek`."""
        return self._record(seqno).time_us

    def _record(self, seqno: Seqno) -> Record:
        names = self._chain.names()
        i = bisect_right(names, seqno) - 1
        if i < 0:
            raise ValueError(f"commit {seqno} is older than the log")
        for record in self._from_entry(names, i, seqno=seqno):
            if record.seqno >= seqno:
                return record
        raise ValueError(f"commit {seqno} is not in the log")

    def seek_time(self, time_us: int) -> LogPosition:
        """Where the first commit made after `time_us` is, or will be."""
        return self._first_after(time_us)[1]

    def seqno_at(self, time_us: int) -> Seqno:
        """The last commit made at `time_us` or before; the one before the oldest in the log if there is none."""
        return Seqno(self._first_after(time_us)[0] - 1)

    def _first_after(self, time_us: int) -> tuple[int, LogPosition]:
        names = self._chain.names()
        if not names:
            raise no_segments()
        # The last segment created at that time or before; only O(log n) headers are read.
        low, high = 0, len(names)
        while low < high:
            middle = (low + high) // 2
            if self._chain.header(names[middle]).created_us <= time_us:
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

    def _from_entry(
        self, names: list[Seqno], i: int, *, seqno: int | None = None, time_us: int = 0
    ) -> Iterator[Record]:
        """The commits of segment i, from the last indexed one at or before the seqno or time on.

        What is read on the way makes the index longer, so that the next search is short.
        """
        header = self._chain.header(names[i])
        index = self._index(header) or Index()
        entry = self._keep(header, index, seqno, time_us)
        segment = self._chain.load(names[i])
        place = start_of(header)
        if entry is not None:
            place = Place(entry.offset, entry.seqno - 1, header.first_seqno - 1, entry.time_us)
        until = names[i + 1] - 1 if i + 1 < len(names) else None
        for record in read_segment(self._chain, segment, place, until=until):
            if record.offset >= index.next_offset:
                self._lengthen(index, record)
            yield record

    @locked
    def _keep(self, header: SegmentHeader, index: Index, seqno: int | None, time_us: int) -> Entry | None:
        """Keep the index, and look the place up in it."""
        if header.first_seqno not in self._indexes:
            while len(self._indexes) >= _MAX_CACHED_INDEXES:
                del self._indexes[next(iter(self._indexes))]
        self._indexes[header.first_seqno] = (header.salt, index)
        return index.made_by(time_us) if seqno is None else index.at_or_before(seqno)

    @locked
    def _lengthen(self, index: Index, record: Record) -> None:
        if record.offset >= index.next_offset:
            index.add(record.seqno, record.time_us, record.offset)

    def _index(self, header: SegmentHeader) -> Index | None:
        """The segment's index as far as it is known; a segment that was replaced has another salt."""
        # One look, which needs no lock.
        salt, index = self._indexes.get(header.first_seqno, (None, None))
        return index if salt == header.salt else load_index(self._chain.directory, header)
