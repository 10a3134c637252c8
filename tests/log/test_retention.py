"""What of the log may go: holds, bytes, age; and what is refused because it is gone."""

from __future__ import annotations

import gc
from datetime import UTC, datetime
from random import Random
from typing import Any
from weakref import ref

import pytest
from collected import collected_everywhere
from hypothesis import given
from hypothesis import strategies as st
from key_log import KeyLog
from log_rig import STORE_ID, LogRig, simulated_disk

from kvwal.errors import FeedGap
from kvwal.files.names import numbers, segment_name
from kvwal.keys import Seqno
from kvwal.log import LogReader, SegmentInfo, SegmentLog, read_kept
from kvwal.log.retention import Hold, HoldInfo, Limits, Retention
from kvwal.testing import SimulatedDisk

DAY_US = 24 * 3600 * 1_000_000


@pytest.fixture
def disk() -> SimulatedDisk:
    return simulated_disk()


@pytest.fixture
def rig(disk: SimulatedDisk) -> LogRig:
    return LogRig(disk, "/log")


class Time:
    """A wall clock and a monotonic one, in step until told otherwise."""

    def __init__(self) -> None:
        self.wall_us = 1_000 * DAY_US
        self.s = 0.0

    def now_us(self) -> int:
        return self.wall_us

    def monotonic_s(self) -> float:
        return self.s

    def pass_s(self, seconds: float) -> None:
        self.wall_us += int(seconds * 1e6)
        self.s += seconds


def segments(*walls: int, size: int = 100) -> list[SegmentInfo]:
    """Segments of ten commits each, made at these times."""
    return [
        SegmentInfo(Seqno(10 * i + 1), size, wall, wall, i + 1 < len(walls)) for i, wall in enumerate(walls)
    ]


def retention(time: Time) -> Retention:
    return Retention(time.now_us)


# -- what recovery needs, and holds ------------------------------------------------------------


@given(st.integers(1, 60), st.lists(st.integers(0, 50), max_size=3))
def test_nothing_that_recovery_or_a_hold_needs_is_let_go(below: int, held: list[int]):
    kept = retention(Time())
    there = segments(0, 0, 0, 0, 0)
    holds = [kept.hold("some", Seqno(after), there, Seqno(50), 0) for after in held]
    n = kept.release_before(Seqno(below), there)
    first = there[n].first_seqno
    needed = min([below, *(after + 1 for after in held)])
    assert first <= needed or n == 0
    # And no more is kept than one segment from whose beginning on it is needed.
    assert n == len(there) - 1 or there[n + 1].first_seqno > needed
    del holds


def test_the_newest_segment_never_goes():
    assert retention(Time()).release_before(Seqno(1000), segments(0, 0, 0)) == 2
    assert retention(Time()).release_before(Seqno(1000), segments(0)) == 0


def test_a_hold_lets_go_as_it_moves_and_when_it_is_released_or_collected():
    kept = retention(Time())
    there = segments(0, 0, 0, 0)
    hold = kept.hold("consumer", Seqno(5), there, Seqno(40), 0)
    assert [(info.name, info.after) for info in kept.holds()] == [("consumer", 5)]
    assert kept.release_before(Seqno(100), there) == 0
    hold.advance(Seqno(19))
    assert kept.release_before(Seqno(100), there) == 1
    hold.advance(Seqno(3))
    assert hold.after == 19
    hold.release()
    hold.release()
    assert kept.holds() == []
    assert kept.release_before(Seqno(100), there) == 3
    again = kept.hold("again", None, there, Seqno(40), 0)
    assert again.after == 30
    del again
    gc.collect()
    assert kept.holds() == []


def test_what_was_let_go_is_refused_even_while_its_file_is_there():
    kept = retention(Time())
    there = segments(7, 8, 9)
    assert kept.release_before(Seqno(25), there) == 2
    with pytest.raises(FeedGap) as caught:
        kept.hold("late", Seqno(4), there, Seqno(29), 99)
    gap = caught.value
    assert (gap.asked, gap.oldest, gap.newest, gap.lost_commits) == (4, 21, 29, 16)
    moments = [datetime(1970, 1, 1, microsecond=us, tzinfo=UTC) for us in (9, 99)]
    assert [gap.oldest_time, gap.newest_time] == moments
    assert (gap.nearest, gap.forked_at) == ((None, None), None)
    assert kept.holds() == []
    assert kept.hold("in time", Seqno(20), there, Seqno(29), 99).after == 20


@pytest.mark.parametrize("moment", range(1, 50))
@pytest.mark.parametrize("outer", ["hold", "release"])
def test_a_hold_that_comes_while_segments_are_let_go_is_honoured_or_refused(outer: str, moment: int):
    """The one comes while the other looks at the segments, which it does in all its steps."""

    class Busy(list[SegmentInfo]):
        left = 0

        def __getitem__(self, i: Any) -> Any:
            self.left -= 1
            if not self.left:
                release() if outer == "hold" else ask()
            return super().__getitem__(i)

    def ask() -> None:
        try:
            answers.append(kept.hold("racing", Seqno(95), there, Seqno(200), 0))
        except FeedGap as gap:
            answers.append(gap)

    def release() -> None:
        gone.append(kept.release_before(Seqno(150), there))

    kept = retention(Time())
    there = Busy(segments(*[0] * 20))
    answers: list[object] = []
    gone: list[int] = []
    there.left = moment
    ask() if outer == "hold" else release()
    there.left = 0
    if len(answers) + len(gone) < 2:
        # It was over before that.
        assert moment > 1
        release() if outer == "hold" else ask()
    [answer], [n] = answers, gone
    assert isinstance(answer, FeedGap) or there[n].first_seqno <= 96


# -- cursors hold ------------------------------------------------------------------------------


def filled(rig: LogRig) -> tuple[SegmentLog, list[int]]:
    log = rig.create()
    rig.fill(log, 60)
    return log, [s.first_seqno for s in log.segments()]


def test_a_cursor_holds_what_it_has_not_read_and_gives_it_back(rig: LogRig):
    log, firsts = filled(rig)
    cursor = log.read(until=Seqno(60))
    assert next(cursor).seqno == 1
    assert log.retire(Seqno(60)) == []
    assert [info.name for info in log.holds()] == ["history"]
    seen = [1]
    while cursor.position < firsts[2]:
        seen.append(int(next(cursor).seqno))
    assert log.retire(Seqno(60)) == firsts[:2]
    seen += [int(record.seqno) for record in cursor]
    assert seen == list(range(1, 61))
    assert log.holds() == []
    assert log.retire(Seqno(61)) == firsts[2:-1]


@pytest.mark.parametrize("end", ["close", "with", "collect", "exhaust"])
def test_a_cursor_that_ended_holds_nothing(rig: LogRig, end: str):
    log, firsts = filled(rig)
    cursor = log.read(until=Seqno(60))
    next(cursor)
    if end == "close":
        cursor.close()
        cursor.close()
    elif end == "with":
        with cursor:
            next(cursor)
    elif end == "exhaust":
        assert len(list(cursor)) == 59
    else:
        del cursor
        gc.collect()
    assert log.holds() == []
    assert log.retire(Seqno(61)) == firsts[:-1]


def test_a_position_that_is_no_longer_kept_is_refused_at_the_call(rig: LogRig):
    log, firsts = filled(rig)
    log.retire(Seqno(firsts[2]))
    for after in (0, firsts[2] - 2):
        with pytest.raises(FeedGap) as caught:
            log.read(Seqno(after))
        assert (caught.value.oldest, caught.value.lost_commits) == (firsts[2], firsts[2] - 1 - after)
        assert caught.value.newest == 60
    assert next(log.read(Seqno(firsts[2] - 1))).seqno == firsts[2]
    assert next(log.read()).seqno == firsts[2]
    log.close()
    with pytest.raises(FeedGap):
        read_kept(rig.reader(), Seqno(0), Seqno(60))
    assert [r.seqno for r in read_kept(rig.reader(), None, Seqno(60))] == list(range(firsts[2], 61))


def test_a_hold_that_is_dropped_while_it_moves_stays_dropped() -> None:
    class Dropping(dict[int, Any]):
        def get(self, key: int, default: object = None) -> Any:
            return self.pop(key, default)

    holds = Dropping()
    hold = Hold(holds, 1, Seqno(3))
    holds[1] = HoldInfo("mailer", Seqno(3), 0, Limits(0, None)), ref(hold)
    hold.advance(Seqno(5))
    assert not hold.is_held


# -- what the files of a log take --------------------------------------------------------------


def test_indexes_are_counted_however_they_came_and_went(rng: Random) -> None:
    log = KeyLog(rng)

    def counted(files: list[SegmentInfo]) -> dict[str, int]:
        return {info.name: info.size for info in files}

    def there() -> dict[str, int]:
        sizes = {info.name: info.size for info in log.log.segments()}
        for name in log.rig.names():
            found = numbers(name)
            if found is not None and found[1] != "log":
                sizes[segment_name(found[0])] += len(log.disk.read(f"/log/{name}"))
        return sizes

    log.fill(3)
    assert counted(log.log.segments(with_indexes=True)) == there()
    # Made after they were looked at, and before another one looks.
    log.make_indexes()
    assert counted(log.log.segments(with_indexes=True)) == there() != counted(log.log.segments())
    reader = LogReader(log.disk.open_directory("/log"), STORE_ID)
    assert counted(reader.segments(with_indexes=True)) == there()
    assert log.log.stats().bytes == sum(there().values())
    removed = log.log.retire(log.log.last_seqno)
    assert removed
    assert counted(log.log.segments(with_indexes=True)) == there()
    # Of what is gone nothing is kept in memory.
    assert {segment_name(numbers(name)[0]) for name in log.log._index_sizes._sizes} <= there().keys()  # type: ignore[index]
    log.fill(2)
    log.make_indexes()
    assert counted(log.log.segments(with_indexes=True)) == there()


def test_indexes_that_are_made_before_they_are_looked_at_are_counted_once(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(2)
    log.make_indexes()
    names = [name for name in log.rig.names() if name.endswith(".keys")]
    sizes = sum(len(log.disk.read(f"/log/{name}")) for name in names)
    assert sizes
    for _ in range(2):
        added = sum(info.size for info in log.log.segments(with_indexes=True))
        assert added == sum(info.size for info in log.log.segments()) + sizes


# -- what finalizers let go of meanwhile -----------------------------------------------------------


@pytest.mark.parametrize("use", ["holds", "drop_late", "drop_laziest", "release_before"])
def test_a_finalizer_may_release_a_hold_while_the_holds_are_looked_at(use: str) -> None:
    kept, there = retention(Time()), segments(0, 0, 0)
    others = [kept.hold("some", Seqno(25), there, Seqno(30), 0) for _ in range(20)]
    calls = {
        "holds": kept.holds,
        "drop_late": lambda: kept.drop_late(there),
        "drop_laziest": lambda: kept.drop_laziest(Seqno(30), there),
        "release_before": lambda: kept.release_before(Seqno(1), there),
    }
    count = collected_everywhere(lambda: kept.hold("feed", Seqno(25), there, Seqno(30), 0).release, calls[use], 60)
    assert count >= 15
    assert len(kept.holds()) == len(others)
