"""What is known of the keys of each segment: by its key index, or, of one that has none, by reading it.

Rules:
- A segment that has no valid index is read, and gets one if this log may write.
- What was read of the newest segment is kept, so that the next question reads on from there.
- There is no lock. What two threads do at once is done twice.

Invariant: an index or a table that is being changed is in no dict, so that an interruption leaves nothing half made.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator
from typing import Final, NamedTuple, TypeAlias, TypeVar

from kvwal.errors import CorruptionError
from kvwal.files.names import keys_name, segment_name
from kvwal.keys import Seqno
from kvwal.log.chain import Chain, FoundSegment
from kvwal.log.cut import Cut
from kvwal.log.fetch import Fetched, fetch
from kvwal.log.kept import Kept, KeptFiles, Loaded
from kvwal.log.key_table import KeyTable
from kvwal.log.keys import DamagedIndex, KeyIndex
from kvwal.log.reader import read_parts, start_of
from kvwal.log.record import Record
from kvwal.log.segment import SegmentHeader
from kvwal.log.segments import SegmentMaker
from kvwal.log.walk import Place, Readable

_T = TypeVar("_T")

__all__ = ["Known", "SegmentKeys", "Span"]

# Of the heads of indexes: that of a segment of 16 MiB has 10 KiB, and 2 bytes a key; what comes of it takes 250 KiB.
_MOST_KEPT_BYTES: Final = 32 << 20
# Of tables of sealed segments: one of 16 MiB with values of 100 bytes has about 15 MiB.
_MOST_TABLE_BYTES: Final = 128 << 20
# Of commits with several intents that were read.
_MOST_FETCHED_BYTES: Final = 16 << 20
# Read at a time to make an index: more would be a long step.
_CHUNK_BYTES: Final = 128 << 10

Known: TypeAlias = tuple[FoundSegment, KeyIndex | KeyTable]
"""A segment, and what is asked for its keys. Each question may raise DamagedIndex: then ask `SegmentKeys.instead`."""


class Span(NamedTuple):
    """Which commits of a segment are asked for: those up to `last`, which is its last one if it is sealed."""

    first: Seqno
    last: int
    sealed: bool


class SegmentKeys:
    """Asks indexes and tables of one log. Thread-safe."""

    def __init__(self, chain: Chain, maker: SegmentMaker | None, names: Callable[[], list[Seqno]]) -> None:
        """Without a maker no index is written. `names`: of the log."""
        self._chain = chain
        self._maker = maker
        self._names = names
        #: The log's files that are kept open.
        self.files = KeptFiles(chain.directory)
        # By first seqno.
        self._indexes: Kept[int, tuple[FoundSegment, KeyIndex]] = Kept(_MOST_KEPT_BYTES)
        # By first seqno: what was read of the newest segment, and up to where. Each change is one step of a dict.
        self._tables: dict[int, tuple[FoundSegment, KeyTable, Place]] = {}
        # By first seqno: sealed segments that were read and have no index all the same, as those of a log that is only
        # read.
        self._sealed: Kept[int, tuple[FoundSegment, KeyTable]] = Kept(_MOST_TABLE_BYTES)
        # By first seqno and offset.
        self._fetched: Kept[tuple[int, int], Fetched] = Kept(_MOST_FETCHED_BYTES)
        self._found_names: list[Seqno] = []

    def segments(self) -> list[Seqno]:
        """The first seqnos of all segments, ascending."""
        if self._maker is not None:
            return self._names()
        # There is no writer, and there will be none.
        if not self._found_names:
            self._found_names = self._names()
        return self._found_names

    def span(self, first: Seqno, until: int) -> Span:
        """The span of a segment, as it is now, for questions about commits up to `until`, of which it has some."""
        names = self.segments()
        following = bisect_right(names, first)
        sealed = following < len(names)
        return Span(first, names[following] - 1 if sealed else until, sealed)

    def known(self, span: Span) -> Known:
        """The index of a segment, or a table of what is in it up to the end of the span."""
        if span.sealed:
            known = self._indexes.get(span.first) or self._sealed.get(span.first) or self.index(span)
            if known is not None:
                return known
        return self._table(span)

    def instead(self, known: Known, damaged: DamagedIndex, span: Span) -> Known:
        """A table in place of an index that is damaged. CorruptionError if it was a table: so the record is."""
        found, index = known
        if isinstance(index, KeyTable):
            raise CorruptionError(found.name, damaged.args[0], "the record does not verify any more") from None
        self._indexes.drop(span.first)
        return self._table(span)

    def index(self, span: Span) -> tuple[FoundSegment, KeyIndex] | None:
        """The valid index of a sealed segment, if there is one."""
        kept = self._indexes.get(span.first)
        if kept is not None:
            return kept
        found = self._chain.load(span.first)
        if not isinstance(found.header, SegmentHeader):
            return None  # Reading the segment says why.
        index = KeyIndex.load(self.files, found.known, span.last)
        if index is None:
            return None
        self._indexes.put(span.first, (found, index), index.size)
        return found, index

    def _table(self, span: Span) -> tuple[FoundSegment, KeyTable]:
        """What is in a segment up to the end of the span. It is read, unless that was kept."""
        kept = self._tables.get(span.first)
        if kept is not None and kept[2].last_seqno >= span.last and not span.sealed:
            return kept[:2]
        found = _returned(self._reading(span))[:2]
        if span.sealed and self.index(span) is None:
            self._sealed.put(span.first, found, found[1].size())
        return found

    def indexing(self, span: Span) -> Generator[None, None, None]:
        """Read a sealed segment, in steps of a fraction of a millisecond, and write its index."""
        _, table, is_own = yield from self._reading(span)
        if is_own:
            yield from table.freed()

    def _reading(self, span: Span) -> Generator[None, None, tuple[FoundSegment, KeyTable, bool]]:
        """Read a segment up to the end of the span, in steps, and write its index if it is sealed.

        Returns also whether the table was made anew and is in no dict, so that no other thread has it.
        """
        first = span.first
        kept = self._tables.pop(first, None)
        is_own = kept is None and span.sealed
        if kept is None:
            header = self._chain.header(first)
            kept = self._chain.load(first), KeyTable(header), start_of(header)
        found, table, place = kept
        if place.last_seqno < span.last:
            parts = read_parts(self._chain, found, place, until=span.last, chunk_bytes=_CHUNK_BYTES)
            yield from table.extend(parts)
        if not span.sealed:
            self._tables[first] = kept
            for other in list(self._tables):
                if other < first:
                    self._tables.pop(other, None)
        elif self._maker is not None and table.fits():
            # Durability: derived. It is not flushed, and what a crash leaves of it does not verify.
            pieces = table.encode(found.known, span.last)
            yield from self._maker.write_derived(first, keys_name(first), pieces)
        return found, table, is_own

    def fetched(self, found: FoundSegment, seqno: int, offset: int) -> Fetched:
        """The commit at this place. DamagedIndex, with the offset, if there is none.

        What has several intents is kept, so that it is cut once.
        """
        kept = self._fetched.get((found.first_seqno, offset))
        if kept is not None and kept.record.seqno == seqno:
            return kept
        fetched = Fetched(_fetched(self.files.open(found.name), found, seqno, offset))
        if fetched.size:
            self._fetched.put((found.first_seqno, offset), fetched, fetched.size)
        return fetched

    def cut(self, found: FoundSegment, seqno: int, offset: int, loaded: Loaded) -> Cut:
        """The same of a segment in memory, which keeps it."""
        cut = loaded.cuts.get(offset)
        if cut is None or cut.seqno != seqno:
            cut = Cut(_fetched(loaded, found, seqno, offset))
            if cut.size:
                loaded.cuts[offset] = cut
        return cut

    def forget(self, first: Seqno) -> None:
        """Let go of a segment, which is to be removed."""
        self._indexes.drop(first)
        self._sealed.drop(first)
        self.files.close(segment_name(first))
        self.files.close(keys_name(first))

    def close(self) -> None:
        """Let go of all files. What asks nevertheless opens some again. Idempotent, takes no lock."""
        self.files.close_all()


def _fetched(file: Readable, found: FoundSegment, seqno: int, offset: int) -> Record:
    record = fetch(file, found, seqno, offset)
    if record is None:
        raise DamagedIndex(offset)
    return record


def _returned(steps: Generator[None, None, _T]) -> _T:
    """What steps come to when all are done."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: _T = done.value
            return result
