"""`load` and `dump`: whole stores as JSON Lines, streamed, whatever their size.

A line is an object with a key and a value: `{"key": "user:1", "value": "ada"}`. Bytes that are not UTF-8 are in
`key_base64` and `value_base64`; with `--hex` and `--base64` everything is in `key_hex` ... or `key_base64` ...
`load` reads all of them, mixed. An entry that expires has `expires_us`: when, in microseconds since 1970 UTC. Other
members are ignored, so a line may carry more than kvwal needs.

The lines of a table have its name as `table`, and are bytes as well. Before them a line without a key says its codecs:
`{"table": "users", "key_codec": ["str", 1], "value_codec": ["json", 1]}`; and the default expiry in microseconds as
`expire_us`, if there is one. The default table comes first, and has no such line.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import click

import kvwal
from kvwal.cli.forms import Form, form_options, from_json, meta_option, to_json
from kvwal.cli.moments import Moment, at_option, snapshot_at
from kvwal.cli.terminal import BadInput, complain, plain_json, print_json, progress_bar, store_path
from kvwal.cli.written import AsItIs, TypedWriting, Writing, as_name, table_option
from kvwal.db.mapping import OrderedMapping, expiries
from kvwal.engine.indexes import decode_indexes
from kvwal.engine.parked import SYSTEM_TABLE
from kvwal.engine.tables import ROWS, CodecName, TableRow, decode_row
from kvwal.errors import CodecError, TableNotFoundError
from kvwal.expiring import MOST_US
from kvwal.keys import KeyRange, as_key, as_value

__all__ = ["dump", "load"]

# Entries that `dump` writes at a time; a progress bar for each would cost more than the work.
_CHUNK = 500
# A batch is committed when it holds this much, even if it has fewer entries than --batch.
_BATCH_BYTES = 8 << 20


@click.command()
@store_path
@form_options
@table_option
@at_option
@click.option("--prefix", help="Only keys that start with this: of the table, or of the default table alone.")
@click.option("--output", type=click.File("wb"), default="-", help="Write here instead of standard output.")
def dump(
    path: str, form: Form, table: str | None, at: Moment | None, prefix: str | None, output: BinaryIO
) -> None:
    """Write every entry of every table as a line of JSON, all as of one moment.

    With --table only that table, with a member "typed" that shows keys and values as what they are.
    """
    # The file is opened, and emptied, by the first write: what is wrong with the store is found before that.
    try:
        _dump(path, form, table, at, prefix, output)
        output.flush()
    except click.FileError as error:
        raise click.BadParameter(error.format_message(), param_hint="--output") from None


def _dump(
    path: str, form: Form, table: str | None, at: Moment | None, prefix: str | None, output: BinaryIO
) -> None:
    with kvwal.open(path, "r") as db, snapshot_at(db, at) as snapshot, progress_bar("dump") as progress:
        rows = [decode_row(*pair) for pair in snapshot.part(SYSTEM_TABLE).scan(*ROWS)]
        chosen: list[TableRow | None] = [None, *rows] if prefix is None else [None]
        writing = Writing(form)
        if table is not None:
            as_name(table)
            chosen = [row for row in rows if row.name == table]
            if not chosen or chosen[0] is None:
                raise TableNotFoundError(table)
            writing = TypedWriting(form, table, chosen[0].key, chosen[0].value, quiet=True)
        bounds = writing.range(None, None, prefix)
        parts = [(row, snapshot if row is None else snapshot.part(row.id)) for row in chosen]
        # To count a past moment is to read it.
        total = None if at is not None else sum(len(part.keys(*bounds)) for _, part in parts)
        task = progress.add_task("dump", total=total)
        for row, part in parts:
            lines = _lines(form, row, part, bounds, writing)
            while some := list(islice(lines, _CHUNK)):
                output.write("".join(some).encode())
                progress.advance(task, len(some))


def _entries(part: OrderedMapping, bounds: KeyRange) -> Iterator[tuple[bytes, bytes, int | None]]:
    """Keys, values, and when they expire."""
    entries = iter(part.scan(*bounds))
    while chunk := list(islice(entries, _CHUNK)):
        ends = expiries(part, [key for key, _ in chunk])
        yield from ((key, value, end) for (key, value), end in zip(chunk, ends, strict=True))


def _lines(
    form: Form, row: TableRow | None, part: OrderedMapping, bounds: KeyRange, writing: Writing
) -> Iterator[str]:
    name = {} if row is None else {"table": row.name}
    if row is not None:
        codecs = {
            what: [codec.name, codec.version] for what, codec in (("key_codec", row.key), ("value_codec", row.value))
        }
        expiry = {"expire_us": row.expire_us} if row.expire_us else {}
        yield json.dumps({**name, **codecs, **expiry}, ensure_ascii=False) + "\n"
    for key, value, expires_us in _entries(part, bounds):
        members: dict[str, Any] = {**name, **to_json(form, "key", key), **to_json(form, "value", value)}
        if expires_us is not None:
            members["expires_us"] = expires_us
        if isinstance(writing, TypedWriting) and form is Form.TEXT:
            try:
                members["typed"] = {**writing.json_key(key), **writing.json_value(value)}
            except CodecError:
                pass  # Its bytes are there.
        yield plain_json(members) + "\n"


@click.command()
@store_path
@click.argument("source", type=click.File("rb"), default="-", metavar="[FILE]")
@click.option("--table", metavar="NAME", help="Only the lines of this table.")
@click.option(
    "--batch", "batch_size", type=click.IntRange(min=1), default=1000, show_default=True, help="Entries in a commit."
)
@meta_option("Keep this with each commit, such as who made it and why; may be given again.")
@click.option("--json", "as_json", is_flag=True, help="Print what was loaded as an object.")
def load(
    path: str, source: BinaryIO, table: str | None, batch_size: int, meta: dict[str, str], as_json: bool
) -> None:
    """Put every entry of FILE (or standard input), which holds lines as `dump` writes them.

    A commit takes as many entries as --batch says, or 8 MiB of lines. If a line is wrong, the exit code is 7; the
    message says which line it was and how many entries before it are in the store. The store is made if there is none.
    With --table it is 1 if no line is of that table.

    Tables are made with the codecs that the lines say, each in a commit of its own before its first entries. Into one
    that is there already entries are put as into the default table: over those with the same keys. Its codecs have to
    be those of the lines, and it may have no index.
    """
    if table is not None:
        as_name(table)
    done = 0
    with kvwal.open(path, "c") as db, progress_bar("load") as progress:
        task = progress.add_task("load", total=_size(source))
        targets = _Targets(db, table)
        for entries, line_bytes, problem in _batches(source, batch_size, targets):
            if entries:
                with db.batch(meta=meta) as batch:
                    targets.put(entries, batch)
                done += len(entries)
            if problem:
                raise BadInput(f"{problem}; {_before(done)}")
            progress.advance(task, line_bytes)
        seqno = db.last_seqno
    if table is not None and not targets.found_any:
        complain(f"no line is of table {table!r}")
        click.get_current_context().exit(1)
    if as_json:
        print_json({"loaded": done, "last_seqno": seqno})
    else:
        complain(f"{_entries_of(done)} loaded; the last commit is {seqno}")


def _before(done: int) -> str:
    if not done:
        return "nothing was put into the store"
    return "the entry before it is in the store" if done == 1 else f"the {done:,} entries before it are in the store"


def _entries_of(number: int) -> str:
    return "1 entry" if number == 1 else f"{number:,} entries"


class _Entry(NamedTuple):
    table: str | None
    key: bytes
    value: bytes
    expires_us: int | None


class _Targets:
    """The tables that entries are put into."""

    def __init__(self, db: kvwal.Store, only: str | None) -> None:
        self._db = db
        self._only = only
        self._tables: dict[str, kvwal.Table[bytes, bytes]] = {}
        # An index of each that has one.
        self._indexed: dict[str, str] = {}
        #: Whether a line is of a table that is loaded.
        self.found_any = False

    def wants(self, name: str | None) -> bool:
        """Whether lines of a table are loaded."""
        is_wanted = self._only is None or name == self._only
        self.found_any = self.found_any or is_wanted
        return is_wanted

    def declare(self, name: str, key: CodecName, value: CodecName, expire_us: int = 0) -> None:
        """Make the table if there is none, with this default expiry. ValueError if it has other codecs."""
        row = self._db.engine.tables.row(name)
        if row is not None:
            key, value = _both(name, "keys", row.key, key), _both(name, "values", row.value, value)
            expire_us = 0
            for index in decode_indexes(name, row.others):
                self._indexed[name] = index.name
        table = self._db.table(name, AsItIs(key), AsItIs(value), expire_s=expire_us / 1e6 if expire_us else None)
        # It makes one that is empty.
        table.within(kvwal.WriteBatch())
        self._tables[name] = table

    def find(self, name: str) -> None:
        """ValueError if it is not known what the table is, or nothing can be put into it here."""
        if name not in self._tables:
            row = self._db.engine.tables.row(name)
            if row is None:
                raise ValueError(f"table {name!r} is not in the store, and no line before this one says its codecs")
            self.declare(name, row.key, row.value)
        if name in self._indexed:
            raise ValueError(
                f"table {name!r} has index {self._indexed[name]!r} in the store, whose function is not known here; "
                "only a program that declares the index can put something into the table"
            )

    def put(self, entries: Iterable[_Entry], batch: kvwal.WriteBatch) -> None:
        """Put entries into a batch. Requires: their tables were found."""
        parts: dict[str, int] = {}
        for name, key, value, expires_us in entries:
            if name is not None and name not in parts:
                # It makes the table again, if that was dropped meanwhile.
                self._tables[name].within(batch)
                table = self._tables[name].id
                if table is None:
                    raise TableNotFoundError(name)
                parts[name] = table
            if name is None and expires_us is None:
                batch.put(key, value)
            else:
                # Also if it does not expire: then it gets no default of the table.
                batch.part(0 if name is None else parts[name]).put_until(key, value, expires_us)


def _both(name: str, what: str, has: CodecName, given: CodecName) -> CodecName:
    """A codec that stands for what a table has and for what it is given."""
    # Values with versions say themselves which one they have.
    if has.name != given.name or (has.version != given.version and not has.name.startswith("versioned(")):
        raise ValueError(f"the {what} of table {name!r} in the store are {has}, and {given} here")
    return CodecName(has.name, max(has.version, given.version), 1)


def _batches(
    source: BinaryIO, batch_size: int, targets: _Targets
) -> Iterator[tuple[list[_Entry], int, str | None]]:
    """Entries of one commit, the bytes their lines took, and what was wrong with the line that ended them."""
    entries: list[_Entry] = []
    size = 0
    for number, line in enumerate(source, 1):
        try:
            entry = _entry(line, targets)
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


def _entry(line: bytes, targets: _Targets) -> _Entry | None:
    """The entry of a line; None for a line that has none, or none to load. ValueError says what is wrong."""
    if not line.strip():
        return None
    try:
        # Not what it is guessed to be by its zeros.
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte {error.start + 1} of it is {line[error.start]:#04x}") from None
    members: Any = json.loads(text)
    if not isinstance(members, dict):
        raise ValueError("not a JSON object")
    name = members.get("table")
    if not targets.wants(name):
        return None
    if name is not None:
        if not isinstance(name, str):
            raise ValueError('"table" is not a string')
        if "key_codec" in members or "value_codec" in members:
            expire_us = _time(members, "expire_us") or 0
            targets.declare(name, _codec(members, "key_codec"), _codec(members, "value_codec"), expire_us)
            return None
        targets.find(name)
    expires_us = _time(members, "expires_us")
    return _Entry(name, as_key(from_json("key", members)), as_value(from_json("value", members)), expires_us)


def _time(members: dict[str, Any], name: str) -> int | None:
    value = members.get(name)
    if value is not None and (type(value) is not int or not 0 <= value <= 2 * MOST_US):
        raise ValueError(f"{name} is no time in microseconds")
    return value


def _codec(members: dict[str, Any], name: str) -> CodecName:
    match members.get(name):
        case [str(codec), int(version)] if version > 0 and not isinstance(version, bool):
            return CodecName(codec, version)
    raise ValueError(f'"{name}" is not a list of the name and the version of a codec')
