"""Tables for tasks: what `tests/tables/test_table.py` claims of threads; cancellation, drops, and shared flushes."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import gated, opened, ready, run
from store_fixtures import check_store, readers_in

import kvwal
import kvwal.aio
from kvwal import codecs
from kvwal.aio import AsyncStore, committed_seqno
from kvwal.errors import (
    ClosedError,
    CodecError,
    ConflictError,
    ReadOnlyError,
    TableCodecError,
    TableExistsError,
    TableNotFoundError,
    UsageError,
)
from kvwal.pages import NotCached
from kvwal.testing import SimulatedDisk


def with_store(main: Callable[[AsyncStore], Any], **options: Any) -> None:
    """Run with a store on a simulated disk, which is checked afterwards."""

    async def whole() -> None:
        async with opened(**{"keep_history_bytes": 1 << 24, **options}) as db:
            await main(db)
            assert readers_in(await db.pins()) == []
            check_store(db.store)

    run(whole())


async def pairs(table: Any) -> dict[Any, Any]:
    return {key: value async for key, value in table.scan()}


# -- as a map -------------------------------------------------------------------------------------


def test_a_table_is_a_map_of_its_types() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        assert await users.count() == 0
        assert await users.get("ada") is None
        assert await users.get_many(["ada"]) == [None]
        assert await pairs(users) == {}
        assert await users.id() is None
        assert await db.tables() == []
        assert await users.put("ada", {"born": 1815}) == 1
        await users.put("grace", {"born": 1906})
        assert await users.get("ada") == {"born": 1815}
        assert await users.get("eve", 7) == 7
        assert await users.contains("ada")
        assert not await users.contains("eve")
        assert await users.get_many(["grace", "eve"]) == [{"born": 1906}, None]
        assert [key async for key in users] == ["ada", "grace"]
        assert [key async for key in users.keys(reverse=True)] == ["grace", "ada"]
        assert [value async for value in users.values(prefix="g")] == [{"born": 1906}]
        assert [pair async for pair in users.items(limit=1)] == [("ada", {"born": 1815})]
        assert await users.first() == ("ada", {"born": 1815})
        assert await users.last("a", "b") == ("ada", {"born": 1815})
        assert await users.first(prefix="x") is None
        assert await users.count() == 2
        await users.delete("ada")
        await users.delete("ada")
        assert await users.count() == 1
        assert await db.count() == 0, "the default table has nothing of it"
        assert await db.tables() == db.store.tables()
        assert await users.id() == 16
        assert users.name == "users"
        assert "users" in repr(users)
        assert db.store.table("users", str, codecs.json()) == {"grace": {"born": 1906}}

    with_store(main)


def test_keys_come_in_the_order_of_their_type() -> None:
    async def main(db: AsyncStore) -> None:
        orders = db.table("orders", tuple[str, int], float)
        await orders.update({("ada", 10): 1.0, ("ada", 9): 2.0, ("grace", 1): 3.0})
        assert [key async for key in orders.keys(prefix="ada")] == [("ada", 9), ("ada", 10)]
        assert [key async for key in orders.keys(("ada", 10), ("grace",))] == [("ada", 10)]
        await orders.delete_range(prefix="ada")
        assert [key async for key in orders] == [("grace", 1)]
        await orders.clear()
        assert await orders.count() == 0
        with pytest.raises(TypeError, match="no prefixes"):
            db.table("numbers", int).scan(prefix=3)

    with_store(main)


@pytest.mark.parametrize("wrong", [b"ada", 1, None, ("ada",)])
def test_what_is_of_another_type_is_refused_and_changes_nothing(wrong: Any) -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, str)
        for call in (
            lambda: users.get(wrong),
            lambda: users.put(wrong, "a"),
            lambda: users.put("a", wrong),
            lambda: users.update({"a": "a", "b": wrong}),
            lambda: users.delete(wrong),
            lambda: users.setdefault("a", wrong),
            lambda: users.put_if_absent("a", wrong),
            lambda: users.put_if_absent(wrong, "a"),
            lambda: users.pop(wrong),
            lambda: users.revert(wrong, to=0),
        ):
            with pytest.raises(TypeError):
                await call()
        assert db.last_seqno == 0

    with_store(main)


def test_writes_that_depend_on_what_is_there() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        with pytest.raises(KeyError):
            await users.pop("a")
        assert await users.pop("a", None) is None
        with pytest.raises(KeyError):
            await users.popitem()
        assert await users.delete("a") == 0
        assert db.last_seqno == 0, "a table that gets nothing is not made"
        assert await users.setdefault("n") is None
        await users.delete("n")
        assert await users.setdefault("a", [1]) == [1]
        assert await users.setdefault("a", [2]) == [1]
        assert not await users.put_if_absent("a", 3)
        assert await users.put_if_absent("b", 3)
        assert not await users.compare_and_set("a", [2], [5])
        assert await users.compare_and_set("a", [1], [5])
        assert await users.compare_and_set("c", None, 1)
        assert await users.compare_and_set("c", 1, None)
        assert await pairs(users) == {"a": [5], "b": 3}
        assert await users.pop("a") == [5]
        await users.update({"d": 1, "e": 2, "f": 3})
        assert await users.popitem() == ("f", 3)
        assert await users.popitem(last=False) == ("b", 3)
        assert await users.popitem("e") == ("e", 2)
        for bounds in ({"prefix": "x"}, {"start": "b", "stop": "a"}):
            with pytest.raises(KeyError):
                await users.popitem(**bounds)
        counters = db.table("counters", str, int)
        assert await counters.add("hits", 5) == 5
        assert await counters.add("hits", -7) == -2
        with pytest.raises(OverflowError):
            await counters.add("hits", -(1 << 63))
        with pytest.raises(TypeError, match="no counters"):
            await users.add("d", 1)

    with_store(main)


def test_counters_and_queues_of_many_tasks_lose_nothing() -> None:
    async def main(db: AsyncStore) -> None:
        counters, queue = db.table("counters", str, int), db.table("queue", int, str)
        await asyncio.gather(*(counters.add("hits", 1) for _ in range(100)))
        assert await counters.get("hits") == 100
        await queue.update((number, str(number)) for number in range(50))
        taken = await asyncio.gather(*(queue.popitem(last=False) for _ in range(50)))
        assert sorted(taken) == [(number, str(number)) for number in range(50)]

    with_store(main)


def test_positions_and_cursors() -> None:
    async def main(db: AsyncStore) -> None:
        orders = db.table("orders", tuple[str, int], int)
        await orders.update({("ada", 10): 1, ("ada", 9): 2, ("grace", 1): 3})
        sub = db.sub(b"x", str, str)
        await db.update({b"w": b"", b"xa": b"1", b"xb": b"2", b"y": b""})
        assert (await sub.count(), await sub.rank("b"), await sub.key_at(-1)) == (2, 1, "b")
        async with db.transaction() as txn, db.snapshot() as now, db.snapshot(at=0) as before:
            for table in (orders, await orders.within(txn), await orders.within(now)):
                assert await table.count(prefix="ada") == 2
                assert await table.count(("ada", 10)) == 2
                assert await table.rank(("grace", 1)) == 2
                assert await table.key_at(1) == ("ada", 10)
                with pytest.raises(IndexError):
                    await table.key_at(3)
                cursor = table.cursor()
                assert await cursor.seek(("b", 0))
                assert cursor.pair == (("grace", 1), 3)
                assert await cursor.prev()
                assert cursor.key == ("ada", 10)
                await cursor.close()
            assert await (await orders.within(before)).count() == 0

    with_store(main)


def test_the_commit_fills_in_keys_and_raises_versions() -> None:
    async def main(db: AsyncStore) -> None:
        events = db.table("events", tuple[str, codecs.Versionstamp], str)
        seqnos = await asyncio.gather(*(events.put(("a", kvwal.SEQNO), str(n)) for n in range(20)))
        assert [key[1].seqno async for key in events] == sorted(seqnos)
        await events.update([(("b", kvwal.SEQNO), "x"), (("b", kvwal.SEQNO), "y")])
        async with db.transaction() as txn:
            (await events.within(txn)).put(("c", kvwal.SEQNO), "z")
        async with db.batch() as batch:
            (await events.within(batch)).put(("d", kvwal.SEQNO), "z")
        found = [(key[0], key[1].seqno, key[1].ordinal) async for key in events.keys(("b",))]
        last = db.last_seqno
        assert found == [("b", last - 2, 0), ("b", last - 2, 1), ("c", last - 1, 0), ("d", last, 0)]
        old = db.table("t", str, codecs.versioned(codecs.json(), version=1))
        await old.put("a", 1)
        new = db.table("t", str, codecs.versioned(codecs.json(), version=2, upcasters={1: lambda value: value + 1}))
        assert await new.get("a") == 2
        assert await old.get("a") == 1
        # Asked by its name once, and by its id from then on: else this would make the table again and again.
        async with db.batch() as batch:
            (await new.within(batch)).put("b", 3)
        assert new._way._stored.to_write() is not None
        with pytest.raises(TableCodecError):
            await db.table("t", str, codecs.versioned(codecs.json(), version=1)).get("a")
        assert await new.get("b") == 3

    with_store(main)


def test_of_refuses_a_change_of_another_table() -> None:
    async def main(db: AsyncStore) -> None:
        one, two, part = db.table("one", str, str), db.table("two", str, str), db.sub(b"part/", str, str)
        await one.put("a", "1")
        await two.put("a", "2")
        await part.put("a", "3")
        await db.put(b"other", b"4")
        of_one, of_two, of_part, of_other = [change async for change in db.changes(0)]
        assert (one.of(of_one), part.of(of_part)) == (("a", "1"), ("a", "3"))
        with pytest.raises(UsageError, match="the change is of 'two', and not of 'one'"):
            one.of(of_two)
        with pytest.raises(UsageError, match="the change is of 'two', and not of the default table"):
            part.of(of_two)
        with pytest.raises(CodecError):
            part.of(of_other)

    with_store(main)


def test_what_cannot_be_decoded_is_not_taken() -> None:
    async def main(db: AsyncStore) -> None:
        numbers, texts = db.sub(b"t/", str, int), db.sub(b"t/", str, str)
        await texts.update({"a": "no", "b": "12345678", "c": "no"})
        for take in (numbers.pop("a"), numbers.pop("c", None), numbers.popitem(), numbers.popitem(last=False)):
            with pytest.raises(CodecError):
                await take
        assert await texts.count() == 3
        assert await numbers.popitem("b", "c") == ("b", int.from_bytes(b"12345678", "little"))
        assert [key async for key in texts] == ["a", "c"]

    with_store(main)


def test_compare_and_set_takes_none_for_no_key_and_not_for_a_null() -> None:
    async def main(db: AsyncStore) -> None:
        table = db.table("t", str, codecs.json())
        await table.put("null", None)
        assert not await table.compare_and_set("null", None, 1)
        assert await table.contains("null")
        assert await table.compare_and_set("new", None, 1)

    with_store(main)


def test_tasks_take_each_of_a_queue_once() -> None:
    async def main(db: AsyncStore) -> None:
        queue = db.table("queue", int, codecs.json())
        await queue.update({number: {"n": number} for number in range(100)})
        taken = await asyncio.gather(*(queue.popitem(last=number % 2 == 0) for number in range(100)))
        assert sorted(key for key, _ in taken) == list(range(100))
        assert all(value == {"n": key} for key, value in taken)
        with pytest.raises(KeyError):
            await queue.popitem()

    with_store(main)


# -- codecs ---------------------------------------------------------------------------------------


def test_a_table_with_other_codecs_is_refused_by_the_first_use() -> None:
    disk = SimulatedDisk()

    async def main(db: AsyncStore) -> None:
        await db.table("users", str, codecs.json()).put("a", 1)
        wrong = db.table("users", int, str)
        async with db.transaction() as txn, db.snapshot() as snapshot:
            for use in (
                lambda: wrong.get(1),
                lambda: wrong.get_many([1]),
                lambda: anext(wrong.scan()),
                lambda: wrong.put(1, "a"),
                lambda: wrong.pop(1),
                lambda: wrong.within(txn),
                lambda: wrong.within(snapshot),
                lambda: wrong.within(kvwal.WriteBatch()),
                wrong.count,
            ):
                with pytest.raises(TableCodecError, match="table 'users'"):
                    await use()

    with_store(main, files=disk)


def test_a_table_takes_no_part_in_what_is_of_another_store() -> None:
    async def main(db: AsyncStore) -> None:
        ours = db.table("ours", str, int)
        await ours.put("a", 1)
        index = await ours.index("by_value", key=lambda value: value, codec=int)
        async with (
            opened(files=SimulatedDisk(seed=1)) as other,
            other.transaction() as txn,
            other.snapshot() as snapshot,
        ):
            batch = kvwal.WriteBatch()
            await other.table("theirs", str, int).within(batch)
            before = db.store.last_seqno
            for whole in txn, snapshot, batch:
                with pytest.raises(UsageError, match="the table is of another open store than the "):
                    await ours.within(whole)
            for whole in txn, snapshot:
                with pytest.raises(UsageError, match="the table is of another open store than the "):
                    index.within(whole)
            batch.table(16).put(b"a", bytes(8))
            with pytest.raises(UsageError, match="than the batch"):
                await db.commit(batch)
            assert db.store.last_seqno == before

    with_store(main)


def test_bytes_that_are_no_value_are_reached_as_bytes() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        await users.put("a", 1)
        table = await users.id()
        assert table is not None
        batch = kvwal.WriteBatch()
        batch.table(table).put(b"b", b"no json")
        await db.commit(batch)
        with pytest.raises(CodecError) as caught:
            await users.get("b")
        assert caught.value.data == b"no json"
        with pytest.raises(CodecError):
            await pairs(users)
        assert await users.raw().get(b"b") == b"no json"
        assert [key async for key in users.raw()] == [b"a", b"b"]

    with_store(main)


class Watched:
    """A codec that notes whether the commit leader calls it."""

    name = "watched"
    version = 1
    ordered = True

    def __init__(self) -> None:
        self.store: kvwal.Store | None = None
        self.leads = self.calls = 0

    def _note(self) -> None:
        assert self.store is not None
        self.calls += 1
        self.leads += self.store.engine.queue.lock._is_owned()

    def encode(self, value: str) -> bytes:
        self._note()
        return value.encode()

    def decode(self, data: bytes) -> str:
        self._note()
        return data.decode()


def test_no_code_of_a_codec_runs_in_the_commit_leader() -> None:
    codec = Watched()

    async def main(db: AsyncStore) -> None:
        codec.store = db.store
        table, same = db.table("t", codec, codec), db.store.table("t", codec, codec)
        for _ in range(2):
            await table.put("a", "1")
            await table.update({"b": "2"})
            await table.setdefault("c", "3")
            await table.put_if_absent("d", "4")
            await table.compare_and_set("a", "1", "5")
            await table.pop("b")
            await table.popitem()
            same["e"] = "6"
            same.setdefault("f", "7")
            same.compare_and_set("e", "6", "8")
            same.popitem()
            del same["a"]
        assert codec.calls > 40
        assert codec.leads == 0

    with_store(main)


# -- within ---------------------------------------------------------------------------------------


def test_a_transaction_over_tables_is_one_commit() -> None:
    async def main(db: AsyncStore) -> None:
        users, orders = db.table("users", str, int), db.table("orders", tuple[str, int], str)
        async with db.transaction() as txn:
            mine, its = await users.within(txn), await orders.within(txn)
            assert await mine.get("ada") is None
            assert await mine.get_many(["ada"]) == [None]
            assert await mine.count() == 0
            assert await pairs(mine) == {}
            mine.delete("ada")
            mine.delete_range()
            mine.put("ada", 1)
            its.put(("ada", 1), "book")
            txn.put(b"n", b"1")
            assert await pairs(mine) == {"ada": 1}
            assert await its.first() == (("ada", 1), "book")
            assert await its.count() == 1
            assert await users.get("ada") is None, "no other task sees it"
            again = await users.within(txn)
            assert await again.get("ada") == 1
        assert txn.commit_seqno == db.last_seqno == 1
        assert await users.get("ada") == 1
        assert {info.name: info.id for info in await db.tables()} == {"users": 16, "orders": 17}
        for use in (lambda: mine.put("b", 2), lambda: mine.delete("b"), mine.clear, mine.scan):
            with pytest.raises(ClosedError):
                use()
        with pytest.raises(ClosedError):
            await mine.get("b")
        with pytest.raises(RuntimeError):
            async with db.transaction() as txn:
                (await users.within(txn)).put("b", 1)
                raise RuntimeError
        assert not await users.contains("b")
        async with db.transaction() as txn:
            mine = await users.within(txn)
            with pytest.raises(TypeError):
                mine.update({"y": 1, "z": "x"})  # type: ignore[dict-item]  # it is the mistake
            mine.update({"c": 1, "d": 2})
            mine.update()
            mine.delete_range("d", "e")
            mine.delete("ada")
            with pytest.raises(TypeError):
                mine.put(b"x", 1)  # type: ignore[arg-type]
            assert await pairs(mine) == {"c": 1}
        assert await pairs(users) == {"c": 1}
        async with db.transaction(read_only=True) as txn:
            mine = await users.within(txn)
            assert await mine.get_many(["c", "x"]) == [1, None]
            with pytest.raises(ReadOnlyError):
                mine.put("x", 1)
        with pytest.raises(TypeError):
            await users.within(db)  # type: ignore[call-overload]

    with_store(main)


def test_what_was_taken_of_a_table_before_the_transaction_made_it_is_of_that_table() -> None:
    async def main(db: AsyncStore) -> None:
        async with db.transaction() as txn:
            mine = await db.table("users", str, int).within(txn)
            raw, cursor = mine.raw(), mine.cursor()
            assert (await raw.get(b"ada"), await raw.count(), await cursor.first()) == (None, 0, False)
            mine.put("ada", 1)
            one = await raw.get(b"ada")
            assert one is not None
            assert await raw.get_many([b"ada", b"eve"]) == [one, None]
            assert await pairs(raw) == {b"ada": one}
            assert (await raw.count(), await raw.contains(b"ada"), await raw.expires(b"ada")) == (1, True, None)
            assert (await cursor.first(), cursor.pair) == (True, ("ada", 1))
        for use in (raw.get(b"ada"), raw.get_many([b"ada"]), raw.count(), cursor.first()):
            with pytest.raises(ClosedError):
                await use

    with_store(main)


def test_a_table_that_is_made_or_dropped_meanwhile_and_a_key_that_was_read_are_conflicts() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, int)
        txn = db.transaction()
        (await users.within(txn)).put("a", 1)
        await users.put("b", 2)
        with pytest.raises(ConflictError):
            await txn.commit()
        txn = db.transaction()
        (await users.within(txn)).put("a", 1)
        await db.drop_table("users")
        with pytest.raises(ConflictError):
            await txn.commit()
        assert await db.tables() == []

        async def increment(txn: kvwal.aio.AsyncTransaction) -> None:
            mine = await users.within(txn)
            mine.put("n", 1 + (await mine.get("n") or 0))

        await asyncio.gather(*(db.run(increment) for _ in range(20)))
        assert await users.get("n") == 20

    with_store(main)


def test_a_batch_over_tables_is_one_commit() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, int)
        async with db.batch(meta={"by": "test"}) as batch:
            writes = await users.within(batch)
            assert [info.keys for info in await db.tables()] == [0], "it is there, and empty"
            writes["before"] = 1
            writes.clear()
            writes["a"] = 1
            writes.update({"c": 3, "d": 4})
            writes.delete_range(prefix="d")
            batch.put(b"x", b"y")
        assert await pairs(users) == {"a": 1, "c": 3}
        assert await db.get(b"x") == b"y"
        assert db.last_seqno == 2

    with_store(main)


# -- the past -------------------------------------------------------------------------------------


def test_past_moments_versions_and_differences() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        assert await users.versions("a") == []
        assert [each async for each in users.diff(0)] == []
        await users.put("a", 1, meta={"why": "test"})
        one = db.last_seqno
        await users.put("a", [2])
        await users.put("b", 3)
        assert [(each.value, dict(each.meta)) for each in await users.versions("a")] == [
            ([2], {}),
            (1, {"why": "test"}),
        ]
        assert [tuple(each) async for each in users.diff(one)] == [("a", 1, [2]), ("b", None, 3)]
        async with users.at(one) as then, db.snapshot(at=0) as before, db.snapshot() as now:
            assert await pairs(await users.within(then)) == {"a": 1}
            empty = await users.within(before)
            assert (await pairs(empty), await empty.count(), await empty.get("a")) == ({}, 0, None)
            assert await (await users.within(now)).get_many(["a", "b"]) == [[2], 3]
            assert await (await users.within(now)).count() == 2
        for closed in (await_within(users, now), await_get(empty)):
            with pytest.raises(ClosedError):
                await closed
        assert await users.revert("a", to=one) == db.last_seqno
        assert await users.get("a") == 1
        await users.revert("b", to=one)
        assert not await users.contains("b")
        table = await users.id()
        async with db.changes(0) as changes:
            told = [users.of(change) async for change in changes if change.table == table]
        assert told == [("a", 1), ("a", [2]), ("b", 3), ("a", 1), ("b", None)]
        with pytest.raises(ValueError, match="commit"):
            await users.revert("a", to=99)
        lasting = db.table("lasting", str, int, expire_s=100)
        await lasting.put("a", 1)
        await lasting.touch("a", expire_s=None)
        await lasting.delete("a")
        await lasting.revert("a", to=db.last_seqno - 1)
        assert (await lasting.get("a"), await lasting.expires("a")) == (1, None)

    async def await_within(users: Any, snapshot: Any) -> None:
        await users.within(snapshot)

    async def await_get(table: Any) -> None:
        await table.get("a")

    with_store(main)


# -- drop, rename, parts, ends ----------------------------------------------------------------------


def test_drop_and_rename() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, int)
        with pytest.raises(TableNotFoundError):
            await db.drop_table("users")
        await users.put("a", 1)
        before = await users.id()
        assert await db.drop_table("users", meta={"why": "test"}) == 2
        assert await pairs(users) == {}
        await users.put("b", 2)
        assert await users.id() != before
        await db.table("people", str, int).put("x", 1)
        with pytest.raises(TableExistsError):
            await db.rename_table("users", "people")
        await db.rename_table("users", "staff")
        assert await pairs(users) == {}
        assert await pairs(db.table("staff", str, int)) == {"b": 2}

    with_store(main)


def test_a_part_of_the_default_table() -> None:
    async def main(db: AsyncStore) -> None:
        await db.update({b"a": b"1", b"user:ada": b"2", b"user:grace": b"3", b"user;": b"4"})
        users = db.sub(b"user:", str, str)
        assert await pairs(users) == {"ada": "2", "grace": "3"}
        assert await users.count() == 2
        assert await users.id() == 0
        await users.put("bob", "x")
        assert await db.get(b"user:bob") == b"x"
        assert await users.pop("bob") == "x"
        async with db.transaction() as txn:
            (await users.within(txn)).put("eve", "z")
            assert await txn.get(b"user:eve") == b"z"
        async with db.snapshot() as now:
            assert await (await users.within(now)).count() == 3
        await users.clear()
        assert [key async for key in db] == [b"a", b"user;"]
        assert await db.tables() == []

    with_store(main)


def test_a_store_that_is_read_only_or_closed_or_of_another_loop() -> None:
    disk = SimulatedDisk()
    kept: list[Any] = []

    async def main(db: AsyncStore) -> None:
        kept.extend([db.table("users", str, int), db])
        await kept[0].put("a", 1)

    with_store(main, files=disk)
    users, db = kept

    async def after() -> None:
        for use in (
            lambda: users.get("a"),
            lambda: users.get_many(["a"]),
            lambda: users.put("a", 1),
            lambda: users.pop("a"),
            lambda: users.versions("a"),
            users.count,
            users.id,
            db.tables,
            lambda: db.drop_table("users"),
        ):
            with pytest.raises(ClosedError):
                await use()
        for call in (users.scan, lambda: users.diff(0), lambda: users.at(0), lambda: db.table("x")):
            with pytest.raises(ClosedError):
                call()
        async with kvwal.aio.open("/kv", "r", files=disk) as reading:
            its = reading.table("users", str, int)
            assert await pairs(its) == {"a": 1}
            for use in (lambda: its.put("b", 1), lambda: its.pop("a"), lambda: reading.drop_table("users")):
                with pytest.raises(ReadOnlyError):
                    await use()

    run(after())


def test_a_table_keeps_its_store() -> None:
    """A forgotten `AsyncStore` stops the thread that commits: what a table commits then would never end."""
    disk = SimulatedDisk()

    async def main() -> None:
        with kvwal.open("/kv", files=disk, background=False) as store:
            users = AsyncStore(store).table("users", str, int)
            gc.collect()
            await users.put("a", 1)
            assert await users.get("a") == 1

    run(main())


# -- memory, and workers --------------------------------------------------------------------------


def test_reads_of_memory_do_not_leave_the_loop_and_cold_ones_do(tmp_path: Path) -> None:
    """A coroutine that never waits ends at its first step."""

    def waits(read: Any) -> bool:
        try:
            read.send(None)
        except StopIteration:
            return False
        read.close()
        return True

    async def fill() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.table("users", int, str).update((number, "v" * 100) for number in range(5000))
            await db.checkpoint()

    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s", cache_bytes=1 << 20) as db:
            users = db.table("users", int, str)
            assert waits(users.get(1)), "its name is in a page"
            assert waits(db.table("users", int, str).put(1, "x")), "the same"
            scan = db.table("users", int, str).scan(10, 12)
            await users.put(11, "later")
            assert [pair async for pair in scan] == [(10, "v" * 100), (11, "v" * 100)], "of the moment of the call"
            assert await users.get(1000) == "v" * 100
            assert not waits(users.get(1000))
            assert not waits(users.get_many([1000]))
            assert not waits(users.contains(11))
            assert not waits(users.id())
            assert waits(users.get(4000))
            assert waits(users.get_many([1000, 4500]))
            assert await users.get_many([1000, 4500]) == ["v" * 100] * 2
            async with db.transaction() as txn, db.snapshot() as snapshot:
                mine, then = await users.within(txn), await users.within(snapshot)
                assert not waits(mine.get(1000))
                assert not waits(then.get(1000))
                assert await mine.get(2000) == await then.get(3000) == "v" * 100
                mine.put(1, "y")
            assert await users.get(1) == "y"

    run(fill())
    run(main())


def test_a_write_of_a_transaction_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `within` read may have left the memory by then."""

    async def main(db: AsyncStore) -> None:
        await db.table("others", int, str).put(1, "a")
        reads = db.store.engine.reads

        def cold(*args: Any, cached_only: bool = False, **kwargs: Any) -> Any:
            raise NotCached

        async with db.transaction() as txn:
            mine = await db.table("users", int, str).within(txn)
            monkeypatch.setattr(reads, "read_at", cold)
            mine.put(1, "b")
            monkeypatch.undo()
            assert await mine.get(1) == "b"
        assert [(info.name, info.id) for info in await db.tables()] == [("others", 16), ("users", 17)]

    with_store(main)


# -- many tasks -----------------------------------------------------------------------------------


def test_a_thousand_tasks_share_few_flushes(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            users = db.table("users", int, int)
            await users.put(0, 0)
            before = gate.syncs
            await asyncio.gather(*(users.put(number, number) for number in range(1000)))
            assert gate.syncs - before <= 4
            before = gate.syncs
            await asyncio.gather(*(users.add(number % 10, 1) for number in range(1000)))
            assert gate.syncs - before <= 4
            assert await users.count() == 1000
            assert await users.get(7) == 107

    run(main())


def test_a_table_that_is_dropped_under_fifty_writing_tasks_leaves_nothing_behind() -> None:
    async def main(db: AsyncStore) -> None:
        done = False

        async def write(number: int) -> None:
            table, i = db.table("t", int, int), 0
            while not done:
                i += 1
                await table.put(number, i)
                await table.pop(number, None)
                await table.add(number, 1)

        async def drop() -> None:
            nonlocal done
            ended = 0
            while ended < 12:
                try:
                    await (db.rename_table("t", f"t{ended}") if ended % 3 == 0 else db.drop_table("t"))
                    ended += 1
                except TableNotFoundError:
                    pass
                await asyncio.sleep(0)
            done = True

        await asyncio.gather(*(write(number) for number in range(50)), drop())
        known = {info.id for info in await db.tables()} | {0, 1}
        dropped: dict[int, int] = {}
        async with db.changes(0) as changes:
            async for change in changes:
                if change.kind == "delete_range":
                    dropped[change.table] = change.seqno
                assert dropped.get(change.table, change.seqno) == change.seqno, "a change of a dropped table"
        assert len(dropped) == 8
        assert not known & set(dropped)

    with_store(main)


def test_a_put_that_a_drop_overtakes_makes_a_new_table(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            users = db.table("users", str, int)
            await users.put("a", 1)
            gate.close()
            tasks = [asyncio.ensure_future(users.put("a", 2))]
            await gate.reached()
            tasks.append(asyncio.ensure_future(db.drop_table("users")))
            # The put that is at its flush, and the drop behind it.
            while len(db.store.engine.queue._queue) < 2:
                await asyncio.sleep(0)
            tasks.append(asyncio.ensure_future(users.put("b", 3)))
            await ready()
            gate.open()
            assert (await asyncio.gather(*tasks))[0] == 2
            assert await pairs(users) == {"b": 3}
            assert await users.id() == 17

    run(main())


# -- cancellation ---------------------------------------------------------------------------------


def test_a_commit_that_was_not_begun_is_withdrawn_and_one_that_was_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            users = db.table("users", str, int)
            await users.put("a", 1)
            assert await users.get("n") is None  # From here on it is known, so that no worker is asked.
            gate.close()
            begun = [asyncio.ensure_future(users.put("b", 2)), asyncio.ensure_future(users.add("n", 5))]
            await gate.reached()
            others = [asyncio.ensure_future(users.put("c", 3)), asyncio.ensure_future(users.pop("a"))]
            await ready()
            for task in (*begun, *others):
                task.cancel()
            await ready()
            assert [task.done() for task in (*begun, *others)] == [False, False, True, True]
            gate.open()
            seqnos = []
            for task in (*begun, *others):
                with pytest.raises(asyncio.CancelledError) as caught:
                    await task
                seqnos.append(committed_seqno(caught.value))
            assert seqnos == [2, 3, None, None]
            assert await pairs(users) == {"a": 1, "b": 2, "n": 5}
            assert db.pending_commits == 0

    run(main())


def test_a_drop_that_is_cancelled_is_awaited_and_reported(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            users = db.table("users", str, int)
            await users.put("a", 1)
            gate.close()
            task = asyncio.ensure_future(db.drop_table("users"))
            await gate.reached()
            task.cancel()
            await ready()
            assert not task.done()
            gate.open()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert committed_seqno(caught.value) == 2
            assert await users.get("a") is None
            await users.put("b", 2)
            assert await pairs(users) == {"b": 2}

    run(main())


# -- migrating ------------------------------------------------------------------------------------

ONE = codecs.versioned(codecs.json(), version=1)
TWO = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda old: [*old, "two"]})


def test_values_are_brought_to_the_newest_version_and_a_task_that_is_cancelled_leaves_it_whole() -> None:
    async def main(db: AsyncStore) -> None:
        await db.table("t", int, ONE).update({n: [n] for n in range(10)})
        table = db.table("t", int, TWO)
        told: list[tuple[int, int]] = []
        dry = await table.migrate(dry_run=True)
        assert (dry.rewritten, dry.versions) == (10, {1: 10})

        def cancel(done: int, total: int) -> None:
            told.append((done, total))
            if done == 4:
                task.cancel()

        task = asyncio.ensure_future(table.migrate(batch=2, progress=cancel))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert told == [(0, 10), (2, 10), (4, 10)]
        rest = await table.migrate(batch=2)
        assert rest.resumed
        assert (rest.examined, rest.rewritten) == (10, 10)
        assert await pairs(table) == {n: [n, "two"] for n in range(10)}
        assert {value[0] async for value in table.raw().values()} == {2}
        with pytest.raises(TypeError, match=r"codecs\.versioned"):
            await db.table("plain", str, codecs.json()).migrate()

    with_store(main)


class Stops:
    """A codec that stops where it should not."""

    name = "stops"
    version = 1

    def encode(self, value: str) -> bytes:
        return value.encode()

    def decode(self, data: bytes) -> str:
        if data == b"stop":
            raise StopIteration
        return data.decode()


def test_a_codec_that_raises_stop_iteration_ends_no_scan_silently() -> None:
    async def main(db: AsyncStore) -> None:
        table = db.table("t", str, Stops())
        await table.update({"a": "go", "b": "stop", "c": "go"})
        for scan in (table.scan(), table.values(), table.items()):
            with pytest.raises(RuntimeError):
                [each async for each in scan]

    with_store(main)
