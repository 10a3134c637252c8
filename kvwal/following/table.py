"""A table of a followed store, for reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.merge import Chunk
from kvwal.following.engine import FollowedEngine
from kvwal.keys import BytesLike
from kvwal.tables.reading import TypedReading
from kvwal.tables.spec import TableSpec
from kvwal.tables.stored import StoredTable

__all__ = ["FollowedTable"]

K = TypeVar("K")
V = TypeVar("V")


class FollowedTable(TypedReading[K, V], Generic[K, V]):
    """A named table of a followed store, of now. Made by `Follower.table`; empty as long as there is none.

    Thread-safe. It moves as the follower does.
    """

    __slots__ = ("_owner", "_stored")

    def __init__(self, engine: FollowedEngine, spec: TableSpec[K, V], owner: object) -> None:
        super().__init__(spec)
        # The follower, which is not collected while its table is used.
        self._owner = owner
        self._stored = _Stored(engine, spec)

    def raw(self) -> OrderedMapping:
        """The same table as bytes."""
        return self._stored

    @property
    def id(self) -> int | None:
        """The id of the table; None if there is none yet. TableCodecError if it has other codecs."""
        return self._stored.id()

    def __repr__(self) -> str:
        return f"<kvwal.FollowedTable {self._spec}>"


class _Stored(StoredTable):
    """Its bytes."""

    __slots__ = ("_progress",)

    def __init__(self, engine: FollowedEngine, spec: TableSpec[Any, Any]) -> None:
        super().__init__(engine, spec)
        self._progress = engine.progress

    def get_many(self, keys: Iterable[BytesLike], *, cached_only: bool = False) -> list[bytes | None]:
        wanted = list(keys)
        return self._progress.again(lambda: super(_Stored, self).get_many(wanted, cached_only=cached_only))

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._progress.begun(lambda: super(_Stored, self)._walk(bounds))
