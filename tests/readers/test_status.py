"""The figures of the running process: asked for, answered for ten seconds, and shown by `kvwal stats`."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from store_fixtures import wait_until

import kvwal
from kvwal.__main__ import whole_app
from kvwal.engine.upkeep import Upkeep
from kvwal.feed.status import describe
from kvwal.files import inside, system_files
from kvwal.following.status import running_status
from kvwal.following.still import StillEngine
from kvwal.keys import Seqno
from kvwal.readers.status import ask, decode_status, encode_status, is_asked, read_status, write_status
from kvwal.testing import SimulatedDisk

ROOT = Path(__file__).parent.parent.parent


def test_what_was_said_comes_back_and_damage_is_nothing() -> None:
    said = {"name": "wörker\x1b", "numbers": [1, None, 2.5]}
    raw = encode_status(said)
    assert decode_status(raw) == said
    assert raw[8:9] == b"\n"
    for at in range(len(raw)):
        assert decode_status(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]) is None
        assert decode_status(raw[:at]) is None
    assert decode_status(encode_status([1])) is None  # type: ignore[arg-type]  # no object
    deep = b"[" * 100_000
    from crc32c import crc32c

    assert decode_status(b"%08x\n" % crc32c(deep) + deep) is None


GOOD: dict[str, Any] = {
    "version": 1,
    "stats": {"archives": [{"destination": "disk", "gaps": [[1, 2]]}]},
    "pins": [asdict(kvwal.Pin("follower", Seqno(1), 1, 1))],
    "consumers": [{"name": "mailer"}],
    "recovery": {},
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"stats": 5},
        {"stats": {}},
        {"stats": {"archives": 5}},
        {"stats": {"archives": [5]}},
        {"stats": {"archives": [{"destination": "disk"}]}},
        {"stats": {"archives": [{"destination": "disk", "gaps": [[1]]}]}},
        {"stats": {"archives": [{"destination": "disk", "gaps": [[1, "2"]]}]}},
        {"stats": {"archives": [{"destination": 1, "gaps": []}]}},
        {"pins": 7},
        {"pins": [1]},
        {"pins": [{"purpose": "follower"}]},
        {"pins": [{**GOOD["pins"][0], "held_bytes": "x"}]},
        {"pins": [{**GOOD["pins"][0], "since_us": True}]},
        {"consumers": "x"},
        {"consumers": [[]]},
        {"consumers": [{}]},
        {"recovery": 3},
        {"wall_us": 1 << 70},
        {"wall_us": -(1 << 70)},
    ],
)
def test_what_has_another_form_than_a_status_is_nothing(store: str, wrong: dict[str, Any]) -> None:
    assert decode_status(encode_status(GOOD)) == GOOD
    assert decode_status(encode_status({**GOOD, "more": [1], "recovery": {"seconds": 0.1}})) is not None
    assert decode_status(encode_status({**GOOD, **wrong})) is None
    with kvwal.open(store, background=False) as db:
        db[b"key"] = b"value"
        assert running_status(store, 0.0) == (True, None)
        said = {**GOOD, "wall_us": system_files().now_us(), **wrong}
        write_status(system_files().open_directory(store), said, 0o600)
        assert running_status(store, 0.0) == (True, None)


def test_a_question_is_good_for_ten_seconds() -> None:
    disk = SimulatedDisk()
    disk.make_directory("/store")
    directory = disk.open_directory("/store")
    assert not is_asked(disk, directory)
    assert read_status(directory) is None
    for _ in range(2):
        ask(disk, directory)
        disk.pass_time(9.9)
        assert is_asked(disk, directory)
        disk.pass_time(0.2)
        assert not is_asked(disk, directory)
    disk.jump_clock(-60_000_000)
    assert not is_asked(disk, directory)
    for text in (b"", b"x" * 21, b"9" * 21, b"1\n", "³".encode() * 10 + b"\n"):
        disk.remove("/store/readers/ask")
        inside(directory, "readers").open("ask", create=True).pwrite(text, 0)
        assert not is_asked(disk, directory)
    for n in range(2):
        write_status(directory, {"n": n}, 0o600)
        assert read_status(directory) == {"n": n}
    inside(directory, "readers").open("status.tmp", create=True)
    write_status(directory, {"n": 3}, 0o600)
    assert read_status(directory) == {"n": 3}


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def test_a_running_process_answers_for_as_long_as_it_is_asked(store: str) -> None:
    assert kvwal.open(store).close() is None
    assert running_status(store) == (False, None)
    with kvwal.open(store) as db:
        db[b"key"] = b"value"
        db.consumer("mailer", start="oldest")
        with kvwal.follow(store, name="report"), db.snapshot():
            db.checkpoint()
            running, said = running_status(store, 10)
            assert running
            assert said is not None
            assert said["pid"] == os.getpid()
            assert said["refuses"] == ""
            assert said["entries"] == 1
            assert said["stats"]["last_seqno"] <= db.last_seqno
            assert {pin["purpose"] for pin in said["pins"]} >= {"follower", "snapshot", "consumer"}
            (follower,) = (pin for pin in said["pins"] if pin["purpose"] == "follower")
            assert (follower["name"], follower["pid"]) == ("report", os.getpid())
            assert [each["name"] for each in said["consumers"]] == ["mailer"]
            assert 0 <= said["age_s"] < 2
    # It is closed: what it said last is old.
    assert running_status(store) == (False, None)


def test_one_that_has_no_thread_does_not_answer(store: str) -> None:
    with kvwal.open(store, background=False):
        assert running_status(store, 0.05) == (True, None)


def test_an_idle_store_that_is_not_asked_writes_nothing(store: str) -> None:
    with kvwal.open(store) as db:
        db[b"key"] = b"value"
        time.sleep(0.3)
        assert not os.path.exists(f"{store}/readers")


WRITER = """
    import sys, kvwal
    with kvwal.open(sys.argv[1]) as db:
        db[b"key"] = b"value"
        print("open", flush=True)
        sys.stdin.readline()
"""


def test_kvwal_stats_beside_a_running_process_shows_its_own_figures(store: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), store],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"open\n"
        with kvwal.follow(store, name="tab\there"):
            # It says who is there when it has looked.
            wait_until(lambda: "follower" in _stats(store, "--json"))
            said = json.loads(_stats(store, "--json"))
            assert said["pid"] == child.pid
            assert said["entries"] == 1
            assert said["last_seqno"] == 1
            assert said["recovery"]["created"]
            lines = dict(line.split("\t") for line in _stats(store).splitlines())
            assert lines["pid"] == str(child.pid)
            assert lines["memtable_keys"] == "1"
            assert f"held.follower tab\\there (process {os.getpid()})" in lines
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_kvwal_stats_says_where_a_running_process_does_not_answer(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.cli.reports.running_status", lambda path: (True, None))
    with kvwal.open(store, background=False) as db:
        db[b"key"] = b"value"
        db[b"next"] = b"value"
        result = CliRunner().invoke(whole_app(), ["stats", store])
        assert result.exit_code == 0
        assert "did not answer" in result.stderr
        assert "entries\t1\n" in result.stdout


def test_the_position_is_that_of_the_figures_whatever_is_committed_meanwhile(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.open(store) as db:
        figures = Upkeep.stats

        def overtaken(upkeep: Upkeep) -> Any:
            found = figures(upkeep)
            db[b"meanwhile"] = b"1"
            return found

        monkeypatch.setattr(Upkeep, "stats", overtaken)
        said = describe(db.engine)
        assert db.last_seqno == said["stats"]["last_seqno"] + 1
        assert kvwal.Position.parse(said["position"]) == said["stats"]["last_seqno"]


def test_the_position_of_a_reader_that_goes_on_meanwhile_is_that_of_its_figures(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kvwal.open(store).close()
    figures = kvwal.Store.stats

    def overtaken(reading: kvwal.Store) -> Any:
        found = figures(reading)
        with kvwal.open(store, background=False) as db:
            db[b"meanwhile"] = b"1"
        assert isinstance(reading.engine, StillEngine)
        assert reading.engine.progress.refresh() == found.last_seqno + 1
        return found

    monkeypatch.setattr(kvwal.Store, "stats", overtaken)
    said = json.loads(_stats(store, "--json"))
    assert kvwal.Position.parse(said["position"]) == said["last_seqno"]


def _stats(path: str, *options: str) -> str:
    result = CliRunner().invoke(whole_app(), ["stats", path, *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_asked_for_survives_a_directory_that_is_removed(store: str) -> None:
    files = system_files()
    with kvwal.open(store) as db:
        directory = files.open_directory(store)
        ask(files, directory)
        wait_until(lambda: read_status(directory) is not None)
        for name in Path(f"{store}/readers").iterdir():
            name.unlink()
        Path(f"{store}/readers").rmdir()
        db[b"key"] = b"value"
        time.sleep(0.15)
        assert db[b"key"] == b"value"
        assert running_status(store, 10)[1] is not None


_OWNING = """
    import sys, threading, time
    import kvwal
    with kvwal.open(sys.argv[1]) as db:
        db.consumer("idle", ack_interval_s=0).close()
        feed = db.consumer("mailer", ack_interval_s=0)
        db.put(b"k", b"v")
        feed.ack(next(feed))
        print("ready", flush=True)
        time.sleep(60)
"""


def test_consumers_tells_what_the_running_process_says_and_what_is_not_known_where_it_says_nothing(
    store: str,
) -> None:
    def told(*more: str) -> tuple[list[str], str]:
        done = CliRunner().invoke(whole_app(), ["consumers", store, *more])
        assert done.exit_code == 0
        return done.stdout.splitlines(), done.stderr

    command = [sys.executable, "-c", textwrap.dedent(_OWNING), store]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            lines, said = told()
            assert [line.split("\t")[:2] for line in lines] == [["idle", "stopped"], ["mailer", "active"]]
            assert said == ""
            idle, mailer = map(json.loads, told("--json")[0])
            assert (idle["owner"], idle["last_poll_s"]) == (None, None)
            assert (mailer["owner"], mailer["scanned"]) == ("MainThread", mailer["position"])
            assert 0 <= mailer["last_poll_s"] < 60
            if hasattr(signal, "SIGSTOP"):
                os.kill(child.pid, signal.SIGSTOP)
                time.sleep(1.6)
                lines, said = told("--json")
                assert [json.loads(line)["state"] for line in lines] == ["unknown", "unknown"]
                assert said == (
                    f"kvwal: process {child.pid} that has the store open does not say whether consumers are in use\n"
                )
        finally:
            child.kill()
    lines, said = told()
    assert [line.split("\t")[1] for line in lines] == ["stopped", "stopped"]
    assert said == ""


@pytest.mark.parametrize("wrong", [{"state": "\x1b[31m"}, {"state": ["active"]}, {"state": 7}, {}])
def test_a_state_of_a_consumer_that_is_none_is_not_known(
    store: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.open(store) as db:
        db.consumer("mailer").close()
    odd = {"lag_s": [1], "lag_bytes": 10**400, "lag_commits": True, "position": 5, "owner": 7, "last_poll_s": math.nan}
    said = {"consumers": [{"name": "mailer", **odd, **wrong}]}
    monkeypatch.setattr("kvwal.cli.consumers.running_status", lambda path: (True, said))
    done = CliRunner().invoke(whole_app(), ["consumers", store, "--json"])
    found = json.loads(done.stdout)
    assert (found["state"], found["lag_commits"], found["position"]) == ("unknown", 0, 0)
    said["consumers"][0]["state"] = "active"
    done = CliRunner().invoke(whole_app(), ["consumers", store, "--json"])
    found = json.loads(done.stdout)
    assert (found["state"], found["lag_commits"], found["lag_s"], found["position"]) == ("active", 0, 0, 0)
    assert (found["lag_bytes"], found["owner"], found["last_poll_s"]) == (0, None, None)
