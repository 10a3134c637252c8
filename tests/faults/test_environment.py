"""The machine refuses: no descriptors, no permission, a read-only file system, a quota, a limit of size, a signal.

What was not begun poisons nothing, and whatever is raised is one of kvwal's errors and says what to do.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import TINY, run_threads

import kvwal
from kvwal.errors import (
    DiskFullError,
    EnvironmentFailure,
    Error,
    LockedError,
    PoisonedError,
    ReadOnlyError,
    RefusedError,
)
from kvwal.pages.node import PAGE_SIZE
from kvwal.testing import SimulatedDisk

SETTINGS: dict[str, Any] = {**TINY, "background": False}

CODES = [
    errno.EMFILE,
    errno.ENFILE,
    errno.EROFS,
    errno.EACCES,
    errno.EFBIG,
    errno.EDQUOT,
    errno.ENOSPC,
    errno.EINTR,
    errno.ENOMEM,
]
NO_SPACE = (errno.EFBIG, errno.EDQUOT, errno.ENOSPC)
FLUSHES = ("datasync", "sync", "sync_directory")


def work(db: kvwal.Store, acknowledged: dict[bytes, bytes], failures: list[BaseException]) -> None:
    """Commits, rolls of the log, checkpoints, retired segments; what fails is noted, and the work goes on."""
    for number in range(24):
        key, value = b"%02d" % number, b"%d " % number * 700
        attempt(failures, lambda key=key, value=value: db.put(key, value)) and acknowledged.update({key: value})
        if number % 8 == 7:
            attempt(failures, db.checkpoint)
            attempt(failures, lambda: [record.seqno for record in db.history()])


def attempt(failures: list[BaseException], call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the test looks at all of them
        failures.append(error)
        return False
    return True


def operations_of_the_work() -> int:
    disk = SimulatedDisk(seed=1)
    with kvwal.open("/kv", files=disk, **SETTINGS) as db:
        first = disk.operations
        work(db, {}, [])
        return disk.operations - first


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.__getitem__)
def test_one_refused_call_at_any_step_loses_nothing_and_poisons_only_what_was_begun(code: int) -> None:
    for nth in range(1, operations_of_the_work() + 1):
        disk = SimulatedDisk(seed=1)
        acknowledged: dict[bytes, bytes] = {}
        failures: list[BaseException] = []
        disk.trace = []
        db = kvwal.open("/kv", files=disk, **SETTINGS)
        disk.trace.clear()
        disk.fail(nth=nth, error=code)
        work(db, acknowledged, failures)
        operation = disk.trace[nth - 1]
        struck = operation.name
        for failure in failures:
            assert isinstance(failure, Error), (nth, struck, failure)
            assert isinstance(failure, EnvironmentFailure), (nth, struck, failure)
        slot = operation.path == "/kv/data" and operation.offset < 2 * PAGE_SIZE
        begun = struck in FLUSHES or (struck == "pwrite" and (slot or code not in NO_SPACE))
        if not begun:
            assert not any(isinstance(failure, PoisonedError) for failure in failures), (nth, struck, failures)
            assert len(failures) <= 1, (nth, struck, failures)
            db[b"after"] = b"1"
            acknowledged[b"after"] = b"1"
        db.close()
        with kvwal.open("/kv", files=disk, **SETTINGS) as found:
            assert acknowledged.items() <= dict(found).items(), (nth, struck)
            assert found.verify().ok


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
def test_an_open_that_is_refused_at_any_step_can_be_tried_again(code: int, flag: Any) -> None:
    def prepared() -> SimulatedDisk:
        disk = SimulatedDisk(seed=1)
        with kvwal.open("/kv", files=disk, **SETTINGS) as db:
            db[b"a"] = b"1" * 3000
        return disk

    nth = 0
    while True:
        nth += 1
        disk = prepared()
        fault = disk.fail(nth=nth, error=code)
        try:
            kvwal.open("/kv", flag, files=disk, **SETTINGS).close()
        except Error as error:
            assert isinstance(error, EnvironmentFailure | ReadOnlyError), (nth, error)
        disk.heal()
        with kvwal.open("/kv", files=disk, **SETTINGS) as db:
            assert dict(db) in ([{b"a": b"1" * 3000}, {}] if flag == "n" else [{b"a": b"1" * 3000}])
            db[b"b"] = b"2"
        if not fault.struck:
            break
    assert nth > 5


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC])
def test_a_store_that_cannot_be_made_for_lack_of_space_says_so_at_any_step(code: int) -> None:
    nth = 0
    while True:
        nth += 1
        disk = SimulatedDisk(seed=1)
        fault = disk.fail("change", nth=nth, error=code)
        try:
            kvwal.open("/kv", files=disk, **SETTINGS).close()
        except DiskFullError:
            pass
        if not fault.struck:
            break
        disk.heal()
        kvwal.open("/kv", files=disk, **SETTINGS).close()
    assert nth > 5


# -- on the real system -----------------------------------------------------------------------------


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


@contextmanager
def out_of_descriptors(*, but: int = 0) -> Iterator[None]:
    taken: list[int] = []
    with limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + 20):
        try:
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for _ in range(but):
            os.close(taken.pop())
        try:
            yield
        finally:
            for descriptor in taken:
                os.close(descriptor)


def test_without_descriptors_commits_go_on_until_the_log_needs_a_segment_and_then_they_wait(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **SETTINGS) as db:
        db[b"a"] = b"0"
        with out_of_descriptors():
            db[b"a"] = b"1"
            with pytest.raises(RefusedError, match=r"open files.*ulimit"):
                for number in range(100):
                    db[b"%d" % number] = bytes(2000)
            with pytest.raises(RefusedError, match="ulimit"):
                list(db.history())
            assert db[b"a"] == b"1"
        db[b"b"] = b"2"
        assert db.verify().ok
        expected = dict(db)
    with kvwal.open(tmp_path / "a.kv") as db:
        assert dict(db) == expected


def test_without_descriptors_a_store_can_be_closed_and_not_opened(tmp_path: Path) -> None:
    db = kvwal.open(tmp_path / "a.kv", **SETTINGS)
    db[b"a"] = b"1"
    with out_of_descriptors():
        db.close()
    with out_of_descriptors():
        with pytest.raises(RefusedError, match="ulimit"):
            kvwal.open(tmp_path / "a.kv")
        with pytest.raises(RefusedError, match="ulimit"):
            kvwal.open(tmp_path / "new.kv")
    with kvwal.open(tmp_path / "a.kv") as db:
        assert db[b"a"] == b"1"
    kvwal.open(tmp_path / "new.kv").close()


def test_a_limit_of_file_sizes_refuses_what_is_too_large_and_nothing_else(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **SETTINGS) as db:
        with limited(resource.RLIMIT_FSIZE, 100_000):
            db[b"a"] = b"1"
            with pytest.raises(RefusedError, match="larger"):
                db[b"large"] = bytes(1_000_000)
            db[b"b"] = b"2"
            db.checkpoint()
        db[b"large"] = bytes(1_000_000)
    with kvwal.open(tmp_path / "a.kv") as db:
        assert sorted(db) == [b"a", b"b", b"large"]


def test_a_store_can_be_made_where_its_parent_may_be_entered_and_not_read(tmp_path: Path) -> None:
    """A parent that cannot be opened cannot be flushed alone, and the new name must be durable all the same."""
    flushed: list[str] = []
    from kvwal.files import directory as module

    real_open, real_sync = os.open, os.sync

    def refuses_the_parent(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "..":
            raise PermissionError(errno.EACCES, "no", path)
        return real_open(path, *arguments, **options)

    class Os:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        open = staticmethod(refuses_the_parent)

        @staticmethod
        def sync() -> None:
            flushed.append("all")
            real_sync()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "os", Os())
        with kvwal.open(tmp_path / "a.kv") as db:
            db[b"a"] = b"1"
    assert flushed == ["all"]


def test_a_full_disk_does_not_keep_a_store_from_being_opened_for_the_sake_of_the_lock_file(tmp_path: Path) -> None:
    from kvwal.files.directory import SystemDirectory

    kvwal.open(tmp_path / "a.kv").close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SystemDirectory, "_write_hint", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with kvwal.open(tmp_path / "a.kv") as db:
            db[b"a"] = b"1"


def test_of_two_first_opens_at_once_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / str(number)

        def first_open(path: Path = path) -> kvwal.Store | LockedError:
            try:
                return kvwal.open(path, **SETTINGS)
            except LockedError as error:
                return error

        found = run_threads(first_open, first_open, first_open)
        won = [store for store in found if isinstance(store, kvwal.Store)]
        assert len(won) == 1, found
        won[0][b"a"] = b"1"
        won[0].close()


def test_an_open_that_runs_out_of_descriptors_in_the_middle_leaves_none_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, **SETTINGS) as db:
        db[b"a"] = b"1" * 3000
    opened = 0
    for free in range(12):
        with out_of_descriptors(but=free):
            before = len(os.listdir("/proc/self/fd")) if free else None
            try:
                kvwal.open(path, **SETTINGS).close()
                opened += 1
            except RefusedError:
                pass
            if before is not None:
                assert len(os.listdir("/proc/self/fd")) == before
    assert 0 < opened < 12
    with kvwal.open(path, **SETTINGS) as db:
        assert db[b"a"] == b"1" * 3000


def test_verify_and_salvage_do_not_take_missing_descriptors_for_damage(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **SETTINGS) as db:
        db[b"a"] = b"1"
        with out_of_descriptors(), pytest.raises(RefusedError, match="ulimit"):
            db.verify()
        assert db.verify().ok
    with out_of_descriptors(but=1), pytest.raises(RefusedError, match="ulimit"):
        kvwal.salvage(tmp_path / "a.kv", tmp_path / "b.kv")


@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("x" * 300, kvwal.errors.SystemCallError, "too long"),
        ("/".join(["x" * 200] * 40), kvwal.errors.SystemCallError, "too long"),
        ("file/a.kv", kvwal.FormatError, "not a directory"),
        ("file", kvwal.FormatError, "not a directory"),
        ("none/a.kv", kvwal.StoreNotFoundError, "none/a.kv"),
    ],
)
def test_a_path_that_cannot_be_is_one_of_our_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: type[Exception], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for flag in ("r", "w", "c", "n"):
        with pytest.raises(kvwal.Error) as caught:
            kvwal.open(path, flag)  # type: ignore[arg-type]
        if flag == "c":
            assert isinstance(caught.value, kind)
            assert text in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
