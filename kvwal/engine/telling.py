"""What the running process tells others: the control page, while a follower has a pin.

The page is written after a flush, by the thread that leads, and by the background thread, which also looks whether
there is anyone to tell. Without a follower a commit does nothing for it: what wakes cursors after a flush is empty.
"""

from __future__ import annotations

import logging
from typing import Final

from kvwal.engine.checkpoint import Checkpointer
from kvwal.engine.followers import Followers
from kvwal.log import SegmentLog
from kvwal.options import Options
from kvwal.pages import PageFile
from kvwal.readers.now import HEARTBEAT_S, NowPage

__all__ = ["Telling"]

_log = logging.getLogger("kvwal")

# How often it is looked for followers while commits come in.
_LOOK_S: Final = 0.05
# The page is written at most this often: what is passed over is told with the next commit, or the next look.
_LEAST_S: Final = 0.0005


class Telling:
    """Tells followers of one open store how far its log is on disk. `tell` from the leader, the rest in one thread."""

    def __init__(
        self,
        page: NowPage,
        log: SegmentLog,
        pages: PageFile,
        checkpointer: Checkpointer,
        followers: Followers,
        options: Options,
    ) -> None:
        self._page = page
        self._log = log
        self._pages = pages
        self._checkpointer = checkpointer
        self._followers = followers
        self._now_s = options.files.monotonic_s
        self._looked_s = self._honoured_s = self._told_s = 0.0
        self._is_refused = False

    def is_due(self) -> bool:
        """Whether it is time to look."""
        return self._now_s() - self._looked_s >= _LOOK_S

    def look(self) -> None:
        """Begin, go on or end telling, by whether a follower has a pin."""
        self._looked_s = now_s = self._now_s()
        try:
            if not self._followers.are_there():
                self.end()
                return
            if now_s - self._honoured_s >= HEARTBEAT_S:
                # What ended is cleared away, and what is held for too long is broken, also while none commits.
                self._honoured_s = now_s
                self._checkpointer.if_idle(self._followers.look)
            if not self._page.is_open:
                self._page.begin()
            self._log.tell_flushes(self.tell)
            self._write()
        except OSError as error:
            # Followers then go by the log alone.
            self.end()
            if not self._is_refused:
                self._is_refused = True
                _log.warning("followers are told nothing: %s", error)

    def tell(self) -> None:
        """A flush made commits durable. Never raises."""
        if self._now_s() - self._told_s >= _LEAST_S:
            try:
                self._write()
            except OSError:
                # The next look finds out why.
                return

    def _write(self) -> None:
        self._page.write(self._log.durable_seqno, self._pages.meta.generation)
        self._told_s = self._now_s()

    def abandon(self) -> None:
        """Let go of the file and write nothing: for a finalizer, or in a forked child."""
        self._page.close()

    def end(self) -> None:
        """Tell nothing any more."""
        self._log.tell_flushes(None)
        self._page.end()
