"""A store with values that expire against a plain dict with times: each way to read, each kind of moment, and crashes.

Durations end half a second beside the seconds by which time passes, so a model needs no microseconds.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import Any, TypeAlias

import pytest
from store_fixtures import TINY, check_store, problems_of

import kvwal
from kvwal.testing import SimulatedDisk

Entries: TypeAlias = dict[bytes, tuple[bytes, float | None]]
KEYS = [b"", b"a", b"a\0", b"aa", b"b", b"\xff", *(b"k%02d" % n for n in range(30))]
SIZES = [0, 1, 5, 5, 40, 700, 2595, 3000, 9000]


def at_time(entries: Entries, now_s: float) -> dict[bytes, bytes]:
    """What is there at a time."""
    return {key: value for key, (value, ends_s) in sorted(entries.items()) if ends_s is None or now_s < ends_s}


class Machine:
    """Two tables, the default one and another, and what they are to hold."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.disk = SimulatedDisk(seed=seed)
        self.tables: list[Entries] = [{}, {}]
        self.now_s = 0.0
        self.held: list[tuple[kvwal.Snapshot, list[Entries], float]] = []
        # After each commit: what there was, and when it was made.
        self.past: dict[int, tuple[list[Entries], float]] = {}
        self.open()

    def open(self) -> None:
        self.db = kvwal.open("/kv", files=self.disk, background=False, **TINY)
        self.other = self.db.table("other", bytes, bytes)

    def note(self) -> None:
        self.past.setdefault(self.db.last_seqno, ([dict(entries) for entries in self.tables], self.now_s))

    def target(self) -> tuple[Any, Entries]:
        which = self.random.randrange(2)
        return (self.db, self.other)[which], self.tables[which]

    def value(self) -> bytes:
        return bytes([self.random.randrange(256)]) * self.random.choice(SIZES)

    def lasts_s(self) -> float | None:
        return self.random.choice([None, 0.5, 1.5, 1.5, 3.5, 20.5, 1000.5])

    def ends_s(self, lasts_s: float | None) -> float | None:
        return None if lasts_s is None else self.now_s + lasts_s

    # -- steps --------------------------------------------------------------------------------

    def put(self) -> None:
        target, entries = self.target()
        key, value, lasts_s = self.random.choice(KEYS), self.value(), self.lasts_s()
        target.put(key, value, expire_s=lasts_s)
        entries[key] = value, self.ends_s(lasts_s)

    def touch(self) -> None:
        target, entries = self.target()
        key, lasts_s = self.random.choice(KEYS), self.lasts_s()
        there = at_time(entries, self.now_s)
        assert target.touch(key, expire_s=lasts_s) is (key in there)
        if key in there:
            entries[key] = there[key], self.ends_s(lasts_s)

    def delete(self) -> None:
        target, entries = self.target()
        key = self.random.choice(KEYS)
        target.delete(key)
        entries.pop(key, None)

    def delete_range(self) -> None:
        target, entries = self.target()
        start, stop = sorted(self.random.sample(KEYS, 2))
        target.delete_range(start, stop)
        for key in [key for key in entries if start <= key < stop]:
            del entries[key]

    def operate(self) -> None:
        target, entries = self.target()
        there = at_time(entries, self.now_s)
        key, value = self.random.choice(KEYS), self.value()
        what = self.random.randrange(4)
        if what == 0:
            assert target.put_if_absent(key, value) is (key not in there)
            if key not in there:
                entries[key] = value, None
        elif what == 1:
            assert target.pop(key, None) == there.get(key)
            if key in there:
                del entries[key]
        elif what == 2 and there:
            pair = target.popitem(last=bool(len(value) % 2))
            assert pair == (max(there.items()) if len(value) % 2 else min(there.items()))
            del entries[pair[0]]
        else:
            assert target.compare_and_set(key, there.get(key), value)
            entries[key] = value, None

    def transact(self) -> None:
        with self.db.transaction() as txn:
            parts = [txn, self.other.within(txn)]
            for _ in range(self.random.randrange(1, 6)):
                which = self.random.randrange(2)
                part, entries = parts[which], self.tables[which]
                key, value, lasts_s = self.random.choice(KEYS), self.value(), self.lasts_s()
                there = at_time(entries, self.now_s)
                if self.random.random() < 0.3:
                    assert part.touch(key, expire_s=lasts_s) is (key in there)
                    if key in there:
                        entries[key] = there[key], self.ends_s(lasts_s)
                else:
                    part.put(key, value, expire_s=lasts_s)
                    entries[key] = value, self.ends_s(lasts_s)
                there = at_time(entries, self.now_s)
                assert part.get(key) == there.get(key)
                assert len(part) == len(there)
                assert list(part.items()) == list(there.items())

    def batch(self) -> None:
        with self.db.batch() as batch:
            parts = [batch, self.other.within(batch)]
            for _ in range(self.random.randrange(1, 9)):
                which = self.random.randrange(2)
                key, value, lasts_s = self.random.choice(KEYS), self.value(), self.lasts_s()
                parts[which].put(key, value, expire_s=lasts_s)
                self.tables[which][key] = value, self.ends_s(lasts_s)

    def pass_time(self) -> None:
        seconds = self.random.choice([1, 1, 1, 2, 5, 30])
        self.disk.pass_time(seconds)
        self.now_s += seconds

    def remove(self) -> None:
        self.db.engine.expirer.remove()

    def checkpoint(self) -> None:
        self.db.checkpoint()

    def hold(self) -> None:
        if len(self.held) > 3:
            self.held.pop(0)[0].close()
        self.held.append((self.db.snapshot(), [dict(entries) for entries in self.tables], self.now_s))

    def let_go(self) -> None:
        for snapshot, _, _ in self.held:
            snapshot.close()
        self.held = []

    def reopen(self) -> None:
        self.let_go()
        self.db.close()
        self.open()

    def cut_the_power(self) -> None:
        self.let_go()
        before = self.disk
        self.disk = before.crash(Random(self.random.random()))
        with suppress(OSError, kvwal.Error):
            self.db.close()
        self.open()

    # -- looking ------------------------------------------------------------------------------

    def look(self) -> None:
        for target, entries in zip((self.db, self.other), self.tables, strict=True):
            self.look_at(target, at_time(entries, self.now_s))
        for snapshot, tables, now_s in self.held:
            parts = snapshot, self.other.within(snapshot)
            for part, entries in zip(parts, tables, strict=True):
                self.look_at(part, at_time(entries, now_s))
        seqno = self.random.choice([*self.past, 0])
        if seqno and self.db.window.oldest <= seqno <= self.db.last_seqno:
            tables, now_s = self.past[seqno]
            with self.db.snapshot(at=seqno) as past:
                for part, entries in zip((past, self.other.within(past)), tables, strict=True):
                    self.look_at(part, at_time(entries, now_s))

    def look_at(self, target: Any, there: dict[bytes, bytes]) -> None:
        keys = list(there)
        assert dict(target.items()) == there
        assert list(target) == keys
        assert list(target.keys(reverse=True)) == keys[::-1]
        assert len(target) == len(there)
        start, stop = sorted(self.random.sample(KEYS, 2))
        within = [key for key in keys if start <= key < stop]
        assert [key for key, _ in target.scan(start, stop, limit=4)] == within[:4]
        assert target.count(start, stop) == len(within)
        assert target.rank(stop) == sum(key < stop for key in keys)
        assert target.first(start, stop) == ((within[0], there[within[0]]) if within else None)
        assert target.last(start, stop) == ((within[-1], there[within[-1]]) if within else None)
        chosen = self.random.sample(KEYS, 5)
        assert target.get_many(chosen) == [there.get(key) for key in chosen]
        for key in chosen:
            assert target.get(key) == there.get(key)
            assert (key in target) is (key in there)
        if keys:
            n = self.random.randrange(len(keys))
            assert target.key_at(n) == keys[n]
            assert target.key_at(-1) == keys[-1]

    def run(self, steps: int) -> None:
        ways = [self.put] * 6 + [self.touch] * 3 + [self.pass_time] * 4 + [self.batch, self.transact, self.operate] * 2
        ways += [self.delete, self.delete_range, self.remove, self.remove, self.hold, self.checkpoint]
        for step in range(steps):
            self.random.choice(ways)()
            if step % 37 == 36:
                self.random.choice([self.reopen, self.cut_the_power])()
            self.note()
            if step % 3 == 0:
                self.look()
        # Everything leaves in the end, and nothing that was not told to.
        self.disk.pass_time(10_000)
        self.now_s += 10_000
        while self.db.engine.expirer.remove():
            pass
        self.let_go()
        self.db.checkpoint()
        self.look()
        check_store(self.db)
        assert problems_of(self.db) == []
        assert list(self.db.engine.expirer.rows()) == []
        lasting = sum(len(at_time(entries, self.now_s)) for entries in self.tables)
        assert sum(self.db.engine.reads.count(table=table) for table in (0, self.other.id or 0)) == lasting
        self.db.close()


@pytest.mark.parametrize("seed", range(10))
def test_a_store_with_expiry_is_a_dict_with_times(seed: int) -> None:
    Machine(seed).run(150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_a_store_with_expiry_is_a_dict_with_times_for_long(seed: int) -> None:
    Machine(seed).run(400)
