"""Making and erasing a store may be cut off anywhere; the next open finds the old store, none, or the new one."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY

import kvwal
from crashtests.mutations import Edit, Mutant, applied
from kvwal.engine.engine import Engine
from kvwal.errors import FormatError, StoreNotFoundError
from kvwal.testing import SimulatedDisk, crash_every

SETTINGS: dict[str, Any] = {**TINY, "background": False}


def opened(disk: SimulatedDisk, flag: Any = "c", **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", flag, files=disk, **{**SETTINGS, **options})


def old_store(seed: int = 1) -> SimulatedDisk:
    disk = SimulatedDisk(seed=seed)
    with opened(disk) as db:
        for number in range(10):
            db[b"%d" % number] = b"old" * 2000
        db.checkpoint()
        db[b"last"] = b"old"
    return disk


OLD = {**{b"%d" % number: b"old" * 2000 for number in range(10)}, b"last": b"old"}


def begin_anew(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
    with opened(disk, "n") as db:
        acknowledged.append("n")
        db[b"new"] = b"1"
        acknowledged.append("new")


def judge(found: dict[bytes, bytes], acknowledged: list[Any]) -> None:
    if "new" in acknowledged:
        assert found == {b"new": b"1"}
    elif "n" in acknowledged:
        assert found in ({}, {b"new": b"1"})
    else:
        assert found in (OLD, {}, {b"new": b"1"})


@pytest.mark.parametrize("flag", ["c", "w", "n", "r"])
def test_flag_n_cut_off_anywhere_leaves_the_old_store_or_an_empty_one(flag: Any) -> None:
    seen: set[str] = set()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        before = disk.fingerprint()
        try:
            with opened(disk, flag) as db:
                seen.add("open")
                found = dict(db)
                assert db.verify().ok
            judge(found, acknowledged) if flag != "n" else None
        except StoreNotFoundError:
            seen.add("none")
            assert flag in ("r", "w")
            assert not acknowledged
            found = None
        if flag == "r":
            assert disk.fingerprint() == before, "a reader writes nothing"
        # Whatever the first one found, the store works, and says the same again.
        with opened(disk) as db:
            if found is not None:
                assert dict(db) == found
            else:
                assert dict(db) == {}
            db[b"after"] = b"1"
        with opened(disk, "r") as db:
            assert db[b"after"] == b"1"

    crash_every(begin_anew, check, disk=old_store(), states_per_point=24)
    assert seen == ({"open", "none"} if flag in ("r", "w") else {"open"})


def test_a_store_closed_within_a_call_of_another_may_be_opened_again_at_once() -> None:
    """The inner store ends in a thread of its own, which holds the lock for a moment more."""
    outer, inner = SimulatedDisk(seed=1), SimulatedDisk(seed=2)
    opens = 0

    def watch(operation: Any) -> None:
        nonlocal opens
        for flag in ("c", "r", "c"):
            with opened(inner, flag) as db:
                assert dict(db) == {}
            opens += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with opened(outer) as db:
            outer.watcher = watch
            for number in range(100):
                db[b"%d" % number] = b"1"
            outer.watcher = None
    finally:
        sys.setswitchinterval(interval)
    assert opens > 300


def test_what_was_put_before_a_close_within_a_call_of_another_is_shown_by_flag_r(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However late the thread is that ends the inner store: what has the lock is a store of this process."""
    outer, inner = SimulatedDisk(seed=1), SimulatedDisk(seed=2)
    shown: list[tuple[bytes | None, bytes]] = []
    close = Engine._close

    def late(self: Engine) -> None:
        if threading.current_thread().name == "kvwal-close":
            time.sleep(0.01)
        close(self)

    def watch(operation: Any) -> None:
        outer.watcher = None
        value = b"%d" % len(shown)
        with opened(inner) as db:
            db[b"after"] = value
        with opened(inner, "r") as db:
            shown.append((db.get(b"after"), value))
        outer.watcher = watch

    monkeypatch.setattr(Engine, "_close", late)
    with opened(outer) as db:
        outer.watcher = watch
        db[b"a"] = b"1"
        db[b"b"] = b"1"
        outer.watcher = None
    assert len(shown) > 1
    assert all(found == value for found, value in shown), shown


def test_an_erasing_that_is_finished_may_be_cut_off_again() -> None:
    def begin(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        opened(disk, "n").close()

    halves: list[SimulatedDisk] = []

    def keep(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        if disk.kind("/kv/erasing") is not None:
            halves.append(disk)

    crash_every(begin, keep, disk=old_store(), states_per_point=2)
    assert len(halves) > 3

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            assert dict(db) == ({b"new": b"1"} if acknowledged else {}) or (not acknowledged and b"new" in db)

    def finish(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            db[b"new"] = b"1"
            acknowledged.append("new")

    for half in halves[:: max(1, len(halves) // 4)]:
        crash_every(finish, check, disk=half, states_per_point=8)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("make_marker", "marker.sync()", "pass"),
        ("make_marker", "    directory.sync()\n", "    pass\n"),
        ("erase", "directory.sync()", "pass"),
        ("erase", "raise _not_found(directory.path)", "pass"),
        ("is_marked", "== _MARK", "== b'other'"),
        ("erase", "if is_erasable(name):", "if is_erasable(name) and name != 'data':"),
    ],
)
def test_each_step_of_the_erasing_is_needed(function: str, old: str, new: str) -> None:
    defect = Mutant(f"{function} without {old}", "", (Edit(f"kvwal.engine.create:{function}", old, new),))
    with applied(defect), pytest.raises((AssertionError, kvwal.Error)):
        for flag in ("r", "w", "n"):
            test_flag_n_cut_off_anywhere_leaves_the_old_store_or_an_empty_one(flag)


def test_a_first_open_cut_off_anywhere_leaves_no_store_or_a_whole_one() -> None:
    def make(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            acknowledged.append("made")
            db[b"a"] = b"1"
            acknowledged.append("a")

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        if acknowledged:
            with opened(disk, "r") as db:
                assert dict(db) in ([{b"a": b"1"}] if "a" in acknowledged else [{}, {b"a": b"1"}])
        else:
            try:
                with opened(disk, "r") as db:
                    assert dict(db) == {}
            except StoreNotFoundError:
                pass
        with opened(disk) as db:
            db[b"after"] = b"1"

    crash_every(make, check, states_per_point=32)


@pytest.mark.parametrize("text", [b"", b"mine\n", b"kvwal erases"])
def test_a_file_that_happens_to_be_called_erasing_is_no_licence_to_erase(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path) as db:
        db[b"a"] = b"1"
    (path / "erasing").write_bytes(text)
    for flag in ("r", "w", "c"):
        with kvwal.open(path, flag) as db:  # type: ignore[arg-type]
            assert db[b"a"] == b"1"
    with pytest.raises(FormatError, match="erasing"):
        kvwal.open(path, "n")
    with kvwal.open(path) as db:
        assert db[b"a"] == b"1"
    assert (path / "erasing").read_bytes() == text


FOREIGN = ("notes.tmp", "00000000000000000001.log.bak", "data2", "00000000000000000099.tmp", "README")
#: Of later versions.
RESERVED = ("engine", "engine.sock")


def test_files_of_others_and_of_later_versions_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    kvwal.open(path, **SETTINGS).close()
    (path / "readers").mkdir()
    # What ends in `.pin` is a follower's, and this one is of no use.
    (path / "readers" / "x.pin").write_bytes(b"x")
    (path / "readers" / "notes").write_bytes(b"x")
    for name in (*FOREIGN, *RESERVED):
        (path / name).write_bytes(name.encode())
    for flag in ("c", "n", "w", "n", "r"):
        with kvwal.open(path, flag, **SETTINGS) as db:  # type: ignore[arg-type]
            if flag != "r":
                for number in range(100):
                    db[b"%d" % number] = b"x" * 1000
                db.checkpoint()
                db.compact()
        for name in (*FOREIGN, *RESERVED):
            assert (path / name).read_bytes() == name.encode()
        assert (path / "readers" / "notes").read_bytes() == b"x"
    assert not (path / "readers" / "x.pin").exists()


def test_a_directory_with_nothing_but_names_of_later_versions_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "a.kv" / "readers").mkdir(parents=True)
    (tmp_path / "a.kv" / "lock").touch()
    with kvwal.open(tmp_path / "a.kv") as db:
        db[b"a"] = b"1"
    (tmp_path / "b.kv").mkdir()
    (tmp_path / "b.kv" / "notes.tmp").touch()
    with pytest.raises(FormatError, match=r"notes\.tmp"):
        kvwal.open(tmp_path / "b.kv")
    assert [entry.name for entry in (tmp_path / "b.kv").iterdir()] == ["notes.tmp"], "not even a lock file"


def test_each_writable_open_has_a_higher_session_on_one_line(tmp_path: Path) -> None:
    found = []
    for number in range(3):
        with kvwal.open(tmp_path / "a.kv") as db:
            db[b"%d" % number] = b"1"
            db.checkpoint()
            meta = db.engine._pages.meta
            found.append((meta.session, meta.line))
            assert meta.wall_us > 0
    sessions, lines = zip(*found, strict=True)
    assert list(sessions) == sorted(set(sessions))
    assert len(set(lines)) == 1
    assert lines[0] != bytes(8)


def test_no_parent_that_was_made_is_lost_with_an_acknowledged_commit() -> None:
    def make(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with open_in_missing(disk) as db:
            db[b"k"] = b"v"
            acknowledged.append("k")

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with open_in_missing(disk, "r" if acknowledged else "c") as db:
            assert dict(db) in ([{b"k": b"v"}] if acknowledged else [{}, {b"k": b"v"}])

    crash_every(make, check)


def test_no_parent_is_lost_that_a_killed_process_has_made() -> None:
    """The process that goes on finds the directory, and cannot know that nothing has flushed its entry."""
    disk = SimulatedDisk()
    seen: list[int] = []
    disk.watcher = lambda operation: seen.append(operation.number)
    open_in_missing(disk).close()
    for number in seen:
        disk = SimulatedDisk()

        def kill(operation: Any, disk: SimulatedDisk = disk, number: int = number) -> None:
            if operation.number == number:
                disk.watcher = None
                disk.kill()
                raise KeyboardInterrupt

        disk.watcher = kill
        with pytest.raises(KeyboardInterrupt):
            open_in_missing(disk).close()
        with open_in_missing(disk) as db:
            db[b"k"] = b"v"
            found = disk.crash()
        with open_in_missing(found, "r") as after:
            assert dict(after) == {b"k": b"v"}, f"killed at operation {number}"


def open_in_missing(disk: SimulatedDisk, flag: Any = "c") -> kvwal.Store:
    return kvwal.open("/a/b/kv", flag, parents=True, files=disk, **SETTINGS)
