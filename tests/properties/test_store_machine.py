"""The heart: a store against a plain dict, through every method, checkpoints, reopens, kills and power cuts."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_fixtures import check_store, problems_of

import kvwal
from kvwal.files import system_files
from kvwal.testing import SimulatedDisk

# The smallest sizes there are: freezes, rolls and checkpoints all happen within a few commits.
TINY = {
    "memtable_bytes": 16 << 10,
    "segment_bytes": 16 << 10,
    "checkpoint_log_bytes": 4 << 10,
    "cache_bytes": 256 << 10,
}
# Half of the examples are tiny; the others are of any size, or of those that a user has who asks for none.
SIZES = st.one_of(
    st.just(TINY),
    st.just(TINY),
    st.fixed_dictionaries(
        {
            "memtable_bytes": st.integers(14, 26).map(lambda n: 1 << n),
            "segment_bytes": st.integers(14, 24).map(lambda n: 1 << n),
            "checkpoint_log_bytes": st.integers(12, 26).map(lambda n: 1 << n),
            "cache_bytes": st.integers(18, 26).map(lambda n: 1 << n),
        }
    ),
    st.just({}),
)

# Few keys, so that they meet; neighbours, prefixes of each other, both ends of the order, and one larger than a page.
KEYS = st.one_of(
    st.sampled_from([b"", b"\0", b"a", b"a\0", b"aa", b"ab", b"b", b"m\xff", b"m\xff\xff", b"\xff", b"\xff\xff"]),
    st.just(5000).map(lambda size: b"\x80" * size),
    st.integers(0, 40).map(lambda n: b"k%02d" % n),
)
# By content seed and size: empty, small, overflowing a leaf, larger than a segment.
VALUES = st.builds(
    lambda seed, size: (b"%d." % seed * (size // 2 + 1))[:size],
    st.integers(0, 99),
    st.sampled_from([0, 1, 5, 5, 5, 40, 40, 700, 3000, 9000, 20_000]),
)
BOUNDS = st.one_of(st.none(), KEYS)
LIMITS = st.one_of(st.none(), st.integers(0, 6))
DURABILITIES = st.sampled_from(["commit", "interval", "os", None])
Write = tuple[str, bytes, bytes | None]
WRITES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, VALUES),
        st.tuples(st.just("delete"), KEYS, st.none()),
        st.tuples(st.just("delete_range"), KEYS, BOUNDS),
    ),
    min_size=1,
    max_size=6,
)


def apply(target: dict[bytes, bytes], writes: list[Write]) -> None:
    for what, key, other in writes:
        if what == "put":
            assert other is not None
            target[key] = other
        elif what == "delete":
            target.pop(key, None)
        else:
            for covered in [k for k in target if k >= key and (other is None or k < other)]:
                del target[covered]


def write_into(target: Any, writes: list[Write]) -> None:
    for what, key, other in writes:
        if what == "put":
            target.put(key, other)
        elif what == "delete":
            target.delete(key)
        else:
            target.delete_range(key, other)


def expected_scan(
    model: dict[bytes, bytes],
    start: bytes | None,
    stop: bytes | None,
    prefix: bytes | None,
    reverse: bool,
    limit: int | None,
) -> list[tuple[bytes, bytes]]:
    found = [
        (key, model[key])
        for key in sorted(model, reverse=reverse)
        if (start is None or key >= start)
        and (stop is None or key < stop)
        and (prefix is None or key.startswith(prefix))
    ]
    return found if limit is None else found[:limit]


def copy_store(source: Path, target: Path) -> None:
    """As `shutil.copytree`, but a preallocated segment of 16 MiB takes no such space."""
    target.mkdir()
    for entry in source.iterdir():
        data = entry.read_bytes()
        with open(target / entry.name, "wb") as file:
            file.write(data.rstrip(b"\0"))
            file.truncate(len(data))


class StoreMachine(RuleBasedStateMachine):
    """Rules that hold on every file system. `self.model` is what the store must be, `self.past` what it was."""

    db: kvwal.Store

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, bytes] = {}
        #: The state after every commit, for what a power cut may bring back.
        self.past: dict[int, dict[bytes, bytes]] = {0: {}}
        self.durable = 0
        self.held: list[tuple[kvwal.Snapshot, dict[bytes, bytes]]] = []
        self.iterators: list[tuple[Iterator[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]] = []
        self.settings: dict[str, Any] = {}

    def open(self) -> kvwal.Store:
        raise NotImplementedError

    @initialize(durability=st.sampled_from(["commit", "os"]), sizes=SIZES)
    def begin(self, durability: str, sizes: dict[str, int]) -> None:
        self.settings = {"durability": durability, "background": False, **sizes}
        self.db = self.open()

    def committed(self, durability: str | None = None) -> None:
        """The last call was one commit, or changed nothing; then it flushed nothing either."""
        seqno = self.db.last_seqno
        if seqno in self.past:
            assert self.past[seqno] == self.model
            return
        self.past[seqno] = dict(self.model)
        if (durability or self.settings["durability"]) == "commit":
            self.durable = seqno

    # -- writing

    @rule(key=KEYS, value=VALUES, durability=DURABILITIES)
    def put(self, key: bytes, value: bytes, durability: Any) -> None:
        seqno = self.db.put(key, value, durability=durability)
        assert seqno == self.db.last_seqno
        self.model[key] = value
        self.committed(durability)

    @rule(key=KEYS)
    def delete(self, key: bytes) -> None:
        self.db.delete(key)
        self.model.pop(key, None)
        self.committed()

    @rule(key=KEYS)
    def del_item(self, key: bytes) -> None:
        if key in self.model:
            del self.db[key]
            del self.model[key]
            self.committed()
        else:
            before = self.db.last_seqno
            with pytest.raises(KeyError):
                del self.db[key]
            assert self.db.last_seqno == before

    @rule(start=BOUNDS, stop=BOUNDS)
    def delete_range(self, start: bytes | None, stop: bytes | None) -> None:
        self.db.delete_range(start, stop)
        apply(self.model, [("delete_range", start or b"", stop)])
        self.committed()

    @rule()
    def clear(self) -> None:
        self.db.clear()
        self.model.clear()
        self.committed()

    @rule(pairs=st.dictionaries(KEYS, VALUES, max_size=8))
    def update(self, pairs: dict[bytes, bytes]) -> None:
        self.db.update(pairs)
        self.model.update(pairs)
        self.committed()

    @rule(first=st.integers(0, 500), count=st.integers(20, 200), size=st.integers(0, 60))
    def update_many(self, first: int, count: int, size: int) -> None:
        pairs = {b"n%04d" % number: b"v" * size for number in range(first, first + count)}
        self.db.update(pairs)
        self.model.update(pairs)
        self.committed()

    @rule(writes=WRITES, fail=st.booleans())
    def batch(self, writes: list[Write], fail: bool) -> None:
        if fail:
            with pytest.raises(ZeroDivisionError), self.db.batch() as batch:
                write_into(batch, writes)
                raise ZeroDivisionError
            return
        with self.db.batch() as batch:
            write_into(batch, writes)
        apply(self.model, writes)
        self.committed()

    @rule(key=KEYS)
    def pop(self, key: bytes) -> None:
        assert self.db.pop(key, None) == self.model.pop(key, None)
        self.committed()
        with pytest.raises(KeyError):
            self.db.pop(key)

    @rule()
    def popitem(self) -> None:
        if self.model:
            last = max(self.model)
            assert self.db.popitem() == (last, self.model.pop(last))
            self.committed()
        else:
            with pytest.raises(KeyError):
                self.db.popitem()

    @rule(key=KEYS, value=VALUES)
    def setdefault(self, key: bytes, value: bytes) -> None:
        assert self.db.setdefault(key, value) == self.model.setdefault(key, value)
        self.committed()

    # -- transactions

    @rule(
        before=WRITES,
        after=WRITES,
        probe=KEYS,
        start=BOUNDS,
        stop=BOUNDS,
        prefix=BOUNDS,
        reverse=st.booleans(),
        limit=LIMITS,
        end=st.sampled_from(["commit", "abort", "raise"]),
    )
    def transaction(
        self,
        before: list[Write],
        after: list[Write],
        probe: bytes,
        start: bytes | None,
        stop: bytes | None,
        prefix: bytes | None,
        reverse: bool,
        limit: int | None,
        end: str,
    ) -> None:
        own = dict(self.model)
        txn = self.db.transaction()
        for writes in (before, after):
            write_into(txn, writes)
            apply(own, writes)
            assert txn.get(probe) == own.get(probe)
            assert (probe in txn) == (probe in own)
            assert list(txn.scan(start, stop, prefix=prefix, reverse=reverse, limit=limit)) == expected_scan(
                own, start, stop, prefix, reverse, limit
            )
            assert len(txn) == len(own)
            assert txn.first() == (min(own.items()) if own else None)
            assert txn.last() == (max(own.items()) if own else None)
        assert self.db.get(probe) == self.model.get(probe), "writes of an open transaction are seen outside of it"
        if end == "commit":
            txn.commit()
            self.model = own
            self.committed()
        elif end == "abort":
            txn.abort()
        else:
            with pytest.raises(ZeroDivisionError), txn:
                raise ZeroDivisionError
        with pytest.raises(kvwal.ClosedError):
            txn.get(probe)

    @rule(
        key=KEYS, start=BOUNDS, stop=BOUNDS, reverse=st.booleans(), limit=st.integers(0, 4), theirs=WRITES, mine=WRITES
    )
    def conflict(
        self,
        key: bytes,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int,
        theirs: list[Write],
        mine: list[Write],
    ) -> None:
        """If what was read would now read differently, the commit must conflict; else either is right."""
        txn = self.db.transaction()
        read = txn.get(key)
        walked = list(txn.scan(start, stop, reverse=reverse, limit=limit))
        changed = dict(self.model)
        apply(changed, theirs)
        with self.db.batch() as batch:
            write_into(batch, theirs)
        self.model = changed
        self.committed()
        same = read == changed.get(key) and walked == expected_scan(changed, start, stop, None, reverse, limit)
        write_into(txn, mine)
        try:
            seqno = txn.commit()
        except kvwal.ConflictError:
            untouched = all(
                what == "put" and k != key and not ((start is None or k >= start) and (stop is None or k < stop))
                for what, k, _ in theirs
            )
            assert not untouched, "a conflict with a commit that touched nothing that was read"
        else:
            # One that wrote nothing (ranges may be empty) takes its place where it began.
            if seqno is not None:
                assert same, "committed although what it read has changed"
                apply(self.model, mine)
                self.committed()

    # -- reading

    @rule(start=BOUNDS, stop=BOUNDS, prefix=BOUNDS, reverse=st.booleans(), limit=LIMITS, view=st.sampled_from("ikvs"))
    def scan(
        self, start: bytes | None, stop: bytes | None, prefix: bytes | None, reverse: bool, limit: int | None, view: str
    ) -> None:
        want = expected_scan(self.model, start, stop, prefix, reverse, limit)
        arguments = {"prefix": prefix, "reverse": reverse, "limit": limit}
        if view == "s":
            assert list(self.db.scan(start, stop, **arguments)) == want
        elif view == "i":
            assert list(self.db.items(start, stop, **arguments)) == want
        elif view == "k":
            keys = self.db.keys(start, stop, **arguments)
            assert list(keys) == [key for key, _ in want]
            assert len(keys) == len(want)
            assert all(key in keys for key, _ in want)
        else:
            assert list(self.db.values(start, stop, **arguments)) == [value for _, value in want]
        forward = expected_scan(self.model, start, stop, prefix, False, None)
        assert self.db.first(start, stop, prefix=prefix) == (forward[0] if forward else None)
        assert self.db.last(start, stop, prefix=prefix) == (forward[-1] if forward else None)

    @rule(keys=st.lists(KEYS, max_size=5))
    def get(self, keys: list[bytes]) -> None:
        assert self.db.get_many(keys) == [self.model.get(key) for key in keys]
        for key in keys:
            assert self.db.get(key) == self.model.get(key)
            assert (key in self.db) == (key in self.model)
            assert self.db.get(bytearray(key), 7) == self.model.get(key, 7)

    @rule()
    def length(self) -> None:
        assert len(self.db) == len(self.model)
        assert bool(self.db) == bool(self.model)

    # -- what is held across writes, checkpoints and rolls

    @precondition(lambda self: len(self.held) < 4)
    @rule()
    def take_snapshot(self) -> None:
        self.held.append((self.db.snapshot(), dict(self.model)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=KEYS, start=BOUNDS, stop=BOUNDS, reverse=st.booleans(), limit=LIMITS, drop=st.booleans())
    def read_snapshot(
        self,
        data: st.DataObject,
        key: bytes,
        start: bytes | None,
        stop: bytes | None,
        reverse: bool,
        limit: int | None,
        drop: bool,
    ) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        snapshot, was = self.held[index]
        assert snapshot.get(key) == was.get(key)
        assert list(snapshot.scan(start, stop, reverse=reverse, limit=limit)) == expected_scan(
            was, start, stop, None, reverse, limit
        )
        assert len(snapshot) == len(was)
        if drop:
            snapshot.close()
            del self.held[index]

    @precondition(lambda self: len(self.iterators) < 4)
    @rule(start=BOUNDS, stop=BOUNDS, reverse=st.booleans(), limit=LIMITS, steps=st.integers(0, 70), where=st.booleans())
    def begin_iterator(
        self, start: bytes | None, stop: bytes | None, reverse: bool, limit: int | None, steps: int, where: bool
    ) -> None:
        source, was = self.held[-1] if where and self.held else (self.db, self.model)
        iterator = source.scan(start, stop, reverse=reverse, limit=limit)
        want = expected_scan(was, start, stop, None, reverse, limit)
        for pair in want[:steps]:
            assert next(iterator) == pair
        self.iterators.append((iterator, want[steps:]))

    @precondition(lambda self: self.iterators)
    @rule(data=st.data(), steps=st.one_of(st.integers(0, 70), st.none()))
    def go_on_iterating(self, data: st.DataObject, steps: int | None) -> None:
        index = data.draw(st.integers(0, len(self.iterators) - 1))
        iterator, want = self.iterators[index]
        if steps is None:
            assert list(iterator) == want
            del self.iterators[index]
            return
        for pair in want[:steps]:
            assert next(iterator) == pair
        self.iterators[index] = (iterator, want[steps:])

    # -- upkeep

    @rule()
    def checkpoint(self) -> None:
        self.db.checkpoint()
        # The checkpoint has flushed whatever it took over.
        self.durable = self.db.last_seqno
        assert self.db.stats().memtable_keys == 0

    @rule()
    def sync(self) -> None:
        self.db.sync()
        self.durable = self.db.last_seqno

    def forget_readers(self) -> None:
        self.held.clear()
        self.iterators.clear()

    @rule()
    def reopen(self) -> None:
        held, iterators = list(self.held), list(self.iterators)
        self.forget_readers()
        self.db.close()
        for snapshot, _ in held:
            with pytest.raises(kvwal.ClosedError):
                snapshot.get(b"a")
        del iterators
        self.db = self.open()
        self.durable = self.db.last_seqno
        assert self.db.recovery.cut_bytes == 0
        self.whole()

    def whole(self) -> None:
        """Everything, at once."""
        assert self.db.last_seqno == max(s for s in self.past if s <= self.db.last_seqno)
        assert dict(self.db.items()) == self.model
        assert list(self.db) == sorted(self.model)
        assert list(reversed(self.db)) == sorted(self.model, reverse=True)
        assert len(self.db) == len(self.model)

    @invariant()
    def rules_hold(self) -> None:
        if hasattr(self, "db"):
            check_store(self.db)

    @rule()
    def verify(self) -> None:
        assert problems_of(self.db) == []

    def teardown(self) -> None:
        if hasattr(self, "db"):
            self.forget_readers()
            try:
                assert problems_of(self.db) == []
                self.whole()
            finally:
                self.db.close()


class OnTheSystem(StoreMachine):
    """The real file system. A kill is a copy of the directory, taken while the store is open."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="kvwal-machine-"))
        self.path = self.root / "0.kv"
        self.opens = 0

    def open(self) -> kvwal.Store:
        return kvwal.open(self.path, files=system_files(), **self.settings)

    @rule()
    def kill(self) -> None:
        self.opens += 1
        former, self.path = self.path, self.root / f"{self.opens}.kv"
        copy_store(former, self.path)
        self.forget_readers()
        self.db.close()
        shutil.rmtree(former)
        self.db = self.open()
        assert self.db.last_seqno == max(self.past)
        self.durable = self.db.last_seqno
        self.whole()

    @rule()
    def look_read_only(self) -> None:
        """A reader of a copy sees the same, and leaves every byte as it was."""
        copy = self.root / "copy.kv"
        copy_store(self.path, copy)
        before = {entry.name: entry.read_bytes() for entry in copy.iterdir()}
        with kvwal.open(copy, "r") as reader:
            assert dict(reader.items()) == self.model
            assert len(reader) == len(self.model)
            assert problems_of(reader) == []
        assert {entry.name: entry.read_bytes() for entry in copy.iterdir()} == before
        shutil.rmtree(copy)

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)


class OnASimulatedDisk(StoreMachine):
    """A disk whose power is cut: what comes back is a prefix of the commits, and no acknowledged one is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = SimulatedDisk(seed=1)

    def open(self) -> kvwal.Store:
        return kvwal.open("/kv", files=self.disk, **self.settings)

    def after(self, disk: SimulatedDisk, abandon: Callable[[], None]) -> None:
        self.forget_readers()
        with suppress(OSError, kvwal.Error):
            abandon()
        self.disk = disk
        self.db = self.open()
        found = self.db.last_seqno
        assert found >= self.durable, "an acknowledged commit is gone"
        assert found in self.past, "not a state that ever was"
        self.model = dict(self.past[found])
        self.past = {seqno: state for seqno, state in self.past.items() if seqno <= found}
        # Recovery makes durable what it serves.
        self.durable = found
        self.whole()

    @rule()
    def kill(self) -> None:
        disk = self.disk.copy()
        last = max(self.past)
        self.after(disk, self.db.close)
        assert self.db.last_seqno == last, "the page cache survives a kill, and so do all commits"

    @rule(seed=st.integers(0, 1 << 32), which=st.sampled_from(["none", "all", "some"]), stale=st.booleans())
    def cut_the_power(self, seed: int, which: str, stale: bool) -> None:
        survivors = {"none": 0, "all": -1, "some": Random(seed)}[which]
        self.after(self.disk.crash(survivors, stale=stale), self.db.close)


SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)

TestOnTheSystem = OnTheSystem.TestCase
TestOnTheSystem.settings = SETTINGS
TestOnASimulatedDisk = OnASimulatedDisk.TestCase
TestOnASimulatedDisk.settings = SETTINGS
