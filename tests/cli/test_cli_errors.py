"""What a shell's user is told: of closed pipes, of what other programs alone can do, and by which exit code."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click
import pytest
from click.testing import CliRunner

import kvwal
from kvwal import codecs
from kvwal.__main__ import whole_app
from kvwal.cli.app import _WORDS
from kvwal.log.key_history import Kind

UPCASTERS = """
import sys
from kvwal import codecs
leaves = codecs.versioned(codecs.json(dict, name="Note"), version=2, upcasters={1: lambda old: sys.exit(0)})
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    place = str(tmp_path / "kv")
    with kvwal.open(place) as db:
        people = db.table("people", str, codecs.json())
        people.index("by_city", key=lambda person: person.get("city"), codec=str)
        people["ada"] = {"city": "London"}
        db.table("notes", str, codecs.versioned(codecs.json(dict, name="Note"), version=1))["a"] = {}
    return place


def shell(line: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run a command line, in which K is `kvwal` and P is the store."""
    script = f'K="{sys.executable} -m kvwal"; P="{path}"; {line}'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", ["load $P", "put $P key"])
def test_to_read_a_closed_input_is_exit_code_6(path: str, command: str) -> None:
    result = shell(f"$K {command} <&-", path)
    assert (result.returncode, result.stderr) == (6, "kvwal: standard input: it is closed\n")


def test_a_closed_input_is_no_terminal(path: str) -> None:
    result = shell("$K table drop $P people <&-", path)
    assert result.returncode == 2
    assert "give --yes" in result.stderr
    assert shell("$K get $P --table people ada <&-", path).returncode == 0


def test_a_reader_of_followed_changes_that_goes_away_ends_the_command_without_another_change(path: str) -> None:
    result = shell("{ timeout 30 $K changes $P --follow; echo $? >&2; } | head -n 1", path)
    assert (len(result.stdout.splitlines()), result.stderr) == (1, "141\n")


@pytest.mark.parametrize(
    ("error", "asked", "code"),
    [
        (kvwal.SnapshotTooOld(4, 7, 9), ["--at", "4"], 2),
        (kvwal.SnapshotTooOld(4, 7, 9), [], 6),
        # It was there.
        (kvwal.SnapshotTooOld(4, 4, 4, while_read=True), ["--at", "1"], 6),
        (kvwal.SnapshotTooOld(4, 4, 4, limit_bytes=1), ["--at", "1"], 6),
        (kvwal.FeedGap(4, 7, 9), [], 6),
    ],
)
def test_what_went_by_itself_is_no_mistake_in_the_command_line(
    path: str, monkeypatch: pytest.MonkeyPatch, error: kvwal.Error, asked: list[str], code: int
) -> None:
    def gone(*arguments: object, **keywords: object) -> None:
        raise error

    monkeypatch.setattr("kvwal.Store.scan", gone)
    monkeypatch.setattr("kvwal.Snapshot.scan", gone)
    result = CliRunner().invoke(whole_app(), ["scan", path, *asked])
    assert result.exit_code == code, result.output
    assert "with a pin" not in result.output


def test_what_to_do_is_said_in_the_words_of_a_shell(path: str, tmp_path: Path) -> None:
    none = CliRunner().invoke(whole_app(), ["get", str(tmp_path / "none"), "k"])
    assert (none.exit_code, "`kvwal put` makes one" in none.output, '"c"' in none.output) == (5, True, False)
    nowhere = CliRunner().invoke(whole_app(), ["put", str(tmp_path / "none" / "kv"), "k", "v"])
    assert (nowhere.exit_code, "make it first" in nowhere.output, "parents" in nowhere.output) == (5, True, False)
    for log in Path(path).glob("*.log"):
        log.write_bytes(b"damaged" * 1000)
    damaged = CliRunner().invoke(whole_app(), ["get", path, "k"])
    assert (damaged.exit_code, "kvwal salvage PATH INTO" in damaged.output) == (3, True)


def test_an_interrupt_while_modules_are_loaded_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise KeyboardInterrupt")
    command = f'PYTHONPATH="{tmp_path}:$PYTHONPATH" $K --help'
    result = shell(command, "none")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "kvwal: interrupted\n")


@pytest.mark.parametrize(
    ("command", "arguments", "advice"),
    [
        ("get", ["--table", "none", "k"], "; `kvwal tables PATH` lists those that there are"),
        ("put", ["--table", "people", "b", "{}"], "; only a program that declares the index can put something into"),
        ("changes", ["--after", "99"], "; without --after it begins with the oldest that is kept"),
    ],
)
def test_an_error_says_what_to_do_on_the_command_line(
    path: str, command: str, arguments: list[str], advice: str
) -> None:
    result = CliRunner().invoke(whole_app(), [command, path, *arguments])
    assert result.exit_code == 2
    assert advice in result.output
    assert "()" not in result.output


def test_what_may_not_be_read_is_told_by_what_reads_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *arguments, **keywords: False)
    assert CliRunner().invoke(whole_app(), ["scan", path]).exit_code == 0

    def refused(*arguments: object, **keywords: object) -> None:
        raise kvwal.RefusedError(errno.EACCES, "no permission", path)

    monkeypatch.setattr("kvwal.open", refused)
    result = CliRunner().invoke(whole_app(), ["scan", path])
    assert (result.exit_code, result.output) == (6, f"kvwal: {path}: no permission\n")


def paths_of(command: click.Command, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each command with each of its arguments that is a path, and each option."""
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from paths_of(each, (*names, name))
    for param in command.params:
        if isinstance(param.type, click.Path):
            assert param.name is not None
            yield names, param.name


@pytest.mark.parametrize(("names", "empty"), [*paths_of(whole_app())])
def test_an_empty_path_is_a_mistake_in_the_command_line(
    path: str, tmp_path: Path, names: tuple[str, ...], empty: str
) -> None:
    command: click.Command = whole_app()
    for name in names:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    arguments = []
    for param in command.params:
        if isinstance(param, click.Argument) and (param.required or param.name == empty):
            there = path if param.name == "path" else str(tmp_path) if param.name == "dest" else "1..2"
            arguments.append("" if param.name == empty else there)
        elif param.name == empty or param.required:
            arguments += [param.opts[0], "" if param.name == empty else "json:loads"]
    result = CliRunner().invoke(whole_app(), [*names, *arguments])
    assert result.exit_code == 2, result.output
    assert "the path is empty" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "P", "--limit", str(1 << 64)],
        ["log", "P", "--limit", str(1 << 64)],
        ["changes", "P", "--limit", str(1 << 64)],
        ["history", "P", "k", "--limit", str(1 << 64)],
        ["archive", "verify", "D", "--budget", "nan"],
        ["archive", "verify", "D", "--budget", "-1"],
        ["archive", "prune", "D", "--pitr-days", "nan"],
        ["demo", "--seconds", "nan"],
    ],
)
def test_a_number_that_cannot_be_is_a_mistake_in_the_command_line(
    path: str, tmp_path: Path, arguments: list[str]
) -> None:
    there = {"P": path, "D": str(tmp_path)}
    result = CliRunner().invoke(whole_app(), [there.get(each, each) for each in arguments])
    assert result.exit_code == 2, result.output


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("--at", ["get", "P", "k", "--at", "99"]),
        ("--at", ["scan", "P", "--at", "2999-01-01T00:00:00Z"]),
        ("--at", ["dump", "P", "--at", "99"]),
        ("A", ["diff", "P", "99"]),
        ("B", ["diff", "P", "1", "99"]),
        ("B", ["diff", "P", "1", "99", "--table", "people"]),
        ("KEY", ["get", "P", "zz", "--hex"]),
        ("KEY", ["delete", "P", "zz", "--hex"]),
        ("KEY", ["history", "P", "1", "--table", "numbers", "--base64"]),
        ("KEY", ["put", "P", "x", "1", "--table", "numbers"]),
        ("VALUE", ["put", "P", "00", "zz", "--hex"]),
        ("VALUE", ["put", "P", "1", "{", "--table", "numbers"]),
        ("--start", ["scan", "P", "--start", "zz", "--hex"]),
        ("--stop", ["scan", "P", "--stop", "k" * (1 << 16)]),
        ("--stop", ["scan", "P", "--table", "numbers", "--start", "1", "--stop", "x"]),
        ("--prefix", ["scan", "P", "--prefix", "1", "--table", "numbers"]),
        ("--prefix", ["delete", "P", "--prefix", "zz", "--hex"]),
        ("--prefix", ["changes", "P", "--prefix", "zz", "--hex"]),
        ("--prefix", ["dump", "P", "--prefix", "zz", "--hex"]),
        ("--prefix", ["diff", "P", "1", "--prefix", "zz", "--hex"]),
        ("--table", ["scan", "P", "--table", "t" * 256]),
        ("--table", ["load", "P", "--table", ""]),
        ("NAME", ["table", "drop", "P", ""]),
        ("OLD", ["table", "rename", "P", "", "new"]),
        ("NEW", ["table", "rename", "P", "people", ""]),
        ("--pitr-days", ["archive", "prune", "D", "--pitr-days", "-1"]),
        ("--daily", ["archive", "prune", "D", "--daily", "-1"]),
        ("--monthly", ["archive", "prune", "D", "--monthly", "-1"]),
        ("FIRST..LAST", ["archive", "accept-gap", "D", "5..x", "--reason", "r"]),
        ("--reason", ["archive", "accept-gap", "D", "1..2", "--reason", " "]),
    ],
)
def test_a_bad_value_is_that_of_the_option_as_it_is_typed(
    path: str, tmp_path: Path, named: str, arguments: list[str]
) -> None:
    with kvwal.open(path) as db:
        db.table("numbers", int, codecs.json())[1] = 1
    there = {"P": path, "D": str(tmp_path)}
    result = CliRunner().invoke(whole_app(), [there.get(each, each) for each in arguments])
    assert result.exit_code == 2, result.output
    assert re.search(rf"Invalid value for '?{re.escape(named)}'?: ", result.output), result.output


def test_an_upcaster_that_ends_the_program_does_not_say_how(path: str, tmp_path: Path) -> None:
    (tmp_path / "notes_app.py").write_text(UPCASTERS)
    command = f"cd {tmp_path}; $K migrate $P --table notes --codec notes_app:leaves"
    result = shell(command, path)
    assert (result.returncode, result.stdout) == (8, "")
    assert result.stderr == "kvwal: a codec ended the program, with SystemExit(0)\n"


def test_codecs_of_one_name_are_told_apart_by_their_versions(path: str) -> None:
    newer = codecs.versioned(codecs.json(dict, name="Note"), version=2, upcasters={1: dict})
    with kvwal.open(path) as db:
        db.table("notes", str, newer)["b"] = {}
        with pytest.raises(kvwal.TableCodecError) as refused:
            db.table("notes", str, codecs.versioned(codecs.json(dict, name="Note"), version=1))
    error = refused.value
    assert (error.has, error.asked) == ("versioned(json[Note]) (version 2)", "versioned(json[Note]) (version 1)")


def test_the_words_that_are_said_in_other_ones_in_a_shell_are_those_of_the_errors() -> None:
    root = Path(kvwal.__file__).parent
    sources = [path.read_text() for path in root.rglob("*.py") if path.parent.name != "cli"]
    # A text may go on in the next line.
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    assert len(_WORDS) > 3
    for words, _ in _WORDS:
        assert words in joined, words


@pytest.mark.parametrize("text", ["2026-01-31", "2026-01-31T12:30"])
def test_a_time_without_a_zone_is_refused_with_one_that_is_taken(path: str, text: str) -> None:
    with kvwal.open(path) as db:
        db.put(b"k", b"v")
    refused = CliRunner().invoke(whole_app(), ["get", path, "k", "--at", text])
    assert refused.exit_code == 2
    found = re.search(r"has no time zone; (\S+) is UTC", refused.output)
    assert found is not None
    taken = CliRunner().invoke(whole_app(), ["get", path, "k", "--at", found[1]])
    assert "time zone" not in taken.output
    assert "no time such" not in taken.output


def test_the_help_of_history_has_every_kind_of_a_version() -> None:
    said = CliRunner().invoke(whole_app(), ["history", "--help"]).output
    assert all(f'"{kind}"' in said for kind in get_args(Kind))


@pytest.mark.parametrize("command", [["plan"], ["status"], ["verify"], ["prune"]])
def test_a_destination_without_a_backup_is_named(tmp_path: Path, command: list[str]) -> None:
    missing = str(tmp_path / "missing")
    result = CliRunner().invoke(whole_app(), ["archive", *command, missing])
    assert result.exit_code == 5
    assert f"kvwal: {missing} holds no backup" in result.stderr


def test_a_commit_beyond_the_newest_is_refused_by_each_command(path: str) -> None:
    with kvwal.open(path) as db:
        newest = int(db.put(b"k", b"v"))
    for command in (["history", path, "k", "--since"], ["changes", path, "--after"], ["log", path, "--after"]):
        known = newest + 1 if command[0] == "history" else newest
        assert CliRunner().invoke(whole_app(), [*command, str(known)]).output == ""
        refused = CliRunner().invoke(whole_app(), [*command, str(known + 1)])
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert f"there is no commit {known + 1}" in refused.stderr


def test_log_does_not_follow_and_go_in_reverse(path: str) -> None:
    refused = CliRunner().invoke(whole_app(), ["log", path, "--follow", "--reverse"])
    assert refused.exit_code == 2
    assert "give --follow, which is oldest first, or --reverse" in refused.output


def test_a_negative_number_is_a_key_as_the_help_says(path: str) -> None:
    with kvwal.open(path) as db:
        db.table("years", int, int)[-5] = 7
    for command in ("get", "put", "delete", "history"):
        assert "`-- -5`" in CliRunner().invoke(whole_app(), [command, "--help"]).output
    found = CliRunner().invoke(whole_app(), ["get", path, "--table", "years", "--", "-5"])
    assert (found.exit_code, found.stdout) == (0, "7\n")


@pytest.mark.parametrize(
    "command",
    [["delete", "P", "k"], ["checkpoint", "P"], ["compact", "P"], ["put", "P", "k", "v", "--table", "t"]],
)
def test_a_command_that_makes_no_store_leaves_nothing_in_an_empty_directory(
    tmp_path: Path, command: list[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = CliRunner().invoke(whole_app(), [str(empty) if each == "P" else each for each in command])
    assert result.exit_code == 5
    assert "there is no store" in result.stderr
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"key": "a", "value": "1"}\n'.encode("utf-16"), "line 1: it is not UTF-8: byte 1 of it is 0xff"),
        (b'{"key": "\xe9", "value": "1"}\n', "line 1: it is not UTF-8: byte 10 of it is 0xe9"),
    ],
)
def test_an_input_of_load_that_is_not_utf8_is_told_so(tmp_path: Path, data: bytes, said: str) -> None:
    result = CliRunner().invoke(whole_app(), ["load", str(tmp_path / "new")], input=data)
    assert result.exit_code == 7
    assert result.stderr == f"kvwal: {said}; nothing was put into the store\n"


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "nothing was put into the store"),
        (1, "the entry before it is in the store"),
        (2, "the 2 entries before it are in the store"),
    ],
)
def test_load_counts_entries_in_words(tmp_path: Path, number: int, said: str) -> None:
    lines = [f'{{"key": "{n}", "value": ""}}' for n in range(number)]
    result = CliRunner().invoke(whole_app(), ["load", str(tmp_path / "new")], input="\n".join([*lines, "x"]))
    assert result.exit_code == 7
    assert result.stderr.endswith(f"; {said}\n")
    done = CliRunner().invoke(whole_app(), ["load", str(tmp_path / "other")], input="\n".join(lines))
    assert done.stderr.startswith("kvwal: 1 entry loaded;" if number == 1 else f"kvwal: {number} entries loaded;")


def test_verify_says_how_many_keys_of_the_log_it_compared_with_the_pages(tmp_path: Path) -> None:
    path = str(tmp_path / "new")
    kvwal.open(path).close()

    def told() -> str:
        return CliRunner().invoke(whole_app(), ["verify", path]).stdout

    assert re.match(r"everything holds: 2 pages and the log, of which 0 keys compared with them, in 0\.\d\d s$", told())
    with kvwal.open(path) as db:
        db.update({b"a": b"1"})
        db.checkpoint()
    assert "and the log, of which 1 key compared with them, in" in told()
