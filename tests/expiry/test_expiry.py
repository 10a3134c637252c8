"""Values that expire: never read once their time has come, whichever way is asked, and removed in the background."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import pytest
from store_fixtures import TINY, check_store, problems_of, wait_until

import kvwal
from kvwal.engine import expirer
from kvwal.engine.expiry import decode_queue_row, due_rows, queue_row
from kvwal.engine.request import CommitRequest
from kvwal.expiring import Expiring, expire_us, judged
from kvwal.features import EXPIRY
from kvwal.testing import SimulatedDisk

S = 1_000_000


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    store = kvwal.open("/kv", files=disk, background=False, **TINY)
    yield store
    if not store.closed:
        check_store(store)
        assert problems_of(store) == []
        store.close()


def later(disk: SimulatedDisk, seconds: float) -> None:
    """Let time pass, on both clocks."""
    disk.pass_time(seconds)


def remove_all(db: kvwal.Store) -> int:
    """Do the work of the background thread; how many commits it took."""
    return sum(1 for _ in itertools.takewhile(bool, (db.engine.expirer.remove() for _ in itertools.count())))


def reopened(db: kvwal.Store, disk: SimulatedDisk) -> kvwal.Store:
    db.close()
    return kvwal.open("/kv", files=disk, background=False, **TINY)


def ways_to_read(db: kvwal.Store, key: bytes) -> dict[str, object]:
    """What each way of reading says of a key: a value, or that it is there."""
    with db.transaction() as txn:
        in_txn = txn.get(key), key in txn, list(txn.scan(key, key + b"\0")), txn.count(key, key + b"\0")
    with db.snapshot() as snapshot:
        in_snapshot = snapshot.get(key), snapshot.get_many([key]), list(snapshot.keys()), len(snapshot)
    cursor = db.cursor()
    return {
        "get": db.get(key),
        "get_many": db.get_many([key])[0],
        "in": key in db,
        "scan": dict(db.scan()).get(key),
        "reverse": dict(db.scan(reverse=True)).get(key),
        "first": db.first(key, key + b"\0"),
        "last": db.last(key, key + b"\0"),
        "count": db.count(key, key + b"\0"),
        "cursor": cursor.seek(key),
        "txn": in_txn,
        "snapshot": in_snapshot,
    }


PLACES: list[Callable[[kvwal.Store], object]] = [lambda db: None, lambda db: db.checkpoint()]


@pytest.mark.parametrize("place", PLACES, ids=["memtable", "tree"])
def test_an_expired_value_is_absent_in_each_way_of_reading(db: kvwal.Store, disk: SimulatedDisk, place: Any) -> None:
    db[b"a"] = b"1"
    db.put(b"k", b"v", expire_s=10)
    db[b"z"] = b"2"
    place(db)
    before = ways_to_read(db, b"k")
    assert before["get"] == before["get_many"] == before["scan"] == before["reverse"] == b"v"
    assert (before["in"], before["count"], before["first"]) == (True, 1, (b"k", b"v"))
    assert before["txn"] == (b"v", True, [(b"k", b"v")], 1)
    assert len(db) == 3
    assert db.rank(b"z") == 2
    assert db.key_at(1) == b"k"
    later(disk, 10)
    after = ways_to_read(db, b"k")
    assert [after[way] for way in ("get", "get_many", "scan", "reverse", "first", "last")] == [None] * 6
    assert (after["in"], after["count"]) == (False, 0)
    assert after["txn"] == (None, False, [], 0)
    assert after["snapshot"] == (None, [None], [b"a", b"z"], 2)
    assert len(db) == 2
    assert db.rank(b"z") == 1
    assert db.key_at(1) == b"z"
    assert list(db) == [b"a", b"z"]
    with pytest.raises(IndexError):
        db.key_at(2)


@pytest.mark.parametrize("place", PLACES, ids=["memtable", "tree"])
def test_an_expired_value_is_absent_for_what_the_leader_evaluates(
    db: kvwal.Store, disk: SimulatedDisk, place: Any
) -> None:
    for key in (b"add", b"cas", b"pop", b"setdefault", b"absent", b"del"):
        db.put(key, b"\x07" + bytes(7), expire_s=1)
    place(db)
    later(disk, 1)
    assert db.add(b"add", 1) == 1
    assert not db.compare_and_set(b"cas", b"\x07" + bytes(7), b"x")
    assert db.compare_and_set(b"cas", None, b"x")
    assert db.pop(b"pop", None) is None
    assert db.setdefault(b"setdefault", b"d") == b"d"
    assert db.put_if_absent(b"absent", b"p")
    with pytest.raises(KeyError):
        del db[b"del"]
    assert db.popitem(last=False) == (b"absent", b"p")
    assert [db.popitem()[0] for _ in range(3)] == [b"setdefault", b"cas", b"add"]
    with pytest.raises(KeyError):
        db.popitem()


def test_the_leader_judges_what_its_group_has_put(db: kvwal.Store) -> None:
    """An operation sees a value of the same group, and not its time."""
    from kvwal.engine.operations import Pending

    pending = Pending(db.engine.reads)
    batch = kvwal.WriteBatch()
    batch.now_us = lambda: 0
    batch.put(b"gone", b"1", expire_s=1)
    batch.put(b"there", b"2")
    pending.write(batch)
    assert pending.get(b"gone") is None
    assert pending.raw(b"gone") == Expiring.of(b"1", S)
    assert pending.edge(None, None, reverse=False) == (b"there", b"2")


def test_a_put_without_expiry_takes_the_expiry_away(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"1", expire_s=1)
    db[b"k"] = b"2"
    assert db.expires(b"k") is None
    later(disk, 5)
    assert db[b"k"] == b"2"
    assert remove_all(db) == 1
    assert db[b"k"] == b"2"


def test_a_row_that_was_set_aside_does_not_come_back(db: kvwal.Store, disk: SimulatedDisk) -> None:
    """A deleted range sets all rows aside, and a later look may find them there."""
    db[b"k"] = b"old"
    db.delete_range(b"x", b"y")
    db.put(b"k", b"new", expire_s=1)
    assert db[b"k"] == b"new"
    later(disk, 1)
    assert db.get(b"k") is None


def test_a_counter_keeps_its_expiry(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"n", (5).to_bytes(8, "little"), expire_s=10)
    when = db.expires(b"n")
    assert db.add(b"n", 2) == 7
    assert db.expires(b"n") == when
    later(disk, 10)
    assert db.add(b"n", 1) == 1
    assert db.expires(b"n") is None


def test_touch_sets_another_time_and_does_not_bring_back(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=10)
    assert db.touch(b"k", expire_s=20)
    later(disk, 15)
    assert db[b"k"] == b"v"
    assert db.touch(b"k", expire_s=None)
    assert db.expires(b"k") is None
    later(disk, 100)
    assert db[b"k"] == b"v"
    assert remove_all(db) == 0
    assert db.touch(b"k", expire_s=1)
    later(disk, 1)
    assert not db.touch(b"k", expire_s=5)
    assert b"k" not in db
    assert not db.touch(b"other", expire_s=5)
    remove_all(db)
    assert list(db.engine.expirer.rows()) == []


def test_expires_says_when_in_utc(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db[b"never"] = b"1"
    db.put(b"k", b"v", expire_s=1.5)
    when = db.expires(b"k")
    assert when is not None
    assert when.tzinfo is UTC
    now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=disk.clock_us)
    assert timedelta(seconds=1.4) < when - now <= timedelta(seconds=1.5)
    assert db.expires(b"never") is None
    with pytest.raises(KeyError):
        db.expires(b"missing")
    later(disk, 2)
    with pytest.raises(KeyError):
        db.expires(b"k")
    db.put(b"far", b"v", expire_s=10**12)
    assert db.expires(b"far") == datetime.max.replace(tzinfo=UTC)


class Single:
    """A number that is neither an int nor a float, as `numpy.float32` is one."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __float__(self) -> float:
        return self._value


class Narrow:
    """An integer that is no int, as `numpy.int64` is one."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value

    @property
    def numerator(self) -> Narrow:
        return self

    @property
    def denominator(self) -> Narrow:
        return Narrow(1)


Real.register(Single)
Integral.register(Narrow)


@pytest.mark.parametrize("seconds", [Fraction(5, 2), Single(2.5), Narrow(2)])
def test_expire_s_is_any_real_number(db: kvwal.Store, disk: SimulatedDisk, seconds: Any) -> None:
    db[b"later"] = b"v"
    db.put(b"put", b"v", expire_s=seconds)
    db.touch(b"later", expire_s=seconds)
    db.table("t", str, str, expire_s=seconds)["k"] = "v"
    with db.batch() as batch:
        batch.put(b"batch", b"v", expire_s=seconds)
    with db.transaction() as txn:
        txn.put(b"txn", b"v", expire_s=seconds)
    later(disk, 1.9)
    assert len(db) == 4
    assert len(db.table("t", str, str)) == 1
    later(disk, 1)
    assert len(db) == 0
    assert len(db.table("t", str, str)) == 0


@pytest.mark.parametrize("wrong", ["1", True, None.__class__, [1], Decimal(1), 1j])
def test_expire_s_of_another_type_is_refused(db: kvwal.Store, wrong: Any) -> None:
    for put in (db.put, kvwal.WriteBatch().put):
        with pytest.raises(TypeError, match="a number of seconds"):
            put(b"k", b"v", expire_s=wrong)
    assert b"k" not in db
    assert db.last_seqno == 0


@pytest.mark.parametrize("wrong", [0, -1, -0.5, float("nan"), float("inf"), float("-inf"), Fraction(-1, 2)])
def test_expire_s_that_is_not_above_0_or_not_finite_is_refused(db: kvwal.Store, wrong: float) -> None:
    with pytest.raises(ValueError, match="expire_s is"):
        db.put(b"k", b"v", expire_s=wrong)
    with pytest.raises(ValueError, match="expire_s is"), db.transaction() as txn:
        txn.put(b"k", b"v", expire_s=wrong)
    with pytest.raises(ValueError, match="expire_s is"):
        db.touch(b"k", expire_s=wrong)
    assert b"k" not in db


def test_the_shortest_and_the_longest_expiry_can_be_stored() -> None:
    assert expire_us(1e-9) == 1
    assert expire_us(1) == S
    assert expire_us(10**400) == expire_us(Fraction(10**400)) == expire_us(1e300)
    assert expire_us(Fraction(1, 10**400)) == 1
    # To the nearest: the product of a float and a million is often just below it.
    for us in (1_001_000, 251, 8_205_000, 4_015_000, 16_001, *range(1, 3000)):
        assert expire_us(us / 1e6) == us
    assert expire_us(10**30) == expire_us(1e300)
    assert Expiring.of(b"v", expire_us(10**30) + (1 << 62)).value == b"v"
    assert judged(Expiring.of(b"v", 5), 4) == b"v"
    assert judged(Expiring.of(b"v", 5), 5) is None


# -- what it is stored as ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 2600, 2601, 9000])
def test_values_of_every_size_expire_from_log_and_tree(db: kvwal.Store, disk: SimulatedDisk, size: int) -> None:
    value = b"v" * size
    db.put(b"k", value, expire_s=100)
    db.put(b"gone", value, expire_s=1)
    db = reopened(db, disk)
    assert db[b"k"] == value
    db.checkpoint()
    assert (db[b"k"], dict(db.scan())) == (value, {b"k": value, b"gone": value})
    later(disk, 1)
    assert dict(db.scan()) == {b"k": value}
    assert len(db) == 1
    db = reopened(db, disk)
    assert dict(db.scan()) == {b"k": value}
    assert problems_of(db) == []
    remove_all(db)
    db.checkpoint()
    assert dict(db.scan()) == {b"k": value}
    assert db.stats().tree_keys == 1
    assert problems_of(db) == []
    db.close()


def test_many_in_one_leaf_are_told_apart(db: kvwal.Store, disk: SimulatedDisk) -> None:
    """Leaves hold values with and without expiry, inline and overflow, of one length and of many."""
    model = {}
    for i in range(300):
        value = bytes([i % 251]) * (3000 if i % 17 == 0 else i % 50)
        db.put(b"%04d" % i, value, expire_s=1 if i % 3 == 0 else None) if i % 2 else db.put(b"%04d" % i, value)
        if not (i % 2 and i % 3 == 0):
            model[b"%04d" % i] = value
    db.checkpoint()
    assert len(db) == 300
    later(disk, 1)
    assert dict(db.scan()) == model
    assert len(db) == len(model)
    assert [db.get(b"%04d" % i) for i in range(300)] == [model.get(b"%04d" % i) for i in range(300)]
    assert problems_of(db) == []
    db[b"0000"] = b"again"
    remove_all(db)
    db.checkpoint()
    assert dict(db.scan()) == model | {b"0000": b"again"}
    assert problems_of(db) == []


def test_a_key_too_long_for_a_row_of_the_queue_expires_too(db: kvwal.Store, disk: SimulatedDisk) -> None:
    for length in (65_000, 65_001, 65_535):
        db.put(b"k" * length, b"v", expire_s=1)
    assert len(db) == 3
    later(disk, 1)
    assert len(db) == 0
    assert list(db) == []
    remove_all(db)
    assert list(db.engine.expirer.rows()) == []


@pytest.mark.parametrize("length", [0, 1, 65_000, 65_001, 65_535])
def test_a_row_of_the_queue_is_read_as_it_was_written(length: int) -> None:
    row = queue_row(7, 16, b"x" * length)
    assert decode_queue_row(*row) == (7, 16, b"x" * length)
    assert len(row[0]) <= 65_535
    start, stop = due_rows(0, 7)
    assert start <= row[0] < stop
    assert not row[0] < due_rows(0, 6)[1]
    for damaged in ((row[0][:12], b""), (row[0], b"y"), (b"\x09" + row[0][1:], row[1])):
        with pytest.raises(kvwal.CorruptionError):
            decode_queue_row(*damaged)


# -- removal -----------------------------------------------------------------------------------


def test_expired_entries_leave_by_commits_with_cause_expire(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db[b"stays"] = b"1"
    db.put(b"a", b"1", expire_s=1)
    db.put(b"b", b"2", expire_s=2)
    users = db.table("users", str, str)
    users.put("x", "y", expire_s=1)
    later(disk, 1)
    assert remove_all(db) == 1
    told = [(c.kind, c.table, c.key, c.value) for c in db.changes(after=0, follow=False)]
    assert told == [
        ("put", 0, b"stays", b"1"),
        ("put", 0, b"a", b"1"),
        ("put", 0, b"b", b"2"),
        ("put", users.id, b"x", b"y"),
        ("expire", 0, b"a", None),
        ("expire", users.id, b"x", None),
    ]
    assert [(v.kind, v.value) for v in db.versions(b"a")] == [("expire", None), ("put", b"1")]
    assert db.get(b"b") == b"2"
    assert remove_all(db) == 0


def test_removal_takes_a_bounded_part_in_each_commit(
    db: kvwal.Store, disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expirer, "MOST_ENTRIES", 10)
    for i in range(35):
        db.put(b"%02d" % i, b"v", expire_s=1)
    later(disk, 1)
    first = db.last_seqno
    assert remove_all(db) == 4
    assert db.last_seqno == first + 4
    monkeypatch.setattr(expirer, "MOST_BYTES", 100)
    for i in range(4):
        db.put(bytes(60) + bytes([i]), b"v", expire_s=1)
    later(disk, 1)
    assert remove_all(db) == 2


def test_what_is_committed_after_its_time_is_removed_as_well(db: kvwal.Store, disk: SimulatedDisk) -> None:
    """The look for what is due begins where the last one ended, and this lies before it."""
    db.put(b"a", b"v", expire_s=100)
    late = kvwal.WriteBatch()
    late.now_us = lambda: disk.clock_us
    late.put(b"late", b"v", expire_s=1)
    later(disk, 100)
    remove_all(db)
    db.commit(late)
    assert db.engine.expirer.may_be_due()
    assert b"late" not in db
    assert remove_all(db) == 1
    assert list(db.engine.expirer.rows()) == []


def test_a_removal_that_fails_is_made_up_for(
    db: kvwal.Store, disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    db.put(b"a", b"v", expire_s=100)
    late = kvwal.WriteBatch()
    late.now_us = lambda: disk.clock_us
    late.put(b"late", b"v", expire_s=1)
    later(disk, 100)
    remove_all(db)
    db.commit(late)

    def fail(request: object) -> None:
        raise kvwal.DiskFullError("none left")

    with monkeypatch.context() as patched:
        patched.setattr(db.engine.queue, "commit", fail)
        with pytest.raises(kvwal.DiskFullError):
            db.engine.expirer.remove()
    assert remove_all(db) == 1
    assert list(db.engine.expirer.rows()) == []


@pytest.mark.parametrize("gone", [1, 30, 300])
def test_a_count_is_exact_however_many_are_due(db: kvwal.Store, disk: SimulatedDisk, gone: int) -> None:
    """Few are looked at one by one; where many are due, the range is walked."""
    with db.batch() as batch:
        for i in range(400):
            batch.put(b"%03d" % i, b"v", expire_s=1 if i < gone else 1000)
    for _ in range(2):
        assert len(db) == 400
        db.checkpoint()
    later(disk, 1)
    assert len(db) == db.count() == 400 - gone
    assert db.count(b"000", b"010") == max(0, 10 - gone)
    assert db.rank(b"399") == 399 - gone
    with db.snapshot() as snapshot:
        remove_all(db)
        assert (len(snapshot), snapshot.key_at(0), len(db)) == (400 - gone, b"%03d" % gone, 400 - gone)


def test_an_entry_that_was_put_anew_is_not_removed(db: kvwal.Store, disk: SimulatedDisk) -> None:
    """A batch leaves the row of what it replaces in the queue."""
    with db.batch() as batch:
        for key in (b"put", b"longer", b"deleted"):
            batch.put(key, b"1", expire_s=1)
    with db.batch() as batch:
        batch[b"put"] = b"2"
        batch.put(b"longer", b"2", expire_s=10)
        batch.delete(b"deleted")
    later(disk, 1)
    assert remove_all(db) == 1
    assert dict(db.scan()) == {b"put": b"2", b"longer": b"2"}
    assert [row.key for row in db.engine.expirer.rows()] == [b"longer"]


def test_a_single_put_takes_the_row_of_what_it_replaces_out_of_the_queue(db: kvwal.Store) -> None:
    users = db.table("users", str, str, expire_s=9)
    for i in range(5):
        db.put(b"k", b"v", expire_s=i + 1)
        users["k"] = "v"
        with db.transaction() as txn:
            txn.put(b"t", b"v", expire_s=i + 1)
            txn.touch(b"t", expire_s=i + 2)
    assert sorted(row.key for row in db.engine.expirer.rows()) == [b"k", b"k", *[b"t"] * 5]


def test_a_removed_table_leaves_nothing_to_expire(db: kvwal.Store, disk: SimulatedDisk) -> None:
    users = db.table("users", str, str)
    users.put("a", "1", expire_s=1)
    db.drop_table("users")
    users.put("a", "2")
    later(disk, 2)
    remove_all(db)
    assert dict(users) == {"a": "2"}
    assert list(db.engine.expirer.rows()) == []


def test_the_background_thread_removes_and_gives_space_back(tmp_path: Any) -> None:
    with kvwal.open(str(tmp_path / "kv"), durability="os") as db:
        with db.batch() as batch:
            for i in range(3000):
                batch.put(b"%05d" % i, b"v" * 100, expire_s=0.3)
        db[b"stays"] = b"1"
        db.checkpoint()
        wait_until(lambda: db.engine.state.version.memtable.get(b"02999") is None, "the removal")
        wait_until(lambda: not list(db.engine.expirer.rows()), "the end of the queue")
        db.checkpoint()
        assert db.stats().tree_keys <= 3
        assert list(db) == [b"stays"]
        # It sleeps now, and an earlier expiry wakes it.
        db.put(b"late", b"1", expire_s=100)
        db.put(b"soon", b"1", expire_s=0.1)
        wait_until(lambda: [row.key for row in db.engine.expirer.rows()] == [b"late"], "the second removal")
    assert [v.kind for v in kvwal.open(str(tmp_path / "kv")).versions(b"soon")][:1] == ["expire"]


# -- moments -----------------------------------------------------------------------------------


def test_a_snapshot_judges_by_the_time_when_it_was_opened(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=10)
    with db.snapshot() as before, db.transaction() as txn:
        later(disk, 10)
        with db.snapshot() as after:
            for _ in range(2):
                assert (before.get(b"k"), len(before), list(before)) == (b"v", 1, [b"k"])
                assert (after.get(b"k"), len(after), list(after)) == (None, 0, [])
                assert txn[b"k"] == b"v"
                assert before.expires(b"k") is not None
                remove_all(db)
                db.checkpoint()


def test_a_past_moment_judges_by_the_time_of_its_commit(db: kvwal.Store, disk: SimulatedDisk) -> None:
    first = db.put(b"k", b"v", expire_s=10)
    later(disk, 5)
    second = db.put(b"other", b"1")
    later(disk, 5)
    third = db.put(b"other", b"2")
    remove_all(db)
    fourth = db.put(b"other", b"3")
    for _ in range(3):
        for at, value in ((first, b"v"), (second, b"v"), (third, None), (fourth, None)):
            with db.snapshot(at=at) as past:
                assert past.get(b"k") == value, at
                assert (b"k" in list(past), len(past)) == (value is not None, len(list(past)))
        assert db[b"other"] == b"3"
        db.checkpoint()
        assert [d for d in db.diff(first, third) if d.key == b"k"] == [(b"k", b"v", None)]


@pytest.mark.parametrize("named", [False, True])
def test_a_value_that_is_brought_back_expires_when_it_was_to(
    db: kvwal.Store, disk: SimulatedDisk, named: bool
) -> None:
    kept: Any = db.table("t", bytes, bytes, expire_s=5000) if named else db
    seqno = kept.put(b"k", b"v", expire_s=100)
    ends = kept.expires(b"k")
    kept[b"k"] = b"w"
    db.checkpoint()
    kept.revert(b"k", to=seqno)
    assert (kept[b"k"], kept.expires(b"k")) == (b"v", ends)
    later(disk, 100)
    assert b"k" not in kept
    kept[b"k"] = b"w"
    kept.revert(b"k", to=seqno)
    assert b"k" not in kept
    db.checkpoint()
    remove_all(db)
    # A delete reads nothing: the row of the default expiry stays until its time.
    assert (b"k" in kept, db.stats().expiry_rows) == (False, int(named))


@pytest.mark.parametrize("expire_s", [None, 5000])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_value_that_is_brought_back_never_expires_if_it_was_never_to(
    db: kvwal.Store, disk: SimulatedDisk, indexed: bool, expire_s: float | None
) -> None:
    table = db.table("t", str, str, expire_s=expire_s)
    index = table.index("by_itself", key=str, codec=str) if indexed else None
    table["k"] = "v"
    assert table.touch("k", expire_s=None)
    seqno = db.last_seqno
    for change in (lambda: table.delete("k"), lambda: table.put("k", "w", expire_s=100)):
        change()
        table.revert("k", to=seqno)
        assert (table["k"], table.expires("k")) == ("v", None)
        assert index is None or index.get("v") == [("k", "v")]
    later(disk, 6000)
    remove_all(db)
    assert (table["k"], db.stats().expiry_rows) == ("v", 0)
    assert db.verify().ok


def test_the_feed_tells_the_value_that_a_removed_key_had(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=1)
    later(disk, 1)
    remove_all(db)
    told = list(db.changes(after=0, follow=False, previous=True))
    assert [(c.kind, c.previous) for c in told] == [("put", None), ("expire", b"v")]


def test_a_removal_does_not_conflict_with_a_transaction_that_saw_the_key_as_gone(
    db: kvwal.Store, disk: SimulatedDisk
) -> None:
    db.put(b"k", b"v", expire_s=1)
    later(disk, 1)
    with db.transaction() as txn:
        assert txn.get(b"k") is None
        assert list(txn) == []
        assert remove_all(db) == 1
        txn[b"seen"] = b"absent"
    assert db[b"seen"] == b"absent"


def test_a_removal_in_the_group_of_a_transaction_is_no_conflict(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=1)
    later(disk, 1)
    txn = db.transaction()
    assert txn.get(b"k") is None
    txn[b"seen"] = b"absent"
    mine = txn.request()
    assert mine is not None
    rows = list(db.engine.expirer.rows())
    removal = CommitRequest(sync=False, operation=expirer._Remove(rows, disk.clock_us))
    db.engine.queue.submit([removal, mine])
    txn.abort()
    assert (removal.error, mine.error) == (None, None)
    assert removal.seqno
    assert mine.seqno == removal.seqno + 1


def test_what_others_do_to_an_expired_key_is_a_conflict(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"lease", b"me", expire_s=1)
    txn = db.transaction()
    assert txn[b"lease"] == b"me"
    later(disk, 1)
    remove_all(db)
    assert db.put_if_absent(b"lease", b"another")
    txn[b"work"] = b"done"
    with pytest.raises(kvwal.ConflictError):
        txn.commit()


# -- clocks ------------------------------------------------------------------------------------


def test_a_clock_that_steps_back_brings_nothing_back(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=10)
    later(disk, 10)
    assert b"k" not in db
    disk.jump_clock(-3600 * S)
    assert b"k" not in db
    assert len(db) == 0
    db.put(b"short", b"v", expire_s=10)
    later(disk, 10)
    assert b"short" in db
    # The time goes on by nine tenths.
    later(disk, 2)
    assert b"short" not in db


def test_a_clock_that_steps_ahead_by_more_than_an_hour_is_believed_after_ten_minutes(
    db: kvwal.Store, disk: SimulatedDisk
) -> None:
    db.put(b"k", b"v", expire_s=4000)
    disk.jump_clock(7200 * S)
    assert db[b"k"] == b"v"
    later(disk, 590)
    assert db[b"k"] == b"v"
    later(disk, 20)
    assert b"k" not in db


def test_a_clock_that_steps_ahead_by_less_is_believed_at_once(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=1000)
    disk.jump_clock(1200 * S)
    assert b"k" not in db


def test_an_opened_store_takes_the_clock_as_it_finds_it(db: kvwal.Store, disk: SimulatedDisk) -> None:
    db.put(b"k", b"v", expire_s=4000)
    disk.jump_clock(7200 * S)
    db = reopened(db, disk)
    assert b"k" not in db
    db.close()


# -- nothing is paid for what is not used --------------------------------------------------------


def test_a_store_without_expiry_has_neither_the_feature_nor_another_way_to_read(
    db: kvwal.Store, disk: SimulatedDisk
) -> None:
    db[b"k"] = b"v"
    db.checkpoint()
    clock = db.engine.reads.moments.clock
    assert not clock.in_use
    assert not db.engine.expirer.may_be_due()
    assert not db.engine._pages.meta.required & EXPIRY
    db.put(b"e", b"v", expire_s=1)
    assert clock.in_use
    assert db.engine.state.cache.rows.get(b"e") is None
    assert b"k" in db.engine.state.cache.rows
    db[b"e"]
    assert b"e" not in db.engine.state.cache.rows
