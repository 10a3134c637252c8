"""Past moments: each equals a model's, wherever the bases are; readers of them, and differences."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from past_fixtures import KEEP, LATE, bases_of, bases_wherever_there_is_log, db, disk, fill, holds_of, opened
from store_fixtures import TINY, check_store, interrupted_at, readers_in, run_threads

import kvwal
from kvwal import SnapshotTooOld
from kvwal.batch import WriteBatch
from kvwal.files.directory import SystemDirectory
from kvwal.files.file import SystemFile
from kvwal.pages import bases as page_bases
from kvwal.pages import pagefile
from kvwal.testing import SimulatedDisk
from kvwal.times import time_of

# Fixtures.
__all__ = ["bases_wherever_there_is_log", "db", "disk"]

TABLE = 16
Moment = dict[int, dict[bytes, bytes]]


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


def test_a_time_before_1970_is_before_the_first_commit(db: kvwal.Store) -> None:
    db.put(b"k", b"v", expire_s=1000)
    for at in (datetime.min.replace(tzinfo=UTC), datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC), time_of(0)):
        with db.snapshot(at=at) as snapshot:
            assert (snapshot.seqno, dict(snapshot), len(snapshot)) == (0, {}, 0)
        assert [(each.key, each.old, each.new) for each in db.diff(at)] == [(b"k", None, b"v")]
    db.revert(b"k", to=datetime(1900, 1, 1, tzinfo=UTC))
    assert b"k" not in db


@pytest.mark.parametrize("at", ["1", 1.5, True, b"1"])
def test_what_is_no_moment(db: kvwal.Store, at: Any) -> None:
    with pytest.raises(TypeError, match="at is a seqno, a position or a datetime, not"):
        db.snapshot(at=at)
    with pytest.raises(TypeError, match="to is a seqno, a position or a datetime, not"):
        db.revert(b"k", to=at)
    with pytest.raises(TypeError, match="a is a seqno, a position or a datetime, not"):
        db.diff(at)


def test_a_wrong_time_is_refused_by_the_name_of_the_argument(db: kvwal.Store) -> None:
    naive, to_come = datetime(2026, 1, 1), datetime.now(UTC) + timedelta(days=1)  # noqa: DTZ001  # it is what is wrong
    users = db.table("users", bytes, bytes)
    calls: dict[str, list[Callable[[datetime], object]]] = {
        "at": [lambda at: db.snapshot(at=at), users.at],
        "a": [db.diff, users.diff, lambda at: db.diff(at, 0)],
        "b": [lambda at: db.diff(0, at), lambda at: users.diff(0, at)],
        "to": [lambda at: db.revert(b"k", to=at), lambda at: users.revert(b"k", to=at)],
    }
    for name, named in calls.items():
        for call in named:
            with pytest.raises(ValueError, match=f"^{name} is 2026-01-01 00:00:00, which has no time zone"):
                call(naive)
            with pytest.raises(ValueError, match=f"^{to_come.isoformat()[:19]}.* is still to come"):
                call(to_come)


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

    with kvwal.open(tmp_path / "a.kv", **{**TINY, **LATE}, **KEEP, background=False) as db:
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


def test_a_time_before_the_window_is_refused(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_s=1000.0) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 3)
        db.engine.queue.run(lambda: db.engine._log._roll(0))
        db.checkpoint()
        oldest = db.last_seqno
        db.engine._keeping._oldest = oldest
        db.put(b"k", b"v")
        db.checkpoint()
        db.put(b"k", b"w")
        db.checkpoint()
        # The log begins right behind the oldest base, so that "before the log" is its moment.
        assert db.window.oldest == next(db.history()).seqno - 1 > 0
        calls: list[Callable[[datetime], object]] = [
            lambda at: db.snapshot(at=at),
            lambda at: db.revert(b"k", to=at),
            db.diff,
        ]
        for call in calls:
            with pytest.raises(SnapshotTooOld):
                call(datetime(2001, 1, 1, tzinfo=UTC))
    with opened(disk, keep_history_s=0) as db, pytest.raises(SnapshotTooOld):
        db.snapshot(at=datetime(2001, 1, 1, tzinfo=UTC))


# What reads files without a lock.
LOOKS_BACK: dict[str, Callable[[kvwal.Store], object]] = {
    "versions": lambda db: list(db.versions(b"01")),
    "diff": lambda db: list(db.diff(120)),
    "diff of a table": lambda db: list(db.table("t", bytes, bytes).diff(120)),
    "get": lambda db: db.snapshot(at=120).get(b"01"),
    "scan": lambda db: list(db.snapshot(at=120)),
    "time": lambda db: db.snapshot(at=datetime.now(UTC)),
    "changes": lambda db: list(db.changes()),
    "commits": lambda db: list(db.commits()),
    "history": lambda db: list(db.history()),
    "pins": lambda db: db.pins(),
    "stats": lambda db: db.stats(),
    "consumers": lambda db: db.consumers(),
    "consumer": lambda db: db.consumer(f"c{db.last_seqno}", start=datetime.now(UTC)),
}


@pytest.mark.parametrize("use", ["get", "len", "scan", "diff", "changes"])
def test_a_store_that_is_closed_says_so_to_who_reads_its_past(tmp_path: Path, use: str) -> None:
    db = kvwal.open(tmp_path / "a.kv", **KEEP, background=False, durability="os")
    for value in (b"v", b"w"):
        for number in range(1500):
            db.put(b"%05d" % number, value * 50)
        db.checkpoint()
        db.sync()
    snapshot = db.snapshot(at=2200)
    reading: Iterator[Any] = iter(())
    if use in ("scan", "diff", "changes"):
        begin: dict[str, Callable[[], Iterator[Any]]] = {
            "scan": snapshot.scan,
            "diff": lambda: db.diff(10),
            "changes": lambda: db.changes(previous=True),
        }
        reading = begin[use]()
        next(reading)
    db.close()
    with pytest.raises(kvwal.ClosedError):
        {"get": lambda: snapshot[b"00001"], "len": lambda: len(snapshot)}.get(use, lambda: list(reading))()


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("use", sorted(LOOKS_BACK))
def test_a_store_that_is_closed_as_files_are_read_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, at: int
) -> None:
    options = {**KEEP, "segment_bytes": 16 << 10, "checkpoint_log_bytes": 16 << 10, "durability": "os"}
    db = kvwal.open(tmp_path / "a.kv", **options, background=False)
    for number in range(300):
        db.put(b"%02d" % (number % 50), b"x" * 150)
        if number % 100 == 50:
            db.checkpoint()
    db.consumer("c", start="oldest").close()
    reader, left = threading.current_thread(), at

    def closing(call: Callable[..., Any]) -> Callable[..., Any]:
        def closed(*args: Any, **named: Any) -> Any:
            nonlocal left
            if threading.current_thread() is reader:
                left -= 1
                if not left:
                    thread = threading.Thread(target=db.close)
                    thread.start()
                    thread.join(10)
                    assert not thread.is_alive()
            return call(*args, **named)

        return closed

    for kind, names in ((SystemDirectory, ("open", "names")), (SystemFile, ("pread", "size"))):
        for name in names:
            monkeypatch.setattr(kind, name, closing(getattr(kind, name)))
    with pytest.raises(kvwal.ClosedError):
        for _ in range(50):
            LOOKS_BACK[use](db)
    assert left <= 0


def test_a_store_that_is_closed_before_its_proof_begins_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = kvwal.open(tmp_path / "a.kv", **KEEP, background=False)
    db.update({b"%d" % number: b"v" for number in range(100)})
    db.checkpoint()
    checkpointer: Any = db.engine.upkeep._checkpointer
    while_idle = checkpointer.while_idle

    def closed(action: Callable[[], Any]) -> Any:
        db.close()
        return while_idle(action)

    monkeypatch.setattr(checkpointer, "while_idle", closed)
    with pytest.raises(kvwal.ClosedError):
        db.verify()


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


def test_what_is_committed_while_a_difference_is_asked_for_is_not_missed(disk: SimulatedDisk) -> None:
    """Its first moment was the newest, whose reader holds no log."""
    with opened(disk, keep_history_s=0) as db:
        db.put(b"a", b"1")
        moments = db.engine.reads.moments
        reader = moments.reader

        def late(*arguments: Any, **named: Any) -> Any:
            if moments.readers.all():
                moments.reader = reader  # type: ignore[method-assign]
                db.put(b"new", b"1")
            return reader(*arguments, **named)

        moments.reader = late  # type: ignore[method-assign]
        differences = db.diff(db.last_seqno)
        for number in range(60):
            db.put(b"z", b"%d" % number * 400)
            if number % 10 == 0:
                db.checkpoint()
        assert list(differences) == [(b"new", None, b"1")]
        db.checkpoint()
        assert holds_of(db) == []


def calls_of(function: Callable[[], object]) -> int:
    """How many calls of functions it takes."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def test_deleted_ranges_cost_in_proportion_to_their_number() -> None:
    found = []
    for number in (50, 400):
        with opened(SimulatedDisk(), segment_bytes=1 << 20) as db:
            db.update({b"%04d" % key: b"v" for key in range(2 * number)})
            at = db.last_seqno
            for key in range(number):
                db.delete_range(b"%04d" % (2 * key), b"%04d" % (2 * key + 1))
            alone = db.last_seqno
            batch = WriteBatch()
            for key in range(number):
                batch.delete_range(b"%04d" % (2 * key + 1), b"%04d" % (2 * key + 2))
            db.commit(batch)
            db.sync()
            last = db.last_seqno
            assert len(list(db.diff(at, alone))) == number
            cases: list[Callable[[], object]] = [
                lambda at=at, alone=alone: list(db.diff(at, alone)),  # type: ignore[misc]  # its types are these
                lambda alone=alone, last=last: list(db.diff(alone, last)),  # type: ignore[misc]  # as above
                lambda at=at: list(db.changes(at, expand=True)),  # type: ignore[misc]  # as above
            ]
            found.append([calls_of(each) for each in cases])
    for few, many in zip(*found, strict=True):
        assert many < 8 * 2 * few


def test_a_difference_of_the_newest_commits_does_not_look_at_all_keys_of_their_segment() -> None:
    found = []
    for number in (100, 2000):
        with opened(SimulatedDisk(), segment_bytes=1 << 20) as db:
            for key in range(number):
                db[b"%05d" % key] = b"v"
            at = db.last_seqno
            list(db.diff(at - 1))
            db[b"new"] = b"1"
            db[b"newer"] = b"2"
            assert [each.key for each in db.diff(at, at + 1)] == [b"new"]
            db[b"newest"] = b"3"
            found.append(calls_of(lambda at=at: list(db.diff(at))))  # type: ignore[misc]  # its type is this
    few, many = found
    assert many < 2 * few


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


def test_one_that_was_given_up_holds_no_log(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=50_000, max_snapshot_bytes=100_000) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 2)
        held = db.snapshot(at=2)
        for _ in range(100):
            db.put(b"x", bytes(3000))
            db.checkpoint()
        assert holds_of(db) == ["window"]
        assert db.engine._log.segments()[0].first_seqno > 10
        held.close()


def test_one_that_is_closed_does_not_cost_the_window_on_a_full_disk(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 8)
        db.snapshot(at=0).close()
        db.snapshot(at=db.window.oldest + 3).close()
        assert db.engine._checkpointer.free_space()
        assert db.window.bases > 2
        assert db.window.oldest > 0


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


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_that_drops_a_base_may_be_interrupted_in_its_flip(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    with opened(disk, keep_history_bytes=50_000, background=background) as db:
        model: list[dict[bytes, bytes]] = [{}]
        fill(db, model, 3)
        write_slot, interrupted, main = pagefile.write_slot, [], threading.main_thread()

        def writes(*arguments: Any) -> None:
            write_slot(*arguments)
            pages: Any = db.engine._pages
            if {*pages.bases.generations()} - {base.generation for base in pages._next[2].bases}:
                # The background thread, where there is one, may come first.
                interrupted.append(threading.current_thread())
                if interrupted.count(main) == 1 and interrupted[-1] is main:
                    raise KeyboardInterrupt

        monkeypatch.setattr(pagefile, "write_slot", writes)
        for _ in range(60):
            db.put(b"x", bytes(3000))
            with suppress(KeyboardInterrupt):
                db.checkpoint()
        assert len(interrupted) > 1
        assert main in interrupted
        assert db.window.oldest > 0
        check_store(db)


def test_bases_that_could_not_be_read_at_the_open_are_not_lost(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: list[dict[bytes, bytes]] = [{}]
    with opened(disk) as db:
        fill(db, model, 4)
        expected = bases_of(db)
    read_table = page_bases.read_table

    def fails(*arguments: Any) -> Any:
        monkeypatch.setattr(page_bases, "read_table", read_table)
        raise OSError(errno.EIO, "not now")

    monkeypatch.setattr(page_bases, "read_table", fails)
    with opened(disk) as db:
        assert bases_of(db) == []
        for _ in range(2):
            db.put(b"k", b"v")
            db.checkpoint()
        assert bases_of(db)[: len(expected)] == expected
        with db.snapshot(at=3) as snapshot:
            assert dict(snapshot) == model[3]


