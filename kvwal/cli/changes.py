"""`changes`: what commits changed, oldest first, a line for each key or range."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

import kvwal
from kvwal.cli.forms import Form, form_options, parse_key, shortened, show, to_json
from kvwal.cli.moments import POSITION
from kvwal.cli.terminal import binary_output, store_path, when

if TYPE_CHECKING:
    from kvwal.feed.change import Change

__all__ = ["changes"]


@click.command()
@store_path
@form_options
@click.option("--after", type=POSITION, help="Only commits after this one: a seqno, or a position (LINE:SEQNO).")
@click.option("--prefix", "prefixes", multiple=True, help="Only keys that begin with this, or with one of several.")
@click.option("--limit", "-n", type=click.IntRange(min=0), help="Show at most this number of changes.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def changes(
    path: str, form: Form, after: int | None, prefixes: tuple[str, ...], limit: int | None, as_json: bool
) -> None:
    """Show what the commits in the log changed, oldest first.

    A line has the commit, the table, "put", "delete" or "delete_range", the key, and the value or the end of the range,
    with tabs between. What is escaped, and on a terminal shortened, is as in `scan`.
    """
    wanted = [parse_key(form, prefix) for prefix in prefixes] or b""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output = binary_output()
    with kvwal.open(path, "r") as db, db.changes(after, prefix=wanted) as found:
        for change in islice(found, limit):
            line = json.dumps(_object(form, change), ensure_ascii=False) if as_json else _line(form, change, width)
            output.write(f"{line}\n".encode())


def _object(form: Form, change: Change) -> dict[str, Any]:
    return {
        "seqno": change.seqno,
        "time": when(change.time_us),
        "time_us": change.time_us,
        "meta": change.meta,
        "cause": change.cause,
        "table": change.table,
        "kind": change.kind,
        **to_json(form, "key", change.key),
        **({} if change.stop is None else to_json(form, "stop", change.stop)),
        **({} if change.value is None else to_json(form, "value", change.value)),
        "last": change.last,
    }


def _line(form: Form, change: Change, width: int | None) -> str:
    fields = [str(change.seqno), str(change.table), change.kind, show(form, change.key)]
    if change.stop is not None:
        fields.append(show(form, change.stop))
    if change.value is not None:
        fields.append(shortened(form, change.value, width))
    return "\t".join(fields)
