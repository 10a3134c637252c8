"""Ranges of keys against sets of keys, and what is let in as a key, a value or a number."""

from __future__ import annotations

import array
import ctypes
import mmap
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.keys import (
    MAX_KEY_BYTES,
    KeyRange,
    as_int,
    as_key,
    as_value,
    disjoint,
    in_any,
    prefix_stop,
)

# Between any two ends, at them, and beyond both, so that each range is told from each other by its members.
ENDS = [b"", b"\0", b"a", b"a\0", b"b", b"b\xff", b"c"]
POINTS = sorted({point for end in ENDS for point in (end, end + b"\0", end + b"\0\0")} | {b"zzz"})
RANGES = st.builds(KeyRange, st.sampled_from(ENDS), st.none() | st.sampled_from(ENDS))


def members(bounds: KeyRange | None) -> set[bytes]:
    """The model: the range written down plainly, key by key."""
    if bounds is None:
        return set()
    return {point for point in POINTS if point >= bounds.start and (bounds.stop is None or point < bounds.stop)}


@given(RANGES)
def test_a_range_is_the_set_of_its_keys(bounds: KeyRange) -> None:
    assert {point for point in POINTS if bounds.contains(point)} == members(bounds)
    assert bounds.is_empty() == (not members(bounds))


@given(RANGES, RANGES)
def test_two_ranges_meet_as_their_sets_do(one: KeyRange, other: KeyRange) -> None:
    assert members(one.clip(other)) == members(one) & members(other)
    assert (one.clip(other) is not None) == one.overlaps(other) == bool(members(one) & members(other))
    assert one.covers(other) == (members(one) >= members(other))


@given(st.lists(RANGES, max_size=6))
def test_disjoint_ranges_hold_the_same_keys_in_order_and_apart(ranges: list[KeyRange]) -> None:
    result = disjoint(ranges)
    assert set().union(*map(members, result)) == set().union(*map(members, ranges))
    for bounds in result:
        assert type(bounds) is KeyRange
        assert not bounds.is_empty()
    for left, right in pairwise(result):
        assert left.stop is not None
        assert left.stop < right.start
    assert disjoint(result) == result


@given(st.sampled_from(POINTS), st.lists(RANGES, max_size=4))
def test_in_any_asks_each_of_the_ranges(key: bytes, ranges: list[KeyRange]) -> None:
    assert in_any(key, ranges) == any(key in members(bounds) for bounds in ranges)


@given(st.sampled_from(POINTS), st.sampled_from(POINTS))
def test_through_holds_both_ends(first: bytes, last: bytes) -> None:
    assert members(KeyRange.through(first, last)) == {point for point in POINTS if first <= point <= last}


@given(st.binary(max_size=3), st.binary(max_size=5))
def test_the_stop_of_a_prefix_parts_its_keys_from_all_later_ones(prefix: bytes, key: bytes) -> None:
    assert KeyRange.of(prefix, prefix_stop(prefix)).contains(key) == key.startswith(prefix)
    assert KeyRange.of_prefix(prefix).contains(key) == key.startswith(prefix)
    behind = KeyRange.of(prefix_stop(bytearray(prefix)), None)
    assert behind.contains(key) == (key > prefix and not key.startswith(prefix))


@pytest.mark.parametrize(
    "data",
    [
        b"abc",
        bytearray(b"abc"),
        memoryview(b"abc"),
        memoryview(b"a-b-c")[::2],
        memoryview(b"cba")[::-1],
        array.array("B", b"abc"),
        array.array("b", b"abc"),
        (ctypes.c_char * 3)(b"a", b"b", b"c"),
        (ctypes.c_ubyte * 3)(97, 98, 99),
        memoryview(b"abc").cast("B", (3, 1)),
    ],
    ids=lambda data: type(data).__name__,
)
def test_a_buffer_of_single_bytes_is_taken_as_its_bytes(data: Any) -> None:
    assert as_key(data) == as_value(data) == b"abc"
    assert type(as_key(data)) is bytes


def test_a_mapped_file_is_bytes_like_and_can_be_closed_afterwards() -> None:
    mapped = mmap.mmap(-1, 4096)
    assert as_value(mapped) == bytes(4096)
    mapped.close()


@pytest.mark.parametrize(
    "data",
    [
        array.array("d", [1.0]),
        array.array("H", b"abcd"),
        memoryview(b"abcd").cast("I"),
        memoryview(b"a").cast("B", ()),
        memoryview(bytes(8)).cast("P"),
        (ctypes.py_object * 2)(object(), object()),
        (ctypes.c_void_p * 1)(),
        ctypes.c_int(5),
    ],
    ids=lambda data: type(data).__name__,
)
def test_a_buffer_of_anything_else_is_refused_with_the_way_to_mean_its_memory(data: Any) -> None:
    for check in (as_key, as_value):
        with pytest.raises(TypeError, match=r"tobytes\(\)"):
            check(data)


def test_what_a_subclass_of_bytes_holds_is_stored_whatever_it_says_of_itself() -> None:
    class Liar(bytes):
        def __bytes__(self) -> bytes:
            return b"lie"

        def __getitem__(self, at: Any) -> Any:
            return b"lie"

    assert as_value(Liar(b"truth")) == b"truth"
    assert type(as_value(Liar(b"truth"))) is bytes


@pytest.mark.parametrize("data", ["text", 5, None, 1.5, [97], (97,), object()])
def test_what_has_no_bytes_is_refused(data: Any) -> None:
    for check in (as_key, as_value):
        with pytest.raises(TypeError):
            check(data)


def test_a_key_may_have_its_limit_and_not_one_byte_more() -> None:
    assert len(as_key(bytes(MAX_KEY_BYTES))) == MAX_KEY_BYTES
    with pytest.raises(ValueError, match=f"the limit is {MAX_KEY_BYTES}"):
        as_key(bytes(MAX_KEY_BYTES + 1))


class Index:
    """What NumPy's integers are to `operator.index`."""

    def __index__(self) -> int:
        return 7


def test_a_number_is_whatever_has_an_index() -> None:
    assert as_int("limit", 0, 0) == 0
    assert as_int("limit", 9, 0, 9) == 9
    found = as_int("limit", Index(), 0)
    assert (found, type(found)) == (7, int)


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, b"1"])
def test_a_bool_or_a_float_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="limit is an int, not"):
        as_int("limit", value, 0)


def test_a_number_outside_of_its_limits_is_refused_with_them() -> None:
    with pytest.raises(ValueError, match="limit is -1; it is at least 0"):
        as_int("limit", -1, 0)
    with pytest.raises(ValueError, match="at least 0 and at most 9"):
        as_int("limit", 10, 0, 9)
