"""Values: what comes back, what is refused when it is written, and what is when it is read."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, cast
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal import codecs
from kvwal.codecs import Codec, value_codec
from kvwal.codecs.compression import compression
from kvwal.engine.operations import decode_counter, encode_counter
from kvwal.errors import CodecError


class Struct(msgspec.Struct):
    id: int
    tags: list[str] = []


class Child(Struct):
    more: int = 0


@dataclass
class Data:
    when: datetime
    id: UUID
    names: dict[int, str] = field(default_factory=dict)
    rate: float | None = None


@attrs.define
class Attrs:
    name: str
    blob: bytes = b""


@attrs.define
class Hidden:
    name: str
    _balance: int = 0


@attrs.define
class OfHidden(Hidden):
    more: int = 0


@attrs.define
class Node:
    name: str
    next: Node | None = None
    others: list[Node] = attrs.field(factory=list)


class Text(StrEnum):
    A = "a"


@dataclass
class Nullable:
    n: float
    note: str | None = None


@dataclass
class Outer:
    inner: Struct


@dataclass
class Deep:
    others: dict[str, tuple[Deep, ...]]
    hidden: list[Hidden] | None = None


class HiddenStruct(msgspec.Struct):
    _x: int = 1


T = TypeVar("T")


@attrs.define
class HiddenBox(Generic[T]):
    _content: T


class Box(msgspec.Struct, Generic[T]):
    content: T


class Typed(TypedDict):
    name: str


class Named(NamedTuple):
    x: int
    y: float


class Unknown:
    pass


MOMENT = datetime(2030, 1, 1, 12, 30, tzinfo=UTC)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)

TYPED: list[tuple[Any, Any]] = [
    (Struct, Struct(1, ["a"])),
    (Data, Data(MOMENT, UUID(int=7), {1: "a", 2: "b"}, None)),
    (Attrs, Attrs("a", b"\0\xff")),
    (Typed, {"name": "a"}),
    (Named, Named(1, 2)),
    (list[Struct], [Struct(1), Struct(2)]),
    (dict[str, tuple[int, str]], {"a": (1, "b")}),
    (tuple[int, str], (1, "b")),
    (int | str, "a"),
    (float | None, 0.5),
    (Struct | None, None),
    (Box[int], Box(1)),
    (Sequence[int], [1, 2]),
]


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
@pytest.mark.parametrize(("kind", "value"), TYPED)
def test_a_value_of_a_type_comes_back_as_that_type(make: Callable[..., Codec[Any]], kind: Any, value: Any) -> None:
    codec = make(kind)
    back = codec.decode(codec.encode(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("spec", "value", "data"),
    [
        (bytes, b"\0\xff", b"\0\xff"),
        (str, "a\u00e9", b"a\xc3\xa9"),
        (int, -2, b"\xfe" + b"\xff" * 7),
        (float, 1.5, codecs.key_codec(float).encode(1.5)),
        (bool, True, codecs.key_codec(bool).encode(True)),
        (UUID, UUID(int=7), codecs.key_codec(UUID).encode(UUID(int=7))),
        (datetime, MOMENT, codecs.key_codec(datetime).encode(MOMENT)),
        (codecs.json(), {"b": [1, None], "a": "\u00e9"}, '{"a":"\u00e9","b":[1,null]}'.encode()),
        (codecs.msgpack(), {"b": b"\0", "a": 1}, b"\x82\xa1a\x01\xa1b\xc4\x01\0"),
        (Struct, Struct(1, ["a"]), b'{"id":1,"tags":["a"]}'),
        (codecs.int64, 1, codecs.int64.encode(1)),
    ],
)
def test_a_value_has_the_bytes_that_are_documented(spec: Any, value: Any, data: bytes) -> None:
    codec = value_codec(spec)
    assert codec.encode(value) == data
    assert codec.decode(data) == value


@given(INT64)
def test_a_counter_is_what_add_adds_to(number: int) -> None:
    assert codecs.counter.encode(number) == encode_counter(number)
    assert codecs.counter.decode(encode_counter(number)) == decode_counter(encode_counter(number)) == number


@given(JSON)
def test_what_json_has_comes_back_equal_and_has_one_text(value: Any) -> None:
    codec = codecs.json()
    data = codec.encode(value)
    assert codec.decode(data) == value
    assert codec.encode(codec.decode(data)) == data


@given(st.dictionaries(st.text(), INT64), st.randoms())
def test_equal_dicts_have_equal_bytes_in_whatever_order_they_were_filled(value: dict[str, int], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    for codec in (codecs.json(), codecs.msgpack(), codecs.json(dict[str, int]), codecs.msgpack(dict[str, int])):
        assert codec.encode(dict(items)) == codec.encode(value)


@given(st.dictionaries(INT64, st.binary()))
def test_msgpack_has_bytes_and_keys_that_are_no_str(value: dict[int, bytes]) -> None:
    codec = codecs.msgpack()
    assert codec.decode(codec.encode(value)) == value


READ_ANY: list[Codec[Any]] = [
    codecs.json(),
    codecs.msgpack(),
    codecs.json(Struct),
    codecs.msgpack(Data),
    codecs.counter,
    value_codec(str),
    codecs.compressed(codecs.json()),
    codecs.compressed(codecs.msgpack(Struct), method="zstd"),
    codecs.versioned(codecs.json(), version=3, upcasters={2: lambda value: value}),
]


@pytest.mark.parametrize("codec", READ_ANY, ids=lambda codec: codec.name)
@given(data=st.binary(max_size=20) | st.text('[]{}:,"0123e.-+ nulltrue\\ud8', max_size=12).map(str.encode))
def test_bytes_from_anywhere_are_read_or_refused_with_the_bytes_at_hand(codec: Codec[Any], data: bytes) -> None:
    for found in (data, b"\0" + data, b"\1" + data, b"\2" + data, b"\3" + data):
        try:
            codec.decode(found)
        except CodecError as error:
            assert (error.codec, error.data) == (codec.name, found)


INVALID: list[tuple[Any, bytes, str]] = [
    (str, b"\xff", "not UTF-8"),
    (int, b"1234567", "a counter has 8"),
    (int, b"123456789", "a counter has 8"),
    (codecs.json(), b"", "no JSON"),
    (codecs.json(), b"NaN", "NaN is not of JSON"),
    (codecs.json(), b"[-Infinity]", "-Infinity is not of JSON"),
    (codecs.json(), b"\xff\xfe1\0", "no JSON"),
    (codecs.json(), "1".encode("utf-16"), "no JSON"),
    (codecs.json(), b"[" * 200_000, "no JSON"),
    (codecs.json(), b"1" * 5_000, "no JSON"),
    (Struct, b'{"id":"1"}', "Expected `int`, got `str`"),
    (Struct, b"{}", "missing required field"),
    (codecs.json(list), b"[" * 200_000, "recursion|overflow"),
    (codecs.msgpack(), b"\x91" * 200_000, "recursion|overflow"),
    (codecs.msgpack(), b"\xdd\xff\xff\xff\xff", "truncated"),
    (codecs.msgpack(), b"", "truncated"),
    (codecs.msgpack(Struct), b"\x80", "missing required field"),
    (codecs.pickle(), b"", "no pickle that can be read here: EOFError"),
    (codecs.pickle(), b"cnothere\nname\n.", "ModuleNotFoundError"),
]


@pytest.mark.parametrize(("spec", "data", "text"), INVALID)
def test_bytes_that_do_not_fit_are_refused_with_the_reason(spec: Any, data: bytes, text: str) -> None:
    codec = value_codec(spec)
    with pytest.raises(CodecError, match=text) as caught:
        codec.decode(data)
    assert (caught.value.codec, caught.value.data) == (codec.name, data)


WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (bytes, "a", TypeError, "bytes, not str"),
    (str, b"a", TypeError, "str is expected, not bytes"),
    (int, "1", TypeError, "int is expected, not str"),
    (int, True, TypeError, "int is expected, not bool"),
    (int, 1 << 63, OverflowError, "64 bits of a counter"),
    (int, 10**5_000, OverflowError, "64 bits of a counter"),
    (codecs.json(), object(), TypeError, "not JSON serializable"),
    (codecs.json(), math.nan, ValueError, "not JSON compliant"),
    (codecs.json(), "\ud800", ValueError, "surrogates"),
    (codecs.json(Struct), Data(MOMENT, UUID(int=1)), TypeError, "Struct is expected, not Data"),
    (codecs.json(Struct), Child(1, ["a"], 2), TypeError, "Struct is expected, not Child"),
    (codecs.json(Struct | str), Child(1), TypeError, r"Struct \| str is expected, not Child"),
    (codecs.json(Struct), {"id": 1}, TypeError, "Struct is expected, not dict"),
    (codecs.json(Typed), Struct(1), TypeError, "Typed is expected, not Struct"),
    (codecs.json(list[Struct]), (Struct(1),), TypeError, r"list\[Struct\] is expected, not tuple"),
    (codecs.json(int | str), 1.5, TypeError, r"int \| str is expected, not float"),
    *((codecs.json(kind), True, TypeError, "is expected, not bool") for kind in (int, float, int | None, str | int)),
    (codecs.msgpack(int), False, TypeError, "int is expected, not bool: Expected `int`, got `bool`"),
    (codecs.msgpack(float | None), False, TypeError, "is expected, not bool"),
    (codecs.versioned(codecs.json(int), version=1), True, TypeError, "int is expected, not bool"),
    (codecs.compressed(codecs.json(int)), True, TypeError, "int is expected, not bool"),
    (codecs.json(date), MOMENT, TypeError, "date is expected, not datetime"),
    (codecs.msgpack(date | None), MOMENT, TypeError, "is expected, not datetime"),
    (codecs.json(float), 10**400, TypeError, "float is expected, not int: Number out of range"),
    (codecs.json(Sequence[int]), "ab", TypeError, r"Sequence\[int\] is expected, not str"),
    (codecs.json(Literal["a"]), "b", TypeError, "is expected, not str: Invalid enum value 'b'"),
    (codecs.json(Named), Named(1, math.nan), ValueError, "would not be read again: Expected `float`, got `null`"),
    (codecs.json(Nullable), Nullable(True), ValueError, "would not be read again: .* got `bool` - at `[$].n`$"),
    (codecs.json(Nullable), Nullable(math.nan), ValueError, "got `null` - at `[$].n`; JSON has no NaN$"),
    (codecs.json(list[Named]), [Named(1, math.inf)], ValueError, "Expected `float`, .*; JSON has no NaN$"),
    (codecs.json(Named), Named(cast(int, None), 1.0), ValueError, r"Expected `int`, got `null` - at `\$\[0\]`$"),
    (codecs.json(Named), Named(cast(int, None), math.nan), ValueError, r"Expected `int`, got `null` - at `\$\[0\]`$"),
    (float, math.nan, ValueError, "a float as key or value cannot be NaN"),
    (datetime, datetime(2030, 1, 1), ValueError, "a datetime as key or value has a time zone"),  # noqa: DTZ001
    (codecs.msgpack(), object(), TypeError, "unsupported"),
    (codecs.msgpack(), 1 << 70, OverflowError, "serialize ints"),
    (codecs.pickle(), lambda: None, Exception, "pickle"),
]


@pytest.mark.parametrize(("spec", "value", "kind", "text"), WRONG, ids=range(len(WRONG)))
def test_a_value_that_a_codec_does_not_store_is_refused(spec: Any, value: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        value_codec(spec).encode(value)


def test_the_error_of_a_counter_says_what_json_takes() -> None:
    limit = sys.get_int_max_str_digits()
    with pytest.raises(OverflowError, match=r"json\(\) takes larger ones, of as many digits as .*max_str_digits"):
        codecs.counter.encode(10**limit)
    largest = 10**limit - 1
    assert codecs.json().decode(codecs.json().encode(largest)) == largest
    with pytest.raises(ValueError, match="Exceeds the limit"):
        codecs.json().encode(10**limit)


@pytest.mark.parametrize("codec", [codecs.json(), codecs.json(list), codecs.msgpack()], ids=lambda codec: codec.name)
def test_a_value_that_holds_itself_is_refused(codec: Codec[Any]) -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="Circular|holds itself"):
        codec.encode(value)
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    # How deep a value may nest is the interpreter's matter: 3.14 has limits in bytes of stack.
    try:
        data = codec.encode(deep)
    except ValueError as error:
        assert "nested too deep" in str(error)
    else:
        assert len(data) > 100_000


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
def test_what_lies_in_a_value_is_not_looked_at_when_it_is_written(make: Any) -> None:
    """As docs/tables.md says."""
    cut = make(Outer)
    assert cut.decode(cut.encode(Outer(Child(1, ["a"], 2)))) == Outer(Struct(1, ["a"]))
    packed = make(Box[int])
    with pytest.raises(CodecError, match="Expected `int`, got `bool`"):
        packed.decode(packed.encode(Box(True)))


class Plain(Enum):
    A = "a"


class Number(IntEnum):
    ONE = 1


@pytest.mark.parametrize(
    "value",
    [
        Decimal("1.5"),
        Decimal("NaN"),
        UUID(int=1),
        {1, 2},
        frozenset([1]),
        MOMENT.replace(tzinfo=None),
        date(2030, 1, 1),
        timedelta(1),
        Struct(1),
        Attrs("a"),
        Outer(Struct(1)),
        Plain.A,
    ],
    ids=repr,
)
def test_msgpack_without_a_type_refuses_what_it_would_read_as_something_else(value: Any) -> None:
    codec = codecs.msgpack()
    for whole in (value, [1, value], (value,), {"a": [{"b": value}]}, {1: math.nan, 2: value}):
        with pytest.raises(TypeError, match=f"MessagePack has no {type(value).__name__}, and it would be read again"):
            codec.encode(whole)
        with pytest.raises(TypeError, match="MessagePack has no"):
            codecs.versioned(codecs.compressed(codec), version=1).encode(whole)
    if value.__hash__ is not None and not isinstance(value, Attrs | Struct | Outer):
        with pytest.raises(TypeError, match="would be read again as another key"):
            codec.encode({"a": {value: 1}})


@pytest.mark.parametrize(
    "value",
    [
        (1, "a", (2,)),
        {"a": (1, math.nan)},
        math.nan,
        {math.nan: 1},
        {(1, 2): [3]},
        {(1, math.nan): (1,)},
        bytearray(b"a"),
        pytest.param(memoryview(b"a"), id="memoryview"),
        Number.ONE,
        Text.A,
        [{Text.A: Number.ONE}],
        OrderedDict(b=1, a=2),
        defaultdict(list, a=[1]),
        Counter("aab"),
    ],
    ids=repr,
)
def test_msgpack_without_a_type_takes_what_comes_back_equal_and_tuples_as_lists(value: Any) -> None:
    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lists(part) for key, part in value.items()}
        return [lists(part) for part in value] if isinstance(value, list | tuple) else value

    codec = codecs.msgpack()
    assert repr(codec.decode(codec.encode(value))) == repr(lists(value)) or codec.decode(codec.encode(value)) == value
    assert codec.decode(codec.encode(MOMENT.astimezone(timezone(timedelta(hours=2))))) == MOMENT


class Autumn(tzinfo):
    """A zone whose clocks are put back by an hour at the first midnight of 2030, from two hours ahead of UTC."""

    def utcoffset(self, when: datetime | None) -> timedelta:
        assert when is not None
        turn = datetime(2030, 1, 1, tzinfo=self)
        return timedelta(hours=1 if when >= turn - timedelta(hours=when.fold) else 2)

    def dst(self, when: datetime | None) -> timedelta:
        return self.utcoffset(when) - timedelta(hours=1)


@pytest.mark.parametrize(("fold", "hour"), [(0, 21), (1, 22)])
def test_msgpack_without_a_type_takes_a_datetime_of_an_hour_that_a_clock_has_twice(fold: int, hour: int) -> None:
    when = datetime(2029, 12, 31, 23, 30, tzinfo=Autumn(), fold=fold)
    read = datetime(2029, 12, 31, hour, 30, tzinfo=UTC)
    codec = codecs.msgpack()
    assert codec.decode(codec.encode(when)) == read
    assert codec.decode(codec.encode([{"a": (when, 1)}])) == [{"a": [read, 1]}]
    assert codec.decode(codec.encode({when: 1})) == {read: 1}
    assert codec.decode(codec.encode({(1, (when, "a")): [when]})) == {(1, (read, "a")): [read]}
    with pytest.raises(TypeError, match="two keys of a dict are one in MessagePack"):
        codec.encode({"a": {(1, when): 1, (1, read): 2}})
    with pytest.raises(TypeError, match="two keys of a dict are one in MessagePack"):
        codec.encode({Plain.A: 1, "a": 1})


BEYOND = [
    datetime.min.replace(tzinfo=timezone(timedelta(hours=5))),
    datetime.max.replace(tzinfo=timezone(-timedelta(hours=5))),
]


@pytest.mark.parametrize("when", BEYOND, ids=["min", "max"])
def test_msgpack_refuses_a_datetime_that_utc_has_not(when: datetime) -> None:
    for codec, value in (
        (codecs.msgpack(), when),
        (codecs.msgpack(), {(1, when): 1}),
        (codecs.msgpack(datetime), when),
        (codecs.msgpack(list[datetime]), [when]),
    ):
        with pytest.raises(ValueError, match="in UTC, and there one in the value is not within the years 1 to 9999"):
            codec.encode(value)
    assert codecs.json(datetime).decode(codecs.json(datetime).encode(when)) == when


def test_floats_that_may_be_none_are_written_as_they_are() -> None:
    codec = codecs.json(Data)
    assert codec.decode(codec.encode(Data(MOMENT, UUID(int=1), rate=0.5))).rate == 0.5
    # What msgspec's JSON does: documented in docs/tables.md.
    assert codec.decode(codec.encode(Data(MOMENT, UUID(int=1), rate=math.nan))).rate is None
    packed = codecs.msgpack(Data)
    assert math.isnan(packed.decode(packed.encode(Data(MOMENT, UUID(int=1), rate=math.nan))).rate or 0)


@pytest.mark.parametrize("spec", [Unknown, "json", codecs.json, None, 5, SimpleNamespace(encode=1, decode=2)])
def test_what_is_neither_a_type_that_can_be_read_nor_a_codec_is_refused(spec: Any) -> None:
    with pytest.raises(TypeError, match="type"):
        value_codec(spec)


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
@pytest.mark.parametrize(
    "kind",
    [
        Hidden,
        OfHidden,
        Hidden | None,
        int | list[Hidden],
        list[Hidden],
        dict[str, Hidden],
        tuple[int, Hidden],
        tuple[Hidden, ...],
        Box[Hidden],
        Deep,
        list[Deep] | None,
    ],
)
def test_an_attrs_class_with_an_attribute_that_would_be_left_out_is_refused(make: Any, kind: Any) -> None:
    with pytest.raises(TypeError, match="Hidden has the attribute _balance, .* name it without one"):
        make(kind)


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
def test_of_an_attrs_class_only_what_begins_with_an_underscore_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=r"HiddenBox\[int\] has the attribute _content"):
        make(HiddenBox[int])
    for kind, value in ((Node, Node("a", Node("b"), [Node("c")])), (HiddenStruct, HiddenStruct(5))):
        assert make(kind).decode(make(kind).encode(value)) == value


def test_a_codec_is_taken_as_it_is_and_a_key_codec_has_values_too() -> None:
    for codec in (codecs.json(), codecs.int64, codecs.key_codec(tuple[str, int])):
        assert value_codec(codec) is codec


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (bytes, "bytes"),
        (str, "str"),
        (int, "counter"),
        (float, "float"),
        (Struct, "json[Struct]"),
        (codecs.json(), "json"),
        (codecs.json(Struct, name="customer"), "json[customer]"),
        (codecs.json(Struct | None), "json[Struct | None]"),
        (codecs.json(dict[str, list[Data]]), "json[dict[str, list[Data]]]"),
        (codecs.msgpack(), "msgpack"),
        (codecs.msgpack(Data), "msgpack[Data]"),
        (codecs.pickle(), "pickle"),
        (codecs.compressed(codecs.json(Struct)), "zlib(json[Struct])"),
        (codecs.compressed(codecs.pickle(), method="zstd"), "zstd(pickle)"),
        (codecs.versioned(Struct, version=2, upcasters={1: dict}), "versioned(json[Struct])"),
    ],
)
def test_a_codec_says_in_its_name_what_bytes_it_makes(spec: Any, name: str) -> None:
    assert value_codec(spec).name == name


def test_an_int_is_taken_where_a_float_is_expected() -> None:
    """As type checkers take it."""
    codec = codecs.json(float)
    assert codec.decode(codec.encode(1)) == 1.0


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
@pytest.mark.parametrize("kind", [Any, int | Any, list[Any] | bool | int | None | dict[str, Any]])
def test_a_type_that_has_bools_takes_them_and_any_takes_whatever_the_format_has(make: Any, kind: Any) -> None:
    codec = make(kind)
    for value in (True, 1, None, [1, {"a": None}], {"a": False}):
        back = codec.decode(codec.encode(value))
        assert (back, type(back)) == (value, type(value))
    assert value_codec(Any).name == "json[Any]"


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
def test_a_value_of_a_subclass_is_taken_where_it_is_read_as_an_equal_one(make: Any) -> None:
    for kind, value in (
        (int, HTTPStatus.OK),
        (str, StrEnum("Enum", ["A"]).A),  # type: ignore[attr-defined]  # made at run time
        (dict[str, int], Counter("aab")),
        (tuple[int, float], Named(1, 2.0)),
        (Literal["a", "b"], "b"),
        (date, date(2030, 1, 1)),
    ):
        codec = make(kind)
        assert codec.decode(codec.encode(value)) == value


def test_pickles_have_values_of_any_class() -> None:
    codec = codecs.pickle()
    value = {1: (2, {3}), "when": MOMENT}
    assert codec.decode(codec.encode(value)) == value
    assert codec.encode(value)[:2] == b"\x80\x05"


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_value_is_compressed_where_that_makes_it_shorter(method: Any) -> None:
    codec = codecs.compressed(codecs.json(), method=method)
    for value, tag in (("a" * 1000, 1), ("a", 0), ("", 0)):
        data = codec.encode(value)
        assert (data[0], codec.decode(data)) == (tag, value)
        assert len(data) <= len(codecs.json().encode(value)) + 1
    assert len(codec.encode("a" * 1000)) < 50


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_stream_that_is_not_one_and_whole_is_refused(method: Any) -> None:
    codec = codecs.compressed(bytes_codec := value_codec(bytes), method=method)
    data = codec.encode(b"a" * 1000)
    assert data[0] == 1
    for wrong in (b"", b"\2" + data[1:], data[:-1], data + b"a", data + data[1:], b"\1", b"\1aaaaaaaaaaaaaaaa"):
        with pytest.raises(CodecError) as caught:
            codec.decode(wrong)
        assert (caught.value.codec, caught.value.data) == (codec.name, wrong)
    other = codecs.compressed(codecs.json(), method=method)
    with pytest.raises(CodecError, match="no JSON") as caught:
        other.decode(data)
    assert (caught.value.codec, caught.value.data) == (other.name, data)
    assert bytes_codec.decode(b"a") == b"a"


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_what_is_decompressed_has_a_limit_whatever_the_bytes_say(method: str) -> None:
    compress, decompress = compression(method, None, most=1000)
    assert decompress(memoryview(compress(b"a" * 1000))) == b"a" * 1000
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        decompress(memoryview(compress(b"a" * 1001)))
    bomb = memoryview(compress(b"\0" * (64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            decompress(bomb)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_methods_and_levels_are_checked_when_the_codec_is_made() -> None:
    assert len(codecs.compressed(codecs.json(), level=0).encode("a" * 1000)) == 1003
    for method, level in (("zlib", 10), ("zlib", -2), ("zstd", 100)):
        with pytest.raises(ValueError, match=f"{method} has no level {level}"):
            codecs.compressed(codecs.json(), method=method, level=level)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no method"):
        codecs.compressed(codecs.json(), method="lzma")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="versions are told before"):
        codecs.compressed(codecs.versioned(codecs.json(), version=1))


def test_codecs_are_imported_without_what_is_optional() -> None:
    program = (
        "import sys; sys.modules['msgspec'] = sys.modules['backports'] = None; from kvwal import codecs; codecs.json()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("make", [codecs.msgpack, lambda: codecs.json(Struct), lambda: value_codec(Struct)])
def test_without_msgspec_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ImportError, match=r"pip install 'kvwal\[msgspec\]'"):
        make()
    codecs.json().encode({"a": 1})


def test_without_zstd_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    with pytest.raises(ImportError, match=r"pip install backports\.zstd"):
        codecs.compressed(codecs.json(), method="zstd")
    codecs.compressed(codecs.json())


def test_zlib_streams_are_of_zlib() -> None:
    data = codecs.compressed(value_codec(bytes)).encode(b"a" * 1000)
    assert zlib.decompress(data[1:]) == b"a" * 1000
    assert struct.unpack_from(">B", data)[0] == 1
