"""Which pages are free, since when, and which of them the next generation takes.

The free list of a generation names every page below its page count that it does not reach itself.
It lies in an extent of its own, which the meta points to. Everything is little-endian.

    offset  size  field
         0     4  number of groups
         4        per group: generation that freed these extents u64 (0: long enough ago), extents u32
                  first pages of all extents, group after group, u32 each
                  their lengths in pages, u32 each
                  zeros up to the end of the last page

The list is valid if the CRC-32C of its pages, seeded with the first one's number, matches the one in
the meta, and the counts fit into them.

Invariant: an extent born in generation b and freed by generation f is reached exactly by the
generations b <= g < f. It may be written only when none of those can be needed any more: not the
current one, not the one before (the meta slots), and none that is pinned.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from struct import Struct, calcsize, error, pack, unpack_from
from typing import Final, TypeAlias

from kvwal.errors import DiskFullError
from kvwal.pages.node import ADDRESS, OVERFLOW_REF, PAGE_SIZE, POINTER

__all__ = [
    "Allocator",
    "FreeList",
    "Freed",
    "decode_free_list",
    "encode_free_list",
    "encoded_size",
    "extents_of",
    "joined",
]

_GROUPS: Final = Struct("<I")
_GROUP: Final = Struct("<QI")
#: Page numbers have 4 bytes: 16 TiB.
MAX_PAGES: Final = 0xFFFF_FFFF
_LOW: Final = 0xFFFF_FFFF

#: Extents in columns of numbers, `page << 32 | pages`. A checkpoint may free half a million of them, and as
#: objects they would take more memory than the cache may.
Places: TypeAlias = "array[int]"


def extents_of(places: Iterable[int]) -> Iterator[tuple[int, int]]:
    """First page and number of pages of each."""
    return ((place >> 32, place & _LOW) for place in places)


class Freed:
    """The extents that one checkpoint freed, in three columns."""

    __slots__ = ("addresses", "born", "generation", "places")

    def __init__(self, generation: int) -> None:
        #: The generation that freed them.
        self.generation = generation
        self.places: Places = array("Q")
        #: The generation that wrote each; 0 if that is not known.
        self.born: Places = array("Q")
        #: Under which the cache knows what lies there (`node.ADDRESS`); 0 if it cannot.
        self.addresses: Places = array("Q")

    def add(self, page: int, pages: int, born: int, address: int) -> None:
        """One more extent."""
        self.places.append(page << 32 | pages)
        self.born.append(born)
        self.addresses.append(address)

    def add_node(self, pointers: bytes, at: int, born: int) -> None:
        """The node that the packed pointer at `at` points to."""
        page, _, pages, _, _ = POINTER.unpack_from(pointers, at)
        self.add(page, pages, born, ADDRESS.unpack_from(pointers, at)[0])

    def add_overflow(self, ref: bytes) -> None:
        """The extent of an overflow reference."""
        page, _, length, born = OVERFLOW_REF.unpack(ref)
        self.add(page, -(-length // PAGE_SIZE), born, ADDRESS.unpack_from(ref)[0])

    def extend(self, other: Freed) -> None:
        """All extents of another."""
        self.places += other.places
        self.born += other.born
        self.addresses += other.addresses

    def pages(self) -> int:
        """Number of pages."""
        return sum(place & _LOW for place in self.places)

    def parted(self, needed: Sequence[int]) -> tuple[Freed, Freed]:
        """What a generation in `needed` (sorted) reaches, and what none does."""
        none = Freed(self.generation)
        below = needed[: bisect_left(needed, self.generation)]
        if not below:
            return none, self
        if below[-1] == self.generation - 1 and (not self.born or max(self.born) < self.generation):
            # The generation just before reaches all that it did not write itself.
            return self, none
        held, free = none, Freed(self.generation)
        newest = below[-1]
        for place, born, address in zip(self.places, self.born, self.addresses, strict=True):
            part = held if born <= newest else free
            part.places.append(place)
            part.born.append(born)
            part.addresses.append(address)
        return held, free


class FreeList:
    """What no longer belongs to the newest generation. Never changed once made."""

    __slots__ = ("free", "held")

    def __init__(self, free: Places, held: Sequence[Freed]) -> None:
        #: Ascending, never adjacent: no generation needs them.
        self.free = free
        #: Reached by an older generation, or not looked at since; one for each checkpoint.
        self.held = held

    def release_unneeded(self, needed: Collection[int]) -> tuple[FreeList, list[Freed]]:
        """A list in which everything is free that no generation in `needed` reaches, and what became so."""
        moments = sorted(needed)
        held: list[Freed] = []
        free: list[Freed] = []
        for freed in self.held:
            for part, parts in zip(freed.parted(moments), (held, free), strict=True):
                if part.places:
                    parts.append(part)
        if not free:
            return FreeList(self.free, held), free
        places = list(self.free)
        for freed in free:
            places += freed.places
        return FreeList(joined(places), held), free

    def unneeded_pages(self, needed: Collection[int]) -> int:
        """Number of pages that no generation in `needed` reaches."""
        moments = sorted(needed)
        return self.free_pages() + sum(freed.parted(moments)[1].pages() for freed in self.held)

    def give_back(self, page_count: int) -> tuple[FreeList, int]:
        """The list without the free pages at the end of the file, and the page count that is left."""
        if not self.free or sum(*extents_of(self.free[-1:])) != page_count:
            return self, page_count
        # One step is enough: neighbours have been joined.
        return FreeList(self.free[:-1], self.held), self.free[-1] >> 32

    def extents(self) -> int:
        """Number of extents, an upper bound of what `encode_free_list` writes."""
        return len(self.free) + sum(len(freed.places) for freed in self.held)

    def held_pages(self) -> int:
        """Number of pages that no longer belong to the newest generation and cannot be taken yet."""
        return sum(freed.pages() for freed in self.held)

    def free_pages(self) -> int:
        """Number of pages that can be taken now."""
        return sum(place & _LOW for place in self.free)


def joined(places: list[int]) -> Places:
    """Sorted, with neighbours made one. Sorts `places`."""
    places.sort()
    result: Places = array("Q")
    begin, end = -1, -1
    for place in places:
        page = place >> 32
        if page == end:
            end += place & _LOW
            continue
        if begin >= 0:
            result.append(begin << 32 | end - begin)
        begin, end = page, page + (place & _LOW)
    if begin >= 0:
        result.append(begin << 32 | end - begin)
    return result


class Allocator:
    """Hands out free pages of one checkpoint, lowest first, and grows the file when they run out.

    It works on a copy, so a failed checkpoint only has to forget it.
    """

    __slots__ = ("_cursors", "_pages", "_spared", "_starts", "page_count")

    def __init__(self, free: Places, page_count: int, *, append: bool = False) -> None:
        """`append`: take none of the free pages, and always grow the file."""
        #: Free, and not to be taken.
        self._spared: Places = free if append else array("Q")
        free = array("Q") if append else free
        self._starts: Places = array("Q", (place >> 32 for place in free))
        self._pages: Places = array("Q", (place & _LOW for place in free))
        self.page_count = page_count
        # Per class of sizes (2^(c-1), 2^c]: before this index no extent is large enough for any of the
        # class. Extents only shrink, so the cursor only moves on and the search stays linear in all.
        self._cursors = [0] * 34

    def take(self, pages: int) -> int:
        """The first of that many consecutive pages. DiskFullError if page numbers run out."""
        sizes = self._pages
        kind = (pages - 1).bit_length()
        smallest = (1 << (kind - 1)) + 1 if kind else 1
        at = self._cursors[kind]
        count = len(sizes)
        while at < count and sizes[at] < smallest:
            at += 1
        self._cursors[kind] = at
        while at < count and sizes[at] < pages:
            at += 1
        if at < count:
            page = self._starts[at]
            self._starts[at] = page + pages
            sizes[at] -= pages
            return page
        page = self.page_count
        tail = sizes[-1] if count and self._starts[-1] + sizes[-1] == page else 0
        if page - tail + pages > MAX_PAGES:
            raise DiskFullError(f"the page file has reached its limit of {MAX_PAGES * PAGE_SIZE} bytes")
        if tail:
            sizes[-1] = 0
            page -= tail
        self.page_count = page + pages
        return page

    def left(self) -> Places:
        """The free extents that were not taken."""
        left = array("Q", (page << 32 | pages for page, pages in zip(self._starts, self._pages, strict=True) if pages))
        return left + self._spared


def encoded_size(extents: int, groups: int) -> int:
    """Bytes of a free list with this many extents."""
    return _GROUPS.size + groups * _GROUP.size + extents * 8


def encode_free_list(free: FreeList) -> bytes:
    """The bytes of the list, without padding."""
    groups: dict[int, list[int]] = {}
    for freed in free.held:
        groups.setdefault(freed.generation, []).extend(freed.places)
    columns = {generation: joined(places) for generation, places in sorted(groups.items())}
    if free.free:
        columns = {0: free.free, **columns}
    heads = b"".join(_GROUP.pack(generation, len(places)) for generation, places in columns.items())
    starts = [place >> 32 for places in columns.values() for place in places]
    sizes = [place & _LOW for places in columns.values() for place in places]
    return _GROUPS.pack(len(columns)) + heads + pack(f"<{len(starts)}I{len(sizes)}I", *starts, *sizes)


def decode_free_list(raw: bytes) -> FreeList:
    """The list in verified bytes. ValueError if they are not one."""
    try:
        (groups,) = _GROUPS.unpack_from(raw)
        at = _GROUPS.size
        heads = []
        for _ in range(groups):
            heads.append(_GROUP.unpack_from(raw, at))
            at += _GROUP.size
        n = sum(count for _, count in heads)
        if at + calcsize(f"<{2 * n}I") > len(raw):
            raise ValueError("its counts do not fit into its pages")
        starts = unpack_from(f"<{n}I", raw, at)
        sizes = unpack_from(f"<{n}I", raw, at + 4 * n)
    except error as failure:
        raise ValueError(str(failure)) from None
    free: Places = array("Q")
    held: list[Freed] = []
    at = 0
    for generation, count in heads:
        extents = zip(starts[at : at + count], sizes[at : at + count], strict=True)
        if generation:
            # When they were born is not kept: nothing older than the meta slots survives a reopen.
            freed = Freed(generation)
            for page, pages in extents:
                freed.add(page, pages, 0, 0)
            held.append(freed)
        else:
            free.extend(page << 32 | pages for page, pages in extents)
        at += count
    return FreeList(free, held)
