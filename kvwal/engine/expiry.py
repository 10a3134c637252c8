"""Expiry: the time that it goes by, and the queue of what is to expire.

A commit that puts a value which expires also puts a row of the queue into table 1, so that what is due is found in
order. Its key is

    offset  size  field
         0     1  kind: 8
         1     8  when it expires, as in the value, big-endian
         9     4  table, big-endian
        13     -  the key; one above 65,000 bytes as its first 64,000 and its SHA-256

and its value is empty, or the whole key where that is not in the row's.

A row says that there may be something to remove: the value may have been replaced since, and then what it says now
counts. Of a value that expires there always is a row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from struct import Struct
from typing import Final, NamedTuple

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError
from kvwal.expiring import Expiring, judged
from kvwal.files.names import DATA
from kvwal.keys import SYSTEM_TABLE

__all__ = [
    "NEVER_US",
    "NOT_ANY",
    "Expired",
    "ExpiryClock",
    "QueueRow",
    "due_rows",
    "judged_chunk",
    "queue_row",
    "queued_keys",
    "with_queue",
]

# On disk: never change.
_KIND: Final = 8
_HEAD = Struct(">BQI")
_LONGEST_KEY: Final = 65_000
_BEGINNING: Final = 64_000
NEVER_US: Final = (1 << 64) - 1


class ExpiryClock:
    """The time by which entries of one open store expire, and what is known of those that do."""

    __slots__ = ("found_us", "in_use", "now_us", "put_us")

    def __init__(self, now_us: Callable[[], int]) -> None:
        #: Microseconds since 1970 UTC: `StoreClock.now_us`.
        self.now_us = now_us
        #: Whether something in the store expires, or ever did. Set before it is visible.
        self.in_use = False
        #: Nothing is due before the earlier of these two, so that the background thread need not look into the queue at
        #: each tick: what it found there last, and what the commit leader has put since.
        self.found_us = 0
        self.put_us = NEVER_US

    def is_put(self, expires_us: int) -> None:
        """Something that expires at that time is about to be visible. Requires: the lead."""
        self.put_us = min(self.put_us, expires_us)
        self.in_use = True


class QueueRow(NamedTuple):
    """What is due at a time, if it is still so."""

    expires_us: int
    table: int
    key: bytes


def queue_row(expires_us: int, table: int, key: bytes) -> tuple[bytes, bytes]:
    """Key and value of the row."""
    head = _HEAD.pack(_KIND, expires_us, table)
    if len(key) <= _LONGEST_KEY:
        return head + key, b""
    return head + key[:_BEGINNING] + sha256(key).digest(), key


def decode_queue_row(key: bytes, value: bytes) -> QueueRow:
    """What `queue_row` was given. CorruptionError for bytes that are none."""
    if len(key) >= _HEAD.size:
        _, expires_us, table = _HEAD.unpack_from(key)
        found = value or key[_HEAD.size :]
        if queue_row(expires_us, table, found) == (key, value):
            return QueueRow(expires_us, table, found)
    raise CorruptionError(DATA, None, f"the row {key[:32].hex()} of the expiry queue is not valid")


def due_rows(from_us: int, at_us: int | None) -> tuple[bytes, bytes]:
    """The range of rows that are due from a time on, up to and with another one; None: of all later ones."""
    stop = bytes((_KIND + 1,)) if at_us is None or at_us >= NEVER_US else _HEAD.pack(_KIND, at_us + 1, 0)
    return _HEAD.pack(_KIND, from_us, 0), stop


def queued_keys(chunks: Iterable[tuple[Sequence[bytes], Sequence[bytes]]], table: int) -> Iterator[bytes]:
    """The keys of a table that rows of the queue name."""
    for keys, values in chunks:
        for key, value in zip(keys, values, strict=True):
            row = decode_queue_row(key, value)
            if row.table == table:
                yield row.key


def with_queue(batch: WriteBatch) -> WriteBatch:
    """What a batch writes, and the rows of the queue for the expiries that it sets. The batch stays as it is."""
    if not batch.sets_expiry():
        return batch
    batch = batch.copy()
    rows: dict[bytes, bytes | None] = {}
    for table, part in ((0, batch), *batch.parts()):
        for key, before_us in (part.queue or {}).items():
            value = part.writes.get(key)
            expires_us = value.expires_us if type(value) is Expiring else None
            if before_us and before_us != expires_us:
                rows.setdefault(queue_row(before_us, table, key)[0], None)
            if expires_us is not None:
                row, whole = queue_row(expires_us, table, key)
                rows[row] = whole
    batch.table(SYSTEM_TABLE).writes.update(rows)
    return batch


def judged_chunk(
    chunk: tuple[Sequence[bytes], Sequence[bytes]], at_us: int
) -> tuple[Sequence[bytes], Sequence[bytes]]:
    """A chunk of a scan as a reader at that time finds it."""
    keys, values = chunk
    if Expiring not in set(map(type, values)):
        return chunk
    found = [judged(value, at_us) for value in values]
    if None in found:
        keys = [key for key, value in zip(keys, found, strict=True) if value is not None]
    return keys, [value for value in found if value is not None]


class Expired:
    """Keys whose values have expired, and which are there still."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[bytes]) -> None:
        self._keys = sorted(set(keys))

    def count(self, start: bytes | None, stop: bytes | None) -> int:
        """How many there are in [start, stop)."""
        high = len(self._keys) if stop is None else bisect_left(self._keys, stop)
        return max(0, high - (0 if start is None else bisect_left(self._keys, start)))


NOT_ANY: Final = Expired(())
