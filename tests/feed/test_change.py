"""What is told of one commit: the filter, and that nothing is cut out of a record that is not told."""

from __future__ import annotations

import pickle
import struct
from array import array
from bisect import bisect_left
from mmap import mmap
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError
from kvwal.feed.change import Change, Filter
from kvwal.keys import KeyRange, Seqno
from kvwal.log import Record
from kvwal.log.intents import encode_intents

keys = st.binary(max_size=3)
EVERY = [bytes([a]) for a in range(256)]


def record_of(batch: WriteBatch, extension: dict[int, bytes] | None = None) -> Record:
    chunks = encode_intents(batch, extension)
    return Record(1 | getattr(chunks, "bits", 0), Seqno(7), Seqno(6), 123, Seqno(1), 4096, b"".join(chunks))


@st.composite
def batches(draw: st.DrawFn) -> WriteBatch:
    batch = WriteBatch()
    for table in draw(st.sets(st.sampled_from([0, 0, 1, 16, 17, 1 << 31]), min_size=1)):
        part = batch.table(table) if table else batch
        for key, value in draw(st.lists(st.tuples(keys, st.none() | st.binary(max_size=5)), max_size=5)):
            part.writes[key] = value
        for start, stop in draw(st.lists(st.tuples(keys, st.none() | keys), max_size=3)):
            if stop is None or start < stop:
                part.ranges.append(KeyRange(start, stop))
    return batch


def told(wanted: Filter, record: Record) -> list[Change]:
    found = wanted.changes(record)
    if found is None:
        return []
    changes = list(found)
    assert changes, "nothing is told as None"
    return changes


def expected(batch: WriteBatch, prefixes: list[bytes], tables: list[int] | None) -> list[tuple[Any, ...]]:
    """Plainly: every intent of these tables, one key or range after the other."""
    shown = [
        (table, part)
        for table, part in [(0, batch), *batch.parts()]
        if (table in tables if tables is not None else table == 0 or 16 <= table < 1 << 31)
    ]
    changes: list[tuple[Any, ...]] = []
    for table, part in shown:
        for start, stop in part.ranges:
            # Byte strings of up to 2 bytes stand for all.
            covered = [key for key in ALL if start <= key and (stop is None or key < stop)]
            kept = [key for key in covered if any(map(key.startswith, prefixes))]
            changes.append((table, "delete_range", kept))
    for table, part in shown:
        for key, value in part.writes.items():
            if any(map(key.startswith, prefixes)):
                changes.append((table, "delete" if value is None else "put", key, value))
    return [change for change in changes if change[2] != []]


ALL = sorted([b"", *EVERY, *(a + b for a in EVERY[::16] for b in EVERY[::16]), b"\xff\xff"])


def as_plain(changes: list[Change]) -> list[tuple[Any, ...]]:
    """Ranges as the keys of `ALL` in them, those that were one before they were clipped joined again."""
    plain: list[tuple[Any, ...]] = []
    for change in changes:
        if change.kind != "delete_range":
            assert change.stop is None
            plain.append((change.table, change.kind, change.key, change.value))
            continue
        assert change.value is None
        first = bisect_left(ALL, change.key)
        last = len(ALL) if change.stop is None else bisect_left(ALL, change.stop)
        if ALL[first:last]:
            plain.append((change.table, "delete_range", ALL[first:last]))
    return plain


def joined(changes: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """All ranges of a table as one set of keys: how they are cut is another test's matter."""
    ranges: dict[int, set[bytes]] = {}
    for table, kind, *rest in changes:
        if kind == "delete_range":
            ranges.setdefault(table, set()).update(rest[0])
    return [("ranges", ranges), *(change for change in changes if change[1] != "delete_range")]


chosen_tables = st.none() | st.lists(st.sampled_from([0, 16, 17]), max_size=3)


@given(batches(), st.lists(keys, min_size=1, max_size=4), chosen_tables)
def test_what_is_told_is_what_a_plain_filter_leaves(batch: WriteBatch, prefixes: list[bytes], tables: list[int] | None):
    record = record_of(batch)
    changes = told(Filter(prefixes[0] if len(prefixes) == 1 else prefixes, tables), record)
    assert joined(as_plain(changes)) == joined(expected(batch, prefixes, tables))
    assert [change.last for change in changes] == [False] * (len(changes) - 1) + [True] * bool(changes)
    assert all((change.seqno, change.time_us, change.meta) == (7, 123, {}) for change in changes)


def test_a_range_is_one_change_clipped_to_each_prefix_that_it_meets():
    batch = WriteBatch()
    batch.delete_range(b"b", b"d")
    record = record_of(batch)
    assert [(c.key, c.stop) for c in told(Filter(b"", None), record)] == [(b"b", b"d")]
    assert [(c.key, c.stop) for c in told(Filter([b"c1", b"c2", b"a", b"c15"], None), record)] == [(b"c1", b"c3")]
    assert [(c.key, c.stop) for c in told(Filter([b"cz", b"cx"], None), record)] == [(b"cx", b"cy"), (b"cz", b"c{")]
    batch = WriteBatch()
    batch.delete_range(b"\xff\x01")
    assert [(c.key, c.stop) for c in told(Filter(b"\xff", None), record_of(batch))] == [(b"\xff\x01", None)]


def test_a_commit_of_the_systems_tables_alone_is_not_told_and_its_part_of_another_neither():
    batch = WriteBatch()
    batch.table(1).put(b"k", b"v")
    assert told(Filter(b"", None), record_of(batch)) == []
    batch.table(1 << 31).put(b"k", b"v")
    batch.table(16).put(b"k", b"user's")
    [change] = told(Filter(b"", None), record_of(batch))
    assert (change.table, change.value, change.last) == (16, b"user's", True)
    assert told(Filter(b"", [0]), record_of(batch)) == []


@pytest.mark.parametrize("table", [1, 15, 1 << 31, (1 << 32) - 1])
def test_the_tables_of_the_store_itself_cannot_be_asked_for(table: int):
    with pytest.raises(ValueError, match="the store's own"):
        Filter(b"", [table])


@pytest.mark.parametrize("wrong", ["text", 5, [b"a", "text"], [1]])
def test_a_prefix_that_is_no_bytes_is_refused(wrong: Any):
    with pytest.raises(TypeError):
        Filter(wrong, None)


def test_a_prefix_is_any_buffer_of_single_bytes():
    one = Filter(b"ab", None).digest()
    with mmap(-1, 2) as mapped:
        mapped[:] = b"ab"
        for buffer in (bytearray(b"ab"), memoryview(b"ab"), array("B", b"ab"), array("b", b"ab"), mapped):
            assert Filter(buffer, None).digest() == one
            assert Filter([buffer], None).digest() == one
    for wrong in (array("d", [1.0]), memoryview(array("H", b"abcd"))):
        with pytest.raises(TypeError, match="a key is bytes"):
            Filter(wrong, None)


def test_no_prefix_at_all_is_refused():
    with pytest.raises(ValueError, match="nothing through"):
        Filter([], None)


def test_a_change_has_what_the_user_said_of_the_commit_and_can_be_kept_and_sent():
    pair = struct.pack("<HH", 2, 3) + b"byada"
    batch = WriteBatch()
    batch.put(b"k", b"v")
    [change] = told(Filter(b"k", None), record_of(batch, {1: pair}))
    assert change.meta == {"by": "ada"}
    assert pickle.loads(pickle.dumps(change)) == change
    assert len({change, pickle.loads(pickle.dumps(change))}) == 1
    with pytest.raises(CorruptionError, match="out of order"):
        told(Filter(b"k", None), record_of(batch, {1: pair + pair}))


class Watched(bytes):
    """A body that notes which bytes were cut out of it."""

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            self.cut.append((at.start or 0, at.stop or len(self)))
        return bytes.__getitem__(self, at)


def watched(record: Record) -> Watched:
    body = Watched(record.body)
    body.cut = []  # type: ignore[attr-defined]
    record.body = body
    return body


@pytest.mark.parametrize("prefixes", [b"yes", [b"yes", b"never"]])
def test_no_value_is_cut_out_of_a_commit_of_which_nothing_is_told(prefixes: Any):
    # Invariant: keys are tested before values are cut out of the record.
    one, many = WriteBatch(), WriteBatch()
    one.put(b"no", b"V" * 1000)
    for number in range(10):
        many.put(b"no%d" % number, b"V" * (1000 + number))
    for batch in (one, many):
        record = record_of(batch)
        body = watched(record)
        assert told(Filter(prefixes, None), record) == []
        first = record.body.index(b"V")
        assert body.cut or batch is one
        assert all(stop <= first for _, stop in body.cut), body.cut


def test_only_the_values_that_are_told_are_cut_out():
    # Invariant: only the values of changes that are told are cut out.
    batch = WriteBatch()
    for number in range(10):
        batch.put(b"%d" % number, b"V" * (1000 + number))
    record = record_of(batch)
    body = watched(record)
    [change] = told(Filter(b"4", None), record)
    assert change.value == b"V" * 1004
    first = record.body.index(b"V")
    assert [stop - start for start, stop in body.cut if stop > first] == [1004]
