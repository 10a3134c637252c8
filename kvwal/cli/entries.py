"""`get`, `put`, `delete`, `scan`: single entries and ranges of them."""

from __future__ import annotations

import math
import shutil
import sys
from typing import BinaryIO

import click

import kvwal
from kvwal.cli.forms import Form, checked, form_options, meta_option, of_option, show
from kvwal.cli.moments import Moment, at_option, opened_at
from kvwal.cli.terminal import LIMIT, NoSuchKey, binary_output, complain, plain_json, print_json, store_path
from kvwal.cli.written import TableWriting, Writing, table_option
from kvwal.keys import as_value

__all__ = ["delete", "get", "put", "scan"]


@click.command()
@store_path
@click.argument("key")
@form_options
@table_option
@at_option
@click.option("--follow", "-f", is_flag=True, help="Print each value that it gets, too, a line for each.")
@click.option("--json", "as_json", is_flag=True, help="Print an object with key and value.")
def get(
    path: str, key: str, form: Form, table: str | None, at: Moment | None, follow: bool, as_json: bool
) -> None:
    """Print the value of KEY; exit code 1 if it is not there.

    In a pipe or a file the value arrives byte for byte, with no line end added. With --follow, and of a table whose
    values are shown as what they are, each value is a line, escaped as in `scan`. With --follow standard error says
    when the key is not there (any more); with --json, an object without a value does.
    """
    if follow:
        if at is not None:
            raise click.UsageError("give --at or --follow, not both")
        _follow(path, key, form, table, as_json)
        return
    with opened_at(path, at, form, table) as (db, writing):
        wanted = writing.key(key)
        value = db.get(wanted)
    if value is None:
        raise NoSuchKey(f"no such key: {writing.show_key(wanted)}")
    if as_json:
        print_json({**writing.json_key(wanted), **writing.json_value(value)})
    elif form is not Form.TEXT or writing.is_typed:
        click.echo(writing.show_value(value))
    elif sys.stdout.isatty():
        # Everything but the line ends is escaped, so that no value can control the terminal.
        for line in value.split(b"\n"):
            click.echo(show(form, line))
    else:
        binary_output().write(value)


def _follow(path: str, key: str, form: Form, table: str | None, as_json: bool) -> None:
    with kvwal.follow(path) as live:
        typed = None if table is None else TableWriting(live, table, form)
        writing = typed or Writing(form)
        wanted = writing.key(key)

        def tell(value: bytes | None) -> None:
            if as_json:
                print_json({**writing.json_key(wanted), **({} if value is None else writing.json_value(value))})
            elif value is None:
                complain(f"no such key: {writing.show_key(wanted)}")
            else:
                click.echo(writing.show_value(value))

        with live.bootstrap() as base:
            now = base.snapshot if typed is None else typed.read.within(base.snapshot).raw()
            tell(now.get(wanted))
            for change in base.changes(prefix=wanted, tables=0 if table is None else table, follow=True):
                if change.key == wanted:
                    tell(change.value)


@click.command()
@store_path
@click.argument("key")
@click.argument("value", required=False)
@form_options
@table_option
@meta_option("Keep this with the commit, such as who made it and why; may be given again.")
@click.option("--file", "source", type=click.File("rb"), help="Take the value from this file, byte for byte.")
@click.option(
    "--expire", "expire_s", type=float, metavar="SECONDS", help="It is absent after so long, 146,000 years at most."
)
def put(
    path: str,
    key: str,
    value: str | None,
    form: Form,
    table: str | None,
    meta: dict[str, str],
    source: BinaryIO | None,
    expire_s: float | None,
) -> None:
    """Set KEY to VALUE, and make it durable.

    Without VALUE, the value is what standard input holds, byte for byte; of a table it has to be what the codec makes.
    The store is made if there is none, and a table is not.
    """
    if value is not None and source is not None:
        raise click.UsageError("give VALUE or --file, not both")
    if expire_s is not None and not 0 < expire_s < math.inf:
        raise click.BadParameter(f"{expire_s} is no finite number of seconds above 0", param_hint="--expire")
    option = "VALUE" if source is None else "--file"
    with of_option(option):
        given = b"" if value is not None else checked(as_value, (source or sys.stdin.buffer).read())
    if table is not None:
        with kvwal.open(path, "w") as db:
            typed = TableWriting(db, table, form)
            data = typed.readable(given, option) if value is None else typed.value(value)
            typed.table.put(typed.key(key), data, expire_s=expire_s, meta=meta)
        return
    writing = Writing(form)
    name, data = writing.key(key), given if value is None else writing.value(value)
    with kvwal.open(path, "c") as db:
        db.put(name, data, expire_s=expire_s, meta=meta)


@click.command()
@store_path
@click.argument("keys", nargs=-1)
@form_options
@table_option
@meta_option("Keep this with the commit, such as who made it and why; may be given again.")
@click.option("--prefix", help="Delete every key that starts with this.")
@click.option("--yes", is_flag=True, help="Also if the prefix is empty, so that every key is deleted.")
def delete(
    path: str,
    keys: tuple[str, ...],
    form: Form,
    table: str | None,
    meta: dict[str, str],
    prefix: str | None,
    yes: bool,
) -> None:
    """Delete KEYS, all in one transaction; exit code 1 if one of them was not there."""
    if bool(keys) == (prefix is not None):
        raise click.UsageError("give KEYS or --prefix")
    with kvwal.open(path, "w") as db:
        typed = None if table is None else TableWriting(db, table, form)
        writing = typed or Writing(form)
        names = [writing.key(key) for key in keys]
        if prefix is not None:
            start, stop = writing.range(None, None, prefix)
            if not (start or stop or yes):
                # What a variable gives that was not set.
                raise click.UsageError("the prefix is empty, so every key would be deleted; to do that, give --yes")
            (typed.table if typed else db).delete_range(start, stop, meta=meta)
            return
        with db.transaction(meta=meta) as txn:
            within = typed.table.within(txn) if typed else txn
            missing = [name for name in names if within.get(name) is None]
            for name in names:
                within.delete(name)
    if missing:
        raise NoSuchKey("no such key: " + ", ".join(map(writing.show_key, missing)))


@click.command()
@store_path
@form_options
@table_option
@at_option
@click.option("--prefix", help="Only keys that start with this.")
@click.option("--start", help="From this key on.")
@click.option("--stop", help="Up to but without this key.")
@click.option("--reverse", is_flag=True, help="Last key first.")
@click.option("--limit", type=LIMIT, help="Print at most this number.")
@click.option("--keys", "keys_only", is_flag=True, help="Keys without their values.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, with key and value.")
def scan(
    path: str,
    form: Form,
    table: str | None,
    at: Moment | None,
    prefix: str | None,
    start: str | None,
    stop: str | None,
    reverse: bool,
    limit: int | None,
    keys_only: bool,
    as_json: bool,
) -> None:
    """Print entries in the order of their keys: key, tab, value.

    A backslash, a control character or a byte that is not UTF-8 is escaped, so that a line is always one entry.
    On a terminal long values are shortened.
    """
    if prefix is not None and (start is not None or stop is not None):
        raise click.UsageError("give --prefix, or --start and --stop")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output = binary_output()
    with opened_at(path, at, form, table) as (db, writing):
        first, last = writing.range(start, stop, prefix)
        if keys_only:
            for key in db.keys(first, last, reverse=reverse, limit=limit):
                line = plain_json(writing.json_key(key)) if as_json else writing.show_key(key)
                output.write(f"{line}\n".encode())
            return
        for key, value in db.scan(first, last, reverse=reverse, limit=limit):
            if as_json:
                line = plain_json({**writing.json_key(key), **writing.json_value(value)})
            else:
                line = f"{writing.show_key(key)}\t{writing.show_value(value, width)}"
            output.write(f"{line}\n".encode())
