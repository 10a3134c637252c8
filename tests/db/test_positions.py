"""Ranks, the n-th key, counts of ranges and cursors, against a sorted list."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from store_fixtures import check_store, run_threads

import kvwal
from kvwal.testing import SimulatedDisk

KEYS = [b"", b"a", b"a\0", b"aa", b"ab", b"b", b"b\xff", b"b\xff\xff", b"c", b"\xff", b"\xff\xff"]


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as store:
        yield store
        check_store(store)


def change(db: Any, rng: Random, model: dict[bytes, bytes], keys: list[bytes]) -> None:
    key, other = rng.choice(keys), rng.choice([*keys, None])
    kind = rng.random()
    if kind < 0.6:
        model[key] = b"%d" % rng.randrange(1000)
        db.put(key, model[key])
    elif kind < 0.85:
        model.pop(key, None)
        db.delete(key)
    elif kind < 0.9:
        db.delete_range(key, other)
        for name in [name for name in model if key <= name and (other is None or name < other)]:
            del model[name]


def check_positions(source: Any, model: dict[bytes, bytes], keys: list[bytes], rng: Random) -> None:
    order = sorted(model)
    assert source.count() == len(order)
    for n in {rng.randrange(-len(order) - 2, len(order) + 2) for _ in range(4)} | {0, -1}:
        if -len(order) <= n < len(order):
            assert source.key_at(n) == order[n]
        else:
            with pytest.raises(IndexError):
                source.key_at(n)
    key, other = rng.choice(keys), rng.choice(keys)
    assert source.rank(key) == bisect_left(order, key)
    for bounds, named in (((key, other), {}), ((None, key), {}), ((key,), {}), ((), {"prefix": key})):
        within = list(source.keys(*bounds, **named))
        assert source.count(*bounds, **named) == len(within)
        for n in (0, -1, len(within) // 2, len(within), -len(within) - 1):
            if -len(within) <= n < len(within):
                assert source.key_at(n, *bounds, **named) == within[n]
            else:
                with pytest.raises(IndexError, match=f"of {len(within)}"):
                    source.key_at(n, *bounds, **named)


def check_cursor(source: Any, model: dict[bytes, bytes], keys: list[bytes], rng: Random) -> None:
    order = sorted(model)
    # From -1, before the first one, to len, behind the last one.
    at = -1
    with source.cursor() as cursor:
        for _ in range(30):
            move = rng.choice(["first", "last", "seek", "seek_last", "next", "next", "next", "prev", "prev", "prev"])
            if move in ("seek", "seek_last"):
                key = rng.choice(keys)
                there = getattr(cursor, move)(key)
                at = bisect_left(order, key) if move == "seek" else bisect_right(order, key) - 1
            else:
                there = getattr(cursor, move)()
                places = {"first": 0, "last": len(order) - 1, "next": min(at + 1, len(order)), "prev": max(at - 1, -1)}
                at = places[move]
                if move == "first" and not order:
                    at = len(order)
            assert there == (0 <= at < len(order)), move
            assert cursor.pair == ((order[at], model[order[at]]) if there else None)
            if there:
                assert (cursor.key, cursor.value) == cursor.pair
            else:
                with pytest.raises(LookupError):
                    _ = cursor.key
            if move in ("last", "seek_last") and not there:
                at = -1
        cursor.first()
        assert list(cursor) == [(key, model[key]) for key in order]
        assert cursor.pair is None
        assert cursor.prev() == bool(order)


@pytest.mark.parametrize("number", range(6))
def test_positions_are_those_of_a_sorted_list(db: kvwal.Store, number: int) -> None:
    rng = Random(number)
    keys = KEYS if number % 2 else [b"%03d" % i for i in range(300)]
    model: dict[bytes, bytes] = {}
    kept: list[tuple[Any, dict[bytes, bytes]]] = []
    moments: list[tuple[int, dict[bytes, bytes]]] = []
    for step in range(300):
        for _ in range(1 if number % 2 else rng.randrange(1, 8)):
            change(db, rng, model, keys)
        if step % 7 == 0:
            check_positions(db, model, keys, rng)
            check_cursor(db, model, keys, rng)
        if step % 40 == 0:
            moments.append((db.last_seqno, dict(model)))
            if len(kept) < 3:
                kept.append((db.snapshot(), dict(model)))
            else:
                kept.pop(0)[0].close()
        for snapshot, then in kept:
            if rng.random() < 0.1:
                check_positions(snapshot, then, keys, rng)
                check_cursor(snapshot, then, keys, rng)
        if rng.random() < 0.03:
            frozen = db.engine.state.version.frozen is not None
            rng.choice([db.checkpoint, db.checkpoint if frozen else db.engine._succession.freeze])()
        if step % 50 == 0:
            with db.transaction() as txn:
                mine = dict(model)
                for _ in range(5):
                    change(txn, rng, mine, keys)
                check_positions(txn, mine, keys, rng)
                check_cursor(txn, mine, keys, rng)
                txn.abort()
    for snapshot, _ in kept:
        snapshot.close()
    for seqno, then in moments:
        with db.snapshot(at=seqno) as past:
            check_positions(past, then, keys, rng)
            check_cursor(past, then, keys, rng)


def test_positions_in_tables(db: kvwal.Store) -> None:
    numbers = db.table("numbers", int, str)
    assert numbers.count() == numbers.rank(5) == 0
    with pytest.raises(IndexError):
        numbers.key_at(0)
    assert not numbers.cursor().first()
    numbers.update((i, str(i)) for i in range(0, 2000, 2))
    db.checkpoint()
    numbers.update((i, str(i)) for i in range(1, 200, 2))
    numbers.delete_range(50, 60)
    order = [*range(50), *range(60, 200), *range(200, 2000, 2)]
    assert [numbers.key_at(n) for n in range(len(order))] == order
    assert [numbers.rank(key) for key in order] == list(range(len(order)))
    assert numbers.key_at(-1, 0, 100) == 99
    assert numbers.count(50, 61) == 1
    with db.transaction() as txn:
        mine = numbers.within(txn)
        mine[55] = "x"
        assert mine.key_at(50) == 55
        assert mine.rank(60) == 51
    with db.snapshot() as now:
        assert numbers.within(now).key_at(50) == 55
    with numbers.cursor() as cursor:
        assert cursor.seek(51)
        assert cursor.pair == (55, "x")
        assert cursor.prev()
        assert cursor.key == 49
    orders = db.table("orders", tuple[str, int], str)
    orders.update({("a", 1): "x", ("a", 2): "y", ("b", 1): "z"})
    assert orders.key_at(-1, prefix="a") == ("a", 2)
    assert orders.count(prefix=("b",)) == 1
    cursor = orders.cursor()
    assert cursor.seek(("a", 2))
    assert cursor.next()
    assert cursor.key == ("b", 1)


def test_counting_is_reading(db: kvwal.Store) -> None:
    db.update({b"a": b"1", b"c": b"1"})
    txn = db.transaction()
    assert txn.key_at(1) == b"c"
    txn[b"x"] = b"1"
    db[b"b"] = b"1"
    with pytest.raises(kvwal.ConflictError):
        txn.commit()


def test_a_cursor_holds_a_moment_only_while_it_goes_on(db: kvwal.Store) -> None:
    db.update({b"%04d" % i: bytes(100) for i in range(2000)})
    db.checkpoint()
    cursor = db.cursor()
    cursor.seek(b"0500")
    cursor.next()
    assert [pin.purpose for pin in db.pins() if pin.thread_name] == ["scan"]
    db[b"0502"] = b"new"
    cursor.next()
    assert cursor.value == bytes(100), "of the moment at which it was placed"
    cursor.seek(cursor.key)
    assert cursor.value == b"new"
    cursor.close()
    assert [pin for pin in db.pins() if pin.thread_name] == []
    assert cursor.pair is None
    assert cursor.first()
    assert repr(cursor) == "<kvwal.Cursor at b'0000'>"
    cursor.close()
    assert repr(cursor) == "<kvwal.Cursor at no key>"


def test_positions_while_threads_write(db: kvwal.Store) -> None:
    fixed = [b"%05d" % i for i in range(0, 3000, 3)]
    db.update(dict.fromkeys(fixed, b"x"))
    db.checkpoint()

    def write(number: int) -> None:
        rng = Random(number)
        for _ in range(300):
            key = b"%05d" % (3 * rng.randrange(1000) + 1 + number)
            if rng.random() < 0.6:
                db[key] = b"y"
            else:
                db.delete(key)

    def ask() -> None:
        rng = Random(7)
        for _ in range(40):
            with db.snapshot() as snapshot:
                n = rng.randrange(1000)
                key = snapshot.key_at(n)
                assert snapshot.rank(key) == n
            # Of one moment; the keys that stay bound it.
            assert fixed[n // 3] <= db.key_at(n) <= fixed[n]

    run_threads(lambda: write(0), lambda: write(1), ask)
