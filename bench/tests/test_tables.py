"""The parts of `python -m bench.tables`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import tables
from bench.typed import maps, rows

SMALL = {"rows": ["--rows", "50"], "counter": ["--threads", "3", "--adds", "5"]}


@pytest.mark.parametrize(
    ("part", "said"),
    [("rows", "put, time: table / raw store and codec"), ("counter", "durable add by 3 threads: SQLite / table")],
)
def test_each_part_runs(part: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", part, "--rounds", "1", "--width", "160", "--dir", str(tmp_path), *SMALL[part]]
    assert tables.main(arguments) == 0
    assert said in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_peer_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(maps, "require", require)
    assert maps.missing("sqlitedict") == "sqlitedict is left out: pip install sqlitedict"
    assert maps.missing("shelve") is None
    assert rows.missing is maps.missing
