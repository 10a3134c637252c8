"""What there was before each change: its former value, and the keys that a deleted range held.

Both are read at the moment before the commit. The reader of a moment also serves those after it, so a feed goes on
though the window has left it behind. Where the window has a later moment, the reader is made anew now and then: so one
that keeps up holds little.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Final

from kvwal.engine.engine import Engine
from kvwal.engine.past_version import PastVersion
from kvwal.engine.readers import Reader
from kvwal.engine.value import Value
from kvwal.errors import SnapshotTooOld
from kvwal.expiring import plain
from kvwal.feed.change import Change, Selection
from kvwal.keys import KeyRange, Seqno, disjoint
from kvwal.log import Record, Run

__all__ = ["WithPrevious"]

# Commits after which there may be a newer base.
_COMMITS: Final = 64


class WithPrevious:
    """A selection whose changes have what there was before them. For one feed, which reads commits in order."""

    def __init__(
        self, engine: Engine, wanted: Selection, after: Seqno, *, values: bool, keys: bool, owner: object
    ) -> None:
        """SnapshotTooOld if the moment of `after` is not kept.

        Args:
            values: changes get their `previous`.
            keys: a deleted range becomes a "delete" of each key that it held.
        """
        self._engine = engine
        self._wanted = wanted
        self._values = values
        self._keys = keys
        self._owner = owner
        self._reader = self._reader_at(after)
        self._renew_at = after + _COMMITS
        if not isinstance(self._reader.version, PastVersion):
            # Nothing is kept but now, which serves no later moment.
            self._reader.release()

    def changes(self, record: Record) -> Iterator[Change] | None:
        """What is told of a commit; None if nothing is. Raises as reading the moment before it."""
        before = Seqno(record.seqno - 1)
        if before >= self._renew_at:
            self._renew(before)
        found = self._wanted.changes(record)
        if found is None:
            return None
        if self._reader.is_released:
            # It may have held too much. The window may have the moment.
            self._reader = self._reader_at(before)
        told = self._told(found, self._reader)
        first = next(told, None)
        return None if first is None else chain((first,), told)

    def changes_of(self, run: Run) -> Iterator[Change] | None:
        """The same of each commit of a run."""
        told = chain.from_iterable(filter(None, map(self.changes, run.records())))
        first = next(told, None)
        return None if first is None else chain((first,), told)

    def close(self) -> None:
        """Let go of the moment that it holds."""
        self._reader.release()

    def _reader_at(self, moment: Seqno) -> Reader:
        return self._engine.upkeep.past.reader(moment, "changes", self._owner, ahead=True)

    def _renew(self, before: Seqno) -> None:
        self._renew_at = before + _COMMITS
        try:
            reader = self._reader_at(before)
        except SnapshotTooOld:
            # The former one serves this moment, too.
            return
        self._reader.release()
        self._reader = reader

    def _told(self, found: Iterator[Change], reader: Reader) -> Iterator[Change]:
        waiting = None
        for each in self._expanded(list(found), reader) if self._keys else found:
            if waiting is not None:
                yield waiting
            # The last one is known when there are no more.
            waiting = each._replace(previous=self._previous(each, reader), last=False)
        if waiting is not None:
            yield waiting._replace(last=True)

    def _expanded(self, changes: list[Change], reader: Reader) -> Iterator[Change]:
        """Each key once: those that the ranges held, in order by table, and then what the commit did to keys."""
        ranges: dict[int, list[Change]] = {}
        keys = [change for change in changes if change.kind != "delete_range"]
        for change in changes[: len(changes) - len(keys)]:
            ranges.setdefault(change.table, []).append(change)
        own = {(change.table, change.key) for change in keys}
        for table, deleted in ranges.items():
            before = Seqno(deleted[0].seqno - 1)
            for bounds in disjoint(KeyRange(each.key, each.stop) for each in deleted):
                for key, value in self._held(table, bounds, before, reader):
                    if (table, key) not in own:
                        yield deleted[0]._replace(kind="delete", key=key, stop=None, previous=plain(value))
        yield from keys

    def _held(self, table: int, bounds: KeyRange, before: Seqno, reader: Reader) -> Iterator[tuple[bytes, Value]]:
        """What a range held at that moment, also what had expired and was not removed yet."""
        try:
            for found, values in self._engine.reads.part(reader.version, table).chunks(before, *bounds, reverse=False):
                reader.check()
                yield from zip(found, values, strict=True)
        except Exception:  # whatever failed: its pages may have been written over, and its log removed
            reader.check()
            raise

    def _previous(self, change: Change, reader: Reader) -> bytes | None:
        if not self._values or change.kind == "delete_range":
            return None
        if change.previous is not None:
            return change.previous
        try:
            part = self._engine.reads.part(reader.version, change.table)
            # Also one that had expired, and was not removed yet: until then it is there for who follows the feed.
            return plain(part.get(change.key, Seqno(change.seqno - 1)))
        finally:
            reader.check()
