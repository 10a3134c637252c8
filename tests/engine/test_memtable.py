"""The memtable against plain dicts, one for each moment."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import interrupted_at

from kvwal.batch import WriteBatch
from kvwal.engine.memtable import MISSING, Memtable, sorted_in_steps
from kvwal.engine.present import Levels
from kvwal.keys import Seqno

KEYS = st.sampled_from([b"", b"a", b"b", b"c", b"d", b"e", b"f"])


def batch_of(*writes: tuple[Any, ...]) -> WriteBatch:
    batch = WriteBatch()
    for write in writes:
        if len(write) == 1:
            batch.delete_range(*write[0])
        elif write[1] is None:
            batch.delete(write[0])
        else:
            batch.put(*write)
    return batch


def table_of(*commits: WriteBatch, oldest_reader: int | None = None) -> Memtable:
    table = Memtable(Seqno(0))
    for seqno, batch in enumerate(commits, 1):
        table.apply(Seqno(seqno), batch, 10, None if oldest_reader is None else Seqno(oldest_reader))
        table._check()
    return table


@given(
    st.lists(
        st.lists(
            st.one_of(
                st.tuples(KEYS, st.sampled_from([b"1", b"2", b"3", None])),
                st.tuples(st.tuples(KEYS, st.one_of(st.none(), KEYS))),
            ),
            min_size=1,
            max_size=4,
        ),
        max_size=8,
    ),
    st.integers(0, 8),
)
def test_every_moment_since_the_oldest_reader_stays_readable(commits: list[Any], oldest: int) -> None:
    below = {b"a": b"old", b"c": b"old", b"f": b"old"}
    state = dict(below)
    states = [dict(state)]
    table = Memtable(Seqno(0))
    for seqno, writes in enumerate(commits, 1):
        batch = batch_of(*writes)
        for bounds in batch.ranges:
            state = {k: v for k, v in state.items() if not bounds.contains(k)}
        for key, value in batch.writes.items():
            state[key] = value
            if value is None:
                del state[key]
        table.apply(Seqno(seqno), batch, 10, Seqno(oldest) if seqno > oldest else None)
        table._check()
        states.append(dict(state))

    def seen(value: Any, key: bytes) -> bytes | None:
        return below.get(key) if value is MISSING else value

    for key in [b"", b"a", b"b", b"c", b"d", b"e", b"f"]:
        assert seen(table.get(key), key) == state.get(key)
        for moment in range(min(oldest, len(commits)), len(states)):
            assert seen(table.get_at(key, Seqno(moment)), key) == states[moment].get(key)


def test_a_table_says_its_newest_seqno_before_any_value_of_it_can_be_seen() -> None:
    """A scan takes values without a lock and then asks whether the table may have changed under it."""
    table = Memtable(Seqno(0))
    seen: list[int] = []

    class Watched(dict[bytes, bytes | None]):
        def update(self, *values: Any) -> None:  # type: ignore[override]
            seen.append(table.last_seqno)
            super().update(*values)

    table.latest = Watched()
    table.apply(Seqno(1), batch_of((b"a", b"1"), ((b"", None),), (b"b", b"1")), 4, None)
    assert seen == [1, 1], "the deletion of the range, and the writes"


def test_a_fast_put_says_its_seqno_before_its_value_too() -> None:
    from engine_fakes import FakePages, FakeTree

    from kvwal.engine.present import Present

    present = Present(FakePages(), cache_bytes=1 << 20, memtable_bytes=1 << 20)  # type: ignore[arg-type]
    seen: list[tuple[int, int]] = []

    class Watched(dict[bytes, bytes | None]):
        def __setitem__(self, key: bytes, value: bytes | None) -> None:
            seen.append((present.horizon, present.levels.memtable.last_seqno))
            super().__setitem__(key, value)

    table = Memtable(Seqno(0))
    table.latest = Watched()
    present.levels = Levels(table, None, FakeTree())  # type: ignore[arg-type]
    present.publish_put(Seqno(1), b"a", b"1", 10)
    view = present.view("test", 0)
    present.publish_put(Seqno(2), b"a", b"2", 10)
    assert seen == [(1, 1), (2, 2)]
    present.release(view)


def test_ordered_keys_stay_right_while_keys_come_between_scans() -> None:
    table = Memtable(Seqno(0))
    for seqno, key in enumerate([b"m", b"c", b"x", b"a", b"m", b"n"], 1):
        table.apply(Seqno(seqno), batch_of((key, b"")), 1, None)
        table._check()
    assert table.keys_between(b"b", b"n", after=None, reverse=False, most=9) == [b"c", b"m"]
    assert table.keys_between(None, None, after=b"m", reverse=False, most=1) == [b"n"]
    assert table.keys_between(None, None, after=b"m", reverse=True, most=9) == [b"c", b"a"]
    assert table.keys_between(b"c", b"x", after=None, reverse=True, most=9) == [b"n", b"m", b"c"]


@given(st.lists(st.binary(max_size=4), unique=True))
def test_keys_sorted_in_steps_are_sorted(keys: list[bytes]) -> None:
    assert [key for step in sorted_in_steps(keys, lambda: None) for key in step] == sorted(keys)


@pytest.mark.parametrize(
    "order",
    [
        lambda number: number,
        lambda number: -number,
        lambda number: number * 7919 % 30_011,
        # From sources that take turns.
        lambda number: number % 128 * 1000 + number // 128,
        lambda number: number % 3 * 20_000 + number // 3,
    ],
    ids=["ascending", "descending", "scattered", "128 sources", "3 sources"],
)
def test_no_step_of_sorting_is_long(order: Any) -> None:
    """No other thread runs during a step, so `give_way` is called around each, and none takes many keys."""
    keys = [b"%08d" % (order(number) + 40_000) for number in range(30_000)]
    calls = 0

    def give_way() -> None:
        nonlocal calls
        calls += 1

    found: list[bytes] = []
    for step in sorted_in_steps(keys, give_way):
        assert len(step) < 4096
        assert calls, "not even once since the step before"
        calls = 0
        found += step
    assert found == sorted(keys)


def test_a_wider_range_swallows_those_inside_it_unless_someone_reads_the_past() -> None:
    inner, outer = batch_of(((b"b", b"c"),)), batch_of(((b"a", b"d"),))
    assert len(table_of(inner, outer).ranges) == 1
    watched = table_of(inner, outer, oldest_reader=0)
    assert watched.masks_at(Seqno(1)) == [(b"b", b"c")]
    assert len(watched.masks_at(Seqno(2))) == 2


def test_versions_nobody_reads_any_more_are_swept() -> None:
    table = Memtable(Seqno(0))
    for seqno in range(1, 5000):
        # A reader that moves along: what is older than it must not pile up.
        table.apply(Seqno(seqno), batch_of((b"k%d" % seqno, b"")), 1, Seqno(max(0, seqno - 10)))
    assert table.version_count < 2200
    table.forget_versions()
    assert table.version_count == 0
    table._check()


@pytest.mark.parametrize("stop", [None, b"z"])
def test_a_put_after_a_range_delete_is_seen_and_older_levels_stay_hidden(stop: bytes | None) -> None:
    table = table_of(batch_of((b"a", b"1")), batch_of(((b"", stop),)), batch_of((b"b", b"2")))
    assert table.get(b"a") is None
    assert table.get(b"b") == b"2"
    assert table.get(b"below") is None
    assert table.get(b"zz") is (None if stop is None else MISSING)


@pytest.mark.interruptions
@pytest.mark.parametrize("more", [5, 60], ids=["few", "many"])
@pytest.mark.parametrize("first", [0, 100])
def test_an_interruption_anywhere_while_keys_are_put_in_order_loses_none(first: int, more: int) -> None:
    """Interrupted in the midst of it, the order had lost keys, or had them twice, and so had the next checkpoint."""
    for step in range(1, 2000):
        table = Memtable(Seqno(0))
        table.apply(Seqno(1), batch_of(*((b"%03d" % n, b"v") for n in range(0, 2 * first, 2))), 1, None)
        table._check()
        table.apply(Seqno(2), batch_of(*((b"%03d" % n, b"v") for n in range(1, 2 * more, 2))), 1, None)
        scan = partial(table.keys_between, None, None, after=None, reverse=False, most=1)
        interrupted = interrupted_at(step, scan) is not None
        table._check()
        assert table.keys_between(b"001", b"004", after=None, reverse=False, most=9) == sorted(table.latest)[
            bool(first) : 2 + bool(first) * 2
        ]
        if not interrupted:
            return
    raise AssertionError("putting in order has no end")
