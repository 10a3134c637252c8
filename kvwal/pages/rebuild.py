"""Which pages are free, and which only bases reach, made anew from what the trees reach.

For a page file whose free list, base tree or dead list does not verify. A base of which an inner node, or a leaf that
refers to overflow extents, does not verify is dropped: what it reaches cannot be told, and it is read in part at best.

Births are those of the oldest base that reaches an extent; that is all that dropping one asks. What no tree reaches is
free as if the next generation freed it: the generation before the newest may need it, and the newest its base tree and
dead lists, should the next one be torn.

A meta may count pages beyond the end of the file, which are free at once: memory is taken for those of the file alone.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence

from kvwal.errors import CorruptionError
from kvwal.files.names import DATA
from kvwal.pages.bases import Base, Ledger
from kvwal.pages.catalogue import roots
from kvwal.pages.freelist import Freed, FreeList
from kvwal.pages.meta import Meta
from kvwal.pages.node import HAS_OVERFLOW, OVERFLOW_REF, PAGE_SIZE, POINTER, POINTER_SIZE, OverflowRef, decode_leaf
from kvwal.pages.pager import Pager

__all__ = ["rebuilt"]


def rebuilt(
    pager: Pager, newest: Meta, bases: Sequence[Base], yield_to_writers: Callable[[], None]
) -> tuple[FreeList, Ledger]:
    """The free list of the newest generation, and the bases that stay, with their dead lists in memory.

    CorruptionError if an inner node of the newest generation does not verify.
    """
    # By page: the place of the oldest tree that reaches it among `metas`, from 1 on; 0: none does.
    count = newest.page_count
    there = min(count, max(2, -(-pager.file.size() // PAGE_SIZE)))
    oldest = array("I", bytes(4 * there))
    # Behind the last page that is there, or that something refers to all the same.
    beyond = there
    metas: list[Meta] = []
    kept: list[Base] = []
    for base in bases:
        try:
            reached = list(_reached(pager, base.meta(newest), count, oldest, yield_to_writers))
        except CorruptionError as error:
            logging.getLogger("kvwal").warning("%s; base %d is dropped", error.finding, base.generation)
            continue
        kept.append(base)
        metas.append(base.meta(newest))
        beyond = max(beyond, _mark(oldest, reached, len(metas)))
    metas.append(newest)
    beyond = max(beyond, _mark(oldest, list(_reached(pager, newest, count, oldest, yield_to_writers)), len(metas)))
    youngest = array("I", bytes(4 * there))
    for place in range(len(metas), 0, -1):
        _mark(youngest, list(_reached(pager, metas[place - 1], count, youngest, yield_to_writers)), place)
    # The meta slots, and the free list itself, which is freed like any other when the next one is written.
    own = [(0, 2), (newest.free_page, newest.free_page + newest.free_pages)]
    beyond = max(beyond, _mark(youngest, own, len(metas)))
    generation = newest.generation + 1
    free, dead = Freed(generation), [Freed(generation) for _ in metas]
    for begin, end, first, last in _runs(oldest, youngest):
        if not last:
            free.add(begin, end - begin, 0, 0)
        elif last < len(metas):
            # The base that comes next does not reach it.
            dead[last].add(begin, end - begin, metas[first - 1].generation, 0)
    ledger = Ledger.made_anew(pager, newest, list(zip(kept, dead, strict=False)), dead[-1])
    # No generation has anything there.
    missing = [beyond << 32 | (count - beyond)] if beyond < count else []
    return FreeList(array("Q", missing), [free]), ledger


def _mark(pages: array[int], extents: list[tuple[int, int]], place: int) -> int:
    """Where the last of the extents ends."""
    for begin, end in extents:
        end = min(end, len(pages))
        pages[begin:end] = array("I", [place]) * (end - begin)
    return max((end for _, end in extents), default=0)


def _runs(oldest: array[int], youngest: array[int]) -> Iterator[tuple[int, int, int, int]]:
    begin = 0
    for page in range(1, len(oldest) + 1):
        if page == len(oldest) or oldest[page] != oldest[begin] or youngest[page] != youngest[begin]:
            yield begin, page, oldest[begin], youngest[begin]
            begin = page


def _reached(
    pager: Pager, meta: Meta, page_count: int, seen: array[int], yield_to_writers: Callable[[], None]
) -> Iterator[tuple[int, int]]:
    """The extents that a generation reaches. What lies below a node that was seen before was seen as well."""
    for _, root in roots(pager, meta):
        yield from _below(pager, root.pointer, root.height - 1, page_count, seen, yield_to_writers)
    if meta.catalogue_height:
        yield from _below(pager, meta.catalogue, meta.catalogue_height - 1, page_count, seen, yield_to_writers)


def _below(
    pager: Pager,
    pointer: bytes,
    level: int,
    page_count: int,
    seen: array[int],
    yield_to_writers: Callable[[], None],
) -> Iterator[tuple[int, int]]:
    page, _, pages, flags, _ = POINTER.unpack(pointer)
    if not 2 <= page <= page + pages <= len(seen):
        raise CorruptionError(DATA, page * PAGE_SIZE, "a node lies outside of the file")
    if seen[page]:
        return
    yield page, page + pages
    if level:
        _, children, _ = pager.node(pointer, 0, level, keep=False)
        yield_to_writers()
        for at in range(0, len(children), POINTER_SIZE):
            child = children[at : at + POINTER_SIZE]
            yield from _below(pager, child, level - 1, page_count, seen, yield_to_writers)
    elif flags & HAS_OVERFLOW:
        for value in decode_leaf(pager.node(pointer, 0, 0, keep=False))[1]:
            if isinstance(value, OverflowRef):
                first, _, length, _ = OVERFLOW_REF.unpack(value)
                end = first + -(-length // PAGE_SIZE)
                if not 2 <= first <= end <= page_count:
                    raise CorruptionError(DATA, first * PAGE_SIZE, "a value lies outside of the file")
                # A leaf that was written anew may refer to the same one.
                if first >= len(seen) or not seen[first]:
                    yield first, end
