"""Indexes of tables: declared, kept, built, dropped, read at every moment; and what refuses to let one go stale."""

from __future__ import annotations

import errno
import gc
import threading
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from collected import collected_everywhere
from store_fixtures import TINY, check_store, commit_rows, interrupted_at, problems_of, run_threads, wait_until

import kvwal
from kvwal import codecs
from kvwal.codecs import SEQNO, Versionstamp
from kvwal.engine.index_commits import DropIndex, without_indexes
from kvwal.engine.indexes import as_index_key, decode_indexes, encode_indexes, entries_of, entry_of, reverse_of
from kvwal.engine.request import CommitRequest
from kvwal.engine.row_cache import IndexRow
from kvwal.engine.tables import CodecName, TableRow, encode_row, row_key
from kvwal.engine.writes import EncodedBatch
from kvwal.errors import (
    ConflictError,
    CorruptionError,
    IndexesChangedError,
    IndexNotDeclaredError,
    IndexNotFoundError,
    IndexNotReadyError,
    ReadOnlyError,
    TableCodecError,
)
from kvwal.tables.index import Index, IndexSpec
from kvwal.testing import SimulatedDisk, crash_every

User = dict[str, Any]
STR = CodecName("str", 1)
INDEX = IndexRow("i", 1 << 31, ("str", 1))


def city_of(user: User) -> str | None:
    return user.get("city")


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


def open_store(disk: SimulatedDisk, flag: Any = "c", **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", flag, files=disk, background=False, **options)


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with open_store(disk) as store:
        yield store
        if not store.closed:
            check_store(store)
            assert problems_of(store) == []


def users_of(db: kvwal.Store) -> kvwal.Table[str, User]:
    return db.table("users", str, codecs.json())


def by_city_of(users: kvwal.Table[str, User]) -> kvwal.Index[str, str, User]:
    return users.index("by_city", key=city_of, codec=str)


@pytest.fixture
def users(db: kvwal.Store) -> kvwal.Table[str, User]:
    return users_of(db)


@pytest.fixture
def by_city(users: kvwal.Table[str, User]) -> kvwal.Index[str, str, User]:
    return by_city_of(users)


def keys_of(index: Any) -> list[tuple[Any, Any]]:
    return list(index.keys())


# -- declaring ------------------------------------------------------------------------------------


def test_an_index_is_declared_on_a_table_that_is_not_there_and_makes_it(db: kvwal.Store, by_city: Any) -> None:
    (info,) = db.tables()
    assert info.indexes == (kvwal.IndexInfo("by_city", "str", 0, True),)
    assert keys_of(by_city) == []
    assert by_city.progress == (0, 0)
    assert by_city.wait(0)


def test_declaring_an_index_again_makes_no_commit(db: kvwal.Store, users: Any, by_city: Any) -> None:
    before = db.last_seqno
    again = by_city_of(users)
    assert db.last_seqno == before
    users["ada"] = {"city": "Oslo"}
    assert again.get("Oslo") == by_city.get("Oslo") == [("ada", {"city": "Oslo"})]
    assert repr(by_city) == "<kvwal.Index 'by_city' of 'users', str: json>"
    assert by_city.name == "by_city"


def test_an_index_with_another_codec_is_refused(db: kvwal.Store, users: Any, by_city: Any) -> None:
    with pytest.raises(TableCodecError, match="keys of index 'by_city' of table 'users' are str"):
        users.index("by_city", key=len, codec=int)
    # And by the commit leader, where two declare it at once.
    indexes = db.engine.tables.indexes
    spec: IndexSpec[Any, Any, Any] = IndexSpec(users._spec, "by_city", len, int, False)
    operation = indexes.declaring("users", users._spec.asked, spec.declared)
    with pytest.raises(TableCodecError):
        db._commit_operation(operation, None)
    users["a"] = {"city": "x"}
    assert keys_of(by_city) == [("x", "a")]


def test_wrong_arguments_are_refused(db: kvwal.Store, users: Any, by_city: Any) -> None:
    wrong: Any
    for wrong, error in (
        (("", len, int), ValueError),
        ((1, len, int), TypeError),
        (("i", "city", int), TypeError),
        (("i", len, codecs.json()), TypeError),
    ):
        with pytest.raises(error):
            users.index(wrong[0], key=wrong[1], codec=wrong[2])
    with pytest.raises(TypeError, match="default table"):
        db.sub(b"a", str).index("i", key=len, codec=int)
    with pytest.raises(TypeError, match="either equal"):
        by_city.scan("a", equal="a")
    with pytest.raises(TypeError):
        by_city.within(db)
    users["zoe"] = {}
    for none_of_its_keys in (3, None):
        with pytest.raises(TypeError, match="str is expected"):
            by_city.get(none_of_its_keys)
    with pytest.raises(TypeError):
        by_city.__reduce__()
    assert [index.name for info in db.tables() for index in info.indexes] == ["by_city"]


def test_a_store_open_for_reading_reads_an_index_that_is_there_and_makes_none(disk: SimulatedDisk) -> None:
    with open_store(disk) as db:
        users = users_of(db)
        by_city_of(users)
        users["ada"] = {"city": "Oslo"}
    with open_store(disk, "r") as db:
        users = users_of(db)
        assert keys_of(by_city_of(users)) == [("Oslo", "ada")]
        with pytest.raises(IndexNotFoundError) as found:
            users.index("other", key=len, codec=int)
        assert (found.value.table, found.value.index) == ("users", "other")
        with pytest.raises(ReadOnlyError):
            users.drop_index("by_city")
        assert problems_of(db) == []


# -- what refuses a commit ----------------------------------------------------------------------


def test_what_the_function_raises_refuses_the_commit_and_changes_nothing(db: kvwal.Store, users: Any) -> None:
    def strict(user: User) -> int:
        if user.get("bad"):
            raise RuntimeError("bad user")
        return len(user)

    index = users.index("strict", key=strict, codec=int)
    users["ada"] = {"a": 1}
    before = db.last_seqno
    bad = {"bad": True}

    def in_transaction() -> None:
        with db.transaction() as txn:
            users.within(txn)["c"] = {}
            users.within(txn)["b"] = bad

    def in_batch() -> None:
        with db.batch() as batch:
            users.within(batch)["c"] = {}
            users.within(batch)["b"] = bad

    for call in (
        lambda: users.put("b", bad),
        lambda: users.update({"c": {}, "b": bad}),
        lambda: users.setdefault("b", bad),
        lambda: users.put_if_absent("b", bad),
        lambda: users.compare_and_set("ada", {"a": 1}, bad),
        in_transaction,
        in_batch,
    ):
        with pytest.raises(RuntimeError, match="bad user"):
            call()
    assert db.last_seqno == before
    assert keys_of(index) == [(1, "ada")]
    assert dict(users) == {"ada": {"a": 1}}


@pytest.mark.parametrize(("key", "error"), [(lambda user: 3, TypeError), (lambda user: "\ud800", ValueError)])
def test_an_index_key_of_another_type_refuses_the_commit(users: Any, key: Any, error: type[Exception]) -> None:
    users.index("i", key=key, codec=str)
    with pytest.raises(error):
        users["ada"] = {}
    assert not users


def test_index_key_and_key_together_have_a_limit(db: kvwal.Store) -> None:
    table = db.table("t", bytes, bytes)
    index = table.index("all", key=lambda value: value, codec=bytes)
    fits = b"v" * (65_535 - 2 - 3)
    table[b"key"] = fits
    assert table.index("twice", key=lambda value: [value[:9], value[:40_000]], codec=bytes, many=True).wait()
    with pytest.raises(ValueError, match="65536 bytes together"):
        table[b"keys"] = fits
    with pytest.raises(ValueError, match="65536 bytes together"):
        # A zero takes two bytes.
        table[b"key"] = b"\0" + fits[1:]
    assert list(index.scan()) == [(fits, b"key", fits)]


def test_a_put_into_a_table_whose_index_is_not_declared_is_refused_and_names_it(disk: SimulatedDisk) -> None:
    with open_store(disk) as db:
        users = users_of(db)
        by_city_of(users)
        users.update({"ada": {"city": "Oslo"}, "bob": {"city": "Rom"}, "eve": {"city": "Rom"}, "zoe": {}})
    with open_store(disk) as db:
        users = users_of(db)
        before = db.last_seqno

        def in_transaction() -> None:
            with db.transaction() as txn:
                users.within(txn)["b"] = {}

        def in_batch() -> None:
            with db.batch() as batch:
                users.within(batch)["b"] = {}

        for call in (
            lambda: users.put("b", {}),
            lambda: users.update({"b": {}}),
            lambda: users.setdefault("b", {}),
            lambda: users.put_if_absent("b", {}),
            lambda: users.compare_and_set("ada", {"city": "Oslo"}, {}),
            in_transaction,
            in_batch,
        ):
            with pytest.raises(IndexNotDeclaredError) as found:
                call()
            assert (found.value.table, found.value.index) == ("users", "by_city")
            assert "index('by_city', key=..., codec=...)" in str(found.value)
            assert "drop_index('by_city')" in str(found.value)
        assert db.last_seqno == before
        assert users["ada"] == {"city": "Oslo"}
        # What needs no function works, and keeps the index right.
        del users["ada"]
        assert users.popitem() == ("zoe", {})
        users.delete_range("c", "f")
        assert problems_of(db) == []
        by_city = by_city_of(users)
        assert keys_of(by_city) == [("Rom", "bob")]
        users["b"] = {"city": "A"}
        assert keys_of(by_city) == [("A", "b"), ("Rom", "bob")]
    with open_store(disk) as db:
        users = users_of(db)
        users.drop_index("by_city")
        users["c"] = {"city": "C"}
        assert db.tables()[0].indexes == ()


def test_a_batch_by_ids_gets_the_keys_for_an_index_that_came_meanwhile(
    db: kvwal.Store, users: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index is declared after the keys were computed, and before the commit leader has the batch."""
    users["ada"] = {"city": "Oslo"}
    indexes = db.engine.tables.indexes
    encoded = indexes.encoded
    made: list[Any] = []

    def late(batch: kvwal.WriteBatch, *arguments: Any, **options: Any) -> Any:
        writes = encoded(batch, *arguments, **options)
        if not made:
            made.append(by_city_of(users))
        return writes

    with db.batch() as batch:
        users.within(batch)["bob"] = {"city": "Rom"}
        monkeypatch.setattr(type(indexes), "encoded", lambda self, *a, **o: late(*a, **o))
    assert keys_of(made[0]) == [("Oslo", "ada"), ("Rom", "bob")]


def test_a_put_that_comes_without_keys_for_an_index_is_refused_by_the_leader(db: kvwal.Store, users: Any) -> None:
    users["ada"] = {}
    by_city_of(users)
    batch = kvwal.WriteBatch()
    batch.table(users.id).put(b"bob", b"{}")
    with pytest.raises(IndexesChangedError) as found:
        db.engine.commit(CommitRequest(EncodedBatch(batch), sync=False))
    assert isinstance(found.value, ConflictError)
    assert found.value.table == users.id
    # A delete needs none.
    batch = kvwal.WriteBatch()
    batch.table(users.id).delete(b"ada")
    db.engine.commit(CommitRequest(EncodedBatch(batch), sync=False))
    assert not users


def request_of(db: kvwal.Store, users: Any, name: str, user: User) -> CommitRequest:
    batch = kvwal.WriteBatch()
    batch.table(users.id).put(name.encode(), codecs.json().encode(user))
    return CommitRequest(db.engine.tables.indexes.encoded(batch), sync=False)


def test_the_members_of_a_group_see_each_others_index_keys(db: kvwal.Store, users: Any, by_city: Any) -> None:
    requests = [request_of(db, users, "ada", {"city": city}) for city in ("A", "B", "C")]
    db.engine.queue.submit(requests)
    assert [request.error for request in requests] == [None] * 3
    assert requests[0].seqno == requests[2].seqno - 2
    assert keys_of(by_city) == [("C", "ada")]


def test_a_put_behind_the_declaration_in_its_own_group_is_refused(db: kvwal.Store, users: Any) -> None:
    users["ada"] = {"city": "Oslo"}
    spec: IndexSpec[Any, Any, Any] = IndexSpec(users._spec, "by_city", city_of, str, False)
    operation = db.engine.tables.indexes.declaring("users", users._spec.asked, spec.declared)
    put = request_of(db, users, "bob", {"city": "Rom"})
    declaring = CommitRequest(sync=False, operation=operation)
    db.engine.queue.submit([declaring, put])
    assert declaring.error is None
    assert isinstance(put.error, IndexesChangedError)
    by_city = by_city_of(users)
    assert keys_of(by_city) == [("Oslo", "ada")]
    # And behind its end a put with its keys writes nothing for it.
    dropping = CommitRequest(sync=False, operation=DropIndex("users", "by_city"))
    db.engine.queue.submit([dropping, request_of(db, users, "bob", {"city": "Rom"})])
    assert dict(users) == {"ada": {"city": "Oslo"}, "bob": {"city": "Rom"}}
    (index,) = db.engine.tables.indexes._declared
    assert db.engine.reads.count(table=index) == db.engine.reads.count(table=reverse_of(index)) == 0


def test_an_index_that_is_declared_during_a_transaction_is_a_conflict(db: kvwal.Store, users: Any) -> None:
    users["ada"] = {"city": "Oslo"}
    txn = db.transaction()
    users.within(txn)["bob"] = {"city": "Rom"}
    by_city = by_city_of(users)
    with pytest.raises(ConflictError):
        txn.commit()
    assert keys_of(by_city) == [("Oslo", "ada")]


# -- reading ------------------------------------------------------------------------------------


def test_an_index_is_read_by_ranges_prefixes_and_single_keys_both_ways(users: Any, by_city: Any) -> None:
    users.update({"a": {"city": "Oslo"}, "b": {"city": "Ost"}, "c": {"city": "Rom"}, "d": {}, "e": {"city": "Oslo"}})
    assert [entry.index_key for entry in by_city.scan()] == ["Oslo", "Oslo", "Ost", "Rom"]
    assert list(by_city.scan(prefix="Os", reverse=True, limit=1)) == [("Ost", "b", {"city": "Ost"})]
    assert list(by_city.keys("Oslo", "Ost")) == [("Oslo", "a"), ("Oslo", "e")]
    assert list(by_city.keys(equal="Os")) == []
    assert by_city.get("Oslo") == [("a", {"city": "Oslo"}), ("e", {"city": "Oslo"})]
    assert (by_city.count(), by_city.count("Ost"), by_city.count(prefix="Os"), by_city.count(equal="Oslo")) == (
        4,
        2,
        3,
        2,
    )
    assert list(by_city.scan(limit=0)) == []


def test_index_keys_are_tuples_with_leading_parts(db: kvwal.Store) -> None:
    orders = db.table("orders", int, codecs.json())
    index = orders.index("by_customer", key=lambda order: (order["who"], order["cents"]), codec=tuple[str, int])
    orders.update({1: {"who": "ada", "cents": 300}, 2: {"who": "ada", "cents": -1}, 3: {"who": "adam", "cents": 0}})
    assert keys_of(index) == [(("ada", -1), 2), (("ada", 300), 1), (("adam", 0), 3)]
    assert list(index.keys(prefix="ada")) == [(("ada", -1), 2), (("ada", 300), 1)]
    assert list(index.keys(("ada", 0), ("adam",))) == [(("ada", 300), 1)]


def test_a_snapshot_has_the_index_of_its_moment(db: kvwal.Store, users: Any) -> None:
    users["ada"] = {"city": "Oslo"}
    without = db.last_seqno
    by_city = by_city_of(users)
    with db.snapshot() as now:
        users["ada"] = {"city": "Rom"}
        assert keys_of(by_city.within(now)) == [("Oslo", "ada")]
        assert by_city.within(now).get("Oslo") == [("ada", {"city": "Oslo"})]
        assert by_city.within(now).count("P") == 0
    moment = db.last_seqno
    db.checkpoint()
    users.drop_index("by_city")
    with pytest.raises(IndexNotFoundError):
        by_city.scan()
    with db.snapshot(at=moment) as then:
        assert list(by_city.within(then).scan()) == [("Rom", "ada", {"city": "Rom"})]
    with db.snapshot(at=without) as then, pytest.raises(IndexNotFoundError):
        by_city.within(then).scan()


def test_a_scan_stays_at_its_moment(users: Any, by_city: Any) -> None:
    users.update({"a": {"city": "A"}, "b": {"city": "B"}})
    found = by_city.scan()
    users.update({"a": {"city": "C"}, "c": {"city": "A"}})
    assert list(found) == [("A", "a", {"city": "A"}), ("B", "b", {"city": "B"})]


@pytest.mark.parametrize("before", ["nothing", "a put", "a delete", "a range", "an expiry"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_in_a_transaction_does_not_see_what_is_written_meanwhile(
    db: kvwal.Store, users: Any, reverse: bool, before: str
) -> None:
    tags = users.index("tags", key=lambda user: user["tags"], codec=str, many=True)
    users.update({name: {"tags": ["x", "y", name]} for name in "abcde"})
    with db.transaction() as txn:
        mine, index = users.within(txn), tags.within(txn)
        if before == "a put":
            mine["f"] = {"tags": ["x", "z"]}
        elif before == "a delete":
            del mine["c"]
        elif before == "a range":
            mine.delete_range("b", "d")
        elif before == "an expiry":
            mine.put("b", {"tags": ["b", "y"]}, expire_s=100)
        expected = sorted((tag, key, value) for key, value in mine.items() for tag in value["tags"])
        expected.sort(reverse=reverse)
        pairs, keys = index.scan(reverse=reverse), index.keys(reverse=reverse)
        found: list[Any] = []
        for entry in pairs:
            found.append(tuple(entry))
            mine[entry.key] = {"tags": [*entry.value["tags"][1:], f"n{len(found)}"]}
            mine[f"{entry.key}{len(found)}"] = {"tags": ["x"]}
            mine.delete("b")
            mine.delete_range("d", "e")
        assert found == expected
        assert list(keys) == [entry[:2] for entry in expected]
        now = sorted((tag, key) for key, value in mine.items() for tag in value["tags"])
        assert list(index.keys()) == now
        txn.abort()
    with db.transaction() as txn:
        scan = tags.within(txn).scan(equal="a")
        users.within(txn)["a"] = {"tags": []}
        assert [entry.value["tags"] for entry in scan] == [["x", "y", "a"]]
        users["a"] = {"tags": ["x", "y", "a"], "age": 3}
        with pytest.raises(ConflictError):
            txn.commit()


def test_what_a_transaction_reads_of_an_index_is_validated(db: kvwal.Store, users: Any, by_city: Any) -> None:
    users.update({"a": {"city": "A"}, "b": {"city": "B"}})

    def changed_meanwhile(read: Any, write: Any) -> bool:
        with db.transaction() as txn:
            read(by_city.within(txn))
            write()
            users.within(txn)["other"] = {}
            try:
                txn.commit()
            except ConflictError:
                return True
        return False

    assert changed_meanwhile(lambda index: index.get("C"), lambda: users.put("c", {"city": "C"})), "a phantom"
    assert changed_meanwhile(lambda index: index.count("A", "B"), lambda: users.put("a", {"city": "C"}))
    assert changed_meanwhile(lambda index: index.get("B"), lambda: users.put("b", {"city": "B", "age": 3})), "a value"
    assert not changed_meanwhile(lambda index: index.get("A"), lambda: users.put("d", {"city": "D"}))


def test_an_index_with_entries_of_an_own_stamped_key(db: kvwal.Store) -> None:
    log = db.table("log", tuple[str, Versionstamp], codecs.json())
    index = log.index("by_kind", key=lambda event: event["kind"], codec=str)
    log.put(("a", SEQNO), {"kind": "x"})
    seqno = log.put(("a", SEQNO), {"kind": "y"})
    assert [(entry.index_key, entry.key[1].seqno) for entry in index.scan("y")] == [("y", seqno)]
    with db.transaction() as txn:
        log.within(txn)["a", SEQNO] = {"kind": "x"}
        log.within(txn)["a", SEQNO] = {"kind": "x"}
        assert len(index.within(txn).get("x")) == 3
    with db.batch() as batch:
        log.within(batch)["b", SEQNO] = {"kind": "z"}
    assert [key for key, _ in index.get("x")] == [key for key, event in log.items() if event["kind"] == "x"]
    assert index.count() == len(log) == 5
    assert problems_of(db) == []


def test_counters_are_added_to_by_any_number_of_threads_and_indexed(tmp_path: Any) -> None:
    with kvwal.open(tmp_path / "kv", durability="os") as db:
        numbers = db.table("numbers", str, int)
        index = numbers.index("by_value", key=lambda number: number % 7, codec=int)
        assert run_threads(*[lambda: [numbers.add("hits", 1) for _ in range(100)]] * 4)
        assert numbers["hits"] == 400
        assert keys_of(index) == [(400 % 7, "hits")]
        with pytest.raises(OverflowError):
            numbers.add("hits", (1 << 63) - 1)
        assert problems_of(db) == []


def test_a_projection_keeps_the_index_of_its_table(db: kvwal.Store, users: Any, by_city: Any) -> None:
    source = db.table("source", str, str)
    source["x"] = "1"
    consumer = db.consumer("copy", tables=source, start=0)

    def handle(txn: Any, changes: Any) -> None:
        for change in changes:
            key, value = source.of(change)
            users.within(txn)[key] = {"city": value}

    source["ada"] = "Oslo"
    consumer.project(handle, timeout_s=0)
    consumer.close()
    assert keys_of(by_city) == [("1", "x"), ("Oslo", "ada")]
    # The feed passes over what is derived.
    assert {change.table for change in db.changes(0)} == {source.id, users.id}


# -- large ranges -------------------------------------------------------------------------------


def test_a_range_of_1000_keys_is_taken_out_at_once_and_one_of_1001_in_the_background(db: kvwal.Store) -> None:
    numbers = db.table("numbers", int, int)
    index = numbers.index("same", key=lambda number: number, codec=int)
    numbers.update((number, number) for number in range(3000))
    entries = db.tables()[0].indexes[0].entries
    numbers.delete_range(0, 1000)
    assert db.tables()[0].indexes[0].entries == index.count() == entries - 1000
    numbers.delete_range(1000, 2001)
    assert index.count() == 999 == len(numbers)
    assert db.tables()[0].indexes[0].entries == 2000
    assert keys_of(index)[0] == (2001, 2001)
    numbers[1500] = 7
    assert keys_of(index)[:2] == [(7, 1500), (2001, 2001)]
    with db.snapshot() as before, db.transaction() as txn:
        db.checkpoint()
        assert index.within(before).count() == index.within(txn).count() == 1000
    assert db.tables()[0].indexes[0].entries == index.count() == 1000
    assert not db.engine.tables.indexes.is_due()


def test_stale_entries_are_removed_after_a_reopen(disk: SimulatedDisk) -> None:
    with open_store(disk) as db:
        numbers = db.table("numbers", int, int)
        numbers.index("same", key=lambda number: number, codec=int)
        numbers.update((number, number) for number in range(2000))
        numbers.delete_range(0, 1500)
        assert problems_of(db) == []
    with open_store(disk) as db:
        assert db.tables()[0].indexes[0].entries == 2000
        # It needs no function.
        db.checkpoint()
        assert db.tables()[0].indexes[0].entries == 500
        assert problems_of(db) == []


def test_a_whole_table_is_emptied_with_its_index_at_once(db: kvwal.Store) -> None:
    numbers = db.table("numbers", int, int)
    numbers.index("same", key=lambda number: number, codec=int)
    numbers.update((number, number) for number in range(3000))
    numbers.delete_range(5)
    assert db.tables()[0].indexes[0].entries == 3000
    numbers.clear()
    assert db.tables()[0].indexes[0].entries == 0
    numbers[1] = 1
    assert db.tables()[0].indexes[0].entries == 1


def test_a_range_that_is_deleted_while_stale_entries_are_removed_is_seen_to_as_well(db: kvwal.Store) -> None:
    numbers = db.table("numbers", int, int)
    index = numbers.index("same", key=lambda number: number, codec=int)
    numbers.update((number, number) for number in range(6000))
    numbers.delete_range(0, 2000)
    indexes = db.engine.tables.indexes
    steps = indexes.steps()
    for _ in range(18):
        next(steps)
    # Behind where it is.
    numbers.delete_range(2000, 4000)
    for _ in steps:
        pass
    assert index.count() == 2000
    assert indexes.is_due()
    indexes.go_on()
    assert db.tables()[0].indexes[0].entries == 2000


def test_what_marks_stale_entries_is_no_put_on_a_full_disk(db: kvwal.Store) -> None:
    numbers = db.table("numbers", str, int)
    numbers.index("same", key=lambda number: number, codec=int)
    numbers.update((f"{number:04}", number) for number in range(1500))
    batch = kvwal.WriteBatch()
    assert numbers.id is not None
    batch.table(numbers.id).delete_range(b"0", b"2")
    request = CommitRequest(db.engine.tables.indexes.encoded(batch), sync=False)
    assert request.writes.only_deletes
    db.engine.commit(request)
    assert any(key[:1] == b"\x0e" for key in request.writes.batch.table(1).writes)
    assert request.writes.only_deletes


# -- building -----------------------------------------------------------------------------------


def test_an_index_of_a_table_with_data_is_built_in_the_background_amid_writers(tmp_path: Any) -> None:
    with kvwal.open(tmp_path / "kv", durability="os") as db:
        users = users_of(db)
        users.update((f"{number:05}", {"city": f"c{number % 10}"}) for number in range(4000))
        go_on = threading.Event()

        def slowly(user: User) -> str | None:
            go_on.wait(10)
            return city_of(user)

        by_city = users.index("by_city", key=slowly, codec=str)
        with pytest.raises(IndexNotReadyError) as found:
            by_city.scan()
        assert (found.value.done, found.value.total) == (0, 4000)
        assert by_city.progress[1] == 4000
        assert not by_city.wait(0.01)
        assert db.tables()[0].indexes[0].ready is False
        go_on.set()

        def write(first: int) -> None:
            rng = Random(first)
            for _ in range(300):
                number = rng.randrange(4000)
                match rng.randrange(4):
                    case 0:
                        users.delete(f"{number:05}")
                    case 1:
                        users.delete_range(f"{number:05}", f"{number + 5:05}")
                    case _:
                        users[f"{number:05}"] = {"city": f"d{number % 7}"}

        run_threads(*[lambda first=first: write(first) for first in range(3)])
        assert by_city.wait(30)
        expected = sorted((user["city"], name) for name, user in users.items())
        assert keys_of(by_city) == expected
        assert by_city.count() == len(expected)
        assert by_city.progress == (len(expected),) * 2
        assert problems_of(db) == []


def test_what_is_written_between_the_call_of_the_function_and_its_commit_stays(db: kvwal.Store, users: Any) -> None:
    users.update({"ada": {"city": "Oslo"}, "bob": {"city": "Oslo"}, "eve": {"city": "Oslo"}})
    written: list[str] = []

    def meddling(user: User) -> str | None:
        if not written:
            written.append("once")
            users["ada"] = {"city": "Rom"}
            del users["bob"]
        return city_of(user)

    by_city = users.index("by_city", key=meddling, codec=str)
    assert keys_of(by_city) == [("Oslo", "eve"), ("Rom", "ada")]


def test_a_function_that_raises_ends_the_building_and_is_told_by_reads(disk: SimulatedDisk) -> None:
    with open_store(disk) as db:
        users = users_of(db)
        users.update((f"{number:05}", {"n": number}) for number in range(300))

        def strict(user: User) -> int:
            if user["n"] == 200:
                raise RuntimeError("200")
            return int(user["n"])

        index = users.index("by_n", key=strict, codec=int)
        for read in (index.scan, index.keys, index.count, index.wait, lambda: index.get(3)):
            with pytest.raises(IndexNotReadyError) as found:
                read()
            assert repr(found.value.__cause__) == "RuntimeError('200')"
            text = str(found.value)
            assert "128 of 300 keys, and is not built further: its function raised RuntimeError: 200" in text
            assert "wait()" not in text
        assert index.progress == (128, 300)
        with db.snapshot() as now, pytest.raises(IndexNotReadyError):
            index.within(now).scan()
        users["00200"] = {"n": 1}
        # Declared again, it goes on.
        index = users.index("by_n", key=strict, codec=int)
        assert index.count() == 300
        assert index.get(1) == [("00001", {"n": 1}), ("00200", {"n": 1})]
        assert problems_of(db) == []


def test_building_goes_on_after_a_reopen_where_it_was(disk: SimulatedDisk) -> None:
    calls: list[int] = []

    def number_of(user: User) -> int:
        calls.append(user["n"])
        if len(calls) == 300:
            raise RuntimeError("it ends here")
        return int(user["n"])

    with open_store(disk) as db:
        users = users_of(db)
        users.update((f"{number:05}", {"n": number}) for number in range(1000))
        users.index("by_n", key=number_of, codec=int)
    with open_store(disk) as db:
        users = users_of(db)
        assert db.tables()[0].indexes[0].ready is False
        assert problems_of(db) == [], "half of an index is no problem"
        with pytest.raises(IndexNotDeclaredError):
            users["a"] = {"n": 1}
        calls[:] = [0] * 1000
        index = users.index("by_n", key=number_of, codec=int)
        assert calls[1000] == 256, "two steps were done"
        assert [pair[0] for pair in keys_of(index)] == list(range(1000))


def test_an_index_that_is_dropped_while_it_is_built_is_gone(tmp_path: Any) -> None:
    with kvwal.open(tmp_path / "kv", durability="os") as db:
        users = users_of(db)
        users.update((f"{number:05}", {"city": "Oslo"}) for number in range(500))
        go_on = threading.Event()
        # It waits for True.
        index = users.index("by_city", key=lambda user: go_on.wait(10) and "Oslo", codec=str)  # type: ignore[arg-type]
        users.drop_index("by_city")
        go_on.set()
        with pytest.raises(IndexNotFoundError):
            index.wait(10)
        wait_until(lambda: not db.engine.tables.indexes.is_due())
        again = by_city_of(users)
        assert again.wait(10)
        assert again.count() == 500
        assert problems_of(db) == []


# -- dropped and renamed ------------------------------------------------------------------------


def test_an_index_follows_a_rename_and_goes_with_its_table(db: kvwal.Store, users: Any, by_city: Any) -> None:
    users["ada"] = {"city": "Oslo"}
    db.rename_table("users", "people")
    with pytest.raises(IndexNotFoundError):
        by_city.scan()
    people = db.table("people", str, codecs.json())
    people["bob"] = {"city": "Rom"}
    assert keys_of(by_city_of(people)) == [("Oslo", "ada"), ("Rom", "bob")]
    reads, derived = db.engine.reads, db.engine.tables.indexes._declared
    db.drop_table("people")
    for index in derived:
        assert reads.count(table=index) == reads.count(table=reverse_of(index)) == 0
    # One of the same name has none.
    people["eve"] = {"city": "Rom"}
    assert db.tables()[0].indexes == ()
    with pytest.raises(IndexNotFoundError):
        people.drop_index("by_city")
    with pytest.raises(kvwal.TableNotFoundError):
        users.drop_index("by_city")


def test_a_table_is_dropped_with_an_index_that_is_half_built_and_one_that_is_stale(db: kvwal.Store) -> None:
    numbers = db.table("numbers", int, int)
    numbers.index("same", key=lambda number: number, codec=int)
    numbers.update((number, number) for number in range(2000))
    numbers.index("failing", key=lambda number: number // (number - 1999), codec=int)
    numbers.delete_range(0, 1500)

    def rows() -> list[int]:
        keys = [key for keys, _ in db.engine.reads.chunks(reader(), None, None, reverse=False, table=1) for key in keys]
        return [key[0] for key in keys]

    def reader() -> Any:
        return db.engine.reads.moments.reader("test")

    assert rows() == [1, 2, 13, 14, 14]
    declared = list(db.engine.tables.indexes._declared)
    db.drop_table("numbers")
    assert rows() == [2]
    for index in declared:
        assert db.engine.reads.count(table=index) == db.engine.reads.count(table=reverse_of(index)) == 0


def test_a_table_has_several_indexes_and_each_goes_alone(db: kvwal.Store, users: Any, by_city: Any) -> None:
    by_size = users.index("by_size", key=len, codec=int)
    users["ada"] = {"city": "Oslo"}
    assert users.drop_index("by_city", meta={"why": "test"}) == db.last_seqno
    assert list(db.history())[-1].meta() == {"why": "test"}
    users["bob"] = {}
    assert keys_of(by_size) == [(0, "bob"), (1, "ada")]
    again = by_city_of(users)
    assert keys_of(again) == [("Oslo", "ada")]
    # The row is there.
    ids = [index.id for index in decode_indexes("users", db.engine.tables.row("users").others)]  # type: ignore[union-attr]
    assert len(set(ids)) == 2
    assert min(ids) > 1 << 31, "an id is never given twice"


# -- damage, crashes ----------------------------------------------------------------------------


def test_verify_finds_what_index_and_table_do_not_share(db: kvwal.Store, users: Any, by_city: Any) -> None:
    users.update({"ada": {"city": "Oslo"}, "bob": {"city": "Rom"}})
    index = next(iter(db.engine.tables.indexes._declared))

    def changed(table: int, key: bytes, value: bytes | None) -> list[str]:
        """What is found after a change that goes past the index."""
        old = db.engine.reads.read(key, table=table)
        indexed, db.engine.state.cache.names.indexed = db.engine.state.cache.names.indexed, {}
        for new in (value, old):
            batch = kvwal.WriteBatch()
            batch.table(table).writes[key] = new
            db.engine.commit(CommitRequest(EncodedBatch(batch), sync=False))
            if new is value:
                found = problems_of(db)
        db.engine.state.cache.names.indexed = indexed
        return [text.partition("'users': ")[2] for text in found]

    entry = entries_of(b"Oslo\0\0", b"ada")[0]
    assert changed(users.id, b"ada", None) == ["key b'ada' is in the index alone"]
    assert changed(users.id, b"eve", b"{}") == ["key b'eve' is in the table alone"]
    assert changed(index, entry, None) == [f"entry {entry!r} of key b'ada' is missing"]
    assert changed(index, b"x\0\0ada", b"") == ["entry b'x\\x00\\x00ada' is none of key b'ada'"]
    assert len(changed(reverse_of(index), b"ada", b"Rom\0\0")) == 2
    assert problems_of(db) == []


@pytest.mark.parametrize("offset", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 3))])
# A coroutine that another one awaits: this test may interrupt between the making and the first step, no signal can.
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_write_that_is_interrupted_anywhere_leaves_index_and_table_alike(seed: int, offset: int) -> None:
    step, random = 1 + offset, Random(f"{seed} {offset}")
    while True:
        with open_store(SimulatedDisk()) as db:
            users = users_of(db)
            by_city = by_city_of(users)
            log = db.table("log", tuple[str, Versionstamp], codecs.json())
            by_kind = log.index("by_kind", key=lambda event: event, codec=str)
            users.update({"ada": {"city": "Oslo"}, "bob": {"city": "Rom"}})

            def write() -> None:
                with db.batch() as batch:
                    users.within(batch)["ada"] = {"city": "Rom"}
                    users.within(batch).delete("bob")
                    log.within(batch)["a", SEQNO] = "x"
                users.setdefault("eve", {"city": "Oslo"})
                users.delete_range("b", "f")

            ended = interrupted_at(step, write) is None
            # Its traceback has readers that were being registered.
            gc.collect()
            assert keys_of(by_city) == sorted((user["city"], name) for name, user in users.items())
            assert keys_of(by_kind) == [("x", key) for key in log]
            users["zoe"] = {"city": "Oslo"}
            assert by_city.get("Oslo")[-1][0] == "zoe"
            check_store(db)
            assert problems_of(db) == []
        if ended:
            return
        step += random.randrange(20, 120)


def test_after_a_crash_the_index_is_that_of_the_table(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crashed after every step of the disk: index and table are of one commit."""
    monkeypatch.setattr("kvwal.engine.indexing._STEP_KEYS", 6)

    def work(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with open_store(disk, **TINY) as db:
            users = users_of(db)
            users.update((f"{number:03}", {"city": f"c{number % 3}"}) for number in range(20))
            by_city_of(users)
            for number in range(12):
                users[f"{number:03}"] = {"city": f"d{number}"}
            users.delete_range("005", "009")
            db.checkpoint()
            users.clear()

    def check(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with open_store(disk, **TINY) as db:
            assert problems_of(db) == []
            users = users_of(db)
            by_city = by_city_of(users)
            assert keys_of(by_city) == sorted((user["city"], name) for name, user in users.items())
            assert problems_of(db) == []

    crash_every(work, check, seed=seed)


def test_salvage_saves_the_table_and_no_index(disk: SimulatedDisk) -> None:
    with open_store(disk) as db:
        users = users_of(db)
        by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        db.checkpoint()
        users["bob"] = {"city": "Rom"}
    report = kvwal.salvage("/kv", "/new", files=disk)
    assert not report.damages
    with kvwal.open("/new", files=disk, background=False) as db:
        users = users_of(db)
        assert dict(users) == {"ada": {"city": "Oslo"}, "bob": {"city": "Rom"}}
        assert db.tables()[0].indexes == ()
        assert keys_of(by_city_of(users)) == [("Oslo", "ada"), ("Rom", "bob")]
        assert problems_of(db) == []


def test_what_is_saved_of_a_batch_has_nothing_of_indexes() -> None:
    batch = kvwal.WriteBatch()
    batch.table(16).put(b"a", b"1")
    batch.table(1 << 31).put(b"a", b"1")
    batch.table((1 << 31) + 1).put(b"a", b"1")
    batch.table((1 << 31) + 2).put(b"a", b"1")
    batch.table(1).put(b"\x01t", encode_row(TableRow("t", 16, STR, STR, encode_indexes({}, (INDEX,)))))
    batch.table(1).put(b"\x0d\x80\0\0\0", b"1")
    batch.table(1).put(b"\x01damaged", b"{")
    batch.table(1).put(b"\x02", b"x")
    saved = without_indexes(batch, set())
    assert [(table, part.writes) for table, part in saved.parts()] == [
        (1, {b"\x01t": encode_row(TableRow("t", 16, STR, STR)), b"\x01damaged": b"{", b"\x02": b"x"}),
        (16, {b"a": b"1"}),
        ((1 << 31) + 2, {b"a": b"1"}),
    ]
    assert len(batch) == 8


@pytest.mark.parametrize(
    "member",
    [
        {},
        [1],
        [{"name": "a", "id": 16, "codec": ["str", 1]}],
        [{"name": "a", "id": (1 << 32) - 1, "codec": ["str", 1]}],
        [{"name": "a", "id": 1 << 31, "codec": "str"}],
        [{"name": 3, "id": 1 << 31, "codec": ["str", 1]}],
        [{"name": "a", "id": 1 << 31}],
    ],
)
def test_a_row_with_an_index_that_is_none_is_damaged(member: Any) -> None:
    with pytest.raises(CorruptionError, match="an index that is not valid"):
        decode_indexes("t", {"indexes": member})


def test_a_table_with_a_damaged_index_is_not_written_to(disk: SimulatedDisk) -> None:
    with open_store(disk) as db:
        users = users_of(db)
        users["ada"] = {}
        batch = kvwal.WriteBatch()
        row = TableRow("users", users.id or 0, STR, CodecName("json", 1), {"indexes": 3})
        batch.table(1).put(row_key("users"), encode_row(row))
        commit_rows(db, batch)
    with open_store(disk) as db, pytest.raises(CorruptionError, match="an index that is not valid"):
        users_of(db)


def test_the_row_of_a_table_keeps_what_it_does_not_know() -> None:
    row = IndexRow("i", 1 << 31, ("str", 1))
    members = encode_indexes({"later": 1}, (row,))
    assert members == {"later": 1, "indexes": [{"name": "i", "id": 1 << 31, "codec": ["str", 1]}]}
    assert decode_indexes("t", members) == (row,)
    assert encode_indexes(members, ()) == {"later": 1}
    assert decode_indexes("t", {}) == ()
    assert row_key("a") == b"\x01a"


def test_entries_sort_by_index_key_and_then_by_key(seed: int) -> None:
    rng = Random(seed)
    alphabet = [b"\0", b"\x01", b"a", b"\xff"]

    def drawn() -> bytes:
        return b"".join(rng.choices(alphabet, k=rng.randrange(4)))

    pairs = sorted({(drawn(), drawn()) for _ in range(2000)})
    entries = [
        entries_of(as_index_key(index_key), key)[0] for index_key, key in pairs
    ]
    assert entries == sorted(entries)
    assert [entry_of(entry) for entry in entries] == pairs


def test_building_goes_on_where_the_memtable_was_full(tmp_path: Path) -> None:
    """A step of building may fill it; then only the checkpoint of the background thread relieves it."""
    with kvwal.open(tmp_path / "s.kv", memtable_bytes=1 << 20, durability="os") as db:
        numbers = db.table("n", int, int)
        numbers.update({n: n for n in range(8_000)})
        index = numbers.index("by", key=lambda n: -n, codec=int)
        assert index.wait(60)
        assert index.count() == 8_000


# -- building that is stopped ------------------------------------------------------------------


def waiting(index: Index[Any, Any, Any]) -> tuple[threading.Thread, list[object]]:
    """A thread that waits for an index, and what came of it."""
    outcomes: list[object] = []

    def wait() -> None:
        try:
            outcomes.append(index.wait(20))
        except kvwal.Error as error:
            outcomes.append(type(error))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, outcomes


@pytest.mark.parametrize("background", [True, False])
def test_waiting_says_that_the_disk_is_full_and_building_goes_on_when_it_is_not(
    disk: SimulatedDisk, background: bool
) -> None:
    with kvwal.open("/s.kv", files=disk, background=background, **TINY) as db:
        numbers = db.table("n", int, int)
        numbers.update({n: n for n in range(3_000)})
        db.checkpoint()
        begin = threading.Event()

        def negative(n: int) -> int:
            begin.wait(20)
            return -n

        indexes = db.engine.tables.indexes
        if not background:
            indexes.wake = bool
        index = numbers.index("by", key=negative, codec=int)
        if not background:
            indexes.wake = None
        disk.fail("write", error=errno.ENOSPC, forever=True)
        begin.set()
        with pytest.raises(kvwal.DiskFullError):
            index.wait(20)
        with pytest.raises(kvwal.DiskFullError):
            index.wait(20)
        disk.heal()
        assert index.wait(20)
        assert index.count() == 3_000


@pytest.mark.parametrize("end", ["poison", "close"])
def test_waiting_ends_with_the_store(disk: SimulatedDisk, end: str) -> None:
    released = threading.Event()

    def negative(n: int) -> int:
        if n == 2_000:
            released.wait(20)
        return -n

    db = kvwal.open("/s.kv", files=disk, **TINY)
    numbers = db.table("n", int, int)
    numbers.update({n: n for n in range(3_000)})
    thread, outcomes = waiting(numbers.index("by", key=negative, codec=int))
    wait_until(lambda: numbers.index("by", key=negative, codec=int).progress[0] >= 1_000)
    if end == "poison":
        disk.fail("fsync", forever=True)
        with pytest.raises(kvwal.PoisonedError):
            db[b"k"] = b"v"
        released.set()
    else:
        closing = threading.Thread(target=db.close)
        closing.start()
        released.set()
        closing.join(20)
    thread.join(20)
    assert outcomes == [kvwal.PoisonedError if end == "poison" else kvwal.ClosedError]
    db.close()


@pytest.mark.parametrize("found", ["abc", b"abc", bytearray(b"a"), None, 5])
def test_what_is_no_iterable_of_several_keys_is_refused(db: kvwal.Store, found: Any) -> None:
    """A str above all, each character of which would be a key."""
    table = db.table("t", str, str)
    index = table.index("by_tag", key=lambda value: found, codec=str, many=True)
    with pytest.raises(TypeError, match=f"with many=True .* an iterable of keys, not {type(found).__name__}"):
        table["k"] = "v"
    assert list(index.keys()) == list(table) == []


def test_the_name_of_an_index_is_checked(db: kvwal.Store) -> None:
    table = db.table("t", str, str)
    for wrong, error in ((5, TypeError), ("", ValueError), ("x" * 256, ValueError), ("\ud800", ValueError)):
        with pytest.raises(error, match="an index's name"):
            table.index(wrong, key=str, codec=str)  # type: ignore[arg-type]  # it is refused


def test_a_finalizer_may_begin_an_index_while_those_to_be_built_are_listed(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes, numbers = db.engine.tables.indexes, count(1_000)
    monkeypatch.setattr(indexes, "_build", lambda index, table: iter([None]))
    indexes._builds.update((number, 16) for number in range(20))
    begin = indexes._builds.__setitem__
    beginning = lambda: partial(begin, next(numbers), 16)  # noqa: E731  # it is one expression
    assert collected_everywhere(beginning, lambda: next(indexes.steps()), 50) >= 15
    indexes._builds.clear()
