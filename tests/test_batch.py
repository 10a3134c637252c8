"""The canonical form of a batch, and its writes to other tables."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sortedcontainers import SortedList

import kvwal
from kvwal.batch import MAX_TABLE_ID, WriteBatch
from kvwal.errors import UsageError
from kvwal.keys import KeyRange

KEYS = st.sampled_from([b"", b"a", b"b", b"c", b"d"])
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.sampled_from([b"1", b"2"])),
        st.tuples(st.just("delete"), KEYS),
        st.tuples(st.just("delete_range"), st.none() | KEYS, st.none() | KEYS),
    ),
    max_size=20,
)
OLD = {b"a": b"old", b"d": b"old"}


@given(CALLS)
def test_ranges_then_writes_say_the_same_as_the_calls_one_after_the_other(calls: list[Any]) -> None:
    batch = WriteBatch()
    model = dict(OLD)
    for number, (name, *arguments) in enumerate(calls):
        if number % 3 == 2:
            assert list(batch.order()) == sorted(batch.writes)
        getattr(batch, name)(*arguments)
        if name == "put":
            model[arguments[0]] = arguments[1]
        elif name == "delete":
            model.pop(arguments[0], None)
        else:
            start, stop = arguments
            model = {k: v for k, v in model.items() if k < (start or b"") or (stop is not None and k >= stop)}
    state: dict[bytes, bytes | None] = {
        key: value for key, value in OLD.items() if not any(bounds.contains(key) for bounds in batch.ranges)
    }
    state.update(batch.writes)
    assert {key: value for key, value in state.items() if value is not None} == model
    assert not any(bounds.is_empty() for bounds in batch.ranges)
    copied = batch.copy()
    batch.put(b"e", b"")
    assert list(batch.order()) == sorted(batch.writes)
    batch.clear()
    batch.put(b"e", b"")
    assert list(batch.order()) == [b"e"]
    assert list(copied.order()) == sorted(copied.writes)


def test_each_of_many_ranges_looks_at_the_keys_in_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bytes] = []
    contains = KeyRange.contains

    def looked(self: KeyRange, key: bytes) -> bool:
        looks.append(key)
        return contains(self, key)

    monkeypatch.setattr(KeyRange, "contains", looked)
    batch = WriteBatch()
    for number in range(300):
        batch.delete_range(b"%04d" % number, b"%04d/" % number)
        batch.put(b"%04d" % number, b"")
        batch.put(b"%04d.old" % number, b"")
        batch.delete_range(b"%04d." % number, b"%04d/" % number)
    assert list(batch.writes) == [b"%04d" % number for number in range(300)]
    assert len(looks) < 10


def test_a_range_that_is_interrupted_is_deleted_wholly_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interruption(BaseException):
        pass

    batch = WriteBatch()
    batch.delete_range(b"x", None)
    for number in range(20):
        batch.put(b"%02d" % number, b"")
    writes, ranges = dict(batch.writes), list(batch.ranges)
    left = 10
    remove = SortedList.remove

    def interrupted(self: SortedList[bytes], key: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Interruption
        remove(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(SortedList, "remove", interrupted)
        with pytest.raises(Interruption):
            batch.delete_range(b"00", b"19")
    assert (batch.writes, batch.ranges) == (writes, ranges)
    assert list(batch.order()) == sorted(writes)
    shown = batch.writes
    batch.delete_range(b"00", b"19")
    assert list(batch.writes) == list(batch.order()) == [b"19"]
    # A thread that looks at it goes on to see what it saw.
    assert shown == writes


def test_a_key_that_a_thread_adds_while_others_are_put_in_order_is_put_in_order() -> None:
    class Growing(dict[bytes, bytes | None]):
        def __reversed__(self) -> Any:
            # As another thread does, between counting the new keys and taking them.
            if b"c" not in self:
                self[b"c"] = b""
            return super().__reversed__()

    batch = WriteBatch()
    batch.writes = Growing({b"b": b"", b"a": b""})
    assert list(batch.order()) == [b"a", b"b", b"c"]
    batch.put(b"0", b"")
    assert list(batch.order()) == [b"0", b"a", b"b", b"c"]


def filled() -> WriteBatch:
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.delete_range(b"x", None)
    batch.table(16).put(b"b", b"2")
    batch.table(17).delete(b"c")
    return batch


def shown(batch: WriteBatch) -> Any:
    others = {} if batch.others is None else {number: shown(other) for number, other in batch.others.items()}
    return dict(batch.writes), list(batch.ranges), others


def test_a_batch_of_one_table_carries_nothing_for_others() -> None:
    assert WriteBatch().others is None


def test_writes_to_other_tables_are_part_of_the_batch_and_of_its_length() -> None:
    batch = filled()
    assert len(batch) == 4
    assert batch.table(16) is batch.table(16)
    assert shown(batch) == (
        {b"a": b"1"},
        [KeyRange(b"x", None)],
        {16: ({b"b": b"2"}, [], {}), 17: ({b"c": None}, [], {})},
    )
    assert "4 keys and ranges of 3 tables" in repr(batch)


def test_clear_forgets_the_writes_to_other_tables_and_they_can_be_used_again() -> None:
    batch = filled()
    users = batch.table(16)
    batch.clear()
    assert len(batch) == 0
    users.put(b"d", b"3")
    assert len(batch) == 1
    assert batch.table(16) is users


@pytest.mark.parametrize("table_id", [0, -1, MAX_TABLE_ID + 1])
def test_a_tables_id_is_one_that_its_four_bytes_can_hold(table_id: int) -> None:
    with pytest.raises(ValueError, match="table_id"):
        WriteBatch().table(table_id)
    WriteBatch().table(MAX_TABLE_ID)


def test_tables_do_not_nest() -> None:
    with pytest.raises(UsageError):
        WriteBatch().table(16).table(17)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, WriteBatch.copy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_of_a_batch_shares_nothing_with_it(way: Any) -> None:
    batch = filled()
    before = shown(batch)
    other = way(batch)
    assert shown(other) == before
    other.put(b"z", b"")
    other.delete_range(b"y", None)
    other.table(16).put(b"z", b"")
    other.table(99).put(b"z", b"")
    assert shown(batch) == before
    with pytest.raises(UsageError):
        other.table(16).table(17)


def test_writes_to_other_tables_are_one_commit(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        assert db.commit(filled()) == db.last_seqno == 1
        (record,) = db.history()
        assert shown(record.batch()) == shown(filled())


class Text(bytes):
    """A subclass, as others have them."""


@pytest.mark.parametrize("make", [Text, bytearray, memoryview])
def test_keys_and_values_are_bytes_of_the_batchs_own(make: Any) -> None:
    batch = WriteBatch()
    batch.put(make(b"a"), make(b"1"))
    batch.update([(make(b"b"), make(b"2"))])
    batch.delete(make(b"c"))
    batch.delete_range(make(b"d"), make(b"e"))
    assert batch.writes == {b"a": b"1", b"b": b"2", b"c": None}
    kept = [*batch.writes, batch.writes[b"a"], batch.writes[b"b"], *batch.ranges[0]]
    assert {type(one) for one in kept} == {bytes}


def test_update_puts_all_pairs_or_none() -> None:
    batch = WriteBatch()
    bad: Any = [(b"a", b"1"), (b"b", "text")]
    with pytest.raises(TypeError):
        batch.update(bad)
    assert len(batch) == 0
