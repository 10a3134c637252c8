"""Versions follow one another: what readers of one pin is given back, also when interrupted anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from store_fixtures import check_store, interrupted_at, readers_in

import kvwal
from kvwal.testing import SimulatedDisk


def _store() -> kvwal.Store:
    db = kvwal.open("/kv", files=SimulatedDisk(seed=1), background=False, durability="os")
    db.update({b"%03d" % n: b"x" * 100 for n in range(300)})
    db.checkpoint()
    db[b"000"] = b"new"
    return db


def _snapshot(db: kvwal.Store) -> None:
    with db.snapshot() as snapshot:
        assert snapshot[b"000"] == b"new"


def _dropped_snapshot(db: kvwal.Store) -> None:
    assert db.snapshot().seqno == db.last_seqno


def _scan(db: kvwal.Store) -> None:
    assert sum(1 for _ in db.scan()) == 300


def _dropped_scan(db: kvwal.Store) -> None:
    iterator = db.scan()
    next(iterator)


def _scan_of_a_snapshot(db: kvwal.Store) -> None:
    with db.snapshot() as snapshot:
        assert sum(1 for _ in snapshot.scan()) == 300


def _transaction(db: kvwal.Store) -> None:
    with db.transaction() as txn:
        assert txn[b"001"] == b"x" * 100
        assert txn.first() == (b"000", b"new")


def _writing_transaction(db: kvwal.Store) -> None:
    with db.transaction() as txn:
        txn[b"001"] = txn[b"002"] + b"1"


def _get(db: kvwal.Store) -> None:
    assert db[b"150"] == b"x" * 100


def _count(db: kvwal.Store) -> None:
    assert len(db) == 300


@pytest.mark.parametrize(
    "read",
    [
        _snapshot,
        _dropped_snapshot,
        _scan,
        _dropped_scan,
        _scan_of_a_snapshot,
        _transaction,
        _writing_transaction,
        _get,
        _count,
    ],
)
def test_a_reader_that_is_interrupted_anywhere_pins_nothing(read: Callable[[kvwal.Store], None]) -> None:
    step = 0
    interrupted = True
    while interrupted:
        db = _store()
        # A scan of a whole store has a thousand places; every one of the first, and then some.
        for _ in range(200):
            step += 1 if step < 1000 else 7
            interrupted = interrupted_at(step, partial(read, db)) is not None
            assert readers_in(db.pins()) == [], step
            check_store(db)
            if not interrupted:
                break
        db[b"later"] = b"1"
        db.checkpoint()
        assert db.verify().ok
        assert list(db.engine._pages.pins.counts().values()) == [1], step
        db.close()


@pytest.mark.parametrize("way", ["freeze", "install", "combine"])
def test_a_version_that_is_interrupted_as_it_is_replaced_keeps_pages_no_longer_than_its_readers(way: str) -> None:
    """Nor does any count go wrong: that was a flag which an interruption left unset."""
    for step in range(1, 2000):
        db = _store()
        succession, pages = db.engine._succession, db.engine._pages
        snapshot = db.snapshot()
        before = dict(snapshot)
        # Counted, so that what is written from here on is to be looked at by the next count.
        assert len(db) == len(before)
        db[b"000"] = b"newer"
        del db[b"001"]
        replace = succession.freeze
        if way != "freeze":
            succession.freeze()
            del db[b"002"]
            db[b"new"] = b"1"
            replace = partial(succession.install, pages.tree(), done=False) if way == "install" else succession.combine
        interrupted = interrupted_at(step, replace) is not None
        expected = before | {b"000": b"newer"} | ({} if way == "freeze" else {b"new": b"1"})
        for key in [b"001"] if way == "freeze" else [b"001", b"002"]:
            expected.pop(key, None)
        for _ in range(2):
            assert dict(db) == expected, step
            assert len(db) == len(expected), step
            assert dict(snapshot) == before, step
            assert len(snapshot) == len(before), step
            db[b"000"] = b"newer"
            db.checkpoint()
        snapshot.close()
        db[b"000"] = b"newer"
        db.checkpoint()
        assert db.verify().ok, step
        assert pages.pins.counts() == {pages.meta.generation: 1}, step
        check_store(db)
        db.close()
        if not interrupted:
            return
    raise AssertionError("it has no end")


def test_the_last_reader_of_a_former_version_that_is_interrupted_as_it_leaves_pins_nothing() -> None:
    for step in range(1, 400):
        db = _store()
        snapshot = db.snapshot()
        db[b"000"] = b"newer"
        db.checkpoint()
        interrupted = interrupted_at(step, snapshot.close) is not None
        del snapshot
        assert readers_in(db.pins()) == [], step
        assert not db.engine.reads.moments.readers, step
        assert not db.engine.reads.moments._writers, step
        check_store(db)
        for number in range(3):
            db[b"000"] = b"%d" % number
            db.checkpoint()
        assert db.verify().ok, step
        assert list(db.engine._pages.pins.counts().values()) == [1], step
        db.close()
        if not interrupted:
            return
    raise AssertionError("closing has no end")
