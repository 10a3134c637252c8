"""Part 2: programs made by Hypothesis, from several logical clients, cut at random; and long ones for volume.

A failing program is shrunk by Hypothesis before it is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings

from crashtests.console import Result
from crashtests.explorer import Explorer, Limits, Tally
from crashtests.programs import PROGRAMS, long_program
from crashtests.session import Program
from crashtests.workers import Run, Share, spread

_LIMITS = Limits(choices=8, depth=3, nested_every=12, deeper_every=6, nested_choices=2)
_EXAMPLES = 8


class _Found(Exception):
    """A program broke the contract; Hypothesis looks for a shorter one."""


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    batch = 0
    while not share.over():
        seed = run.seed * 100_000 + batch * share.count + share.index
        yield _made_by_hypothesis(seed, share)
        if batch % 5 == 4:
            yield _long(seed, share)
        batch += 1


def _made_by_hypothesis(seed: int, share: Share) -> Tally:
    tally = Tally()
    smallest: list[Tally] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=_EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @hypothesis.given(PROGRAMS)
    def cut_everywhere(program: Program) -> None:
        # What was found is made smaller even after the end.
        if share.over() and not smallest:
            return
        found = Tally()
        Explorer(_LIMITS, found, seed=seed, stop_at_first=True, give_up=lambda: share.over() and not smallest).explore(
            program
        )
        tally.states += found.states
        tally.nested += found.nested
        if found.violations:
            smallest[:] = [found]
            raise _Found

    try:
        cut_everywhere()
    except _Found:
        pass
    if smallest:
        tally.violations = smallest[0].violations[:1]
    return tally


def _long(seed: int, share: Share) -> Tally:
    tally = Tally()
    random = Random(seed)
    program = long_program(random, random.choice((30, 60, 120)))
    options: dict[str, Any] = {"durability": random.choice(("commit", "commit", "commit", "os"))}
    if random.random() < 0.5:
        # Bases a segment or two apart, and a window of a few of them.
        options["keep_history_bytes"] = random.choice((40, 100)) << 10
    if random.random() < 0.15:
        options["preallocate"] = "zeros"
    limits = Limits(choices=6, depth=3, nested_every=24, deeper_every=8, nested_choices=2)
    Explorer(limits, tally, seed=seed, options=options, give_up=share.over, stop_at_first=True).explore(program)
    return tally


def run(run: Run) -> Result:
    """Run the part."""
    return spread("random", work, run)
