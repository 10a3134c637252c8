"""The memtable: the in-memory sorted table of what is newer than the checkpoint.

A dict answers point reads; order is made when something scans (key_order.py).

Rules:

- The commit leader alone applies commits, under `State.lock`. A frozen table never changes again and needs no lock.
- `latest` holds the newest value of each key written since the table was made; None is a tombstone. A key never leaves
  it.
- A deleted range is an entry of `ranges`, and nothing else: O(log ranges), however many keys it covers. It hides the
  older sources and those values of `latest` that were written before it. Which these are is known from `_written_at`:
  only keys written while the map is not empty carry a seqno.
- While a reader of an older moment is registered, what a commit replaces is kept in `older` (older_values.py).
- The other tables of a commit have a memtable each, which is a part of this one: it has its readers, is frozen with it,
  and its memory counts here.
- Invariant: within a commit `ranges` change first, then `older`, then `_written_at`, then `latest`. So a reader that
  looks into `latest` first and `older` after needs no lock while there are no ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from kvwal.batch import WriteBatch
from kvwal.engine.key_order import KeyOrder
from kvwal.engine.older_values import OlderValues
from kvwal.engine.range_map import RangeMap
from kvwal.engine.readers import Readers
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.expiring import Expiring
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno
from kvwal.locks import Lock, new_lock, shared_items

__all__ = ["ENTRY_OVERHEAD_BYTES", "Memtable", "Parts", "Walk", "combine", "deletes_something", "is_queued"]

# What an entry costs beside the bytes of its key and value: two object headers (33 each) rounded up by the allocator,
# and a slot in two dicts (this one, and the row cache) and later in the order.
ENTRY_OVERHEAD_BYTES: Final = 220

# Small first, so that a scan of a few keys stays cheap; then larger, so that a long one is.
_FIRST_CHUNK: Final = 64
_LARGEST_CHUNK: Final = 1024


class Walk:
    """What a scan met on its way."""

    __slots__ = ("dead",)

    def __init__(self) -> None:
        #: Tombstones.
        self.dead = 0


class Memtable:
    """Newest values by key, lazily ordered, with older ones while a registered reader needs them."""

    __slots__ = (
        "_has_deletes",
        "_state_lock",
        "_written_at",
        "bytes_used",
        "has_expiring",
        "last_seqno",
        "latest",
        "older",
        "order",
        "parts",
        "ranges",
    )

    def __init__(
        self,
        after: Seqno,
        state_lock: Lock | None = None,
        order_lock: Lock | None = None,
        readers: Readers | None = None,
    ) -> None:
        """Empty, with the locks of its store (else its own), and the readers of the table that it is a part of."""
        #: Seqno of the newest commit applied; of the newest one below while the table is empty.
        self.last_seqno = after
        self.latest: dict[bytes, Value] = {}
        # Whether a value in `latest` may be None.
        self._has_deletes = False
        #: Whether a value, of any moment, may be one that expires.
        self.has_expiring = False
        self.ranges = RangeMap()
        self._written_at: dict[bytes, Seqno] = {}
        self.older = OlderValues(Readers() if readers is None else readers)
        #: Estimate of the memory held, for the budget.
        self.bytes_used = 0
        self._state_lock = new_lock() if state_lock is None else state_lock
        #: The keys in order, and by number.
        self.order = KeyOrder(self.latest, new_lock() if order_lock is None else order_lock)
        self.parts = Parts(after, self._state_lock, self.order.lock, self.older.readers)

    def __len__(self) -> int:
        """Number of keys, of all tables, the deleted ones among them."""
        return len(self.latest) + sum(len(part) for _, part in self.parts.written())

    def __bool__(self) -> bool:
        """Whether a commit has reached this table, or a part of it."""
        return bool(self.latest or self.ranges or self.parts.written())

    # -- writing: the commit leader, under State.lock -------------------------------------------

    def write(
        self,
        seqno: Seqno,
        writes: Mapping[bytes, Value],
        size: int,
        ranges: Sequence[KeyRange] = (),
        parts: Sequence[tuple[int, WriteBatch]] = (),
    ) -> None:
        """Apply a commit: the ranges it deletes, its writes, and what it does to other tables.

        `size`: bytes of its keys and values, those of other tables among them.
        """
        # First: a scan that took values without a lock looks here to see whether they may be younger than it is.
        self.last_seqno = seqno
        if ranges:
            self._delete(seqno, ranges)
        older = self.older
        if older.readers:
            self.bytes_used += older.keep(seqno, writes, self.latest, self._written_at)
        elif older:
            self.bytes_used -= older.forget()
            self.ranges.forget_former(None)
        if self.ranges:
            self._written_at.update(dict.fromkeys(writes, seqno))
        if not self._has_deletes and None in writes.values():
            self._has_deletes = True
        if is_queued(parts):
            self._look_for_expiring(writes)
            for table, batch in parts:
                self.parts.of(table)._look_for_expiring(batch.writes)
        self.latest.update(writes)
        self.bytes_used += size + ENTRY_OVERHEAD_BYTES * len(writes)
        census = self.order.census
        if census is not None:
            census.dirty.update(writes)
        for table, batch in parts:
            part = self.parts.of(table)
            before = part.bytes_used
            part.write(seqno, batch.writes, 0, batch.ranges)
            self.bytes_used += part.bytes_used - before

    def _look_for_expiring(self, writes: Mapping[bytes, Value]) -> None:
        if not self.has_expiring and Expiring in set(map(type, writes.values())):
            self.has_expiring = True

    def _delete(self, seqno: Seqno, deleted: Sequence[KeyRange]) -> None:
        ranges, readers = self.ranges, self.older.readers
        ranges.forget_former(readers.oldest())
        for bounds in deleted:
            ranges.add(seqno, bounds, copy=bool(readers) and readers.newest >= ranges.last_seqno)
            self.bytes_used += ENTRY_OVERHEAD_BYTES + len(bounds[0]) + len(bounds[1] or b"")

    # -- point reads ----------------------------------------------------------------------------

    def get(self, key: bytes) -> Value | Missing:
        """Newest value here; None if deleted here; MISSING if an older source must answer.

        Requires: State.lock if there are ranges and the table is not frozen.
        """
        value = self.latest.get(key, MISSING)
        if value is not None and self.ranges and self.ranges.newest.at(key) > self._written_at.get(key, 0):
            return None
        return value

    def get_at(self, key: bytes, seqno: Seqno) -> Value | Missing:
        """Like `get`, as of commit `seqno`. Requires: a reader at `seqno` has been registered since.

        O(log older values of the key).
        """
        ranges = self.ranges.added
        if not ranges:
            value: Value | Missing = self.latest.get(key, MISSING)
            older = self.older.at(key, seqno)
            if older is not None:
                return older[1]
            # A first range may have been added since; then `latest` may have been written after it.
            if not ranges:
                return value
        lock = self._state_lock
        if lock._is_owned():
            return self._covered(key, seqno)
        with lock:
            return self._covered(key, seqno)

    def _covered(self, key: bytes, seqno: Seqno) -> Value | Missing:
        value: Value | Missing = self.latest.get(key, MISSING)
        written = self._written_at.get(key, 0)
        older = self.older.at(key, seqno)
        if older is not None:
            _, value, written = older
        if value is not None and self.ranges.at(seqno).at(key) > written:
            return None
        return value

    # -- ordered reads --------------------------------------------------------------------------

    def chunks(
        self,
        seqno: Seqno,
        start: bytes | None,
        stop: bytes | None,
        *,
        reverse: bool,
        walk: Walk | None,
        check: Callable[[], None],
    ) -> Iterator[tuple[list[bytes], Sequence[Value]]]:
        """The keys of a range that this table knows of as of `seqno`, and their values, in short lists."""
        most = _FIRST_CHUNK
        after: bytes | None = None
        while True:
            # Before the lock: after a fork no thread may be there to give it back.
            check()
            keys = self.order.between(start, stop, after=after, reverse=reverse, most=most)
            if not keys:
                return
            after = keys[-1]
            most = min(2 * most, _LARGEST_CHUNK)
            values: Sequence[Value] = list(map(self.latest.__getitem__, keys))
            # It is raised before a value changes: if it has not moved past us, no value here is younger.
            if self.last_seqno > seqno or self.ranges:
                found = [self.get_at(key, seqno) for key in keys]
                if MISSING in found:
                    keys = [key for key, value in zip(keys, found, strict=True) if value is not MISSING]
                    found = [value for value in found if value is not MISSING]
                values = found  # type: ignore[assignment]  # none is MISSING
            if walk is not None and self._has_deletes:
                walk.dead += values.count(None)
            if keys:
                yield keys, values

    # -- checking -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise AssertionError where the table's own rules do not hold (for the tests)."""
        self.order._check()
        assert self._has_deletes or None not in self.latest.values(), "has_deletes"
        assert self.has_expiring or Expiring not in set(map(type, self.latest.values())), "has_expiring"
        assert set(self._written_at) <= set(self.latest), "a seqno of a key that was not written"
        self.older._check(self.last_seqno)
        for _, part in self.parts.written():
            assert part.older.readers is self.older.readers, "a part with readers of its own"
            assert part.last_seqno <= self.last_seqno, "a part from the future"
            part._check()


class Parts:
    """What is newer of the tables other than 0: a memtable each, which is made when it is first asked for."""

    __slots__ = ("_like", "_made")

    def __init__(self, *like: Any) -> None:
        """`like`: what each of them is made with."""
        self._like = like
        self._made: dict[int, Memtable] = {}

    def of(self, table: int) -> Memtable:
        """That of a table: the same object at each call. Requires: State.lock."""
        part = self._made.get(table)
        if part is None:
            part = self._made[table] = Memtable(*self._like)
        return part

    def written(self) -> list[tuple[int, Memtable]]:
        """Those that a commit has reached, and their tables."""
        return [(table, part) for table, part in shared_items(self._made) if part]


def deletes_something(memtable: Memtable) -> bool:
    """Whether a key or a range was deleted, in any table."""
    tables = (memtable, *(part for _, part in memtable.parts.written()))
    return any(table._has_deletes or table.ranges for table in tables)


def is_queued(parts: Sequence[tuple[int, WriteBatch]]) -> bool:
    """Whether a commit that writes this to other tables may put what expires.

    Its rows of the queue are in table 1 then, which comes first.
    """
    return bool(parts) and parts[0][0] == SYSTEM_TABLE


def combine(older: Memtable, newer: Memtable, into: Memtable) -> None:
    """Bring what both hold into an empty table, as one commit. Requires: no other is applied meanwhile. O(keys)."""
    deleted = newer.ranges.newest
    # The ranges are for older sources: what they hid here is a tombstone.
    writes: dict[bytes, Any] = {key: None if deleted.at(key) else older.get(key) for key in older.latest}
    writes.update((key, newer.get(key)) for key in newer.latest)
    size = sum(map(len, writes)) + sum(map(len, filter(None, writes.values())))
    # Before the values, as where a commit is applied.
    into.has_expiring = older.has_expiring or newer.has_expiring
    into.write(newer.last_seqno, writes, size, [*older.ranges.newest.ranges(), *deleted.ranges()])
    olds, news = dict(older.parts.written()), dict(newer.parts.written())
    for table in {*olds, *news}:
        part, nothing = into.parts.of(table), Memtable(newer.last_seqno)
        combine(olds.get(table, nothing), news.get(table, nothing), part)
        into.bytes_used += part.bytes_used
