"""What is measured: the cases.

A case is one measurement of every peer that offers it. Every case is in the results, whether a
target needs it or not, and whichever store is ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

from bench.data import Distribution
from bench.peers import Durability, How
from bench.tasks.ycsb import MIXES

__all__ = ["Case", "Scale", "cases"]

#: ZODB is a peer for transactions only; at tens of millions of keys only those whose load takes minutes, not hours.
_MAPS: Final = (
    "kvwal",
    "sqlite3",
    "lmdb",
    "rocksdict",
    "plyvel",
    "diskcache",
    "dbm.sqlite3",
    "pwrite+fdatasync",
    "dict",
)
_TRANSACTIONS: Final = ("kvwal", "sqlite3", "lmdb", "rocksdict", "plyvel", "diskcache", "dbm.sqlite3", "ZODB")
_LARGE: Final = ("kvwal", "sqlite3", "lmdb", "rocksdict", "plyvel")


@dataclass(frozen=True)
class Scale:
    """How large the measurements are.

    Attributes:
        keys: of an ordinary data set, which fits in every cache.
        big: of the data set that does not fit.
        load: of the bulk load and of the sizes on disk.
    """

    keys: int = 100_000
    big: int = 10_000_000
    load: int = 1_000_000
    tail_bytes: int = 64 << 20
    rounds: int = 3
    seconds: float = 1.5
    quick: bool = False

    @classmethod
    def small(cls) -> Scale:
        """For a contributor: minutes."""
        return cls(keys=10_000, big=300_000, load=100_000, tail_bytes=4 << 20, rounds=3, seconds=0.2, quick=True)

    @property
    def tiers(self) -> dict[str, int]:
        """The sizes of the growth curves: from a thousandth of `big` up to it."""
        return {"s": self.big // 1000, "m": self.big // 100, "l": self.big // 10, "xl": self.big}


#: What a case finds at its path: nothing; a copy of the data set; the data set itself, only read; the same, written to.
Store = Literal["empty", "copy", "shared", "used", "crashed"]


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        unit: of the cost.
        quick: also part of a quick run.
        once: its figure does not vary, and it takes long: one round.
    """

    id: str
    title: str
    task: str
    keys: int
    store: Store
    how: How = field(default_factory=How)
    unit: str = "us"
    distribution: Distribution = "uniform"
    options: dict[str, Any] = field(default_factory=dict)
    peers: tuple[str, ...] = _MAPS
    quick: bool = False
    once: bool = False


def cases(scale: Scale) -> list[Case]:
    """All cases, in the order they run. Those that write to the big data set come after those that read it."""
    every = [*_puts(scale), *_batches(scale), *_gets(scale), *_scans(scale), *_transactions(scale)]
    every += [*_ycsb(scale), *_latency(scale), *_life(scale), *_growth(scale)]
    assert len({case.id for case in every}) == len(every)
    return [case for case in every if case.quick] if scale.quick else every


def _sized(keys: int, value_bytes: int) -> int:
    """Fewer keys where values are larger, so that the data set still fits in the cache."""
    return max(200, keys * 100 // value_bytes) if value_bytes > 100 else keys


_SIZES: Final = {"": 100, ".1k": 1024, ".64k": 65536}


def _puts(scale: Scale) -> list[Case]:
    found = []
    texts: dict[Durability, str] = {"commit": "durable put", "os": "put without sync"}
    for durability, text in texts.items():
        for suffix, size in _SIZES.items():
            title = f"{text}, 1 thread" + (f", {_human(size)} values" if suffix else "")
            how = How(durability=durability, value_bytes=size)
            found.append(
                Case(
                    f"put.{durability}.1{suffix}", title, "put", _sized(scale.keys, size), "copy", how, quick=not suffix
                )
            )
        how = How(durability=durability)
        title = f"{text}, 1 thread, Zipfian"
        found.append(Case(f"put.{durability}.1.zipf", title, "put", scale.keys, "copy", how, distribution="zipf"))
    for threads in (8, 64):
        how = How(threads=threads)
        found.append(
            Case(
                f"put.commit.{threads}",
                f"durable put, {threads} threads",
                "threads_put",
                scale.keys,
                "copy",
                how,
                quick=True,
            )
        )
        title = f"durable put, {threads} threads, a busy Python thread beside"
        options = {"busy": True}
        found.append(
            Case(
                f"put.commit.{threads}.busy", title, "threads_put", scale.keys, "copy", how, options=options, quick=True
            )
        )
    how = How(threads=2, asyncio=True)
    title = "durable put, 1,000 asyncio tasks"
    found.append(
        Case("put.commit.tasks", title, "asyncio_put", scale.keys, "copy", how, options={"tasks": 1000}, quick=True)
    )
    return found


def _batches(scale: Scale) -> list[Case]:
    found = []
    for suffix, size in _SIZES.items():
        title = "batch of 1,000, each put" + (f", {_human(size)} values" if suffix else "")
        how, keys = How(value_bytes=size), _sized(scale.keys, size)
        found.append(
            Case(f"batch{suffix}", title, "batch", keys, "copy", how, options={"size": 1000}, quick=not suffix)
        )
    for order, ascending in (("random", False), ("sorted", True)):
        title = f"bulk load of {scale.load:,}, {order} order, each put"
        found.append(
            Case(
                f"load.{order}",
                title,
                "load",
                scale.load,
                "empty",
                options={"ascending": ascending},
                quick=not ascending,
            )
        )
    return found


def _gets(scale: Scale) -> list[Case]:
    found = []
    for suffix, size in _SIZES.items():
        title = "hot get" + (f", {_human(size)} values" if suffix else "")
        how, keys = How(value_bytes=size), _sized(scale.keys, size)
        found.append(Case(f"get.hot{suffix}", title, "get", keys, "shared", how, quick=not suffix))
    found.append(Case("get.hot.zipf", "hot get, Zipfian", "get", scale.keys, "shared", distribution="zipf"))
    hundred = {"size": 100}
    found.append(
        Case(
            "get.txn",
            "get inside a transaction of 100 gets",
            "txn_get",
            scale.keys,
            "shared",
            options=hundred,
            peers=_TRANSACTIONS,
            quick=True,
        )
    )
    found.append(
        Case("get.many", "get_many of 100, each key", "many_get", scale.keys, "shared", options=hundred, quick=True)
    )
    distributions: tuple[tuple[str, Distribution, str], ...] = (
        ("", "uniform", "uniform"),
        (".zipf", "zipf", "Zipfian"),
    )
    for suffix, distribution, text in distributions:
        title = f"get, {scale.big:,} keys, {text}, 64 MiB of cache"
        found.append(
            Case(
                f"get.big{suffix}",
                title,
                "get",
                scale.big,
                "shared",
                distribution=distribution,
                options={"cold": True},
                peers=_LARGE,
                quick=not suffix,
            )
        )
    return found


def _scans(scale: Scale) -> list[Case]:
    found = []
    for suffix, size in _SIZES.items():
        title = "full scan, each pair" + (f", {_human(size)} values" if suffix else "")
        how, keys = How(value_bytes=size), _sized(scale.keys, size)
        found.append(Case(f"scan.full{suffix}", title, "scan", keys, "shared", how, quick=not suffix))
    found.append(
        Case(
            "scan.100",
            "scan of 100 from a random key",
            "scan_from",
            scale.keys,
            "shared",
            options={"size": 100},
            quick=True,
        )
    )
    title = "full scan in reverse, each pair"
    found.append(Case("scan.reverse", title, "scan", scale.keys, "shared", options={"reverse": True}, quick=True))
    return found


def _transactions(scale: Scale) -> list[Case]:
    found = []
    for threads in (1, 8):
        for name, contended in (("low", min(10_000, scale.keys)), ("high", 10)):
            title = f"read-modify-write transaction, {threads} thread{'s' * (threads > 1)}, over {contended:,} keys"
            how, options = How(threads=threads), {"contended": contended}
            found.append(
                Case(
                    f"rmw.{threads}.{name}",
                    title,
                    "increment",
                    scale.keys,
                    "copy",
                    how,
                    options=options,
                    peers=_TRANSACTIONS,
                    quick=True,
                )
            )
    return found


def _ycsb(scale: Scale) -> list[Case]:
    found = []
    texts: dict[Durability, str] = {"commit": "durable", "os": "without sync"}
    for durability, text in texts.items():
        for mix in MIXES:
            if mix == "c" and durability == "os":
                continue
            how = How(durability=durability, value_bytes=1000)
            title = f"YCSB {mix.upper()}, {text}" if mix != "c" else "YCSB C"
            found.append(
                Case(
                    f"ycsb.{mix}.{durability}",
                    title,
                    "ycsb",
                    _sized(scale.keys, 1000) * 2,
                    "copy",
                    how,
                    options={"mix": mix},
                    quick=durability == "commit" and mix in "abe",
                )
            )
    return found


def _latency(scale: Scale) -> list[Case]:
    found = []
    dirty = max(2000, scale.keys // 2 // 1000 * 1000)
    operations: dict[str, Durability] = {"put": "commit", "get": "os"}
    for operation, durability in operations.items():
        for state in ("idle", "busy"):
            how = How(durability=durability, threads=2 if state == "busy" else 1, tended=state == "busy")
            text = "durable put" if operation == "put" else "hot get"
            title = f"p99 of {text}, " + ("idle" if state == "idle" else "while a checkpoint runs")
            found.append(
                Case(
                    f"latency.{operation}.{state}",
                    title,
                    "latency",
                    scale.keys,
                    "copy",
                    how,
                    options={"operation": operation, "dirty": dirty},
                    peers=_MAPS[:-1],
                    quick=True,
                )
            )
    return found


def _life(scale: Scale) -> list[Case]:
    found = []
    for per_commit in (100, 1):
        how = How(durability="os", keep_log=True)
        mebibytes = scale.tail_bytes >> 20
        title = f"recovery after SIGKILL, {mebibytes} MiB tail, {per_commit} put{'s' * (per_commit > 1)} a commit"
        found.append(
            Case(
                f"recovery.{per_commit}",
                title,
                "recover",
                0,
                "crashed",
                how,
                unit="ns/byte",
                options={"tail_bytes": scale.tail_bytes, "per_commit": per_commit},
                peers=_MAPS[:-1],
                quick=per_commit > 1,
            )
        )
    for tier, keys in scale.tiers.items():
        title = f"open after a clean close, {keys:,} keys"
        found.append(
            Case(f"open.{tier}", title, "open", keys, "shared", unit="ms", peers=_LARGE, quick=tier in ("s", "xl"))
        )
    keys = scale.tiers["s"]
    title = f"open, one durable put, close, {keys:,} keys"
    found.append(Case("open.put", title, "open_put", keys, "copy", unit="ms", peers=_LARGE, quick=True))
    how = How(durability="os")
    title = f"bytes on disk per user byte, {scale.load:,} keys"
    found.append(
        Case(
            "disk",
            title,
            "disk",
            scale.load,
            "empty",
            how,
            unit="x",
            options={"passes": 5},
            peers=_LARGE,
            quick=True,
            once=True,
        )
    )
    return found


def _growth(scale: Scale) -> list[Case]:
    found = []
    how = How(durability="os")
    for tier, keys in scale.tiers.items():
        quick = tier in ("s", "xl")
        title = f"get, uniform, {keys:,} keys"
        options: dict[str, Any] = {"cold": keys > scale.keys}
        found.append(
            Case(f"growth.get.{tier}", title, "get", keys, "shared", options=options, peers=_LARGE, quick=quick)
        )
        title = f"get of a hot tenth of the smallest, {keys:,} keys"
        options = {"hot": max(100, scale.tiers["s"] // 10)}
        found.append(
            Case(f"growth.hot.{tier}", title, "get", keys, "shared", options=options, peers=_LARGE, quick=quick)
        )
    for tier, keys in scale.tiers.items():
        title = f"put without sync, uniform, {keys:,} keys"
        quick = tier in ("s", "xl")
        found.append(Case(f"growth.put.{tier}", title, "put", keys, "used", how, peers=_LARGE, quick=quick))
    title = f"resident memory, {scale.big:,} keys"
    found.append(
        Case("memory", title, "memory", scale.big, "used", how, unit="MiB", peers=_LARGE, quick=True, once=True)
    )
    return found


def _human(size: int) -> str:
    return f"{size // 1024} KiB" if size >= 1024 else f"{size} B"
