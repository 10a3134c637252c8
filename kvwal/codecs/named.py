"""Codecs by the names that a table remembers, for a program that does not have the types: the command line.

A name is read from disk, so it may be anything. What is not the name of a codec of this package gives None. Nothing is
ever unpickled for a name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from types import NoneType
from typing import Any, Final, Union

from kvwal.codecs.codec import KeyCodec, OrderedFunctions, ValueFunctions, spelled
from kvwal.codecs.key_codecs import SINGLE, int64, key_codec
from kvwal.codecs.parts import KINDS
from kvwal.codecs.value_codecs import compressed, counter, json, msgpack

__all__ = ["MAX_NAME", "key_codec_named", "reader_named"]

#: Characters of a name that is looked at.
MAX_NAME: Final = 4_096
_MAX_AROUND: Final = 4

_AROUND: Final = re.compile(r"(zlib|zstd|versioned)\((.*)\)", re.DOTALL)
_FORMAT: Final = re.compile(r"(json|msgpack)(\[.*\])?", re.DOTALL)
_TYPES: Final[dict[str, Any]] = {spelled(kind): kind for kind in KINDS if kind is not NoneType}
# A parser that meets other text may warn of it.
_WORDS: Final = re.compile(rf"(?:{'|'.join(_TYPES)}|tuple|None|[\[\](),.| ])*")
_SINGLE: Final[dict[str, OrderedFunctions[Any]]] = {codec.name: codec for codec in (*SINGLE.values(), int64)}


def key_codec_named(name: str) -> KeyCodec[Any] | None:
    """The key codec of this name: of one value, or of tuples."""
    if name in _SINGLE or len(name) > MAX_NAME or not _WORDS.fullmatch(name):
        return _SINGLE.get(name)
    try:
        codec = key_codec(_kind(ast.parse(name, mode="eval").body))
    except (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError):
        return None
    return codec if codec.name == name else None


def _kind(node: ast.expr) -> Any:
    """The type that an expression names. KeyError for any other."""
    match node:
        case ast.Name(id=name):
            return _TYPES[name]
        case ast.Constant(value=value) if value is None or value is ...:
            return value
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_kind(left), _kind(right)]  # noqa: UP007  # of values, not of names
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=parts)):
            return tuple[tuple(map(_kind, parts))]  # type: ignore[misc]  # made when it runs
        case ast.Subscript(value=ast.Name(id="tuple"), slice=part):
            return tuple[_kind(part)]  # type: ignore[misc]  # as above
    raise KeyError(type(node).__name__)


def reader_named(name: str, around: int = 0) -> Callable[[bytes], Any] | None:
    """What reads the bytes of values of the codec of this name, as far as that needs no types of a program.

    Of a type it reads dicts, lists and numbers; of a value with a version, what has that version. It raises CodecError
    for bytes that do not fit, and ImportError is raised here if msgspec or zstd is needed and not installed.
    """
    if len(name) > MAX_NAME or around > _MAX_AROUND:
        return None
    if found := _AROUND.fullmatch(name):
        read = reader_named(found[2], around + 1)
        if read is None or found[1] == "versioned":
            return read and _without_version(read)
        return compressed(ValueFunctions(found[2], bytes, read), method=found[1]).decode  # type: ignore[arg-type]  # the pattern has only methods
    if found := _FORMAT.fullmatch(name):
        return json().decode if found[1] == "json" else msgpack().decode
    if name == counter.name:
        return counter.decode
    codec = key_codec_named(name)
    return None if codec is None else codec.decode


def _without_version(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    return lambda data: read(data[1:])
