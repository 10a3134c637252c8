"""Sixty-four threads, or 256 tasks, on one key: nothing conflicts, nothing is lost, and each gets its turn."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import run
from store_fixtures import run_threads

import kvwal
import kvwal.aio
from kvwal.api.fairness import FREE_ATTEMPTS, Tickets
from kvwal.testing import SimulatedDisk

THREADS = 64
TASKS = 256
DURABILITIES = ["commit", "interval", "os"]


@pytest.fixture(params=DURABILITIES)
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[kvwal.Store]:
    with kvwal.open(tmp_path / "s", durability=request.param) as store:
        yield store
        assert store.verify().ok


def in_threads(work: Any) -> list[Any]:
    return run_threads(*(lambda number=number: work(number) for number in range(THREADS)))


def test_add_loses_no_increment_and_gives_each_thread_a_number_of_its_own(db: kvwal.Store) -> None:
    results = in_threads(lambda number: [db.add(b"n", 1) for _ in range(10)])
    assert sorted(each for own in results for each in own) == list(range(1, 641))
    assert all(own == sorted(own) for own in results)
    assert db.add(b"n", 0) == 640


def test_of_threads_that_put_if_absent_one_succeeds(db: kvwal.Store) -> None:
    for turn in range(5):
        key = b"key%d" % turn
        won = in_threads(lambda number: db.put_if_absent(key, b"%d" % number))
        assert won.count(True) == 1
        assert db[key] == b"%d" % won.index(True)


def test_compare_and_set_is_a_spinning_counter_that_loses_nothing(db: kvwal.Store) -> None:
    db[b"n"] = b"0"

    def increment(number: int) -> int:
        done = 0
        while done < 3:
            old = db[b"n"]
            done += db.compare_and_set(b"n", old, b"%d" % (int(old) + 1))
        return done

    in_threads(increment)
    assert db[b"n"] == b"%d" % (3 * THREADS)


def test_compare_and_set_of_the_same_expectation_succeeds_once(db: kvwal.Store) -> None:
    assert in_threads(lambda number: db.compare_and_set(b"k", None, b"%d" % number)).count(True) == 1
    first = db[b"k"]
    assert in_threads(lambda number: db.compare_and_set(b"k", first, None)).count(True) == 1
    assert b"k" not in db


def test_of_threads_that_pop_a_key_one_gets_the_value(db: kvwal.Store) -> None:
    for turn in range(5):
        db[b"k"] = b"%d" % turn
        got = in_threads(lambda number: db.pop(b"k", None))
        assert Counter(got) == {None: THREADS - 1, b"%d" % turn: 1}


def test_of_threads_that_delete_a_key_one_hears_no_key_error(db: kvwal.Store) -> None:
    db[b"k"] = b"1"

    def delete(number: int) -> bool:
        try:
            del db[b"k"]
        except KeyError:
            return False
        return True

    assert in_threads(delete).count(True) == 1


@pytest.mark.parametrize("last", [False, True])
def test_threads_that_popitem_take_each_item_once(db: kvwal.Store, last: bool) -> None:
    db.update({b"q%04d" % number: b"%d" % number for number in range(500)})

    def take(number: int) -> list[bytes]:
        taken = []
        while True:
            try:
                taken.append(db.popitem(b"q", b"r", last=last)[0])
            except KeyError:
                return taken

    db[b"other"] = b"stays"
    db[b"z"] = b"stays"
    taken = in_threads(take)
    assert Counter(key for own in taken for key in own) == Counter(b"q%04d" % number for number in range(500))
    # Each thread sees the queue advance.
    assert all(own == sorted(own, reverse=last) for own in taken)
    assert dict(db) == {b"other": b"stays", b"z": b"stays"}


def test_setdefault_gives_all_threads_the_same_value(db: kvwal.Store) -> None:
    for turn in range(5):
        values = set(in_threads(lambda number: db.setdefault(b"%d" % turn, b"%d" % number)))
        assert values == {db[b"%d" % turn]}


def test_all_of_them_at_once_beside_transactions_and_batches(db: kvwal.Store) -> None:
    """The sum of two keys stays what it is, whatever mixes in a group."""
    db[b"a"] = db[b"b"] = (1000).to_bytes(8, "little", signed=True)

    def work(number: int) -> int:
        moved = 0
        for turn in range(6):
            kind = (number + turn) % 5
            if kind == 0:
                db.add(b"a", 1)
                moved += 1
            elif kind == 1:
                db.put_if_absent(b"c%d" % (number % 3), b"x")
            elif kind == 2:
                db.pop(b"c%d" % (number % 3), None)
            elif kind == 3:

                def move(txn: kvwal.Transaction) -> None:
                    for key, sign in ((b"a", -1), (b"b", 1)):
                        old = int.from_bytes(txn[key], "little", signed=True)
                        txn[key] = (old + sign).to_bytes(8, "little", signed=True)

                db.run(move)
            else:
                with db.batch() as batch:
                    batch.delete_range(b"c", b"d")
                    batch.put(b"c%d" % (number % 3), b"y")
        return moved

    added = sum(in_threads(work))
    assert db.add(b"a", 0) + db.add(b"b", 0) == 2000 + added


@pytest.mark.parametrize("durability", DURABILITIES)
def test_no_call_of_run_needs_more_than_eight_attempts(tmp_path: Path, durability: Any) -> None:
    """Sixty-four threads increment one counter; a call counts how often its function was called."""
    with kvwal.open(tmp_path / "s", durability=durability) as db:
        db[b"n"] = b"0"

        def work(number: int) -> list[int]:
            calls = []
            for _ in range(20):
                called = 0

                def increment(txn: kvwal.Transaction) -> None:
                    nonlocal called
                    called += 1
                    txn[b"n"] = b"%d" % (int(txn[b"n"]) + 1)

                db.run(increment)
                calls.append(called)
            return calls

        attempts = [each for own in in_threads(work) for each in own]
        assert db[b"n"] == b"%d" % (20 * THREADS)
    assert max(attempts) <= 8, Counter(attempts)


def test_a_call_of_run_whose_function_fails_stops_no_other(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s", durability="os") as db:
        db[b"n"] = b"0"

        def work(number: int) -> int:
            done = 0
            for turn in range(10):

                def increment(txn: kvwal.Transaction) -> None:
                    old = int(txn[b"n"])
                    if (number + turn) % 4 == 0:
                        raise LookupError
                    txn[b"n"] = b"%d" % (old + 1)

                try:
                    db.run(increment)
                    done += 1
                except LookupError:
                    pass
            return done

        done = sum(in_threads(work))
        assert db[b"n"] == b"%d" % done


def test_run_within_run_is_not_stopped_by_its_own_ticket(tmp_path: Path) -> None:
    """The inner call may hold a ticket while the outer one does: none waits for the other for ever."""
    with kvwal.open(tmp_path / "s", durability="os") as db:
        db[b"n"] = db[b"m"] = b"0"

        def inner(txn: kvwal.Transaction) -> None:
            txn[b"m"] = b"%d" % (int(txn[b"m"]) + 1)

        def outer(txn: kvwal.Transaction) -> None:
            old = int(txn[b"n"])
            db.run(inner)
            txn[b"n"] = b"%d" % (old + 1)

        run_threads(*(lambda: [db.run(outer) for _ in range(5)] for _ in range(8)))
        assert db[b"n"] == b"40"
        assert int(db[b"m"]) >= 40


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_run_within_run_does_not_wait_for_itself(tmp_path: Path, in_a_thread: bool) -> None:
    """The outer call loses by what others write; the inner one conflicts with nothing."""
    attempts = 0
    with kvwal.open(tmp_path / "s", durability="os") as db:

        def audit(txn: kvwal.Transaction) -> None:
            txn[b"audit"] = b"seen"

        def outer(txn: kvwal.Transaction) -> None:
            nonlocal attempts
            attempts += 1
            txn.get(b"n")
            if in_a_thread:
                run_threads(partial(copy_context().run, db.run, audit))
            else:
                db.run(audit)
            if attempts < 9:
                db[b"n"] = b"%d" % attempts
            txn[b"copy"] = b""

        began = time.monotonic()
        db.run(outer)
        db.run(audit)
    assert attempts == 9
    assert time.monotonic() - began < 3


def test_a_call_within_a_holder_takes_no_ticket_and_one_within_another_call_does() -> None:
    tickets = Tickets()
    with tickets.call() as outer:
        with tickets.call() as inner:
            inner.begin(FREE_ATTEMPTS + 1)
            assert inner.has_ticket
        assert tickets.first() is None
        outer.begin(FREE_ATTEMPTS + 1)
        with tickets.call() as inner:
            inner.begin(FREE_ATTEMPTS + 1)
            assert not inner.has_ticket
            # It has lost: others let it pass.
            assert tickets.is_urgent
        with Tickets().call() as of_another_store:
            of_another_store.begin(FREE_ATTEMPTS + 1)
            assert of_another_store.has_ticket
    assert tickets.first() is None
    assert not tickets.is_urgent
    with tickets.call() as later:
        later.begin(FREE_ATTEMPTS + 1)
        assert later.has_ticket


# -- asyncio --------------------------------------------------------------------------------------


def in_tasks(
    work: Any, *, durability: str, prepare: dict[bytes, bytes] | None = None
) -> tuple[list[Any], dict[bytes, bytes]]:
    """The results of 256 tasks over one store, and what it holds afterwards."""

    async def main() -> tuple[list[Any], dict[bytes, bytes]]:
        async with kvwal.aio.open("/kv", files=SimulatedDisk(), durability=durability) as db:
            await db.update(prepare or {})
            results = await asyncio.gather(*(work(db, number) for number in range(TASKS)))
            return results, {key: value async for key, value in db.scan()}

    found: tuple[list[Any], dict[bytes, bytes]] = run(main())
    return found


@pytest.mark.parametrize("durability", DURABILITIES)
def test_tasks_that_add_lose_no_increment(durability: str) -> None:
    results, data = in_tasks(lambda db, number: db.add(b"n", 1), durability=durability)
    assert sorted(results) == list(range(1, TASKS + 1))
    assert int.from_bytes(data[b"n"], "little", signed=True) == TASKS


@pytest.mark.parametrize("durability", DURABILITIES)
def test_of_tasks_that_put_if_absent_one_succeeds(durability: str) -> None:
    results, data = in_tasks(lambda db, number: db.put_if_absent(b"k", b"%d" % number), durability=durability)
    assert results.count(True) == 1
    assert data == {b"k": b"%d" % results.index(True)}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_of_tasks_that_compare_and_set_one_succeeds(durability: str) -> None:
    results, data = in_tasks(
        lambda db, number: db.compare_and_set(b"k", b"old", b"%d" % number),
        durability=durability,
        prepare={b"k": b"old"},
    )
    assert results.count(True) == 1
    assert data == {b"k": b"%d" % results.index(True)}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_of_tasks_that_pop_a_key_one_gets_it(durability: str) -> None:
    results, data = in_tasks(lambda db, number: db.pop(b"k", None), durability=durability, prepare={b"k": b"v"})
    assert Counter(results) == {None: TASKS - 1, b"v": 1}
    assert data == {}


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("last", [False, True])
def test_tasks_that_popitem_take_each_item_once(durability: str, last: bool) -> None:
    items = {b"q%04d" % number: b"%d" % number for number in range(TASKS - 6)}

    async def take(db: Any, number: int) -> bytes | None:
        try:
            key: bytes = (await db.popitem(b"q", b"r", last=last))[0]
        except KeyError:
            return None
        return key

    results, data = in_tasks(take, durability=durability, prepare={**items, b"z": b""})
    assert Counter(results) == Counter([*items, *[None] * 6])
    assert data == {b"z": b""}


@pytest.mark.parametrize("durability", DURABILITIES)
def test_setdefault_gives_all_tasks_the_same_value(durability: str) -> None:
    results, data = in_tasks(lambda db, number: db.setdefault(b"k", b"%d" % number), durability=durability)
    assert set(results) == {data[b"k"]}


def test_no_call_of_run_needs_more_than_eight_attempts_in_tasks() -> None:
    async def work(db: Any, number: int) -> int:
        called = 0

        async def increment(txn: Any) -> None:
            nonlocal called
            called += 1
            txn.put(b"n", b"%d" % (int(await txn.get(b"n", b"0")) + 1))

        await db.run(increment)
        return called

    results, data = in_tasks(work, durability="os")
    assert data == {b"n": b"%d" % TASKS}
    assert max(results) <= 8, Counter(results)
