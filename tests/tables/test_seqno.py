"""Keys that the commit fills in: unique, and in the order of the commits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from store_fixtures import check_store, problems_of, run_threads

import kvwal
from kvwal import SEQNO
from kvwal.batch import WriteBatch
from kvwal.codecs import Versionstamp
from kvwal.testing import SimulatedDisk, crash_every

KEY = tuple[str, Versionstamp]


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as store:
        yield store
        check_store(store)
        assert problems_of(store) == []


def stamps(events: Any) -> list[tuple[int, int]]:
    return [(key[1].seqno, key[1].ordinal) for key in events]


def test_a_put_is_named_by_its_commit(db: kvwal.Store) -> None:
    events = db.table("events", KEY, str)
    first = events.put(("a", SEQNO), "one")
    second = events.put(("a", SEQNO), "two")
    assert list(events.items()) == [
        (("a", Versionstamp(first, 0)), "one"),
        (("a", Versionstamp(second, 0)), "two"),
    ]
    assert events["a", Versionstamp(second, 0)] == "two"
    with pytest.raises(TypeError, match="SEQNO"):
        events.get(("a", SEQNO))
    with pytest.raises(TypeError):
        events.put((SEQNO, "a"), "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        db.table("names", tuple[str, str], str).put(("a", SEQNO), "x")  # type: ignore[arg-type]


def test_several_of_a_commit_are_numbered(db: kvwal.Store) -> None:
    events, others = db.table("events", KEY, str), db.table("others", KEY, str)
    events.update([(("a", SEQNO), "one"), (("b", SEQNO), "two"), (("a", SEQNO), "three")])
    assert [(key[0], key[1].ordinal, value) for key, value in events.items()] == [
        ("a", 0, "one"),
        ("a", 2, "three"),
        ("b", 1, "two"),
    ]
    events.clear()
    with db.batch() as batch:
        batch.put_stamped(b"x", b"default")
        others.within(batch).put(("o", SEQNO), "other")
        events.within(batch).update({("e", SEQNO): "event"})
        events.within(batch).put(("e", Versionstamp(1, 1)), "known")
    seqno = db.last_seqno
    assert dict(db) == {b"x" + seqno.to_bytes(8, "big") + bytes(4): b"default"}
    assert stamps(events) == [(1, 1), (seqno, 1)], "by table, and then in the order of the calls"
    assert stamps(others) == [(seqno, 2)]
    again = db.commit(batch)
    assert stamps(others) == [(seqno, 2), (again, 2)], "a batch may be committed again"
    copied = batch.copy()
    batch.clear()
    assert not batch.has_stamped()
    assert copied.has_stamped()
    assert stamps(others)[-1] == (again, 2)


def test_a_key_that_was_put_as_it_is_is_never_filled_in(db: kvwal.Store) -> None:
    pending = b"\xff" * 8 + bytes(4)
    with db.batch() as batch:
        batch.put(b"x" + pending, b"by hand")
        batch.put_stamped(b"x", b"filled in")
    assert dict(db) == {b"x" + pending: b"by hand", b"x" + (1).to_bytes(8, "big") + bytes(4): b"filled in"}
    with pytest.raises(ValueError, match="seqno"):
        Versionstamp((1 << 64) - 1, 0)


def test_a_transaction_changes_and_takes_back_what_it_is_to_fill_in(db: kvwal.Store) -> None:
    events = db.table("events", KEY, str)
    with db.transaction() as txn:
        mine = events.within(txn)
        for value in ("one", "two", "three"):
            mine["a", SEQNO] = value
        first, second, third = mine
        assert first[1] < second[1] < third[1] < SEQNO
        mine[first] = "changed"
        mine.delete(second)
        assert mine.popitem() == (third, "three")
        assert list(mine.values()) == ["changed"]
    assert events.items() == {("a", Versionstamp(1, 0)): "changed"}.items()


def test_a_part_of_the_default_table_has_them_too(db: kvwal.Store) -> None:
    events = db.sub(b"events/", KEY, str)
    seqno = events.put(("a", SEQNO), "one")
    events.update({("b", SEQNO): "two"})
    with db.transaction() as txn:
        events.within(txn)["c", SEQNO] = "three"
    with db.batch() as batch:
        events.within(batch).put(("d", SEQNO), "four")
    assert list(events.items()) == [
        ((name, Versionstamp(seqno + n, 0)), value)
        for n, (name, value) in enumerate([("a", "one"), ("b", "two"), ("c", "three"), ("d", "four")])
    ]
    assert all(key.startswith(b"events/\x02") for key in db)
    with pytest.raises(TypeError):
        db.sub(b"x", str, str).put(("a", SEQNO), "x")  # type: ignore[arg-type]  # it is refused


def test_a_transaction_writes_them_at_its_place(db: kvwal.Store) -> None:
    events = db.table("events", KEY, str)
    with db.transaction() as txn:
        mine = events.within(txn)
        mine["a", SEQNO] = "one"
        mine["a", SEQNO] = "two"
        db[b"other"] = b"commit"
    assert txn.commit_seqno == 2
    assert stamps(events) == [(2, 0), (2, 1)]
    with db.transaction() as txn:
        txn.put_stamped(b"only ", b"1")
    assert db[b"only " + (3).to_bytes(8, "big") + bytes(4)] == b"1"
    reading = db.transaction()
    assert len(events.within(reading)) == 2
    reading[b"x"] = b"y"
    events.put(("a", SEQNO), "three")
    with pytest.raises(kvwal.ConflictError):
        reading.commit()


def test_threads_tasks_and_projections_keep_the_order_without_a_conflict(db: kvwal.Store) -> None:
    events = db.table("events", KEY, int)

    def write(number: int) -> None:
        for i in range(50):
            if i % 3 == 0:
                events.put(("e", SEQNO), number)
            elif i % 3 == 1:
                events.update([(("e", SEQNO), number), (("e", SEQNO), number)])
            else:
                with db.transaction() as txn:
                    events.within(txn)["e", SEQNO] = number

    run_threads(*(lambda number=number: write(number) for number in range(8)))
    assert len(events) == 8 * (17 + 2 * 17 + 16)
    for change in db.changes(0):
        if change.table == events.id:
            key, _ = events.of(change)
            assert key[1].seqno == change.seqno


def test_a_full_group_with_conflicts_fills_in_what_is_written(db: kvwal.Store) -> None:
    one, two, three = (db.transaction() for _ in range(3))
    for txn in (one, two):
        txn.get(b"k")
        txn[b"k"] = b"1"
    for txn in (one, two, three):
        txn.put_stamped(b"e", b"v")
    requests = [request for txn in (one, two, three) if (request := txn.request()) is not None]
    db.engine.queue.submit(requests)
    assert [type(request.error) for request in requests] == [type(None), kvwal.ConflictError, type(None)]
    assert [key for key in db if key.startswith(b"e")] == [b"e" + n.to_bytes(8, "big") + bytes(4) for n in (1, 2)]
    for txn in (one, two, three):
        txn.abort()


def test_on_a_full_disk_the_put_that_is_tried_again_has_the_number_of_its_commit() -> None:
    disk = SimulatedDisk(capacity=16 << 20)
    with kvwal.open("/kv", files=disk, background=False, segment_bytes=1 << 20) as db:
        events = db.table("events", tuple[Versionstamp], bytes)
        with pytest.raises(kvwal.DiskFullError):
            while True:
                events.put((SEQNO,), bytes(1 << 18))
        events.clear()
        seqno = events.put((SEQNO,), b"after")
        assert list(events.items()) == [((Versionstamp(seqno, 0),), b"after")]


def test_a_power_cut_leaves_them_as_they_were_numbered() -> None:
    def program(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            events = db.table("events", KEY, int)
            for number in range(4):
                acknowledged.append(events.put(("e", SEQNO), number))
            db.checkpoint()
            with db.transaction() as txn:
                events.within(txn)["e", SEQNO] = 4
            acknowledged.append(txn.commit_seqno or 0)

    def check(disk: SimulatedDisk, acknowledged: list[int]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            found = list(db.table("events", KEY, int).items())
            assert [value for _, value in found] == list(range(len(found)))
            seqnos = [key[1].seqno for key, _ in found]
            assert seqnos[: len(acknowledged)] == acknowledged
            assert len(seqnos) <= len(acknowledged) + 1

    crash_every(program, check)


def test_a_batch_says_what_it_cannot_store() -> None:
    batch = WriteBatch()
    with pytest.raises(ValueError, match="65"):
        batch.put_stamped(bytes(65_530), b"v")
    with pytest.raises(TypeError):
        batch.put_stamped(b"k", "v")  # type: ignore[arg-type]
    assert len(batch) == 0
    batch.put_stamped(bytes(65_523), b"v")
    assert [len(key) for key in batch.filled(7).writes] == [65_535]


def test_what_is_too_large_for_the_log_is_refused_alone(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.log.intents.MAX_BODY_BYTES", 1000)
    one, two = db.transaction(), db.transaction()
    one.put_stamped(b"e", bytes(2000))
    two.put_stamped(b"e", b"v")
    requests = [request for txn in (one, two) if (request := txn.request()) is not None]
    db.engine.queue.submit(requests)
    assert [type(request.error) for request in requests] == [ValueError, type(None)]
    assert list(db) == [b"e" + (1).to_bytes(8, "big") + bytes(4)]
    one.abort()
    two.abort()
