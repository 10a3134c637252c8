"""What a projection sets aside: listed, held in the log, and taken up again exactly once, whatever survives."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import TINY, check_store, commit_rows, interrupted_at

import kvwal
from kvwal import ClosedError, CorruptionError, FeedGap, FencedError
from kvwal.batch import WriteBatch
from kvwal.engine.parked import Parked, decode_parked, encode_parked, parked_key, parked_prefix
from kvwal.errors import FormatError
from kvwal.feed import parking
from kvwal.feed.change import Change
from kvwal.keys import Seqno
from kvwal.log import Hold
from kvwal.testing import SimulatedDisk, crash_every

Function = Callable[[kvwal.Transaction, Sequence[Change]], object]


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, "keep_history_bytes": 0, **options})


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with opened(disk) as store:
        yield store


def consumer(db: kvwal.Store, **options: Any) -> kvwal.Consumer:
    return db.consumer("counter", **{"prefix": b"key", "ack_interval_s": 0, "on_error": "park", **options})


def count(txn: kvwal.Transaction, changes: Sequence[Change]) -> None:
    """Under "sum:" how often each key was put: wrong at once if a change is applied twice, or never."""
    for change in changes:
        key = b"sum:" + change.key
        txn[key] = b"%d" % (int(txn.get(key, b"0")) + 1)


def count_good(txn: kvwal.Transaction, changes: Sequence[Change]) -> None:
    """The same, but for values that are "bad"."""
    count(txn, changes)
    for change in changes:
        if change.value == b"bad":
            raise ValueError(f"{change.key!r} is bad")


def counted(db: kvwal.Store) -> dict[bytes, int]:
    return {key[4:]: int(value) for key, value in db.scan(prefix=b"sum:")}


def parked(db: kvwal.Store) -> list[tuple[int, str, int]]:
    [info] = db.consumers()
    return [(each.seqno, each.error, each.attempts) for each in info.parked]


def filled(db: kvwal.Store, commits: int) -> None:
    for number in range(commits):
        db.put(b"other%d" % (number % 50), bytes(1000))
        if number % 20 == 19:
            db.checkpoint()


# -- the row -----------------------------------------------------------------------------------

ROW = Parked(Seqno(258), "ValueError: é", 3, 1234)


def test_a_row_is_these_bytes() -> None:
    assert parked_key("mailer", Seqno(258)) == b"\x04\x06mailer\x00\x00\x00\x00\x00\x00\x01\x02"
    assert encode_parked(ROW) == bytes.fromhex("0100 0e00 03000000 d204000000000000") + "ValueError: é".encode()
    assert decode_parked(parked_key("mailer", Seqno(258)), encode_parked(ROW)) == ROW


@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda tail: encode_parked(ROW)[:16] + tail))
def test_hostile_bytes_are_a_row_or_an_error_of_kvwal(value: bytes) -> None:
    try:
        row = decode_parked(parked_key("mailer", ROW.seqno), value)
    except (CorruptionError, FormatError):
        return
    assert encode_parked(row) == value


def test_each_byte_cut_off_a_row_or_its_key_is_noticed() -> None:
    key, value = parked_key("mailer", ROW.seqno), encode_parked(ROW)
    for size in range(len(value)):
        with pytest.raises(CorruptionError):
            decode_parked(key, value[:size])
    for size in range(len(parked_prefix("mailer")), len(key)):
        with pytest.raises(CorruptionError):
            decode_parked(key[:size], value)
    with pytest.raises(FormatError):
        decode_parked(key, b"\x02" + value[1:])


def test_a_row_of_a_newer_version_is_left_alone(disk: SimulatedDisk, db: kvwal.Store) -> None:
    consumer(db).close()
    batch = WriteBatch()
    batch.table(1).put(parked_key("counter", Seqno(1)), b"\x02 what a newer version writes")
    commit_rows(db, batch)
    db.close()
    with opened(disk) as db:
        assert parked(db) == []
        consumer(db).close()


# -- setting aside, and taking up --------------------------------------------------------------


def test_a_commit_that_fails_again_alone_is_set_aside_and_the_others_go_on(db: kvwal.Store) -> None:
    feed = consumer(db)
    for value in (b"1", b"bad", b"3", b"bad"):
        db[b"key"] = value
    calls: list[int] = []

    def noted(txn: kvwal.Transaction, changes: Sequence[Change]) -> None:
        calls.append(len(changes))
        count_good(txn, changes)

    feed.project(noted, timeout_s=0)
    assert calls == [4, 1, 1, 1, 1]
    assert counted(db) == {b"key": 2}
    assert parked(db) == [(3, "ValueError: b'key' is bad", 2), (5, "ValueError: b'key' is bad", 2)]
    [info] = db.consumers()
    assert (info.state, info.last_error) == ("active", "")
    assert feed.position == 5
    assert feed.replay_parked(count_good) == 0
    assert [attempts for _, _, attempts in parked(db)] == [3, 3]
    feed.close()
    with consumer(db) as feed:
        assert feed.replay_parked(count) == 2
        assert feed.replay_parked(count) == 0
        assert feed.position == 5
    assert counted(db) == {b"key": 4}
    assert parked(db) == []
    assert [hold.name for hold in db.engine._log.holds()] == ["counter"]  # type: ignore[union-attr]  # it may write


def test_it_stops_by_default(db: kvwal.Store) -> None:
    db[b"key"] = b"1"
    with pytest.raises(ValueError, match="bad"), consumer(db, on_error="stop", start=0) as feed:
        db[b"key"] = b"bad"
        feed.project(count_good, timeout_s=0)
    assert parked(db) == []
    assert counted(db) == {}
    with pytest.raises(ValueError, match="on_error"):
        consumer(db, on_error="go on")


def test_a_batch_is_whole_around_what_is_set_aside(db: kvwal.Store) -> None:
    """Ranges, several keys to a commit, and commits of which nothing matches."""
    feed = consumer(db)
    db.update({b"key1": b"1", b"key2": b"bad"})
    db[b"other"] = b"x"
    db.update({b"key1": b"1", b"key3": b"1"})
    db[b"other"] = b"x"
    feed.project(count_good, timeout_s=0)
    assert counted(db) == {b"key1": 1, b"key3": 1}
    assert [seqno for seqno, _, _ in parked(db)] == [2]
    assert feed.position == 5
    assert feed.replay_parked(count) == 1
    assert counted(db) == {b"key1": 2, b"key2": 1, b"key3": 1}


def test_an_error_of_kvwal_is_not_set_aside(db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"key"] = b"1"

    def fails(txn: kvwal.Transaction, changes: Sequence[Change]) -> None:
        raise ClosedError("of something else")

    with pytest.raises(ClosedError):
        feed.project(fails, timeout_s=0)
    assert parked(db) == []
    assert feed.position == 0
    db[b"key"] = b"bad"
    feed.project(count_good, timeout_s=0)
    with pytest.raises(ClosedError):
        feed.replay_parked(fails)
    assert [attempts for _, _, attempts in parked(db)] == [2]


async def never_run(txn: kvwal.Transaction, changes: Sequence[Change]) -> None:
    count(txn, changes)


def made_by_parts(txn: kvwal.Transaction, changes: Sequence[Change]) -> Iterator[None]:
    for change in changes:
        yield count(txn, [change])


async def never_made(txn: kvwal.Transaction, changes: Sequence[Change]) -> AsyncIterator[None]:
    yield count(txn, changes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", [never_run, made_by_parts, never_made])
def test_a_function_that_is_not_run_handles_nothing_and_nothing_is_set_aside_for_it(
    db: kvwal.Store, function: Callable[[kvwal.Transaction, Sequence[Change]], object]
) -> None:
    feed = consumer(db)
    db[b"key"] = b"bad"
    feed.project(count_good, timeout_s=0)
    with pytest.raises(TypeError, match=function.__name__):
        feed.replay_parked(function)
    assert [attempts for _, _, attempts in parked(db)] == [2]
    db[b"key"] = b"1"
    position = feed.position
    with pytest.raises(TypeError, match=function.__name__):
        feed.project(function, timeout_s=0)
    assert feed.position == position
    [info] = db.consumers()
    assert (len(info.parked), info.last_error) == (1, "")
    assert feed.replay_parked(count) == 1
    feed.project(count, timeout_s=0)
    assert counted(db) == {b"key": 2}


def test_no_more_than_the_limit_are_set_aside(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 2)
    feed = consumer(db)
    for _ in range(3):
        db[b"key"] = b"bad"
    with pytest.raises(ValueError, match="bad"):
        feed.project(count_good, timeout_s=0)
    assert [seqno for seqno, _, _ in parked(db)] == [2, 3]
    assert feed.position == 3
    [info] = db.consumers()
    assert info.last_error == "ValueError: b'key' is bad"
    feed.replay_parked(count)
    feed.project(count_good, timeout_s=0)
    assert [seqno for seqno, _, _ in parked(db)] == [4]


def test_one_that_was_taken_over_takes_nothing_up(db: kvwal.Store) -> None:
    first = consumer(db)
    db[b"key"] = b"bad"
    first.project(count_good, timeout_s=0)
    second = consumer(db, steal=True)
    with pytest.raises(FencedError):
        first.replay_parked(count)
    with pytest.raises(FencedError):
        # Even if it does not look: the row has another epoch.
        first._apply(count, first._taken_up(first._parked[0]), first._parked[0])
    assert second.replay_parked(count) == 1
    assert counted(db) == {b"key": 1}


def test_a_removed_consumer_leaves_nothing_behind(db: kvwal.Store) -> None:
    with consumer(db) as feed:
        db[b"key"] = b"bad"
        feed.project(count_good, timeout_s=0)
    assert db.remove_consumer("counter")
    assert db.engine._log.holds() == []  # type: ignore[union-attr]  # it may write
    consumer(db).close()
    assert parked(db) == []


# -- what is held ------------------------------------------------------------------------------


def test_what_is_set_aside_is_held_across_checkpoints_and_reopenings(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db)
    db[b"key"] = b"bad"
    feed.project(count_good, timeout_s=0)
    for _ in range(3):
        filled(db, 60)
        feed.project(count_good, timeout_s=0)
        [info] = db.consumers()
        assert info.lag_commits == 0
        # The log of at least 40 KiB.
        assert info.held_bytes > 40 << 10
        db.close()
        db = opened(disk)
        feed = consumer(db)
    assert feed.replay_parked(count) == 1
    assert counted(db) == {b"key": 1}
    filled(db, 60)
    feed.project(count_good, timeout_s=0)
    db.checkpoint()
    db.checkpoint()
    assert db.engine._log.segments()[0].first_seqno > 100  # type: ignore[union-attr]  # it may write
    db.close()


def test_it_is_held_while_no_one_uses_the_consumer_and_within_new_limits(disk: SimulatedDisk, db: kvwal.Store) -> None:
    with consumer(db) as feed:
        db[b"key"] = b"bad"
        feed.project(count_good, timeout_s=0)
    db.close()
    with opened(disk) as db, consumer(db, timeout_s=0, max_lag_s=3600) as feed:
        holds = db.engine._log.holds()  # type: ignore[union-attr]  # it may write
        limits = {hold.name: hold.limits and hold.limits.max_us for hold in holds}
        assert limits == {"counter": 3600 * 10**6, "counter (parked)": 3600 * 10**6}
        # The position itself is held too: so it is moved.
        filled(db, 100)
        assert not next(feed).changes
    with opened(disk) as db:
        filled(db, 60)
        assert db.engine._log.segments()[0].first_seqno <= 2  # type: ignore[union-attr]  # it may write
        with consumer(db) as feed:
            assert feed.replay_parked(count) == 1


def test_it_is_held_before_the_position_lets_it_go(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = consumer(db)
    db[b"key"] = b"bad"
    seen: list[list[tuple[str, int]]] = []
    advance = Hold.advance

    def advanced(hold: Hold, after: Seqno) -> None:
        holds = db.engine._log.holds()  # type: ignore[union-attr]  # it may write
        seen.append(sorted((each.name, each.after) for each in holds if "counter" in each.name))
        advance(hold, after)

    monkeypatch.setattr(Hold, "advance", advanced)
    feed.project(count_good, timeout_s=0)
    assert [("counter", 0), ("counter (parked)", 1)] in seen
    assert all(held[-1] == ("counter (parked)", 1) for held in seen if held and held[0] != ("counter", 0))


def test_beyond_the_limits_only_what_is_set_aside_is_lost(disk: SimulatedDisk, db: kvwal.Store) -> None:
    feed = consumer(db, max_lag_bytes=64 << 10)
    db[b"key"] = b"bad"
    feed.project(count_good, timeout_s=0)
    for _ in range(10):
        filled(db, 20)
        feed.project(count_good, timeout_s=0)
    db[b"key"] = b"bad"
    feed.project(count_good, timeout_s=0)
    assert feed.alive
    with pytest.raises(FeedGap):
        feed.replay_parked(count)
    # The other one was taken up.
    assert counted(db) == {b"key": 1}
    assert [seqno for seqno, _, _ in parked(db)] == [2]
    feed.close()
    db.close()
    with opened(disk) as db, consumer(db) as feed:
        assert [seqno for seqno, _, _ in parked(db)] == [2]
        with feed.rebase() as snapshot:
            assert snapshot[b"key"] == b"bad"
        assert parked(db) == []
        assert feed.replay_parked(count) == 0


# -- crashes and interruptions -----------------------------------------------------------------


def test_each_change_is_applied_once_or_set_aside_whatever_survives() -> None:
    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        db = opened(disk)
        feed = consumer(db)
        for number in range(4):
            db[b"key%d" % (number % 2)] = b"bad" if number % 2 else b"x"
            feed.project(count_good, timeout_s=0)
            acknowledged.append(feed.position)
            if number == 2:
                db.checkpoint()
                feed.replay_parked(count)
        feed.close()
        db.close()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            with consumer(db, start="oldest") as feed:
                assert feed.position >= max(acknowledged, default=0)
                feed.project(count, timeout_s=0)
                feed.replay_parked(count)
            expected: dict[bytes, int] = {}
            for record in db.history():
                for key in record.batch().writes:
                    if key.startswith(b"key"):
                        expected[key] = expected.get(key, 0) + 1
            assert counted(db) == expected
            check_store(db)

    assert crash_every(program, check, states_per_point=6).points > 20


# What interrupts a finalizer is swallowed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("what", ["project", "replay"])
def test_an_interrupted_call_applies_nothing_twice(what: str) -> None:
    step = 0
    while True:
        step += 61
        with opened(SimulatedDisk()) as db:
            feed = consumer(db)
            db[b"key"] = b"bad"
            db[b"key"] = b"1"
            if what == "replay":
                feed.project(count_good, timeout_s=0)
                interrupted = interrupted_at(step, lambda feed=feed: feed.replay_parked(count))
            else:
                interrupted = interrupted_at(step, lambda feed=feed: feed.project(count_good, timeout_s=0))
            whole = interrupted is None
            # Its traceback keeps what was begun.
            del interrupted
            gc.collect()
            feed.project(count_good, timeout_s=0)
            feed.replay_parked(count)
            assert counted(db) == {b"key": 2}, step
            assert parked(db) == []
            if whole:
                break
    assert step > 500


def test_attempts_are_counted_up_to_what_fits() -> None:
    row = replace(ROW, attempts=1 << 40)
    assert decode_parked(parked_key("a", ROW.seqno), encode_parked(row)).attempts == (1 << 32) - 1


# -- what a program that iterates sets aside ---------------------------------------------------


def test_a_program_that_iterates_sets_a_batch_aside_and_goes_on(disk: SimulatedDisk, db: kvwal.Store) -> None:
    sent: list[bytes] = []
    with db.consumer("mailer", prefix=b"key", ack_interval_s=3600, timeout_s=0) as mailer:
        for value in (b"1", b"bad", b"3"):
            db.update({b"key": value, b"other": value})
            batch = next(mailer)
            try:
                if batch.changes[0].value == b"bad":
                    raise OSError("no connection")
                sent.append(value)
            except OSError as error:
                mailer.park(batch, error)
                # Durable on return, with all before it, though `ack` writes seldom.
                assert mailer.position == batch.last
            else:
                mailer.ack(batch)
        [parked] = db.consumers()[0].parked
        assert (parked.error, parked.attempts) == ("OSError: no connection", 1)
        assert not next(mailer).changes
    assert sent == [b"1", b"3"]
    db.close()
    with opened(disk) as db, db.consumer("mailer", prefix=b"key", timeout_s=0) as mailer:
        assert not next(mailer).changes
        assert mailer.replay_parked(lambda txn, changes: sent.extend(each.value or b"" for each in changes)) == 1
        assert sent == [b"1", b"3", b"bad"]
        assert db.consumers()[0].parked == ()


def test_the_commits_of_a_batch_are_set_aside_oldest_first_whatever_came_before(db: kvwal.Store) -> None:
    with consumer(db, start="oldest", timeout_s=0) as feed:
        batches = []
        for number in range(3):
            db.update({b"key%d" % number: b"", b"key": b""})
            db[b"key"] = b"again"
            batches.append(next(feed))
        for number in (2, 0, 2):
            feed.park(batches[number], ValueError(f"batch {number}"))
            assert feed.position == batches[2].last
        parked = db.consumers()[0].parked
        assert [each.seqno for each in parked] == [2, 3, *sorted({c.seqno for c in batches[2].changes})]
        assert [each.error[-1] for each in parked] == list("0022")
        assert db.engine.upkeep.consumers.parked._holds["counter"].after == 1
        told: list[int] = []
        assert feed.replay_parked(lambda txn, changes: told.append(changes[0].seqno)) == 4
        assert told == [each.seqno for each in parked]


def test_a_batch_that_cannot_be_set_aside_is_not_counted(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parking, "MAX_PARKED", 2)
    with consumer(db, timeout_s=0) as feed:
        first = db[b"key"] = b"1"
        batch = next(feed)
        for number in range(3):
            db[b"key%d" % number] = first
        large = next(feed)
        with pytest.raises(ValueError, match="the limit is 2"):
            feed.park(large, OSError())
        with pytest.raises(ValueError, match="handed out"):
            feed.park(kvwal.Batch((), Seqno(1), Seqno(large.last + 1)), OSError())
        feed.ack(batch)
        assert feed.position == batch.last
        assert db.consumers()[0].parked == ()
        feed.park(kvwal.Batch((), large.first, batch.last), OSError())
        assert feed.position == batch.last
    with consumer(db, timeout_s=0) as feed:
        assert next(feed).changes == large.changes
    with pytest.raises(ClosedError):
        feed.park(batch, OSError())


def test_after_a_power_cut_at_any_moment_a_batch_is_handled_set_aside_or_told_again() -> None:
    def run(disk: SimulatedDisk, handled: list[int]) -> None:
        with opened(disk) as db, consumer(db, start="oldest", timeout_s=0) as feed:
            for number in range(8):
                seqno = db.put(b"key", b"%d" % number)
                for batch in feed:
                    if not batch.changes:
                        break
                    if number % 2:
                        feed.park(batch, ValueError("odd"))
                    else:
                        feed.ack(batch)
                    handled.append(seqno)

    def check(disk: SimulatedDisk, handled: list[int]) -> None:
        with opened(disk) as db, consumer(db, start="oldest", timeout_s=0) as feed:
            parked = [each.seqno for each in db.consumers()[0].parked]
            position = feed.position
            told = [change.seqno for change in next(feed).changes]
            assert all(seqno > position for seqno in told)
            wrote = {commit.seqno: index for index, commit in enumerate(db.commits())}
            for seqno in handled:
                assert seqno in wrote
                if wrote[seqno] % 2:
                    assert seqno in parked
                else:
                    assert seqno <= position
            # What is odd is set aside if the position is behind it, and told again if not.
            assert [each for each, index in wrote.items() if index % 2 and each <= position] == parked
            check_store(db)

    assert crash_every(run, check, states_per_point=4).points > 20
