"""Which members of a group may be written.

Each is judged over the newest state and what the members before it write. So an operation sees their writes, and a
transaction conflicts with them, but only with those that are written: where a member turns out not to be, a new judge
has to look at those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from functools import partial

from kvwal.batch import WriteBatch
from kvwal.engine.indexes import with_entries
from kvwal.engine.occ import History
from kvwal.engine.operations import Pending
from kvwal.engine.publish import changes_names
from kvwal.engine.reads import Reads
from kvwal.engine.request import CommitRequest
from kvwal.engine.state import State
from kvwal.engine.writes import NOTHING, EncodedBatch, LonePut, Writes, as_lone_put
from kvwal.errors import Error, TableNotFoundError
from kvwal.keys import SYSTEM_TABLE, Seqno
from kvwal.log import Extension

__all__ = ["Judge", "dropped_by"]


class Judge:
    """Judges the members of one group, in their order. Requires: the lead.

    No member may write to a table that was dropped before it, or by a name that means another one now, but an
    operation, which knows what there is. A transaction that found a table by its name has read that it is there, and
    conflicts first.
    """

    __slots__ = ("_dropped", "_history", "_indexed", "_indexed_after", "_is_alone", "_names", "_own", "_pending")

    def __init__(self, reads: Reads, history: History, state: State, members: Sequence[CommitRequest]) -> None:
        """`state` has the names of tables, and which were dropped."""
        self._history = history
        self._is_alone = len(members) == 1
        # What the members before it write; looked up by key, since a group may have a thousand members.
        reading = any(member.reads is not None for member in members)
        self._own = History() if reading and len(members) > 1 else None
        names = state.cache.names
        self._indexed, self._indexed_after = names.indexed, names.indexed_after
        evaluates = False
        for member in members:
            evaluates = evaluates or member.operation is not None or self._is_completed(member)
        self._names: object = names.now
        self._pending = Pending(reads, names=self._names) if evaluates else None
        self._dropped: AbstractSet[int] = names.dropped

    def accepts(self, member: CommitRequest, seqno: Seqno) -> bool:
        """Whether a member writes something and may, as this commit; if it may not, it has an error."""
        member.error = None
        if member.reads is not None:
            member.error = self._history.conflict(member.reads)
            if member.error is None and self._own is not None:
                member.error = self._own.conflict(member.reads)
        if member.error is None and member.operation is not None and self._pending is not None:
            try:
                batch = member.operation.evaluate(self._pending)
                member.writes = self._encoded(batch, member.operation.extension) if batch else NOTHING
            except (Error, OSError, LookupError, TypeError, ValueError, OverflowError) as error:
                member.error = error
        elif member.error is None and isinstance(member.writes, LonePut):
            if member.writes.table and member.writes.names is not self._names:
                member.error = TableNotFoundError(member.writes.table)
        elif member.error is None and member.writes.batch.others:
            member.error = self._refusal(member.writes.batch)
        writes = member.writes
        if member.error is None and isinstance(writes, EncodedBatch):
            try:
                if self._pending is not None and self._is_completed(member):
                    complete = partial(with_entries, indexed=self._indexed, newest=self._pending)
                    member.writes = writes.filled(seqno, complete)
                elif writes.has_stamped:
                    member.writes = writes.filled(seqno)
            except (Error, OSError, ValueError) as error:
                # It takes too much space in the log, for one, or lacks the keys for an index.
                member.error = error
        return member.error is None and not member.writes.is_empty

    def _encoded(self, batch: WriteBatch, extension: Extension | None) -> Writes:
        """What an operation writes. Most often it is one put, which needs a fifth of the time of a batch."""
        put = as_lone_put(batch) if extension is None else None
        return EncodedBatch(batch, extension) if put is None or put.table in self._indexed else put

    def _is_completed(self, member: CommitRequest) -> bool:
        """Whether what the commit changes in indexes is to be added."""
        writes, indexed = member.writes, self._indexed
        if not isinstance(writes, EncodedBatch) or writes.batch.others is None:
            return False
        return writes.is_indexed or (bool(indexed) and not indexed.keys().isdisjoint(writes.batch.others))

    def _refusal(self, batch: WriteBatch) -> TableNotFoundError | None:
        """The error of a commit to tables that were found by names which mean others now, or that were dropped."""
        parts = batch.parts()
        if batch.names is not None and batch.names is not self._names:
            return TableNotFoundError(parts[0][0] if parts else 0)
        return next((TableNotFoundError(table) for table, _ in parts if table in self._dropped), None)

    def wrote(self, member: CommitRequest, seqno: Seqno) -> None:
        """A member is this commit: those behind it see what it writes."""
        if self._is_alone:
            return
        if self._own is not None and not member.writes.is_expiry:
            written = member.writes.batch
            self._own.record(seqno, written.writes, written.ranges, Seqno(0), written.parts())
        if self._pending is not None:
            if isinstance(member.writes, LonePut):
                self._pending.put(member.writes)
            else:
                self._pending.write(member.writes.batch)
        # A put alone goes to a table of users.
        if isinstance(member.writes, EncodedBatch) and member.writes.batch.others:
            if any(changes_names(*part) for part in member.writes.batch.parts()):
                self._names = None
                if self._pending is not None:
                    self._pending.names = None
                self._indexed = self._indexed_after(self._indexed, member.writes.batch.table(SYSTEM_TABLE))
            self._dropped = self._dropped | dropped_by(member)


def dropped_by(member: CommitRequest) -> set[int]:
    """The table that a member drops, if it drops one."""
    dropped = None if member.operation is None else member.operation.dropped
    return set() if dropped is None else {dropped}
