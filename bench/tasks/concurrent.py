"""Many at once: threads that put, asyncio tasks that put, threads whose transactions compete.

The cost is wall-clock time divided by the operations of all of them, in microseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any

from bench.data import key
from bench.peers import PEERS
from bench.tasks.job import Job, Measured, chunks_of, opened, settle

__all__ = ["asyncio_put", "increment", "threads_put"]

# Operations between two looks at the clock.
_STEP = 8
# Turns of the busy thread's loop between two looks at whether it is over.
_BUSY_STEP = 20_000


def threads_put(job: Job) -> Measured:
    """Each thread puts its own random keys; with the option "busy", beside a thread that only computes."""
    if job.options.get("busy"):
        # Each wait for the interpreter's lock is 5 ms then: a shorter loop would hold too few of them.
        job = replace(job, seconds=max(job.seconds, 1.0))
    with opened(job) as store, _busy_thread() if job.options.get("busy") else nullcontext() as pace:
        chunks = [chunks_of(job.pairs(2000, seed=n), _STEP) for n in range(job.how.threads)]

        def body(call: Any, chunk: Any) -> None:
            for key, value in chunk:
                call(key, value)

        measured = _race(job, lambda: store.putter(), body, chunks, store.settings)
        if pace is not None:
            # A store that starves the rest of the program shall not look better for it.
            measured.extra["busy_turns_per_s"] = pace()
        return measured


@contextmanager
def _busy_thread() -> Iterator[Callable[[], float]]:
    """A thread that runs Python and never waits. The call says how often a second it went around its loop."""
    turns = 0
    stop = False

    def run() -> None:
        nonlocal turns
        while not stop:
            for _ in range(_BUSY_STEP):
                pass
            turns += _BUSY_STEP

    thread = threading.Thread(target=run)
    begun = perf_counter()
    thread.start()
    try:
        yield lambda: turns / (perf_counter() - begun)
    finally:
        stop = True
        thread.join()


def increment(job: Job) -> Measured:
    """Each thread increments counters in transactions. Afterwards they are counted: none may be lost."""
    contended = int(job.options["contended"])
    with opened(job) as store:
        get = store.getter(stable=True)
        names = [key(n) for n in range(contended)]
        before = sum(_counter(get(name)) for name in names)
        keys = [
            chunks_of([names[n % contended] for n in job.numbers(4000, seed=thread)], _STEP)
            for thread in range(job.how.threads)
        ]

        def body(call: Any, chunk: Any) -> None:
            for key in chunk:
                call(key)

        measured = _race(job, store.incrementer, body, keys, store.settings)
    with opened(job) as store:
        get = store.getter(stable=True)
        after = sum(_counter(get(name)) for name in names)
    lost = measured.ops - ((after - before) & 0xFFFFFFFFFFFFFFFF)
    if lost:
        raise AssertionError(f"{lost} of {measured.ops} increments were lost")
    return measured


def _counter(value: bytes | None) -> int:
    assert value is not None
    return int.from_bytes(value[:8], "big")


def _race(
    job: Job,
    open_call: Callable[[], Any],
    body: Callable[[Any, Any], None],
    chunks: list[Any],
    settings: dict[str, str],
) -> Measured:
    """Run a loop in each thread until the time is up. `open_call` is called in each thread."""
    start = 0.0

    def note_start() -> None:
        nonlocal start
        start = perf_counter()

    barrier = threading.Barrier(job.how.threads, action=note_start)
    counts = [0] * job.how.threads
    ends = [0.0] * job.how.threads
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            call = open_call()
            barrier.wait()
            deadline = start + job.seconds
            done = 0
            while perf_counter() < deadline:
                for chunk in chunks[number]:
                    body(call, chunk)
                    done += len(chunk)
                    if perf_counter() >= deadline:
                        break
            counts[number], ends[number] = done, perf_counter()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failures.append(error)
            barrier.abort()

    settle()
    threads = [threading.Thread(target=run, args=(n,)) for n in range(job.how.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        # Those who waited at the barrier fail because of the first.
        raise next((e for e in failures if not isinstance(e, threading.BrokenBarrierError)), failures[0])
    spent, ops = max(ends) - start, sum(counts)
    return Measured(spent / ops * 1e6, ops, spent, settings=settings)


def asyncio_put(job: Job) -> Measured:
    """Tasks, each of which awaits one put after the other."""
    # Here, so that its threads and its memory are in no other measurement.
    import asyncio

    tasks = int(job.options["tasks"])
    store = PEERS[job.peer](job.path, job.how)
    note = store.executor_note()
    items = [job.pairs(50, seed=n) for n in range(tasks)]

    async def main() -> tuple[int, float]:
        count = 0
        async with store.session() as put:

            async def one(mine: list[tuple[bytes, bytes]], deadline: float) -> None:
                nonlocal count
                while True:
                    for key, value in mine:
                        await put(key, value)
                        count += 1
                        if perf_counter() >= deadline:
                            return

            settle()
            begun = perf_counter()
            await asyncio.gather(*(one(mine, begun + job.seconds) for mine in items))
            return count, perf_counter() - begun

    try:
        ops, spent = asyncio.run(main())
    finally:
        store.close()
    return Measured(spent / ops * 1e6, ops, spent, note=note, settings=store.settings)
