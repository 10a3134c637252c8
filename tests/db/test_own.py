"""What a transaction has written lies over what it reads, in every direction, and costs no more for what it deleted."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvwal
from kvwal.batch import WriteBatch
from kvwal.db.mapping import Bounds
from kvwal.db.own import OwnWrites
from kvwal.engine.gaps import WORTHWHILE
from kvwal.engine.merge import Source
from kvwal.engine.range_map import Cover, RangeMap
from kvwal.keys import KeyRange, Seqno
from kvwal.testing import SimulatedDisk

MANY = 300


def key(number: int) -> bytes:
    return b"%04d" % number


@pytest.fixture
def db(tmp_path: Path) -> Iterator[kvwal.Store]:
    with kvwal.open(tmp_path / "db", background=False, durability="os") as store:
        yield store


@given(st.randoms(use_true_random=False))
def test_scans_of_a_transaction_see_its_writes_as_of_when_they_began(random: Random) -> None:
    """Stretches of a hundred keys are deleted and put again, so that gaps come, grow, are cut and go."""
    db = kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os")
    db.update({key(number): b"old" for number in range(0, MANY, 2)})
    model = dict(db)
    with db.transaction() as txn:
        # Each with what it is still to find.
        under_way: list[tuple[Iterator[tuple[bytes, bytes]], list[tuple[bytes, bytes]]]] = []
        for step in range(random.randrange(30)):
            first = random.randrange(MANY)
            stretch = [key(number) for number in range(first, first + random.choice([1, 100, MANY]))]
            kind = random.randrange(8)
            if kind == 0:
                txn[stretch[0]] = model[stretch[0]] = b"%d" % step
            elif kind < 3:
                for each in stretch:
                    txn.delete(each)
                    model.pop(each, None)
            elif kind == 3:
                txn.delete_range(stretch[0], stretch[-1])
                model = {k: v for k, v in model.items() if not stretch[0] <= k < stretch[-1]}
            elif kind == 4 and model:
                assert txn.popitem() == max(model.items())
                del model[max(model)]
            elif kind == 5 and under_way:
                scan, wanted = under_way.pop(random.randrange(len(under_way)))
                assert list(scan) == wanted
            else:
                start = random.choice([None, stretch[0]])
                stop = random.choice([None, stretch[-1]])
                limit = random.choice([None, 1, 3, 200])
                reverse = random.random() < 0.5
                found = sorted((pair for pair in model.items() if start is None or pair[0] >= start), reverse=reverse)
                found = [pair for pair in found if stop is None or pair[0] < stop][:limit]
                scan = iter(txn.scan(start, stop, limit=limit, reverse=reverse))
                if random.random() < 0.5:
                    taken = random.choice([1, 5, MANY])
                    assert list(islice(scan, taken)) == found[:taken]
                    under_way.append((scan, found[taken:]))
                else:
                    under_way.append((scan, found))
        assert dict(txn) == model
        assert len(txn) == len(model)
    assert dict(db) == model
    db.close()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_transaction_passes_what_it_took_off_a_queue_once(db: kvwal.Store, reverse: bool) -> None:
    db.update({key(number): b"v" for number in range(1000)})
    with db.transaction() as txn:
        for taken in range(600):
            pair = txn.last() if reverse else txn.first()
            assert pair == (key(999 - taken if reverse else taken), b"v")
            txn.delete(pair[0])
        looked_at: list[int] = []
        for _ in range(2):
            own = txn._tracked.own
            bounds = Bounds(None, None, None, reverse, 1)
            looked_at.append(len(own.source(*own.skip(bounds), bounds)[1]))
            assert (txn.last() if reverse else txn.first()) == (key(399 if reverse else 600), b"v")
        # No more than are passed before a gap is worth while.
        assert max(looked_at) <= 64


def test_a_transaction_learns_of_each_range_that_it_deletes_once(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = []
    add = RangeMap.add

    def learns(self: RangeMap, seqno: Seqno, bounds: KeyRange, *, copy: bool) -> None:
        learnt.append(bounds)
        add(self, seqno, bounds, copy=copy)

    monkeypatch.setattr(RangeMap, "add", learns)
    db.update({b"%04d.old" % number: b"" for number in range(100)})
    with db.transaction() as txn:
        for number in range(100):
            txn.delete_range(b"%04d." % number, b"%04d/" % number)
            txn.put(b"%04d.new" % number, b"")
            assert txn.first(prefix=b"%04d" % number) == (b"%04d.new" % number, b"")
            assert txn.get(b"%04d.old" % number) is None
        assert len(learnt) == 100
    assert list(db) == [b"%04d.new" % number for number in range(100)]


def test_two_threads_that_ask_for_the_deleted_ranges_at_once_get_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OwnWrites(WriteBatch())
    own.delete_range(b"a", b"b")
    assert own.cover().at(b"a")
    own.delete_range(b"c", b"d")
    of = Cover.of
    asked: list[Cover] = []

    def meanwhile(*arguments: Any) -> Cover:
        patch.undo()
        asked.append(own.cover())
        own.delete_range(b"e", b"f")
        asked.append(own.cover())
        return of(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Cover, "of", meanwhile)
        found = own.cover()
    assert [bool(each.at(key)) for each in (asked[0], found) for key in (b"a", b"c", b"e")] == [True, True, False] * 2
    assert all(asked[1].at(key) and own.cover().at(key) for key in (b"a", b"c", b"e"))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_transaction_that_drains_one_end_looks_at_the_other_one_for_the_same_each_time(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    db.update({key(number): b"v" for number in range(1000)})
    looks: list[list[bytes]] = []
    source = OwnWrites.source

    def looked(*arguments: Any) -> Any:
        found = source(*arguments)
        looks.append(found[1])
        return found

    monkeypatch.setattr(OwnWrites, "source", looked)
    with db.transaction() as txn:
        for taken in range(900):
            pair = txn.first() if reverse else txn.last()
            assert pair == (key(taken if reverse else 999 - taken), b"v")
            txn.delete(pair[0])
            assert (txn.last() if reverse else txn.first()) == (key(999 if reverse else 0), b"v")
        assert max(map(len, looks)) <= 2 * WORTHWHILE


@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_transaction_writes_while_a_thread_takes_its_writes_is_not_among_them(reverse: bool) -> None:
    """As a worker of tasks does it."""
    random = Random(1)
    for most in (1, 2, 5, 50):
        own, before = OwnWrites(WriteBatch()), {}
        for number in range(0, 2000, 2):
            before[key(number)] = None if number % 3 else b"%d" % number
            own.write(key(number), before[key(number)])
        source, keys = own.source(key(10), key(1900), Bounds(None, None, None, reverse, None))
        taken: list[bytes] = []
        with ThreadPoolExecutor(1) as pool:

            def take(
                most: int, source: Source = source, taken: list[bytes] = taken, before: dict[bytes, Any] = before
            ) -> None:
                for _ in range(most):
                    if source.fill():
                        chunk, values = source.take_all()
                        assert list(values) == [before[each] for each in chunk]
                        taken += chunk

            taking = pool.submit(take, most)
            for number in random.sample(range(2000), 500):
                own.write(key(number), random.choice([None, b"new"]))
            own.delete_range(key(100), key(200))
            own.write(key(150), b"new")
            taking.result()
            pool.submit(take, 50).result()
        assert taken == keys == sorted((each for each in before if key(10) <= each < key(1900)), reverse=reverse)


def test_a_short_scan_looks_at_no_more_of_many_writes_than_it_needs(db: kvwal.Store) -> None:
    own = OwnWrites(WriteBatch())
    for number in range(10_000):
        own.write(key(number), b"v")
    assert len(own.source(None, None, Bounds(None, None, None, False, 5))[1]) == 5


def test_a_key_that_is_put_while_a_scan_begins_is_in_no_gap(db: kvwal.Store) -> None:
    """The scan does not see it, and must not say that nothing was there."""
    db.update({key(number): b"v" for number in range(200)})
    with db.transaction() as txn:
        for number in range(150):
            txn.delete(key(number))
        scan = iter(txn.scan(limit=1))
        txn[key(7) + b"x"] = b"new"
        assert next(scan) == (key(150), b"v")
        assert txn.first() == (key(7) + b"x", b"new")


def test_what_lies_in_a_gap_conflicts_as_what_was_walked(db: kvwal.Store) -> None:
    db.update({key(number): b"v" for number in range(200)})
    txn = db.transaction()
    for number in range(150):
        txn.delete(key(number))
    assert txn.first() == (key(150), b"v")
    assert txn.first() == (key(150), b"v")
    db[key(20) + b"x"] = b"between"
    with pytest.raises(kvwal.ConflictError):
        txn.commit()
