"""Reading one tree: ranges, counts, ranks, and what a reader may do with the lists it is given."""

from __future__ import annotations

import random
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_fixtures import Scratch, entries

from kvwal.errors import ClosedError, CorruptionError
from kvwal.pages.node import PAGE_SIZE


@pytest.fixture
def scratch(tmp_path: Path) -> Any:
    made = Scratch(str(tmp_path))
    yield made
    made.pages.close()


def test_ranges_and_counts_agree_with_a_sorted_list(scratch: Scratch, rng: random.Random) -> None:
    scratch.checkpoint({b"%06d" % (index * 2): b"v" * (index % 50) for index in range(15_000)})
    tree = scratch.pages.tree()
    present = sorted(scratch.model)
    for _ in range(60):
        start, stop = sorted(b"%06d" % rng.randrange(31_000) for _ in range(2))
        expected = [key for key in present if start <= key < stop]
        assert [key for key, _ in entries(tree, start, stop)] == expected
        assert [key for key, _ in entries(tree, start, stop, reverse=True)] == expected[::-1]
        assert tree.count(start, stop) == len(expected)
    assert tree.count(b"010000") + tree.count(None, b"010000") == len(present)
    assert tree.count(b"5", b"4") == 0
    assert entries(tree, b"5", b"4") == []


def test_rank_and_key_at_agree_with_a_sorted_list(scratch: Scratch, rng: random.Random) -> None:
    scratch.checkpoint({b"%06d" % (index * 2): b"v" * (index % 50) for index in range(15_000)})
    tree = scratch.pages.tree()
    present = sorted(scratch.model)
    assert tree.height > 1
    for _ in range(100):
        key = b"%06d" % rng.randrange(31_000)
        assert tree.rank(key) == bisect_left(present, key)
        rank = rng.randrange(len(present))
        assert tree.key_at(rank) == present[rank]
    assert (tree.key_at(0), tree.key_at(len(present) - 1)) == (present[0], present[-1])
    for rank in (-1, len(present)):
        with pytest.raises(IndexError):
            tree.key_at(rank)


def test_each_rank_has_its_key_at_the_ends_of_leaves_too(scratch: Scratch) -> None:
    scratch.checkpoint({b"%05d" % index: b"v" * 200 for index in range(3000)})
    tree = scratch.pages.tree()
    assert tree.height > 1
    assert [tree.key_at(rank) for rank in range(3000)] == sorted(scratch.model)


def test_empty_tree_has_no_key_at_any_rank(scratch: Scratch) -> None:
    assert scratch.pages.tree().rank(b"a") == 0
    with pytest.raises(IndexError, match="no key 0 of 0"):
        scratch.pages.tree().key_at(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("value_bytes", [20, 200])
def test_reader_that_changes_the_lists_it_got_does_not_change_the_cache(
    scratch: Scratch, value_bytes: int, reverse: bool
) -> None:
    """Leaves stay decoded in the page cache, and a scan hands out whole ones as they are there: as tuples."""
    scratch.checkpoint({b"%04d" % index: b"%d" % index * value_bytes for index in range(1000)})
    tree = scratch.pages.tree()
    for _ in range(3):
        for columns in tree.chunks(reverse=reverse):
            for column in columns:
                assert type(column) in (list, tuple)
                if isinstance(column, list):
                    column.reverse()
                    column[:] = [b"wrong"] * (len(column) // 2)
    for first in list(scratch.model)[::97]:
        found = tree.cached_pairs(first, None, 10, reverse=False)
        if found is not None:
            found[0].clear()
    assert dict(entries(tree)) == scratch.model
    for key, value in scratch.model.items():
        assert tree.get(key) == value
        assert tree.rank(key) == int(key)


letters = st.sampled_from([b"a", b"b"])
narrow = st.lists(letters, min_size=4, max_size=4).map(b"".join)
column = st.sampled_from(["one size", "none", "any size", "large"])


@settings(max_examples=80, deadline=None)
@given(keys=st.sets(narrow | st.binary(max_size=3), max_size=40), values=column, wanted=st.lists(narrow, max_size=20))
def test_get_that_reads_its_leaf_agrees_with_one_that_finds_it_in_memory(
    tmp_path_factory: Any, keys: set[bytes], values: str, wanted: list[bytes]
) -> None:
    """Keys of two letters often lie across two others, which is where a search for bytes goes wrong."""
    sizes = {"one size": lambda key: 3, "none": lambda key: 0, "any size": len, "large": lambda key: 3000}
    scratch = Scratch(str(tmp_path_factory.mktemp("get")), cache_bytes=1 << 20)
    for some in (keys, {key for key in keys if len(key) == 4}):
        scratch.checkpoint({key: (key * 3000)[: sizes[values](key)] for key in some}, [(b"", None)])
        cached = scratch.pages.tree()
        scratch.cache_bytes = 0
        uncached = scratch.open(writable=False).tree()
        for key in {*keys, *wanted, b"", b"aaaaa", b"aa"}:
            expected = scratch.model.get(key)
            assert uncached.get(key) == expected
            for _ in range(2):
                assert cached.get(key) == expected
        scratch.cache_bytes = 1 << 20
    scratch.pages.close()


@pytest.mark.parametrize("keys", ["uniform", "varied"])
def test_get_from_a_damaged_leaf_is_corruption_and_from_a_closed_file_an_error_of_use(
    scratch: Scratch, keys: str
) -> None:
    scratch.checkpoint(
        {b"%03d" % index * (1 if keys == "uniform" else 1 + index % 3): b"v" * 50 for index in range(300)}
    )
    tree = scratch.pages.tree()
    scratch.reopen()
    with open(Path(scratch.path), "r+b") as file:
        for page in range(2, scratch.pages.meta.page_count):
            file.seek(page * PAGE_SIZE + 1000)
            file.write(b"?")
    damaged = [key for key in scratch.model if _is_corrupt(scratch, key)]
    # The root was read at the open, and everything below it is damaged.
    assert len(damaged) == len(scratch.model)
    with pytest.raises(ClosedError):
        tree.get(b"100")


def _is_corrupt(scratch: Scratch, key: bytes) -> bool:
    with pytest.raises(CorruptionError, match="checksum"):
        scratch.pages.tree().get(key)
    return True
