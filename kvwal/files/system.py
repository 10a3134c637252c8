"""The operating system's own files, and all that differs between operating systems.

What differs, and where it is dealt with:

| matter | Linux | macOS | Windows |
|---|---|---|---|
| flush that reaches the medium | fdatasync | fcntl F_FULLFSYNC (fsync alone stops at the drive's cache) | fsync (FlushFileBuffers) |
| positioned reads and writes | pread, pwrite | pread, pwrite | seek and read under a lock |
| preallocation | posix_fallocate | zeros are written | zeros are written |
| directory flush | fsync of the directory | the same | not possible; NTFS journals its metadata |
| lock | flock | flock | msvcrt.locking of one byte |
| symbolic link as the last part | O_NOFOLLOW | O_NOFOLLOW | checked before opening |

Linux is what the tests run on; macOS and Windows follow the platforms' documentation and have
not been run (docs/durability.md says so too).
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

from kvwal.errors import LockedError
from kvwal.files.protocol import Buffer, EntryKind, File, Files, LockHandle

__all__ = ["PathArgument", "call_in_forked_child", "path_text", "system_files"]

#: What a user may give for a path.
PathArgument: TypeAlias = "str | bytes | os.PathLike[str] | os.PathLike[bytes]"

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
# One write call: the kernel takes at most 0x7ffff000 bytes at a time on Linux.
_MAX_CALL_BYTES = 0x7FFFF000
_ZEROS = bytes(1 << 20)


if sys.platform == "win32":
    import msvcrt

    def _datasync(fd: int) -> None:
        os.fsync(fd)

    def _sync(fd: int) -> None:
        os.fsync(fd)

    # Far beyond any pid text, so that a locked byte does not stop others from reading the pid.
    _LOCK_BYTE = 1 << 30

    def _try_lock(fd: int, shared: bool) -> bool:
        del shared  # Windows has no shared byte lock here: a second reader waits its turn.
        os.lseek(fd, _LOCK_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    if sys.platform == "darwin":

        def _datasync(fd: int) -> None:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

        def _sync(fd: int) -> None:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

    else:
        _datasync = os.fdatasync
        _sync = os.fsync

    def _try_lock(fd: int, shared: bool) -> bool:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True


class _SystemFile:
    """A file descriptor addressed by offset (POSIX)."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size: int, offset: int) -> bytes:
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
        return b"".join(parts)

    def pwrite(self, data: Buffer, offset: int) -> None:
        # Not through _write_some: every commit comes along here, and a call costs 5 % of it.
        written = os.pwrite(self._fd, data, offset)
        if written != len(data):
            self._write_rest(memoryview(data), written, offset)

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
        _datasync(self._fd)

    def sync(self) -> None:
        _sync(self._fd)

    def allocate(self, offset: int, size: int) -> None:
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

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _SeekingFile(_SystemFile):
    """For systems without pread and pwrite: one position, guarded by a lock."""

    __slots__ = ("_lock",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._lock = threading.Lock()

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._write_rest(memoryview(data), 0, offset)

    def _read_some(self, size: int, offset: int) -> bytes:
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, size)

    def _write_some(self, data: Buffer, offset: int) -> int:
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, data)


_FileType = _SystemFile if hasattr(os, "pread") else _SeekingFile


class _SystemLock:
    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        # Closing the last descriptor of the open file drops the lock.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        # flock belongs to the open file, which the parent still has: closing here keeps its lock.
        self.release()


class _SystemFiles:
    """`Files` of the operating system. Stateless, hence safe from every thread."""

    def join(self, directory: str, name: str) -> str:
        return os.path.join(directory, name)

    def parent(self, path: str) -> str:
        return os.path.dirname(os.path.abspath(path))

    def kind(self, path: str) -> EntryKind | None:
        return self._kind(path, follow=False)

    def directory_kind(self, path: str) -> EntryKind | None:
        return self._kind(path, follow=True)

    def _kind(self, path: str, *, follow: bool) -> EntryKind | None:
        try:
            mode = os.stat(path, follow_symlinks=follow).st_mode
        except FileNotFoundError:
            return None
        if stat.S_ISREG(mode):
            return "file"
        return "directory" if stat.S_ISDIR(mode) else "other"

    def open(self, path: str, *, write: bool = False, create: bool = False, mode: int = 0o600) -> File:
        flags = _NOFOLLOW | _CLOEXEC | _BINARY | (os.O_RDWR if write or create else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        if not _NOFOLLOW and self.kind(path) == "other":
            raise OSError(errno.ELOOP, "is a symbolic link", path)
        return _FileType(os.open(path, flags, mode))

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        os.mkdir(path, mode)

    def list_directory(self, path: str) -> list[str]:
        return os.listdir(path)

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        if sys.platform == "win32":
            return  # A directory cannot be flushed there; NTFS journals the entry itself.
        fd = os.open(path, os.O_RDONLY | _CLOEXEC)
        try:
            _sync(fd)
        finally:
            os.close(fd)

    def lock(self, path: str, *, shared: bool, mode: int = 0o600) -> LockHandle:
        fd = self._open_lock(path, shared, mode)
        if fd is None:
            return _SystemLock(-1)
        try:
            if not _try_lock(fd, shared):
                pid = _read_pid(fd)
                raise LockedError(path, pid, own=pid == os.getpid())
            if not shared:
                os.ftruncate(fd, 0)
                os.lseek(fd, 0, os.SEEK_SET)
                os.write(fd, b"%d\n" % os.getpid())
        except BaseException:
            os.close(fd)
            raise
        return _SystemLock(fd)

    def _open_lock(self, path: str, shared: bool, mode: int) -> int | None:
        flags = _NOFOLLOW | _CLOEXEC | _BINARY
        if not shared:
            return os.open(path, flags | os.O_RDWR | os.O_CREAT, mode)
        try:
            return os.open(path, flags | os.O_RDONLY)
        except FileNotFoundError:
            # A reader writes nothing. Whoever writes makes the file, so there is no writer now.
            return None

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        return time.monotonic()

    def random_bytes(self, size: int) -> bytes:
        return secrets.token_bytes(size)

    def give_way(self, pause_s: float) -> None:
        time.sleep(pause_s)


def _read_pid(fd: int) -> int | None:
    os.lseek(fd, 0, os.SEEK_SET)
    text = os.read(fd, 32).strip()
    return int(text) if text.isdigit() else None


def system_files() -> Files:
    """The operating system's files. Thread-safe; the same object may serve many stores."""
    return _SystemFiles()


def call_in_forked_child(callback: Callable[[], None]) -> None:
    """Have `callback` run in every child that `os.fork` makes, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)


def path_text(path: PathArgument) -> str:
    """The path as text. TypeError for what is no path, ValueError for an empty one or one with a null."""
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ValueError("the path is empty" if not text else "the path has a null character")
    return text
