"""Writes the log: numbers commits, appends them, flushes, rolls to new segments, retires old ones.

A new segment comes into being in this order; a crash between any two steps leaves a log that reads the same:
1. the old segment is flushed, because the existence of the new one will attest that it was,
2. NAME.tmp is made (or the prepared spare.tmp taken): header page, preallocation, the carried records of a
   recovery; all of it is flushed,
3. it is renamed to NAME.log and the directory flushed,
4. the old segment's successor slot is written and flushed,
5. only now is anything in the new segment acknowledged.

Rules:
- One thread at a time, but for `prepare_next`, `abandon` and the reading of numbers.
- A failed write or flush is final: every later call raises `PoisonedError`. A flush is never tried again.
- A full disk is not a failure. Met while a segment is being made, it changes nothing. Met while records are
  being written, it costs the segment: what was begun there is superseded by the next one.
- The same holds for an exception that comes from outside (KeyboardInterrupt): an append it interrupts has not
  been counted in `last_seqno`, its bytes will be superseded, and the next append rolls.

Invariant: `last_seqno` counts exactly the commits below `_offset` and in older segments.
Invariant: no byte at or beyond `_offset` of the current segment was ever written, unless `_left`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from crc32c import crc32c

from kvwal.errors import (
    ClosedError,
    DiskFullError,
    InternalError,
    RefusedError,
    StoreExistsError,
    poisoned,
)
from kvwal.files import Buffer, Directory, File, Files, is_full
from kvwal.files.names import index_name
from kvwal.keys import Seqno
from kvwal.log.index import INDEX_STRIDE_BYTES, Index
from kvwal.log.intents import MAX_BODY_BYTES, Body, encode_put, features_of
from kvwal.log.record import (
    CLOSED,
    COMMIT,
    RECORD_HEAD,
    RECORD_HEADER_BYTES,
    RECORD_PUT,
    RECORD_REST,
    WATERMARK,
    Record,
    encode_record,
)
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader, SegmentInfo, list_segments
from kvwal.log.segments import CLOSED_ROOM_BYTES, SegmentMaker, copy_tail, disk_full
from kvwal.log.tail import LogEnd
from kvwal.options import LogOptions

__all__ = ["LogWriter"]

# Chunks below this are joined before they are written: a copy costs less than a system call.
_OWN_WRITE_BYTES: Final = 32 << 10

_pack_head = RECORD_HEAD.pack
_pack_rest = RECORD_REST.pack
_pack_put = RECORD_PUT.pack


class RecordSource(Protocol):
    """What a resume needs of the reader."""

    def replay(self, after: Seqno, floor: Seqno) -> Iterable[Record]:
        """The commits beyond `after`."""
        ...


def _no_file(data: Buffer, offset: int) -> None:
    raise InternalError(f"a write of {len(data)} bytes at {offset}, and no segment is open")


class LogWriter:
    """The writing end of a store's log. Made by `create` or `resume`."""

    def __init__(
        self,
        files: Files,
        directory: Directory,
        store_id: bytes,
        options: LogOptions,
    ) -> None:
        self._files = files
        self._directory = directory
        self._maker = SegmentMaker(files, directory, store_id, options)
        self._segment_bytes = options.segment_bytes
        self._now_us = files.now_us
        #: The last commit written, the last one known to be on disk, and the time of the last one.
        self.last_seqno = Seqno(0)
        self.durable_seqno = Seqno(0)
        self.last_time_us = 0
        # Replaced, never changed, so that it can be read from any thread.
        self._segments: tuple[SegmentInfo, ...] = ()
        # The current segment. After a clean end there is none until the first append.
        self._file: File | None = None
        self._pwrite: Callable[[Buffer, int], None] = _no_file
        self._header: SegmentHeader | None = None
        self._marker = 0
        self._salt = 0
        self._offset = 0
        #: Commits must end here, so that the record of a clean close has room.
        self._room_end = 0
        self._index = Index()
        # Where `append_put` must look further: the segment is full, an index entry is due, or nothing goes any more.
        self._limit = -1
        # Nothing may be written to the current segment any more: the next append rolls.
        self._left = True
        # Rung by the next append.
        self._bell: Callable[[], None] | None = None
        # The watermark that the last watermark record carries.
        self._marked = Seqno(0)
        self._tail_bytes = 0
        self._closed = False
        self._failure: BaseException | None = None

    # -- how a writer begins ------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        files: Files,
        directory: Directory,
        store_id: bytes,
        options: LogOptions,
        *,
        time_us: int,
    ) -> LogWriter:
        """The log of a new store: makes segment 1. StoreExistsError if the directory has a log."""
        if list_segments(directory):
            raise StoreExistsError(errno.EEXIST, "there is a log already", directory.path)
        log = cls(files, directory, store_id, options)
        log._maker.remove_leftovers(())
        log.last_time_us = time_us
        log._make_current(Seqno(1), time_us, options.segment_bytes, 0)
        return log

    @classmethod
    def resume(
        cls,
        files: Files,
        directory: Directory,
        store_id: bytes,
        end: LogEnd,
        reader: RecordSource,
        options: LogOptions,
    ) -> LogWriter:
        """Go on where a log ended. When this returns, all up to `end.last_seqno` is on disk.

        What may be in the page cache only, because a flush of it may have failed, is written anew; what was cut
        off is superseded.
        """
        log = cls(files, directory, store_id, options)
        log._maker.remove_leftovers([segment.first_seqno for segment in end.segments])
        log._segments = end.segments
        log._maker.features = end.features
        log.last_seqno = log.durable_seqno = end.watermark
        log.last_time_us = end.last_time_us
        # The names that were found may not be on disk yet, nor the slot that leads to the newest one.
        directory.sync()
        newest = end.segments[-1]
        if newest.previous:
            log._maker.write_slot(newest.previous, newest.first_seqno)
        if not end.clean:
            try:
                log._carry(end, reader, options.segment_bytes)
            except DiskFullError:
                # As small as it can be. If even that fails the store cannot be opened for writing.
                log._carry(end, reader, 0)
        return log

    def _carry(self, end: LogEnd, source: RecordSource, least_bytes: int) -> None:
        """Make a segment of the commits that may not be on disk, in place of those; durable on return."""
        records: Iterable[Record] = ()
        created_us = end.last_time_us
        if end.last_seqno > end.watermark:
            records = source.replay(end.watermark, end.watermark)
            # No record of a segment is older than the segment.
            for record in records:
                created_us = record.time_us
                break
            records = source.replay(end.watermark, end.watermark)

        def fill(file: File, header: SegmentHeader, index: Index) -> int:
            return copy_tail(file, header, index, end, records)

        self._make_current(Seqno(end.watermark + 1), created_us, least_bytes, 0, fill)
        self.last_seqno = self.durable_seqno = self._marked = end.last_seqno

    # -- appending ----------------------------------------------------------------------------

    def append_put(self, key: bytes, value: bytes) -> Seqno:
        """Append one commit that puts one value: what `append([encode_put(key, value)])` does, and faster."""
        offset = self._offset
        size = 11 + len(key) + len(value)
        end = offset + 40 + size
        if end > self._limit:
            return self.append((encode_put(key, value),))
        now_us = self._now_us()
        if now_us < self.last_time_us:
            now_us = self.last_time_us
        seqno = self.last_seqno + 1
        # Header and intent packed by one call; 1, 1 and 1 are COMMIT, one intent, and a put.
        rest = _pack_put(size, 1, seqno, self.durable_seqno, now_us, 1, 1, len(key), len(value)) + key + value
        try:
            self._pwrite(_pack_head(self._marker, crc32c(rest, (self._salt + offset) & 0xFFFFFFFF)) + rest, offset)
            self.last_time_us = now_us
            self._offset = end
            self.last_seqno = seqno  # type: ignore[assignment]  # Seqno() would be a call
        except OSError as error:
            self._failure = error
            self._limit = -1
            raise self._write_failed(error) from error
        except BaseException:
            self._left = True
            self._limit = -1
            raise
        return seqno  # type: ignore[return-value]

    def append(self, bodies: Sequence[bytes | list[Buffer]], *, small: bool = False) -> Seqno:
        """Append a commit for every body, all or none; returns the seqno of the last. Not durable on return.

        With `small`, a segment that must be made for it is only as large as needed.

        Raises:
            DiskFullError: nothing was appended; try again when there is space.
            PoisonedError: a write failed, now or earlier.
            ValueError: a body is too large for a record.
        """
        self._refuse_if_over()
        if self._bell is not None:
            # In this order: interrupted in between, it is rung twice.
            self._bell()
            self._bell = None
        sizes = [len(body) if isinstance(body, bytes) else sum(map(len, body)) for body in bodies]
        if sizes and max(sizes) > MAX_BODY_BYTES:
            raise ValueError(f"a commit takes {max(sizes)} bytes in the log; the limit is {MAX_BODY_BYTES}")
        total = sum(sizes) + RECORD_HEADER_BYTES * len(sizes)
        if self._left or self._offset + total > self._room_end:
            self._roll(total, 0 if small else self._segment_bytes)
        now_us = max(self._now_us(), self.last_time_us)
        offset = self._offset
        seqno = self.last_seqno
        chunks: list[Buffer] = []
        pending: list[Buffer] = []
        due = self._index.next_offset
        entries: list[tuple[int, int, int]] = []
        for body, size in zip(bodies, sizes, strict=True):
            seqno = Seqno(seqno + 1)
            if offset >= due:
                entries.append((seqno, now_us, offset))
                due = offset + INDEX_STRIDE_BYTES
            parts = [body] if isinstance(body, bytes) else body
            kind = COMMIT
            if type(body) is Body:
                kind |= body.bits
                self._maker.features |= features_of(body.bits)
            rest = _pack_rest(size, kind, seqno, self.durable_seqno, now_us)
            crc = crc32c(rest, (self._salt + offset) & 0xFFFFFFFF)
            for part in parts:
                crc = crc32c(part, crc)
            pending.append(_pack_head(self._marker, crc) + rest)
            for part in parts:
                if len(part) < _OWN_WRITE_BYTES:
                    pending.append(part)
                    continue
                if pending:
                    chunks.append(b"".join(pending))
                    pending = []
                chunks.append(part)
            offset += RECORD_HEADER_BYTES + size
        if pending:
            chunks.append(b"".join(pending))
        self._write(chunks, offset, seqno, now_us)
        for entry in entries:
            self._index.add(*entry)
        self._limit = min(self._room_end, self._index.next_offset)
        return seqno

    def ring_at_next_append(self, bell: Callable[[], None]) -> None:
        """Call `bell` when the next append begins, once. It costs the appends after that one nothing."""
        self._bell = bell
        self._limit = -1

    def _write(self, chunks: Sequence[Buffer], end: int, seqno: Seqno, time_us: int) -> None:
        """Write at the offset and count it, or leave the segment, or fail for good."""
        file = self._file
        assert file is not None
        try:
            if len(chunks) == 1:
                file.pwrite(chunks[0], self._offset)
            else:
                file.pwrite_all(chunks, self._offset)
            self.last_time_us = time_us
            self._offset = end
            self.last_seqno = seqno
        except OSError as error:
            self._failure = error
            self._limit = -1
            raise self._write_failed(error) from error
        except BaseException:
            self._left = True
            self._limit = -1
            raise

    def _write_failed(self, error: OSError) -> Exception:
        if isinstance(error, RefusedError):
            # What was written of it stays behind, and is superseded by the next segment.
            self._left = True
            self._failure = None
            return disk_full() if is_full(error) else RefusedError(error.errno, error.strerror, error.filename)
        return poisoned(error)

    def sync(self) -> None:
        """Flush. Durable on return: every commit that was appended before the call."""
        self._refuse_if_over()
        last = self.last_seqno
        if last != self.durable_seqno:
            assert self._file is not None
            try:
                self._file.datasync()
            except OSError as error:
                self._failure = error
                self._limit = -1
                raise poisoned(error) from error
            self.durable_seqno = last

    def mark_idle(self) -> None:
        """Say in the log how much of it is durable, unless the last record says so. Not flushed."""
        self._refuse_if_over()
        if self._left or self.durable_seqno <= self._marked or self._offset + RECORD_HEADER_BYTES > self._room_end:
            return
        self._mark(WATERMARK)

    def _mark(self, kind: int) -> None:
        watermark, offset = self.durable_seqno, self._offset
        data = encode_record(self._marker, self._salt + offset, kind, self.last_seqno, watermark, self.last_time_us)
        self._write([data], offset + len(data), self.last_seqno, self.last_time_us)
        self._marked = watermark

    @property
    def tail_bytes(self) -> int:
        """Bytes of records appended since this writer began."""
        return self._tail_bytes + self._offset

    def segments(self) -> list[SegmentInfo]:
        """Every segment there is, oldest first."""
        return list(self._segments)

    def _refuse_if_over(self) -> None:
        if self._failure is not None:
            raise poisoned(self._failure) from self._failure
        if self._closed:
            raise ClosedError("the log is closed")

    # -- segments -----------------------------------------------------------------------------

    def _roll(self, needed: int, least_bytes: int) -> None:
        """Leave the current segment for a new one with room for `needed` bytes."""
        self.sync()
        created_us = max(self._now_us(), self.last_time_us)
        try:
            self._make_current(Seqno(self.last_seqno + 1), created_us, least_bytes, needed)
        except RefusedError:
            raise  # The next append tries again.
        except OSError as error:
            self._failure = error
            self._limit = -1
            raise poisoned(error) from error

    def _make_current(
        self,
        first: Seqno,
        created_us: int,
        least_bytes: int,
        needed: int,
        fill: Callable[[File, SegmentHeader, Index], int] | None = None,
    ) -> None:
        """Steps 2 to 4: make a segment and go on in it. DiskFullError or OSError if that fails."""
        kept = self._segments
        if kept and kept[-1].first_seqno == first:
            # It has no commit, or all it has are carried: it is replaced by one of the same name.
            kept, previous = kept[:-1], kept[-1].previous
        else:
            previous = kept[-1].first_seqno if kept else Seqno(0)
        index = Index()
        start = HEADER_PAGE_BYTES

        def copy(file: File, header: SegmentHeader) -> int:
            nonlocal start
            assert fill is not None
            start = fill(file, header, index)
            return start

        file, header = self._maker.make(
            first, previous, created_us, least_bytes, needed, copy if fill else None, self._leave
        )
        try:
            if previous:
                self._maker.write_slot(previous, first)
        except BaseException:
            file.close()
            raise
        if self._header is not None and self._header.first_seqno < first:
            self._maker.write_index(self._header, self._index)
        if self._file is not None:
            self._file.close()
        # An interruption among these leaves `_left` set, and the next append makes this segment again.
        if kept:
            kept = (*kept[:-1], replace(kept[-1], sealed=True))
        self._segments = (*kept, SegmentInfo(first, header.capacity, created_us, sealed=False, previous=previous))
        # No record may be older than its segment, even if the clock steps back now.
        self.last_time_us = max(self.last_time_us, created_us)
        self._tail_bytes += self._offset - start
        self._offset = start
        self._file = file
        self._pwrite = file.pwrite
        self._header = header
        self._marker, self._salt = header.marker, header.salt
        self._room_end = header.capacity - CLOSED_ROOM_BYTES
        self._index = index
        self._limit = min(self._room_end, index.next_offset)
        self._left = False

    def _leave(self) -> None:
        # From the moment the next segment has its name, what is written here is superseded. So nothing may be,
        # however the roll goes on.
        self._left = True
        self._limit = -1

    def prepare_next(self) -> None:
        """Make the next segment's file ahead of time, once the current one is half full. From any thread."""
        if self._limit >= 0 and 2 * (self._offset - HEADER_PAGE_BYTES) > self._room_end - HEADER_PAGE_BYTES:
            self._maker.prepare_spare()

    def retire(self, below: Seqno, *, keep_bytes: int = 0, keep_after_us: int = 0) -> list[Seqno]:
        """Remove the segments that hold only commits before `below`, oldest first, but never the newest.

        Args:
            keep_bytes: keep the youngest of them, as many as fit into so many bytes. 0: none.
            keep_after_us: keep those with a commit made at that time or later. 0: none.

        Returns the first seqnos of what was removed. The directory is flushed after each, so that what is left
        after a crash is never more than the oldest ones short.
        """
        self._refuse_if_over()
        segments = self._segments
        n = 0
        while n + 1 < len(segments) and segments[n + 1].first_seqno <= below:
            n += 1
        # No commit of a segment is younger than the next segment.
        kept = 0
        while n and (
            (keep_bytes and kept + segments[n - 1].size <= keep_bytes)
            or (keep_after_us and segments[n].created_us >= keep_after_us)
        ):
            n -= 1
            kept += segments[n].size
        removed: list[Seqno] = []
        for segment in segments[:n]:
            if not self._remove(segment):
                break
            removed.append(segment.first_seqno)
            self._segments = tuple(other for other in self._segments if other is not segment)
        return removed

    def _remove(self, segment: SegmentInfo) -> bool:
        """Remove a segment; False if the system refuses it (a copy-on-write file system may need space for that)."""
        try:
            for name in (segment.name, index_name(segment.first_seqno)):
                try:
                    self._directory.unlink(name)
                except FileNotFoundError:
                    pass
            self._directory.sync()
        except OSError as error:
            if isinstance(error, RefusedError):
                return False
            # What the directory holds on disk is unknown now, as after any failed write.
            self._failure = error
            self._limit = -1
            raise poisoned(error) from error
        return True

    # -- how a writer ends --------------------------------------------------------------------

    def close(self) -> None:
        """Flush, say that the log was closed, give back the room that was not used. Idempotent.

        After a failure it only drops the handles. Raises PoisonedError or DiskFullError if closing failed;
        what was durable stays so, and the next open runs a recovery.
        """
        if self._closed:
            return
        try:
            if self._failure is None and self._file is not None:
                self.sync()
                if not self._left:
                    self._seal(self._file)
        finally:
            self._closed = True
            self._maker.end(remove=True)
            self.abandon()

    def _seal(self, file: File) -> None:
        assert self._header is not None
        self._mark(CLOSED)
        try:
            # Durability: only behind a closed record that is on disk may the file be shorter than it was made.
            file.datasync()
            file.truncate(self._offset)
            file.sync()
        except OSError as error:
            self._failure = error
            raise poisoned(error) from error
        self._maker.write_index(self._header, self._index)

    def abandon(self) -> None:
        """Drop the handles and write nothing: in a forked child, or after a failure. Takes no lock."""
        self._closed = True
        self._limit = -1
        self._maker.end(remove=False)
        file, self._file = self._file, None
        if file is not None:
            file.close()
