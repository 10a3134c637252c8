"""Emptying the end of the page file.

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

__all__ = ["far_keys", "tail_limit"]

#: Pages of the stretch that one checkpoint empties, at most: 32 MiB.
_STRETCH_PAGES: Final = 8192
#: The end is emptied when more than 2 pages in 5 can be written now. A store that is written over
#: as a whole has a third of its pages free, a third held for the older generation, and needs them.
_SPARSE: Final = 2.5
#: A file of fewer pages is left alone.
_LEAST_PAGES: Final = 64


def tail_limit(meta: Meta, free: FreeList, *, compact: bool) -> int | None:
    """The page behind which nothing should stay; None if all is well.

    With `compact`, everything that fits into free pages nearer to the front, however little is free.
    """
    count, can_be_taken = meta.page_count, free.free_pages()
    if compact:
        # What lies behind this fits into what is free before it; the slack is for the inner nodes written anew.
        used = count - can_be_taken
        limit = used + used // 64 + 4
    elif count < _LEAST_PAGES or _SPARSE * can_be_taken <= count:
        return None
    else:
        used = count - can_be_taken - free.held_pages()
        limit = max(count - _STRETCH_PAGES, used + used // 4 + _LEAST_PAGES // 4)
    return limit if can_be_taken and limit < count else None


def far_keys(pager: Pager, root: bytes, height: int, limit: int, yield_to_writers: Callable[[], None]) -> list[bytes]:
    """The lowest possible keys, ascending, of nodes that reach beyond `limit`, themselves or by an overflow value."""
    found = (low for low, _, end in _extents(pager, root, height - 1, b"", yield_to_writers) if end > limit)
    return list(dict.fromkeys(found)) if height else []


def _extents(
    pager: Pager, pointer: bytes, level: int, low: bytes, yield_to_writers: Callable[[], None]
) -> Iterator[tuple[bytes, int, int]]:
    """Of each node and overflow value of the subtree: its node's lowest possible key, its first page, its end."""
    page, _, pages, flags, _ = POINTER.unpack(pointer)
    yield low, page, page + pages
    if level:
        separators, children, _ = pager.node(pointer, 0, level, keep=False)
        yield_to_writers()
        for index, each in enumerate([low, *separators]):
            child = children[index * POINTER_SIZE : (index + 1) * POINTER_SIZE]
            yield from _extents(pager, child, level - 1, each, yield_to_writers)
    elif flags & HAS_OVERFLOW:
        for value in decode_leaf(pager.node(pointer, 0, 0, keep=False))[1]:
            if isinstance(value, OverflowRef):
                page, _, length, _ = OVERFLOW_REF.unpack(value)
                yield low, page, page + -(-length // PAGE_SIZE)
