"""An open directory of the operating system, and the lock on it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from kvwal.errors import LockedError, StoreRemovedError
from kvwal.files.failures import failed, is_full
from kvwal.files.file import BulkFile, SystemFile, grant, sync
from kvwal.files.fork import birthmark, refuse_in_child
from kvwal.files.lock import (
    HINT_BYTES,
    add_holder,
    hint_of_this_process,
    holder_in_hint,
    is_held_here,
    recovers_in_hint,
    remove_holder,
    try_lock,
    unlock,
)
from kvwal.files.names import LOCK
from kvwal.files.protocol import EntryKind, File
from kvwal.finalizing import quiet_at_exit

__all__ = ["BY_DESCRIPTOR", "SystemDirectory"]

_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
# A FIFO or a device of a store's name would keep an open waiting.
_FLAGS = _NOFOLLOW | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)

#: Whether every call that takes a name takes the descriptor of the directory that holds it.
BY_DESCRIPTOR = os.supports_dir_fd >= {os.open, os.stat, os.unlink, os.rename, os.link} and os.listdir in os.supports_fd


class SystemDirectory:
    """A directory by its descriptor, or where the system has no such calls (Windows), by path and identity."""

    __slots__ = ("_fd", "_identity", "_inner", "_lock_fd", "_mark", "_open", "_place", "_writer", "__weakref__", "path")

    def __init__(
        self,
        path: str,
        *,
        by_descriptor: bool = BY_DESCRIPTOR,
        inside: int | None = None,
        again: SystemDirectory | None = None,
    ) -> None:
        """`inside`: the descriptor of the directory in which the last part of the path is a directory. `again`: an open
        one that this one is to be, and not what is at the path.
        """
        self.path = path
        self._mark = birthmark()
        self._fd: int | None = None
        self._lock_fd: int | None = None
        self._writer = False
        self._open = False
        self._inner: bool = inside is not None if again is None else again._inner
        # Resolved now: by the next call the working directory may be another one, and a link lead elsewhere.
        self._place: str = again._place if again is not None else "" if by_descriptor else os.path.realpath(path)
        with self._failing():
            if again is not None:
                again._at("")
                self._fd = None if again._fd is None else os.open(".", _DIRECTORY, dir_fd=again._fd)
            elif inside is not None:
                self._fd = os.open(os.path.basename(path), _DIRECTORY | _NOFOLLOW, dir_fd=inside)
            elif by_descriptor:
                self._fd = os.open(path, _DIRECTORY)
            found = os.stat(self._place if self._fd is None else self._fd)
            if not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "is not a directory", path)
        self._identity = (found.st_dev, found.st_ino)
        self._open = True

    @quiet_at_exit
    def __del__(self) -> None:
        self.close()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SystemDirectory) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def inherited(self) -> bool:
        return not self._mark[0]

    @contextmanager
    def _failing(self, name: str = "", *, during: Literal["", "write", "flush"] = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise failed(error, os.path.join(self.path, name) if name else self.path, during) from None

    def _at(self, name: str) -> str:
        """What to hand to a system call beside `dir_fd`; without descriptors only if the directory is still there."""
        if not self._mark[0]:
            refuse_in_child()
        if not self._open:
            raise OSError(errno.EBADF, "the directory is closed", self.path)
        if self._fd is not None:
            return name
        if not self._is_in_place():
            raise self._removed()
        return os.path.join(self._place, name)

    def _is_in_place(self) -> bool:
        try:
            found = os.stat(self._place)
            lock = None if self._lock_fd is None else os.stat(os.path.join(self._place, LOCK), follow_symlinks=False)
        except OSError:
            return False
        if (found.st_dev, found.st_ino) != self._identity:
            return False
        return lock is None or os.path.samestat(lock, os.fstat(self._lock_fd or 0))

    def _removed(self) -> StoreRemovedError:
        return StoreRemovedError(
            errno.ENOENT,
            "the directory was removed, moved or replaced while the store was open; nothing more is written",
            self.path,
        )

    def kind(self, name: str) -> EntryKind | None:
        with self._failing(name):
            try:
                mode = os.stat(self._at(name), dir_fd=self._fd, follow_symlinks=False).st_mode
            except FileNotFoundError:
                return None
        if stat.S_ISREG(mode):
            return "file"
        return "directory" if stat.S_ISDIR(mode) else "other"

    def names(self) -> list[str]:
        with self._failing():
            place = self._at("")
            if self._fd is None:
                return os.listdir(place)
            # A descriptor of its own: those that list by one share how far it was read, and would miss names.
            fd = os.open(".", _DIRECTORY, dir_fd=self._fd)
            try:
                return os.listdir(fd)
            finally:
                os.close(fd)

    def open(
        self, name: str, *, write: bool = False, create: bool = False, bulk: bool = False, mode: int = 0o600
    ) -> File:
        flags = _FLAGS | (os.O_RDWR if write or create else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        with self._failing(name):
            kind = BulkFile if bulk else SystemFile
            return kind(self._descriptor(name, flags, mode), os.path.join(self.path, name))

    def _descriptor(self, name: str, flags: int, mode: int = 0o600) -> int:
        if not _NOFOLLOW and self.kind(name) == "other":
            raise OSError(errno.ELOOP, "is a symbolic link", name)
        creates = flags & os.O_CREAT
        try:
            fd = os.open(self._at(name), flags, mode, dir_fd=self._fd)
        except FileNotFoundError:
            if creates:
                # A name without a file is what is asked for, so it is the directory that is gone.
                raise self._removed() from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.ELOOP, "is not a regular file", name)
            if creates and self._inner:
                grant(fd, mode)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def again(self) -> SystemDirectory:
        return SystemDirectory(self.path, again=self)

    def inner(self, name: str, *, make: bool) -> SystemDirectory:
        with self._failing(name):
            self._at(name)
            if self._fd is None:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), name)
            if make:
                found = os.stat(self._fd)
                if found.st_uid != os.geteuid():
                    raise PermissionError(errno.EPERM, "the owner of the directory is another user", name)
                try:
                    os.mkdir(name, stat.S_IMODE(found.st_mode), dir_fd=self._fd)
                except FileExistsError:
                    pass
                else:
                    self._open_as(found, name)
            return SystemDirectory(os.path.join(self.path, name), inside=self._fd)

    def _open_as(self, outer: os.stat_result, name: str) -> None:
        """Give the directory that was just made the group and the permissions of the outer one, or remove it."""
        try:
            fd = os.open(name, _DIRECTORY | _NOFOLLOW, dir_fd=self._fd)
            try:
                if os.fstat(fd).st_gid != outer.st_gid:
                    os.fchown(fd, -1, outer.st_gid)
                grant(fd, stat.S_IMODE(outer.st_mode))
            finally:
                os.close(fd)
        except BaseException:
            # Another process may have put a pin there by now.
            with suppress(OSError):
                os.rmdir(name, dir_fd=self._fd)
            raise

    def free_bytes(self) -> int:
        with self._failing():
            place = self._at("")
            return shutil.disk_usage(place if self._fd is None else self._fd).free

    def rename(self, source: str, target: str, *, replace: bool = True) -> None:
        with self._failing(target):
            names = self._at(source), self._at(target)
            if replace:
                os.replace(*names, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            else:
                # Python has no call for it, but a link replaces nothing.
                os.link(*names, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
                os.unlink(names[0], dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        with self._failing(name):
            os.unlink(self._at(name), dir_fd=self._fd)

    def sync(self) -> None:
        with self._failing(during="flush"):
            place = self._at(".")
            if self._fd is not None:
                sync(self._fd)
            else:
                self._sync_place(place)

    def sync_parent(self) -> None:
        with self._failing(during="flush"):
            self._sync_place(self._at(".."))

    def _sync_place(self, place: str) -> None:
        if sys.platform == "win32":
            return  # A directory cannot be flushed there; NTFS journals the entry itself.
        try:
            fd = os.open(place, _DIRECTORY, dir_fd=self._fd)
        except PermissionError:
            # A directory that may be entered, and not be read, cannot be opened to be flushed alone.
            os.sync()
            return
        except OSError as error:
            # Nothing was flushed, and so no flush failed.
            raise failed(error, self.path) from None
        try:
            sync(fd)
        finally:
            os.close(fd)

    # -- the lock -----------------------------------------------------------------------------

    def lock(self, *, shared: bool, mode: int = 0o600, recovers: bool = False) -> None:
        with self._failing(LOCK):
            if not self._try_lock(shared, mode):
                own = is_held_here(self._identity)
                raise LockedError(self.path, os.getpid() if own else holder_in_hint(self._hint()), own=own)
            add_holder(self, self._mark, self._identity)
            self._writer = not shared
            if self._writer:
                self._leave_hint(mode, recovers)

    def recovered(self) -> None:
        with suppress(OSError):
            self._write_hint(hint_of_this_process(recovers=False), 0, 0)

    def is_recovering(self) -> bool:
        return recovers_in_hint(self._hint())

    def _try_lock(self, shared: bool, mode: int) -> bool:
        if self._fd is not None:
            self._at(LOCK)
            return try_lock(self._fd, shared=shared)
        while True:
            try:
                fd = self._descriptor(LOCK, _FLAGS | (os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT), mode)
            except FileNotFoundError:
                # A reader writes nothing. A writer makes the file, so there is no writer now.
                return True
            locked = False
            try:
                locked = try_lock(fd, shared=shared)
                if not locked:
                    return False
                self._lock_fd = fd
                if self._is_in_place():
                    return True
                # It was removed between open and lock: another process may have made and locked a new one.
                locked, self._lock_fd = False, None
            finally:
                if not locked:
                    os.close(fd)

    def _leave_hint(self, mode: int, recovers: bool) -> None:
        try:
            self._write_hint(hint_of_this_process(recovers=recovers), os.O_CREAT, mode)
        except OSError as error:
            # Only a hint: on a full disk the store can still be opened, to delete what fills it.
            if not is_full(error):
                raise

    def _write_hint(self, hint: str, flags: int, mode: int) -> None:
        fd = self._descriptor(LOCK, _FLAGS | os.O_RDWR | flags, mode)
        try:
            # Never cut: some file systems flush a file that was cut and written anew, and that takes milliseconds.
            os.write(fd, hint.encode().ljust(HINT_BYTES - 1) + b"\n")
        finally:
            os.close(fd)

    def _hint(self) -> str:
        try:
            fd = self._descriptor(LOCK, _FLAGS | os.O_RDONLY)
        except OSError:
            return ""
        try:
            return os.read(fd, HINT_BYTES).decode("ascii", "replace")
        except OSError:
            return ""
        finally:
            os.close(fd)

    def close(self) -> None:
        # Interrupted as it is made, it has nothing yet.
        if not getattr(self, "_open", False):
            return
        # In a forked child the lock is the parent's, and stays: only the descriptors are closed.
        if self._mark[0]:
            try:
                if self._writer:
                    # Else the hint would name this process while another one holds the lock.
                    self._write_hint("", 0, 0)
            except OSError:
                pass
            for fd in (self._lock_fd, self._fd):
                if fd is not None:
                    unlock(fd)
        remove_holder(self)
        # Unlocked by now: a signal handler that raises here costs a descriptor, and no lock.
        self._open = self._writer = False
        fds, self._lock_fd, self._fd = (self._lock_fd, self._fd), None, None
        for fd in fds:
            if fd is not None:
                os.close(fd)
