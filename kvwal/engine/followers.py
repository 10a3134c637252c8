"""Followers in other processes, as the engine honours them: their pins keep pages and log from being freed.

A checkpoint looks for pins before it builds. Then each of them either is honoured, as a reader of this process is, or
is broken, that is unlinked:

- one of a generation that is not kept any more, which came too late. Its follower looks again after it has made one, so
  none that is in use is broken for this;
- one that has held something, which would be free without it, for more than `hold_s`;
- the oldest, while all together hold more than `hold_bytes`; and all that hold something, on a full disk.

One that cannot be unlinked stays honoured. Where the pins cannot be looked at, for instance since `readers/` is another
user's, all that was kept stays kept until they can be: the files grow, and no commit, checkpoint or close fails.

The first look after open has to unlink pins of before: what they need may be free for this writer, which knows only the
two newest generations. Until that is done, checkpoints write behind the end of the page file alone (`must_append`), do
not cut it, and no log goes at all.

Invariant: what a pin needs is freed only after the pin is unlinked. So a follower that finds its pin in place after a
read has read what it pinned.
Invariant: a pin that is made after this has looked is one of the two newest generations, which this checkpoint leaves
alone; the next one looks again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvwal.engine.keeping import Keeping
from kvwal.engine.stats import Pin
from kvwal.errors import FeedGap, RefusedError
from kvwal.files.names import READERS
from kvwal.keys import Seqno
from kvwal.log import SegmentCursor
from kvwal.options import Options
from kvwal.pages import PageFile
from kvwal.readers.listing import FoundPin, PinListing
from kvwal.readers.record import NO_LOG

__all__ = ["FOLLOWER", "Followers"]

_log = logging.getLogger("kvwal")

#: The purpose of what followers hold.
FOLLOWER: Final = "follower"
# Stands as the name of followers whose pins cannot be looked at.
_UNSEEN: Final = "(pins cannot be looked at)"


@dataclass(slots=True, eq=False)
class _Honoured:
    found: FoundPin
    #: What it pins; nothing of a page file that it does not follow.
    generations: frozenset[int]
    #: Holds the log that it needs.
    log: SegmentCursor | None = None
    #: Since when it holds something that would be free without it.
    since_s: float | None = None


class Followers:
    """The pins on one open store. Changed by one checkpoint at a time; listed from any thread."""

    def __init__(self, listing: PinListing, pages: PageFile, keeping: Keeping, options: Options) -> None:
        self._listing = listing
        self._pages = pages
        self._keeping = keeping
        self._hold_s = options.hold_s
        self._hold_bytes = options.hold_bytes
        self._now_s: Callable[[], float] = options.files.monotonic_s
        self._now_us: Callable[[], int] = options.files.now_us
        # By the names of their files. Replaced as a whole.
        self._honoured: dict[str, _Honoured] = {}
        # Whether a look since open has found all pins, so that those of former generations are gone or honoured.
        self._is_sure = False
        # Whether the last look failed; since when, by the wall clock, and what holds the log since.
        self._is_blind = False
        self._blind_us = 0
        self._blind_log: SegmentCursor | None = None

    def are_there(self) -> bool:
        """Whether a follower seems to have a pin. OSError if that cannot be found out."""
        return self._listing.are_there()

    @property
    def must_append(self) -> bool:
        """Whether a pin of before may need what is free: then only pages behind the end of the file may be written."""
        return self._is_blind and not self._is_sure

    def look(self) -> bool:
        """Honour the pins that there are now, and break those that are to be broken.

        False if that cannot be done, whatever the reason: then nothing that was kept is freed before it can be, and if
        it never could since open, `must_append`.
        """
        try:
            found = self._listing.look()
            if found or self._honoured or self._is_blind:
                self._honour(found)
        except OSError as error:
            self._keep_all(error)
            return False
        self._is_sure, self._is_blind, self._blind_log = True, False, None
        return True

    def _keep_all(self, error: OSError) -> None:
        # Durability: a pin that is not seen may need any of them, and log of after the older one.
        self._pages.pins.hold(self, self._pages.pins.kept(self))
        older = self._pages.older
        if self._blind_log is None and not self._is_sure:
            # A pin of before may need any of it.
            self._blind_log = self._keeping.hold(None, FOLLOWER)
        elif self._blind_log is None and older is not None:
            # Without the log behind the older one there is none to keep.
            with suppress(FeedGap):
                self._blind_log = self._keeping.hold(older.seqno, FOLLOWER)
        if not self._is_blind:
            self._is_blind, self._blind_us = True, self._now_us()
            _log.warning("pins of followers cannot be looked at, and until they can be nothing is freed: %s", error)

    def _honour(self, found: dict[str, FoundPin]) -> None:
        pages, before = self._pages, self._honoured
        honoured: dict[str, _Honoured] = {}
        broken: dict[str, str] = {}
        for name, pin in found.items():
            each = before.get(name) or _Honoured(pin, frozenset())
            record = pin.record
            if record is None and not self._is_sure:
                broken[name] = "it cannot be read, and may need what is no longer kept"
                continue
            if record is None:
                # It may be of any of them.
                each.generations |= pages.pins.kept(self)
            elif (record.store_id, record.line) == (pages.meta.store_id, pages.meta.line):
                if record.generation and not pages.pins.keeps(self, record.generation):
                    # It came too late, and its follower looks again; or it is of before this writer.
                    broken[name] = "its generation is no longer kept"
                    continue
                each.generations = frozenset({record.generation} - {0})
                if each.log is None and record.after != NO_LOG:
                    try:
                        each.log = self._keeping.hold(Seqno(record.after), FOLLOWER)
                    except FeedGap:
                        broken[name] = "the log that it needs is gone"
            each.found = pin
            honoured[name] = each
        self._note_what_they_hold(honoured)
        broken |= self._beyond_limits(honoured)
        self._break(broken, honoured)

    def _note_what_they_hold(self, honoured: dict[str, _Honoured]) -> None:
        now_s, before = self._now_s(), self._honoured
        for name, each in honoured.items():
            if each.since_s is None and (self._is_former(each) or each.found.record is None):
                each.since_s = now_s
                if name not in before:
                    # It goes on with what others held: pins that take turns hold no longer than one.
                    held = [one.since_s for one in before.values() if one.generations & each.generations]
                    each.since_s = min((since_s for since_s in held if since_s is not None), default=now_s)

    def _is_former(self, each: _Honoured) -> bool:
        """Whether it holds what would be free without it."""
        older = self._pages.older
        if older is None:
            return False
        former = any(generation < older.generation for generation in each.generations)
        return former or (each.log is not None and each.log.position < older.seqno)

    def _beyond_limits(self, honoured: dict[str, _Honoured]) -> dict[str, str]:
        now_s = self._now_s()
        broken = {
            name: f"it held what would be free for more than {self._hold_s:g} s"
            for name, each in honoured.items()
            if each.since_s is not None and now_s - each.since_s > self._hold_s
        }
        left = {name: each for name, each in honoured.items() if name not in broken and each.since_s is not None}
        while left and self._held_bytes(left.values()) > self._hold_bytes:
            oldest = min(left, key=lambda name: left[name].since_s or 0.0)
            broken[oldest] = f"followers held more than {self._hold_bytes} bytes"
            del left[oldest]
        return broken

    def _break(self, broken: dict[str, str], honoured: dict[str, _Honoured]) -> bool:
        """Go on with those that are not broken, or cannot be. Whether one was broken."""
        left = self._listing.break_pins(list(broken)) if broken else frozenset()
        if not self._is_sure and not left <= honoured.keys():
            # Durability: its follower takes it for held, and what it needs may be free.
            raise RefusedError(errno.EACCES, f"pins of before cannot be removed: {sorted(left)}", READERS)
        for name in broken.keys() - left:
            why = broken[name]
            each = honoured.pop(name, None)
            if each is not None and each.since_s is not None:
                record = each.found.record
                called = repr(record.name) if record is not None else name
                _log.warning("the pin of follower %s (process %d) is broken: %s", called, each.found.pid, why)
        # Durability: only now, since what is not pinned any more may be written over.
        generations = frozenset().union(*(each.generations for each in honoured.values()))
        self._pages.pins.hold(self, generations)
        self._honoured = honoured
        return len(left) < len(broken)

    def give_up(self) -> bool:
        """On a full disk: break all that hold something. False if none does.

        The pages are free for the next checkpoint, the log at once.
        """
        try:
            if not self.look():
                return False
        except OSError:
            return False
        broken = {name: "the disk is full" for name, each in self._honoured.items() if each.since_s is not None}
        return bool(broken) and self._break(broken, dict(self._honoured))

    def _held_bytes(self, honoured: Iterable[_Honoured]) -> int:
        """What would be free without these."""
        pages, generations = self._pages, set[int]()
        after: list[int] = []
        for each in honoured:
            generations |= each.generations
            if each.log is not None:
                after.append(each.log.position)
        log = self._keeping.log_bytes_before(Seqno(min(after))) if after else 0
        return pages.space.held_bytes(pages.meta, generations) + log

    def pins(self) -> list[Pin]:
        """Those that were there when the last checkpoint began, and what is held for those that it could not look at.

        O(extents) for each.
        """
        pins = []
        blind_log = self._blind_log
        if self._is_blind:
            generations = self._pages.pins.kept(self)
            blind = _Honoured(FoundPin(None, 0), generations, blind_log)
            seqno = Seqno(0) if blind_log is None else Seqno(blind_log.position)
            size = self._held_bytes([blind]) + (self._pages.space.free_bytes() if self.must_append else 0)
            pins.append(Pin(FOLLOWER, seqno, self._blind_us, size, name=_UNSEEN))
        for each in list(self._honoured.values()):
            record = each.found.record
            if record is not None:
                pins.append(
                    Pin(
                        FOLLOWER,
                        Seqno(0 if record.after == NO_LOG else record.after),
                        record.made_us,
                        self._held_bytes([each]),
                        name=record.name,
                        generation=record.generation,
                        pid=each.found.pid,
                    )
                )
        return pins
