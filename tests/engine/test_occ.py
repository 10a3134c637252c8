"""Conflicts: the history against the rule written down plainly."""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import interrupted_at

from kvwal.batch import WriteBatch
from kvwal.engine import occ
from kvwal.engine.occ import MAX_HISTORY_BYTES, History, ReadSet
from kvwal.errors import ConflictError
from kvwal.keys import KeyRange, Seqno, in_any

KEYS = st.sampled_from([b"", b"a", b"b", b"c", b"d", b"e"])
RANGES = st.lists(st.builds(KeyRange, KEYS, st.one_of(st.none(), KEYS)), max_size=2)
Commit: TypeAlias = tuple[set[bytes], list[KeyRange]]
COMMITS = st.lists(st.tuples(st.sets(KEYS, max_size=3), RANGES), max_size=8)
# Between any two keys, and beyond both ends, so that overlaps of ranges can be told by their members.
POINTS = [b"", b"\0", b"a", b"a1", b"b", b"b1", b"c", b"c1", b"d", b"d1", b"e", b"e1"]


def plainly(written: set[bytes], deleted: list[KeyRange], reads: set[bytes], ranges: list[KeyRange]) -> bool:
    touched = [point for point in POINTS if point in written or in_any(point, deleted)]
    return any(point in reads or in_any(point, ranges) for point in touched)


def non_empty(ranges: list[KeyRange]) -> list[KeyRange]:
    return [bounds for bounds in ranges if not bounds.is_empty()]


KEY_OF_ANOTHER = {b"a"}
EVERYTHING = [KeyRange(b"", None)]


def batch(written: set[bytes], deleted: list[KeyRange]) -> WriteBatch:
    made = WriteBatch()
    made.ranges = deleted
    made.writes = dict.fromkeys(sorted(written))
    return made


@pytest.mark.parametrize("recent_keys", [1, 3, 4096], ids=["packed at once", "packed now and then", "never packed"])
@pytest.mark.parametrize("table", [0, 16])
@given(COMMITS, st.integers(0, 8), st.integers(0, 8), st.sets(KEYS), RANGES, st.booleans(), st.sampled_from([1, 8]))
def test_a_conflict_is_a_later_commit_that_touched_what_was_read(
    table: int,
    recent_keys: int,
    commits: list[Commit],
    oldest: int,
    since: int,
    reads: set[bytes],
    ranges: list[KeyRange],
    twice: bool,
    many_ranges: int,
) -> None:
    oldest = min(oldest, len(commits))
    since = min(max(since, oldest), len(commits))
    ranges = non_empty(ranges)
    commits = [(written, non_empty(deleted)) for written, deleted in commits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(occ, "_RECENT_KEYS", recent_keys)
        patch.setattr(occ, "_MANY_RANGES", many_ranges)
        history = History()
        history.begin(Seqno(0))
        for seqno, (written, deleted) in enumerate(commits, 1):
            # The oldest open transaction moves on, up to `oldest`. Recording again, after an interruption, is harmless.
            for _ in range(1 + twice):
                until = Seqno(min(oldest, seqno - 1))
                if table:
                    history.record(Seqno(seqno), KEY_OF_ANOTHER, EVERYTHING, until, [(table, batch(written, deleted))])
                else:
                    other = batch(KEY_OF_ANOTHER, EVERYTHING)
                    history.record(Seqno(seqno), sorted(written), deleted, until, [(16, other)])
        asked = ReadSet(Seqno(since), reads, ranges)
        if table:
            asked = ReadSet(Seqno(since), (), (), None, [(17, reads, ranges), (table, reads, ranges)])
        found = history.conflict(asked)
    guilty = {seqno for seqno, commit in enumerate(commits, 1) if seqno > since and plainly(*commit, reads, ranges)}
    assert (found is not None) == bool(guilty)
    if found is not None:
        assert found.seqno in guilty
        assert found.table == table
        assert found.key is None or plainly(*commits[found.seqno - 1], {found.key}, [])


class CountedBound(bytes):
    """A bound of a range that counts how often it is compared."""

    compared = 0

    def _counted(self, outcome: bool) -> bool:
        CountedBound.compared += 1
        return outcome

    def __le__(self, other: bytes) -> bool:
        return self._counted(bytes(self) <= other)

    def __gt__(self, other: bytes) -> bool:
        return self._counted(bytes(self) > other)

    def __ge__(self, other: bytes) -> bool:
        return self._counted(bytes(self) >= other)


@pytest.mark.parametrize("recent_keys", [1000, 4096], ids=["packed", "not yet packed"])
def test_a_range_is_looked_up_among_the_keys_that_were_written_not_held_against_each(
    monkeypatch: pytest.MonkeyPatch, recent_keys: int
) -> None:
    monkeypatch.setattr(occ, "_RECENT_KEYS", recent_keys)
    history = History()
    history.begin(Seqno(0))
    for seqno in range(1, 3001):
        history.record(Seqno(seqno), [b"w%d" % seqno], (), Seqno(0))
    ranges = [KeyRange(CountedBound(b"r%03d" % i), CountedBound(b"r%03d!" % i)) for i in range(500)]
    CountedBound.compared = 0
    assert history.conflict(ReadSet(Seqno(0), (), ranges)) is None
    assert 500 <= CountedBound.compared < 500 * 50
    ranges.append(KeyRange(b"w2", b"w2!"))
    assert history.conflict(ReadSet(Seqno(0), (), ranges)) is not None


def test_the_history_keeps_keys_not_the_callers_dict() -> None:
    history = History()
    writes = {b"a": b"x" * 1000}
    history.record(Seqno(1), writes, (), Seqno(0))
    assert history.bytes_used < 500
    writes.clear()
    assert history.conflict(ReadSet(Seqno(0), {b"a"}, ())) is not None


def test_what_no_open_transaction_can_ask_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occ, "_RECENT_KEYS", 10)
    history = History()
    history.begin(Seqno(0))
    for seqno in range(1, 10_001):
        history.record(Seqno(seqno), [b"%06d" % seqno], (), Seqno(max(0, seqno - 50)))
        assert history.bytes_used < 10_000
    assert history.conflict(ReadSet(Seqno(9_960), {b"009970"}, ())) is not None
    assert history.conflict(ReadSet(Seqno(9_960), {b"000001"}, ())) is None


def test_a_history_that_is_too_large_makes_older_readers_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occ, "_RECENT_KEYS", 10)
    history = History(max_bytes=1000)
    history.begin(Seqno(0))
    for seqno in range(1, 1001):
        history.record(Seqno(seqno), [b"k%d" % seqno], (), Seqno(0))
        assert history.bytes_used < 1000 + 10 * 200
    assert history.floor > 900
    found = history.conflict(ReadSet(Seqno(0), {b"unrelated"}, ()))
    assert isinstance(found, ConflictError)
    assert found.seqno == history.floor
    assert history.conflict(ReadSet(Seqno(history.floor - 1), (), ())) is not None
    assert history.conflict(ReadSet(history.floor, {b"unrelated"}, [KeyRange(b"u", b"v")])) is None
    assert history.conflict(ReadSet(Seqno(998), {b"k999"}, ())) is not None


@pytest.mark.parametrize("table", [0, 16])
@pytest.mark.parametrize("recent_keys", [10, 4096], ids=["packed", "never packed"])
def test_a_history_that_is_interrupted_anywhere_conflicts_with_all_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, recent_keys: int, table: int
) -> None:
    """A commit that is interrupted as it becomes visible is recorded once more, by another call."""
    monkeypatch.setattr(occ, "_RECENT_KEYS", recent_keys)

    def record(history: History, seqno: int) -> None:
        key, bounds = b"%04d" % seqno, [KeyRange(b"x", b"y")] if seqno % 3 == 0 else []
        if table:
            history.record(Seqno(seqno), [], [], Seqno(0), [(table, batch({key}, bounds))])
        else:
            history.record(Seqno(seqno), [key], bounds, Seqno(0))

    def asked(key: bytes, since: int) -> ReadSet:
        return ReadSet(Seqno(since), () if table else {key}, (), None, [(table, {key}, [])] if table else [])

    full = 8
    for begin in (0, full, full + 1):
        for step in range(1, 3000):
            history = History(max_bytes=155 * full)
            history.begin(Seqno(2))
            for seqno in range(3, 3 + begin):
                record(history, seqno)
            seqno = 3 + begin
            interruption = interrupted_at(step, partial(record, history, seqno))
            if step % 2:
                record(history, seqno)
            for since in range(2, seqno):
                for written in range(since + 1, seqno + step % 2):
                    assert history.conflict(asked(b"%04d" % written, since)) is not None, (begin, step, since, written)
            if interruption is None:
                break
        else:
            raise AssertionError("there are more places than were tried")


@pytest.mark.parametrize("key_bytes", [1, 60_000])
def test_a_history_stays_within_its_limit_whatever_is_written(key_bytes: int) -> None:
    """Many small keys, large ones before a block of them is full, and ranges without any key."""
    history = History(max_bytes=1 << 20)
    history.begin(Seqno(0))
    largest = 0
    for seqno in range(1, 6000):
        key = b"%06d" % seqno * (1 + key_bytes // 6)
        history.record(Seqno(seqno), [key], [], Seqno(0))
        history.record(Seqno(seqno), [], [KeyRange(b"%06d" % seqno, b"%06d!" % seqno)], Seqno(0))
        largest = max(largest, history.bytes_used)
    assert largest <= (1 << 20) + 4096 * 250 + key_bytes
    assert history.conflict(ReadSet(Seqno(0), {b"unrelated"}, ())) is not None
    assert history.conflict(ReadSet(Seqno(5999), {b"unrelated"}, ())) is None
    assert MAX_HISTORY_BYTES == 64 << 20


def test_packed_keys_take_about_twenty_bytes_more_than_their_own() -> None:
    history = History()
    history.begin(Seqno(0))
    for seqno in range(1, 3 * 4096 + 1):
        history.record(Seqno(seqno), [b"%016d" % seqno], (), Seqno(0))
    assert history.bytes_used <= 3 * 4096 * (16 + 24)


def test_the_limit_is_of_all_tables_together_and_they_forget_together() -> None:
    history = History(10_000)
    history.begin(Seqno(0))
    for seqno in range(1, 200):
        history.record(Seqno(seqno), (), (), Seqno(0), [(16 + seqno % 5, batch({b"%04d" % seqno}, []))])
        assert history.bytes_used <= 10_000
    assert history.floor > 0
    for reads in (
        ReadSet(Seqno(history.floor - 1), [b"x"], ()),
        ReadSet(Seqno(history.floor - 1), (), (), None, [(16, [b"x"], ())]),
    ):
        assert history.conflict(reads) is not None
    assert history.conflict(ReadSet(history.floor, [b"x"], (), None, [(16, [b"x"], ())])) is None
