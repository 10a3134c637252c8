"""The body of a commit: what is known about it, and what it wrote, as bytes.

Bits of the record's kind say what the body holds beside the intents of table 0. Without any of them it is the plain
commit, and costs nothing for what the others have:

| bit | name | meaning |
|---|---|---|
| 8 | EXTENDED | the body begins with an extension block (see extension.py) |
| 9 | TABLES | the columns have a column of table ids |
| 10 | SYSTEM | there are intents, none of a user's table (0, and 16 to 2**31 - 1). Only with TABLES |

The intents, in columns, little-endian, without padding, so that a batch is packed and cut by whole columns:

| size | field |
|---|---|
| 4 | n, the number of intents |
| n x 1 | op: 1 put, 2 delete, 3 delete_range with a stop, 4 delete_range to the end, 5 put with expiry |
| n x 2 | key length; the key of a range is its start |
| n x 4 | value length; the value of op 3 is the range's stop, ops 2 and 4 have none; that of op 5 is the time when it
  expires (see kvwal/expiring.py), and then the value |
| n x 4 | table id; only with TABLES |
| - | the keys, one after the other |
| - | the values, one after the other |

Intents are valid when
1. the columns and what they announce fill the rest of the body exactly,
2. every op is known (others were written by a newer version), and ranges come before puts and deletes,
3. no key of a table is written twice, deletes and open ranges have no value, and a stop lies after its start,
4. no length exceeds its limit,
5. the value of op 5 has its time, and a commit with op 5 writes to table 1 as well (its rows of the queue),
6. table ids do not decrease, among the ranges and among the others; one of them is not 0, and SYSTEM says the truth.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from kvwal.batch import WriteBatch
from kvwal.expiring import STAMP_BYTES, Expiring
from kvwal.features import EXPIRY, EXTENSIONS, KEYSPACES
from kvwal.files import Buffer
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, SYSTEM_TABLE, KeyRange
from kvwal.log.extension import Extension, UnknownToUs, decode_extension, encode_extension

__all__ = [
    "EXTENDED",
    "MAX_BODY_BYTES",
    "ONE_KEY_OFFSET",
    "ONE_PUT",
    "PUT",
    "PUT_EXPIRING",
    "SYSTEM",
    "TABLES",
    "TABLE_BYTES",
    "Body",
    "Columns",
    "Piece",
    "decode_intents",
    "decode_put",
    "decode_put_key",
    "decode_uniform",
    "encode_intents",
    "encode_put",
    "encode_writes",
    "features_of",
    "is_of_users",
    "pieces",
    "put_bits",
    "size_of_writes",
    "value_of",
    "writes_body",
]

# On disk: never change.
EXTENDED: Final = 1 << 8
TABLES: Final = 1 << 9
SYSTEM: Final = 1 << 10
_FIRST_USER_TABLE: Final = 16
# From here on tables are derived from users' ones (indexes), and the feed passes over them too.
_FIRST_DERIVED_TABLE: Final = 1 << 31

PUT: Final = 1
_DELETE: Final = 2
_DELETE_RANGE: Final = 3
_DELETE_FROM: Final = 4
PUT_EXPIRING: Final = 5
_KNOWN_OPS: Final = bytes((PUT, _DELETE, _DELETE_RANGE, _DELETE_FROM, PUT_EXPIRING))
_WRITE_OPS: Final = bytes((PUT, _DELETE, PUT_EXPIRING))
_RANGE_OPS: Final = bytes((_DELETE_RANGE, _DELETE_FROM))

# One intent alone: n, op, key length, value length.
ONE = struct.Struct("<IBHI")
# How the plain body of one put begins, and where its key does.
ONE_PUT: Final = b"\x01\x00\x00\x00\x01"
ONE_KEY_OFFSET: Final = 11
_ONE_BYTES: Final = 11
assert ONE.size == _ONE_BYTES == ONE_KEY_OFFSET
_unpack_one = ONE.unpack_from

_COUNT = struct.Struct("<I")
_COLUMN_BYTES: Final = 7
TABLE_BYTES: Final = 4
MAX_BODY_BYTES: Final = 0xFFFFFFFF

# The module struct keeps what it has compiled for the last 100 formats: this bounds the time and the memory of one.
_CUT_AT_ONCE: Final = 256

# Said of a body as a whole, and of one that is read in pieces.
_NOT_FILLED: Final = "the commit's keys and values do not fill its record"
_RANGES_LATE: Final = "the commit holds ranges after writes"
_NOT_QUEUED: Final = "the commit puts what expires, and does not queue it"

_ONE_CHUNK_BYTES: Final = 64 << 10
_LARGE_VALUE_BYTES: Final = 32 << 10


class Body(list[Buffer]):
    """The chunks of a body that is not plain, the bits of the kind that say so, and what a reader must know."""

    __slots__ = ("bits", "features")

    def __init__(self, bits: int, chunks: Sequence[Buffer], features: int = 0) -> None:
        super().__init__(chunks)
        self.bits = bits
        self.features = features_of(bits) | features


def features_of(bits: int) -> int:
    """The features that a reader of a commit with these bits must know."""
    return (EXTENSIONS if bits & EXTENDED else 0) | (KEYSPACES if bits & TABLES else 0)


# -- to bytes ----------------------------------------------------------------------------------


def encode_put(key: bytes, value: bytes, table: int = 0) -> bytes | Body:
    """The body of a commit that puts one value. Both must have passed `as_key` and `as_value`."""
    one = ONE.pack(1, PUT, len(key), len(value))
    if not table:
        return one + key + value
    return Body(put_bits(table), (one + table.to_bytes(TABLE_BYTES, "little") + key + value,))


def put_bits(table: int) -> int:
    """The bits of a commit that is one put into a table other than 0."""
    return TABLES if is_of_users(table) else TABLES | SYSTEM


def encode_intents(batch: WriteBatch, extension: Extension | None = None) -> list[Buffer]:
    """The body of a commit, in chunks: one if it is small; large values are not copied. A `Body` if it is not plain.

    ValueError if the batch, or an item of the extension, is too large.
    """
    if batch.others is None and not extension:
        return _checked(_encode_plain(batch))
    parts = batch.parts()
    chunks = _encode_tables([(0, batch), *parts]) if parts else _encode_plain(batch)
    bits = 0
    if parts:
        system = not batch.writes and not batch.ranges and _is_of_system([table for table, _ in parts])
        bits |= TABLES | SYSTEM if system else TABLES
    if extension:
        chunks.insert(0, encode_extension(extension))
        bits |= EXTENDED
    return Body(bits, _checked(chunks), EXPIRY if batch.sets_expiry() else 0) if bits else _checked(chunks)


def is_of_users(table: int) -> bool:
    """Whether a table is a user's: then the feed has its changes."""
    return not table or _FIRST_USER_TABLE <= table < _FIRST_DERIVED_TABLE


def _is_of_system(tables: Sequence[int]) -> bool:
    """Whether none of these tables (at least one, ascending) is a user's."""
    return tables[0] > 0 and bisect_left(tables, _FIRST_USER_TABLE) == bisect_left(tables, _FIRST_DERIVED_TABLE)


def _checked(chunks: list[Buffer]) -> list[Buffer]:
    length = sum(map(len, chunks))
    if length > MAX_BODY_BYTES:
        raise ValueError(f"the commit takes {length} bytes in the log; the limit is {MAX_BODY_BYTES}")
    return chunks


def _encode_plain(batch: WriteBatch) -> list[Buffer]:
    keys, values, ops, value_lengths = _columns(batch)
    n = len(keys)
    columns = struct.pack(f"<I{n}s{n}H{n}I", n, ops, *map(len, keys), *value_lengths)
    return _chunks(columns, keys, values, value_lengths)


def encode_writes(writes: Sequence[tuple[int, bytes, bytes | None]]) -> bytes | None:
    """The bytes of a body (see `writes_body`) of puts and deletes by table, ascending, that expire nothing.

    The first table is a user's other than 0. None if they are too many for one chunk.
    """
    tables, keys, values = zip(*writes, strict=True)
    chunks = _encode_columns(tables, keys, values)
    return bytes(chunks[0]) if len(chunks) == 1 else None


def writes_body(data: bytes) -> Body:
    """The body with these bytes."""
    return Body(TABLES, (data,))


def size_of_writes(body: bytes, count: int) -> int:
    """Bytes of the keys and values of `count` writes, by what `encode_writes` made of them."""
    return len(body) - _COUNT.size - (_COLUMN_BYTES + TABLE_BYTES) * count


@lru_cache(maxsize=32)
def _table_columns(n: int) -> struct.Struct:
    return struct.Struct(f"<I{n}s{n}H{n}I{n}I")


def _encode_columns(tables: Sequence[int], keys: Sequence[bytes], found: Sequence[bytes | None]) -> list[Buffer]:
    n = len(keys)
    values: Sequence[bytes]
    if None in found:
        ops = bytes([_DELETE if value is None else PUT for value in found])
        values = [value or b"" for value in found]
    else:
        # The usual batch of puts alone is found out without looking at each value.
        ops = b"\x01" * n
        values = found  # type: ignore[assignment]  # None is not in it
    value_lengths = list(map(len, values))
    columns = _table_columns(n).pack(n, ops, *map(len, keys), *value_lengths, *tables)
    return _chunks(columns, keys, values, value_lengths)


def _encode_tables(parts: Sequence[tuple[int, WriteBatch]]) -> list[Buffer]:
    """As `_encode_plain`, of several tables in ascending order: the ranges of all of them, then the writes."""
    tables: list[int] = []
    keys: list[bytes] = []
    # Quick where there are puts and deletes alone.
    if not any(part.ranges or part.queue is not None for _, part in parts):
        found: list[bytes | None] = []
        for table, part in parts:
            tables += [table] * len(part.writes)
            keys += part.writes
            found += part.writes.values()
        return _encode_columns(tables, keys, found)
    values: list[bytes] = []
    ops = b""
    value_lengths: list[int] = []
    split = [(table, len(part.ranges), _columns(part)) for table, part in parts]
    pieces = [(table, slice(n), columns) for table, n, columns in split]
    pieces += [(table, slice(n, None), columns) for table, n, columns in split]
    for table, piece, (its_keys, its_values, its_ops, its_lengths) in pieces:
        keys += its_keys[piece]
        values += its_values[piece]
        ops += its_ops[piece]
        value_lengths += its_lengths[piece]
        tables += [table] * (len(keys) - len(tables))
    n = len(keys)
    lengths = struct.pack(f"<I{n}s{n}H{n}I{n}I", n, ops, *map(len, keys), *value_lengths, *tables)
    return _chunks(lengths, keys, values, value_lengths)


def _columns(batch: WriteBatch) -> tuple[list[bytes], list[bytes], bytes, list[int]]:
    """Keys, values, ops and lengths of the values of one table: ranges first."""
    writes = batch.writes
    ranges = batch.ranges
    keys: list[bytes] = list(writes)
    values: list[bytes]
    try:
        # len(None) fails: the usual batch of puts alone is found out without looking at each value.
        values = list(writes.values())  # type: ignore[arg-type]  # None is dealt with below
        value_lengths = list(map(len, values))
        ops = b"\x01" * len(keys)
    except TypeError:
        ops = bytes([_DELETE if value is None else PUT for value in writes.values()])
        values = [value or b"" for value in writes.values()]
        value_lengths = list(map(len, values))
    if batch.queue is not None:
        ops = bytes([PUT_EXPIRING if type(value) is Expiring else op for op, value in zip(ops, values, strict=True)])
    if ranges:
        ops = bytes([_DELETE_FROM if stop is None else _DELETE_RANGE for _, stop in ranges]) + ops
        keys[:0] = [start for start, _ in ranges]
        stops = [stop or b"" for _, stop in ranges]
        values[:0] = stops
        value_lengths[:0] = map(len, stops)
    return keys, values, ops, value_lengths


def _chunks(columns: bytes, keys: Sequence[bytes], values: Sequence[bytes], value_lengths: list[int]) -> list[Buffer]:
    """Everything in order: joined, but for large values, which stay as they are."""
    if sum(value_lengths) < _ONE_CHUNK_BYTES or max(value_lengths) < _LARGE_VALUE_BYTES:
        return [b"".join((columns, *keys, *values))]
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
    return chunks


# -- from bytes --------------------------------------------------------------------------------


def decode_put(data: bytes, at: int = 0) -> tuple[bytes, bytes] | None:
    """The key and value of the commit whose body is all of `data` from `at` on, if it is one put and plain.

    None for any other, valid or not: ask `decode_intents`.
    """
    size = len(data)
    if size - at >= _ONE_BYTES:
        n, op, key_length, value_length = _unpack_one(data, at)
        at += _ONE_BYTES
        split = at + key_length
        if n == 1 and op == PUT and split + value_length == size and value_length <= MAX_VALUE_BYTES:
            return data[at:split], data[split:]
    return None


def decode_put_key(body: bytes) -> bytes | None:
    """The key of what `decode_put` would return, without its value. None: as there."""
    if len(body) >= _ONE_BYTES:
        n, op, key_length, value_length = _unpack_one(body)
        split = _ONE_BYTES + key_length
        if n == 1 and op == PUT and split + value_length == len(body) and value_length <= MAX_VALUE_BYTES:
            return body[_ONE_BYTES:split]
    return None


def decode_uniform(data: bytes, at: int = 0) -> tuple[Sequence[bytes], Sequence[bytes]] | None:
    """The keys and values of the commit whose body is all of `data` from `at` on, if it is plain and uniform.

    That is: puts alone, of keys of one length and values of one length, as batches of a kind mostly are. None for any
    other, valid or not: ask `decode_intents`.
    """
    if len(data) - at < _COUNT.size:
        return None
    (n,) = _COUNT.unpack_from(data, at)
    ops = at + _COUNT.size
    key_column, value_column, start = ops + n, ops + 3 * n, ops + _COLUMN_BYTES * n
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
    if size - at < _COUNT.size:
        raise ValueError("the commit's intents are cut short")
    (n,) = _COUNT.unpack_from(body, at)
    at += _COUNT.size
    start = at + (_COLUMN_BYTES + (TABLE_BYTES if bits & TABLES else 0)) * n
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
            tables = struct.unpack_from(f"<{count}I", body, at + _COLUMN_BYTES * n + TABLE_BYTES * first)
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
            self.tables = struct.unpack_from(f"<{n}I", body, at + _COLUMN_BYTES * n)
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
    if bool(bits & SYSTEM) != _is_of_system(known):
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
        if any(value for op, value in zip(ops, values, strict=True) if op == _DELETE):
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
    if op == _DELETE_FROM:
        if stop:
            raise ValueError("an open range in the commit has a stop")
        return KeyRange(start, None)
    if stop <= start or len(stop) > MAX_KEY_BYTES:
        raise ValueError("a range in the commit does not end after its start")
    return KeyRange(start, stop)
