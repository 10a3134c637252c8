"""Writes that depend on the newest state: evaluated by the commit leader, so that they never conflict.

The caller warms the value first; the leader then reads a page only if it changed since. The log holds plain puts and
deletes, so replay and everything that follows it know nothing of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import merge
from itertools import islice
from typing import TYPE_CHECKING, Final

from kvwal.batch import WriteBatch
from kvwal.engine.range_map import RangeMap
from kvwal.engine.request import Newest
from kvwal.engine.value import Value
from kvwal.errors import TableNotFoundError
from kvwal.expiring import Expiring, judged, plain
from kvwal.keys import KeyRange, Seqno, as_int
from kvwal.log import Extension

if TYPE_CHECKING:
    from kvwal.engine.reads import Reads
    from kvwal.engine.writes import LonePut

__all__ = [
    "Pending",
    "PopEdge",
    "SetExpiry",
    "Update",
    "adding",
    "decode_counter",
    "encode_counter",
    "keep_expiry",
    "set_expiry",
]

_COUNTER_BYTES: Final = 8


def decode_counter(value: Value) -> int:
    """The number that a counter's value stands for; 0 if there is none. TypeError if it is no counter."""
    if value is None:
        return 0
    if len(value) != _COUNTER_BYTES:
        raise TypeError(f"a counter has {_COUNTER_BYTES} bytes, and this value has {len(value)}; put another key")
    return int.from_bytes(value, "little", signed=True)


def encode_counter(number: int) -> bytes:
    """The value of a counter. OverflowError if the number does not fit into 64 bits."""
    try:
        return number.to_bytes(_COUNTER_BYTES, "little", signed=True)
    except OverflowError:
        raise OverflowError(f"the sum {number} does not fit into the 64 bits of a counter") from None


def adding(delta: int) -> Callable[[Value], bytes]:
    """What adds `delta` to a counter. TypeError, or ValueError for one that does not fit into 64 bits."""
    amount = as_int("delta", delta, -(1 << 63), (1 << 63) - 1)
    return lambda old: encode_counter(decode_counter(old) + amount)


class Pending:
    """The newest state with what the members of a group before this one write."""

    def __init__(self, reads: Reads, table: int = 0, names: object = None) -> None:
        self.names = names
        self._reads = reads
        self._table = table
        self._writes: dict[bytes, Value] = {}
        # None: no range is deleted.
        self._ranges: RangeMap | None = None
        # Of other tables.
        self._parts: dict[int, Pending] = {}

    def write(self, batch: WriteBatch) -> None:
        """A member before this one writes this."""
        for bounds in batch.ranges:
            if self._ranges is None:
                self._ranges = RangeMap()
            self._ranges.add(Seqno(1), bounds, copy=False)
            for key in [key for key in self._writes if bounds[0] <= key and (bounds[1] is None or key < bounds[1])]:
                self._writes[key] = None
        self._writes.update(batch.writes)
        for table, part in batch.parts():
            self.table(table).write(part)

    def put(self, put: LonePut) -> None:
        """`write` of one put. Requires: this is that of table 0."""
        self.table(put.table)._writes[put.key] = put.value

    def table(self, table: int) -> Pending:
        """The same of a table. Requires: this is that of table 0."""
        if not table:
            return self
        part = self._parts.get(table)
        if part is None:
            part = self._parts[table] = Pending(self._reads, table)
        return part

    def _is_deleted(self, key: bytes) -> bool:
        """Whether it lies in a range that a member deleted."""
        return self._ranges is not None and bool(self._ranges.newest.at(key))

    def get(self, key: bytes) -> Value:
        """The newest value."""
        if key in self._writes:
            return self._now(self._writes[key])
        if self._is_deleted(key):
            return None
        return self._reads.read(key, table=self._table)

    def raw(self, key: bytes) -> Value:
        """The newest value as it is stored: also one that has expired; one that expires is `Expiring`."""
        if key in self._writes:
            return self._writes[key]
        if self._is_deleted(key):
            return None
        return self._reads.read(key, table=self._table, raw=True)

    def _now(self, value: Value) -> Value:
        return judged(value, self._reads.moments.clock.now_us()) if type(value) is Expiring else value

    def edge(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> tuple[bytes, bytes] | None:
        """The first pair of a range, or in reverse the last one."""
        writes, choose = self._writes, max if reverse else min
        own = choose(
            (
                key
                for key, value in writes.items()
                if self._now(value) is not None and (start is None or start <= key) and (stop is None or key < stop)
            ),
            default=None,
        )
        found: tuple[bytes, bytes] | None = None
        for key, value in self._reads.pairs(start, stop, reverse=reverse, table=self._table):
            if own is not None and (key < own if reverse else key > own):
                break
            if key not in writes and not self._is_deleted(key):
                found = (key, value)
                break
        if found is None and own is not None:
            # It has not expired since it was chosen: then it is gone, and taken nevertheless.
            value_of_own = plain(writes[own])
            assert value_of_own is not None
            found = (own, value_of_own)
        return found

    def first_pairs(self, start: bytes | None, stop: bytes | None, *, most: int) -> list[tuple[bytes, bytes]]:
        """The first pairs of a range, `most` of them at the most."""
        writes, is_deleted = self._writes, self._is_deleted
        own = {
            key: value
            for key, value in writes.items()
            if value is not None and (start is None or start <= key) and (stop is None or key < stop)
        }
        others = (
            pair
            for pair in self._reads.pairs(start, stop, reverse=False, table=self._table)
            if pair[0] not in writes and not is_deleted(pair[0])
        )
        return list(islice(merge(sorted(own.items()), others), most))

    def is_empty(self) -> bool:
        """Whether there is no pair, not even one that has expired."""
        writes = self._writes
        return all(value is None for value in writes.values()) and all(
            key in writes or self._is_deleted(key)
            for key, _ in self._reads.pairs(None, None, reverse=False, table=self._table, at_us=0)
        )


class Update:
    """A new value of one key, made from its newest one. `old` and `new` say afterwards what was there and what is."""

    __slots__ = ("_function", "_keeps_expiry", "_names", "_table", "extension", "key", "new", "old")

    dropped: Final = None

    def __init__(
        self,
        key: bytes,
        function: Callable[[Value], Value],
        extension: Extension | None = None,
        table: int = 0,
        names: object = None,
        *,
        keeps_expiry: bool = False,
    ) -> None:
        """`function` gets the newest value, None if there is none, and returns what to put; None deletes.

        Returning what it got changes nothing. It must be quick, and have no effect of its own. `keeps_expiry`: what is
        put expires when what was there would have. `names`: as `WriteBatch.names`, where the table was found by one.
        """
        self._keeps_expiry = keeps_expiry
        self.key = key
        self._table = table
        self._names = names
        self._function = function
        #: What the commit says of itself beside its writes.
        self.extension = extension
        self.old: Value = None
        self.new: Value = None

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write. TableNotFoundError if names of tables have changed since this one was found."""
        if self._names is not None and self._names is not newest.names:
            raise TableNotFoundError(self._table)
        found = (part := newest.table(self._table)).raw(self.key)
        self.old = old = part.get(self.key) if type(found) is Expiring else found
        self.new = new = self._function(old)
        if new is old:
            return None
        batch = WriteBatch()
        writes = batch.part(self._table)
        writes.writes[self.key] = new
        if self._keeps_expiry and type(found) is Expiring:
            keep_expiry(part, writes, self.key)
        return batch


def keep_expiry(newest: Newest, part: WriteBatch, key: bytes) -> None:
    """What is put to a key expires when what is there now does."""
    found, new = newest.raw(key), part.writes.get(key)
    if new is None or found is None:
        return
    if type(found) is Expiring:
        if newest.get(key) is not None:
            part.put_until(key, new, found.expires_us, found.expires_us)
    else:
        # Said, so that it gets no default either.
        part.put_until(key, new, None)


def set_expiry(newest: Newest, part: WriteBatch, key: bytes, value: Value, expires_us: int | None) -> bool:
    """Put a value, or, if it is None, what is there, so that it expires at that time (None: never).

    The former row of the queue goes. Returns whether there was something to put.
    """
    found = newest.raw(key)
    new = newest.get(key) if value is None else value
    if new is None:
        return False
    part.put_until(key, new, expires_us, found.expires_us if type(found) is Expiring else 0)
    return True


class SetExpiry:
    """Put a value that expires, or let what is there expire at another time; `found` says whether there was one."""

    __slots__ = ("_expires_us", "_key", "_value", "extension", "found")

    dropped: Final = None

    def __init__(self, key: bytes, value: Value, expires_us: int | None, extension: Extension | None = None) -> None:
        """`value`: None for what is there. `expires_us`: None: never."""
        self._key = key
        self._value = value
        self._expires_us = expires_us
        self.extension = extension
        self.found = False

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch = WriteBatch()
        self.found = set_expiry(newest, batch, self._key, self._value, self._expires_us)
        return batch if self.found else None


class PopEdge:
    """Delete the first pair of a range, or in reverse the last one; `pair` says afterwards which it was."""

    __slots__ = ("_bounds", "_reverse", "_table", "pair")

    extension: Final = None

    dropped: Final = None

    def __init__(self, bounds: KeyRange, *, reverse: bool, table: int = 0) -> None:
        self._bounds = bounds
        self._table = table
        self._reverse = reverse
        self.pair: tuple[bytes, bytes] | None = None

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        self.pair = newest.table(self._table).edge(*self._bounds, reverse=self._reverse)
        if self.pair is None:
            return None
        batch = WriteBatch()
        batch.part(self._table).writes[self.pair[0]] = None
        return batch
