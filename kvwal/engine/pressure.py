"""Write pressure: what a commit must see to before it is made, when memory or disk is short.

A commit that finds `WritePressure.is_on` calls `relieve`: it waits while the memtable is at twice its budget and the
one before is still being checkpointed, and sees to it that the reserve is held before anything is put. It waits as well
while an archive with `on_behind="stall"` is behind by its limit. A thread that waits for that owns no lock and has no
place in the commit queue, so checkpoints, the archive and the commits of the engine's own jobs go on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from kvwal.engine.archives import Archives
from kvwal.engine.memtable import Memtable
from kvwal.engine.state import State
from kvwal.errors import DiskFullError, RefusedError, stalled
from kvwal.events import Events, Stall
from kvwal.files import Directory, is_full
from kvwal.files.names import RESERVE
from kvwal.locks import Lock, locked, new_lock, refuse_nested
from kvwal.options import RESERVE_BYTES, Options

__all__ = ["STALLED_AT", "Relief", "Reserve", "WritePressure"]

#: A memtable of this many times its budget makes writers wait.
STALLED_AT: Final = 2
# And of this many, where no checkpoint can be made, one that only deletes, too.
_SPENT_AT: Final = 3
# How often a commit that waits for an archive looks.
_LOOK_S: Final = 0.01


class Reserve:
    """A file that only holds space, given up when the disk is full so that deleting can go on."""

    def __init__(self, directory: Directory, mode: int) -> None:
        self._directory = directory
        self._mode = mode
        self._held = False
        #: Its sections take no other lock.
        self.lock = new_lock()

    @locked
    def hold(self) -> bool:
        """Take the space, if it is not held. False if there is none; other failures are let pass."""
        if self._held:
            return True
        directory = self._directory
        try:
            if directory.kind(RESERVE) is not None:
                # A crash may have left it empty, and then it would hold nothing.
                file = directory.open(RESERVE, write=True)
            else:
                file = directory.open(RESERVE, create=True, mode=self._mode)
        except OSError as error:
            return not is_full(error)
        try:
            is_new = file.size() < RESERVE_BYTES
            file.allocate(0, RESERVE_BYTES)
            if is_new:
                # Durability: of the size as well, so that after a crash it is whole, or made whole by the next open.
                file.sync()
        except OSError as error:
            file.close()
            directory.unlink(RESERVE)
            return not is_full(error)
        file.close()
        self._held = True
        return True

    @locked
    def release(self) -> bool:
        """Give the space back. False if none is held."""
        if not self._held:
            return False
        # First: where this is interrupted, the file may be gone, and if it is there, `hold` finds it.
        self._held = False
        try:
            self._directory.unlink(RESERVE)
        except OSError:
            # A copy-on-write file system may need space even for that: then there is no reserve.
            self._held = True
            return False
        # The space is only free for others once the removal is on disk.
        self._directory.sync()
        return True


class Relief(Protocol):
    """What moves data from memory to the pages, and frees disk space."""

    def refuse_commit(self) -> None:
        """ReentrancyError if the calling thread is in a section that a commit may have to wait for."""
        ...

    def is_here(self) -> bool:
        """Whether `start` makes the checkpoint itself, and returns when it is made."""
        ...

    def start(self) -> BaseException | None:
        """Have a checkpoint made, here or in the background. Returns why none can be made, if that is known."""
        ...

    def shorten_log(self) -> None:
        """Make the checkpoint that the log asks for, where no background thread does."""
        ...

    def refuse_reentry(self) -> None:
        """ReentrancyError if the calling thread is in the middle of a checkpoint, for which it cannot wait."""
        ...

    def reclaim(self) -> bool:
        """Get the space back that deletes have freed. False if there was nothing to do."""
        ...

    def free_space(self) -> bool:
        """Free what a consumer, or else the window, holds. False if there is neither."""
        ...


class WritePressure:
    """Back-pressure by memory and disk on the commits of one store."""

    def __init__(self, state: State, reserve: Reserve, events: Events, options: Options) -> None:
        self._state = state
        self.memtable_bytes = options.memtable_bytes
        self._reserve = reserve
        self._events = events
        self._now_s = options.files.monotonic_s
        # Set when a commit met a full disk: the next one is to reclaim what deletes have freed.
        self._short_of_space = False
        # Waiters of commits that wait for a checkpoint to end. (No Event: a signal handler that raises in a thread that
        # waits for one could leave the lock inside of it held.)
        self._waiting: deque[threading.Lock] = deque()
        self.relief: Relief | None = None
        #: Those that are kept of the store.
        self.archives = Archives()
        #: Set when a writer should look after memory or disk before its next commit.
        self.is_on = self.is_full()

    @property
    def lock(self) -> Lock:
        """That of the reserve."""
        return self._reserve.lock

    def is_full(self) -> bool:
        """Whether the memtable is past its budget, so that a checkpoint should start."""
        return self._state.version.memtable.bytes_used > self.memtable_bytes

    def would_wait(self) -> bool:
        """Whether a commit may have to wait, for a checkpoint or an archive."""
        return self.is_full() or self.archives.is_behind()

    def _is_stalled(self) -> bool:
        """Whether it is at twice its budget while the one before is still being checkpointed: writers wait."""
        version = self._state.version
        return version.frozen is not None and self.would_stall(version.memtable)

    def _is_spent(self) -> bool:
        """Whether what memory has for deletes, which may be the way out, is used up as well."""
        return self._state.version.memtable.bytes_used > _SPENT_AT * self.memtable_bytes

    def would_stall(self, memtable: Memtable) -> bool:
        """Whether this one is at twice its budget."""
        return memtable.bytes_used > STALLED_AT * self.memtable_bytes

    # -- from the commit leader -------------------------------------------------------------------

    def disk_is_full(self) -> None:
        """A commit met a full disk."""
        self._short_of_space = True
        self.is_on = True

    def release_reserve(self) -> bool:
        """Give the reserve up for a delete. Until it is held again, commits look after it before they put anything."""
        self.is_on = True
        return self._reserve.release()

    # -- from a thread that is about to commit ------------------------------------------------------

    def relieve(self, *, deleting: bool, may_wait: Callable[[], object] = lambda: None) -> None:
        """See to memory and disk. `may_wait`: asked as long as it waits for an archive; what it raises ends that.

        DiskFullError if the reserve cannot be held, unless the commit only deletes: what is left is for that.
        ArchiveBehindError if an archive is behind by its limit and fails; ReentrancyError if it is behind, and the call
        came from within another one of the store.
        """
        self._state.refuse_if_gone()
        relief = self.relief
        if relief is None:
            return  # The store is read-only: the commit is refused in a moment.
        relief.refuse_commit()
        self.is_on = False
        self._make_room(relief, deleting)
        self._wait_for_archives(may_wait)
        if not deleting and (self._short_of_space or not self._reserve.hold()):
            self._short_of_space = False
            began_s = self._now_s()
            if relief.reclaim():
                self._tell_stall("disk", began_s)
        held = self._reserve.hold()
        while not held and not deleting and relief.free_space():
            held = self._reserve.hold()
        if not held:
            self.is_on = True
            if not deleting:
                raise DiskFullError(
                    "the disk is full but for what is kept for deleting; free some space, or delete keys, and try again"
                )

    def free_space(self) -> bool:
        """A commit met a full disk: whether it is worth trying again, since something gave way."""
        return self.relief is not None and self.relief.free_space()

    def _make_room(self, relief: Relief, deleting: bool) -> None:
        if not self.is_full():
            relief.shorten_log()
            return
        began_s = self._now_s()
        waited = relief.is_here()
        failure = relief.start()
        try:
            while self._is_stalled():
                # No checkpoint comes any more once the store is closed.
                self._state.refuse_if_gone()
                relief.refuse_reentry()
                if failure is not None:
                    # The next commit is to look again: else every second one would slip through into memory.
                    self.is_on = True
                    if deleting and isinstance(failure, DiskFullError | RefusedError) and not self._is_spent():
                        break
                    raise stalled(failure) from failure
                waited = True
                self._wait(1.0)
                failure = relief.start()
        finally:
            if waited:
                self._tell_stall("memory", began_s)

    def _wait_for_archives(self, may_wait: Callable[[], object]) -> None:
        archives = self.archives
        if not archives.is_behind():
            return
        # The other threads are to wait as well, and the next commit looks again.
        self.is_on = True
        # The interrupted call may own what the archive waits for.
        refuse_nested("a commit that must wait for an archive")
        began_s = self._now_s()
        try:
            while archives.is_behind():
                self._state.refuse_if_gone()
                may_wait()
                archives.hasten()
                time.sleep(_LOOK_S)
        finally:
            self._tell_stall("archive", began_s)

    def _tell_stall(self, reason: str, began_s: float) -> None:
        if self._events.listeners:
            self._events.tell(Stall(reason, self._now_s() - began_s))

    def _wait(self, timeout_s: float) -> None:
        """Wait until a checkpoint ended, one way or the other."""
        waiter = threading.Lock()
        waiter.acquire()
        self._waiting.append(waiter)
        # Checked again after the waiter can be opened: a checkpoint that ended before is seen here.
        if self._is_stalled():
            waiter.acquire(timeout=timeout_s)

    # -- from a checkpoint ------------------------------------------------------------------------

    def checkpoint_ended(self) -> None:
        """Wake the commits that wait for it."""
        while self._waiting:
            # No other thread opens it: who takes it out of the queue has it alone.
            self._waiting.popleft().release()

    def take_reserve_for_checkpoint(self) -> bool:
        """A checkpoint met a full disk. False if there is no reserve."""
        if not self._reserve.release():
            return False
        # Commits are to see to it that the reserve is held again before they put anything.
        self.is_on = True
        return True

    def hold_reserve(self) -> bool:
        """Take the reserve again, if there is space."""
        return self._reserve.hold()
