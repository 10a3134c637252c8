"""Spreads the cases of a part over processes, adds up what they count, and notices one that hangs."""

from __future__ import annotations

import faulthandler
import gc
import math
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any, TypeVar

from crashtests.console import Progress, Result
from crashtests.explorer import Tally

T = TypeVar("T")

# A single case takes milliseconds, all those of one cut a few seconds.
_HANG_S = 240.0
# How often a worker says at most that it goes on.
_BEAT_S = 5.0
# How far a pattern is looked for: there are millions of bytes to flip.
_AHEAD = 50_000


@dataclass(frozen=True, slots=True)
class Run:
    """What a part is asked to do."""

    seed: int
    #: time.monotonic() at which to stop.
    deadline_s: float
    seconds: float
    jobs: int
    progress: Progress
    #: Stop at the first violation.
    stop_at_first: bool = False
    #: A case, or a pattern (as of fnmatch) of cases, to begin with.
    first: str = ""

    def over(self) -> bool:
        return time.monotonic() >= self.deadline_s


class Watchdog:
    """Ends the process, with the stacks of its threads, when it has not gone on for long."""

    def __init__(self) -> None:
        self._since_s = -math.inf

    def go_on(self) -> None:
        now_s = time.monotonic()
        if now_s - self._since_s >= _BEAT_S:
            self._since_s = now_s
            faulthandler.cancel_dump_traceback_later()
            faulthandler.dump_traceback_later(_HANG_S, exit=True)


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part of it: items whose number is `index` modulo `count`."""

    run: Run
    index: int
    count: int
    watchdog: Watchdog = field(default_factory=Watchdog)

    def over(self) -> bool:
        """Whether to stop. Called between the cases; a worker that does not call it for minutes counts as hanging."""
        self.watchdog.go_on()
        return self.run.over()

    def mine(self, items: Iterator[Any]) -> Iterator[Any]:
        return (item for number, item in enumerate(items) if number % self.count == self.index)


def beginning(first: str, items: Callable[[], Iterator[T]], name: Callable[[T], str]) -> Iterator[T]:
    """Those among the next items whose name matches the pattern, then all of them."""
    if first:
        yield from (item for item in islice(items(), _AHEAD) if fnmatchcase(name(item), first))
    yield from items()


Work = Callable[[Share], Iterator[Tally]]
"""Does its share and yields what it counted since the last yield, at least every few seconds."""


def spread(part: str, work: Work, run: Run) -> Result:
    """Run `work` in `run.jobs` processes."""
    started_s = time.monotonic()
    result = Result(part)
    channel: multiprocessing.Queue[Any] = multiprocessing.get_context("fork").Queue()
    workers = [
        multiprocessing.get_context("fork").Process(
            target=_worker, args=(work, Share(run, index, run.jobs), channel), daemon=True
        )
        for index in range(run.jobs)
    ]
    for worker in workers:
        worker.start()
    running = len(workers)
    while running:
        try:
            message = channel.get(timeout=1.0)
        except queue.Empty:
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if dead:
                result.violations.append(
                    f"a worker died with exit code {dead[0].exitcode} (see above); it hung or crashed"
                )
                running -= len(dead)
                workers = [worker for worker in workers if worker not in dead]
            continue
        if message is None:
            running -= 1
        elif isinstance(message, str):
            result.violations.append(message)
        else:
            result.take(message)
        elapsed_s = time.monotonic() - started_s
        run.progress.show(part, elapsed_s / max(run.seconds, 0.1), result.states, elapsed_s, len(result.violations))
        if run.stop_at_first and result.violations:
            break
    for worker in workers:
        worker.terminate() if running else worker.join()
    run.progress.clear()
    result.seconds = time.monotonic() - started_s
    return result


def _worker(work: Work, share: Share, channel: multiprocessing.Queue[Any]) -> None:
    # The stores that are left behind are cycles: collect them in larger portions.
    gc.set_threshold(50_000, 20, 20)
    share.watchdog.go_on()
    try:
        for tally in work(share):
            channel.put(tally)
            if share.over():
                break
    except BaseException:  # noqa: BLE001
        # A failure of the harness itself is no pass either.
        channel.put("the harness failed:\n" + traceback.format_exc())
    channel.put(None)
    channel.close()
    channel.join_thread()
    # Not the interpreter's own exit: it would close the abandoned stores.
    os._exit(0)
