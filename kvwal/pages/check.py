"""Proving a page file sound: every page of a generation is reached once, or dead, or free, and all adds up.

Checked of each generation: the crc of every node and overflow value, kinds and levels, the order of
keys within and across nodes, that separators separate, counts and flags in pointers, the base tree, dead lists and the
free list, and that each page below the page count is reached by exactly one pointer, or named by one dead list, or
listed free. Of each base: its trees in the same way, and that each page of theirs is one that the newest generation
reaches, or that the dead list of a later base (or of the newest generation) names. A page that cannot be read is a
finding.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from operator import lt
from typing import Final

from kvwal.errors import CorruptionError, Finding
from kvwal.expiring import STAMP_BYTES, Expiring
from kvwal.files.names import DATA
from kvwal.pages.bases import Base, Table, decode_base, lists_of
from kvwal.pages.catalogue import EMPTY, Root, decode_entry
from kvwal.pages.deadlist import ListRef, read_dead_list
from kvwal.pages.freelist import extents_of
from kvwal.pages.meta import Meta
from kvwal.pages.node import (
    HAS_EXPIRING,
    HAS_OVERFLOW,
    OVERFLOW_REF,
    PAGE_SIZE,
    POINTER,
    POINTER_SIZE,
    ExpiringRef,
    OverflowRef,
    decode_leaf,
)
from kvwal.pages.pagefile import PageFile
from kvwal.pages.space import read_free_list

__all__ = ["check"]

# Up to this number of pages beyond the end of the file is accounted for.
_MOST_MISSING: Final = 1 << 20
#: What is walked beside the tree of a table.
_CATALOGUE: Final = -1
_BASES: Final = -2
#: What a page is; 0: not seen.
_REACHED: Final = 1
_FREE: Final = 2
_DEAD: Final = 3


def check(
    page_file: PageFile,
    meta: Meta | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    whole: bool = True,
) -> Iterator[Finding]:
    """Read everything of a generation, of both readable ones if none is named, and report what is wrong.

    Bypasses the cache. The generation, and bases, are pinned meanwhile. Keeps one byte per page of the file; with
    bases nine.

    Args:
        whole: also account for every page. Not for an old pinned generation: the pages that it does not reach
            itself, its free list among them, were reused long ago.
        progress: called with the pages read so far and the pages of all generations to be checked.
    """
    generations = page_file.readable() if meta is None else [meta]
    holder = object()
    pinned = {each.generation for each in generations}
    page_file.pins.hold(holder, pinned)
    try:
        for base in page_file.bases.generations() if whole else ():
            try:
                page_file.pins.hold(holder, {*pinned, base})
                pinned.add(base)
            except ValueError:
                # It is being dropped.
                continue
        total = sum(each.page_count for each in generations)
        done = 0
        for each in generations:
            yield from _Walk(page_file, each, progress, done, total).run(whole, pinned)
            done += each.page_count
            if progress is not None:
                progress(done, total)
    finally:
        page_file.pins.hold(holder, ())


class _Walk:
    def __init__(
        self,
        page_file: PageFile,
        meta: Meta,
        progress: Callable[[int, int], None] | None,
        done: int,
        total: int,
    ) -> None:
        self._reader = page_file._proving(meta)
        self._meta = meta
        self._progress = progress
        self._done = done
        self._total = total
        # Memory is taken for about the pages that are there. The last ones that a meta counts may be free, and missing.
        there = -(-self._reader.file.size() // PAGE_SIZE)
        self._counted = min(meta.page_count, max(there + _MOST_MISSING, 4 * there))
        #: Per page: what it is.
        self._seen = bytearray(self._counted)
        # With bases, per page: the generation that owns the dead list, and the crc of the node that begins there.
        pages = self._counted if meta.bases_height else 0
        self._dead = array("Q", bytes(8 * pages))
        self._walked = array("I", bytes(4 * pages))
        #: The base whose trees are walked.
        self._base: Base | None = None
        #: The table whose tree is walked, or another tree.
        self._table = 0
        #: What the catalogue says.
        self._roots: list[tuple[int, Root]] = []
        #: What the base tree says.
        self._bases: list[Base] = []
        #: Whether that could be read; else nothing is said of dead lists that depends on it.
        self._knows_bases = True

    def run(self, whole: bool, pinned: Collection[int]) -> Iterator[Finding]:
        meta = self._meta
        if self._counted < meta.page_count:
            yield self._finding(None, f"the meta counts {meta.page_count} pages, which are many more than the file has")
        self._seen[0:2] = b"\1\1"
        yield from self._trees(meta)
        if not whole:
            return
        for finding in self._tree(_BASES, Root(meta.bases, meta.bases_height)):
            self._knows_bases = False
            yield finding
        self._table = 0
        yield from self._dead_lists()
        yield from self._free_list()
        # The newest first: what it shares with older ones has to stay for it as well.
        for base in reversed(self._bases):
            if base.generation in pinned:
                self._base, self._roots = base, []
                yield from self._trees(base.meta(meta))

    def _free_list(self) -> Iterator[Finding]:
        """Claim what is free; all else has been claimed before."""
        meta = self._meta
        if meta.free_page:
            yield from self._claim(meta.free_page, meta.free_pages, "the free list", _FREE)
        try:
            free = read_free_list(self._reader, meta)
        except CorruptionError as error:
            yield error.finding
            return
        for places in [free.free, *(freed.places for freed in free.held)]:
            for page, pages in extents_of(places):
                yield from self._claim(page, pages, "a free extent", _FREE)
        seen = self._seen.translate(bytes([0]) + bytes([1]) * 255)
        lost = seen.find(0)
        while lost >= 0:
            end = seen.find(1, lost)
            end = len(seen) if end < 0 else end
            yield self._finding(lost, f"{end - lost} pages are neither reached nor free")
            lost = seen.find(0, end)

    def _trees(self, meta: Meta) -> Iterator[Finding]:
        yield from self._tree(0, Root(meta.root, meta.height))
        yield from self._tree(_CATALOGUE, Root(meta.catalogue, meta.catalogue_height))
        for table, root in self._roots:
            yield from self._tree(table, root)
        self._table = 0

    def _dead_lists(self) -> Iterator[Finding]:
        """Claim what dead lists name; each must name what the base before its owner reaches."""
        meta, bases = self._meta, self._bases
        dead = None
        if meta.dead_page:
            # The meta does not say what it names.
            dead = ListRef(meta.dead_page, meta.dead_crc, meta.dead_pages, 0, -1)
        if self._knows_bases and not bases and dead is not None:
            yield self._finding(meta.dead_page, "there is a dead list but no base")
        if self._knows_bases and bases and bases[0].dead_page:
            yield self._finding(bases[0].dead_page, "there is a dead list of the oldest base")
        for before, owner, head in lists_of(Table(tuple(bases), dead)):
            # Not by recursion: a checkpoint adds a list in front of the former one.
            waiting = [(head, meta.generation + 1)]
            while waiting:
                ref, below = waiting.pop()
                yield from self._claim(ref.page, ref.pages, "a dead list", _FREE)
                try:
                    written, found = read_dead_list(self._reader, ref, below, meta.page_count)
                except CorruptionError as error:
                    yield replace(error.finding, reason=f"{error.reason}; what bases hold is not known")
                    continue
                says = found.ref(*ref[:3])
                if ref.named_pages not in (-1, says.named_pages) or (ref is not head and says.youngest > ref.youngest):
                    yield self._finding(ref.page, "a dead list names something else than the reference to it says")
                if self._knows_bases and says.youngest > before:
                    yield self._finding(ref.page, f"a dead list names what base {before} does not reach")
                for page, pages in extents_of(found.freed.places):
                    yield from self._claim(page, pages, "a dead extent", _DEAD)
                    owners = self._dead[page : page + pages]
                    self._dead[page : page + pages] = array("Q", [owner or meta.generation + 1]) * len(owners)
                waiting += [(each, written) for each in found.lists]

    def _tree(self, table: int, root: Root) -> Iterator[Finding]:
        self._table = table
        if root.height:
            yield from self._node(root.pointer, root.height - 1, b"", None)
        elif root != EMPTY:
            yield self._finding(None, "a tree has no height but a root")

    def _finding(self, page: int | None, reason: str) -> Finding:
        names = {0: "", _CATALOGUE: ", the catalogue", _BASES: ", the base tree"}
        of = names.get(self._table, f", table {self._table}")
        where = None if page is None else page * PAGE_SIZE
        what = f"generation {self._meta.generation}" if self._base is None else f"base {self._base.generation}"
        return Finding(DATA, where, f"{what}{of}: {reason}")

    def _unverified(self, error: CorruptionError, entries: int) -> Finding:
        if self._base is not None:
            return replace(error.finding, reason=f"base {self._base.generation}: {error.reason}")
        if self._table == _BASES:
            return replace(error.finding, reason=f"the base tree: {error.reason}; {entries} bases cannot be read")
        return error.finding

    def _advance(self, pages: int) -> None:
        if self._base is not None:
            return
        self._done += pages
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _claim(self, page: int, pages: int, what: str, kind: int = _REACHED) -> Iterator[Finding]:
        seen = self._seen
        if page < 2 or page + pages > len(seen):
            yield self._finding(page, f"{what} of {pages} pages lies outside of the {len(seen)} pages")
        elif self._base is not None:
            for each in range(page, page + pages):
                if seen[each] != _REACHED and (seen[each] != _DEAD or self._dead[each] <= self._base.generation):
                    yield self._finding(each, f"{what} of {pages} pages is not kept for it")
                    return
        else:
            if seen.count(0, page, page + pages) < pages:
                yield self._finding(page, f"{what} of {pages} pages overlaps something else")
            seen[page : page + pages] = bytes([kind]) * pages

    def _node(self, pointer: bytes, level: int, low: bytes, high: bytes | None) -> Iterator[Finding]:
        """Check a subtree whose keys must lie in [low, high)."""
        page, crc, pages, flags, count = POINTER.unpack(pointer)
        if self._base is not None and page < len(self._walked) and self._walked[page] == crc:
            # The newest generation, or another base, shares it.
            return
        yield from self._claim(page, pages, f"a node of level {level}")
        self._advance(pages)
        try:
            node = self._reader.node(pointer, 0, level, keep=False)
        except CorruptionError as error:
            yield self._unverified(error, count)
            return
        if page < len(self._walked):
            self._walked[page] = crc
        if level == 0:
            yield from self._leaf(node, page, flags, count, low, high)
            return
        separators, children, _ = node
        bounds: list[bytes] = [low, *separators]
        if not all(map(lt, bounds, separators)) or (high is not None and bounds[-1] >= high):
            yield self._finding(page, "separators are not in order")
        total = below = 0
        for index, (_, _, _, child_flags, child_count) in enumerate(POINTER.iter_unpack(children)):
            total += child_count
            below |= child_flags
            end = bounds[index + 1] if index + 1 < len(bounds) else high
            child = children[index * POINTER_SIZE : (index + 1) * POINTER_SIZE]
            yield from self._node(child, level - 1, bounds[index], end)
        if total != count:
            yield self._finding(page, f"the pointer counts {count} entries, the children {total}")
        if below != flags:
            yield self._finding(page, f"the pointer has flags {flags}, the children {below}")

    def _leaf(self, raw: bytes, page: int, flags: int, count: int, low: bytes, high: bytes | None) -> Iterator[Finding]:
        try:
            keys, values = decode_leaf(raw)
        except CorruptionError as error:
            yield self._finding(page, error.reason)
            return
        if len(keys) != count or not keys:
            yield self._finding(page, f"the pointer counts {count} entries, the leaf holds {len(keys)}")
            return
        if not all(map(lt, keys, keys[1:])):
            yield self._finding(page, "keys are not in order")
        if keys[0] < low or (high is not None and keys[-1] >= high):
            yield self._finding(page, "keys lie outside of the separators")
        try:
            if self._table == _CATALOGUE:
                self._roots += map(decode_entry, keys, values)
            elif self._table == _BASES:
                self._bases += (decode_base(*entry, self._meta.generation) for entry in zip(keys, values, strict=True))
        except CorruptionError as error:
            yield self._finding(page, error.reason)
        refs = [value for value in values if isinstance(value, OverflowRef)]
        if bool(refs) != bool(flags & HAS_OVERFLOW):
            yield self._finding(page, f"the pointer has flags {flags}, the leaf {len(refs)} overflow references")
        expiring = sum(isinstance(value, Expiring | ExpiringRef) for value in values)
        if bool(expiring) != bool(flags & HAS_EXPIRING):
            yield self._finding(page, f"the pointer has flags {flags}, and {expiring} values of the leaf expire")
        if any(type(value) is Expiring and len(value) < STAMP_BYTES for value in values):
            yield self._finding(page, "a value that expires has no time")
        for ref in refs:
            first, _, length, born = OVERFLOW_REF.unpack(ref)
            extent = -(-length // PAGE_SIZE)
            yield from self._claim(first, extent, "an overflow value")
            newest = self._meta.generation if self._base is None else self._base.generation
            if born > newest:
                yield self._finding(first, f"an overflow value is of generation {born}, which is newer")
            self._advance(extent)
            try:
                self._reader.overflow(ref)
            except CorruptionError as error:
                yield self._unverified(error, 1)
