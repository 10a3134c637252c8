"""Tables on the command line: keys and values as what they are, in and out."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result

import kvwal
from kvwal import codecs
from kvwal.__main__ import whole_app

WHEN = datetime(2026, 1, 31, 12, tzinfo=UTC)
ID = UUID("12345678-1234-5678-1234-567812345678")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "cli.kv")


def run(*arguments: str, expect: int = 0, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(whole_app(), arguments, input=stdin)
    assert result.exit_code == expect, (result.output, result.stderr, result.exception)
    return result


CASES: list[tuple[Any, Any, str, str, Any, Any]] = [
    (str, "a\tb", "a\tb", "a\\tb", "a\tb", str),
    (int, -300, "-300", "-300", -300, int),
    (codecs.int64, 7, "7", "7", 7, int),
    (float, 1.5, "1.5", "1.5", 1.5, float),
    (bool, True, "true", "true", True, bool),
    (UUID, ID, str(ID), str(ID), str(ID), UUID),
    (datetime, WHEN, WHEN.isoformat(), WHEN.isoformat(), str(WHEN), datetime),
    (tuple[str, int], ("ada", 7), "('ada', 7)", "('ada', 7)", ["ada", 7], str),
    (bytes, b"\xff", "\udcff", "\\xff", None, bytes),
]


@pytest.mark.parametrize(("kind", "value", "text", "shown", "plain", "value_kind"), CASES)
def test_keys_and_values_are_shown_and_read_as_what_they_are(
    path: str, kind: Any, value: Any, text: str, shown: str, plain: Any, value_kind: Any
) -> None:
    with kvwal.open(path) as db:
        db.table("t", kind, codecs.json())[value] = 0
        db.table("values", str, value_kind)
        if kind is value_kind:
            db.table("values", str, kind)["k"] = value
    run("put", path, "--table", "t", "--", text, '{"a": [1, "\u00e9"]}')
    with kvwal.open(path, "r") as db:
        assert db.table("t", kind, codecs.json()) == {value: {"a": [1, "\u00e9"]}}
    assert run("scan", path, "--table", "t").stdout == f'{shown}\t{{"a": [1, "\u00e9"]}}\n'
    assert run("scan", path, "--table", "t", "--keys").stdout == f"{shown}\n"
    found = json.loads(run("scan", path, "--table", "t", "--json").stdout)
    assert found["value"] == {"a": [1, "\u00e9"]}
    if plain is not None:
        assert found["key"] == plain
    assert run("get", path, "--table", "t", "--", text).stdout == '{"a": [1, "\u00e9"]}\n'
    if kind is value_kind and kind is not bytes:
        run("put", path, "--table", "values", "--", "k", text)
        assert run("get", path, "--table", "values", "k").stdout == f"{shown}\n"
    run("delete", path, "--table", "t", "--", text)
    assert run("scan", path, "--table", "t").stdout == ""
    run("delete", path, "--table", "t", "--", text, expect=1)
    run("get", path, "--table", "t", "--", text, expect=1)


@pytest.fixture
def orders(path: str) -> str:
    with kvwal.open(path) as db:
        orders = db.table("orders", tuple[str, int], codecs.counter)
        orders.update({("ada", 9): 1, ("ada", 10): 2, ("grace", 1): 3})
        orders["ada", 9] = 4
        db.table("users", str, codecs.json())["ada"] = {"born": 1815}
    return path


def test_the_tables_are_listed(orders: str) -> None:
    assert run("tables", orders).stdout == "orders\ttuple[str, int]\tcounter\t3\nusers\tstr\tjson\t1\n"
    rows = [json.loads(line) for line in run("tables", orders, "--json").stdout.splitlines()]
    assert rows[1] == {"name": "users", "id": 17, "key": "str", "value": "json", "keys": 1, "indexes": []}


def test_the_indexes_of_a_table_are_listed_and_puts_name_the_one_that_is_not_declared(orders: str) -> None:
    with kvwal.open(orders) as db:
        users = db.table("users", str, codecs.json())
        users.index("by_born", key=lambda user: None, codec=int)
        users.index("by_name", key=lambda user: ["a", "b"], codec=str, many=True).wait()
    assert run("tables", orders).stdout.splitlines()[1] == "users\tstr\tjson\t1\tby_born: int; by_name: str"
    rows = [json.loads(line) for line in run("tables", orders, "--json").stdout.splitlines()]
    assert rows[1]["indexes"][1] == {"name": "by_name", "codec": "str", "entries": 2, "ready": True}
    assert "index 'by_born'" in run("put", orders, "--table", "users", "ada", "{}", expect=2).stderr
    run("delete", orders, "--table", "users", "ada")
    run("verify", orders)


def test_ranges_and_past_moments_of_a_table(orders: str) -> None:
    def keys(*arguments: str) -> list[str]:
        return run("scan", orders, "--table", "orders", "--keys", *arguments).stdout.splitlines()

    assert keys() == ["('ada', 9)", "('ada', 10)", "('grace', 1)"]
    assert keys("--prefix", "'ada'") == keys("--prefix", "('ada',)") == ["('ada', 9)", "('ada', 10)"]
    assert keys("--start", "('ada', 10)", "--stop", "('grace',)") == ["('ada', 10)"]
    assert keys("--reverse", "--limit", "1") == ["('grace', 1)"]
    assert run("get", orders, "--table", "orders", "('ada', 9)", "--at", "1").stdout == "1\n"
    assert run("scan", orders, "--table", "users", "--at", "2").stdout == ""
    lines = run("history", orders, "--table", "orders", "('ada', 9)").stdout.splitlines()
    assert [line.split("\t")[3] for line in lines] == ["4", "1"]
    [line] = run("history", orders, "--table", "orders", "('ada', 9)", "-n", "1", "--json").stdout.splitlines()
    assert json.loads(line)["value"] == 4
    assert run("diff", orders, "1", "--table", "orders").stdout == "-\t('ada', 9)\t1\n+\t('ada', 9)\t4\n"
    assert run("diff", orders, "1", "--table", "orders", "--prefix", "'grace'").stdout == ""
    assert json.loads(run("diff", orders, "1", "--table", "orders", "--json").stdout) == {
        "key": ["ada", 9],
        "old": 1,
        "new": 4,
    }
    run("delete", orders, "--table", "orders", "--prefix", "'ada'")
    assert keys() == ["('grace', 1)"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("put", "--table", "orders", "ada", "1"),
        ("put", "--table", "orders", "('ada', 'x')", "1"),
        ("put", "--table", "orders", "('ada', 1)", "one"),
        ("put", "--table", "orders", "('ada', 1)", str(1 << 64)),
        ("put", "--table", "users", "ada", "{"),
        ("put", "--table", "users", "ada", "NaN"),
        ("put", "--table", "none", "ada", "1"),
        ("get", "--table", "none", "ada"),
        ("get", "--table", "", "ada"),
        ("scan", "--table", "orders", "--prefix", "1"),
        ("scan", "--table", "orders", "--start", "__import__('os')"),
    ],
)
def test_what_is_of_another_type_is_refused_and_changes_nothing(orders: str, arguments: tuple[str, ...]) -> None:
    before = run("scan", orders, "--table", "orders").stdout + run("scan", orders, "--table", "users").stdout
    run(arguments[0], orders, *arguments[1:], expect=2)
    assert before == run("scan", orders, "--table", "orders").stdout + run("scan", orders, "--table", "users").stdout
    assert run("tables", orders).stdout.count("\n") == 2


class Upper:
    name = "upper"
    version = 1
    ordered = True

    def encode(self, value: str) -> bytes:
        return value.upper().encode()

    def decode(self, data: bytes) -> str:
        return data.decode()


def test_other_codecs_are_shown_as_bytes_and_it_is_said(path: str) -> None:
    with kvwal.open(path) as db:
        db.table("t", Upper(), Upper())["a"] = "b"
        db.table("numbers", int, codecs.compressed(codecs.json()))[1 << 64_000] = [1]
        versioned = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda value: value})
        db.table("versions", str, versioned)["a"] = [1]
        halves = db.table("halves", str, codecs.json())
        with db.batch() as batch:
            halves.within(batch)
            assert halves.id is not None
            batch.table(halves.id).put(b"a", b'"\\ud800"')
    result = run("scan", path, "--table", "t")
    assert result.stdout == "A\tB\n"
    assert "upper is no codec of kvwal's own" in result.stderr
    result = run("scan", path, "--table", "t", "--hex")
    assert (result.stdout, result.stderr) == ("41\t42\n", "")
    run("put", path, "--table", "t", "A", "C")
    assert run("get", path, "--table", "t", "A").stdout == "C"
    for as_json in ((), ("--json",)):
        assert "[1]" in run("scan", path, "--table", "numbers", *as_json).stdout
        assert b'"\\ud800"'.hex() in run("scan", path, "--table", "halves", *as_json).stdout
    assert run("scan", path, "--table", "versions").stdout == "a\t[1]\n"
    run("put", path, "--table", "versions", "a", "[2]", expect=2)
    run("put", path, "--table", "versions", "a", "--file", "-", stdin=b"\x02[2]")
    assert run("get", path, "--table", "versions", "a").stdout == "[2]\n"
