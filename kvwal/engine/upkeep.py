"""What may be asked of an open store beside reads and commits: flushes, checkpoints, proofs, figures, history."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import Final

from kvwal.engine.archives import Archives
from kvwal.engine.background import Background
from kvwal.engine.checkpoint import COMPACT_PASSES, Checkpointer
from kvwal.engine.commit import CommitQueue
from kvwal.engine.consumers import Consumers
from kvwal.engine.expirer import Expirer
from kvwal.engine.past import Past
from kvwal.engine.readers import Readers
from kvwal.engine.recovery import Recovered, RecoveryReport
from kvwal.engine.state import UnlessGone
from kvwal.engine.stats import Stats
from kvwal.engine.tables import Tables
from kvwal.engine.verify import VerifyReport, verify_parts
from kvwal.engine.verify_indexes import verify_indexes
from kvwal.errors import FeedGap, SnapshotTooOld, not_followed, read_only
from kvwal.files import Directory, Files
from kvwal.keys import Seqno
from kvwal.log import SegmentCursor, SegmentInfo, read_kept
from kvwal.times import time_of, us_of

__all__ = ["Upkeep"]

# How often a proof beside a writer is begun again.
_LOOKS: Final = 4


class Upkeep:
    """The upkeep of one open store. Thread-safe; each call refuses when the store is closed or was forked."""

    def __init__(
        self,
        parts: Recovered,
        readers: Readers,
        queue: CommitQueue,
        consumers: Consumers,
        past: Past,
        checkpointer: Checkpointer | None,
        background: Background | None,
        tables: Tables,
        files: Files,
        expirer: Expirer,
        archives: Archives,
    ) -> None:
        """A read-only store has no checkpointer."""
        self._state, self._pages, self._log, self._reader = parts.state, parts.pages, parts.log, parts.reader
        self._feed = parts.feed
        #: The store's directory.
        self.directory: Directory = parts.directory
        #: What opening found and did.
        self.recovery: RecoveryReport = parts.report
        #: Whether it was opened with flag "r".
        self.is_read_only = checkpointer is None
        self._readers = readers
        self._queue = queue
        #: The consumers of the feed.
        self.consumers = consumers
        #: Past moments.
        self.past = past
        self._checkpointer = checkpointer
        self._background = background
        self._tables, self._reads = tables, tables.reads
        self._files = files
        self._expirer = expirer
        self._archives = archives

    @property
    def durable_seqno(self) -> Seqno:
        """The last commit known to be on disk."""
        return self._log.durable_seqno if self._log is not None else self._state.seqno

    def sync(self) -> None:
        """Make every commit so far durable."""
        self._state.refuse_if_gone()
        if self._log is not None:
            self._queue.sync()

    def checkpoint(self) -> None:
        """Bring every commit so far into the pages."""
        checkpointer = self._writable()
        self._queue.refuse_reentry("a checkpoint")
        checkpointer.checkpoint()
        if self._background is not None:
            self._background.checkpoint_was_made()
        elif self._tables.indexes.is_due():
            self._tables.indexes.go_on()

    def compact(self) -> int:
        """Give unused space back to the system; returns the bytes the page file shrank by."""
        checkpointer = self._writable()
        self._queue.refuse_reentry("compacting")
        before = self._pages.space.file_bytes()
        while checkpointer.compact(passes=COMPACT_PASSES):
            pass
        return before - self._pages.space.file_bytes()

    def _writable(self) -> Checkpointer:
        self._state.refuse_if_gone()
        if self._checkpointer is None:
            raise read_only()
        return self._checkpointer

    def verify(self, progress: Callable[[int, int], None] | None) -> VerifyReport:
        """Prove pages, log, and the one against the other. Checkpoints wait meanwhile."""
        self._state.refuse_if_gone()
        with UnlessGone(self._state):
            if self._checkpointer is None:
                report = self._verify_beside(progress)
            else:
                self._queue.refuse_reentry("verifying")
                report = self._checkpointer.while_idle(lambda: self._verify(progress))
        if not report.ok:
            # What could not be read is in it, and may be what was closed meanwhile.
            self._state.refuse_if_gone()
        return report

    def _verify_beside(self, progress: Callable[[int, int], None] | None) -> VerifyReport:
        """The same of files that another process may be writing: again where pages, or log, went meanwhile."""
        for _ in range(_LOOKS):
            before, report = self._pages.readable(), None
            with suppress(SnapshotTooOld):
                report = self._verify(progress)
                if report.ok:
                    return report
            self._reads.moments.now.ready()
            if report is not None and self._pages.readable() == before:
                return report
        return self._verify(progress)

    def _verify(self, progress: Callable[[int, int], None] | None) -> VerifyReport:
        report = verify_parts(self._pages, self._reader, self._files, progress)
        if report.problems:
            # What is damaged below says nothing of what is made of it.
            return report
        began_s = self._files.monotonic_s()
        problems = tuple(verify_indexes(self._reads, self._tables))
        return replace(report, problems=problems, seconds=report.seconds + self._files.monotonic_s() - began_s)

    def stats(self) -> Stats:
        """Figures about memory, pages and log, and how archives are doing."""
        self._state.refuse_if_gone()
        parts = self._state, self._readers, self._pages, self._log, self._reader
        with UnlessGone(self._state):
            return Stats.of(*parts, self._expirer.waiting(), self._archives.statuses())

    def read(self, after: Seqno | datetime | None, until: Seqno | None, purpose: str | None) -> SegmentCursor:
        """The commits beyond `after` (None: all that the log still has), up to `until` (None: as they become durable).

        `after` may be a time: then the commits that were made then or later, and behind some that were made before.
        `purpose`: what they are held for; None if the caller holds them. FeedGap if one of them is gone, or may be, or
        `after` is beyond the newest commit; ReadOnlyError where none can come.
        """
        self._state.refuse_if_gone()
        with UnlessGone(self._state):
            if isinstance(after, datetime):
                return self._read_since(after, until, purpose)
            return self._read_beyond(after, until, purpose)

    def _read_beyond(self, after: Seqno | None, until: Seqno | None, purpose: str | None) -> SegmentCursor:
        log = self._log
        if after is not None and after > (newest := self._state.seqno if log is None else log.last_seqno):
            raise FeedGap(after, self._oldest_kept(), newest)
        if log is not None:
            return log.read(after, until=until, purpose=purpose)
        if self._feed is not None:
            return self._feed(after, until)
        if until is None:
            raise not_followed()
        return read_kept(self._reader, after, until)

    def _read_since(self, since: datetime, until: Seqno | None, purpose: str | None) -> SegmentCursor:
        since_us = us_of("since", since)
        # The log that is looked at is held meanwhile.
        whole = self.read(None, until, purpose)
        position = whole.position
        segments = [segment for segment in self._segments() if segment.first_seqno > position]
        # No commit before a segment is younger than the segment.
        if position and segments and segments[0].created_us >= since_us:
            whole.close()
            oldest_time = time_of(segments[0].created_us)
            raise FeedGap(since, position + 1, self._state.seqno, oldest_time=oldest_time)
        for segment in segments:
            # 0: its header is damaged.
            if not 0 < segment.created_us < since_us:
                break
            position = Seqno(segment.first_seqno - 1)
        if position == whole.position:
            return whole
        later = self.read(position, until, purpose)
        whole.close()
        return later

    def _oldest_kept(self) -> Seqno:
        """The first commit that the log has. Raises as reading the log does: it may be gone with its store."""
        if self._log is not None:
            return self._segments()[0].first_seqno
        with self.read(None, self._state.seqno, None) as everything:
            return Seqno(everything.position + 1)

    def _segments(self) -> list[SegmentInfo]:
        """Every segment of the log, oldest first."""
        return self._reader.segments() if self._log is None else self._log.segments()
