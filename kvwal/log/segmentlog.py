"""The log that keeps segments: how it begins, rolls from one segment to the next, retires old ones, and ends.

A new segment comes into being in this order; a crash between any two steps leaves a log that reads the same:
1. the old segment is flushed, because the existence of the new one will attest that it was,
2. NAME.tmp is made (or the prepared spare.tmp taken): header page, preallocation, the rewritten tail of a
   recovery; all of it is flushed,
3. it is renamed to NAME.log and the directory flushed,
4. the old segment's successor slot is written and flushed,
5. only now is anything in the new segment acknowledged. What the old one does not use is given back.

Space follows data: a segment is made as large as what was appended since the log was opened and is still kept, from
`first_segment_bytes` to `segment_bytes`; or as small as one commit needs, if the disk has no more. What a segment does
not use is given back when the log leaves it, closes, or is idle for long.

After a clean close the log goes on in its segment. That is as safe as going on after a flush, because
- everything before the place is on disk: the record there says so, and was written after the flush,
- everything behind it is zeros, so nothing of an earlier life can show up behind new records,
- the segment's name and the slot before it are on disk: a writer makes them so before it writes that record.

Rules:
- One thread at a time, but for `prepare_next`, `retire`, `abandon`, cursors and the reading of numbers.
- A failed write or flush is final, as in `writer`. A full disk, met while a segment is being made, changes nothing.
"""

from __future__ import annotations

import errno
import json
from contextlib import suppress
from dataclasses import replace
from typing import Final

from kvwal.errors import PoisonedError, RefusedError, StoreExistsError
from kvwal.events import Events, Retire, SegmentSealed
from kvwal.files import Directory, File, Files
from kvwal.files.names import POISONED, segment_name
from kvwal.keys import Seqno
from kvwal.log.carry import Carry, RecordSource
from kvwal.log.chain import Chain
from kvwal.log.cursor import SegmentCursor
from kvwal.log.index import Index, load_index
from kvwal.log.key_history import KeyHistory
from kvwal.log.protocol import LogIdentity, LogOptions, LogStats
from kvwal.log.reader import LogReader
from kvwal.log.record import CLOSED, PAUSED
from kvwal.log.retention import Hold, HoldInfo, Retention
from kvwal.log.segment import HEADER_PAGE_BYTES, IndexSizes, SegmentHeader, SegmentInfo, list_segments
from kvwal.log.segments import CLOSE_BYTES, Plan, SegmentMaker
from kvwal.log.tail import LogEnd, TailRow
from kvwal.log.writer import SegmentWriter

__all__ = ["SegmentLog"]

# An idle log leaves a segment of which more than this is not used.
_LARGE_REST_BYTES: Final = 1 << 20


class SegmentLog(SegmentWriter):
    """A store's log, open for writing. Made by `create` or `resume`; see `kvwal.log.protocol.Log`."""

    def __init__(
        self, files: Files, directory: Directory, identity: LogIdentity, options: LogOptions, events: Events | None
    ) -> None:
        super().__init__(files, identity.session, Events() if events is None else events)
        self._directory = directory
        self._identity = identity
        self._options = options
        self._wall_us = files.now_us
        self._index_sizes = IndexSizes(directory)
        self._maker = SegmentMaker(files, directory, identity, options, self._index_sizes)
        self._reader = LogReader(directory, identity.store_id)
        #: What may be retired, and who holds what.
        self.retention = Retention(self._now_us)
        #: Which commits changed a key.
        self.key_history = KeyHistory(self._reader.chain, self._maker, self._names, self._hold_versions)
        # By first seqno, oldest first. Each change, and each look at all of them, is one step of a dict, so that
        # `retire` needs no lock.
        self._segments: dict[Seqno, SegmentInfo] = {}
        # Features that a reader of the log may pass over.
        self._optional = 0
        # Entries of the index that its file has.
        self._indexed = 0
        # Where the record of a clean close ends, if nothing was written since.
        self._paused = -1

    # -- how a log begins ---------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        files: Files,
        directory: Directory,
        identity: LogIdentity,
        options: LogOptions,
        *,
        time_us: int,
        events: Events | None = None,
    ) -> SegmentLog:
        """The log of a new store: makes segment 1. StoreExistsError if the directory has a log."""
        if list_segments(directory):
            raise StoreExistsError(errno.EEXIST, "there is a log already", directory.path)
        log = cls(files, directory, identity, options, events)
        log._maker.remove_leftovers(())
        log._make_current(Seqno(1), time_us, 0)
        return log

    @classmethod
    def resume(
        cls,
        files: Files,
        directory: Directory,
        identity: LogIdentity,
        options: LogOptions,
        end: LogEnd,
        source: RecordSource,
        events: Events | None = None,
    ) -> SegmentLog:
        """Go on where a log ended. When this returns, all up to `end.last_seqno` is on disk.

        What may be in the page cache only, because a flush of it may have failed, is written anew; what was cut
        off is superseded.
        """
        log = cls(files, directory, identity, options, events)
        log._maker.remove_leftovers([segment.first_seqno for segment in end.segments])
        log.required, log._optional = end.required, end.header.optional
        log._segments = {segment.first_seqno: segment for segment in end.segments}
        log.last_seqno = log.durable_seqno = end.watermark
        log.last_time_us = end.last_time_us
        if end.row is not TailRow.CLOSED:
            # Durability: the names that were found may not be on disk yet, nor the slot that leads to the newest one.
            # After a clean close they are: that was written by a writer that had come along here, or had made the
            # segment, and has flushed them since.
            directory.sync()
            newest = end.segments[-1]
            if newest.previous:
                log._maker.write_slot(newest.previous, newest.first_seqno)
        if end.clean:
            log._go_on(end)
        else:
            log._carry(end, source)
        if directory.kind(POISONED) == "file":
            # All that was found is on disk now.
            directory.unlink(POISONED)
            # Durability: come back, it would keep from readers what is acknowledged from here on.
            directory.sync()
        return log

    def _go_on(self, end: LogEnd) -> None:
        """Append to the newest segment, if there is something behind its end to append to; otherwise the next roll."""
        header, offset = end.header, end.position.offset
        index = Index()
        if offset > index.next_offset:
            index = load_index(self._directory, header) or index
        fits = end.goes_on and offset + CLOSE_BYTES <= header.capacity
        if not fits or offset > index.next_offset or header.line != self._identity.line:
            return
        file = self._directory.open(segment_name(header.first_seqno), write=True)
        self._indexed = len(index.offsets)
        self._marked = end.watermark
        self._begin_at(file, header, index, offset)
        if end.row is TailRow.CLOSED:
            self._paused = offset

    def _carry(self, end: LogEnd, source: RecordSource) -> None:
        """Make a segment of the commits that may not be on disk, in place of those; durable on return."""
        carry = Carry(end, source)
        self._make_current(carry.first_seqno, carry.created_us, 0, carry=carry)
        self.last_seqno = self.durable_seqno = self._marked = end.last_seqno
        if carry.first_seqno > end.header.first_seqno:
            self._shorten(end.header.first_seqno, end.position.offset, end.header.capacity)

    # -- reading ------------------------------------------------------------------------------

    def read(
        self, after: Seqno | None = None, *, until: Seqno | None = None, purpose: str | None = "history"
    ) -> SegmentCursor:
        """The commits beyond `after` (None: all that are kept), up to `until` (None: as they become durable).

        FeedGap if commits beyond `after` are no longer kept. Thread-safe. `purpose`: None if the caller holds them.
        """
        hold = Hold({}, 0, after) if purpose is None and after is not None else self._hold(purpose or "", after)
        recent, waiting = self.recent if until is None else None, self._waiting
        waits = waiting.await_beyond, waiting.when_beyond
        return SegmentCursor(self._reader, hold, until, self._durable, *waits, recent, lambda: self._header)

    def _segment_of(self, seqno: Seqno) -> tuple[Chain, Seqno]:
        return self._reader.chain, max(name for name in self._names() if name <= seqno)

    def _names(self) -> list[Seqno]:
        return list(self._segments)

    def _hold_versions(self, after: Seqno | None) -> Hold:
        return self._hold("versions", after)

    def _hold(self, purpose: str, after: Seqno | None) -> Hold:
        return self.retention.hold(purpose, after, self.segments(), self.last_seqno, self.last_time_us)

    def holds(self) -> list[HoldInfo]:
        """Who holds log, since when. From any thread."""
        return self.retention.holds()

    def segments(self, *, with_indexes: bool = False) -> list[SegmentInfo]:
        """Every segment there is, oldest first; `with_indexes`: the size of its indexes in its own. From any thread."""
        segments = list(self._segments.values())
        return self._index_sizes.added_to(segments) if with_indexes else segments

    def stats(self) -> LogStats:
        """Figures. From any thread."""
        segments = self.segments(with_indexes=True)
        size = sum(segment.size for segment in segments)
        return LogStats(len(segments), size, segments[0].first_seqno, self.last_seqno, self.durable_seqno)

    def _poisoned(self, error: BaseException) -> PoisonedError:
        said = {
            "reason": str(error),
            "durable_seqno": self.durable_seqno,
            "session": self.session,
            "wall_us": self._wall_us(),
        }
        # Not flushed: after a power cut only what is on disk is found.
        with suppress(OSError):
            if self._directory.kind(POISONED) is None:
                file = self._directory.open(POISONED, create=True, mode=self._options.mode)
                try:
                    file.pwrite(json.dumps(said).encode(), 0)
                finally:
                    file.close()
        return super()._poisoned(error)

    # -- segments -----------------------------------------------------------------------------

    def _roll(self, needed: int, planned: int | None = None) -> None:
        """Leave the current segment for a new one with space for `needed` bytes."""
        self.sync()
        if self._has_remains:
            # The next segment supersedes them, if it can be made.
            self._unmake()
        created_us = max(self._now_us(), self.last_time_us)
        try:
            self._make_current(Seqno(self.last_seqno + 1), created_us, needed, planned=planned)
        except RefusedError:
            raise
        except OSError as error:
            self._failure = error
            self._limit = -1
            raise self._poisoned(error) from error

    def _planned_bytes(self) -> int:
        """The size of the next segment: what was appended since the log was opened and is kept, within bounds."""
        kept = self._kept_bytes()
        least = min(max(kept // 8, self._options.first_segment_bytes), _LARGE_REST_BYTES // 2)
        return min(max(min(kept, self.tail_bytes), least), self._options.segment_bytes)

    def _idle_bytes(self) -> int:
        """How much of a segment may stay unused: more than a session's first segment has, so that opening, writing a
        little and closing, again and again, goes on in one segment.
        """
        return min(max(self._kept_bytes() // 4, self._options.first_segment_bytes), _LARGE_REST_BYTES)

    def _kept_bytes(self) -> int:
        return sum(segment.size for segment in self.segments()[:-1]) + self._offset

    def _make_current(
        self, first: Seqno, created_us: int, needed: int, *, planned: int | None = None, carry: Carry | None = None
    ) -> None:
        """Steps 2 to 5: make a segment and go on in it. Raises as `SegmentMaker.make`."""
        previous = Seqno(0)
        for newest in self.segments()[-1:]:
            # One that has no commit, or of which all are rewritten, is replaced by one of the same name.
            previous = newest.previous if newest.first_seqno == first else newest.first_seqno
        wall_us = carry.wall_us if carry is not None and carry.wall_us is not None else self._wall_us()
        planned = self._planned_bytes() if planned is None else planned
        plan = Plan(first, previous, created_us, wall_us, planned, needed, self.required, self._optional)
        index = Index()
        start = HEADER_PAGE_BYTES

        def fill(file: File, header: SegmentHeader) -> int:
            nonlocal index, start
            assert carry is not None
            index = Index()
            start = carry.fill(file, header, index)
            return start

        file, header = self._maker.make(plan, None if carry is None else fill, self._leave)
        old_file, old = self._file, self._header
        try:
            if old_file is not None and old is not None and old.first_seqno == previous:
                self._maker.write_slot_to(old_file, old, first)
            elif previous:
                self._maker.write_slot(previous, first)
        except BaseException:
            file.close()
            raise
        if old is not None and old.first_seqno < first:
            self._write_index()
        # An interruption among these leaves `_left` set, and the next append makes this segment again. `retire` leaves
        # the old one alone as long as it is the newest.
        if previous in self._segments:
            self._segments[previous] = replace(self._segments[previous], sealed=True)
        sealed = old is not None and old.first_seqno == previous
        if sealed and old is not None:
            self._shorten(previous, self._offset, old.capacity)
        self._segments[first] = SegmentInfo(first, header.capacity, created_us, plan.wall_us, False, previous)
        # No record may be older than its segment, even if the clock steps back now.
        self.last_time_us = max(self.last_time_us, created_us)
        old_end = self._offset
        self._indexed = 0
        self._begin_at(file, header, index, start)
        if old_file is not None:
            old_file.close()
        self.retention.drop_late(self.segments())
        if sealed and self._events.listeners:
            self._events.tell(SegmentSealed(segment_name(previous), old_end, previous, Seqno(first - 1)))

    def _shorten(self, first_seqno: Seqno, end: int, capacity: int) -> None:
        """Give back what a segment with a successor does not use."""
        segment = self._segments.get(first_seqno)
        if segment is not None and capacity - end > self._idle_bytes() and self._maker.shorten(first_seqno, end):
            self._segments[first_seqno] = replace(segment, size=end)

    def _write_index(self) -> None:
        """Write the current segment's index, if it has entries that its file has not."""
        if self._header is not None and len(self._index.offsets) > self._indexed:
            self._maker.write_index(self._header, self._index)
            self._indexed = len(self._index.offsets)

    def prepare_next(self) -> None:
        """Make the next segment's file ahead of time, once the current one is half full. From any thread."""
        if self._limit >= 0 and 2 * (self._offset - HEADER_PAGE_BYTES) > self._usable_end - HEADER_PAGE_BYTES:
            self._maker.prepare_spare(self._planned_bytes())

    @property
    def can_give_back(self) -> bool:
        """Whether `give_back` would do anything."""
        return self._maker.has_spare or self._has_large_rest()

    def _has_large_rest(self) -> bool:
        return not self._left and self._usable_end - self._offset > _LARGE_REST_BYTES

    def give_back(self) -> None:
        """Give back the space that a log needs only while commits come in: the spare, and the rest of a large segment.

        Not while a commit is under way. It costs some flushes, so a log should have been idle for a while.
        """
        self._refuse_if_over()
        self._maker.drop_spare()
        if self._has_large_rest():
            self._roll(0, self._options.first_segment_bytes)

    def retire(self, below: Seqno) -> list[Seqno]:
        """Remove the segments that hold only commits before `below`, oldest first, and that no hold needs.

        `below` is what recovery needs. Returns the first seqnos of what was removed. The directory is flushed after
        each, so that what is left after a crash is never more than the oldest ones short.
        """
        self._refuse_if_over()
        segments = self.segments()
        going = segments[: self.retention.release_before(below, segments)]
        removed: list[Seqno] = []
        for segment in going:
            try:
                if not self._maker.remove(segment.first_seqno):
                    break
            except OSError as error:
                # What the directory holds on disk is unknown now, as after any failed write.
                self._failure = error
                self._limit = -1
                raise self._poisoned(error) from error
            removed.append(segment.first_seqno)
            del self._segments[segment.first_seqno]
            # A file that is open keeps its space.
            self.key_history.forget(segment.first_seqno)
        if removed and self._events.listeners:
            self._events.tell(Retire(tuple(map(segment_name, removed)), self.segments()[0].first_seqno))
        return removed

    # -- how a log ends -----------------------------------------------------------------------

    def close(self) -> None:
        """Flush, say that the log was closed, give back much space that was not used. Idempotent.

        After a failure it only drops the handles. Raises PoisonedError or DiskFullError if closing failed;
        what was durable stays so, and the next open runs a recovery. Where the flush is interrupted the log stays open,
        and the next close flushes.
        """
        if self._closed:
            return
        try:
            if self._failure is None and self._file is not None:
                self.sync()
                if self._has_remains:
                    self._unmake()
                elif not self._left:
                    self._seal(self._file)
        finally:
            if self._failure is not None or self.durable_seqno == self.last_seqno:
                self._closed = True
                self._maker.end(remove=True)
                self.abandon()

    def _seal(self, file: File) -> None:
        assert self._header is not None
        if self._header.capacity - self._offset > self._idle_bytes():
            self._mark(CLOSED)
            try:
                # Durability: only behind a closed record that is on disk may the file be shorter than it was made.
                file.datasync()
                file.truncate(self._offset)
                file.sync()
            except OSError as error:
                self._failure = error
                raise self._poisoned(error) from error
        elif self._paused != self._offset:
            # Not flushed: all that it says is true already. If it is lost, the next open finds out by itself.
            self._mark(PAUSED)
        self._write_index()

    def abandon(self) -> None:
        """Drop the handles and write nothing: in a forked child, or after a failure. Takes no lock."""
        self._closed = True
        self._limit = -1
        self._maker.end(remove=False)
        self.key_history.close()
        file, self._file = self._file, None
        if file is not None:
            file.close()
        self._waiting.wake()
