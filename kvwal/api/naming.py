"""The tables of a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from kvwal.api.table import Table
from kvwal.codecs import Codec, KeyCodec
from kvwal.engine.engine import Engine
from kvwal.engine.indexes import building_key, decode_building, decode_indexes
from kvwal.engine.indexing import ALL
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.readers import Reader
from kvwal.engine.request import CommitRequest, Operation
from kvwal.engine.tables import CodecName, Drop, Rename, TableRow, as_table_name
from kvwal.errors import CorruptionError, Error, TableNotFoundError
from kvwal.expiring import plain
from kvwal.keys import BytesLike, Seqno, as_key
from kvwal.log import extension_of
from kvwal.tables.spec import SubSpec, TableSpec

__all__ = ["Naming", "TableInfo", "table_infos"]

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """An index that there is.

    Attributes:
        name: its name.
        codec: the name of the codec of its keys.
        entries: how many it has; where a large range was deleted just now, with those that are still to be removed.
        ready: whether it can be read: else it is still to be built.
        problem: of one that is not ready: how many keys of the table it has, and why it is not built further, as far as
            this process knows. None otherwise.
    """

    name: str
    codec: str
    entries: int
    ready: bool
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class TableInfo:
    """A table that there is.

    Attributes:
        name: its name.
        id: the number that stands for it in `changes` and `commits`. It is never given to another table.
        key, value: the names of its codecs.
        keys: how many keys it has.
        problem: why the table cannot be used, if its row is damaged or of a newer version; then the id is -1, and the
            rest is empty. None otherwise.
        indexes: of the table.
    """

    name: str
    id: int
    key: str
    value: str
    keys: int
    problem: str | None = None
    indexes: tuple[IndexInfo, ...] = ()


def table_infos(engine: Engine) -> list[TableInfo]:
    """See `Naming.tables`."""
    return engine.reads.moments.now.again(lambda: _table_infos(engine))


def _table_infos(engine: Engine) -> list[TableInfo]:
    moments = engine.reads.moments
    reader = moments.reader("tables")
    try:
        rows = engine.tables.rows(moments.again(reader, "tables"))
        return [_info(engine, reader, name, row) for name, row in rows]
    finally:
        reader.release()


def _info(engine: Engine, reader: Reader, name: str, row: TableRow | Error) -> TableInfo:
    if isinstance(row, TableRow):
        try:
            indexes = tuple(_indexes_of(engine, reader, row))
        except CorruptionError as error:
            return TableInfo(name, -1, "", "", 0, str(error))
        keys = engine.reads.count_at(reader, None, None, table=row.id)
        return TableInfo(row.name, row.id, str(row.key), str(row.value), keys, indexes=indexes)
    return TableInfo(name, -1, "", "", 0, str(row))


def _indexes_of(engine: Engine, reader: Reader, row: TableRow) -> Iterator[IndexInfo]:
    reads, indexes = engine.reads, engine.tables.indexes
    for index in decode_indexes(row.name, row.others):
        at = reads.read_at(reader, building_key(index.id), table=SYSTEM_TABLE)
        entries = reads.count_at(reader, None, None, table=index.id)
        problem = None
        if at is not None:
            done = reads.count_at(reader, None, decode_building(plain(at) or b""), table=row.id)
            problem = f"it has {done} of {reads.count_at(reader, None, None, table=row.id)} keys"
            failure, stopped = indexes.failures.get(index.id), indexes.failures.get(ALL)
            if failure is not None:
                problem += f", and its function raised {type(failure).__name__}: {failure}"
            elif not indexes.is_building(row.name, index.name):
                problem += "; the program that declares it builds it, and knows why it does not"
            elif stopped is not None:
                problem += f", and building is stopped by {type(stopped).__name__}: {stopped}"
        yield IndexInfo(index.name, str(CodecName(*index.codec)), entries, at is None, problem)


class Naming:
    """The part of `Store` that knows names."""

    engine: Engine

    # Each codec, or type, with each: a default of `bytes` says nothing to a type checker.
    @overload
    def table(self, name: str, *, expire_s: float | None = None) -> Table[bytes, bytes]: ...
    @overload
    def table(self, name: str, key: type[K] | KeyCodec[K], *, expire_s: float | None = None) -> Table[K, bytes]: ...
    @overload
    def table(self, name: str, *, value: type[V] | Codec[V], expire_s: float | None = None) -> Table[bytes, V]: ...
    @overload
    def table(
        self, name: str, key: type[K] | KeyCodec[K], value: type[V] | Codec[V], *, expire_s: float | None = None
    ) -> Table[K, V]: ...
    def table(self, name: str, key: Any = bytes, value: Any = bytes, *, expire_s: float | None = None) -> Any:
        """A named table, with keys and values of these types. It comes to be when something is first put into it.

        Args:
            name: 1 to 255 bytes in UTF-8.
            key: a type (`bytes`, `str`, `int`, `float`, `bool`, `UUID`, `datetime`, or a tuple of them, as in
                `tuple[str, int]`), or a key codec of `kvwal.codecs`.
            value: a type or a codec: see `kvwal.codecs.value_codec`.
            expire_s: after how many seconds what is put without an `expire_s` of its own expires. The table remembers
                it, from the next write on; infinity takes it away, and None leaves it as it is.

        Raises: TableCodecError if it was made with other codecs; TypeError or ValueError for other arguments.
        Any number of objects may stand for one table.
        """
        self.engine.state.refuse_if_gone()
        table: Table[Any, Any] = Table(self.engine, TableSpec(name, key, value, expire_s), self)
        # Raises now if it has other codecs.
        table.id  # noqa: B018  # it raises if the table has other codecs
        return table

    @overload
    def sub(self, prefix: BytesLike) -> Table[bytes, bytes]: ...
    @overload
    def sub(self, prefix: BytesLike, key: type[K] | KeyCodec[K]) -> Table[K, bytes]: ...
    @overload
    def sub(self, prefix: BytesLike, *, value: type[V] | Codec[V]) -> Table[bytes, V]: ...
    @overload
    def sub(self, prefix: BytesLike, key: type[K] | KeyCodec[K], value: type[V] | Codec[V]) -> Table[K, V]: ...
    def sub(self, prefix: BytesLike, key: Any = bytes, value: Any = bytes) -> Any:
        """The keys of the default table that begin with a prefix, as a table whose keys are without it.

        It has no name, and nothing is remembered of its codecs.
        """
        self.engine.state.refuse_if_gone()
        return Table(self.engine, SubSpec(as_key(prefix), key, value), self)

    def tables(self) -> list[TableInfo]:
        """The tables that there are, by name, all as of one moment. O(tables), and a count for each.

        One that cannot be used has a `problem`, and keeps none of the others from being listed.
        """
        return table_infos(self.engine)

    def drop_table(self, name: str, *, meta: Mapping[str, str] | None = None) -> Seqno:
        """Remove a table and everything in it, in one small commit. Returns its seqno.

        Who writes to it afterwards makes a new one. Past moments, and snapshots that are open, still have it.
        TableNotFoundError.
        """
        tables = self.engine.tables
        row = tables.row(as_table_name(name))
        if row is None:
            raise TableNotFoundError(name)
        return self._commit_name(Drop(row, extension_of(meta)))

    def rename_table(self, name: str, new: str, *, meta: Mapping[str, str] | None = None) -> Seqno:
        """Give a table another name. Returns the commit's seqno. TableNotFoundError, TableExistsError."""
        return self._commit_name(Rename(as_table_name(name), as_table_name(new), extension_of(meta)))

    def _commit_name(self, operation: Operation) -> Seqno:
        engine = self.engine
        return engine.commit(CommitRequest(sync=engine.wants_sync(None), operation=operation))
