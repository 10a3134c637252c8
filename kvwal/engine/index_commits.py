"""Commits that give a table an index, take it away, or work on one in the background: the leader evaluates them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, NamedTuple

from kvwal.batch import WriteBatch
from kvwal.engine.indexes import (
    as_index_key,
    building_key,
    change_entries,
    decode_indexes,
    drop,
    encode_building,
    encode_indexes,
    entries_of,
    is_state,
    reverse_of,
    stale_among,
    stale_key,
)
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.request import Newest
from kvwal.engine.row_cache import IndexRow
from kvwal.engine.tables import (
    NEXT_IDS_KEY,
    Asked,
    CodecName,
    TableRow,
    check_codecs,
    decode_row,
    encode_ids,
    encode_row,
    make_row,
    next_ids,
    row_key,
    told_apart,
)
from kvwal.engine.value import Value
from kvwal.errors import Error, IndexNotFoundError, TableCodecError, TableNotFoundError
from kvwal.expiring import plain
from kvwal.keys import MAX_KEY_BYTES
from kvwal.log import Extension

__all__ = ["Build", "Declared", "DeclareIndex", "DropIndex", "RemoveStale", "without_indexes"]


class Declared(NamedTuple):
    """An index as a program declares it.

    Attributes:
        name: its name.
        codec: name and version of the codec of its keys.
        values: the codec that reads the values of the table for it.
        keys: the index keys, as bytes, of a value of the table, which is given as bytes.
    """

    name: str
    codec: tuple[str, int]
    values: CodecName
    keys: Callable[[bytes], Sequence[bytes]]

    def row_of(self, key: bytes, value: bytes) -> bytes:
        """The reverse row of a pair. ValueError if a key is too long."""
        keys = self.keys(value)
        row = as_index_key(keys[0]) if len(keys) == 1 else b"".join(sorted(set(map(as_index_key, keys))))
        if len(row) + len(key) > MAX_KEY_BYTES:
            size = max(map(len, entries_of(row, key)), default=0)
            if size > MAX_KEY_BYTES:
                raise ValueError(
                    f"an index key and the key of the table have {size} bytes together, with what index {self.name!r} "
                    f"adds; the limit is {MAX_KEY_BYTES}"
                )
        return row

    def check(self, table: str, row: IndexRow) -> None:
        """TableCodecError if the index was made with another codec."""
        if row.codec != self.codec:
            raise TableCodecError(table, f"keys of index {self.name!r}", *_texts(row.codec, self.codec))

    def check_values(self, row: TableRow) -> None:
        """TableCodecError if the table has values of a newer version than this reads: their index keys may differ."""
        if not self.values.reads(row.value):
            raise TableCodecError(row.name, "values", *told_apart(row.value, self.values))


def _texts(has: tuple[str, int], asked: tuple[str, int]) -> tuple[str, str]:
    return told_apart(CodecName(*has), CodecName(*asked))


class DeclareIndex:
    """Give a table an index, and make the table if there is none."""

    __slots__ = ("_asked", "_declared", "_name", "_register")

    extension: Final = None
    dropped: Final = None

    def __init__(
        self, name: str, asked: Asked, declared: Declared, register: Callable[[int, Declared], object]
    ) -> None:
        """`register` is told the id, before a commit may need the function."""
        self._name = name
        self._asked = asked
        self._declared = declared
        self._register = register

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch, declared = WriteBatch(), self._declared
        system, rows = newest.table(SYSTEM_TABLE), batch.table(SYSTEM_TABLE)
        key = row_key(self._name)
        value = system.get(key)
        row = make_row(self._name, self._asked, system.get, rows) if value is None else decode_row(key, value)
        check_codecs(row, self._asked)
        indexes = decode_indexes(row.name, row.others)
        for index in indexes:
            if index.name == declared.name:
                declared.check(row.name, index)
                self._register(index.id, declared)
                return None
        found, derived = next_ids(rows.writes.get(NEXT_IDS_KEY) or system.get(NEXT_IDS_KEY))
        if derived + 2 >= 1 << 32:
            raise ValueError("there have been 1,073,741,822 indexes; no id is left")
        made = IndexRow(declared.name, derived, declared.codec)
        self._register(made.id, declared)
        rows.put(NEXT_IDS_KEY, encode_ids(found, derived + 2))
        rows.put(key, encode_row(replace(row, others=encode_indexes(row.others, (*indexes, made)))))
        # What has expired may come back with the clock.
        if not newest.table(row.id).is_empty():
            rows.put(building_key(made.id), encode_building(b""))
        return batch


class DropIndex:
    """Take an index from a table. TableNotFoundError, IndexNotFoundError."""

    __slots__ = ("_index", "_name", "extension")

    dropped: Final = None

    def __init__(self, name: str, index: str, extension: Extension | None = None) -> None:
        self._name = name
        self._index = index
        self.extension = extension

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch = WriteBatch()
        key = row_key(self._name)
        value = newest.table(SYSTEM_TABLE).get(key)
        if value is None:
            raise TableNotFoundError(self._name)
        row = decode_row(key, value)
        indexes = decode_indexes(row.name, row.others)
        for index in indexes:
            if index.name == self._index:
                drop(index.id, batch)
                left = tuple(each for each in indexes if each is not index)
                batch.table(SYSTEM_TABLE).put(key, encode_row(replace(row, others=encode_indexes(row.others, left))))
                return batch
        raise IndexNotFoundError(self._name, self._index)


class Build:
    """Add some pairs to an index that is built, as far as they are still those of the table."""

    __slots__ = ("_at", "_index", "_next", "_rows", "_table")

    extension: Final = None
    dropped: Final = None

    def __init__(
        self, table: TableRow, index: int, at: Value, rows: list[tuple[bytes, bytes, bytes]], following: bytes | None
    ) -> None:
        """`table`: its row, as it was when the index keys were made. `at`: the row that says how far the index is
        built; `following`: where to go on, None: it is built.
        """
        self._table = table
        self._index = index
        self._at = at
        self._rows = rows
        self._next = following

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        system, key = newest.table(SYSTEM_TABLE), building_key(self._index)
        name = row_key(self._table.name)
        value = system.get(name)
        row = None if value is None else decode_row(name, value)
        if system.get(key) != self._at or row is None or (row.id, row.value) != (self._table.id, self._table.value):
            # It was dropped, or is to be built anew for a newer version of the values; or the table has another name.
            return None
        batch = WriteBatch()
        entries, reverse = batch.table(self._index), batch.table(reverse_of(self._index))
        values, before = newest.table(self._table.id), newest.table(reverse_of(self._index))
        following = self._next
        for own, value, keys in self._rows:
            old, now = before.get(own), plain(values.raw(own))
            if now == value:
                if old != keys:
                    change_entries(entries.writes, own, old, keys)
                    reverse.writes[own] = keys
            elif now is not None and old is None:
                # A migration has put it since, without its index keys: it is read again.
                following = own
                break
            # Invariant: what was written since is never undone: its writer has seen to the index.
        batch.table(SYSTEM_TABLE).writes[key] = None if following is None else encode_building(following)
        return batch


class RemoveStale:
    """Remove those of some entries that no reverse row names. Without any: the row that says that there may be some."""

    __slots__ = ("_entries", "_index", "_row")

    extension: Final = None
    dropped: Final = None

    def __init__(self, index: int, entries: Iterable[bytes], row: Value) -> None:
        self._index = index
        self._entries = entries
        self._row = row

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch = WriteBatch()
        key = stale_key(self._index)
        stale = stale_among(self._entries, newest.table(reverse_of(self._index)).get)
        batch.table(self._index).writes.update(dict.fromkeys(stale))
        # Invariant: a range that was deleted since the entries were looked at has made it another row.
        if not self._entries and newest.table(SYSTEM_TABLE).get(key) == self._row:
            batch.table(SYSTEM_TABLE).delete(key)
        return batch if len(batch) else None


def without_indexes(batch: WriteBatch, derived: set[int]) -> WriteBatch:
    """The same writes but for those to indexes, and with tables that have none: where not all of them may be saved.

    `derived`: the tables of the indexes that rows have named so far.
    """
    made = batch.copy()
    others = made.others or {}
    system = others.get(SYSTEM_TABLE)
    for key, value in list(system.writes.items()) if system is not None else ():
        assert system is not None, "it has writes"
        if is_state(key):
            del system.writes[key]
        elif value is not None:
            # What is no row of a table stays as it is.
            with suppress(Error):
                row = decode_row(key, value)
                indexes = decode_indexes(row.name, row.others)
                derived.update(each for index in indexes for each in (index.id, reverse_of(index.id)))
                if indexes:
                    system.writes[key] = encode_row(replace(row, others=encode_indexes(row.others, ())))
    made.others = {table: part for table, part in others.items() if table not in derived}
    return made
