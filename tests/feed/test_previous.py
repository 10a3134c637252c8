"""What there was before each change: against a model, over bases, with filters, and when it is no longer kept."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from store_fixtures import TINY, readers_in, run_threads

import kvwal
from kvwal import SnapshotTooOld
from kvwal.batch import WriteBatch
from kvwal.engine import keeping
from kvwal.feed import previous
from kvwal.testing import SimulatedDisk

Told = tuple[int, int, str, bytes, bytes | None, bytes | None, bool]


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    kept = {"keep_history_s": 1e6, "keep_history_bytes": 1 << 30, "history_base_bytes": 0}
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, **kept, **options})


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with opened(SimulatedDisk()) as store:
        yield store


def told(changes: Any) -> list[Told]:
    return [(each.seqno, each.table, each.kind, each.key, each.value, each.previous, each.last) for each in changes]


def test_each_change_has_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TREES", 0)
    # A reader serves a few commits, so that several bases are used.
    monkeypatch.setattr(previous, "_COMMITS", 7)
    random, now = Random(3), dict[tuple[int, bytes], bytes]()
    expected: list[Told] = []
    with opened(SimulatedDisk()) as db:
        for seqno in range(1, 200):
            batch, before, commit = WriteBatch(), dict(now), list[Told]()
            for _ in range(random.randrange(3)):
                table, start = random.choice([0, 16]), b"%d" % random.randrange(30)
                stop = b"%d" % random.randrange(30)
                (batch.table(table) if table else batch).delete_range(start, stop)
            ranges = [(0, each) for each in batch.ranges] + [
                (table, each) for table, part in batch.parts() for each in part.ranges
            ]
            key, value = b"%d" % random.randrange(30), b"%d" % seqno * 100
            # By table in the order in which a range of it comes first, each key once.
            for of in dict.fromkeys(table for table, _ in ranges):
                for other in sorted(key for table, key in before if table == of):
                    if any(of == table and bounds.contains(other) for table, bounds in ranges):
                        if (of, other) != (0, key):
                            commit.append((seqno, of, "delete", other, None, before[of, other], False))
                        now.pop((of, other), None)
            batch.put(key, value)
            commit.append((seqno, 0, "put", key, value, before.get((0, key)), True))
            now[0, key] = value
            assert db.commit(batch) == seqno
            expected += commit
            if seqno % 20 == 0:
                db.checkpoint()
        assert db.window.bases > 3
        found = told(db.changes(previous=True, expand=True))
        assert found == expected
        assert told(db.changes(100, previous=True, expand=True)) == [each for each in expected if each[0] > 100]
        without = told(db.changes(expand=True))
        assert without == [(*each[:5], None, each[6]) for each in expected]
        assert {each[2] for each in told(db.changes(previous=True))} == {"put", "delete_range"}


def test_a_range_that_held_nothing_is_not_told(db: kvwal.Store) -> None:
    db[b"k"] = b"v"
    db.delete_range(b"a", b"b")
    db.delete_range(b"a", b"z")
    assert [(each.seqno, each.kind, each.key) for each in db.changes(1, expand=True)] == [(3, "delete", b"k")]
    feed = db.changes(expand=True)
    list(feed)
    assert feed.position == 3


def test_a_filter_is_asked_first(db: kvwal.Store) -> None:
    db.update({b"a1": b"1", b"a2": b"2", b"b1": b"3"})
    db.delete_range(None, None)
    found = [(each.kind, each.key, each.previous) for each in db.changes(1, prefix=b"a", previous=True, expand=True)]
    assert found == [("delete", b"a1", b"1"), ("delete", b"a2", b"2")]


def test_a_feed_that_follows_knows_what_was_there(db: kvwal.Store) -> None:
    db[b"k"] = b"0"
    found: list[tuple[bytes | None, bytes | None]] = []

    def follow() -> None:
        with db.changes(1, previous=True, follow=True, timeout_s=10) as changes:
            for change in changes:
                found.append((change.previous, change.value))
                if change.value == b"49":
                    return

    def write() -> None:
        for number in range(1, 50):
            db[b"k"] = b"%d" % number
            if number % 10 == 0:
                db.checkpoint()

    run_threads(follow, write)
    assert found == [(b"%d" % (number - 1), b"%d" % number) for number in range(1, 50)]


def test_a_moment_that_is_not_kept_is_refused_at_the_call() -> None:
    disk = SimulatedDisk()
    with opened(disk, keep_history_s=0) as db:
        db.consumer("slow", start="oldest").close()
        for _ in range(60):
            db.put(b"k", bytes(1000))
        db.checkpoint()
        db.checkpoint()
        assert next(db.changes()).seqno > 0, "the consumer keeps the log"
        for options in ({"previous": True}, {"expand": True}):
            assert list(db.changes(**options)) == [], "from the window's beginning on"
            with pytest.raises(SnapshotTooOld):
                db.changes(3, **options)
        # The moment before the newest commit is past.
        last = db.last_seqno
        db[b"k"] = b"v"
        with pytest.raises(SnapshotTooOld):
            db.changes(last, previous=True)
        assert readers_in(db.pins()) == []


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("newest", [True, False])
def test_one_that_was_begun_is_told_to_the_end_though_the_window_moves_on(
    newest: bool, follow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "_TREES", 0)
    monkeypatch.setattr(previous, "_COMMITS", 7)
    with opened(SimulatedDisk(), keep_history_bytes=50_000) as db:
        db.consumer("slow", start="oldest").close()
        for number in range(100):
            db[b"k%d" % (number % 5)] = b"%d" % number
        after = db.last_seqno if newest else 30
        feed = db.changes(after, previous=True, expand=True, follow=follow, timeout_s=0 if follow else None)
        if not newest:
            assert (next(feed).seqno, next(feed).seqno) == (31, 32)
        expected = [(number, b"%d" % (number - 5)) for number in range(31, 100)]
        for number in range(100, 200):
            db[b"k%d" % (number % 5)] = b"%d" % number
        for _ in range(30):
            db[b"other"] = bytes(5000)
            db.checkpoint()
        assert db.window.oldest > 200
        with pytest.raises(SnapshotTooOld):
            db.changes(after, previous=True)
        if follow:
            expected = [(number, b"%d" % (number - 5)) for number in range(100 if newest else 31, 200)]
        elif newest:
            expected = []
        found = [(int(each.value or b""), each.previous) for each in feed if each.key != b"other"]
        assert found == expected
        feed.close()
        assert readers_in(db.pins()) == []


def test_one_that_looks_at_much_and_tells_little_holds_a_late_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TREES", 0)
    monkeypatch.setattr(previous, "_COMMITS", 7)
    with opened(SimulatedDisk()) as db:
        db[b"k"] = b"0"
        with db.changes(1, prefix=b"k", previous=True, follow=True, timeout_s=0) as changes:
            for number in range(1, 100):
                db[b"other"] = b"%d" % number * 300
                db.checkpoint()
                assert list(changes) == []
            assert [pin.seqno > 90 for pin in readers_in(db.pins())] == [True]
            db[b"k"] = b"1"
            assert [each.previous for each in changes] == [b"0"]
        assert readers_in(db.pins()) == []


def test_a_feed_that_keeps_up_outlives_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_TREES", 0)
    monkeypatch.setattr(previous, "_COMMITS", 1 << 30)
    with opened(SimulatedDisk(), keep_history_bytes=50_000, max_snapshot_bytes=50_000) as db:
        db[b"k"] = b"0"
        with db.changes(1, previous=True, follow=True, timeout_s=0) as changes:
            for number in range(1, 200):
                db[b"k"] = b"%d" % number * 300
                if number % 3 == 0:
                    db.checkpoint()
                [change] = changes
                assert change.previous == b"%d" % (number - 1) * (300 if number > 1 else 1)
        assert db.window.oldest > 100


@pytest.mark.parametrize("in_pages", [True, False])
@pytest.mark.parametrize("options", [{"expand": True}, {"previous": True, "expand": True}])
def test_one_whose_moment_is_given_up_says_so(in_pages: bool, options: dict[str, bool]) -> None:
    limits = {"keep_history_bytes": 200 << 10, "max_snapshot_bytes": 0, "cache_bytes": 256 << 10}
    with opened(SimulatedDisk(), **limits) as db:
        keys = [b"k%05d" % number for number in range(3000)]

        def fill() -> None:
            for at in range(0, len(keys), 500):
                # Of other bytes each time.
                db.update({key: db.last_seqno.to_bytes(2, "big") * 50 for key in keys[at : at + 500]})

        fill()
        if in_pages:
            db.checkpoint()
        at = db.last_seqno
        db.delete_range(b"k", b"l")
        db.sync()
        feed = db.changes(at, **options)
        assert next(feed).key == keys[0]
        for _ in range(6):
            fill()
            db.checkpoint()
        assert db.window.oldest > at
        with pytest.raises(SnapshotTooOld, match="given up"):
            list(feed)
        assert not feed.alive
        assert readers_in(db.pins()) == []
