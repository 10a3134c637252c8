"""Throughput of one thread: the mean cost of one operation, in microseconds.

The loops take bound methods and lists made beforehand; only the loop is timed.
"""

from __future__ import annotations

import random
from time import perf_counter

from bench.data import key, pairs, sorted_keys, values
from bench.tasks.job import Job, Measured, chunks_of, measured_loop, opened, settle

__all__ = ["batch", "get", "load", "many_get", "put", "scan", "scan_from", "txn_get"]

# For each second of the measured loop: few enough to make quickly. A loop starts over when it has seen all.
_OPS = 40_000


def _ops(job: Job, *, most: int = _OPS) -> int:
    """How many operations to prepare, `most` for each second (whole thousands)."""
    return max(1000, int(most * job.seconds) // 1000 * 1000)


def put(job: Job) -> Measured:
    """One put after the other over the keys of the data set."""
    with opened(job) as store:
        put = store.putter()
        items = job.pairs(_ops(job))

        def body(chunk: list[tuple[bytes, bytes]]) -> None:
            for key, value in chunk:
                put(key, value)

        return _with_settings(measured_loop(body, chunks_of(items, 50), job.seconds, per_chunk=50), store.settings)


def batch(job: Job) -> Measured:
    """Atomic batches of `size` puts; the cost is that of one put."""
    size = int(job.options["size"])
    with opened(job) as store:
        write = store.writer()
        # Distinct keys within a batch: who keeps only the last of two would have less to write.
        rng = random.Random(job.seed)
        among = range(max(job.keys, 2 * size))
        chunks = [pairs(rng.sample(among, size), job.how.value_bytes, seed=n) for n in range(8)]
        return _with_settings(measured_loop(write, chunks, job.seconds, per_chunk=size), store.settings)


def load(job: Job) -> Measured:
    """All keys into an empty store, durable at the end; the cost is that of one put."""
    ascending = bool(job.options["ascending"])
    if ascending:
        pool = values(job.how.value_bytes)
        items = [(key, pool[n % len(pool)]) for n, key in enumerate(sorted_keys(job.keys))]
    else:
        numbers = list(range(job.keys))
        random.Random(job.seed).shuffle(numbers)
        items = pairs(numbers, job.how.value_bytes)
    with opened(job) as store:
        settle()
        begun = perf_counter()
        store.load(iter(items), ascending=ascending)
        spent = perf_counter() - begun
        return Measured(spent / job.keys * 1e6, job.keys, spent, settings=store.settings)


def get(job: Job) -> Measured:
    """One get after the other. Where the data set fits in the cache it is read once before."""
    hot = int(job.options.get("hot", 0))
    with opened(job) as store:
        get = store.getter(stable=True)
        cold = bool(job.options.get("cold"))
        # Where the cache is to miss, no key may come twice, or a cache of single rows would be measured.
        numbers = job.numbers(_ops(job, most=400_000))
        if hot:
            numbers = [n % hot for n in numbers]
        keys = [key(n) for n in numbers]
        if not cold:
            for one in range(hot or job.keys):
                get(key(one))
        assert get(keys[0]) is not None, "the data set lacks a key"

        def body(chunk: list[bytes]) -> None:
            for key in chunk:
                get(key)

        chunks = chunks_of(keys, 1000)
        # A cold cache is first filled with what the distribution asks for most.
        warm = len(chunks) // 5 if cold else 1
        return _with_settings(
            measured_loop(body, chunks, job.seconds, per_chunk=1000, warm=max(1, warm)), store.settings
        )


def txn_get(job: Job) -> Measured:
    """A transaction that reads `size` keys one by one; the cost is that of one read."""
    size = int(job.options["size"])
    with opened(job) as store:
        get_all = store.txn_getter()
        keys = [key(n) for n in job.numbers(_ops(job))]
        get_all([key(n) for n in range(job.keys)])
        chunks = [chunk for chunk in chunks_of(keys, size) if len(chunk) == size]
        return _with_settings(measured_loop(get_all, chunks, job.seconds, per_chunk=size), store.settings)


def many_get(job: Job) -> Measured:
    """`size` keys with one call; the cost is that of one key."""
    size = int(job.options["size"])
    with opened(job) as store:
        get_many = store.many_getter()
        keys = [key(n) for n in job.numbers(_ops(job))]
        chunks = [chunk for chunk in chunks_of(keys, size) if len(chunk) == size]
        for chunk in chunks_of([key(n) for n in range(job.keys)], size):
            get_many(list(chunk))
        return _with_settings(measured_loop(get_many, chunks, job.seconds, per_chunk=size), store.settings)


def scan(job: Job) -> Measured:
    """Every pair of the store in order, again and again; the cost is that of one pair."""
    reverse = bool(job.options.get("reverse", False))
    with opened(job) as store:

        def body(_: object) -> None:
            count = 0
            for _key, _value in store.scan(reverse=reverse):
                count += 1
            assert count == job.keys, f"the scan gave {count} pairs"

        return _with_settings(measured_loop(body, [None], job.seconds, per_chunk=job.keys), store.settings)


def scan_from(job: Job) -> Measured:
    """`size` pairs from a random key on, as a list; the cost is that of one such scan."""
    size = int(job.options["size"])
    with opened(job) as store:
        scan = store.scanner()
        starts = [key(n) for n in job.numbers(_ops(job, most=10_000))]
        assert scan(b"", size)[0][0] <= min(starts)

        def body(chunk: list[bytes]) -> None:
            for start in chunk:
                scan(start, size)

        return _with_settings(measured_loop(body, chunks_of(starts, 50), job.seconds, per_chunk=50), store.settings)


def _with_settings(measured: Measured, settings: dict[str, str]) -> Measured:
    measured.settings = settings
    return measured
