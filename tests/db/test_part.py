"""Transactions over several tables, against a plain model that runs them one after the other."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

import kvwal
from kvwal.errors import ClosedError, ConflictError, ReadOnlyError
from kvwal.testing import SimulatedDisk

TABLES = [0, 16, 17]
KEYS = [b"a", b"b", b"c", b"d", b"e"]

Model = dict[tuple[int, bytes], bytes]


class Script:
    """One transaction: what it did and saw, to be done again on the model at its place in the order."""

    def __init__(self, db: kvwal.Store, rng: Random) -> None:
        self.txn = db.transaction()
        self.rng = rng
        self.steps: list[tuple[Any, ...]] = []

    def step(self) -> None:
        rng = self.rng
        table, key, other = rng.choice(TABLES), rng.choice(KEYS), rng.choice([*KEYS, None])
        part = self.txn.part(table)
        kind = rng.choice(["get", "get", "scan", "reverse", "count", "put", "put", "delete", "range"])
        bounds = (key, other if other is None or other > key else None)
        found: Any = None
        if kind == "get":
            found = part.get(key)
        elif kind in ("scan", "reverse"):
            limit = rng.choice([1, None])
            found = list(part.scan(*bounds, reverse=kind == "reverse", limit=limit))
            bounds = (*bounds, limit)  # type: ignore[assignment]
        elif kind == "count":
            found = len(part.keys(*bounds))
        elif kind == "put":
            found = b"%d" % rng.randrange(1000)
            part.put(key, found)
        elif kind == "delete":
            part.delete(key)
        else:
            part.delete_range(*bounds)
        self.steps.append((kind, table, key, bounds, found))

    def again(self, model: Model) -> None:
        """AssertionError if it would have seen something else had it run alone, now."""
        for kind, table, key, bounds, found in self.steps:
            within = [
                (name, value)
                for (its, name), value in sorted(model.items())
                if its == table and bounds[0] <= name and (bounds[1] is None or name < bounds[1])
            ]
            if kind == "get":
                assert model.get((table, key)) == found
            elif kind == "scan":
                assert within[: bounds[2]] == found
            elif kind == "reverse":
                assert within[::-1][: bounds[2]] == found
            elif kind == "count":
                assert len(within) == found
            elif kind == "put":
                model[table, key] = found
            elif kind == "delete":
                model.pop((table, key), None)
            else:
                for name, _ in within:
                    del model[table, name]


@pytest.mark.parametrize("number", range(8))
def test_transactions_over_tables_are_as_if_one_ran_after_the_other(number: int) -> None:
    rng = Random(number)
    model: Model = {}
    committed = conflicts = 0
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        open_scripts: list[Script] = []
        for _ in range(800):
            action = rng.random()
            if action < 0.15 and len(open_scripts) < 4:
                open_scripts.append(Script(db, rng))
            elif action < 0.85 and open_scripts:
                rng.choice(open_scripts).step()
            elif action < 0.99 and open_scripts:
                script = open_scripts.pop(rng.randrange(len(open_scripts)))
                try:
                    seqno = script.txn.commit()
                except ConflictError as conflict:
                    assert conflict.table in TABLES
                    conflicts += 1
                    continue
                if seqno is None:
                    continue
                script.again(model)
                committed += 1
                for table in TABLES:
                    mine = [(key, value) for (its, key), value in sorted(model.items()) if its == table]
                    with db.transaction(read_only=True) as txn:
                        assert list(txn.part(table).scan()) == mine
                        assert all(txn.part(table).get(key) == model.get((table, key)) for key in KEYS)
                        assert len(txn.part(table)) == len(mine)
            elif action >= 0.99:
                frozen = db.engine.state.version.frozen is not None
                rng.choice([db.checkpoint, db.checkpoint if frozen else db.engine._succession.freeze])()
        for script in open_scripts:
            script.txn.abort()
    assert committed > 20
    assert conflicts > 5


@pytest.fixture
def db() -> Any:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as store:
        yield store


def test_keys_of_one_name_in_two_tables_do_not_conflict(db: kvwal.Store) -> None:
    one, two = db.transaction(), db.transaction()
    assert one.part(16).get(b"k") is two.part(17).get(b"k") is one.get(b"k", None)
    one.part(17).put(b"x", b"1")
    two.part(16).put(b"x", b"2")
    two.part(17).put(b"k", b"2")
    assert two.commit()
    assert one.commit()


def test_a_conflict_names_its_table(db: kvwal.Store) -> None:
    one, two = db.transaction(), db.transaction()
    one.part(16).get(b"k")
    one.put(b"x", b"1")
    two.part(16).put(b"k", b"2")
    two.commit()
    with pytest.raises(ConflictError) as caught:
        one.commit()
    assert (caught.value.table, caught.value.key) == (16, b"k")


def test_two_views_of_a_table_are_of_one_transaction(db: kvwal.Store) -> None:
    with db.transaction() as txn:
        before = txn.part(16)
        assert before.get(b"k") is None
        txn.part(16).put(b"k", b"1")
        assert before[b"k"] == b"1"
        assert txn.part(0) is txn
        assert b"k" not in txn
    assert txn.commit_seqno == 1
    with pytest.raises(ClosedError):
        before.get(b"k")
    with pytest.raises(ClosedError):
        txn.part(16)
    with db.transaction(read_only=True) as txn, pytest.raises(ReadOnlyError):
        txn.part(16).put(b"k", b"1")


def test_transactions_of_one_group_conflict_over_a_table(db: kvwal.Store) -> None:
    one, two, three = (db.transaction() for _ in range(3))
    for txn, key in ((one, b"a"), (two, b"a"), (three, b"b")):
        txn.part(16).get(key)
        txn.part(16).put(key, b"1")
    requests = [txn.request() for txn in (one, two, three)]
    db.engine.queue.submit([request for request in requests if request is not None])
    outcomes = [None if request is None else type(request.error) for request in requests]
    assert outcomes == [type(None), ConflictError, type(None)]
    for txn in (one, two, three):
        txn.abort()


def test_what_is_taken_out_of_a_table_is_read_first(db: kvwal.Store) -> None:
    with db.transaction() as txn:
        txn.part(16).update({b"a": b"1", b"b": b"2", b"c": b"3"})
    with db.transaction() as txn:
        part = txn.part(16)
        del part[b"a"]
        with pytest.raises(KeyError):
            del part[b"a"]
        assert part.popitem() == (b"c", b"3")
        assert dict(part) == {b"b": b"2"}
        part.clear()
        with pytest.raises(KeyError):
            part.popitem()
    with db.transaction(read_only=True) as reading:
        assert dict(reading.part(16)) == {}
        for call in (reading.part(16).popitem, lambda: reading.part(16).__delitem__(b"x"), reading.part(16).clear):
            with pytest.raises(ReadOnlyError):
                call()
    one, two = db.transaction(), db.transaction()
    with pytest.raises(KeyError):
        del one.part(16)[b"k"]
    one.put(b"x", b"1")
    two.part(16).put(b"k", b"2")
    two.commit()
    with pytest.raises(ConflictError):
        one.commit()


@pytest.mark.parametrize("table", TABLES)
def test_ranges_that_were_read_again_and_again_are_validated_once(db: kvwal.Store, table: int) -> None:
    with db.transaction() as txn:
        txn.part(table).update({b"%03d" % i: b"" for i in range(100)})
    txn = db.transaction()
    part = txn.part(table)
    for i in range(50):
        assert len(list(part.scan(b"%03d" % i, b"%03d" % (i + 10)))) == 10
        assert len(list(part.scan(b"%03d" % (90 - i), b"099", limit=5))) == 5
    reads = txn._open.read_set()
    assert reads is not None
    ranges = [*reads.ranges, *(each for _, _, others in reads.others for each in others)]
    assert [bounds.start for bounds in ranges] == [b"000"]
    assert ranges[0].contains(b"094")
    assert not ranges[0].contains(b"096")
    txn.abort()
