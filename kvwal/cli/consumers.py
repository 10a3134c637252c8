"""`consumers`: who reads the feed, and how far each is behind."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import fields
from typing import Any, Final

import click

import kvwal
from kvwal.cli.terminal import complain, print_facts, print_json, store_path
from kvwal.following.status import running_status, writer_pid

__all__ = ["consumers"]

_FIELDS = ("name", "state", "position", "lag_commits", "lag_bytes", "lag_s", "held_bytes", "parked", "last_error")
# What the process that has the store open knows of a consumer, and its files do not, with the types that it may have.
_SAID: Final[dict[str, tuple[type, ...]]] = {
    "lag_commits": (int,),
    "lag_bytes": (int, type(None)),
    "lag_s": (int, float, type(None)),
    "held_bytes": (int,),
    "scanned": (int,),
    "owner": (str, type(None)),
    "last_poll_s": (int, float, type(None)),
}
# Beyond it, as at NaN, a number is none of a consumer's.
_MOST: Final = 1 << 63


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def consumers(path: str, as_json: bool) -> None:
    """Show the consumers of the feed, where each is, and how much log is kept for it.

    A line has the name, the state ("active", "stopped", or "lost"), the position, the lag in commits, bytes and
    seconds, the bytes of log that are held, how many commits are set aside, and the last error, with tabs between. On a
    terminal each consumer has a table of its own.

    Which are active, the process says that has the store open. Where it does not answer, the state is "unknown".
    """
    found = _found(path)
    if as_json:
        for info in found:
            print_json(info)
        return
    if not sys.stdout.isatty():
        for info in found:
            click.echo("\t".join(_cell(info[field]) for field in _FIELDS))
        return
    if not found:
        complain("there are no consumers")
    for info in found:
        # One below the other: beside each other, their fields do not fit into a terminal.
        print_facts(_cell(info["name"]), [(field.replace("_", " "), _cell(info[field])) for field in _FIELDS[1:]])


def _found(path: str) -> list[dict[str, Any]]:
    """The consumers that the files have, with what the process says of them that has the store open."""
    running, said = running_status(path)
    with kvwal.open(path, "r") as db:
        rows = db.consumers()
    found = [{field.name: getattr(info, field.name) for field in fields(info)} for info in rows]
    if not running:
        return found
    told = {} if said is None else {each["name"]: each for each in said.get("consumers", [])}
    is_unknown = False
    for info in found:
        of_this = told.get(info["name"], {})
        # Anyone may have written what is said; that commits are gone, the files tell.
        state = of_this.get("state")
        if state in ("active", "stopped", "lost"):
            info["state"] = state
            for name, types in _SAID.items():
                value = of_this.get(name, "")
                if type(value) in types and (not isinstance(value, int | float) or 0 <= value < _MOST):
                    info[name] = value
            with suppress(ValueError):
                info["position"] = kvwal.Position.parse(str(of_this.get("position")))
        elif info["state"] == "stopped":
            info["state"] = "unknown"
            is_unknown = True
    if is_unknown:
        pid = writer_pid(path)
        who = "the process" if pid is None else f"process {pid}"
        complain(f"{who} that has the store open does not say whether consumers are in use")
    return found


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
