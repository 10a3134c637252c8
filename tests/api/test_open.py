"""Opening: what is in the way, whose it is, who has it, and what the flags may and may not do."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from store_fixtures import check_store, problems_of

import kvwal
import kvwal.aio
from kvwal import FormatError, LockedError, ReadOnlyError, StoreNotFoundError
from kvwal.api import opened
from kvwal.api.opened import made_over
from kvwal.engine.create import _MARK
from kvwal.engine.engine import Engine
from kvwal.feed.status import describe
from kvwal.files import system_files
from kvwal.options import Options
from kvwal.testing import SimulatedDisk


def make(path: Path, **pairs: bytes) -> Path:
    with kvwal.open(path, background=False) as db:
        db.update({key.encode(): value for key, value in pairs.items()})
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.is_file()}


def test_an_engine_of_which_no_store_is_made_is_let_go(tmp_path: Path) -> None:
    engines: list[Engine] = []

    def fail(engine: Engine) -> kvwal.Store:
        engines.append(engine)
        raise KeyboardInterrupt

    path = str(make(tmp_path / "a.kv"))
    with pytest.raises(KeyboardInterrupt):
        made_over(lambda: Engine.open(path, "w", Options(), describe), fail)
    assert engines[0].is_closed
    kvwal.open(path).close()


@pytest.mark.parametrize("flag", ["c", "w", "n"])
def test_without_a_thread_an_open_is_refused_and_leaves_nothing_open_and_nothing_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: Any
) -> None:
    path = make(tmp_path / "a.kv", a=b"1")

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(kvwal.RefusedError, match="no thread 'kvwal-background' can be started: end some") as caught:
            kvwal.open(path, flag)
        assert caught.value.errno == errno.EAGAIN
        assert sorted(os.listdir("/proc/self/fd")) == before
        kvwal.open(path, background=False).close()
    with kvwal.open(path) as db:
        assert dict(db) == ({} if flag == "n" else {b"a": b"1"})


@pytest.mark.parametrize("flag", ["", "rw", "a", "R", None, b"r"])
def test_an_unknown_flag_is_refused_before_anything_is_touched(tmp_path: Path, flag: Any) -> None:
    with pytest.raises(ValueError, match="flag"):
        kvwal.open(tmp_path / "a.kv", flag)
    assert not (tmp_path / "a.kv").exists()


@pytest.mark.parametrize(("path", "error"), [("", ValueError), ("a\0b", ValueError), (7, TypeError), (None, TypeError)])
def test_what_is_no_path_is_refused(path: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        kvwal.open(path)


@pytest.mark.parametrize("kind", [str, bytes, Path])
def test_a_path_may_be_text_bytes_or_a_path(tmp_path: Path, kind: Any) -> None:
    path = os.fsencode(tmp_path / "a.kv") if kind is bytes else kind(tmp_path / "a.kv")
    with kvwal.open(path) as db:
        db[b"a"] = b"1"
    assert (tmp_path / "a.kv" / "data").is_file()


@pytest.mark.parametrize("flag", ["r", "w"])
def test_flags_r_and_w_make_nothing(tmp_path: Path, flag: Any) -> None:
    for path in (tmp_path / "missing.kv", tmp_path):
        with pytest.raises(StoreNotFoundError) as caught:
            kvwal.open(path, flag)
        assert isinstance(caught.value, FileNotFoundError)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"lock"}


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="not/there"):
        kvwal.open(tmp_path / "not" / "there" / "a.kv")


def test_parents_are_made_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("r", "w"):
        with pytest.raises(StoreNotFoundError):
            kvwal.open(tmp_path / "x" / "a.kv", flag, parents=True)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "x/y/a.kv", "z/y/a.kv", "z/y/b.kv", "z/y/c.kv/", "d.kv", "z/../e.kv", "z/w/../f.kv"):
        for _ in range(2):
            with kvwal.open(path, parents=True) as db:
                db[b"k"] = b"v"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o700
    assert sorted(path.name for path in tmp_path.rglob("*.kv")) == [f"{n}.kv" for n in "aabcdef"]
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FormatError, match="not a directory"):
        kvwal.open(tmp_path / "file" / "x" / "a.kv", parents=True)


def test_an_asyncio_store_makes_its_parents_when_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "x" / "a.kv", "c", 0o640, parents=True) as db:
            await db.put(b"k", b"v")

    asyncio.run(main())
    assert stat.S_IMODE((tmp_path / "x" / "a.kv").stat().st_mode) == 0o750


def test_parents_may_be_made_where_one_may_be_entered_and_not_read() -> None:
    disk = SimulatedDisk()
    disk.make_directory("/closed")
    refused = disk.fail("open_directory", error=errno.EACCES, path="/closed", forever=True)
    with kvwal.open("/closed/x/a.kv", parents=True, files=disk) as db:
        db[b"k"] = b"v"
    assert refused.struck


def test_a_file_where_a_directory_is_due_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    for flag in ("r", "w", "c", "n"):
        with pytest.raises(FormatError, match="not a directory"):
            kvwal.open(path, flag)  # type: ignore[arg-type]
    assert path.read_bytes() == b"mine"


FOREIGN = {
    "a document": {"letter.txt": b"dear"},
    "logs of something else": {"app.log": b"started", "db.log": b"x"},
    "temporary files of something else": {"work.tmp": b"unsaved", "x.idx": b"y"},
    "a file named data": {"data": b"1,2,3\n", "readme": b"mine"},
    "a large file named data": {"data": b"1,2,3\n" * 3000, "a.log": b"mine", "notes.tmp": b"mine"},
    "an empty file named data": {"data": b"", "notes.tmp": b"mine"},
}


@pytest.mark.parametrize("flag", ["r", "w", "c", "n"])
@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path, flag: Any, names: dict[str, bytes]) -> None:
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises((FormatError, kvwal.CorruptionError, StoreNotFoundError)):
        kvwal.open(tmp_path, flag)
    assert {name: data for name, data in contents(tmp_path).items() if name != "lock"} == names


def test_an_empty_directory_becomes_a_store(tmp_path: Path) -> None:
    make(tmp_path, a=b"1")
    with kvwal.open(tmp_path, "r") as db:
        assert db[b"a"] == b"1"


def test_flag_n_erases_and_keeps_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    with kvwal.open(path, "n") as db:
        assert len(db) == 0
        assert db.recovery.created
        db[b"b"] = b"2"
    with kvwal.open(path) as db:
        assert dict(db) == {b"b": b"2"}


def test_flag_n_erases_a_damaged_store_too(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    data = bytearray((path / "data").read_bytes())
    data[100] ^= 1
    data[4196] ^= 1
    (path / "data").write_bytes(data)
    with pytest.raises(kvwal.CorruptionError):
        kvwal.open(path)
    with kvwal.open(path, "n") as db:
        assert len(db) == 0


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    "name", ["data", "poisoned", "spare.tmp", "lock.tmp", "erasing.tmp", *(f"{9:020d}.{end}" for end in ("log", "idx"))]
)
def test_flag_n_erases_nothing_where_a_directory_has_the_name_of_a_file(
    tmp_path: Path, name: str, marked: bool
) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    if marked:
        (path / "erasing").write_bytes(_MARK)
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    before = sorted(os.listdir(path)), contents(path)
    for flag in ("n", *(["c", "w"] if marked else [])):
        with pytest.raises(FormatError, match=f"{name} in .* is (a directory|not a regular file)"):
            kvwal.open(path, flag)
        assert (sorted(os.listdir(path)), {**contents(path), "lock": before[1]["lock"]}) == before
    (path / name).rmdir()
    with kvwal.open(path, "n") as db:
        assert len(db) == 0


def test_flag_n_cut_off_anywhere_ends_with_the_old_store_or_an_empty_one() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False) as db:
        for number in range(10):
            db[b"%d" % number] = b"old" * 2000
    count = 0

    def cut(operation: object) -> None:
        nonlocal count
        for survivors in (0, -1, 0b0101, 0b1010):
            found = disk.crash(survivors)
            with kvwal.open("/kv", "c", files=found, background=False) as db:
                assert len(db) in (0, 10), operation
                db[b"on"] = b""
                assert problems_of(db) == []
            count += 1

    disk.watcher = cut
    kvwal.open("/kv", "n", files=disk, background=False).close()
    assert count > 40


# -- permissions and links ------------------------------------------------------------------------


def test_files_are_private_by_default(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        with kvwal.open(tmp_path / "a.kv", segment_bytes=16 << 10) as db:
            for number in range(100):
                db[b"%d" % number] = b"x" * 500
            db.checkpoint()
            modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in (tmp_path / "a.kv").iterdir()}
    finally:
        os.umask(former)
    assert set(modes.values()) == {0o600}, modes
    assert stat.S_IMODE((tmp_path / "a.kv").stat().st_mode) == 0o700


def test_mode_opens_it_to_others_who_may_then_enter(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        with kvwal.open(tmp_path / "a.kv", "c", 0o644):
            pass
    finally:
        os.umask(former)
    assert stat.S_IMODE((tmp_path / "a.kv").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a.kv" / "data").stat().st_mode) == 0o644


def test_the_store_may_be_reached_through_a_link_to_its_directory(tmp_path: Path) -> None:
    path = make(tmp_path / "real.kv", a=b"1")
    (tmp_path / "link.kv").symlink_to(path)
    with kvwal.open(tmp_path / "link.kv") as db:
        assert db[b"a"] == b"1"


@pytest.mark.parametrize("made_before", [False, True])
@pytest.mark.parametrize("kind", ["fifo", "socket", "link", "dangling link", "directory"])
def test_a_page_file_that_is_no_file_is_told_alike_by_all_that_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, made_before: bool
) -> None:
    path = tmp_path / "a.kv"
    if made_before:
        make(path, a=b"1").joinpath("data").rename(tmp_path / "away")
    else:
        path.mkdir()
    data = path / "data"
    if kind == "fifo":
        os.mkfifo(data)
    elif kind == "socket":
        # Its path may be too long for a socket's address.
        monkeypatch.chdir(path)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("data")
    elif kind == "directory":
        data.mkdir()
    else:
        data.symlink_to(tmp_path / "away" if kind == "link" else tmp_path / "nowhere")
    before = sorted(os.listdir(path))
    told = set()
    for opening in (*(partial(kvwal.open, path, flag) for flag in ("r", "w", "c")), partial(kvwal.follow, path)):
        with pytest.raises(FormatError, match="data in .* is not a regular file") as caught:
            opening()
        told.add(str(caught.value))
    assert len(told) == 1
    with pytest.raises(FormatError, match="data in .*nothing there is erased"):
        kvwal.open(path, "n")
    assert {*os.listdir(path), "lock"} == {*before, "lock"}


def test_a_socket_in_place_of_another_file_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(path: Path, name: str) -> None:
        monkeypatch.chdir(path)
        (path / name).unlink()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)

    path = make(tmp_path / "a.kv", a=b"1")
    bind(path, "lock")
    with pytest.raises(FormatError, match="lock is no regular file"):
        kvwal.open(path)
    path = make(tmp_path / "b.kv", a=b"1")
    bind(path, f"{1:020d}.log")
    for flag in ("r", "w"):
        with pytest.raises(kvwal.SystemCallError, match="a socket, or something else that is no file"):
            kvwal.open(path, flag)


@pytest.mark.parametrize("name", ["data", "lock", "reserve", "spare.tmp", "data.tmp", "00000000000000000001.log.tmp"])
@pytest.mark.parametrize("made_before", [False, True])
def test_a_planted_link_is_never_followed(tmp_path: Path, name: str, made_before: bool) -> None:
    path = tmp_path / "a.kv"
    if made_before:
        make(path, a=b"1")
    else:
        path.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(victim)
    try:
        with kvwal.open(path, segment_bytes=16 << 10) as db:
            for number in range(100):
                db[b"%d" % number] = b"x" * 500
            db.checkpoint()
    except (FormatError, kvwal.CorruptionError, OSError) as error:
        assert isinstance(error, kvwal.Error), f"a clear error, not {error!r}"
    assert victim.read_bytes() == b"precious"


def test_a_planted_link_in_place_of_a_segment_is_never_followed(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    segment = next(path.glob("*.log"))
    victim = tmp_path / "victim"
    segment.rename(victim)
    before = victim.read_bytes()
    segment.symlink_to(victim)
    with pytest.raises((kvwal.Error, OSError)):
        kvwal.open(path)
    assert victim.read_bytes() == before


# -- who has it -----------------------------------------------------------------------------------

HOLD = "import kvwal, sys; db = kvwal.open(sys.argv[1], sys.argv[2]); print('held', flush=True); sys.stdin.read()"


def holder(path: Path, flag: str = "c") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), flag], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_has_the_store(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    with holder(path) as process:
        for flag in ("w", "c", "n"):
            with pytest.raises(LockedError, match=str(process.pid)) as caught:
                kvwal.open(path, flag)  # type: ignore[arg-type]
            assert caught.value.pid == process.pid
        process.kill()
    with kvwal.open(path) as db:
        assert db[b"a"] == b"1", "the lock died with its holder"


def test_the_same_process_is_told_that_it_has_the_store_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path) as db:
        with pytest.raises(LockedError, match="this process") as caught:
            kvwal.open(path)
        assert caught.value.pid == os.getpid()
        db[b"still"] = b"works"
    kvwal.open(path).close()


def test_readers_keep_no_writer_out_and_none_keeps_them_out(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    with holder(path, "r") as process, kvwal.open(path, "r") as db, kvwal.open(path, "c") as writer:
        writer[b"a"] = b"2"
        assert db[b"a"] == b"1"
        with holder(path, "r") as late:
            late.kill()
        process.kill()


def test_a_lock_file_with_nonsense_in_it_is_no_obstacle(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    (path / "lock").write_bytes(b"\xff not a pid")
    kvwal.open(path).close()


# -- read-only ------------------------------------------------------------------------------------


def test_a_read_only_store_refuses_every_write(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    before = contents(path)
    with kvwal.open(path, "r") as db:
        assert db.read_only
        writes: list[Any] = [
            lambda: db.put(b"k", b"v"),
            lambda: db.__setitem__(b"k", b"v"),
            lambda: db.delete(b"a"),
            lambda: db.__delitem__(b"a"),
            lambda: db.delete_range(),
            lambda: db.clear(),
            lambda: db.update({b"k": b"v"}),
            lambda: db.pop(b"a"),
            lambda: db.popitem(),
            lambda: db.setdefault(b"k", b"v"),
            lambda: db.run(lambda txn: txn.put(b"k", b"v")),
            lambda: db.checkpoint(),
        ]
        for write in writes:
            with pytest.raises(ReadOnlyError, match='"w"'):
                write()
        db.sync()
        assert db.setdefault(b"a", b"other") == b"1"
        assert db.verify().ok
        assert dict(db) == {b"a": b"1"}
    assert contents(path) == before


def test_a_read_only_directory_can_be_read(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    (path / "lock").unlink()
    before = contents(path)
    path.chmod(0o500)
    try:
        with kvwal.open(path, "r") as db:
            assert db[b"a"] == b"1"
        assert contents(path) == before
        if os.geteuid() != 0:
            with pytest.raises(ReadOnlyError):
                kvwal.open(path)
    finally:
        path.chmod(0o700)


def test_a_read_only_file_system_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    directory = system_files().open_directory(str(path))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "read-only file system")

    monkeypatch.setattr(type(directory), "lock", refuse)
    with pytest.raises(ReadOnlyError, match='"r"'):
        kvwal.open(path)


# -- format ---------------------------------------------------------------------------------------


def test_a_store_without_its_page_file_is_damaged_not_new(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    (path / "data").unlink()
    for flag in ("r", "w", "c"):
        with pytest.raises(kvwal.CorruptionError, match="data"):
            kvwal.open(path, flag)  # type: ignore[arg-type]


def test_a_store_without_its_log_is_damaged(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    for segment in path.glob("*.log"):
        segment.unlink()
    for flag in ("r", "w", "c"):
        with pytest.raises(kvwal.CorruptionError):
            kvwal.open(path, flag)  # type: ignore[arg-type]


def test_a_store_that_is_closed_opens_with_nothing_to_do(tmp_path: Path) -> None:
    path = make(tmp_path / "a.kv", a=b"1")
    with kvwal.open(path) as db:
        report = db.recovery
        assert not report.created
        assert report.row == "closed"
        assert (report.cut_bytes, report.carried, report.last_seqno) == (0, 0, 1)


@pytest.mark.parametrize("flag", ["r", "c"])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_replayed_is_what_was_there(tmp_path: Path, seed: int, flag: Any) -> None:
    """Puts alone, batches, deletes and ranges, on each other, with an older generation of pages below."""
    rng = random.Random(seed)
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False, segment_bytes=16 << 10) as db:
        for step in range(400):
            key = b"%d" % rng.randrange(60)
            kind = rng.random()
            if kind < 0.6:
                db.put(key, rng.randbytes(rng.randrange(200)))
            elif kind < 0.7:
                db.delete(key)
            elif kind < 0.75:
                db.delete_range(key, key + b"5")
            else:
                with db.batch() as batch:
                    for _ in range(rng.randrange(12)):
                        batch.put(b"%d" % rng.randrange(60), b"v" * rng.choice([0, 9, 9]))
                    if kind > 0.9:
                        batch.delete(key)
            if step == 100:
                db.checkpoint()
        shutil.copytree(tmp_path / "a.kv", tmp_path / "b.kv")
        expected, count = dict(db.scan()), len(db)
        memtable, last = db.engine.state.version.memtable, db.last_seqno
        with kvwal.open(tmp_path / "b.kv", flag, background=False) as copy:
            check_store(copy)
            assert copy.last_seqno == last
            assert (dict(copy.scan()), len(copy)) == (expected, count)
            assert copy.get(b"no such key") is None
            again = copy.engine.state.version.memtable
            assert again.latest == memtable.latest
            assert again.last_seqno == last
            assert again.bytes_used >= memtable.bytes_used
            report = copy.recovery
            assert report.commits == last - report.checkpoint_seqno > 0
            records = copy.history(report.checkpoint_seqno)
            assert report.bytes_replayed == sum(record.size for record in records)
            check_store(copy)


def test_a_closed_store_refuses_everything(tmp_path: Path) -> None:
    db = kvwal.open(tmp_path / "a.kv")
    db.update({b"%03d" % number: b"v" * 50 for number in range(500)})
    db.checkpoint()
    snapshot, txn, iterator, unused = db.snapshot(), db.transaction(), db.scan(), db.scan()
    next(iterator)
    db.close()
    db.close()
    assert db.closed
    calls: list[Any] = [
        lambda: db.get(b"a"),
        lambda: db[b"a"],
        lambda: db.get_many([b"a"]),
        lambda: b"a" in db,
        lambda: len(db),
        lambda: bool(db),
        lambda: list(db),
        lambda: db.first(),
        lambda: list(db.scan()),
        lambda: db.put(b"a", b"1"),
        lambda: db.delete(b"a"),
        lambda: db.update({b"a": b"1"}),
        lambda: db.pop(b"a", None),
        lambda: db.snapshot(),
        lambda: db.transaction(),
        lambda: db.sync(),
        lambda: db.checkpoint(),
        lambda: db.verify(),
        lambda: db.stats(),
        lambda: db.pins(),
        lambda: list(db.history()),
        lambda: snapshot.get(b"a"),
        lambda: list(snapshot),
        lambda: len(snapshot),
        lambda: txn.get(b"a"),
        lambda: list(txn.scan()),
        lambda: [*iterator],
        lambda: [*unused],
    ]
    for number, call in enumerate(calls):
        with pytest.raises(kvwal.ClosedError):
            pytest.fail(f"call {number} gave {call()!r}")
    txn.put(b"a", b"1") if txn.is_open else None
    with pytest.raises(kvwal.ClosedError):
        txn.commit()
    assert "closed" in repr(db)


def test_a_store_may_be_opened_while_the_open_ones_are_closed_at_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Open:
        closed = False

        def close(self) -> None:
            self.closed = True

    first, second, there = Open(), Open(), weakref.WeakValueDictionary[int, Open]()

    def opening() -> Open:
        # What another thread does as the first one is looked at.
        there[1] = second
        return first

    there.data[0] = opening  # type: ignore[attr-defined]  # typeshed does not list data
    monkeypatch.setattr(opened, "open_stores", there)
    opened._close_all()
    assert first.closed
    assert there[1] is second


def test_flag_w_looks_further_where_something_of_a_store_is(tmp_path: Path) -> None:
    """A process that is making one has its lock; and segments without pages are damage, and no missing store."""
    with kvwal.open(tmp_path / "being made"):
        for name in os.listdir(tmp_path / "being made"):
            if name != "lock":
                (tmp_path / "being made" / name).unlink()
        with pytest.raises(LockedError):
            kvwal.open(tmp_path / "being made", "w")
    with kvwal.open(tmp_path / "without pages") as db:
        db[b"a"] = b"1"
    for name in ("data", "lock"):
        (tmp_path / "without pages" / name).unlink()
    with pytest.raises(kvwal.CorruptionError):
        kvwal.open(tmp_path / "without pages", "w")
