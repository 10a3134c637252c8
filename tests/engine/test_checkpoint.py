"""What a checkpoint says in the meta beside the trees."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import kvwal
from kvwal.engine.succession import Succession
from kvwal.log.segment import HEADER_PAGE_BYTES
from kvwal.testing import SimulatedDisk


def test_the_meta_has_the_time_of_its_commit_the_wall_clock_and_the_session(tmp_path: Path) -> None:
    sessions = []
    for number in range(3):
        with kvwal.open(tmp_path / "a.kv", background=False) as db:
            before_us = db.engine._options.files.now_us()
            db[b"%d" % number] = b""
            db.checkpoint()
            meta = db.engine._pages.meta
            (newest,) = db.history(after=db.last_seqno - 1)
            assert meta.seqno == newest.seqno
            assert meta.time_us == newest.time_us
            assert before_us <= meta.wall_us <= db.engine._options.files.now_us()
            sessions.append(meta.session)
    assert sessions == sorted(set(sessions))
    assert sessions[0] > 0


def test_a_checkpoint_without_commits_keeps_the_time_of_the_last_one(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        db.update({b"%04d" % number: b"x" * 1000 for number in range(2000)})
        db.checkpoint()
        time_us = db.engine._pages.meta.time_us
        db.compact()
        assert db.engine._pages.meta.time_us == time_us


def then_commits(monkeypatch: pytest.MonkeyPatch, db: kvwal.Store, disk: SimulatedDisk, values: list[bytes]) -> None:
    """Another thread commits as soon as the next checkpoint has frozen the memtable."""
    freeze = Succession.freeze

    def committing(succession: Succession) -> Any:
        frozen = freeze(succession)
        while values:
            disk.pass_time(60)
            thread = threading.Thread(target=db.put, args=(b"late", values.pop()))
            thread.start()
            thread.join()
        return frozen

    monkeypatch.setattr(Succession, "freeze", committing)


# Of a commit that is in the segment that is written, and in the one before it, with and without an index.
@pytest.mark.parametrize("sizes", [[10], [10, 10, 10], [60_000], [60_000] * 4, []])
@pytest.mark.parametrize("before", [1, 30, 400])
def test_the_time_is_that_of_the_last_commit_in_the_pages_whatever_came_since(
    monkeypatch: pytest.MonkeyPatch, before: int, sizes: list[int]
) -> None:
    disk = SimulatedDisk()
    with kvwal.open("/s", files=disk, background=False, segment_bytes=16 << 10) as db:
        for n in range(before):
            db.put(b"%d" % n, bytes(300))
            disk.pass_time(0.001)
        then_commits(monkeypatch, db, disk, [bytes(size) for size in sizes])
        db.checkpoint()
        meta = db.engine._pages.meta
        times = {each.seqno: each.time_us for each in db.history(after=0)}
        assert meta.seqno == before
        assert meta.time_us == times[before]
        assert len(times) == before + len(sizes)


def test_the_time_is_not_that_of_an_open_or_of_a_segment_that_came_since() -> None:
    disk = SimulatedDisk()
    db = kvwal.open("/s", files=disk, background=False)
    db.put(b"a", b"1")
    (found,) = db.history(after=0)
    disk = disk.copy()
    disk.pass_time(60)
    with kvwal.open("/s", files=disk, background=False) as db:
        disk.pass_time(60)
        # As an idle log does that has much space left.
        db.engine._log._roll(0)  # type: ignore[union-attr]  # it is open
        db.checkpoint()
        assert db.engine._pages.meta.time_us == found.time_us


def test_what_is_read_of_a_long_segment_for_the_time_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    with kvwal.open("/s", files=disk, background=False) as db:
        for n in range(20_000):
            db.put(b"%d" % n, bytes(50))
        then_commits(monkeypatch, db, disk, [b""])
        disk.trace = []
        db.checkpoint()
        read = sum(each.size for each in disk.trace if each.name == "pread" and each.path.endswith(".log"))
        assert 0 < read < 150_000
        assert db.engine._pages.meta.time_us < db.engine._log.last_time_us  # type: ignore[union-attr]  # it is open


def test_damage_where_the_time_is_read_keeps_no_data_from_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    with kvwal.open("/s", files=disk, background=False) as db:
        db.put(b"a", b"1")
        then_commits(monkeypatch, db, disk, [b"2"])
        disk.flip("/s/00000000000000000001.log", HEADER_PAGE_BYTES + 4)
        db.checkpoint()
        assert db.engine._pages.meta.seqno == 1
        disk.flip("/s/00000000000000000001.log", HEADER_PAGE_BYTES + 4)
        disk.fail("pread", path="*.log", error=5)
        db.checkpoint()
        assert db.engine._pages.meta.seqno == 2
        disk.heal()
        assert dict(db) == {b"a": b"1", b"late": b"2"}
