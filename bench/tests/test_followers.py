"""The parts of `python -m bench.followers`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import followers


@pytest.mark.parametrize(
    ("part", "sizes", "said"),
    [
        ("stale", ["--commits", "200"], "with a pin: p99, ms"),
        ("puts", ["--puts", "2000", "--durable", "100"], "a durable put, with 64, to none"),
        ("reads", ["--keys", "4000"], "hot get: follower / writer"),
        ("readers", ["--keys", "4000", "--seconds", "1"], "of two together, to two of SQLite"),
    ],
)
def test_each_part_runs(
    part: str, sizes: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--only", part, "--rounds", "1", "--width", "160", "--dir", str(tmp_path), *sizes]
    assert followers.main(arguments) == 0
    assert said in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
