"""What a restore makes aside, before it has its name: the marker that says what is made, and what may be there.

`restoring` is an object of JSON (see state.py): what was asked for, and `line`, the new line in hex. It is there from
before the first step until all is verified. `restoring-pages` are the pages when they are whole, before there is a log.
"""

from __future__ import annotations

from typing import Any, Final

from kvwal.backup.state import LINE_BYTES, dump, line_in, load
from kvwal.errors import CorruptionError, FormatError, StoreExistsError
from kvwal.files import Directory, Files, parent_and_name
from kvwal.files.names import DATA, LOCK, READERS, is_known, numbers, temporary_name

__all__ = ["MARKER", "PAGES", "begin", "marker_of", "refuse_foreign", "refuse_link", "refuse_taken", "taken"]

MARKER: Final = "restoring"
PAGES: Final = "restoring-pages"
_OURS: Final = frozenset((MARKER, PAGES, temporary_name(MARKER), temporary_name(PAGES)))
# It names each object that is read. What is longer is none.
_MOST_MARKER_BYTES: Final = 256 << 20


def begin(directory: Directory, asked: dict[str, Any], files: Files, mode: int) -> tuple[bytes, bool]:
    """Write the marker, unless it says that the same is being made. The new line, and whether that was so.

    StoreExistsError for what is none of a restore. Requires: the directory is locked.
    """
    names = directory.names()
    found = marker_of(directory)
    if found is None and (PAGES in names or any(map(numbers, names))):
        raise taken(directory.path, "is none of a restore, or of another version; move it")
    if found is not None and {key: found.get(key) for key in asked} == asked:
        line = line_in(found)
        if line is not None:
            return line, True
    # That of another moment, or none. Durability: what says that a step has ended goes before what that step made.
    for going in ((DATA, PAGES), names):
        for name in going:
            # What followers left there says of itself which line it is of.
            if name in directory.names() and name not in (MARKER, LOCK, READERS):
                directory.unlink(name)
        directory.sync()
    line = files.random_bytes(LINE_BYTES)
    file = directory.open(temporary_name(MARKER), create=True, mode=mode)
    try:
        file.pwrite(dump({**asked, "line": line.hex()}), 0)
        file.sync()
    finally:
        file.close()
    directory.rename(temporary_name(MARKER), MARKER)
    # Durability: without the marker, what comes now would be none of a restore.
    directory.sync()
    return line, False


def marker_of(directory: Directory) -> dict[str, Any] | None:
    """What the marker says; None if there is none."""
    if directory.kind(MARKER) != "file":
        return None
    file = directory.open(MARKER)
    try:
        return load(MARKER, file.pread(min(file.size(), _MOST_MARKER_BYTES), 0))
    except (CorruptionError, FormatError):
        return None
    finally:
        file.close()


def refuse_foreign(directory: Directory) -> None:
    """StoreExistsError if there is something that neither a store nor a restore has."""
    for name in directory.names():
        if not (name in _OURS or is_known(name)) or (directory.kind(name) == "directory") != (name == READERS):
            raise taken(directory.path, f"holds {name!r}, which is none of a restore; move it")


def refuse_link(files: Files, path: str, what_to_do: str) -> None:
    """StoreExistsError for a symbolic link, or what else is neither a directory nor a file.

    What is made aside is renamed: that replaces a name, and never the directory that a link leads to.
    """
    parent, name = parent_and_name(path)
    try:
        directory = files.open_directory(parent)
    except (FileNotFoundError, NotADirectoryError):
        # Said where it is to be made.
        return
    try:
        if name and directory.kind(name) == "other":
            raise taken(path, f"is a symbolic link, or no directory; {what_to_do}")
    finally:
        directory.close()


def refuse_taken(files: Files, path: str) -> None:
    """StoreExistsError if there is something at a path, and not just an empty directory; a link is not followed."""
    refuse_link(files, path, "name a new directory to restore into, or the one that the link leads to")
    try:
        directory = files.open_directory(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise taken(path, "is a file; name a new directory to restore into") from None
    try:
        if directory.names():
            raise taken(path, "is not empty; name a new directory to restore into")
    finally:
        directory.close()


def taken(path: str, why: str) -> StoreExistsError:
    """Of something that is where a restore would be made."""
    return StoreExistsError(17, f"{path} {why}")
