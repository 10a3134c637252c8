"""A follower for tasks: what it offers, and that tasks which wait share one that looks."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import all_durable, rewrite

import kvwal
import kvwal.aio
from kvwal.following.engine import FollowedEngine
from kvwal.following.progress import Progress


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 30))


def test_what_a_follower_of_threads_has_and_this_one_has_not_is_documented() -> None:
    def names(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    # `unchecked` is for kvwal itself.
    assert names(kvwal.Follower) - names(kvwal.aio.AsyncFollower) == {"history", "unchecked"}
    assert names(kvwal.Store) - names(kvwal.aio.AsyncStore) == {"history"}


def test_it_reads_as_the_follower_of_threads_does(path: str) -> None:
    async def main() -> None:
        with kvwal.open(path, background=False, keep_history_s=3600) as db:
            users = db.table("users", str, int)
            for n in range(40):
                db.put(b"%02d" % n, b"%d" % n)
            db.checkpoint()
            users["ada"] = 1
            users["ada"] = 2
            all_durable(db)
            async with kvwal.aio.follow(path) as live:
                assert (live.path, live.seqno, live.position, live.closed) == (path, 42, db.position, False)
                assert await live.get(b"07") == await live.get(b"07") == b"7"
                assert await live.get(b"none", b"?") == b"?"
                assert await live.get_many([b"01", b"none"]) == [b"1", None]
                assert await live.contains(b"01")
                assert [pair async for pair in live.scan(b"05", limit=2)] == [(b"05", b"5"), (b"06", b"6")]
                assert (await live.first(), await live.count(), await live.rank(b"10")) == ((b"00", b"0"), 40, 10)
                assert live.window == db.window
                assert live.pinned
                assert (await live.backup(f"{path}-backup")).position == db.position
                async with live.snapshot(at=10) as then:
                    assert await then.count() == 10
                assert [each.seqno for each in await live.versions(b"07")] == [8]
                assert [key async for key, _, _ in live.diff(38, 40)] == [b"38", b"39"]
                assert [each.seqno async for each in live.commits(40)] == [41, 42]
                assert [change.key async for change in live.changes(39)] == [b"39", b"ada", b"ada"]
                async with live.bootstrap() as base:
                    assert base.position == live.position
                followed = live.table("users", str, int)
                assert (await followed.get("ada"), await followed.id()) == (2, users.id)
                assert await followed.get_many(["ada", "eve"]) == [2, None]
                assert [pair async for pair in followed.scan()] == [("ada", 2)]
                assert (await live.tables())[0].name == "users"
                assert [each.value for each in await followed.versions("ada")] == [2, 1]
                assert await (await followed.within(followed.at(41))).get("ada") == 1
                with pytest.raises(TypeError, match="a snapshot is expected"):
                    await followed.within(live)  # type: ignore[arg-type]
                with pytest.raises(kvwal.IndexNotFoundError):
                    await followed.index("none", codec=int)
                with pytest.raises(TypeError, match="timeout_s"):
                    await live.wait(1, "1")  # type: ignore[arg-type]
                assert (await live.lag()).commits == 0
                assert "AsyncFollower" in repr(live)
            assert live.closed
            for use in (live.get_many([b"01"]), live.refresh(), live.wait(99), followed.get("ada")):
                with pytest.raises(kvwal.ClosedError):
                    await use
            with pytest.raises(kvwal.ClosedError):
                await live.wait(1)
            await live.close()
            alone = await kvwal.aio.follow(path)
            await alone.close()

    run(main())


def test_many_tasks_wait_without_a_thread_for_each(path: str) -> None:
    async def main() -> None:
        with kvwal.open(path, background=False) as db:
            async with kvwal.aio.follow(path) as live:

                async def told(count: int) -> list[bytes]:
                    found = []
                    async with live.changes(follow=True) as changes:
                        async for change in changes:
                            found.append(change.key)
                            if len(found) == count:
                                return found
                    raise AssertionError("it ended")

                before = set(threading.enumerate())
                tasks: list[asyncio.Task[Any]] = [asyncio.create_task(told(10)) for _ in range(30)]
                tasks += [asyncio.create_task(live.wait(10)) for _ in range(30)]
                await asyncio.sleep(0.03)
                for n in range(10):
                    db.put(b"%d" % n, b"")
                    await asyncio.sleep(0)
                # Workers.
                assert len(set(threading.enumerate()) - before) <= 4
                all_durable(db)
                results = await asyncio.gather(*tasks)
                assert results == [[b"%d" % n for n in range(10)]] * 30 + [True] * 30
                assert not await live.wait(11, 0.01)
                assert not await live.wait(11, 0)
                # No one waits, so no one looks.
                await asyncio.sleep(0.1)
                db.put(b"later", b"")
                all_durable(db)
                await asyncio.sleep(0.1)
                assert live.seqno == 10
                beat = await anext(live.changes(after=10, follow=True, heartbeat_s=0.01))
                assert beat.kind in ("heartbeat", "put")

    run(main())


def test_what_ends_is_told_to_those_who_wait(path: str) -> None:
    async def main() -> None:
        kvwal.open(path).close()
        live = await kvwal.aio.follow(path)
        waiting = [asyncio.create_task(live.wait(1)), asyncio.create_task(anext(live.changes(follow=True)))]
        await asyncio.sleep(0.02)
        await live.close()
        for task in waiting:
            with pytest.raises(kvwal.ClosedError):
                await task
        async with kvwal.aio.follow(path) as live:
            cancelled = asyncio.create_task(live.changes(follow=True).__anext__())
            await asyncio.sleep(0.02)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            waiting = [asyncio.create_task(live.wait(1)), asyncio.create_task(anext(live.changes(follow=True)))]
            await asyncio.sleep(0.02)
            kvwal.open(path, "n").close()
            for task in waiting:
                with pytest.raises(kvwal.StoreRemovedError):
                    await task

    run(main())


def test_a_second_close_waits_for_the_end_of_the_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, may_go, real = threading.Event(), threading.Event(), FollowedEngine._let_go

    def let_go(engine: FollowedEngine) -> None:
        reached.set()
        assert may_go.wait(30)
        real(engine)

    async def main() -> None:
        kvwal.open(path).close()
        live = await kvwal.aio.follow(path)
        monkeypatch.setattr(FollowedEngine, "_let_go", let_go)
        first = asyncio.ensure_future(live.close())
        assert await asyncio.to_thread(reached.wait, 30)
        assert live.closed
        calls = [first, *(asyncio.ensure_future(live.close()) for _ in range(3))]
        calls[1].cancel()
        # Also beside one that is cancelled.
        first.cancel()
        for _ in range(9):
            await asyncio.sleep(0)
        assert [call.done() for call in calls] == [False, True, False, False]
        may_go.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in found] == [asyncio.CancelledError] * 2 + [type(None)] * 2
        await live.close()

    run(main())


def test_one_whose_loop_was_closed_while_tasks_waited_is_closed_in_another(path: str) -> None:
    kvwal.open(path).close()
    loop = asyncio.new_event_loop()

    async def main() -> kvwal.aio.AsyncFollower:
        live = await kvwal.aio.follow(path)
        waiting.extend([asyncio.ensure_future(live.wait(1)), asyncio.ensure_future(anext(live.changes(follow=True)))])
        looking: Any = live._looking
        while looking._task is None:
            await asyncio.sleep(0)
        # It has begun, and waits for a worker or sleeps.
        await live.refresh()
        return live

    waiting: list[asyncio.Future[Any]] = []
    before = set(threading.enumerate())
    live = loop.run_until_complete(main())
    for task in asyncio.all_tasks(loop):
        # The test leaves them on purpose.
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # a flag of asyncio's own
    loop.close()
    run(live.close())
    assert live._store.closed
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


class Failing:
    """Looks of a follower that fail when they are let go on, as long as it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: Exception | None = None
        self.entered, self.goes_on = threading.Event(), threading.Event()
        self.looks = 0
        refresh = Progress.refresh

        def look(progress: Progress) -> int:
            error = self.error
            if error is None:
                return refresh(progress)
            self.looks += 1
            self.entered.set()
            assert self.goes_on.wait(10)
            raise error

        monkeypatch.setattr(Progress, "refresh", look)


def test_a_failure_is_told_to_no_one_who_did_not_wait_when_it_came(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch)

    async def main() -> None:
        kvwal.open(path).close()
        async with kvwal.aio.follow(path) as live:
            first = asyncio.create_task(live.wait(1))
            await asyncio.sleep(0.02)
            failing.error = OSError("of before")
            await asyncio.to_thread(failing.entered.wait, 10)
            first.cancel()
            await asyncio.wait([first])
            failing.error = None
            failing.goes_on.set()
            looking: Any = live._looking
            await asyncio.wait([looking._task])
            assert await live.refresh() == 0
            assert not await live.wait(1, 0.02)
            beat = await anext(live.changes(follow=True, heartbeat_s=0.02))
            assert beat.kind == "heartbeat"

    run(main())


def test_a_failure_is_told_once_to_each_who_waited(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(monkeypatch)

    async def main() -> None:
        kvwal.open(path).close()
        async with kvwal.aio.follow(path) as live:
            waits = [live.wait(1), live.wait(2), anext(live.changes(follow=True)), anext(live.changes(follow=True))]
            tasks = [asyncio.ensure_future(each) for each in waits]
            await asyncio.sleep(0.02)
            failing.error = OSError("for all")
            await asyncio.to_thread(failing.entered.wait, 10)
            late = asyncio.create_task(live.wait(0))
            failing.goes_on.set()
            for told in await asyncio.gather(*tasks, return_exceptions=True):
                assert told is failing.error
            assert failing.looks == 1
            assert await late
            failing.error = None
            assert not await live.wait(1, 0.02)

    run(main())


def test_reads_go_on_from_a_newer_checkpoint_and_max_lag_s_holds(path: str) -> None:
    async def main() -> None:
        with kvwal.open(path, background=False, keep_history_s=0) as db:
            rewrite(db, b"x")
            async with kvwal.aio.follow(path, cache_bytes=256 << 10, pin=False) as live:
                for value in (b"y", b"z"):
                    rewrite(db, value)
                assert await live.get(b"1500") == b"z" * 500
                assert {value async for value in live.values()} == {b"z" * 500}
            async with kvwal.aio.follow(path, max_lag_s=0.02) as live:
                users = live.table("users", str, int)
                db.put(b"key", b"1")
                db.table("users", str, int)["ada"] = 1
                all_durable(db)
                await asyncio.sleep(0.03)
                assert (await live.get(b"key"), await users.get("ada")) == (b"1", 1)
                db.put(b"key", b"2", durability="os")
                await asyncio.sleep(0.03)
                reads = live.get(b"key"), live.get(b"1500"), live.count(), users.get("ada"), live.get_many([b"a"])
                for read in reads:
                    with pytest.raises(kvwal.StaleError):
                        await read

    run(main())


def test_with_max_lag_s_no_read_moves_it_in_the_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    refresh = Progress.refresh

    def noted(self: Progress) -> int:
        moved.append(threading.get_ident())
        return refresh(self)

    async def main() -> None:
        with kvwal.open(path) as db:
            db.table("users", str, int)["ada"] = 1
            db.put(b"key", b"1")
            all_durable(db)
            async with kvwal.aio.follow(path, max_lag_s=0.01) as live:
                users = live.table("users", str, int)
                for read in (
                    *(lambda: live.get(b"key"), lambda: live.get_many([b"key"]), lambda: live.count()),
                    *(lambda: users.get("ada"), lambda: users.get_many(["ada"]), users.id, lambda: users.count()),
                ):
                    await asyncio.sleep(0.02)
                    moved.clear()
                    assert await read()
                    assert moved
                    assert threading.get_ident() not in moved

    monkeypatch.setattr(Progress, "refresh", noted)
    run(main())


def test_a_forgotten_one_warns(path: str) -> None:
    async def main() -> None:
        kvwal.open(path).close()
        held = [await kvwal.aio.follow(path)]
        await held[0].refresh()
        with pytest.warns(ResourceWarning, match="never closed") as caught:
            await _forget(held, caught)

    run(main())


async def _forget(held: list[kvwal.aio.AsyncFollower], caught: pytest.WarningsRecorder) -> None:
    held.clear()
    # A worker thread may still have the call that it ran last, and the collector may run in any thread.
    while not any("never closed" in str(each.message) for each in caught):
        gc.collect()
        await asyncio.sleep(0.01)
