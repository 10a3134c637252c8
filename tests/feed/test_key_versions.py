"""The versions of a key: against a model, with indexes that are there, lost, damaged or being made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import TINY, interrupted_at, run_threads, wait_until

import kvwal
from kvwal import ClosedError, CorruptionError, ForkedError, KeyVersion, SnapshotTooOld
from kvwal.batch import WriteBatch
from kvwal.files.names import keys_name, numbers, segment_name
from kvwal.log import keys as log_keys
from kvwal.testing import SimulatedDisk, crash_every

# No checkpoint by itself.
LATE = {"memtable_bytes": 1 << 30, "checkpoint_log_bytes": 1 << 30}
KEYS = [b"", b"a", b"a1", b"a2", b"b", b"b1", b"c"]
Plain = tuple[int, str, bytes | None]


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, "keep_history_bytes": 1 << 30, **options})


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with opened(disk) as store:
        yield store


def plain(versions: Any) -> list[Plain]:
    return [(version.seqno, version.kind, version.value) for version in versions]


def log_of(db: kvwal.Store) -> Any:
    return db.engine._log


def fill(db: kvwal.Store, segments: int) -> list[Plain]:
    """Several segments; returns the versions of b"k"."""
    expected: list[Plain] = []
    number = 0
    while len(log_of(db).segments()) <= segments:
        number += 1
        db.put(b"other%d" % number, bytes(700))
        if number % 5 == 0:
            expected.append((db.put(b"k", b"%d" % number), "put", b"%d" % number))
        if number % 23 == 0:
            expected.append((db.delete(b"k"), "delete", None))
        if number % 31 == 0:
            expected.append((db.delete_range(b"j", b"l"), "range", None))
    return expected


def key_files(disk: SimulatedDisk) -> list[str]:
    return sorted(name for name in disk.open_directory("/kv").names() if name.endswith(".keys"))


def make_indexes(db: kvwal.Store) -> None:
    for _ in log_of(db).key_history.make_indexes():
        pass


# -- against a model ---------------------------------------------------------------------------

writes = st.tuples(st.sampled_from([0, 0, 16]), st.sampled_from("pppdr"), st.sampled_from(KEYS), st.sampled_from(KEYS))
commits = st.tuples(st.just("commit"), st.lists(writes, min_size=1, max_size=4))
steps = st.one_of(
    commits,
    commits,
    commits,
    st.tuples(st.just("ask"), st.sampled_from(KEYS)),
    st.tuples(st.just("lose"), st.integers(0, 1 << 16)),
    st.tuples(st.just("damage"), st.integers(0, 1 << 16)),
    st.sampled_from([("checkpoint",), ("reopen",), ("crash",), ("make",), ("read-only",)]),
)


class Model:
    """What each commit made of each key, plainly."""

    def __init__(self) -> None:
        self.commits: list[dict[tuple[int, bytes], tuple[str, bytes | None]]] = []

    def commit(self, intents: Any) -> WriteBatch:
        number = len(self.commits)
        batch = WriteBatch()
        changed: dict[tuple[int, bytes], tuple[str, bytes | None]] = {}
        for table, kind, key, other in intents:
            part = batch.table(table) if table else batch
            if kind == "p":
                value = b"%d:" % number + other * 400
                part.put(key, value)
                changed[table, key] = ("put", value)
            elif kind == "d":
                part.delete(key)
                changed[table, key] = ("delete", None)
            else:
                part.delete_range(key, other or None)
                for each in KEYS:
                    if key <= each and (not other or each < other):
                        changed[table, each] = ("range", None)
        if len(batch):
            self.commits.append(changed)
        return batch

    def versions(self, table: int, key: bytes, since: int, until: int) -> list[Plain]:
        return [
            (seqno, *self.commits[seqno - 1][table, key])
            for seqno in range(max(since, 1), min(until, len(self.commits)) + 1)
            if (table, key) in self.commits[seqno - 1]
        ]


def agree(db: kvwal.Store, model: Model, keys: list[bytes], random: Random) -> None:
    oldest = next(db.history()).seqno if model.commits else 1
    for table in (0, 16):
        for key in keys:
            expected = model.versions(table, key, oldest, len(model.commits))
            assert plain(db.versions(key, table=table)) == expected[::-1]
            assert plain(db.versions(key, table=table, reverse=False)) == expected
            since = random.randint(oldest, len(model.commits) + 2)
            until = random.randint(0, len(model.commits) + 2)
            limit = random.randint(0, 3)
            part = model.versions(table, key, since, until)
            asked: dict[str, Any] = {"table": table, "since": since, "until": until, "limit": limit}
            assert plain(db.versions(key, **asked)) == part[::-1][:limit]
            assert plain(db.versions(key, reverse=False, **asked)) == part[:limit]
    if oldest > 1:
        with pytest.raises(SnapshotTooOld) as failure:
            db.versions(b"a", since=oldest - 1)
        assert (failure.value.asked, failure.value.oldest) == (oldest - 1, oldest)
        assert failure.value.newest >= db.last_seqno


def damage(disk: SimulatedDisk, drawn: int) -> None:
    files = key_files(disk)
    if files:
        path = f"/kv/{files[drawn % len(files)]}"
        size = len(disk.read(path))
        if drawn % 3:
            disk.flip(path, drawn % size if size else 0)
        else:
            disk.cut(path, drawn % (size + 1))


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=60), st.sampled_from([1 << 30, 40_000, 0]), st.integers(0, 1 << 32))
def test_the_versions_of_a_key_are_those_of_the_model(program: list[Any], retained: int, seed: int) -> None:
    disk, random, model = SimulatedDisk(seed=seed), Random(seed), Model()
    options = {"keep_history_bytes": retained}
    db = opened(disk, **options)
    for step in program:
        if step[0] == "commit":
            batch = model.commit(step[1])
            if len(batch):
                db.commit(batch)
        elif step[0] == "ask":
            agree(db, model, [step[1]], random)
        elif step[0] == "lose":
            files = key_files(disk)
            if files:
                disk.remove(f"/kv/{files[step[1] % len(files)]}")
        elif step[0] == "damage":
            damage(disk, step[1])
        elif step[0] == "make":
            make_indexes(db)
        elif step[0] == "checkpoint":
            db.checkpoint()
            segments = {segment.first_seqno for segment in log_of(db).segments()}
            assert {found[0] for name in key_files(disk) if (found := numbers(name))} <= segments
        elif step[0] == "crash":
            crashed = disk.crash(Random(seed))
            db.close()
            disk = crashed
            db = opened(disk, **options)
            assert db.last_seqno == len(model.commits)
        else:
            db.close()
            if step[0] == "read-only":
                with opened(disk, **options, flag="r") as reading:
                    agree(reading, model, [random.choice(KEYS)], random)
            db = opened(disk, **options)
    agree(db, model, KEYS, random)
    assert db.verify().ok
    db.close()


# -- what it costs -----------------------------------------------------------------------------


def test_ten_versions_of_a_key_among_64_segments_are_at_most_128_preads() -> None:
    disk = SimulatedDisk()
    with opened(disk, **LATE) as db:
        fill(db, 20)
        expected = [(db.put(b"rare", b"0"), "put", b"0")]
        while len(log_of(db).segments()) <= 64:
            db.put(b"other", bytes(700))
            if len(log_of(db).segments()) % 6 == 0 and len(expected) * 6 < len(log_of(db).segments()) - 6:
                expected.append((db.put(b"rare", b"n"), "put", b"n"))
        while len(expected) < 10:
            expected.append((db.put(b"rare", b"m"), "put", b"m"))
        make_indexes(db)
        list(db.versions(b"other1"))
        disk.trace = []
        assert plain(db.versions(b"rare", reverse=False)) == expected
        # The newest segment has the last of them, if any, and is read no more than once.
        assert sum(operation.name == "pread" for operation in disk.trace) <= 128
        disk.trace.clear()
        assert len(list(db.versions(b"rare", limit=1))) == 1
        assert sum(operation.name == "pread" for operation in disk.trace) <= 20
        disk.trace = None


def test_an_index_has_at_most_24_bytes_for_each_intent(db: kvwal.Store, disk: SimulatedDisk) -> None:
    with db.batch() as batch:
        for number in range(2000):
            batch.put(b"%d" % number, b"v")
    fill(db, 3)
    make_indexes(db)
    assert len(disk.read(f"/kv/{keys_name(1)}")) < 2100 * 24


def test_the_newest_segment_is_read_on_from_where_it_was_read(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"1")
    list(db.versions(b"k"))
    seqno = db.put(b"k", b"2")
    [(_, _, place)] = log_of(db).key_history._keys._tables.values()
    assert place.last_seqno == 1
    assert plain(db.versions(b"k", limit=1)) == [(seqno, "put", b"2")]
    assert place.last_seqno == 2
    assert plain(db.versions(b"k", until=1)) == [(1, "put", b"1")]


# -- indexes -----------------------------------------------------------------------------------


def test_a_store_that_keeps_no_log_has_no_index_made_until_versions_are_asked_for(tmp_path: Path) -> None:
    for kept in (0, 1 << 30):
        path = tmp_path / f"{kept}.kv"
        with kvwal.open(path, **{**TINY, **LATE}, keep_history_bytes=kept) as db:
            fill(db, 4)
            firsts = [segment.first_seqno for segment in log_of(db).segments()]
            made = [path / keys_name(first) for first in firsts[:-1]]
            if kept:
                wait_until(lambda: all(file.exists() for file in made), "the indexes")
            assert not (path / keys_name(firsts[-1])).exists()
            if not kept:
                assert not any(file.exists() for file in made)
                list(db.versions(b"k"))
                assert all(file.exists() for file in made)


def test_closing_a_store_whose_indexes_are_being_made_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "db.kv"
    with kvwal.open(path, **{**TINY, **LATE}, durability="os") as db:
        expected = fill(db, 30)
    for _ in range(5):
        db = kvwal.open(path, **TINY, keep_history_bytes=1 << 30)
        wait_until(lambda: any(path.glob("*.keys*")), "the first index")
        db.close()
        assert not list(path.glob("*.tmp"))
        for file in path.glob("*.keys"):
            file.unlink()
    with kvwal.open(path, **TINY, keep_history_bytes=1 << 30) as db:
        wait_until(lambda: len(list(path.glob("*.keys"))) == len(log_of(db).segments()) - 1, "all indexes")
        assert plain(db.versions(b"k", reverse=False)) == expected


def test_other_jobs_run_while_indexes_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_INDEXING_S", "_BUSY_INDEXING_S"):
        monkeypatch.setattr(f"kvwal.engine.background.{name}", 0.0)
    runs = []
    with kvwal.open(tmp_path / "db.kv", **{**TINY, **LATE}, durability="os", keep_history_bytes=1 << 30) as db:
        background: Any = db.engine._background
        jobs = background._jobs
        assert jobs[-1].name == "key indexes"
        background._jobs = (*jobs[:-2], replace(jobs[-2], run=lambda: runs.append(None)), jobs[-1])
        fill(db, 10)
        firsts = [segment.first_seqno for segment in log_of(db).segments()[:-1]]
        wait_until(lambda: all((tmp_path / "db.kv" / keys_name(first)).exists() for first in firsts), "the indexes")
    # One step at a time, of which each segment has several.
    assert len(runs) > 2 * len(firsts)


def test_indexes_go_with_their_segments(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=20_000, **LATE) as db:
        fill(db, 6)
        make_indexes(db)
        for _ in range(3):
            db.put(b"x", b"")
            db.checkpoint()
        segments = [segment.first_seqno for segment in log_of(db).segments()]
        assert segments[0] > 1
        assert key_files(disk) == [keys_name(first) for first in segments[:-1]]
    with opened(disk, flag="n"):
        assert key_files(disk) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="descriptors are not listed")
def test_no_file_of_a_segment_that_was_removed_or_of_a_log_that_was_closed_stays_open(tmp_path: Path) -> None:
    def opened_files() -> set[str]:
        links = set()
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                links.add(os.readlink(f"/proc/self/fd/{fd}"))
        # Those of other tests may wait for the collector.
        names = {os.path.basename(link) for link in links if link.startswith(str(tmp_path))}
        return {name for name in names if ".keys" in name or ".log" in name}

    with kvwal.open(tmp_path / "db.kv", **{**TINY, **LATE}, background=False, keep_history_bytes=20_000) as db:
        expected = fill(db, 6)
        make_indexes(db)
        newest = segment_name(log_of(db).segments()[-1].first_seqno)
        assert plain(db.versions(b"k", reverse=False)) == expected
        assert len(opened_files()) > 6
        for _ in range(3):
            db.put(b"x", b"")
            db.checkpoint()
        kept = {segment.first_seqno for segment in log_of(db).segments()}
        assert {int(name.split(".")[0]) for name in opened_files()} <= kept
        assert not [name for name in opened_files() if "deleted" in name]
        assert newest in opened_files()
    assert opened_files() == set()


def test_an_index_of_a_segment_that_was_retired_meanwhile_does_not_stay(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=0, **LATE) as db:
        fill(db, 6)
        making = log_of(db).key_history.make_indexes()
        while not any(name.endswith(".keys.tmp") for name in disk.open_directory("/kv").names()):
            next(making)
        db.checkpoint()
        db.put(b"x", b"")
        db.checkpoint()
        assert log_of(db).segments()[0].first_seqno > 1
        list(making)
        segments = [segment.first_seqno for segment in log_of(db).segments()]
        assert key_files(disk) == [keys_name(first) for first in segments[:-1]]


def test_two_keys_of_the_same_hash_are_told_apart(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_keys, "blake2b", lambda data, digest_size: _Same())
    expected = fill(db, 4)
    make_indexes(db)
    assert plain(db.versions(b"k", reverse=False)) == expected
    assert [version.value for version in db.versions(b"other3")] == [bytes(700)]
    assert list(db.versions(b"never")) == []
    with db.batch() as batch:
        batch.put(b"k", b"one of two")
        batch.put(b"l", b"the other")
    fill(db, len(log_of(db).segments()))
    assert [version.value for version in db.versions(b"k")].count(b"one of two") == 1


class _Same:
    def digest(self) -> bytes:
        return b"123456"


@pytest.mark.parametrize("reverse", [True, False])
def test_a_block_that_is_damaged_between_two_versions_is_noticed(
    disk: SimulatedDisk, reverse: bool
) -> None:
    # Several blocks in a segment.
    db = opened(disk, **{**LATE, "segment_bytes": 1 << 17})
    expected = [(db.put(b"k", b"%d" % number), "put", b"%d" % number) for number in range(4000)]
    fill(db, 2 + len(log_of(db).segments()))
    make_indexes(db)
    found = db.versions(b"k", reverse=reverse, until=4000)
    first = [next(found) for _ in range(3)]
    for name in key_files(disk):
        size = len(disk.read(f"/kv/{name}"))
        for at in range(60, size, 50):
            disk.flip(f"/kv/{name}", at)
    assert plain([*first, *found]) == (expected[::-1] if reverse else expected)
    # And they were made again.
    again = [name for name in key_files(disk) if name in {keys_name(s.first_seqno) for s in log_of(db).segments()}]
    assert again
    assert plain(db.versions(b"k", reverse=reverse, until=4000)) == (expected[::-1] if reverse else expected)
    db.close()


def test_a_record_that_is_damaged_is_said_by_those_that_need_it(db: kvwal.Store, disk: SimulatedDisk) -> None:
    expected = fill(db, 4)
    make_indexes(db)
    position = next(record for record in db.history() if record.seqno == expected[0][0]).position
    disk.flip(f"/kv/{position.file}", position.offset + 45)
    assert plain(db.versions(b"k", limit=1)) == expected[-1:]
    found = db.versions(b"k")
    with pytest.raises(CorruptionError) as failure:
        list(found)
    assert failure.value.file == position.file
    with pytest.raises(ClosedError):
        next(found)
    cursor = log_of(db).key_history.find(0, b"k", None, db.last_seqno, reverse=True)
    with pytest.raises(CorruptionError):
        list(cursor)
    with pytest.raises(ClosedError):
        next(cursor)
    assert [hold for hold in log_of(db).holds() if hold.name == "versions"] == []


def test_making_indexes_fails_silently(db: kvwal.Store, disk: SimulatedDisk) -> None:
    expected = fill(db, 4)
    disk.fail("write", path="*.keys.tmp", forever=True)
    make_indexes(db)
    assert key_files(disk) == []
    assert not log_of(db).key_history.lacks_indexes()
    assert plain(db.versions(b"k", reverse=False)) == expected
    disk.heal()
    # What was read is kept instead; the next store makes them.
    assert plain(db.versions(b"k", reverse=False)) == expected
    db.close()
    with opened(disk) as again:
        assert plain(again.versions(b"k", reverse=False)) == expected
        assert len(key_files(disk)) == len(log_of(again).segments()) - 1


def test_a_kill_at_any_operation_of_making_indexes_leaves_nothing_that_lies() -> None:
    expected: list[Plain] = []

    def write(disk: SimulatedDisk, told: list[Any]) -> None:
        with opened(disk) as db:
            expected[:] = fill(db, 3)
            told.append(True)
            make_indexes(db)
            list(db.versions(b"k"))

    def check(disk: SimulatedDisk, told: list[Any]) -> None:
        if not told:
            return
        with opened(disk) as db:
            assert plain(db.versions(b"k", reverse=False)) == expected
            assert not [name for name in disk.open_directory("/kv").names() if name.endswith(".tmp")]

    report = crash_every(write, check, states_per_point=4)
    assert report.points > 50


# -- how it is asked ---------------------------------------------------------------------------


def test_a_version_has_its_commit_and_the_time_of_it(db: kvwal.Store) -> None:
    seqno = db.put(b"k", b"v")
    [version] = db.versions(b"k")
    record = next(db.history())
    assert version == KeyVersion(seqno, record.time_us, {}, "put", b"v")
    assert version.time.timestamp() == pytest.approx(record.time_us / 1e6)


def test_a_range_and_a_put_of_one_commit_are_the_put(db: kvwal.Store) -> None:
    with db.batch() as batch:
        batch.delete_range(b"a", b"z")
        batch.put(b"k", b"v")
    assert plain(db.versions(b"k")) == [(1, "put", b"v")]
    assert plain(db.versions(b"l")) == [(1, "range", None)]
    assert plain(db.versions(b"z")) == []


def test_log_is_held_while_versions_are_read(disk: SimulatedDisk) -> None:
    with opened(disk, keep_history_bytes=0) as db:
        expected = [(db.put(b"k", b"%d" % number * 500), "put", b"%d" % number * 500) for number in range(20)]
        oldest = log_of(db).segments()[0].first_seqno
        found = db.versions(b"k", reverse=False)
        first = next(found)
        for _ in range(3):
            db.put(b"x", bytes(5000))
            db.checkpoint()
        assert plain([first, *found]) == expected[oldest - 1 :]
        db.put(b"x", b"")
        db.checkpoint()
        assert log_of(db).segments()[0].first_seqno > oldest
        with pytest.raises(SnapshotTooOld, match="from commit 1 on is no longer all kept"):
            db.versions(b"k", since=1)


def test_a_limit_and_a_close_let_go_of_the_log(db: kvwal.Store) -> None:
    for number in range(5):
        db.put(b"k", b"%d" % number)
    assert len(list(db.versions(b"k", limit=2))) == 2
    with db.versions(b"k") as found:
        assert next(found).value == b"4"
        assert sorted(hold.name for hold in log_of(db).holds()) == ["versions", "window"]
    assert [hold.name for hold in log_of(db).holds()] == ["window"]
    with pytest.raises(ClosedError):
        next(found)
    assert list(db.versions(b"k", limit=0)) == []
    found = db.versions(b"k")
    del found
    assert [hold.name for hold in log_of(db).holds()] == ["window"]


def test_what_is_committed_later_is_not_among_them(db: kvwal.Store) -> None:
    db.put(b"k", b"1")
    found = db.versions(b"k", reverse=False)
    db.put(b"k", b"2")
    assert plain(found) == [(1, "put", b"1")]


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"key": "text"}, TypeError),
        ({"since": -1}, ValueError),
        ({"until": "1"}, TypeError),
        ({"limit": -1}, ValueError),
        ({"table": 1}, ValueError),
        ({"table": 1 << 32}, ValueError),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    db: kvwal.Store, wrong: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        db.versions(**{"key": b"k", **wrong})
    assert [hold.name for hold in log_of(db).holds()] == ["window"]


def test_a_closed_store_refuses(disk: SimulatedDisk) -> None:
    db = opened(disk)
    db.put(b"k", b"1")
    found = db.versions(b"k")
    db.close()
    for call in (lambda: next(found), lambda: db.versions(b"k")):
        with pytest.raises(ClosedError, match="the store is closed"):
            call()


def test_a_read_only_store_writes_no_index(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        expected = fill(db, 4)
    before = sorted(disk.open_directory("/kv").names())
    with opened(disk, flag="r") as db:
        assert plain(db.versions(b"k", reverse=False)) == expected
    assert sorted(disk.open_directory("/kv").names()) == before


def test_threads_ask_while_others_write(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db.kv", **TINY, durability="os", keep_history_bytes=1 << 30) as db:

        def write() -> None:
            for number in range(600):
                db.put(b"k", b"%d" % number)
                db.put(b"other", bytes(400))

        def ask() -> None:
            while True:
                found = list(db.versions(b"k", reverse=False))
                assert [version.value for version in found] == [b"%d" % number for number in range(len(found))]
                if len(found) == 600:
                    return

        run_threads(write, ask, ask)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_that_was_forked_meanwhile_is_refused(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db.kv", keep_history_bytes=1 << 30) as db:
        db.put(b"k", b"1")
        found = db.versions(b"k")
        pid = os.fork()
        if not pid:
            try:
                next(found)
            except ForkedError:
                os._exit(7)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert plain(found) == [(1, "put", b"1")]


def test_an_interruption_anywhere_leaves_the_next_question_right(disk: SimulatedDisk) -> None:
    db = opened(disk)
    for number in range(30):
        db.put(b"k" if number % 5 else b"other", b"%d" % number * 600)
    expected = plain(db.versions(b"k"))
    assert len(log_of(db).segments()) > 2
    step = 1
    while True:
        for name in key_files(disk):
            disk.remove(f"/kv/{name}")
        log_of(db).key_history._keys._indexes.clear()
        interruption = interrupted_at(step, lambda: plain(db.versions(b"k")))
        if interruption is None:
            break
        del interruption
        assert plain(db.versions(b"k")) == expected
        assert [hold.name for hold in log_of(db).holds()] == ["window"]
        step = step + 1 if step < 300 else int(step * 1.05)
    db.close()


def test_an_interruption_as_the_newest_segment_is_read_on_tells_nothing_twice(disk: SimulatedDisk) -> None:
    db = opened(disk, **LATE)
    step = 1
    expected: list[Plain] = []
    while True:
        expected += [(db.put(b"k", b""), "put", b"") for _ in range(2)]
        if interrupted_at(step, lambda: list(db.versions(b"k", limit=1))) is None:
            break
        assert plain(db.versions(b"k", limit=5)) == expected[:-6:-1]
        step += 1
    assert step > 100
    db.close()
