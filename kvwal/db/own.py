"""What an open transaction has written, in order: its scans lay it over the moment that it reads.

Few keys are put in order for each scan; of more, the first scan makes an order that is kept. A scan that had to pass
many keys that the transaction itself deleted says so, and the next one begins behind them (see `kvwal.engine.gaps`):
else a transaction that takes a queue apart would pass all that it took before at each step. And a scan takes what was
written some at a time, as far as it comes: else one that looks at one end would copy all that was taken off the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final
from weakref import ref

from sortedcontainers import SortedList

from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds
from kvwal.engine.gaps import WORTHWHILE, Gaps
from kvwal.engine.merge import Chunk, RawChunk, Source
from kvwal.engine.range_map import Cover
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.keys import Bound, KeyRange, Seqno
from kvwal.locks import locked, new_lock

__all__ = ["OwnWrites"]

# All writes of a transaction are of one moment.
_NOW = Seqno(0)
_NO_COVER: Final = (0, Cover.of(()))


class _Pieces:
    """What is written in a range as a scan began: some at a time, and all at once before more is written."""

    __slots__ = ("__weakref__", "_bounds", "_left", "_most", "_order", "_rest", "_reverse", "_writes", "keys", "lock")

    def __init__(
        self,
        order: SortedList[bytes],
        writes: dict[bytes, bytes | None],
        bounds: tuple[bytes | None, bytes | None],
        limit: int,
        *,
        reverse: bool,
    ) -> None:
        self._order, self._writes = order, writes
        self._bounds, self._reverse = bounds, reverse
        # Each of its own puts is among what the scan finds, so no more of them are needed.
        self._left = limit
        self._most = WORTHWHILE
        # What is left, once it is taken before a write.
        self._rest: RawChunk | None = None
        #: Those that were handed out.
        self.keys: list[bytes] = []
        #: A worker of tasks may take some while another task writes.
        self.lock = new_lock()

    def __iter__(self) -> Iterator[RawChunk]:
        return self

    @locked
    def __next__(self) -> RawChunk:
        if self._rest is None:
            keys, values = self._taken(self._most)
            self._most *= 2
            self._left -= len(values) - values.count(None)
        else:
            (keys, values), self._rest = self._rest, ((), ())
        if not keys:
            raise StopIteration
        self.keys += keys
        return keys, values

    @locked
    def take_all(self) -> None:
        """From here on what is written is another's."""
        if self._rest is None:
            self._rest = self._taken(len(self._writes))

    def _taken(self, most: int) -> RawChunk:
        # Requires: lock. By the last key, so that nothing is lost where this is interrupted.
        (start, stop), inclusive = self._bounds, (True, False)
        if self.keys and self._reverse:
            stop = self.keys[-1]
        elif self.keys:
            start, inclusive = self.keys[-1], (False, False)
        keys: list[bytes] = []
        left = self._left
        if left:
            for key in self._order.irange(start, stop, inclusive, self._reverse):
                keys.append(key)
                left -= self._writes[key] is not None
                if not left or len(keys) == most:
                    break
        return keys, list(map(self._writes.__getitem__, keys))


class OwnWrites:
    """The writes of one transaction to one table. For one thread at a time."""

    __slots__ = ("_cover", "_gaps", "_puts", "_scans", "batch")

    def __init__(self, batch: WriteBatch) -> None:
        #: What its commit is to write.
        self.batch = batch
        # How many ranges of the batch this is made of. Never changed, since scans have it, also in other threads.
        self._cover = _NO_COVER
        # Made by the first scan that has something to say: a transaction that only gets and puts needs none.
        self._gaps: Gaps | None = None
        # How often a key was put: what a scan found to be empty may be so no more.
        self._puts = 0
        # Those that have not taken all that was written.
        self._scans: list[ref[_Pieces]] = []

    def write(self, key: bytes, value: bytes | None) -> None:
        """Put, or delete if the value is None."""
        if self._scans:
            self._leave_to_scans()
        if value is not None:
            self._puts += 1
            if self._gaps is not None:
                self._gaps.written(_NOW, (key,))
        self.batch.writes[key] = value

    def _leave_to_scans(self) -> None:
        for scan in self._scans:
            pieces = scan()
            if pieces is not None:
                pieces.take_all()
        self._scans = []

    def delete_range(self, start: Bound, stop: Bound) -> None:
        """Delete a range, as `WriteBatch.delete_range`."""
        self._leave_to_scans()
        self.batch.delete_range(start, stop)

    def cover(self) -> Cover:
        """The ranges that it deleted."""
        ranges = self.batch.ranges
        count, cover = self._cover
        if count < len(ranges):
            new = ranges[count:]
            cover = Cover.of(new, cover)
            self._cover = count + len(new), cover
        return cover

    def get(self, key: bytes) -> Value | Missing:
        """The value; None if deleted; MISSING if the moment that is read must answer."""
        found: Value | Missing = self.batch.writes.get(key, MISSING)
        if found is MISSING and self.batch.ranges and self.cover().at(key):
            return None
        return found

    def skip(self, bounds: Bounds) -> tuple[bytes | None, bytes | None]:
        """The range less what is known to be empty at the end that a scan begins at."""
        gaps, start, stop = self._gaps, bounds.start, bounds.stop
        return (start, stop) if gaps is None else gaps.skip(start, stop, reverse=bounds.reverse)

    def source(self, start: bytes | None, stop: bytes | None, bounds: Bounds) -> tuple[Source, list[bytes]]:
        """What it has written in a range as it is now, and the keys of that, as far as the scan has come."""
        writes = self.batch.writes
        cover = self.cover() if self.batch.ranges else None
        if len(writes) < WORTHWHILE:
            # Most often. All of them at once are quicker than an order that is kept.
            within = [key for key in list(writes) if (start is None or start <= key) and (stop is None or key < stop)]
            within.sort(reverse=bounds.reverse)
            found = [(within, [writes[key] for key in within])] if within else []
            return Source(iter(found), cover=cover), within
        limit = len(writes) if bounds.limit is None else bounds.limit
        pieces = _Pieces(self.batch.order(), writes, (start, stop), limit, reverse=bounds.reverse)
        first = next(pieces, None)
        chunks: Iterator[RawChunk] = iter(())
        if first is not None and len(first[0]) < WORTHWHILE:
            chunks = iter((first,))
        elif first is not None:
            chunks = chain((first,), pieces)
            self._scans = [scan for scan in self._scans if scan() is not None]
            self._scans.append(ref(pieces))
        return Source(chunks, cover=cover), pieces.keys

    def watched(
        self, chunks: Iterator[Chunk], keys: list[bytes], start: bytes | None, stop: bytes | None, *, reverse: bool
    ) -> Iterator[Chunk]:
        """The chunks of a scan over its own `keys`; if it passed many that are deleted first, that is remembered."""
        bounds = KeyRange(start or b"", stop)
        return self._watched(chunks, keys, bounds, reverse, self._puts) if len(keys) >= WORTHWHILE else chunks

    def _watched(
        self, chunks: Iterator[Chunk], keys: list[bytes], bounds: KeyRange, reverse: bool, puts: int
    ) -> Iterator[Chunk]:
        first = next(chunks, None)
        if puts == self._puts:
            # Since the scan began nothing was put, which it would not have seen.
            found = None if first is None else first[0][0]
            writes = self.batch.writes
            dead = 0
            for key in keys:
                if key == found or writes.get(key) is not None:
                    break
                dead += found is None or (key > found if reverse else key < found)
            if dead >= WORTHWHILE:
                if self._gaps is None:
                    self._gaps = Gaps()
                self._gaps.propose(bounds.before(found, reverse=reverse), _NOW, _NOW)
        if first is not None:
            yield first
            yield from chunks

