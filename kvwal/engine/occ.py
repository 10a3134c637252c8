"""Which transactions may commit: the rules of optimistic concurrency control. No files, no locks.

A transaction read the state as of its snapshot seqno. It may commit, as if it had run at once at its commit position,
if nothing it read was changed by a commit in between (Kung and Robinson, 1981, backward validation, serial validation
and write). It reads single keys and half-open ranges; a range conflicts with any write inside it, there before or not,
so phantoms conflict too.

`History` remembers which keys recent commits wrote, back to the oldest open read-write transaction and no further;
while none is open, nothing is recorded and a commit costs nothing here. What is recent is a dict; what is older is
packed into sorted blocks of about 20 bytes a key more than its own bytes, and the oldest of them go when there are too
many.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from kvwal.batch import WriteBatch
from kvwal.engine.range_map import Cover, RangeMap
from kvwal.errors import ConflictError
from kvwal.keys import KeyRange, Seqno

__all__ = ["MAX_HISTORY_BYTES", "History", "ReadSet"]

#: A transaction left open cannot make the history grow for ever: beyond this its oldest part is forgotten, and
#: transactions that began before that conflict (they may simply be run again).
MAX_HISTORY_BYTES: Final = 64 << 20

# Keys of the dict before they are packed: looking one up costs a tenth of a bisection, and a dict entry 150 bytes.
_RECENT_KEYS: Final = 4096
# From this many ranges on, it is quicker to pack the dict for them than to walk it for each.
_MANY_RANGES: Final = 8
_PACKED_OVERHEAD_BYTES: Final = 16
_RANGE_BYTES: Final = 300


class Registration(Protocol):
    """What keeps the history back to a transaction's moment."""

    @property
    def is_released(self) -> bool: ...


class ReadSet(NamedTuple):
    """What a transaction read, as of the commit `since`. With no registration the history is taken to go back to it.

    `ranges`: best disjoint, so that no key is looked at for two of them.
    `others`: keys and ranges of tables other than 0, by table.
    """

    since: Seqno
    keys: Iterable[bytes]
    ranges: Sequence[KeyRange]
    registration: Registration | None = None
    others: Sequence[tuple[int, Iterable[bytes], Sequence[KeyRange]]] = ()


class _Block:
    """Keys with the seqno of their last write, sorted and packed."""

    __slots__ = ("_blob", "_offsets", "_seqnos", "bytes_used", "last_seqno")

    def __init__(self, last_write: dict[bytes, Seqno]) -> None:
        keys = sorted(last_write)
        self._blob = b"".join(keys)
        self._offsets = array("Q", (0,))
        offset = 0
        for key in keys:
            offset += len(key)
            self._offsets.append(offset)
        self._seqnos = array("Q", map(last_write.__getitem__, keys))
        self.last_seqno = Seqno(max(self._seqnos))
        self.bytes_used = len(self._blob) + _PACKED_OVERHEAD_BYTES * len(keys)

    def _key(self, index: int) -> bytes:
        return self._blob[self._offsets[index] : self._offsets[index + 1]]

    def _at(self, key: bytes) -> int:
        low, high = 0, len(self._seqnos)
        while low < high:
            middle = (low + high) // 2
            if self._key(middle) < key:
                low = middle + 1
            else:
                high = middle
        return low

    def seqno_of(self, key: bytes) -> int:
        """When the key was last written; 0 if it was not. O(log keys)."""
        index = self._at(key)
        return self._seqnos[index] if index < len(self._seqnos) and self._key(index) == key else 0

    def within(self, bounds: KeyRange, since: Seqno) -> Iterator[tuple[bytes, int]]:
        """The keys of the range that were written after `since`."""
        for index in range(self._at(bounds[0]), len(self._seqnos)):
            key = self._key(index)
            if bounds[1] is not None and key >= bounds[1]:
                return
            if self._seqnos[index] > since:
                yield key, self._seqnos[index]


class History:
    """The keys that recent commits wrote. Requires: used by one thread at a time (the commit leader)."""

    __slots__ = ("_blocks", "_others", "_ranges", "_recent", "_recent_bytes", "floor", "max_bytes")

    def __init__(self, max_bytes: int = MAX_HISTORY_BYTES) -> None:
        self.max_bytes = max_bytes
        self.begin(Seqno(0))

    def begin(self, seqno: Seqno) -> None:
        """The first read-write transaction opens, at `seqno`: nothing before it can be asked for."""
        #: Nothing is known of commits up to here. First, since an interruption may leave less than was known before.
        self.floor = seqno
        self._blocks: list[_Block] = []
        self._recent: dict[bytes, Seqno] = {}
        self._recent_bytes = 0
        self._ranges = RangeMap()
        # Of tables other than 0.
        self._others: dict[int, History] = {}

    @property
    def bytes_used(self) -> int:
        """Estimate of the memory held."""
        own = self._recent_bytes + sum(block.bytes_used for block in self._blocks)
        return own + sum(other.bytes_used for other in self._others.values()) if self._others else own

    def record(
        self,
        seqno: Seqno,
        keys: Iterable[bytes],
        ranges: Sequence[KeyRange],
        oldest: Seqno,
        parts: Iterable[tuple[int, WriteBatch]] = (),
    ) -> None:
        """Remember what a commit wrote. Recording it again is harmless.

        Args:
            oldest: the moment of the oldest open transaction. What is older is forgotten.
            parts: what it wrote to other tables.
        """
        for table, part in parts:
            self._record_part(seqno, table, part, oldest)
        recent = self._recent
        for key in keys:
            if key not in recent:
                self._recent_bytes += len(key) + 150
            recent[key] = seqno
        for bounds in ranges:
            self._ranges.add(seqno, bounds, copy=False)
            self._recent_bytes += _RANGE_BYTES
        if len(recent) >= _RECENT_KEYS:
            blocks = [block for block in self._blocks if block.last_seqno > oldest]
            self._blocks = [*blocks, _Block(recent)]
            self._recent = {}
            self._recent_bytes = _RANGE_BYTES * len(self._ranges.added)
            if self.bytes_used > self.max_bytes:
                self._forget_oldest()
        elif self._recent_bytes > self.max_bytes:
            self.begin(seqno)

    def _record_part(self, seqno: Seqno, table: int, part: WriteBatch, oldest: Seqno) -> None:
        other = self._others.get(table)
        if other is None:
            other = self._others[table] = History(self.max_bytes)
            other.begin(self.floor)
        other.record(seqno, part.writes, part.ranges, oldest)
        if other.floor > self.floor or self.bytes_used > self.max_bytes:
            # Of all tables, so that there is one floor.
            self.begin(seqno)

    def _forget_oldest(self) -> None:
        blocks = self._blocks
        while blocks and self.bytes_used > self.max_bytes:
            self.floor = max(self.floor, blocks[0].last_seqno)
            blocks = self._blocks = blocks[1:]
        if self.bytes_used > self.max_bytes:
            # What is left are ranges.
            self.begin(self.floor)

    def conflict(self, reads: ReadSet) -> ConflictError | None:
        """The conflict of what was read with a later commit, if there is one."""
        found = self._conflict(*reads[:3])
        for table, keys, ranges in reads.others:
            other = self._others.get(table)
            if found is None and other is not None:
                found = other._conflict(reads.since, keys, ranges)
                if found is not None:
                    found.table = table
        # At last: until then the history was kept for it.
        if found is None and reads.registration is not None and reads.registration.is_released:
            return ConflictError(None, self.floor, "something that cannot be told (the transaction was given up)")
        return found

    def _conflict(self, since: Seqno, keys: Iterable[bytes], ranges: Sequence[KeyRange]) -> ConflictError | None:
        if since < self.floor:
            return ConflictError(None, self.floor, "something too far back to tell (the transaction was open too long)")
        recent = self._recent
        blocks = [block for block in self._blocks if block.last_seqno > since]
        deleted: Cover | None = self._ranges.newest if self._ranges.last_seqno > since else None
        if recent or blocks or deleted is not None:
            for key in keys:
                seqno: int = recent.get(key, 0)
                if seqno <= since and blocks:
                    seqno = max(block.seqno_of(key) for block in blocks)
                if seqno <= since and deleted is not None:
                    seqno = deleted.at(key)
                if seqno > since:
                    return ConflictError(key, seqno, f"key {key[:64]!r}")
        if recent and len(ranges) >= _MANY_RANGES:
            blocks.append(_Block(recent))
            recent = {}
        for bounds in ranges:
            found = _written_within(bounds, since, recent, blocks, deleted)
            if found is not None:
                return found
        return None


def _written_within(
    bounds: KeyRange, since: Seqno, recent: dict[bytes, Seqno], blocks: list[_Block], deleted: Cover | None
) -> ConflictError | None:
    start, stop = bounds
    for key, seqno in recent.items():
        if seqno > since and start <= key and (stop is None or key < stop):
            return ConflictError(None, seqno, f"key {key[:64]!r}, in a range that was read,")
    for block in blocks:
        for key, written in block.within(bounds, since):
            return ConflictError(None, written, f"key {key[:64]!r}, in a range that was read,")
    if deleted is not None:
        newest = deleted.newest_within(bounds)
        if newest > since:
            return ConflictError(None, newest, "a range that was read")
    return None
