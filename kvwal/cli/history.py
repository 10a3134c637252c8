"""`log`: the commits that the store still remembers, newest first, as `git log` shows them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

import kvwal
from kvwal.cli.forms import Form, form_options, meta_option, show, show_meta, to_json
from kvwal.cli.moments import POSITION
from kvwal.cli.terminal import LIMIT, count, human_bytes, print_json, store_path, when
from kvwal.cli.written import TableNames
from kvwal.expiring import Expiring, plain
from kvwal.log.extension import cause_of
from kvwal.log.intents import is_of_users

if TYPE_CHECKING:
    from kvwal.api.store import Store
    from kvwal.batch import WriteBatch
    from kvwal.log import Record

__all__ = ["log"]

# Intents shown of one commit, and bytes of a value: a commit may hold a million of either.
_SHOWN_INTENTS = 10
_SHOWN_BYTES = 60
# Commits read at a time when going backwards.
_WINDOW = 200


@click.command()
@store_path
@form_options
@click.option("--after", type=POSITION, help="Only commits after this one: a seqno, or a position (LINE:SEQNO).")
@meta_option("Only commits with this pair; may be given again.")
@click.option("--limit", "-n", type=LIMIT, help="Show at most this number.")
@click.option("--reverse", is_flag=True, help="Oldest first.")
@click.option("--follow", "-f", is_flag=True, help="Oldest first, and wait for what comes.")
@click.option("--all", "everything", is_flag=True, help="Every key of every commit, however many.")
@click.option("--json", "as_json", is_flag=True, help="One object a line, with every key and value.")
def log(
    path: str,
    form: Form,
    after: int | None,
    meta: dict[str, str],
    limit: int | None,
    reverse: bool,
    follow: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Show the commits in the log, newest first, with what they wrote: keys and values of tables as bytes.

    The log reaches back as far as recovery needs it or as the store was told to keep it. On a terminal the
    output goes through a pager.
    """
    if follow and reverse:
        raise click.UsageError("give --follow, which is oldest first, or --reverse")
    with kvwal.follow(path) if follow else kvwal.open(path, "r") as db:
        if isinstance(db, kvwal.Follower):
            records = _as_they_come(db, after)
        else:
            records = db.history(after) if reverse else _newest_first(db, after)
        if meta:
            records = (record for record in records if meta.items() <= record.meta().items())
        records = islice(records, limit)
        if as_json:
            for record in records:
                print_json(_object(form, record))
            return
        tty, names = sys.stdout.isatty(), TableNames(db)
        shown = (_paragraph(form, record, names, None if everything else _SHOWN_INTENTS, tty) for record in records)
        if tty and not follow:
            # click takes the colour out again for a pager that would not show it.
            click.echo_via_pager(shown)
            return
        for paragraph in shown:
            click.echo(paragraph, nl=False)


def _as_they_come(live: kvwal.Follower, after: int | None) -> Iterator[Record]:
    """The records after `after`, and those that come, for ever."""
    for record in live.history(after):
        yield record
        after = record.seqno
    position = live.seqno if after is None else after
    while True:
        live.wait(position + 1)
        for record in live.history(position):
            yield record
            position = record.seqno


def _newest_first(db: Store, after: int | None) -> Iterator[Record]:
    """The records after `after`, backwards. Seqnos have no gaps, so a window of them is read forwards and reversed."""
    stop = int(db.last_seqno)
    oldest = next(db.history(after), None)
    first = stop if oldest is None else oldest.seqno - 1
    while stop > first:
        start = max(first, stop - _WINDOW)
        yield from reversed(list(islice(db.history(start), stop - start)))
        stop = start


def _parts(batch: WriteBatch) -> list[tuple[int, WriteBatch]]:
    """What was written to the default table, and to each of users."""
    return [(0, batch), *((table, part) for table, part in batch.parts() if is_of_users(table))]


def _object(form: Form, record: Record) -> dict[str, Any]:
    intents: list[dict[str, Any]] = []
    for table, part in _parts(record.batch()):
        where = {"table": table} if table else {}
        for start, stop in part.ranges:
            end = {} if stop is None else to_json(form, "stop", stop)
            intents.append({"op": "delete_range", **where, **to_json(form, "start", start), **end})
        for key, stored in part.writes.items():
            name, value = to_json(form, "key", key), plain(stored)
            if value is None:
                intents.append({"op": "delete", **where, **name})
            else:
                lasts = {"expires_us": stored.expires_us} if type(stored) is Expiring else {}
                intents.append({"op": "put", **where, **name, **to_json(form, "value", value), **lasts})
    return {
        "seqno": record.seqno,
        "time": when(record.time_us),
        "time_us": record.time_us,
        "meta": record.meta(),
        "cause": cause_of(record.extension()),
        "segment": record.position.segment,
        "offset": record.position.offset,
        "intents": intents,
    }


def _paragraph(form: Form, record: Record, names: TableNames, most: int | None, color: bool) -> str:
    segment, offset = record.position
    head = f"commit {record.seqno}"
    lines = [
        click.style(head, fg="yellow") if color else head,
        f"Date:  {when(record.time_us)}",
        f"Log:   {segment:020d}.log at byte {offset}",
        *(f"Cause: {cause}" for cause in [cause_of(record.extension())] if cause is not None),
        *(f"Meta:  {pair}" for pair in show_meta(record.meta())),
        "",
    ]
    batch = record.batch()
    parts = _parts(batch)
    total = sum(len(part.writes) + len(part.ranges) for _, part in parts)
    intents = ((table, line) for table, part in parts for line in _intents(form, part))
    lines += (
        f"    in {_called(names, table)}: {line}" if table else f"    {line}" for table, line in islice(intents, most)
    )
    if not total:
        lines.append(f"    {count(len(batch), 'key')} of what the store keeps of itself")
    if most is not None and total > most:
        lines.append(f"    ... and {total - most:,} more")
    return "\n".join(lines) + "\n\n"


def _called(names: TableNames, table: int) -> str:
    name = names.of(table)
    return f"table {table}, which was dropped" if name is None else show(Form.TEXT, name.encode())


def _intents(form: Form, batch: WriteBatch) -> Iterator[str]:
    for start, stop in batch.ranges:
        first = show(form, start) or "the first key"
        yield f"delete from {first} " + ("to the end" if stop is None else f"to before {show(form, stop)}")
    for key, stored in batch.writes.items():
        value = plain(stored)
        if value is None:
            yield f"delete {show(form, key)}"
        elif len(value) <= _SHOWN_BYTES:
            until = f", until {when(stored.expires_us)}" if type(stored) is Expiring else ""
            yield f"put    {show(form, key)} = {show(form, value)}{until}"
        else:
            yield f"put    {show(form, key)} = {show(form, value[:_SHOWN_BYTES])}... ({human_bytes(len(value))})"
