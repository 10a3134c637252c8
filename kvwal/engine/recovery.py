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
   does a reader get an answer. (An open with flag "r" writes no byte: see `kvwal/following/still.py`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvwal.engine.create import create_if_missing, erase, lock, log_options, open_directory, refuse_empty
from kvwal.engine.memtable import Memtable
from kvwal.engine.state import State
from kvwal.errors import DiskFullError, Error, SystemCallError
from kvwal.events import Events
from kvwal.features import EXPIRY
from kvwal.files import Directory, end_recovery, is_full
from kvwal.keys import Seqno
from kvwal.log import LogEnd, LogIdentity, LogReader, SegmentCursor, SegmentLog, read_kept
from kvwal.log.walk import Puts
from kvwal.options import Flag, Options
from kvwal.pages import PageFile

__all__ = ["Recovered", "RecoveryReport", "failures_at", "open_store", "replay", "replay_part"]


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
        withheld: commits after `durable_seqno` that an open with flag "r" found and does not show; `detail` says why.
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
    withheld: int
    seconds: float

    @property
    def records(self) -> int:
        """Records replayed (one for each commit)."""
        return self.commits


@dataclass(slots=True)
class Recovered:
    """What opening a store found, to be put together."""

    #: Holds the lock.
    directory: Directory
    pages: PageFile
    #: None for a store opened read-only.
    log: SegmentLog | None
    reader: LogReader
    state: State
    report: RecoveryReport
    events: Events
    #: Whether something in it expires, or may have.
    expires: bool
    #: Reads the log from a commit on, up to one or as they come, where another process writes it.
    feed: Callable[[Seqno | None, Seqno | None], SegmentCursor] | None = None

    def hold(self, after: Seqno | None, purpose: str) -> SegmentCursor:
        """Hold the log beyond a commit (None: all of it) until what this returns is closed, or collected.

        FeedGap if some of it is gone.
        """
        if self.feed is not None:
            return self.feed(after, self.state.seqno)
        if self.log is None:
            return read_kept(self.reader, after, self.state.seqno)
        return self.log.read(after, purpose=purpose)

    def abandon(self) -> None:
        """Let go of everything and write nothing."""
        if self.log is not None:
            self.log.abandon()
        self.pages.close()
        self.directory.close()


def open_store(path: str, flag: Flag, options: Options) -> Recovered:
    """Lock, make or recover the store at `path`, for writing. See `kvwal.open` for what is raised."""
    started_s = options.files.monotonic_s()
    with failures_at(path):
        directory, made_directory = open_directory(path, flag, options)
        try:
            if flag == "w":
                refuse_empty(directory)
            lock(directory, options)
            erase(directory, flag, options)
            made = create_if_missing(directory, flag, options)
            return _recover(directory, options, started_s, created=made or made_directory)
        except BaseException:
            directory.close()
            raise


@contextmanager
def failures_at(path: str) -> Iterator[None]:
    """What fails while a store is opened, as one of kvwal's errors."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise DiskFullError(f"there is no space to open {path}; free some and open it again") from error
        if isinstance(error, Error):
            raise
        raise SystemCallError(error.errno, error.strerror, path) from error


def _recover(directory: Directory, options: Options, started_s: float, *, created: bool) -> Recovered:
    files = options.files
    events = Events(options.listeners)
    pages = PageFile(directory, cache_bytes=options.cache_bytes, writable=True)
    try:
        meta = pages.meta
        checkpoint_seqno = meta.seqno
        state = State(pages, cache_bytes=options.cache_bytes)
        reader = LogReader(directory, meta.store_id)
        memtable = state.version.memtable
        commits, size, end = replay(reader, meta.seqno, memtable, meta.seqno)
        last = end.last_seqno
        # Durability: readers come only after `resume`, below.
        state.horizon = memtable.last_seqno = state.seqno = last
        # The wall clock, since an open that made neither a segment nor a checkpoint left no trace of its number.
        session = max(meta.session + 1, end.header.session + 1, files.now_us())
        identity = LogIdentity(meta.store_id, meta.line, session)
        log = SegmentLog.resume(files, directory, identity, log_options(options), end, reader, events)
        # Of what was found, readers hear from the log from here on.
        end_recovery(directory)
        expires = bool(meta.required & EXPIRY) or memtable.has_expiring
        expires = expires or any(part.has_expiring for _, part in memtable.parts.written())
        if expires:
            # Durability: the meta says what the log needs, and so this too, before there is a leaf that a version which
            # does not know it takes for damage. What was replayed may be of an older segment.
            log.required |= EXPIRY
        report = RecoveryReport(
            created=created,
            meta_choice=str(pages.choice),
            checkpoint_seqno=checkpoint_seqno,
            row=end.row.name.lower(),
            detail=end.detail,
            commits=commits,
            bytes_replayed=size,
            cut_bytes=end.cut_bytes,
            last_seqno=last,
            durable_seqno=end.watermark,
            carried=max(0, last - end.watermark),
            withheld=0,
            seconds=files.monotonic_s() - started_s,
        )
    except BaseException:
        pages.close()
        raise
    return Recovered(directory, pages, log, reader, state, report, events, expires)


def replay(
    reader: LogReader,
    after: Seqno,
    memtable: Memtable,
    floor: Seqno,
    go_on_in: Callable[[Memtable, int], Memtable] | None = None,
) -> tuple[int, int, LogEnd]:
    """Bring the commits beyond `after` into the memtable; returns how many there were, their bytes, and the log's end.

    No reader sees anything of it yet. `floor`: a commit that is known to be on disk from elsewhere. `go_on_in`: asked
    behind each segment, with the memtable and the time of its last commit, for that of the next one.
    """
    # Most commits are one put, which needs nothing but a dict. What came since the last other commit is in this one.
    puts = Puts({})
    pending = puts.content
    size = counted = 0

    def write_pending(before: Seqno) -> None:
        if pending:
            # Each of them came before `before`, and after the last range that was deleted.
            memtable.write(Seqno(before - 1), pending, 0)
            pending.clear()

    def next_memtable(last: Seqno, time_us: int) -> None:
        nonlocal memtable, counted
        assert go_on_in is not None, "it is asked for"
        write_pending(Seqno(last + 1))
        memtable.bytes_used += puts.size - counted
        counted = puts.size
        memtable = go_on_in(memtable, time_us)

    found = reader.replay(after, floor, puts, None if go_on_in is None else next_memtable)
    for record in found:
        write_pending(record.seqno)
        batch = record.batch()
        memtable.write(record.seqno, batch.writes, record.size, batch.ranges, batch.parts())
        size += record.size
    end = found.end
    write_pending(Seqno(end.last_seqno + 1))
    memtable.bytes_used += puts.size - counted
    return end.last_seqno - after, size + puts.size, end


def replay_part(reader: LogReader, after: Seqno, until: Seqno, memtable: Memtable) -> tuple[int, int]:
    """As `replay`, but only up to `until`; returns the commits and their bytes."""
    size = 0
    for record in reader.replay(after=after, floor=after):
        if record.seqno <= until:
            batch = record.batch()
            memtable.write(record.seqno, batch.writes, record.size, batch.ranges, batch.parts())
            size += record.size
    return max(0, until - after), size
