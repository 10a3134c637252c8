"""The tables of a store, for tasks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, overload

from kvwal.aio.committer import say_committed
from kvwal.aio.table import AsyncTable, TaskParts
from kvwal.aio.workers import in_thread, to_the_end
from kvwal.api.naming import TableInfo
from kvwal.api.store import Store
from kvwal.codecs import Codec, KeyCodec
from kvwal.keys import BytesLike, Seqno, as_key
from kvwal.tables.spec import SubSpec, TableSpec

__all__ = ["AsyncNaming"]

K = TypeVar("K")
V = TypeVar("V")
_P = ParamSpec("_P")


class AsyncNaming:
    """The part of `AsyncStore` that knows names."""

    __slots__ = ()

    _store: Store
    _parts: TaskParts

    @abstractmethod
    def _refuse_if_over(self) -> None:
        """See `AsyncReading`."""

    @overload
    def table(self, name: str, *, expire_s: float | None = None) -> AsyncTable[bytes, bytes]: ...
    @overload
    def table(
        self, name: str, key: type[K] | KeyCodec[K], *, expire_s: float | None = None
    ) -> AsyncTable[K, bytes]: ...
    @overload
    def table(
        self, name: str, *, value: type[V] | Codec[V], expire_s: float | None = None
    ) -> AsyncTable[bytes, V]: ...
    @overload
    def table(
        self, name: str, key: type[K] | KeyCodec[K], value: type[V] | Codec[V], *, expire_s: float | None = None
    ) -> AsyncTable[K, V]: ...
    def table(self, name: str, key: Any = bytes, value: Any = bytes, *, expire_s: float | None = None) -> Any:
        """A named table, with keys and values of these types. It comes to be when something is first put into it.

        Arguments and errors as in `Store.table`, but that TableCodecError is raised by the first use of the table.
        """
        self._refuse_if_over()
        return AsyncTable(self._parts, TableSpec(name, key, value, expire_s), self)

    @overload
    def sub(self, prefix: BytesLike) -> AsyncTable[bytes, bytes]: ...
    @overload
    def sub(self, prefix: BytesLike, key: type[K] | KeyCodec[K]) -> AsyncTable[K, bytes]: ...
    @overload
    def sub(self, prefix: BytesLike, *, value: type[V] | Codec[V]) -> AsyncTable[bytes, V]: ...
    @overload
    def sub(self, prefix: BytesLike, key: type[K] | KeyCodec[K], value: type[V] | Codec[V]) -> AsyncTable[K, V]: ...
    def sub(self, prefix: BytesLike, key: Any = bytes, value: Any = bytes) -> Any:
        """The keys of the default table that begin with a prefix, as a table whose keys are without it."""
        self._refuse_if_over()
        return AsyncTable(self._parts, SubSpec(as_key(prefix), key, value), self)

    async def tables(self) -> list[TableInfo]:
        """The tables that there are, by name: `Store.tables`, in a thread."""
        self._refuse_if_over()
        return await in_thread(self._store.tables)

    async def drop_table(self, name: str, *, meta: Mapping[str, str] | None = None) -> Seqno:
        """Remove a table and everything in it: `Store.drop_table`, in a thread.

        A task that is cancelled waits for the end; `committed_seqno(error)` says the seqno if it was dropped.
        """
        return await self._named(self._store.drop_table, name, meta=meta)

    async def rename_table(self, name: str, new: str, *, meta: Mapping[str, str] | None = None) -> Seqno:
        """Give a table another name: `Store.rename_table`, in a thread. Cancellation: as in `drop_table`."""
        return await self._named(self._store.rename_table, name, new, meta=meta)

    async def _named(self, function: Callable[_P, Seqno], *args: _P.args, **kwargs: _P.kwargs) -> Seqno:
        self._refuse_if_over()
        seqno, cancelled = await to_the_end(function, *args, **kwargs)
        if cancelled is not None:
            say_committed(cancelled, seqno)
            raise cancelled
        return seqno
