"""diskcache: a cache on top of SQLite.

Choices, and where they are advised (grantjenks.com/docs/diskcache/tutorial.html, "Settings", "FanoutCache",
"Transactions", "Eviction Policies"):

- eviction_policy="none" and cull_limit=0: nothing is ever thrown out, as in a store.
- sqlite_synchronous=2 (FULL) at "commit"; its default is 1 (NORMAL).
- disk_min_file_size out of reach: larger values would go to files that are never synced, which is not
  the durability of this row.
- sqlite_cache_size and sqlite_mmap_size are the common cache budget; statistics and tags are off by default.
- Several threads: FanoutCache, which shards "to decrease blocking writes".
- Many writes at once inside `transact()`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, cast

from bench.data import Pair
from bench.peers.base import How, NotOffered, Peer, bump, require

__all__ = ["DiskCache"]


class DiskCache(Peer):
    """A Cache, or a FanoutCache for threads that only put."""

    name = "diskcache"
    # One for each shard.
    executor_threads = 8

    @classmethod
    def version(cls) -> str:
        return f"diskcache {require('diskcache').__version__}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        diskcache = require("diskcache")
        options = {
            "eviction_policy": "none",
            "cull_limit": 0,
            "size_limit": 1 << 40,
            "sqlite_synchronous": 2 if how.durability == "commit" else 1,
            "sqlite_cache_size": how.cache_bytes // 4096,
            "sqlite_mmap_size": how.cache_bytes,
            "disk_min_file_size": 1 << 30,
        }
        self.settings = {name: str(value) for name, value in options.items()}
        self._cache: Any = diskcache.Cache(path, timeout=60, **options)
        self.settings["threads"] = "put into a FanoutCache of 8 shards"
        self._shards: Any = None
        if how.threads > 1:
            self._shards = diskcache.FanoutCache(os.path.join(path, "shards"), shards=8, timeout=60, **options)

    def close(self) -> None:
        self._cache.close()
        if self._shards is not None:
            self._shards.close()

    def putter(self) -> Callable[[bytes, bytes], object]:
        cache = self._cache if self._shards is None else self._shards
        return cast(Callable[[bytes, bytes], object], cache.__setitem__)

    def writer(self) -> Callable[[list[Pair]], object]:
        transact, put = self._cache.transact, self._cache.set

        def write(pairs: list[Pair]) -> None:
            with transact(retry=True):
                for key, value in pairs:
                    put(key, value)

        return write

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        with self._cache.transact(retry=True):
            put = self._cache.set
            for key, value in pairs:
                put(key, value)

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        return cast(Callable[[bytes], "bytes | None"], self._cache.get)

    def txn_getter(self) -> Callable[[list[bytes]], object]:
        transact, get = self._cache.transact, self._cache.get

        def get_all(keys: list[bytes]) -> None:
            with transact(retry=True):
                for key in keys:
                    get(key)

        return get_all

    def incrementer(self) -> Callable[[bytes], object]:
        transact, get, put = self._cache.transact, self._cache.get, self._cache.set

        def increment(key: bytes) -> None:
            with transact(retry=True):
                put(key, bump(get(key)))

        return increment

    def tail_is_logged(self) -> None:
        raise NotOffered("recovers as sqlite3 does, which is measured")
