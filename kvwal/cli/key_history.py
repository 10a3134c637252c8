"""`history`: what each commit made of one key, a line for each."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import click

import kvwal
from kvwal.cli.forms import Form, form_options
from kvwal.cli.terminal import ASKED, LIMIT, binary_output, plain_json, store_path, when
from kvwal.cli.written import TableWriting, Writing, table_option

if TYPE_CHECKING:
    from kvwal.feed.key_versions import KeyVersion

__all__ = ["history"]


@click.command()
@store_path
@click.argument("key")
@form_options
@table_option
@click.option("--since", type=click.IntRange(min=0), help="Only this commit and later ones.")
@click.option("--until", type=click.IntRange(min=0), help="Only this commit and earlier ones.")
@click.option("--limit", "-n", type=LIMIT, help="Show at most this number.")
@click.option("--reverse", is_flag=True, help="Oldest first.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def history(
    path: str,
    key: str,
    form: Form,
    table: str | None,
    since: int | None,
    until: int | None,
    limit: int | None,
    reverse: bool,
    as_json: bool,
) -> None:
    """Show what the commits in the log made of KEY, newest first.

    A line has the commit, its time, "put", "delete", "expire" or "range", and the value, with tabs between. "expire" is
    the removal of a key that had expired, and "range" a deleted range that the key is in. What is escaped, and on a
    terminal shortened, is as in `scan`.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output = binary_output()
    if since is not None:
        click.get_current_context().meta[ASKED] = True
    with kvwal.open(path, "r") as db:
        newest = int(db.last_seqno)
        if since is not None and since > newest + 1:
            # One commit behind the newest is still to come, as for `changes --after` the newest.
            raise click.BadParameter(f"there is no commit {since}; the newest is {newest}", param_hint="--since")
        typed = None if table is None else TableWriting(db, table, form)
        writing = typed or Writing(form)
        table_id = 0 if typed is None else typed.table.id or 0
        for version in db.versions(
            writing.key(key), since=since, until=until, limit=limit, reverse=not reverse, table=table_id
        ):
            line = plain_json(_object(writing, version)) if as_json else _line(writing, version, width)
            output.write(f"{line}\n".encode())


def _object(writing: Writing, version: KeyVersion) -> dict[str, Any]:
    return {
        "seqno": version.seqno,
        "time": when(version.time_us),
        "time_us": version.time_us,
        "meta": version.meta,
        "cause": version.cause,
        "kind": version.kind,
        **({} if version.value is None else writing.json_value(version.value)),
    }


def _line(writing: Writing, version: KeyVersion, width: int | None) -> str:
    fields = [str(version.seqno), when(version.time_us), version.kind]
    if version.value is not None:
        fields.append(writing.show_value(version.value, width))
    return "\t".join(fields)
