"""What happens without being asked: flushes in time, idle marks, checkpoints, and the end of a forgotten store."""

from __future__ import annotations

import errno
import gc
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from store_fixtures import DEADLINE_S, TINY, readers_in, run_threads, wait_until
from wrapped_files import Wrapped

import kvwal
from kvwal import DiskFullError, LockedError, PoisonedError
from kvwal.engine.background import Background, Job
from kvwal.files import system_files
from kvwal.testing import SimulatedDisk


def test_an_interval_commit_is_durable_within_its_bound(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="interval", sync_delay_s=0.05) as db:
        for number in range(5):
            began = time.monotonic()
            seqno = db.put(b"%d" % number, b"v")
            wait_until(lambda seqno=seqno: db.durable_seqno >= seqno, "the flush")
            # Generous: the machine may be busy; without the thread it would never come.
            assert time.monotonic() - began < 2


def test_a_commit_that_was_slow_to_begin_is_flushed_in_time(tmp_path: Path) -> None:
    """The background thread may fall asleep between what a commit looks at first and its append."""
    with kvwal.open(tmp_path / "a.kv", durability="interval", sync_delay_s=0.01) as db:
        put = db._put

        def slow_put(key: bytes, value: bytes, sync: bool) -> kvwal.Seqno:
            time.sleep(0.3)
            return put(key, value, sync)

        # Between what `put` looks at and the queue there is no other place to be slow at.
        db._put = slow_put  # type: ignore[method-assign]
        seqno = db.put(b"a", b"1")
        wait_until(lambda: db.durable_seqno >= seqno, "the flush")


def test_a_poisoned_store_does_not_end_the_thread_as_it_falls_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It falls asleep by a commit of its own, which may be in the group whose flush fails."""
    with kvwal.open(tmp_path / "a.kv", durability="interval", sync_delay_s=0.01) as db:
        background = db.engine._background
        assert background is not None

        def refuse(bell: object) -> None:
            raise PoisonedError("the flush failed")

        monkeypatch.setattr(db.engine._log, "notify_on_append", refuse)
        db.put(b"a", b"1")
        wait_until(lambda: isinstance(background.failure, PoisonedError), "the failure")
        time.sleep(0.1)
        assert background._thread.is_alive()


class Clocked:
    """The operating system's files, but for time."""

    def __init__(self, now_s: float = 0.0, taken_s: float = 0.0) -> None:
        """`taken_s`: for how long each pause lasts."""
        self.now_s = now_s
        self.pauses: list[float] = []
        self._taken_s = taken_s

    def __getattr__(self, name: str) -> Any:
        return getattr(system_files(), name)

    def monotonic_s(self) -> float:
        return self.now_s

    def give_way(self, pause_s: float) -> None:
        self.now_s += self._taken_s
        self.pauses.append(pause_s)


def test_a_checkpoint_lets_a_commit_that_is_under_way_go_on(tmp_path: Path) -> None:
    """A thread needs longer to take the interpreter than the shortest of pauses lasts, and would lose it every time."""
    files: Any = Clocked()
    with kvwal.open(tmp_path / "a.kv", background=False, files=files) as db:
        checkpointer = db.engine._checkpointer
        assert checkpointer is not None
        work = checkpointer._yield_to_writers
        for now in (1.0, 1.0001, 1.0004, 1.0006, 1.0008):
            files.now_s = now
            work()
        assert files.pauses == [0, 0], "after half a millisecond of work each"
        for now in (2.0, 2.0001, 2.0004, 2.0006, 2.0008):
            files.now_s = now
            db.engine.queue.run(work)
        assert files.pauses == [0, 0, 0.0002, 0.0002, 0.0002]


@pytest.mark.parametrize(
    ("taken_s", "is_quiet", "is_busy", "expected"),
    [
        (0.00015, True, False, [0]),
        (0.00025, True, False, [0, 0.0012]),
        (0.00025, False, False, [0]),
        (0.00025, False, True, [0.0002]),
    ],
    ids=["no other thread", "a reader", "a writer that rests", "a writer"],
)
def test_key_indexes_rest_where_a_reader_takes_the_interpreter(
    tmp_path: Path, taken_s: float, is_quiet: bool, is_busy: bool, expected: list[float]
) -> None:
    files: Any = Clocked(5.0, taken_s)
    with kvwal.open(tmp_path / "a.kv", files=files) as db:
        background = by_hand(db)
        files.pauses.clear()
        background._quiet, background._stopping = is_quiet, False
        queue = SimpleNamespace(is_busy=lambda: is_busy)
        background._queue = queue  # type: ignore[assignment]  # what is asked of it

        def steps() -> Generator[None, None, None]:
            for _ in range(5):
                files.now_s += 0.0001
                yield

        background._indexing = steps()
        background._make_indexes()
    assert files.pauses == expected


@pytest.mark.parametrize(("taken_s", "expected"), [(0.00015, [0, 0]), (0.00025, [0, 0.0012] * 2)])
def test_indexes_of_tables_rest_where_a_reader_takes_the_interpreter(
    tmp_path: Path, taken_s: float, expected: list[float]
) -> None:
    files: Any = Clocked(5.0, taken_s)
    with kvwal.open(tmp_path / "a.kv", files=files) as db:
        background = by_hand(db)
        files.pauses.clear()
        background._stopping = False
        building: Any = SimpleNamespace(is_due=lambda: True, steps=lambda: iter(()))
        background._table_indexes, background._indexing_tables = building, (None for _ in range(2))
        background._see_to_table_indexes()
    assert files.pauses == expected


def test_a_store_that_is_closed_at_once_does_not_wait_for_key_indexes(tmp_path: Path) -> None:
    files: Any = Clocked(5.0)
    with kvwal.open(tmp_path / "a.kv", files=files, **TINY) as db:
        background = by_hand(db)
        while not db.engine.upkeep.consumers.log().key_history.lacks_indexes():
            db.put(b"k", b"v" * 100)
        assert not background._indexes_are_due()
        files.now_s += 0.2
        assert background._indexes_are_due()


def test_steady_writing_does_not_put_the_flush_off(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="interval", sync_delay_s=0.05) as db:
        first = db.put(b"first", b"")
        deadline = time.monotonic() + DEADLINE_S
        while db.durable_seqno < first:
            db.put(b"k", b"v")
            assert time.monotonic() < deadline


def test_os_commits_are_never_flushed_by_themselves_but_sync_does(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os") as db:
        seqno = db.put(b"a", b"1")
        db.sync()
        assert db.durable_seqno == seqno


def test_one_commit_may_ask_for_more_than_the_store(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as db:
        first = db.put(b"a", b"1")
        assert db.durable_seqno < first
        second = db.put(b"b", b"1", durability="commit")
        assert db.durable_seqno == second


def test_a_checkpoint_comes_by_log_bytes(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **TINY) as db:
        db.update({b"%04d" % number: b"v" * 100 for number in range(300)})
        wait_until(lambda: db.stats().checkpoint_seqno == db.last_seqno, "the checkpoint")


def test_a_checkpoint_that_met_a_full_disk_is_tried_again_without_another_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", checkpoint_interval_s=0.05) as db:
        checkpointer, state = db.engine._checkpointer, db.engine.state
        assert checkpointer is not None
        checkpoint = checkpointer._checkpoint
        attempts: list[int] = []

        def full_twice() -> None:
            attempts.append(1)
            if len(attempts) > 2:
                checkpoint()
                return
            # All that was committed is in the frozen memtable then.
            if state.version.frozen is None:
                db.engine._succession.freeze()
            raise DiskFullError("full")

        monkeypatch.setattr(checkpointer, "_checkpoint", full_twice)
        db[b"a"] = b"1"
        wait_until(lambda: state.version.frozen is None and len(attempts) == 3, "the checkpoint")
        assert db.stats().checkpoint_seqno == 1


def test_a_checkpoint_that_another_thread_makes_is_not_due_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its frozen table says that one is due, until it has been made: the commits since then would ask for another."""
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        checkpointer, pages = db.engine._checkpointer, db.engine._pages
        assert checkpointer is not None
        merge = pages.checkpoint
        frozen, go_on = threading.Event(), threading.Event()

        def merge_later(*args: Any, **options: Any) -> Any:
            frozen.set()
            assert go_on.wait(DEADLINE_S)
            return merge(*args, **options)

        monkeypatch.setattr(pages, "checkpoint", merge_later)
        db[b"a"] = b"1"
        others = [threading.Thread(target=checkpointer.checkpoint)]
        others[0].start()
        assert frozen.wait(DEADLINE_S)
        db[b"b"] = b"1"
        assert checkpointer.is_due()
        assert not checkpointer.checkpoint_if_due(), "and is not waited for"
        go_on.set()
        others[0].join(DEADLINE_S)
        assert not checkpointer.is_due()
        assert checkpointer.checkpoint_if_due()
        assert db.stats().checkpoint_seqno == 1 < db.last_seqno


class _LongMerge:
    """The merge of a checkpoint, which lets other threads run until a test is done."""

    def __init__(self, db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self._merge = db.engine._pages.checkpoint
        self.began, self.go_on = threading.Event(), threading.Event()
        monkeypatch.setattr(db.engine._pages, "checkpoint", self)

    def __call__(self, *args: Any, yield_to_writers: Callable[[], None], **options: Any) -> Any:
        self.began.set()
        until = time.monotonic() + DEADLINE_S
        while not self.go_on.wait(0.001) and time.monotonic() < until:
            yield_to_writers()
        return self._merge(*args, yield_to_writers=yield_to_writers, **options)


@pytest.mark.parametrize("by", ["the background thread", "another thread"])
def test_an_interval_commit_does_not_wait_for_the_end_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """It is durable within its bound. That of another thread is due as well while it is made: it has a frozen table."""
    interval_s = 0.05 if by == "the background thread" else 1e9
    options: Any = {"durability": "interval", "sync_delay_s": 0.05, "checkpoint_interval_s": interval_s}
    with kvwal.open(tmp_path / "a.kv", **options) as db:
        merge = _LongMerge(db, monkeypatch)
        db[b"a"] = b""
        other = threading.Thread(target=db.checkpoint)
        if by == "another thread":
            other.start()
        try:
            assert merge.began.wait(DEADLINE_S)
            for number in range(3):
                seqno = db.put(b"a", b"%d" % number)
                wait_until(lambda seqno=seqno: db.durable_seqno >= seqno, "the flush")
            assert db.engine._pages.meta.seqno == 0, "the checkpoint is under way"
        finally:
            merge.go_on.set()
            if by == "another thread":
                other.join(DEADLINE_S)


def by_hand(db: kvwal.Store) -> Background:
    """The background, without its thread."""
    background = db.engine._background
    assert background is not None
    background.stop()
    return background


@pytest.mark.parametrize("is_due", [False, True])
@pytest.mark.parametrize("lacks_indexes", [False, True])
def test_a_flush_that_a_long_job_has_put_off_comes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_due: bool, lacks_indexes: bool
) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="interval") as db:
        background = by_hand(db)
        background._stopping = False
        monkeypatch.setattr(background, "_indexes_are_due", lambda: lacks_indexes)
        db[b"a"] = b"1"
        background._jobs = (Job("long", lambda: True, lambda: db.put(b"b", b"1")),)
        background._synced_s = -math.inf if is_due else math.inf
        assert background._work() == (0.0 if is_due else background._tick_s)


@pytest.mark.parametrize("is_due", [False, True])
@pytest.mark.parametrize("is_here", [False, True])
def test_what_is_due_during_a_checkpoint_is_done_by_the_background_thread_alone_and_no_earlier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_due: bool, is_here: bool
) -> None:
    """As if the checkpoint had begun while no thread committed anything."""
    with kvwal.open(tmp_path / "a.kv", durability="interval") as db:
        background = by_hand(db)
        monkeypatch.setattr(background, "is_here", lambda: is_here)
        background._quiet, background._seen_seqno = True, db.last_seqno
        db[b"a"] = b"1"
        background._synced_s = -math.inf if is_due else math.inf
        background._meanwhile()
        assert (db.durable_seqno == db.last_seqno) == (is_due and is_here)


def test_a_checkpoint_of_another_thread_says_nothing_of_a_failure(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv") as db:
        background, failure = by_hand(db), DiskFullError("full")
        background.failure = failure
        checkpointer = db.engine._checkpointer
        assert checkpointer is not None
        with checkpointer.lock:
            run_threads(background._checkpoint)
        assert background.failure is failure
        background._checkpoint()
        assert background.failure is None


def test_a_follower_that_comes_during_a_checkpoint_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvwal.open(tmp_path / "a.kv", checkpoint_interval_s=0.05) as db:
        merge = _LongMerge(db, monkeypatch)
        db[b"a"] = b""
        try:
            assert merge.began.wait(DEADLINE_S)
            with kvwal.follow(tmp_path / "a.kv") as live:
                wait_until(lambda: (tmp_path / "a.kv/readers/now").exists(), "the control page")
                for _ in range(3):
                    # One that comes soon after another is told by the next look.
                    db[b"a"] = b"1"
                    assert live.wait(db.put(b"a", b"2"), DEADLINE_S)
            assert db.engine._pages.meta.seqno == 0, "the checkpoint is under way"
        finally:
            merge.go_on.set()


def test_a_checkpoint_comes_by_age(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", checkpoint_interval_s=0.05) as db:
        db[b"a"] = b"1"
        wait_until(lambda: db.stats().checkpoint_seqno == db.last_seqno, "the checkpoint")


def test_an_idle_store_gives_back_the_log_that_only_commits_need(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, durability="os") as db:
        for number in range(16):
            db[b"%d" % number] = bytes(1 << 20)
        log = db.engine._log
        assert log.can_give_back
        wait_until(lambda: log.segments()[-1].size <= 64 << 10, "the idle log")
        newest = log.segments()[-1]
        assert not (path / "spare.tmp").exists()
        assert sum(file.stat().st_size for file in path.glob("*.log")) < 20 << 20
        db[b"more"] = b"1"
        assert log.segments()[-1].first_seqno == newest.first_seqno
        expected = dict(db)
    with kvwal.open(path) as db:
        assert dict(db) == expected


def test_an_idle_log_says_that_its_last_commit_is_durable(tmp_path: Path) -> None:
    """So that damage to the very last commit is told from a torn tail."""
    path = tmp_path / "a.kv"
    with kvwal.open(path) as db:
        db[b"a"] = b"acknowledged"
        # The mark follows the record; it is there once the file holds a second marker behind the first.
        segment = max(path.glob("*.log"))

        def marks() -> int:
            data = segment.read_bytes()
            start = data.index(b"acknowledged")
            return data[start - 60 : start + 200].count(data[4096:4100])

        wait_until(lambda: marks() >= 2, "the mark")
        copy = tmp_path / "copy.kv"
        copy.mkdir()
        for entry in path.iterdir():
            (copy / entry.name).write_bytes(entry.read_bytes())
    data = bytearray((copy / segment.name).read_bytes())
    data[data.index(b"acknowledged")] ^= 1
    (copy / segment.name).write_bytes(data)
    with pytest.raises(kvwal.CorruptionError):
        kvwal.open(copy)


class Unmeasured(Wrapped):
    """A file whose size cannot be found out."""

    def size(self) -> int:
        raise OSError(errno.EIO, "no size")


def test_a_page_file_without_a_size_does_not_end_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it waited it looked at the figures of the page file, and ended when the system did not say its size: from
    then on nothing was flushed, and no caller was told."""
    with kvwal.open(tmp_path / "a.kv", durability="interval", sync_delay_s=0.05) as db:
        db[b"a"] = b"1"
        db.checkpoint()
        background = db.engine._background
        assert background is not None
        monkeypatch.setattr(db.engine._pages, "_file", Unmeasured(db.engine._pages._file))
        for number in range(3):
            wait_until(lambda: db.engine._log._on_append is not None, "the wait")
            seqno = db.put(b"%d" % number, b"v")
            wait_until(lambda seqno=seqno: db.durable_seqno >= seqno, "the flush")
        assert background._thread.is_alive()
        assert background.failure is None


@pytest.mark.parametrize("background", [False, True])
def test_a_forgotten_store_is_collected_and_lets_go_of_its_lock(tmp_path: Path, background: bool) -> None:
    path = tmp_path / "a.kv"
    threads = threading.active_count()
    descriptors = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    def forget() -> None:
        db = kvwal.open(path, background=background)
        db[b"a"] = b"1"

    with pytest.warns(ResourceWarning, match="never closed"):
        forget()  # The last reference goes with its frame.
    wait_until(lambda: threading.active_count() == threads, "the end of the thread")
    if descriptors:
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "the closing of the files")
    with kvwal.open(path) as db:
        assert db[b"a"] == b"1"


@pytest.mark.parametrize("kind", ["snapshot", "transaction", "iterator"])
def test_a_store_is_not_given_away_while_a_part_of_it_is_in_use(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.kv"

    def part() -> Any:
        db = kvwal.open(path)
        db.update({b"%04d" % number: b"v" for number in range(500)})
        return {"snapshot": db.snapshot, "transaction": db.transaction, "iterator": db.scan}[kind]()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        held = part()
        gc.collect()
        with pytest.raises(LockedError):
            kvwal.open(path)
        if kind == "transaction":
            held[b"late"] = b"1"
            held.commit()
        else:
            assert len(list(held)) == 500
        del held
        gc.collect()

        def free() -> bool:
            try:
                kvwal.open(path).close()
            except LockedError:
                return False
            return True

        wait_until(free, "the lock")
    with kvwal.open(path) as db:
        assert (b"late" in db) == (kind == "transaction")


def test_a_held_snapshot_is_shown_as_a_pin_and_goes_when_it_is_dropped(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        # A shorter scan is read at once and pins nothing.
        db.update({b"%04d" % number: b"1" for number in range(1000)})
        snapshot = db.snapshot()
        iterator = db.scan()
        next(iterator)
        txn = db.transaction()
        assert sorted(pin.purpose for pin in readers_in(db.pins())) == ["scan", "snapshot", "transaction"]
        assert all(pin.thread_name == threading.current_thread().name for pin in readers_in(db.pins()))
        del snapshot, iterator, txn
        gc.collect()
        assert readers_in(db.pins()) == []


# -- processes ------------------------------------------------------------------------------------


def run(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script, str(path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def test_a_process_exits_while_a_store_is_open_and_nothing_is_lost(tmp_path: Path) -> None:
    done = run("import kvwal, sys; db = kvwal.open(sys.argv[1], durability='os'); db[b'a'] = b'1'", tmp_path / "a.kv")
    assert (done.returncode, done.stderr) == (0, "")
    with kvwal.open(tmp_path / "a.kv") as db:
        assert db[b"a"] == b"1"
        assert db.recovery.row == "closed"


def test_a_process_exits_while_another_thread_writes(tmp_path: Path) -> None:
    script = """
import kvwal, sys, threading
db = kvwal.open(sys.argv[1])
began = threading.Event()
def write():
    number = 0
    while True:
        try:
            db[b"%d" % number] = b"v"
        except kvwal.ClosedError:
            return
        number += 1
        began.set()
threading.Thread(target=write, daemon=True).start()
began.wait()
"""
    done = run(script, tmp_path / "a.kv")
    assert done.returncode == 0, done.stderr
    with kvwal.open(tmp_path / "a.kv") as db:
        assert len(db) == db.last_seqno > 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_control_c_anywhere_leaves_a_store_that_goes_on(tmp_path: Path) -> None:
    """A real signal, at moments that no test chose; each put is written or not, and what follows works."""
    # One that comes while a finalizer runs is swallowed by the interpreter, so it is sent again and again.
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    written = 0
    with kvwal.open(tmp_path / "a.kv", **{**TINY, "durability": "os"}) as db:
        for round_number in range(60):
            number = 0
            # The handler first: the one that was there ends tests which take too long.
            former = signal.signal(signal.SIGALRM, _interrupt)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0007 * (round_number % 7), 0.25)
                while True:
                    key = b"%02d.%06d" % (round_number, number)
                    number += 1
                    if number % 3:
                        db[key] = b"v"
                    else:
                        with db.transaction() as txn:
                            txn.get(b"none")
                            txn[key] = b"v"
            except KeyboardInterrupt:
                pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, former)
            # All but the last were acknowledged.
            keys = list(db.keys(prefix=b"%02d." % round_number))
            assert keys == [b"%02d.%06d" % (round_number, n) for n in range(len(keys))]
            assert len(keys) in (number - 1, number)
            written += len(keys)
            assert len(db) == written
        model = dict(db)
    with kvwal.open(tmp_path / "a.kv") as db:
        assert dict(db) == model


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
