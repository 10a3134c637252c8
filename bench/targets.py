"""What kvwal must reach: the targets, each a claim about one or more cases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["ROWS", "Check", "Row"]


@dataclass(frozen=True)
class Check:
    """One claim of a row.

    - "best": the best peer's figure is at least `bound` times kvwal's. `against` names the peers that count.
    - "limit": kvwal's figure is at most `bound` times that of the limit.
    - "itself": kvwal's figure is at most `bound` times its own in the case `other`.
    - "most": kvwal's figure is at most `bound`.

    Attributes:
        metric: what is compared: the cost, or a name in the extras.
    """

    case: str
    kind: Literal["best", "limit", "itself", "most"]
    bound: float
    against: tuple[str, ...] = ()
    other: str = ""
    metric: str = "cost"


@dataclass(frozen=True)
class Row:
    """One line of the targets."""

    id: str
    workload: str
    target: str
    checks: tuple[Check, ...]


def _best(bound: float, *names: str) -> tuple[Check, ...]:
    return tuple(Check(name, "best", bound) for name in names)


def _within(bound: float, *pairs: tuple[str, str], metric: str = "cost") -> tuple[Check, ...]:
    return tuple(Check(name, "itself", bound, other=other, metric=metric) for name, other in pairs)


ROWS: Final = (
    Row(
        "put-1",
        "durable put, 1 thread",
        "at least 1.2x the best peer, and within 1.15x of the bare write-and-flush loop",
        (*_best(1.2, "put.commit.1"), Check("put.commit.1", "limit", 1.15, ("pwrite+fdatasync",))),
    ),
    Row("put-threads", "durable put, 8 and 64 threads", "at least 2x", _best(2, "put.commit.8", "put.commit.64")),
    Row(
        "put-tasks",
        "durable put, 1,000 asyncio tasks",
        "at least 5x the best peer behind an executor",
        _best(5, "put.commit.tasks"),
    ),
    Row("put-os", "put without sync, 1 thread", "at least 1.2x", _best(1.2, "put.os.1")),
    Row(
        "bulk",
        "batch of 1,000 and bulk load of 1 million",
        "at least 1.1x",
        _best(1.1, "batch", "load.random", "load.sorted"),
    ),
    Row(
        "get-hot",
        "hot get; get inside a transaction; `get_many` of 100",
        "at least 3x; 2x; 3x",
        (*_best(3, "get.hot"), *_best(2, "get.txn"), *_best(3, "get.many")),
    ),
    Row(
        "get-big",
        "get, 10 million keys, uniform, 64 MB of cache",
        "at least as fast as sqlite3 and rocksdict with the same cache",
        (Check("get.big", "best", 1, ("sqlite3", "rocksdict")),),
    ),
    Row(
        "scan",
        "full scan; scan of 100 from a random key; reverse",
        "at least 1.2x",
        _best(1.2, "scan.full", "scan.100", "scan.reverse"),
    ),
    Row(
        "rmw",
        "read-modify-write transaction, 1 and 8 threads, low and high contention",
        "at least 1.5x",
        _best(1.5, "rmw.1.low", "rmw.1.high", "rmw.8.low", "rmw.8.high"),
    ),
    Row(
        "p99",
        "p99 and p99.9 of durable put and of hot get while a checkpoint runs",
        "at most 3x the idle figure",
        tuple(
            check
            for metric in ("p99", "p99.9")
            for check in _within(
                3, ("latency.put.busy", "latency.put.idle"), ("latency.get.busy", "latency.get.idle"), metric=metric
            )
        ),
    ),
    Row(
        "recovery",
        "recovery after SIGKILL with a 64 MB tail",
        "at least as fast per byte as the best peer",
        _best(1, "recovery.100", "recovery.1"),
    ),
    Row(
        "open",
        "open after a clean close, 10 thousand to 10 million keys",
        "flat (at most 1.5x)",
        _within(1.5, ("open.m", "open.s"), ("open.l", "open.s"), ("open.xl", "open.s")),
    ),
    Row(
        "open-put",
        "open, one durable put, close",
        "at most 2x sqlite3",
        (Check("open.put", "best", 0.5, ("sqlite3",)),),
    ),
    Row(
        "disk",
        "bytes on disk per user byte after load, and after overwriting everything 5 times",
        "at most sqlite3's, and bounded (4x at any time)",
        (
            Check("disk", "best", 1, ("sqlite3",), metric="after_load"),
            Check("disk", "best", 1, ("sqlite3",), metric="after_overwriting"),
            Check("disk", "most", 4, metric="peak"),
        ),
    ),
    Row(
        "memory",
        "resident memory at 10 million keys",
        "under the configured budgets + 100 MB",
        (Check("memory", "most", 64 + 64 + 100),),
    ),
    Row(
        "growth",
        "growth: put and get at 10 million keys against 10 thousand",
        "at most 1.5x",
        _within(
            1.5, ("growth.put.xl", "growth.put.s"), ("growth.get.xl", "growth.get.s"), ("growth.hot.xl", "growth.hot.s")
        ),
    ),
)
