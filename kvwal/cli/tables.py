"""`tables`: the tables of a store, their codecs and sizes."""

from __future__ import annotations

import click

import kvwal
from kvwal.cli.forms import Form, show
from kvwal.cli.terminal import print_json, store_path

__all__ = ["tables"]


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def tables(path: str, as_json: bool) -> None:
    """Show the tables of the store, by name: name, codec of keys, codec of values, number of keys, indexes.

    A line has them with tabs between, and is escaped as in `scan`.
    """
    with kvwal.open(path, "r") as db:
        found = db.tables()
    for info in found:
        if as_json:
            print_json(info)
        else:
            fields = [info.name, info.key, info.value, str(info.keys)]
            if info.indexes:
                fields.append("; ".join(map(_index, info.indexes)))
            click.echo("\t".join(show(Form.TEXT, field.encode("utf-8", "surrogateescape")) for field in fields))


def _index(info: kvwal.IndexInfo) -> str:
    return f"{info.name}: {info.codec}{'' if info.ready else ', not built'}"
