"""Options: named once for checkers and once with defaults, and each held to its limits."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import kvwal
import kvwal.aio
from kvwal.engine.create import log_options
from kvwal.log import LogOptions
from kvwal.options import MAX_SEGMENT_BYTES, MIN_SEGMENT_BYTES, OpenOptions, Options
from kvwal.testing import SimulatedDisk


def test_what_checkers_know_is_what_can_be_set() -> None:
    assert ["mode", *OpenOptions.__annotations__] == [option.name for option in fields(Options)]
    described = [line.split(":")[0].strip() for line in inspect.getdoc(OpenOptions).split("\n\n", 2)[2].splitlines()]
    assert [name for name in described if name in OpenOptions.__annotations__] == list(OpenOptions.__annotations__)


@pytest.mark.parametrize("function", [kvwal.open, kvwal.aio.open])
def test_the_signature_shows_each_option_with_its_default(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    for option in fields(Options):
        assert parameters[option.name].default == (None if option.name == "files" else option.default)
        assert parameters[option.name].kind is inspect.Parameter.KEYWORD_ONLY or option.name == "mode"
    assert "options" not in parameters
    assert list(parameters)[:3] == ["path", "flag", "mode"]
    assert parameters["mode"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


class Index:
    """What NumPy's integers are to `operator.index`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("mode", 0, 0o7777),
        ("cache_bytes", 256 << 10, None),
        ("memtable_bytes", 16 << 10, None),
        ("segment_bytes", MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES),
        ("checkpoint_log_bytes", 4 << 10, None),
        ("keep_history_bytes", 0, None),
        ("history_base_bytes", 0, None),
    ],
)
def test_a_size_is_an_integer_within_its_limits(name: str, least: int, most: int | None) -> None:
    for value in [least] if most is None else [least, most]:
        found = getattr(Options(**{name: Index(value)}), name)  # type: ignore[arg-type]
        assert (found, type(found)) == (value, int)
    for value in [least - 1] if most is None else [least - 1, most + 1]:
        with pytest.raises(ValueError, match=name):
            Options(**{name: value})  # type: ignore[arg-type]
    for wrong in (True, 1e9, "64", None):
        if wrong is None and name == "keep_history_bytes":
            continue  # It is the default.
        with pytest.raises(TypeError, match=name):
            Options(**{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sync_delay_s", "checkpoint_interval_s", "keep_history_s"])
def test_a_time_is_a_number_from_zero_on(name: str) -> None:
    for value in (0, 0.5, math.inf, Fraction(1, 2)):
        found = getattr(Options(**{name: value}), name)  # type: ignore[arg-type]
        assert (found, type(found)) == (value, float)
    for value in (-1, -0.5, math.nan):
        with pytest.raises(ValueError, match=name):
            Options(**{name: value})  # type: ignore[arg-type]
    for wrong in (True, "1", None, 1j):
        with pytest.raises(TypeError, match=name):
            Options(**{name: wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("durability", "never", ValueError),
        ("durability", ["commit"], ValueError),
        ("preallocate", "no", ValueError),
        ("background", 1, TypeError),
        ("cache_byte", 1 << 20, TypeError),
    ],
)
def test_what_cannot_be_right_is_refused_before_anything_is_made(
    tmp_path: Path, name: str, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match=name):
        kvwal.open(tmp_path / "a.kv", **{name: value})
    assert list(tmp_path.iterdir()) == []


def test_no_file_system_means_the_systems(tmp_path: Path) -> None:
    kvwal.open(tmp_path / "a.kv", files=None).close()  # type: ignore[arg-type]
    disk = SimulatedDisk()
    assert Options(files=disk).files is disk
    kvwal.open(tmp_path / "a.kv", "w").close()


def test_the_log_is_told_what_is_its_own() -> None:
    options = Options(segment_bytes=1 << 20, preallocate="zeros", mode=0o640)
    assert log_options(options) == LogOptions(1 << 20, "zeros", 0o640)
    assert options.directory_mode == 0o750


@pytest.mark.parametrize(
    ("durability", "background", "flushed"),
    [
        ("commit", True, {"commit"}),
        ("interval", True, {"commit"}),
        # Nothing would flush it later.
        ("os", True, {"commit", "interval"}),
        ("commit", False, {"commit", "interval"}),
        ("interval", False, {"commit", "interval"}),
        ("os", False, {"commit", "interval"}),
    ],
)
def test_a_commit_is_flushed_at_once_unless_it_may_wait(durability: Any, background: bool, flushed: set[str]) -> None:
    names: tuple[Any, ...] = ("commit", "interval", "os")
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, durability=durability, background=background, sync_delay_s=1e9) as db:
        assert {name for name in names if db.engine.wants_sync(name)} == flushed
        for name in (None, *names):
            seqno = db.put(b"a", b"1", durability=name)
            assert db.durable_seqno == seqno or (name or durability) not in flushed
        with pytest.raises(ValueError, match="durability is 'commit', 'interval' or 'os', not 'never'"):
            db.put(b"a", b"1", durability="never")  # type: ignore[arg-type]
