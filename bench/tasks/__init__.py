"""What a child can be asked to measure."""

from __future__ import annotations

from bench.tasks.concurrent import asyncio_put, increment, threads_put
from bench.tasks.job import Job, Measured, Task
from bench.tasks.latency import latency
from bench.tasks.lifecycle import build, disk, memory, open_put, open_store, recover, tail
from bench.tasks.loops import batch, get, load, many_get, put, scan, scan_from, txn_get
from bench.tasks.ycsb import ycsb

__all__ = ["TASKS", "Job", "Measured"]

TASKS: dict[str, Task] = {
    "asyncio_put": asyncio_put,
    "batch": batch,
    "build": build,
    "disk": disk,
    "get": get,
    "increment": increment,
    "latency": latency,
    "load": load,
    "many_get": many_get,
    "memory": memory,
    "open": open_store,
    "open_put": open_put,
    "put": put,
    "recover": recover,
    "scan": scan,
    "scan_from": scan_from,
    "tail": tail,
    "threads_put": threads_put,
    "txn_get": txn_get,
    "ycsb": ycsb,
}
