"""The memtable: the in-memory sorted table of what is newer than the checkpoint.

A dict answers point reads; order is made when something scans (key_order.py).

Rules:

- The commit leader alone applies commits, under `State.lock`. A frozen table never changes again and needs no lock.
- `latest` holds the newest value of each key written since the table was made; None is a tombstone. A key never leaves
  it.
- A deleted range is an entry of `ranges`, and nothing else: O(log ranges), however many keys it covers. It hides the
  older sources and those values of `latest` that were written before it. Which these are is known from `written_at`:
  only keys written while the map is not empty carry a seqno.
- While a reader of an older moment is registered, what a commit replaces is kept in `older` (older_values.py).
- The other tables of a commit have a memtable each, which is a part of this one: it has its readers, is frozen with it,
  and its memory counts here.
- Invariant: within a commit `ranges` change first, then `older`, then `written_at`, then `latest`. So a reader that
  looks into `latest` first and `older` after needs no lock while there are no ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from kvwal.batch import WriteBatch
from kvwal.engine.key_order import KeyOrder
from kvwal.engine.older_values import OlderValues
from kvwal.engine.range_map import Cover, RangeMap
from kvwal.engine.readers import Readers
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.keys import KeyRange, Seqno
from kvwal.locks import Lock, new_lock

__all__ = ["ENTRY_OVERHEAD_BYTES", "Memtable"]

# What an entry costs beside the bytes of its key and value: two object headers (33 each) rounded up by the allocator,
# and a slot in two dicts (this one, and the row cache) and later in the order.
ENTRY_OVERHEAD_BYTES: Final = 220


class Memtable:
    """Newest values by key, lazily ordered, with older ones while a registered reader needs them."""

    __slots__ = (
        "_parts",
        "_state_lock",
        "bytes_used",
        "has_deletes",
        "last_seqno",
        "latest",
        "older",
        "order",
        "ranges",
        "written_at",
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
        #: Whether a value in `latest` may be None.
        self.has_deletes = False
        self.ranges = RangeMap()
        self.written_at: dict[bytes, Seqno] = {}
        self.older = OlderValues(Readers() if readers is None else readers)
        self._parts: dict[int, Memtable] | None = None
        #: Estimate of the memory held, for the budget.
        self.bytes_used = 0
        self._state_lock = new_lock() if state_lock is None else state_lock
        #: The keys in order, and by number.
        self.order = KeyOrder(self.latest, new_lock() if order_lock is None else order_lock)

    def __len__(self) -> int:
        return len(self.latest)

    def is_empty(self) -> bool:
        """Whether no commit has reached this table."""
        return not self.latest and not self.ranges and (self._parts is None or not self.parts())

    def part(self, table: int) -> Memtable:
        """What is newer of a table other than 0: the same object at each call. Requires: State.lock."""
        if self._parts is None:
            self._parts = {}
        part = self._parts.get(table)
        if part is None:
            part = Memtable(self.last_seqno, self._state_lock, self.order.lock, self.older.readers)
            self._parts[table] = part
        return part

    def parts(self) -> list[tuple[int, Memtable]]:
        """The tables other than 0 that were written to, with what is newer of them."""
        parts = self._parts
        return [] if parts is None else [(table, part) for table, part in list(parts.items()) if not part.is_empty()]

    def key_count(self) -> int:
        """Number of keys, of all tables, the deleted ones among them."""
        return len(self.latest) + sum(len(part.latest) for _, part in self.parts())

    # -- writing: the commit leader, under State.lock -------------------------------------------

    def delete_ranges(self, seqno: Seqno, deleted: Iterable[KeyRange]) -> None:
        """Apply the deleted ranges of a commit. To be followed by `write`, in the same section."""
        self.last_seqno = seqno
        ranges, readers = self.ranges, self.older.readers
        ranges.forget_former(readers.oldest())
        for bounds in deleted:
            ranges.add(seqno, bounds, copy=bool(readers) and readers.newest >= ranges.last_seqno)
            self.bytes_used += ENTRY_OVERHEAD_BYTES + len(bounds[0]) + len(bounds[1] or b"")

    def write(self, seqno: Seqno, writes: dict[bytes, Value], size: int) -> None:
        """Apply the puts and deletes of a commit, of `size` bytes of keys and values."""
        # First: a scan that took values without a lock looks here to see whether they may be younger than it is.
        self.last_seqno = seqno
        older = self.older
        if older.readers:
            self.bytes_used += older.keep(seqno, writes, self.latest, self.written_at)
        elif older:
            self.bytes_used -= older.forget()
            self.ranges.forget_former(None)
        if self.ranges:
            self.written_at.update(dict.fromkeys(writes, seqno))
        if not self.has_deletes and None in writes.values():
            self.has_deletes = True
        self.latest.update(writes)
        self.bytes_used += size + ENTRY_OVERHEAD_BYTES * len(writes)
        census = self.order.census
        if census is not None:
            census.dirty.update(writes)

    def write_parts(self, seqno: Seqno, parts: Iterable[tuple[int, WriteBatch]]) -> None:
        """Apply what a commit does to other tables. Their keys and values count in the size that `write` is told."""
        for table, batch in parts:
            part = self.part(table)
            before = part.bytes_used
            part.apply(seqno, batch, 0)
            self.bytes_used += part.bytes_used - before

    def apply(self, seqno: Seqno, batch: WriteBatch, size: int) -> None:
        """Apply one commit. For recovery, and for tests."""
        if batch.ranges:
            self.delete_ranges(seqno, batch.ranges)
        self.write(seqno, batch.writes, size)
        if batch.others is not None:
            self.write_parts(seqno, batch.parts())

    @classmethod
    def combined(cls, older: Memtable, newer: Memtable, readers: Readers | None = None) -> Memtable:
        """Both as one frozen table, as of the newest commit. Requires: no commit is applied meanwhile. O(keys)."""
        table = cls(newer.last_seqno, newer._state_lock, newer.order.lock, readers)
        deleted = newer.ranges.newest
        latest: dict[bytes, Any] = {key: None if deleted.at(key) else older.get(key) for key in older.latest}
        latest.update((key, newer.get(key)) for key in newer.latest)
        table.latest.update(latest)
        for bounds in (*older.ranges.newest.ranges(), *deleted.ranges()):
            table.ranges.add(newer.last_seqno, bounds, copy=False)
        if table.ranges:
            # The ranges are for older sources: what they hid here is a tombstone.
            table.written_at = dict.fromkeys(latest, newer.last_seqno)
        table.has_deletes = True
        table.bytes_used = ENTRY_OVERHEAD_BYTES * (len(latest) + len(table.ranges.added))
        table.bytes_used += sum(map(len, latest)) + sum(map(len, filter(None, latest.values())))
        olds, news = dict(older.parts()), dict(newer.parts())
        for number in {*olds, *news}:
            nothing = cls(newer.last_seqno, newer._state_lock, newer.order.lock)
            part = cls.combined(olds.get(number, nothing), news.get(number, nothing), table.older.readers)
            table._parts = {**(table._parts or {}), number: part}
            table.bytes_used += part.bytes_used
        return table

    def deletes_something(self) -> bool:
        """Whether a key or a range was deleted, in any table."""
        return self.has_deletes or bool(self.ranges) or any(part.deletes_something() for _, part in self.parts())

    # -- point reads ----------------------------------------------------------------------------

    def get(self, key: bytes) -> Value | Missing:
        """Newest value here; None if deleted here; MISSING if an older source must answer.

        Requires: State.lock if there are ranges and the table is not frozen.
        """
        value = self.latest.get(key, MISSING)
        if value is not None and self.ranges:
            at = self.ranges.newest.at(key)
            if at > self.written_at.get(key, 0):
                return None
        return value

    def get_at(self, key: bytes, seqno: Seqno) -> Value | Missing:
        """Like `get`, as of commit `seqno`. Requires: a reader at `seqno` has been registered since.

        O(log older values of the key).
        """
        if not self.ranges:
            value: Value | Missing = self.latest.get(key, MISSING)
            older = self.older.at(key, seqno)
            if older is not None:
                return older[1]
            # A first range may have been added since; then `latest` may have been written after it.
            if not self.ranges:
                return value
        return self._get_among_ranges(key, seqno)

    def _get_among_ranges(self, key: bytes, seqno: Seqno) -> Value | Missing:
        lock = self._state_lock
        if lock._is_owned():
            return self._covered(key, seqno)
        with lock:
            return self._covered(key, seqno)

    def _covered(self, key: bytes, seqno: Seqno) -> Value | Missing:
        value: Value | Missing = self.latest.get(key, MISSING)
        written = self.written_at.get(key, 0)
        older = self.older.at(key, seqno)
        if older is not None:
            _, value, written = older
        if value is not None and self.ranges.at(seqno).at(key) > written:
            return None
        return value

    # -- ordered reads --------------------------------------------------------------------------

    def cover(self, seqno: Seqno) -> Cover | None:
        """The deleted ranges as of `seqno`, which hide what older sources have; None if there are none."""
        if not self.ranges:
            return None
        cover = self.ranges.at(seqno)
        return cover or None

    def values_at(self, keys: Sequence[bytes], seqno: Seqno) -> Sequence[Value | Missing]:
        """The values of keys of this table as of `seqno`."""
        values: Sequence[Value | Missing] = list(map(self.latest.__getitem__, keys))
        # `last_seqno` is raised before a value changes: if it has not moved past us, no value here is younger.
        if self.last_seqno > seqno or self.ranges:
            values = [self.get_at(key, seqno) for key in keys]
        return values

    # -- checking -------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise AssertionError where the table's own rules do not hold (for the tests)."""
        self.order._check()
        assert self.has_deletes or None not in self.latest.values(), "has_deletes"
        assert set(self.written_at) <= set(self.latest), "a seqno of a key that was not written"
        self.older._check(self.last_seqno)
        for _, part in self.parts():
            assert part.older.readers is self.older.readers, "a part with readers of its own"
            assert part.last_seqno <= self.last_seqno, "a part from the future"
            part._check()
