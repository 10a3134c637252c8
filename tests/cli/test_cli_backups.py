"""`kvwal backup` and `kvwal restore`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import kvwal
from kvwal.__main__ import whole_app


def run(*arguments: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(whole_app(), [str(argument) for argument in arguments])
    assert result.exit_code == expect, (result.output, result.stderr, result.exception)
    return result


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    with kvwal.open(tmp_path / "s") as db:
        for n in range(20):
            db.put(b"%d" % n, b"v")
    return tmp_path


def test_a_backup_is_restored_to_any_of_its_moments(filled: Path) -> None:
    assert "every commit up to 20 is in" in run("backup", filled / "s", filled / "b", "--history").stdout
    assert "nothing was new" in run("backup", filled / "s", filled / "b").stdout
    assert run("backup", filled / "s", filled / "b", "--full", "--quiet").output == ""
    assert "is as after commit 20" in run("restore", filled / "b", filled / "r").stdout
    for at, keys in (("7", 7), ("before:4", 3)):
        run("restore", filled / "b", filled / f"r{keys}", "--at", at, "--quiet")
        with kvwal.open(filled / f"r{keys}", "r") as db:
            assert len(db) == keys
    with kvwal.open(filled / "r7", "r") as db:
        position = db.position
    run("backup", filled / "r7", filled / "b", "--quiet")
    run("restore", filled / "b", filled / "r8", "--at", position, "--quiet")
    run("verify", filled / "r8")


def test_a_time_between_two_backups_is_refused_with_what_to_ask_for(filled: Path) -> None:
    run("backup", filled / "s", filled / "b")
    with kvwal.open(filled / "s") as db:
        db.put(b"1", b"w")
        wanted = datetime.now(UTC).isoformat()
        db.put(b"2", b"w")
        db.checkpoint()
    run("backup", filled / "s", filled / "b")
    said = run("restore", filled / "b", filled / "r", "--at", wanted, expect=2).stderr
    assert re.search(r"those of commit 20 \(20\S+\+00:00\) and 22 \(20\S+\+00:00\); ", said)
    assert "and one with --history, or kvwal.archive, those between too; " in said
    assert said.endswith("; ask for one of these by its number with --at\n")
    run("restore", filled / "b", filled / "r", "--at", "20")


def test_a_time_that_is_still_to_come_is_refused(filled: Path) -> None:
    run("backup", filled / "s", filled / "b")
    for command in (["restore", filled / "b", filled / "r"], ["archive", "plan", filled / "b"]):
        assert "is still to come" in run(*command, "--at", "9026-01-31T12:00:00Z", expect=2).stderr
    assert not (filled / "r").exists()


def test_a_directory_that_is_not_there_is_not_said_to_lack_a_file(filled: Path) -> None:
    for command in (["restore", filled / "b", filled / "r"], ["archive", "status", filled / "b"]):
        assert "b holds no backup: it does not exist, or" in run(*command, expect=5).stderr


def test_json_and_dry_run(filled: Path) -> None:
    report = json.loads(run("backup", filled / "s", filled / "b", "--json").stdout)
    assert report["position"].endswith(":20")
    assert report["is_full"]
    dry = run("restore", filled / "b", filled / "r", "--dry-run")
    assert dry.stdout.splitlines()[0] == report["base"]
    assert "1 base and " in dry.stderr
    assert re.search(r" in \d+ requests?, \d+ commits? to replay: about \d+\.\d s; nothing was done", dry.stderr)
    found = json.loads(run("restore", filled / "b", filled / "r", "--dry-run", "--json").stdout)
    assert found["position"] is None
    assert found["expected_s"] > 0
    assert found["restored"] == report["position"]
    assert not (filled / "r").exists()


def test_exit_codes(filled: Path) -> None:
    run("backup", filled / "s", filled / "b")
    run("restore", filled / "none", filled / "r", expect=5)
    assert "make it first" in run("restore", filled / "b", filled / "none" / "r", expect=5).stderr
    assert "make it first" in run("backup", filled / "s", filled / "none" / "b", expect=5).stderr
    (filled / "file").touch()
    for command in (("restore", filled / "file", filled / "r"), ("backup", filled / "s", filled / "file")):
        assert "file is not a directory" in run(*command, expect=5).stderr
    run("archive", "status", filled / "file", expect=5)
    run("restore", filled / "b", filled / "s", expect=5)
    (filled / "link").symlink_to("nothing")
    for more in ([], ["--dry-run"]):
        assert "is a symbolic link" in run("restore", filled / "b", filled / "link", *more, expect=5).stderr
    assert "; ask for one of these with --at\n" in run(
        "restore", filled / "b", filled / "r", "--at", "99", expect=2
    ).stderr
    run("restore", filled / "b", filled / "r", "--at", "tomorrow", expect=2)
    run("backup", filled / "none", filled / "b", expect=5)
    with kvwal.open(filled / "other") as db:
        db.put(b"k", b"v")
    run("backup", filled / "other", filled / "b", expect=5)
    (base,) = (filled / "b").glob("*/base/*")
    raw = bytearray(base.read_bytes())
    raw[100] ^= 1
    base.write_bytes(raw)
    run("restore", filled / "b", filled / "r", expect=3)


def damage(name: Path) -> None:
    raw = bytearray(name.read_bytes())
    raw[100] ^= 1
    name.write_bytes(raw)


def test_a_restore_says_which_damaged_object_it_did_without(filled: Path) -> None:
    run("backup", filled / "s", filled / "b", "--history")
    with kvwal.open(filled / "s") as db:
        db.put(b"new", b"v")
        db.checkpoint()
    run("backup", filled / "s", filled / "b", "--history", "--full")
    newest = max((filled / "b").glob("*/base/*"), key=lambda name: name.name)
    damage(newest)
    found = run("restore", filled / "b", filled / "r")
    assert f"{newest.name} is damaged and was done without" in found.stderr
    told = json.loads(run("restore", filled / "b", filled / "r2", "--json").stdout)
    assert [Path(name).name for name in told["damaged"]] == [newest.name]
    with kvwal.open(filled / "r", "r") as db:
        assert db[b"new"] == b"v"


def test_a_restore_that_meets_damage_names_the_moments_before_it_and_they_are_restored(filled: Path) -> None:
    run("backup", filled / "s", filled / "b", "--history")
    with kvwal.open(filled / "s") as db:
        db.put(b"new", b"v")
    run("backup", filled / "s", filled / "b")
    last = max((filled / "b").glob("*/unit/0/*"), key=lambda name: name.name)
    damage(last)
    text = run("restore", filled / "b", filled / "r", "--at", 21, expect=3).stderr
    assert f"{last.name} at byte 0" in text
    assert "Restore an earlier moment, which does not need it (there are those of commits 0 to 20)" in text
    assert "Restore a backup" not in text
    run("restore", filled / "b", filled / "r", "--at", 20)
    with kvwal.open(filled / "r", "r") as db:
        assert len(db) == 20
    (base,) = (filled / "b").glob("*/base/*")
    damage(base)
    for arguments in ((), ("--at", 20)):
        text = run("restore", filled / "b", filled / "r2", *arguments, expect=3).stderr
        assert "Restore from another destination" in text
    assert "kvwal archive verify" in run("archive", "plan", filled / "b", expect=3).stderr
    (filled / "b" / "kvwal-archive").write_bytes(b"{}")
    assert "from another destination" in run("restore", filled / "b", filled / "r2", expect=3).stderr


def test_a_line_that_cannot_be_told_because_of_damage_is_to_be_named(filled: Path) -> None:
    run("backup", filled / "s", filled / "b")
    run("restore", filled / "b", filled / "r", "--at", 10)
    run("backup", filled / "r", filled / "b")
    with kvwal.open(filled / "r", "r") as db:
        line, seqno = db.position.line.hex(), int(db.position)
    other = next(name for name in (filled / "b").glob("*/unit/0/*") if line not in str(name))
    damage(other)
    assert "Say on which line the moment is" in run("restore", filled / "b", filled / "r2", expect=3).stderr
    run("restore", filled / "b", filled / "r2", "--at", f"{line}:{seqno}")


def test_beside_a_program_that_writes(filled: Path) -> None:
    store = str(filled / "s")
    program = f"import kvwal; db = kvwal.open({store!r}); db[b'new'] = b'1'; print('open', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"open\n"
        run("backup", filled / "s", filled / "b")
        run("backup", filled / "s", filled / "b", "--history")
        writer.communicate(b"\n")
    run("restore", filled / "b", filled / "r")
    with kvwal.open(filled / "r", "r") as db:
        assert len(db) >= 20


def test_what_is_read_for_consumers_behind_the_base_is_said_to_be_read_perhaps(filled: Path) -> None:
    with kvwal.open(filled / "s") as db:
        db.consumer("mailer", start="oldest").close()
        db.checkpoint()
    run("backup", filled / "s", filled / "b", "--history")
    plan = json.loads(run("archive", "plan", filled / "b", "--json").stdout)
    dry = json.loads(run("restore", filled / "b", filled / "r", "--dry-run", "--json").stdout)
    done = json.loads(run("restore", filled / "b", filled / "r", "--json").stdout)
    more = set(done["objects"]) - set(dry["objects"])
    assert set(dry["objects"]) == set(plan["objects"])
    assert dry["earlier_units"] == plan["earlier_units"] == len(more) > 0
    assert dry["earlier_bytes"] == plan["earlier_bytes"] == done["bytes"] - dry["bytes"]
    assert done["earlier_units"] == 0
    for command in (["archive", "plan", filled / "b"], ["restore", filled / "b", filled / "q", "--dry-run"]):
        said = run(*command).stderr
        assert f"if a consumer of that moment is behind the base, up to {len(more)} unit" in said


def test_a_plan_without_units_before_its_base_says_nothing_of_them(filled: Path) -> None:
    run("backup", filled / "s", filled / "b")
    assert "consumer" not in run("archive", "plan", filled / "b").stderr
    assert "consumer" not in run("restore", filled / "b", filled / "r", "--dry-run").stderr


def test_pruning_as_json_is_one_object_with_names(filled: Path) -> None:
    run("backup", filled / "s", filled / "b")
    run("restore", filled / "b", filled / "r")
    with kvwal.open(filled / "r") as db:
        db[b"more"] = b"1"
    run("backup", filled / "r", filled / "b")
    found = json.loads(run("archive", "prune", filled / "b", "--dry-run", "--json").stdout)
    assert len(found["lines"]) == 2
    for line in found["lines"]:
        assert list(line) == ["line", "keep_from", "kept", "delete", "bytes", "unreachable"]
        assert (len(line["line"]), line["delete"], line["bytes"]) == (16, [], 0)
