"""`python -m bench.backups`: what backups and restores cost, beside SQLite's backup, recovery, and commits alone."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import threading
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import kvwal
from bench.data import key, values
from bench.parts import Line, Part, Setting, Size, Wrong, in_turns, ratios, run_parts, spread
from bench.peers.base import require
from kvwal.files import File
from kvwal.files.file import SystemFile

__all__ = ["filled", "main"]

_VALUE_BYTES: Final = 100
_BATCH: Final = 50_000
_CHANGED: Final = 1000


def main(arguments: list[str] | None = None) -> int:
    """Print the figures. Exit status: 1 if a restored store was another one."""
    return run_parts("python -m bench.backups", __doc__, _PARTS, _SIZES, arguments)


def filled(path: Path, keys: int, **options: Any) -> kvwal.Store:
    """A store with this number of keys, in its pages."""
    pool = values(_VALUE_BYTES)
    db = kvwal.open(path, durability="os", **options)
    for begin in range(0, keys, _BATCH):
        db.update({key(i): pool[i % len(pool)] for i in range(begin, min(begin + _BATCH, keys))})
    db.checkpoint()
    return db


def _full(setting: Setting) -> list[Line]:
    """A full backup, beside that of SQLite."""
    pool, keys, round_ = values(_VALUE_BYTES), setting.sizes.keys, 0
    db = filled(setting.directory / "s", keys)
    lite = sqlite3.connect(setting.directory / "lite")
    lite.execute("PRAGMA journal_mode=WAL")
    lite.execute("CREATE TABLE t (k BLOB PRIMARY KEY, v BLOB) WITHOUT ROWID")
    lite.executemany("INSERT INTO t VALUES (?, ?)", ((key(i), pool[i % len(pool)]) for i in range(keys)))
    lite.commit()

    def ours() -> float:
        nonlocal round_
        round_ += 1
        began_s = perf_counter()
        report = db.backup(setting.directory / f"b{round_}")
        return report.bytes / (perf_counter() - began_s) / 1e6

    def theirs() -> float:
        nonlocal round_
        round_ += 1
        path = setting.directory / f"lite{round_}"
        began_s = perf_counter()
        with closing(sqlite3.connect(path)) as other:
            lite.backup(other)
        return path.stat().st_size / (perf_counter() - began_s) / 1e6

    measures = {"kvwal": ours, "SQLite": theirs}
    try:
        lmdb = require("lmdb")
    except ImportError:
        lmdb = None
    else:
        env = lmdb.open(str(setting.directory / "lmdb"), map_size=max(1 << 30, 4 * keys * _VALUE_BYTES))
        with env.begin(write=True) as txn:
            for i in range(keys):
                txn.put(key(i), pool[i % len(pool)])

        def copied() -> float:
            nonlocal round_
            round_ += 1
            path = setting.directory / f"lmdb{round_}"
            path.mkdir()
            began_s = perf_counter()
            env.copy(str(path))
            return (path / "data.mdb").stat().st_size / (perf_counter() - began_s) / 1e6

        measures["lmdb"] = copied
    found = in_turns(measures, setting)
    db.close()
    lite.close()
    if lmdb is not None:
        env.close()
    ratio = ratios(found["kvwal"], found["SQLite"])
    rates = {name: sorted(each)[len(each) // 2] for name, each in found.items()}
    return [
        Line("kvwal, a full backup", f"{rates['kvwal']:.0f} MB/s"),
        Line("SQLite's backup", f"{rates['SQLite']:.0f} MB/s"),
        Line("lmdb's copy (mdb_copy)", f"{rates['lmdb']:.0f} MB/s" if lmdb is not None else "pip install lmdb"),
        Line("bytes a second, kvwal to SQLite", spread(ratio), "at least 1x", ratio.median >= 1),
    ]


def _beside(setting: Setting) -> list[Line]:
    """Durable commits with a full backup under way again and again, and without."""
    pool, round_ = values(_VALUE_BYTES), 0
    db = filled(setting.directory / "s", setting.sizes.keys)

    def commits(stop: threading.Event | None) -> float:
        began_s, n = perf_counter(), 0
        while perf_counter() - began_s < setting.sizes.seconds:
            db.put(key(n % setting.sizes.keys), pool[n % len(pool)], durability="commit")
            n += 1
        if stop is not None:
            stop.set()
        return n / (perf_counter() - began_s)

    def beside() -> float:
        stop, made = threading.Event(), 0

        def again() -> None:
            nonlocal made, round_
            while not stop.is_set():
                round_ += 1
                db.backup(setting.directory / f"b{round_}", base="full")
                made += 1

        thread = threading.Thread(target=again)
        thread.start()
        rate = commits(stop)
        thread.join()
        if not made:
            raise Wrong("no backup ended")
        return rate

    found = in_turns({"alone": lambda: commits(None), "beside": beside}, setting)
    db.close()
    ratio = ratios(found["beside"], found["alone"])
    met = ratio.median >= 0.9
    return [Line("commits a second beside a backup, to those alone", spread(ratio), "at least 0.9x", met)]


def _difference(setting: Setting) -> list[Line]:
    """The bytes that a backup reads and writes after 1,000 keys were changed."""
    db = filled(setting.directory / "s", setting.sizes.keys)
    db.backup(setting.directory / "b")
    step = max(1, setting.sizes.keys // _CHANGED)
    db.update({key(i): b"changed" for i in range(0, setting.sizes.keys, step)})
    db.checkpoint()
    read = 0
    pread = SystemFile.pread

    def counted(self: File, size: int, offset: int) -> bytes:
        nonlocal read
        found = pread(self, size, offset)  # type: ignore[arg-type]  # it is one of the system's
        read += len(found)
        return found

    SystemFile.pread = counted  # type: ignore[method-assign,assignment]  # the backup makes its files itself
    try:
        began_s = perf_counter()
        report = db.backup(setting.directory / "b")
        took_s = perf_counter() - began_s
    finally:
        SystemFile.pread = pread  # type: ignore[method-assign]  # as before
    db.close()
    changed = report.pages * 4096
    if report.is_full:
        raise Wrong("it is no difference")
    return [
        Line(f"a difference of {_CHANGED:,} changed keys of {setting.sizes.keys:,}", f"{took_s * 1000:.0f} ms"),
        Line("pages that changed", f"{changed / 1e6:.1f} MB"),
        Line("bytes read, to those of the changed pages", f"{read / changed:.2f}x", "at most 3x", read <= 3 * changed),
    ]


def _replay(setting: Setting) -> list[Line]:
    """The commits of units into a new store, beside a recovery that replays the same ones."""
    pool, round_ = values(_VALUE_BYTES), 0
    path = setting.directory / "s"
    db = kvwal.open(path, durability="os", background=False, checkpoint_log_bytes=1 << 40, memtable_bytes=1 << 30)
    db.backup(setting.directory / "b")
    for i in range(setting.sizes.commits):
        db.put(key(i), pool[i % len(pool)])
    db.sync()
    db.backup(setting.directory / "b")
    expected = len(db)
    db.engine.abandon()

    def recovery() -> float:
        """Of a copy, since it changes what it recovers."""
        nonlocal round_
        round_ += 1
        copy = setting.directory / f"c{round_}"
        shutil.copytree(path, copy)
        began_s = perf_counter()
        with kvwal.open(copy, background=False) as found:
            took_s = perf_counter() - began_s
            if len(found) != expected:
                raise Wrong("recovery has lost something")
        return setting.sizes.commits / took_s

    def reading() -> float:
        began_s = perf_counter()
        with kvwal.open(path, "r") as found:
            took_s = perf_counter() - began_s
            if len(found) != expected:
                raise Wrong("what is only read has lost something")
        return setting.sizes.commits / took_s

    def restore() -> float:
        nonlocal round_
        round_ += 1
        report = kvwal.restore(setting.directory / "b", setting.directory / f"r{round_}")
        with kvwal.open(setting.directory / f"r{round_}", "r") as found:
            if len(found) != expected:
                raise Wrong("the restored store is another one")
        return setting.sizes.commits / report.seconds

    found = in_turns({"restore": restore, "recovery": recovery, "reading": reading}, setting)
    ratio = ratios(found["restore"], found["recovery"])
    rate = sorted(found["restore"])[len(found["restore"]) // 2]
    return [
        Line("a restore, verified, with one commit a put", f"{rate:,.0f} commits/s"),
        Line("to a recovery of the same commits", spread(ratio), "at least 1x", ratio.median >= 1),
        Line("to opening them with flag \"r\"", spread(ratios(found["restore"], found["reading"]))),
    ]


_PARTS: Final = {
    "full": Part("a full backup, beside SQLite's", _full),
    "beside": Part("durable commits beside a backup, and alone", _beside),
    "difference": Part("what a backup reads after 1,000 changes", _difference),
    "replay": Part("restoring commits, beside recovering them", _replay),
}
_SIZES: Final = {
    "keys": Size(2_000_000, 100_000, "keys in the store, with values of 100 bytes"),
    "seconds": Size(10, 2, "seconds of commits in each round"),
    "commits": Size(200_000, 20_000, "commits to replay"),
}


if __name__ == "__main__":
    sys.exit(main())
