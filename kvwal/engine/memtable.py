"""The memtable: the in-memory sorted table of what is newer than the checkpoint.

A dict answers point reads; order is made lazily, in bulk, when somebody scans, because keeping a
sorted container in order costs 20 times a dict insert on every put (measured: 3.9 us against 0.22).

Rules:

- One thread at a time applies commits, under the lock of `Present` that owns the table. A frozen
  table never changes again and needs no lock.
- `latest` holds the newest value of each key written since the table was made; None is a tombstone.
  A key never leaves `latest`, so the keys added since the order was last made are the last ones.
- `ranges` hide what lies in the *older* levels only: applying a range delete turns the covered keys
  of this table into tombstones, and later puts go on top.
- While a reader of an older moment is registered (`keep`), what a commit replaces is first written
  to `versions`, which says: "until before `seqno`, this key had this value here".
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice, repeat
from typing import Final, TypeAlias

from sortedcontainers import SortedList

from kvwal.batch import WriteBatch
from kvwal.keys import KeyRange, Seqno

__all__ = ["ENTRY_OVERHEAD_BYTES", "MISSING", "Memtable", "Missing", "Value", "sorted_in_steps"]


class Missing:
    """The type of `MISSING`: this level knows nothing of the key, ask the next older one."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing()

Value: TypeAlias = bytes | None

# What an entry costs beside the bytes of its key and value: two object headers (33 each) rounded up by the
# allocator, and a slot in two dicts (this one, and the rows that readers hit) and later in the order.
ENTRY_OVERHEAD_BYTES: Final = 220
_VERSION_OVERHEAD_BYTES: Final = 200

# So many keys are sorted in half a millisecond, during which no other thread has the interpreter.
_STEP: Final = 1024
# One key of so many, but no more than so many keys, say where the steps part.
_SAMPLED: Final = 128
_MOST_SAMPLES: Final = 4096


def sorted_in_steps(keys: Collection[bytes], give_way: Callable[[], None]) -> Iterator[list[bytes]]:
    """The keys in order, in lists of about `_STEP`: `sorted` of a million would stop all other threads for a second.

    They are dealt out between bounds that a sample gives, and then each list is sorted; in all that takes no longer.
    """
    every = max(_SAMPLED, len(keys) // _MOST_SAMPLES)
    rest = iter(keys)
    parts: list[list[bytes]] = []
    sample: list[bytes] = []
    while part := list(islice(rest, every)):
        # Not always the same place: keys may come from a few sources in turn.
        sample.append(part[37 * len(parts) % len(part)])
        parts.append(part)
        if not len(parts) % (_STEP // _SAMPLED):
            give_way()
    sample.sort()
    per_step = max(1, _STEP // every)
    bounds = sample[per_step::per_step]
    steps: list[list[bytes]] = [[] for _ in range(len(bounds) + 1)]
    put_into = [step.append for step in steps]
    for part in parts:
        for key in part:
            put_into[bisect_right(bounds, key)](key)
        give_way()
    for step in steps:
        step.sort()
        give_way()
        yield step


class Memtable:
    """Newest values by key, lazily ordered, with older versions while someone needs them."""

    __slots__ = (
        "_order",
        "_order_broken",
        "_order_lock",
        "_ordered",
        "_version_sweep_at",
        "bytes_used",
        "compared",
        "latest",
        "last_seqno",
        "ranges",
        "tombstones",
        "version_count",
        "versions",
    )

    def __init__(self, after: Seqno) -> None:
        #: Seqno of the newest commit applied; of the newest one below while the table is empty.
        self.last_seqno = after
        self.latest: dict[bytes, Value] = {}
        #: How many values in `latest` are None.
        self.tombstones = 0
        self.ranges: list[tuple[Seqno, KeyRange]] = []
        self.versions: dict[bytes, list[tuple[Seqno, Value | Missing]]] = {}
        self.version_count = 0
        self._version_sweep_at = 1024
        #: For count.py: how many of the first keys were looked up below this table, and how many existed there.
        self.compared = (0, 0)
        #: Estimate of the memory held, for the budget.
        self.bytes_used = 0
        # Guards what follows; writers never touch it.
        self._order_lock = threading.Lock()
        self._order: SortedList[bytes] = SortedList()
        self._ordered = 0
        # Set while keys are brought into the order. Left set by an interruption, it says that nobody knows which are.
        self._order_broken = False

    def __len__(self) -> int:
        return len(self.latest)

    def is_empty(self) -> bool:
        """Whether no commit has reached this table."""
        return not self.latest and not self.ranges

    # -- writing ------------------------------------------------------------------------------

    def apply(self, seqno: Seqno, batch: WriteBatch, size: int, oldest_reader: Seqno | None) -> None:
        """Apply one commit. `size`: bytes of its keys and values; `oldest_reader`: see `_keep`."""
        # First: a scan that took values without a lock looks here to see whether they may be younger than it is.
        self.last_seqno = seqno
        writes = batch.writes
        for bounds in batch.ranges:
            self._delete_range(seqno, bounds, oldest_reader)
        if oldest_reader is not None:
            self._keep(seqno, writes, oldest_reader)
        self._count_tombstones(writes)
        self.latest.update(writes)
        self.bytes_used += size + ENTRY_OVERHEAD_BYTES * len(writes)

    def apply_put(self, seqno: Seqno, key: bytes, value: bytes, oldest_reader: Seqno | None) -> None:
        """What `apply` does of one put to the values; the caller counts bytes and seqno (see `Present.publish_put`)."""
        if oldest_reader is not None:
            self._keep(seqno, (key,), oldest_reader)
        latest = self.latest
        if self.tombstones and latest.get(key, MISSING) is None:
            self.tombstones -= 1
        latest[key] = value

    def _count_tombstones(self, writes: dict[bytes, Value]) -> None:
        if self.tombstones:
            self.tombstones -= list(map(self.latest.get, writes, repeat(MISSING))).count(None)
        if None in writes.values():
            self.tombstones += list(writes.values()).count(None)

    def _delete_range(self, seqno: Seqno, bounds: KeyRange, oldest_reader: Seqno | None) -> None:
        covered: dict[bytes, Value] = {
            key: None for key, value in self.latest.items() if value is not None and bounds.contains(key)
        }
        if oldest_reader is not None:
            self._keep(seqno, covered, oldest_reader)
        else:
            # Nobody reads an older moment of this table: a wider range makes the ones inside it needless.
            self.ranges = [(at, older) for at, older in self.ranges if not bounds.covers(older)]
        self.latest.update(covered)
        self.tombstones += len(covered)
        self.ranges.append((seqno, bounds))
        self.bytes_used += ENTRY_OVERHEAD_BYTES + len(bounds.start) + len(bounds.stop or b"")

    def _keep(self, seqno: Seqno, writes: Iterable[bytes], oldest_reader: Seqno) -> None:
        """Remember what `writes` replaces. No reader is older than `oldest_reader`."""
        versions, latest = self.versions, self.latest
        count = 0
        for key in writes:
            history = versions.get(key)
            prior = latest.get(key, MISSING)
            if history is None:
                versions[key] = [(seqno, prior)]
            else:
                if history[0][0] <= oldest_reader:
                    # Entries say what held *before* their seqno: nobody reads that far back any more.
                    # A new list, since a reader may be walking the old one.
                    kept = [entry for entry in history if entry[0] > oldest_reader]
                    count -= len(history) - len(kept)
                    versions[key] = history = kept
                history.append((seqno, prior))
            count += 1
        self.version_count += count
        self.bytes_used += count * _VERSION_OVERHEAD_BYTES
        if self.version_count > self._version_sweep_at:
            self._sweep(oldest_reader)

    def _sweep(self, oldest_reader: Seqno) -> None:
        before = self.version_count
        swept = {}
        for key, history in self.versions.items():
            kept = [entry for entry in history if entry[0] > oldest_reader]
            if kept:
                swept[key] = kept
        self.versions = swept
        self.version_count = sum(map(len, swept.values()))
        # Doubling makes the sweeps cost a constant each commit, however many stay.
        self._version_sweep_at = 2 * self.version_count + 1024
        self.bytes_used -= (before - self.version_count) * _VERSION_OVERHEAD_BYTES

    def forget_versions(self) -> None:
        """No reader of an older moment is left."""
        self.bytes_used -= self.version_count * _VERSION_OVERHEAD_BYTES
        self.versions = {}
        self.version_count = 0
        self._version_sweep_at = 1024

    # -- point reads --------------------------------------------------------------------------

    def get(self, key: bytes) -> Value | Missing:
        """Newest value here; None if deleted here; MISSING if an older level must answer."""
        value = self.latest.get(key, MISSING)
        if value is MISSING and self.ranges and self._hidden(key, self.last_seqno):
            return None
        return value

    def get_at(self, key: bytes, seqno: Seqno) -> Value | Missing:
        """Like `get`, as of commit `seqno`. Requires: a reader at `seqno` has been registered since."""
        value: Value | Missing = self.latest.get(key, MISSING)
        for changed_at, prior in self.versions.get(key, ()):
            if changed_at > seqno:
                value = prior
                break
        if value is MISSING and self.ranges and self._hidden(key, seqno):
            return None
        return value

    def _hidden(self, key: bytes, seqno: Seqno) -> bool:
        return any(at <= seqno and bounds.contains(key) for at, bounds in self.ranges)

    def masks_at(self, seqno: Seqno) -> list[KeyRange]:
        """The ranges that hide older levels for a reader at `seqno`."""
        return [bounds for at, bounds in self.ranges if at <= seqno]

    # -- ordered reads ------------------------------------------------------------------------

    def keys_between(
        self, start: bytes | None, stop: bytes | None, *, after: bytes | None, reverse: bool, most: int
    ) -> list[bytes]:
        """Up to `most` keys of [start, stop) in order, beyond `after` (exclusive) in that direction."""
        with self._order_lock:
            self._fold()
            if after is not None:
                if reverse:
                    stop = after
                    inclusive = (True, False)
                else:
                    start = after
                    inclusive = (False, False)
            else:
                inclusive = (True, False)
            return list(islice(self._order.irange(start, stop, inclusive, reverse), most))

    def keys_added(self, first: int, stop: int) -> list[bytes]:
        """The keys that came as number `first` (from 0) up to but without `stop`. Needs no lock."""
        while True:
            try:
                return list(islice(self.latest, first, stop))
            except RuntimeError:
                # A writer added a key after the iterator was made and before it was used up.
                continue

    def in_order(self, give_way: Callable[[], None]) -> Iterator[list[bytes]]:
        """All keys in order, in short lists. Requires: the table is frozen.

        Not by way of the order that scans use, which is made in one go.
        """
        return sorted_in_steps(self.latest, give_way)

    def _fold(self) -> None:
        # Requires: _order_lock. Keys never leave `latest` and a dict keeps insertion order, so the new ones are
        # its last. A writer may add one meanwhile; then the last `new` would not be all: count again.
        if self._order_broken:
            self._order, self._ordered, self._order_broken = SortedList(), 0, False
        latest = self.latest
        while new := len(latest) - self._ordered:
            try:
                keys = list(islice(reversed(latest), new))
            except RuntimeError:
                # A key was added after the iterator was made and before it was used up.
                continue
            if len(latest) == self._ordered + new:
                self._order_broken = True
                self._order.update(keys)
                self._ordered += new
                self._order_broken = False
                break

    # -- checking -----------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise AssertionError where the table's own rules do not hold (for the tests)."""
        keys = self.keys_between(None, None, after=None, reverse=False, most=len(self.latest) + 1)
        assert keys == sorted(self.latest), "order and dict disagree"
        assert self.tombstones == list(self.latest.values()).count(None), "tombstones"
        assert self.version_count == sum(map(len, self.versions.values())), "version count"
        for history in self.versions.values():
            seqnos = [at for at, _ in history]
            # A commit that deletes a range and then puts a key of it replaces its value twice; the first one counts.
            assert seqnos == sorted(seqnos), "versions out of order"
            assert bisect_left(seqnos, self.last_seqno + 1) == len(seqnos), "a version from the future"
