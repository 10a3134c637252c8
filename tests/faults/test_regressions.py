"""Bugs that the crash harness found, each as the smallest case that shows it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

import kvwal
from kvwal.keys import Seqno
from kvwal.log import Seek
from kvwal.log.index import Index
from kvwal.testing import SimulatedDisk


def _open(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, **{"segment_bytes": 16 << 10} | options)


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
    db = _open(disk, keep_history_bytes=0)
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


def test_an_interruption_right_after_the_flip_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # The generation was the new one and the free list the old one's: the next checkpoint wrote over live pages.
    disk = SimulatedDisk(seed=1)
    db = _open(disk)
    for n in range(200):
        db[b"%03d" % n] = b"x" * 200
    db.checkpoint()
    pages = db.engine._pages

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pages, "_cut_file", interrupted)
        db[b"100"] = b"new"
        with pytest.raises(KeyboardInterrupt):
            db.checkpoint()
    db[b"101"] = b"newer"
    db.checkpoint()
    assert db.verify().ok
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


def test_an_index_entry_that_was_interrupted_does_not_stop_the_next_roll() -> None:
    # The commit was written, as it said; the one that sealed its segment then raised struct.error.
    class Interrupted(list[int]):
        def append(self, value: int) -> None:
            log._index.times = []
            raise KeyboardInterrupt

    disk = SimulatedDisk(seed=1)
    with _open(disk, segment_bytes=256 << 10) as db:
        log: Any = db.engine._log
        log._roll(0, 256 << 10)
        db[b"large"] = b"x" * 70_000
        log._index.times = Interrupted()
        with pytest.raises(KeyboardInterrupt) as interrupted:
            db[b"first"] = b"v"
        assert interrupted.value.__notes__ == ["kvwal: commit 2 was written"]
        for n in range(30):
            db[b"%d" % n] = b"x" * 10_000
        assert db.stats().log_segments > 1
        assert [record.seqno for record in db.history()] == list(range(1, 33))
        assert db.verify().ok
    with _open(disk) as db:
        assert db[b"first"] == b"v"
        assert len(db) == 32


@pytest.mark.parametrize("tear", ["empty", "cut", "flipped", "gone"])
def test_a_torn_index_is_not_damage(tear: str) -> None:
    # verify called it so, although an index is derived, is never flushed, and is therefore torn by many a power cut.
    disk = SimulatedDisk(seed=1)
    with _open(disk, segment_bytes=1 << 20) as db:
        for n in range(60):
            db[b"%02d" % n] = b"x" * 10_000
        index = next(name for name in sorted(disk.open_directory("/kv").names()) if name.endswith(".idx"))
        first = int(index[:20])
        if tear == "gone":
            disk.open_directory("/kv").unlink(index)
        else:
            with_index = disk.open_directory("/kv").open(index, write=True)
            if tear == "flipped":
                with_index.pwrite(b"\xff", with_index.size() - 10)
            else:
                with_index.truncate(0 if tear == "empty" else with_index.size() - 7)
            with_index.close()
        report = db.verify()
        assert report.ok, report.problems
        assert [record.seqno for record in db.history(after=first + 2)] == list(range(first + 3, 61))
        assert Seek(db.engine.upkeep._reader.chain).seek(Seqno(first + 4)).segment == first


def test_a_write_that_met_a_full_disk_is_no_reason_to_refuse_the_next() -> None:
    # What was written of the record stays behind, in a segment that is left; nothing is poisoned by it.
    disk = SimulatedDisk(seed=1)
    with _open(disk) as db:
        db[b"before"] = b"v"
        fault = disk.fail("pwrite", error=errno.ENOSPC, effect="part")
        with pytest.raises(kvwal.DiskFullError):
            db[b"full"] = b"v" * 500
        assert fault.struck == 1
        db[b"after"] = b"v"
        content = {b"before": b"v", b"after": b"v"}
        assert dict(db) == content
        crashed = disk.crash()
    with _open(crashed) as db:
        assert dict(db) == content


def test_what_deletes_have_freed_on_a_full_disk_is_there_for_the_next_put() -> None:
    # It was free only after two more checkpoints, which no thread made: puts were refused from then on.
    disk = SimulatedDisk(seed=1)
    with _open(disk, memtable_bytes=1 << 20) as db:
        db.update({b"%03d" % n: b"x" * 2000 for n in range(200)})
        db.checkpoint()
        disk.capacity = disk.used_bytes()
        with pytest.raises(kvwal.DiskFullError):
            for n in range(100):
                db[b"more%d" % n] = b"x" * 1000
        db.clear()
        with suppress(kvwal.DiskFullError):
            # The first one may find out that the disk is full.
            db[b"again"] = b"v" * 50_000
        db[b"again"] = b"v" * 50_000
        assert dict(db) == {b"again": b"v" * 50_000}
        assert db.verify().ok


class _Overtaken(SimulatedDisk):
    """A disk on which something is done right before the nth time that a segment is opened for reading."""

    act: Callable[[], object] | None = None
    left = 0

    def open_directory(self, path: str) -> Any:
        directory = super().open_directory(path)
        return _OvertakenDirectory(directory, self)


class _OvertakenDirectory:
    def __init__(self, directory: Any, disk: _Overtaken) -> None:
        self._directory = directory
        self._disk = disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._directory, name)

    def open(self, name: str, **options: Any) -> Any:
        disk = self._disk
        if name.endswith(".log") and not options and disk.act is not None:
            disk.left -= 1
            if not disk.left:
                act, disk.act = disk.act, None
                act()
        return self._directory.open(name, **options)


@pytest.mark.parametrize("read", ["verify", "records"])
def test_an_empty_segment_that_is_replaced_while_it_is_read_is_read_anew(read: str) -> None:
    # A store that was closed without a commit leaves a short segment without one, and the first commit puts another in
    # its place. A reader with the header of the one and the records of the other called it cut short.
    for nth in range(1, 30):
        disk = _Overtaken(seed=1)
        _open(disk).close()
        with _open(disk) as db:
            disk.left, disk.act = nth, lambda db=db: db.put(b"k", b"v")
            if read == "verify":
                report = db.verify()
                assert report.ok, (nth, report.problems)
            else:
                seqnos = [record.seqno for record in db.engine.upkeep._reader.replay(Seqno(0), Seqno(0))]
                assert seqnos in ([], [1]), nth
            if disk.act is not None:
                assert nth > 2
                return
            assert [record.seqno for record in db.history()] == [1]
    raise AssertionError("reading has no end")
