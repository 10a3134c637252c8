"""The free list: golden bytes, what may be reused when, and who gets which page."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.errors import DiskFullError
from kvwal.pages.freelist import (
    Allocator,
    Freed,
    FreeList,
    decode_free_list,
    encode_free_list,
    encoded_size,
    extents_of,
)


def places(*extents: tuple[int, int]) -> Any:
    """Extents (page, pages) in a column."""
    return array("Q", (page << 32 | pages for page, pages in extents))


def freed(generation: int, *extents: tuple[int, int, int]) -> Freed:
    """Extents (page, pages, born) that a generation freed."""
    made = Freed(generation)
    for page, pages, born in extents:
        made.add(page, pages, born, 99)
    return made


def held(free: FreeList) -> list[tuple[int, list[tuple[int, int]], list[int]]]:
    """What is held, readable."""
    return [(each.generation, list(extents_of(each.places)), list(each.born)) for each in free.held]


def test_free_list_has_these_bytes() -> None:
    both = [freed(5, (9, 1, 2), (10, 2, 3)), freed(4, (20, 3, 1))]
    raw = encode_free_list(FreeList(places((2, 4), (40, 1)), both))
    # Three groups: long free, freed by 4, freed by 5; neighbours 9 and 10 are one extent.
    assert raw.hex(" ", -4) == (
        "03000000 00000000 00000000 02000000 04000000 00000000 01000000 05000000 00000000 01000000 "
        "02000000 28000000 14000000 09000000 04000000 01000000 03000000 03000000"
    )
    again = decode_free_list(raw + bytes(100))
    assert again.free == places((2, 4), (40, 1))
    assert held(again) == [(4, [(20, 3)], [0]), (5, [(9, 3)], [0])]


def test_empty_free_list_comes_back() -> None:
    again = decode_free_list(encode_free_list(FreeList(places(), [])))
    assert (list(again.free), again.held) == ([], [])


@pytest.mark.parametrize("raw", [b"", b"\x01\0\0\0", b"\xff\xff\xff\xff" + bytes(50)])
def test_bytes_that_are_no_free_list_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="buffer|counts"):
        decode_free_list(raw)


def test_size_for_the_extents_is_enough() -> None:
    three = [freed(each, *((page, 1, 0) for page in range(100 + 2 * each, 200, 6))) for each in (1, 2, 3)]
    free = FreeList(places(*((page, 1) for page in range(2, 90, 2))), three)
    assert len(encode_free_list(free)) == encoded_size(free.extents(), 4)


@pytest.mark.parametrize(
    ("born", "generation", "needed", "is_held"),
    [
        (3, 6, {6, 7}, False),  # freed by the oldest generation that is needed
        (3, 7, {6, 7}, True),  # reached by 6
        (3, 5, {4, 6, 7}, True),  # pinned by 4
        (5, 6, {4, 6, 7}, False),  # the pinned one is older than the extent
        (5, 6, {5, 6, 7}, True),
        (0, 6, {4, 6, 7}, True),  # when it was born is not known
        (0, 6, {7}, False),
        (7, 7, {6, 7}, False),  # born and freed in one checkpoint: no generation reaches it
    ],
)
def test_extent_is_held_exactly_while_a_needed_generation_reaches_it(
    born: int, generation: int, needed: set[int], is_held: bool
) -> None:
    left, released = FreeList(places(), [freed(generation, (10, 2, born))]).release_unneeded(needed)
    assert held(left) == ([(generation, [(10, 2)], [born])] if is_held else [])
    assert left.free == (places() if is_held else places((10, 2)))
    assert [list(each.addresses) for each in released] == ([] if is_held else [[99]])
    assert (left.free_pages(), left.held_pages()) == ((0, 2) if is_held else (2, 0))


def test_extents_of_one_checkpoint_part_by_when_they_were_born() -> None:
    left, released = FreeList(places(), [freed(6, (10, 1, 3), (20, 1, 5), (30, 1, 4))]).release_unneeded({4, 7, 8})
    assert held(left) == [(6, [(10, 1), (30, 1)], [3, 4])]
    assert left.free == places((20, 1))
    assert len(released) == 1


def test_released_extents_are_joined_with_their_neighbours() -> None:
    free, _ = FreeList(places((2, 2), (10, 1)), [freed(2, (4, 6, 1))]).release_unneeded({5})
    assert free.free == places((2, 9))


def test_tail_is_given_back_as_far_as_it_is_free() -> None:
    free, page_count = FreeList(places((2, 3), (20, 10)), []).give_back(30)
    assert (free.free, page_count) == (places((2, 3)), 20)
    free, page_count = FreeList(places((2, 3)), []).give_back(30)
    assert (free.free, page_count) == (places((2, 3)), 30)
    assert FreeList(places(), []).give_back(30)[1] == 30


def test_allocation_takes_the_lowest_run_that_is_long_enough() -> None:
    allocator = Allocator(places((2, 1), (5, 2), (10, 4)), 20)
    assert allocator.take(2) == 5
    assert allocator.take(3) == 10
    assert allocator.take(1) == 2
    assert allocator.take(1) == 13
    assert allocator.take(1) == 20
    assert (allocator.page_count, allocator.left()) == (21, places())


def test_allocation_at_the_end_uses_the_free_pages_there() -> None:
    allocator = Allocator(places((2, 1), (18, 2)), 20)
    assert allocator.take(5) == 18
    assert (allocator.page_count, allocator.left()) == (23, places((2, 1)))


def test_allocation_that_only_appends_takes_no_free_page_and_keeps_them_all() -> None:
    free = places((2, 1), (5, 2), (18, 2))
    allocator = Allocator(free, 20, append=True)
    assert [allocator.take(1), allocator.take(3)] == [20, 21]
    assert (allocator.page_count, allocator.left()) == (24, free)


def test_allocation_ends_at_the_limit() -> None:
    allocator = Allocator(places(), 0xFFFF_FFFF - 3)
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
    allocator = Allocator(places(*free), page_count)
    taken: set[int] = set()
    for _ in range(40):
        pages = rng.randrange(1, 7)
        page = allocator.take(pages)
        got = set(range(page, page + pages))
        assert not got & taken
        taken |= got
    left = {page + index for page, pages in extents_of(allocator.left()) for index in range(pages)}
    assert not left & taken
    assert left | taken == pool | set(range(page_count, allocator.page_count))
