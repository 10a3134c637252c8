"""Consumers: named readers of the feed whose positions the store keeps, in rows of table 1.

Rules:
- Effects outside of the store: iterate, and `ack` a batch when it was handled. At least once: what was handled since
  the position was last written is told again after a crash.
- State inside of the store: `project`. One commit holds the writes and the position. Exactly once.
- A position is only written when a commit of a user came since, so an idle store writes nothing.
- What is beyond the stored position is held, until the limits of the consumer or a full disk end that: it is lost then,
  and reading raises FeedGap.

Invariant: a batch covers what follows the batch before it, without a gap. A call that raises, or is interrupted, counts
nothing, and what it read is read again.
Invariant: `_row` is the row as this owner wrote or found it. A row that is not that one any more was written by another
owner, and fences this one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from types import TracebackType
from typing import Final, Literal, TypeAlias

from kvwal.batch import WriteBatch
from kvwal.db.snapshot import Snapshot
from kvwal.db.transaction import Transaction
from kvwal.engine.consumers import MAX_NAME_BYTES, ConsumerRow, Owner, RowChange
from kvwal.engine.engine import Engine
from kvwal.engine.occ import ReadSet
from kvwal.engine.request import CommitRequest
from kvwal.errors import ConflictError, ConsumerExistsError, FeedGap, FencedError, LockedError, closed
from kvwal.feed.change import Change, Filter
from kvwal.feed.changes import STEP_S, Bootstrap, Changes
from kvwal.files import process_id
from kvwal.keys import Seqno, as_int
from kvwal.log import Extension, Hold, Limits, Record, extension_of
from kvwal.log.extension import CONSUMER

__all__ = ["Batch", "Consumer", "LimitsWanted", "Start", "remove_consumer"]

Start: TypeAlias = Literal["now", "oldest"] | int
"""Where a new consumer begins: with what comes, with what the log has, or after a commit."""

# A batch ends with the commit that reaches one of these.
_BATCH_CHANGES: Final = 1000
_BATCH_BYTES: Final = 4 << 20
# How often a projection is tried that conflicts.
_ATTEMPTS: Final = 100
# Of a limit.
_MOST: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Batch:
    """Some commits, and what they changed.

    Attributes:
        changes: of whole commits, in their order; those that the filter lets through.
        first: the first commit that it covers: the one after the batch before.
        last: the last one, whether it has changes of it or not. Less than `first` if no commit came.
    """

    changes: Sequence[Change]
    first: Seqno
    last: Seqno

    @property
    def scanned(self) -> Seqno:
        """The last commit that was looked at, whether a change of it matched or not: what `ack` stores."""
        return self.last


class LimitsWanted:
    """The limits that a call asks for; "default" leaves one as it is."""

    def __init__(
        self, max_bytes: int | Literal["default"] | None, max_s: float | Literal["default"] | None
    ) -> None:
        """TypeError or ValueError for what is no limit."""
        self._max_bytes = max_bytes
        if max_bytes is not None and max_bytes != "default":
            self._max_bytes = as_int("max_lag_bytes", max_bytes, 0, _MOST)
        self._max_us: int | Literal["default"] | None = None
        if max_s == "default":
            self._max_us = max_s
        elif max_s is not None:
            if not max_s >= 0:
                raise ValueError(f"max_lag_s is {max_s}; it is at least 0")
            self._max_us = int(min(max_s * 1e6, _MOST))

    def over(self, limits: Limits) -> Limits:
        """The limits with those that are asked for."""
        return Limits(
            limits.max_bytes if self._max_bytes == "default" else self._max_bytes,
            limits.max_us if self._max_us == "default" else self._max_us,
        )


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
        if record.is_system or (self._own is not None and record.extension().get(CONSUMER) == self._own):
            return None
        self.last_of_others = record.seqno
        return self._wanted.changes(record)


class Consumer(Iterator[Batch]):
    """A named reader of the feed, whose position the store keeps. Made by `Store.consumer`; use it in a `with` block.

    For one thread at a time, but for `close`, which any may call. Iterating, `ack` and `project` raise FencedError when
    another owner has taken it over, FeedGap when it is lost (see `rebase`), ClosedError when it or the store was
    closed, PoisonedError when it waits for what can never come.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        wanted: Filter,
        *,
        start: Start,
        limits: LimitsWanted,
        own: bool,
        replace: bool,
        steal: bool,
        ack_interval_s: float,
        timeout_s: float | None,
        owner: object = None,
    ) -> None:
        """Raises as `Store.consumer`."""
        self._token: Owner | None = None
        if not isinstance(name, str):
            raise TypeError(f"a consumer's name is a str, not {type(name).__name__}")
        if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"a consumer's name takes 1 to {MAX_NAME_BYTES} bytes in UTF-8, not {len(name.encode())}")
        for setting, seconds in (("ack_interval_s", ack_interval_s), ("timeout_s", timeout_s)):
            if seconds is not None and not seconds >= 0:
                raise ValueError(f"{setting} is {seconds}; it is at least 0")
        self._engine = engine
        self._store = owner
        #: The name it was asked for.
        self.name = name
        self._filter = _Watch(wanted, None if own else name.encode())
        self._ack_interval_s = ack_interval_s
        self._timeout_s = timeout_s
        self._consumers = engine.upkeep.consumers
        self._consumers.log()
        self._changes: Changes | None = None
        self._stored_s = float("-inf")
        token = Owner(threading.current_thread().name, Seqno(0))
        before: Owner | None = None
        try:
            before = self._claim(token, steal=steal)
            taken = before is not None
            self._row = self._found(wanted.digest(), limits, replace=replace, taken=taken) or self._created(
                start, wanted.digest(), limits
            )
            # The last commit that was looked at, that the last batch covers, of the last batch with changes, and that
            # was acknowledged.
            self._scanned = self._covered = self._delivered = self._acked = token.scanned = self._row.position
        except BaseException:
            self._release(token, before)
            raise
        self._token = token

    # -- how one begins -----------------------------------------------------------------------

    def _claim(self, token: Owner, *, steal: bool) -> Owner | None:
        """Become the owner. Returns the one until now."""
        owners = self._consumers.owners
        owner = owners.setdefault(self.name, token)
        if owner is token:
            return None
        if not steal:
            raise _in_use(self._engine, self.name, owner)
        owners[self.name] = token
        return owner

    def _release(self, token: Owner, to: Owner | None = None) -> None:
        """Be the owner no more; `to`: give it back."""
        owners = self._consumers.owners
        if owners.get(self.name) is token:
            if to is not None:
                owners[self.name] = to
            else:
                owners.pop(self.name, None)

    def _found(
        self, filter_hash: bytes, limits: LimitsWanted, *, replace: bool, taken: bool
    ) -> ConsumerRow | None:
        """The row of the consumer as it is from here on; None if there is none."""

        def change(old: ConsumerRow | None) -> ConsumerRow | None:
            if old is None:
                return None
            if old.filter_hash != filter_hash and not replace:
                raise ConsumerExistsError(self.name)
            return changed(old, epoch=old.epoch + taken, limits=limits.over(old.limits), filter_hash=filter_hash)

        row = self._consumers.row(self.name)
        if row is None or (change(row) == row and not taken):
            return row
        # Asked of the leader, since the owner before may be committing.
        operation = RowChange(self.name, change)
        self._engine.commit(CommitRequest(sync=True, operation=operation))
        if operation.row is not None and operation.row.limits != row.limits:
            # If it is lost, it stays so.
            with suppress(FeedGap):
                hold = self._consumers.begin_hold(self.name, operation.row.position, operation.row.limits)
                self._consumers.keep_hold(self.name, hold)
        return operation.row

    def _created(self, start: Start, filter_hash: bytes, wanted: LimitsWanted) -> ConsumerRow:
        """A new row, stored before anything is handed out, and its hold."""
        consumers, engine = self._consumers, self._engine
        limits = wanted.over(consumers.default_limits())
        hold: Hold | None = None
        while hold is None:
            after = engine.state.seqno if start == "now" else None if start == "oldest" else Seqno(start)
            try:
                hold = consumers.begin_hold(self.name, after, limits)
            except FeedGap:
                # Of "now": two checkpoints came in between.
                if start != "now":
                    raise
        now_us = engine.reads.moments.now_us()
        row = ConsumerRow(self.name, consumers.line, hold.after, 1, now_us, limits, filter_hash)
        request = CommitRequest(sync=True, operation=RowChange(self.name, lambda old: row))
        try:
            # Durability: flushed, and with it the commit that the position names.
            engine.commit(request)
        finally:
            if request.seqno:
                consumers.keep_hold(self.name, hold)
        return row

    # -- reading ------------------------------------------------------------------------------

    @property
    def position(self) -> Seqno:
        """The last commit that was handled, as it is stored: where the consumer goes on after a crash."""
        return self._row.position

    @property
    def alive(self) -> bool:
        """Whether iterating would wait for commits, and not raise."""
        token = self._token
        return (
            token is not None
            and not self._engine.is_closed
            and self._consumers.owners.get(self.name) is token
            and self._consumers.hold(self.name) is not None
        )

    def __iter__(self) -> Consumer:
        return self

    def __next__(self) -> Batch:
        """The next batch. With `timeout_s` one without changes, if no change came for so long."""
        before = self._scanned, self._covered, self._delivered
        try:
            return self._read(self._timeout_s)
        except BaseException:
            self._scanned, self._covered, self._delivered = before
            self._rewind()
            raise

    def _read(self, timeout_s: float | None) -> Batch:
        """The next batch, counted. Where it raises, and where its caller is interrupted, the caller takes that back."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            self._refuse_if_over()
            feed = self._feed()
            changes = self._collect(feed)
            if not changes:
                self._pass_over(feed.position)
                if deadline_s is None or time.monotonic() < deadline_s:
                    changes = self._collect(feed, wait=True)
                    if not changes:
                        continue
            position = feed.position
            batch = Batch(changes, Seqno(self._covered + 1), position)
            self._scanned = self._covered = position
            if changes:
                self._delivered = position
            return batch

    def _collect(self, feed: Changes, *, wait: bool = False) -> tuple[Change, ...]:
        """The changes of some commits. With `wait`: wait a little for the first."""
        changes: list[Change] = []
        size = 0
        try:
            change = next(feed, None) if wait else feed.poll()
            while change is not None:
                changes.append(change)
                size += len(change.key) + len(change.value or b"")
                if change.last and (len(changes) >= _BATCH_CHANGES or size >= _BATCH_BYTES):
                    break
                change = feed.poll()
        except Exception:
            # Most often it is closed, taken over or lost.
            self._refuse_if_over()
            raise
        return tuple(changes)

    def _feed(self) -> Changes:
        """What it reads: it goes on behind what was looked at."""
        feed = self._changes
        if feed is None:
            cursor = self._consumers.log().read(self._scanned, purpose=None)
            feed = self._changes = Changes(
                self._engine, None, self._filter, follow=True, timeout_s=STEP_S, owner=self._store, cursor=cursor
            )
        return feed

    def _rewind(self) -> None:
        """Read again what was not counted."""
        feed, self._changes = self._changes, None
        if feed is not None:
            feed.close()

    def _pass_over(self, position: Seqno) -> None:
        """Nothing is told of what is up to the position."""
        if self._delivered <= self._acked:
            # There is nothing to acknowledge, so it is as if that was done.
            self._acked = max(self._acked, position)
        self._scanned = position
        token = self._token
        if token is not None:
            token.scanned = position
        self._store_if_due()

    def _refuse_if_over(self) -> None:
        """Raise why it cannot be read on, if that is so."""
        self._refuse_if_closed()
        row = self._row
        if self._consumers.hold(self.name) is None or row.line != self._consumers.line:
            raise self._consumers.gap(row)

    def _refuse_if_closed(self) -> None:
        self._engine.state.refuse_if_gone()
        token = self._token
        if token is None:
            raise closed("consumer")
        if self._consumers.owners.get(self.name) is not token:
            raise FencedError(self.name)

    # -- handling -----------------------------------------------------------------------------

    def ack(self, batch: Batch) -> None:
        """The batch, and all before it, was handled.

        Durable on return if `ack_interval_s` has passed since the position was written last; else it is written by a
        later `ack`, while iterating waits, or by `close`. ValueError for a batch that it has not handed out.
        """
        self._refuse_if_closed()
        if batch.last > self._covered:
            raise ValueError(f"commit {batch.last} is beyond {self._covered}, the last one that was handed out")
        self._acked = max(self._acked, batch.last)
        self._store_if_due()

    def project(
        self, function: Callable[[Transaction, Sequence[Change]], object], *, timeout_s: float | None = None
    ) -> Seqno:
        """Call `function(txn, changes)` for the changes of each batch; one commit holds its writes and the position.

        Exactly once: what it writes is there if and only if the position says that the changes were handled. It may be
        called again for the same changes where its commit conflicts, so it should have no other effect, and must not
        end the transaction. What it raises is stored as `last_error` and raised here; the position stays.

        Args:
            timeout_s: return when no change came for this long; 0: when what is there is handled. None: go on until
                the consumer or the store is closed.

        Returns the position. Raises as iterating does; what the function raises; the last ConflictError after 100.
        """
        if self._acked < self._delivered:
            # What was handed out and not acknowledged comes again.
            self._back_to(self._acked)
        try:
            while (batch := self._read(timeout_s)).changes:
                self._apply(function, batch)
        except BaseException:
            self._back_to(self._acked)
            raise
        self._store_if_due(at_once=True)
        return self.position

    def _apply(self, function: Callable[[Transaction, Sequence[Change]], object], batch: Batch) -> None:
        def handled(row: ConsumerRow) -> ConsumerRow:
            return changed(row, position=batch.last, last_error="")

        for attempt in range(1, _ATTEMPTS + 1):
            txn = Transaction(self._engine, sync=True, read_only=False, owner=self._store)
            try:
                try:
                    function(txn, batch.changes)
                except Exception as error:
                    self._store_error(error)
                    raise
                written = txn.request()
                try:
                    if written is None:
                        self._commit(handled)
                    else:
                        own = {**(extension_of(txn.meta) or {}), CONSUMER: self.name.encode()}
                        self._commit(handled, written.writes.batch, written.reads, own)
                except ConflictError:
                    if attempt == _ATTEMPTS:
                        raise
                    continue
            finally:
                txn.abort()
            return

    def _back_to(self, position: Seqno) -> None:
        self._rewind()
        self._scanned = self._covered = self._delivered = position

    # -- the position -------------------------------------------------------------------------

    def _store_if_due(self, *, at_once: bool = False) -> None:
        stored = self._row.position
        if self._acked <= stored or self._filter.last_of_others <= stored:
            # Only what consumers and the store itself have committed came since: that is no reason to commit more.
            return
        if at_once or time.monotonic() - self._stored_s >= self._ack_interval_s:
            acked = self._acked
            self._commit(lambda row: changed(row, position=acked, last_error=""))

    def _store_error(self, error: Exception) -> None:
        """Say why it does not go on; the position is what was acknowledged."""
        text = f"{type(error).__name__}: {error}"
        if text == self._row.last_error and self._acked == self._row.position:
            return
        try:
            self._commit(lambda row: changed(row, position=max(row.position, self._acked), last_error=text))
        except Exception as failure:  # noqa: BLE001  # the first error is the one to be raised
            error.add_note(f"kvwal: it could not be stored: {failure}")

    def _commit(
        self,
        change: Callable[[ConsumerRow], ConsumerRow],
        batch: WriteBatch | None = None,
        reads: ReadSet | None = None,
        extension: Extension | None = None,
        hold: Hold | None = None,
    ) -> None:
        """Commit the row, if it is as it was left, and what else is given. `hold`: the consumer's from then on."""
        expected = self._row

        def fenced(row: ConsumerRow | None) -> ConsumerRow | None:
            if row is None or (row.epoch, row.position) != (expected.epoch, expected.position):
                raise FencedError(self.name)
            return change(row)

        operation = RowChange(self.name, fenced, batch, extension)
        request = CommitRequest(sync=True, reads=reads, operation=operation)
        try:
            self._engine.commit(request)
        finally:
            # Durability: it has a seqno only when it was flushed.
            if request.seqno and operation.row is not None:
                self._row = row = operation.row
                self._acked = max(self._acked, row.position)
                self._stored_s = time.monotonic()
                if hold is not None:
                    self._consumers.keep_hold(self.name, hold)
                else:
                    held = self._consumers.hold(self.name)
                    if held is not None:
                        held.advance(row.position)

    @contextmanager
    def rebase(self) -> Iterator[Snapshot]:
        """`with consumer.rebase() as snapshot:` begins anew after FeedGap: derive everything from the snapshot.

        At the end of the block the position is that of the snapshot, so that no change is missed and none is told
        twice; after an exception the consumer is as it was.
        """
        self._refuse_if_closed()
        with Bootstrap(self._engine, owner=self._store) as base:
            yield base.snapshot
            hold = self._consumers.begin_hold(self.name, base.position, self._row.limits)
            self._commit(lambda row: changed(row, position=base.position, last_error=""), hold=hold)
        self._acked = base.position
        self._back_to(base.position)

    # -- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Write the position, if it is not written yet, and let another owner have it. Idempotent; from any thread.

        What it holds of the log it goes on to hold. FencedError if it was taken over before the position was written.
        """
        token = self._token
        if token is None:
            return
        try:
            if not self._engine.is_closed:
                self._store_if_due(at_once=True)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        token, self._token = self._token, None
        self._rewind()
        if token is not None:
            self._release(token)

    def __del__(self) -> None:
        token = getattr(self, "_token", None)
        if token is not None:
            self._release(token)

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

    def __repr__(self) -> str:
        return f"<Consumer {self.name!r} after commit {self.position}{' (closed)' if self._token is None else ''}>"


def _in_use(engine: Engine, name: str, owner: Owner) -> LockedError:
    return LockedError(engine.upkeep.path, process_id(), True, consumer=name, thread=owner.thread)


def remove_consumer(engine: Engine, name: str) -> bool:
    """Forget a consumer and its position. False if there is none; LockedError if it is in use."""
    consumers = engine.upkeep.consumers
    consumers.log()
    owner = consumers.owners.get(name)
    if owner is not None:
        raise _in_use(engine, name, owner)
    if consumers.row(name) is None:
        return False
    request = CommitRequest(sync=True, operation=RowChange(name, lambda row: None))
    try:
        engine.commit(request)
    finally:
        if request.seqno:
            consumers.keep_hold(name, None)
    return bool(request.seqno)
