"""`load` and `dump`: whole stores as JSON Lines, streamed, whatever their size.

A line is an object with a key and a value: `{"key": "user:1", "value": "ada"}`. Bytes that are not UTF-8 are in
`key_base64` and `value_base64`; with `--hex` and `--base64` everything is in `key_hex` ... or `key_base64` ...
`load` reads all of them, mixed. An entry that expires has `expires_us`: when, in microseconds since 1970 UTC. Other
members are ignored, so a line may carry more than kvwal needs.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO, TypeAlias

import click

import kvwal
from kvwal.cli.forms import Form, form_options, from_json, meta_option, parse_key, to_json
from kvwal.cli.moments import Moment, at_option, opened_at
from kvwal.cli.terminal import BadInput, complain, print_json, progress_bar, store_path
from kvwal.db.mapping import expiries
from kvwal.expiring import MOST_US
from kvwal.keys import as_key, as_value

__all__ = ["dump", "load"]

# Key, value, and when it expires.
_Entry: TypeAlias = tuple[bytes, bytes, int | None]

# Entries that `dump` writes at a time; a progress bar for each would cost more than the work.
_CHUNK = 500
# A batch is committed when it holds this much, even if it has fewer entries than --batch.
_BATCH_BYTES = 8 << 20


@click.command()
@store_path
@form_options
@at_option
@click.option("--prefix", help="Only keys that start with this.")
@click.option("--output", type=click.File("wb", lazy=False), default="-", help="Write here instead of standard output.")
def dump(path: str, form: Form, at: Moment | None, prefix: str | None, output: BinaryIO) -> None:
    """Write every entry as a line of JSON, all as of one moment."""
    common = None if prefix is None else parse_key(form, prefix)
    with opened_at(path, at, form, None) as (db, _), progress_bar("dump") as progress:
        # To count a past moment is to read it.
        task = progress.add_task("dump", total=len(db) if prefix is None and at is None else None)
        entries = iter(db.scan(prefix=common))
        while chunk := list(islice(entries, _CHUNK)):
            ends = expiries(db, [key for key, _ in chunk])
            lines = [_line(form, name, value, end) for (name, value), end in zip(chunk, ends, strict=True)]
            output.write("".join(lines).encode())
            progress.advance(task, len(chunk))
    output.flush()


def _line(form: Form, key: bytes, value: bytes, expires_us: int | None) -> str:
    members: dict[str, Any] = {**to_json(form, "key", key), **to_json(form, "value", value)}
    if expires_us is not None:
        members["expires_us"] = expires_us
    return json.dumps(members, ensure_ascii=False) + "\n"


@click.command()
@store_path
@click.argument("source", type=click.File("rb"), default="-", metavar="[FILE]")
@click.option(
    "--batch", "batch_size", type=click.IntRange(min=1), default=1000, show_default=True, help="Entries in a commit."
)
@meta_option("Keep this with each commit, such as who made it and why; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print what was loaded as an object.")
def load(path: str, source: BinaryIO, batch_size: int, meta: dict[str, str], as_json: bool) -> None:
    """Put every entry of FILE (or standard input), which holds lines as `dump` writes them.

    A commit takes as many lines as --batch says. If a line is wrong, the exit code is 7; the message says
    which line it was and how many entries before it are in the store. The store is made if there is none.
    """
    done = 0
    with kvwal.open(path, "c") as db, progress_bar("load") as progress:
        task = progress.add_task("load", total=_size(source))
        for entries, line_bytes, problem in _batches(source, batch_size):
            if entries:
                with db.batch(meta=meta) as batch:
                    for name, value, expires_us in entries:
                        if expires_us is None:
                            batch.put(name, value)
                        else:
                            batch.put_until(name, value, expires_us)
                done += len(entries)
            if problem:
                raise BadInput(f"{problem}; the {done:,} entries before it are in the store")
            progress.advance(task, line_bytes)
        seqno = db.last_seqno
    if as_json:
        print_json({"loaded": done, "last_seqno": seqno})
    else:
        complain(f"{done:,} entries loaded; the last commit is {seqno}")


def _batches(source: BinaryIO, batch_size: int) -> Iterator[tuple[list[_Entry], int, str | None]]:
    """Entries of one commit, the bytes their lines took, and what was wrong with the line that ended them."""
    entries: list[_Entry] = []
    size = 0
    for number, line in enumerate(source, 1):
        try:
            entry = _entry(line)
        except (ValueError, RecursionError) as error:
            yield entries, size, f"line {number}: {error}"
            return
        size += len(line)
        if entry is not None:
            entries.append(entry)
        if len(entries) >= batch_size or size >= _BATCH_BYTES:
            yield entries, size, None
            entries, size = [], 0
    yield entries, size, None


def _size(source: BinaryIO) -> int | None:
    try:
        status = os.fstat(source.fileno())
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _entry(line: bytes) -> _Entry | None:
    """Key, value and expiry of a line, None for a blank one. ValueError says what is wrong."""
    if not line.strip():
        return None
    members: Any = json.loads(line)
    if not isinstance(members, dict):
        raise ValueError("not a JSON object")
    expires_us = members.get("expires_us")
    if expires_us is not None and (type(expires_us) is not int or not 0 <= expires_us <= 2 * MOST_US):
        raise ValueError("expires_us is no time in microseconds")
    return as_key(from_json("key", members)), as_value(from_json("value", members)), expires_us
