"""Which commits changed one key: by the key indexes of the sealed segments, and by reading the newest one.

Rules:
- What an index says is checked against the record: it may lead to another key of the same hash.
- A segment that has no valid index is read, and gets one if this log may write.
- What was read of the newest segment is kept, so that the next question reads on from there.
- There is no lock. What two threads do at once is done twice.

Invariant: an index or a table that is being changed is in no dict, so that an interruption leaves nothing half made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from heapq import merge
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar

from kvwal.errors import CorruptionError, Error, closed
from kvwal.files.names import keys_name, segment_name
from kvwal.keys import Seqno
from kvwal.log.chain import Chain, FoundSegment
from kvwal.log.fetch import fetch
from kvwal.log.intents import PUT, decode_put
from kvwal.log.kept import Kept, KeptFiles
from kvwal.log.key_table import KeyTable
from kvwal.log.keys import DamagedIndex, KeyIndex, Range, hash_of
from kvwal.log.reader import read_segment, start_of
from kvwal.log.record import COMMIT, Record
from kvwal.log.retention import Hold
from kvwal.log.segment import SegmentHeader
from kvwal.log.segments import SegmentMaker
from kvwal.log.walk import Place

_T = TypeVar("_T")

__all__ = ["KeyCursor", "KeyHistory", "KeyRecord", "Kind"]

Kind: TypeAlias = Literal["put", "delete", "range"]
"""What a commit did to a key: put it, deleted it, or deleted a range that it is in."""

# Of the heads of indexes: that of a segment of 16 MiB has 10 KiB.
_MOST_KEPT_BYTES: Final = 16 << 20
# Of tables of sealed segments: one of 16 MiB with values of 100 bytes has about 15 MiB.
_MOST_TABLE_BYTES: Final = 128 << 20


class KeyRecord(NamedTuple):
    """A commit that changed a key, and what it did to it."""

    record: Record
    kind: Kind
    value: bytes | None


def of_key(record: Record, table: int, key: bytes) -> KeyRecord | None:
    """What a commit did to a key; None: nothing. Raises as `Record.columns`."""
    if record.kind == COMMIT and (pair := decode_put(record.body)) is not None:
        return KeyRecord(record, "put", pair[1]) if not table and pair[0] == key else None
    columns = record.columns()
    keys, tables = columns.keys, columns.tables
    i = len(columns.ranges)
    # Ranges come before puts and deletes, so these have the last word.
    while key in keys[i:]:
        i = keys.index(key, i)
        if table == (0 if tables is None else tables[i]):
            if columns.ops[i] == PUT:
                return KeyRecord(record, "put", next(columns.values_of([i])))
            return KeyRecord(record, "delete", None)
        i += 1
    for i, bounds in enumerate(columns.ranges):
        if table == (0 if tables is None else tables[i]) and bounds.contains(key):
            return KeyRecord(record, "range", None)
    return None


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
        self._chain = chain
        self._maker = maker
        self._names = names
        self._hold = hold
        self._files = KeptFiles(chain.directory)
        # By first seqno.
        self._indexes: Kept[int, tuple[FoundSegment, KeyIndex]] = Kept(_MOST_KEPT_BYTES)
        # By first seqno: what was read of the newest segment, and up to where. Each change is one step of a dict.
        self._tables: dict[int, tuple[FoundSegment, KeyTable, Place]] = {}
        # By first seqno: sealed segments that were read and have no index all the same, as those of a log that is only
        # read.
        self._sealed: Kept[int, tuple[FoundSegment, KeyTable]] = Kept(_MOST_TABLE_BYTES)
        self._found_names: list[Seqno] = []
        # `make_indexes` has seen to the segments before this one.
        self._made_before = 0

    def find(self, table: int, key: bytes, after: Seqno | None, until: Seqno, *, reverse: bool) -> KeyCursor:
        """The commits beyond `after` (None: all that are kept) up to `until` that changed the key, in their order.

        With `reverse` the newest first. FeedGap if commits beyond `after` are no longer kept.
        """
        hold = self._hold(after)
        return KeyCursor(hold, self._find(self._segments(), _Asked(table, key, hold.after, until, reverse)))

    def _find(self, names: list[Seqno], asked: _Asked) -> Iterator[KeyRecord]:
        lasts = [*(name - 1 for name in names[1:]), asked.until]
        spans = [
            (first, last, i + 1 < len(names))
            for i, (first, last) in enumerate(zip(names, lasts, strict=True))
            if first <= asked.until and last > asked.after
        ]
        for span in reversed(spans) if asked.reverse else spans:
            yield from self._in_segment(*span, asked)

    def _in_segment(self, first: Seqno, last: int, sealed: bool, asked: _Asked) -> Iterator[KeyRecord]:
        found, known = self._known(first, last, sealed=sealed)
        while True:
            rows = known.rows(asked.table, asked.key, asked.after, asked.until, reverse=asked.reverse)
            try:
                for each in self._read_at(found, _with_ranges(rows, known.ranges, asked), asked):
                    yield each
                    asked = asked.behind(each.record)
                return
            except DamagedIndex as damaged:
                found, known = self._instead(found, known, damaged, last, sealed=sealed)

    def last(self, table: int, key: bytes, after: Seqno, until: Seqno) -> KeyRecord | None:
        """The newest commit beyond `after` up to `until` that changed the key, and how; None if there is none.

        The caller holds the log beyond `after`, and `until` is at most the newest commit. Raises as reading the log.
        """
        names = self._segments()
        digest = hash_of(table, key)
        for i in range(bisect_right(names, until) - 1, -1, -1):
            sealed = i + 1 < len(names)
            last = names[i + 1] - 1 if sealed else until
            if last <= after:
                break
            found, known = self._known(names[i], last, sealed=sealed)
            while True:
                try:
                    newest = self._newest_in(found, known, table, key, digest, after, until)
                except DamagedIndex as damaged:
                    found, known = self._instead(found, known, damaged, last, sealed=sealed)
                    continue
                if newest is not None:
                    return newest
                break
        return None

    def _newest_in(
        self,
        found: FoundSegment,
        known: KeyIndex | KeyTable,
        table: int,
        key: bytes,
        digest: bytes,
        after: int,
        until: int,
    ) -> KeyRecord | None:
        """What the newest of these commits did to the key that is in this segment. DamagedIndex as `_read_at`."""
        spots = known.newest(table, key, digest, after, until)
        for each in reversed(known.ranges):
            if each.seqno <= after:
                break
            if each.seqno <= until and each.table == table and each.bounds.contains(key):
                spots.append((each.seqno, each.offset, -1))
                break
        # More than one: there is a range, or another key has the same hash.
        if len(spots) > 1:
            spots.sort(reverse=True)
        for seqno, offset, _ in spots:
            newest = of_key(self._fetch(found, seqno, offset), table, key)
            if newest is not None:
                return newest
        return None

    # -- what is known of a segment ---------------------------------------------------------------

    def _segments(self) -> list[Seqno]:
        """The first seqnos of all segments, ascending."""
        if self._maker is not None:
            return self._names()
        # There is no writer, and there will be none.
        if not self._found_names:
            self._found_names = self._names()
        return self._found_names

    def _known(self, first: Seqno, last: int, *, sealed: bool) -> tuple[FoundSegment, KeyIndex | KeyTable]:
        """The index of a segment, or a table of what is in it up to `last`."""
        if sealed:
            known = self._indexes.get(first) or self._sealed.get(first) or self._index(first, last)
            if known is not None:
                return known
        return self._table(first, last, sealed=sealed)

    def _instead(
        self, found: FoundSegment, known: KeyIndex | KeyTable, damaged: DamagedIndex, last: int, *, sealed: bool
    ) -> tuple[FoundSegment, KeyTable]:
        """A table in place of an index that is damaged. CorruptionError if it was a table: so the record is."""
        if isinstance(known, KeyTable):
            raise CorruptionError(found.name, damaged.args[0], "the record does not verify any more") from None
        self._indexes.drop(found.first_seqno)
        return self._table(found.first_seqno, last, sealed=sealed)

    def _table(self, first: Seqno, last: int, *, sealed: bool) -> tuple[FoundSegment, KeyTable]:
        """What is in a segment up to `last`. It is read, unless that was kept."""
        kept = self._tables.get(first)
        if kept is not None and kept[2].last_seqno >= last and not sealed:
            return kept[:2]
        found = _returned(self._reading(first, last, sealed=sealed))
        if sealed and self._index(first, last) is None:
            self._sealed.put(first, found, found[1].size())
        return found

    def _index(self, first: Seqno, last: int) -> tuple[FoundSegment, KeyIndex] | None:
        """The valid index of a sealed segment, if there is one."""
        kept = self._indexes.get(first)
        if kept is not None:
            return kept
        found = self._chain.load(first)
        if not isinstance(found.header, SegmentHeader):
            return None  # Reading the segment says why.
        index = KeyIndex.load(self._files, found.known, last)
        if index is None:
            return None
        self._indexes.put(first, (found, index), index.size)
        return found, index

    def _reading(
        self, first: Seqno, last: int, *, sealed: bool
    ) -> Generator[None, None, tuple[FoundSegment, KeyTable]]:
        """Read a segment up to `last`, in steps, and write its index if it is sealed."""
        kept = self._tables.pop(first, None)
        if kept is None:
            header = self._chain.header(first)
            kept = self._chain.load(first), KeyTable(header), start_of(header)
        found, known, place = kept
        if place.last_seqno < last:
            yield from known.extend(read_segment(self._chain, found, place, until=last))
        if not sealed:
            self._tables[first] = kept
            for other in list(self._tables):
                if other < first:
                    self._tables.pop(other, None)
        elif self._maker is not None and known.fits():
            # Durability: derived. It is not flushed, and what a crash leaves of it does not verify.
            pieces = known.encode(found.known, last)
            yield from self._maker.write_derived(first, keys_name(first), pieces)
        return found, known

    def _read_at(
        self, found: FoundSegment, places: Iterator[tuple[int, int]], asked: _Asked
    ) -> Iterator[KeyRecord]:
        """What the commits at these places did to the key. DamagedIndex, with the offset, if there is none."""
        for seqno, offset in places:
            each = of_key(self._fetch(found, seqno, offset), asked.table, asked.key)
            if each is not None:
                yield each

    def _fetch(self, found: FoundSegment, seqno: int, offset: int) -> Record:
        """The commit at this place. DamagedIndex, with the offset, if there is none."""
        record = fetch(self._files.open(found.name), found, seqno, offset)
        if record is None:
            raise DamagedIndex(offset)
        return record

    def forget(self, first: Seqno) -> None:
        """Let go of a segment, which is to be removed."""
        self._indexes.drop(first)
        self._sealed.drop(first)
        self._files.close(segment_name(first))
        self._files.close(keys_name(first))

    def close(self) -> None:
        """Let go of all files. What asks nevertheless opens some again. Idempotent, takes no lock."""
        self._files.close_all()

    # -- indexes made ahead of time -------------------------------------------------------------

    def lacks_indexes(self) -> bool:
        """Whether segments were sealed that `make_indexes` has not seen to."""
        return self._made_before < self._names()[-1]

    def make_indexes(self) -> Generator[None, None, None]:
        """Make the indexes that are missing, in steps of a fraction of a millisecond. Fails silently.

        A segment of which that fails is read when it is asked for, which says what is wrong.
        """
        names = self._names()
        for first, following in pairwise(names):
            if first < self._made_before:
                continue
            try:
                if self._index(first, following - 1) is None:
                    yield from self._reading(first, following - 1, sealed=True)
            except (OSError, Error):
                pass
            self._made_before = following
        self._made_before = names[-1]


def _returned(steps: Generator[None, None, _T]) -> _T:
    """What steps come to when all are done."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: _T = done.value
            return result


def _with_ranges(
    rows: Iterator[tuple[int, int]], ranges: Sequence[Range], asked: _Asked
) -> Iterator[tuple[int, int]]:
    """Where rows lead to, and the ranges that the key is in; each commit once."""
    covering = [
        (each.seqno, each.offset)
        for each in ranges
        if each.table == asked.table and asked.after < each.seqno <= asked.until and each.bounds.contains(asked.key)
    ]
    if not covering:
        yield from rows
        return
    if asked.reverse:
        covering.reverse()
    last = None
    for place in merge(rows, covering, reverse=asked.reverse):
        if place != last:
            yield place
        last = place
