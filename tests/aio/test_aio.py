"""The store for asyncio: every method, reads, transactions, one flush for many tasks."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import SLOW_S, gated, ready, run
from store_fixtures import readers_in

import kvwal
import kvwal.aio
from kvwal.aio import AsyncStore, AsyncTransaction
from kvwal.codecs.codec import ValueFunctions

# -- every method -----------------------------------------------------------------------------


def test_the_methods_do_what_those_of_the_store_do(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            assert await db.put(b"a", b"1") == 1
            assert await db.put(bytearray(b"b"), memoryview(b"2"), durability="os") == 2
            assert await db.get(b"a") == b"1"
            assert await db.get(bytearray(b"a")) == b"1"
            assert await db.get(b"none") is None
            assert await db.get(b"none", 7) == 7
            assert await db.contains(b"b")
            assert not await db.contains(b"c")
            assert await db.get_many([b"a", b"c", bytearray(b"b")]) == [b"1", None, b"2"]
            assert await db.delete(b"a") == 3
            await db.update({b"k%d" % number: b"v%d" % number for number in range(5)})
            await db.update([(b"x", b"y")])
            assert await db.count() == 7
            assert await db.first() == (b"b", b"2")
            assert await db.last() == (b"x", b"y")
            assert await db.last(prefix=b"k") == (b"k4", b"v4")
            assert await db.first(b"y") is None
            assert [pair async for pair in db.scan(b"k1", b"k4", reverse=True, limit=2)] == [
                (b"k3", b"v3"),
                (b"k2", b"v2"),
            ]
            assert [pair async for pair in db.items(prefix=b"k")] == [(b"k%d" % n, b"v%d" % n) for n in range(5)]
            assert [key async for key in db.keys(stop=b"k2")] == [b"b", b"k0", b"k1"]
            assert [value async for value in db.values(limit=2)] == [b"2", b"v0"]
            assert [key async for key in db][-1] == b"x"
            assert [key async for key in db.keys(b"z", b"a")] == []
            assert [key async for key in db.keys(limit=0)] == []
            assert await db.delete_range(b"k1", b"k4") == 6
            assert [key async for key in db] == [b"b", b"k0", b"k4", b"x"]
            assert await db.setdefault(b"b", b"other") == b"2"
            assert await db.setdefault(b"b") == b"2", "the default is not looked at"
            with pytest.raises(TypeError):
                await db.setdefault(b"new")
            assert await db.setdefault(b"new", b"other") == b"other"
            assert await db.pop(b"new") == b"other"
            assert await db.pop(b"new", None) is None
            with pytest.raises(KeyError):
                await db.pop(b"new")
            with pytest.raises(TypeError):
                await db.pop(b"new", 1, 2)
            batch = kvwal.WriteBatch()
            assert await db.commit(batch) == db.last_seqno
            async with db.batch(durability="os") as batch:
                batch[b"in"] = b"batch"
                batch.delete(b"x")
            assert await db.get(b"in") == b"batch"
            await db.sync()
            assert db.durable_seqno == db.last_seqno
            await db.checkpoint()
            assert (await db.stats()).checkpoint_seqno == db.last_seqno
            await db.update([(b"large%04d" % number, b"x" * 500) for number in range(2000)])
            await db.checkpoint()
            await db.delete_range(b"large", b"largf")
            before = (await db.stats()).data_bytes
            freed = await db.compact()
            assert freed == before - (await db.stats()).data_bytes > 500_000
            assert (await db.verify()).ok
            assert readers_in(await db.pins()) == []
            assert db.recovery.bytes_replayed == 0
            assert db.path == str(tmp_path / "s")
            assert not db.read_only
            assert not db.closed
            assert "open" in repr(db)
            await db.clear()
            assert await db.count() == 0
        assert db.closed
        assert "closed" in repr(db)

    run(main())
    with kvwal.open(tmp_path / "s") as db:
        assert len(db) == 0


def test_open_takes_what_the_store_takes_with_the_same_defaults() -> None:
    theirs = inspect.signature(kvwal.open).parameters
    ours = dict(inspect.signature(kvwal.aio.open).parameters)
    del ours["max_pending_commits"], ours["max_pending_bytes"]
    assert list(ours.values()) == list(theirs.values())
    assert theirs["durability"].default == "commit"


def test_every_method_of_the_store_has_its_counterpart() -> None:
    theirs = {name for name in dir(kvwal.Store) if not name.startswith("_")}
    # Elsewhere: `count` for len, `contains` for in. A feed of the log reads files record by record.
    elsewhere = {"popitem", "history", "changes", "backup", "copy"}
    assert theirs - set(dir(AsyncStore)) <= elsewhere


def test_errors_are_those_of_the_store(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(kvwal.StoreNotFoundError):
            await kvwal.aio.open(tmp_path / "none", "w")
        with pytest.raises(ValueError, match="max_pending_commits"):
            await kvwal.aio.open(tmp_path / "s", max_pending_commits=0)
        with pytest.raises(TypeError, match="max_pending_bytes"):
            await kvwal.aio.open(tmp_path / "s", max_pending_bytes=1.5)  # type: ignore[arg-type]
        db = await kvwal.aio.open(tmp_path / "s")
        with pytest.raises(kvwal.LockedError):
            await kvwal.aio.open(tmp_path / "s")
        with pytest.raises(TypeError, match="not str"):
            await db.put("a", b"")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="not str"):
            await db.get("a")  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="65535"):
            await db.put(b"k" * 65_536, b"")
        with pytest.raises(ValueError, match="durability"):
            await db.put(b"a", b"", durability="never")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="attempts"):
            await db.run(lambda txn: txn.get(b""), attempts=0)
        snapshot, txn = db.snapshot(), db.transaction()
        await db.close()
        await db.close()
        for use in (db.get(b"a"), db.get_many([b"a"]), db.put(b"a", b""), db.delete(b"a"), db.sync(), db.count()):
            with pytest.raises(kvwal.ClosedError):
                await use
        for call in (db.scan, db.snapshot, db.transaction):
            with pytest.raises(kvwal.ClosedError):
                call()
        for read in (snapshot.get(b"a"), txn.get(b"a")):
            with pytest.raises(kvwal.ClosedError):
                await read
        async with kvwal.aio.open(tmp_path / "s", "r") as db:
            assert db.read_only
            await db.sync()
            with pytest.raises(kvwal.ReadOnlyError):
                await db.put(b"a", b"")
            with pytest.raises(kvwal.ReadOnlyError):
                await db.checkpoint()

    run(main())


# -- reads ------------------------------------------------------------------------------------


def test_reads_of_memory_do_not_leave_the_loop_and_cold_ones_do(tmp_path: Path) -> None:
    """A coroutine that never waits ends at its first step."""

    def ends_at_once(read: Coroutine[Any, Any, Any]) -> Any:
        try:
            read.send(None)
        except StopIteration as end:
            return end.value
        read.close()
        return "waits"

    large = b"x" * 300_000

    async def fill() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"v" * 100 for number in range(5000)})
            await db.update({b"large" + key: large for key in (b"000500", b"001500", b"002500")})
            await db.checkpoint()

    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s", cache_bytes=1 << 20) as db:
            async with db.snapshot() as snapshot, db.transaction() as txn:
                for reader, key in ((txn, b"000500"), (snapshot, b"001500"), (db, b"002500")):
                    assert ends_at_once(reader.get(key)) == "waits"
                    assert ends_at_once(reader.get(b"large" + key)) == "waits"
                    assert await reader.get(b"large" + key) == large
            await db.put(b"000100", b"new")
            async with db.snapshot() as snapshot, db.transaction() as txn:
                for reader, cold in ((db, b"003000"), (snapshot, b"003500"), (txn, b"004000")):
                    assert ends_at_once(reader.get(b"000100")) == b"new"
                    assert ends_at_once(reader.get_many([b"000100"])) == [b"new"]
                    assert ends_at_once(reader.get_many([b"000100", cold])) == "waits"
                    assert await reader.get_many([cold, b"000100", b"4"]) == [b"v" * 100, b"new", None]
                # Its leaf is in the page cache now, though the key is in no row.
                assert ends_at_once(db.get(b"004000x")) is None
                assert ends_at_once(snapshot.get(b"004000y")) is None
                assert ends_at_once(txn.get(b"004000z")) is None

    run(fill())
    run(main())


def test_many_cold_reads_at_once_are_all_answered(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s", cache_bytes=256 << 10) as db:
            await db.update({b"%06d" % number: b"%d" % number for number in range(20_000)})
            await db.checkpoint()
        async with kvwal.aio.open(tmp_path / "s", cache_bytes=256 << 10) as db:
            wanted = range(0, 20_000, 7)
            found = await asyncio.gather(*(db.get(b"%06d" % number) for number in wanted))
            assert found == [b"%d" % number for number in wanted]
            assert readers_in(await db.pins()) == []

    run(main())


def test_a_scan_sees_the_moment_of_the_call_and_writes_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"old" for number in range(3000)})
            await db.checkpoint()
            await db.update({b"%06d" % number: b"old" for number in range(3000, 5000)})
            scan = db.scan()
            await db.put(b"000001", b"new")
            await db.delete(b"004999")
            seen = 0
            async for key, value in scan:
                assert (key, value) == (b"%06d" % seen, b"old")
                if seen % 500 == 0:
                    await db.put(key + b"x", b"later")
                seen += 1
            assert seen == 5000
            assert await anext(scan, None) is None

    run(main())


@pytest.mark.parametrize("limit", [None, 500])
def test_a_scan_is_over_after_a_value_that_cannot_be_decoded(tmp_path: Path, limit: int | None) -> None:
    def decode(value: bytes) -> int:
        if value == b"100":
            raise kvwal.CodecError("mine", value, "this one is bad")
        return int(value)

    codec = ValueFunctions("mine", lambda value: b"%d" % value, decode)

    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            table = db.table("t", int, codec)
            await table.update({number: number for number in range(3_000)})
            scan = table.scan(limit=limit)
            for number in range(100):
                assert await anext(scan) == (number, number)
            with pytest.raises(kvwal.CodecError):
                await anext(scan)
            assert [pair async for pair in scan] == [], "none is left out in the middle"
            assert readers_in(await db.pins()) == []

    run(main())


def test_a_scan_that_is_closed_beside_a_waiting_step_is_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%05d" % number: b"" for number in range(500)})
            scan = db.scan()
            step = asyncio.ensure_future(anext(scan, None))
            await asyncio.sleep(0)
            assert not step.done()
            await scan.aclose()
            assert await step is None
            assert [pair async for pair in scan] == []
            assert readers_in(await db.pins()) == []

    run(main())


@pytest.mark.parametrize("end", ["drop", "aclose", "cancel", "exhaust", "limit"])
def test_an_iterator_that_ends_gives_its_pin_back(tmp_path: Path, end: str) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"" for number in range(10_000)})
            await db.checkpoint()
            scan = db.scan(limit=5000 if end == "limit" else None)
            await anext(scan)
            assert len(readers_in(await db.pins())) == 1
            if end == "aclose":
                await scan.aclose()
                assert await anext(scan, None) is None
            elif end in ("exhaust", "limit"):
                assert len([pair async for pair in scan]) == (9999 if end == "exhaust" else 4999)
            elif end == "cancel":

                async def walk(scan: Any) -> None:
                    async for _ in scan:
                        await asyncio.sleep(0)

                task = asyncio.ensure_future(walk(scan))
                await ready()
                task.cancel()
                await asyncio.wait([task])
                del task, walk
            if end in ("drop", "cancel"):
                del scan
            gc.collect()
            assert readers_in(await db.pins()) == []

    run(main())


def test_a_cancelled_step_of_a_scan_loses_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"" for number in range(1000)})
            for turns in range(8):
                scan = db.keys()
                step = asyncio.ensure_future(anext(scan))
                await asyncio.sleep(0)
                # The worker gets done, its answer is on the way, and the cancellation overtakes it somewhere.
                threading.Event().wait(0.01)
                for _ in range(turns):
                    await asyncio.sleep(0)
                step.cancel()
                await asyncio.wait([step])
                seen = [] if step.cancelled() else [step.result()]
                assert seen + [key async for key in scan] == [b"%06d" % number for number in range(1000)]

    run(main())


def test_a_scan_is_for_one_task_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"a", b"")
            scan = db.keys()
            results = await asyncio.gather(anext(scan), anext(scan), return_exceptions=True)
            assert results[0] == b"a"
            assert isinstance(results[1], RuntimeError)

    run(main())


def test_a_snapshot_stays_as_it_was(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"a": b"1", b"b": b"2"})
            async with db.snapshot() as snapshot:
                await db.put(b"a", b"new")
                await db.delete(b"b")
                await db.checkpoint()
                assert snapshot.seqno == 1
                assert await snapshot.get(b"a") == b"1"
                assert await snapshot.get_many([b"a", b"b", b"c"]) == [b"1", b"2", None]
                assert [pair async for pair in snapshot.scan()] == [(b"a", b"1"), (b"b", b"2")]
                assert await snapshot.last() == (b"b", b"2")
                assert await snapshot.count() == 2
                assert await snapshot.contains(b"b")
                assert [pin.purpose for pin in readers_in(await db.pins())] == ["snapshot"]
                assert "AsyncSnapshot at seqno 1" in repr(snapshot)
            await snapshot.close()
            with pytest.raises(kvwal.ClosedError):
                await snapshot.get(b"a")
            assert readers_in(await db.pins()) == []

    run(main())


# -- transactions -----------------------------------------------------------------------------


def test_a_transaction_commits_on_clean_exit_and_aborts_on_an_exception(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            async with db.transaction() as txn:
                assert await txn.get(b"a") is None
                txn.put(b"a", b"1")
                assert await txn.get(b"a") == b"1"
                assert await txn.get_many([b"a", b"b"]) == [b"1", None]
                assert [key async for key in txn] == [b"a"]
                assert await txn.count() == 1
                assert await db.get(b"a") is None
                assert txn.is_open
            assert txn.commit_seqno == 1
            assert await db.get(b"a") == b"1"
            with pytest.raises(ZeroDivisionError):
                async with db.transaction() as txn:
                    txn.put(b"a", b"2")
                    txn.delete_range()
                    raise ZeroDivisionError
            assert await db.get(b"a") == b"1"
            for use in (lambda: txn.put(b"a", b""), txn.clear, lambda: txn.delete(b"a"), txn.scan):
                with pytest.raises(kvwal.ClosedError):
                    use()
            for again in (txn.commit(), txn.get(b"a"), txn.get_many([b"a"]), txn.count()):
                with pytest.raises(kvwal.ClosedError):
                    await again
            async with db.transaction() as txn:
                txn.put(b"a", b"3")
                txn.abort()
                txn.abort()
            assert "over" in repr(txn)
            async with db.transaction(read_only=True) as txn:
                assert await txn.get(b"a") == b"1"
                with pytest.raises(kvwal.ReadOnlyError):
                    txn.put(b"a", b"4")
            assert txn.commit_seqno is None
            async with db.transaction() as txn:
                txn.put(b"b", b"5")
                txn.delete(b"a")
                assert await txn.commit() == 2
            assert db.last_seqno == 2
            assert readers_in(await db.pins()) == []

    run(main())


def test_a_cancelled_block_aborts_its_transaction(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:

            async def wait_inside() -> None:
                async with db.transaction() as txn:
                    txn.put(b"a", b"1")
                    await asyncio.sleep(SLOW_S)

            task = asyncio.ensure_future(wait_inside())
            await ready()
            task.cancel()
            await asyncio.wait([task])
            assert readers_in(await db.pins()) == []
            assert db.last_seqno == 0

    run(main())


def test_of_two_that_read_and_write_the_same_one_conflicts(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"n", b"0")
            await db.checkpoint()
            one, two = db.transaction(), db.transaction()
            for txn in (one, two):
                txn.put(b"n", await txn.get(b"n", b"") + b"1")
            results = await asyncio.gather(one.commit(), two.commit(), return_exceptions=True)
            assert results[0] == 2
            assert isinstance(results[1], kvwal.ConflictError)
            assert results[1].key == b"n"
            assert readers_in(await db.pins()) == []

    run(main())


def test_phantoms_conflict(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            txn = db.transaction()
            txn.put(b"count", b"%d" % len([key async for key in txn.keys(prefix=b"x")]))
            await db.put(b"x1", b"")
            with pytest.raises(kvwal.ConflictError):
                await txn.commit()

    run(main())


def test_conflicts_inside_of_one_group_are_found_and_named(tmp_path: Path) -> None:
    """Reads of keys and ranges against the writes, deletes and ranges of members before them, which commit together."""

    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            await db.update({b"%d" % number: b"" for number in range(10)})
            gate.close()
            first = asyncio.ensure_future(db.put(b"first", b""))
            await gate.reached()
            txns = [db.transaction() for _ in range(6)]
            await txns[0].get(b"1")
            await txns[1].get(b"2")
            assert [key async for key in txns[2].keys(prefix=b"3")] == [b"3"]
            await txns[3].get(b"5")
            await txns[4].get(b"9")
            for number, txn in enumerate(txns):
                txn.put(b"by", b"%d" % number)
            commits = [
                db.put(b"1", b"new"),
                txns[0].commit(),
                db.delete(b"2"),
                txns[1].commit(),
                db.put(b"3x", b""),
                txns[2].commit(),
                db.delete_range(b"4", b"6"),
                txns[3].commit(),
                txns[4].commit(),
                txns[5].commit(),
            ]
            results = asyncio.gather(*commits, return_exceptions=True)
            await ready()
            before = gate.syncs
            gate.open()
            found = [(r.key, r.seqno) if isinstance(r, kvwal.ConflictError) else r for r in await results]
            assert gate.syncs == before + 1
            assert found == [3, (b"1", 3), 4, (b"2", 4), 5, (None, 5), 6, (b"5", 6), 7, 8]
            assert await first == 2

    run(main())


def test_run_and_transactional_retry_until_every_increment_counts(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"n", b"0")
            await db.checkpoint()

            async def increment(txn: AsyncTransaction) -> int:
                number = int(await txn.get(b"n") or b"0") + 1
                await asyncio.sleep(0)
                txn.put(b"n", b"%d" % number)
                return number

            @db.transactional
            async def add(txn: AsyncTransaction, key: bytes, *, by: int) -> None:
                """Add."""
                txn.put(key, b"%d" % (int(await txn.get(key, b"0")) + by))

            assert add.__doc__ == "Add."
            numbers = await asyncio.gather(*(db.run(increment) for _ in range(30)))
            assert sorted(numbers) == list(range(1, 31))
            await asyncio.gather(*(add(b"n", by=10) for _ in range(10)))
            assert await db.get(b"n") == b"130"
            with pytest.raises(kvwal.ConflictError):
                await db.run(lambda txn: overtaken(db, txn), attempts=3)

    async def overtaken(db: AsyncStore, txn: AsyncTransaction) -> None:
        await txn.get(b"n")
        txn.put(b"m", b"")
        await db.put(b"n", b"0")

    run(main())


def test_run_and_transactional_name_a_function_that_cannot_be_awaited(tmp_path: Path) -> None:
    def plain(txn: AsyncTransaction) -> Any:
        txn.put(b"a", b"")

    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            for call in (lambda: db.run(plain), db.transactional(plain)):
                with pytest.raises(TypeError, match="plain gave NoneType"):
                    await call()
            assert db.last_seqno == 0

    run(main())


def test_reads_through_one_transaction_may_be_gathered(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"%d" % number for number in range(5000)})
            await db.checkpoint()
        async with kvwal.aio.open(tmp_path / "s") as db, db.transaction() as txn:
            found = await asyncio.gather(*(txn.get(b"%06d" % number) for number in range(0, 5000, 50)))
            assert found == [b"%d" % number for number in range(0, 5000, 50)]
            assert [pin.purpose for pin in readers_in(await db.pins())] == ["transaction"], "it still holds its moment"
            reads = asyncio.gather(*(txn.get(b"%06d" % number) for number in range(25, 5000, 50)))
            await asyncio.sleep(0)
            txn.abort()
            assert await reads == [b"%d" % number for number in range(25, 5000, 50)]

    run(main())


# -- one flush for many -----------------------------------------------------------------------


def test_a_thousand_tasks_ride_few_flushes_with_one_thread(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            before, threads = gate.syncs, threading.active_count()
            seqnos = await asyncio.gather(*(db.put(b"%d" % number, b"") for number in range(1000)))
            assert sorted(seqnos) == list(range(1, 1001))
            assert gate.syncs - before <= 3
            assert threading.active_count() <= threads + 1
            assert db.pending_commits == 0

    run(main())


def test_what_comes_during_a_flush_rides_the_next_one(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()
            first = asyncio.ensure_future(db.put(b"first", b""))
            await gate.reached()
            before = gate.syncs
            later = [asyncio.ensure_future(db.put(b"%d" % number, b"")) for number in range(100)]
            await ready()
            assert not first.done()
            assert await db.get(b"first") is None  # durable before visible
            gate.open()
            await asyncio.gather(first, *later)
            assert gate.syncs == before + 1

    run(main())


def test_a_group_larger_than_the_pipeline_takes_at_once_is_committed_whole(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s", max_pending_bytes=1 << 30) as db:
            await asyncio.gather(*(db.put(b"%d" % number, bytes(6 << 20)) for number in range(9)))
            assert await db.count() == 9

    run(main())


def test_a_batch_is_committed_as_it_was_at_the_call(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            for count in (1, 3000):
                batch = kvwal.WriteBatch()
                batch.update([(b"%d" % number, b"old") for number in range(count)])
                task = asyncio.ensure_future(db.commit(batch))
                await asyncio.sleep(0)
                batch.update([(b"%d" % number, b"new") for number in range(count)])
                await task
                assert await db.get(b"0") == b"old"

    run(main())
    with kvwal.open(tmp_path / "s") as db:
        assert db[b"0"] == b"old"


def test_a_batch_whose_block_raised_is_not_written(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            with pytest.raises(ZeroDivisionError):
                async with db.batch() as batch:
                    batch.put(b"a", b"")
                    raise ZeroDivisionError
            assert db.last_seqno == 0

    run(main())


# -- the document -----------------------------------------------------------------------------


def test_the_code_in_the_document_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "asyncio.md").read_text()
    source = "\n".join(part.split("```")[0] for part in text.split("```python\n")[1:])
    assert source.count("assert") >= 5
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
