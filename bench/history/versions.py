"""The ten versions of a key in a long log, each in a segment of its own among many."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final, NamedTuple

import kvwal
from bench.history.filling import KEEP, MIB, SEGMENT_BYTES, grow, index_keys, load
from bench.memory import reads
from bench.parts import Line, Setting, fresh, spread
from bench.results import Figure

__all__ = ["versions"]

_VERSIONS: Final = 10
# Keys that have so many versions, so that one can be asked for of which nothing is in memory.
_KEYS: Final = 21


class _Found(NamedTuple):
    first_s: float
    others_s: list[float]
    reads: list[int]
    again_s: float


def versions(setting: Setting) -> list[Line]:
    """Time and reads: of a first key, of others when the heads of the indexes are in memory, and of one again."""
    segments = setting.sizes.log
    path, keys = setting.directory / "store", setting.sizes.keys
    load(path, keys)
    with kvwal.open(path, **KEEP) as db:
        for number in range(_VERSIONS):
            setting.say(f"version {number + 1} of {_VERSIONS}")
            for each in range(_KEYS):
                db.put(b"watched %d" % each, b"version %d" % number)
            grow(db, keys, segments * SEGMENT_BYTES // _VERSIONS, setting.say, seed=number + 1)
        setting.say("indexing")
        index_keys(db)
        made = sum(1 for each in path.iterdir() if each.suffix == ".log")
    found = [fresh(_measured, path) for _ in range(setting.rounds)]
    title = Line(f"{_VERSIONS} versions among {made} segments, {segments * SEGMENT_BYTES // MIB:,} MiB", "")
    warm = Figure(tuple(median(each.others_s) * 1e3 for each in found))
    calls = Figure(tuple(median(each.reads) for each in found))
    first = Figure(tuple(each.first_s * 1e3 for each in found))
    again = Figure(tuple(each.again_s * 1e3 for each in found))
    most_reads = 2 * made
    return [
        title,
        Line(
            "another key, heads of the indexes in memory",
            spread(warm, " ms"),
            "at most 20 ms",
            warm.median <= 20,
        ),
        Line("read calls of it", spread(calls, ""), f"at most {most_reads}", calls.median <= most_reads),
        Line("the first key of all", spread(first, " ms")),
        Line("the same key again", spread(again, " ms")),
    ]


def _measured(path: Path) -> _Found:
    with kvwal.open(path, **_options()) as db:
        times, calls = [], []
        for number in range(_KEYS):
            # Asking how many there were is some itself.
            before, began = reads(), reads()
            began_s = perf_counter()
            _ask(db, number)
            times.append(perf_counter() - began_s)
            calls.append(reads() - began - (began - before))
        began_s = perf_counter()
        _ask(db, _KEYS - 1)
        return _Found(times[0], times[1:], calls[1:], perf_counter() - began_s)


def _options() -> Any:
    return {**KEEP, "background": False}


def _ask(db: kvwal.Store, number: int) -> None:
    found = [version.value for version in db.versions(b"watched %d" % number, reverse=False)]
    assert found == [b"version %d" % each for each in range(_VERSIONS)]
