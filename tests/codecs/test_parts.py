"""Parts of tuples: the bytes that FoundationDB publishes for them, and every byte string that is not one."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from kvwal.codecs import SEQNO, Float32, Versionstamp, pack, unpack
from kvwal.codecs.parts import KINDS
from kvwal.errors import CodecError


def single(bits: int) -> Float32:
    return Float32(struct.unpack(">f", bits.to_bytes(4, "big"))[0])


def double(bits: int) -> float:
    return float(struct.unpack(">d", bits.to_bytes(8, "big"))[0])


# From design/tuple.md of FoundationDB 7, and from the tests of its bindings for Java.
PUBLISHED: list[tuple[tuple[Any, ...], str]] = [
    ((b"foo\x00bar",), "01 66 6f 6f 00 ff 62 61 72 00"),
    (("F\u00d4O\u0000bar",), "02 46 c3 94 4f 00 ff 62 61 72 00"),
    (((b"foo\x00bar", None, ()),), "05 01 66 6f 6f 00 ff 62 61 72 00 00 ff 05 00 00"),
    ((-5551212,), "11 ab 4b 93"),
    ((Float32(-42.0),), "20 3d d7 ff ff"),
    ((0,), "14"),
    ((1,), "15 01"),
    ((-1,), "13 fe"),
    ((255,), "15 ff"),
    ((-255,), "13 00"),
    ((256,), "16 01 00"),
    ((-256,), "12 fe ff"),
    ((65536,), "17 01 00 00"),
    ((-65536,), "11 fe ff ff"),
    (((1 << 63) - 1,), "1c 7f ff ff ff ff ff ff ff"),
    ((1 << 63,), "1c 80 00 00 00 00 00 00 00"),
    (((1 << 64) - 1,), "1c ff ff ff ff ff ff ff ff"),
    ((1 << 64,), "1d 09 01 00 00 00 00 00 00 00 00"),
    ((1 - (1 << 32),), "10 00 00 00 00"),
    ((2 - (1 << 63),), "0c 80 00 00 00 00 00 00 01"),
    ((1 - (1 << 63),), "0c 80 00 00 00 00 00 00 00"),
    ((-(1 << 63),), "0c 7f ff ff ff ff ff ff ff"),
    ((-(1 << 63) - 1,), "0c 7f ff ff ff ff ff ff fe"),
    ((1 - (1 << 64),), "0c 00 00 00 00 00 00 00 00"),
    ((Float32(3.14),), "20 c0 48 f5 c3"),
    ((Float32(-3.14),), "20 3f b7 0a 3c"),
    ((3.14,), "21 c0 09 1e b8 51 eb 85 1f"),
    ((-3.14,), "21 3f f6 e1 47 ae 14 7a e0"),
    ((Float32(0.0),), "20 80 00 00 00"),
    ((Float32(-0.0),), "20 7f ff ff ff"),
    ((0.0,), "21 80 00 00 00 00 00 00 00"),
    ((-0.0,), "21 7f ff ff ff ff ff ff ff"),
    ((Float32("inf"),), "20 ff 80 00 00"),
    ((Float32("-inf"),), "20 00 7f ff ff"),
    ((float("inf"),), "21 ff f0 00 00 00 00 00 00"),
    ((float("-inf"),), "21 00 0f ff ff ff ff ff ff"),
    ((single(0x7FFF_FFFF),), "20 ff ff ff ff"),
    ((double(0x7FFF_FFFF_FFFF_FFFF),), "21 ff ff ff ff ff ff ff ff"),
    ((single(0xFFFF_FFFF),), "20 00 00 00 00"),
    ((double(0xFFFF_FFFF_FFFF_FFFF),), "21 00 00 00 00 00 00 00 00"),
    (("",), "02 00"),
    (("hello",), "02 68 65 6c 6c 6f 00"),
    (("\u4e2d\u6587",), "02 e4 b8 ad e6 96 87 00"),
    (("\u03bc\u03ac\u03b8\u03b7\u03bc\u03b1",), "02 ce bc ce ac ce b8 ce b7 ce bc ce b1 00"),
    (("\U0001f525",), "02 f0 9f 94 a5 00"),
    (("\U0001f96f",), "02 f0 9f a5 af 00"),
    # In prose: null, false, true, a UUID and a versionstamp in network byte order, an int of 9 bytes below 0.
    ((None,), "00"),
    ((False,), "26"),
    ((True,), "27"),
    ((UUID("00112233-4455-6677-8899-aabbccddeeff"),), "30 00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff"),
    ((Versionstamp(0x0102030405060708, 0x090A0B0C),), "33 01 02 03 04 05 06 07 08 09 0a 0b 0c"),
    ((-(1 << 64),), "0b f6 fe ff ff ff ff ff ff ff ff"),
    # kvwal's own: what FoundationDB leaves open.
    ((datetime(1970, 1, 1, tzinfo=UTC),), "40 80 00 00 00 00 00 00 00"),
    ((datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),), "40 7f ff ff ff ff ff ff ff"),
    ((1 << 2040,), "1e 01 00 01" + " 00" * 255),
    ((-(1 << 2040),), "0a fe ff fe" + " ff" * 255),
]


@pytest.mark.parametrize(("values", "published"), PUBLISHED, ids=lambda it: it[:40] if isinstance(it, str) else "")
def test_a_tuple_has_the_bytes_that_are_published_for_it(values: tuple[Any, ...], published: str) -> None:
    data = bytes.fromhex(published)
    assert pack(values) == data
    back = unpack(data)
    assert list(map(type, back)) == list(map(type, values))
    assert pack(back) == data


def test_every_code_is_in_a_published_tuple() -> None:
    codes = {code for kind in KINDS.values() for code in kind.decoders} | {0x05}
    begins = {bytes.fromhex(published)[0] for _, published in PUBLISHED}
    # Ints of 3 to 7 bytes are in the tests of properties.
    assert codes - begins == {0x0D, 0x0E, 0x0F, 0x19, 0x1A, 0x1B, 0x18}


# The table of kvwal/codecs/parts.py says what is valid; this is what is not, with why.
INVALID = {
    "a code that is none": "03",
    "the code that is never given": "ff",
    "bytes without an end": "01 61",
    "bytes that end in an escape": "01 61 00 ff",
    "bytes with an escape and no end": "01 61 00 ff 62",
    "str that is not UTF-8": "02 ff 00",
    "str with a surrogate": "02 ed a0 80 00",
    "str in more bytes than it needs": "02 c0 80 00",
    "an int that is cut off": "16 01",
    "an int of nothing": "15",
    "an int that begins with 00": "16 00 01",
    "a negative int that begins with ff": "12 ff fe",
    "a negative int that is cut off": "12 fe",
    "a 0 of one byte": "15 00",
    "a -0 of one byte": "13 ff",
    "a long int without a length": "1d",
    "a long int of 8 bytes": "1d 08 01 00 00 00 00 00 00 00",
    "a long int that begins with 00": "1d 09 00 01 00 00 00 00 00 00 00",
    "a long int that is cut off": "1d 09 01 00 00 00 00 00 00 00",
    "a long negative int of 8 bytes": "0b f7 fe ff ff ff ff ff ff ff",
    "a long negative int that begins with ff": "0b f6 ff fe ff ff ff ff ff ff ff",
    "a long negative int that is cut off": "0b f6 fe ff ff ff ff ff ff ff",
    "a longer int of 255 bytes": "1e 00 ff 01" + "00" * 254,
    "a longer int that is cut off": "1e 01 00 01" + "00" * 254,
    "a longer int without a whole length": "1e 01",
    "a longer negative int of 255 bytes": "0a ff 00 fe" + "ff" * 254,
    "a float that is cut off": "21 80 00 00 00 00 00 00",
    "a float of 32 bits that is cut off": "20 80 00 00",
    "a float of 32 bits of nothing": "20",
    "a UUID that is cut off": "30" + "11" * 15,
    "a versionstamp that is cut off": "33" + "11" * 11,
    "a versionstamp that no commit filled in": "33" + "ff" * 12,
    "a datetime that is cut off": "40 80 00 00 00 00 00 00",
    "a datetime before the year 1": "40 00 00 00 00 00 00 00 00",
    "a datetime after the year 9999": "40 ff ff ff ff ff ff ff ff",
    "a nested tuple without an end": "05 14",
    "a nested tuple of nothing": "05",
    "a nested tuple that ends in a None": "05 00 ff",
    "a nested tuple with a code that is none": "05 03 00",
    "a part behind a nested tuple that is none": "05 00 03",
}


@pytest.mark.parametrize("name", INVALID)
def test_bytes_that_are_no_tuple_are_refused_and_can_be_had(name: str) -> None:
    data = bytes.fromhex(INVALID[name])
    with pytest.raises(CodecError) as caught:
        unpack(data)
    assert caught.value.data == data
    assert caught.value.codec == "tuple"
    assert ("cut off" in caught.value.reason) >= ("cut off" in name or "without an end" in name)


@pytest.mark.parametrize("cut", range(1, 9))
def test_the_last_moments_of_a_datetime_are_the_limits_of_its_type(cut: int) -> None:
    for value in (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)):
        data = pack((value,))
        assert unpack(data) == (value,)
        beyond = int.from_bytes(data, "big") + (1 if value.year == 9999 else -1)
        for wrong in (data[:cut], beyond.to_bytes(9, "big")):
            with pytest.raises(CodecError):
                unpack(wrong)


def test_a_nan_that_signals_is_itself_or_refused() -> None:
    """Up to CPython 3.13 a NaN of 32 bits loses its signal when it becomes a float of Python."""
    for published in ("20 ff 80 00 01", "21 ff f0 00 00 00 00 00 01"):
        data = bytes.fromhex(published)
        try:
            values = unpack(data)
        except CodecError:
            continue
        assert pack(values) == data


def test_an_int_may_have_as_many_bytes_as_a_key_and_no_more() -> None:
    largest = (1 << 8 * 65_535) - 1
    assert unpack(pack((largest, -largest))) == (largest, -largest)
    for value in (largest + 1, -largest - 1):
        with pytest.raises(ValueError, match="65536 bytes"):
            pack((value,))


def test_a_float32_is_the_nearest_that_32_bits_hold() -> None:
    assert Float32(0.1) != 0.1
    assert Float32(Float32(0.1)) == Float32(0.1) == pytest.approx(0.1)
    with pytest.raises(OverflowError):
        Float32(1e39)


def test_a_versionstamp_has_the_limits_of_its_bytes() -> None:
    # What stands for a key that a commit is to fill in cannot be made by hand.
    for seqno, ordinal in ((-1, 0), ((1 << 64) - 1, 0), ((1 << 64) - 1, (1 << 32) - 1), (0, -1), (0, 1 << 32)):
        with pytest.raises(ValueError, match="at least 0 and at most"):
            Versionstamp(seqno, ordinal)
    assert Versionstamp((1 << 64) - 2, (1 << 32) - 1) != SEQNO
    assert Versionstamp(1, 9) < Versionstamp(2, 0) < SEQNO


def test_seqno_is_not_packed_as_a_versionstamp() -> None:
    with pytest.raises(TypeError, match="the last part of a key to put"):
        pack((SEQNO,))
