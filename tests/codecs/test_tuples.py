"""Ranges of tuples by their leading parts, the place of a versionstamp, and how deep tuples nest."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.codecs import SEQNO, Float32, TupleCodec, Versionstamp, key_codec, pack, unpack
from kvwal.codecs.tuples import MAX_DEPTH
from kvwal.errors import CodecError
from kvwal.keys import MAX_KEY_BYTES, KeyRange

PARTS = st.text("\0a\xff", max_size=2)
NUMBERS = st.integers(-300, 300)
KEYS = st.tuples(PARTS, NUMBERS, PARTS | st.none())
CODEC = key_codec(tuple[str, int, str | None])


def leading(key: st.SearchStrategy[Any] = KEYS) -> st.SearchStrategy[Any]:
    return st.tuples(key, st.integers(0, 3)).map(lambda drawn: drawn[0][: drawn[1]])


@given(leading(), st.lists(KEYS, max_size=20))
def test_a_prefix_has_the_keys_with_these_leading_parts_and_no_others(parts: Any, keys: list[Any]) -> None:
    bounds = CODEC.prefix(*parts)
    for key in keys:
        assert bounds.contains(CODEC.encode(key)) == (key[: len(parts)] == parts)


@given(leading(), leading(), st.lists(st.tuples(PARTS, NUMBERS, PARTS), max_size=20))
def test_leading_parts_are_bounds_as_tuples_sort(start: Any, stop: Any, keys: list[Any]) -> None:
    codec = key_codec(tuple[str, int, str])
    start, stop = [tuple("" if part is None else part for part in bound) for bound in (start, stop)]
    for key in keys:
        data = codec.encode(key)
        assert codec.between(start, stop).contains(data) == (start <= key < stop)
        assert codec.between(start, None).contains(data) == (start <= key)
        assert codec.between(None, stop).contains(data) == (key < stop)


def test_a_prefix_has_keys_whose_next_part_is_of_any_type() -> None:
    for kind, value in (
        (bool, True),
        (tuple[str], ("a",)),
        (float, -math.inf),
        (UUID, UUID(int=(1 << 128) - 1)),
        (Versionstamp, Versionstamp((1 << 64) - 2, 0)),
        (datetime, datetime(9999, 12, 31, tzinfo=UTC)),
    ):
        codec: TupleCodec[tuple[str, Any]] = key_codec(tuple[str, kind])  # type: ignore[valid-type]
        assert codec.prefix("a").contains(codec.encode(("a", value)))
        assert not codec.prefix("a").contains(codec.encode(("a\0", value)))


def test_the_range_of_no_parts_is_all() -> None:
    assert CODEC.prefix() == CODEC.between(None, None) == (b"", None)


@pytest.mark.parametrize("size", [MAX_KEY_BYTES - 3, MAX_KEY_BYTES - 2])
def test_the_bounds_of_a_prefix_are_keys_of_any_length(size: int) -> None:
    codec = key_codec(tuple[bytes, ...])
    assert isinstance(codec, TupleCodec)
    key = codec.encode((b"x" * size,))
    bounds = codec.prefix(b"x" * size)
    assert KeyRange.of(*bounds) == bounds
    assert bounds.contains(key)
    assert not bounds.contains(codec.encode((b"x" * (size - 1),)))
    assert not bounds.contains(codec.encode((b"x" * (size - 1) + b"y",)))


def test_leading_parts_are_checked_as_keys_are() -> None:
    with pytest.raises(TypeError, match="int as part 2 of"):
        CODEC.prefix("a", "b")
    with pytest.raises(TypeError, match="and this tuple has 4 parts"):
        CODEC.prefix("a", 1, None, None)
    with pytest.raises(TypeError, match=r"tuple\[str, int, None \| str\] is expected, not str"):
        CODEC.between("a", None)  # type: ignore[arg-type]


EVENTS = key_codec(tuple[str, Versionstamp])


def test_the_place_of_a_versionstamp_is_where_it_will_be() -> None:
    data, offset = EVENTS.place(("a", SEQNO))
    assert offset is not None
    assert data[offset:] == b"\xff" * 12
    stamp = Versionstamp(7, 1)
    assert data[:offset] + bytes.fromhex("000000000000000700000001") == EVENTS.encode(("a", stamp))
    with pytest.raises(CodecError, match="not filled in"):
        EVENTS.decode(data)


def test_a_key_without_seqno_has_nothing_to_fill_in() -> None:
    key = ("a", Versionstamp(7, 1))
    assert EVENTS.place(key) == (EVENTS.encode(key), None)
    assert CODEC.place(("a", 1, None)) == (CODEC.encode(("a", 1, None)), None)
    empty: TupleCodec[tuple[str, ...]] = key_codec(tuple[str, ...])
    assert empty.place(()) == (b"", None)


def test_seqno_is_the_last_part_of_tuples_that_may_end_with_a_versionstamp() -> None:
    for codec, key in (
        (key_codec(tuple[Versionstamp, str]), (SEQNO, "a")),
        (key_codec(tuple[Versionstamp, Versionstamp]), (SEQNO, SEQNO)),
        (key_codec(tuple[str, tuple[Versionstamp]]), ("a", (SEQNO,))),
        (key_codec(tuple[str, int]), ("a", SEQNO)),
        (key_codec(tuple[str, Versionstamp]), (SEQNO,)),
        (key_codec(tuple[str, Versionstamp]), 5),
    ):
        with pytest.raises(TypeError):
            codec.place(key)
    assert key_codec(tuple[Versionstamp, ...]).place((Versionstamp(1, 1), SEQNO))[1] == 14
    assert key_codec(tuple[str | Versionstamp]).place((SEQNO,))[1] == 1


def nest(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = (value,)
    return value


def test_tuples_nest_as_deep_as_the_limit_and_no_deeper() -> None:
    value = nest(7, MAX_DEPTH + 1)
    kind: Any = int
    for _ in range(MAX_DEPTH + 1):
        kind = tuple[kind]
    for data in (pack(value), key_codec(kind).encode(value)):
        assert unpack(data) == key_codec(kind).decode(data) == value
    with pytest.raises(TypeError):
        pack((value,))
    with pytest.raises(ValueError, match="at most 16 deep"):
        key_codec(tuple[kind])
    with pytest.raises(CodecError):
        unpack(b"\x05" * (MAX_DEPTH + 1) + b"\0" * (MAX_DEPTH + 1))
    with pytest.raises(CodecError):
        unpack(b"\x05" * 60_000)


# Of tuple[int | None, tuple[None], str].
INVALID = {
    "nothing": "",
    "no last part": "14 05 00 ff 00",
    "a last part of another type": "14 05 00 ff 00 01 00",
    "a part too many": "14 05 00 ff 00 02 00 14",
    "a first part of another type": "02 00 05 00 ff 00 02 00",
    "a nested tuple that is none": "14 14 02 00",
    "a nested tuple without its part": "14 05 00 02 00",
    "a nested tuple without its part, and what would pass for one": "14 05 00 07 00 02 00",
    "a nested part of another type": "14 05 14 00 02 00",
    "a nested part too many": "14 05 00 ff 00 ff 00 02 00",
    "a nested part of another type too many": "14 05 00 ff 14 00 02 00",
}


@pytest.mark.parametrize("name", INVALID)
def test_bytes_of_another_tuple_are_refused(name: str) -> None:
    codec = key_codec(tuple[int | None, tuple[None], str])
    assert codec.decode(bytes.fromhex("14 05 00 ff 00 02 00")) == (0, (None,), "")
    data = bytes.fromhex(INVALID[name])
    with pytest.raises(CodecError) as caught:
        codec.decode(data)
    assert (caught.value.data, caught.value.codec) == (data, codec.name)


ANY = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.floats(width=32).map(Float32)
        | st.binary()
        | st.text()
        | st.uuids()
        | st.lists(ANY, max_size=3).map(tuple)
    )
)


@given(st.lists(ANY, max_size=4).map(tuple))
def test_what_is_packed_is_unpacked(values: tuple[Any, ...]) -> None:
    back = unpack(pack(values))
    assert repr(back) == repr(values)
    assert pack(back) == pack(values)


@given(
    st.binary(max_size=30)
    | st.lists(st.sampled_from([5, 0, 255, 0x14, 0x15, 2, 1, 0x26, 0x20]), max_size=12).map(bytes)
)
def test_bytes_from_anywhere_are_one_packed_tuple_or_refused(data: bytes) -> None:
    try:
        values = unpack(data)
    except CodecError as error:
        assert error.data == data
    else:
        assert pack(values) == data
