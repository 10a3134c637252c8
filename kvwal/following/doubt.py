"""Doubt is not damage. What does not verify, or is missing, may be what the writer is just changing.

So it is looked at again, and is an error only if nothing has moved between two failures.
"""

from __future__ import annotations

from collections.abc import Callable
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
            if found == blamed:
                raise
            blamed = found
    raise failure


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
