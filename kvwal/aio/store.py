"""The store for tasks: every method of `kvwal.Store` that makes sense there, awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Concatenate, Final, ParamSpec, TypeVar

from kvwal.aio.commits import Commits
from kvwal.aio.committer import Committer
from kvwal.aio.fairness import Tickets
from kvwal.aio.naming import AsyncNaming
from kvwal.aio.remembering import AsyncRemembering
from kvwal.aio.table import TaskParts
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.workers import Workers, in_thread, the_end_of, to_the_end
from kvwal.aio.writing import AsyncWriting
from kvwal.api.store import Store
from kvwal.backup.making import BackupReport, BaseKind
from kvwal.backup.port import Where
from kvwal.calling import refuse_plain
from kvwal.db.transaction import Transaction
from kvwal.engine.recovery import RecoveryReport
from kvwal.engine.request import CommitRequest
from kvwal.engine.row_cache import RowCache
from kvwal.engine.stats import Pin, Stats
from kvwal.engine.verify import VerifyReport
from kvwal.errors import ClosedError, ConflictError, ForkedError, closed, left_open
from kvwal.keys import BytesLike, Seqno, as_int, as_key
from kvwal.options import Durability
from kvwal.pages import NotCached
from kvwal.positions import Position

__all__ = ["MAX_PENDING_BYTES", "MAX_PENDING_COMMITS", "AsyncStore", "owning"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: Commits that may be pending before the next one waits for its turn, unless something else is asked for.
MAX_PENDING_COMMITS: Final = 10_000
MAX_PENDING_BYTES: Final = 64 << 20


class AsyncStore(AsyncWriting, AsyncRemembering, AsyncNaming):
    """An open store, for the tasks of one event loop. Made by `kvwal.aio.open`, or over a `Store` that is open.

    Any task of its loop may use it; in another loop, methods that would wait raise `UsageError`. A store that several
    loops or threads use is opened once, with `kvwal.open`; each loop makes its own `AsyncStore(store)`, and threads
    use the `Store`. Errors are those of `Store`.

    Cancellation. A task that is cancelled while it waits for a commit gets its `CancelledError` in any case. If the
    commit was not begun, it is withdrawn: not written. If it was begun, the task first waits for its end;
    `committed_seqno(error)` then says the seqno if it was written, and None if it was not.
    """

    __slots__ = ("_commits", "_committer", "_is_end_told", "_owner", "_tickets")

    _parts: TaskParts
    _store: Store

    def __init__(
        self,
        store: Store,
        *,
        max_pending_commits: int = MAX_PENDING_COMMITS,
        max_pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        """Use an open store from the running loop. Closing this does not close the store beneath.

        Args:
            store: an open store.
            max_pending_commits: number of pending commits from which on the next one waits for its turn.
            max_pending_bytes: the same for the bytes of their keys and values.
        """
        max_pending_commits = as_int("max_pending_commits", max_pending_commits, 1)
        max_pending_bytes = as_int("max_pending_bytes", max_pending_bytes, 1)
        loop = asyncio.get_running_loop()
        engine, workers = store.engine, Workers(loop)
        self._owner = False
        # Whether a call of `close` was told how it ended; one that is cancelled is not.
        self._is_end_told = False
        self._tickets = Tickets()
        self._committer = Committer(engine, loop, max_commits=max_pending_commits, max_bytes=max_pending_bytes)
        self._commits = Commits(engine, self._committer, workers)
        super().__init__(store, TaskParts(self._commits, workers, store))

    # -- about it -----------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """The store beneath, which threads may use meanwhile. Its methods wait: do not call them in a task."""
        return self._store

    @property
    def closed(self) -> bool:
        """Whether `close` was called, here or on the store beneath."""
        return self._commits.closing is not None or self._store.closed

    @property
    def read_only(self) -> bool:
        """Whether it was opened with flag "r"."""
        return self._store.read_only

    @property
    def recovery(self) -> RecoveryReport:
        """What opening found and did."""
        return self._store.recovery

    @property
    def last_seqno(self) -> Seqno:
        """The last commit that readers see."""
        return self._state.seqno

    @property
    def durable_seqno(self) -> Seqno:
        """The last commit known to be on disk."""
        return self._store.durable_seqno

    @property
    def position(self) -> Position:
        """The last commit that is on disk and seen by reads, with its line: what a feed goes on after."""
        return self._store.position

    @property
    def pending_commits(self) -> int:
        """Commits that were asked for and admitted, and have no answer yet."""
        return self._committer.pending_commits

    def __repr__(self) -> str:
        return f"<kvwal.aio.AsyncStore {self.path!r}, {'closed' if self.closed else 'open'}, seqno {self.last_seqno}>"

    # -- reading ------------------------------------------------------------------------------

    async def get_many(self, keys: Iterable[BytesLike]) -> list[bytes | None]:
        """The values of several keys, in their order; None where a key is missing. All from one moment."""
        self._commits.refuse_if_closing()
        state, read = self._state, self._reads.read
        wanted = list(map(as_key, keys))
        seqno = state.seqno
        rows = self._cache.rows
        try:
            found = [rows[key] if key in rows else read(key, cached_only=True) for key in wanted]
            # If nothing was published meanwhile, they are of one moment.
            if state.horizon == seqno:
                return found
        except (KeyError, NotCached):
            pass  # A page must be read, or the rows were turned over.
        return await self._workers.submit(self._store.get_many, wanted)

    # -- transactions -------------------------------------------------------------------------

    def transaction(
        self,
        *,
        read_only: bool = False,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> AsyncTransaction:
        """Begin a serializable transaction. `async with db.transaction() as txn:` commits on clean exit.

        `meta` is kept with its commit, as in `put`; `txn.meta = ...` says it, or something else, later.
        The commit raises `ConflictError` if something that was read has changed meanwhile; `run` retries for you.
        """
        self._refuse_if_over()
        txn = Transaction(
            self._engine,
            sync=self._engine.wants_sync(durability),
            read_only=read_only or self._engine.upkeep.is_read_only,
            meta=meta,
            # This, and not only what is beneath: with it goes the thread that commits.
            owner=self,
        )
        return AsyncTransaction(txn, self._reads, self._committer, self._workers)

    async def run(
        self,
        function: Callable[[AsyncTransaction], Awaitable[_T]],
        *,
        attempts: int = 100,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> _T:
        """Await `function(txn)` in a transaction and commit; on a conflict, again, up to `attempts` times.

        The function may therefore run more than once: it should have no effect but on the transaction. Returns what
        it returned. Raises the last `ConflictError` when the attempts are used up.
        """
        attempts = as_int("attempts", attempts, 1)
        with self._tickets.call() as call:
            for attempt in range(1, attempts + 1):
                await call.begin(attempt)
                try:
                    async with self.transaction(durability=durability, meta=meta) as txn:
                        return await _awaited(function, txn)
                except ConflictError:
                    if attempt == attempts:
                        raise
        raise AssertionError("unreachable")

    def transactional(
        self, function: Callable[Concatenate[AsyncTransaction, _P], Awaitable[_T]]
    ) -> Callable[_P, Awaitable[_T]]:
        """Decorator: `@db.transactional async def transfer(txn, ...)` makes `await transfer(...)` run as `run` does."""

        @functools.wraps(function)
        async def in_transaction(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return await self.run(lambda txn: _awaited(function, txn, *args, **kwargs))

        return in_transaction

    # -- upkeep -------------------------------------------------------------------------------

    async def sync(self) -> None:
        """Make every commit that is visible now durable, whatever durability it was made with."""
        self._refuse_if_over()
        if not self.read_only:
            await self._committer.commit(CommitRequest(sync=True))

    async def checkpoint(self) -> None:
        """`Store.checkpoint`, in a thread. If the task is cancelled, it goes on, and how it ended is not told."""
        self._refuse_if_over()
        await in_thread(self._store.checkpoint)

    async def compact(self) -> int:
        """`Store.compact`, in a thread. If the task is cancelled, it goes on, and how it ended is not told."""
        self._refuse_if_over()
        return await in_thread(self._store.compact)

    async def verify(self, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """`Store.verify`, in a thread, which also calls `progress`. If the task is cancelled, it goes on."""
        self._refuse_if_over()
        return await in_thread(self._store.verify, progress=progress)

    async def backup(
        self,
        dest: Where,
        *,
        base: BaseKind = "auto",
        history: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> BackupReport:
        """`Store.backup`, in a thread, which also calls `progress`. If the task is cancelled, it goes on."""
        self._refuse_if_over()
        return await in_thread(self._store.backup, dest, base=base, history=history, progress=progress)

    async def stats(self) -> Stats:
        """Figures about memory, pages and log."""
        self._refuse_if_over()
        return await self._workers.submit(self._store.stats)

    async def pins(self) -> list[Pin]:
        """Who holds an old moment of the store, since when, and how old it is."""
        self._refuse_if_over()
        return self._store.pins()

    # -- ending -------------------------------------------------------------------------------

    async def close(self) -> None:
        """Wait for the commits that are pending, then close the store (unless this was made over one). Idempotent.

        It does not wait for those that wait for an archive (`on_behind="stall"`): none of them was begun, nothing of
        them is written, and they raise ClosedError. So does every commit that is asked for from here on, also of a
        transaction. Where the store stays open, snapshots and transactions can be read on.

        A task that is cancelled here is cancelled when the store is closed. Raises as `Store.close`; what no call was
        told of, since each was cancelled, is raised by the next one. RefusedError if the system has no thread left for
        it: the files stay open and locked then, nothing can be read or written, and the next call tries again.
        """
        closing = self._commits.closing
        if closing is None:
            try:
                self._state.refuse_if_gone()
            except ForkedError:
                return  # Nothing here is ours, and the threads are not there.
            except ClosedError:
                pass
            self._workers.refuse_other_loops()
            # The rows, which `get` looks at first, are those of the store beneath, which may stay open.
            self._cache = RowCache(0, lambda _: None)
        elif closing.done() and self._is_end_told and not self._is_left_open():
            return
        cancelled: BaseException | None = None
        while True:
            closing = self._commits.closing
            if closing is None or (closing.done() and (_was_stopped(closing) or self._is_left_open())):
                # With all tasks of the loop, before its first step; or no thread was to be had.
                closing = self._commits.closing = asyncio.ensure_future(self._close())
            try:
                _, later = await the_end_of(closing)
                self._is_end_told = True
                break
            except asyncio.CancelledError as error:
                if not closing.cancelled():
                    raise
                cancelled = error
            except Exception:  # whatever failed: it is raised again; a cancellation tells nothing
                self._is_end_told = True
                raise
        cancelled = later or cancelled
        if cancelled is not None:
            raise cancelled

    def _is_left_open(self) -> bool:
        """Whether the close of the store beneath was not begun."""
        return self._owner and not self._store.closed

    async def _close(self) -> None:
        """To its end, also when it is cancelled: the tasks that wait for it say that they were."""
        # An archive may hang for as long as its destination does.
        self._committer.end()
        # Where this is interrupted, the thread is needed on.
        await self._committer.drain()
        try:
            if self._owner:
                try:
                    await to_the_end(self._store.close)
                except asyncio.CancelledError as error:
                    # What failed is for the next `close`.
                    raise error.__cause__ or error from None
        finally:
            self._committer.over = left_open if self._is_left_open() else closed
            self._stop()

    def _stop(self) -> None:
        self._committer.stop()
        super()._stop()


def _was_stopped(closing: asyncio.Future[None]) -> bool:
    """Whether a close that is done was cancelled, or interrupted, before its end."""
    return closing.cancelled() or not isinstance(closing.exception(), Exception | None)


async def _awaited(function: Callable[_P, Awaitable[_T]], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    result = function(*args, **kwargs)
    refuse_plain(function, result)
    return await result


def owning(store: Store, **limits: int) -> AsyncStore:
    """An `AsyncStore` that closes the store beneath when it is closed."""
    result = AsyncStore(store, **limits)
    result._owner = True
    return result
