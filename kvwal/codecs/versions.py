"""Values whose bytes say their version, and functions that bring older ones up.

On disk: never change. The first byte is the version, from 1 to 255; the bytes of the codec follow. 0 is never written.
The name has that of the codec, and its version if that is not 1: `versioned(text@2)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

from kvwal.codecs.codec import Codec, TypedFunctions
from kvwal.codecs.value_codecs import value_codec
from kvwal.errors import CodecError
from kvwal.keys import as_int

__all__ = ["MAX_VERSION", "Versioned", "versioned"]

T = TypeVar("T")

MAX_VERSION: Final = 255


class Versioned(Generic[T]):
    """A codec that reads values of former versions, too.

    Attributes:
        name: of the codec, with the version of the one inside if that is not 1; the same for all versions of values.
        version: the one that is written.
        oldest: the first one that is read.
    """

    __slots__ = ("_codec", "_upcasters", "name", "oldest", "version")

    def __init__(self, codec: Codec[T], version: int, upcasters: Mapping[int, Callable[[Any], Any]]) -> None:
        self.version = as_int("version", version, 1, MAX_VERSION)
        known = sorted(as_int("the version of an upcaster", number, 1, MAX_VERSION) for number in upcasters)
        self.oldest = known[0] if known else self.version
        if known != [*range(self.oldest, self.version)]:
            raise ValueError(
                f"version {self.version} is reached from {self.oldest} by one upcaster for each version before it, and "
                f"there are those of {', '.join(map(str, known))}"
            )
        for number, upcaster in upcasters.items():
            if not callable(upcaster):
                raise TypeError(f"the upcaster of version {number} is a function, not {type(upcaster).__name__}")
        if isinstance(codec, Versioned):
            raise TypeError("the codec has versions already")
        self.name = f"versioned({codec.name})" if codec.version == 1 else f"versioned({codec.name}@{codec.version})"
        self._codec = codec
        self._upcasters = dict(upcasters)

    def encode(self, value: T, /) -> bytes:
        """The bytes of a value, of the newest version."""
        return bytes((self.version,)) + self._codec.encode(value)

    def decode(self, data: bytes, /) -> T:
        """The value, brought up to the newest version.

        Raises:
            CodecError: the version is newer than this one, or older than all upcasters; an upcaster failed, which is
                `__cause__`; or the bytes are not of the codec.
        """
        number = self.version_of(data)
        try:
            if number == self.version:
                return self._codec.decode(data[1:])
            typed = self._codec if isinstance(self._codec, TypedFunctions) else None
            value = typed.plain(data[1:]) if typed else self._codec.decode(data[1:])
        except CodecError as error:
            raise CodecError(self.name, data, error.reason) from error
        for step in range(number, self.version):
            try:
                value = self._upcasters[step](value)
            except Exception as error:
                raise CodecError(self.name, data, f"the upcaster of version {step} failed: {error!r}") from error
        try:
            return typed.convert(value) if typed else value
        except ValueError as error:
            raise CodecError(self.name, data, f"version {number}, brought up: {error}") from error

    def version_of(self, data: bytes) -> int:
        """The version that bytes say, if this codec reads it. CodecError if not."""
        number = data[0] if data else 0
        if number > self.version:
            reason = f"they are of version {number}, and {self.version} is the newest that is known here"
        elif number < self.oldest:
            reason = f"they are of version {number}, and upcasters begin with {self.oldest}"
        else:
            return number
        raise CodecError(self.name, data, reason)

    def upcast(self, data: bytes) -> bytes:
        """Bytes of any version as those of the newest: the same object if they are that. CodecError as `decode`."""
        return data if self.version_of(data) == self.version else self.encode(self.decode(data))


def versioned(
    codec: Codec[T] | type[T], *, version: int, upcasters: Mapping[int, Callable[[Any], Any]] | None = None
) -> Versioned[T]:
    """Values of a codec with their version, which bytes say.

    An upcaster takes the value of its version, and returns that of the next. Of a typed codec, as `json(User)` is, it
    takes and returns what the format has (dicts, lists, numbers), since former types need not exist any more; the last
    result is then read as the type.

    Args:
        codec: or a type, of which `value_codec` makes one.
        version: of what is written, from 1 to 255.
        upcasters: by version, without a hole up to the one before `version`.

    Raises:
        ValueError: there is a hole in the chain, or an upcaster for `version` or a later one.
    """
    return Versioned(value_codec(codec), version, upcasters or {})
