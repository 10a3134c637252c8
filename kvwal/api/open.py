"""Opening a store, and what becomes of those that are open when the process forks or exits."""

from __future__ import annotations

import atexit
import weakref
from typing import Protocol, Unpack

from kvwal.api.store import Store
from kvwal.engine.engine import Engine
from kvwal.feed.status import describe
from kvwal.files import PathArgument, call_in_forked_child, path_text
from kvwal.following.still import open_engine
from kvwal.options import Flag, OpenOptions, Options, as_flag, taking_options

__all__ = ["open", "open_stores"]


class _Opened(Protocol):
    """A store, or what follows one."""

    @property
    def engine(self) -> Engine: ...
    @property
    def closed(self) -> bool: ...
    def close(self) -> None: ...


# Those of this process, until they are collected: told when it forks, and closed when it exits. By id, since a mapping
# has no hash.
open_stores: weakref.WeakValueDictionary[int, _Opened] = weakref.WeakValueDictionary()


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
        RefusedError: the system refused a call (too many open files, no permission to read); nothing was changed.
        SystemCallError: a call of the system failed, such as a read, write or flush. Both are an OSError, too.
        TypeError, ValueError: an argument cannot be right.
    """
    engine = open_engine(path_text(path), as_flag(flag), Options(mode=mode, **options), describe)
    try:
        store = Store(engine)
        open_stores[id(store)] = store
        return store
    except BaseException:
        engine.abandon()
        raise


def _tell_child() -> None:
    for store in list(open_stores.values()):
        if not store.closed:
            store.engine.abandon(in_child=True)
    open_stores.clear()


def _close_all() -> None:
    for store in list(open_stores.values()):
        store.close()


call_in_forked_child(_tell_child)
atexit.register(_close_all)
