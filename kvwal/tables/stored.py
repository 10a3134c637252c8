"""A table of a store as bytes: what is in it now, and commits to it.

Where a table is known, a commit goes to its id. Where it is not, or may have been dropped meanwhile, the commit leader
looks the name up, and makes the table (see kvwal/engine/tables.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk, Pairs
from kvwal.engine.request import CommitRequest, Newest, Operation
from kvwal.engine.tables import InDefaultTable, InTable, MakeTable, check_codecs
from kvwal.engine.value import Value
from kvwal.engine.writes import EncodedBatch
from kvwal.errors import TableNotFoundError
from kvwal.keys import KeyRange, Seqno
from kvwal.log import extension_of
from kvwal.options import Durability
from kvwal.tables.spec import TableSpec

__all__ = ["How", "StoredTable"]


class How:
    """How a commit is to be made: see `Store.put`."""

    __slots__ = ("durability", "meta")

    def __init__(self, durability: Durability | None = None, meta: Mapping[str, str] | None = None) -> None:
        self.durability = durability
        self.meta = meta


_AS_USUAL = How()


class StoredTable(OrderedMapping):
    """The bytes of a table, of now. Thread-safe."""

    __slots__ = ("_engine", "_known", "_spec")

    def __init__(self, engine: Engine, spec: TableSpec[Any, Any]) -> None:
        self._engine = engine
        self._spec = spec
        # The version of all names that it is of, the id, what its rows in the cache are found by, and whether the table
        # knows these versions of its codecs.
        self._known: tuple[object, int, object, bool] | None = None

    def id(self) -> int | None:
        """The id of the table; None if there is none yet. TableCodecError if it has other codecs."""
        tables, known = self._engine.tables, self._known
        if known is not None and known[0] is tables.version:
            return known[1]
        if self._spec.is_default:
            return 0
        # Before the name is looked up.
        version = tables.version
        row = tables.row(self._spec.name)
        if row is None:
            return None
        check_codecs(row, *self._spec.codecs)
        is_current = (row.key, row.value) == self._spec.codecs
        self._known = (version, row.id, self._engine.state.cache.token(row.id), is_current)
        return row.id

    def _to_write(self) -> int | None:
        """The id, if the table is there, and knows these versions of its codecs."""
        table, known = self.id(), self._known
        return table if known is None or known[3] else None

    def made(self) -> int:
        """The id; an empty table is made if there is none."""
        while (table := self._to_write()) is None:
            operation = MakeTable(self._spec.name, self._spec.codecs)
            self._engine.commit(CommitRequest(sync=self._engine.wants_sync(None), operation=operation))
            self._known = None
        return table

    # -- reading ------------------------------------------------------------------------------

    def _read(self, key: bytes) -> Value:
        table, known = self.id(), self._known
        if table is None:
            return None
        if known is not None:
            # Hot: one dict hit, as in `Store.get`.
            try:
                return self._engine.state.cache.rows[known[2], key]
            except KeyError:
                table = known[1]
        return self._engine.reads.read(key, table=table)

    def _cached(self, bounds: Bounds) -> Pairs | None:
        table = self.id()
        if table is None:
            return []
        return self._engine.reads.cached_range(
            bounds.start, bounds.stop, bounds.limit, None, reverse=bounds.reverse, table=table
        )

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        table = self.id()
        if table is None:
            return iter(())
        reads = self._engine.reads
        reader = reads.moments.reader("scan")
        return reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse, table=table)

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        table = self.id()
        return 0 if table is None else self._engine.reads.count(start, stop, table=table)

    def _key_at(self, rank: int) -> bytes | None:
        table = self.id()
        return None if table is None else self._engine.reads.key_at(rank, table=table)

    # -- writing ------------------------------------------------------------------------------

    def write(self, fill: Callable[[WriteBatch], None], how: How = _AS_USUAL) -> Seqno:
        """Commit what `fill` writes to a batch; it may be called twice. Makes the table if that puts something."""
        table = self._to_write()
        if table is not None:
            batch = WriteBatch()
            fill(batch.part(table))
            request = CommitRequest(
                EncodedBatch(batch, extension_of(how.meta)), sync=self._engine.wants_sync(how.durability)
            )
            try:
                return self._engine.commit(request)
            except TableNotFoundError:
                pass  # It was dropped, or is just being dropped.
        return self.operate(lambda newest, part: fill(part), how)

    def operate(self, fill: Callable[[Newest, WriteBatch], None], how: How = _AS_USUAL) -> Seqno:
        """Commit what `fill` writes to a batch, knowing what is newest in the table. Never a conflict."""
        extension = extension_of(how.meta)
        operation: Operation
        if self._spec.is_default:
            operation = InDefaultTable(fill, extension)
        else:
            operation = InTable(self._spec.name, self._spec.codecs, fill, extension)
        request = CommitRequest(sync=self._engine.wants_sync(how.durability), operation=operation)
        try:
            return self._engine.commit(request)
        finally:
            if self._known is not None and not self._known[3]:
                self._known = None

    def update(
        self, key: bytes, function: Callable[[Value], Value], how: How = _AS_USUAL
    ) -> tuple[Value, Value]:
        """Change one value; returns the old and the new one. See `kvwal.engine.operations.Update`."""
        # Read first, so that the commit leader need not read a page.
        self._read(key)
        old: Value = None
        new: Value = None

        def fill(newest: Newest, part: WriteBatch) -> None:
            nonlocal old, new
            old = newest.get(key)
            new = function(old)
            if new is not old:
                part.writes[key] = new

        self.operate(fill, how)
        return old, new

    def take_edge(self, bounds: KeyRange, *, reverse: bool) -> tuple[bytes, bytes] | None:
        """Delete the first pair of a range, or in reverse the last one, and return it; None if there is none."""
        (self.last if reverse else self.first)(*bounds)
        pair: tuple[bytes, bytes] | None = None

        def fill(newest: Newest, part: WriteBatch) -> None:
            nonlocal pair
            pair = newest.edge(*bounds, reverse=reverse)
            if pair is not None:
                part.writes[pair[0]] = None

        self.operate(fill)
        return pair
