"""A table of a store as bytes: what is in it now, and the way of a thread to it.

Where a table is known, a commit goes to its id. Where it is not, or may have been dropped meanwhile, the commit leader
looks the name up, and makes the table (see kvwal/engine/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.engine import Engine
from kvwal.engine.indexes import prepared
from kvwal.engine.merge import Chunk, Pairs
from kvwal.engine.readers import Reader
from kvwal.engine.request import CommitRequest, Operation
from kvwal.engine.tables import check_codecs
from kvwal.engine.value import Value
from kvwal.engine.writes import LonePut
from kvwal.errors import DiskFullError, TableNotFoundError
from kvwal.keys import BytesLike, KeyRange, Seqno, as_key
from kvwal.options import Durability
from kvwal.tables.spec import TableSpec
from kvwal.tables.writing import How, Target

__all__ = ["StoredTable", "Waiting"]

_T = TypeVar("_T")


class StoredTable(OrderedMapping):
    """The bytes of a table, of now. Thread-safe."""

    __slots__ = ("_cache", "_engine", "_names", "_spec", "_tables", "known")

    def __init__(self, engine: Engine, spec: TableSpec[Any, Any]) -> None:
        self._engine = engine
        self._cache = engine.state.cache
        # Not through the cache: that of a follower moves it at each look.
        self._names = engine.state.cache.names
        self._tables = engine.tables
        self._spec = spec
        #: The state of all names that it is of, the id, what its rows in the cache are found by, whether the table
        #: remembers what it is asked for with, and the default expiry. None while there is no table.
        self.known: tuple[object, int, object, bool, int] | None = None

    def id(self, *, cached_only: bool = False) -> int | None:
        """The id of the table; None if there is none yet. TableCodecError if it has other codecs.

        `cached_only`: as in `Reads.read`.
        """
        tables, known = self._tables, self.known
        if known is not None and known[0] is self._cache.names.now:
            return known[1]
        if self._spec.is_default:
            return 0
        # Before the name is looked up.
        names = self._cache.names.now
        row = tables.row(self._spec.name, cached_only=cached_only)
        if row is None:
            return None
        asked = self._spec.asked
        check_codecs(row, asked)
        self.known = (names, row.id, self._cache.token(row.id), asked.is_met_by(row), asked.lasts_us(row))
        return row.id

    def to_write(self, *, cached_only: bool = False) -> Target | None:
        """The table, if it is there, and remembers what it is asked for with."""
        if self._spec.is_default:
            return Target(0, None, 0, is_indexed=False)
        table, known = self.id(cached_only=cached_only), self.known
        if table is None or known is None or known[1] != table or not known[3]:
            return None
        return Target(table, known[0], known[4], self.has_index(table))

    def index_keys(
        self, writes: Mapping[bytes, Value], *, cached_only: bool = False
    ) -> dict[int, dict[bytes, bytes]] | None:
        """See `Way`."""
        table = self.id(cached_only=cached_only)
        return None if table is None else self._engine.tables.indexes.keys_of(table, writes)

    def ask_again(self) -> None:
        """A commit by name is over: the table may be there now, and may know these versions of its codecs."""
        if self.known is not None and not self.known[3]:
            self.known = None

    def id_at(self, reader: Reader) -> int | None:
        """The same as of a reader."""
        if self._spec.is_default:
            return 0
        row = self._engine.tables.row_at(reader, self._spec.name)
        if row is None:
            return None
        check_codecs(row, self._spec.asked)
        return row.id

    def has_index(self, table: int | None) -> bool:
        """Whether a put into the table needs the keys for an index: then it does not go the short way.

        Asked after `to_write`: an index that is declared later changes the names, which the commit is refused for.
        """
        return table in self._cache.names.indexed

    def put(self, key: bytes, value: bytes, durability: Durability | None) -> Seqno | None:
        """Put a value if the table is known: what `to_write` and `Waiting.commit` do, and faster.

        None if it is not, or has a default expiry, or the put is too large with what it changes in indexes: then it
        goes the general way.

        Requires: both have passed `as_key` and `as_value`.
        """
        known = self.known
        if known is None or known[0] is not self._cache.names.now or not known[3] or known[4]:
            found = self.to_write()
            if found is None or found.lasts_us:
                return None
            table, names = found.id, found.names
        else:
            names, table = known[0], known[1]
        engine = self._engine
        indexed = None
        if self.has_index(table):
            # Of a table that has none any more, the put is refused for its names.
            keys = engine.tables.indexes.keys_of(table, {key: value}) or {}
            indexed = prepared(table, key, value, keys, names, self._cache, engine.reads)
            if indexed is None:
                return None
        pressure, sync = engine.pressure, engine.wants_sync(durability)
        try:
            if pressure.is_on:
                pressure.relieve(deleting=False)
            try:
                return engine.queue.put(key, value, sync, table, names, indexed)
            except DiskFullError:
                if not pressure.free_space():
                    raise
            writes = LonePut(key, value, table, names) if indexed is None else indexed.general
            return engine.commit(CommitRequest(writes, sync=sync))
        except TableNotFoundError:
            # It was dropped, or is just being dropped.
            return None

    # -- reading ------------------------------------------------------------------------------

    def _found(self, read: Callable[..., _T], missing: _T, *, cached_only: bool = False) -> _T:
        """What `read` gives of the table, by its id, or `missing` if there is none.

        As of a moment in which the table had the name.
        """
        while True:
            names = self._names.now
            table = self.id(cached_only=cached_only)
            if table is None:
                return missing
            found = read(table=table)
            # Invariant: an id was that of the name as long as the names have not changed since it was looked up.
            if names is self._names.now:
                return found

    def read(self, key: bytes, *, cached_only: bool = False) -> Value:
        """The value of a key now. `cached_only`: as in `Reads.read`."""
        known = self.known
        if known is not None:
            # Hot: one dict hit, as in `Store.get`. It is looked after it whether the id still is that of the name.
            try:
                found: Value = self._cache.rows[known[2], key]
                if known[0] is self._names.now:
                    return found
            except (KeyError, TypeError, ValueError):
                pass
        read = self._engine.reads.read
        if self._spec.is_default:
            return read(as_key(key), cached_only=cached_only)
        return self._found(partial(read, as_key(key), cached_only=cached_only), None, cached_only=cached_only)

    def _read(self, key: bytes) -> Value:
        return self.read(key)

    def _lasting(self, key: bytes) -> Value:
        return self._found(partial(self._engine.reads.lasting, key), None)

    def _reader(self, purpose: str, *, cached_only: bool = False) -> tuple[int, Reader] | None:
        """The id, and a reader of a moment in which it is that of the name; None if there is no table."""
        moments = self._engine.reads.moments
        return self._found(lambda *, table: (table, moments.reader(purpose)), None, cached_only=cached_only)

    def get_many(self, keys: Iterable[BytesLike], *, cached_only: bool = False) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        wanted = list(map(as_key, keys))
        return self._engine.reads.moments.now.again(lambda: self._get_many(wanted, cached_only))

    def _get_many(self, wanted: list[bytes], cached_only: bool) -> list[bytes | None]:
        found = self._reader("get", cached_only=cached_only)
        if found is None:
            return [None] * len(wanted)
        reads, (table, reader) = self._engine.reads, found
        try:
            return [reads.read_at(reader, key, table=table, cached_only=cached_only) for key in wanted]
        finally:
            reader.release()

    def _cached(self, bounds: Bounds) -> Pairs | None:
        read = partial(
            self._engine.reads.cached_range, bounds.start, bounds.stop, bounds.limit, None, reverse=bounds.reverse
        )
        none: Pairs | None = []
        return self._found(read, none)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._engine.reads.moments.now.begun(lambda: self._walked(bounds))

    def _walked(self, bounds: Bounds) -> Iterator[Chunk]:
        found = self._reader("scan")
        if found is None:
            return iter(())
        table, reader = found
        return self._engine.reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse, table=table)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        return self._found(partial(self._engine.reads.count, start, stop), 0)

    def _key_at(self, rank: int) -> bytes | None:
        return self._found(partial(self._engine.reads.key_at, rank), None)


class Waiting:
    """The way of a thread (see writing.py): it waits, and never suspends."""

    __slots__ = ("_engine", "_stored", "ahead")

    def __init__(self, engine: Engine, stored: StoredTable) -> None:
        self._engine = engine
        self._stored = stored
        self.ahead = 1

    def now_us(self) -> int:
        """See `Way`."""
        return self._engine.reads.moments.clock.now_us()

    async def to_write(self) -> Target | None:
        """See `Way`."""
        return self._stored.to_write()

    async def read(self, key: bytes) -> Value:
        """See `Way`."""
        return self._stored.read(key)

    async def read_edge(self, bounds: KeyRange, most: int, *, reverse: bool) -> list[tuple[bytes, bytes]]:
        """See `Way`."""
        return list(self._stored.scan(*bounds, reverse=reverse, limit=most))

    async def put(self, key: bytes, value: bytes, durability: Durability | None) -> Seqno | None:
        """See `Way`."""
        return self._stored.put(key, value, durability)

    async def index_keys(self, writes: Mapping[bytes, Value]) -> dict[int, dict[bytes, bytes]] | None:
        """See `Way`."""
        return self._stored.index_keys(writes)

    async def commit(self, batch: WriteBatch, how: How) -> Seqno:
        """See `Way`."""
        engine = self._engine
        writes = engine.tables.indexes.encoded(batch, how.extension)
        return engine.commit(CommitRequest(writes, sync=engine.wants_sync(how.durability)))

    async def operate(self, operation: Operation, how: How) -> Seqno:
        """See `Way`."""
        engine = self._engine
        try:
            return engine.commit(CommitRequest(sync=engine.wants_sync(how.durability), operation=operation))
        finally:
            self._stored.ask_again()
