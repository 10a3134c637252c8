"""One simulated file or directory: what programs see, what is on the medium, and what lies between.

Invariant: unless a sync failed or a write was lost, the medium with every pending operation is what programs see.
Invariant: pending operations are in the order in which they were made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from kvwal.testing.content import PAGE, Content

__all__ = ["Directory", "Entry", "Inode", "Process"]

SECTOR: Final = 512


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


class Process:
    """A process on a simulated disk. When it is killed its handles stop working, and its locks are gone with it."""

    def __init__(self, pid: int, record_locks: dict[Inode, Process] | None = None) -> None:
        """`record_locks`: those of the processes beside it."""
        self.pid = pid
        self.alive = True
        #: Which process of the machine has the record lock of a file, unless it was killed.
        self.record_locks: dict[Inode, Process] = {} if record_locks is None else record_locks
        #: Held locks of directories: -1 for an exclusive one, else the number of shared ones.
        self.locks: dict[Directory, int] = {}
        #: Which of those that are locked are being recovered.
        self.recovering: set[Directory] = set()


class Inode:
    """A file."""

    __slots__ = ("_diverged", "_pending", "handles", "medium", "shown")

    def __init__(self, shown: Content | None = None, medium: Content | None = None) -> None:
        #: What programs see (the page cache).
        self.shown = Content() if shown is None else shown
        #: What would be found after a power cut in which nothing pending survived.
        self.medium = Content() if medium is None else medium
        #: How many files are open on it.
        self.handles = 0
        self._pending: list[Write | Resize] = []
        # Some of what programs see will never reach the medium: a failed sync, a lost write.
        self._diverged = False

    def copy(self) -> Inode:
        """The same state, open nowhere."""
        other = Inode(self.shown.copy(), self.medium.copy())
        other._pending = self._pending.copy()
        other._diverged = self._diverged
        return other

    def has_new_space(self) -> bool:
        """Is there pending data in space that the file did not have?"""
        floor = self._old_space()
        return any(isinstance(c, Write) and c.offset + len(c.data) > floor for c in self._pending)

    def _old_space(self) -> int:
        # Preallocated space is marked unwritten by the file system and never shows old bytes.
        return max(self.medium.size, self.shown.reserved * PAGE)

    def write(self, operation: int, offset: int, data: bytes, lands_at: int | None) -> None:
        """Show `data` at `offset`, and leave it pending at `lands_at` (None: it is lost)."""
        if not data:
            return
        shown = self.shown
        end = offset + len(data)
        if end > shown.size or (self._diverged and end > self.medium.size):
            # (The second condition: a failed sync dropped the size, and data that needs it brings it back.)
            shown.size = max(shown.size, end)
            self._pending.append(Resize(operation, end, False))
        shown.write(offset, data)
        if lands_at != offset:
            self._diverged = True
        if lands_at is not None:
            self._pending.append(Write(operation, lands_at, data))

    def resize(self, operation: int, size: int, *, exact: bool) -> None:
        """Take the size now and leave it pending."""
        shown = self.shown
        if size < shown.size:
            shown.cut(size)
            shown.reserved = min(shown.reserved, -(-size // PAGE))
        shown.size = size
        self._pending.append(Resize(operation, size, exact))

    def sync(self, *, data_only: bool) -> None:
        """Make what is pending durable; `data_only` leaves a size pending that no data needs."""
        if not self._pending:
            return
        shown, medium = self.shown, self.medium
        size_before = medium.size
        operation = self._pending[-1].operation
        written_end = 0
        for change in self._pending:
            if isinstance(change, Write):
                written_end = max(written_end, change.offset + len(change.data))
        if data_only and shown.size < size_before:
            # Nothing that is read back needs a shrink, so the old end may still be on the medium.
            self._apply_below(shown.size)
            self._pending = [Resize(operation, shown.size, True)]
            return
        self._apply()
        self._pending = []
        needed = max(size_before, min(written_end, shown.size))
        if data_only and medium.size > needed:
            medium.cut(needed)
            self._pending = [Resize(operation, medium.size, False)]
            medium.size = needed

    def fail_sync(self, survivors: list[bool]) -> None:
        """A sync that failed: the survivors are on the medium, the rest is dropped but still shown."""
        self.medium = self._after(survivors, None)
        self._pending = []
        self._diverged = True

    def drop_cache(self) -> None:
        """Show what is on the medium, unless something is pending."""
        if not self._pending:
            reserved = self.shown.reserved
            self.shown = self.medium.copy()
            self.shown.reserved = reserved
            self._diverged = False

    def _apply(self) -> None:
        medium = self.medium
        if not self._diverged:
            # The cache agrees with what is pending, so its pages can be taken.
            dirty: set[int] = set()
            for change in self._pending:
                if isinstance(change, Write):
                    dirty.update(range(change.offset // PAGE, (change.offset + len(change.data) - 1) // PAGE + 1))
                elif change.exact:
                    medium.cut(change.size)
            for number in dirty:
                medium.take_page(number, self.shown)
            medium.size = self.shown.size
            return
        for change in self._pending:
            if isinstance(change, Write):
                medium.write(change.offset, change.data)
            else:
                _take_size(medium, change)

    def _apply_below(self, size: int) -> None:
        """Apply the pending data before `size`; leave the size on the medium and what lies behind it."""
        medium = self.medium
        last, keep = divmod(size, PAGE)
        old = {number: page for number, page in medium.pages.items() if number >= last}
        size_before = medium.size
        self._apply()
        for number, page in old.items():
            if number > last:
                medium.write(number * PAGE, page)
            else:
                medium.write(size, page[keep:])
        medium.size = size_before
        medium.cut(size_before)

    def pieces(self) -> Iterator[tuple[int, str, int, int]]:
        """What may survive a power cut on its own: (operation, "write" or "size", start, stop)."""
        for change in self._pending:
            if isinstance(change, Write):
                for start, stop in change.sectors():
                    yield change.operation, "write", start, stop
            else:
                yield change.operation, "size", change.size, change.size

    def found(self, survivors: list[bool], stale: dict[int, bytes] | None) -> Inode:
        """The file after a power cut that just the pieces marked in `survivors` outlive.

        Space that was preallocated stays so as far as the size on the medium went.

        Args:
            stale: old pages of the disk, which show through where the file's new size survives and the data does not;
                None for a file system that hands out zeros.
        """
        medium = self._after(survivors, stale) if survivors else self.medium.copy()
        shown = medium.copy()
        shown.reserved = min(self.shown.reserved, -(-self.medium.size // PAGE))
        return Inode(shown, medium)

    def _after(self, survivors: list[bool], stale: dict[int, bytes] | None) -> Content:
        """What is on the medium if just these pieces get there."""
        medium = self.medium.copy()
        if stale:
            self._fill_stale(medium, survivors, stale)
        index = 0
        for change in self._pending:
            if isinstance(change, Resize):
                if survivors[index]:
                    _take_size(medium, change)
                index += 1
                continue
            for start, stop in change.sectors():
                if survivors[index]:
                    medium.write(start, change.data[start - change.offset : stop - change.offset])
                index += 1
        medium.cut(medium.size)
        return medium

    def _fill_stale(self, medium: Content, survivors: list[bool], stale: dict[int, bytes]) -> None:
        any_page = next(iter(stale.values()))
        floor = self._old_space()
        unwritten: set[int] = set()
        written: set[int] = set()
        for (_, what, start, _), survives in zip(self.pieces(), survivors, strict=True):
            if what == "write" and start >= floor:
                (written if survives else unwritten).add(start - start % SECTOR)
        for sector in unwritten - written:
            page = stale.get(sector // PAGE, any_page)
            medium.write(sector, page[sector % PAGE : sector % PAGE + SECTOR])


def _take_size(medium: Content, change: Resize) -> None:
    if not change.exact:
        medium.size = max(medium.size, change.size)
        return
    if change.size < medium.size:
        medium.cut(change.size)
    medium.size = change.size


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
