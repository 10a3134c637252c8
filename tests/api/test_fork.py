"""After a fork: the child gets ForkedError from everything it inherited, and the parent's store is unharmed."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import DEADLINE_S, TINY, problems_of, wait_until

import kvwal
from kvwal import ForkedError, LockedError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


def without_hooks() -> int:
    """Fork as a server written in C does, so that the interpreter knows nothing of it."""
    pid: int = ctypes.PyDLL(None).fork()
    return pid


def in_child(work: Callable[[], None], fork: Callable[[], int] = os.fork) -> None:
    """Run it in a forked child; fail with the child's traceback, and if it does not come to its end."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = fork()
    if not pid:
        os.close(reading)
        try:
            work()
            os.write(writing, b"well")
        except BaseException:  # noqa: BLE001 - it is shown by the parent
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    killer = threading.Timer(DEADLINE_S, lambda: os.kill(pid, 9))
    killer.start()
    said = b""
    while part := os.read(reading, 4096):
        said += part
    killer.cancel()
    os.close(reading)
    os.waitpid(pid, 0)
    assert said == b"well", said.decode() or "the child hung"


@pytest.fixture
def db(tmp_path: Path) -> Iterator[kvwal.Store]:
    with kvwal.open(tmp_path / "a.kv", **TINY) as store:
        store.update({b"%04d" % number: b"v" * 30 for number in range(1000)})
        store.checkpoint()
        store[b"a"] = b"1"
        yield store


def calls(db: kvwal.Store, snapshot: Any, txn: Any, iterator: Any) -> list[Any]:
    return [
        lambda: db.get(b"a"),
        lambda: db[b"a"],
        lambda: db.get_many([b"a"]),
        lambda: b"a" in db,
        lambda: len(db),
        lambda: list(db),
        lambda: db.first(),
        lambda: db.put(b"a", b"2"),
        lambda: db.delete(b"a"),
        lambda: db.clear(),
        lambda: db.update({b"a": b"2"}),
        lambda: db.pop(b"a"),
        lambda: db.snapshot(),
        lambda: db.transaction(),
        lambda: db.run(lambda t: t.put(b"a", b"2")),
        lambda: db.sync(),
        lambda: db.checkpoint(),
        lambda: db.verify(),
        lambda: db.stats(),
        lambda: db.pins(),
        lambda: list(db.history()),
        lambda: snapshot[b"a"],
        lambda: list(snapshot),
        lambda: txn[b"a"],
        lambda: txn.commit(),
        lambda: [*iterator],
    ]


def test_everything_inherited_raises_forked_error(db: kvwal.Store) -> None:
    snapshot, txn, iterator = db.snapshot(), db.transaction(), db.scan()
    next(iterator)
    txn[b"b"] = b"from the child"

    def child() -> None:
        for number, call in enumerate(calls(db, snapshot, txn, iterator)):
            try:
                result = call()
            except ForkedError:
                continue
            raise AssertionError(f"call {number} gave {result!r}")
        db.close()
        snapshot.close()

    in_child(child)
    assert db[b"a"] == b"1"
    assert b"b" not in db
    txn.commit()
    assert db[b"b"] == b"from the child", "the parent's transaction is its own"
    assert len(list(iterator)) == 1000
    db.checkpoint()
    assert problems_of(db) == []


def test_the_parents_lock_outlives_the_child(db: kvwal.Store) -> None:
    def child() -> None:
        try:
            kvwal.open(db.path)
        except LockedError:
            return
        raise AssertionError("the child could open the parent's store")

    in_child(child)
    db[b"still"] = b"mine"
    with pytest.raises(LockedError):
        kvwal.open(db.path)


def test_a_child_keeps_no_file_of_the_parent_open(db: kvwal.Store, tmp_path: Path) -> None:
    """Nor what an iterator reads, or a thread just makes: their space is to be free when the parent removes them."""
    db.update({b"%d" % number: b"x" * 1000 for number in range(100)})
    db.checkpoint()
    db[b"k"] = b"v"
    reading = [db.changes(0), db.commits(), db.scan(), db.versions(b"3")]
    for each in reading:
        next(each)
    made = db.engine.upkeep.directory.open("made.tmp", create=True)

    def no_file_is_open() -> None:
        found = []
        for fd in os.listdir("/proc/self/fd"):
            # One was that of the listing.
            with suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/self/fd/{fd}"))
        assert not [path for path in found if path.startswith(str(tmp_path))]
        for each in reading[:2]:
            with pytest.raises(ForkedError):
                list(each)
        for call in (made.size, lambda: made.pread(1, 0), made.identity):
            with pytest.raises(ForkedError):
                call()

    try:
        in_child(no_file_is_open)
        made.pwrite(b"1", 0)
        assert len(list(reading[0])) > 90
    finally:
        made.close()
        for each in reading:
            each.close() if hasattr(each, "close") else None


def test_a_child_opens_a_store_of_its_own(db: kvwal.Store, tmp_path: Path) -> None:
    def child() -> None:
        with kvwal.open(tmp_path / "child.kv") as own:
            own[b"a"] = b"child"
            own.checkpoint()

    in_child(child)
    with kvwal.open(tmp_path / "child.kv") as own:
        assert own[b"a"] == b"child"


@pytest.mark.parametrize("lock", ["state", "order", "queue", "checkpoint", "close", "leader"])
def test_locks_that_other_threads_held_do_not_hang_the_child(db: kvwal.Store, lock: str) -> None:
    """As if a thread were inside each of them at the moment of the fork."""
    snapshot, txn, iterator = db.snapshot(), db.transaction(), db.scan()
    next(iterator)
    txn[b"b"] = b""
    held: Any = {
        "state": db.engine.state.lock,
        "order": db.engine.state.version.memtable.order.lock,
        "queue": db.engine.queue.queue_lock,
        "checkpoint": db.engine._checkpointer.lock if db.engine._checkpointer else None,
        "close": db.engine.lock,
        "leader": None,
    }[lock]
    took, over = threading.Event(), threading.Event()

    def hold() -> None:
        if held is None:
            db.engine.queue.run(lambda: (took.set(), over.wait(DEADLINE_S)))
            return
        with held:
            took.set()
            over.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert took.wait(DEADLINE_S)

    def child() -> None:
        for number, call in enumerate(calls(db, snapshot, txn, iterator)):
            try:
                result = call()
            except ForkedError:
                continue
            raise AssertionError(f"call {number} gave {result!r}")
        db.close()

    try:
        in_child(child)
    finally:
        over.set()
        thread.join()
    assert db[b"a"] == b"1"
    db[b"after"] = b"1"


def test_a_scan_that_had_begun_is_refused_in_the_child_whatever_a_thread_held(db: kvwal.Store) -> None:
    db.update({b"%04d" % number: b"" for number in range(3000)})
    scan = db.scan()
    next(scan)
    took, over = threading.Event(), threading.Event()

    def hold() -> None:
        with db.engine.state.locks()[1]:
            took.set()
            over.wait(DEADLINE_S)

    thread = threading.Thread(target=hold)
    thread.start()
    assert took.wait(DEADLINE_S)

    def child() -> None:
        with pytest.raises(ForkedError):
            list(scan)

    try:
        in_child(child)
    finally:
        over.set()
        thread.join()
    assert len(list(scan)) == len(db) - 1


def test_a_child_forked_while_threads_write_does_no_harm(db: kvwal.Store) -> None:
    over = threading.Event()
    written: list[bytes] = []

    def write(index: int) -> None:
        number = 0
        while not over.is_set():
            key = b"t%d.%06d" % (index, number)
            db.put(key, b"x" * 100, durability="os")
            written.append(key)
            number += 1

    threads = [threading.Thread(target=write, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()

    def child() -> None:
        try:
            db.put(b"child", b"1")
        except ForkedError:
            return
        raise AssertionError("a write in the child")

    try:
        for _ in range(10):
            in_child(child)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert b"child" not in db
    assert all(key in db for key in written)
    db.checkpoint()
    assert problems_of(db) == []
    path = db.path
    db.close()
    with kvwal.open(path) as again:
        assert len(again) == 1001 + len(written)


# -- a fork that the interpreter does not know of ------------------------------------------------


def wait_for_sleep() -> None:
    """No other thread is at work: a child would wait for ever for its locks, and for the interpreter's."""
    seen: list[Any] = []

    def all_asleep() -> bool:
        frames = sys._current_frames().items()
        places = [(ident, id(frame), frame.f_lasti) for ident, frame in frames if ident != threading.get_ident()]
        if seen and seen[-1] != places:
            seen.clear()
        seen.append(places)
        return len(seen) > 100

    wait_until(all_asleep, "the sleep of all threads")


@pytest.mark.parametrize("durability", ["commit", "interval", "os"])
@pytest.mark.parametrize("background", [False, True])
def test_a_child_that_the_interpreter_does_not_know_of_writes_nothing(
    tmp_path: Path, durability: Any, background: bool
) -> None:
    db = kvwal.open(tmp_path / "a.kv", **{**TINY, "durability": durability, "background": background})
    db[b"a"] = b"1"
    writes: list[Callable[[], object]] = [
        lambda: db.put(b"child", b"1"),
        lambda: db.delete(b"a"),
        lambda: db.update({b"child": b"1", b"a": b"2"}),
        lambda: db.clear(),
        lambda: db.run(lambda txn: txn.put(b"child", b"1")),
        lambda: db.put(b"child", b"x" * 100_000),
        lambda: db.put(b"child", b"1", durability="commit"),
    ]

    def child() -> None:
        for number, write in enumerate(writes):
            try:
                write()
            except ForkedError:
                continue
            raise AssertionError(f"write {number} was acknowledged")

    wait_for_sleep()
    in_child(child, without_hooks)
    for number in range(50):
        db[b"parent %d" % number] = b"1" * 1000
    assert problems_of(db) == []
    db.close()
    with kvwal.open(tmp_path / "a.kv") as again:
        assert b"child" not in again
        assert again[b"a"] == b"1"
        assert len(again) == 51


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("wrote", [False, True])
def test_a_child_that_the_interpreter_does_not_know_of_comes_to_its_end(
    tmp_path: Path, background: bool, wrote: bool
) -> None:
    db = kvwal.open(tmp_path / "a.kv", **{**TINY, "background": background})
    db[b"a"] = b"1"

    def child() -> None:
        if wrote:
            with pytest.raises(ForkedError):
                db[b"child"] = b"1"
        db.close()
        with kvwal.open(tmp_path / "own.kv") as own:
            own[b"a"] = b"1"

    wait_for_sleep()
    in_child(child, without_hooks)
    with pytest.raises(LockedError):
        kvwal.open(tmp_path / "a.kv")
    db[b"b"] = b"2"
    db.close()
    with kvwal.open(tmp_path / "a.kv") as again:
        assert dict(again) == {b"a": b"1", b"b": b"2"}
