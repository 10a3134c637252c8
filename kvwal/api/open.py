"""Opening a store, and what becomes of those that are open when the process forks or exits."""

from __future__ import annotations

import atexit
import weakref
from typing import Literal, get_args

from kvwal.api.store import Store
from kvwal.engine.recovery import open_parts
from kvwal.files import Files, PathArgument, call_in_forked_child, path_text, system_files
from kvwal.options import Durability, Flag, Options

__all__ = ["open"]

# Stores of this process, until they are collected: told when it forks, and closed when it exits. By id, since a mapping
# has no hash.
_open_stores: weakref.WeakValueDictionary[int, Store] = weakref.WeakValueDictionary()


def open(
    path: PathArgument,
    flag: Flag = "c",
    *,
    mode: int = 0o600,
    durability: Durability = "commit",
    sync_delay_s: float = 0.1,
    cache_bytes: int = 64 << 20,
    memtable_bytes: int = 64 << 20,
    segment_bytes: int = 16 << 20,
    checkpoint_log_bytes: int = 64 << 20,
    checkpoint_interval_s: float = 300.0,
    retain_log_bytes: int = 0,
    retain_log_s: float = 0.0,
    preallocate: Literal["allocate", "zeros"] = "allocate",
    background: bool = True,
    files: Files | None = None,
) -> Store:
    """Open the store in the directory `path`, recovering it if its last user crashed.

    Args:
        path: a directory; made, with its files, if the flag allows.
        flag: "r" read-only, which writes not a byte and works in a read-only directory; "w" read and write, must
            exist; "c" read and write, made if missing; "n" read and write, always empty: what is there is erased.
        mode: permissions of new files (less the umask); a new directory may also be entered.
        durability: when a commit returns. "commit": it is on disk, and survives a power cut. "interval": it survives
            a kill of the process, and a power cut once `sync_delay_s` has passed. "os": it survives a kill of the
            process; the system decides when it is on disk. What is recovered is a prefix of the commits in any case.
        sync_delay_s: longest time a commit of durability "interval" stays unflushed.
        cache_bytes: memory for pages and rows of the page file.
        memtable_bytes: memory of commits that are not in the pages yet; more starts a checkpoint. At twice as much,
            writers wait for the one under way, which may be at work on as much again.
        segment_bytes: size of one file of the log.
        checkpoint_log_bytes, checkpoint_interval_s: a checkpoint also starts after so much log, or such a time.
        retain_log_bytes, retain_log_s: keep the log for longer than recovery needs it, for `Store.history`.
        preallocate: how the log's space is taken: "allocate" asks the file system, "zeros" writes it.
        background: False starts no thread; checkpoints then run inside commits, and "interval" flushes at commits.
        files: another file system, such as `kvwal.testing.SimulatedDisk`.

    Returns: the store. `Store.recovery` says what was found. Use it in a `with` block, or close it.

    Raises:
        StoreNotFoundError: there is no store and the flag does not make one, or its parent directory is missing.
        LockedError: another process, or this one, has it open. (Several may read at once.)
        CorruptionError: acknowledged data is damaged or missing; `kvwal.salvage` saves what verifies.
        FormatError: not a store, or one of a newer format.
        ReadOnlyError: no permission to write; flag "r" may work.
        DiskFullError: no space to make or recover it.
        TypeError, ValueError: an argument cannot be right.
    """
    if flag not in get_args(Flag):
        raise ValueError(f'flag is one of "r", "w", "c" and "n", not {flag!r}')
    options = Options(
        durability=durability,
        sync_delay_s=sync_delay_s,
        cache_bytes=cache_bytes,
        memtable_bytes=memtable_bytes,
        segment_bytes=segment_bytes,
        checkpoint_log_bytes=checkpoint_log_bytes,
        checkpoint_interval_s=checkpoint_interval_s,
        retain_log_bytes=retain_log_bytes,
        retain_log_s=retain_log_s,
        preallocate=preallocate,
        background=background,
        mode=mode,
        files=system_files() if files is None else files,
    )
    opened = open_parts(path_text(path), flag, options)
    try:
        store = Store(opened, options, read_only=flag == "r")
        _open_stores[id(store)] = store
        return store
    except BaseException:
        opened.abandon()
        raise


def _tell_child() -> None:
    for store in list(_open_stores.values()):
        if not store.closed:
            store._abandon_in_child()
    _open_stores.clear()


def _close_all() -> None:
    for store in list(_open_stores.values()):
        store.close()


call_in_forked_child(_tell_child)
atexit.register(_close_all)
