"""Indexes of tables whose entries expire: what has expired is in no index, and leaves with its entries."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from store_fixtures import TINY, check_store, problems_of

import kvwal
from kvwal import codecs
from kvwal.tables.index import _Lookup
from kvwal.testing import SimulatedDisk

BY: dict[str, Any] = {"key": lambda user: user["city"], "codec": str}


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=disk, background=False, **TINY) as store:
        yield store
        check_store(store)
        assert problems_of(store) == []


def remove_all(db: kvwal.Store) -> None:
    while db.engine.expirer.remove():
        pass


def entries_of(index: Any) -> list[tuple[str, int]]:
    """By each way of reading, which all agree."""
    keys = list(index.keys())
    assert [(found, key) for found, key, _ in index.scan()] == keys
    assert [(found, key) for found, key, _ in index.scan(reverse=True)] == keys[::-1]
    assert index.count() == len(keys)
    for city in "abc":
        assert [key for key, _ in index.get(city)] == [key for found, key in keys if found == city]
        assert index.count(equal=city) == len(index.get(city))
    return keys


def expected(users: kvwal.Table[int, Any]) -> list[tuple[str, int]]:
    return sorted((user["city"], key) for key, user in users.items())


def everywhere(db: kvwal.Store, users: kvwal.Table[int, Any], index: Any) -> None:
    assert entries_of(index) == expected(users)
    with db.snapshot() as snapshot:
        assert entries_of(index.within(snapshot)) == expected(users)
    with db.transaction() as txn:
        assert entries_of(index.within(txn)) == expected(users)


def test_what_has_expired_is_in_no_index_and_leaves_with_its_entries(db: kvwal.Store, disk: SimulatedDisk) -> None:
    users = db.table("users", int, codecs.json())
    index = users.index("by_city", **BY)
    users[1] = {"city": "a"}
    users.put(2, {"city": "a"}, expire_s=10)
    users.put(3, {"city": "b"}, expire_s=20)
    everywhere(db, users, index)
    disk.pass_time(10)
    assert expected(users) == [("a", 1), ("b", 3)]
    everywhere(db, users, index)
    assert problems_of(db) == []
    remove_all(db)
    everywhere(db, users, index)
    entries = db.tables()[0].indexes[0].entries
    assert entries == 2
    disk.pass_time(10)
    remove_all(db)
    assert entries_of(index) == [("a", 1)]


def test_touch_keeps_the_entries_and_so_does_a_program_without_the_index(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False) as db:
        users = db.table("users", int, codecs.json())
        users.index("by_city", **BY)
        users.put(1, {"city": "a"}, expire_s=10)
        users[2] = {"city": "b"}
    with kvwal.open("/kv", files=disk, background=False) as db:
        users = db.table("users", int, codecs.json())
        assert users.touch(1, expire_s=100)
        assert users.touch(2, expire_s=5)
        with pytest.raises(kvwal.IndexNotDeclaredError):
            users.put(3, {"city": "c"}, expire_s=5)
        disk.pass_time(50)
        remove_all(db)
        index = users.index("by_city", **BY)
        assert entries_of(index) == [("a", 1)]
        assert problems_of(db) == []


def test_an_index_of_a_table_with_expiring_entries_is_built(db: kvwal.Store, disk: SimulatedDisk) -> None:
    users = db.table("users", int, codecs.json(), expire_s=100)
    for n in range(300):
        users.put(n, {"city": "abc"[n % 3]}, expire_s=None if n % 2 else 10)
    disk.pass_time(10)
    index = users.index("by_city", **BY)
    index.wait()
    everywhere(db, users, index)
    assert len(expected(users)) == 150
    assert problems_of(db) == []
    remove_all(db)
    everywhere(db, users, index)


def test_an_index_of_an_empty_table_is_not_built_whatever_expires_elsewhere(
    db: kvwal.Store, disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.put(b"lease", b"x", expire_s=10)
    users = db.table("users", int, codecs.json())
    users.put(1, {"city": "b"}, expire_s=10)
    disk.pass_time(10)
    remove_all(db)
    # Nothing builds.
    monkeypatch.setattr("kvwal.engine.indexing.Indexes.go_on", lambda self: None)
    users.index("by_city", **BY)
    index = users.index("by_town", **BY)
    assert entries_of(index) == []
    with db.transaction() as txn:
        users.within(txn)[2] = {"city": "a"}
        assert entries_of(index.within(txn)) == [("a", 2)]
    assert entries_of(index) == [("a", 2)]


@pytest.mark.parametrize("is_removed", [False, True])
def test_an_index_of_a_table_whose_pairs_have_expired_is_built_as_long_as_they_are_there(
    db: kvwal.Store, disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch, is_removed: bool
) -> None:
    users = db.table("users", int, codecs.json())
    users.put(1, {"city": "b"}, expire_s=10)
    disk.pass_time(10)
    if is_removed:
        remove_all(db)
    with monkeypatch.context() as patch:
        patch.setattr("kvwal.engine.indexing.Indexes.go_on", lambda self: None)
        index = users.index("by_city", **BY)
        if is_removed:
            assert entries_of(index) == []
        else:
            with pytest.raises(kvwal.IndexNotReadyError):
                index.count()
    index.wait()
    assert entries_of(index) == []


@pytest.mark.parametrize("seed", range(12))
def test_an_index_has_what_the_table_has_whatever_expires(disk: SimulatedDisk, seed: int) -> None:
    rng = Random(seed)
    default = rng.choice([None, 30])
    db = kvwal.open("/kv", files=disk, background=False, **TINY)

    def asked() -> tuple[kvwal.Table[int, Any], Any]:
        users = db.table("users", int, codecs.json(), expire_s=default)
        index = users.index("by_city", **BY)
        index.wait()
        return users, index

    users, index = asked()
    for _ in range(60):
        key, user = rng.randrange(12), {"city": rng.choice("abc"), "n": rng.randrange(100)}
        expire_s = rng.choice([None, 5, 20])
        match rng.randrange(12):
            case 0:
                users.delete(key)
            case 1:
                users.delete_range(key, key + 3)
            case 2:
                users.touch(key, expire_s=expire_s)
            case 3:
                with db.transaction() as txn:
                    within = users.within(txn)
                    within.put(key, user, expire_s=expire_s)
                    within.touch(key + 1, expire_s=7)
                    # It reads as a table does.
                    assert entries_of(index.within(txn)) == expected(within)  # type: ignore[arg-type]
            case 4:
                with db.batch() as batch:
                    users.within(batch).put(key, user, expire_s=expire_s)
            case 5:
                remove_all(db)
            case 6:
                db.checkpoint()
            case 7:
                db.close()
                db = kvwal.open("/kv", files=disk, background=False, **TINY)
                users, index = asked()
            case 8:
                users.put_if_absent(key, user)
            case 9:
                users.update({key: user, key + 1: user})
            case _:
                users.put(key, user, expire_s=expire_s)
        disk.pass_time(rng.choice([0, 1, 3]))
        everywhere(db, users, index)
    assert problems_of(db) == []
    check_store(db)
    db.close()


def test_an_entry_that_comes_back_with_the_clock_is_in_the_index_that_was_built_meanwhile(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False) as db:
        users = db.table("users", int, codecs.json())
        users.put(1, {"city": "a"}, expire_s=60)
        disk.pass_time(61)
        index = users.index("by_city", **BY)
        index.wait()
        assert entries_of(index) == []
    disk.jump_clock(-120_000_000)
    with kvwal.open("/kv", files=disk, background=False) as db:
        users = db.table("users", int, codecs.json())
        assert set(users) == {1}
        assert entries_of(users.index("by_city", **BY)) == [("a", 1)]
        assert problems_of(db) == []


def test_counts_walk_only_where_something_has_expired_and_is_not_removed_yet(
    db: kvwal.Store, disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = db.table("users", int, codecs.json())
    index = users.index("by_city", **BY)
    users.update({n: {"city": "a"} for n in range(20)})
    walks: list[object] = []
    entries = _Lookup.entries
    monkeypatch.setattr(_Lookup, "entries", lambda self, bounds: walks.append(bounds) or entries(self, bounds))

    def counted() -> tuple[int, bool]:
        before = len(walks)
        with db.snapshot() as snapshot, db.transaction() as txn:
            found = {index.count(), index.within(snapshot).count(), index.within(txn).count()}
        return found.pop(), len(walks) > before

    db.put(b"elsewhere", b"v", expire_s=10)
    users.put(1, {"city": "b"}, expire_s=20)
    assert counted() == (20, False)
    disk.pass_time(10)
    users.delete(2)
    assert counted()[0] == 19
    disk.pass_time(10)
    assert counted() == (18, True)
    remove_all(db)
    assert counted() == (18, False)
