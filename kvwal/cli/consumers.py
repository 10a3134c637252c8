"""`consumers`: who reads the feed, and how far each is behind."""

from __future__ import annotations

import sys

import click

import kvwal
from kvwal.cli.terminal import complain, print_facts, print_json, store_path

__all__ = ["consumers"]

_FIELDS = ("name", "state", "position", "lag_commits", "lag_bytes", "lag_s", "held_bytes", "parked", "last_error")


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def consumers(path: str, as_json: bool) -> None:
    """Show the consumers of the feed, where each is, and how much log is kept for it.

    A line has the name, the state ("stopped", or "lost"), the position, the lag in commits, bytes and seconds, the
    bytes of log that are held, how many commits are set aside, and the last error, with tabs between. On a terminal
    each consumer has a table of its own.
    """
    with kvwal.open(path, "r") as db:
        found = db.consumers()
    if as_json:
        for info in found:
            print_json(info)
        return
    if not sys.stdout.isatty():
        for info in found:
            click.echo("\t".join(_cell(getattr(info, field)) for field in _FIELDS))
        return
    if not found:
        complain("there are no consumers")
    for info in found:
        # One below the other: beside each other, their fields do not fit into a terminal.
        print_facts(_cell(info.name), [(field.replace("_", " "), _cell(getattr(info, field))) for field in _FIELDS[1:]])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        return str(len(value))
    if isinstance(value, int):
        # Of a position the seqno.
        return str(int(value))
    # A name or an error may have anything in it.
    return f"{value:.1f}" if isinstance(value, float) else str(value).encode("unicode_escape").decode("ascii")
