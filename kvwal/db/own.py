"""What an open transaction has written, in order: its scans lay it over the moment that it reads.

The order of its keys is made by the first scan, and kept from then on. A scan that had to pass many keys that the
transaction itself deleted says so, and the next one begins behind them (see `kvwal.engine.gaps`): else a transaction
that takes a queue apart would pass all that it took before at each step.
"""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedList

from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds
from kvwal.engine.gaps import WORTHWHILE, Gaps
from kvwal.engine.merge import Chunk, Source
from kvwal.engine.range_map import Cover
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.keys import Bound, KeyRange, Seqno

__all__ = ["OwnWrites"]

# All writes of a transaction are of one moment.
_NOW = Seqno(0)


class OwnWrites:
    """The writes of one transaction to one table. For one thread at a time."""

    __slots__ = ("_cover", "_gaps", "_order", "_puts", "batch")

    def __init__(self, batch: WriteBatch) -> None:
        #: What its commit is to write.
        self.batch = batch
        self._order: SortedList[bytes] | None = None
        self._cover: Cover | None = None
        # Made by the first scan that has something to say: a transaction that only gets and puts needs none.
        self._gaps: Gaps | None = None
        # How often a key was put: what a scan found to be empty may be so no more.
        self._puts = 0

    def write(self, key: bytes, value: bytes | None) -> None:
        """Put, or delete if the value is None."""
        writes = self.batch.writes
        if self._order is not None and key not in writes:
            self._order.add(key)
        if value is not None:
            self._puts += 1
            if self._gaps is not None:
                self._gaps.written(_NOW, (key,))
        writes[key] = value

    def delete_range(self, start: Bound, stop: Bound) -> None:
        """Delete a range, as `WriteBatch.delete_range`."""
        self.batch.delete_range(start, stop)
        self._cover = self._order = None

    def cover(self) -> Cover:
        """The ranges that it deleted."""
        if self._cover is None:
            self._cover = Cover.of(self.batch.ranges)
        return self._cover

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
        """What it has written in a range as it is now, and the keys of that, as far as the limit needs them."""
        if self._order is None:
            self._order = SortedList(self.batch.writes)
        writes = self.batch.writes
        keys: list[bytes] = []
        left = len(writes) if bounds.limit is None else bounds.limit
        for key in self._order.irange(start, stop, (True, False), bounds.reverse):
            keys.append(key)
            # Each of its own puts is among what the scan finds, so no more of them are needed.
            left -= writes[key] is not None
            if not left:
                break
        chunks = iter([(keys, [writes[key] for key in keys])] if keys else [])
        return Source(chunks, cover=self.cover() if self.batch.ranges else None), keys

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

