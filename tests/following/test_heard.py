"""A follower that hears its writer: it reads each commit once, and flushes the directory only where it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from wrapped_files import Wrapped

import kvwal
from kvwal.following import progress
from kvwal.readers.now import NowPage
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


def page_of(db: kvwal.Store, disk: SimulatedDisk) -> NowPage:
    """What the background thread of this writer would write."""
    engine: Any = db.engine
    meta = engine._pages.meta
    page = NowPage(disk, disk.open_directory(PATH), meta.store_id, meta.line, engine._log.session, 0o600)  # type: ignore[arg-type]
    page.begin()
    return page


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs are in one process to Python, and not on the disk."""
    monkeypatch.setattr("kvwal.readers.listing.pin_of_this_process", lambda name: None)


def test_what_is_passed_is_not_read_again_and_no_name_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    flushes: list[None] = []
    again: list[int] = []
    beyond = progress.commits_beyond
    monkeypatch.setattr(progress, "commits_beyond", lambda *args: (again.append(args[1]), beyond(*args))[1])
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=Told(disk, lambda: flushes.append(None))) as live:  # type: ignore[arg-type]
            page = page_of(db, disk)
            live.refresh()
            flushes.clear()
            again.clear()
            for n in range(900):
                db[b"%d" % n] = b"x" * n
                page.write(db.durable_seqno, db.stats().generation)
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
    expected: dict[bytes, bytes] = {}
    with kvwal.open(PATH, files=disk, background=False, durability="os") as db, kvwal.follow(PATH, files=disk) as live:
        page = page_of(db, disk)
        live.refresh()
        monkeypatch.delattr(progress, "commits_beyond")
        for n in range(6):
            for i in range(100):
                if i == 40 + n:
                    db.sync()
                    expected = dict(db)
                db.put(b"%02d" % (i * 7 % 64), b"%03d" % i)
            page.write(db.durable_seqno, db.stats().generation)
            assert live.refresh() == db.durable_seqno == n * 100 + 40 + n
            assert dict(live) == expected


def test_a_name_that_a_recovery_has_given_and_not_flushed_is_flushed_before_it_is_believed() -> None:
    """Whatever the writer before it said, and is still heard."""
    disk = SimulatedDisk()
    shown: list[int] = []
    with kvwal.open(PATH, files=disk, **WRITES) as db:
        db[b"key"] = b"first"
        with kvwal.follow(PATH, files=disk.beside()) as live:
            page = page_of(db, disk)
            page.write(db.durable_seqno, db.stats().generation)
            assert live.refresh() == 1
            for n in range(20):
                db.put(b"key", b"%d" % n, durability="os")
            page.write(db.durable_seqno, db.stats().generation)
            assert live.refresh() == 1
            db.engine.abandon()

            def look() -> None:
                shown.append(live.refresh())
                with kvwal.open(PATH, files=disk.crash(0), background=False) as after:
                    assert after.last_seqno >= shown[-1]
                    assert after[b"key"] == live[b"key"]

            with kvwal.open(PATH, files=Told(disk, look), **WRITES):  # type: ignore[arg-type]
                pass
    assert shown[-1] == 21
    assert 1 in shown
