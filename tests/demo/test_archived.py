"""The demo of the archived bank: that a small run agrees with itself, and that what could be wrong is noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import kvwal
from kvwal.demo import demo
from kvwal.demo.archived import Archived, archive_of
from kvwal.demo.killing import Plan, live
from kvwal.demo.promise import BrokenPromise


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Archived:
    """A bank of a life that was killed, and of one that came to its end."""
    bank = Archived(str(tmp_path_factory.mktemp("lived") / "bank.kv"), seed=4, kills=1)
    death = live(bank.arguments(last=False), Plan(80, 0.2), bank.heard)
    assert death.moment == "writing"
    with kvwal.open(bank.path, "r") as db:
        bank.check(db)
    assert live(bank.arguments(last=True), None, bank.heard).moment == "finished"
    return bank


@pytest.fixture
def bank(lived: Archived, tmp_path: Path) -> Archived:
    """A copy of it."""
    path = str(tmp_path / "bank.kv")
    shutil.copytree(lived.path, path)
    shutil.copytree(archive_of(lived.path), archive_of(path))
    return replace(lived, path=path, transfers=lived.transfers.copy())


def asked(bank: Archived) -> list[str]:
    with kvwal.open(bank.path, "r") as db:
        bank.check(db)
        return [line for answer in bank.answers(db) for line in answer.lines]


def test_what_is_printed_is_plain_in_a_pipe_and_proved(tmp_path: Path) -> None:
    path = str(tmp_path / "bank.kv")
    command = [sys.executable, "-m", "kvwal", "demo", "restore", "--kills", "1", "--seed", "2", "--path", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    assert "Proved with one kill" in result.stdout
    assert "6 restored banks held 24,000 each" in " ".join(result.stdout.split())
    assert "\x1b" not in result.stdout
    assert sorted(os.listdir(tmp_path)) == ["bank.kv", "bank.kv.archive"]


@pytest.mark.parametrize("taken", ["bank.kv", "bank.kv.archive", "bank.kv.restored"])
def test_what_is_there_already_is_refused(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).mkdir()
    result = CliRunner().invoke(demo, ["restore", "--path", str(tmp_path / "bank.kv")])
    assert result.exit_code == 2
    assert f"{taken} exists" in result.output


def test_what_was_restored_agrees(bank: Archived) -> None:
    lines = asked(bank)
    assert len([line for line in lines if "24,000 in all" in line]) == 6


def test_an_archive_behind_its_mark_is_noticed(bank: Archived) -> None:
    bank.mark += 1
    with pytest.raises(BrokenPromise, match=rf"the newest: commit {bank.mark - 1} was restored, not {bank.mark}"):
        asked(bank)


def test_an_archive_that_told_nothing_is_noticed(bank: Archived) -> None:
    bank.mark = 0
    with pytest.raises(BrokenPromise, match="no mark"):
        asked(bank)


def test_an_archive_of_other_transfers_is_noticed(bank: Archived) -> None:
    # As if this one had got lost on its way to the archive.
    with kvwal.open(bank.path, "w", **bank.options) as db, kvwal.archive(db, archive_of(bank.path)) as archive:
        db.put(b"transfer/9999/0/00000000", b"1 2 0")
        assert archive.flush(timeout_s=60)
    with kvwal.open(bank.path, "w", **bank.options) as db:
        db.put(b"transfer/9999/0/00000000", b"2 1 0")
        with db.snapshot() as now:
            told = {key: (1, value) for key, value in now.scan(prefix=b"transfer/")}
    with pytest.raises(BrokenPromise, match="has not the transfers up to commit"):
        bank._compare("now", "latest", None, told)


def test_other_balances_are_noticed(bank: Archived) -> None:
    with kvwal.open(bank.path, "w", **bank.options) as db, kvwal.archive(db, archive_of(bank.path)) as archive:
        with db.batch() as batch:
            batch.put(b"account/0000", b"%d" % (int(db[b"account/0000"]) + 1))
            batch.put(b"account/0001", b"%d" % (int(db[b"account/0001"]) - 1))
        assert archive.flush(timeout_s=60)
    with kvwal.open(bank.path, "r") as db, pytest.raises(BrokenPromise, match="balances are not what"):
        list(bank.answers(db))
