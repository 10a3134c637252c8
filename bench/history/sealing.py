"""Making the key index of a sealed segment of small commits: its steps one by one, and all of it from outside."""

from __future__ import annotations

from pathlib import Path
from time import monotonic, perf_counter, process_time, sleep, thread_time
from typing import Any, NamedTuple

import kvwal
from bench.history.filling import KEEP, MIB, SEGMENT_BYTES, grow
from bench.parts import Line, Setting, fresh, spread
from bench.results import Figure
from bench.show import number

__all__ = ["sealing"]


class _Steps(NamedTuple):
    """Seconds of the processor: all steps, their 99.9th percentile, the longest. By the clock: the longest."""

    all_s: float
    late_s: float
    longest_s: float
    longest_wall_s: float
    count: int


def sealing(setting: Setting) -> list[Line]:
    """Processor time, and how long the steps are."""
    path = setting.directory / "store"
    with kvwal.open(path, **KEEP, background=False) as db:
        grow(db, setting.sizes.keys, setting.sizes.sealed * SEGMENT_BYTES, setting.say)
    sealed = sorted(path.glob("*.log"))[:-1]
    mib = sum(each.stat().st_size for each in sealed) / MIB
    steps, outside = [], []
    for turn in range(setting.rounds):
        setting.say(f"round {turn + 1} of {setting.rounds}")
        _without_indexes(path)
        steps.append(fresh(_in_steps, path))
        _without_indexes(path)
        outside.append(fresh(_from_outside, path, len(sealed)))
    cost = Figure(tuple(each.all_s * 1e3 / mib for each in steps))
    whole = Figure(tuple(each * 1e3 / mib for each in outside))
    late = Figure(tuple(each.late_s * 1e3 for each in steps))
    longest = Figure(tuple(each.longest_s * 1e3 for each in steps))
    wall = Figure(tuple(each.longest_wall_s * 1e3 for each in steps))
    title = Line(f"{len(sealed)} segments, {number(mib)} MiB", "")
    return [
        title,
        Line("processor time of the steps, a MiB", spread(cost, " ms"), "at most 25 ms", cost.median <= 25),
        Line("of a process whose background thread makes them, a MiB", spread(whole, " ms")),
        Line(f"p99.9 of {steps[0].count:,} steps, processor time", spread(late, " ms")),
        Line("longest step, processor time", spread(longest, " ms"), "at most 0.5 ms", longest.median <= 0.5),
        Line("longest step, by the clock", spread(wall, " ms")),
    ]


def _without_indexes(path: Path) -> None:
    for each in path.glob("*.keys"):
        each.unlink()


def _in_steps(path: Path) -> _Steps:
    with kvwal.open(path, **KEEP, background=False) as db:
        # No call does it step by step.
        log: Any = db.engine._log
        costs, walls = [], []
        steps = log.key_history.make_indexes()
        went_on = True
        while went_on:
            began_s, began_cpu_s = perf_counter(), thread_time()
            went_on = next(steps, steps) is not steps
            costs.append(thread_time() - began_cpu_s)
            walls.append(perf_counter() - began_s)
    ordered = sorted(costs)
    return _Steps(sum(costs), ordered[int(0.999 * (len(ordered) - 1))], ordered[-1], max(walls), len(costs))


def _from_outside(path: Path, sealed: int) -> float:
    with kvwal.open(path, **KEEP) as db:
        began_cpu_s = process_time()
        # It wakes the background thread, which makes indexes as long as no other job is due.
        db.put(b"key", b"value")
        give_up_s = monotonic() + 600
        while sum(1 for _ in path.glob("*.keys")) < sealed:
            assert monotonic() < give_up_s
            sleep(0.05)
        return process_time() - began_cpu_s
