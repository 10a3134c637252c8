"""The interval map of deleted ranges, against a plain list of (seqno, range)."""

from __future__ import annotations

import itertools
import tracemalloc
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.engine.range_map import Cover, RangeMap
from kvwal.keys import KeyRange, Seqno

# Few keys, neighbours of each other among them.
KEYS = st.one_of(
    st.sampled_from([b"", b"\0", b"a", b"a\0", b"a\0\0", b"b", b"\xff", b"\xff\xff"]),
    st.integers(0, 15).map(lambda n: b"k%x" % n),
)
ALL_KEYS = sorted({b"", b"\0", b"a", b"a\0", b"a\0\0", b"b", b"\xff", b"\xff\xff", *(b"k%x" % n for n in range(16))})
BOUNDS = (
    st.tuples(KEYS, st.one_of(st.none(), KEYS))
    .map(lambda pair: KeyRange(*pair))
    .filter(lambda bounds: not bounds.is_empty())
)
Deleted = list[tuple[int, KeyRange]]
DELETED = st.lists(BOUNDS, max_size=14)


def newest_of(deleted: Deleted, key: bytes) -> int:
    return max((seqno for seqno, bounds in deleted if bounds.contains(key)), default=0)


def filled(ranges: list[KeyRange]) -> tuple[RangeMap, Deleted]:
    made, deleted = RangeMap(), []
    for seqno, bounds in enumerate(ranges, 1):
        made.add(Seqno(seqno), bounds, copy=False)
        deleted.append((seqno, bounds))
    return made, deleted


@given(DELETED)
def test_at_is_the_newest_delete_that_covers_the_key(ranges: list[KeyRange]) -> None:
    made, deleted = filled(ranges)
    for key in ALL_KEYS:
        assert made.newest.at(key) == newest_of(deleted, key), key


@given(DELETED)
def test_the_map_is_true_as_soon_as_a_range_is_in_it(ranges: list[KeyRange]) -> None:
    made, _ = filled(ranges)
    assert bool(made) == bool(ranges)
    assert bool(made.newest) == bool(ranges)
    assert made.added == ranges
    assert made.last_seqno == len(ranges)


@given(DELETED)
def test_the_segments_ascend_from_the_first_key_on(ranges: list[KeyRange]) -> None:
    made, _ = filled(ranges)
    bounds = [key for key, _ in made.newest._segments]
    assert bounds[0] == b""
    assert bounds == sorted(set(bounds))
    assert len(bounds) <= 2 * len(ranges) + 1


@given(DELETED)
def test_ranges_are_disjoint_ascending_and_cover_the_same_keys(ranges: list[KeyRange]) -> None:
    made, deleted = filled(ranges)
    found = made.newest.ranges()
    for bounds, following in itertools.pairwise(found):
        # They do not touch either: two that touch are one.
        assert bounds.stop is not None
        assert bounds.stop < following.start
    assert not any(bounds.is_empty() for bounds in found)
    for key in ALL_KEYS:
        assert any(bounds.contains(key) for bounds in found) == bool(newest_of(deleted, key)), key
    assert Cover.of(ranges).ranges() == found


@given(DELETED, KEYS)
def test_a_stretch_is_all_that_is_covered_around_a_key(ranges: list[KeyRange], key: bytes) -> None:
    made, deleted = filled(ranges)
    found = made.newest.stretch(key)
    expected = [bounds for bounds in made.newest.ranges() if bounds.contains(key)]
    assert found == (expected[0] if expected else None)
    assert (found is None) == (newest_of(deleted, key) == 0)


@given(DELETED, BOUNDS)
def test_newest_within_is_the_newest_delete_that_meets_the_range(ranges: list[KeyRange], bounds: KeyRange) -> None:
    made, deleted = filled(ranges)
    # A later delete may have covered an earlier one within these bounds; so it is asked of every place there is.
    places = {key for _, other in deleted for key in other if key is not None} | set(ALL_KEYS)
    expected = max((newest_of(deleted, key) for key in places if bounds.contains(key)), default=0)
    assert made.newest.newest_within(bounds) == expected


@given(DELETED, st.sets(KEYS, min_size=1), st.booleans())
def test_hide_leaves_what_is_not_covered_in_either_direction(
    ranges: list[KeyRange], keys: set[bytes], reverse: bool
) -> None:
    made, deleted = filled(ranges)
    chunk = sorted(keys, reverse=reverse)
    values = [b"value of " + key if len(key) != 1 else None for key in chunk]
    before = list(chunk), list(values)
    kept, their_values = made.newest.hide(chunk, values)
    expected = [(k, v) for k, v in zip(chunk, values, strict=True) if not newest_of(deleted, k)]
    assert list(zip(kept, their_values, strict=True)) == expected
    # The chunk belongs to the source, which may be a cached page.
    assert (chunk, values) == before


class Model:
    """A map as a memtable uses it, and who reads which moment."""

    def __init__(self) -> None:
        self.made = RangeMap()
        self.deleted: Deleted = []
        self.seqno = 0
        #: The covers that readers took when they came, and those they would take now.
        self.readers: dict[int, tuple[int, Cover]] = {}
        self.newest_reader = 0
        self.tokens = 0

    def delete(self, ranges: list[KeyRange]) -> None:
        self.seqno += 1
        oldest = min((seqno for seqno, _ in self.readers.values()), default=None)
        self.made.forget_former(None if oldest is None else Seqno(oldest))
        for bounds in ranges:
            copy = bool(self.readers) and self.newest_reader >= self.made.last_seqno
            self.made.add(Seqno(self.seqno), bounds, copy=copy)
            self.deleted.append((self.seqno, bounds))

    def write(self) -> None:
        """A commit without a deleted range."""
        self.seqno += 1
        if not self.readers:
            self.made.forget_former(None)

    def register(self) -> None:
        self.tokens += 1
        self.readers[self.tokens] = (self.seqno, self.made.at(Seqno(self.seqno)))
        self.newest_reader = max(self.newest_reader, self.seqno)

    def release(self, number: int) -> None:
        if self.readers:
            del self.readers[sorted(self.readers)[number % len(self.readers)]]

    def check(self) -> None:
        for seqno, taken in self.readers.values():
            deleted = [(at, bounds) for at, bounds in self.deleted if at <= seqno]
            for cover in (taken, self.made.at(Seqno(seqno))):
                for key in ALL_KEYS:
                    assert cover.at(key) == newest_of(deleted, key), (seqno, key)
        for key in ALL_KEYS:
            assert self.made.newest.at(key) == newest_of(self.deleted, key), key


STEPS = st.lists(
    st.one_of(
        st.lists(BOUNDS, min_size=1, max_size=3),
        st.just("register"),
        st.just("write"),
        st.integers(0, 9),
    ),
    max_size=30,
)


@given(STEPS)
def test_each_reader_goes_on_with_the_map_of_its_moment(steps: list[object]) -> None:
    model = Model()
    for step in steps:
        if isinstance(step, list):
            model.delete(step)
        elif step == "register":
            model.register()
        elif step == "write":
            model.write()
        else:
            assert isinstance(step, int)
            model.release(step)
        model.check()


@given(STEPS)
def test_a_commit_that_is_applied_again_after_an_interruption_changes_nothing(steps: list[object]) -> None:
    model = Model()
    for step in steps:
        if isinstance(step, list):
            model.delete(step)
            for bounds in step:
                copy = bool(model.readers) and model.newest_reader >= model.made.last_seqno
                model.made.add(Seqno(model.seqno), bounds, copy=copy)
        elif step == "register":
            model.register()
        elif isinstance(step, int):
            model.release(step)
        model.check()


def test_without_a_reader_a_range_copies_no_list() -> None:
    made = RangeMap()
    made.add(Seqno(1), KeyRange(b"a", b"b"), copy=False)
    segments = made.newest._segments
    made.add(Seqno(2), KeyRange(b"c", b"d"), copy=False)
    assert made.newest._segments is segments


def test_an_empty_map_is_not_changed_by_the_first_range_of_another() -> None:
    one, other = RangeMap(), RangeMap()
    one.add(Seqno(1), KeyRange(b"a", None), copy=False)
    assert not other.newest
    assert other.newest.at(b"b") == 0


def test_many_ranges_cost_two_segments_each() -> None:
    made = RangeMap()
    for number in range(20_000):
        made.add(Seqno(number + 1), KeyRange(b"%08d" % (2 * number), b"%08d" % (2 * number + 1)), copy=False)
    segments = made.newest._segments
    assert len(segments) == 40_001
    assert made.newest.at(b"%08d" % 20_000) == 10_001
    assert made.newest.at(b"%08d" % 20_001) == 0
    assert bisect_left(segments, (b"%08d" % 39_998, 0)) == 39_999
    # One that covers all of them takes them away.
    made.add(Seqno(20_001), KeyRange(b"", None), copy=False)
    assert made.newest._segments == [(b"", 20_001)]


@pytest.mark.parametrize("through", ["transactions", "snapshots"])
def test_what_deleted_ranges_take_is_in_proportion_to_their_number(through: str) -> None:
    """Readers that come and go while ranges are deleted leave no copy of the map for each of them."""
    from store_fixtures import check_store

    import kvwal
    from kvwal.testing import SimulatedDisk

    def taken(count: int) -> int:
        with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
            tracemalloc.start()
            try:
                for number in range(count):
                    start, stop = b"%08d" % (2 * number), b"%08d" % (2 * number + 1)
                    if through == "transactions":
                        with db.transaction() as txn:
                            txn.delete_range(start, stop)
                    else:
                        with db.snapshot():
                            db.delete_range(start, stop)
                memory, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            check_store(db)
        return memory

    # Four times as many take about four times as much, not sixteen times.
    assert taken(1200) < 7 * taken(300)
