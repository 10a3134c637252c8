"""What is kept of the past, and when it goes: by bytes, by age, on a full disk, after a crash."""

from __future__ import annotations

import errno
from datetime import UTC
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from past_fixtures import bases_of, bases_wherever_there_is_log, db, disk, fill, opened, works
from store_fixtures import TINY, check_store

import kvwal
from kvwal import SnapshotTooOld
from kvwal.engine import checkpoint, keeping
from kvwal.options import RESERVE_BYTES
from kvwal.pages import pagefile
from kvwal.testing import SimulatedDisk, crash_every

# Fixtures.
__all__ = ["bases_wherever_there_is_log", "db", "disk"]


# -- what is kept ------------------------------------------------------------------------------


def test_nothing_is_kept_where_that_is_not_wanted(disk: SimulatedDisk) -> None:
    for off in ({"keep_history_s": 0}, {"keep_history_bytes": 0}):
        with opened(disk, **off) as db:
            for number in range(60):
                db.put(b"k", bytes(1000))
                if number % 7 == 0:
                    db.checkpoint()
            window = db.window
            assert (window.oldest, window.bases, window.held_bytes) == (db.last_seqno, 0, 0)
            assert window.oldest_time is None
            assert len(db.engine._log.segments()) < 4
            # Even of what is in the pages and the log by chance.
            with pytest.raises(SnapshotTooOld):
                db.snapshot(at=db.last_seqno - 1)
            with pytest.raises(SnapshotTooOld) as caught:
                db.snapshot(at=3)
            assert (caught.value.asked, caught.value.oldest) == (3, db.last_seqno)


def test_it_is_let_go_of_when_it_is_wanted_no_more_and_kept_from_then_on_when_it_is(disk: SimulatedDisk) -> None:
    model: list[dict[bytes, bytes]] = [{}]
    with opened(disk) as db:
        fill(db, model, 4)
    with opened(disk, keep_history_s=0) as db:
        for _ in range(3):
            db.put(b"k", bytes(9000))
            db.checkpoint()
        assert db.engine._pages.bases.all() == ()
        assert len(db.engine._log.segments()) < 4
    with opened(disk) as db:
        assert db.window.oldest == db.last_seqno
        db.put(b"k", b"v")
        db.checkpoint()
        oldest = db.last_seqno
        assert bases_of(db) == [oldest]
        db.put(b"k", b"w")
        with db.snapshot(at=oldest) as snapshot:
            assert snapshot[b"k"] == b"v"
        with pytest.raises(SnapshotTooOld):
            db.snapshot(at=oldest - 1)


@pytest.mark.parametrize("replayed", [0, 100])
def test_an_open_begins_the_window_where_there_is_none(replayed: int, disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=0) as db:
        for _ in range(3):
            db.put(b"k", bytes(9000))
            db.checkpoint()
        for _ in range(replayed):
            db.put(b"k", b"v")
        before = db.last_seqno
    for background in (True, True, False):
        with opened(disk, background=background) as db:
            generation = db.engine._pages.meta.generation
            assert bases_of(db) == [before]
            good = db.put(b"k", b"good")
            db.put(b"k", b"bad")
            with db.snapshot(at=before) as snapshot:
                assert len(snapshot[b"k"]) == (1 if replayed else 9000)
            db.revert(b"k", to=good)
            assert db[b"k"] == b"good"
            if background is False:
                assert db.engine._pages.meta.generation == generation
                db.checkpoint()
                assert db.window.oldest == before


def test_where_much_is_replayed_a_checkpoint_is_due_that_begins_the_window(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_BEGIN_BYTES", 0)
    with opened(disk, keep_history_bytes=0) as db:
        for _ in range(3):
            db.put(b"k", bytes(9000))
            db.checkpoint()
        db.put(b"k", b"v")
    with opened(disk) as db:
        checkpointer = db.engine._checkpointer
        checkpointer.checkpoint_if_due("window")
        assert bases_of(db) == []
        assert checkpointer.checkpoint_if_due()
        assert bases_of(db) == [db.last_seqno]
        generation = db.engine._pages.meta.generation
        db.put(b"k", b"w")
        assert checkpointer.checkpoint_if_due()
        assert db.engine._pages.meta.generation == generation, "none is due"


@pytest.mark.parametrize(
    "failure",
    [kvwal.DiskFullError("full"), kvwal.CorruptionError("data", 4096, "damaged"), kvwal.RefusedError(12, "no memory")],
    ids=lambda failure: type(failure).__name__,
)
def test_what_keeps_an_open_from_beginning_the_window_is_left_to_a_checkpoint(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    with opened(disk, keep_history_bytes=0) as db:
        for _ in range(3):
            db.put(b"k", bytes(9000))
            db.checkpoint()

    def full(*args: object, **more: object) -> None:
        raise failure

    with opened(disk) as db:
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "merge_into", full)
            db.engine._checkpointer.checkpoint_if_due("window")
            assert bases_of(db) == []
        db.put(b"k", b"v")
        assert db.engine._checkpointer.checkpoint_if_due()
        assert bases_of(db) == [db.last_seqno]


def test_bytes_bound_the_window(disk: SimulatedDisk) -> None:
    most = 300_000
    with opened(disk, keep_history_bytes=most) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 3)
        while not db.window.oldest:
            fill(db, model, len(bases_of(db)))
            db.put(b"x", bytes(3000))
            model.append(dict(db))
            db.checkpoint()
        for _ in range(200):
            db.put(b"x", bytes(3000))
            model.append(dict(db))
            if len(model) % 5 == 0:
                db.checkpoint()
                # What one checkpoint adds is seen by the next one.
                assert db.window.held_bytes < most + 2 * TINY["segment_bytes"] + 5 * 4000
        window = db.window
        assert window.bases > 2
        assert window.oldest > 100
        with pytest.raises(SnapshotTooOld) as caught:
            db.snapshot(at=window.oldest - 1)
        assert caught.value.nearest == (None, window.oldest)
        for at in range(window.oldest, len(model), 11):
            with db.snapshot(at=at) as snapshot:
                assert dict(snapshot) == model[at]
        assert disk.used_bytes() - RESERVE_BYTES < 3 * most
    with opened(disk, keep_history_bytes=most) as db:
        assert bases_of(db)[0] == window.oldest, "the same after opening"


def test_age_bounds_the_window_but_not_what_is_younger(disk: SimulatedDisk) -> None:
    keep_s = 1000.0
    with opened(disk, keep_history_s=keep_s) as db:
        made: list[int] = []
        for number in range(120):
            disk.clock_us += 50_000_000
            made.append(disk.clock_us)
            db.put(b"k", b"%d" % number * 300)
            if number % 3 == 0:
                db.checkpoint()
            young = disk.clock_us - keep_s * 1e6
            oldest = db.window.oldest
            # All that is younger is there, and not much that is older: two checkpoints, and a base is due.
            assert not oldest or made[oldest - 1] <= young
        assert made[oldest - 1] > young - 50_000_000 * 60
        assert db.window.bases > 1


def test_a_clock_that_jumps_ahead_does_not_take_the_window(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_s=1000.0) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 4)
        disk.clock_us += 365 * 86_400 * 1_000_000
        for _ in range(3):
            db.put(b"k", b"v" * 2000)
            db.checkpoint()
        assert db.window.oldest == 0


def test_what_a_clock_made_that_stood_ahead_is_kept_for_longer(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_s=1000.0) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 3)
        before = bases_of(db)
        disk.jump_clock(365 * 86_400 * 1_000_000)
        fill(db, model, 5)
        disk.jump_clock(-365 * 86_400 * 1_000_000)
        disk.jump_clock(1_001_000_000)
        db.put(b"k", b"v")
        db.checkpoint()
        assert db.window.oldest == before[-1]
        times = [record.time_us for record in db.history()]
        assert times == sorted(times)


def test_what_a_clock_made_that_stood_behind_is_not_taken_for_old(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_s=1000.0) as db:
        db.put(b"k", b"v")
    ten_days_us = 10 * 86_400 * 1_000_000
    disk.jump_clock(-ten_days_us)
    model: list[dict[bytes, bytes]] = [{}, {b"k": b"v"}]
    with opened(disk, keep_history_s=1000.0) as db:
        fill(db, model, 4)
    disk.jump_clock(ten_days_us)
    with opened(disk, keep_history_s=1000.0) as db:
        db.put(b"k", b"w")
        db.checkpoint()
        assert db.window.oldest == 0


def test_bases_are_as_far_apart_as_is_asked_for(disk: SimulatedDisk) -> None:
    with opened(disk, history_base_bytes=100_000) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 4)
        logged = [record.size for record in db.history()]
        bases = bases_of(db)
        for first, last in pairwise(bases):
            assert 100_000 - 2 * TINY["segment_bytes"] < sum(logged[first:last]) < 150_000


def test_bases_of_a_large_store_are_further_apart(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TREES", 5)
    with opened(disk) as db:
        db.update({b"%d" % number: bytes(1000) for number in range(100)})
        db.checkpoint()
        for _ in range(300):
            db.put(b"k", bytes(1000))
            db.checkpoint()
        assert len(bases_of(db)) == 2


@pytest.mark.parametrize(
    ("free", "data", "most"), [(10**12, 0, 16 << 20), (10**12, 10**12, 256 << 20), (10**6, 0, 10**5)]
)
def test_what_is_kept_without_a_limit(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch, free: int, data: int, most: int
) -> None:
    kept = db.engine._keeping
    kept._keep_bytes = None
    monkeypatch.setattr(kept, "_free_bytes", lambda: free)
    monkeypatch.setattr(kept, "_data_bytes", lambda: data)
    assert kept._most_bytes() == most


def test_what_history_took_is_not_counted_as_data(disk: SimulatedDisk) -> None:
    # Else the default bound of the window, which is the data's size, grows with the window.
    rng = Random(5)
    keys = [b"%04d" % number for number in range(2000)]
    with opened(disk, keep_history_bytes=1 << 20, history_base_bytes=0) as db:
        db.update({key: rng.randbytes(100) for key in keys})
        db.checkpoint()
        kept, pages = db.engine._keeping, db.engine._pages
        before = kept._data_bytes()
        tree = sum(len(key) + 100 for key in keys)
        assert tree < before < 2 * tree
        for _ in range(40):
            db.update({rng.choice(keys): rng.randbytes(100) for _ in range(200)})
            db.checkpoint()
            assert before / 1.5 < kept._data_bytes() < 1.5 * before
        assert len(bases_of(db)) > 1
        for _ in range(len(bases_of(db))):
            kept.shorten()
        db.checkpoint()
        db.checkpoint()
        # Part of the file is free, and still data is what the tree takes.
        assert pages.space.free_pages() * 4096 > before / 2
        assert before / 1.5 < kept._data_bytes() < 1.5 * before
    with opened(disk, keep_history_bytes=1 << 20) as db:
        assert before / 1.5 < db.engine._keeping._data_bytes() < 1.5 * before


def test_a_checkpoint_does_not_ask_in_vain_for_free_space(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise OSError(errno.EIO, "no answer")

    kept = db.engine._keeping
    kept._keep_bytes = None
    monkeypatch.setattr(kept, "_free_bytes", fails)
    db[b"k"] = b"v"
    db.checkpoint()
    assert db.stats().checkpoint_seqno == 1


# -- a full disk, and a power cut --------------------------------------------------------------


def test_the_window_gives_way_on_a_full_disk_and_snapshots_after_it(disk: SimulatedDisk) -> None:
    with opened(disk, durability="commit", checkpoint_log_bytes=64 << 10) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 8)
        expected = dict(db)
        with db.snapshot() as now:
            disk.capacity = disk.used_bytes() + 600_000
            for number in range(1500):
                key = b"%d" % (number % 50)
                expected[key] = b"%d" % number * 500
                # One that finds no space, and nothing that gives way, is refused; the next one makes a checkpoint.
                assert works(lambda: db.put(key, expected[key])) or works(lambda: db.put(key, expected[key]))
            assert db.window.oldest > 0
            assert dict(db) == expected
            assert dict(now) == model[-1]
        check_store(db)


def test_a_write_that_meets_a_full_disk_does_not_cost_a_past_that_takes_no_space(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        db[b"k"] = b"1"
        disk.fail("pwrite", error=errno.ENOSPC, effect="part")
        assert not works(lambda: db.put(b"k", b"2" * 500))
        db[b"k"] = b"3"
        with db.snapshot(at=1) as snapshot:
            assert snapshot[b"k"] == b"1"


def test_the_log_is_held_until_the_flip_that_drops_a_base_is_durable(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(disk, keep_history_bytes=50_000) as db:
        write_slot = pagefile.write_slot
        seen: list[int] = []

        def writes(*arguments: Any) -> None:
            oldest = min([base.seqno for base in db.engine._pages.bases.all()], default=0)
            [hold] = [hold for hold in db.engine._log.holds() if hold.name == "window"]
            assert hold.after <= oldest
            seen.append(hold.after)
            write_slot(*arguments)

        monkeypatch.setattr(pagefile, "write_slot", writes)
        for _ in range(60):
            db.put(b"x", bytes(3000))
            db.checkpoint()
        assert len(set(seen)) > 3


def test_a_checkpoint_that_does_not_fit_takes_the_window_before_a_snapshot(disk: SimulatedDisk) -> None:
    def much(value: bytes) -> dict[bytes, bytes]:
        return {b"%04d" % number: value * 3000 for number in range(2000)}

    with opened(disk, segment_bytes=1 << 20, max_snapshot_bytes=1 << 40) as db:
        for value in (b"1", b"2", b"3", b"4"):
            db.update(much(value))
            db.checkpoint()
        with db.snapshot() as snapshot:
            db.update(much(b"5"))
            disk.capacity = disk.used_bytes()
            db.checkpoint()
            assert db.window.oldest > 0
            assert snapshot[b"0001"] == b"4" * 3000
        assert db[b"0001"] == b"5" * 3000


def test_a_checkpoint_of_nothing_makes_no_second_base_of_a_moment(db: kvwal.Store) -> None:
    model: list[dict[bytes, bytes]] = [{}]
    fill(db, model, 3)
    db.put(b"x", bytes(9000))
    db.compact()
    db.compact()
    assert len(set(bases_of(db))) == len(bases_of(db))


def test_a_power_cut_leaves_a_window_without_a_hole() -> None:
    def write(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk, durability="commit", keep_history_bytes=60_000) as db:
            for number in range(60):
                db.put(b"%d" % (number % 3), b"%d" % number * 500)
                acknowledged.append(dict(db))
                if number % 4 == 0:
                    db.checkpoint()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk, durability="commit", keep_history_bytes=60_000) as db:
            assert db.last_seqno >= len(acknowledged)
            window = db.window
            assert window.bases
            for at in range(window.oldest, len(acknowledged) + 1):
                with db.snapshot(at=at) as snapshot:
                    assert dict(snapshot) == ([{}, *acknowledged])[at]
            db.put(b"k", b"v")
            db.checkpoint()
            check_store(db)

    report = crash_every(write, check, states_per_point=3)
    assert report.points > 100


def test_times_are_told_in_utc(db: kvwal.Store, disk: SimulatedDisk) -> None:
    model: list[dict[bytes, bytes]] = [{}]
    db.engine._keeping._keep_bytes = 1
    fill(db, model, 1)
    while not db.window.oldest:
        db.put(b"x", bytes(3000))
        db.checkpoint()
    oldest_time = db.window.oldest_time
    assert oldest_time is not None
    assert oldest_time.tzinfo is UTC
    assert abs(oldest_time.timestamp() * 1e6 - disk.clock_us) < 60e6
