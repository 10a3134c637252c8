"""The memtable against plain dicts, one for each moment."""

from __future__ import annotations

from functools import partial
from itertools import count, pairwise
from typing import Any

import pytest
from collected import collected_everywhere
from engine_fakes import apply, make, values_at
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import interrupted_at

from kvwal.batch import WriteBatch
from kvwal.engine.memtable import Memtable
from kvwal.engine.readers import Reader
from kvwal.engine.value import MISSING
from kvwal.engine.version import Version
from kvwal.keys import KeyRange, Seqno, in_any

POINTS = [b"", b"a", b"b", b"c", b"d", b"e", b"f"]
KEYS = st.sampled_from(POINTS)
WRITES = st.one_of(
    st.tuples(KEYS, st.sampled_from([b"1", b"2", b"3", None])),
    st.tuples(st.tuples(KEYS, st.one_of(st.none(), KEYS))),
)


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


def table_of(*commits: WriteBatch) -> Memtable:
    table = Memtable(Seqno(0))
    for seqno, batch in enumerate(commits, 1):
        apply(table, seqno, batch)
        table._check()
    return table


def read_at(table: Memtable, seqno: int) -> Reader:
    """A registered reader of the table."""
    reader = Reader(Version(table, None, None), Seqno(seqno), "test", 0, None)  # type: ignore[arg-type]
    reader.register(table.older.readers)
    return reader


def applied(state: dict[bytes, bytes], batch: WriteBatch) -> dict[bytes, bytes]:
    kept: dict[bytes, bytes | None] = {key: value for key, value in state.items() if not in_any(key, batch.ranges)}
    return {key: value for key, value in (kept | batch.writes).items() if value is not None}


@given(
    st.lists(st.lists(WRITES, min_size=1, max_size=4), max_size=8),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=4),
    st.booleans(),
)
def test_the_moment_of_every_registered_reader_stays_readable(
    commits: list[Any], stays: list[tuple[int, int]], twice: bool
) -> None:
    """Readers come at one moment and go at another. A commit that was interrupted may be applied again."""
    below = {b"a": b"old", b"c": b"old", b"f": b"old"}
    table = Memtable(Seqno(0))
    states = [dict(below)]

    def seen(value: Any, key: bytes) -> bytes | None:
        return below.get(key) if value is MISSING else value

    def check(moment: int) -> None:
        cover = table.ranges.at(Seqno(moment))
        values = values_at(table, moment)
        for key in POINTS:
            wanted = states[moment].get(key)
            assert seen(table.get_at(key, Seqno(moment)), key) == wanted, (key, moment)
            value: Any = values.get(key, MISSING)
            if value is MISSING and cover.at(key):
                value = None
            assert seen(value, key) == wanted, (key, moment)

    readers: dict[int, list[Reader]] = {}
    for moment in range(len(commits) + 1):
        for comes, stay in stays:
            if comes == moment:
                readers.setdefault(comes + stay, []).append(read_at(table, moment))
        for reader in readers.pop(moment, []):
            check(reader.seqno)
            reader.release()
        for reader in (reader for rest in readers.values() for reader in rest):
            check(reader.seqno)
        check(moment)
        for key in POINTS:
            assert seen(table.get(key), key) == states[moment].get(key)
        if moment < len(commits):
            batch = batch_of(*commits[moment])
            for _ in range(1 + twice):
                apply(table, moment + 1, batch)
                table._check()
            states.append(applied(states[-1], batch))


def test_a_table_says_its_newest_seqno_before_any_value_of_it_can_be_seen() -> None:
    """A scan takes values without a lock and then asks whether the table may have changed under it."""
    table = Memtable(Seqno(0))
    seen: list[Any] = []

    class Watched(dict[bytes, bytes | None]):
        def update(self, *values: Any) -> None:
            seen.append((table.last_seqno, bool(table.ranges), dict(table._written_at)))
            super().update(*values)

    table.latest = Watched()
    apply(table, 1, batch_of((b"a", b"1"), ((b"", None),), (b"b", b"1")), 4)
    assert seen == [(1, True, {b"b": 1})], "the range, and when the keys are written, before the values"


@pytest.mark.parametrize("way", ["publish", "publish_put", "publish_puts"])
def test_a_commit_says_its_seqno_before_its_value_too(way: str) -> None:
    _, _, engine = make()
    seen: list[tuple[int, int, int]] = []

    class Watched(dict[bytes, bytes | None]):
        def _note(self) -> None:
            seen.append((engine.state.horizon, engine.state.version.memtable.last_seqno, engine.state.seqno))

        def __setitem__(self, key: bytes, value: bytes | None) -> None:
            self._note()
            super().__setitem__(key, value)

        def update(self, *values: Any) -> None:
            self._note()
            super().update(*values)

    table = engine.state.version.memtable
    table.latest = Watched()
    readers = []
    for seqno in (1, 2, 3):
        if way == "publish":
            engine.publisher.publish(Seqno(seqno), batch_of((b"a", b"%d" % seqno)), 2)
        elif way == "publish_put":
            engine.publisher.publish_put(Seqno(seqno), b"a", b"%d" % seqno, 10)
        else:
            engine.publisher.publish_puts(Seqno(seqno), [b"a"], [b"%d" % seqno], 10)
        # From the second on there is a reader, so they take the longer way.
        readers.append(engine.reads.moments.reader("test"))
    assert seen == [(1, 1, 0), (2, 2, 1), (3, 3, 2)]
    assert [engine.reads.read_at(reader, b"a") for reader in readers] == [b"1", b"2", b"3"]


def test_a_wider_range_swallows_those_inside_it_unless_a_reader_sees_the_past() -> None:
    inner, outer = batch_of(((b"b", b"c"),)), batch_of(((b"a", b"d"),))
    table = table_of(inner, outer)
    assert table.ranges.newest.ranges() == [KeyRange(b"a", b"d")]
    assert len(table.ranges.newest._segments) == 3
    table = table_of(inner)
    reader = read_at(table, 1)
    apply(table, 2, outer)
    for moment, wanted in ((1, KeyRange(b"b", b"c")), (2, KeyRange(b"a", b"d"))):
        cover = table.ranges.at(Seqno(moment))
        assert cover.ranges() == [wanted]
    reader.release()


def test_a_range_copies_the_map_only_for_a_reader_that_came_since_the_last_one() -> None:
    table = table_of(batch_of(((b"1", b"1x"),)))
    maps = [table.ranges.newest._segments]
    readers = []
    for seqno in (2, 3, 4):
        if seqno == 3:
            readers.append(read_at(table, 2))
        apply(table, seqno, batch_of(((b"%d" % seqno, b"%dx" % seqno),)), 10)
        maps.append(table.ranges.newest._segments)
    assert [one is other for one, other in pairwise(maps)] == [True, False, True]


def test_a_range_costs_the_same_however_many_keys_it_covers() -> None:
    """It is one entry; no key is visited, and no value replaced."""
    table = table_of(batch_of(*((b"%04d" % number, b"v") for number in range(1000))))
    latest = dict(table.latest)
    before = table.bytes_used
    apply(table, 2, batch_of(((b"", None),)), 0)
    assert table.latest == latest
    assert (table.older._by_key, table._written_at) == ({}, {})
    assert table.bytes_used < before + 500
    assert all(table.get(key) is None for key in latest)


@pytest.mark.parametrize("stop", [None, b"z"])
def test_a_put_after_a_range_delete_is_seen_and_older_sources_stay_hidden(stop: bytes | None) -> None:
    table = table_of(batch_of((b"a", b"1")), batch_of(((b"", stop),)), batch_of((b"b", b"2")))
    assert table.get(b"a") is None
    assert table.get(b"b") == b"2"
    for moment, wanted in ((2, None), (3, b"2")):
        assert table.get_at(b"a", Seqno(moment)) is None
        assert table.get_at(b"b", Seqno(3)) == (wanted or b"2")
    cover = table.ranges.at(Seqno(3))
    assert cover.at(b"below")
    assert bool(cover.at(b"zz")) == (stop is None)
    # A key that the table does not have: what it says of it is what its ranges say.
    assert table.get(b"below") is None
    assert table.get(b"zz") is (None if stop is None else MISSING)


@pytest.mark.parametrize("watched", [False, True])
def test_a_commit_that_is_interrupted_anywhere_and_applied_again_is_applied_once(watched: bool) -> None:
    for step in range(1, 2000):
        table = table_of(batch_of((b"a", b"1"), (b"c", b"1")), batch_of(((b"c", b"d"),), (b"c", b"2")))
        reader = read_at(table, 2) if watched else None
        batch = batch_of(((b"b", b"e"),), (b"a", b"3"), (b"d", b"3"))
        interrupted = interrupted_at(step, partial(apply, table, 3, batch)) is not None
        if interrupted:
            apply(table, 3, batch)
        table._check()
        assert [table.get(key) for key in (b"a", b"b", b"c", b"d")] == [b"3", None, None, b"3"], step
        if reader is not None:
            found = [table.get_at(key, Seqno(2)) for key in (b"a", b"b", b"c", b"d")]
            assert found == [b"1", MISSING, b"2", MISSING], step
        if not interrupted:
            return
    raise AssertionError("applying a commit has no end")


def test_a_finalizer_may_read_a_table_while_those_that_were_written_are_listed() -> None:
    table, numbers = table_of(), count(1_000)
    for number in range(20):
        table.parts.of(number).write(Seqno(1), {b"k": b"v"}, 2, [])
    reading = lambda: partial(table.parts.of, next(numbers))  # noqa: E731  # it is one expression
    assert collected_everywhere(reading, table.parts.written, 50) >= 15
    assert len(table.parts.written()) == 20
