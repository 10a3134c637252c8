"""What a store tells its listeners is what happened: each kind of event, each field, none twice and none left out."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from engine_fakes import make, put_request
from event_fixtures import Recorder, seqnos
from store_fixtures import TINY, check_store, run_threads, wait_until

import kvwal
import kvwal.aio
from kvwal.engine import checkpoint, engine, pressure
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import EncodedBatch, LonePut
from kvwal.errors import DiskFullError, PoisonedError
from kvwal.events import (
    Checkpoint,
    CommitGroup,
    Event,
    Events,
    Flush,
    Poison,
    Recovery,
    Retire,
    SegmentSealed,
    Stall,
)
from kvwal.keys import Seqno
from kvwal.log import segmentlog, writer
from kvwal.testing import SimulatedDisk


class Looking(Recorder):
    """Looks at the store at each event, and keeps what does not fit to it."""

    def __init__(self) -> None:
        super().__init__(self._see)
        self.db: kvwal.Store | None = None
        self.wrong: list[str] = []

    def _see(self, event: Event) -> None:
        if self.db is None:
            return
        engine = self.db.engine
        assert engine._log is not None
        if engine.state.lock._is_owned():
            self.wrong.append(f"{event} was told under State.lock")
        if isinstance(event, CommitGroup):
            self._expect(event, self.db.last_seqno == event.last_seqno)
            self._expect(event, not event.synced or self.db.durable_seqno >= event.last_seqno)
            self._expect(event, event.seconds >= 0)
        elif isinstance(event, Flush):
            self._expect(event, self.db.durable_seqno == event.durable_seqno)
        elif isinstance(event, Checkpoint):
            meta = engine._pages.meta
            self._expect(event, (meta.generation, meta.seqno) == (event.generation, event.seqno))
            self._expect(event, engine.state.version.tree.meta.generation == event.generation)
        elif isinstance(event, Retire):
            kept = {segment.first_seqno for segment in engine._log.segments()}
            self._expect(event, min(kept) == event.oldest_seqno)
            names = set(engine._directory.names())
            self._expect(event, not names & set(event.files))
        elif isinstance(event, SegmentSealed):
            self._expect(event, engine._directory.kind(event.file) == "file")

    def _expect(self, event: Event, holds: bool) -> None:
        if not holds:
            self.wrong.append(str(event))


def sizes(db: kvwal.Store) -> dict[int, int]:
    """Bytes of keys and values of each commit, as the log has them."""
    found = {}
    for record in db.history(0):
        batch = record.batch()
        found[record.seqno] = sum(len(key) + len(value or b"") for key, value in batch.writes.items()) + sum(
            len(start) + len(stop or b"") for start, stop in batch.ranges
        )
    return found


def write_in_every_way(db: kvwal.Store, letter: bytes, times: int) -> dict[int, str]:
    """Returns the durability of those commits for which one was asked by name."""
    asked: dict[int, str] = {}
    for number in range(times):
        key = b"%s%04d" % (letter, number)
        db.put(key, b"x" * number)
        durability: kvwal.options.Durability = "commit" if number % 2 else "os"
        asked[db.put(key, b"y", durability=durability)] = durability
        db.delete(b"none")
        with db.batch() as batch:
            batch.put(key + b"b", b"2")
            batch.delete(key)
        with db.transaction() as txn:
            txn[key + b"t"] = txn.get(key, b"0")
        db.run(lambda txn: txn.put(b"shared", txn.get(b"shared", b"") + b"."))
        db.add(b"n", 1)
        db.pop(key + b"b")
        db.pop(b"none", None)
        db.popitem(letter, letter + b"~")
        db.setdefault(b"d" + letter, b"1")
        db.update({key: b"3", key + b"u": b"4"})
        db.delete_range(key + b"u", key + b"v")
        db.commit(kvwal.WriteBatch())
        db.sync()
    return asked


# -- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["commit", "interval", "os"])
def test_groups_cover_each_commit_once_in_order_with_its_size(tmp_path: Path, durability: Any) -> None:
    """Eight threads and an asyncio store write in every way there is."""
    listener = Looking()

    async def write_in_tasks(db: kvwal.Store) -> None:
        store = kvwal.aio.AsyncStore(db)

        async def work(number: int) -> None:
            await store.put(b"task%d" % number, b"1")
            async with store.batch() as batch:
                batch.put(b"task%d" % number, b"2")
            await store.add(b"tasks", 1)
            await store.pop(b"task%d" % number)

        await asyncio.gather(*(work(number) for number in range(40)))
        await store.close()

    options: Any = {"durability": durability, "keep_history_bytes": 1 << 30, "listeners": [listener]}
    with kvwal.open(tmp_path / "s", **options) as db:
        listener.db = db
        results = run_threads(
            *(lambda letter=letter: write_in_every_way(db, b"%c" % letter, 12) for letter in b"abcdefgh"),
            lambda: asyncio.run(write_in_tasks(db)),
        )
        check_store(db)
        asked = {seqno: named for result in results[:-1] for seqno, named in result.items()}
        wanted = sizes(db)
        last = db.last_seqno
    groups = listener.of(CommitGroup)
    assert not listener.wrong
    assert seqnos(groups) == list(range(1, last + 1))
    for group in groups:
        assert group.size == sum(wanted[seqno] for seqno in range(group.first_seqno, group.last_seqno + 1)), group
        # A member without writes may have wanted the flush, so this holds one way only.
        wants = {asked.get(seqno, durability) for seqno in range(group.first_seqno, group.last_seqno + 1)}
        assert group.synced or "commit" not in wants
    # How threads fall into groups is a matter of the system's scheduler, but these are certain.
    assert (durability != "commit") in {not group.synced for group in groups}
    if durability == "commit":
        assert any(group.last_seqno > group.first_seqno for group in groups), "no commits shared a group"
    flushed = [event.durable_seqno for event in listener.of(Flush)]
    assert flushed == sorted(set(flushed))


def test_a_put_alone_is_told_as_a_group_of_one(tmp_path: Path) -> None:
    listener = Recorder()
    with kvwal.open(tmp_path / "s", listeners=[listener]) as db:
        for number in range(3):
            assert db.put(b"k", b"%d" % number) == number + 1
            group = listener.of(CommitGroup)[-1]
            assert (group.first_seqno, group.last_seqno, group.size, group.synced) == (number + 1, number + 1, 2, True)
        db.put(b"k", b"", durability="os")
        group = listener.of(CommitGroup)[-1]
        assert (group.first_seqno, group.last_seqno, group.size, group.synced) == (4, 4, 1, False)
    assert [type(event) for event in listener.heard[:3]] == [Recovery, Flush, CommitGroup]


def test_the_seconds_of_a_group_are_from_its_append_to_its_visibility() -> None:
    listener = Recorder()
    queue, log, _ = make(events=Events([listener]))
    now_s = 100.0

    def pass_time(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    queue._now_s = lambda: now_s
    log.on_append = lambda: pass_time(1.0)
    log.on_sync = lambda: pass_time(2.0)
    third = CommitRequest(LonePut(b"", b""), sync=False)
    queue.submit([put_request(b"a", b"1"), put_request(b"b", b"22", sync=False), third])
    queue.put(b"c", b"", sync=False)
    assert listener.heard == [
        CommitGroup(Seqno(1), Seqno(3), 5, True, 3.0),
        CommitGroup(Seqno(4), Seqno(4), 1, False, 1.0),
    ]


def test_what_writes_nothing_is_no_group() -> None:
    listener = Recorder()
    queue, _, _ = make(events=Events([listener]))
    queue.sync()
    queue.run(lambda: None)
    assert listener.heard == []


def test_members_that_a_full_disk_refused_are_in_no_group() -> None:
    listener = Recorder()
    queue, log, engine = make(events=Events([listener]))
    queue.put(b"a", b"1", sync=False)
    log.fail_append = [DiskFullError("full")]
    batch = kvwal.WriteBatch()
    batch.delete(b"a")
    requests = [put_request(b"refused", b"1"), CommitRequest(EncodedBatch(batch), sync=True)]
    queue.submit(requests)
    assert [request.seqno for request in requests] == [0, 2]
    group = listener.of(CommitGroup)[-1]
    assert (group.first_seqno, group.last_seqno, group.size, group.synced) == (2, 2, 1, True)
    assert engine.state.seqno == 2


def test_a_group_that_failed_is_not_told() -> None:
    listener = Recorder()
    queue, log, _ = make(events=Events([listener]))
    log.fail_sync = [OSError(errno.EIO, "broken")]
    with pytest.raises(PoisonedError):
        queue.put(b"a", b"1", sync=True)
    assert [type(event) for event in listener.heard] == [Poison]


def test_asyncio_takes_listeners_when_it_opens(tmp_path: Path) -> None:
    listener = Recorder()

    async def work() -> None:
        async with kvwal.aio.open(tmp_path / "s", listeners=(listener,)) as db:
            await asyncio.gather(*(db.put(b"%d" % number, b"1") for number in range(100)))
            await db.checkpoint()

    asyncio.run(work())
    assert type(listener.heard[0]) is Recovery
    assert seqnos(listener.of(CommitGroup)) == list(range(1, 101))
    assert [(event.seqno, event.keys) for event in listener.of(Checkpoint)] == [(100, 100)]


# -- the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["c", "r"])
def test_recovery_is_the_first_event_and_says_what_the_report_says(tmp_path: Path, flag: Any) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db[b"a"] = b"1"
        db.checkpoint()
        for number in range(5):
            db[b"b"] = b"%d" % number
    listener = Recorder()
    with kvwal.open(tmp_path / "s", flag, listeners=[listener]) as db:
        report = db.recovery
        assert listener.heard[:1] == [
            Recovery(db.engine._pages.meta.generation, Seqno(1), Seqno(6), 5, report.seconds),
        ]
        assert (report.checkpoint_seqno, report.last_seqno, report.commits) == (1, 6, 5)


def test_a_checkpoint_that_opening_makes_is_told_after_the_recovery(tmp_path: Path) -> None:
    disk = SimulatedDisk()
    db = kvwal.open("/kv", files=disk, durability="os", checkpoint_interval_s=1e9)
    for number in range(200):
        db.put(b"%04d" % number, b"x" * 500)
    disk.kill()
    listener = Recorder()
    with kvwal.open("/kv", files=disk, memtable_bytes=16 << 10, background=False, listeners=[listener]) as again:
        (recovery,) = listener.of(Recovery)
        (made,) = listener.of(Checkpoint)
        assert listener.heard.index(recovery) < listener.heard.index(made)
        assert (made.generation, made.seqno, made.keys) == (recovery.generation + 1, 200, 200)
        assert again.engine._pages.meta.generation == made.generation
    db.engine.abandon()


@pytest.mark.parametrize("background", [False, True])
def test_checkpoints_segments_and_flushes_are_told_as_they_are(background: bool) -> None:
    disk, listener = SimulatedDisk(), Looking()
    with kvwal.open("/kv", files=disk, background=background, listeners=[listener], **TINY) as db:
        listener.db = db
        for number in range(400):
            db.put(b"%04d" % (number % 150), b"x" * 300)
        db.delete_range(b"0000", b"0050")
        db.checkpoint()
        db.put(b"a", b"1")
        db.put(b"b", b"1")
        db.delete(b"a")
        listener.heard.clear()
        db.checkpoint()
        (made,) = listener.of(Checkpoint)
        assert (made.seqno, made.keys) == (404, 2)
        db.checkpoint()
        assert listener.of(Checkpoint) == [made]
    assert not listener.wrong


def test_each_segment_is_told_when_it_is_sealed_and_when_it_goes(tmp_path: Path) -> None:
    listener = Looking()
    with kvwal.open(tmp_path / "s", listeners=[listener], keep_history_bytes=0, **TINY) as db:
        listener.db = db
        for number in range(1000):
            db.put(b"%04d" % (number % 100), b"x" * 400, durability="os")
        db.checkpoint()
        db.put(b"z", b"")
        db.checkpoint()
        assert db.engine._log is not None
        left = [segment.first_seqno for segment in db.engine._log.segments()]
    assert not listener.wrong
    sealed = listener.of(SegmentSealed)
    assert sealed[0].first_seqno == 1
    for one, two in pairwise(sealed):
        assert two.first_seqno == one.last_seqno + 1
    assert all(0 < event.size <= TINY["segment_bytes"] for event in sealed)
    gone = [name for event in listener.of(Retire) for name in event.files]
    assert len(gone) > 10
    assert gone == [event.file for event in sealed][: len(gone)]
    assert listener.of(Retire)[-1].oldest_seqno == left[0]
    made = listener.of(Checkpoint)
    assert [event.generation for event in made] == list(range(made[0].generation, made[0].generation + len(made)))
    assert all(one.seqno <= two.seqno for one, two in pairwise(made))


def test_a_commit_that_waits_for_the_background_is_stalled_for_as_long_as_it_waited() -> None:
    disk, listener = SimulatedDisk(), Recorder()
    options: Any = {"memtable_bytes": 16 << 10, "durability": "os", "checkpoint_interval_s": 1e9}
    with kvwal.open("/kv", files=disk, listeners=[listener], **options) as db:
        checkpointer, pressure = db.engine._checkpointer, db.engine.pressure
        assert checkpointer is not None
        # The checkpoint cannot begin, so the commit that finds memory full twice must wait.
        with checkpointer.lock:
            db.engine._succession.freeze()
            number = 0
            while not pressure._is_stalled():
                db.put(b"%04d" % number, b"x" * 500)
                number += 1
                if number == 40:
                    db.engine._succession.freeze()
            heard = list(listener.of(Stall))
            told: list[int] = []
            listener.look = lambda event: told.append(threading.get_ident()) if isinstance(event, Stall) else None
            thread = threading.Thread(target=lambda: db.put(b"waits", b"1"))
            thread.start()
            wait_until(lambda: pressure._waiting, "a commit that waits")
            began_s = disk.monotonic_s()
            assert heard == listener.of(Stall) == []
        thread.join(20)
        assert not thread.is_alive()
        (stall,) = listener.of(Stall)
        assert stall.reason == "memory"
        assert stall.seconds > 0
        assert disk.monotonic_s() > began_s
        assert told == [thread.ident]


def test_a_commit_that_makes_the_checkpoint_itself_is_stalled() -> None:
    disk, listener = SimulatedDisk(), Recorder()
    options: Any = {"memtable_bytes": 16 << 10, "durability": "os", "background": False}
    with kvwal.open("/kv", files=disk, listeners=[listener], **options) as db:
        for number in range(500):
            before = len(listener.of(Checkpoint))
            stalls = len(listener.of(Stall))
            db.put(b"%05d" % number, b"x" * 100)
            # As many as it had to make.
            assert (len(listener.of(Stall)) > stalls) == (len(listener.of(Checkpoint)) > before)
        assert len(listener.of(Stall)) > 3
        for stall in listener.of(Stall):
            assert stall.reason == "memory"
            assert stall.seconds > 0


def test_a_commit_that_makes_space_first_is_stalled_if_there_was_something_to_do(monkeypatch: Any) -> None:
    disk, listener = SimulatedDisk(seed=3), Recorder()
    options: Any = {"background": False, "durability": "os", "segment_bytes": 64 << 10}
    with kvwal.open("/kv", files=disk, listeners=[listener], **options) as db:
        checkpointer = db.engine._checkpointer
        assert checkpointer is not None
        reclaim, done = checkpointer.reclaim, []
        monkeypatch.setattr(checkpointer, "reclaim", lambda: done.append(reclaim()) or done[-1])
        disk.capacity = 12 << 20
        number = 0
        with pytest.raises(DiskFullError):
            while True:
                db.put(b"%06d" % number, b"x" * 2000)
                number += 1
        for _ in range(3):
            with pytest.raises(DiskFullError):
                db.put(b"more", b"x" * 2000)
        disk.capacity = None
        db.put(b"again", b"x")
    assert True in done
    assert False in done
    stalls = listener.of(Stall)
    assert len(stalls) == sum(done)
    assert {stall.reason for stall in stalls} == {"disk"}
    assert all(stall.seconds > 0 for stall in stalls)


@pytest.mark.parametrize("operation", ["pwrite", "datasync"])
@pytest.mark.parametrize("way", ["put", "batch", "sync", "aio"])
def test_a_failure_of_the_log_is_told_once_when_the_store_refuses_already(operation: str, way: str) -> None:
    disk, listener = SimulatedDisk(), Recorder()
    answers: list[object] = []
    db = kvwal.open("/kv", files=disk, background=False, durability="commit", listeners=[listener])
    db[b"a"] = b"1"
    db.put(b"unflushed", b"1", durability="os")
    fault = disk.fail(operation, error=errno.EIO, path="*.log")

    async def put() -> None:
        await kvwal.aio.AsyncStore(db).put(b"b", b"2")

    ways: dict[str, Callable[[], object]] = {
        "put": lambda: db.put(b"b", b"2"),
        "batch": lambda: db.update({b"b": b"2", b"c": b"2"}),
        "sync": lambda: db.sync() if operation == "datasync" else db.put(b"b", b"2"),
        "aio": lambda: asyncio.run(put()),
    }
    log: Any = db.engine._log
    listener.look = lambda event: answers.append((type(event), db.get(b"a"), log._failure is not None))
    with pytest.raises(PoisonedError) as caught:
        ways[way]()
    assert fault.struck == 1
    for _ in range(3):
        with pytest.raises(PoisonedError):
            db[b"c"] = b"3"
    with pytest.raises(PoisonedError):
        db.checkpoint()
    db.close()
    (poison,) = listener.of(Poison)
    assert isinstance(poison.cause, OSError)
    assert poison.cause.errno == errno.EIO
    assert caught.value.__cause__ is poison.cause
    assert answers == [(Poison, b"1", True)]


@pytest.mark.parametrize("operation", ["pwrite", "datasync"])
def test_a_failure_of_the_pages_is_told_once(operation: str) -> None:
    disk, listener = SimulatedDisk(), Recorder()
    db = kvwal.open("/kv", files=disk, background=False, listeners=[listener])
    db[b"a"] = b"1"
    disk.fail(operation, error=errno.EIO, path="*/data", forever=True)
    for _ in range(2):
        with pytest.raises(PoisonedError):
            db.checkpoint()
    with pytest.raises(PoisonedError):
        db[b"b"] = b"1"
    assert db[b"a"] == b"1"
    db.close()
    (poison,) = listener.of(Poison)
    assert isinstance(poison.cause, OSError)
    assert not listener.of(Checkpoint)


def test_a_failure_in_the_background_is_told() -> None:
    disk, listener = SimulatedDisk(), Recorder()
    db = kvwal.open("/kv", files=disk, durability="interval", sync_delay_s=0.01, listeners=[listener])
    disk.fail("datasync", error=errno.EIO, path="*.log", forever=True)
    db.put(b"a", b"1")
    wait_until(lambda: listener.of(Poison), "the poison")
    with pytest.raises(PoisonedError):
        # No call was told of it.
        db.close()
    assert len(listener.of(Poison)) == 1


def test_a_bug_that_poisons_is_told(monkeypatch: Any) -> None:
    listener = Recorder()
    queue, _, engine = make(events=Events([listener]))
    bug = ZeroDivisionError("ours")

    def fail(*arguments: Any, **named: Any) -> None:
        raise bug

    monkeypatch.setattr(engine.publisher, "publish", fail)
    with pytest.raises((PoisonedError, ZeroDivisionError)):
        queue.commit(put_request(b"a", b"1"))
    assert [event.cause for event in listener.of(Poison)] == [bug]


# -- without a listener ---------------------------------------------------------------------------


def test_without_a_listener_no_event_is_made_and_a_put_makes_no_request(monkeypatch: Any) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("it was made")

    for module, name in [
        (kvwal.engine.group, "CommitGroup"),
        (writer, "Flush"),
        (segmentlog, "SegmentSealed"),
        (segmentlog, "Retire"),
        (checkpoint, "Checkpoint"),
        (pressure, "Stall"),
        (engine, "Recovery"),
        (kvwal.events, "Poison"),
    ]:
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(Events, "tell", fail)
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False, **TINY) as db:
        write_in_every_way(db, b"a", 10)
        with monkeypatch.context() as alone:
            alone.setattr(db.engine.queue, "commit", fail)
            for number in range(200):
                db.put(b"%04d" % number, b"x" * 500)
        db.checkpoint()
        db.delete_range()
        db.checkpoint()
        check_store(db)
        disk.fail("fsync", error=errno.EIO, forever=True)
        with pytest.raises(PoisonedError):
            db[b"b"] = b"2"


def test_a_listener_that_joins_an_open_store_hears_of_the_next_group_and_one_that_left_of_none() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        one, two = Recorder(), Recorder()
        db[b"a"] = b"1"
        db.engine.events.add(one)
        db[b"b"] = b"1"
        db.engine.events.add(two)
        db[b"c"] = b"1"
        db.engine.events.remove(one)
        db[b"d"] = b"1"
        db.engine.events.remove(two)
        db[b"e"] = b"1"
    assert seqnos(one.of(CommitGroup)) == [2, 3]
    assert seqnos(two.of(CommitGroup)) == [3, 4]


def test_a_listener_that_joins_while_a_group_is_under_way_hears_of_the_next_one() -> None:
    events, listener = Events(), Recorder()
    queue, log, _ = make(events=events)
    log.on_append = lambda: events.add(listener)
    queue.commit(put_request(b"a", b"1"))
    queue.put(b"b", b"1", sync=True)
    assert seqnos(listener.of(CommitGroup)) == [2]


# -- what is given at open ------------------------------------------------------------------------


class NoListener:
    def flush(self, event: Flush) -> None: ...


@pytest.mark.parametrize("wrong", [NoListener(), [NoListener()], Recorder(), [Recorder], [None], None, "listener"])
def test_what_is_no_sequence_of_listeners_is_refused(wrong: Any) -> None:
    disk = SimulatedDisk()
    with pytest.raises(TypeError, match="listeners"):
        kvwal.open("/kv", files=disk, listeners=wrong)
    assert disk.kind("/kv") is None


def test_each_store_tells_its_own_listeners_and_each_once(tmp_path: Path) -> None:
    one, two, both = Recorder(), Recorder(), Recorder()
    with (
        kvwal.open(tmp_path / "1", listeners=iter([one, both, both])) as first,  # type: ignore[arg-type]
        kvwal.open(tmp_path / "2", listeners=(two, both)) as second,
    ):
        first[b"a"] = b"1"
        second[b"b"] = b"22"
    assert [group.size for group in one.of(CommitGroup)] == [2]
    assert [group.size for group in two.of(CommitGroup)] == [3]
    assert [group.size for group in both.of(CommitGroup)] == [2, 3]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_store_that_has_a_listener_and_is_forgotten_is_collected() -> None:
    db = kvwal.open("/kv", files=SimulatedDisk(), listeners=[Recorder()])
    db[b"a"] = b"1"
    store = weakref.ref(db)
    del db
    gc.collect()
    assert store() is None


def test_a_listener_that_fails_at_the_recovery_does_not_keep_the_store_from_opening(caplog: Any) -> None:
    def fail(event: Event) -> None:
        raise ValueError("broken")

    failing, other = Recorder(fail), Recorder()
    with caplog.at_level(logging.ERROR, "kvwal"), kvwal.open(
        "/kv", files=SimulatedDisk(), background=False, listeners=[failing, other]
    ) as db:
        db[b"a"] = b"1"
    assert [type(event) for event in failing.heard] == [Recovery]
    assert seqnos(other.of(CommitGroup)) == [1]
    assert len(caplog.records) == 1


def test_an_interruption_at_the_recovery_leaves_the_store_closed() -> None:
    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    disk = SimulatedDisk()
    with pytest.raises(KeyboardInterrupt):
        kvwal.open("/kv", files=disk, listeners=[Recorder(interrupt)])
    with kvwal.open("/kv", files=disk, background=False) as db:
        assert db.verify().ok
