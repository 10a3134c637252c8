"""What the process that writes a store says of it, asked for by another one."""

from __future__ import annotations

import time
from typing import Any, Final

from kvwal.engine.create import has_writer, locked_by_writer, open_directory
from kvwal.files import PathArgument, path_text, system_files
from kvwal.options import Options
from kvwal.readers.status import ask, read_status

__all__ = ["running_status", "writer_pid"]

_POLL_S: Final = 0.02
# What a writer has said in the last seconds is taken as it is: it says something new each second.
_YOUNG_S: Final = 1.5


def running_status(path: PathArgument, timeout_s: float = 3.0) -> tuple[bool, dict[str, Any] | None]:
    """Whether a process has the store open for writing, and what it says of itself: figures, pins, consumers.

    What it says has its age in seconds, `age_s`. None if there is no such process, or it said nothing in time: it is
    stopped, has no background thread, or its directory is not this user's. For a path without a store it raises what
    opening one there does.
    """
    files = system_files()
    options = Options(files=files)
    directory, _ = open_directory(path_text(path), "r", options)
    try:
        if not has_writer(directory, options):
            return False, None
        until_s = time.monotonic() + timeout_s
        try:
            ask(files, directory)
        except OSError:
            # Another process may have asked.
            until_s = 0.0
        while True:
            said = read_status(directory)
            wall_us = None if said is None else said.get("wall_us")
            if said is not None and isinstance(wall_us, int):
                age_s = (files.now_us() - wall_us) / 1e6
                if 0 <= age_s < _YOUNG_S:
                    return True, {**said, "age_s": age_s}
            if time.monotonic() >= until_s:
                return True, None
            time.sleep(_POLL_S)
    finally:
        directory.close()


def writer_pid(path: PathArgument) -> int | None:
    """The process that has the store open for writing, as it wrote it; None if there is none, or it wrote nothing."""
    options = Options(files=system_files())
    directory, _ = open_directory(path_text(path), "r", options)
    try:
        found = locked_by_writer(directory, options)
        return None if found is None else found.pid
    finally:
        directory.close()
