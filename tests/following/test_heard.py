"""A follower that hears its writer: it reads each commit once, looks and flushes only where it must."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import page_of, said
from store_fixtures import wait_until
from wrapped_files import Wrapped

import kvwal
from kvwal.following import progress
from kvwal.keys import Seqno
from kvwal.log import Record
from kvwal.log.watch import _told
from kvwal.testing import SimulatedDisk

PATH = "/store"
WRITES: dict[str, Any] = {"background": False, "keep_history_s": 0, "segment_bytes": 16 << 10}


class Told(Wrapped):
    """Files, and the directory of which each flush is told before it is made."""

    def __init__(self, there: Any, flush: Callable[[], None]) -> None:
        super().__init__(there)
        self._flush = flush

    def open_directory(self, path: str) -> Told:
        return Told(self.there.open_directory(path), self._flush)

    def sync(self) -> None:
        self._flush()
        self.there.sync()


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs are in one process to Python, and not on the disk."""
    monkeypatch.setattr("kvwal.readers.listing.pin_of_this_process", lambda name: None)


def test_what_is_passed_is_not_read_again_and_no_name_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    other = disk.beside()
    flushes: list[None] = []
    again: list[int] = []
    beyond = progress.commits_beyond
    monkeypatch.setattr(progress, "commits_beyond", lambda *args: (again.append(args[1]), beyond(*args))[1])
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=Told(other, lambda: flushes.append(None))) as live:  # type: ignore[arg-type]  # wrapped
            page = page_of(db, PATH, disk, other)
            live.refresh()
            flushes.clear()
            again.clear()
            for n in range(900):
                db[b"%d" % n] = b"x" * n
                page.write(*said(db))
                if n % 9 == 0:
                    assert live.refresh() == n + 2
            rolls = db.stats().log_segments - 1
            assert rolls > 10
            assert flushes == []
            # What a segment held at its end, when a newer one was found.
            assert len(again) <= rolls
            live.refresh()
            assert dict(live) == dict(db)


def test_a_run_that_is_on_disk_in_part_is_shown_in_part_and_the_rest_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    other = disk.beside()
    expected: dict[bytes, bytes] = {}
    with kvwal.open(PATH, files=disk, background=False, durability="os") as db, kvwal.follow(PATH, files=other) as live:
        page = page_of(db, PATH, disk, other)
        live.refresh()
        monkeypatch.delattr(progress, "commits_beyond")
        for n in range(6):
            for i in range(100):
                if i == 40 + n:
                    db.sync()
                    expected = dict(db)
                db.put(b"%02d" % (i * 7 % 64), b"%03d" % i)
            page.write(*said(db))
            assert live.refresh() == db.durable_seqno == n * 100 + 40 + n
            assert dict(live) == expected


def test_what_the_writer_says_is_enough_while_it_says_something_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no name of a segment is asked for, and no meta read; a look that hears nothing new asks for all."""
    disk = SimulatedDisk()
    other = disk.beside()
    asked: list[str] = []
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live:
            engine: Any = live.engine
            page = page_of(db, PATH, disk, other)
            live.refresh()
            for owner, name in ((engine.progress._watch, "_find"), (engine._pages, "has_moved")):
                real = getattr(owner, name)
                monkeypatch.setattr(owner, name, lambda real=real, name=name: (asked.append(name), real())[1])
            for n in range(5):
                db[b"key"] = b"%d" % n
                page.write(*said(db))
                assert live.refresh() == n + 2
                assert live[b"key"] == b"%d" % n
            assert asked == []
            live.refresh()
            assert asked == ["_find", "has_moved"]
            # A checkpoint, and then a roll.
            db.checkpoint()
            db[b"key"] = b"after"
            page.write(*said(db))
            assert live.refresh() == 7
            assert live.rebases == 1
            asked.clear()
            while db.stats().log_segments == 1 or len(db) < 40:
                db[b"%d" % db.last_seqno] = b"x" * 1000
            page.write(*said(db))
            assert live.refresh() == db.last_seqno
            assert "_find" in asked
            assert dict(live) == dict(db)


def test_what_is_shown_is_known_to_be_all_only_where_all_was_looked_at() -> None:
    """The page may be behind: a bound of age is held by what the files say."""
    disk = SimulatedDisk()
    other = disk.beside()
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live, kvwal.follow(PATH, files=other, max_lag_s=3600) as bound:
            page = page_of(db, PATH, disk, other)
            for each, is_current in ((live, False), (bound, True)):
                each.refresh()
                freshness = each.engine.progress.freshness  # type: ignore[attr-defined]  # it follows
                refreshed_s = time.monotonic()
                db[b"key"] = b"next"
                page.write(*said(db))
                assert each.refresh() == db.last_seqno
                assert (freshness._current_s > refreshed_s) == is_current


def test_a_page_of_a_writer_that_is_gone_hides_nothing_of_the_next_one() -> None:
    """It is young, and names the segment in which the follower is; the next writer goes on in another one."""
    disk = SimulatedDisk()
    other = disk.beside()
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live:
            page = page_of(db, PATH, disk, other)
            page.write(*said(db))
            db.put(b"key", b"second", durability="os")
            live.refresh()
            db.engine.abandon()
            with kvwal.open(PATH, files=disk, **WRITES) as after:
                after[b"key"] = b"third"
                after[b"key"] = b"fourth"
                assert live.refresh() == after.last_seqno - 1
                assert live[b"key"] == b"third"


@pytest.mark.parametrize("segment", ["this one", "another one"])
@pytest.mark.parametrize("beyond", [2, 700])
def test_a_page_is_not_believed_of_commits_that_are_not_there(segment: str, beyond: int) -> None:
    """It is young, of this store, and of files in whose place others were put. What comes then is not those commits."""
    disk = SimulatedDisk()
    other = disk.beside()
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live, kvwal.follow(PATH, files=other, pin=False) as unpinned:
            page = page_of(db, PATH, disk, other)
            _, generation, first, salt = said(db)
            page.write(1 + beyond, generation, *((first, salt) if segment == "this one" else (first + 1, salt + 1)))
            assert live.refresh() == unpinned.refresh() == 0
            for n in range(8):
                db.put(b"key", b"%d" % n, durability="os")
                assert live.refresh() == unpinned.refresh() == 1
            assert live[b"key"] == b"first"
            # A writer that lives is.
            disk.pass_time(0.001)
            db.sync()
            page.write(*said(db))
            assert live.refresh() == db.last_seqno == 9
            assert live[b"key"] == b"7"


def test_a_record_that_ends_with_zeros_is_shown_once_the_page_says_so() -> None:
    """Its end looks as if it were not written yet."""
    disk = SimulatedDisk()
    other = disk.beside()
    with kvwal.open(PATH, files=disk, background=False) as db, kvwal.follow(PATH, files=other) as live:
        page = page_of(db, PATH, disk, other)
        for n in range(3):
            db[b"key"] = b"%d" % n + bytes(100_000)
            page.write(*said(db))
            assert live.refresh() == n + 1
            assert live[b"key"] == b"%d" % n + bytes(100_000)


def test_a_name_that_a_recovery_has_given_and_not_flushed_is_flushed_before_it_is_believed() -> None:
    """Whatever the writer before it said, and is still heard."""
    disk = SimulatedDisk()
    other = disk.beside()
    shown: list[int] = []
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live:
            page = page_of(db, PATH, disk, other)
            page.write(*said(db))
            assert live.refresh() == 1
            for n in range(20):
                db.put(b"key", b"%d" % n, durability="os")
            page.write(*said(db))
            assert live.refresh() == 1
            db.engine.abandon()

            def look() -> None:
                shown.append(live.refresh())
                with kvwal.open(PATH, files=disk.crash(0), background=False) as after:
                    assert after.last_seqno >= shown[-1]
                    assert after[b"key"] == live[b"key"]

            with kvwal.open(PATH, files=Told(disk, look), **WRITES):  # type: ignore[arg-type]  # wrapped
                pass
    assert shown[-1] == 21
    assert 1 in shown


@pytest.mark.parametrize("looks", [True, False])
def test_what_a_full_disk_refused_is_never_shown_whatever_the_page_says(looks: bool) -> None:
    """It was written whole, and another commit has its seqno in the next segment, which the page names."""
    disk = SimulatedDisk()
    other = disk.beside()
    expected: dict[bytes, bytes] = {}
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live:
            page = page_of(db, PATH, disk, other)
            page.write(*said(db))
            live.refresh()
            for n in range(6):
                disk.fail("pwrite", error=errno.ENOSPC, path="*.log*", effect="all", forever=True)
                with pytest.raises(kvwal.DiskFullError):
                    db[b"%d" % n] = b"refused"
                disk.heal()
                if looks:
                    # Passed, and kept until it is on disk.
                    live.refresh()
                db[b"%d" % n] = b"instead"
                page.write(*said(db))
                assert live.refresh() == db.last_seqno == n + 2
                expected[b"%d" % n] = b"instead"
                assert dict(live.scan(prefix=b"")) == {b"key": b"first", **expected}


@pytest.mark.parametrize("when", ["before the look", "before the metas are looked at"])
def test_a_feed_goes_by_the_segment_of_what_a_checkpoint_brought(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is older than that checkpoint, and names the segment in which a refused commit still stands."""
    disk = SimulatedDisk()
    other = disk.beside()
    with kvwal.open(PATH, files=disk, background=False, segment_bytes=16 << 10) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=other) as live:
            engine: Any = live.engine
            page = page_of(db, PATH, disk, other)
            page.write(*said(db))
            live.refresh()
            feed = engine.progress.feed(0, None)
            assert [record.seqno for record in feed] == [1]
            db[b"key"] = b"second"
            db.checkpoint()
            page.write(*said(db))

            def write() -> None:
                disk.fail("pwrite", error=errno.ENOSPC, path="*.log*", effect="all", forever=True)
                with pytest.raises(kvwal.DiskFullError):
                    db[b"key"] = b"refused"
                disk.heal()
                db[b"key"] = b"instead"
                db.checkpoint()

            has_moved = engine._pages.has_moved

            def moved() -> bool:
                monkeypatch.setattr(engine._pages, "has_moved", has_moved)
                write()
                found: bool = has_moved()
                return found

            if when == "before the look":
                write()
            else:
                monkeypatch.setattr(engine._pages, "has_moved", moved)
            assert live.refresh() == 3
            assert live[b"key"] == b"instead"
            assert [record.batch().writes for record in feed] == [{b"key": b"second"}, {b"key": b"instead"}]


@pytest.mark.skipif(not hasattr(os, "fork") or not os.path.exists("/proc/self/fd"), reason="it forks, and looks there")
def test_a_forked_child_of_a_writer_with_followers_keeps_no_file_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "store")
    code = "import sys, kvwal\nwith kvwal.follow(sys.argv[1]):\n    print(flush=True)\n    sys.stdin.read()"
    with kvwal.open(path) as db:
        db[b"key"] = b"1"
        command = [sys.executable, "-c", code, path]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as follower:
            assert follower.stdout is not None
            follower.stdout.readline()
            engine: Any = db.engine
            wait_until(lambda: (db.put(b"key", b"2"), engine._telling._page.is_open)[1], "the page")
            child = os.fork()
            if not child:
                held = []
                for each in os.listdir("/proc/self/fd"):
                    # One of them is of the list itself.
                    with suppress(OSError):
                        held.append(os.readlink(f"/proc/self/fd/{each}"))
                os._exit(sum(each.startswith(path) for each in held))
            assert os.waitpid(child, 0)[1] == 0
            assert follower.stdin is not None
            follower.stdin.close()
    assert capfd.readouterr().err == ""


def test_what_was_passed_goes_from_its_place_once_it_was_told() -> None:
    """In place: a copy for each commit would be quadratic in those that are not on disk. What fails is told again."""
    records = [Record(1, Seqno(n), Seqno(0), 0, Seqno(1), 0, b"") for n in range(1, 6)]
    passed = deque(records)
    told: list[int] = []

    def tell(part: Any) -> None:
        if part.seqno == 3 and len(told) == 2:
            told.append(0)
            raise KeyboardInterrupt
        told.append(part.seqno)

    with pytest.raises(KeyboardInterrupt):
        _told(passed, 4, tell)
    assert list(passed) == records[2:]
    _told(passed, 4, tell)
    assert list(passed) == records[4:]
    _told(passed, 4, tell)
    assert told == [1, 2, 0, 3, 4]
