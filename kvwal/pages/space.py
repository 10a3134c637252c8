"""Which pages of the file may be written: the free list, from one checkpoint to the next.

- A page may be written when neither of the two newest generations nor a pinned one reaches it, and what was cached of
  it is dropped first.
- Each checkpoint works on a list of its own, which `install` makes the newest. One that failed has changed nothing.
- The list is read when the first checkpoint begins. If it, the base tree or a dead list does not verify, all of them
  are made anew from what the trees of the newest generation and of all bases reach; of that the first two checkpoints
  take nothing. A base that cannot be read for that is dropped.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from kvwal.errors import CorruptionError, Error
from kvwal.files.names import DATA
from kvwal.pages.bases import Bases, Ledger, Table
from kvwal.pages.freelist import Allocator, Freed, FreeList, decode_free_list, encode_free_list, encoded_size
from kvwal.pages.meta import Meta
from kvwal.pages.node import PAGE_SIZE
from kvwal.pages.pager import Pager
from kvwal.pages.pins import Pins
from kvwal.pages.rebuild import rebuilt
from kvwal.pages.writer import PageWriter

__all__ = ["Space", "read_free_list"]


class Space:
    """The free pages of the newest generation. For one checkpoint at a time; figures from any thread."""

    def __init__(self, pager: Pager, pins: Pins, bases: Bases) -> None:
        self._pager = pager
        self._pins = pins
        self._bases = bases
        # None before the first checkpoint.
        self._free: FreeList | None = None
        # The generations that were needed when it was asked last, and `reclaimable_bytes` then.
        self._reclaimable: tuple[set[int], int] | None = None

    def begin(
        self, newest: Meta, drop: Collection[int], yield_to_writers: Callable[[], None]
    ) -> tuple[FreeList, Ledger]:
        """The list that the generation after the newest one takes its pages from, and its bases but those to drop."""
        try:
            if self._bases.damage is not None:
                self._bases.read()
            if self._bases.damage is not None:
                raise self._bases.damage
            free = read_free_list(self._pager, newest) if self._free is None else self._free
            ledger = Ledger(self._pager, newest, self._bases.table)
            ledger.drop(drop)
            self._free = free
        except CorruptionError as error:
            logging.getLogger("kvwal").warning("%s; which pages are free is made anew from the trees", error.finding)
            free, ledger = rebuilt(self._pager, newest, self._bases.all(), yield_to_writers)
            ledger.drop(drop)
        # Pins may have gone since; a pin of the two newest that comes now holds nothing that is free.
        needed = {newest.generation, newest.generation - 1, *self._pins.counts()}
        free, released = free.release_unneeded(needed)
        self._forget(released)
        return free, ledger

    def write(
        self, meta: Meta, table: Table, allocator: Allocator, writer: PageWriter, held: list[Freed]
    ) -> tuple[Meta, FreeList, list[Freed]]:
        """Write the new generation's free list and put it, and the page count, into the meta.

        Returns that, the list, and the extents that no generation needs once this one is there.
        """
        generation = meta.generation
        # The list is given its place before it can be written, for its place is not in it. Taking the
        # place never adds an extent, so the size for the extents there are now is enough.
        extents = FreeList(allocator.left(), held).extents()
        pages = page = crc = 0
        if extents:
            pages = -(-encoded_size(extents, len(held) + 1) // PAGE_SIZE)
            page = allocator.take(pages)
        # From here on the generation before the old one, and bases that go, may lose pages: none can be pinned.
        needed = self._pins.keep_only({generation, generation - 1}, [base.generation for base in table.bases])
        free, released = FreeList(allocator.left(), held).release_unneeded(needed)
        free, page_count = free.give_back(allocator.page_count)
        if page:
            crc = writer.at(page, encode_free_list(free).ljust(pages * PAGE_SIZE, b"\0"))
        meta = replace(meta, page_count=page_count, free_page=page, free_pages=pages, free_crc=crc)
        return meta, free, released

    def install(self, newest: Meta, table: Table, free: FreeList, released: list[Freed]) -> None:
        """Go on from what `write` gave: its generation is the newest now. Harmless when done again."""
        self._bases.install(newest, table)
        self._free = free
        self._forget(released)

    def file_bytes(self) -> int:
        """The size of the file, which the system is asked for."""
        return self._pager.file.size()

    def free_pages(self) -> int:
        """Pages that the next checkpoint can take; 0 before the first one."""
        return self._free.free_pages() if self._free else 0

    def free_bytes(self) -> int:
        """The same in bytes."""
        return self.free_pages() * PAGE_SIZE

    def held_bytes(self, newest: Meta, generations: set[int]) -> int:
        """Bytes of the pages that only these generations reach, of those older than the two newest. O(extents)."""
        free = self._free
        needed = {newest.generation, newest.generation - 1}
        if free is None or generations <= needed:
            return 0
        return (free.unneeded_pages(needed) - free.unneeded_pages(needed | generations)) * PAGE_SIZE

    def reclaimable_bytes(self, newest: Meta) -> int:
        """Bytes of pages that neither the newest generation nor a pinned one reaches: what compacting gives back.

        The first call after an open reads the free list; 0 if that fails.
        """
        needed = {newest.generation, *self._pins.counts()}
        if self._reclaimable is None or self._reclaimable[0] != needed:
            self._reclaimable = (needed, self._unneeded_bytes(newest, needed))
        return self._reclaimable[1]

    def reached_bytes(self, newest: Meta) -> int:
        """Bytes of pages that the newest generation reaches, or a base. O(extents); as to failing, as the one above."""
        return newest.page_count * PAGE_SIZE - self._unneeded_bytes(newest, {newest.generation})

    def _unneeded_bytes(self, newest: Meta, needed: set[int]) -> int:
        free = self._free
        try:
            # Not kept: that is for a checkpoint, which may be under way in another thread.
            free = read_free_list(self._pager, newest) if free is None else free
        except (OSError, Error):
            return 0
        return free.unneeded_pages(needed) * PAGE_SIZE

    def _forget(self, released: Iterable[Freed]) -> None:
        cache = self._pager.cache
        places: list[int] = []
        for freed in released:
            cache.forget(freed.addresses)
            if 0 in freed.addresses:
                places += (place for place, address in zip(freed.places, freed.addresses, strict=True) if not address)
        if places:
            cache.forget((), sorted(places))


def read_free_list(pager: Pager, meta: Meta) -> FreeList:
    """The free list of a generation, read from disk. CorruptionError if it does not verify."""
    if not meta.free_page:
        return FreeList(array("Q"), ())
    raw = pager.read(meta.free_page, meta.free_pages * PAGE_SIZE, meta.free_crc)
    try:
        return decode_free_list(raw)
    except ValueError as failure:
        raise CorruptionError(DATA, meta.free_page * PAGE_SIZE, f"the free list: {failure}") from None
