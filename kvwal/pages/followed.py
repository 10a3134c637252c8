"""A page file that another process writes, read without a lock.

Which generation may be read: g, as long as its slot holds the bytes that g was chosen by, or a pin of g is held
(kvwal/readers). Without pins the writer knows nothing of its readers, but it writes in an order (pagefile.py,
docs/processes.md):

- pages that g reaches are written over only by the build of g + 3 or later, since a build leaves alone what the two
  newest generations reach; the slot of g is written over by the flip of g + 2, before that build begins;
- where an open finds a slot to be of no use, zeros are written over it before the first page is.

Invariant: what `Guard.pread` returns was in the file while its generation was whole. So it looks at pin and slot after
it has read, and never before: a slot that still has its bytes then had them when the page was read, and a pin that is
still held was held. A pin keeps what its generation reaches, and not the bases that it has: those are read by the
slot alone.

Invariant: a pin counts only if its generation was the newest after the pin was made. So it is there before the writer
looks for pins to build the generation after the next one, which is the first that may write over its pages.

So bytes that do not match their checksum are damage, here as in the process that writes, and a page that was written
over is no damage but `SnapshotTooOld`. The checksum alone would tell most such pages, and miss one in four thousand
million.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from kvwal.errors import SnapshotTooOld
from kvwal.files import Directory, File
from kvwal.files.names import DATA
from kvwal.pages.bases import Bases
from kvwal.pages.catalogue import root_of
from kvwal.pages.meta import META_SIZE, Choice, Meta
from kvwal.pages.node import PAGE_SIZE
from kvwal.pages.pagefile import PageFile
from kvwal.pages.pager import Pager, ProvingPager
from kvwal.pages.slots import choose_in
from kvwal.pages.tree import Tree

__all__ = ["Found", "FollowedPages", "Guard", "Pinned"]

# What both slots take, without the zeros behind the second.
_SLOTS_BYTES: Final = PAGE_SIZE + META_SIZE


class Pinned(Protocol):
    """A pin on one generation, which its writer honours."""

    def is_held(self) -> bool: ...
    def release(self) -> None: ...


class Guard:
    """The page file as one generation sees it. Reads from any thread."""

    __slots__ = ("_file", "_meta", "_offset", "_slot", "of_bases", "pin", "when_gone")

    def __init__(self, file: File, meta: Meta, slot: bytes) -> None:
        """`slot`: the bytes that the generation was chosen by."""
        self._file = file
        self._meta = meta
        self._offset = meta.generation % 2 * PAGE_SIZE
        self._slot = slot
        #: What keeps the generation whole beyond the flip over its slot.
        self.pin: Pinned | None = None
        #: Reads the bases of the generation, once it is asked for.
        self.of_bases: Pager | None = None
        #: Called before a read is refused.
        self.when_gone: Callable[[], None] = lambda: None

    def pread(self, size: int, offset: int) -> bytes:
        """As `File.pread`. SnapshotTooOld if the pages of the generation may have been written over."""
        found = self._file.pread(size, offset)
        if not self.is_whole():
            self.when_gone()
            seqno = self._meta.seqno
            raise SnapshotTooOld(seqno, seqno + 1, seqno + 1, while_read=True)
        return found

    def is_whole(self) -> bool:
        """Whether no page that the generation reaches has been written over. One system call, or two."""
        return self.is_pinned() or self.is_in_slot()

    def is_in_slot(self) -> bool:
        """Whether no page that the generation, or a base that it has, reaches has been written over."""
        return self._file.pread(META_SIZE, self._offset) == self._slot

    def unpinned(self) -> Guard:
        """The same for bases."""
        return Guard(self._file, self._meta, self._slot)

    def is_pinned(self) -> bool:
        """Whether it stays whole for as long as its writer honours the pin."""
        pin = self.pin
        return pin is not None and pin.is_held()

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
    #: Called when bases are gone that this pager read.
    when_bases_gone: Callable[[Pager], None] = staticmethod(lambda pager: None)
    _slots: bytes

    def __init__(
        self, directory: Directory, *, cache_bytes: int, make_pin: Callable[[Meta], Pinned | None] = lambda meta: None
    ) -> None:
        """Open. Raises as `look`. `make_pin`: pins a generation; None where that cannot be done."""
        self._directory = directory
        self._make_pin = make_pin
        # By generation. Those that are of no use any more go with `let_go`.
        self._pins: dict[int, Pinned] = {}
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
        while (pin := self._pin(choice.meta)) is not None:
            # Only what the slots say after it was pinned was the newest when it was.
            before, raw = raw, self._file.pread(2 * PAGE_SIZE, 0)
            if raw == before:
                break
            choice = choose_in(raw, self._file)
        offset = choice.meta.generation % 2 * PAGE_SIZE
        guard = Guard(self._file, choice.meta, raw[offset : offset + META_SIZE])
        guard.pin = pin
        pager = Pager(guard, cache_bytes)
        return Found(choice, pager, guard, Bases(pager, choice.meta), raw[:_SLOTS_BYTES])

    def _pin(self, meta: Meta) -> Pinned | None:
        pin = self._pins.get(meta.generation)
        if pin is None or not pin.is_held():
            if pin is not None:
                pin.release()
            pin = self._make_pin(meta)
            if pin is not None:
                self._pins[meta.generation] = pin
        return pin

    def let_go(self) -> None:
        """Release the pins of generations that are not read any more."""
        for generation in self._pins.keys() - self.pins.counts().keys() - {self.meta.generation}:
            self._pins.pop(generation).release()

    def install(self, found: Found) -> None:
        """Read from this generation on. Trees of the one before go on as long as that is whole."""
        self._adopt(found)
        self.pins.keep_only(self._current(), self.bases.generations())

    def _adopt(self, found: Found) -> None:
        self._take(found.choice, found.pager, found.bases)
        self.guard = found.guard
        self._slots = found.slots

    def readable(self) -> list[Meta]:
        """As `PageFile.readable`: the one before only while its slot says that its pages are there."""
        readable = super().readable()
        return [each for each in readable if each is not self.older or self._guard_of(each).is_in_slot()]

    def _proving(self, meta: Meta) -> ProvingPager:
        """As `PageFile._proving`."""
        return ProvingPager(self._guard_of(meta), 0) if meta is self.older else super()._proving(meta)

    def _guard_of(self, meta: Meta) -> Guard:
        """Guards a generation by the slot that it had when the newest one was chosen."""
        offset = meta.generation % 2 * PAGE_SIZE
        return Guard(self._file, meta, self._slots[offset : offset + META_SIZE])

    def tree(self, meta: Meta | None = None, table: int = 0) -> Tree:
        """As `PageFile.tree`."""
        if meta is None or meta.generation == self.meta.generation:
            return super().tree(meta, table)
        pager = self.pager_of_bases(self.pager)
        return Tree(pager, meta, *root_of(pager, meta, table))

    def pager_of_bases(self, pager: Pager) -> Pager:
        """Reads the bases of the generation that a pager reads, which its pin does not keep."""
        guard = pager.file
        assert isinstance(guard, Guard), "it was made by `look`"
        if guard.pin is None:
            return pager
        if guard.of_bases is None:
            unpinned = guard.unpinned()
            made = Pager(unpinned, pager.cache.limit_bytes)
            unpinned.when_gone = lambda: self.when_bases_gone(made)
            guard.of_bases = made
        return guard.of_bases

    def slots(self) -> bytes:
        """The slots as they are now."""
        return self._file.pread(_SLOTS_BYTES, 0)

    def has_moved(self) -> bool:
        """Whether there may be a newer generation than the one that is read."""
        return self.slots() != self._slots

    def is_replaced(self) -> bool:
        """Whether the store's page file is another one now, or gone.

        Not by what is in it: an older copy of the store may have the same slots. A writer puts no file in its place.
        """
        try:
            there = self._directory.open(DATA)
        except FileNotFoundError:
            return True
        try:
            return there.identity() != self._file.identity()
        finally:
            there.close()

    def close(self) -> None:
        """As `PageFile.close`."""
        super().close()
        while self._pins:
            self._pins.popitem()[1].release()
        self._file.close()
