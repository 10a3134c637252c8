"""Puts with the window that is there by default, and without one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import kvwal
from bench.data import key
from bench.parts import Line, Setting, fresh, in_turns, ratios, spread

__all__ = ["puts"]


def puts(setting: Setting) -> list[Line]:
    """Durable ones, and others."""
    lines = []
    for durability, count, most in (("commit", setting.sizes.durable, 1.05), ("os", setting.sizes.puts, None)):
        measures = {
            name: partial(fresh, _put, setting.directory / "store", durability, count, options)
            for name, options in (("with", {}), ("without", {"keep_history_bytes": 0}))
        }
        found = in_turns(measures, setting)
        for i, what in enumerate(("time", "processor time")):
            ratio = ratios([each[i] for each in found["with"]], [each[i] for each in found["without"]])
            aim, met = (f"at most {most}x", ratio.median <= most) if most and not i else ("", None)
            lines.append(Line(f'put at "{durability}", {what}: with a window / without', spread(ratio), aim, met))
    return lines


def _put(path: Path, durability: Any, count: int, options: Any) -> tuple[float, float]:
    value = bytes(100)
    with kvwal.open(path, "n", durability=durability, **options) as db:
        began_s, began_cpu_s = perf_counter(), process_time()
        for number in range(count):
            db.put(key(number * 7919 % count), value)
        return (perf_counter() - began_s) / count, (process_time() - began_cpu_s) / count
