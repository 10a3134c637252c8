"""What readers see now: the current version, and the one place where a commit becomes visible.

In front of the version stands the row cache, so that a hot get is one dict hit without a lock.

Rules:

- `lock` guards everything here except a look into the rows. It is never held during I/O, and no other lock is taken
  under it: it is the last of the lock order (docs/architecture.md). It is held for microseconds, but for a commit of
  many keys, and for steps that come seldom: `RowCache.shrink` (about 15 ms), packing in `History.record` (1 to 2 ms).
- A commit becomes visible in one step (see row_cache.py). The slower path reads under `lock`, and so sees the version
  before or after, never between.
- `horizon` is raised before the rows change, `seqno` after: a reader that took a row and still finds `horizon` at its
  own seqno knows that the row is not from its future.
- A reader that fetched a value from the tree may only remember it while the version is the same and no commit touched
  the key meanwhile: else it would bring an old value back.
- Publishing a commit again is harmless. So a leader that was interrupted in the middle of it does it again, and if that
  is interrupted too, the next section of any thread does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.engine.count import Extent
from kvwal.engine.gaps import WORTHWHILE, Gaps
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES, Memtable, Walk, combine
from kvwal.engine.merge import Chunk, Pairs, Source
from kvwal.engine.occ import History
from kvwal.engine.readers import Reader, Readers
from kvwal.engine.row_cache import RowCache
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.engine.version import SHORT, Version
from kvwal.errors import ClosedError, closed
from kvwal.keys import KeyRange, Seqno
from kvwal.locks import Lock, locked, new_lock, refuse_reentry, release
from kvwal.pages import PageFile, Tree

__all__ = ["State"]

# A queue's worker wants one pair; the members of its group before it want theirs.
_EDGE_PAIRS: Final = 16
# A memtable of this many times its budget makes writers wait.
_STALLED_AT: Final = 2


class State:
    """The current version of one open store, its readers, and its row cache."""

    def __init__(self, pages: PageFile, *, cache_bytes: int, memtable_bytes: int) -> None:
        meta = pages.meta
        self._pages = pages
        self.memtable_bytes = memtable_bytes
        self.lock = new_lock()
        #: Guards the order of keys in each memtable.
        self.order_lock = new_lock()
        self.cache = RowCache(cache_bytes, pages.pager.cache.resize)
        self.seqno: Seqno = meta.seqno
        self.horizon: Seqno = meta.seqno
        pages.pins.hold(self, {meta.generation})
        self.version = Version(self._new_memtable(meta.seqno), None, pages.tree(meta))
        #: Set when a writer should look after memory or disk before its next commit: see pressure.py.
        self.write_pressure = False
        #: Recent commits, while a read-write transaction is open. Changed under `lock`.
        self.history = History()
        #: Open read-write transactions.
        self.writers = Readers()
        #: Every registered reader.
        self.readers = Readers()
        self._gaps = Gaps()
        # Whether a put needs nothing but its value in two dicts: no reader, range, transaction, gap or count wants
        # more.
        self._plain = True
        # Versions that were replaced, and had a reader when that was looked at last.
        self._former: list[Version] = []
        self._gone: Callable[[], Exception] | None = None
        # How to publish a commit that was interrupted as it became visible. Whichever section comes next does it.
        self._unfinished: Callable[[], None] | None = None

    def waited_for(self) -> tuple[Lock, ...]:
        """The locks here that the commit leader may wait for."""
        return self.lock, self.order_lock

    def _new_memtable(self, after: Seqno) -> Memtable:
        return Memtable(after, self.lock, self.order_lock)

    # -- publishing: the commit leader ----------------------------------------------------------

    @locked
    def begin(self, seqno: Seqno) -> None:
        """Recovery has replayed the log up to `seqno` into the memtable."""
        self.horizon = self.version.memtable.last_seqno = self.seqno = seqno
        self._see_to_memory(self.version.memtable)
        self._look_around()

    def publish(self, seqno: Seqno, batch: WriteBatch, size: int) -> None:
        """Make a commit visible, whole. Requires: it is the next in order, and durable if it was asked to be.

        `size`: bytes of its keys and values.
        """
        parts: Sequence[tuple[int, WriteBatch]] = ()
        size_of_parts = 0
        if batch.others is not None:
            parts = batch.parts()
            size_of_parts = sum(part.size() for _, part in parts)
        commit = (seqno, batch.writes, batch.ranges, size - size_of_parts, parts, size_of_parts)
        with self.lock:
            self._finish()
            self._unfinished = partial(self._publish, *commit)
            self._finish()

    def publish_put(self, seqno: Seqno, key: bytes, value: bytes, size: int) -> None:
        """`publish` of a commit that is one put. `size` includes the overhead of an entry."""
        with self.lock:
            if self._unfinished is not None:
                self._finish()
            try:
                if not self._plain:
                    self._publish(seqno, {key: value}, (), size - ENTRY_OVERHEAD_BYTES)
                    return
                # The same, without a call, since nothing but these needs to know.
                cache, memtable = self.cache, self.version.memtable
                self.horizon = memtable.last_seqno = seqno
                cache.rows[key] = value
                memtable.latest[key] = value
                memtable.bytes_used = used = memtable.bytes_used + size
                self.seqno = seqno
                cache.bytes_used = rows_used = cache.bytes_used + size
                if used > self.memtable_bytes or rows_used > cache.budget:
                    self._see_to_memory(memtable)
            except BaseException:
                self._unfinished = partial(self._publish, seqno, {key: value}, (), 0)
                raise

    def publish_puts(self, last: Seqno, keys: Sequence[bytes], values: Sequence[bytes], size: int) -> None:
        """`publish_put` of several commits in their order, all at once; `last` is the seqno of the last one."""
        with self.lock:
            self._finish()
            self._unfinished = partial(self._publish_each, last, keys, values)
            if not self._plain:
                self._finish()
                return
            cache, memtable = self.cache, self.version.memtable
            writes = dict(zip(keys, values, strict=True))
            self.horizon = memtable.last_seqno = last
            cache.rows.update(writes)
            memtable.latest.update(writes)
            memtable.bytes_used += size
            self.seqno = last
            cache.bytes_used += size
            self._unfinished = None
            self._see_to_memory(memtable)

    def _finish(self) -> None:
        """Publish what an interruption left half visible: no section may see that. Requires: lock."""
        unfinished = self._unfinished
        if unfinished is not None:
            unfinished()
            self._unfinished = None

    def _publish_each(self, last: Seqno, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        # Requires: lock.
        for seqno, (key, value) in enumerate(zip(keys, values, strict=True), last - len(keys) + 1):
            self._publish(Seqno(seqno), {key: value}, (), len(key) + len(value))

    def _publish(
        self,
        seqno: Seqno,
        writes: dict[bytes, Value],
        ranges: Sequence[KeyRange],
        size: int,
        parts: Sequence[tuple[int, WriteBatch]] = (),
        size_of_parts: int = 0,
    ) -> None:
        # Requires: lock. Doing it again is harmless.
        cache, memtable = self.cache, self.version.memtable
        # This, and that of the memtable, before any value changes: a scan takes values without the lock, and then looks
        # whether they may be younger than it is.
        self.horizon = seqno
        if not self._plain:
            self._note(seqno, writes, ranges)
        if ranges:
            self._plain = False
            cache.replace_all(writes)
        else:
            cache.rows.update(writes)
        memtable.write(seqno, writes, size + size_of_parts, ranges, parts)
        self.seqno = seqno
        cache.bytes_used += size + ENTRY_OVERHEAD_BYTES * len(writes)
        self._see_to_memory(memtable)

    def _note(self, seqno: Seqno, keys: dict[bytes, Value], ranges: Sequence[KeyRange]) -> None:
        """Tell the history and the gaps. Requires: lock."""
        if self.writers:
            oldest = self.writers.oldest()
            if oldest is not None:
                self.history.record(seqno, keys, ranges, oldest)
        if self._gaps.active:
            self._gaps.written(seqno, keys)
        self._look_around()

    def _look_around(self) -> None:
        # Requires: lock.
        memtable = self.version.memtable
        self._plain = not (
            self.readers or memtable.ranges or memtable.older or memtable.order.census or self._gaps.active
        )

    def _see_to_memory(self, memtable: Memtable) -> None:
        # Requires: lock.
        if memtable.bytes_used > self.memtable_bytes:
            self.write_pressure = True
        if self.cache.bytes_used > self.cache.budget:
            self.cache.shrink()

    # -- point reads ----------------------------------------------------------------------------

    def read(self, key: bytes, *, cached_only: bool = False) -> Value:
        """The newest published value.

        With `cached_only` no file is read: NotCached is raised where one would have to be.
        """
        lock = self.lock
        if lock._is_owned():
            refuse_reentry(lock, "a get")
        while True:
            try:
                with lock:
                    self.refuse_if_gone()
                    self._finish()
                    version = self.version
                    memtable = version.memtable
                    found = self._recall(key, version)
                    if not isinstance(found, Missing):
                        return found
                    ranges = len(memtable.ranges.added)
                # Not registered: if the version is still the newest afterwards, none of its pages was written over.
                failure: Exception | None = None
                value: Value = None
                try:
                    value = version.tree.peek(key) if cached_only else version.tree.get(key)
                except Exception as error:  # noqa: BLE001  # raised below, unless a page was written over meanwhile
                    failure = error
                with lock:
                    # Also so that no row is remembered after the store was closed.
                    self.refuse_if_gone()
                    self._finish()
                    if self.version is version:
                        if failure is not None:
                            raise failure
                        if key not in memtable.latest and len(memtable.ranges.added) == ranges:
                            self.cache.remember(key, value)
                        # Else a commit touched the key. What was read was the newest while this call was under way.
                        return value
            except BaseException:
                release(lock)
                raise

    def _recall(self, key: bytes, version: Version) -> Value | Missing:
        """What is known of the newest value without touching the tree. Requires: lock."""
        found = self.cache.recall(key, version.memtable)
        if found is not MISSING:
            return found
        found = version.recall(key)
        if not isinstance(found, Missing):
            self.cache.remember(key, found)
        return found

    def read_at(self, reader: Reader, key: bytes, *, table: int = 0, cached_only: bool = False) -> Value:
        """The value as of the reader's moment. `cached_only`: as in `read`, but for the catalogue of tables."""
        if self._gone is not None:
            raise self._gone()
        version = reader.version
        if table:
            return self.part(version, table).get(key, reader.seqno, cached_only=cached_only)
        if self.horizon == reader.seqno and self.version is version:
            # Nothing was published since: the newest value is the reader's, if that is still so after reading.
            value = self.cache.rows.get(key, MISSING)
            if isinstance(value, Missing):
                value = self.read(key, cached_only=cached_only)
            if self.horizon == reader.seqno:
                return value
        return version.get(key, reader.seqno, cached_only=cached_only)

    # -- ordered reads --------------------------------------------------------------------------

    def cached_range(
        self, start: bytes | None, stop: bytes | None, limit: int | None, seqno: Seqno | None, *, reverse: bool
    ) -> Pairs | None:
        """The pairs of a range at once, if it is short and lies in memory; else None: the long way is to be taken.

        Args:
            limit: the number of pairs wanted; more may come, and fewer only at the end. None for all of them.
            seqno: of the moment that is wanted; None for now.
        """
        most = SHORT if limit is None else limit
        if most > SHORT:
            return None
        # Before any lock: after a fork no thread may be there to give it back.
        self.refuse_if_gone()
        # What is found is of this moment if no commit is published, and no checkpoint installed, from here on until the
        # lock is held.
        if seqno is None:
            seqno = self.seqno
        version = self.version
        if seqno == self.seqno:
            start, stop = self._gaps.skip(start, stop, reverse=reverse)
        found = version.cached_range(start, stop, most, reverse=reverse)
        if found is None:
            return None
        pairs, keys, ended = found
        # A commit raises the horizon before it changes anything: where it did not move, the memtable had no key here.
        if not keys and self.horizon == seqno and self.version is version:
            self.refuse_if_gone()
            return pairs if ended or (limit is not None and len(pairs) >= limit) else None
        return self._overlay(version, seqno, pairs, keys, ended, most=most, limit=limit, reverse=reverse)

    @locked
    def _overlay(
        self,
        version: Version,
        seqno: Seqno,
        pairs: Pairs,
        keys: list[bytes],
        ended: bool,
        *,
        most: int,
        limit: int | None,
        reverse: bool,
    ) -> Pairs | None:
        self.refuse_if_gone()
        self._finish()
        if self.seqno != seqno or self.version is not version or version.memtable.ranges:
            return None
        pairs, ended = version.overlay(pairs, keys, ended, most, reverse=reverse)
        return pairs if ended or (limit is not None and len(pairs) >= limit) else None

    def pairs(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        """The pairs of a range now, for the commit leader, which nothing can overtake."""
        found = self.cached_range(start, stop, _EDGE_PAIRS, None, reverse=reverse)
        if found is not None:
            yield from found
            if len(found) < _EDGE_PAIRS:
                return
            start, stop = (start, found[-1][0]) if reverse else (found[-1][0] + b"\0", stop)
        for keys, values in self.chunks(self.reader("operation", 0), start, stop, reverse=reverse):
            yield from zip(keys, values, strict=True)

    def chunks(
        self,
        reader: Reader,
        start: bytes | None,
        stop: bytes | None,
        *,
        reverse: bool,
        own: Source | None = None,
        table: int = 0,
    ) -> Iterator[Chunk]:
        """Chunks of a range as of a reader, which is given back when the iteration ends or is dropped.

        `own` is a newest source on top: what a transaction wrote itself.
        """
        chunks = self._chunks(reader, start, stop, reverse, own, table)
        # A generator that never started would not run its finally: start it, up to the first yield.
        next(chunks)
        return chunks

    def _chunks(
        self, reader: Reader, start: bytes | None, stop: bytes | None, reverse: bool, own: Source | None, table: int
    ) -> Iterator[Chunk]:
        try:
            yield [], []
            low, high = start, stop
            if own is None and not table and reader.seqno == self.seqno:
                low, high = self._gaps.skip(start, stop, reverse=reverse)
                if reader.seqno != self.seqno:
                    low, high = start, stop
            walk = Walk() if own is None and not table else None
            chunks = self.part(reader.version, table).chunks(
                reader.seqno, low, high, reverse=reverse, own=own, walk=walk, check=self.refuse_if_gone
            )
            first = next(chunks, None)
            if walk is not None and walk.dead >= WORTHWHILE:
                self._propose_gap(reader.seqno, low, high, None if first is None else first[0][0], reverse)
            if first is not None:
                yield first
                del first
                yield from chunks
        except ClosedError:
            # The page file only knows that it is closed; after a fork that is not the whole story.
            self.refuse_if_gone()
            raise
        finally:
            reader.release()

    @locked
    def _propose_gap(
        self, seqno: Seqno, start: bytes | None, stop: bytes | None, first: bytes | None, reverse: bool
    ) -> None:
        self._finish()
        self._gaps.propose(KeyRange(start or b"", stop).before(first, reverse=reverse), seqno, self.seqno)
        self._plain = False

    # -- readers --------------------------------------------------------------------------------

    @locked
    def reader(self, purpose: str, since_us: int, *, writer: bool = False, owner: object = None) -> Reader:
        """Register a reader of this moment. Give it back with `Reader.release`, or drop it."""
        return self._reader(purpose, since_us, writer, owner)

    def _reader(self, purpose: str, since_us: int, writer: bool, owner: object) -> Reader:
        # Requires: lock.
        self.refuse_if_gone()
        self._finish()
        version, seqno = self.version, self.seqno
        reader = Reader(version, seqno, purpose, since_us, owner)
        registries: tuple[Readers, ...] = (version.memtable.older.readers, version.readers, self.readers)
        if writer:
            # Decided under the lock that publishing takes: every commit after `seqno` sees this writer and is recorded,
            # and none before it can matter.
            if not self.writers:
                self.history.begin(seqno)
            registries = (self.writers, *registries)
        self._plain = False
        reader.register(*registries)
        return reader

    @locked
    def again(self, reader: Reader, purpose: str) -> Reader:
        """A second registration of a reader's moment. ClosedError if another thread has just released it."""
        self.refuse_if_gone()
        if reader.is_released:
            raise closed(reader.purpose)
        other = reader.again(purpose)
        other.register(other.version.memtable.older.readers, other.version.readers, self.readers)
        return other

    # -- counting -------------------------------------------------------------------------------

    def count(self, since_us: int, start: bytes | None = None, stop: bytes | None = None, *, table: int = 0) -> int:
        """Number of keys in [start, stop) now: see `Version.count`."""
        while (begun := self._begin_count(since_us, table)) is None:
            # The table was not asked for since the last checkpoint.
            reader = self.reader("count", since_us)
            try:
                self.part(reader.version, table)
            finally:
                reader.release()
        reader, part, extent = begun
        try:
            return part.count(reader.seqno, start, stop, extent=extent)
        finally:
            reader.release()

    @locked
    def _begin_count(self, since_us: int, table: int = 0) -> tuple[Reader, Version, Extent] | None:
        version = self.version
        part = version.parts.get(table) if table else version
        if part is None:
            return None
        reader = self._reader("count", since_us, False, None)
        return reader, part, part.mark_count(reader.seqno)

    def count_at(self, reader: Reader, start: bytes | None, stop: bytes | None, *, table: int = 0) -> int:
        """The same as of a reader."""
        self.refuse_if_gone()
        return self.part(reader.version, table).count(reader.seqno, start, stop, reader=reader)

    # -- tables ---------------------------------------------------------------------------------

    def part(self, version: Version, table: int) -> Version:
        """A table of a version: its read path. Requires: the version has a reader, if the table is not 0.

        The catalogue is read when a table is asked for the first time.
        """
        part = version.parts.get(table) if table else version
        return self._make_part(version, table, self._pages.tree(version.tree.meta, table)) if part is None else part

    @locked
    def _make_part(self, version: Version, table: int, tree: Tree) -> Version:
        part = version.parts.get(table)
        if part is None:
            # Those of its memtables that are not there are made, so that what is written later is seen as well.
            frozen = None if version.frozen is None else version.frozen.parts.of(table)
            part = version.parts[table] = Version(version.memtable.parts.of(table), frozen, tree)
        return part

    # -- versions -------------------------------------------------------------------------------

    @locked
    def freeze(self) -> Memtable | None:
        """Set the memtable aside for a checkpoint; None if it is empty. Requires: none is set aside now."""
        self._finish()
        version = self.version
        assert version.frozen is None, "a frozen memtable is still there"
        if not version.memtable:
            return None
        self.cache.drop_aside()
        self._replace(Version(self._new_memtable(self.seqno), version.memtable, version.tree))
        return version.memtable

    def combine(self) -> None:
        """Add what was committed since to the frozen memtable, so that one checkpoint can take both.

        Unless too much would stay of the two: then writers are to wait, as for any checkpoint. Requires: no commit is
        under way.
        """
        version = self.version
        assert version.frozen is not None, "no memtable is frozen"
        # Without the lock: it is a walk, and readers go on.
        combined = self._new_memtable(version.memtable.last_seqno)
        combine(version.frozen, version.memtable, into=combined)
        if combined.bytes_used <= _STALLED_AT * self.memtable_bytes:
            self._install_combined(version, combined)

    @locked
    def _install_combined(self, version: Version, combined: Memtable) -> None:
        self.cache.drop_aside()
        self._replace(Version(self._new_memtable(self.seqno), combined, version.tree))

    @locked
    def install(self, tree: Tree, *, done: bool = True) -> None:
        """Readers from here on use this tree. `done`: it holds the frozen memtable, which is then needed no more."""
        version = self.version
        self._replace(Version(version.memtable, None if done else version.frozen, tree))
        if done:
            # A gap is still true, and there is nothing left to pass over but what was deleted since.
            self._gaps.clear()

    def _replace(self, version: Version) -> None:
        # Requires: lock. Interrupted after any step, no version that is read loses its pages, and the next look at the
        # former ones lets go of the rest.
        self._pages.pins.hold(self, {each.tree.meta.generation for each in (version, self.version, *self._former)})
        self._former = [*self._former, self.version]
        self.version = version
        self._release_pages()

    @locked
    def release_pages(self) -> None:
        """Let go of the pages of versions that have no reader any more."""
        self._release_pages()

    def _release_pages(self) -> None:
        # Requires: lock.
        self._former = [version for version in self._former if version.readers]
        self._pages.pins.hold(self, {each.tree.meta.generation for each in (self.version, *self._former)})

    # -- memory ---------------------------------------------------------------------------------

    def is_full(self) -> bool:
        """Whether the memtable is past its budget, so that a checkpoint should start."""
        return self.version.memtable.bytes_used > self.memtable_bytes

    def is_stalled(self) -> bool:
        """Whether it is at twice its budget while the one before is still being checkpointed: writers wait."""
        version = self.version
        return version.frozen is not None and version.memtable.bytes_used > _STALLED_AT * self.memtable_bytes

    # -- ending ---------------------------------------------------------------------------------

    @locked
    def close(self, reason: Callable[[], Exception]) -> None:
        """Refuse readers from now on with the error that `reason` makes."""
        self._gone = reason
        # A get looks into the rows first: without rows it comes to `read`, which refuses.
        self.cache.clear()

    def begin_close(self, reason: Callable[[], Exception]) -> None:
        """Refuse new calls while one is under way in the calling thread, which may be in a section of this lock."""
        self._gone = reason
        self.write_pressure = True
        self.cache.clear()

    def abandon_in_child(self, reason: Callable[[], Exception]) -> None:
        """After a fork, in the child: the lock may be held by a thread that does not exist here."""
        self.lock = new_lock()
        self._gone = reason
        self.cache.clear()

    def refuse_if_gone(self) -> None:
        """Raise the reason if the store is closed, or was left behind by a fork."""
        if self._gone is not None:
            raise self._gone()
