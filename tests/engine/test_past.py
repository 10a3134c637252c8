"""Past moments: each equals a model's, wherever the bases are; what is kept for them, and when it goes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import TINY, check_store, interrupted_at, readers_in, run_threads

import kvwal
from kvwal import SnapshotTooOld
from kvwal.batch import WriteBatch
from kvwal.engine import keeping
from kvwal.options import RESERVE_BYTES
from kvwal.testing import SimulatedDisk, crash_every
from kvwal.times import time_of

KEEP: dict[str, Any] = {"keep_history_s": 1e6, "keep_history_bytes": 1 << 30, "history_base_bytes": 0}
# No checkpoint by itself.
LATE = {"memtable_bytes": 1 << 30, "checkpoint_log_bytes": 1 << 30}
TABLE = 16
Moment = dict[int, dict[bytes, bytes]]


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, **LATE, "background": False, "durability": "os", **KEEP, **options})


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with opened(disk) as store:
        yield store


@pytest.fixture(autouse=True)
def bases_wherever_there_is_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TREES", 0)


def bases_of(db: kvwal.Store) -> list[int]:
    return [base.seqno for base in db.engine._keeping.bases]


def holds_of(db: kvwal.Store) -> list[str]:
    return sorted(hold.name for hold in db.engine._log.holds())


def works(function: Callable[[], object]) -> bool:
    try:
        function()
    except kvwal.DiskFullError:
        return False
    return True


def fill(db: kvwal.Store, model: list[dict[bytes, bytes]], bases: int) -> None:
    """Commits until the window has this number of bases; notes what there is after each, by seqno."""
    while len(bases_of(db)) < bases:
        number = len(model)
        db.put(b"%d" % (number % 7), b"%d" % number * 400)
        model.append(dict(db))
        if number % 5 == 0:
            db.checkpoint()
        assert number < 2000


# -- what is read ------------------------------------------------------------------------------


def read_table(db: kvwal.Store, at: int, table: int) -> dict[bytes, bytes]:
    reader = db.engine.upkeep.past.reader(kvwal.Seqno(at), "test")
    reads = db.engine.reads
    chunks = reads.chunks(reads.moments.again(reader, "test"), None, None, reverse=True, table=table)
    found = {key: value for keys, values in chunks for key, value in zip(keys, values, strict=True)}
    assert list(found) == sorted(found, reverse=True)
    for key in [*found, b"", b"zz"]:
        assert reads.read_at(reader, key, table=table) == found.get(key)
    assert reads.count_at(reader, None, None, table=table) == len(found)
    reader.release()
    return found


INTENT = st.tuples(
    st.sampled_from([0, 0, TABLE]),
    st.sampled_from(["put", "put", "put", "delete", "range"]),
    st.integers(0, 11),
    st.integers(0, 600),
)
STEP = st.one_of(st.lists(INTENT, min_size=1, max_size=4), st.sampled_from(["checkpoint", "reopen"]))


@given(st.lists(STEP, min_size=1, max_size=60))
@settings(max_examples=60)
def test_each_moment_of_the_window_is_what_it_was(steps: list[Any]) -> None:
    disk = SimulatedDisk()
    db = opened(disk)
    now: Moment = {0: {}, TABLE: {}}
    moments = [{table: dict(part) for table, part in now.items()}]
    for step in steps:
        if step == "checkpoint":
            db.checkpoint()
        elif step == "reopen":
            db.close()
            db = opened(disk)
        else:
            batch = WriteBatch()
            for table, kind, number, other in step:
                part, key = batch.table(table) if table else batch, b"%02d" % number
                if kind == "put":
                    part.put(key, b"%d" % other * 20)
                elif kind == "delete":
                    part.delete(key)
                else:
                    part.delete_range(key, b"%02d" % (other % 12))
            db.commit(batch)
            if db.last_seqno == len(moments):
                after = {table: read_table(db, db.last_seqno, table) for table in now}
                moments.append(after)
    assert db.window.oldest == 0
    for at, moment in enumerate(moments):
        for table in (0, TABLE):
            assert read_table(db, at, table) == moment[table]
        with db.snapshot(at=at) as snapshot:
            assert dict(snapshot) == moment[0]
            assert list(snapshot.scan(b"03", b"08")) == sorted(snapshot.scan(b"03", b"08", reverse=True))
    for a in range(len(moments)):
        b = (a * 7) % len(moments)
        expected = sorted(set(moments[a][TABLE].items()) ^ set(moments[b][TABLE].items()))
        found = list(db.diff(a, b, table=TABLE))
        assert [key for key, _, _ in found] == sorted({key for key, _ in expected})
        for key, old, new in found:
            assert (old, new) == (moments[a][TABLE].get(key), moments[b][TABLE].get(key))
        assert list(db.diff(a, b, table=TABLE, reverse=True)) == found[::-1]
    check_store(db)
    db.close()


def test_a_moment_stays_while_commits_checkpoints_and_compaction_go_on(db: kvwal.Store) -> None:
    model = [dict(db)]
    fill(db, model, 3)
    held = {at: db.snapshot(at=at) for at in range(0, len(model), 9)}
    fill(db, model, 6)
    db.compact()
    for at, snapshot in held.items():
        assert dict(snapshot) == model[at]
        snapshot.close()


def test_the_newest_moment_is_an_ordinary_snapshot(db: kvwal.Store) -> None:
    db[b"k"] = b"v"
    with db.snapshot(at=1) as snapshot:
        assert type(snapshot.reader.version) is type(db.engine.state.version)
        db[b"k"] = b"w"
        assert snapshot[b"k"] == b"v"


def test_a_moment_by_its_time(disk: SimulatedDisk) -> None:
    times = []
    with opened(disk) as db:
        for number in range(30):
            disk.clock_us += 1_000_000
            db.put(b"k", b"%d" % number)
            times.append(time_of(next(db.history(after=number)).time_us))
        disk.clock_us += 1_000_000
        for number, time in enumerate(times):
            for later in (timedelta(0), timedelta(seconds=0.5)):
                with db.snapshot(at=time + later) as snapshot:
                    assert snapshot.seqno == number + 1
        with db.snapshot(at=times[0] - timedelta(days=1)) as snapshot:
            assert (snapshot.seqno, dict(snapshot)) == (0, {})
        with pytest.raises(ValueError, match="still to come"):
            db.snapshot(at=times[-1] + timedelta(days=1))
        with pytest.raises(ValueError, match="time zone"):
            db.snapshot(at=datetime(2026, 1, 1))  # noqa: DTZ001  # that is what is wrong with it


@pytest.mark.parametrize("at", ["1", 1.5, True, b"1"])
def test_what_is_no_moment(db: kvwal.Store, at: Any) -> None:
    with pytest.raises(TypeError, match="at is an int"):
        db.snapshot(at=at)
    with pytest.raises(TypeError, match="to is an int"):
        db.revert(b"k", to=at)
    with pytest.raises(TypeError, match="a is an int"):
        db.diff(at)


def test_a_commit_that_is_not_there_yet(db: kvwal.Store) -> None:
    db[b"k"] = b"v"
    with pytest.raises(ValueError, match="no commit 2; the newest is 1"):
        db.snapshot(at=2)
    with pytest.raises(ValueError, match="at least 0"):
        db.snapshot(at=-1)
    assert readers_in(db.pins()) == []


def test_the_tables_of_the_store_have_no_past(db: kvwal.Store) -> None:
    with pytest.raises(ValueError, match="the store's own"):
        db.diff(0, table=1)
    with pytest.raises(ValueError, match="the store's own"):
        db.revert(b"k", to=0, table=1)


def test_a_store_that_is_read_only_has_its_window(disk: SimulatedDisk) -> None:
    model: list[dict[bytes, bytes]] = [{}]
    with opened(disk) as db:
        fill(db, model, 3)
        window = db.window
    with opened(disk, keep_history_bytes=0, flag="r") as db:
        assert (db.window.oldest, db.window.newest, db.window.bases) == (window.oldest, window.newest, window.bases)
        for at in range(0, len(model), 7):
            with db.snapshot(at=at) as snapshot:
                assert dict(snapshot) == model[at]


def test_a_store_that_is_closed_keeps_no_file_open(tmp_path: Path) -> None:
    def links() -> list[str]:
        found = []
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return [each for each in found if str(tmp_path) in each]

    with kvwal.open(tmp_path / "a.kv", **TINY, **KEEP) as db:
        for number in range(100):
            db.put(b"%d" % (number % 10), bytes(700), durability="os")
    for flag in ("r", "w"):
        db = kvwal.open(tmp_path / "a.kv", flag)
        with db.snapshot(at=20) as snapshot:
            assert len(snapshot) == 10
            assert snapshot[b"1"] == bytes(700)
        assert [each for each in links() if ".log" in each]
        db.close()
        assert links() == []


# -- diff and revert ---------------------------------------------------------------------------


def test_what_is_different_between_two_moments(db: kvwal.Store) -> None:
    db.update({b"a": b"1", b"b": b"2", b"c": b"3", b"d": b"4"})
    db.delete_range(b"c", None)
    db.update({b"a": b"9", b"b": b"2"})
    assert list(db.diff(1, 3)) == [(b"a", b"1", b"9"), (b"c", b"3", None), (b"d", b"4", None)]
    assert list(db.diff(3, 1)) == [(b"a", b"9", b"1"), (b"c", None, b"3"), (b"d", None, b"4")]
    assert list(db.diff(1, reverse=True)) == [(b"d", b"4", None), (b"c", b"3", None), (b"a", b"1", b"9")]
    assert list(db.diff(1, prefix=b"c")) == [(b"c", b"3", None)]
    assert list(db.diff(1, start=b"b", stop=b"d")) == [(b"c", b"3", None)]
    assert list(db.diff(3, 3)) == list(db.diff(3)) == []
    assert readers_in(db.pins()) == []
    db.close()
    with pytest.raises(kvwal.ClosedError):
        db.diff(1)


def test_a_key_is_brought_back(db: kvwal.Store) -> None:
    db[b"k"] = b"1"
    db.checkpoint()
    del db[b"k"]
    assert db.revert(b"k", to=1, meta={"why": "by mistake"}) == 3
    assert db[b"k"] == b"1"
    assert [record.meta() for record in db.history(after=2)] == [{"why": "by mistake"}]
    assert db.revert(b"k", to=2) == 4
    assert b"k" not in db
    assert db.revert(b"k", to=0) == 5, "a commit, whether it changes anything or not"


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


def test_a_clock_that_was_wrong_as_a_base_was_made_keeps_only_until_the_next_one(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_s=1000.0) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 3)
        disk.jump_clock(365 * 86_400 * 1_000_000)
        fill(db, model, 4)
        disk.jump_clock(-365 * 86_400 * 1_000_000)
        fill(db, model, 5)
        bases = bases_of(db)
        disk.jump_clock(1_001_000_000)
        db.put(b"k", b"v")
        db.checkpoint()
        assert db.window.oldest == bases[-1]
        times = [record.time_us for record in db.history()]
        assert times == sorted(times)


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


def test_a_checkpoint_does_not_ask_in_vain_for_free_space(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise OSError(errno.EIO, "no answer")

    kept = db.engine._keeping
    kept._keep_bytes = None
    monkeypatch.setattr(kept, "_free_bytes", fails)
    db[b"k"] = b"v"
    db.checkpoint()
    assert db.stats().checkpoint_seqno == 1


# -- readers of past moments -------------------------------------------------------------------


def test_a_snapshot_outlives_the_window_and_is_let_go_of(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=50_000) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 2)
        held = db.snapshot(at=2)
        again = db.snapshot(at=3)
        assert holds_of(db) == ["snapshot", "window"], "one hold for one base"
        while db.window.oldest < 20:
            db.put(b"x", bytes(3000))
            db.checkpoint()
        with pytest.raises(SnapshotTooOld):
            db.snapshot(at=2)
        assert (dict(held), dict(again)) == (model[2], model[3])
        segments = len(db.engine._log.segments())
        held.close()
        again.close()
        for _ in range(3):
            db.put(b"x", bytes(3000))
            db.checkpoint()
        assert holds_of(db) == ["window"]
        assert len(db.engine._log.segments()) < segments
        assert db.engine._pages.pins.counts() == {db.engine._pages.meta.generation: 1}


def test_a_snapshot_of_the_past_that_holds_too_much_is_given_up(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=50_000, max_snapshot_bytes=200_000) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 2)
        held = db.snapshot(at=2)
        for _ in range(200):
            db.put(b"x", bytes(3000))
            db.checkpoint()
        with pytest.raises(SnapshotTooOld, match="max_snapshot_bytes"):
            held.get(b"1")
        with pytest.raises(SnapshotTooOld, match="max_snapshot_bytes"):
            list(held.scan())
        with pytest.raises(SnapshotTooOld, match="max_snapshot_bytes"):
            len(held)
        held.close()
        assert holds_of(db) == ["window"]


def test_one_within_the_window_is_not_given_up_for_it(disk: SimulatedDisk) -> None:
    with opened(disk, max_snapshot_bytes=0) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 2)
        with db.snapshot(at=2) as held:
            fill(db, model, 5)
            assert dict(held) == model[2]


def test_moments_are_opened_while_the_window_moves(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=50_000) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 2)
        done: list[int] = []

        def write() -> None:
            for _ in range(150):
                model.append({**model[-1], b"x": b"%d" % len(model) * 700})
                db.put(b"x", model[-1][b"x"])
                db.checkpoint()
            done.append(1)

        def read() -> None:
            random, tried = Random(1), 0
            while not done or not tried:
                at = random.randrange(db.window.oldest, db.last_seqno + 1)
                try:
                    with db.snapshot(at=at) as snapshot:
                        assert dict(snapshot) == model[at]
                    tried += 1
                except SnapshotTooOld as error:
                    assert error.oldest > at

        run_threads(write, read, read)


def test_interrupted_anywhere_nothing_stays_held(disk: SimulatedDisk) -> None:
    db = opened(disk)
    model: list[dict[bytes, bytes]] = [{}]
    fill(db, model, 3)
    step = 1
    while True:

        def look() -> None:
            with db.snapshot(at=7) as snapshot:
                assert snapshot.get(b"1") == model[7][b"1"]

        if (interruption := interrupted_at(step, look)) is None:
            break
        del interruption
        assert readers_in(db.pins()) == []
        with db.snapshot(at=7) as snapshot:
            assert dict(snapshot) == model[7]
        step = step + 1 if step < 400 else int(step * 1.05)
    assert step > 100
    db.engine._succession.release_pages()
    assert holds_of(db) == ["window"]
    db.close()


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
