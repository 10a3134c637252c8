"""Which indexes tables have, what they need of the values that are put, and the work on them in the background.

An index is declared with a function, which is not stored: each program that puts into the table declares it again. Two
rows of table 1 say how an index is (see indexes.py): one is there while it is built, one while it may have stale
entries.

The background thread works in bounded steps, each a commit of its own, and goes on after a reopen where the rows say:

- Building takes some pairs of the table, calls the function, and lets the leader add those that are still the same.
  What was written since the index was declared is there already, so it is never undone. Only what a migration has put
  meanwhile is not: it is read again. A function for values of a former version builds nothing.
- Removing stale entries looks at each entry, and lets the leader remove those that no reverse row names.

Without a background thread the caller of `build` and of `Store.checkpoint` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import islice
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.engine.commit import CommitQueue
from kvwal.engine.index_commits import Build, Declared, DeclareIndex, RemoveStale
from kvwal.engine.indexes import (
    FIRST_DERIVED_ID,
    building_key,
    decode_building,
    decode_indexes,
    reverse_of,
    stale_among,
    stale_key,
)
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.pressure import WritePressure
from kvwal.engine.reads import Reads
from kvwal.engine.request import CommitRequest, Operation
from kvwal.engine.state import State
from kvwal.engine.tables import Asked, TableRow, Tables, indexed_after, row_key
from kvwal.engine.value import Value
from kvwal.engine.writes import EncodedBatch
from kvwal.errors import IndexNotDeclaredError, other_store
from kvwal.expiring import plain
from kvwal.keys import KeyRange
from kvwal.locks import shared_items
from kvwal.log import Extension

__all__ = ["ALL", "Indexes"]

# Of no index, as a key of `Indexes.failures`.
ALL: Final = 0

# Of one step of building: the leader looks each key up, which takes about 2 ms.
_STEP_KEYS: Final = 128
_STEP_BYTES: Final = 1 << 20
_STALE_STEP_KEYS: Final = 256
# Of one commit: more would only push each other out of the row cache.
_MAX_WARM_KEYS: Final = 1000


class Indexes:
    """The indexes of one open store. Thread-safe."""

    def __init__(
        self, state: State, reads: Reads, tables: Tables, queue: CommitQueue, pressure: WritePressure
    ) -> None:
        self._state = state
        self._cache = state.cache
        self._names = state.cache.names
        self._reads = reads
        self._tables = tables
        self._queue = queue
        self._pressure = pressure
        # By id.
        self._declared: dict[int, Declared] = {}
        # The table of each index that is to be built here.
        self._builds: dict[int, int] = {}
        #: What the function of an index raised as it was built; and, for `ALL`, what the background thread failed for
        #: last, so that it builds none until it is to go on.
        self.failures: dict[int, Exception] = {}
        #: Starts the background thread on it; None if there is none.
        self.wake: Callable[[], object] | None = None

    def load(self) -> None:
        """Learn which tables have indexes. Requires: no commit has been made yet."""
        rows = WriteBatch()
        rows.writes.update(pair for pair in self._rows(row_key("")) if b'"indexes":' in pair[1])
        self._names.indexed = indexed_after({}, rows)
        self._names.has_stale = bool(self._rows(stale_key()))

    def _rows(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        reader, bounds = self._reads.moments.reader("tables"), KeyRange.of_prefix(prefix)
        for keys, values in self._reads.chunks(reader, *bounds, reverse=False, table=SYSTEM_TABLE):
            rows.extend(zip(keys, values, strict=True))
        return rows

    # -- commits ------------------------------------------------------------------------------

    def encoded(
        self,
        batch: WriteBatch,
        extension: Extension | None = None,
        *,
        cached_only: bool = False,
        shared: bool = False,
    ) -> EncodedBatch:
        """A batch for the commit queue, with the keys for the indexes of its tables. Calls functions of users.

        Args:
            cached_only: no file is read. Else what the leader needs to know is, so that it need not read a page.
            shared: the batch is the user's, and stays as it is.

        IndexNotDeclaredError, and what the functions raise. UsageError if a table of another store is in the batch.
        """
        if batch.others is not None and not batch.is_for(self._state):
            raise other_store("batch")
        batch = batch.counted(self._reads.moments.clock.now_us)
        indexed = self._names.indexed
        if indexed and batch.others is not None and not indexed.keys().isdisjoint(batch.others):
            if shared:
                batch = batch.copy()
            for table, part in batch.parts():
                if table in indexed:
                    part.index_keys = self.keys_of(table, part.writes)
                    if not cached_only:
                        self._warm(part)
        return EncodedBatch(batch, extension)

    def _warm(self, part: WriteBatch) -> None:
        stamped, cache = part.stamped or (), self._cache
        for index in part.index_keys or ():
            reverse = reverse_of(index)
            token = cache.token(reverse)
            for key in islice(part.writes, _MAX_WARM_KEYS):
                if (token, key) not in cache.rows and key not in stamped:
                    self._reads.read(key, table=reverse)

    def keys_of(self, table: int, writes: Mapping[bytes, Value]) -> dict[int, dict[bytes, bytes]] | None:
        """The keys for each index of a table of what is put: `WriteBatch.index_keys`. None if it has no index."""
        found = self._names.indexed.get(table)
        if found is None:
            return None
        puts = [(key, value) for key, found in writes.items() if (value := plain(found)) is not None]
        keys: dict[int, dict[bytes, bytes]] = {}
        for index in found.indexes:
            declared = self._declared.get(index.id)
            if declared is None and puts:
                raise IndexNotDeclaredError(found.name, index.name)
            row_of = None if declared is None else declared.row_of
            keys[index.id] = {} if row_of is None else {key: row_of(key, value) for key, value in puts}
        return keys

    # -- declaring ----------------------------------------------------------------------------

    def declare(self, row: TableRow, declared: Declared) -> bool:
        """Declare an index that a table has. False if it has none of this name. TableCodecError."""
        for index in decode_indexes(row.name, row.others):
            if index.name == declared.name:
                declared.check(row.name, index)
                self._declared[index.id] = declared
                return True
        return False

    def declaring(self, name: str, asked: Asked, declared: Declared) -> Operation:
        """What gives a table an index that it has not."""
        return DeclareIndex(name, asked, declared, self._declared.__setitem__)

    def build(self, table: str, name: str) -> None:
        """See to it that an index that was declared is built, if it is not."""
        row = self._tables.row(table)
        for index in () if row is None else decode_indexes(row.name, row.others):
            value = self._reads.read(building_key(index.id), table=SYSTEM_TABLE)
            if row is not None and index.name == name and value is not None:
                self.failures.pop(index.id, None)
                self._builds[index.id] = row.id
                self.go_on()

    def go_on(self) -> None:
        """Do what is to be done, also where that was stopped: in the background, or here if there is no thread."""
        self.failures.pop(ALL, None)
        if self._builds or self._names.has_stale:
            if self.wake is not None:
                self.wake()
            else:
                for _ in self.steps():
                    pass

    def is_building(self, table: str, name: str) -> bool:
        """Whether an index is being built here."""
        row = self._tables.row(table)
        indexes = () if row is None else decode_indexes(row.name, row.others)
        return any(index.name == name and index.id in self._builds for index in indexes)

    # -- in the background --------------------------------------------------------------------

    def is_due(self) -> bool:
        """Whether there is something to build, or to remove, and memory for it."""
        return bool(self._builds or self._names.has_stale) and not self._pressure.is_full()

    def steps(self) -> Generator[None, None, None]:
        """Do all of it, in steps. When it ends early, what is left is due. Two threads only do the same twice."""
        for index, table in shared_items(self._builds):
            yield from self._build(index, table)
        if self._names.has_stale:
            # Before the rows are looked at.
            self._names.has_stale = False
            ended = False
            try:
                yield from self._remove_all_stale()
                ended = True
            finally:
                self._names.has_stale = self._names.has_stale or not ended

    def _commit(self, operation: Operation) -> None:
        self._queue.commit(CommitRequest(sync=False, operation=operation))

    def _build(self, index: int, table: int) -> Generator[None, None, None]:
        while True:
            declared = self._declared[index]
            if not self._build_some(index, table, declared):
                # Taken out before it is looked at again: a call that begins it anew later than that puts it back.
                self._builds.pop(index, None)
                if not self._is_begun_anew(index, declared):
                    return
                self._builds[index] = table
            yield

    def _is_begun_anew(self, index: int, declared: Declared) -> bool:
        if index not in self.failures:
            return self._reads.read(building_key(index), table=SYSTEM_TABLE) is not None
        if self._declared[index] is declared:
            return False
        self.failures.pop(index, None)
        return True

    def _build_some(self, index: int, table: int, declared: Declared) -> bool:
        """One step. False if there is none: the index is built, or was dropped, or the function has failed."""
        at, pairs = self._some_pairs(index, table)
        if at is None:
            return False
        of = self._names.indexed.get(table)
        row = None if of is None else self._tables.row(of.name)
        if row is None or row.id != table:
            # It was dropped or renamed just now.
            return True
        try:
            declared.check_values(row)
            rows = [(key, value, declared.row_of(key, value)) for key, value in pairs]
        except Exception as error:  # noqa: BLE001  # the user's own, who is told when the index is read
            self.failures[index] = error
            return False
        self._commit(Build(row, index, at, rows, pairs[-1][0] + b"\0" if pairs else None))
        return True

    def _some_pairs(self, index: int, table: int) -> tuple[Value, list[tuple[bytes, bytes]]]:
        """The row that says how far an index is built, and the pairs from there on, of one moment."""
        reads = self._reads
        reader = reads.moments.reader("index")
        try:
            at = reads.read_at(reader, building_key(index), table=SYSTEM_TABLE)
            if at is None:
                return None, []
            pairs: list[tuple[bytes, bytes]] = []
            size = 0
            again = reads.moments.again(reader, "index")
            # Also what has expired: it is there until it is removed.
            again.at_us = 0
            for keys, values in reads.chunks(again, decode_building(at), None, reverse=False, table=table):
                for key, value in zip(keys, values, strict=True):
                    pairs.append((key, value))
                    size += len(value)
                    if len(pairs) == _STEP_KEYS or size >= _STEP_BYTES:
                        return at, pairs
            return at, pairs
        finally:
            reader.release()

    def _remove_all_stale(self) -> Generator[None, None, None]:
        for key, value in self._rows(stale_key()):
            index = int.from_bytes(key[1:], "big")
            if FIRST_DERIVED_ID <= index < (1 << 32) - 1:
                yield from self._remove_stale(index, value)

    def _remove_stale(self, index: int, row: bytes) -> Generator[None, None, None]:
        after: bytes | None = None
        while True:
            found = self._some_entries(index, after)
            if not found:
                self._commit(RemoveStale(index, (), row))
                return
            after = found[-1] + b"\0"
            if stale_among(found, partial(self._reads.read, table=reverse_of(index))):
                self._commit(RemoveStale(index, found, row))
            yield

    def _some_entries(self, index: int, start: bytes | None) -> list[bytes]:
        reader = self._reads.moments.reader("index")
        chunks = self._reads.chunks(reader, start, None, reverse=False, table=index)
        return list(islice((key for keys, _ in chunks for key in keys), _STALE_STEP_KEYS))
