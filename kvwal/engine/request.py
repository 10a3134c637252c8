"""A pending commit: its reads, its writes, and the waiter of its thread.

It is made outside of any lock, which is where a batch is encoded; from when it is queued until it is done it belongs to
the leader of its group (see commit.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from kvwal.batch import WriteBatch
from kvwal.engine.occ import Reads
from kvwal.engine.value import Value
from kvwal.errors import Error
from kvwal.keys import MAX_BATCH_BYTES, Seqno
from kvwal.log import encode_intents

__all__ = ["CommitRequest", "Newest", "Operation", "say_written"]


class Newest(Protocol):
    """What the commit leader hands an operation: the state after the commits before it."""

    def get(self, key: bytes) -> Value:
        """The newest value."""
        ...

    def edge(self, start: bytes | None, stop: bytes | None, *, reverse: bool) -> tuple[bytes, bytes] | None:
        """The first pair of a range, or in reverse the last one."""
        ...


class Operation(Protocol):
    """Writes that depend on the newest state: the commit leader evaluates it, so it never conflicts."""

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write, None for nothing; the result is kept for the caller. What it raises refuses the commit."""
        ...


class CommitRequest:
    """One pending commit: what it read and since when, what it writes, and how durable it must be."""

    __slots__ = (
        "_batch",
        "action",
        "body",
        "done",
        "error",
        "key",
        "operation",
        "reads",
        "seqno",
        "size",
        "sync",
        "taken",
        "value",
        "waiter",
    )

    def __init__(
        self,
        batch: WriteBatch,
        *,
        sync: bool,
        reads: Reads | None = None,
        action: Callable[[], Any] | None = None,
        operation: Operation | None = None,
    ) -> None:
        #: Of a lone put, which needs no batch.
        self.key: bytes | None = None
        self.value = b""
        self.write(batch)
        self.sync = sync
        #: None if nothing was read and nothing can conflict.
        self.reads = reads
        #: Something else to do while no commit is under way (a sync, retiring log segments).
        self.action = action
        self.operation = operation
        #: What its thread sleeps on.
        self.waiter: threading.Lock | None = None
        #: Whether a leader has it in its group. Guarded by CommitQueue.queue_lock.
        self.taken = False
        self.seqno = Seqno(0)
        self.error: BaseException | None = None
        self.done = False

    def write(self, batch: WriteBatch) -> None:
        """Encode what is written. ValueError if it is too much for one commit."""
        size = batch.size()
        if size > MAX_BATCH_BYTES:
            raise ValueError(
                f"the transaction has {size} bytes of keys and values; the limit is {MAX_BATCH_BYTES}; commit in parts"
            )
        self._batch: WriteBatch | None = batch
        self.size = size
        self.body = encode_intents(batch) if len(batch) else None

    @classmethod
    def of_put(cls, key: bytes, value: bytes, *, sync: bool, reads: Reads | None = None) -> CommitRequest:
        """The request of one put, which the leader encodes: made in a sixth of the time."""
        request = cls.__new__(cls)
        request._batch = None
        request.key = key
        request.value = value
        request.size = len(key) + len(value)
        request.body = None
        request.sync = sync
        request.reads = reads
        request.action = request.operation = request.waiter = request.error = None
        request.seqno = Seqno(0)
        request.taken = request.done = False
        return request

    @property
    def batch(self) -> WriteBatch:
        """What is written."""
        batch = self._batch
        if batch is None:
            assert self.key is not None
            self._batch = batch = WriteBatch()
            batch.writes[self.key] = self.value
        return batch

    @property
    def writes_something(self) -> bool:
        """Whether it makes a record."""
        return self.key is not None or self.body is not None

    @property
    def only_deletes(self) -> bool:
        """Whether it puts nothing, so that it may use what is kept for a full disk."""
        if self.key is not None:
            return False
        batches = [self.batch, *(part for _, part in self.batch.parts())]
        return not any(value is not None for batch in batches for value in batch.writes.values())


def say_written(error: BaseException, seqno: int) -> None:
    """Note on an interruption that the commit it came into was written. Harmless when done again."""
    note = f"kvwal: commit {seqno} was written"
    if not isinstance(error, Error) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
