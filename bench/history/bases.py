"""Checkpoints of a store that has few bases, and of one that has many: each writes the same changes."""

from __future__ import annotations

from random import Random
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final, NamedTuple

import kvwal
from bench.data import key
from bench.memory import written_bytes
from bench.parts import Line, Setting
from bench.show import number

__all__ = ["bases"]

_KEYS: Final = 2000
_CHANGED: Final = 100
_CHECKPOINTS: Final = 15
_FILLING: Final = bytes(256 << 10)
_SETTINGS: Final[Any] = {
    "durability": "os",
    "keep_history_bytes": 1 << 50,
    "history_base_bytes": 0,
    "segment_bytes": 512 << 10,
    "background": False,
    "checkpoint_log_bytes": 1 << 40,
}


class _Cost(NamedTuple):
    """Of one checkpoint: seconds by the clock and of the processor, and bytes given to write calls."""

    wall_s: float
    cpu_s: float
    written: int


def bases(setting: Setting) -> list[Line]:
    """With as few as there are after the first checkpoint, with a tenth of `bases`, and with `bases` of them."""
    most = setting.sizes.bases
    lines = []
    plain: list[_Cost] = []
    with kvwal.open(setting.directory / "store", **_SETTINGS) as db:
        random = Random(1)
        db.update({key(n): random.randbytes(100) for n in range(_KEYS)})
        db.checkpoint()
        for wanted in (1, most // 10, most):
            while (there := db.window.bases) < wanted:
                setting.say(f"{there:,} of {most:,} bases")
                _base(db, random)
            for makes_one, measure in ((False, _checkpoint), (True, _base)):
                there = db.window.bases
                cost = _median([measure(db, random) for _ in range(_CHECKPOINTS)])
                what = "that makes one more" if makes_one else "that makes none"
                text = f"{number(cost.wall_s * 1e3)} ms, {number(cost.cpu_s * 1e3)} ms of the processor, "
                lines.append(Line(f"{there:,} bases, a checkpoint {what}", f"{text}{cost.written / 1024:,.0f} KiB"))
                if not makes_one:
                    plain.append(cost)
    for what, of in (("time", 0), ("processor time", 1), ("bytes written", 2)):
        ratio = plain[-1][of] / plain[0][of]
        lines.append(
            Line(
                f"{what}, none made: with {most:,} bases / with the fewest",
                f"{ratio:.2f}x",
                "flat (at most 1.5x)",
                ratio <= 1.5,
            )
        )
    return lines


def _checkpoint(db: kvwal.Store, random: Random) -> _Cost:
    for _ in range(_CHANGED):
        db.put(key(random.randrange(_KEYS)), random.randbytes(100))
    began_bytes, began_cpu_s, began_s = written_bytes(), process_time(), perf_counter()
    db.checkpoint()
    return _Cost(perf_counter() - began_s, process_time() - began_cpu_s, written_bytes() - began_bytes)


def _base(db: kvwal.Store, random: Random) -> _Cost:
    """As much log as lies between two bases, of a key that is not there when the checkpoint comes; and that."""
    there = db.window.bases
    while True:
        db.put(b"filling", _FILLING)
        db.put(b"filling", _FILLING)
        db.delete(b"filling")
        cost = _checkpoint(db, random)
        if db.window.bases > there:
            return cost


def _median(costs: list[_Cost]) -> _Cost:
    return _Cost(*(median(each) for each in zip(*costs, strict=True)))  # type: ignore[arg-type]
