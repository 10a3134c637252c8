"""The present: what readers see now, and the one place where a commit becomes visible.

A read descends the *levels*: the memtable, the frozen memtable (being checkpointed, if any), the
tree. In front of them stand the *rows*, a dict of the newest values of keys that were lately
written or read, so that a hot get is one dict hit without a lock.

Rules:

- `lock` guards everything here except `rows` lookups. It is held for microseconds, never during
  I/O. Lock order: the commit leadership, then `lock`, then the page file's own. Nothing that can
  run from garbage collection takes it without asking first (see `release`).
- Invariant: a row, where there is one, is the newest published value of its key (None: absent).
  Publishing changes all rows of a commit in ONE `dict.update`, a single C call over bytes keys that
  no other thread can interleave with; that call is the moment the commit becomes visible. The
  slower path reads under `lock`, and so sees the levels before or after, never between.
- `horizon` is raised before the rows change, `seqno` after: a reader that took a row and still
  finds `horizon` at its own seqno knows that the row is not from its future.
- A reader that fetched a row from the tree may only remember it while the levels are the same and
  no commit touched the key meanwhile: else it would bring an old value back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Final
from weakref import ref

from kvwal.batch import WriteBatch
from kvwal.engine.count import Layer, count_all
from kvwal.engine.few import Pairs, overlaid
from kvwal.engine.memtable import MISSING, Memtable, Missing, Value
from kvwal.engine.merge import Level, RawChunk
from kvwal.engine.occ import History
from kvwal.errors import ClosedError
from kvwal.keys import Seqno, disjoint, in_any
from kvwal.pages import PageFile, Tree

__all__ = ["Levels", "Present", "View"]

# Two object headers and a slot in a dict: 144 bytes for a key of 16 and a value of 100.
_ROW_OVERHEAD_BYTES: Final = 150
# Rows and pages share the cache's budget: the rows begin with one part of it, take another whenever they are full, and
# stop at the most; what they have not taken is for pages. One part is room for the inner nodes of some ten million
# keys. A row answers in a fortieth of the time of a cached page.
_CACHE_PARTS: Final = 16
_ROWS_FIRST: Final = 2
_ROWS_MOST: Final = 12
# Small first, so that a scan of a few keys stays cheap; then larger, so that a long one is.
_FIRST_CHUNK: Final = 64
_LARGEST_CHUNK: Final = 1024
# A longer range is read chunk by chunk.
_FEW: Final = 256


class Levels:
    """The memtable, the frozen one and the tree that belong together. Never changes, only replaced."""

    __slots__ = ("current", "frozen", "memtable", "readers", "tree")

    def __init__(self, memtable: Memtable, frozen: Memtable | None, tree: Tree) -> None:
        self.memtable = memtable
        self.frozen = frozen
        self.tree = tree
        #: Guarded by Present.lock: who reads these levels now; the tree's pages stay while anybody does.
        self.readers = 0
        self.current = True


class View:
    """A registered reader at one seqno: while it is registered, everything as of then stays readable.

    It is registered for as long as somebody refers to it and it was not released. So whoever is interrupted, wherever
    that is, pins nothing for good.
    """

    __slots__ = (
        "__weakref__",
        "_present",
        "_registry",
        "levels",
        "owner",
        "purpose",
        "released",
        "seqno",
        "since_us",
        "thread",
        "writer",
    )

    def __init__(
        self,
        present: Present,
        levels: Levels,
        seqno: Seqno,
        registry: dict[Seqno, int],
        purpose: str,
        since_us: int,
        writer: bool,
        owner: object,
    ) -> None:
        self.released = False
        self._present = present
        self.levels = levels
        self.seqno = seqno
        self._registry = registry
        self.purpose = purpose
        self.since_us = since_us
        #: Whether its reads will be validated, so that the history of commits must reach back to it.
        self.writer = writer
        #: The store: while somebody reads, it is not collected, and so its lock not given to another process.
        self.owner = owner
        #: The one that registered it.
        self.thread = threading.current_thread()

    def __del__(self) -> None:
        # Releasing never waits for a lock, so this is safe wherever the collector runs.
        try:
            released = self.released
        except AttributeError:
            # Interrupted before its making began.
            return
        if not released:
            self._present.release(self)


class Present:
    """Rows, levels and readers of one open store."""

    def __init__(self, pages: PageFile, *, cache_bytes: int, memtable_bytes: int) -> None:
        meta = pages.meta
        self._memtable_budget = memtable_bytes
        #: Set when a writer should look after something before its next commit: see `pressure`.
        self.attention = False
        #: Set, with `attention`, when a commit met a full disk: the next one is to reclaim what deletes have freed.
        self.short_of_space = False
        # Gates of those who wait for a checkpoint to end. (No Event: a signal handler that raises in one that waits
        # could leave the lock inside of it held.)
        self._relief: deque[threading.Lock] = deque()
        self._pages = pages
        self.lock = threading.Lock()
        self.rows: dict[bytes, Value] = {}
        self._cache_bytes = cache_bytes
        self._row_budget = 0
        self._row_bytes = 0
        self._give_rows(_ROWS_FIRST)
        self.seqno: Seqno = meta.seqno
        self.horizon: Seqno = meta.seqno
        pages.pin(meta.generation)
        self.levels = Levels(Memtable(meta.seqno), None, pages.tree(meta))
        # Readers of the active memtable, by seqno, oldest first (seqnos only grow).
        self._registry: dict[Seqno, int] = {}
        # Open read-write transactions by seqno, oldest first.
        self._writers: dict[Seqno, int] = {}
        #: Recent commits, while a read-write transaction is open. Changed by the commit leader under `lock`; `begin`
        #: needs only the lock, since a leader that validates implies an open writer.
        self.history = History()
        # By id. Weak: see `View`.
        self._views: dict[int, ref[View]] = {}
        self._gone: Callable[[], Exception] | None = None
        # Views given back by whoever could not wait for the lock; append and popleft are atomic.
        self._released: deque[View] = deque()

    # -- publishing ---------------------------------------------------------------------------

    def publish(self, seqno: Seqno, batch: WriteBatch, size: int) -> None:
        """Make a commit visible, whole. Requires: it is the next in order, and durable if it was asked to be."""
        writes = batch.writes
        with self.lock:
            if self._released:
                self._drain()
            oldest = next(iter(self._registry)) if self._registry else None
            self.horizon = seqno
            if batch.ranges:
                self.rows.update(self._rows_with_ranges(batch))
            else:
                self.rows.update(writes)
            self.levels.memtable.apply(seqno, batch, size, oldest)
            if self._writers:
                self._record(seqno, batch)
            self.seqno = seqno
            if self.levels.memtable.bytes_used > self._memtable_budget:
                self.attention = True
            self._row_bytes += size + _ROW_OVERHEAD_BYTES * len(writes)
            if self._row_bytes > self._row_budget:
                self._turn_rows()

    def publish_put(self, seqno: Seqno, key: bytes, value: bytes, size: int) -> None:
        """`publish` of a commit that is one put. `size` includes the overhead of an entry."""
        with self.lock:
            if self._released:
                self._drain()
            memtable = self.levels.memtable
            # Both before any value changes: a scan takes values without the lock, and then looks whether they may be
            # younger than it is.
            self.horizon = memtable.last_seqno = seqno
            self.rows[key] = value
            if self._registry or memtable.tombstones:
                memtable.apply_put(seqno, key, value, next(iter(self._registry)) if self._registry else None)
            else:
                # The same, without a call: nobody needs what is replaced, and there is no tombstone to replace.
                memtable.latest[key] = value
            memtable.bytes_used = used = memtable.bytes_used + size
            if used > self._memtable_budget:
                self.attention = True
            if self._writers:
                batch = WriteBatch()
                batch.writes[key] = value
                self._record(seqno, batch)
            self.seqno = seqno
            self._row_bytes = used = self._row_bytes + size
            if used > self._row_budget:
                self._turn_rows()

    def recount(self) -> None:
        """Publishing was interrupted and will be, or was, done again: count what it counts anew."""
        with self.lock:
            memtable = self.levels.memtable
            memtable.tombstones = list(memtable.latest.values()).count(None)
            memtable.version_count = sum(map(len, memtable.versions.values()))

    def _record(self, seqno: Seqno, batch: WriteBatch) -> None:
        self.history.forget(next(iter(self._writers)))
        self.history.record(seqno, batch)

    def _rows_with_ranges(self, batch: WriteBatch) -> dict[bytes, Value]:
        # Every row in a deleted range must change in the same single update as the writes.
        changed: dict[bytes, Value] = {}
        ranges = disjoint(batch.ranges)
        # Readers may add rows only under the lock, which we hold.
        changed.update((key, None) for key in self.rows if in_any(key, ranges))
        changed.update(batch.writes)
        return changed

    @property
    def row_bytes(self) -> int:
        """Estimate of the memory of the rows."""
        return self._row_bytes

    def _give_rows(self, parts: int) -> None:
        # Requires: lock.
        self._row_parts = parts
        self._row_budget = self._cache_bytes * parts // _CACHE_PARTS
        self._pages.resize_cache(self._cache_bytes - self._row_budget)

    def _turn_rows(self) -> None:
        # Requires: lock.
        while self._row_bytes > self._row_budget and self._row_parts < _ROWS_MOST:
            self._give_rows(self._row_parts + 1)
        if self._row_bytes <= self._row_budget:
            return
        # The older ones go, until half of the budget is left. (Two dicts, the older one dropped whole, were tried: a
        # set of keys that is read over and over then has to fit into half of the budget, or every get misses.)
        # Those who still hold the former dict read values that were the newest when they took it.
        rows = self.rows
        kept = len(rows) * (self._row_budget // 2) // self._row_bytes
        self.rows = dict(islice(rows.items(), len(rows) - kept, None))
        self._row_bytes = self._row_budget // 2

    # -- point reads --------------------------------------------------------------------------

    def read(self, key: bytes, *, cached_only: bool = False) -> Value:
        """The newest published value when there is no row for the key.

        With `cached_only` no file is read: NotCached is raised where one would have to be.
        """
        reading: Levels | None = None
        try:
            with self.lock:
                self.refuse_if_gone()
                found = self._recall(key)
                if not isinstance(found, Missing):
                    return found
                levels = self.levels
                masks = len(levels.memtable.ranges)
                levels.readers += 1
                reading = levels
            value = levels.tree.peek(key) if cached_only else levels.tree.get(key)
        except BaseException:
            if reading is not None:
                with self.lock:
                    reading.readers -= 1
                    self._unpin(reading)
            raise
        with self.lock:
            levels.readers -= 1
            self._unpin(levels)
            memtable = levels.memtable
            if self.levels is levels and key not in memtable.latest and len(memtable.ranges) == masks:
                self._remember(key, value)
        return value

    def _recall(self, key: bytes) -> Value | Missing:
        """What is known of the newest value without touching the tree. Requires: lock."""
        found: Value | Missing = self.rows.get(key, MISSING)
        if found is not MISSING:
            return found
        found = self.levels.memtable.get(key)
        if isinstance(found, Missing) and self.levels.frozen is not None:
            found = self.levels.frozen.get(key)
        if not isinstance(found, Missing):
            self._remember(key, found)
        return found

    def _remember(self, key: bytes, value: Value) -> None:
        self.rows[key] = value
        self._row_bytes += len(key) + (len(value) if value is not None else 0) + _ROW_OVERHEAD_BYTES
        if self._row_bytes > self._row_budget:
            self._turn_rows()

    def read_at(self, view: View, key: bytes, *, cached_only: bool = False) -> Value:
        """The value as of the view's seqno. `cached_only`: as in `read`."""
        if self._gone is not None:
            raise self._gone()
        levels = view.levels
        if self.horizon == view.seqno and self.levels is levels:
            # Nothing was published since: the newest value is the view's, if that is still so after reading.
            value = self.rows.get(key, MISSING)
            if isinstance(value, Missing):
                value = self.read(key, cached_only=cached_only)
            if self.horizon == view.seqno:
                return value
        with self.lock:
            found = levels.memtable.get_at(key, view.seqno)
        if isinstance(found, Missing) and levels.frozen is not None:
            found = levels.frozen.get(key)
        if isinstance(found, Missing):
            return levels.tree.peek(key) if cached_only else levels.tree.get(key)
        return found

    # -- ordered reads ------------------------------------------------------------------------

    def few(
        self, start: bytes | None, stop: bytes | None, limit: int | None, seqno: Seqno | None, *, reverse: bool
    ) -> Pairs | None:
        """The pairs of a range at once, if it is short and lies in memory; else None, and the long way is to be taken.

        Args:
            limit: at least so many pairs if there are; None for all of them.
            seqno: of the moment that is wanted; None for now.
        """
        most = _FEW if limit is None else limit
        if most > _FEW:
            return None
        # Before any lock: after a fork nobody may be there to give it back.
        self.refuse_if_gone()
        # Without the lock, since to bring keys into order may take long. What is found is of this moment if no commit
        # is published, and no checkpoint settles, from here on until the lock is held.
        if seqno is None:
            seqno = self.seqno
        levels = self.levels
        memtable = levels.memtable
        # Newer keys may take some of them away; then these are missed, unless there are a few more.
        spare = (most >> 3) + 1 if memtable.latest else 0
        found = levels.tree.cached_pairs(start, stop, most + spare, reverse=reverse)
        if found is None:
            return None
        pairs, ended = found
        keys: list[bytes] = []
        if memtable.latest:
            if not ended:
                # Beyond these pairs nothing is wanted.
                start, stop = (pairs[-1][0], stop) if reverse else (start, pairs[-1][0] + b"\0")
            # One more, to see whether they are all.
            keys = memtable.keys_between(start, stop, after=None, reverse=reverse, most=most + 1)
        with self.lock:
            self.refuse_if_gone()
            if self.seqno != seqno or self.levels is not levels or memtable.ranges or levels.frozen is not None:
                return None
            if keys:
                cut = len(keys) > most
                pairs = overlaid(pairs, keys, memtable.latest, cut=cut, reverse=reverse)
                ended = ended and not cut
        return pairs if ended or (limit is not None and len(pairs) >= most) else None

    def ordered_levels(self, view: View, start: bytes | None, stop: bytes | None, *, reverse: bool) -> list[Level]:
        """The view's levels as sources for `merged`, oldest first."""
        levels = view.levels
        result = [Level(levels.tree.chunks(start, stop, reverse=reverse), deletes=False)]
        if levels.frozen is not None and not levels.frozen.is_empty():
            result.append(
                Level(
                    self._memtable_chunks(levels.frozen, levels.frozen.last_seqno, start, stop, reverse=reverse),
                    levels.frozen.masks_at(levels.frozen.last_seqno),
                )
            )
        if not levels.memtable.is_empty():
            with self.lock:
                masks = levels.memtable.masks_at(view.seqno)
            result.append(
                Level(self._memtable_chunks(levels.memtable, view.seqno, start, stop, reverse=reverse), masks)
            )
        return result

    def _memtable_chunks(
        self, memtable: Memtable, seqno: Seqno, start: bytes | None, stop: bytes | None, *, reverse: bool
    ) -> Iterator[RawChunk]:
        most = _FIRST_CHUNK
        after: bytes | None = None
        while keys := memtable.keys_between(start, stop, after=after, reverse=reverse, most=most):
            self.refuse_if_gone()
            after = keys[-1]
            most = min(2 * most, _LARGEST_CHUNK)
            values: Sequence[Value] = list(map(memtable.latest.__getitem__, keys))
            # The horizon is raised before a table changes: if it has not moved past us, nothing here is younger.
            if self.horizon > seqno and memtable.last_seqno > seqno:
                with self.lock:
                    found = [memtable.get_at(key, seqno) for key in keys]
                pairs = [(k, v) for k, v in zip(keys, found, strict=True) if not isinstance(v, Missing)]
                keys, values = [k for k, _ in pairs], [v for _, v in pairs]
            if keys:
                yield keys, values

    # -- views --------------------------------------------------------------------------------

    def view(self, purpose: str, since_us: int, *, writer: bool = False, owner: object = None) -> View:
        """Register a reader of this moment. Give it back with `release`."""
        with self.lock:
            if self._released:
                self._drain()
            levels = self.levels
            self.refuse_if_gone()
            seqno = self.seqno
            registry = self._registry
            view = View(self, levels, seqno, registry, purpose, since_us, writer, owner)
            entry, number = ref(view), id(view)
            readers = registry.get(seqno, 0) + 1
            if writer:
                # Decided under the lock that publishing takes: every commit after `seqno` sees this writer and
                # is recorded, and none before it can matter.
                if not self._writers:
                    self.history.begin(seqno)
                writers = self._writers.get(seqno, 0) + 1
                # Without a call from here to the end, so that an interruption comes before all of it or after.
                self._writers[seqno] = writers
            registry[seqno] = readers
            levels.readers += 1
            self._views[number] = entry
            return view

    def again(self, view: View, purpose: str) -> View:
        """A second registration of a view's moment. ClosedError if another thread has just released it."""
        with self.lock:
            self.refuse_if_gone()
            if view.released:
                raise ClosedError(f"this {view.purpose} is closed")
            other = View(self, view.levels, view.seqno, view._registry, purpose, view.since_us, False, view.owner)
            entry, number = ref(other), id(other)
            # As in `view`.
            view._registry[view.seqno] += 1
            view.levels.readers += 1
            self._views[number] = entry
            return other

    def release(self, view: View) -> None:
        """Give a view back. Idempotent; may be called from a finalizer, whatever locks the thread holds."""
        if view.released:
            return
        view.released = True
        self._released.append(view)
        # Garbage collection can call this inside our own critical section, and then waiting would be for ever; whoever
        # holds the lock, or takes it next, finds the view in the queue. If it is free now, this thread does not hold
        # it, and waiting for another that takes it in between is a matter of microseconds. (Not acquire without
        # blocking and then try: a signal handler that raises between the two would leave the lock held for ever. The
        # interpreter runs no handler between taking a lock and entering its `with` block.)
        if not self.lock.locked():
            with self.lock:
                self._drain()

    def _drain(self) -> None:
        # Requires: lock.
        while self._released:
            # It stays in the queue until it is done with; what was done of it is not done again.
            view = self._released[0]
            registry, levels, seqno, number = view._registry, view.levels, view.seqno, id(view)
            # Without a call as far as the readers, so that an interruption comes before all of it or after. (One that
            # was interrupted while it was made is not there.)
            gone = number in self._views
            if gone:
                del self._views[number]
                left = registry[seqno] - 1
                if left:
                    registry[seqno] = left
                else:
                    del registry[seqno]
                if view.writer:
                    left = self._writers[seqno] - 1
                    if left:
                        self._writers[seqno] = left
                    else:
                        del self._writers[seqno]
                levels.readers -= 1
            if not registry and registry is self._registry and self.levels.memtable.versions:
                self.levels.memtable.forget_versions()
            self._released.popleft()
            if gone:
                # Once, and so not again after an interruption: that keeps pages, until the store is opened again.
                self._unpin(levels)

    def _unpin(self, levels: Levels) -> None:
        # Requires: lock, and that a reader has just left.
        if not levels.readers and not levels.current:
            self._pages.unpin(levels.tree.meta.generation)

    def views(self) -> list[View]:
        """Who reads now."""
        with self.lock:
            self._drain()
            # One that is just being collected is not there any more.
            return [view for entry in list(self._views.values()) if (view := entry()) is not None]

    # -- pressure -----------------------------------------------------------------------------

    def is_full(self) -> bool:
        """Whether the memtable is past its budget, so that a checkpoint should start."""
        return self.levels.memtable.bytes_used > self._memtable_budget

    def is_stalled(self) -> bool:
        """Whether it is at twice its budget while the one before is still being checkpointed: writers wait."""
        levels = self.levels
        return levels.frozen is not None and levels.memtable.bytes_used > 2 * self._memtable_budget

    def await_relief(self, timeout_s: float) -> None:
        """Wait until a checkpoint ended, one way or the other."""
        gate = threading.Lock()
        gate.acquire()
        self._relief.append(gate)
        # Looked at after the gate is there for all to open: a checkpoint that ended before is seen here.
        if self.is_stalled():
            gate.acquire(timeout=timeout_s)

    def relieved(self) -> None:
        """A checkpoint ended."""
        while self._relief:
            # Nobody else opens it: who takes it out of the queue has it alone.
            self._relief.popleft().release()

    # -- freezing and settling ----------------------------------------------------------------

    def freeze(self) -> Memtable | None:
        """Set the memtable aside for a checkpoint; None if it is empty. Requires: none is set aside now."""
        with self.lock:
            self._drain()
            memtable = self.levels.memtable
            assert self.levels.frozen is None, "a frozen memtable is still there"
            if memtable.is_empty():
                return None
            self._replace(Levels(Memtable(self.seqno), memtable, self.levels.tree))
            # Readers of the frozen table keep its registry; nobody reads an older moment of the new one.
            self._registry = {}
            return memtable

    def settle(self, tree: Tree) -> None:
        """The frozen memtable is in the tree now: readers from here on need it no more."""
        with self.lock:
            self._drain()
            self._replace(Levels(self.levels.memtable, None, tree))

    def _replace(self, levels: Levels) -> None:
        # Requires: lock. New levels pin their generation before the old ones may let go of it.
        former = self.levels
        self._pages.pin(levels.tree.meta.generation)
        self.levels = levels
        former.current = False
        self._unpin(former)

    def close(self, reason: Callable[[], Exception]) -> None:
        """Refuse readers from now on with the error that `reason` makes."""
        with self.lock:
            self._gone = reason
            # A get looks into the rows first: without rows it comes to `read`, which refuses.
            self.rows = {}
            self._row_bytes = 0

    def abandon_in_child(self, reason: Callable[[], Exception]) -> None:
        """After a fork, in the child: the lock may be held by a thread that does not exist here."""
        self.lock = threading.Lock()
        self.close(reason)

    def refuse_if_gone(self) -> None:
        """Raise the reason if the store is closed, or was left behind by a fork."""
        if self._gone is not None:
            raise self._gone()

    # -- counting -----------------------------------------------------------------------------

    def count(self, since_us: int) -> int:
        """Number of keys now: the tree's own count, and what the memtables change about it (see count.py)."""
        view = self.view("count", since_us)
        try:
            levels = view.levels
            with self.lock:
                if levels.memtable.last_seqno == view.seqno:
                    newest = Layer.of(levels.memtable)
                else:
                    newest = Layer.of(levels.memtable, view.seqno)
            layers = [newest]
            if levels.frozen is not None:
                layers.append(Layer.of(levels.frozen))
            return count_all(levels.tree, layers)
        finally:
            self.release(view)
