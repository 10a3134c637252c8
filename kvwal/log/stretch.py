"""What a stretch of the log changed, in key order: of one segment, or of the part of it that is asked for.

Rules:
- Only the newest change of a key within the stretch is read, and what it says is verified.
- Nothing is open while a chunk is handed out: an iterator may be dropped at any time.
- The first chunks are small, since many scans want ten pairs; their records are read one by one. A scan that goes on
  has its segment read into memory in one piece, if what the others have there leaves space for it.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from heapq import heappop, heappush
from operator import attrgetter
from typing import Final

from crc32c import crc32c

from kvwal.keys import MAX_VALUE_BYTES, KeyRange, Seqno
from kvwal.log.chain import FoundSegment
from kvwal.log.intents import PUT, TABLES
from kvwal.log.kept import Loaded
from kvwal.log.keys import DamagedIndex, Range, Spot
from kvwal.log.record import COMMIT
from kvwal.log.segment_keys import Known, SegmentKeys

__all__ = ["Stretch"]

# Keys in the first chunk, and in the others.
_FIRST_KEYS: Final = 16
_CHUNK_KEYS: Final = 256
# A record that is read alone takes as long as this many bytes of a whole segment.
_RECORD_COST_BYTES: Final = 8 << 10

# The header of a record with one intent, and of its body.
_ONE_PUT = struct.Struct("<IIIIQQQIBHI")
_HEADER_BYTES: Final = 40
_TABLE_BYTES: Final = 4

Chunk = tuple[list[bytes], list[bytes | None]]


class Stretch:
    """The commits of one segment beyond one commit up to another, and what they did to the keys of one table.

    The caller holds the log. Each iterator is for one thread.
    """

    __slots__ = ("_after", "_first", "_keys", "_table", "_until")

    def __init__(self, keys: SegmentKeys, first: Seqno, table: int, after: int, until: int) -> None:
        """The segment that begins with the commit `first` has some of those."""
        self._keys = keys
        self._first = first
        self._table = table
        self._after = after
        self._until = until

    @property
    def ranges(self) -> list[KeyRange]:
        """The ranges that they deleted, in their order. Raises as reading the log."""
        _, keys = self._keys.known(self._keys.span(self._first, self._until))
        return [each.bounds for each in self._deleted(keys.ranges)]

    def _deleted(self, ranges: list[Range]) -> list[Range]:
        return [each for each in ranges if each.table == self._table and self._after < each.seqno <= self._until]

    def chunks(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> Iterator[Chunk]:
        """Each key in [start, stop) that they put or deleted, in order, and what it was behind the last of them.

        None: deleted, also by a range. Raises as reading the log.
        """
        bounds = (start, stop)
        span = self._keys.span(self._first, self._until)
        known = self._keys.known(span)
        while True:
            try:
                for chunk in self._chunks(known, span.last, bounds, reverse):
                    yield chunk
                    end = chunk[0][-1]
                    bounds = (start, end) if reverse else (end + b"\0", stop)
                return
            except DamagedIndex as damaged:
                # It goes on behind what was handed out.
                known = self._keys.instead(known, damaged, span)

    def _chunks(
        self, known: Known, last: int, bounds: tuple[bytes | None, bytes | None], reverse: bool
    ) -> Iterator[Chunk]:
        found, keys = known
        reading = _Reading(self._keys, found, self._table, last)
        cover = _Cover(self._deleted(keys.ranges))
        rows, lists = keys.spots(self._table, bounds, self._after, self._until, reading.key, reverse=reverse)
        most = _FIRST_KEYS
        spots: list[Spot] = []
        for more in lists:
            spots += more
            while len(spots) >= most:
                yield cover.applied(spots[:most], *reading.pairs(spots[:most]))
                del spots[:most]
                if most == _CHUNK_KEYS:
                    reading.load(rows)
                most = _CHUNK_KEYS
        if spots:
            yield cover.applied(spots, *reading.pairs(spots))


class _Reading:
    """Reads intents of one segment."""

    __slots__ = ("_found", "_keys", "_last", "_loaded", "_table")

    def __init__(self, keys: SegmentKeys, found: FoundSegment, table: int, last: int) -> None:
        self._keys = keys
        self._found = found
        self._table = table
        # The last commit that there is to read.
        self._last = last
        self._loaded: Loaded | None = None

    def load(self, rows: int) -> None:
        """Have the segment in memory, if it pays for this many rows, and there is space."""
        if self._loaded is None and rows * _RECORD_COST_BYTES > self._found.limit:
            found = self._found
            self._loaded = self._keys.files.load(found.name, found.limit, self._last)

    def key(self, spot: Spot) -> bytes:
        """The key of an intent. DamagedIndex if there is none."""
        return self._intent(spot)[0]

    def _intent(self, spot: Spot) -> tuple[bytes, bytes | None]:
        seqno, offset, number = spot
        fetched = self._keys.fetched(self._found, seqno, offset, self._loaded)
        intent = fetched.intent(self._table, number)
        if intent is None:
            raise DamagedIndex(offset)
        return intent

    def pairs(self, spots: list[Spot]) -> Chunk:
        """The keys and values of these intents. DamagedIndex as `key`."""
        if self._loaded is not None:
            return self._loaded_pairs(spots, self._loaded.data)
        pairs = [self._intent(spot) for spot in spots]
        return [key for key, _ in pairs], [value for _, value in pairs]

    def _loaded_pairs(self, spots: list[Spot], data: bytes) -> Chunk:
        header = self._found.known
        marker, salt = header.marker, header.salt
        # Of a commit that is one put, as most are: its kind, and the bytes between the header and the key.
        kind, between = (COMMIT, 0) if not self._table else (COMMIT | TABLES, _TABLE_BYTES)
        keys: list[bytes] = []
        values: list[bytes | None] = []
        last = len(data) - _ONE_PUT.size
        unpack = _ONE_PUT.unpack_from
        for spot in spots:
            seqno, offset, _ = spot
            if offset <= last:
                found, crc, length, its_kind, its_seqno, _, _, n, op, key_bytes, value_bytes = unpack(data, offset)
                if n == 1 and its_kind == kind and value_bytes <= MAX_VALUE_BYTES:
                    rest = data[offset + 8 : offset + _HEADER_BYTES + length]
                    at = _ONE_PUT.size - 8 + between
                    split = at + key_bytes
                    if (
                        found == marker
                        and its_seqno == seqno
                        and split + value_bytes == len(rest) == length + _HEADER_BYTES - 8
                        and crc32c(rest, (salt + offset) & 0xFFFFFFFF) == crc
                        and op == PUT
                        and (not between or int.from_bytes(rest[at - between : at], "little") == self._table)
                    ):
                        keys.append(rest[at:split])
                        values.append(rest[split:])
                        continue
            # Anything else, valid or not.
            key, value = self._intent(spot)
            keys.append(key)
            values.append(value)
        return keys, values


class _Cover:
    """Which commit was the last that deleted a key as a part of a range."""

    __slots__ = ("_points", "_seqnos")

    def __init__(self, ranges: list[Range]) -> None:
        starts = sorted(ranges, key=attrgetter("bounds.start"))
        stops = (each.bounds.stop for each in ranges)
        # From each point up to the next one the answer is the same.
        self._points = sorted({each.bounds.start for each in ranges} | {stop for stop in stops if stop is not None})
        self._seqnos: list[int] = []
        # Those that have begun, newest first, and some that have ended.
        begun: list[tuple[int, int, bytes | None]] = []
        i = 0
        for point in self._points:
            while i < len(starts) and starts[i].bounds.start == point:
                heappush(begun, (-starts[i].seqno, i, starts[i].bounds.stop))
                i += 1
            while begun and (stop := begun[0][2]) is not None and stop <= point:
                heappop(begun)
            self._seqnos.append(-begun[0][0] if begun else 0)

    def applied(self, spots: list[Spot], keys: list[bytes], values: list[bytes | None]) -> Chunk:
        """The pairs that these spots lead to, without the values that a later commit deleted."""
        points, seqnos = self._points, self._seqnos
        if points:
            for i, key in enumerate(keys):
                at = bisect_right(points, key) - 1
                # Of one commit, ranges come before puts.
                if at >= 0 and seqnos[at] > spots[i][0]:
                    values[i] = None
        return keys, values
