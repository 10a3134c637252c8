"""Consumers for tasks: a worker reads, the flush that makes more durable wakes the loop, and commits ride with others.

Invariant: a call that raises, or is cancelled, counts nothing; what a worker has read by then is read again.
"""

from __future__ import annotations

from asyncio import Lock
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from inspect import isawaitable
from types import TracebackType

from kvwal.aio.changes import wait_until_ready
from kvwal.aio.committer import Committer
from kvwal.aio.snapshot import AsyncSnapshot
from kvwal.aio.transaction import AsyncTransaction
from kvwal.aio.workers import Workers, to_the_end
from kvwal.calling import refuse_plain
from kvwal.db.transaction import Transaction
from kvwal.engine.engine import Engine
from kvwal.engine.parked import Parked
from kvwal.errors import ClosedError, ConflictError, Error, FeedGap, FencedError
from kvwal.feed.asked import Asked
from kvwal.feed.change import Change
from kvwal.feed.changes import STEP_S, Bootstrap
from kvwal.feed.owned import ATTEMPTS, Batch, RowCommit
from kvwal.feed.parking import ParkingConsumer
from kvwal.feed.quiet import Quiet
from kvwal.positions import Position

__all__ = ["AsyncConsumer"]


class AsyncConsumer(ParkingConsumer, AsyncIterator[Batch]):
    """A named reader of the feed, whose position the store keeps. Made by `AsyncStore.consumer`; see `kvwal.Consumer`.

    One task at a time, but for `close`. A task that is cancelled while it waits for a batch has been given none: the
    next call gives what it would have got.
    """

    def __init__(
        self,
        engine: Engine,
        asked: Asked,
        committer: Committer,
        workers: Workers,
        refuse_if_over: Callable[[], None],
        *,
        owner: object = None,
    ) -> None:
        """In a thread, since it waits for commits. `refuse_if_over`: asked before a worker or the committer is."""
        self._committer = committer
        self._workers = workers
        self._refuse_if_store_is_over = refuse_if_over
        self._running = False
        # Of the task that closes it.
        self._ending = Lock()
        super().__init__(engine, asked, owner=owner)

    def __aiter__(self) -> AsyncConsumer:
        return self

    async def __anext__(self) -> Batch:
        """The next batch. With `timeout_s` or `heartbeat_s` one without changes, if no change came for so long."""
        with self._one_task():
            before = self._counts()
            try:
                return await self._read(self._quiet)
            except BaseException:
                self._return_to(before)
                raise

    async def _read(self, quiet: Quiet) -> Batch:
        """The next batch, counted. Where it raises, its caller takes that back."""
        quiet.begin()
        while True:
            self._refuse_if_store_is_over()
            # To its end, so that nothing is counted any more once it is taken back.
            batch, cancelled = await self._workers.to_the_end(self._poll)
            if cancelled is not None:
                raise cancelled
            if batch is not None:
                quiet.end()
                return batch
            await self._commit(self._due())
            left_s = quiet.left_s(STEP_S)
            if left_s <= 0:
                return self._batch((), self._scanned, heartbeat=not quiet.is_over())
            await wait_until_ready(self._when_ready, left_s)

    async def ack(self, batch: Batch) -> None:
        """The batch, and all before it, was handled. See `Consumer.ack`."""
        with self._one_task():
            self._acknowledge(batch)
            await self._commit(self._due())

    async def park(self, batch: Batch, error: Exception) -> None:
        """The batch cannot be handled now: set its commits aside, and go on behind it. See `Consumer.park`."""
        with self._one_task():
            await self._commit(self._set_all_aside(batch, error))

    async def project(
        self,
        function: Callable[[AsyncTransaction, Sequence[Change]], Awaitable[object]],
        *,
        timeout_s: float | None = None,
    ) -> Position:
        """Await `function(txn, changes)` for the changes of each batch; one commit holds its writes and the position.

        Exactly once, as `Consumer.project`. If the task is cancelled while a commit is under way, it first waits for
        its end; the position says what was committed.
        """
        with self._one_task():
            if self._acked < self._delivered:
                self._go_back()
            try:
                quiet = Quiet(timeout_s)
                while (batch := await self._read(quiet)).changes:
                    await self._apply_or_park(function, batch)
            except BaseException:
                self._go_back()
                raise
            await self._commit(self._due(at_once=True))
            return self.position

    async def replay_parked(
        self, function: Callable[[AsyncTransaction, Sequence[Change]], Awaitable[object]]
    ) -> int:
        """Await `function(txn, changes)` again for each commit that is set aside. See `Consumer.replay_parked`."""
        with self._one_task():
            self._refuse_if_closed()
            handled = 0
            gone: FeedGap | None = None
            for parked in self._parked:
                try:
                    batch, cancelled = await self._workers.to_the_end(self._taken_up, parked)
                except FeedGap as gap:
                    gone = gap
                    continue
                if cancelled is not None:
                    raise cancelled
                error = await self._apply(function, batch, parked)
                if error is None:
                    handled += 1
                elif isinstance(error, Error):
                    raise error
                else:
                    await self._commit(self._set_aside_again(parked, error))
            if gone is not None:
                raise gone
            return handled

    async def _apply_or_park(
        self, function: Callable[[AsyncTransaction, Sequence[Change]], Awaitable[object]], batch: Batch
    ) -> None:
        error = await self._apply(function, batch)
        for one in self._singly(batch) if error is not None and self._may_park(error) else ():
            error = await self._apply(function, one)
            if error is not None and self._may_park(error):
                await self._commit(self._set_aside(one, error))
                error = None
            if error is not None:
                break
        if error is not None:
            await self._store_error(error)
            raise error

    async def _apply(
        self,
        function: Callable[[AsyncTransaction, Sequence[Change]], Awaitable[object]],
        batch: Batch,
        parked: Parked | None = None,
    ) -> Exception | None:
        """Commit what the function writes. Returns what it raised."""
        for attempt in range(1, ATTEMPTS + 1):
            txn = Transaction(self._engine, sync=True, read_only=False, owner=self._store)
            try:
                try:
                    result = function(
                        AsyncTransaction(txn, self._engine.reads, self._committer, self._workers), batch.changes
                    )
                    if isawaitable(result):
                        await result
                except Exception as error:  # noqa: BLE001  # it is stored, or raised
                    return error
                # It would fail so for every change: none is to blame.
                refuse_plain(function, result)
                handled = self._handled(txn, batch, parked)
                try:
                    await self._commit(handled)
                except ConflictError:
                    if attempt == ATTEMPTS:
                        raise
                    continue
            finally:
                txn.abort()
            break
        return None

    async def _store_error(self, error: Exception) -> None:
        try:
            await self._commit(self._failed(error))
        except Exception as failure:  # noqa: BLE001  # the first error is the one to be raised
            error.add_note(f"kvwal: it could not be stored: {failure}")

    async def _commit(self, commit: RowCommit | None) -> None:
        if commit is not None:
            self._refuse_if_store_is_over()
            try:
                await self._committer.commit(commit.request)
            finally:
                self._resolve()

    @asynccontextmanager
    async def rebase(self) -> AsyncIterator[AsyncSnapshot]:
        """`async with consumer.rebase() as snapshot:` begins anew after FeedGap. See `Consumer.rebase`."""
        with self._one_task():
            self._refuse_if_closed()
            base, cancelled = await to_the_end(Bootstrap, self._engine, owner=self._store)
            with base:
                if cancelled is not None:
                    raise cancelled
                yield AsyncSnapshot(base.snapshot, self._engine.reads, self._workers)
                await self._commit(self._rebased(base.snapshot.seqno))

    @contextmanager
    def _one_task(self) -> Iterator[None]:
        self._refuse_if_store_is_over()
        if self._running:
            raise RuntimeError("this consumer is being used by another task; one task at a time may")
        self._running = True
        try:
            yield
        finally:
            self._running = False

    async def close(self) -> None:
        """Write the position, if it is not written yet, and let another owner have it. Idempotent; from any task.

        What it holds of the log it goes on to hold. FencedError if it was taken over before the position was written.
        Where another task is at it, it waits for the end of that.
        """
        await self._end(None)

    async def _end(self, error: BaseException | None) -> None:
        """Write the position, or what ended its block, and let go."""
        async with self._ending:
            if self._token is None:
                return
            try:
                if isinstance(error, Exception) and not isinstance(error, FencedError):
                    await self._store_error(error)
                else:
                    # Once the store is closed, nothing is written any more.
                    with suppress(ClosedError):
                        await self._commit(self._due(at_once=True))
            finally:
                self._let_go()

    async def __aenter__(self) -> AsyncConsumer:
        self._refuse_if_closed()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end(error)
