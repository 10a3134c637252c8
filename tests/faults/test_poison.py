"""A failed write or flush: the store is poisoned, reads go on, nothing is tried again until a reopen recovers."""

from __future__ import annotations

import errno
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY, Interruption, check_store, interrupted_at, problems_of, wait_until

import kvwal
from kvwal import PoisonedError, Store
from kvwal.api import opened
from kvwal.files import file as system_file
from kvwal.testing import SimulatedDisk

OPTIONS = {**TINY, "background": False}
# A segment is opened under a temporary name, and the disk goes on calling it so.
LOG = "/kv/[0s]*"


def open_on(disk: SimulatedDisk, **options: Any) -> Store:
    return kvwal.open("/kv", files=disk, **{**OPTIONS, **options})


def assert_poisoned(db: Store) -> None:
    """Every way to write, but not one to read."""
    writes: list[Any] = [
        lambda: db.put(b"k", b"v"),
        lambda: db.delete(b"k"),
        lambda: db.delete_range(b"k"),
        lambda: db.clear(),
        lambda: db.update({b"k": b"v"}),
        lambda: db.pop(b"a"),
        lambda: db.setdefault(b"new", b"v"),
        lambda: db.popitem(),
        lambda: db.run(lambda txn: txn.put(b"k", b"v")),
        lambda: db.put(b"k", b"v", durability="os"),
        db.sync,
        db.checkpoint,
    ]
    for write in writes:
        with pytest.raises(PoisonedError, match="open"):
            write()
    assert db[b"a"] == b"1"
    assert b"k" not in db
    assert list(db.scan()) == [(b"a", b"1")]
    assert len(db) == 1
    with db.snapshot() as snapshot:
        assert snapshot[b"a"] == b"1"
    with db.transaction() as txn:
        assert txn[b"a"] == b"1"
    check_store(db)


@pytest.mark.parametrize("operation", ["pwrite", "datasync"])
@pytest.mark.parametrize("effect", ["none", "part", "all"])
@pytest.mark.parametrize("way", ["put", "batch", "transaction"])
def test_a_failed_write_or_flush_of_the_log_poisons_the_store(operation: str, effect: Any, way: str) -> None:
    disk = SimulatedDisk(seed=3)
    db = open_on(disk)
    db[b"a"] = b"1"
    fault = disk.fail(operation, error=errno.EIO, path=LOG, effect=effect)
    with pytest.raises(PoisonedError) as caught:
        if way == "put":
            db[b"lost"] = b"2"
        elif way == "batch":
            db.update({b"lost": b"2"})
        else:
            with db.transaction() as txn:
                txn[b"lost"] = txn[b"a"]
    assert isinstance(caught.value.__cause__, OSError | PoisonedError)
    assert fault.struck == 1
    assert b"lost" not in db, "what may not be on disk is not shown"
    assert_poisoned(db)
    assert fault.struck == 1, "a failed flush is not tried again"
    disk.trace = []
    db.close()
    assert [str(op) for op in disk.trace if op.name in ("pwrite", "datasync", "sync", "truncate")] == []
    for found in (disk.crash(0), disk.crash(-1), disk):
        with open_on(found) as again:
            # Not acknowledged: there or not, but then the whole of it; what was acknowledged is there.
            assert again[b"a"] == b"1"
            assert again.get(b"lost") in (None, b"1" if way == "transaction" else b"2")
            again[b"on"] = b"3"
            assert problems_of(again) == []


# Entries and root, then the meta: a flush before it and one after; the very first checkpoint flushes a slot besides.
@pytest.mark.parametrize(
    ("operation", "nth"),
    [("pwrite", 1), ("pwrite", 2), ("pwrite", 3), ("datasync", 1), ("datasync", 2), ("sync", 1)],
)
def test_a_failed_write_or_flush_of_the_pages_poisons_the_store(operation: str, nth: int) -> None:
    disk = SimulatedDisk(seed=3)
    db = open_on(disk)
    db[b"a"] = b"1"
    fault = disk.fail(operation, nth, errno.EIO, path="*/data", effect="part")
    with pytest.raises(PoisonedError):
        db.checkpoint()
    assert fault.struck == 1
    disk.trace = []
    assert_poisoned(db)
    db.close()
    written = [op for op in disk.trace if op.name in ("pwrite", "datasync", "sync", "truncate")]
    assert [str(op) for op in written if op.path == "/kv/data"] == []
    for found in (disk.crash(0), disk.crash(-1), disk):
        with open_on(found) as again:
            assert dict(again) == {b"a": b"1"}
            again.checkpoint()
            assert problems_of(again) == []


def test_a_background_checkpoint_that_fails_poisons_the_store() -> None:
    disk = SimulatedDisk()
    db = open_on(disk, background=True, durability="os")
    db[b"a"] = b"1"
    disk.fail("fsync", error=errno.EIO, path="*/data", forever=True)

    def poisoned() -> bool:
        try:
            db.delete_range(b"b")
        except PoisonedError:
            return True
        db.update({b"b%d" % number: b"x" * 100 for number in range(100)})
        return False

    try:
        wait_until(poisoned, "the poison")
    except PoisonedError:
        pass
    assert db[b"a"] == b"1"
    db.close()
    disk.heal()
    with open_on(disk) as again:
        assert again[b"a"] == b"1"
        assert problems_of(again) == []


def test_closing_a_store_whose_last_checkpoint_fails_lets_go_of_everything() -> None:
    disk = SimulatedDisk()
    db = open_on(disk, memtable_bytes=1 << 20, checkpoint_log_bytes=1 << 20, segment_bytes=1 << 20)
    model = {b"%04d" % number: b"x" * 1000 for number in range(400)}
    db.update(model)
    disk.fail("pwrite", error=errno.EIO, path="*/data", forever=True)
    db.close()  # Nothing is lost by it: the log has everything.
    assert db.closed
    disk.heal()
    with open_on(disk) as again:
        assert dict(again) == model


@pytest.mark.parametrize("operation", ["datasync", "sync", "truncate", "pwrite"])
def test_closing_a_store_whose_last_flush_fails_lets_go_of_everything(operation: str) -> None:
    disk = SimulatedDisk()
    db = open_on(disk, durability="os")
    db[b"a"] = b"1"
    fault = disk.fail(operation, error=errno.EIO, path=LOG, forever=True)
    # What fails behind the flush costs nothing: the next open recovers.
    with pytest.raises(PoisonedError) if operation == "datasync" else nullcontext():
        db.close()
    assert db.closed
    assert fault.struck or operation not in ("datasync", "pwrite")
    disk.heal()
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1"}
        assert problems_of(again) == []


def test_a_failed_read_is_an_error_and_never_a_missing_key() -> None:
    disk = SimulatedDisk()
    with open_on(disk) as db:
        model = {b"%05d" % number: b"x" * 50 for number in range(3000)}
        db.update(model)
        db.checkpoint()
    with open_on(disk) as db:
        fault = disk.fail("read", error=errno.EIO, path="*/data", forever=True)
        with pytest.raises(OSError, match="EIO"):
            db.get(b"00700")
        with pytest.raises(OSError, match="EIO"):
            list(db.scan())
        assert fault.struck
        with pytest.raises(OSError, match="EIO"), db.transaction() as txn:
            txn.get(b"01500")
        disk.heal()
        assert dict(db) == model, "a read that failed is tried again by the next"
        db[b"a"] = b""
        check_store(db)


def test_a_failed_read_of_the_log_at_open_is_no_torn_tail() -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    for number in range(20):
        db[b"%d" % number] = b"x" * 2000
    found = disk.copy()
    db.close()
    for nth in range(1, 60):
        fault = found.fail("read", nth, errno.EIO)
        try:
            open_on(found).close()
        except (OSError, kvwal.CorruptionError) as error:
            assert isinstance(error, OSError), f"a failed read was taken for damage: {error}"
        found.heal()
        with open_on(found) as again:
            assert len(again) == 20
        if not fault.struck:
            return


def test_a_poisoned_store_keeps_what_was_committed_at_a_lower_durability_readable() -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    db[b"a"] = b"1"
    db.put(b"soft", b"2", durability="os")
    disk.fail("datasync", error=errno.EIO, path=LOG, forever=True)
    with pytest.raises(PoisonedError):
        db.sync()
    assert db[b"soft"] == b"2"
    with pytest.raises(PoisonedError):
        db[b"b"] = b""
    db.close()


@pytest.mark.parametrize("way", ["put", "transaction", "sync"])
def test_a_flush_that_failed_while_an_interruption_came_is_never_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The system says only once that it has lost what was written: a second flush would call it durable."""
    flushed: list[int] = []

    def fails(fd: int) -> None:
        flushed.append(fd)
        if len(flushed) == 1:
            raise OSError(errno.EIO, "what was written is lost")

    def commit(db: kvwal.Store) -> None:
        if way == "put":
            db.put(b"a", b"1")
        elif way == "sync":
            db.sync()
        else:
            with db.transaction() as txn:
                txn[b"a"] = b"1"

    for step in range(1, 2000):
        db = kvwal.open(tmp_path / str(step), background=False)
        db.put(b"a", b"0", durability="os")
        flushed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(system_file, "_datasync", fails)
            try:
                found: BaseException | None = interrupted_at(step, partial(commit, db))
            except kvwal.PoisonedError as error:
                # It may have taken the place of the interruption.
                found = error.__context__ if isinstance(error.__context__, Interruption) else None
            if flushed:
                for durability in ("os", "commit"):
                    with pytest.raises(kvwal.PoisonedError):
                        db.put(b"b", b"1", durability=durability)  # type: ignore[arg-type]  # a str, of two literals
                assert len(flushed) == 1, step
                assert db.durable_seqno == 0
            # It tells what no call was told of.
            with nullcontext() if flushed else pytest.raises(PoisonedError):
                db.close()
        shutil.rmtree(tmp_path / str(step))
        if found is None:
            assert flushed
            return
    raise AssertionError("there are more places than were tried")


@pytest.mark.parametrize("durability", ["os", "interval"])
def test_a_close_whose_own_flush_fails_says_so(durability: Any) -> None:
    """At these durabilities commits were acknowledged that only this flush would have brought on disk."""
    disk = SimulatedDisk()
    db = open_on(disk, durability=durability, sync_delay_s=60, background=True)
    db.put(b"a", b"1")
    disk.fail("datasync", path=LOG)
    with pytest.raises(PoisonedError, match="EIO"):
        db.close()
    assert db.closed
    db.close()
    disk.heal()
    with open_on(disk) as db:
        check_store(db)


@pytest.mark.parametrize("told", ["none", "a put", "a feed", "a feed that waits"])
def test_a_close_tells_of_a_flush_that_failed_in_the_background_unless_a_call_did(told: str) -> None:
    disk = SimulatedDisk()
    db = open_on(disk, durability="interval", sync_delay_s=0.01, background=True)
    fault = disk.fail("datasync", path=LOG)
    db.put(b"a", b"1")
    wait_until(lambda: bool(fault.struck and db.engine._background.failure), "the flush in the background")
    feed = db.changes(follow=True)
    # It looks, and tells no one.
    assert not feed.alive
    if told != "none":
        with pytest.raises(PoisonedError):
            if told == "a put":
                db.put(b"b", b"2")
            elif told == "a feed":
                next(feed)
            else:
                feed.wait(60)
        db.close()
    else:
        with pytest.raises(PoisonedError):
            db.close()
    assert db.closed


@pytest.mark.parametrize("durability", ["os", "commit"])
@pytest.mark.parametrize("operation", ["pwrite", "datasync"])
def test_a_close_after_a_call_that_was_told_is_quiet(durability: Any, operation: str) -> None:
    """The advice is to close the store and open it again."""
    disk = SimulatedDisk()
    db = open_on(disk, durability="os")
    db.put(b"a", b"1")
    disk.fail(operation, path=LOG, forever=True)
    with pytest.raises(PoisonedError, match="close the store"):
        db.put(b"b", b"2", durability=durability)
        db.sync()
    db.close()


def test_the_exit_of_a_program_closes_the_other_stores_too() -> None:
    disks = [SimulatedDisk() for _ in range(3)]
    stores = [open_on(disk, durability="os") for disk in disks]
    for db, disk in zip(stores, disks, strict=True):
        db.put(b"a", b"1")
        disk.fail("datasync", path=LOG)
    with pytest.raises(PoisonedError):
        opened._close_all()
    assert all(db.closed for db in stores)
