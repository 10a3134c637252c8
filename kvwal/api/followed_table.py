"""A table of a followed store, for reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from kvwal.api.table import RecallingTable
from kvwal.codecs import KeyCodec
from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.engine.row_cache import RowCache
from kvwal.errors import IndexNotFoundError
from kvwal.tables.index import Index, IndexSpec
from kvwal.tables.spec import TableSpec
from kvwal.tables.stored import StoredTable
from kvwal.tables.within import SnapshotTable, refuse_other_store

__all__ = ["FollowedTable"]

I = TypeVar("I")  # noqa: E741  # an index key, beside K and V
K = TypeVar("K")
V = TypeVar("V")


class FollowedTable(RecallingTable[K, V], Generic[K, V]):
    """A named table of a followed store, of now. Made by `Follower.table`; empty as long as there is none.

    Thread-safe. It moves as the follower does.
    """

    __slots__ = ("_engine", "_owner", "_stored", "_told")

    def __init__(self, engine: Engine, spec: TableSpec[K, V], owner: object, cache: RowCache) -> None:
        """`cache`: through which the follower looks at rows."""
        super().__init__(spec)
        self._engine = engine
        # The follower, which is not collected while its table is used.
        self._owner = owner
        self._stored = _Stored(engine, spec, cache)
        self._told = StoredTable(engine, spec)

    @property
    def spec(self) -> TableSpec[K, V]:
        """What it is asked for with."""
        return self._spec

    def raw(self) -> StoredTable:
        """The same table as bytes."""
        return self._stored

    @property
    def id(self) -> int | None:
        """The number that stands for the table in `changes`; None while there is none. TableCodecError."""
        return self._stored.id()

    def within(self, snapshot: Snapshot) -> SnapshotTable[K, V]:
        """The table at the moment of a snapshot. UsageError if that is of another store."""
        if not isinstance(snapshot, Snapshot):
            raise TypeError(f"a snapshot is expected, not {type(snapshot).__name__}")
        refuse_other_store(self._engine.state, snapshot)
        return SnapshotTable(self._spec, snapshot)

    def index(
        self, name: str, *, codec: type[I] | KeyCodec[I], key: Callable[[V], Any] | None = None, many: bool = False
    ) -> Index[I, K, V]:
        """An index of the table, for reading: see `Table.index`.

        Args:
            codec: of the index keys, as it was declared with.
            key, many: not needed, since nothing is written: for code that declares indexes here and there.

        Raises: IndexNotFoundError; TableCodecError if the index was made with another codec, at the call or later;
        TypeError or ValueError.
        """
        spec: IndexSpec[I, K, V] = IndexSpec(self._spec, name, _never if key is None else key, codec, many)
        row = self._engine.tables.row(spec.table.name)
        if row is None or not self._engine.tables.indexes.declare(row, spec.declared):
            raise IndexNotFoundError(spec.table.name, name)
        return Index(self._engine, spec, self._owner)

    def __repr__(self) -> str:
        return f"<kvwal.FollowedTable {self._spec}>"


class _Stored(StoredTable):
    """Its bytes."""

    __slots__ = ()

    def __init__(self, engine: Engine, spec: TableSpec[Any, Any], cache: RowCache) -> None:
        super().__init__(engine, spec)
        self._cache = cache


def _never(value: Any) -> Any:
    """In place of what index keys are made with."""
    raise AssertionError("a follower puts nothing into an index")
