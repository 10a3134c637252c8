"""What `bench.feeds`, `bench.past` and `bench.table_indexes` share: parts, turns, fresh processes, and a plain table.

In each part those that are compared take turns, round by round, and who goes first changes. A ratio is taken round by
round; what is shown is the median of the rounds, and in brackets the lowest and the highest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console
from rich.status import Status
from rich.table import Table

from bench.results import Figure
from bench.show import number

__all__ = ["Line", "Part", "Setting", "Size", "Wrong", "fresh", "in_turns", "ratios", "run_parts", "spread"]

_T = TypeVar("_T")


class Line(NamedTuple):
    """One figure: what it is of, what was measured, what is aimed at, and whether that was reached."""

    what: str
    measured: str
    aim: str = ""
    met: bool | None = None


class Size(NamedTuple):
    """A number that an option sets, for whole and for quick runs."""

    whole: int
    quick: int
    help: str


class Wrong(Exception):
    """A store did not do what it promises: not a matter of speed."""


@dataclass(frozen=True)
class Setting:
    """How a part is run: below which directory, with which sizes, and whom to tell what is under way."""

    directory: Path
    sizes: argparse.Namespace
    rounds: int
    say: Callable[[str], None]


class Part(NamedTuple):
    """Something that is measured."""

    help: str
    run: Callable[[Setting], Sequence[Line]]


def run_parts(
    prog: str, document: str | None, parts: Mapping[str, Part], sizes: Mapping[str, Size], arguments: list[str] | None
) -> int:
    """Run those parts that were asked for, and print what came of each. Exit status: 1 if one of them was wrong."""
    listing = "\n".join(f"  {name:10}{part.help}" for name, part in parts.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description=document,
        epilog=f"parts:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", action="append", choices=parts, metavar="PART", help="may be repeated; default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a minute or two")
    parser.add_argument("--rounds", type=int, help="of each comparison (default 5; quick 2)")
    parser.add_argument("--dir", default=".benchmarks", help="where stores are made; on the disk to measure")
    parser.add_argument("--width", type=int, help="columns of the terminal")
    for name, size in sizes.items():
        text = f"{size.help} (default {size.whole:,}; quick {size.quick:,})"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    given = parser.parse_args(arguments)
    for name, size in sizes.items():
        if getattr(given, name) is None:
            setattr(given, name, size.quick if given.quick else size.whole)
    rounds = given.rounds or (2 if given.quick else 5)
    console = Console(width=given.width)
    os.makedirs(given.dir, exist_ok=True)
    failed = False
    for name in given.only or parts:
        directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=given.dir))
        try:
            with console.status(f"{name} ...") as status:
                said = parts[name].run(Setting(directory, given, rounds, partial(_say, status, name)))
            _show(console, f"{name}: {parts[name].help}", said)
        except Wrong as error:
            console.print(f"[bold red]{name}: {error}[/bold red]")
            failed = True
        finally:
            shutil.rmtree(directory)
    return 1 if failed else 0


def _say(status: Status, name: str, text: str) -> None:
    status.update(f"{name}: {text}")


def _show(console: Console, title: str, lines: Sequence[Line]) -> None:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("figure", "measured", "aim", ""):
        table.add_column(column)
    words = {True: "[green]met[/green]", False: "[bold red]falls short[/bold red]", None: ""}
    for line in lines:
        table.add_row(line.what, line.measured, line.aim, words[line.met])
    console.print(table)


def fresh(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a module's function in a process of its own: no cache, heap or thread of an earlier call is left."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def in_turns(measures: Mapping[str, Callable[[], _T]], setting: Setting) -> dict[str, list[_T]]:
    """Measure all of them in each round."""
    found: dict[str, list[_T]] = {name: [] for name in measures}
    names = list(measures)
    for turn in range(setting.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            setting.say(f"round {turn + 1} of {setting.rounds}: {name}")
            found[name].append(measures[name]())
    return found


def ratios(costs: Sequence[float], others: Sequence[float]) -> Figure:
    """The first divided by the second, round by round."""
    return Figure(tuple(cost / other for cost, other in zip(costs, others, strict=True)))


def spread(figure: Figure, unit: str = "x") -> str:
    """The median, and in brackets the lowest and the highest."""
    return f"{number(figure.median)}{unit} ({number(figure.low)} to {number(figure.high)})"
