"""The engine of a follower: that of a store opened read-only, without a lock, which goes on from commit to commit."""

from __future__ import annotations

import errno
from functools import partial
from typing import ClassVar

from kvwal.engine.create import create_if_missing, erase, open_directory
from kvwal.engine.engine import Engine
from kvwal.engine.past import Past
from kvwal.engine.reads import Reads
from kvwal.engine.recovery import Recovered, RecoveryReport, failures_at
from kvwal.engine.state import State
from kvwal.engine.value import Value
from kvwal.errors import read_only
from kvwal.events import Events
from kvwal.files import Directory
from kvwal.files.names import DATA
from kvwal.following.doubt import until_still
from kvwal.following.past import FollowedPast
from kvwal.following.progress import Progress, fill
from kvwal.locks import new_lock
from kvwal.log import LogReader, RefusingLog, Watch
from kvwal.options import Options
from kvwal.pages import FollowedPages
from kvwal.pages.meta import Meta
from kvwal.readers.pin import HeldPin, PinMaker

__all__ = ["FollowedEngine", "recovered_beside"]


class FollowedReads(Reads):
    """Reads of a follower: those of now begin again where pages went under them."""

    def read(
        self,
        key: bytes,
        *,
        table: int = 0,
        cached_only: bool = False,
        raw: bool = False,
        at_us: int | None = None,
    ) -> Value:
        """As `Reads.read`."""
        found = partial(super().read, key, table=table, cached_only=cached_only, raw=raw, at_us=at_us)
        return self.moments.now.again(found)

    def count(self, start: bytes | None = None, stop: bytes | None = None, *, table: int = 0) -> int:
        """As `Reads.count`."""
        return self.moments.now.again(lambda: super(FollowedReads, self).count(start, stop, table=table))

    def key_at(self, rank: int, *, table: int = 0) -> bytes | None:
        """As `Reads.key_at`."""
        return self.moments.now.again(lambda: super(FollowedReads, self).key_at(rank, table=table))


class _FollowedLog(RefusingLog):
    """Takes no commits. But there will be more, so that one who waits for them is not refused."""

    __slots__ = ()

    def sync(self) -> None:  # type: ignore[override]  # that one never returns
        """Nothing to flush."""


class FollowedEngine(Engine):
    """What a follower reads: an engine without lock, log and thread."""

    _reads_type: ClassVar[type[Reads]] = FollowedReads
    _past_type: ClassVar[type[Past]] = FollowedPast
    #: Whether one may wait for commits.
    _waits: ClassVar[bool] = True

    @classmethod
    def attach(cls, path: str, options: Options, *, pin: bool = True, name: str | None = None) -> FollowedEngine:
        """Begin with the newest moment. See `kvwal.follow` for the arguments, and for what is raised."""
        with failures_at(path):
            directory, _ = open_directory(path, "r", options)
            try:
                pins = PinMaker(options.files, directory, name) if pin else None
                return until_still(directory, lambda: cls._begun(directory, options, pins), lambda: None)
            except BaseException:
                directory.close()
                raise

    @classmethod
    def _begun(cls, directory: Directory, options: Options, pins: PinMaker | None) -> FollowedEngine:
        recovered, progress = cls._recovered(directory, options, pins)
        try:
            return cls(recovered, progress, options)
        except BaseException:
            progress.close()
            recovered.pages.close()
            raise

    def __init__(self, recovered: Recovered, progress: Progress, options: Options) -> None:
        #: How it moves.
        self.progress = progress
        recovered.feed = progress.feed if self._waits else progress.feed_now
        super().__init__(recovered, options)
        past = self.upkeep.past
        assert isinstance(past, FollowedPast)
        progress.begin(self._publisher, self._succession, self._keeping, self.reads.moments, past)
        if self._waits:
            self.queue.refuse(_FollowedLog(read_only, self.state.seqno))

    @classmethod
    def _recovered(
        cls, directory: Directory, options: Options, pins: PinMaker | None
    ) -> tuple[Recovered, Progress]:
        """The newest moment, and how it moves on from there."""
        return recovered_beside(directory, options, pins)

    def _let_go(self) -> None:
        super()._let_go()
        self.progress.close()

    def _abandon_files(self) -> None:
        super()._abandon_files()
        self.progress.close()

    def _leave_to_parent(self) -> None:
        super()._leave_to_parent()
        self.progress.lock = new_lock()


def recovered_beside(
    directory: Directory, options: Options, pins: PinMaker | None = None
) -> tuple[Recovered, Progress]:
    """The newest moment, as recovery would find it, up to the last commit that is on disk for sure."""
    started_s = options.files.monotonic_s()
    erase(directory, "r", options)
    create_if_missing(directory, "r", options)

    def make_pin(meta: Meta) -> HeldPin | None:
        return None if pins is None else pins.pin(meta.store_id, meta.line, meta.generation, meta.seqno)

    pages = FollowedPages(directory, cache_bytes=options.cache_bytes, make_pin=make_pin)
    watch: Watch | None = None
    try:
        meta = pages.meta
        state = State(pages, cache_bytes=options.cache_bytes)
        reader = LogReader(directory, meta.store_id)
        # Durability: the log was flushed so far before the flip.
        watch = Watch(reader, meta.replay_through)
        watch.look()
        last = watch.durable
        newest_us = fill(state.version.memtable, reader, meta.seqno, last)
        if pages.is_replaced():
            # What was read of the log may be another store's: from the beginning.
            raise FileNotFoundError(errno.ENOENT, "the page file was replaced as it was read", DATA)
        state.horizon = state.seqno = last
        detail, size = f"the log is followed from commit {last} on", state.version.memtable.bytes_used
        # Nothing is cut off or written again.
        read = str(pages.choice), meta.seqno, "followed", detail, last - meta.seqno, size, 0, last, last, 0
        report = RecoveryReport(False, *read, max(0, watch.written - last), options.files.monotonic_s() - started_s)
        events = Events(options.listeners)
        recovered = Recovered(directory, pages, None, reader, state, report, events, expires=True)
        return recovered, Progress(options.files, directory, pages, state, reader, watch, newest_us)
    except BaseException:
        if watch is not None:
            watch.close()
        pages.close()
        raise
