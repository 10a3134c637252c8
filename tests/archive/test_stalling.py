"""`on_behind="stall"`: commits wait for the archive when it is behind, outside of the queue, and never for ever."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from archive_fixtures import OPTIONS, Gated, Writer, archiver_of, check_all, held_of
from store_fixtures import run_threads

import kvwal
import kvwal.aio
from kvwal.backup.port import DirectoryDestination
from kvwal.errors import ArchiveBehindError, BackupDestinationError, ClosedError, DiskFullError, ReentrancyError
from kvwal.events import Listener, Stall
from kvwal.log import sealed_beyond
from kvwal.testing import SimulatedDisk

MOST = 40_000
VALUE = b"v" * 2000


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[Any]:
    with kvwal.open("/kv", files=disk, **OPTIONS) as db:
        yield db


@pytest.fixture
def place(disk: SimulatedDisk) -> Iterator[Gated]:
    place = Gated(DirectoryDestination("/b", files=disk))
    yield place
    place.open.set()


def stalling(db: Any, place: Any, **more: Any) -> kvwal.Archive:
    more = {"rpo_s": 3600, "max_behind_bytes": MOST, **more}
    return kvwal.archive(db, place, on_behind="stall", **more)


def is_behind(db: Any) -> bool:
    return bool(db.engine.pressure.archives.is_behind())


def begun(db: Any, place: Gated) -> kvwal.Archive:
    """One that has put its first base."""
    archive = stalling(db, place)
    assert archive.flush(20)
    return archive


def fill(db: Any) -> None:
    """Commit until the next one would wait."""
    while not is_behind(db):
        db[b"k"] = VALUE


class Waiting:
    """A commit in a thread of its own, and how it ended."""

    def __init__(self, db: Any, value: bytes = b"waited") -> None:
        self.error: BaseException | None = None
        self._commit = lambda: db.put(b"k", value)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._commit()
        except Exception as error:  # noqa: BLE001  # looked at by the test
            self.error = error

    def is_waiting(self) -> bool:
        self.thread.join(0.1)
        return self.thread.is_alive()

    def ended(self) -> BaseException | None:
        self.thread.join(20)
        assert not self.thread.is_alive(), "it waits for ever"
        return self.error


def test_writers_wait_until_the_archive_goes_on_and_there_is_no_gap(db: Any, place: Gated) -> None:
    """Without it the hold is dropped at the limit, and commits go on."""
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    before = db.last_seqno
    waiting = Waiting(db)
    assert waiting.is_waiting()
    assert db.last_seqno == before
    assert [pin.purpose for pin in db.pins()].count("archive") == 1
    place.open.set()
    assert waiting.ended() is None
    assert archive.close(20)
    assert held_of(db, place).gaps() == []
    assert not is_behind(db)


def test_the_log_that_is_held_stays_within_the_limit_and_every_moment_is_archived(db: Any, place: Gated) -> None:
    writer = Writer(db)
    archive = stalling(db, place, rpo_s=3600)
    largest = 0
    for _ in range(600):
        writer.some(1, size=2000)
        hold = archive._worker.archiver._hold
        if hold is not None:
            largest = max(largest, sealed_beyond(db.engine.upkeep.consumers.segments(), hold.after))
    assert archive.close(20)
    assert archive.status().units > 3, "it does not wait for rpo_s where commits wait for it"
    # A segment that is sealed then, and what several threads bring before they look.
    assert 0 < largest <= MOST + 2 * OPTIONS["segment_bytes"]
    store_id = db.engine.state.version.tree.meta.store_id
    check_all(held_of(db, place), place, store_id, writer.model, 0, 600)


def test_several_writers_all_wait_and_all_go_on(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    before = db.last_seqno
    waiting = [Waiting(db) for _ in range(6)]
    assert all(each.is_waiting() for each in waiting)
    # One may have been about to commit when the first one came to wait.
    assert db.last_seqno - before <= 1
    place.open.set()
    assert [each.ended() for each in waiting] == [None] * 6
    archive.close()


@pytest.mark.parametrize(
    "commit",
    [
        lambda db: db.put(b"k", b"1"),
        lambda db: db.delete(b"k"),
        lambda db: db.update({b"a": b"1", b"b": b"2"}),
        lambda db: db.add(b"counter", 1),
        lambda db: db.run(lambda tx: tx.put(b"k", b"1")),
        lambda db: db.table("t", key=str, value=int).put("k", 1),
    ],
)
def test_commits_of_each_kind_wait(db: Any, place: Gated, commit: Callable[[Any], object]) -> None:
    db.table("t", key=str, value=int).put("k", 0)
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    before = db.last_seqno
    thread = threading.Thread(target=lambda: commit(db), daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    assert db.last_seqno == before
    place.open.set()
    thread.join(20)
    assert not thread.is_alive()
    assert db.last_seqno > before
    archive.close()


def test_what_the_store_does_itself_goes_on_while_writers_wait(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    db.checkpoint()
    db.sync()
    assert db.verify().ok
    assert db[b"k"] == VALUE
    assert db.stats().archives[0].behind_commits > 0
    done: list[int] = []
    db.engine.queue.run(lambda: done.append(1))
    assert done
    assert waiting.is_waiting()
    place.open.set()
    assert waiting.ended() is None
    archive.close()


def test_one_that_fails_is_waited_for_for_a_while_and_then_commits_are_refused(
    db: Any, place: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = begun(db, place)
    place.error = BackupDestinationError("403")
    fill(db)
    waiting = Waiting(db)
    while archive.status().state != "failing":
        assert waiting.is_waiting()
    assert waiting.is_waiting()
    monkeypatch.setattr("kvwal.backup.archive._PATIENCE_S", 0.0)
    error = waiting.ended()
    assert isinstance(error, ArchiveBehindError)
    assert isinstance(error.__cause__, BackupDestinationError)
    assert "<a destination> is behind by its max_behind_bytes, and fails: 403" in str(error)
    before = db.last_seqno
    with pytest.raises(ArchiveBehindError):
        db[b"k"] = b"refused"
    assert (db.last_seqno, db[b"k"]) == (before, VALUE)
    place.error = None
    monkeypatch.undo()
    db[b"k"] = b"later"
    assert db[b"k"] == b"later"
    archive.close()
    assert held_of(db, place).gaps() == []


def test_one_that_has_diverged_is_not_waited_for(db: Any, place: Gated, disk: SimulatedDisk) -> None:
    db[b"k"] = b"1"
    copy = disk.crash(-1)
    with kvwal.archive(db, place, rpo_s=0.01) as archive:
        db[b"k"] = b"2"
        assert archive.flush(20)
    with kvwal.open("/kv", files=copy, **OPTIONS) as other:
        other[b"k"] = b"other"
        archive = stalling(other, place)
        with pytest.raises(ArchiveBehindError, match="different commits"):
            for _ in range(1000):
                other[b"k"] = VALUE
        archive.close(0.1)
        other[b"k"] = VALUE


def test_closing_the_archive_ends_the_wait_and_the_commit_is_made(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()
    assert not archive.close(0.05)
    assert waiting.ended() is None
    assert db[b"k"] == b"waited"


def test_an_archive_that_is_forgotten_is_not_waited_for(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()
    del archive
    gc.collect()
    assert waiting.ended() is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_whose_thread_is_dead_is_not_waited_for(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()
    place.error = SystemExit()
    place.open.set()
    assert waiting.ended() is None
    place.error = None
    assert archive.status().state == "ended"
    archive.close()


def test_one_that_is_superseded_is_not_waited_for(db: Any, place: Gated) -> None:
    first = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()
    second = archiver_of(db, place.there)
    second.step()
    place.open.set()
    assert waiting.ended() is None
    second.close()
    first.close()


def test_closing_the_store_ends_the_wait(disk: SimulatedDisk, place: Gated) -> None:
    db = kvwal.open("/kv", files=disk, **OPTIONS)
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()
    db.close()
    assert isinstance(waiting.ended(), ClosedError)
    place.open.set()
    archive.close()


def test_a_signal_handler_is_refused_where_its_thread_waits_and_control_c_ends_it(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    before = db.last_seqno
    refused: list[BaseException] = []

    def handler(*_: object) -> None:
        try:
            db[b"k"] = b"handler"
        except ReentrancyError as error:
            refused.append(error)
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            db[b"k"] = b"main"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(refused) == 1
    assert db.last_seqno == before
    waiting = Waiting(db)
    assert waiting.is_waiting(), "the interrupted one has left nothing that lets others through"
    place.open.set()
    assert waiting.ended() is None
    archive.close()


def test_the_thread_of_the_archive_does_not_wait_for_itself(db: Any, place: Gated) -> None:
    """A destination may count in the store that it archives."""
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()
    place.before = lambda: db.put(b"calls", b"1")
    place.open.set()
    assert waiting.ended() is None
    place.before = lambda: None
    archive.close()
    assert db[b"calls"] == b"1"


def test_from_the_call_on_log_is_held_though_the_destination_is_not_there_yet(db: Any, place: Gated) -> None:
    db[b"k"] = b"first"
    with kvwal.archive(db, place) as archive:
        assert archive.flush(20)
    db[b"k"] = b"second"
    place.open.clear()
    archive = stalling(db, place)
    fill(db)
    waiting = Waiting(db)
    for _ in range(3):
        db.checkpoint()
    assert waiting.is_waiting()
    place.open.set()
    assert waiting.ended() is None
    assert archive.close(20)
    assert held_of(db, place).gaps() == []


def test_on_a_full_disk_commits_are_refused_and_there_is_no_gap(disk: SimulatedDisk, db: Any) -> None:
    other = SimulatedDisk()
    place = Gated(DirectoryDestination("/b", files=other))
    archive = stalling(db, place, max_behind_bytes=1 << 30)
    assert archive.flush(20)
    place.open.clear()
    disk.capacity = disk.used_bytes() + (1 << 20)
    with pytest.raises(DiskFullError):
        for i in range(3000):
            db[b"k"] = VALUE
            if not i % 40:
                db.checkpoint()
    place.open.set()
    disk.capacity = None
    assert archive.close(20)
    assert held_of(db, place).gaps() == []


def test_a_listener_hears_how_long_a_commit_waited(disk: SimulatedDisk, place: Gated) -> None:
    heard: list[Stall] = []

    class Hearing(Listener):
        def stall(self, event: Stall) -> None:
            heard.append(event)

    with kvwal.open("/kv", files=disk, listeners=[Hearing()], **OPTIONS) as db:
        archive = begun(db, place)
        place.open.clear()
        fill(db)
        waiting = Waiting(db)
        assert waiting.is_waiting()
        place.open.set()
        assert waiting.ended() is None
        assert "archive" in {event.reason for event in heard}
        archive.close()


def test_a_store_without_such_an_archive_never_looks(
    disk: SimulatedDisk, place: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a thread, commits look after the log.
    with (
        kvwal.open("/kv", files=disk, **{**OPTIONS, "background": True}) as db,
        kvwal.archive(db, place, max_behind_bytes=MOST) as archive,
    ):
        assert archive.flush(20)
        pressure = db.engine.pressure

        def fail(**_: object) -> None:
            raise AssertionError("a put looks at what it would wait for")

        monkeypatch.setattr(pressure, "relieve", fail)
        pressure.is_on = False
        for _ in range(100):
            db[b"k"] = VALUE
        assert len(db.engine.upkeep.consumers.segments()) > 5
        assert not pressure.is_on


@pytest.mark.parametrize("wrong", ["wait", "", None, 1])
def test_another_word_is_refused(db: Any, place: Gated, wrong: Any) -> None:
    with pytest.raises(ValueError, match="on_behind"):
        kvwal.archive(db, place, on_behind=wrong)


def test_threads_that_write_while_the_destination_comes_and_goes_end(db: Any, place: Gated) -> None:
    archive = stalling(db, place, rpo_s=0.001)
    over = threading.Event()

    def write(name: bytes) -> None:
        for _ in range(150):
            db[name] = VALUE

    def come_and_go() -> None:
        while not over.wait(0.003):
            (place.open.set if not place.open.is_set() else place.open.clear)()
        place.open.set()

    changing = threading.Thread(target=come_and_go)
    changing.start()
    try:
        run_threads(*(lambda name=name: write(name) for name in (b"a", b"b", b"c")))
    finally:
        over.set()
        changing.join()
    assert archive.close(20)
    assert held_of(db, place).newest() == db.last_seqno == 450
    assert held_of(db, place).gaps() == []


# -- asyncio -----------------------------------------------------------------------------------------


def test_tasks_wait_too_can_be_cancelled_and_the_loop_goes_on(disk: SimulatedDisk, place: Gated) -> None:
    async def work() -> None:
        async with await kvwal.aio.open("/kv", files=disk, **OPTIONS) as db:
            archive = begun(db.store, place)
            place.open.clear()
            fill(db.store)
            before = db.store.last_seqno
            tasks = [asyncio.ensure_future(db.put(b"k%d" % i, b"1")) for i in range(3)]
            done, _ = await asyncio.wait(tasks, timeout=0.1)
            assert not done
            assert db.store.last_seqno == before
            tasks[0].cancel()
            done, _ = await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            place.open.set()
            assert done == {tasks[0]}
            assert tasks[0].cancelled()
            await asyncio.gather(*tasks[1:])
            assert await db.get(b"k0") is None
            assert await db.get(b"k2") == b"1"
            await asyncio.to_thread(archive.close)

    asyncio.run(work())


def test_closing_the_store_of_tasks_ends_their_wait(disk: SimulatedDisk, place: Gated) -> None:
    async def work() -> None:
        db = await kvwal.aio.open("/kv", files=disk, **OPTIONS)
        archive = begun(db.store, place)
        place.open.clear()
        fill(db.store)
        task = asyncio.ensure_future(db.put(b"k", b"1"))
        done, _ = await asyncio.wait([task], timeout=0.1)
        assert not done
        closing = asyncio.ensure_future(db.close())
        done, _ = await asyncio.wait([closing], timeout=10)
        place.open.set()
        await closing
        assert done
        with pytest.raises(ClosedError):
            await task
        archive.close()

    asyncio.run(work())


def test_a_task_is_refused_once_the_archive_has_failed_for_a_while(
    disk: SimulatedDisk, place: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvwal.backup.archive._PATIENCE_S", 0.0)

    async def work() -> None:
        async with await kvwal.aio.open("/kv", files=disk, **OPTIONS) as db:
            archive = begun(db.store, place)
            place.error = BackupDestinationError("403")
            fill(db.store)
            with pytest.raises(ArchiveBehindError):
                await db.put(b"k", b"1")
            place.error = None
            monkeypatch.undo()
            await db.put(b"k", b"2")
            await asyncio.to_thread(archive.close)

    asyncio.run(work())


async def close_while_they_wait(tasks_db: kvwal.aio.AsyncStore, count: int, place: Gated) -> None:
    """Close a store for tasks while puts wait: each is refused, and none was written."""
    before = tasks_db.store.last_seqno
    puts = [asyncio.ensure_future(tasks_db.put(b"k%d" % i, b"1")) for i in range(count)]
    done, _ = await asyncio.wait(puts, timeout=0.1)
    assert not done
    closing = asyncio.ensure_future(tasks_db.close())
    done, _ = await asyncio.wait([closing, *puts], timeout=10)
    place.open.set()
    assert done == {closing, *puts}, "it waits for the archive"
    assert closing.exception() is None
    assert [type(task.exception()) for task in puts] == [ClosedError] * count
    assert tasks_db.store.last_seqno == before


def test_closing_a_wrapper_refuses_what_waits_and_the_store_lives_on(db: Any, place: Gated) -> None:
    """None of them was begun; what waits for its turn goes the same way."""
    archive = begun(db, place)
    place.open.clear()

    async def work() -> None:
        tasks_db = kvwal.aio.AsyncStore(db, max_pending_commits=2)
        await tasks_db.put(b"acknowledged", b"1")
        fill(db)
        await close_while_they_wait(tasks_db, 5, place)

    asyncio.run(work())
    assert not db.closed
    db[b"after"] = b"1"
    assert db[b"acknowledged"] == b"1"
    assert not any(b"k%d" % i in db for i in range(5))
    assert archive.close(20)
    assert held_of(db, place).gaps() == []


def test_closing_a_wrapper_refuses_a_group_that_came_to_wait_after_it_was_handed_over(
    db: Any, place: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    # The archive fell behind just after the loop had looked.
    monkeypatch.setattr(db.engine.pressure, "would_wait", lambda: False)

    async def work() -> None:
        tasks_db = kvwal.aio.AsyncStore(db)
        await close_while_they_wait(tasks_db, 3, place)

    asyncio.run(work())
    assert archive.close(20)


def test_closing_one_wrapper_ends_the_wait_of_no_other_one(db: Any, place: Gated) -> None:
    archive = begun(db, place)
    place.open.clear()
    fill(db)
    waiting = Waiting(db)
    assert waiting.is_waiting()

    async def work() -> None:
        one, other = kvwal.aio.AsyncStore(db), kvwal.aio.AsyncStore(db)
        put = asyncio.ensure_future(other.put(b"other", b"1"))
        async with asyncio.timeout(10):
            await one.close()
        done, _ = await asyncio.wait([put], timeout=0.1)
        assert not done
        assert waiting.thread.is_alive()
        place.open.set()
        await put
        await other.close()

    asyncio.run(work())
    assert waiting.ended() is None
    assert db[b"other"] == b"1"
    archive.close()


def test_closing_one_holder_of_a_shared_store_ends_the_wait_of_no_other_one(disk: SimulatedDisk, place: Gated) -> None:
    with kvwal.shared("/kv", files=disk, **OPTIONS) as db:
        archive = begun(db, place)
        place.open.clear()
        fill(db)
        waiting = Waiting(db)
        assert waiting.is_waiting()

        async def work() -> None:
            holder = await kvwal.aio.shared("/kv", files=disk, **OPTIONS)
            put = asyncio.ensure_future(holder.put(b"mine", b"1"))
            done, _ = await asyncio.wait([put], timeout=0.1)
            assert not done
            async with asyncio.timeout(10):
                await holder.close()
            with pytest.raises(ClosedError):
                await put
            assert waiting.is_waiting()

        asyncio.run(work())
        place.open.set()
        assert waiting.ended() is None
        assert db[b"k"] == b"waited"
        assert b"mine" not in db
        assert archive.close(20)
