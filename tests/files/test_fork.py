"""A process is known from its children, also from those that the interpreter did not make."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvwal
from kvwal.errors import ForkedError, LockedError
from kvwal.files import fork as module
from kvwal.files.directory import SystemDirectory

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


def without_hooks() -> int:
    """As a server written in C forks its workers."""
    pid: int = ctypes.PyDLL(None).fork()
    return pid


def said_by_child(fork: Callable[[], int], work: Callable[[], object]) -> str:
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            os.write(writing, str(work()).encode())
        except BaseException as error:  # noqa: BLE001 - the parent looks at it
            os.write(writing, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    os.waitpid(pid, 0)
    return said


FORKS = pytest.mark.parametrize("fork", [os.fork, without_hooks], ids=["fork", "without hooks"])


@FORKS
@pytest.mark.parametrize("make", [module._new, module._ByProcessId], ids=["page", "process id"])
def test_a_mark_is_true_in_its_own_process_only(fork: Callable[[], int], make: Callable[[], Any]) -> None:
    mark = make()
    assert mark[0]
    assert said_by_child(fork, lambda: int(mark[0])) == "0"
    assert mark[0]


@FORKS
def test_a_child_has_a_mark_of_its_own(fork: Callable[[], int]) -> None:
    mark = module.birthmark()
    assert mark is module.birthmark()
    assert said_by_child(fork, lambda: (int(mark[0]), int(module.birthmark()[0]))) == "(0, 1)"


@FORKS
@pytest.mark.parametrize(
    "name", ["pwrite", "pwrite_all", "pread", "datasync", "sync", "allocate", "truncate", "create", "unlink", "names"]
)
def test_nothing_reaches_the_system_through_what_a_child_inherited(
    fork: Callable[[], int], name: str, tmp_path: Path
) -> None:
    directory = SystemDirectory(str(tmp_path))
    file = directory.open("f", create=True)
    file.pwrite(b"mine", 0)
    calls: dict[str, Callable[[], object]] = {
        "pwrite": lambda: file.pwrite(b"x", 0),
        "pwrite_all": lambda: file.pwrite_all([b"x"], 0),
        "pread": lambda: file.pread(1, 0),
        "datasync": file.datasync,
        "sync": file.sync,
        "allocate": lambda: file.allocate(0, 1 << 20),
        "truncate": lambda: file.truncate(0),
        "create": lambda: directory.open("g", create=True),
        "unlink": lambda: directory.unlink("f"),
        "names": directory.names,
    }
    assert said_by_child(fork, calls[name]) == ForkedError.__name__
    assert (tmp_path / "f").read_bytes() == b"mine"
    assert os.listdir(tmp_path) == ["f"]
    directory.close()


@FORKS
def test_the_lock_of_the_parent_outlives_the_child_and_not_the_parents_close(
    fork: Callable[[], int], tmp_path: Path
) -> None:
    path = str(tmp_path)
    directory = SystemDirectory(path)
    directory.lock(shared=False)

    def close_and_lock() -> None:
        directory.close()
        SystemDirectory(path).lock(shared=False)

    assert said_by_child(fork, close_and_lock) == LockedError.__name__
    with pytest.raises(LockedError):
        SystemDirectory(path).lock(shared=True)
    # A child that does not notice its fork keeps the descriptor. The lock is free all the same once the parent lets go.
    reading, writing = os.pipe()
    pid = fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    directory.close()
    second = SystemDirectory(path)
    second.lock(shared=False)
    second.close()
    os.close(writing)
    os.waitpid(pid, 0)


def test_a_child_is_not_told_that_it_holds_what_its_parent_holds(tmp_path: Path) -> None:
    directory = SystemDirectory(str(tmp_path))
    directory.lock(shared=False)

    def try_it() -> str:
        try:
            SystemDirectory(str(tmp_path)).lock(shared=False)
        except LockedError as error:
            return f"{error.pid == os.getppid()}"
        return "locked"

    assert said_by_child(without_hooks, try_it) == "True"
    directory.close()


def test_closing_twice_or_after_the_descriptor_went_raises_nothing(tmp_path: Path) -> None:
    directory = SystemDirectory(str(tmp_path))
    directory.close()
    directory.close()
    with pytest.raises(OSError) as caught:
        directory.names()
    assert caught.value.errno == errno.EBADF


@pytest.mark.parametrize("noticed", ["by the hook", "by its first use"])
def test_a_child_that_outlives_a_killed_parent_does_not_keep_its_lock(tmp_path: Path, noticed: str) -> None:
    code = f"""
import ctypes, os, signal, sys
import kvwal
db = kvwal.open({str(tmp_path / "a.kv")!r}, background=False)
db[b"a"] = b"1"
if (os.fork if {noticed == "by the hook"} else ctypes.PyDLL(None).fork)() == 0:
    try:
        db[b"b"] = b"2"
    except kvwal.ForkedError:
        print(os.getpid(), flush=True)
    signal.pause()
signal.pause()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        with kvwal.open(tmp_path / "a.kv") as db:
            assert dict(db) == {b"a": b"1"}
    finally:
        os.kill(child, 9)
        parent.stdout.close()
