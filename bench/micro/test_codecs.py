"""Codecs of keys. Names say what one round does."""

from __future__ import annotations

from typing import Any

import pytest

from kvwal.codecs import int64, key_codec

KEYS: list[tuple[str, Any, Any]] = [
    ("str", key_codec(str), "user:12345"),
    ("int", key_codec(int), 123_456),
    ("int64", int64, 123_456),
    ("pair", key_codec(tuple[str, int]), ("user:12345", 123_456)),
    ("triple", key_codec(tuple[str, int, str]), ("user:12345", 123_456, "a")),
]


@pytest.mark.parametrize(("codec", "value"), [row[1:] for row in KEYS], ids=[row[0] for row in KEYS])
def test_encode(benchmark: Any, codec: Any, value: Any) -> None:
    assert benchmark(codec.encode, value)


@pytest.mark.parametrize(("codec", "value"), [row[1:] for row in KEYS], ids=[row[0] for row in KEYS])
def test_decode(benchmark: Any, codec: Any, value: Any) -> None:
    assert benchmark(codec.decode, codec.encode(value)) == value
