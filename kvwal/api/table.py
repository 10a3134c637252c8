"""A table of a store: `db.table(name, key=, value=)`, with what became of its keys."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

from kvwal.codecs import KeyCodec
from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.engine.index_commits import DropIndex
from kvwal.engine.request import CommitRequest
from kvwal.engine.tables import MakeTable, TableRow, check_codecs
from kvwal.errors import IndexNotFoundError, SnapshotTooOld, UsageError
from kvwal.feed.change import Change
from kvwal.feed.difference import differences, past_value
from kvwal.feed.key_versions import KeyVersions
from kvwal.feed.line import moment_of, seqno_of
from kvwal.keys import Seqno, as_int
from kvwal.log import extension_of
from kvwal.options import Durability
from kvwal.tables.index import Index, IndexSpec
from kvwal.tables.migration import MIGRATION_BATCH, Migration, MigrationReport, Progress
from kvwal.tables.reading import TypedReading
from kvwal.tables.spec import TableSpec
from kvwal.tables.stored import StoredTable
from kvwal.tables.table import WritableTable
from kvwal.tables.writing import How, at_once, bring_back
from kvwal.times import time_of

__all__ = ["RecallingTable", "Table", "TableDifference", "TableVersion"]

I = TypeVar("I")  # noqa: E741  # an index key, beside K and V
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class TableVersion(Generic[V]):
    """What one commit made of a key of a table. See `kvwal.KeyVersion`, of which it has all; `value` is decoded."""

    seqno: Seqno
    time_us: int
    meta: Mapping[str, str] = field(hash=False)
    kind: str
    value: V | None
    cause: str | None = None

    @property
    def time(self) -> datetime:
        """Of the commit, in UTC."""
        return time_of(self.time_us)


class TableDifference(NamedTuple, Generic[K, V]):
    """A key of a table that two moments have different values of. See `kvwal.Difference`."""

    key: K
    old: V | None
    new: V | None


class RecallingTable(TypedReading[K, V], Generic[K, V]):
    """The part of a table, of a store or of a follower, that looks back."""

    __slots__ = ()

    _engine: Engine
    _owner: object
    _stored: StoredTable
    #: By which the table is known, without looking at what a followed store is now.
    _told: StoredTable

    @property
    @abstractmethod
    def id(self) -> int | None:
        """The number that stands for the table in `changes` and `commits`; None while there is none."""

    def versions(
        self,
        key: K,
        *,
        since: int | None = None,
        until: int | None = None,
        reverse: bool = True,
        limit: int | None = None,
    ) -> Iterator[TableVersion[V]]:
        """What each commit made of `key`, newest first. As `Store.versions`.

        It goes by the table that has the name now: it tells nothing of one that was dropped, or that had the name
        before this one, and of a table that was renamed all. Where there is none now, it is empty.
        """
        encoded = self._spec.encode_key(key)
        first = None if since is None else seqno_of(self._engine, "since", since, SnapshotTooOld)
        last = None if until is None else seqno_of(self._engine, "until", until, SnapshotTooOld)
        most = None if limit is None else as_int("limit", limit, 0)
        table, owner = self.id, self._owner
        if table is None:
            return iter(())
        found = KeyVersions(
            self._engine, encoded, table=table, since=first, until=last, reverse=reverse, limit=most, owner=owner
        )
        return (
            TableVersion(each.seqno, each.time_us, each.meta, each.kind, self._of(each.value), each.cause)
            for each in found
        )

    def _of(self, value: bytes | None) -> V | None:
        return None if value is None else self._decode(value)

    def diff(
        self,
        a: int | datetime,
        b: int | datetime | None = None,
        *,
        start: K | Any = None,
        stop: K | Any = None,
        prefix: Any = None,
        reverse: bool = False,
    ) -> Iterator[TableDifference[K, V]]:
        """The keys whose values at moment `b` (None: now) are others than at moment `a`. As `Store.diff`.

        At each moment it is the table that had the name then, as in a snapshot. Where these are two tables, as after it
        was dropped and made again, or one is missing, it costs a scan of both. TableCodecError for other codecs.
        """
        bounds = self._bounds(start, stop, prefix, reverse, None)
        first, last = moment_of(self._engine, "a", a), None if b is None else moment_of(self._engine, "b", b)
        found = differences(self._engine, first, last, bounds, self._stored.id_at, self._owner)
        decode = self._spec.key.decode
        return (TableDifference(decode(key), self._of(old), self._of(new)) for key, old, new in found)

    def past(self, key: K, at: int | datetime) -> tuple[bytes, bytes | None]:
        """The key as bytes, and its value in the table that had the name at a past moment; None if it had none.

        Raises as `Store.snapshot`, and TableCodecError if that table had other codecs.
        """
        encoded, then = self._spec.encode_key(key), moment_of(self._engine, "to", at)
        return encoded, past_value(self._engine, encoded, then, self._stored.id_at)

    def at(self, at: int | datetime) -> Snapshot:
        """The store at a past moment: `users.within(users.at(moment))` is the table then. See `Store.snapshot`."""
        return Snapshot(self._engine, at=moment_of(self._engine, "at", at), owner=self._owner)

    def of(self, change: Change) -> tuple[K, V | None]:
        """The key and the value of a change of this table, as the feed tells it; the value of a delete is None.

        UsageError for a deleted range, as of `clear` and `drop_table`, and for a heartbeat: they are not of one key;
        and for a change of another table. CodecError for a key outside of this part of the default table.
        """
        if change.kind == "delete_range" or change.kind == "heartbeat":
            raise UsageError(
                f"a change of kind {change.kind!r} is not of one key: look at change.kind first; changes(expand=True) "
                "tells a deleted range as a delete of each key"
            )
        own = self._told.id()
        if change.table != own:
            self._refuse_other(change.table, own)
        return self._spec.key.decode(change.key), self._of(change.value)

    def _refuse_other(self, table: int, own: int | None) -> None:
        name = _name_of(self._engine, table) if table else "the default table"
        if name is None:
            if own is None:
                # Both were dropped, if they are two.
                return
            name = f"table {table}, which was dropped"
        this = "the default table" if self.is_default else repr(self.name)
        raise UsageError(
            f"the change is of {name}, and not of {this}: look at change.table first; changes(tables=...) tells those "
            "of one table"
        )


def _name_of(engine: Engine, table: int) -> str | None:
    """The name of a table as one reads it; None if there is none of this number."""
    moments = engine.reads.moments
    reader = moments.reader("tables")
    try:
        rows = engine.tables.rows(moments.again(reader, "tables"))
        return next((repr(name) for name, row in rows if isinstance(row, TableRow) and row.id == table), None)
    finally:
        reader.release()


class Table(WritableTable[K, V], RecallingTable[K, V], Generic[K, V]):
    """A named, ordered map of one store, with keys and values of Python's types. Made by `Store.table`.

    Thread-safe, every method. It reads and writes as the store does: reads never wait for writers, each write is a
    commit of its own, and `within` takes part in a transaction, a batch or a snapshot. The table comes to be with the
    first commit that puts something into it. Where a value cannot be decoded, CodecError is raised, and `raw` reads
    its bytes.
    """

    __slots__ = ("_engine", "_told")

    def __init__(self, engine: Engine, spec: TableSpec[K, V], owner: object) -> None:
        super().__init__(engine, spec, owner)
        self._engine = engine
        self._told = self._stored

    def revert(
        self,
        key: K,
        *,
        to: int | datetime,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Bring back what `key` was at a past moment, in a new commit. As `Store.revert`.

        The value is that of the table that had the name then, as in a snapshot, and goes into the one that has it now,
        which is made if there is none, as by `put`. TableCodecError if either has other codecs.
        """
        how = How(durability, meta)
        return at_once(bring_back, self._way, self._spec, *self.past(key, to), how)

    def migrate(
        self,
        *,
        batch: int = MIGRATION_BATCH,
        dry_run: bool = False,
        progress: Progress | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> MigrationReport:
        """Rewrite the values that are of former versions of the codec in the newest, beside any other writers.

        Each commit has some values, and says how far all has come: interrupted or killed, a migration goes on there
        when it is called again. Feeds show these commits with the cause "migrate". A value that was changed meanwhile
        is never overwritten. One that cannot be brought up stays as it is, and is counted.

        Args:
            batch: values in a commit, from 1 to 100,000; they have 1 MiB and a value at the most.
            dry_run: only look, from the first key on. Then the store may be open for reading only.
            progress: called after each step with the number of values that were looked at, and that of all.
            durability, meta: of the commits: see `Store.put`.

        Raises: TypeError if the values have no versions (see `kvwal.codecs.versioned`); TableNotFoundError, also if the
        table is dropped or renamed meanwhile; ReadOnlyError. O(values).
        """
        going = Migration(self._engine, self._spec, batch=batch, dry_run=dry_run, durability=durability, meta=meta)
        more = True
        while more:
            more = going.step()
            if progress is not None:
                progress(going.report.examined, going.total)
        return going.report

    # -- indexes ------------------------------------------------------------------------------

    @overload
    def index(
        self, name: str, *, key: Callable[[V], I | None], codec: type[I] | KeyCodec[I], many: Literal[False] = False
    ) -> Index[I, K, V]: ...
    @overload
    def index(
        self, name: str, *, key: Callable[[V], Iterable[I]], codec: type[I] | KeyCodec[I], many: Literal[True]
    ) -> Index[I, K, V]: ...
    def index(self, name: str, *, key: Callable[[V], Any], codec: Any, many: bool = False) -> Index[Any, K, V]:
        """Declare an index: the table by what a function makes of its values. Each commit to the table keeps it right.

        Each program that puts into the table declares its indexes first; it puts nothing otherwise
        (IndexNotDeclaredError). Where the table has the index, this makes no commit. Else it makes one, and makes the
        table if there is none. An index of a table that has keys is built in the background, and can be read when that
        is complete: see `Index.wait`. An index that was not complete when the store was closed goes on being built.

        Args:
            name: of the index, 1 to 255 bytes in UTF-8.
            key: gets a value, as a get of it would return it, and returns the index key; None: no entry. It must return
                the same for equal values, and never another one in a later version of the program: drop the index then,
                or declare one of another name. What it raises refuses the commit. It does not get the key of the table,
                which is not known where that ends with `kvwal.SEQNO`.
            codec: a type, or a key codec, of the index keys: as `key` of `Store.table`.
            many: `key` returns any number of index keys, as an iterable.

        Raises: TableCodecError if the index was made with another codec; IndexNotFoundError in a store that is open for
        reading where there is no such index; TypeError or ValueError for other arguments.
        """
        spec: IndexSpec[Any, K, V] = IndexSpec(self._spec, name, key, codec, many)
        engine = self._engine
        row = engine.tables.row(self.name)
        if row is not None:
            check_codecs(row, self._spec.asked)
            if not engine.upkeep.is_read_only and not self._spec.asked.is_met_by(row):
                # A newer version of the values: the index is built anew by it, and not only after the first put.
                make = MakeTable(self.name, self._spec.asked)
                engine.commit(CommitRequest(sync=engine.wants_sync(None), operation=make))
                self._stored.ask_again()
                row = engine.tables.row(self.name)
        if row is None or not engine.tables.indexes.declare(row, spec.declared):
            if engine.upkeep.is_read_only:
                raise IndexNotFoundError(self.name, name)
            operation = engine.tables.indexes.declaring(self.name, self._spec.asked, spec.declared)
            engine.commit(CommitRequest(sync=engine.wants_sync(None), operation=operation))
        if not engine.upkeep.is_read_only:
            engine.tables.indexes.build(self.name, name)
        return Index(engine, spec, self._owner)

    def drop_index(self, name: str, *, meta: Mapping[str, str] | None = None) -> Seqno:
        """Remove an index, in one small commit. Returns its seqno. Past moments still have it.

        TableNotFoundError, IndexNotFoundError.
        """
        engine = self._engine
        operation = DropIndex(self.name, name, extension_of(meta))
        return engine.commit(CommitRequest(sync=engine.wants_sync(None), operation=operation))
