"""What the demos share: the store's settings, and how a check ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["KEPT", "OPTIONS", "Answer", "BrokenPromise", "Recount"]

#: Small segments and frequent checkpoints, so that some kills fall into rolls and checkpoints.
OPTIONS: dict[str, Any] = {
    "segment_bytes": 2 << 20,
    "checkpoint_log_bytes": 6 << 20,
    "memtable_bytes": 16 << 20,
}

#: The same, and the log is all that the demo writes, so that it tells of each commit.
KEPT: dict[str, Any] = OPTIONS | {
    "keep_history_s": 1e9,
    "keep_history_bytes": 1 << 40,
    "history_base_bytes": 128 << 10,
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
