"""`tables`: the tables of a store, their codecs and sizes. `table`: dropping and renaming one."""

from __future__ import annotations

import sys

import click

import kvwal
from kvwal.cli.forms import Form, meta_option, show
from kvwal.cli.terminal import EXIT_DAMAGED, complain, count, print_json, store_path
from kvwal.cli.written import as_name
from kvwal.errors import TableNotFoundError

__all__ = ["table", "tables"]


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def tables(path: str, as_json: bool) -> None:
    """Show the tables of the store, by name: name, codec of keys, codec of values, number of keys, indexes.

    A line has them with tabs between, and is escaped as in `scan`. Exit code 3 if one of them cannot be used.
    """
    with kvwal.open(path, "r") as db:
        found = db.tables()
    for info in found:
        if as_json:
            print_json(info)
        elif info.problem is None:
            fields = [info.name, info.key, info.value, str(info.keys)]
            if info.indexes:
                fields.append("; ".join(map(_index, info.indexes)))
            click.echo("\t".join(show(Form.TEXT, field.encode("utf-8", "surrogateescape")) for field in fields))
        if info.problem is not None:
            complain(f"table {info.name!r}: {info.problem}")
    if any(info.problem is not None for info in found):
        click.get_current_context().exit(EXIT_DAMAGED)


def _index(info: kvwal.IndexInfo) -> str:
    return f"{info.name}: {info.codec}{'' if info.ready else f', not built: {info.problem}'}"


@click.group()
def table() -> None:
    """Drop or rename a table."""


_WHY = "Keep this with the commit, such as who made it and why; may be given again."


@table.command()
@store_path
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
@meta_option(_WHY)
def drop(path: str, name: str, yes: bool, meta: dict[str, str]) -> None:
    """Remove the table NAME and everything in it.

    On a terminal it asks first; elsewhere it wants --yes. Past moments still have the table.
    """
    with kvwal.open(path, "w") as db:
        row = db.engine.tables.row(as_name(name, "NAME"))
        if row is None:
            raise TableNotFoundError(name)
        if not yes:
            keys = count(db.engine.reads.count(table=row.id), "key")
            if not sys.stdin.isatty():
                raise click.UsageError(f"table {name!r} has {keys}; to drop it, give --yes")
            if not click.confirm(f"Drop table {name!r} with {keys}?", err=True):
                click.get_current_context().exit(1)
        seqno = db.drop_table(name, meta=meta)
    complain(f"table {name!r} was dropped by commit {seqno}")


@table.command()
@store_path
@click.argument("name", metavar="OLD")
@click.argument("new")
@meta_option(_WHY)
def rename(path: str, name: str, new: str, meta: dict[str, str]) -> None:
    """Give the table OLD the name NEW, which no other table may have."""
    with kvwal.open(path, "w") as db:
        seqno = db.rename_table(as_name(name, "OLD"), as_name(new, "NEW"), meta=meta)
    complain(f"table {name!r} is {new!r} as of commit {seqno}")
