"""`python -m bench.table_indexes`: puts into a table with one index, beside one without, and beside SQLite with one."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import kvwal
from bench.data import key
from bench.parts import Line, Part, Setting, Size, fresh, in_turns, ratios, run_parts, spread

__all__ = ["main"]

_VALUE_BYTES: Final = 100
# An index key is the begin of a value: no codec is measured.
_KEY_BYTES: Final = 8
_BATCH: Final = 100
# In the one table of SQLite the index key is a column of its own.
_SQLITE: Final = (
    "CREATE TABLE kv(k BLOB PRIMARY KEY, v BLOB, i BLOB) WITHOUT ROWID",
    "CREATE INDEX by_i ON kv(i)",
)
_PUT: Final = "INSERT INTO kv VALUES(?, ?, ?) ON CONFLICT(k) DO UPDATE SET v = excluded.v, i = excluded.i"


def _puts(setting: Setting) -> list[Line]:
    lines = []
    for durability, count in (("commit", setting.sizes.durable), ("os", setting.sizes.puts)):
        lines += _compared(setting, f'put at "{durability}"', durability, count, 1)
    return lines + _compared(setting, f'update of {_BATCH} keys at "os"', "os", setting.sizes.puts, _BATCH)


def _compared(setting: Setting, what: str, durability: str, count: int, batch: int) -> list[Line]:
    path = setting.directory / "store"
    measures = {
        "with": partial(fresh, _kvwal, path, durability, count, batch, True),
        "without": partial(fresh, _kvwal, path, durability, count, batch, False),
        "sqlite": partial(fresh, _sqlite, path, durability, count, batch),
    }
    found = in_turns(measures, setting)
    without = ratios(found["with"], found["without"])
    sqlite = ratios(found["with"], found["sqlite"])
    return [
        Line(f"{what}: with an index / without", spread(without), "at most 2x", without.median <= 2),
        Line(f"{what}: kvwal / SQLite, with an index", spread(sqlite), "at most 1x", sqlite.median <= 1),
    ]


def _kvwal(path: Path, durability: Any, count: int, batch: int, has_index: bool) -> float:
    with kvwal.open(path, "n", durability=durability) as db:
        table = db.table("t", bytes, bytes)
        if has_index:
            table.index("by_begin", key=lambda value: value[:_KEY_BYTES], codec=bytes)
        return _timed(count, batch, lambda pairs: table.update(pairs) if batch > 1 else table.put(*pairs[0]))


def _sqlite(path: Path, durability: str, count: int, batch: int) -> float:
    connection = sqlite3.connect(f"{path}.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode = wal")
    connection.execute(f"PRAGMA synchronous = {'full' if durability == 'commit' else 'normal'}")
    connection.execute("DROP TABLE IF EXISTS kv")
    for statement in _SQLITE:
        connection.execute(statement)
    execute, executemany = connection.execute, connection.executemany

    def write(pairs: list[tuple[bytes, bytes]]) -> None:
        if batch == 1:
            name, value = pairs[0]
            execute(_PUT, (name, value, value[:_KEY_BYTES]))
            return
        execute("BEGIN")
        executemany(_PUT, [(name, value, value[:_KEY_BYTES]) for name, value in pairs])
        execute("COMMIT")

    try:
        return _timed(count, batch, write)
    finally:
        connection.close()


def _timed(count: int, batch: int, write: Callable[[list[tuple[bytes, bytes]]], object]) -> float:
    """Seconds of a put. Every key is put about twice, the second time with another index key."""
    commits = []
    for first in range(0, count, batch):
        numbers = range(first, first + batch)
        commits.append([(key(n * 7919 % (count // 2 or 1)), key(n) + bytes(_VALUE_BYTES - 16)) for n in numbers])
    began_s = perf_counter()
    for pairs in commits:
        write(pairs)
    return (perf_counter() - began_s) / count


_PARTS: Final = {"puts": Part("puts with one index, without, and beside SQLite with one", _puts)}
_SIZES: Final = {
    "durable": Size(3000, 100, "durable puts"),
    "puts": Size(50_000, 2_000, 'puts at "os"'),
}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    return run_parts("python -m bench.table_indexes", __doc__, _PARTS, _SIZES, arguments)


if __name__ == "__main__":
    sys.exit(main())
