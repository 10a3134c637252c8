"""The archives that are kept of an open store: what they say of themselves, and for which of them commits wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeAlias

from kvwal.keys import Seqno
from kvwal.positions import Position

__all__ = ["ArchiveState", "ArchiveStatus", "Archives", "Stalling"]

ArchiveState: TypeAlias = Literal["starting", "archiving", "failing", "diverged", "superseded", "ended"]


@dataclass(frozen=True, slots=True)
class ArchiveStatus:
    """How an archive is doing. Sizes in bytes, times in seconds.

    Attributes:
        destination: where it is, as messages call it.
        state: "starting"; "archiving"; "failing", and tried again; "diverged": the destination has another history;
            "superseded": another archiver has taken over; "ended".
        mark: the last commit that was read back from the destination; None until that is known.
        durable_seqno: the last durable commit of the store.
        lag_s: age of the oldest durable commit beyond the mark; 0 if there is none.
        behind_commits: how many durable commits are beyond the mark. behind_bytes: log that is kept for them.
        gaps: commits whose moments cannot be restored, and that were not accepted: first and last of each gap, in
            order. The last one may be growing: while the destination fails it is what the log has no longer. Of the
            destination's it is what the archiver found when it began, and looks for again while there is one, at most
            a minute later.
        error: what failed last, if it still does; also of merging and deleting, while units go on.
        failing_s: since when nothing succeeds; None if it does.
        epoch: number of this archiver's claim.
        units, bases: how many were made since it began.
    """

    destination: str
    state: ArchiveState
    mark: Position | None
    durable_seqno: Seqno
    lag_s: float
    behind_commits: int
    behind_bytes: int
    gaps: tuple[tuple[Seqno, Seqno], ...]
    error: str | None
    failing_s: float | None
    epoch: int
    units: int
    bases: int

    def as_dict(self) -> dict[str, Any]:
        """The same by name, as plain values; the mark as it is printed."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**figures, "mark": None if self.mark is None else str(self.mark)}


class Stalling(Protocol):
    """An archive that commits wait for."""

    def is_behind(self) -> bool:
        """Whether the calling thread is to wait. Takes no lock, and raises nothing."""
        ...

    def hasten(self) -> None:
        """Have it go on at once. ArchiveBehindError if it cannot."""
        ...


class Archives:
    """Those of one open store. Thread-safe: each change is one step of a dict."""

    def __init__(self) -> None:
        self._tell: dict[object, Callable[[], ArchiveStatus | None]] = {}
        self._stalling: dict[object, Stalling] = {}

    def add(
        self, key: object, tell: Callable[[], ArchiveStatus | None], stalling: Stalling | None = None
    ) -> None:
        """Have one told of until it is removed. `tell`: how it is doing; None: it is forgotten.

        `stalling`: what commits wait for; None: they do not.
        """
        self._tell[key] = tell
        if stalling is not None:
            self._stalling[key] = stalling

    def remove(self, key: object) -> None:
        """Tell of it no more, and let no commit wait for it. Idempotent."""
        self._stalling.pop(key, None)
        self._tell.pop(key, None)

    def is_behind(self) -> bool:
        """Whether a commit of this thread is to wait for one of them. Takes no lock."""
        return any(each.is_behind() for each in list(self._stalling.values()))

    def hasten(self) -> None:
        """Have those go on that commits wait for. Raises why that is in vain."""
        for each in list(self._stalling.values()):
            if each.is_behind():
                each.hasten()

    def statuses(self) -> tuple[ArchiveStatus, ...]:
        """How each of them is doing, in the order in which they began."""
        found = [tell() for tell in list(self._tell.values())]
        return tuple(status for status in found if status is not None)
