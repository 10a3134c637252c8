"""A log made of commits that another log had: the same seqnos, times and bodies, on a new line.

Each segment gets its name when all of it is on disk, as after a recovery, and the one before is given its successor
after that. So what is there at any time is a log that ends with a whole segment.
"""

from __future__ import annotations

from itertools import chain
from typing import Final

from kvwal.errors import InternalError
from kvwal.files import Directory, File, Files
from kvwal.keys import Seqno
from kvwal.log.carry import write_records
from kvwal.log.commits import Commits
from kvwal.log.index import Index
from kvwal.log.intents import features_of
from kvwal.log.protocol import LogIdentity, LogOptions
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.log.segment import IndexSizes, SegmentHeader
from kvwal.log.segments import Plan, SegmentMaker

__all__ = ["CopiedLog"]

_KIND: Final = 0xFF


class CopiedLog:
    """A log that is being made in a directory that has none. One thread; `close` makes it whole."""

    def __init__(
        self,
        files: Files,
        directory: Directory,
        identity: LogIdentity,
        options: LogOptions,
        after: Seqno,
        time_us: int,
        required: int,
    ) -> None:
        """
        Args:
            after, time_us: the commit that it goes on after, and its time.
            required: features that a reader of the commits must know, beside those that their kinds tell.
        """
        self._files = files
        self._options = options
        self._maker = SegmentMaker(files, directory, identity, options, IndexSizes(directory))
        self._last, self._time_us = after, time_us
        self._required = required
        self._previous = Seqno(0)
        # What the next segment gets, and its bytes.
        self._stretches: list[Commits] = []
        self._bytes = 0

    def add(self, commits: Commits) -> None:
        """The next commits. Durable when a segment is full, or after `close`."""
        last = self._stretches[-1].seqnos[-1] if self._stretches else self._last
        ends = commits.seqnos[0], commits.seqnos[-1]
        if ends != (last + 1, last + len(commits)):
            raise InternalError(f"commits {ends} do not follow {last}")
        sizes = tuple(map(len, commits.bodies))
        size, most = sum(sizes), self._options.segment_bytes
        if self._bytes + size + RECORD_HEADER_BYTES * len(sizes) < most:
            self._stretches.append(commits)
            self._bytes += size + RECORD_HEADER_BYTES * len(sizes)
            return
        begin = 0
        for i, each in enumerate(sizes, 1):
            self._bytes += RECORD_HEADER_BYTES + each
            if self._bytes >= most or i == len(sizes):
                self._stretches.append(commits.part(begin, i))
                begin = i
            if self._bytes >= most:
                self._make(0)

    def close(self) -> None:
        """Make the last segment. All that was added is durable on return."""
        self._make(self._options.first_segment_bytes)
        self._maker.end(remove=True)

    def _make(self, planned_bytes: int) -> None:
        stretches = self._stretches
        first = Seqno(self._last + 1)
        created_us = stretches[0].times_us[0] if stretches else self._time_us
        index = Index()

        def fill(file: File, header: SegmentHeader) -> int:
            nonlocal index
            index = Index()
            return write_records(file, header, index, stretches, self._last, self._last, created_us)[0]

        for kind in set(chain.from_iterable(each.kinds for each in stretches)):
            self._required |= features_of(kind & ~_KIND)
        wall_us = self._files.now_us()
        plan = Plan(first, self._previous, created_us, wall_us, planned_bytes, 0, self._required, 0)
        file, header = self._maker.make(plan, fill, lambda: None)
        file.close()
        if self._previous:
            self._maker.write_slot(self._previous, first)
        if index.offsets:
            self._maker.write_index(header, index)
        self._previous = first
        if stretches:
            self._last, self._time_us = stretches[-1].seqnos[-1], stretches[-1].times_us[-1]
        self._stretches, self._bytes = [], 0
