"""kvwal itself, with its defaults; budgets and durability as every other peer of the row.

Only the public API is called, and what is not there is said, not assumed: `python -m bench --against` measures
older commits with this adapter.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from typing import Any, ClassVar, cast

from bench.data import Pair
from bench.peers.base import How, Kind, NotOffered, Peer, bump, require

__all__ = ["Kvwal"]


class Kvwal(Peer):
    """A Store."""

    name = "kvwal"
    kind: ClassVar[Kind] = "kvwal"
    # Where kvwal.aio is missing: a group commit is worth many threads.
    executor_threads = 64

    @classmethod
    def version(cls) -> str:
        kvwal = require("kvwal")
        if not hasattr(kvwal, "open"):
            raise ImportError("kvwal.open is not there yet")
        from importlib.metadata import PackageNotFoundError, version

        _known_options()  # here, so that no measured open pays for it
        try:
            return f"kvwal {version('kvwal')}"
        except PackageNotFoundError:
            return f"kvwal {getattr(kvwal, '__version__', 'from the source tree')}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        # A log that is to be replayed must not be checkpointed away.
        memtable = how.memtable_bytes if not how.keep_log else 4 << 30
        wanted: dict[str, Any] = {
            "durability": how.durability,
            "cache_bytes": how.cache_bytes,
            "memtable_bytes": memtable,
        }
        known = _known_options()
        self._options = {name: value for name, value in wanted.items() if name in known}
        self.settings = {
            name: "no such option" if name not in known else f"{value >> 20} MiB" if isinstance(value, int) else value
            for name, value in wanted.items()
        }
        self._db: Any = None
        if not how.asyncio:
            self._db = require("kvwal").open(path, **self._options)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()

    def _method(self, name: str) -> Any:
        method = getattr(self._db, name, None)
        if method is None:
            raise NotOffered(f"no {name}")
        return method

    def putter(self) -> Callable[[bytes, bytes], object]:
        return cast(Callable[[bytes, bytes], object], self._method("put"))

    def writer(self) -> Callable[[list[Pair]], object]:
        return cast(Callable[[list[Pair]], object], self._method("update"))

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        return cast(Callable[[bytes], "bytes | None"], self._method("get"))

    def many_getter(self) -> Callable[[list[bytes]], object]:
        return cast(Callable[[list[bytes]], object], self._method("get_many"))

    def txn_getter(self) -> Callable[[list[bytes]], object]:
        transaction = self._method("transaction")

        def get_all(keys: list[bytes]) -> None:
            with transaction() as txn:
                get = txn.get
                for key in keys:
                    get(key)

        return get_all

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        return cast(Iterator[Pair], self._method("scan")(reverse=reverse))

    def scanner(self) -> Callable[[bytes, int], list[Pair]]:
        scan = self._method("scan")
        return lambda start, count: list(scan(start, limit=count))

    def incrementer(self) -> Callable[[bytes], object]:
        run = self._method("run")

        def increment(key: bytes) -> None:
            def change(txn: Any) -> None:
                txn.put(key, bump(txn.get(key)))

            run(change)

        return increment

    def tend(self) -> None:
        self._method("checkpoint")()

    def executor_note(self) -> str:
        return "kvwal.aio" if _has_aio() else super().executor_note()

    def session(self) -> AbstractAsyncContextManager[Callable[[bytes, bytes], Awaitable[object]]]:
        return self._with_aio() if _has_aio() else self._behind_threads()

    @asynccontextmanager
    async def _with_aio(self) -> AsyncIterator[Callable[[bytes, bytes], Awaitable[object]]]:
        async with require("kvwal.aio").open(self.path, **self._options) as db:
            yield db.put

    @asynccontextmanager
    async def _behind_threads(self) -> AsyncIterator[Callable[[bytes, bytes], Awaitable[object]]]:
        self._db = require("kvwal").open(self.path, **self._options)
        async with super().session() as put:
            yield put


@cache
def _known_options() -> frozenset[str]:
    return frozenset(inspect.signature(require("kvwal").open).parameters)


def _has_aio() -> bool:
    return importlib.util.find_spec("kvwal.aio") is not None
