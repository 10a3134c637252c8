"""Indexes of tables as bytes, and what the commit leader adds to a commit for them.

An index has two derived tables. That with its own id has the *entries*: the index key and the key of the table together
are the key, and there is no value. The next id has the *reverse rows*: the key is that of the table, and the value is
all index keys that it has. So the entries of what a commit overwrites or deletes are known without a codec.

Rules:

- The caller computes the index keys of what a commit puts (`WriteBatch.index_keys`), outside of any lock. The commit
  leader adds entries and reverse rows (`with_entries`): it knows bytes alone, and treats each write of a table alike,
  whichever call it came from. A put alone brings them along (`prepared`); if a reverse row is another one by then, it
  goes the way of all others.
- Invariant: a put reaches a table only with the keys for each of its indexes. The leader refuses others.
- Invariant: each key of a table has a reverse row in each index that is built, also where it has no index key.
- While an index is built, a value that a migration puts has no index keys. So its key loses its reverse row, if the
  build has not come to it yet. A build that had read the former value finds no row, and reads the key again.
- Invariant: an index without a *stale row* has exactly the entries that its reverse rows name. With one it may have
  more. A deleted range of more than 1,000 keys leaves its entries behind, so that the leader's work is bounded. A scan
  passes over what no reverse row names, and a job in the background removes it (see indexing.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from kvwal.batch import SAME_INDEX_KEYS, WriteBatch
from kvwal.engine.publish import STALE_INDEX
from kvwal.engine.reads import Reads
from kvwal.engine.request import Newest
from kvwal.engine.row_cache import IndexedTables, IndexRow, Row, RowCache
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.engine.writes import IndexedPut, IndexKeys
from kvwal.errors import CorruptionError, IndexesChangedError
from kvwal.expiring import plain
from kvwal.files.names import DATA
from kvwal.keys import SYSTEM_TABLE, KeyRange, in_any
from kvwal.log import encode_writes

__all__ = [
    "FIRST_DERIVED_ID",
    "as_index_key",
    "building_key",
    "change_entries",
    "decode_building",
    "decode_indexes",
    "drop",
    "encode_building",
    "encode_indexes",
    "entries_of",
    "entry_of",
    "escaped",
    "is_state",
    "names_entry",
    "prepared",
    "reverse_of",
    "stale_among",
    "stale_key",
    "state_keys",
    "with_entries",
]

# On disk: never change.
FIRST_DERIVED_ID: Final = 1 << 31
_MEMBER: Final = "indexes"
_END: Final = b"\x00\x00"
_ZERO: Final = b"\x00"
_ZERO_ESCAPED: Final = b"\x00\xff"
_BUILDING: Final = b"\x0d"
_VERSION: Final = b"\x01"
_COUNT = struct.Struct("<BQ")
_ID_BYTES: Final = 4

# Deleted with their range, these are taken out one by one, in about 3 ms; more become stale.
_MAX_EXACT_KEYS: Final = 1000


# -- bytes -------------------------------------------------------------------------------------


def escaped(data: bytes) -> bytes:
    """An index key as the begin of an entry: without two zeros in succession, in the same order."""
    return data.replace(_ZERO, _ZERO_ESCAPED)


def as_index_key(data: bytes) -> bytes:
    """An index key as it is in a reverse row, and in an entry before the key of the table."""
    return escaped(data) + _END


def entries_of(keys: Value, key: bytes) -> list[bytes]:
    """The entries of a key with these index keys."""
    if not keys:
        return []
    if keys.find(_END) == len(keys) - 2:
        # The common case: there is one.
        return [keys + key]
    return [each + _END + key for each in keys.split(_END)[:-1]]


def entry_of(entry: bytes) -> tuple[bytes, bytes]:
    """The index key of an entry, and the key of the table."""
    head, _, key = entry.partition(_END)
    return head.replace(_ZERO_ESCAPED, _ZERO), key


def names_entry(keys: Value, entry: bytes) -> bool:
    """Whether a reverse row has this entry. Requires: it is that of the key."""
    head, _, _ = entry.partition(_END)
    return bool(keys) and head in keys.split(_END)[:-1]  # type: ignore[union-attr]  # it is not None


def reverse_of(index: int) -> int:
    """The id of the table of reverse rows."""
    return index + 1


def building_key(index: int) -> bytes:
    """The key of a row that is there while an index is built; its value says how far."""
    return _BUILDING + index.to_bytes(_ID_BYTES, "big")


def encode_building(upto: bytes) -> bytes:
    """The value: the first key that is not built yet."""
    return _VERSION + upto


def decode_building(value: bytes) -> bytes:
    """What `encode_building` was given. CorruptionError."""
    if value[:1] != _VERSION:
        raise CorruptionError(DATA, None, "the row of an index that is being built is not valid")
    return value[1:]


def stale_key(index: int | None = None) -> bytes:
    """The key of a row that is there while an index may have stale entries; None: how those of all indexes begin."""
    return STALE_INDEX if index is None else STALE_INDEX + index.to_bytes(_ID_BYTES, "big")


def state_keys(index: int) -> tuple[bytes, bytes]:
    """The keys of both."""
    return building_key(index), stale_key(index)


def is_state(key: bytes) -> bool:
    """Whether the key of a row of table 1 is one of these."""
    return key[:1] in (_BUILDING, STALE_INDEX)


def decode_indexes(name: str, others: Mapping[str, Any]) -> tuple[IndexRow, ...]:
    """The indexes among the members of a table's row. CorruptionError."""
    found = others.get(_MEMBER, [])
    rows: list[IndexRow] = []
    for each in found if isinstance(found, list) else [None]:
        match each:
            case {"name": str(of), "id": int(index), "codec": [str(codec), int(version)]} if (
                FIRST_DERIVED_ID <= index < (1 << 32) - 1
            ):
                rows.append(IndexRow(of, index, (codec, version)))
            case _:
                raise CorruptionError(DATA, None, f"the row of table {name!r} has an index that is not valid")
    return tuple(rows)


def encode_indexes(others: Mapping[str, Any], rows: tuple[IndexRow, ...]) -> dict[str, Any]:
    """The members of a table's row with these indexes."""
    members = {name: member for name, member in others.items() if name != _MEMBER}
    if rows:
        members[_MEMBER] = [{"name": row.name, "id": row.id, "codec": list(row.codec)} for row in rows]
    return members


# -- what a commit changes ---------------------------------------------------------------------


def drop(index: int, batch: WriteBatch) -> None:
    """Remove all of an index but its definition. O(log n)."""
    batch.table(index).delete_range()
    batch.table(reverse_of(index)).delete_range()
    for key in state_keys(index):
        batch.table(SYSTEM_TABLE).delete(key)


def with_entries(batch: WriteBatch, indexed: IndexedTables, newest: Newest) -> WriteBatch:
    """The same writes with those to the indexes of its tables. The batch itself stays as it is.

    IndexesChangedError for a put that comes without the keys for an index.
    """
    made = WriteBatch()
    made.writes, made.ranges, made.names = batch.writes, batch.ranges, batch.names
    made.queue = batch.queue
    for table, part in batch.parts():
        own = made.table(table)
        if table == SYSTEM_TABLE:
            # More may be added to it.
            own.writes.update(part.writes)
            own.ranges.extend(part.ranges)
        else:
            own.writes, own.ranges, own.queue = part.writes, part.ranges, part.queue
        for index in indexed[table].indexes if table in indexed else ():
            keys = (part.index_keys or {}).get(index.id)
            if part.index_keys is SAME_INDEX_KEYS:
                gone = WriteBatch()
                gone.writes = {key: None for key, value in part.writes.items() if value is None}
                gone.writes.update(dict.fromkeys(_to_be_built(index.id, table, part, newest)))
                _add(made, index.id, gone, {}, newest)
                continue
            if keys is None and any(value is not None for value in part.writes.values()):
                raise IndexesChangedError(table)
            _add(made, index.id, part, keys or {}, newest)
    return made


def _to_be_built(index: int, table: int, part: WriteBatch, newest: Newest) -> list[bytes]:
    """The keys that get another value, and to which the build of an index has not come yet."""
    at = newest.table(SYSTEM_TABLE).get(building_key(index))
    if at is None:
        return []
    upto, raw = decode_building(at), newest.table(table).raw
    return [key for key, value in part.writes.items() if key >= upto and plain(raw(key)) != plain(value)]


def _add(made: WriteBatch, index: int, part: WriteBatch, keys: Mapping[bytes, Value], newest: Newest) -> None:
    entries, reverse = made.table(index), made.table(reverse_of(index))
    before = newest.table(reverse_of(index))
    for bounds in part.ranges:
        _delete_range(made, index, bounds, newest)
    put, rows = entries.writes, reverse.writes
    for key, value in part.writes.items():
        old = None if part.ranges and in_any(key, part.ranges) else before.get(key)
        new = None if value is None else keys[key]
        if old != new:
            change_entries(put, key, old, new)
            rows[key] = new


def change_entries(entries: dict[bytes, Value], key: bytes, old: Value, new: Value) -> None:
    """Write to the entries of an index what changes when a key gets another reverse row."""
    for entry in entries_of(old, key):
        entries[entry] = None
    for entry in entries_of(new, key):
        entries[entry] = b""


def prepared(
    table: int, key: bytes, value: bytes, keys: IndexKeys, names: object, cache: RowCache, reads: Reads
) -> IndexedPut | None:
    """A put into a table with indexes, for `CommitQueue.put`; None if it is too large for that.

    Reads the reverse rows that are not in the row cache. `keys`, `names`: as `WriteBatch` has them.
    """
    token_of = cache.token
    was: list[tuple[Row, Value]] = []
    writes: list[tuple[int, bytes, Value]] = [(table, key, value)]
    rows: dict[Row, Value] = {(token_of(table), key): value}
    for index in sorted(keys):
        reverse, new = reverse_of(index), keys[index][key]
        row: Row = (token_of(reverse), key)
        # As a hot get.
        old = cache.rows.get(row, MISSING)
        if isinstance(old, Missing):
            old = reads.read(key, table=reverse)
        was.append((row, old))
        if old != new:
            token = token_of(index)
            entries: dict[bytes, Value] = {}
            change_entries(entries, key, old, new)
            for entry, there in entries.items():
                writes.append((index, entry, there))
                rows[token, entry] = there
            writes.append((reverse, key, new))
            rows[row] = new
    whole = encode_writes(writes)
    return None if whole is None else IndexedPut(was, writes, rows, whole, names, keys)


def _delete_range(made: WriteBatch, index: int, bounds: KeyRange, newest: Newest) -> None:
    entries, system = made.table(index), made.table(SYSTEM_TABLE)
    made.table(reverse_of(index)).ranges.append(bounds)
    stale = stale_key(index)
    if not bounds.start and bounds.stop is None:
        entries.delete_range()
        system.delete(stale)
        return
    found = newest.table(reverse_of(index)).first_pairs(*bounds, most=_MAX_EXACT_KEYS + 1)
    if len(found) <= _MAX_EXACT_KEYS:
        entries.writes.update((entry, None) for key, keys in found for entry in entries_of(keys, key))
        return
    # Another value each time: a job that has looked for stale entries since before does not remove it.
    value = system.writes.get(stale) or newest.table(SYSTEM_TABLE).get(stale)
    count = _COUNT.unpack(value)[1] if value is not None and len(value) == _COUNT.size else 0
    system.put(stale, _COUNT.pack(1, count + 1))


def stale_among(entries: Iterable[bytes], row_of: Callable[[bytes], Value]) -> list[bytes]:
    """Those of the entries that no reverse row names; `row_of` gives that of a key."""
    return [entry for entry in entries if not names_entry(row_of(entry_of(entry)[1]), entry)]
