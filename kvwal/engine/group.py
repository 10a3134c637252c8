"""A group: commits that share one write and one flush, and the steps that take it to its end.

The leader takes the steps in the order of `CommitQueue` (see commit.py), and may begin them anew after an interruption:
each either knows that it is done, or is harmless when done again. The group says whether its append was begun, since
from there on its records may be on disk.

A member fails alone where the fault is its own: a conflict, an operation that raises, a put on a full disk. What fails
the log fails all.

On a full disk the members that put are refused. Those that only delete free space, and may use what is kept for that:
all are judged anew and written one by one, so that none saw what was refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from kvwal.engine.judge import Judge, dropped_by
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES
from kvwal.engine.publish import Publisher
from kvwal.engine.request import CommitRequest
from kvwal.engine.state import State
from kvwal.engine.writes import LonePut
from kvwal.errors import DiskFullError, RefusedError
from kvwal.events import CommitGroup
from kvwal.keys import Seqno
from kvwal.locks import Lock
from kvwal.log import LogWriter

__all__ = ["Group", "Pressure"]

# Judges the members of a group.
Judging: TypeAlias = Callable[[Sequence[CommitRequest]], Judge]


class Pressure(Protocol):
    """What is told of a full disk."""

    @property
    def lock(self) -> Lock: ...
    def disk_is_full(self) -> None: ...
    def release_reserve(self) -> bool: ...


class Group:
    """Requests that are committed together, and how far they have come. Requires: the lead."""

    __slots__ = (
        "_accepted",
        "_first",
        "_fitting",
        "_full",
        "_tried",
        "_validated",
        "began",
        "began_s",
        "event",
        "logged",
        "members",
    )

    def __init__(self, members: Sequence[CommitRequest]) -> None:
        self.members = members
        self._validated = False
        # Those that write something and have no conflict, in the order of their seqnos, which begin with `_first`.
        self._accepted: list[CommitRequest] = []
        self._first = Seqno(0)
        # The disk was found full: from there on members are written one by one. How many were tried, and which were
        # written.
        self._full: DiskFullError | None = None
        self._tried = 0
        self._fitting: list[CommitRequest] = []
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

    def validate(self, after: Seqno, judging: Judging) -> None:
        """Accept the members without a conflict, and let operations say what they write. `after`: the last commit."""
        if self._validated:
            return
        first = Seqno(after + 1)
        judge = judging(self.members)
        accepted: list[CommitRequest] = []
        for member in self.members:
            seqno = Seqno(first + len(accepted))
            if judge.accepts(member, seqno):
                judge.wrote(member, seqno)
                accepted.append(member)
        self._accepted = accepted
        self._first = first
        self._validated = True

    # -- append ---------------------------------------------------------------------------------

    def append(self, log: LogWriter, pressure: Pressure, judging: Judging) -> None:
        """Write the records of the accepted members, with one call if the disk is not full."""
        if self._full is None and self._accepted:
            try:
                self._append(log)
            except DiskFullError as error:
                pressure.disk_is_full()
                self._full = error
        if self._full is not None:
            self._append_what_fits(self._full, log, pressure, judging)

    def _append(self, log: LogWriter) -> None:
        self.began = True
        accepted = self._accepted
        # After an interruption the append may have been finished: then the log has counted it.
        if log.last_seqno >= self._last:
            return
        first = accepted[0].writes
        if len(accepted) == 1 and isinstance(first, LonePut):
            log.append_put(first.key, first.value, first.table)
        else:
            log.append([member.writes.body for member in accepted])

    def _append_what_fits(self, full: DiskFullError, log: LogWriter, pressure: Pressure, judging: Judging) -> None:
        """Judge and write the members one by one: none of them may have seen a put that is refused.

        May be begun anew, so `_tried` counts a member when it is over.
        """
        written = self._fitting
        judge = judging(self.members)
        for seqno, member in enumerate(written, self._first):
            judge.wrote(member, Seqno(seqno))
        for member in self.members[self._tried :]:
            if written[-1:] != [member]:
                seqno = Seqno(self._first + len(written))
                # After an interruption the append may have been finished: then the log has counted it.
                if log.last_seqno >= seqno or (judge.accepts(member, seqno) and _fits(member, full, log, pressure)):
                    member.error = None
                    judge.wrote(member, seqno)
                    written.append(member)
            self._tried += 1
        self._accepted = written

    # -- publish --------------------------------------------------------------------------------

    def publish(self, state: State, publisher: Publisher) -> None:
        """Make the accepted members visible, and give each its seqno."""
        accepted = self._accepted
        for member in accepted:
            member.let_go()
            if member.operation is not None:
                # Before it is visible; it is on its way.
                state.cache.names.dropped.update(dropped_by(member))
        several = accepted if len(accepted) > 1 else ()
        puts = [member.writes for member in several if isinstance(member.writes, LonePut) and not member.writes.table]
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
                    size = writes.size + ENTRY_OVERHEAD_BYTES
                    publisher.publish_put(seqno, writes.key, writes.value, size, writes.table)
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


def _fits(member: CommitRequest, full: DiskFullError, log: LogWriter, pressure: Pressure) -> bool:
    """Write a member to a disk that is full, if it only deletes and fits; else it has an error."""
    member.error = full
    if not member.writes.only_deletes:
        return False
    try:
        _append_small(member, log, pressure)
    except (DiskFullError, RefusedError) as error:
        # Its own: members before it may be written.
        member.error = error
        return False
    return True


def _append_small(member: CommitRequest, log: LogWriter, pressure: Pressure) -> None:
    try:
        log.append([member.writes.body])
    except DiskFullError:
        if not pressure.release_reserve():
            raise
        log.append([member.writes.body])
