"""The proof that the indexes of tables are what the tables are, as bytes: no function is known, and none is needed.

- Each key of a table has a reverse row, as far as the index is built, and each reverse row has its key in the table.
- Each index key of a reverse row has its entry, and each entry is named by its reverse row, but for stale ones.
- No two tables have one id, and the next ids are above those of all tables and indexes.
- Each id that was given to a table and has keys has a row, and each row can be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import groupby, islice

from kvwal.engine.indexes import (
    building_key,
    decode_building,
    decode_indexes,
    entries_of,
    entry_of,
    names_entry,
    reverse_of,
    stale_key,
)
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.readers import Reader
from kvwal.engine.reads import Reads
from kvwal.engine.row_cache import IndexRow
from kvwal.engine.tables import NEXT_IDS_KEY, TableRow, Tables, next_ids
from kvwal.errors import CorruptionError, Finding
from kvwal.files.names import DATA
from kvwal.log import is_of_users
from kvwal.pages.catalogue import tables_beside

__all__ = ["verify_indexes"]

# Of one index: more say no more.
_MAX_FINDINGS = 100


def verify_indexes(reads: Reads, tables: Tables) -> Iterator[Finding]:
    """What does not hold, of the newest moment. O(entries and keys)."""
    reader = reads.moments.reader("verify")
    try:
        named: dict[int, str] = {}
        is_known = True
        found, derived = next_ids(reads.read_at(reader, NEXT_IDS_KEY, table=SYSTEM_TABLE))
        for _, row in tables.rows(reads.moments.again(reader, "verify")):
            if not isinstance(row, TableRow):
                # The row of a newer version is right, and names a table that is not known here.
                is_known &= isinstance(row, CorruptionError)
                if isinstance(row, CorruptionError):
                    yield row.finding
                continue
            if named.setdefault(row.id, row.name) != row.name:
                yield Finding(DATA, None, f"tables {named[row.id]!r} and {row.name!r} have one id, {row.id}")
            if row.id >= found:
                yield Finding(DATA, None, f"the id of table {row.name!r}, {row.id}, is to be given to a new one")
            for index in decode_indexes(row.name, row.others):
                if reverse_of(index.id) >= derived:
                    yield Finding(DATA, None, f"the id of index {index.name!r} of {row.name!r} is to be given anew")
                for problem in islice(_Verified(reads, reader, row, index).problems(), _MAX_FINDINGS):
                    yield Finding(DATA, None, f"index {index.name!r} of table {row.name!r}: {problem}")
        # A batch may write to an id that was never given out: that was no table's.
        given = max([found, *(table + 1 for table in named)])
        for table in sorted(filter(is_of_users, _written(reader) - named.keys())) if is_known else ():
            if table < given and (keys := reads.count_at(reader, None, None, table=table)):
                yield Finding(DATA, None, f"table {table} has no row that names it, so no one reaches its {keys} keys")
    except CorruptionError as error:
        yield Finding(error.file, error.offset, error.reason)
    finally:
        reader.release()


def _written(reader: Reader) -> set[int]:
    """The tables other than 0 that may have keys as of a reader."""
    version = reader.version
    newer = [*version.memtable.parts.written(), *(version.frozen.parts.written() if version.frozen else ())]
    return {*tables_beside(version.tree), *(table for table, _ in newer)}


class _Verified:
    """One index at a moment."""

    def __init__(self, reads: Reads, reader: Reader, row: TableRow, index: IndexRow) -> None:
        self._reads = reads
        self._reader = reader
        self._table = row.id
        self._index = index.id
        at = self._get(SYSTEM_TABLE, building_key(index.id))
        # Keys from here on need not have a reverse row.
        self._built = None if at is None else decode_building(at)
        self._is_stale = self._get(SYSTEM_TABLE, stale_key(index.id)) is not None

    def _get(self, table: int, key: bytes) -> bytes | None:
        return self._reads.read_at(self._reader, key, table=table)

    def _pairs(self, table: int) -> Iterator[tuple[bytes, bytes]]:
        """All that is there, also what has expired."""
        again = self._reads.moments.again(self._reader, "verify")
        again.at_us = 0
        for keys, values in self._reads.chunks(again, None, None, reverse=False, table=table):
            yield from zip(keys, values, strict=True)

    def problems(self) -> Iterator[str]:
        """What does not hold."""
        index, reverse = self._index, reverse_of(self._index)
        both = merge(((key, 0) for key, _ in self._pairs(self._table)), ((key, 1) for key, _ in self._pairs(reverse)))
        for key, found in groupby(both, lambda each: each[0]):
            sides = [side for _, side in found]
            is_due = sides == [0] and (self._built is None or key < self._built)
            if is_due and self._get(self._table, key) is not None:
                yield f"key {key[:64]!r} is in the table alone"
            if sides == [1]:
                yield f"key {key[:64]!r} is in the index alone"
        for key, keys in self._pairs(reverse):
            for entry in entries_of(keys, key):
                if self._get(index, entry) is None:
                    yield f"entry {entry[:64]!r} of key {key[:64]!r} is missing"
        if not self._is_stale:
            for entry, _ in self._pairs(index):
                key = entry_of(entry)[1]
                if not names_entry(self._get(reverse, key), entry):
                    yield f"entry {entry[:64]!r} is none of key {key[:64]!r}"
