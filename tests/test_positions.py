"""Positions: a seqno with its line, printed and parsed, compared within a line, and refused on another one."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import opened as opened_for_tasks
from aio_fixtures import run
from hypothesis import given
from hypothesis import strategies as st

import kvwal
from kvwal import FeedGap, Position, SnapshotTooOld
from kvwal.testing import SimulatedDisk

LINE, OTHER = b"line one", b"line two"


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, **options)


@given(st.binary(min_size=8, max_size=8), st.integers(0, (1 << 64) - 1))
def test_what_is_printed_is_parsed(line: bytes, seqno: int) -> None:
    position = Position(line, seqno)
    for again in (Position.parse(str(position)), pickle.loads(pickle.dumps(position)), copy.deepcopy(position)):
        assert again == position
        assert (again.line, again.seqno) == (line, seqno)
        assert type(again) is Position
    assert str(position) == f"{line.hex()}:{seqno}" == f"{position}"
    assert eval(repr(position)) == position  # noqa: S307


@given(st.text(max_size=40) | st.from_regex(r"[0-9a-fA-F]{15,17}:-?[0-9]{0,22}", fullmatch=True))
def test_another_text_is_no_position(text: str) -> None:
    try:
        position = Position.parse(text)
    except ValueError:
        return
    assert position == Position(bytes.fromhex(text[:16]), int(text[17:]))


@pytest.mark.parametrize(("line", "seqno"), [(b"short", 1), (b"nine bytes", 1), (LINE, -1)])
def test_what_cannot_be_a_position_is_refused(line: bytes, seqno: int) -> None:
    with pytest.raises(ValueError):
        Position(line, seqno)


def test_a_position_is_its_seqno_and_has_an_order_on_its_line_only() -> None:
    three, four, elsewhere = Position(LINE, 3), Position(LINE, 4), Position(OTHER, 3)
    assert three == Position(LINE, 3) == 3
    assert hash(three) == hash(Position(LINE, 3)) == hash(3)
    assert three < four <= four
    assert four > three >= three
    assert (three < 4, three > 2, three < 4, type(three + 1), type(three.seqno)) == (True, True, True, int, int)
    assert json.dumps({"position": three}) == '{"position": 3}'
    assert f"{three:d}" == "3"
    assert three != elsewhere
    assert len({three, elsewhere}) == 2
    compared: list[Callable[[], object]] = [
        lambda: three < elsewhere,
        lambda: three <= elsewhere,
        lambda: three > elsewhere,
        lambda: three >= elsewhere,
        lambda: sorted([three, elsewhere]),
    ]
    for compare in compared:
        with pytest.raises(ValueError, match="different lines"):
            compare()


def test_what_a_store_hands_out_is_of_its_line_and_durable() -> None:
    disk = SimulatedDisk()
    with opened(disk, durability="os") as db:
        db.put(b"a", b"1", durability="commit")
        # Its seqno is no position before it is durable.
        assert db.put(b"b", b"2") == 2
        line = db.position.line
        assert db.position == Position(line, 1)
        feed = db.changes(0, follow=True, timeout_s=0)
        assert len(list(feed)) == 1
        assert feed.position == Position(line, 1)
        with db.bootstrap() as base:
            assert base.position == db.position == Position(line, 2)
        with db.consumer("mailer", start="oldest", timeout_s=0) as mailer:
            assert mailer.position == Position(line, 0)
            next(mailer)
            assert mailer.project(lambda txn, changes: None, timeout_s=0) == Position(line, 3)
        [info] = db.consumers()
        assert info.position == Position(line, 3)
        assert all(type(each) is Position for each in (mailer.position, info.position, feed.position))
    with opened(disk, flag="r") as db:
        assert db.position.line == line
    with kvwal.open("/other", files=disk, background=False) as other:
        assert other.position.line != line


def test_a_feed_goes_on_after_a_position_that_was_printed() -> None:
    with opened(SimulatedDisk()) as db:
        db[b"a"] = b"1"
        kept = str(db.position)
        db[b"b"] = b"2"
        position = Position.parse(kept)
        assert [change.key for change in db.changes(position)] == [b"b"]
        assert [commit.seqno for commit in db.commits(position)] == [2]
        assert [record.seqno for record in db.history(position)] == [2]
        with db.consumer("mailer", start=position, timeout_s=0) as mailer:
            assert [change.key for change in next(mailer).changes] == [b"b"]
        with db.snapshot(at=position) as snapshot:
            assert dict(snapshot) == {b"a": b"1"}
        assert [each.key for each in db.diff(position)] == [b"b"]


CALLS: list[tuple[Callable[[kvwal.Store, Position], object], type[FeedGap | SnapshotTooOld]]] = [
    (lambda db, at: db.changes(at), FeedGap),
    (lambda db, at: db.changes(at, previous=True), FeedGap),
    (lambda db, at: db.commits(at), FeedGap),
    (lambda db, at: db.commits(until=at), FeedGap),
    (lambda db, at: db.history(at), FeedGap),
    (lambda db, at: db.consumer("mailer", start=at), FeedGap),
    (lambda db, at: db.snapshot(at=at), SnapshotTooOld),
    (lambda db, at: db.diff(at), SnapshotTooOld),
    (lambda db, at: db.diff(1, at), SnapshotTooOld),
    (lambda db, at: db.versions(b"a", since=at), SnapshotTooOld),
    (lambda db, at: db.versions(b"a", until=at), SnapshotTooOld),
    (lambda db, at: db.revert(b"a", to=at), SnapshotTooOld),
]


@pytest.mark.parametrize("seqno", [1, 1000])
@pytest.mark.parametrize(("call", "error"), CALLS)
def test_a_position_on_another_line_is_refused_at_the_call(
    call: Callable[[kvwal.Store, Position], object], error: type[FeedGap | SnapshotTooOld], seqno: int
) -> None:
    with opened(SimulatedDisk()) as db:
        for number in range(3):
            db[b"a"] = b"%d" % number
        asked = Position(OTHER, seqno)
        with pytest.raises(error, match=f"{asked} is on another line, of another store") as caught:
            call(db, asked)
        found = caught.value
        assert (found.asked, found.forked_at, found.oldest, found.newest) == (asked, 0, 1, 3)
        assert db.consumers() == []
        assert db.last_seqno == 3


def test_a_table_refuses_a_position_on_another_line() -> None:
    with opened(SimulatedDisk()) as db:
        users = db.table("users", key=str, value=str)
        users["a"] = "1"
        asked = Position(OTHER, 1)
        calls: list[Callable[[], object]] = [
            lambda: users.at(asked),
            lambda: users.diff(asked),
            lambda: users.versions("a", since=asked),
            lambda: users.versions("a", until=asked),
            lambda: users.revert("a", to=asked),
        ]
        for call in calls:
            with pytest.raises(SnapshotTooOld, match="another line"):
                call()


def test_tasks_have_positions_too() -> None:
    async def main() -> None:
        async with opened_for_tasks() as db:
            await db.put(b"a", b"1")
            changes = db.changes(0)
            assert [change.key async for change in changes] == [b"a"]
            assert changes.position == db.position == Position(db.position.line, 1)
            async with db.bootstrap() as base:
                assert base.position == db.position
            async with db.consumer("mailer", start=db.position) as mailer:
                assert mailer.position == changes.position
            for call in (lambda at: db.changes(at), lambda at: db.snapshot(at=at), lambda at: db.commits(at)):
                with pytest.raises((FeedGap, SnapshotTooOld), match="another line"):
                    call(Position(OTHER, 1))
            with pytest.raises(FeedGap, match="another line"):
                async with db.consumer("other", start=Position(OTHER, 1)):
                    pass

    run(main())


def test_a_time_is_no_position() -> None:
    """Both may be given to `commits`, and each is what it is."""
    with opened(SimulatedDisk()) as db:
        db[b"a"] = b"1"
        [commit] = db.commits()
        assert list(db.commits(until=commit.time)) == [commit]
        assert list(db.commits(until=commit.time - timedelta(seconds=1))) == []


def test_a_text_in_place_of_a_position_or_a_time_is_refused_with_what_reads_it(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv") as db:
        db.put(b"k", b"v")
        text: Any = str(db.position)
        for ask in (lambda: db.changes(text), lambda: db.commits(after=text), lambda: db.versions(b"k", since=text)):
            with pytest.raises(TypeError, match=r"a seqno or a position, not str; Position\.parse reads"):
                ask()
        latest: Any = "latest"
        with pytest.raises(TypeError, match='"now", "oldest", a seqno, a position or a datetime, not \'latest\''):
            db.consumer("mailer", start=latest)
        with pytest.raises(TypeError, match="a seqno, a position or a datetime, not str"):
            db.snapshot(at=latest)
    with pytest.raises(ValueError, match=r"or a datetime, not '2026.*datetime\.fromisoformat"):
        kvwal.restore(tmp_path / "b", tmp_path / "r", at="2026-11-27T15:00:00Z")
