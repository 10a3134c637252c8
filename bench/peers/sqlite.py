"""sqlite3 of the standard library, in WAL mode: synchronous=FULL at "commit", NORMAL at "os".

Choices, and where they are advised:

- journal_mode=WAL; FULL syncs the log at each commit, NORMAL only at checkpoints (sqlite.org/wal.html,
  sqlite.org/pragma.html#pragma_synchronous).
- A WITHOUT ROWID table where rows are small, an ordinary one where they are large
  (sqlite.org/withoutrowid.html, "When To Use WITHOUT ROWID").
- locking_mode=EXCLUSIVE saves the file locks and the shared memory (sqlite.org/pragma.html#pragma_locking_mode);
  kvwal too lets one process in. Not where another connection must checkpoint.
- wal_autocheckpoint raised to the budget that kvwal has for its memtable (sqlite.org/wal.html,
  "Performance Considerations"). Measured here: 16 us for a put instead of 31.
- cache_size is the common cache budget. mmap_size made no difference that could be measured.
- Threads share one connection under a lock: docs.python.org/3/library/sqlite3.html asks for serialized
  writes then. A connection each waits in SQLite's busy handler, which sleeps; measured slower.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from bench.data import Pair
from bench.peers.base import How, NotOffered, Peer, bump

__all__ = ["Sqlite"]

_PUT = "INSERT INTO kv VALUES(?, ?) ON CONFLICT(k) DO UPDATE SET v = excluded.v"
_GET = "SELECT v FROM kv WHERE k = ?"


class Sqlite(Peer):
    """One connection."""

    name = "sqlite3"

    @classmethod
    def version(cls) -> str:
        return f"SQLite {sqlite3.sqlite_version}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        os.makedirs(path, exist_ok=True)
        self._file = os.path.join(path, "kv.sqlite")
        rowid = how.value_bytes > 1000
        pages = 1 << 30 if how.keep_log else how.memtable_bytes // 4096
        self.settings = {
            "journal_mode": "wal",
            "synchronous": "full" if how.durability == "commit" else "normal",
            "locking_mode": "exclusive" if how.alone else "normal",
            "wal_autocheckpoint": str(pages),
            "cache_size": str(-(how.cache_bytes // 1024)),
        }
        self._connection = self._connect()
        self._connection.execute(
            f"CREATE TABLE IF NOT EXISTS kv(k BLOB PRIMARY KEY, v BLOB) {'' if rowid else 'WITHOUT ROWID'}"
        )
        self.settings["table"] = "rowid" if rowid else "WITHOUT ROWID"
        self.settings["threads"] = "share the connection under a lock"
        self._lock = threading.Lock()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False, timeout=60)
        order = ["locking_mode", "journal_mode", "synchronous", "wal_autocheckpoint", "cache_size"]
        for pragma in order:
            connection.execute(f"PRAGMA {pragma} = {self.settings[pragma]}")
        return connection

    def close(self) -> None:
        self._connection.close()

    def putter(self) -> Callable[[bytes, bytes], object]:
        execute = self._connection.execute
        if self.how.threads == 1:

            def put(key: bytes, value: bytes) -> None:
                execute(_PUT, (key, value))

            return put
        lock = self._lock

        def put_locked(key: bytes, value: bytes) -> None:
            with lock:
                execute(_PUT, (key, value))

        return put_locked

    def writer(self) -> Callable[[list[Pair]], object]:
        execute, executemany, lock = self._connection.execute, self._connection.executemany, self._lock

        def write(pairs: list[Pair]) -> None:
            with lock:
                execute("BEGIN")
                executemany(_PUT, pairs)
                execute("COMMIT")

        return write

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        # One transaction: sqlite.org/faq.html#q19. executemany takes an iterator.
        self._connection.execute("BEGIN")
        self._connection.executemany(_PUT, pairs)
        self._connection.execute("COMMIT")

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        execute = self._connection.execute

        def get(key: bytes) -> bytes | None:
            row = execute(_GET, (key,)).fetchone()
            return cast(bytes, row[0]) if row else None

        return get

    def many_getter(self) -> Callable[[list[bytes]], object]:
        execute = self._connection.execute

        def get_many(keys: list[bytes]) -> dict[bytes, bytes]:
            marks = ",".join("?" * len(keys))
            return dict(execute(f"SELECT k, v FROM kv WHERE k IN ({marks})", keys))

        return get_many

    def txn_getter(self) -> Callable[[list[bytes]], object]:
        execute = self._connection.execute

        def get_all(keys: list[bytes]) -> None:
            execute("BEGIN")
            for key in keys:
                execute(_GET, (key,)).fetchone()
            execute("COMMIT")

        return get_all

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        order = "DESC" if reverse else "ASC"
        return cast(Iterator[Pair], self._connection.execute(f"SELECT k, v FROM kv ORDER BY k {order}"))

    def scanner(self) -> Callable[[bytes, int], list[Pair]]:
        execute = self._connection.execute
        sql = "SELECT k, v FROM kv WHERE k >= ? ORDER BY k LIMIT ?"
        return lambda start, count: cast(list[Pair], execute(sql, (start, count)).fetchall())

    def incrementer(self) -> Callable[[bytes], object]:
        execute = self._connection.execute
        lock: Any = self._lock

        def increment(key: bytes) -> None:
            with lock:
                execute("BEGIN IMMEDIATE")
                value = execute(_GET, (key,)).fetchone()[0]
                execute(_PUT, (key, bump(value)))
                execute("COMMIT")

        return increment

    def tend(self) -> None:
        if self.how.alone:
            raise NotOffered("an exclusive connection checkpoints by itself")
        # A connection of its own: the checkpoint then runs beside the one that is measured.
        connection = self._connect()
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            connection.close()
