"""The engine of a store that is opened with flag "r": that of a follower which moves only where it must.

It takes no lock and excludes no other process. What it shows:

- Beside a process that has it open for writing: the state after the last commit that is on disk, as a follower does.
  Where more is written, it waits for up to 0.13 s: the writer may be about to say that it is on disk. If the writer
  recovers the store, as the file `lock` says then, it waits until that is done, for up to 10 s.
- Else all that verifies, once this has flushed it. Where that fails, or the writer left word that its own flush had
  failed, the state at the watermark.

It stays there. When the pages that it reads are gone, reads of now go on from the newest commit that is on disk.

Why all that verifies may be shown without a lock: at the end of the look no process had the lock, and no segment, nor
the header of the newest, nor a slot, nor the word of a failed flush was another than before it began. So a recovery by
then would have found what was read here, and a later one keeps it: it gives up only what does not verify, and what only
a failed flush brought on disk, of which its writer leaves word. A writer that was there only meanwhile, and replaced
what it had written, or recovered what lies beyond the watermark, left a newer segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

from kvwal.engine.create import create_if_missing, erase, has_writer
from kvwal.engine.engine import Engine, wait_for_abandoned
from kvwal.engine.recovery import Recovered, RecoveryReport, replay, replay_part
from kvwal.engine.state import State
from kvwal.errors import CorruptionError, FormatError
from kvwal.events import Events
from kvwal.files import Directory, is_recovering
from kvwal.files.names import POISONED
from kvwal.following.doubt import signs
from kvwal.following.engine import FollowedEngine
from kvwal.following.progress import Progress
from kvwal.log import LogReader, TailRow, Watch
from kvwal.options import Flag, Options
from kvwal.pages import FollowedPages
from kvwal.readers.pin import PinMaker

__all__ = ["StillEngine", "open_engine"]

# A writer that is idle says within 0.1 s that all of it is on disk: so long in all, and a little longer.
_PAUSES_S: Final = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
# Then for one that recovers: the last of these again and again, 10 s in all. It may be stopped.
_MOST_PAUSES: Final = 162


def open_engine(path: str, flag: Flag, options: Options, describe: Callable[[Engine], dict[str, Any]]) -> Engine:
    """The engine of the store at `path`. See `kvwal.open` for what is raised, and `Engine.open` for `describe`."""
    if flag == "r":
        return StillEngine.attach(path, options, pin=False)
    return Engine.open(path, flag, options, describe)


class StillEngine(FollowedEngine):
    """What a store opened with flag "r" reads."""

    _waits: ClassVar[bool] = False

    @classmethod
    def _recovered(
        cls, directory: Directory, options: Options, pins: PinMaker | None
    ) -> tuple[Recovered, Progress]:
        may_wait = True
        while True:
            while not has_writer(directory, options):
                found = _all_that_verifies(directory, options)
                if found is not None:
                    return found
            # Of this process: one that was closed within a call, or dropped, has its lock until its thread is done.
            if wait_for_abandoned():
                continue
            recovered, progress = super()._recovered(directory, options, pins)
            if not (may_wait and recovered.report.withheld):
                return recovered, progress
            try:
                is_over = _await_writer(directory, options, recovered)
            except BaseException:
                progress.close()
                recovered.pages.close()
                raise
            if not is_over:
                return recovered, progress
            # Once: a writer that is busy has always written more than is on disk.
            may_wait = False
            progress.close()
            recovered.pages.close()


def _await_writer(directory: Directory, options: Options, recovered: Recovered) -> bool:
    """Wait a little until all that was found is on disk. Whether to look again: it is, or the writer is gone.

    A writer says so with its next commit, or when it is idle. One that recovers says nothing before it is done, and
    then a newer segment does. It is waited for, since what it withholds may have been shown before it came.
    """
    seqno = recovered.state.seqno
    written = seqno + recovered.report.withheld
    watch = Watch(recovered.reader, seqno)
    try:
        recovered_meanwhile = False
        for n in range(_MOST_PAUSES):
            recovers = is_recovering(directory)
            if n >= len(_PAUSES_S) and not recovers:
                return recovered_meanwhile
            recovered_meanwhile = recovered_meanwhile or recovers
            options.files.give_way(_PAUSES_S[min(n, len(_PAUSES_S) - 1)])
            if not has_writer(directory, options):
                return True
            try:
                watch.look()
            except (CorruptionError, FormatError, FileNotFoundError):
                # It may be just changing that.
                return True
            if watch.durable >= written:
                return True
        return False
    finally:
        watch.close()


def _all_that_verifies(directory: Directory, options: Options) -> tuple[Recovered, Progress] | None:
    """The state as a recovery would find it; None if a writer came meanwhile."""
    started_s = options.files.monotonic_s()
    before = _signs(directory)
    erase(directory, "r", options)
    create_if_missing(directory, "r", options)
    pages = FollowedPages(directory, cache_bytes=options.cache_bytes)
    watch: Watch | None = None
    try:
        meta = pages.meta
        state = State(pages, cache_bytes=options.cache_bytes)
        reader = LogReader(directory, meta.store_id)
        # Durability: the log was flushed so far before the flip.
        commits, size, end = replay(reader, meta.seqno, state.version.memtable, meta.replay_through)
        last, doubt = end.last_seqno, ""
        if last > end.watermark:
            last, why = reader.flush(end)
            if last < end.last_seqno:
                pages.pins.hold(state, ())
                state = State(pages, cache_bytes=options.cache_bytes)
                commits, size = replay_part(reader, meta.seqno, last, state.version.memtable)
                doubt = f"; commits beyond {last} are not shown: {why}"
        elif end.row is not TailRow.CLOSED:
            # Durability: a recovery that was cut off may not have come so far.
            reader.flush_names()
        # Durability: looked at after the flush. A writer that is there now may still refuse what was read.
        if has_writer(directory, options) or _signs(directory) != before:
            pages.close()
            return None
        watch = Watch(reader, last)
        state.horizon = state.version.memtable.last_seqno = state.seqno = last
        # Nothing was made or written again.
        found = str(pages.choice), meta.seqno, end.row.name.lower(), end.detail + doubt, commits, size, end.cut_bytes
        shown = last, end.watermark, 0, end.last_seqno - last
        report = RecoveryReport(False, *found, *shown, options.files.monotonic_s() - started_s)
        recovered = Recovered(directory, pages, None, reader, state, report, Events(options.listeners), expires=True)
        return recovered, Progress(options.files, directory, pages, state, reader, watch, end.last_time_us)
    except BaseException:
        if watch is not None:
            watch.close()
        pages.close()
        raise


def _signs(directory: Directory) -> object:
    return signs(directory), directory.kind(POISONED)
