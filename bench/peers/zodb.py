"""ZODB with FileStorage: the peer for transactions. Every commit calls fsync; that cannot be turned off.

Choices, and where they are advised (zodb.org: "Tutorial", "Writing persistent objects", "Reference: ZODB.DB"):

- The mapping is a BTrees.OOBTree.BTree, the documented container for large mappings, whose buckets resolve
  conflicts between writers of different keys.
- cache_size (in objects) above the number of buckets and pool_size = threads, so that nothing is reloaded.
- A connection and a transaction manager for each thread; ConflictError is retried with `attempts`, as the
  `transaction` package's documentation shows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from bench.data import Pair
from bench.peers.base import How, NotOffered, Peer, bump, chunked, require

__all__ = ["Zodb"]


class Zodb(Peer):
    """A DB over a FileStorage."""

    name = "ZODB"

    @classmethod
    def version(cls) -> str:
        from importlib.metadata import version

        require("ZODB")
        return f"ZODB {version('ZODB')}, BTrees {version('BTrees')}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        os.makedirs(path, exist_ok=True)
        self._transaction: Any = require("transaction")
        storage = require("ZODB.FileStorage").FileStorage(os.path.join(path, "Data.fs"))
        self.settings = {
            "storage": "FileStorage",
            "container": "OOBTree",
            "cache_size": "100,000 objects",
            "pool_size": str(how.threads + 1),
        }
        self._db: Any = require("ZODB").DB(storage, cache_size=100_000, pool_size=how.threads + 1)
        self._managers: list[Any] = []
        self._manager, self._tree = self._open()

    def _open(self) -> tuple[Any, Any]:
        manager = self._transaction.TransactionManager(explicit=True)
        self._managers.append(manager)
        manager.begin()
        root = self._db.open(transaction_manager=manager).root()
        if "kv" not in root:
            root["kv"] = require("BTrees.OOBTree").BTree()
            manager.commit()
        else:
            manager.abort()
        return manager, root["kv"]

    def close(self) -> None:
        # Closing the database aborts what is open, which an explicit manager forbids between transactions.
        for manager in self._managers:
            manager.begin()
        self._db.close()

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        for some in chunked(pairs, 10_000):
            self._manager.begin()
            self._tree.update(some)
            self._manager.commit()

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        if not stable:
            raise NotOffered("measured for transactions only")
        manager, tree = self._manager, self._tree

        def get(key: bytes) -> bytes | None:
            with manager:
                value: bytes | None = tree.get(key)
                return value

        return get

    def many_getter(self) -> Callable[[list[bytes]], object]:
        raise NotOffered("measured for transactions only")

    def txn_getter(self) -> Callable[[list[bytes]], object]:
        manager, get = self._manager, self._tree.get

        def get_all(keys: list[bytes]) -> None:
            with manager:
                for key in keys:
                    get(key)

        return get_all

    def incrementer(self) -> Callable[[bytes], object]:
        if self.how.durability != "commit":
            raise NotOffered("always syncs")
        manager, tree = self._open() if self.how.threads > 1 else (self._manager, self._tree)

        def increment(key: bytes) -> None:
            # The documented bound of attempts would fail under high contention; this one is out of reach.
            for attempt in manager.attempts(1_000_000):
                with attempt:
                    tree[key] = bump(tree[key])

        return increment

    def tail_is_logged(self) -> None:
        raise NotOffered("measured for transactions only")
