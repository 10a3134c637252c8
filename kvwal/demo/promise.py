"""What the demos share: the store's settings, and how a check ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["OPTIONS", "Answer", "BrokenPromise", "Recount"]

#: Small segments and frequent checkpoints, so that some kills fall into rolls and checkpoints.
OPTIONS: dict[str, Any] = {
    "segment_bytes": 2 << 20,
    "checkpoint_log_bytes": 6 << 20,
    "memtable_bytes": 16 << 20,
}


class BrokenPromise(Exception):
    """The store does not hold what it acknowledged, or holds what was never written."""


@dataclass(frozen=True, slots=True)
class Recount:
    """A check that passed."""

    found: int  #: transactions in the store
    compared: int  #: bytes or entries compared one by one
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A question to the finished store, and what it answers."""

    question: str
    lines: list[str]
