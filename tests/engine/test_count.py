"""Counting: against a model, while other moments are counted, ranges are deleted and memtables are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import run_threads

import kvwal
from kvwal.keys import KeyRange
from kvwal.pages import Tree
from kvwal.testing import SimulatedDisk

KEYS = [b"%02d" % number for number in range(20)]


def opened(**options: object) -> kvwal.Store:
    return kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os", **options)  # type: ignore[arg-type]


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with opened() as store:
        yield store


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The keys that were looked up in the tree."""
    keys: list[bytes] = []
    get = Tree.get

    def noted(self: Tree, key: bytes) -> bytes | None:
        keys.append(key)
        return get(self, key)

    monkeypatch.setattr(Tree, "get", noted)
    return keys


def begun(db: kvwal.Store) -> Iterator[int]:
    """A count of now in two steps, so that something can happen in between, as it does among threads."""
    started = db.engine.reads._begin_count(0)
    assert started is not None
    reader, _, extent = started
    yield 0
    try:
        yield reader.version.count(reader.seqno, None, None, extent=extent)
    finally:
        reader.release()


def test_a_range_deleted_while_a_count_is_under_way_is_seen_by_the_next_one(db: kvwal.Store) -> None:
    db.update(dict.fromkeys(KEYS, b""))
    count = begun(db)
    next(count)
    db.delete_range(b"05", b"10")
    assert next(count) == 20
    assert len(db) == 15
    assert len(db.keys(b"04", b"11")) == 2


def test_keys_put_and_deleted_while_a_count_is_under_way_are_seen_by_the_next_one(db: kvwal.Store) -> None:
    db.update(dict.fromkeys(KEYS, b""))
    count = begun(db)
    next(count)
    db[b"new"] = b""
    db.delete(b"03")
    db.delete(b"04")
    assert next(count) == 20
    assert len(db) == 19


@given(st.data())
def test_counts_that_overlap_with_commits_agree_with_their_moments(data: st.DataObject) -> None:
    """Counts begin, commits are made, and the counts end, in any order; a census moves between the moments."""
    random = data.draw(st.randoms(use_true_random=False))
    with opened() as db:
        model: set[bytes] = set()
        if random.randrange(2):
            db.update(dict.fromkeys(KEYS[::2], b""))
            model |= set(KEYS[::2])
            if random.randrange(2):
                db.checkpoint()
        under_way: list[tuple[Iterator[int], int]] = []
        snapshots: list[tuple[kvwal.Snapshot, set[bytes]]] = []
        for _ in range(20):
            kind = random.randrange(11)
            if kind == 0 and len(under_way) < 4:
                count = begun(db)
                next(count)
                under_way.append((count, len(model)))
            elif kind == 1 and under_way:
                count, expected = under_way.pop(random.randrange(len(under_way)))
                assert next(count) == expected
            elif kind == 2:
                assert len(db) == len(model)
            elif kind == 3:
                snapshots.append((db.snapshot(), set(model)))
            elif kind == 4 and snapshots:
                snapshot, then = random.choice(snapshots)
                low = random.choice(KEYS)
                assert len(snapshot) == len(then)
                assert len(snapshot.keys(low)) == sum(key >= low for key in then)
            elif kind == 5 and db.engine.state.version.frozen is None:
                db.engine._succession.freeze()
            elif kind == 6:
                db.checkpoint()
            elif kind == 7:
                key = random.choice(KEYS)
                db[key] = b""
                model.add(key)
            elif kind == 8:
                key = random.choice(KEYS)
                db.delete(key)
                model.discard(key)
            else:
                low, high = sorted(random.sample(KEYS, 2))
                db.delete_range(low, high)
                model = {key for key in model if not low <= key < high}
        for count, expected in under_way:
            assert next(count) == expected
        assert len(db) == len(model)
        for snapshot, then in snapshots:
            assert len(snapshot) == len(then)


def test_a_blind_put_looks_nothing_up(db: kvwal.Store, looked_up: list[bytes]) -> None:
    db.update(dict.fromkeys(KEYS, b""))
    db.checkpoint()
    assert len(db) == 20
    for number in range(100):
        db[b"new%d" % number] = b""
    assert looked_up == []


def test_a_count_looks_each_key_up_once(db: kvwal.Store, looked_up: list[bytes]) -> None:
    db.update(dict.fromkeys(KEYS, b""))
    db.checkpoint()
    for key in KEYS[:5]:
        db[key] = b"other"
    assert len(db) == 20
    assert sorted(looked_up) == KEYS[:5]
    assert len(db) == 20
    db[KEYS[0]] = b"third"
    db[KEYS[7]] = b"other"
    assert len(db.keys(KEYS[3])) == 17
    assert sorted(looked_up) == sorted([*KEYS[:5], KEYS[7]])


def test_a_snapshot_that_is_counted_again_looks_nothing_up(db: kvwal.Store, looked_up: list[bytes]) -> None:
    db.update(dict.fromkeys(KEYS, b""))
    db.checkpoint()
    for key in KEYS[:5]:
        db.delete(key)
    with db.snapshot() as snapshot:
        db.delete_range(None, b"10")
        assert len(snapshot) == 15
        before = len(looked_up)
        for key in KEYS:
            assert len(snapshot.keys(key)) == sum(other >= key for other in KEYS[5:])
        assert len(looked_up) == before
        assert len(db) == 10


def test_a_key_below_a_deleted_range_is_not_looked_up(db: kvwal.Store, looked_up: list[bytes]) -> None:
    db.update(dict.fromkeys(KEYS, b""))
    db.checkpoint()
    db.delete_range(None, b"10")
    db[b"03"] = b"again"
    assert len(db) == 11
    assert looked_up == []


def test_a_count_goes_on_from_what_is_known_while_a_memtable_is_frozen(db: kvwal.Store, looked_up: list[bytes]) -> None:
    """A checkpoint may take long, and counts go on meanwhile: they do not begin at the beginning each time."""
    import kvwal.engine.count

    db.update(dict.fromkeys(KEYS, b""))
    db.checkpoint()
    assert len(db) == 20
    for number in range(500):
        db[b"new%03d" % number] = b""
    assert len(db) == 520
    for number in range(500):
        db[b"new%03d" % number] = b"again"
    db.engine._succession.freeze()
    assert len(db) == 520
    classified = 0
    classify = kvwal.engine.count.Census._classify

    def counted(self: object, *args: object) -> None:
        nonlocal classified
        classified += 1
        classify(self, *args)  # type: ignore[arg-type]

    kvwal.engine.count.Census._classify = counted  # type: ignore[method-assign, assignment]
    try:
        for _ in range(10):
            assert len(db) == 520
    finally:
        kvwal.engine.count.Census._classify = classify  # type: ignore[method-assign]
    # Those that were written since the last count, once.
    assert classified <= 500


def test_a_count_that_a_freeze_overtook_leaves_what_was_written_since_to_the_next_one(db: kvwal.Store) -> None:
    """It counts at its own moment, which is not the last one of the memtable."""
    db.update(dict.fromkeys(KEYS, b""))
    assert len(db) == 20
    begun = db.engine.reads._begin_count(0)
    assert begun is not None
    reader, _, extent = begun
    for key in KEYS[:5]:
        del db[key]
    db.engine._succession.freeze()
    assert reader.version.count(reader.seqno, None, None, extent=extent) == 20
    reader.release()
    with db.snapshot() as snapshot:
        assert len(db) == len(snapshot) == 15


def test_threads_that_count_while_others_write_see_what_is_possible(db: kvwal.Store, rng: Random) -> None:
    """Two keys are put in one commit and deleted in one range: each count of them is even, and the last one right."""
    ends: list[int] = []

    def write() -> None:
        for number in range(300):
            pair = {b"%02da" % (number % 20): b"", b"%02db" % (number % 20): b""}
            db.update(pair)
            if number % 3 == 0:
                db.delete_range(b"%02d" % (number % 17), b"%02d" % (number % 17 + 3))
            if number % 50 == 0:
                db.checkpoint()
        ends.append(1)

    def count() -> None:
        while not ends:
            assert len(db) % 2 == 0
            assert len(db.keys(b"05", b"11")) % 2 == 0
            with db.snapshot() as snapshot:
                assert len(snapshot) == sum(1 for _ in snapshot.scan())

    run_threads(write, count, count, count)
    assert len(db) == sum(1 for _ in db.scan())
    assert len(db.keys(b"03", b"15")) == sum(1 for _ in db.scan(b"03", b"15"))


def test_a_range_of_ranges_is_counted_at_its_ends(db: kvwal.Store) -> None:
    """Every pair of ends over disjoint, touching and nested deleted ranges, above a tree and a frozen memtable."""
    db.update(dict.fromkeys(KEYS, b""))
    db.checkpoint()
    live = set(KEYS)

    def delete(low: bytes, high: bytes | None) -> None:
        db.delete_range(low, high)
        live.difference_update([key for key in live if KeyRange(low, high).contains(key)])

    delete(b"02", b"05")
    db[b"03"] = b"again"
    live.add(b"03")
    db.engine._succession.freeze()
    delete(b"05", b"07")
    delete(b"10", b"12")
    delete(b"18", None)
    db[b"11"] = b"again"
    live.add(b"11")
    ends = [None, *KEYS, b"03\0", b"zz", b""]
    for low in ends:
        for high in ends:
            expected = sum((low is None or low <= key) and (high is None or key < high) for key in live)
            assert len(db.keys(low, high)) == expected, (low, high)
