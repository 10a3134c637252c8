"""Which members of a group are written, above all on a full disk: each outcome is that of some serial run."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from group_fixtures import as_one_group, in_order
from store_fixtures import check_store, problems_of

import kvwal
from kvwal import ConflictError, DiskFullError
from kvwal.testing import SimulatedDisk

BIG = b"x" * 3_000_000


def opened(disk: SimulatedDisk) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, durability="os")


def kinds(results: Sequence[Any]) -> list[Any]:
    return [type(result) if isinstance(result, Exception) else result for result in results]


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


def full(db: kvwal.Store, disk: SimulatedDisk) -> None:
    """Room for what is small."""
    db[b"first"] = b""
    disk.capacity = disk.used_bytes() + 100_000


def test_popitem_does_not_take_what_was_refused(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        full(db, disk)
        results = as_one_group(db, [lambda: db.put(b"job", BIG), lambda: db.popitem(), lambda: db.popitem()])
        assert kinds(results) == [DiskFullError, (b"first", b""), KeyError]
        assert dict(db.items()) == {}


def test_what_found_a_key_that_was_refused_is_judged_anew(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        full(db, disk)
        results = as_one_group(
            db, [lambda: db.put(b"job", BIG), lambda: db.put_if_absent(b"job", b"y"), lambda: db.pop(b"job", None)]
        )
        assert kinds(results) == [DiskFullError, DiskFullError, None]
        assert b"job" not in db


def test_a_transaction_does_not_conflict_with_what_was_refused(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        full(db, disk)
        txn = db.transaction()
        assert txn.get(b"job") is None
        txn.delete(b"first")
        results = as_one_group(db, [lambda: db.put(b"job", BIG), txn.commit])
        assert kinds(results[:1]) == [DiskFullError]
        assert not isinstance(results[1], Exception)
        assert dict(db.items()) == {}


def test_a_transaction_conflicts_with_a_delete_that_was_written(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        full(db, disk)
        db[b"second"] = b""
        txn = db.transaction()
        assert txn.get(b"first") == b""
        txn.delete(b"second")
        results = as_one_group(
            db, [lambda: db.put(b"job", BIG), lambda: db.delete(b"first"), txn.commit, lambda: db.pop(b"first", None)]
        )
        assert [type(results[0]), type(results[2]), results[3]] == [DiskFullError, ConflictError, None]
        assert dict(db.items()) == {b"second": b""}


class _Serial:
    """A plain model of the same calls."""

    def __init__(self) -> None:
        self.content: dict[bytes, bytes] = {}

    def run(self, name: str, key: bytes, value: bytes) -> Any:
        content = self.content
        if name == "put":
            content[key] = value
        elif name == "put_if_absent":
            absent = key not in content
            content.setdefault(key, value)
            return absent
        elif name == "setdefault":
            return content.setdefault(key, value)
        elif name == "pop":
            return content.pop(key, None)
        elif name == "popitem":
            if not content:
                return KeyError
            last = max(content)
            return last, content.pop(last)
        elif name == "delete":
            content.pop(key, None)
        else:
            for each in [each for each in content if each >= key]:
                del content[each]
        return ...


def _call(db: kvwal.Store, name: str, key: bytes, value: bytes) -> Any:
    if name == "put":
        return db.put(key, value) and ...
    if name == "put_if_absent":
        return db.put_if_absent(key, value)
    if name == "setdefault":
        return db.setdefault(key, value)
    if name == "pop":
        return db.pop(key, None)
    if name == "popitem":
        return db.popitem()
    if name == "delete":
        return db.delete(key) and ...
    return db.delete_range(key, None) and ...


NAMES = ("put", "put_if_absent", "setdefault", "pop", "popitem", "delete", "delete_range")


@pytest.mark.parametrize("seed", range(60))
def test_a_group_on_a_full_disk_is_a_serial_run_without_what_was_refused(seed: int) -> None:
    rng = Random(seed)
    disk, model = SimulatedDisk(), _Serial()
    with opened(disk) as db:
        for key in (b"a", b"c"):
            db[key] = key
            model.run("put", key, key)
        disk.capacity = disk.used_bytes() + 100_000
        # One group: once the disk is known to be full, a put first waits for space.
        steps = [
            (rng.choice(NAMES), bytes([rng.choice(b"abcd")]), BIG if rng.random() < 0.5 else b"%d" % number)
            for number in range(8)
        ]
        for number, result in in_order(db, [lambda step=step: _call(db, *step) for step in steps]):
            step = steps[number]
            if isinstance(result, DiskFullError):
                assert step[0] in ("put", "put_if_absent", "setdefault")
            else:
                assert (KeyError if isinstance(result, KeyError) else result) == model.run(*step), step
        assert dict(db.items()) == model.content
        check_store(db)
        assert problems_of(db) == []
    disk.capacity = None
    with opened(disk) as db:
        assert dict(db.items()) == model.content
