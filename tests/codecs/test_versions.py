"""Versions of values: chains are checked when they are made, and old bytes are read as the newest version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

import kvwal
from kvwal import codecs
from kvwal.codecs import Codec, versioned
from kvwal.codecs.versions import MAX_VERSION
from kvwal.errors import CodecError
from kvwal.testing import SimulatedDisk


@dataclass
class User:
    """Version 1 had `name`, version 2 `first` and `last`, and this is version 3."""

    first: str
    last: str
    active: bool


def split(old: dict[str, Any]) -> dict[str, Any]:
    first, _, last = old.pop("name").partition(" ")
    return old | {"first": first, "last": last}


def activate(old: dict[str, Any]) -> dict[str, Any]:
    return old | {"active": True}


ADA = User("Ada", "Lovelace", True)
UPCASTERS = {1: split, 2: activate}
BASES: list[Codec[User]] = [
    codecs.json(User),
    codecs.msgpack(User),
    codecs.compressed(codecs.json(User)),
    codecs.compressed(codecs.msgpack(User), method="zstd"),
]


def plain_of(codec: Codec[Any]) -> Codec[Any]:
    """The codec that wrote a former type: that type is gone, its bytes are not."""
    made: Codec[Any] = codecs.msgpack() if "msgpack" in codec.name else codecs.json()
    if codec.name.startswith("zlib"):
        return codecs.compressed(made)
    return codecs.compressed(made, method="zstd") if codec.name.startswith("zstd") else made


@pytest.mark.parametrize("base", BASES, ids=lambda codec: codec.name)
def test_values_of_each_version_are_read_as_the_newest(base: Codec[User]) -> None:
    codec = versioned(base, version=3, upcasters=UPCASTERS)
    plain = plain_of(base)
    first = b"\1" + plain.encode({"name": "Ada Lovelace"})
    second = b"\2" + plain.encode({"first": "Ada", "last": "Lovelace"})
    newest = codec.encode(ADA)
    assert newest == b"\3" + base.encode(ADA)
    assert [codec.version_of(data) for data in (first, second, newest)] == [1, 2, 3]
    for data in (first, second, newest):
        assert codec.decode(data) == ADA
        assert codec.upcast(data) == newest
    assert codec.upcast(newest) is newest


@dataclass
class Counts:
    by_year: dict[int, datetime]


@pytest.mark.parametrize("make", [codecs.json, codecs.msgpack])
def test_what_is_brought_up_becomes_its_type_as_what_is_read_does(
    make: Callable[[type[Counts]], Codec[Counts]],
) -> None:
    """JSON has neither keys that are ints nor datetimes."""
    counts = Counts({1969: datetime(1969, 7, 20, tzinfo=UTC)})
    base = make(Counts)
    codec = versioned(base, version=2, upcasters={1: lambda old: old})
    assert codec.decode(b"\1" + base.encode(counts)) == counts


def test_a_codec_without_a_type_hands_its_values_to_the_upcasters() -> None:
    codec = versioned(str, version=2, upcasters={1: str.upper})
    assert codec.decode(b"\1abc") == "ABC"
    assert codec.decode(b"\2abc") == "abc"


def test_a_chain_may_begin_with_any_version_and_be_empty() -> None:
    codec = versioned(str, version=3, upcasters={2: str.upper})
    assert (codec.oldest, codec.version, codec.name) == (2, 3, "versioned(str)")
    with pytest.raises(CodecError, match="they are of version 1, and upcasters begin with 2"):
        codec.decode(b"\1abc")
    alone = versioned(str, version=3)
    assert (alone.oldest, alone.decode(b"\3abc")) == (3, "abc")
    with pytest.raises(CodecError, match="they are of version 2, and upcasters begin with 3"):
        alone.decode(b"\2abc")


def test_the_first_version_needs_no_upcaster() -> None:
    codec = versioned(str, version=1)
    assert codec.decode(codec.encode("abc")) == "abc"


@pytest.mark.parametrize(
    ("version", "upcasters"),
    [
        (4, {1: split, 3: split}),
        (4, {1: split, 2: split}),
        (3, {1: split}),
        (2, {1: split, 2: split}),
        (2, {2: split}),
        (1, {1: split}),
        (2, {3: split}),
        (0, {}),
        (MAX_VERSION + 1, {}),
        (2, {0: split, 1: split}),
    ],
)
def test_a_chain_with_a_hole_or_beyond_its_end_is_refused_when_it_is_made(version: int, upcasters: Any) -> None:
    with pytest.raises(ValueError, match="version|upcaster"):
        versioned(codecs.json(), version=version, upcasters=upcasters)


@pytest.mark.parametrize(("version", "upcasters"), [(2, {1: "split"}), (2, {"1": split}), (True, {}), ("2", {})])
def test_a_chain_is_of_functions_by_int(version: Any, upcasters: Any) -> None:
    with pytest.raises(TypeError):
        versioned(codecs.json(), version=version, upcasters=upcasters)


def test_versions_are_told_once() -> None:
    with pytest.raises(TypeError, match="has versions already"):
        versioned(versioned(str, version=1), version=2, upcasters={1: str.upper})


class Text:
    """A codec of a program, whose versions are two encodings."""

    name = "text"

    def __init__(self, version: int) -> None:
        self.version = version

    def encode(self, value: str) -> bytes:
        return value.encode("latin-1" if self.version == 1 else "utf-16-le")

    def decode(self, data: bytes) -> str:
        return data.decode("latin-1" if self.version == 1 else "utf-16-le")


def within(codec: Codec[str]) -> list[Codec[str]]:
    packed = codecs.compressed(codec)
    return [packed, versioned(codec, version=1), versioned(packed, version=3, upcasters={2: str})]


def test_a_codec_around_another_says_which_version_that_one_has() -> None:
    assert [(each.name, each.version) for each in within(Text(1))] == [
        ("zlib(text)", 1),
        ("versioned(text)", 1),
        ("versioned(zlib(text))", 3),
    ]
    assert [(each.name, each.version) for each in within(Text(2))] == [
        ("zlib(text)", 2),
        ("versioned(text@2)", 1),
        ("versioned(zlib(text)@2)", 3),
    ]


@pytest.mark.parametrize("which", range(3))
def test_a_table_refuses_another_version_of_the_codec_inside(which: int) -> None:
    with kvwal.open("/kv", files=SimulatedDisk()) as db:
        db.table("t", str, within(Text(1))[which])["k"] = "abcd"
        assert db.table("t", str, within(Text(1))[which])["k"] == "abcd"
        with pytest.raises(kvwal.TableCodecError):
            db.table("t", str, within(Text(2))[which]).get("k")


def test_a_chain_that_is_changed_afterwards_is_the_one_that_was_checked() -> None:
    upcasters = {1: str.upper}
    codec = versioned(str, version=2, upcasters=upcasters)
    upcasters.clear()
    assert codec.decode(b"\1abc") == "ABC"


def test_the_newest_version_has_a_limit() -> None:
    codec = versioned(str, version=MAX_VERSION)
    assert codec.decode(codec.encode("a")) == "a"


def test_a_newer_version_is_refused_with_both_numbers_and_its_bytes() -> None:
    codec = versioned(User, version=3, upcasters=UPCASTERS)
    data = b"\4{}"
    for read in (codec.decode, codec.upcast, codec.version_of):
        with pytest.raises(CodecError, match="they are of version 4, and 3 is the newest that is known here") as caught:
            read(data)
        assert caught.value.data is data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "they are of version 0"),
        (b"\0{}", "they are of version 0"),
        (b"\3{}", "missing required field"),
        (b"\3{", "truncated"),
        (b"\1{", "no JSON"),
        (b"\1{}", "the upcaster of version 1 failed: KeyError"),
        (b"\1[]", "the upcaster of version 1 failed: AttributeError|TypeError"),
        (b'\2{"first":1,"last":"a"}', "version 2, brought up: Expected `str`, got `int`"),
    ],
)
def test_bytes_that_cannot_be_brought_up_are_refused_and_can_be_had(data: bytes, text: str) -> None:
    codec = versioned(User, version=3, upcasters=UPCASTERS)
    with pytest.raises(CodecError, match=text) as caught:
        codec.decode(data)
    assert (caught.value.data, caught.value.codec) == (data, "versioned(json[User])")
    if data[:1] not in (b"", b"\0"):
        assert caught.value.__cause__ is not None
