"""One writer or many readers hold a directory, and an error names a process only if it is the one that holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvwal.errors import LockedError
from kvwal.files import lock as module
from kvwal.files.directory import SystemDirectory


@pytest.fixture(params=[True, False], ids=["by descriptor", "by path"])
def by_descriptor(request: Any) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def opened(store: Path, by_descriptor: bool = True) -> SystemDirectory:
    return SystemDirectory(str(store), by_descriptor=by_descriptor)


def locked(store: Path, by_descriptor: bool = True, *, shared: bool = False) -> SystemDirectory:
    directory = opened(store, by_descriptor)
    directory.lock(shared=shared)
    return directory


OTHER = """
import sys
from kvwal.files.directory import SystemDirectory
directory = SystemDirectory(sys.argv[1], by_descriptor=sys.argv[2] == "True")
directory.lock(shared=sys.argv[3] == "True")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(store: Path) -> Iterator[Any]:
    """Another process that holds the lock until it ends."""
    processes: list[subprocess.Popen[str]] = []

    def start(by_descriptor: bool, *, shared: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OTHER, str(store), str(by_descriptor), str(shared)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in processes:
        process.communicate()


def test_a_writer_excludes_all_and_readers_exclude_a_writer(store: Path, by_descriptor: bool) -> None:
    writer = locked(store, by_descriptor)
    for shared in (False, True):
        with pytest.raises(LockedError, match="this process"):
            locked(store, by_descriptor, shared=shared)
    writer.close()
    first, second = locked(store, by_descriptor, shared=True), locked(store, by_descriptor, shared=True)
    first.close()
    with pytest.raises(LockedError, match="this process"):
        locked(store, by_descriptor)
    second.close()
    locked(store, by_descriptor).close()


def test_a_lock_is_let_go_with_its_handle(store: Path, by_descriptor: bool) -> None:
    directory = locked(store, by_descriptor)
    del directory
    locked(store, by_descriptor).close()


def test_the_process_that_holds_it_is_named(store: Path, by_descriptor: bool, other: Any) -> None:
    process = other(by_descriptor)
    with pytest.raises(LockedError, match=f"open in process {process.pid};") as caught:
        locked(store, by_descriptor)
    assert caught.value.pid == process.pid


def test_a_killed_holder_holds_nothing_and_is_not_named(store: Path, by_descriptor: bool, other: Any) -> None:
    process = other(by_descriptor)
    process.kill()
    process.wait()
    reader = locked(store, by_descriptor, shared=True)
    assert (store / "lock").read_text().startswith(f"{process.pid} "), "what the dead writer left"
    assert module.holder_in_hint((store / "lock").read_text()) is None
    reader.close()


def test_a_writer_that_is_done_is_not_named_for_a_reader(store: Path, by_descriptor: bool, other: Any) -> None:
    locked(store, by_descriptor).close()
    other(by_descriptor, shared=True)
    with pytest.raises(LockedError, match="another process") as caught:
        locked(store, by_descriptor)
    assert caught.value.pid is None


def test_this_process_is_not_named_when_it_only_left_its_hint(store: Path, other: Any) -> None:
    locked(store).close()
    (store / "lock").write_text(module.hint_of_this_process(recovers=False))
    other(True, shared=True)
    with pytest.raises(LockedError) as caught:
        locked(store)
    assert caught.value.pid is None


@pytest.mark.parametrize("field", range(4))
def test_a_hint_of_another_time_boot_or_container_names_no_process(field: int, other: Any, store: Path) -> None:
    process = other(True)
    text = (store / "lock").read_text()
    assert module.holder_in_hint(text) == process.pid
    fields = text.split()
    for wrong in ("-", "1", "x"):
        changed = [*fields[:field], wrong, *fields[field + 1 :]]
        assert module.holder_in_hint(" ".join(changed)) is None


@pytest.mark.parametrize("text", ["", "\n", "12", "12 13", "a b c d", "1 2 3 4 5", "-1 0 0 0", "٣ 1 1 1"])
def test_nonsense_names_no_process(text: str) -> None:
    assert module.holder_in_hint(text) is None


def test_a_writer_says_that_it_recovers_until_that_is_over(store: Path, by_descriptor: bool) -> None:
    writer, look = opened(store, by_descriptor), opened(store, by_descriptor)
    assert not look.is_recovering(), "there is no file"
    writer.lock(shared=False, recovers=True)
    assert look.is_recovering()
    assert len((store / "lock").read_bytes()) == module.HINT_BYTES
    writer.recovered()
    assert not look.is_recovering()
    assert (store / "lock").read_text().startswith(f"{os.getpid()} ")
    writer.close()
    look.close()


def test_a_writer_that_recovers_is_named(store: Path, other: Any) -> None:
    process = other(True)
    text = (store / "lock").read_text().rstrip()
    assert not module.recovers_in_hint(text)
    assert module.recovers_in_hint(f"{text} recovering")
    assert module.holder_in_hint(f"{text} recovering") == process.pid
    assert module.holder_in_hint(f"{text} another") is None
    assert not module.recovers_in_hint(f"{text} another")


def test_a_process_whose_name_has_spaces_and_brackets_has_a_start_time() -> None:
    code = "import sys; open('/proc/self/comm', 'w').write('a) b (c'); print('x', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ticks = module._start_of(str(process.pid))
        mine = module._start_of("self")
        assert ticks.isdecimal()
        assert int(mine) <= int(ticks)
        process.communicate()


def test_what_could_not_be_found_out_of_this_process_is_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_told", None)
    with monkeypatch.context() as patched:
        # As with no descriptor left.
        patched.setattr(module, "_read", lambda path: "")
        assert module.hint_of_this_process(recovers=False).split()[1:3] == ["-", "-"]
    first = module.hint_of_this_process(recovers=True)
    assert "-" not in first.split()
    assert first == module.hint_of_this_process(recovers=False) + " recovering"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_hint_of_a_forked_child_is_its_own() -> None:
    mine = module.hint_of_this_process(recovers=False).split()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, module.hint_of_this_process(recovers=False).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    theirs = os.read(reading, 1000).decode().split()
    os.close(reading)
    assert theirs[0] == str(pid)
    assert int(theirs[1]) >= int(mine[1])
    assert theirs[2:] == mine[2:]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process has no start time, and no mark but its pid")
def test_a_forked_child_with_the_pid_of_one_it_comes_from_has_a_hint_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = module.hint_of_this_process(recovers=False).split()
    pid = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        os.write(writing, module.hint_of_this_process(recovers=False).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="ascii") as file:
        its = file.read().split()
    os.waitpid(child, 0)
    assert its[0] == mine[0]
    assert its[1] != mine[1]


def test_a_second_writer_is_refused_although_the_file_was_removed(store: Path, other: Any) -> None:
    process = other(True)
    (store / "lock").unlink()
    with pytest.raises(LockedError, match="another process"):
        locked(store)
    # Made anew by a third party, it tells nothing.
    (store / "lock").write_text(module.hint_of_this_process(recovers=False))
    with pytest.raises(LockedError):
        locked(store)
    process.communicate()
    locked(store).close()


def test_without_descriptors_a_writer_notices_that_its_lock_file_was_removed(store: Path) -> None:
    directory = locked(store, by_descriptor=False)
    (store / "lock").unlink()
    second = locked(store, by_descriptor=False)
    with pytest.raises(OSError, match="removed"):
        directory.open("new", create=True)
    with pytest.raises(OSError, match="removed"):
        directory.unlink("lock")
    second.open("new", create=True).close()
    second.close()
    directory.close()


def test_a_shared_lock_writes_no_byte(store: Path, by_descriptor: bool) -> None:
    locked(store, by_descriptor, shared=True).close()
    assert os.listdir(store) == []
    locked(store, by_descriptor).close()
    before = os.stat(store / "lock")
    locked(store, by_descriptor, shared=True).close()
    after = os.stat(store / "lock")
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_a_lock_file_that_is_no_file_is_refused_at_once(store: Path, by_descriptor: bool, kind: str) -> None:
    victim = store.parent / "victim"
    victim.write_text("v")
    if kind == "link":
        (store / "lock").symlink_to(victim)
    elif kind == "directory":
        (store / "lock").mkdir()
    else:
        os.mkfifo(store / "lock")
    with pytest.raises(OSError, match=r"file|link|directory"):
        locked(store, by_descriptor)
    assert victim.read_text() == "v"
