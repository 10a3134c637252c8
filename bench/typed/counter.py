"""`add` to one key by many threads, each durable, beside SQLite's `update ... set n = n + 1` under a lock."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

import kvwal
from bench.parts import Line, Setting, Wrong, fresh, in_turns, ratios, spread

__all__ = ["counter"]


def counter(setting: Setting) -> list[Line]:
    """The table, the store, and SQLite."""
    threads, adds = setting.sizes.threads, setting.sizes.adds
    measures = {
        name: partial(fresh, measure, setting.directory, threads, adds)
        for name, measure in (("table", _table), ("store", _store), ("SQLite", _sqlite))
    }
    found = in_turns(measures, setting)
    lines = []
    for name in ("store", "table"):
        ratio = ratios(found["SQLite"], found[name])
        what = f"durable add by {threads} threads"
        lines.append(Line(f"{what}: SQLite / {name}", spread(ratio), "at least 5x", ratio.median >= 5))
        lines.append(Line(f"{what}: {name}", f"{1 / median(found[name]):,.0f}/s"))
    return lines


def _path(directory: Path) -> Path:
    path = directory / f"counter-{Random().randrange(1 << 40)}"
    path.mkdir(parents=True)
    return path


def _table(directory: Path, threads: int, adds: int) -> float:
    with kvwal.open(_path(directory) / "store") as db:
        table = db.table("counters", str, int)
        table.add("hits", 0)
        seconds = _by(threads, lambda: table.add("hits", 1), adds)
        _check(table["hits"], threads * adds)
    return seconds


def _store(directory: Path, threads: int, adds: int) -> float:
    with kvwal.open(_path(directory) / "store") as db:
        seconds = _by(threads, lambda: db.add(b"hits", 1), adds)
        _check(int.from_bytes(db[b"hits"], "little"), threads * adds)
    return seconds


def _sqlite(directory: Path, threads: int, adds: int) -> float:
    connection = sqlite3.connect(_path(directory) / "file", check_same_thread=False, isolation_level=None)
    connection.execute("pragma journal_mode=wal")
    connection.execute("pragma synchronous=full")
    connection.execute("create table counters (name text primary key, n integer) without rowid")
    connection.execute("insert into counters values ('hits', 0)")
    lock = threading.Lock()

    def add() -> None:
        with lock:
            connection.execute("update counters set n = n + 1 where name = 'hits'")

    seconds = _by(threads, add, adds)
    _check(connection.execute("select n from counters").fetchone()[0], threads * adds)
    connection.close()
    return seconds


def _by(threads: int, add: Callable[[], object], adds: int) -> float:
    """Seconds for one call, of many threads at once."""
    barrier = threading.Barrier(threads + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(adds):
            add()

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    barrier.wait()
    began_s = perf_counter()
    for thread in running:
        thread.join()
    return (perf_counter() - began_s) / (threads * adds)


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise Wrong(f"{wanted} adds came to {found}")
