"""Readers come and go: what they pin is given back, also when they are interrupted anywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from store_fixtures import check_store, interrupted_at

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


@pytest.mark.interruptions
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
            interrupted = interrupted_at(step, lambda db=db: read(db)) is not None
            assert db.pins() == [], step
            check_store(db)
            if not interrupted:
                break
        db[b"later"] = b"1"
        db.checkpoint()
        assert db.verify().ok
        assert list(db._pages.pinned().values()) == [1], step
        db.close()


@pytest.mark.interruptions
def test_a_reader_of_former_levels_that_is_interrupted_as_it_leaves_pins_no_moment() -> None:
    """It is the last reader of its generation. (In a few places its pages may stay until the store is opened again.)"""
    for step in range(1, 400):
        db = _store()
        snapshot = db.snapshot()
        db[b"000"] = b"newer"
        db.checkpoint()
        interrupted = interrupted_at(step, snapshot.close) is not None
        del snapshot
        assert db.pins() == [], step
        present = db._present
        assert not present._registry, step
        for number in range(3):
            db[b"000"] = b"%d" % number
            db.checkpoint()
        assert db.verify().ok, step
        db.close()
        if not interrupted:
            return
    raise AssertionError("closing has no end")
