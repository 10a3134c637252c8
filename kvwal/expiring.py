"""Values that expire: the bytes of one begin with the time when it does.

    offset  size  field
         0     8  when it expires: wall clock in microseconds since 1970 UTC, u64, little-endian
         8     -  the value

These bytes are the same in the log, in memory and in a leaf, so whatever passes values on passes them on unchanged.

Invariant: one leaves the read path only through `judged`, by the time of who reads.
"""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Rational, Real
from typing import Final

__all__ = ["MOST_US", "STAMP_BYTES", "Expiring", "expire_us", "judged", "plain"]

# On disk: never change.
STAMP_BYTES: Final = 8
_US_PER_S: Final = 1_000_000
#: The longest time until something expires, some 146,000 years: with it any time of the clock fits into 64 bits.
MOST_US: Final = 1 << 62


class Expiring(bytes):
    """A value, behind the time when it expires."""

    __slots__ = ()

    @property
    def expires_us(self) -> int:
        """When it expires: from then on it is absent."""
        return int.from_bytes(self[:STAMP_BYTES], "little")

    @property
    def value(self) -> bytes:
        """What is read until then."""
        return self[STAMP_BYTES:]

    @classmethod
    def of(cls, value: bytes, expires_us: int) -> Expiring:
        """A value that expires at that time."""
        return cls(min(expires_us, 2 * MOST_US).to_bytes(STAMP_BYTES, "little") + value)


def judged(value: bytes | None, at_us: int) -> bytes | None:
    """What a reader at that time finds; None if it has expired by then."""
    if type(value) is not Expiring:
        return value
    return value.value if at_us < value.expires_us else None


def plain(value: bytes | None) -> bytes | None:
    """The value, whether it has expired or not."""
    return value.value if type(value) is Expiring else value


def expire_us(expire_s: object) -> int:
    """An `expire_s` of the user in microseconds, to the nearest and at least one.

    TypeError if it is no number; ValueError if it is not above 0, or not finite.
    """
    seconds: float | Fraction
    if isinstance(expire_s, int | float) and not isinstance(expire_s, bool):
        seconds = expire_s
    elif isinstance(expire_s, bool) or not isinstance(expire_s, Real):
        raise TypeError(f"expire_s is a number of seconds, not {type(expire_s).__name__}")
    elif isinstance(expire_s, Rational):
        # Those of NumPy would count in as few bits as they have.
        seconds = Fraction(int(expire_s.numerator), int(expire_s.denominator))
    else:
        seconds = float(expire_s)
    if isinstance(seconds, float) and not math.isfinite(seconds):
        raise ValueError(f"expire_s is {seconds}, which is not a finite number of seconds")
    if seconds <= 0:
        raise ValueError(f"expire_s is {seconds}; it has to be more than 0 seconds")
    return max(1, round(min(seconds, MOST_US // _US_PER_S) * _US_PER_S))
