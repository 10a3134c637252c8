"""Feeds of a follower, how it begins and ends, and writers in other processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from following_fixtures import all_durable, rewrite
from store_fixtures import TINY, wait_until

import kvwal
from kvwal.testing import SimulatedDisk

ROOT = Path(__file__).parent.parent.parent


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
    with kvwal.open(path, **TINY, background=False, keep_history_s=0) as db, kvwal.follow(path, pin=False) as live:
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
        db.update({b"%d" % n: b"" for n in range(4)})
        all_durable(db)
        live.refresh()
        # Those have read ahead.
        feeds = [live.changes(1), live.changes(1, follow=True), db.changes(1)]
        ended = live.changes(live.seqno)
        assert [next(feed).key for feed in feeds] == [b"0"] * 3
        assert not list(ended)
        calls: list[Callable[[], object]] = [
            *(lambda: live.get(b"key"), live.refresh, live.lag, lambda: live.pinned, lambda: live.wait(9, 0)),
            # Shown already.
            lambda: live.wait(1, 0),
            *(partial(next, feed) for feed in (*feeds, ended)),
            *(feed.poll for feed in feeds),
        ]
        child = os.fork()
        if not child:
            refused = 0
            for call in calls:
                try:
                    call()
                except kvwal.ForkedError:
                    refused += 1
            # What is kept in memory, as `Store.last_seqno` and `position` of it.
            known = (live.seqno, live.position, live.rebases) == (2, db.position, 0)
            os._exit(0 if refused == len(calls) and known else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert live.refresh() >= 0
        assert live.pinned
        for feed in feeds:
            assert next(feed).key == b"1"
            feed.close()
    with pytest.raises(kvwal.ClosedError):
        live.pinned
    with pytest.raises(kvwal.ClosedError):
        live.wait(1, 0)


def test_a_store_that_is_removed_moved_or_replaced_is_said_to_be_so(db: kvwal.Store, path: str, tmp_path: Path) -> None:
    db.put(b"key", b"value")
    all_durable(db)
    with kvwal.follow(path, pin=False) as live:
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
    with kvwal.follow(path, pin=False) as live:
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
