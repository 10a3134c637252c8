"""Listeners that raise, that are interrupted, and that call the store: no commit is lost by it, and no thread waits."""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from engine_fakes import Waiter, at_rest, make, put_request
from event_fixtures import Recorder, seqnos
from store_fixtures import TINY, check_store, interrupted_at, run_threads, wait_until

import kvwal
import kvwal.aio
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import LonePut
from kvwal.errors import ClosedError, PoisonedError, ReentrancyError
from kvwal.events import Checkpoint, CommitGroup, Event, Events, Flush, Poison, Retire, SegmentSealed, Stall
from kvwal.testing import SimulatedDisk

_MOST_STEPS = 1500


class Stop(BaseException):
    """What is neither an `Exception` nor one of Python's own interruptions."""


class Raising(Recorder):
    """Raises once, at the first event of a kind."""

    def __init__(self, kind: type[Event], error: BaseException) -> None:
        super().__init__(self._raise)
        self.kind = kind
        self.error: BaseException | None = error

    def _raise(self, event: Event) -> None:
        error = self.error
        if isinstance(event, self.kind) and error is not None:
            self.error = None
            raise error


def stop(event: Event) -> None:
    raise Stop


def in_a_thread(function: Callable[[], Any]) -> Any:
    """Its result; AssertionError if it does not end."""
    return run_threads(function)[0]


COMMITS: dict[str, Callable[[kvwal.Store], object]] = {
    "put": lambda db: db.put(b"k", b"v"),
    "batch": lambda db: db.update({b"k": b"v", b"l": b"w"}),
    "transaction": lambda db: db.run(lambda txn: txn.put(b"k", txn.get(b"k", b"v"))),
    "operation": lambda db: db.setdefault(b"k", b"v"),
}


# -- listeners that raise -------------------------------------------------------------------------


@pytest.mark.parametrize("way", COMMITS)
@pytest.mark.parametrize("kind", [CommitGroup, Flush])
@pytest.mark.parametrize("error", [ValueError, OSError, kvwal.Error, MemoryError])
def test_an_exception_of_a_listener_is_no_failure_of_the_commit(
    caplog: Any, way: str, kind: type[Event], error: type[Exception]
) -> None:
    failing = Raising(kind, OSError(errno.EIO, "its own file") if error is OSError else error("broken"))
    other = Recorder()
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, listeners=[failing, other]) as db:
        with caplog.at_level(logging.ERROR, "kvwal"):
            COMMITS[way](db)
        assert db[b"k"] == b"v"
        db[b"after"] = b"1"
        check_store(db)
        assert list(db.engine.events.listeners.values()) == [other]
    assert isinstance(failing.heard[-1], kind)
    assert seqnos(other.of(CommitGroup)) == [1, 2]
    assert "will hear no more" in caplog.text


@pytest.mark.parametrize("way", COMMITS)
@pytest.mark.parametrize("kind", [CommitGroup, Flush])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop])
def test_an_interruption_in_a_listener_is_raised_and_the_commit_is_there(
    way: str, kind: type[Event], error: type[BaseException]
) -> None:
    raised = error()
    listener = Raising(kind, raised)
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, listeners=[listener]) as db:
        with pytest.raises(error) as caught:
            COMMITS[way](db)
        assert caught.value is raised
        assert caught.value.__notes__ == ["kvwal: commit 1 was written"]
        assert (db[b"k"], db.last_seqno, db.durable_seqno) == (b"v", 1, 1)
        check_store(db)
        # Other threads are not kept from committing, and the listener hears on.
        run_threads(lambda: db.put(b"a", b"1"), lambda: db.put(b"b", b"1"))
        db[b"after"] = b"1"
        check_store(db)
    assert seqnos(listener.of(CommitGroup)) == [1, 2, 3, 4]


def test_an_interruption_while_a_listener_hears_of_a_shared_group_reaches_no_other_thread() -> None:
    """Threads whose commits this one leads get their own outcome."""
    listener = Raising(CommitGroup, KeyboardInterrupt())
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, listeners=[listener]) as db:
        queue = db.engine.queue
        others = [threading.Thread(target=db.put, args=(b"%d" % number, b"1")) for number in range(4)]

        def gather() -> None:
            # While this leads, the main thread queues up first, and so leads the group of all.
            wait_until(lambda: len(queue._queue) == 2, "the main thread")
            for thread in others:
                thread.start()
            wait_until(lambda: len(queue._queue) == 6, "the others")

        first = threading.Thread(target=queue.run, args=(gather,))
        first.start()
        wait_until(lambda: queue._queue, "the first leader")
        with pytest.raises(KeyboardInterrupt):
            queue.commit(put_request(b"mine", b"1"))
        first.join(20)
        for thread in others:
            thread.join(20)
            assert not thread.is_alive()
        assert len(db) == 5
        check_store(db)
    (group,) = listener.of(CommitGroup)
    assert (group.first_seqno, group.last_seqno, group.size) == (1, 5, len(b"mine1") + 4 * 2)


@pytest.mark.parametrize("kind", [Checkpoint, Retire, Flush])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_interruption_in_a_checkpoint_leaves_a_store_that_goes_on(
    kind: type[Event], error: type[BaseException]
) -> None:
    listener = Raising(kind, error())
    disk = SimulatedDisk()
    options: Any = {**TINY, "memtable_bytes": 1 << 20, "checkpoint_log_bytes": 1 << 20, "durability": "os"}
    options["keep_history_bytes"] = 0
    with kvwal.open("/kv", files=disk, background=False, **options) as db:
        for number in range(200):
            db.put(b"%04d" % number, b"x" * 400)
        db.checkpoint()
        db.put(b"a", b"1")
        db.engine.events.add(listener)
        with pytest.raises(error):
            db.checkpoint()
        assert isinstance(listener.heard[-1], kind)
        db.put(b"b", b"1")
        db.checkpoint()
        db.put(b"c", b"1")
        db.checkpoint()
        check_store(db)
        assert db.verify().ok
        assert len(db) == 203
    with kvwal.open("/kv", files=disk) as again:
        assert len(again) == 203


def test_an_interruption_at_a_sealed_segment_is_raised_and_the_commit_is_there() -> None:
    disk, listener = SimulatedDisk(), Raising(SegmentSealed, KeyboardInterrupt())
    with kvwal.open("/kv", files=disk, background=False, listeners=[listener], **TINY) as db:
        interruptions = 0
        for number in range(200):
            try:
                db.put(b"%04d" % number, b"x" * 400)
            except KeyboardInterrupt as error:
                interruptions += 1
                assert f"kvwal: commit {number + 1} was written" in error.__notes__
            assert db.last_seqno == number + 1
        check_store(db)
        assert interruptions == 1
    assert seqnos(listener.of(CommitGroup)) == list(range(1, 201))
    with kvwal.open("/kv", files=disk) as again:
        assert again.verify().ok
        assert len(again) == 200


def test_an_interruption_at_a_stall_comes_before_the_commit() -> None:
    listener = Raising(Stall, KeyboardInterrupt())
    options: Any = {"memtable_bytes": 16 << 10, "durability": "os", "background": False}
    with kvwal.open("/kv", files=SimulatedDisk(), listeners=[listener], **options) as db:
        number = 0
        with pytest.raises(KeyboardInterrupt):
            while True:
                db.put(b"%04d" % number, b"x" * 500)
                number += 1
        assert len(db) == number
        db.put(b"after", b"1")
        check_store(db)


@pytest.mark.parametrize("operation", ["pwrite", "datasync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_interruption_at_the_poison_leaves_a_store_that_refuses(operation: str, error: type[BaseException]) -> None:
    disk, listener = SimulatedDisk(), Raising(Poison, error())
    db = kvwal.open("/kv", files=disk, background=False, listeners=[listener])
    db[b"a"] = b"1"
    disk.fail(operation, error=errno.EIO, path="*.log")
    with pytest.raises(error):
        db[b"b"] = b"2"
    check_store_locks(db)
    for write in (lambda: db.put(b"c", b"3"), db.checkpoint, db.sync):
        with pytest.raises(PoisonedError):
            in_a_thread(write)
    assert in_a_thread(lambda: db.get(b"a")) == b"1"
    db.close()
    assert len(listener.of(Poison)) == 1
    with kvwal.open("/kv", files=disk, background=False) as again:
        assert again[b"a"] == b"1"


def check_store_locks(db: kvwal.Store) -> None:
    queue = db.engine.queue
    assert queue._group is None
    for lock in (queue.lock, queue.queue_lock, db.engine.state.lock):
        assert not lock._is_owned()


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
def test_an_interruption_while_a_store_is_closed_leaves_it_closed(error: type[BaseException]) -> None:
    disk, listener = SimulatedDisk(), Raising(Flush, error())
    db = kvwal.open("/kv", files=disk, background=False, durability="os", listeners=[listener])
    db[b"a"] = b"1"
    with pytest.raises(error):
        db.close()
    assert db.closed
    with kvwal.open("/kv", files=disk, background=False) as again:
        assert again[b"a"] == b"1"
        assert again.verify().ok


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, Stop])
def test_in_another_thread_no_signal_handler_runs_so_the_listener_is_dropped(
    caplog: Any, error: type[BaseException]
) -> None:
    listener, other = Raising(CommitGroup, error()), Recorder()
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, listeners=[listener, other]) as db:
        with caplog.at_level(logging.ERROR, "kvwal"):
            assert in_a_thread(lambda: db.put(b"a", b"1")) == 1
        db[b"b"] = b"1"
        check_store(db)
    assert seqnos(listener.of(CommitGroup)) == [1]
    assert seqnos(other.of(CommitGroup)) == [1, 2]
    assert "will hear no more" in caplog.text


def test_the_threads_of_the_store_survive_what_a_listener_raises(tmp_path: Path) -> None:
    """That of the background, and that of asyncio's commits."""
    listeners = [Raising(kind, SystemExit()) for kind in (Flush, Checkpoint, CommitGroup)]

    async def put() -> None:
        async with kvwal.aio.open(
            tmp_path / "s", durability="interval", sync_delay_s=0.01, listeners=listeners
        ) as db:
            assert await db.put(b"a", b"1") == 1
            await asyncio.to_thread(wait_until, lambda: db.durable_seqno == 1, "a flush in the background")
            assert await db.put(b"b", b"1") == 2
            await db.checkpoint()
            assert await db.put(b"c", b"1") == 3
            await asyncio.to_thread(wait_until, lambda: db.durable_seqno == 3, "a flush in the background")
            assert not db.store.engine.events.listeners

    asyncio.run(put())


# -- interruptions anywhere -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["put", "commit", "group"])
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("raises", [None, KeyboardInterrupt, Stop])
def test_wherever_a_commit_is_interrupted_no_group_is_told_twice_and_hardly_one_is_lost(
    way: str, sync: bool, raises: type[BaseException] | None
) -> None:
    """With a listener that raises itself, too: then the commit meets two interruptions."""
    lost = 0
    for step in range(1, _MOST_STEPS):
        told: list[CommitGroup] = []
        errors: list[type[BaseException]] = []

        def hear(event: Event, told: list[CommitGroup] = told, errors: Any = errors) -> None:
            assert isinstance(event, CommitGroup)
            told.append(event)
            if errors:
                raise errors.pop()

        queue, log, engine = make(events=Events([Recorder(hear)]))
        queue._thread.waiter = Waiter()
        queue.put(b"before", b"1", sync)
        requests = [put_request(b"k", b"v", sync=sync)]
        if way == "group":
            requests += [put_request(b"with", b"it", sync=sync), CommitRequest(LonePut(b"and", b"it"), sync=sync)]

        def commit(queue: Any = queue, requests: Any = requests, log: Any = log) -> None:
            try:
                if way == "put":
                    queue.put(b"k", b"v", sync)
                elif way == "commit":
                    queue.commit(requests[0])
                else:
                    queue.submit(requests)
            except (KeyboardInterrupt, Stop) as error:
                if type(error) is not raises:
                    raise
                assert b"k" in log.content(), "the listener heard of it"

        errors += [] if raises is None else [raises]
        interruption = interrupted_at(step, commit)
        errors.clear()
        if raises is None:
            # Where a second interruption comes into the handler of the first, the next call ends what that one left.
            at_rest(queue, log, engine)
        assert queue.put(b"after", b"1", sync) == log.last_seqno
        at_rest(queue, log, engine)
        heard = seqnos(told)
        assert heard == sorted(set(heard)), step
        assert heard[-1] == log.last_seqno, step
        missing = set(range(1, log.last_seqno + 1)) - set(heard)
        # The whole group or nothing of it.
        assert len(missing) in {0, log.last_seqno - 2}, step
        lost += bool(missing)
        if interruption is None:
            assert not missing
            break
    else:
        raise AssertionError("the commit has more places than were tried")
    # Between taking the event and the listener's first step: 4 to 7 places, by what the interpreter has specialized.
    assert lost <= 7


@pytest.mark.parametrize("raises", [KeyboardInterrupt, Stop])
def test_a_listener_may_raise_while_an_interrupted_commit_is_finished(raises: type[BaseException]) -> None:
    """The first interruption goes on its way, and nothing is left behind."""
    listener = Raising(CommitGroup, raises())
    queue, log, engine = make(events=Events([listener]))
    first = KeyboardInterrupt()

    def interrupt() -> None:
        log.on_append = lambda: None
        raise first

    log.on_append = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        queue.put(b"k", b"v", True)
    assert caught.value is first
    assert first.__notes__ == ["kvwal: commit 1 was written"]
    at_rest(queue, log, engine)
    assert seqnos(listener.of(CommitGroup)) == [1]


def test_a_listener_may_raise_where_a_bug_poisons_the_store() -> None:
    queue, log, engine = make(events=Events([Recorder(stop)]))
    request = put_request(b"k", b"v")
    request.action = lambda: 1 // 0
    with pytest.raises((ZeroDivisionError, Stop)):
        queue.submit([request])
    at_rest(queue, log, engine)
    with pytest.raises(PoisonedError):
        in_a_thread(lambda: queue.put(b"l", b"v", True))


# -- listeners that call the store ----------------------------------------------------------------



def snapshot(db: kvwal.Store) -> object:
    with db.snapshot() as view:
        return dict(view)


def read(db: kvwal.Store) -> object:
    with db.transaction(read_only=True) as txn:
        return txn.get(b"a")


READS: dict[str, Callable[[kvwal.Store], object]] = {
    "get": lambda db: db.get(b"a"),
    "missing": lambda db: db.get(b"none"),
    "get_many": lambda db: db.get_many([b"a", b"none"]),
    "scan": lambda db: list(db.scan(b"a", b"b")),
    "len": lambda db: len(db),
    "snapshot": snapshot,
    "view": read,
    "stats": lambda db: db.stats(),
    "pins": lambda db: db.pins(),
    "durable": lambda db: (db.last_seqno, db.durable_seqno),
}
WRITES: dict[str, Callable[[kvwal.Store], object]] = {
    **COMMITS,
    "operation": lambda db: db.add(b"n", 1),
    "delete": lambda db: db.delete(b"k"),
    "delete_range": lambda db: db.delete_range(b"k", b"l"),
    "popitem": lambda db: db.popitem(),
    "sync": lambda db: db.sync(),
    "history": lambda db: list(db.history()),
}
UPKEEP: dict[str, Callable[[kvwal.Store], object]] = {
    "checkpoint": lambda db: db.checkpoint(),
    "compact": lambda db: db.compact(),
    "verify": lambda db: db.verify(),
}
CALLS = {**READS, **WRITES, **UPKEEP}


def outcome(call: Callable[[kvwal.Store], object], db: kvwal.Store) -> str:
    try:
        call(db)
    except ReentrancyError:
        return "refused"
    return "done"


@pytest.mark.parametrize("call", CALLS)
def test_a_listener_that_calls_the_store_is_answered_or_refused_at_once(call: str) -> None:
    """At each kind of event; what was under way ends as it would have."""
    outcomes: dict[type[Event], set[str]] = {}
    calling = False

    def look(event: Event) -> None:
        nonlocal calling
        if calling or db is None:
            return
        calling = True
        try:
            outcomes.setdefault(type(event), set()).add(outcome(CALLS[call], db))
        finally:
            calling = False

    db: kvwal.Store | None = None
    options: Any = {**TINY, "background": False, "durability": "os", "keep_history_bytes": 0}

    def work() -> None:
        nonlocal db
        with kvwal.open("/kv", files=SimulatedDisk(), listeners=[Recorder(look)], **options) as store:
            store.put(b"a", b"1", durability="commit")
            db = store
            for number in range(150):
                assert store.put(b"%04d" % number, b"x" * 400, durability="commit") == store.last_seqno
            store.checkpoint()
            db = None
            assert [store.get(b"%04d" % number) for number in range(150)] == [b"x" * 400] * 150 or call == "popitem"
            check_store(store)
            assert store.verify().ok
            assert len(store.engine.events.listeners) == 1

    in_a_thread(work)
    assert set(outcomes) == {CommitGroup, Flush, SegmentSealed, Checkpoint, Retire, Stall}
    for kind, found in outcomes.items():
        if call in READS or kind is Stall:
            assert found == {"done"}, kind
        elif kind in {CommitGroup, Flush, SegmentSealed}:
            assert found == {"refused"}, kind
        elif kind in {Checkpoint, Retire}:
            # Its thread leads no commit, and is in the middle of a checkpoint.
            assert found == ({"refused"} if call in UPKEEP else {"done"}), kind


@pytest.mark.parametrize("kind", [CommitGroup, Flush])
def test_a_listener_of_our_own_that_writes_is_refused_and_the_lead_stays(kind: type[Event]) -> None:
    """No frame outside of kvwal stands between the leader and the call."""
    disk, other = SimulatedDisk(), Recorder()
    with kvwal.open("/kv", files=disk, background=False, listeners=[other]) as db:
        module: dict[str, Any] = {"__name__": "kvwal.metrics", "db": db}
        exec("def write(event): db.put(b'direct', b'1')", module)
        own = Recorder()
        setattr(own, {CommitGroup: "commit_group", Flush: "flush"}[kind], module["write"])  # type: ignore[index]  # one of the two
        db.engine.events.add(own)
        db[b"a"] = b"1"
        assert list(db.engine.events.listeners.values()) == [other]
        db[b"b"] = b"1"
        assert dict(db) == {b"a": b"1", b"b": b"1"}
        check_store(db)
    assert seqnos(other.of(CommitGroup)) == [1, 2]


def test_a_listener_without_a_frame_is_told() -> None:
    class Queueing(Recorder):
        """Its method is C code."""

    events: SimpleQueue[Event] = SimpleQueue()
    listener = Queueing()
    listener.commit_group = events.put  # type: ignore[method-assign]
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, listeners=[listener]) as db:
        db[b"a"] = b"1"
    assert isinstance(events.get_nowait(), CommitGroup)


@pytest.mark.parametrize("kind", [CommitGroup, Flush, Checkpoint])
@pytest.mark.parametrize("background", [False, True])
def test_a_listener_that_closes_the_store_returns_and_the_commit_is_there(
    kind: type[Event], background: bool
) -> None:
    disk = SimulatedDisk()
    refused: list[bool] = []

    def look(event: Event) -> None:
        if isinstance(event, kind) and event is not None and not refused:
            db.close()
            try:
                db.put(b"late", b"1")
            except (ClosedError, ReentrancyError):
                refused.append(True)

    db = kvwal.open("/kv", files=disk, background=background)

    def work() -> None:
        assert db.put(b"a", b"1") == 1
        db.engine.events.add(Recorder(look))
        if kind is Checkpoint:
            # The rest of it may find the log closed.
            with suppress(ClosedError):
                db.checkpoint()
        else:
            assert db.put(b"b", b"2") == 2

    in_a_thread(work)
    wait_until(lambda: db.closed, "the close")
    assert refused == [True]

    def is_free() -> bool:
        try:
            with kvwal.open("/kv", files=disk, background=False) as again:
                assert again.get(b"late") is None
                return again[b"a"] == b"1" and (kind is Checkpoint or again[b"b"] == b"2")
        except kvwal.LockedError:
            return False

    wait_until(is_free, "the lock's end")


# -- listeners that leave -------------------------------------------------------------------------


def test_a_listener_that_leaves_while_it_is_told_hears_no_more() -> None:
    leaving = Recorder(lambda event: db.engine.events.remove(leaving))
    other = Recorder()
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        db.engine.events.add(leaving)
        db.engine.events.add(other)
        db[b"a"] = b"1"
        db[b"b"] = b"1"
    assert seqnos(leaving.of(CommitGroup)) == [1]
    assert seqnos(other.of(CommitGroup)) == [1, 2]


def test_a_listener_that_another_thread_drops_while_it_is_told_hears_that_one_to_its_end() -> None:
    told, go_on = threading.Event(), threading.Event()

    def wait(event: Event) -> None:
        told.set()
        assert go_on.wait(20)

    slow, later = Recorder(wait), Recorder()
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        db.engine.events.add(slow)
        db.engine.events.add(later)
        thread = threading.Thread(target=db.put, args=(b"a", b"1"))
        thread.start()
        assert told.wait(20)
        # Visible, and reads do not wait for a listener.
        assert db[b"a"] == b"1"
        db.engine.events.remove(slow)
        go_on.set()
        thread.join(20)
        db[b"b"] = b"1"
        check_store(db)
    assert seqnos(slow.of(CommitGroup)) == [1]
    assert seqnos(later.of(CommitGroup)) == [1, 2]


def test_listeners_that_come_and_go_beside_commits_hear_a_stretch_of_them(tmp_path: Path) -> None:
    stayed: list[Recorder] = []
    always = Recorder()
    with kvwal.open(tmp_path / "s", durability="os", listeners=[always]) as db:
        over = threading.Event()

        def write() -> None:
            for number in range(400):
                db.put(b"%d" % number, b"1")

        def write_all() -> None:
            run_threads(write, write, write)
            over.set()

        def come_and_go() -> None:
            while not over.is_set():
                listener = Recorder()
                db.engine.events.add(listener)
                over.wait(0.001)
                db.engine.events.remove(listener)
                stayed.append(listener)

        run_threads(write_all, come_and_go, come_and_go)
        check_store(db)
    assert seqnos(always.of(CommitGroup)) == list(range(1, 1201))
    for listener in stayed:
        heard = seqnos(listener.of(CommitGroup))
        assert all(two == one + 1 for one, two in pairwise(heard))
