"""Makes segment files: the steps between no file and a segment with a name, each flushed before the next.

A segment that has its name is whole. Before that it is `NAME.tmp` or the prepared `spare.tmp`, and whoever
opens the log for writing removes what a crash left of those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from typing import Final

from kvwal.errors import DiskFullError, InternalError, RefusedError
from kvwal.files import Directory, File, Files, is_full
from kvwal.files.names import SPARE, index_name, is_temporary, numbers, segment_name, temporary_name
from kvwal.keys import Seqno
from kvwal.log.index import Index
from kvwal.log.record import RECORD_HEADER_BYTES, WATERMARK, Record, encode_record
from kvwal.log.segment import (
    HEADER_PAGE_BYTES,
    SLOT_OFFSET,
    SegmentHeader,
    decode_header,
    decode_slot,
    encode_header,
    encode_slot,
    new_marker,
)
from kvwal.log.tail import LogEnd
from kvwal.options import LogOptions

__all__ = ["CLOSED_ROOM_BYTES", "SegmentMaker", "copy_tail", "disk_full"]

#: At the end of every segment there is room for the record of a clean close.
CLOSED_ROOM_BYTES: Final = RECORD_HEADER_BYTES

_CARRY_BYTES: Final = 1 << 20
_ZEROS: Final = bytes(1 << 20)


def disk_full() -> DiskFullError:
    """The error for the user."""
    return DiskFullError("the disk is full; nothing was written. Free some space, or delete keys, and try again")


class SegmentMaker:
    """Makes the files of one log. `prepare_spare` may be called from any thread, the rest from one at a time."""

    def __init__(
        self,
        files: Files,
        directory: Directory,
        store_id: bytes,
        options: LogOptions,
    ) -> None:
        self._files = files
        self._directory = directory
        self._store_id = store_id
        self._options = options
        # Held by whoever makes or takes the spare, never waited for. Guards `_spare` and the file of that name.
        self._spare_lock = threading.Lock()
        self._spare: File | None = None
        self._over = False
        #: What a reader of the log must know: the `required` of the next segment.
        self.features = 0

    # -- a segment ----------------------------------------------------------------------------

    def make(
        self,
        first_seqno: Seqno,
        previous: Seqno,
        created_us: int,
        least_bytes: int,
        needed: int,
        fill: Callable[[File, SegmentHeader], int] | None,
        before_naming: Callable[[], None],
    ) -> tuple[File, SegmentHeader]:
        """A segment, on disk and under its name, open for writing.

        Args:
            least_bytes: its size, if what it needs is not more.
            needed: bytes of records it must have room for, beyond those of `fill`.
            fill: writes the records it begins with, and returns where they end.
            before_naming: called when all is ready but for the name, which may replace a segment.

        Raises DiskFullError or RefusedError, with nothing changed, if there is no space, or no descriptor and the like;
        OSError for everything else.
        """
        random = self._files.random_bytes(8)
        salt, marker = int.from_bytes(random[:4], "little"), new_marker(random[4:])
        capacity = max(least_bytes, HEADER_PAGE_BYTES + needed + CLOSED_ROOM_BYTES)
        required, wall_us = self.features, self._files.now_us()
        header = SegmentHeader(
            self._store_id, first_seqno, created_us, salt, marker, capacity, previous, required, wall_us=wall_us
        )
        taken = fill is None and self._spare_lock.acquire(blocking=False)
        try:
            spare = self._spare if taken and capacity <= self._options.segment_bytes else None
            if spare is not None:
                self._spare = None
                header = header._replace(capacity=self._options.segment_bytes)
                temporary = SPARE
            else:
                temporary = temporary_name(segment_name(first_seqno))
            file = spare
            try:
                if file is None:
                    file = self._create(temporary)
                    if fill is not None:
                        end = fill(file, header) + needed + CLOSED_ROOM_BYTES
                        header = header._replace(capacity=max(least_bytes, end))
                    self._allocate(file, header.capacity)
                file.pwrite(encode_header(header), 0)
                # The spare's size and allocation are on disk already.
                file.sync() if spare is None else file.datasync()
                before_naming()
                self._directory.rename(temporary, segment_name(first_seqno))
            except BaseException as error:
                if file is not None:
                    file.close()
                if isinstance(error, OSError) and (is_full(error) or isinstance(error, RefusedError)):
                    self._discard(temporary)
                    if is_full(error):
                        raise disk_full() from error
                raise
        finally:
            if taken:
                self._spare_lock.release()
        try:
            self._directory.sync()
        except BaseException:
            file.close()
            raise
        return file, header

    def write_slot(self, first_seqno: Seqno, next_seqno: Seqno) -> None:
        """Name the successor in a segment's slot, and flush it. A slot may be written again, with the same bytes.

        The segment may be gone or damaged if it is one that recovery does not need; then nothing is written.
        DiskFullError or RefusedError if it could not be written, OSError for everything else.
        """
        try:
            file = self._directory.open(segment_name(first_seqno), write=True)
        except FileNotFoundError:
            return
        try:
            page = file.pread(HEADER_PAGE_BYTES, 0)
            header = decode_header(page, first_seqno, self._store_id)
            # A slot that names another segment tells of one that is missing, and must go on telling.
            if not isinstance(header, SegmentHeader) or decode_slot(page, header.salt).next not in (None, next_seqno):
                return
            try:
                file.pwrite(encode_slot(header.salt, next_seqno), SLOT_OFFSET)
            except OSError as error:
                if is_full(error):
                    raise disk_full() from error
                raise
            file.datasync()
        finally:
            file.close()

    def write_index(self, header: SegmentHeader, index: Index) -> None:
        """Write a segment's index. It is derived and checked when it is read: not flushed, and failing is no harm."""
        name = index_name(header.first_seqno)
        temporary = temporary_name(name)
        try:
            file = self._create(temporary)
            try:
                file.pwrite(index.encode(header), 0)
            finally:
                file.close()
            self._directory.rename(temporary, name)
        except OSError:
            self._discard(temporary)

    def remove_leftovers(self, segments: Collection[int]) -> None:
        """Remove what a crash left half made, and indexes without a segment."""
        for name in self._directory.names():
            found = numbers(name)
            orphan = found is not None and found[1] == "idx" and found[0] not in segments
            if is_temporary(name) or orphan:
                self._discard(name)

    def _create(self, name: str) -> File:
        if self._directory.kind(name) is not None:
            self._directory.unlink(name)
        return self._directory.open(name, create=True, mode=self._options.mode)

    def _discard(self, name: str) -> None:
        # Best effort: whoever opens the log next removes it, if this fails.
        try:
            self._directory.unlink(name)
        except OSError:
            pass

    def _allocate(self, file: File, capacity: int) -> None:
        if self._options.preallocate == "allocate":
            file.allocate(0, capacity)
            return
        offset = file.size()
        while offset < capacity:
            step = min(len(_ZEROS), capacity - offset)
            file.pwrite(_ZEROS if step == len(_ZEROS) else _ZEROS[:step], offset)
            offset += step

    # -- the spare ----------------------------------------------------------------------------

    def prepare_spare(self) -> None:
        """Make the file of the next segment ahead of time, if there is none. A failure is left to who needs it."""
        if not self._spare_lock.acquire(blocking=False):
            return
        try:
            if self._spare is not None or self._is_over():
                return
            file = None
            try:
                file = self._create(SPARE)
                self._allocate(file, self._options.segment_bytes)
                file.sync()
            except OSError:
                if file is not None:
                    file.close()
                self._discard(SPARE)
                return
            self._spare = file
            if self._is_over():
                self.end(remove=True)
        finally:
            self._spare_lock.release()

    def _is_over(self) -> bool:
        return self._over

    def end(self, *, remove: bool) -> None:
        """Let the spare go. Takes no lock: it is called in forked children too."""
        self._over = True
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()
            if remove:
                self._discard(SPARE)


def copy_tail(file: File, header: SegmentHeader, index: Index, end: LogEnd, records: Iterable[Record]) -> int:
    """Write the records of a tail anew into a segment that is being made; returns where they end.

    The segment gets its name when all of it is on disk. So whoever reads the watermark record at its end may
    believe it.
    """
    start = offset = HEADER_PAGE_BYTES
    last, time_us = end.watermark, end.last_time_us
    frames: list[bytes] = []
    for record in records:
        last, time_us = record.seqno, record.time_us
        if offset >= index.next_offset:
            index.add(last, time_us, offset)
        seed = header.salt + offset
        frames.append(encode_record(header.marker, seed, record.kind, last, end.watermark, time_us, record.body))
        offset += len(frames[-1])
        if offset - start >= _CARRY_BYTES:
            file.pwrite(b"".join(frames), start)
            frames.clear()
            start = offset
    if last != end.last_seqno:
        raise InternalError(f"recovery read the log up to commit {end.last_seqno}, and then up to {last}")
    if last > end.watermark:
        # A write of its own: if the disk loses the one before, this one tells.
        file.pwrite(b"".join(frames), start)
        file.pwrite(encode_record(header.marker, header.salt + offset, WATERMARK, last, last, time_us), offset)
        offset += RECORD_HEADER_BYTES
    return offset
