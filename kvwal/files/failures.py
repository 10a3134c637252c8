"""What a failed system call means: the one place that turns its errno into one of kvwal's errors, with advice.

A name that is missing, or that is there already, is an answer and no failure: `FileNotFoundError` and `FileExistsError`
stay what they are, and so do the errors of what is no directory, or no empty one.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Final, Literal

from kvwal.errors import RefusedError, StoreRemovedError, SystemCallError

__all__ = ["failed", "is_full", "is_of_medium", "start_thread"]

_FULL: Final = frozenset((errno.ENOSPC, errno.EDQUOT))

_NO_SPACE: Final = _FULL | {errno.EFBIG}

_ANSWERS: Final = frozenset((errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.ENOTEMPTY))

# The system says these before it does anything, and may answer otherwise the next time.
_REFUSALS: Final = {
    errno.EMFILE: "this process has too many open files: close some, or raise its limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files: close some, or raise its limit (sysctl fs.file-max)",
    errno.ENOMEM: "the system has no memory left for it",
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space, or have it raised",
    errno.EFBIG: "the file would be larger than this process or its file system may write (ulimit -f)",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "this process has no permission for it: see who owns the directory, and its mode",
    errno.EPERM: "this process is not allowed to: see who owns the directory, its mode and its attributes",
    errno.EBUSY: "another program keeps it busy",
    errno.EINTR: "a signal interrupted it",
}

_FAILURES: Final = {
    errno.EIO: "the device failed: see what the system's log says of it",
    errno.EBADF: "the file is closed",
    errno.ENOLCK: "the file system has no locks, which a store needs: keep it on another one",
    errno.EOPNOTSUPP: "the file system cannot do that, and a store needs it: keep it on another one",
    errno.ENAMETOOLONG: "the path, or a part of it, is too long",
    errno.EISDIR: "a directory is where a file should be",
    errno.ELOOP: "a link, or something else that is no file, is where a file should be",
    errno.ENXIO: "a socket, or something else that is no file, is where a file should be",
    errno.ESTALE: "the file is gone from its network file system",
}

_NO_THREAD: Final = (
    "end some threads or processes, or raise the limit (ulimit -u, or that of the container or service on pids)"
)


def is_full(error: OSError) -> bool:
    """Whether the error means that there is no space, on the disk or in a quota, and nothing worse."""
    return error.errno in _FULL


def is_of_medium(error: OSError) -> bool:
    """Whether a read failed for the bytes that were to be read: not if it was refused, nor if the file is gone."""
    if isinstance(error, RefusedError | StoreRemovedError):
        return False
    return error.errno not in _REFUSALS and error.errno not in (errno.EBADF, errno.ESTALE)


def failed(error: OSError, path: str, during: Literal["", "write", "flush"] = "") -> OSError:
    """What to raise for a system call that failed on the file or directory at `path`.

    After a failed flush what is on disk is unknown, whatever the errno says; after a failed write what the file holds,
    unless there was no space for it. Other calls that the system refuses do nothing.
    """
    code = error.errno
    if code is None or code in _ANSWERS or isinstance(error, SystemCallError):
        return error
    said = error.strerror or os.strerror(code)
    advice = _REFUSALS.get(code) or _FAILURES.get(code)
    text = f"{said}: {advice}" if advice else said
    refused = during != "flush" and code in (_NO_SPACE if during == "write" else _REFUSALS)
    return (RefusedError if refused else SystemCallError)(code, text, path)


def start_thread(thread: threading.Thread) -> None:
    """Start the thread. RefusedError if the system has none left."""
    try:
        thread.start()
    except RuntimeError as error:
        # Its text alone tells it from what a bug, and the end of the interpreter, raise.
        if str(error) != "can't start new thread":
            raise
        raise RefusedError(errno.EAGAIN, f"no thread {thread.name!r} can be started: {_NO_THREAD}") from error
