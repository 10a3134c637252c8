"""Parts of tuples as bytes, each with a code before it: the tuple layer of FoundationDB.

On disk: never change.

| code | part | what follows |
|---|---|---|
| 00 | None | nothing; inside a nested tuple ff |
| 01 | bytes | each 00 as 00 ff, then 00 |
| 02 | str | UTF-8, written as bytes are |
| 05 | a nested tuple | its parts, then 00 |
| 0a | int of 256 to 65,535 bytes, below 0 | as 1e, each bit inverted |
| 0b | int of 9 to 255 bytes, below 0 | as 1d, each bit inverted |
| 0c to 13 | int of 8 to 1 bytes, below 0 | as 1c to 15, each bit inverted |
| 14 | 0 | nothing |
| 15 to 1c | int of 1 to 8 bytes | big-endian, the first byte not 00 |
| 1d | int of 9 to 255 bytes | its length in 1 byte, then as before |
| 1e | int of 256 to 65,535 bytes | its length in 2 bytes, then as before |
| 20 | float of 32 bits | big-endian; below 0 each bit is inverted, else the first |
| 21 | float of 64 bits | the same |
| 26, 27 | False, True | nothing |
| 30 | UUID | its 16 bytes |
| 33 | versionstamp | seqno in 8 bytes, ordinal in 4, big-endian |
| 40 | datetime | microseconds since 1970 in UTC, in 8 bytes, big-endian, the first bit inverted |

FoundationDB reserves 0a and 1e and leaves 40 to its users; all others are its own. What bytes are valid: each code is
in the table, each part is whole, no int begins with a byte that it does not need, UTF-8 is strict, and a datetime is of
the years 1 to 9999.

An encoder is given a value of exactly its type. A decoder is given the bytes and the offset after the code, and returns
the part and the offset after that; it raises ValueError, IndexError, KeyError or struct.error for bytes that are not
valid, of which `whole` makes CodecError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from struct import Struct
from struct import error as struct_error
from types import NoneType
from typing import Any, Final, NamedTuple, TypeAlias
from uuid import UUID

from kvwal.errors import CodecError
from kvwal.keys import PENDING_SEQNO, STAMP, as_int

__all__ = [
    "INNER_NONE",
    "KINDS",
    "SEQNO",
    "Decoder",
    "Encoder",
    "Float32",
    "Kind",
    "Versionstamp",
    "whole",
]

Encoder: TypeAlias = Callable[[Any], bytes]
Decoder: TypeAlias = Callable[[bytes, int], tuple[Any, int]]

_SIGN: Final = 1 << 63
_ALL: Final = (1 << 64) - 1
_U64: Final = Struct(">Q")
_DOUBLE: Final = Struct(">d")
_SINGLE: Final = Struct(">f")
_MOST_ORDINAL: Final = (1 << 32) - 1

_CUT: Final = "a part is cut off"


class Float32(float):
    """A float as 32 bits can hold it: the nearest one to what it is made of."""

    __slots__ = ()

    def __new__(cls, value: float) -> Float32:
        return super().__new__(cls, _SINGLE.unpack(_SINGLE.pack(float(value)))[0])


@dataclass(frozen=True, order=True, slots=True)
class Versionstamp:
    """Where a key was written: unique in a store, and ascending in the order of commits.

    Attributes:
        seqno: of the commit; below 2^64 - 1.
        ordinal: of the key among those of this commit that have a versionstamp.

    In a transaction, keys that its commit is to fill in are read with the seqno 2^64 - 1.
    """

    seqno: int
    ordinal: int

    def __post_init__(self) -> None:
        as_int("seqno", self.seqno, 0, PENDING_SEQNO - 1)
        as_int("ordinal", self.ordinal, 0, _MOST_ORDINAL)


def _pending(ordinal: int) -> Versionstamp:
    """One that a commit is to fill in. None can be made by hand."""
    stamp = object.__new__(Versionstamp)
    object.__setattr__(stamp, "seqno", PENDING_SEQNO)
    object.__setattr__(stamp, "ordinal", ordinal)
    return stamp


#: Stands for the versionstamp of the commit that will write the key. Never on disk.
SEQNO: Final = _pending(_MOST_ORDINAL)


# Strings.


def _encode_bytes(value: bytes) -> bytes:
    return b"\x01" + value.replace(b"\0", b"\0\xff") + b"\0"


def _encode_str(value: str) -> bytes:
    return b"\x02" + value.encode().replace(b"\0", b"\0\xff") + b"\0"


def _decode_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    end = data.find(b"\0", at)
    if end >= 0 and not data.startswith(b"\xff", end + 1):
        return data[at:end], end + 1
    while end >= 0 and data.startswith(b"\xff", end + 1):
        end = data.find(b"\0", end + 2)
    if end < 0:
        raise ValueError(_CUT)
    return data[at:end].replace(b"\0\xff", b"\0"), end + 1


def _decode_str(data: bytes, at: int) -> tuple[str, int]:
    end = data.find(b"\0", at)
    if end >= 0 and not data.startswith(b"\xff", end + 1):
        # Nearly all of them, in three quarters of the time.
        return data[at:end].decode(), end + 1
    raw, end = _decode_bytes(data, at)
    return raw.decode(), end


# Numbers.

_POSITIVE: Final = [bytes([0x14 + length]) for length in range(9)]
_NEGATIVE: Final = [bytes([0x14 - length]) for length in range(9)]


def _encode_int(value: int) -> bytes:
    if 0 <= value <= _ALL:
        raw = _U64.pack(value).lstrip(b"\0")
        return _POSITIVE[len(raw)] + raw
    if -_ALL <= value < 0:
        raw = _U64.pack(_ALL + value).lstrip(b"\xff")
        return _NEGATIVE[len(raw)] + raw
    length = (value.bit_length() + 7) >> 3
    if length > 0xFFFF:
        raise ValueError(f"an int of {length} bytes is larger than a key may be")
    if value < 0:
        value += (1 << 8 * length) - 1
        head = b"\x0b" + bytes([length ^ 0xFF]) if length <= 0xFF else b"\x0a" + (length ^ 0xFFFF).to_bytes(2, "big")
    else:
        head = b"\x1d" + bytes([length]) if length <= 0xFF else b"\x1e" + length.to_bytes(2, "big")
    return head + value.to_bytes(length, "big")


def _decode_short(length: int, *, inverted: bool) -> Decoder:
    """Of an int of a known length, which is the least one that holds it."""
    least = 1 << 8 * (length - 1)
    add = 1 - (1 << 8 * length) if inverted else 0

    def decode(data: bytes, at: int) -> tuple[int, int]:
        end = at + length
        value = int.from_bytes(data[at:end], "big") + add
        if -least < value < least or end > len(data):
            raise ValueError("an int is cut off, or longer than it needs to be")
        return value, end

    return decode


def _decode_long(length_bytes: int, least: int, *, inverted: bool) -> Decoder:
    """Of an int whose length, at least `least`, comes first."""
    flip = (1 << 8 * length_bytes) - 1 if inverted else 0

    def decode(data: bytes, at: int) -> tuple[int, int]:
        begin = at + length_bytes
        length = int.from_bytes(data[at:begin], "big") ^ flip
        if length < least:
            raise ValueError("an int has another length than it needs")
        return _decode_short(length, inverted=inverted)(data, begin)

    return decode


_INTS: Final[dict[int, Decoder]] = {
    0x0A: _decode_long(2, 256, inverted=True),
    0x0B: _decode_long(1, 9, inverted=True),
    **{0x14 - length: _decode_short(length, inverted=True) for length in range(8, 0, -1)},
    0x14: lambda _, at: (0, at),
    **{0x14 + length: _decode_short(length, inverted=False) for length in range(1, 9)},
    0x1D: _decode_long(1, 9, inverted=False),
    0x1E: _decode_long(2, 256, inverted=False),
}


def _encode_double(value: float) -> bytes:
    [bits] = _U64.unpack(_DOUBLE.pack(value))
    return b"\x21" + _U64.pack(bits ^ (_ALL if bits & _SIGN else _SIGN))


def _decode_double(data: bytes, at: int) -> tuple[float, int]:
    [bits] = _U64.unpack_from(data, at)
    [value] = _DOUBLE.unpack(_U64.pack(bits ^ (_SIGN if bits & _SIGN else _ALL)))
    return value, at + 8


def _encode_single(value: Float32) -> bytes:
    bits = int.from_bytes(_SINGLE.pack(value), "big")
    return b"\x20" + (bits ^ (0xFFFF_FFFF if bits >> 31 else 0x8000_0000)).to_bytes(4, "big")


def _decode_single(data: bytes, at: int) -> tuple[Float32, int]:
    bits = int.from_bytes(data[at : at + 4], "big")
    [plain] = _SINGLE.unpack((bits ^ (0x8000_0000 if bits >> 31 else 0xFFFF_FFFF)).to_bytes(4, "big"))
    value = Float32(plain)
    # A part that is cut off, and a NaN that the processor made another one of.
    if _encode_single(value)[1:] != data[at : at + 4]:
        raise ValueError("a float of 32 bits is cut off, or a NaN that signals")
    return value, at + 4


# The rest.


def _decode_uuid(data: bytes, at: int) -> tuple[UUID, int]:
    if at + 16 > len(data):
        raise ValueError(_CUT)
    return UUID(bytes=data[at : at + 16]), at + 16


def _encode_stamp(value: Versionstamp) -> bytes:
    if value == SEQNO:
        raise TypeError(
            "SEQNO becomes a versionstamp when a commit writes the key; it is the last part of a key to put"
        )
    return b"\x33" + STAMP.pack(value.seqno, value.ordinal)


def _decode_stamp(data: bytes, at: int) -> tuple[Versionstamp, int]:
    seqno, ordinal = STAMP.unpack_from(data, at)
    if seqno < PENDING_SEQNO:
        return Versionstamp(seqno, ordinal), at + STAMP.size
    if ordinal == _MOST_ORDINAL:
        raise ValueError("a versionstamp was not filled in")
    return _pending(ordinal), at + STAMP.size


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_US: Final = (datetime.min.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)
_LAST_US: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // timedelta(microseconds=1)


def _encode_datetime(value: datetime) -> bytes:
    if value.utcoffset() is None:
        raise ValueError(
            f"a datetime as key or value has a time zone, and {value!r} has none; say which, as in tzinfo=UTC"
        )
    if getattr(value, "nanosecond", 0):
        raise ValueError(f"a datetime as key or value has whole microseconds, and {value!r} has nanoseconds")
    since = datetime.__sub__(value, _EPOCH)
    number = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if not _FIRST_US <= number <= _LAST_US:
        raise ValueError(f"{value!r} is not in the years 1 to 9999 of UTC")
    return b"\x40" + _U64.pack(number + _SIGN)


def _decode_datetime(data: bytes, at: int) -> tuple[datetime, int]:
    number = _U64.unpack_from(data, at)[0] - _SIGN
    if not _FIRST_US <= number <= _LAST_US:
        raise ValueError("a datetime is not in the years 1 to 9999")
    return _EPOCH + timedelta(microseconds=number), at + 8


def _decode_inner_none(data: bytes, at: int) -> tuple[None, int]:
    if not data.startswith(b"\xff", at):
        raise ValueError("a nested tuple has too few parts")
    return None, at + 1


class Kind(NamedTuple):
    """What one type is as a part: its encoder, and its decoders by code."""

    encode: Encoder
    decoders: dict[int, Decoder]


#: By type, in the order of their codes, which is the order of parts of different types. Tuples are in tuples.py.
KINDS: Final[dict[type, Kind]] = {
    NoneType: Kind(lambda _: b"\0", {0x00: lambda _, at: (None, at)}),
    bytes: Kind(_encode_bytes, {0x01: _decode_bytes}),
    str: Kind(_encode_str, {0x02: _decode_str}),
    int: Kind(_encode_int, _INTS),
    Float32: Kind(_encode_single, {0x20: _decode_single}),
    float: Kind(_encode_double, {0x21: _decode_double}),
    bool: Kind(
        lambda value: b"\x27" if value else b"\x26",
        {0x26: lambda _, at: (False, at), 0x27: lambda _, at: (True, at)},
    ),
    UUID: Kind(lambda value: b"\x30" + value.bytes, {0x30: _decode_uuid}),
    Versionstamp: Kind(_encode_stamp, {0x33: _decode_stamp}),
    datetime: Kind(_encode_datetime, {0x40: _decode_datetime}),
}

#: Inside of a nested tuple 00 ends it, so that None says that it is one.
INNER_NONE: Final = Kind(lambda _: b"\0\xff", {0x00: _decode_inner_none})


def whole(name: str, decode: Decoder) -> Callable[[bytes], Any]:
    """Decodes bytes that are one value. CodecError, of the codec of this name, if they are not valid."""

    def decode_whole(data: bytes) -> Any:
        try:
            value, end = decode(data, 0)
            if end == len(data):
                return value
            reason = "there is more behind the value"
        except KeyError:
            reason = "a value has another type"
        except (IndexError, struct_error):
            reason = _CUT
        except ValueError as error:
            reason = str(error)
        raise CodecError(name, data, reason)

    return decode_whole
