"""The store: what a user holds. Each method is a few lines over the engine, or a transaction."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Concatenate, ParamSpec, TypeVar

from kvwal.api.fairness import Tickets
from kvwal.api.naming import Naming
from kvwal.api.remembering import Remembering
from kvwal.api.writing import Writing
from kvwal.backup.making import BackupReport, BaseKind, backup
from kvwal.backup.port import Where, destination_at
from kvwal.calling import refuse_unrun
from kvwal.db.transaction import Transaction
from kvwal.engine.engine import Engine
from kvwal.engine.recovery import RecoveryReport
from kvwal.engine.stats import Pin, Stats
from kvwal.engine.verify import VerifyReport
from kvwal.errors import ConflictError
from kvwal.feed.line import durable_now, position_at
from kvwal.feed.pins import pins
from kvwal.keys import Seqno, as_int
from kvwal.options import Durability
from kvwal.positions import Position

__all__ = ["Store"]

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Store(Naming, Writing, Remembering):
    """An open store: an ordered, transactional, durable map from bytes to bytes. Made by `kvwal.open`.

    Thread-safe, every method. Reads never wait for writers. Each write is a commit of its own, durable on return as
    the store's durability says; several writes that belong together go into `batch`, `update` or `transaction`. After
    a failed write or flush all writes raise `PoisonedError` until the store is reopened, and reads go on. In a forked
    child every method raises `ForkedError`, and so do feeds; what is only kept in memory (`last_seqno`,
    `durable_seqno`, `position`, `recovery`, `path`, `closed`) is as it was at the fork. A signal handler or a finalizer
    may call any method; where it interrupted another call of this store at a moment that forbids it, it gets
    `ReentrancyError`.
    """

    def __init__(self, engine: Engine) -> None:
        # `engine` is what the asyncio store and the other surfaces share with this one.
        super().__init__(engine)
        self._tickets = Tickets()

    # -- about it -----------------------------------------------------------------------------

    @property
    def read_only(self) -> bool:
        """Whether it was opened with flag "r"."""
        return self.engine.upkeep.is_read_only

    @property
    def recovery(self) -> RecoveryReport:
        """What opening found and did."""
        return self.engine.upkeep.recovery

    @property
    def last_seqno(self) -> Seqno:
        """The last commit that readers see."""
        return self._state.seqno

    @property
    def durable_seqno(self) -> Seqno:
        """The last commit known to be on disk."""
        return self.engine.upkeep.durable_seqno

    @property
    def position(self) -> Position:
        """The last commit that is on disk and seen by reads, with its line: what a feed goes on after."""
        return position_at(self.engine, durable_now(self.engine))

    def __repr__(self) -> str:
        state = "closed" if self.closed else "read-only" if self.read_only else "open"
        return f"<kvwal.Store {self.path!r}, {state}, seqno {self._state.seqno}>"

    # -- transactions -------------------------------------------------------------------------

    def transaction(
        self,
        *,
        read_only: bool = False,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> Transaction:
        """Begin a serializable transaction. `with db.transaction() as txn:` commits on clean exit.

        `meta` is kept with its commit, as in `put`; `txn.meta = ...` says it, or something else, later.
        The commit raises `ConflictError` if something that was read has changed meanwhile; `run` retries for you.
        """
        return Transaction(
            self.engine,
            sync=self.engine.wants_sync(durability),
            read_only=read_only or self.engine.upkeep.is_read_only,
            meta=meta,
            owner=self,
        )

    def run(
        self,
        function: Callable[[Transaction], _T],
        *,
        attempts: int = 100,
        durability: Durability | None = None,
        meta: Mapping[str, str] | None = None,
    ) -> _T:
        """Call `function(txn)` in a transaction and commit; on a conflict, again, up to `attempts` times.

        The function may therefore run more than once: it should have no effect but on the transaction. Returns what
        it returned. Raises the last `ConflictError` when the attempts are used up.
        """
        attempts = as_int("attempts", attempts, 1)
        with self._tickets.call() as call:
            for attempt in range(1, attempts + 1):
                call.begin(attempt)
                try:
                    with self.transaction(durability=durability, meta=meta) as txn:
                        result = function(txn)
                        refuse_unrun(result)
                        return result
                except ConflictError:
                    if attempt == attempts:
                        raise
        raise AssertionError("unreachable")

    def transactional(
        self, function: Callable[Concatenate[Transaction, _P], _T]
    ) -> Callable[_P, _T]:
        """Decorator: `@db.transactional def transfer(txn, ...)` makes `transfer(...)` run as `run` does."""

        @functools.wraps(function)
        def in_transaction(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            return self.run(lambda txn: function(txn, *args, **kwargs))

        return in_transaction

    # -- upkeep -------------------------------------------------------------------------------

    def sync(self) -> None:
        """Make every commit so far durable, whatever durability it was made with."""
        self.engine.upkeep.sync()

    def checkpoint(self) -> None:
        """Bring every commit so far into the page file and let go of the log that is no longer needed.

        It happens by itself in the background; call it to choose the moment. Raises DiskFullError if there is no space
        (nothing is lost, and it may be tried again).
        """
        self.engine.upkeep.checkpoint()

    def compact(self) -> int:
        """Give the space of deleted and replaced data back to the system; returns the bytes the file shrank by.

        It happens by itself, bit by bit with checkpoints and when nothing is committed for a second; call it to have
        it done now. It brings every commit into the page file first, which may let the file grow; then the result is
        negative. Reads and commits go on meanwhile; pages that a snapshot or transaction holds stay. Gaps that are
        shorter than the values behind them may stay as well: where values of many pages lie, another call may give
        back a little more, even after one that returned 0. Raises DiskFullError if there is no space to move anything.
        """
        return self.engine.upkeep.compact()

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read every page and every record and prove them: checksums, order, counts, every page reachable xor free,
        the log against the pages. Checkpoints wait meanwhile, commits go on.

        Returns a report; `report.ok` is True when nothing is wrong. `progress(done, total)` is called with bytes.
        """
        return self.engine.upkeep.verify(progress)

    def backup(
        self,
        dest: Where,
        *,
        base: BaseKind = "auto",
        history: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> BackupReport:
        """Put the store as it is now into a destination, from which `kvwal.restore` makes a store again.

        Reads and commits go on meanwhile. What is put is the last commit that was durable when it began. Of pages that
        an earlier backup to the same destination has, nothing is written again, and hardly any are read.

        Args:
            dest: a path to a directory on another disk, which is made if need be; or an object with the calls of a
                destination (`kvwal.backup.port.Destination`). It is for one store, and for those restored from it.
            base: "auto": the pages as a difference, where there is a base to build on; "full": all pages.
            history: also every moment of the window (`window`).
            progress: called with the bytes of pages that are put, and those of all.

        Durable on return, and each object is there whole or not at all: one that was cut off is done again.

        Raises:
            CorruptionError: a page is damaged, and is named; it is not copied. Or an object came back with other bytes
                than were put, and was removed from the destination.
            BackupDestinationError: the destination belongs to another store, or cannot be used.
            ArchiveDiverged: the destination has commits of this line that the store does not have: one of them is a
                copy that went on by itself. ForkDiverged: it has another commit where the line of this store began.
            DiskFullError: there is no space in the destination: free some, and call it again. SystemCallError: writing
                failed. ClosedError, ForkedError. TypeError, ValueError.

        Cost: O(pages that changed), and O(all pages) for the first one.
        """
        return backup(self.engine, destination_at(dest), base=base, history=history, progress=progress)

    def stats(self) -> Stats:
        """Figures about memory, pages and log. Cheap."""
        return self.engine.upkeep.stats()

    def pins(self) -> list[Pin]:
        """What holds old moments of the store, how much, and since when: snapshots, transactions and scans, the window,
        consumers, and what else reads the log.
        """
        return pins(self.engine)

    # -- ending -------------------------------------------------------------------------------

    def close(self) -> None:
        """Flush, checkpoint if the log's tail is long, and let go of everything. Idempotent.

        After a failed write or flush that a call was told of it only lets go: opening again recovers. Snapshots and
        transactions of this store raise `ClosedError` from here on; transactions that are open are aborted. In a signal
        handler (or a finalizer) that interrupted another call of this store it refuses new calls and returns at once;
        another thread closes the store when the interrupted call is over.

        Raises:
            PoisonedError: commits that were acknowledged at "os" or "interval" may be lost, since a flush failed: its
                own, or one in the background that no call was told of. The store is closed all the same.
        """
        self.engine.close()
