"""The demos, with few kills; and that they would notice a store that breaks its word."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import kvwal
from kvwal.cli.picture import Extent, bar, drawing
from kvwal.demo.bank import Bank
from kvwal.demo.killing import Plan, live
from kvwal.demo.library import Library, identifiers
from kvwal.demo.promise import BrokenPromise


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvwal", "demo", *arguments], capture_output=True, text=True, timeout=110
    )


def test_a_demo_whose_reader_has_gone_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "kvwal", "demo", "bank", "--kills", "1"]
    place = {**os.environ, "TMPDIR": str(tmp_path)}
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=place, timeout=110)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("job", ["library", "bank"])
def test_a_demo_with_five_kills_holds_every_promise(job: str, tmp_path: Path) -> None:
    path = tmp_path / "demo.kv"
    result = demo(job, "--kills", "5", "--seed", "1", "--json", "--path", str(path))
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["ok"]
    assert outcome["killed"] == 5
    assert outcome["acked"] > 0
    with kvwal.open(str(path), "r") as db:
        assert db.verify().ok


def test_a_demo_prints_a_row_for_every_kill_in_80_columns() -> None:
    result = demo("bank", "--kills", "2", "--seed", "2")
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line[:4].strip().isdigit()]
    assert len(rows) == 2
    assert all(len(row) <= 80 for row in rows), rows
    assert "Proved with 2 kills" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("job", ["library", "bank", "trades", "restore"])
def test_a_demo_that_cannot_make_its_store_says_so_and_starts_nothing(job: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, code in ((tmp_path / "none" / "s", 5), (tmp_path / "file" / "s", 5)):
        result = demo(job, "--path", str(place))
        assert (result.returncode, result.stdout) == (code, "")
        assert result.stderr.startswith("kvwal: ")
        assert result.stderr.count("\n") == 1
        assert not place.parent.is_dir()


def test_a_demo_does_not_touch_a_path_that_exists(tmp_path: Path) -> None:
    result = demo("--path", str(tmp_path))
    assert result.returncode == 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    """A bank that was killed once, with transfers in its books."""
    bank = Bank(str(tmp_path / "bank.kv"), seed=3, kills=1)
    death = live(bank.arguments(last=False), Plan(20, 0.0), bank.heard)
    assert death.moment == "writing"
    assert death.acknowledgements >= 20
    with kvwal.open(bank.path) as db:
        bank.check(db)
    return bank


def test_the_bank_notices_money_that_appears(bank: Bank) -> None:
    with kvwal.open(bank.path) as db:
        db[b"account/0000"] = b"%d" % (int(db[b"account/0000"]) + 1)
        with pytest.raises(BrokenPromise, match="accounts hold"):
            bank.check(db)


def test_the_bank_notices_a_lost_transfer(bank: Bank) -> None:
    with kvwal.open(bank.path) as db:
        del db[next(iter(bank.transfers))]
        with pytest.raises(BrokenPromise, match="acknowledged transfer"):
            bank.check(db)


def test_the_bank_notices_a_transfer_that_is_only_half_there(bank: Bank) -> None:
    with kvwal.open(bank.path) as db:
        one, other = (int(db[key]) for key in (b"account/0000", b"account/0001"))
        db.update({b"account/0000": b"%d" % (one + 1), b"account/0001": b"%d" % (other - 1)})
        with pytest.raises(BrokenPromise, match="balances are not"):
            bank.check(db)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    """A library that was killed after some files."""
    library = Library(str(tmp_path / "library.kv"), seed=4, kills=1)
    live(library.arguments(last=False), Plan(5, 0.0), library.heard)
    with kvwal.open(library.path) as db:
        assert library.check(db).found >= 5
    return library


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda db: db.__setitem__(b"progress", b"1"), "transactions were acknowledged and 1 are there"),
        (lambda db: db.__setitem__(db.first(prefix=b"text/")[0], b"x"), "the text of"),
        (lambda db: db.__setitem__(db.first(prefix=b"sha256/")[0], b"x"), "the SHA-256 of"),
        (lambda db: db.__setitem__(b"surplus", b""), "entries where"),
        (lambda db: db.__setitem__(db.first(prefix=b"name/")[0], b"0"), "the index of identifiers"),
    ],
)
def test_the_library_notices_what_is_wrong(library: Library, change: object, reason: str) -> None:
    with kvwal.open(library.path) as db:
        change(db)  # type: ignore[operator]
        with pytest.raises(BrokenPromise, match=reason):
            library.check(db)


def test_identifiers_are_those_outside_of_comments_and_strings() -> None:
    source = b'import os  # fsync\ntext = "fsync" + \'os\'\n"""\nfsync\n"""\nos.fsync(text, os)\n'
    assert identifiers(source) == {b"os": [1, 6], b"text": [2, 6], b"fsync": [6]}


def test_the_picture_gives_a_column_to_whatever_is_there() -> None:
    assert bar(Extent(1, 0, 0, 0), 10).plain == "··········"
    assert bar(Extent(1, 0, 5, 0), 10).plain == "▒▒▒▒▒▒▒▒▒▒"
    assert bar(Extent(1, 100, 100, 7), 10).plain == "▓▓▓▓▓▓▓▓▓×"
    assert bar(Extent(99_999, 100_000, 100_001, 1), 10).plain == "███████▓▒×"
    for line in drawing(Extent(500, 800, 1000, 3), 20):
        assert len(line.plain) > 20


def test_the_picture_always_fills_its_width(rng: random.Random) -> None:
    for _ in range(500):
        checkpoint = rng.randrange(10_000)
        last = checkpoint + rng.randrange(3) * rng.randrange(10_000)
        extent = Extent(rng.randrange(1, last + 2), checkpoint, last, rng.randrange(2))
        assert len(bar(extent, 20).plain) == 20
