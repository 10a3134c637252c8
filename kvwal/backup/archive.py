"""`kvwal.archive`: a thread that keeps a destination up to date with an open store, and what can be asked of it.

Rules:
- A failure of the destination never reaches a commit: it is tried again, later and later, and told by `status`.
- What `status` says of lag is computed from the log by the thread that asks, so it grows when the worker is dead.
- Commits wait only for one with `on_behind="stall"`, and there not for ever: not from within another call of the store,
  not in the archive's own thread, not once it has failed for a while, was closed, or its thread is dead.
- One line of the log of messages a change of state, never one an attempt.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import get_ident
from types import TracebackType
from typing import Any, Final, Literal, Protocol, get_args

from kvwal.backup.archiver import Archiver
from kvwal.backup.bases import check_base
from kvwal.backup.claims import Superseded
from kvwal.backup.keeping import Keep
from kvwal.backup.making import backup
from kvwal.backup.port import Destination, DirectoryDestination, Where, destination_at
from kvwal.db.handle import Uncopied
from kvwal.engine.archives import Archives, ArchiveState, ArchiveStatus
from kvwal.engine.engine import Engine
from kvwal.errors import (
    ArchiveBehindError,
    ArchiveDiverged,
    ClosedError,
    FeedGap,
    ForkedError,
    PoisonedError,
    RefusedError,
)
from kvwal.files import process_id, start_thread
from kvwal.keys import Seqno, as_int, as_seconds
from kvwal.positions import Position

__all__ = ["Archive", "ArchiveStatus", "archive"]

_log = logging.getLogger("kvwal")

OnBehind = Literal["drop", "stall"]

_LEAST_BACK_OFF_S: Final = 0.1
_MOST_BACK_OFF_S: Final = 30.0
# A worker that waits for its time looks this often whether something else is due.
_MOST_WAIT_S: Final = 30.0
_STEP_S: Final = 0.005
# Commits wait so long for one that fails, as it may be over soon.
_PATIENCE_S: Final = 30.0


class _Opened(Protocol):
    @property
    def engine(self) -> Engine: ...


class _Told:
    """What the worker last said of itself, replaced by one assignment."""

    __slots__ = ("error", "since_s", "state")

    def __init__(self, state: ArchiveState, error: BaseException | None = None, since_s: float | None = None) -> None:
        self.state, self.error, self.since_s = state, error, since_s


class _Worker:
    """The thread. It refers to no `Archive`, so a forgotten one is collected, and ends it."""

    def __init__(
        self, archiver: Archiver, destination: Destination, close: Callable[[], object] = lambda: None
    ) -> None:
        """`close`: called when it has ended."""
        self.archiver = archiver
        self.destination = destination
        self.close = close
        self.told = _Told("starting")
        # Commits up to this one are to be archived at once.
        self.flush_to = Seqno(0)
        self.stopping = False
        # Putting is one C call, which a signal handler cannot leave half done.
        self.wake_ups: SimpleQueue[None] = SimpleQueue()
        self.thread = threading.Thread(target=self.run, name="kvwal-archive", daemon=True)

    def run(self) -> None:
        wait_s: float | None = 0.0
        back_off_s = _LEAST_BACK_OFF_S
        try:
            while True:
                self._sleep(0.0 if self.stopping else wait_s)
                mark = self.archiver.mark
                is_done = mark is not None and mark >= self.flush_to
                if self.stopping and (is_done or self.told.since_s is not None):
                    return
                try:
                    wait_s = self.archiver.step(now=mark is None or mark < self.flush_to)
                except (ClosedError, ForkedError):
                    return
                except Superseded as error:
                    self._tell(_Told("superseded", error))
                    return
                except Exception as error:  # noqa: BLE001  # a destination may raise anything
                    self._failed(error)
                    wait_s, back_off_s = back_off_s, min(2 * back_off_s, _MOST_BACK_OFF_S)
                else:
                    self._tell(_Told("archiving"))
                    back_off_s = _LEAST_BACK_OFF_S
        finally:
            self.archiver.close()
            if self.told.state != "superseded":
                # With what failed last, if it still did.
                self._tell(_Told("ended", self.told.error, self.told.since_s))
            self.close()

    def _sleep(self, wait_s: float | None) -> None:
        """Sleep until something is due, or is asked for."""
        take_back = None
        if wait_s is None:
            try:
                take_back = self.archiver.when_beyond(lambda: self.wake_ups.put(None))
            except (PoisonedError, ClosedError):
                pass
        try:
            self.wake_ups.get(timeout=self.archiver.idle_s() if wait_s is None else min(wait_s, _MOST_WAIT_S))
            while True:
                self.wake_ups.get_nowait()
        except Empty:
            pass
        if take_back is not None:
            take_back()

    def _failed(self, error: Exception) -> None:
        since_s = self.told.since_s if self.told.since_s is not None else time.monotonic()
        self._tell(_Told("diverged" if isinstance(error, ArchiveDiverged) else "failing", error, since_s))

    def _tell(self, told: _Told) -> None:
        before, self.told = self.told, told
        if before.state == told.state:
            return
        if told.error is not None:
            _log.error("archive in %r: %s: %s", self.destination, told.state, told.error)
        elif told.state == "archiving":
            _log.info("archive in %r: archiving again", self.destination)

    def stop(self) -> None:
        self.stopping = True
        self.wake_ups.put(None)


class _Stalling:
    """What commits ask that wait for an archive (see kvwal/engine/archives.py)."""

    def __init__(self, worker: _Worker) -> None:
        self._worker = worker

    def is_behind(self) -> bool:
        worker = self._worker
        # A destination, or a finalizer, may call the store from the thread that they would wait for.
        return worker.archiver.is_behind() and get_ident() != worker.thread.ident

    def hasten(self) -> None:
        worker, told = self._worker, self._worker.told
        if told.since_s is None:
            if worker.wake_ups.empty():
                worker.wake_ups.put(None)
        elif told.state == "diverged" or time.monotonic() - told.since_s >= _PATIENCE_S:
            raise ArchiveBehindError(
                f"the archive in {worker.destination!r} is behind by its max_behind_bytes, and fails: {told.error}; "
                "see to the destination and try again, or close the archive and go on without it"
            ) from told.error


class _Ticking:
    """A destination that calls `tick` when it is read from."""

    def __init__(self, destination: Destination, tick: Callable[[], object]) -> None:
        self._destination, self._tick = destination, tick

    def get(self, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        self._tick()
        return self._destination.get(name, start=start, size=size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._destination, name)


def make_base(engine: Engine, destination: Destination, tick: Callable[[], object]) -> None:
    """Have a base of the newest generation in a destination, proved there.

    Those that it builds on are not read again: what made them has, unless it was killed before.
    """

    def progress(done: int, total: int) -> None:
        tick()

    reading: Any = _Ticking(destination, tick)
    report = backup(engine, reading, progress=progress)
    if report.base not in report.made:
        # What a backup makes it has read back.
        check_base(reading, report.base)


def _status_of(archive: weakref.ref[Archive]) -> ArchiveStatus | None:
    known = archive()
    return None if known is None else known.status()


def _end(worker: _Worker, archives: Archives) -> None:
    worker.stop()
    archives.remove(worker)


class Archive(Uncopied):
    """An archive that is being kept up to date; made by `kvwal.archive`. Use it in a `with` block within the store's.

    Thread-safe. A task of asyncio uses the same object: `await asyncio.to_thread(archive.flush)`.
    """

    def __init__(self, engine: Engine, worker: _Worker, *, stalls: bool = False) -> None:
        self._engine = engine
        self._worker = worker
        self._pid = process_id()
        # By mark: when a commit beyond it was first seen to wait, and the time of that commit.
        self._waiting: tuple[Seqno, float, int | None] | None = None
        self._archives = engine.pressure.archives
        start_thread(worker.thread)
        self._archives.add(worker, partial(_status_of, weakref.ref(self)), _Stalling(worker) if stalls else None)
        # Also when the process exits.
        self._finalizer = weakref.finalize(self, _end, worker, self._archives)

    def __repr__(self) -> str:
        return f"<kvwal.Archive in {self._worker.destination!r}, {self._worker.told.state}>"

    def status(self) -> ArchiveStatus:
        """How it is doing, computed now. Reads one commit of the log if it is behind. ClosedError without its store."""
        self._engine.state.refuse_if_gone()
        worker, upkeep = self._worker, self._engine.upkeep
        archiver, told = worker.archiver, worker.told
        error = told.error or archiver.trouble
        # In this order: what is beyond the mark of then is held, and the mark never passes what is durable by then.
        oldest = upkeep.consumers.segments()[0].first_seqno
        mark = archiver.mark
        durable = upkeep.durable_seqno
        at = Seqno(0) if mark is None else mark
        gaps: list[tuple[Seqno, Seqno]] = [*archiver.gaps]
        if mark is not None and oldest > mark + 1 and told.state not in ("superseded", "ended"):
            # What comes of it is in the destination once that can be used again.
            gaps.append((Seqno(mark + 1), Seqno(oldest - 1)))
        return ArchiveStatus(
            destination=repr(worker.destination),
            state=told.state,
            mark=None if mark is None else Position(upkeep.consumers.line, mark),
            durable_seqno=durable,
            lag_s=self._lag_s(at, durable),
            behind_commits=max(0, durable - at),
            behind_bytes=upkeep.consumers.held_bytes(at) if durable > at else 0,
            gaps=tuple(gaps),
            error=None if error is None else f"{type(error).__name__}: {error}",
            failing_s=None if told.since_s is None else time.monotonic() - told.since_s,
            epoch=archiver.epoch,
            units=archiver.units,
            bases=archiver.bases,
        )

    def _lag_s(self, mark: Seqno, durable: Seqno) -> float:
        if durable <= mark:
            self._waiting = None
            return 0.0
        waiting = self._waiting
        if waiting is None or waiting[0] != mark:
            waiting = self._waiting = mark, time.monotonic(), self._time_us_beyond(mark)
        _, since_s, time_us = waiting
        # The commit may be of a clock that stood ahead; since it was first seen to wait at least so much has passed.
        lag_s = time.monotonic() - since_s
        if time_us is not None:
            lag_s = max(lag_s, (self._engine.reads.moments.clock.now_us() - time_us) / 1e6)
        return lag_s

    def _time_us_beyond(self, mark: Seqno) -> int | None:
        """The time of the oldest commit beyond the mark that the log has."""
        upkeep = self._engine.upkeep
        for after in (mark, None):
            try:
                with upkeep.read(after, upkeep.durable_seqno, "archive") as records:
                    for record in records:
                        return record.time_us
            except FeedGap:
                continue
        return None

    def flush(self, timeout_s: float | None = None) -> bool:
        """Archive all that was committed before the call, now; whether that is done. Flushes the store first.

        Args:
            timeout_s: at most so long; None: until it is done, or can never be.

        Returns: False where it was not done in time, or the archive has ended. Raises as `Store.sync` does; TypeError
        and ValueError for a time that cannot be.
        """
        if timeout_s is not None:
            timeout_s = as_seconds("timeout_s", timeout_s)
        self._engine.upkeep.sync()
        target = self._engine.upkeep.durable_seqno
        worker = self._worker
        worker.flush_to = max(worker.flush_to, target)
        worker.wake_ups.put(None)
        return self._wait(target, timeout_s)

    def _wait(self, target: Seqno, timeout_s: float | None) -> bool:
        worker, archiver = self._worker, self._worker.archiver
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        # The mark moves before the thread has said that it has begun.
        while archiver.mark is None or archiver.mark < target or worker.told.state == "starting":
            if not worker.thread.is_alive() or (until_s is not None and time.monotonic() >= until_s):
                return archiver.mark is not None and archiver.mark >= target
            time.sleep(_STEP_S)
        return True

    def close(self, timeout_s: float = 10.0) -> bool:
        """Archive what is durable by now, and end. Idempotent. The store stays open.

        Args:
            timeout_s: at most so long. What is not archived by then is archived when it is begun again.

        Returns: whether all is archived. It does not raise for failures of the destination, but TypeError and
        ValueError for a time that cannot be; then it goes on.
        """
        # No thread is waited for any longer.
        timeout_s = min(as_seconds("timeout_s", timeout_s), threading.TIMEOUT_MAX)
        worker = self._worker
        self._finalizer.detach()
        if process_id() != self._pid:
            # The worker is the parent's.
            return False
        target = worker.flush_to
        if not self._engine.is_closed:
            worker.flush_to = target = max(target, self._engine.upkeep.durable_seqno)
        worker.stop()
        worker.thread.join(timeout_s)
        self._archives.remove(worker)
        if worker.thread.is_alive():
            _log.warning("archive in %r: the destination hangs; closed without it", worker.destination)
        worker.archiver.close()
        mark = worker.archiver.mark
        return mark is not None and mark >= target

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def archive(
    db: _Opened,
    destination: Where,
    *,
    rpo_s: float = 1.0,
    keep: Keep | None = Keep(),  # noqa: B008  # it is frozen
    max_behind_bytes: int | None = None,
    on_behind: OnBehind = "drop",
) -> Archive:
    """Keep an archive of an open store in a destination: every durable commit, `rpo_s` seconds later at the latest.

    Args:
        db: the store, open for writing.
        destination: a directory on another disk, or an object with the calls of `kvwal.backup.port.Destination`.
        rpo_s: how long a durable commit waits until it is put there, in seconds: what a loss of the disk may cost.
        keep: how long what stays, see `Keep`; None: all of it for ever, and units are not merged.
        max_behind_bytes: log that is kept while the destination fails, beside what recovery needs; and until it first
            answers, as much of what is there now. None: as a consumer's, 1 GiB or a tenth of the free space.
        on_behind: what is done when there is more. "drop": the archive gets a gap, also when the disk is full, and a
            new base ends that. "stall": commits wait until the archive has gone on. They are refused as
            ArchiveBehindError once it has failed for 30 s, and on a full disk as DiskFullError. Closing the store or
            the archive ends their waiting: of the store with ClosedError, of the archive by going on without it.

    Returns at once: the destination is first asked by the thread, and failures are tried again (see `Archive.status`).
    Raises ReadOnlyError for a store that is open for reading, RefusedError if the system has no thread left,
    TypeError and ValueError.
    """
    rpo_s = as_seconds("rpo_s", rpo_s)
    if not 0 < rpo_s <= 86400:
        raise ValueError(f"rpo_s is a number of seconds up to 86400, not {rpo_s!r}")
    if max_behind_bytes is not None:
        max_behind_bytes = as_int("max_behind_bytes", max_behind_bytes, 0)
    if not (keep is None or isinstance(keep, Keep)):
        raise TypeError(f"keep is a kvwal.Keep or None, not {type(keep).__name__}")
    if on_behind not in get_args(OnBehind):
        raise ValueError(f'on_behind is "drop" or "stall", not {on_behind!r}')
    if not isinstance(getattr(db, "engine", None), Engine):
        raise TypeError(f"an archive is of an open store, and of its .store in asyncio, not of {type(db).__name__}")
    engine, place = db.engine, destination_at(destination)
    engine.state.refuse_if_gone()
    log, pressure, stalls = engine.upkeep.consumers.log(), engine.pressure, on_behind == "stall"
    if max_behind_bytes is None:
        max_behind_bytes = engine.upkeep.consumers.default_limits().max_bytes
    archiver = Archiver(
        engine, place, make_base, rpo_s=rpo_s, max_behind_bytes=max_behind_bytes, stalls=stalls, keep=keep
    )
    if stalls:
        # Only then commits look whether there is something to wait for, and only after a segment.
        log.retention.when_sealed = partial(setattr, pressure, "is_on", True)
    # What was made here, no one else uses.
    if isinstance(place, DirectoryDestination) and place is not destination:
        worker = _Worker(archiver, place, place.close)
    else:
        worker = _Worker(archiver, place)
    try:
        return Archive(engine, worker, stalls=stalls)
    except RefusedError:
        # What the thread does as it ends.
        archiver.close()
        worker.close()
        raise
