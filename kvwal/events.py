"""What an open store tells its listeners: commits, flushes, checkpoints, and what goes wrong.

Rules:

- An event is told after the fact, by the thread that did it, and never under `State.lock`. The leader of a group tells
  `CommitGroup`, `Flush`, `SegmentSealed` and most often `Poison`, while it leads. The thread of a checkpoint tells
  `Checkpoint` and `Retire`. The thread of a commit that had to wait tells `Stall`, and the one that opens the store
  `Recovery`, the first event of all.
- A listener should be quick, since commits wait for it, and must not wait for another thread that writes. It may read
  the store. What would wait for its own thread raises `ReentrancyError`: a write where the thread leads, a checkpoint
  within a checkpoint. `close` returns at once, and the store is closed when the call that told the event is over.
- `CommitGroup` events are told in the order of their seqnos, without gaps, from the commit after `Recovery` on. Only an
  interruption, or a bug that poisons the store, may cost an event; `first_seqno` of the next one shows that. By the
  time that `close` returns all are told; a commit that shared a group may return a moment before.
- Without a listener no event is made: a module that has one asks `if events.listeners:` first.
- A listener that raises an `Exception` is logged, with its traceback, as an error of the logger "kvwal", and dropped,
  because it would meet the next event in a state that it did not foresee. Commits and other listeners go on.
- What is no `Exception`, a `KeyboardInterrupt` for one, is raised in the main thread: there a signal handler raised it,
  and the listener stays. The call it goes through ends as if it was interrupted: a commit that was written says so in a
  note. In other threads, where no signal handler runs, the listener raised it and is dropped.
- A listener that refers to its `Store` keeps it from being collected: close the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvwal.calling import refuse_unrun
from kvwal.keys import Seqno

__all__ = [
    "Checkpoint",
    "CommitGroup",
    "Event",
    "Events",
    "Flush",
    "Listener",
    "Poison",
    "Recovery",
    "Retire",
    "SegmentSealed",
    "Stall",
    "Waiting",
]

_log = logging.getLogger("kvwal")


@dataclass(frozen=True, slots=True)
class CommitGroup:
    """Commits that were written with one append became visible.

    Attributes:
        first_seqno, last_seqno: the commits, both inclusive.
        size: bytes of their keys and values, and of the bounds of the ranges they deleted.
        synced: whether the log was flushed for them before they became visible.
        seconds: from before the append to the moment they are visible.
    """

    first_seqno: Seqno
    last_seqno: Seqno
    size: int
    synced: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Flush:
    """The log was flushed. durable_seqno: the last commit on disk since. seconds: how long it took."""

    durable_seqno: Seqno
    seconds: float


@dataclass(frozen=True, slots=True)
class SegmentSealed:
    """A segment of the log is complete. file: its name. size: its bytes. first_seqno, last_seqno: what it holds."""

    file: str
    size: int
    first_seqno: Seqno
    last_seqno: Seqno


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Commits were brought into the pages, and the generation that has them is on disk.

    Attributes:
        generation: its number. seqno: the last commit in it.
        keys: how many were put or deleted, of all tables, those of deleted ranges not counted.
        seconds: how long it took.
    """

    generation: int
    seqno: Seqno
    keys: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Retire:
    """Segments of the log were removed. files: their names. oldest_seqno: the first commit that is still kept."""

    files: tuple[str, ...]
    oldest_seqno: Seqno


@dataclass(frozen=True, slots=True)
class Stall:
    """A commit had to wait for checkpoints or an archive, or to make checkpoints itself.

    Attributes:
        reason: "memory" when the memtable was full, "disk" when the disk was, "archive" when an archive was behind.
        seconds: how long it waited, whether it was written then or refused.
    """

    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Poison:
    """A write or flush failed: no more writes until the store is reopened. Told once. cause: the first failure."""

    cause: BaseException


@dataclass(frozen=True, slots=True)
class Recovery:
    """The store was opened.

    Attributes:
        generation: of the pages that were found. checkpoint_seqno: the last commit in them.
        last_seqno: the last commit recovered. records: how many were replayed from the log.
        seconds: how long it took.
    """

    generation: int
    checkpoint_seqno: Seqno
    last_seqno: Seqno
    records: int
    seconds: float


Event: TypeAlias = CommitGroup | Flush | SegmentSealed | Checkpoint | Retire | Stall | Poison | Recovery


class Listener:
    """Whatever wants to hear of a store. Inherit from it, and define the methods for the events that you want.

    `kvwal.open(path, listeners=[listener])` tells it. Several threads may call it at a time.
    """

    def commit_group(self, event: CommitGroup) -> None:
        """Commits became visible."""

    def flush(self, event: Flush) -> None:
        """The log was flushed."""

    def segment_sealed(self, event: SegmentSealed) -> None:
        """A segment of the log is complete."""

    def checkpoint(self, event: Checkpoint) -> None:
        """A new generation of pages is on disk."""

    def retire(self, event: Retire) -> None:
        """Segments of the log were removed."""

    def stall(self, event: Stall) -> None:
        """A commit had to wait."""

    def poison(self, event: Poison) -> None:
        """The store takes no more writes."""

    def recovery(self, event: Recovery) -> None:
        """The store was opened."""


class Waiting(Listener):
    """A listener for which a thread sleeps. It is woken when the store is closed as well."""

    def wake(self) -> None:
        """Let the thread go on. Idempotent."""


_METHODS: Final[dict[type[Event], str]] = {
    CommitGroup: "commit_group",
    Flush: "flush",
    SegmentSealed: "segment_sealed",
    Checkpoint: "checkpoint",
    Retire: "retire",
    Stall: "stall",
    Poison: "poison",
    Recovery: "recovery",
}


class Events:
    """The listeners of one store. Thread-safe, and from signal handlers and finalizers too: it takes no lock."""

    __slots__ = ("_well", "listeners")

    def __init__(self, listeners: Iterable[Listener] = ()) -> None:
        #: By identity, in the order they came. Each change, and each look at all of them, is one step of a dict, which
        #: stays the same one.
        self.listeners: dict[int, Listener] = {id(listener): listener for listener in listeners}
        # The first failure takes what is in it.
        self._well = [True]

    def add(self, listener: Listener) -> None:
        """Tell `listener` of all events from now on, after those that were added before. Once, however often added.

        A group of commits that is under way is not told to it.
        """
        self.listeners.setdefault(id(listener), listener)

    def remove(self, listener: Listener) -> None:
        """Tell it no more. An event that is being told may still reach it. Harmless if it is not there."""
        self.listeners.pop(id(listener), None)

    def end(self) -> None:
        """Drop all, and wake those that wait: nothing comes any more. Their threads then find the store closed."""
        for listener in list(self.listeners.values()):
            if isinstance(listener, Waiting):
                listener.wake()
        self.listeners.clear()

    def tell(self, event: Event) -> None:
        """Tell all listeners. What a listener does wrong is logged, and drops it; only an interruption is raised."""
        method = _METHODS[type(event)]
        for listener in list(self.listeners.values()):
            try:
                refuse_unrun(getattr(listener, method)(event), is_used=False)
            except BaseException as error:  # it is logged, and the commit must not fail for it
                if not isinstance(error, Exception) and threading.get_ident() == threading.main_thread().ident:
                    raise
                self.remove(listener)
                _log.exception("%r raised at %r and will hear no more of this store", listener, event)

    def tell_poison(self, cause: BaseException) -> None:
        """Tell `Poison`, the first time only: what fails after the first failure is no news."""
        try:
            self._well.pop()
        except IndexError:
            return
        if self.listeners:
            self.tell(Poison(cause))
