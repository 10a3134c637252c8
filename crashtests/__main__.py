"""`python -m crashtests`: run the parts, print the table, exit with 1 if anything is wrong."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
from typing import Any

from crashtests.console import Progress, Result, as_json, table
from crashtests.explorer import Case, Explorer, Limits, Tally
from crashtests.workers import Run

#: Part, its module, and its share of the time when all are run.
PARTS: dict[str, tuple[str, float]] = {
    "exhaustive": ("crashtests.exhaustive", 0.30),
    "random": ("crashtests.random_programs", 0.20),
    "sizes": ("crashtests.sizes", 0.08),
    "faults": ("crashtests.faults", 0.14),
    "bitflips": ("crashtests.bitflips", 0.08),
    "processes": ("crashtests.processes", 0.06),
    "filesystems": ("crashtests.filesystems", 0.03),
    "isolation": ("crashtests.isolation", 0.10),
    "past": ("crashtests.past", 0.08),
    "stopped": ("crashtests.stopped", 0.04),
    "mutants": ("crashtests.mutants", 0.06),
}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    # The store says when it repairs something; here that happens all the time.
    logging.getLogger("kvwal").addHandler(logging.NullHandler())
    if options.replay:
        return _replay(options.replay)
    names = options.part or list(PARTS)
    total = sum(PARTS[name][1] for name in names)
    progress = Progress(quiet=options.quiet)
    results: list[Result] = []
    for name in names:
        module_name, share = PARTS[name]
        seconds = options.minutes * 60 * share / total
        module: Any = importlib.import_module(module_name)
        run = Run(options.seed, time.monotonic() + seconds, seconds, options.jobs, progress, options.stop)
        if options.case and hasattr(module, "replay"):
            return int(module.replay(options.case, run))
        result = module.run(run)
        results.append(result)
        for note in result.notes:
            print(note)
        for violation in result.violations:
            print(f"VIOLATION in {name}: {violation}")
        sys.stdout.flush()
    print(f"seed {options.seed}, {options.minutes} minutes, {options.jobs} processes")
    print(table(results))
    if options.json:
        text = as_json(results, seed=options.seed, minutes=options.minutes, jobs=options.jobs)
        if options.json == "-":
            print(text)
        else:
            with open(options.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return int(any(result.violations for result in results))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m crashtests", description="Cut the power of kvwal everywhere.")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; may be given again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=4.0, help="for all parts together (default 4)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--json", metavar="FILE", help='also write the result as JSON ("-": print it)')
    parser.add_argument("--stop", action="store_true", help="stop a part at its first violation")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    parser.add_argument("--replay", metavar="CASE", help="run the one case that a violation printed")
    parser.add_argument("--case", help="a case of the given part, as a violation printed it")
    return parser.parse_args(arguments)


def _replay(text: str) -> int:
    case = Case.parse(text)
    print(f"{len(case.program)} steps, seed {case.seed}, options {case.options}")
    for number, choice in case.trail:
        print(f"power cut before operation {number}, survivors {choice}")
    Explorer(Limits(), Tally(), seed=case.seed).replay(case)
    print("nothing is wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
