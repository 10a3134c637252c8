"""What the running process tells others: the control page, while a follower has a pin; its figures, while asked.

The page is written after a flush, by the thread that leads, and by the background thread, which also looks whether
there is anyone to tell. Without a follower a commit does nothing for it: what wakes cursors after a flush is empty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from kvwal.engine.checkpoint import Checkpointer
from kvwal.engine.followers import Followers
from kvwal.errors import Error
from kvwal.files import Directory
from kvwal.locks import if_free
from kvwal.log import SegmentLog
from kvwal.options import Options
from kvwal.pages import PageFile
from kvwal.readers.now import HEARTBEAT_S, NowPage
from kvwal.readers.status import is_asked, write_status

__all__ = ["Telling"]

_log = logging.getLogger("kvwal")

# How often it is looked for followers while commits come in.
_LOOK_S: Final = 0.05
# The page is written at most this often: what is passed over is told with the next commit, or the next look. A write
# makes a flush of the log on ext4 50 us longer, as it marks another inode.
_LEAST_S: Final = 0.003


class Telling:
    """Tells followers of one open store how far its log is on disk. `tell` from the leader, the rest in one thread."""

    def __init__(
        self,
        directory: Directory,
        page: NowPage,
        log: SegmentLog,
        pages: PageFile,
        checkpointer: Checkpointer,
        followers: Followers,
        options: Options,
    ) -> None:
        self._directory = directory
        self._page = page
        self._log = log
        self._pages = pages
        self._checkpointer = checkpointer
        self._followers = followers
        self._files = options.files
        self._mode = options.mode
        self._now_s = options.files.monotonic_s
        self._looked_s = self._honoured_s = self._told_s = self._answered_s = 0.0
        self._is_refused = False
        #: Makes the figures; None until the store is open.
        self.describe: Callable[[], dict[str, Any]] | None = None

    def is_due(self) -> bool:
        """Whether it is time to look."""
        return self._now_s() - self._looked_s >= _LOOK_S

    def look(self) -> None:
        """Begin, go on or end telling, by whether a follower has a pin; and answer who asks for figures."""
        self._looked_s = now_s = self._now_s()
        try:
            if now_s - self._answered_s >= HEARTBEAT_S and is_asked(self._files, self._directory):
                self._answered_s = now_s
                self._answer()
            if not self._followers.are_there():
                self.end()
                return
            if now_s - self._honoured_s >= HEARTBEAT_S:
                # What ended is cleared away, and what is held for too long is broken, also while none commits.
                self._honoured_s = now_s
                self._honour()
            if not self._page.is_open:
                self._page.begin()
            self._log.tell_flushes(self.tell)
            self._write()
        except OSError as error:
            # Followers then go by the log alone, and no figures are better than old ones.
            self.end()
            if not self._is_refused:
                self._is_refused = True
                _log.warning("followers are told nothing: %s", error)

    def _honour(self) -> None:
        # A checkpoint that is under way has looked, and other jobs must not wait for it.
        if_free(self._checkpointer.lock, self._followers.look)

    def _answer(self) -> None:
        if self.describe is not None:
            try:
                said = self.describe()
            except Error as error:
                # It is closed, or something that it counts is damaged: what is asked for says so to its user as well.
                _log.debug("no figures: %s", error)
                return
            write_status(self._directory, said, self._mode)

    def tell(self) -> None:
        """A flush made commits durable. Never raises."""
        if self._now_s() - self._told_s >= _LEAST_S:
            try:
                self._write()
            except OSError:
                # The next look finds out why.
                return

    def _write(self) -> None:
        durable, segment, salt = self._log.durable_end
        self._page.write(durable, self._pages.meta.generation, segment, salt)
        self._told_s = self._now_s()

    def abandon(self) -> None:
        """Let go of the file and write nothing: for a finalizer, or in a forked child."""
        self._page.close()

    def end(self) -> None:
        """Tell nothing any more."""
        self._log.tell_flushes(None)
        self._page.end()
