"""Removing what has expired, in the background.

What is due is read from the queue, in order, and removed by commits of a bounded size with cause "expire". Each is an
operation: the leader looks at each value again, so that one which was put anew, or touched, stays.

Such a commit conflicts with no transaction: what it removes was absent for every reader that began after its time, and
a transaction that began before goes by its own time (docs/tables.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.engine.commit import CommitQueue
from kvwal.engine.expiry import NEVER_US, QueueRow, decode_queue_row, due_rows, queue_row
from kvwal.engine.reads import Reads
from kvwal.engine.request import CommitRequest, Newest
from kvwal.errors import Error
from kvwal.expiring import Expiring
from kvwal.keys import SYSTEM_TABLE
from kvwal.log import CAUSE, EXPIRE, Extension

__all__ = ["Expirer"]

# Of one commit: what the leader can look at while others wait.
MOST_ENTRIES: Final = 500
MOST_BYTES: Final = 1 << 20

# How long a commit of a user removes what has expired, and how many times as long none does then.
_BESIDE_S: Final = 0.01
_REST_TIMES: Final = 9


class _Remove:
    """Remove what these rows name, as far as it has expired, and the rows."""

    dropped: Final = None
    extension: Final[Extension] = {CAUSE: EXPIRE}

    def __init__(self, rows: Sequence[QueueRow], at_us: int) -> None:
        self._rows = rows
        self._at_us = at_us

    def evaluate(self, newest: Newest) -> WriteBatch | None:
        """What to write."""
        batch = WriteBatch()
        queue = batch.table(SYSTEM_TABLE)
        for row in self._rows:
            queue.writes[queue_row(*row)[0]] = None
            value = newest.table(row.table).raw(row.key)
            if type(value) is Expiring and value.expires_us <= self._at_us:
                batch.part(row.table).writes[row.key] = None
        return batch


class Expirer:
    """Removes what has expired from one open store, for its background thread, or one commit at a time."""

    def __init__(self, reads: Reads, queue: CommitQueue, *, sync: bool) -> None:
        """`sync`: whether its commits are flushed before the next one."""
        self._reads = reads
        self._queue = queue
        self._sync = sync
        self._clock = reads.moments.clock
        # Before this key the queue has nothing any more, but for what was put since (`ExpiryClock.put_us`). From the
        # beginning on, each look would pass all that was removed since the last checkpoint.
        self._start = b""
        # Until then no commit of a user removes anything.
        self._rests_until_s = -math.inf

    def rows(self, start: bytes = b"") -> Iterator[QueueRow]:
        """The rows of the queue from a key on, in its order."""
        reader = self._reads.moments.reader("expiry")
        first, stop = due_rows(0, None)
        for keys, values in self._reads.chunks(reader, max(first, start), stop, reverse=False, table=SYSTEM_TABLE):
            for key, value in zip(keys, values, strict=True):
                yield decode_queue_row(key, value)

    @property
    def in_use(self) -> bool:
        """Whether something expires, or ever did."""
        return self._clock.in_use

    def may_be_due(self) -> bool:
        """Whether something is to be removed now, as far as it is known without a look into the queue."""
        return self._clock.in_use and self._clock.now_us() >= self._next_us()

    def due_in_s(self) -> float:
        """Seconds until then; infinity if nothing expires."""
        return max(0.0, (self._next_us() - self._clock.now_us()) / 1e6) if self._clock.in_use else math.inf

    def _next_us(self) -> int:
        return min(self._clock.found_us, self._clock.put_us)

    def waiting(self) -> tuple[int, int]:
        """How many rows the queue has, and when the first one is due (0: there is none)."""
        if not self._clock.in_use:
            return 0, 0
        first = next(self.rows(), None)
        return self._reads.count(*due_rows(0, None), table=SYSTEM_TABLE), 0 if first is None else first.expires_us

    def remove(self) -> bool:
        """Remove some of what has expired, in one commit. Whether there was something."""
        clock = self._clock
        at_us = clock.now_us()
        rows: list[QueueRow] = []
        size = 0
        next_us = NEVER_US
        # In this order, and before the queue is read: what is put from here on is either in it, or said here.
        self._start = start = min(self._start, due_rows(clock.put_us, None)[0])
        clock.put_us = NEVER_US
        for row in self.rows(start):
            if row.expires_us > at_us:
                next_us = row.expires_us
                break
            # Read here, so that the leader need not read a page.
            self._reads.read(row.key, table=row.table, raw=True)
            rows.append(row)
            size += len(row.key)
            if len(rows) >= MOST_ENTRIES or size >= MOST_BYTES:
                next_us = at_us
                break
        if rows:
            self._queue.commit(CommitRequest(sync=self._sync, operation=_Remove(rows, at_us)))
            self._start = queue_row(*rows[-1])[0] + b"\0"
        clock.found_us = next_us
        return bool(rows)

    def remove_beside(self, now_s: Callable[[], float]) -> None:
        """Remove what has expired for a short time, where no thread does, beside a commit that does not fail for it."""
        began_s = now_s()
        if began_s < self._rests_until_s or not self.may_be_due():
            return
        try:
            while self.remove() and now_s() - began_s < _BESIDE_S:
                pass
        except (Error, OSError) as error:
            logging.getLogger("kvwal").warning("what has expired cannot be removed: %s", error)
        ended_s = now_s()
        self._rests_until_s = ended_s + _REST_TIMES * (ended_s - began_s)
