"""Which process this is: noticed after every fork, also one that the interpreter does not know of.

A server that is written in C forks without the interpreter's hooks. Comparing process ids finds that, but asking for
the id is a system call, and every commit would pay it. Linux can wipe a page of memory in a forked child; looking at
it costs a tenth.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from typing import Final, NoReturn, Protocol

from kvwal.errors import ForkedError

__all__ = [
    "Birthmark",
    "birthmark",
    "call_in_forked_child",
    "process_id",
    "program_name",
    "refuse_in_child",
    "when_noticed",
]

# Of <asm-generic/mman-common.h>; Python has no name for it before 3.13.
_MADV_WIPEONFORK: Final = 18


def process_id() -> int:
    """The id of this process, for messages."""
    return os.getpid()


def program_name() -> str:
    """What this process runs, as far as Python knows."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name.encode("utf-8", "replace").decode() or "python"


class Birthmark(Protocol):
    """True at [0] in the process that asked for it, and in no child of it."""

    def __getitem__(self, index: int, /) -> int: ...


class _ByProcessId:
    def __init__(self) -> None:
        self._pid = os.getpid()

    def __getitem__(self, index: int, /) -> int:
        return os.getpid() == self._pid


def _new() -> Birthmark:
    if sys.platform == "linux":
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            page.madvise(_MADV_WIPEONFORK)
        except OSError:
            page.close()  # A kernel before 4.14.
        else:
            page[0] = 1
            return page
    return _ByProcessId()


_current = _new()
_callbacks: list[Callable[[], None]] = []


def birthmark() -> Birthmark:
    """The mark of this process."""
    global _current
    if not _current[0]:
        _current = _new()
    return _current


def when_noticed(callback: Callable[[], None]) -> None:
    """Have `callback` run in a forked child when it is first found to be one."""
    _callbacks.append(callback)


def refuse_in_child() -> NoReturn:
    """Raise ForkedError for a call on what this process only inherited."""
    for callback in _callbacks:
        callback()
    raise ForkedError


def call_in_forked_child(callback: Callable[[], None]) -> None:
    """Have `callback` run in every child that `os.fork` makes, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)
