"""The commit pipeline: grouping, conflicts within a group, full disks, failures, interruptions anywhere."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest
from engine_fakes import FakeLog, FakePages
from store_fixtures import Interruption, interrupted_at

from kvwal.batch import WriteBatch
from kvwal.db.transaction import Transaction
from kvwal.engine.commit import CommitPipeline
from kvwal.engine.present import Present
from kvwal.engine.request import CommitRequest
from kvwal.errors import ConflictError, DiskFullError, PoisonedError
from kvwal.keys import KeyRange, Seqno
from kvwal.log import decode_intents


def make() -> tuple[CommitPipeline, FakeLog, Present]:
    present = Present(FakePages(), cache_bytes=1 << 20, memtable_bytes=1 << 20)  # type: ignore[arg-type]
    log = FakeLog()
    return CommitPipeline(log, present, release_reserve=lambda: False), log, present


def put_request(key: bytes, value: bytes, **options: Any) -> CommitRequest:
    batch = WriteBatch()
    batch.put(key, value)
    return CommitRequest(batch, **({"sync": True} | options))


def put(pipeline: CommitPipeline, key: bytes, value: bytes, *, sync: bool = True) -> Seqno:
    return pipeline.put(key, value, sync)


def test_a_lone_put_is_flushed_before_it_is_visible() -> None:
    pipeline, log, present = make()
    log.on_sync = lambda: visible.append(present.rows.get(b"k"))
    visible: list[bytes | None] = []
    assert put(pipeline, b"k", b"v") == 1
    assert visible == [None]
    assert present.rows[b"k"] == b"v"


def test_a_put_without_sync_is_not_flushed() -> None:
    pipeline, log, present = make()
    put(pipeline, b"k", b"v", sync=False)
    assert (log.syncs, log.last_seqno, present.seqno) == (0, 1, 1)


def test_those_who_arrive_during_a_flush_share_the_next_one() -> None:
    pipeline, log, _ = make()
    arrived = threading.Semaphore(0)
    threads = [threading.Thread(target=put, args=(pipeline, b"%d" % n, b"v")) for n in range(8)]

    def during_first_flush() -> None:
        log.on_sync = lambda: None
        for thread in threads:
            thread.start()
        while len(pipeline._queue) < len(threads):
            arrived.acquire(timeout=0.001)

    log.on_sync = during_first_flush
    put(pipeline, b"first", b"v")
    for thread in threads:
        thread.join()
    assert log.syncs == 2
    assert log.groups == [1, 8]
    assert len(log.content()) == 9


def test_of_two_conflicting_members_of_a_group_the_second_fails() -> None:
    pipeline, log, present = make()
    view = present.view("test", 0, writer=True)
    one = put_request(b"a", b"1", since=view.seqno, reads=[b"a"])
    two = put_request(b"a", b"2", since=view.seqno, reads=[b"a"])
    three = put_request(b"c", b"3", since=view.seqno, ranges=[KeyRange(b"b", b"d")])
    four = put_request(b"z", b"4", since=view.seqno, ranges=[KeyRange(b"b", b"d")])
    pipeline.commit(put_request(b"x", b"0"), company=[one, two, three, four])
    assert [r.error is None for r in (one, two, three, four)] == [True, False, True, False]
    assert isinstance(two.error, ConflictError)
    assert two.error.seqno == one.seqno
    assert log.content() == {b"x": b"0", b"a": b"1", b"c": b"3"}
    assert present.rows[b"a"] == b"1"


def test_a_full_disk_lets_deletes_through_and_fails_the_rest() -> None:
    pipeline, log, present = make()
    delete = WriteBatch()
    delete.delete(b"old")
    removal = CommitRequest(delete, sync=True)
    log.fail_append = [DiskFullError("full")]
    with pytest.raises(DiskFullError):
        pipeline.commit(put_request(b"new", b"v"), company=[removal])
    assert removal.error is None
    assert removal.seqno == 1
    assert present.rows == {b"old": None}
    assert put(pipeline, b"later", b"v") == 2


def test_a_failed_flush_publishes_nothing_and_poisons() -> None:
    pipeline, log, present = make()
    log.fail_sync = [OSError(errno.EIO, "no")]
    with pytest.raises(PoisonedError):
        put(pipeline, b"k", b"v")
    assert b"k" not in present.rows
    log.fail_sync = [OSError(errno.EIO, "no")]
    with pytest.raises(PoisonedError):
        pipeline.commit(put_request(b"l", b"v"))
    assert b"l" not in present.rows
    assert not pipeline._baton


def test_an_action_runs_while_no_commit_is_under_way() -> None:
    pipeline, _, _ = make()
    seen: list[bool] = []
    pipeline.run(lambda: seen.append(bool(pipeline._baton)))
    assert seen == [True]
    assert not pipeline._baton


def _says_written(interruption: Interruption) -> bool:
    return any("was written" in note for note in getattr(interruption, "__notes__", ()))


@pytest.mark.interruptions
@pytest.mark.parametrize("sync", [False, True])
def test_an_interruption_anywhere_on_a_full_disk_leaves_each_delete_written_or_not(sync: bool) -> None:
    for step in range(1, 600):
        pipeline, log, present = make()
        put(pipeline, b"a", b"1", sync=sync)
        put(pipeline, b"b", b"1", sync=sync)
        requests = []
        for key in (b"a", b"b"):
            batch = WriteBatch()
            batch.delete(key)
            requests.append(CommitRequest(batch, sync=sync))
        company = [requests[1], put_request(b"c", b"1", sync=sync)]
        log.fail_append = [DiskFullError("full")]
        interrupted = interrupted_at(step, lambda r=requests[0], c=company: pipeline.commit(r, company=c))
        log.fail_append = []
        content = log.content()
        assert len(log.bodies) == log.last_seqno == present.seqno, step
        for key, request in zip((b"a", b"b"), requests, strict=True):
            assert (present.rows.get(key) is None) == (key not in content), step
            if request.done and request.error is None and request.seqno:
                assert key not in content, f"acknowledged and not written, at step {step}"
        # An interrupted append of the whole group is tried again, and may then find room.
        assert (b"c" in content) == (present.rows.get(b"c") is not None), step
        put(pipeline, b"after", b"1", sync=sync)
        assert not pipeline._baton, step
        if interrupted is None:
            assert content == {}
            return
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.interruptions
@pytest.mark.parametrize("way", ["put", "commit", "company"])
@pytest.mark.parametrize("sync", [False, True])
def test_an_interruption_while_the_caller_handles_a_failure_of_its_own_is_no_failure_of_the_disk(
    way: str, sync: bool
) -> None:
    try:
        raise OSError(errno.EIO, "the caller's own file")
    except OSError:
        test_an_interruption_anywhere_leaves_a_commit_written_or_not(way, sync)


@pytest.mark.interruptions
@pytest.mark.parametrize("way", ["put", "commit", "company"])
@pytest.mark.parametrize("sync", [False, True])
def test_an_interruption_anywhere_leaves_a_commit_written_or_not(way: str, sync: bool) -> None:
    for step in range(1, 400):
        pipeline, log, present = make()
        put(pipeline, b"before", b"1", sync=sync)
        company = put_request(b"with", b"it", sync=sync)

        def commit() -> None:
            if way == "put":
                put(pipeline, b"k", b"v", sync=sync)
            else:
                request = put_request(b"k", b"v", sync=sync)
                pipeline.commit(request, company=[company] if way == "company" else [])

        interrupted = interrupted_at(step, commit)
        # Written or not written, log and memory agree about it, and the pipeline goes on.
        written = b"k" in log.content()
        assert present.rows.get(b"k") == (b"v" if written else None), step
        assert present.seqno == log.last_seqno, step
        present.levels.memtable._check()
        if sync:
            assert log.durable_seqno == log.last_seqno, step
        assert put(pipeline, b"after", b"1", sync=sync) == log.last_seqno
        assert not pipeline._baton, step
        assert not pipeline._queue, step
        if way == "company":
            assert (b"with" in log.content()) == bool(company.done and company.error is None), step
        if interrupted is None:
            assert written
            return
        assert _says_written(interrupted) == written, step
    raise AssertionError("the commit has more places than were tried")


class TakenOnce(dict[int, object]):
    """A baton that is taken when it is first looked at, and free then."""

    over = False

    def setdefault(self, key: int, default: object = None) -> object:
        over, TakenOnce.over = TakenOnce.over, True
        return super().setdefault(key, default) if over else self


def _waiting(key: bytes, **options: Any) -> CommitRequest:
    """As of a thread that has queued up and sleeps."""
    request = put_request(key, b"v", **options)
    request.gate = threading.Lock()
    request.gate.acquire()
    return request


@pytest.mark.interruptions
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("way", ["put", "commit", "queued", "action"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_an_interruption_anywhere_leaves_nobody_asleep(when: str, way: str, sync: bool) -> None:
    """Whoever leads may be all that the others wait for: in the midst of waking them, or of passing the baton on."""
    for step in range(1, 600):
        pipeline, log, present = make()
        put(pipeline, b"before", b"1", sync=sync)
        waiters = [_waiting(b"one", sync=sync), _waiting(b"two", sync=sync)]

        def arrive() -> None:
            pipeline._queue.extend(waiters)
            log.on_append = lambda: None

        if when == "before":
            # In the moment between a leader that puts the baton down, and looks whether somebody has come.
            arrive()
        else:
            log.on_append = arrive

        def commit() -> None:
            if way == "put":
                put(pipeline, b"k", b"v", sync=sync)
            elif way == "commit":
                pipeline.commit(put_request(b"k", b"v", sync=sync))
            elif way == "queued":
                pipeline._baton = TakenOnce()
                TakenOnce.over = False
                pipeline.commit(put_request(b"k", b"v", sync=sync))
            else:
                pipeline.commit(CommitRequest(WriteBatch(), sync=sync, action=lambda: log.on_append()))

        interrupted = interrupted_at(step, commit)
        TakenOnce.over = True
        if when == "before":
            pipeline._promote()
        if log.on_append is not arrive:
            for waiter in waiters:
                assert waiter.gate is not None
                assert not waiter.gate.locked() or waiter in pipeline._queue, step
            while pipeline._baton:
                # What the thread of the first does: it leads the others.
                leader: Any = pipeline._baton[0]
                assert leader in waiters, step
                assert not leader.gate.locked(), step
                assert not leader.done, step
                pipeline._lead(leader)
            for waiter in waiters:
                assert waiter.done, step
                assert waiter.error is None, step
                assert waiter.gate is not None
                assert not waiter.gate.locked(), step
            content = [decode_intents(body).writes for body in log.bodies]
            assert content.count({b"one": b"v"}) == content.count({b"two": b"v"}) == 1, step
            if interrupted is not None:
                assert content.count({b"k": b"v"}) == _says_written(interrupted), step
        assert len(log.bodies) == present.seqno == log.last_seqno, step
        assert not pipeline._baton, step
        assert not pipeline._queue, step
        if interrupted is None:
            return
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.interruptions
@pytest.mark.parametrize("sync", [False, True])
def test_an_interrupted_transaction_says_whether_it_was_written(sync: bool) -> None:
    """Also when the commit is over, and only the snapshot is still to be given back."""
    for step in range(1, 600):
        pipeline, log, present = make()
        put(pipeline, b"k", b"old", sync=sync)
        txn = Transaction(present, pipeline, 0, sync=sync, read_only=False)
        txn[b"k"] = b"new"
        interrupted = interrupted_at(step, txn.commit)
        written = log.content()[b"k"] == b"new"
        assert txn.commit_seqno == (2 if written else None), step
        assert not (written and txn.is_open), step
        if interrupted is None:
            assert written
            return
        assert getattr(interrupted, "__notes__", []) == ["kvwal: commit 2 was written"] * written, step
    raise AssertionError("the commit has more places than were tried")


@pytest.mark.parametrize(("size", "short"), [(0, True), (65_536, True), (65_537, False)])
def test_a_transaction_of_one_small_put_takes_the_short_way_of_a_put(
    size: int, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is validated like any other."""
    pipeline, log, present = make()
    puts: list[bytes] = []
    append_put = log.append_put

    def noted(key: bytes, value: bytes) -> Seqno:
        puts.append(key)
        return append_put(key, value)

    monkeypatch.setattr(log, "append_put", noted)
    txn, late = (Transaction(present, pipeline, 0, sync=True, read_only=False) for _ in range(2))
    for one in (txn, late):
        assert one.get(b"k") is None
        one[b"k"] = b"x" * size
    assert txn.commit() == 1
    with pytest.raises(ConflictError):
        late.commit()
    assert puts == [b"k"] * short
    assert log.content() == {b"k": b"x" * size}
    assert present.rows[b"k"] == b"x" * size


def test_an_action_that_fails_fails_alone() -> None:
    """The commits that share its group were written: no error of its own may say that they were not."""

    def fail() -> None:
        raise DiskFullError("no room for a mark")

    for first in ("put", "action"):
        pipeline, log, present = make()
        one = put_request(b"k", b"v")
        two = CommitRequest(WriteBatch(), sync=False, action=fail)
        if first == "put":
            assert pipeline.commit(one, company=[two]) == 1
        else:
            with pytest.raises(DiskFullError):
                pipeline.commit(two, company=[one])
        assert one.done
        assert one.error is None
        assert isinstance(two.error, DiskFullError)
        assert len(log.bodies) == present.seqno == 1
        assert put(pipeline, b"after", b"v") == 2


@pytest.mark.parametrize("where", ["append", "publish"])
@pytest.mark.parametrize("way", ["put", "commit", "company"])
def test_a_bug_of_our_own_ends_in_an_error_and_not_in_a_store_that_hangs(
    way: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It left the baton with somebody who was gone, and the next commit waited for ever."""
    pipeline, log, present = make()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("our own")

    if where == "append":
        monkeypatch.setattr(log, "append", fail)
    else:
        monkeypatch.setattr(present, "publish", fail)
        monkeypatch.setattr(pipeline, "_publish_put", fail)
    company = _waiting(b"with")
    with pytest.raises((RuntimeError, PoisonedError)):
        if way == "put":
            put(pipeline, b"k", b"v")
        else:
            pipeline.commit(put_request(b"k", b"v"), company=[company] if way == "company" else [])
    if way == "company":
        assert not company.gate.locked()
        assert isinstance(company.error, PoisonedError)
    assert not pipeline._baton
    with pytest.raises(PoisonedError):
        put(pipeline, b"after", b"v")
    with pytest.raises(PoisonedError):
        pipeline.commit(put_request(b"after", b"v"))
    assert present.rows == {}
