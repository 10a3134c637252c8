"""Reads of a past moment beside the same reads of now, kvwal's and ZODB's.

The moment has some segments of log between its base and itself, and as many behind it, but at most four.

A cold get is one whose leaf is in the system's memory and not in the store's. The store was opened anew, in a process
of its own; other keys were read before, which brought in the inner pages; and no leaf is read twice. So each get makes
one read call for a page, checks the page, and searches it. A cold scan is the first one after the store was opened: it
reads and decodes every page. The cache has its default size. Of a past moment the heads of the key indexes are in
memory too (10 KiB a segment). ZODB loads a leaf when it is first asked for, and is measured with the same keys.

A tenth of the keys is as it was loaded: a get of these asks the index of every segment. Of the others most were changed
again and again, and one of the newest segments has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any, Final

import kvwal
from bench.data import key
from bench.history import zodb
from bench.history.filling import KEEP, SEGMENT_BYTES, grow, index_keys, load, unchanged
from bench.parts import Line, Setting, fresh, in_turns, ratios, spread
from bench.results import Figure

__all__ = ["reads"]

# Most segments of log behind the moment. ZODB's cost depends on these, kvwal's on those before it.
_BEHIND: Final = 4
_GETS: Final = 1000
# More keys than a leaf has, so that keys so far apart are not in the same one.
_LEAF_KEYS: Final = 64
_OPENINGS: Final = 100
_UNCHANGED: Final = "get of unchanged keys"
_UNITS: Final = {"get": (1e6, "us"), _UNCHANGED: (1e6, "us"), "scan": (1e3, "ms")}
_MOST: Final = 3


def reads(setting: Setting) -> list[Line]:
    """With as many segments as are asked for, and with ten times as many."""
    few = setting.sizes.segments
    lines: list[Line] = []
    why_not = zodb.missing()
    for segments in dict.fromkeys((few, few * setting.sizes.times)):
        directory = setting.directory / str(segments)
        # Ten times as many changes would take hours there, and a file of 20 GB.
        with_peer = why_not is None and segments == few
        lines += _with(setting, directory, segments, with_peer=with_peer)
    if why_not is not None:
        lines.append(Line(why_not, "-"))
    return lines


def _with(setting: Setting, directory: Path, segments: int, *, with_peer: bool) -> list[Line]:
    keys, say = setting.sizes.keys, setting.say
    directory.mkdir()
    load(directory / "kvwal", keys)
    with kvwal.open(directory / "kvwal", **KEEP) as db:
        before = grow(db, keys, segments * SEGMENT_BYTES, say)
        at = db.last_seqno
        behind = grow(db, keys, min(segments, _BEHIND) * SEGMENT_BYTES, say, seed=2)
        say("indexing")
        index_keys(db)
        db.checkpoint()
        assert db.window.bases == 1
    sides: dict[str, tuple[Callable[..., float], Path, Any]] = {"kvwal": (_of_kvwal, directory / "kvwal", at)}
    if with_peer:
        moment = zodb.fill(directory / "ZODB", keys, before, behind, say)
        sides["ZODB"] = _of_zodb, directory / "ZODB", moment
    measures = {
        f"{name} {what} {when}": partial(fresh, measure, path, moment if when == "past" else None, keys, what)
        for name, (measure, path, moment) in sides.items()
        for what in _UNITS
        for when in ("now", "past")
    }
    measures["kvwal open past"] = partial(fresh, _of_kvwal, directory / "kvwal", at, keys, "open")
    found = in_turns(measures, setting)
    title = Line(f"{before:,} commits between base and moment: {segments} segments", "")
    return [title, *_lines(found, list(sides), judged=segments == setting.sizes.segments), _opening(segments, found)]


def _lines(found: dict[str, list[float]], names: list[str], *, judged: bool) -> list[Line]:
    lines = []
    for what, (scale, unit) in _UNITS.items():
        for name in names:
            for when in ("now", "past"):
                costs = Figure(tuple(each * scale for each in found[f"{name} {what} {when}"]))
                lines.append(Line(f"{name}, {what} {when}", spread(costs, f" {unit}")))
            ratio = ratios(found[f"{name} {what} past"], found[f"{name} {what} now"])
            aim, met = (f"at most {_MOST}x", ratio.median <= _MOST) if name == "kvwal" and judged else ("", None)
            lines.append(Line(f"{name}, {what}: past / now", spread(ratio), aim, met))
        if "ZODB" in names:
            for when in ("now", "past"):
                ratio = ratios(found[f"ZODB {what} {when}"], found[f"kvwal {what} {when}"])
                lines.append(Line(f"ZODB / kvwal, {what} {when}", spread(ratio)))
    return lines


def _opening(segments: int, found: dict[str, list[float]]) -> Line:
    opening = Figure(tuple(each * 1e3 for each in found["kvwal open past"]))
    most_ms = 5 + 0.2 * segments
    aim = f"at most {most_ms:g} ms"
    return Line("opening a past moment", spread(opening, " ms"), aim, opening.median <= most_ms)


def _of_kvwal(path: Path, at: int | None, keys: int, what: str) -> float:
    with kvwal.open(path, "r") as db:
        if what == "open":
            began_s = perf_counter()
            for _ in range(_OPENINGS):
                db.snapshot(at=at).close()
            return (perf_counter() - began_s) / _OPENINGS
        with db.snapshot(at=at) as snapshot:
            index_keys(db)
            return _read(snapshot, keys, what)


def _of_zodb(path: Path, at: bytes | None, keys: int, what: str) -> float:
    with zodb.opened(path, at) as tree:
        return _read(tree, keys, what)


def _read(source: Any, keys: int, what: str) -> float:
    if what == "scan":
        began_s = perf_counter()
        count = sum(1 for _ in source.items())
        spent_s = perf_counter() - began_s
        assert count == keys
        return spent_s
    apart = max(2 * _LEAF_KEYS, keys // _GETS)
    in_order = sorted(map(key, range(keys)))
    others, wanted = in_order[:: 5 * apart], in_order[_LEAF_KEYS::apart]
    if what == _UNCHANGED:
        same = unchanged(keys)
        wanted = [
            one
            for first in range(_LEAF_KEYS, keys - _LEAF_KEYS, apart)
            if (one := _first(in_order[first : first + _LEAF_KEYS], same))
        ]
    Random(2).shuffle(wanted)
    get = source.get
    for each in others:
        get(each)
    began_s = perf_counter()
    for each in wanted:
        get(each)
    return (perf_counter() - began_s) / len(wanted)


def _first(some: list[bytes], of: set[bytes]) -> bytes | None:
    return next((each for each in some if each in of), None)
