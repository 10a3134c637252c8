"""What a consumer sets aside because a projection's function fails for it, so that the others go on.

Rules:
- A batch that fails is tried commit by commit. A commit that fails again is set aside: by the commit that moves the
  position behind it, so it is either before the position, or handled, or set aside.
- A program that iterates says itself what it cannot handle: all commits of a batch are set aside by one commit.
- It is taken up by a commit that has what the function writes and removes its row. The position stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as changed
from itertools import groupby
from typing import Final

from kvwal.batch import WriteBatch
from kvwal.engine.parked import SYSTEM_TABLE, Parked, encode_parked, parked_key
from kvwal.errors import Error
from kvwal.feed.owned import Batch, OwnedConsumer, RowCommit, text_of
from kvwal.keys import Seqno

__all__ = ["MAX_PARKED", "ParkingConsumer"]

#: Commits that a consumer may have set aside at a time.
MAX_PARKED: Final = 1000


class ParkingConsumer(OwnedConsumer):
    """A consumer that may set commits aside."""

    def _may_park(self, error: Exception) -> bool:
        """Whether to set aside what the function fails for. An error of kvwal is one of the store, or of its use."""
        return self._parks and not isinstance(error, Error) and len(self._parked) < MAX_PARKED

    def _singly(self, batch: Batch) -> Iterator[Batch]:
        """The batch in batches of one commit that has changes each."""
        commits = [tuple(changes) for _, changes in groupby(batch.changes, key=lambda change: change.seqno)]
        first = batch.first
        for number, changes in enumerate(commits, 1):
            last = batch.last if number == len(commits) else changes[-1].seqno
            yield Batch(changes, first, last)
            first = Seqno(last + 1)

    def _set_aside(self, batch: Batch, error: Exception) -> RowCommit:
        """The commit of a batch of one is set aside, and the position is behind it."""
        now_us = self._engine.reads.moments.clock.now_us()
        # It was tried with others, and then alone.
        parked = Parked(batch.changes[0].seqno, text_of(error), 2, now_us)
        last = batch.last
        return self._change(
            lambda row: changed(row, position=last, last_error=""), self._row_of(parked), parked=(*self._parked, parked)
        )

    def _set_all_aside(self, batch: Batch, error: Exception) -> RowCommit | None:
        """The commits of a batch that have changes are set aside, and the position is behind it.

        ValueError if these are too many, or it has not handed out the batch.
        """
        self._refuse_foreign(batch)
        parked = {each.seqno: each for each in self._parked}
        now_us = self._engine.reads.moments.clock.now_us()
        added = [Parked(seqno, text_of(error), 1, now_us) for seqno in dict.fromkeys(c.seqno for c in batch.changes)]
        parked |= {each.seqno: each for each in added}
        if len(parked) > MAX_PARKED:
            raise ValueError(f"{len(parked)} commits would be set aside; the limit is {MAX_PARKED}")
        if not added:
            self._acknowledge(batch)
            return self._due()
        rows, last = WriteBatch(), batch.last
        for each in added:
            rows.table(SYSTEM_TABLE).put(parked_key(self.name, each.seqno), encode_parked(each))
        # Not counted as acknowledged before it is stored: else a later `ack` would store that alone.
        in_order = tuple(parked[seqno] for seqno in sorted(parked))
        return self._change(
            lambda row: changed(row, position=max(row.position, last), last_error=""), rows, parked=in_order
        )

    def _set_aside_again(self, parked: Parked, error: Exception) -> RowCommit:
        """It failed once more."""
        again = changed(parked, error=text_of(error), attempts=parked.attempts + 1)
        left = tuple(again if each.seqno == again.seqno else each for each in self._parked)
        return self._change(lambda row: row, self._row_of(again), parked=left)

    def _row_of(self, parked: Parked) -> WriteBatch:
        writes = WriteBatch()
        writes.table(SYSTEM_TABLE).put(parked_key(self.name, parked.seqno), encode_parked(parked))
        return writes

    def _taken_up(self, parked: Parked) -> Batch:
        """The changes of a commit that was set aside. FeedGap if the log does not have it any more."""
        seqno = parked.seqno
        with self._consumers.log().read(Seqno(seqno - 1), until=seqno, purpose="parked") as records:
            for record in records:
                return Batch(tuple(self._wanted.changes(record) or ()), seqno, seqno)
        raise AssertionError("the log has each commit that is not beyond its end")
