"""The log of another process: how far it is on disk, and its commits as they get there.

Rules:
- What says that a commit is on disk is a record that verifies, with a watermark of that commit or more, wherever it
  lies; or a segment that begins after it. Both stay true whatever becomes of the record or the segment: a recovery may
  cut off what is beyond the watermark, and never what is below.
- Invariant: a commit is read after it is known to be on disk, even if it was passed on the way to where that is said.
  For what is beyond the watermark may be left behind, and its seqno given to another commit in a newer segment.
- Invariant: what is beyond the beginning of a newer segment is not read in the older one, where it was superseded. So
  a cursor looks for its segment anew once the watch has found another one, from which more may be known to be on disk.
- Nothing is written, and no log is held: what was retired meanwhile is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvwal.errors import CorruptionError
from kvwal.files import File
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log.cursor import SegmentCursor, hold_kept
from kvwal.log.reader import LogReader, place_before
from kvwal.log.record import RECORD_HEADER_BYTES, Record
from kvwal.log.run import Run
from kvwal.log.segment import SegmentHeader
from kvwal.log.walk import Place, walk

__all__ = ["FollowedCursor", "Watch"]

_CHUNK_BYTES: Final = 16 << 10
_NOTHING: Final = 1 << 64


class _Newest:
    """The newest segment, open."""

    __slots__ = ("file", "header", "place")

    def __init__(self, file: File, header: SegmentHeader, place: Place) -> None:
        self.file = file
        self.header = header
        #: How far it was walked. A record that is whole there never changes.
        self.place = place


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
        self._newest: _Newest | None = None

    def look(self) -> bool:
        """Read on; whether more of the log is on disk than before.

        Raises OSError, CorruptionError or FormatError if the newest segment cannot be read, which may come of a change
        under way: look again then.
        """
        before = self.durable
        newest = self._newest
        if newest is None:
            self._newest = newest = self._open(self._find())
        self._walk(newest)
        # Is it still the newest segment, and in its place?
        while (found := self._find()) != newest.header:
            self._newest = self._open(found)
            newest.file.close()
            newest = self._newest
            self._walk(newest)
        return self.durable > before

    @property
    def segment(self) -> SegmentHeader | None:
        """The newest segment, as it was found last."""
        return None if self._newest is None else self._newest.header

    def _find(self) -> SegmentHeader:
        chain = self._reader.chain
        first_seqno = max(chain.names(), default=None)
        if first_seqno is None:
            raise CorruptionError(segment_name(1), None, "the log has no segments")
        header = chain.header(first_seqno)
        # A segment gets its name when all before it is on disk.
        self.know(first_seqno - 1)
        return header

    def _open(self, header: SegmentHeader) -> _Newest:
        """If it was replaced meanwhile, no record will verify, and the next look finds the other one."""
        chain = self._reader.chain
        file = chain.directory.open(segment_name(header.first_seqno))
        try:
            return _Newest(file, header, place_before(chain, header, self.durable))
        except BaseException:
            file.close()
            raise

    def _walk(self, newest: _Newest) -> None:
        """Read on in a segment."""
        place = newest.place
        marker = newest.header.marker.to_bytes(4, "little")
        if newest.file.pread(RECORD_HEADER_BYTES, place.offset)[:4] != marker:
            return
        file, header = newest.file, newest.header
        ahead = Place(place.offset, place.last_seqno, place.watermark, place.time_us)
        # It hands out nothing.
        for _ in walk(file, header, header.capacity, ahead, after=_NOTHING, chunk_bytes=_CHUNK_BYTES):
            pass
        self.know(ahead.watermark)
        self.written, self.written_us = Seqno(ahead.last_seqno), ahead.time_us
        # Last: what is interrupted before is done again.
        newest.place = ahead

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
        segment: Callable[[], SegmentHeader | None],
        when_beyond: Callable[[Seqno, Callable[[], object]], Callable[[], object]],
    ) -> None:
        """FeedGap if commits beyond `after` are no longer kept. `segment`: the one that a `Watch` has found last."""
        super().__init__(reader, hold_kept(reader, after, durable()), until, durable, await_beyond, when_beyond)
        self._log = reader
        self._newest = segment
        self._found_with = segment()

    def _next(self, runs_until: int) -> Record | Run | None:
        # FeedGap if the next commit was retired.
        blamed: Exception | None = None
        while True:
            try:
                return super()._next(runs_until)
            except (CorruptionError, FileNotFoundError) as error:
                self._parts = iter(())
                self._at = None
                if self._is_over():
                    raise
                hold_kept(self._log, self.position, self._durable())
                # A segment may have been retired, or replaced, while it was read.
                if blamed is not None and str(blamed) == str(error):
                    raise
                blamed = error

    def _is_over(self) -> bool:
        return self._hold is None

    def _beyond(self, limit: Seqno, *, runs: bool) -> Iterator[Record | Run]:
        newest = self._newest()
        if newest is not self._found_with:
            self._found_with, self._at = newest, None
        return super()._beyond(limit, runs=runs)
