"""What an open store tells its listeners: commits, flushes, checkpoints, and what goes wrong.

Rules:

- An event is told after the fact, by the thread that did it: the leader of a commit group, or the background thread.
  A listener should be quick, since commits wait for it. A write to the same store from a listener raises
  `ReentrancyError` where the thread leads a commit; reads work.
- Without a listener no event is made: a module that has one asks `if events.listeners:` first.
- A listener that raises an `Exception` is logged, with its traceback, as an error of the logger "kvwal", and dropped,
  because it would meet the next event in a state that it did not foresee. Commits and other listeners go on. What is
  no `Exception`, a `KeyboardInterrupt` or a `SystemExit`, is not the listener's fault, and is raised.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

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
]

_log = logging.getLogger("kvwal")


@dataclass(frozen=True, slots=True)
class CommitGroup:
    """Commits that were written with one append became visible.

    Attributes:
        first_seqno, last_seqno: the commits, both inclusive.
        size: bytes of their keys and values.
        synced: whether the log was flushed for them.
        seconds: from the first append to the moment they are visible.
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
        keys: how many keys were written. seconds: how long it took.
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
    """A commit had to wait for a checkpoint. reason: "memory" or "disk". seconds: how long it waited."""

    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Poison:
    """A write or flush failed: no more writes until the store is reopened. cause: the failure."""

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


class Listener(Protocol):
    """Whatever wants to hear of a store. Inherit from it, and define the methods for the events that you want."""

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

    __slots__ = ("listeners",)

    def __init__(self) -> None:
        #: By identity, in the order they came. Each change, and each look at all of them, is one step of a dict.
        self.listeners: dict[int, Listener] = {}

    def add(self, listener: Listener) -> None:
        """Tell `listener` of all events from now on, after those that were added before. Once, however often added."""
        self.listeners.setdefault(id(listener), listener)

    def remove(self, listener: Listener) -> None:
        """Tell it no more. An event that is being told may still reach it. Harmless if it is not there."""
        self.listeners.pop(id(listener), None)

    def tell(self, event: Event) -> None:
        """Tell all listeners. Never raises for what a listener does wrong: logs that, and drops the listener."""
        method = _METHODS[type(event)]
        for listener in list(self.listeners.values()):
            try:
                getattr(listener, method)(event)
            except Exception:  # noqa: BLE001  # it is logged, and the commit must not fail for it
                self.remove(listener)
                _log.exception("%r raised at %r and will hear no more of this store", listener, event)
