"""A follower beyond reads of now: past moments, what became of keys, tables, indexes, and how old it may be."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from following_fixtures import all_durable, rewrite
from store_fixtures import TINY

import kvwal
from kvwal.testing import SimulatedDisk
from kvwal.times import time_of

HISTORY: dict[str, Any] = {"keep_history_s": 3600, "background": False}


def test_it_looks_back_as_the_store_does(path: str) -> None:
    with kvwal.open(path, **HISTORY) as db:
        users = db.table("users", str, int)
        states = [dict(db)]
        for n in range(60):
            db.put(b"%d" % (n % 7), b"%d" % n, meta={"n": str(n)})
            states.append(dict(db))
            if n % 20 == 10:
                db.checkpoint()
        db.delete_range(b"3", b"5")
        users["ada"] = 1
        users["ada"] = 2
        all_durable(db)
        between = datetime.now(UTC)
        with kvwal.follow(path) as live:
            assert live.window == db.window
            for seqno in range(0, 61, 3):
                with live.snapshot(at=seqno) as then:
                    assert dict(then) == states[seqno]
                    assert then.get(b"1") == states[seqno].get(b"1")
                    assert len(then) == len(states[seqno])
            with live.snapshot(at=between) as then:
                assert then.seqno == live.seqno
            assert list(live.versions(b"3")) == list(db.versions(b"3"))
            assert list(live.versions(b"3", reverse=False, limit=2)) == list(db.versions(b"3", reverse=False, limit=2))
            assert list(live.diff(5, 30)) == list(db.diff(5, 30))
            assert list(live.diff(30)) == list(db.diff(30))
            assert list(live.commits(meta={"n": "7"})) == list(db.commits(meta={"n": "7"}))
            assert [record.seqno for record in live.history(50)] == list(range(51, 64))
            assert list(live.changes(3, previous=True, expand=True)) == list(db.changes(3, previous=True, expand=True))
            followed = live.table("users", str, int)
            assert list(followed.versions("ada")) == list(users.versions("ada"))
            assert list(followed.diff(62)) == [("ada", 1, 2)]
            assert dict(followed.within(followed.at(62))) == {"ada": 1}
            with live.bootstrap() as base:
                db.put(b"new", b"")
                all_durable(db)
                live.refresh()
                assert [change.key for change in base.changes()] == [b"new"]
                assert base.position == live.seqno - 1
                assert next(base.changes(follow=True)).key == b"new"
            for wrong in (live.seqno + 1, -1):
                with pytest.raises(ValueError, match="commit|at"):
                    live.snapshot(at=wrong)
            with pytest.raises(ValueError, match="time zone"):
                live.snapshot(at=datetime(2026, 1, 1))  # noqa: DTZ001  # that is what is wrong


def test_a_moment_means_the_table_that_had_the_name_then(path: str) -> None:
    with kvwal.open(path, **HISTORY) as db:
        users = db.table("users", str, int)
        users["ada"] = 1
        before = db.last_seqno
        db.drop_table("users")
        all_durable(db)
        with kvwal.follow(path) as live:
            followed = live.table("users", str, int)
            assert list(followed.diff(before)) == list(users.diff(before)) == [("ada", 1, None)]
            assert list(followed.versions("ada")) == []
            with pytest.raises(TypeError):
                followed.versions("ada", limit="x")  # type: ignore[arg-type]  # that is what is wrong
            users["bob"] = 2
            all_durable(db)
            live.refresh()
            assert list(followed.diff(before)) == list(users.diff(before)) == [("ada", 1, None), ("bob", None, 2)]


def test_past_moments_are_read_while_the_writer_goes_on_and_restarts() -> None:
    """Bases come and go, segments are retired, and a crash replaces the newest: never a wrong pair."""
    disk, path = SimulatedDisk(), "/store"
    options: dict[str, Any] = {**TINY, "background": False, "keep_history_s": 3600, "keep_history_bytes": 60_000}
    db = kvwal.open(path, files=disk, **options)
    states = [dict(db)]
    fives: set[int] = set()
    old = right = 0
    with kvwal.follow(path, files=disk) as live:
        while (n := len(states)) < 240:
            db.put(b"%d" % (n % 9), b"%d." % n * 150)
            states.append(dict(db))
            if n % 9 == 5:
                fives.add(n)
            if n % 11 == 0:
                db.checkpoint()
            if n % 31 == 0:
                all_durable(db)
                db.put(b"not yet", b"", durability="os")
                states.append(dict(db))
                db.engine.abandon()
                db = kvwal.open(path, files=disk, **options)
            if n % 3:
                continue
            if n % 2:
                live.refresh()
            newest = live.seqno
            for seqno in (newest, newest - 7, newest - 40, newest // 2, 1):
                if not 0 <= seqno <= newest:
                    continue
                try:
                    with live.snapshot(at=seqno) as then:
                        assert dict(then) == states[seqno], seqno
                        assert then.get(b"5") == states[seqno].get(b"5")
                    found = [version.seqno for version in live.versions(b"5", since=seqno)]
                    assert found == [each for each in range(newest, seqno - 1, -1) if each in fives]
                except kvwal.SnapshotTooOld:
                    old += 1
                else:
                    right += 1
    db.close()
    assert right > 100
    assert old > 20


def test_a_past_moment_whose_log_or_pages_are_gone_says_so(path: str) -> None:
    with kvwal.open(path, **TINY, background=False, keep_history_s=0) as db, kvwal.follow(path, pin=False) as live:
        for n in range(40):
            db.put(b"%d" % n, b"z" * 900)
            if n % 10 == 9:
                db.checkpoint()
        live.refresh()
        with pytest.raises(kvwal.SnapshotTooOld) as too_old:
            live.snapshot(at=12)
        assert too_old.value.asked == 12
        with pytest.raises(kvwal.SnapshotTooOld):
            list(live.versions(b"0", since=1))


@pytest.mark.parametrize("attach", [kvwal.follow, partial(kvwal.follow, pin=False), partial(kvwal.open, flag="r")])
def test_what_is_said_to_be_left_of_a_window_that_was_shortened_can_be_read(
    path: str, attach: Callable[[str], Any]
) -> None:
    """By one that is a checkpoint behind. It has the bases of its generation, whose log is there or not."""
    sizes: dict[str, Any] = {"keep_history_bytes": 200 << 10, "history_base_bytes": 20 << 10}
    with kvwal.open(path, background=False, segment_bytes=16 << 10, **sizes) as db:

        def go_on() -> None:
            for n in range(150):
                db.put(b"k%d" % (n % 40), b"x" * 400, durability="os")
            db.checkpoint()

        for _ in range(6):
            go_on()
        reads: list[Callable[[Any, int], object]] = [
            lambda live, at: live.snapshot(at=at).close(),
            lambda live, at: list(live.diff(at, at + 1)),
            lambda live, at: live.snapshot(at=time_of(next(live.history(at)).time_us)).close(),
        ]
        for read in reads:
            with attach(path) as live:
                began = live.window
                go_on()
                assert db.window.oldest > began.oldest
                with pytest.raises(kvwal.SnapshotTooOld) as refused:
                    live.snapshot(at=began.oldest + 1)
                left = refused.value.nearest[1]
                assert left == refused.value.oldest == live.window.oldest == db.window.oldest
                read(live, left)
                # It stays where it is.
                assert live.window.newest == began.newest


def test_a_kept_moment_is_read_however_far_the_writer_is(path: str) -> None:
    with kvwal.open(path, **HISTORY, keep_history_bytes=64 << 20, history_base_bytes=64 << 10) as db:
        for n in range(8):
            rewrite(db, b"%d" % n)
        with kvwal.follow(path, cache_bytes=256 << 10) as live:
            engine: Any = live.engine
            base = engine._keeping.bases[-1]
            assert 1 < base.seqno < 8, "it has a base with pages"
            held, expected = live.snapshot(at=base.seqno), {b"%d" % (base.seqno - 1) * 500}
            for _ in range(3):
                rewrite(db, b"x")
            # What begins now is there; what was begun before two checkpoints is gone, and is named.
            with live.snapshot(at=base.seqno) as then:
                assert (then[b"1500"], set(then.values())) == (min(expected), expected)
            for _ in range(2):
                with pytest.raises(kvwal.SnapshotTooOld) as too_old:
                    dict(held)
                assert too_old.value.asked == base.seqno
                assert "went while it was read" in str(too_old.value)


def test_log_that_goes_under_a_past_moment_is_missed(path: str) -> None:
    with kvwal.open(path, **TINY, background=False) as db:
        for n in range(60):
            db.put(b"%d" % (n % 3), b"%03d" % n * 300)
        all_durable(db)
    live = kvwal.follow(path)
    then, versions, scan = live.snapshot(at=30), live.versions(b"0", reverse=False), live.snapshot(at=31).scan()
    assert next(versions).seqno == 1
    with kvwal.open(path, **TINY, background=False, keep_history_s=0) as db:
        db.put(b"new", b"")
        db.checkpoint()
        assert next(db.history()).seqno > 30
        for read in (lambda: then.get(b"0"), lambda: dict(then), lambda: list(scan), lambda: list(versions)):
            with pytest.raises(kvwal.SnapshotTooOld):
                read()
    live.close()


def test_a_commit_in_place_of_a_refused_one_is_the_one_that_is_found() -> None:
    disk, path = SimulatedDisk(), "/store"
    with kvwal.open(path, files=disk, **HISTORY) as db, kvwal.follow(path, files=disk) as live:
        db.put(b"key", b"1")
        all_durable(db)
        live.refresh()
        assert [version.value for version in live.versions(b"key")] == [b"1"]
        disk.fail("pwrite", error=errno.ENOSPC, path="*.log*", effect="all", forever=True)
        with pytest.raises(kvwal.DiskFullError):
            db.put(b"key", b"refused")
        disk.heal()
        db.put(b"key", b"instead")
        all_durable(db)
        live.refresh()
        assert [version.value for version in live.versions(b"key")] == [b"instead", b"1"]
        db.put(b"key", b"3")
        all_durable(db)
        live.refresh()
        with live.snapshot(at=2) as then:
            assert dict(then) == {b"key": b"instead"}
            assert then[b"key"] == b"instead"


def test_an_index_that_is_not_built_is_said_to_be_its_writers(path: str) -> None:
    def strict(age: int) -> int:
        if age == 200:
            raise RuntimeError
        return age

    with kvwal.open(path, background=False) as db, kvwal.follow(path) as live:
        users = db.table("users", int, int)
        users.update((n, n) for n in range(300))
        users.index("by_age", key=strict, codec=int)
        all_durable(db)
        live.refresh()
        by_age = live.table("users", int, int).index("by_age", codec=int)
        for read in (by_age.wait, by_age.count):
            with pytest.raises(kvwal.IndexNotReadyError, match="the program that writes the store builds it"):
                read()


def test_an_index_is_read_as_of_now_and_of_a_snapshot(path: str) -> None:
    with kvwal.open(path) as db, kvwal.follow(path) as live:
        users = db.table("users", str, int)
        with pytest.raises(kvwal.IndexNotFoundError, match="the program that writes the store makes it"):
            live.table("users", str, int).index("by_age", codec=int)
        by_age = users.index("by_age", key=lambda age: age, codec=int)
        users.update({"ada": 36, "bob": 7})
        assert by_age.wait(10)
        seqno = users.put("eve", 7)
        assert live.wait(seqno, 10)
        followed = live.table("users", str, int).index("by_age", codec=int)
        assert followed.get(7) == [("bob", 7), ("eve", 7)]
        assert list(followed.keys(8)) == [(36, "ada")]
        assert followed.count() == 3
        assert followed.progress == (3, 3)
        with live.snapshot() as then:
            users["zoe"] = 7
            assert live.wait(db.last_seqno, 10)
            assert len(followed.get(7)) == 3
            assert len(followed.within(then).get(7)) == 2
        with pytest.raises(kvwal.TableCodecError):
            live.table("users", str, int).index("by_age", codec=str)
        # As in the code of a writer.
        assert live.table("users", str, int).index("by_age", key=lambda age: age, codec=int).count(equal=36) == 1


READS: list[Any] = [
    lambda live: live.get(b"key"),
    lambda live: live[b"key"],
    lambda live: b"key" in live,
    lambda live: live.get_many([b"key"]),
    lambda live: len(live),
    lambda live: list(live.scan()),
    lambda live: live.first(),
    lambda live: live.key_at(0),
    lambda live: live.expires(b"key"),
    lambda live: live.snapshot(),
    lambda live: live.tables(),
    lambda live: live.table("users", str, int).get("ada"),
    lambda live: live.table("users", str, int).get_many(["ada"]),
    lambda live: list(live.table("users", str, int)),
    lambda live: len(live.table("users", str, int)),
    lambda live: list(live.commits()),
    lambda live: list(live.versions(b"key")),
]


def test_with_max_lag_s_reads_move_it_and_say_where_that_does_not_help(db: kvwal.Store, path: str) -> None:
    db.put(b"key", b"1")
    db.table("users", str, int)["ada"] = 1
    all_durable(db)
    with kvwal.follow(path, max_lag_s=0.02) as live:
        for read in READS:
            read(live)
        db.put(b"key", b"2")
        db.table("users", str, int)["ada"] = 2
        all_durable(db)
        time.sleep(0.03)
        assert [each.seqno for each in live.commits()][-1] == db.last_seqno
        db.put(b"key", b"2")
        all_durable(db)
        time.sleep(0.03)
        assert next(iter(live.versions(b"key"))).seqno == db.last_seqno
        assert live[b"key"] == b"2"
        assert live.table("users", str, int)["ada"] == 2
        then = live.snapshot()
        db.put(b"key", b"3", durability="os")
        time.sleep(0.03)
        for read in READS:
            with pytest.raises(kvwal.StaleError) as stale:
                read(live)
            assert stale.value.lag_s > stale.value.max_lag_s == 0.02
        # A moment that is held is as old as it is.
        assert then[b"key"] == b"2"
        db.sync()
        all_durable(db)
        assert live[b"key"] == b"3"
    with kvwal.follow(path) as live:
        time.sleep(0.03)
        db.put(b"key", b"4")
        assert live[b"key"] == b"3"


def test_a_feed_begins_with_what_is_durable_at_the_call(db: kvwal.Store, path: str) -> None:
    with kvwal.follow(path) as live:
        db.put(b"key", b"")
        all_durable(db)
        assert live.seqno == 0
        assert [change.key for change in live.changes()] == [b"key"]


@pytest.mark.parametrize("puts", [1, 40])
def test_a_commit_that_is_younger_than_the_clock_is_no_moment_to_come(puts: int) -> None:
    """The clock was set back between the commit and the beginning of the follower. Of 40 puts it reads a run."""
    disk = SimulatedDisk()
    with kvwal.open("/store", files=disk, background=False) as db:
        for _ in range(puts):
            db.put(b"key", b"1")
        all_durable(db)
        *_, commit = db.commits()
        disk.jump_clock(-3600)
        with kvwal.follow("/store", files=disk) as live, live.snapshot(at=commit.time) as then:
            assert then[b"key"] == b"1"


def test_runs_of_puts_between_other_commits_are_shown_as_the_writer_has_them(db: kvwal.Store, path: str) -> None:
    def live_on() -> None:
        for n in range(300):
            db.put(b"%03d" % (n % 90), b"%04d" % n)
        db.delete_range(b"010", b"040")
        for n in range(40):
            db.put(b"%03d" % (n % 20 + 5), b"%04d" % n)
        db.delete(b"007")
        db.table("users", str, int)["ada"] = len(db)
        for n in range(20):
            db.put(b"%03d" % n, b"last" if n % 2 else b"")
        all_durable(db)

    live_on()
    with kvwal.follow(path) as first:
        assert dict(first) == dict(db)
        db.checkpoint()
        # It goes over to the checkpoint, and reads what came behind it.
        live_on()
        first.refresh()
        with kvwal.follow(path) as second:
            assert dict(first) == dict(second) == dict(db)
            assert first.rebases


WRONG: list[Any] = [("1", TypeError), (True, TypeError), (-1, ValueError), (float("nan"), ValueError)]


@pytest.mark.parametrize(("value", "error"), WRONG)
def test_wrong_arguments_are_named(db: kvwal.Store, path: str, value: Any, error: type[Exception]) -> None:
    with kvwal.follow(path) as live:
        with pytest.raises(error, match="timeout_s"):
            live.wait(1, timeout_s=value)
        with pytest.raises(error, match="timeout_s"):
            live.changes(follow=True, timeout_s=value)
        with pytest.raises(error, match="max_lag_s"):
            kvwal.follow(path, max_lag_s=value)
        with pytest.raises(TypeError, match="position is a seqno or a position, not str"):
            live.wait("1")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a snapshot is expected"):
            live.table("users").within(db)  # type: ignore[arg-type]


def test_a_snapshot_begins_where_pages_are_whole(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"x")
    with kvwal.follow(path, pin=False, cache_bytes=256 << 10) as live:
        for value in (b"y", b"z"):
            rewrite(db, value)
        with live.snapshot() as then:
            assert set(then.values()) == {b"z" * 500}
        assert live.position == db.position


def test_an_index_is_waited_for_where_nothing_can_remove_its_stale_entries(path: str) -> None:
    """After a range that was too large for its entries to be removed at once."""
    with kvwal.open(path, background=False) as db:
        words = db.table("words", int, str)
        words.index("by_word", key=lambda word: word, codec=str)
        words.update({n: f"{n}" for n in range(2000)})
        all_durable(db)
        with kvwal.follow(path) as live, kvwal.open(path, "r") as still:
            words.delete_range(0, 1500)
            all_durable(db)
            live.refresh()
            assert live.engine.state.cache.names.has_stale
            by_word = live.table("words", int, str).index("by_word", codec=str)
            assert by_word.wait(0)
            assert by_word.count() == 500
            assert still.table("words", int, str).index("by_word", key=lambda word: word, codec=str).wait(0)
