"""What a backup reads and refuses, and what goes on meanwhile."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from backup_fixtures import OPTIONS, Lived, check_destination, objects, restored
from following_fixtures import all_durable, rewrite
from store_fixtures import check_store, interrupted_at, run_threads

import kvwal
from kvwal.backup import state
from kvwal.backup.bases import read_header
from kvwal.backup.chain import list_held
from kvwal.backup.checking import VerifiedArchive, verify
from kvwal.backup.keeping import Keep, plan_pruning, prune
from kvwal.backup.making import backup
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.proofs import Results
from kvwal.backup.units import UnitBuilder, decode_header
from kvwal.files import Buffer
from kvwal.pages.node import POINTER
from kvwal.testing import SimulatedDisk


def a_large_store(keys: int = 4000) -> Lived:
    lived = Lived(1, keep_history_s=0, cache_bytes=8 << 20, memtable_bytes=8 << 20, segment_bytes=1 << 20)
    lived.db.update({b"%06d" % n: b"%06d" % n * 20 for n in range(keys)})
    lived.db.checkpoint()
    return lived


def page_reads(lived: Lived, run: Callable[[], Any]) -> int:
    """Bytes that it reads from the page file."""
    lived.disk.trace = []
    run()
    read = sum(each.size for each in lived.disk.trace if each.name == "pread" and each.path == "/s/data")
    lived.disk.trace = None
    return read


def test_a_difference_reads_at_most_three_times_the_pages_that_changed() -> None:
    lived = a_large_store(40_000)
    first = backup(lived.db.engine, lived.destination)
    for n in range(0, 40_000, 1000):
        lived.db.put(b"%06d" % n, b"changed")
    lived.db.checkpoint()
    reports: list[kvwal.BackupReport] = []
    read = page_reads(lived, lambda: reports.append(backup(lived.db.engine, lived.destination)))
    changed = reports[0].pages * 4096
    assert not reports[0].is_full
    assert 0 < changed < first.pages * 4096 / 5
    assert read <= 3 * changed


def test_the_third_backup_builds_on_the_second() -> None:
    lived = a_large_store()
    backup(lived.db.engine, lived.destination)
    sizes = []
    for n in range(3):
        lived.db.put(b"%06d" % (n * 1000), b"x")
        lived.db.checkpoint()
        report = backup(lived.db.engine, lived.destination)
        sizes.append(report.pages)
        assert read_header(lived.destination, report.base).parent
    # Each has what changed since the one before, and not since the first.
    assert sizes[2] <= sizes[0] + 2


def test_differences_that_take_as_much_as_all_pages_are_not_built_on() -> None:
    lived = a_large_store()
    backup(lived.db.engine, lived.destination)
    full = []
    for n in range(5):
        lived.db.update({b"%06d" % key: b"%d" % n * 100 for key in range(0, 4000, 2)})
        lived.db.checkpoint()
        full.append(backup(lived.db.engine, lived.destination).is_full)
    assert True in full
    assert False in full
    expected = dict(lived.db.items())
    kvwal.restore(lived.destination, "/r", files=lived.disk)
    with kvwal.open("/r", files=lived.disk) as db:
        assert dict(db.items()) == expected


def pages_of_table_0(lived: Lived) -> tuple[int, int]:
    """The root, and a leaf."""
    engine: Any = lived.db.engine
    meta, pager = engine._pages.meta, engine._pages.pager
    pointer = meta.root
    root = POINTER.unpack(pointer)[0]
    for level in range(meta.height - 1, 0, -1):
        pointer = pager.node(pointer, 0, level)[1][:20]
    return root, POINTER.unpack(pointer)[0]


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_page_fails_and_is_named_and_not_copied(which: int) -> None:
    lived = a_large_store()
    page = pages_of_table_0(lived)[which]
    lived.disk.flip("/s/data", page * 4096 + 100)
    with pytest.raises(kvwal.CorruptionError, match=f"page {page}") as caught:
        backup(lived.db.engine, lived.destination)
    assert (caught.value.file, caught.value.offset) == ("data", page * 4096)
    assert [name for name in objects(lived.destination) if "/base/" in name] == []
    lived.disk.flip("/s/data", page * 4096 + 100)
    assert backup(lived.db.engine, lived.destination).is_full


def test_a_damaged_large_value_is_not_copied() -> None:
    lived = Lived(3)
    lived.db.put(b"large", b"v" * 3_000_000)
    lived.db.checkpoint()
    raw = lived.disk.read("/s/data")
    lived.disk.flip("/s/data", raw.index(b"v" * 1000) + 2_500_000)
    with pytest.raises(kvwal.CorruptionError, match="checksum of page"):
        backup(lived.db.engine, lived.destination)
    assert [name for name in objects(lived.destination) if "/base/" in name] == []


def test_nothing_is_built_on_a_base_that_is_damaged_or_missing() -> None:
    lived = Lived(4)
    lived.live(20)
    lived.db.checkpoint()
    name = backup(lived.db.engine, lived.destination).base
    lived.live(5)
    lived.db.checkpoint()
    lived.disk.flip(f"/b/{name}", 60)
    assert backup(lived.db.engine, lived.destination).is_full
    lived.live(5)
    lived.db.checkpoint()
    other = backup(lived.db.engine, lived.destination).base
    lived.destination.delete(str(list_held(lived.destination, lived.db.position.line).bases[1]))
    lived.live(5)
    lived.db.checkpoint()
    assert backup(lived.db.engine, lived.destination).is_full
    assert other
    restored(lived).close()


def proof_of(lived: Lived) -> VerifiedArchive:
    return verify(lived.destination, now_us=lived.disk.now_us, monotonic_s=lived.disk.monotonic_s)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("is_idle", [True, False])
def test_nothing_is_built_on_what_verify_found_damaged(is_idle: bool, is_first: bool) -> None:
    lived = a_large_store(400)
    names = [backup(lived.db.engine, lived.destination).base]
    for n in range(2):
        lived.db.put(b"%06d" % n, b"x" * 9000)
        lived.db.checkpoint()
        names.append(backup(lived.db.engine, lived.destination).base)
    damaged = names[0 if is_first else -1]
    lived.disk.flip(f"/b/{damaged}", 12_000)
    assert [problem.file for problem in proof_of(lived).problems] == [damaged]
    if not is_idle:
        lived.db.put(b"%06d" % 2, b"x")
        lived.db.checkpoint()
    report = backup(lived.db.engine, lived.destination)
    assert report.is_full is is_first
    assert report.base in report.made
    assert kvwal.restore(lived.destination, "/r", files=lived.disk).damaged == ()
    with kvwal.open("/r", files=lived.disk) as db:
        assert dict(db.items()) == dict(lived.db.items())
    # Once is enough.
    assert backup(lived.db.engine, lived.destination).made == ()
    if is_idle and not is_first:
        # It has the place of the damaged one.
        assert damaged not in objects(lived.destination)
        assert proof_of(lived).ok


@pytest.mark.parametrize("is_newest", [True, False])
def test_commits_of_a_unit_that_verify_found_damaged_are_put_anew(is_newest: bool) -> None:
    lived = a_large_store(400)
    backup(lived.db.engine, lived.destination)
    for _ in range(2):
        for n in range(10):
            lived.db.put(b"%06d" % n, lived.random.randbytes(30))
        backup(lived.db.engine, lived.destination)
    held = list_held(lived.destination, lived.db.position.line)
    damaged = str(held.units[-1 if is_newest else -2])
    lived.disk.flip(f"/b/{damaged}", 300)
    assert [problem.file for problem in proof_of(lived).problems] == [damaged]
    (made,) = backup(lived.db.engine, lived.destination).made
    assert backup(lived.db.engine, lived.destination).made == ()
    assert (damaged in objects(lived.destination)) is not is_newest
    found = kvwal.restore(lived.destination, "/r", files=lived.disk)
    assert made in found.objects
    with kvwal.open("/r", files=lived.disk) as db:
        assert dict(db.items()) == dict(lived.db.items())
    assert int(kvwal.restore(lived.destination, "/middle", at=held.units[-1].last - 5, files=lived.disk).restored)
    assert proof_of(lived).ok is is_newest


def test_a_unit_of_another_history_that_verify_has_found_is_not_replaced() -> None:
    lived = a_large_store(400)
    backup(lived.db.engine, lived.destination)
    lived.db.put(b"k", b"v")
    backup(lived.db.engine, lived.destination)
    (name,) = list_held(lived.destination, lived.db.position.line).units
    raw = lived.destination.get(str(name))
    builder = UnitBuilder(decode_header(str(name), raw).store_id, name.line, name.first, bytes(32))
    builder.add(1, lived.disk.clock_us, b"of another history")
    lived.destination.delete(str(name))
    lived.destination.put_new(str(name), builder.encode()[1])
    found = Results([str(name)])
    found.add(kvwal.Finding(str(name), None, "does not follow"), 1, deep=True)
    found.save(lived.destination)
    with pytest.raises(kvwal.ArchiveDiverged):
        backup(lived.db.engine, lived.destination)
    assert str(name) in objects(lived.destination)


class Pruned(DirectoryDestination):
    """An archive's pruning comes while the first base of a backup is put."""

    is_due = True

    def put_new(self, name: str, data: Any) -> bool:
        if self.is_due and "/base/" in name:
            self.is_due = False
            line = bytes.fromhex(name.partition("/")[0])
            pruning = plan_pruning(self, list_held(self, line), Keep(pitr_s=0, daily=0, monthly=0), 1 << 60)
            assert pruning.delete
            prune(self, pruning)
        return super().put_new(name, data)


def test_a_history_that_is_backed_up_while_an_archive_prunes_is_there() -> None:
    lived = Lived(6, keep_history_bytes=64 << 10)
    lived.live(30)
    lived.db.checkpoint()
    first = backup(lived.db.engine, lived.destination)
    while lived.db.window.oldest <= first.position:
        lived.live(10)
    lived.db.checkpoint()
    backup(lived.db.engine, lived.destination, base="full")
    # The window begins with a checkpoint whose base would be a difference on the first one.
    report = backup(lived.db.engine, Pruned("/b", files=lived.disk), history=True)
    assert report.oldest == lived.db.window.oldest
    for at in range(report.oldest, report.position + 1, 3):
        restored(lived, at=at, into=f"/r{at}").close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_destination_is_a_full_disk_that_is_named_and_the_backup_is_made_when_there_is_space(code: int) -> None:
    lived = Lived(1)
    lived.live(20)
    for nth in (1, 2, 3):
        lived.disk.fail("write", nth, error=code, forever=True, path="/b/*")
        with pytest.raises(kvwal.DiskFullError, match="no space to back up to /b; free some, and call it again"):
            backup(lived.db.engine, lived.destination)
        lived.disk.heal()
    assert backup(lived.db.engine, lived.destination).position == lived.db.position
    check_destination(lived.destination)


def test_a_full_disk_that_progress_met_is_not_said_to_be_that_of_the_destination() -> None:
    lived = Lived(1)
    lived.live(20)
    full = OSError(errno.ENOSPC, "the log of the user")

    def tell(done: int, total: int) -> None:
        raise full

    with pytest.raises(OSError, match="the log of the user") as caught:
        backup(lived.db.engine, lived.destination, progress=tell)
    assert caught.value is full
    assert backup(lived.db.engine, lived.destination).position == lived.db.position
    check_destination(lived.destination)


def test_what_is_remembered_of_damage_may_be_damaged_and_backups_go_on() -> None:
    lived = a_large_store(400)
    lived.destination.put_new(state.VERIFIED, b"{}")
    backup(lived.db.engine, lived.destination)
    lived.db.put(b"k", b"v")
    assert backup(lived.db.engine, lived.destination).made


def test_after_recovery_set_the_store_back_by_a_generation_differences_are_right() -> None:
    for seed in range(4):
        lived = Lived(seed)
        for _ in range(3):
            lived.live(25)
            lived.db.checkpoint()
            backup(lived.db.engine, lived.destination)
        meta = lived.db.engine.state.version.tree.meta
        lived.db.close()
        root = struct.unpack_from("<I", meta.root)[0]
        lived.disk.flip("/s/data", root * 4096 + 40)
        lived.db = lived.open()
        if "newer_root_bad" not in lived.db.recovery.meta_choice:
            # The close had made another generation.
            continue
        # The next checkpoint has the number of the one that is lost, and a base of that is there.
        lived.commit()
        lived.db.checkpoint()
        backup(lived.db.engine, lived.destination)
        with restored(lived, into="/next") as db:
            assert db.last_seqno == lived.db.last_seqno + 1
        for _ in range(3):
            backup(lived.db.engine, lived.destination)
            lived.live(20)
            lived.db.checkpoint()
            report = backup(lived.db.engine, lived.destination)
            restored(lived, into=f"/r{int(report.position)}").close()
        return
    raise AssertionError("no store was set back")


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_that_went_on_by_itself_is_refused(tmp_path: Path, seed: int) -> None:
    def filled(db: kvwal.Store, value: bytes) -> None:
        for n in range(50):
            db.put(b"%d" % n, value)

    destination = DirectoryDestination(tmp_path / "b")
    with kvwal.open(tmp_path / "s") as db:
        filled(db, b"1")
        db.backup(destination)
        common = db.last_seqno
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    with kvwal.open(tmp_path / "s") as db:
        filled(db, b"2")
        if seed == 2:
            db.checkpoint()
        db.backup(destination)
    before = objects(destination)
    with kvwal.open(tmp_path / "copy") as db:
        if seed:
            filled(db, b"3")
            filled(db, b"4")
        with pytest.raises(kvwal.ArchiveDiverged) as caught:
            db.backup(destination)
        assert caught.value.at_seqno <= common + 50
    assert objects(destination) == before


def test_pages_of_a_copy_that_went_on_are_not_taken_for_the_stores_own() -> None:
    # The log is gone that would tell. A difference is right all the same.
    for seed in range(2):
        lived, other = Lived(seed, keep_history_s=0), Lived(seed, keep_history_s=0)
        for each in (lived, other):
            each.live(40)
            each.db.checkpoint()
        assert lived.states == other.states
        backup(lived.db.engine, lived.destination)
        other.random.seed(77)
        other.live(30)
        for _ in range(3):
            other.db.put(b"x", b"y")
            other.db.checkpoint()
        # What the copy has put, and the store knows nothing of.
        theirs = DirectoryDestination("/b", files=other.disk)
        backup(other.db.engine, theirs)
        names = [name for name in objects(theirs) if "/base/" in name]
        for name in names:
            lived.destination.put_new(name, theirs.get(name))
        for _ in range(5):
            lived.live(30)
            lived.db.checkpoint()
        lived.states.append((lived.db.last_seqno, *lived.states[-1][1:]))
        report = backup(lived.db.engine, lived.destination)
        restored(lived, report.position).close()


class Busy(DirectoryDestination):
    """A destination in which putting takes so long that something happens meanwhile."""

    def __init__(self, disk: SimulatedDisk, meanwhile: Callable[[], None], times: int) -> None:
        super().__init__("/b", files=disk)
        self._meanwhile = meanwhile
        self._left = times

    def put_new(self, name: str, data: bytes | Iterable[Buffer]) -> bool:
        def pieces() -> Iterable[Buffer]:
            for n, piece in enumerate((data,) if isinstance(data, bytes) else data):
                if n == 1 and self._left and "/base/" in name:
                    self._left -= 1
                    self._meanwhile()
                yield piece

        return super().put_new(name, pieces())


def test_commits_and_checkpoints_go_on_meanwhile() -> None:
    lived = Lived(9)
    lived.live(60)
    lived.db.checkpoint()
    before = lived.db.last_seqno

    def meanwhile() -> None:
        for _ in range(4):
            lived.live(15)
            lived.db.checkpoint()

    report = backup(lived.db.engine, Busy(lived.disk, meanwhile, 1))
    assert int(report.position) == before
    check_store(lived.db)
    restored(lived, before).close()
    assert not [pin for pin in lived.db.pins() if pin.purpose == "backup"]


def test_beside_a_writer_that_makes_checkpoints_it_begins_again() -> None:
    disk = SimulatedDisk()
    with (
        kvwal.open("/s", files=disk, **{**OPTIONS, "keep_history_s": 0}) as db,
        kvwal.follow("/s", files=disk, pin=False) as live,
    ):
        rewrite(db, b"0")
        all_durable(db)
        rounds: list[int] = []

        def meanwhile() -> None:
            rounds.append(1)
            rewrite(db, b"%d" % len(rounds))
            rewrite(db, b"%d" % len(rounds))
            all_durable(db)

        report = live.backup(Busy(disk, meanwhile, 3))
        assert len(rounds) == 3
        assert int(report.position) == db.last_seqno
        check_destination(DirectoryDestination("/b", files=disk))
        kvwal.restore(DirectoryDestination("/b", files=disk), "/r", files=disk)
        with kvwal.open("/r", files=disk) as other:
            assert dict(other.items()) == dict(db.items())
        # A writer that is too quick for it is an error in the end, and no endless loop.
        rewrite(db, b"z")
        with pytest.raises(kvwal.SnapshotTooOld):
            live.backup(Busy(disk, meanwhile, 1000))
        # With a pin nothing goes.
        with kvwal.follow("/s", files=disk) as pinned:
            rounds.clear()
            at = db.last_seqno
            assert int(pinned.backup(Busy(disk, meanwhile, 1000), base="full").position) == at
            assert len(rounds) == 1


def test_a_follower_and_the_store_back_up_the_same_bytes() -> None:
    lived = Lived(11)
    lived.live(50)
    all_durable(lived.db)
    backup(lived.db.engine, lived.destination)
    other = DirectoryDestination("/b2", files=lived.disk)
    with kvwal.follow("/s", files=lived.disk) as live:
        live.backup(other)
    assert objects(other) == objects(lived.destination)
    lived.db.close()
    with kvwal.open("/s", "r", files=lived.disk) as db:
        assert db.backup(lived.destination).made == ()


def test_threads_commit_and_back_up_at_once(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s", durability="os", memtable_bytes=64 << 10) as db:
        reports: list[kvwal.BackupReport] = []

        def write() -> None:
            for n in range(4000):
                db.put(b"%04d" % (n % 700), b"%d" % n * 30)

        def back_up() -> None:
            reports.extend(db.backup(tmp_path / "b") for _ in range(6))

        run_threads(write, back_up)
        db.sync()
        reports.append(db.backup(tmp_path / "b"))
        check_store(db)
        expected = dict(db.items())
    positions = [int(report.position) for report in reports]
    assert positions == sorted(positions)
    kvwal.restore(tmp_path / "b", tmp_path / "r")
    with kvwal.open(tmp_path / "r") as other:
        assert dict(other.items()) == expected
        assert other.verify().ok


def holds_for_backup(lived: Lived) -> list[Any]:
    return [pin for pin in lived.db.pins() if pin.purpose == "backup"]


# What comes while a generator is collected is swallowed by the interpreter.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored (in. <|while closing )generator:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("stride", [150, pytest.param(1, marks=pytest.mark.slow)])
def test_a_backup_may_be_interrupted_anywhere(stride: int) -> None:
    lived = Lived(12)
    lived.live(12)
    lived.db.checkpoint()
    step, ended = 1, False
    while not ended:
        lived.destination = DirectoryDestination(f"/b{step}", files=lived.disk)
        ended = interrupted_at(step, lambda: backup(lived.db.engine, lived.destination)) is None
        check_store(lived.db)
        if holds_for_backup(lived):
            # The interruption refers to the frames that hold it, and these to the interruption.
            gc.collect()
        assert not holds_for_backup(lived)
        step += stride
        if not step % 10:
            backup(lived.db.engine, lived.destination)
            check_destination(lived.destination)


def test_the_destination_of_another_store_is_refused() -> None:
    lived = Lived(13)
    lived.live(3)
    with kvwal.open("/other", files=lived.disk, background=False) as other:
        other.put(b"k", b"v")
        other.backup(lived.destination)
        before = objects(lived.destination)
    with pytest.raises(kvwal.BackupDestinationError):
        backup(lived.db.engine, lived.destination)
    assert objects(lived.destination) == before


def test_wrong_arguments_and_closed_stores() -> None:
    lived = Lived(14)
    engine: Any = lived.db.engine
    with pytest.raises(ValueError, match="base is"):
        backup(engine, lived.destination, base="some")  # type: ignore[arg-type]
    wrong: Any = 7
    with pytest.raises(TypeError):
        lived.db.backup(wrong)
    with pytest.raises(ValueError, match="empty"):
        lived.db.backup("")
    lived.db.close()
    with pytest.raises(kvwal.ClosedError):
        lived.db.backup(lived.destination)


def test_in_a_forked_child_it_is_refused(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db.put(b"k", b"v")
        child = os.fork()
        if not child:
            try:
                db.backup(tmp_path / "b")
            except kvwal.ForkedError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert db.backup(tmp_path / "b").made


def test_progress_is_told_in_bytes_and_comes_to_its_end() -> None:
    lived = a_large_store()
    told: list[tuple[int, int]] = []
    report = backup(lived.db.engine, lived.destination, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (report.pages * 4096, report.pages * 4096)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("kind", ["base", "unit"])
def test_what_the_destination_stores_wrongly_is_told_and_not_built_on(kind: str) -> None:
    lived = Lived(7)
    lived.live(20)

    class Bad(DirectoryDestination):
        def put_new(self, name: str, data: bytes | Iterable[Buffer]) -> bool:
            raw = bytearray(data if isinstance(data, bytes) else b"".join(map(bytes, data)))
            if f"/{kind}/" in name:
                raw[len(raw) // 2] ^= 4
            return super().put_new(name, bytes(raw))

    with pytest.raises(kvwal.CorruptionError, match=f"/{kind}/.*other bytes than were put"):
        backup(lived.db.engine, Bad("/b", files=lived.disk))
    assert not [name for name in objects(lived.destination) if f"/{kind}/" in name]
    backup(lived.db.engine, lived.destination)
    with restored(lived) as db:
        lived.check(db, lived.db.last_seqno)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_has_the_name_of_its_object_and_is_none_is_named(tmp_path: Path, kind: str) -> None:
    """As an object that was moved to another disk, with a link in its place: no restore would read it."""
    with kvwal.open(tmp_path / "store") as db:
        db[b"key"] = b"value"
        name = db.backup(tmp_path / "d").base
        taken = tmp_path / "d" / name
        taken.rename(tmp_path / "elsewhere")
        if kind == "link":
            taken.symlink_to(tmp_path / "elsewhere")
        elif kind == "directory":
            taken.mkdir()
        else:
            os.mkfifo(taken)
        with pytest.raises(kvwal.BackupDestinationError, match=f"{name} in .* is not a regular file"):
            db.backup(tmp_path / "d")
        taken.rmdir() if kind == "directory" else taken.unlink()
        assert db.backup(tmp_path / "d").base == name
    kvwal.restore(tmp_path / "d", tmp_path / "restored")
