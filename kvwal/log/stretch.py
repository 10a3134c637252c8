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
from itertools import chain
from typing import Final

from crc32c import crc32c

from kvwal.keys import MAX_VALUE_BYTES, KeyRange, Seqno
from kvwal.log.chain import FoundSegment
from kvwal.log.fetch import RECORD_BYTES
from kvwal.log.intents import ONE_KEY_OFFSET, PUT, TABLES
from kvwal.log.kept import Loaded
from kvwal.log.key_table import KeyTable
from kvwal.log.keys import DamagedIndex, Spot
from kvwal.log.ranges import AFTER, Cover, Ranges, newest_at
from kvwal.log.record import COMMIT, RECORD_HEADER_BYTES
from kvwal.log.segment_keys import Known, SegmentKeys

__all__ = ["Stretch"]

# Keys in the first chunk; each has twice as many as the one before, up to these.
_FIRST_KEYS: Final = 4
_CHUNK_KEYS: Final = 512
# A record that is read alone takes as long as this many bytes of a whole segment.
_RECORD_COST_BYTES: Final = 12 << 10
# Of records that are read at once, how many there are at least, and the size of one at most.
_ALIKE_KEYS: Final = 32
_ALIKE_BYTES: Final = 4096

# The header of a record (without watermark and time), and of the body of one put; where the key begins behind the CRC.
_ONE_PUT = struct.Struct("<IIIIQ16xIBHI")
_HEADER_BYTES: Final = RECORD_HEADER_BYTES
_KEY_AT: Final = _HEADER_BYTES + ONE_KEY_OFFSET - 8
_TABLE_BYTES: Final = 4
assert _ONE_PUT.size == _HEADER_BYTES + ONE_KEY_OFFSET

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
        return [each.bounds for each in self._deleted().between(self._table, self._after, self._until)]

    @property
    def covers(self) -> list[Cover]:
        """What of older stretches these hide, in parts. They are not to be changed. Raises as `ranges`."""
        return self._deleted().covers(self._table, self._after, self._until)

    def _deleted(self) -> Ranges:
        return self._keys.known(self._keys.span(self._first, self._until))[1].ranges

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
                    # What is left when this one was handed out.
                    end = chunk[0][-1]
                    bounds = (start, end) if reverse else (end + b"\0", stop)
                    yield chunk
                return
            except DamagedIndex as damaged:
                # It goes on behind what was handed out.
                known = self._keys.instead(known, damaged, span)

    def _chunks(
        self, known: Known, last: int, bounds: tuple[bytes | None, bytes | None], reverse: bool
    ) -> Iterator[Chunk]:
        found, keys = known
        reading = _Reading(self._keys, found, self._table, last)
        covers = keys.ranges.covers(self._table, self._after, self._until)
        short = keys.short(self._after, self._until) if isinstance(keys, KeyTable) else None
        if short is not None:
            rows, lists = self._spots_of(found, short, bounds, reverse)
        else:
            rows, lists = keys.spots(self._table, bounds, self._after, self._until, reading.key, reverse=reverse)
        most = _FIRST_KEYS
        spots: list[Spot] = []
        for more in lists:
            spots += more
            while len(spots) >= most:
                yield _hidden(covers, spots[:most], *reading.pairs(spots[:most]))
                del spots[:most]
                rows -= most
                if most == _CHUNK_KEYS:
                    reading.load(rows)
                most = min(2 * most, _CHUNK_KEYS)
        if spots:
            yield _hidden(covers, spots, *reading.pairs(spots))

    def _spots_of(
        self,
        found: FoundSegment,
        commits: list[tuple[int, int]],
        bounds: tuple[bytes | None, bytes | None],
        reverse: bool,
    ) -> tuple[int, Iterator[list[Spot]]]:
        """As `KeyTable.spots`, by reading these commits. DamagedIndex if one is not there."""
        wanted = KeyRange(bounds[0] or b"", bounds[1])
        newest: dict[bytes, Spot] = {}
        for seqno, offset in commits:
            columns = self._keys.fetched(found, seqno, offset).record.columns()
            keys, tables = columns.keys, columns.tables
            for i in range(len(columns.ranges), len(keys)):
                if (0 if tables is None else tables[i]) == self._table and wanted.contains(keys[i]):
                    newest[keys[i]] = seqno, offset, i
        return len(newest), iter([[newest[key] for key in sorted(newest, reverse=reverse)]])


class _Reading:
    """Reads intents of one segment."""

    __slots__ = ("_found", "_keys", "_last", "_loaded", "_name", "_table")

    def __init__(self, keys: SegmentKeys, found: FoundSegment, table: int, last: int) -> None:
        self._keys = keys
        self._found = found
        self._name = found.name
        self._table = table
        # The last commit that there is to read.
        self._last = last
        self._loaded: Loaded | None = None

    def load(self, rows: int) -> None:
        """Have the segment in memory, if it pays for this many rows, and there is space."""
        if self._loaded is None and rows * _RECORD_COST_BYTES > self._found.limit:
            self._loaded = self._keys.files.load(self._name, self._found.limit, self._last)

    def key(self, spot: Spot) -> bytes:
        """The key of an intent. DamagedIndex if there is none."""
        return self.pairs([spot])[0][0]

    def pairs(self, spots: list[Spot]) -> Chunk:
        """The keys and values of these intents. DamagedIndex as `key`."""
        header, table, loaded = self._found.known, self._table, self._loaded
        if loaded is not None and len(spots) >= _ALIKE_KEYS:
            alike = self._alike(spots, loaded.data)
            if alike is not None:
                return alike
        marker, salt = header.marker, header.salt
        # Of a commit that is one put, as most are: its kind, and what the body has before the key.
        kind, before_key = (COMMIT, _KEY_AT) if not table else (COMMIT | TABLES, _KEY_AT + _TABLE_BYTES)
        unpack = _ONE_PUT.unpack_from
        file = None if loaded is not None else self._keys.files.open(self._name)
        pread = None if file is None else file.file.pread
        data = b"" if loaded is None else loaded.data
        at = 0
        keys: list[bytes] = []
        values: list[bytes | None] = []
        others: list[tuple[int, int]] = []
        for seqno, offset, number in spots:
            if not number:
                if pread is not None:
                    data = pread(RECORD_BYTES, offset)
                else:
                    at = offset
                if len(data) - at >= _ONE_PUT.size:
                    its_marker, crc, length, its_kind, its_seqno, n, op, key_bytes, value_bytes = unpack(data, at)
                    rest = data[at + 8 : at + _HEADER_BYTES + length]
                    split = before_key + key_bytes
                    if (
                        n == 1
                        and op == PUT
                        and its_kind == kind
                        and split + value_bytes == len(rest) == length + _HEADER_BYTES - 8
                        and its_marker == marker
                        and its_seqno == seqno
                        and value_bytes <= MAX_VALUE_BYTES
                        and crc32c(rest, (salt + offset) & 0xFFFFFFFF) == crc
                        and (not table or int.from_bytes(rest[_KEY_AT:before_key], "little") == table)
                    ):
                        keys.append(rest[before_key:split])
                        values.append(rest[split:])
                        continue
            # Anything else, valid or not.
            others.append((offset, len(keys)))
            keys.append(b"")
            values.append(None)
        # In the order of the file, since a commit of many intents takes long to read.
        for _, i in sorted(others):
            keys[i], values[i] = self._other(spots[i])
        return keys, values

    def _other(self, spot: Spot) -> tuple[bytes, bytes | None]:
        """The key and value of any intent."""
        seqno, offset, number = spot
        loaded, table = self._loaded, self._table
        if loaded is None:
            intent = self._keys.fetched(self._found, seqno, offset).intent(table, number)
        else:
            cut = self._keys.cut(self._found, seqno, offset, loaded)
            intent = cut.intent(loaded.data, offset + _HEADER_BYTES, table, number)
        if intent is None:
            raise DamagedIndex(offset)
        return intent

    def _alike(self, spots: list[Spot], data: bytes) -> Chunk | None:
        """As `pairs`, of commits that are one put of one size each, as many are; None for any others, valid or not.

        It takes three quarters of the time, since no record is looked at by itself.
        """
        header, table = self._found.known, self._table
        seqnos, offsets, numbers = zip(*spots, strict=True)
        if any(numbers) or len(data) - offsets[0] < _ONE_PUT.size:
            return None
        marker, _, length, kind, _, n, op, key_bytes, value_bytes = _ONE_PUT.unpack_from(data, offsets[0])
        size = _HEADER_BYTES + length
        before_key = _HEADER_BYTES + ONE_KEY_OFFSET + (_TABLE_BYTES if table else 0)
        one = marker == header.marker and kind == (COMMIT | TABLES if table else COMMIT) and n == 1 and op == PUT
        if not one or size > _ALIKE_BYTES or before_key + key_bytes + value_bytes != size:
            return None
        view = memoryview(data)
        records = b"".join([view[offset : offset + size] for offset in offsets])
        first = records[:size]
        if len(records) != size * len(spots) or (
            table and int.from_bytes(first[before_key - _TABLE_BYTES : before_key], "little") != table
        ):
            return None
        # Marker, length and kind, and what is before the key are the same in all.
        for at in (*range(4), *range(8, 16), *range(_HEADER_BYTES, before_key)):
            if records[at::size] != first[at : at + 1] * len(spots):
                return None
        fields = struct.iter_unpack(f"<4xI8xQ{before_key - 24}x{key_bytes}s{value_bytes}s", records)
        crcs, its_seqnos, keys, values = zip(*fields, strict=True)
        rests = chain.from_iterable(struct.iter_unpack(f"<8x{size - 8}s", records))
        seeds = [(header.salt + offset) & 0xFFFFFFFF for offset in offsets]
        if its_seqnos != seqnos or tuple(map(crc32c, rests, seeds)) != crcs:
            return None
        return list(keys), list(values)


def _hidden(covers: list[Cover], spots: list[Spot], keys: list[bytes], values: list[bytes | None]) -> Chunk:
    """The pairs that these spots lead to, without the values that a later commit deleted."""
    for cover in covers:
        low, high = sorted((keys[0], keys[-1]))
        first, stop = bisect_right(cover, (low, AFTER)) - 1, bisect_right(cover, (high, AFTER))
        if stop - first <= len(keys) and not any(seqno for _, seqno in cover[first:stop]):
            continue
        for i, key in enumerate(keys):
            # Of one commit, ranges come before puts.
            if newest_at(cover, key) > spots[i][0]:
                values[i] = None
    return keys, values
