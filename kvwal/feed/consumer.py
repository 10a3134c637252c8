"""Consumers: named readers of the feed whose positions the store keeps, in rows of table 1.

Rules:
- Effects outside of the store: iterate, and `ack` a batch when it was handled. At least once: what was handled since
  the position was last written is told again after a crash.
- State inside of the store: `project`. One commit holds the writes and the position. Exactly once.
- A position is only written when a commit of a user came since, so an idle store writes nothing.
- What is beyond the stored position is held, until the limits of the consumer or a full disk end that: it is lost then,
  and reading raises FeedGap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from kvwal.calling import refuse_unrun
from kvwal.db.snapshot import Snapshot
from kvwal.db.transaction import Transaction
from kvwal.engine.parked import Parked
from kvwal.errors import ConflictError, Error, FeedGap, FencedError
from kvwal.feed.change import Change
from kvwal.feed.changes import STEP_S, Bootstrap
from kvwal.feed.owned import ATTEMPTS, Batch, RowCommit
from kvwal.feed.parking import ParkingConsumer
from kvwal.feed.quiet import Quiet
from kvwal.positions import Position

__all__ = ["Consumer"]


class Consumer(ParkingConsumer, Iterator[Batch]):
    """A named reader of the feed, whose position the store keeps. Made by `Store.consumer`; use it in a `with` block.

    For one thread at a time, but for `close`, which any may call. Iterating, `ack` and `project` raise FencedError when
    another owner has taken it over, FeedGap when it is lost (see `rebase`), ClosedError when it or the store was
    closed, PoisonedError when it waits for what can never come.
    """

    def __iter__(self) -> Consumer:
        return self

    def __next__(self) -> Batch:
        """The next batch. With `timeout_s` or `heartbeat_s` one without changes, if no change came for so long."""
        before = self._counts()
        try:
            return self._read(self._quiet)
        except BaseException:
            self._return_to(before)
            raise

    def _read(self, quiet: Quiet) -> Batch:
        """The next batch, counted. Where it raises, and where its caller is interrupted, the caller takes that back."""
        quiet.begin()
        while (batch := self._poll()) is None:
            self._commit(self._due())
            left_s = quiet.left_s(STEP_S)
            if left_s <= 0:
                return self._batch((), self._scanned, heartbeat=not quiet.is_over())
            self._wait(left_s)
        quiet.end()
        return batch

    def ack(self, batch: Batch) -> None:
        """The batch, and all before it, was handled.

        Durable on return if `ack_interval_s` has passed since the position was written last; else it is written by a
        later `ack`, while iterating waits, or by `close`. ValueError for a batch that it has not handed out.
        """
        self._acknowledge(batch)
        self._commit(self._due())

    def park(self, batch: Batch, error: Exception) -> None:
        """The batch cannot be handled now: set its commits aside, for `replay_parked`, and go on behind it.

        As `ack`, it says that all before the batch was handled. Durable on return: what is set aside, with the text of
        the error, and the position, in one commit. ValueError, with nothing changed, for a batch that it has not handed
        out, and if more than 1,000 commits would be set aside.
        """
        self._commit(self._set_all_aside(batch, error))

    def project(
        self, function: Callable[[Transaction, Sequence[Change]], object], *, timeout_s: float | None = None
    ) -> Position:
        """Call `function(txn, changes)` for the changes of each batch; one commit holds its writes and the position.

        Exactly once: what it writes is there if and only if the position says that the changes were handled. It may be
        called again for the same changes where its commit conflicts, so it should have no other effect, and must not
        end the transaction. What it raises is stored as `last_error` and raised here; the position stays. With
        on_error="park" the changes are tried commit by commit, and the commits for which it raises again are set aside.

        Args:
            timeout_s: return when no change came for this long; 0: when what is there is handled. None: go on until
                the consumer or the store is closed.

        Returns the position. Raises as iterating does; what the function raises; the last ConflictError after 100;
        TypeError, with nothing handled or set aside, for a function that is `async` or has a `yield`.
        """
        if self._acked < self._delivered:
            self._go_back()
        try:
            quiet = Quiet(timeout_s)
            while (batch := self._read(quiet)).changes:
                self._apply_or_park(function, batch)
        except BaseException:
            self._go_back()
            raise
        self._commit(self._due(at_once=True))
        return self.position

    def replay_parked(self, function: Callable[[Transaction, Sequence[Change]], object]) -> int:
        """Call `function(txn, changes)` again for each commit that `project` has set aside, oldest first.

        One that does not fail any more is set aside no longer, by the commit that has what the function writes.
        Returns how many these were. Raises as `project`, and FeedGap, at the end, if the log does not have one any
        more: begin anew with `rebase`.
        """
        self._refuse_if_closed()
        handled = 0
        gone: FeedGap | None = None
        for parked in self._parked:
            try:
                batch = self._taken_up(parked)
            except FeedGap as gap:
                gone = gap
                continue
            error = self._apply(function, batch, parked)
            if error is None:
                handled += 1
            elif isinstance(error, Error):
                raise error
            else:
                self._commit(self._set_aside_again(parked, error))
        if gone is not None:
            raise gone
        return handled

    def _apply_or_park(self, function: Callable[[Transaction, Sequence[Change]], object], batch: Batch) -> None:
        error = self._apply(function, batch)
        for one in self._singly(batch) if error is not None and self._may_park(error) else ():
            error = self._apply(function, one)
            if error is not None and self._may_park(error):
                self._commit(self._set_aside(one, error))
                error = None
            if error is not None:
                break
        if error is not None:
            self._store_error(error)
            raise error

    def _apply(
        self,
        function: Callable[[Transaction, Sequence[Change]], object],
        batch: Batch,
        parked: Parked | None = None,
    ) -> Exception | None:
        """Commit what the function writes. Returns what it raised."""
        for attempt in range(1, ATTEMPTS + 1):
            txn = Transaction(self._engine, sync=True, read_only=False, owner=self._store)
            try:
                try:
                    result = function(txn, batch.changes)
                except Exception as error:  # noqa: BLE001  # it is stored, or raised
                    return error
                # It would fail so for every change: none is to blame.
                refuse_unrun(result, is_used=False)
                handled = self._handled(txn, batch, parked)
                try:
                    self._commit(handled)
                except ConflictError:
                    if attempt == ATTEMPTS:
                        raise
                    continue
            finally:
                txn.abort()
            break
        return None

    def _store_error(self, error: Exception) -> None:
        try:
            self._commit(self._failed(error))
        except Exception as failure:  # noqa: BLE001  # the first error is the one to be raised
            error.add_note(f"kvwal: it could not be stored: {failure}")

    def _commit(self, commit: RowCommit | None) -> None:
        if commit is not None:
            try:
                self._engine.commit(commit.request)
            finally:
                self._resolve()

    @contextmanager
    def rebase(self) -> Iterator[Snapshot]:
        """`with consumer.rebase() as snapshot:` begins anew after FeedGap: derive everything from the snapshot.

        At the end of the block the position is that of the snapshot, so that no change is missed and none is told
        twice; after an exception the consumer is as it was.
        """
        self._refuse_if_closed()
        with Bootstrap(self._engine, owner=self._store) as base:
            yield base.snapshot
            self._commit(self._rebased(base.snapshot.seqno))

    def close(self) -> None:
        """Write the position, if it is not written yet, and let another owner have it. Idempotent; from any thread.

        What it holds of the log it goes on to hold. FencedError if it was taken over before the position was written.
        """
        if self._token is None:
            return
        try:
            if not self._engine.is_closed:
                self._commit(self._due(at_once=True))
        finally:
            self._let_go()

    def __enter__(self) -> Consumer:
        self._refuse_if_closed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._token is not None and not isinstance(error, FencedError):
            self._store_error(error)
            self._let_go()
        else:
            self.close()
