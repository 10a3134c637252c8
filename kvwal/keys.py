"""Keys, values, commit numbers and ranges of keys: what each may be, and the only range algebra of the package.

Rules:

- Keys and values inside the package are exactly `bytes`: never a subclass (but `Expiring`), never a view of the
  caller's memory.
- Bytes-like is `bytes`, `bytearray`, and every other buffer whose items are single bytes (`array("B")`, `mmap`, a
  `memoryview` of these, in C order). Buffers of anything else are refused: an array of floats would be stored in the
  byte order of this machine, a NumPy integer is a number that happens to have a buffer, and the memory of an array of
  objects is addresses. `memoryview(it).tobytes()` says that the memory is meant.
- A number is what `__index__` makes an int of, NumPy's integers among it; a bool is not a number.
- A bound of a range is a key, None where nothing was said, or `END`: the place after all keys. As a start, None is the
  first key and `END` is beyond the last one. So a bound that was computed, as `prefix_stop` does, may be either end.
- A `KeyRange` is the set of keys from `start` on, below `stop`. A range whose stop is not above its start is empty, and
  every method treats it as the empty set.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import Enum
from numbers import Real
from operator import index, itemgetter
from struct import Struct
from typing import Final, NamedTuple, NewType, TypeAlias

__all__ = [
    "END",
    "MAX_BATCH_BYTES",
    "MAX_KEY_BYTES",
    "MAX_VALUE_BYTES",
    "PENDING_SEQNO",
    "STAMP",
    "SYSTEM_TABLE",
    "Bound",
    "BytesLike",
    "End",
    "KeyRange",
    "Seqno",
    "as_int",
    "as_key",
    "as_seconds",
    "as_value",
    "disjoint",
    "in_any",
    "prefix_stop",
    "stop_of_prefix",
]

# On disk: never raise without a new format version; lengths are stored in 2 and 4 bytes.
MAX_KEY_BYTES: Final = 65_535
MAX_VALUE_BYTES: Final = 1 << 30
# All keys and values of one commit. A record's length is stored in 4 bytes; the rest is for columns.
MAX_BATCH_BYTES: Final = 3 << 30
#: The table of the store itself. On disk: never change.
SYSTEM_TABLE: Final = 1

#: On disk: never change. The last 12 bytes of a key that the commit fills in: seqno, ordinal, big-endian.
STAMP: Final = Struct(">QI")
#: In place of the seqno until then. No commit ever has it.
PENDING_SEQNO: Final = (1 << 64) - 1

BytesLike: TypeAlias = bytes | bytearray | memoryview


class End(Enum):
    """The type of `END`."""

    END = "END"

    def __repr__(self) -> str:
        return "kvwal.END"


END: Final = End.END
"""The place after all keys, in a range: nothing starts there, and what stops there has no end."""

Bound: TypeAlias = BytesLike | End | None

Seqno = NewType("Seqno", int)
"""Number of a commit: contiguous, from 1. 0 means "before the first commit"."""


class KeyRange(NamedTuple):
    """Half-open: the keys from `start` on, below `stop`; `stop` None means to the end."""

    start: bytes
    stop: bytes | None

    @classmethod
    def of(cls, start: Bound, stop: Bound) -> KeyRange:
        """What a caller asks for. TypeError or ValueError for what cannot be a key."""
        end = None if stop is None or stop is END else as_key(stop)
        if start is END:
            return cls(b"", b"")
        return cls(b"" if start is None else as_key(start), end)

    @classmethod
    def of_prefix(cls, prefix: bytes) -> KeyRange:
        """The keys that start with `prefix`."""
        return cls(prefix, stop_of_prefix(prefix))

    @classmethod
    def through(cls, first: bytes, last: bytes) -> KeyRange:
        """The keys from `first` to `last`, both inclusive."""
        return cls(first, last + b"\0")

    def is_empty(self) -> bool:
        """Whether no key lies inside."""
        return self.stop is not None and self.stop <= self.start

    def contains(self, key: bytes) -> bool:
        """Whether `key` lies inside."""
        start, stop = self
        return start <= key and (stop is None or key < stop)

    def clip(self, other: KeyRange) -> KeyRange | None:
        """The keys that lie in both; None if there are none."""
        start = max(self.start, other.start)
        stop = _lower(self.stop, other.stop)
        return KeyRange(start, stop) if stop is None or start < stop else None

    def before(self, key: bytes | None, *, reverse: bool) -> KeyRange:
        """The part that a walk passes before it comes to `key`; None: all of it."""
        if key is None:
            return self
        return KeyRange(key + b"\0", self.stop) if reverse else KeyRange(self.start, key)

    def overlaps(self, other: KeyRange) -> bool:
        """Whether some key lies in both."""
        stop = _lower(self.stop, other.stop)
        return stop is None or max(self.start, other.start) < stop

    def covers(self, other: KeyRange) -> bool:
        """Whether each key of `other` lies in this range."""
        if other.is_empty():
            return True
        return self.start <= other.start and _lower(self.stop, other.stop) == other.stop


def _lower(one: bytes | None, other: bytes | None) -> bytes | None:
    """The stop that comes first."""
    if one is None:
        return other
    return one if other is None or one < other else other


def in_any(key: bytes, ranges: Iterable[KeyRange]) -> bool:
    """Whether one of the ranges contains `key`."""
    return any(start <= key and (stop is None or key < stop) for start, stop in ranges)


def disjoint(ranges: Iterable[KeyRange]) -> list[KeyRange]:
    """The same keys in ascending ranges that neither overlap nor touch; none of them is empty."""
    result: list[KeyRange] = []
    for bounds in sorted(ranges, key=itemgetter(0)):
        if bounds.is_empty():
            continue
        if result:
            last = result[-1]
            if last.stop is None:
                break
            if bounds.start <= last.stop:
                if not last.covers(bounds):
                    result[-1] = KeyRange(last.start, bounds.stop)
                continue
        result.append(bounds)
    return result


def prefix_stop(prefix: BytesLike) -> bytes | End:
    """The place after all keys that start with `prefix`: a key, or `kvwal.END` where no key comes after them.

    As the stop of a range it ends the prefix; as its start it begins with what comes behind. TypeError or ValueError
    for what cannot be a key.
    """
    stop = stop_of_prefix(as_key(prefix))
    return END if stop is None else stop


def stop_of_prefix(prefix: bytes) -> bytes | None:
    """`prefix_stop` of a checked prefix, as the stop of a `KeyRange`: None where no key comes after it."""
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        return None
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


def as_key(key: object) -> bytes:
    """The key as `bytes`. TypeError if it is not bytes-like, ValueError if it is too long."""
    data = _as_bytes(key, "key")
    if len(data) > MAX_KEY_BYTES:
        raise ValueError(f"the key has {len(data)} bytes; the limit is {MAX_KEY_BYTES}")
    return data


def as_value(value: object) -> bytes:
    """The value as `bytes`. TypeError if it is not bytes-like, ValueError if it is too long."""
    data = _as_bytes(value, "value")
    if len(data) > MAX_VALUE_BYTES:
        raise ValueError(f"the value has {len(data)} bytes; the limit is {MAX_VALUE_BYTES}")
    return data


def _as_bytes(data: object, what: str) -> bytes:
    if type(data) is bytes:
        return data
    if isinstance(data, bytes):
        # Of a subclass. Its own `__bytes__`, `__getitem__` or buffer may say something else than what it holds.
        return bytes.__getitem__(data, slice(None))
    if isinstance(data, str):
        raise TypeError(f"a {what} is bytes, not str; encode it first, as in text.encode()")
    # bytes(5) would be five zero bytes: only what has a buffer is let through.
    try:
        view = memoryview(data)  # type: ignore[arg-type]  # the TypeError is the check
    except TypeError:
        raise TypeError(f"a {what} is bytes or bytes-like, not {type(data).__name__}") from None
    with view:
        if not view.ndim or view.format.lstrip("@=<>!") not in ("B", "b", "c"):
            raise TypeError(
                f"a {what} is bytes or a buffer of single bytes, not {type(data).__name__} (items of format "
                f"{view.format!r}); if its memory is what you mean, pass memoryview(it).tobytes()"
            )
        return view.tobytes()


def as_seconds(name: str, value: object) -> float:
    """The argument `name` as a number of seconds; one beyond what a float can be is infinite.

    TypeError if it is no number, ValueError if it is less than 0 or a NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf if value == abs(value) else -math.inf
    # Not the other way round: a NaN is neither.
    if not seconds >= 0:
        raise ValueError(f"{name} is {seconds}; it is at least 0")
    return seconds


def as_int(name: str, value: object, least: int, most: int | None = None) -> int:
    """The argument `name` as an int from `least` to `most`. TypeError if it is no integer, ValueError outside."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)  # type: ignore[arg-type]  # the TypeError is the check
    except TypeError:
        raise TypeError(f"{name} is an int, not {type(value).__name__}") from None
    if number < least or (most is not None and number > most):
        raise ValueError(
            f"{name} is {number}; it is at least {least}" + ("" if most is None else f" and at most {most}")
        )
    return number
