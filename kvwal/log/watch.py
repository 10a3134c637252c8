"""The log of another process: how far it is on disk, and its commits as they get there.

Rules:
- What says that a commit is on disk is a record that verifies, with a watermark of that commit or more, wherever it
  lies; or a segment that begins after it. Both stay true whatever becomes of the record or the segment: a recovery may
  cut off what is beyond the watermark, and never what is below.
- Invariant: a commit is told after it is known to be on disk: by a record behind it in its segment, or elsewhere, and
  then its segment was the newest one after it was read. What is beyond may be left behind, and its seqno given to
  another commit in a newer segment: so what was passed in one that is no longer the newest is dropped, and read anew.
- Invariant: what is beyond the beginning of a newer segment is not read in the older one, where it was superseded. So
  a cursor looks for its segment anew once the watch has found another one, from which more may be known to be on disk.
- Where the newest segment does not go on, the tables of recovery (tail.py) say whether it may end there. What they call
  damage is damage, what they pass over is passed over, and what they cut off is waited for.
- Invariant: damage is a place at which reading stopped twice, the second time after what says so was read. So it was
  whole by then, if it ever was: a record is on disk before another one says so.
- A look reads a bounded amount where nothing was written. A segment is written in order, and no byte of it twice. So
  once the bytes behind a place were examined, nothing is new before there is another one behind them that is not zero.
- The exception: in place of the first record of a write that was refused its writer makes a mark. So where nothing is
  new for some looks, what is not known to be on disk is looked at again.
- Nothing is written, and no log is held: what was retired meanwhile is gone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from kvwal.errors import CorruptionError, FormatError
from kvwal.files import File
from kvwal.keys import Seqno
from kvwal.log.chain import FoundSegment
from kvwal.log.cursor import SegmentCursor, hold_kept
from kvwal.log.reader import LogReader, gather, start_in
from kvwal.log.record import Record
from kvwal.log.run import Run
from kvwal.log.segment import SegmentHeader
from kvwal.log.tail import TailRow, Verdict, describe, failure, judge
from kvwal.log.walk import Place, Readable, Stop, in_order, mark_at, walk_parts, without_zeros

__all__ = ["FollowedCursor", "Heard", "Tell", "Watch"]

#: What gets commits that are on disk.
Tell: TypeAlias = Callable[[Record | Run], object]

_CHUNK_BYTES: Final = 16 << 10
# What one look reads further behind, in turns through all that is left of the segment.
_SWEEP_BYTES: Final = 64 << 10
_ZEROS: Final = bytes(_SWEEP_BYTES)
# Of a record that is larger than a chunk, what is looked at to tell whether all of it was written.
_LAST_BYTES: Final = 4096
# Bytes behind one place are examined at most twice in a row, and then after 2, 4 and at last this number of looks.
_MOST_PAUSE: Final = 64
# What is not known to be on disk is looked at again after this number of looks that found nothing new, after twice as
# many, and at last after the number above.
_FIRST_DOUBT: Final = 4
# Then at most this number of records are looked at.
_MOST_HEADERS: Final = 4096
# In one look a segment is walked at most this number of times, and its end judged.
_MOST_STEPS: Final = 4


class Heard(NamedTuple):
    """What a writer says: a commit that is on disk, the newest segment, which has it or comes after it, its session."""

    durable: int
    segment: int
    salt: int
    session: int

    def is_newest(self, header: SegmentHeader) -> bool:
        """Whether it says so of this segment."""
        return (header.first_seqno, header.salt) == (self.segment, self.salt)


class _Newest:
    """The newest segment, open."""

    __slots__ = ("examined", "file", "found", "passed", "pause", "place", "seen", "swept", "wait")

    def __init__(self, file: File, found: FoundSegment, place: Place) -> None:
        self.file = file
        self.found = found
        #: How far it was walked. A record that is whole there never changes.
        self.place = place
        #: Where the last byte ends that is not zero, as far as it was looked at.
        self.seen = 0
        #: All up to here was examined: it is no record in order, and may be there.
        self.examined = 0
        #: How far the rest was looked at for something that is not zero.
        self.swept = 0
        #: Looks until the same place is examined again, and how many those were the last time.
        self.wait = self.pause = 0
        #: The last commits before the place, in order, which are still to be told.
        self.passed: deque[Record | Run] = deque()

    @property
    def end(self) -> int:
        """Behind this there was nothing."""
        return max(self.place.offset, self.examined)

    @property
    def is_due(self) -> bool:
        """Whether there is something behind what was walked and examined, in a segment that may go on."""
        return self.place.stop is not Stop.CLOSED and self.seen > self.end


class _Arrived:
    """A file of which the rest of a large record is read only where the end of the record was written.

    One that ends with many zeros is left to what examines.
    """

    __slots__ = ("_file",)

    def __init__(self, file: File) -> None:
        self._file = file

    def pread(self, size: int, offset: int) -> bytes:
        """As `File.pread`."""
        last = min(size, _LAST_BYTES)
        if size > _CHUNK_BYTES and not any(self._file.pread(last, offset + size - last)):
            return b""
        return self._file.pread(size, offset)


def _told(passed: deque[Record | Run], durable: int, tell: Tell) -> None:
    """Tell of the first ones, up to this commit, and take them away: each after it was told."""
    while passed:
        part = passed[0]
        if isinstance(part, Run) and part.seqnos[0] <= durable < part.seqnos[-1]:
            on_disk = durable + 1 - part.seqnos[0]
            tell(part.part(0, on_disk))
            passed[0] = part.part(on_disk)
            return
        if (part.seqno if isinstance(part, Record) else part.seqnos[0]) > durable:
            return
        tell(part)
        passed.popleft()


class Watch:
    """How far a log is on disk, as its files say. For one thread at a time."""

    def __init__(self, reader: LogReader, durable: Seqno) -> None:
        """`durable`: a commit that is known to be on disk from elsewhere."""
        self._reader = reader
        #: The last commit that is on disk for sure.
        self.durable = durable
        #: The last commit that was found, and its time (microseconds since 1970 UTC).
        self.written = durable
        self.written_us = 0
        #: Whether `written` and `durable` have all that had been written when the last look of all there is began.
        self.saw_all = False
        self._newest: _Newest | None = None
        # What was heard last.
        self._heard: Heard | None = None
        # How far the newest segment was walked, and was on disk, as of the last look; how many looks found it so, and
        # after how many of them what is not known to be on disk is looked at again.
        self._stands: tuple[int, Seqno] | None = None
        self._looks, self._doubts_at = 0, _FIRST_DOUBT
        # Where that ended last, and the last commit before it; None: it begins with the first one.
        self._looked_to: tuple[int, int] | None = None

    def look(self, tell: Tell | None = None, heard: Heard | None = None, *, in_short: bool = False) -> bool:
        """Read on; whether all that there is was looked at. The first look reads as recovery does.

        `tell` gets what was passed and is on disk, in order. It may miss some, and get some again.
        `heard`: what a writer says that has opened the store, from before this look. If the commit is not found, it is
        of files that are gone, and `durable` stays below. `in_short`: if this says that the segment was the newest one,
        it is not looked whether there is a newer one by now.
        Raises OSError, CorruptionError or FormatError if the newest segment cannot be read, is damaged, or is newer
        than this version, which may come of a change under way: look again then.
        """
        if heard is not None:
            self._heard = heard
        newest = self._newest
        if newest is None:
            newest = self._open(self._find())
            # All of it is examined.
            newest.seen = newest.found.known.capacity
            self._newest = newest
        went_on = self._walk(newest, tell)
        if in_short and tell is not None and not newest.is_due and heard is not None and self._confirms(newest, heard):
            # For commits up to this one it was.
            self.know(heard.durable)
            _told(newest.passed, heard.durable, tell)
            return False
        # Is it still the newest segment, and in its place?
        while (found := self._find()).known != newest.found.known:
            self._newest = self._open(found)
            newest.file.close()
            newest = self._newest
            went_on = self._walk(newest, tell)
        if heard is not None:
            self._believe(newest, heard, tell)
        self.saw_all = False
        if tell is not None:
            _told(newest.passed, self.durable, tell)
        self._examine(newest, tell)
        self.saw_all = went_on or not newest.is_due
        return True

    def _doubts(self, newest: _Newest) -> bool:
        """Whether to look again at what is not known to be on disk: its writer may have unmade it."""
        place, stands = newest.place, (newest.place.offset, self.durable)
        if stands != self._stands or max(place.last_seqno - self.durable, newest.examined - place.offset) <= 0:
            self._stands, self._looks, self._doubts_at, self._looked_to = stands, 0, _FIRST_DOUBT, None
            return False
        self._looks += 1
        if self._looks < self._doubts_at:
            return False
        self._looks, self._doubts_at = 0, min(2 * self._doubts_at, _MOST_PAUSE)
        return True

    @staticmethod
    def _confirms(newest: _Newest, heard: Heard) -> bool:
        return heard.is_newest(newest.found.known) and newest.place.last_seqno >= heard.durable

    def _believe(self, newest: _Newest, heard: Heard, tell: Tell | None) -> None:
        """Know what a writer says to be on disk, if it is there. What it had written is found whole, if it lives."""
        if newest.place.last_seqno < heard.durable and newest.is_due:
            # With a large record, whatever it ends with.
            self._step(newest, newest.file, tell)
        if newest.place.last_seqno >= heard.durable:
            self.know(heard.durable)
        else:
            self._heard = None

    @property
    def segment(self) -> SegmentHeader | None:
        """The newest segment, as it was found last."""
        return None if self._newest is None else self._newest.found.known

    @property
    def last(self) -> Seqno:
        """The last commit in order in the newest segment, or before that."""
        return self.durable if self._newest is None else Seqno(self._newest.place.last_seqno)

    @property
    def is_sure(self) -> bool:
        """Whether all that was seen behind the last record in order has been judged: nothing there is waited with."""
        return self._newest is not None and not self._newest.is_due

    def _find(self) -> FoundSegment:
        # And what it says of the next: there is none, or this looks again.
        found = self._reader.chain.newest()
        # A segment gets its name when all before it is on disk.
        self.know(found.first_seqno - 1)
        return found

    def _open(self, found: FoundSegment) -> _Newest:
        """If it was replaced meanwhile, no record will verify, and the next look finds the other one."""
        chain = self._reader.chain
        heard = self._heard
        if heard is None or not (found.known.session == heard.session or heard.is_newest(found.known)):
            # Durability: before what it says is believed. A writer that is heard has flushed the names that its
            # recovery found and gave; and one that it gives later says only what the segments before it have on disk.
            self._reader.flush_names()
        place = start_in(chain, found, self.durable)
        return _Newest(chain.open(found), found, place)

    def _walk(self, newest: _Newest, tell: Tell | None) -> bool:
        """Read on in a segment; whether it went on where it had stopped, in a record that was under way.

        All that had been written before is in front of that one, since a segment is written in order.
        """
        if not newest.is_due:
            self._look_behind(newest)
        # A write that is under way is over when it is looked at again.
        for _ in range(2):
            offset = newest.place.offset
            if newest.is_due:
                self._step(newest, _Arrived(newest.file), tell)
            if newest.place.offset == offset:
                return False
        return True

    def _look_behind(self, newest: _Newest) -> None:
        """Look for something that was not there, at once behind the end, and in the next part of what is left."""
        near = newest.end + _CHUNK_BYTES
        self._see(newest, newest.end, _CHUNK_BYTES)
        if newest.is_due:
            return
        if self._doubts(newest):
            self._look_again(newest)
        else:
            begin = max(newest.swept, near)
            if begin >= newest.found.known.capacity:
                begin = near
            self._see(newest, begin, _SWEEP_BYTES)
            newest.swept = begin + _SWEEP_BYTES

    def _look_again(self, newest: _Newest) -> None:
        """Read on from what is known to be on disk, if what was read behind that is not there any more."""
        place, file, header = newest.place, newest.file, newest.found.known
        if place.last_seqno > self.durable:
            place = start_in(self._reader.chain, newest.found, self.durable)
            for _ in walk_parts(file, header, header.capacity, place, until=self.durable, chunk_bytes=_CHUNK_BYTES):
                pass
            stop, begin = newest.place.offset, self._looked_to or (place.offset, place.last_seqno)
            found = in_order(file, header, begin[0], stop, begin[1], _MOST_HEADERS)
            self._looked_to = found if found is not None and found[0] < stop else None
            if found is not None:
                return
        elif mark_at(file, header, place.offset) is None:
            return
        newest.examined = newest.wait = newest.pause = 0
        newest.passed = deque()
        newest.place = place

    def _see(self, newest: _Newest, offset: int, size: int) -> None:
        capacity = newest.found.known.capacity
        size = min(size, capacity - offset)
        if size <= 0:
            return
        data = newest.file.pread(size, offset)
        if len(data) < size:
            # The file was cut, which is seen by what is examined.
            newest.seen = max(newest.seen, capacity)
        elif data != _ZEROS[:size]:
            newest.seen = max(newest.seen, offset + without_zeros(data))

    def _step(self, newest: _Newest, file: Readable, tell: Tell | None) -> None:
        """Walk from the place to where the records in order end."""
        place, header = newest.place, newest.found.known
        ahead = Place(place.offset, place.last_seqno, place.watermark, place.time_us)
        passed = newest.passed.copy()
        for part in walk_parts(file, header, header.capacity, ahead, chunk_bytes=_CHUNK_BYTES):
            if tell is not None:
                # It says of those before it that they are on disk.
                _told(passed, part.watermark if isinstance(part, Record) else part.watermarks[-1], tell)
                passed.append(part)
        self.know(ahead.watermark)
        self.written, self.written_us = Seqno(ahead.last_seqno), ahead.time_us
        if ahead.offset != place.offset:
            newest.wait = newest.pause = 0
        # Last: what is interrupted before is done again.
        newest.place, newest.passed = ahead, passed if tell is not None else deque()
        self._see(newest, ahead.offset, _CHUNK_BYTES)

    def _examine(self, newest: _Newest, tell: Tell | None) -> None:
        """Judge what is behind the records in order, as recovery does. Raises what it says of damage.

        Requires: the segment was the newest one after it was walked.
        """
        accused = -1
        for _ in range(_MOST_STEPS):
            place = newest.place
            if not newest.is_due:
                return
            if newest.wait:
                newest.wait -= 1
                return
            segment = newest.found._replace(size=newest.file.size())
            tail, offset = gather(newest.file, segment, place, None, self.durable)
            row, verdict = judge(tail)
            if row is TailRow.DAMAGED_MARK:
                # At the place itself if the record came meanwhile, or is whole and looked as if it were not.
                newest.place = Place(offset, place.last_seqno, place.watermark, place.time_us)
            elif verdict is Verdict.END:
                again = newest.examined >= place.offset
                newest.wait = newest.pause = min(2 * newest.pause, _MOST_PAUSE) or 1 if again else 0
                newest.examined = newest.seen = place.offset + tail.written
                return
            elif accused == place.offset:
                raise failure(row, verdict, segment.name, place.offset, describe(row, tail))
            else:
                accused = place.offset
            # With large records, whatever they end with.
            self._step(newest, newest.file, tell)

    def know(self, durable: int) -> None:
        """Another file says that this commit is on disk."""
        self.durable = Seqno(max(self.durable, durable))

    def close(self) -> None:
        """Let go of the segment."""
        newest, self._newest = self._newest, None
        if newest is not None:
            newest.file.close()


class FollowedCursor(SegmentCursor):
    """A cursor over the log of another process, which may retire what is not read yet."""

    def __init__(
        self,
        reader: LogReader,
        after: Seqno | None,
        until: Seqno | None,
        durable: Callable[[], Seqno],
        await_beyond: Callable[[Seqno, float | None], bool],
        when_beyond: Callable[[Seqno, Callable[[], object]], Callable[[], object]],
        segment: Callable[[], SegmentHeader | None],
        refuse_if_removed: Callable[[], object],
        until_still: Callable[[Callable[[], Record | Run | None]], Record | Run | None],
    ) -> None:
        """FeedGap if commits beyond `after` are no longer kept. `segment`: the one that a `Watch` has found last.

        `refuse_if_removed`: raises, after something was read, where it may be of another store, or gone with its store.
        `until_still`: gives what a function gives, once it does not fail for what is just being changed.
        """
        hold = hold_kept(reader, after, durable(), refuse_if_removed)
        super().__init__(reader, hold, until, durable, await_beyond, when_beyond, newest=segment)
        self._log = reader
        self._refuse_if_removed = refuse_if_removed
        self._until_still = until_still

    def _next(self, runs_until: int) -> Record | Run | None:
        try:
            return super()._next(runs_until)
        except (CorruptionError, FormatError, FileNotFoundError):
            if self._is_over():
                raise
            # A segment may have been retired, or replaced, while it was read.
            return self._until_still(lambda: self._next_anew(runs_until))

    def _next_anew(self, runs_until: int) -> Record | Run | None:
        self._parts = iter(())
        self._at = None
        # FeedGap if the next commit was retired.
        hold_kept(self._log, self.position, self._durable(), self._refuse_if_removed)
        return super()._next(runs_until)

    def _is_over(self) -> bool:
        return self._hold is None

    def _beyond(self, limit: Seqno, *, runs: bool) -> Iterator[Record | Run]:
        parts = super()._beyond(limit, runs=runs)
        first = next(parts, None)
        if first is None:
            return parts
        self._refuse_if_removed()
        return itertools.chain((first,), parts)

    def _find(self) -> tuple[FoundSegment, int | None, Place]:
        found = super()._find()
        self._refuse_if_removed()
        return found
