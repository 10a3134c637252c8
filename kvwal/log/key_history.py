"""Which commits changed one key: by the key indexes of the sealed segments, and by reading the newest one.

What an index says is checked against the record: it may lead to another key of the same hash.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator
from heapq import merge
from itertools import groupby, islice, pairwise
from operator import itemgetter
from typing import Final, Literal, NamedTuple, TypeAlias

from kvwal.errors import Error, SnapshotTooOld, closed
from kvwal.keys import Seqno
from kvwal.log.chain import Chain, FoundSegment
from kvwal.log.keys import DamagedIndex, Spot, hash_of
from kvwal.log.ranges import Ranges
from kvwal.log.record import Record, is_expiry
from kvwal.log.retention import Hold
from kvwal.log.segment_keys import Known, SegmentKeys, Span
from kvwal.log.segments import SegmentMaker
from kvwal.log.stretch import Stretch

__all__ = ["KeyCursor", "KeyHistory", "KeyRecord", "Kind"]

Kind: TypeAlias = Literal["put", "delete", "expire", "range"]
"""What a commit did to a key: put it, deleted it, or deleted a range that it is in."""

# In place of the number of an intent: a range of the commit.
_RANGE: Final = -1


class KeyRecord(NamedTuple):
    """A commit that changed a key, and what it did to it."""

    record: Record
    kind: Kind
    value: bytes | None


class _Asked(NamedTuple):
    """Which commits are asked for: those beyond `after` up to `until` that changed the key."""

    table: int
    key: bytes
    after: int
    until: int
    reverse: bool

    def behind(self, record: Record) -> _Asked:
        """What is left of them when this one was handed out."""
        return self._replace(until=record.seqno - 1) if self.reverse else self._replace(after=record.seqno)


class KeyCursor:
    """The commits that changed a key, one after the other. While it is open, they stay in the log.

    For one thread at a time. It ends by `close`, by an error, or when it is collected.
    """

    def __init__(self, hold: Hold, found: Iterator[KeyRecord]) -> None:
        self._hold: Hold | None = hold
        self._found = found

    def __iter__(self) -> KeyCursor:
        return self

    def __next__(self) -> KeyRecord:
        """The next one. CorruptionError, FormatError or OSError as reading the log, ClosedError after `close`."""
        if self._hold is None:
            raise closed("cursor")
        try:
            return next(self._found)
        except StopIteration:
            raise
        except BaseException:
            # The iterator beneath is over, and would say that there are no more.
            self.close()
            raise

    def close(self) -> None:
        """Let go of the log that it holds. Idempotent."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.release()


class KeyHistory:
    """Looks for the commits that changed a key in one log. Thread-safe."""

    def __init__(
        self,
        chain: Chain,
        maker: SegmentMaker | None,
        names: Callable[[], list[Seqno]],
        hold: Callable[[Seqno | None], Hold],
    ) -> None:
        """Without a maker no index is written. `names` and `hold`: of the log."""
        self._hold = hold
        self._keys = SegmentKeys(chain, maker, names)
        # `make_indexes` has seen to the segments before this one.
        self._made_before = 0

    def find(self, table: int, key: bytes, after: Seqno | None, until: Seqno, *, reverse: bool) -> KeyCursor:
        """The commits beyond `after` (None: all that are kept) up to `until` that changed the key, in their order.

        With `reverse` the newest first. FeedGap if commits beyond `after` are no longer kept.
        """
        hold = self._hold(after)
        return KeyCursor(hold, self._find(_Asked(table, key, hold.after, until, reverse)))

    def _find(self, asked: _Asked) -> Iterator[KeyRecord]:
        spans = self._spans(asked.after, asked.until)
        for span in reversed(spans) if asked.reverse else spans:
            yield from self._in_segment(span, asked)

    def _spans(self, after: int, until: int) -> list[Span]:
        """The segments that have commits beyond `after` up to `until`, oldest first."""
        names = self._keys.segments()
        if names[0] > after + 1 and after < until:
            # Never a silent gap, though the caller was to hold the log.
            raise SnapshotTooOld(after, names[0], until)
        lasts = [*(name - 1 for name in names[1:]), until]
        return [
            Span(first, last, i + 1 < len(names))
            for i, (first, last) in enumerate(zip(names, lasts, strict=True))
            if first <= until and last > after < until
        ]

    def _in_segment(self, span: Span, asked: _Asked) -> Iterator[KeyRecord]:
        known = self._keys.known(span)
        while True:
            found, keys = known
            try:
                rows = keys.rows(asked.table, asked.key, asked.after, asked.until, reverse=asked.reverse)
                spots = merge(rows, _with_key(keys.ranges, asked), reverse=asked.reverse)
                for _, of_commit in groupby(spots, itemgetter(0)):
                    each = self._first_of(found, asked.table, asked.key, list(of_commit))
                    if each is not None:
                        yield each
                        asked = asked.behind(each.record)
                return
            except DamagedIndex as damaged:
                known = self._keys.instead(known, damaged, span)

    def last(self, table: int, key: bytes, after: Seqno, until: Seqno) -> KeyRecord | None:
        """The newest commit beyond `after` up to `until` that changed the key, and how; None if there is none.

        The caller holds the log beyond `after`, and `until` is at most the newest commit. Raises as reading the log.
        """
        names = self._keys.segments()
        digest = hash_of(table, key)
        for i in range(bisect_right(names, until) - 1, -1, -1):
            sealed = i + 1 < len(names)
            last = names[i + 1] - 1 if sealed else until
            if last <= after:
                break
            span = Span(names[i], last, sealed)
            known = self._keys.known(span)
            if not known[1].may_have(digest) and not known[1].ranges:
                continue
            while True:
                try:
                    newest = self._newest_in(known, table, key, digest, after, until)
                except DamagedIndex as damaged:
                    known = self._keys.instead(known, damaged, span)
                    continue
                if newest is not None:
                    return newest
                break
        return None

    def _newest_in(
        self, known: Known, table: int, key: bytes, digest: bytes, after: int, until: int
    ) -> KeyRecord | None:
        """What the newest of these commits did to the key that is in this segment. DamagedIndex as `fetched`."""
        found, keys = known
        spots = keys.newest(table, key, digest, after, until)
        newest = keys.ranges.with_key(table, key, after, until)
        spots += ((each.seqno, each.offset, _RANGE) for each in islice(newest, 1))
        return self._first_of(found, table, key, spots)

    def _first_of(self, found: FoundSegment, table: int, key: bytes, spots: list[Spot]) -> KeyRecord | None:
        """What the newest of these did to the key; None: they are of other keys with its hash. Raises as `fetched`."""
        if len(spots) > 1:
            # Of one commit, a range comes before puts and deletes, so that these have the last word.
            spots.sort(reverse=True)
        for seqno, offset, number in spots:
            fetched = self._keys.fetched(found, seqno, offset)
            if number == _RANGE:
                return KeyRecord(fetched.record, "range", None)
            intent = fetched.intent(table, number)
            if intent is not None and intent[0] == key:
                kind: Kind = "put"
                if intent[1] is None:
                    kind = "expire" if is_expiry(fetched.record) else "delete"
                return KeyRecord(fetched.record, kind, intent[1])
        return None

    def stretches(self, table: int, after: Seqno, until: Seqno) -> list[Stretch]:
        """What the commits beyond `after` up to `until` did to a table, segment by segment, oldest first.

        As with `last`, the caller holds the log. Nothing is read yet.
        """
        return [Stretch(self._keys, span.first, table, after, until) for span in self._spans(after, until)]

    def forget(self, first: Seqno) -> None:
        """Let go of a segment, which is to be removed."""
        self._keys.forget(first)

    def close(self) -> None:
        """Let go of all files. What asks nevertheless opens some again. Idempotent, takes no lock."""
        self._keys.close()

    # -- indexes made ahead of time -------------------------------------------------------------

    def lacks_indexes(self) -> bool:
        """Whether segments were sealed that `make_indexes` has not seen to."""
        return self._made_before < self._keys.segments()[-1]

    def make_indexes(self) -> Generator[None, None, None]:
        """Make the indexes that are missing, in steps of a fraction of a millisecond. Fails silently.

        A segment of which that fails is read when it is asked for, which says what is wrong.
        """
        names = self._keys.segments()
        for first, following in pairwise(names):
            if first < self._made_before:
                continue
            span = Span(first, following - 1, sealed=True)
            try:
                if self._keys.index(span) is None:
                    yield from self._keys.indexing(span)
            except (OSError, Error):
                pass
            self._made_before = following
        self._made_before = names[-1]


def _with_key(ranges: Ranges, asked: _Asked) -> Iterable[Spot]:
    """Where the ranges are that the key is in."""
    found = ranges.with_key(asked.table, asked.key, asked.after, asked.until)
    return ((each.seqno, each.offset, _RANGE) for each in (found if asked.reverse else reversed(list(found))))
