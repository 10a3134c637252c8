"""`kvwal.archive`: it keeps up by itself, says how it is doing, and never gets in the way of a commit."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from archive_fixtures import OPTIONS, Gated, Writer, check_all, held_of

import kvwal
import kvwal.aio
from kvwal.backup import archiver
from kvwal.backup.archiver import Archiver
from kvwal.backup.port import DirectoryDestination
from kvwal.errors import BackupDestinationError, ClosedError, PoisonedError, ReadOnlyError
from kvwal.testing import SimulatedDisk


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.005)


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[Any]:
    with kvwal.open("/kv", files=disk, **OPTIONS) as db:
        yield db


@pytest.fixture
def place(disk: SimulatedDisk) -> Gated:
    return Gated(DirectoryDestination("/b", files=disk))


def test_it_keeps_up_and_every_moment_can_be_restored(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv", background=False) as db:
        writer = Writer(db)
        with kvwal.archive(db, tmp_path / "b", rpo_s=0.02) as archive:
            for _ in range(10):
                writer.some(10)
                time.sleep(0.01)
            until(lambda: archive.status().mark == 100)
            writer.some(5)
            assert archive.flush(20)
            status = archive.status()
            assert (status.state, status.mark, status.lag_s, status.behind_commits) == ("archiving", 105, 0.0, 0)
            assert status.mark == db.position
            assert status.units > 2
            assert "archiving" in repr(archive)
            writer.some(2)
        assert archive.status().mark == 107, "what was committed before the end is there"
        place = DirectoryDestination(tmp_path / "b")
        check_all(held_of(db, place), place, db.engine.state.version.tree.meta.store_id, writer.model, 0, 107)
    for at in (0, 1, 50, 107):
        kvwal.restore(tmp_path / "b", tmp_path / f"r{at}", at=at)
        with kvwal.open(tmp_path / f"r{at}") as found:
            assert dict(found) == writer.model[at]


def test_it_goes_on_when_it_is_begun_again(tmp_path: Path) -> None:
    for turn in range(3):
        with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, tmp_path / "b") as archive:
            db[b"k"] = b"%d" % turn
            assert archive.flush(20)
            assert archive.status().epoch == turn + 1
    kvwal.restore(tmp_path / "b", tmp_path / "r")
    with kvwal.open(tmp_path / "r") as found:
        assert found[b"k"] == b"2"


def test_a_restored_store_goes_on_in_the_same_archive_on_its_own_line(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, tmp_path / "b"):
        for i in range(5):
            db[b"k"] = b"%d" % i
    kvwal.restore(tmp_path / "b", tmp_path / "r", at=3)
    with kvwal.open(tmp_path / "r") as db, kvwal.archive(db, tmp_path / "b"):
        db[b"k"] = b"new"
        newest = db.position
    for at, value in ((2, b"1"), (newest, b"new")):
        kvwal.restore(tmp_path / "b", tmp_path / f"r{int(at)}", at=at)
        with kvwal.open(tmp_path / f"r{int(at)}") as found:
            assert found[b"k"] == value


FAILURES = [OSError(28, "full"), BackupDestinationError("403"), KeyError()]


def assert_lag_rises(archive: kvwal.Archive, disk: SimulatedDisk, commit: Callable[[], object] = lambda: None) -> None:
    lags = []
    for _ in range(3):
        disk.pass_time(10)
        commit()
        lags.append(archive.status().lag_s)
    assert 10 <= lags[0] < lags[1] < lags[2]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__ + str(error.args[:1]))
def test_lag_rises_while_the_destination_fails_and_commits_go_on(
    db: Any, place: Gated, disk: SimulatedDisk, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvwal")
    with kvwal.archive(db, place, rpo_s=0.01) as archive:
        db[b"a"] = b"1"
        assert archive.flush(20)
        # The thread says so after `flush` has seen it.
        until(lambda: any("archiving again" in record.message for record in caplog.records))
        caplog.clear()
        place.error = error
        db[b"b"] = b"2"
        until(lambda: archive.status().state == "failing")
        time.sleep(0.15)
        assert_lag_rises(archive, disk, lambda: db.put(b"c", b"3"))
        status = archive.status()
        assert (status.mark, status.behind_commits) == (1, 4)
        assert type(error).__name__ in (status.error or "")
        assert status.failing_s is not None
        assert not archive.flush(0.05)
        place.error = None
        until(lambda: archive.status().state == "archiving")
        assert archive.flush(20)
        assert archive.status().lag_s == 0.0
        assert archive.status().failing_s is None
    said = [record.message for record in caplog.records if "archive in" in record.message]
    assert len(said) == 2, "one line a change of state"


def test_what_was_flushed_is_told_to_be_archived(db: Any, place: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Archiver.step

    def slow(self: Archiver, **how: Any) -> float | None:
        due_s = step(self, **how)
        time.sleep(0.1)
        return due_s

    monkeypatch.setattr(Archiver, "step", slow)
    with kvwal.archive(db, place) as archive:
        assert archive.flush(20)
        assert archive.status().state == "archiving"


def test_lag_rises_while_the_destination_hangs_and_closing_does_not_wait_for_it(
    db: Any, place: Gated, disk: SimulatedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    archive = kvwal.archive(db, place, rpo_s=0.01)
    db[b"a"] = b"1"
    assert archive.flush(20)
    place.open.clear()
    db[b"b"] = b"2"
    assert_lag_rises(archive, disk)
    assert not archive.flush(0.02)
    assert not archive.close(0.05)
    assert "hangs" in caplog.text
    assert not [pin for pin in db.pins() if pin.purpose == "archive"]
    place.open.set()
    until(lambda: not archive._worker.thread.is_alive())


def test_lag_rises_when_the_worker_is_dead(db: Any, place: Gated, disk: SimulatedDisk) -> None:
    archive = kvwal.archive(db, place, rpo_s=0.01)
    db[b"a"] = b"1"
    assert archive.flush(20)
    assert archive.close()
    assert archive.status().state == "ended"
    db[b"b"] = b"2"
    assert_lag_rises(archive, disk)
    assert not archive.flush(1)
    assert not archive.close()


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_lag_rises_whatever_the_wall_clock_does(db: Any, place: Gated, disk: SimulatedDisk, step_s: int) -> None:
    with kvwal.archive(db, place, rpo_s=0.01) as archive:
        assert archive.flush(20)
        place.open.clear()
        db[b"b"] = b"2"
        disk.jump_clock(step_s * 1_000_000)
        first = archive.status().lag_s
        time.sleep(0.02)
        assert archive.status().lag_s > first >= 0
        place.open.set()


def test_a_destination_that_is_not_there_at_first_is_waited_for(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, tmp_path / "disk" / "b") as archive:
        db[b"a"] = b"1"
        until(lambda: archive.status().state == "failing")
        assert archive.status().mark is None
        assert archive.status().lag_s > 0
        (tmp_path / "disk").mkdir()
        assert archive.flush(20)
        assert archive.status().mark == 1


def test_a_second_archiver_takes_over_and_the_first_one_says_so(db: Any, place: Gated) -> None:
    first = kvwal.archive(db, place, rpo_s=0.01)
    assert first.flush(20)
    second = kvwal.archive(db, place, rpo_s=0.01)
    assert second.flush(20)
    db[b"a"] = b"1"
    until(lambda: first.status().state == "superseded")
    assert second.flush(20)
    assert "taken over" in (first.status().error or "")
    assert not first.flush(1)
    first.close()
    assert second.close()


def test_one_whose_store_falls_idle_looks_at_the_destination_when_that_is_due(
    db: Any, place: Gated, disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a whole time after its last commit: what is lost is missed, and put anew, within one time."""
    looks: list[float] = []
    real = Archiver._is_end_lost

    def looked(self: Archiver, at: Any) -> bool:
        looks.append(time.monotonic())
        return real(self, at)

    monkeypatch.setattr(Archiver, "_is_end_lost", looked)
    monkeypatch.setattr(archiver, "_MERGE_EVERY_S", 0.6)
    with kvwal.archive(db, place, rpo_s=0.01) as archive:
        db[b"key"] = b"value"
        assert archive.flush(10)
        until(lambda: looks)
        # The last commit before it is idle comes in the middle of the time.
        time.sleep(0.3)
        db[b"key"] = b"last"
        assert archive.flush(10)
        for name, _ in list(place.list_after("")):
            place.delete(name)
        seen = len(looks)
        until(lambda: len(looks) >= seen + 3, 10)
        # It rests between them.
        assert all(after - before > 0.5 for before, after in pairwise(looks[seen - 1 : seen + 3]))
        until(lambda: held_of(db, place).newest() == db.last_seqno)


def test_a_copy_of_the_store_is_told_to_have_diverged(db: Any, place: Gated, disk: SimulatedDisk) -> None:
    db[b"a"] = b"1"
    copy = disk.crash(-1)
    with kvwal.archive(db, place, rpo_s=0.01) as archive:
        db[b"a"] = b"2"
        assert archive.flush(20)
    with kvwal.open("/kv", files=copy, **OPTIONS) as other, kvwal.archive(other, place, rpo_s=0.01) as archive:
        other[b"a"] = b"other"
        until(lambda: archive.status().state == "diverged")
        assert "different commits beyond 1" in (archive.status().error or "")
    assert held_of(db, place).newest() == 2


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files there")
def test_a_closed_archive_lets_go_of_the_destination_that_it_made_and_of_no_other(tmp_path: Path) -> None:
    def is_open(path: Path) -> bool:
        fds = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return any(os.path.realpath(fd) == str(path) for fd in fds)

    given = DirectoryDestination(tmp_path / "given")
    with kvwal.open(tmp_path / "kv", background=False) as db:
        db[b"key"] = b"value"
        for where, stays in ((tmp_path / "made", False), (given, True)):
            archive = kvwal.archive(db, where)
            assert archive.flush(10)
            path = tmp_path / ("given" if stays else "made")
            assert is_open(path)
            assert archive.close()
            assert is_open(path) is stays
            assert archive.status().state == "ended"
    given.close()
    given.close()
    assert not is_open(tmp_path / "given")
    assert given.get("kvwal-archive")


def test_an_archive_that_is_forgotten_ends(db: Any, place: Gated) -> None:
    archive = kvwal.archive(db, place)
    assert archive.flush(20)
    thread = archive._worker.thread
    del archive
    gc.collect()
    until(lambda: not thread.is_alive())


def test_a_store_that_is_closed_first_ends_it_and_it_goes_on_the_next_time(disk: SimulatedDisk, place: Gated) -> None:
    db = kvwal.open("/kv", files=disk, **OPTIONS)
    archive = kvwal.archive(db, place, rpo_s=60)
    assert archive.flush(20)
    db[b"a"] = b"1"
    db.close()
    archive._worker.wake_ups.put(None)
    until(lambda: not archive._worker.thread.is_alive())
    with pytest.raises(ClosedError):
        archive.status()
    with pytest.raises(ClosedError):
        archive.flush()
    archive.close()
    with kvwal.open("/kv", files=disk, **OPTIONS) as db, kvwal.archive(db, place) as archive:
        assert archive.flush(20)
        assert archive.status().mark == 1


def test_what_is_durable_of_a_poisoned_store_is_archived(db: Any, place: Gated, disk: SimulatedDisk) -> None:
    with kvwal.archive(db, place, rpo_s=60) as archive:
        assert archive.flush(20)
        db[b"a"] = b"1"
        disk.fail("fsync", path="/kv/*")
        with pytest.raises(PoisonedError):
            db[b"b"] = b"2"
        disk.heal()
        with pytest.raises(PoisonedError):
            archive.flush(20)
    assert held_of(db, place).newest() == 1


def test_a_store_that_is_read_only_has_none(disk: SimulatedDisk, place: Gated) -> None:
    kvwal.open("/kv", files=disk, **OPTIONS).close()
    with kvwal.open("/kv", "r", files=disk, **OPTIONS) as db, pytest.raises(ReadOnlyError):
        kvwal.archive(db, place)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rpo_s": 0}, ValueError),
        ({"rpo_s": -1}, ValueError),
        ({"rpo_s": float("nan")}, ValueError),
        ({"rpo_s": "1"}, TypeError),
        ({"max_behind_bytes": -1}, ValueError),
        ({"max_behind_bytes": 1.5}, TypeError),
        ({"keep": 30}, TypeError),
    ],
)
def test_arguments_are_checked_and_nothing_is_begun(db: Any, place: Gated, options: Any, error: type) -> None:
    with pytest.raises(error):
        kvwal.archive(db, place, **options)
    with pytest.raises(TypeError):
        kvwal.archive(db, 7)  # type: ignore[arg-type]
    assert list(place.list_after("")) == []


@pytest.mark.parametrize("wrong", ["kv", None, object()])
def test_what_is_no_open_store_has_no_archive(wrong: Any, place: Gated) -> None:
    with pytest.raises(TypeError, match="an archive is of an open store"):
        kvwal.archive(wrong, place)


def test_what_failed_last_is_told_after_the_end(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv") as db:
        db[b"a"] = b"1"
        with kvwal.archive(db, tmp_path / "no" / "such", rpo_s=0.01) as archive:
            assert not archive.flush(0.3)
        status = archive.status()
    assert (status.state, status.behind_commits) == ("ended", 1)
    assert status.error is not None
    assert "no/such" in status.error


def test_a_forked_child_has_no_part_in_it(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, tmp_path / "b", rpo_s=0.01) as archive:
        db[b"a"] = b"1"
        assert archive.flush(20)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                archive.status()
            except kvwal.ForkedError:
                code = 0 if not archive.close() else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        db[b"b"] = b"2"
        assert archive.flush(20)
        assert archive.status().mark == 2


def test_tasks_use_the_same_object(tmp_path: Path) -> None:
    async def work() -> None:
        async with await kvwal.aio.open(tmp_path / "kv") as db:
            with kvwal.archive(db.store, tmp_path / "b") as archive:
                await db.put(b"a", b"1")
                assert await asyncio.to_thread(archive.flush, 20)
                assert archive.status().mark == 1

    asyncio.run(work())


@pytest.mark.parametrize("on_behind", ["drop", "stall"])
def test_without_a_thread_it_is_refused_and_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_behind: Any
) -> None:
    with kvwal.open(tmp_path / "kv", background=False) as db:

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            before = sorted(os.listdir("/proc/self/fd"))
            holds = db.engine.upkeep.consumers.log().retention.holds()
            with pytest.raises(kvwal.RefusedError, match="no thread 'kvwal-archive' can be started") as caught:
                kvwal.archive(db, tmp_path / "b", on_behind=on_behind)
            assert caught.value.errno == errno.EAGAIN
            assert sorted(os.listdir("/proc/self/fd")) == before
        assert db.stats().archives == ()
        assert db.engine.upkeep.consumers.log().retention.holds() == holds
        db[b"a"] = b"1"
        with kvwal.archive(db, tmp_path / "b", on_behind=on_behind) as archive:
            assert archive.flush(20)
