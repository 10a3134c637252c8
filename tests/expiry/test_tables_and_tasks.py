"""Expiry in tables, parts of the default table, batches and transactions, and for tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from inspect import signature

import pytest
from store_fixtures import TINY, problems_of

import kvwal
import kvwal.aio
from kvwal.codecs import Versionstamp
from kvwal.testing import SimulatedDisk


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=disk, background=False, **TINY) as store:
        yield store
        assert problems_of(store) == []


@pytest.mark.parametrize("default", [False, True])
def test_an_expired_value_of_a_table_is_absent(db: kvwal.Store, disk: SimulatedDisk, default: bool) -> None:
    table = db.table("t", str, int, expire_s=5 if default else None)
    for name in ("add", "cas", "pop", "absent"):
        table.put(name, 1, expire_s=None if default else 5)
    sub = db.sub(b"part/", str, int)
    sub.put("k", 1, expire_s=5)
    assert (len(table), "k" in sub, sub.expires("k") is not None) == (4, True, True)
    disk.pass_time(5)
    assert (len(table), list(table.items()), table.first(), table.get_many(["add"])) == (0, [], None, [None])
    assert ("k" in sub, len(sub), sub.touch("k", expire_s=1)) == (False, 0, False)
    assert table.pop("pop", None) is None
    assert table.put_if_absent("absent", 2)
    assert not table.compare_and_set("cas", 1, 2)
    with pytest.raises(KeyError):
        table.expires("add")
    with pytest.raises(KeyError):
        table.popitem(prefix="p")
    assert table.popitem() == ("absent", 2)


def test_a_counter_of_a_table_with_a_default_is_one_for_each_stretch_of_time(
    db: kvwal.Store, disk: SimulatedDisk
) -> None:
    """What a limit of a number of calls a minute needs: the time begins with the first one."""
    calls = db.table("calls", str, int, expire_s=60)
    for n in range(1, 4):
        assert calls.add("ada", 1) == n
        disk.pass_time(19)
    disk.pass_time(3)
    assert calls.add("ada", 1) == 1


def test_keys_that_the_commit_fills_in_expire(db: kvwal.Store, disk: SimulatedDisk) -> None:
    log = db.table("log", tuple[str, Versionstamp], str)
    log.put(("a", kvwal.SEQNO), "1", expire_s=5)
    with db.transaction() as txn:
        log.within(txn).put(("a", kvwal.SEQNO), "2", expire_s=10)
    with db.batch() as batch:
        log.within(batch).put(("a", kvwal.SEQNO), "3", expire_s=5)
        log.within(batch).put(("a", kvwal.SEQNO), "4")
    assert [value for _, value in log.scan()] == ["1", "2", "3", "4"]
    assert len(list(db.engine.expirer.rows())) == 3
    disk.pass_time(5)
    assert [value for _, value in log.scan()] == ["2", "4"]
    while db.engine.expirer.remove():
        pass
    assert len(list(db.engine.expirer.rows())) == 1


def test_a_transaction_sees_what_it_sets_itself(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db[b"k"] = b"v"
    with db.transaction() as txn:
        assert txn.expires(b"k") is None
        assert txn.touch(b"k", expire_s=5)
        txn.put(b"new", b"w", expire_s=5)
        assert not txn.touch(b"missing", expire_s=5)
        assert txn.expires(b"k") is not None
        assert (txn[b"k"], txn[b"new"], list(txn), len(txn)) == (b"v", b"w", [b"k", b"new"], 2)
        txn[b"new"] = b"x"
        assert txn.expires(b"new") is None
    assert db.expires(b"new") is None
    assert db.expires(b"k") is not None
    disk.pass_time(5)
    assert list(db) == [b"new"]


def test_a_transaction_that_sets_an_expiry_of_what_another_changed_conflicts(db: kvwal.Store) -> None:
    db[b"k"] = b"v"
    txn = db.transaction()
    txn.touch(b"k", expire_s=5)
    db[b"k"] = b"w"
    with pytest.raises(kvwal.ConflictError):
        txn.commit()


def test_a_read_only_transaction_sets_nothing(db: kvwal.Store) -> None:
    db[b"k"] = b"v"
    with db.transaction(read_only=True) as txn:
        for change in (lambda: txn.touch(b"k", expire_s=5), lambda: txn.put(b"k", b"v", expire_s=5)):
            with pytest.raises(kvwal.ReadOnlyError):
                change()


def test_a_batch_that_is_committed_twice_is_queued_twice(db: kvwal.Store, disk: SimulatedDisk) -> None:
    batch = kvwal.WriteBatch()
    batch.now_us = db.engine.reads.moments.clock.now_us
    batch.put(b"k", b"v", expire_s=5)
    db.commit(batch)
    db.commit(batch)
    again = batch.copy()
    batch.clear()
    db.commit(again)
    assert [row.key for row in db.engine.expirer.rows()] == [b"k"]
    disk.pass_time(5)
    assert b"k" not in db


async def use_in_tasks(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False, **TINY) as store:
        async with kvwal.aio.AsyncStore(store) as db:
            await db.put(b"k", b"v", expire_s=5)
            first = await db.expires(b"k")
            assert await db.touch(b"k", expire_s=50)
            second = await db.expires(b"k")
            assert first is not None
            assert second is not None
            assert first < second
            assert await db.touch(b"k", expire_s=None)
            assert await db.expires(b"k") is None
            assert not await db.touch(b"missing", expire_s=5)
            with pytest.raises(KeyError):
                await db.expires(b"missing")
            async with db.batch() as batch:
                batch.put(b"b", b"v", expire_s=5)
            table = db.table("t", str, int, expire_s=5)
            await table.put("a", 1)
            await table.put("long", 1, expire_s=50)
            async with db.transaction() as txn:
                txn.put(b"t", b"v", expire_s=5)
                assert await txn.touch(b"k", expire_s=5)
                within = await table.within(txn)
                within.put("b", 2)
                assert await within.touch("a", expire_s=50)
                assert await within.expires("b") is not None
            assert await table.add("a", 1) == 2
            async with db.snapshot() as snapshot:
                assert await snapshot.expires(b"t") is not None
            store.checkpoint()
            disk.pass_time(5)
            assert [key async for key in db] == []
            assert [key async for key in table] == ["a", "long"]
            assert await db.get_many([b"k", b"b", b"t"]) == [None, None, None]
            assert (await db.count(), await table.count()) == (0, 2)
            with pytest.raises(ValueError, match="expire_s is"):
                await db.put(b"k", b"v", expire_s=-1)


def test_tasks_have_the_same(disk: SimulatedDisk) -> None:
    asyncio.run(use_in_tasks(disk))


def test_add_gives_a_counter_that_never_expires_no_default(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False) as db:
        table = db.table("t", str, int, expire_s=10)
        table["c"] = 5
        assert table.touch("c", expire_s=None)
        table.add("c", 1)
        table.add("new", 1)
        assert table.expires("c") is None
        assert table.expires("new") is not None


def test_a_touch_of_a_task_keeps_what_another_one_wrote_meanwhile(disk: SimulatedDisk) -> None:
    async def main() -> None:
        async with kvwal.aio.open("/kv", files=disk, background=False) as db:
            await db.put(b"k", b"old")
            async with db.transaction() as txn:
                touching = asyncio.create_task(txn.touch(b"k", expire_s=50))
                await asyncio.sleep(0)
                txn.put(b"k", b"new")
                assert await touching
            assert await db.get(b"k") == b"new"

    asyncio.run(main())


def test_a_batch_made_by_hand_goes_by_the_clock_of_the_store_that_a_table_brings_it_to(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False) as db:
        table = db.table("t", str, int, expire_s=60)
        batch = kvwal.WriteBatch()
        table.within(batch)["a"] = 1
        db.commit(batch)
        assert table["a"] == 1
        disk.pass_time(61)
        assert "a" not in table

    async def main() -> None:
        async with kvwal.aio.open("/kv", files=disk, background=False) as store:
            made = kvwal.WriteBatch()
            of_tasks = store.table("t", str, int, expire_s=60)
            (await of_tasks.within(made))["b"] = 1
            await store.commit(made)
            assert await of_tasks.get("b") == 1
            disk.pass_time(61)
            assert await of_tasks.get("b") is None

    asyncio.run(main())


def test_the_longest_time_is_taken_for_any_longer_one(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False) as db:
        db.put(b"k", b"v", expire_s=1e305)
        db.put(b"l", b"v", expire_s=10**400)
        assert db[b"k"] == db[b"l"] == b"v"


def test_the_writes_that_take_an_expiry_are_those_that_tables_md_names() -> None:
    def taking(kind: type) -> set[str]:
        calls = {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}
        return {name for name, each in calls.items() if callable(each) and "expire_s" in signature(each).parameters}

    assert taking(kvwal.Store) - {"table"} == taking(kvwal.Table) == taking(kvwal.Transaction) == {"put", "touch"}
    assert taking(kvwal.WriteBatch) == {"put"}
