"""Bases: generations that are kept, so that their trees can be read when newer ones are there.

The meta points to the base tree, a tree like any other. A base is an entry of it; the key is the generation, 8 bytes
big-endian, and the value is little-endian:

    offset  size  field
         0     8  seqno
         8     8  time, microseconds since 1970-01-01 UTC, of that commit
        16     8  wall clock at the flip
        24    20  pointer to the root of the catalogue (format in node.py)
        44     4  its height
        48    20  pointer to the root of table 0
        68     4  its height
        72     4  page count: no page of its trees lies behind
        76     4  dead list (deadlist.py) of what was freed between the base before it and this one: first page; 0: none
        80     4  dead list: crc
        84     4  dead list: length in pages
        88     8  bytes held: of the pages that its dead list names
        96     4  flags: why it is kept (`WINDOW` and what follows)
       100    32  state digest: zeros
       132     2  length of the name, 0 to 64; the name follows, UTF-8

An entry of another size, or with a pointer to nowhere, is damage.

Invariant: an extent born in generation b and freed by generation f is reached by the generations b <= g < f. So when f
frees it, a base reaches it exactly if b is not above the newest base; then it goes into the dead list of f, and
otherwise into the free list.

Invariant: of what the dead list of a base (or of the meta) names, the base before it reaches all, and it reaches
nothing. So when a base goes, those extents of the next dead list that were born after the base before it are reached
by no other, and become free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import pairwise
from struct import Struct
from typing import Final, NamedTuple

from kvwal.errors import CorruptionError, Error, Finding, InternalError
from kvwal.features import BASES
from kvwal.files.names import DATA
from kvwal.keys import Seqno
from kvwal.pages.deadlist import DeadList, ListRef, read_dead_list
from kvwal.pages.freelist import Allocator, Freed
from kvwal.pages.merge import Merge, MergeJob
from kvwal.pages.meta import Meta
from kvwal.pages.node import NO_POINTER, PAGE_SIZE, POINTER_SIZE, decode_leaf
from kvwal.pages.pager import Pager
from kvwal.pages.writer import PageWriter

__all__ = [
    "BASE",
    "BEGINNING",
    "BY_NAME",
    "WINDOW",
    "Base",
    "Bases",
    "Keep",
    "Ledger",
    "Table",
    "decode_base",
    "encode_base",
    "lists_of",
]

# On disk: never change.
BASE: Final = Struct("<QQQ20sI20sIIIIIQI32sH")
_KEY_BYTES: Final = 8
#: Flags: why a base is kept.
WINDOW: Final = 1 << 0
HOURLY: Final = 1 << 1
DAILY: Final = 1 << 2
MONTHLY: Final = 1 << 3
BACKUP: Final = 1 << 4
BY_NAME: Final = 1 << 5
_KNOWN_FLAGS: Final = WINDOW | HOURLY | DAILY | MONTHLY | BACKUP | BY_NAME
_MAX_NAME_BYTES: Final = 64
_NO_LIST: Final = ListRef(0, 0, 0, 0, 0)


class Base(NamedTuple):
    """A kept generation: what its meta said, and why it is kept."""

    generation: int
    seqno: Seqno
    time_us: int
    wall_us: int
    catalogue: bytes
    catalogue_height: int
    root: bytes
    height: int
    page_count: int
    dead_page: int
    dead_crc: int
    dead_pages: int
    held_bytes: int
    flags: int
    state_digest: bytes = bytes(32)
    name: str = ""

    def meta(self, newest: Meta) -> Meta:
        """What reads its trees as those of any generation."""
        return replace(
            newest,
            generation=self.generation,
            seqno=self.seqno,
            time_us=self.time_us,
            wall_us=self.wall_us,
            replay_through=self.seqno,
            catalogue=self.catalogue,
            catalogue_height=self.catalogue_height,
            root=self.root,
            height=self.height,
            page_count=self.page_count,
        )


#: The moment before the first commit of a store that was made empty: no keys. It is in no base tree.
BEGINNING: Final = Base(0, Seqno(0), 0, 0, NO_POINTER, 0, NO_POINTER, 0, 0, 0, 0, 0, 0, WINDOW)


def encode_base(base: Base) -> tuple[bytes, bytes]:
    """Key and value of its entry."""
    name = base.name.encode()
    return base.generation.to_bytes(_KEY_BYTES, "big"), BASE.pack(*base[1:-1], len(name)) + name


def decode_base(key: bytes, value: bytes, newest: int) -> Base:
    """The base of an entry in generation `newest`. CorruptionError if it is none."""
    if len(key) == _KEY_BYTES and len(value) >= BASE.size:
        *fields, size = BASE.unpack_from(value)
        try:
            base = Base._make((int.from_bytes(key, "big"), *fields, value[BASE.size :].decode()))
        except UnicodeDecodeError:
            size = -1
        if (
            size == len(value) - BASE.size <= _MAX_NAME_BYTES
            and bool(base.height) == (base.root != NO_POINTER)
            and bool(base.catalogue_height) == (base.catalogue != NO_POINTER)
        ):
            if base.generation > newest:
                raise CorruptionError(DATA, None, f"base {base.generation} is newer than generation {newest}")
            return base
    raise CorruptionError(DATA, None, f"the base tree has an entry {key.hex()} that is no base")


class Keep(NamedTuple):
    """Why a generation becomes a base: flags, and a name."""

    flags: int = WINDOW
    name: str = ""


class Table(NamedTuple):
    """The bases of a generation, ascending, and the dead list of what was freed since the newest of them."""

    bases: tuple[Base, ...] = ()
    dead: ListRef | None = None


def read_bases(pager: Pager, meta: Meta) -> Iterator[Base | Finding]:
    """The bases that can be read, ascending, and what does not verify."""
    if meta.bases_height:
        yield from _read_bases(pager, meta.bases, meta.bases_height - 1, meta.generation)


def _read_bases(pager: Pager, pointer: bytes, level: int, newest: int) -> Iterator[Base | Finding]:
    try:
        node = pager.node(pointer, 0, level)
    except CorruptionError as error:
        entries = int.from_bytes(pointer[12:], "little")
        yield replace(error.finding, reason=f"the base tree: {error.reason}; {entries} bases cannot be read")
        return
    if level:
        for at in range(0, len(node[1]), POINTER_SIZE):
            yield from _read_bases(pager, node[1][at : at + POINTER_SIZE], level - 1, newest)
        return
    keys, values = node[:2] if isinstance(node, tuple) else decode_leaf(node)
    for key, value in zip(keys, values, strict=True):
        try:
            yield decode_base(key, value, newest)
        except CorruptionError as error:
            yield error.finding


def read_table(pager: Pager, meta: Meta) -> Table:
    """The bases, and the place of the generation's own dead list. CorruptionError if something does not verify."""
    bases = []
    for found in read_bases(pager, meta):
        if isinstance(found, Finding):
            raise CorruptionError(found.file, found.offset, found.reason)
        bases.append(found)
    dead = None
    if meta.dead_page:
        dead = ListRef(meta.dead_page, meta.dead_crc, meta.dead_pages, meta.generation, 0)
        _, content = read_dead_list(pager, dead, meta.generation + 1, meta.page_count)
        dead = content.ref(*dead[:3])
    return Table(tuple(bases), dead)


def dead_list_of(before: int, base: Base) -> ListRef | None:
    """The dead list of a base, which names nothing that was born after the base before it."""
    if not base.dead_page:
        return None
    return ListRef(base.dead_page, base.dead_crc, base.dead_pages, before, base.held_bytes // PAGE_SIZE)


def lists_of(table: Table) -> Iterator[tuple[int, int, ListRef]]:
    """Of each dead list: the base before its owner, the generation of its owner (0: the newest), where it lies."""
    bases = table.bases
    for before, base in pairwise(bases):
        ref = dead_list_of(before.generation, base)
        if ref is not None:
            yield before.generation, base.generation, ref
    if bases and table.dead is not None:
        yield bases[-1].generation, 0, table.dead


class Bases:
    """The bases of the newest generation. One checkpoint at a time changes them; figures from any thread."""

    def __init__(self, pager: Pager, newest: Meta) -> None:
        """Read the base tree, if there is one. Nothing that fails here keeps the newest generation from being read."""
        self._newest = newest
        #: What can be read.
        self.table = Table()
        #: Why the next checkpoint has to read them again, or make them anew; None if all is well.
        self.damage: Error | OSError | None = None
        self._pager = pager
        try:
            self.read()
        except OSError as failure:
            self.damage = failure

    def read(self) -> None:
        """Read the base tree again. What does not verify is noted in `damage`; OSError if a read fails."""
        try:
            self.table, self.damage = read_table(self._pager, self._newest), None
        except CorruptionError as error:
            readable = tuple(base for base in read_bases(self._pager, self._newest) if isinstance(base, Base))
            self.table, self.damage = Table(readable), error

    def all(self) -> tuple[Base, ...]:
        """All that can be read, ascending."""
        return self.table.bases

    def generations(self) -> list[int]:
        """Their generations, ascending."""
        return [base.generation for base in self.table.bases]

    def meta(self, generation: int) -> Meta:
        """The meta of a base: for `PageFile.tree` and `check`. Pin it. ValueError if there is no such base."""
        for base in self.table.bases:
            if base.generation == generation:
                return base.meta(self._newest)
        raise ValueError(f"generation {generation} is not a base")

    def held_bytes(self) -> int:
        """Bytes of pages that only bases reach."""
        table = self.table
        dead = table.dead.named_pages * PAGE_SIZE if table.dead else 0
        return dead + sum(base.held_bytes for base in table.bases)

    def check_changes(self, keep: Keep | None, drop: Collection[int]) -> None:
        """ValueError as `PageFile.checkpoint` says."""
        if keep is not None and (not 0 < keep.flags <= _KNOWN_FLAGS or len(keep.name.encode()) > _MAX_NAME_BYTES):
            raise ValueError(f"a base needs a reason to be kept, and a name of at most {_MAX_NAME_BYTES} bytes")
        known = {base.generation: base.flags for base in self.table.bases}
        for generation in drop:
            if generation not in known:
                raise ValueError(f"generation {generation} is not a base")
            if known[generation] & ~_KNOWN_FLAGS:
                raise ValueError(f"base {generation} is kept for a reason that this kvwal does not know")

    def install(self, newest: Meta, table: Table) -> None:
        """Go on from what a checkpoint wrote."""
        self._newest, self.table, self.damage = newest, table, None


class Ledger:
    """What one checkpoint does to bases and dead lists; used once. Not thread-safe."""

    def __init__(self, pager: Pager, old: Meta, table: Table) -> None:
        """Begin from the bases of `old`."""
        self._pager = pager
        self._page_count = old.page_count
        self._generation = old.generation + 1
        #: What goes into the free list, as freed by the generation that is being made.
        self.freed = Freed(self._generation)
        self._root = old.bases, old.bases_height
        self._bases = {base.generation: base for base in table.bases}
        self._table = table
        # The dead lists that have to be written, by the generation that owns them. The new generation owns that of what
        # was freed since the newest base.
        self._lists: dict[int, DeadList] = {}
        self._gone: set[int] = set()
        self._changed: set[int] = set()

    @classmethod
    def made_anew(cls, pager: Pager, old: Meta, dead: list[tuple[Base, Freed]], last: Freed) -> Ledger:
        """One that writes all bases and dead lists anew: of each base what is dead between it and the one before.

        `last` is what was freed since the newest base. The places of what is replaced are not in `freed`.
        """
        ledger = cls(pager, old, Table())
        ledger._root = NO_POINTER, 0
        for base, freed in [*dead, (None, last)]:
            owner = ledger._generation if base is None else base.generation
            if base is not None:
                ledger._bases[owner] = base._replace(dead_page=0)
                ledger._changed.add(owner)
            ledger._list(owner).freed.extend(freed)
        return ledger

    def _list(self, owner: int) -> DeadList:
        """A dead list that is going to be written. What it has so far becomes a list of it."""
        found = self._lists.get(owner)
        if found is None:
            if owner == self._generation:
                ref = self._table.dead
            else:
                ref = dead_list_of(max((each for each in self._bases if each < owner), default=0), self._bases[owner])
            found = self._lists[owner] = DeadList(self._generation, [ref] if ref else [])
            if owner != self._generation:
                self._changed.add(owner)
        return found

    def drop(self, generations: Collection[int]) -> None:
        """Drop these bases: what no other one reaches becomes free. CorruptionError if a dead list does not verify."""
        for generation in generations:
            if generation not in self._bases:
                continue
            before = max((each for each in self._bases if each < generation), default=-1)
            after = min((each for each in self._bases if each > generation), default=self._generation)
            dead = self._list(after)
            dead.open(self._pager, before, self._page_count, self.freed)
            self.freed.extend(dead.take(before))
            own = self._list(generation)
            dead.freed.extend(own.freed)
            dead.lists += own.lists
            del self._lists[generation], self._bases[generation]
            self._gone.add(generation)

    def write(
        self, meta: Meta, allocator: Allocator, writer: PageWriter, freed: Freed, keep: Keep | None
    ) -> tuple[Meta, Table]:
        """Write what has changed, for a generation whose trees are written and which freed `freed` of its former ones.

        Args:
            keep: if this generation becomes a base.
        """
        bases = self._bases
        newest = max(bases, default=None)
        held, rest = (Freed(freed.generation), freed) if newest is None else freed.parted([newest])
        self.freed.extend(rest)
        if held.places:
            self._list(self._generation).freed.extend(held)
        if keep is not None:
            if meta.replay_through > meta.seqno:
                raise InternalError("a generation that is right only after replay cannot be a base")
            bases[meta.generation] = _base_of(meta, allocator.page_count, *keep)
            self._changed.add(meta.generation)
        refs = {owner: each.write(allocator, writer) for owner, each in self._lists.items()}
        last = refs.get(meta.generation, self._table.dead)
        if keep is not None:
            refs[meta.generation], last = last, None
        for generation in self._changed & bases.keys():
            ref = refs[generation] or _NO_LIST
            bases[generation] = bases[generation]._replace(
                dead_page=ref.page,
                dead_crc=ref.crc,
                dead_pages=ref.pages,
                held_bytes=ref.named_pages * PAGE_SIZE,
            )
        root, height = self._write_rows(writer)
        rows = self._table.bases
        if self._changed or self._gone:
            rows = tuple(base for _, base in sorted(bases.items()))
        dead = last or _NO_LIST
        meta = replace(
            meta,
            bases=root,
            bases_height=height,
            dead_page=dead.page,
            dead_crc=dead.crc,
            dead_pages=dead.pages,
            required=meta.required & ~BASES | (BASES if height else 0),
        )
        return meta, Table(rows, last)

    def _write_rows(self, writer: PageWriter) -> tuple[bytes, int]:
        changed = sorted(self._changed & self._bases.keys() | self._gone)
        if not changed:
            return self._root
        keys = [generation.to_bytes(_KEY_BYTES, "big") for generation in changed]
        values = [encode_base(self._bases[each])[1] if each in self._bases else None for each in changed]
        merge = Merge(self._pager, writer, self.freed, MergeJob([(keys, values)]))
        return merge.run(*self._root)


def _base_of(meta: Meta, page_count: int, flags: int, name: str) -> Base:
    return Base(
        meta.generation,
        meta.seqno,
        meta.time_us,
        meta.wall_us,
        meta.catalogue,
        meta.catalogue_height,
        meta.root,
        meta.height,
        page_count,
        0,
        0,
        0,
        0,
        flags,
        name=name,
    )
