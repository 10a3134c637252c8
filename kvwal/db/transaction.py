"""Transactions: read a snapshot, collect writes, commit if nothing that was read has changed.

Isolation is serializable: a transaction that commits has seen and done what it would have seen and
done had it run alone, at its place in the commit order. No locks are held while user code runs, so
there are no deadlocks; the price is `ConflictError`, which `Store.run` answers by running it again.

ReadSet are remembered to be validated: keys, and ranges as far as they were really walked. What the
transaction wrote itself is seen by its own reads and scans and needs no validation. A transaction
without writes commits without validation: it read one snapshot, and takes that place in the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from types import TracebackType
from typing import Final, TypeVar, overload

from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.own import OwnWrites
from kvwal.engine.engine import Engine
from kvwal.engine.merge import Chunk, Pairs, chunks_in
from kvwal.engine.occ import ReadSet
from kvwal.engine.readers import Reader
from kvwal.engine.request import CommitRequest, say_written
from kvwal.engine.row_cache import RowCache
from kvwal.engine.value import Missing
from kvwal.engine.writes import EncodedBatch, LonePut
from kvwal.errors import ReadOnlyError, TransactionTooLargeError, closed
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, BytesLike, KeyRange, Seqno, as_key, as_value
from kvwal.log import extension_of, meta_of

__all__ = ["MAX_TRANSACTION_BYTES", "Transaction"]

_T = TypeVar("_T")

# A put alone takes a shorter way to the log, which copies it.
_SMALL_BYTES: Final = 1 << 16
#: What one transaction may hold in memory: what it has read, by key, and what it is to write.
MAX_TRANSACTION_BYTES: Final = 256 << 20
# A key in a set or a dict, beside its own bytes.
_ENTRY_BYTES: Final = 120
# A row cache without rows: a transaction that has writes of its own, or is over, looks into this one.
_NO_ROWS: Final = RowCache(0, lambda _: None)
_NOTHING: Final[frozenset[bytes]] = frozenset()


class Transaction(OrderedMapping, MutableMapping[bytes, bytes]):
    """A serializable transaction on a snapshot, with its own writes on top.

    Use it in a `with` block: it commits on clean exit and aborts on an exception. For one thread at a
    time. After commit or abort every method but `abort` raises `ClosedError`.
    """

    __slots__ = (
        "__weakref__",
        "_bytes",
        "_cache",
        "_engine",
        "_extension",
        "_note",
        "_own",
        "_ranges",
        "_read_only",
        "_reader",
        "_reads",
        "_seqno",
        "_state",
        "_sync",
        "commit_seqno",
    )

    def __init__(
        self,
        engine: Engine,
        *,
        sync: bool,
        read_only: bool,
        meta: Mapping[str, str] | None = None,
        owner: object = None,
    ) -> None:
        self._reader: Reader | None = None
        # What the commit says of itself beside its writes.
        self._extension = extension_of(meta)
        self._engine: Engine = engine
        self._state = engine.state
        self._sync = sync
        self._read_only = read_only
        self._own = OwnWrites()
        self._bytes = 0
        self._reads: set[bytes] = set()
        # Nothing that a read-only transaction reads is validated, so it need not be remembered.
        self._note: Callable[[bytes], object] = _NOTHING.__contains__ if read_only else self._reads.add
        # [start, stop) as far as a scan has come; mutable while it goes on.
        self._ranges: list[list[bytes | None]] = []
        #: Seqno of this transaction's commit; None before, and for one that wrote nothing.
        self.commit_seqno: Seqno | None = None
        self._reader = engine.reads.moments.reader("transaction", writer=not read_only, owner=owner)
        self._seqno = self._reader.seqno
        #: The store's row cache, for as long as nothing but it can answer.
        self._cache = engine.state.cache

    @property
    def seqno(self) -> Seqno:
        """The last commit that this transaction's reads see."""
        return self._seqno

    @property
    def meta(self) -> dict[str, str]:
        """What the commit is to say of itself: see `Store.put`. Set it as a whole; a transaction without writes
        commits nothing, and drops it.
        """
        return meta_of(self._extension)

    @meta.setter
    def meta(self, meta: Mapping[str, str] | None) -> None:
        self._refuse_if_read_only()
        self._extension = extension_of(meta)

    # -- reading ------------------------------------------------------------------------------

    @overload
    def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key` as this transaction sees it, or `default`. The read is validated at commit."""
        # Hot path: nothing was published since the snapshot, so the newest row is the snapshot's. The horizon is looked
        # at after the row was taken; it is raised before rows change.
        try:
            value = self._cache.rows[key]  # type: ignore[index]
            if self._state.horizon == self._seqno:
                self._note(key)  # type: ignore[arg-type]  # it is equal to a key
                return default if value is None else value
        except (KeyError, TypeError, ValueError):
            pass  # Not a row, or no key: the way below finds out.
        value = self.peek(key if type(key) is bytes and len(key) <= MAX_KEY_BYTES else as_key(key), cached_only=False)
        return default if value is None else value

    def peek(self, key: bytes, *, cached_only: bool = True) -> bytes | None:
        """`get` for a thread that must not wait for a disk: NotCached if a page would have to be read.

        The read is remembered either way: a thread that reads the pages then, by `Reads.read_at`, reads for this
        transaction.
        """
        reader = self.reader
        if len(self._own.batch):
            own = self._own.get(key)
            if not isinstance(own, Missing):
                return own
        if not self._read_only and key not in self._reads:
            self._take(len(key))
            self._note(key)
        return self._engine.reads.read_at(reader, key, cached_only=cached_only)

    def _read(self, key: bytes) -> bytes | None:
        return self.peek(key, cached_only=False)

    @property
    def reader(self) -> Reader:
        """The registration of its moment. ClosedError if the transaction is over."""
        if self._reader is None:
            raise closed("transaction")
        return self._reader

    def _cached(self, bounds: Bounds) -> Pairs | None:
        # What a transaction that may write has read is to be remembered: its pairs come through `_walk`.
        return self._cached_pairs(bounds) if self._read_only else None

    def _cached_pairs(self, bounds: Bounds) -> Pairs | None:
        seqno = self.reader.seqno
        if len(self._own.batch):
            return None
        return self._engine.reads.cached_range(bounds.start, bounds.stop, bounds.limit, seqno, reverse=bounds.reverse)

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        pairs = None if self._read_only else self._cached_pairs(bounds)
        if pairs is not None:
            return self._tracked(chunks_in(pairs), bounds)
        # A registration of its own: the iterator may outlive the transaction.
        reader = self._engine.reads.moments.again(self.reader, "scan")
        if not len(self._own.batch):
            chunks = self._engine.reads.chunks(reader, bounds.start, bounds.stop, reverse=bounds.reverse)
        else:
            start, stop = self._own.skip(bounds)
            own, keys = self._own.source(start, stop, bounds)
            chunks = self._engine.reads.chunks(reader, start, stop, reverse=bounds.reverse, own=own)
            chunks = self._own.watched(chunks, keys, start, stop, reverse=bounds.reverse)
        return chunks if self._read_only else self._tracked(chunks, bounds)

    def _tracked(self, chunks: Iterator[Chunk], bounds: Bounds) -> Iterator[Chunk]:
        """Remember how far the scan has come: a key put into that part, or taken out of it, is a conflict."""
        start, stop, left = bounds.start or b"", bounds.stop, bounds.limit
        # Nothing walked yet: an empty range at the end the scan starts from.
        walked: list[bytes | None] = [stop, stop] if bounds.reverse else [start, start]
        self._take(2 * _ENTRY_BYTES)
        self._ranges.append(walked)
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
        if not self._read_only:
            self._take(2 * _ENTRY_BYTES)
            self._ranges.append([start or b"", stop])
        reader, own = self.reader, self._own
        count = self._engine.reads.count_at(reader, start, stop)
        for low, high in own.cover().ranges():
            clipped = KeyRange(low, high).clip(KeyRange(start or b"", stop))
            if clipped is not None:
                count -= self._engine.reads.count_at(reader, *clipped)
        for key, value in own.batch.writes.items():
            if (start is None or start <= key) and (stop is None or key < stop):
                there = not own.cover().at(key) and self._engine.reads.read_at(reader, key) is not None
                count += (value is not None) - there
        return count

    # -- writing ------------------------------------------------------------------------------

    def _refuse_if_read_only(self) -> None:
        self.reader  # noqa: B018  # it is over without one
        if self._read_only:
            raise ReadOnlyError('this transaction is read-only: begun with read_only=True, or the store not with "w"')

    def _write(self, key: bytes, value: bytes | None) -> None:
        self._refuse_if_read_only()
        writes = self._own.batch.writes
        size = len(value or b"")
        if key in writes:
            size -= len(writes[key] or b"")
        else:
            size += len(key) + _ENTRY_BYTES
        self._take(size)
        # From here on the rows alone do not answer.
        self._cache = _NO_ROWS
        self._own.write(key, value)

    def _take(self, size: int) -> None:
        """Count memory. TransactionTooLargeError beyond the limit: then nothing is done, and what was done stays."""
        if self._bytes + size + _ENTRY_BYTES * len(self._reads) > MAX_TRANSACTION_BYTES:
            raise TransactionTooLargeError(MAX_TRANSACTION_BYTES)
        self._bytes += size

    def put(self, key: BytesLike, value: BytesLike) -> None:
        """Set `key` to `value` when the transaction commits. TransactionTooLargeError beyond 256 MiB in all."""
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        self._write(key, value)

    __setitem__ = put

    def delete(self, key: BytesLike) -> None:
        """Remove `key`, if it is there, when the transaction commits. It is not read: no conflict comes of it."""
        self._write(as_key(key), None)

    def __delitem__(self, key: BytesLike) -> None:
        checked = as_key(key)
        self._refuse_if_read_only()
        if self.get(checked) is None:
            raise KeyError(checked)
        self._write(checked, None)

    def delete_range(self, start: BytesLike | None = None, stop: BytesLike | None = None) -> None:
        """Remove every key from `start` on, up to but without `stop`, when the transaction commits."""
        self._refuse_if_read_only()
        self._take(2 * _ENTRY_BYTES)
        self._own.delete_range(start, stop)
        self._cache = _NO_ROWS

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

    # -- ending -------------------------------------------------------------------------------

    def commit(self) -> Seqno | None:
        """Commit now. Returns the seqno, or None if nothing was written.

        Raises `ConflictError` if something read has changed since; then nothing was written. Durable on
        return as the transaction's durability says. The transaction is over either way.
        """
        request = None
        try:
            try:
                request = self.request()
                if request is not None:
                    self.commit_seqno = self._engine.commit(request)
            finally:
                self.abort()
            return self.commit_seqno
        except BaseException as error:
            # Perhaps interrupted when the commit was over, and only the snapshot was still to be given back.
            self.abort()
            if request is not None and request.seqno:
                self.commit_seqno = request.seqno
                say_written(error, request.seqno)
            raise

    def request(self) -> CommitRequest | None:
        """What `commit` asks the engine for; None if nothing was written.

        Requires: until that is done no thread writes to this transaction, or ends it.
        """
        self.reader  # noqa: B018  # it is over without one
        batch = self._own.batch
        if not len(batch):
            return None
        ranges = _walked(self._ranges)
        reads = ReadSet(self._seqno, self._reads, ranges, self._reader) if self._reads or ranges else None
        if len(batch.writes) == 1 and not batch.ranges and self._extension is None:
            ((key, value),) = batch.writes.items()
            if value is not None and len(value) <= _SMALL_BYTES:
                return CommitRequest(LonePut(key, value), sync=self._sync, reads=reads)
        return CommitRequest(EncodedBatch(batch, self._extension), sync=self._sync, reads=reads)

    def abort(self) -> None:
        """Forget the writes and let go of the snapshot. Idempotent, and without effect after `commit`."""
        reader, self._reader = self._reader, None
        self._cache = _NO_ROWS
        if reader is not None:
            reader.release()

    @property
    def is_open(self) -> bool:
        """Whether it can still be used: neither committed nor aborted."""
        return self._reader is not None

    def __enter__(self) -> Transaction:
        self.reader  # noqa: B018  # it is over without one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._reader is not None:
            self.commit()

    def __repr__(self) -> str:
        state = "open" if self._reader is not None else "over"
        return f"<Transaction at seqno {self._seqno}, {len(self._own.batch)} writes, {state}>"


def _walked(ranges: list[list[bytes | None]]) -> list[KeyRange]:
    result: list[KeyRange] = []
    for start, stop in ranges:
        if start is not None and (stop is None or start < stop):
            result.append(KeyRange(start, stop))
    return result
