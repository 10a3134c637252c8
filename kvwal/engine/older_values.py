"""Older values: what commits replaced in a memtable, for as long as a registered reader of an older moment needs it.

Requires: `keep` and `forget` by the commit leader under State.lock, and `keep` before the values change that it is told
of. So a reader that looks at the newest value first, and here after, needs no lock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Final, TypeAlias

from kvwal.engine.readers import Readers
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.keys import Seqno

__all__ = ["OlderValues"]

# "Until before this seqno, the key had this value here, written at that seqno."
_Older: TypeAlias = "tuple[Seqno, Value | Missing, int]"
_seqno_of: Final[Callable[[_Older], Seqno]] = itemgetter(0)

_OVERHEAD_BYTES: Final = 200
# The values are swept when there are twice as many keys as after the last time, and this many more.
_SWEEP_AT: Final = 1024


class OlderValues:
    """What the keys of one memtable had before, and who still reads it."""

    __slots__ = ("_by_key", "_sweep_at", "readers")

    def __init__(self, readers: Readers) -> None:
        #: Who reads the table. Shared by all versions that have it as their newest.
        self.readers = readers
        # Entries of a key are ascending.
        self._by_key: dict[bytes, list[_Older]] = {}
        self._sweep_at = _SWEEP_AT

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def at(self, key: bytes, seqno: Seqno) -> _Older | None:
        """What the key had as of `seqno`; None if that is the newest value. O(log entries of the key).

        Requires: a reader at `seqno` has been registered since.
        """
        entries = self._by_key.get(key)
        if entries is None or entries[-1][0] <= seqno:
            return None
        return entries[bisect_right(entries, seqno, key=_seqno_of)]

    def keep(
        self, seqno: Seqno, keys: Iterable[bytes], latest: Mapping[bytes, Value], written_at: Mapping[bytes, Seqno]
    ) -> int:
        """Remember what a commit replaces, as far as a registered reader needs it; returns the bytes that this takes.

        `latest` and `written_at`: as they were before it.
        """
        by_key = self._by_key
        oldest = self.readers.oldest()
        newest = self.readers.newest
        if oldest is None:
            return 0
        count = 0
        for key in keys:
            entries = by_key.get(key)
            if entries is None:
                by_key[key] = [(seqno, latest.get(key, MISSING), written_at.get(key, 0))]
            elif entries[-1][0] > newest or entries[-1][0] == seqno:
                # No registered reader reads what the last commit wrote here; or this is the same commit, done again
                # after an interruption.
                continue
            else:
                entry = (seqno, latest.get(key, MISSING), written_at.get(key, 0))
                if entries[0][0] <= oldest:
                    # Entries say what held *before* their seqno: no reader reads that far back any more. A new list,
                    # since a reader may be looking into the old one.
                    by_key[key] = [*entries[bisect_right(entries, oldest, key=_seqno_of) :], entry]
                else:
                    entries.append(entry)
            count += 1
        if len(by_key) > self._sweep_at:
            count -= self._sweep(oldest)
        return count * _OVERHEAD_BYTES

    def _sweep(self, oldest: Seqno) -> int:
        # A walk over the entries, amortized: it comes when their number has doubled.
        before = len(self._by_key)
        self._by_key = {key: entries for key, entries in self._by_key.items() if entries[-1][0] > oldest}
        self._sweep_at = 2 * len(self._by_key) + _SWEEP_AT
        return before - len(self._by_key)

    def forget(self) -> int:
        """No reader of an older moment is left. Returns the bytes that this frees."""
        freed = len(self._by_key) * _OVERHEAD_BYTES
        self._by_key = {}
        self._sweep_at = _SWEEP_AT
        return freed

    def _check(self, last: Seqno) -> None:
        """Raise AssertionError where the rules do not hold; `last` is the last commit (for the tests)."""
        for entries in self._by_key.values():
            seqnos = [at for at, _, _ in entries]
            assert seqnos == sorted(set(seqnos)), "older values out of order"
            assert seqnos[-1] <= last, "an older value from the future"
            assert all(written < at for at, _, written in entries), "a value that was replaced before it was written"
