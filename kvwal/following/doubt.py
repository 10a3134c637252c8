"""Doubt is not damage. What does not verify, or is missing, may be what the writer is just changing.

So it is looked at again, and is an error only if nothing has moved between two failures. Where a file is missing, the
whole store may be about to go, as `rm -r` takes it apart: then it is an error only if nothing moves for a while.
"""

from __future__ import annotations

from collections.abc import Callable
from time import sleep
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
# The two slots of a page file.
_SLOTS_BYTES: Final = 8192


def until_still(directory: Directory, action: Callable[[], _T], refuse: Callable[[], None]) -> _T:
    """What `action` returns, once it does not fail. Raises what it raises if nothing moved between two failures.

    `refuse` raises what is wrong, where it can tell, after a failure. A store that is removed while it is opened may be
    another one when it is looked at again.
    """
    blamed: object = None
    for _ in range(_MOST_LOOKS):
        try:
            return action()
        except SnapshotTooOld as error:
            failure: Exception = error
        except (CorruptionError, FormatError, FileNotFoundError, StoreRemovedError) as error:
            failure = error
            refuse()
            found = signs(directory)
            if found == blamed and not (_lacks_file(error) and _goes_on(directory, found, refuse)):
                raise
            blamed = found
    raise failure


def _lacks_file(error: Exception) -> bool:
    """Whether it may be a file that is missing: what is damaged has a place in one."""
    return not isinstance(error, CorruptionError) or error.offset is None


def _goes_on(directory: Directory, found: object, refuse: Callable[[], None]) -> bool:
    """Whether something moves within a while. Raises as `refuse`."""
    for _ in range(_GOING_LOOKS):
        sleep(_GOING_S)
        refuse()
        if signs(directory) != found:
            return True
    return False


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
