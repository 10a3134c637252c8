"""Giving space back: by hand, and by itself when the store is idle."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import kvwal
from kvwal.engine.checkpoint import COMPACT_PASSES


def _filled(path: Path, **options: object) -> kvwal.Store:
    db = kvwal.open(path, durability="os", keep_history_bytes=0, **options)  # type: ignore[arg-type]
    numbers = random.Random(5)
    keys = [b"%016x" % numbers.getrandbits(64) for _ in range(60_000)]
    for start in range(0, len(keys), 6_000):
        db.update((key, b"v" * 100) for key in keys[start : start + 6_000])
        db.checkpoint()
    return db


def test_compact_leaves_little_more_than_the_data(tmp_path: Path) -> None:
    with _filled(tmp_path / "db", background=False) as db:
        before = db.stats().data_bytes
        content = dict(db)
        db[b"last"] = b"commit"
        shrank = db.compact()
        after = db.stats().data_bytes
        assert shrank == before - after
        assert after < 1.2 * 60_000 * 116
        db.checkpoint()
        assert dict(db) == content | {b"last": b"commit"}
        assert db.verify().ok
    with kvwal.open(tmp_path / "db", keep_history_bytes=0) as db:
        assert dict(db) == content | {b"last": b"commit"}


def test_compact_gives_back_what_a_past_that_is_wanted_no_more_held(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", durability="os", background=False, history_base_bytes=0) as db:
        db.update({b"%06d" % number: bytes(1000) for number in range(3000)})
        db.checkpoint()
        db.clear()
        db.checkpoint()
        full = db.stats().data_bytes
        db.compact()
        assert db.stats().data_bytes > full // 2, "the past is there"
        with db.snapshot(at=1) as snapshot:
            assert len(snapshot) == 3000
    with kvwal.open(tmp_path / "db", background=False, keep_history_bytes=0) as db:
        assert db.compact() > full // 2
        assert db.stats().data_bytes < full // 10


def test_compact_spares_what_a_snapshot_reads(tmp_path: Path) -> None:
    with _filled(tmp_path / "db", background=False) as db:
        content = dict(db)
        with db.snapshot() as snapshot:
            db.delete_range(b"4")
            db.compact()
            db.put(b"more", b"x" * 10_000)
            db.compact()
            assert dict(snapshot) == content
        db.compact()
        assert db.verify().ok
        assert db.stats().data_bytes < 60_000 * 116 // 2


def test_an_idle_store_shrinks_by_itself(tmp_path: Path) -> None:
    with _filled(tmp_path / "db") as db:
        db.clear()
        db.checkpoint()
        deadline = time.monotonic() + 30
        while db.stats().data_bytes > 1 << 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert db.stats().data_bytes <= 1 << 20
        assert len(db) == 0


def test_a_tenth_of_the_pages_may_stay_unused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _filled(tmp_path / "db", background=False) as db:
        pages, checkpointer = db.engine._pages, db.engine._checkpointer
        assert checkpointer is not None
        count = pages.meta.page_count
        assert count > 1024
        for unused, sparse in ((count // 10, False), (count // 10 + 1, True)):
            unused_bytes = unused * pages.meta.page_size
            monkeypatch.setattr(pages.space, "reclaimable_bytes", lambda meta, unused=unused_bytes: unused)
            assert checkpointer.is_sparse() == sparse


def test_what_was_just_committed_does_not_make_compacting_look_useless(tmp_path: Path) -> None:
    """It was merged by the first pass, and the file, larger for that, was taken for one that does not shrink."""
    numbers = list(range(60_000))
    random.Random(3).shuffle(numbers)
    keys = [b"%05d" % number for number in numbers]
    with kvwal.open(tmp_path / "db", background=False, durability="os", keep_history_bytes=0) as db:
        for first in range(0, 30_000, 10_000):
            db.update({key: b"x" * 100 for key in keys[first : first + 10_000]})
            db.checkpoint()
        db.update({key: b"y" * 100 for key in keys[30_000:]})
        checkpointer = db.engine._checkpointer
        assert checkpointer is not None
        assert checkpointer.is_sparse()
        while checkpointer.is_sparse():
            assert checkpointer.compact(passes=COMPACT_PASSES)
