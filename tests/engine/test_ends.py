"""How a store ends whose close is interrupted: another thread goes on with it, and nothing is given back too early."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
from store_fixtures import DEADLINE_S, TINY, check_store, interrupted_at
from wrapped_files import Wrapped, WrappedFiles

import kvwal
from kvwal.testing import SimulatedDisk

# A segment is opened under a temporary name, and the disk goes on calling it so.
LOG = "/kv/[0s]*"


def open_on(disk: Any, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, **options})


def end_of(db: kvwal.Store) -> None:
    """Wait until the thread that closes it is done."""
    closer = db.engine._closer
    if closer is not None:
        closer.join(DEADLINE_S)
        assert not closer.is_alive()


def raises_once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
    """The first call of this method is interrupted as it begins."""
    method: Callable[..., Any] = getattr(owner, name)
    calls: list[None] = []

    def called(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise error
        return method(*args, **options)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize("how", ["reading", "writing"])
def test_a_close_that_is_interrupted_anywhere_is_ended_by_another_thread(how: str) -> None:
    elsewhere = 0
    for step in range(1, 3000):
        disk = SimulatedDisk()
        db = open_on(disk)
        db.put(b"a", b"1" * 3000)
        if how == "reading":
            db.close()
            db = kvwal.open("/kv", "r", files=disk)
        interruption = interrupted_at(step, db.close)
        elsewhere += db.engine._closer is not None
        end_of(db)
        if not db.closed:
            # It had not begun.
            db.close()
        db.close()
        with pytest.raises(kvwal.ClosedError):
            db.get(b"a")
        with open_on(disk) as again:
            assert dict(again) == {b"a": b"1" * 3000}, step
            check_store(again)
        if interruption is None:
            assert elsewhere > 20
            return
    raise AssertionError("there are more places than were tried")


class InterruptedFlush(Wrapped):
    """A file whose next flush is interrupted, each time that one is asked for."""

    asked: ClassVar[list[None]] = []

    def datasync(self) -> None:
        if self.asked:
            self.asked.pop()
            raise KeyboardInterrupt
        self.there.datasync()


@pytest.mark.parametrize("durability", ["os", "interval"])
@pytest.mark.parametrize("way", ["close", "with"])
def test_a_close_whose_flush_is_interrupted_has_another_thread_flush_and_let_go(durability: Any, way: str) -> None:
    disk = SimulatedDisk()
    db = open_on(WrappedFiles(disk, InterruptedFlush), durability=durability, background=True, sync_delay_s=600)
    db.put(b"a", b"1")
    InterruptedFlush.asked.append(None)
    with pytest.raises(KeyboardInterrupt), db if way == "with" else nullcontext():
        if way == "close":
            db.close()
    end_of(db)
    for _ in range(2):
        db.close()
    for found in (disk.crash(0), disk):
        with open_on(found) as again:
            assert dict(again) == {b"a": b"1"}
            check_store(again)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("place", ["flush", "behind the checkpoint"])
def test_a_flush_that_fails_in_the_other_thread_is_told_by_the_next_close(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    disk = SimulatedDisk()
    db = open_on(WrappedFiles(disk, InterruptedFlush), durability="os")
    db.put(b"a", b"1")
    disk.fail("datasync", path=LOG)
    if place == "flush":
        InterruptedFlush.asked.append(None)
    else:
        # It meets the failure, which a close is silent about until its end.
        monkeypatch.setattr(db.engine._checkpointer, "is_due_at_close", lambda size: True)
        raises_once(monkeypatch, db.engine.queue, "run", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        db.close()
    end_of(db)
    with pytest.raises(kvwal.PoisonedError):
        db.close()
    db.close()
    disk.heal()
    with open_on(disk) as again:
        check_store(again)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_another_thread_met_is_told_to_the_holder_that_closed_and_not_to_one_that_opens_anew() -> None:
    disk = SimulatedDisk()
    files = WrappedFiles(disk, InterruptedFlush)
    db = kvwal.shared("/kv", files=files, **TINY, background=False, durability="os")
    engine = db.engine
    db.put(b"a", b"1")
    disk.fail("datasync", path=LOG)
    InterruptedFlush.asked.append(None)
    with pytest.raises(KeyboardInterrupt):
        db.close()
    assert engine._closer is not None
    engine._closer.join(DEADLINE_S)
    disk.heal()
    with kvwal.shared("/kv", files=files, **TINY, background=False, durability="os") as again:
        check_store(again)
        with pytest.raises(kvwal.PoisonedError):
            db.close()
        db.close()
        again.put(b"b", b"1")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TimeoutError("by a handler"), ValueError("by another")])
def test_the_lock_of_the_store_is_held_until_a_commit_of_another_thread_is_over(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Else another process could open it, and both would write the same part of the log."""
    disk = SimulatedDisk()
    writes, may_end = threading.Event(), threading.Event()

    class Slow(Wrapped):
        def pwrite(self, data: Any, offset: int) -> None:
            if threading.current_thread().name == "other":
                writes.set()
                assert may_end.wait(DEADLINE_S)
            self.there.pwrite(data, offset)

    db = open_on(WrappedFiles(disk, Slow))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(db.put(b"t", b"1")), name="other")
    thread.start()
    assert writes.wait(DEADLINE_S)
    raises_once(monkeypatch, db.engine.queue, "run", error)
    with pytest.raises(type(error)):
        db.close()
    with pytest.raises(kvwal.ClosedError):
        db.put(b"late", b"1")
    with pytest.raises(kvwal.LockedError):
        open_on(disk)
    may_end.set()
    thread.join(DEADLINE_S)
    assert done == [1]
    end_of(db)
    with open_on(disk) as again:
        assert dict(again) == {b"t": b"1"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_fails_in_the_other_thread_as_well_is_tried_by_the_next_close(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    db.put(b"a", b"1")
    tried: list[threading.Thread] = []

    def fails(action: object) -> None:
        tried.append(threading.current_thread())
        raise ValueError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(db.engine.queue, "run", fails)
        for times in (2, 4):
            with pytest.raises(ValueError, match="a bug"):
                db.close()
            end_of(db)
            assert len(tried) == times
            assert len({*tried} - {threading.current_thread()}) == times // 2
    db.close()
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1"}


def test_a_checkpoint_that_ends_in_a_bug_is_not_begun_anew_by_the_other_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    db.put(b"a", b"1")
    checkpointer: Any = db.engine._checkpointer

    def fails() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(checkpointer, "is_due_at_close", lambda size: True)
    monkeypatch.setattr(checkpointer, "checkpoint", fails)
    with pytest.raises(ValueError, match="a bug"):
        db.close()
    end_of(db)
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1"}


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_close_that_is_left_as_its_thread_is_to_begin_is_ended_by_the_next_one(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    db.put(b"a", b"1")
    checkpointer: Any = db.engine._checkpointer
    for _ in range(times):
        with monkeypatch.context() as patched:
            raises_once(patched, checkpointer, "while_idle", KeyboardInterrupt())
            raises_once(patched, db.engine, "_close_elsewhere", KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                db.close()
        with pytest.raises(kvwal.LockedError):
            open_on(disk)
    db.close()
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1"}


def test_a_close_that_is_interrupted_where_no_thread_starts_is_ended_by_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    disk = SimulatedDisk()
    db = open_on(disk)
    db.put(b"a", b"1")
    checkpointer: Any = db.engine._checkpointer
    with monkeypatch.context() as patched:
        raises_once(patched, checkpointer, "while_idle", KeyboardInterrupt())
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(KeyboardInterrupt):
            db.close()
    db.close()
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1"}


def test_a_close_that_is_interrupted_while_it_waits_for_the_background_thread_closes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the store would be left open without that thread: no flush at "interval", no checkpoint."""
    disk = SimulatedDisk()
    db = open_on(disk, background=True, durability="interval")
    db.put(b"a", b"1")
    background: Any = db.engine._background
    raises_once(monkeypatch, background._thread, "join", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        db.close()
    end_of(db)
    assert db.closed
    with open_on(disk.crash(0)) as again:
        assert dict(again) == {b"a": b"1"}


def test_a_store_that_is_dropped_after_an_interrupted_close_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    db.put(b"a", b"1")
    # They keep what they raise, and that keeps the store.
    with monkeypatch.context() as patched:
        raises_once(patched, db.engine.queue, "run", KeyboardInterrupt())
        raises_once(patched, db.engine, "_close_elsewhere", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            db.close()
    with pytest.raises(kvwal.LockedError):
        open_on(disk)
    # As its finalizer does.
    del db
    gc.collect()
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1"}


def test_what_fails_in_the_last_checkpoint_is_told_once_all_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    db = open_on(disk)
    db.put(b"a", b"1" * 100_000)
    checkpointer: Any = db.engine._checkpointer
    monkeypatch.setattr(checkpointer, "is_due_at_close", lambda size: True)
    raises_once(monkeypatch, checkpointer, "checkpoint", kvwal.CorruptionError("data", 4096, "a page is damaged"))
    with pytest.raises(kvwal.CorruptionError):
        db.close()
    assert db.engine._closer is None
    with open_on(disk) as again:
        assert dict(again) == {b"a": b"1" * 100_000}
