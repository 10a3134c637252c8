"""Merging loses no moment, thinning none that is to stay; wherever either is cut off."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from archive_fixtures import OPTIONS, Writer, archiver_of, check_all, held_of, kill_before, make_base

import kvwal
from kvwal.backup import state
from kvwal.backup.bases import encode_base
from kvwal.backup.chain import list_held, seqno_at
from kvwal.backup.checking import status_of, verify
from kvwal.backup.keeping import Keep, Merging, plan_pruning, prune
from kvwal.backup.making import backup
from kvwal.backup.names import BaseName
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.reach import Reach, walked
from kvwal.backup.units import UnitBuilder, line_digest
from kvwal.errors import BackupDestinationError, CorruptionError
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk, crash_every
from kvwal.times import time_of

DAY = 86400


class Rig:
    """A store whose commits are spread over time, and its archive on a disk of its own."""

    def __init__(self, seed: int = 0, disk: SimulatedDisk | None = None) -> None:
        self.random = random.Random(seed)
        self.disk = SimulatedDisk(seed=seed)
        self.other = SimulatedDisk(seed=seed + 1) if disk is None else disk
        self.db: Any = kvwal.open("/kv", files=self.disk, **OPTIONS)
        self.writer = Writer(self.db)
        self.place = DirectoryDestination("/b", files=self.other)
        self.archiver = archiver_of(self.db, self.place)
        self.archiver.step()
        self.store_id = self.db.engine.state.version.tree.meta.store_id
        self.line = self.db.engine.upkeep.consumers.line
        self.times = {0: 0}

    def live(self, units: int, *, apart_s: float, base_every: int = 0) -> None:
        for i in range(units):
            self.disk.pass_time(self.random.uniform(0, 2 * apart_s))
            for _ in range(self.random.randint(1, 3)):
                self.writer.some(1)
                self.times[self.db.last_seqno] = self.disk.clock_us
            self.archiver.step(now=True)
            if base_every and i % base_every == 0:
                self.base()

    def base(self) -> None:
        self.db.checkpoint()
        make_base(self.db.engine, self.place, lambda: None)

    def merging(self, place: Any = None) -> Merging:
        return Merging(self.place if place is None else place, self.store_id, self.line)

    def merge_all(self) -> int:
        merging, steps = self.merging(), 0
        while merging.step(self.archiver.mark):
            steps += 1
        return steps

    @property
    def held(self) -> Any:
        return held_of(self.db, self.place)

    def check(self, first: int = 0) -> None:
        check_all(self.held, self.place, self.store_id, self.writer.model, first, self.archiver.mark)


def test_units_are_merged_by_windows_of_time_and_no_moment_goes() -> None:
    rig = Rig()
    rig.live(120, apart_s=35)
    before = len(rig.held.units)
    assert rig.merge_all() > 10
    held = rig.held
    assert {unit.level for unit in held.units} >= {0, 3}
    assert len(held.units) < before / 5
    assert held.gaps() == []
    rig.check()
    assert rig.merge_all() == 0
    for seqno, at_us in rig.times.items():
        if seqno:
            assert seqno_at(rig.place, held, time_of(at_us)) == seqno


@pytest.mark.parametrize(
    ("seconds", "most"), [pytest.param(700, 35), pytest.param(7200, 75, marks=pytest.mark.slow)]
)
def test_what_has_a_unit_each_second_is_restored_from_some_tens_of_objects(seconds: int, most: int) -> None:
    """REQUIREMENTS B9: one day of a commit a second from at most 200. An hour before now is one unit."""
    rig = Rig()
    for _ in range(seconds):
        rig.disk.pass_time(1)
        rig.writer.some(1)
        rig.archiver.step(now=True)
        if rig.db.last_seqno % 350 == 0:
            rig.merge_all()
    rig.merge_all()
    assert len(rig.held.plan(rig.archiver.mark).units) < most


def test_moments_are_there_after_compaction_and_restart() -> None:
    """Litestream's TestDB_CompactAndRestore_Issue771: after a restart and a compaction moments had gone."""
    rig = Rig()
    for _ in range(3):
        rig.live(16, apart_s=30)
        rig.merge_all()
        rig.archiver.close()
        rig.db.close()
        rig.db = kvwal.open("/kv", files=rig.disk, **OPTIONS)
        rig.writer.db = rig.db
        rig.archiver = archiver_of(rig.db, rig.place)
        rig.archiver.step()
        rig.check()
        for seqno, at_us in rig.times.items():
            if seqno:
                assert seqno_at(rig.place, rig.held, time_of(at_us)) == seqno


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 30))])
def test_random_merging_pruning_bases_and_commits(seed: int) -> None:
    rig = Rig(seed)
    first = 0
    for _ in range(12):
        rig.live(rig.random.randint(1, 15), apart_s=rig.random.choice([1, 60, 4000]))
        what = rig.random.randrange(4)
        if what == 0:
            rig.base()
        elif what == 1:
            rig.merge_all()
        elif what == 2:
            merging = rig.merging()
            for _ in range(rig.random.randrange(4)):
                merging.step(rig.archiver.mark)
        else:
            keep = Keep(pitr_s=rig.random.choice([0, 600, DAY]), daily=rig.random.randrange(3), monthly=1)
            pruning = plan_pruning(rig.place, rig.held, keep, rig.disk.clock_us)
            assert not {m for s in pruning.unreachable for m in range(s.first, s.last + 1)} & set(pruning.kept)
            before = rig.held
            prune(rig.place, pruning)
            first = max(first, pruning.keep_from)
            lost = {m for s in pruning.unreachable for m in range(s.first, s.last + 1)}
            moments = {m for s in before.stretches() for m in range(s.first, s.last + 1)}
            assert {m for s in rig.held.stretches() for m in range(s.first, s.last + 1)} == moments - lost
            for seqno in pruning.kept:
                check_all(rig.held, rig.place, rig.store_id, rig.writer.model, seqno, seqno)
        rig.check(first)


def test_what_is_kept_is_all_of_late_and_one_a_day_and_one_a_month_of_old() -> None:
    rig = Rig()
    start_us = rig.disk.clock_us
    for _ in range(100):
        rig.live(3, apart_s=DAY / 3 / 2)
        rig.base()
    keep = Keep(pitr_s=10 * DAY, daily=5, monthly=3)
    pruning = plan_pruning(rig.place, rig.held, keep, rig.disk.clock_us)
    prune(rig.place, pruning)
    rig.check(pruning.keep_from)
    newest_us = rig.times[rig.archiver.mark]
    assert newest_us - rig.times[pruning.keep_from] >= 10 * DAY * 1_000_000
    assert newest_us - rig.times[pruning.keep_from + 1] <= 10 * DAY * 1_000_000
    assert 5 <= len(pruning.kept) <= 8
    days = [time_of(rig.times[seqno]).date() for seqno in pruning.kept]
    assert len(set(days)) == len(days)
    assert rig.times[pruning.kept[0]] < start_us + 40 * DAY * 1_000_000
    for seqno in pruning.kept:
        check_all(rig.held, rig.place, rig.store_id, rig.writer.model, seqno, seqno)
    again = plan_pruning(rig.place, rig.held, keep, rig.disk.clock_us)
    assert (again.delete, again.kept) == ((), pruning.kept)
    assert state.read(rig.place, state.KEPT)[1][rig.line.hex()] == pruning.keep_from


def test_the_newest_moment_stays_however_old_it_is_and_whatever_the_clock_says() -> None:
    rig = Rig()
    rig.live(5, apart_s=100)
    rig.base()
    rig.live(5, apart_s=100)
    for now_us in (0, rig.disk.clock_us, rig.disk.clock_us + 10**16):
        pruning = plan_pruning(rig.place, rig.held, Keep(pitr_s=0, daily=0, monthly=0), now_us)
        assert pruning.keep_from <= rig.archiver.mark
        assert rig.archiver.mark not in {m for s in pruning.unreachable for m in range(s.first, s.last + 1)}
    assert plan_pruning(rig.place, rig.held, Keep(pitr_s=math.inf, daily=0), rig.disk.clock_us).delete == ()
    # A clock that ran ahead does not delete: with pitr_s of a day, all of it is younger than the newest commit.
    assert plan_pruning(rig.place, rig.held, Keep(pitr_s=DAY), rig.disk.clock_us + 10**16).delete == ()
    empty = DirectoryDestination("/none", files=rig.other)
    assert plan_pruning(empty, list_held(empty, rig.line), Keep(), 0).delete == ()


def test_pruning_that_would_take_a_moment_that_is_to_stay_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """pgbackrest#93: too small a retention made backups unrestorable."""
    rig = Rig()
    rig.live(10, apart_s=DAY)
    rig.base()
    rig.live(10, apart_s=DAY)
    monkeypatch.setattr("kvwal.backup.keeping._thinned", lambda bases, times, keep: set())
    before = sorted(rig.place.list_after(""))

    class Hasty(type(rig.held)):  # type: ignore[misc]
        def plan(self, at: Any, **more: Any) -> Any:
            return super().plan(at, **more)._replace(after=10**6)

    held = rig.held
    hasty = Hasty(held.line, held.bases, held.units, held.sizes)
    with pytest.raises(BackupDestinationError, match="nothing was pruned: the moments"):
        plan_pruning(rig.place, hasty, Keep(pitr_s=5 * DAY), rig.disk.clock_us)
    assert sorted(rig.place.list_after("")) == before


def with_a_damaged_base() -> tuple[Rig, int]:
    """An archive of which `verify` has found the newest base damaged; and the moment of the one before."""
    rig = Rig()
    rig.live(5, apart_s=60)
    rig.base()
    before = rig.held.bases[-1].seqno
    rig.live(5, apart_s=60)
    rig.db.checkpoint()
    base = backup(rig.db.engine, rig.place, base="full").base
    rig.live(5, apart_s=60)
    rig.other.flip(f"/b/{base}", 8000)
    found = verify(rig.place, now_us=rig.disk.now_us, monotonic_s=rig.disk.monotonic_s)
    assert [problem.file for problem in found.problems] == [base]
    return rig, before


def test_what_verify_found_damaged_gives_no_moment_and_what_does_without_it_stays() -> None:
    rig, before = with_a_damaged_base()
    pruning = plan_pruning(rig.place, rig.held, Keep(pitr_s=0, daily=0, monthly=0), rig.disk.clock_us)
    assert pruning.unreachable == ((1, before - 1),)
    prune(rig.place, pruning)
    assert status_of(rig.place).lines[0].moments[-1] == (before, rig.archiver.mark)
    assert int(kvwal.restore(rig.place, "/r", files=rig.disk).restored) == rig.archiver.mark


def test_what_is_damaged_stays_as_long_as_a_moment_of_its_age_with_what_it_needs() -> None:
    rig = Rig()
    rig.live(5, apart_s=60)
    rig.db.checkpoint()
    backup(rig.db.engine, rig.place, base="full")
    rig.live(5, apart_s=60)
    first = str(rig.held.bases[0])
    rig.other.flip(f"/b/{first}", 60)
    assert not verify(rig.place, now_us=rig.disk.now_us, monotonic_s=rig.disk.monotonic_s).ok
    assert plan_pruning(rig.place, rig.held, Keep(pitr_s=DAY), rig.disk.clock_us).delete == ()
    pruning = plan_pruning(rig.place, rig.held, Keep(pitr_s=0, daily=0, monthly=0), rig.disk.clock_us)
    assert first in pruning.delete
    prune(rig.place, pruning)
    assert int(kvwal.restore(rig.place, "/r", files=rig.disk).restored) == rig.archiver.mark


def test_a_base_that_verify_found_damaged_is_not_the_one_of_its_day() -> None:
    rig, before = with_a_damaged_base()
    rig.base()
    pruning = plan_pruning(rig.place, rig.held, Keep(pitr_s=0, daily=1, monthly=0), rig.disk.clock_us)
    assert pruning.kept == (before,)


def test_a_base_of_a_checkpoint_in_parts_whose_units_are_damaged_is_no_moment_and_pruning_goes_on() -> None:
    rig = Rig()
    rig.live(5, apart_s=60)
    rig.db.checkpoint()
    with rig.db.engine.upkeep.past.generation() as (meta, pager):
        meta = replace(meta, seqno=Seqno(meta.replay_through - 1))
        table = walked(pager, meta, Reach(), lambda: None)
        name = BaseName(meta.line, meta.replay_through, meta.generation, 0)
        rig.place.put_new(str(name), b"".join(encode_base(pager, meta, None, table, table.new(), bytes(32))))
    rig.live(5, apart_s=60)
    rig.db.checkpoint()
    backup(rig.db.engine, rig.place, base="full")
    keep = Keep(pitr_s=0, daily=1, monthly=0)
    assert plan_pruning(rig.place, rig.held, keep, rig.disk.clock_us).kept == (name.seqno,)
    (unit,) = (unit for unit in rig.held.units if unit.last == name.seqno)
    rig.other.flip(f"/b/{unit}", 60)
    assert not verify(rig.place, now_us=rig.disk.now_us, monotonic_s=rig.disk.monotonic_s).ok
    assert plan_pruning(rig.place, rig.held, keep, rig.disk.clock_us).kept == (0,)


def test_a_damaged_unit_is_not_merged_and_nothing_is_deleted_for_it() -> None:
    rig = Rig()
    rig.live(20, apart_s=5)
    name = str(rig.held.units[3])
    rig.other.flip(f"/b/{name}", 200)
    before = len(rig.held.units)
    with pytest.raises(CorruptionError, match=name):
        while rig.merging().step(rig.archiver.mark):
            pass
    assert name in rig.held.sizes
    assert len(rig.held.units) <= before


def test_nothing_is_deleted_for_a_merged_unit_of_other_commits() -> None:
    rig = Rig()
    rig.live(6, apart_s=1)
    units = rig.held.units
    builder = UnitBuilder(rig.store_id, rig.line, Seqno(0), line_digest(rig.store_id, rig.line))
    for _ in range(units[3].last):
        builder.add(1, 5, b"of another history")
    unit, data = builder.encode(level=1)
    rig.place.put_new(str(unit.header.name), data)
    with pytest.raises(CorruptionError, match=r"other commits|is not that of|does not follow"):
        rig.merge_all()
    assert set(units) <= set(rig.held.units)


def test_a_merged_unit_that_comes_back_damaged_is_not_relied_on() -> None:
    rig = Rig()
    rig.live(20, apart_s=5)

    class Damaging(DirectoryDestination):
        def put_new(self, name: str, data: Any) -> bool:
            made = super().put_new(name, data)
            if made and "/unit/1/" in name:
                rig.other.flip(f"/b/{name}", 300)
            return made

    with pytest.raises(CorruptionError, match="/unit/1/"):
        rig.merging(Damaging("/b", files=rig.other)).step(rig.archiver.mark)
    assert {unit.level for unit in rig.held.units} == {0}
    rig.check()


@pytest.mark.parametrize("what", ["merging", "pruning"])
def test_a_power_cut_of_the_destination_while_it_is_tidied_loses_nothing_that_is_to_stay(what: str) -> None:
    rig = Rig(disk=SimulatedDisk(seed=3))
    rig.live(8, apart_s=15)
    rig.base()
    rig.live(4, apart_s=15)
    first = 0
    keep = Keep(pitr_s=60, daily=0, monthly=0)
    if what == "pruning":
        first = plan_pruning(rig.place, rig.held, keep, rig.disk.clock_us).keep_from
        assert first > 3

    def program(disk: Any, acknowledged: list[Any]) -> None:
        place = DirectoryDestination("/b", files=disk)
        if what == "merging":
            while rig.merging(place).step(rig.archiver.mark):
                pass
        else:
            prune(place, plan_pruning(place, list_held(place, rig.line), keep, rig.disk.clock_us))

    def check(disk: Any, acknowledged: list[Any]) -> None:
        place = DirectoryDestination("/b", files=disk)

        def all_there() -> None:
            held = list_held(place, rig.line)
            check_all(held, place, rig.store_id, rig.writer.model, first, rig.archiver.mark)

        all_there()
        # And again, from what was left; and once more with the power cut right behind it.
        program(disk, [])
        all_there()
        place = DirectoryDestination("/b", files=disk.crash())
        all_there()

    report = crash_every(program, check, disk=rig.other, states_per_point=3)
    assert report.points > 20


def test_merging_that_was_killed_before_the_flush_is_not_relied_on() -> None:
    """The merged unit is listed, and not on disk: deleting what it was made of would lose it with the power."""
    for nth in range(1, 99):
        rig = Rig()
        rig.live(6, apart_s=12)
        if not kill_before(rig.other, nth, rig.merge_all):
            break
        rig.place = DirectoryDestination("/b", files=rig.other)
        while rig.merging().step(rig.archiver.mark):
            found = DirectoryDestination("/b", files=rig.other.crash())
            held = list_held(found, rig.line)
            check_all(held, found, rig.store_id, rig.writer.model, 0, rig.archiver.mark)
    assert nth > 10


def test_a_restore_beside_an_archiver_that_merges_gets_its_moment() -> None:
    rig = Rig()
    rig.live(30, apart_s=20)
    merging = rig.merging()

    class Meanwhile(DirectoryDestination):
        merged = 0

        def get(self, name: str, **where: Any) -> bytes:
            if "/unit/" in name and self.merged < 5:
                self.merged += merging.step(rig.archiver.mark)
            return super().get(name, **where)

    place = Meanwhile("/b", files=rig.other)
    for at in (rig.archiver.mark, 20):
        kvwal.restore(place, f"/r{at}", at=at, files=rig.disk)
        assert place.merged > 2
        with kvwal.open(f"/r{at}", files=rig.disk, background=False) as found:
            assert dict(found) == rig.writer.model[at]


@pytest.mark.parametrize("options", [{"pitr_s": -1}, {"pitr_s": float("nan")}, {"daily": -1}, {"monthly": 1.5}])
def test_a_policy_that_cannot_be_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="is a number|at least 0"):
        Keep(**options)


def test_the_archiver_merges_and_prunes_by_itself_and_trouble_does_not_stop_units() -> None:
    rig = Rig()
    rig.archiver.close()
    now_s = 0.0
    archiver = rig.archiver = archiver_of(
        rig.db, rig.place, keep=Keep(pitr_s=7200, daily=0, monthly=0), monotonic_s=lambda: now_s
    )
    for _ in range(40):
        rig.live(2, apart_s=300)
        rig.base()
        now_s += 400
        while archiver.step(now=True) == 0.0:
            pass
    assert archiver.trouble is None
    assert {unit.level for unit in rig.held.units} >= {0, 2}
    # Bases that a later one builds on are moments as well.
    first = rig.held.stretches()[-1].first
    assert first > 0
    rig.check(first)
    for unit in rig.held.units[-4:]:
        rig.other.flip(f"/b/{unit}", 200)
    before = archiver.units
    for _ in range(6):
        rig.live(2, apart_s=200)
        now_s += 400
        while archiver.step(now=True) == 0.0:
            pass
    assert archiver.units == before + 12
    assert isinstance(archiver.trouble, CorruptionError)


def test_commits_before_the_first_base_that_a_consumer_reads_stay_as_long_as_moments_do() -> None:
    rig = Rig()
    rig.archiver.close()
    with rig.db.consumer("mailer", start="oldest"):
        rig.writer.model[rig.db.last_seqno] = rig.writer.model[Seqno(0)]
        rig.writer.some(10)
    rig.db.checkpoint()
    place = DirectoryDestination("/new", files=rig.other)
    archiver = archiver_of(rig.db, place, keep=Keep(pitr_s=DAY, daily=0, monthly=0))
    while archiver.step(now=True) == 0.0:
        pass
    assert archiver.trouble is None
    kvwal.restore(place, "/r", files=rig.other)
    with kvwal.open("/r", files=rig.other, **OPTIONS) as back, back.consumer("mailer") as consumer:
        changes = next(consumer).changes
        assert [change.key for change in changes] == [b"k%d" % seqno for seqno in range(2, 12)]
    rig.disk.pass_time(2 * DAY)
    rig.writer.some(1)
    archiver.step(now=True)
    pruning = plan_pruning(place, held_of(rig.db, place), Keep(pitr_s=DAY), rig.disk.clock_us)
    assert len(pruning.delete) == 1
    assert "/unit/" in pruning.delete[0]
