"""An older commit as a peer: built, run with today's loops, and shown beside today."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.against import AgainstError, Older, built
from bench.plan import Scale, cases
from bench.results import Results, ratio_to
from bench.run import Runner
from bench.show import show_against

# Another layout, no `memtable_bytes`, no `scan`, and nothing of today's but the public names.
OLD = """
import os

class Rows(dict):
    def put(self, key, value):
        self[key] = value
    def close(self):
        pass

def open(path, *, durability="commit", cache_bytes=0):
    os.makedirs(path, exist_ok=True)
    return Rows()
"""
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "kvwal"
version = "0.0.7"
[tool.setuptools]
packages = ["kvwal"]
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    (root / "kvwal").mkdir()
    (root / "kvwal" / "__init__.py").write_text("from kvwal.elsewhere import open\n")
    (root / "kvwal" / "elsewhere.py").write_text(OLD)
    (root / "pyproject.toml").write_text(PROJECT)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "rows: in a dict"], check=True)
    (root / "kvwal" / "elsewhere.py").write_text("raise SystemExit('not this one')\n")
    return root


@pytest.fixture(scope="module")
def older(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Older]:
    with built("HEAD", str(tmp_path_factory.mktemp("built")), str(repository)) as found:
        yield found


def test_the_commit_is_built_and_not_the_files_at_hand(older: Older) -> None:
    assert older.name == f"kvwal@{older.version.split()[0]}"
    assert older.version.endswith(": rows: in a dict")


def test_an_unknown_revision_is_said(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(AgainstError, match="no such commit"), built("nowhere", str(tmp_path), str(repository)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_commit_that_does_not_install_is_said(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "nothing"], check=True)
    with pytest.raises(AgainstError, match="install"), built("HEAD", str(tmp_path), str(tmp_path)):
        pass


def test_it_runs_next_to_today_and_what_it_lacks_is_said(older: Older, tmp_path: Path) -> None:
    scale = Scale(keys=200, big=2000, load=200, rounds=2, seconds=0.01)
    runner = Runner(str(tmp_path), scale, ("kvwal", "sqlite3"), {older.name: older})
    steps: list[str] = []
    by_id = {case.id: case for case in cases(scale)}
    found: dict[str, Any] = runner.run(by_id["put.os.1"], steps.append)
    assert steps == ["kvwal", older.name, "sqlite3", older.name, "sqlite3", "kvwal"]
    assert len(found["peers"][older.name]["rounds"]) == 2
    assert found["peers"][older.name]["settings"]["memtable_bytes"] == "no such option"
    scanned = runner.run(by_id["scan.full"], steps.append)
    assert scanned["peers"][older.name] == {"not_offered": "no scan"}


def results(then: list[float], now: list[float]) -> Results:
    found = Results()
    found.data["versions"] = {"kvwal": "today", "kvwal@abc": "abc of yesterday"}
    peers = {"kvwal@abc": then, "kvwal": now}
    rounds = {name: {"rounds": [{"cost": one, "extra": {}} for one in costs]} for name, costs in peers.items()}
    found.cases["put.os.1"] = {"unit": "us", "peers": rounds}
    return found


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ([2.0, 3.0, 2.0, 1.1, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0], "faster"),
        ([1.0, 1.0, 0.9, 1.0, 1.0], [2.0, 1.1, 2.0, 1.1, 1.1], "slower"),
        ([1.0, 1.0, 1.1, 1.0, 1.0], [2.0, 2.0, 1.0, 2.0, 2.0], ""),
        ([1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], ""),
    ],
)
def test_a_change_is_called_one_only_where_the_whole_spread_is(then: list[float], now: list[float], said: str) -> None:
    found = results(then, now)
    console = Console(width=150, record=True)
    show_against(console, found)
    text = console.export_text()
    assert "put.os.1" in text
    assert [word for word in ("faster", "slower") if word in text] == ([said] if said else [])


def test_the_ratio_is_taken_round_by_round() -> None:
    """The machine was ten times slower in the second round; both were."""
    found = ratio_to(results([2, 20, 2], [1, 10, 1]), "put.os.1", "kvwal@abc")
    assert found is not None
    assert found.figure.rounds == (2, 2, 2)


def test_what_was_not_measured_is_said() -> None:
    found = results([1.0], [1.0])
    found.cases["put.os.1"]["peers"]["kvwal@abc"] = {"not_offered": "no put"}
    console = Console(width=150, record=True)
    show_against(console, found)
    assert "no put" in console.export_text()
