"""Consumers: against a model, over crashes at every operation, two owners, and what an idle store writes."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aio_fixtures import held_files
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import TINY, check_store, commit_rows, interrupted_at, run_threads

import kvwal
from kvwal import ClosedError, ConsumerExistsError, CorruptionError, FeedGap, FencedError, LockedError, ReadOnlyError
from kvwal.batch import WriteBatch
from kvwal.engine.consumers import ConsumerRow, RowChange, decode_row, encode_row, row_key
from kvwal.engine.request import CommitRequest
from kvwal.errors import FormatError
from kvwal.feed.change import Change
from kvwal.feed.owned import RowCommit
from kvwal.keys import Seqno
from kvwal.log import Limits
from kvwal.testing import SimulatedDisk, crash_every
from kvwal.times import time_of


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, "keep_history_bytes": 0, **options})


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with opened(disk) as store:
        yield store


def consumer(db: kvwal.Store, name: str = "mailer", **options: Any) -> kvwal.Consumer:
    """One that never waits, and stores each position at once."""
    return db.consumer(name, **{"ack_interval_s": 0, "timeout_s": 0, **options})


def keys(batch: kvwal.Batch) -> list[bytes]:
    return [change.key for change in batch.changes]


def drained(feed: kvwal.Consumer) -> list[bytes]:
    """All that is there, acknowledged."""
    found: list[bytes] = []
    while (batch := next(feed)).changes:
        found += keys(batch)
        feed.ack(batch)
    return found


def operations(disk: SimulatedDisk) -> int:
    """How often something was asked of the disk that is no read."""
    assert disk.trace is not None
    return sum(each.name not in ("open", "open_directory", "pread", "list_directory") for each in disk.trace)


# -- the row -----------------------------------------------------------------------------------

ROW = ConsumerRow("mailer", b"line----", Seqno(7), 3, 1234, Limits(1 << 20, None), bytes(range(32)), "ValueError: é")


def test_a_row_is_these_bytes() -> None:
    golden = (
        "0100 0e00 6c696e652d2d2d2d 0700000000000000 0300000000000000 d204000000000000 0000100000000000"
        "ffffffffffffffff 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    )
    assert row_key("mailer") == b"\x03mailer"
    assert encode_row(ROW) == bytes.fromhex(golden) + "ValueError: é".encode()
    assert decode_row(row_key("mailer"), encode_row(ROW)) == ROW


@given(
    st.binary(max_size=120) | st.binary(max_size=60).map(lambda tail: encode_row(ROW)[:84] + tail),
    st.binary(max_size=9),
)
def test_hostile_bytes_are_a_row_or_an_error_of_kvwal(value: bytes, name: bytes) -> None:
    try:
        row = decode_row(b"\x03" + name, value)
    except (CorruptionError, FormatError):
        return
    assert encode_row(row) == value


def test_each_byte_cut_off_a_row_is_noticed() -> None:
    value = encode_row(ROW)
    for size in range(len(value)):
        with pytest.raises(CorruptionError):
            decode_row(row_key("mailer"), value[:size])
    with pytest.raises(FormatError):
        decode_row(row_key("mailer"), b"\x02" + value[1:])


def test_a_damaged_row_is_said_at_open_and_a_newer_one_is_left_alone(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        batch = WriteBatch()
        batch.table(1).put(row_key("newer"), b"\x02 what a newer version writes")
        commit_rows(db, batch)
    with opened(disk) as db:
        with pytest.raises(FormatError):
            consumer(db, "newer")
        batch = WriteBatch()
        batch.table(1).put(row_key("damaged"), b"\x01")
        commit_rows(db, batch)
    with pytest.raises(CorruptionError, match="damaged"):
        opened(disk)


# -- one consumer ------------------------------------------------------------------------------


def test_an_acknowledged_position_is_found_again(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    db[b"b"] = b"2"
    batch = next(feed)
    assert keys(batch) == [b"a", b"b"]
    assert (batch.first, batch.last, batch.scanned) == (1, 3, 3)
    feed.ack(batch)
    db[b"c"] = b"3"
    db.close()
    with opened(disk) as db, consumer(db) as feed:
        assert feed.position == 3
        assert drained(feed) == [b"c"]


def test_what_was_not_acknowledged_comes_again(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    assert keys(next(feed)) == [b"a"]
    db.close()
    with opened(disk) as db, consumer(db) as feed:
        assert drained(feed) == [b"a"]


def test_batches_cover_all_commits_without_a_gap(db: kvwal.Store) -> None:
    feed = consumer(db, prefix=b"user:")
    last = feed.position
    for number in range(20):
        db.put(b"user:%d" % number if number % 3 else b"other", b"x")
        if number % 4 == 0:
            batch = next(feed)
            assert batch.first == last + 1
            last = batch.last
            if number % 8:
                feed.ack(batch)
    assert last > 15


def test_an_ack_covers_the_batches_before_it_and_never_goes_back(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    one = next(feed)
    db[b"b"] = b"2"
    two = next(feed)
    feed.ack(two)
    feed.ack(one)
    assert feed.position == two.last
    with pytest.raises(ValueError, match="beyond"):
        feed.ack(kvwal.Batch((), Seqno(1), Seqno(99)))


def test_large_commits_are_whole_and_batches_end(db: kvwal.Store) -> None:
    feed = consumer(db)
    db.update({b"%05d" % number: b"x" for number in range(1500)})
    for number in range(1200):
        db.put(b"z%d" % number, b"")
    sizes = []
    while (batch := next(feed)).changes:
        assert batch.changes[-1].last
        sizes.append(len(batch.changes))
    assert sizes == [1500, 1000, 200]


def test_a_new_consumer_begins_where_it_is_told(db: kvwal.Store) -> None:
    for number in range(4):
        db[b"%d" % number] = b"x"
    assert drained(consumer(db, "now")) == []
    assert drained(consumer(db, "oldest", start="oldest")) == [b"0", b"1", b"2", b"3"]
    assert drained(consumer(db, "after", start=3)) == [b"3"]
    with pytest.raises(FeedGap):
        consumer(db, "beyond", start=99)
    # What failed left nothing behind.
    assert drained(consumer(db, "beyond", start=3)) == [b"3"]


@pytest.mark.parametrize("durability", ["commit", "interval", "os"])
def test_a_new_consumer_that_begins_at_a_time_is_told_of_nothing_before_it_however_late_that_is_flushed(
    disk: SimulatedDisk, durability: Any
) -> None:
    with kvwal.open("/late", files=disk, background=False, durability=durability) as db:
        db.put(b"flushed", b"", durability="commit")
        for number in range(5):
            db.put(b"old%d" % number, b"")
        [*_, last] = db.history()
        disk.jump_clock(1_000_000)
        for name, seconds in (("now", 0.5), ("to come", 3600.0)):
            feed = db.consumer(name, start=time_of(last.time_us) + timedelta(seconds=seconds), timeout_s=0)
            db.put(b"new", b"", durability="commit")
            assert keys(next(feed)) == [b"new"]
            feed.close()


def test_a_new_consumer_begins_at_a_time(disk: SimulatedDisk, db: kvwal.Store) -> None:
    made: list[datetime] = []
    # It holds the log meanwhile.
    consumer(db, "keeper").close()
    for number in range(60):
        db.put(b"%d" % number, bytes(1000))
        [commit] = db.commits(db.last_seqno - 1)
        made.append(commit.time)
        disk.jump_clock(1_000_000)
    assert len(db.engine._log.segments()) > 2  # type: ignore[union-attr]  # it may write
    for number in range(60):
        for early_s, first in ((0.0, number), (0.5, number), (-0.5, number + 1)):
            at = made[number] - timedelta(seconds=early_s)
            feed = consumer(db, f"{number} {early_s}", start=at)
            assert keys(next(feed)) == [b"%d" % each for each in range(first, 60)]
    assert drained(consumer(db, "later", start=made[-1] + timedelta(days=1))) == []
    for name in {info.name for info in db.consumers()} - {"later"}:
        consumer(db, name, steal=True).close()
        assert db.remove_consumer(name)
    db.checkpoint()
    db.put(b"more", b"")
    db.checkpoint()
    with pytest.raises(FeedGap):
        consumer(db, "gone", start=made[0])
    # Nothing else is held.
    assert {hold.name for hold in db.engine._log.holds()} == {"later"}  # type: ignore[union-attr]  # it may write


def test_now_is_resolved_once(disk: SimulatedDisk, db: kvwal.Store) -> None:
    consumer(db).close()
    db[b"a"] = b"1"
    with consumer(db) as feed:
        assert drained(feed) == [b"a"]


def test_another_filter_is_refused_and_may_replace(db: kvwal.Store) -> None:
    with consumer(db, prefix=[b"b", b"a"]):
        db[b"a1"] = b"1"
    with pytest.raises(ConsumerExistsError, match="mailer"):
        consumer(db, prefix=b"c")
    # The same keys, said otherwise.
    consumer(db, prefix=[b"a", b"b", b"a1"]).close()
    with consumer(db, prefix=b"a", replace=True) as feed:
        assert drained(feed) == [b"a1"]
    with pytest.raises(ConsumerExistsError):
        consumer(db, prefix=[b"b", b"a"])


def test_a_removed_consumer_begins_anew_and_holds_nothing(db: kvwal.Store) -> None:
    with consumer(db, start="oldest"), pytest.raises(LockedError):
        db.remove_consumer("mailer")
    assert [hold.name for hold in db.engine._log.holds()] == ["mailer"]  # type: ignore[union-attr]
    assert db.remove_consumer("mailer")
    assert db.engine._log.holds() == []  # type: ignore[union-attr]
    assert not db.remove_consumer("mailer")
    db[b"a"] = b"1"
    assert drained(consumer(db)) == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"name": ""}, ValueError),
        ({"name": "x" * 256}, ValueError),
        ({"name": "\ud800"}, ValueError),
        ({"name": b"x"}, TypeError),
        ({"start": -1}, ValueError),
        ({"start": "then"}, TypeError),
        ({"start": datetime(2026, 1, 1)}, ValueError),  # noqa: DTZ001  # that is what is refused
        ({"max_lag_bytes": -1}, ValueError),
        ({"max_lag_s": -1}, ValueError),
        ({"ack_interval_s": -1}, ValueError),
        ({"timeout_s": float("nan")}, ValueError),
        ({"tables": [1]}, ValueError),
    ],
)
def test_what_cannot_be_right_is_refused(db: kvwal.Store, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        db.consumer(**{"name": "mailer", **options})
    assert db.last_seqno == 0


def test_a_read_only_store_has_no_consumers_of_its_own(disk: SimulatedDisk, db: kvwal.Store) -> None:
    consumer(db).close()
    db.close()
    with opened(disk, flag="r") as db:
        with pytest.raises(ReadOnlyError):
            consumer(db)
        with pytest.raises(ReadOnlyError):
            db.remove_consumer("mailer")


def test_a_closed_consumer_or_store_says_so(db: kvwal.Store) -> None:
    feed = consumer(db)
    other = consumer(db, "other")
    feed.close()
    for call in (lambda: next(feed), lambda: feed.ack(kvwal.Batch((), Seqno(1), Seqno(0)))):
        with pytest.raises(ClosedError, match="consumer"):
            call()
    assert other.alive
    assert not feed.alive
    db.close()
    assert not other.alive
    with pytest.raises(ClosedError, match="store"):
        next(other)
    other.close()
    other.close()


def test_a_waiting_consumer_is_woken_by_a_commit_and_ended_by_a_close() -> None:
    disk = SimulatedDisk()
    db = kvwal.open("/kv", files=disk, **TINY)
    feed = db.consumer("mailer")
    found: list[bytes] = []
    seen = threading.Event()

    def read() -> None:
        try:
            for batch in feed:
                found.extend(keys(batch))
                seen.set()
        except ClosedError:
            found.append(b"closed")

    def write() -> None:
        db[b"a"] = b"1"
        assert seen.wait(20)
        db.close()

    run_threads(read, write)
    assert found == [b"a", b"closed"]


# -- what it writes ----------------------------------------------------------------------------


def test_an_idle_store_writes_nothing(disk: SimulatedDisk, db: kvwal.Store) -> None:
    """`self_feeding_consumer`: a position is a commit, which the feed would tell, which would be acknowledged."""
    feeds = [consumer(db, str(number)) for number in range(100)]
    db[b"a"] = b"1"
    for feed in feeds:
        assert drained(feed) == [b"a"]
    written = db.last_seqno
    assert written == 201
    disk.trace = []
    for _ in range(3):
        for feed in feeds:
            assert drained(feed) == []
    for feed in feeds:
        feed.close()
    for number in range(100):
        again = consumer(db, str(number))
        assert drained(again) == []
        again.close()
    assert operations(disk) == 0
    assert db.last_seqno == written


def test_positions_are_coalesced_and_written_at_the_end(db: kvwal.Store) -> None:
    feed = consumer(db, ack_interval_s=3600)
    for number in range(10):
        db[b"%d" % number] = b"x"
        assert drained(feed) == [b"%d" % number]
    # The first is written at once.
    assert (feed.position, db.last_seqno) == (2, 12)
    feed.close()
    assert (feed.position, db.last_seqno) == (12, 13)


def test_a_filter_that_never_matches_moves_and_holds_nothing(db: kvwal.Store) -> None:
    feed = consumer(db, prefix=b"never")
    for number in range(500):
        db.put(b"%d" % number, bytes(200))
        if number % 50 == 0:
            assert not next(feed).changes
    assert not next(feed).changes
    assert feed.position == db.last_seqno - 1
    db.checkpoint()
    db.checkpoint()
    assert len(db.engine._log.segments()) <= 2  # type: ignore[union-attr]


def test_what_is_not_acknowledged_is_not_passed_over(db: kvwal.Store) -> None:
    feed = consumer(db, prefix=b"a")
    db[b"a"] = b"1"
    assert keys(next(feed)) == [b"a"]
    db[b"b"] = b"2"
    assert not next(feed).changes
    assert feed.position == 0


def test_no_consumer_is_told_of_positions(db: kvwal.Store) -> None:
    one, two = consumer(db, "one"), consumer(db, "two")
    db[b"a"] = b"1"
    for _ in range(3):
        drained(one)
        drained(two)
    assert [change.key for change in db.changes(0)] == [b"a"]
    assert drained(consumer(db, "three", start="oldest")) == [b"a"]


# -- projections -------------------------------------------------------------------------------


def count(txn: kvwal.Transaction, changes: Any) -> None:
    """Under "sum:" how often each key was put: wrong at once if a change is applied twice, or never."""
    for change in changes:
        key = b"sum:" + change.key
        txn[key] = b"%d" % (int(txn.get(key, b"0")) + 1)


def counted(db: kvwal.Store) -> dict[bytes, int]:
    return {key[4:]: int(value) for key, value in db.scan(prefix=b"sum:")}


def test_a_projection_and_its_position_are_one_commit(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    db[b"a"] = b"2"
    before = db.last_seqno
    assert feed.project(count, timeout_s=0) == before
    assert db.last_seqno == before + 1
    assert counted(db) == {b"a": 2}
    [*_, record] = db.history()
    assert record.extension() == {5: b"mailer"}
    assert {table for table, _ in record.batch().parts()} == {1}


def test_a_projection_comes_to_rest_after_one_commit(db: kvwal.Store) -> None:
    feed, other = consumer(db), consumer(db, "other")
    db[b"a"] = b"1"
    for _ in range(3):
        feed.project(count, timeout_s=0)
    assert counted(db) == {b"a": 1}
    # Another one is told of what it wrote.
    assert drained(other) == [b"a", b"sum:a"]


def test_a_projection_may_say_who_and_why(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"

    def into(txn: kvwal.Transaction, changes: Any) -> None:
        count(txn, changes)
        txn.meta = {"why": "counted"}

    feed.project(into, timeout_s=0)
    [*_, record] = db.history()
    assert record.meta() == {"why": "counted"}
    assert record.extension()[5] == b"mailer"


def test_its_own_commits_are_told_on_request(db: kvwal.Store) -> None:
    feed = consumer(db, own=True)
    db[b"a"] = b"1"

    def note(txn: kvwal.Transaction, changes: Any) -> None:
        for change in changes:
            if not change.key.startswith(b"seen:"):
                txn[b"seen:" + change.key] = b""

    feed.project(note, timeout_s=0)
    assert feed.project(note, timeout_s=0) == 3
    assert dict(db) == {b"a": b"1", b"seen:a": b""}


def test_a_projection_that_conflicts_runs_again(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    calls = []

    def disturbed(txn: kvwal.Transaction, changes: list[Change]) -> None:
        count(txn, changes)
        calls.append(len(changes))
        if len(calls) == 1:
            db[b"sum:a"] = b"10"

    feed.project(disturbed, timeout_s=0)
    assert calls[0] == 1
    assert counted(db)[b"a"] == 11


def test_a_projection_that_always_conflicts_is_tried_a_hundred_times(db: kvwal.Store) -> None:
    feed = consumer(db, prefix=b"a")
    db[b"a"] = b"1"
    calls = 0

    def disturbed(txn: kvwal.Transaction, changes: list[Change]) -> None:
        nonlocal calls
        calls += 1
        count(txn, changes)
        db[b"sum:a"] = b"%d" % calls

    with pytest.raises(kvwal.ConflictError):
        feed.project(disturbed, timeout_s=0)
    assert calls == 100
    assert feed.position == 0


def test_an_empty_batch_comes_after_the_timeout(db: kvwal.Store) -> None:
    feed = consumer(db, timeout_s=0.05)
    began_s = time.monotonic()
    assert next(feed).changes == ()
    assert 0.05 <= time.monotonic() - began_s < 5


def test_an_error_stops_with_the_position_and_is_stored(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"

    def fails(txn: kvwal.Transaction, changes: list[Change]) -> None:
        count(txn, changes)
        raise LookupError("no such mail")

    for _ in range(3):
        with pytest.raises(LookupError):
            feed.project(fails, timeout_s=0)
    # Stored once.
    assert db.last_seqno == 3
    assert counted(db) == {}
    feed.close()
    db.close()
    with opened(disk) as db:
        [row] = db.engine.upkeep.consumers.rows()
        assert (row.last_error, row.position) == ("LookupError: no such mail", 0)
        feed = consumer(db)
        feed.project(count, timeout_s=0)
        assert counted(db) == {b"a": 1}
        [row] = db.engine.upkeep.consumers.rows()
        assert row.last_error == ""


def test_an_error_in_the_loop_is_stored_with_what_was_acknowledged(db: kvwal.Store) -> None:
    with pytest.raises(LookupError), consumer(db, ack_interval_s=3600) as feed:
        for number in range(3):
            db[b"%d" % number] = b"x"
            feed.ack(next(feed))
        db[b"last"] = b"x"
        raise LookupError(next(feed).changes[0].key)
    [row] = db.engine.upkeep.consumers.rows()
    assert row.last_error == "LookupError: b'last'"
    with consumer(db) as feed:
        assert drained(feed) == [b"last"]


def test_a_projection_must_not_end_its_transaction(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    with pytest.raises(ClosedError):
        feed.project(lambda txn, changes: txn.commit(), timeout_s=0)


def test_what_was_not_acknowledged_is_projected(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    next(feed)
    db[b"b"] = b"1"
    next(feed)
    feed.project(count, timeout_s=0)
    assert counted(db) == {b"a": 1, b"b": 1}


def test_projections_of_several_consumers_and_writers_count_each_change_once() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, **TINY) as db:
        names = ["one", "two", "three"]
        feeds = {name: db.consumer(name, prefix=b"key:", start="oldest") for name in names}

        def write() -> None:
            for number in range(60):
                db.add(b"key:%d" % (number % 5), 1)

        def project(name: str) -> None:
            def into(txn: kvwal.Transaction, changes: Any) -> None:
                for change in changes:
                    key = name.encode() + b":" + change.key
                    txn[key] = b"%d" % (int(txn.get(key, b"0")) + 1)

            done = 0
            while done < 120:
                feeds[name].project(into, timeout_s=0.05)
                done = sum(int(value) for _, value in db.scan(prefix=name.encode() + b":"))

        run_threads(write, write, *(lambda name=name: project(name) for name in names))
        for name in names:
            found = {key: int(value) for key, value in db.scan(prefix=name.encode() + b":")}
            assert found == {name.encode() + b":key:%d" % number: 24 for number in range(5)}
        for feed in feeds.values():
            feed.close()
        check_store(db)


# -- owners ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (5, TypeError, "a consumer's name is a str, not int"),
        (b"x", TypeError, "a consumer's name is a str, not bytes"),
        (None, TypeError, "a consumer's name is a str, not NoneType"),
        ("\ud800", ValueError, "a consumer's name must be encodable in UTF-8"),
        ("", ValueError, "a consumer's name has 1 to 255 bytes in UTF-8, not 0"),
        ("ä" * 128, ValueError, "a consumer's name has 1 to 255 bytes in UTF-8, not 256"),
    ],
)
def test_what_can_be_no_name_is_refused_where_one_is_made_and_removed(
    db: kvwal.Store, name: Any, error: type[Exception], text: str
) -> None:
    for ask in (db.consumer, db.remove_consumer):
        with pytest.raises(error, match=text) as raised:
            ask(name)
        assert type(raised.value) is error
    assert db.last_seqno == 0


def test_a_second_owner_is_refused_with_the_name_of_the_thread(db: kvwal.Store) -> None:
    feed = consumer(db)
    with pytest.raises(LockedError, match=r"'mailer'.*'MainThread'") as caught:
        consumer(db)
    assert (caught.value.consumer, caught.value.thread, caught.value.own) == ("mailer", "MainThread", True)
    feed.close()
    consumer(db).close()


def test_a_forgotten_consumer_may_be_asked_for_again(db: kvwal.Store) -> None:
    feed = consumer(db)
    del feed
    gc.collect()
    consumer(db).close()


def test_taking_over_fences_the_first_owner(db: kvwal.Store) -> None:
    first = consumer(db)
    db[b"a"] = b"1"
    batch = next(first)
    second = consumer(db, steal=True)
    for call in (lambda: first.ack(batch), lambda: next(first), lambda: first.project(count, timeout_s=0)):
        with pytest.raises(FencedError):
            call()
    with pytest.raises(FencedError):
        # Even if it does not look: the row has another epoch.
        first._commit(first._change(lambda row: row))
    assert drained(second) == [b"a"]
    first.close()
    db[b"b"] = b"1"
    assert drained(second) == [b"b"]


def test_a_close_beside_an_ack_of_its_own_owner_is_not_fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, flushes = held_files()
    with kvwal.open(tmp_path / "s", files=files, background=False) as db:
        feed = consumer(db)
        db[b"a"] = b"1"
        batch = next(feed)
        flushes.close()
        acking = threading.Thread(target=feed.ack, args=(batch,))
        acking.start()
        flushes.wait_until_reached()
        commit = feed._commit

        def committing(row: RowCommit | None) -> None:
            assert row is not None
            flushes.open()
            commit(row)

        monkeypatch.setattr(feed, "_commit", committing)
        feed.close()
        acking.join()
        assert feed.position == batch.last
        with consumer(db) as again:
            assert drained(again) == []


def test_a_failed_take_over_leaves_the_owner(db: kvwal.Store) -> None:
    feed = consumer(db)
    with pytest.raises(ConsumerExistsError):
        consumer(db, prefix=b"x", steal=True)
    db[b"a"] = b"1"
    assert drained(feed) == [b"a"]


def test_a_row_that_moved_fences_whatever_its_epoch(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"
    batch = next(feed)
    batch_of_another = WriteBatch()
    [row] = db.engine.upkeep.consumers.rows()
    moved = ConsumerRow("mailer", row.line, Seqno(2), row.epoch, row.created_us, row.limits, row.filter_hash)
    batch_of_another.table(1).put(row_key("mailer"), encode_row(moved))
    commit_rows(db, batch_of_another)
    with pytest.raises(FencedError):
        feed.ack(batch)


def test_in_one_group_the_later_change_sees_the_earlier_one(db: kvwal.Store) -> None:
    consumer(db).close()
    seen: list[ConsumerRow | None] = []

    def change(row: ConsumerRow | None) -> ConsumerRow | None:
        seen.append(row)
        return None if row is None else replace(row, epoch=row.epoch + 1)

    db.engine.queue.submit([CommitRequest(sync=True, operation=RowChange("mailer", change)) for _ in range(3)])
    assert [row.epoch for row in seen if row is not None] == [1, 2, 3]
    assert db.engine.upkeep.consumers.rows()[0].epoch == 4


def test_take_overs_at_any_moment_apply_each_change_once() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, **TINY) as db:
        consumer(db, prefix=b"key").close()

        def write() -> None:
            for number in range(80):
                db.put(b"key%d" % (number % 4), b"x")

        def project() -> None:
            for _ in range(15):
                feed = consumer(db, prefix=b"key", steal=True)
                try:
                    feed.project(count, timeout_s=0)
                    feed.close()
                except FencedError:
                    continue

        run_threads(write, project, project)
        with consumer(db, prefix=b"key", steal=True) as feed:
            feed.project(count, timeout_s=0)
        assert counted(db) == {b"key%d" % number: 20 for number in range(4)}


# -- what it holds, and how it is lost ---------------------------------------------------------


def filled(db: kvwal.Store, commits: int) -> None:
    """Commits of 1 KiB, with checkpoints, so that what is not held is retired."""
    for number in range(commits):
        db.put(b"key%d" % (number % 50), bytes(1000))
        if number % 20 == 19:
            db.checkpoint()


def oldest(db: kvwal.Store) -> int:
    return db.engine._log.segments()[0].first_seqno  # type: ignore[union-attr]


def test_a_consumer_holds_the_log_across_reopenings(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        consumer(db).close()
    for _ in range(3):
        # A checkpoint retires nothing that it has not read, whether it is in use or not.
        with opened(disk) as db:
            filled(db, 60)
    with opened(disk) as db, consumer(db) as feed:
        assert oldest(db) == 1
        assert len(drained(feed)) == 180
        filled(db, 60)
        assert len(drained(feed)) == 60
        db.checkpoint()
        db.checkpoint()
        assert oldest(db) > 100


def test_a_store_that_begins_with_a_checkpoint_holds_first(disk: SimulatedDisk) -> None:
    with opened(disk, memtable_bytes=1 << 20) as db:
        consumer(db).close()
        filled(db, 100)
        for number in range(100):
            db.put(b"more%d" % number, bytes(1000))
        # Killed: the next open replays more than fits its memory, and checkpoints at once.
        crashed = disk.crash(Random(1))
    with opened(crashed) as db, consumer(db) as feed:
        assert len(drained(feed)) == 200


def test_a_consumer_that_is_too_far_behind_is_lost_at_a_roll(
    disk: SimulatedDisk, db: kvwal.Store, caplog: pytest.LogCaptureFixture
) -> None:
    feed = consumer(db, max_lag_bytes=64 << 10)
    other = consumer(db, "other", max_lag_bytes=None)
    # Within the limit, and two segments.
    filled(db, 40)
    assert feed.alive
    # No checkpoint: it is looked at when a segment is full.
    for number in range(100):
        db.put(b"key%d" % (number % 50), bytes(1000))
    assert not feed.alive
    for _ in range(2):
        with pytest.raises(FeedGap) as caught:
            next(feed)
        assert (caught.value.asked, caught.value.newest) == (0, db.last_seqno)
    filled(db, 40)
    assert [record.message[:26] for record in caplog.records if "lost" in record.message] == [
        "consumer 'mailer' is lost "
    ]
    assert other.alive
    # It is kept, with its position.
    feed.close()
    db.close()
    with opened(disk) as db, consumer(db) as feed:
        with pytest.raises(FeedGap):
            next(feed)
        with feed.rebase() as snapshot:
            copy = dict(snapshot)
            db[b"late"] = b"1"
        assert drained(feed) == [b"late"]
        assert {**copy, b"late": b"1"} == dict(db)
        assert feed.alive


def test_a_consumer_whose_log_is_too_old_is_lost(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db, max_lag_s=3600)
    filled(db, 60)
    assert feed.alive
    disk.jump_clock(1800 * 10**6)
    filled(db, 60)
    assert feed.alive
    disk.jump_clock(3000 * 10**6)
    filled(db, 60)
    assert not feed.alive


def test_a_limit_below_a_second_is_said_as_it_is(
    disk: SimulatedDisk, db: kvwal.Store, caplog: pytest.LogCaptureFixture
) -> None:
    consumer(db, max_lag_s=0.25).close()
    filled(db, 60)
    disk.jump_clock(10**6)
    filled(db, 60)
    [told] = [record.message for record in caplog.records if "lost" in record.message]
    assert told.endswith(" s old, and the limit is 0.25 s")


def test_a_failed_rebase_leaves_it_lost(db: kvwal.Store) -> None:
    feed = consumer(db, max_lag_bytes=0)
    filled(db, 100)
    with pytest.raises(LookupError), feed.rebase():
        raise LookupError
    with pytest.raises(FeedGap):
        next(feed)
    assert feed.position == 0


def test_limits_stay_and_may_be_changed(db: kvwal.Store) -> None:
    def limits() -> Limits:
        [row] = db.engine.upkeep.consumers.rows()
        [hold] = db.engine._log.holds()  # type: ignore[union-attr]
        assert hold.limits == row.limits
        return row.limits

    consumer(db).close()
    assert limits() == (1 << 30, None)
    consumer(db, max_lag_s=2.5).close()
    assert limits() == (1 << 30, 2_500_000)
    consumer(db, max_lag_bytes=None).close()
    assert limits() == (None, 2_500_000)
    consumer(db).close()
    assert limits() == (None, 2_500_000)


def test_the_default_limit_is_a_tenth_of_a_small_disk() -> None:
    disk = SimulatedDisk(capacity=64 << 20)
    with opened(disk) as db:
        consumer(db).close()
        [row] = db.engine.upkeep.consumers.rows()
        assert 5 << 20 < (row.limits.max_bytes or 0) < 7 << 20


@pytest.mark.parametrize("whole", [False, True])
def test_on_a_full_disk_the_laziest_consumers_are_lost_and_no_commit_is_refused(
    caplog: pytest.LogCaptureFixture, whole: bool
) -> None:
    disk = SimulatedDisk(capacity=12 << 20)
    with opened(disk) as db:
        lazy = consumer(db, "lazy", max_lag_bytes=None)
        lazier = [consumer(db, name, max_lag_bytes=None) for name in ("one", "two")]
        for number in range(1000):
            db.put(b"key%d" % (number % 50), bytes(1000))
        drained(lazy)
        # As much as the disk has. None is refused.
        for number in range(12_000):
            if whole:
                db.update({b"key%d" % (number % 50): bytes(1000)})
            else:
                db.put(b"key%d" % (number % 50), bytes(1000))
            if number == 2000:
                assert lazy.alive
                drained(lazy)
            if number % 1000 == 0 and lazy.alive:
                drained(lazy)
        assert lazy.alive
        assert not any(feed.alive for feed in lazier)
        for feed in lazier:
            with pytest.raises(FeedGap) as caught:
                next(feed)
            assert caught.value.lost_commits
        check_store(db)
    assert sum("the disk is full" in record.message for record in caplog.records) == 2


def test_a_consumer_is_lost_before_a_commit_is_refused_for_want_of_the_reserve(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = consumer(db, max_lag_bytes=None)
    filled(db, 100)
    monkeypatch.setattr(db._pressure._reserve, "hold", lambda: not feed.alive)
    db._pressure.is_on = True
    db[b"a"] = b"1"
    assert not feed.alive


def test_a_position_on_another_line_is_lost(disk: SimulatedDisk, db: kvwal.Store) -> None:
    consumer(db).close()
    [row] = db.engine.upkeep.consumers.rows()
    batch = WriteBatch()
    batch.table(1).put(row_key("mailer"), encode_row(replace(row, line=b"another!")))
    commit_rows(db, batch)
    db.close()
    with opened(disk) as db, consumer(db) as feed:
        assert only(db).state == "lost"
        with pytest.raises(FeedGap):
            next(feed)


# -- what is listed ----------------------------------------------------------------------------


def only(db: kvwal.Store) -> kvwal.ConsumerInfo:
    [info] = db.consumers()
    return info


def test_consumers_are_listed_with_their_lag(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db, prefix=b"never")
    assert only(db) == kvwal.ConsumerInfo("mailer", "active", Seqno(0), Seqno(0), 0, 0, 0.0, 0, "MainThread", "")
    filled(db, 100)
    without = only(db)
    assert list(db.versions(b"key0"))
    info = only(db)
    # The key indexes that this has made are held too.
    assert info.held_bytes > without.held_bytes
    with db.changes(0):
        assert {pin.held_bytes for pin in db.pins()} == {info.held_bytes}
    assert (info.position, info.scanned, info.lag_commits) == (0, 0, 100)
    # 20 keys of 4 bytes, 80 of 5.
    assert info.lag_bytes == 100 * (40 + 11 + 1000) + 20 * 4 + 80 * 5
    assert 0 < (info.lag_s or 0) < 1
    before = db.stats().log_bytes
    assert not next(feed).changes
    # What goes without it.
    db.engine._checkpointer._retire()  # type: ignore[union-attr]
    assert info.held_bytes == before - db.stats().log_bytes > 0
    assert only(db) == kvwal.ConsumerInfo("mailer", "active", Seqno(101), Seqno(101), 0, 0, 0.0, 0, "MainThread", "")
    feed.close()
    info = only(db)
    assert (info.state, info.owner, info.lag_commits, info.lag_bytes) == ("stopped", None, 0, 0)
    db.close()
    with opened(disk, flag="r") as db:
        assert only(db) == info


def test_a_large_lag_is_listed_without_reading_all_of_it(db: kvwal.Store) -> None:
    consumer(db).close()
    for number in range(3000):
        db.put(b"key", b"%04d" % number)
    info = only(db)
    assert info.lag_commits == 3000
    exact = 3000 * (40 + 11 + 3 + 4)
    # The header pages of segments are counted: 4 of 16 KiB here.
    assert exact <= (info.lag_bytes or 0) < 1.35 * exact


def test_a_lost_consumer_is_listed_as_lost(disk: SimulatedDisk, db: kvwal.Store) -> None:
    consumer(db, max_lag_bytes=0).close()
    filled(db, 100)
    info = only(db)
    assert (info.state, info.position, info.lag_commits) == ("lost", 0, 101)
    assert (info.lag_bytes, info.lag_s, info.held_bytes) == (None, None, 0)
    db.close()
    with opened(disk, flag="r") as db:
        assert only(db) == info


# -- crashes and interruptions -----------------------------------------------------------------


def test_a_projection_is_exactly_once_whatever_survives() -> None:
    """Killed before every operation: the counts are those of the commits that survived, counted without the feed."""

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        db = opened(disk)
        feed = consumer(db, prefix=b"key")
        for number in range(4):
            db[b"key%d" % (number % 2)] = b"x"
            db.update({b"key0": b"y", b"other": b"y"})
            if number % 2:
                acknowledged.append(feed.project(count, timeout_s=0))
        feed.close()
        db.checkpoint()
        db.close()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            rows = db.engine.upkeep.consumers.rows()
            position = rows[0].position if rows else 0
            assert position <= db.durable_seqno
            assert position >= max(acknowledged, default=0)
            with consumer(db, prefix=b"key", start="oldest") as feed:
                feed.project(count, timeout_s=0)
            expected: Counter[bytes] = Counter()
            # Independent of the feed: what the log's records say that users put.
            for record in db.history():
                if 5 not in record.extension():
                    expected.update(key for key in record.batch().writes if key.startswith(b"key"))
            assert counted(db) == dict(expected)
            check_store(db)

    assert crash_every(program, check, states_per_point=6).points > 30


def test_every_acknowledged_position_survives_every_power_cut() -> None:
    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        db = opened(disk, durability="os")
        feed = consumer(db)
        acknowledged.append(feed.position)
        for number in range(4):
            db[b"%d" % number] = b"x"
            db.sync()
            feed.ack(next(feed))
            acknowledged.append(feed.position)
        db.close()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            rows = db.engine.upkeep.consumers.rows()
            assert bool(rows) or not acknowledged
            for row in rows:
                assert max(acknowledged, default=0) <= row.position <= db.durable_seqno
                with consumer(db) as feed:
                    assert len(drained(feed)) == len(list(db.changes(row.position)))

    crash_every(program, check, states_per_point=8)


def test_a_batch_that_is_interrupted_as_it_is_handed_out_comes_again(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"

    def interrupted(timeout_s: float | None) -> kvwal.Batch:
        kvwal.Consumer._read(feed, timeout_s)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feed, "_read", interrupted)
        next(feed)
    assert drained(feed) == [b"a"]


# What interrupts a finalizer is swallowed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_next_is_made_up_for_by_the_one_after_it() -> None:
    with opened(SimulatedDisk()) as db:
        feed = consumer(db, prefix=b"key", ack_interval_s=3600)
        step = 0
        last = feed.position
        while True:
            step += 1
            seqno = db.put(b"key", b"%d" % step)
            interrupted = interrupted_at(step, lambda: next(feed))
            if interrupted is None:
                break
            del interrupted
            batch = next(feed)
            assert (batch.first, [change.seqno for change in batch.changes]) == (last + 1, [seqno])
            last = batch.last
    assert step > 50


# What interrupts a finalizer is swallowed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_call_loses_no_change_and_applies_none_twice() -> None:
    step = 0
    while True:
        step += 29
        disk = SimulatedDisk()
        with opened(disk) as db:
            feed = consumer(db, prefix=b"key")
            db[b"key"] = b"1"
            db[b"key"] = b"2"
            interrupted = interrupted_at(step, lambda feed=feed: feed.project(count, timeout_s=0))
            if interrupted is None:
                assert counted(db) == {b"key": 2}
                break
            # Its traceback keeps what was begun.
            del interrupted
            gc.collect()
            feed.project(count, timeout_s=0)
            # What it took over refers to the traceback, too.
            gc.collect()
            assert counted(db) == {b"key": 2}, step
            check_store(db)
    assert step > 1000


# What interrupts a finalizer is swallowed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_rebase_is_made_or_not_and_no_change_is_applied_twice() -> None:
    step = 0
    while True:
        step += 37 if step < 800 else 3
        with opened(SimulatedDisk()) as db:
            feed = consumer(db, prefix=b"key")
            db[b"key"] = b"1"

            def rebase(db: kvwal.Store = db, feed: kvwal.Consumer = feed) -> None:
                with feed.rebase() as snapshot:
                    db[b"sum:key"] = b"%d" % (b"key" in snapshot)

            interrupted = interrupted_at(step, rebase)
            whole = interrupted is None
            # Its traceback keeps what was begun.
            del interrupted
            gc.collect()
            [info] = db.consumers()
            db[b"sum:key"] = b"%d" % (info.position >= 2)
            feed.project(count, timeout_s=0)
            assert counted(db) == {b"key": 1}, step
            if whole:
                break
    assert step > 900


# What interrupts a finalizer is swallowed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("then", ["ack", "close"])
def test_an_interrupted_ack_does_not_fence_its_own_owner(then: str) -> None:
    step = 0
    with opened(SimulatedDisk()) as db:
        feed = consumer(db)
        while True:
            step += 1
            seqno = db.put(b"key", b"%d" % step)
            batch = next(feed)
            assert batch.changes[0].seqno == seqno
            if interrupted_at(step, lambda batch=batch: feed.ack(batch)) is None:
                break
            if then == "ack":
                feed.ack(batch)
                assert feed.position == batch.last
            else:
                feed.close()
                feed = consumer(db)
                drained(feed)
    assert step > 300


def test_a_projection_that_is_interrupted_behind_its_commit_is_not_applied_twice(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = consumer(db, prefix=b"key")
    resolve = kvwal.Consumer._resolve

    def interrupted(feed: kvwal.Consumer) -> None:
        if feed._last is not None and feed._last.request.seqno:
            raise KeyboardInterrupt
        resolve(feed)

    for number in range(1, 3):
        db[b"key"] = b"%d" % number
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(kvwal.Consumer, "_resolve", interrupted)
            feed.project(count, timeout_s=0)
        feed.project(count, timeout_s=0)
        assert counted(db) == {b"key": number}


def test_a_next_that_fails_after_an_interrupted_rebase_stays_behind_the_snapshot(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = consumer(db)
    db[b"a"] = b"1"

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    rebase = feed.rebase()
    rebase.__enter__()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feed, "_go_back", interrupted)
        rebase.__exit__(None, None, None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feed, "_collect", interrupted)
        next(feed)
    assert drained(feed) == []


# -- against a model ---------------------------------------------------------------------------

steps = st.one_of(
    st.tuples(st.just("put"), st.sampled_from([b"a1", b"a2", b"b"]), st.integers(1, 400)),
    st.tuples(st.just("put"), st.sampled_from([b"a1", b"a2", b"b"]), st.integers(1, 400)),
    st.sampled_from([("read",), ("read",), ("ack",), ("project",), ("sync",), ("checkpoint",), ("again",)]),
    st.sampled_from([("reopen",), ("crash",)]),
)


@settings(max_examples=150)
@given(
    st.lists(steps, max_size=40),
    st.sampled_from(["commit", "os"]),
    st.sampled_from([b"", b"a", b"never"]),
    st.sampled_from([0.0, 3600.0]),
    st.integers(0, 1 << 32),
)
def test_a_consumer_against_a_model(
    program: list[Any], durability: Any, prefix: bytes, ack_interval_s: float, seed: int
) -> None:
    disk = SimulatedDisk(seed=seed)

    def begin() -> tuple[kvwal.Store, kvwal.Consumer]:
        db = opened(disk, durability=durability, keep_history_bytes=1 << 30)
        return db, consumer(db, prefix=prefix, ack_interval_s=ack_interval_s, start="oldest")

    db, feed = begin()
    # Of each commit, by seqno: the key that is to be told; None for others.
    told: dict[int, bytes | None] = {}
    stored = feed.position
    batch: kvwal.Batch | None = None
    last = feed.position
    for step in program:
        if step[0] == "put":
            seqno = db.put(step[1], bytes(step[2]))
            told[seqno] = step[1] if step[1].startswith(prefix) else None
        elif step[0] == "read":
            batch = next(feed)
            assert batch.first == last + 1
            expected = [(seqno, told[seqno]) for seqno in range(batch.first, batch.last + 1) if told.get(seqno)]
            assert [(change.seqno, change.key) for change in batch.changes] == expected
            assert batch.last <= db.durable_seqno
            last = batch.last
        elif step[0] == "ack":
            if batch is not None:
                feed.ack(batch)
        elif step[0] == "project":
            applied: list[bytes] = []
            before = feed.position if not feed._acked else feed._acked
            durable = db.durable_seqno
            feed.project(lambda txn, changes, into=applied: into.extend(c.key for c in changes), timeout_s=0)  # type: ignore[misc]
            # Its last commit may be flushed, and with it what came behind all that it has read.
            assert feed._scanned >= durable
            read = [seqno for seqno in sorted(told) if before < seqno <= feed._scanned]
            assert applied == [told[seqno] for seqno in read if told[seqno]]
            last, batch = feed._covered, None
        elif step[0] == "again":
            feed.close()
            feed = consumer(db, prefix=prefix, ack_interval_s=ack_interval_s)
            last, batch = feed.position, None
        elif step[0] in ("reopen", "crash"):
            if step[0] == "crash":
                crashed = disk.crash(Random(seed))
                db.close()
                disk = crashed
            else:
                db.close()
            db, feed = begin()
            told = {seqno: key for seqno, key in told.items() if seqno <= db.last_seqno}
            assert stored <= feed.position <= db.durable_seqno
            last, batch = feed.position, None
        else:
            getattr(db, step[0])()
        assert stored <= feed.position
        stored = feed.position
    db.close()
