"""Transactions: read a snapshot, collect writes, commit if nothing that was read has changed.

Isolation is serializable: a transaction that commits has seen and done what it would have seen and
done had it run alone, at its place in the commit order. No locks are held while user code runs, so
there are no deadlocks; the price is `ConflictError`, which `Store.run` answers by running it again.

Reads are remembered to be validated: keys, and ranges as far as they were really walked. What the
transaction wrote itself is seen by its own reads and scans and needs no validation. A transaction
without writes commits without validation: it read one snapshot, and takes that place in the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from types import TracebackType
from typing import Final, TypeVar, overload

from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.snapshot import chunks_of
from kvwal.engine.commit import CommitPipeline
from kvwal.engine.few import Pairs, chunks_in
from kvwal.engine.memtable import MISSING, Missing
from kvwal.engine.merge import Chunk, Level, RawChunk
from kvwal.engine.present import Present, View
from kvwal.engine.request import CommitRequest, say_written
from kvwal.errors import ClosedError, ReadOnlyError
from kvwal.keys import MAX_KEY_BYTES, BytesLike, KeyRange, Seqno, as_key, disjoint, in_any
from kvwal.log import encode_put

__all__ = ["Transaction"]

_T = TypeVar("_T")

# A put alone takes a shorter way to the log, which copies it.
_SMALL_BYTES: Final = 1 << 16


class Transaction(OrderedMapping, MutableMapping[bytes, bytes]):
    """A serializable transaction on a snapshot, with its own writes on top.

    Use it in a `with` block: it commits on clean exit and aborts on an exception. For one thread at a
    time. Every method raises `ClosedError` after commit or abort.
    """

    __slots__ = (
        "__weakref__",
        "_batch",
        "_before_commit",
        "_pipeline",
        "_present",
        "_ranges",
        "_read_only",
        "_reads",
        "_seqno",
        "_sync",
        "_view",
        "commit_seqno",
    )

    def __init__(
        self,
        present: Present,
        pipeline: CommitPipeline,
        since_us: int,
        *,
        sync: bool,
        read_only: bool,
        owner: object = None,
        before_commit: Callable[[WriteBatch], None] | None = None,
    ) -> None:
        self._view: View | None = None
        self._present = present
        self._pipeline = pipeline
        self._before_commit = before_commit
        self._sync = sync
        self._read_only = read_only
        self._batch = WriteBatch()
        self._reads: set[bytes] = set()
        # [start, stop) as far as a scan has come; mutable while it goes on.
        self._ranges: list[list[bytes | None]] = []
        #: Seqno of this transaction's commit; None before, and for one that wrote nothing.
        self.commit_seqno: Seqno | None = None
        self._view = present.view("transaction", since_us, writer=not read_only, owner=owner)
        self._seqno = self._view.seqno

    @property
    def seqno(self) -> Seqno:
        """The last commit that this transaction's reads see."""
        return self._seqno

    # -- reading ------------------------------------------------------------------------------

    @overload
    def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key` as this transaction sees it, or `default`. The read is validated at commit."""
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        view = self._view
        if view is None:
            raise _closed()
        batch = self._batch
        if batch.writes or batch.ranges:
            own = self._own(key)
            if not isinstance(own, Missing):
                return default if own is None else own
        self._reads.add(key)
        present = self._present
        # Hot path: nothing was published since the snapshot, so the newest row is the snapshot's. The horizon is
        # looked at after the row was taken; it is raised before rows change.
        value = present.rows.get(key, MISSING)
        if value is MISSING or present.horizon != self._seqno:
            value = present.read_at(view, key)
        return default if value is None else value

    def peek(self, key: bytes) -> bytes | None:
        """`get` for a thread that must not wait for a disk: NotCached if a page would have to be read.

        The read is remembered either way: whoever reads the pages then, by `Present.read_at`, reads for this
        transaction.
        """
        view = self._view
        if view is None:
            raise _closed()
        if len(self._batch):
            own = self._own(key)
            if not isinstance(own, Missing):
                return own
        self._reads.add(key)
        return self._present.read_at(view, key, cached_only=True)

    def _own(self, key: bytes) -> bytes | Missing | None:
        batch = self._batch
        found = batch.writes.get(key, MISSING)
        if found is MISSING and in_any(key, batch.ranges):
            return None
        return found

    def _read(self, key: bytes) -> bytes | None:
        return self.get(key)

    def _few(self, bounds: Bounds) -> Pairs | None:
        # What a transaction that may write has read is to be remembered: its pairs come through `_walk`.
        return self._at_once(bounds) if self._read_only else None

    def _at_once(self, bounds: Bounds) -> Pairs | None:
        seqno = self._open_view().seqno
        if len(self._batch):
            return None
        return self._present.few(bounds.start, bounds.stop, bounds.limit, seqno, reverse=bounds.reverse)

    def _open_view(self) -> View:
        if self._view is None:
            raise _closed()
        return self._view

    def _walk(self, bounds: Bounds) -> Iterator[Chunk]:
        few = None if self._read_only else self._at_once(bounds)
        if few is not None:
            return self._tracked(chunks_in(few), bounds)
        view = self._open_view()
        batch = self._batch
        own = Level(_own_chunks(batch, bounds), disjoint(batch.ranges)) if len(batch) else None
        # A registration of its own: the iterator may outlive the transaction.
        chunks = chunks_of(self._present, self._present.again(view, "scan"), bounds, own)
        return chunks if self._read_only else self._tracked(chunks, bounds)

    def _tracked(self, chunks: Iterator[Chunk], bounds: Bounds) -> Iterator[Chunk]:
        """Remember how far the scan has come: a key put into that part, or taken out of it, is a conflict."""
        start, stop, left = bounds.start or b"", bounds.stop, bounds.limit
        # Nothing walked yet: an empty range at the end the scan starts from.
        walked: list[bytes | None] = [stop, stop] if bounds.reverse else [start, start]
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

    def _count(self) -> int:
        return sum(len(keys) for keys, _ in self._chunks(Bounds(None, None, None, False, None)))

    # -- writing ------------------------------------------------------------------------------

    def _writable(self) -> WriteBatch:
        if self._view is None:
            raise _closed()
        if self._read_only:
            raise ReadOnlyError('this transaction is read-only: begun with read_only=True, or the store not with "w"')
        return self._batch

    def put(self, key: BytesLike, value: BytesLike) -> None:
        """Set `key` to `value` when the transaction commits."""
        self._writable().put(key, value)

    __setitem__ = put

    def delete(self, key: BytesLike) -> None:
        """Remove `key`, if it is there, when the transaction commits. It is not read: no conflict comes of it."""
        self._writable().delete(key)

    def __delitem__(self, key: BytesLike) -> None:
        batch = self._writable()
        checked = as_key(key)
        if self.get(checked) is None:
            raise KeyError(checked)
        batch.delete(checked)

    def delete_range(self, start: BytesLike | None = None, stop: BytesLike | None = None) -> None:
        """Remove every key from `start` on, up to but without `stop`, when the transaction commits."""
        self._writable().delete_range(start, stop)

    def clear(self) -> None:
        """Remove every key when the transaction commits."""
        self._writable().delete_range()

    def popitem(self) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key, as `Store.popitem` does, and return it; KeyError if there is none."""
        batch = self._writable()
        pair = self.last()
        if pair is None:
            raise KeyError("popitem(): the store is empty")
        batch.delete(pair[0])
        return pair

    # -- ending -------------------------------------------------------------------------------

    def commit(self) -> Seqno | None:
        """Commit now. Returns the seqno, or None if nothing was written.

        Raises `ConflictError` if something read has changed since; then nothing was written. Durable on
        return as the transaction's durability says. The transaction is over either way.
        """
        if self._view is None:
            raise _closed()
        request = None
        try:
            try:
                request = self.request()
                if request is not None:
                    if self._before_commit is not None:
                        self._before_commit(self._batch)
                    self.commit_seqno = self._pipeline.commit(request)
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
        """What `commit` asks the pipeline for; None if nothing was written.

        Requires: until that is done nobody writes to this transaction, or ends it.
        """
        if self._view is None:
            raise _closed()
        batch = self._batch
        if not len(batch):
            return None
        ranges = _walked(self._ranges)
        since = self._seqno if self._reads or ranges else None
        if len(batch.writes) == 1 and not batch.ranges:
            ((key, value),) = batch.writes.items()
            if value is not None and len(value) <= _SMALL_BYTES:
                request = CommitRequest.of_put(key, value, encode_put(key, value), sync=self._sync)
                request.since, request.reads, request.ranges = since, self._reads, ranges
                return request
        return CommitRequest(batch, sync=self._sync, since=since, reads=self._reads, ranges=ranges)

    def abort(self) -> None:
        """Forget the writes and let go of the snapshot. Idempotent, and without effect after `commit`."""
        view, self._view = self._view, None
        if view is not None:
            # Of the store, which it would keep from being collected.
            self._before_commit = None
            self._present.release(view)

    @property
    def is_open(self) -> bool:
        """Whether it can still be used: neither committed nor aborted."""
        return self._view is not None

    def __enter__(self) -> Transaction:
        self._open_view()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._view is not None:
            self.commit()

    def __repr__(self) -> str:
        state = "open" if self._view is not None else "over"
        return f"<Transaction at seqno {self._seqno}, {len(self._batch)} writes, {state}>"


def _own_chunks(batch: WriteBatch, bounds: Bounds) -> Iterator[RawChunk]:
    # A copy: the caller may write while it iterates, and sees what it had written when it began.
    own = {key: value for key, value in batch.writes.items() if bounds.hold(key)}
    keys = sorted(own, reverse=bounds.reverse)
    return iter([(keys, [own[key] for key in keys])] if keys else [])


def _walked(ranges: list[list[bytes | None]]) -> list[KeyRange]:
    result: list[KeyRange] = []
    for start, stop in ranges:
        if start is not None and (stop is None or start < stop):
            result.append(KeyRange(start, stop))
    return result


def _closed() -> ClosedError:
    return ClosedError("this transaction is over; begin another with Store.transaction()")
