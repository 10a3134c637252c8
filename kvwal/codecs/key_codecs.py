"""Codecs for keys: of one value, and `key_codec`, which makes one of a type.

On disk: never change. A key of one value is what the value is as a part of a tuple (kvwal/codecs/parts.py), but for
these, which have no code:

| codec | bytes |
|---|---|
| bytes | themselves |
| str | UTF-8 |
| int64 | 8 bytes, big-endian, the first bit inverted |
"""

from __future__ import annotations

from datetime import datetime
from operator import index
from struct import Struct
from struct import error as struct_error
from typing import Any, Final, TypeVar, get_origin, overload
from uuid import UUID

from kvwal.codecs.codec import KeyCodec, OrderedFunctions, is_codec, members_of, refused, spelled
from kvwal.codecs.parts import whole
from kvwal.codecs.tuples import TupleCodec, part_of
from kvwal.errors import CodecError
from kvwal.keys import as_key

__all__ = ["SINGLE", "int64", "key_codec", "utf8"]

T = TypeVar("T")
Parts = TypeVar("Parts", bound=tuple[Any, ...])

_SIGN: Final = 1 << 63
_U64: Final = Struct(">Q")


def _encode_str(value: str) -> bytes:
    try:
        return str.encode(value)
    except TypeError:
        raise refused(value, "str") from None


def _decode_str(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise CodecError("str", data, "they are not UTF-8") from None


def _encode_int64(value: int) -> bytes:
    try:
        if isinstance(value, bool):
            raise TypeError
        return _U64.pack(index(value) + _SIGN)
    except TypeError:
        raise refused(value, "int") from None
    except struct_error:
        raise OverflowError("the int does not fit into 64 bits; keys of type int have any size") from None


def _decode_int64(data: bytes) -> int:
    if len(data) != _U64.size:
        raise CodecError("int64", data, f"they are not {_U64.size}")
    number: int = _U64.unpack(data)[0]
    return number - _SIGN


def _of_part(kind: type[T]) -> OrderedFunctions[T]:
    part = part_of(kind)
    encoders = part.encoders

    def encode(value: T) -> bytes:
        try:
            return encoders[type(value)](value)
        except KeyError:
            return part.encode(value)

    return OrderedFunctions(part.name, encode, whole(part.name, part.decode))


utf8: Final = OrderedFunctions("str", _encode_str, _decode_str)
#: Ints of 64 bits with a sign, in 8 bytes.
int64: Final = OrderedFunctions("int64", _encode_int64, _decode_int64)
#: By type.
SINGLE: Final[dict[Any, OrderedFunctions[Any]]] = {
    bytes: OrderedFunctions("bytes", as_key, lambda data: data),
    str: utf8,
    **{kind: _of_part(kind) for kind in (int, float, bool, UUID, datetime)},
}


@overload
def key_codec(spec: KeyCodec[T]) -> KeyCodec[T]: ...
@overload
# What is returned for a tuple is a key codec of that tuple, too.
def key_codec(spec: type[Parts]) -> TupleCodec[Parts]: ...  # type: ignore[overload-overlap]  # it is one of both
@overload
def key_codec(spec: type[T]) -> KeyCodec[T]: ...
def key_codec(spec: Any) -> Any:
    """The codec of a type of keys: `str`, `int`, `float`, `bool`, `bytes`, `UUID`, `datetime`, or a tuple of them.

    A tuple's parts may also be None, `Float32`, `Versionstamp`, other tuples, and unions: `tuple[str, int | None]`,
    `tuple[str, ...]`. A key codec is returned as it is.

    Raises:
        TypeError: keys of this type have no order as bytes.
        ValueError: tuples are nested too deep.
    """
    if is_codec(spec):
        if getattr(spec, "ordered", False) is not True:
            raise TypeError(
                f"{spec.name} is a codec for values: its bytes do not sort as they do, so no key can have it"
            )
        return spec
    kind, *others = members_of(spec)
    if not others and get_origin(kind) is tuple:
        return TupleCodec(kind)
    if not others and isinstance(kind, type) and kind in SINGLE:
        return SINGLE[kind]
    names = ", ".join(map(spelled, SINGLE))
    raise TypeError(
        f"keys are of a type or a key codec, not {spelled(spec)}; types are {names}, and tuples, as in tuple[str, int]"
    )
