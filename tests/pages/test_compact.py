"""Where the end of the page file begins that a checkpoint empties, and which keys lie in it."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from pages_fixtures import STORE_ID, Scratch

from kvwal.keys import Seqno
from kvwal.pages import Meta
from kvwal.pages.compact import far_keys, tail_limit
from kvwal.pages.freelist import Freed, FreeList

META = Meta(STORE_ID, 7, Seqno(1), 1, 1, 1000)


def free_list(free: int, held: int = 0) -> FreeList:
    """A free list of this many pages that can be taken, and this many that a generation still reaches."""
    freed = Freed(7)
    if held:
        freed.add(2 + free, held, 0, 0)
    return FreeList(array("Q", [2 << 32 | free] if free else []), [freed])


@pytest.mark.parametrize(
    ("pages", "free", "held", "limit"),
    [
        (1000, 400, 0, None),  # two in five may stay free
        (1000, 401, 0, 764),  # 599 pages in use, a quarter more, and a few
        (1000, 401, 300, 389),  # what an older generation reaches will be free as well
        (63, 60, 0, None),  # a small file is left alone
        (100_000, 90_000, 0, 91_808),  # 32 MiB at a time
    ],
)
def test_a_sparse_file_is_emptied_from_its_end(pages: int, free: int, held: int, limit: int | None) -> None:
    assert tail_limit(replace(META, page_count=pages), free_list(free, held), compact=False) == limit


@pytest.mark.parametrize(
    ("pages", "free", "limit"),
    [
        (1000, 100, 918),  # 900 pages in use, and a 64th for the inner nodes written anew
        (1000, 18, None),  # less is free than that takes
        (1000, 0, None),
        (20, 10, 14),
    ],
)
def test_compacting_moves_what_fits_before_it_however_little_that_is(pages: int, free: int, limit: int | None) -> None:
    assert tail_limit(replace(META, page_count=pages), free_list(free, 5), compact=True) == limit


def test_keys_in_the_end_are_the_first_of_its_nodes_each_once(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    large = {b"050": bytes(9000), b"051": bytes(9000)}
    scratch.checkpoint({b"%03d" % index: b"v" * 100 for index in range(200)} | large)
    scratch.checkpoint({b"199": b"w"})
    meta, pager = scratch.pages.meta, scratch.pages.pager.uncached()
    everything = far_keys(pager, meta.root, meta.height, 0, lambda: None)
    assert everything[0] == b""
    assert everything == sorted(set(everything))
    # The last leaf and the root, written anew by the second checkpoint, and its free list.
    last = far_keys(pager, meta.root, meta.height, meta.page_count - 6, lambda: None)
    assert last == [b"", b"134"]
    assert far_keys(pager, meta.root, meta.height, meta.page_count, lambda: None) == []
    assert far_keys(pager, bytes(20), 0, 0, lambda: None) == []
    scratch.pages.close()
