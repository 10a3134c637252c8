"""Dead lists: extents that a generation freed and a base still reaches.

One lies in an extent of its own, filled up with zeros, and refers to older ones that belong to it. Everything is
little-endian.

    offset  size  field
         0     8  generation that wrote the list
         8     4  number of older lists
        12     4  number of groups
        16        per list: page u32, crc u32, pages u32, and of what it names, its own lists' included: a birth that
                  none is above u64, pages u64
                  per group: birth of its extents u64 (0: not known, as if always), extents u32; births ascend
                  first pages of all extents, group after group, u32 each
                  their lengths in pages, u32 each
                  zeros up to the end of the last page

A list is valid if the CRC-32C of its pages, seeded with the first one's number, is what the reference to it says, the
counts fit into them, and its generation is below that of the list which refers to it, and not above the meta's. So
lists do not form rings.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct, error, pack, unpack_from
from typing import Final, NamedTuple

from kvwal.errors import CorruptionError
from kvwal.files.names import DATA
from kvwal.pages.freelist import Allocator, Freed, extents_of, joined
from kvwal.pages.node import PAGE_SIZE
from kvwal.pages.pager import Pager
from kvwal.pages.writer import PageWriter

__all__ = ["DeadList", "ListRef", "read_dead_list"]

# On disk: never change.
_HEADER: Final = Struct("<QII")
_LIST: Final = Struct("<IIIQQ")
_GROUP: Final = Struct("<QI")


class ListRef(NamedTuple):
    """Where a dead list lies, and what it and those that belong to it name."""

    page: int
    crc: int
    pages: int
    #: No extent was born later.
    youngest: int
    named_pages: int


class DeadList:
    """A dead list in memory: extents with their births, and older lists that stay where they are."""

    __slots__ = ("freed", "lists")

    def __init__(self, generation: int, lists: Iterable[ListRef] = ()) -> None:
        self.freed = Freed(generation)
        self.lists = [*lists]

    def open(self, pager: Pager, above: int, page_count: int, replaced: Freed) -> None:
        """Take in the extents of each list that names something born after `above`.

        The pages of those lists go into `replaced`. CorruptionError if one does not verify; then this one is of no use.
        """
        waiting, self.lists = [(each, self.freed.generation) for each in self.lists], []
        while waiting:
            ref, below = waiting.pop()
            if ref.youngest <= above:
                self.lists.append(ref)
                continue
            written, inner = read_dead_list(pager, ref, below, page_count)
            replaced.add(ref.page, ref.pages, written, 0)
            self.freed.extend(inner.freed)
            waiting += [(each, written) for each in inner.lists]

    def take(self, above: int) -> Freed:
        """Take out the extents that were born after `above`. Requires: `open` with the same number."""
        self.freed, taken = self.freed.parted([above] if above >= 0 else [])
        return taken

    def write(self, allocator: Allocator, writer: PageWriter) -> ListRef | None:
        """Write it to a place of its own; None if it names nothing. One that is but another list stays that."""
        freed, lists = self.freed, self.lists
        if not freed.places and len(lists) < 2:
            return lists[0] if lists else None
        births: dict[int, list[int]] = {}
        for place, born in zip(freed.places, freed.born, strict=True):
            births.setdefault(born, []).append(place)
        groups = {born: joined(places) for born, places in sorted(births.items())}
        places = [place for each in groups.values() for place in each]
        extents = list(extents_of(places))
        raw = b"".join(
            [
                _HEADER.pack(freed.generation, len(lists), len(groups)),
                *(_LIST.pack(*each) for each in lists),
                *(_GROUP.pack(born, len(each)) for born, each in groups.items()),
                pack(f"<{len(extents)}I", *(page for page, _ in extents)),
                pack(f"<{len(extents)}I", *(pages for _, pages in extents)),
            ]
        )
        pages = -(-len(raw) // PAGE_SIZE)
        page = allocator.take(pages)
        crc = writer.at(page, raw.ljust(pages * PAGE_SIZE, b"\0"))
        return self.ref(page, crc, pages)

    def ref(self, page: int, crc: int, pages: int) -> ListRef:
        """The reference to this list at that place."""
        youngest = max([0, *self.freed.born, *(each.youngest for each in self.lists)])
        named = self.freed.pages() + sum(each.named_pages for each in self.lists)
        return ListRef(page, crc, pages, youngest, named)


def read_dead_list(pager: Pager, ref: ListRef, below: int, page_count: int) -> tuple[int, DeadList]:
    """The generation that wrote a list, which must be below `below`, and the list. CorruptionError if it is none."""
    try:
        if not 2 <= ref.page <= ref.page + ref.pages <= page_count:
            raise ValueError(f"{ref.pages} pages lie outside of the {page_count} pages")
        raw = pager.read(ref.page, ref.pages * PAGE_SIZE, ref.crc)
        generation, lists, groups = _HEADER.unpack_from(raw)
        if generation >= below:
            raise ValueError(f"generation {generation} wrote it, which is not below {below}")
        at = _HEADER.size + lists * _LIST.size
        if at + groups * _GROUP.size > len(raw):
            raise ValueError("its counts do not fit into its pages")
        found = DeadList(generation, map(ListRef._make, _LIST.iter_unpack(raw[_HEADER.size : at])))
        heads = [_GROUP.unpack_from(raw, at + i * _GROUP.size) for i in range(groups)]
        at += groups * _GROUP.size
        n = sum(count for _, count in heads)
        if at + 8 * n > len(raw):
            raise ValueError("its counts do not fit into its pages")
        extents = zip(unpack_from(f"<{n}I", raw, at), unpack_from(f"<{n}I", raw, at + 4 * n), strict=True)
        for born, count in heads:
            for _ in range(count):
                found.freed.add(*next(extents), born, 0)
    except (ValueError, error) as failure:
        raise CorruptionError(DATA, ref.page * PAGE_SIZE, f"the dead list: {failure}") from None
    return generation, found
