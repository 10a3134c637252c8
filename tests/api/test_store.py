"""The store as a user meets it: a mapping, with batches, transactions and views; reading, snapshots, counts, verify."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator, ItemsView, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY, check_store, problems_of, readers_in, run_threads

import kvwal
from kvwal import ClosedError, ConflictError, Store
from kvwal.engine.engine import Engine


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Store]:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as store:
        yield store


LETTERS = {b"a": b"1", b"b": b"2", b"c": b"3"}


# -- a mapping ------------------------------------------------------------------------------------


def test_a_store_is_a_mutable_mapping_and_so_is_a_transaction(db: Store) -> None:
    db.update(LETTERS)
    assert isinstance(db, MutableMapping)
    with db.transaction() as txn, db.snapshot() as snapshot:
        assert isinstance(txn, MutableMapping)
        assert isinstance(snapshot, Mapping)
        for readable in (db, txn, snapshot):
            assert isinstance(readable.keys(), KeysView)
            assert isinstance(readable.values(), ValuesView)
            assert isinstance(readable.items(), ItemsView)
            assert readable.keys() == LETTERS.keys()
            assert readable.items() == LETTERS.items()
            assert dict(readable) == LETTERS
            assert readable.keys() & {b"a", b"z"} == {b"a"}
            assert list(reversed(readable.keys())) == [b"c", b"b", b"a"]
            assert b"2" in readable.values()
            assert (b"a", b"1") in readable.items()
            assert (b"a", b"2") not in readable.items()


def test_missing_keys_raise_key_error_with_the_key(db: Store) -> None:
    for call in (lambda: db[b"x"], lambda: db.__delitem__(b"x"), lambda: db.pop(b"x")):
        with pytest.raises(KeyError) as caught:
            call()
        assert caught.value.args == (b"x",)
    db.delete(b"x")
    assert db.pop(b"x", 7) == 7
    assert db.get(b"x", 7) == 7


def test_popitem_takes_the_largest_in_a_store_and_in_a_transaction(db: Store) -> None:
    db.update(LETTERS)
    with db.transaction() as txn:
        assert txn.popitem() == (b"c", b"3")
    assert db.popitem() == (b"b", b"2")
    assert dict(db) == {b"a": b"1"}
    with db.transaction() as txn:
        txn.clear()
        with pytest.raises(KeyError):
            txn.popitem()


@pytest.mark.parametrize("wrong", ["text", 5, None, 1.5, ["a"], object()])
def test_what_is_not_bytes_is_a_type_error_and_changes_nothing(db: Store, wrong: Any) -> None:
    db[b"a"] = b"1"
    calls: list[Any] = [
        lambda: db.get(wrong),
        lambda: db[wrong],
        lambda: db.put(wrong, b""),
        lambda: db.put(b"k", wrong),
        lambda: db.delete(wrong),
        lambda: db.__delitem__(wrong),
        lambda: db.pop(wrong),
        lambda: db.update({b"k": b"", wrong: b""} if getattr(wrong, "__hash__", None) else [(wrong, b"")]),
        lambda: db.update([(b"k", b""), (b"l", wrong)]),
        lambda: db.get_many([b"a", wrong]),
        lambda: db.setdefault(b"k", wrong),
    ]
    if wrong is not None:
        calls += [lambda: db.scan(wrong), lambda: db.scan(prefix=wrong), lambda: db.delete_range(wrong)]
    for number, call in enumerate(calls):
        with pytest.raises(TypeError):
            pytest.fail(f"call {number} gave {call()!r}")
    assert dict(db) == {b"a": b"1"}


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_like_goes_in_and_bytes_come_out(db: Store, kind: Any) -> None:
    db[kind(b"k")] = kind(b"v")
    assert type(db[kind(b"k")]) is bytes
    assert all(type(part) is bytes for pair in db.items() for part in pair)
    assert db.get_many([kind(b"k"), b"x"]) == [b"v", None]
    assert kind(b"k") in db
    assert list(db.scan(prefix=kind(b"k"))) == [(b"k", b"v")]


def test_the_callers_buffer_may_change_after_the_call(db: Store) -> None:
    key, value = bytearray(b"k"), bytearray(b"v")
    db.put(key, value)
    key[:], value[:] = b"x", b"x"
    assert dict(db) == {b"k": b"v"}


def test_a_subclass_of_bytes_is_stored_as_bytes(db: Store) -> None:
    class Shouting(bytes):
        def __hash__(self) -> int:
            return 7

        def __eq__(self, other: object) -> bool:
            return True

    db[b"a"] = b"1"
    db[b"k"] = Shouting(b"v")
    assert type(db[b"k"]) is bytes
    assert db.get(Shouting(b"k")) == b"v"


def test_a_generator_that_fails_leaves_nothing_of_an_update(db: Store) -> None:
    def pairs() -> Iterator[tuple[bytes, bytes]]:
        yield b"a", b"1"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        db.update(pairs())
    assert db.last_seqno == 0


def test_an_empty_batch_commits_nothing(db: Store) -> None:
    with db.batch():
        pass
    db.update({})
    assert db.last_seqno == 0
    assert db.delete_range(b"b", b"a") == 0


def test_run_tries_again_and_gives_up_where_it_was_told(db: Store) -> None:
    tried = 0

    def collide(txn: kvwal.Transaction) -> int:
        nonlocal tried
        tried += 1
        txn.get(b"n")
        if tried < 3:
            db.put(b"n", b"%d" % tried)
        txn[b"done"] = b""
        return tried

    assert db.run(collide) == 3
    tried = -100
    with pytest.raises(ConflictError):
        db.run(collide, attempts=5)
    assert tried == -95
    with pytest.raises(ValueError, match="attempts"):
        db.run(collide, attempts=0)


@pytest.mark.filterwarnings("error")
def test_run_and_transactional_refuse_a_function_that_only_tasks_can_run(db: Store) -> None:
    async def later(txn: kvwal.Transaction) -> None:
        txn[b"n"] = b"1"

    async def by_parts(txn: kvwal.Transaction) -> AsyncIterator[None]:
        txn[b"n"] = b"1"
        yield

    def writes_first(txn: kvwal.Transaction) -> object:
        txn[b"n"] = b"1"
        return later(txn)

    for function in (later, by_parts, writes_first):
        with pytest.raises(TypeError, match=r"use kvwal\.aio"):
            db.run(function)
        with pytest.raises(TypeError, match=r"use kvwal\.aio"):
            db.transactional(function)()
    assert db.last_seqno == 0
    assert db.run(lambda txn: [*(key for key in txn)]) == []


def test_a_transaction_is_over_after_commit_abort_and_conflict(db: Store) -> None:
    for end in ("commit", "abort", "conflict"):
        txn = db.transaction()
        txn.get(b"n")
        txn[b"k"] = b""
        if end == "conflict":
            db[b"n"] = b""
            with pytest.raises(ConflictError):
                txn.commit()
        else:
            getattr(txn, end)()
        txn.abort()
        assert not txn.is_open
        for call in (lambda: txn.get(b"k"), lambda: txn.put(b"k", b""), lambda: txn.commit(), lambda: list(txn)):
            with pytest.raises(ClosedError):
                call()
    assert readers_in(db.pins()) == []
    check_store(db)


# -- moments --------------------------------------------------------------------------------------


def test_a_scan_is_of_the_moment_of_the_call_not_of_its_first_step(db: Store) -> None:
    db.update(LETTERS)
    scan, keys = db.scan(), db.keys()
    db.clear()
    assert dict(scan) == LETTERS
    assert list(keys) == [], "a view reads afresh each time it is iterated"


def test_a_snapshot_outlives_checkpoints_and_an_iterator_its_snapshot(db: Store) -> None:
    model = {b"%04d" % number: b"v" * 50 for number in range(2000)}
    db.update(model)
    with db.snapshot() as snapshot:
        iterator = snapshot.scan()
        for round_number in range(4):
            db.clear()
            db.update({b"%04d" % number: b"%d" % round_number for number in range(3000)})
            db.checkpoint()
        assert dict(snapshot) == model
    with pytest.raises(ClosedError):
        snapshot[b"0001"]
    assert dict(iterator) == model
    assert readers_in(db.pins()) == []
    assert problems_of(db) == []


def test_what_a_close_comes_before_says_that_the_store_is_closed(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a call that had looked before whether it is open: where the log has ended, and where all has."""

    def refused() -> None:
        for use in (checkpointer.checkpoint, lambda: checkpointer.compact(passes=1), db.sync, lambda: db[b"c"]):
            with pytest.raises(ClosedError, match=r"^the store is closed; open it again$"):
                use()

    def let_go(engine: Engine) -> None:
        for use in (db.checkpoint, db.compact):
            with pytest.raises(ClosedError, match=r"^the store is closed; open it again$"):
                use()
        let_go_of_all(engine)

    let_go_of_all = Engine._let_go_when_idle
    checkpointer: Any = db.engine._checkpointer
    db.update(LETTERS)
    db.checkpoint()
    db[b"a"] = b"4"
    monkeypatch.setattr(Engine, "_let_go_when_idle", let_go)
    db.close()
    refused()


def test_a_snapshot_closed_by_another_thread_says_so_and_never_gives_a_wrong_value(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", **TINY) as db:
        over = threading.Event()

        def write() -> None:
            try:
                for number in range(1500):
                    db.update({b"a": b"%d" % number, b"b": b"%d" % number})
            finally:
                over.set()

        def read() -> None:
            while not over.is_set():
                snapshot = db.snapshot()
                closer = threading.Thread(target=snapshot.close)
                closer.start()
                try:
                    first, second = snapshot.get(b"a"), snapshot.get(b"b")
                    pairs = dict(snapshot.scan())
                except ClosedError:
                    pass
                else:
                    assert first == second
                    assert pairs.get(b"a") == pairs.get(b"b") == first
                closer.join()

        run_threads(write, read, read)
        assert readers_in(db.pins()) == []


# -- counts ---------------------------------------------------------------------------------------


def test_counts_are_right_under_masks_frozen_tables_and_snapshots(db: Store) -> None:
    """Three levels, each with puts, deletes and ranges, and a snapshot of each state."""
    model: dict[bytes, bytes] = {}
    held = []

    def put(first: int, stop: int) -> None:
        pairs = {b"%04d" % number: b"v" for number in range(first, stop)}
        db.update(pairs)
        model.update(pairs)

    def remove(first: int, stop: int) -> None:
        db.delete_range(b"%04d" % first, b"%04d" % stop)
        for key in [k for k in model if b"%04d" % first <= k < b"%04d" % stop]:
            del model[key]

    def look() -> None:
        assert len(db) == len(model)
        assert len(db.keys(b"0100", b"0300")) == sum(b"0100" <= key < b"0300" for key in model)
        held.append((db.snapshot(), len(model)))
        for snapshot, count in held:
            assert len(snapshot) == count

    put(0, 500)
    look()
    db.checkpoint()
    look()
    remove(100, 200)
    put(150, 160)
    look()
    db.engine._succession.freeze()
    look()
    remove(90, 155)
    remove(300, 350)
    put(310, 320)
    db.delete(b"0400")
    model.pop(b"0400")
    look()
    remove(120, 330)
    put(125, 126)
    look()
    db.checkpoint()
    look()
    remove(0, 10_000)
    look()
    put(7, 9)
    look()


def test_len_is_right_at_some_moment_while_others_write(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", **TINY) as db:
        over = threading.Event()

        def write() -> None:
            try:
                for number in range(2000):
                    db[b"%06d" % number] = b"v" * 50
            finally:
                over.set()

        def count() -> None:
            last = 0
            while not over.is_set():
                now = len(db)
                assert now >= last
                last = now

        run_threads(write, count)
        assert len(db) == 2000


# -- verify ---------------------------------------------------------------------------------------


def test_verify_finds_nothing_wrong_while_others_write(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", **TINY) as db:
        over = threading.Event()

        def write() -> None:
            try:
                for number in range(1500):
                    db[b"%06d" % (number % 300)] = b"v" * 100
            finally:
                over.set()

        def verify() -> None:
            rounds = 0
            while not over.is_set() or not rounds:
                assert problems_of(db) == []
                rounds += 1

        run_threads(write, verify)


def test_verify_names_the_file_of_a_flipped_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, durability="os", background=False) as db:
        db.update({b"%04d" % number: b"v" * 100 for number in range(2000)})
        db.checkpoint()
        data = path / "data"
        raw = bytearray(data.read_bytes())
        at = raw.index(b"v" * 100, len(raw) // 2)
        raw[at] ^= 1
        data.write_bytes(raw)
        report = db.verify()
        assert not report.ok
        assert any(found.file == "data" and found.offset is not None for found in report.problems)
        raw[at] ^= 1
        data.write_bytes(raw)
        assert db.verify().ok


def test_an_iterator_of_history_keeps_its_log_while_it_is_used(tmp_path: Path) -> None:
    # Three checkpoints under it ended in FileNotFoundError.
    options: Any = {"durability": "os", "background": False, "segment_bytes": 16 << 10, "keep_history_bytes": 0}
    with kvwal.open(tmp_path / "a.kv", **options) as db:
        for number in range(60):
            db[b"%d" % number] = b"x" * 1000
        records = db.history()
        first = next(records).seqno
        for number in range(60):
            db[b"%d" % number] = b"y" * 1000
            if number % 20 == 0:
                db.checkpoint()
        segments = db.stats().log_segments
        assert [record.seqno for record in records] == list(range(first + 1, 61))
        db.checkpoint()
        assert db.stats().log_segments < segments
        with pytest.raises(kvwal.FeedGap) as gap:
            db.history(0)
        assert gap.value.oldest == next(db.history()).seqno > 1
        assert gap.value.lost_commits == gap.value.oldest - 1
        for wrong in (-1, 1.5, "1"):
            with pytest.raises((TypeError, ValueError)):
                db.history(wrong)  # type: ignore[arg-type]  # that is what is refused


def test_history_lists_what_was_committed(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False, keep_history_bytes=1 << 30) as db:
        db[b"a"] = b"1"
        with db.batch() as batch:
            batch.delete_range(b"a", b"b")
            batch.put(b"c", b"2")
        db.checkpoint()
        db.delete(b"c")
        assert [record.seqno for record in db.history()] == [1, 2, 3]
        assert [record.seqno for record in db.history(after=2)] == [3]
        second = list(db.history())[1].batch()
        assert (second.ranges, second.writes) == ([(b"a", b"b")], {b"c": b"2"})


def test_any_integer_is_a_limit(db: kvwal.Store) -> None:
    users = db.table("users", str, int)
    db.update({b"a": b"1", b"b": b"2"})
    users.update({"a": 1, "b": 2})
    for limit in (sys.maxsize, sys.maxsize + 1, 1 << 80):
        with db.snapshot() as snapshot, db.transaction() as txn:
            for each in (db, snapshot, txn):
                assert list(each.scan(limit=limit)) == list(each.items(limit=limit)) == [(b"a", b"1"), (b"b", b"2")]
                assert list(each.keys(reverse=True, limit=limit)) == [b"b", b"a"]
                assert len(each.values(limit=limit)) == 2
        assert dict(users.items(limit=limit)) == {"a": 1, "b": 2}
        assert len(list(db.versions(b"a", limit=limit))) == 1
    with pytest.raises(ValueError, match="limit is -1"):
        db.scan(limit=-1)
