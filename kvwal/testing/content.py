"""The bytes of a simulated file: a dict of 4096-byte pages, where a page that is missing reads as zeros.

So a preallocated file costs nothing. Pages are immutable `bytes`, and copies share the dict until one of them changes.
"""

from __future__ import annotations

from typing import Final, TypeAlias

__all__ = ["PAGE", "Content", "Pages"]

PAGE: Final = 4096
_ZERO_PAGE: Final = bytes(PAGE)

Pages: TypeAlias = dict[int, bytes]


class Content:
    """Bytes of a file, and the space that they take."""

    __slots__ = ("_owned", "pages", "reserved", "size")

    def __init__(self, size: int = 0, reserved: int = 0, pages: Pages | None = None) -> None:
        #: To be read only: others may share it.
        self.pages: Pages = {} if pages is None else pages
        self.size = size
        #: Number of pages from the start of the file that were preallocated.
        self.reserved = reserved
        self._owned = pages is None

    def copy(self) -> Content:
        """The same bytes; pages are shared until one of the two changes."""
        self._owned = False
        return Content(self.size, self.reserved, self.pages)

    def read(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset`."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        first, start = divmod(offset, PAGE)
        last = (offset + size - 1) // PAGE
        if first >= last:
            return self.page(first)[start : start + size]
        return b"".join(map(self.page, range(first, last + 1)))[start : start + size]

    def page(self, number: int) -> bytes:
        """One page, which may lie beyond the size."""
        return self.pages.get(number, _ZERO_PAGE)

    def write(self, offset: int, data: bytes) -> None:
        """Put `data` at `offset`. The size stays."""
        pages = self._changed()
        number, start = divmod(offset, PAGE)
        size = len(data)
        done = 0
        while done < size:
            step = min(PAGE - start, size - done)
            if step == PAGE:
                pages[number] = data[done : done + PAGE]
            else:
                old = pages.get(number, _ZERO_PAGE)
                pages[number] = old[:start] + data[done : done + step] + old[start + step :]
            done += step
            start = 0
            number += 1

    def take_page(self, number: int, source: Content) -> None:
        """Take a page from another content."""
        page = source.pages.get(number)
        if page is None:
            self._changed().pop(number, None)
        else:
            self._changed()[number] = page

    def cut(self, size: int) -> None:
        """Make everything from `size` on read as zeros. The size stays."""
        pages = self._changed()
        last, keep = divmod(size, PAGE)
        for number in [n for n in pages if n > last or (n == last and keep == 0)]:
            del pages[number]
        if keep and last in pages:
            pages[last] = pages[last][:keep] + _ZERO_PAGE[keep:]

    def _changed(self) -> Pages:
        """The pages, for changing."""
        if not self._owned:
            self.pages = self.pages.copy()
            self._owned = True
        return self.pages

    def key(self) -> frozenset[tuple[int, bytes]]:
        """Equal for equal bytes of one size: pages of zeros count as missing ones."""
        return frozenset(item for item in self.pages.items() if item[1] != _ZERO_PAGE)

    def reserve(self, end: int) -> None:
        """Preallocate the space up to `end`. The size stays."""
        self.reserved = max(self.reserved, -(-end // PAGE))

    def blocks(self) -> int:
        """Number of 4096-byte blocks that the file occupies."""
        reserved = self.reserved
        return reserved + sum(number >= reserved for number in self.pages)

    def new_blocks(self, offset: int, size: int) -> int:
        """Number of blocks that a write there would have to find space for."""
        numbers = range(max(offset // PAGE, self.reserved), -(-(offset + size) // PAGE))
        return sum(number not in self.pages for number in numbers)
