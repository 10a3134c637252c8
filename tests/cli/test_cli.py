"""The command line: bytes in and out, exit codes, plain output in a pipe."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

import kvwal
from kvwal.__main__ import whole_app
from kvwal.cli.forms import Form, from_json, parse, show, to_json

# Bytes that no encoding of text survives, and characters that would break a line or act on a terminal.
AWKWARD = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"a\tb\nc\rd\\e",
    b"\x1b[31mred",
    "héllo €".encode(),
    b"\xed\xa0\x80",
    bytes(range(256)),
]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "cli.kv")


def run(*arguments: str | bytes, stdin: bytes | None = None, expect: int = 0) -> Result:
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(whole_app(), [os.fsdecode(argument) for argument in arguments], input=stdin)
    assert result.exit_code == expect, (result.output, result.stderr, result.exception)
    return result


def kvwal_process(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Run a command in a process of its own, as a shell does."""
    return subprocess.run([sys.executable, "-m", "kvwal", *arguments], capture_output=True, timeout=60, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def filled(path: str) -> str:
    with kvwal.open(path) as db:
        for number in range(5):
            db[b"user:%d" % number] = b"name %d" % number
        db[b"zebra"] = b"\xff\x00"
    return path


def test_what_put_takes_get_gives_back_byte_for_byte(path: str) -> None:
    for value in AWKWARD:
        run("put", path, "key", stdin=value)
        assert run("get", path, "key").stdout_bytes == value


def test_put_takes_a_value_from_the_command_line_or_a_file(path: str, tmp_path: Path) -> None:
    run("put", path, "a", "from the line")
    (tmp_path / "value").write_bytes(b"from \xff a file")
    run("put", path, "b", "--file", str(tmp_path / "value"))
    with kvwal.open(path, "r") as db:
        assert dict(db) == {b"a": b"from the line", b"b": b"from \xff a file"}


def test_an_argument_that_is_not_utf8_reaches_the_store_as_it_is(path: str) -> None:
    run("put", path, b"\xff\x80", b"\xfe")
    with kvwal.open(path, "r") as db:
        assert dict(db) == {b"\xff\x80": b"\xfe"}


@pytest.mark.parametrize("form", [Form.HEX, Form.BASE64])
@pytest.mark.parametrize("data", AWKWARD)
def test_hex_and_base64_are_the_same_bytes_in_and_out(path: str, form: Form, data: bytes) -> None:
    text = show(form, data)
    assert parse(form, text) == data
    run("put", path, f"--{form.value}", text, text)
    assert run("get", path, f"--{form.value}", text).stdout == text + "\n"
    assert run("scan", path, f"--{form.value}").stdout == f"{text}\t{text}\n"


def test_hex_that_is_not_hex_is_a_usage_error(path: str) -> None:
    assert "not hex" in run("put", path, "--hex", "xyz", "00", expect=2).stderr
    assert "not base64" in run("put", path, "--base64", "@", "AA==", expect=2).stderr


@pytest.mark.parametrize("data", AWKWARD)
def test_a_shown_text_is_one_line_without_controls(data: bytes) -> None:
    shown = show(Form.TEXT, data)
    assert all(char.isprintable() for char in shown), shown
    assert len(shown.splitlines()) <= 1


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("data", AWKWARD)
def test_json_gives_back_the_same_bytes_in_every_form(form: Form, data: bytes) -> None:
    line = json.dumps(to_json(form, "key", data))
    assert from_json("key", json.loads(line)) == data


def test_get_of_a_missing_key_is_exit_code_1(filled: str) -> None:
    result = run("get", filled, "user:99", expect=1)
    assert result.stdout == ""
    assert "no such key: user:99" in result.stderr


def test_get_as_json(filled: str) -> None:
    assert json.loads(run("get", filled, "user:1", "--json").stdout) == {"key": "user:1", "value": "name 1"}
    zebra = json.loads(run("get", filled, "zebra", "--json").stdout)
    assert zebra == {"key": "zebra", "value_base64": base64.b64encode(b"\xff\x00").decode()}


def test_delete_is_one_transaction_and_names_what_was_not_there(filled: str) -> None:
    assert "no such key: user:99" in run("delete", filled, "user:1", "user:99", "user:2", expect=1).stderr
    with kvwal.open(filled, "r") as db:
        assert b"user:1" not in db
        assert b"user:2" not in db
        assert len(db) == 4


def test_delete_by_prefix(filled: str) -> None:
    run("delete", filled, "--prefix", "user:")
    assert run("scan", filled, "--keys").stdout == "zebra\n"
    run("delete", filled, expect=2)


def test_every_key_is_deleted_only_where_that_is_said(filled: str) -> None:
    for empty in (["--prefix", ""], ["--hex", "--prefix", ""], ["--prefix="]):
        assert "the prefix is empty, so every key would be deleted" in run("delete", filled, *empty, expect=2).stderr
    assert len(run("scan", filled, "--keys").stdout.splitlines()) == 6
    run("delete", filled, "--prefix", "", "--yes")
    assert run("scan", filled, "--keys").stdout == ""


def test_scan_is_plain_lines_in_a_pipe(filled: str) -> None:
    output = kvwal_process("scan", filled).stdout
    assert output == b"".join(b"user:%d\tname %d\n" % (n, n) for n in range(5)) + b"zebra\t\\xff\\x00\n"


def test_scan_takes_ranges_prefixes_directions_and_limits(filled: str) -> None:
    def keys(*arguments: str) -> list[str]:
        return run("scan", filled, "--keys", *arguments).stdout.split()

    assert keys("--prefix", "user:", "--reverse", "--limit", "2") == ["user:4", "user:3"]
    assert keys("--start", "user:3", "--stop", "zebra") == ["user:3", "user:4"]
    assert keys("--limit", "0") == []
    run("scan", filled, "--prefix", "a", "--start", "b", expect=2)


def test_dump_and_load_make_the_same_store(path: str, tmp_path: Path) -> None:
    entries = {data: data[::-1] for data in AWKWARD} | {b"%05d" % n: b"x" * n for n in range(2000)}
    with kvwal.open(path) as db:
        db.update(entries)
    for number, options in enumerate([[], ["--hex"], ["--base64"]]):
        dumped = run("dump", path, *options).stdout_bytes
        assert dumped.count(b"\n") == len(entries)
        copy = str(tmp_path / f"copy{number}.kv")
        run("load", copy, "--batch", "300", stdin=dumped)
        with kvwal.open(copy, "r") as db:
            assert dict(db) == entries


@pytest.mark.parametrize(
    ("damage", "arguments", "code"),
    [
        ("missing", [], 5),
        ("cut", [], 3),
        ("none", ["--at", "99"], 2),
        ("none", ["--table", "people"], 2),
    ],
)
def test_a_dump_that_fails_before_its_first_line_leaves_the_file_as_it_was(
    filled: str, tmp_path: Path, damage: str, arguments: list[str], code: int
) -> None:
    if damage == "missing":
        filled = str(tmp_path / "nowhere")
    elif damage == "cut":
        (Path(filled) / "data").write_bytes(b"")
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"of yesterday\n")
    run("dump", filled, *arguments, "--output", str(target), expect=code)
    assert target.read_bytes() == b"of yesterday\n"
    fresh = tmp_path / "fresh.jsonl"
    run("dump", filled, *arguments, "--output", str(fresh), expect=code)
    assert not fresh.exists()


def test_a_dump_of_nothing_is_an_empty_file_and_one_that_cannot_be_written_is_a_usage_error(
    filled: str, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"of yesterday\n")
    run("dump", filled, "--prefix", "other:", "--output", str(target))
    assert target.read_bytes() == b""
    result = run("dump", filled, "--output", str(tmp_path / "no" / "out.jsonl"), expect=2)
    assert "--output" in result.stderr
    assert "No such file" in result.stderr


def test_dump_can_write_a_file_and_a_prefix(filled: str, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    run("dump", filled, "--prefix", "user:", "--output", str(target))
    assert [json.loads(line)["key"] for line in target.read_text().splitlines()] == [f"user:{n}" for n in range(5)]
    copy = str(tmp_path / "copy.kv")
    assert json.loads(run("load", copy, str(target), "--json").stdout)["loaded"] == 5


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense", "Expecting value"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "line 4"),
        (b'{"key": "a"}', 'exactly one of "value"'),
        (b'{"key": "a", "key_hex": "00", "value": ""}', 'exactly one of "key"'),
        (b'{"key": 1, "value": ""}', '"key" is not a string'),
        (b'{"key_hex": "0", "value": ""}', '"key_hex"'),
        (b'{"key": "%s", "value": ""}' % (b"k" * 65536), "65536 bytes; the limit is 65535"),
        (b'{"key": "\xff", "value": ""}', "it is not UTF-8: byte 10 of it is 0xff"),
    ],
)
def test_load_says_which_line_is_wrong_and_keeps_what_came_before(path: str, line: bytes, reason: str) -> None:
    good = b'{"key": "one", "value": "1"}\n\n{"key": "two", "value": "2", "more": 3}\n'
    result = run("load", path, stdin=good + line + b"\n", expect=7)
    assert "line 4" in result.stderr
    assert reason in result.stderr
    assert "the 2 entries before it are in the store" in result.stderr
    with kvwal.open(path, "r") as db:
        assert dict(db) == {b"one": b"1", b"two": b"2"}


def test_log_shows_the_newest_commit_first(filled: str) -> None:
    output = run("log", filled).stdout
    commits = [line for line in output.splitlines() if line.startswith("commit ")]
    assert commits == [f"commit {n}" for n in range(6, 0, -1)]
    assert "put    zebra = \\xff\\x00" in output
    assert "\x1b" not in output


def test_log_goes_forwards_from_a_commit_and_stops_at_a_limit(filled: str) -> None:
    def seqnos(*arguments: str) -> list[int]:
        return [json.loads(line)["seqno"] for line in run("log", filled, "--json", *arguments).stdout.splitlines()]

    assert seqnos() == [6, 5, 4, 3, 2, 1]
    assert seqnos("--limit", "2") == [6, 5]
    assert seqnos("--after", "4") == [6, 5]
    assert seqnos("--after", "2", "--reverse", "-n", "2") == [3, 4]
    assert seqnos("--after", "6") == []


def test_log_begins_where_the_log_does_and_refuses_what_is_gone(path: str) -> None:
    with kvwal.open(path, segment_bytes=16 << 10, background=False, keep_history_bytes=0) as db:
        for number in range(300):
            db.put(b"k", b"%d" % number * 100, durability="os")
            if number % 100 == 99:
                db.checkpoint()
        first = next(db.history()).seqno
    assert first > 100
    shown = [json.loads(line)["seqno"] for line in run("log", path, "--json").stdout.splitlines()]
    assert shown == list(range(300, first - 1, -1))
    for way in ([], ["--reverse"]):
        result = run("log", path, "--after", "3", *way, expect=2)
        assert f"kept are commits {first} of" in result.stderr
        assert run("log", path, "--after", f"{first - 1}", "-n", "1", *way).stdout


def test_log_backwards_over_many_windows_misses_and_repeats_nothing(path: str) -> None:
    with kvwal.open(path, durability="os") as db:
        for number in range(1, 1004):
            db.put(b"k", b"%d" % number)
    lines = run("log", path, "--json").stdout.splitlines()
    assert [json.loads(line)["seqno"] for line in lines] == list(range(1003, 0, -1))


def test_log_shows_every_kind_of_write_and_shortens_large_commits(path: str) -> None:
    with kvwal.open(path) as db:
        db.delete_range(b"a", b"b")
        db.delete_range(b"c")
        db.clear()
        db.delete(b"d")
        db.update({b"%03d" % n: b"v" * 100 for n in range(30)})
    output = run("log", path).stdout
    assert "delete from a to before b" in output
    assert "delete from c to the end" in output
    assert "delete from the first key to the end" in output
    assert "delete d" in output
    assert "... and 20 more" in output
    assert run("log", path, "--all").stdout.count("(100 B)") == 30
    ops = [json.loads(line)["intents"][0]["op"] for line in run("log", path, "--json").stdout.splitlines()]
    assert ops == ["put", "delete", "delete_range", "delete_range", "delete_range"]


def test_log_shows_who_and_why_and_finds_it(path: str) -> None:
    run("put", path, "k", "1")
    run("put", path, "k", "2", "--meta", "by=teller", "--meta", "why=a = b\x1b")
    lines = b'{"key": "a", "value": "1"}\n{"key": "b", "value": "2"}\n'
    run("load", path, "--meta", "by=import", "--batch", "1", stdin=lines)
    run("delete", path, "a", "--meta", "by=teller")
    run("delete", path, "--prefix", "b", "--meta", "by=")

    def found(*arguments: str) -> list[tuple[int, dict[str, str]]]:
        lines = map(json.loads, run("log", path, "--json", "--reverse", *arguments).stdout.splitlines())
        return [(line["seqno"], line["meta"]) for line in lines]

    said = {"by": "teller", "why": "a = b\x1b"}
    assert found()[:4] == [(1, {}), (2, said), (3, {"by": "import"}), (4, {"by": "import"})]
    assert found()[4:] == [(5, {"by": "teller"}), (6, {"by": ""})]
    assert [n for n, _ in found("--meta", "by=teller")] == [2, 5]
    assert [n for n, _ in found("--meta", "by=teller", "--meta", "why=a = b\x1b")] == [2]
    assert [n for n, _ in found("--meta", "by=")] == [6]
    assert found("--meta", "by=clerk") == []
    output = run("log", path, "--meta", "by=teller", "-n", "2").stdout
    assert [line for line in output.splitlines() if line.startswith(("commit", "Meta:"))] == [
        "commit 5",
        "Meta:  by=teller",
        "commit 2",
        "Meta:  by=teller",
        "Meta:  why=a = b\\x1b",
    ]
    changes = [json.loads(line)["meta"] for line in run("changes", path, "--json").stdout.splitlines()]
    assert changes[:2] == [{}, said]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["by"], "has no '=' in it"),
        (["by=teller", "by=clerk"], "'by' is given twice"),
        (["by=" + "x" * 4096], "the limit is 4096"),
        ([b"by=\xff"], "cannot be encoded in UTF-8"),
    ],
)
def test_pairs_that_cannot_be_kept_are_a_wrong_command_line(filled: str, texts: list[str], reason: str) -> None:
    options = [part for text in texts for part in ("--meta", text)]
    for command in (["put", filled, "k", "v"], ["delete", filled, "user:1"], ["load", filled], ["log", filled]):
        assert reason in " ".join(run(*command, *options, expect=2).stderr.split())
    with kvwal.open(filled) as db:
        assert db.last_seqno == 6


def test_changes_are_tabbed_lines_oldest_first(path: str) -> None:
    with kvwal.open(path) as db:
        db.update({b"a\tb": b"1\n", b"b": b""})
        db.delete(b"b")
        db.delete_range(b"c", b"d")
        db.delete_range(b"e")
    assert run("changes", path).stdout.splitlines() == [
        "1\t0\tput\ta\\tb\t1\\n",
        "1\t0\tput\tb\t",
        "2\t0\tdelete\tb",
        "3\t0\tdelete_range\tc\td",
        "4\t0\tdelete_range\te",
    ]


def test_changes_take_a_position_prefixes_and_a_limit(filled: str) -> None:
    def keys(*arguments: str) -> list[str]:
        return [line.split("\t")[3] for line in run("changes", filled, *arguments).stdout.splitlines()]

    assert keys("--after", "4") == ["user:4", "zebra"]
    assert keys("--prefix", "user:1", "--prefix", "z") == ["user:1", "zebra"]
    assert keys("-n", "2") == ["user:0", "user:1"]
    assert keys("--after", "6") == []
    assert "there is no commit 7" in run("changes", filled, "--after", "7", expect=2).stderr


def test_changes_as_json_give_back_the_same_bytes(path: str) -> None:
    with kvwal.open(path) as db:
        for data in AWKWARD:
            db[data] = data
        db.delete_range(b"a", b"b")
    found = [json.loads(line) for line in run("changes", path, "--json").stdout.splitlines()]
    assert [(from_json("key", each), from_json("value", each)) for each in found[:-1]] == [(d, d) for d in AWKWARD]
    assert from_json("stop", found[-1]) == b"b"
    assert [each["seqno"] for each in found] == list(range(1, len(AWKWARD) + 2))
    assert all((each["table"], each["meta"], each["last"]) == (0, {}, True) for each in found)
    assert found[0]["kind"] == "put"
    assert found[0]["time"].endswith("+00:00")


def test_consumers_are_tabbed_lines_or_objects(path: str) -> None:
    with kvwal.open(path) as db:
        for name in ("mailer", "index\tof"):
            db.consumer(name, ack_interval_s=0).close()
        db[b"a"] = b"1"
        with db.consumer("mailer") as feed:
            feed.ack(next(feed))
    lines = [line.split("\t") for line in run("consumers", path).stdout.splitlines()]
    assert [line[:4] for line in lines] == [["index\\tof", "stopped", "1", "1"], ["mailer", "stopped", "3", "0"]]
    assert {len(line) for line in lines} == {9}
    [index, mailer] = [json.loads(line) for line in run("consumers", path, "--json").stdout.splitlines()]
    assert (index["name"], index["lag_commits"], mailer["lag_commits"]) == ("index\tof", 1, 0)
    assert mailer["lag_s"] == 0
    with kvwal.open(path) as db, db.consumer("mailer", on_error="park") as feed:
        db[b"b"] = b"2"
        feed.project(lambda txn, changes: 1 // 0, timeout_s=0)
    lines = [line.split("\t") for line in run("consumers", path).stdout.splitlines()]
    assert [line[7] for line in lines] == ["0", "1"]
    [_, mailer] = [json.loads(line) for line in run("consumers", path, "--json").stdout.splitlines()]
    assert [parked["error"][:18] for parked in mailer["parked"]] == ["ZeroDivisionError:"]


@pytest.mark.parametrize("columns", [80, 40])
def test_on_a_terminal_consumers_and_figures_are_shown_whole(
    path: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.open(path) as db:
        line = db.position.line.hex()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("kvwal.cli.consumers.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setattr("kvwal.cli.terminal.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    empty = run("consumers", path)
    assert (empty.stdout, empty.stderr) == ("", "kvwal: there are no consumers\n")
    with kvwal.open(path) as db, db.consumer("mailer [/x] [b]", on_error="park") as feed:
        db[b"b"] = b"2"
        feed.project(lambda txn, changes: 1 // 0, timeout_s=0)
    shown = run("consumers", path).stdout
    assert all(word in shown for word in ("mailer [/x] [b]", "stopped", "lag commits", "held bytes", "last error"))
    assert max(map(len, shown.splitlines())) <= columns
    assert line in run("stats", path).stdout


def test_a_process_reads_beside_the_one_that_writes(filled: str) -> None:
    with kvwal.open(filled) as db:
        db.put(b"new", b"value")
        db.checkpoint()
        assert kvwal_process("get", filled, "new").stdout == b"value"


def test_changes_are_followed_as_they_come(path: str) -> None:
    with kvwal.open(path) as db:
        db.put(b"first", b"1")
        command = [sys.executable, "-m", "kvwal", "changes", path, "--follow", "-n", "2"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            assert following.stdout.readline() == "1\t0\tput\tfirst\t1\n"
            db.put(b"second", b"2")
            assert following.stdout.readline() == "2\t0\tput\tsecond\t2\n"
            assert following.wait(20) == 0


def test_every_command_that_reads_works_beside_a_writer_that_is_busy(path: str, tmp_path: Path) -> None:
    stop = threading.Event()
    with kvwal.open(path, keep_history_s=3600) as db:
        users = db.table("users", str, int)
        for n in range(50):
            db.put(b"key", b"%d" % n)
        users["ada"] = 1
        users["bob"] = 0
        db.checkpoint()

        def write() -> None:
            n = 0
            while not stop.is_set():
                n += 1
                users["bob"] = n
                if n % 50 == 0:
                    db.checkpoint()
                time.sleep(0.002)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for command, first in (
                (["get", path, "key"], "49"),
                (["get", path, "key", "--at", "7"], "6"),
                (["get", path, "ada", "--table", "users"], "1"),
                (["scan", path], "key\t49"),
                (["scan", path, "--keys", "--at", "7"], "key"),
                (["tables", path], "users\tstr\tcounter\t2"),
                (["changes", path, "-n", "1"], "1\t0\tput\tkey\t0"),
                (["log", path, "--reverse", "-n", "1"], "commit 1"),
                (["log", path, "-n", "1"], "commit "),
                (["history", path, "key", "-n", "1"], "50\t"),
                (["history", path, "ada", "--table", "users"], "51\t"),
                (["diff", path, "1", "50"], "-\tkey\t0"),
                (["diff", path, "51", "--table", "users", "--prefix", "ada"], ""),
                (["dump", path], '{"key": "key"'),
                (["dump", path, "--at", "7"], '{"key": "key"'),
                (["stats", path], ""),
                (["consumers", path], ""),
                (["verify", path], "everything holds"),
            ):
                done = run(*command)
                assert done.output.startswith(first), (command, done.output)
        finally:
            stop.set()
            writer.join()


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands, none of which outlives the test."""
    commands: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kvwal", *arguments]
        commands.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return commands[-1]

    yield start
    for each in commands:
        each.kill()
        each.wait()


def test_log_and_get_follow_what_comes(path: str, started: Callable[..., subprocess.Popen[str]]) -> None:
    with kvwal.open(path) as db:
        db.put(b"k", b"1\n")
        db.table("users", str, int)["ada"] = 1
        following = [
            started("get", path, "k", "--follow"),
            started("get", path, "ada", "--table", "users", "--follow", "--json"),
            started("log", path, "--follow", "--json", "--after", "1", "-n", "4"),
        ]
        lines = [iter(each.stdout) for each in following if each.stdout is not None]
        assert next(lines[0]) == "1\\n\n"
        assert json.loads(next(lines[1])) == {"key": "ada", "value": 1}
        assert json.loads(next(lines[2]))["seqno"] == 2
        db.put(b"other", b"")
        db.put(b"k", b"2")
        db.put(b"k2", b"not this")
        db.delete(b"k")
        db.put(b"k", b"3")
        assert [next(lines[0]) for _ in range(2)] == ["2\n", "3\n"]
        db.table("users", str, int)["ada"] = 2
        db.table("users", str, int).clear()
        assert json.loads(next(lines[1]))["value"] == 2
        assert json.loads(next(lines[1])) == {"key": "ada"}
        assert [json.loads(next(lines[2]))["seqno"] for _ in range(3)] == [3, 4, 5]
        assert following[2].wait(20) == 0
        for each in following[:2]:
            each.send_signal(signal.SIGINT)
            assert each.wait(20) == 130
        assert following[0].stderr is not None
        assert following[0].stderr.read() == "kvwal: no such key: k\nkvwal: interrupted\n"
        for each in following:
            each.communicate()
        gone = started("get", path, "k", "--follow")
        assert gone.stdout is not None
        assert gone.stdout.readline() == "3\n"
        gone.stdout.close()
        db.put(b"k", b"4")
        assert gone.wait(20) == 141
        run("get", path, "k", "--follow", "--at", "1", expect=2)
        assert gone.stderr is not None
        gone.stderr.close()


def test_history_is_tabbed_lines_newest_first(path: str) -> None:
    with kvwal.open(path) as db:
        db.update({b"a\tb": b"1\n", b"b": b""})
        db.delete(b"a\tb")
        db.delete_range(b"a", b"b")
    lines = [line.split("\t") for line in run("history", path, b"a\tb").stdout.splitlines()]
    assert [(line[0], *line[2:]) for line in lines] == [("3", "range"), ("2", "delete"), ("1", "put", "1\\n")]
    assert all(line[1].endswith("+00:00") for line in lines)

    def seqnos(*arguments: str) -> list[str]:
        return [line.split("\t")[0] for line in run("history", path, b"a\tb", *arguments).stdout.splitlines()]

    assert seqnos("--reverse") == ["1", "2", "3"]
    assert seqnos("-n", "1") == ["3"]
    assert seqnos("--since", "2") == ["3", "2"]
    assert seqnos("--until", "2") == ["2", "1"]
    assert run("history", path, "never").stdout == ""


def test_history_of_what_is_not_kept_is_exit_code_2(path: str) -> None:
    with kvwal.open(path, segment_bytes=1 << 16, keep_history_bytes=0) as db:
        for _ in range(3):
            db.put(b"k", bytes(100_000))
            db.checkpoint()
    assert "no longer all kept" in run("history", path, "k", "--since", "1", expect=2).stderr


def test_history_as_json_gives_back_the_same_bytes(path: str) -> None:
    with kvwal.open(path) as db:
        for data in AWKWARD:
            db[b"k"] = data
        db.delete(b"k")
    found = [json.loads(line) for line in run("history", path, "k", "--json", "--reverse").stdout.splitlines()]
    assert [from_json("value", each) for each in found[:-1]] == AWKWARD
    assert [each["kind"] for each in found] == ["put"] * len(AWKWARD) + ["delete"]
    assert "value" not in found[-1]
    assert all(each["meta"] == {} and each["time_us"] > 0 for each in found)


def test_each_time_that_is_printed_is_one_that_is_taken(path: str, tmp_path: Path) -> None:
    run("put", path, "k", "first")
    run("put", path, "k", "second")
    run("backup", path, str(tmp_path / "b"))
    oldest_first = (("log", path, "--reverse"), ("changes", path), ("history", path, "k", "--reverse"))
    printed = [json.loads(run(*each, "--json", "-n", "1").stdout)["time"] for each in oldest_first]
    printed.append(run("history", path, "k", "--reverse").stdout.split("\t")[1])
    printed += re.findall("Date:  (.+)", run("log", path, "--reverse", "-n", "1").stdout)
    assert len(printed) == 5
    for text in printed:
        assert run("get", path, "k", "--at", text).stdout == "first"
        assert datetime.fromisoformat(text).tzinfo is not None
    found = json.loads(run("archive", "status", str(tmp_path / "b"), "--json").stdout)
    newest = found["lines"][0]["newest_time"]
    assert datetime.fromisoformat(newest).isoformat() == newest
    assert run("get", path, "k", "--at", newest).stdout == "second"


def test_stats_are_tabbed_lines_in_a_pipe_and_an_object_as_json(filled: str) -> None:
    lines = dict(line.split("\t") for line in run("stats", filled).stdout.splitlines())
    assert lines["entries"] == "6"
    assert lines["recovery.last_seqno"] == "6"
    stats = json.loads(run("stats", filled, "--json").stdout)
    assert stats["entries"] == 6
    assert stats["recovery"]["last_seqno"] == 6


def test_stats_prints_the_position_that_changes_and_log_go_on_after(path: str, tmp_path: Path) -> None:
    with kvwal.open(path) as db:
        db[b"a"] = b"1"
    position = json.loads(run("stats", path, "--json").stdout)["position"]
    assert f"position\t{position}\n" in run("stats", path).stdout
    with kvwal.open(path) as db:
        db[b"b"] = b"2"
    for command in (["changes"], ["log"], ["log", "--reverse"]):
        shown = run(*command, path, "--after", position, "--json").stdout.splitlines()
        assert [json.loads(line)["seqno"] for line in shown] == [2]
        assert shown == run(*command, path, "--after", "1", "--json").stdout.splitlines()
    with kvwal.open(tmp_path / "other") as db:
        db[b"a"] = b"1"
    refused = run("changes", str(tmp_path / "other"), "--after", position, expect=2)
    assert f"{position} is on another line" in refused.stderr
    for text in ("1:2", "foo"):
        said = run("changes", path, "--after", text, expect=2).stderr
        assert f"'{text}' is no position, LINE:SEQNO as kvwal stats shows it, and no seqno" in " ".join(said.split())
    # As a moment, too.
    for command in (["scan", path], ["dump", path]):
        assert run(*command, "--at", position).stdout == run(*command, "--at", "1").stdout
    assert run("get", path, "a", "--at", position).stdout == "1"
    assert run("diff", path, position, "--json").stdout == '{"key": "b", "new": "2"}\n'
    assert "another line" in run("get", str(tmp_path / "other"), "a", "--at", position, expect=2).stderr
    assert "no LINE:SEQNO" in run("get", path, "a", "--at", "1:2", expect=2).stderr


def test_verify_of_a_sound_store_is_exit_code_0(filled: str) -> None:
    assert "everything holds" in run("verify", filled).stdout
    assert json.loads(run("verify", filled, "--json").stdout)["problems"] == []


def test_verify_says_what_is_damaged_and_not_lost_with_exit_code_0(path: str) -> None:
    with kvwal.open(path, background=False, segment_bytes=16 << 10, durability="os") as db:
        for number in range(100):
            db.put(b"%d" % number, bytes(500))
        assert list(db.versions(b"7"))
    index = next(Path(path).glob("*.keys"))
    index.write_bytes(index.read_bytes()[:-1])
    lines = run("verify", path).stdout.splitlines()
    assert lines[0].startswith(f"not lost: {index.name}: the key index is not as it was written; it is derived")
    assert lines[1].startswith("everything holds")
    report = json.loads(run("verify", path, "--json").stdout)
    assert (report["problems"], len(report["derived"])) == ([], 1)


def test_checkpoint_brings_every_commit_into_the_pages(filled: str) -> None:
    assert "up to 6" in run("checkpoint", filled).stdout
    with kvwal.open(filled, "r") as db:
        assert db.recovery.checkpoint_seqno == 6
        assert db.recovery.commits == 0


def test_compact_gives_space_back_and_says_how_much(path: str) -> None:
    with kvwal.open(path, background=False, durability="os") as db:
        db.update({b"%06d" % number: b"x" * 200 for number in range(10_000)})
        db.checkpoint()
        db.delete_range(None, b"009990")
    before = (Path(path) / "data").stat().st_size
    freed = json.loads(run("compact", path, "--json").stdout)["freed_bytes"]
    after = (Path(path) / "data").stat().st_size
    assert freed == before - after > 1_000_000
    assert "0 B given back" in run("compact", path).stdout
    assert "entries\t10" in run("stats", path).stdout
    run("compact", str(Path(path) / "none"), expect=5)


def test_a_compaction_that_lets_the_pages_grow_says_so(path: str) -> None:
    run("put", path, "k", "v")
    assert run("compact", path).stdout.startswith("the pages grew by 4.1 kB from the log; the pages take 12.3 kB")


def test_a_damaged_store_is_exit_code_3_and_salvage_saves_the_rest(filled: str, tmp_path: Path) -> None:
    segment = min(Path(filled).glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[data.index(b"name 2")] ^= 1
    segment.write_bytes(data)
    result = run("get", filled, "user:1", expect=3)
    assert segment.name in result.stderr
    into = str(tmp_path / "saved.kv")
    assert "keys saved" in run("salvage", filled, into, expect=3).stdout
    with kvwal.open(into, "r") as db:
        assert db[b"user:1"] == b"name 1"
        assert b"user:2" not in db
        assert db[b"user:4"] == b"name 4"


def test_a_store_that_another_process_has_is_exit_code_4(filled: str) -> None:
    with kvwal.open(filled):
        result = kvwal_process("put", filled, "a", "b")
    assert result.returncode == 4
    assert str(os.getpid()).encode() in result.stderr


def test_no_store_is_exit_code_5(path: str, tmp_path: Path) -> None:
    assert "no store" in run("get", path, "a", expect=5).stderr
    assert not Path(path).exists()
    (tmp_path / "file").write_text("not a store")
    run("get", str(tmp_path / "file"), "a", expect=5)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data.csv").write_text("1,2")
    run("put", str(tmp_path / "foreign"), "a", "b", expect=5)


@pytest.mark.parametrize("what", ["missing", "file", "foreign"])
@pytest.mark.parametrize(
    "command", ["scan", "stats", "stats --json", "log", "log -f", "changes -f", "tables", "verify", "checkpoint"]
)
def test_each_command_says_alike_that_there_is_no_store(tmp_path: Path, command: str, what: str) -> None:
    (tmp_path / "file").write_text("not a store")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "data.csv").write_text("1,2")
    name, *options = command.split()
    at = str(tmp_path / what)
    assert run(name, at, *options, expect=5).stderr == run("get", at, "a", expect=5).stderr


def test_a_store_whose_making_was_cut_off_is_no_store_yet(path: str) -> None:
    """A kill between the first segment and the page file, which is renamed last: nothing was ever acknowledged."""
    kvwal.open(path).close()
    (Path(path) / "data").rename(Path(path) / "data.tmp")
    run("get", path, "a", expect=5)
    run("delete", path, "a", expect=5)
    run("put", path, "a", "b")
    assert run("get", path, "a").stdout == "b"


@pytest.mark.skipif(os.name == "nt" or os.getuid() == 0, reason="permissions do not stop the superuser")
def test_a_directory_that_cannot_be_entered_is_exit_code_6(filled: str) -> None:
    os.chmod(filled, 0)
    try:
        run("get", filled, "a", expect=6)
    finally:
        os.chmod(filled, 0o700)


def test_no_permission_to_write_is_exit_code_6_and_no_mistake_of_the_command_line(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise kvwal.ReadOnlyError("no permission to write in it")

    monkeypatch.setattr(kvwal, "open", refuse)
    assert run("put", filled, "a", "b", expect=6).stderr == "kvwal: no permission to write in it\n"


def test_files_that_may_not_be_opened_are_not_said_to_be_readable(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", filled)

    monkeypatch.setattr("kvwal.files.directory.SystemDirectory.lock", refused)
    said = f"no permission to write in {filled}; commands that only read it may be allowed"
    assert run("put", filled, "a", "b", expect=6).stderr == f"kvwal: {said}\n"


def test_what_the_system_said_is_told_without_its_number(
    path: str, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Errno" not in run("get", str(Path(path) / "none"), "a", expect=5).stderr

    def refuse(*_: object, **__: object) -> None:
        raise kvwal.RefusedError(24, "too many open files", "/a.kv/data")

    monkeypatch.setattr(kvwal, "open", refuse)
    assert run("get", filled, "a", expect=6).stderr == "kvwal: /a.kv/data: too many open files\n"


def test_a_key_that_is_too_long_is_a_mistake_of_the_command_line(filled: str) -> None:
    long = "k" * (kvwal.MAX_KEY_BYTES + 1)
    for arguments in (
        ["get", filled, long],
        ["put", filled, long, "v"],
        ["delete", filled, long],
        ["delete", filled, "--prefix", long],
        ["scan", filled, "--start", long],
        ["dump", filled, "--prefix", long],
    ):
        assert f"the limit is {kvwal.MAX_KEY_BYTES}" in run(*arguments, expect=2).stderr
    assert "entries\t6" in run("stats", filled).stdout


def test_a_wrong_command_line_is_exit_code_2(path: str) -> None:
    run("get", path, expect=2)
    run("nonsense", expect=2)
    run("put", path, "k", "v", "--file", "-", expect=2)


def test_a_bug_is_exit_code_70_with_its_traceback(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise kvwal.InternalError("a rule was broken")

    monkeypatch.setattr(kvwal, "open", broken)
    result = run("get", filled, "a", expect=70)
    assert "a rule was broken" in result.stderr
    assert "report it" in result.stderr


def test_a_reader_that_goes_away_is_quiet_and_exit_code_141(path: str) -> None:
    with kvwal.open(path, keep_history_bytes=1 << 30) as db:
        db.update({b"%06d" % n: b"v" * 50 for n in range(20_000)})
    for command in (["scan"], ["dump"], ["log", "--all"], ["changes"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "kvwal", *command, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait(timeout=60) == 141, command


def test_without_click_the_message_says_what_to_install() -> None:
    code = "import sys; sys.modules['click'] = None; from kvwal.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 69
    assert result.stderr.strip() == "kvwal: the command line needs click; install it with: pip install 'kvwal[cli]'"


def test_every_command_has_help() -> None:
    for name in whole_app().commands:
        assert "Usage:" in run(name, "--help").stdout
    assert kvwal_process("--version").stdout.startswith(b"kvwal, version ")


@pytest.mark.parametrize("command", ["scan", "dump", "log"])
def test_an_output_that_is_full_is_one_message_and_exit_code_6(path: str, command: str) -> None:
    with kvwal.open(path) as db:
        db[b"a"] = b"1"
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-m", "kvwal", command, path], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert (result.returncode, result.stderr.count(b"\n")) == (6, 1), result.stderr
    assert result.stderr.startswith(b"kvwal: the output cannot be written: No space left on device")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("verify", 6),
        ("scan", 6),
        ("stats --json", 6),
        ("put key value", 0),
        ("get key", 6),
        ("get no-such-key", 1),
        ("--help", 6),
        ("--version", 6),
        ("get --help", 6),
    ],
)
def test_what_cannot_be_printed_since_the_output_is_closed_is_exit_code_6(
    path: str, command: str, expected: int
) -> None:
    with kvwal.open(path) as db:
        db[b"key"] = b"value"
    name, *more = command.split()
    arguments = [sys.executable, "-m", "kvwal", name, *([] if "-" in command[:1] else [path]), *more]
    line = f"exec {shlex.join(arguments)} >&-"
    result = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, timeout=60, check=False)
    assert result.returncode == expected, result.stderr
    assert b"Traceback" not in result.stderr
    if expected == 6:
        assert result.stderr == b"kvwal: standard output: it is closed\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["get", "--help"]])
def test_a_help_that_cannot_be_written_is_told_as_any_output(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "kvwal", *arguments]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert result.returncode == 6
    assert result.stderr == b"kvwal: the output cannot be written: No space left on device\n"
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")
