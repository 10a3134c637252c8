"""Random programs on a store, its snapshots, transactions and scans, each against a plain dict, at every moment.

Range deletes, checkpoints and counts are frequent and the keys are few, so that what a memtable, a frozen one and the
tree say of a key, of a range and of a number keeps changing under readers of older moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Final, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_fixtures import check_store

import kvwal
import kvwal.engine.occ
from kvwal.keys import KeyRange, stop_of_prefix
from kvwal.testing import SimulatedDisk

Data: TypeAlias = dict[bytes, bytes]
Pairs: TypeAlias = list[tuple[bytes, bytes]]

# The smallest settings there are: the memtable is full after some 60 writes, the rows after some 10 large ones.
SMALL: Final[dict[str, Any]] = {
    "memtable_bytes": 16 << 10,
    "segment_bytes": 16 << 10,
    "checkpoint_log_bytes": 1 << 20,
    "cache_bytes": 256 << 10,
    "background": False,
    "durability": "os",
}
FEW: Final = [b"", b"\0", b"a", b"a\0", *(b"a%d" % n for n in range(8)), *(b"b%d" % n for n in range(8)), b"\xff\xff"]
#: With these the tree has a dozen leaves, so that a deleted range hides some of them whole.
MANY: Final = [*FEW, *(b"t%03d" % n for n in range(300))]
PREFIXES: Final = [b"", b"a", b"b", b"t", b"t1", b"t20", b"\xff", b"nothing"]
#: A change of one key (value or None), or a deleted range.
Change: TypeAlias = tuple[bytes, bytes | None] | KeyRange


def apply(data: Data, changes: list[Change]) -> None:
    for change in changes:
        if isinstance(change, KeyRange):
            for key in [key for key in data if change.contains(key)]:
                del data[key]
        elif change[1] is None:
            data.pop(change[0], None)
        else:
            data[change[0]] = change[1]


def within(data: Data, start: bytes | None, stop: bytes | None, prefix: bytes | None) -> Pairs:
    return sorted(
        (key, value)
        for key, value in data.items()
        if (start is None or start <= key)
        and (stop is None or key < stop)
        and (prefix is None or key.startswith(prefix))
    )


class OpenTransaction:
    """A transaction, what it must see, and what it has read of others."""

    def __init__(self, txn: kvwal.Transaction, data: Data, began: int, read_only: bool) -> None:
        self.txn = txn
        self.data = dict(data)
        self.began = began
        self.read_only = read_only
        self.changes: list[Change] = []
        self.own: set[bytes] = set()
        self.own_ranges: list[KeyRange] = []
        self.keys_read: set[bytes] = set()
        self.ranges_read: list[KeyRange] = []

    def write(self, change: Change) -> None:
        if isinstance(change, KeyRange):
            self.txn.delete_range(*change)
            self.own = {key for key in self.own if not change.contains(key)}
            self.own_ranges.append(change)
        elif change[1] is None:
            self.txn.delete(change[0])
            self.own.add(change[0])
        else:
            self.txn.put(change[0], change[1])
            self.own.add(change[0])
        self.changes.append(change)
        apply(self.data, [change])

    def note_key(self, key: bytes) -> None:
        if key not in self.own and not any(bounds.contains(key) for bounds in self.own_ranges):
            self.keys_read.add(key)

    def conflicts(self, commits: list[list[Change]]) -> bool:
        """Whether a commit since it began has written what it read."""
        if not self.keys_read and not self.ranges_read:
            return False
        for changes in commits[self.began :]:
            for change in changes:
                if isinstance(change, KeyRange):
                    if any(change.contains(key) for key in self.keys_read):
                        return True
                    if any(change.overlaps(bounds) for bounds in self.ranges_read):
                        return True
                elif change[0] in self.keys_read or any(bounds.contains(change[0]) for bounds in self.ranges_read):
                    return True
        return False


class Program:
    """A store and its model; each step does one thing at random."""

    def __init__(self, random: Random, *, keys: list[bytes], start_full: bool) -> None:
        self.random = random
        self.keys = keys
        self.disk = SimulatedDisk(seed=1)
        self.db = kvwal.open("/kv", files=self.disk, **SMALL)
        self.data: Data = {}
        #: What each commit changed, in order.
        self.commits: list[list[Change]] = []
        self.snapshots: list[tuple[kvwal.Snapshot, Data]] = []
        self.transactions: list[OpenTransaction] = []
        self.scans: list[tuple[Iterator[tuple[bytes, bytes]], Pairs]] = []
        self.log: list[str] = []
        if start_full:
            pairs = {key: self.value() for key in keys}
            self.db.update(pairs)
            self.committed(list(pairs.items()))
            self.db.checkpoint()

    # -- what is chosen

    def key(self) -> bytes:
        return self.random.choice(self.keys)

    def value(self) -> bytes:
        size = self.random.choice([0, 1, 10, 10, 100, 100, 3000 if self.random.randrange(8) == 0 else 10])
        return (b"%d." % self.random.randrange(100) * (size // 2 + 1))[:size]

    def bounds(self) -> tuple[bytes | None, bytes | None]:
        ends = [self.random.choice([None, self.key(), self.key(), self.key() + b"\0", b"c"]) for _ in range(2)]
        if self.random.randrange(8) and None not in ends:
            ends.sort()
        return ends[0], ends[1]

    def range(self) -> KeyRange:
        """A range that is not empty, mostly a short one."""
        while True:
            if self.random.randrange(4):
                first = self.random.randrange(len(self.keys))
                ordered = sorted(self.keys)
                last = min(first + self.random.choice([1, 2, 3, 5, 40]), len(ordered))
                bounds = KeyRange(ordered[first], None if last == len(ordered) else ordered[last])
            else:
                start, stop = self.bounds()
                bounds = KeyRange(start or b"", stop)
            if not bounds.is_empty():
                return bounds

    def change(self) -> Change:
        kind = self.random.randrange(6)
        if kind < 3:
            return self.key(), self.value()
        return (self.key(), None) if kind == 3 else self.range()

    # -- steps

    def committed(self, changes: list[Change]) -> None:
        apply(self.data, changes)
        self.commits.append(changes)
        assert self.db.last_seqno == len(self.commits)

    def step_put(self) -> None:
        key, value = self.key(), self.value()
        self.db.put(key, value)
        self.committed([(key, value)])

    def step_delete(self) -> None:
        key = self.key()
        self.db.delete(key)
        self.committed([(key, None)])

    def step_delete_range(self) -> None:
        bounds = self.range()
        self.db.delete_range(*bounds)
        self.committed([bounds])

    def step_batch(self) -> None:
        batch = kvwal.WriteBatch()
        changes: list[Change] = []
        for _ in range(self.random.randrange(1, 7)):
            change = self.change()
            changes.append(change)
            if isinstance(change, KeyRange):
                batch.delete_range(*change)
            elif change[1] is None:
                batch.delete(change[0])
            else:
                batch.put(change[0], change[1])
        self.db.commit(batch)
        self.committed(changes)

    def step_many_puts(self) -> None:
        """Enough for a freeze by itself."""
        pairs: list[Change] = [(self.key(), self.value()) for _ in range(20)]
        self.db.update(dict(pairs))  # type: ignore[arg-type]  # no range is among them
        self.committed(list(dict(pairs).items()))  # type: ignore[arg-type]

    def step_operation(self) -> None:
        key, value = self.key(), self.value()
        kind = self.random.randrange(6)
        old = self.data.get(key)
        before = self.db.last_seqno
        new: bytes | None
        if kind == 0:
            assert self.db.pop(key, None) == old
            new = None
        elif kind == 1:
            assert self.db.setdefault(key, value) == (value if old is None else old)
            new = value if old is None else old
        elif kind == 2:
            assert self.db.put_if_absent(key, value) == (old is None)
            new = value if old is None else old
        elif kind == 3:
            expected = self.random.choice([old, value, None])
            assert self.db.compare_and_set(key, expected, value) == (expected == old)
            new = value if expected == old else old
        elif kind == 4:
            start, stop = self.bounds()
            found = within(self.data, start, stop, None)
            last = bool(self.random.randrange(2))
            if not found:
                with pytest.raises(KeyError):
                    self.db.popitem(start, stop, last=last)
                return
            pair = found[-1 if last else 0]
            assert self.db.popitem(start, stop, last=last) == pair
            key, old, new = pair[0], pair[1], None
        elif old is None:
            with pytest.raises(KeyError):
                del self.db[key]
            return
        else:
            del self.db[key]
            new = None
        # What changes nothing need not be a commit.
        if self.db.last_seqno > before:
            self.committed([(key, new)])
        else:
            assert new == old

    def step_freeze(self) -> None:
        if self.db.engine.state.version.frozen is None:
            self.db.engine._succession.freeze()

    def step_checkpoint(self) -> None:
        self.db.checkpoint()

    def step_compact(self) -> None:
        self.db.compact()

    def step_snapshot(self) -> None:
        if len(self.snapshots) < 5:
            self.snapshots.append((self.db.snapshot(), dict(self.data)))

    def step_close_snapshot(self) -> None:
        if self.snapshots:
            snapshot, _ = self.snapshots.pop(self.random.randrange(len(self.snapshots)))
            # One that is dropped is released as well.
            if self.random.randrange(2):
                snapshot.close()

    def step_transaction(self) -> None:
        if len(self.transactions) < 4:
            read_only = not self.random.randrange(4)
            txn = self.db.transaction(read_only=read_only)
            self.transactions.append(OpenTransaction(txn, self.data, len(self.commits), read_only))

    def step_write_in_transaction(self) -> None:
        if self.transactions:
            opened = self.random.choice(self.transactions)
            if not opened.read_only:
                opened.write(self.change())

    def step_end_transaction(self) -> None:
        if not self.transactions:
            return
        opened = self.transactions.pop(self.random.randrange(len(self.transactions)))
        if not self.random.randrange(4):
            opened.txn.abort()
            return
        if not opened.changes:
            assert opened.txn.commit() is None
        elif opened.conflicts(self.commits):
            with pytest.raises(kvwal.ConflictError):
                opened.txn.commit()
            assert self.db.last_seqno == len(self.commits)
        else:
            assert opened.txn.commit() == len(self.commits) + 1
            self.committed(opened.changes)

    def step_scan(self) -> None:
        """Begin to iterate, of now or of an older moment; it goes on later."""
        if len(self.scans) < 4:
            source, data = self.random.choice([(self.db, self.data), *self.snapshots])
            reverse = bool(self.random.randrange(2))
            start, stop = self.bounds()
            found = within(data, start, stop, None)
            self.scans.append((source.scan(start, stop, reverse=reverse), found[::-1] if reverse else found))

    def step_go_on(self) -> None:
        if self.scans:
            index = self.random.randrange(len(self.scans))
            iterator, left = self.scans[index]
            for _ in range(self.random.choice([0, 1, 5, 1000])):
                if not left:
                    assert next(iterator, None) is None
                    del self.scans[index]
                    return
                assert next(iterator) == left.pop(0)
            if not self.random.randrange(4):
                del self.scans[index]

    def step_count(self) -> None:
        """Counts of now that follow each other with few writes between them use what the last one found out."""
        assert len(self.db) == len(self.data)

    def step_reopen(self) -> None:
        if self.random.randrange(3):
            return
        self.let_go()
        self.db.close()
        self.db = kvwal.open("/kv", files=self.disk, **SMALL)

    def let_go(self) -> None:
        for snapshot, _ in self.snapshots:
            snapshot.close()
        for opened in self.transactions:
            opened.txn.abort()
        self.snapshots, self.transactions, self.scans = [], [], []

    STEPS: Final = (
        *["put"] * 3, "delete", *["delete_range"] * 3, *["batch"] * 2, "many_puts", *["operation"] * 2, "freeze",
        "checkpoint", "compact", *["snapshot"] * 2, *["close_snapshot"] * 2, "transaction", "write_in_transaction",
        "write_in_transaction", "end_transaction", *["scan"] * 2, *["go_on"] * 2, *["count"] * 3, "reopen",
    )  # fmt: skip

    def step(self) -> None:
        name = self.random.choice(self.STEPS)
        self.log.append(name)
        getattr(self, "step_" + name)()

    # -- what must hold

    def views(self) -> list[tuple[Any, Data, OpenTransaction | None]]:
        return [
            (self.db, self.data, None),
            *((snapshot, data, None) for snapshot, data in self.snapshots),
            *((opened.txn, opened.data, opened) for opened in self.transactions),
        ]

    def probe(self) -> None:
        """Ask one of them one thing."""
        view, data, opened = self.random.choice(self.views())
        kind = self.random.randrange(8)
        if kind == 0:
            key = self.key()
            assert view.get(key) == data.get(key), key
            self.note_keys(opened, [key])
        elif kind == 1:
            keys = [self.key() for _ in range(self.random.randrange(12))]
            assert view.get_many(keys) == [data.get(key) for key in keys], keys
            self.note_keys(opened, keys)
        elif kind == 2:
            assert len(view) == len(data)
            self.note_range(opened, None, None)
        elif kind < 6:
            self.probe_range(view, data, opened)
        else:
            start, stop = self.bounds()
            prefix = self.random.choice([None, None, *PREFIXES])
            found = within(data, start, stop, prefix)
            if kind == 6:
                assert view.first(start, stop, prefix=prefix) == (found[0] if found else None)
                self.note_walk(opened, start, stop, prefix, found[:1], 1, False)
            else:
                assert view.last(start, stop, prefix=prefix) == (found[-1] if found else None)
                self.note_walk(opened, start, stop, prefix, found[-1:], 1, True)

    def probe_range(self, view: Any, data: Data, opened: OpenTransaction | None) -> None:
        start, stop = self.bounds()
        prefix = self.random.choice([None, None, *PREFIXES])
        limit = self.random.choice([None, None, 0, 1, 2, 7, 300])
        reverse = bool(self.random.randrange(2))
        found = within(data, start, stop, prefix)
        if reverse:
            found.reverse()
        found = found[:limit]
        arguments = {"prefix": prefix, "reverse": reverse, "limit": limit}
        kind = self.random.randrange(4)
        if kind == 0:
            assert len(view.keys(start, stop, **arguments)) == len(found), (start, stop, arguments)
        elif kind == 1:
            # A list asks for the length first, which reads as much.
            assert list(view.keys(start, stop, **arguments)) == [key for key, _ in found], (start, stop, arguments)
        else:
            assert list(view.scan(start, stop, **arguments)) == found, (start, stop, arguments)
        self.note_walk(opened, start, stop, prefix, found, limit, reverse)

    def note_keys(self, opened: OpenTransaction | None, keys: list[bytes]) -> None:
        if opened is not None:
            for key in keys:
                opened.note_key(key)

    def note_range(self, opened: OpenTransaction | None, start: bytes | None, stop: bytes | None) -> None:
        if opened is not None:
            bounds = KeyRange(start or b"", stop)
            if not bounds.is_empty():
                opened.ranges_read.append(bounds)

    def note_walk(
        self,
        opened: OpenTransaction | None,
        start: bytes | None,
        stop: bytes | None,
        prefix: bytes | None,
        found: Pairs,
        limit: int | None,
        reverse: bool,
    ) -> None:
        """A scan has read as far as it came: to the end, or to the pair that reached its limit."""
        start, stop = narrowed(start, stop, prefix)
        if limit == 0:
            return
        if limit is not None and len(found) == limit:
            if reverse:
                start = found[-1][0]
            else:
                stop = found[-1][0] + b"\0"
        self.note_range(opened, start, stop)

    def check(self, *, end: bool = False) -> None:
        for view, data, opened in self.views():
            if opened is not None and not end:
                continue
            assert list(view.scan()) == within(data, None, None, None)
            assert list(view.scan(reverse=True)) == within(data, None, None, None)[::-1]
            assert len(view) == len(data)
            for prefix in PREFIXES:
                assert len(view.keys(prefix=prefix)) == len(within(data, None, None, prefix)), prefix
            for key in FEW:
                assert view.get(key) == data.get(key), key
                assert len(view.keys(key)) == len(within(data, key, None, None)), key
            assert view.get_many(self.keys) == [data.get(key) for key in self.keys]
        if end:
            for iterator, left in self.scans:
                assert list(iterator) == left
            self.scans = []
            check_store(self.db)
            self.let_go()
            self.check()
            self.db.checkpoint()
            assert self.db.verify().ok
            assert list(self.db.scan()) == within(self.data, None, None, None)
            self.db.close()
            self.db = kvwal.open("/kv", files=self.disk, **SMALL)
            assert list(self.db.scan()) == within(self.data, None, None, None)
            self.db.close()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()
            for _ in range(self.random.randrange(4)):
                self.probe()
            if not self.random.randrange(20):
                self.check()
        self.check(end=True)


def narrowed(start: bytes | None, stop: bytes | None, prefix: bytes | None) -> tuple[bytes | None, bytes | None]:
    if prefix is None:
        return start, stop
    head_stop = stop_of_prefix(prefix)
    first = prefix if start is None else max(start, prefix)
    stops = [end for end in (stop, head_stop) if end is not None]
    return first, min(stops) if stops else None


RANDOMS = st.randoms(use_true_random=False)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(RANDOMS, st.booleans())
def test_every_view_of_a_store_with_few_keys_agrees_with_its_model(random: Random, start_full: bool) -> None:
    Program(random, keys=FEW, start_full=start_full).run(25)


@pytest.mark.parametrize("number", range(3))
def test_a_long_program_with_few_keys_agrees_with_its_model(rng: Random, number: int) -> None:
    Program(rng, keys=FEW, start_full=bool(number % 2)).run(300)


def test_a_long_program_over_many_leaves_agrees_with_its_model(rng: Random) -> None:
    Program(rng, keys=MANY, start_full=True).run(200)


def test_a_long_program_agrees_with_its_model_while_conflicts_are_packed(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvwal.engine.occ, "_RECENT_KEYS", 4)
    Program(rng, keys=FEW, start_full=True).run(300)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_a_longer_program_agrees_with_its_model(rng: Random, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvwal.engine.occ, "_RECENT_KEYS", 1 << number)
    Program(rng, keys=FEW if number % 3 else MANY, start_full=bool(number % 2)).run(1500 if number % 3 else 500)


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(RANDOMS, st.booleans())
def test_every_view_agrees_with_its_model_in_many_short_programs(random: Random, start_full: bool) -> None:
    Program(random, keys=FEW, start_full=start_full).run(12)
