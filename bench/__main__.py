"""`python -m bench`: run, show, report."""

from __future__ import annotations

import argparse
import fnmatch
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.against import AgainstError, built
from bench.peers import PEERS
from bench.plan import Case, Scale, cases
from bench.results import Results, machine
from bench.run import Runner
from bench.show import show_against, show_cases, show_settings, show_targets

_HERE: Final = os.path.dirname(os.path.abspath(__file__))
_RESULTS: Final = os.path.join(_HERE, "results.json")
# Options that take no value.
_SWITCHES: Final = ("--quick", "-h", "--help")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if a measurement failed."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options = parser.parse_args(_command_first(given))
    console = Console(width=options.width)
    if options.command == "run":
        # So that being told to end also ends the child that is measuring.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        return _run(console, options)
    results = Results.read(options.results)
    if options.command == "show":
        show_cases(console, results)
        show_against(console, results)
        show_targets(console, results)
        show_settings(console, results)
        return 0
    if options.command == "list":
        for case in cases(Scale()):
            console.print(f"{case.id:24}{case.title}{'' if not case.quick else '  (quick)'}", highlight=False)
        return 0
    from bench.report import write_report

    for line in write_report(results, options.document):
        console.print(line, highlight=False)
    return 0


def _command_first(given: list[str]) -> list[str]:
    """The arguments in argparse's order: options may stand before the command, and "run" goes without saying."""
    if given in (["-h"], ["--help"]):
        return given
    takes_value = False
    for at, one in enumerate(given):
        if not takes_value and not one.startswith("-"):
            return [one, *given[:at], *given[at + 1 :]]
        takes_value = one.startswith("-") and "=" not in one and one not in _SWITCHES
    return ["run", *given]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="kvwal against its peers.")
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--width", type=int, help="columns of the terminal")
    commands = parser.add_subparsers(dest="command", required=True)
    make: dict[str, Any] = {"parents": [common], "allow_abbrev": False}
    run = commands.add_parser("run", help="measure (the default)", **make)
    run.add_argument(
        "--only", action="append", metavar="CASE", help="cases by name or pattern, as in 'put.*' (see: list)"
    )
    run.add_argument("--quick", action="store_true", help="fewer cases, smaller and shorter: minutes")
    run.add_argument("--rounds", type=int, help="rounds of each case (default 3; with --against 7)")
    run.add_argument("--seconds", type=float, help="length of a measured loop")
    run.add_argument("--keys", type=int, help="keys of an ordinary data set")
    run.add_argument("--big", type=int, help="keys of the data set that does not fit in the cache")
    run.add_argument("--load", type=int, help="keys of the bulk load")
    run.add_argument("--tail", type=int, metavar="MIB", help="MiB of log to recover")
    run.add_argument("--peers", help="names, separated by commas; kvwal is always there")
    run.add_argument("--dir", default=".benchmarks", help="where the stores are made; on the disk to measure")
    run.add_argument("--out", help=f"results file (default: {os.path.relpath(_RESULTS)}; quick, against: in --dir)")
    run.add_argument(
        "--against",
        action="append",
        metavar="REV",
        default=[],
        help="an older commit, as one more peer (may be repeated)",
    )
    for name, text in (
        ("show", "print the tables of a results file"),
        ("report", "update the document and its pictures"),
    ):
        command = commands.add_parser(name, help=text, **make)
        command.add_argument("--results", default=_RESULTS)
        if name == "report":
            command.add_argument("--document", default=os.path.join(os.path.dirname(_HERE), "docs", "benchmarks.md"))
    listing = commands.add_parser("list", help="name the cases", **make)
    listing.set_defaults(results=_RESULTS)
    return parser


def _run(console: Console, options: argparse.Namespace) -> int:
    scale = Scale.small() if options.quick else Scale()
    chosen = {"rounds": options.rounds, "seconds": options.seconds, "keys": options.keys, "big": options.big}
    chosen |= {"load": options.load, "tail_bytes": options.tail << 20 if options.tail else None}
    if options.against:
        # Fewer could not tell a change from noise.
        scale = replace(scale, rounds=7)
    scale = replace(scale, **{name: value for name, value in chosen.items() if value is not None})
    plan = cases(scale)
    if options.only:
        # A case that is named is run, also if it is not one of the quick ones.
        every = cases(replace(scale, quick=False))
        plan = [case for case in every if any(fnmatch.fnmatch(case.id, pattern) for pattern in options.only)]
    if not plan:
        console.print("[red]no such case[/red]; see: python -m bench list")
        return 2
    names = tuple(PEERS)
    if options.peers:
        asked = {name.strip() for name in options.peers.split(",")} | {"kvwal"}
        unknown = asked - set(PEERS)
        if unknown:
            console.print(f"[red]no such peer: {', '.join(sorted(unknown))}[/red]; there are {', '.join(PEERS)}")
            return 2
        names = tuple(name for name in PEERS if name in asked)
    directory = os.path.abspath(options.dir)
    os.makedirs(directory, exist_ok=True)
    # What only compares commits stays out of the results that the document is made from.
    aside = "against.json" if options.against else "quick.json" if options.quick else ""
    out = options.out or (os.path.join(directory, aside) if aside else _RESULTS)
    with ExitStack() as stack:
        try:
            older = [stack.enter_context(built(revision, directory)) for revision in options.against]
        except AgainstError as error:
            console.print(str(error), style="red", markup=False)
            return 2
        runner = Runner(directory, scale, names, {one.name: one for one in older})
        stack.callback(runner.clean)
        # A run of some cases updates those and leaves the others; a quick one, or against a commit, starts anew.
        results = Results() if aside and not options.only else Results.read(out)
        results.data["machine"] = machine(directory)
        results.data["versions"] = {**results.data["versions"], **runner.versions}
        results.data["missing"] = runner.missing
        begun = perf_counter()
        _measure(console, runner, plan, results, out)
    done = [case.id for case in plan]
    show_cases(console, results, done)
    show_against(console, results, done)
    show_settings(console, results)
    if not options.only:
        show_targets(console, results)
    console.print(f"{len(done)} cases in {(perf_counter() - begun) / 60:.1f} minutes; written to {out}")
    failed = any("failed" in found for id in done for found in results.cases[id]["peers"].values())
    return 1 if failed else 0


def _measure(console: Console, runner: Runner, plan: list[Case], results: Results, out: str) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("all cases", total=sum(runner.steps(case) for case in plan))
        part = progress.add_task("", total=1)
        for case in plan:
            progress.reset(part, total=runner.steps(case), description=case.id)

            def step(peer: str, id: str = case.id) -> None:
                progress.update(part, description=f"{id}: {peer}", advance=1)
                progress.update(whole, advance=1)

            results.cases[case.id] = runner.run(case, step)
            # After each case: what was measured is not lost if the run is interrupted.
            results.in_order(cases(replace(runner.scale, quick=False)))
            results.write(out)


if __name__ == "__main__":
    sys.exit(main())
