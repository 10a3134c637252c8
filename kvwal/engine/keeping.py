"""What of the past a store keeps: bases, and the log behind the oldest one.

The *window* is the moments that can be read: it begins with a base and has no gap up to now. A store that was made
empty, and whose log has its first commit, begins with a base that takes no page: no keys.

Rules:
- A checkpoint makes a base when enough log was written since the last one (`_distance`): a read of a past moment
  looks at the log from the base before it on, and a base holds the pages that were freed since.
- The window begins with the newest base that leaves `keep_history_s` readable, and later if bases and log would
  take more than `keep_history_bytes`. Only what recovery does not need is counted.
- Age is judged by wall clocks, and a wall clock may be wrong. A base is as young as the later of its wall clock and the
  time of its commit, which never goes back: what a clock that was set back made is not taken for old. What the clock
  says *now* is believed as `StoreClock` says (log/clock.py).
- On a full disk the window is shortened from base to base.

Invariant: the log beyond the oldest base is held. The hold moves on only when the meta without the bases before it is
durable, or when they were given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from kvwal.errors import FeedGap
from kvwal.keys import Seqno
from kvwal.log import SegmentCursor, SegmentLog, unneeded_bytes
from kvwal.options import Options
from kvwal.pages import BEGINNING, WINDOW, Base, Keep, PageFile

__all__ = ["Keeping"]

# Without a limit of the user's: the least of these, and a tenth of the free space.
_MOST_BYTES: Final = 256 << 20
_LEAST_BYTES: Final = 16 << 20
_FREE_SHARE: Final = 10
# Bases are further apart than this many times the pages: each may hold as much as all of them.
_TREES: Final = 5
# But in what is kept there are a few.
_BASES: Final = 4


class Keeping:
    """The bases of one open store. One checkpoint at a time changes them; looked at from any thread."""

    def __init__(
        self,
        pages: PageFile,
        log: SegmentLog | None,
        hold: Callable[[Seqno | None, str], SegmentCursor],
        free_bytes: Callable[[], int],
        options: Options,
    ) -> None:
        """Hold the log behind the oldest base, before anything may be retired.

        Args:
            log: None for a store opened read-only.
            hold: holds the log beyond a commit (None: all of it), for a purpose, until what it returns is closed or
                collected. FeedGap if some of it is gone.
        """
        self._pages = pages
        self._log = log
        #: As the argument.
        self.hold = hold
        self._free_bytes = free_bytes
        self._keep_us = int(min(options.keep_history_s * 1e6, 1 << 62))
        self._keep_bytes = options.keep_history_bytes
        self._is_on = options.keeps_history
        self._base_bytes = options.history_base_bytes
        # Bases before this one are not used, though they may be there; and from which one on that is so after the next
        # checkpoint.
        self._oldest = self._next_oldest = Seqno(0)
        # When the last base was given up on a full disk: the newest commit then.
        self._given_up: Seqno | None = None
        self._held: SegmentCursor | None = None
        #: Those that the window has, ascending: it begins with the first.
        self.bases: Sequence[Base] = ()
        self.refresh()

    def refresh(self) -> None:
        """Go on from the bases that the newest meta has."""
        if isinstance(self._pages.bases.damage, OSError):
            # They may be there all the same: the next checkpoint reads them again.
            self.bases, self._held = (), self.hold(None, "window")
            return
        bases: list[Base] = []
        if self._log is None or self._is_on:
            self._oldest = max(self._oldest, self._next_oldest)
            bases += (
                base
                for base in (BEGINNING, *self._pages.bases.all())
                if base.flags & WINDOW and base.seqno >= self._oldest
            )
        held = None
        for i, base in enumerate(bases):
            try:
                held = self.hold(base.seqno, "window")
            except FeedGap:
                continue
            bases = bases[i:]
            break
        else:
            bases = []
        self.bases = tuple(bases)
        # The one before is let go of when it is collected, after this one is there.
        self._held = held

    def lacks_base(self) -> bool:
        """Whether a past is to be kept, but none is before the next checkpoint, as in a store that was restored."""
        return self._is_on and not self.bases and self._given_up is None and self._pages.bases.damage is None

    def has_space(self, size: int) -> bool:
        """Whether the disk has this number of bytes free."""
        try:
            return self._free_bytes() >= size
        except OSError:
            return False

    def plan(self, seqno: Seqno) -> tuple[Keep | None, list[int]]:
        """Whether the next generation, which has this seqno, is to be a base; and which bases go, by generation.

        Those are no longer asked for from now on. OSError if they could not be read, and cannot be now.
        """
        if isinstance(self._pages.bases.damage, OSError):
            self._pages.bases.read()
            self.refresh()
        staying: Sequence[Base] = ()
        keep = None
        if self._is_on:
            most = self._most_bytes()
            staying = self._staying(most)
            last = staying[-1].seqno if staying else self._given_up
            if last is None or (seqno > last and self._log_bytes_since(last) >= self._distance(most)):
                keep = Keep()
            # Without one the window is empty until there is a new one, which is newer than all that was.
            self._next_oldest = staying[0].seqno if staying else self._pages.meta.seqno
        self.bases = staying
        stay = {base.generation for base in staying}
        return keep, [
            base.generation
            for base in self._pages.bases.all()
            if base.flags == WINDOW and base.generation not in stay
        ]

    def shorten(self) -> bool:
        """Give up the oldest base, and let go of the log behind it. False if there is none, or it holds nothing.

        Its pages stay until the next checkpoint. Those of the last one are not kept again before there is as much log
        as between two bases.
        """
        bases = self.bases
        if self._log is None or not self.held_bytes():
            return False
        later = [base.seqno for base in bases if base.seqno > bases[0].seqno]
        if later:
            self._oldest = later[0]
        else:
            self._oldest = self._given_up = Seqno(self._log.last_seqno + 1)
        self.refresh()
        return True

    def held_bytes(self) -> int:
        """What only the window holds: pages that only bases reach, and log that recovery does not need."""
        return self._held_bytes(self.bases) if self.bases else 0

    def _staying(self, most: int) -> Sequence[Base]:
        assert self._log is not None
        bases = self.bases
        young_us = self._log.clock.now_us() - self._keep_us
        first = 0
        for i in range(len(bases) - 1, 0, -1):
            if max(bases[i].wall_us, bases[i].time_us) <= young_us:
                first = i
                break
        while first < len(bases) and self._held_bytes(bases[first:]) > most:
            first += 1
        return bases[first:]

    def _held_bytes(self, bases: Sequence[Base]) -> int:
        """The same if the window began with the first of these."""
        gone = sum(base.held_bytes for base in self._pages.bases.all() if base.seqno <= bases[0].seqno)
        pages = self._pages.bases.held_bytes() - gone
        return pages + self.held_log_bytes(bases[0].seqno)

    def held_log_bytes(self, after: Seqno) -> int:
        """What the log beyond a commit takes that recovery does not need."""
        older = self._pages.older
        return 0 if older is None else self._log_bytes(after, older.seqno)

    def log_bytes_before(self, after: Seqno) -> int:
        """What the log beyond a commit takes that neither the window nor recovery needs."""
        older = self._pages.older
        needed = [base.seqno for base in self.bases[:1]] + ([older.seqno] if older is not None else [])
        return self._log_bytes(after, min(needed)) if needed else 0

    def _log_bytes(self, after: Seqno, until: Seqno) -> int:
        return 0 if self._log is None else unneeded_bytes(self._log.segments(with_indexes=True), after, until)

    def _log_bytes_since(self, seqno: Seqno) -> int:
        assert self._log is not None
        return sum(segment.size for segment in self._log.segments() if segment.first_seqno > seqno)

    def _most_bytes(self) -> int:
        if self._keep_bytes is not None:
            return self._keep_bytes
        try:
            free_bytes = self._free_bytes()
        except OSError:
            # A checkpoint does not fail for that.
            free_bytes = _MOST_BYTES
        return min(_MOST_BYTES, free_bytes // _FREE_SHARE, max(_LEAST_BYTES, self._data_bytes()))

    def _data_bytes(self) -> int:
        """What the newest generation takes: neither what only bases reach, nor what they left free in the file."""
        return self._pages.space.reached_bytes(self._pages.meta) - self._pages.bases.held_bytes()

    def _distance(self, most: int) -> int:
        return min(max(self._base_bytes, _TREES * self._data_bytes()), most // _BASES)
