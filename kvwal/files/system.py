"""The operating system's own files.

What differs between systems, in `file`, `directory`, `lock` and `fork`:

| matter | Linux | macOS | Windows |
|---|---|---|---|
| flush that reaches the medium | fdatasync | fcntl F_FULLFSYNC (fsync alone stops at the drive's cache) | fsync (FlushFileBuffers) |
| positioned reads and writes | pread, pwrite | pread, pwrite | seek and read under a lock |
| preallocation | posix_fallocate | zeros are written | zeros are written |
| directory flush | fsync of the directory | the same | not possible; NTFS journals its metadata |
| lock | flock of the directory | the same | msvcrt.locking of one byte of the file `lock`, and its identity checked |
| a fork without the interpreter's hooks | seen by a page that is wiped | by the process id | there is none |
| files of an open directory | by its descriptor | by its descriptor | absolute path, and its identity checked |
| symbolic link as the last part | O_NOFOLLOW | O_NOFOLLOW | checked before opening |

Linux is what the tests run on; macOS and Windows follow the platforms' documentation and have
not been run (docs/durability.md says so too).
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, TypeAlias

from kvwal.files.directory import SystemDirectory
from kvwal.files.failures import failed
from kvwal.files.protocol import Directory, Files

__all__ = ["PathArgument", "outwards", "parent_and_name", "path_text", "rooted", "system_files"]

#: What a user may give for a path.
PathArgument: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
# Those that go on while the machine sleeps: CLOCK_BOOTTIME is Linux's, and CLOCK_MONOTONIC does so on macOS. What
# `time.monotonic` reads does so on Windows.
_AWAKE_OR_NOT: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", getattr(time, "CLOCK_MONOTONIC", None))
_monotonic_s: Final[Callable[[], float]] = (
    time.monotonic if _AWAKE_OR_NOT is None else partial(time.clock_gettime, _AWAKE_OR_NOT)
)


class _SystemFiles:
    """`Files` of the operating system. Stateless, hence safe from every thread."""

    def open_directory(self, path: str) -> Directory:
        return SystemDirectory(path)

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        try:
            os.mkdir(path, mode)
        except OSError as error:
            raise failed(error, path) from None

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        return _monotonic_s()

    def random_bytes(self, size: int) -> bytes:
        return secrets.token_bytes(size)

    def give_way(self, pause_s: float) -> None:
        time.sleep(pause_s)


def system_files() -> Files:
    """The operating system's files. Thread-safe; the same object may serve many stores."""
    return _SystemFiles()


def path_text(path: PathArgument) -> str:
    """The path as text. TypeError for what is no path, ValueError for an empty one or one with a null."""
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ValueError("the path is empty" if not text else "the path has a null character")
    return text


def rooted(path: str, files: Files) -> str:
    """The same path, also when the working directory is another one: of the operating system's files, and of no others.

    Nothing of it is resolved: links lead where they lead when it is used.
    """
    if not isinstance(files, _SystemFiles) or os.path.isabs(path):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError:
        # The working directory was removed. No name but its own leads anywhere.
        return path


def parent_and_name(path: str) -> tuple[str, str]:
    """The path of the directory that holds what `path` names, and its name there; of a root, itself and no name."""
    head, name = os.path.split(path)
    if not name:
        head, name = os.path.split(head)
    return head or os.curdir, name


def outwards(path: str) -> Iterator[str]:
    """The real path, and those of the directories that it lies in, from the inmost one on."""
    place, above = "", os.path.realpath(path)
    while place != above:
        place, above = above, os.path.dirname(above)
        yield place
