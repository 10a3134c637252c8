"""A table of str to JSON: get, put and scan, beside the raw store and the codec's own time, and beside peers."""

from __future__ import annotations

from collections import deque
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final

from bench.parts import Line, Setting, fresh, in_turns, ratios, spread
from bench.typed.maps import MAPS, RAW, missing, opened, value_of
from kvwal import codecs

__all__ = ["rows"]

_WHATS: Final = ("get", "put", "scan")
_MOST: Final = 1.6
_CODEC: Final = "codec"


def rows(setting: Setting) -> list[Line]:
    """The three, for each map."""
    left_out = {name: reason for name in MAPS if (reason := missing(name)) is not None}
    names = [name for name in (*MAPS, _CODEC) if name not in left_out]
    count = setting.sizes.rows
    lines = [Line(name, reason) for name, reason in left_out.items()]
    for what in _WHATS:
        measures = {name: partial(fresh, _measured, setting.directory / what, name, what, count) for name in names}
        found = in_turns(measures, setting)
        for i, unit in enumerate(("time", "processor time")):
            of = {name: [each[i] for each in costs] for name, costs in found.items()}
            bare = [raw + codec for raw, codec in zip(of[RAW], of[_CODEC], strict=True)]
            ratio = ratios(of["kvwal"], bare)
            aim = f"at most {_MOST}x" if not i else ""
            met = None if i else ratio.median <= _MOST
            lines.append(Line(f"{what}, {unit}: table / raw store and codec", spread(ratio), aim, met))
            lines.append(Line(f"{what}, {unit}: table", f"{median(of['kvwal']) * 1e6:.2f} us"))
            for name in names:
                if name in ("kvwal", RAW, _CODEC):
                    continue
                ratio = ratios(of[name], of["kvwal"])
                aim, met = ("above 1x", ratio.median > 1) if not i else ("", None)
                lines.append(Line(f"{what}, {unit}: {name} / table", spread(ratio), aim, met))
    return lines


def _measured(path: Path, name: str, what: str, count: int) -> tuple[float, float]:
    """Seconds, and seconds of the processor, for one key."""
    keys = [f"customer/{number * 7919 % count:08d}" for number in range(count)]
    values = [value_of(number) for number in range(count)]
    if name == _CODEC:
        return _codec(what, keys, values)
    path = path / f"{name}-{Random().randrange(1 << 40)}"
    path.mkdir(parents=True)
    pairs: list[tuple[Any, Any]] = list(zip(keys, values, strict=True))
    if name == RAW:
        json = codecs.json()
        pairs = [(key.encode(), json.encode(value)) for key, value in pairs]
    with opened(name, path) as found:
        if what != "put":
            for key, value in pairs:
                found[key] = value
        if what == "get":
            Random(1).shuffle(pairs)
        began_s, began_cpu_s = perf_counter(), process_time()
        if what == "put":
            for key, value in pairs:
                found[key] = value
        elif what == "get":
            for key, _ in pairs:
                found[key]
        elif name == "diskcache":
            # It has no pairs.
            deque(((key, found[key]) for key in found), maxlen=0)
        else:
            deque(found.items(), maxlen=0)
        return (perf_counter() - began_s) / count, (process_time() - began_cpu_s) / count


def _codec(what: str, keys: list[str], values: list[Any]) -> tuple[float, float]:
    """What encoding and decoding takes by itself."""
    key, value = codecs.key_codec(str), codecs.json()
    names, data = [key.encode(each) for each in keys], [value.encode(each) for each in values]
    began_s, began_cpu_s = perf_counter(), process_time()
    if what == "put":
        for name, each in zip(keys, values, strict=True):
            key.encode(name)
            value.encode(each)
    elif what == "get":
        for name, each_data in zip(keys, data, strict=True):
            key.encode(name)
            value.decode(each_data)
    else:
        for encoded, each_data in zip(names, data, strict=True):
            key.decode(encoded)
            value.decode(each_data)
    return (perf_counter() - began_s) / len(keys), (process_time() - began_cpu_s) / len(keys)
