"""Publishing: how a commit becomes visible. Only the commit leader does it.

Rules:

- A commit becomes visible in one step (see row_cache.py). The slower path reads under `State.lock`, and so sees the
  version before or after, never between.
- Publishing a commit again is harmless. So a leader that was interrupted in the middle of it does it again, and if that
  is interrupted too, the next section of any thread does (`State.finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from kvwal.batch import WriteBatch
from kvwal.engine.gaps import TableGaps
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES, Memtable, is_queued
from kvwal.engine.pressure import WritePressure
from kvwal.engine.readers import Moments
from kvwal.engine.row_cache import Row
from kvwal.engine.state import State
from kvwal.engine.value import Value
from kvwal.engine.writes import IndexedPut
from kvwal.expiring import Expiring
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno

__all__ = ["STALE_INDEX", "Publisher", "changes_names"]

# Table 1 has the names of tables: in rows with keys that begin so (see tables.py).
_NAME: Final = b"\x01"
# And the indexes that may have stale entries (see indexes.py). On disk: never change.
STALE_INDEX: Final = b"\x0e"


def changes_names(table: int, part: WriteBatch) -> bool:
    """Whether what a commit writes to a table may change which table a name means."""
    return table == SYSTEM_TABLE and (bool(part.ranges) or any(key.startswith(_NAME) for key in part.writes))


def _is_plain(memtable: Memtable) -> bool:
    """Whether a put changes nothing there but the newest values, if there are no readers."""
    return not (memtable.ranges or memtable.older or memtable.order.census)


def _one_put(table: int, key: bytes, value: bytes) -> Sequence[tuple[int, WriteBatch]]:
    part = WriteBatch()
    part.writes[key] = value
    return ((table, part),)


def _parts_of(put: IndexedPut) -> Sequence[tuple[int, WriteBatch]]:
    return put.batch.parts()


class Publisher:
    """Makes commits visible, in their order."""

    def __init__(self, state: State, moments: Moments, gaps: TableGaps, pressure: WritePressure) -> None:
        self._state = state
        self._moments = moments
        self._gaps = gaps
        self._pressure = pressure
        self._memtable_bytes = pressure.memtable_bytes

    def publish(self, seqno: Seqno, batch: WriteBatch, size: int, *, conflicts: bool = True) -> None:
        """Make a commit visible, whole. Requires: it is the next in order, and durable if it was asked to be.

        `size`: bytes of its keys and values. `conflicts`: with transactions that have read what it writes.
        """
        parts: Sequence[tuple[int, WriteBatch]] = ()
        size_of_parts = 0
        if batch.others is not None:
            parts = batch.parts()
            # Without a sum where nothing is written to table 0.
            size_of_parts = sum(part.size() for _, part in parts) if batch.writes or batch.ranges else size
        commit = (seqno, batch.writes, batch.ranges, size - size_of_parts, parts, size_of_parts, conflicts)
        state = self._state
        with state.lock:
            state.finish()
            state.unfinished = self._publish, commit
            state.finish()

    def publish_put(self, seqno: Seqno, key: bytes, value: bytes, size: int, table: int = 0) -> None:
        """`publish` of a commit that is one put. `size` includes the overhead of an entry."""
        if table:
            self._publish_put_into(table, seqno, key, value, size)
            return
        state = self._state
        with state.lock:
            if state.unfinished is not None:
                state.finish()
            try:
                if not (state.plain or self._is_plain_again()):
                    self._publish(seqno, {key: value}, (), size - ENTRY_OVERHEAD_BYTES)
                    return
                # The same, without a call, since nothing but these needs to know.
                cache, memtable = state.cache, state.version.memtable
                state.horizon = memtable.last_seqno = seqno
                cache.rows[key] = value
                memtable.latest[key] = value
                memtable.bytes_used = used = memtable.bytes_used + size
                state.seqno = seqno
                cache.bytes_used = rows_used = cache.bytes_used + size
                if used > self._memtable_bytes or rows_used > cache.budget:
                    self._see_to_memory(memtable)
            except BaseException:
                # Nothing is called before it is noted, so no other interruption comes before that.
                state.unfinished = self._publish, (seqno, {key: value}, (), 0)
                raise

    def _publish_put_into(self, table: int, seqno: Seqno, key: bytes, value: bytes, size: int) -> None:
        state = self._state
        with state.lock:
            if state.unfinished is not None:
                state.finish()
            try:
                cache, memtable = state.cache, state.version.memtable
                part = memtable.parts.of(table)
                if not ((state.plain or self._is_plain_again()) and _is_plain(part)):
                    self._publish(seqno, {}, (), 0, _one_put(table, key, value), size - ENTRY_OVERHEAD_BYTES)
                    return
                # As in `publish_put`.
                state.horizon = memtable.last_seqno = part.last_seqno = seqno
                cache.rows[cache.token(table), key] = value
                part.latest[key] = value
                part.bytes_used += ENTRY_OVERHEAD_BYTES
                memtable.bytes_used = used = memtable.bytes_used + size
                state.seqno = seqno
                cache.bytes_used = rows_used = cache.bytes_used + size
                if used > self._memtable_bytes or rows_used > cache.budget:
                    self._see_to_memory(memtable)
            except BaseException:
                # As in `publish_put`.
                state.unfinished = self._publish_again, (seqno, _one_put, table, key, value)
                raise

    def publish_writes(self, seqno: Seqno, put: IndexedPut) -> None:
        """`publish` of a put into a table with indexes."""
        state, size = self._state, put.size
        with state.lock:
            if state.unfinished is not None:
                state.finish()
            try:
                cache, memtable = state.cache, state.version.memtable
                part_of, plain = memtable.parts.of, state.plain or self._is_plain_again()
                parts: dict[int, Memtable] = {}
                for table, _, _ in put.writes:
                    if table not in parts:
                        parts[table] = part = part_of(table)
                        plain = plain and _is_plain(part)
                if not plain:
                    self._publish(seqno, {}, (), 0, put.batch.parts(), size)
                    return
                # As in `publish_put`.
                state.horizon = memtable.last_seqno = seqno
                cache.rows.update(put.rows)
                for table, key, value in put.writes:
                    part = parts[table]
                    part.last_seqno = seqno
                    if value is None:
                        part._has_deletes = True
                    part.latest[key] = value
                    part.bytes_used += ENTRY_OVERHEAD_BYTES
                size += ENTRY_OVERHEAD_BYTES * len(put.writes)
                memtable.bytes_used = used = memtable.bytes_used + size
                state.seqno = seqno
                cache.bytes_used = rows_used = cache.bytes_used + size
                if used > self._memtable_bytes or rows_used > cache.budget:
                    self._see_to_memory(memtable)
            except BaseException:
                # As in `publish_put`.
                state.unfinished = self._publish_again, (seqno, _parts_of, put)
                raise

    def publish_puts(self, last: Seqno, keys: Sequence[bytes], values: Sequence[bytes], size: int) -> None:
        """`publish_put` of several commits in their order, all at once; `last` is the seqno of the last one."""
        state = self._state
        with state.lock:
            state.finish()
            state.unfinished = self._publish_each, (last, keys, values)
            if not (state.plain or self._is_plain_again()):
                state.finish()
                return
            cache, memtable = state.cache, state.version.memtable
            writes = dict(zip(keys, values, strict=True))
            state.horizon = memtable.last_seqno = last
            cache.rows.update(writes)  # type: ignore[arg-type]  # a key is a row
            memtable.latest.update(writes)
            memtable.bytes_used += size
            state.seqno = last
            cache.bytes_used += size
            state.unfinished = None
            self._see_to_memory(memtable)

    def _publish_again(
        self, seqno: Seqno, parts: Callable[..., Sequence[tuple[int, WriteBatch]]], *arguments: Any
    ) -> None:
        # Requires: lock.
        self._publish(seqno, {}, (), 0, parts(*arguments))

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
        conflicts: bool = True,
    ) -> None:
        # Requires: lock. Doing it again is harmless.
        state = self._state
        cache, memtable = state.cache, state.version.memtable
        # This, and that of the memtable, before any value changes: a scan takes values without the lock, and then looks
        # whether they may be younger than it is.
        state.horizon = seqno
        if not state.plain:
            self._note(seqno, writes, ranges, parts, conflicts)
        rows: dict[Row, Value] = writes  # type: ignore[assignment]  # it is not written to
        deletes = bool(ranges)
        names = cache.names.now
        if parts:
            rows = dict(rows)
            for table, part in parts:
                if table == SYSTEM_TABLE:
                    self._note_names(part)
                token = cache.token(table)
                rows.update({(token, key): value for key, value in part.writes.items()})
                deletes = deletes or bool(part.ranges)
            if is_queued(parts):
                # What expires is no row. Without one, a get looks below, and waits there until this is over.
                expiring = {row: value.expires_us for row, value in rows.items() if type(value) is Expiring}
                if expiring:
                    self._moments.clock.is_put(min(expiring.values()))
                    cache.forget(expiring)
                    rows = {row: value for row, value in rows.items() if row not in expiring}
        if ranges:
            state.plain = False
        if deletes:
            cache.replace_all(rows)
        else:
            cache.rows.update(rows)
        memtable.write(seqno, writes, size + size_of_parts, ranges, parts)
        if names is not cache.names.now:
            # Once more: a name that was looked up meanwhile, without the lock, may have meant what it did before.
            cache.names.now = object()
        state.seqno = seqno
        cache.bytes_used += size + size_of_parts + ENTRY_OVERHEAD_BYTES * len(rows)
        self._see_to_memory(memtable)

    def _note_names(self, part: WriteBatch) -> None:
        # Requires: lock.
        names = self._state.cache.names
        if changes_names(SYSTEM_TABLE, part):
            names.indexed = names.indexed_after(names.indexed, part)
            names.now = object()
        if any(value is not None and key.startswith(STALE_INDEX) for key, value in part.writes.items()):
            names.has_stale = True

    def _note(
        self,
        seqno: Seqno,
        keys: dict[bytes, Value],
        ranges: Sequence[KeyRange],
        parts: Sequence[tuple[int, WriteBatch]],
        conflicts: bool,
    ) -> None:
        """Tell the history and the gaps. Requires: lock."""
        if conflicts:
            self._moments.record(seqno, keys, ranges, parts)
        if self._gaps.active:
            self._gaps.written(seqno, keys, parts)
        self._is_plain_again()

    def _is_plain_again(self) -> bool:
        """Whether those are gone because of which a put was more than new values. Requires: lock."""
        state = self._state
        plain = not self._moments.readers and _is_plain(state.version.memtable) and not self._gaps.active
        state.plain = plain
        return plain

    def _see_to_memory(self, memtable: Memtable) -> None:
        # Requires: lock.
        cache = self._state.cache
        if memtable.bytes_used > self._memtable_bytes:
            self._pressure.is_on = True
        if cache.bytes_used > cache.budget:
            cache.shrink()
