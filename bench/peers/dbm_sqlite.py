"""dbm.sqlite3 of the standard library (Python 3.13 and later).

It has no settings: WAL, and SQLite's default synchronous=FULL (cpython, Lib/dbm/sqlite3.py). So it is
durable at each put and cannot be made less; it has no transactions, no batches and no order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, cast

from bench.data import Pair
from bench.peers.base import How, NotOffered, Peer, require

__all__ = ["DbmSqlite"]


class DbmSqlite(Peer):
    """An open dbm.sqlite3."""

    name = "dbm.sqlite3"

    @classmethod
    def version(cls) -> str:
        import platform

        require("dbm.sqlite3")
        return f"Python {platform.python_version()}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        os.makedirs(path, exist_ok=True)
        self.settings = {"all": "fixed: WAL, synchronous=FULL"}
        self._db: Any = require("dbm.sqlite3").open(os.path.join(path, "kv.dbm"), "c")

    def close(self) -> None:
        self._db.close()

    def putter(self) -> Callable[[bytes, bytes], object]:
        if self.how.durability != "commit":
            raise NotOffered("always syncs")
        if self.how.threads > 1:
            raise NotOffered("one thread only")
        return cast(Callable[[bytes, bytes], object], self._db.__setitem__)

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        if self.how.durability == "commit":
            raise NotOffered("no batches")
        # Building a data set, not measured: its own connection, in one transaction.
        connection = self._db._cx
        connection.execute("BEGIN")
        for key, value in pairs:
            self._db[key] = value
        connection.execute("COMMIT")

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        return cast(Callable[[bytes], "bytes | None"], self._db.__getitem__)
