"""The page cache: its budget, and what stays in it."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from pages_fixtures import Scratch, entries

from kvwal.pages.node import PAGE_SIZE


def test_cache_stays_within_its_budget_as_python_counts_it(tmp_path: Path, rng: random.Random) -> None:
    budget = 400_000
    scratch = Scratch(str(tmp_path), cache_bytes=budget)
    scratch.checkpoint({b"%08d" % index: b"v" * 80 for index in range(20_000)} | {b"large": bytes(5000)})
    tree = scratch.pages.tree()
    for _ in range(5000):
        tree.get(b"%08d" % rng.randrange(20_000))
        tree.get(b"large")
        cache = scratch.pages._pager.cache
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
    assert scratch.pages.stats().cache_bytes == 0
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
    misses = scratch.pages.stats().misses
    for key in wanted:
        tree.get(key)
    assert scratch.pages.stats().misses == misses
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
    misses = scratch.pages.stats().misses
    for key in wanted:
        tree.get(key)
    assert scratch.pages.stats().misses == misses
    scratch.pages.close()


def test_nothing_is_cached_of_a_page_that_may_be_written_over(tmp_path: Path, rng: random.Random) -> None:
    """What lies in the cache under an address is what the file has there, while pages are used again and again."""
    scratch = Scratch(str(tmp_path), cache_bytes=1 << 22)
    reused = 0
    for step in range(12):
        scratch.checkpoint({b"%04d" % rng.randrange(2000): b"%d" % step * 90 for _ in range(600)})
        scratch.checkpoint({b"large": bytes([step]) * 5000})
        tree = scratch.pages.tree()
        for key in scratch.model:
            tree.get(key)
        cache = scratch.pages._pager.cache
        for address, node in [*cache.young.items(), *cache.old.items()]:
            if isinstance(node, bytes):
                assert scratch.pages._file.pread(len(node), (address & 0xFFFF_FFFF) * PAGE_SIZE) == node
                reused += 1
    assert reused > 200
    scratch.pages.close()
