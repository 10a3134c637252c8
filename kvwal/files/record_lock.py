"""The record lock of a file: it ends with its process, is not inherited by a forked child, and tells who has it.

Closing any descriptor of a file gives up the locks that the process has on it, so a process never opens a file again
that it has locked.
"""

from __future__ import annotations

import errno
import os
import sys
from struct import Struct
from typing import Final

__all__ = ["record_holder", "try_record_lock"]

if sys.platform in ("linux", "darwin"):
    import fcntl

    # `struct flock` of the system, in its own order and alignment.
    _LINUX: Final = sys.platform == "linux"
    _FLOCK: Final = Struct("hhqqi" if _LINUX else "qqihh")

    def try_record_lock(fd: int) -> bool:
        """Lock a file that is open for writing, or False if another process has it."""
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def record_holder(fd: int) -> int | None:
        """The process that has the lock, 0 where the system does not tell its id; None if no other process has it."""
        asked = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if _LINUX else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
        found = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(*asked)))
        kind, pid = (found[0], found[4]) if _LINUX else (found[3], found[2])
        return None if kind == fcntl.F_UNLCK else max(0, pid)

else:

    def try_record_lock(fd: int) -> bool:
        """This system has no such locks."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def record_holder(fd: int) -> int | None:
        """This system has no such locks, so no process has one."""
        return None
