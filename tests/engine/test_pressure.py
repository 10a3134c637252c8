"""Commits that meet a full memtable or a full disk: they wait, or they are refused, and never for ever."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from store_fixtures import check_store, interrupted_at, run_threads
from wrapped_files import Wrapped, WrappedFiles

import kvwal
from kvwal import aio
from kvwal.engine.checkpoint import merge_into
from kvwal.engine.expirer import Expirer
from kvwal.engine.pressure import Reserve
from kvwal.errors import ReentrancyError, closed
from kvwal.files.names import RESERVE
from kvwal.options import RESERVE_BYTES
from kvwal.testing import SimulatedDisk

SMALL: dict[str, Any] = {"memtable_bytes": 16 << 10, "durability": "os"}


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk(seed=3)


def ends(function: Any) -> bool:
    """Whether it comes to its end in a thread of its own, which may be left behind."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(15)
    return not thread.is_alive()


@pytest.mark.parametrize("left", [0, 4096])
def test_the_reserve_is_whole_after_a_part_of_it_was_left(disk: SimulatedDisk, left: int) -> None:
    with kvwal.open("/kv", files=disk, background=False):
        pass
    directory = disk.open_directory("/kv")
    directory.unlink(RESERVE)
    file = directory.open(RESERVE, create=True, mode=0o600)
    file.truncate(left)
    file.close()
    with kvwal.open("/kv", files=disk, background=False):
        file = directory.open(RESERVE)
        assert file.size() == RESERVE_BYTES
        file.close()


def test_the_reserve_is_whole_after_a_power_cut(disk: SimulatedDisk) -> None:
    disk.make_directory("/r")
    directory = disk.open_directory("/r")
    directory.sync_parent()
    assert Reserve(directory, 0o600).hold()
    directory.sync()
    file = disk.crash(0).open_directory("/r").open(RESERVE)
    assert file.size() == RESERVE_BYTES


def test_a_reserve_that_cannot_be_held_leaves_no_empty_file(disk: SimulatedDisk) -> None:
    disk.make_directory("/r")
    directory = disk.open_directory("/r")
    disk.capacity = 1 << 20
    reserve = Reserve(directory, 0o600)
    assert not reserve.hold()
    assert directory.kind(RESERVE) is None
    disk.capacity = None
    assert reserve.hold()
    assert reserve.hold()
    # What cannot be removed is held still, and not made anew.
    disk.fail("unlink", error=errno.ENOSPC)
    disk.fail("allocate", error=errno.ENOSPC, forever=True)
    assert not reserve.release()
    assert reserve.hold()
    disk.heal()
    assert reserve.release()
    assert not reserve.release()


def test_a_reserve_whose_release_is_interrupted_anywhere_is_held_or_can_be_held_again() -> None:
    for step in range(1, 1000):
        disk = SimulatedDisk()
        disk.make_directory("/r")
        directory = disk.open_directory("/r")
        reserve = Reserve(directory, 0o600)
        assert reserve.hold()
        interruption = interrupted_at(step, reserve.release)
        if directory.kind(RESERVE) is None:
            disk.capacity = 0
            assert not reserve.hold(), step
            disk.capacity = None
        assert reserve.hold(), step
        assert directory.kind(RESERVE) == "file", step
        if interruption is None:
            return
    raise AssertionError("there are more places than were tried")


def test_a_commit_that_waits_for_memory_hears_that_the_store_is_closed(disk: SimulatedDisk) -> None:
    db = kvwal.open("/kv", files=disk, background=False, **SMALL)
    db.put(b"a", b"x" * 100_000)
    pressure: Any = db.engine.pressure
    waited: list[float] = []

    class Relief:
        """A background thread that has ended, so that no checkpoint comes."""

        def __getattr__(self, name: str) -> Any:
            return lambda: None

    pressure.relief = Relief()
    pressure._is_stalled = lambda: True

    def wait(timeout_s: float) -> None:
        waited.append(timeout_s)
        db.engine.state.refuse(closed)

    pressure._wait = wait
    with pytest.raises(kvwal.ClosedError):
        db.put(b"b", b"1")
    assert len(waited) == 1
    del pressure._is_stalled
    db.engine.abandon()


def test_writers_wait_for_a_checkpoint_when_memory_is_short(disk: SimulatedDisk) -> None:
    """Eight threads that write as fast as they can hold memory to about twice its budget, and all end."""
    budget = 2 << 20
    with kvwal.open("/kv", files=disk, memtable_bytes=budget, durability="os") as db:
        largest = 0

        def write(letter: int) -> None:
            nonlocal largest
            for number in range(1500):
                db.put(b"%c%05d" % (letter, number), b"x" * 1000)
                largest = max(largest, db.engine.state.version.memtable.bytes_used)

        run_threads(*(lambda letter=letter: write(letter) for letter in b"abcdefgh"))
        assert len(db) == 12_000
        # How far it gets before the background thread has its turn is a matter of the system's scheduler.
        assert largest <= 3 * budget
        assert db.verify().ok


def test_without_a_background_thread_a_full_memtable_is_checkpointed_by_the_commit(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False, **SMALL) as db:
        largest = 0
        for number in range(1000):
            db.put(b"%05d" % number, b"x" * 100)
            largest = max(largest, db.engine.state.version.memtable.bytes_used)
        assert largest <= SMALL["memtable_bytes"] + 400
        assert len(db) == 1000
        check_store(db)


ALONE: dict[str, Any] = {"background": False, "durability": "os", "segment_bytes": 16 << 10}
GROWING: dict[str, Callable[[kvwal.Store, int], object]] = {
    "put": lambda db, number: db.put(b"k", b"%01000d" % number),
    "update": lambda db, number: db.update({b"k": b"%01000d" % number, b"l": b""}),
    "add": lambda db, number: db.add(b"n" * 1000, 1),
    "table": lambda db, number: db.table("t", str, bytes).put("k", b"%01000d" % number),
    "delete": lambda db, number: db.delete_range(b"a" * 500, b"b" * 500),
}


@pytest.mark.parametrize("way", GROWING)
def test_without_a_background_thread_commits_keep_the_log_short(disk: SimulatedDisk, way: str) -> None:
    """What overwrites few keys never fills the memory."""
    with kvwal.open("/kv", files=disk, checkpoint_log_bytes=64 << 10, keep_history_bytes=0, **ALONE) as db:
        largest = 0
        for number in range(500):
            GROWING[way](db, number)
            largest = max(largest, db.stats().log_bytes)
        # What was written since the older generation, in whole segments.
        assert largest <= 5 * 64 << 10
        assert db.stats().generation <= 12
        check_store(db)


@pytest.mark.parametrize("way", ["interrupted", "full disk", "damage"])
def test_without_a_background_thread_the_log_is_short_again_after_a_checkpoint_that_failed(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What it had frozen is taken up again; and no commit fails for it."""
    failure: BaseException = {
        "interrupted": KeyboardInterrupt(),
        "full disk": kvwal.DiskFullError("the disk is full"),
        "damage": kvwal.CorruptionError("data", 0, "a page that no commit needs"),
    }[way]
    with kvwal.open("/kv", files=disk, checkpoint_log_bytes=64 << 10, keep_history_bytes=0, **ALONE) as db:

        def fail(*args: Any, **more: Any) -> Any:
            failed.append(1)
            raise failure

        failed: list[int] = []
        with monkeypatch.context() as patched:
            patched.setattr("kvwal.engine.checkpoint.merge_into", fail)
            for number in range(200):
                if way == "interrupted" and not failed:
                    with suppress(KeyboardInterrupt):
                        db.put(b"k", b"%01000d" % number)
                elif not failed:
                    db.put(b"k", b"%01000d" % number)
        assert failed
        largest = 0
        for number in range(500):
            db.put(b"k", b"%01000d" % number)
            if number > 100:
                largest = max(largest, db.stats().log_bytes)
        assert largest <= 5 * 64 << 10
        check_store(db)


def test_without_a_background_thread_tasks_keep_the_log_short(disk: SimulatedDisk) -> None:
    async def main() -> None:
        async with aio.open("/kv", files=disk, checkpoint_log_bytes=64 << 10, keep_history_bytes=0, **ALONE) as db:
            for number in range(500):
                await db.put(b"k", b"%01000d" % number)
            assert db.store.stats().log_bytes <= 5 * 64 << 10

    asyncio.run(main())


def test_without_a_background_thread_history_has_its_limit(disk: SimulatedDisk) -> None:
    limits: dict[str, Any] = {"keep_history_bytes": 256 << 10, "history_base_bytes": 0}
    with kvwal.open("/kv", files=disk, checkpoint_log_bytes=64 << 10, **limits, **ALONE) as db:
        for number in range(3000):
            db.put(b"%d" % (number % 4), b"x" * 1000)
        window = db.window
        assert 0 < window.oldest < window.newest
        # Beside what is kept for the past, what a recovery from the older generation needs.
        assert db.stats().log_bytes <= (256 << 10) + (5 * 64 << 10)
        check_store(db)


def test_without_a_background_thread_a_checkpoint_comes_by_age(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, checkpoint_interval_s=60, keep_history_bytes=0, **ALONE) as db:
        generation = db.stats().generation
        for _ in range(3):
            for number in range(50):
                db.put(b"k", b"%01000d" % number)
            assert db.stats().generation == generation
            disk.pass_time(61)
            for number in range(50):
                db.put(b"k", b"%01000d" % number)
            generation += 1
            assert db.stats().generation == generation
        check_store(db)


@pytest.mark.parametrize("failure", [None, kvwal.DiskFullError("full"), kvwal.CorruptionError("data", 0, "a page")])
def test_without_a_background_thread_commits_remove_what_has_expired(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch, failure: Exception | None
) -> None:
    """Some of it each time, and none of them fails for it."""
    with kvwal.open("/kv", files=disk, keep_history_bytes=0, **ALONE) as db:
        for number in range(2000):
            db.put(b"%d" % number, b"", expire_s=60)
        disk.pass_time(61)
        if failure is not None:

            def fail(expirer: Expirer) -> bool:
                raise failure

            with monkeypatch.context() as patched:
                patched.setattr(Expirer, "remove", fail)
                for number in range(50):
                    db.put(b"k", b"%01000d" % number)
        assert db.stats().expiry_rows == 2000
        for number in range(50):
            db.put(b"k", b"%01000d" % number)
        assert db.stats().expiry_rows == 0
        assert list(db) == [b"k"]
        removed = [change for change in db.changes(0) if change.kind == "expire"]
        assert len(removed) == 2000
        check_store(db)


def test_without_a_background_thread_most_commits_remove_nothing(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is due, and however slow it is."""
    steps: list[float] = []

    def remove(expirer: Expirer) -> bool:
        steps.append(disk.monotonic_s())
        disk.pass_time(0.004)
        return True

    with kvwal.open("/kv", files=disk, keep_history_bytes=0, **ALONE) as db:
        db.put(b"e", b"", expire_s=60)
        disk.pass_time(61)
        monkeypatch.setattr(Expirer, "remove", remove)
        for number in range(100):
            db.put(b"k", b"%016000d" % number)
            disk.pass_time(0.01)
    assert 0 < len(steps) <= 3 * (1 + 100 * 0.022 / 0.1)


def test_without_a_background_thread_the_others_commit_while_one_makes_the_checkpoint(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.open("/kv", files=disk, checkpoint_log_bytes=64 << 10, **ALONE) as db:
        during: list[bool] = []

        def merge(*args: Any, **more: Any) -> Any:
            during.append(ends(lambda: db.put(b"other", b"1")))
            return merge_into(*args, **more)

        monkeypatch.setattr("kvwal.engine.checkpoint.merge_into", merge)
        for number in range(100):
            db.put(b"%d" % number, b"x" * 1000)
        assert during == [True]
        assert db[b"other"] == b"1"
        check_store(db)


def test_without_a_background_thread_a_full_disk_takes_deletes_though_the_log_is_long(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, checkpoint_log_bytes=64 << 10, keep_history_bytes=0, **ALONE) as db:
        number = 0
        disk.capacity = 6 << 20
        with pytest.raises(kvwal.DiskFullError):
            while True:
                db.put(b"%06d" % number, b"x" * 2000)
                number += 1
        for key in list(db):
            db.delete(key)
        db.put(b"again", b"x")
        assert dict(db) == {b"again": b"x"}
        assert db.verify().ok


class InCheckpoint:
    """Calls a function once, from within a checkpoint of this thread, as a signal handler would."""

    def __init__(self, disk: SimulatedDisk, function: Any) -> None:
        self._disk = disk
        self._function = function
        self._thread = threading.get_ident()
        self.called = 0
        disk.watcher = self._look

    def _look(self, operation: Any) -> None:
        # A write to the pages: the checkpoint is in its middle.
        if "data" in str(operation) and threading.get_ident() == self._thread and not self.called:
            self.called += 1
            self._disk.watcher = None
            self._function()


@pytest.mark.parametrize("background", [False, True])
def test_a_handler_that_puts_much_during_a_checkpoint_of_its_own_thread_does_not_wait_for_it(
    disk: SimulatedDisk, background: bool
) -> None:
    """At twice the budget it would have to wait for the checkpoint that it has interrupted."""
    put: list[bytes] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        db = kvwal.open("/kv", files=disk, background=background, checkpoint_interval_s=1e9, **SMALL)
        for number in range(20):
            db.put(b"first%05d" % number, b"x" * 100)

        def handler() -> None:
            for number in range(400):
                try:
                    db.put(b"nested%05d" % number, b"x" * 100)
                    put.append(b"nested%05d" % number)
                except kvwal.Error as error:
                    errors.append(error)

        watched = InCheckpoint(disk, handler)
        db.checkpoint()
        assert watched.called
        for key in put:
            assert db[key] == b"x" * 100
        assert len(db) == 20 + len(put)
        db.checkpoint()
        assert db.verify().ok
        db.close()
        done.set()

    assert ends(work), "the nested put waits for its own thread"
    assert done.is_set()
    assert all(isinstance(error, ReentrancyError) for error in errors)
    assert len(put) + len(errors) == 400


def test_a_full_disk_refuses_puts_and_takes_deletes_until_there_is_room(disk: SimulatedDisk) -> None:
    with kvwal.open("/kv", files=disk, background=False, segment_bytes=64 << 10, **SMALL) as db:
        number = 0
        disk.capacity = 12 << 20
        with pytest.raises(kvwal.DiskFullError):
            while True:
                db.put(b"%06d" % number, b"x" * 2000)
                number += 1
        data = dict(db)
        assert len(data) >= number
        for key in list(data):
            db.delete(key)
        assert len(db) == 0
        db.put(b"again", b"x")
        assert dict(db) == {b"again": b"x"}
        assert db.verify().ok


def test_a_commit_is_woken_when_the_checkpoint_it_waits_for_fails(disk: SimulatedDisk) -> None:
    """It hears why, and does not wait for a checkpoint that will not come."""
    with kvwal.open("/kv", files=disk, **SMALL) as db:
        db.put(b"a", b"x" * 10_000)
        disk.capacity = disk.used_bytes() + (1 << 16)
        failures: list[BaseException] = []

        def write() -> None:
            try:
                for number in range(3000):
                    db.put(b"%05d" % number, b"x" * 300)
            except kvwal.Error as error:
                failures.append(error)

        run_threads(write, write)
        assert failures
        assert all(isinstance(error, kvwal.DiskFullError) for error in failures)
        disk.capacity = None
        # A put hears what failed last, and has a checkpoint made: without another call, the next ones go on.
        while b"after" not in db:
            with suppress(kvwal.DiskFullError):
                db.put(b"after", b"1")
        db.checkpoint()
        assert db.verify().ok


def test_the_interval_between_relief_and_pressure_is_never_missed(disk: SimulatedDisk, rng: Random) -> None:
    """`is_on` is put down before memory is looked at: a commit that sets it meanwhile is not lost."""
    with kvwal.open("/kv", files=disk, background=False, **SMALL) as db:
        pressure = db.engine.pressure
        for number in range(600):
            db.put(b"%06d" % rng.randrange(1000), b"x" * rng.choice([1, 500, 5000]))
            assert not pressure.is_full() or pressure.is_on
            if number % 50 == 0:
                db.delete_range(b"%06d" % rng.randrange(1000), None)
        check_store(db)


@pytest.fixture(autouse=True)
def _no_watcher(disk: SimulatedDisk) -> Iterator[None]:
    yield
    disk.watcher = None


@pytest.mark.parametrize("left", [None, 0, RESERVE_BYTES - 1, RESERVE_BYTES])
def test_a_reserve_that_is_whole_costs_an_open_no_flush(left: int | None) -> None:
    flushed: list[str] = []

    class Watched(Wrapped):
        def sync(self) -> None:
            flushed.append(self.name)
            self.there.sync()

    disk = SimulatedDisk()
    disk.make_directory("/s")
    files = WrappedFiles(disk, Watched)
    if left is not None:
        file = disk.open_directory("/s").open(RESERVE, create=True, mode=0o600)
        file.allocate(0, left)
        file.close()
    assert Reserve(files.open_directory("/s"), 0o600).hold()
    assert flushed == ([] if left == RESERVE_BYTES else [RESERVE])
    # Again it is made sure of that the space is there: a copy of the store may have a hole in its place.
    asked: list[tuple[int, int]] = []

    class Asked(Wrapped):
        def allocate(self, offset: int, size: int) -> None:
            asked.append((offset, size))
            self.there.allocate(offset, size)

    assert Reserve(WrappedFiles(disk, Asked).open_directory("/s"), 0o600).hold()
    assert asked == [(0, RESERVE_BYTES)]
