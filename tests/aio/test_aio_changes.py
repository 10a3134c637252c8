"""The feed for tasks: as for threads, and it closes at once when its task is cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import holds, opened, ready, run
from store_fixtures import readers_in

import kvwal
import kvwal.aio
from kvwal import ClosedError, CorruptionError, FeedGap, PoisonedError, ReadOnlyError
from kvwal.aio import AsyncChanges, AsyncStore
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def waits(db: AsyncStore) -> None:
    """A feed waits for a flush."""
    await until(lambda: db.store.engine._log._waiting)  # type: ignore[union-attr]  # it may write


def test_what_is_there_comes_in_order_and_the_position_is_what_was_handed_out() -> None:
    async def main() -> None:
        async with opened() as db:
            await db.update({b"a": b"1", b"b": b"2"})
            for number in range(3000):
                await db.put(b"%d" % number, b"")
            changes = db.changes()
            found = []
            async for change in changes:
                found.append(change.key)
                assert changes.position == (change.seqno if change.last else 0)
            assert found == [b"a", b"b", *(b"%d" % number for number in range(3000))]
            assert changes.position == 3001
            assert holds(db) == []
            assert [change.key async for change in db.changes(2999, prefix=b"2")] == [b"2998", b"2999"]

    run(main())


def test_followers_get_each_commit_once_while_tasks_write() -> None:
    async def main() -> None:
        async with opened() as db:

            async def follow() -> list[int]:
                seen = []
                async with db.changes(0, follow=True) as changes:
                    async for change in changes:
                        seen.append(change.seqno)
                        if change.seqno == 400:
                            break
                return seen

            async def write(task: int) -> None:
                for number in range(100):
                    await db.put(b"%d:%d" % (task, number), bytes(100))

            results = await asyncio.gather(*(follow() for _ in range(3)), *map(write, range(4)))
            assert results[:3] == [list(range(1, 401))] * 3
            assert holds(db) == []
            assert not db.store.engine._log._waiting  # type: ignore[union-attr]  # it may write

    run(main())


def test_a_cancelled_task_lets_go_of_the_log_at_once_and_another_goes_on() -> None:
    async def main() -> None:
        async with opened() as db:
            changes = db.changes(follow=True)
            seen = []

            async def follow(changes: AsyncChanges) -> None:
                async for change in changes:
                    seen.append(change.key)

            task = asyncio.create_task(follow(changes))
            await db.put(b"a", b"1")
            await until(lambda: seen)
            await waits(db)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert holds(db) == []
            assert not db.store.engine._log._waiting  # type: ignore[union-attr]  # it may write
            with pytest.raises(ClosedError):
                await anext(changes)
            await db.put(b"b", b"2")
            assert [change.key async for change in db.changes(changes.position)] == [b"b"]

    run(main())


def test_a_task_that_is_cancelled_before_it_handled_a_commit_gets_it_again() -> None:
    async def main() -> None:
        async with opened() as db:
            await db.update({b"a": b"1", b"b": b"2"})
            changes = db.changes(0, follow=True)
            assert (await anext(changes)).key == b"a"
            await changes.aclose()
            assert [change.key async for change in db.changes(changes.position)] == [b"a", b"b"]

    run(main())


def test_with_a_timeout_it_stops_and_goes_on_when_asked_again() -> None:
    async def main() -> None:
        async with opened() as db:
            async with db.changes(follow=True, timeout_s=0.05) as changes:
                began_s = time.monotonic()
                assert [change async for change in changes] == []
                assert time.monotonic() - began_s >= 0.05
                await db.put(b"a", b"1")
                assert [change.key async for change in changes] == [b"a"]
            with pytest.raises(ValueError, match="timeout_s"):
                db.changes(follow=True, timeout_s=-1)
            assert holds(db) == []

    run(main())


def test_the_position_moves_over_what_matches_nothing() -> None:
    async def main() -> None:
        async with opened() as db, db.changes(follow=True, prefix=b"no") as changes:
            task = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
            for number in range(20):
                await db.put(b"%d" % number, b"")
            await until(lambda: changes.position == 20)
            assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(main())


@pytest.mark.parametrize("end", ["feed", "store", "async store", "poison"])
def test_every_end_is_told(end: str) -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        store = await asyncio.to_thread(kvwal.open, "/kv", files=disk, background=False)
        db = AsyncStore(store)
        changes = db.changes(follow=True)
        task = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
        await waits(db)
        if end == "feed":
            await changes.aclose()
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
        await db.close()
        await asyncio.to_thread(store.close)

    run(main())


def test_what_is_before_damage_comes_first() -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        async with opened(files=disk) as db:
            for number in range(10):
                await db.put(b"%d" % number, bytes(300))
            name = f"/kv/{segment_name(Seqno(1))}"
            disk.flip(name, disk.read(name).index(b"7" + bytes(300)) + 10)
            changes, found = db.changes(), []
            with pytest.raises(CorruptionError):
                async for change in changes:
                    found.append(change.key)
            assert found == [b"%d" % number for number in range(7)]
            assert changes.position == 7

    run(main())


@pytest.mark.parametrize("options", [{}, {"follow": True, "timeout_s": 0}])
def test_damage_at_the_beginning_is_no_end(options: dict[str, Any]) -> None:
    async def main() -> None:
        disk = SimulatedDisk()
        async with opened(files=disk) as db:
            await db.put(b"a", bytes(300))
            await db.put(b"b", bytes(300))
            name = f"/kv/{segment_name(Seqno(1))}"
            disk.flip(name, disk.read(name).index(b"a" + bytes(300)) + 10)
            changes = db.changes(0, **options)
            with pytest.raises(CorruptionError):
                await anext(changes)
            assert changes.position == 0

    run(main())


def test_two_tasks_do_not_share_a_feed() -> None:
    async def main() -> None:
        async with opened() as db, db.changes(follow=True) as changes:
            task = asyncio.create_task(anext(changes))  # type: ignore[arg-type]
            await ready()
            with pytest.raises(RuntimeError, match="another task"):
                await anext(changes)
            await db.put(b"a", b"1")
            assert (await task).key == b"a"

    run(main())


def test_a_bootstrap_goes_on_where_its_snapshot_ends() -> None:
    async def main() -> None:
        async with opened(durability="os") as db:
            await db.put(b"a", b"1")
            async with db.bootstrap() as base:
                await db.put(b"b", b"2")
                assert (await base.snapshot.get(b"a"), await base.snapshot.get(b"b")) == (b"1", None)
                assert base.position == 1 == db.durable_seqno
                await db.sync()
                assert [change.key async for change in base.changes()] == [b"b"]
            assert holds(db) == []
            assert not readers_in(await db.pins())

    run(main())


def test_a_gap_is_told_at_the_call_and_a_read_only_store_does_not_follow(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"a", b"1")
            with pytest.raises(FeedGap):
                db.changes(2)
        async with kvwal.aio.open(tmp_path / "s", "r") as db:
            assert [change.key async for change in db.changes()] == [b"a"]
            with pytest.raises(ReadOnlyError):
                db.changes(follow=True)

    run(main())
