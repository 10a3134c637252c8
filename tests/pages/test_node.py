"""Nodes as bytes: golden bytes, point search in undecoded leaves, separators, where runs are cut."""

from __future__ import annotations

from bisect import bisect_left

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwal.pages import node as codec
from kvwal.pages.node import (
    OVERFLOW_REF,
    POINTER,
    OverflowRef,
    cut_points,
    decode_inner,
    decode_leaf,
    encode_inner,
    encode_leaf,
    find_in_leaf,
    generation_of,
    node_fault,
    shortest_separator,
)


def leaf(entries: dict[bytes, bytes], generation: int = 7) -> bytes:
    keys = sorted(entries)
    values = [entries[key] for key in keys]
    refs = [index for index, value in enumerate(values) if type(value) is OverflowRef]
    return encode_leaf(keys, values, -1, -1, refs, generation)


def test_leaf_with_columns_of_one_length_has_these_bytes() -> None:
    assert leaf({b"ab": b"1", b"cd": b"2"}).hex(" ", -4) == (
        "01000000 02000000 07000000 00000000 20000000 24000000 26000000 00000000 61626364 3132"
    )


def test_leaf_with_columns_of_different_lengths_has_these_bytes() -> None:
    ref = OverflowRef(OVERFLOW_REF.pack(9, 0xCAFEF00D, 5000, 6))
    raw = leaf({b"": b"x", b"abc": ref})
    # Boundaries 44 44 47 of the keys, 47 48 68 of the values; then that entry 1 is a reference.
    assert raw.hex(" ", -4) == (
        "01000202 02000000 07000000 00000000 2c000000 2f000000 44000000 01000000 "
        "2c002c00 2f002f00 30004400 61626378 09000000 0df0feca 88130000 06000000 00000000 01000000"
    )


def test_wide_columns_begin_where_two_bytes_end() -> None:
    for size, width in ((65_535 - 32 - 12 - 3, 2), (65_535 - 32 - 12 - 2, 4)):
        entries = {b"a": b"", b"bb": b"v" * size}
        raw = leaf(entries)
        assert (raw[2], raw[3]) == (width, width)
        assert decode_leaf(raw) == (tuple(entries), tuple(entries.values()))
        assert find_in_leaf(raw, b"bb") == entries[b"bb"]


def test_inner_node_has_these_bytes() -> None:
    pointers = POINTER.pack(2, 0x11111111, 2, 0, 70) + POINTER.pack(4, 0x22222222, 1, 1, 3)
    raw = encode_inner([b"m"], pointers, 1, 7)
    assert raw.hex(" ", -4) == (
        "02010000 02000000 07000000 00000000 20000000 21000000 49000000 00000000 6d020000 00111111 "
        "11020000 00460000 00000000 00040000 00222222 22010001 00030000 00000000 00"
    )
    assert decode_inner(raw) == ((b"m",), pointers, 7)


def test_inner_node_with_one_child_has_no_separators() -> None:
    pointers = POINTER.pack(2, 3, 4, 0, 5)
    assert decode_inner(encode_inner([], pointers, 3, 1)) == ((), pointers, 1)


def test_node_of_another_level_is_not_accepted() -> None:
    raw = leaf({b"a": b"1"})
    assert node_fault(raw, 0) is None
    assert "level 1" in str(node_fault(raw, 1))
    assert "level 0" in str(node_fault(encode_inner([], POINTER.pack(2, 3, 4, 0, 5), 1, 1), 0))
    assert generation_of(raw) == 7


def test_node_with_a_column_of_unknown_width_is_not_accepted() -> None:
    one, two = leaf({b"a": b"1"}), encode_inner([b"b"], POINTER.pack(2, 3, 4, 0, 5) * 2, 1, 1)
    for raw, level, at, known in [(one, 0, 2, (0, 2, 4)), (one, 0, 3, (0, 2, 4)), (two, 1, 2, (0,)), (two, 1, 3, (0,))]:
        for width in {*range(256)} - {*known} - ({2, 4} if at == 2 else set()):
            fault = node_fault(raw[:at] + bytes([width]) + raw[at + 1 :], level)
            assert "width" in str(fault), (level, at, width)
    assert node_fault(b"", 0) == node_fault(b"", 1) == "is too short for a node"
    # One child more than there are pointers.
    assert "2 children" not in str(node_fault(two, 1))
    assert "3 children" in str(node_fault(two[:4] + b"\3" + two[5:], 1))


# Few letters and many repeats, so that a key often lies inside of, or across, others.
repeating = st.text("ab\0", max_size=6).map(str.encode)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(repeating, st.binary(max_size=4), min_size=1, max_size=30),
    st.lists(repeating, max_size=10),
    st.booleans(),
)
def test_find_gives_what_a_decoded_leaf_holds(
    entries: dict[bytes, bytes], others: list[bytes], same_length: bool
) -> None:
    if same_length:
        entries = {key.ljust(6, b"a"): value.ljust(4, b"z") for key, value in entries.items()}
        others = [*others, *(key.ljust(6, b"a") for key in others)]
    raw = leaf(entries).ljust(4096, b"\0")
    assert decode_leaf(raw) == (tuple(sorted(entries)), tuple(entries[key] for key in sorted(entries)))
    for key in [*entries, *others]:
        assert find_in_leaf(raw, key) == entries.get(key)


def test_find_is_not_misled_by_a_key_that_lies_across_two_others() -> None:
    assert find_in_leaf(leaf({b"ab": b"1", b"ba": b"2", b"bb": b"3"}), b"bb") == b"3"
    # "bb" occurs first across "ab" and "bc": the true one comes later or not at all.
    assert find_in_leaf(leaf({b"ab": b"1", b"bc": b"2"}), b"bb") is None
    assert find_in_leaf(leaf({b"aab": b"1", b"b": b"2", b"bb": b"3"}), b"bb") == b"3"
    assert find_in_leaf(leaf({b"aab": b"1", b"b": b"2"}), b"bb") is None


def test_overflow_references_are_told_from_values_that_look_like_them() -> None:
    ref = OverflowRef(OVERFLOW_REF.pack(9, 1, 5000, 6))
    raw = leaf({b"a": bytes(ref), b"b": ref})
    assert type(find_in_leaf(raw, b"a")) is bytes
    assert type(find_in_leaf(raw, b"b")) is OverflowRef
    assert [type(value) for value in decode_leaf(raw)[1]] == [bytes, OverflowRef]


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_separator_separates_and_is_the_shortest(one: bytes, other: bytes) -> None:
    before, after = sorted((one, other))
    if before == after:
        return
    separator = shortest_separator(before, after)
    assert before < separator <= after
    assert after.startswith(separator)
    # A shorter prefix would also be one of the key before, or sort below it.
    assert not separator or after[: len(separator) - 1] <= before


def test_separator_of_long_keys_that_differ_at_the_end() -> None:
    key = b"k" * 65_534
    assert shortest_separator(key + b"a", key + b"b") == key + b"b"
    assert shortest_separator(b"", key) == b"k"


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.sampled_from([0, 60]),
    st.sampled_from([1, 4]),
)
def test_cuts_cover_everything_and_overfill_only_to_have_enough_entries(
    sizes: list[int], hold: int, least: int
) -> None:
    capacity = 30
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    cuts = list(cut_points(ends, capacity, hold, least))
    assert cuts == sorted(set(cuts))
    left = sizes[cuts[-1] if cuts else 0 :]
    assert sum(left) <= hold or (hold and len(left) < 2 * least)
    start = 0
    for stop in cuts:
        taken = sizes[start:stop]
        assert len(taken) >= min(least, len(sizes))
        if sum(taken) > capacity:
            # Only an entry that is large itself, or the least number of them, or a rest too short for a node.
            assert len(taken) < 2 * least
        start = stop


def test_cuts_share_evenly_what_is_left() -> None:
    ends = [10 * (index + 1) for index in range(11)]
    assert list(cut_points(ends, 100, 0, 1)) == [6, 11]
    assert list(cut_points(ends, 100, 200, 1)) == []
    assert list(cut_points([10 * (index + 1) for index in range(35)], 100, 200, 1)) == [10, 20]


def test_cuts_work_on_ranges_too() -> None:
    """Entries of one size are not added up one by one."""
    ends = range(116, 116 * 1000 + 1, 116)
    cuts = list(cut_points(ends, codec.LEAF_CAPACITY, 0, 1))
    assert cuts[-1] == 1000
    assert bisect_left(ends, codec.LEAF_CAPACITY + 1) >= cuts[0]


@pytest.mark.parametrize(("struct", "size"), [(codec.NODE_HEADER, 32), (codec.POINTER, 20), (codec.OVERFLOW_REF, 20)])
def test_sizes_on_disk_never_change(struct: object, size: int) -> None:
    assert struct.size == size  # type: ignore[attr-defined]
