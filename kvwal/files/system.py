"""The operating system's own files, and all that differs between operating systems.

What differs, and where it is dealt with:

| matter | Linux | macOS | Windows |
|---|---|---|---|
| flush that reaches the medium | fdatasync | fcntl F_FULLFSYNC (fsync alone stops at the drive's cache) | fsync (FlushFileBuffers) |
| positioned reads and writes | pread, pwrite | pread, pwrite | seek and read under a lock |
| preallocation | posix_fallocate | zeros are written | zeros are written |
| directory flush | fsync of the directory | the same | not possible; NTFS journals its metadata |
| lock | flock | flock | msvcrt.locking of one byte |
| files of an open directory | by its descriptor | by its descriptor | absolute path, and its identity checked |
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
from kvwal.files.protocol import Buffer, Directory, EntryKind, File, Files

__all__ = ["PathArgument", "call_in_forked_child", "path_text", "system_files"]

#: What a user may give for a path.
PathArgument: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
# Whether every call that takes a name takes the descriptor of the directory that holds it.
_BY_DESCRIPTOR = os.supports_dir_fd >= {os.open, os.stat, os.unlink, os.rename} and os.listdir in os.supports_fd
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


class _SystemDirectory:
    """An open directory; by its descriptor, or where the system has no such calls (Windows) by path and identity."""

    __slots__ = ("_fd", "_held", "_identity", "_lock_fd", "_place", "path")

    def __init__(self, path: str, *, by_descriptor: bool) -> None:
        self.path = path
        # Resolved now: the working directory may be another one by the next call.
        self._place = "" if by_descriptor else os.path.abspath(path)
        self._lock_fd = -1
        self._fd: int | None = None
        self._held = False
        if by_descriptor:
            self._fd = os.open(path, os.O_RDONLY | _DIRECTORY | _CLOEXEC)
        else:
            self._identity = _identity_of(self._place)
        self._held = True

    def __del__(self) -> None:
        self.close()

    def _at(self, name: str) -> str:
        """What to hand to a system call beside `dir_fd`."""
        if not self._held:
            raise OSError(errno.EBADF, "the directory is closed", self.path)
        return name if self._fd is not None else os.path.join(self._place, name)

    def _change(self, name: str) -> str:
        """The same for a call that creates, renames or removes: those only where the directory is still ours."""
        if self._fd is None and self._held:
            try:
                same = _identity_of(self._place) == self._identity
            except OSError:
                same = False
            if not same:
                raise FileNotFoundError(errno.ENOENT, "the directory was moved, removed or replaced", self.path)
        return self._at(name)

    def kind(self, name: str) -> EntryKind | None:
        try:
            mode = os.stat(self._at(name), dir_fd=self._fd, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return None
        if stat.S_ISREG(mode):
            return "file"
        return "directory" if stat.S_ISDIR(mode) else "other"

    def names(self) -> list[str]:
        self._at("")
        return os.listdir(self._place if self._fd is None else self._fd)

    def open(self, name: str, *, write: bool = False, create: bool = False, mode: int = 0o600) -> File:
        flags = _NOFOLLOW | _CLOEXEC | _BINARY | (os.O_RDWR if write or create else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        if not _NOFOLLOW and self.kind(name) == "other":
            raise OSError(errno.ELOOP, "is a symbolic link", name)
        place = self._change(name) if create else self._at(name)
        return _FileType(os.open(place, flags, mode, dir_fd=self._fd))

    def rename(self, source: str, target: str) -> None:
        os.replace(self._change(source), self._at(target), src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        os.unlink(self._change(name), dir_fd=self._fd)

    def sync(self) -> None:
        self._sync_at(".")

    def sync_parent(self) -> None:
        self._sync_at("..")

    def _sync_at(self, name: str) -> None:
        if sys.platform == "win32":
            return  # A directory cannot be flushed there; NTFS journals the entry itself.
        fd = os.open(self._at(name), os.O_RDONLY | _DIRECTORY | _CLOEXEC, dir_fd=self._fd)
        try:
            _sync(fd)
        finally:
            os.close(fd)

    def lock(self, *, shared: bool, mode: int = 0o600) -> None:
        fd = self._open_lock(shared, mode)
        if fd is None:
            return
        try:
            if not _try_lock(fd, shared):
                pid = _read_pid(fd)
                raise LockedError(self.path, pid, own=pid == os.getpid())
            if not shared:
                os.ftruncate(fd, 0)
                os.lseek(fd, 0, os.SEEK_SET)
                os.write(fd, b"%d\n" % os.getpid())
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd

    def _open_lock(self, shared: bool, mode: int) -> int | None:
        flags = _NOFOLLOW | _CLOEXEC | _BINARY
        if not shared:
            return os.open(self._change("lock"), flags | os.O_RDWR | os.O_CREAT, mode, dir_fd=self._fd)
        try:
            return os.open(self._at("lock"), flags | os.O_RDONLY, dir_fd=self._fd)
        except FileNotFoundError:
            # A reader writes nothing. A writer makes the file, so there is no writer now.
            return None

    def close(self) -> None:
        self._held = False
        # flock belongs to the open file, which after a fork the parent has too: closing here keeps its lock.
        for fd in (self._lock_fd, self._fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._lock_fd, self._fd = -1, None


def _identity_of(path: str) -> tuple[int, int]:
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is not a directory", path)
    return found.st_dev, found.st_ino


class _SystemFiles:
    """`Files` of the operating system. Stateless, hence safe from every thread."""

    def open_directory(self, path: str) -> Directory:
        return _SystemDirectory(path, by_descriptor=_BY_DESCRIPTOR)

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        os.mkdir(path, mode)

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
