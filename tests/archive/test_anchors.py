"""Issues and tests of Litestream, pgBackRest, SlateDB and FoundationDB about archives and restores, restated.

Each test names what it restates. What is an LTX file or a WAL segment there is a unit here, a snapshot a base, and
compaction merging. Others of Litestream are in test_chain.py (#771, #1038, #1056: times), test_keeping.py
(TestDB_CompactAndRestore_Issue771), test_archiver_failures.py (#781) and test_archive.py (a restored store goes on).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from archive_fixtures import BusyDestination, Rig, archiver_of, held_of, restored

import kvwal
from kvwal.backup.archive import make_base
from kvwal.backup.checking import status_of, verify
from kvwal.backup.claims import Superseded
from kvwal.backup.keeping import Keep, Merging, plan_pruning, prune
from kvwal.backup.names import IDENTITY
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.units import UnitBuilder
from kvwal.keys import Seqno
from kvwal.times import time_of


@pytest.fixture
def rig() -> Rig:
    return Rig()


def lives(rig: Rig, archiver: Any, units: int, *, apart_s: float = 20) -> None:
    for _ in range(units):
        rig.disk.pass_time(apart_s)
        rig.writer.some(2)
        archiver.step(now=True)


def merge_all(rig: Rig, place: Any = None) -> None:
    place = place or rig.place
    merging, before = Merging(place, rig.store_id, rig.db.engine.upkeep.consumers.line), 0
    while merging.step(rig.db.last_seqno) and (objects := len(list(place.list_after("")))) != before:
        before = objects


def all_restored(rig: Rig, moments: Any) -> None:
    """By `kvwal.restore`, and by what its user reads then."""
    for at in moments:
        disk = rig.other.copy()
        assert restored(disk, at) == rig.writer.model[Seqno(at)]


# Litestream.


class KeepsAll(DirectoryDestination):
    """Merged units stay beside those that they were made of."""

    def delete(self, name: str) -> None:
        pass


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_restore_with_a_missing_compacted_file(seed: int) -> None:
    """restore_fuzz_test.go: what is missing at one level is read from another one; #224, #535, #805, sqld#766: where no
    level has it, the moment is refused and its neighbours are named, and what is behind it is not lost with it.
    """
    rig, draw = Rig(), random.Random(seed)
    archiver = rig.archiver()
    archiver.step()
    for _ in range(4):
        lives(rig, archiver, draw.randint(2, 5), apart_s=draw.choice([5, 40]))
        if draw.random() < 0.5:
            rig.db.checkpoint()
            make_base(rig.db.engine, rig.place, lambda: None)
        merge_all(rig, KeepsAll("/b", files=rig.other) if draw.random() < 0.7 else None)
    held, newest, refused = held_of(rig.db, rig.place), archiver.mark, 0
    for missing in map(str, (*held.bases, *held.units)):
        disk = rig.other.copy()
        DirectoryDestination("/b", files=disk).delete(missing)
        (line,) = status_of(DirectoryDestination("/b", files=disk)).lines
        moments = {at for stretch in line.moments for at in range(stretch.first, stretch.last + 1)}
        for at in range(newest + 1):
            if at in moments:
                assert restored(disk, at, f"/r{at}") == rig.writer.model[Seqno(at)]
                continue
            refused += 1
            with pytest.raises(kvwal.NotInBackup if moments else kvwal.BackupDestinationError) as told:
                kvwal.restore(DirectoryDestination("/b", files=disk), "/r", at=at, files=disk)
            before, after = getattr(told.value, "nearest", (None, None))
            assert before == max((each for each in moments if each < at), default=None)
            assert after == min((each for each in moments if each > at), default=None)
    assert refused


class Late(DirectoryDestination):
    """Of an object that has just been put, its first half comes at first."""

    late_reads = 0

    def get(self, name: str, **where: Any) -> bytes:
        data = super().get(name, **where)
        if "/unit/" in name and self.late_reads:
            self.late_reads -= 1
            return data[: len(data) // 2]
        return data


def test_store_compaction_remote(rig: Rig) -> None:
    """store_compaction_remote_test.go: a destination that shows objects in part at first is merged without harm."""
    archiver = rig.archiver()
    archiver.step()
    lives(rig, archiver, 12)
    line = rig.db.engine.upkeep.consumers.line
    failed = 0
    for late_reads in range(1, 20):
        place = Late("/b", files=rig.other)
        place.late_reads = late_reads
        merging = Merging(place, rig.store_id, line)
        with suppress(kvwal.CorruptionError):
            while merging.step(archiver.mark):
                pass
            break
        failed += 1
        rig.check(0, 24)
    assert failed > 2
    merge_all(rig)
    assert {unit.level for unit in held_of(rig.db, rig.place).units} > {0}
    all_restored(rig, range(25))


def test_compaction_of_bursts_comes_to_its_end(rig: Rig) -> None:
    """#1199: under load that came in bursts, with checkpoints between, the merging into levels 2 and 3 never ended."""
    archiver = rig.archiver()
    archiver.step()
    for _ in range(60):
        rig.disk.pass_time(100)
        for _ in range(4):
            rig.writer.some(3, size=300)
            rig.db.checkpoint()
            archiver.step(now=True)
        merge_all(rig)
    levels = [unit.level for unit in held_of(rig.db, rig.place).units]
    assert {2, 3} <= set(levels)
    assert len(levels) < 60
    all_restored(rig, range(0, archiver.mark + 1, 37))


def test_checkpoints_while_the_archiver_was_down(rig: Rig) -> None:
    """#752, a relative of #1199: the store goes on without its archiver, makes checkpoints, and is opened again."""
    for _ in range(4):
        archiver = rig.archiver()
        archiver.step()
        rig.writer.some(3)
        archiver.step(now=True)
        archiver.close()
        for _ in range(3):
            rig.writer.some(2, size=2000)
            rig.db.checkpoint()
        rig.reopen()
    archiver = rig.archiver()
    archiver.step(now=True)
    first = held_of(rig.db, rig.place).stretches()[-1].first
    assert archiver.mark == rig.db.last_seqno == 36
    all_restored(rig, range(first, 37))
    # What the log had let go of is a gap that is said, and nothing that is wrong.
    assert [tuple(stretch) for stretch in status_of(rig.place).lines[0].moments][-1] == (first, 36)


def test_writes_that_leave_the_size_of_the_log_unchanged(rig: Rig) -> None:
    """#1037, #1083: after writes into space that the log had already, nothing was put, and nothing was said."""
    archiver = rig.archiver()
    archiver.step()

    def sizes() -> dict[str, int]:
        names = rig.disk.open_directory("/kv").names()
        return {name: len(rig.disk.read(f"/kv/{name}")) for name in names if rig.disk.kind(f"/kv/{name}") == "file"}

    rig.writer.put(b"k", b"0")
    before = sizes()
    for n in range(1, 10):
        rig.writer.put(b"k", b"%d" % n)
        assert sizes() == before
        archiver.step(now=True)
        assert archiver.mark == rig.db.last_seqno
    all_restored(rig, range(11))


def test_it_archives_without_being_told_to_end(tmp_path: Path) -> None:
    """#592: it had stopped, and went on when it was told to end."""
    with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, tmp_path / "b", rpo_s=0.01) as archive:
        for n in range(5):
            db[b"k"] = b"%d" % n
            while archive.status().mark != db.position:
                time.sleep(0.005)
            assert archive.status().lag_s == 0.0
        assert kvwal.restore(tmp_path / "b", tmp_path / "r").restored == 5


def test_time_bounds_of_what_only_a_snapshot_has(rig: Rig) -> None:
    """#1056, #1079: a time that only a snapshot has was refused, since bounds were those of the finest level."""
    archiver, times_us = rig.archiver(), {}
    archiver.step()
    for _ in range(5):
        lives(rig, archiver, 4, apart_s=86400 / 4)
        rig.db.checkpoint()
        make_base(rig.db.engine, rig.place, lambda: None)
        times_us[rig.db.last_seqno] = rig.disk.clock_us
    merge_all(rig)
    pruning = plan_pruning(rig.place, held_of(rig.db, rig.place), Keep(pitr_s=86400, daily=2, monthly=0), 1 << 60)
    prune(rig.place, pruning)
    assert len(pruning.kept) == 2
    # No unit leads to any of these, and one goes on from the last of them alone.
    for at in (*pruning.kept, pruning.keep_from):
        all_restored(rig, [at])
    disk = rig.other.copy()
    place, moment = DirectoryDestination("/b", files=disk), time_of(times_us[pruning.keep_from])
    assert kvwal.restore(place, "/r", at=moment, files=disk).restored == pruning.keep_from
    # Which commit was the last one is not known of the others; their numbers are.
    for at in pruning.kept:
        with pytest.raises(kvwal.NotInBackup) as told:
            kvwal.restore(place, "/other", at=time_of(times_us[at]), files=disk)
        assert told.value.nearest[0] == at


# pgBackRest.


def flip(rig: Rig, name: str) -> None:
    rig.other.flip(f"/b/{name}", len(rig.other.read(f"/b/{name}")) - 1)


def cut(rig: Rig, name: str) -> None:
    rig.other.cut(f"/b/{name}", len(rig.other.read(f"/b/{name}")) - 1)


def remove(rig: Rig, name: str) -> None:
    rig.place.delete(name)


def duplicate(rig: Rig, name: str) -> None:
    merge_all(rig, KeepsAll("/b", files=rig.other))


def add_foreign(rig: Rig, name: str) -> None:
    rig.place.put_new("notes.txt", b"not of an archive")


def put_other(rig: Rig, name: str) -> None:
    """A valid unit in the place of one, of the same commits but for the last."""
    unit = next(each for each in held_of(rig.db, rig.place).units if str(each) == name)
    builder = UnitBuilder(rig.store_id, unit.line, unit.first, bytes(32))
    for _ in range(unit.last - unit.first):
        builder.add(1, 1, b"")
    rig.place.delete(name)
    rig.place.put_new(name, builder.encode()[1])


# What is done, to which object (of the bases or the units, or one by name), what is found, and which commits are lost.
VERIFIED: dict[str, tuple[Callable[[Rig, str], None], tuple[str, int], str, tuple[int, int] | None]] = {
    "nothing": (add_foreign, ("unit", 0), "", None),
    "2.1 a checksum of WAL does not match": (flip, ("unit", 2), "SHA-256", None),
    "2.2 WAL is missing": (remove, ("unit", 2), "", (5, 6)),
    "2.3 duplicates are skipped": (duplicate, ("unit", 0), "", None),
    "2.4 what is none of it is skipped": (add_foreign, ("unit", 0), "", None),
    "2.5 the size of WAL is another one": (cut, ("unit", 2), "", None),
    "1.3 histories do not match": (put_other, ("unit", 3), "does not follow", None),
    "4.1 a file of a backup is missing": (remove, ("base", 0), "builds on is missing", (0, 11)),
    "4.2 a checksum of a backup does not match": (flip, ("base", 1), "digest", None),
    "4.2 the size of a backup is another one": (cut, ("base", 1), "", None),
}


@pytest.mark.parametrize("case", VERIFIED)
def test_verify_command(rig: Rig, case: str) -> None:
    """#1032, the list of what verify finds."""
    archiver = rig.archiver()
    archiver.step()
    lives(rig, archiver, 3)
    rig.writer.some(1)
    archiver.step(now=True)
    rig.db.checkpoint()
    make_base(rig.db.engine, rig.place, lambda: None)
    lives(rig, archiver, 2)
    held = held_of(rig.db, rig.place)
    does, (kind, number), says, lost = VERIFIED[case]
    name = str((held.bases if kind == "base" else held.units)[number])
    does(rig, name)
    found = verify(rig.place, deep=True, now_us=rig.disk.now_us, monotonic_s=lambda: 0.0)
    if says == "builds on is missing":
        # The difference that cannot be used is named, and not what is not there.
        name = str(held.bases[1])
    is_damaged = bool(says) or does is cut
    assert {problem.file for problem in found.problems} == ({name} if is_damaged else set())
    assert all(says in problem.reason for problem in found.problems)
    assert [(gap.first, gap.last) for gap in found.gaps] == ([lost] if lost else [])
    assert status_of(rig.place).ok == found.ok == (not is_damaged and lost is None)


def test_verify_command_of_the_archives_own_file(rig: Rig) -> None:
    """#1032: the file that says whose archive it is exists, and its checksum matches."""
    rig.archiver().step()
    rig.other.flip(f"/b/{IDENTITY}", 20)
    with pytest.raises(kvwal.CorruptionError) as told:
        verify(rig.place, now_us=rig.disk.now_us, monotonic_s=lambda: 0.0)
    assert told.value.file == IDENTITY
    rig.place.delete(IDENTITY)
    with pytest.raises(kvwal.BackupDestinationError):
        verify(rig.place, now_us=rig.disk.now_us, monotonic_s=lambda: 0.0)


# SlateDB.


def test_writer_fencing_bug(rig: Rig) -> None:
    """test_writer_fencing_bug (#352, #1622): a writer stands still before it sends; another one takes over, and what
    would have been in its way is merged and deleted. What it then sends is made, and must not be acknowledged.
    """
    place = BusyDestination("/b", files=rig.other)
    first = archiver_of(rig.db, place)
    first.step()
    rig.writer.some(3)

    def take_over() -> None:
        place.meanwhile = lambda: None
        second = rig.archiver()
        second.step()
        lives(rig, second, 6, apart_s=40)
        merge_all(rig)
        second.close()
        in_the_way.extend(unit for unit in held_of(rig.db, rig.place).units if (unit.first, unit.last) == (0, 3))

    in_the_way: list[Any] = []
    place.meanwhile = take_over
    with pytest.raises(Superseded):
        first.step(now=True)
    assert not in_the_way
    assert first.mark == 0
    assert status_of(rig.place).mark == (rig.db.engine.upkeep.consumers.line, 15)
    # What it sent is of the same history, and does no harm.
    rig.check(0, 15)
    all_restored(rig, (0, 2, 3, 4, 15))
    merge_all(rig)
    rig.check(0, 15)


# FoundationDB.


def content(reader: Any, tables: Any, start: bytes, stop: bytes) -> list[list[tuple[bytes, bytes]]]:
    """A range of keys, of table 0 and of each other one."""
    views = [reader, *(table.within(reader) for table in tables)]
    return [list(view.scan(start, stop)) for view in views]


@pytest.mark.parametrize("seed", range(3))
def test_restore_validation(seed: int, tmp_path: Path) -> None:
    """#12573, #12648: what was restored is compared with its source, a range of keys after the other."""
    draw = random.Random(seed)
    with kvwal.open(tmp_path / "kv", background=False, keep_history_bytes=1 << 30) as db:
        with kvwal.archive(db, tmp_path / "b", rpo_s=0.01) as archive:
            # What came before its first base is not among the moments.
            assert archive.flush(60)
            for n in range(60):
                key = b"%03d" % draw.randrange(200)
                if n % 7 == 6:
                    db.delete_range(key, b"%03d" % (int(key) + 20))
                db.table("t", bytes, bytes)[key] = b"%d" % n
                db.put(key, draw.randbytes(draw.choice([3, 300, 9000])))
                if n % 20 == 19:
                    db.checkpoint()
            assert archive.flush(60)
        for at in sorted(draw.sample(range(1, db.last_seqno + 1), 8)):
            into = tmp_path / f"r{at}"
            kvwal.restore(tmp_path / "b", into, at=at)
            ends = [b"", *sorted(b"%03d" % draw.randrange(200) for _ in range(6)), b"\xff"]
            with kvwal.open(into) as found, db.snapshot(at=at) as source, found.snapshot() as copy:
                has_table = "t" in [info.name for info in found.tables()]
                theirs = [found.table("t", bytes, bytes)] if has_table else []
                ours = [db.table("t", bytes, bytes)] if has_table else []
                for start, stop in pairwise(ends):
                    assert content(copy, theirs, start, stop) == content(source, ours, start, stop), (at, start)
