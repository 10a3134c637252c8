"""The core workloads of YCSB (github.com/brianfrankcooper/YCSB, wiki "Core Workloads" and workloads/workload*).

    A  50 % read, 50 % update            zipf
    B  95 % read,  5 % update            zipf
    C  100 % read                        zipf
    D  95 % read of the latest, 5 % insert
    E  95 % scan of 1 to 100, 5 % insert zipf
    F  50 % read, 50 % read-modify-write zipf

Records are one value of 1 KiB (YCSB's ten fields of 100 bytes). Read-modify-write in F is a get and a put,
as YCSB defines it, not a transaction; transactions have rows of their own.
"""

from __future__ import annotations

import random
from typing import Any, Final

from bench.data import key, values, zipf
from bench.peers.base import bump
from bench.tasks.job import Job, Measured, chunks_of, measured_loop, opened

__all__ = ["MIXES", "ycsb"]

# Share of each operation.
MIXES: Final[dict[str, dict[str, float]]] = {
    "a": {"read": 0.5, "update": 0.5},
    "b": {"read": 0.95, "update": 0.05},
    "c": {"read": 1.0},
    "d": {"latest": 0.95, "insert": 0.05},
    "e": {"scan": 0.95, "insert": 0.05},
    "f": {"read": 0.5, "modify": 0.5},
}


def ycsb(job: Job) -> Measured:
    """One of the mixes; microseconds for each operation."""
    mix = MIXES[job.options["mix"]]
    with opened(job) as store:
        writes = "read" not in mix or mix["read"] < 1.0
        get = store.getter(stable=not writes)
        put = store.putter() if writes else None
        scan = store.scanner() if "scan" in mix else None

        def modify(key: bytes) -> None:
            assert put is not None
            put(key, bump(get(key)))

        calls: dict[str, Any] = {"read": get, "latest": get, "update": put, "insert": put, "scan": scan}
        calls["modify"] = modify
        operations = _operations(job, mix, calls)
        for number in range(job.keys):
            get(key(number))

        def body(chunk: list[tuple[Any, tuple[Any, ...]]]) -> None:
            for call, arguments in chunk:
                call(*arguments)

        measured = measured_loop(body, chunks_of(operations, 100), job.seconds, per_chunk=100)
        measured.settings = store.settings
        return measured


def _operations(job: Job, mix: dict[str, float], calls: dict[str, Any]) -> list[tuple[Any, tuple[Any, ...]]]:
    """What to do, drawn beforehand: the same for every peer."""
    rng = random.Random(job.seed)
    rank = zipf(job.keys, rng)
    pool = values(job.how.value_bytes)
    kinds = rng.choices(list(mix), list(mix.values()), k=20_000)
    newest = job.keys
    operations: list[tuple[Any, tuple[Any, ...]]] = []
    for number, kind in enumerate(kinds):
        value = pool[number % len(pool)]
        arguments: tuple[Any, ...]
        if kind == "insert":
            arguments = (key(newest), value)
            newest += 1
        elif kind == "latest":
            arguments = (key(newest - 1 - rank()),)
        elif kind == "update":
            arguments = (key(rank()), value)
        elif kind == "scan":
            arguments = (key(rank()), rng.randint(1, 100))
        else:
            arguments = (key(rank()),)
        operations.append((calls[kind], arguments))
    return operations
