"""A full disk: a clear error, nothing lost, reads go on, deleting works, and writes go on once there is space."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from store_fixtures import TINY, check_store, problems_of, wait_until

import kvwal
from kvwal import DiskFullError, Store
from kvwal.options import RESERVE_BYTES
from kvwal.pages.node import PAGE_SIZE
from kvwal.testing import SimulatedDisk
from kvwal.testing.faults import FAMILIES, Operation
from kvwal.testing.handle import SimulatedFile

WITHOUT_THREAD = {**TINY, "background": False, "keep_history_bytes": 0}


def open_on(disk: SimulatedDisk, **options: Any) -> Store:
    return kvwal.open("/kv", files=disk, **{**WITHOUT_THREAD, **options})


def fill(db: Store, disk: SimulatedDisk, model: dict[bytes, bytes], *, spare: int = 0) -> DiskFullError:
    """Take away all space but `spare` bytes, and put until that is refused."""
    disk.capacity = disk.used_bytes() + spare
    for number in range(100_000):
        key, value = b"fill%06d" % number, b"v" * 500
        try:
            db[key] = value
        except DiskFullError as error:
            return error
        model[key] = value
    raise AssertionError("the disk never got full")


def assert_is(db: Store, model: dict[bytes, bytes]) -> None:
    assert dict(db.items()) == model
    assert len(db) == len(model)
    for key in [*list(model)[:3], b"missing"]:
        assert db.get(key) == model.get(key)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("durability", ["commit", "os"])
def test_nothing_acknowledged_is_lost_and_writes_go_on_when_there_is_space(durability: Any, background: bool) -> None:
    disk = SimulatedDisk()
    model = {b"old": b"1"}
    with open_on(disk, durability=durability, background=background) as db:
        db.update(model)
        error = fill(db, disk, model, spare=100_000)
        assert "full" in str(error)
        assert_is(db, model)
        with pytest.raises(DiskFullError):
            db.update({b"big": b"x" * (RESERVE_BYTES * 2)})
        assert_is(db, model)
        disk.capacity = None
        # Without a reopen. (The background thread may need a moment to find out.)
        for number in range(20):
            key = b"after%d" % number
            wait_until(lambda key=key: works(lambda: db.put(key, b"1")), "a put after space was freed")
            model[key] = b"1"
        db.checkpoint()
        assert db.stats().memtable_keys == 0
        assert_is(db, model)
        assert problems_of(db) == []
    with open_on(disk) as db:
        assert_is(db, model)


def works(action: Callable[[], object]) -> bool:
    try:
        action()
    except DiskFullError:
        return False
    return True


@pytest.mark.parametrize("spare", [0, 4096, 20_000, 50_000, 200_000])
def test_deleting_works_on_a_full_disk_and_makes_room_to_write_again(spare: int) -> None:
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk) as db:
        fill(db, disk, model, spare=1_000_000)
        fill(db, disk, model, spare=spare)
        for key in list(model)[: len(model) // 2]:
            db.delete(key)
            del model[key]
        assert_is(db, model)
        db.delete_range(b"fill", None)
        model.clear()
        assert_is(db, model)
        # The first put may still find the disk full; the next one gets back what the deletes have freed.
        refused = 0
        while not works(lambda: db.put(b"large", b"x" * 50_000)):
            refused += 1
            assert refused == 1
        model[b"large"] = b"x" * 50_000
        db.checkpoint()
        assert_is(db, model)
        assert problems_of(db) == []
    with open_on(disk) as db:
        assert_is(db, model)


@pytest.mark.parametrize("refused", [0, 1, 3])
@pytest.mark.parametrize("way", ["one by one", "ranges", "a few stay"])
def test_what_was_deleted_since_a_checkpoint_that_did_not_fit_need_not_fit(refused: int, way: str) -> None:
    """The memtable that was frozen for it could never be brought into the pages: it fills the disk."""
    disk = SimulatedDisk(capacity=12 << 20)
    settings = {"background": False, "durability": "os", "segment_bytes": 64 << 10, "keep_history_bytes": 0}
    with kvwal.open("/kv", files=disk, **settings) as db:
        number = 0
        with pytest.raises(DiskFullError):
            while True:
                db[b"%06d" % number] = bytes(2000)
                number += 1
        for _ in range(refused):
            with pytest.raises(DiskFullError):
                db[b"one more"] = bytes(2000)
        assert (db.engine.state.version.frozen is not None) == (refused > 0)
        if way == "ranges":
            db.delete_range(b"000001", b"9")
        else:
            for n in range(1, number):
                if way == "one by one" or n % 10:
                    del db[b"%06d" % n]
        expected = {key: bytes(2000) for key in db}
        for n in range(100):
            db[b"new%03d" % n] = expected[b"new%03d" % n] = bytes(2000)
        assert dict(db) == expected
        assert len(db) == len(expected)
        db.checkpoint()
        assert db.verify().ok
        assert dict(db) == expected
    with kvwal.open("/kv", files=disk.crash(0)) as db:
        assert dict(db) == expected


@pytest.mark.parametrize("deletes", [False, True])
def test_memory_is_bounded_while_no_checkpoint_fits(monkeypatch: pytest.MonkeyPatch, deletes: bool) -> None:
    """What was deleted since is combined with what was frozen, but never so much that writers need not wait."""
    disk = SimulatedDisk(seed=1)
    budget = 1 << 19
    settings = {"background": False, "durability": "os", "keep_history_bytes": 0}
    with kvwal.open("/kv", files=disk, memtable_bytes=budget, **settings) as db:
        pwrite = SimulatedFile.pwrite

        def limited(self: SimulatedFile, data: Any, offset: int) -> None:
            # As where files may not be larger: the meta slots are there.
            if self._path.endswith("/data") and offset >= 8192:
                raise OSError(errno.EFBIG, "the file is too large", self._path)
            pwrite(self, data, offset)

        monkeypatch.setattr(SimulatedFile, "pwrite", limited)
        most = 0
        with pytest.raises(DiskFullError, match="the file is too large"):
            for number in range(20_000):
                db[b"%06d" % number] = bytes(1000)
                if deletes and number % 3 == 0:
                    del db[b"%06d" % number]
                version = db.engine.state.version
                used = version.memtable.bytes_used + (0 if version.frozen is None else version.frozen.bytes_used)
                most = max(most, used)
        # They may be the way out, and have some memory left.
        del db[b"000001"]
        db.delete_range(b"000002", b"000003")
        assert db.get(b"000001", None) is db.get(b"000002", None) is None
        with pytest.raises(DiskFullError, match="the file is too large"):
            for number in range(100):
                db.delete(b"x%06d" % number * 8000)
                version = db.engine.state.version
                used = version.memtable.bytes_used + (0 if version.frozen is None else version.frozen.bytes_used)
                most = max(most, used)
        assert most < 5 * budget
        monkeypatch.undo()
        db[b"after"] = b"1"
        db.checkpoint()
        assert db.verify().ok


def test_a_transaction_of_one_put_is_refused_whole_and_may_be_tried_again() -> None:
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk) as db:
        fill(db, disk, model)

        def put(number: int) -> None:
            with db.transaction() as txn:
                assert txn.get(b"one%d" % number) is None
                txn[b"one%d" % number] = b"x" * 60_000
            model[b"one%d" % number] = b"x" * 60_000

        with pytest.raises(DiskFullError):
            for number in range(200):
                put(number)
        assert_is(db, model)
        disk.capacity = None
        put(number)
        assert_is(db, model)
    with open_on(disk) as db:
        assert_is(db, model)


def test_a_transaction_that_only_deletes_commits_from_the_reserve() -> None:
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk) as db:
        fill(db, disk, model)
        assert disk.kind("/kv/reserve") == "file"
        with db.transaction() as txn:
            gone = [key for key, _ in txn.scan(limit=3)]
            for key in gone:
                del txn[key]
        for key in gone:
            del model[key]
        assert_is(db, model)
        with pytest.raises(DiskFullError), db.transaction() as txn:
            txn[b"more"] = b"x" * 500_000
        with pytest.raises(DiskFullError):
            db.put(b"more", b"x" * (RESERVE_BYTES * 2))
        assert_is(db, model)
        check_store(db)


def test_puts_leave_what_is_kept_for_deleting_alone() -> None:
    """A checkpoint may have needed the reserve, and then there is none: puts wait until it is held again."""
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk) as db:
        # Many keys, so that checkpoints come about, fail, take the reserve and give it to the first commit that asks.
        disk.capacity = disk.used_bytes() + 300_000
        for number in range(8000):
            try:
                with db.transaction() as txn:
                    txn[b"%06d" % number] = b"v" * 500
            except DiskFullError:
                continue
            model[b"%06d" % number] = b"v" * 500
        assert disk.free_bytes() > 0 or disk.kind("/kv/reserve") == "file"
        assert_is(db, model)
    with open_on(disk) as db:
        for key in sorted(model)[::2]:
            db.delete(key)
            del model[key]
        db.clear()
        db[b"again"] = b"1"
        assert_is(db, {b"again": b"1"})
        assert problems_of(db) == []


def test_what_a_snapshot_holds_goes_before_puts_are_refused_for_good() -> None:
    disk = SimulatedDisk()
    with open_on(disk) as db:
        model = {b"%04d" % number: b"old" * 200 for number in range(1000)}
        db.update(model)
        db.checkpoint()
        snapshot = db.snapshot()
        # All pages twice: those of the snapshot, and those of now.
        model = {key: b"new" * 200 for key in model}
        db.update(model)
        db.checkpoint()
        fill(db, disk, model, spare=100_000)
        with_snapshot = without = 0
        # The first attempts find out that the disk is full, and reclaim what needs no reader to go.
        while any(works(lambda: db.put(b"more%06d" % len(model), b"v" * 500)) for _ in range(4)):
            model[b"more%06d" % len(model)] = b"v" * 500
            if snapshot.reader in db.engine.reads.moments.readers.all():
                with_snapshot += 1
            else:
                without += 1
        assert without > 200, "the space of the old pages was not used"
        with pytest.raises(kvwal.SnapshotTooOld, match="max_snapshot_bytes"):
            snapshot.get(b"0001")
        snapshot.close()
        assert_is(db, model)
        check_store(db)


def test_a_checkpoint_that_does_not_fit_takes_the_pages_of_a_snapshot() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False, durability="os", keep_history_bytes=0) as db:
        model = {b"%04d" % number: bytes(6000) for number in range(1500)}
        db.update(model)
        db.checkpoint()
        snapshot = db.snapshot()
        # Two generations later nothing but the snapshot needs its pages, which are more than the reserve.
        model = {key: b"new" * 2000 for key in model}
        db.update(model)
        db.checkpoint()
        db[b"0000"] = model[b"0000"] = b"small"
        db.checkpoint()
        db.update(model)
        disk.capacity = disk.used_bytes()
        db.checkpoint()
        with pytest.raises(kvwal.SnapshotTooOld):
            len(snapshot)
        snapshot.close()
        assert_is(db, model)
        check_store(db)


def test_a_snapshot_that_holds_nothing_stays_on_a_full_disk() -> None:
    disk = SimulatedDisk()
    with open_on(disk, memtable_bytes=64 << 20) as db:
        model = {b"a": b"1"}
        db.update(model)
        snapshot = db.snapshot()
        fill(db, disk, model)
        assert dict(snapshot) == {b"a": b"1"}
        snapshot.close()


def test_reading_goes_on_in_transactions_however_full_the_disk_is() -> None:
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk, background=True, durability="os") as db:
        fill(db, disk, model, spare=300_000)
        for _ in range(5):
            with db.transaction() as txn:
                assert len(txn) == len(model)
            with pytest.raises(DiskFullError), db.transaction() as txn:
                txn[b"new"] = b"v" * (RESERVE_BYTES * 2)


def test_the_reserve_is_held_again_after_a_checkpoint() -> None:
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk) as db:
        fill(db, disk, model, spare=50_000)
        db.clear()
        db.checkpoint()
        disk.capacity = None
        db[b"a"] = b""
        db.checkpoint()
        assert disk.kind("/kv/reserve") == "file"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_checkpoint_that_met_a_full_disk_is_made_up_for_completely(code: int) -> None:
    """It had set a memtable aside; what was committed since must come into the pages too."""
    disk = SimulatedDisk()
    with open_on(disk, memtable_bytes=1 << 20, checkpoint_log_bytes=1 << 20) as db:
        # The first one looks after the meta slots.
        db.put(b"0000", b"")
        db.checkpoint()
        model = {b"%04d" % number: b"v" * 200 for number in range(200)}
        db.update(model)
        disk.fail("pwrite", error=code, path="*/data", forever=True)
        with pytest.raises(DiskFullError):
            db.checkpoint()
        assert_is(db, model)
        assert db.stats().frozen_keys == 200
        db[b"later"] = model[b"later"] = b"1"
        db.delete(b"0000")
        del model[b"0000"]
        db.delete_range(b"0190", b"0195")
        for number in range(190, 195):
            del model[b"%04d" % number]
        assert_is(db, model)
        disk.heal()
        db.checkpoint()
        stats = db.stats()
        assert (stats.memtable_keys, stats.frozen_keys) == (0, 0)
        assert stats.checkpoint_seqno == db.last_seqno
        assert_is(db, model)
        assert problems_of(db) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_every_operation_of_a_checkpoint_loses_nothing(code: int) -> None:
    """The nth operation that takes space fails, for every n, until one checkpoint gets through untouched.

    A meta slot is the one place where a part of a write may already be what the next open finds, so there the store is
    poisoned. Everywhere else the checkpoint is made, with what the reserve gives.
    """
    poisoned = 0
    for nth in range(1, 200):
        disk = SimulatedDisk(seed=nth)
        with open_on(disk, memtable_bytes=1 << 20, checkpoint_log_bytes=1 << 20) as db:
            model = {b"%04d" % number: b"v" * 300 for number in range(100)}
            db.update(model)
            db.checkpoint()
            db.update({key: b"w" * 300 for key in model})
            model = dict.fromkeys(model, b"w" * 300)
            fault = disk.fail("change", nth, code, effect="part")
            changes: list[Operation] = []
            disk.watcher = changes.append
            try:
                db.checkpoint()
            except kvwal.PoisonedError:
                poisoned += 1
                struck = [operation for operation in changes if operation.name in FAMILIES["change"]][nth - 1]
                assert (struck.name, struck.path) == ("pwrite", "/kv/data")
                assert struck.offset in (0, PAGE_SIZE)
                assert struck.size == PAGE_SIZE
            disk.watcher = None
            met = fault.struck
            disk.heal()
            assert_is(db, model)
        with open_on(disk) as db:
            assert_is(db, model)
            assert problems_of(db) == []
        if not met:
            break
    assert nth > 5
    assert poisoned == 1


@pytest.mark.parametrize("flag", ["c", "n"])
def test_no_space_to_make_a_store_is_a_clear_error_and_leaves_nothing_in_the_way(flag: Any) -> None:
    refused = []
    for capacity in [0, 4096, 8192, 20_000, 30_000, 50_000, 200_000]:
        disk = SimulatedDisk(capacity=capacity)
        if not works(lambda disk=disk: kvwal.open("/kv", flag, files=disk, **WITHOUT_THREAD).close()):
            refused.append(capacity)
        disk.capacity = None
        with open_on(disk) as db:
            assert len(db) == 0
            db[b"a"] = b"1"
    assert 4096 in refused
    assert 200_000 not in refused
    assert refused == sorted(refused)


def test_a_store_opens_on_a_full_disk_after_a_clean_close() -> None:
    disk = SimulatedDisk()
    model: dict[bytes, bytes] = {}
    with open_on(disk) as db:
        fill(db, disk, model, spare=100_000)
    disk.capacity = disk.used_bytes()
    with open_on(disk) as db:
        assert_is(db, model)
        with pytest.raises(DiskFullError):
            db[b"more"] = b"1"
        assert_is(db, model)
        disk.capacity = None
        db[b"more"] = model[b"more"] = b"1"
        assert_is(db, model)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_store_whose_log_is_longer_than_its_memtable_opens_on_a_full_disk(code: int) -> None:
    """The checkpoint that is due can wait: what matters is to get in, to read and to delete."""
    disk = SimulatedDisk()
    db = open_on(disk, memtable_bytes=64 << 20, checkpoint_log_bytes=64 << 20)
    model = {b"%04d" % number: b"v" * 20_000 for number in range(250)}
    db.update(model)
    found = disk.copy()
    db.close()
    # The first write looks after a meta slot.
    found.fail("pwrite", 2, code, path="*/data", forever=True)
    with open_on(found, memtable_bytes=16 << 10) as again:
        assert_is(again, model)
        assert again.stats().frozen_keys == 250
        found.heal()
        again[b"more"] = model[b"more"] = b"1"
        assert_is(again, model)


def test_a_failed_open_lets_go_of_the_lock() -> None:
    disk = SimulatedDisk()
    db = open_on(disk, memtable_bytes=1 << 20, checkpoint_log_bytes=1 << 20)
    db.update({b"%04d" % number: b"v" * 300 for number in range(500)})
    found = disk.copy()
    db.close()
    found.fail("pwrite", error=errno.EIO, path="*/data", forever=True)
    try:
        open_on(found, memtable_bytes=16 << 10)
    except kvwal.PoisonedError as error:
        kept = error  # As a debugger would: the traceback keeps the frames alive.
        found.heal()
        open_on(found).close()
        assert isinstance(kept.__cause__, OSError)
    else:
        raise AssertionError("the disk failed and the store opened")


def test_a_full_disk_under_many_threads_refuses_each_commit_or_keeps_it() -> None:
    from store_fixtures import run_threads

    disk = SimulatedDisk()
    with open_on(disk, background=True) as db:
        db[b"first"] = b""
        disk.capacity = disk.used_bytes() + 300_000

        def client(index: int) -> dict[bytes, bytes]:
            kept = {}
            for number in range(300):
                key = b"%d.%04d" % (index, number)
                try:
                    db[key] = b"v" * 500
                except DiskFullError:
                    continue
                kept[key] = b"v" * 500
            return kept

        parts = run_threads(*(lambda index=index: client(index) for index in range(3)))
        model = {b"first": b""}
        for part in parts:
            model.update(part)
        assert_is(db, model)
        disk.capacity = None
        db.checkpoint()
        assert_is(db, model)
    with open_on(disk) as db:
        assert_is(db, model)
        assert problems_of(db) == []


def test_the_reserve_is_whole_after_a_crash_and_is_enough_for_deletes() -> None:
    """It was made and not flushed: a power cut left it empty, and an empty file passed for one that holds space."""
    settings: dict[str, Any] = {"background": False, "segment_bytes": 16 << 10}
    disk = SimulatedDisk(seed=1, capacity=8 << 20)
    kvwal.open("/kv", files=disk, **settings)[b"a"] = b"1"
    # Nothing that was not flushed survives.
    disk = disk.crash()
    db = kvwal.open("/kv", files=disk, **settings)
    for n in range(40):
        db[b"%d" % n] = b"x" * 100
    reserve = disk.open_directory("/kv").open("reserve")
    assert reserve.size() == RESERVE_BYTES
    # Else its space would not be free when it is removed.
    reserve.close()
    other = disk.open_directory("/").open("other", create=True)
    with pytest.raises(OSError, match="ENOSPC"):
        for at in itertools.count(0, 4096):
            other.pwrite(b"x" * 4096, at)
    for n in range(600):
        db.delete(b"%d" % n)
    assert list(db) == [b"a"]
