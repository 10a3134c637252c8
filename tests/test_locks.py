"""The mechanism of locks, re-entry and interruptions: sections, refusals, finalizers in the middle of commits."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import check_store, run_threads, wait_until

import kvwal
from kvwal.errors import ReentrancyError
from kvwal.locks import if_free, locked, new_lock, refuse_reentry, refused_calls, release
from kvwal.testing import SimulatedDisk


class Guarded:
    def __init__(self) -> None:
        self.lock = new_lock()

    @locked
    def section(self, function: Callable[[], object]) -> object:
        return function()


def test_a_section_is_left_without_its_lock_whatever_ends_it() -> None:
    guarded = Guarded()
    assert guarded.section(lambda: 5) == 5
    assert not guarded.lock._is_owned()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guarded.section(fail)
    assert not guarded.lock._is_owned()
    # As an interrupted `with` of 3.14 leaves it: owned once more than was asked for.
    with pytest.raises(ZeroDivisionError):
        guarded.section(lambda: (guarded.lock.acquire(), 1 // 0))
    assert not guarded.lock._is_owned()


def test_a_section_within_itself_is_refused_and_the_outer_one_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    guarded = Guarded()
    before = refused_calls()

    def within() -> str:
        with pytest.raises(ReentrancyError):
            guarded.section(lambda: None)
        assert guarded.lock._is_owned()
        return "done"

    with caplog.at_level(logging.ERROR, "kvwal"):
        assert guarded.section(within) == "done"
    assert refused_calls() == before + 1
    assert "section" in caplog.text
    assert not guarded.lock._is_owned()


def test_another_thread_is_not_refused_but_waits() -> None:
    guarded = Guarded()
    order: list[str] = []
    thread = threading.Thread(target=lambda: guarded.section(lambda: order.append("second")))

    def first() -> None:
        thread.start()
        order.append("first")

    guarded.section(first)
    thread.join()
    assert order == ["first", "second"]


def test_what_is_run_if_a_lock_is_free_waits_for_no_thread_and_leaves_the_lock() -> None:
    lock = new_lock()
    assert if_free(lock, lock._is_owned) is True
    assert not lock._is_owned()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if_free(lock, fail)
    assert not lock._is_owned()
    answers: list[int | None] = []
    with lock:
        # Not within a section of its own thread, which keeps the lock, nor beside that of another one.
        assert if_free(lock, lambda: 5) is None
        assert lock._is_owned()
        run_threads(lambda: answers.append(if_free(lock, lambda: 5)))
    assert answers == [None]


def test_release_gives_back_only_what_its_thread_owns() -> None:
    lock = new_lock()
    release(lock)
    lock.acquire()
    lock.acquire()
    release(lock)
    assert not lock._is_owned()
    owned, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            owned.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    owned.wait(20)
    release(lock)
    refuse_reentry(lock, "nothing")
    assert not lock.acquire(False)
    over.set()
    thread.join()


# -- finalizers -----------------------------------------------------------------------------------


class Outcome:
    """What became of the puts of finalizers."""

    def __init__(self, db: kvwal.Store) -> None:
        self.db = db
        # Of a simulated disk; a real one has no lock inside of a system call.
        disk = getattr(db.engine._directory, "_disk", None)  # type: ignore[attr-defined]
        self.mutex: Any = new_lock() if disk is None else disk.mutex
        self.returned: list[bytes] = []
        self.refused: list[bytes] = []
        self.others: list[BaseException] = []

    def count(self) -> int:
        return len(self.returned) + len(self.refused) + len(self.others)


class Putting:
    """An object in a reference cycle, whose finalizer puts: it runs wherever the collector does."""

    def __init__(self, outcome: Outcome, number: int) -> None:
        self.outcome = outcome
        self.number = number
        self.ring = self

    def __del__(self) -> None:
        if self.outcome.mutex._is_owned() and threading.current_thread() is not threading.main_thread():
            # The store's own thread is inside of the simulated disk, for which the leader may be waiting: later.
            Putting(self.outcome, self.number)
            return
        key = b"f%06d" % self.number
        try:
            self.outcome.db.put(key, key)
            self.outcome.returned.append(key)
        except ReentrancyError:
            self.outcome.refused.append(key)
        except BaseException as error:  # noqa: BLE001  # looked at by the test; a finalizer's own goes nowhere
            self.outcome.others.append(error)


@pytest.fixture(params=[7, 50])
def often(request: pytest.FixtureRequest) -> Iterator[None]:
    """The collector runs at every few allocations, so in the middle of everything."""
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(request.param, 5, 1000)
    yield
    gc.set_threshold(*before)


def await_finalizers(outcome: Outcome, count: int) -> None:
    """The store's own thread may be the one that collects, and then a collection here does nothing."""
    wait_until(lambda: (gc.collect(), outcome.count() == count)[1], "the end of all finalizers")


def put_while_finalizers_put(db: kvwal.Store, count: int, main: Callable[[int], None]) -> Outcome:
    logging.getLogger("kvwal").setLevel(logging.CRITICAL)
    try:
        outcome = Outcome(db)
        for number in range(count):
            Putting(outcome, number)
            main(number)
        await_finalizers(outcome, count)
    finally:
        logging.getLogger("kvwal").setLevel(logging.NOTSET)
    assert outcome.others == []
    for key in outcome.returned:
        assert db[key] == key
    for key in outcome.refused:
        assert key not in db
    return outcome


def batch_of(number: int) -> kvwal.WriteBatch:
    batch = kvwal.WriteBatch()
    for extra in range(5):
        batch.put(b"m%06d.%d" % (number, extra), b"x")
    batch.delete_range(b"m%06d.3" % number, b"m%06d.4" % number)
    return batch


def transact(db: kvwal.Store, number: int) -> None:
    try:
        with db.transaction() as txn:
            txn[b"t"] = b"%d" % (int(txn.get(b"t", b"0")) + 1)
            txn[b"m%06d" % number] = b"x"
    except (kvwal.ConflictError, ReentrancyError):
        pass


WORK: dict[str, Callable[[kvwal.Store, int], object]] = {
    "put": lambda db, number: db.put(b"m%06d" % number, b"x"),
    "batch": lambda db, number: db.commit(batch_of(number)),
    "transaction": transact,
    "add": lambda db, number: db.add(b"n", 1),
    "scan": lambda db, number: (db.put(b"m%06d" % number, b"x"), list(db.scan(limit=5)), list(db.keys(limit=300))),
    "count": lambda db, number: (db.put(b"m%06d" % number, b"x"), len(db)),
    "snapshot": lambda db, number: [snapshot.get(b"m") for snapshot in [db.snapshot()]],
    "checkpoint": lambda db, number: db.checkpoint() if number % 20 == 0 else db.put(b"m%06d" % number, b"x"),
}


COMMITS = ("put", "batch", "transaction", "add")


@pytest.mark.parametrize("work", sorted(WORK))
@pytest.mark.usefixtures("often")
def test_a_put_of_a_finalizer_is_done_or_refused(work: str) -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        outcome = put_while_finalizers_put(db, 600, lambda number: WORK[work](db, number))
        if work in COMMITS:
            assert len(outcome.refused) < 30
        check_store(db)
        db.checkpoint()
        assert db.verify().ok


@pytest.mark.slow
@pytest.mark.parametrize("durability", ["commit", "os"])
@pytest.mark.usefixtures("often")
def test_ten_thousand_finalizers_that_put_during_commits(durability: str) -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, durability=durability, memtable_bytes=256 << 10) as db:  # type: ignore[arg-type]

        def work(number: int) -> None:
            WORK[COMMITS[number % 4]](db, number)

        outcome = put_while_finalizers_put(db, 10_000, work)
        assert len(outcome.refused) < 500
        returned = outcome.returned
    with kvwal.open("/kv", files=disk) as db:
        for key in returned:
            assert db[key] == key
        assert db.verify().ok


@pytest.mark.usefixtures("often")
def test_finalizers_that_put_in_many_threads_hang_no_thread(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s", durability="os", memtable_bytes=64 << 10) as db:
        logging.getLogger("kvwal").setLevel(logging.CRITICAL)
        outcome = Outcome(db)

        def work(thread: int) -> None:
            for number in range(400):
                Putting(outcome, thread * 1000 + number)
                db.put(b"m%d.%06d" % (thread, number), b"x")
                if number % 50 == 0:
                    list(db.scan(limit=10))

        try:
            run_threads(*(lambda thread=thread: work(thread) for thread in range(6)))
            await_finalizers(outcome, 2400)
        finally:
            logging.getLogger("kvwal").setLevel(logging.NOTSET)
        assert outcome.others == []
        for key in outcome.returned:
            assert db[key] == key
        assert len(db) == 2400 + len(outcome.returned)
