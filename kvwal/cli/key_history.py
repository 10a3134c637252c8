"""`history`: what each commit made of one key, a line for each."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import click

import kvwal
from kvwal.cli.forms import Form, form_options, parse_key, shortened, to_json
from kvwal.cli.terminal import binary_output, store_path, when

if TYPE_CHECKING:
    from kvwal.feed.key_versions import KeyVersion

__all__ = ["history"]


@click.command()
@store_path
@click.argument("key")
@form_options
@click.option("--since", type=click.IntRange(min=0), help="Only this commit and later ones.")
@click.option("--until", type=click.IntRange(min=0), help="Only this commit and earlier ones.")
@click.option("--limit", "-n", type=click.IntRange(min=0), help="Show at most this number.")
@click.option("--reverse", is_flag=True, help="Oldest first.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def history(
    path: str,
    key: str,
    form: Form,
    since: int | None,
    until: int | None,
    limit: int | None,
    reverse: bool,
    as_json: bool,
) -> None:
    """Show what the commits in the log made of KEY, newest first.

    A line has the commit, its time, "put", "delete" or "range", and the value, with tabs between. "range" is a deleted
    range that the key is in. What is escaped, and on a terminal shortened, is as in `scan`.
    """
    wanted = parse_key(form, key)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output = binary_output()
    with kvwal.open(path, "r") as db:
        for version in db.versions(wanted, since=since, until=until, limit=limit, reverse=not reverse):
            line = json.dumps(_object(form, version), ensure_ascii=False) if as_json else _line(form, version, width)
            output.write(f"{line}\n".encode())


def _object(form: Form, version: KeyVersion) -> dict[str, Any]:
    return {
        "seqno": version.seqno,
        "time": when(version.time_us),
        "time_us": version.time_us,
        "meta": version.meta,
        "kind": version.kind,
        **({} if version.value is None else to_json(form, "value", version.value)),
    }


def _line(form: Form, version: KeyVersion, width: int | None) -> str:
    fields = [str(version.seqno), when(version.time_us), version.kind]
    if version.value is not None:
        fields.append(shortened(form, version.value, width))
    return "\t".join(fields)
