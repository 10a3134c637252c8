"""The store for tasks: every method of `kvwal.Store` that makes sense there, awaited."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Concatenate, Final, Never, ParamSpec, TypeVar

from kvwal.aio.commits import Commits
from kvwal.aio.committer import Committer
from kvwal.aio.fairness import Tickets
from kvwal.aio.naming import AsyncNaming
from kvwal.aio.remembering import AsyncRemembering
from kvwal.aio.table import TaskParts
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.workers import Workers, in_thread, the_end_of, to_the_end
from kvwal.api.store import Store
from kvwal.backup.making import BackupReport, BaseKind
from kvwal.backup.port import Where
from kvwal.batch import Updates, WriteBatch
from kvwal.db.transaction import Transaction
from kvwal.engine.operations import PopEdge, SetExpiry, Update, decode_counter, encode_counter
from kvwal.engine.own_commits import OwnCommits, block_of
from kvwal.engine.recovery import RecoveryReport
from kvwal.engine.request import CommitRequest
from kvwal.engine.stats import Pin, Stats
from kvwal.engine.verify import VerifyReport
from kvwal.errors import ClosedError, ConflictError, ForkedError
from kvwal.expiring import expire_us
from kvwal.keys import MAX_KEY_BYTES, MAX_VALUE_BYTES, Bound, BytesLike, KeyRange, Seqno, as_int, as_key, as_value
from kvwal.log import extension_of
from kvwal.options import Durability
from kvwal.pages import NotCached
from kvwal.positions import Position

__all__ = ["MAX_PENDING_BYTES", "MAX_PENDING_COMMITS", "AsyncStore", "owning"]

_T = TypeVar("_T")
_P = ParamSpec("_P")

#: Commits that may be pending before the next one waits for its turn, unless something else is asked for.
MAX_PENDING_COMMITS: Final = 10_000
MAX_PENDING_BYTES: Final = 64 << 20


class AsyncStore(AsyncRemembering, AsyncNaming):
    """An open store, for the tasks of one event loop. Made by `kvwal.aio.open`, or over a `Store` that is open.

    Any task of its loop may use it; in another loop, methods that would wait raise `UsageError`. A store that several
    loops or threads use is opened once, with `kvwal.open`; each loop makes its own `AsyncStore(store)`, and threads
    use the `Store`. Errors are those of `Store`.

    Cancellation. A task that is cancelled while it waits for a commit gets its `CancelledError` in any case. If the
    commit was not begun, it is withdrawn: not written. If it was begun, the task first waits for its end;
    `committed_seqno(error)` then says the seqno if it was written, and None if it was not.
    """

    __slots__ = ("_commits", "_committer", "_owner", "_tickets")

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

    # -- writing ------------------------------------------------------------------------------

    async def put(
        self,
        key: BytesLike,
        value: BytesLike,
        *,
        expire_s: float | None = None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Set `key` to `value`, and return the commit's seqno. Arguments and errors as in `Store.put`.

        Waits for its turn while `max_pending_commits` are pending. Cancellation: see the class.
        """
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        if expire_s is not None:
            return (await self._set_expiry(key, value, expire_s, durability, meta))[0]
        if meta is not None:
            batch = WriteBatch()
            batch.writes[key] = value
            return await self._commits.batch(batch, durability, extension_of(meta))
        return await self._commits.put(key, value, durability)

    async def _set_expiry(
        self,
        key: bytes,
        value: bytes | None,
        expire_s: float | None,
        durability: Durability | None,
        meta: Mapping[str, str] | None,
    ) -> tuple[Seqno, bool]:
        expires_us = None if expire_s is None else self._reads.moments.clock.now_us() + expire_us(expire_s)
        setting = SetExpiry(key, value, expires_us, extension_of(meta))
        # Read first, so that the commit leader need not read a page.
        await self._read(key)
        return await self._commits.operation(setting, durability), setting.found

    async def touch(
        self,
        key: BytesLike,
        *,
        expire_s: float | None,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Let `key` expire `expire_s` seconds from this call on (None: never): see `Store.touch`."""
        return (await self._set_expiry(as_key(key), None, expire_s, durability, meta))[1]

    async def delete(
        self, key: BytesLike, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Remove `key` if it is there, and return the commit's seqno. It is not looked up first."""
        batch = WriteBatch()
        batch.delete(key)
        return await self._commits.batch(batch, durability, extension_of(meta))

    async def delete_range(
        self,
        start: Bound = None,
        stop: Bound = None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Seqno:
        """Remove every key from `start` on (None: the first), up to but without `stop` (None: the end).

        Returns the commit's seqno.
        """
        batch = WriteBatch()
        batch.delete_range(start, stop)
        return await self._commits.batch(batch, durability, extension_of(meta))

    async def commit(
        self, batch: WriteBatch, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> Seqno:
        """Commit a batch, whole or not at all; it reads nothing, so it never conflicts. Returns its seqno.

        What is committed is the batch as it is at the call. An empty batch commits nothing, and the last visible
        seqno is returned.
        """
        # A copy: the pipeline looks at it once more after the flush, and other tasks run until then.
        return await self._commits.batch(batch.copy(), durability, extension_of(meta))

    @asynccontextmanager
    async def batch(
        self, *, durability: Durability | None = None, meta: Mapping[str, str] | None = None
    ) -> AsyncIterator[WriteBatch]:
        """`async with db.batch() as batch:` collects writes, and commits them on clean exit, none on an exception."""
        extension = extension_of(meta)
        batch = WriteBatch()
        batch.now_us = self._reads.moments.clock.now_us
        yield batch
        await self._commits.batch(batch.copy(), durability, extension)

    async def update(
        self,
        other: Updates = (),
        /,
        *,
        meta: Mapping[str, str] | None = None,
        **keywords: Never,
    ) -> None:
        """Put every pair of what `dict.update` takes, in one commit: see `Store.update`."""
        batch = WriteBatch()
        batch.update(other, **keywords)
        await self._commits.batch(batch, None, extension_of(meta))

    async def clear(self) -> None:
        """Remove every key, in one commit."""
        await self.delete_range()

    # -- writes that depend on what is there ------------------------------------------------------

    async def _update(
        self,
        key: bytes,
        function: Callable[[bytes | None], bytes | None],
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Update:
        update = Update(key, function, extension_of(meta))
        # Read first, so that the commit leader need not read a page.
        await self._read(key)
        await self._commits.operation(update, durability)
        return update

    async def setdefault(self, key: BytesLike, default: BytesLike) -> bytes:
        """The value of `key`; if there is none, put `default` first. Atomic, and never a conflict."""
        checked, other = as_key(key), as_value(default)
        value = (await self._update(checked, lambda old: other if old is None else old)).new
        assert value is not None
        return value

    async def pop(self, key: BytesLike, *default: Any) -> Any:
        """Remove `key` and return its value; `default`, if given, or KeyError if it is not there. Atomic."""
        if len(default) > 1:
            raise TypeError(f"pop takes a key and at most one default, not {len(default)}")
        checked = as_key(key)
        value = (await self._update(checked, lambda old: None)).old
        if value is not None:
            return value
        if default:
            return default[0]
        raise KeyError(checked)

    async def popitem(
        self, start: Bound = None, stop: Bound = None, *, last: bool = True
    ) -> tuple[bytes, bytes]:
        """Remove the pair with the largest key (with `last=False` the smallest), of a range or of all, and return it.

        KeyError if there is none. Atomic, and never a conflict, however many tasks take from one queue.
        """
        bounds = KeyRange.of(start, stop)
        await (self.last if last else self.first)(*bounds)
        taking = PopEdge(bounds, reverse=last)
        await self._commits.operation(taking, None)
        if taking.pair is None:
            raise KeyError("popitem(): there is no key")
        return taking.pair

    async def put_if_absent(
        self,
        key: BytesLike,
        value: BytesLike,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` if it is not there. Returns whether it was set. Atomic, and never a conflict."""
        checked, new = as_key(key), as_value(value)
        return (await self._update(checked, lambda old: new if old is None else old, durability, meta)).old is None

    async def compare_and_set(
        self,
        key: BytesLike,
        expected: BytesLike | None,
        value: BytesLike | None,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> bool:
        """Set `key` to `value` (None: delete it) if its value is `expected` (None: if it is not there).

        Returns whether it was. Atomic, and never a conflict.
        """
        checked = as_key(key)
        wanted = None if expected is None else as_value(expected)
        new = None if value is None else as_value(value)
        update = await self._update(checked, lambda old: new if old == wanted else old, durability, meta)
        return update.old == wanted

    async def add(
        self,
        key: BytesLike,
        delta: int,
        *,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> int:
        """Add to a counter and return what it is then: see `Store.add`. Atomic, and never a conflict."""
        amount = as_int("delta", delta, -(1 << 63), (1 << 63) - 1)
        checked = as_key(key)
        update = Update(
            checked, lambda old: encode_counter(decode_counter(old) + amount), extension_of(meta), keeps_expiry=True
        )
        await self._read(checked)
        await self._commits.operation(update, durability)
        return decode_counter(update.new)

    def own_commits(self) -> OwnCommits:
        """`with db.own_commits() as own:` tells which commits this task makes in the block, and those it starts there.

        A plain `with`: see `Store.own_commits`.
        """
        self._refuse_if_over()
        return block_of(self._engine.queue.events)

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
            owner=self._store,
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
                        return await function(txn)
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
            return await self.run(lambda txn: function(txn, *args, **kwargs))

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

        A task that is cancelled here is cancelled when the store is closed.
        """
        if self._commits.closing is None:
            try:
                self._state.refuse_if_gone()
            except ForkedError:
                return  # Nothing here is ours, and the threads are not there.
            except ClosedError:
                pass
            self._workers.refuse_other_loops()
            self._commits.closing = asyncio.ensure_future(self._close())
        _, cancelled = await the_end_of(self._commits.closing)
        if cancelled is not None:
            raise cancelled

    async def _close(self) -> None:
        try:
            await self._committer.drain()
            if self._owner:
                _, cancelled = await to_the_end(self._store.close)
                if cancelled is not None:
                    raise cancelled
        finally:
            self._stop()

    def _stop(self) -> None:
        self._committer.stop()
        super()._stop()



def owning(store: Store, **limits: int) -> AsyncStore:
    """An `AsyncStore` that closes the store beneath when it is closed."""
    result = AsyncStore(store, **limits)
    result._owner = True
    return result
