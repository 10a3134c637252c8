"""What the tests of events share: a listener that keeps what it hears."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from kvwal.events import CommitGroup, Event, Listener

_E = TypeVar("_E")


class Recorder(Listener):
    """Keeps all that it hears. `look` is called with each event, as it is told."""

    def __init__(self, look: Callable[[Event], None] = lambda event: None) -> None:
        self.heard: list[Event] = []
        self.look = look

    def _hear(self, event: Event) -> None:
        self.heard.append(event)
        self.look(event)

    commit_group = flush = segment_sealed = checkpoint = retire = stall = poison = recovery = _hear  # type: ignore[assignment]

    def of(self, kind: type[_E]) -> list[_E]:
        return [event for event in self.heard if isinstance(event, kind)]


def seqnos(groups: list[CommitGroup]) -> list[int]:
    """All of them, in the order they were told."""
    return [seqno for group in groups for seqno in range(group.first_seqno, group.last_seqno + 1)]
