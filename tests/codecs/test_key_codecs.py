"""Keys: the order of bytes is the order of values, each key has one value, and other bytes are refused."""

from __future__ import annotations

import enum
import math
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NewType, Optional, Tuple, Union, get_args, get_origin  # noqa: UP035  # the older spellings are part of what is tested
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.codecs import SEQNO, Float32, KeyCodec, Versionstamp, int64, key_codec
from kvwal.codecs.codec import OrderedFunctions, ValueFunctions
from kvwal.errors import CodecError

ZONES = st.sampled_from([UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=11, minutes=59, seconds=59))])
FIRST, LAST = datetime(1, 1, 2), datetime(9999, 12, 30)  # noqa: DTZ001  # the zones are drawn beside them
NEAR = [-2, -1, 0, 1, 2]
EDGES = [
    sign * ((1 << bits) + near)
    for bits in (7, 8, 16, 63, 64, 72, 2032, 2040, 2048)
    for sign in (1, -1)
    for near in NEAR
]

VALUES: dict[Any, st.SearchStrategy[Any]] = {
    bytes: st.binary(max_size=4) | st.lists(st.sampled_from([b"\0", b"\xff", b"a"]), max_size=4).map(b"".join),
    str: st.text(max_size=4) | st.text("\0a\uffff\U00010000", max_size=4),
    int: st.integers(-3, 3) | st.integers() | st.sampled_from(EDGES),
    float: st.floats(allow_nan=False) | st.sampled_from([0.0, -0.0, 5e-324, -5e-324, math.inf, -math.inf]),
    Float32: st.floats(allow_nan=False, width=32).map(Float32),
    bool: st.booleans(),
    UUID: st.uuids(),
    datetime: st.datetimes(FIRST, LAST, timezones=ZONES),
    Versionstamp: st.builds(Versionstamp, st.integers(0, (1 << 64) - 2), st.integers(0, (1 << 32) - 1)),
    NoneType: st.none(),
    "int64": st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-3, 3),
}
SINGLE = [bytes, str, int, float, bool, UUID, datetime]

# How parts of different types sort: the order of their codes, as docs/tables.md says.
RANKS = [NoneType, bytes, str, tuple, int, Float32, float, bool, UUID, Versionstamp, datetime]


def ranked(value: Any) -> Any:
    """A value as Python sorts it, also beside values of other types."""
    if isinstance(value, tuple):
        return RANKS.index(tuple), tuple(map(ranked, value))
    return RANKS.index(type(value)), () if value is None else value


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type of parts."""
    if get_origin(kind) is Union:
        return st.one_of(*map(values_of, get_args(kind)))
    if get_origin(kind) is tuple:
        [*parts] = get_args(kind)
        if parts[1:] == [...]:
            return st.lists(values_of(parts[0]), max_size=3).map(tuple)
        return st.tuples(*map(values_of, parts))
    return VALUES[kind]


@st.composite
def tuple_types(draw: st.DrawFn, depth: int = 0) -> Any:
    """A type of tuples, nested, with unions of what does not compare with each other."""
    number = st.sampled_from([int, float, Float32, bool])
    plain = st.sampled_from([NoneType, bytes, str, UUID, Versionstamp, datetime])
    single = number | plain
    if depth < 3:
        single |= tuple_types(depth + 1)
    part = single | st.tuples(single, plain, plain).map(lambda kinds: Union[kinds])  # noqa: UP007
    if draw(st.booleans()):
        return tuple[draw(part), ...]  # type: ignore[misc]
    return tuple[tuple(draw(st.lists(part, max_size=3)))]  # type: ignore[misc]


def check_order(codec: KeyCodec[Any], one: Any, other: Any, rank: Any = lambda value: value) -> None:
    first, second = codec.encode(one), codec.encode(other)
    assert (first < second) == (rank(one) < rank(other))
    assert (first == second) == (one == other)
    for value, data in ((one, first), (other, second)):
        back = codec.decode(data)
        assert back == value
        assert codec.encode(back) == data


def check_random(codec: KeyCodec[Any], data: bytes) -> None:
    """Bytes from anywhere are refused, or are just those of the value that they give."""
    try:
        value = codec.decode(data)
    except CodecError as error:
        assert error.data == data
        assert error.codec == codec.name
    else:
        assert codec.encode(value) == data


@pytest.mark.parametrize("kind", [*SINGLE, "int64"])
@given(data=st.data())
def test_the_bytes_of_single_values_sort_as_they_do(kind: Any, data: st.DataObject) -> None:
    codec = int64 if kind == "int64" else key_codec(kind)
    check_order(codec, data.draw(VALUES[kind]), data.draw(VALUES[kind]))


def test_the_order_of_types_is_documented() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "tables.md").read_text()
    assert ", ".join(["None", *(kind.__name__ for kind in RANKS[1:])]) in page.replace("\n", " ")


@given(kind=tuple_types(), data=st.data())
def test_the_bytes_of_tuples_sort_as_they_do(kind: Any, data: st.DataObject) -> None:
    check_order(key_codec(kind), data.draw(values_of(kind)), data.draw(values_of(kind)), ranked)


@pytest.mark.parametrize("kind", [*SINGLE, "int64"])
@given(data=st.data())
def test_bytes_from_anywhere_are_a_key_of_one_value_or_refused(kind: Any, data: st.DataObject) -> None:
    codec = int64 if kind == "int64" else key_codec(kind)
    found = data.draw(st.binary(max_size=20))
    if kind not in (bytes, str, "int64") and data.draw(st.booleans()):
        # A code that it takes, since nearly no others come to more than the first byte.
        begin = codec.encode(data.draw(VALUES[kind]))
        found = begin[:1] + found if data.draw(st.booleans()) else changed(data, begin)
    check_random(codec, found)


@given(kind=tuple_types(), data=st.data())
def test_bytes_from_anywhere_are_a_key_of_one_tuple_or_refused(kind: Any, data: st.DataObject) -> None:
    codec = key_codec(kind)
    check_random(codec, changed(data, codec.encode(data.draw(values_of(kind)))))


def changed(data: st.DataObject, found: bytes) -> bytes:
    """Bytes with a part replaced, put in or taken out."""
    at = data.draw(st.integers(0, len(found)))
    end = data.draw(st.integers(at, min(at + 3, len(found))))
    return (
        found[:at]
        + data.draw(st.sampled_from([b"", b"\0", b"\xff", b"\0\xff", b"\x05"]) | st.binary(max_size=3))
        + found[end:]
    )


def test_keys_of_str_and_bytes_are_as_long_as_their_text() -> None:
    assert key_codec(str).encode("a\0\u00e9") == b"a\0\xc3\xa9"
    assert key_codec(bytes).encode(b"\0\xff") == b"\0\xff"
    assert key_codec(bytes).encode(bytearray(b"ab")) == b"ab"  # type: ignore[arg-type]
    assert int64.encode(-1) == bytes.fromhex("7fffffffffffffff")


def test_a_key_of_one_other_value_is_a_tuple_of_it() -> None:
    for kind, value in ((int, -7), (float, 1.5), (bool, True), (UUID, UUID(int=1)), (datetime, datetime.now(UTC))):
        assert key_codec(kind).encode(value) == key_codec(tuple[kind]).encode((value,))  # type: ignore[valid-type]


WRONG: list[tuple[Any, Any, str]] = [
    (str, 1, "str is expected, not int"),
    (str, b"a", "str is expected, not bytes"),
    (bytes, "a", "bytes, not str"),
    (int, "1", "int is expected, not str"),
    (int, True, "int is expected, not bool"),
    (int, 1.0, "int is expected, not float"),
    (float, "1", "float is expected, not str"),
    (float, True, "float is expected, not bool"),
    (bool, 1, "bool is expected, not int"),
    (UUID, "a", "UUID is expected, not str"),
    (datetime, 5, "datetime is expected, not int"),
    (int64, "1", "int is expected, not str"),
    (int64, True, "int is expected, not bool"),
    (tuple[str, int], ("a", "b"), r"int as part 2 of tuple\[str, int\] is expected, not str"),
    (tuple[str, int], "ab", r"tuple\[str, int\] is expected, not str"),
    (tuple[str, int], ["a", 1], r"tuple\[str, int\] is expected, not list"),
    (tuple[str, int], ("a",), r"tuple\[str, int\] is expected, and this tuple has 1 parts"),
    (tuple[str, int], ("a", 1, 2), r"tuple\[str, int\] is expected, and this tuple has 3 parts"),
    (tuple[str, int, int], ("a", 1), "and this tuple has 2 parts"),
    (tuple[str, int, int], ("a", 1, None), r"int as part 3 of tuple\[str, int, int\] is expected, not NoneType"),
    (tuple[str, ...], ("a", 1), r"str as part 2 of tuple\[str, ...\] is expected, not int"),
    (tuple[str | None, tuple[int]], ("a", (None,)), r"int as part 1 of tuple\[int\] is expected, not NoneType"),
    (tuple[str | None], (1,), r"None \| str as part 1"),
    (tuple[Float32], (0.5,), "Float32 as part 1"),
]


@pytest.mark.parametrize(("spec", "value", "text"), WRONG)
def test_a_value_of_another_type_is_refused_with_what_is_expected(spec: Any, value: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        key_codec(spec).encode(value)


UNFIT: list[tuple[Any, Any, str]] = [
    (float, math.nan, "cannot be NaN"),
    (tuple[float], (math.nan,), "cannot be NaN"),
    (tuple[Float32], (Float32(math.nan),), "cannot be NaN"),
    (float, (1 << 53) + 1, "no float of 64 bits is equal to"),
    (float, 10**5_000, "no float of 64 bits is equal to"),
    (datetime, datetime(2030, 1, 1), "has no"),  # noqa: DTZ001
    (datetime, datetime.min.replace(tzinfo=timezone(timedelta(hours=1))), "years 1 to 9999"),
    (datetime, datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))), "years 1 to 9999"),
    (str, "\ud800", "surrogates not allowed"),
    (tuple[str], ("\ud800",), "surrogates not allowed"),
]


@pytest.mark.parametrize(("spec", "value", "text"), UNFIT, ids=range(len(UNFIT)))
def test_a_value_that_no_key_can_hold_is_refused(spec: Any, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        key_codec(spec).encode(value)


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1, 10**5_000], ids=["above", "below", "far above"])
def test_an_int64_has_64_bits(value: int) -> None:
    with pytest.raises(OverflowError, match="keys of type int have any size"):
        int64.encode(value)


def test_zero_has_one_key_though_it_has_two_signs() -> None:
    assert key_codec(float).encode(-0.0) == key_codec(float).encode(0.0) == key_codec(float).encode(0)
    assert key_codec(tuple[float]).encode((-0.0,)) == key_codec(tuple[float]).encode((0.0,))
    assert key_codec(tuple[Float32]).encode((Float32(-0.0),)) == key_codec(tuple[Float32]).encode((Float32(0.0),))


@pytest.mark.parametrize(
    "data", ["21 7f ff ff ff ff ff ff ff", "21 ff ff ff ff ff ff ff ff", "21 00 00 00 00 00 00 00 00"]
)
def test_bytes_of_a_minus_zero_and_of_nan_are_no_keys(data: str) -> None:
    for codec in (key_codec(float), key_codec(tuple[float])):
        with pytest.raises(CodecError, match="NaN or -0.0"):
            codec.decode(bytes.fromhex(data))
    with pytest.raises(CodecError, match="NaN or -0.0"):
        key_codec(tuple[Float32]).decode(bytes.fromhex("20 7f ff ff ff"))


class Colour(enum.StrEnum):
    RED = "red"

    def __str__(self) -> str:
        return "another text"


class Level(enum.IntEnum):
    HIGH = 7


class Indexed:
    def __index__(self) -> int:
        return 9


class Moment(datetime):
    nanosecond = 0


def test_an_instance_of_a_subclass_is_what_it_is_equal_to() -> None:
    codec = key_codec(tuple[str, int])
    assert codec.decode(codec.encode((Colour.RED, Level.HIGH))) == ("red", 7)
    assert [type(part) for part in codec.decode(codec.encode((Colour.RED, Level.HIGH)))] == [str, int]
    assert key_codec(str).decode(key_codec(str).encode(Colour.RED)) == "red"
    assert key_codec(int).decode(key_codec(int).encode(Indexed())) == 9  # type: ignore[arg-type]
    assert key_codec(float).encode(Float32(0.5)) == key_codec(float).encode(0.5)
    moment = Moment(2030, 1, 1, tzinfo=UTC)
    assert key_codec(datetime).decode(key_codec(datetime).encode(moment)) == moment
    moment.nanosecond = 5
    with pytest.raises(ValueError, match="nanoseconds"):
        key_codec(datetime).encode(moment)


class OtherStr(str):
    def encode(self, *_: object) -> bytes:
        return b"another"


class OtherBytes(bytes):
    def replace(self, *_: object) -> bytes:
        return b"another"


class OtherInt(int):
    def __le__(self, other: int) -> bool:
        return False


class OtherFloat(float):
    def __float__(self) -> float:
        return 7.0


@pytest.mark.parametrize(
    ("value", "plain"),
    [(OtherStr("a"), "a"), (OtherBytes(b"a"), b"a"), (OtherInt(3), 3), (OtherFloat(0.5), 0.5)],
)
def test_methods_of_a_subclass_do_not_change_what_it_holds(value: Any, plain: Any) -> None:
    single, codec = key_codec(type(plain)), key_codec(tuple[type(plain)])  # type: ignore[misc]
    assert single.encode(value) == single.encode(plain)
    assert codec.encode((value,)) == codec.encode((plain,))


UserId = NewType("UserId", str)

NAMES: list[tuple[Any, str]] = [
    (str, "str"),
    (bytes, "bytes"),
    (int, "int"),
    (int64, "int64"),
    (datetime, "datetime"),
    (UserId, "str"),
    (tuple[str, int], "tuple[str, int]"),
    (Tuple[str, int], "tuple[str, int]"),  # noqa: UP006
    (tuple[str, ...], "tuple[str, ...]"),
    (tuple[()], "tuple[()]"),
    (tuple[UserId, Optional[int]], "tuple[str, None | int]"),  # noqa: UP045
    (Annotated[UserId, "of a user"], "str"),
    (tuple[int | str | None, tuple[UUID, bool] | bytes], "tuple[None | str | int, bytes | tuple[UUID, bool]]"),
    (tuple[Float32, Versionstamp], "tuple[Float32, Versionstamp]"),
]


@pytest.mark.parametrize(("spec", "name"), NAMES)
def test_a_codec_is_named_for_its_types_however_they_are_spelled(spec: Any, name: str) -> None:
    assert (key_codec(spec).name, key_codec(spec).version) == (name, 1)


class Mine:
    """A codec, of which the class is given instead of an instance."""

    name, version, ordered, encode, decode = "mine", 1, True, str.encode, bytes.decode


NO_KEYS: list[tuple[Any, str]] = [
    (dict, "not dict"),
    (tuple, "not tuple"),
    (None, "not None"),
    (Mine, "not Mine"),
    (Versionstamp, "not Versionstamp"),
    (str | int, r"not str \| int"),
    ("str", "not 'str'"),
    (list[str], r"not list\[str\]"),
    ([str], "not"),
    (tuple[dict, int], "dict cannot be a part of a key"),  # type: ignore[type-arg]
    (tuple[Any, ...], "Any cannot be a part of a key"),
    (tuple[int | float], "numbers compare with each other"),
    (tuple[bool | int], "numbers compare with each other"),
    (tuple[tuple[int] | tuple[str]], "more than one tuple"),
    (ValueFunctions("json", repr, repr), "json is a codec for values"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("spec", "text"), NO_KEYS)
def test_what_has_no_order_as_bytes_makes_no_key(spec: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        key_codec(spec)


def test_a_key_codec_is_taken_as_it_is() -> None:
    codec = OrderedFunctions("mine", str.encode, bytes.decode)
    assert key_codec(codec) is codec
    assert key_codec(int64) is int64


def test_seqno_stands_for_a_part_of_keys_that_are_put_alone() -> None:
    with pytest.raises(TypeError, match="the last part of a key to put"):
        key_codec(tuple[str, Versionstamp]).encode(("a", SEQNO))
