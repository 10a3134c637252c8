"""The page cache: its budget, and what stays in it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from pages_fixtures import Scratch, WatchedFiles, contents, entries, pin, unpin

from kvwal.pages.node import PAGE_SIZE


def test_cache_stays_within_its_budget_as_python_counts_it(tmp_path: Path, rng: random.Random) -> None:
    budget = 400_000
    scratch = Scratch(str(tmp_path), cache_bytes=budget)
    scratch.checkpoint({b"%08d" % index: b"v" * 80 for index in range(20_000)} | {b"large": bytes(5000)})
    tree = scratch.pages.tree()
    for _ in range(5000):
        tree.get(b"%08d" % rng.randrange(20_000))
        tree.get(b"large")
        cache = scratch.pages.pager.cache
        real = 0
        if rng.random() < 0.01:
            for part in (cache.young, cache.old):
                real += sys.getsizeof(part)
                for address, node in part.items():
                    real += sys.getsizeof(address) + sys.getsizeof(node)
                    if isinstance(node, tuple):
                        real += sum(map(sys.getsizeof, node)) + sum(map(sys.getsizeof, node[0]))
            assert real <= cache.used_bytes() <= budget
    scratch.pages.close()


def test_no_budget_still_reads(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=0)
    scratch.checkpoint({b"%05d" % index: b"v" * 100 for index in range(2000)})
    scratch.verify()
    assert scratch.pages.tree().get(b"00777") == b"v" * 100
    assert scratch.pages.pager.cache.used_bytes() == 0
    scratch.pages.close()


def test_scan_does_not_flush_the_cache(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=300_000)
    scratch.checkpoint({b"%08d" % index: b"v" * 100 for index in range(30_000)})
    tree = scratch.pages.tree()
    wanted = [b"%08d" % index for index in range(0, 30_000, 3000)]
    for _ in range(2):
        for key in wanted:
            tree.get(key)
    for reverse in (False, True):
        assert len(entries(tree, reverse=reverse)) == 30_000
    misses = scratch.pages.pager.cache.misses
    for key in wanted:
        tree.get(key)
    assert scratch.pages.pager.cache.misses == misses
    scratch.pages.close()


def test_leaves_that_are_read_once_do_not_flush_the_cache(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=300_000)
    scratch.checkpoint({b"%08d" % index: b"v" * 100 for index in range(30_000)})
    tree = scratch.pages.tree()
    # Keys far enough apart that each lies in a leaf of its own.
    keys = [b"%08d" % index for index in range(0, 30_000, 100)]
    for key in keys[:100]:
        tree.get(key)
    wanted = keys[:100:10]
    for key in wanted * 2 + keys[100:]:
        tree.get(key)
    misses = scratch.pages.pager.cache.misses
    for key in wanted:
        tree.get(key)
    assert scratch.pages.pager.cache.misses == misses
    scratch.pages.close()


@pytest.mark.parametrize("cache_bytes", [1 << 22, 200_000])
def test_nothing_is_cached_of_a_page_that_is_written(tmp_path: Path, rng: random.Random, cache_bytes: int) -> None:
    """While pages are used again and again, those of a generation that was pinned too."""
    files = WatchedFiles()
    scratch = Scratch(str(tmp_path), cache_bytes=cache_bytes, files=files)
    cache = scratch.pages.pager.cache
    written: list[int] = []

    def before(operation: str, offset: int, size: int) -> None:
        if operation == "pwrite":
            pages = range(offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE))
            written.extend(pages)
            assert not [address for address in [*cache.young, *cache.old] if (address & 0xFFFF_FFFF) in pages]

    files.before = before
    pinned = None
    for step in range(12):
        scratch.checkpoint({b"%04d" % rng.randrange(2000): b"%d" % step * 90 for _ in range(600)})
        if step % 4 == 0:
            pinned = scratch.pages.meta.generation
            pin(scratch.pages, pinned)
        scratch.checkpoint({b"large": bytes([step]) * 5000})
        if step % 2 == 0:
            tree = scratch.pages.tree()
            for key in scratch.model:
                tree.get(key)
        if step % 4 == 2 and pinned is not None:
            unpin(scratch.pages, pinned)
    assert len(written) - len(set(written)) > 200, "pages were used again"
    scratch.pages.close()


def test_a_checkpoint_does_not_change_what_readers_share(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=1 << 22)
    scratch.checkpoint({b"%04d" % number: b"old" for number in range(1000)})
    tree = scratch.pages.tree()
    # The second time the leaves come out of the cache, decoded.
    before = contents(tree)
    assert contents(tree) == before
    scratch.checkpoint({b"0001": b"new", b"0002": None}, [(b"0003", b"0005"), (b"0900", b"0950")])
    assert contents(tree) == before
    scratch.verify()
    scratch.pages.close()


def test_a_closed_file_has_nothing_in_memory_and_takes_nothing_in(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"%04d" % number: b"v" for number in range(1000)})
    scratch.pages.tree().get(b"0001")
    cache = scratch.pages.pager.cache
    assert cache.used_bytes()
    scratch.pages.close()
    cache.keep(1, bytes(100))
    assert (cache.used_bytes(), cache.young, cache.old) == (0, {}, {})
