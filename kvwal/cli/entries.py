"""`get`, `put`, `delete`, `scan`: single entries and ranges of them."""

from __future__ import annotations

import json
import shutil
import sys
from typing import BinaryIO

import click

import kvwal
from kvwal.cli.forms import Form, checked, form_options, meta_option, parse, parse_key, shortened, show, to_json
from kvwal.cli.moments import Moment, at_option, opened_at
from kvwal.cli.terminal import NoSuchKey, binary_output, print_json, store_path
from kvwal.keys import as_value, prefix_stop

__all__ = ["delete", "get", "put", "scan"]


@click.command()
@store_path
@click.argument("key")
@form_options
@at_option
@click.option("--json", "as_json", is_flag=True, help="Print an object with key and value.")
def get(path: str, key: str, form: Form, at: Moment | None, as_json: bool) -> None:
    """Print the value of KEY; exit code 1 if it is not there.

    In a pipe or a file the value arrives byte for byte, with no line end added.
    """
    wanted = parse_key(form, key)
    with opened_at(path, at) as db:
        value = db.get(wanted)
    if value is None:
        raise NoSuchKey(f"no such key: {show(form, wanted)}")
    if as_json:
        print_json({**to_json(form, "key", wanted), **to_json(form, "value", value)})
    elif form is not Form.TEXT:
        click.echo(show(form, value))
    elif sys.stdout.isatty():
        # Everything but the line ends is escaped, so that no value can control the terminal.
        for line in value.split(b"\n"):
            click.echo(show(form, line))
    else:
        binary_output().write(value)


@click.command()
@store_path
@click.argument("key")
@click.argument("value", required=False)
@form_options
@meta_option("Keep this with the commit, such as who made it and why; may be given again.")
@click.option("--file", "source", type=click.File("rb"), help="Take the value from this file, byte for byte.")
def put(
    path: str, key: str, value: str | None, form: Form, meta: dict[str, str], source: BinaryIO | None
) -> None:
    """Set KEY to VALUE, and make it durable.

    Without VALUE, the value is what standard input holds, byte for byte. The store is made if there is none.
    """
    if value is not None and source is not None:
        raise click.UsageError("give VALUE or --file, not both")
    name = parse_key(form, key)
    data = checked(as_value, parse(form, value) if value is not None else (source or sys.stdin.buffer).read())
    with kvwal.open(path, "c") as db:
        db.put(name, data, meta=meta)


@click.command()
@store_path
@click.argument("keys", nargs=-1)
@form_options
@meta_option("Keep this with the commit, such as who made it and why; may be given again.")
@click.option("--prefix", help="Delete every key that starts with this.")
def delete(path: str, keys: tuple[str, ...], form: Form, meta: dict[str, str], prefix: str | None) -> None:
    """Delete KEYS, all in one transaction; exit code 1 if one of them was not there."""
    if bool(keys) == (prefix is not None):
        raise click.UsageError("give KEYS or --prefix")
    names = [parse_key(form, key) for key in keys]
    start = None if prefix is None else parse_key(form, prefix)
    with kvwal.open(path, "w") as db:
        if start is not None:
            db.delete_range(start, prefix_stop(start), meta=meta)
            return
        with db.transaction(meta=meta) as txn:
            missing = [name for name in names if txn.get(name) is None]
            for name in names:
                txn.delete(name)
    if missing:
        raise NoSuchKey("no such key: " + ", ".join(show(form, name) for name in missing))


@click.command()
@store_path
@form_options
@at_option
@click.option("--prefix", help="Only keys that start with this.")
@click.option("--start", help="From this key on.")
@click.option("--stop", help="Up to but without this key.")
@click.option("--reverse", is_flag=True, help="Last key first.")
@click.option("--limit", type=click.IntRange(min=0), help="Print at most this number.")
@click.option("--keys", "keys_only", is_flag=True, help="Keys without their values.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, as `dump` writes them.")
def scan(
    path: str,
    form: Form,
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
    first, last, common = (None if text is None else parse_key(form, text) for text in (start, stop, prefix))
    output = binary_output()
    with opened_at(path, at) as db:
        if keys_only:
            for key in db.keys(first, last, prefix=common, reverse=reverse, limit=limit):
                line = json.dumps(to_json(form, "key", key), ensure_ascii=False) if as_json else show(form, key)
                output.write(f"{line}\n".encode())
            return
        for key, value in db.scan(first, last, prefix=common, reverse=reverse, limit=limit):
            if as_json:
                line = json.dumps({**to_json(form, "key", key), **to_json(form, "value", value)}, ensure_ascii=False)
            else:
                line = f"{show(form, key)}\t{shortened(form, value, width)}"
            output.write(f"{line}\n".encode())
