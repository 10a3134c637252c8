"""An open directory stays the one that was opened, whatever becomes of the path that led to it."""

from __future__ import annotations

import errno
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvwal.errors import LockedError, StoreRemovedError
from kvwal.files import Directory, opened_again
from kvwal.files import file as module
from kvwal.files.directory import SystemDirectory


@pytest.fixture(params=[True, False], ids=["by descriptor", "by path"])
def opened(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Directory:
    """`store` below the working directory, opened by its relative path."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("store")
    return SystemDirectory("store", by_descriptor=request.param)


def fill(directory: Directory, name: str, data: bytes) -> None:
    file = directory.open(name, create=True)
    file.pwrite(data, 0)
    file.close()


def test_names_are_those_of_the_directory_that_was_opened_after_a_change_of_the_working_directory(
    opened: Directory, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere" / "store").mkdir(parents=True)
    os.chdir(tmp_path / "elsewhere")
    fill(opened, "a", b"1")
    opened.rename("a", "b")
    assert opened.names() == ["b"]
    assert opened.kind("b") == "file"
    assert opened.kind("a") is None
    opened.sync()
    opened.sync_parent()
    assert opened.open("b").pread(10, 0) == b"1"
    assert os.listdir(tmp_path / "elsewhere" / "store") == []
    assert os.listdir(tmp_path / "store") == ["b"]
    opened.unlink("b")
    assert os.listdir(tmp_path / "store") == []
    opened.close()


def test_a_directory_is_opened_again_whatever_its_path_leads_to(opened: Directory, tmp_path: Path) -> None:
    fill(opened, "a", b"1")
    (tmp_path / "elsewhere" / "store").mkdir(parents=True)
    os.chdir(tmp_path / "elsewhere")
    again = opened_again(opened)
    assert (again, again.path, again.names()) == (opened, "store", ["a"])
    # Each has a lock of its own.
    again.lock(shared=False)
    with pytest.raises(LockedError):
        opened.lock(shared=True)
    again.close()
    opened.lock(shared=False)
    with pytest.raises(OSError, match="closed"):
        opened_again(again)


def test_a_file_is_the_same_whatever_its_name_and_another_one_in_its_place_is_not(opened: Directory) -> None:
    fill(opened, "f", b"1")
    file = opened.open("f")
    assert file.identity() == opened.open("f").identity()
    opened.rename("f", "g")
    assert file.identity() == opened.open("g").identity()
    fill(opened, "f", b"1")
    opened.rename("f", "g")
    assert file.identity() != opened.open("g").identity()
    opened.close()


@pytest.mark.parametrize("change", ["create", "rename", "rename to a new name", "unlink"])
def test_nothing_is_changed_in_a_directory_that_took_its_place(opened: Directory, tmp_path: Path, change: str) -> None:
    fill(opened, "mine", b"1")
    os.rename(tmp_path / "store", tmp_path / "moved")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").write_bytes(b"theirs")
    try:
        if change == "create":
            opened.open("new", create=True).close()
        elif change == "rename":
            opened.rename("mine", "new")
        elif change == "rename to a new name":
            opened.rename("mine", "new", replace=False)
        else:
            opened.unlink("mine")
    except StoreRemovedError as error:
        assert "moved" in str(error)
    assert os.listdir(tmp_path / "store") == ["mine"]
    assert (tmp_path / "store" / "mine").read_bytes() == b"theirs"
    opened.close()


@pytest.mark.parametrize("by_descriptor", [True, False])
def test_a_link_that_is_switched_makes_no_difference(tmp_path: Path, by_descriptor: bool) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "one", target_is_directory=True)
    directory = SystemDirectory(str(tmp_path / "link"), by_descriptor=by_descriptor)
    directory.lock(shared=False)
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "two", target_is_directory=True)
    fill(directory, "a", b"1")
    directory.close()
    assert (tmp_path / "one" / "a").read_bytes() == b"1"
    assert os.listdir(tmp_path / "two") == []


def test_what_took_its_place_is_not_read_either(opened: Directory, tmp_path: Path) -> None:
    fill(opened, "mine", b"1")
    os.rename(tmp_path / "store", tmp_path / "moved")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "theirs").write_bytes(b"theirs")
    for look in (lambda: opened.open("theirs"), lambda: opened.open("theirs", write=True)):
        with pytest.raises((StoreRemovedError, FileNotFoundError)):
            look()
    try:
        assert opened.kind("theirs") is None
        assert opened.names() == ["mine"]
        opened.sync()
    except StoreRemovedError as error:
        assert "moved" in str(error)
    opened.close()


@pytest.mark.parametrize("flush", ["sync", "datasync"])
def test_a_file_that_is_removed_while_it_is_flushed_was_not_flushed(
    opened: Directory, monkeypatch: pytest.MonkeyPatch, flush: str
) -> None:
    name = {"sync": "sync", "datasync": "_datasync"}[flush]
    system_call = getattr(module, name)

    def remove_and_flush(fd: int) -> None:
        opened.unlink("a")
        system_call(fd)

    file = opened.open("a", create=True)
    getattr(file, flush)()
    # By then it is time to look again.
    time.sleep(2 * module._LOOK_EVERY_S)
    monkeypatch.setattr(module, name, remove_and_flush)
    with pytest.raises(StoreRemovedError):
        getattr(file, flush)()
    file.close()
    opened.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only there it is more than nothing")
@pytest.mark.parametrize("failing", [False, True])
def test_a_bulk_file_begins_to_be_written_while_it_is_made(
    opened: Directory, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    advised: list[tuple[int, int, int]] = []
    advise = os.posix_fadvise

    def noted(fd: int, *advice: int) -> None:
        advised.append(advice)  # type: ignore[arg-type]  # there are three
        if failing:
            raise OSError(errno.EINVAL, "there is no such advice here")
        advise(fd, *advice)

    monkeypatch.setattr(os, "posix_fadvise", noted)
    chunks = [bytes([n]) * 3_000_000 for n in range(5)]
    for bulk in (False, True):
        file = opened.open(f"bulk {bulk}", create=True, bulk=bulk)
        for n, chunk in enumerate(chunks):
            file.pwrite(chunk, n * 3_000_000)
        assert file.pread(16_000_000, 0) == b"".join(chunks)
        file.close()
        assert bool(advised) == bulk
    assert advised == [(0, 6_000_000, os.POSIX_FADV_DONTNEED), (6_000_000, 6_000_000, os.POSIX_FADV_DONTNEED)]
    opened.close()


def test_threads_that_list_a_directory_at_once_each_see_all_of_it(opened: Directory) -> None:
    for number in range(300):
        opened.open(f"{number:03}", create=True).close()
    expected = sorted(opened.names())
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(lambda _: sorted(opened.names()), range(2000)))
    opened.close()


def test_flushes_one_behind_the_other_look_for_the_name_once(
    opened: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look behind each flush would take an eighth of a durable put."""
    looks: list[str] = []
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 3600.0)
    file = opened.open("a", create=True)
    monkeypatch.setattr(type(file), "_refuse_without_name", lambda self: looks.append("look"))
    for _ in range(3):
        file.datasync()
    assert looks == ["look"]
    file.sync()
    assert looks == ["look", "look"], "a flush of the size as well comes seldom, and always looks"
    file.close()
    opened.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing but a stat can tell")
@pytest.mark.parametrize("flush", ["sync", "datasync"])
def test_a_flush_of_a_file_that_is_there_is_not_followed_by_a_stat(
    opened: Directory, monkeypatch: pytest.MonkeyPatch, flush: str
) -> None:
    """It would make the next flush write one block more."""
    file = opened.open("a", create=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: pytest.fail("a stat"))
        getattr(file, flush)()
    file.close()
    opened.close()


def test_where_the_name_of_a_descriptor_cannot_be_read_a_removed_file_is_noticed_all_the_same(
    opened: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> str:
        raise FileNotFoundError(path)

    file = opened.open("a", create=True)
    monkeypatch.setattr(os, "readlink", refuse)
    file.sync()
    opened.unlink("a")
    with pytest.raises(StoreRemovedError):
        file.sync()
    file.close()
    opened.close()


def test_a_directory_that_was_moved_goes_on_by_its_descriptor(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    directory = SystemDirectory(str(tmp_path / "store"), by_descriptor=True)
    os.rename(tmp_path / "store", tmp_path / "moved")
    fill(directory, "a", b"1")
    assert (tmp_path / "moved" / "a").read_bytes() == b"1"
    directory.close()


def test_a_closed_directory_reaches_nothing(opened: Directory, tmp_path: Path) -> None:
    fill(opened, "a", b"1")
    opened.close()
    opened.close()
    for call in (opened.names, lambda: opened.kind("a"), lambda: opened.open("a"), lambda: opened.unlink("a")):
        with pytest.raises(OSError, match="closed"):
            call()
    assert os.listdir(tmp_path / "store") == ["a"]


def test_a_name_that_is_a_link_is_not_followed(opened: Directory, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"v")
    (tmp_path / "store" / "a").symlink_to(tmp_path / "victim")
    assert opened.kind("a") == "other"
    with pytest.raises(OSError, match="link"):
        opened.open("a", write=True)
    with pytest.raises(FileExistsError):
        opened.open("a", create=True)
    opened.close()


def test_a_rename_replaces_only_what_it_may(opened: Directory) -> None:
    fill(opened, "a", b"1")
    fill(opened, "taken", b"2")
    with pytest.raises(FileExistsError):
        opened.rename("a", "taken", replace=False)
    with pytest.raises(FileNotFoundError):
        opened.rename("none", "b", replace=False)
    assert opened.open("taken").pread(9, 0) == b"2"
    opened.rename("a", "b", replace=False)
    assert sorted(opened.names()) == ["b", "taken"]
    opened.rename("b", "taken")
    assert opened.names() == ["taken"]
    assert opened.open("taken").pread(9, 0) == b"1"
