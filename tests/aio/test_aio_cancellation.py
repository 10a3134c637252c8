"""The store for asyncio: cancellation anywhere, back-pressure, failures."""

from __future__ import annotations

import asyncio
import errno
import gc
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import SLOW_S, GatedFiles, gated, ready, run
from store_fixtures import readers_in

import kvwal
import kvwal.aio
from kvwal.aio import AsyncTransaction, committed_seqno
from kvwal.aio.scanning import Scan, items_of
from kvwal.aio.workers import Workers, in_thread, to_the_end

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


def test_a_withdrawn_commit_is_not_taken_for_one_that_was_written_before(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)

        async def cancelled(db: kvwal.aio.AsyncStore, *, begun: bool) -> None:
            """A put that is cancelled before its hand-over, or once it was begun."""
            task = asyncio.current_task()
            assert task is not None
            gate.close()

            def cancel() -> None:
                task.cancel()
                gate.open()

            if begun:
                waiting = asyncio.ensure_future(gate.reached())
                waiting.add_done_callback(lambda _: cancel())
            else:
                asyncio.get_running_loop().call_soon(cancel)
            try:
                await db.put(b"begun" if begun else b"withdrawn", b"")
            finally:
                task.uncancel()

        async with opening as db:
            try:
                await cancelled(db, begun=True)
            except asyncio.CancelledError as first:
                assert committed_seqno(first) == 1
                with pytest.raises(asyncio.CancelledError) as caught:
                    await cancelled(db, begun=False)
                assert caught.value.__context__ is first
                assert committed_seqno(caught.value) is None
                timeout = TimeoutError()
                timeout.__cause__ = caught.value
                assert committed_seqno(timeout) is None
                timeout.__cause__ = first
                assert committed_seqno(timeout) == 1
            assert [key async for key in db] == [b"begun"]

    run(main())


def test_errors_that_are_each_others_cause_say_nothing_of_a_commit() -> None:
    one, other = TimeoutError("one"), TimeoutError("other")
    one.__cause__, other.__cause__ = other, one
    assert committed_seqno(one) is None
    assert committed_seqno(ValueError()) is None
    assert committed_seqno(None) is None


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
            assert readers_in(await db.pins()) == []
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
            assert readers_in(await db.pins()) == []

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


def test_a_task_that_is_cancelled_while_a_thread_fails_is_cancelled_all_the_same() -> None:
    async def main() -> None:
        loop, begun, failing = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
        failure = OSError("the disk is gone")

        def fails() -> None:
            loop.call_soon_threadsafe(begun.set)
            failing.wait(SLOW_S)
            raise failure

        task = asyncio.ensure_future(to_the_end(fails))
        await begun.wait()
        task.cancel()
        await ready()
        assert not task.done()
        failing.set()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert caught.value.__cause__ is failure
        with pytest.raises(OSError, match="the disk is gone"):
            await to_the_end(fails)

    run(main())


# -- back-pressure ----------------------------------------------------------------------------


def test_what_fails_in_a_thread_behind_a_cancelled_task_is_no_complaint_of_asyncio(tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []
    may_go_on = threading.Event()

    def fail() -> None:
        assert may_go_on.wait(SLOW_S)
        raise OSError(errno.EIO, "of a task that is over")

    def failing() -> Any:
        yield [b"a"], [b"1"]
        fail()

    async def all_of(scan: Any) -> list[Any]:
        return [each async for each in scan]

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        workers = Workers(asyncio.get_running_loop())
        tasks = [
            asyncio.ensure_future(in_thread(fail)),
            asyncio.ensure_future(all_of(Scan(workers, failing(), items_of, None))),
        ]
        await ready()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        may_go_on.set()
        while workers._waiting or any(thread.name == "kvwal-aio-task" for thread in threading.enumerate()):
            await asyncio.sleep(0.001)
        await ready()
        workers.stop()

    run(main())
    gc.collect()
    assert complaints == []


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


def test_what_operations_write_leaves_the_limit_of_bytes_as_it_is(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path, max_pending_bytes=10_000)
        async with opening as db:
            await asyncio.gather(*(db.put_if_absent(b"o%d" % number, bytes(2_000)) for number in range(50)))
            assert db._committer.pending_bytes == 0
            gate.close()
            operations = [asyncio.ensure_future(db.put_if_absent(b"p%d" % number, bytes(2_000))) for number in range(3)]
            await gate.reached()
            for operation in operations:
                operation.cancel()
            await ready()
            gate.open()
            await asyncio.wait(operations)
            assert db._committer.pending_bytes == 0
            gate.close()
            tasks = [asyncio.ensure_future(db.put(b"%03d" % number, bytes(997))) for number in range(40)]
            await gate.reached()
            await ready()
            assert db.pending_commits == 10
            gate.open()
            await asyncio.gather(*tasks)
            assert (db.pending_commits, db._committer.pending_bytes) == (0, 0)

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


@pytest.mark.parametrize("most", [1, 10_000], ids=["in its turn", "in the open group"])
def test_what_is_withdrawn_is_let_go_of_at_once(tmp_path: Path, most: int) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path, max_pending_commits=most)
        value = bytes(1000)
        async with opening as db:
            gate.close()
            begun = asyncio.ensure_future(db.put(b"begun", b""))
            await gate.reached()
            before = sys.getrefcount(value)
            # In its turn behind another one, which goes on waiting.
            first = asyncio.ensure_future(db.put(b"first", b""))
            for _ in range(20):
                late = asyncio.ensure_future(db.put(b"late", value))
                await ready()
                late.cancel()
                await asyncio.wait([late])
            del late
            await ready()
            gc.collect()
            held = sys.getrefcount(value) - before
            gate.open()
            assert await asyncio.gather(begun, first) == [1, 2]
            assert held == 0

    run(main())


def test_commits_wait_for_memory_and_can_be_withdrawn_meanwhile(tmp_path: Path) -> None:
    """The memtable is full twice over while a checkpoint cannot get on."""

    async def main() -> None:
        files: Any = GatedFiles()
        async with kvwal.aio.open(tmp_path / "s", files=files, memtable_bytes=64 << 10, durability="os") as db:
            for number in range(100):
                await db.put(b"%d" % number, bytes(10_000))
            assert await db.count() == 100
            pressure = db.store.engine.pressure
            gate = files.gate
            gate.only = "data"  # the checkpoint's flush: those of the log are waited for by commits
            gate.close()
            tasks = []
            # A checkpoint that was beyond its flush when the gate was closed goes on.
            while not (gate.is_reached() and pressure._is_stalled()):
                tasks.append(asyncio.ensure_future(db.put(b"%d" % len(tasks), bytes(10_000))))
                await asyncio.wait(tasks, timeout=0.01)
            pressure.is_on = True
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
