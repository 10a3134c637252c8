"""The commit queue interrupted at every place: by a signal handler that raises, and by one that commits."""

from __future__ import annotations

import errno
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
from engine_fakes import (
    Asleep,
    FakeEngine,
    FakeLog,
    Others,
    Waiter,
    at_rest,
    delete_request,
    make,
    put_request,
)
from store_fixtures import (
    _CHECKED_AFTER,
    DEADLINE_S,
    Interruption,
    _instructions,
    _is_ours,
    interrupted_at,
    run_threads,
    wait_until,
)

import kvwal
from kvwal.batch import WriteBatch
from kvwal.db.transaction import Transaction
from kvwal.engine.commit import CommitQueue
from kvwal.engine.memtable import Memtable
from kvwal.engine.occ import ReadSet
from kvwal.engine.operations import PopEdge, Update, decode_counter, encode_counter
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import LonePut
from kvwal.errors import ConflictError, DiskFullError, PoisonedError, ReentrancyError
from kvwal.keys import KeyRange, Seqno
from kvwal.log import decode_intents
from kvwal.testing import SimulatedDisk

_MOST_STEPS = 1500


def alone() -> tuple[CommitQueue, FakeLog, FakeEngine]:
    """A queue whose caller is the only thread: where it would sleep, Asleep is raised."""
    queue, log, engine = make()
    queue._thread.waiter = Waiter()
    return queue, log, engine


def says_written(interruption: Interruption) -> bool:
    return any("was written" in note for note in getattr(interruption, "__notes__", ()))


def times_written(log: FakeLog, key: bytes) -> int:
    return sum(key in decode_intents(body).writes for body in log.bodies)


def interrupted(step: int, function: Callable[[], object]) -> Interruption | None:
    try:
        return interrupted_at(step, function)
    except Asleep:
        raise AssertionError(f"interrupted at step {step}, the thread sleeps for ever") from None


# -- handlers that raise --------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("way", ["put", "batch", "tables", "group"])
def test_no_thread_sees_a_part_of_a_commit_that_is_interrupted_again_and_again(
    monkeypatch: pytest.MonkeyPatch, way: str, times: int
) -> None:
    """Whichever section of the state comes next makes the rest of it visible."""
    disk = SimulatedDisk(seed=1)
    with kvwal.open("/kv", files=disk, background=False, durability="os") as db:
        queue = db.engine.queue
        db[b"k"] = b"old"
        # Else a put needs none of what is interrupted here.
        watching = db.snapshot()
        write, resolve, left, seen = Memtable.write, queue._resolve, [times], []

        def interrupted(self: Memtable, *args: Any) -> None:
            if left[0] and threading.current_thread() is threading.main_thread():
                left[0] -= 1
                raise Interruption
            write(self, *args)

        def look() -> None:
            with db.snapshot() as snapshot:
                seen.append((snapshot.get(b"k"), dict(snapshot).get(b"k"), db.get(b"k"), len(snapshot)))
            db.engine._succession.freeze()

        def resolved(*args: Any) -> None:
            if not seen:
                # The lock of the state is free.
                run_threads(look)
            resolve(*args)

        monkeypatch.setattr(Memtable, "write", interrupted)
        monkeypatch.setattr(queue, "_resolve", resolved)
        batch = WriteBatch()
        batch.put(b"k", b"new")
        if way == "tables":
            batch.table(16).put(b"k", b"new")
        with pytest.raises(Interruption):
            if way == "put":
                db[b"k"] = b"new"
            elif way == "group":
                queue.submit([put_request(b"k", b"new", sync=False), put_request(b"x", b"new", sync=False)])
            else:
                db.commit(batch)
        monkeypatch.undo()
        assert left[0] < times
        assert seen[0][:3] == (b"new",) * 3, seen
        assert watching[b"k"] == b"old"
        watching.close()
        db.checkpoint()
        assert db.verify().ok
        expected = {b"k": b"new"} | ({b"x": b"new"} if way == "group" else {})
        assert dict(db) == expected
    with kvwal.open("/kv", files=disk.crash(0)) as db:
        assert dict(db) == expected


WAYS = ["put", "commit", "group"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sync", [False, True])
def test_an_interruption_while_the_caller_handles_a_failure_of_its_own_is_no_failure_of_the_disk(
    way: str, sync: bool
) -> None:
    try:
        raise OSError(errno.EIO, "the caller's own file")
    except OSError:
        test_an_interruption_anywhere_leaves_a_commit_written_or_not(way, sync, False)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sync", [False, True])
def test_an_interruption_anywhere_leaves_a_commit_written_or_not(way: str, sync: bool, watched: bool) -> None:
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        queue.put(b"before", b"1", sync)
        reader = engine.reads.moments.reader("test", writer=True) if watched else None
        requests = [put_request(b"k", b"v", sync=sync)]
        if way == "group":
            requests += [put_request(b"with", b"it", sync=sync), CommitRequest(LonePut(b"and", b"it"), sync=sync)]

        def commit(queue: CommitQueue = queue, requests: list[CommitRequest] = requests) -> None:
            if way == "put":
                queue.put(b"k", b"v", sync)
            elif way == "commit":
                queue.commit(requests[0])
            else:
                queue.submit(requests)

        interruption = interrupted(step, commit)
        # Written or not written, log and memory agree about it, and the queue goes on.
        at_rest(queue, log, engine)
        written = b"k" in log.content()
        assert engine.state.cache.rows.get(b"k") == (b"v" if written else None), step
        if sync:
            assert log.durable_seqno == log.last_seqno, step
        for request, key in zip(requests, (b"k", b"with", b"and"), strict=False):
            if way != "put":
                assert times_written(log, key) == (request.done and request.error is None), step
                assert bool(request.seqno) == (request.done and request.error is None), step
        if reader is not None:
            assert engine.reads.read_at(reader, b"k") is None, step
            conflict = engine.reads.moments.history.conflict(ReadSet(reader.seqno, {b"k"}, ()))
            assert (conflict is not None) == written, step
        assert queue.put(b"after", b"1", sync) == log.last_seqno
        at_rest(queue, log, engine)
        if interruption is None:
            assert written
            return
        assert says_written(interruption) == written, step
    raise AssertionError("the commit has more places than were tried")


def interrupted_twice(
    monkeypatch: pytest.MonkeyPatch, step: int, second: int, function: Callable[[], object]
) -> tuple[Interruption | None, bool]:
    """Interrupted at this step, and at the second one of what handles that; and whether that one came."""
    came: list[bool] = []

    def interrupts(method: Callable[..., object]) -> Callable[..., object]:
        def handle(*args: Any) -> object:
            if came:
                return method(*args)
            came.append(False)
            results: list[object] = []
            again = interrupted_at(second, lambda: results.append(method(*args)))
            if again is not None:
                came[0] = True
                raise again
            return results[0]

        return handle

    with monkeypatch.context() as patched:
        for name in ("_end_put", "_end_alone", "_after_exception"):
            patched.setattr(CommitQueue, name, interrupts(getattr(CommitQueue, name)))
        interruption = interrupted(step, function)
    return interruption, came == [True]


def commit_by(way: str, queue: CommitQueue, sync: bool = True) -> None:
    """Put v to k."""
    if way == "put":
        queue.put(b"k", b"v", sync)
    elif way == "alone":
        queue.commit(CommitRequest(LonePut(b"k", b"v"), sync=sync))
    elif way == "commit":
        queue.commit(put_request(b"k", b"v", sync=sync))
    else:
        queue.submit([put_request(b"k", b"v", sync=sync), put_request(b"with", b"it", sync=sync)])


def begins_in_vain(monkeypatch: pytest.MonkeyPatch, queue: CommitQueue, step: str, times: int) -> None:
    """Let an interruption come as a step of the end of a commit begins, and this many times."""
    left, real = [times], getattr(queue, step)

    def begins(*args: Any) -> object:
        if left[0]:
            left[0] -= 1
            raise Interruption
        return real(*args)

    monkeypatch.setattr(queue, step, begins)


@pytest.mark.parametrize(
    ("way", "step", "times"),
    [
        ("put", "_end_put", 2),
        ("alone", "_end_alone", 1),
        ("commit", "_after_exception", 1),
        ("group", "_after_exception", 1),
        ("put", "_insist", 5),
        *((way, "_insist", 3) for way in ("alone", "commit", "group")),
    ],
)
def test_what_ends_a_commit_is_begun_anew_where_an_interruption_comes_as_it_begins(
    monkeypatch: pytest.MonkeyPatch, way: str, step: str, times: int
) -> None:
    queue, log, engine = alone()
    log.fail_sync = [Interruption()]
    begins_in_vain(monkeypatch, queue, step, times)
    with pytest.raises(Interruption) as caught:
        commit_by(way, queue)
    assert says_written(caught.value)
    at_rest(queue, log, engine)
    assert engine.state.cache.rows.get(b"k") == b"v"
    assert times_written(log, b"k") == 1


def test_a_put_in_the_log_that_cannot_be_ended_any_more_poisons_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not go on without what the next open will find."""
    queue, log, engine = alone()
    log.fail_sync = [Interruption()]
    begins_in_vain(monkeypatch, queue, "_end_put", 3)
    begins_in_vain(monkeypatch, queue, "_hand_over", 1)
    with pytest.raises(Interruption):
        commit_by("put", queue)
    assert times_written(log, b"k") == 1
    assert b"k" not in engine.state.cache.rows
    for _ in range(2):
        with pytest.raises(PoisonedError):
            queue.put(b"after", b"1", True)
    assert times_written(log, b"after") == 0
    assert not queue.lock._is_owned()


IN_VAIN = [("put", "_end_put", 3), ("alone", "_end_alone", 2), ("commit", "_after_exception", 2)]
IN_VAIN.append(("group", "_after_exception", 2))


@pytest.mark.parametrize(("way", "step", "times"), IN_VAIN)
@pytest.mark.parametrize("ends", ["another put", "another commit", "the same thread", "one that sleeps"])
def test_what_its_thread_cannot_end_is_ended_by_the_next_that_leads(
    monkeypatch: pytest.MonkeyPatch, way: str, step: str, times: int, ends: str
) -> None:
    queue, log, engine = make()
    asleep = threading.Thread(target=queue.put, args=(b"asleep", b"1", True), daemon=True)

    def interrupt() -> None:
        if ends == "one that sleeps":
            queued = len(queue._queue)
            asleep.start()
            wait_until(lambda: len(queue._queue) > queued)
        raise Interruption

    log.on_sync = interrupt
    begins_in_vain(monkeypatch, queue, step, times)
    with pytest.raises(Interruption) as caught:
        commit_by(way, queue)
    log.on_sync = lambda: None
    assert "is not known here" in caught.value.__notes__[0]
    if ends == "another put":
        run_threads(lambda: queue.put(b"after", b"1", True))
    elif ends == "another commit":
        run_threads(lambda: queue.commit(put_request(b"after", b"1")))
    elif ends == "the same thread":
        queue.put(b"after", b"1", True)
    else:
        asleep.join(DEADLINE_S)
        assert not asleep.is_alive()
    at_rest(queue, log, engine)
    assert engine.state.cache.rows.get(b"k") == b"v"
    assert times_written(log, b"k") == 1


def test_a_request_whose_thread_is_gone_before_any_took_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, log, engine = make()
    begins_in_vain(monkeypatch, queue, "_leads", 1)
    begins_in_vain(monkeypatch, queue, "_after_exception", 2)
    with pytest.raises(Interruption):
        commit_by("group", queue)
    run_threads(lambda: queue.put(b"after", b"1", True))
    at_rest(queue, log, engine)
    assert times_written(log, b"k") == 0
    assert times_written(log, b"after") == 1


def frames_left() -> int:
    def down(n: int) -> int:
        try:
            return down(n + 1)
        except RecursionError:
            return n

    return down(0)


def at_depth(n: int, function: Callable[[], object]) -> object:
    return at_depth(n - 1, function) if n else function()


@pytest.mark.parametrize("way", ["put", "alone", "commit", "group"])
@pytest.mark.parametrize("sync", [False, True])
def test_without_frames_to_end_it_a_commit_stops_no_other(way: str, sync: bool) -> None:
    failed = 0
    for frames in range(80):
        queue, log, engine = make()
        queue.put(b"before", b"1", sync)
        try:
            at_depth(frames_left() - frames, partial(commit_by, way, queue, sync))
        except RecursionError:
            failed += 1
        else:
            assert times_written(log, b"k") == 1
        run_threads(lambda: queue.put(b"after", b"1", True))
        assert times_written(log, b"after") == 1
        at_rest(queue, log, engine)
    assert 3 < failed < 80


NO_MEMORY = """
import _testcapi, gc, sys, threading
import kvwal
from kvwal.testing import SimulatedDisk

def put(db):
    db.put(b"k", b"v")

def transaction(db):
    with db.transaction() as txn:
        txn.get(b"a")
        txn.put(b"k", b"v")

gc.disable()
function = globals()[sys.argv[1]]
for first in range(1, 400):
    disk = SimulatedDisk()
    db = kvwal.open("/kv", files=disk, background=False)
    done = False
    try:
        _testcapi.set_nomemory(first, first + 40)
        try:
            function(db)
        finally:
            _testcapi.remove_mem_hooks()
        done = True
    except MemoryError:
        pass
    other = threading.Thread(target=db.put, args=(b"after", b"1"), daemon=True)
    other.start()
    other.join(60)
    if other.is_alive() or db.get(b"after") != b"1":
        sys.exit(f"after {first} allocations no other put is done")
    seen = db.get(b"k")
    db.close()
    with kvwal.open("/kv", files=disk, background=False) as db:
        if db.get(b"k") != seen or (done and seen is None):
            sys.exit(f"after {first} allocations memory and log were not the same")
    if done:
        sys.exit()
sys.exit("never done")
"""


@pytest.mark.parametrize("way", ["put", "transaction"])
def test_without_memory_to_end_it_a_commit_stops_no_other(way: str) -> None:
    pytest.importorskip("_testcapi")
    child = subprocess.run([sys.executable, "-c", NO_MEMORY, way], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.mark.parametrize("way", ["alone", *WAYS])
@pytest.mark.parametrize("sync", [False, True])
def test_a_second_interruption_of_what_handles_the_first_one_leaves_a_commit_written_or_not(
    monkeypatch: pytest.MonkeyPatch, rng: Random, way: str, sync: bool
) -> None:
    for step in range(1, _MOST_STEPS):
        second, was_second = 0, True
        while was_second:
            second += rng.randrange(1, 16)
            queue, log, engine = alone()
            queue.put(b"before", b"1", sync)

            commit = partial(commit_by, way, queue, sync)
            interruption, was_second = interrupted_twice(monkeypatch, step, second, commit)
            at_rest(queue, log, engine)
            written = b"k" in log.content()
            assert engine.state.cache.rows.get(b"k") == (b"v" if written else None), (step, second)
            assert times_written(log, b"k") == written, (step, second)
            if interruption is None:
                return
            # Interrupted twice, the first one may have the note.
            both = (interruption, interruption.__context__)
            says = any(isinstance(each, Interruption) and says_written(each) for each in both)
            assert says == written, (step, second)
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.parametrize("sync", [False, True])
def test_an_interruption_anywhere_on_a_full_disk_leaves_each_request_written_or_not(sync: bool) -> None:
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        queue.put(b"a", b"1", sync)
        queue.put(b"b", b"1", sync)
        requests = [
            delete_request(b"a", sync=sync),
            delete_request(b"b", sync=sync),
            put_request(b"c", b"1", sync=sync),
        ]
        log.fail_append = [DiskFullError("full")]
        interruption = interrupted(step, partial(queue.submit, requests))
        log.fail_append = []
        at_rest(queue, log, engine)
        # An interrupted append of the whole group is tried again, and may then find room.
        for key, request, times in zip((b"a", b"b", b"c"), requests, (1, 1, 0), strict=True):
            assert times_written(log, key) - times == (request.done and request.error is None), (step, key)
        queue.put(b"after", b"1", sync)
        at_rest(queue, log, engine)
        if interruption is None:
            assert log.content() == {b"after": b"1"}
            return
    raise AssertionError("the commit has more places than were tried")


def test_an_interruption_anywhere_on_a_full_disk_lets_no_operation_see_what_is_not_written() -> None:
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        queue.put(b"a", b"1", False)
        taking = [PopEdge(KeyRange(b"", None), reverse=True) for _ in range(2)]
        operations = [CommitRequest(sync=False, operation=each) for each in taking]
        put = put_request(b"c", b"1", sync=False)
        log.fail_append = [DiskFullError("full")]
        interruption = interrupted(step, partial(queue.submit, [put, *operations]))
        log.fail_append = []
        at_rest(queue, log, engine)
        left = {b"a": b"1"}
        if put.done and put.error is None:
            # An interrupted append of the whole group is tried again, and may then find room.
            left[b"c"] = b"1"
        for request, each in zip(operations, taking, strict=True):
            if request.done and request.error is None:
                assert each.pair == (left.popitem() if left else None), step
        assert log.content() == left, step
        if interruption is None:
            assert isinstance(put.error, DiskFullError)
            assert [each.pair for each in taking] == [(b"a", b"1"), None]
            return
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.parametrize("sync", [False, True])
def test_an_interrupted_operation_is_done_once_or_not_at_all(sync: bool) -> None:
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        queue.put(b"n", encode_counter(10), sync)
        updates = [Update(b"n", lambda old: encode_counter(decode_counter(old) + 1)) for _ in range(2)]
        requests = [CommitRequest(sync=sync, operation=update) for update in updates]
        interruption = interrupted(step, partial(queue.submit, requests))
        at_rest(queue, log, engine)
        written = [request.done and request.error is None for request in requests]
        assert decode_counter(engine.reads.read(b"n")) == 10 + sum(written), step
        assert len(log.bodies) == 1 + sum(written), step
        if interruption is None:
            assert written == [True, True]
            return
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.parametrize("own", ["put", "alone", "commit", "conflict", "operation", "sync", "action"])
@pytest.mark.parametrize(("theirs", "sync"), [("puts", False), ("puts", True), ("conflicts", True), ("actions", True)])
@pytest.mark.parametrize("when", ["before it", "with it", "meanwhile", "as it ends"])
def test_an_interruption_anywhere_leaves_no_thread_asleep(when: str, theirs: str, sync: bool, own: str) -> None:
    """The thread that leads may be all that the others wait for: in the midst of waking them, or before it leads."""
    arrived = False
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        reader = engine.reads.moments.reader("test", writer=True)
        queue.put(b"before", b"1", sync)
        ran: list[bytes] = []
        others = Others(queue, [_of_another_thread(theirs, key, sync, reader.seqno, ran) for key in (b"one", b"two")])
        if when == "before it":
            others.arrive()
            queue._thread.waiter = Waiter(others.run)
        elif when == "with it":
            _call_first(queue, "_next_group", others.arrive)
        elif when == "meanwhile":
            _call_first(log, "sync" if sync else "append", others.arrive)
            _call_first(log, "append_put", others.arrive)
        else:
            _call_first(queue, "_wake_head", others.arrive)
        interruption = interrupted(step, partial(_commit_as, own, queue, sync, reader.seqno))
        if others.have_arrived:
            arrived = True
            try:
                others.run()
            except Asleep:
                raise AssertionError(f"interrupted at step {step}, another thread sleeps for ever") from None
            for request, key in zip(others.requests, (b"one", b"two"), strict=True):
                assert request.done, step
                if theirs == "conflicts":
                    assert isinstance(request.error, ConflictError), step
                    continue
                assert request.error is None, step
                if theirs == "actions":
                    assert key in ran, step
                else:
                    assert times_written(log, key) == 1, step
        if interruption is not None:
            assert times_written(log, b"k") == says_written(interruption), step
        at_rest(queue, log, engine)
        if interruption is None:
            assert times_written(log, b"k") == (own in ("put", "alone", "commit", "operation"))
            assert (
                arrived
                or (own in ("put", "alone") and when in ("with it", "as it ends"))
                or (when == "meanwhile" and own in ("conflict", "sync", "action"))
            )
            return
    raise AssertionError("the commit has more places than were tried")


def _of_another_thread(kind: str, key: bytes, sync: bool, since: Seqno, ran: list[bytes]) -> CommitRequest:
    if kind == "actions":
        return CommitRequest(sync=sync, action=lambda: ran.append(key))
    if kind == "conflicts":
        return put_request(key, b"v", sync=sync, reads=ReadSet(since, [b"before"], ()))
    return put_request(key, b"v", sync=sync)


def _commit_as(kind: str, queue: CommitQueue, sync: bool, since: Seqno) -> None:
    if kind == "put":
        queue.put(b"k", b"v", sync)
    elif kind == "alone":
        queue.commit(CommitRequest(LonePut(b"k", b"v"), sync=sync, reads=ReadSet(queue._state.seqno, [b"k"], ())))
    elif kind == "commit":
        queue.commit(put_request(b"k", b"v", sync=sync))
    elif kind == "conflict":
        queue.submit([put_request(b"k", b"v", sync=sync, reads=ReadSet(since, [b"before"], ()))])
    elif kind == "operation":
        queue.commit(CommitRequest(sync=sync, operation=Update(b"k", lambda old: b"v")))
    elif kind == "sync":
        queue.sync()
    else:
        queue.commit(CommitRequest(sync=sync, action=lambda: None))


def _call_first(owner: Any, name: str, function: Callable[[], None]) -> None:
    """Call the function before the method."""
    method = getattr(owner, name)

    def both(*arguments: Any, **options: Any) -> Any:
        function()
        return method(*arguments, **options)

    setattr(owner, name, both)


@pytest.mark.parametrize("sync", [False, True])
def test_an_interrupted_transaction_says_whether_it_was_written(sync: bool) -> None:
    """Also when the commit is over, and only the snapshot is still to be given back."""
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        queue.put(b"k", b"old", sync)
        txn = Transaction(engine, sync=sync, read_only=False)
        txn[b"k"] = b"new"
        interruption = interrupted(step, txn.commit)
        written = log.content()[b"k"] == b"new"
        assert txn.commit_seqno == (2 if written else None), step
        assert not (written and txn.is_open), step
        if interruption is None:
            assert written
            return
        assert getattr(interruption, "__notes__", []) == ["kvwal: commit 2 was written"] * written, step
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.parametrize("error", [InterruptedError, TimeoutError, MemoryError, SystemExit, ValueError])
@pytest.mark.parametrize("way", ["put", "commit"])
@pytest.mark.parametrize("after", [False, True], ids=["before the append", "after it"])
def test_what_a_handler_raises_is_no_failure_of_the_disk(error: type[BaseException], way: str, after: bool) -> None:
    queue, log, engine = alone()

    def handler() -> None:
        log.on_append = lambda: None
        raise error("of a signal handler")

    if after:
        log.on_append = handler
    else:
        append = log.append

        def interrupted_before(*arguments: Any, **options: Any) -> Seqno:
            log.append = append  # type: ignore[method-assign]
            raise error("of a signal handler")

        log.append = interrupted_before  # type: ignore[method-assign]
    with pytest.raises(error) as caught:
        queue.put(b"k", b"v", True) if way == "put" else queue.commit(put_request(b"k", b"v"))
    assert log.content() == {b"k": b"v"}
    assert "kvwal: commit 1 was written" in caught.value.__notes__
    at_rest(queue, log, engine)
    assert queue.put(b"after", b"v", True) == 2


# -- a thread that waits --------------------------------------------------------------------------


class Leader:
    """Another thread, which leads a commit of its own and stops in its flush until it is let go."""

    def __init__(self, queue: CommitQueue, log: FakeLog, *keys: bytes) -> None:
        self._go = threading.Semaphore(0)
        self._log = log
        self.flushing = threading.Semaphore(0)
        log.on_sync = self._flush
        requests = [put_request(key, b"v") for key in keys]
        self.requests = requests
        self._thread = threading.Thread(target=queue.submit, args=(requests,), daemon=True)
        self._thread.start()

    def _flush(self) -> None:
        self.flushing.release()
        assert self._go.acquire(timeout=DEADLINE_S)

    def let_go(self, flushes: int = 1) -> None:
        self._go.release(flushes)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


class RaisingWaiter:
    """What the test's thread sleeps on: before it first falls asleep something is called, which may raise."""

    def __init__(self, first: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._first: Callable[[], None] | None = first

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        first, self._first = self._first, None
        if first is not None:
            first()
        assert self._lock.acquire(timeout=DEADLINE_S if timeout < 0 else timeout) or timeout >= 0, "asleep for ever"
        return True

    def release(self) -> None:
        self._lock.release()


def test_a_thread_that_is_interrupted_before_a_leader_took_its_request_has_written_nothing() -> None:
    queue, log, engine = make()
    leader = Leader(queue, log, b"a")
    assert leader.flushing.acquire(timeout=DEADLINE_S)

    def interrupt() -> None:
        raise Interruption

    queue._thread.waiter = RaisingWaiter(interrupt)
    request = put_request(b"k", b"v")
    with pytest.raises(Interruption) as caught:
        queue.commit(request)
    assert request.done
    assert isinstance(request.error, Interruption)
    assert not says_written(caught.value)
    leader.let_go(9)
    leader.join()
    assert queue.put(b"after", b"v", True) == 2
    assert log.content() == {b"a": b"v", b"after": b"v"}
    at_rest(queue, log, engine)


def test_a_thread_that_is_interrupted_after_a_leader_took_its_request_waits_and_says_that_it_was_written() -> None:
    queue, log, engine = make()
    first = Leader(queue, log, b"a")
    assert first.flushing.acquire(timeout=DEADLINE_S)
    second = Leader(queue, log, b"b")
    wait_until(lambda: len(queue._queue) == 2, "the request of the second")
    request = put_request(b"k", b"v")

    def interrupt() -> None:
        first.let_go()
        assert second.flushing.acquire(timeout=DEADLINE_S)
        assert request.taken
        second.let_go(9)
        raise Interruption

    queue._thread.waiter = RaisingWaiter(interrupt)
    with pytest.raises(Interruption) as caught:
        queue.commit(request)
    assert says_written(caught.value)
    assert (request.error, request.seqno) == (None, 3)
    assert log.content() == {b"a": b"v", b"b": b"v", b"k": b"v"}
    first.join()
    second.join()
    at_rest(queue, log, engine)


class RaisingLock:
    """The leader's lock: the first to wait for it is interrupted, before it has it or as soon as it has."""

    def __init__(self, lock: Any, *, after: bool) -> None:
        self._lock = lock
        self._left = 1
        self._after = after
        self._is_owned = lock._is_owned
        self.release = lock.release

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if not blocking:
            return bool(self._lock.acquire(False))
        self._left, left = 0, self._left
        if left and not self._after:
            raise Interruption
        self._lock.acquire()
        if left:
            raise Interruption
        return True


@pytest.mark.parametrize("after", [False, True], ids=["before it has it", "as it gets it"])
def test_a_head_that_is_interrupted_while_it_waits_for_the_lock_has_written_nothing_and_the_next_leads(
    after: bool,
) -> None:
    queue, log, engine = alone()
    lock = queue.lock
    queue.lock = RaisingLock(lock, after=after)  # type: ignore[assignment]
    others = Others(queue, [put_request(b"o", b"v")])
    request = put_request(b"k", b"v")
    _call_first(queue, "_leads", others.arrive)
    with pytest.raises(Interruption) as caught:
        queue.commit(request)
    assert not says_written(caught.value)
    assert isinstance(request.error, Interruption)
    queue.lock = lock
    others.run()
    assert log.content() == {b"o": b"v"}
    at_rest(queue, log, engine)


@pytest.mark.parametrize("head", [False, True], ids=["asleep", "at the head"])
def test_control_c_reaches_a_thread_that_waits_for_another(head: bool) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    queue, log, engine = make()
    first = Leader(queue, log, b"a")
    assert first.flushing.acquire(timeout=DEADLINE_S)
    if head:
        # As of a put alone, which holds the lock without a request.
        queue._queue.clear()
    request = put_request(b"k", b"v")
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: request in queue._queue, "the request")
        signal.pthread_kill(main, signal.SIGUSR1)

    def raise_it(*_: object) -> None:
        raise Interruption

    former = signal.signal(signal.SIGUSR1, raise_it)
    try:
        sender = threading.Thread(target=interrupt)
        sender.start()
        with pytest.raises(Interruption) as caught:
            queue.commit(request)
        sender.join()
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert not says_written(caught.value)
    first.let_go(9)
    first.join()
    assert queue.put(b"after", b"v", True) == 2
    assert log.content() == {b"a": b"v", b"after": b"v"}
    at_rest(queue, log, engine)


# -- handlers that commit -------------------------------------------------------------------------


def called_at(step: int, function: Callable[[], object], handler: Callable[[], object]) -> bool:
    """Run the function, calling the handler at the step-th place in kvwal where a signal handler could. False if it
    ended first."""
    left = step
    before: dict[Any, int] = {}

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        if not _is_ours(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = True
        place = event == "call" and frame not in before
        if event == "opcode":
            last = before.get(frame, -1)
            before[frame] = frame.f_lasti // 2
            place = last >= 0 and _instructions(frame.f_code)[0][last] in _CHECKED_AFTER
        if place:
            left -= 1
            if left == 0:
                sys.settrace(None)
                handler()
        return trace

    gc.disable()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
        gc.enable()
    return left <= 0


def nested(way: str, queue: CommitQueue) -> None:
    if way == "put":
        queue.put(b"nested", b"1", True)
    else:
        queue.commit(put_request(b"nested", b"1"))


@pytest.mark.parametrize("inner", ["put", "commit"])
@pytest.mark.parametrize("outer", ["put", "commit", "group", "waiting"])
def test_a_handler_that_commits_anywhere_is_done_or_refused_and_the_outer_commit_goes_on(
    outer: str, inner: str
) -> None:
    done = 0
    for step in range(1, _MOST_STEPS):
        queue, log, engine = alone()
        queue.put(b"before", b"1", True)
        others = Others(queue, [put_request(b"one", b"1"), put_request(b"two", b"1")])
        if outer == "waiting":
            others.arrive()
            queue._thread.waiter = Waiter(others.run)
        outcome: list[bool] = []

        def handler(queue: CommitQueue = queue, outcome: list[bool] = outcome) -> None:
            try:
                nested(inner, queue)
            except ReentrancyError:
                outcome.append(False)
            else:
                outcome.append(True)

        requests = [put_request(b"k", b"v"), CommitRequest(LonePut(b"l", b"v"), sync=True)]

        def commit(queue: CommitQueue = queue, requests: list[CommitRequest] = requests) -> None:
            if outer == "put":
                queue.put(b"k", b"v", True)
            else:
                queue.submit(requests if outer == "group" else requests[:1])

        try:
            came = called_at(step, commit, handler)
            if others.have_arrived:
                others.run()
        except Asleep:
            raise AssertionError(f"called at step {step}, a thread sleeps for ever") from None
        assert times_written(log, b"k") == 1, step
        assert times_written(log, b"nested") == (outcome == [True]), step
        at_rest(queue, log, engine)
        if not came:
            assert done, "it was never done"
            assert (done < step - 1) == (outer != "waiting"), "whether it was ever refused"
            return
        done += outcome == [True]
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.parametrize("inner", ["put", "commit"])
@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in one group"])
def test_a_handler_that_commits_while_its_thread_sleeps_is_served_and_the_thread_wakes(
    together: bool, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one group, one opening of what the thread sleeps on is for both calls, and the nested one takes it.

    One by one, the nested call leads for the one that it interrupted.
    """
    if not together:
        monkeypatch.setattr("kvwal.engine.commit._MAX_GROUP_BYTES", 0)
    queue, log, engine = alone()
    others = Others(queue, [put_request(b"o", b"1")])
    others.arrive()
    queue._thread.waiter = Waiter(lambda: nested(inner, queue), others.run)
    assert queue.commit(put_request(b"k", b"v")) == 2
    assert log.groups == ([3] if together else [1, 1, 1])
    assert log.content() == {b"o": b"1", b"k": b"v", b"nested": b"1"}
    at_rest(queue, log, engine)


def test_a_real_signal_handler_that_commits_while_its_thread_sleeps_is_served_and_the_thread_wakes() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    queue, log, engine = make()
    first = Leader(queue, log, b"a")
    assert first.flushing.acquire(timeout=DEADLINE_S)
    second = Leader(queue, log, b"b")
    wait_until(lambda: len(queue._queue) == 2, "the request of the second")
    outer, inner = put_request(b"k", b"v"), put_request(b"nested", b"v")
    main = threading.main_thread().ident
    assert main is not None

    def play() -> None:
        wait_until(lambda: outer in queue._queue, "the request")
        signal.pthread_kill(main, signal.SIGUSR1)
        wait_until(lambda: inner in queue._queue, "the nested request")
        first.let_go(9)
        second.let_go(9)
        wait_until(lambda: outer.done and inner.done, "the commits")
        # Where the outer call sleeps on, this ends the test.
        if not over.acquire(timeout=3):
            signal.pthread_kill(main, signal.SIGUSR2)

    def commit(*_: object) -> None:
        queue.commit(inner)

    def give_up(*_: object) -> None:
        raise AssertionError("the outer call sleeps for ever")

    over = threading.Semaphore(0)
    former = signal.signal(signal.SIGUSR1, commit), signal.signal(signal.SIGUSR2, give_up)
    try:
        player = threading.Thread(target=play)
        player.start()
        queue.commit(outer)
        over.release()
        player.join()
    finally:
        signal.signal(signal.SIGUSR1, former[0])
        signal.signal(signal.SIGUSR2, former[1])
    assert set(log.content()) == {b"a", b"b", b"k", b"nested"}
    first.join()
    second.join()
    at_rest(queue, log, engine)


@pytest.mark.parametrize("where", ["validate", "append", "sync", "publish", "action"])
@pytest.mark.parametrize("inner", ["put", "commit", "submit", "sync", "run"])
def test_a_call_from_within_a_thread_that_leads_is_refused_and_changes_nothing(where: str, inner: str) -> None:
    queue, log, engine = alone()
    tried: list[int] = []

    def call() -> None:
        request = put_request(b"nested", b"1")
        calls: dict[str, Callable[[], object]] = {
            "put": lambda: queue.put(b"nested", b"1", True),
            "commit": lambda: queue.commit(request),
            "submit": lambda: queue.submit([request, put_request(b"nested too", b"1")]),
            "sync": queue.sync,
            "run": lambda: queue.run(lambda: tried.append(-1)),
        }
        before = list(queue._queue), log.last_seqno, log.syncs, engine.state.seqno
        with pytest.raises(ReentrancyError):
            calls[inner]()
        assert (list(queue._queue), log.last_seqno, log.syncs, engine.state.seqno) == before
        assert not request.done
        tried.append(1)

    options: dict[str, Any] = {}
    if where == "validate":

        def evaluate(old: bytes | None) -> bytes:
            call()
            return b"v"

        options["operation"] = Update(b"k", evaluate)
    elif where == "append":
        log.on_append = call
    elif where == "sync":
        log.on_sync = call
    elif where == "publish":
        _call_first(engine.publisher, "_see_to_memory", call)
    else:
        options["action"] = call
    request = put_request(b"k", b"v", **options)
    assert queue.commit(request) == 1
    assert 1 in tried
    assert -1 not in tried
    assert log.content() == {b"k": b"v"}
    at_rest(queue, log, engine)


def test_the_head_may_leave_the_queue_while_the_leader_looks_for_the_next() -> None:
    """A thread that is interrupted withdraws its request between the leader's two looks at the queue."""
    queue, log, engine = alone()
    late = put_request(b"late", b"v")

    class Left(type(queue._queue)):  # type: ignore[misc]
        def __len__(self) -> int:
            length = super().__len__()
            # The other thread withdraws under the lock of the queue: not while the leader has it.
            if length and self[0] is late and not queue.queue_lock._is_owned():
                self.remove(late)
            return int(length)

    queue._queue = Left()
    log.on_sync = lambda: queue._queue.append(late)
    assert queue.commit(put_request(b"k", b"v")) == 1
    at_rest(queue, log, engine)


def test_a_lead_that_a_second_interruption_left_behind_is_ended_by_the_next_call_of_its_thread() -> None:
    queue, log, engine = alone()
    queue.put(b"before", b"1", True)
    queue.lock.acquire()
    left = put_request(b"left", b"1")
    left.waiter = queue._thread.waiter
    queue._queue.append(left)
    assert queue.put(b"k", b"v", True) == 2
    assert left.done
    assert isinstance(left.error, KeyboardInterrupt)
    assert times_written(log, b"left") == 0
    engine.state.lock.acquire()
    assert queue.put(b"k", b"w", True) == 3
    at_rest(queue, log, engine)
