"""The state: what readers pin is given back, and a commit is published once, also when interrupted anywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from engine_fakes import FakeTree, make
from store_fixtures import check_store, interrupted_at

import kvwal
from kvwal.batch import WriteBatch
from kvwal.engine.occ import Reads
from kvwal.engine.readers import Reader
from kvwal.engine.state import State
from kvwal.keys import Seqno
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
            assert db.pins() == [], step
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
        state, pages = db.engine.state, db.engine._pages
        snapshot = db.snapshot()
        before = dict(snapshot)
        # Counted, so that what is written from here on is to be looked at by the next count.
        assert len(db) == len(before)
        db[b"000"] = b"newer"
        del db[b"001"]
        replace = state.freeze
        if way != "freeze":
            state.freeze()
            del db[b"002"]
            db[b"new"] = b"1"
            replace = partial(state.install, pages.tree(), done=False) if way == "install" else state.combine
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
        assert db.pins() == [], step
        state = db.engine.state
        assert not state.readers, step
        assert not state.writers, step
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


# -- publishing -----------------------------------------------------------------------------------


def _batch(*keys: bytes, value: bytes, clear: bool = False) -> WriteBatch:
    batch = WriteBatch()
    if clear:
        batch.delete_range(b"b", b"d")
    for key in keys:
        batch.put(key, value)
    return batch


def _publish(state: State) -> None:
    batch = _batch(b"a", b"c", value=b"2")
    batch.delete(b"b")
    state.publish(Seqno(3), batch, 10)


def _publish_range(state: State) -> None:
    state.publish(Seqno(3), _batch(b"a", b"c", value=b"2", clear=True), 10)


def _publish_put(state: State) -> None:
    state.publish_put(Seqno(3), b"a", b"2", 222)


def _publish_puts(state: State) -> None:
    state.publish_puts(Seqno(5), [b"a", b"c", b"a"], [b"x", b"2", b"2"], 666)


PUBLISHING = [_publish, _publish_range, _publish_put, _publish_puts]


def _published(kind: str, *, small: bool = False) -> tuple[State, Reader | None]:
    """A state with two commits, and a reader of it."""
    _, _, state = make()
    if small:
        state.cache.budget = state.cache._budget_bytes = 0
        state.memtable_bytes = 0
    state.publish(Seqno(1), _batch(b"a", b"b", b"old", value=b"1"), 10)
    if kind == "after a range":
        state.publish(Seqno(2), _batch(b"b", value=b"1", clear=True), 10)
    else:
        state.publish_put(Seqno(2), b"b", b"1", 222)
    reader = None if kind == "alone" else state.reader("test", 0, writer=True)
    return state, reader


def _content(state: State) -> dict[bytes, bytes | None]:
    return {key: state.read(key) for key in (b"a", b"b", b"c", b"old")}


@pytest.mark.parametrize("small", [False, True], ids=["with room", "beyond its budget"])
@pytest.mark.parametrize("kind", ["alone", "watched", "after a range"])
@pytest.mark.parametrize("publish", PUBLISHING)
def test_a_commit_that_is_interrupted_anywhere_and_published_again_is_published_once(
    publish: Callable[[State], None], kind: str, small: bool
) -> None:
    once, _ = _published(kind)
    before = _content(once)
    publish(once)
    wanted = _content(once)
    assert wanted != before
    for step in range(1, 1000):
        state, reader = _published(kind, small=small)
        interrupted = interrupted_at(step, partial(publish, state)) is not None
        assert not state.lock._is_owned(), step
        if interrupted:
            publish(state)
        assert _content(state) == wanted, step
        assert state.seqno == state.horizon == state.version.memtable.last_seqno == once.seqno, step
        state.version.memtable._check()
        for key, row in state.cache.rows.items():
            assert row == wanted[key], step
        if reader is not None:
            assert {key: state.read_at(reader, key) for key in before} == before, step
            for key in (b"a", b"c", b"old"):
                changed = wanted[key] != before[key]
                assert (state.history.conflict(Reads(Seqno(2), {key}, ())) is not None) == changed, (step, key)
        if not interrupted:
            return
    raise AssertionError("publishing has no end")


@pytest.mark.parametrize("kind", ["alone", "watched", "after a range"])
@pytest.mark.parametrize("publish", PUBLISHING)
def test_a_reader_that_comes_while_an_interrupted_commit_is_half_published_keeps_its_moment(
    publish: Callable[[State], None], kind: str
) -> None:
    """Another thread may register between the interruption and the second time: the lock is free then."""
    for step in range(1, 1000):
        state, _reader = _published(kind)
        before = _content(state)
        interrupted = interrupted_at(step, partial(publish, state)) is not None
        late = state.reader("late", 0)
        if interrupted:
            publish(state)
        wanted = before if late.seqno == 2 else _content(state)
        assert {key: state.read_at(late, key) for key in before} == wanted, (step, late.seqno)
        if not interrupted:
            return
    raise AssertionError("publishing has no end")


@pytest.mark.parametrize("kind", ["alone", "watched", "after a range"])
def test_puts_that_are_published_together_leave_what_they_leave_one_by_one(kind: str) -> None:
    (together, reader), (single, other) = _published(kind), _published(kind)
    keys, values = [b"a", b"c", b"a", b"d"], [b"x", b"2", b"2", b"3"]
    together.publish_puts(Seqno(6), keys, values, 4 * 222)
    for seqno, (key, value) in enumerate(zip(keys, values, strict=True), 3):
        single.publish_put(Seqno(seqno), key, value, 222)
    assert _content(together) == _content(single)
    tables = together.version.memtable, single.version.memtable
    assert tables[0].latest == tables[1].latest
    assert tables[0].older._by_key == tables[1].older._by_key
    assert tables[0]._written_at == tables[1]._written_at
    assert tables[0].bytes_used == tables[1].bytes_used
    assert together.cache.rows == single.cache.rows
    assert together.cache.bytes_used == single.cache.bytes_used
    if reader is not None and other is not None:
        for since in range(2, 7):
            for key in (b"a", b"b", b"c", b"d"):
                found, wanted = (state.history.conflict(Reads(Seqno(since), {key}, ())) for state in (together, single))
                assert (found and found.seqno) == (wanted and wanted.seqno)


def test_a_value_that_a_read_brings_from_the_tree_does_not_replace_a_newer_one() -> None:
    """A commit may touch the key, or a range that holds it, while the tree is read."""
    for clear in (False, True):
        _, _, state = make()

        class Tree(FakeTree):
            def get(self, key: bytes, state: State = state, clear: bool = clear) -> bytes | None:
                state.publish(Seqno(1), _batch(*(() if clear else (b"c",)), value=b"new", clear=clear), 4)
                return b"old"

        state.version.tree = Tree()  # type: ignore[assignment]
        assert state.read(b"c") == b"old", "it was the newest as the call began"
        state.version.tree = FakeTree()  # type: ignore[assignment]
        assert state.read(b"c") == (None if clear else b"new")
