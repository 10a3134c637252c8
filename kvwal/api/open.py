"""Opening a store."""

from __future__ import annotations

from typing import Unpack

from kvwal.api.opened import made_over
from kvwal.api.store import Store
from kvwal.feed.status import describe
from kvwal.files import PathArgument, path_text
from kvwal.following.still import open_engine
from kvwal.options import Flag, OpenOptions, Options, as_flag, taking_options

__all__ = ["open"]


@taking_options
def open(path: PathArgument, flag: Flag = "c", mode: int = 0o600, **options: Unpack[OpenOptions]) -> Store:
    """Open the store in the directory `path`, recovering it if its last user crashed.

    Args:
        path: a directory; made, with its files, if the flag allows. Those above it with `parents=True` only.
        flag: "r" read-only, beside a process that writes or not: it takes no lock, writes no byte, works in a
            read-only directory, and shows one moment, which moves on only where a writer has written over its pages;
            "w" read and write, must exist; "c" read and write, made if missing; "n" read and write, always empty: what
            is there is erased.
        mode: permissions of new files (less the umask); a new directory may also be entered.
        options: durability, sizes, times and the like, by keyword; `kvwal.OpenOptions` says what each of them means.

    Returns: the store. `Store.recovery` says what was found. Use it in a `with` block, or close it.

    Raises:
        StoreNotFoundError: there is no store and the flag does not make one, or its parent directory is missing.
        LockedError: another process, or this one, has it open for writing, and this is not to read only.
        CorruptionError: acknowledged data is damaged or missing; `kvwal.salvage` saves what verifies.
        FormatError: not a store, or one of a newer format.
        ReadOnlyError: no permission to write; flag "r" may work.
        DiskFullError: no space to make or recover it.
        RefusedError: the system refused a call (too many open files, no thread left, no permission to read); nothing
            was changed.
        SystemCallError: a call of the system failed, such as a read, write or flush. Both are an OSError, too.
        TypeError, ValueError: an argument cannot be right.
    """
    return made_over(
        lambda: open_engine(path_text(path), as_flag(flag), Options(mode=mode, **options), describe), Store
    )
