"""One owner's use of a consumer: what it reads, what it counts, and what is to be committed for it. It never waits.

`kvwal.Consumer` and its counterpart for tasks are made of this: they wait, and commit what is asked for here.

Invariant: a batch covers what follows the batch before it, without a gap. A call that raises, or is interrupted, counts
nothing, and what it read is read again.
Invariant: `_row` is the row as this owner wrote or found it. A row that is not that one any more was written by another
owner, and fences this one; but for a close, to which the row of what this owner has under way is its own too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Final, NamedTuple

from kvwal.batch import WriteBatch
from kvwal.db.handle import Uncopied
from kvwal.db.transaction import Transaction
from kvwal.engine.consumers import ConsumerRow, Owner, RowChange
from kvwal.engine.engine import Engine
from kvwal.engine.lines import fork_of
from kvwal.engine.occ import ReadSet
from kvwal.engine.parked import SYSTEM_TABLE, Parked, parked_key, parked_prefix
from kvwal.engine.request import CommitRequest
from kvwal.errors import FeedGap, FencedError, closed
from kvwal.feed.asked import Asked
from kvwal.feed.change import Change, Filter
from kvwal.feed.changes import Changes, goes_on
from kvwal.feed.claim import begin, claim, release
from kvwal.finalizing import quiet_at_exit
from kvwal.keys import Seqno, prefix_stop
from kvwal.log import Extension, Hold, Record, Run, extension_of
from kvwal.log.extension import CONSUMER
from kvwal.log.record import is_system
from kvwal.positions import Position

__all__ = ["ATTEMPTS", "Batch", "OwnedConsumer", "RowCommit", "text_of"]

# A batch ends with the commit that reaches one of these.
_BATCH_CHANGES: Final = 1000
_BATCH_BYTES: Final = 4 << 20
#: How often a projection is tried that conflicts.
ATTEMPTS: Final = 100


@dataclass(frozen=True, slots=True)
class Batch:
    """Some commits, and what they changed.

    Attributes:
        changes: of whole commits, in their order; those that the filter lets through.
        first: the first commit that it covers: the one after the batch before.
        last: the last one, whether it has changes of it or not. Less than `first` if no commit came.
        heartbeat: it has no changes, and is given because none came for `heartbeat_s`.
    """

    changes: Sequence[Change]
    first: Seqno
    last: Seqno
    heartbeat: bool = False

    @property
    def scanned(self) -> Seqno:
        """The last commit that was looked at, whether a change of it matched or not: what `ack` stores."""
        return self.last


class RowCommit(NamedTuple):
    """A commit of a consumer's row.

    Attributes:
        hold: what holds log for it from then on; None: what did before.
        parked: the commits that are set aside from then on; None: those that were.
        before: one of the same owner that was under way when this was made, and is decided first.
    """

    request: CommitRequest
    operation: RowChange
    hold: Hold | None
    parked: tuple[Parked, ...] | None
    before: RowCommit | None


class _Watch:
    """A filter without a consumer's own commits, and the last commit that is neither one of those nor the system's."""

    __slots__ = ("_own", "_wanted", "last_of_others")

    def __init__(self, wanted: Filter, own: bytes | None) -> None:
        self._wanted = wanted
        # None: its own commits are wanted too.
        self._own = own
        self.last_of_others = Seqno(0)

    def changes(self, record: Record) -> Iterator[Change] | None:
        """What is told of a commit; None if nothing is."""
        if is_system(record) or (self._own is not None and record.extension().get(CONSUMER) == self._own):
            return None
        self.last_of_others = record.seqno
        return self._wanted.changes(record)

    def changes_of(self, run: Run) -> Iterator[Change] | None:
        """The same of each commit of a run."""
        # What a consumer commits itself says so, and is in no run.
        self.last_of_others = run.seqnos[-1]
        return self._wanted.changes_of(run)

    def close(self) -> None:
        """It holds nothing."""


class OwnedConsumer(Uncopied):
    """A consumer while this owner has it. One thread at a time, but for `_let_go` and `_due`."""

    def __init__(self, engine: Engine, asked: Asked, *, owner: object = None) -> None:
        """Become its owner, and make it if there is none. Waits for commits. Raises as `Store.consumer`."""
        self._token: Owner | None = None
        self._engine = engine
        self._store = owner
        #: The name it was asked for.
        self.name = asked.name
        self._wanted = asked.filter
        self._parks = asked.parks
        self._filter = _Watch(asked.filter, None if asked.own else asked.name.encode())
        self._ack_interval_s = asked.ack_interval_s
        self._quiet = asked.quiet
        self._consumers = engine.upkeep.consumers
        self._consumers.log()
        self._changes: Changes | None = None
        self._stored_s = float("-inf")
        # What was asked to be committed last, until it is resolved.
        self._last: RowCommit | None = None
        token = Owner(asked.thread, Seqno(0), time.monotonic())
        before: Owner | None = None
        try:
            before = claim(engine, asked, token)
            self._row = begin(engine, asked, taken=before is not None)
            self._parked = tuple(self._consumers.parked.of(asked.name))
            self._consumers.parked.hold(asked.name, self._parked, self._row.limits)
            # The last commit that was looked at, that the last batch covers, of the last batch with changes, and that
            # was acknowledged.
            self._scanned = self._covered = self._delivered = self._acked = token.scanned = self._row.position
        except BaseException:
            release(self._consumers, self.name, token, before)
            raise
        self._token = token

    # -- reading ------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """The last commit that was handled, as it is stored: where the consumer goes on after a crash."""
        return Position(self._row.line, self._row.position)

    @property
    def alive(self) -> bool:
        """Whether it goes on: there are commits that it has not looked at, or more may come. From any thread."""
        token = self._token
        return (
            token is not None
            and not self._engine.is_closed
            and self._consumers.owners.get(self.name) is token
            and self._consumers.hold(self.name) is not None
            and goes_on(self._engine, self._consumers.log().read(self._scanned, purpose=None))
        )

    @property
    def last_poll_s(self) -> float | None:
        """How long ago it asked for commits, in seconds; None once it is closed. Waiting, it asks all the time."""
        token = self._token
        return None if token is None else time.monotonic() - token.polled_s

    def _poll(self) -> Batch | None:
        """The next batch, counted, if there are changes. None: what is there was passed over, and may be due.

        Where it raises, and where its caller is interrupted, the caller takes that back (`_return_to`).
        """
        self._refuse_if_over()
        feed = self._feed()
        token = self._token
        if token is not None:
            token.polled_s = time.monotonic()
        changes = self._collect(feed)
        if changes:
            return self._batch(changes, feed.position.seqno)
        if self._delivered <= self._acked:
            # There is nothing to acknowledge, so it is as if that was done.
            self._acked = max(self._acked, feed.position.seqno)
        self._scanned = feed.position.seqno
        if token is not None:
            token.scanned = feed.position.seqno
        return None

    def _batch(self, changes: tuple[Change, ...], position: Seqno, *, heartbeat: bool = False) -> Batch:
        """A batch that ends at the position, counted."""
        batch = Batch(changes, Seqno(self._covered + 1), position, heartbeat)
        self._scanned = self._covered = position
        if changes:
            self._delivered = position
        return batch

    def _collect(self, feed: Changes) -> tuple[Change, ...]:
        """The changes of some commits that are there."""
        changes: list[Change] = []
        size = 0
        try:
            while (change := feed.poll()) is not None:
                changes.append(change)
                size += len(change.key) + len(change.value or b"")
                if change.last and (len(changes) >= _BATCH_CHANGES or size >= _BATCH_BYTES):
                    break
        except Exception:
            self._refuse_if_over()
            raise
        return tuple(changes)

    def _wait(self, timeout_s: float) -> None:
        """Wait a little for what comes."""
        try:
            self._feed().wait(max(0.0, timeout_s))
        except Exception:
            # Most often it is closed, taken over or lost.
            self._refuse_if_over()
            raise

    def _when_ready(self, wake: Callable[[], object]) -> Callable[[], object]:
        """As `Changes.when_ready`."""
        try:
            return self._feed().when_ready(wake)
        except Exception:
            self._refuse_if_over()
            raise

    def _feed(self) -> Changes:
        """What it reads: it goes on behind what was looked at."""
        feed = self._changes
        if feed is None:
            cursor = self._consumers.log().read(self._scanned, purpose=None)
            feed = self._changes = Changes(
                self._engine, None, self._filter, follow=True, owner=self._store, cursor=cursor
            )
        return feed

    def _counts(self) -> tuple[Seqno, Seqno, Seqno]:
        self._resolve()
        return self._scanned, self._covered, self._delivered

    def _return_to(self, counts: tuple[Seqno, Seqno, Seqno]) -> None:
        """What was counted since then was not handed out: it is read again."""
        self._scanned, self._covered, self._delivered = counts
        self._quiet.end()
        self._rewind()

    def _rewind(self) -> None:
        feed, self._changes = self._changes, None
        if feed is not None:
            feed.close()

    def _go_back(self) -> None:
        """What was handed out and not acknowledged comes again."""
        self._return_to((self._acked, self._acked, self._acked))

    def _refuse_if_over(self) -> None:
        """Raise why it cannot be read on, if that is so."""
        self._refuse_if_closed()
        row, own = self._row, self._consumers.line
        forked_at = None if row.line == own else fork_of(self._engine.reads, own, row.line) or 0
        is_beyond = forked_at is not None and row.position > forked_at
        if self._consumers.hold(self.name) is None or is_beyond:
            log = self._consumers.log()
            oldest = log.segments()[0].first_seqno
            lost = oldest - 1 - row.position
            # What is still there may go at any time.
            after = max(oldest, row.position + 1)
            asked = Position(row.line, row.position)
            if is_beyond:
                raise FeedGap(asked, oldest, log.last_seqno, forked_at=forked_at)
            raise FeedGap(asked, after, log.last_seqno, lost_commits=max(0, lost) or None)

    def _refuse_if_closed(self) -> None:
        self._engine.state.refuse_if_gone()
        token = self._token
        if token is None:
            raise closed("consumer")
        if self._consumers.owners.get(self.name) is not token:
            raise FencedError(self.name)
        self._resolve()

    # -- what is to be committed --------------------------------------------------------------

    def _refuse_foreign(self, batch: Batch) -> None:
        """ValueError for a batch that it has not handed out."""
        self._refuse_if_closed()
        if batch.last > self._covered:
            raise ValueError(f"commit {batch.last} is beyond {self._covered}, the last one that was handed out")

    def _acknowledge(self, batch: Batch) -> None:
        """Count it as handled. ValueError for a batch that it has not handed out."""
        self._refuse_foreign(batch)
        self._acked = max(self._acked, batch.last)

    def _due(self, *, at_once: bool = False) -> RowCommit | None:
        """The position, if it is to be written now."""
        self._resolve()
        # Beside a close. First: once it is resolved, its row is that of this owner.
        before = self._last
        stored, acked = self._row.position, self._acked
        if acked <= stored or self._filter.last_of_others <= stored:
            # Only what consumers and the store itself have committed came since: that is no reason to commit more.
            return None
        if not at_once and time.monotonic() - self._stored_s < self._ack_interval_s:
            return None
        return self._change(
            # What was under way may have said it.
            lambda row: row if acked <= row.position else changed(row, position=acked, last_error=""),
            before=None if before is None else before._replace(before=None),
        )

    def _handled(self, txn: Transaction, batch: Batch, parked: Parked | None = None) -> RowCommit:
        """What a projection has written for a batch, and the position; or that it is no longer set aside."""
        written = txn.request()
        writes, reads, own = WriteBatch(), None, None
        if written is not None:
            writes, reads = written.writes.batch, written.reads
            own = {**(extension_of(txn.meta) or {}), CONSUMER: self.name.encode()}
        if parked is None:
            last = batch.last
            return self._change(lambda row: changed(row, position=last, last_error=""), writes, reads, own)
        writes.table(SYSTEM_TABLE).delete(parked_key(self.name, parked.seqno))
        left = tuple(each for each in self._parked if each.seqno != parked.seqno)
        return self._change(lambda row: row, writes, reads, own, parked=left)

    def _failed(self, error: Exception) -> RowCommit | None:
        """Why it does not go on, unless the row says so; the position is what was acknowledged."""
        self._resolve()
        text, acked = text_of(error), self._acked
        if text == self._row.last_error and acked == self._row.position:
            return None
        return self._change(lambda row: changed(row, position=max(row.position, acked), last_error=text))

    def _rebased(self, position: Seqno) -> RowCommit:
        """The position of a snapshot, from which everything was derived anew."""
        hold = self._consumers.begin_hold(self.name, position, self._row.limits)
        # The snapshot has what was set aside, too.
        rows, prefix = WriteBatch(), parked_prefix(self.name)
        if self._parked:
            rows.table(SYSTEM_TABLE).delete_range(prefix, prefix_stop(prefix))
        return self._change(lambda row: changed(row, position=position, last_error=""), rows, hold=hold, parked=())

    def _change(
        self,
        change: Callable[[ConsumerRow], ConsumerRow],
        batch: WriteBatch | None = None,
        reads: ReadSet | None = None,
        extension: Extension | None = None,
        hold: Hold | None = None,
        parked: tuple[Parked, ...] | None = None,
        before: RowCommit | None = None,
    ) -> RowCommit:
        """The row, if it is as it was left or as `before` leaves it, and what else is given."""
        self._resolve()
        expected, own = self._row, self._consumers.line

        def fenced(row: ConsumerRow | None) -> ConsumerRow | None:
            written = None if before is None else before.operation.row
            own_rows = [(each.epoch, each.position) for each in (expected, written) if each is not None]
            if row is None or (row.epoch, row.position) not in own_rows:
                raise FencedError(self.name)
            made = change(row)
            # A position of before a restore is on the line that the store had then.
            return made if made.position == row.position else changed(made, line=own)

        operation = RowChange(self.name, fenced, batch, extension)
        request = CommitRequest(sync=True, reads=reads, operation=operation)
        self._last = commit = RowCommit(request, operation, hold, parked, before)
        return commit

    def _resolve(self) -> None:
        """Take over what was committed last, if it was. Harmless when done again: a call may be interrupted in it."""
        commit = self._last
        if commit is None:
            return
        if commit.before is not None:
            self._take_over(commit.before)
        # Another thread may have made another one meanwhile.
        if self._take_over(commit) and self._last is commit:
            self._last = None

    def _take_over(self, commit: RowCommit) -> bool:
        """Have what it made, if it was made. Whether it was."""
        row = commit.operation.row
        # Durability: it has a seqno only when it was flushed.
        if not commit.request.seqno or row is None:
            return False
        self._row = row
        self._acked = max(self._acked, row.position)
        # Invariant: what is up to the stored position is not read again. An interruption may have come before this.
        self._scanned = max(self._scanned, row.position)
        self._stored_s = time.monotonic()
        if commit.parked is not None and commit.parked != self._parked:
            # Durability: held before the position lets it go.
            self._consumers.parked.hold(self.name, commit.parked, row.limits)
            self._parked = commit.parked
        if commit.hold is not None:
            self._consumers.keep_hold(self.name, commit.hold)
            self._go_back()
        else:
            held = self._consumers.hold(self.name)
            if held is not None:
                held.advance(row.position)
        return True

    # -- the end ------------------------------------------------------------------------------

    def _let_go(self) -> None:
        token, self._token = self._token, None
        self._rewind()
        if token is not None:
            release(self._consumers, self.name, token)

    @quiet_at_exit
    def __del__(self) -> None:
        token = getattr(self, "_token", None)
        if token is not None:
            release(self._consumers, self.name, token)

    def __repr__(self) -> str:
        closed_ = " (closed)" if self._token is None else ""
        return f"<{type(self).__name__} {self.name!r} after commit {self._row.position}{closed_}>"


def text_of(error: Exception) -> str:
    """As it is stored."""
    return f"{type(error).__name__}: {error}"
