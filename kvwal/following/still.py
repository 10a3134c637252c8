"""The engine of a store that is opened with flag "r": that of a follower which moves only where it must.

It takes no lock and excludes no other process. What it shows:

- Beside a process that has it open for writing: the state after the last commit that is on disk, as a follower does.
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
from typing import Any, ClassVar

from kvwal.engine.create import create_if_missing, erase, has_writer
from kvwal.engine.engine import Engine
from kvwal.engine.recovery import Recovered, RecoveryReport, replay, replay_part
from kvwal.engine.state import State
from kvwal.events import Events
from kvwal.files import Directory
from kvwal.files.names import POISONED
from kvwal.following.doubt import signs
from kvwal.following.engine import FollowedEngine
from kvwal.following.progress import Progress
from kvwal.log import LogReader, TailRow, Watch
from kvwal.options import Flag, Options
from kvwal.pages import FollowedPages
from kvwal.readers.pin import PinMaker

__all__ = ["StillEngine", "open_engine"]


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
        while not has_writer(directory, options):
            found = _all_that_verifies(directory, options)
            if found is not None:
                return found
        return super()._recovered(directory, options, pins)


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
