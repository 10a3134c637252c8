"""A pending commit: its reads, its writes, and the waiter of its thread.

It is made outside of any lock; from when it is queued until it is done it belongs to the leader of its group (see
commit.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from kvwal.batch import WriteBatch
from kvwal.engine.occ import ReadSet
from kvwal.engine.readers import Reader
from kvwal.engine.value import Value
from kvwal.engine.writes import NOTHING, Writes
from kvwal.errors import Error
from kvwal.keys import Seqno
from kvwal.log import Extension

__all__ = ["CommitRequest", "Newest", "Operation", "say_written"]

# To make a Seqno is a call.
_NONE: Final = Seqno(0)


class Newest(Protocol):
    """What the commit leader hands an operation: the state after the commits before it.

    Attributes:
        names: what `WriteBatch.names` is of a batch that knows these names of tables.
    """

    @property
    def names(self) -> object: ...

    def get(self, key: bytes) -> Value:
        """The newest value."""
        ...

    def raw(self, key: bytes) -> Value:
        """The newest value as it is stored: also one that has expired; one that expires is `Expiring`."""
        ...

    def edge(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> tuple[bytes, bytes] | None:
        """The first pair of a range, or in reverse the last one."""
        ...

    def first_pairs(self, start: bytes | None, stop: bytes | None, *, most: int) -> list[tuple[bytes, bytes]]:
        """The first pairs of a range, `most` of them at the most."""
        ...

    def is_empty(self) -> bool:
        """Whether there is no pair, not even one that has expired."""
        ...

    def table(self, table: int) -> Newest:
        """The same of a table."""
        ...


class Operation(Protocol):
    """Writes that depend on the newest state: the commit leader evaluates it, so it never conflicts."""

    @property
    def extension(self) -> Extension | None:
        """What the commit says of itself beside its writes."""
        ...

    @property
    def dropped(self) -> int | None:
        """The id of the table that it drops, if it does."""
        ...

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write, None for nothing; the result is kept for the caller. What it raises refuses the commit."""
        ...


class CommitRequest:
    """One pending commit: what it read, what it writes, how durable it must be, and what becomes of it."""

    __slots__ = (
        "_reader",
        "action",
        "done",
        "error",
        "operation",
        "reads",
        "seqno",
        "sync",
        "taken",
        "waiter",
        "writes",
    )

    def __init__(
        self,
        writes: Writes = NOTHING,
        *,
        sync: bool,
        reads: ReadSet | None = None,
        action: Callable[[], Any] | None = None,
        operation: Operation | None = None,
        reader: Reader | None = None,
    ) -> None:
        #: Of an operation: nothing, until the leader has evaluated it.
        self.writes = writes
        self.sync = sync
        #: None if nothing was read and nothing can conflict.
        self.reads = reads
        #: Something else to do while no commit is under way (a sync, retiring log segments).
        self.action = action
        self.operation = operation
        self._reader = reader
        #: What its thread sleeps on.
        self.waiter: threading.Lock | None = None
        #: Whether a leader has it in its group. Guarded by CommitQueue.queue_lock.
        self.taken = False
        self.seqno = _NONE
        self.error: BaseException | None = None
        self.done = False

    def let_go(self) -> None:
        """Give back the moment of its transaction, for which nothing that is published now need be kept any more.

        Requires: it is validated, and will be published.
        """
        if self._reader is not None:
            self._reader.release()

    def renew(self) -> None:
        """Be as it was before it was refused, to be committed once more."""
        self.error = None
        self.taken = self.done = False


def say_written(error: BaseException, seqno: int) -> None:
    """Note on an interruption that the commit it came into was written. Harmless when done again."""
    note = f"kvwal: commit {seqno} was written"
    if not isinstance(error, Error) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
