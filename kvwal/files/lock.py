"""The lock of a store, and who holds it.

What is locked is the directory itself: unlike a file in it, it cannot be removed alone, and made anew by a second
writer. Windows has no such lock; there it is the file `lock`, checked for being the one of that name still. The system
lets go of both when their process ends, however it ends.

The file `lock` is a hint: one line `PID START BOOT NAMESPACE` that a writer leaves while it holds the lock, and the
word `recovering` at its end as long as it recovers the store. A process id alone says little: it may be another process
by now, or one of another container. So the pid is only named if the process of that number, of the same boot and pid
namespace, started at that time.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Final, Protocol
from weakref import ref

from kvwal.files.fork import Birthmark, birthmark, when_noticed

__all__ = [
    "HINT_BYTES",
    "add_holder",
    "hint_of_this_process",
    "holder_in_hint",
    "is_held_here",
    "recovers_in_hint",
    "remove_holder",
    "try_lock",
    "unlock",
]

#: Size of the hint, filled up with spaces. It is less than 100 characters.
HINT_BYTES: Final = 128

_RECOVERING: Final = "recovering"

_UNKNOWN: Final = "-"
# Field 22 of /proc/PID/stat, counted from the end of the command's name, which may have spaces.
_START_FIELD: Final = 19


class _Handle(Protocol):
    def close(self) -> None: ...


#: What this process holds: by the id of the handle, the birthmark of the process that took it, what it is, and by what.
_held: dict[int, tuple[Birthmark, tuple[int, int], ref[_Handle]]] = {}


# What a process says of itself, with its mark: a child may have the pid of one that it comes from.
_told: tuple[Birthmark, str] | None = None


def add_holder(handle: _Handle, mark: Birthmark, identity: tuple[int, int]) -> None:
    """This process locked the directory of that identity."""
    _held[id(handle)] = (mark, identity, ref(handle))


def remove_holder(handle: object) -> None:
    """The handle is closed."""
    _held.pop(id(handle), None)


def is_held_here(identity: tuple[int, int]) -> bool:
    """Whether this process holds the directory of that identity, and not only a process that it was forked from."""
    return any(mark[0] and held == identity for mark, held, _ in list(_held.values()))


def _drop_inherited() -> None:
    # The lock belongs to the descriptor, and would outlive a parent that is killed.
    for mark, _, handle in list(_held.values()):
        inherited = None if mark[0] else handle()
        if inherited is not None:
            inherited.close()


when_noticed(_drop_inherited)


def hint_of_this_process(*, recovers: bool) -> str:
    """What a writer leaves in the file `lock`."""
    return _this_process() + (f" {_RECOVERING}" if recovers else "")


def _this_process() -> str:
    # It takes 0.13 ms to find out, twice in an open, and holds for the process's life.
    global _told
    if _told is not None and _told[0][0]:
        return _told[1]
    mark, told = birthmark(), f"{os.getpid()} {_start_of('self')} {_boot()} {_namespace()}"
    if _UNKNOWN not in told.split():
        _told = mark, told
    return told


def recovers_in_hint(text: str) -> bool:
    """Whether a hint says that its writer recovers the store."""
    return text.split()[4:] == [_RECOVERING]


def holder_in_hint(text: str) -> int | None:
    """The process id that a hint names, if that very process still lives, and is not this one."""
    fields = text.split()
    if fields[4:] == [_RECOVERING]:
        del fields[4:]
    if len(fields) != 4 or not (fields[0].isascii() and fields[0].isdecimal()):
        return None
    pid, start, boot, namespace = fields
    if _UNKNOWN in fields or (boot, namespace) != (_boot(), _namespace()) or _start_of(pid) != start:
        return None
    # Where this process holds the store, `is_held_here` said so; else the hint is left over.
    return int(pid) if int(pid) != os.getpid() else None


def _start_of(pid: str) -> str:
    stat = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return stat[_START_FIELD] if len(stat) > _START_FIELD else _UNKNOWN


def _boot() -> str:
    return _read("/proc/sys/kernel/random/boot_id").strip() or _UNKNOWN


def _namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return _UNKNOWN


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


if sys.platform == "win32":
    import msvcrt

    # Far beyond the hint, so that a locked byte does not stop others from reading it.
    _LOCK_BYTE = 1 << 30

    def try_lock(fd: int, *, shared: bool) -> bool:
        """Lock an open file, or False if another holds it. Two readers exclude each other here."""
        os.lseek(fd, _LOCK_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def unlock(fd: int) -> None:
        """Let go of it; closing does that."""

else:
    import fcntl

    def try_lock(fd: int, *, shared: bool) -> bool:
        """Lock an open file or directory, or False if another holds it."""
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True

    def unlock(fd: int) -> None:
        """Let go of it, although a forked child that did not notice its fork may have the descriptor still."""
        fcntl.flock(fd, fcntl.LOCK_UN)
