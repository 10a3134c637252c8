"""A store is its directory, not the path that led to it: whatever becomes of the path, no other store is changed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY

import kvwal
from kvwal.engine.create import has_writer, locked_by_writer, open_directory
from kvwal.errors import FormatError, LockedError, PoisonedError, StoreNotFoundError, StoreRemovedError, SystemCallError
from kvwal.files import system_files
from kvwal.options import Options
from kvwal.testing import SimulatedDisk

SETTINGS: dict[str, Any] = {**TINY, "background": False}
# After this time a flush looks again whether its file still has a name; a multiple of `_LOOK_EVERY_S`.
LOOK_S = 0.02


def fill(db: kvwal.Store, first: int, count: int = 60) -> dict[bytes, bytes]:
    """So much that the log rolls several times, with a checkpoint, so that files are made, renamed and removed."""
    written = {b"%05d" % number: b"%d " % number * 100 for number in range(first, first + count)}
    for key, value in written.items():
        db[key] = value
    db.checkpoint()
    return written


def contents(path: Path, **options: Any) -> dict[bytes, bytes]:
    with kvwal.open(path, "r", **options) as db:
        assert db.verify().ok
        return dict(db)


def files_of(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def theirs(path: Path) -> dict[str, bytes]:
    """A store of another program; what is in its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with kvwal.open(path, **SETTINGS) as db:
        db[b"theirs"] = b"1"
    return files_of(path)


@pytest.mark.parametrize("there", ["nothing", "a store"])
def test_a_relative_path_means_the_directory_of_the_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    before = theirs(tmp_path / "two" / "a.kv") if there == "a store" else None
    monkeypatch.chdir(tmp_path / "one")
    with kvwal.open("a.kv", **SETTINGS) as db:
        expected = fill(db, 0)
        os.chdir(tmp_path / "two")
        expected |= fill(db, 100)
        assert [record.seqno for record in db.history(after=db.last_seqno - 1)] == [db.last_seqno]
        assert db.path == "a.kv"
    assert contents(tmp_path / "one" / "a.kv") == expected
    if before is None:
        assert os.listdir(tmp_path / "two") == []
    else:
        assert files_of(tmp_path / "two" / "a.kv") == before


@pytest.mark.parametrize("there", ["nothing", "a store", "a store in use"])
def test_the_writer_that_is_looked_for_is_that_of_the_directory_that_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """Another thread may change the working directory between the two."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    options = Options(files=system_files())
    with ExitStack() as stack:
        ours = stack.enter_context(kvwal.open("a.kv", **SETTINGS))
        directory, _ = open_directory("a.kv", "r", options)
        stack.callback(directory.close)
        os.chdir(tmp_path / "two")
        if there == "a store":
            theirs(tmp_path / "two" / "a.kv")
        elif there == "a store in use":
            stack.enter_context(kvwal.open("a.kv", **SETTINGS))
        found = locked_by_writer(directory, options)
        assert isinstance(found, LockedError)
        assert found.own
        ours.close()
        assert not has_writer(directory, options)


def test_a_working_directory_that_was_removed_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "kept").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    with kvwal.open("../kept/a.kv", **SETTINGS) as db:
        os.rmdir(tmp_path / "gone")
        expected = fill(db, 0)
    with pytest.raises(StoreNotFoundError):
        kvwal.open("a.kv")
    assert contents(tmp_path / "kept" / "a.kv") == expected


@pytest.mark.parametrize("then", ["nothing", "an empty directory", "a store"])
def test_a_store_that_is_moved_goes_on_where_it_is(tmp_path: Path, then: str) -> None:
    with kvwal.open(tmp_path / "a.kv", **SETTINGS) as db:
        expected = fill(db, 0)
        os.rename(tmp_path / "a.kv", tmp_path / "moved.kv")
        before: dict[str, bytes] | None = None
        if then == "an empty directory":
            (tmp_path / "a.kv").mkdir()
        elif then == "a store":
            before = theirs(tmp_path / "a.kv")
        expected |= fill(db, 100)
        with pytest.raises(LockedError):
            kvwal.open(tmp_path / "moved.kv")
    assert contents(tmp_path / "moved.kv") == expected
    if then == "nothing":
        assert not (tmp_path / "a.kv").exists()
    else:
        assert files_of(tmp_path / "a.kv") == (before or {})


@pytest.mark.parametrize("what", ["its own link", "a link on the way"])
def test_a_link_that_is_switched_leads_nowhere_else(tmp_path: Path, what: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    before = theirs(tmp_path / "two" / "a.kv")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one", target_is_directory=True)
    path = link / "a.kv"
    if what == "its own link":
        kvwal.open(tmp_path / "one" / "a.kv").close()
        link.unlink()
        link.symlink_to(tmp_path / "one" / "a.kv", target_is_directory=True)
        path = link
    with kvwal.open(path, **SETTINGS) as db:
        expected = fill(db, 0)
        link.unlink()
        link.symlink_to(tmp_path / "two" / ("a.kv" if what == "its own link" else ""), target_is_directory=True)
        expected |= fill(db, 100)
    assert contents(tmp_path / "one" / "a.kv") == expected
    assert files_of(tmp_path / "two" / "a.kv") == before


@pytest.mark.parametrize("then", ["nothing", "an empty directory", "a store"])
def test_a_store_that_is_removed_acknowledges_nothing_more(tmp_path: Path, then: str) -> None:
    db = kvwal.open(tmp_path / "a.kv", **SETTINGS)
    fill(db, 0)
    db[b"a"] = b"1"
    shutil.rmtree(tmp_path / "a.kv")
    before: dict[str, bytes] = {}
    if then == "an empty directory":
        (tmp_path / "a.kv").mkdir()
    elif then == "a store":
        before = theirs(tmp_path / "a.kv")
    time.sleep(LOOK_S)
    with pytest.raises((StoreRemovedError, PoisonedError), match="removed"):
        db[b"b"] = b"2"
    assert db[b"a"] == b"1", "reads go on"
    db.close()
    if then == "nothing":
        assert not (tmp_path / "a.kv").exists()
    else:
        assert files_of(tmp_path / "a.kv") == before


def test_a_store_without_flushes_notices_its_removal_when_the_log_needs_a_file(tmp_path: Path) -> None:
    db = kvwal.open(tmp_path / "a.kv", durability="os", **SETTINGS)
    db[b"a"] = b"1"
    shutil.rmtree(tmp_path / "a.kv")
    with pytest.raises((StoreRemovedError, PoisonedError), match="removed"):
        fill(db, 0, 1000)
    db.close()
    assert not (tmp_path / "a.kv").exists()


@pytest.mark.parametrize("name", ["data", "the newest segment"])
def test_a_file_that_is_replaced_while_it_is_open_is_noticed_before_the_log_lets_go_of_anything(
    tmp_path: Path, name: str
) -> None:
    """A restore over a running store: pages written into the file without a name would be all that is left."""
    db = kvwal.open(tmp_path / "a.kv", **SETTINGS)
    db[b"a"] = b"1"
    db[b"b"] = b"2"
    victim = tmp_path / "a.kv" / "data" if name == "data" else max((tmp_path / "a.kv").glob("*.log"))
    shutil.copy(victim, tmp_path / "copy")
    os.replace(tmp_path / "copy", victim)
    time.sleep(LOOK_S)
    with pytest.raises((StoreRemovedError, PoisonedError), match="removed"):
        if name == "data":
            db.checkpoint()
        db[b"c"] = b"3"
    db.close()
    assert contents(tmp_path / "a.kv") == {b"a": b"1", b"b": b"2"}


def test_one_directory_by_many_paths_is_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a.kv", target_is_directory=True)
    (tmp_path / "other").mkdir()
    with kvwal.open("a.kv") as db:
        db[b"a"] = b"1"
        for path in (tmp_path / "a.kv", "./a.kv/", "other/../a.kv", "link", os.fsencode(tmp_path / "a.kv")):
            with pytest.raises(LockedError, match="already open in this process"):
                kvwal.open(path)
    with kvwal.open("link") as db:
        assert db[b"a"] == b"1"


def test_a_reader_goes_on_in_a_store_that_is_moved(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **SETTINGS) as db:
        expected = fill(db, 0)
    with kvwal.open(tmp_path / "a.kv", "r", **SETTINGS) as db:
        os.rename(tmp_path / "a.kv", tmp_path / "moved.kv")
        theirs(tmp_path / "a.kv")
        assert dict(db) == expected
        assert len(list(db.history(after=db.last_seqno - 3))) == 3
        assert db.verify().ok


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: os.mkdir(path)], ids=["fifo", "directory"])
@pytest.mark.parametrize("name", ["data", "lock", "reserve", "spare.tmp", "data.tmp", "erasing"])
@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
def test_what_is_no_file_under_a_name_of_ours_never_keeps_an_open_waiting(
    tmp_path: Path, make: Callable[[Path], None], name: str, flag: Any
) -> None:
    path = tmp_path / "a.kv"
    kvwal.open(path, **SETTINGS).close()
    (path / name).unlink(missing_ok=True)
    make(path / name)
    try:
        with kvwal.open(path, flag, **SETTINGS) as db:
            assert dict(db) == {}
    except kvwal.Error:
        pass


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for flag in ("r", "w", "c", "n"):
        with pytest.raises((StoreNotFoundError, FormatError)):
            kvwal.open(tmp_path / "link", flag)  # type: ignore[arg-type]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(kvwal.Error):
        kvwal.open(tmp_path / "loop")


# -- the same on the simulated disk ------------------------------------------------------------------


def made(disk: SimulatedDisk, path: str) -> kvwal.Store:
    return kvwal.open(path, files=disk, **SETTINGS)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_what_is_no_file_in_the_place_of_a_sealed_segment_is_told_by_an_error_of_kvwal(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, **SETTINGS) as db:
        expected = fill(db, 0)
    oldest = min(path.glob("*.log"))
    oldest.unlink()
    make(oldest)
    with kvwal.open(path, "r", **SETTINGS) as db:
        assert dict(db) == expected
        assert [finding.file for finding in db.verify().problems][:1] == [oldest.name]
        for read in (
            lambda: list(db.versions(b"00000")),
            lambda: list(db.changes()),
            lambda: list(db.commits()),
            lambda: list(db.diff(5, 20)),
            lambda: dict(db.snapshot(at=5)),
        ):
            with pytest.raises(SystemCallError, match="is where a file should be") as caught:
                read()
            assert caught.value.filename == str(oldest)


def test_the_simulated_disk_moves_a_directory_under_an_open_store() -> None:
    disk = SimulatedDisk(seed=1)
    db = made(disk, "/a")
    expected = fill(db, 0)
    disk.move("/a", "/b")
    with made(disk, "/a") as other:
        other[b"theirs"] = b"1"
    expected |= fill(db, 100)
    db.close()
    for path, content in (("/b", expected), ("/a", {b"theirs": b"1"})):
        with kvwal.open(path, "r", files=disk.crash(), **SETTINGS) as found:
            assert dict(found) == content


@pytest.mark.parametrize("again", [False, True])
def test_the_simulated_disk_removes_a_directory_under_an_open_store(again: bool) -> None:
    disk = SimulatedDisk(seed=1)
    db = made(disk, "/a")
    db[b"a"] = b"1"
    disk.remove("/a")
    if again:
        made(disk, "/a").close()
        before = disk.fingerprint()
    with pytest.raises((StoreRemovedError, PoisonedError), match="removed"):
        db[b"b"] = b"2"
    db.close()
    if again:
        assert disk.fingerprint() == before
    else:
        assert disk.kind("/a") is None
