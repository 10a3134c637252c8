"""The row cache: a row, where there is one, is the newest value, whatever was deleted, set aside or dropped."""

from __future__ import annotations

from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import check_store, run_threads

import kvwal
from kvwal.batch import WriteBatch
from kvwal.engine import row_cache
from kvwal.engine.memtable import Memtable
from kvwal.engine.row_cache import Row, RowCache
from kvwal.engine.value import MISSING
from kvwal.keys import KeyRange, Seqno
from kvwal.pages import Tree
from kvwal.testing import SimulatedDisk

KEYS = [b"%02d" % number for number in range(12)]


def opened(**options: Any) -> kvwal.Store:
    options = {"background": False, "durability": "os", **options}
    return kvwal.open("/kv", files=SimulatedDisk(), **options)


class Model:
    """Rows over a memtable, in the order in which the state changes them, and the newest values."""

    def __init__(self, random: Random, budget: int) -> None:
        self.random = random
        self.page_bytes: list[int] = []
        self.cache = RowCache(budget, self.page_bytes.append)
        self.memtable = Memtable(Seqno(0))
        self.budget = budget
        self.seqno = 0
        self.data: dict[bytes, bytes] = {}

    def value(self) -> bytes:
        return b"%d" % self.seqno + b"x" * self.random.choice([0, 1, 200])

    def commit(self) -> None:
        self.seqno += 1
        batch = WriteBatch()
        for _ in range(self.random.randrange(3)):
            low, high = self.random.choice(KEYS), self.random.choice([None, *KEYS])
            batch.delete_range(low, high)
        for _ in range(self.random.randrange(3)):
            batch.writes[self.random.choice(KEYS)] = self.random.choice([None, self.value()])
        size = sum(len(key) + len(value or b"") for key, value in batch.writes.items())
        for _ in range(self.random.choice([1, 1, 2])):
            # Publishing again after an interruption is harmless.
            if batch.ranges:
                self.cache.replace_all(batch.writes)
            else:
                self.cache.rows.update(batch.writes)
            self.memtable.write(Seqno(self.seqno), batch.writes, size, batch.ranges)
        self.cache.bytes_used += size
        if self.cache.bytes_used > self.cache.budget:
            self.cache.shrink()
        for bounds in batch.ranges:
            self.data = {key: value for key, value in self.data.items() if not bounds.contains(key)}
        for key, value in batch.writes.items():
            if value is None:
                self.data.pop(key, None)
            else:
                self.data[key] = value

    def read(self) -> None:
        key = self.random.choice(KEYS)
        found = self.cache.recall(key, key, self.memtable)
        if found is MISSING:
            self.cache.remember(key, key, self.data.get(key))
        else:
            assert found == self.data.get(key), key

    def freeze(self) -> None:
        self.cache.drop_aside()
        self.memtable = Memtable(Seqno(self.seqno))

    def check(self) -> None:
        for key, row in self.cache.rows.items():
            assert row == self.data.get(key), key
        for key in KEYS:
            aside = dict(self.cache.rows)
            found = self.cache.recall(key, key, self.memtable)
            assert found is MISSING or found == self.data.get(key), key
            # Looking must not change what the next step meets.
            self.cache.rows.clear()
            self.cache.rows.update(aside)
        assert self.cache.bytes_used >= 0
        assert self.page_bytes[-1] + self.cache.budget == self.budget


@pytest.mark.parametrize("budget", [1 << 20, 8 << 10])
@given(st.randoms(use_true_random=False))
def test_a_row_is_the_newest_value_whatever_happens(budget: int, random: Random) -> None:
    model = Model(random, budget)
    with patch.object(row_cache, "_MOVED_ROWS", random.choice([1, 3, 1000])):
        for _ in range(random.randrange(30)):
            kind = random.randrange(8)
            if kind < 4:
                model.commit()
            elif kind < 7:
                model.read()
            elif not random.randrange(3):
                model.freeze()
            model.check()


def test_rows_stay_within_their_budget_while_ranges_are_deleted() -> None:
    """What is set aside counts until it is dropped, and is dropped before rows are."""
    with opened(cache_bytes=256 << 10) as db:
        for number in range(3000):
            db.put(b"%06d" % number, b"x" * 100)
            if number % 7 == 0:
                db.delete_range(b"z", b"zz")
        cache = db.engine.state.cache
        rows = len(cache.rows) + sum(map(len, cache._aside))
        # Each takes at least 250 bytes with its overhead.
        assert rows * 250 <= 2 * cache.budget
        check_store(db)


def test_a_row_that_was_set_aside_comes_back_without_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as db:
        db.update(dict.fromkeys(KEYS, b"value"))
        db.checkpoint()
        for key in KEYS:
            assert db[key] == b"value"
        db.delete_range(b"x", b"y")
        read: list[bytes] = []
        monkeypatch.setattr(Tree, "get", lambda self, key: read.append(key))
        for key in KEYS:
            assert db[key] == b"value"
        assert read == []


def test_a_deleted_range_costs_the_same_however_many_rows_there_are() -> None:
    """The rows are set aside as they are: none of them is looked at, and none copied."""
    cache = RowCache(1 << 30, lambda _: None)
    made: list[dict[Row, bytes | None]] = []
    for _ in range(12):
        cache.rows = {b"%08d" % number: b"" for number in range(10_000)}
        made.insert(0, cache.rows)
        cache.replace_all({b"k": b""})
        assert cache.rows == {b"k": b""}
        assert all(one is other for one, other in zip(cache._aside, made, strict=False))
        # What are few are added to those before.
        cache.replace_all({})
        assert len(cache._aside) == min(len(made), 8)
        assert cache._aside[0] is made[0]
        assert len(made[0]) == 10_001
    cache.bytes_used = 90_009
    cache.rows = {b"%08d" % number: b"" for number in range(10_000)}
    cache.replace_all({})
    # The oldest were dropped.
    assert cache.bytes_used == 90_009 * 80_007 // 90_008


def test_of_rows_that_were_set_aside_the_newest_counts() -> None:
    memtable = Memtable(Seqno(0))
    cache = RowCache(1 << 30, lambda _: None)
    many: dict[Row, bytes | None] = {b"%08d" % number: b"" for number in range(1000)}
    for value in (b"1", None, b"3"):
        cache.rows = {**many, b"k": value}
        cache.replace_all({})
        assert cache.recall(b"k", b"k", memtable) == value
        cache.rows = {}
    assert len(cache._aside) == 3


def test_a_get_that_meets_a_deleted_range_keeps_nothing_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The range is deleted while the page is being read: the value is not kept as a row."""
    with opened() as db:
        db.update(dict.fromkeys(KEYS, b"old"))
        db.checkpoint()
        db.engine.state.cache.clear()
        get = Tree.get

        def slow(self: Tree, key: bytes) -> bytes | None:
            found = get(self, key)
            monkeypatch.undo()
            db.delete_range(b"03", b"06")
            return found

        monkeypatch.setattr(Tree, "get", slow)
        # The answer was right when the call began.
        assert db.get(b"04") in (b"old", None)
        assert db.get(b"04") is None
        check_store(db)


def test_a_get_that_meets_a_put_keeps_nothing_old(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as db:
        db.update(dict.fromkeys(KEYS, b"old"))
        db.checkpoint()
        db.engine.state.cache.clear()
        get = Tree.get

        def slow(self: Tree, key: bytes) -> bytes | None:
            found = get(self, key)
            monkeypatch.undo()
            db.put(b"04", b"new")
            db.checkpoint()
            return found

        monkeypatch.setattr(Tree, "get", slow)
        assert db.get(b"04") in (b"old", b"new")
        assert db.get(b"04") == b"new"
        check_store(db)


@settings(max_examples=20)
@given(st.randoms(use_true_random=False))
def test_rows_of_a_small_cache_are_right_beside_large_values(random: Random) -> None:
    """With a handful of rows at a time, each step drops, sets aside or brings back some of them."""
    with opened(cache_bytes=256 << 10) as db:
        data: dict[bytes, bytes] = {}
        for number in range(60):
            kind = random.randrange(6)
            key = random.choice(KEYS)
            if kind < 2:
                db[key] = data[key] = b"%d" % number + b"x" * random.choice([10, 10_000, 30_000])
            elif kind == 2:
                bounds = KeyRange(key, random.choice(KEYS))
                db.delete_range(*bounds)
                data = {k: v for k, v in data.items() if not bounds.contains(k)}
            elif kind == 3 and not random.randrange(3):
                db.checkpoint()
            else:
                for key in KEYS:
                    assert db.get(key) == data.get(key)
        check_store(db)


def test_threads_that_read_while_ranges_are_deleted_never_see_a_value_come_back(rng: Random) -> None:
    """Each range delete is followed by puts with the next number: what a reader sees of a key only grows."""
    with opened(background=True, memtable_bytes=64 << 10) as db:
        db.update(dict.fromkeys(KEYS, b"%08d" % 0))
        over: list[int] = []

        def write() -> None:
            for number in range(1, 400):
                db.delete_range(KEYS[number % 12], None)
                db.update(dict.fromkeys(KEYS[number % 12 :], b"%08d" % number))
                if number % 100 == 0:
                    db.checkpoint()
            over.append(1)

        def read() -> None:
            last = dict.fromkeys(KEYS, b"")
            while not over:
                for key in KEYS:
                    value = db.get(key)
                    if value is not None:
                        assert value >= last[key]
                        last[key] = value

        run_threads(write, read, read)
        check_store(db)
