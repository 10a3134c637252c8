"""A page file that another process writes, read without a lock.

Which generation may be read: g, as long as its slot holds the bytes that g was chosen by. The writer knows nothing of
its readers, but it writes in an order (pagefile.py, docs/processes.md):

- pages that g reaches are written over only by the build of g + 3 or later, since a build leaves alone what the two
  newest generations reach; the slot of g is written over by the flip of g + 2, before that build begins;
- where an open finds a slot to be of no use, zeros are written over it before the first page is.

Invariant: what `Guard.pread` returns was in the file while its generation was whole. So it looks at the slot after it
has read, and never before: a slot that still has its bytes then had them when the page was read.

So bytes that do not match their checksum are damage, here as in the process that writes, and a page that was written
over is no damage but `SnapshotTooOld`. The checksum alone would tell most such pages, and miss one in four thousand
million.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from kvwal.errors import SnapshotTooOld
from kvwal.files import Directory, File
from kvwal.files.names import DATA
from kvwal.pages.bases import Bases
from kvwal.pages.meta import META_SIZE, Choice, Meta
from kvwal.pages.node import PAGE_SIZE
from kvwal.pages.pagefile import PageFile
from kvwal.pages.pager import Pager
from kvwal.pages.slots import choose_in

__all__ = ["Found", "FollowedPages", "Guard"]

# What both slots take, without the zeros behind the second.
_SLOTS_BYTES: Final = PAGE_SIZE + META_SIZE


class Guard:
    """The page file as one generation sees it. Reads from any thread."""

    __slots__ = ("_file", "_meta", "_offset", "_slot", "when_gone")

    def __init__(self, file: File, meta: Meta, slot: bytes) -> None:
        """`slot`: the bytes that the generation was chosen by."""
        self._file = file
        self._meta = meta
        self._offset = meta.generation % 2 * PAGE_SIZE
        self._slot = slot
        #: Called before a read is refused.
        self.when_gone: Callable[[], None] = lambda: None

    def pread(self, size: int, offset: int) -> bytes:
        """As `File.pread`. SnapshotTooOld if the pages of the generation may have been written over."""
        found = self._file.pread(size, offset)
        if not self.is_whole():
            self.when_gone()
            seqno = self._meta.seqno
            raise SnapshotTooOld(seqno, seqno + 1, seqno + 1)
        return found

    def is_whole(self) -> bool:
        """Whether no page that the generation reaches has been written over."""
        return self._file.pread(META_SIZE, self._offset) == self._slot

    def size(self) -> int:
        """As `File.size`."""
        return self._file.size()

    def close(self) -> None:
        """The file is not closed: other generations are read from it."""


class Found(NamedTuple):
    """The newest generation of the file, when it was looked for: what is read of it, and both slots."""

    choice: Choice
    pager: Pager
    guard: Guard
    bases: Bases
    slots: bytes


class FollowedPages(PageFile):
    """The page file of another process. One caller at a time of `look` and `install`."""

    #: What guards the generation that is read.
    guard: Guard
    _slots: bytes

    def __init__(self, directory: Directory, *, cache_bytes: int) -> None:
        """Open. Raises as `look`."""
        self._directory = directory
        super().__init__(directory, cache_bytes=cache_bytes, writable=False)

    def _begin(self, cache_bytes: int) -> None:
        self._adopt(self._look(cache_bytes))

    def look(self) -> Found:
        """The newest generation there is now, with a cache of its own. Its reads say whether it is still whole.

        SnapshotTooOld or CorruptionError if it may have gone meanwhile: look again then.
        """
        return self._look(self.pager.cache.limit_bytes)

    def _look(self, cache_bytes: int) -> Found:
        raw = self._file.pread(2 * PAGE_SIZE, 0)
        choice = choose_in(raw, self._file)
        offset = choice.meta.generation % 2 * PAGE_SIZE
        guard = Guard(self._file, choice.meta, raw[offset : offset + META_SIZE])
        pager = Pager(guard, cache_bytes)
        return Found(choice, pager, guard, Bases(pager, choice.meta), raw[:_SLOTS_BYTES])

    def install(self, found: Found) -> None:
        """Read from this generation on. Trees of the one before go on as long as that is whole."""
        self._adopt(found)
        self.pins.keep_only(self._current(), self.bases.generations())

    def _adopt(self, found: Found) -> None:
        self._take(found.choice, found.pager, found.bases)
        self.guard = found.guard
        self._slots = found.slots

    def slots(self) -> bytes:
        """The slots as they are now."""
        return self._file.pread(_SLOTS_BYTES, 0)

    def has_moved(self) -> bool:
        """Whether there may be a newer generation than the one that is read."""
        return self.slots() != self._slots

    def is_replaced(self) -> bool:
        """Whether the store's page file is another one now, or gone."""
        try:
            other = self._directory.open(DATA)
        except FileNotFoundError:
            return True
        try:
            while True:
                before = self.slots()
                there = other.pread(_SLOTS_BYTES, 0)
                if there == before:
                    return False
                if before == self.slots():
                    # A slot never gets bytes again that it had before.
                    return True
        finally:
            other.close()

    def close(self) -> None:
        """As `PageFile.close`."""
        super().close()
        self._file.close()
