"""Doubt is not damage. What does not verify, or is missing, may be what the writer is just changing.

So it is looked at again, and is an error only if nothing has moved between two failures. Where a file is missing, the
whole store may be about to go, as `rm -r` takes it apart: then it is an error only if no other file goes for a while.
A writer, which goes on beside true damage, makes files, and removes some: so all of that has an end.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from time import monotonic, sleep
from typing import Final, TypeVar

from kvwal.engine.create import is_marked
from kvwal.errors import CorruptionError, FormatError, SnapshotTooOld, StoreRemovedError
from kvwal.files import Directory
from kvwal.files.names import DATA, segment_name
from kvwal.log.segment import HEADER_PAGE_BYTES, list_segments

__all__ = ["signs", "until_still"]

_T = TypeVar("_T")

# What is under way is over after a few looks. After this many, what failed is raised.
_MOST_LOOKS: Final = 1000
# Between two looks for whether the rest of a store goes, and how many there are: `rm -r` takes far less for a file.
_GOING_S: Final = 0.01
_GOING_LOOKS: Final = 10
# From the first failure on that came again with nothing moved between: what still fails then is raised.
_DOUBT_S: Final = 0.5
# The two slots of a page file.
_SLOTS_BYTES: Final = 8192


def until_still(directory: Directory, action: Callable[[], _T], refuse: Callable[[], None]) -> _T:
    """What `action` returns, once it does not fail. Raises what it raises if nothing moved between two failures.

    `refuse` raises what is wrong, where it can tell, after a failure. A store that is removed while it is opened may be
    another one when it is looked at again.
    """
    blamed: object = None
    until_s = inf
    for _ in range(_MOST_LOOKS):
        try:
            return action()
        except SnapshotTooOld as error:
            failure: Exception = error
        except (CorruptionError, FormatError, FileNotFoundError, StoreRemovedError) as error:
            failure = error
            refuse()
            found = signs(directory)
            if found == blamed:
                now_s = monotonic()
                until_s = min(until_s, now_s + _DOUBT_S)
                if now_s >= until_s or not (_lacks_file(error) and _is_going(directory, refuse)):
                    raise
            blamed = found
    raise failure


def _lacks_file(error: Exception) -> bool:
    """Whether it may be a file that is missing: what is damaged has a place in one."""
    return not isinstance(error, CorruptionError) or error.offset is None


def _is_going(directory: Directory, refuse: Callable[[], None]) -> bool:
    """Whether a file of the store goes within a while. Raises as `refuse`."""
    there = _files(directory)
    for _ in range(_GOING_LOOKS):
        sleep(_GOING_S)
        refuse()
        if there - _files(directory):
            return True
    return False


def _files(directory: Directory) -> set[str]:
    """The segments, and the page file."""
    try:
        names = {segment_name(first) for first in list_segments(directory)}
    except FileNotFoundError:
        return set()
    return names | {DATA} if directory.kind(DATA) is not None else names


def signs(directory: Directory) -> object:
    """What changes with each step of a writer that can make a reader fail."""
    try:
        segments = list_segments(directory)
    except FileNotFoundError:
        return None
    newest = b"" if not segments else _head(directory, segment_name(segments[-1]), HEADER_PAGE_BYTES)
    return segments, newest, _head(directory, DATA, _SLOTS_BYTES), is_marked(directory)


def _head(directory: Directory, name: str, size: int) -> bytes:
    try:
        file = directory.open(name)
    except FileNotFoundError:
        return b""
    try:
        return file.pread(size, 0)
    finally:
        file.close()
