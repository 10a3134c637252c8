"""The part of `python -m bench.table_indexes`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import table_indexes


def test_it_compares_puts_with_and_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rounds", "1", "--durable", "10", "--puts", "200"]
    assert table_indexes.main([*sizes, "--width", "160", "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert 'put at "commit": with an index / without' in said
    assert "kvwal / SQLite, with an index" in said
    assert list(tmp_path.iterdir()) == []
