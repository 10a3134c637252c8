"""Tables on the command line: keys and values as what they are, in and out."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import pytest
from click.testing import CliRunner, Result
from store_fixtures import commit_rows

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
    (datetime, WHEN, WHEN.isoformat(), WHEN.isoformat(), WHEN.isoformat(), datetime),
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


def test_log_shows_what_commits_wrote_to_tables(tmp_path: Path) -> None:
    path = str(tmp_path / "tables.kv")
    with kvwal.open(path) as db:
        people, gone = db.table("people", str, codecs.json()), db.table("gone", str, str)
        people["ada"] = {"born": 1815}
        with db.transaction() as txn:
            txn.put(b"k", b"v")
            people.within(txn)["bob"] = {}
            del people.within(txn)["ada"]
        people.delete_range("a", "c")
        gone["x"] = "y"
        db.drop_table("gone")
        people.update({f"{n:02}": n for n in range(12)})
        db.rename_table("people", "persons")
        db.rename_table("persons", "people")
        id_of_gone = 17
    shown = {
        int(text.split("\n")[0]): [line.strip() for line in text.split("\n")[4:] if line]
        for text in run("log", path).stdout.split("commit ")[1:]
    }
    assert shown[1] == ['in people: put    ada = {"born":1815}']
    assert sorted(shown[2]) == ["in people: delete ada", "in people: put    bob = {}", "put    k = v"]
    assert shown[3] == ["in people: delete from a to before c"]
    assert shown[4] == [f"in table {id_of_gone}, which was dropped: put    x = y"]
    assert shown[6][-1] == "... and 2 more"
    assert shown[7] == ["2 keys of what the store keeps of itself"]
    found = [json.loads(line)["intents"] for line in run("log", path, "--json", "--reverse").stdout.splitlines()]
    assert found[0] == [{"op": "put", "table": 16, "key": "ada", "value": '{"born":1815}'}]
    assert {"op": "put", "key": "k", "value": "v"} in found[1]
    assert found[2] == [{"op": "delete_range", "table": 16, "start": "a", "stop": "c"}]


def test_the_tables_are_listed(orders: str) -> None:
    assert run("tables", orders).stdout == "orders\ttuple[str, int]\tcounter\t3\nusers\tstr\tjson\t1\n"
    rows = [json.loads(line) for line in run("tables", orders, "--json").stdout.splitlines()]
    users = {"name": "users", "id": 17, "key": "str", "value": "json", "keys": 1, "problem": None, "indexes": []}
    assert rows[1] == users


def test_the_indexes_of_a_table_are_listed_and_puts_name_the_one_that_is_not_declared(orders: str) -> None:
    with kvwal.open(orders) as db:
        users = db.table("users", str, codecs.json())
        users.index("by_born", key=lambda user: None, codec=int)
        users.index("by_name", key=lambda user: ["a", "b"], codec=str, many=True).wait()
    assert run("tables", orders).stdout.splitlines()[1] == "users\tstr\tjson\t1\tby_born: int; by_name: str"
    rows = [json.loads(line) for line in run("tables", orders, "--json").stdout.splitlines()]
    assert rows[1]["indexes"][1] == {
        "name": "by_name",
        "codec": "str",
        "entries": 2,
        "ready": True,
        "problem": None,
    }
    assert "index 'by_born'" in run("put", orders, "--table", "users", "ada", "{}", expect=2).stderr
    run("delete", orders, "--table", "users", "ada")
    run("verify", orders)


def test_an_index_that_is_not_built_is_listed_with_what_it_has_and_why_there_is_no_more(tmp_path: Path) -> None:
    def strict(number: bytes) -> int:
        if number == b"200":
            raise RuntimeError(number)
        return int(number)

    path = str(tmp_path / "kv")
    with kvwal.open(path, background=False) as db:
        numbers = db.table("numbers", int)
        numbers.update((n, b"%d" % n) for n in range(300))
        numbers.index("by_n", key=strict, codec=int)
        (info,) = db.tables()[0].indexes
        assert not info.ready
        assert info.problem == "it has 128 of 300 keys, and its function raised RuntimeError: b'200'"
    why = "it has 128 of 300 keys; the program that declares it builds it, and knows why it does not"
    assert run("tables", path).stdout == f"numbers\tint\tbytes\t300\tby_n: int, not built: {why}\n"
    assert json.loads(run("tables", path, "--json").stdout)["indexes"][0]["problem"] == why


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
    for table, prefix in (("orders", "()"), ("users", "")):
        assert "--yes" in run("delete", orders, "--table", table, "--prefix", prefix, expect=2).stderr
        assert run("scan", orders, "--table", table, "--keys").stdout
        run("delete", orders, "--table", table, "--prefix", prefix, "--yes")
        assert run("scan", orders, "--table", table, "--keys").stdout == ""


def test_a_past_moment_has_the_codecs_of_then(path: str) -> None:
    def upgraded(old: dict[str, int]) -> dict[str, int]:
        return old | {"b": 2}

    with kvwal.open(path) as db:
        then = str(int(db.table("t", str, codecs.versioned(codecs.json(), version=1)).put("k", {"a": 1})))
        newer = db.table("t", str, codecs.versioned(codecs.json(), version=2, upcasters={1: upgraded}))
        newer.migrate()
        assert [each.key for each in newer.diff(int(then))] == ["k"]
        newest = str(int(db.last_seqno))
    old, new = '{"a": 1}', '{"a": 1, "b": 2}'
    assert run("get", path, "--table", "t", "k", "--at", then).stdout == f"{old}\n"
    assert run("scan", path, "--table", "t", "--at", then).stdout == f"k\t{old}\n"
    code = "01" + b'{"a":1}'.hex()
    assert run("scan", path, "--table", "t", "--at", then, "--hex").stdout == f"6b\t{code}\n"
    assert run("diff", path, then, "--table", "t").stdout == f"-\tk\t{old}\n+\tk\t{new}\n"
    assert run("diff", path, newest, then, "--table", "t").stdout == f"-\tk\t{new}\n+\tk\t{old}\n"
    assert run("diff", path, then, then, "--table", "t").stdout == ""


def test_a_past_moment_has_the_table_that_had_the_name_then(path: str) -> None:
    with kvwal.open(path) as db:
        orders = db.table("orders", tuple[str, int], float)
        then = str(int(orders.put(("ada", 1), 9.5)))
        both = str(int(orders.put(("ada", 2), 1.0)))
        db.rename_table("orders", "sales")
        renamed = str(int(db.last_seqno))
        db.drop_table("sales")
    for name, moment, stdout in (
        ("orders", then, "('ada', 1)\t9.5\n"),
        ("orders", both, "('ada', 1)\t9.5\n('ada', 2)\t1.0\n"),
        ("sales", renamed, "('ada', 1)\t9.5\n('ada', 2)\t1.0\n"),
    ):
        assert run("scan", path, "--table", name, "--at", moment).stdout == stdout
    assert run("get", path, "--table", "orders", "('ada', 1)", "--at", then).stdout == "9.5\n"
    run("get", path, "--table", "orders", "('ada', 2)", "--at", then, expect=1)
    gone = "-\t('ada', 1)\t9.5\n-\t('ada', 2)\t1.0\n"
    assert run("diff", path, both, "--table", "orders").stdout == gone
    assert run("diff", path, then, both, "--table", "orders").stdout == "+\t('ada', 2)\t1.0\n"
    assert run("diff", path, both, renamed, "--table", "sales").stdout == gone.replace("-\t", "+\t")
    for command, *more in (("scan", "--at", renamed), ("diff", renamed), ("scan",), ("history", "k")):
        assert "there is no table 'orders'" in run(command, path, *more, "--table", "orders", expect=2).stderr
    with kvwal.open(path) as db:
        db.table("orders", int, str)[5] = "five"
    assert run("scan", path, "--table", "orders", "--at", then).stdout == "('ada', 1)\t9.5\n"
    assert run("scan", path, "--table", "orders", "--at", renamed).stdout == ""
    assert run("diff", path, renamed, "--table", "orders").stdout == "+\t5\tfive\n"
    assert run("diff", path, then, both, "--table", "orders").stdout == "+\t('ada', 2)\t1.0\n"
    said = run("diff", path, then, "--table", "orders", expect=2).stderr
    assert "tuple[str, int] at one moment, and int at the other" in " ".join(said.split())


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


def test_a_value_that_is_given_as_bytes_is_what_the_codec_of_the_table_makes(orders: str, tmp_path: Path) -> None:
    key, seven = "('ada', 7)", (7).to_bytes(8, "little")
    (tmp_path / "wrong").write_bytes(b"7")
    (tmp_path / "right").write_bytes(seven)
    said = run("put", orders, key, "--table", "orders", stdin=b"7", expect=2).stderr
    assert "Invalid value for 'VALUE': it is no counter as bytes: a counter has 8" in " ".join(said.split())
    wrong = str(tmp_path / "wrong")
    assert "'--file'" in run("put", orders, key, "--table", "orders", "--file", wrong, expect=2).stderr
    run("put", orders, "ada", "--table", "users", stdin=b"{", expect=2)
    run("get", orders, key, "--table", "orders", expect=1)
    assert run("get", orders, "ada", "--table", "users").stdout == '{"born": 1815}\n'
    run("put", orders, key, "--table", "orders", "--file", str(tmp_path / "right"))
    run("put", orders, "eve", "--table", "users", stdin=b'{ "born":\n1 }')
    assert run("get", orders, key, "--table", "orders").stdout == "7\n"
    assert run("get", orders, "eve", "--table", "users").stdout == '{"born": 1}\n'


def test_how_a_tuple_is_written_is_said_where_a_text_is_none(orders: str) -> None:
    said = run("get", orders, "--table", "orders", "ada", expect=2).stderr
    assert """'ada' is no tuple[str, int]; a tuple is written as in Python: "('ada', 7)\"""" in said


STAMP = codecs.Versionstamp(20, 3)
PRINTED: list[tuple[Any, list[Any]]] = [
    (str, ["ada", "", "it's", "(1, 2)", "\u00e9\u20ac"]),
    (int, [0, -5, 1 << 70]),
    (codecs.int64, [-5]),
    (float, [1.5, -0.0, 1e300, float("inf"), float("-inf")]),
    (bool, [True, False]),
    (UUID, [ID]),
    (datetime, [WHEN, WHEN.replace(microsecond=7)]),
    (bytes, [b"\xff"]),
    (
        tuple[UUID, datetime, int | None],
        [(ID, WHEN, None), (ID, WHEN.replace(microsecond=7, second=1), -5)],
    ),
    (tuple[str, codecs.Versionstamp], [("a", STAMP), ("it's", STAMP), ("\n\\\t\x1b\x85\u2028", STAMP)]),
    (tuple[bytes, float, bool], [(b"\xff\n'\\", float("-inf"), True), (b"", -0.5, False)]),
    (tuple[codecs.Float32, ...], [(codecs.Float32(0.5),), (), tuple(map(codecs.Float32, (float("inf"), -0.1)))]),
    (tuple[str, tuple[UUID, tuple[datetime, codecs.Versionstamp]]], [("a", (ID, (WHEN, STAMP)))]),
]


@pytest.mark.parametrize(("kind", "keys"), PRINTED)
def test_a_key_is_given_as_it_is_printed(path: str, kind: Any, keys: list[Any]) -> None:
    with kvwal.open(path) as db:
        table = db.table("t", kind, int)
        table.update({key: at for at, key in enumerate(keys)})
        assert len(table) == len(keys)
    shown = run("scan", path, "--table", "t").stdout_bytes.splitlines()
    assert len(shown) == len(keys)
    for line in shown:
        text, _, at = line.rpartition(b"\t")
        given = os.fsdecode(b"\xff" if kind is bytes else text)
        assert run("get", path, "--table", "t", "--", given).stdout == f"{at.decode()}\n"
        if kind is not bytes:
            found = run("scan", path, "--table", "t", f"--start={given}", "--limit", "1").stdout_bytes
            assert found == line + b"\n"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').abort()",
        "(UUID('5'), 1)",
        "(UUID(5),)",
        "(UUID(hex='12345678-1234-5678-1234-567812345678'),)",
        "(x.UUID('12345678-1234-5678-1234-567812345678'),)",
        "(datetime.datetime(2020, 1, 1),)",
        "(datetime.datetime(2020, 1, 10**99, tzinfo=datetime.timezone.utc),)",
        "(datetime.datetime(2020, 1, 1" + "0" * 99 + ", tzinfo=datetime.timezone.utc),)",
        "(datetime.datetime(2020, 13, 1, tzinfo=datetime.timezone.utc),)",
        "(datetime.datetime(*(1, 2, 3), tzinfo=datetime.timezone.utc),)",
        "(datetime.datetime(tzinfo=datetime.timezone.utc),)",
        "(datetime.datetime(2020, 1, 1, tzinfo=exit()),)",
        "(Versionstamp(1, 2),)",
        "(Versionstamp(seqno=-1, ordinal=0),)",
        "(Versionstamp(seqno='x', ordinal=0),)",
        "(Versionstamp(seqno=1, **{}),)",
        "(-'a',)",
        "(-None,)",
        "(1 + 1,)",
        "[1]",
        "(" * 500 + ")" * 500,
        "-" * 50_000 + "1",
        "(" + "9" * 5000 + ",)",
        "1j",
        "\0",
        "",
    ],
)
def test_what_is_no_printed_tuple_is_refused_and_not_run(path: str, text: str) -> None:
    with kvwal.open(path) as db:
        db.table("t", tuple[UUID, datetime, codecs.Versionstamp], int)[ID, WHEN, STAMP] = 1
    said = run("get", path, "--table", "t", "--", text, expect=2).stderr
    assert "is no tuple[UUID, datetime, Versionstamp]; a tuple is written as in Python" in said


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
        db.table("pickled", str, codecs.pickle())["a"] = {1}
        db.table("around", str, codecs.versioned(codecs.compressed(codecs.pickle()), version=2))["a"] = {1}
        halves = db.table("halves", str, codecs.json())
        with db.batch() as batch:
            halves.within(batch)
            assert halves.id is not None
            batch.table(halves.id).put(b"a", b'"\\ud800"')
    result = run("scan", path, "--table", "t")
    assert result.stdout == "A\tB\n"
    assert "upper is no codec of kvwal's own" in result.stderr
    for name in ("pickled", "around"):
        said = run("scan", path, "--table", name).stderr
        assert "pickle" in said
        assert "is not read here, since reading a pickle runs what it says" in said
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


def test_a_table_that_cannot_be_used_is_named_beside_the_others(orders: str) -> None:
    batch = kvwal.WriteBatch()
    batch.table(1).put(b"\x01orders", b"{}")
    with kvwal.open(orders) as db:
        commit_rows(db, batch)
    result = run("tables", orders, expect=3)
    assert result.stdout == "users\tstr\tjson\t1\n"
    assert "kvwal: table 'orders': " in result.stderr
    assert json.loads(run("tables", orders, "--json", expect=3).stdout.splitlines()[0])["problem"]


# -- changes --------------------------------------------------------------------------------------


def test_changes_of_a_table_are_shown_as_what_they_are(orders: str) -> None:
    run("delete", orders, "--table", "orders", "--prefix", "'grace'")
    lines = [line.split("\t")[2:] for line in run("changes", orders, "--table", "orders").stdout.splitlines()]
    assert lines[:4] == [
        ["put", "('ada', 9)", "1"],
        ["put", "('ada', 10)", "2"],
        ["put", "('grace', 1)", "3"],
        ["put", "('ada', 9)", "4"],
    ]
    assert lines[4][0] == "delete_range"
    found = run("changes", orders, "--table", "orders", "--prefix", "'grace'", "--limit", "1", "--json").stdout
    assert (json.loads(found)["key"], json.loads(found)["value"]) == (["grace", 1], 3)
    assert run("changes", orders, "--table", "users").stdout.count("\n") == 1
    run("changes", orders, "--table", "none", expect=2)


# -- dumping and loading --------------------------------------------------------------------------


def lines_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def content(path: str) -> dict[str, Any]:
    with kvwal.open(path, "r") as db:
        rows = {info.name: (info.key, info.value, info.keys) for info in db.tables()}
        return {
            "rows": rows,
            "": dict(db),
            **{name: dict(db.snapshot().part(db.engine.tables.row(name).id)) for name in rows},
        }


@pytest.fixture
def shop(orders: str) -> str:
    with kvwal.open(orders) as db:
        db[b"plain"] = b"\xff"
        db.table("empty", str, float)
        with db.batch() as batch:
            db.table("empty", str, float).within(batch)
        versioned = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda value: value})
        db.table("versions", str, versioned)["a"] = [1]
    return orders


def test_a_dump_has_all_tables_and_a_load_brings_them_back(shop: str, tmp_path: Path) -> None:
    dumped = run("dump", shop)
    lines = lines_of(dumped)
    assert lines[0] == {"key": "plain", "value_base64": "/w=="}
    assert lines[1] == {"table": "empty", "key_codec": ["str", 1], "value_codec": ["float", 1]}
    assert lines[2] == {"table": "orders", "key_codec": ["tuple[str, int]", 1], "value_codec": ["counter", 1]}
    assert lines[3]["table"] == "orders"
    copy = str(tmp_path / "copy.kv")
    assert json.loads(run("load", copy, "--json", "--batch", "2", stdin=dumped.stdout_bytes).stdout)["loaded"] == 6
    assert content(copy) == content(shop)
    run("load", copy, stdin=dumped.stdout_bytes)
    assert content(copy) == content(shop)
    assert run("dump", copy).stdout == dumped.stdout
    with kvwal.open(copy, "r") as db:
        assert db.table("users", str, codecs.json()) == {"ada": {"born": 1815}}


def test_a_load_makes_each_table_in_a_commit_and_puts_the_entries_of_all_in_one(shop: str, tmp_path: Path) -> None:
    copy = str(tmp_path / "copy.kv")
    run("load", copy, stdin=run("dump", shop).stdout_bytes)
    commits = [json.loads(line)["intents"] for line in run("log", copy, "--reverse", "--json").stdout.splitlines()]
    assert [len(intents) for intents in commits] == [0] * len(content(shop)["rows"]) + [6]
    said = run("load", "--help").stdout
    assert "each in a commit of its own" in " ".join(said.split())


def test_one_table_is_dumped_with_what_its_keys_and_values_are_and_loaded_alone(shop: str, tmp_path: Path) -> None:
    dumped = run("dump", shop, "--table", "orders", "--prefix", "'ada'")
    assert [line.get("typed") for line in lines_of(dumped)] == [
        None,
        {"key": ["ada", 9], "value": 4},
        {"key": ["ada", 10], "value": 2},
    ]
    assert all("key_hex" in line for line in lines_of(run("dump", shop, "--table", "orders", "--hex"))[1:])
    copy = str(tmp_path / "copy.kv")
    run("load", copy, stdin=dumped.stdout_bytes)
    with kvwal.open(copy, "r") as db:
        assert db.table("orders", tuple[str, int], int) == {("ada", 9): 4, ("ada", 10): 2}
    other = str(tmp_path / "other.kv")
    run("load", other, "--table", "users", stdin=run("dump", shop).stdout_bytes)
    assert set(content(other)) == {"rows", "", "users"}
    assert content(other)[""] == {}
    assert lines_of(run("dump", shop, "--at", "1", "--table", "orders"))[1]["typed"]["value"] == 1
    assert [line["table"] for line in lines_of(run("dump", shop, "--at", "1"))] == ["orders"] * 4
    assert lines_of(run("dump", shop, "--prefix", "p")) == [{"key": "plain", "value_base64": "/w=="}]
    run("dump", shop, "--table", "none", expect=2)
    run("dump", shop, "--table", "", expect=2)
    run("load", shop, "--table", "", expect=2)


def test_an_entry_of_a_table_with_an_index_is_refused_by_its_line(shop: str) -> None:
    dumped = run("dump", shop).stdout
    with kvwal.open(shop) as db:
        db.table("users", str, codecs.json()).index("by_born", key=lambda user: None, codec=int).wait()
    line = next(n for n, each in enumerate(dumped.splitlines(), 1) if '"users", "key":' in each)
    for batch in ("1", "1000"):
        said = run("load", shop, "--batch", batch, stdin=dumped.encode(), expect=7).stderr
        assert f"line {line}: table 'users' has index 'by_born' in the store" in said
        assert re.search(r"; the \d entries before it are in the store", said)
    # A table without entries is as it was.
    empty = json.dumps({"table": "users", "key_codec": ["str", 1], "value_codec": ["json", 1]})
    run("load", shop, stdin=empty.encode())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"table": "new", "key": "a", "value": "b"}, "no line before this one says its codecs"),
        ({"table": 3, "key": "a", "value": "b"}, '"table" is not a string'),
        ({"table": "users", "key_codec": ["int", 1], "value_codec": ["json", 1]}, "keys of table 'users' in the store"),
        ({"table": "users", "key_codec": ["str", 1], "value_codec": ["json", 2]}, r"json, and json \(version 2\) here"),
        ({"table": "users", "key_codec": ["str", 1]}, '"value_codec" is not a list'),
        ({"table": "users", "key_codec": ["str", True], "value_codec": ["json", 1]}, '"key_codec" is not a list'),
        ({"table": "", "key_codec": ["str", 1], "value_codec": ["json", 1]}, "a table's name has 1 to 255 bytes"),
        ({"table": "users", "value": "b"}, "needs exactly one of"),
    ],
)
def test_a_line_of_a_table_that_cannot_be_loaded_is_named(shop: str, line: dict[str, Any], reason: str) -> None:
    good = json.dumps({"table": "users", "key": "eve", "value": "{}"})
    before = content(shop)
    result = run("load", shop, stdin=f"{good}\n{json.dumps(line)}\n".encode(), expect=7)
    assert "line 2: " in result.stderr
    assert "the entry before it is in the store" in result.stderr
    import re

    assert re.search(reason, result.stderr)
    before["users"][b"eve"] = b"{}"
    assert content(shop)["users"] == before["users"]


def test_a_table_of_a_newer_version_is_loaded_and_its_version_is_remembered(shop: str) -> None:
    lines = [
        {"table": "versions", "key_codec": ["str", 1], "value_codec": ["versioned(json)", 3]},
        {"table": "versions", "key": "b", "value": "\u0003[2]"},
    ]
    run("load", shop, stdin="\n".join(map(json.dumps, lines)).encode())
    assert "versions\tstr\tversioned(json) (version 3)\t2\n" in run("tables", shop).stdout
    lines[0]["value_codec"] = ["versioned(json)", 2]
    run("load", shop, stdin="\n".join(map(json.dumps, lines)).encode())
    assert "versions\tstr\tversioned(json) (version 3)\t2\n" in run("tables", shop).stdout


# -- dropping and renaming ------------------------------------------------------------------------


def test_a_table_is_dropped_only_when_that_is_said_or_answered(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("table", "drop", shop, "orders", expect=2)
    assert "table 'orders' has 3 keys; to drop it, give --yes" in result.stderr
    run("table", "drop", shop, "orders", "--yes", "--meta", "by=me")
    assert "orders" not in run("tables", shop).stdout
    assert "Meta:  by=me" in run("log", shop, "-n", "1").stdout
    run("table", "drop", shop, "orders", "--yes", expect=2)
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    result = run("table", "drop", shop, "users", stdin=b"n\n", expect=1)
    assert "Drop table 'users' with 1 key?" in result.stderr
    assert "users" in run("tables", shop).stdout
    run("table", "drop", shop, "users", stdin=b"y\n")
    assert "users" not in run("tables", shop).stdout


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (EOFError, 1)])
def test_an_interruption_of_a_question_is_one_and_the_end_of_the_input_is_a_no(
    shop: str, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int
) -> None:
    def ask(*_: object) -> str:
        raise error

    confirm = click.confirm

    def confirmed(*arguments: Any, **options: Any) -> bool:
        monkeypatch.setattr("click.termui.visible_prompt_func", ask)
        return confirm(*arguments, **options)

    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    monkeypatch.setattr("click.confirm", confirmed)
    run("table", "drop", shop, "users", expect=code)
    assert "users" in run("tables", shop).stdout


def test_a_table_is_renamed(shop: str) -> None:
    run("table", "rename", shop, "orders", "sales")
    assert [line.split("\t")[0] for line in run("tables", shop).stdout.splitlines()] == [
        "empty",
        "sales",
        "users",
        "versions",
    ]
    run("table", "rename", shop, "sales", "users", expect=2)
    run("table", "rename", shop, "orders", "users", expect=2)
    run("table", "rename", shop, "sales", "", expect=2)


def test_a_load_keeps_what_never_expires_and_the_default_of_a_table(tmp_path: Path) -> None:
    path, copy = str(tmp_path / "s.kv"), str(tmp_path / "copy.kv")
    with kvwal.open(path) as db:
        sessions = db.table("s", str, str, expire_s=3600)
        sessions["keep"] = "1"
        sessions.touch("keep", expire_s=None)
        sessions["gone"] = "2"
    lines = run("dump", path).stdout
    (tmp_path / "dump").write_text(lines)
    for into in (path, copy):
        run("load", into, str(tmp_path / "dump"))
        with kvwal.open(into) as db:
            sessions = db.table("s", str, str)
            assert sessions.expires("keep") is None
            assert sessions.expires("gone") is not None
            sessions["new"] = "3"
            assert sessions.expires("new") is not None


def test_a_load_of_a_table_that_no_line_is_of_says_so(shop: str, tmp_path: Path) -> None:
    dumped = run("dump", shop)
    result = run("load", str(tmp_path / "copy.kv"), "--table", "nope", stdin=dumped.stdout_bytes, expect=1)
    assert "no line is of table 'nope'" in result.stderr


def _strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(text, parse_constant=refuse)


def test_a_float_that_json_cannot_hold_is_its_bytes_and_is_loaded_again(tmp_path: Path) -> None:
    path, copy = str(tmp_path / "a.kv"), str(tmp_path / "b.kv")
    with kvwal.open(path) as db:
        floats = db.table("floats", float, float)
        floats.update({1.5: float("inf"), float("-inf"): 2.5})
        db.table("objects", str, codecs.msgpack())["a"] = {"b": [float("nan")]}
    code = codecs.pack((float("inf"),)).hex()
    commands = (["scan"], ["changes"], ["dump"], ["get", "1.5"], ["history", "1.5"], ["diff", "0"])
    for command, *more in commands:
        options = [] if command == "dump" else ["--json"]
        shown = run(command, path, *more, "--table", "floats", *options).stdout.splitlines()
        lines = [_strict(line) for line in shown]
        assert lines
        assert code in json.dumps(lines)
    assert [_strict(line) for line in run("scan", path, "--table", "floats", "--json").stdout.splitlines()] == [
        {"key_hex": codecs.pack((float("-inf"),)).hex(), "value": 2.5},
        {"key": 1.5, "value_hex": code},
    ]
    assert _strict(run("scan", path, "--table", "objects", "--json").stdout)["value_hex"]
    assert run("get", path, "1.5", "--table", "floats").stdout == "Infinity\n"
    run("load", copy, stdin=run("dump", path, "--table", "floats").stdout_bytes)
    with kvwal.open(copy, "r") as db:
        assert db.table("floats", float, float) == {1.5: float("inf"), float("-inf"): 2.5}


def test_changes_tell_tables_by_their_names(path: str) -> None:
    with kvwal.open(path) as db:
        db.put(b"k", b"v")
        db.table("a\tb", str, str)["x"] = "1"
        db.table("gone", str, str)["x"] = "1"
        db.drop_table("gone")
        ids = db.table("a\tb", str, str).id, 17
    lines = [line.split("\t")[1:3] for line in run("changes", path).stdout.splitlines()]
    assert lines[:3] == [["0", "put"], ["a\\tb", "put"], [str(ids[1]), "put"]]
    found = lines_of(run("changes", path, "--json"))
    assert [(each["table"], each["table_name"]) for each in found[:3]] == [(0, None), (ids[0], "a\tb"), (ids[1], None)]
    with kvwal.open(path) as db:
        db.table("new", str, str)["x"] = "1"
        newest = int(db.last_seqno)
        shown = run("changes", path, "--follow", "--after", str(newest - 1), "-n", "1").stdout
        assert shown == f"{newest}\tnew\tput\tx\t1\n"
