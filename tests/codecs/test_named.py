"""Codecs by name: those of the package are found, and no name does any harm."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal import codecs
from kvwal.codecs import Codec, Float32, Versionstamp, key_codec
from kvwal.codecs.named import MAX_NAME, key_codec_named, reader_named
from kvwal.codecs.tuples import MAX_DEPTH

KEYS: list[tuple[Any, Any]] = [
    (str, "a"),
    (bytes, b"\0"),
    (int, -7),
    (codecs.int64, -7),
    (float, 0.5),
    (bool, True),
    (UUID, UUID(int=7)),
    (datetime, datetime(2030, 1, 1, tzinfo=UTC)),
    (tuple[()], ()),
    (tuple[str], ("a",)),
    (tuple[str, int], ("a", 1)),
    (tuple[str, ...], ("a", "b")),
    (tuple[None | int | str, tuple[UUID, Float32] | bytes, Versionstamp], (None, b"", Versionstamp(1, 2))),  # noqa: RUF036
    (tuple[tuple[()], datetime, bool], ((), datetime(2030, 1, 1, tzinfo=UTC), False)),
]


@pytest.mark.parametrize(("spec", "value"), KEYS)
def test_a_key_codec_is_found_by_its_name(spec: Any, value: Any) -> None:
    codec = key_codec(spec)
    found = key_codec_named(codec.name)
    assert found is not None
    assert (found.name, found.version, found.ordered) == (codec.name, codec.version, True)
    assert found.encode(value) == codec.encode(value)
    assert found.decode(codec.encode(value)) == value
    read = reader_named(codec.name)
    assert read is not None
    assert read(codec.encode(value)) == value


@dataclass
class User:
    name: str


VALUES: list[tuple[Codec[Any], Any, Any]] = [
    (codecs.value_codec(str), "a", "a"),
    (codecs.value_codec(int), 7, 7),
    (codecs.json(), [1], [1]),
    (codecs.json(User), User("a"), {"name": "a"}),
    (codecs.msgpack(), b"\0", b"\0"),
    (codecs.msgpack(dict[str, list[User]]), {"a": [User("b")]}, {"a": [{"name": "b"}]}),
    (codecs.compressed(codecs.json(User)), User("a" * 100), {"name": "a" * 100}),
    (codecs.compressed(codecs.json(), method="zstd"), "a" * 100, "a" * 100),
    (codecs.versioned(codecs.compressed(codecs.msgpack(User)), version=3), User("a"), {"name": "a"}),
]


@pytest.mark.parametrize(("codec", "value", "shown"), VALUES, ids=[row[0].name for row in VALUES])
def test_values_are_read_without_their_types(codec: Codec[Any], value: Any, shown: Any) -> None:
    read = reader_named(codec.name)
    assert read is not None
    assert read(codec.encode(value)) == shown


DEEP = "tuple[" * (MAX_DEPTH + 1) + "int" + "]" * (MAX_DEPTH + 1)
NONE = [
    "",
    "pickle",
    "zlib(pickle)",
    "versioned(pickle)",
    "mine",
    "tuple",
    "tuple[",
    "tuple[str, int] ",
    "tuple[str,int]",
    "tuple[int | None]",
    "tuple[list]",
    "tuple[str][int]",
    "list[str]",
    "tuple[__import__('os')]",
    "tuple[1]",
    "str.encode",
    "str | int",
    "Versionstamp",
    "None",
    "...",
    "json[",
    "json()",
    "zlib()",
    "zlib(json",
    "a\0b",
    f"tuple[{DEEP}]",
    "(" * 4_000,
    "tuple[" * 600,
    "tuple[" + "str | " * 600 + "str]",
    "tuple[" + "str|" * 1_000 + "str]",
    "-" * 4_000,
    "zlib(" * 5 + "json" + ")" * 5,
    "versioned(" * 400 + "json" + ")" * 400,
    "json[" + "a" * MAX_NAME + "]",
]


@pytest.mark.parametrize("name", NONE, ids=range(len(NONE)))
def test_what_is_no_name_of_a_codec_here_gives_none(name: str) -> None:
    assert reader_named(name) is None
    assert key_codec_named(name) is None


@given(st.text() | st.text("tuple[]str|int, ...None()zlibjson", max_size=30))
def test_any_text_may_be_a_name(name: str) -> None:
    found = key_codec_named(name)
    assert found is None or found.name == name
    reader_named(name)


def test_the_longest_name_and_the_deepest_are_found() -> None:
    assert key_codec_named(DEEP) is not None
    longest, longer = (f"tuple[{', '.join(['str'] * count)}]" for count in (818, 819))
    assert len(longest) <= MAX_NAME < len(longer)
    assert key_codec_named(longest) is not None
    assert key_codec_named(longer) is None
    assert reader_named("zlib(" * 4 + "json" + ")" * 4) is not None
    assert reader_named("json[" + "a" * (MAX_NAME - 6) + "]") is not None


def test_no_name_makes_a_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert key_codec_named("tuple['\\d']") is None
    assert not caught


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ImportError, match="kvwal"):
        reader_named("msgpack[User]")
    assert reader_named("json[User]") is not None
