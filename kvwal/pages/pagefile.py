"""The page file: generations of the tree, from one meta flip to the next.

A checkpoint makes generation g + 1 from g, in this order:

1. The first one after an open makes sure of what it starts from (`confirm_slots`): with both slots valid it
   writes the newer slot again, in place and with the same bytes, and syncs. The process that wrote
   it may have died between write and sync, or seen the sync fail; only then would it be unsafe to
   write over the other slot. Otherwise the slot that is of no use is filled with zeros, so that it
   cannot come back to life above pages that have been reused.
2. Pages that neither g, nor g - 1, nor a pinned generation, nor a base reaches are free to be written. Where a pin may
   be missing, none is (`append`): only what lies behind the end.
3. The merge writes new nodes into free pages and behind the end of the file; then what changed of the bases (bases.py):
   the dead list of this checkpoint, and the rows of bases that come and go; then the new free list.
4. Durability: the file is synced. Nothing refers to the new pages yet.
5. The caller's `before_flip` runs.
6. Durability: the meta is written into its slot, over g - 1, and synced. This is the commit. If it is interrupted, by
   an exception of a signal handler, the next checkpoint begins with it.
7. The file is cut behind the last page that g + 1, g, a pinned generation or a base needs.

A failure in 2 to 5 leaves g as it was, in memory too: the checkpoint can be tried again after
DiskFullError. Any other failed write or sync, and every failure in 1 and 6, leaves it open what is on
disk: the page file then refuses checkpoints (PoisonedError) until it is opened anew. Reads go on.

A checkpoint may come in parts: the sorted updates are cut into ranges of keys, and each becomes a generation of its
own. All but the last keep the old seqno and say in `replay_through` which commit the last will have; deleted ranges go
with the first. Such a generation alone is no state that ever was: it is right once the log is replayed over it, from
its seqno through that commit. So the log is flushed through there before the first part, and a recovery that does
not get there met damage and not a torn tail. Part k + 2 takes the pages that part k freed, which is what parts are
for: writing over every leaf takes 1.6 times the tree in four parts, and 3 times in one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TypedDict, Unpack

from kvwal.errors import DiskFullError, poisoned, read_only
from kvwal.features import VERSION
from kvwal.files import Directory, File, is_full
from kvwal.files.names import DATA
from kvwal.keys import KeyRange, Seqno
from kvwal.pages.bases import Bases, Keep, Table
from kvwal.pages.catalogue import Changes, merge_tables, root_of
from kvwal.pages.compact import tail_limit
from kvwal.pages.freelist import Allocator, Freed, FreeList
from kvwal.pages.merge import Columns
from kvwal.pages.meta import Choice, Meta
from kvwal.pages.node import PAGE_SIZE
from kvwal.pages.pager import Pager, ProvingPager
from kvwal.pages.pins import Pins
from kvwal.pages.slots import confirm_slots, read_slots, salvage_slots, write_slot
from kvwal.pages.space import Space
from kvwal.pages.tree import Tree
from kvwal.pages.writer import PageWriteError, PageWriter

__all__ = ["Facts", "PageFile"]


class Facts(TypedDict, total=False):
    """What the engine has a meta say beside the trees.

    `wall_us`: the system's clock now. `session`: the number of this writable open. `required`: bits (`features`) of
    what the kept log holds; once set they stay. `replay_through`: the commit through which recovery must replay the
    log, because the trees hold parts of the commits up to there; it holds until a checkpoint has that seqno.
    """

    wall_us: int
    session: int
    line: bytes
    required: int
    replay_through: Seqno


class PageFile:
    """One open page file. Reads from any thread; one caller at a time of `checkpoint`."""

    def __init__(self, directory: Directory, *, cache_bytes: int, writable: bool, salvages: bool = False) -> None:
        """Open. Reads the two meta slots and the root, and the bases if there are any; writes nothing.

        Args:
            cache_bytes: memory for nodes, Python's overhead included.
            salvages: a slot, or a root, that cannot be read is damaged. Else that is an OSError, since it says nothing
                of the generation.

        Raises:
            CorruptionError: no generation can be read.
            FormatError: a newer version of kvwal wrote the file.
        """
        self._file: File = directory.open(DATA, write=writable)
        self._writable = writable
        self._salvages = salvages
        self._confirmed = False
        #: A flip that is under way, or was interrupted: from which meta to which, the bases, the free list, what is
        #: released.
        self._next: tuple[Meta, Meta, Table, FreeList, list[Freed]] | None = None
        self._poisoned: BaseException | None = None
        try:
            self._begin(cache_bytes)
        except BaseException:
            self._file.close()
            raise
        #: Which generations must stay beside the two newest.
        self.pins = Pins({*self._current(), *self.bases.generations()})
        #: Which pages may be written.
        self.space = Space(self.pager, self.pins, self.bases)

    def _begin(self, cache_bytes: int) -> None:
        choice = (salvage_slots if self._salvages else read_slots)(self._file)
        pager = Pager(self._file, cache_bytes)
        self._take(choice, pager, Bases(pager, choice.meta))

    def _take(self, choice: Choice, pager: Pager, bases: Bases) -> None:
        """Go on from the generation that was chosen."""
        #: Reads nodes, through the cache.
        self.pager = pager
        #: Which row of the table in meta.py held, and what was chosen.
        self.choice: Choice = choice
        #: The generations that are kept, and stay readable until they are dropped.
        self.bases = bases
        #: The newest generation.
        self.meta: Meta = choice.meta
        #: The generation before it, if it can be read. The log is kept back to it.
        self.older: Meta | None = choice.older

    def tree(self, meta: Meta | None = None, table: int = 0) -> Tree:
        """A view of a table in a generation; in the newest if none is named. Pin it for as long as it is used.

        Reads the catalogue for a table other than 0. CorruptionError if that does not verify.
        """
        meta = self.meta if meta is None else meta
        return Tree(self.pager, meta, *root_of(self.pager, meta, table))

    def _current(self) -> set[int]:
        return {self.meta.generation} | ({self.older.generation} if self.older else set())

    # Checkpoints.

    def checkpoint(
        self,
        updates: Iterable[Columns],
        ranges: Sequence[KeyRange] = (),
        *,
        seqno: Seqno,
        time_us: int,
        tables: Mapping[int, Changes] = MappingProxyType({}),
        before_flip: Callable[[], None] | None = None,
        yield_to_writers: Callable[[], None] = lambda: None,
        compact: bool = False,
        append: bool = False,
        keep: Keep | None = None,
        drop: Collection[int] = (),
        expiring: bool = False,
        **facts: Unpack[Facts],
    ) -> Meta:
        """Make the next generation: the newest one, without `ranges`, then with `updates`.

        Args:
            updates: runs of keys of table 0 and their values (None: delete), sorted by key, no key twice. Read as a
                stream.
            seqno: the last commit that the new generation holds.
            time_us: the time of that commit.
            tables: what is done to other tables. All keys deleted: the table is dropped.
            before_flip: called when all pages are durable and before the generation is; what it
                raises stops the checkpoint and passes through.
            yield_to_writers: called at least once a leaf.
            compact: move everything that lies behind free pages into them, however few they are, so that the
                file can be cut two generations later.
            append: write behind the end of the file alone, as if no page were free; nothing is moved or cut then.
            keep: make the new generation a base: its trees stay until it is dropped.
            drop: bases that are no longer kept, by generation. Their pages are free like those of any generation.
            expiring: whether values of `updates` may expire.
            facts: what else the meta is to say; each stays as it was if it is not given.

        Returns:
            The new generation's meta, durable.

        Raises:
            ValueError: one of `drop` is no base, or is kept for a reason that only a newer version knows; or `keep` has
                no reason that is known, or a name of more than 64 bytes. Nothing has changed.
            DiskFullError: nothing has changed; try again when there is space.
            CorruptionError: a node that was needed does not verify; nothing has changed.
            PoisonedError: an earlier checkpoint failed in a way that leaves the disk in doubt.
            OSError: a read, write or sync failed. After a write or sync the file is poisoned.
        """
        if not self._writable:
            raise read_only()
        if self._poisoned is not None:
            raise poisoned(self._poisoned) from self._poisoned
        self._confirm()
        if self._flip():
            # The caller did not know of what that dropped.
            drop = {*drop} & {*self.bases.generations()}
        self.bases.check_changes(keep, drop)
        old = self.meta
        facts["required"] = old.required | facts.get("required", 0)
        facts["replay_through"] = max(old.replay_through, facts.get("replay_through", seqno))
        draft = replace(old, generation=old.generation + 1, seqno=seqno, time_us=time_us, writer=VERSION, **facts)
        try:
            changes = {**tables, 0: Changes(updates, ranges, expiring)}
            made = self._build(draft, changes, yield_to_writers, compact, append, keep, drop)
            if before_flip is not None:
                before_flip()
            self._next = (old, *made)
        except BaseException:
            if self._next is None:
                self._roll_back()
            raise
        self._flip()
        return made[0]

    @property
    def poisoned(self) -> bool:
        """Whether a write or a flush failed, so that there will be no other checkpoint."""
        return self._poisoned is not None

    def readable(self) -> list[Meta]:
        """The generations whose pages are whole: the newest, and the one before unless a flip over its slot was
        interrupted.
        """
        return [self.meta] if self.older is None or self._next is not None else [self.meta, self.older]

    def _proving(self, meta: Meta) -> ProvingPager:
        """What reads a readable generation as it is on disk. For this package."""
        del meta
        return self.pager.proving()

    def _flip(self) -> bool:
        """Write the next meta, durably, and go on from it. If that was interrupted, it is done again. Whether there was
        one.

        Nothing else is written before: until then the new slot may be on disk or not, and both generations are whole.
        """
        if self._next is None:
            return False
        old, meta, table, free, released = self._next
        try:
            write_slot(self._file, meta)
        except OSError as failure:
            self._poison(failure)
            raise
        self.older = old
        self.meta = meta
        self.space.install(meta, table, free, released)
        self._cut_file()
        self._next = None
        return True

    def _poison(self, failure: OSError) -> None:
        self._poisoned = failure
        self._next = None
        # There will be no other checkpoint, so both generations stay for readers and for `check`.
        self.pins.keep_only(self._current(), self.bases.generations())

    def _confirm(self) -> None:
        if self._confirmed:
            return
        try:
            confirm_slots(self._file, self.choice)
        except OSError as failure:
            # What an interruption leaves is written, and flushed, again by the next checkpoint.
            self._poisoned = failure
            raise
        self._confirmed = True

    def _build(
        self,
        draft: Meta,
        changes: Mapping[int, Changes],
        yield_to_writers: Callable[[], None],
        compact: bool,
        append: bool,
        keep: Keep | None,
        drop: Collection[int],
    ) -> tuple[Meta, Table, FreeList, list[Freed]]:
        """Write everything of the next generation but its meta, and sync it.

        Returns the draft made whole, its bases, its free list, and the extents that no generation needs once it is
        there.
        """
        old = self.meta
        size = self._file.size()
        free, ledger = self.space.begin(old, drop, yield_to_writers)
        allocator = Allocator(free.free, old.page_count, append=append)
        writer = PageWriter(self._file, allocator, draft.generation)
        freed = Freed(draft.generation)
        moves = not append and (compact or not old.bases_height)
        limit = tail_limit(old, free, compact=compact) if moves else None
        try:
            meta = merge_tables(
                self.pager, writer, freed, draft, changes, limit=limit, yield_to_writers=yield_to_writers
            )
            if old.free_page:
                ledger.freed.add(old.free_page, old.free_pages, old.generation, 0)
            meta, table = ledger.write(meta, allocator, writer, freed, keep)
            meta, free, released = self.space.write(meta, table, allocator, writer, [*free.held, ledger.freed])
            writer.flush()
        except PageWriteError as failure:
            cause = failure.cause
            if not failure.is_of_flush and (is_full(cause) or cause.errno == errno.EFBIG):
                why = "" if is_full(cause) else f" ({cause.strerror})"
                raise DiskFullError(
                    f"no space for a checkpoint{why}; nothing was lost, and it can be tried again when there is space"
                ) from cause
            self._poisoned = cause
            raise cause from None
        try:
            if allocator.page_count * PAGE_SIZE > size:
                self._file.sync()
            else:
                self._file.datasync()
        except OSError as failure:
            # An interruption does not: no generation refers to what was written, and the next one flushes its own.
            self._poisoned = failure
            raise
        return meta, table, free, released

    def _roll_back(self) -> None:
        """Forget a checkpoint that failed before its flip. Nothing that is referred to was written over."""
        self.pins.keep_only(self._current(), self.bases.generations())
        if self._poisoned is None:
            # Give a full disk its space back.
            self._cut_file()

    def _cut_file(self) -> None:
        """Cut off what lies behind the pages that the newest generation accounts for, older ones' included."""
        end = self.meta.page_count * PAGE_SIZE
        try:
            if self._file.size() > end:
                self._file.truncate(end)
        except OSError:
            # Pages too many do no harm, and the next checkpoint cuts again.
            return

    # The rest.

    def close(self) -> None:
        """Release the file and write nothing; a forked child may too. Idempotent. Later reads raise ClosedError."""
        self._writable = False
        self.pager.close()
