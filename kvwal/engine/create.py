"""The directory of a store: open and lock it, erase what is in it for flag "n", and make a store in it.

Making and erasing may be cut off anywhere:

- A store is made in this order: the directory and its name, the first segment, the page file under a temporary name,
  renamed last. So a page file without a log, or a log with commits without a page file, cannot come from a crash:
  something is missing.
- A store is erased under the marker `erasing`: once it is on disk the store counts as erased. The next writable open
  finishes the erasing, and a reader finds no store.
- A salvage makes its store under the marker `salvaging` (kvwal/salvaging.py): until that goes, nothing else opens it.
"""

from __future__ import annotations

import errno
import time
from typing import Final, NoReturn

from kvwal.errors import CorruptionError, DiskFullError, FormatError, LockedError, ReadOnlyError, StoreNotFoundError
from kvwal.files import Directory, is_full, opened_again, parent_and_name
from kvwal.files.names import DATA, ERASING, LOCK, SALVAGING, is_erasable, is_known, segment_name, temporary_name
from kvwal.keys import Seqno
from kvwal.log import LogIdentity, LogOptions, LogReader, SegmentLog
from kvwal.log.segment import list_segments, store_id_of_log
from kvwal.options import Flag, Options
from kvwal.pages import PageFile, create_page_file

__all__ = [
    "SALVAGE_MARK",
    "create_if_missing",
    "erase",
    "has_writer",
    "is_marked",
    "lock",
    "locked_by_writer",
    "log_options",
    "make_marker",
    "mark_of_part",
    "open_directory",
    "refuse_empty",
]

_STORE_ID_BYTES: Final = 16
_LINE_BYTES: Final = 8

# What the marker says. A file of its name with something else in it is not ours, and no licence to erase.
_MARK: Final = b"kvwal erases the store in this directory; the next writable open finishes it\n"
#: How that of a salvage begins. A number follows, which says whose it is.
SALVAGE_MARK: Final = b"kvwal saves a store into this directory; what is there until then is a part\n"

# How often a writer looks again where no writer has the lock, and after how long: a reader has it for microseconds.
_LOOKS: Final = 50
_LOOK_AGAIN_S: Final = 0.001

_NO_PERMISSION: Final = (errno.EACCES, errno.EPERM)


def open_directory(path: str, flag: Flag, options: Options) -> tuple[Directory, bool]:
    """The directory at `path`, and whether it was made. It is one of a store, or empty."""
    files = options.files
    made = False
    try:
        try:
            directory = files.open_directory(path)
        except FileNotFoundError:
            if flag in ("r", "w"):
                raise _not_found(path) from None
            try:
                if options.parents:
                    _ensure_parent(path, options)
                files.make_directory(path, options.directory_mode)
                made = True
            except FileExistsError:
                pass  # Another process made it just now, or a link leads nowhere.
            directory = files.open_directory(path)
    except FileNotFoundError as error:
        if isinstance(error, StoreNotFoundError):
            raise
        text = f"the directory that should hold the store does not exist; parents=True makes it: {path}"
        raise StoreNotFoundError(errno.ENOENT, text) from None
    except NotADirectoryError:
        raise FormatError(f"{path} is not a directory; a store is a directory, so give it a name of its own") from None
    try:
        _refuse_foreign(directory, flag)
    except BaseException:
        directory.close()
        raise
    return directory, made


def _ensure_parent(path: str, options: Options) -> None:
    """The directory that holds `path` is there, and so is its own entry after a power cut.

    Durability: nothing is made in a directory whose own entry is not on disk, since it would vanish with that. It is
    flushed also where the directory was found: the process that made it may have died before it did so. What is farther
    up was flushed before this directory was made.
    """
    parent, name = parent_and_name(path)
    if not name or parent == path:
        return
    try:
        directory = options.files.open_directory(parent)
    except FileNotFoundError:
        _ensure_parent(parent, options)
        try:
            options.files.make_directory(parent, options.directory_mode)
        except FileExistsError:
            pass  # Another process made it just now.
        directory = options.files.open_directory(parent)
    except OSError as error:
        if error.errno in _NO_PERMISSION:
            return  # It may be entered, but not read; to flush an entry in it then flushes the whole file system.
        raise
    try:
        directory.sync_parent()
    finally:
        directory.close()


def _not_found(path: str) -> StoreNotFoundError:
    return StoreNotFoundError(errno.ENOENT, f'there is no store; open it with flag "c" to make one: {path}')


def refuse_empty(directory: Directory) -> None:
    """StoreNotFoundError where nothing of a store is, before the lock leaves a file there.

    Where that file is, another process may be making a store just now: then only its lock tells.
    """
    names = (DATA, LOCK, ERASING)
    if all(directory.kind(name) is None for name in names) and not list_segments(directory):
        raise _not_found(directory.path)


def _refuse_foreign(directory: Directory, flag: Flag) -> None:
    kind = directory.kind(DATA)
    if kind is not None:
        # What flag "n" says of it speaks of erasing.
        if kind != "file" and flag != "n":
            raise FormatError(
                f"{DATA} in {directory.path} is not a regular file, which a store's page file is; "
                f"kvwal does not follow links"
            )
        return
    foreign = sorted(name for name in directory.names() if not is_known(name))
    if foreign:
        raise FormatError(
            f"{directory.path} holds other things ({foreign[0]!r} for one) and no store; "
            f"give the store a directory of its own"
        )


def lock(directory: Directory, options: Options) -> None:
    """Take the store's lock, to recover it. A reader has it only while it looks for a writer: then this looks again."""
    for _ in range(_LOOKS):
        try:
            _lock(directory, "w", options)
            return
        except LockedError:
            if has_writer(directory, options):
                raise
            time.sleep(_LOOK_AGAIN_S)
    _lock(directory, "w", options)


def has_writer(directory: Directory, options: Options) -> bool:
    """Whether a process has the store open for writing. Nothing is locked when this returns."""
    return locked_by_writer(directory, options) is not None


def locked_by_writer(directory: Directory, options: Options) -> LockedError | None:
    """What tells of the process that has the store open for writing; None if none has. Nothing is locked then."""
    try:
        look = opened_again(directory)
    except FileNotFoundError:
        raise _not_found(directory.path) from None
    try:
        _lock(look, "r", options)
        return None
    except LockedError as error:
        return error
    finally:
        look.close()


def _lock(directory: Directory, flag: Flag, options: Options) -> None:
    path = directory.path
    try:
        directory.lock(shared=flag == "r", mode=options.mode, recovers=flag != "r")
    except OSError as error:
        if flag != "r" and error.errno in _NO_PERMISSION:
            raise ReadOnlyError(f'no permission to write in {path}; open it with flag "r" to read it') from error
        if flag != "r" and error.errno == errno.EROFS:
            raise ReadOnlyError(f'{path} is on a read-only file system; open it with flag "r"') from error
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            text = f"{path}: {LOCK} is no regular file (a link, for one, is not followed); remove it"
            raise FormatError(text) from error
        raise


def erase(directory: Directory, flag: Flag, options: Options) -> None:
    """Erase the store for flag "n", and finish what an open with "n" began before it was cut off."""
    is_begun = is_marked(directory)
    if not is_begun and flag != "n":
        _refuse_part(directory, options)
        return
    if flag == "r":
        raise _not_found(directory.path)
    _refuse_directories(directory)
    if not is_begun:
        _refuse_to_erase_foreign(directory)
        _mark(directory, options)
    for name in directory.names():
        if is_erasable(name):
            directory.unlink(name)
    # Durability: without it the marker could go, and a part of the old store come back.
    directory.sync()
    # It is gone for good when the first segment of the new store has its name, before there is anything to lose.
    directory.unlink(ERASING)


def _refuse_part(directory: Directory, options: Options) -> None:
    is_there = directory.kind(SALVAGING) is not None
    if is_there and mark_of_part(directory) is None:
        raise FormatError(
            f"{SALVAGING} in {directory.path} is not what kvwal makes under this name; remove it by hand"
        )
    if is_there and not options.opens_unfinished:
        raise FormatError(
            f"{directory.path} is a part of a store: a salvage into it is at work, or was cut off; "
            f"then salvage into it again"
        )


def mark_of_part(directory: Directory) -> bytes | None:
    """What the marker of a salvage says; None if there is none, or another file has its name."""
    mark = _said_in(directory, SALVAGING, 2 * len(SALVAGE_MARK))
    return mark if mark.startswith(SALVAGE_MARK) else None


def is_marked(directory: Directory) -> bool:
    """Whether the store counts as erased."""
    return _said_in(directory, ERASING, len(_MARK) + 1) == _MARK


def _said_in(directory: Directory, name: str, most: int) -> bytes:
    """How a marker begins; nothing if there is none."""
    if directory.kind(name) != "file":
        return b""
    try:
        file = directory.open(name)
    except FileNotFoundError:
        # A follower has no lock, nor has who looks for a part, and it was removed just now.
        return b""
    try:
        return file.pread(most, 0)
    finally:
        file.close()


def _mark(directory: Directory, options: Options) -> None:
    """From here on the store counts as erased, so that a crash in the middle does not look like damage."""
    if directory.kind(ERASING) is not None:
        raise FormatError(f"{ERASING} in {directory.path} is not what kvwal makes under this name; remove it by hand")
    make_marker(directory, ERASING, _MARK, options.mode)


def make_marker(directory: Directory, name: str, says: bytes, mode: int) -> None:
    """Make a marker, whole or not at all. Durable on return: nothing that it is about is done before it is there."""
    unfinished = temporary_name(name)
    if directory.kind(unfinished) is not None:
        directory.unlink(unfinished)
    marker = directory.open(unfinished, create=True, mode=mode)
    try:
        marker.pwrite(says, 0)
        marker.sync()
    finally:
        marker.close()
    directory.rename(unfinished, name)
    directory.sync()


def _refuse_directories(directory: Directory) -> None:
    """Before anything is erased: what is a directory cannot be, and is none of a store's, whatever its name."""
    for name in sorted(filter(is_erasable, directory.names())):
        if directory.kind(name) == "directory":
            raise FormatError(
                f"{name} in {directory.path} is a directory, which a store's file of this name is not, so nothing "
                f"there is erased; remove it by hand"
            )


def _refuse_to_erase_foreign(directory: Directory) -> None:
    """A file that happens to be named like our page file is no licence to erase it. A damaged store may be erased."""
    kind = directory.kind(DATA)
    if kind is None:
        return
    if kind == "file":
        try:
            PageFile(directory, cache_bytes=0, writable=False).close()
            return
        except FormatError:
            return  # Ours, of a newer version.
        except CorruptionError:
            if store_id_of_log(directory) is not None:
                return
    raise FormatError(
        f"{DATA} in {directory.path} is no page file of a store, so nothing there is erased; "
        f"remove it by hand if it may go"
    )


def create_if_missing(directory: Directory, flag: Flag, options: Options) -> bool:
    """Make a store, if there is none and the flag allows it. True if it was made."""
    files = options.files
    if directory.kind(DATA) is not None:
        return False
    segments = list_segments(directory)
    if segments:
        # A crash while the store was being made leaves its first segment, without a commit, and no page file.
        store_id = store_id_of_log(directory)
        if len(segments) > 1 or store_id is None:
            _missing_data(segments)
        if next(iter(LogReader(directory, store_id).replay(after=Seqno(0), floor=Seqno(0))), None) is not None:
            _missing_data(segments)
    if flag in ("r", "w"):
        raise _not_found(directory.path)
    if segments:
        directory.unlink(segment_name(segments[0]))
        directory.sync()
    store_id = files.random_bytes(_STORE_ID_BYTES)
    now_us = files.now_us()
    # Durability: the process that made the directory may have died before its entry was on disk; then the whole store
    # could vanish with it, acknowledged commits and all. So it is flushed here, and not only where it is made.
    directory.sync_parent()
    try:
        line = files.random_bytes(_LINE_BYTES)
        identity = LogIdentity(store_id, line, now_us)
        # Durability: not closed, since the record of a clean close tells the next open that every name is on disk; that
        # of the page file may not be yet.
        SegmentLog.create(files, directory, identity, log_options(options), time_us=now_us).abandon()
        create_page_file(directory, store_id, time_us=now_us, line=line, mode=options.mode)
    except OSError as error:
        if is_full(error):
            raise DiskFullError(f"there is no space to make a store at {directory.path}") from error
        raise
    return True


def _missing_data(segments: list[Seqno]) -> NoReturn:
    raise CorruptionError(DATA, None, f"the page file is missing, but there is a log ({segment_name(segments[0])})")


def log_options(options: Options) -> LogOptions:
    """What the log needs to know of the settings."""
    return LogOptions(
        options.segment_bytes, options.preallocate, options.mode
    )
