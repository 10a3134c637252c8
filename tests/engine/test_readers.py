"""Registered readers, and what a memtable keeps because of them."""

from __future__ import annotations

import gc
from random import Random
from typing import Any

import pytest
from engine_fakes import apply, values_at
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import readers_in

import kvwal
from kvwal.batch import WriteBatch
from kvwal.engine.memtable import Memtable
from kvwal.engine.readers import Reader, Readers
from kvwal.engine.value import MISSING
from kvwal.keys import KeyRange, Seqno
from kvwal.testing import SimulatedDisk

KEYS = [b"%d" % number for number in range(8)]


def reader_at(seqno: int) -> Reader:
    return Reader(None, Seqno(seqno), "test", 0, None)  # type: ignore[arg-type]  # no version is looked at


@given(st.randoms(use_true_random=False))
def test_the_oldest_reader_is_known_as_readers_come_and_go(random: Random) -> None:
    readers = Readers()
    held: list[Reader] = []
    newest = 0
    for _ in range(random.randrange(300)):
        kind = random.randrange(5)
        if kind < 2:
            # A second registration of an older moment comes later, so seqnos do not ascend.
            reader = reader_at(random.randrange(50))
            reader.register(readers)
            newest = max(newest, reader.seqno)
            held.append(reader)
        elif kind == 2 and held:
            released = held.pop(random.randrange(len(held)))
            released.release()
            released.release()
            assert released.is_released
            del released
        elif kind == 3 and held:
            # One that is dropped is released.
            del held[random.randrange(len(held))]
        assert readers.oldest() == min((reader.seqno for reader in held), default=None)
        assert len(readers) == len(held)
        assert bool(readers) == bool(held)
        assert readers.newest == newest
        assert readers.all() == held
        reader = None  # type: ignore[assignment]


def test_the_book_of_readers_that_came_and_went_stays_small() -> None:
    readers = Readers()
    kept = reader_at(0)
    kept.register(readers)
    for number in range(10_000):
        reader = reader_at(number)
        reader.register(readers)
        reader.release()
    assert len(readers._heap) < 200
    assert readers.oldest() == 0


def test_a_reader_leaves_every_registry() -> None:
    one, other = Readers(), Readers()
    reader = reader_at(3)
    reader.register(one, other)
    assert (one.oldest(), other.oldest()) == (3, 3)
    del reader
    assert (one.oldest(), other.oldest()) == (None, None)


class Model:
    """A memtable with readers, and every state it went through."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.table = Memtable(Seqno(0))
        #: What the table says of each key at each moment; absent: it says nothing.
        self.moments: list[dict[bytes, bytes | None]] = [{}]
        self.deleted: list[tuple[int, KeyRange]] = []
        self.readers: list[Reader] = []

    def commit(self) -> None:
        seqno = len(self.moments)
        batch = WriteBatch()
        now = dict(self.moments[-1])
        for _ in range(self.random.choice([0, 0, 1, 2])):
            bounds = KeyRange(self.random.choice(KEYS), self.random.choice([None, *KEYS]))
            batch.delete_range(*bounds)
            if not bounds.is_empty():
                self.deleted.append((seqno, bounds))
                # Keys of the table; others are hidden by its cover.
                now.update({key: None for key in now if bounds.contains(key)})
        for _ in range(self.random.randrange(4)):
            batch.writes[self.random.choice(KEYS)] = self.random.choice([None, b"%d" % seqno])
        now.update(batch.writes)
        for _ in range(self.random.choice([1, 1, 1, 2])):
            apply(self.table, seqno, batch)
        self.moments.append(now)

    def register(self) -> None:
        reader = reader_at(len(self.moments) - 1)
        reader.register(self.table.older.readers)
        self.readers.append(reader)

    def expected(self, key: bytes, seqno: int) -> Any:
        if any(at <= seqno and bounds.contains(key) for at, bounds in self.deleted):
            return self.moments[seqno].get(key)
        return self.moments[seqno].get(key, MISSING)

    def check(self) -> None:
        table = self.table
        table._check()
        for reader in self.readers:
            seqno = reader.seqno
            for key in KEYS:
                assert table.get_at(key, seqno) == self.expected(key, seqno), (key, seqno)
            keys = table.order.between(None, None, after=None, reverse=False, most=100)
            values = values_at(table, seqno)
            assert [values.get(key, MISSING) for key in keys] == [self.expected(key, seqno) for key in keys]
            cover = table.ranges.at(seqno)
            for key in KEYS:
                covered = any(at <= seqno and bounds.contains(key) for at, bounds in self.deleted)
                assert bool(cover.at(key)) == covered, (key, seqno)
        now = len(self.moments) - 1
        for key in KEYS:
            assert table.get(key) == self.expected(key, now), key
        low, high = sorted([self.random.choice(KEYS), self.random.choice(KEYS)])
        for reverse in (False, True):
            found = table.order.between(low, high, after=None, reverse=reverse, most=3)
            ordered = sorted((k for k in table.latest if low <= k < high), reverse=reverse)
            assert found == ordered[:3]
            if found:
                after = table.order.between(low, high, after=found[0], reverse=reverse, most=3)
                assert after == ordered[1:4]


@given(st.randoms(use_true_random=False))
def test_a_memtable_keeps_each_moment_that_a_reader_is_registered_for(random: Random) -> None:
    model = Model(random)
    for _ in range(random.randrange(40)):
        kind = random.randrange(6)
        if kind < 3:
            model.commit()
        elif kind < 5 and len(model.readers) < 6:
            model.register()
        elif model.readers:
            model.readers.pop(random.randrange(len(model.readers))).release()
        model.check()


def test_a_snapshot_that_is_forgotten_pins_nothing() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        snapshots = [db.snapshot() for _ in range(10)]
        iterators = [snapshot.scan() for snapshot in snapshots] + [db.scan()]
        assert len(readers_in(db.pins())) >= 10
        ring: list[Any] = [snapshots, iterators]
        ring.append(ring)
        del snapshots, iterators, ring
        gc.collect()
        assert readers_in(db.pins()) == []


def test_a_snapshot_that_was_closed_says_so() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        snapshot = db.snapshot()
        snapshot.close()
        for use in (lambda: snapshot.get(b"a"), lambda: len(snapshot), lambda: list(snapshot.scan()), snapshot.first):
            with pytest.raises(kvwal.ClosedError):
                use()
