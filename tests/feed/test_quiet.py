"""F15: whether a feed lives is visible: heartbeats, the last poll, `alive`; for threads and for tasks alike."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aio_fixtures import opened as opened_for_tasks
from aio_fixtures import run
from store_fixtures import TINY, run_threads

import kvwal
import kvwal.feed.quiet
from kvwal import PoisonedError
from kvwal.feed.quiet import Quiet
from kvwal.testing import SimulatedDisk


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=disk, background=False, **TINY) as store:
        yield store


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(kvwal.feed.quiet, "time", made)
    return made


def test_heartbeats_do_not_put_off_the_end_and_a_change_does(clock: Clock) -> None:
    quiet = Quiet(10, 4)
    told: list[str] = []
    for _ in range(6):
        quiet.begin()
        clock.now_s += quiet.left_s(100)
        told.append("end" if quiet.is_over() else f"beat at {clock.now_s:.0f}")
    assert told == ["beat at 104", "beat at 108", "end", "beat at 114", "beat at 118", "end"]
    quiet.begin()
    clock.now_s += quiet.left_s(100)
    quiet.end()
    # What the caller does meanwhile does not count.
    clock.now_s += 1000
    quiet.begin()
    assert quiet.left_s(100) == 4
    assert quiet.left_s(0.1) == 0.1


@pytest.mark.parametrize("since_s", [0.1, 0.3, 1e9 + 0.1, 12345.678])
def test_a_wait_without_heartbeats_always_ends(clock: Clock, since_s: float) -> None:
    """However the times are rounded."""
    clock.now_s = since_s
    quiet = Quiet(0.1)
    quiet.begin()
    while (left_s := quiet.left_s(1)) > 0:
        clock.now_s += left_s
    assert quiet.is_over()


@pytest.mark.parametrize("options", [{"timeout_s": -1}, {"heartbeat_s": 0}, {"heartbeat_s": float("nan")}])
def test_a_time_that_cannot_be_is_refused(db: kvwal.Store, options: dict[str, Any]) -> None:
    for call in (db.changes, db.bootstrap().changes):
        with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
            call(follow=True, **options)
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        db.consumer("mailer", **options)
    assert [pin.purpose for pin in db.pins() if pin.purpose == "changes"] == []


def test_a_quiet_feed_tells_heartbeats_which_carry_the_position(disk: SimulatedDisk, db: kvwal.Store) -> None:
    db[b"other"] = b""
    with db.changes(0, prefix=b"a", follow=True, heartbeat_s=0.02, timeout_s=0.1) as feed:
        beats = list(feed)
        assert 1 < len(beats) < 6
        assert {(beat.kind, beat.seqno, beat.last) for beat in beats} == {("heartbeat", 1, True)}
        times = [next(db.commits()).time_us, *(beat.time_us for beat in beats), disk.now_us()]
        assert times == sorted(times)
        db[b"a"] = b"1"
        assert next(feed).kind == "put"
        assert feed.position == 2


def test_without_asking_there_is_no_heartbeat(db: kvwal.Store) -> None:
    with db.changes(follow=True, timeout_s=0.03) as feed:
        assert list(feed) == []


def test_a_quiet_consumer_gives_heartbeats_and_then_an_empty_batch(db: kvwal.Store) -> None:
    with db.consumer("mailer", prefix=b"a", heartbeat_s=0.02, timeout_s=0.1) as mailer:
        db[b"other"] = b""
        given = []
        for batch in mailer:
            assert batch.changes == ()
            given.append(batch.heartbeat)
            if not batch.heartbeat:
                break
        assert len(given) > 2
        # Batches have no gap, heartbeats neither.
        assert batch.last == db.last_seqno
        db[b"a"] = b"1"
        assert not next(mailer).heartbeat
        mailer.ack(next(mailer))


def test_who_asked_last_and_when_is_listed(db: kvwal.Store) -> None:
    with db.consumer("mailer", heartbeat_s=0.01) as mailer:
        next(mailer)
        [info] = db.consumers()
        assert info.last_poll_s is not None
        assert mailer.last_poll_s is not None
        assert 0 <= info.last_poll_s <= mailer.last_poll_s < 10
        # It grows while the caller is busy, or hangs.
        before_s = mailer.last_poll_s
        time.sleep(0.05)
        [info] = db.consumers()
        assert info.last_poll_s is not None
        assert info.last_poll_s >= before_s + 0.05
    assert mailer.last_poll_s is None
    assert db.consumers()[0].last_poll_s is None


def test_a_feed_that_waits_asks_all_the_time(db: kvwal.Store) -> None:
    feed, consumer = db.changes(follow=True), db.consumer("mailer")
    over = threading.Event()

    def wait(each: Any) -> None:
        next(each)

    def look() -> None:
        try:
            time.sleep(0.4)
            assert feed.last_poll_s < 0.35
            assert consumer.last_poll_s is not None
            assert consumer.last_poll_s < 0.35
        finally:
            db[b"a"] = b""
            over.set()

    run_threads(lambda: wait(feed), lambda: wait(consumer), look)
    time.sleep(0.05)
    assert feed.last_poll_s >= 0.05


def test_alive_says_whether_more_may_come(disk: SimulatedDisk, db: kvwal.Store) -> None:
    consumer = db.consumer("mailer")
    db[b"a"] = b""
    feed, listed, ended = db.changes(0, follow=True), db.changes(0), db.changes(0)
    assert list(ended)
    assert (feed.alive, listed.alive, ended.alive, consumer.alive) == (True, True, False, True)
    disk.fail("datasync")
    with pytest.raises(PoisonedError):
        db[b"b"] = b""
    # What is durable is told; nothing comes after it.
    assert (feed.alive, listed.alive, consumer.alive) == (True, True, True)
    assert next(feed).key == b"a"
    assert next(consumer).changes
    assert (feed.alive, listed.alive, consumer.alive) == (False, True, False)
    listed.close()
    assert not listed.alive
    other = db.changes(0)
    db.close()
    assert (other.alive, consumer.alive) == (False, False)


def test_a_read_only_store_has_feeds_that_are_alive_to_their_end(disk: SimulatedDisk, db: kvwal.Store) -> None:
    db[b"a"] = b""
    db.close()
    with kvwal.open("/kv", "r", files=disk) as reader:
        feed = reader.changes(0)
        assert feed.alive
        assert [change.key for change in feed] == [b"a"]
        assert not feed.alive


def test_tasks_see_the_same() -> None:
    async def main() -> None:
        async with opened_for_tasks() as db:
            async with db.changes(follow=True, prefix=b"a", heartbeat_s=0.02, timeout_s=0.1) as feed:
                await db.put(b"other", b"")
                beats = [change async for change in feed]
                assert {beat.kind for beat in beats} == {"heartbeat"}
                assert 1 < len(beats) < 6
                assert beats[-1].seqno == feed.position == 1
                assert feed.alive
                assert feed.last_poll_s < 10
            assert not feed.alive
            async with db.bootstrap() as base:
                beats = [change async for change in base.changes(follow=True, heartbeat_s=0.02, timeout_s=0.05)]
                assert beats[0].kind == "heartbeat"
            async with db.consumer("mailer", heartbeat_s=0.02, timeout_s=0.1) as mailer:
                given = []
                async for batch in mailer:
                    given.append(batch.heartbeat)
                    if not batch.heartbeat:
                        break
                assert len(given) > 2
                assert mailer.alive
                [info] = await db.consumers()
                assert info.last_poll_s is not None
                assert info.last_poll_s < 10
                # A cancelled wait is no part of the next one's.
                task = asyncio.ensure_future(anext(mailer))
                await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert mailer._quiet._since_s is None
            assert not mailer.alive

    run(main())
