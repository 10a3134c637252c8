"""The parts of `python -m bench.past`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import past
from bench.history import zodb

SMALL = {
    "reads": ["--keys", "3000", "--segments", "1", "--times", "1"],
    "puts": ["--durable", "20", "--puts", "200"],
    "versions": ["--keys", "3000", "--log", "1"],
    "sealing": ["--keys", "3000", "--sealed", "1"],
    "bases": ["--bases", "30"],
    "moments": ["--keys", "3000", "--window", "2", "--moments", "20"],
}


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("reads", "kvwal, scan: past / now"),
        ("puts", "processor time: with a window / without"),
        ("versions", "10 versions among"),
        ("sealing", "longest step, by the clock"),
        ("bases", "bytes written, when it makes none"),
        ("moments", "20 moments, 2 MiB of log"),
    ],
)
def test_each_part_runs(part: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", part, "--rounds", "1", "--width", "160", "--dir", str(tmp_path), *SMALL[part]]
    assert past.main(arguments) == 0
    assert said in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_zodb_is_left_out_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def require(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(zodb, "require", require)
    assert zodb.missing() == "ZODB is left out: pip install ZODB"
