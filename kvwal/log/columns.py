"""The body of a commit, read: what `intents` encodes, as a whole, in columns, or piece by piece."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from kvwal.batch import WriteBatch
from kvwal.expiring import STAMP_BYTES, Expiring
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, SYSTEM_TABLE, KeyRange
from kvwal.log.extension import UnknownToUs, decode_extension
from kvwal.log.intents import (
    COLUMN_BYTES,
    COUNT,
    DELETE,
    DELETE_FROM,
    DELETE_RANGE,
    EXTENDED,
    ONE,
    ONE_KEY_OFFSET,
    PUT,
    PUT_EXPIRING,
    SYSTEM,
    TABLE_BYTES,
    TABLES,
    is_of_system,
)

__all__ = [
    "Columns",
    "Piece",
    "decode_intents",
    "decode_put",
    "decode_put_key",
    "decode_uniform",
    "pieces",
    "value_of",
]

_KNOWN_OPS: Final = bytes((PUT, DELETE, DELETE_RANGE, DELETE_FROM, PUT_EXPIRING))
_WRITE_OPS: Final = bytes((PUT, DELETE, PUT_EXPIRING))
_RANGE_OPS: Final = bytes((DELETE_RANGE, DELETE_FROM))

_unpack_one = ONE.unpack_from

# The module struct keeps what it has compiled for the last 100 formats: this bounds the time and the memory of one.
_CUT_AT_ONCE: Final = 256

# Said of a body as a whole, and of one that is read in pieces.
_NOT_FILLED: Final = "the commit's keys and values do not fill its record"
_RANGES_LATE: Final = "the commit holds ranges after writes"
_NOT_QUEUED: Final = "the commit puts what expires, and does not queue it"


def decode_put(data: bytes, at: int = 0) -> tuple[bytes, bytes] | None:
    """The key and value of the commit whose body is all of `data` from `at` on, if it is one put and plain.

    None for any other, valid or not: ask `decode_intents`.
    """
    size = len(data)
    if size - at >= ONE_KEY_OFFSET:
        n, op, key_length, value_length = _unpack_one(data, at)
        at += ONE_KEY_OFFSET
        split = at + key_length
        if n == 1 and op == PUT and split + value_length == size and value_length <= MAX_VALUE_BYTES:
            return data[at:split], data[split:]
    return None


def decode_put_key(body: bytes) -> bytes | None:
    """The key of what `decode_put` would return, without its value. None: as there."""
    if len(body) >= ONE_KEY_OFFSET:
        n, op, key_length, value_length = _unpack_one(body)
        split = ONE_KEY_OFFSET + key_length
        if n == 1 and op == PUT and split + value_length == len(body) and value_length <= MAX_VALUE_BYTES:
            return body[ONE_KEY_OFFSET:split]
    return None


def decode_uniform(data: bytes, at: int = 0) -> tuple[Sequence[bytes], Sequence[bytes]] | None:
    """The keys and values of the commit whose body is all of `data` from `at` on, if it is plain and uniform.

    That is: puts alone, of keys of one length and values of one length, as batches of a kind mostly are. None for any
    other, valid or not: ask `decode_intents`.
    """
    if len(data) - at < COUNT.size:
        return None
    (n,) = COUNT.unpack_from(data, at)
    ops = at + COUNT.size
    key_column, value_column, start = ops + n, ops + 3 * n, ops + COLUMN_BYTES * n
    if start > len(data) or data[ops:key_column] != b"\x01" * n:
        return None
    key_length, value_length = data[key_column : key_column + 2], data[value_column : value_column + 4]
    # Compared as bytes: a uniform column is its first number again and again.
    if data[key_column:value_column] != key_length * n or data[value_column:start] != value_length * n:
        return None
    key_bytes, value_bytes = int.from_bytes(key_length, "little"), int.from_bytes(value_length, "little")
    values_start = start + n * key_bytes
    if values_start + n * value_bytes != len(data) or value_bytes > MAX_VALUE_BYTES:
        return None
    keys = _cut_even(data, start, key_bytes, n)
    return (keys, _cut_even(data, values_start, value_bytes, n)) if len(set(keys)) == n else None


def decode_intents(body: bytes, bits: int = 0) -> WriteBatch:
    """What `encode_intents` was given, without the extension.

    ValueError, with the condition that fails, for anything else: `UnknownToUs` for what is of a newer format.
    """
    if not bits:
        put = decode_put(body)
        if put is not None:
            key, value = put
            batch = WriteBatch()
            batch.writes = {key: value}
            return batch
    return _decode_columns(body, bits)


def _begin(body: bytes, bits: int) -> tuple[int, int, int]:
    """Where the columns of a body begin behind n, n, and where the keys begin. ValueError if they are cut short."""
    at = decode_extension(body)[1] if bits & EXTENDED else 0
    size = len(body)
    if size - at < COUNT.size:
        raise ValueError("the commit's intents are cut short")
    (n,) = COUNT.unpack_from(body, at)
    at += COUNT.size
    start = at + (COLUMN_BYTES + (TABLE_BYTES if bits & TABLES else 0)) * n
    if start > size:
        raise ValueError("the commit's columns are longer than its record")
    return at, n, start


def _check_ops(ops: bytes) -> None:
    if ops.strip(_KNOWN_OPS):
        raise UnknownToUs("the commit holds an unknown operation")


def _check_values(ops: bytes, lengths: tuple[int, ...]) -> None:
    """ValueError if these are not lengths of values of these operations."""
    if lengths and max(lengths) > MAX_VALUE_BYTES:
        limits = (MAX_VALUE_BYTES + (STAMP_BYTES if op == PUT_EXPIRING else 0) for op in ops)
        if any(length > limit for length, limit in zip(lengths, limits, strict=True)):
            raise ValueError("a value in the commit is longer than the limit")
    if PUT_EXPIRING in ops and any(
        length < STAMP_BYTES for op, length in zip(ops, lengths, strict=True) if op == PUT_EXPIRING
    ):
        raise ValueError("a put with expiry in the commit has no time")


def _ranges(body: bytes, at: int, ops: bytes, starts: list[bytes], stop_lengths: tuple[int, ...]) -> list[KeyRange]:
    """The ranges that the first intents delete, whose stops begin at this byte. ValueError if they are none."""
    return list(map(_decode_range, ops, starts, _cut(body, at, stop_lengths))) if stop_lengths else []


class Piece(NamedTuple):
    """Some intents of a body, which follow one another, without their values."""

    #: The number of the first of them among all.
    first: int
    #: The ranges that they delete, which come first.
    ranges: list[KeyRange]
    #: As those of `Columns`.
    keys: list[bytes]
    tables: Sequence[int] | None


def pieces(body: bytes, bits: int, most: int) -> Iterator[Piece | None]:
    """The intents of a body, at most `most` in a step; None: a step that only looked at some.

    ValueError as `Columns`, also behind pieces that were handed out.
    """
    at, n, start = _begin(body, bits)
    values_at, value_bytes = start, 0
    for first in range(0, n, most):
        count = min(most, n - first)
        _check_ops(body[at + first : at + first + count])
        values_at += sum(struct.unpack_from(f"<{count}H", body, at + n + 2 * first))
        value_bytes += sum(struct.unpack_from(f"<{count}I", body, at + 3 * n + 4 * first))
        if n > most:
            yield None
    if values_at + value_bytes != len(body):
        raise ValueError(_NOT_FILLED)
    is_in_writes = expires = is_queued = False
    for first in range(0, n, most):
        count = min(most, n - first)
        ops = body[at + first : at + first + count]
        key_lengths = struct.unpack_from(f"<{count}H", body, at + n + 2 * first)
        value_lengths = struct.unpack_from(f"<{count}I", body, at + 3 * n + 4 * first)
        _check_values(ops, value_lengths)
        written = ops.lstrip(_RANGE_OPS)
        n_ranges = count - len(written)
        if written.strip(_WRITE_OPS) or (n_ranges and is_in_writes):
            raise ValueError(_RANGES_LATE)
        tables: tuple[int, ...] | None = None
        if bits & TABLES:
            tables = struct.unpack_from(f"<{count}I", body, at + COLUMN_BYTES * n + TABLE_BYTES * first)
            is_queued = is_queued or SYSTEM_TABLE in tables
        keys = _cut(body, start, key_lengths)
        yield Piece(first, _ranges(body, values_at, ops, keys, value_lengths[:n_ranges]), keys, tables)
        is_in_writes = is_in_writes or bool(written)
        expires = expires or PUT_EXPIRING in ops
        start += sum(key_lengths)
        values_at += sum(value_lengths)
    if expires and not is_queued:
        raise ValueError(_NOT_QUEUED)


class Columns:
    """The intents of a body in their order, ranges first, of which the values are not cut out yet.

    Its order, and that no key is written twice, is not looked at: `decode_intents` does.
    """

    __slots__ = ("_body", "_ends", "_keys_start", "_value_lengths", "_values_start", "keys", "ops", "ranges", "tables")

    def __init__(self, body: bytes, bits: int = 0) -> None:
        """ValueError as `decode_intents`."""
        at, n, start = _begin(body, bits)
        ops = body[at : at + n]
        # Looked at first: what an operation of a newer version allows is not known.
        _check_ops(ops)
        key_lengths: tuple[int, ...] = struct.unpack_from(f"<{n}H", body, at + n)
        value_lengths: tuple[int, ...] = struct.unpack_from(f"<{n}I", body, at + 3 * n)
        _check_values(ops, value_lengths)
        values_start = start + sum(key_lengths)
        if values_start + sum(value_lengths) != len(body):
            raise ValueError(_NOT_FILLED)
        self._body = body
        self._keys_start = start
        self._values_start = values_start
        self._value_lengths = value_lengths
        # Where the values begin, and the last one ends; made when one is asked for.
        self._ends: list[int] | None = None
        #: What each does, and its key (of a range: its start).
        self.ops = ops
        self.keys = _cut(body, start, key_lengths)
        #: The table of each; None: all are of table 0.
        self.tables: tuple[int, ...] | None = None
        if bits & TABLES:
            self.tables = struct.unpack_from(f"<{n}I", body, at + COLUMN_BYTES * n)
        written = ops.lstrip(_RANGE_OPS)
        if written.strip(_WRITE_OPS):
            raise ValueError(_RANGES_LATE)
        if PUT_EXPIRING in ops and SYSTEM_TABLE not in (self.tables or ()):
            raise ValueError(_NOT_QUEUED)
        #: The ranges that it deletes: the first intents.
        self.ranges = _ranges(body, values_start, ops, self.keys, value_lengths[: n - len(written)])

    def values(self) -> list[bytes]:
        """The value of each; of a range its stop."""
        return _cut(self._body, self._values_start, self._value_lengths)

    def values_of(self, chosen: Iterable[int]) -> Iterator[bytes]:
        """The values of these alone, cut out one by one."""
        body, ends = self._body, self._value_ends()
        for i in chosen:
            yield body[ends[i] : ends[i + 1]]

    def value(self, i: int) -> bytes:
        """The value of one, cut out alone."""
        ends = self._value_ends()
        return self._body[ends[i] : ends[i + 1]]

    def places(self) -> tuple[array[int], array[int]]:
        """Where in the body each key begins, and the last one ends; and so for the values. 8 bytes an intent."""
        return array("I", accumulate(map(len, self.keys), initial=self._keys_start)), array("I", self._value_ends())

    def _value_ends(self) -> list[int]:
        if self._ends is None:
            self._ends = list(accumulate(self._value_lengths, initial=self._values_start))
        return self._ends


def _decode_columns(body: bytes, bits: int) -> WriteBatch:
    columns = Columns(body, bits)
    ops, keys, values, ranges = columns.ops, columns.keys, columns.values(), columns.ranges
    batch = WriteBatch()
    if columns.tables is None:
        n_ranges = len(ranges)
        _fill(batch, ranges, ops[n_ranges:], keys[n_ranges:], values[n_ranges:])
        return batch
    for table, of_ranges, of_writes in _tables(columns.tables, len(ranges), bits):
        part = batch.table(table) if table else batch
        _fill(part, ranges[of_ranges], ops[of_writes], keys[of_writes], values[of_writes])
    return batch


def _tables(tables: tuple[int, ...], n_ranges: int, bits: int) -> Iterator[tuple[int, slice, slice]]:
    """The tables of a commit, and where the ranges and the writes of each are. ValueError if they are not in order."""
    of_ranges, of_writes = tables[:n_ranges], tables[n_ranges:]
    if any(a > b for part in (of_ranges, of_writes) for a, b in pairwise(part)):
        raise ValueError("the tables in the commit are out of order")
    known = sorted({*of_ranges, *of_writes})
    if not known or known == [0]:
        raise ValueError("the commit names tables, and only the default one")
    if bool(bits & SYSTEM) != is_of_system(known):
        raise ValueError("the commit says falsely whether it changes a user's table")
    ranges = writes = 0
    for table in known:
        next_ranges, next_writes = bisect_right(of_ranges, table), bisect_right(of_writes, table)
        yield table, slice(ranges, next_ranges), slice(n_ranges + writes, n_ranges + next_writes)
        ranges, writes = next_ranges, next_writes


def _fill(batch: WriteBatch, ranges: list[KeyRange], ops: bytes, keys: list[bytes], values: list[bytes]) -> None:
    """Put the intents of one table into an empty batch, or raise ValueError with what is wrong with them."""
    batch.ranges = ranges
    if ops.count(PUT) == len(ops):
        batch.writes = dict(zip(keys, values, strict=True))
    else:
        if any(value for op, value in zip(ops, values, strict=True) if op == DELETE):
            raise ValueError("a delete in the commit has a value")
        batch.writes = {key: value_of(op, value) for op, key, value in zip(ops, keys, values, strict=True)}
        if PUT_EXPIRING in ops:
            # So that it is encoded as it was. Its rows of the queue are in the commit.
            batch.queue = {}
    if len(batch.writes) != len(keys):
        raise ValueError("the commit writes a key twice")


def value_of(op: int, data: bytes) -> bytes | None:
    """What a put or delete writes, by what the body has as its value."""
    if op == PUT:
        return data
    return Expiring(data) if op == PUT_EXPIRING else None


def _cut(body: bytes, start: int, lengths: tuple[int, ...]) -> list[bytes]:
    """Pieces of these lengths, one after the other from `start` on. Requires: the body holds them all."""
    n = len(lengths)
    if not n or lengths.count(lengths[0]) != n:
        ends = list(accumulate(lengths, initial=start))
        return [body[a:b] for a, b in pairwise(ends)]
    return _cut_even(body, start, lengths[0], n)


def _cut_even(body: bytes, start: int, length: int, n: int) -> list[bytes]:
    """As `_cut`, n pieces of one length: C cuts them, in half the time of a slice each."""
    pieces: list[bytes] = []
    for first in range(0, n, _CUT_AT_ONCE):
        count = min(_CUT_AT_ONCE, n - first)
        pieces += struct.unpack_from(f"{length}s" * count, body, start + first * length)
    return pieces


def _decode_range(op: int, start: bytes, stop: bytes) -> KeyRange:
    if op == DELETE_FROM:
        if stop:
            raise ValueError("an open range in the commit has a stop")
        return KeyRange(start, None)
    if stop <= start or len(stop) > MAX_KEY_BYTES:
        raise ValueError("a range in the commit does not end after its start")
    return KeyRange(start, stop)
