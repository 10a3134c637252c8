"""A commit on its way: what was read and what is to be written, and how whoever waits for it is told of the end.

It is made outside of any lock, which is where the encoding is done; from when it is queued up until it is done it
belongs to the leader of its group (see commit.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvwal.batch import WriteBatch
from kvwal.errors import Error, InternalError
from kvwal.files import Buffer
from kvwal.keys import MAX_BATCH_BYTES, KeyRange, Seqno
from kvwal.log import encode_intents

__all__ = ["CommitRequest", "open_gate", "say_written"]


class CommitRequest:
    """One commit on its way: what it read and since when, what it writes, and how durable it must be."""

    __slots__ = (
        "_batch",
        "action",
        "body",
        "done",
        "error",
        "gate",
        "key",
        "ranges",
        "reads",
        "seqno",
        "since",
        "size",
        "sync",
        "value",
    )

    def __init__(
        self,
        batch: WriteBatch,
        *,
        sync: bool,
        since: Seqno | None = None,
        reads: Iterable[bytes] = (),
        ranges: Sequence[KeyRange] = (),
        action: Callable[[], Any] | None = None,
    ) -> None:
        self._batch: WriteBatch | None = batch
        #: Of a lone put, which needs no batch.
        self.key: bytes | None = None
        self.value = b""
        if batch.others and any(map(len, batch.others.values())):
            raise InternalError("the engine does not commit writes to several tables yet")
        size = sum(map(len, batch.writes)) + sum(map(len, filter(None, batch.writes.values())))
        size += sum(len(start) + len(stop or b"") for start, stop in batch.ranges)
        if size > MAX_BATCH_BYTES:
            raise ValueError(
                f"the transaction has {size} bytes of keys and values; the limit is {MAX_BATCH_BYTES}; commit in parts"
            )
        self.size = size
        self.body: bytes | list[Buffer] | None = encode_intents(batch) if len(batch) else None
        self.sync = sync
        #: Snapshot seqno of the reads; None if nothing was read and nothing can conflict.
        self.since = since
        self.reads = reads
        self.ranges = ranges
        #: Something else to do while holding the baton (a sync, retiring log segments).
        self.action = action
        #: Where its thread sleeps while another leads. None: it rides in company of one that has a thread.
        self.gate: threading.Lock | None = None
        self.seqno = Seqno(0)
        self.error: BaseException | None = None
        self.done = False

    @classmethod
    def of_put(cls, key: bytes, value: bytes, body: bytes, *, sync: bool) -> CommitRequest:
        """The request of one put, whose encoding is `body`: made in a sixth of the time, for those who make many."""
        request = cls.__new__(cls)
        request._batch = None
        request.key = key
        request.value = value
        request.size = len(key) + len(value)
        request.body = body
        request.sync = sync
        request.since = request.action = request.gate = request.error = None
        request.reads = request.ranges = ()
        request.seqno = Seqno(0)
        request.done = False
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
    def only_deletes(self) -> bool:
        """Whether it puts nothing, so that it may use what is kept for a full disk."""
        return self.key is None and not any(value is not None for value in self.batch.writes.values())

    def wake(self) -> None:
        """It is done: whoever waits for it is told. Harmless when done again."""
        self.done = True
        if self.gate is not None:
            open_gate(self.gate)


def open_gate(gate: threading.Lock) -> None:
    """Let whoever sleeps at it go on."""
    # Opening twice is harmless, and after an interruption nobody knows whether it was done.
    try:
        gate.release()
    except RuntimeError:
        # It was open, or another thread has opened it just now.
        return


def say_written(error: BaseException, seqno: int) -> None:
    """Note on an interruption that the commit it came into was written. Harmless when done again."""
    note = f"kvwal: commit {seqno} was written"
    if not isinstance(error, Error) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
