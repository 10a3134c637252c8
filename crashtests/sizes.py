"""Part 3: the sizes that users have. Segments, memtable and cache at their defaults, and drawn at random.

All other parts are tiny, so that a few steps reach rolls and checkpoints. But at 16 KiB a segment has one entry in its
index, a batch fills it, and every row fits into the cache or none: a commit that was lost behind the second entry once
passed everything. Here the values grow with the segments, so that these roll as well, a little later.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Any, Final

import kvwal
from crashtests.console import Result
from crashtests.explorer import Explorer, Limits, Tally
from crashtests.programs import long_program
from crashtests.session import Program
from crashtests.workers import Run, Share, spread

#: Each option, the smallest value that is tried, and how often that may be doubled.
SIZES: Final = {
    "segment_bytes": (16 << 10, 10),
    "memtable_bytes": (16 << 10, 12),
    "cache_bytes": (256 << 10, 8),
    "checkpoint_log_bytes": (4 << 10, 14),
}

#: What a segment of more than 64 KiB has and a smaller one has not: further entries in its index. By size.
NAMED: Final[tuple[tuple[int, Program], ...]] = (
    (
        1 << 20,
        [
            # Segments grow with the log: the fourth one has 256 KiB.
            *[["weak", n, 9000] for n in range(28)],
            ["checkpoint"],
            *[["put", n, 9000] for n in range(28, 50)],
            *[["reopen"], ["look"], ["put", 1, 90], ["kill"], ["look"]],
        ],
    ),
    (
        16 << 20,
        [
            *[["weak", n, 9000] for n in range(10)],
            ["reopen"],
            *[["weak", n, 9000] for n in range(8, 20)],
            *[["checkpoint"], ["put", 40, 90], ["reopen"]],
        ],
    ),
)

_LIMITS: Final = Limits(choices=3, depth=3, nested_every=24, deeper_every=8, nested_choices=2)
# Values grow by this at most: states are copied, scanned and compared whole.
_LARGEST: Final = 24


def defaults() -> dict[str, Any]:
    """The sizes of a store that is opened without any."""
    parameters = inspect.signature(kvwal.open).parameters
    return {name: parameters[name].default for name in SIZES}


def some_sizes(random: Random) -> dict[str, Any]:
    """The defaults in a sixth of the cases; else each size at any magnitude, and seldom a round number."""
    if random.random() < 1 / 6:
        return defaults()
    return {
        name: random.randrange(least << doubled, (least << doubled) * 2)
        for name, (least, doublings) in SIZES.items()
        for doubled in [random.randrange(doublings)]
    }


def a_program(random: Random, segment_bytes: int) -> Program:
    """Steps as in the random part; their values are as small as there, or larger where segments are."""
    times = min(random.choice((1, 4, _LARGEST)), segment_bytes // (16 << 10))
    program = long_program(random, random.choice((10, 20, 40)))
    for step in program:
        if step[0] in ("put", "weak"):
            step[2] *= times
        elif step[0] == "batch":
            step[1] = [[key, size and size * times] for key, size in step[1]]
    return program


def items(seed: int) -> Iterator[tuple[int, dict[str, Any], Program]]:
    """Seed, options and program: the named ones, then one after the other by the seed."""
    for segment_bytes, program in NAMED:
        yield seed, defaults() | {"segment_bytes": segment_bytes}, program
    for number in count(seed * 100_000):
        random = Random(f"sizes {number}")
        options = some_sizes(random) | {"durability": random.choice(("commit", "commit", "commit", "os"))}
        yield number, options, a_program(random, options["segment_bytes"])


def work(share: Share) -> Iterator[Tally]:
    for seed, options, program in share.mine(items(share.run.seed)):
        if share.over():
            return
        tally = Tally()
        Explorer(_LIMITS, tally, seed=seed, options=options, give_up=share.over, stop_at_first=True).explore(program)
        yield tally


def run(run: Run) -> Result:
    """Run the part."""
    return spread("sizes", work, run)
