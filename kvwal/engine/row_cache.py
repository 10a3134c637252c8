"""The row cache: the newest values of keys that were lately written or read, in front of everything.

A hot get is one dict hit without a lock.

Rules:

- Invariant: a row, where there is one, is the newest published value of its key (None: absent).
- Invariant: no row is a value that expires, since a hot get does not look at the time. A commit that puts one takes the
  row of its key away before it becomes visible.
- A commit changes all its rows in ONE `dict.update`, a single C call over bytes keys that no other thread can
  interleave with; or, if it deletes a range, in one assignment of a new dict. That is the moment it becomes visible.
- A deleted range does not walk the rows: they are set aside whole, and come back one by one, when they are asked for
  and the memtable says that no range has covered them.
- Everything but a look into `rows` requires State.lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

from kvwal.batch import WriteBatch
from kvwal.engine.memtable import Memtable
from kvwal.engine.value import MISSING, Missing, Value

__all__ = ["IndexRow", "IndexedTable", "IndexedTables", "Names", "Row", "RowCache"]

Row: TypeAlias = bytes | tuple[object, bytes]
"""What a row is found by: its key; in a table other than 0 also a token of the table, which no caller can have."""

# Two object headers and a slot in a dict: 144 bytes for a key of 16 and a value of 100.
ROW_OVERHEAD_BYTES: Final = 150
# Rows and pages share the cache's budget: the rows begin with 2/16 of it, take another 1/16 whenever they are full, and
# stop at 12/16; what they have not taken is for pages. 1/16 has space for the inner nodes of some ten million keys. A
# row answers in a fortieth of the time of a cached page.
_PARTS: Final = 16
_FIRST_PARTS: Final = 2
_MOST_PARTS: Final = 12
# Rows are set aside as they are, or, up to this number of them (40 us), added to those before: `State.lock` is held. A
# look goes through all that was set aside, so there is at most this much of it.
_MOVED_ROWS: Final = 1000
_MOST_ASIDE: Final = 8


class IndexRow(NamedTuple):
    """What the row of a table has of an index: its name, its id, and the name and version of the codec of its keys."""

    name: str
    id: int
    codec: tuple[str, int]


class IndexedTable(NamedTuple):
    """A table that has indexes, and its name."""

    name: str
    indexes: tuple[IndexRow, ...]


IndexedTables: TypeAlias = Mapping[int, IndexedTable]
"""Those of a store, by id."""


def _unchanged(indexed: IndexedTables, system: WriteBatch) -> IndexedTables:
    del system
    return indexed


class Names:
    """What names of tables mean."""

    __slots__ = ("dropped", "has_stale", "indexed", "indexed_after", "now")

    def __init__(self) -> None:
        #: Another object whenever a name may mean another table than before. Changes with the rows.
        self.now = object()
        #: Ids of tables that a commit of this opening dropped.
        self.dropped: set[int] = set()
        #: The tables that have indexes. Replaced whenever that changes, before `now` is.
        self.indexed: IndexedTables = {}
        #: What `indexed` is after a commit that writes this to table 1: see tables.py, which reads its rows.
        self.indexed_after: Callable[[IndexedTables, WriteBatch], IndexedTables] = _unchanged
        #: Whether an index may have stale entries (see indexes.py), which a store that writes has to remove.
        self.has_stale = False


class RowCache:
    """Newest values by key, within a budget of memory."""

    __slots__ = (
        "_aside",
        "_budget_bytes",
        "_parts",
        "_resize_pages",
        "_tokens",
        "budget",
        "bytes_used",
        "names",
        "rows",
    )

    def __init__(self, budget_bytes: int, resize_pages: Callable[[int], None]) -> None:
        """`budget_bytes` is shared with the page cache, which `resize_pages` gives what the rows do not take."""
        self.rows: dict[Row, Value] = {}
        # Rows from before ranges were deleted, the newest first: right unless a range covers them.
        self._aside: list[dict[Row, Value]] = []
        self._tokens: dict[int, object] = {}
        #: Which tables the names of tables mean.
        self.names: Final = Names()
        self._budget_bytes = budget_bytes
        self._resize_pages = resize_pages
        #: Estimate of the memory of the rows. What was set aside counts until it is dropped.
        self.bytes_used = 0
        self._take_parts(_FIRST_PARTS)

    def _take_parts(self, parts: int) -> None:
        self._parts = parts
        self.budget = self._budget_bytes * parts // _PARTS
        self._resize_pages(self._budget_bytes - self.budget)

    def token(self, table: int) -> object:
        """What stands for a table other than 0 in its rows. It hashes and compares in C, as bytes do."""
        token = self._tokens.get(table)
        return self._tokens.setdefault(table, object()) if token is None else token

    # -- what a commit does -----------------------------------------------------------------------

    def replace_all(self, writes: dict[Row, Value]) -> None:
        """A commit deleted ranges and wrote these: rows from before it are set aside. O(writes)."""
        aside, rows = self._aside, self.rows
        if aside and len(rows) < _MOVED_ROWS:
            # Newer rows win. Each row is moved once.
            aside[0].update(rows)
        else:
            self._aside = [rows, *aside]
        self.rows = dict(writes)
        if len(self._aside) > _MOST_ASIDE:
            self._drop_aside(_MOST_ASIDE)

    def forget(self, gone: Iterable[Row]) -> None:
        """These are no rows from here on, also of those that were set aside."""
        for rows in (self.rows, *self._aside):
            for row in gone:
                rows.pop(row, None)

    # -- what a read does -------------------------------------------------------------------------

    def recall(self, row: Row, key: bytes, memtable: Memtable) -> Value | Missing:
        """A row that is there, or was set aside and still holds; MISSING otherwise. `memtable`: its table's."""
        found: Value | Missing = self.rows.get(row, MISSING)
        if found is not MISSING:
            return found
        for rows in self._aside:
            found = rows.get(row, MISSING)
            if found is not MISSING:
                break
        else:
            return MISSING
        if isinstance(found, bytes) and memtable.get(key) is None:
            found = None
        self.rows[row] = found  # type: ignore[assignment]  # it is not MISSING
        return found

    def remember(self, row: Row, key: bytes, value: Value) -> None:
        """A read found the newest value, which does not expire."""
        self.rows[row] = value
        self.bytes_used += len(key) + (len(value) if value is not None else 0) + ROW_OVERHEAD_BYTES
        if self.bytes_used > self.budget:
            self.shrink()

    # -- memory -----------------------------------------------------------------------------------

    def drop_aside(self) -> None:
        """The ranges that judge what was set aside go with the memtable that is frozen now."""
        self._drop_aside(0)

    def _drop_aside(self, kept: int) -> None:
        """Drop all that was set aside but the newest."""
        dropped = sum(map(len, self._aside[kept:]))
        if dropped:
            # By their number: to add up their bytes would be a walk.
            left = len(self.rows) + sum(map(len, self._aside[:kept]))
            self.bytes_used = self.bytes_used * left // (left + dropped)
        self._aside = self._aside[:kept]

    def shrink(self) -> None:
        """The rows are beyond their budget: take more of it, or drop the older half."""
        while self.bytes_used > self.budget and self._parts < _MOST_PARTS:
            self._take_parts(self._parts + 1)
        if self.bytes_used <= self.budget:
            return
        if self._aside:
            self.drop_aside()
            if self.bytes_used <= self.budget:
                return
        # The older ones go, until half of the budget is left. (Two dicts, the older one dropped whole, need twice the
        # budget for keys that are read over and over.) Who still holds the former dict reads values that were the
        # newest when it took it.
        rows = self.rows
        kept = len(rows) * (self.budget // 2) // self.bytes_used
        self.rows = dict(islice(rows.items(), len(rows) - kept, None))
        self.bytes_used = self.budget // 2

    def clear(self) -> None:
        """Drop everything: each get takes the long way from here on, where it is refused."""
        self.rows = {}
        self._aside = []
        self.bytes_used = 0
