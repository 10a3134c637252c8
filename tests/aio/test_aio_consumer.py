"""Consumers for tasks: as for threads; what is cancelled counts nothing, and a closed one lets go at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aio_fixtures import SLOW_S, gated, holds, opened, ready, run

import kvwal
import kvwal.aio
from kvwal import ClosedError, ConsumerExistsError, FeedGap, FencedError, LockedError, PoisonedError
from kvwal.aio import AsyncConsumer, AsyncStore, AsyncTransaction
from kvwal.feed.change import Change
from kvwal.testing import SimulatedDisk


def consumer(db: AsyncStore, name: str = "mailer", **options: Any) -> Any:
    """One that never waits, and stores each position at once."""
    return db.consumer(name, **{"ack_interval_s": 0, "timeout_s": 0, **options})


def keys(batch: kvwal.Batch) -> list[bytes]:
    return [change.key for change in batch.changes]


async def drained(feed: AsyncConsumer) -> list[bytes]:
    """All that is there, acknowledged."""
    found: list[bytes] = []
    while (batch := await anext(feed)).changes:
        found += keys(batch)
        await feed.ack(batch)
    return found


async def count(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
    """Under "sum:" how often each key was put: wrong at once if a change is applied twice, or never."""
    for change in changes:
        key = b"sum:" + change.key
        txn.put(key, b"%d" % (int(await txn.get(key, b"0")) + 1))


async def counted(db: AsyncStore) -> dict[bytes, int]:
    return {key[4:]: int(value) async for key, value in db.scan(prefix=b"sum:")}


async def cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def filled(db: AsyncStore, commits: int) -> None:
    for number in range(commits):
        await db.put(b"key%d" % (number % 50), bytes(1000))
        if number % 20 == 19:
            await db.checkpoint()


def test_an_acknowledged_position_is_found_again_and_the_rest_comes_again() -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        async with opened(files=disk) as db, consumer(db) as feed:
            await db.update({b"a": b"1", b"b": b"2"})
            batch = await anext(feed)
            assert (keys(batch), batch.first, batch.last) == ([b"a", b"b"], 1, 2)
            await feed.ack(batch)
            await db.put(b"c", b"3")
            assert keys(await anext(feed)) == [b"c"]
        async with opened(files=disk) as db, consumer(db) as feed:
            assert feed.position == 2
            assert await drained(feed) == [b"c"]

    run(main())


def test_many_wait_without_a_thread_each_and_a_commit_wakes_all() -> None:
    # Those of other tests may wait for the collector.
    others = {*threading.enumerate()}

    async def main() -> None:
        async with opened() as db, AsyncExitStack() as stack:
            feeds = [await stack.enter_async_context(db.consumer(str(number))) for number in range(50)]
            before = db.last_seqno
            tasks = [asyncio.ensure_future(anext(feed)) for feed in feeds]
            await asyncio.sleep(0.3)
            # Those that read, and the one that commits.
            own = {*threading.enumerate()} - others
            assert sum(thread.name.startswith("kvwal-aio") for thread in own) <= 5
            # An idle store writes nothing.
            assert db.last_seqno == before
            await db.put(b"a", b"1")
            batches = await asyncio.gather(*tasks)
            assert [keys(batch) for batch in batches] == [[b"a"]] * 50
            await asyncio.gather(*(feed.ack(batch) for feed, batch in zip(feeds, batches, strict=True)))
            assert {info.position for info in await db.consumers()} == {before + 1}

    run(main())


def test_with_a_timeout_an_empty_batch_comes_and_batches_have_no_gap() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db, prefix=b"a", timeout_s=0.02) as feed:
            await db.put(b"b", b"1")
            empty = await anext(feed)
            assert (empty.changes, empty.first, empty.last) == ((), 1, 3)  # the third is its position
            await db.put(b"a", b"1")
            batch = await anext(feed)
            assert (keys(batch), batch.first) == ([b"a"], 4)

    run(main())


def test_a_cancelled_wait_counts_nothing() -> None:
    """Cancelled after each number of steps of the loop, so also while a worker reads, and when it has read."""

    async def main() -> None:
        async with opened() as db, consumer(db, timeout_s=None) as feed:
            last = feed.position
            for steps in range(40):
                task = asyncio.ensure_future(anext(feed))
                seqno = await db.put(b"%d" % steps, b"")
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                [outcome] = await asyncio.gather(task, return_exceptions=True)
                batch = await anext(feed) if isinstance(outcome, BaseException) else outcome
                assert batch.first == last + 1
                assert [change.seqno for change in batch.changes] == [seqno]
                last = batch.last

    run(main())


def test_a_cancelled_task_writes_what_it_acknowledged_and_lets_go_at_once() -> None:
    async def main() -> None:
        async with opened() as db:
            handled: list[bytes] = []

            async def handle() -> None:
                async with db.consumer("mailer", ack_interval_s=3600) as feed:
                    async for batch in feed:
                        if b"c" in keys(batch):
                            await asyncio.sleep(3600)
                        handled.extend(keys(batch))
                        await feed.ack(batch)

            task = asyncio.create_task(handle())
            while not holds(db):
                await ready()
            for key in (b"a", b"b", b"c"):
                await db.put(key, b"")
                while key != b"c" and key not in handled:
                    await ready()
            await asyncio.sleep(0.05)
            await cancelled(task)
            # Between its delivery and its acknowledgement: it comes again.
            async with consumer(db) as feed:
                assert await drained(feed) == [b"c"]
            [info] = await db.consumers()
            assert (info.state, info.last_error) == ("stopped", "")

    run(main())


def test_a_cancelled_opening_lets_go(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            gate.close()

            async def use() -> None:
                async with consumer(db):
                    raise AssertionError

            task = asyncio.create_task(use())
            await gate.reached()
            task.cancel()
            await ready()
            assert not task.done()
            gate.open()
            await cancelled(task)
            async with consumer(db) as feed:
                assert feed.alive

    run(main())


# -- projections -------------------------------------------------------------------------------


def test_a_projection_and_its_position_are_one_commit() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db) as feed:
            await db.put(b"a", b"1")
            await db.put(b"a", b"2")
            before = db.last_seqno
            assert await feed.project(count, timeout_s=0) == before
            assert db.last_seqno == before + 1
            assert await feed.project(count, timeout_s=0) == before
            assert await counted(db) == {b"a": 2}

    run(main())


def test_a_projection_that_conflicts_runs_again_and_one_that_fails_is_stored() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db) as feed:
            await db.put(b"a", b"1")
            calls: list[int] = []

            async def disturbed(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                await count(txn, changes)
                calls.append(len(changes))
                if len(calls) == 1:
                    await db.put(b"sum:a", b"10")

            await feed.project(disturbed, timeout_s=0)
            assert (await counted(db))[b"a"] == 11

            async def fails(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                await count(txn, changes)
                raise LookupError("no such mail")

            seqno = await db.put(b"b", b"1")
            for _ in range(2):
                with pytest.raises(LookupError):
                    await feed.project(fails, timeout_s=0)
            assert keys(await anext(feed)) == [b"b"]
            [info] = await db.consumers()
            assert (info.last_error, info.position) == ("LookupError: no such mail", seqno - 1)

            async def conflicts(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                calls.append(0)
                raise kvwal.ConflictError(None, seqno, "of its own")

            # Not that of the commit.
            with pytest.raises(kvwal.ConflictError, match="of its own"):
                await feed.project(conflicts, timeout_s=0)
            assert calls.count(0) == 1
            await feed.project(count, timeout_s=0)
            assert (await counted(db))[b"b"] == 1

    run(main())


def test_a_projection_that_is_cancelled_in_its_commit_is_there_if_its_position_is(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db, consumer(db) as feed:
            await db.put(b"a", b"1")
            gate.close()
            task = asyncio.create_task(feed.project(count, timeout_s=0))
            await gate.reached()
            task.cancel()
            await ready()
            assert not task.done()
            gate.open()
            await cancelled(task)
            assert feed.position == db.last_seqno - 1
            assert await counted(db) == {b"a": 1}
            await feed.project(count, timeout_s=0)
            assert await counted(db) == {b"a": 1}

    run(main())


@pytest.mark.parametrize("seed", range(4))
def test_projections_that_are_cancelled_and_taken_over_count_each_change_once(seed: int) -> None:
    async def main() -> None:
        random = Random(seed)
        async with opened() as db:

            async def write() -> None:
                for number in range(40):
                    await db.put(b"key%d" % (number % 4), b"x")
                    if random.random() < 0.3:
                        await asyncio.sleep(0.001)

            async def project() -> None:
                async with db.consumer("counter", prefix=b"key", start="oldest", steal=True) as feed:
                    await feed.project(count, timeout_s=0)

            writers = [asyncio.create_task(write()) for _ in range(2)]
            while not all(task.done() for task in writers):
                tasks = [asyncio.create_task(project()) for _ in range(2)]
                await asyncio.sleep(random.random() * 0.01)
                for task in tasks:
                    if random.random() < 0.7:
                        task.cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    assert outcome is None or isinstance(outcome, FencedError | asyncio.CancelledError), outcome
            await project()
            assert await counted(db) == {b"key%d" % number: 20 for number in range(4)}
            assert (await db.verify()).ok

    run(main())


def test_a_projection_may_set_aside_what_it_fails_for_and_take_it_up() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db, on_error="park") as feed:

            async def count_good(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                await count(txn, changes)
                if any(change.value == b"bad" for change in changes):
                    raise ValueError("bad")

            async def stops(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                raise ClosedError("of something else")

            for value in (b"1", b"bad", b"3"):
                await db.put(b"a", value)
            await feed.project(count_good, timeout_s=0)
            assert await counted(db) == {b"a": 2}
            assert await feed.replay_parked(count_good) == 0
            [info] = await db.consumers()
            assert [(each.seqno, each.error, each.attempts) for each in info.parked] == [(3, "ValueError: bad", 3)]
            with pytest.raises(ClosedError):
                await feed.replay_parked(stops)
            await db.put(b"b", b"1")
            with pytest.raises(ClosedError):
                await feed.project(stops, timeout_s=0)
            assert await feed.replay_parked(count) == 1
            assert await feed.replay_parked(count) == 0
            await feed.project(count, timeout_s=0)
            assert await counted(db) == {b"a": 3, b"b": 1}

    run(main())


def test_a_plain_function_handles_nothing_and_nothing_is_set_aside_for_it() -> None:
    def plain(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
        txn.put(b"plain", b"")

    async def fails(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
        raise ValueError("bad")

    async def main() -> None:
        async with opened() as db, consumer(db, on_error="park") as feed:
            await db.put(b"a", b"bad")
            await feed.project(fails, timeout_s=0)
            with pytest.raises(TypeError, match="plain gave NoneType"):
                await feed.replay_parked(plain)  # type: ignore[arg-type]  # it is the mistake
            await db.put(b"a", b"1")
            position = feed.position
            with pytest.raises(TypeError, match="plain gave NoneType"):
                await feed.project(plain, timeout_s=0)  # type: ignore[arg-type]  # it is the mistake
            assert feed.position == position
            [info] = await db.consumers()
            assert ([each.attempts for each in info.parked], info.last_error) == ([2], "")
            assert await feed.replay_parked(count) == 1
            await feed.project(count, timeout_s=0)
            assert await counted(db) == {b"a": 2}
            assert await db.get(b"plain") is None

    run(main())


def test_a_task_that_iterates_sets_a_batch_aside_and_goes_on() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db) as feed:
            await db.put(b"a", b"bad")
            batch = await anext(feed)
            await feed.park(batch, OSError("no connection"))
            assert feed.position == batch.last
            assert not (await anext(feed)).changes
            [info] = await db.consumers()
            assert [each.error for each in info.parked] == ["OSError: no connection"]
            assert await feed.replay_parked(count) == 1
            assert await counted(db) == {b"a": 1}

    run(main())


def test_what_is_set_aside_and_gone_is_told() -> None:
    async def main() -> None:
        async with opened(segment_bytes=16 << 10) as db, consumer(db, on_error="park", max_lag_bytes=64 << 10) as feed:

            async def fails(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                if any(change.value == b"bad" for change in changes):
                    raise ValueError

            await db.put(b"a", b"bad")
            for _ in range(10):
                await feed.project(fails, timeout_s=0)
                await filled(db, 20)
            with pytest.raises(FeedGap):
                await feed.replay_parked(count)
            async with feed.rebase():
                pass
            assert await feed.replay_parked(count) == 0

    run(main())


def test_a_task_that_is_cancelled_while_it_finds_what_is_gone_takes_up_nothing_more() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db, on_error="park") as feed:

            async def fails(txn: AsyncTransaction, changes: Sequence[Change]) -> None:
                raise ValueError

            for key in (b"a", b"b"):
                await db.put(key, b"1")
                await feed.project(fails, timeout_s=0)
            begun, gone = asyncio.Event(), threading.Event()
            loop, taken_up, gap = asyncio.get_running_loop(), feed._taken_up, FeedGap(1, 3, 4)

            def first_is_gone(parked: Any) -> Any:
                if begun.is_set():
                    return taken_up(parked)
                loop.call_soon_threadsafe(begun.set)
                gone.wait(SLOW_S)
                raise gap

            feed._taken_up = first_is_gone
            task = asyncio.ensure_future(feed.replay_parked(count))
            await begun.wait()
            task.cancel()
            await ready()
            gone.set()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert caught.value.__cause__ is gap
            assert await counted(db) == {}

    run(main())


# -- owners and ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("under_way", ["ack", "park", "project"])
def test_a_close_beside_a_call_of_its_own_owner_is_not_fenced(tmp_path: Path, under_way: str) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db, consumer(db, ack_interval_s=60) as feed:
            batches = []
            for key in (b"a", b"b"):
                await db.put(key, b"1")
                batches.append(await anext(feed))
            if under_way != "ack":
                # Acknowledged, and not written yet.
                feed._stored_s = float("inf")
                await feed.ack(batches[0])
            gate.close()
            calls = {
                "ack": lambda: feed.ack(batches[1]),
                "park": lambda: feed.park(batches[1], ValueError("later")),
                "project": lambda: feed.project(count, timeout_s=0),
            }
            call = asyncio.ensure_future(calls[under_way]())
            await gate.reached()
            closing = asyncio.ensure_future(feed.close())
            await ready()
            gate.open()
            await closing
            await asyncio.wait([call])
            # One that goes on after its commit is told that it is closed.
            assert under_way == "project" or call.exception() is None
            assert not isinstance(call.exception(), FencedError)
            [info] = await db.consumers()
            assert info.position >= batches[1].last
            assert [each.seqno for each in info.parked] == ([batches[1].last] if under_way == "park" else [])
            assert await counted(db) == ({b"b": 1} if under_way == "project" else {})
            async with consumer(db) as again:
                assert await again.replay_parked(count) == (under_way == "park")

    run(main())


@pytest.mark.parametrize("first", ["close", "block", "failed block"])
def test_a_second_close_waits_for_the_end_of_the_first(tmp_path: Path, first: str) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db:
            block = consumer(db, ack_interval_s=60)
            feed = await block.__aenter__()
            await db.put(b"a", b"1")
            acked = await anext(feed)
            await feed.ack(acked)
            feed._stored_s = float("inf")
            await db.put(b"b", b"1")
            if first != "failed block":
                acked = await anext(feed)
                await feed.ack(acked)
            gate.close()
            error = ValueError("b") if first == "failed block" else None
            ending = feed.close() if first == "close" else block.__aexit__(error and type(error), error, None)
            calls = [asyncio.ensure_future(ending)]
            await gate.reached()
            calls += [asyncio.ensure_future(feed.close()) for _ in range(2)]
            await ready()
            assert [call.done() for call in calls] == [False] * 3
            with pytest.raises(LockedError):
                await consumer(db).__aenter__()
            gate.open()
            await asyncio.gather(*calls)
            assert not feed.alive
            [info] = await db.consumers()
            assert (info.position, info.last_error) == (acked.last, "ValueError: b" if error else "")
            async with consumer(db):
                pass

    run(main())


def test_one_owner_at_a_time_and_one_task() -> None:
    async def main() -> None:
        async with opened() as db, consumer(db, timeout_s=None) as feed:
            with pytest.raises(LockedError, match="'mailer'"):
                async with consumer(db):
                    pass
            with pytest.raises(LockedError):
                await db.remove_consumer("mailer")
            with pytest.raises(ConsumerExistsError):
                async with consumer(db, prefix=b"x", steal=True):
                    pass
            task = asyncio.ensure_future(anext(feed))
            await ready()
            with pytest.raises(RuntimeError, match="another task"):
                await anext(feed)
            # A thread takes it over.
            other = await asyncio.to_thread(db.store.consumer, "mailer", steal=True)
            with pytest.raises(FencedError):
                await task
            await asyncio.to_thread(other.close)
            assert await db.remove_consumer("mailer")
            assert await db.consumers() == []
            assert holds(db) == []

    run(main())


@pytest.mark.parametrize("end", ["consumer", "store", "async store", "poison"])
def test_every_end_is_told(end: str) -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        store = await asyncio.to_thread(kvwal.open, "/kv", files=disk, background=False)
        db = AsyncStore(store)
        async with db.consumer("mailer", ack_interval_s=3600) as feed:
            for _ in range(1 if end == "poison" else 2):
                await db.put(b"a", b"1")
                await feed.ack(await anext(feed))
            # A second one is not written yet.
            assert feed.position == 2
            task = asyncio.ensure_future(anext(feed))
            await asyncio.sleep(0.05)
            if end == "consumer":
                await feed.close()
                await feed.close()
                assert not feed.alive
            elif end == "store":
                await asyncio.to_thread(store.close)
            elif end == "async store":
                # The store beneath stays open.
                await db.close()
            else:
                disk.fail("datasync")
                with pytest.raises(PoisonedError):
                    await db.put(b"a", b"1")
            with pytest.raises(PoisonedError if end == "poison" else ClosedError):
                await task
            if end != "poison":
                with pytest.raises(ClosedError):
                    await feed.ack(kvwal.Batch((), kvwal.Seqno(1), kvwal.Seqno(0)))
        await db.close()
        await asyncio.to_thread(store.close)

    run(main())


def test_an_error_in_the_block_is_stored() -> None:
    async def main() -> None:
        async with opened() as db:
            with pytest.raises(LookupError):
                async with consumer(db) as feed:
                    await db.put(b"a", b"1")
                    raise LookupError(keys(await anext(feed))[0])
            [info] = await db.consumers()
            assert (info.state, info.last_error) == ("stopped", "LookupError: b'a'")

    run(main())


# -- what it holds, and how it is lost ---------------------------------------------------------


def test_a_lost_consumer_begins_anew_from_a_snapshot() -> None:
    async def main() -> None:
        async with opened(segment_bytes=16 << 10) as db, consumer(db, max_lag_bytes=0) as feed:
            await filled(db, 100)
            with pytest.raises(FeedGap):
                await anext(feed)
            with pytest.raises(LookupError):
                async with feed.rebase():
                    raise LookupError
            with pytest.raises(FeedGap):
                await anext(feed)
            async with feed.rebase() as snapshot:
                copy = {key: value async for key, value in snapshot.scan()}
                await db.put(b"late", b"1")
            assert await drained(feed) == [b"late"]
            assert {**copy, b"late": b"1"} == {key: value async for key, value in db.scan()}
            assert feed.alive

    run(main())


def test_a_rebase_that_is_cancelled_in_its_commit_goes_on_behind_the_snapshot(tmp_path: Path) -> None:
    async def main() -> None:
        opening, gate = gated(tmp_path)
        async with opening as db, consumer(db) as feed:
            await db.put(b"a", b"1")

            async def rebase() -> None:
                async with feed.rebase() as snapshot:
                    await db.put(b"sum:a", b"%d" % len([key async for key in snapshot]))
                    gate.close()
                    closed.set()

            closed = asyncio.Event()
            task = asyncio.create_task(rebase())
            await closed.wait()
            await gate.reached()
            task.cancel()
            await ready()
            gate.open()
            await cancelled(task)
            assert feed.position == 2
            # What the snapshot had is not told again.
            assert await drained(feed) == [b"sum:a"]

    run(main())


def test_on_a_full_disk_the_laziest_consumer_is_lost_and_no_commit_is_refused() -> None:
    async def main() -> None:
        disk = SimulatedDisk(capacity=6 << 20)
        async with opened(files=disk, segment_bytes=16 << 10, memtable_bytes=32 << 10) as db:
            lazy = await asyncio.to_thread(db.store.consumer, "lazy", max_lag_bytes=None)
            number = 0
            while lazy.alive:
                number += 20
                assert number < 20_000
                await asyncio.gather(*(db.put(b"key%d" % key, bytes(1000)) for key in range(20)))
            await asyncio.gather(*(db.put(b"key%d" % key, bytes(1000)) for key in range(20)))
            assert (await db.verify()).ok
            await asyncio.to_thread(lazy.close)

    run(main())
