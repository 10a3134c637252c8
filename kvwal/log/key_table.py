"""What a key index will hold of a segment, in memory: of the newest segment, which is read on, and to make the file."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from heapq import merge
from itertools import chain, groupby, islice
from typing import Final, TypeAlias

from crc32c import crc32c

from kvwal.log.columns import decode_put_key
from kvwal.log.keys import (
    BEGINS,
    BLOCK_ROWS,
    CRC,
    FENCE_BYTES,
    HASH_BLOCK,
    HASH_BYTES,
    HASH_ROW_BYTES,
    HEADER,
    MAGIC,
    ORDER_BLOCK,
    ORDER_ROW_BYTES,
    RANGE,
    REVISION,
    TABLE,
    VERSION,
    Spot,
    hashes_of,
    marks_of,
)
from kvwal.log.ranges import RANGE_BYTES, Range, Ranges
from kvwal.log.record import COMMIT, Record, pieces_of
from kvwal.log.run import Run
from kvwal.log.segment import SegmentHeader
from kvwal.sorting import sorted_in_steps

__all__ = ["KeyTable"]

# Most intents in a step of making an index, after which other threads may run.
_STEP_INTENTS: Final = 32
# Of one commit, how many are cut out at a time.
_STEP_PIECE: Final = 128
# Of a run.
_STEP_COMMITS: Final = 128
# Most rows of an index that a step makes, or sorts.
_STEP_ROWS: Final = 64
_STEP_KEYS: Final = 512
_SORTED_ROWS: Final = 1024
_STEP_BLOCKS: Final = 64
# What the fields of an order row hold.
_MOST_COMMITS: Final = BEGINS
_OFFSET_STOP: Final = 1 << 32
# What a key takes beside its bytes, and a change of one.
_KEY_BYTES: Final = 130
_COMMIT_BYTES: Final = 48
_SAMPLED: Final = 256
# A change is the number of its commit in the segment, and its own among the intents of that one.
_NUMBER_BITS: Final = 32
_NUMBER: Final = (1 << _NUMBER_BITS) - 1

# Commits that are read rather than that all keys are put in order, and looked at.
_SHORT_COMMITS: Final = 16
_SHORT_BYTES: Final = 2 << 10

# With these, none of the dicts of a segment of 16 MiB takes long to grow, or to be freed.
_SHARDS: Final = 64
_SHARD: Final = _SHARDS - 1

_Changes: TypeAlias = int | bytearray
_CHANGE = struct.Struct("=Q")
_NONE: Final = bytearray()


class _Keys(Collection[bytes]):
    """By key of one table: the change, or those of them in their order. Most keys have one.

    Several are bytes, since the collector of garbage would look at each list, or array, in one long step.
    """

    __slots__ = ("_setdefaults", "shards")

    def __init__(self) -> None:
        #: By the last bits of the key's `hash`.
        self.shards: list[dict[bytes, _Changes]] = [{} for _ in range(_SHARDS)]
        self._setdefaults = [shard.setdefault for shard in self.shards]

    def __contains__(self, key: object) -> bool:
        return key in self.shards[hash(key) & _SHARD]

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self.shards)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def shard(self, key: bytes) -> dict[bytes, _Changes]:
        """The one that has this key, if there is one."""
        return self.shards[hash(key) & _SHARD]

    def add(self, keys: Sequence[bytes], changes: Iterable[int]) -> None:
        """Add one change of each of these, which are newer than those that are there."""
        of_keys = map(self._setdefaults.__getitem__, map(_SHARD.__and__, map(hash, keys)))
        for setdefault, key, change in zip(of_keys, keys, changes, strict=True):
            before = setdefault(key, change)
            if before is change:
                continue
            if isinstance(before, int):
                self.shard(key)[key] = bytearray(_CHANGE.pack(before) + _CHANGE.pack(change))
            else:
                before += _CHANGE.pack(change)


class KeyTable:
    """The changes of each key of a segment, and its ranges. Asked as `KeyIndex` is. One thread at a time extends it."""

    __slots__ = ("_end", "_first", "_offsets", "_orders", "_tables", "ranges")

    def __init__(self, header: SegmentHeader) -> None:
        self._first = header.first_seqno
        # Of the records, all of which are there.
        self._offsets = array("Q")
        # Of the last one.
        self._end = 0
        self._tables: dict[int, _Keys] = {}
        # By table: its keys in order, as of when they were asked for.
        self._orders: dict[int, list[bytes]] = {}
        #: The ranges that commits deleted, in their order.
        self.ranges = Ranges()

    def extend(self, parts: Iterable[Record | Run]) -> Iterator[None]:
        """Add the commits that follow, in steps. Raises as `Record.columns`."""
        add = self._keys_of(0).add
        left = _STEP_INTENTS
        for part in parts:
            if isinstance(part, Run):
                # It was read, which is a step.
                yield
                self._offsets.extend(part.offsets)
                self._end = part.offsets[-1] + part.offsets.step
                changes = [seqno - self._first << _NUMBER_BITS for seqno in part.seqnos]
                for i in range(0, len(changes), _STEP_COMMITS):
                    add(part.keys[i : i + _STEP_COMMITS], changes[i : i + _STEP_COMMITS])
                    yield
                continue
            self._offsets.append(part.offset)
            self._end = part.offset + part.size
            key = decode_put_key(part.body) if part.kind == COMMIT else None
            if key is None:
                yield from self._add(part)
                continue
            add((key,), (part.seqno - self._first << _NUMBER_BITS,))
            left -= 1
            if not left:
                left = _STEP_INTENTS
                yield

    def _keys_of(self, table: int) -> _Keys:
        """The keys of a table, to which some are added."""
        keys = self._tables.get(table)
        if keys is None:
            keys = self._tables[table] = _Keys()
        return keys

    def _add(self, record: Record) -> Iterator[None]:
        first_change = record.seqno - self._first << _NUMBER_BITS
        for piece in pieces_of(record, _STEP_PIECE):
            if piece is None:
                yield
                continue
            first, ranges, keys, _ = piece
            tables: Sequence[int] = piece.tables if piece.tables is not None else (0,) * len(keys)
            for table, bounds in zip(tables, ranges, strict=False):
                self.ranges.append(Range(record.seqno, record.offset, table, bounds))
            changes = range(first_change + first, first_change + first + len(keys))
            # Of one table after the other.
            for table, of_table in groupby(range(len(ranges), len(keys)), tables.__getitem__):
                add = self._keys_of(table).add
                while some := tuple(islice(of_table, _STEP_INTENTS)):
                    add([keys[i] for i in some], [changes[i] for i in some])
                    yield
            yield

    def freed(self) -> Iterator[None]:
        """Forget all, in steps: to free many objects at once takes long. Requires: no one else has this."""
        for keys in self._tables.values():
            for shard in keys.shards:
                shard.clear()
                yield
        yield from self.ranges.freed()

    def size(self) -> int:
        """Bytes that it takes in memory, roughly."""
        sample = [key for keys in self._tables.values() for key in islice(keys, _SAMPLED)]
        n = sum(map(len, self._tables.values()))
        of_a_key = sum(map(len, sample)) // max(len(sample), 1) + _KEY_BYTES
        return n * of_a_key + len(self._offsets) * _COMMIT_BYTES + len(self.ranges) * RANGE_BYTES

    # -- one key ------------------------------------------------------------------------------

    def rows(self, table: int, key: bytes, after: int, until: int, *, reverse: bool) -> Iterator[Spot]:
        """As `KeyIndex.rows`, of this key alone."""
        changes = self._between(self._changes(table, key), after, until)
        return map(self._spot, reversed(changes) if reverse else changes)

    def newest(self, table: int, key: bytes, digest: bytes, after: int, until: int) -> list[Spot]:
        """As `KeyIndex.newest`, of this key alone."""
        del digest
        changes = self._between(self._changes(table, key), after, until)
        return [self._spot(changes[-1])] if changes else []

    def _changes(self, table: int, key: bytes) -> _Changes:
        keys = self._tables.get(table)
        return _NONE if keys is None else keys.shard(key).get(key, _NONE)

    def _between(self, found: _Changes, after: int, until: int) -> Sequence[int]:
        """Those of commits beyond `after` up to `until`."""
        changes = _unpacked(found)
        low = bisect_left(changes, after + 1 - self._first << _NUMBER_BITS)
        return changes[low : bisect_left(changes, until + 1 - self._first << _NUMBER_BITS)]

    def _spot(self, change: int) -> Spot:
        number = change >> _NUMBER_BITS
        return self._first + number, self._offsets[number], change & _NUMBER

    def may_have(self, digest: bytes) -> bool:
        """As `KeyIndex.may_have`: it is not known."""
        del digest
        return True

    # -- keys in order ------------------------------------------------------------------------

    def short(self, after: int, until: int) -> list[tuple[int, int]] | None:
        """Seqno and offset of each commit beyond `after` up to `until`; None if to read them takes longer than `spots`.

        It does where they are many, or large.
        """
        offsets = self._offsets
        low, high = max(after + 1 - self._first, 0), min(until + 1 - self._first, len(offsets))
        if high - low > _SHORT_COMMITS:
            return None
        if low < high and (offsets[high] if high < len(offsets) else self._end) - offsets[low] > _SHORT_BYTES:
            return None
        return [(self._first + i, offsets[i]) for i in range(low, high)]

    def spots(
        self,
        table: int,
        bounds: tuple[bytes | None, bytes | None],
        after: int,
        until: int,
        key_of: Callable[[Spot], bytes],
        *,
        reverse: bool,
    ) -> tuple[int, Iterator[list[Spot]]]:
        """As `KeyIndex.spots`, with a row for each key."""
        del key_of
        start, stop = bounds
        keys = self._order(table)
        keys = keys[bisect_left(keys, start or b"") : None if stop is None else bisect_left(keys, stop)]
        return len(keys), self._newest_of_each(table, keys, after, until, reverse)

    def _order(self, table: int) -> list[bytes]:
        keys = self._tables.get(table, ())
        order = self._orders.get(table, [])
        if len(order) < len(keys):
            # Another thread may be extending this table: its keys as they are now, of each dict in one step.
            now = list(chain.from_iterable(map(list, keys.shards)))  # type: ignore[union-attr]  # it is not empty
            order = list(chain.from_iterable(sorted_in_steps(now)))
            self._orders[table] = order
        return order

    def _newest_of_each(
        self, table: int, keys: list[bytes], after: int, until: int, reverse: bool
    ) -> Iterator[list[Spot]]:
        if reverse:
            keys.reverse()
        for i in range(0, len(keys), BLOCK_ROWS):
            found = [self._between(self._changes(table, key), after, until)[-1:] for key in keys[i : i + BLOCK_ROWS]]
            yield [self._spot(change) for newest in found for change in newest]

    # -- the file -----------------------------------------------------------------------------

    def fits(self) -> bool:
        """Whether an index can hold it. (A segment is far smaller: at most 1 GiB, or what one commit needs.)"""
        offsets = self._offsets
        return len(offsets) <= _MOST_COMMITS and (not offsets or offsets[-1] < _OFFSET_STOP)

    def encode(self, header: SegmentHeader, last_seqno: int, *, with_marks: bool = True) -> Iterator[bytes]:
        """The index of the segment, in pieces; empty ones while it is being put in order. Requires: it fits."""
        order = bytearray()
        # Hash rows by the first byte of their hash.
        buckets = [bytearray() for _ in range(256)]
        fences: list[bytes] = []
        tables = []
        for table, all_keys in sorted(self._tables.items()):
            before = len(order)
            for keys in sorted_in_steps(all_keys, _STEP_KEYS):
                yield b""
                for i in range(0, len(keys), _STEP_ROWS):
                    yield from self._add_rows(order, buckets, fences, table, keys[i : i + _STEP_ROWS])
            if len(order) > before:
                tables.append(TABLE.pack(table, (len(order) - before) // ORDER_ROW_BYTES))
        n = len(order) // ORDER_ROW_BYTES
        order_blocks: list[bytes] = []
        following = n
        for at in reversed(range(0, len(order), BLOCK_ROWS * ORDER_ROW_BYTES)):
            block = order[at : at + BLOCK_ROWS * ORDER_ROW_BYTES]
            begins = next((i for i, byte in enumerate(block[3::ORDER_ROW_BYTES]) if byte & 0x80), None)
            if begins is not None:
                following = at // ORDER_ROW_BYTES + begins
            order_blocks.append(ORDER_BLOCK.pack(following, crc32c(block)))
            if not len(order_blocks) % _STEP_BLOCKS:
                yield b""
        order_blocks.reverse()
        hash_rows = chain.from_iterable(map(_in_order, buckets))
        blocks: list[bytes] = []
        hash_blocks: list[bytes] = []
        marks: list[bytes] = []
        while rows := b"".join(islice(hash_rows, BLOCK_ROWS)):
            blocks.append(rows)
            if with_marks:
                marks.append(marks_of(rows))
            hash_blocks.append(HASH_BLOCK.pack(rows[:HASH_BYTES], crc32c(rows)))
            yield b""
        fence_bytes = b"".join(bytes((len(fence),)) + fence for fence in fences)
        ranges = bytearray()
        for i in range(0, len(self.ranges), _STEP_ROWS):
            ranges += b"".join(self._encoded(self.ranges[i : i + _STEP_ROWS]))
            yield b""
        identity = header.salt, header.marker, REVISION, header.first_seqno, last_seqno
        k = sum(map(len, blocks)) // HASH_ROW_BYTES
        sizes = len(ranges), len(fence_bytes), sum(map(len, marks))
        head = HEADER.pack(MAGIC, VERSION, 0, *identity, n, k, len(tables), len(self.ranges), *sizes)
        yield b""
        head += b"".join((*tables, *order_blocks, *hash_blocks, *marks, fence_bytes, ranges))
        yield b""
        yield head + CRC.pack(crc32c(head))
        size = _STEP_BLOCKS * BLOCK_ROWS * ORDER_ROW_BYTES
        for at in range(0, len(order), size):
            yield bytes(order[at : at + size])
        for i in range(0, len(blocks), _STEP_BLOCKS):
            yield b"".join(blocks[i : i + _STEP_BLOCKS])
        # To free all of it at once would take long.
        for held in (order, buckets, blocks, marks):
            held.clear()
            yield b""

    def _add_rows(
        self, order: bytearray, buckets: list[bytearray], fences: list[bytes], table: int, keys: list[bytes]
    ) -> Iterator[bytes]:
        """Add the rows of these keys, which follow those that are there."""
        shard, offsets = self._tables[table].shard, self._offsets
        position = len(order) // ORDER_ROW_BYTES
        next_block = len(fences) * BLOCK_ROWS
        rows: list[int] = []
        for key, digest in zip(keys, hashes_of(table, keys), strict=True):
            buckets[digest[0]] += digest + position.to_bytes(4, "big")
            changes = shard(key)[key]
            position += 1 if isinstance(changes, int) else len(changes) // _CHANGE.size
            while next_block < position:
                fences.append(key[:FENCE_BYTES])
                next_block += BLOCK_ROWS
            if isinstance(changes, int):
                number = changes >> _NUMBER_BITS
                rows += (number | BEGINS, offsets[number], changes & _NUMBER)
                continue
            begins = BEGINS
            for change in _unpacked(changes):
                number = change >> _NUMBER_BITS
                rows += (number | begins, offsets[number], change & _NUMBER)
                begins = 0
                if len(rows) > 3 * _STEP_ROWS:
                    order += struct.pack(f"<{len(rows)}I", *rows)
                    rows.clear()
                    yield b""
        order += struct.pack(f"<{len(rows)}I", *rows)
        yield b""

    def _encoded(self, ranges: list[Range]) -> Iterator[bytes]:
        for seqno, offset, table, (start, stop) in ranges:
            sizes = len(start), len(stop or b"")
            yield RANGE.pack(seqno - self._first, offset, table, *sizes, stop is None)
            yield start
            yield stop or b""


def _unpacked(changes: _Changes) -> Sequence[int]:
    if isinstance(changes, int):
        return (changes,)
    # A copy, since another thread may be adding to it.
    return array("Q", bytes(changes))


def _in_order(bucket: bytes | bytearray) -> Iterable[bytes]:
    """Hash rows in order; of a large bucket piece by piece, since sorting keeps other threads out."""
    rows = struct.unpack(f"{HASH_ROW_BYTES}s" * (len(bucket) // HASH_ROW_BYTES), bucket)
    if len(rows) <= _SORTED_ROWS:
        return sorted(rows)
    return merge(*(sorted(rows[i : i + _SORTED_ROWS]) for i in range(0, len(rows), _SORTED_ROWS)))
