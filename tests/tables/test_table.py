"""Tables of a store: made by a first write, typed, within transactions, batches and snapshots, dropped, renamed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from store_fixtures import check_store, commit_rows, problems_of, run_threads

import kvwal
from kvwal import codecs
from kvwal.batch import WriteBatch
from kvwal.engine.operations import Update
from kvwal.engine.request import CommitRequest
from kvwal.engine.tables import Drop, Rename
from kvwal.engine.writes import EncodedBatch
from kvwal.errors import (
    ClosedError,
    CodecError,
    ConflictError,
    CorruptionError,
    FormatError,
    ReadOnlyError,
    SnapshotTooOld,
    TableCodecError,
    TableExistsError,
    TableNotFoundError,
    UsageError,
)
from kvwal.tables.stored import Waiting
from kvwal.testing import SimulatedDisk, crash_every


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=disk, background=False) as store:
        yield store
        if not store.closed:
            check_store(store)


# -- as a map -------------------------------------------------------------------------------------


def test_a_table_is_a_map_of_its_types(db: kvwal.Store) -> None:
    users = db.table("users", str, codecs.json())
    assert len(users) == 0
    assert not users
    assert users.get("ada") is None
    assert list(users) == []
    assert db.tables() == []
    users["ada"] = {"born": 1815}
    users["grace"] = {"born": 1906}
    assert users["ada"] == {"born": 1815}
    assert users.get("eve", 7) == 7
    with pytest.raises(KeyError):
        users["eve"]
    assert "ada" in users
    assert "eve" not in users
    assert users.get_many(["grace", "eve"]) == [{"born": 1906}, None]
    assert list(users) == ["ada", "grace"]
    assert list(reversed(users)) == ["grace", "ada"]
    assert dict(users) == {"ada": {"born": 1815}, "grace": {"born": 1906}}
    assert users == {"ada": {"born": 1815}, "grace": {"born": 1906}}
    assert list(users.scan(reverse=True, limit=1)) == [("grace", {"born": 1906})]
    assert users.first() == ("ada", {"born": 1815})
    assert users.last("a", "b") == ("ada", {"born": 1815})
    assert list(users.values()) == [{"born": 1815}, {"born": 1906}]
    assert list(reversed(users.items())) == [("grace", {"born": 1906}), ("ada", {"born": 1815})]
    assert list(reversed(users.keys())) == ["grace", "ada"]
    assert list(reversed(users.values())) == [{"born": 1906}, {"born": 1815}]
    assert ("ada", {"born": 1815}) in users.items()
    assert ("ada", {}) not in users.items()
    assert 3 not in users.items()
    assert "ada" not in users.keys("b")
    for part in ({"prefix": "gr"}, {"start": "b"}, {"limit": 1, "reverse": True}):
        values: Any = users.values(**part)
        assert {"born": 1906} in values
        assert {"born": 1815} not in values
    none: Any = None
    end: Any = kvwal.END
    for no_key in (none, end):
        with pytest.raises(TypeError, match="rank takes a key"):
            users.rank(no_key)
        with pytest.raises(TypeError):
            users.raw().rank(no_key)
    assert len(users.keys(prefix="gr")) == len(users.items(prefix="gr")) == len(users.values(prefix="gr")) == 1
    del users["ada"]
    with pytest.raises(KeyError):
        del users["ada"]
    assert len(users) == 1
    assert len(db) == 0, "the default table has nothing of it"
    assert [(info.name, info.id, info.key, info.value, info.keys) for info in db.tables()] == [
        ("users", 16, "str", "json", 1)
    ]
    assert problems_of(db) == []


def test_keys_come_in_the_order_of_their_type(db: kvwal.Store) -> None:
    numbers = db.table("numbers", int, str)
    numbers.update((number, str(number)) for number in (300, -5, 7, 10**30, 0))
    assert list(numbers) == [-5, 0, 7, 300, 10**30]
    assert list(numbers.scan(0, 300)) == [(0, "0"), (7, "7")]
    with pytest.raises(TypeError, match="no prefixes"):
        numbers.scan(prefix=3)
    orders = db.table("orders", tuple[str, int], float)
    orders.update({("ada", 10): 1.0, ("ada", 9): 2.0, ("grace", 1): 3.0})
    assert list(orders.keys(prefix="ada")) == list(orders.keys(prefix=("ada",))) == [("ada", 9), ("ada", 10)]
    assert list(orders.keys(("ada", 10), ("grace",))) == [("ada", 10)]
    assert list(orders.keys(("ada",), prefix=("ada",), stop=("ada", 10))) == [("ada", 9)]
    orders.delete_range(prefix="ada")
    assert list(orders) == [("grace", 1)]
    orders.clear()
    assert not orders
    assert [info.name for info in db.tables()] == ["numbers", "orders"]


@pytest.mark.parametrize("wrong", [b"ada", 1, None, ("ada",)])
def test_what_is_of_another_type_is_refused_and_changes_nothing(db: kvwal.Store, wrong: Any) -> None:
    users = db.table("users", str, str)
    for call in (
        lambda: users.get(wrong),
        lambda: users[wrong],
        lambda: users.put(wrong, "a"),
        lambda: users.put("a", wrong),
        lambda: users.update({"a": "a", "b": wrong}),
        lambda: users.update({"a": "a", wrong: "b"}),
        lambda: users.delete(wrong),
        lambda: users.setdefault("a", wrong),
        lambda: users.put_if_absent("a", wrong),
        lambda: users.scan(prefix=wrong) if wrong is not None else users.put(wrong, "a"),
    ):
        with pytest.raises(TypeError):
            call()
    assert db.last_seqno == 0
    assert db.tables() == []
    # As a dict says it of what can be no key.
    assert wrong not in users
    assert wrong not in users.keys("a")
    assert (wrong, "a") not in users.items()


def test_writes_that_depend_on_what_is_there(db: kvwal.Store) -> None:
    users = db.table("users", str, codecs.json())
    with pytest.raises(KeyError):
        users.pop("a")
    assert users.pop("a", None) is None
    with pytest.raises(KeyError):
        users.popitem()
    assert db.last_seqno == 0, "a table that gets nothing is not made"
    assert users.setdefault("n") is None
    del users["n"]
    assert users.setdefault("a", [1]) == [1]
    assert users.setdefault("a", [2]) == [1]
    assert not users.put_if_absent("a", 3)
    assert users.put_if_absent("b", 3)
    assert not users.compare_and_set("a", [2], [5])
    assert users.compare_and_set("a", [1], [5])
    assert users.compare_and_set("c", None, 1)
    assert not users.compare_and_set("c", None, 1)
    assert users.compare_and_set("c", 1, None)
    assert dict(users) == {"a": [5], "b": 3}
    assert users.pop("a") == [5]
    users.update({"d": 1, "e": 2, "f": 3})
    assert users.popitem() == ("f", 3)
    assert users.popitem(last=False) == ("b", 3)
    assert users.popitem("e") == ("e", 2)
    with pytest.raises(KeyError):
        users.popitem(prefix="x")
    counters = db.table("counters", str, int)
    assert counters.add("hits", 5) == 5
    assert counters.add("hits", -7) == -2
    assert counters["hits"] == -2
    with pytest.raises(OverflowError, match="-9223372036854775810 does not fit into the 64 bits of a counter"):
        counters.add("hits", -(1 << 63))
    with pytest.raises(TypeError, match="no counters"):
        users.add("d", 1)
    assert db.table("counters", str, codecs.counter) == {"hits": -2}


def test_what_is_compared_are_values(db: kvwal.Store) -> None:
    users = db.table("users", str, codecs.json())
    users["a"] = {"x": 1, "y": 2}
    assert users.compare_and_set("a", {"y": 2, "x": 1}, "new")


def test_many_values_are_of_one_moment(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    users = db.table("users", str, int)
    users.update({"a": 1, "b": 1})
    reads = db.engine.reads
    db.engine.state.cache.clear()

    def overtaken(read: Any) -> Any:
        def reading(*args: Any, **kwargs: Any) -> Any:
            found = read(*args, **kwargs)
            monkeypatch.undo()
            users.update({"a": 2, "b": 2})
            return found

        return reading

    assert users.id is not None
    monkeypatch.setattr(reads, "read", overtaken(reads.read))
    monkeypatch.setattr(reads, "read_at", overtaken(reads.read_at))
    assert users.get_many(["a", "b"]) in ([1, 1], [2, 2])
    assert users.get("b") == 2


# -- codecs ---------------------------------------------------------------------------------------


def test_a_table_remembers_its_codecs(disk: SimulatedDisk, db: kvwal.Store) -> None:
    early = db.table("users", int, str)
    users = db.table("users", str, codecs.json())
    users["a"] = 1
    for wrong in (lambda: db.table("users"), lambda: db.table("users", str, str), lambda: early.get(1)):
        with pytest.raises(TableCodecError, match="table 'users'") as caught:
            wrong()
        assert caught.value.name == "users"
    with pytest.raises(TableCodecError):
        early[1] = "a"
    assert db.last_seqno == 1
    db.close()
    with kvwal.open("/kv", files=disk, background=False) as again:
        assert again.table("users", str, codecs.json()) == {"a": 1}
        with pytest.raises(TableCodecError):
            again.table("users", bytes, codecs.json())
        with pytest.raises(TableCodecError):
            again.table("users", str, codecs.versioned(codecs.json(), version=2, upcasters={1: lambda value: value}))


@pytest.mark.parametrize("way", ["put", "pop", "batch", "transaction"])
def test_a_newer_version_of_a_codec_is_remembered_once_it_writes(db: kvwal.Store, way: str) -> None:
    def of(version: int) -> Any:
        upcasters = {number: lambda value: [*value, "up"] for number in range(1, version)}
        return codecs.versioned(codecs.json(), version=version, upcasters=upcasters)

    old = db.table("users", str, of(1))
    old.update({"a": [1], "b": [2]})
    new = db.table("users", str, of(3))
    assert new["a"] == [1, "up", "up"]
    name = db.tables()[0].value
    assert old["a"] == [1], "what was only read changes nothing"
    with db.snapshot() as before:
        if way == "put":
            new["c"] = [3]
        elif way == "pop":
            assert new.pop("a") == [1, "up", "up"]
        elif way == "batch":
            with db.batch() as batch:
                new.within(batch)["c"] = [3]
        else:
            with db.transaction() as txn:
                mine = new.within(txn)
                mine["c"] = [3]
                mine["d"] = [4]
        assert db.tables()[0].value != name
        assert old.within(before)["b"] == [2]
    assert db.tables()[0].value.endswith("(version 3)")
    with pytest.raises(TableCodecError, match="version 3"):
        db.table("users", str, of(1))
    new["e"] = [5]
    assert dict(new.items("d")) == ({"d": [4], "e": [5]} if way == "transaction" else {"e": [5]})
    assert len(db.tables()) == 1


def test_bytes_that_are_no_value_are_reached_as_bytes(db: kvwal.Store) -> None:
    users = db.table("users", str, codecs.json())
    users["a"] = 1
    batch = kvwal.WriteBatch()
    assert users.id is not None
    batch.table(users.id).put(b"b", b"no json")
    batch.table(users.id).put(b"\xff", b"1")
    db.commit(batch)
    with pytest.raises(CodecError) as caught:
        users["b"]
    assert caught.value.data == b"no json"
    with pytest.raises(CodecError):
        list(users)
    assert users.raw()[b"b"] == b"no json"
    assert users["a"] == 1


@pytest.mark.parametrize("name", ["", "x" * 256, "\ud800"])
def test_a_name_that_cannot_be_is_refused(db: kvwal.Store, name: str) -> None:
    for call in (db.table, db.drop_table, lambda name: db.rename_table("a", name)):
        with pytest.raises(ValueError, match="name"):
            call(name)
    with pytest.raises(TypeError):
        db.table(b"users")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (b"", CorruptionError),
        (b"{}", CorruptionError),
        (b"[]", CorruptionError),
        (b"[" * 100_000, CorruptionError),
        (b'{"v":1,"id":16,"key":["str",1],"value":["json"]}', CorruptionError),
        (b'{"v":1,"id":1,"key":["str",1],"value":["json",1]}', CorruptionError),
        (b'{"v":1,"id":true,"key":["str",1],"value":["json",1]}', CorruptionError),
        (b'{"v":1,"id":4294967296,"key":["str",1],"value":["json",1]}', CorruptionError),
        (b'{"v":2}', FormatError),
        (b"\xff", CorruptionError),
    ],
)
def test_a_row_that_is_not_valid_says_so(db: kvwal.Store, value: bytes, error: type[Exception]) -> None:
    batch = kvwal.WriteBatch()
    batch.table(1).put(b"\x01users", value)
    commit_rows(db, batch)
    for call in (lambda: db.table("users"), lambda: db.drop_table("users"), lambda: db.rename_table("users", "x")):
        with pytest.raises(error):
            call()
    [info] = db.tables()
    assert info.problem is not None
    batch.table(1).put(b"\x01users", b'{"v":1,"id":16,"key":["str",1],"new":[1],"value":["json",1]}')
    batch.table(1).put(b"\x02", value)
    commit_rows(db, batch)
    with pytest.raises(CorruptionError, match="next table ids"):
        db.table("others")[b"a"] = b"b"
    # Members of a newer version are kept.
    db.rename_table("users", "people")
    with db.snapshot() as snapshot:
        assert snapshot.part(1)[b"\x01people"] == b'{"id":16,"key":["str",1],"new":[1],"v":1,"value":["json",1]}'


# -- within ---------------------------------------------------------------------------------------


def test_a_view_that_is_older_than_its_table_shows_what_a_transaction_puts(db: kvwal.Store) -> None:
    table = db.table("t", str, int)
    txn = db.transaction()
    mine = table.within(txn)
    keys, values, items, raw = mine.keys(), mine.values("a"), mine.items(prefix="a", limit=3), mine.raw()
    for view in (keys, values, items, raw):
        assert (list(view), len(view), bool(raw)) == ([], 0, False)
    mine.put("a", 1, expire_s=100)
    assert (list(keys), list(reversed(keys)), len(keys), "a" in keys) == (["a"], ["a"], 1, True)
    assert (list(values), len(values), 1 in values) == ([1], 1, True)
    assert (list(items), len(items), ("a", 1) in items) == ([("a", 1)], 1, True)
    assert (list(raw), b"a" in raw, raw.expires(b"a") is not None) == ([b"a"], True, True)
    txn.abort()
    with pytest.raises(ClosedError):
        list(keys)


def test_a_transaction_over_tables_is_one_commit(disk: SimulatedDisk, db: kvwal.Store) -> None:
    users, orders = db.table("users", str, int), db.table("orders", tuple[str, int], str)
    with db.transaction() as txn:
        mine, its = users.within(txn), orders.within(txn)
        mine["ada"] = 1
        its["ada", 1] = "book"
        txn[b"n"] = b"1"
        assert mine == {"ada": 1}
        assert its.first() == (("ada", 1), "book")
        assert users.get("ada") is None, "no other thread sees it"
        assert users.within(txn)["ada"] == 1
    assert txn.commit_seqno == db.last_seqno == 1
    assert users["ada"] == 1
    assert orders["ada", 1] == "book"
    assert {info.name: info.id for info in db.tables()} == {"users": 16, "orders": 17}
    with pytest.raises(ClosedError):
        mine["b"] = 2
    with pytest.raises(RuntimeError), db.transaction() as txn:
        users.within(txn)["b"] = 1
        raise RuntimeError
    assert "b" not in users
    with db.transaction() as txn:
        mine = users.within(txn)
        del mine["ada"]
        with pytest.raises(KeyError):
            del mine["ada"]
        with pytest.raises(TypeError):
            mine.update({"y": 1, "z": "x"})  # type: ignore[dict-item]  # it is the mistake
        mine.update({"c": 1}, d=2)
        mine.update([("e", 3)])
        mine.update()
        mine.delete("x")
        mine.delete_range("d", "e")
        assert mine.popitem() == ("e", 3)
        with pytest.raises(TypeError):
            mine[b"x"] = 1  # type: ignore[index]
        assert mine == {"c": 1}
    assert users == {"c": 1}
    with db.transaction(read_only=True) as txn:
        assert users.within(txn) == {"c": 1}
        with pytest.raises(ReadOnlyError):
            users.within(txn)["x"] = 1
    with pytest.raises(TypeError):
        users.within(db)  # type: ignore[call-overload]


def test_an_update_in_a_transaction_puts_as_that_of_the_table_does(db: kvwal.Store) -> None:
    lasting = db.table("lasting", tuple[str, codecs.Versionstamp], int, expire_s=100)
    with db.transaction() as txn:
        db.table("unmade", str, int).within(txn).update({})
        mine = lasting.within(txn)
        mine.update([(("a", kvwal.SEQNO), 1), (("b", codecs.Versionstamp(1, 0)), 2)])
        assert len(mine) == 2
    assert [info.name for info in db.tables()] == ["lasting"]
    assert list(lasting.values()) == [1, 2]
    assert next(iter(lasting)) == ("a", codecs.Versionstamp(txn.commit_seqno or 0, 0))
    assert all(lasting.expires(key) for key in lasting)


def test_a_table_that_is_made_dropped_or_renamed_meanwhile_is_a_conflict(db: kvwal.Store) -> None:
    users = db.table("users", str, int)
    txn = db.transaction()
    users.within(txn)["a"] = 1
    users["b"] = 2
    with pytest.raises(ConflictError):
        txn.commit()
    txn = db.transaction()
    users.within(txn)["a"] = 1
    db.drop_table("users")
    with pytest.raises(ConflictError):
        txn.commit()
    assert db.tables() == []
    db.run(lambda txn: users.within(txn).put("c", 3))
    txn = db.transaction()
    users.within(txn)["a"] = 1
    db.rename_table("users", "people")
    with pytest.raises(ConflictError):
        txn.commit()
    assert db.table("people", str, int) == {"c": 3}
    assert users == {}


def test_a_batch_over_tables_is_one_commit(db: kvwal.Store) -> None:
    users = db.table("users", str, int)
    with db.batch(meta={"by": "test"}) as batch:
        writes = users.within(batch)
        assert [info.keys for info in db.tables()] == [0], "it is there, and empty"
        writes["before"] = 1
        writes.clear()
        writes["a"] = 1
        writes.put("b", 2)
        writes.delete("a")
        writes.update({"c": 3, "d": 4})
        writes.delete_range(prefix="d")
        with pytest.raises(TypeError):
            writes.update({"e": 1, "f": "x"})  # type: ignore[dict-item]
        batch[b"x"] = b"y"
    assert users == {"b": 2, "c": 3}
    assert db[b"x"] == b"y"
    assert db.last_seqno == 2
    with db.batch() as batch:
        users.within(batch).clear()
    assert users == {}
    with db.batch() as batch:
        users.within(batch)["z"] = 1
        db.drop_table("users")
        with pytest.raises(TableNotFoundError):
            db.commit(batch)
        batch.clear()


def test_a_table_takes_no_part_in_what_is_of_another_store(db: kvwal.Store) -> None:
    ours = db.table("ours", str, int)
    ours["a"] = 1
    index = ours.index("by_value", key=lambda value: value, codec=int)
    with kvwal.open("/kv", files=SimulatedDisk(seed=1), background=False) as other:
        theirs = other.table("theirs", str, str)
        theirs["a"] = "theirs"
        assert theirs.id == ours.id, "a batch knows a table by its id"
        before = db.last_seqno, other.last_seqno
        with (
            db.transaction() as txn,
            db.snapshot() as snapshot,
            db.batch() as batch,
            other.snapshot() as of_theirs,
            other.transaction() as in_theirs,
        ):
            for table in theirs, other.table("missing", str, str), other.sub(b"x", str, str):
                for whole in txn, snapshot, batch:
                    with pytest.raises(UsageError, match="the table is of another open store than the "):
                        table.within(whole)
            for whole in of_theirs, in_theirs:
                with pytest.raises(UsageError, match="the table is of another open store than the "):
                    index.within(whole)
        assert (db.last_seqno, other.last_seqno) == before

        # One that was made by hand is of the store whose tables it has; what is put by ids is for any.
        made = WriteBatch()
        ours.within(made)["b"] = 2
        for table in theirs, other.table("missing", str, str):
            with pytest.raises(UsageError, match="than the batch"):
                table.within(made)
        for each in made, made.copy():
            with pytest.raises(UsageError, match="than the batch"):
                other.commit(each)
        db.commit(made)
        by_id = WriteBatch()
        by_id.put(b"k", b"v")
        by_id.table(16).put(b"b", b"v")
        other.commit(by_id)
        with db.batch() as batch:
            batch[b"k"] = b"v"
        other.commit(batch)
        assert (ours, theirs) == ({"a": 1, "b": 2}, {"a": "theirs", "b": "v"})


def test_past_moments_have_the_tables_of_then(db: kvwal.Store) -> None:
    users = db.table("users", str, int)
    users["a"] = 1
    first = db.last_seqno
    users["a"] = 2
    users["b"] = 3
    second = db.last_seqno
    db.checkpoint()
    db.drop_table("users")
    users["c"] = 4
    with db.snapshot(at=0) as then:
        assert users.within(then) == {}
    with db.snapshot(at=first) as then:
        assert users.within(then) == {"a": 1}
        assert len(users.within(then)) == 1
        assert list(users.within(then).scan(reverse=True)) == [("a", 1)]
    with users.at(second) as then:
        assert users.within(then) == {"a": 2, "b": 3}
    with db.snapshot() as now:
        assert users.within(now) == {"c": 4}
    assert [each.value for each in users.versions("c")] == [4]
    assert list(users.versions("a")) == [], "that was another table"


def test_versions_differences_and_what_is_brought_back(db: kvwal.Store) -> None:
    users = db.table("users", str, codecs.json())
    assert list(users.versions("a")) == []
    assert list(users.diff(0)) == []
    users.put("a", 1, meta={"why": "test"})
    one = db.last_seqno
    users["a"] = [2]
    users["b"] = 3
    users.delete_range("a", "b")
    kinds = [(each.kind, each.value, dict(each.meta)) for each in users.versions("a")]
    assert kinds == [("range", None, {}), ("put", [2], {}), ("put", 1, {"why": "test"})]
    assert next(users.versions("a")).time <= datetime.now(UTC)
    assert [(each.key, each.old, each.new) for each in users.diff(one)] == [("a", 1, None), ("b", None, 3)]
    assert [each.key for each in users.diff(one, reverse=True, start="b")] == ["b"]
    users.revert("a", to=one)
    assert users["a"] == 1
    users.revert("b", to=one)
    assert "b" not in users
    assert users.id is not None
    changes = [change for change in db.changes(0) if change.table == users.id and change.kind == "put"]
    assert [users.of(change) for change in changes] == [("a", 1), ("a", [2]), ("b", 3), ("a", 1)]
    with pytest.raises(ValueError, match="commit"):
        users.revert("a", to=99)


def past_of(table: Any, at: int) -> tuple[dict[str, Any], list[tuple[Any, ...]]]:
    """What a table was at a moment, and what differs since: that both say the same is checked in both directions."""
    with table.at(at) as then:
        was, now = dict(table.within(then)), dict(table)
    both = {*was, *now}
    expected = [(key, was.get(key), now.get(key)) for key in sorted(both) if was.get(key) != now.get(key)]
    assert list(table.diff(at)) == expected
    assert list(table.diff(at, reverse=True)) == expected[::-1]
    return was, expected


def test_a_moment_means_the_table_that_had_the_name_then(db: kvwal.Store) -> None:
    users = db.table("users", str, int)
    users.update({"ada": 1, "bob": 2, "cyd": 3})
    before = db.last_seqno
    db.drop_table("users")
    dropped = db.last_seqno
    assert past_of(users, before) == (
        {"ada": 1, "bob": 2, "cyd": 3},
        [("ada", 1, None), ("bob", 2, None), ("cyd", 3, None)],
    )
    assert list(users.diff(dropped, before, start="b", stop="c")) == [("bob", None, 2)]
    assert list(users.diff(before, start="c", stop="b")) == []
    assert list(users.versions("ada")) == []
    # What was not there is deleted, which makes no table.
    assert users.revert("dan", to=before) == dropped
    assert users.id is None
    # It is made by what is brought back, as by a put.
    assert users.revert("ada", to=before) == dropped + 1
    assert dict(users) == {"ada": 1}
    assert [version.value for version in users.versions("ada")] == [1]
    # Made again, with some that are the same.
    users.update({"bob": 2, "cyd": 33, "eve": 5})
    assert past_of(users, before)[1] == [("cyd", 3, 33), ("eve", None, 5)]
    assert list(users.diff(before, prefix="e")) == [("eve", None, 5)]
    users.revert("cyd", to=before)
    users.revert("eve", to=before)
    assert users == {"ada": 1, "bob": 2, "cyd": 3}
    users.revert("bob", to=dropped)
    assert users == {"ada": 1, "cyd": 3}
    assert {reader.purpose for reader in db.pins()} <= {"window"}


def test_a_moment_of_a_table_that_another_took_the_name_of(db: kvwal.Store) -> None:
    one, two = db.table("one", str, int), db.table("two", str, int)
    one["k"], two["k"] = 10, 20
    before = db.last_seqno
    db.drop_table("one")
    db.rename_table("two", "one")
    one["k"] = 21
    assert past_of(one, before) == ({"k": 10}, [("k", 10, 21)])
    assert past_of(two, before) == ({"k": 20}, [("k", 20, None)])
    assert [version.value for version in one.versions("k")] == [21, 20]
    one.revert("k", to=before)
    two.revert("k", to=before)
    assert (one["k"], two["k"]) == (10, 20)


def test_a_moment_of_a_table_with_other_codecs_is_refused(db: kvwal.Store) -> None:
    former = db.table("users", str, str)
    former["ada"] = "text"
    before = db.last_seqno
    db.drop_table("users")
    users = db.table("users", str, int)
    for read in (lambda: users.revert("ada", to=before), lambda: users.diff(before), lambda: users.diff(0, before)):
        with pytest.raises(TableCodecError):
            read()
    assert db.last_seqno == before + 1
    # A former version of the codec is one that it reads.
    first = db.table("docs", str, codecs.versioned(codecs.json(), version=1))
    first["ada"] = [1]
    then = db.last_seqno
    db.drop_table("docs")
    docs = db.table("docs", str, codecs.versioned(codecs.json(), version=2, upcasters={1: lambda old: [*old, 2]}))
    docs.revert("ada", to=then)
    assert docs["ada"] == [1, 2]
    assert list(docs.diff(then)) == []
    # The table was made for the newer one, as by a put.
    with pytest.raises(TableCodecError):
        first.get("ada")


def test_a_value_that_expires_is_brought_back_from_a_table_that_is_gone(db: kvwal.Store) -> None:
    users = db.table("users", str, int, expire_s=3600)
    users.put("ada", 1, expire_s=60)
    before, expires = db.last_seqno, users.expires("ada")
    db.drop_table("users")
    users.revert("ada", to=before)
    assert users.expires("ada") == expires


@pytest.mark.parametrize("there", [False, True])
def test_arguments_are_checked_whether_or_not_there_is_a_table(db: kvwal.Store, there: bool) -> None:
    users: Any = db.table("users", str, int)
    if there:
        users["ada"] = 1
    with pytest.raises(ValueError, match="commit 999"):
        users.revert("ada", to=999)
    with pytest.raises(ValueError, match="commit 999"):
        users.diff(999)
    for wrong in (
        lambda: users.diff("x"),
        lambda: users.diff(0, "x"),
        lambda: users.diff(0, start=5),
        lambda: users.versions(7),
        lambda: users.versions("ada", since="x"),
        lambda: users.versions("ada", until="x"),
        lambda: users.versions("ada", limit="x"),
        lambda: users.revert(7, to=0),
        lambda: users.revert("ada", to="x"),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="limit"):
        users.versions("ada", limit=-1)


def test_what_is_not_of_one_key_is_no_key_of_a_change(db: kvwal.Store) -> None:
    one: Any
    for name, key, one in (
        ("a", str, "a"),
        ("b", int, 1),
        ("c", tuple[str, int], ("a", 1)),
        ("d", datetime, datetime(2026, 1, 1, tzinfo=UTC)),
    ):
        table: Any = db.table(name, key, int)
        for deletes in ("clear", "range", "drop"):
            table[one] = 1
            position, table_id = db.last_seqno, table.id
            if deletes == "clear":
                table.clear()
            elif deletes == "range":
                table.delete_range(one)
            else:
                db.drop_table(name)
            [change] = db.changes(position, tables=table_id)
            with pytest.raises(UsageError, match=r"'delete_range' is not of one key: .*expand=True"):
                table.of(change)
            assert [table.of(each) for each in db.changes(position, tables=table_id, expand=True)] == [(one, None)]
        with (
            db.changes(db.last_seqno, follow=True, heartbeat_s=0.001) as feed,
            pytest.raises(UsageError, match="'heartbeat' is not of one key"),
        ):
            table.of(next(feed))


def test_of_refuses_a_change_of_another_table_and_says_whose_it_is(db: kvwal.Store) -> None:
    one, two = db.table("one", str, str), db.table("two", str, str)
    part = db.sub(b"part/", str, str)
    one["a"], two["a"], part["a"] = "1", "2", "0"
    of_one, of_two, of_default = db.changes(0)
    assert (one.of(of_one), two.of(of_two), part.of(of_default)) == (("a", "1"), ("a", "2"), ("a", "0"))
    with pytest.raises(UsageError, match="the change is of 'two', and not of 'one'"):
        one.of(of_two)
    with pytest.raises(UsageError, match="the change is of the default table, and not of 'one'"):
        one.of(of_default)
    with pytest.raises(UsageError, match="the change is of 'one', and not of the default table"):
        part.of(of_one)
    with pytest.raises(UsageError, match="the change is of 'one', and not of 'none'"):
        db.table("none", str, str).of(of_one)
    db.rename_table("one", "new")
    assert db.table("new", str, str).of(of_one) == ("a", "1")
    with pytest.raises(UsageError, match="the change is of 'new', and not of 'one'"):
        one.of(of_one)
    db.drop_table("two")
    # It may have been this table, and is read.
    assert two.of(of_two) == ("a", "2")
    two["b"] = "3"
    with pytest.raises(UsageError, match=r"the change is of table \d+, which was dropped, and not of 'two'"):
        two.of(of_two)


def test_a_part_of_the_default_table_has_no_keys_without_its_prefix(db: kvwal.Store) -> None:
    part, pairs = db.sub(b"settings/", str, str), db.sub(b"settings/", tuple[str, int], str)
    part["theme"] = "dark"
    db[b"sessions_theme"] = b"bright"
    db[b"set"] = b"short"
    inside, *outside = db.changes(0)
    assert part.of(inside) == ("theme", "dark")
    for change in outside:
        for each in (part, pairs):
            with pytest.raises(CodecError, match="they do not begin with b'settings/'"):
                each.of(change)
    # A deleted range that only overlaps it is no change of one key; expanded it is one of each.
    position = db.last_seqno
    db.delete_range(b"sess", b"settings/z")
    [deleted] = db.changes(position)
    with pytest.raises(UsageError, match="is not of one key"):
        part.of(deleted)
    told = list(db.changes(position, expand=True))
    assert [change.key for change in told] == [b"sessions_theme", b"set", b"settings/theme"]
    assert part.of(told[-1]) == ("theme", None)
    [only] = db.changes(position, prefix=b"settings/", expand=True)
    assert part.of(only) == ("theme", None)


def test_of_knows_the_tables_of_a_followed_store(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db, kvwal.follow(tmp_path / "s") as live:
        one, two = db.table("one", str, str), db.table("two", str, str)
        one["a"], two["a"] = "1", "2"
        assert live.wait(db.last_seqno, 30)
        of_one, of_two = live.changes(0)
        followed = live.table("one", str, str)
        assert followed.of(of_one) == ("a", "1")
        with pytest.raises(UsageError, match="the change is of 'two', and not of 'one'"):
            followed.of(of_two)
        # As it is seen once the follower has moved.
        db.rename_table("one", "old")
        db.rename_table("two", "one")
        assert live.wait(db.last_seqno, 30)
        assert followed.of(of_two) == ("a", "2")
        with pytest.raises(UsageError, match="the change is of 'old', and not of 'one'"):
            followed.of(of_one)


def test_the_past_of_a_store_that_keeps_none(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False, keep_history_bytes=0) as db:
        users = db.table("users", str, int)
        users["a"] = 1
        users["a"] = 2
        with pytest.raises(SnapshotTooOld):
            users.at(1)


# -- drop, rename ---------------------------------------------------------------------------------


def test_drop_and_rename(disk: SimulatedDisk, db: kvwal.Store) -> None:
    users = db.table("users", str, int)
    other = db.table("users", str, int)
    with pytest.raises(TableNotFoundError):
        db.drop_table("users")
    with pytest.raises(TableNotFoundError):
        db.rename_table("users", "people")
    users["a"] = 1
    before = users.id
    db.drop_table("users", meta={"why": "test"})
    assert users == other == {}
    assert users.id is None
    users["b"] = 2
    assert users.id != before, "an id is never given again"
    assert other == {"b": 2}
    db.table("people", str, int)["x"] = 1
    with pytest.raises(TableExistsError):
        db.rename_table("users", "people")
    assert db.rename_table("users", "users") == db.last_seqno
    db.rename_table("users", "staff")
    assert users == {}
    assert db.table("staff", str, int) == {"b": 2}
    with pytest.raises(TableCodecError):
        db.table("staff", int, int)
    db.checkpoint()
    db.close()
    with kvwal.open("/kv", files=disk, background=False) as again:
        assert [info.name for info in again.tables()] == ["people", "staff"]
        assert again.table("staff", str, int) == {"b": 2}
        assert problems_of(again) == []


def test_a_store_that_is_read_only_or_closed(disk: SimulatedDisk, db: kvwal.Store) -> None:
    db.table("users", str, int)["a"] = 1
    db.close()
    with pytest.raises(ClosedError):
        db.table("users", str, int)
    with kvwal.open("/kv", "r", files=disk) as reading:
        users = reading.table("users", str, int)
        assert users == {"a": 1}
        for call in (
            lambda: users.put("b", 1),
            lambda: users.clear(),
            lambda: reading.table("new", str, int).put("a", 1),
            lambda: reading.drop_table("users"),
            lambda: users.pop("a"),
        ):
            with pytest.raises(ReadOnlyError):
                call()
    for use in (lambda: users.get("a"), lambda: len(users), lambda: list(users), lambda: users.put("a", 1)):
        with pytest.raises(ClosedError):
            use()


# -- a part of the default table ------------------------------------------------------------------


def test_a_part_of_the_default_table(db: kvwal.Store) -> None:
    db.update({b"a": b"1", b"user:ada": b"2", b"user:grace": b"3", b"user;": b"4"})
    users = db.sub(b"user:", str, str)
    assert users == {"ada": "2", "grace": "3"}
    assert len(users) == 2
    assert users.last() == ("grace", "3")
    assert list(users.scan(prefix="g")) == [("grace", "3")]
    assert list(users.scan("b", reverse=True)) == [("grace", "3")]
    users["bob"] = "x"
    assert db[b"user:bob"] == b"x"
    assert users.pop("bob") == "x"
    assert users.put_if_absent("bob", "y")
    with db.transaction() as txn:
        users.within(txn)["eve"] = "z"
        assert txn[b"user:eve"] == b"z"
    with db.batch() as batch:
        users.within(batch)["mallory"] = "m"
    with db.snapshot(at=1) as then:
        assert users.within(then) == {"ada": "2", "grace": "3"}
    assert [each.value for each in users.versions("bob")] == ["y", None, "x"]
    assert users.popitem() == ("mallory", "m")
    assert users.popitem(last=False) == ("ada", "2")
    users.clear()
    assert dict(db) == {b"a": b"1", b"user;": b"4"}
    assert db.sub(b"\xff\xff") == {}
    end = db.sub(b"\xff")
    end[b"k"] = b"v"
    assert dict(end) == {b"k": b"v"}
    end.clear()
    assert len(db) == 2
    assert db.tables() == []
    numbers = db.sub(b"n", value=int)
    assert numbers.add(b"hits", 3) == 3


# -- threads --------------------------------------------------------------------------------------


def test_threads_that_write_first_make_one_table(db: kvwal.Store) -> None:
    start = threading.Barrier(8)

    def work(number: int) -> None:
        table = db.table("shared", int, int)
        start.wait()
        for i in range(20):
            table[number * 100 + i] = i

    run_threads(*(lambda number=number: work(number) for number in range(8)))
    assert len(db.tables()) == 1
    assert len(db.table("shared", int, int)) == 160


def test_writers_of_a_table_that_is_dropped_and_renamed_leave_nothing_behind(db: kvwal.Store) -> None:
    """A commit to a table that was dropped before it would be in no table that has a name."""
    done = threading.Event()

    def write(number: int) -> None:
        rng, table = Random(number), db.table("t", int, int)
        i = 0
        while not done.is_set():
            i += 1
            key = rng.randrange(10)
            [
                lambda: table.put(key, i),
                lambda: table.pop(key, None),
                lambda: db.run(lambda txn: table.within(txn).put(key, i)),
                lambda: table.get(key),
            ][rng.randrange(4)]()

    def drop() -> None:
        try:
            for i in range(60):
                try:
                    if i % 3:
                        db.drop_table("t")
                    else:
                        db.rename_table("t", f"t{i}")
                except TableNotFoundError:
                    pass
        finally:
            done.set()

    run_threads(*(lambda number=number: write(number) for number in range(3)), drop)
    check_store(db)
    known = {info.id for info in db.tables()} | {0, 1}
    memtable = db.engine.state.version.memtable
    with db.snapshot() as now:
        for table in {table for table, _ in memtable.parts.written()} - known:
            assert dict(now.part(table)) == {}, "something was put into a table that has no name"
    seqnos: dict[int, int] = {}
    for change in db.changes(0):
        if change.kind == "delete_range":
            seqnos[change.table] = change.seqno
        assert change.table not in seqnos or seqnos[change.table] >= change.seqno, "a change of a dropped table"
    assert problems_of(db) == []


def test_a_name_means_another_table_from_the_moment_that_the_commit_is_seen(db: kvwal.Store) -> None:
    """There was a thread between the two: the one that renamed told the others when its call returned."""
    users = db.table("users", str, int)
    users["a"] = 1
    real = db.engine.commit
    seen: list[Any] = []

    def commit(request: Any) -> Any:
        seqno = real(request)
        if request.operation is not None and not seen:
            # The commit is visible, and the call not over.
            seen.append((users.get("a"), users.put("b", 2), users.get("b"), dict(db.table("users", str, int))))
        return seqno

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db.engine, "commit", commit)
        db.rename_table("users", "people")
    assert seen[0][0] is None
    assert seen[0][2:] == (2, {"b": 2})
    assert db.table("people", str, int) == {"a": 1}
    seen.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db.engine, "commit", commit)
        db.drop_table("users")
    assert seen[0][2:] == (2, {"b": 2})
    assert users == {"b": 2}


def test_a_put_with_a_stamp_that_is_tried_again_after_a_rename_goes_by_name(db: kvwal.Store) -> None:
    """As after a full disk. The keys were filled in at the first time, in a batch of its own."""
    users = db.table("users", tuple[codecs.Versionstamp], int)
    users.put((kvwal.SEQNO,), 1)
    found = users._stored.to_write()
    assert found is not None
    batch = kvwal.WriteBatch()
    table, batch.names = found.id, found.names
    batch.table(table).put_stamped(b"\x33", b"x" * 8)
    request = CommitRequest(EncodedBatch(batch), sync=False)
    assert isinstance(request.writes, EncodedBatch)
    request.writes = request.writes.filled(db.last_seqno + 1)
    db.rename_table("users", "people")
    db.engine.queue.submit([request])
    assert isinstance(request.error, TableNotFoundError)
    assert len(db.table("people", tuple[codecs.Versionstamp], int)) == 1


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("begins", ["before the drop", "behind it", "in its group"])
def test_a_transaction_by_the_id_of_a_dropped_table_is_refused(db: kvwal.Store, begins: str, reads: bool) -> None:
    users = db.table("users", str, int)
    users["a"] = 1
    table = users.id
    assert table is not None
    if begins == "behind it":
        db.drop_table("users")
    txn = db.transaction()
    if reads:
        txn.get(b"other")
    txn.put(b"k", b"v")
    txn.part(table).put(b"x", b"v")
    if begins == "in its group":
        request = txn.request()
        row = db.engine.tables.row("users")
        assert request is not None
        assert row is not None
        db.engine.queue.submit([CommitRequest(sync=False, operation=Drop(row)), request])
        txn.abort()
        assert isinstance(request.error, TableNotFoundError)
    else:
        if begins == "before the drop":
            db.drop_table("users")
        with pytest.raises(TableNotFoundError, match=f"there is no table {table}"):
            txn.commit()
    with db.snapshot() as now:
        assert (dict(now), dict(now.part(table))) == ({}, {})
    assert problems_of(db) == []


@pytest.mark.parametrize("what", ["rename", "drop"])
def test_a_put_behind_a_rename_or_drop_in_its_group_goes_by_name(db: kvwal.Store, what: str) -> None:
    users = db.table("users", str, int)
    users["a"] = 1
    row = db.engine.tables.row("users")
    assert row is not None
    batch = kvwal.WriteBatch()
    found = users._stored.to_write()
    assert found is not None
    table, batch.names = found.id, found.names
    batch.table(table).put(b"b", b"x" * 8)
    by_id = kvwal.WriteBatch()
    by_id.table(table).put(b"c", codecs.value_codec(int).encode(3))
    operation: Any = Rename("users", "people") if what == "rename" else Drop(row)
    requests = [
        CommitRequest(sync=False, operation=operation),
        CommitRequest(EncodedBatch(batch), sync=False),
        CommitRequest(EncodedBatch(by_id), sync=False),
        CommitRequest(sync=False, operation=Update(b"a", lambda old: b"y" * 8, None, table, found.names)),
    ]
    db.engine.queue.submit(requests)
    assert requests[0].error is None
    assert isinstance(requests[1].error, TableNotFoundError)
    assert isinstance(requests[3].error, TableNotFoundError)
    # What is for an id goes with the table, wherever its name went.
    assert isinstance(requests[2].error, TableNotFoundError) == (what == "drop")
    assert users == {}
    if what == "rename":
        assert db.table("people", str, int) == {"a": 1, "c": 3}


class _Model(dict[str, int]):
    def add(self, key: str, delta: int) -> int:
        self[key] = self.get(key, 0) + delta
        return self[key]

    def put_if_absent(self, key: str, value: int) -> bool:
        return self.compare_and_set(key, None, value)

    def compare_and_set(self, key: str, expected: int | None, value: int) -> bool:
        if self.get(key) != expected:
            return False
        self[key] = value
        return True


_CHANGES: dict[str, Callable[[Any], Any]] = {
    "add": lambda table: table.add("a", 5),
    "pop": lambda table: table.pop("a", None),
    "put_if_absent": lambda table: table.put_if_absent("x", 5),
    "setdefault": lambda table: table.setdefault("x", 5),
    "compare_and_set": lambda table: table.compare_and_set("x", None, 5),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
@pytest.mark.parametrize("what", ["rename", "drop", "index"])
def test_a_change_that_a_rename_drop_or_index_overtakes_is_one_of_what_has_the_name(
    db: kvwal.Store, what: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    users = db.table("users", str, codecs.counter)
    users["a"] = 1
    users["b"] = 2
    dict(users)
    real = db.engine.commit
    seen = []

    def commit(request: Any) -> Any:
        if isinstance(request.operation, Update) and not seen:
            seen.append(request)
            if what == "rename":
                db.rename_table("users", "people")
                db.table("users", str, codecs.counter)["c"] = 3
            elif what == "drop":
                db.drop_table("users")
                db.table("users", str, codecs.counter)["c"] = 3
            else:
                assert users.index("by_value", key=lambda value: value, codec=int).wait()
        return real(request)

    model = _Model({"a": 1, "b": 2} if what == "index" else {"c": 3})
    expected = change(model)
    with monkeypatch.context() as patch:
        patch.setattr(db.engine, "commit", commit)
        assert change(users) == expected
    assert seen
    assert dict(users) == model
    if what == "rename":
        assert dict(db.table("people", str, codecs.counter)) == {"a": 1, "b": 2}
    assert problems_of(db) == []


def test_a_codec_that_makes_no_bytes_of_a_bound_deletes_nothing(db: kvwal.Store) -> None:
    class Forgets:
        name, version, ordered = "forgets", 1, True

        def encode(self, value: str) -> bytes:
            return None if value == "x" else value.encode()  # type: ignore[return-value]  # a codec at fault

        def decode(self, data: bytes) -> str:
            return data.decode()

    table = db.table("t", Forgets(), bytes)
    table.update({"a": b"", "z": b""})
    for bounds in (("x", "y"), ("a", "x")):
        with pytest.raises(TypeError):
            table.delete_range(*bounds)
    assert list(table) == ["a", "z"]


def test_compare_and_set_takes_none_for_no_key_and_not_for_a_null(db: kvwal.Store) -> None:
    table = db.table("t", str, codecs.json())
    table["null"] = None
    assert not table.put_if_absent("null", 1)
    assert not table.compare_and_set("null", None, 1)
    assert not table.compare_and_set("null", None, None)
    assert table["null"] is None
    assert table.compare_and_set("new", None, 1)
    assert table.compare_and_set("new", 1, None)
    assert "new" not in table
    assert table.compare_and_set("new", None, None)

    # As docs/tables.md says.
    def replace(txn: kvwal.Transaction) -> None:
        part = table.within(txn)
        if "null" in part and part["null"] is None:
            part["null"] = 2

    db.run(replace)
    assert table["null"] == 2


def test_a_queue_of_threads_takes_each_once(db: kvwal.Store) -> None:
    queue = db.table("queue", int, str)
    queue.update((number, str(number)) for number in range(200))
    taken: list[int] = []

    def take() -> None:
        try:
            while True:
                taken.append(queue.popitem(last=False)[0])
        except KeyError:
            return

    run_threads(*[take] * 4)
    assert sorted(taken) == list(range(200))


def test_a_queue_that_many_take_from_is_decoded_ahead_and_no_more_once_it_is_calm(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = db.table("queue", int, str)
    queue.update((number, str(number)) for number in range(100))
    read_edge = Waiting.read_edge
    others = iter(range(100))

    async def read_and_wait(*args: Any, **kwargs: Any) -> list[tuple[bytes, bytes]]:
        pairs = await read_edge(*args, **kwargs)
        # Meanwhile others take three.
        for _ in range(3):
            queue.delete(next(others))
        return pairs

    with monkeypatch.context() as patch:
        patch.setattr(Waiting, "read_edge", read_and_wait)
        assert queue.popitem(last=False) == (9, "9")
    assert queue._way.ahead == 4
    for number in range(10, 20):
        assert queue.popitem(last=False) == (number, str(number))
    assert queue._way.ahead == 1


class Picky:
    """A codec of a program that reads no value with an x in it, and says so in a way of its own."""

    name = "picky"
    version = 1

    def encode(self, value: str) -> bytes:
        return value.encode()

    def decode(self, data: bytes) -> str:
        if b"x" in data:
            raise LookupError("x")
        return data.decode()


@pytest.mark.parametrize("part", ["table", "sub", "expiring"])
def test_what_cannot_be_decoded_is_not_taken(db: kvwal.Store, part: str) -> None:
    if part == "sub":
        table, others = db.sub(b"t/", str, Picky()), db.sub(b"t/", str, str)
    else:
        expire_s = 3600 if part == "expiring" else None
        table = others = db.table("t", str, Picky(), expire_s=expire_s)
    for key in "abcd":
        others[key] = "x" if key in "ad" else key
    takes: list[Callable[[], object]] = [
        lambda: table.pop("a"),
        lambda: table.pop("d", None),
        table.popitem,
        lambda: table.popitem(last=False),
    ]
    for take in takes:
        before = db.last_seqno
        with pytest.raises(LookupError):
            take()
        assert db.last_seqno == before
    assert len(table) == 4
    assert table.popitem("b", "d") == ("c", "c")
    # What lies behind the one that is taken is not in the way.
    table._way.ahead = 8
    assert table.popitem("b", last=False) == ("b", "b")
    with pytest.raises(LookupError):
        table.setdefault("new", "xyz")
    assert "new" not in table
    assert table.setdefault("new", "yz") == "yz"
    assert list(table.keys()) == ["a", "d", "new"]


def test_what_is_changed_while_it_is_popped_is_decoded_anew(db: kvwal.Store) -> None:
    table = db.table("t", str, Picky())
    changes = iter(["2", "3x"])

    class Between:
        name, version = "picky", 1

        def encode(self, value: str) -> bytes:
            return value.encode()

        def decode(self, data: bytes) -> str:
            found = Picky().decode(data)
            for value in changes:
                table["a"] = value
                break
            return found

    table["a"] = "1"
    with pytest.raises(LookupError):
        db.table("t", str, Between()).pop("a")
    table["b"] = "1"
    changes = iter(["2"])
    assert db.table("t", str, Between()).popitem() == ("b", "1")
    assert [(key, value) for key, value in table.raw().items()] == [(b"a", b"2")]


# -- crashes --------------------------------------------------------------------------------------


def contents(db: kvwal.Store) -> dict[str, dict[str, int]]:
    return {info.name: dict(db.table(info.name, str, int)) for info in db.tables()}


def test_a_power_cut_leaves_each_table_whole() -> None:
    """At each operation of making, renaming and dropping tables, with checkpoints between."""
    states: list[dict[str, dict[str, int]]] = [{}]

    def program(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            steps: list[Any] = [
                lambda: db.table("a", str, int).put("x", 1),
                lambda: db.run(lambda txn: [db.table(name, str, int).within(txn).put("x", 2) for name in "abc"]),
                lambda: db.rename_table("b", "d"),
                db.checkpoint,
                lambda: db.drop_table("a"),
                lambda: db.table("a", str, int).update({"y": 3}),
                db.checkpoint,
                lambda: db.drop_table("d"),
            ]
            for number, step in enumerate(steps, 1):
                step()
                acknowledged.append(number)
                if len(states) == number:
                    states.append(contents(db))

    def check(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            found = contents(db)
            assert found in states[len(acknowledged) : len(acknowledged) + 2]
            assert problems_of(db) == []
            db.table("new", str, int)["z"] = 1
            ids = [info.id for info in db.tables()]
            assert len(set(ids)) == len(ids)

    program(SimulatedDisk(), [])
    report = crash_every(program, check, states_per_point=3)
    assert report.points > 40


# -- codecs of users ------------------------------------------------------------------------------


class Odd:
    """It stops where it should not, and makes keys of another type than bytes."""

    name = "odd"
    version = 1
    ordered = True

    def encode(self, value: str) -> Any:
        return bytearray(value, "ascii")

    def decode(self, data: bytes) -> str:
        if data == b"stop":
            raise StopIteration
        return data.decode("ascii")


def test_a_codec_that_raises_stop_iteration_ends_no_scan_silently(db: kvwal.Store) -> None:
    for table in (db.table("values", str, Odd()), db.sub(b"x", str, Odd())):
        table.update({"a": "go", "b": "stop", "c": "go"})
        for ways in (table.scan, table.values, table.items, lambda table=table: table.values(reverse=True)):
            with pytest.raises(RuntimeError):
                list(ways())
        with pytest.raises(RuntimeError):
            list(reversed(table.values()))
        with pytest.raises(RuntimeError):
            list(reversed(table.items()))
        with pytest.raises(RuntimeError), db.snapshot() as snapshot:
            list(table.within(snapshot).scan())
        with pytest.raises(RuntimeError), db.transaction() as txn:
            list(table.within(txn).scan())
    keys = db.table("keys", Odd(), str)
    keys.update({"go": "", "stop": "", "very": ""})
    for ways in (keys.keys, keys.__iter__, lambda: reversed(keys.keys())):
        with pytest.raises(RuntimeError):
            list(ways())


def test_keys_of_a_codec_at_fault_are_checked_everywhere(db: kvwal.Store) -> None:
    table = db.table("t", Odd(), str)
    table["a"] = "1"
    assert table["a"] == "1"
    assert [version.value for version in table.versions("a")] == ["1"]
    assert table.get_many(["a"]) == ["1"]
    assert table.rank("b") == 1
    with table.cursor() as cursor:
        assert cursor.seek("a")
    table.delete("a")
    assert len(table) == 0


class Never:
    """Keys that are not equal to themselves, as NaN is not."""

    name = "never"
    version = 1
    ordered = True

    def encode(self, value: float | str) -> bytes:
        return str(value).encode()

    def decode(self, data: bytes) -> float | str:
        return float("nan") if data == b"nan" else data.decode()


def test_a_cursor_compares_keys_as_bytes(db: kvwal.Store) -> None:
    table = db.table("t", Never(), str)
    table.update({"a": "1", float("nan"): "2", "z": "3"})
    with table.cursor() as cursor:
        assert cursor.seek_last(float("nan"))
        assert cursor.value == "2"
        assert cursor.next()
        assert cursor.pair == ("z", "3")
        assert cursor.prev()
        assert cursor.value == "2"
        assert cursor.next()
        assert cursor.value == "3"
        assert cursor.prev()
        assert cursor.prev()
        assert cursor.pair == ("a", "1")


def test_a_cursor_goes_on_behind_what_cannot_be_read(db: kvwal.Store) -> None:
    table = db.table("t", str, codecs.json())
    table.update({"a": 1, "b": 2, "c": 3})
    with db.batch() as batch:
        assert table.id is not None
        batch.table(table.id).put(b"b", b"{")
    with table.cursor() as cursor:
        for seek in (cursor.seek, cursor.seek_last):
            with pytest.raises(CodecError):
                seek("b")
            assert cursor.pair is None
            assert cursor.next()
            assert cursor.pair == ("c", 3)
            with pytest.raises(CodecError):
                cursor.prev()
            assert cursor.prev()
            assert cursor.pair == ("a", 1)


def test_a_prefix_may_be_as_long_as_the_longest_key(db: kvwal.Store) -> None:
    table, part = db.table("t", tuple[bytes, ...], int), db.sub(b"x", tuple[bytes, ...], int)
    for of, most in ((table, kvwal.MAX_KEY_BYTES), (part, kvwal.MAX_KEY_BYTES - 1)):
        longest = (b"a" * (most - 2),)
        of.update({(b"a",): 0, longest: 1, (b"b",): 2})
        assert list(of.scan(prefix=longest)) == [(longest, 1)]
        assert (of.count(prefix=longest), of.first(prefix=longest), of.last(prefix=longest)) == (
            1,
            (longest, 1),
            (longest, 1),
        )
        of.delete_range(prefix=longest)
        assert list(of) == [(b"a",), (b"b",)]


def test_a_cursor_of_the_longest_key_and_of_a_part_of_the_store(db: kvwal.Store) -> None:
    longest = b"x" * kvwal.MAX_KEY_BYTES
    db.update({b"a": b"", longest: b"1", b"y": b"2"})
    part = db.sub(b"x")
    for cursor, key in ((db.cursor(), longest), (part.cursor(), longest[1:])):
        with cursor:
            assert cursor.seek_last(key)
            assert cursor.key == key
            assert cursor.next() is (key == longest)
    with part.cursor() as cursor:
        assert cursor.last()
        assert cursor.key == longest[1:]
        assert not cursor.prev()
        assert not part.cursor().seek(b"y")
    with db.cursor() as every:
        assert not every.seek(kvwal.END)  # type: ignore[arg-type]  # it is no key
        assert every.prev()
        assert every.key == b"y"


def test_the_end_of_all_keys_is_a_bound_of_tables_and_their_parts_and_indexes(db: kvwal.Store) -> None:
    end = kvwal.END
    words, pairs = db.table("words", str, int), db.table("pairs", tuple[str, int], int)
    words.update({"": 0, "a": 1, "b": 2})
    pairs.update({("a", 1): 1, ("b", 2): 2, ("c", 3): 3})
    sub, raw = db.sub(b"s:", str, int), db.sub(b"r:")
    sub.update({"": 0, "a": 1, "b": 2})
    raw.update({b"\xff": b"1", b"\xff\xff": b"2", b"": b""})
    db[b"x"] = b"behind the parts"
    tables: list[Any] = [words, pairs, sub, raw]
    with db.snapshot() as snapshot, db.transaction() as txn:
        for table in (*tables, *(each.within(way) for each in tables for way in (snapshot, txn))):
            for reverse in (False, True):
                assert list(table.keys(end, reverse=reverse)) == list(table.scan(end, end, reverse=reverse)) == []
            assert (table.count(end), table.first(end), table.last(end)) == (0, None, None)
            keys = list(table)
            assert list(table.keys(keys[1], end)) == list(table.keys(keys[1])) == keys[1:]
            assert table.key_at(-1, keys[1], end) == keys[-1]
            with pytest.raises(IndexError):
                table.key_at(0, end)
            assert not table.cursor().seek(end)
            with table.cursor() as cursor:
                assert cursor.seek_last(end)
                assert cursor.key == keys[-1]
        words.within(txn).delete_range(end)
        words.within(txn).delete_range("b", end)
        assert list(words.within(txn)) == ["", "a"]
        txn.abort()
    assert list(words.keys(end, prefix="a")) == []
    assert list(words.diff(0, start=end)) == []
    assert [found.key for found in words.diff(0, start="b", stop=end)] == ["b"]
    assert list(raw.keys(kvwal.prefix_stop(b"\xff"))) == []
    with pytest.raises(TypeError):
        words.keys(end, 5)
    by_value = words.index("by_value", key=lambda value: value, codec=int)
    assert by_value.wait(60)
    with db.transaction() as txn:
        for index in (by_value, by_value.within(txn)):
            assert list(index.keys(end)) == list(index.scan(end, end)) == []
            assert (index.count(end), index.count(1, end)) == (0, 2)
            assert [entry.key for entry in index.scan(1, end, reverse=True)] == ["b", "a"]
    before = dict(words)
    words.delete_range(end)
    with pytest.raises(KeyError):
        words.popitem(end)
    assert words == before
    assert words.popitem("a", end) == ("b", 2)
    words.delete_range("a", end)
    assert words == {"": 0}
    with db.batch() as batch:
        sub.within(batch).delete_range(end)
        sub.within(batch).delete_range("b", end)
    assert list(sub) == ["", "a"]
    assert b"x" in db


def test_a_delete_without_a_table_returns_the_last_seqno(db: kvwal.Store) -> None:
    db[b"a"] = b"b"
    table = db.table("none", str, str)
    assert table.delete("x") == table.delete_range() == 1
    assert db.last_seqno == 1


@pytest.mark.parametrize("table", [1, 15, 1 << 31, (1 << 32) - 1])
def test_a_user_does_not_write_to_a_table_of_the_stores_own(db: kvwal.Store, table: int) -> None:
    calls: list[Callable[[MutableMapping[bytes, bytes]], object]] = [
        lambda part: part.__setitem__(b"\x03c", b"\x01"),
        lambda part: part.update({b"\x03c": b"\x01"}),
        lambda part: part.popitem(),
        lambda part: part.clear(),
    ]
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.table(table).put(b"\x03c", b"\x01")
    with pytest.raises(ValueError, match=f"table {table} is the store's own"):
        db.commit(batch)
    with pytest.raises(ValueError, match="the store's own"), db.batch() as batch:
        batch.table(table).delete_range()
    for call in calls:
        with db.transaction() as txn, pytest.raises(ValueError, match="the store's own"):
            call(txn.part(table))
        with pytest.raises(ValueError, match="the store's own"):
            db.run(lambda txn, call=call: call(txn.part(table)))
        with pytest.raises(ReadOnlyError), db.transaction(read_only=True) as txn:
            call(txn.part(table))
    db[b"b"] = b"2"
    with db.consumer("mailer", start="oldest", timeout_s=0) as consumer:
        with pytest.raises(ValueError, match="the store's own"):
            consumer.project(lambda txn, changes: calls[0](txn.part(table)), timeout_s=0)
        consumer.project(lambda txn, changes: txn.part(table).get(b"\x03c"), timeout_s=0)
    assert dict(db) == {b"b": b"2"}
    assert problems_of(db) == []


@pytest.mark.parametrize(
    ("value", "says"), [(b"{}", "the row of table b'b' is not valid"), (b'{"v":2}', "is of version 2")]
)
def test_a_row_that_cannot_be_read_hides_no_other_table(db: kvwal.Store, value: bytes, says: str) -> None:
    for name in ("a", "b", "c"):
        db.table(name, str, str)["k"] = name
    batch = WriteBatch()
    batch.table(1).put(b"\x01b", value)
    batch.table(1).put(b"\x01b\xff", value)
    commit_rows(db, batch)
    first, bad, worse, last = db.tables()
    assert (first.name, first.keys, first.problem) == ("a", 1, None)
    assert (bad.name, bad.id, bad.key, bad.value, bad.keys) == ("b", -1, "", "", 0)
    assert bad.problem is not None
    assert says in bad.problem
    assert worse.name == "b\\xff"
    assert last.name == "c"


def test_what_stands_for_a_table_says_which_it_is(db: kvwal.Store) -> None:
    named, part = db.table("users", str, codecs.json()), db.sub(b"users/", str, codecs.json())
    for table, is_default in ((named, False), (part, True)):
        with db.batch() as batch, db.snapshot() as snapshot, db.transaction() as txn:
            for each in (table, table.within(batch), table.within(snapshot), table.within(txn)):
                assert (each.name, each.is_default) == (table.name, is_default)
