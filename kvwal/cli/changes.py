"""`changes`: what commits changed, oldest first, a line for each key or range."""

from __future__ import annotations

import select
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import click

import kvwal
from kvwal.cli.forms import Form, form_options, show, to_json
from kvwal.cli.moments import POSITION
from kvwal.cli.terminal import LIMIT, binary_output, plain_json, store_path, when
from kvwal.cli.written import TableNames, TableWriting, Writing, table_option

if TYPE_CHECKING:
    from kvwal.feed.change import Change

__all__ = ["changes"]

# How often that is, while there are no changes.
_LOOK_S: Final = 0.5


@click.command()
@store_path
@form_options
@table_option
@click.option("--after", type=POSITION, help="Only commits after this one: a seqno, or a position (LINE:SEQNO).")
@click.option("--prefix", "prefixes", multiple=True, help="Only keys that begin with this, or with one of several.")
@click.option("--limit", "-n", type=LIMIT, help="Show at most this number of changes.")
@click.option("--follow", "-f", is_flag=True, help="Wait for what comes, beside the process that writes the store.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def changes(
    path: str,
    form: Form,
    table: str | None,
    after: int | None,
    prefixes: tuple[str, ...],
    limit: int | None,
    follow: bool,
    as_json: bool,
) -> None:
    """Show what the commits in the log changed, oldest first.

    A line has the commit, the name of the table (0 for the default table, its number for one that was dropped), "put",
    "delete", "delete_range" or "expire", the key, and the value or the end of the range, with tabs between. What is
    escaped, and on a terminal shortened, is as in `scan`. Bounds of ranges are
    bytes, in tables too, since they need not be keys.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    output = binary_output()
    with kvwal.follow(path) if follow else kvwal.open(path, "r") as db:
        writing = Writing(form) if table is None else TableWriting(db, table, form)
        wanted = [writing.range(None, None, prefix).start for prefix in prefixes] or b""
        names = TableNames(db)
        beat_s = _LOOK_S if follow else None
        with db.changes(after, prefix=wanted, tables=table, follow=follow, heartbeat_s=beat_s) as found:
            for change in islice(_told(found), limit):
                line = plain_json(_object(writing, names, change)) if as_json else _line(writing, names, change, width)
                output.write(f"{line}\n".encode())
                if follow:
                    output.flush()


def _told(found: Iterable[Change]) -> Iterator[Change]:
    """The changes without heartbeats, at which it is seen whether anyone still reads them. BrokenPipeError if not."""
    for change in found:
        if change.kind != "heartbeat":
            yield change
        elif hasattr(select, "poll"):
            output = select.poll()
            # Whatever is asked for, it tells that the other end of a pipe is closed.
            output.register(sys.stdout.fileno(), 0)
            if any(event & select.POLLERR for _, event in output.poll(0)):
                raise BrokenPipeError


def _object(writing: Writing, names: TableNames, change: Change) -> dict[str, Any]:
    is_range = change.kind == "delete_range"
    return {
        "seqno": change.seqno,
        "time": when(change.time_us),
        "time_us": change.time_us,
        "meta": change.meta,
        "cause": change.cause,
        "table": change.table,
        "table_name": names.of(change.table) if change.table else None,
        "kind": change.kind,
        **(to_json(writing.form, "key", change.key) if is_range else writing.json_key(change.key)),
        **({} if change.stop is None else to_json(writing.form, "stop", change.stop)),
        **({} if change.value is None else writing.json_value(change.value)),
        "last": change.last,
    }


def _line(writing: Writing, names: TableNames, change: Change, width: int | None) -> str:
    is_range = change.kind == "delete_range"
    key = show(writing.form, change.key) if is_range else writing.show_key(change.key)
    name = names.of(change.table) if change.table else None
    table = str(change.table) if name is None else show(Form.TEXT, name.encode())
    fields = [str(change.seqno), table, change.kind, key]
    if change.stop is not None:
        fields.append(show(writing.form, change.stop))
    if change.value is not None:
        fields.append(writing.show_value(change.value, width))
    return "\t".join(fields)
