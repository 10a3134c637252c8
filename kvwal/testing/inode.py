"""One simulated file or directory: what programs see, what is on the medium, and what lies between.

A file is a dict of 4096-byte pages; a page that is missing reads as zeros, so that a preallocated
file costs nothing. Pages are immutable `bytes` and shared between copies of a disk.

Invariant: without `diverged`, applying every pending operation to the medium gives what programs see.
Invariant: pending operations are in the order in which they were made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

__all__ = ["PAGE", "SECTOR", "Directory", "Entry", "Inode", "Resize", "Write", "read_pages", "write_pages"]

PAGE: Final = 4096
SECTOR: Final = 512
_ZERO_PAGE: Final = bytes(PAGE)

Pages: TypeAlias = dict[int, bytes]


class Write(NamedTuple):
    """Bytes written and not yet synced."""

    operation: int
    offset: int
    data: bytes

    def sectors(self) -> Iterator[tuple[int, int]]:
        """Offsets (start, stop) within the file, one pair for each 512-byte sector that it covers."""
        end = self.offset + len(self.data)
        start = self.offset
        while start < end:
            stop = min(end, (start // SECTOR + 1) * SECTOR)
            yield start, stop
            start = stop


class Resize(NamedTuple):
    """A size that the file took and that is not yet synced."""

    operation: int
    size: int
    #: True for a truncate; False when a write or a preallocation made the file longer.
    exact: bool


class Entry(NamedTuple):
    """A change of a directory that is not yet synced. A rename is one change: it is atomic."""

    operation: int
    #: The name that goes away, or "" if none does.
    removed: str
    #: The name that comes, or "" if none does, and what it then stands for.
    added: str
    node: Inode | Directory | None

    def apply(self, entries: dict[str, Inode | Directory]) -> None:
        if self.removed:
            entries.pop(self.removed, None)
        if self.node is not None:
            entries[self.added] = self.node


def read_pages(pages: Pages, size: int, offset: int) -> bytes:
    """`size` bytes from `offset`; the caller has clipped them to the file."""
    first, start = divmod(offset, PAGE)
    last = (offset + size - 1) // PAGE
    if first >= last:
        return pages.get(first, _ZERO_PAGE)[start : start + size]
    get = pages.get
    return b"".join([get(number, _ZERO_PAGE) for number in range(first, last + 1)])[start : start + size]


def write_pages(pages: Pages, offset: int, data: bytes) -> None:
    """Put `data` at `offset`."""
    number, start = divmod(offset, PAGE)
    size = len(data)
    if start + size <= PAGE:
        old = pages.get(number, _ZERO_PAGE)
        pages[number] = old[:start] + data + old[start + size :]
        return
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


def cut_pages(pages: Pages, size: int) -> None:
    """Make everything from `size` on read as zeros."""
    last, keep = divmod(size, PAGE)
    for number in [n for n in pages if n > last or (n == last and keep == 0)]:
        del pages[number]
    if keep and last in pages:
        pages[last] = pages[last][:keep] + _ZERO_PAGE[keep:]


class Inode:
    """A file."""

    __slots__ = (
        "_owns_medium",
        "_owns_pages",
        "diverged",
        "handles",
        "medium",
        "medium_size",
        "pages",
        "pending",
        "reserved",
        "size",
    )

    def __init__(self) -> None:
        #: What programs see (the page cache).
        self.pages: Pages = {}
        self.size = 0
        #: What would be found after a power cut in which nothing pending survived.
        self.medium: Pages = {}
        self.medium_size = 0
        self.pending: list[Write | Resize] = []
        #: Some of what programs see will never reach the medium: a failed sync, a lost write.
        self.diverged = False
        #: Number of pages from the start of the file that were preallocated.
        self.reserved = 0
        self.handles = 0
        self._owns_pages = True
        self._owns_medium = True

    def copy(self) -> Inode:
        """The same state; pages are shared until one of the two changes."""
        other = Inode.__new__(Inode)
        other.pages = self.pages
        other.size = self.size
        other.medium = self.medium
        other.medium_size = self.medium_size
        other.pending = self.pending.copy()
        other.diverged = self.diverged
        other.reserved = self.reserved
        other.handles = 0
        self._owns_pages = self._owns_medium = other._owns_pages = other._owns_medium = False
        return other

    def at_rest(self) -> Inode:
        """A file whose medium and cache hold what is on this one's medium.

        Space that was preallocated stays so as far as the size goes.
        """
        other = Inode.__new__(Inode)
        other.pages = other.medium = self.medium
        other.size = other.medium_size = self.medium_size
        other.pending = []
        other.diverged = False
        other.reserved = min(self.reserved, -(-self.medium_size // PAGE))
        other.handles = 0
        self._owns_medium = other._owns_pages = other._owns_medium = False
        return other

    def set_all(self, pages: Pages, size: int) -> None:
        """Make these the pages and the size, in the cache and on the medium alike."""
        self.pages = self.medium = pages
        self.size = self.medium_size = size
        self._owns_pages = self._owns_medium = False

    def medium_key(self) -> frozenset[tuple[int, bytes]]:
        """Equal for equal bytes on the medium of files of one size."""
        return frozenset(item for item in self.medium.items() if item[1] != _ZERO_PAGE)

    def has_new_space(self) -> bool:
        """Is there pending data in space that the file did not have?"""
        floor = max(self.medium_size, self.reserved * PAGE)
        return any(isinstance(c, Write) and c.offset + len(c.data) > floor for c in self.pending)

    def changed_pages(self) -> Pages:
        """The cached pages, for changing."""
        if not self._owns_pages:
            self.pages = self.pages.copy()
            self._owns_pages = True
        return self.pages

    def changed_medium(self) -> Pages:
        """The medium's pages, for changing."""
        if not self._owns_medium:
            self.medium = self.medium.copy()
            self._owns_medium = True
        return self.medium

    def blocks(self) -> int:
        """Number of 4096-byte blocks that the file occupies."""
        reserved = self.reserved
        return reserved + sum(number >= reserved for number in self.pages)

    def new_blocks(self, offset: int, size: int) -> int:
        """Number of blocks that a write there would have to find space for."""
        numbers = range(max(offset // PAGE, self.reserved), -(-(offset + size) // PAGE))
        return sum(number not in self.pages for number in numbers)

    def write(self, operation: int, offset: int, data: bytes, lands_at: int | None) -> None:
        """Show `data` at `offset`, and leave it pending at `lands_at` (None: it is lost)."""
        if not data:
            return
        end = offset + len(data)
        if end > self.size or (self.diverged and end > self.medium_size):
            # (The second condition: a failed sync dropped the size, and data that needs it brings it back.)
            self.size = max(self.size, end)
            self.pending.append(Resize(operation, end, False))
        write_pages(self.changed_pages(), offset, data)
        if lands_at != offset:
            self.diverged = True
        if lands_at is not None:
            self.pending.append(Write(operation, lands_at, data))

    def resize(self, operation: int, size: int, *, exact: bool) -> None:
        """Take the size now and leave it pending."""
        if size < self.size:
            cut_pages(self.changed_pages(), size)
            self.reserved = min(self.reserved, -(-size // PAGE))
        self.size = size
        self.pending.append(Resize(operation, size, exact))

    def sync(self, *, data_only: bool) -> None:
        """Make what is pending durable; `data_only` leaves a size pending that no data needs."""
        if not self.pending:
            return
        size_before = self.medium_size
        operation = self.pending[-1].operation
        written_end = 0
        for change in self.pending:
            if isinstance(change, Write):
                written_end = max(written_end, change.offset + len(change.data))
        if data_only and self.size < size_before:
            # Nothing that is read back needs a shrink, so the old end may still be on the medium.
            self._apply_below(self.size)
            self.pending = [Resize(operation, self.size, True)]
            return
        self._apply(self.pending)
        self.pending = []
        needed = max(size_before, min(written_end, self.size))
        if data_only and self.medium_size > needed:
            cut_pages(self.changed_medium(), needed)
            self.pending = [Resize(operation, self.medium_size, False)]
            self.medium_size = needed

    def fail_sync(self, survivors: list[bool]) -> None:
        """A sync that failed: the survivors are on the medium, the rest is dropped but still shown."""
        pages, size = self.after(survivors)
        self.medium, self._owns_medium, self.medium_size = pages, True, size
        self.pending = []
        self.diverged = True

    def _apply(self, changes: list[Write | Resize]) -> None:
        medium = self.changed_medium()
        if not self.diverged:
            # The cache agrees with what is pending, so its pages can be taken.
            dirty: set[int] = set()
            for change in changes:
                if isinstance(change, Write):
                    dirty.update(range(change.offset // PAGE, (change.offset + len(change.data) - 1) // PAGE + 1))
                elif change.exact:
                    cut_pages(medium, change.size)
            for number in dirty:
                page = self.pages.get(number)
                if page is None:
                    medium.pop(number, None)
                else:
                    medium[number] = page
            self.medium_size = self.size
            return
        for change in changes:
            if isinstance(change, Write):
                write_pages(medium, change.offset, change.data)
            else:
                self._apply_size(medium, change)

    def _apply_below(self, size: int) -> None:
        """Apply the pending data before `size`; leave the size on the medium and what lies behind it."""
        medium = self.changed_medium()
        old = {number: page for number, page in medium.items() if number * PAGE >= size - PAGE}
        size_before = self.medium_size
        self._apply(self.pending)
        last, keep = divmod(size, PAGE)
        for number, page in old.items():
            if number > last or (number == last and keep == 0):
                medium[number] = page
            elif number == last:
                medium[number] = medium.get(number, _ZERO_PAGE)[:keep] + page[keep:]
        self.medium_size = size_before
        cut_pages(medium, size_before)

    def _apply_size(self, medium: Pages, change: Resize) -> None:
        if change.exact:
            if change.size < self.medium_size:
                cut_pages(medium, change.size)
            self.medium_size = change.size
        else:
            self.medium_size = max(self.medium_size, change.size)

    def pieces(self) -> Iterator[tuple[int, str, int, int]]:
        """What may survive a power cut on its own: (operation, "write" or "size", start, stop)."""
        for change in self.pending:
            if isinstance(change, Write):
                for start, stop in change.sectors():
                    yield change.operation, "write", start, stop
            else:
                yield change.operation, "size", change.size, change.size

    def after(self, survivors: list[bool], stale: dict[int, bytes] | None = None) -> tuple[Pages, int]:
        """Pages and size on the medium if just the pieces marked in `survivors` get there.

        `stale`: old pages of the disk, which show through where the file's new size survives and
        the data does not; None for a file system that hands out zeros.
        """
        pages = self.medium.copy()
        size = self.medium_size
        if stale:
            self._fill_stale(pages, survivors, stale)
        index = 0
        for change in self.pending:
            if isinstance(change, Resize):
                if survivors[index]:
                    if change.exact and change.size < size:
                        cut_pages(pages, change.size)
                    size = change.size if change.exact else max(size, change.size)
                index += 1
                continue
            for start, stop in change.sectors():
                if survivors[index]:
                    write_pages(pages, start, change.data[start - change.offset : stop - change.offset])
                index += 1
        cut_pages(pages, size)
        return pages, size

    def _fill_stale(self, pages: Pages, survivors: list[bool], stale: dict[int, bytes]) -> None:
        any_page = next(iter(stale.values()))
        # Preallocated space is marked unwritten by the file system and never shows old bytes.
        floor = max(self.medium_size, self.reserved * PAGE)
        unwritten: set[int] = set()
        written: set[int] = set()
        for (_, what, start, _), survives in zip(self.pieces(), survivors, strict=True):
            if what == "write" and start >= floor:
                (written if survives else unwritten).add(start - start % SECTOR)
        for sector in unwritten - written:
            page = stale.get(sector // PAGE, any_page)
            write_pages(pages, sector, page[sector % PAGE : sector % PAGE + SECTOR])


class Directory:
    """A directory: names as programs see them, as they are on the medium, and the changes between."""

    __slots__ = ("entries", "medium", "parent", "pending", "removed")

    def __init__(self, parent: Directory | None = None) -> None:
        #: The directory that holds it; the root holds itself.
        self.parent = self if parent is None else parent
        self.entries: dict[str, Inode | Directory] = {}
        self.medium: dict[str, Inode | Directory] = {}
        self.pending: list[Entry] = []
        self.removed = False

    def change(self, entry: Entry) -> None:
        entry.apply(self.entries)
        self.pending.append(entry)

    def sync(self) -> None:
        for entry in self.pending:
            entry.apply(self.medium)
        self.pending = []

    def fail_sync(self, survivors: list[bool]) -> None:
        """A sync that failed: the survivors are on the medium, the others stay pending.

        Unlike data, entries are not dropped: a journal that cannot be written shuts the file system down
        (`fail(..., forever=True)`), it does not forget.
        """
        self.medium = self.after(survivors)
        self.pending = [entry for entry, survives in zip(self.pending, survivors, strict=True) if not survives]

    def after(self, survivors: list[bool]) -> dict[str, Inode | Directory]:
        """The entries on the medium if just the marked changes get there."""
        entries = self.medium.copy()
        for entry, survives in zip(self.pending, survivors, strict=True):
            if survives:
                entry.apply(entries)
        return entries
