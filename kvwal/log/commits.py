"""Commits of a log in a row, by columns: what is done with all of them is a few calls in C."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvwal.keys import Seqno

__all__ = ["Commit", "Commits"]

#: Kind, seqno, time in microseconds and body, as in the log's record.
Commit: TypeAlias = tuple[int, Seqno, int, bytes]


@dataclass(frozen=True, slots=True)
class Commits:
    """One or more commits with seqnos in a row. Its columns have one entry for each."""

    kinds: Sequence[int]
    seqnos: Sequence[Seqno]
    times_us: Sequence[int]
    bodies: Sequence[bytes]

    @classmethod
    def of(cls, commits: Iterable[Commit]) -> Commits:
        """Those commits; there is at least one."""
        return cls(*zip(*commits, strict=True))

    def __len__(self) -> int:
        return len(self.seqnos)

    def __iter__(self) -> Iterator[Commit]:
        return zip(self.kinds, self.seqnos, self.times_us, self.bodies, strict=True)

    def part(self, begin: int, end: int | None = None) -> Commits:
        """Some of them, by place; at least one."""
        return Commits(self.kinds[begin:end], self.seqnos[begin:end], self.times_us[begin:end], self.bodies[begin:end])
