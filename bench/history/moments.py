"""The memory of a process that has many past moments open at once, all over a long window."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import kvwal
from bench.data import key
from bench.history.filling import KEEP, MIB, grow, load
from bench.memory import memory_mib, peak_mib
from bench.parts import Line, Setting, fresh

__all__ = ["moments"]

_GETS: Final = 10
_SCANNED: Final = 100
_BUDGET_MIB: Final = 64 + 64 + 64
_SETTINGS: Final[Any] = {**KEEP, "history_base_bytes": 16 * MIB}


class _Memory(NamedTuple):
    bases: int
    before: int
    opened: int
    read: int
    written: int


def moments(setting: Setting) -> list[Line]:
    """Opened, and read: some keys and a short scan of each. Then with commits meanwhile."""
    sizes = setting.sizes
    path = setting.directory / "store"
    load(path, sizes.keys)
    with kvwal.open(path, **_SETTINGS) as db:
        grow(db, sizes.keys, sizes.window * MIB, setting.say)
    setting.say(f"opening {sizes.moments:,} moments")
    found = fresh(_measured, path, sizes.keys, sizes.moments)
    title = Line(f"{sizes.moments:,} moments, {sizes.window:,} MiB of log, {found.bases} bases", "")
    aim = f"at most {_BUDGET_MIB} MiB"
    return [
        title,
        Line("resident before", f"{found.before} MiB"),
        Line("at most, when all were opened", f"{found.opened} MiB"),
        Line("at most, when all were read", f"{found.read} MiB", aim, found.read <= _BUDGET_MIB),
        Line("at most, with 64 MiB of commits meanwhile", f"{found.written} MiB"),
    ]


def _measured(path: Path, keys: int, count: int) -> _Memory:
    random = Random(3)
    with kvwal.open(path, **_SETTINGS) as db:
        before = memory_mib()
        window = db.window
        step = (window.newest - window.oldest) / count
        opened = [db.snapshot(at=window.oldest + int(n * step)) for n in range(count)]
        after_opening = peak_mib()
        _read(opened, keys, random)
        after_reading = peak_mib()
        grow(db, keys, 64 * MIB, lambda _: None, seed=9)
        _read(opened, keys, random)
        for each in opened:
            each.close()
        return _Memory(window.bases, before, after_opening, after_reading, peak_mib())


def _read(opened: list[kvwal.Snapshot], keys: int, random: Random) -> None:
    for snapshot in opened:
        for _ in range(_GETS):
            snapshot.get(key(random.randrange(keys)))
        for _ in islice(snapshot.items(key(random.randrange(keys))), _SCANNED):
            pass
