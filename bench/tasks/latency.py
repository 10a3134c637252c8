"""How long single operations take, while the store is idle and while it tends itself.

Every operation is timed by itself. In the busy variant another thread dirties keys and then calls
`tend` (a checkpoint, or a flush and compaction), over and over; only operations that began and
ended while `tend` ran are counted.
"""

from __future__ import annotations

import threading
from array import array
from itertools import cycle
from time import perf_counter, perf_counter_ns
from typing import Any

from bench.data import key
from bench.tasks.job import Job, Measured, opened, settle

__all__ = ["latency"]

PERCENTILES = {"p50": 0.50, "p90": 0.90, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}
_MOST_SAMPLES = 2_000_000
# Below this a 99.9th percentile means nothing; the loop goes on beyond its time for it.
_LEAST_SAMPLES = 2000


class _Tending:
    """The other thread."""

    def __init__(self, job: Job, store: Any) -> None:
        self.busy = False
        self.rounds = 0
        self.failure: BaseException | None = None
        self._job, self._store = job, store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            write = self._store.writer()
            chunks = [self._job.pairs(1000, seed=100 + n) for n in range(int(self._job.options["dirty"]) // 1000)]
            while not self._stop.is_set():
                for chunk in chunks:
                    write(chunk)
                    if self._stop.is_set():
                        return
                self.busy = True
                self._store.tend()
                self.busy = False
                self.rounds += 1
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            self.failure = error
        finally:
            self.busy = False

    def __enter__(self) -> _Tending:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def latency(job: Job) -> Measured:
    """Percentiles of "put" or "get", idle or busy. The cost is the 99th, in microseconds."""
    busy = job.how.tended
    with opened(job) as store:
        puts = job.options["operation"] == "put"
        call: Any = store.putter() if puts else store.getter(stable=not busy)
        arguments: list[Any] = [pair if puts else pair[:1] for pair in job.pairs(50_000 if not puts else 10_000)]
        if not puts:
            for number in range(job.keys):
                call(key(number))
        settle()
        if not busy:
            samples = _idle(job, call, arguments)
            note = ""
        else:
            with _Tending(job, store) as tending:
                samples = _busy(job, call, arguments, tending)
            if tending.failure is not None:
                raise tending.failure
            note = f"{tending.rounds} rounds of tending"
    if len(samples) < 100:
        raise AssertionError(f"only {len(samples)} operations fell into the time that was to be measured")
    ordered = sorted(samples)
    percentiles = {name: ordered[int(part * (len(ordered) - 1))] / 1e3 for name, part in PERCENTILES.items()}
    percentiles["max"] = ordered[-1] / 1e3
    return Measured(
        percentiles["p99"],
        len(samples),
        sum(samples) / 1e9,
        note=note,
        extra={"percentiles_us": percentiles},
        settings=store.settings,
    )


def _idle(job: Job, call: Any, arguments: list[Any]) -> array[int]:
    samples = array("q")
    note, clock = samples.append, perf_counter_ns
    deadline = clock() + int(job.seconds * 1e9)
    for argument in cycle(arguments):
        begun = clock()
        call(*argument)
        ended = clock()
        note(ended - begun)
        if (ended > deadline and len(samples) >= _LEAST_SAMPLES) or len(samples) >= _MOST_SAMPLES:
            break
    return samples


def _busy(job: Job, call: Any, arguments: list[Any], tending: _Tending) -> array[int]:
    samples = array("q")
    note, clock = samples.append, perf_counter_ns
    counted, wanted = 0, int(job.seconds * 1e9)
    # A peer that hardly ever tends itself must end too.
    give_up = perf_counter() + 20 * job.seconds + 10
    for argument in cycle(arguments):
        before = tending.busy
        begun = clock()
        call(*argument)
        ended = clock()
        if before and tending.busy:
            note(ended - begun)
            counted += ended - begun
            if (counted > wanted and len(samples) >= _LEAST_SAMPLES) or len(samples) >= _MOST_SAMPLES:
                break
        elif tending.failure is not None or perf_counter() > give_up:
            break
    return samples
