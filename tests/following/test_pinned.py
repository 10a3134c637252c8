"""Followers with pins: what they read stays, within the writer's limits, and what they are shown is never wrong."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from following_fixtures import WRITES, fill, held, pages, rewrite

import kvwal
from kvwal.files import system_files
from kvwal.readers.pin import PinMaker
from kvwal.testing import SimulatedDisk

ROOT = Path(__file__).parent.parent.parent


def test_a_held_moment_and_a_slow_scan_last_for_any_number_of_checkpoints(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"0")
    with kvwal.follow(path, name="report", cache_bytes=256 << 10) as live:
        assert live.pinned
        then, walk = live.snapshot(), iter(live.items())
        first = next(walk)
        for n in range(1, 8):
            rewrite(db, b"%d" % n)
            live.refresh()
            assert live[b"0001"] == b"%d" % n * 500
        assert dict([first, *walk]) == dict(then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}
        assert live.pinned
        pins = held(db)
        assert {(pin.name, pin.pid) for pin in pins} == {("report", os.getpid())}
        assert max(pin.held_bytes for pin in pins) > 500_000
        assert min(pin.generation for pin in pins) < db.stats().generation - 5
        then.close()


def test_without_a_pin_nothing_is_written_and_nothing_stays(db: kvwal.Store, path: str) -> None:
    rewrite(db, b"0")
    with kvwal.follow(path, pin=False) as live, live.snapshot() as then:
        assert not live.pinned
        assert not os.path.exists(f"{path}/readers")
        for n in (1, 2):
            rewrite(db, b"%d" % n)
        with pytest.raises(kvwal.SnapshotTooOld):
            dict(then)


def test_what_followers_held_comes_back_within_two_checkpoints_of_their_end(path: str) -> None:
    with kvwal.open(path, **WRITES) as db:
        for n in range(3):
            rewrite(db, b"%d" % n)
        before = pages(db)
        with kvwal.follow(path) as live, live.snapshot():
            for n in range(3):
                rewrite(db, b"%d" % n)
                live.refresh()
            assert pages(db) > before * 1.2
            assert len(os.listdir(f"{path}/readers")) == 2
        assert os.listdir(f"{path}/readers") == []
        for n in range(2):
            rewrite(db, b"%d" % n)
        assert pages(db) <= before * 1.05
        assert held(db) == []


@pytest.mark.parametrize("limit", [{"hold_s": 0.0}, {"hold_bytes": 500_000}])
def test_a_pin_is_broken_beyond_a_limit_and_its_reader_is_told(
    path: str, limit: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with kvwal.open(path, **WRITES, **limit) as db:
        rewrite(db, b"0")
        with kvwal.follow(path, name="slow") as live, live.snapshot() as then:
            with caplog.at_level(logging.WARNING, "kvwal"):
                for n in range(5):
                    rewrite(db, b"%d" % n)
            assert "the pin of follower 'slow'" in caplog.text
            for _ in range(2):
                with pytest.raises(kvwal.SnapshotTooOld):
                    dict(then)
            # What it shows goes on from a newer moment, with a pin of its own.
            assert live[b"0001"] == b"4" * 500
            assert live.pinned


def test_a_moment_that_holds_nothing_is_never_broken(path: str) -> None:
    with kvwal.open(path, **WRITES, hold_s=0, hold_bytes=0) as db:
        rewrite(db, b"0")
        with kvwal.follow(path) as live, live.snapshot() as then:
            rewrite(db, b"1")
            assert len(os.listdir(f"{path}/readers")) == 1
            assert then[b"0001"] == b"0" * 500


def test_on_a_full_disk_followers_lose_what_they_hold_before_snapshots_do() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/store", files=disk, **WRITES, memtable_bytes=1 << 20) as db:
        rewrite(db, b"0")
        with kvwal.follow("/store", files=disk) as live, live.snapshot() as then, db.snapshot() as own:
            for n in range(1, 3):
                rewrite(db, b"%d" % n)
            disk.capacity = sum(len(disk.read(f"/store/{name}")) for name in _files(disk)) + (1 << 20)
            for n in range(3, 30):
                with suppress(kvwal.DiskFullError):
                    rewrite(db, b"%d" % (n % 10))
                    db.compact()
                if not held(db):
                    break
                assert not own.closed
                assert own[b"0001"] == b"0" * 500
            assert held(db) == []
            with pytest.raises(kvwal.SnapshotTooOld):
                dict(then)


def _files(disk: SimulatedDisk) -> list[str]:
    return [name for name in disk.open_directory("/store").names() if disk.kind(f"/store/{name}") == "file"]


def pin_maker(path: str) -> PinMaker:
    files = system_files()
    return PinMaker(files, files.open_directory(path), "test")


def test_a_pin_of_another_store_and_one_that_came_too_late_are_no_holds(path: str) -> None:
    with kvwal.open(path, **WRITES) as db:
        for n in range(4):
            rewrite(db, b"%d" % n)
        meta = db.engine._pages.meta  # type: ignore[attr-defined]
        maker = pin_maker(path)
        other = maker.pin(b"other store id!!", meta.line, meta.generation)
        late = maker.pin(meta.store_id, meta.line, meta.generation - 3)
        early = maker.pin(meta.store_id, meta.line, meta.generation + 5)
        newest = maker.pin(meta.store_id, meta.line, meta.generation)
        assert None not in (other, late, early, newest)
        db.put(b"key", b"")
        db.checkpoint()
        assert [each.is_held() for each in (other, late, early, newest)] == [True, False, False, True]
        assert [pin.generation for pin in held(db) if pin.generation] == [meta.generation, meta.generation]
        for each in (other, late, early, newest):
            each.release()


def test_a_log_that_cannot_be_held_breaks_the_pin(path: str) -> None:
    with kvwal.open(path, **WRITES) as db:
        for n in range(5):
            rewrite(db, b"%d" % n)
        meta = db.engine._pages.meta  # type: ignore[attr-defined]
        maker = pin_maker(path)
        gone = maker.pin(meta.store_id, meta.line, 0, 1)
        there = maker.pin(meta.store_id, meta.line, 0, meta.seqno)
        assert gone is not None
        assert there is not None
        for n in range(3):
            rewrite(db, b"%d" % n)
        assert not gone.is_held()
        assert there.is_held()
        first = next(iter(db.changes(after=meta.seqno)))
        assert first.seqno == meta.seqno + 1
        there.release()
        rewrite(db, b"x")
        with pytest.raises(kvwal.FeedGap):
            db.changes(after=meta.seqno)


def test_pins_outlive_a_writer_that_is_followed_by_another_as_far_as_is_sure(path: str) -> None:
    with kvwal.open(path, **WRITES) as db:
        rewrite(db, b"0")
    with kvwal.follow(path, cache_bytes=256 << 10) as live, live.snapshot() as then:
        for n in range(4):
            with kvwal.open(path, **WRITES) as db:
                rewrite(db, b"%d" % n)
            # A writer knows of the two newest generations; older ones are not sure to be whole to it.
            try:
                assert dict(then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}
            except kvwal.SnapshotTooOld:
                assert n >= 2
                break
        else:
            pytest.fail("it was never told")
        assert live[b"0001"] == b"%d" % n * 500


def test_a_past_moment_of_a_pinned_follower_is_right_or_too_old(path: str) -> None:
    """A pin keeps no base: one that is dropped may be written over while the pin is held."""
    options = {"background": False, "segment_bytes": 16 << 10, "history_base_bytes": 0, "keep_history_bytes": 6 << 20}
    with kvwal.open(path, **options) as db:  # type: ignore[arg-type]  # the options are of several types
        for n in range(8):
            rewrite(db, b"%d" % n)
        with kvwal.follow(path, cache_bytes=256 << 10) as live:
            # Each rewriting is one commit.
            seqno = live.window.newest - 2
            values = {b"%04d" % n: b"%d" % (seqno - 1) * 500 for n in range(2000)}
            with live.snapshot(at=seqno) as past, live.snapshot() as now:
                old = 0
                for n in range(12):
                    try:
                        assert dict(past) == values
                    except kvwal.SnapshotTooOld:
                        old += 1
                    assert now[b"0001"] == b"7" * 500
                    rewrite(db, b"%d" % (n % 10))
                assert old
            live.refresh()
            with live.snapshot(at=live.window.oldest) as past:
                assert len(past) == 2000


# Processes that are killed and stopped.

READER = """
    import os, sys, kvwal, random
    path, seed = sys.argv[1], int(sys.argv[2])
    draw = random.Random(seed)
    with kvwal.follow(path, cache_bytes=256 << 10, name="reader") as live:
        assert live.pinned
        print("begun", flush=True)
        seen = -1
        while True:
            with live.snapshot() as then:
                try:
                    pairs = dict(then.items()) if draw.random() < 0.5 else dict(live.items())
                except kvwal.SnapshotTooOld:
                    print("old", flush=True)
                else:
                    values = set(pairs.values())
                    if len(values) != 1 or len(pairs) != 300:
                        print("WRONG", len(pairs), len(values), flush=True)
                        sys.exit(1)
                    print("ok", flush=True)
            live.refresh()
"""


def reader(path: str, seed: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(READER), path, str(seed)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def stopped(path: str, rng: random.Random, rounds: int) -> int:
    """A follower that is stopped for longer than it may hold something, and goes on: too old, and never wrong."""
    old = 0
    with kvwal.open(path, **WRITES, hold_s=0.002) as db:
        fill(db, b"x")
        child = reader(path, rng.getrandbits(32))
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"begun\n"
            for _ in range(rounds):
                time.sleep(rng.random() * 0.004)
                os.kill(child.pid, signal.SIGSTOP)
                for _ in range(4):
                    fill(db, b"%d" % rng.randrange(10))
                os.kill(child.pid, signal.SIGCONT)
                # Whatever it was in the middle of ends, and begins again.
                for _ in range(2):
                    line = child.stdout.readline()
                    assert line in (b"ok\n", b"old\n"), line + child.stdout.read()
                    old += line == b"old\n"
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
    return old


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no such signals")
def test_a_follower_that_is_stopped_and_continued_is_never_wrong(path: str, rng: random.Random) -> None:
    assert any(stopped(path, rng, 8) for _ in range(20))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="that system has no such signals")
def test_a_follower_that_is_stopped_and_continued_often_is_never_wrong(path: str, rng: random.Random) -> None:
    assert stopped(path, rng, 3000)
