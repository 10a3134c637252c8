"""The power is cut, or a call fails, at each operation of a backup and of a restore."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
from backup_fixtures import Lived, check_destination, objects, restored

import kvwal
from kvwal.backup.making import backup
from kvwal.backup.port import DirectoryDestination
from kvwal.files import Directory
from kvwal.testing import SimulatedDisk, crash_every


def a_backed_up_store(seed: int, *, more: int = 25) -> Lived:
    """With a full base, a difference and units in the destination, and commits that are in none."""
    lived = Lived(seed)
    for _ in range(2):
        lived.live(more)
        lived.db.checkpoint()
        lived.live(3)
        backup(lived.db.engine, lived.destination)
    lived.live(5)
    lived.db.checkpoint()
    lived.live(2)
    return lived


def is_there(disk: SimulatedDisk, path: str) -> bool:
    try:
        directory: Directory = disk.open_directory(path)
    except FileNotFoundError:
        return False
    return bool(directory.names())


@pytest.mark.parametrize("states", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_backup_that_was_cut_off_leaves_whole_objects_and_is_done_again(states: int) -> None:
    lived = a_backed_up_store(1)
    before = int(backup(lived.db.engine, lived.destination).position)
    lived.live(6)
    lived.db.checkpoint()
    lived.live(2)
    now = lived.db.last_seqno

    def program(disk: SimulatedDisk, done: list[Any]) -> None:
        report = backup(lived.db.engine, lived.destination)
        done.append(int(report.position))

    def check(found: SimulatedDisk, done: list[Any]) -> None:
        destination = DirectoryDestination("/b", files=found)
        check_destination(destination)
        # What was acknowledged before is there, and what is there now is right.
        db = restored(lived, disk=found)
        assert db.last_seqno - 1 >= (done[0] if done else before)
        db.close()
        restored(lived, before, "/r2", found).close()
        with kvwal.open("/s", "r", files=found) as store:
            assert backup(store.engine, destination).position.seqno == now
        restored(lived, now, "/r3", found).close()

    report = crash_every(program, check, disk=lived.disk, states_per_point=states)
    assert report.points >= 15


@pytest.mark.parametrize("states", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_restore_that_was_cut_off_leaves_nothing_or_all_and_goes_on(states: int) -> None:
    lived = a_backed_up_store(2, more=12)
    report = backup(lived.db.engine, lived.destination)
    resumed: list[bool] = []

    def program(disk: SimulatedDisk, done: list[Any]) -> None:
        done.append(kvwal.restore(lived.destination, "/r", files=disk).position)

    def check(found: SimulatedDisk, done: list[Any]) -> None:
        destination = DirectoryDestination("/b", files=found)
        if not is_there(found, "/r"):
            assert not done
            again = kvwal.restore(destination, "/r", files=found)
            resumed.append(again.resumed)
        with kvwal.open("/r", files=found, background=False) as db:
            lived.check(db, int(report.position))
            assert not done or db.position == done[0]
            assert db.verify().ok
        assert not is_there(found, "/r.restoring")
        assert found.kind("/r/restoring") is None

    points = crash_every(program, check, disk=lived.disk, states_per_point=states).points
    assert points > 30
    assert True in resumed
    assert False in resumed


@pytest.mark.parametrize("states", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_a_restore_of_another_moment_that_was_cut_off_begins_anew_or_goes_on(states: int) -> None:
    lived = a_backed_up_store(6, more=12)
    report = backup(lived.db.engine, lived.destination)
    lived.disk.fail("rename", path="/r.restoring/data", effect="all")
    with pytest.raises(OSError):
        kvwal.restore(lived.destination, "/r", at=report.oldest, files=lived.disk)
    lived.disk.heal()
    asked = 0

    def program(disk: SimulatedDisk, done: list[Any]) -> None:
        done.append(kvwal.restore(lived.destination, "/r", files=disk).restored.seqno)

    def check(found: SimulatedDisk, done: list[Any]) -> None:
        nonlocal asked
        asked += 1
        expected = int(report.position)
        if not is_there(found, "/r"):
            # By turns the moment of before, and that of now.
            expected = report.oldest if asked % 2 else expected
            marked = found.kind("/r.restoring/restoring") is not None
            try:
                kvwal.restore(DirectoryDestination("/b", files=found), "/r", at=expected, files=found)
            except kvwal.StoreExistsError:
                # The other one was made already, but for its name.
                assert not marked
                assert expected == report.oldest
                return
        with kvwal.open("/r", files=found, background=False) as db:
            lived.check(db, expected)
            assert db.verify().ok

    assert crash_every(program, check, disk=lived.disk, states_per_point=states).points > 30


def failing(kind: str, error: int, effect: str, path: str, run: Callable[[], object], disk: SimulatedDisk) -> int:
    """Run it with the nth operation of a kind failing, for each n that there is. How many there were."""
    for nth in range(1, 1000):
        fault = disk.fail(kind, nth=nth, error=error, effect=effect, path=path)  # type: ignore[arg-type]
        try:
            run()
        except OSError:
            assert fault.struck
        except kvwal.Error as failure:
            assert fault.struck, failure
        disk.heal()
        if not fault.struck:
            return nth - 1
    raise AssertionError("it did not end")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", ["change", "fsync", "read"])
def test_a_backup_goes_on_after_each_call_that_fails(kind: str, error: int) -> None:
    lived = a_backed_up_store(3, more=10)
    whole = objects(lived.destination)
    made = 0

    def run() -> None:
        nonlocal made
        try:
            made += len(backup(lived.db.engine, DirectoryDestination("/b", files=lived.disk)).made)
        finally:
            check_destination(DirectoryDestination("/b", files=lived.disk.copy()))
            found = objects(lived.destination)
            assert {name: found[name] for name in whole} == whole

    assert failing(kind, error, "none", "/b*", run, lived.disk) >= 3
    assert backup(lived.db.engine, lived.destination).made == ()
    restored(lived).close()
    # The store itself is as it was.
    lived.live(5)
    assert lived.db.verify().ok


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("kind", ["change", "fsync", "read"])
def test_a_restore_goes_on_after_each_call_that_fails(kind: str, error: int) -> None:
    lived = a_backed_up_store(4, more=10)
    position = backup(lived.db.engine, lived.destination).position
    done = 0

    def run() -> None:
        nonlocal done
        if is_there(lived.disk, "/r"):
            lived.disk.remove("/r")
        try:
            kvwal.restore(lived.destination, "/r", files=lived.disk)
            done += 1
        finally:
            if is_there(lived.disk, "/r"):
                with kvwal.open("/r", "r", files=lived.disk.copy()) as db:
                    lived.check(db, int(position))

    assert failing(kind, error, "none", "/r*", run, lived.disk) >= 3
    assert done
