"""The record: one commit, or one statement about the log, as bytes.

A record at byte `offset` of its segment, little-endian, without padding:

| at | size | field | meaning |
|---|---|---|---|
| 0 | 4 | marker | the segment's marker, never zero: damage is skipped by searching for it |
| 4 | 4 | crc | CRC-32C of the bytes from 8 to the end, seeded with (salt + offset) modulo 2**32 |
| 8 | 4 | body length | bytes after the 40 of this header |
| 12 | 4 | kind | 1 commit, 2 watermark, 3 closed; the upper 24 bits are flags, all zero |
| 16 | 8 | seqno | of this commit; kinds 2 and 3 repeat the last commit's and take no number |
| 24 | 8 | watermark | the last seqno known to be durable when this was written |
| 32 | 8 | time_us | microseconds since 1970 UTC, never decreasing |
| 40 | - | body | of a commit: its intents; of the others: nothing |

A record verifies when
1. its marker is the segment's,
2. it ends inside the segment,
3. its CRC matches. The seed makes sure that bytes of another segment or of another place never do.
Being in place is more than verifying: a commit follows the one before it by one, the others repeat it.
A kind or flag that is not known here was written by a newer version and is refused as `FormatError`.

The intents of a commit, in columns, so that a batch is packed and cut by whole columns:

| size | field |
|---|---|
| 4 | n, the number of intents |
| n x 1 | op: 1 put, 2 delete, 3 delete_range with a stop, 4 delete_range to the end |
| n x 2 | key length; the key of a range is its start |
| n x 4 | value length; the value of op 3 is the range's stop, ops 2 and 4 have none |
| - | the keys, one after the other |
| - | the values, one after the other |

Intents are valid when
1. the columns and what they announce fill the body exactly,
2. every op is known, and ranges come before puts and deletes (the canonical order of `WriteBatch`),
3. no key is written twice, deletes and open ranges have no value, and a stop lies after its start,
4. no length exceeds its limit.
"""

from __future__ import annotations

import struct
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError
from kvwal.files import Buffer
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, KeyRange, Seqno

__all__ = [
    "CLOSED",
    "COMMIT",
    "MAX_BODY_BYTES",
    "RECORD_HEADER_BYTES",
    "WATERMARK",
    "LogPosition",
    "Record",
    "decode_intents",
    "decode_put",
    "encode_intents",
    "encode_put",
    "encode_record",
    "segment_name",
]

# On disk: never change.
COMMIT: Final = 1
WATERMARK: Final = 2
CLOSED: Final = 3

_PUT: Final = 1
_DELETE: Final = 2
_DELETE_RANGE: Final = 3
_DELETE_FROM: Final = 4

RECORD_HEADER = struct.Struct("<IIIIQQQ")
RECORD_HEADER_BYTES: Final = 40
# The CRC is written before, and does not cover, what is packed by the first of these.
RECORD_HEAD = struct.Struct("<II")
RECORD_REST = struct.Struct("<IIQQQ")
assert RECORD_HEADER.size == RECORD_HEADER_BYTES == RECORD_HEAD.size + RECORD_REST.size

# One intent alone: n, op, key length, value length.
_ONE = struct.Struct("<IBHI")
_unpack_one = _ONE.unpack_from
# Header and intent of a commit that is one put, behind the CRC.
RECORD_PUT = struct.Struct("<IIQQQIBHI")
assert RECORD_PUT.size == RECORD_REST.size + _ONE.size

MAX_BODY_BYTES: Final = 0xFFFFFFFF

_ONE_BYTES: Final = 11
_COUNT = struct.Struct("<I")
_COLUMN_BYTES: Final = 7

# The module struct keeps what it has compiled for the last 100 formats: this bounds the time and the memory of one.
_CUT_AT_ONCE: Final = 256

_ONE_CHUNK_BYTES: Final = 64 << 10
_LARGE_VALUE_BYTES: Final = 32 << 10


def segment_name(first_seqno: int) -> str:
    """The file name of the segment that begins with this commit."""
    return f"{first_seqno:020d}.log"


class LogPosition(NamedTuple):
    """Where a record begins: its segment, by first seqno, and the byte offset in that file."""

    segment: Seqno
    offset: int

    @property
    def file(self) -> str:
        """Name of the segment's file."""
        return segment_name(self.segment)


class Record:
    """A record as it was read and verified. Do not change it."""

    __slots__ = ("body", "kind", "offset", "segment", "seqno", "time_us", "watermark")

    def __init__(
        self, kind: int, seqno: Seqno, watermark: Seqno, time_us: int, segment: Seqno, offset: int, body: bytes
    ) -> None:
        self.kind = kind
        self.seqno = seqno
        self.watermark = watermark
        self.time_us = time_us
        self.segment = segment
        self.offset = offset
        self.body = body

    @property
    def position(self) -> LogPosition:
        """Where the record begins."""
        return LogPosition(self.segment, self.offset)

    @property
    def size(self) -> int:
        """Bytes in the log, header included."""
        return RECORD_HEADER_BYTES + len(self.body)

    def batch(self) -> WriteBatch:
        """What the commit wrote. CorruptionError if the body does not hold valid intents."""
        try:
            return decode_intents(self.body)
        except ValueError as error:
            raise CorruptionError(segment_name(self.segment), self.offset, str(error)) from None

    def __repr__(self) -> str:
        return f"<Record kind {self.kind}, seqno {self.seqno}, at {self.offset} of {segment_name(self.segment)}>"


def encode_record(
    marker: int, seed: int, kind: int, seqno: int, watermark: int, time_us: int, body: bytes = b""
) -> bytes:
    """A whole record; `seed` is the segment's salt plus the record's offset."""
    rest = RECORD_REST.pack(len(body), kind, seqno, watermark, time_us) + body
    return RECORD_HEAD.pack(marker, crc32c(rest, seed & 0xFFFFFFFF)) + rest


def encode_put(key: bytes, value: bytes) -> bytes:
    """The body of a commit that puts one value. Both must have passed `as_key` and `as_value`."""
    return _ONE.pack(1, _PUT, len(key), len(value)) + key + value


def encode_intents(batch: WriteBatch) -> list[Buffer]:
    """The body of a commit, in chunks: one if it is small; large values are not copied.

    ValueError if the batch is too large for one record.
    """
    writes = batch.writes
    ranges = batch.ranges
    keys: list[bytes] = list(writes)
    values: list[bytes]
    n = len(keys)
    try:
        # len(None) fails: the usual batch of puts alone is found out without looking at each value.
        values = list(writes.values())  # type: ignore[arg-type]  # None is dealt with below
        value_lengths = list(map(len, values))
        ops = b"\x01" * n
    except TypeError:
        ops = bytes([_DELETE if value is None else _PUT for value in writes.values()])
        values = [value or b"" for value in writes.values()]
        value_lengths = list(map(len, values))
    if ranges:
        ops = bytes([_DELETE_FROM if stop is None else _DELETE_RANGE for _, stop in ranges]) + ops
        keys[:0] = [start for start, _ in ranges]
        stops = [stop or b"" for _, stop in ranges]
        values[:0] = stops
        value_lengths[:0] = map(len, stops)
        n += len(ranges)
    columns = struct.pack(f"<I{n}s{n}H{n}I", n, ops, *map(len, keys), *value_lengths)
    total = sum(value_lengths)
    if total < _ONE_CHUNK_BYTES or max(value_lengths) < _LARGE_VALUE_BYTES:
        body = b"".join((columns, *keys, *values))
        if len(body) > MAX_BODY_BYTES:
            raise _too_large(len(body))
        return [body]
    small: list[bytes] = [columns, *keys]
    chunks: list[Buffer] = []
    for value in values:
        if len(value) < _LARGE_VALUE_BYTES:
            small.append(value)
            continue
        if small:
            chunks.append(b"".join(small))
            small = []
        chunks.append(value)
    if small:
        chunks.append(b"".join(small))
    if (length := sum(map(len, chunks))) > MAX_BODY_BYTES:
        raise _too_large(length)
    return chunks


def _too_large(length: int) -> ValueError:
    return ValueError(f"the commit takes {length} bytes in the log; the limit is {MAX_BODY_BYTES}")


def decode_intents(body: bytes) -> WriteBatch:
    """What `encode_intents` was given. ValueError, with the condition that fails, for anything else."""
    put = decode_put(body)
    if put is None:
        return _decode_columns(body)
    key, value = put
    batch = WriteBatch()
    batch.writes = {key: value}
    return batch


def decode_put(data: bytes, at: int = 0) -> tuple[bytes, bytes] | None:
    """The key and value of the commit whose body is all of `data` from `at` on, if it is one put.

    None for any other, valid or not: ask `decode_intents`.
    """
    size = len(data)
    if size - at >= _ONE_BYTES:
        n, op, key_length, value_length = _unpack_one(data, at)
        at += _ONE_BYTES
        split = at + key_length
        if n == 1 and op == _PUT and split + value_length == size and value_length <= MAX_VALUE_BYTES:
            return data[at:split], data[split:]
    return None


def _decode_columns(body: bytes) -> WriteBatch:
    size = len(body)
    if size < _COUNT.size:
        raise ValueError("the commit's intents are cut short")
    (n,) = _COUNT.unpack_from(body)
    start = _COUNT.size + _COLUMN_BYTES * n
    if start > size:
        raise ValueError("the commit's columns are longer than its record")
    at = _COUNT.size
    ops = body[at : at + n]
    key_lengths: tuple[int, ...] = struct.unpack_from(f"<{n}H", body, at + n)
    value_lengths: tuple[int, ...] = struct.unpack_from(f"<{n}I", body, at + 3 * n)
    if n and max(value_lengths) > MAX_VALUE_BYTES:
        raise ValueError("a value in the commit is longer than the limit")
    values_start = start + sum(key_lengths)
    if values_start + sum(value_lengths) != size:
        raise ValueError("the commit's keys and values do not fill its record")
    keys = _cut(body, start, key_lengths)
    values = _cut(body, values_start, value_lengths)
    batch = WriteBatch()
    if ops.count(_PUT) == n:
        writes: dict[bytes, bytes | None] = dict(zip(keys, values, strict=True))
    else:
        written = ops.lstrip(b"\x03\x04")
        if written.strip(b"\x01\x02"):
            raise ValueError("the commit holds an unknown operation, or ranges after writes")
        n_ranges = n - len(written)
        batch.ranges = [
            _decode_range(op, key, value)
            for op, key, value in zip(ops[:n_ranges], keys[:n_ranges], values[:n_ranges], strict=True)
        ]
        keys = keys[n_ranges:]
        writes = {
            key: value if op == _PUT else None
            for op, key, value in zip(written, keys, values[n_ranges:], strict=True)
        }
        if any(length for op, length in zip(written, value_lengths[n_ranges:], strict=True) if op == _DELETE):
            raise ValueError("a delete in the commit has a value")
    if len(writes) != len(keys):
        raise ValueError("the commit writes a key twice")
    batch.writes = writes
    return batch


def _cut(body: bytes, start: int, lengths: tuple[int, ...]) -> list[bytes]:
    """Pieces of so many bytes each, one after the other from `start` on. Requires: the body holds them all."""
    n = len(lengths)
    if not n or lengths.count(lengths[0]) != n:
        ends = list(accumulate(lengths, initial=start))
        return [body[a:b] for a, b in pairwise(ends)]
    # All of one length, as keys and values of a kind mostly are: C cuts them, in half the time of a slice each.
    length = lengths[0]
    pieces: list[bytes] = []
    for first in range(0, n, _CUT_AT_ONCE):
        count = min(_CUT_AT_ONCE, n - first)
        pieces += struct.unpack_from(f"{length}s" * count, body, start + first * length)
    return pieces


def _decode_range(op: int, start: bytes, stop: bytes) -> KeyRange:
    if op == _DELETE_FROM:
        if stop:
            raise ValueError("an open range in the commit has a stop")
        return KeyRange(start, None)
    if stop <= start or len(stop) > MAX_KEY_BYTES:
        raise ValueError("a range in the commit does not end after its start")
    return KeyRange(start, stop)
