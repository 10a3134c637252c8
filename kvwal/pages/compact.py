"""Emptying the end of the page file, when two fifths of the file are free.

The merge writes a node anew when a key it is told to *rewrite* lies in it, and takes the lowest free
pages first. So it is enough to find the nodes that lie far back: their inner parents say where they
are, and leaves are read only where their pointer says that they refer to overflow extents.

A checkpoint empties a bounded stretch; the file shrinks over several. What moved is free two
generations later, and the file is cut then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from kvwal.pages.freelist import FreeList
from kvwal.pages.meta import Meta
from kvwal.pages.node import HAS_OVERFLOW, OVERFLOW_REF, PAGE_SIZE, POINTER, POINTER_SIZE, OverflowRef, decode_leaf
from kvwal.pages.pager import Pager

__all__ = ["tail_rewrites"]

#: Length of the stretch that one checkpoint empties, at most: 32 MiB.
_STRETCH_PAGES: Final = 8192
#: The end is emptied when more than one page in so many can be written now. A store that is written over
#: as a whole has a third of its pages free, a third held for the older generation, and needs them.
_SPARSE: Final = 2.5
#: A smaller file is left alone.
_LEAST_PAGES: Final = 64


def tail_rewrites(
    pager: Pager,
    meta: Meta,
    free: FreeList,
    give_way: Callable[[], None] = lambda: None,
    *,
    compact: bool = False,
) -> tuple[list[bytes], int | None]:
    """Keys to rewrite, sorted, and the page behind which nothing should stay; none and None if all is well.

    With `compact`, everything that fits into free pages nearer to the front, however little is free.
    """
    if compact and meta.height and free.free_pages():
        # What lies behind this fits into what is free before it; the slack is for the inner nodes written anew.
        taken = meta.page_count - free.free_pages()
        limit = taken + taken // 64 + 4
        if limit >= meta.page_count:
            return [], None
        return list(_far(pager, meta.root, meta.height - 1, b"", limit, give_way)), limit
    if meta.page_count < _LEAST_PAGES or _SPARSE * free.free_pages() <= meta.page_count or not meta.height:
        return [], None
    used = meta.page_count - free.free_pages() - free.held_pages()
    limit = max(meta.page_count - _STRETCH_PAGES, used + used // 4 + _LEAST_PAGES // 4)
    if limit >= meta.page_count:
        return [], None
    return list(_far(pager, meta.root, meta.height - 1, b"", limit, give_way)), limit


def _far(
    pager: Pager, pointer: bytes, level: int, low: bytes, limit: int, give_way: Callable[[], None]
) -> Iterator[bytes]:
    """The lowest possible key of each node of the subtree that reaches beyond `limit`."""
    page, _, pages, flags, _ = POINTER.unpack(pointer)
    if page + pages > limit:
        yield low
    elif level == 0:
        if flags & HAS_OVERFLOW and _refers(pager, pointer, limit):
            yield low
        return
    if level == 0:
        return
    separators, children, _ = pager.node(pointer, 0, level, keep=False)
    lows = [low, *separators]
    if level > 1:
        for index, child in enumerate(lows):
            yield from _far(
                pager, children[index * POINTER_SIZE : (index + 1) * POINTER_SIZE], level - 1, child, limit, give_way
            )
        return
    give_way()
    for index, (page, _, pages, flags, _) in enumerate(POINTER.iter_unpack(children)):
        if page + pages > limit or (
            flags & HAS_OVERFLOW and _refers(pager, children[index * POINTER_SIZE : (index + 1) * POINTER_SIZE], limit)
        ):
            yield lows[index]


def _refers(pager: Pager, pointer: bytes, limit: int) -> bool:
    """Whether a leaf refers to an overflow extent that reaches beyond `limit`."""
    for value in decode_leaf(pager.node(pointer, 0, 0, keep=False))[1]:
        if type(value) is OverflowRef:
            page, _, length, _ = OVERFLOW_REF.unpack(value)
            if page + -(-length // PAGE_SIZE) > limit:
                return True
    return False
