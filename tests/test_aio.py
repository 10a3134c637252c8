"""The store for asyncio: every method, one flush for many tasks, cancellation anywhere, back-pressure, clean ends."""

from __future__ import annotations

import asyncio
import errno
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

import kvwal
import kvwal.aio
from kvwal.aio import AsyncStore, AsyncTransaction, committed_seqno
from kvwal.files import system_files

SLOW_S = 30


class Gate:
    """Counts data flushes, and can hold them up, or make them fail."""

    def __init__(self) -> None:
        self.syncs = 0
        self.failure: OSError | None = None
        #: Name of the only file that is meant; None for all.
        self.only: str | None = None
        self._open = threading.Event()
        self._open.set()
        self._reached = threading.Event()

    def close(self) -> None:
        """From here on, a flush waits."""
        self._reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def reached(self) -> None:
        """A flush waits at the closed gate."""
        assert await asyncio.to_thread(self._reached.wait, SLOW_S)

    def pass_through(self, path: str) -> None:
        if self.only is not None and not path.endswith(self.only):
            return
        self.syncs += 1
        self._reached.set()
        assert self._open.wait(SLOW_S)
        if self.failure is not None:
            raise self.failure


class GatedFile:
    def __init__(self, file: Any, path: str, gate: Gate) -> None:
        self._file = file
        self._path = path
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def datasync(self) -> None:
        self._gate.pass_through(self._path)
        self._file.datasync()


class GatedFiles:
    """The system's files with a gate before each data flush."""

    def __init__(self) -> None:
        self._files = system_files()
        self.gate = Gate()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def open(self, path: str, **options: Any) -> GatedFile:
        return GatedFile(self._files.open(path, **options), path, self.gate)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    """asyncio.run in debug mode, which finds calls from the wrong thread and the like."""

    async def bounded() -> Any:
        # How long a step takes is of no interest here.
        asyncio.get_running_loop().slow_callback_duration = SLOW_S
        async with asyncio.timeout(SLOW_S):
            return await main

    return asyncio.run(bounded(), debug=True)


def gated(path: Path, **options: Any) -> tuple[Any, Gate]:
    files: Any = GatedFiles()
    return kvwal.aio.open(path / "s", files=files, background=False, **options), files.gate


async def ready() -> None:
    """Every task that can run has run."""
    for _ in range(5):
        await asyncio.sleep(0)


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
            assert await db.compact() >= 0
            assert (await db.verify()).ok
            assert await db.pins() == []
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


def test_every_method_of_the_store_has_its_counterpart() -> None:
    theirs = {name for name in dir(kvwal.Store) if not name.startswith("_")}
    # Elsewhere: `count` for len, `contains` for in. A feed of the log reads files record by record.
    assert theirs - set(dir(AsyncStore)) <= {"popitem", "history", "changes", "backup", "copy"}


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
            assert await db.pins() == []

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


@pytest.mark.parametrize("end", ["drop", "aclose", "cancel", "exhaust"])
def test_an_iterator_that_ends_gives_its_pin_back(tmp_path: Path, end: str) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"" for number in range(10_000)})
            await db.checkpoint()
            scan = db.scan()
            await anext(scan)
            assert len(await db.pins()) == 1
            if end == "aclose":
                await scan.aclose()
                assert await anext(scan, None) is None
            elif end == "exhaust":
                assert len([pair async for pair in scan]) == 9999
            elif end == "cancel":

                async def walk(scan: Any) -> None:
                    async for _ in scan:
                        await asyncio.sleep(0)

                task = asyncio.ensure_future(walk(scan))
                await ready()
                task.cancel()
                await asyncio.wait([task])
                del task, walk
            del scan
            gc.collect()
            assert await db.pins() == []

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
                assert [pin.purpose for pin in await db.pins()] == ["snapshot"]
                assert "AsyncSnapshot at seqno 1" in repr(snapshot)
            await snapshot.close()
            with pytest.raises(kvwal.ClosedError):
                await snapshot.get(b"a")
            assert await db.pins() == []

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
            assert await db.pins() == []

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
            assert await db.pins() == []
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
            assert await db.pins() == []

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


def test_reads_through_one_transaction_may_be_gathered(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.update({b"%06d" % number: b"%d" % number for number in range(5000)})
            await db.checkpoint()
        async with kvwal.aio.open(tmp_path / "s") as db, db.transaction() as txn:
            found = await asyncio.gather(*(txn.get(b"%06d" % number) for number in range(0, 5000, 50)))
            assert found == [b"%d" % number for number in range(0, 5000, 50)]
            assert [pin.purpose for pin in await db.pins()] == ["transaction"], "it still holds its moment"
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


# -- cancellation -----------------------------------------------------------------------------


def test_a_commit_that_was_not_begun_is_withdrawn(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()
            first = asyncio.ensure_future(db.put(b"first", b""))
            await gate.reached()
            tasks = [asyncio.ensure_future(db.put(b"%d" % number, b"")) for number in range(10)]
            await ready()
            for task in tasks[::2]:
                task.cancel()
            await ready()
            assert all(task.done() for task in tasks[::2]), "withdrawn at once, while the flush goes on"
            tasks[1].cancel()
            gate.open()  # without a step in between: withdrawn at the hand-over
            await asyncio.wait([first, *tasks])
            for task in (*tasks[::2], tasks[1]):
                with pytest.raises(asyncio.CancelledError) as caught:
                    task.result()
                assert committed_seqno(caught.value) is None
            assert db.last_seqno == 5
            assert [key async for key in db] == [b"3", b"5", b"7", b"9", b"first"]
            assert db.pending_commits == 0

    run(main())


def test_a_commit_that_was_begun_is_awaited_and_reported(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()
            task = asyncio.ensure_future(db.put(b"a", b"1"))
            await gate.reached()
            for _ in range(3):
                task.cancel()
                await ready()
                assert not task.done(), "its outcome is not known yet"
            gate.open()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert committed_seqno(caught.value) == 1
            assert "commit 1 was written" in str(caught.value.__notes__)
            assert await db.get(b"a") == b"1"
            assert db.pending_commits == 0

    run(main())


@pytest.mark.parametrize("how", ["timeout", "wait_for"])
def test_a_timeout_says_whether_the_commit_was_written(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()

            async def impatient() -> None:
                if how == "timeout":
                    async with asyncio.timeout(0.05):
                        await db.put(b"a", b"1")
                else:
                    await asyncio.wait_for(db.put(b"a", b"1"), 0.05)

            task = asyncio.ensure_future(impatient())
            await gate.reached()
            await asyncio.sleep(0.1)
            gate.open()
            with pytest.raises(TimeoutError) as caught:
                await task
            assert committed_seqno(caught.value) == 1
            assert committed_seqno(TimeoutError()) is None

    run(main())


def test_a_commit_that_was_begun_and_failed_is_reported_as_not_written(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()
            task = asyncio.ensure_future(db.put(b"a", b"1"))
            await gate.reached()
            task.cancel()
            gate.failure = OSError(errno.EIO, "the disk is gone")
            gate.open()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert committed_seqno(caught.value) is None
            assert "failed" in str(caught.value.__notes__)
            for use in (db.put(b"b", b""), db.delete_range(), db.sync()):
                with pytest.raises(kvwal.PoisonedError):
                    await use
            assert await db.get(b"a") is None
            gate.failure = None

    run(main())


def test_a_transaction_cancelled_in_its_commit_knows_how_it_ended(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()
            txns = [db.transaction() for _ in range(2)]

            async def put(txn: AsyncTransaction, key: bytes) -> None:
                async with txn:
                    txn.put(key, b"")

            begun = asyncio.ensure_future(put(txns[0], b"begun"))
            await gate.reached()
            waiting = asyncio.ensure_future(put(txns[1], b"waiting"))
            await ready()
            assert not txns[0].is_open
            begun.cancel()
            waiting.cancel()
            await ready()
            gate.open()
            await asyncio.wait([begun, waiting])
            assert begun.cancelled()
            assert waiting.cancelled()
            assert [txn.commit_seqno for txn in txns] == [1, None]
            assert await db.pins() == []
            assert db.last_seqno == 1

    run(main())


def test_cancelled_at_any_step_a_commit_is_written_or_not_as_it_says(tmp_path: Path) -> None:
    """The task is cancelled after each number of turns of the loop, in every phase of its commit."""

    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            for turns in range(60):
                key = b"%d" % turns
                others = [asyncio.ensure_future(db.put(b"other", key)) for _ in range(turns % 3)]
                task = asyncio.ensure_future(db.run(lambda txn, key=key: write(txn, key)))
                for _ in range(turns // 3):
                    await asyncio.sleep(0)
                if turns % 7 == 6:
                    await asyncio.sleep(0.001)
                task.cancel()
                await asyncio.wait([task, *others])
                if task.cancelled():
                    try:
                        task.result()
                    except asyncio.CancelledError as error:
                        written = committed_seqno(error) is not None
                else:
                    written = True
                assert (await db.get(key) is not None) == written
            assert db.pending_commits == 0
            assert await db.pins() == []

    async def write(txn: AsyncTransaction, key: bytes) -> None:
        await txn.get(key)
        txn.put(key, b"")

    run(main())


def test_cancelling_while_opening_closes_again(tmp_path: Path) -> None:
    async def main() -> None:
        for turns in range(4):
            task = asyncio.ensure_future(kvwal.aio.open(tmp_path / "s")._opened())
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with kvwal.aio.open(tmp_path / "s"):
                pass

    run(main())


def test_cancelling_while_closing_closes_all_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        db = await opening
        gate.close()
        put = asyncio.ensure_future(db.put(b"a", b""))
        await gate.reached()
        close = asyncio.ensure_future(db.close())
        await ready()
        with pytest.raises(kvwal.ClosedError):
            await db.put(b"b", b"")
        close.cancel()
        await ready()
        assert not close.done()
        gate.open()
        assert await put == 1
        with pytest.raises(asyncio.CancelledError):
            await close
        assert db.store.closed
        kvwal.open(tmp_path / "s").close()

    run(main())


# -- back-pressure ----------------------------------------------------------------------------


def test_no_more_commits_are_pending_than_allowed(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path, max_pending_commits=10)
        async with opening as db:
            gate.close()
            tasks = [asyncio.ensure_future(db.put(b"%03d" % number, b"")) for number in range(100)]
            await gate.reached()
            await ready()
            assert db.pending_commits == 10
            # One that waits for its turn goes at once, one that has its turn makes room for the next.
            tasks[50].cancel()
            await ready()
            assert tasks[50].done()
            assert db.pending_commits == 10
            gate.open()
            seqnos = await asyncio.gather(*tasks[:50], *tasks[51:])
            assert seqnos == sorted(seqnos), "first come, first served"
            assert db.pending_commits == 0

    run(main())


def test_no_more_bytes_are_pending_than_allowed(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path, max_pending_bytes=10_000)
        async with opening as db:
            gate.close()
            tasks = [asyncio.ensure_future(db.put(b"%03d" % number, bytes(997))) for number in range(40)]
            await gate.reached()
            await ready()
            assert db.pending_commits == 10
            large = asyncio.ensure_future(db.put(b"large", bytes(100_000)))
            small = asyncio.ensure_future(db.put(b"small", b""))
            await ready()
            assert db.pending_commits == 10
            gate.open()
            await asyncio.gather(*tasks, large, small)
            assert large.result() == small.result() - 1, "more than the limit goes alone, in its turn"
            assert db.pending_commits == 0

    run(main())


def test_one_that_gives_up_its_turn_lets_in_those_behind_it(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path, max_pending_bytes=10_000)
        async with opening as db:
            gate.close()
            first = asyncio.ensure_future(db.put(b"first", bytes(8_000)))
            await gate.reached()
            large = asyncio.ensure_future(db.put(b"large", bytes(5_000)))
            await ready()
            small = asyncio.ensure_future(db.put(b"small", bytes(100)))
            await ready()
            assert db.pending_commits == 1
            large.cancel()
            await ready()
            assert db.pending_commits == 2
            gate.open()
            await asyncio.gather(first, small)

    run(main())


def test_a_turn_that_comes_to_a_cancelled_task_is_passed_on(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path, max_pending_commits=1)
        async with opening as db:
            for _ in range(20):
                tasks = [asyncio.ensure_future(db.put(b"%d" % number, b"")) for number in range(8)]
                while not tasks[0].done():
                    await asyncio.sleep(0)
                for task in tasks[1:7]:
                    task.cancel()
                    await asyncio.sleep(0)
                async with asyncio.timeout(SLOW_S):
                    await asyncio.wait(tasks)
                assert tasks[7].exception() is None
                assert db.pending_commits == 0
        assert gate.syncs

    run(main())


def test_commits_wait_for_memory_and_can_be_withdrawn_meanwhile(tmp_path: Path) -> None:
    """The memtable is full twice over while a checkpoint cannot get on."""

    async def main() -> None:
        files: Any = GatedFiles()
        async with kvwal.aio.open(tmp_path / "s", files=files, memtable_bytes=64 << 10, durability="os") as db:
            for number in range(100):
                await db.put(b"%d" % number, bytes(10_000))
            assert await db.count() == 100
            present = db.store._present
            gate = files.gate
            gate.only = "data"  # the checkpoint's flush: those of the log are waited for by commits
            gate.close()
            tasks = []
            while not present.is_stalled():
                tasks.append(asyncio.ensure_future(db.put(b"%d" % len(tasks), bytes(10_000))))
                await asyncio.wait(tasks, timeout=0.01)
            present.attention = True
            late = asyncio.ensure_future(db.put(b"late", b""))
            await asyncio.sleep(0.05)
            assert not late.done()
            late.cancel()
            await ready()
            assert late.cancelled()
            gate.open()
            await asyncio.gather(*tasks)
            assert await db.put(b"later", b"") == db.last_seqno
            assert await db.get(b"late") is None

    run(main())


# -- failures ---------------------------------------------------------------------------------


def test_a_failed_flush_fails_the_whole_group_and_poisons(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            await db.put(b"before", b"")
            gate.failure = OSError(errno.EIO, "the disk is gone")
            results = await asyncio.gather(
                *(db.put(b"%d" % number, b"") for number in range(20)), return_exceptions=True
            )
            assert all(isinstance(result, kvwal.PoisonedError) for result in results)
            assert [key async for key in db] == [b"before"]
            gate.failure = None
            with pytest.raises(kvwal.PoisonedError):
                await db.put(b"after", b"")
            assert db.pending_commits == 0

    run(main())


# -- loops, threads, processes ----------------------------------------------------------------


def test_another_loop_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"a", b"1")

            async def elsewhere() -> None:
                for use in (lambda: db.put(b"b", b""), db.sync, db.count, db.checkpoint):
                    with pytest.raises(kvwal.UsageError, match="another event loop"):
                        await use()
                for call in (db.scan, db.snapshot, db.transaction):
                    with pytest.raises(kvwal.UsageError, match="another event loop"):
                        call()
                with pytest.raises(kvwal.UsageError):
                    await db.close()

            await asyncio.to_thread(asyncio.run, elsewhere())
            assert await db.get(b"a") == b"1"
            assert await db.get(b"b") is None

    run(main())


def test_several_loops_and_threads_share_a_store(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as store:

        async def work(name: bytes) -> None:
            async with AsyncStore(store) as db:
                assert db.store is store
                await asyncio.gather(*(db.put(b"%s%d" % (name, number), b"") for number in range(200)))

        def put(name: bytes) -> None:
            for number in range(50):
                store.put(b"%s%d" % (name, number), b"")

        threads = [threading.Thread(target=lambda name=name: asyncio.run(work(name))) for name in (b"a", b"b", b"c")]
        threads += [threading.Thread(target=put, args=(name,)) for name in (b"d", b"e")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(store) == 700
        assert not store.closed


def test_without_a_loop_there_is_no_store_for_it(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as store, pytest.raises(RuntimeError, match="no running event loop"):
        AsyncStore(store)


def test_a_loop_that_is_stopped_and_closed_with_commits_pending_leaves_the_store_usable(tmp_path: Path) -> None:
    files: Any = GatedFiles()
    gate: Gate = files.gate
    with kvwal.open(tmp_path / "s", files=files, background=False) as store:
        loop = asyncio.new_event_loop()

        async def main() -> None:
            db = AsyncStore(store)
            gate.close()
            tasks.append(loop.create_task(db.put(b"begun", b"")))
            await gate.reached()
            tasks.append(loop.create_task(db.put(b"waiting", b"")))
            await asyncio.sleep(0)

        tasks: list[asyncio.Task[Any]] = []
        loop.run_until_complete(main())
        for task in tasks:
            # The test destroys them on purpose.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        gate.open()
        store.put(b"after", b"")
        assert sorted(store) == [b"after", b"begun"]


def test_tasks_that_are_pending_when_the_loop_ends_are_settled(tmp_path: Path) -> None:
    """asyncio.run cancels what is left: no hang, and nothing half-known."""
    outcomes: list[int | None] = []

    async def put(db: AsyncStore, key: bytes) -> None:
        try:
            await db.put(key, b"")
        except asyncio.CancelledError as error:
            outcomes.append(committed_seqno(error))
            raise

    async def main(store: kvwal.Store) -> None:
        db = AsyncStore(store)
        for number in range(50):
            asyncio.ensure_future(put(db, b"%d" % number))  # noqa: RUF006
            if number == 25:
                await asyncio.sleep(0)
                await asyncio.sleep(0)

    with kvwal.open(tmp_path / "s") as store:
        asyncio.run(main(store))
        assert len(store) == sum(seqno is not None for seqno in outcomes) + store.last_seqno - len(
            [seqno for seqno in outcomes if seqno is not None]
        )


def python(source: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source, str(path)], capture_output=True, text=True, timeout=SLOW_S, check=False
    )


def test_a_program_that_forgets_to_close_ends_cleanly(tmp_path: Path) -> None:
    source = """
import asyncio, sys, kvwal.aio
async def main():
    global db, left
    db = await kvwal.aio.open(sys.argv[1])
    await asyncio.gather(*(db.put(b"%d" % n, b"") for n in range(100)))
    [key async for key in db]
    left = asyncio.ensure_future(db.put(b"left", b""))
asyncio.run(main())
print("end")
"""
    result = python(source, tmp_path / "s")
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
    with kvwal.open(tmp_path / "s") as db:
        assert db.recovery.cut_bytes == 0
        assert len(db) >= 100


def test_a_forgotten_store_warns_and_lets_its_threads_end(tmp_path: Path) -> None:
    async def main() -> None:
        before = threading.active_count()
        db = await kvwal.aio.open(tmp_path / "s", background=False)
        await db.put(b"a", b"")
        await db.first()
        gc.collect()
        with pytest.warns(ResourceWarning, match="never closed"):
            del db
        while threading.active_count() > before:
            await asyncio.sleep(0.01)
        async with kvwal.aio.open(tmp_path / "s") as db:
            assert await db.get(b"a") == b""

    run(main())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_keyboard_interrupt_ends_the_program_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    # Started from the background of a shell the interpreter inherits that SIGINT is ignored.
    source = """
import asyncio, signal, sys, kvwal.aio
signal.signal(signal.SIGINT, signal.default_int_handler)
async def main():
    async with kvwal.aio.open(sys.argv[1]) as db:
        async def work(name):
            number = 0
            while True:
                seqno = await db.put(b"%d.%d" % (name, number), b"")
                number += 1
                acknowledged[name] = number
        print("ready", flush=True)
        await asyncio.gather(*(work(name) for name in range(50)))
acknowledged = {}
try:
    asyncio.run(main())
except KeyboardInterrupt:
    print(*(acknowledged[name] for name in range(50)))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path / "s")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SLOW_S)
    assert process.returncode == 0, err
    assert err == ""
    with kvwal.open(tmp_path / "s", "r") as db:
        for name, count in enumerate(map(int, out.split())):
            assert all(b"%d.%d" % (name, number) in db for number in range(count))


class _CancelledWhenLookedAt(asyncio.Future):  # type: ignore[type-arg]  # it has parameters only for a type checker
    """Every `every`th look at a future that is pending is followed by its cancellation.

    That is what `asyncio.run` does to the main task, and through it to all that it awaits, out of its handler of
    SIGINT: between any two instructions of the loop's thread.
    """

    every = 3
    looks = 0

    def _looked(self, answer: bool) -> bool:
        if not super().done():
            type(self).looks += 1
            if self.looks % self.every == 0:
                self.cancel()
        return answer

    def done(self) -> bool:
        return self._looked(super().done())

    def cancelled(self) -> bool:
        return self._looked(super().cancelled())


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_a_cancellation_out_of_a_signal_handler_is_as_good_as_any(
    tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_CancelledWhenLookedAt, "every", every)
    complaints: list[dict[str, Any]] = []
    written: set[int] = set()

    async def put(db: AsyncStore, number: int) -> None:
        try:
            await db.put(b"%d" % number, b"")
        except asyncio.CancelledError as error:
            if committed_seqno(error) is None:
                raise
        written.add(number)

    def future_for(module: str, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
        # Not for asyncio's own: it looks first, and then sets.
        return _CancelledWhenLookedAt(loop=loop) if module.startswith("kvwal.") else asyncio.Future(loop=loop)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        async with kvwal.aio.open(tmp_path / "s", max_pending_commits=5) as db:
            await db.put(b"a", b"")
            committer = db._committer
            monkeypatch.setattr(loop, "create_future", lambda: future_for(sys._getframe(1).f_globals["__name__"], loop))
            puts = [asyncio.ensure_future(put(db, number)) for number in range(40)]
            reads = [asyncio.ensure_future(db.first()) for _ in range(40)]
            ends = [asyncio.ensure_future(committer.drain()) for _ in range(4)]
            await asyncio.wait([*puts, *reads, *ends])
            monkeypatch.undo()
            assert all(task.cancelled() or task.exception() is None for task in (*puts, *reads, *ends))
            assert (committer.pending_commits, committer.pending_bytes, len(committer._turns)) == (0, 0, 0)
            await db.put(b"b", b"")

    run(main())
    assert complaints == []
    with kvwal.open(tmp_path / "s", "r") as db:
        assert {number for number in range(40) if b"%d" % number in db} == written
    assert _CancelledWhenLookedAt.looks


def test_an_interruption_while_results_go_out_leaves_no_task_asleep(tmp_path: Path) -> None:
    """KeyboardInterrupt out of the loop itself; the loop is run again afterwards."""

    class Struck:
        """A future at whose turn a signal comes, twice."""

        def __init__(self, future: Any) -> None:
            self._future = future
            self._strikes = 2

        def __getattr__(self, name: str) -> Any:
            return getattr(self._future, name)

        def set_result(self, result: Any) -> None:
            if self._strikes:
                self._strikes -= 1
                raise KeyboardInterrupt
            self._future.set_result(result)

    with kvwal.open(tmp_path / "s") as store:
        loop = asyncio.new_event_loop()
        tasks: list[asyncio.Task[Any]] = []

        async def main() -> None:
            db = AsyncStore(store)
            committer = db._committer
            work = committer._work

            def struck(group: Any) -> None:
                work(group)
                request, future = group.entries[10]
                group.entries[10] = (request, Struck(future))

            committer._work = struck  # type: ignore[method-assign]
            tasks.extend(loop.create_task(db.put(b"%d" % number, b"")) for number in range(20))
            await asyncio.wait(tasks)
            await db.close()

        whole = loop.create_task(main())
        interrupted = 0
        while not whole.done():
            try:
                loop.run_until_complete(whole)
            except KeyboardInterrupt:
                interrupted += 1
        loop.close()
        assert interrupted == 2
        assert sorted(task.result() for task in tasks) == list(range(1, 21))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_in_a_forked_child_everything_raises(tmp_path: Path) -> None:
    source = """
import asyncio, os, sys, warnings, kvwal, kvwal.aio
warnings.simplefilter("ignore")
async def main():
    async with kvwal.aio.open(sys.argv[1]) as db:
        await db.put(b"a", b"1")
        await db.checkpoint()
        await db.first()
        child = os.fork()
        if not child:
            status = 0
            for use in (lambda: db.put(b"b", b""), lambda: db.get(b"a"), lambda: db.get_many([b"a"]), db.sync,
                        db.first, db.checkpoint, db.count):
                try:
                    await use()
                    status = 1
                except kvwal.ForkedError:
                    pass
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        await db.put(b"b", b"2")
        assert await db.count() == 2
asyncio.run(main())
"""
    result = python(source, tmp_path / "s")
    assert (result.returncode, result.stderr) == (0, "")


# -- the document -----------------------------------------------------------------------------


def test_the_code_in_the_document_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "asyncio.md").read_text()
    source = "\n".join(part.split("```")[0] for part in text.split("```python\n")[1:])
    assert source.count("assert") >= 5
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
