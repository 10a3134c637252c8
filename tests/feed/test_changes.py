"""The feed of a store: against a model, while threads write, where it begins and how it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import TINY, commit_rows, interrupted_at, readers_in, run_threads, wait_until

import kvwal
from kvwal import ClosedError, FeedGap, ForkedError, PoisonedError, ReadOnlyError
from kvwal.batch import WriteBatch
from kvwal.engine.publish import Publisher
from kvwal.feed.change import Change
from kvwal.testing import SimulatedDisk, crash_every

KEYS = [b"", b"a", b"a1", b"a2", b"b", b"b1", b"c"]
Plain = tuple[Any, ...]


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, "keep_history_bytes": 0, **options})


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with opened(SimulatedDisk()) as store:
        yield store


def plain(change: Change) -> Plain:
    return change.table, change.kind, change.key, change.stop, change.value


def seqnos(changes: Any) -> list[int]:
    return [change.seqno for change in changes]


# -- against a model ---------------------------------------------------------------------------

writes = st.tuples(st.sampled_from([0, 16]), st.sampled_from("pppdr"), st.sampled_from(KEYS), st.sampled_from(KEYS))
steps = st.one_of(
    st.tuples(st.just("commit"), st.lists(writes, min_size=1, max_size=4)),
    st.tuples(st.just("commit"), st.lists(writes, min_size=1, max_size=4)),
    st.tuples(st.just("read"), st.integers(1, 9)),
    st.sampled_from([("sync",), ("checkpoint",), ("reopen",), ("crash",), ("system",)]),
)


def batch_of(intents: list[tuple[int, str, bytes, bytes]], number: int) -> tuple[WriteBatch, list[Plain]]:
    """A batch, and what the feed is to tell of it: ranges first, then the others, table by table."""
    batch = WriteBatch()
    for table, kind, key, other in intents:
        part = batch.table(table) if table else batch
        if kind == "p":
            part.put(key, b"%d:" % number + other * 300)
        elif kind == "d":
            part.delete(key)
        else:
            part.delete_range(key, other or None)
    parts = [(0, batch), *batch.parts()]
    told: list[Plain] = [
        (table, "delete_range", start, stop, None) for table, part in parts for start, stop in part.ranges
    ]
    for table, part in parts:
        for key, value in part.writes.items():
            told.append((table, "delete" if value is None else "put", key, None, value))
    return batch, told


@settings(max_examples=150)
@given(
    st.lists(steps, max_size=40),
    st.sampled_from(["commit", "os"]),
    st.sampled_from([(b"", None), (b"a", None), ([b"a1", b"b"], None), (b"", [16]), (b"c", [0])]),
    st.integers(0, 1 << 32),
)
def test_the_feed_is_the_commits_that_survive(program: list[Any], durability: Any, wanted: Any, seed: int) -> None:
    prefix, tables = wanted
    disk = SimulatedDisk(seed=seed)
    db = opened(disk, durability=durability, keep_history_bytes=1 << 30)
    # What each commit is to tell, and what was told so far of the commits up to the position.
    model: list[list[Plain]] = []
    feed = db.changes(0, prefix=prefix, tables=tables, follow=True, timeout_s=0)
    told: list[tuple[int, Plain]] = []

    def look(changes: kvwal.Changes, most: int) -> None:
        """Read on."""
        while most and (change := next(changes, None)) is not None:
            told.append((change.seqno, plain(change)))
            most -= 1
            assert changes.position == change.seqno if change.last else changes.position < change.seqno
            assert change.seqno <= db.durable_seqno
            assert changes.position <= db.durable_seqno
        if most:
            assert changes.position == db.durable_seqno

    for step in program:
        if step[0] == "commit":
            batch, changed = batch_of(step[1], len(model))
            if len(batch):
                db.commit(batch)
                model.append(changed)
        elif step[0] == "system":
            batch = WriteBatch()
            batch.table(1).put(b"a", b"the store's own")
            commit_rows(db, batch)
            model.append([])
        elif step[0] == "read":
            look(feed, step[1])
        elif step[0] in ("reopen", "crash"):
            durable, position = db.durable_seqno, feed.position
            if step[0] == "crash":
                crashed = disk.crash(Random(seed))
                db.close()
                disk = crashed
            else:
                db.close()
            db = opened(disk, durability=durability, keep_history_bytes=1 << 30)
            assert durable <= db.last_seqno <= len(model)
            del model[db.last_seqno :]
            # Of a commit that was begun, all is told again.
            told = [(seqno, change) for seqno, change in told if seqno <= position]
            feed = db.changes(position, prefix=prefix, tables=tables, follow=True, timeout_s=0)
        else:
            getattr(db, step[0])()
    db.sync()
    look(feed, -1)
    expected = [(i + 1, change) for i, changes in enumerate(model) for change in _kept(changes, prefix, tables)]
    assert told == expected
    with db.changes(0, prefix=prefix, tables=tables) as again:
        assert [(change.seqno, plain(change)) for change in again] == expected
        assert again.position == len(model)
    db.close()


def _kept(changes: list[Plain], prefix: Any, tables: Any) -> list[Plain]:
    prefixes = sorted(prefix) if isinstance(prefix, list) else [prefix]
    kept: list[Plain] = []
    for table, kind, key, stop, value in changes:
        if tables is not None and table not in tables:
            continue
        if kind != "delete_range":
            kept += [(table, kind, key, stop, value)] * any(map(key.startswith, prefixes))
            continue
        for one in prefixes:
            end = one[:-1] + bytes([one[-1] + 1]) if one else None
            low, high = max(key, one), min(filter(None, (stop, end)), default=None)
            if high is None or low < high:
                kept.append((table, kind, low, high, None))
    return kept


def test_what_was_told_is_there_after_a_power_cut_at_any_moment() -> None:
    def write(disk: SimulatedDisk, told: list[Any]) -> None:
        with opened(disk, durability="os", keep_history_bytes=1 << 30) as db:
            feed = db.changes(0, follow=True, timeout_s=0)
            for number in range(12):
                db.update({b"%d" % number: bytes(2000), b"second": b"%d" % number})
                if number % 4 == 1:
                    db.sync()
                if number == 7:
                    db.checkpoint()
                told += [(change.seqno, change.key) for change in feed]

    def check(disk: SimulatedDisk, told: list[Any]) -> None:
        with opened(disk) as db, db.changes(0) as feed:
            assert [(change.seqno, change.key) for change in feed][: len(told)] == told

    assert crash_every(write, check, states_per_point=6).points > 20


# -- while threads write -----------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["commit", "interval", "os"])
def test_f1_of_eight_writers_each_commit_is_told_once_and_in_order(tmp_path: Path, durability: Any) -> None:
    with kvwal.open(tmp_path / "s", durability=durability, sync_delay_s=0.005, segment_bytes=1 << 16) as db:
        db[b"before"] = b""
        start = db.last_seqno
        total = 8 * 60
        found: list[list[int]] = [[], [], []]

        def write(thread: int) -> None:
            for number in range(60):
                if number % 7 == 0:
                    with db.batch() as batch:
                        batch.put(b"%d:%d" % (thread, number), bytes(200))
                        batch.delete(b"none")
                else:
                    db.put(b"%d:%d" % (thread, number), bytes(200))
                if durability == "os" and number % 20 == 19:
                    db.sync()

        def follow(seen: list[int]) -> None:
            for change in db.changes(start, follow=True):
                assert change.seqno <= db.durable_seqno
                # A read sees what was told.
                assert change.seqno <= db.last_seqno
                if change.last:
                    seen.append(change.seqno)
                    if change.seqno == start + total:
                        break

        run_threads(
            *(lambda thread=thread: write(thread) for thread in range(8)),
            *(lambda seen=seen: follow(seen) for seen in found),
            lambda: _keep_syncing(db, start + total),
        )
        assert found == [list(range(start + 1, start + total + 1))] * 3


def _keep_syncing(db: kvwal.Store, last: int) -> None:
    """At "os" nothing else makes the last commits durable."""

    def synced() -> bool:
        db.sync()
        return db.durable_seqno >= last

    wait_until(synced, "the last commit")


@pytest.mark.parametrize("durability", ["commit", "os"])
def test_f3_a_snapshot_and_what_came_after_it_are_the_store_as_it_is(tmp_path: Path, durability: Any) -> None:
    """Counters that are added to: a change that is missed or applied twice would be seen."""
    with kvwal.open(tmp_path / "s", durability=durability, segment_bytes=1 << 16, memtable_bytes=1 << 16) as db:
        over = threading.Event()

        def write(thread: int) -> None:
            random = Random(thread)
            while not over.is_set():
                match random.randrange(10):
                    case 0:
                        db.delete_range(b"%d" % random.randrange(5), b"%d" % random.randrange(5, 10))
                    case 1:
                        db.delete(b"%d" % random.randrange(10))
                    case _:
                        db.add(b"%d" % random.randrange(10), 1)

        def checkpoint() -> None:
            while not over.wait(0.01):
                db.checkpoint()

        def bootstrap() -> None:
            try:
                for _ in range(60):
                    with db.bootstrap() as base:
                        # Before anything else came, it is on disk.
                        assert base.position <= db.durable_seqno
                        state = dict(base.snapshot)
                        db.sync()
                        changes = list(base.changes())
                        assert not changes or changes[0].seqno > base.position
                        with db.snapshot() as now:
                            db.sync()
                            changes += db.changes(changes[-1].seqno if changes else base.position)
                            for change in changes:
                                if change.seqno <= now.seqno:
                                    apply(state, change)
                            assert state == dict(now)
            finally:
                over.set()

        run_threads(*(lambda thread=thread: write(thread) for thread in range(3)), checkpoint, bootstrap)


def apply(state: dict[bytes, bytes], change: Change) -> None:
    if change.kind == "delete_range":
        for key in [key for key in state if change.key <= key and (change.stop is None or key < change.stop)]:
            del state[key]
    elif change.value is None:
        state.pop(change.key, None)
    else:
        state[change.key] = change.value


def test_what_is_flushed_and_not_visible_yet_is_waited_for(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # A listener of nothing: the commit goes through `publish_put`, which is held up until the feed waits for it.
    flushed, waited = threading.Event(), threading.Event()
    publish, run = Publisher.publish_put, db.engine.queue.run

    def slowly(publisher: Publisher, *commit: Any) -> None:
        flushed.set()
        waited.wait(20)
        publish(publisher, *commit)

    def noted(action: Any) -> None:
        waited.set()
        run(action)

    monkeypatch.setattr(Publisher, "publish_put", slowly)
    monkeypatch.setattr(db.engine.queue, "run", noted)
    feed = db.changes(0, follow=True)

    def look() -> tuple[int, bytes | None]:
        flushed.wait(20)
        change = next(feed)
        return change.seqno, db.get(b"k")

    assert run_threads(lambda: db.put(b"k", b"v"), look) == [1, (1, b"v")]
    assert waited.is_set()


# -- where it begins ---------------------------------------------------------------------------


def test_nothing_that_a_power_cut_could_take_back_is_told(db: kvwal.Store) -> None:
    db[b"a"] = b"1"
    db.put(b"b", b"2", durability="os")
    with db.changes(0, follow=True, timeout_s=0) as feed:
        assert seqnos(feed) == [1]
        assert seqnos(db.changes()) == [1]
        # A position that is not durable yet can be gone on from, as long as it is there.
        assert seqnos(db.changes(2)) == []
        later = db.changes(2, follow=True, timeout_s=0)
        db.sync()
        assert seqnos(feed) == [2]
        db.put(b"c", b"3")
        assert seqnos(later) == [3]
        later.close()


def test_without_follow_it_ends_with_what_is_durable_at_the_call(db: kvwal.Store) -> None:
    db[b"a"] = b"1"
    feed = db.changes()
    db[b"b"] = b"2"
    assert seqnos(feed) == [1]
    assert seqnos(feed) == []
    assert feed.position == 1
    assert db.engine._log.holds() == []  # type: ignore[union-attr]


def test_f2_what_is_gone_is_a_gap_at_the_call(db: kvwal.Store) -> None:
    for number in range(60):
        db[b"%d" % number] = bytes(2000)
        if number % 10 == 0:
            db.checkpoint()
    oldest = db.engine._log.stats().oldest_seqno  # type: ignore[union-attr]
    assert oldest > 1
    for after in (0, 1, oldest - 2):
        with pytest.raises(FeedGap) as caught:
            db.changes(after)
        gap = caught.value
        assert (gap.asked, gap.oldest, gap.newest, gap.lost_commits) == (after, oldest, 60, oldest - 1 - after)
        assert gap.oldest_time is not None
    assert seqnos(db.changes(oldest - 1)) == seqnos(db.changes()) == list(range(oldest, 61))


def test_f2_a_position_that_no_commit_has_is_a_gap_at_the_call(db: kvwal.Store) -> None:
    db[b"a"] = b"1"
    for follow in (False, True):
        with pytest.raises(FeedGap, match="there is no commit 2") as caught:
            db.changes(2, follow=follow)
        assert (caught.value.asked, caught.value.oldest, caught.value.newest) == (2, 1, 1)
    with db.changes(1, follow=True, timeout_s=0) as feed:
        assert next(feed, None) is None


def test_a_feed_holds_what_it_has_not_read_and_nothing_else(db: kvwal.Store) -> None:
    log = db.engine._log
    assert log is not None
    feed = db.changes(0, follow=True, timeout_s=0)
    for number in range(60):
        db[b"%d" % number] = bytes(2000)
        db.checkpoint()
    assert log.stats().oldest_seqno == 1
    assert [hold.name for hold in log.holds()] == ["changes"]
    assert seqnos(feed) == list(range(1, 61))
    db[b"more"] = b""
    db.checkpoint()
    assert log.stats().oldest_seqno > 30
    feed.close()
    assert log.holds() == []


@pytest.mark.parametrize("way", ["close", "with", "forget", "exhaust", "error"])
def test_a_feed_that_is_over_holds_nothing(db: kvwal.Store, way: str) -> None:
    log = db.engine._log
    assert log is not None
    db.update({b"a": b"1"})
    db.update({b"b": b"1"})
    feed = db.changes(0, follow=way != "exhaust")
    assert len(log.holds()) == 1
    next(feed)
    if way == "close":
        feed.close()
        feed.close()
    elif way == "with":
        with feed:
            pass
    elif way == "exhaust":
        list(feed)
    elif way == "error":
        feed._pending = _broken()
        with pytest.raises(OSError, match="broken"):
            next(feed)
    else:
        del feed
    assert log.holds() == []


def _broken() -> Iterator[Change]:
    raise OSError("broken")
    yield


def test_f4_the_position_moves_over_commits_that_match_nothing(db: kvwal.Store) -> None:
    log = db.engine._log
    assert log is not None
    feed = db.changes(0, prefix=b"user:", follow=True, timeout_s=0)
    for number in range(200):
        db[b"other:%d" % number] = bytes(1000)
    assert next(feed, None) is None
    assert feed.position == 200
    [hold] = log.holds()
    assert hold.after == 200
    for _ in range(2):
        db.checkpoint()
        db[b"other"] = b""
    # It holds nothing that recovery does not need.
    assert log.stats().oldest_seqno > 150
    feed.close()


def test_the_position_moves_when_the_last_change_of_a_commit_is_handed_out(db: kvwal.Store) -> None:
    db.update({b"a": b"1", b"b": b"2", b"c": b"3"})
    db[b"d"] = b"4"
    feed = db.changes(0)
    assert feed.position == 0
    found = [(change.key, change.last, feed.position) for change in feed]
    assert found == [(b"a", False, 0), (b"b", False, 0), (b"c", True, 1), (b"d", True, 2)]
    # The last one that the filter lets through is the last one.
    assert [(c.key, c.last) for c in db.changes(0, prefix=[b"a", b"b"])] == [(b"a", False), (b"b", True)]


# -- how it ends -------------------------------------------------------------------------------


def _ends_while_waiting(db: kvwal.Store, end: Any, error: type[Exception]) -> None:
    feed = db.changes(db.last_seqno, follow=True)

    def follow() -> None:
        with pytest.raises(error):
            next(feed)
        # It stays so.
        with pytest.raises((error, ClosedError)):
            next(feed)

    def finish() -> None:
        wait_until(lambda: db.engine._log._waiting, "the feed waits")  # type: ignore[union-attr]
        end(feed)

    run_threads(follow, finish)


def test_closing_the_feed_or_the_store_ends_a_wait(db: kvwal.Store) -> None:
    _ends_while_waiting(db, lambda feed: feed.close(), ClosedError)
    _ends_while_waiting(db, lambda _: db.close(), ClosedError)
    with pytest.raises(ClosedError, match="store"):
        db.changes()


def test_who_closed_is_said(db: kvwal.Store) -> None:
    db[b"a"] = b"1"
    closed, orphan = db.changes(0), db.changes(0)
    closed.close()
    with pytest.raises(ClosedError, match="the feed is closed"):
        next(closed)
    with pytest.raises(ClosedError, match="the feed is closed"), closed:
        pass
    db.close()
    with pytest.raises(ClosedError, match="the store is closed"):
        next(orphan)


def test_a_failed_flush_ends_a_wait_after_what_is_durable() -> None:
    disk = SimulatedDisk()
    db = opened(disk)
    db[b"a"] = b"1"
    feed = db.changes(0, follow=True)
    disk.fail("datasync")
    with pytest.raises(PoisonedError):
        db[b"b"] = b"2"
    assert next(feed).key == b"a"
    with pytest.raises(PoisonedError):
        next(feed)
    assert seqnos(db.changes()) == [1]
    db.close()


def test_a_store_that_poisoned_itself_ends_a_wait(db: kvwal.Store) -> None:
    """Where the log knows nothing of it: our own bug, or too many interruptions."""
    _ends_while_waiting(db, lambda _: db.engine.queue.poison(RuntimeError("a bug")), PoisonedError)


def test_with_a_timeout_it_stops_when_nothing_came_and_goes_on_when_asked_again(db: kvwal.Store) -> None:
    feed = db.changes(follow=True, timeout_s=0.03, prefix=b"a")
    for number in range(3):
        began_s = time.monotonic()
        assert next(feed, None) is None
        assert time.monotonic() - began_s >= 0.03
        db[b"b"] = b""
        db[b"a"] = b"%d" % number
        assert [change.value for change in feed] == [b"%d" % number]
    assert feed.position == 6


def test_commits_that_match_nothing_do_not_put_off_a_timeout(db: kvwal.Store) -> None:
    feed = db.changes(follow=True, timeout_s=0.1, prefix=b"a")
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            db[b"b"] = b""

    def follow() -> None:
        assert next(feed, None) is None
        over.set()

    run_threads(write, follow)


@pytest.mark.parametrize("wrong", [-1, float("nan")])
def test_a_timeout_is_not_negative(db: kvwal.Store, wrong: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        db.changes(follow=True, timeout_s=wrong)


def test_a_poll_never_waits(db: kvwal.Store) -> None:
    feed = db.changes(follow=True)
    assert feed.poll() is None
    db[b"a"] = b"1"
    change = feed.poll()
    assert change is not None
    assert (change.key, feed.position) == (b"a", 1)
    feed.close()
    with pytest.raises(ClosedError):
        feed.poll()


@pytest.mark.parametrize("options", [{}, {"follow": True, "timeout_s": 0}], ids=["from the log", "from memory"])
def test_an_interruption_loses_nothing_that_the_position_counts(db: kvwal.Store, options: dict[str, Any]) -> None:
    # Invariant: a call counts what it hands out by its last step.
    log = db.engine._log
    assert log is not None
    if options:
        log.recent(1)
    db.update({b"a": b"1", b"b": b"2"})
    db[b"skipped"] = b""
    db[b"c"] = b"3"
    step = 0
    while True:
        step += 1
        feed = db.changes(0, prefix=[b"a", b"b", b"c"], **options)
        told: list[bytes] = []

        def read(feed: kvwal.Changes = feed, told: list[bytes] = told) -> None:
            for change in feed:
                told.append(change.key)

        interruption = interrupted_at(step, read)
        again = [change.key for change in db.changes(feed.position, prefix=[b"a", b"b", b"c"])]
        keys = [b"a", b"b", b"c"]
        assert told == keys[: len(told)]
        # Nothing is missed; what is told again are whole commits from the position on.
        assert again in (keys, [b"c"], [])
        assert len(told) + len(again) >= 3
        if interruption is None:
            break
        try:
            # Interrupted before it did anything, it goes on.
            told += [change.key for change in feed]
            assert told == keys
        except ClosedError:
            pass
        feed.close()
        # What it was raised through refers to what was on its way out.
        del interruption
        assert log.holds() == []
    assert step > 50


def test_ctrl_c_ends_a_wait(db: kvwal.Store) -> None:
    log = db.engine._log
    assert log is not None

    def interrupt() -> None:
        wait_until(lambda: log._waiting, "the feed waits")
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    feed = db.changes(follow=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        next(feed)
    thread.join()
    assert log.holds() == []
    db[b"a"] = b"1"
    assert [change.key for change in db.changes(feed.position)] == [b"a"]


def test_in_a_forked_child_it_is_refused(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db[b"a"] = b"1"
        feed = db.changes(1, follow=True)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                next(feed)
            except ForkedError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        feed.close()


def test_a_read_only_store_tells_what_is_kept_and_does_not_follow(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db[b"a"] = b"1"
        db[b"b"] = b"2"
    with kvwal.open(tmp_path / "s", "r") as db:
        assert seqnos(db.changes()) == [1, 2]
        assert [change.key for change in db.changes(1)] == [b"b"]
        with pytest.raises(ReadOnlyError, match=r"use kvwal\.follow\(path\)"):
            db.changes(follow=True)
        with pytest.raises(FeedGap):
            db.changes(3)
        with db.bootstrap() as base:
            assert (base.position, dict(base.snapshot), list(base.changes())) == (2, {b"a": b"1", b"b": b"2"}, [])


# -- bootstrap ---------------------------------------------------------------------------------


def test_the_log_behind_a_snapshot_is_held_until_the_feed_begins(db: kvwal.Store) -> None:
    log = db.engine._log
    assert log is not None
    db[b"first"] = b""
    with db.bootstrap() as base:
        for number in range(40):
            db[b"%d" % number] = bytes(2000)
            db.checkpoint()
        assert (base.position, list(base.snapshot)) == (1, [b"first"])
        feed = base.changes(prefix=[b"1", b"2"])
        assert seqnos(base.changes()) == list(range(2, 42))
    # The feed goes on without what it began from.
    assert len(list(feed)) == 22
    assert log.holds() == []
    assert not readers_in(db.pins())
    with pytest.raises(ClosedError):
        base.changes()
    with pytest.raises(ClosedError), base:
        pass


def test_a_bootstrap_is_a_position_that_a_crash_leaves() -> None:
    # Durability: else the crash could give the number to another commit.
    disk = SimulatedDisk()
    db = opened(disk, durability="os")
    db[b"a"] = b"1"
    assert db.durable_seqno == 0
    with db.bootstrap() as base:
        found = disk.crash()
    db.close()
    with opened(found) as db:
        assert db[b"a"] == b"1"
        db[b"b"] = b"2"
        assert [change.key for change in db.changes(base.position)] == [b"b"]


def test_a_bootstrap_that_cannot_be_durable_leaves_nothing_behind() -> None:
    disk = SimulatedDisk()
    db = opened(disk, durability="os")
    db[b"a"] = b"1"
    disk.fail("datasync")
    with pytest.raises(PoisonedError):
        db.bootstrap()
    assert db.engine._log.holds() == []  # type: ignore[union-attr]
    assert not readers_in(db.pins())
    db.close()


def test_a_bootstrap_that_was_overtaken_by_checkpoints_begins_again(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    db[b"a"] = b"1"
    times = 0
    real = db.engine.upkeep.read

    def late(*arguments: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        if times == 1:
            for number in range(40):
                db[b"%d" % number] = bytes(2000)
                db.checkpoint()
        return real(*arguments, **options)

    monkeypatch.setattr(db.engine.upkeep, "read", late)
    with db.bootstrap() as base:
        assert (times, base.position) == (2, 41)
        assert len(readers_in(db.pins())) == 1
