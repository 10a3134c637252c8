"""Which moment is restored, into what, and on which line."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from backup_fixtures import OPTIONS, Lived, content, objects, restored
from store_fixtures import check_store, interrupted_at

import kvwal
from kvwal.backup import restoring
from kvwal.backup.checking import status_of
from kvwal.backup.lines import ancestry, origin_of
from kvwal.backup.making import backup
from kvwal.backup.names import IDENTITY
from kvwal.backup.port import DirectoryDestination
from kvwal.errors import InternalError
from kvwal.files.names import numbers
from kvwal.log import LogReader
from kvwal.log.copied import CopiedLog
from kvwal.log.segment import HEADER_PAGE_BYTES
from kvwal.options import Options
from kvwal.testing import SimulatedDisk
from kvwal.times import time_of


def backed_up(seed: int, *, history: bool = True, commits: int = 40) -> Lived:
    lived = Lived(seed)
    lived.live(commits)
    backup(lived.db.engine, lived.destination, history=history)
    return lived


# -- the moment -----------------------------------------------------------------------------------


def test_a_time_is_the_last_commit_at_or_before_it() -> None:
    lived = backed_up(1)
    times = {commit.seqno: time_of(commit.time_us) for commit in lived.db.history()}
    restored_ = 0
    for seqno in list(times)[3::9]:
        for at, expected in ((times[seqno], seqno), (times[seqno] - timedelta(microseconds=1), seqno - 1)):
            if expected == seqno and times.get(seqno + 1) == times[seqno]:
                continue
            report = kvwal.restore(lived.destination, "/none", at=at, dry_run=True, files=lived.disk)
            assert int(report.restored) == expected
            restored_ += 1
    assert restored_ > 4
    # A time behind all commits is the newest, and one before all of them is the beginning, if that is there.
    late = datetime.now(UTC) + timedelta(days=1000)
    report = kvwal.restore(lived.destination, "/none", at=late, dry_run=True, files=lived.disk)
    assert int(report.restored) == lived.db.last_seqno
    assert kvwal.restore(lived.destination, "/none", at=time_of(1), dry_run=True, files=lived.disk).restored.seqno == 0
    lived.db.checkpoint()
    other = DirectoryDestination("/b2", files=lived.disk)
    backup(lived.db.engine, other)
    with pytest.raises(kvwal.NotInBackup):
        kvwal.restore(other, "/none", at=time_of(1), dry_run=True, files=lived.disk)


def test_relative_paths_are_those_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may change the working directory at any time."""
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        db[b"k"] = b"v"
        db.backup(tmp_path / "backups")
    (tmp_path / "elsewhere").mkdir()
    choose = restoring.choose

    def go_elsewhere(*arguments: Any) -> object:
        monkeypatch.chdir(tmp_path / "elsewhere")
        return choose(*arguments)

    def go_back(done: int, total: int) -> None:
        monkeypatch.chdir(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(restoring, "choose", go_elsewhere)
    kvwal.restore("backups", "b.kv", progress=go_back)
    with kvwal.open(tmp_path / "b.kv", "r") as db:
        assert dict(db) == {b"k": b"v"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_ways_to_name_a_moment() -> None:
    lived = backed_up(2)
    for at, seqno in ((17, 17), ("before:17", 16), (kvwal.Position(lived.db.position.line, 9), 9), ("latest", None)):
        expected = lived.db.last_seqno if seqno is None else seqno
        report = kvwal.restore(lived.destination, "/none", at=at, dry_run=True, files=lived.disk)
        assert report.restored == kvwal.Position(lived.db.position.line, expected)
        assert report.position is None
    assert lived.disk.kind("/none") is None


NAIVE = datetime(2020, 1, 1)  # noqa: DTZ001


@pytest.mark.parametrize("at", ["", "before:", "before:0", "before:x", "yesterday", -1, 1.5, None, True, NAIVE])
def test_what_is_no_moment_is_refused(at: Any) -> None:
    lived = backed_up(3, commits=5)
    with pytest.raises((TypeError, ValueError)):
        kvwal.restore(lived.destination, "/none", at=at, dry_run=True, files=lived.disk)


def test_a_moment_in_a_gap_has_its_neighbours_in_the_error() -> None:
    lived = Lived(4)
    lived.live(20)
    lived.db.checkpoint()
    lived.live(3)
    first = backup(lived.db.engine, lived.destination)
    lived.live(20)
    lived.db.checkpoint()
    second = backup(lived.db.engine, lived.destination)
    between = (int(first.position) + second.oldest) // 2
    for at in (between, kvwal.Position(lived.db.position.line, between)):
        with pytest.raises(kvwal.NotInBackup) as caught:
            kvwal.restore(lived.destination, "/none", at=at, files=lived.disk)
        error = caught.value
        assert error.nearest == (int(first.position), second.oldest)
        assert (error.oldest, error.newest) == (first.oldest, int(second.position))
        assert str(between) in str(error)
    for at in (first.oldest - 1, int(second.position) + 1):
        with pytest.raises(kvwal.NotInBackup):
            kvwal.restore(lived.destination, "/none", at=at, files=lived.disk)
    # Nor is it known which commit was the last one at a time in the gap.
    middle = next(time_of(commit.time_us) for commit in lived.db.history() if commit.seqno == between)
    with pytest.raises(kvwal.NotInBackup):
        kvwal.restore(lived.destination, "/none", at=middle, files=lived.disk)


def test_a_base_alone_has_a_time_as_well() -> None:
    lived = Lived(5)
    lived.live(10)
    lived.db.checkpoint()
    report = backup(lived.db.engine, lived.destination)
    time = next(time_of(commit.time_us) for commit in lived.db.history() if commit.seqno == lived.db.last_seqno)
    found = kvwal.restore(lived.destination, "/none", at=time, dry_run=True, files=lived.disk)
    assert int(found.restored) == int(report.position)


# -- where it goes --------------------------------------------------------------------------------


def test_it_is_never_made_over_anything(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db.put(b"k", b"v")
        db.backup(tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file", "s"):
        with pytest.raises(kvwal.StoreExistsError):
            kvwal.restore(tmp_path / "b", tmp_path / name)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "slash/"):
        kvwal.restore(tmp_path / "b", f"{tmp_path}/{name}")
        with kvwal.open(tmp_path / name) as db:
            assert db[b"k"] == b"v"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "empty", "file", "full", "new", "s", "slash"]


@pytest.mark.parametrize("is_dry", [True, False])
@pytest.mark.parametrize("leads_to", ["empty", "full", "nowhere", "link"])
def test_a_link_is_refused_before_anything_is_read(tmp_path: Path, leads_to: str, is_dry: bool) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db.put(b"k", b"v")
        db.backup(tmp_path / "b")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "link").symlink_to(leads_to)
    before = sorted(tmp_path.rglob("*"))
    for into in ("link", "link/"):
        for src in ("b", "none"):
            with pytest.raises(kvwal.StoreExistsError, match="symbolic link.*name a new directory"):
                kvwal.restore(tmp_path / src, f"{tmp_path}/{into}", dry_run=is_dry)
    assert sorted(tmp_path.rglob("*")) == before
    # What it is made in may be reached by one.
    (tmp_path / "around").symlink_to(tmp_path)
    kvwal.restore(tmp_path / "b", tmp_path / "around" / "new", dry_run=is_dry)
    (tmp_path / "newer.restoring").symlink_to("empty")
    if not is_dry:
        with pytest.raises(kvwal.StoreExistsError, match=r"newer\.restoring is a symbolic link.*move it"):
            kvwal.restore(tmp_path / "b", tmp_path / "newer")
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_dry_run_refuses_what_a_restore_would(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db.put(b"k", b"v")
        db.backup(tmp_path / "b")
    with pytest.raises(kvwal.StoreExistsError, match="not empty"):
        kvwal.restore(tmp_path / "b", tmp_path / "s", dry_run=True)


def test_a_foreign_directory_aside_is_left_alone() -> None:
    lived = backed_up(6, commits=5)
    lived.disk.make_directory("/r.restoring")
    directory = lived.disk.open_directory("/r.restoring")
    directory.open("mine", create=True).close()
    with pytest.raises(kvwal.StoreExistsError, match="restoring"):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    assert directory.names() == ["mine"]


@pytest.mark.parametrize(("name", "is_directory"), [("00000000000000000001.log", True), ("readers", False)])
def test_a_name_of_a_store_that_is_something_else_there_is_left_alone(name: str, is_directory: bool) -> None:
    lived = backed_up(6, commits=5)
    lived.disk.make_directory("/r.restoring")
    directory = lived.disk.open_directory("/r.restoring")
    if is_directory:
        lived.disk.make_directory(f"/r.restoring/{name}")
    else:
        directory.open(name, create=True).close()
    with pytest.raises(kvwal.StoreExistsError, match=f"holds '{name}'"):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    assert directory.names() == [name]


@pytest.mark.parametrize("again", [12, 20])
def test_what_a_follower_left_aside_is_no_obstacle(again: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lived = backed_up(7)

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(restoring._Restore, "_verified", cut_off)
        with pytest.raises(KeyboardInterrupt):
            kvwal.restore(lived.destination, "/r", at=12, files=lived.disk)
    with kvwal.follow("/r.restoring", files=lived.disk) as live:
        assert live.pinned
        report = kvwal.restore(lived.destination, "/r", at=again, files=lived.disk)
    assert report.resumed == (again == 12)
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as db:
        lived.check(db, again)
        db.checkpoint()
        db.put(b"more", b"1")
        db.checkpoint()
        assert db.verify().ok


def test_a_store_aside_that_is_none_of_a_restore_is_left_alone() -> None:
    lived = backed_up(6, commits=5)
    with kvwal.open("/r.restoring", files=lived.disk, background=False) as db:
        db.put(b"mine", b"1")
    with pytest.raises(kvwal.StoreExistsError, match="restoring"):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    with kvwal.open("/r.restoring", files=lived.disk, background=False) as db:
        assert dict(db.items()) == {b"mine": b"1"}


@pytest.mark.parametrize("stop", ["restoring-pages", "data", "r"])
def test_what_was_interrupted_goes_on_and_something_else_begins_anew(stop: str) -> None:
    lived = backed_up(7)
    lived.disk.fail("rename", path=f"/*{stop}", effect="none")
    with pytest.raises(OSError):
        kvwal.restore(lived.destination, "/r", at=20, files=lived.disk)
    lived.disk.heal()
    lived.disk.trace = []
    report = kvwal.restore(lived.destination, "/r", at=20, files=lived.disk)
    read = [each for each in lived.disk.trace if each.name == "pread" and "/base/" in each.path and each.size > 4096]
    lived.disk.trace = None
    assert report.resumed
    # The pages are not read again once they are there.
    assert stop == "restoring-pages" or not read
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as db:
        lived.check(db, 20)
    lived.disk.fail("rename", path=f"/*{stop.replace('r', 'q') if stop == 'r' else stop}", effect="none")
    with pytest.raises(OSError):
        kvwal.restore(lived.destination, "/q", at=20, files=lived.disk)
    lived.disk.heal()
    if stop != "r":
        report = kvwal.restore(lived.destination, "/q", at=30, files=lived.disk)
        assert not report.resumed
        with kvwal.open("/q", files=lived.disk, **OPTIONS) as db:
            lived.check(db, 30)


def two_copies() -> list[Lived]:
    """A store and a copy of it that went on by itself: their backups have objects of the same names."""
    first = Lived(9)
    first.live(10)
    first.db.close()
    second = Lived.__new__(Lived)
    second.__dict__.update(first.__dict__, disk=first.disk.copy())
    second.destination = DirectoryDestination("/b", files=second.disk)
    states = first.states
    for n, each in enumerate((first, second)):
        each.db, each.states = each.open(), list(states)
        for key in (b"base", b"log"):
            each.db.put(key, b"%d" % n)
            each._note({**each.states[-1][1], key: b"%d" % n}, each.states[-1][2])
            if key == b"base":
                each.db.checkpoint()
            backup(each.db.engine, each.destination)
    assert set(objects(first.destination)) == set(objects(second.destination))
    return [first, second]


@pytest.mark.parametrize("stop", ["restoring-pages", "data", "r"])
@pytest.mark.parametrize("at", ["latest", "before:12"])
def test_what_was_begun_from_another_copy_of_the_store_is_not_gone_on_with(stop: str, at: str) -> None:
    first, second = two_copies()
    first.disk.fail("rename", path=f"/*{stop}", effect="none")
    with pytest.raises(OSError):
        kvwal.restore(first.destination, "/r", at=at, files=first.disk)
    first.disk.heal()
    if stop == "r":
        with pytest.raises(kvwal.StoreExistsError, match="or of another one; move it"):
            kvwal.restore(second.destination, "/r", at=at, files=first.disk)
    else:
        report = kvwal.restore(second.destination, "/r", at=at, files=first.disk)
        assert not report.resumed
        with kvwal.open("/r", files=first.disk, **OPTIONS) as db:
            second.check(db, report.restored)


def test_what_was_restored_and_has_gone_on_is_none_of_a_restore() -> None:
    lived = backed_up(9, commits=5)
    restored(lived, into="/r.restoring").close()
    # That is as it was made, but for its name.
    assert kvwal.restore(lived.destination, "/r", files=lived.disk).resumed
    with restored(lived, into="/q.restoring") as db:
        db.put(b"more", b"1")
        db.checkpoint()
    before = sorted(lived.disk.open_directory("/q.restoring").names())
    with pytest.raises(kvwal.StoreExistsError, match="or of another one; move it"):
        kvwal.restore(lived.destination, "/q", files=lived.disk)
    assert sorted(lived.disk.open_directory("/q.restoring").names()) == before


def test_two_restores_at_once_do_not_meet() -> None:
    lived = backed_up(8, commits=5)
    lived.disk.make_directory("/r.restoring")
    directory = lived.disk.open_directory("/r.restoring")
    directory.lock(shared=False)
    with pytest.raises(kvwal.LockedError):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    directory.close()


def test_two_restores_do_not_meet_at_the_last_step() -> None:
    lived = backed_up(8, commits=5)
    lived.disk.fail("rename", path="/*r", effect="none")
    with pytest.raises(OSError):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    lived.disk.heal()
    directory = lived.disk.open_directory("/r.restoring")
    directory.lock(shared=False)
    with pytest.raises(kvwal.LockedError):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    directory.close()
    assert kvwal.restore(lived.destination, "/r", files=lived.disk).resumed


@pytest.mark.parametrize("step", ["_make", "_verified", "_name"])
@pytest.mark.parametrize("at", [20, 40])
def test_a_restore_that_comes_while_another_one_is_made_leaves_it_alone(
    step: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvwal.backup.restoring import _Restore

    lived = backed_up(8)
    come: list[int] = []

    def then_another_one(method: Any) -> Any:
        def wrapped(work: Any, *arguments: Any) -> Any:
            found = method(work, *arguments)
            if not come:
                come.append(at)
                # Where nothing is aside any more, it finds the store.
                error = kvwal.StoreExistsError if step == "_name" else kvwal.LockedError
                with pytest.raises(error):
                    kvwal.restore(lived.destination, "/r", at=at, files=lived.disk)
            return found

        return wrapped

    monkeypatch.setattr(_Restore, step, then_another_one(getattr(_Restore, step)))
    kvwal.restore(lived.destination, "/r", at=20, files=lived.disk)
    assert come
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as db:
        lived.check(db, 20)


@pytest.mark.parametrize("at", [20, 40])
def test_one_that_looked_before_another_one_ended_leaves_the_store_alone(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvwal.backup import restoring

    lived = backed_up(8)
    lived.disk.fail("rename", path="/*restoring-pages", effect="none")
    with pytest.raises(OSError):
        kvwal.restore(lived.destination, "/r", at=20, files=lived.disk)
    lived.disk.heal()
    refuse_foreign = restoring.refuse_foreign

    def another_one_first(directory: Any) -> None:
        monkeypatch.setattr(restoring, "refuse_foreign", refuse_foreign)
        refuse_foreign(directory)
        kvwal.restore(lived.destination, "/r", at=20, files=lived.disk)

    monkeypatch.setattr(restoring, "refuse_foreign", another_one_first)
    with pytest.raises(kvwal.StoreExistsError):
        kvwal.restore(lived.destination, "/r", at=at, files=lived.disk)
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as db:
        lived.check(db, 20)


def restore_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(**more: Any) -> Options:
        return Options(**more, memtable_bytes=16 << 10, segment_bytes=16 << 10)

    monkeypatch.setattr(restoring, "Options", small)


def test_more_than_fits_into_memory_is_replayed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lived = Lived(9)
    backup(lived.db.engine, lived.destination)
    with lived.db.consumer("all", start="oldest"):
        lived.live(200)
    backup(lived.db.engine, lived.destination, history=True)
    restore_with_little_memory(monkeypatch)
    report = kvwal.restore(lived.destination, "/slots", files=lived.disk)
    chain = LogReader(lived.disk.open_directory("/slots"), None).chain
    names = chain.names()
    assert len(names) > 1
    # Each segment names the one that follows it, so that one that is missing is noticed.
    assert [chain.load(name).slot.next for name in names] == [*names[1:], None]
    with kvwal.open("/slots", "r", files=lived.disk) as db:
        lived.check(db, report.restored.seqno)
    with restored(lived) as db:
        assert db.recovery.checkpoint_seqno > 100
        assert db.verify().ok
        assert len(db.engine.upkeep.consumers.segments()) > 1


def test_what_is_replayed_goes_into_the_pages_at_twice_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    lived = Lived(9, memtable_bytes=1 << 20, checkpoint_log_bytes=1 << 20, segment_bytes=1 << 20)
    backup(lived.db.engine, lived.destination)
    for n in range(300):
        lived.db.put(b"%03d" % n, bytes(500))
    backup(lived.db.engine, lived.destination)
    restore_with_little_memory(monkeypatch)
    merged: list[int] = []
    merge_into = restoring.merge_into

    def noted(pages: Any, memtable: Any, *rest: Any, **more: Any) -> Any:
        merged.append(memtable.bytes_used)
        return merge_into(pages, memtable, *rest, **more)

    monkeypatch.setattr(restoring, "merge_into", noted)
    kvwal.restore(lived.destination, "/r", files=lived.disk)
    with kvwal.open("/r", files=lived.disk, background=False) as db:
        assert dict(db) == dict(lived.db)
        assert db.recovery.checkpoint_seqno > 100
        assert db.verify().ok
    # As much as writers of an open store wait at. It is looked at behind each segment.
    assert len(merged) > 1
    assert min(merged) >= 32 << 10


# -- damage ---------------------------------------------------------------------------------------


def test_a_damaged_base_is_done_without_where_an_older_one_gives_the_same_moment() -> None:
    lived = backed_up(10, history=True)
    place, last = lived.destination, lived.db.last_seqno
    lived.db.checkpoint()
    full = backup(lived.db.engine, place, base="full")
    whole = kvwal.restore(place, "/none", dry_run=True, files=lived.disk)
    assert whole.objects == (full.base,)
    assert not whole.damaged
    size = len(place.get(full.base))
    for offset in (0, 200, 4096, 9000, size - 5000):
        disk = lived.disk.copy()
        disk.flip(f"/b/{full.base}", offset, 3)
        report = kvwal.restore(DirectoryDestination("/b", files=disk), "/r", files=disk)
        assert report.damaged == (full.base,)
        assert full.base not in report.objects
        assert report.restored == whole.restored
        assert report.commits
        with kvwal.open("/r", files=disk, background=False) as db:
            lived.check(db, last)


def test_the_newest_moment_stays_the_newest_where_it_is_damaged_and_what_is_advised_is_whole() -> None:
    lived = backed_up(10)
    place = lived.destination
    bases = sorted(name for name, _ in place.list_after("") if "/base/" in name)
    newest = max((name for name, _ in place.list_after("") if "/unit/" in name), key=lambda name: name[-23:])
    disk = lived.disk.copy()
    disk.flip(f"/b/{newest}", 300, 3)
    with pytest.raises(kvwal.CorruptionError) as caught:
        kvwal.restore(DirectoryDestination("/b", files=disk), "/r", files=disk)
    assert caught.value.file == newest
    assert "Restore an earlier moment" in str(caught.value)
    for each in bases:
        disk.flip(f"/b/{each}", 100, 3)
    with pytest.raises(kvwal.CorruptionError, match="Restore from another destination") as caught:
        kvwal.restore(DirectoryDestination("/b", files=disk), "/r", files=disk)
    assert caught.value.file in bases
    assert disk.kind("/r") is None


def test_a_flipped_bit_of_any_object_is_named_and_nothing_is_made() -> None:
    lived = backed_up(10)
    found = kvwal.restore(lived.destination, "/none", dry_run=True, files=lived.disk)
    for name, data in objects(lived.destination).items():
        if name not in (*found.objects, "kvwal-archive"):
            continue
        for offset in {*range(0, len(data), max(1, len(data) // 25)), len(data) - 40}:
            # The digest at the end of a base proves all of it, and the pages are proved one by one.
            if not 0 <= offset < len(data) or ("/base/" in name and offset >= len(data) - 32):
                continue
            disk = lived.disk.copy()
            disk.flip(f"/b/{name}" if name != "kvwal-archive" else "/b/kvwal-archive", offset, 3)
            destination = DirectoryDestination("/b", files=disk)
            try:
                kvwal.restore(destination, "/r", files=disk)
            except kvwal.CorruptionError as error:
                assert error.file == name
                assert disk.kind("/r") is None
            except (kvwal.FormatError, kvwal.BackupDestinationError, kvwal.NotInBackup):
                assert disk.kind("/r") is None
            else:
                # What an overflow value leaves of its last page is not part of it.
                with kvwal.open("/r", files=disk, background=False) as db:
                    lived.check(db, lived.db.last_seqno)


@pytest.mark.parametrize("gone", [False, True])
def test_whose_a_destination_is_is_told_by_its_objects_too(gone: bool) -> None:
    lived = backed_up(10)
    whole = lived.destination.get(IDENTITY)
    lived.destination.delete(IDENTITY)
    if not gone:
        lived.destination.put_new(IDENTITY, whole[:100] + b"?" + whole[101:])
        with pytest.raises(kvwal.CorruptionError, match="kvwal-archive: .* A restore does without it where"):
            status_of(lived.destination)
    report = kvwal.restore(lived.destination, "/r", files=lived.disk)
    assert report.damaged == (IDENTITY,)
    with kvwal.open("/r", files=lived.disk, background=False) as db:
        lived.check(db, lived.db.last_seqno)
        # Of another store nothing is put there.
        with (
            kvwal.open("/other", files=lived.disk, background=False) as other,
            pytest.raises(kvwal.BackupDestinationError, match="the destination holds the store"),
        ):
            other.backup(lived.destination)
        db.backup(lived.destination)
    assert lived.destination.get(IDENTITY) == whole
    assert status_of(lived.destination).ok


def test_a_destination_of_which_nothing_tells_whose_it_is_is_refused() -> None:
    lived = backed_up(10)
    for name in list(objects(lived.destination)):
        lived.disk.flip(f"/b/{name}", 40, 3)
    with pytest.raises(kvwal.CorruptionError, match="kvwal-archive"):
        kvwal.restore(lived.destination, "/r", files=lived.disk)


@pytest.mark.parametrize("number", range(4))
def test_with_damage_anywhere_the_moment_is_right_or_there_is_an_error(number: int, rng: Random) -> None:
    """A run of 32,016 such restores gave 3,145 that did without a damaged object, and nothing wrong."""
    lived = Lived(rng.randrange(1 << 30))
    for _ in range(3):
        lived.live(rng.randrange(5, 25))
        backup(lived.db.engine, lived.destination, history=True, base=rng.choice(("auto", "full")))
    names = [name for name, _ in lived.destination.list_after("") if "/base/" in name or "/unit/" in name]
    for _ in range(10):
        disk, at = lived.disk.copy(), rng.randrange(lived.db.last_seqno + 1)
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 2)))):
            disk.flip(f"/b/{name}", rng.randrange(len(lived.destination.get(name))), rng.randrange(8))
        try:
            report = kvwal.restore(DirectoryDestination("/b", files=disk), "/r", at=at, files=disk)
        except (kvwal.CorruptionError, kvwal.FormatError, kvwal.NotInBackup):
            assert disk.kind("/r") is None
            continue
        assert report.restored.seqno == at
        with kvwal.open("/r", files=disk, background=False) as db:
            lived.check(db, at)


def damage_the_log(
    patch: pytest.MonkeyPatch, lived: Lived, which: Callable[[Iterable[str]], str], offset: int
) -> None:
    """Flip a bit of the log that a restore to `/r` makes, once it is made: of this segment, behind its header."""
    close = CopiedLog.close

    def damaged(self: CopiedLog) -> None:
        close(self)
        there = lived.disk.open_directory("/r.restoring")
        name = which(name for name in there.names() if (numbers(name) or (0, ""))[1] == "log")
        there.close()
        lived.disk.flip(f"/r.restoring/{name}", HEADER_PAGE_BYTES + offset, 3)

    patch.setattr(CopiedLog, "close", damaged)


def test_the_log_that_was_made_is_proved_before_the_store_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    lived = backed_up(10)
    with monkeypatch.context() as patch:
        damage_the_log(patch, lived, max, 100)
        with pytest.raises(kvwal.CorruptionError):
            kvwal.restore(lived.destination, "/r", files=lived.disk)
    assert lived.disk.kind("/r") is None
    add = CopiedLog.add
    # The commit that says whence the line came is lost.
    monkeypatch.setattr(CopiedLog, "add", lambda self, commits: add(self, commits) if len(commits) > 1 else None)
    with pytest.raises(InternalError, match="is at commit"):
        kvwal.restore(lived.destination, "/other", at=30, files=lived.disk)
    assert lived.disk.kind("/other") is None


def test_without_a_backup_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(kvwal.BackupDestinationError):
        kvwal.restore(tmp_path / "none", tmp_path / "r")
    (tmp_path / "b").mkdir()
    with pytest.raises(kvwal.BackupDestinationError):
        kvwal.restore(tmp_path / "b", tmp_path / "r")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


# -- lines ----------------------------------------------------------------------------------------


def test_positions_go_on_up_to_the_fork_and_not_beyond() -> None:
    lived = backed_up(11)
    line = lived.db.position.line
    with restored(lived, 20) as db:
        own = db.position.line
        assert own != line
        assert db.engine.state.version.tree.meta.store_id == lived.db.engine.state.version.tree.meta.store_id
        changed = [change.seqno for change in db.changes(after=kvwal.Position(line, 15))]
        assert changed == [change.seqno for change in lived.db.changes(after=15) if change.seqno <= 20]
        db.put(b"new", b"1")
        for at in (21, 30):
            with pytest.raises(kvwal.FeedGap) as gap:
                db.changes(after=kvwal.Position(line, at))
            assert gap.value.forked_at == 20
            with pytest.raises(kvwal.SnapshotTooOld) as old:
                db.snapshot(at=kvwal.Position(line, at))
            assert old.value.forked_at == 20
        with pytest.raises(kvwal.FeedGap) as gap:
            db.changes(after=kvwal.Position(b"\7" * 8, 3))
        assert gap.value.forked_at == 0
        backup(db.engine, lived.destination, history=True)
    # Restored again, from behind the first fork and from before it.
    for at, fork in ((22, 20), (12, 12)):
        with restored_raw(lived, kvwal.Position(own if at > 20 else line, at), f"/again{at}") as db:
            assert [change.seqno for change in db.changes(after=kvwal.Position(line, fork))] in ([], [22])
            with pytest.raises(kvwal.FeedGap) as gap:
                db.changes(after=kvwal.Position(line, fork + 1))
            assert gap.value.forked_at == fork


def restored_raw(lived: Lived, at: Any, into: str) -> kvwal.Store:
    kvwal.restore(lived.destination, into, at=at, files=lived.disk)
    return kvwal.open(into, files=lived.disk, **OPTIONS)


def test_the_newest_line_is_restored_and_what_it_came_from_is_found() -> None:
    lived = backed_up(12)
    line = lived.db.position.line
    with restored(lived, 25) as db:
        db.put(b"other", b"line")
        backup(db.engine, lived.destination)
        own = db.position.line
        origin = origin_of(lived.destination, own)
        assert origin is not None
        assert (origin.parent, origin.fork) == (line, 25)
        assert list(ancestry(lived.destination, own)) == [(own, None), (line, 25)]
        expected = content(db)
    report = kvwal.restore(lived.destination, "/newest", files=lived.disk)
    assert report.restored.line == own
    with kvwal.open("/newest", files=lived.disk, background=False) as db:
        assert content(db) == expected
    # Up to the fork it is the line before; beyond it, that one is no longer meant unless it is named.
    assert kvwal.restore(lived.destination, "/x", at=20, dry_run=True, files=lived.disk).restored.seqno == 20
    beyond = lived.db.last_seqno
    with pytest.raises(kvwal.NotInBackup):
        kvwal.restore(lived.destination, "/x", at=beyond, dry_run=True, files=lived.disk)
    asked = kvwal.Position(line, beyond)
    assert kvwal.restore(lived.destination, "/x", at=asked, dry_run=True, files=lived.disk).restored == asked


def test_a_consumer_goes_on_after_a_restore() -> None:
    lived = Lived(13)
    lived.live(10)
    with lived.db.consumer("mailer", start="oldest") as consumer:
        batch = next(consumer)
        consumer.ack(batch)
    handled = lived.db.consumers()[0].position
    lived.live(15)
    lived.db.checkpoint()
    lived.live(3)
    report = backup(lived.db.engine, lived.destination)
    # The base has commits that the consumer has not handled.
    assert report.oldest > int(handled) + 5
    with restored(lived) as db:
        with db.consumer("mailer") as consumer:
            assert consumer.position == handled
            batch = next(consumer)
            expected = [change.seqno for change in lived.db.changes(after=handled)]
            assert [change.seqno for change in batch.changes] == expected
        for _ in range(4):
            # Its log stays, though checkpoints would let it go.
            db.put(b"more", b"x" * 9000)
            db.checkpoint()
        with db.consumer("mailer") as consumer:
            batch = next(consumer)
            assert [change.seqno for change in batch.changes][: len(expected)] == expected
            consumer.ack(batch)
        (info,) = db.consumers()
        assert info.position.line == db.position.line
        assert info.state == "stopped"
        check_store(db)


def test_a_consumer_whose_commits_the_restored_log_does_not_have_says_so() -> None:
    lived = Lived(14)
    lived.live(5)
    with lived.db.consumer("mailer"):
        pass
    lived.live(30)
    lived.db.checkpoint()
    report = backup(lived.db.engine, lived.destination)
    for name, _ in list(lived.destination.list_after("")):
        if "/unit/" in name:
            lived.destination.delete(name)
    with restored(lived, report.oldest) as db, pytest.raises(kvwal.FeedGap), db.consumer("mailer") as consumer:
        next(consumer)


def fill(db: kvwal.Store, commits: int) -> None:
    for _ in range(commits):
        db.put(b"fill", bytes(2000))


def lose_one(db: kvwal.Store) -> None:
    """A consumer that is lost."""
    with db.consumer("old", prefix=b"x", start="now", max_lag_bytes=20_000):
        db.put(b"x", b"1")
    fill(db, 40)


def lose_a_parked_commit(db: kvwal.Store) -> None:
    """A consumer that goes on, and has set aside a commit that the log has lost."""

    def refuse(txn: kvwal.Transaction, changes: Sequence[kvwal.Change]) -> None:
        raise ValueError("bad")

    with db.consumer("parker", prefix=b"x", start="now", on_error="park", max_lag_bytes=20_000) as consumer:
        db.put(b"x", b"1")
        consumer.project(refuse, timeout_s=0)
        for _ in range(20):
            fill(db, 2)
            consumer.project(refuse, timeout_s=0)


@pytest.mark.parametrize("lose", [lose_one, lose_a_parked_commit])
def test_what_one_consumer_has_lost_keeps_nothing_from_another(lose: Callable[[kvwal.Store], None]) -> None:
    lived = Lived(13, keep_history_s=0)
    db = lived.db
    lose(db)
    db.checkpoint()
    db.checkpoint()
    with db.consumer("mailer", prefix=b"order"):
        db.put(b"order", b"tea")
    fill(db, 40)
    db.checkpoint()
    with pytest.raises(kvwal.FeedGap):
        db.changes(after=0)
    backup(db.engine, lived.destination)
    kvwal.restore(lived.destination, "/r", files=lived.disk)
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as back:
        assert next(each.state for each in back.consumers() if each.name == "mailer") == "stopped"
        with back.consumer("mailer", prefix=b"order") as consumer:
            assert [change.key for change in next(consumer).changes] == [b"order"]


@pytest.mark.parametrize("earlier", [False, True])
def test_a_consumer_made_behind_the_base_reads_what_is_before_it(earlier: bool) -> None:
    lived = Lived(13)
    db = lived.db
    db.put(b"order", b"1")
    db.checkpoint()
    if earlier:
        backup(db.engine, lived.destination)
    db.put(b"order", b"2")
    with db.consumer("mailer", prefix=b"order", start="oldest"):
        db.put(b"order", b"3")
    told: list[tuple[int, int]] = []
    report = backup(db.engine, lived.destination)
    assert report.oldest == 1
    kvwal.restore(lived.destination, "/r", files=lived.disk, progress=lambda *each: told.append(each))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as back, back.consumer("mailer", prefix=b"order") as consumer:
        assert [change.value for change in next(consumer).changes] == [b"1", b"2", b"3"]
    # At a moment before there was the consumer.
    kvwal.restore(lived.destination, "/before", at=2, files=lived.disk)
    with kvwal.open("/before", files=lived.disk, **OPTIONS) as back:
        assert back.consumers() == []
        assert back[b"order"] == b"2"
        check_store(back)


def test_a_full_disk_that_progress_met_is_not_said_to_be_that_of_the_restored_store() -> None:
    lived = backed_up(15, commits=6)
    for full in (OSError(errno.ENOSPC, "the log of the user"), kvwal.DiskFullError("another store")):

        def tell(done: int, total: int, full: Exception = full) -> None:
            raise full

        with pytest.raises(type(full)) as caught:
            kvwal.restore(lived.destination, "/r", files=lived.disk, progress=tell)
        assert caught.value is full
    restored(lived).close()


def remove_one(db: kvwal.Store) -> None:
    with db.consumer("other", prefix=b"order", start="oldest"):
        pass
    assert db.remove_consumer("other")


def handle_all(db: kvwal.Store) -> None:
    with db.consumer("other", prefix=b"order", start="oldest") as consumer:
        consumer.project(lambda txn, changes: None, timeout_s=0)


def park_and_remove(db: kvwal.Store) -> None:
    def refuse(txn: kvwal.Transaction, changes: Sequence[kvwal.Change]) -> None:
        raise ValueError("bad")

    with db.consumer("other", prefix=b"order", start="oldest", on_error="park") as consumer:
        for _ in range(20):
            consumer.project(refuse, timeout_s=0)
    assert [len(each.parked) for each in db.consumers()] == [1]
    assert db.remove_consumer("other")


@pytest.mark.parametrize("handled", [remove_one, handle_all, park_and_remove])
def test_a_consumer_with_nothing_left_to_handle_needs_no_units_before_the_base(
    handled: Callable[[kvwal.Store], None],
) -> None:
    lived = Lived(13)
    db = lived.db
    db.put(b"order", b"1")
    fill(db, 40)
    db.checkpoint()
    base = db.last_seqno
    handled(db)
    report = backup(db.engine, lived.destination)
    assert report.commits == report.position - base > 0
    # Nor does a restore read those that are there.
    with_all = DirectoryDestination("/all", files=lived.disk)
    backup(db.engine, with_all, history=True)
    backup(db.engine, with_all)
    assert kvwal.restore(with_all, "/r", files=lived.disk).commits == report.commits
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as back:
        assert [each.state for each in back.consumers()] == ["stopped"] * (handled is handle_all)


def test_what_was_handled_since_is_there_for_the_moments_of_the_window_alone() -> None:
    lived = Lived(13, keep_history_bytes=32 << 10)
    db = lived.db
    with db.consumer("mailer", prefix=b"order"):
        db.put(b"order", b"tea")
    fill(db, 40)
    db.checkpoint()
    base = db.last_seqno
    with db.consumer("mailer", prefix=b"order") as consumer:
        consumer.project(lambda txn, changes: None, timeout_s=0)
    assert backup(db.engine, lived.destination).commits == db.last_seqno - base
    report = backup(db.engine, lived.destination, history=True)
    kvwal.restore(lived.destination, "/r", at=int(report.oldest), files=lived.disk)
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as back, back.consumer("mailer", prefix=b"order") as consumer:
        assert [change.value for change in next(consumer).changes] == [b"tea"]


@pytest.mark.parametrize("keep", [{"keep_history_s": 0}, {"keep_history_bytes": 32 << 10}])
def test_with_the_window_what_consumers_have_not_handled_is_there_too(keep: dict[str, Any]) -> None:
    lived = Lived(13, **keep)
    db = lived.db
    with db.consumer("mailer", prefix=b"order"):
        db.put(b"order", b"tea")
    fill(db, 40)
    db.checkpoint()
    assert db.window.oldest > 2
    report = backup(db.engine, lived.destination, history=True)
    for at in {int(report.oldest), int(report.position)}:
        kvwal.restore(lived.destination, f"/{at}", at=at, files=lived.disk)
        with kvwal.open(f"/{at}", files=lived.disk, **OPTIONS) as back:
            with back.consumer("mailer", prefix=b"order") as consumer:
                assert [change.value for change in next(consumer).changes] == [b"tea"]
            check_store(back)


def test_units_that_do_not_connect_lose_only_the_consumers_that_need_them() -> None:
    lived = Lived(13)
    db = lived.db
    for name in ("first", "second"):
        with db.consumer(name, prefix=b"order"):
            db.put(b"order", name.encode())
        backup(db.engine, lived.destination)
    db.checkpoint()
    backup(db.engine, lived.destination)
    # The first unit is gone, so the second one is where it can begin.
    units = [name for name in objects(lived.destination) if "/unit/" in name]
    assert len(units) > 1
    lived.destination.delete(min(units))
    kvwal.restore(lived.destination, "/r", files=lived.disk)
    with kvwal.open("/r", files=lived.disk, **OPTIONS) as back:
        assert {each.name: each.state for each in back.consumers()} == {"first": "lost", "second": "stopped"}
        with back.consumer("second", prefix=b"order") as consumer:
            assert [change.value for change in next(consumer).changes] == [b"second"]


# What comes while a generator is collected is swallowed by the interpreter.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <generator:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("stride", [1500, pytest.param(5, marks=pytest.mark.slow)])
def test_a_restore_may_be_interrupted_anywhere(stride: int) -> None:
    lived = backed_up(15, commits=6)
    step, ended = 1, False
    while not ended:
        disk = lived.disk.copy()
        destination = DirectoryDestination("/b", files=disk)

        def run(disk: Any = disk, destination: Any = destination) -> object:
            return kvwal.restore(destination, "/r", files=disk)

        ended = interrupted_at(step, run) is None
        # What an interruption leaves open, the collector closes; on this disk the end of the process does.
        disk.kill()
        if disk.kind("/r") is None:
            kvwal.restore(DirectoryDestination("/b", files=disk), "/r", files=disk)
        with kvwal.open("/r", files=disk, background=False) as db:
            lived.check(db, lived.db.last_seqno)
        step += stride


INTERRUPTED = """
    import random, shutil, signal, sys, time
    import kvwal

    path, times = sys.argv[1], int(sys.argv[2])
    with kvwal.open(path + "/s", durability="os", background=False) as db:
        db.backup(path + "/b")
        for n in range(60):
            db.put(b"%d" % n, b"x" * 100)
            db.sync()
            db.backup(path + "/b")

    def restore():
        kvwal.restore(path + "/b", path + "/r")

    def clear():
        # By itself: where it is interrupted, it closes a descriptor twice.
        shutil.rmtree(path + "/r", ignore_errors=True)

    armed = False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    restore()
    clear()
    began_s = time.monotonic()
    restore()
    took_s = time.monotonic() - began_s
    interrupted = 0
    for n in range(times):
        clear()
        try:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.Random(n).uniform(0.0005, took_s))
                restore()
            finally:
                armed = False
        except KeyboardInterrupt:
            interrupted += 1
        # From where it is not armed on, one that comes late does nothing.
        signal.setitimer(signal.ITIMER_REAL, 0)
    clear()
    restore()
    with kvwal.open(path + "/r") as db:
        assert len(db) == 60, len(db)
    assert interrupted > times / 4, interrupted
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no interval timers")
@pytest.mark.parametrize("times", [100, pytest.param(3000, marks=[pytest.mark.long, pytest.mark.slow])])
def test_a_signal_that_raises_leaves_no_restore_waiting(tmp_path: Path, times: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path), str(times)]
    assert subprocess.run(command, timeout=60 + times, check=False).returncode == 0


def with_a_consumer() -> Lived:
    """A backup of a store whose consumer still reads the log before the newest base."""
    lived = Lived(3)
    with lived.db.consumer("late", start="oldest"):
        for n in range(300):
            lived.db.put(b"%03d" % n, bytes(100))
        lived.db.checkpoint()
    backup(lived.db.engine, lived.destination)
    return lived


def test_the_log_before_the_base_is_proved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lived = with_a_consumer()
    damage_the_log(monkeypatch, lived, min, 1000)
    with pytest.raises(kvwal.CorruptionError):
        kvwal.restore(lived.destination, "/r", files=lived.disk)
    assert lived.disk.kind("/r") is None


def test_what_consumers_need_is_in_the_report() -> None:
    lived = with_a_consumer()
    told: list[tuple[int, int]] = []
    report = kvwal.restore(lived.destination, "/r", files=lived.disk, progress=lambda *each: told.append(each))
    (unit,) = (name for name in report.objects if "/unit/" in name)
    there = objects(lived.destination)
    assert report.commits == lived.db.last_seqno
    assert report.bytes == told[-1][0] == told[-1][1] == sum(len(there[name]) for name in report.objects)
    assert kvwal.restore(lived.destination, "/no", files=lived.disk, dry_run=True).objects == report.objects[:1]
    assert unit in there


def test_progress_comes_to_its_end_with_the_last_unit() -> None:
    lived = Lived(4, memtable_bytes=1 << 20, checkpoint_log_bytes=1 << 20, segment_bytes=1 << 20)
    for _ in range(8):
        lived.db.put(b"key", bytes(5000))
        backup(lived.db.engine, lived.destination)
    told: list[tuple[int, int]] = []
    report = kvwal.restore(lived.destination, "/r", files=lived.disk, progress=lambda *each: told.append(each))
    assert len(report.objects) == 9
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert [done == report.bytes for done, _ in told] == [False] * (len(told) - 1) + [True]
    assert {total for _, total in told} == {report.bytes}


def test_a_full_disk_is_said_in_every_step_and_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the log is brought into the pages, too.
    monkeypatch.setattr(restoring, "STALLED_AT", 0)
    monkeypatch.setattr(restoring, "Options", partial(Options, memtable_bytes=16 << 10))
    # No commit makes a checkpoint: most of the log is behind the pages.
    lived = Lived(3, memtable_bytes=8 << 20, checkpoint_log_bytes=1 << 30, segment_bytes=64 << 10)
    lived.live(120)
    lived.db.backup(lived.destination)
    for _ in range(200):
        lived.commit()
    lived.db.backup(lived.destination, history=True)
    advice = "there is no space to restore to /r; free some, and call it again to go on"
    steps: set[str] = set()
    # One that has what fits from the call before, and one that begins anew.
    disk, fresh = SimulatedDisk(capacity=0), SimulatedDisk(capacity=0)
    report = None
    while report is None:
        for each in (fresh, disk):
            try:
                report = kvwal.restore(lived.destination, "/r", files=each)
            except kvwal.DiskFullError as full:
                report = None
                assert str(full) == advice
                assert full.__cause__ is not None
                steps.update(frame.name for frame in traceback.extract_tb(full.__cause__.__traceback__))
        capacity, fresh = disk.capacity, SimulatedDisk()
        assert capacity is not None
        disk.capacity = fresh.capacity = capacity + (8 << 10)
    assert {"begin", "_write_pages", "_write_log", "_replay"} <= steps, steps
    assert report.resumed
    with kvwal.open("/r", files=disk, **OPTIONS) as db:
        lived.check(db, report.restored)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files there")
def test_a_restore_leaves_no_file_open(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv", background=False) as db:
        db[b"a"] = b"1"
        db.checkpoint()
        db[b"b"] = b"1"
        db.backup(tmp_path / "b")

    def held() -> list[str]:
        links = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
        found = [os.readlink(each) for each in links if os.path.islink(each)]
        return [each for each in found if each.startswith(str(tmp_path / "new"))]

    gc.disable()
    try:
        kvwal.restore(tmp_path / "b", tmp_path / "new")
        assert held() == []
    finally:
        gc.enable()
