"""`kvwal migrate`: with the application's codec, which only its user names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kvwal
from kvwal import codecs
from kvwal.__main__ import whole_app

MODULE = """
from kvwal import codecs
one = codecs.versioned(codecs.json(), version=1)
two = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda old: old | {"active": True}})
def told(old):
    with open("told", "ab") as file:
        file.write(b".")
    return old | {"active": True}
loud = codecs.versioned(codecs.json(), version=2, upcasters={1: told})
class inner:
    users = two
plain = codecs.json()
number = 7
"""
ONE = codecs.versioned(codecs.json(), version=1)
TWO = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda old: old | {"active": True}})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop_models.py").write_text(MODULE)
    (tmp_path / "shop_broken.py").write_text("raise OSError('no network')")
    (tmp_path / "shop_ends.py").write_text("import sys; sys.exit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with kvwal.open("shop.kv") as db:
        db.table("users", tuple[str, int], ONE).update({("u", n): {"n": n} for n in range(10)})
        db.table("plain", str, codecs.json())["a"] = 1
    return tmp_path


def run(*arguments: str, expect: int = 0) -> Result:
    result = CliRunner().invoke(whole_app(), arguments)
    assert result.exit_code == expect, (result.output, result.stderr, result.exception)
    return result


def values() -> list[Any]:
    with kvwal.open("shop.kv", "r") as db:
        return [value[0] for value in db.table("users", tuple[str, int], TWO).raw().values()]


ARGUMENTS = ("migrate", "shop.kv", "--table", "users")


def test_values_are_rewritten_and_counted(here: Path) -> None:
    with kvwal.open("shop.kv", "r") as db:
        before = db.last_seqno
    dry = run(*ARGUMENTS, "--codec", "shop_models:two", "--dry-run")
    assert "rewritten\t10\n" in dry.stdout
    assert "version 1\t10\n" in dry.stdout
    assert values() == [1] * 10
    result = run(*ARGUMENTS, "--codec", "shop_models:inner.users", "--json", "--batch", "4", "--meta", "by=me")
    assert json.loads(result.stdout) == {
        "table": "users",
        "version": 2,
        "examined": 10,
        "rewritten": 10,
        "unreadable": 0,
        "resumed": False,
        "dry_run": False,
        "versions": {"1": 10},
    }
    assert result.stderr == ""
    assert values() == [2] * 10
    [*lines] = map(json.loads, run("changes", "shop.kv", "--after", str(before), "--json").stdout.splitlines())
    assert {line["cause"] for line in lines} == {"migrate"}
    assert lines[0]["meta"] == {"by": "me"}
    assert "Cause: migrate\nMeta:  by=me\n" in run("log", "shop.kv").stdout
    assert json.loads(run("log", "shop.kv", "-n", "1", "--json").stdout)["cause"] == "migrate"
    key = "('u', 1)"
    history = run("history", "shop.kv", key, "--table", "users", "--json").stdout.splitlines()
    assert [json.loads(line)["cause"] for line in history] == ["migrate", None]
    assert "rewritten\t0\n" in run(*ARGUMENTS, "--codec", "shop_models:two").stdout


def test_what_cannot_be_brought_up_is_said_and_stays(here: Path) -> None:
    with kvwal.open("shop.kv") as db, db.batch() as batch:
        table = db.table("users", tuple[str, int], ONE)
        assert table.id is not None
        batch.table(table.id).put(codecs.pack(("u", 3)), b"\x01{")
    for dry in ((), ("--dry-run",)):
        result = run(*ARGUMENTS, "--codec", "shop_models:two", *dry, expect=8)
        assert "unreadable\t1\n" in result.stdout
        assert "kvwal: 1 value could not be brought up; the first is that of ('u', 3): " in result.stderr
    assert values() == [2, 2, 2, 1] + [2] * 6
    said = run("get", "shop.kv", "('u', 3)", "--table", "users", expect=8).stderr
    assert "no JSON" in said
    assert said.endswith("; --hex and --base64 show bytes as they are\n")
    assert run("get", "shop.kv", codecs.pack(("u", 3)).hex(), "--table", "users", "--hex").stdout == "017b\n"


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ("shop_models", "not of the form MODULE:NAME"),
        (":two", "not of the form MODULE:NAME"),
        ("no_such_module:two", "No module named 'no_such_module'"),
        ("shop_models:three", "has no attribute 'three'"),
        ("shop_models:number", "is no codec, but int"),
        ("shop_broken:two", "OSError: no network"),
        ("shop_ends:two", "SystemExit"),
        ("shop_models:plain", "values of table 'users' are"),
        ("shop_models:plain", "and shop_models:plain is json"),
    ],
)
def test_a_codec_that_cannot_be_used_says_why_and_changes_nothing(here: Path, codec: str, says: str) -> None:
    result = run(*ARGUMENTS, "--codec", codec, expect=2)
    assert says in result.stderr
    assert values() == [1] * 10


def test_a_codec_has_to_be_named_and_only_then_anything_is_imported(here: Path) -> None:
    result = run(*ARGUMENTS, expect=2)
    assert "versioned(json)" in result.stderr
    assert "--codec MODULE:NAME" in result.stderr
    assert "shop_models" not in sys.modules or values() == [1] * 10
    for options in ((), ("--codec", "shop_models:plain"), ("--codec", "shop_models:two")):
        result = run("migrate", "shop.kv", "--table", "plain", *options, expect=2)
        assert "of codec json, and have no versions" in " ".join(result.stderr.split())
    run("migrate", "shop.kv", "--table", "none", "--codec", "shop_models:two", expect=2)
    run("migrate", "nothing.kv", "--table", "users", "--codec", "shop_models:two", expect=5)


def test_killed_it_goes_on(here: Path) -> None:
    count = 3_000
    with kvwal.open("shop.kv", durability="os") as db:
        db.table("users", tuple[str, int], ONE).update({("u", n): {"n": n} for n in range(count)})
    command = [sys.executable, "-m", "kvwal", *ARGUMENTS, "--codec", "shop_models:loud", "--batch", "5"]
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(kvwal.__file__))}
    told = here / "told"
    for _ in range(3):
        told.write_bytes(b"")
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while told.stat().st_size < 100 and process.poll() is None and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = values().count(2)
    assert done > 200
    final = subprocess.run([*command, "--json"], env=environment, check=True, capture_output=True, text=True)
    report = json.loads(final.stdout)
    assert (report["examined"], report["rewritten"]) == (count, count)
    assert report["resumed"] is (done < count)
    assert final.stderr == ""
    with kvwal.open("shop.kv") as db:
        expected = {("u", n): {"n": n, "active": True} for n in range(count)}
        assert dict(db.table("users", tuple[str, int], TWO)) == expected
        assert db.verify().ok
