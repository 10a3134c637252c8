"""A log made of commits that another log had: the same seqnos, times and bodies, on a new line.

Each segment gets its name when all of it is on disk, as after a recovery, and the one before is given its successor
after that. So what is there at any time is a log that ends with a whole segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from kvwal.errors import InternalError
from kvwal.files import Directory, File, Files
from kvwal.keys import Seqno
from kvwal.log.carry import write_records
from kvwal.log.index import Index
from kvwal.log.intents import features_of
from kvwal.log.protocol import LogIdentity, LogOptions
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.log.segment import IndexSizes, SegmentHeader
from kvwal.log.segments import Plan, SegmentMaker

__all__ = ["Commit", "CopiedLog"]

_KIND: int = 0xFF

#: Kind, seqno, time in microseconds and body, as in the log's record. A plain tuple: the garbage collector does not go
#: over those again and again.
Commit: TypeAlias = tuple[int, Seqno, int, bytes]


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
        self._commits: list[Commit] = []
        self._bytes = 0

    def add(self, commits: Sequence[Commit]) -> None:
        """The next commits, one or more, of seqnos in a row. Durable when a segment is full, or after `close`."""
        last = self._last + len(self._commits)
        ends = commits[0][1], commits[-1][1]
        if ends != (last + 1, last + len(commits)):
            raise InternalError(f"commits {ends} do not follow {last}")
        size = RECORD_HEADER_BYTES * len(commits) + sum(len(body) for _, _, _, body in commits)
        if self._bytes + size < self._options.segment_bytes:
            self._commits += commits
            self._bytes += size
            return
        for commit in commits:
            self._commits.append(commit)
            self._bytes += RECORD_HEADER_BYTES + len(commit[3])
            if self._bytes >= self._options.segment_bytes:
                self._make(0)

    def close(self) -> None:
        """Make the last segment. All that was added is durable on return."""
        self._make(self._options.first_segment_bytes)
        self._maker.end(remove=True)

    def _make(self, planned_bytes: int) -> None:
        commits: Sequence[Commit] = self._commits
        first = Seqno(self._last + 1)
        created_us = commits[0][2] if commits else self._time_us
        index = Index()

        def fill(file: File, header: SegmentHeader) -> int:
            nonlocal index
            index = Index()
            return write_records(file, header, index, commits, self._last, self._last, created_us)[0]

        for kind in {kind for kind, _, _, _ in commits}:
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
        if commits:
            _, self._last, self._time_us, _ = commits[-1]
        self._commits, self._bytes = [], 0
