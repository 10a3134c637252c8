"""Reading the log from a commit on, a little at a time, while a writer appends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

from kvwal.errors import closed
from kvwal.keys import Seqno
from kvwal.log.chain import FoundSegment, no_segments
from kvwal.log.reader import LogReader, pass_over_mark, place_before
from kvwal.log.record import Record
from kvwal.log.retention import Hold, refuse_gap
from kvwal.log.run import Run
from kvwal.log.segment import SegmentHeader
from kvwal.log.walk import CHUNK_BYTES, Place, Stop, walk_parts

__all__ = ["SegmentCursor", "hold_kept", "read_kept"]

# Up to this number of commits behind the last one are read with a small chunk: a large one is mostly unused space.
_NEAR: Final = 32
_SMALL_CHUNK_BYTES: Final = 16 << 10
# Commits from memory after which what was read is let go of.
_HELD: Final = 64


def _never(seqno: Seqno, timeout_s: float | None) -> bool:
    """Wait for a commit of a log that nothing is appended to."""
    del seqno, timeout_s
    return False


def read_kept(reader: LogReader, after: Seqno | None, until: Seqno) -> SegmentCursor:
    """The commits beyond `after` (None: all there are) up to `until`, of a log that no writer has open.

    FeedGap if commits beyond `after` are no longer kept.
    """
    return SegmentCursor(reader, hold_kept(reader, after, until), until, lambda: until, _never)


def hold_kept(
    reader: LogReader, after: Seqno | None, newest: Seqno, refuse: Callable[[], object] = lambda: None
) -> Hold:
    """The hold of what reads such a log from `after` on (None: all there is). FeedGap as `read_kept`.

    `refuse`: raises if the log may be another store's, or gone with its store.
    """
    names = reader.chain.names()
    refuse()
    if not names:
        raise no_segments()
    oldest = Seqno(names[0] - 1)
    after = oldest if after is None else after
    if after < oldest:
        refuse_gap(after, oldest, reader.segments(), newest, None)
    return Hold({}, 0, after)


class SegmentCursor:
    """A place in the log from which reading goes on; see `kvwal.log.protocol.LogCursor`.

    It walks the segment from where it stopped. Only when that does not lead to the next commit it looks for the segment
    anew, and then reads as recovery does, which says what is wrong.
    """

    def __init__(
        self,
        reader: LogReader,
        hold: Hold,
        until: Seqno | None,
        durable: Callable[[], Seqno],
        await_beyond: Callable[[Seqno, float | None], bool],
        when_beyond: Callable[[Seqno, Callable[[], object]], Callable[[], object]] | None = None,
        recent: Callable[[int], Record | None] | None = None,
        newest: Callable[[], SegmentHeader | None] = lambda: None,
    ) -> None:
        """`recent`: gives a commit that is in memory; None: none is. `newest`: the newest segment, if that changes."""
        self._reader = reader
        self._hold: Hold | None = hold
        self._until = until
        self._durable = durable
        self._await_beyond = await_beyond
        self._when_beyond = when_beyond
        self._recent = recent
        self._newest = newest
        self._found_with = newest()
        #: The last commit that was handed out, or the one it began after.
        self.position = hold.after
        # The segment, the last commit in it if it has a successor, and how far it was walked.
        self._at: tuple[FoundSegment, int | None, Place] | None = None
        # The last commit that was in memory, if it is beyond that.
        self._passed: Record | None = None
        self._parts: Iterator[Record | Run] = iter(())
        self._exhausted = False

    def __iter__(self) -> SegmentCursor:
        return self

    def __next__(self) -> Record:
        """The next commit. StopIteration if there is none yet: asked again later, it goes on.

        Raises CorruptionError, FormatError or OSError as reading the log does, ClosedError after `close`.
        """
        record = self._next(0)
        if record is None:
            raise StopIteration
        assert isinstance(record, Record), "who takes parts takes all as parts"
        self.position = record.seqno
        return record

    def next_part(self, runs_until: Seqno) -> Record | Run | None:
        """The next commit or run; None if there is none yet. No run goes beyond `runs_until`. Raises as `__next__`."""
        part = self._next(runs_until)
        if part is not None:
            self.position = part.seqno if isinstance(part, Record) else part.seqnos[-1]
        return part

    def _next(self, runs_until: int) -> Record | Run | None:
        if self._exhausted:
            return None
        hold = self._hold
        if hold is None:
            raise closed("cursor")
        part = next(self._parts, None)
        if part is None:
            limit = self._durable() if self._until is None else self._until
            record = None
            if self._recent is not None and self.position < limit:
                record = self._recent(self.position + 1)
            if record is None or not record.seqno % _HELD:
                # One that is never at the end holds little all the same.
                hold.advance(self.position)
            if record is None:
                # With runs at first only as far as those may go.
                runs = self.position < runs_until
                self._parts = self._beyond(Seqno(min(limit, runs_until)) if runs else limit, runs=runs)
                part = next(self._parts, None)
            else:
                part = self._passed = record
        if part is None and self._until is not None:
            self._exhausted = True
            self.close()
        return part

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until there is a commit beyond `position`, at most so long (None: for ever); whether there is one.

        PoisonedError if there is none, and the log takes no more.
        """
        if self._hold is None:
            raise closed("cursor")
        if self._until is not None:
            return self.position < self._until
        return self._await_beyond(self.position, timeout_s)

    def when_beyond(self, wake: Callable[[], object]) -> Callable[[], object]:
        """Have `wake` called when waiting would end, by the thread that ends it. Returns what takes that back.

        Raises as `wait`.
        """
        if self._hold is None:
            raise closed("cursor")
        assert self._when_beyond is not None, "nothing is appended to this log"
        return self._when_beyond(self.position, wake)

    def close(self) -> None:
        """Let go of the log that it holds. Idempotent."""
        hold, self._hold = self._hold, None
        self._parts = iter(())
        if hold is not None:
            hold.release()

    def __enter__(self) -> SegmentCursor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beyond(self, limit: Seqno, *, runs: bool) -> Iterator[Record | Run]:
        """The commits from the position to `limit`, which the log has."""
        newest = self._newest()
        if newest is not self._found_with:
            # Invariant: what a segment holds beyond the beginning of the next one is superseded. Commits up to `limit`,
            # which was known before, are in this newest segment or before it.
            self._found_with, self._at = newest, None
        self._pass()
        while self.position < limit:
            found_now = self._at is None
            if self._at is None:
                self._at = self._find()
            segment, last, place = self._at
            until = limit if last is None else min(limit, last)
            try:
                file = self._reader.chain.open(segment)
            except FileNotFoundError:
                if found_now:
                    raise
                # All of it was read, so it could be retired; what comes next is in another one.
                self._at = None
                continue
            try:
                is_near = not found_now and until - self.position <= _NEAR
                while True:
                    yield from walk_parts(
                        file,
                        segment.known,
                        segment.limit,
                        place,
                        after=self.position,
                        until=until,
                        runs=runs,
                        chunk_bytes=_SMALL_CHUNK_BYTES if is_near else CHUNK_BYTES,
                    )
                    # Not where more may have come since: there it is looked for anew first.
                    if place.stop is Stop.REACHED or not found_now or not pass_over_mark(file, segment, place):
                        break
            finally:
                file.close()
            if place.stop is not Stop.REACHED:
                self._at = None
                if found_now:
                    yield from self._judged(limit)
                    return
            elif place.last_seqno == last:
                self._at = None
            if self._hold is not None:
                self._hold.advance(self.position)

    def _pass(self) -> None:
        """Go on behind what was in memory."""
        passed, self._passed = self._passed, None
        if passed is not None and self._at is not None:
            found, _, place = self._at
            segment, offset = passed.position
            if found.first_seqno == segment:
                # Interrupted in between, the walk is in disorder, and the segment is looked for anew.
                place.offset, place.last_seqno = offset + passed.size, passed.seqno
            else:
                self._at = None

    def _find(self) -> tuple[FoundSegment, int | None, Place]:
        """The segment with the commit behind the position, and where in it to begin."""
        chain = self._reader.chain
        names = chain.names()
        i = bisect_right(names, self.position + 1) - 1
        if i < 0:
            # Raises what is wrong.
            names = chain.beyond(self.position)[0]
            i = bisect_right(names, self.position + 1) - 1
        segment = chain.load(names[i])
        if not isinstance(segment.header, SegmentHeader):
            # Looked at once more: it raises what is wrong.
            chain.header(names[i])
            segment = chain.load(names[i])
        last = names[i + 1] - 1 if i + 1 < len(names) else None
        return segment, last, place_before(chain, segment.known, self.position)

    def _judged(self, limit: Seqno) -> Iterator[Record]:
        for record in self._reader.replay(self.position, limit):
            if record.seqno > limit:
                return
            yield record
