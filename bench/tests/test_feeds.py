"""The run of many subscribers, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import feeds


def test_each_subscriber_is_told_of_each_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--commits", "3000", "--writers", "3", "--subscribers", "3", "--rest", "500", "--dir", str(tmp_path)]
    assert feeds.main(arguments) == 0
    assert "3,000 commits, 3 writers, 3 subscribers" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
