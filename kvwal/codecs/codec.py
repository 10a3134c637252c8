"""What a codec is, and how the types that a codec is made of are spelled in its name.

Rules:

- `decode(encode(value))` is equal to `value`. Bytes that `encode` never makes raise `CodecError`; a value that cannot
  be encoded raises TypeError, ValueError or OverflowError.
- The bytes of a key codec sort as its values do, and equal values have equal bytes.
- A table remembers a codec by its name and version, so these never change for one encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeGuard, TypeVar, Union, get_args, get_origin

__all__ = [
    "Codec",
    "KeyCodec",
    "OrderedFunctions",
    "TypedFunctions",
    "ValueFunctions",
    "is_codec",
    "members_of",
    "refused",
    "spelled",
]

T = TypeVar("T")


class Codec(Protocol[T]):
    """Values as bytes and back.

    Attributes:
        name: what a table remembers, with the version.
        version: of the encoding, from 1 on.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    def encode(self, value: T, /) -> bytes:
        """The bytes of a value. TypeError, ValueError and OverflowError for what it cannot store."""

    def decode(self, data: bytes, /) -> T:
        """The value of these bytes. CodecError if they are not what `encode` makes."""


class KeyCodec(Codec[T], Protocol[T]):
    """A codec for keys.

    Attributes:
        ordered: True, by which it says that bytes sort as values do.
    """

    @property
    def ordered(self) -> bool: ...


class ValueFunctions(Generic[T]):
    """A codec made of two functions, which are called as they are: a method around them would take longer than some."""

    if TYPE_CHECKING:

        def encode(self, value: T, /) -> bytes: ...
        def decode(self, data: bytes, /) -> T: ...

    def __init__(self, name: str, encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> None:
        self.name = name
        self.version = 1
        # Type checkers are to see methods, and no assignment to them.
        object.__setattr__(self, "encode", encode)
        object.__setattr__(self, "decode", decode)


class TypedFunctions(ValueFunctions[T]):
    """A codec of a type: `plain` reads dicts, lists and numbers from its bytes, of which `convert` makes the type.

    `plain` raises CodecError, `convert` ValueError.
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[T], bytes],
        decode: Callable[[bytes], T],
        *,
        plain: Callable[[bytes], Any],
        convert: Callable[[Any], T],
    ) -> None:
        super().__init__(name, encode, decode)
        self.plain = plain
        self.convert = convert


class OrderedFunctions(ValueFunctions[T]):
    """A key codec made of two functions."""

    def __init__(self, name: str, encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> None:
        super().__init__(name, encode, decode)
        self.ordered = True


def is_codec(spec: object) -> TypeGuard[Codec[Any]]:
    """Whether it is a codec, not a type: `str` has `encode`, and `bytes` has `decode`."""
    return not isinstance(spec, type) and all(hasattr(spec, part) for part in ("name", "version", "encode", "decode"))


def refused(value: object, expected: str) -> TypeError:
    """Of a value that a codec does not take."""
    return TypeError(f"{expected} is expected, not {type(value).__name__}")


def members_of(kind: Any) -> list[Any]:
    """The types that a union joins; of anything else itself. A NewType and an Annotated count as what they are of."""
    if get_origin(kind) in (Union, UnionType):
        return [member for part in get_args(kind) for member in members_of(part)]
    if hasattr(kind, "__supertype__"):
        return members_of(kind.__supertype__)
    if hasattr(kind, "__metadata__"):
        return members_of(kind.__origin__)
    return [NoneType if kind is None else kind]


def spelled(kind: Any) -> str:
    """A type as it is written, without modules: `dict[str, User | None]`."""
    if kind is ...:
        return "..."
    members = members_of(kind)
    if len(members) > 1:
        return " | ".join(map(spelled, members))
    [kind] = members
    if kind is NoneType:
        return "None"
    origin = get_origin(kind)
    if origin is None:
        return getattr(kind, "__name__", None) or repr(kind)
    return f"{spelled(origin)}[{', '.join(map(spelled, get_args(kind))) or '()'}]"
