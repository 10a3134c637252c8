"""One time: commits are stamped by it, and what expires is judged by it, now and in the past, however clocks jump."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from datetime import timedelta

import pytest
from store_fixtures import TINY, check_store, problems_of

import kvwal
from kvwal.expiring import Expiring
from kvwal.files import system_files
from kvwal.log import StoreClock
from kvwal.testing import SimulatedDisk
from kvwal.times import time_of

S = 1_000_000
HOUR_S = 3600


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


def opened(disk: SimulatedDisk) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, **TINY)


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    store = opened(disk)
    yield store
    if not store.closed:
        check_store(store)
        assert problems_of(store) == []
        store.close()


# -- the clock alone -----------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.wall_us, self.at_s = 1_000_000 * S, 5.0

    def clock(self) -> StoreClock:
        return StoreClock(lambda: self.wall_us, lambda: self.at_s)

    def passes(self, seconds: float) -> None:
        self.wall_us += int(seconds * S)
        self.at_s += seconds


def test_a_step_ahead_of_more_than_an_hour_is_believed_after_ten_minutes(caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    clock, start_us = time.clock(), time.wall_us
    time.passes(60)
    assert clock.now_us() == start_us + 60 * S
    time.wall_us += 365 * 24 * HOUR_S * S
    assert clock.now_us() == start_us + 60 * S
    time.passes(599)
    assert clock.now_us() == start_us + 659 * S
    with caplog.at_level(logging.WARNING, "kvwal"):
        time.passes(1)
        assert clock.now_us() == time.wall_us
    assert "went ahead" in caplog.text
    time.passes(5)
    assert clock.now_us() == time.wall_us


def test_a_step_ahead_that_is_taken_back_was_never_believed() -> None:
    time = Time()
    clock, start_us = time.clock(), time.wall_us
    time.wall_us += 48 * HOUR_S * S
    assert clock.now_us() == start_us
    time.wall_us -= 48 * HOUR_S * S
    time.passes(900)
    assert clock.now_us() == time.wall_us == start_us + 900 * S
    # Another one stands anew for ten minutes.
    time.wall_us += 48 * HOUR_S * S
    assert clock.now_us() == start_us + 900 * S
    time.passes(599)
    assert clock.now_us() == start_us + 1499 * S


def test_a_step_ahead_that_is_taken_back_by_more_than_it_was_begins_anew() -> None:
    time = Time()
    clock, start_us = time.clock(), time.wall_us
    time.wall_us += 48 * HOUR_S * S
    assert clock.now_us() == start_us
    time.wall_us -= 49 * HOUR_S * S
    time.passes(500)
    assert clock.now_us() == start_us + 500 * S
    time.wall_us += 48 * HOUR_S * S
    time.passes(200)
    assert clock.now_us() == start_us + 680 * S


@pytest.mark.parametrize("step_s", [1, HOUR_S])
def test_a_step_ahead_of_up_to_an_hour_is_believed_at_once(step_s: int) -> None:
    time = Time()
    clock = time.clock()
    for _ in range(3):
        time.wall_us += step_s * S
        assert clock.now_us() == time.wall_us


def test_hours_without_a_look_at_the_clock_are_no_step() -> None:
    time = Time()
    clock = time.clock()
    time.passes(30 * HOUR_S)
    assert clock.now_us() == time.wall_us


def test_where_the_clock_is_set_back_the_time_goes_on_by_nine_tenths_until_it_is_caught_up() -> None:
    time = Time()
    clock = time.clock()
    time.passes(1800)
    start_us = clock.now_us()
    time.wall_us -= 7200 * S
    seen = []
    for _ in range(2500):
        time.passes(30)
        seen.append(clock.now_us())
    assert seen == sorted(seen)
    assert len(set(seen)) >= len(seen) - 1
    # What it has missed since it was last looked at it makes up for at once.
    assert seen[0] == start_us + 30 * S
    assert seen[1] == start_us + 57 * S
    caught_up = next(i for i, at_us in enumerate(seen) if at_us == start_us + (30 * (i + 1) - 7200) * S)
    assert 71_700 <= 30 * (caught_up + 1) <= 72_060
    assert seen[-1] == time.wall_us


def test_a_clock_that_is_set_back_twice_or_ahead_from_there_never_goes_back() -> None:
    generator = random.Random(7)
    time = Time()
    clock = time.clock()
    last_us = clock.now_us()
    for _ in range(20_000):
        if generator.random() < 0.05:
            time.wall_us += generator.choice([-1, 1]) * int(10 ** generator.uniform(0, 11))
        now_us = clock.now_us()
        assert now_us >= last_us
        seconds = 10 ** generator.uniform(-5, 3)
        time.passes(seconds)
        last_us = clock.now_us()
        # It may step ahead, but it never stands still.
        assert last_us - now_us >= int(0.9 * seconds * S) - 2 or last_us == time.wall_us >= now_us


def test_the_monotonic_clock_of_the_system_goes_on() -> None:
    first = system_files().monotonic_s()
    assert first <= system_files().monotonic_s() < first + 60


# -- a store ---------------------------------------------------------------------------------------


def moments(db: kvwal.Store, seqno: int) -> tuple[bytes | None, list[bytes], int]:
    with db.snapshot(at=seqno) as then:
        return then.get(b"k"), [key for key in then if key == b"k"], len(then)


@pytest.mark.parametrize("step_s", [2 * HOUR_S, 300 * 24 * HOUR_S, -2 * HOUR_S, -300 * 24 * HOUR_S])
@pytest.mark.parametrize("through", ["log", "pages"])
def test_a_past_moment_has_what_lived_then(db: kvwal.Store, disk: SimulatedDisk, step_s: int, through: str) -> None:
    db.put(b"k", b"v", expire_s=1000)
    disk.jump_clock(step_s * S)
    seqno = db.put(b"other", b"1")
    if through == "pages":
        db.checkpoint()
    last = db.put(b"other", b"2")
    assert db[b"k"] == b"v"
    for at in (seqno, last):
        assert moments(db, at) == (b"v", [b"k"], 2)
    assert b"k" not in [each.key for each in db.diff(1)]
    db.revert(b"k", to=seqno)
    assert db[b"k"] == b"v"


def test_what_was_put_while_a_step_was_not_believed_is_in_the_moments_of_then(
    db: kvwal.Store, disk: SimulatedDisk
) -> None:
    disk.jump_clock(2 * HOUR_S * S)
    seqno = db.put(b"k", b"v", expire_s=HOUR_S)
    disk.pass_time(700)
    db.put(b"other", b"1")
    assert b"k" not in db
    assert moments(db, seqno) == (b"v", [b"k"], 1)


def test_after_a_clock_that_stood_ahead_no_moment_lacks_what_lives(disk: SimulatedDisk) -> None:
    """The commits of the second opening are stamped by the last one of the first, which is a year ahead."""
    disk.jump_clock(365 * 24 * HOUR_S * S)
    with opened(disk) as db:
        db[b"other"] = b"0"
    disk.jump_clock(-365 * 24 * HOUR_S * S)
    with opened(disk) as db:
        seqno = db.put(b"k", b"v", expire_s=1000)
        last = db.put(b"other", b"1")
        for at in (seqno, last):
            assert moments(db, at) == (b"v", [b"k"], 2)
        db.revert(b"k", to=last)
        assert db[b"k"] == b"v"
    with opened(disk) as db:
        db.put(b"k", b"v", expire_s=10)
        disk.pass_time(10)
        assert b"k" not in db


def test_commits_are_stamped_by_the_time_that_expiry_goes_by(db: kvwal.Store, disk: SimulatedDisk) -> None:
    for step_s in (2 * HOUR_S, -3 * HOUR_S, 10, -10, 300 * 24 * HOUR_S, -400 * 24 * HOUR_S):
        disk.jump_clock(step_s * S)
        disk.pass_time(60)
        db.put(b"k", b"v", expire_s=10)
        ends = db.expires(b"k")
        (version,) = db.versions(b"k", limit=1)
        assert ends is not None
        assert timedelta(seconds=9) < ends - version.time <= timedelta(seconds=10)


def test_the_moment_of_a_time_is_judged_by_that_time(db: kvwal.Store, disk: SimulatedDisk) -> None:
    seqno = db.put(b"k", b"v", expire_s=100)
    disk.pass_time(50)
    lived = time_of(disk.clock_us)
    disk.pass_time(100)
    expired = time_of(disk.clock_us)
    disk.pass_time(100)
    with db.snapshot(at=lived) as then:
        assert (then.get(b"k"), len(then), then.seqno) == (b"v", 1, seqno)
    with db.snapshot(at=expired) as then:
        assert (then.get(b"k"), len(then), list(then), then.seqno) == (None, 0, [], seqno)
    assert list(db.diff(lived, expired)) == [(b"k", b"v", None)]
    assert list(db.diff(expired, lived)) == [(b"k", None, b"v")]
    assert list(db.diff(lived)) == [(b"k", b"v", None)]
    assert list(db.diff(expired)) == []


def test_a_time_of_a_step_that_is_not_believed_is_still_to_come(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=30)
    disk.pass_time(10)
    now = time_of(disk.clock_us)
    disk.jump_clock(2 * HOUR_S * S)
    with db.snapshot(at=now) as then:
        assert then.get(b"k") == b"v"
    # Later commits would come before it, and change the moment.
    for later in (timedelta(seconds=1), timedelta(hours=2)):
        with pytest.raises(ValueError, match=f"still to come: the store's time is {now:%Y-%m-%dT%H:%M:%S}"):
            db.snapshot(at=now + later)
    disk.pass_time(700)
    with db.snapshot(at=now + timedelta(hours=2)) as then:
        assert b"k" not in then


def test_a_time_that_a_clock_has_passed_which_was_set_back_can_be_asked_for(
    db: kvwal.Store, disk: SimulatedDisk
) -> None:
    seqno = db.put(b"k", b"v", expire_s=30)
    made = time_of(disk.clock_us)
    disk.jump_clock(-2 * HOUR_S * S)
    # The clock is asked, and goes on from there.
    assert b"k" in db
    disk.pass_time(100)
    for later_s, value in ((10, b"v"), (80, None)):
        with db.snapshot(at=made + timedelta(seconds=later_s)) as then:
            assert (then.seqno, then.get(b"k")) == (seqno, value)
    with pytest.raises(ValueError, match="still to come"):
        db.snapshot(at=made + timedelta(seconds=100))


def test_what_is_pinned_says_since_when_by_the_time_of_the_store(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db[b"k"] = b"v"
    db[b"k"] = b"w"
    disk.jump_clock(-2 * HOUR_S * S)
    with db.snapshot(at=1), db.snapshot():
        since_us = {pin.since_us for pin in db.pins() if pin.purpose == "snapshot"}
        assert max(since_us) - min(since_us) < S


@pytest.mark.parametrize("step_s", [2 * HOUR_S, -2 * HOUR_S])
def test_ages_are_told_by_the_time_of_the_store(db: kvwal.Store, disk: SimulatedDisk, step_s: int) -> None:
    with db.consumer("c", start="now"):
        db.put(b"k", b"1")
        with kvwal.follow("/kv", files=disk.beside()) as live:
            db.put(b"k", b"2", durability="os")
            disk.jump_clock(step_s * S)
            disk.pass_time(10)
            # What it has missed since it was last looked at is made up for.
            db.put(b"k", b"3", durability="os")
            disk.pass_time(10)
            (info,) = db.consumers()
            assert info.lag_s is not None
            assert 8 < info.lag_s < 30
            assert live.lag().commits
            assert live.lag().seconds < 30
            made_us = [record.time_us for record in db.history()][-1]
            beat = next(db.changes(db.last_seqno, follow=True, heartbeat_s=0.001))
            assert beat.kind == "heartbeat"
            assert 8 * S < beat.time_us - made_us < 30 * S


# -- a follower ------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["log", "pages"])
def test_a_follower_judges_by_no_time_before_that_of_the_newest_commit_that_came(
    disk: SimulatedDisk, through: str
) -> None:
    with opened(disk) as db:
        db.put(b"k", b"v", expire_s=30)
        db.checkpoint()
        disk.jump_clock(-2 * HOUR_S * S)
        assert b"k" in db
        with kvwal.follow("/kv", files=disk.beside()) as live:
            disk.pass_time(60)
            assert (b"k" in db, b"k" in live) == (False, True)
            db.put(b"other", b"1")
            db.put(b"other", b"2")
            if through == "pages":
                db.checkpoint()
            db.sync()
            live.refresh()
            assert (b"k" in db, b"k" in live, len(live)) == (False, False, 1)


def test_a_follower_is_told_nothing_by_commits_that_keep_the_time_of_the_last_one(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        disk.jump_clock(-2 * HOUR_S * S)
    with opened(disk) as db:
        db.put(b"k", b"v", expire_s=1000)
        with kvwal.follow("/kv", files=disk.beside()) as live:
            for n in range(4):
                db.put(b"other", b"%d" % n)
                db.checkpoint()
                db.put(b"other", b"%d" % n)
                db.sync()
                live.refresh()
                assert live[b"k"] == db[b"k"] == b"v"


@pytest.mark.parametrize("follows", [True, False])
def test_no_commit_that_a_follower_shows_is_still_to_come(disk: SimulatedDisk, follows: bool) -> None:
    with opened(disk) as db:
        disk.pass_time(10)
        db[b"k"] = b"1"
        (made,) = (each.time for each in db.commits())
        disk.jump_clock(-2 * HOUR_S * S)
    with kvwal.follow("/kv", files=disk) if follows else kvwal.open("/kv", "r", files=disk) as live:
        with live.snapshot(at=made) as then:
            assert then[b"k"] == b"1"
        with pytest.raises(ValueError, match="still to come"):
            live.snapshot(at=made + timedelta(seconds=1))


# -- batches that are made by hand -----------------------------------------------------------------


@pytest.mark.parametrize("step_s", [0, 2 * HOUR_S, -2 * HOUR_S])
def test_a_batch_made_by_hand_counts_from_its_commit(db: kvwal.Store, disk: SimulatedDisk, step_s: int) -> None:
    disk.jump_clock(step_s * S)
    batch = kvwal.WriteBatch()
    batch.put(b"a", b"v", expire_s=10)
    batch.put(b"b", b"v", expire_s=5)
    batch[b"b"] = b"for good"
    batch.put_stamped(b"c", b"v")
    table = db.table("t", str, str, expire_s=20)
    table["x"] = "v"
    assert table.id is not None
    batch.table(table.id).put(b"z", b"v", expire_s=5)
    table.within(batch)["y"] = "v"
    for _ in range(2):
        disk.pass_time(3)
        db.commit(batch)
        disk.pass_time(4)
        assert (db.get(b"a"), table.get("z")) == (b"v", "v")
        disk.pass_time(2)
        assert (db.get(b"a"), table.get("z")) == (b"v", None)
        disk.pass_time(7)
        assert (db.get(b"a"), db[b"b"]) == (None, b"for good")
    assert "y" not in table, "it was put through the table, 32 seconds ago"


def test_a_time_that_was_given_is_not_counted_from_the_commit() -> None:
    batch = kvwal.WriteBatch()
    batch.put(b"k", b"v", expire_s=1)
    other = batch.copy()
    batch.put_until(b"k", b"v", 7)
    assert batch.counted(lambda: 100).writes[b"k"] == Expiring.of(b"v", 7)
    assert other.counted(lambda: 100).writes[b"k"] == Expiring.of(b"v", 100 + S)
    assert other.writes[b"k"] == Expiring.of(b"v", S)
