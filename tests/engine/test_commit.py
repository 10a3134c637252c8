"""The commit queue: grouping, conflicts within a group, operations, full disks, failures."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_fakes import FakeLog, Others, at_rest, delete_request, make, put_request
from store_fixtures import DEADLINE_S, wait_until

import kvwal
from kvwal.batch import WriteBatch
from kvwal.db.transaction import Transaction
from kvwal.engine.commit import CommitQueue
from kvwal.engine.occ import ReadSet
from kvwal.engine.operations import PopEdge, Update, decode_counter, encode_counter
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import EncodedBatch, LonePut
from kvwal.errors import (
    ClosedError,
    ConflictError,
    DiskFullError,
    ForkedError,
    PoisonedError,
    RefusedError,
    SystemCallError,
    closed,
    forked,
)
from kvwal.events import Events
from kvwal.keys import KeyRange, Seqno
from kvwal.log import RefusingLog, extension_of

EVERYTHING = KeyRange(b"", None)


def put(key: bytes, value: bytes = b"v") -> CommitRequest:
    """A request of a put alone."""
    return CommitRequest(LonePut(key, value), sync=True)


def operation(what: Any) -> CommitRequest:
    return CommitRequest(sync=True, operation=what)


def add(key: bytes, amount: int) -> Update:
    return Update(key, lambda old: encode_counter(decode_counter(old) + amount))


# -- one commit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["put", "commit"])
def test_a_lone_put_is_flushed_before_it_is_visible(way: str) -> None:
    queue, log, engine = make()
    log.on_sync = lambda: visible.append((engine.state.cache.rows.get(b"k"), engine.state.seqno))
    visible: list[tuple[bytes | None, int]] = []
    assert (queue.put(b"k", b"v", True) if way == "put" else queue.commit(put_request(b"k", b"v"))) == 1
    assert visible == [(None, 0)]
    assert engine.state.cache.rows[b"k"] == b"v"
    at_rest(queue, log, engine)


def test_a_put_without_sync_is_not_flushed() -> None:
    queue, log, engine = make()
    queue.put(b"k", b"v", False)
    assert (log.syncs, log.last_seqno, engine.state.seqno) == (0, 1, 1)


def test_a_request_without_writes_has_seqno_0_and_writes_nothing() -> None:
    queue, log, engine = make()
    assert queue.commit(CommitRequest(sync=True)) == 0
    assert (log.syncs, log.bodies, engine.state.seqno) == (1, [], 0)


# -- groups ---------------------------------------------------------------------------------------


def test_threads_that_arrive_during_a_flush_share_the_next_one() -> None:
    queue, log, engine = make()
    arrived = threading.Semaphore(0)
    threads = [threading.Thread(target=queue.put, args=(b"%d" % n, b"v", True)) for n in range(8)]

    def during_first_flush() -> None:
        log.on_sync = lambda: None
        for thread in threads:
            thread.start()
        while len(queue._queue) < len(threads):
            arrived.acquire(timeout=0.001)

    log.on_sync = during_first_flush
    queue.put(b"first", b"v", True)
    for thread in threads:
        thread.join()
    assert log.syncs == 2
    assert log.groups == [1, 8]
    assert len(log.content()) == 9
    at_rest(queue, log, engine)


def test_requests_submitted_together_are_one_group_in_their_order() -> None:
    queue, log, engine = make()
    requests = [put_request(b"a", b"1"), put(b"b"), CommitRequest(sync=False), put_request(b"a", b"2")]
    queue.submit(requests)
    assert [request.seqno for request in requests] == [1, 2, 0, 3]
    assert all(request.done and request.error is None for request in requests)
    assert (log.groups, log.syncs) == ([3], 1)
    assert log.content() == {b"a": b"2", b"b": b"v"}
    at_rest(queue, log, engine)


def test_a_group_is_flushed_before_any_of_it_is_visible_if_one_member_wants_it() -> None:
    queue, log, engine = make()
    log.on_sync = lambda: visible.append((dict(engine.state.cache.rows), engine.state.seqno))
    visible: list[Any] = []
    queue.submit([put_request(b"a", b"1", sync=False), put_request(b"b", b"1", sync=True)])
    assert visible == [({}, 0)]
    queue.submit([put_request(b"c", b"1", sync=False), put_request(b"d", b"1", sync=False)])
    assert len(visible) == 1


def test_what_is_too_much_for_one_group_is_committed_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.engine.commit._MAX_GROUP_BYTES", 10)
    queue, log, engine = make()
    requests = [put_request(b"%d" % number, b"12345") for number in range(5)]
    queue.submit(requests)
    assert log.groups == [2, 2, 1]
    assert [request.seqno for request in requests] == [1, 2, 3, 4, 5]
    at_rest(queue, log, engine)


@pytest.mark.parametrize("watched", [False, True])
def test_a_group_of_lone_puts_is_published_each_with_its_seqno(watched: bool) -> None:
    queue, log, engine = make()
    queue.put(b"a", b"0", True)
    reader = engine.reads.moments.reader("test", writer=True) if watched else None
    requests = [put(b"a", b"1"), put(b"b", b"1"), put(b"a", b"2")]
    queue.submit(requests)
    assert [request.seqno for request in requests] == [2, 3, 4]
    assert log.groups == [1, 3]
    assert (engine.reads.read(b"a"), engine.reads.read(b"b")) == (b"2", b"1")
    if reader is not None:
        assert (engine.reads.read_at(reader, b"a"), engine.reads.read_at(reader, b"b")) == (b"0", None)
        reads = [ReadSet(Seqno(since), {key}, ()) for since, key in ((3, b"a"), (2, b"b"), (3, b"b"))]
        found = [engine.reads.moments.history.conflict(each) for each in reads]
        assert [conflict and conflict.seqno for conflict in found] == [4, 3, None]
    at_rest(queue, log, engine)


def test_a_leader_waits_for_the_threads_that_the_last_flush_served() -> None:
    """Without that, two threads that commit in a loop would each wait for the flush of the other."""
    clock_s = 0.0

    def now_s() -> float:
        nonlocal clock_s
        clock_s += 1000.0
        return clock_s

    _, log, engine = make()
    queue = engine.make_queue(log, Events(), now_s=now_s)
    others = Others(queue, [put(b"b")])
    _arrive_with_the_next(queue, others.arrive)
    queue.submit([put(b"a")])
    others.run()
    # Two were served at once. Now the first of them waits, for longer than this test may take, until the second comes.
    first = threading.Thread(target=queue.put, args=(b"a", b"2", True), daemon=True)
    first.start()
    wait_until(lambda: queue._window.is_open, "the window")
    queue.put(b"b", b"2", True)
    first.join(DEADLINE_S)
    assert log.groups[-1] == 2
    at_rest(queue, log, engine)


# -- conflicts ------------------------------------------------------------------------------------


def test_of_two_conflicting_members_of_a_group_the_second_fails() -> None:
    queue, log, engine = make()
    reader = engine.reads.moments.reader("test", writer=True)
    within = [KeyRange(b"b", b"d")]
    one = put_request(b"a", b"1", reads=ReadSet(reader.seqno, [b"a"], ()))
    two = put_request(b"a", b"2", reads=ReadSet(reader.seqno, [b"a"], ()))
    three = put_request(b"c", b"3", reads=ReadSet(reader.seqno, (), within))
    four = put_request(b"z", b"4", reads=ReadSet(reader.seqno, (), within))
    queue.submit([put_request(b"x", b"0"), one, two, three, four])
    assert [r.error is None for r in (one, two, three, four)] == [True, False, True, False]
    assert isinstance(two.error, ConflictError)
    assert two.error.seqno == one.seqno
    assert isinstance(four.error, ConflictError)
    assert four.error.seqno == three.seqno
    assert log.content() == {b"x": b"0", b"a": b"1", b"c": b"3"}
    assert engine.state.cache.rows[b"a"] == b"1"
    at_rest(queue, log, engine)


def test_a_conflict_of_one_leaves_the_rest_of_its_group_committed() -> None:
    """Also where the one that has it leads the group."""
    for first in (True, False):
        queue, log, engine = make()
        reader = engine.reads.moments.reader("test", writer=True)
        queue.put(b"k", b"newer", True)
        late = put_request(b"k", b"late", reads=ReadSet(reader.seqno, [b"k"], ()))
        other = put_request(b"o", b"1")
        queue.submit([late, other] if first else [other, late])
        assert isinstance(late.error, ConflictError)
        assert late.error.seqno == 1
        assert (other.error, other.seqno) == (None, 2)
        assert log.content() == {b"k": b"newer", b"o": b"1"}
        at_rest(queue, log, engine)


def test_a_range_deleted_by_a_member_conflicts_with_what_a_later_member_read() -> None:
    queue, _, engine = make()
    reader = engine.reads.moments.reader("test", writer=True)
    deleting = WriteBatch()
    deleting.delete_range(b"b", b"d")
    reads = [put_request(b"x", b"1", reads=ReadSet(reader.seqno, [key], ())) for key in (b"a", b"c", b"d")]
    queue.submit([CommitRequest(EncodedBatch(deleting), sync=True), *reads])
    assert [request.error is None for request in reads] == [True, False, True]


@pytest.mark.parametrize(("size", "short"), [(0, True), (65_536, True), (65_537, False)])
def test_a_transaction_of_one_small_put_takes_the_short_way_of_a_put(
    size: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is validated like any other."""
    _, log, engine = make()
    puts: list[bytes] = []
    append_put = log.append_put

    def noted(key: bytes, value: bytes, table: int = 0, whole: bytes | None = None) -> Seqno:
        puts.append(key)
        return append_put(key, value, table, whole)

    monkeypatch.setattr(log, "append_put", noted)
    txn, late = (Transaction(engine, sync=True, read_only=False) for _ in range(2))
    for one in (txn, late):
        assert one.get(b"k") is None
        one[b"k"] = b"x" * size
    assert txn.commit() == 1
    with pytest.raises(ConflictError):
        late.commit()
    assert puts == [b"k"] * short
    assert log.content() == {b"k": b"x" * size}
    assert engine.state.cache.rows[b"k"] == b"x" * size


# -- what a commit says of itself --------------------------------------------------------------------


def test_an_extension_comes_into_the_record_of_its_commit_and_no_other(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db") as db:
        batch = WriteBatch()
        batch.put(b"k", b"v")
        said, counted = extension_of({"by": "teller"}), extension_of({"by": "counter"})
        requests = [
            CommitRequest(EncodedBatch(batch, said), sync=True),
            put(b"plain", b"1"),
            CommitRequest(sync=True, operation=Update(b"n", lambda old: b"1", counted)),
            CommitRequest(sync=True, operation=Update(b"n", lambda old: old, counted)),
            CommitRequest(EncodedBatch(WriteBatch(), said), sync=True),
        ]
        db.engine.queue.submit(requests)
        assert [request.seqno for request in requests] == [1, 2, 3, 0, 0]
        assert [record.extension() for record in db.history()] == [said, {}, counted]
        assert dict(db) == {b"k": b"v", b"n": b"1", b"plain": b"1"}


# -- operations -----------------------------------------------------------------------------------


def test_two_additions_in_one_group_add_up() -> None:
    queue, log, engine = make()
    one, two, other = add(b"n", 5), add(b"n", 7), add(b"m", 1)
    queue.submit([operation(one), operation(other), operation(two)])
    assert [decode_counter(update.new) for update in (one, two, other)] == [5, 12, 1]
    assert log.groups == [3]
    assert log.content() == {b"n": encode_counter(12), b"m": encode_counter(1)}
    at_rest(queue, log, engine)


def test_an_operation_sees_what_its_group_has_put_deleted_and_cleared_before_it() -> None:
    queue, log, engine = make()
    queue.put(b"n", encode_counter(100), True)
    clearing = WriteBatch()
    clearing.delete_range(b"a", b"z")
    updates = [add(b"n", 1) for _ in range(4)]
    queue.submit(
        [
            operation(updates[0]),
            put(b"n", encode_counter(50)),
            operation(updates[1]),
            delete_request(b"n"),
            operation(updates[2]),
            CommitRequest(EncodedBatch(clearing), sync=True),
            operation(updates[3]),
        ]
    )
    assert [decode_counter(update.old) for update in updates] == [100, 50, 0, 0]
    assert [decode_counter(update.new) for update in updates] == [101, 51, 1, 1]
    assert engine.reads.read(b"n") == log.content()[b"n"] == encode_counter(1)


def test_an_operation_that_changes_nothing_writes_nothing() -> None:
    queue, log, _ = make()
    queue.put(b"k", b"v", True)
    update = Update(b"k", lambda old: old)
    assert queue.commit(operation(update)) == 0
    assert (update.old, update.new) == (b"v", b"v")
    assert log.last_seqno == 1


def test_what_an_operation_raises_refuses_it_alone() -> None:
    queue, log, engine = make()
    queue.put(b"k", b"no counter", True)
    requests = [operation(add(b"k", 1)), operation(add(b"n", 1)), operation(add(b"n", (1 << 63) - 1)), put(b"p")]
    queue.submit(requests)
    assert [type(request.error) for request in requests] == [TypeError, type(None), OverflowError, type(None)]
    assert [request.seqno for request in requests] == [0, 2, 0, 3]
    assert log.content() == {b"k": b"no counter", b"n": encode_counter(1), b"p": b"v"}
    at_rest(queue, log, engine)


def test_a_transaction_that_read_what_an_operation_of_its_group_changed_conflicts() -> None:
    queue, _, engine = make()
    reader = engine.reads.moments.reader("test", writer=True)
    txn = put_request(b"x", b"1", reads=ReadSet(reader.seqno, [b"n"], ()))
    queue.submit([operation(add(b"n", 1)), txn])
    assert isinstance(txn.error, ConflictError)


@pytest.mark.parametrize("reverse", [False, True])
def test_each_that_pops_in_one_group_gets_another_pair(reverse: bool) -> None:
    queue, log, engine = make()
    for number in range(3):
        queue.put(b"%d" % number, b"v%d" % number, True)
    popping = [PopEdge(EVERYTHING, reverse=reverse) for _ in range(5)]
    requests = [operation(one) for one in popping]
    queue.submit(requests)
    pairs = sorted(((b"%d" % number, b"v%d" % number) for number in range(3)), reverse=reverse)
    assert [one.pair for one in popping] == [*pairs, None, None]
    assert [request.seqno for request in requests] == [4, 5, 6, 0, 0]
    assert log.content() == {}
    at_rest(queue, log, engine)


@pytest.mark.parametrize("reverse", [False, True])
def test_popping_sees_what_its_group_has_put_deleted_and_cleared_before_it(reverse: bool) -> None:
    queue, log, engine = make()
    for number in range(2, 8):
        queue.put(b"%d" % number, b"old", True)
    clearing = WriteBatch()
    clearing.delete_range(b"3", b"7")
    clearing.put(b"5", b"new")
    popping = [PopEdge(EVERYTHING, reverse=reverse) for _ in range(5)]
    queue.submit(
        [
            put(b"9" if reverse else b"1", b"new"),
            operation(popping[0]),
            put(b"7" if reverse else b"2", b"new"),
            operation(popping[1]),
            CommitRequest(EncodedBatch(clearing), sync=True),
            operation(popping[2]),
            operation(popping[3]),
            operation(popping[4]),
        ]
    )
    ends = [(b"9", b"new"), (b"7", b"new"), (b"5", b"new"), (b"2", b"old")]
    if not reverse:
        ends = [(b"1", b"new"), (b"2", b"new"), (b"5", b"new"), (b"7", b"old")]
    assert [one.pair for one in popping] == [*ends, None]
    assert log.content() == {}
    at_rest(queue, log, engine)


def test_popping_stays_within_its_range() -> None:
    queue, log, _ = make()
    for number in range(5):
        queue.put(b"%d" % number, b"", True)
    first, last, none = (PopEdge(KeyRange(b"1", b"4"), reverse=reverse) for reverse in (False, True, False))
    beside = PopEdge(KeyRange(b"2", b"3"), reverse=False)
    queue.submit([put(b"0", b"new"), put(b"4", b"new"), *map(operation, (first, last, beside, none))])
    assert [one.pair for one in (first, last, beside, none)] == [(b"1", b""), (b"3", b""), (b"2", b""), None]
    assert sorted(log.content()) == [b"0", b"4"]


# -- full disks -----------------------------------------------------------------------------------


def test_a_full_disk_lets_deletes_through_and_fails_the_rest() -> None:
    queue, log, engine = make()
    removal, new = delete_request(b"old"), put_request(b"new", b"v")
    log.fail_append = [DiskFullError("full")]
    queue.submit([new, removal])
    assert isinstance(new.error, DiskFullError)
    assert removal.error is None
    assert removal.seqno == 1
    assert engine.state.cache.rows == {b"old": None}
    assert queue._pressure.full == 1  # type: ignore[attr-defined]
    assert queue.put(b"later", b"v", True) == 2
    at_rest(queue, log, engine)


@pytest.mark.parametrize("way", ["put", "commit"])
def test_a_put_alone_on_a_full_disk_fails_and_is_told_to_the_pressure(way: str) -> None:
    queue, log, engine = make(reserve=True)
    log.fail_append = [DiskFullError("full")]
    with pytest.raises(DiskFullError):
        queue.put(b"k", b"v", True) if way == "put" else queue.commit(put_request(b"k", b"v"))
    pressure: Any = queue._pressure
    assert pressure.full >= 1
    assert pressure.reserve, "it is for deletes"
    at_rest(queue, log, engine)
    assert queue.put(b"k", b"v", True) == 1


@pytest.mark.parametrize("reserve", [False, True])
def test_a_delete_uses_the_reserve_where_not_even_a_small_record_fits(reserve: bool) -> None:
    queue, log, engine = make(reserve=reserve)
    one, two = delete_request(b"one"), delete_request(b"two")
    log.fail_append = [DiskFullError("full"), DiskFullError("full")]
    queue.submit([one, two])
    assert isinstance(one.error, type(None) if reserve else DiskFullError)
    assert (two.error, two.seqno) == (None, 1 + reserve)
    assert not queue._pressure.reserve  # type: ignore[attr-defined]
    at_rest(queue, log, engine)


def first_fits(log: FakeLog, failure: BaseException) -> None:
    """The disk is full for a group; of its members one by one, the first fits, and the second fails so."""
    log.fail_append = [DiskFullError("full")]

    def second_fails() -> None:
        log.fail_append = [failure]

    log.on_append = second_fails


@pytest.mark.parametrize("failure", [RefusedError(errno.EMFILE, "too many"), DiskFullError("full")])
def test_a_delete_that_is_refused_on_a_full_disk_takes_none_with_it_that_was_written(failure: Any) -> None:
    queue, log, engine = make()
    one, two = delete_request(b"one"), delete_request(b"two")
    first_fits(log, failure)
    queue.submit([one, two])
    assert (one.error, one.seqno) == (None, 1)
    assert (two.error, two.seqno) == (failure, 0)
    log.on_append = lambda: None
    at_rest(queue, log, engine)
    assert queue.put(b"k", b"v", True) == 2


@pytest.mark.parametrize("many", [False, True])
def test_a_group_of_which_a_part_is_written_and_the_rest_fails_poisons(many: bool) -> None:
    """Else the log would have a commit that memory has not: absent until the next open, then there."""
    queue, log, engine = make(reserve=True)
    one, two = delete_request(b"one"), delete_request(b"two")
    first_fits(log, DiskFullError("full"))

    def fails() -> bool:
        raise SystemCallError(errno.EIO, "the device failed", "/kv")

    queue._pressure.release_reserve = fails
    with pytest.raises(PoisonedError):
        queue.submit([one, two, *([put_request(b"k", b"v")] if many else [])])
    assert isinstance(one.error, PoisonedError)
    assert isinstance(two.error, PoisonedError)
    assert log.last_seqno == 1
    assert engine.state.seqno == 0
    with pytest.raises(PoisonedError):
        queue.put(b"k", b"v", True)


# -- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["put", "commit"])
@pytest.mark.parametrize("what", ["append", "sync"])
def test_a_failed_append_or_flush_publishes_nothing_and_poisons(what: str, way: str) -> None:
    queue, log, engine = make()
    cause = OSError(errno.EIO, "no")
    (log.fail_sync if what == "sync" else log.fail_append).append(cause)
    with pytest.raises(PoisonedError) as caught:
        queue.put(b"k", b"v", True) if way == "put" else queue.commit(put_request(b"k", b"v"))
    assert caught.value.__cause__ is cause
    assert b"k" not in engine.state.cache.rows
    assert engine.reads.read(b"k") is None
    assert engine.state.seqno == 0
    before = len(log.bodies)
    for call in (
        lambda: queue.put(b"l", b"v", True),
        lambda: queue.commit(put_request(b"l", b"v")),
        queue.sync,
    ):
        with pytest.raises(PoisonedError):
            call()
    assert len(log.bodies) == before, "what is on disk is unknown: nothing may be written any more"
    assert b"l" not in engine.state.cache.rows
    assert not queue._queue
    assert not queue.lock._is_owned()


def test_a_failed_flush_fails_every_member_of_its_group() -> None:
    queue, log, engine = make()
    log.fail_sync = [OSError(errno.EIO, "no")]
    requests = [put_request(b"a", b"1"), put_request(b"b", b"1", sync=False), put(b"c")]
    with pytest.raises(PoisonedError):
        queue.submit(requests)
    assert all(request.done and isinstance(request.error, PoisonedError) for request in requests)
    assert engine.state.cache.rows == {}


def test_a_log_that_refuses_answers_every_commit_with_its_reason() -> None:
    queue, _, engine = make()
    queue.put(b"k", b"v", True)
    queue.refuse(RefusingLog(closed, engine.state.seqno))
    for call in (lambda: queue.put(b"k", b"2", False), lambda: queue.commit(put_request(b"k", b"2")), queue.sync):
        with pytest.raises(ClosedError):
            call()
    assert engine.reads.read(b"k") == b"v"
    assert not queue._queue
    assert not queue.lock._is_owned()


def test_an_action_runs_while_no_commit_is_under_way() -> None:
    queue, log, engine = make()
    seen: list[bool] = []
    queue.run(lambda: seen.append(queue.lock._is_owned()))
    assert seen == [True]
    at_rest(queue, log, engine)


def test_an_action_runs_after_the_members_of_its_group_are_published() -> None:
    queue, _, engine = make()
    seen: list[Any] = []
    action = CommitRequest(sync=False, action=lambda: seen.append(engine.state.seqno))
    queue.submit([action, put(b"k")])
    assert seen == [1]


def test_an_action_that_fails_fails_alone() -> None:
    """The commits that share its group were written: no error of its own may say that they were not."""

    def fail() -> None:
        raise DiskFullError("no room for a mark")

    for first in ("put", "action"):
        queue, log, engine = make()
        one = put_request(b"k", b"v")
        two = CommitRequest(sync=False, action=fail)
        queue.submit([one, two] if first == "put" else [two, one])
        assert one.done
        assert (one.error, one.seqno) == (None, 1)
        assert isinstance(two.error, DiskFullError)
        assert len(log.bodies) == engine.state.seqno == 1
        assert queue.put(b"after", b"v", True) == 2
        at_rest(queue, log, engine)


def test_an_action_that_the_disk_fails_poisons() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "no")

    queue, _, _ = make()
    one, two = put_request(b"k", b"v"), CommitRequest(sync=False, action=fail)
    queue.submit([one, two])
    assert (one.error, one.seqno) == (None, 1)
    assert isinstance(two.error, PoisonedError)
    with pytest.raises(PoisonedError):
        queue.put(b"after", b"v", True)


@pytest.mark.parametrize("where", ["append", "publish"])
@pytest.mark.parametrize("way", ["put", "commit", "group"])
def test_a_bug_of_our_own_ends_in_an_error_and_not_in_a_store_that_hangs(
    way: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left the leadership with a thread that was gone, and the next commit waited for ever."""
    queue, log, engine = make()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("our own")

    if where == "append":
        monkeypatch.setattr(log, "append", fail)
    else:
        for publishing in ("publish", "publish_put", "publish_puts"):
            monkeypatch.setattr(engine.publisher, publishing, fail)
    others = Others(queue, [put_request(b"with", b"it")])
    if way == "group":
        _arrive_with_the_next(queue, others.arrive)
    with pytest.raises((RuntimeError, PoisonedError)):
        if way == "put":
            queue.put(b"k", b"v", True)
        else:
            queue.commit(put_request(b"k", b"v"))
    if way == "group":
        others.run()
        assert isinstance(others.requests[0].error, PoisonedError)
    assert not queue._queue
    assert not queue.lock._is_owned()
    with pytest.raises(PoisonedError):
        queue.put(b"after", b"v", True)
    with pytest.raises(PoisonedError):
        queue.commit(put_request(b"after", b"v"))
    assert engine.state.cache.rows == {}


def test_a_bug_in_publishing_is_no_success_of_the_member_that_it_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread would go on as if it could read what it wrote."""
    queue, _, engine = make()
    publish = engine.publisher.publish

    def fail_second(seqno: Seqno, *arguments: Any, **named: Any) -> None:
        if seqno == 2:
            raise RuntimeError("our own")
        publish(seqno, *arguments, **named)

    monkeypatch.setattr(engine.publisher, "publish", fail_second)
    others = Others(queue, [put_request(b"with", b"it")])
    _arrive_with_the_next(queue, others.arrive)
    with pytest.raises((RuntimeError, PoisonedError)):
        queue.commit(put_request(b"k", b"v"))
    others.run()
    assert engine.reads.read(b"with") is None
    assert isinstance(others.requests[0].error, PoisonedError)


def _arrive_with_the_next(queue: CommitQueue, arrive: Callable[[], None]) -> None:
    """Let others enter the queue as the next group is taken, so that they belong to it."""
    next_group = queue._next_group

    def with_others() -> Any:
        arrive()
        return next_group()

    queue._next_group = with_others  # type: ignore[method-assign]


def test_is_busy_says_whether_a_commit_is_under_way() -> None:
    queue, log, engine = make()
    busy: list[bool] = []

    def ask() -> None:
        thread = threading.Thread(target=lambda: busy.append(queue.is_busy()))
        thread.start()
        thread.join()

    ask()
    log.on_append = ask
    queue.put(b"k", b"v", True)
    queue.commit(put_request(b"k", b"v"))
    log.on_append = lambda: None
    ask()
    assert busy == [False, True, True, False]
    at_rest(queue, log, engine)


def test_in_the_child_of_a_fork_every_commit_is_refused_whatever_was_under_way() -> None:
    queue, log, engine = make()
    Others(queue, [put_request(b"o", b"1")]).arrive()
    leader = threading.Thread(target=queue.lock.acquire)
    leader.start()
    leader.join()
    queue.abandon_in_child(RefusingLog(forked, engine.state.seqno))
    for call in (lambda: queue.put(b"k", b"2", True), lambda: queue.commit(put_request(b"k", b"2")), queue.sync):
        with pytest.raises(ForkedError):
            call()
    assert log.bodies == []
    assert not queue._queue
