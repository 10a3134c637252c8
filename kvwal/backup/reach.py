"""What a generation reaches: found by a walk, kept as the table of a base, and its pages read and proved.

The table has a row of four u32 for each extent, in the order of a walk from the roots, a node before what is below it:

- page, size in bytes, crc, rows below with itself: an extent whose pages the base has. As a pointer or overflow
  reference has it.
- 0, position, count, 0: that number of extents in succession of those that the parent reaches, from that position on.

Invariant: what a difference leaves out, the parent reaches: a node with the same page, size and crc, and so all below
it, since the node names that by page and crc. No generation is compared and no history is taken for granted, so this
holds too for a store that recovery has set back, and for a copy that has gone on by itself.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.errors import CorruptionError
from kvwal.files.names import DATA
from kvwal.pages.catalogue import roots
from kvwal.pages.meta import Meta
from kvwal.pages.node import HAS_OVERFLOW, OVERFLOW_REF, PAGE_SIZE, POINTER, POINTER_SIZE, OverflowRef, decode_leaf
from kvwal.pages.pager import Pager

__all__ = ["ROW_BYTES", "Extents", "Reach", "Table", "read_pages", "span", "walked"]

# On disk: never change.
ROW_BYTES: Final = 16

# Extents in this number of pages are sorted at once.
_SORTED_PAGES: Final = 2048
# Read and written at once.
_RUN_BYTES: Final = 1 << 20


class Extents(NamedTuple):
    """Extents of the page file, ascending by page, in columns. `sizes` are in bytes."""

    pages: array[int]
    sizes: array[int]
    crcs: array[int]

    def page_bytes(self) -> int:
        """What their pages take."""
        return sum(map(span, self.sizes)) * PAGE_SIZE


def span(size: int) -> int:
    """How many pages an extent of this size takes."""
    # An empty value has no extent; a node has a page at least.
    return max(1, -(-size // PAGE_SIZE))


class Reach:
    """What a generation reaches, in the order of a walk. 20 bytes an extent, and 4 a page."""

    __slots__ = ("_below", "_crcs", "_pages", "_places", "_sizes")

    def __init__(self, table: Table | None = None, parent: Reach | None = None) -> None:
        """That of a base with this table. ValueError if it names what the parent does not have, or more of it.

        So it has at most as many extents as there are rows in its table and in those of the bases below.
        """
        columns = [array("I") for _ in range(4)]
        above = () if parent is None else parent._columns()
        # No page is reached twice.
        left = 0 if parent is None else len(parent)
        for row in () if table is None else table.rows():
            if row[0]:
                for column, value in zip(columns, row, strict=True):
                    column.append(value)
                continue
            _, at, count, _ = row
            left -= count
            if not above or not count or at + count > len(above[0]) or left < 0:
                raise ValueError("it keeps extents that its parent does not have")
            for column, whole in zip(columns, above, strict=True):
                column.extend(whole[at : at + count])
        self._pages, self._sizes, self._crcs, self._below = columns
        # By first page: its place in the columns, from 1 on; 0: none.
        self._places = array("I")

    def _columns(self) -> tuple[array[int], array[int], array[int], array[int]]:
        return self._pages, self._sizes, self._crcs, self._below

    def __len__(self) -> int:
        return len(self._pages)

    def index(self, page_count: int) -> None:
        """Make it ready to find what begins in these pages: a base may name others that are far beyond."""
        self._places = array("I", bytes(4 * page_count))
        for place, each in enumerate(self._pages, 1):
            if each < page_count:
                self._places[each] = place

    def find(self, page: int, size: int, crc: int) -> tuple[int, int] | None:
        """Position of this extent, and how many there are with all below it; None if it is not there or not indexed."""
        at = self._places[page] - 1 if page < len(self._places) else -1
        if at < 0 or self._sizes[at] != size or self._crcs[at] != crc or at + self._below[at] > len(self):
            return None
        return at, self._below[at]


class Table:
    """The table of a base: rows of four numbers, as they are on disk."""

    def __init__(self, numbers: array[int] | None = None) -> None:
        self._numbers = array("I") if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers) // 4

    def rows(self) -> Iterator[tuple[int, ...]]:
        """The rows."""
        columns = iter(self._numbers)
        return zip(columns, columns, columns, columns, strict=True)

    def add(self, page: int, size: int, crc: int) -> int:
        """Add an extent; returns the row, whose count below is one."""
        self._numbers.extend((page, size, crc, 1))
        return len(self) - 1

    def keep(self, at: int, count: int) -> None:
        """Add extents that the parent reaches."""
        numbers = self._numbers
        if numbers and not numbers[-4] and numbers[-3] + numbers[-2] == at:
            numbers[-2] += count
        else:
            numbers.extend((0, at, count, 0))

    def has_below(self, row: int, count: int) -> None:
        """Say how many extents are below that of a row, itself included."""
        self._numbers[4 * row + 3] = count

    def new(self, yield_to_writers: Callable[[], None] = lambda: None) -> Extents:
        """The extents whose pages the base has."""
        # Sorted a few thousand at a time: other threads wait while a list is sorted.
        parts: dict[int, array[int]] = {}
        for n, (page, size, crc, _) in enumerate(self.rows()):
            if page:
                part = parts.get(page // _SORTED_PAGES)
                if part is None:
                    part = parts[page // _SORTED_PAGES] = array("I")
                part.extend((page, size, crc))
            if not n % _SORTED_PAGES:
                yield_to_writers()
        found = Extents(array("I"), array("I"), array("I"))
        for number in sorted(parts):
            part = parts.pop(number)
            ordered = sorted(zip(part[::3], part[1::3], part[2::3], strict=True))
            for column, values in zip(found, zip(*ordered, strict=True), strict=True):
                column.extend(values)
            yield_to_writers()
        return found

    def encode(self) -> bytes:
        """The bytes."""
        return _little(self._numbers).tobytes()

    @classmethod
    def decode(cls, raw: bytes) -> Table:
        """What `encode` made. Requires: whole rows."""
        numbers = array("I")
        numbers.frombytes(raw)
        return cls(_little(numbers))


def _little(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers


def walked(pager: Pager, meta: Meta, parent: Reach, yield_to_writers: Callable[[], None]) -> Table:
    """The table of a base of a generation, as a difference of what `parent` reaches.

    Reads the inner nodes that are not there, and leaves that refer to overflow values. CorruptionError if one does not
    verify. Requires: the generation is pinned, or the pager tells when it goes.
    """
    table = Table()
    parent.index(min(meta.page_count, -(-pager.file.size() // PAGE_SIZE)))

    def below(pointer: bytes, level: int) -> int:
        page, crc, pages, flags, _ = POINTER.unpack(pointer)
        found = parent.find(page, pages * PAGE_SIZE, crc)
        if found is not None:
            table.keep(*found)
            return found[1]
        _refuse_outside(page, pages, meta)
        row, count = table.add(page, pages * PAGE_SIZE, crc), 1
        yield_to_writers()
        if level:
            _, children, _ = pager.node(pointer, 0, level, keep=False)
            for at in range(0, len(children), POINTER_SIZE):
                count += below(children[at : at + POINTER_SIZE], level - 1)
        elif flags & HAS_OVERFLOW:
            for value in decode_leaf(pager.node(pointer, 0, 0, keep=False))[1]:
                if isinstance(value, OverflowRef):
                    count += beside(value)
        if count > 1:
            table.has_below(row, count)
        return count

    def beside(ref: bytes) -> int:
        page, crc, length, _ = OVERFLOW_REF.unpack(ref)
        found = parent.find(page, length, crc)
        if found is None:
            _refuse_outside(page, span(length), meta)
            table.add(page, length, crc)
        else:
            table.keep(found[0], 1)
        return 1

    for _, root in roots(pager, meta):
        below(root.pointer, root.height - 1)
    if meta.catalogue_height:
        below(meta.catalogue, meta.catalogue_height - 1)
    return table


def _refuse_outside(page: int, pages: int, meta: Meta) -> None:
    if not 2 <= page < page + pages <= meta.page_count:
        raise CorruptionError(DATA, page * PAGE_SIZE, "an extent lies outside of the file")


def read_pages(
    read: Callable[[int, int], bytes], extents: Extents, name: str = DATA, start: int | None = None
) -> Iterator[tuple[int, bytes | bytearray]]:
    """The pages of the extents, proved, some at a time: page, bytes. CorruptionError names the first bad one.

    Args:
        read: size and offset, to bytes.
        name: of the file that is read.
        start: where the pages lie one after the other; None: where their numbers say.
    """
    at = 0
    while at < len(extents.pages):
        first, pages, end = extents.pages[at], 0, at
        while end < len(extents.pages) and extents.pages[end] == first + pages:
            n = span(extents.sizes[end])
            if end > at and (pages + n) * PAGE_SIZE > _RUN_BYTES:
                break
            pages += n
            end += 1
        offset = first * PAGE_SIZE if start is None else start
        if end == at + 1 and pages * PAGE_SIZE > _RUN_BYTES:
            yield from _read_large(read, first, extents.sizes[at], extents.crcs[at], name, offset)
        else:
            raw: bytes | bytearray = read(pages * PAGE_SIZE, offset)
            raw = _proved(raw, extents, at, end, name, offset)
            yield first, raw
        if start is not None:
            start += pages * PAGE_SIZE
        at = end


def _proved(
    raw: bytes | bytearray, extents: Extents, at: int, end: int, name: str, offset: int
) -> bytes | bytearray:
    """The bytes of some extents in succession, with zeros behind what is not used of a last page."""
    view, place = memoryview(raw), 0
    rests: list[tuple[int, int]] = []
    for each in range(at, end):
        page, size = extents.pages[each], extents.sizes[each]
        if len(view) < place + size or crc32c(view[place : place + size], page) != extents.crcs[each]:
            raise _unproved(name, offset + place, page, len(view) < place + size)
        stop = place + span(size) * PAGE_SIZE
        if place + size < stop:
            rests.append((place + size, stop))
        place = stop
    if rests or len(raw) < place:
        raw = bytearray(raw.ljust(place, b"\0"))
        for begin, stop in rests:
            raw[begin:stop] = bytes(stop - begin)
    return raw


def _read_large(
    read: Callable[[int, int], bytes], page: int, size: int, crc: int, name: str, offset: int
) -> Iterator[tuple[int, bytes]]:
    """One extent in pieces. What was handed out is proved only when this has ended."""
    found, done = page, 0
    while done < size:
        raw = read(min(_RUN_BYTES, size - done), offset + done)
        if not raw:
            raise _unproved(name, offset, page, True)
        found = crc32c(raw, found)
        whole = raw.ljust(-(-len(raw) // PAGE_SIZE) * PAGE_SIZE, b"\0")
        if len(whole) != len(raw) and done + len(raw) < size:
            raise _unproved(name, offset, page, True)
        yield page + done // PAGE_SIZE, whole
        done += len(raw)
    if found != crc:
        raise _unproved(name, offset, page, False)


def _unproved(name: str, offset: int, page: int, is_short: bool) -> CorruptionError:
    what = f"it ends inside or before page {page}" if is_short else f"the checksum of page {page} does not match"
    return CorruptionError(name, offset, what)
