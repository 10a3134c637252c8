"""Proving a page file sound: every page of a generation is reached exactly once or free, and all adds up.

Checked of each generation: the crc of every node and overflow value, kinds and levels, the order of
keys within and across nodes, that separators separate, counts and flags in pointers, the free list,
and that each page below the page count is reached by exactly one pointer or listed free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import lt

from kvwal.errors import CorruptionError, Finding
from kvwal.files.names import DATA
from kvwal.pages.catalogue import EMPTY, Root, decode_entry
from kvwal.pages.freelist import extents_of
from kvwal.pages.meta import Meta
from kvwal.pages.node import (
    HAS_OVERFLOW,
    OVERFLOW_REF,
    PAGE_SIZE,
    POINTER,
    POINTER_SIZE,
    OverflowRef,
    decode_leaf,
)
from kvwal.pages.pagefile import PageFile
from kvwal.pages.space import read_free_list

__all__ = ["check"]


def check(
    page_file: PageFile,
    meta: Meta | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    whole: bool = True,
) -> Iterator[Finding]:
    """Read everything of a generation, of both readable ones if none is named, and report what is wrong.

    Bypasses the cache. The generation is pinned meanwhile. Keeps one byte per page of the file.

    Args:
        whole: also account for every page. Not for an old pinned generation: the pages that it does not reach
            itself, its free list among them, were reused long ago.
        progress: called with the pages read so far and the pages of all generations to be checked.
    """
    generations = page_file.readable() if meta is None else [meta]
    holder = object()
    page_file.pins.hold(holder, {each.generation for each in generations})
    try:
        total = sum(each.page_count for each in generations)
        done = 0
        for each in generations:
            yield from _Walk(page_file, each, progress, done, total).run(whole)
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
        self._reader = page_file.pager.uncached()
        self._meta = meta
        self._progress = progress
        self._done = done
        self._total = total
        #: Per page: 0 not seen, 1 seen.
        self._seen = bytearray(meta.page_count)
        #: The table whose tree is walked; None for the catalogue.
        self._table: int | None = 0
        #: What the catalogue says.
        self._roots: list[tuple[int, Root]] = []

    def run(self, whole: bool) -> Iterator[Finding]:
        meta = self._meta
        self._seen[0:2] = b"\1\1"
        yield from self._tree(0, Root(meta.root, meta.height))
        yield from self._tree(None, Root(meta.catalogue, meta.catalogue_height))
        for table, root in self._roots:
            yield from self._tree(table, root)
        self._table = 0
        if not whole:
            return
        if meta.free_page:
            yield from self._claim(meta.free_page, meta.free_pages, "the free list")
        try:
            free = read_free_list(self._reader, meta)
        except CorruptionError as error:
            yield error.finding
            return
        for places in [free.free, *(freed.places for freed in free.held)]:
            for page, pages in extents_of(places):
                yield from self._claim(page, pages, "a free extent")
        lost = self._seen.find(0)
        while lost >= 0:
            end = self._seen.find(1, lost)
            end = len(self._seen) if end < 0 else end
            yield self._finding(lost, f"{end - lost} pages are neither reached nor free")
            lost = self._seen.find(0, end)

    def _tree(self, table: int | None, root: Root) -> Iterator[Finding]:
        self._table = table
        if root.height:
            yield from self._node(root.pointer, root.height - 1, b"", None)
        elif root != EMPTY:
            yield self._finding(None, "a tree has no height but a root")

    def _finding(self, page: int | None, reason: str) -> Finding:
        of = "" if self._table == 0 else ", the catalogue" if self._table is None else f", table {self._table}"
        where = None if page is None else page * PAGE_SIZE
        return Finding(DATA, where, f"generation {self._meta.generation}{of}: {reason}")

    def _advance(self, pages: int) -> None:
        self._done += pages
        if self._progress is not None:
            self._progress(self._done, self._total)

    def _claim(self, page: int, pages: int, what: str) -> Iterator[Finding]:
        if page < 2 or page + pages > len(self._seen):
            yield self._finding(page, f"{what} of {pages} pages lies outside of the {len(self._seen)} pages")
            return
        if self._seen.count(1, page, page + pages):
            yield self._finding(page, f"{what} of {pages} pages overlaps something else")
        self._seen[page : page + pages] = b"\1" * pages

    def _node(self, pointer: bytes, level: int, low: bytes, high: bytes | None) -> Iterator[Finding]:
        """Check a subtree whose keys must lie in [low, high)."""
        page, _, pages, flags, count = POINTER.unpack(pointer)
        yield from self._claim(page, pages, f"a node of level {level}")
        self._advance(pages)
        try:
            node = self._reader.node(pointer, 0, level, keep=False)
        except CorruptionError as error:
            yield error.finding
            return
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
        keys, values = decode_leaf(raw)
        if len(keys) != count or not keys:
            yield self._finding(page, f"the pointer counts {count} entries, the leaf holds {len(keys)}")
            return
        if not all(map(lt, keys, keys[1:])):
            yield self._finding(page, "keys are not in order")
        if keys[0] < low or (high is not None and keys[-1] >= high):
            yield self._finding(page, "keys lie outside of the separators")
        if self._table is None:
            try:
                self._roots += map(decode_entry, keys, values)
            except CorruptionError as error:
                yield self._finding(page, error.reason)
        refs = [value for value in values if type(value) is OverflowRef]
        if bool(refs) != bool(flags & HAS_OVERFLOW):
            yield self._finding(page, f"the pointer has flags {flags}, the leaf {len(refs)} overflow references")
        for ref in refs:
            first, _, length, born = OVERFLOW_REF.unpack(ref)
            extent = -(-length // PAGE_SIZE)
            yield from self._claim(first, extent, "an overflow value")
            if born > self._meta.generation:
                yield self._finding(first, f"an overflow value is of generation {born}, which is newer")
            self._advance(extent)
            try:
                self._reader.overflow(ref)
            except CorruptionError as error:
                yield error.finding
