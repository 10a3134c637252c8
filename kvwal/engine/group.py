"""A group: commits that share one write and one flush, and the steps that take it to its end.

The leader takes the steps in the order of `CommitQueue` (see commit.py), and may begin them anew after an interruption:
each either knows that it is done, or is harmless when done again. The group says whether its append was begun, since
from there on its records may be on disk.

A member fails alone where the fault is its own: a conflict, an operation that raises, a put on a full disk. What fails
the log fails all.

On a full disk the members that put are refused. Those that only delete free space: they are written one by one, and may
use what is kept for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from kvwal.batch import WriteBatch
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES
from kvwal.engine.occ import History
from kvwal.engine.operations import Pending
from kvwal.engine.publish import Publisher, changes_names
from kvwal.engine.reads import Reads
from kvwal.engine.request import CommitRequest
from kvwal.engine.state import State
from kvwal.engine.writes import NOTHING, EncodedBatch, LonePut
from kvwal.errors import DiskFullError, Error, TableNotFoundError
from kvwal.events import CommitGroup
from kvwal.keys import Seqno
from kvwal.locks import Lock
from kvwal.log import LogWriter

__all__ = ["Group", "Pressure"]


class Pressure(Protocol):
    """What is told of a full disk."""

    @property
    def lock(self) -> Lock: ...
    def disk_is_full(self) -> None: ...
    def release_reserve(self) -> bool: ...


class Group:
    """Requests that are committed together, and how far they have come. Requires: the lead."""

    __slots__ = ("_accepted", "_first", "_fitting", "_validated", "began", "began_s", "event", "logged", "members")

    def __init__(self, members: Sequence[CommitRequest]) -> None:
        self.members = members
        self._validated = False
        # Those that write something and have no conflict, in the order of their seqnos, which begin with `_first`.
        self._accepted: list[CommitRequest] = []
        self._first = Seqno(0)
        # After the disk was found full: members that are still to be written one by one.
        self._fitting: list[CommitRequest] | None = None
        #: From here on the records may be on disk.
        self.began = False
        #: All is appended, and flushed if a member wants it.
        self.logged = False
        #: When the append began; None if there were no listeners then.
        self.began_s: float | None = None
        #: What they are to be told.
        self.event: CommitGroup | None = None

    @classmethod
    def of_put(cls, request: CommitRequest, target: Seqno) -> Group:
        """Of a put alone that was interrupted. `target` is its seqno; while that is 0 nothing was begun."""
        group = cls((request,))
        group._validated = True
        group._accepted = [request]
        group._first = target
        group.began = bool(target)
        return group

    @property
    def _last(self) -> Seqno:
        return Seqno(self._first + len(self._accepted) - 1)

    @property
    def sync(self) -> bool:
        """Whether a member wants a flush."""
        return any(member.sync for member in self.members)

    def validate(self, after: Seqno, reads: Reads, history: History, state: State) -> None:
        """Accept the members without a conflict, and let operations say what they write.

        Args:
            after: the last commit.
            state: has the names of tables, and which were dropped. No member may write to a table that was dropped
                before it, or by a name that means another one now, but an operation, which knows what there is, and a
                transaction, which read that it is there, and conflicts if it is not.
        """
        if self._validated:
            return
        first = Seqno(after + 1)
        members = self.members
        reading = [member for member in members if member.reads is not None]
        operating = [member for member in members if member.operation is not None]
        # What the members before it write; looked up by key, since a group may have a thousand members.
        own = History() if reading and len(members) > 1 else None
        pending = Pending(reads) if operating else None
        names: object = state.cache.names.now
        dropped: AbstractSet[int] = state.cache.names.dropped
        accepted: list[CommitRequest] = []
        for member in members:
            member.error = None
            if member.reads is not None:
                member.error = history.conflict(member.reads)
                if member.error is None and own is not None:
                    member.error = own.conflict(member.reads)
            if member.error is None and member.operation is not None and pending is not None:
                try:
                    batch = member.operation.evaluate(pending)
                    member.writes = EncodedBatch(batch, member.operation.extension) if batch else NOTHING
                except (Error, OSError, LookupError, TypeError, ValueError, OverflowError) as error:
                    member.error = error
            elif member.reads is None and isinstance(member.writes, EncodedBatch) and member.writes.batch.others:
                member.error = _is_refused(member.writes.batch, names, dropped)
            seqno = Seqno(first + len(accepted))
            if member.error is None and isinstance(member.writes, EncodedBatch) and member.writes.has_stamped:
                try:
                    member.writes = member.writes.filled(seqno)
                except ValueError as error:
                    # It takes too much space in the log.
                    member.error = error
            if member.error is not None or member.writes.is_empty:
                continue
            if own is not None and not member.writes.is_expiry:
                written = member.writes.batch
                own.record(seqno, written.writes, written.ranges, Seqno(0), written.parts())
            if pending is not None:
                pending.write(member.writes.batch)
            if isinstance(member.writes, EncodedBatch) and member.writes.batch.others:
                if any(changes_names(*part) for part in member.writes.batch.parts()):
                    names = None
                dropped = dropped | self._dropped_by(member)
            accepted.append(member)
        self._accepted = accepted
        self._first = first
        self._validated = True

    # -- append ---------------------------------------------------------------------------------

    def append(self, log: LogWriter, pressure: Pressure) -> None:
        """Write the records of the accepted members, with one call if the disk is not full."""
        if self._fitting is None and self._accepted:
            try:
                self._append(log)
                for member in self._accepted:
                    # Refused for a full disk before an interruption, and written now.
                    member.error = None
            except DiskFullError as error:
                pressure.disk_is_full()
                self._refuse_puts(error)
        if self._fitting is not None:
            self._append_what_fits(self._fitting, log, pressure)

    def _append(self, log: LogWriter) -> None:
        self.began = True
        accepted = self._accepted
        # After an interruption the append may have been finished: then the log has counted it.
        if log.last_seqno >= self._last:
            return
        first = accepted[0].writes
        if len(accepted) == 1 and isinstance(first, LonePut):
            log.append_put(first.key, first.value)
        else:
            log.append([member.writes.body for member in accepted])

    def _refuse_puts(self, error: DiskFullError) -> None:
        deleting = [member for member in self._accepted if member.writes.only_deletes]
        for member in self._accepted:
            if member not in deleting:
                member.error = error
        self._accepted, self._fitting = [], deleting

    def _append_what_fits(self, fitting: list[CommitRequest], log: LogWriter, pressure: Pressure) -> None:
        """Write the members that are left, one by one. May be begun anew, so each is done before it is taken off."""
        while fitting:
            member = fitting[0]
            if self._accepted[-1:] != [member] and member.error is None:
                try:
                    # After an interruption the append may have been finished: then the log has counted it.
                    if log.last_seqno < self._first + len(self._accepted):
                        _append_small(member, log, pressure)
                except DiskFullError as full:
                    member.error = full
                else:
                    self._accepted.append(member)
            del fitting[0]

    # -- publish --------------------------------------------------------------------------------

    @staticmethod
    def _dropped_by(member: CommitRequest) -> set[int]:
        dropped = None if member.operation is None else member.operation.dropped
        return set() if dropped is None else {dropped}

    def publish(self, state: State, publisher: Publisher) -> None:
        """Make the accepted members visible, and give each its seqno."""
        accepted = self._accepted
        for member in accepted:
            if member.operation is not None:
                # Before it is visible; it is on its way.
                state.cache.names.dropped.update(self._dropped_by(member))
        several = accepted if len(accepted) > 1 else ()
        puts = [member.writes for member in several if isinstance(member.writes, LonePut)]
        if puts and len(puts) == len(accepted):
            if self._last > state.seqno:
                size = sum(put.size for put in puts) + ENTRY_OVERHEAD_BYTES * len(puts)
                publisher.publish_puts(self._last, [put.key for put in puts], [put.value for put in puts], size)
            for number, member in enumerate(accepted, self._first):
                member.seqno = number  # type: ignore[assignment]  # to make a Seqno is a call
            return
        for number, member in enumerate(accepted, self._first):
            seqno = Seqno(number)
            if seqno > state.seqno:
                writes = member.writes
                if isinstance(writes, LonePut):
                    publisher.publish_put(seqno, writes.key, writes.value, writes.size + ENTRY_OVERHEAD_BYTES)
                else:
                    publisher.publish(seqno, writes.batch, writes.size, conflicts=not writes.is_expiry)
            member.seqno = seqno

    def as_event(self, seconds: float) -> CommitGroup | None:
        """What listeners are to be told; None if nothing was written. `seconds`: of append, flush and publishing."""
        if not self._accepted:
            return None
        size = sum(member.writes.size for member in self._accepted)
        return CommitGroup(self._first, self._last, size, self.sync, seconds)

    def fail(self, error: BaseException) -> None:
        """Every member without an outcome ends with this error."""
        for member in self.members:
            if not member.done and not member.seqno:
                member.error = error


def _is_refused(batch: WriteBatch, names: object, dropped: AbstractSet[int]) -> TableNotFoundError | None:
    """The error of a commit to tables that were found by names which mean others now, or that were dropped."""
    parts = batch.parts()
    if batch.names is not None and batch.names is not names:
        return TableNotFoundError(parts[0][0] if parts else 0)
    return next((TableNotFoundError(table) for table, _ in parts if table in dropped), None)


def _append_small(member: CommitRequest, log: LogWriter, pressure: Pressure) -> None:
    try:
        log.append([member.writes.body])
    except DiskFullError:
        if not pressure.release_reserve():
            raise
        log.append([member.writes.body])
