"""Part 1: every crash point of small programs, and every subset of what was pending, up to a bound."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from crashtests.console import Result
from crashtests.explorer import Explorer, Limits, Tally
from crashtests.programs import NAMED, small_programs
from crashtests.session import Program
from crashtests.workers import Run, Share, spread


def items(seed: int, first: str = "") -> Iterator[tuple[dict[str, Any], Program, Limits]]:
    """The named programs, all programs of two small steps, then of three, then both again with larger bounds.

    `first` is the name of the program to begin with.
    """
    quick = Limits(choices=24, depth=2, nested_every=16)
    if first:
        # Each process that is killed anywhere in it is followed by all cuts of the recovery.
        yield *NAMED[first], Limits(choices=24, depth=2, nested_every=16, deeper_every=1)
    for options, program in NAMED.values():
        yield options, program, quick
    scale = 1
    while True:
        thorough = Limits(choices=128 * scale, depth=3)
        for length in (2, 3):
            programs = list(small_programs(length))
            Random(seed + scale).shuffle(programs)
            for program in programs:
                yield {}, program, Limits(choices=64 * scale, depth=3)
            if length == 2:
                for options, program in NAMED.values():
                    yield options, program, thorough
        scale *= 4


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    for number, (options, program, limits) in enumerate(share.mine(items(run.seed, run.first))):
        if share.over():
            return
        tally = Tally()
        explorer = Explorer(
            limits, tally, seed=run.seed + number, options=options, give_up=share.over, stop_at_first=run.stop_at_first
        )
        explorer.explore(program)
        yield tally


def run(run: Run) -> Result:
    """Run the part."""
    return spread("exhaustive", work, run)
