"""Checkpoints of a store that has few bases, and of one that has many: each writes the same changes.

A store of its own accord makes a base when five times its pages were written to the log, which would be tens of GB for
a thousand of them. Here that distance is set: nothing, or more than there will ever be. The log's files are as small as
there may be, so that there is one for each base at least.
"""

from __future__ import annotations

from random import Random
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import kvwal
from bench.data import key
from bench.memory import written_bytes
from bench.parts import Line, Setting
from bench.show import number
from kvwal.engine import keeping

__all__ = ["bases"]

_KEYS: Final = 20_000
_CHANGED: Final = 100
_CHECKPOINTS: Final = 15
_SETTINGS: Final[Any] = {
    "durability": "os",
    "keep_history_bytes": 1 << 50,
    "history_base_bytes": 0,
    "segment_bytes": 16 << 10,
    "background": False,
    "checkpoint_log_bytes": 1 << 40,
}
# Bases are so many times the pages apart.
_MAKE_NONE: Final = patch.object(keeping, "_TREES", 1 << 40)
_MAKE_ONE: Final = patch.object(keeping, "_TREES", 0)


class _Cost(NamedTuple):
    """Of one checkpoint: seconds by the clock and of the processor, and bytes given to write calls."""

    wall_s: float
    cpu_s: float
    written: int


def bases(setting: Setting) -> list[Line]:
    """With as few as there are after the first checkpoint, with a tenth of `bases`, and with `bases` of them."""
    most = setting.sizes.bases
    lines = []
    costs: dict[str, list[tuple[int, _Cost]]] = {}
    with kvwal.open(setting.directory / "store", **_SETTINGS) as db:
        random = Random(1)
        db.update({key(n): random.randbytes(100) for n in range(_KEYS)})
        db.checkpoint()
        for wanted in (1, most // 10, most):
            with _MAKE_ONE:
                while (there := db.window.bases) < wanted:
                    setting.say(f"{there:,} of {most:,} bases")
                    _checkpoint(db, random)
            for what, making in (("none", _MAKE_NONE), ("one more", _MAKE_ONE)):
                there = db.window.bases
                with making:
                    cost = _median([_checkpoint(db, random) for _ in range(_CHECKPOINTS)])
                assert db.window.bases == there + (_CHECKPOINTS if making is _MAKE_ONE else 0)
                text = f"{number(cost.wall_s * 1e3)} ms, {number(cost.cpu_s * 1e3)} ms of the processor, "
                text += f"{cost.written / 1024:,.0f} KiB"
                lines.append(Line(f"{there:,} bases, a checkpoint that makes {what}", text))
                costs.setdefault(what, []).append((there, cost))
    for what, found in costs.items():
        (few, first), (many, last) = found[0], found[-1]
        for name, i in (("time", 0), ("processor time", 1), ("bytes written", 2)):
            ratio = last[i] / first[i]
            text = f"{name}, when it makes {what}: {many:,} bases / {few:,}"
            lines.append(Line(text, f"{ratio:.2f}x", "flat (at most 1.5x)", ratio <= 1.5))
    return lines


def _checkpoint(db: kvwal.Store, random: Random) -> _Cost:
    for _ in range(_CHANGED):
        db.put(key(random.randrange(_KEYS)), random.randbytes(100))
    began_bytes, began_cpu_s, began_s = written_bytes(), process_time(), perf_counter()
    db.checkpoint()
    return _Cost(perf_counter() - began_s, process_time() - began_cpu_s, written_bytes() - began_bytes)


def _median(costs: list[_Cost]) -> _Cost:
    return _Cost(*(median(each) for each in zip(*costs, strict=True)))  # type: ignore[arg-type]  # numbers
