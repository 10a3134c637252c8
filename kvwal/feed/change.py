"""What one commit changed, as the feed tells it: one `Change` for each intent that the filter lets through.

Invariant: keys are tested before values are cut out of the record, and only those of changes that are told are cut out.
Of a run all are cut at once, which takes less time than to look at one record.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import compress, repeat
from operator import methodcaller
from typing import Literal, NamedTuple, Protocol, TypeAlias

from kvwal.batch import MAX_TABLE_ID
from kvwal.expiring import plain
from kvwal.keys import BytesLike, KeyRange, Seqno, as_int, as_key, disjoint
from kvwal.log import Record, Run
from kvwal.log.columns import Columns, decode_put, decode_put_key, value_of
from kvwal.log.extension import cause_of
from kvwal.log.intents import ONE_KEY_OFFSET, ONE_PUT, PUT, is_of_users
from kvwal.log.record import COMMIT, is_expiry, is_system

__all__ = ["Change", "Filter", "Kind", "Prefixes", "Selection"]

Kind: TypeAlias = Literal["put", "delete", "delete_range", "expire", "heartbeat"]
"""What a change did; a heartbeat says that nothing did anything."""

Prefixes: TypeAlias = BytesLike | Iterable[BytesLike]
"""One prefix, or several."""


class Change(NamedTuple):
    """One key or range that a commit changed.

    Attributes:
        seqno: of the commit.
        time_us: of the commit, microseconds since 1970 UTC; of a heartbeat: now.
        meta: what the user said about the commit; empty if nothing. Do not change it.
        table: number of the table; 0 is the default one.
        kind: "put", "delete" or "delete_range"; "expire", of a key that was removed since it had expired; "heartbeat",
            where that was asked for, says that no change came, and `seqno` is the position.
        key: the key; of a range its start.
        stop: of a range the key that it ends before, None: it goes to the end. None of the other kinds too.
        value: of a put. None of the other kinds.
        last: whether it is the last change of its commit that the filter lets through.
        previous: the value of the key before the commit, where that was asked for; None if there was none.
        cause: why the store itself made the commit, as "migrate"; None if a user did.
    """

    seqno: Seqno
    time_us: int
    meta: Mapping[str, str]
    table: int
    kind: Kind
    key: bytes
    stop: bytes | None
    value: bytes | None
    last: bool
    previous: bytes | None = None
    cause: str | None = None

    # A tuple, since there may be millions, and one is made in a fifth of the time of a frozen dataclass.
    def __hash__(self) -> int:
        return hash((self.seqno, self.table, self.kind, self.key))


class Selection(Protocol):
    """Which changes of a commit are told."""

    def changes(self, record: Record) -> Iterator[Change] | None:
        """What is told of a commit; None if nothing is."""
        ...

    def changes_of(self, run: Run) -> Iterator[Change] | None:
        """The same of each commit of a run."""
        ...

    def close(self) -> None:
        """Let go of what it holds. From any thread."""
        ...


class Filter:
    """Which changes are told: those of these tables whose keys have one of these prefixes."""

    __slots__ = ("_has_key", "_prefix", "_ranges", "_tables")

    def __init__(self, prefixes: Prefixes, tables: Iterable[int] | None) -> None:
        """TypeError or ValueError for what cannot be a prefix or a user's table."""
        checked = _checked(prefixes)
        if not checked:
            raise ValueError("prefix has no prefixes in it, so it would let nothing through")
        # None: every key is let through.
        self._has_key: Callable[[bytes], bool] | None = None
        self._ranges = [KeyRange(b"", None)]
        # What each key that is let through begins with.
        self._prefix = checked[0] if len(checked) == 1 else b""
        if all(checked):
            self._ranges = disjoint([KeyRange.of_prefix(prefix) for prefix in checked])
            self._has_key = methodcaller("startswith", checked[0]) if len(checked) == 1 else _in_ranges(self._ranges)
        # None: all tables of users.
        self._tables: frozenset[int] | None = None
        if tables is not None:
            self._tables = frozenset(as_int("a table", table, 0, MAX_TABLE_ID) for table in tables)
            for table in self._tables:
                if not is_of_users(table):
                    raise ValueError(f"table {table} is the store's own; its changes are not in the feed")

    def digest(self) -> bytes:
        """SHA-256 of what it lets through: the same for filters that do not differ. It is stored: never change it."""
        tables = None if self._tables is None else sorted(self._tables)
        ranges = [(start.hex(), None if stop is None else stop.hex()) for start, stop in self._ranges]
        return sha256(json.dumps([tables, ranges]).encode()).digest()

    def has_table(self, table: int) -> bool:
        """Whether changes of the table are told."""
        return is_of_users(table) if self._tables is None else table in self._tables

    def changes(self, record: Record) -> Iterator[Change] | None:
        """What is told of a commit; None if nothing is. Raises as `Record.batch`."""
        # Most commits are one put and plain.
        if record.kind == COMMIT:
            has_key, body = self._has_key, record.body
            if has_key is not None:
                # Two C calls for most of what one prefix does not let through.
                if not body.startswith(self._prefix, ONE_KEY_OFFSET) and body.startswith(ONE_PUT):
                    return None
                key = decode_put_key(body)
                if key is not None and not has_key(key):
                    return None
            pair = decode_put(body)
            if pair is not None:
                if self._tables is not None and 0 not in self._tables:
                    return None
                return iter((Change(record.seqno, record.time_us, {}, 0, "put", pair[0], None, pair[1], True),))
        return None if is_system(record) else self._select(record)

    def changes_of(self, run: Run) -> Iterator[Change] | None:
        """The same of each commit of a run. All its changes have one `meta`."""
        if self._tables is not None and 0 not in self._tables:
            return None
        columns: tuple[Iterable[int | bytes], ...] = (run.seqnos, run.times_us, run.keys, run.values)
        if self._has_key is not None:
            chosen = list(map(self._has_key, run.keys))
            if not any(chosen):
                return None
            columns = tuple(compress(column, chosen) for column in columns)
        seqnos, times_us, keys, values = columns
        none = repeat(None)
        told = zip(seqnos, times_us, repeat({}), repeat(0), repeat("put"), keys, none, values, repeat(True), none, none)
        # What `Change(...)` does, in a sixth of the time.
        return map(tuple.__new__, repeat(Change), told)

    def close(self) -> None:
        """It holds nothing."""

    def _select(self, record: Record) -> Iterator[Change] | None:
        columns = record.columns()
        keys, tables, n_ranges = columns.keys, columns.tables, len(columns.ranges)
        in_table: Sequence[bool] | None = None
        if tables is not None:
            known = {table: self.has_table(table) for table in set(tables)}
            in_table = [known[table] for table in tables]
        elif not self.has_table(0):
            return None
        ranges = [
            (i, part)
            for i, bounds in enumerate(columns.ranges)
            if in_table is None or in_table[i]
            for part in self._clip(bounds)
        ]
        has_key = self._has_key
        chosen: Sequence[int] = range(n_ranges, len(keys))
        if in_table is not None:
            chosen = [i for i in chosen if in_table[i]]
        if has_key is not None:
            chosen = [i for i in chosen if has_key(keys[i])]
        if not ranges and not chosen:
            return None
        return _told(record, columns, ranges, chosen)

    def _clip(self, bounds: KeyRange) -> list[KeyRange]:
        return [part for own in self._ranges if (part := own.clip(bounds)) is not None]


def _checked(prefixes: object) -> list[bytes]:
    try:
        return [as_key(prefixes)]
    except TypeError:
        # An array of bytes has a buffer as well, and is several.
        if isinstance(prefixes, str | memoryview):
            raise
    if not isinstance(prefixes, Iterable):
        raise TypeError(f"prefix is bytes-like, or several in an iterable, not {type(prefixes).__name__}")
    return [as_key(each) for each in prefixes]


def _in_ranges(ranges: list[KeyRange]) -> Callable[[bytes], bool]:
    """Whether a key is in one of these ranges, which are in order and do not overlap."""
    starts = [bounds.start for bounds in ranges]

    def has_key(key: bytes) -> bool:
        i = bisect_right(starts, key)
        return i > 0 and ranges[i - 1].contains(key)

    return has_key


def _told(
    record: Record, columns: Columns, ranges: Sequence[tuple[int, KeyRange]], chosen: Sequence[int]
) -> Iterator[Change]:
    """The changes of these ranges, each with the number of its intent, then of these puts and deletes."""
    seqno, time_us, meta, cause = record.seqno, record.time_us, record.meta(), cause_of(record.extension())
    keys, ops, tables = columns.keys, columns.ops, columns.tables
    left = len(ranges) + len(chosen)
    deleted: Kind = "expire" if is_expiry(record) else "delete"
    for i, (start, stop) in ranges:
        left -= 1
        table = tables[i] if tables is not None else 0
        yield Change(seqno, time_us, meta, table, "delete_range", start, stop, None, not left, None, cause)
    for i, value in zip(chosen, columns.values_of(chosen), strict=True):
        left -= 1
        table = tables[i] if tables is not None else 0
        if ops[i] == PUT:
            yield Change(seqno, time_us, meta, table, "put", keys[i], None, value, not left, None, cause)
        else:
            written = plain(value_of(ops[i], value))
            kind = deleted if written is None else "put"
            yield Change(seqno, time_us, meta, table, kind, keys[i], None, written, not left, None, cause)
