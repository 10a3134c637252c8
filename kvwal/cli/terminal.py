"""What the commands share: where output goes, how it looks there, and the errors that are only the command line's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any, BinaryIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvwal.times import time_of

__all__ = [
    "ASKED",
    "EXIT_DAMAGED",
    "EXIT_UNREADABLE",
    "LIMIT",
    "BadInput",
    "NoSuchKey",
    "PathType",
    "binary_output",
    "complain",
    "count",
    "human_bytes",
    "print_facts",
    "plain_json",
    "print_json",
    "progress_bar",
    "store_path",
    "when",
]

#: Something in the store is not what kvwal wrote there.
EXIT_DAMAGED = 3
#: A value cannot be read with the codec of its table.
EXIT_UNREADABLE = 8

#: Set in the `meta` of click's context: the command line asks for a moment or a position.
ASKED = "kvwal.asked"
#: At most this number of what is printed.
LIMIT = click.IntRange(0, sys.maxsize)


class PathType(click.Path):
    """A path. Whether something is there, and may be read, is left to what opens it, whose errors say more."""

    def __init__(self) -> None:
        super().__init__(readable=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            # What a variable gives that was not set.
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


#: A store's directory.
store_path = click.argument("path", type=PathType())


class NoSuchKey(Exception):  # the name of the exit code
    """A key that was asked for is not there."""


class BadInput(Exception):
    """Something that was read is not in the form it should be."""


def complain(text: str) -> None:
    """Say something on standard error, as other programs do."""
    click.echo(f"kvwal: {text}", err=True)


def binary_output() -> BinaryIO:
    """Standard output for bytes as they are."""
    return sys.stdout.buffer


def print_json(value: Any) -> None:
    """One value as one line of JSON, its bytes in hex and its dataclasses and named tuples as objects."""
    click.echo(plain_json(_named(value)))


def _named(value: Any) -> Any:
    """The same with an object for each dataclass and named tuple, which is a list to JSON."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _named(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _named(each) for name, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list | tuple) else value


def plain_json(value: Any, *, finite: bool = False) -> str:
    """The same as text. ValueError if it is to be `finite`, and a float in it is not."""
    return json.dumps(value, ensure_ascii=False, default=_plain, allow_nan=not finite)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if hasattr(value, "__dataclass_fields__"):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    if hasattr(value, "_asdict"):
        return value._asdict()
    if hasattr(value, "name") and hasattr(value, "value"):
        return value.name
    if isinstance(value, Iterable) and not isinstance(value, str):
        return list(value)
    return str(value)


def print_facts(title: str, facts: Iterable[tuple[str, Any]], *, prefix: str = "") -> None:
    """Names and values: a table for people on a terminal, `prefix.name<TAB>value` lines as they are elsewhere."""
    if not sys.stdout.isatty():
        for name, value in facts:
            click.echo(f"{prefix}{name}\t{_cell(value)}")
        return
    table = Table(title=title, title_justify="left", show_header=False)
    # Nothing is cut, however narrow the terminal is.
    table.add_column(style="cyan", overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, value in facts:
        if name.endswith("_us") and type(value) is int:
            table.add_row(name.removesuffix("_us"), when(value) if value else "-")
        elif name.endswith("_bytes") and type(value) is int:
            table.add_row(name.removesuffix("_bytes"), human_bytes(value))
        elif name.endswith(("_s", "seconds")) and type(value) is float:
            table.add_row(name.removesuffix("_s"), f"{value:.3g} s")
        else:
            table.add_row(name, f"{value:,}" if type(value) is int else _cell(value))
    # A name or an error may have anything in it, also what rich takes for markup.
    Console(highlight=False, markup=False).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | int):
        return str(value)
    return "" if value is None else json.dumps(value, default=_plain)


def progress_bar(what: str, *, quiet: bool = False) -> Progress:
    """A progress bar on standard error, if that is a terminal and not `quiet`; otherwise nothing is shown."""
    console = Console(stderr=True)
    return Progress(
        TextColumn(what),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
        transient=True,
    )


def human_bytes(size: float) -> str:
    """A size for people: three digits and a unit of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count(number: int, what: str) -> str:
    """A number and what is counted, in the plural where that is right."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def when(time_us: int) -> str:
    """A commit's time in UTC, to the microsecond, as `--at` takes it."""
    return time_of(time_us).isoformat(timespec="microseconds")
