"""Past moments on the command line: the option `--at`, and `diff`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from typing import Any

import click

import kvwal
from kvwal.cli.forms import Form, form_options
from kvwal.cli.terminal import ASKED, binary_output, plain_json, store_path
from kvwal.cli.written import TableWriting, TypedWriting, Writing, row_in, table_option
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.engine.readers import Reader
from kvwal.engine.tables import CodecName, TableRow
from kvwal.feed.difference import differences
from kvwal.feed.line import moment_of
from kvwal.tables.within import Empty

__all__ = ["MOMENT", "POSITION", "Moment", "at_option", "diff", "opened_at", "snapshot_at"]

Moment = int | datetime


class _MomentType(click.ParamType):  # type: ignore[type-arg]  # it has none before 8.2
    """A seqno, a position, or a time."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Moment:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # a default
        if ctx is not None:
            ctx.meta[ASKED] = True
        if value.isdecimal():
            return int(value)
        with suppress(ValueError):
            return kvwal.Position.parse(value)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no seqno, no LINE:SEQNO, and no time such as 2026-01-31T12:00:00Z", param, ctx)
        if moment.tzinfo is None:
            self.fail(f"{value!r} has no time zone; {moment.isoformat()}Z is UTC", param, ctx)
        return moment


class _PositionType(click.ParamType):  # type: ignore[type-arg]  # it has none before 8.2
    """A seqno of the store, or a position with its line."""

    name = "position"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # a default
        if ctx is not None:
            ctx.meta[ASKED] = True
        try:
            return int(value) if value.isdecimal() else kvwal.Position.parse(value)
        except ValueError:
            self.fail(f"{value!r} is no position, LINE:SEQNO as kvwal stats shows it, and no seqno", param, ctx)


MOMENT = _MomentType()
#: What an output goes on after.
POSITION = _PositionType()
#: A past moment to read from.
at_option = click.option(
    "--at", type=MOMENT, help="As it was at this commit (also as LINE:SEQNO), or this time (2026-01-31T12:00:00Z)."
)


@contextmanager
def snapshot_at(db: kvwal.Store, at: Moment | None, option: str = "--at") -> Iterator[kvwal.Snapshot]:
    """The store at a moment, given as `option`; None: now. One that is still to come is a mistake: BadParameter."""
    try:
        snapshot = db.snapshot(at=at)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=f"'{option}'") from None
    with snapshot:
        yield snapshot


@contextmanager
def opened_at(path: str, at: Moment | None, form: Form, table: str | None) -> Iterator[tuple[OrderedMapping, Writing]]:
    """The store, or a table of it, at a moment (None: now), for reading, and how it is written."""
    with ExitStack() as stack:
        db = stack.enter_context(kvwal.open(path, "r"))
        snapshot = None if at is None else stack.enter_context(snapshot_at(db, at))
        row = None if table is None or snapshot is None else row_in(snapshot, table)
        if table is None:
            yield db if snapshot is None else snapshot, Writing(form)
        elif snapshot is None or row is None:
            # One that was made later was empty then.
            typed = TableWriting(db, table, form)
            yield typed.read.raw() if snapshot is None else Empty(), typed
        else:
            yield snapshot.part(row.id), TypedWriting(form, table, row.key, row.value)


def _at_both(db: kvwal.Store, a: Moment, b: Moment | None, name: str | None, form: Form) -> Writing:
    """How the store, or a table, of two moments (None: now) is written.

    TableNotFoundError if the table is of neither, nor of now; click.BadParameter for a moment that is still to come.
    """
    rows: list[TableRow] = []
    for moment, argument in ((a, "A"), (b, "B")):
        with snapshot_at(db, moment, argument) as snapshot:
            row = None if name is None else row_in(snapshot, name)
        rows += [] if row is None else [row]
    if name is None:
        return Writing(form)
    if not rows:
        return TableWriting(db, name, form)
    key, value = _newest(name, "keys", [row.key for row in rows]), _newest(name, "values", [row.value for row in rows])
    return TypedWriting(form, name, key, value)


def _newest(name: str, what: str, codecs: list[CodecName]) -> CodecName:
    """The newest version of a codec, which stands for the older ones too. click.UsageError if they are several."""
    if codecs[0].name != codecs[-1].name:
        raise click.UsageError(
            f"the {what} of table {name!r} are {codecs[0]} at one moment, and {codecs[-1]} at the other, and are not "
            "compared; scan --at shows those of each"
        )
    return max(codecs, key=lambda codec: codec.version)


@click.command()
@store_path
@click.argument("a", type=MOMENT)
@click.argument("b", type=MOMENT, required=False)
@form_options
@table_option
@click.option("--prefix", help="Only keys that start with this.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def diff(
    path: str, a: Moment, b: Moment | None, form: Form, table: str | None, prefix: str | None, as_json: bool
) -> None:
    """Show the keys whose values at moment B (by default: now) are others than at moment A, in order.

    A moment is a commit, by its seqno or as LINE:SEQNO, or a time such as 2026-01-31T12:00:00Z. A line has "-", the key
    and a value that was, or "+", the key and a value that is, with tabs between. What is escaped, and on a terminal
    shortened, is as in `scan`.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output = binary_output()
    with kvwal.open(path, "r") as db:
        writing = _at_both(db, a, b, table, form)

        def table_at(reader: Reader) -> int | None:
            if table is None:
                return 0
            row = db.engine.tables.row_at(reader, table)
            return None if row is None else row.id

        first, last = moment_of(db.engine, "a", a), None if b is None else moment_of(db.engine, "b", b)
        bounds = Bounds(*writing.range(None, None, prefix), None, False, None)
        for key, old, new in differences(db.engine, first, last, bounds, table_at, db):
            if as_json:
                line = writing.json_key(key)
                line |= {} if old is None else writing.json_value(old, "old")
                line |= {} if new is None else writing.json_value(new, "new")
                output.write(f"{plain_json(line)}\n".encode())
                continue
            for sign, value in (("-", old), ("+", new)):
                if value is not None:
                    output.write(f"{sign}\t{writing.show_key(key)}\t{writing.show_value(value, width)}\n".encode())
