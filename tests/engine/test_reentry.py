"""A call from within another one, by a signal handler or a finalizer, that would wait for a thread that waits for it.

The thread of the test is in a section of one lock, as it would be if it were interrupted there. Another thread leads,
or makes a checkpoint, and goes on when the call is over: so a call that waits for it never ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from store_fixtures import DEADLINE_S, check_store, wait_until

import kvwal
from kvwal.engine.background import Job
from kvwal.errors import ReentrancyError
from kvwal.locks import Lock, locked
from kvwal.testing import SimulatedDisk

LOCKS: dict[str, Callable[[kvwal.Store], Lock]] = {
    "state": lambda db: db.engine.state.lock,
    "queue": lambda db: db.engine.queue.queue_lock,
    "memtable": lambda db: db.engine.state.version.memtable.order.lock,
    "frozen": lambda db: db.engine.state.version.frozen.order.lock,  # type: ignore[union-attr]
    "reserve": lambda db: db.engine.pressure.lock,
    "lead": lambda db: db.engine.queue.lock,
}
COMMITS: dict[str, Callable[[kvwal.Store], object]] = {
    "put": lambda db: db.put(b"a", b"2"),
    "delete": lambda db: db.delete(b"a"),
    "update": lambda db: db.update({b"a": b"2", b"b": b"2"}),
    "popitem": lambda db: db.popitem(),
    "add": lambda db: db.add(b"n", 1),
    "run": lambda db: db.run(lambda txn: txn.put(b"a", b"2")),
    "sync": lambda db: db.sync(),
    "history": lambda db: list(db.history()),
}
UPKEEP: dict[str, Callable[[kvwal.Store], object]] = {
    "checkpoint": lambda db: db.checkpoint(),
    "compact": lambda db: db.compact(),
    "verify": lambda db: db.verify(),
}


class Section:
    def __init__(self, lock: Lock) -> None:
        self.lock = lock

    @locked
    def call(self, function: Callable[[], object]) -> object:
        return function()


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as store:
        yield store


@contextmanager
def another_thread(hold: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """A thread that holds something, from `hold(wait)` on until the block is over."""
    held, over = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        assert over.wait(DEADLINE_S), "the call waits"

    thread = threading.Thread(target=hold, args=(wait,), daemon=True)
    thread.start()
    assert held.wait(DEADLINE_S)
    try:
        yield
    finally:
        over.set()
        thread.join(DEADLINE_S)


def refused_within(db: kvwal.Store, lock: str, call: Callable[[kvwal.Store], object]) -> None:
    def refused() -> None:
        with pytest.raises(ReentrancyError):
            call(db)

    Section(LOCKS[lock](db)).call(refused)


def check(db: kvwal.Store) -> None:
    check_store(db)
    db[b"c"] = b"3"
    assert dict(db) == {b"a": b"1", b"b": b"1", b"c": b"3"}
    db.checkpoint()
    assert db.verify().ok


@pytest.mark.parametrize("call", COMMITS)
@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock != "lead"])
def test_a_commit_from_a_section_that_the_leader_may_wait_for_is_refused(
    db: kvwal.Store, lock: str, call: str
) -> None:
    db.update({b"a": b"1", b"b": b"1"})
    if lock == "frozen":
        db.engine._succession.freeze()
    with another_thread(lambda wait: db.engine.queue.run(wait)):
        refused_within(db, lock, COMMITS[call])
    check(db)


@pytest.mark.parametrize("call", UPKEEP)
@pytest.mark.parametrize("lock", LOCKS)
def test_upkeep_from_a_section_that_a_checkpoint_may_wait_for_is_refused(
    db: kvwal.Store, lock: str, call: str
) -> None:
    db.update({b"a": b"1", b"b": b"1"})
    if lock == "frozen":
        db.engine._succession.freeze()
    checkpointer = db.engine._checkpointer
    assert checkpointer is not None
    with another_thread(lambda wait: checkpointer.while_idle(wait)):
        refused_within(db, lock, UPKEEP[call])
    check(db)


def test_in_a_section_of_the_state_no_other_lock_is_taken(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a thread may wait for it in any section."""
    db.update({b"a": b"1", b"b": b"1"})
    succession = db.engine._succession
    owned_by_another = [lock(db) for name, lock in LOCKS.items() if name not in ("state", "frozen")]

    def hold(wait: Callable[[], None]) -> None:
        for lock in owned_by_another:
            lock.acquire()
        try:
            wait()
        finally:
            for lock in owned_by_another:
                lock.release()

    with another_thread(hold):
        succession.freeze()
        succession.install(db.engine._pages.tree(db.engine._pages.meta), done=False)
        succession.release_pages()
        with db.snapshot() as snapshot:
            assert snapshot[b"a"] == b"1"
        assert db[b"b"] == b"1"
        assert db.engine._pages.pins.counts()


def test_a_finalizer_on_the_background_thread_does_not_wait_for_it() -> None:
    """Commits that must wait for a checkpoint make it themselves there."""
    with kvwal.open("/kv", files=SimulatedDisk(), durability="os", memtable_bytes=1 << 16) as db:
        # As after a checkpoint of another thread that met a full disk.
        db[b"000"] = b""
        db.engine._succession.freeze()
        background = db.engine._background
        assert background is not None
        done: list[int] = []

        def put() -> None:
            if not done:
                for number in range(1000):
                    db[b"%03d" % number] = bytes(1000)
                done.append(1)

        background._jobs = [Job("a finalizer", lambda: True, put)]
        background.wake()
        wait_until(lambda: bool(done) or background.failure is not None)
        assert background.failure is None
        assert len(db) == 1000
