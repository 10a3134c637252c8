"""A transaction for tasks: reads a snapshot, collects writes in memory, and commits with others in one flush."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Never

from kvwal.aio.committer import Committer
from kvwal.aio.reading import AsyncReading, read_again
from kvwal.aio.workers import Workers, in_thread
from kvwal.batch import Updates, checked_pairs
from kvwal.db.mapping import Bounds, OrderedMapping
from kvwal.db.part import TransactionPart
from kvwal.db.transaction import Transaction
from kvwal.engine.merge import Chunk
from kvwal.engine.reads import Reads
from kvwal.errors import closed
from kvwal.keys import Bound, BytesLike, Seqno, as_key
from kvwal.pages import NotCached

__all__ = ["AsyncTransaction", "AsyncTransactionPart"]


class _PartReading(AsyncReading):
    """A table within a transaction, for reading."""

    __slots__ = ("_reads", "_workers")

    def __init__(self, reads: Reads, workers: Workers) -> None:
        self._reads = reads
        self._workers = workers

    @abstractmethod
    def _mine(self) -> TransactionPart:
        """The part beneath. ClosedError if the transaction is over, or just ending."""

    def _refuse_if_over(self) -> None:
        self._workers.refuse_other_loops()
        self._mine()

    async def _read(self, key: bytes) -> bytes | None:
        try:
            return self._mine().peek(key)
        except NotCached:
            return (await self._read_pages([key]))[0]

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. Validated at commit."""
        txn = self._mine()
        values: list[bytes | None] = []
        cold: dict[int, bytes] = {}
        for index, key in enumerate(map(as_key, keys)):
            try:
                values.append(txn.peek(key))
            except NotCached:
                values.append(None)
                cold[index] = key
        if cold:
            for index, value in zip(cold, await self._read_pages(list(cold.values())), strict=True):
                values[index] = value
        return values

    async def _read_pages(self, keys: list[bytes]) -> list[bytes | None]:
        # `peek` has remembered the reads; the worker needs only the moment, and holds it by itself.
        reads, part = self._reads, self._mine()
        reader = reads.moments.again(part.reader, "get")
        return await self._workers.submit(read_again, reads, reader, part.table, keys)

    async def touch(self, key: BytesLike, *, expire_s: float | None) -> bool:
        """Let `key` expire `expire_s` seconds from this call on: see `Transaction.touch`. Awaited, since it reads."""
        checked = as_key(key)
        found = await in_thread(self._mine()._lasting, checked)
        return self._mine()._set_found(checked, found, expire_s)

    def _chunks(self, bounds: Bounds) -> Iterator[Chunk]:
        return self._mine()._chunks(bounds)

    @property
    def _mapping(self) -> OrderedMapping:
        return self._mine()


class AsyncTransactionPart(_PartReading):
    """A table within a transaction, as bytes."""

    __slots__ = ("_table", "_whole")

    def __init__(self, whole: AsyncTransaction, table: int, reads: Reads, workers: Workers) -> None:
        super().__init__(reads, workers)
        self._whole = whole
        self._table = table

    def _mine(self) -> TransactionPart:
        """The part beneath. ClosedError if the transaction is over, or just ending."""
        return self._whole._mine().part(self._table)


class AsyncTransaction(_PartReading):
    """A serializable transaction on a snapshot, with its own writes on top.

    Use it in an `async with` block: it commits on clean exit and aborts on an exception, a cancellation included.
    Reads are awaited and writes are not, since they only touch memory until the commit. Several tasks may read
    through it at a time (`asyncio.gather`). After commit or abort every method but `abort` raises `ClosedError`.
    """

    __slots__ = ("__weakref__", "_committer", "_over", "_txn")

    def __init__(self, txn: Transaction, reads: Reads, committer: Committer, workers: Workers) -> None:
        self._txn = txn
        self._committer = committer
        # Set when the commit is asked for, while the transaction beneath still holds its moment.
        self._over = False
        super().__init__(reads, workers)

    @property
    def seqno(self) -> Seqno:
        """The last commit that this transaction's reads see."""
        return self._txn.seqno

    @property
    def commit_seqno(self) -> Seqno | None:
        """Seqno of this transaction's commit; None before, and for one that wrote nothing.

        It is set even where the task was cancelled while the commit was under way.
        """
        return self._txn.commit_seqno

    @property
    def meta(self) -> dict[str, str]:
        """What the commit is to say of itself: see `Transaction.meta`."""
        return self._txn.meta

    @meta.setter
    def meta(self, meta: Mapping[str, str] | None) -> None:
        self._mine().meta = meta

    @property
    def is_open(self) -> bool:
        """Whether it can still be used: neither committed nor aborted."""
        return not self._over and self._txn.is_open

    def _mine(self) -> Transaction:
        """The transaction beneath. ClosedError if it is over, or just ending."""
        if self._over:
            raise closed("transaction")
        return self._txn

    def part(self, table: int) -> AsyncTransactionPart:
        """A table as this transaction sees it, by its id."""
        return AsyncTransactionPart(self, table, self._reads, self._workers)

    # -- writing ------------------------------------------------------------------------------

    def put(self, key: BytesLike, value: BytesLike, *, expire_s: float | None = None) -> None:
        """Set `key` to `value` when the transaction commits. `expire_s`: see `Transaction.put`."""
        self._mine().put(key, value, expire_s=expire_s)

    def put_stamped(self, head: BytesLike, value: BytesLike) -> None:
        """Set a new key to `value` when the transaction commits: see `Transaction.put_stamped`."""
        self._mine().put_stamped(head, value)

    def update(self, other: Updates = (), /, **keywords: Never) -> None:
        """Put every pair of what `dict.update` takes when the transaction commits: see `Store.update`."""
        for key, value in checked_pairs(other, **keywords).items():
            self.put(key, value)

    def delete(self, key: BytesLike) -> None:
        """Remove `key`, if it is there, when the transaction commits. It is not read: no conflict comes of it."""
        self._mine().delete(key)

    def delete_range(self, start: Bound = None, stop: Bound = None) -> None:
        """Remove every key from `start` on, up to but without `stop`, when the transaction commits."""
        self._mine().delete_range(start, stop)

    def clear(self) -> None:
        """Remove every key when the transaction commits."""
        self._mine().delete_range()

    # -- ending -------------------------------------------------------------------------------

    async def commit(self) -> Seqno | None:
        """Commit now. Returns the seqno, or None if nothing was written.

        Raises `ConflictError` if something read has changed since; then nothing was written. Durable on return as the
        transaction's durability says. The transaction is over either way.
        """
        txn = self._mine()
        self._over = True
        try:
            request = txn.request(cached_only=True)
            if request is None:
                return None
            try:
                await self._committer.commit(request)
            finally:
                if request.seqno:
                    txn.commit_seqno = request.seqno
            return request.seqno
        finally:
            txn.abort()

    def abort(self) -> None:
        """Forget the writes and let go of the snapshot. Idempotent, and without effect once `commit` was called."""
        if not self._over:
            self._over = True
            self._txn.abort()

    async def __aenter__(self) -> AsyncTransaction:
        self._refuse_if_over()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self.is_open:
            await self.commit()

    def __repr__(self) -> str:
        return f"<AsyncTransaction at seqno {self.seqno}, {'open' if self.is_open else 'over'}>"
