"""Tuples as keys: typed ones, which sort as their values do, and whatever FoundationDB's tuple layer can hold.

The bytes of a tuple are those of its parts, one after the other (kvwal/codecs/parts.py); a nested tuple is a part with
the code 05 that ends with 00. So the bytes of leading parts are the prefix of the whole tuple's, and the next byte is
never ff, since no code is: all tuples with these leading parts are from there on, below the same bytes and ff.

A typed codec has one order with Python's: of int, float, Float32 and bool, which compare with each other, a part may be
only one; -0.0 is 0.0, and NaN is refused. `pack` and `unpack` do without, as FoundationDB's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import index
from types import NoneType
from typing import Any, Final, SupportsIndex, TypeVar, get_args, get_origin

from kvwal.codecs.codec import OrderedFunctions, members_of, refused, spelled
from kvwal.codecs.parts import (
    INNER_NONE,
    KINDS,
    SEQNO,
    Decoder,
    Encoder,
    Float32,
    Kind,
    Versionstamp,
    whole,
)
from kvwal.keys import MAX_KEY_BYTES, STAMP, KeyRange, stop_of_prefix

__all__ = ["MAX_DEPTH", "Part", "TupleCodec", "pack", "part_of", "unpack"]

K = TypeVar("K", bound=tuple[Any, ...])

#: How deep tuples nest in tuples.
MAX_DEPTH: Final = 16

_TUPLE: Final = b"\x05"
_FIRST_STAMP: Final = Versionstamp(0, 0)
# What an instance of a subclass holds, as an instance of the class itself.
_CONTENTS: Final[dict[type, Any]] = {
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    str: str.__str__,
    int: int.__index__,
    float: float.__float__,
}


class Part:
    """What may stand at one place of a tuple, or as a key alone."""

    __slots__ = ("decoders", "encoders", "name")

    def __init__(self, name: str, kinds: dict[type, Kind]) -> None:
        self.name = name
        self.encoders: dict[type, Encoder] = {kind: encode for kind, (encode, _) in kinds.items()}
        self.decoders: dict[int, Decoder] = {
            code: decode for _, decoders in kinds.values() for code, decode in decoders.items()
        }
        if float in self.encoders and int not in self.encoders:
            self.encoders[int] = self.encoders[float]

    def decode(self, data: bytes, at: int) -> tuple[Any, int]:
        """The value at an offset, and the offset behind it."""
        return self.decoders[data[at]](data, at + 1)

    def encode(self, value: object, place: str = "") -> bytes:
        """Also of a subclass, and of what says by `__index__` which int it is. TypeError if it does not belong here."""
        if type(value) in self.encoders:
            return self.encoders[type(value)](value)
        for kind, encode in self.encoders.items():
            if isinstance(value, kind) and not isinstance(value, bool):
                return encode(_CONTENTS[kind](value) if kind in _CONTENTS else value)
        if int in self.encoders and isinstance(value, SupportsIndex) and not isinstance(value, bool):
            return self.encoders[int](index(value))
        raise refused(value, self.name + place)


class _Shape:
    """The parts of a tuple: one for each place, or the same for any number of places."""

    __slots__ = ("_decoders", "_encoders", "_nested", "_parts", "_same", "name")

    def __init__(self, name: str, parts: Sequence[Part], *, same: bool, nested: bool) -> None:
        self.name = name
        self._parts = parts
        self._same = same
        self._nested = nested
        self._encoders = [part.encoders for part in parts]
        self._decoders = [part.decoders for part in parts]

    def encode(self, values: Any) -> bytes:
        """The bytes of a whole tuple."""
        if type(values) is tuple:
            try:
                if self._same:
                    [encoders] = self._encoders
                    return b"".join([encoders[type(value)](value) for value in values])
                if len(values) == len(self._encoders) == 2:
                    # The most common key, in half of the time of a loop.
                    (first, second), (one, other) = self._encoders, values
                    return first[type(one)](one) + second[type(other)](other)
                if len(values) == len(self._encoders):
                    pairs = zip(self._encoders, values, strict=True)
                    return b"".join([encoders[type(value)](value) for encoders, value in pairs])
            except KeyError:
                pass
        return self._encode_slowly(values)

    def _encode_slowly(self, values: Any) -> bytes:
        if isinstance(values, tuple) and len(values) < len(self._parts) and not self._same:
            raise TypeError(f"{self.name} is expected, and this tuple has {len(values)} parts")
        return self.encode_leading(values)

    def encode_leading(self, values: Any) -> bytes:
        """The bytes that all tuples begin with whose leading parts are these."""
        if not isinstance(values, tuple):
            raise refused(values, self.name)
        if len(values) > len(self._parts) and not self._same:
            raise TypeError(f"{self.name} is expected, and this tuple has {len(values)} parts")
        parts = repeat(self._parts[0]) if self._same else self._parts
        return b"".join(
            [
                part.encode(value, f" as part {place} of {self.name}")
                for place, (part, value) in enumerate(zip(parts, values, strict=False), 1)
            ]
        )

    def encode_nested(self, values: Any) -> bytes:
        """The bytes of a whole tuple as a part of another."""
        return _TUPLE + self.encode(values) + b"\0"

    def decode(self, data: bytes, at: int) -> tuple[tuple[Any, ...], int]:
        """The tuple at an offset, and the offset behind it. Raises what decoders do, and KeyError for a wrong code."""
        if self._same:
            values = []
            [decoders] = self._decoders
            while (data[at] or data.startswith(b"\xff", at + 1)) if self._nested else at < len(data):
                value, at = decoders[data[at]](data, at + 1)
                values.append(value)
            return tuple(values), at + self._nested
        if len(self._decoders) == 2:
            first, second = self._decoders
            one, at = first[data[at]](data, at + 1)
            other, at = second[data[at]](data, at + 1)
            found: tuple[Any, ...] = one, other
        else:
            values = []
            for decoders in self._decoders:
                value, at = decoders[data[at]](data, at + 1)
                values.append(value)
            found = tuple(values)
        if not self._nested:
            return found, at
        # Of one None too many, the ff is left, which is no code.
        if data[at]:
            raise ValueError("a nested tuple has too many parts")
        return found, at + 1


def _strict(kind: Kind) -> Kind:
    """A float without NaN, which has no order, and without -0.0, which is equal to 0.0."""
    [(code, decode)] = kind.decoders.items()

    def encode_strict(value: float) -> bytes:
        return kind.encode(_exact_float(value))

    def decode_strict(data: bytes, at: int) -> tuple[float, int]:
        value, end = decode(data, at)
        if value != value or (not value and data[at] == 0x7F):
            raise ValueError("it holds NaN or -0.0, which is never written")
        return value, end

    return Kind(encode_strict, {code: decode_strict})


def _exact_float(value: float) -> float:
    """A float or int as the float that is equal to it, 0.0 for -0.0. ValueError if there is none."""
    try:
        number = float(value)
    except OverflowError:
        number = 0.0
    if number != value:
        raise ValueError(
            "a float as key or value cannot be NaN, which has no order, nor an int that no float of 64 bits is equal to"
        )
    return number + 0.0


_NUMBERS: Final = {int, float, Float32, bool}
_STRICT: Final = {**KINDS, float: _strict(KINDS[float]), Float32: _strict(KINDS[Float32])}


def part_of(kind: Any) -> Part:
    """What a type says of a part. TypeError if it says nothing that has an order."""
    return _part(kind, 0, _STRICT)


def _part(kind: Any, depth: int, possible: dict[type, Kind]) -> Part:
    if kind is Any and possible is KINDS:
        members: list[Any] = [*possible] + [tuple[Any, ...]] * (depth < MAX_DEPTH)
    else:
        members = members_of(kind)
        if len(_NUMBERS.intersection(members)) > 1:
            raise TypeError(
                f"{spelled(kind)} has no order as bytes, since its numbers compare with each other; take one"
            )
    kinds: dict[type, Kind] = {}
    names = []
    for member in members:
        if get_origin(member) is tuple:
            shape = _shape(get_args(member), depth + 1, possible)
            kinds[tuple] = Kind(shape.encode_nested, {_TUPLE[0]: shape.decode})
            names.append((_TUPLE[0], shape.name))
        elif isinstance(member, type) and member in possible:
            kinds[member] = INNER_NONE if member is NoneType and depth else possible[member]
            names.append((min(kinds[member].decoders), spelled(member)))
        else:
            raise TypeError(
                f"{spelled(member)} cannot be a part of a key; that can be {', '.join(map(spelled, KINDS))}, "
                "tuples of these, and unions"
            )
    if len(names) > len(kinds):
        raise TypeError(f"{spelled(kind)} has more than one tuple, which bytes cannot tell from another")
    return Part("Any" if kind is Any else " | ".join(name for _, name in sorted(names)), kinds)


def _shape(arguments: tuple[Any, ...], depth: int, possible: dict[type, Kind]) -> _Shape:
    if depth > MAX_DEPTH:
        raise ValueError(f"tuples in keys are nested at most {MAX_DEPTH} deep")
    same = len(arguments) == 2 and arguments[1] is ...
    parts = [_part(kind, depth, possible) for kind in (arguments[:1] if same else arguments)]
    names = [part.name for part in parts] + ["..."] * same
    return _Shape(f"tuple[{', '.join(names) or '()'}]", parts, same=same, nested=depth > 0)


class TupleCodec(OrderedFunctions[K]):
    """Tuples of one type as keys, by the type as it is written."""

    def __init__(self, kind: type[K]) -> None:
        self._shape = _shape(get_args(kind), 0, _STRICT)
        name = self._shape.name
        super().__init__(name, self._shape.encode, whole(name, self._shape.decode))

    def prefix(self, *parts: Any) -> KeyRange:
        """The keys of all tuples whose leading parts are these."""
        if not parts:
            return KeyRange(b"", None)
        start = self._shape.encode_leading(parts)
        # Of a key that is as long as one can be, nothing else comes before what follows it.
        return KeyRange(start, start + b"\xff" if len(start) < MAX_KEY_BYTES else stop_of_prefix(start))

    def between(self, start: tuple[Any, ...] | None, stop: tuple[Any, ...] | None) -> KeyRange:
        """The keys of the tuples from `start` on, below `stop`, which may be leading parts alone. None: to the end."""
        leading = self._shape.encode_leading
        return KeyRange(b"" if start is None else leading(start), None if stop is None else leading(stop))

    def place(self, value: K, /) -> tuple[bytes, int | None]:
        """The key of a tuple to put, and the offset of the 12 bytes that the commit fills in if it ends with `SEQNO`.

        Until then they are ff. The offset is None if there is nothing to fill in.
        """
        key: Any = value
        if not isinstance(key, tuple) or key[-1:] != (SEQNO,):
            return self.encode(value), None
        # The last part in place of SEQNO is checked as any other, so that it stands where a versionstamp may.
        data = self._shape.encode((*key[:-1], _FIRST_STAMP))
        return data[: -STAMP.size] + b"\xff" * STAMP.size, len(data) - STAMP.size


_LAYER: Final = _shape((Any, ...), 0, KINDS)
_unpack: Final[Callable[[bytes], tuple[Any, ...]]] = whole("tuple", _LAYER.decode)


def pack(values: tuple[Any, ...]) -> bytes:
    """A tuple as FoundationDB packs it, of any parts that the layer has. TypeError and ValueError for any other."""
    return _LAYER.encode(values)


def unpack(data: bytes) -> tuple[Any, ...]:
    """What was packed. CodecError for bytes that `pack` never makes."""
    return _unpack(data)
