"""Which commits a thread or a task makes in a block: whatever method made them, and none of another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import Interruption, check_store, interrupted_at, run_threads

import kvwal
import kvwal.aio
from kvwal.testing import SimulatedDisk


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as store:
        yield store
        check_store(store)


def in_batch(db: Any) -> None:
    with db.batch() as batch:
        batch.put(b"a", b"b")


def remove(db: Any) -> None:
    del db[b"there"]


WRITES: list[Callable[[kvwal.Store], Any]] = [
    lambda db: db.put(b"a", b"b"),
    lambda db: db.put(b"a", b"b", meta={"by": "me"}),
    lambda db: db.__setitem__(b"a", b"b"),
    lambda db: db.delete(b"a"),
    lambda db: db.delete_range(b"a"),
    lambda db: db.update({b"a": b"b"}),
    lambda db: db.clear(),
    lambda db: db.setdefault(b"a", b"b"),
    lambda db: db.pop(b"there"),
    lambda db: db.popitem(),
    lambda db: db.put_if_absent(b"a", b"b"),
    lambda db: db.compare_and_set(b"a", None, b"b"),
    lambda db: db.add(b"n", 1),
    lambda db: db.run(lambda txn: txn.put(b"a", b"b")),
    lambda db: db.transactional(lambda txn: txn.put(b"a", b"b"))(),
    lambda db: db.revert(b"a", to=1),
    in_batch,
    remove,
]
OF_TABLES: list[Callable[[kvwal.Table[str, int]], Any]] = [
    lambda table: table.put("a", 1),
    lambda table: table.__setitem__("a", 1),
    lambda table: table.delete("a"),
    lambda table: table.delete_range(),
    lambda table: table.update({"a": 1}),
    lambda table: table.clear(),
    lambda table: table.setdefault("a", 1),
    lambda table: table.pop("there"),
    lambda table: table.popitem(),
    lambda table: table.put_if_absent("a", 1),
    lambda table: table.compare_and_set("a", None, 1),
    lambda table: table.add("n", 1),
    lambda table: table.__delitem__("there"),
    lambda table: table.revert("a", to=1),
]


@pytest.mark.parametrize("write", WRITES)
def test_every_write_of_a_store_is_told(db: kvwal.Store, write: Callable[[kvwal.Store], Any]) -> None:
    db[b"there"] = b"1"
    with db.own_commits() as own:
        assert (own.first, own.last) == (None, None)
        result = write(db)
        assert (own.first, own.last) == (2, 2)
    assert db.last_seqno == 2
    db[b"after"] = b"1"
    assert (own.first, own.last) == (2, 2)
    assert not isinstance(result, int) or result in (True, 1, 2)
    assert not db.engine.queue.events.listeners, "a put is as quick again as before"


@pytest.mark.parametrize("write", OF_TABLES)
def test_every_write_of_a_table_is_told(db: kvwal.Store, write: Callable[[kvwal.Table[str, int]], Any]) -> None:
    table = db.table("t", str, int)
    table["there"] = 1
    with db.own_commits() as own:
        write(table)
    assert own.last == own.first == db.last_seqno == 2


def test_what_writes_nothing_is_no_commit(db: kvwal.Store) -> None:
    db[b"a"] = b"b"
    with db.own_commits() as own:
        assert not db.put_if_absent(b"a", b"c")
        db.commit(kvwal.WriteBatch())
        db.run(lambda txn: txn.get(b"a"))
        with pytest.raises(KeyError):
            db.pop(b"none")
    assert (own.first, own.last) == (None, None)
    assert repr(own) == "<kvwal.OwnCommits None to None>"


def test_blocks_nest_and_other_stores_are_not_told(db: kvwal.Store) -> None:
    with kvwal.open("/other", files=SimulatedDisk(), background=False) as other:
        with db.own_commits() as own, other.own_commits() as theirs:
            db[b"a"] = b"b"
            with db.own_commits() as inner:
                db[b"a"] = b"c"
                other[b"a"] = b"c"
            db[b"a"] = b"d"
        assert (own.first, own.last) == (1, 3)
        assert (inner.first, inner.last) == (2, 2)
        assert (theirs.first, theirs.last) == (1, 1)


def test_a_commit_that_fails_is_not_told(db: kvwal.Store) -> None:
    with db.own_commits() as own:
        txn = db.transaction()
        txn.get(b"a")
        db[b"a"] = b"b"
        txn[b"a"] = b"c"
        with pytest.raises(kvwal.ConflictError):
            txn.commit()
        with pytest.raises(TypeError):
            db.add(b"a", 1)
    assert (own.first, own.last) == (1, 1)


@pytest.mark.parametrize("way", ["put", "add", "update"])
def test_a_commit_that_was_written_although_its_call_was_interrupted_is_told(way: str) -> None:
    step = written = 0
    interruption: Interruption | None = Interruption()
    while interruption is not None:
        step += 1
        with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
            db[b"a"] = b"0" * 8
            own = db.own_commits()

            def write(db: kvwal.Store = db, own: kvwal.OwnCommits = own) -> None:
                with own:
                    if way == "put":
                        db.put(b"a", b"1" * 8)
                    elif way == "add":
                        db.add(b"a", 1)
                    else:
                        db.update({b"a": b"1" * 8})

            interruption = interrupted_at(step, write)
            was_written = db.last_seqno == 2
            assert own.last == own.first
            if own.last is not None:
                assert was_written
            if interruption is None or any("was written" in note for note in getattr(interruption, "__notes__", ())):
                written += 1
                assert own.last == 2
            db[b"b"] = b"1"
            assert db.last_seqno == 2 + was_written
    assert step > 50
    assert written > 5


def test_a_block_whose_leaving_was_interrupted_is_no_outer_one_once_its_store_is_closed(db: kvwal.Store) -> None:
    with kvwal.open("/other", files=SimulatedDisk(), background=False) as other:
        left = other.own_commits()
        left.__enter__()
    assert not other.engine.events.listeners
    with db.own_commits() as own:
        assert own._outer is None
        db[b"a"] = b"b"
    with db.own_commits() as outer, db.own_commits() as own:
        assert own._outer is outer


def test_each_thread_has_its_own(tmp_path: Path) -> None:
    with kvwal.open(str(tmp_path / "kv"), durability="os") as db:

        def work(number: int) -> None:
            key = b"%d" % number
            for round_ in range(60):
                with db.own_commits() as own:
                    db[key] = b"%d" % round_
                    db.add(b"all", 1)
                assert own.first is not None
                assert own.last is not None
                [newest] = db.versions(key, limit=1, until=own.last)
                assert (newest.seqno, newest.value) == (own.first, b"%d" % round_)
                assert own.last > own.first

        run_threads(*(lambda number=number: work(number) for number in range(4)))
        thread = threading.Thread(target=lambda: db.put(b"other", b"1"))
        with db.own_commits() as own:
            thread.start()
            thread.join()
        assert own.last is None


def test_tasks_have_their_own_and_those_they_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(str(tmp_path / "kv"), durability="os") as db:
            table = db.table("t", str, int)

            async def work(number: int) -> None:
                with db.own_commits() as own:
                    for write in (
                        lambda: db.put(b"%d" % number, b"1"),
                        lambda: db.add(b"n", 1),
                        lambda: table.add("n", 1),
                        lambda: table.setdefault(str(number), 1),
                        lambda: table.popitem(str(number), f"{number}~"),
                        lambda: db.update({b"a": b"b"}),
                        lambda: db.clear(),
                    ):
                        before = own.last or 0
                        await write()
                        assert own.last is not None
                        assert own.last > before

                    async def function(txn: kvwal.aio.AsyncTransaction) -> None:
                        txn.put(b"%d" % number, b"%d" % number)

                    await db.run(function)
                [version] = await db.versions(b"%d" % number, until=own.last, limit=1)
                assert version.seqno == own.last

            await asyncio.gather(*(work(number) for number in range(8)))
            with db.own_commits() as own:
                await asyncio.gather(*(table.put(str(n), n) for n in range(4)))
                first, last = own.first, own.last
                dropped = await db.drop_table("t")
            assert first is not None
            assert last is not None
            assert last - first <= 3
            assert own.last == dropped

    asyncio.run(main())
