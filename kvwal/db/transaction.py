"""Transactions: read a snapshot, collect writes, commit if nothing that was read has changed.

Isolation is serializable: a transaction that commits has seen and done what it would have seen and
done had it run alone, at its place in the commit order. No locks are held while user code runs, so
there are no deadlocks; the price is `ConflictError`, which `Store.run` answers by running it again.

What was read of each table is remembered, to be validated (part.py). What the transaction wrote itself is
seen by its own reads and scans and needs no validation. A transaction
without writes commits without validation: it read one snapshot, and takes that place in the order.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Final, TypeVar, overload

from kvwal.db.part import Open, TransactionPart
from kvwal.engine.engine import Engine
from kvwal.engine.expiry import ExpiryClock
from kvwal.engine.request import CommitRequest, say_written
from kvwal.engine.row_cache import RowCache
from kvwal.engine.state import State
from kvwal.engine.tables import refuse_own
from kvwal.engine.writes import LonePut
from kvwal.keys import MAX_KEY_BYTES, SYSTEM_TABLE, Bound, BytesLike, Seqno, as_key
from kvwal.log import extension_of, is_of_users, meta_of

__all__ = ["Transaction", "is_transaction_of", "put_row"]

_T = TypeVar("_T")

# A put alone takes a shorter way to the log, which copies it.
_SMALL_BYTES: Final = 1 << 16
# A row cache without rows: a transaction that has writes of its own, or is over, looks into this one.
_NO_ROWS: Final = RowCache(0, lambda _: None)


class _OwnPart(TransactionPart):
    """A table of the store's own within a transaction, for reading."""

    __slots__ = ()

    def _refuse_if_read_only(self) -> None:
        super()._refuse_if_read_only()
        refuse_own((self._table,))


class Transaction(TransactionPart):
    """A serializable transaction on a snapshot, with its own writes on top.

    Use it in a `with` block: it commits on clean exit and aborts on an exception. For one thread at a
    time. After commit or abort every method but `abort` raises `ClosedError`.

    What it reads is validated when it commits: keys, and ranges as far as they were read. `len` reads all of a range,
    up to its limit, and so does `list(txn.keys(...))`, since a list asks for the length first; `scan` does not.
    """

    __slots__ = ("__weakref__", "_cache", "_extension", "_note", "_seqno", "_state", "_sync", "commit_seqno")

    def __init__(
        self,
        engine: Engine,
        *,
        sync: bool,
        read_only: bool,
        meta: Mapping[str, str] | None = None,
        owner: object = None,
    ) -> None:
        # What the commit says of itself beside its writes.
        self._extension = extension_of(meta)
        self._sync = sync
        #: Seqno of this transaction's commit; None before, and for one that wrote nothing.
        self.commit_seqno: Seqno | None = None
        super().__init__(Open(engine, read_only=read_only, owner=owner), 0)
        self._seqno = self.reader.seqno
        self._note = self._tracked.note
        self._state = engine.state
        #: The store's row cache, for as long as nothing but it can answer.
        self._cache = engine.state.cache

    @property
    def seqno(self) -> Seqno:
        """The last commit that this transaction's reads see."""
        return self._seqno

    @property
    def clock(self) -> ExpiryClock:
        """By which what it puts expires."""
        return self._open.engine.reads.moments.clock

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

    def part(self, table: int) -> TransactionPart:
        """A table as this transaction sees it, by its id. ValueError by writes to a table of the store's own.

        The commit raises TableNotFoundError if it writes to a table that was dropped before, in this opening.
        """
        self.reader  # noqa: B018  # it is over without one
        if not table:
            return self
        return (TransactionPart if is_of_users(table) else _OwnPart)(self._open, table)

    # -- the default table --------------------------------------------------------------------

    @overload
    def get(self, key: BytesLike) -> bytes | None: ...
    @overload
    def get(self, key: BytesLike, default: bytes | _T) -> bytes | _T: ...
    def get(self, key: BytesLike, default: object = None) -> object:
        """The value of `key` as this transaction sees it, or `default`. The read is validated at commit."""
        # Hot path: nothing was published since the snapshot, so the newest row is the snapshot's. The horizon is looked
        # at after the row was taken; it is raised before rows change.
        try:
            value = self._cache.rows[key]  # type: ignore[index]  # what is no row raises
            if self._state.horizon == self._seqno:
                self._note(key)  # type: ignore[arg-type]  # it is equal to a key
                return default if value is None else value
        except (KeyError, TypeError, ValueError):
            pass  # Not a row, or no key: the way below finds out.
        value = self.peek(key if type(key) is bytes and len(key) <= MAX_KEY_BYTES else as_key(key), cached_only=False)
        return default if value is None else value

    def _write(self, key: bytes, value: bytes | None) -> None:
        # From here on the rows alone do not answer.
        self._cache = _NO_ROWS
        super()._write(key, value)

    def delete_range(self, start: Bound = None, stop: Bound = None) -> None:
        """Remove every key from `start` on, up to but without `stop`, when the transaction commits."""
        self._cache = _NO_ROWS
        super().delete_range(start, stop)

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
                    self.commit_seqno = self._open.engine.commit(request)
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

    def request(self, *, cached_only: bool = False) -> CommitRequest | None:
        """What `commit` asks the engine for; None if nothing was written. `cached_only`: no file is read for it.

        Requires: until that is done no thread writes to this transaction, or ends it.
        """
        self.reader  # noqa: B018  # it is over without one
        batch = self._open.batch
        if not len(batch):
            return None
        reads = self._open.read_set()
        is_one = len(batch.writes) == 1 and not batch.ranges and batch.others is None and batch.stamped is None
        is_one = is_one and batch.queue is None
        if is_one and self._extension is None:
            ((key, value),) = batch.writes.items()
            if value is not None and len(value) <= _SMALL_BYTES:
                return CommitRequest(LonePut(key, value), sync=self._sync, reads=reads, reader=self.reader)
        writes = self._open.engine.tables.indexes.encoded(batch, self._extension, cached_only=cached_only)
        return CommitRequest(writes, sync=self._sync, reads=reads, reader=self.reader)

    def abort(self) -> None:
        """Forget the writes and let go of the snapshot. Idempotent, and without effect after `commit`."""
        reader, self._open.reader = self._open.reader, None
        self._cache = _NO_ROWS
        if reader is not None:
            reader.release()

    @property
    def is_open(self) -> bool:
        """Whether it can still be used: neither committed nor aborted."""
        return self._open.reader is not None

    def __enter__(self) -> Transaction:
        self.reader  # noqa: B018  # it is over without one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self.is_open:
            self.commit()

    def __repr__(self) -> str:
        state = "open" if self.is_open else "over"
        return f"<Transaction at seqno {self._seqno}, {len(self._open.batch)} writes, {state}>"


def put_row(txn: Transaction, key: bytes, value: bytes) -> None:
    """Set a row of table 1, which the store itself keeps, when the transaction commits."""
    TransactionPart(txn._open, SYSTEM_TABLE).put(key, value)


def is_transaction_of(txn: Transaction, state: State) -> bool:
    """Whether it is one of the open store that has this state."""
    return txn._state is state
