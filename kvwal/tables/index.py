"""An index of a table, for reading: of now, of a snapshot, and within a transaction.

All that one call reads is of one moment: the entries, the pairs of the table, and whether the index is built. Entries
and reverse rows are as kvwal/engine/indexes.py has them. Values are decoded when they are handed out.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from heapq import merge
from itertools import islice
from typing import Any, Final, Generic, NamedTuple, TypeVar

from kvwal.batch import WriteBatch
from kvwal.db.handle import Handle
from kvwal.db.mapping import Bounds, OrderedMapping, has_expired
from kvwal.db.part import TransactionPart, as_of_now, writes_of
from kvwal.db.snapshot import Snapshot
from kvwal.db.transaction import Transaction
from kvwal.engine.engine import Engine
from kvwal.engine.index_commits import Declared
from kvwal.engine.indexes import (
    as_index_key,
    building_key,
    decode_building,
    decode_indexes,
    entries_of,
    entry_of,
    escaped,
    names_entry,
    reverse_of,
    stale_key,
)
from kvwal.engine.indexing import ALL
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.state import State
from kvwal.engine.tables import as_table_name
from kvwal.errors import IndexNotFoundError, IndexNotReadyError
from kvwal.expiring import plain
from kvwal.keys import as_seconds, in_any
from kvwal.tables.spec import TableSpec
from kvwal.tables.within import refuse_other_store, row_in

__all__ = ["Index", "IndexEntry", "IndexReading", "IndexSpec", "IndexWithin", "state_of"]

I = TypeVar("I")  # noqa: E741  # an index key, beside K and V
K = TypeVar("K")
V = TypeVar("V")

# How long `wait` sleeps at first, and at most.
_LEAST_WAIT_S: Final = 0.001
_MOST_WAIT_S: Final = 0.05


class IndexEntry(NamedTuple, Generic[I, K, V]):
    """One entry of an index, and the pair of the table that it is of."""

    index_key: I
    key: K
    value: V


class IndexSpec(Generic[I, K, V]):
    """The name, the codec and the function of an index.

    Attributes:
        name: of the index.
        table: what its table is asked for with.
        keys: encodes index keys.
        declared: what the engine knows of it.
    """

    __slots__ = ("declared", "keys", "name", "table")

    def __init__(self, table: TableSpec[K, V], name: str, function: Callable[[V], Any], codec: Any, many: bool) -> None:
        """TypeError, ValueError."""
        if table.is_default:
            raise TypeError("a part of the default table has no indexes; make it a table")
        if not callable(function):
            raise TypeError(f"key is a function of a value, not {type(function).__name__}")
        self.name = as_table_name(name, "an index's name")
        self.table = table
        self.keys: TableSpec[I, bytes] = TableSpec("-", codec, bytes)
        encode, decode = self.keys.encode_key, table.value.decode

        def one(data: bytes) -> Sequence[bytes]:
            key = function(decode(data))
            return () if key is None else (encode(key),)

        def several(data: bytes) -> Sequence[bytes]:
            keys = function(decode(data))
            # A str has its characters, and bytes have numbers, which is never meant.
            if isinstance(keys, str | bytes | bytearray) or not isinstance(keys, Iterable):
                raise TypeError(f"with many=True the function gives an iterable of keys, not {type(keys).__name__}")
            return tuple(map(encode, keys))

        made = self.keys.asked.key
        codec_of_keys = made.name, made.version
        self.declared = Declared(self.name, codec_of_keys, table.asked.value, several if many else one)

    def bounds(self, start: Any, stop: Any, prefix: Any, equal: Any, reverse: bool, limit: int | None) -> Bounds:
        """A range of index keys as a range of entries."""
        if equal is not None:
            if not (start is stop is prefix is None):
                raise TypeError("give either equal, or start, stop and prefix")
            return self.equal(equal, reverse, limit)
        found = self.keys.bounds(start, stop, prefix, reverse, limit)
        end = None if found.stop is None else escaped(found.stop)
        return Bounds(escaped(found.start or b""), end, None, reverse, limit)

    def equal(self, index_key: Any, reverse: bool = False, limit: int | None = None) -> Bounds:
        """The entries of one index key. TypeError for what can be none."""
        return Bounds(None, None, as_index_key(self.keys.encode_key(index_key)), reverse, limit)

    def __repr__(self) -> str:
        return f"{self.name!r} of {self.table}"


class _Lookup:
    """An index at one moment."""

    __slots__ = ("_declared", "_entries", "_has_expired", "_own", "_reverse", "_table")

    def __init__(
        self,
        spec: IndexSpec[Any, Any, Any],
        part: Callable[[int], OrderedMapping],
        failure_of: Callable[[int], Exception | None],
    ) -> None:
        """`part` gives tables by their ids, as they are now: what a transaction writes later is not seen.

        IndexNotFoundError, IndexNotReadyError, TableCodecError.
        """
        system = part(SYSTEM_TABLE)
        row = row_in(system.get, spec.table)
        for index in () if row is None else decode_indexes(row.name, row.others):
            if row is not None and index.name == spec.name:
                break
        else:
            raise IndexNotFoundError(spec.table.name, spec.name)
        spec.declared.check(row.name, index)
        self._table = part(row.id)
        self._has_expired = has_expired(self._table)
        at = system.get(building_key(index.id))
        if at is not None:
            failure = failure_of(index.id)
            raise IndexNotReadyError(row.name, index.name, *_progress(self._table, at), failure) from failure
        self._entries = part(index.id)
        is_stale = system.get(stale_key(index.id)) is not None
        self._reverse = part(reverse_of(index.id)) if is_stale else None
        written = writes_of(self._table) if isinstance(self._table, TransactionPart) else None
        self._own = written or None
        self._declared = spec.declared

    def entries(self, bounds: Bounds) -> Iterator[bytes]:
        """The entries of a range, as far as they hold."""
        reverse, own = self._reverse, self._own
        if reverse is None and own is None and not self._has_expired:
            return iter(self._entries.keys(bounds.start, bounds.stop, reverse=bounds.reverse, limit=bounds.limit))
        entries = iter(self._entries.keys(bounds.start, bounds.stop, reverse=bounds.reverse))
        if reverse is not None:
            entries = (entry for entry in entries if names_entry(reverse.get(entry_of(entry)[1]), entry))
        if self._has_expired:
            # What has expired leaves with its entries, but later.
            table = self._table
            entries = (entry for entry in entries if table.get(entry_of(entry)[1]) is not None)
        if own is not None:
            writes, ranges = own.writes, own.ranges
            entries = (
                entry for entry in entries if (key := entry_of(entry)[1]) not in writes and not in_any(key, ranges)
            )
            entries = merge(entries, self._written(own, bounds), reverse=bounds.reverse)
        return islice(entries, bounds.limit)

    def _written(self, own: WriteBatch, bounds: Bounds) -> list[bytes]:
        row_of = self._declared.row_of
        found = [
            entry
            for key, found in own.writes.items()
            if (value := plain(found)) is not None and not (self._has_expired and self._table.get(key) is None)
            for entry in entries_of(row_of(key, value), key)
            if bounds.contains(entry)
        ]
        return sorted(found, reverse=bounds.reverse)

    def count(self, bounds: Bounds) -> int:
        """The number of entries of a range."""
        if self._reverse is None and self._own is None and not self._has_expired:
            return len(self._entries.keys(bounds.start, bounds.stop))
        return sum(1 for _ in self.entries(bounds))

    def size(self) -> int:
        """The number of keys of the table."""
        return len(self._table)

    def pairs(self, bounds: Bounds) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Index key, key and value of each entry of a range. An entry whose key is not in the table is passed over."""
        get = self._table.get
        for entry in self.entries(bounds):
            found, key = entry_of(entry)
            value = get(key)
            if value is not None:
                yield found, key, value


def _progress(table: OrderedMapping, at: bytes) -> tuple[int, int]:
    return len(table.keys(None, decode_building(at))), len(table)


class IndexReading(Handle, Generic[I, K, V]):
    """An index, for reading: its entries are in the order of index keys, and then of the keys of the table."""

    __slots__ = ("_spec",)

    def __init__(self, spec: IndexSpec[I, K, V]) -> None:
        self._spec = spec

    @property
    def name(self) -> str:
        """The name of the index."""
        return self._spec.name

    @abstractmethod
    def _lookup(self) -> tuple[_Lookup, Callable[[], object]]:
        """The index at a moment, and what lets go of that."""

    def scan(
        self,
        start: I | Any = None,
        stop: I | Any = None,
        *,
        prefix: Any = None,
        equal: I | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[IndexEntry[I, K, V]]:
        """Iterate over (index key, key, value) in the order of index keys, as of the moment of the call.

        Args:
            start: first index key, inclusive; None for the smallest. Of tuples also leading parts, as a tuple.
            stop: end of the range, exclusive; None for no end. The same.
            prefix: only index keys that begin with it: a str or bytes, or leading parts of a tuple.
            equal: only this index key; None for all.
            reverse: from the largest index key down.
            limit: the number of entries at the most.

        Raises: IndexNotReadyError while it is built; IndexNotFoundError; TableCodecError.
        """
        bounds = self._spec.bounds(start, stop, prefix, equal, reverse, limit)
        return self._scanned(*self._lookup(), bounds)

    def _scanned(self, lookup: _Lookup, let_go: Callable[[], object], bounds: Bounds) -> Iterator[IndexEntry[I, K, V]]:
        decode, pair = self._spec.keys.key.decode, self._spec.table.pair
        try:
            for found, key, value in lookup.pairs(bounds):
                yield IndexEntry(decode(found), *pair((key, value)))
        finally:
            let_go()

    def keys(
        self,
        start: I | Any = None,
        stop: I | Any = None,
        *,
        prefix: Any = None,
        equal: I | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[tuple[I, K]]:
        """Iterate over (index key, key), as `scan`, which looks each value up besides."""
        bounds = self._spec.bounds(start, stop, prefix, equal, reverse, limit)
        return self._listed(*self._lookup(), bounds)

    def _listed(self, lookup: _Lookup, let_go: Callable[[], object], bounds: Bounds) -> Iterator[tuple[I, K]]:
        decode, decode_key = self._spec.keys.key.decode, self._spec.table.key.decode
        try:
            for entry in lookup.entries(bounds):
                found, key = entry_of(entry)
                yield decode(found), decode_key(key)
        finally:
            let_go()

    def get(self, index_key: I) -> list[tuple[K, V]]:
        """The pairs of the table that have this index key, in the order of their keys.

        TypeError for an index key of another type, and so for None: values without an index key have no entry.
        """
        bounds = self._spec.equal(index_key)
        return [(entry.key, entry.value) for entry in self._scanned(*self._lookup(), bounds)]

    def count(
        self, start: I | Any = None, stop: I | Any = None, *, prefix: Any = None, equal: I | None = None
    ) -> int:
        """Number of entries of a range (see `scan`).

        O(log n), as `len` of a table; where a large range was deleted just now, and in a transaction that has written
        to the table, O(n).
        """
        bounds = self._spec.bounds(start, stop, prefix, equal, False, None)
        lookup, let_go = self._lookup()
        try:
            return lookup.count(bounds)
        finally:
            let_go()

    def __repr__(self) -> str:
        return f"<kvwal.{type(self).__name__} {self._spec}>"


def _nothing() -> None:
    pass


class Index(IndexReading[I, K, V], Generic[I, K, V]):
    """An index of a table. Made by `Table.index`. Thread-safe, every method.

    It reads the newest commit, as the table does, and `within` reads it in a transaction or a snapshot.
    """

    __slots__ = ("_engine", "_owner")

    def __init__(self, engine: Engine, spec: IndexSpec[I, K, V], owner: object) -> None:
        """`owner` stays as long as this."""
        super().__init__(spec)
        self._engine = engine
        self._owner = owner

    def _lookup(self) -> tuple[_Lookup, Callable[[], object]]:
        return self._engine.reads.moments.now.again(self._lookup_now)

    def _lookup_now(self) -> tuple[_Lookup, Callable[[], object]]:
        now = Snapshot(self._engine, owner=self._owner)
        try:
            return _Lookup(self._spec, now.part, self._engine.tables.indexes.failures.get), now.close
        except BaseException:
            now.close()
            raise

    def within(self, other: Transaction | Snapshot) -> IndexWithin[I, K, V]:
        """The index at the moment of a snapshot, or in a transaction, with what that has written itself.

        Each look-up in a transaction is O(what it has written to the table) beside what it finds.
        What it reads in a transaction is validated when that commits, as what it reads of the table. UsageError if
        that is of another open store.
        """
        if not isinstance(other, Transaction | Snapshot):
            raise TypeError(f"a transaction or a snapshot is expected, not {type(other).__name__}")
        refuse_other_store(state_of(self), other)
        return IndexWithin(self._spec, lambda: other)

    @property
    def progress(self) -> tuple[int, int]:
        """How many keys of the table it has, and how many there are: both are the same once it is built.

        IndexNotFoundError.
        """
        try:
            lookup, let_go = self._lookup()
        except IndexNotReadyError as error:
            return error.done, error.total
        try:
            return lookup.size(), lookup.size()
        finally:
            let_go()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is built. False if it is not after `timeout_s`.

        Where building is stopped, by a full disk for one, the error of that is raised; the next call goes on.
        IndexNotReadyError if building has failed, with what the function raised as its cause, or if no thread builds it
        here; IndexNotFoundError; ClosedError.
        """
        if timeout_s is not None:
            timeout_s = as_seconds("timeout_s", timeout_s)
        began_s, wait_s = time.monotonic(), _LEAST_WAIT_S
        indexes = self._engine.tables.indexes
        if not self._engine.upkeep.is_read_only:
            indexes.go_on()
        while True:
            stopped = indexes.failures.get(ALL)
            building = indexes.is_building(self._spec.table.name, self.name)
            try:
                _, let_go = self._lookup()
                let_go()
                return True
            except IndexNotReadyError:
                if not building:
                    raise
            if stopped is not None:
                raise copy(stopped) from stopped
            if timeout_s is not None and time.monotonic() - began_s >= timeout_s:
                return False
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _MOST_WAIT_S)


class IndexWithin(IndexReading[I, K, V], Generic[I, K, V]):
    """An index in a transaction, or at the moment of a snapshot, for as long as that is open."""

    __slots__ = ("_of",)

    def __init__(self, spec: IndexSpec[I, K, V], of: Callable[[], Transaction | Snapshot]) -> None:
        """`of` gives the transaction or the snapshot, and raises where it is over."""
        super().__init__(spec)
        self._of = of

    def _lookup(self) -> tuple[_Lookup, Callable[[], object]]:
        of = self._of()

        def part(table: int) -> OrderedMapping:
            return as_of_now(of.part(table)) if isinstance(of, Transaction) else of.part(table)

        return _Lookup(self._spec, part, lambda index: None), _nothing


def state_of(index: Index[Any, Any, Any]) -> State:
    """That of its open store."""
    return index._engine.state
