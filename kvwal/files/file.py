"""An open file of the operating system, and the flushes that differ between systems."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from weakref import ref

from kvwal.errors import StoreRemovedError
from kvwal.files.failures import failed
from kvwal.files.fork import birthmark, call_in_forked_child, refuse_in_child
from kvwal.files.protocol import Buffer
from kvwal.files.record_lock import record_holder, try_record_lock

__all__ = ["BulkFile", "SystemFile", "grant", "sync"]

# One write call: the kernel takes at most 0x7ffff000 bytes at a time on Linux.
_MAX_CALL_BYTES = 0x7FFFF000
_ZEROS = bytes(1 << 20)
# Of a bulk file, brought on disk together.
_BULK_BYTES = 4 << 20
# How often it is looked whether a file that is flushed again and again still has a name: a look costs 15 us.
_LOOK_EVERY_S = 0.005

if sys.platform == "darwin":
    import fcntl

    def sync(fd: int) -> None:
        """Flush an open file or directory to the medium."""
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

    _datasync = sync
else:
    sync = os.fsync
    _datasync = getattr(os, "fdatasync", os.fsync)


def grant(fd: int, mode: int) -> None:
    """Give an open file or directory these permissions, if the umask took one of them."""
    if sys.platform != "win32" and mode & ~os.fstat(fd).st_mode:
        os.fchmod(fd, mode)


class _PositionedFile:
    """A file descriptor addressed by offset (POSIX)."""

    __slots__ = ("__weakref__", "_fd", "_look_at_s", "_mark", "_named_ns", "_path", "flush_failure")

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        _open[id(self)] = ref(self)
        self._path = path
        self._mark = birthmark()
        self._look_at_s = 0.0
        # When something of the inode was changed last, as the first `has_name` found it.
        self._named_ns: int | None = None
        self.flush_failure: OSError | None = None

    def _refuse_in_child(self) -> None:
        if not self._mark[0]:
            refuse_in_child()

    def pread(self, size: int, offset: int) -> bytes:
        self._refuse_in_child()
        try:
            data = self._read_some(min(size, _MAX_CALL_BYTES), offset)
            if len(data) == size or not data:
                return data
            # A short read is the end of the file only when the next one is empty.
            parts = [data]
            done = len(data)
            while done < size:
                data = self._read_some(min(size - done, _MAX_CALL_BYTES), offset + done)
                if not data:
                    break
                parts.append(data)
                done += len(data)
        except OSError as error:
            raise failed(error, self._path) from None
        return b"".join(parts)

    def pwrite(self, data: Buffer, offset: int) -> None:
        # Every commit comes along here: a call of `_refuse_in_child` or `_write_some` would cost 2 to 5 % of it.
        if not self._mark[0]:
            refuse_in_child()
        try:
            written = os.pwrite(self._fd, data, offset)
            if written != len(data):
                self._write_rest(memoryview(data), written, offset)
        except OSError as error:
            raise failed(error, self._path, "write") from None

    def pwrite_all(self, chunks: Sequence[Buffer], offset: int) -> None:
        for chunk in chunks:
            self.pwrite(chunk, offset)
            offset += len(chunk)

    def _write_rest(self, view: memoryview, written: int, offset: int) -> None:
        while written < len(view):
            count = self._write_some(view[written : written + _MAX_CALL_BYTES], offset + written)
            if count == 0:
                raise OSError(errno.EIO, "the system wrote nothing and reported no error")
            written += count

    def _read_some(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def _write_some(self, data: Buffer, offset: int) -> int:
        return os.pwrite(self._fd, data, offset)

    def datasync(self) -> None:
        self._refuse_in_child()
        try:
            _datasync(self._fd)
            now_s = time.monotonic()
            if now_s >= self._look_at_s:
                self._refuse_without_name()
                self._look_at_s = now_s + _LOOK_EVERY_S
        except OSError as error:
            # No call comes before this, and so no interruption.
            self.flush_failure = error
            raise failed(error, self._path, "flush") from None

    def sync(self) -> None:
        self._refuse_in_child()
        try:
            sync(self._fd)
            self._refuse_without_name()
        except OSError as error:
            self.flush_failure = error
            raise failed(error, self._path, "flush") from None

    def _refuse_without_name(self) -> None:
        # Durability: what is flushed into a file that was removed is lost with it, however the flush went.
        if self._may_be_removed() and os.fstat(self._fd).st_nlink == 0:
            raise StoreRemovedError(errno.ENOENT, "the file was removed while the store was open", self._path)

    def _may_be_removed(self) -> bool:
        # After a stat, Linux 6.13 and later makes the next flush write one block more: the time of the write, since the
        # one before was asked for. The name of the descriptor says the same without that.
        try:
            return os.readlink(f"/proc/self/fd/{self._fd}").endswith(" (deleted)")
        except OSError:
            return True

    def allocate(self, offset: int, size: int) -> None:
        self._refuse_in_child()
        try:
            if sys.platform == "linux":
                try:
                    os.posix_fallocate(self._fd, offset, size)
                    return
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            # Only beyond the end: what is there already must stay.
            position = max(offset, self.size())
            end = offset + size
            while position < end:
                step = min(len(_ZEROS), end - position)
                self.pwrite(_ZEROS[:step], position)
                position += step
        except OSError as error:
            raise failed(error, self._path) from None

    def truncate(self, size: int) -> None:
        self._refuse_in_child()
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise failed(error, self._path, "write") from None

    def size(self) -> int:
        self._refuse_in_child()
        try:
            return os.fstat(self._fd).st_size
        except OSError as error:
            raise failed(error, self._path) from None

    def identity(self) -> object:
        self._refuse_in_child()
        found = os.fstat(self._fd)
        return found.st_dev, found.st_ino

    def has_name(self) -> bool:
        self._refuse_in_child()
        found = os.fstat(self._fd)
        if self._named_ns is None:
            self._named_ns = found.st_ctime_ns
        # A name that was added or removed changes the time. One may be added and the other removed between two looks.
        return found.st_nlink == 1 and found.st_ctime_ns == self._named_ns

    def lock_record(self) -> bool:
        self._refuse_in_child()
        try:
            return try_record_lock(self._fd)
        except OSError as error:
            raise failed(error, self._path) from None

    def holder(self) -> int | None:
        self._refuse_in_child()
        try:
            return record_holder(self._fd)
        except OSError as error:
            raise failed(error, self._path) from None

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _open.pop(id(self), None)
            try:
                os.close(fd)
            except InterruptedError:
                pass  # It is closed all the same.


# The files of this process that are open, by id.
_open: dict[int, ref[_PositionedFile]] = {}


def _close_inherited() -> None:
    # Also what an iterator or a thread of the parent had open: it would hold the space of what the parent removes.
    for reference in list(_open.values()):
        file = reference()
        if file is not None:
            file.close()


call_in_forked_child(_close_inherited)


class _SeekingFile(_PositionedFile):
    """For systems without pread and pwrite: one position, guarded by a lock."""

    __slots__ = ("_lock",)

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self._lock = threading.Lock()

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._refuse_in_child()
        try:
            self._write_rest(memoryview(data), 0, offset)
        except OSError as error:
            raise failed(error, self._path, "write") from None

    def _read_some(self, size: int, offset: int) -> bytes:
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, size)

    def _write_some(self, data: Buffer, offset: int) -> int:
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, data)


SystemFile = _PositionedFile if hasattr(os, "pread") else _SeekingFile


class BulkFile(SystemFile):  # type: ignore[misc,valid-type]  # it is one of the two
    """One that is written once, from its beginning to its end.

    A flush of hundreds of megabytes at once would hold up those of a log on the same disk for as long as it takes. So
    each few megabytes begin to be written while the next ones are made.
    """

    __slots__ = ("_begun",)

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        self._begun = 0

    def pwrite(self, data: Buffer, offset: int) -> None:
        super().pwrite(data, offset)
        size = offset + len(data) - self._begun
        if size >= _BULK_BYTES and sys.platform == "linux":
            with suppress(OSError):
                # Advice that the pages are not needed: those that are dirty begin to be written, and are kept.
                os.posix_fadvise(self._fd, self._begun, size, os.POSIX_FADV_DONTNEED)
            self._begun += size
