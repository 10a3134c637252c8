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


@pytest.mark.parametrize("op", ["list_directory", "unlink", "unreadable"])
def test_a_pin_of_before_that_cannot_be_removed_stops_the_first_checkpoint(disk: SimulatedDisk, op: str) -> None:
    """Its pages may be free for this writer already, and its follower takes it for held as long as it has a name."""
    db = kvwal.open("/store", files=disk, **WRITES)
    rewrite(db, b"0")
    with kvwal.follow("/store", files=disk.beside(), cache_bytes=256 << 10) as live, live.snapshot() as then:
        for n in range(1, 4):
            rewrite(db, b"%d" % n)
        db.engine.abandon()
        db = kvwal.open("/store", files=disk, **WRITES)
        fault = disk.fail("unlink" if op == "unreadable" else op, error=errno.EACCES, path="*readers*", forever=True)
        if op == "unreadable":
            disk.fail("open", error=errno.EACCES, path="*.pin", forever=True)
        for n in range(4, 7):
            with pytest.raises(kvwal.RefusedError):
                rewrite(db, b"%d" % n)
        assert fault.struck
        assert dict(then) == {b"%04d" % n: b"0" * 500 for n in range(2000)}
        disk.heal()
        for n in range(4, 7):
            rewrite(db, b"%d" % n)
        with pytest.raises(kvwal.SnapshotTooOld):
            dict(then)
    db.close()


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
