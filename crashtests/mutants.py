"""The proof of the harness: deliberate defects, each of which it must find within a minute.

A part begins with the cases that killed the mutant before, if some are noted with it, and goes on with all the others:
the same search with the same oracle, in another order.
"""

from __future__ import annotations

import importlib
import re
import time
from typing import Any

from crashtests.backup_mutations import BACKUP_MUTANTS
from crashtests.console import Progress, Result
from crashtests.mutations import MUTANTS, DoesNotApply, Mutant, applied
from crashtests.workers import Run

ALL = (*MUTANTS, *BACKUP_MUTANTS)
#: A mutant that lives longer than this has survived.
LIMIT_S = 60.0

#: A mutant that dies of these is broken code; the oracle did not kill it.
_BROKEN = ("NameError", "UnboundLocalError", "AttributeError", "ImportError", "TypeError", "the harness failed")

_MODULES = {
    "exhaustive": "crashtests.exhaustive",
    "faults": "crashtests.faults",
    "bitflips": "crashtests.bitflips",
    "random": "crashtests.random_programs",
    "sizes": "crashtests.sizes",
    "isolation": "crashtests.isolation",
    "past": "crashtests.past",
    "tests": "crashtests.suite",
}


def hunt(mutant: Mutant, run: Run) -> Result:
    """Run the mutant's part until it finds something."""
    part: Any = importlib.import_module(_MODULES[mutant.part])
    deadline_s = time.monotonic() + LIMIT_S
    limited = Run(run.seed, deadline_s, LIMIT_S, run.jobs, Progress(quiet=True), True, mutant.first)
    with applied(mutant):
        result: Result = part.run(limited)
    return result


def run(run: Run) -> Result:
    """Run all of them, whatever the time: a mutant that was not tried proves nothing."""
    started_s = time.monotonic()
    result = Result("mutants")
    print(f"{'mutant':<62} {'killed by':<11} {'states':>7} {'s':>5}  what it found", flush=True)
    for number, mutant in enumerate(ALL):
        elapsed_s = time.monotonic() - started_s
        run.progress.show("mutants", number / len(ALL), result.states, elapsed_s, len(result.violations))
        try:
            found = hunt(mutant, run)
        except DoesNotApply as error:
            result.violations.append(f"the mutant {mutant.name!r} does not apply: {error}")
            continue
        result.states += found.states
        result.faults += found.faults
        killed = bool(found.violations)
        what = re.sub(r"\s+", " ", found.violations[0])[:100] if killed else ""
        if what.startswith(_BROKEN):
            result.violations.append(f"the mutant {mutant.name!r} is no defect but broken code: {found.violations[0]}")
        if not killed:
            result.violations.append(f"the mutant {mutant.name!r} survived {found.states} states of {mutant.part}")
        killer = mutant.part if killed else "SURVIVED"
        run.progress.clear()
        print(f"{mutant.name:<62} {killer:<11} {found.states:>7} {found.seconds:>5.1f}  {what}", flush=True)
        result.details.append(
            {
                "mutant": mutant.name,
                "part": mutant.part,
                "killed": killed,
                "states": found.states,
                "seconds": round(found.seconds, 2),
                "found": what,
            }
        )
    result.seconds = time.monotonic() - started_s
    return result
