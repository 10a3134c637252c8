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

from bisect import bisect_left
from collections.abc import Collection, Iterable
from struct import Struct, calcsize, error, pack, unpack_from
from typing import Final, NamedTuple

from kvwal.errors import DiskFullError
from kvwal.pages.page import PAGE_SIZE

__all__ = ["Allocator", "Extent", "FreeList", "decode_free_list", "encode_free_list", "encoded_size"]

_GROUPS: Final = Struct("<I")
_GROUP: Final = Struct("<QI")
#: Page numbers have 4 bytes: 16 TiB.
MAX_PAGES: Final = 0xFFFF_FFFF


class Extent(NamedTuple):
    """Pages that were freed but that some generation may still reach."""

    page: int
    pages: int
    born: int
    freed: int
    #: Under which the cache knows what lies there (`ADDRESS`); 0 if it cannot.
    address: int


class FreeList:
    """What no longer belongs to the newest generation. Guarded by the one caller of checkpoint."""

    __slots__ = ("free", "held")

    def __init__(self, free: list[tuple[int, int]], held: list[Extent]) -> None:
        #: (first page, pages), ascending, never adjacent: no generation needs them.
        self.free = free
        #: Reached by an older generation, or not looked at since.
        self.held = held

    def settled(self, needed: Collection[int]) -> tuple[FreeList, list[Extent]]:
        """A list in which everything is free that no generation in `needed` reaches, and what became so."""
        moments = sorted(needed)
        held: list[Extent] = []
        freed: list[Extent] = []
        for extent in self.held:
            at = bisect_left(moments, extent.born)
            (held if at < len(moments) and moments[at] < extent.freed else freed).append(extent)
        if not freed:
            return FreeList(self.free, held), freed
        return FreeList(_joined([*self.free, *((extent.page, extent.pages) for extent in freed)]), held), freed

    def give_back(self, page_count: int) -> tuple[FreeList, int]:
        """The list without the free pages at the end of the file, and the page count that is left."""
        free = list(self.free)
        while free and free[-1][0] + free[-1][1] == page_count:
            page_count = free.pop()[0]
        return FreeList(free, self.held), page_count

    def extents(self) -> int:
        """Number of extents, an upper bound of what `encode_free_list` writes."""
        return len(self.free) + len(self.held)

    def pages(self) -> int:
        """Number of pages, held ones too."""
        return self.free_pages() + sum(extent.pages for extent in self.held)

    def free_pages(self) -> int:
        """Number of pages that can be taken now."""
        return sum(pages for _, pages in self.free)


def _joined(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, with neighbours made one."""
    extents.sort()
    result: list[tuple[int, int]] = []
    begin, end = -1, -1
    for page, pages in extents:
        if page == end:
            end += pages
            continue
        if begin >= 0:
            result.append((begin, end - begin))
        begin, end = page, page + pages
    if begin >= 0:
        result.append((begin, end - begin))
    return result


class Allocator:
    """Hands out free pages of one checkpoint, lowest first, and grows the file when they run out.

    It works on a copy, so a failed checkpoint only has to forget it.
    """

    __slots__ = ("_cursors", "_pages", "_starts", "page_count")

    def __init__(self, free: Iterable[tuple[int, int]], page_count: int) -> None:
        self._starts: list[int] = []
        self._pages: list[int] = []
        for page, pages in free:
            self._starts.append(page)
            self._pages.append(pages)
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
        if count and self._starts[-1] + sizes[-1] == page:
            page = self._starts[-1]
        if page + pages > MAX_PAGES:
            raise DiskFullError(f"the page file has reached its limit of {MAX_PAGES * PAGE_SIZE} bytes")
        if page != self.page_count:
            self._starts[-1] += sizes[-1]
            sizes[-1] = 0
        self.page_count = page + pages
        return page

    def left(self) -> list[tuple[int, int]]:
        """The free extents that were not taken."""
        return [(page, pages) for page, pages in zip(self._starts, self._pages, strict=True) if pages]


def encoded_size(extents: int, groups: int) -> int:
    """Bytes of a free list of so many extents."""
    return _GROUPS.size + groups * _GROUP.size + extents * 8


def encode_free_list(free: FreeList) -> bytes:
    """The bytes of the list, without padding."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for extent in free.held:
        groups.setdefault(extent.freed, []).append((extent.page, extent.pages))
    joined = {generation: _joined(extents) for generation, extents in sorted(groups.items())}
    if free.free:
        joined = {0: free.free, **joined}
    starts = [page for extents in joined.values() for page, _ in extents]
    sizes = [pages for extents in joined.values() for _, pages in extents]
    heads = b"".join(_GROUP.pack(generation, len(extents)) for generation, extents in joined.items())
    return _GROUPS.pack(len(joined)) + heads + pack(f"<{len(starts)}I{len(sizes)}I", *starts, *sizes)


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
    free: list[tuple[int, int]] = []
    held: list[Extent] = []
    at = 0
    for generation, count in heads:
        extents = zip(starts[at : at + count], sizes[at : at + count], strict=True)
        if generation:
            # When they were born is not kept: nothing older than the meta slots survives a reopen.
            held.extend(Extent(page, pages, 0, generation, 0) for page, pages in extents)
        else:
            free.extend(extents)
        at += count
    return FreeList(free, held)
