"""A store that is followed beside its writer: what reads see, when they move, and what is said when they cannot."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from following_fixtures import all_durable, rewrite
from store_fixtures import TINY
from wrapped_files import WrappedFiles

import kvwal
from kvwal.files import system_files
from kvwal.testing import SimulatedDisk

# Reading.


def test_it_reads_as_a_store_does(db: kvwal.Store, path: str) -> None:
    for n in range(100):
        db.put(b"%03d" % n, b"%d" % n)
    db.checkpoint()
    db.delete_range(b"010", b"020")
    db.put(b"200", b"new")
    all_durable(db)
    with kvwal.follow(path) as live:
        assert live.seqno == db.last_seqno
        assert live.position == db.position
        assert dict(live) == dict(db)
        assert list(reversed(live)) == list(reversed(db))
        assert live[b"042"] == b"42"
        assert live.get(b"015") is None
        assert b"015" not in live
        assert b"042" in live
        assert live.get_many([b"001", b"015", b"200"]) == [b"1", None, b"new"]
        assert live.get_many([b"001", b"015", b"200"]) == [b"1", None, b"new"]
        assert list(live.scan(b"005", b"025", limit=7)) == list(db.scan(b"005", b"025", limit=7))
        assert list(live.scan(prefix=b"03", reverse=True)) == list(db.scan(prefix=b"03", reverse=True))
        assert live.first() == db.first()
        assert live.last() == db.last()
        assert len(live) == len(db) == live.count()
        assert live.rank(b"050") == db.rank(b"050")
        assert live.key_at(30) == db.key_at(30)
        assert live.key_at(-1) == b"200"
        with pytest.raises(KeyError):
            live[b"none"]
        with live.snapshot() as then:
            assert dict(then) == dict(db)


def test_a_get_that_is_repeated_asks_the_system_for_nothing(db: kvwal.Store, path: str) -> None:
    db.put(b"key", b"value")
    db.checkpoint()
    asked: list[str] = []

    class Watched:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(self._file, name)

    files: Any = WrappedFiles(system_files(), lambda file, name: Watched(file))
    with kvwal.follow(path, files=files) as live:
        assert live.get(b"key") == b"value"
        assert "pread" in asked
        asked.clear()
        assert live.get(b"key") == live[b"key"] == b"value"
        assert not asked


def test_it_moves_when_it_is_told_to_and_not_before(db: kvwal.Store, path: str) -> None:
    db.put(b"key", b"old")
    all_durable(db)
    with kvwal.follow(path) as live:
        db.put(b"key", b"new")
        all_durable(db)
        assert (live.get(b"key"), live.seqno) == (b"old", 1)
        assert live.refresh() == 2
        assert (live.get(b"key"), live.seqno) == (b"new", 2)
        assert live.refresh() == 2


def test_a_commit_is_shown_once_the_log_says_that_it_is_on_disk(db: kvwal.Store, path: str) -> None:
    with kvwal.follow(path) as live:
        db.put(b"key", b"1")
        assert live.refresh() == 0
        assert live.lag().commits == 1
        assert live.lag().seconds > 0
        db.put(b"key", b"2")
        assert live.refresh() == 1
        assert live.get(b"key") == b"1"
        all_durable(db)
        assert live.lag().commits == 1
        assert live.refresh() == 2
        assert live.lag() == (0, 0.0)


def test_commits_that_wait_for_no_flush_are_not_shown_before_it(db: kvwal.Store, path: str) -> None:
    with kvwal.follow(path) as live:
        for n in range(3):
            db.put(b"key", b"%d" % n, durability="os")
        assert live.refresh() == 0
        assert live.lag().commits == 3
        db.sync()
        all_durable(db)
        assert live.refresh() == 3


@pytest.mark.parametrize("n", [1, 7, 8, 40, 700])
def test_commits_of_one_shape_are_shown_together_and_a_held_moment_stays(
    db: kvwal.Store, path: str, n: int
) -> None:
    """They are read and published as runs, as far as they are on disk; beside a reader one by one."""
    expected: dict[bytes, bytes] = {}
    with kvwal.follow(path) as live:
        for turn in range(6):
            held = live.snapshot() if turn % 2 else None
            before = dict(expected)
            for i in range(n):
                key, value = b"%03d" % (i * 7 % 400), b"%d-%03d" % (turn, i)
                db.put(key, value, durability="os")
                expected[key] = value
            db.delete(b"%03d" % turn)
            expected.pop(b"%03d" % turn, None)
            all_durable(db)
            assert live.refresh() == db.last_seqno
            assert dict(live) == expected
            assert [live.get(key) for key in expected] == list(expected.values())
            used, of_writer = (each.engine.state.version.memtable.bytes_used for each in (live, db))
            assert of_writer <= used <= 2 * of_writer
            if held is not None:
                assert dict(held) == before
                held.close()


def test_it_goes_over_to_each_checkpoint_and_keeps_its_rows(db: kvwal.Store, path: str) -> None:
    db.put(b"key", b"value")
    db.checkpoint()
    with kvwal.follow(path) as live:
        assert live.get(b"key") == b"value"
        for n in range(4):
            db.put(b"other", b"%d" % n)
            db.checkpoint()
            # Before the checkpoint it was not known to be on disk.
            assert live.refresh() == n + 2
            assert live.rebases == n + 1
        db.put(b"last", b"1")
        all_durable(db)
        live.refresh()
        assert live.get(b"key") == b"value"
        assert live.rebases == 4
        rows = live._cache.rows
        db.checkpoint()
        live.refresh()
        # Nothing was committed in between, so what was read is still the newest.
        assert live.rebases == 5
        assert live._cache.rows is rows
        assert rows[b"key"] == b"value"


def test_what_a_range_hid_stays_hidden_beyond_a_checkpoint(db: kvwal.Store, path: str) -> None:
    db.update({b"%03d" % n: b"1" for n in range(20)})
    db.checkpoint()
    with kvwal.follow(path) as live:
        assert live.get_many([b"%03d" % n for n in range(20)]) == [b"1"] * 20
        db.delete_range(b"005", b"010")
        all_durable(db)
        live.refresh()
        assert live.get(b"004") == b"1"
        db.checkpoint()
        live.refresh()
        assert [live.get(b"%03d" % n) for n in range(20)] == [b"1"] * 5 + [None] * 5 + [b"1"] * 10
        assert len(live) == 15


def test_tables_are_read_with_their_types_and_follow_their_names(db: kvwal.Store, path: str) -> None:
    users = db.table("users", str, int)
    with kvwal.follow(path) as live:
        followed = live.table("users", str, int)
        assert dict(followed) == {}
        assert followed.id is None
        assert live.tables() == []
        users.update({"ada": 1, "bob": 2})
        db.checkpoint()
        live.refresh()
        assert dict(followed) == {"ada": 1, "bob": 2}
        assert followed.id == users.id
        assert followed["ada"] == 1
        assert followed.get_many(["bob", "eve"]) == [2, None]
        assert len(followed) == 2
        assert "eve" not in followed
        assert live.tables() == db.tables()
        users["eve"] = 3
        all_durable(db)
        live.refresh()
        assert followed["eve"] == 3
        assert list(followed.scan("b", limit=1)) == [("bob", 2)]
        with live.snapshot() as then:
            assert dict(users.within(then)) == dict(users)
        # The follower goes over both at once.
        db.drop_table("users")
        db.table("users", str, int)["zoe"] = 9
        db.checkpoint()
        live.refresh()
        assert dict(followed) == {"zoe": 9}
        assert followed.get("ada") is None
        with pytest.raises(kvwal.TableCodecError):
            live.table("users", int, int)


def test_a_table_of_a_held_snapshot_is_read_from_its_own_checkpoint(db: kvwal.Store, path: str) -> None:
    db.table("users", str, int)["ada"] = 1
    db.checkpoint()
    with kvwal.follow(path) as live, live.snapshot() as then:
        db.table("users", str, int)["ada"] = 2
        db.checkpoint()
        live.refresh()
        assert live.table("users", str, int)["ada"] == 2
        # First looked up now, when the follower reads another checkpoint.
        users = db.table("users", str, int)
        assert users.within(then)["ada"] == 1


# What is held.


def test_a_held_moment_lasts_for_one_checkpoint_and_is_then_too_old(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"x")
    with kvwal.follow(path, pin=False, cache_bytes=256 << 10) as live:
        then, scan = live.snapshot(), live.scan()
        assert next(scan) == (b"0000", b"x" * 500)
        rewrite(db, b"y")
        live.refresh()
        assert then.get(b"1000") == b"x" * 500
        assert live.get(b"1000") == b"y" * 500
        assert dict(then) == {b"%04d" % n: b"x" * 500 for n in range(2000)}
        rewrite(db, b"z")
        rewrite(db, b"!")
        with pytest.raises(kvwal.SnapshotTooOld) as too_old:
            dict(then)
        assert too_old.value.asked == then.seqno == 1
        with pytest.raises(kvwal.SnapshotTooOld):
            list(scan)
        # What is gone stays gone, also where the page is in memory.
        with pytest.raises(kvwal.SnapshotTooOld):
            then.get(b"1000")
        then.close()


def test_reads_of_now_go_on_from_a_newer_checkpoint_where_theirs_is_gone(db: kvwal.Store, path: str) -> None:
    reads: list[Any] = [
        lambda live: live.get(b"1500") == b"z" * 500,
        lambda live: live.get_many([b"0001", b"1999"]) == [b"z" * 500] * 2,
        lambda live: len(live) == 2000,
        lambda live: live.rank(b"1234") == 1234,
        lambda live: live.key_at(777) == b"0777",
        lambda live: live.first(b"1001") == (b"1001", b"z" * 500),
        lambda live: dict(live) == dict(db),
        lambda live: dict(live.snapshot()) == dict(db),
        lambda live: list(live.table("users", str, int)) == ["ada"],
        lambda live: [info.keys for info in live.tables()] == [1],
    ]
    db.table("users", str, int)["ada"] = 1
    for read in reads:
        rewrite(db, b"x")
        with kvwal.follow(path, pin=False, cache_bytes=256 << 10) as live:
            rewrite(db, b"y")
            rewrite(db, b"z")
            assert read(live)
            assert live.rebases == (live.seqno == db.last_seqno)


def test_a_slow_scan_never_reads_a_wrong_pair() -> None:
    """A writer that uses pages again as fast as it can, beside scans that are slow, or not."""
    disk, path = SimulatedDisk(), "/store"
    with kvwal.open(path, files=disk, **TINY, background=False, keep_history_s=0) as db:
        db.update({b"%03d" % n: b"%09d" % 0 * 60 for n in range(100)})
        db.checkpoint()
        stop = threading.Event()

        def write() -> None:
            n = 0
            while not stop.is_set():
                n += 1
                db.update({b"%03d" % k: b"%09d" % n * 60 for k in range(100)})
                db.checkpoint()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            until, whole, old, newest = time.monotonic() + 1.0, 0, 0, -1
            with kvwal.follow(path, pin=False, files=disk) as live:
                engine: Any = live.engine
                while time.monotonic() < until or not whole or not old:
                    engine._pages.pager.cache.resize(0)
                    values = set()
                    try:
                        for i, (_, value) in enumerate(live.scan()):
                            values.add(value)
                            if whole > old and i % 20 == 0:
                                time.sleep(0.002)
                    except kvwal.SnapshotTooOld:
                        old += 1
                    else:
                        whole += 1
                        newest = max(newest, int(value[:9]))
                    assert len(values) == 1
                    assert int(min(values)[:9]) >= newest - 1
                    live.refresh()
        finally:
            stop.set()
            writer.join()
