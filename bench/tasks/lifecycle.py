"""What happens once: making a data set, opening, crashing and recovering, growing on the disk and in memory."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import time
from time import perf_counter
from typing import Final

from bench.data import KEY_BYTES, key, pairs, sorted_keys, values
from bench.peers import PEERS
from bench.peers.base import NotOffered, chunked
from bench.tasks.job import Job, Measured, data_set, opened, settle

# How long a store may tidy up before its size is taken.
_IDLE_S: Final = 10.0

__all__ = ["build", "disk", "memory", "open_put", "open_store", "recover", "tail"]


def build(job: Job) -> Measured:
    """A data set: the keys in order, tended and closed. Not a measurement."""
    begun = perf_counter()
    with opened(job) as store:
        store.load(data_set(job), ascending=True)
        try:
            store.tend()
        except NotOffered:
            pass
    return Measured(perf_counter() - begun, job.keys)


def open_store(job: Job) -> Measured:
    """Open after a clean close and read one key; the median of several, in milliseconds, without the import."""
    PEERS[job.peer].version()
    wanted = key(job.keys // 2)
    settle()
    times = []
    settings: dict[str, str] = {}
    for _ in range(9):
        begun = perf_counter()
        store = PEERS[job.peer](job.path, job.how)
        value = store.getter(stable=True)(wanted)
        times.append(perf_counter() - begun)
        assert value is not None
        settings = store.settings
        store.close()
    extra = {"first_ms": times[0] * 1e3}
    return Measured(statistics.median(times) * 1e3, len(times), sum(times), extra=extra, settings=settings)


def open_put(job: Job) -> Measured:
    """Open, put one pair, close; the median of several, one after the other on the same store, in milliseconds."""
    PEERS[job.peer].version()
    items = job.pairs(25)
    settle()
    times = []
    settings: dict[str, str] = {}
    for name, value in items:
        begun = perf_counter()
        store = PEERS[job.peer](job.path, job.how)
        store.putter()(name, value)
        store.close()
        times.append(perf_counter() - begun)
        settings = store.settings
    with opened(job) as store:
        assert store.getter(stable=True)(items[-1][0]) == items[-1][1]
    extra = {"first_ms": times[0] * 1e3, "worst_ms": max(times) * 1e3}
    return Measured(statistics.median(times) * 1e3, len(times), sum(times), extra=extra, settings=settings)


def tail(job: Job) -> Measured:
    """Write a tail of a given size and die by SIGKILL with the store open. Not a measurement; does not return."""
    size, per_commit = int(job.options["tail_bytes"]), int(job.options["per_commit"])
    count = size // (KEY_BYTES + job.how.value_bytes)
    store = PEERS[job.peer](job.path, job.how)
    store.tail_is_logged()
    pool = values(job.how.value_bytes)
    items = ((k, pool[n % len(pool)]) for n, k in enumerate(sorted_keys(count)))
    last = b""
    if per_commit == 1:
        put = store.putter()
        for last, value in items:
            put(last, value)
    else:
        write = store.writer()
        for some in chunked(items, per_commit):
            write(some)
            last = some[-1][0]
    answer = Measured(0.0, count, extra={"last": last.hex(), "disk_bytes": disk_bytes(job.path)})
    sys.stdout.write(json.dumps(vars(answer)) + "\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    return answer


def recover(job: Job) -> Measured:
    """Open what `tail` left and read its last key; nanoseconds for each byte the user had written."""
    PEERS[job.peer].version()
    last = bytes.fromhex(job.options["last"])
    settle()
    begun = perf_counter()
    store = PEERS[job.peer](job.path, job.how)
    value = store.getter(stable=True)(last)
    spent = perf_counter() - begun
    assert value is not None, "the last acknowledged key is gone"
    store.close()
    return Measured(spent * 1e9 / int(job.options["tail_bytes"]), 1, spent, settings=store.settings)


def disk(job: Job) -> Measured:
    """Bytes on disk for each byte of the user's, after a load in random order and after overwriting all of it.

    The cost is the worse of the two, after ten seconds without a call, and a clean close: what a store tidies up by
    itself is part of it. `peak` is the most seen at once after a pass.
    """
    passes = int(job.options["passes"])
    user = job.keys * (KEY_BYTES + job.how.value_bytes)
    numbers = list(range(job.keys))
    rng = random.Random(job.seed)
    sizes: list[float] = []
    peak = 0.0
    for first, last in ((0, 1), (1, 1 + passes)):
        with opened(job) as store:
            write = store.writer()
            for number in range(first, last):
                rng.shuffle(numbers)
                for some in chunked(pairs(numbers, job.how.value_bytes, seed=number), 1000):
                    write(some)
                peak = max(peak, disk_bytes(job.path) / user)
            time.sleep(_IDLE_S)
        sizes.append(disk_bytes(job.path) / user)
    extra = {"after_load": sizes[0], "after_overwriting": sizes[1], "peak": peak}
    return Measured(max(sizes), job.keys * (1 + passes), extra=extra, settings=store.settings)


def memory(job: Job) -> Measured:
    """The most memory the process held (MiB) while it read and overwrote random keys of the data set."""
    rng = random.Random(job.seed)
    pool = values(job.how.value_bytes)
    with opened(job) as store:
        get, put = store.getter(stable=False), store.putter()
        begun = perf_counter()
        ops = 0
        while perf_counter() - begun < job.seconds:
            for _ in range(500):
                assert get(key(rng.randrange(job.keys))) is not None
                put(key(rng.randrange(job.keys)), pool[rng.randrange(len(pool))])
                ops += 2
        status = _status()
    extra = {name: status[name] / 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}
    return Measured(extra["VmHWM"], ops, job.seconds, extra=extra, settings=store.settings)


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in KiB."""
    with open("/proc/self/status") as lines:
        fields = (line.split() for line in lines)
        return {words[0].rstrip(":"): int(words[1]) for words in fields if words[-1] == "kB"}


def disk_bytes(path: str) -> int:
    """Bytes allocated below a directory; holes in sparse files do not count."""
    return sum(os.lstat(os.path.join(root, name)).st_blocks * 512 for root, _, names in os.walk(path) for name in names)
