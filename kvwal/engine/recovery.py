"""Opening a store: make it, or recover it, and say what was found.

Recovery, and why it may itself be cut off anywhere and run again:

1. The page file's newest verifying generation is taken (the table is in `pages/meta.py`). Nothing is written.
2. The log is read from the commit after that generation and replayed into a memtable. Its end is classified by the
   table in `log/tail.py`: what was never acknowledged is cut off, what was acknowledged and is damaged raises
   `CorruptionError`. Nothing is written. The tail fits in memory, since writers wait at twice the memtable's budget.
   (A checkpoint in the middle of the replay would be wrong: the pages could come to hold commits that are only in the
   page cache, and that the log then loses.)
3. What was read beyond the durable watermark may sit in the page cache of a flush that failed before the crash, so it
   is not trusted to be on disk: it is written again, into a new segment that appears whole or not at all. Only then
   does anybody get an answer.

Creating goes the other way round: the first segment, then the page file under a temporary name, renamed last. So a
page file without a log, or a log with commits without a page file, cannot come from a crash: something is missing.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Final, NoReturn

from kvwal.batch import WriteBatch
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES, Memtable
from kvwal.engine.present import Present
from kvwal.errors import (
    CorruptionError,
    DiskFullError,
    FormatError,
    ReadOnlyError,
    StoreNotFoundError,
)
from kvwal.files import Directory
from kvwal.keys import Seqno
from kvwal.log import LogEnd, LogReader, LogWriter, Record
from kvwal.log.segment import store_id_of_log
from kvwal.log.walk import Puts
from kvwal.options import Flag, Options
from kvwal.pages import PageFile

__all__ = ["DATA_NAME", "LOCK_NAME", "Opened", "RecoveryReport", "open_parts", "segment_names"]

DATA_NAME: Final = "data"
LOCK_NAME: Final = "lock"
# Present while an old store is being erased for flag "n": whoever opens next finishes the erasing.
_ERASING_NAME: Final = "erasing"

_STORE_ID_BYTES: Final = 16

# Every name that a store gives to a file. Nothing else is ever removed, however much it looks like one.
_MADE: Final = re.compile(r"data|data\.tmp|spare\.tmp|\d{20}\.(log|idx|tmp|idx\.tmp)")
_OWN: Final = re.compile(rf"{_MADE.pattern}|{LOCK_NAME}|{_ERASING_NAME}|reserve")


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What opening found and did.

    Attributes:
        created: the store was made by this open.
        meta_choice: the row of the table in `pages/meta.py` that chose the generation.
        checkpoint_seqno: the last commit in the pages at open.
        row: the row of the table in `log/tail.py` that says how the log ended.
        detail: the same in a sentence, with positions.
        commits: commits replayed from the log.
        bytes_replayed: their bytes in the log.
        cut_bytes: bytes after the last good record that were cut off; they were never acknowledged.
        last_seqno: the last commit recovered.
        durable_seqno: the last commit that was known to be on disk before this open.
        carried: commits after `durable_seqno` that were written again to be sure of them.
        seconds: how long it took.
    """

    created: bool
    meta_choice: str
    checkpoint_seqno: Seqno
    row: str
    detail: str
    commits: int
    bytes_replayed: int
    cut_bytes: int
    last_seqno: Seqno
    durable_seqno: Seqno
    carried: int
    seconds: float

    @property
    def records(self) -> int:
        """Records replayed (one for each commit)."""
        return self.commits


@dataclass(slots=True)
class Opened:
    """The parts of an open store."""

    #: Holds the lock.
    directory: Directory
    pages: PageFile
    #: None for a store opened read-only.
    log: LogWriter | None
    reader: LogReader
    present: Present
    report: RecoveryReport

    def abandon(self) -> None:
        """Let go of everything and write nothing."""
        if self.log is not None:
            self.log.abandon()
        self.pages.abandon()
        self.directory.close()


def open_parts(path: str, flag: Flag, options: Options) -> Opened:
    """Lock, make or recover the store at `path`. See `kvwal.open` for what is raised."""
    files = options.files
    started_s = files.monotonic_s()
    directory, created_directory = _open_directory(path, flag, options)
    try:
        _refuse_foreign(directory)
        _lock(directory, flag, options)
        if flag != "r":
            _finish_erasing(directory, begin=flag == "n")
        created = _create_if_missing(directory, flag, options)
        return _recover(directory, flag, options, started_s, created=created or created_directory)
    except OSError as error:
        directory.close()
        if error.errno == errno.ENOSPC and not isinstance(error, DiskFullError):
            raise DiskFullError(f"there is no space to open {path}; free some and open it again") from error
        raise
    except BaseException:
        directory.close()
        raise


def _open_directory(path: str, flag: Flag, options: Options) -> tuple[Directory, bool]:
    """The directory at `path`, and whether it was made."""
    files = options.files
    made = False
    try:
        try:
            return files.open_directory(path), made
        except FileNotFoundError:
            if flag in ("r", "w"):
                raise _not_found(path) from None
        try:
            files.make_directory(path, options.directory_mode)
            made = True
        except FileExistsError:
            pass  # Another process made it just now.
        except FileNotFoundError:
            text = f"the directory that should hold the store does not exist: {path}"
            raise StoreNotFoundError(errno.ENOENT, text) from None
        return files.open_directory(path), made
    except NotADirectoryError:
        raise FormatError(f"{path} is not a directory; a store is a directory, so give it a name of its own") from None


def _not_found(path: str) -> StoreNotFoundError:
    return StoreNotFoundError(errno.ENOENT, f'there is no store; open it with flag "c" to make one: {path}')


def _refuse_foreign(directory: Directory) -> None:
    if directory.kind(DATA_NAME) is not None:
        return
    foreign = sorted(name for name in directory.names() if not _OWN.fullmatch(name))
    if foreign:
        raise FormatError(
            f"{directory.path} holds other things ({foreign[0]!r} for one) and no store; "
            f"give the store a directory of its own"
        )


def _lock(directory: Directory, flag: Flag, options: Options) -> None:
    path = directory.path
    try:
        directory.lock(shared=flag == "r", mode=options.mode)
    except PermissionError as error:
        if flag == "r":
            raise
        raise ReadOnlyError(f'no permission to write in {path}; open it with flag "r" to read it') from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise ReadOnlyError(f'{path} is on a read-only file system; open it with flag "r"') from error
        if error.errno == errno.ELOOP:
            raise FormatError(
                f"{path}: {LOCK_NAME} is a symbolic link, which kvwal does not follow; remove it"
            ) from error
        raise


def _finish_erasing(directory: Directory, *, begin: bool) -> None:
    """Erase the store for flag "n", or finish what an open with "n" began before it was cut off."""
    if directory.kind(_ERASING_NAME) is None:
        if not begin:
            return
        _refuse_to_erase_foreign(directory)
        directory.open(_ERASING_NAME, create=True).close()
        # From here on the store counts as erased: a crash in the middle must not look like damage.
        directory.sync()
    for name in directory.names():
        if _MADE.fullmatch(name):
            directory.unlink(name)
    directory.sync()
    directory.unlink(_ERASING_NAME)
    directory.sync()


def _refuse_to_erase_foreign(directory: Directory) -> None:
    """A file that happens to be named like our page file is no licence to erase it. A damaged store may be erased."""
    kind = directory.kind(DATA_NAME)
    if kind is None:
        return
    if kind == "file":
        try:
            PageFile(directory, cache_bytes=0, writable=False).abandon()
            return
        except FormatError:
            return  # Ours, of a newer version.
        except CorruptionError:
            if store_id_of_log(directory) is not None:
                return
    raise FormatError(
        f"{DATA_NAME} in {directory.path} is no page file of a store, so nothing there is erased; "
        f"remove it by hand if it may go"
    )


def segment_names(directory: Directory) -> list[str]:
    """The log's files, oldest first."""
    return sorted(name for name in directory.names() if _MADE.fullmatch(name) and name.endswith(".log"))


def _create_if_missing(directory: Directory, flag: Flag, options: Options) -> bool:
    files = options.files
    kind = directory.kind(DATA_NAME)
    if kind == "file":
        return False
    if kind is not None:
        raise FormatError(
            f"{DATA_NAME} in {directory.path} is not a regular file, which a store's page file is; "
            f"kvwal does not follow links"
        )
    segments = segment_names(directory)
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
        directory.unlink(segments[0])
        directory.sync()
    store_id = files.random_bytes(_STORE_ID_BYTES)
    now_us = files.now_us()
    # Durability: the process that made the directory may have died before its entry was on disk; then the whole store
    # could vanish with it, acknowledged commits and all. So it is flushed here, and not only where it is made.
    directory.sync_parent()
    try:
        LogWriter.create(
            files,
            directory,
            store_id,
            segment_bytes=options.segment_bytes,
            preallocate=options.preallocate,
            time_us=now_us,
            mode=options.mode,
        ).close()
        PageFile.create(directory, store_id, time_us=now_us, mode=options.mode)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFullError(f"there is no space to make a store at {directory.path}") from error
        raise
    return True


def _missing_data(segments: list[str]) -> NoReturn:
    raise CorruptionError(DATA_NAME, None, f"the page file is missing, but there is a log ({segments[0]})")


def _recover(directory: Directory, flag: Flag, options: Options, started_s: float, *, created: bool) -> Opened:
    files = options.files
    read_only = flag == "r"
    pages = PageFile(directory, cache_bytes=options.cache_bytes, writable=not read_only)
    try:
        meta = pages.meta
        checkpoint_seqno = meta.seqno
        present = Present(
            pages,
            cache_bytes=options.cache_bytes,
            memtable_bytes=options.memtable_bytes,
        )
        reader = LogReader(directory, pages.store_id)
        commits, size, end = _replay_all(reader, meta.seqno, present)
        if commits:
            # Durability: readers come only after `resume`, below.
            present.publish(end.last_seqno, WriteBatch(), 0)
        log = None
        if not read_only:
            log = LogWriter.resume(
                files,
                directory,
                pages.store_id,
                end,
                reader,
                segment_bytes=options.segment_bytes,
                preallocate=options.preallocate,
                mode=options.mode,
            )
        report = RecoveryReport(
            created=created,
            meta_choice=str(pages.choice),
            checkpoint_seqno=checkpoint_seqno,
            row=end.row.name.lower(),
            detail=end.detail,
            commits=commits,
            bytes_replayed=size,
            cut_bytes=end.cut_bytes,
            last_seqno=end.last_seqno,
            durable_seqno=end.watermark,
            carried=max(0, end.last_seqno - end.watermark) if log is not None else 0,
            seconds=files.monotonic_s() - started_s,
        )
    except BaseException:
        pages.abandon()
        raise
    return Opened(directory, pages, log, reader, present, report)


class _Unread:
    """What `Present.publish` does to the memtable, without what it does for readers: there are none yet."""

    def __init__(self, memtable: Memtable) -> None:
        self._memtable = memtable

    def publish(self, seqno: Seqno, batch: WriteBatch, size: int) -> None:
        """Apply a commit."""
        self._memtable.apply(seqno, batch, size, None)


def _replay_all(reader: LogReader, after: Seqno, present: Present) -> tuple[int, int, LogEnd]:
    """Bring the commits beyond `after` into the memtable; returns how many there were, their bytes, and the log's end.

    No reader sees anything of it yet: there are no rows, and `present` stands at the commit before.
    """
    memtable = present.levels.memtable
    unread = _Unread(memtable)
    # Most commits are one put, which needs nothing but the dict. Whatever else a put changes is made good for below.
    puts = Puts(memtable.latest)
    others = size = 0
    replay = reader.replay(after=after, floor=after, puts=puts)
    for record in replay:
        _replay(record, unread)
        others += 1
        size += record.size
    commits = replay.end.last_seqno - after
    memtable.bytes_used += puts.size + (commits - others) * ENTRY_OVERHEAD_BYTES
    if memtable.tombstones:
        # Some of those that were counted may have been put again.
        present.recount()
    return commits, size + puts.size, replay.end


def _replay(record: Record, present: _Unread) -> None:
    present.publish(record.seqno, record.batch(), record.size)
