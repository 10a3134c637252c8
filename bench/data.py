"""Keys, values and the order in which they are asked for. All of it repeatable from a seed.

A key is 16 bytes: a 64-bit number in hex. Key number i is a bijection of i, so keys are distinct, lie
scattered over the key space, and can be made without keeping a list of them (which matters where
memory is measured). Values are incompressible; a pool of them is reused, large enough that no
block of a peer that compresses holds the same value twice but rarely.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Final, Literal

__all__ = ["KEY_BYTES", "Distribution", "Pair", "indexes", "key", "pairs", "sorted_keys", "values", "zipf"]

KEY_BYTES: Final = 16
_MASK: Final = (1 << 64) - 1
# The constant of the YCSB core workloads (ZipfianGenerator.ZIPFIAN_CONSTANT).
_THETA: Final = 0.99

Distribution = Literal["uniform", "zipf"]
Pair = tuple[bytes, bytes]


def _mix(i: int) -> int:
    """The finalizer of splitmix64: a bijection of 64-bit numbers."""
    i = (i + 0x9E3779B97F4A7C15) & _MASK
    i = ((i ^ (i >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    i = ((i ^ (i >> 27)) * 0x94D049BB133111EB) & _MASK
    return i ^ (i >> 31)


def key(i: int) -> bytes:
    """Key number `i`."""
    return b"%016x" % _mix(i)


def sorted_keys(count: int) -> Iterator[bytes]:
    """The first `count` keys in key order."""
    for number in sorted(map(_mix, range(count))):
        yield b"%016x" % number


def values(value_bytes: int, seed: int = 7) -> list[bytes]:
    """A pool of incompressible values of one size."""
    rng = random.Random(seed)
    count = min(4096, max(32, (4 << 20) // max(1, value_bytes)))
    return [rng.randbytes(value_bytes) for _ in range(count)]


def zipf(count: int, rng: random.Random) -> Callable[[], int]:
    """Draws ranks below `count`, rank 0 the most popular.

    The method of Gray et al., "Quickly generating billion-record synthetic databases" (SIGMOD 1994),
    which YCSB uses too. Ranks are not scrambled: key number i already lies anywhere in the key space.
    """
    zeta = _zeta(count)
    zeta2 = _zeta(min(2, count))
    alpha = 1 / (1 - _THETA)
    eta = (1 - (2 / count) ** (1 - _THETA)) / (1 - zeta2 / zeta) if count > 2 else 1.0
    second = 1 + 0.5**_THETA
    draw = rng.random

    def rank() -> int:
        u = draw()
        uz = u * zeta
        if uz < 1:
            return 0
        if uz < second:
            return min(1, count - 1)
        return min(count - 1, int(count * (eta * u - eta + 1) ** alpha))

    return rank


def _zeta(count: int) -> float:
    """The sum of 1 / i**theta up to `count`; beyond 10,000 terms by its integral (error below 1e-4)."""
    exact = min(count, 10_000)
    total: float = sum(1 / i**_THETA for i in range(1, exact + 1))
    if count > exact:
        power = 1 - _THETA
        total += ((count + 0.5) ** power - (exact + 0.5) ** power) / power
    return total


def indexes(count: int, among: int, distribution: Distribution, seed: int) -> list[int]:
    """`count` numbers below `among`."""
    rng = random.Random(seed)
    if distribution == "zipf":
        rank = zipf(among, rng)
        return [rank() for _ in range(count)]
    draw = rng.random
    return [int(draw() * among) for _ in range(count)]


def pairs(numbers: list[int], value_bytes: int, seed: int = 7) -> list[Pair]:
    """Key and value for each of the numbers."""
    pool = values(value_bytes, seed)
    size = len(pool)
    return [(key(i), pool[(i + n) % size]) for n, i in enumerate(numbers)]
