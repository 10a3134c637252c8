"""Which pages may be written: what compacting would give back. Damaged free lists are in test_damage.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pages_fixtures import Scratch, pin, unpin

from kvwal.pages.node import PAGE_SIZE


def reclaimable_bytes(scratch: Scratch) -> int:
    return scratch.pages.space.reclaimable_bytes(scratch.pages.meta)


def test_reclaimable_bytes_are_those_of_pages_that_no_kept_generation_reaches(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    everything: Any = {b"%06d" % index: b"v" * 100 for index in range(5000)}
    scratch.checkpoint(everything)
    full = scratch.pages.meta
    assert reclaimable_bytes(scratch) < full.page_count * PAGE_SIZE / 50
    pin(scratch.pages, full.generation)
    scratch.checkpoint({}, [(b"", None)])
    # A snapshot reaches them.
    assert reclaimable_bytes(scratch) < full.page_count * PAGE_SIZE / 50
    unpin(scratch.pages, full.generation)
    # Only the older generation does: compacting makes newer ones.
    assert reclaimable_bytes(scratch) > 0.9 * full.page_count * PAGE_SIZE
    before = reclaimable_bytes(scratch)
    scratch.reopen()
    assert reclaimable_bytes(scratch) == before
    size = scratch.pages.space.file_bytes()
    for _ in range(3):
        scratch.checkpoint({}, compact=True)
    assert size - scratch.pages.space.file_bytes() > 0.9 * before
    assert reclaimable_bytes(scratch) <= 4 * PAGE_SIZE
    scratch.pages.close()
