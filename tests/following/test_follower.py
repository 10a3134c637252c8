"""A store that is followed beside its writer: what reads see, when they move, and what is said when they cannot."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY, wait_until
from wrapped_files import WrappedFiles

import kvwal
from kvwal.engine.create import _MARK
from kvwal.files import system_files
from kvwal.keys import Seqno
from kvwal.pages.slots import choose_in
from kvwal.testing import SimulatedDisk

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def db(path: str) -> Iterator[kvwal.Store]:
    """A writer that does nothing by itself."""
    with kvwal.open(path, background=False) as store:
        yield store


def all_durable(db: kvwal.Store) -> None:
    """Have the log say that all of it is on disk, as a writer does that has nothing else to do."""
    engine: Any = db.engine
    engine.queue.run(engine._log.mark_idle)


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


def rewrite(db: kvwal.Store, value: bytes) -> None:
    """Change every page, and bring it into the pages."""
    db.update({b"%04d" % n: value * 500 for n in range(2000)})
    db.checkpoint()


def test_a_held_moment_lasts_for_one_checkpoint_and_is_then_too_old(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"x")
    with kvwal.follow(path, cache_bytes=256 << 10) as live:
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
        with kvwal.follow(path, cache_bytes=256 << 10) as live:
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
            with kvwal.follow(path, files=disk) as live:
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


# Doubt, and damage.


class Glitching:
    """Reads of a log, the first of which after `left` is set come back damaged."""

    left = 0

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def pread(self, size: int, offset: int) -> bytes:
        found: bytes = self._file.pread(size, offset)
        if Glitching.left and self._name.endswith(".log") and size > 100 and len(found) > 40:
            Glitching.left -= 1
            return found[:40] + bytes((found[40] ^ 1,)) + found[41:]
        return found


def test_what_fails_once_is_looked_at_again_and_is_damage_if_nothing_moved(db: kvwal.Store, path: str) -> None:
    with kvwal.follow(path, files=WrappedFiles(system_files(), Glitching)) as live:  # type: ignore[arg-type]
        for n in range(3):
            db.put(b"key", b"%d" % n * 300)
            db.put(b"next", b"")
            Glitching.left = 1
            live.refresh()
            Glitching.left = 0
            live.refresh()
            assert live.get(b"key") == b"%d" % n * 300
        Glitching.left = 1 << 30
        try:
            db.put(b"key", b"last" * 300)
            db.checkpoint()
            with pytest.raises(kvwal.CorruptionError):
                live.refresh()
        finally:
            Glitching.left = 0
        # Reads go on from where it was, and it goes on when it can.
        assert live.get(b"key") == b"2" * 300
        live.refresh()
        assert live.get(b"key") == b"last" * 300


def test_slots_that_fail_once_are_looked_at_again(
    db: kvwal.Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 0

    def choose(raw: bytes, file: Any) -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise kvwal.CorruptionError("data", 0, "a read that went wrong")
        return choose_in(raw, file)

    with kvwal.follow(path) as live:
        monkeypatch.setattr("kvwal.pages.followed.choose_in", choose)
        db.put(b"key", b"1")
        db.checkpoint()
        failures = 1
        assert live.refresh() == 1
        db.put(b"key", b"2")
        db.checkpoint()
        failures = 2
        with pytest.raises(kvwal.CorruptionError):
            live.refresh()
        assert live.refresh() == 2


def test_each_commit_is_published_once_and_in_its_order(
    db: kvwal.Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.follow(path) as live:
        engine: Any = live.engine
        publish, published = type(engine._publisher).publish, [0]

        def note(publisher: Any, seqno: int, *args: Any) -> None:
            if publisher is engine._publisher:
                assert seqno == live.seqno + 1
                published.append(seqno)
            publish(publisher, seqno, *args)

        monkeypatch.setattr(type(engine._publisher), "publish", note)
        for n in range(12):
            db.put(b"key", b"%d" % n)
            all_durable(db)
            if n % 4 == 3:
                db.checkpoint()
            if n % 3:
                live.refresh()
        assert live.seqno == 12
        assert published == sorted(set(published))


def test_a_checkpoint_in_parts_is_shown_once_its_log_is_replayed(db: kvwal.Store, path: str) -> None:
    for n in range(4):
        db.put(b"%d" % n, b"first")
    pages: Any = db.engine._pages  # type: ignore[attr-defined]
    with kvwal.follow(path) as before:
        assert before.refresh() == 3
        # The trees have a part of commits 3 and 4, and say so.
        db.put(b"2", b"second")
        pages.checkpoint([([b"0", b"3"], [b"first"] * 2)], seqno=Seqno(1), time_us=1, replay_through=Seqno(5))
        with kvwal.follow(path) as after:
            for live in (before, after):
                live.refresh()
                assert live.seqno == 5
                assert dict(live) == dict(db)


def test_a_store_whose_erasing_was_cut_off_is_gone(db: kvwal.Store, path: str) -> None:
    db.put(b"key", b"value")
    all_durable(db)
    with kvwal.follow(path) as live:
        (Path(path) / "erasing").write_bytes(_MARK)
        for segment in Path(path).glob("*.log"):
            segment.unlink()
        with pytest.raises(kvwal.StoreRemovedError):
            live.refresh()
        with pytest.raises(kvwal.StoreNotFoundError):
            kvwal.follow(path)


def test_a_page_that_is_damaged_is_damage_here_too(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"x")
    rewrite(db, b"y")
    rewrite(db, b"z")
    with kvwal.follow(path, cache_bytes=256 << 10) as live:
        data = bytearray((Path(path) / "data").read_bytes())
        data[8192::4096] = bytes(byte ^ 1 for byte in data[8192::4096])
        (Path(path) / "data").write_bytes(data)
        with pytest.raises(kvwal.CorruptionError):
            live.get(b"1000")
        with pytest.raises(kvwal.CorruptionError):
            kvwal.follow(path)


def test_an_interruption_between_two_commits_loses_none(
    db: kvwal.Store, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.follow(path) as live:
        engine: Any = live.engine
        publish, left = type(engine._publisher).publish, [3]

        def interrupted(*args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            publish(*args)

        live.refresh()
        for n in range(5):
            db.put(b"%d" % n, b"")
        all_durable(db)
        monkeypatch.setattr(type(engine._publisher), "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            live.refresh()
        assert list(live) == [b"0", b"1"]
        live.refresh()
        assert list(live) == [b"0", b"1", b"2", b"3", b"4"]


# The feed.


def test_changes_are_told_as_the_store_tells_them_while_it_waits(path: str) -> None:
    with kvwal.open(path) as db:
        users = db.table("users", str, int)
        db.put(b"a", b"1", meta={"who": "ada"})
        users["ada"] = 1
        with kvwal.follow(path) as live:
            live.wait(db.last_seqno, 10)
            assert list(live.changes()) == list(db.changes())
            feed = live.changes(after=live.position, follow=True, timeout_s=10)
            db.delete_range(b"a", b"b")
            users["bob"] = 2
            assert [next(feed).kind, next(feed).kind] == ["delete_range", "put"]
            assert feed.position == db.position
            assert live.seqno == db.last_seqno
            assert list(live.changes(tables="users")) == list(db.changes(tables=["users"]))
            assert list(live.changes(after=db.last_seqno, follow=True, timeout_s=0)) == []
            assert next(live.changes(after=db.last_seqno, follow=True, heartbeat_s=0.01)).kind == "heartbeat"
            with pytest.raises(kvwal.FeedGap):
                live.changes(after=99)
            feed.close()


def test_a_feed_says_that_the_log_behind_it_is_gone(path: str) -> None:
    with kvwal.open(path, **TINY, background=False, keep_history_s=0) as db, kvwal.follow(path) as live:
        db.put(b"first", b"")
        db.put(b"second", b"")
        feed = live.changes(follow=True, timeout_s=0)
        assert next(feed).key == b"first"
        for n in range(6):
            for _ in range(8):
                db.put(b"%d" % n, b"x" * 4000)
            db.checkpoint()
        with pytest.raises(kvwal.FeedGap) as gap:
            list(feed)
        assert gap.value.asked == 1
        assert gap.value.oldest > 2
        with pytest.raises(kvwal.FeedGap):
            live.changes(after=1)
        # It moves all the same.
        assert live.refresh() == db.last_seqno
        assert len(live) == 8


# How it begins and ends.


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kvwal.StoreNotFoundError):
        kvwal.follow(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(kvwal.StoreNotFoundError):
        kvwal.follow(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(kvwal.FormatError):
        kvwal.follow(tmp_path / "other")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "data").write_bytes(b"x" * 9000)
    with pytest.raises(kvwal.CorruptionError):
        kvwal.follow(tmp_path / "damaged")


def test_a_closed_follower_refuses_and_lets_go_of_every_file(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"x")
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    live = kvwal.follow(path)
    with live:
        then, feed = live.snapshot(), live.changes(follow=True)
    assert live.closed
    live.close()
    for call in (live.refresh, live.lag, lambda: live.get(b"0001"), lambda: then.get(b"0001"), lambda: next(feed)):
        with pytest.raises(kvwal.ClosedError):
            call()
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_forgotten_follower_warns_and_lets_go(db: kvwal.Store, path: str) -> None:
    live = kvwal.follow(path)
    with pytest.warns(ResourceWarning, match="never closed"):
        _forget(live := [live])
    assert not live


def _forget(held: list[kvwal.Follower]) -> None:
    held.clear()
    gc.collect()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_in_a_forked_child_it_refuses(db: kvwal.Store, path: str) -> None:
    with kvwal.follow(path) as live:
        db.put(b"key", b"")
        live.refresh()
        child = os.fork()
        if not child:
            code = 1
            try:
                live.get(b"key")
            except kvwal.ForkedError:
                try:
                    live.refresh()
                except kvwal.ForkedError:
                    code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert live.refresh() >= 0


def test_a_store_that_is_removed_moved_or_replaced_is_said_to_be_so(db: kvwal.Store, path: str, tmp_path: Path) -> None:
    db.put(b"key", b"value")
    all_durable(db)
    with kvwal.follow(path) as live:
        # Moved, it is the same store.
        os.rename(path, tmp_path / "moved")
        db.put(b"key", b"moved")
        all_durable(db)
        assert live.refresh() == 2
        assert live[b"key"] == b"moved"
        os.rename(tmp_path / "moved", path)
        db.close()
        kvwal.open(path, "n").close()
        with pytest.raises(kvwal.StoreRemovedError):
            live.refresh()
        with pytest.raises(kvwal.StoreRemovedError):
            live.wait(3, 1)
        assert live[b"key"] == b"moved"
    with kvwal.follow(path) as live:
        for name in Path(path).iterdir():
            name.unlink()
        Path(path).rmdir()
        with pytest.raises(kvwal.StoreRemovedError):
            live.refresh()


# Other processes.

WRITER = """
    import sys, kvwal
    path, first = sys.argv[1], int(sys.argv[2])
    with kvwal.open(path, memtable_bytes=16 << 10, segment_bytes=16 << 10, checkpoint_log_bytes=4 << 10,
                    keep_history_s=0) as db:
        n = int(db.get(b"n", b"0"))
        print(n, flush=True)
        while n < first:
            n += 1
            with db.batch() as batch:
                for key in (b"n", b"%d" % (n % 50), b"twin%d" % (n % 50)):
                    batch[key] = b"%d" % n
            if n % 20 == 0:
                db.checkpoint()
        print(n, flush=True)
"""


def start(path: str, until: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), path, str(until)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_writer_in_another_process_is_followed_through_kills_and_restarts(path: str) -> None:
    kvwal.open(path).close()
    seen = rounds = 0
    with kvwal.follow(path, cache_bytes=256 << 10) as live:
        while rounds < 5:
            child = start(path, 1 << 30)
            assert child.stdout is not None
            recovered = int(child.stdout.readline())
            assert recovered >= seen
            until = time.monotonic() + 0.2
            while time.monotonic() < until or seen < recovered:
                assert live.refresh() == live.seqno
                with live.snapshot() as then:
                    state = dict(then)
                n = int(state.get(b"n", b"0"))
                # A commit is one record: its number is its seqno.
                assert n == then.seqno >= seen
                seen = n
                for k in range(50):
                    newest = n - (n - k) % 50
                    expected = b"%d" % newest if newest > 0 else None
                    assert state.get(b"%d" % k) == state.get(b"twin%d" % k) == expected
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
            rounds += 1
        child = start(path, seen + 100)
        assert child.wait() == 0
        assert child.stdout is not None
        last = int(child.stdout.read().split()[-1])
        child.stdout.close()
        assert live.wait(last, 10)
        assert live[b"n"] == b"%d" % last
        assert live.rebases > 5


def test_one_who_waits_reads_what_another_process_wrote(path: str) -> None:
    with kvwal.open(path) as db, kvwal.follow(path) as live:
        for n in range(3):
            db.put(b"n", b"%d" % n)
            assert live.wait(db.position, 10)
            assert live[b"n"] == b"%d" % n
        assert not live.wait(db.last_seqno + 1, 0.01)
        assert not live.wait(db.last_seqno + 1, 0)
        with pytest.raises(kvwal.FeedGap):
            live.wait(kvwal.Position(b"another!", 1), 1)


READER = """
    import os, sys, kvwal
    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try:
        open(os.path.join(sys.argv[1], "probe"), "w")
    except PermissionError:
        with kvwal.follow(sys.argv[1]) as live:
            print(live[b"key"].decode())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are another matter there")
def test_permission_to_read_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "store"
    tmp_path.chmod(0o755)
    for above in tmp_path.parents:
        if not above.stat().st_mode & 0o001:
            if above.owner() != Path.home().owner() or not os.access(above, os.W_OK):
                pytest.skip("another user cannot come to the directory of this test")
            above.chmod(above.stat().st_mode | 0o011)
    with kvwal.open(path, mode=0o644) as db:
        db.put(b"key", b"value")
        db.put(b"next", b"")
        path.chmod(0o555)
        try:
            names = sorted(os.listdir(path))
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(READER), str(path)],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
            )
            assert done.stdout == "value\n", done.stderr
            assert sorted(os.listdir(path)) == names
        finally:
            path.chmod(0o755)


def test_threads_read_while_another_moves_it() -> None:
    disk, path = SimulatedDisk(), "/store"
    with kvwal.open(path, files=disk, **TINY, keep_history_s=0) as db, kvwal.follow(path, files=disk) as live:
        stop = threading.Event()
        failures: list[BaseException] = []

        def read() -> None:
            seen = 0
            try:
                while not stop.is_set():
                    n = int(live.get(b"n", b"0"))
                    assert n >= seen
                    seen = n
                    first, second = live.get_many([b"a", b"b"])
                    assert first == second
            except BaseException as error:  # noqa: BLE001  # it is raised in the thread that waits
                failures.append(error)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for n in range(1, 300):
            db.update({b"n": b"%d" % n, b"a": b"%d" % n * 100, b"b": b"%d" % n * 100})
            live.refresh()
        stop.set()
        for reader in readers:
            reader.join()
        assert not failures, failures
        wait_until(lambda: live.refresh() == db.last_seqno)
