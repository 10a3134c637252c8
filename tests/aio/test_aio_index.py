"""Indexes for tasks: what `tests/tables/test_index.py` claims of threads."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from aio_fixtures import opened, run
from store_fixtures import check_store, readers_in

import kvwal
from kvwal import codecs
from kvwal.aio import AsyncStore, committed_seqno
from kvwal.errors import ClosedError, ConflictError, IndexNotDeclaredError, IndexNotFoundError, IndexNotReadyError


def with_store(main: Any, **options: Any) -> None:
    async def whole() -> None:
        async with opened(**{"keep_history_bytes": 1 << 24, **options}) as db:
            await main(db)
            assert readers_in(await db.pins()) == []
            check_store(db.store)
            assert db.store.verify().ok

    run(whole())


async def listed(found: Any) -> list[Any]:
    return [each async for each in found]


def city_of(user: dict[str, Any]) -> str | None:
    return user.get("city")


def test_an_index_is_kept_by_every_write_of_tasks() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        by_city = await users.index("by_city", key=city_of, codec=str)
        assert await by_city.wait(1)
        await asyncio.gather(*(users.put(f"{n:02}", {"city": f"c{n % 3}"}) for n in range(30)))
        assert await by_city.count() == 30
        assert await by_city.count(equal="c1") == 10
        await users.delete_range("10")
        await users.setdefault("a", {"city": "d"})
        await users.put_if_absent("b", {"city": "d"})
        assert await users.compare_and_set("b", {"city": "d"}, {"city": "e"})
        assert await users.pop("00") == {"city": "c0"}
        async with db.batch() as batch:
            (await users.within(batch)).put("x", {"city": "Oslo"})
        await users.update({"y": {"city": "Oslo"}, "z": {}})
        assert await by_city.get("Oslo") == [("x", {"city": "Oslo"}), ("y", {"city": "Oslo"})]
        none: Any = None
        with pytest.raises(TypeError, match="str is expected"):
            await by_city.get(none)
        end: Any = kvwal.END
        for no_key in (none, end):
            with pytest.raises(TypeError, match="rank takes a key"):
                await users.rank(no_key)
        expected = sorted([(value["city"], key) async for key, value in users.scan() if "city" in value])
        assert await listed(by_city.keys()) == expected
        assert await listed(by_city.scan("d", reverse=True, limit=2)) == [
            ("e", "b", {"city": "e"}),
            ("d", "a", {"city": "d"}),
        ]
        assert await by_city.progress() == (await users.count(),) * 2
        assert by_city.name == "by_city"
        assert repr(by_city) == "<kvwal.aio.AsyncIndex 'by_city' of 'users', str: json>"
        numbers = db.table("numbers", str, int)
        by_value = await numbers.index("by_value", key=abs, codec=int)
        await asyncio.gather(*(numbers.add("n", -1) for _ in range(20)))
        assert await by_value.get(20) == [("n", -20)]
        assert await users.drop_index("by_city") == db.store.last_seqno
        with pytest.raises(IndexNotFoundError):
            await listed(by_city.scan())

    with_store(main)


def test_the_end_of_all_keys_is_a_bound_of_tables_and_their_parts_and_indexes() -> None:
    async def main(db: AsyncStore) -> None:
        end = kvwal.END
        words: Any = db.table("words", str, int)
        for table in (words, db.sub(b"s:", str, int)):
            await table.update({"a": 1, "b": 2})
            assert await listed(table.keys(end)) == await listed(table.scan(end, end, reverse=True)) == []
            assert (await table.count(end), await table.first(end)) == (0, None)
            assert await listed(table.keys("b", end)) == ["b"]
            assert await table.cursor().seek_last(end)
            await table.delete_range(end)
            assert await table.popitem("a", end) == ("b", 2)
            async with db.transaction() as txn:
                (await table.within(txn)).delete_range(end)
        by_value = await words.index("by_value", key=lambda value: value, codec=int)
        assert await by_value.wait(60)
        assert await listed(by_value.keys(end)) == []
        assert await by_value.count(1, end) == 1

    with_store(main)


def test_a_scan_in_a_transaction_of_tasks_does_not_see_what_is_written_meanwhile() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", int, codecs.json())
        by_city = await users.index("by_city", key=city_of, codec=str)
        await users.update({n: {"city": "Oslo"} for n in range(1000)})
        async with db.transaction() as txn:
            mine = await users.within(txn)
            found = []
            async for entry in by_city.within(txn).scan():
                found.append(tuple(entry))
                mine.put(999 - entry.key, {"city": "Rom"})
            assert found == [("Oslo", n, {"city": "Oslo"}) for n in range(1000)]
            assert await by_city.within(txn).count(equal="Rom") == 1000

    with_store(main)


def test_an_index_in_a_transaction_of_tasks_and_at_a_past_moment() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        by_city = await users.index("by_city", key=city_of, codec=str)
        await users.put("ada", {"city": "Oslo"})
        before = db.store.last_seqno
        async with db.transaction() as txn:
            mine = await users.within(txn)
            mine.put("bob", {"city": "Oslo"})
            found, count = await asyncio.gather(by_city.within(txn).get("Oslo"), by_city.within(txn).count())
            assert [key for key, _ in found] == ["ada", "bob"]
            assert count == 2
            mine.delete("ada")
            assert await listed(by_city.within(txn).keys()) == [("Oslo", "bob")]
        assert await listed(by_city.keys()) == [("Oslo", "bob")]
        async with db.snapshot(at=before) as then:
            assert await by_city.within(then).get("Oslo") == [("ada", {"city": "Oslo"})]
        with pytest.raises(ClosedError):
            await by_city.within(then).count()
        with pytest.raises(TypeError):
            by_city.within(db)  # type: ignore[arg-type]  # it is refused
        txn = db.transaction()
        assert await by_city.within(txn).get("Rom") == []
        (await users.within(txn)).put("x", {})
        await users.put("eve", {"city": "Rom"})
        with pytest.raises(ConflictError):
            await txn.commit()

    with_store(main)


def test_a_function_that_raises_and_an_index_that_is_not_declared_refuse_commits_of_tasks() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        await users.put("ada", {"city": "Oslo"})
        index = await users.index("by_length", key=lambda user: len(user["city"]), codec=int)
        with pytest.raises(KeyError):
            await users.put("bob", {})
        with pytest.raises(KeyError):
            await users.put_if_absent("bob", {})
        async with db.transaction() as txn:
            (await users.within(txn)).put("bob", {})
            with pytest.raises(KeyError):
                await txn.commit()
        assert await listed(index.keys()) == [(4, "ada")]
        db.store.engine.tables.indexes._declared.clear()
        with pytest.raises(IndexNotDeclaredError):
            await users.put("bob", {"city": "Rom"})
        with pytest.raises(IndexNotDeclaredError):
            await users.setdefault("bob", {"city": "Rom"})
        await users.delete("ada")
        # Of a large batch, in a worker.
        await users.index("by_length", key=lambda user: len(user["city"]), codec=int)
        await users.update({f"{n}": {"city": "x" * n} for n in range(2500)})
        assert await index.count(1000) == 1500

    with_store(main)


def test_tasks_wait_for_an_index_that_is_built(tmp_path: Any) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "kv", durability="os") as db:
            users = db.table("users", str, codecs.json())
            await users.update({f"{n}": {"city": "x"} for n in range(1000)})
            go_on = threading.Event()
            index = await users.index("by_city", key=lambda user: (go_on.wait(10), user["city"])[1], codec=str)
            with pytest.raises(IndexNotReadyError):
                await index.count()
            assert not await index.wait(0.01)
            go_on.set()
            assert await index.wait(10)
            assert await index.count() == 1000

    run(main())


def test_declaring_an_index_ends_even_where_its_task_is_cancelled() -> None:
    async def main(db: AsyncStore) -> None:
        users = db.table("users", str, codecs.json())
        await users.put("ada", {"city": "Oslo"})

        async def cancelled(task: asyncio.Task[Any]) -> BaseException:
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as found:
                await task
            return found.value

        await cancelled(asyncio.create_task(users.index("by_city", key=city_of, codec=str)))
        assert [each.name for each in (await db.tables())[0].indexes] == ["by_city"]
        error = await cancelled(asyncio.create_task(users.drop_index("by_city")))
        assert committed_seqno(error) == db.store.last_seqno
        assert (await db.tables())[0].indexes == ()

    with_store(main)
