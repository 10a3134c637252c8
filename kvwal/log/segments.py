"""Makes and removes segment files: the steps between no file and a segment with a name, each flushed before the next.

A segment that has its name is whole. Before that it is `NAME.tmp` or the prepared `spare.tmp`, and the next open for
writing removes what a crash left of those.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final, NamedTuple

from kvwal.errors import DiskFullError, RefusedError
from kvwal.files import Directory, File, Files, is_full
from kvwal.files.names import SPARE, index_name, index_names, is_temporary, numbers, segment_name, temporary_name
from kvwal.keys import Seqno
from kvwal.log.index import Index
from kvwal.log.protocol import LogIdentity, LogOptions
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.log.segment import (
    HEADER_PAGE_BYTES,
    SLOT_OFFSET,
    IndexSizes,
    SegmentHeader,
    decode_header,
    decode_slot,
    encode_header,
    encode_slot,
    new_marker,
)

__all__ = [
    "CLOSE_BYTES",
    "END_BYTES",
    "Plan",
    "SegmentMaker",
    "disk_full",
]

#: At the end of every segment there is space for the record of a clean close.
CLOSE_BYTES: Final = RECORD_HEADER_BYTES
#: And before it there is space for a record that says that all of the segment is on disk.
END_BYTES: Final = CLOSE_BYTES + RECORD_HEADER_BYTES
# Smaller segments are made as quickly as a spare is taken.
_LEAST_SPARE_BYTES: Final = 1 << 20

_ZEROS: Final = bytes(1 << 20)


def disk_full() -> DiskFullError:
    """The error for the user."""
    return DiskFullError("the disk is full; nothing was written. Free some space, or delete keys, and try again")


class Plan(NamedTuple):
    """A segment to be made.

    Attributes:
        first_seqno: its first commit. previous: that of the segment before; 0: there is none.
        created_us, wall_us: its times.
        planned_bytes: its size, if it needs no more and the disk has that much.
        needed_bytes: what it must hold of records beyond those that it begins with.
        required, optional: features that a reader must know, or may pass over.
    """

    first_seqno: Seqno
    previous: Seqno
    created_us: int
    wall_us: int
    planned_bytes: int
    needed_bytes: int
    required: int
    optional: int


class SegmentMaker:
    """Makes the files of one log. `prepare_spare` may be called from any thread, the rest from one at a time."""

    def __init__(
        self, files: Files, directory: Directory, identity: LogIdentity, options: LogOptions, index_sizes: IndexSizes
    ) -> None:
        self._files = files
        self._directory = directory
        self._identity = identity
        self._options = options
        # Held by the thread that makes or takes the spare, never waited for. Guards `_spare` and the file of that name.
        self._spare_lock = threading.Lock()
        self._spare: tuple[File, int] | None = None
        self._over = False
        # What the indexes take.
        self._index_sizes = index_sizes

    # -- a segment ----------------------------------------------------------------------------

    def make(
        self, plan: Plan, fill: Callable[[File, SegmentHeader], int] | None, before_naming: Callable[[], None]
    ) -> tuple[File, SegmentHeader]:
        """A segment, on disk and under its name, open for writing. Where the disk is nearly full, a smaller one.

        Args:
            fill: writes the records it begins with, and returns where they end. May be called again.
            before_naming: called when all is ready but for the name, which may replace a segment.

        Raises, with nothing changed, DiskFullError if there is no space even for what is needed, RefusedError if the
        system refuses a call, as it does without descriptors; OSError for everything else.
        """
        small = min(plan.planned_bytes, self._options.first_segment_bytes)
        for size in dict.fromkeys((plan.planned_bytes, small)):
            try:
                return self._make(plan, size, fill, before_naming)
            except DiskFullError:
                pass
        return self._make(plan, 0, fill, before_naming)

    def _make(
        self,
        plan: Plan,
        size: int,
        fill: Callable[[File, SegmentHeader], int] | None,
        before_naming: Callable[[], None],
    ) -> tuple[File, SegmentHeader]:
        least = HEADER_PAGE_BYTES + plan.needed_bytes + END_BYTES
        header = self._header(plan, max(size, least))
        taken = fill is None and self._spare_lock.acquire(blocking=False)
        try:
            spare = self._spare if taken else None
            if spare is not None and spare[1] >= least:
                self._spare = None
                temporary, (file, capacity) = SPARE, spare
                header = header._replace(capacity=capacity)
            else:
                spare, temporary = None, temporary_name(segment_name(plan.first_seqno))
                file = self._create_or_refuse(temporary)
            try:
                if fill is not None:
                    end = fill(file, header) + plan.needed_bytes + END_BYTES
                    header = header._replace(capacity=max(size, end))
                if spare is None:
                    self._allocate(file, header.capacity)
                file.pwrite(encode_header(header), 0)
                # The spare's size and allocation are on disk already.
                file.sync() if spare is None else file.datasync()
                before_naming()
                self._directory.rename(temporary, segment_name(plan.first_seqno))
            except BaseException as error:
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

    def _header(self, plan: Plan, capacity: int) -> SegmentHeader:
        random = self._files.random_bytes(8)
        return SegmentHeader(
            self._identity.store_id,
            plan.first_seqno,
            plan.created_us,
            int.from_bytes(random[:4], "little"),
            new_marker(random[4:]),
            capacity,
            plan.previous,
            plan.required,
            plan.optional,
            self._identity.line,
            self._identity.session,
            plan.wall_us,
        )

    def _create_or_refuse(self, name: str) -> File:
        try:
            return self._create(name)
        except OSError as error:
            if is_full(error):
                raise disk_full() from error
            text = f"the next segment of the log cannot be made, and nothing was written: {error.strerror}"
            raise RefusedError(error.errno, text, name) from error

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
            header = decode_header(page, first_seqno, self._identity.store_id)
            # Never overwrite a slot that names a different segment: it is the evidence that one is missing.
            if isinstance(header, SegmentHeader) and decode_slot(page, header.salt).next in (None, next_seqno):
                self.write_slot_to(file, header, next_seqno)
        finally:
            file.close()

    def write_slot_to(self, file: File, header: SegmentHeader, next_seqno: Seqno) -> None:
        """As `write_slot`, in a segment that is open."""
        try:
            file.pwrite(encode_slot(header.salt, next_seqno), SLOT_OFFSET)
        except OSError as error:
            if is_full(error):
                raise disk_full() from error
            raise
        file.datasync()

    def write_index(self, header: SegmentHeader, index: Index) -> None:
        """Write a segment's sparse index."""
        name = index_name(header.first_seqno)
        for _ in self.write_derived(header.first_seqno, name, [index.encode(header)]):
            pass

    def write_derived(self, first_seqno: Seqno, name: str, pieces: Iterable[bytes]) -> Iterator[None]:
        """Write a file that is derived from a segment, in steps. From any thread.

        It is checked when it is read. So it is not flushed, failing is no harm, and neither is what two threads make of
        it that write it at once.
        """
        temporary = temporary_name(name)
        try:
            file = self._create(temporary)
            try:
                offset = 0
                for piece in pieces:
                    file.pwrite(piece, offset)
                    offset += len(piece)
                    yield
            finally:
                file.close()
            self._directory.rename(temporary, name)
            if self._directory.kind(segment_name(first_seqno)) is None:
                # The segment was retired meanwhile, and its other files with it.
                self._discard(name)
            else:
                self._index_sizes.written(name, offset)
        except OSError:
            self._discard(temporary)
        except BaseException:
            # In a forked child it is the parent's.
            if not self._directory.inherited:
                self._discard(temporary)
            raise

    # -- what goes ----------------------------------------------------------------------------

    def remove(self, first_seqno: Seqno) -> bool:
        """Remove a segment for good, and its indexes; False if the system refuses it (it may need space for that)."""
        try:
            for name in (segment_name(first_seqno), *index_names(first_seqno)):
                try:
                    self._directory.unlink(name)
                except FileNotFoundError:
                    pass
                self._index_sizes.removed(name)
            self._directory.sync()
        except OSError as error:
            if isinstance(error, RefusedError) or is_full(error):
                return False
            raise
        return True

    def shorten(self, first_seqno: Seqno, end: int) -> bool:
        """Give back what a segment that has a successor does not use. Whether it did."""
        try:
            file = self._directory.open(segment_name(first_seqno), write=True)
        except OSError:
            return False  # It only gives back space.
        try:
            file.truncate(end)
        except OSError:
            return False
        finally:
            file.close()
        return True

    def remove_leftovers(self, segments: Collection[int]) -> None:
        """Remove what a crash left half made, and indexes without a segment. Names that are not ours stay."""
        for name in self._directory.names():
            found = numbers(name)
            orphan = found is not None and found[1] != "log" and found[0] not in segments
            if is_temporary(name) or orphan:
                self._discard(name)

    def _create(self, name: str) -> File:
        if self._directory.kind(name) is not None:
            self._directory.unlink(name)
        return self._directory.open(name, create=True, mode=self._options.mode)

    def _discard(self, name: str) -> None:
        # Best effort: the next open for writing removes it, if this fails.
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

    def prepare_spare(self, size: int) -> None:
        """Make the file of the next segment ahead of time, if there is none and it is a large one.

        A failure is left to the roll that needs it.
        """
        if size < _LEAST_SPARE_BYTES or not self._spare_lock.acquire(blocking=False):
            return
        try:
            if self._spare is not None or self._is_over():
                return
            file = None
            try:
                file = self._create(SPARE)
                self._allocate(file, size)
                file.sync()
            except OSError:
                if file is not None:
                    file.close()
                self._discard(SPARE)
                return
            self._spare = (file, size)
            if self._is_over():
                self.end(remove=True)
        finally:
            self._spare_lock.release()

    @property
    def has_spare(self) -> bool:
        """Whether a spare takes space."""
        return self._spare is not None

    def drop_spare(self) -> None:
        """Give back the space of the spare, if there is one and no thread is at it."""
        if not self._spare_lock.acquire(blocking=False):
            return
        try:
            self._let_spare_go(remove=True)
        finally:
            self._spare_lock.release()

    def _is_over(self) -> bool:
        return self._over

    def end(self, *, remove: bool) -> None:
        """Let the spare go for good. Takes no lock: it is called in forked children too."""
        self._over = True
        self._let_spare_go(remove=remove)

    def _let_spare_go(self, *, remove: bool) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare[0].close()
            if remove:
                self._discard(SPARE)
