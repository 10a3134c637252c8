"""Which transactions may commit: the rules of optimistic concurrency control. No files, no locks.

A transaction read the state as of its snapshot seqno. It may commit, as if it had run at once at
its commit position, if nothing it read was changed by a commit in between (Kung and Robinson, 1981,
backward validation, serial validation and write). Reads are single keys and half-open ranges; a
range conflicts with any write inside it, there before or not, so phantoms conflict too.

`History` remembers the keys of recent commits, back to the oldest open read-write transaction and
no further; while none is open, nothing is recorded and a commit costs nothing here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.errors import ConflictError
from kvwal.keys import KeyRange, Seqno, in_any

__all__ = ["MAX_HISTORY_KEYS", "History", "conflict_between"]

# A transaction left open cannot make the history grow for ever: past this many keys its oldest part is
# forgotten, and transactions that began before that conflict (they may simply be run again).
MAX_HISTORY_KEYS: Final = 1_000_000


def conflict_between(
    batch: WriteBatch, seqno: Seqno, keys: Iterable[bytes], ranges: Iterable[KeyRange]
) -> ConflictError | None:
    """The conflict of these reads with one earlier commit, if there is one."""
    writes = batch.writes
    for key in keys:
        if key in writes or in_any(key, batch.ranges):
            return ConflictError(key, seqno, f"key {key[:64]!r}")
    for bounds in ranges:
        for key in writes:
            if bounds.contains(key):
                return ConflictError(None, seqno, f"key {key[:64]!r}, in a range that was read,")
        if any(map(bounds.overlaps, batch.ranges)):
            return ConflictError(None, seqno, "a range that was read")
    return None


class History:
    """The writes of recent commits. Requires: used by one thread at a time (the commit leader)."""

    __slots__ = ("_commits", "_key_count", "_last_write", "_with_ranges", "floor")

    def __init__(self) -> None:
        self._commits: deque[tuple[Seqno, WriteBatch]] = deque()
        self._with_ranges: deque[tuple[Seqno, WriteBatch]] = deque()
        self._last_write: dict[bytes, Seqno] = {}
        self._key_count = 0
        #: Nothing is known of commits up to here.
        self.floor = Seqno(0)

    def __len__(self) -> int:
        return len(self._commits)

    def record(self, seqno: Seqno, batch: WriteBatch) -> None:
        """Remember the keys of a commit. Requires: seqnos ascend without a gap since `begin`."""
        kept = WriteBatch()
        # The keys alone: the values need not stay in memory, and the caller may go on using its batch.
        kept.writes = dict.fromkeys(batch.writes)
        kept.ranges = list(batch.ranges)
        self._commits.append((seqno, kept))
        self._last_write.update(dict.fromkeys(batch.writes, seqno))
        if kept.ranges:
            self._with_ranges.append((seqno, kept))
        self._key_count += len(kept) + 1
        while self._key_count > MAX_HISTORY_KEYS and self._commits:
            self._forget_oldest()

    def begin(self, seqno: Seqno) -> None:
        """The first read-write transaction opens, at `seqno`: nothing before it can be asked for."""
        self._commits.clear()
        self._with_ranges.clear()
        self._last_write.clear()
        self._key_count = 0
        self.floor = seqno

    def forget(self, up_to: Seqno) -> None:
        """No open transaction is older than `up_to`."""
        while self._commits and self._commits[0][0] <= up_to:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        seqno, batch = self._commits.popleft()
        if self._with_ranges and self._with_ranges[0][0] == seqno:
            self._with_ranges.popleft()
        last_write = self._last_write
        for key in batch.writes:
            if last_write.get(key) == seqno:
                del last_write[key]
        self._key_count -= len(batch) + 1
        self.floor = seqno

    def conflict(self, since: Seqno, keys: Iterable[bytes], ranges: Iterable[KeyRange]) -> ConflictError | None:
        """The conflict of reads as of `since` with a later commit, if there is one."""
        if since < self.floor:
            return ConflictError(None, self.floor, "something too far back to tell (the transaction was open too long)")
        last_write = self._last_write
        if last_write:
            for key in keys:
                seqno = last_write.get(key)
                if seqno is not None and seqno > since:
                    return ConflictError(key, seqno, f"key {key[:64]!r}")
        if self._with_ranges and keys:
            for seqno, batch in reversed(self._with_ranges):
                if seqno <= since:
                    break
                found = conflict_between(batch, seqno, keys, ())
                if found is not None:
                    return found
        if ranges:
            for seqno, batch in reversed(self._commits):
                if seqno <= since:
                    break
                found = conflict_between(batch, seqno, (), ranges)
                if found is not None:
                    return found
        return None
