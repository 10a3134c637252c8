"""Codecs for values, and `value_codec`, which makes one of a type.

On disk: never change. A table remembers a codec by its name, in which the bytes are told as follows:

| name | bytes |
|---|---|
| bytes | themselves |
| str | UTF-8 |
| counter | an int of 64 bits with a sign, little-endian: what `add` adds to |
| float, bool, UUID, datetime | what they are as keys (kvwal/codecs/key_codecs.py) |
| json, json[...] | JSON in UTF-8, without spaces, names in order; in brackets the type that is read from it |
| msgpack, msgpack[...] | MessagePack, dicts with str keys in order |
| pickle | a pickle of protocol 5 |
| zlib(...), zstd(...) | 00 and the bytes of the codec in parentheses, or 01 and these compressed if that is shorter |

What is not stored as it is: JSON knows no tuples, no keys but str and no bytes, so that `json()` gives back lists and
names. A typed codec reads each field as its type again, and refuses what does not fit it.
"""

from __future__ import annotations

import json as stdlib_json
import pickle as stdlib_pickle
from collections.abc import Callable
from datetime import datetime
from operator import index
from types import UnionType
from typing import Any, Final, Literal, TypeVar, get_origin, overload
from uuid import UUID

from kvwal.codecs.codec import Codec, TypedFunctions, ValueFunctions, is_codec, members_of, refused, spelled
from kvwal.codecs.compression import compression
from kvwal.codecs.key_codecs import SINGLE
from kvwal.codecs.structs import msgpack_functions, typed_functions
from kvwal.errors import CodecError
from kvwal.keys import as_value

__all__ = ["compressed", "counter", "json", "msgpack", "pickle", "value_codec"]

T = TypeVar("T")
U = TypeVar("U")

_COUNTER_BYTES: Final = 8


def _encode_counter(value: int) -> bytes:
    try:
        if isinstance(value, bool):
            raise TypeError
        return index(value).to_bytes(_COUNTER_BYTES, "little", signed=True)
    except TypeError:
        raise refused(value, "int") from None
    except OverflowError:
        raise OverflowError(
            "the int does not fit into the 64 bits of a counter; json() takes larger ones, of as many digits as Python "
            "makes text of: see sys.get_int_max_str_digits()"
        ) from None


def _decode_counter(data: bytes) -> int:
    if len(data) != _COUNTER_BYTES:
        raise CodecError("counter", data, f"a counter has {_COUNTER_BYTES}")
    return int.from_bytes(data, "little", signed=True)


#: Ints of 64 bits with a sign, as `add` writes them.
counter: Final = ValueFunctions("counter", _encode_counter, _decode_counter)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not of JSON")


_write_json: Final = stdlib_json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
).encode
_read_json: Final = stdlib_json.JSONDecoder(parse_constant=_no_constant).decode


def _encode_json(value: Any) -> bytes:
    try:
        return _write_json(value).encode()
    except RecursionError:
        raise ValueError("the value is nested too deep for JSON") from None


def _decode_json(data: bytes) -> Any:
    try:
        return _read_json(data.decode())
    except (ValueError, RecursionError) as error:
        raise CodecError("json", data, f"they are no JSON: {error}") from None


_JSON: Final = ValueFunctions("json", _encode_json, _decode_json)


@overload
def json() -> Codec[Any]: ...
@overload
def json(kind: type[T], *, name: str | None = None) -> Codec[T]: ...
@overload
def json(kind: UnionType, *, name: str | None = None) -> Codec[Any]: ...
def json(kind: Any = None, *, name: str | None = None) -> Any:
    """Values as JSON: what Python's own module has, or those of a type by msgspec (`pip install 'kvwal[msgspec]'`).

    Equal values have the same bytes unless their classes differ, as those of 1, 1.0 and True do: names are in order,
    and there are no spaces. NaN is refused.

    Args:
        kind: a dataclass, attrs class, `msgspec.Struct`, TypedDict, NamedTuple, or any type that msgspec knows. Each
            value is checked when it is read.
        name: what stands in the codec's name for the type, `User` in `json[User]`. A table remembers it, so give the
            former one when a type gets another name.
    """
    return _JSON if kind is None else typed_functions("json", kind, name, _JSON.decode)


@overload
def msgpack() -> Codec[Any]: ...
@overload
def msgpack(kind: type[T], *, name: str | None = None) -> Codec[T]: ...
@overload
def msgpack(kind: UnionType, *, name: str | None = None) -> Codec[Any]: ...
def msgpack(kind: Any = None, *, name: str | None = None) -> Any:
    """Values as MessagePack, by msgspec (`pip install 'kvwal[msgspec]'`): shorter than JSON, and it knows bytes.

    Without a type, what it would read as something that it does not equal is refused, as a Decimal or a dataclass is;
    only tuples come back as lists. A value of a subclass comes back as what it equals: an IntEnum as an int, a
    defaultdict as a dict; and a bytearray as bytes, an aware datetime in UTC. Arguments are those of `json`.
    """
    plain = msgpack_functions()
    return plain if kind is None else typed_functions("msgpack", kind, name, plain.decode)


def _write_pickle(value: Any) -> bytes:
    return stdlib_pickle.dumps(value, protocol=5)


def _read_pickle(data: bytes) -> Any:
    try:
        return stdlib_pickle.loads(data)  # noqa: S301  # its docs warn of it
    except Exception as error:  # a pickle may raise anything
        raise CodecError("pickle", data, f"they are no pickle that can be read here: {error!r}") from error


_PICKLE: Final = ValueFunctions("pickle", _write_pickle, _read_pickle)


def pickle() -> Codec[Any]:
    """Values of any class, as pickles. **Reading a pickle runs what it says**: a store from elsewhere can do anything.

    Take it for a cache of your own at most. A pickle also names modules and classes, which must stay where they are.
    """
    return _PICKLE


def compressed(codec: Codec[T], *, method: Literal["zlib", "zstd"] = "zlib", level: int | None = None) -> Codec[T]:
    """Values of another codec, compressed where that makes them shorter. The version is that of the other codec.

    Args:
        codec: of the values. One with versions stands outside: `versioned(compressed(json()), ...)`.
        method: "zlib", or "zstd" with Python 3.14 or `pip install backports.zstd`.
        level: of the method: from -1 to 9 for zlib, by default 6; to 22 for zstd, by default 3.

    Raises:
        ValueError: the method has no such level.
        ImportError: there is no zstd.
    """
    if hasattr(codec, "upcast"):
        raise TypeError("versions are told before anything is decompressed: versioned(compressed(...), ...)")
    compress, decompress = compression(method, level)
    name = f"{method}({codec.name})"

    def encode(value: T) -> bytes:
        data = codec.encode(value)
        short = compress(data)
        return b"\1" + short if len(short) < len(data) else b"\0" + data

    def expand(data: bytes) -> bytes:
        if data[:1] == b"\0":
            return data[1:]
        if data[:1] != b"\1":
            raise CodecError(name, data, "they begin with neither 00 nor 01")
        try:
            return decompress(memoryview(data)[1:])
        except ValueError as error:
            raise CodecError(name, data, str(error)) from None

    def of(read: Callable[[bytes], U]) -> Callable[[bytes], U]:
        def decode(data: bytes) -> U:
            try:
                return read(expand(data))
            except CodecError as error:
                raise CodecError(name, data, error.reason) from error

        return decode

    made: ValueFunctions[T]
    if isinstance(codec, TypedFunctions):
        made = TypedFunctions(name, encode, of(codec.decode), plain=of(codec.plain), convert=codec.convert)
    else:
        made = ValueFunctions(name, encode, of(codec.decode))
    made.version = codec.version
    return made


_OF_TYPES: Final[dict[Any, Codec[Any]]] = {
    bytes: ValueFunctions("bytes", as_value, lambda data: data),
    str: SINGLE[str],
    int: counter,
    **{kind: SINGLE[kind] for kind in (float, bool, UUID, datetime)},
}


@overload
def value_codec(spec: Codec[T]) -> Codec[T]: ...
@overload
def value_codec(spec: type[T]) -> Codec[T]: ...
@overload
def value_codec(spec: UnionType) -> Codec[Any]: ...
def value_codec(spec: Any) -> Any:
    """The codec of a type of values. A codec is returned as it is.

    `bytes` and `str` are themselves, `int` is a `counter`, `float`, `bool`, `UUID` and `datetime` are what they are as
    keys, and any other type is `json(type)`.

    Raises:
        TypeError: it is neither a type nor a codec.
        ImportError: the type needs msgspec.
    """
    if is_codec(spec):
        return spec
    kind, *others = members_of(spec)
    if not others and isinstance(kind, type) and kind in _OF_TYPES:
        return _OF_TYPES[kind]
    if not (isinstance(kind, type) or get_origin(kind)) or spec is None:
        raise TypeError(f"values are of a type or a codec, as in codecs.json(), not {spelled(spec)}")
    return json(spec)
