"""Reading: the read path over the current version, and over that of a reader.

Rules:

- A reader that fetched a value from the tree may only remember it while the version is the same and no commit touched
  the key meanwhile: else it would bring an old value back.
- What was read without the lock is right if, at the end, neither the version nor the horizon has moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Final

from kvwal.engine.count import Extent
from kvwal.engine.expiry import NOT_ANY, Expired, due_rows, judged_chunk, queued_keys
from kvwal.engine.gaps import WORTHWHILE, TableGaps
from kvwal.engine.memtable import Walk
from kvwal.engine.merge import Chunk, Pairs, Source
from kvwal.engine.past_version import PastVersion
from kvwal.engine.rank import key_at
from kvwal.engine.readers import Moments, Reader
from kvwal.engine.row_cache import Row
from kvwal.engine.state import State
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.engine.version import SHORT, Version
from kvwal.errors import ClosedError
from kvwal.expiring import Expiring, judged
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno
from kvwal.locks import locked_by_state, refuse_reentry, release
from kvwal.pages import NotCached, Tree, table_beside

__all__ = ["Reads", "has_expired"]

# A queue's worker wants one pair; the members of its group before it want theirs.
_EDGE_PAIRS: Final = 16
# A look at a key takes as long as this many keys of a walk.
_LOOK_COST: Final = 16


class Reads:
    """Reads of one open store: keys, ranges and counts, of now or of a reader's moment."""

    def __init__(self, state: State, moments: Moments, gaps: TableGaps) -> None:
        self._state = state
        #: The registered readers.
        self.moments = moments
        self._gaps = gaps

    # -- point reads ----------------------------------------------------------------------------

    def read(
        self, key: bytes, *, table: int = 0, cached_only: bool = False, raw: bool = False, at_us: int | None = None
    ) -> Value:
        """The newest published value.

        With `cached_only` no file is read: NotCached is raised where one would have to be.

        Args:
            raw: also one that has expired; one that expires is `Expiring`.
            at_us: the time by which it is judged whether it has expired; None: now.
        """
        state = self._state
        lock = state.lock
        if lock._is_owned():
            refuse_reentry(lock, "a get")
        row = (state.cache.token(table), key) if table else key
        # As a hot get: quick where there is a row.
        known: Value | Missing = state.cache.rows.get(row, MISSING)
        if not isinstance(known, Missing):
            return known
        while True:
            try:
                with lock:
                    state.refuse_if_gone()
                    state.finish()
                    version = state.version
                    part = version.table(table) if table else version
                    if part is not None:
                        memtable = part.memtable
                        found = self._recall(row, key, part)
                        if not isinstance(found, Missing):
                            return found if type(found) is not Expiring or raw else self._judged(found, at_us)
                        ranges = len(memtable.ranges.added)
                if part is None:
                    self._meet(table, cached_only=cached_only)
                    continue
                # Not registered: if the version is still the newest afterwards, none of its pages was written over.
                failure: Exception | None = None
                value: Value = None
                try:
                    value = part.tree.peek(key) if cached_only else part.tree.get(key)
                except Exception as error:  # noqa: BLE001  # raised below, unless a page was written over meanwhile
                    failure = error
                with lock:
                    # Also so that no row is remembered after the store was closed.
                    state.refuse_if_gone()
                    state.finish()
                    if state.version is version:
                        if failure is not None:
                            raise failure
                        if type(value) is Expiring:
                            return value if raw else self._judged(value, at_us)
                        if key not in memtable.latest and len(memtable.ranges.added) == ranges:
                            state.cache.remember(row, key, value)
                        # Else a commit touched the key. What was read was the newest while this call was under way.
                        return value
            except BaseException:
                release(lock)
                raise

    def _judged(self, value: Expiring, at_us: int | None) -> Value:
        return judged(value, self.moments.clock.now_us() if at_us is None else at_us)

    def _recall(self, row: Row, key: bytes, version: Version) -> Value | Missing:
        """What is known of the newest value without touching the tree. Requires: lock."""
        cache = self._state.cache
        found = cache.recall(row, key, version.memtable)
        if found is not MISSING:
            return found
        found = version.recall(key)
        if not isinstance(found, Missing) and type(found) is not Expiring:
            cache.remember(row, key, found)
        return found

    def read_at(
        self, reader: Reader, key: bytes, *, table: int = 0, cached_only: bool = False, raw: bool = False
    ) -> Value:
        """The value as of the reader's moment. `cached_only`, `raw`: as in `read`."""
        state, version = self._state, reader.version
        if state.horizon == reader.seqno and state.version is version:
            # Nothing was published since: the newest value is the reader's, if that is still so after reading.
            value = state.cache.rows.get((state.cache.token(table), key) if table else key, MISSING)
            if isinstance(value, Missing):
                value = self.read(key, table=table, cached_only=cached_only, raw=raw, at_us=reader.at_us)
            if state.horizon == reader.seqno:
                return value
        state.refuse_if_gone()
        try:
            part = self.part(version, table, cached_only=cached_only) if table else version
            found = part.get(key, reader.seqno, cached_only=cached_only)
            return found if raw or type(found) is not Expiring else judged(found, reader.at_us)
        except OSError:
            # It may be that the store was closed meanwhile.
            state.refuse_if_gone()
            raise
        finally:
            # Whatever was found, or went wrong: the pages may have been written over.
            reader.check()

    def lasting(self, key: bytes, *, table: int = 0, reader: Reader | None = None) -> Value:
        """The value now, or as of a reader; None if it has expired by then, and `Expiring` if it is going to."""
        if reader is None:
            found, at_us = self.read(key, table=table, raw=True), self.moments.clock.now_us()
        else:
            found, at_us = self.read_at(reader, key, table=table, raw=True), reader.at_us
        return None if type(found) is Expiring and found.expires_us <= at_us else found

    # -- ordered reads --------------------------------------------------------------------------

    def cached_range(
        self,
        start: bytes | None,
        stop: bytes | None,
        limit: int | None,
        seqno: Seqno | None,
        *,
        reverse: bool,
        table: int = 0,
    ) -> Pairs | None:
        """The pairs of a range at once, if it is short and lies in memory; else None: the long way is to be taken.

        Args:
            limit: the number of pairs wanted; more may come, and fewer only at the end. None for all of them.
            seqno: of the moment that is wanted; None for now.
        """
        most = SHORT if limit is None else limit
        if most > SHORT:
            return None
        state = self._state
        # Before any lock: after a fork no thread may be there to give it back.
        state.refuse_if_gone()
        # What is found is of this moment if no commit is published, and no checkpoint installed, from here on until the
        # lock is held.
        if seqno is None:
            seqno = state.seqno
        version = state.version
        part = version.table(table) if table else version
        if seqno == state.seqno:
            start, stop = self._gaps.skip(table, start, stop, reverse=reverse)
        # What expires is judged one by one, on the long way.
        if part is None or _has_expiring(part):
            return None
        found = part.cached_range(start, stop, most, reverse=reverse)
        if found is None:
            return None
        pairs, keys, ended = found
        # A commit raises the horizon before it changes anything: where it did not move, the memtable had no key here.
        if not keys and state.horizon == seqno and state.version is version:
            state.refuse_if_gone()
            return pairs if ended or (limit is not None and len(pairs) >= limit) else None
        return self._overlay(version, part, seqno, pairs, keys, ended, most=most, limit=limit, reverse=reverse)

    @locked_by_state
    def _overlay(
        self,
        version: Version,
        part: Version,
        seqno: Seqno,
        pairs: Pairs,
        keys: list[bytes],
        ended: bool,
        *,
        most: int,
        limit: int | None,
        reverse: bool,
    ) -> Pairs | None:
        state = self._state
        state.refuse_if_gone()
        state.finish()
        if state.seqno != seqno or state.version is not version or part.memtable.ranges:
            return None
        pairs, ended = part.overlay(pairs, keys, ended, most, reverse=reverse)
        return pairs if ended or (limit is not None and len(pairs) >= limit) else None

    def pairs(
        self, start: bytes | None, stop: bytes | None, *, reverse: bool, table: int = 0, at_us: int | None = None
    ) -> Iterator[tuple[bytes, bytes]]:
        """The pairs of a range now, for the commit leader, which nothing can overtake. `at_us`: as in `read`."""
        found = self.cached_range(start, stop, _EDGE_PAIRS, None, reverse=reverse, table=table)
        if found is not None:
            yield from found
            if len(found) < _EDGE_PAIRS:
                return
            start, stop = (start, found[-1][0]) if reverse else (found[-1][0] + b"\0", stop)
        reader = self.moments.reader("operation")
        if at_us is not None:
            reader.at_us = at_us
        for keys, values in self.chunks(reader, start, stop, reverse=reverse, table=table):
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
        state = self._state
        try:
            yield [], []
            low, high = start, stop
            if own is None and reader.seqno == state.seqno:
                low, high = self._gaps.skip(table, start, stop, reverse=reverse)
                if reader.seqno != state.seqno:
                    low, high = start, stop
            walk = Walk() if own is None else None
            part = self.part(reader.version, table)
            chunks = part.chunks(
                reader.seqno, low, high, reverse=reverse, own=own, walk=walk, check=state.refuse_if_gone
            )
            first = next(chunks, None)
            reader.check()
            if walk is not None and walk.dead >= WORTHWHILE:
                self._propose_gap(table, reader.seqno, low, high, None if first is None else first[0][0], reverse)
            if first is not None:
                # What a transaction has put itself may expire.
                expires = own is not None or _may_expire(part, reader)
                yield judged_chunk(first, reader.at_us) if expires else first
                del first
                for chunk in chunks:
                    reader.check()
                    yield judged_chunk(chunk, reader.at_us) if expires else chunk
        except Exception as error:
            # The page file only knows that it is closed, or that a page does not verify; that is not the whole story.
            if isinstance(error, ClosedError | OSError):
                state.refuse_if_gone()
            reader.check()
            raise
        finally:
            reader.release()

    @locked_by_state
    def _propose_gap(
        self,
        table: int,
        seqno: Seqno,
        start: bytes | None,
        stop: bytes | None,
        first: bytes | None,
        reverse: bool,
    ) -> None:
        state = self._state
        state.finish()
        self._gaps.propose(table, KeyRange(start or b"", stop).before(first, reverse=reverse), seqno, state.seqno)
        state.plain = False

    # -- counting -------------------------------------------------------------------------------

    def count(self, start: bytes | None = None, stop: bytes | None = None, *, table: int = 0) -> int:
        """Number of keys in [start, stop) now: see `Version.count`."""
        while (begun := self._begin_count(self.moments.clock.now_us(), table)) is None:
            self._meet(table)
        reader, part, extent = begun
        try:
            counted = part.count(reader.seqno, start, stop, extent=extent)
            return self._without_expired(counted, reader, part, table, start, stop) if _has_expiring(part) else counted
        finally:
            reader.release()

    @locked_by_state
    def _begin_count(self, since_us: int, table: int = 0) -> tuple[Reader, Version, Extent] | None:
        version = self._state.version
        part = version.table(table)
        if part is None:
            return None
        reader = self.moments.register("count", since_us)
        return reader, part, part.mark_count(reader.seqno)

    def key_at(self, rank: int, *, table: int = 0) -> bytes | None:
        """The key that has `rank` others before it, now; None if there is none."""
        while (begun := self._begin_count(self.moments.clock.now_us(), table)) is None:
            self._meet(table)
        reader, part, extent = begun
        seqno = reader.seqno
        try:
            expired = self._expired(reader, part, table, self._due(reader)) if _has_expiring(part) else NOT_ANY

            def before(key: bytes | None) -> int:
                return part.count(seqno, None, key, extent=extent) - expired.count(None, key)

            return key_at(part, rank, before) if 0 <= rank < before(None) else None
        finally:
            reader.release()

    def key_of(self, reader: Reader, rank: int, *, table: int = 0) -> bytes | None:
        """The same as of a reader."""
        if not 0 <= rank < self.count_at(reader, None, None, table=table):
            return None
        try:
            part = self.part(reader.version, table)
            if isinstance(part, PastVersion):
                # To count takes a walk there.
                keys = chain.from_iterable(keys for keys, _ in self._walked(reader, part, None, None))
                return next(islice(keys, rank, None))
            expired = self._expired(reader, part, table, self._due(reader)) if _may_expire(part, reader) else NOT_ANY
            seqno = reader.seqno
            return key_at(
                part, rank, lambda key: part.count(seqno, None, key, reader=reader) - expired.count(None, key)
            )
        except OSError:
            self._state.refuse_if_gone()
            raise
        finally:
            reader.check()

    def count_at(self, reader: Reader, start: bytes | None, stop: bytes | None, *, table: int = 0) -> int:
        """The same as of a reader."""
        self._state.refuse_if_gone()
        try:
            part = self.part(reader.version, table)
            if not _may_expire(part, reader):
                return part.count(reader.seqno, start, stop, reader=reader)
            if isinstance(part, PastVersion):
                return sum(len(keys) for keys, _ in self._walked(reader, part, start, stop))
            counted = part.count(reader.seqno, start, stop, reader=reader)
            return self._without_expired(counted, reader, part, table, start, stop)
        except OSError:
            self._state.refuse_if_gone()
            raise
        finally:
            reader.check()

    def _without_expired(
        self, counted: int, reader: Reader, part: Version, table: int, start: bytes | None, stop: bytes | None
    ) -> int:
        """The number of keys in a range, less those that have expired, by a look at each or by a walk of the range."""
        rows: list[Chunk] = []
        due = 0
        for chunk in self._due(reader):
            rows.append(chunk)
            due += len(chunk[0])
            if due * _LOOK_COST > counted:
                return sum(len(keys) for keys, _ in self._walked(reader, part, start, stop))
        return counted - self._expired(reader, part, table, rows).count(start, stop)

    def _due(self, reader: Reader) -> Iterator[Chunk]:
        """The rows of the expiry queue that are due by a reader's time."""
        bounds = due_rows(0, reader.at_us)
        part = self.part(reader.version, SYSTEM_TABLE)
        return part.chunks(reader.seqno, *bounds, reverse=False, check=self._state.refuse_if_gone)

    @staticmethod
    def _expired(reader: Reader, part: Version, table: int, rows: Iterable[Chunk]) -> Expired:
        """What has expired in a table by a reader's time, and is not removed yet; `rows`: of all that is due."""
        seqno, at_us = reader.seqno, reader.at_us
        # A row may be of a value that has been replaced, and then a key may have several.
        return Expired(
            key
            for key in queued_keys(rows, table)
            if type(value := part.get(key, seqno)) is Expiring and value.expires_us <= at_us
        )

    @staticmethod
    def _walked(reader: Reader, part: Version, start: bytes | None, stop: bytes | None) -> Iterator[Chunk]:
        for chunk in part.chunks(reader.seqno, start, stop, reverse=False):
            yield judged_chunk(chunk, reader.at_us)

    # -- tables ---------------------------------------------------------------------------------

    def _meet(self, table: int, *, cached_only: bool = False) -> None:
        """Find a table in the newest version, where it was not asked for since the last checkpoint."""
        reader = self.moments.reader("table")
        try:
            self.part(reader.version, table, cached_only=cached_only)
        finally:
            reader.release()

    def part(self, version: Version, table: int, *, cached_only: bool = False) -> Version:
        """A table of a version: its read path. Requires: the version has a reader, if the table is not 0.

        The catalogue is read when a table is asked for the first time: with `cached_only` NotCached is raised then.
        """
        part = version.table(table)
        if part is None and cached_only:
            raise NotCached
        return self._add_table(version, table, table_beside(version.tree, table)) if part is None else part

    @locked_by_state
    def _add_table(self, version: Version, table: int, tree: Tree) -> Version:
        part = version.table(table, tree)
        assert part is not None, "a table with a tree has a read path"
        return part


def has_expired(reads: Reads, reader: Reader, table: int) -> bool:
    """Whether something of a table may have expired by a reader's time, and not be removed yet. A look or two."""
    try:
        return _may_expire(reads.part(reader.version, table), reader) and any(reads._due(reader))
    except OSError:
        reads._state.refuse_if_gone()
        raise
    finally:
        reader.check()


def _has_expiring(part: Version) -> bool:
    """Whether something may expire in a table of a version that is, or was, of now."""
    frozen = part.frozen
    return part.memtable.has_expiring or part.tree.has_expiring or (frozen is not None and frozen.has_expiring)


def _may_expire(part: Version, reader: Reader) -> bool:
    """Whether something that a reader reads may have expired by its time."""
    if isinstance(part, PastVersion):
        # What the log has is not known. 0 is the time where nothing ever expired.
        return reader.at_us > 0
    return _has_expiring(part)
