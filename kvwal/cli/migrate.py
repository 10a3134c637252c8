"""`migrate`: values of a table that are stored in a former version of its codec, rewritten in the newest."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from functools import reduce
from typing import Any

import click

import kvwal
from kvwal.cli.forms import Form, meta_option
from kvwal.cli.terminal import EXIT_UNREADABLE, complain, count, print_facts, print_json, progress_bar, store_path
from kvwal.cli.written import AsItIs, TableWriting
from kvwal.codecs.codec import is_codec
from kvwal.errors import TableCodecError

__all__ = ["migrate"]


@click.command()
@store_path
@click.option("--table", "name", required=True, metavar="NAME", help="Of this table.")
@click.option(
    "--codec", "where", metavar="MODULE:NAME", help="The codec of the application, which is imported. It has versions."
)
@click.option(
    "--batch", type=click.IntRange(1, 100_000), default=500, show_default=True, help="Values in a commit, at the most."
)
@click.option("--dry-run", is_flag=True, help="Write nothing, and say what would be done.")
@meta_option("Keep this with each commit, such as who made it and why; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
def migrate(
    path: str, name: str, where: str | None, batch: int, dry_run: bool, meta: dict[str, str], as_json: bool
) -> None:
    """Rewrite values of former versions of a table's codec in the newest version.

    The codec is one that codecs.versioned made: --codec shop.models:users takes `users` of the module `shop.models`,
    which is looked for in the working directory, too. It runs as a part of this command.

    Interrupted at any moment, the same command goes on where it was. Exit code 8 if a value cannot be brought up; it
    stays as it is.
    """
    codec = None if where is None else _codec(where)
    with kvwal.open(path, "r" if dry_run else "w") as db:
        writing = TableWriting(db, name, Form.TEXT, quiet=True)
        key, value = writing.codecs
        if not value.name.startswith("versioned("):
            raise click.UsageError(
                f"values of table {name!r} are of codec {value}, and have no versions: there is nothing to migrate"
            )
        if codec is None:
            raise click.UsageError(
                f"values of table {name!r} are of codec {value}, which is the application's: "
                "name the one that writes the newest version, --codec MODULE:NAME"
            )
        try:
            table: kvwal.Table[bytes, Any] = db.table(name, AsItIs(key), codec)
        except TableCodecError as error:
            text = f"the values of table {name!r} are {error.has}, and {where} is {error.asked}"
            raise click.BadParameter(text, param_hint="--codec") from None
        with progress_bar("migrate") as progress:
            task = progress.add_task("migrate", total=None)
            try:
                report = table.migrate(
                    batch=batch,
                    dry_run=dry_run,
                    meta=meta,
                    progress=lambda done, total: progress.update(task, completed=done, total=total),
                )
            except TypeError as error:
                raise click.UsageError(str(error)) from None
    _print(report, dry_run, as_json)
    if report.unreadable:
        what = f"{count(report.unreadable, 'value')} could not be brought up"
        if report.first_unreadable is not None:
            first, reason = report.first_unreadable
            what += f"; the first is that of {writing.show_key(first)}: {reason}"
        complain(what)
        click.get_current_context().exit(EXIT_UNREADABLE)


def _print(report: kvwal.MigrationReport, dry_run: bool, as_json: bool) -> None:
    facts: dict[str, Any] = {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.name not in ("first_unreadable", "versions")
    }
    facts["dry_run"] = dry_run
    versions = dict(sorted(report.versions.items()))
    if as_json:
        print_json({**facts, "versions": versions})
    else:
        print_facts("Values", [*facts.items(), *((f"version {each}", many) for each, many in versions.items())])


def _codec(where: str) -> Any:
    """The codec that an argument names. click.BadParameter."""
    module, colon, name = where.partition(":")
    if not (module and colon and name):
        raise click.BadParameter(f"{where!r} is not of the form MODULE:NAME", param_hint="--codec")
    if os.getcwd() not in sys.path:
        # As for `python -m`: the installed command has the directory of the script there.
        sys.path.insert(0, os.getcwd())
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise click.BadParameter(f"{where}: {type(error).__name__}: {error}", param_hint="--codec") from error
    if not is_codec(found):
        raise click.BadParameter(
            f"{where} is no codec, but {type(found).__name__}; codecs.versioned makes one", param_hint="--codec"
        )
    return found
