"""What is said with a commit, for tasks: the same as for threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import holds, opened, run

import kvwal
import kvwal.aio
from kvwal import ClosedError, CorruptionError, FeedGap, ReadOnlyError
from kvwal.aio import AsyncStore
from kvwal.files.names import segment_name

TELLER = {"by": "teller"}


async def put_in_transaction(txn: Any) -> None:
    txn.put(b"k", b"run")


async def commit(db: AsyncStore, way: str, meta: dict[str, str] | None) -> None:
    match way:
        case "put":
            await db.put(b"k", b"1", meta=meta)
        case "delete":
            await db.delete(b"k", meta=meta)
        case "delete_range":
            await db.delete_range(b"a", b"b", meta=meta)
        case "commit":
            batch = kvwal.WriteBatch()
            batch.put(b"k", b"2")
            await db.commit(batch, meta=meta)
        case "large":
            batch = kvwal.WriteBatch()
            batch.update({b"%d" % n: b"" for n in range(3000)})
            await db.commit(batch, meta=meta)
        case "batch":
            async with db.batch(meta=meta) as batch:
                batch.put(b"k", b"3")
        case "update":
            await db.update({b"k": b"4"}, meta=meta)
        case "transaction":
            async with db.transaction(meta=meta) as txn:
                txn.put(b"k", b"5")
        case "later":
            async with db.transaction(meta={"replaced": "later"}) as txn:
                txn.put(b"k", b"6")
                txn.meta = meta  # type: ignore[assignment]  # the setter takes more
                assert txn.meta == (meta or {})
        case "run":
            await db.run(put_in_transaction, meta=meta)
        case "add":
            await db.add(b"count", 1, meta=meta)
        case "put_if_absent":
            assert await db.put_if_absent(b"new", b"1", meta=meta)
        case "compare_and_set":
            assert await db.compare_and_set(b"absent", None, b"1", meta=meta)


WAYS = ["put", "delete", "delete_range", "commit", "large", "batch", "update", "transaction", "later", "run"]
OPERATIONS = ["add", "put_if_absent", "compare_and_set"]


@pytest.mark.parametrize("way", WAYS + OPERATIONS)
def test_every_way_to_commit_says_it(way: str) -> None:
    async def main() -> None:
        async with opened() as db:
            with pytest.raises(ValueError, match="limit"):
                await commit(db, way, {"by": "x" * 4096})
            assert db.last_seqno == 0
            await commit(db, way, TELLER)
            [found] = [found async for found in db.commits()]
            assert (found.seqno, found.meta, found.changes) == (1, TELLER, 3000 if way == "large" else 1)

    run(main())


@pytest.mark.parametrize("way", WAYS)
def test_without_anything_to_say_the_record_is_plain(way: str) -> None:
    async def main() -> None:
        async with opened() as db:
            await commit(db, way, None)
            assert [record.kind for record in db.store.history()] == [1]

    run(main())


def test_a_transaction_that_is_over_says_nothing() -> None:
    async def main() -> None:
        async with opened() as db:
            txn = db.transaction()
            txn.abort()
            with pytest.raises(ClosedError):
                txn.meta = TELLER
            async with db.transaction(read_only=True) as txn:
                with pytest.raises(ReadOnlyError):
                    txn.meta = TELLER

    run(main())


def test_a_long_list_comes_whole_and_lets_go_of_the_log() -> None:
    async def main() -> None:
        async with opened(durability="os") as db:
            for number in range(1300):
                await db.put(b"k", b"", meta={"even": "no" if number % 2 else "yes"})
            await db.sync()
            assert [found.seqno async for found in db.commits()] == list(range(1, 1301))
            assert [found.seqno async for found in db.commits(1000, until=1200, meta={"even": "yes"})] == list(
                range(1001, 1201, 2)
            )
            assert holds(db) == []
            listing = db.commits()
            await anext(listing)
            assert [hold.name for hold in holds(db)] == ["commits"]
            with pytest.raises(FeedGap):
                db.commits(1301)
            await listing.aclose()
            assert holds(db) == []
        with pytest.raises(ClosedError):
            db.commits()

    run(main())


def test_what_came_before_damage_is_listed_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "db", background=False) as db:
            for _ in range(5):
                await db.put(b"k", bytes(100), meta=TELLER)
            log = tmp_path / "db" / segment_name(1)
            data = bytearray(log.read_bytes())
            data[data.rindex(b"teller")] ^= 1
            log.write_bytes(data)
            found = []
            with pytest.raises(CorruptionError):
                async for one in db.commits():
                    found.append(one.seqno)
            assert found == [1, 2, 3, 4]

    run(main())


def test_a_batch_over_several_tables_is_committed_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            batch = kvwal.WriteBatch()
            batch.put(b"a", b"1")
            batch.table(16).put(b"b", b"2")
            await db.commit(batch)
            async with db.batch() as other:
                other.table(17).delete_range(b"c")
            told = [(change.table, change.kind, change.key) async for change in db.changes(0)]
            assert told == [(0, "put", b"a"), (16, "put", b"b"), (17, "delete_range", b"c")]

    run(main())


@pytest.mark.parametrize("table", [1, 15, 1 << 31, (1 << 32) - 1])
def test_no_task_writes_to_a_table_of_the_stores_own(tmp_path: Path, table: int) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            batch = kvwal.WriteBatch()
            batch.table(table).put(b"a", b"1")
            with pytest.raises(ValueError, match="the store's own"):
                await db.commit(batch)
            with pytest.raises(ValueError, match="the store's own"):
                async with db.batch() as other:
                    other.table(table).delete_range()
            async with db.transaction() as txn:
                with pytest.raises(ValueError, match="the store's own"):
                    await txn.part(table).touch(b"a", expire_s=1)
            assert db.last_seqno == 0

    run(main())
