"""Whatever goes wrong with `readers/`, the writer goes on, and frees nothing that a pin needs."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from following_fixtures import rewrite

import kvwal
from kvwal.readers.pin import PinMaker
from kvwal.testing import SimulatedDisk

WRITES: dict[str, Any] = {
    "background": False,
    "keep_history_s": 0,
    "segment_bytes": 16 << 10,
    "memtable_bytes": 1 << 20,
}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    # Two processes of one machine are one process to Python.
    monkeypatch.setattr("kvwal.readers.listing.pin_of_this_process", lambda name: None)
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with kvwal.open("/store", files=disk, **WRITES) as store:
        rewrite(store, b"0")
        yield store


def used(db: kvwal.Store) -> int:
    """The pages that are in use, or held."""
    figures = db.stats()
    return figures.pages_total - figures.pages_free


@pytest.mark.parametrize("error", [errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("op", ["list_directory", "open_directory", "open", "pread", "unlink"])
def test_no_checkpoint_fails_for_what_it_cannot_find_out(
    disk: SimulatedDisk, db: kvwal.Store, op: str, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        rewrite(db, b"0")
    usual = used(db)
    machine = disk.beside()
    dead = disk.beside()
    killed = kvwal.follow("/store", files=dead)
    dead.kill()
    with kvwal.follow("/store", files=machine) as live, live.snapshot() as then:
        fault = disk.fail(op, error=error, path="*readers*", forever=True)
        for n in range(1, 4):
            rewrite(db, b"%d" % n)
        assert fault.struck
        assert live.pinned
        assert dict(then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}
        assert 1 <= sum(record.levelno == logging.WARNING for record in caplog.records) <= 2
        disk.heal()
        rewrite(db, b"4")
        assert dict(then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}
    for n in range(5, 8):
        rewrite(db, b"%d" % n)
    assert used(db) <= usual
    assert not db.pins()
    killed.close()


def test_the_log_of_a_pin_that_was_not_seen_stays(disk: SimulatedDisk, db: kvwal.Store) -> None:
    disk.fail("list_directory", error=errno.EACCES, path="*readers*", forever=True)
    machine = disk.beside()
    with kvwal.follow("/store", files=machine):
        rewrite(db, b"1")
        needed = sorted(name for name in disk.open_directory("/store").names() if name.endswith(".log"))
        for n in range(2, 5):
            rewrite(db, b"%d" % n)
        assert needed[-1] in disk.open_directory("/store").names()
    disk.heal()
    for n in range(2):
        rewrite(db, b"%d" % n)
    assert needed[-1] not in disk.open_directory("/store").names()


def test_a_pin_that_cannot_be_unlinked_stays_honoured(disk: SimulatedDisk, caplog: pytest.LogCaptureFixture) -> None:
    with kvwal.open("/store", files=disk, **WRITES, hold_s=0, hold_bytes=0) as db:
        rewrite(db, b"0")
        with kvwal.follow("/store", files=disk.beside()) as live, live.snapshot() as then:
            disk.fail("unlink", error=errno.EACCES, path="*readers*", forever=True)
            for n in range(1, 5):
                rewrite(db, b"%d" % n)
            assert dict(then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}
            assert "cannot be removed" in caplog.text
            assert "is broken" not in caplog.text
            assert not db.engine._followers.give_up()  # type: ignore[attr-defined]
            disk.heal()
            rewrite(db, b"5")
            assert "is broken" in caplog.text
            assert not db.pins()


@pytest.mark.parametrize("background", [False, True])
def test_puts_and_the_close_go_on(disk: SimulatedDisk, background: bool) -> None:
    db = kvwal.open("/store", files=disk, background=background, memtable_bytes=1 << 16)
    rewrite(db, b"0")
    live = kvwal.follow("/store", files=disk.beside())
    disk.fail("list_directory", error=errno.EACCES, path="*readers*", forever=True)
    for n in range(60):
        db.put(b"k%d" % n, b"x" * 5000)
    db.close()
    live.close()


class Blind:
    """A writer that was killed, whose follower reads on, and a new one that cannot find out about pins of before."""

    def __init__(self, disk: SimulatedDisk, op: str, error: int = errno.EACCES, **more: Any) -> None:
        self.disk, self._options = disk, {**WRITES, **more}
        db = kvwal.open("/store", files=disk, **self._options)
        rewrite(db, b"0")
        # It reads from its files, and not from memory.
        self.live = kvwal.follow("/store", files=disk.beside(), cache_bytes=256 << 10)
        self.then = self.live.snapshot()
        for n in range(1, 4):
            rewrite(db, b"%d" % n)
        db.engine.abandon()
        if op == "unreadable":
            disk.fail("unlink", error=error, path="*readers*", forever=True)
            self.fault = disk.fail("open", error=error, path="*.pin", forever=True)
        else:
            self.fault = disk.fail(op, error=error, path="*readers*", forever=True)
        self.db = self.open()

    def open(self) -> kvwal.Store:
        return kvwal.open("/store", files=self.disk, **self._options)

    def check(self) -> None:
        """The pin has its name, and what it needs is there."""
        assert dict(self.then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}

    def close(self) -> None:
        self.disk.heal()
        self.then.close()
        self.live.close()
        self.db.close()


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("op", ["list_directory", "open_directory", "unlink", "unreadable"])
def test_where_pins_of_before_cannot_be_removed_no_page_is_written_over(
    disk: SimulatedDisk, op: str, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    """They may need what is free for this writer, and have their names: their followers take them for held."""
    blind = Blind(disk, op, error)
    db = blind.db
    for n in range(4, 8):
        rewrite(db, b"%d" % n)
        blind.check()
    assert blind.fault.struck
    assert db.compact() <= 0
    checkpointer = db.engine._checkpointer
    assert checkpointer is not None
    assert not checkpointer.is_sparse()
    blind.check()
    assert sum("nothing is freed" in record.message for record in caplog.records) == 1
    assert [pin.name for pin in db.pins() if pin.purpose == "follower"] == ["(pins cannot be looked at)"]
    disk.heal()
    for n in range(8, 12):
        rewrite(db, b"%d" % n)
    with pytest.raises(kvwal.SnapshotTooOld):
        dict(blind.then)
    assert not db.pins()
    assert db.verify().ok
    blind.close()


def test_a_second_writer_that_cannot_look_either_writes_over_nothing(disk: SimulatedDisk) -> None:
    """What the first one left free on disk may be needed all the same."""
    blind = Blind(disk, "list_directory")
    for n in range(4, 7):
        for _ in range(2):
            rewrite(blind.db, b"%d" % n)
        blind.check()
        if n % 2:
            blind.db.close()
        else:
            blind.db.engine.abandon()
        blind.db = blind.open()
        assert blind.db[b"0000"] == b"%d" % n * 500
    blind.check()
    blind.close()


def test_a_disk_that_is_full_changes_nothing_of_that(disk: SimulatedDisk) -> None:
    blind = Blind(disk, "list_directory")
    disk.capacity = disk.used_bytes() + (3 << 20)
    with pytest.raises(kvwal.DiskFullError):
        for n in range(4, 30):
            rewrite(blind.db, b"%d" % (n % 10))
    blind.check()
    blind.db.delete_range()
    blind.check()
    disk.heal()
    disk.capacity = None
    rewrite(blind.db, b"9")
    assert blind.db.verify().ok
    blind.close()


def test_what_grew_while_pins_could_not_be_looked_at_is_given_back(disk: SimulatedDisk) -> None:
    blind = Blind(disk, "list_directory")
    usual = blind.db.stats().pages_total
    for n in range(4, 10):
        rewrite(blind.db, b"%d" % n)
    assert blind.db.stats().pages_total > 2 * usual
    logs = [name for name in disk.open_directory("/store").names() if name.endswith(".log")]
    disk.heal()
    blind.then.close()
    blind.live.close()
    for n in range(3):
        rewrite(blind.db, b"%d" % n)
    while blind.db.compact():
        pass
    assert blind.db.stats().pages_total <= usual
    assert len([name for name in disk.open_directory("/store").names() if name.endswith(".log")]) < len(logs)
    blind.close()


def test_pins_that_take_turns_hold_no_longer_than_one(disk: SimulatedDisk, caplog: pytest.LogCaptureFixture) -> None:
    machine = disk.beside()
    with kvwal.open("/store", files=disk, **WRITES, hold_s=10) as db:
        rewrite(db, b"0")
        meta = db.engine._pages.meta  # type: ignore[attr-defined]
        maker = PinMaker(machine, machine.open_directory("/store"), "turns")
        pin = maker.pin(meta.store_id, meta.line, meta.generation)
        for n in range(1, 8):
            rewrite(db, b"%d" % n)
            after = maker.pin(meta.store_id, meta.line, meta.generation)
            db.checkpoint()
            rewrite(db, b"%d" % n)
            assert pin is not None
            pin.release()
            pin = after
            disk.pass_time(4)
        assert "more than 10 s" in caplog.text
        assert not db.pins()
        assert pin is not None
        pin.release()
