"""The parts of `python -m bench.recorders`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import recorders


@pytest.mark.parametrize("part", ["threads", "one", "log", "aggregates", "again"])
def test_each_part_runs(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--events", "320", "--log", "1000", "--rounds", "1", "--width", "160", "--dir", str(tmp_path)]
    assert recorders.main(["--only", part, *sizes]) == 0
    assert "SQLite / kvwal" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
