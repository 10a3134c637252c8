"""The free list: golden bytes, what may be reused when, and who gets which page."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.errors import DiskFullError
from kvwal.pages.freelist import Allocator, Extent, FreeList, decode_free_list, encode_free_list, encoded_size


def test_free_list_has_these_bytes() -> None:
    held = [Extent(9, 1, 2, 5, 0), Extent(20, 3, 1, 4, 0), Extent(10, 2, 3, 5, 0)]
    raw = encode_free_list(FreeList([(2, 4), (40, 1)], held))
    # Three groups: long free, freed by 4, freed by 5; neighbours 9 and 10 are one extent.
    assert raw.hex(" ", -4) == (
        "03000000 00000000 00000000 02000000 04000000 00000000 01000000 05000000 00000000 01000000 "
        "02000000 28000000 14000000 09000000 04000000 01000000 03000000 03000000"
    )
    again = decode_free_list(raw + bytes(100))
    assert again.free == [(2, 4), (40, 1)]
    assert again.held == [Extent(20, 3, 0, 4, 0), Extent(9, 3, 0, 5, 0)]


def test_empty_free_list_comes_back() -> None:
    again = decode_free_list(encode_free_list(FreeList([], [])))
    assert (again.free, again.held) == ([], [])


@pytest.mark.parametrize("raw", [b"", b"\x01\0\0\0", b"\xff\xff\xff\xff" + bytes(50)])
def test_bytes_that_are_no_free_list_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="buffer|counts"):
        decode_free_list(raw)


def test_size_for_the_extents_is_enough() -> None:
    held = [Extent(page, 1, 0, page % 3 + 1, 0) for page in range(100, 200, 2)]
    free = FreeList([(page, 1) for page in range(2, 90, 2)], held)
    assert len(encode_free_list(free)) == encoded_size(free.extents(), 4)


@pytest.mark.parametrize(
    ("born", "freed", "needed", "held"),
    [
        (3, 6, {6, 7}, False),  # freed by the oldest generation that is needed
        (3, 7, {6, 7}, True),  # reached by 6
        (3, 5, {4, 6, 7}, True),  # pinned by 4
        (5, 6, {4, 6, 7}, False),  # the pinned one is older than the extent
        (5, 6, {5, 6, 7}, True),
        (0, 6, {4, 6, 7}, True),  # when it was born is not known
        (7, 7, {7}, False),  # born and freed in one checkpoint: nobody reaches it
    ],
)
def test_extent_is_held_exactly_while_a_needed_generation_reaches_it(
    born: int, freed: int, needed: set[int], held: bool
) -> None:
    extent = Extent(10, 2, born, freed, 99)
    settled, released = FreeList([], [extent]).settled(needed)
    assert settled.held == ([extent] if held else [])
    assert settled.free == ([] if held else [(10, 2)])
    assert released == ([] if held else [extent])


def test_released_extents_are_joined_with_their_neighbours() -> None:
    free, _ = FreeList([(2, 2), (10, 1)], [Extent(4, 6, 1, 2, 0)]).settled({5})
    assert free.free == [(2, 9)]


def test_tail_is_given_back_as_far_as_it_is_free() -> None:
    free, page_count = FreeList([(2, 3), (20, 5), (25, 5)], []).give_back(30)
    assert (free.free, page_count) == ([(2, 3)], 20)
    free, page_count = FreeList([(2, 3)], []).give_back(30)
    assert (free.free, page_count) == ([(2, 3)], 30)


def test_allocation_takes_the_lowest_run_that_is_long_enough() -> None:
    allocator = Allocator([(2, 1), (5, 2), (10, 4)], 20)
    assert allocator.take(2) == 5
    assert allocator.take(3) == 10
    assert allocator.take(1) == 2
    assert allocator.take(1) == 13
    assert allocator.take(1) == 20
    assert (allocator.page_count, allocator.left()) == (21, [])


def test_allocation_at_the_end_uses_the_free_pages_there() -> None:
    allocator = Allocator([(2, 1), (18, 2)], 20)
    assert allocator.take(5) == 18
    assert (allocator.page_count, allocator.left()) == (23, [(2, 1)])


def test_allocation_ends_at_the_limit() -> None:
    allocator = Allocator([], 0xFFFF_FFFF - 3)
    allocator.take(3)
    with pytest.raises(DiskFullError, match="limit"):
        allocator.take(1)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), max_size=30), st.integers(0, 2**32))
def test_allocation_never_gives_a_page_twice_and_loses_none(gaps: list[tuple[int, int]], seed: int) -> None:
    rng = random.Random(seed)
    free: list[tuple[int, int]] = []
    end = 2
    for pages, gap in gaps:
        free.append((end + gap, pages))
        end += gap + pages
    page_count = end + 1
    pool = {page + index for page, pages in free for index in range(pages)}
    allocator = Allocator(free, page_count)
    taken: set[int] = set()
    for _ in range(40):
        pages = rng.randrange(1, 7)
        page = allocator.take(pages)
        got = set(range(page, page + pages))
        assert not got & taken
        taken |= got
    left = {page + index for page, pages in allocator.left() for index in range(pages)}
    assert not left & taken
    assert left | taken == pool | set(range(page_count, allocator.page_count))
