"""A table as a transaction sees it: its moment, with the transaction's own writes on top.

What a transaction has read of each table is remembered, to be validated when it commits: keys, and ranges as far as
they were really walked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from copy import copy
from typing import Final, Never

from kvwal.batch import Updates, WriteBatch, checked_pairs
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.own import OwnWrites
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk, Pairs, chunks_in
from kvwal.engine.occ import ReadSet
from kvwal.engine.readers import Reader
from kvwal.engine.reads import has_expired
from kvwal.engine.value import MISSING, Missing, Value
from kvwal.errors import ReadOnlyError, TransactionTooLargeError, closed
from kvwal.expiring import Expiring, expire_us, judged
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, Bound, BytesLike, KeyRange, as_key, as_value, disjoint

__all__ = ["MAX_TRANSACTION_BYTES", "Open", "Tracked", "TransactionPart", "as_of_now", "writes_of"]

#: What one transaction may hold in memory: what it has read, by key, and what it is to write.
MAX_TRANSACTION_BYTES: Final = 256 << 20
# A key in a set or a dict, beside its own bytes.
_ENTRY_BYTES: Final = 120
_NOTHING: Final[frozenset[bytes]] = frozenset()


class Tracked:
    """What a transaction wrote to one table, and what it read of it."""

    __slots__ = ("note", "own", "ranges", "reads")

    def __init__(self, batch: WriteBatch, *, read_only: bool) -> None:
        self.own = OwnWrites(batch)
        self.reads: set[bytes] = set()
        #: Remembers a key. Nothing that a read-only transaction reads is validated, so it need not be remembered.
        self.note: Callable[[bytes], object] = _NOTHING.__contains__ if read_only else self.reads.add
        #: [start, stop) as far as a scan has come; mutable while it goes on.
        self.ranges: list[list[bytes | None]] = []

    def as_of_now(self) -> Tracked:
        """The same without what is written from here on. What is read of it is read of this."""
        made = copy(self)
        made.own = OwnWrites(self.own.batch.copy())
        return made

    def walked(self) -> list[KeyRange]:
        """The ranges that were read, disjoint."""
        result: list[KeyRange] = []
        for start, stop in self.ranges:
            if start is not None and (stop is None or start < stop):
                result.append(KeyRange(start, stop))
        return disjoint(result) if len(result) > 1 else result


class Open:
    """What the tables of one transaction share while it is open."""

    __slots__ = ("_bytes", "batch", "engine", "read_only", "reader", "tracked")

    def __init__(self, engine: Engine, *, read_only: bool, owner: object) -> None:
        self.engine = engine
        self.read_only = read_only
        self._bytes = 0
        #: What its commit is to write.
        self.batch = WriteBatch()
        #: By table.
        self.tracked: dict[int, Tracked] = {}
        #: The registration of its moment; None when it is over.
        self.reader: Reader | None = None
        engine.reads.moments.now.ready()
        self.reader = engine.reads.moments.reader("transaction", writer=not read_only, owner=owner)

    def track(self, table: int) -> Tracked:
        """What is remembered of a table: the same object at each call."""
        tracked = self.tracked.get(table)
        if tracked is None:
            # In one step: workers of tasks may ask at once.
            made = Tracked(self.batch.part(table), read_only=self.read_only)
            tracked = self.tracked.setdefault(table, made)
        return tracked

    def take(self, size: int) -> None:
        """Count memory. TransactionTooLargeError beyond the limit: then nothing is done, and what was done stays."""
        keys = 0
        for tracked in self.tracked.values():
            keys += len(tracked.reads)
        if self._bytes + size + _ENTRY_BYTES * keys > MAX_TRANSACTION_BYTES:
            raise TransactionTooLargeError(MAX_TRANSACTION_BYTES)
        self._bytes += size

    def read_set(self) -> ReadSet | None:
        """What was read; None if that was nothing. Requires: it is open."""
        reader = self.reader
        assert reader is not None
        # Table 0 is always among them: the transaction is a part of its own.
        own = self.tracked[0]
        others: Sequence[tuple[int, Iterable[bytes], Sequence[KeyRange]]] = ()
        if len(self.tracked) > 1:
            others = [
                (table, tracked.reads, ranges)
                for table, tracked in self.tracked.items()
                if ((ranges := tracked.walked()) or tracked.reads) and table
            ]
        ranges = own.walked() if own.ranges else []
        if not (own.reads or ranges or others):
            return None
        return ReadSet(reader.seqno, own.reads, ranges, reader, others)


class TransactionPart(OrderedMapping, MutableMapping[bytes, bytes]):
    """A table within a transaction. For one thread at a time, and only while the transaction is open."""

    __slots__ = ("_open", "_table", "_tracked")

    def __init__(self, transaction: Open, table: int) -> None:
        self._open = transaction
        self._table = table
        self._tracked = transaction.track(table)

    @property
    def table(self) -> int:
        """The id of the table."""
        return self._table

    # -- reading ------------------------------------------------------------------------------

    def peek(self, key: bytes, *, cached_only: bool = True) -> bytes | None:
        """`get` for a thread that must not wait for a disk: NotCached if a page would have to be read.

        The read is remembered either way: a thread that reads the pages then, by `Reads.read_at`, reads for this
        transaction.
        """
        reader = self.reader
        found = self._own(key)
        if not isinstance(found, Missing):
            return judged(found, reader.at_us)
        return self._open.engine.reads.read_at(reader, key, table=self._table, cached_only=cached_only)

    def _own(self, key: bytes) -> Value | Missing:
        """What the transaction itself wrote; MISSING if it did not, and then it is remembered that the key is read."""
        tracked = self._tracked
        own = tracked.own
        if len(own.batch):
            found = own.get(key)
            if not isinstance(found, Missing):
                return found
        if key not in tracked.reads and not self._open.read_only:
            self._open.take(len(key))
            tracked.note(key)
        return MISSING

    def _may_expire(self) -> bool:
        return self._open.engine.reads.moments.clock.in_use or self._tracked.own.batch.queue is not None

    def _has_expired(self) -> bool:
        reads, own = self._open.engine.reads, self._tracked.own.batch
        return own.queue is not None or has_expired(reads, self.reader, self._table)

    def _lasting(self, key: bytes) -> Value:
        """The value of a checked key, or None; `Expiring`, if it is to expire. A read, which is validated."""
        reader = self.reader
        found = self._own(key)
        if not isinstance(found, Missing):
            return found
        return self._open.engine.reads.lasting(key, table=self._table, reader=reader)

    def _read(self, key: bytes) -> bytes | None:
        return self.peek(key, cached_only=False)

    @property
    def reader(self) -> Reader:
        """The registration of its moment. ClosedError if the transaction is over."""
        reader = self._open.reader
        if reader is None:
            raise closed("transaction")
        return reader

    def _cached(self, bounds: Bounds) -> Pairs | None:
        # What a transaction that may write has read is to be remembered: its pairs come through `_walk`.
        return self._cached_pairs(bounds) if self._open.read_only else None

    def _cached_pairs(self, bounds: Bounds) -> Pairs | None:
        seqno = self.reader.seqno
        if len(self._tracked.own.batch):
            return None
        return self._open.engine.reads.cached_range(
            bounds.start, bounds.stop, bounds.limit, seqno, reverse=bounds.reverse, table=self._table
        )

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        read_only, own = self._open.read_only, self._tracked.own
        pairs = None if read_only else self._cached_pairs(bounds)
        if pairs is not None:
            return self._followed(chunks_in(pairs), bounds)
        reads = self._open.engine.reads
        # A registration of its own: the iterator may outlive the transaction.
        reader = reads.moments.again(self.reader, "scan")
        if not len(own.batch):
            chunks = reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse, table=self._table)
        else:
            start, stop = own.skip(bounds)
            source, keys = own.source(start, stop, bounds)
            chunks = reads.chunks(reader, start, stop, reverse=bounds.reverse, own=source, table=self._table)
            chunks = own.watched(chunks, keys, start, stop, reverse=bounds.reverse)
        return chunks if read_only else self._followed(chunks, bounds)

    def _followed(self, chunks: Iterator[Chunk], bounds: Bounds) -> Iterator[Chunk]:
        """Remember how far the scan has come: a key put into that part, or taken out of it, is a conflict."""
        start, stop, left = bounds.start or b"", bounds.stop, bounds.limit
        # Nothing walked yet: an empty range at the end the scan starts from.
        walked: list[bytes | None] = [stop, stop] if bounds.reverse else [start, start]
        self._open.take(2 * _ENTRY_BYTES)
        self._tracked.ranges.append(walked)
        for keys, values in chunks:
            if left is not None:
                keys, values = keys[:left], values[:left]
                left -= len(keys)
            if keys:
                if bounds.reverse:
                    walked[0] = keys[-1]
                else:
                    walked[1] = keys[-1] + b"\0"
                yield keys, values
            if left == 0:
                return
        walked[0], walked[1] = start, stop

    def _count(self, start: bytes | None, stop: bytes | None) -> int:
        # To have counted a range is to have read all of it.
        if not self._open.read_only:
            self._open.take(2 * _ENTRY_BYTES)
            self._tracked.ranges.append([start or b"", stop])
        reader, own, table = self.reader, self._tracked.own, self._table
        reads = self._open.engine.reads
        count = reads.count_at(reader, start, stop, table=table)
        cover = own.cover()
        for low, high in cover.ranges():
            clipped = KeyRange(low, high).clip(KeyRange(start or b"", stop))
            if clipped is not None:
                count -= reads.count_at(reader, *clipped, table=table)
        # At once: it may be a thread that counts, beside a task that writes.
        for key, value in list(own.batch.writes.items()):
            if (start is None or start <= key) and (stop is None or key < stop):
                there = not cover.at(key) and reads.read_at(reader, key, table=table) is not None
                count += (value is not None) - there
        return count

    def _count_of(self, bounds: Bounds) -> int:
        if bounds.limit is None or self._open.read_only:
            return super()._count_of(bounds)
        # What is beyond the limit is not read, so that it is no conflict.
        return sum(len(keys) for keys, _ in self._walk(bounds))

    # -- writing ------------------------------------------------------------------------------

    def _refuse_if_read_only(self) -> None:
        self.reader  # noqa: B018  # it is over without one
        if self._open.read_only:
            raise ReadOnlyError('this transaction is read-only: begun with read_only=True, or the store not with "w"')

    def _write(self, key: bytes, value: bytes | None) -> None:
        self._refuse_if_read_only()
        own = self._tracked.own
        writes = own.batch.writes
        size = len(value or b"")
        if key in writes:
            size -= len(writes[key] or b"")
        else:
            size += len(key) + _ENTRY_BYTES
        self._open.take(size)
        own.write(key, value)

    def put(self, key: BytesLike, value: BytesLike, *, expire_s: float | None = None) -> None:
        """Set `key` to `value` when the transaction commits. TransactionTooLargeError beyond 256 MiB in all.

        `expire_s`: seconds from this call on, after which the key is absent. See `Store.put`.
        """
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        if expire_s is None:
            self._write(key, value)
        else:
            self._put_until(key, value, self._expires_us(expire_s), 0)

    __setitem__ = put

    def _put_until(self, key: bytes, value: bytes, expires_us: int | None, before_us: int) -> None:
        """See `WriteBatch.put_until`."""
        made = WriteBatch()
        made.put_until(key, value, expires_us, before_us)
        self._write(key, made.writes[key])
        self._queue(key, before_us)

    def _queue(self, key: bytes, before_us: int) -> None:
        batch = self._tracked.own.batch
        if batch.queue is None:
            batch.queue = {}
        batch.queue[key] = before_us or batch.queue.get(key, 0)

    def _expires_us(self, expire_s: float) -> int:
        self._refuse_if_read_only()
        return self._open.engine.reads.moments.clock.now_us() + expire_us(expire_s)

    def touch(self, key: BytesLike, *, expire_s: float | None) -> bool:
        """Let `key` expire `expire_s` seconds from this call on (None: never), when the transaction commits.

        Returns whether it is there; that is a read, which is validated.
        """
        checked = as_key(key)
        self._refuse_if_read_only()
        return self._set_found(checked, self._lasting(checked), expire_s)

    def _set_found(self, key: bytes, found: Value, expire_s: float | None) -> bool:
        """`touch`, by what `_lasting` has found."""
        # What was written meanwhile, by another task, counts.
        own = self._own(key)
        if not isinstance(own, Missing):
            found = own
        expires_us = None if expire_s is None else self._expires_us(expire_s)
        if found is None:
            return False
        before_us = found.expires_us if type(found) is Expiring and key not in self._tracked.own.batch.writes else 0
        self._put_until(key, found.value if type(found) is Expiring else found, expires_us, before_us)
        return True

    def put_stamped(self, head: BytesLike, value: BytesLike) -> None:
        """Set a new key to `value` when the transaction commits: `head`, and 12 bytes that the commit fills in.

        See `WriteBatch.put_stamped`. Until then this transaction's own reads find the key with bytes of ff.
        """
        made = WriteBatch()
        made.stamped = self._tracked.own.batch.stamped or set()
        made.put_stamped(head, value)
        for key, checked in made.writes.items():
            self._write(key, checked)
            self._tracked.own.batch.stamped = made.stamped
            if made.queue is not None:
                self._queue(key, 0)

    def update(self, other: Updates = (), /, **keywords: Never) -> None:
        """Put every pair of what `dict.update` takes when the transaction commits: see `Store.update`."""
        for key, value in checked_pairs(other, **keywords).items():
            self._write(key, value)

    def delete(self, key: BytesLike) -> None:
        """Remove `key`, if it is there, when the transaction commits. It is not read: no conflict comes of it."""
        self._write(as_key(key), None)

    def __delitem__(self, key: BytesLike) -> None:
        checked = as_key(key)
        self._refuse_if_read_only()
        if self.get(checked) is None:
            raise KeyError(checked)
        self._write(checked, None)

    def delete_range(self, start: Bound = None, stop: Bound = None) -> None:
        """Remove every key from `start` on, up to but without `stop`, when the transaction commits."""
        self._refuse_if_read_only()
        self._open.take(2 * _ENTRY_BYTES)
        self._tracked.own.delete_range(start, stop)

    def clear(self) -> None:
        """Remove every key when the transaction commits."""
        self.delete_range()

    def popitem(self) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key, as `Store.popitem` does, and return it; KeyError if there is none."""
        self._refuse_if_read_only()
        pair = self.last()
        if pair is None:
            raise KeyError("popitem(): the store is empty")
        self._write(pair[0], None)
        return pair


def as_of_now(part: TransactionPart) -> TransactionPart:
    """The same table without what the transaction writes from here on. What is read of it is validated. O(writes)."""
    made = TransactionPart(part._open, part.table)
    made._tracked = made._tracked.as_of_now()
    return made


def writes_of(part: TransactionPart) -> WriteBatch:
    """What the transaction has written to the table so far."""
    return part._tracked.own.batch
