"""Appends to the current segment of a log: numbers commits, writes and flushes them.

- A failed write or flush is final: every later call raises `PoisonedError`. A flush is never tried again.
- A full disk is not a failure. Met while records are being written, it costs the segment: what was begun there is
  unmade, and the next append rolls.
- The same holds for an exception that comes from outside (KeyboardInterrupt): an append it interrupts has not been
  counted in `last_seqno`. What it has written is unmade before the next segment is made, or the log is closed.

- The newest commits stay in memory while the log is followed (`recent`), as a read of the log would give them, so that
  each is not read again by each follower. What is not there is in the log, so there is no seam between the two.

Invariant: `last_seqno` counts exactly the commits below `_offset` and in older segments.
Invariant: a commit is kept in memory after it was counted, so its number is that of no other commit.
Invariant: no byte at or beyond `_offset` of the current segment was ever written, unless `_left`. Where no segment
follows, no whole record of a write that was refused is there, unless the disk refuses to be written over as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice
from threading import get_ident
from typing import Final

from crc32c import crc32c

from kvwal.errors import CorruptionError, InternalError, PoisonedError, RefusedError, closed, poisoned
from kvwal.events import Events, Flush
from kvwal.features import KEYSPACES
from kvwal.files import Buffer, File, Files, is_full
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log.chain import Chain
from kvwal.log.clock import StoreClock
from kvwal.log.index import INDEX_STRIDE_BYTES, Index
from kvwal.log.intents import MAX_BODY_BYTES, TABLES, Body, encode_put, put_bits, writes_body
from kvwal.log.reader import place_before, read_parts
from kvwal.log.record import (
    COMMIT,
    RECORD_HEAD,
    RECORD_HEADER_BYTES,
    RECORD_PUT,
    RECORD_REST,
    RECORD_TABLE_PUT,
    WATERMARK,
    Record,
    encode_record,
)
from kvwal.log.segment import SegmentHeader
from kvwal.log.segments import END_BYTES, disk_full
from kvwal.log.waiting import Waiting
from kvwal.log.walk import Place

__all__ = ["SegmentWriter"]

# Commits in memory for followers: at least this number of them, and at most twice that, of small bodies.
_RECENT: Final = 512
_RECENT_BODY_BYTES: Final = 4 << 10
# Chunks below this are joined before they are written: a copy costs less than a system call.
_OWN_WRITE_BYTES: Final = 32 << 10

_pack_head = RECORD_HEAD.pack
_pack_rest = RECORD_REST.pack
_pack_put = RECORD_PUT.pack
_pack_table_put = RECORD_TABLE_PUT.pack


def _no_file(data: Buffer, offset: int) -> None:
    raise InternalError(f"a write of {len(data)} bytes at {offset}, and no segment is open")


class SegmentWriter(ABC):
    """The appending half of `SegmentLog`."""

    def __init__(self, files: Files, session: int, events: Events) -> None:
        #: By which commits are stamped.
        self.clock = StoreClock(files.now_us, files.monotonic_s)
        self._now_us = self.clock.now_us
        self._monotonic_s = files.monotonic_s
        self._events = events
        #: Number of the writable open that writes here.
        self.session = session
        #: The last commit written, the last one known to be on disk, and the time of the last one.
        self.last_seqno = Seqno(0)
        self.durable_seqno = Seqno(0)
        self.last_time_us = 0
        #: The features that a reader of the records must know: what the next segment's header says.
        self.required = 0
        # What `_offset` added to it makes `tail_bytes`.
        self._tail_bytes = 0
        # The current segment. After a recovery there may be none until the first append.
        self._file: File | None = None
        self._pwrite: Callable[[Buffer, int], None] = _no_file
        self._header: SegmentHeader | None = None
        self._marker = 0
        self._salt = 0
        self._offset = 0
        # Commits must end here, so that an idle mark and the record of a clean close have their space.
        self._usable_end = 0
        self._index = Index()
        # Where `append_put` must look further: the segment is full, an index entry is due, or nothing goes any more.
        self._limit = -1
        # Nothing may be written to the current segment any more: the next append rolls.
        self._left = True
        # There may be something behind `_offset` that a refused or interrupted write has left.
        self._has_remains = False
        # Called by the next append.
        self._on_append: Callable[[], None] | None = None
        # For a flush.
        self._waiting = Waiting(self._is_beyond)
        # The newest commits by seqno, without large ones; None: no one follows. Replaced as a whole, or added to.
        self._recent: dict[int, Record] | None = None
        # Whether a follower has asked since this was looked at last.
        self._is_followed = False
        # The watermark that the last watermark record carries.
        self._marked = Seqno(0)
        self._closed = False
        self._failure: BaseException | None = None
        #: By their numbers, the threads that were told of the failure.
        self.heard_by: set[int] = set()

    @abstractmethod
    def _roll(self, needed: int, planned: int | None = None) -> None:
        """Leave the current segment for a new one with space for `needed` bytes."""

    @abstractmethod
    def _segment_of(self, seqno: Seqno) -> tuple[Chain, Seqno]:
        """The segments, and the first seqno of the one that has a commit. From any thread."""

    def time_of(self, seqno: Seqno) -> int:
        """When a commit was made, in us. Requires: its segment is kept. From any thread.

        It reads the commit, and what lies between it and the last entry of an index. CorruptionError or FormatError if
        that does not verify, OSError if it cannot be read.
        """
        chain, first = self._segment_of(seqno)
        header = chain.header(first)
        place = place_before(chain, header, seqno - 1)
        # The index of the current segment is not on disk yet; and this may be the one before it by now.
        entry = self._index.at_or_before(seqno)
        if entry is not None and entry.seqno >= first and entry.offset > place.offset:
            place = Place(entry.offset, entry.seqno - 1, first - 1, entry.time_us)
            if entry.seqno == seqno:
                return entry.time_us
        parts = read_parts(chain, chain.load(first), place, until=None, runs=False, chunk_bytes=INDEX_STRIDE_BYTES)
        for record in parts:
            if isinstance(record, Record) and record.seqno == seqno:
                return record.time_us
        raise CorruptionError(segment_name(first), place.offset, f"commit {seqno} is not there")

    def _begin_at(self, file: File, header: SegmentHeader, index: Index, offset: int) -> None:
        """Append to this segment from here on."""
        pwrite, marker, salt, usable_end = file.pwrite, header.marker, header.salt, header.capacity - END_BYTES
        limit, tail_bytes = min(usable_end, index.next_offset), self._tail_bytes + self._offset - offset
        # Nothing from here on can fail, or be interrupted: half of it would take the one file for the other segment.
        self._tail_bytes = tail_bytes
        self._offset = offset
        self._file = file
        self._pwrite = pwrite
        self._header = header
        self._marker = marker
        self._salt = salt
        self._usable_end = usable_end
        self._index = index
        self._limit = limit
        self._has_remains = False
        self._left = False

    def _leave(self) -> None:
        # From the moment the next segment has its name, what is written here is superseded. So nothing may be,
        # however the roll goes on.
        self._left = True
        self._limit = -1

    @property
    def tail_bytes(self) -> int:
        """Bytes of records appended since the log was opened."""
        return self._tail_bytes + self._offset

    # -- appending ----------------------------------------------------------------------------

    def append_put(self, key: bytes, value: bytes, table: int = 0, whole: bytes | None = None) -> Seqno:
        """Append one commit that puts one value: what `append([encode_put(key, value, table)])` does, and faster.

        `whole`: what `encode_writes` made of the commit, if it writes more than that.
        """
        offset = self._offset
        if whole is not None:
            size = len(whole)
        elif table:
            size = 15 + len(key) + len(value)
        else:
            size = 11 + len(key) + len(value)
        end = offset + 40 + size
        if end > self._limit:
            return self.append((encode_put(key, value, table) if whole is None else writes_body(whole),))
        now_us = self._now_us()
        if now_us < self.last_time_us:
            now_us = self.last_time_us
        seqno = self.last_seqno + 1
        # Header and intent packed by one call; 1, 1 and 1 are COMMIT, one intent, and a put.
        if whole is not None:
            kind = COMMIT | TABLES
            self.required |= KEYSPACES
            rest = _pack_rest(size, kind, seqno, self.durable_seqno, now_us) + whole
        elif table:
            kind = COMMIT | put_bits(table)
            self.required |= KEYSPACES
            rest = _pack_table_put(size, kind, seqno, self.durable_seqno, now_us, 1, 1, len(key), len(value), table)
            rest += key + value
        else:
            kind = COMMIT
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
            self._interrupted(offset, seqno)
            raise
        if self._recent is not None and size <= _RECENT_BODY_BYTES:
            self._remember([self._record(kind, seqno, offset, now_us, rest[32:])])
        return seqno  # type: ignore[return-value]  # to make a Seqno is a call

    def append(self, bodies: Sequence[bytes | list[Buffer]]) -> Seqno:
        """Append a commit for every body, all or none; returns the seqno of the last. Not durable on return.

        Raises, with nothing appended:
            DiskFullError: try again when there is space.
            RefusedError: the system lets no file be made for the next segment; try again when it does.
            PoisonedError: a write failed, now or earlier.
            ValueError: a body is too large for a record.
        """
        self._refuse_if_over()
        if self._on_append is not None:
            # In this order: interrupted in between, it is called twice.
            self._on_append()
            self._on_append = None
        sizes = [len(body) if isinstance(body, bytes) else sum(map(len, body)) for body in bodies]
        if sizes and max(sizes) > MAX_BODY_BYTES:
            raise ValueError(f"a commit takes {max(sizes)} bytes in the log; the limit is {MAX_BODY_BYTES}")
        total = sum(sizes) + RECORD_HEADER_BYTES * len(sizes)
        if self._left or self._offset + total > self._usable_end:
            self._roll(total)
        now_us = max(self._now_us(), self.last_time_us)
        offset = self._offset
        seqno = self.last_seqno
        chunks: list[Buffer] = []
        pending: list[Buffer] = []
        due = self._index.next_offset
        entries: list[tuple[int, int, int]] = []
        recent: list[Record] = []
        for body, size in zip(bodies, sizes, strict=True):
            seqno = Seqno(seqno + 1)
            if offset >= due:
                entries.append((seqno, now_us, offset))
                due = offset + INDEX_STRIDE_BYTES
            kind = COMMIT
            if type(body) is Body:
                kind |= body.bits
                self.required |= body.features
            parts = [body] if isinstance(body, bytes) else body
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
            if self._recent is not None and size <= _RECENT_BODY_BYTES:
                recent.append(self._record(kind, seqno, offset, now_us, b"".join(parts)))
            offset += RECORD_HEADER_BYTES + size
        if pending:
            chunks.append(b"".join(pending))
        self._write(chunks, offset, seqno, now_us)
        if recent:
            self._remember(recent)
        for entry in entries:
            self._index.add(*entry)
        self._limit = min(self._usable_end, self._index.next_offset)
        return seqno

    def _record(self, kind: int, seqno: int, offset: int, time_us: int, body: bytes) -> Record:
        """A commit as it is read from the log, once it is written at this offset of the current segment."""
        assert self._header is not None
        segment = self._header.first_seqno
        return Record(kind, seqno, self.durable_seqno, time_us, segment, offset, body)  # type: ignore[arg-type]  # as above

    def _remember(self, records: list[Record]) -> None:
        recent = self._recent
        if recent is not None:
            for record in records:
                recent[record.seqno] = record
            if len(recent) > 2 * _RECENT:
                followed, self._is_followed = self._is_followed, False
                self._recent = dict(islice(recent.items(), len(recent) - _RECENT, None)) if followed else None

    def recent(self, seqno: int) -> Record | None:
        """The commit, if it is in memory. From then on commits are kept there, for a while. From any thread."""
        recent = self._recent
        self._is_followed = True
        if recent is None:
            self._recent = {}
            return None
        return recent.get(seqno)

    def notify_on_append(self, listener: Callable[[], None]) -> None:
        """Call `listener` when the next append begins, once. It costs the appends after that one nothing."""
        self._on_append = listener
        self._limit = -1

    def _write(self, chunks: Sequence[Buffer], end: int, seqno: Seqno, time_us: int) -> None:
        """Write at the offset and count it, or leave the segment, or fail for good."""
        file, offset = self._file, self._offset
        assert file is not None
        try:
            if len(chunks) == 1:
                file.pwrite(chunks[0], offset)
            else:
                file.pwrite_all(chunks, offset)
            self.last_time_us = time_us
            self._offset = end
            self.last_seqno = seqno
        except OSError as error:
            self._failure = error
            self._limit = -1
            raise self._write_failed(error) from error
        except BaseException:
            self._interrupted(offset, seqno)
            raise

    def _interrupted(self, offset: int, seqno: int) -> None:
        """A write at this offset, of commits up to this one, was interrupted: before it was counted, or after that."""
        self._has_remains = self._left = True
        self._limit = -1
        if self.last_seqno != seqno:
            self._offset = offset

    def _write_failed(self, error: OSError) -> Exception:
        if isinstance(error, RefusedError) or is_full(error):
            # The next segment supersedes this one.
            self._has_remains = self._left = True
            self._failure = None
            try:
                self._unmake()
            except PoisonedError as failure:
                return failure
            return disk_full() if is_full(error) else RefusedError(error.errno, error.strerror, error.filename)
        return self._poisoned(error)

    def _unmake(self) -> None:
        """Durability: whole records of a write that was refused are no commits, also where no segment follows.

        In place of the first one there is a mark, which says that all before it is on disk, to those who follow, too;
        behind it none of the others is where it belongs. PoisonedError if a flush or the write fails.
        """
        self.sync()
        file, offset, last = self._file, self._offset, self.last_seqno
        assert file is not None, "it was written to"
        mark = encode_record(self._marker, self._salt + offset, WATERMARK, last, last, self.last_time_us)
        try:
            is_written = any(file.pread(RECORD_HEADER_BYTES, offset))
            try:
                file.pwrite(mark, offset)
            except OSError as error:
                # A copy-on-write file system may need space even to write over what is there; a limit on the size of
                # files holds there, too. It is tried again before the next segment, and at the close.
                if is_full(error) or isinstance(error, RefusedError):
                    return
                raise
            if is_written:
                file.datasync()
        except OSError as error:
            self._failure = error
            self._limit = -1
            raise self._poisoned(error) from error
        except BaseException:
            # As where a flush is interrupted.
            self._failure = file.flush_failure
            raise
        self._marked = last
        self._has_remains = False

    def sync(self) -> None:
        """Flush. Durable on return: every commit that was appended before the call."""
        self._refuse_if_over()
        last = self.last_seqno
        if last != self.durable_seqno:
            assert self._file is not None
            began_s = self._monotonic_s() if self._events.listeners else None
            try:
                self._file.datasync()
            except OSError as error:
                self._failure = error
                self._limit = -1
                raise self._poisoned(error) from error
            except BaseException:
                # Durability: what took the place of a failure does not undo it. No call comes before this.
                self._failure = self._file.flush_failure
                self._limit = -1
                raise
            self.durable_seqno = last
            if (waiting := self._waiting).those or waiting.due or waiting.tell is not None:
                waiting.wake()
            if began_s is not None:
                self._events.tell(Flush(last, self._monotonic_s() - began_s))

    def mark_idle(self) -> None:
        """Say in the log how much of it is durable, unless the last record says so. Not flushed."""
        self._refuse_if_over()
        self._waiting.pass_on()
        # Invariant: behind the last commit there is space for one mark.
        if self._left or self.durable_seqno <= self._marked or self._offset > self._usable_end:
            return
        self._mark(WATERMARK)

    def _mark(self, kind: int) -> None:
        watermark, offset = self.durable_seqno, self._offset
        data = encode_record(self._marker, self._salt + offset, kind, self.last_seqno, watermark, self.last_time_us)
        self._write([data], offset + len(data), self.last_seqno, self.last_time_us)
        self._marked = watermark

    def _poisoned(self, error: BaseException) -> PoisonedError:
        self.heard_by.add(get_ident())
        # Nothing becomes durable any more, so no cursor may wait for it.
        self._waiting.wake()
        self._events.tell_poison(error)
        return poisoned(error)

    def _refuse_if_over(self) -> None:
        if self._failure is not None:
            raise self._poisoned(self._failure) from self._failure
        if self._closed:
            raise closed()

    # -- waiting ------------------------------------------------------------------------------

    def _durable(self) -> Seqno:
        if self._closed:
            raise closed()
        return self.durable_seqno

    def _is_beyond(self, seqno: Seqno) -> bool:
        """Whether commits beyond `seqno` are durable. PoisonedError if they are not, and none ever will be."""
        if self._durable() > seqno:
            return True
        if self._failure is not None:
            raise poisoned(self._failure)
        return False

    @property
    def durable_end(self) -> tuple[Seqno, Seqno, int]:
        """The last durable commit, and first seqno and salt of the newest segment, or 0 if none is open.

        The commit is in it, or in one before it. From any thread.
        """
        # In this order: what is durable by now is in no segment that comes later.
        durable, header = self.durable_seqno, self._header
        return (durable, Seqno(0), 0) if header is None else (durable, header.first_seqno, header.salt)

    def tell_flushes(self, tell: Callable[[], None] | None) -> None:
        """Have `tell` called after each flush from now on; None: nothing. The leader calls it: it never raises."""
        self._waiting.tell = tell
