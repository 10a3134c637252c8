"""The body of a commit: what is known about it, and what it wrote, as bytes. `columns` is the way back.

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
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.expiring import Expiring
from kvwal.features import EXPIRY, EXTENSIONS, KEYSPACES
from kvwal.files import Buffer
from kvwal.log.extension import Extension, encode_extension

__all__ = [
    "COLUMN_BYTES",
    "COUNT",
    "DELETE",
    "DELETE_FROM",
    "DELETE_RANGE",
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
    "encode_intents",
    "encode_put",
    "encode_writes",
    "features_of",
    "is_of_system",
    "is_of_users",
    "put_bits",
    "size_of_writes",
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
DELETE: Final = 2
DELETE_RANGE: Final = 3
DELETE_FROM: Final = 4
PUT_EXPIRING: Final = 5

# One intent alone: n, op, key length, value length.
ONE = struct.Struct("<IBHI")
# How the plain body of one put begins, and where its key does.
ONE_PUT: Final = b"\x01\x00\x00\x00\x01"
ONE_KEY_OFFSET: Final = 11
assert ONE.size == ONE_KEY_OFFSET

COUNT = struct.Struct("<I")
COLUMN_BYTES: Final = 7
TABLE_BYTES: Final = 4
MAX_BODY_BYTES: Final = 0xFFFFFFFF

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
        system = not batch.writes and not batch.ranges and is_of_system([table for table, _ in parts])
        bits |= TABLES | SYSTEM if system else TABLES
    if extension:
        chunks.insert(0, encode_extension(extension))
        bits |= EXTENDED
    return Body(bits, _checked(chunks), EXPIRY if batch.sets_expiry() else 0) if bits else _checked(chunks)


def is_of_users(table: int) -> bool:
    """Whether a table is a user's: then the feed has its changes."""
    return not table or _FIRST_USER_TABLE <= table < _FIRST_DERIVED_TABLE


def is_of_system(tables: Sequence[int]) -> bool:
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
    return len(body) - COUNT.size - (COLUMN_BYTES + TABLE_BYTES) * count


@lru_cache(maxsize=32)
def _table_columns(n: int) -> struct.Struct:
    return struct.Struct(f"<I{n}s{n}H{n}I{n}I")


def _encode_columns(tables: Sequence[int], keys: Sequence[bytes], found: Sequence[bytes | None]) -> list[Buffer]:
    n = len(keys)
    values: Sequence[bytes]
    if None in found:
        ops = bytes([DELETE if value is None else PUT for value in found])
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
        ops = bytes([DELETE if value is None else PUT for value in writes.values()])
        values = [value or b"" for value in writes.values()]
        value_lengths = list(map(len, values))
    if batch.queue is not None:
        ops = bytes([PUT_EXPIRING if type(value) is Expiring else op for op, value in zip(ops, values, strict=True)])
    if ranges:
        ops = bytes([DELETE_FROM if stop is None else DELETE_RANGE for _, stop in ranges]) + ops
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
