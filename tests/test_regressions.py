"""Bugs that the crash harness found, each as the smallest case that shows it."""

from __future__ import annotations

import errno

import pytest

import kvwal
from kvwal.log.index import Index
from kvwal.testing import SimulatedDisk


def _open(disk: SimulatedDisk) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, segment_bytes=16 << 10)


def test_a_store_whose_maker_died_before_its_directory_was_flushed_does_not_vanish() -> None:
    # The directory was flushed into its parent only by the open that made it. If that one died in between, the next
    # found the directory there, made the store in it, and acknowledged commits that a power cut took away whole.
    disk = SimulatedDisk(seed=1)
    disk.make_directory("/kv")
    with _open(disk) as db:
        db[b"k"] = b"v"
        crashed = disk.crash()
    with _open(crashed) as db:
        assert db[b"k"] == b"v"


def test_a_segment_that_cannot_be_removed_poisons_for_good() -> None:
    # The checkpoint raised PoisonedError, but the next commit was accepted.
    disk = SimulatedDisk(seed=1)
    db = _open(disk)
    for n in range(30):
        db[b"%d" % n] = b"x" * 1000
    db.checkpoint()
    db[b"more"] = b"x" * 9000
    disk.fail(op="unlink", nth=1, error=errno.EIO)
    with pytest.raises(kvwal.PoisonedError):
        db.checkpoint()
    with pytest.raises(kvwal.PoisonedError):
        db[b"k"] = b"v"
    assert db[b"more"] == b"x" * 9000
    db.close()
    with _open(disk) as db:
        assert len(db) == 31


def test_a_reserve_that_cannot_be_removed_is_a_full_disk_and_no_poison() -> None:
    # A delete on a full disk wants the reserve; removing it met ENOSPC, as a copy-on-write file system may say, and
    # the error came out as a poisoned store that went on to accept writes.
    disk = SimulatedDisk(seed=1)
    db = _open(disk)
    for n in range(14):
        db[b"%d" % n] = b"x" * 1000
    for op in ("open", "allocate", "pwrite", "unlink"):
        disk.fail(op=op, nth=1, error=errno.ENOSPC, forever=True)
    with pytest.raises(kvwal.DiskFullError):
        for n in range(500):
            db.delete(b"%d" % n)
    disk.heal()
    db[b"after"] = b"v"
    assert db[b"after"] == b"v"
    db.close()


def test_a_frozen_table_of_nothing_but_a_deleted_range_is_not_forgotten() -> None:
    # It has no keys, so it was false, and the next attempt wanted to set the next table aside on top of it.
    disk = SimulatedDisk(seed=1)
    with _open(disk) as db:
        db[b"a"] = b"1"
        db.checkpoint()
        db.delete_range(b"a", b"b")
        fault = disk.fail(op="pwrite", path="*/data", error=errno.ENOSPC, forever=True)
        with pytest.raises(kvwal.DiskFullError):
            db.checkpoint()
        assert fault.struck
        disk.heal()
        db.checkpoint()
        assert dict(db) == {}
        assert db.verify().ok


def test_an_interruption_right_after_the_flip_stops_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    # The generation was the new one and the free list the old one's: the next checkpoint wrote over live pages.
    disk = SimulatedDisk(seed=1)
    db = _open(disk)
    for n in range(200):
        db[b"%03d" % n] = b"x" * 200
    db.checkpoint()
    pages = db._pages

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pages, "_cut_file", interrupted)
        db[b"100"] = b"new"
        with pytest.raises(KeyboardInterrupt):
            db.checkpoint()
    db[b"101"] = b"newer"
    with pytest.raises(kvwal.PoisonedError):
        db.checkpoint()
    content = dict(db)
    db.close()
    with _open(disk) as db:
        assert dict(db) == content
        db.checkpoint()
        assert db.verify().ok


def test_an_index_entry_that_was_interrupted_is_no_entry() -> None:
    # Its columns came out of step, and sealing the segment raised struct.error.
    index = Index()
    index.add(1, 10, 4096)
    index.seqnos.append(9)
    assert index.at_or_before(9) == (1, 10, 4096)
    index.add(2, 20, 80_000)
    assert (index.seqnos, index.times, index.offsets) == ([1, 2], [10, 20], [4096, 80_000])
