"""Runs of commits of one shape: the feed tells each as if it had been read alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from store_fixtures import TINY, interrupted_at

import kvwal
from kvwal import ClosedError
from kvwal.feed.change import Change
from kvwal.keys import Seqno
from kvwal.log import Run, SegmentCursor
from kvwal.testing import SimulatedDisk

PUTS = 40


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    options: dict[str, Any] = {**TINY, "background": False, "keep_history_bytes": 1 << 30}
    with kvwal.open("/kv", files=SimulatedDisk(), **options) as store:
        for number in range(1, PUTS + 1):
            store[b"%02d" % number] = b"%03d" % number
        yield store


@pytest.fixture
def by_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log hands out no runs."""
    next_part = SegmentCursor.next_part
    monkeypatch.setattr(SegmentCursor, "next_part", lambda cursor, _: next_part(cursor, Seqno(0)))


def test_they_are_read_as_runs(db: kvwal.Store) -> None:
    with db.engine.upkeep.read(Seqno(0), None, "test") as cursor:
        assert isinstance(cursor.next_part(db.engine.state.seqno), Run)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": b"0"},
        {"prefix": [b"0", b"23", b"4"]},
        {"prefix": b"4"},
        {"prefix": b"x"},
        {"tables": [16]},
        {"tables": [0], "prefix": b"3"},
        {"previous": True},
        {"previous": True, "prefix": b"2"},
    ],
)
def test_what_is_told_and_where_the_position_is_are_as_of_single_records(
    db: kvwal.Store, request: pytest.FixtureRequest, options: dict[str, Any]
) -> None:
    db.update({b"0": b"1", b"2": b"2"})
    del db[b"07"]
    for number in range(1, 2 * PUTS):
        db[b"%02d" % number] = b"x%02d" % number

    def told() -> list[tuple[Change, kvwal.Position]]:
        with db.changes(3, **options) as feed:
            found = [(change, feed.position) for change in feed]
            assert feed.position == db.last_seqno
        assert all(type(change) is Change for change, _ in found)
        return found

    by_runs = told()
    assert all(change.meta == {} for change, _ in by_runs)
    request.getfixturevalue("by_records")
    assert by_runs == told()


def test_the_position_within_a_run_is_what_was_handed_out(db: kvwal.Store) -> None:
    feed = db.changes(0)
    for number in range(1, PUTS + 1):
        assert next(feed).seqno == number == feed.position.seqno
        if number == 20:
            assert [change.seqno for change in db.changes(feed.position)] == list(range(21, PUTS + 1))
    assert next(feed, None) is None


def test_the_position_moves_over_the_end_of_a_run_that_matches_nothing(db: kvwal.Store) -> None:
    for matched in range(1, PUTS + 1):
        with db.changes(0, prefix=b"%02d" % matched, follow=True, timeout_s=0) as feed:
            assert [(change.seqno, feed.position.seqno) for change in feed] == [(matched, matched)]
            assert feed.position == PUTS


def test_a_feed_that_is_closed_within_a_run_hands_out_no_more_and_its_position_stays(db: kvwal.Store) -> None:
    feed = db.changes(0)
    for _ in range(10):
        next(feed)
    feed.close()
    with pytest.raises(ClosedError):
        next(feed)
    assert feed.position == 10


def test_a_feed_that_is_closed_while_a_run_is_made_hands_out_nothing(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = db.changes(0)
    changes_of = feed._filter.changes_of

    def meanwhile(run: Run) -> Iterator[Change] | None:
        found = changes_of(run)
        feed.close()
        return found

    monkeypatch.setattr(type(feed._filter), "changes_of", lambda _, run: meanwhile(run))
    with pytest.raises(ClosedError):
        next(feed)
    assert feed.position == 0


def test_what_is_not_visible_yet_is_in_no_run(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = db.changes(0, follow=True, timeout_s=0)
    waited: list[int] = []

    def note(_: kvwal.Changes, seqno: Seqno) -> Seqno:
        waited.append(seqno)
        return seqno

    monkeypatch.setattr(kvwal.Changes, "_await_visible", note)
    seqno = db.engine.state.seqno
    db.engine.state.seqno = Seqno(30)
    try:
        assert [next(feed).seqno for _ in range(PUTS)] == list(range(1, PUTS + 1))
    finally:
        db.engine.state.seqno = seqno
    assert waited == list(range(31, PUTS + 1))


def test_what_is_behind_the_position_stays_in_the_log_while_a_run_is_handed_out(db: kvwal.Store) -> None:
    log = db.engine._log
    assert log is not None
    with db.changes(0) as feed:
        for _ in range(20):
            next(feed)
        assert [hold.after for hold in log.holds() if hold.name == "changes"] == [0]


@pytest.mark.parametrize("prefix", [b"", b"1"])
def test_an_interruption_within_a_run_loses_nothing_that_the_position_counts(db: kvwal.Store, prefix: bytes) -> None:
    # Invariant: a call counts what it hands out by its last step.
    keys = [b"%02d" % number for number in range(1, PUTS + 1) if (b"%02d" % number).startswith(prefix)]
    step = 0
    while True:
        step += 1
        feed = db.changes(0, prefix=prefix)
        told: list[bytes] = []

        def read(feed: kvwal.Changes = feed, told: list[bytes] = told) -> None:
            for change in feed:
                told.append(change.key)

        interruption = interrupted_at(step, read)
        again = [change.key for change in db.changes(feed.position, prefix=prefix)]
        assert told == keys[: len(told)]
        assert again == keys[len(keys) - len(again) :]
        assert len(told) + len(again) >= len(keys)
        if interruption is None:
            break
        feed.close()
    assert step > 50
