"""A line whose units are of several chains is restored, merged and proved as one of a single chain is."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Any

import pytest
from archive_fixtures import Rig, restored

from kvwal.backup import replaying
from kvwal.backup.chain import list_held
from kvwal.backup.checking import status_of, verify
from kvwal.backup.keeping import Keep, Merging, plan_pruning, prune
from kvwal.backup.replaying import breaks, replay_units
from kvwal.backup.units import Unit, UnitBuilder, line_digest, open_unit
from kvwal.errors import CorruptionError
from kvwal.keys import Seqno


def verified(rig: Rig, deep: bool = False) -> Any:
    return verify(rig.place, deep=deep, now_us=lambda: 1, monotonic_s=time.monotonic)


def held(rig: Rig) -> Any:
    return list_held(rig.place, rig.db.engine.upkeep.consumers.line)


def two_chains(units: int = 1) -> tuple[Rig, Any]:
    """An archive from commit 10 on, and a backup from 3 on for a consumer of that position."""
    rig = Rig(keep_history_bytes=1 << 20, keep_history_s=1e9)
    rig.writer.some(10)
    rig.db.checkpoint()
    archiver = rig.archiver(rpo_s=1)
    archiver.step(now=True)
    for _ in range(units):
        rig.writer.some(8)
        archiver.step(now=True)
    with rig.db.consumer("late", start=3):
        pass
    rig.writer.model[rig.db.last_seqno] = rig.writer.model[rig.db.last_seqno - 1]
    rig.db.checkpoint()
    archiver.step(now=True)
    rig.db.backup(rig.place)
    for _ in range(5):
        rig.writer.some(1)
        archiver.step(now=True)
    return rig, archiver


def test_every_moment_beyond_a_change_of_chains_is_restored() -> None:
    rig, _ = two_chains()
    assert (3, 19) in rig.units()
    assert (18, 19) in rig.units()
    rig.check(10, 24)
    for at in (12, 19, 24):
        expected = rig.writer.model[Seqno(at)]
        assert restored(rig.other, at, f"/r{at}") == expected
    assert verified(rig).ok
    assert verified(rig, deep=True).ok
    assert status_of(rig.place).ok


def test_merging_and_thinning_leave_what_connects_chains() -> None:
    rig, archiver = two_chains(units=3)
    merging = Merging(rig.place, rig.store_id, held(rig).line)
    # The units of a window that is over; the clock of the commits goes on.
    for _ in range(4):
        rig.disk.pass_time(31)
        rig.writer.some(2)
        archiver.step(now=True)
        while merging.step(archiver.mark):
            pass
        rig.check(10, archiver.mark)
    assert {unit.level for unit in held(rig).units} > {0}
    prune(rig.place, plan_pruning(rig.place, held(rig), Keep(pitr_s=100, daily=0, monthly=0), rig.disk.clock_us))
    rig.check(held(rig).stretches()[-1].first, archiver.mark)
    assert verified(rig, deep=True).ok


def test_a_merged_unit_of_another_chain_takes_nothing_away() -> None:
    """The next unit goes on from one that it covers."""
    rig, archiver = two_chains()
    line, commits = held(rig).line, {}
    with rig.db.engine.upkeep.read(Seqno(3), Seqno(21), "test") as records:
        builder = UnitBuilder(rig.store_id, line, Seqno(3), line_digest(rig.store_id, line))
        for record in records:
            builder.add(record.kind, record.time_us, record.body)
            commits[record.seqno] = record.body
    unit, data = builder.encode(level=1)
    rig.place.put_new(str(unit.header.name), data)
    merging = Merging(rig.place, rig.store_id, line)
    while merging.step(archiver.mark):
        pass
    # That of the same chain went, those of the other one stay.
    assert (3, 19) not in rig.units()
    assert (20, 21) in rig.units()
    rig.check(10, 24)
    assert verified(rig, deep=True).ok


def test_where_no_thread_can_be_started_units_are_opened_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, _ = two_chains(3)
    there = held(rig)
    units = there.units_from(Seqno(3), there.reach(Seqno(3)))
    expected = [tuple(run) for run in replay_units(rig.place, rig.store_id, units, Seqno(3), units[-1].last, there)]
    assert len(units) > 1

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(replaying, "start_new_thread", refuse)
    runs = replay_units(rig.place, rig.store_id, units, Seqno(3), units[-1].last, there)
    assert [tuple(run) for run in runs] == expected


def test_two_units_are_in_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, _ = two_chains()
    # Of one chain: where it changes another one is looked at.
    units = held(rig).units_from(Seqno(19), Seqno(24))
    assert len(units) == 5
    # Each is opened at once, so that it is known when.
    monkeypatch.setattr(replaying, "_opening", lambda name, data: partial(lambda unit: unit, open_unit(name, data)))
    counts: list[int] = []

    class Counting:
        def get(self, name: str, **where: Any) -> bytes:
            gc.collect()
            counts.append(sum(isinstance(each, Unit) for each in gc.get_objects()))
            return rig.place.get(name, **where)

    place: Any = Counting()
    for run in replay_units(place, rig.store_id, units, Seqno(19), Seqno(24)):
        del run
    # The one that is being read, while the next one is fetched.
    assert max(counts) == 1


def test_a_chain_that_begins_behind_a_base_is_gone_on_with() -> None:
    rig = Rig(keep_history_bytes=1 << 20, keep_history_s=1e9)
    rig.writer.some(5)
    rig.db.checkpoint()
    rig.db.backup(rig.place)
    rig.writer.some(5)
    rig.db.checkpoint()
    rig.db.backup(rig.place)
    line = held(rig).line
    start = line_digest(rig.store_id, line)
    for first, last in ((5, 10), (10, 12)):
        if rig.db.last_seqno < last:
            rig.writer.some(2)
        builder = UnitBuilder(rig.store_id, line, Seqno(first), start)
        with rig.db.engine.upkeep.read(Seqno(first), Seqno(last), "test") as records:
            for record in records:
                builder.add(record.kind, record.time_us, record.body)
        unit, data = builder.encode()
        rig.place.put_new(str(unit.header.name), data)
    there = held(rig)
    units = there.units_from(Seqno(5), Seqno(12))
    assert sum(map(len, replay_units(rig.place, rig.store_id, units, Seqno(5), Seqno(12), there))) == 7
    assert not list(breaks(rig.place, there, units))
    builder = UnitBuilder(rig.store_id, line, Seqno(5), start)
    for seqno in range(6, 11):
        builder.add(1, seqno, b"other")
    unit, data = builder.encode(revision=1)
    rig.place.put_new(str(unit.header.name), data)
    with pytest.raises(CorruptionError, match="commit 10: other commits"):
        list(replay_units(rig.place, rig.store_id, (unit.header.name, units[-1]), Seqno(5), Seqno(12), there))
    # Without that base it is not known.
    less = type(there)(there.line, there.bases[:1], there.units, there.sizes)
    with pytest.raises(CorruptionError, match="commit 10: other commits"):
        list(replay_units(rig.place, rig.store_id, units, Seqno(5), Seqno(12), less))


@pytest.mark.parametrize("overlaps", [False, True])
def test_other_commits_are_not_taken_for_another_chain(overlaps: bool) -> None:
    rig = Rig()
    rig.db.backup(rig.place)
    line = held(rig).line
    # One chain has another commit 5 than the other has.
    ends = ((0, 5), (4, 8)) if overlaps else ((0, 5), (4, 5), (5, 8))
    digest = b"\1" * 32
    for first, last in ends:
        builder = UnitBuilder(rig.store_id, line, Seqno(first), b"\2" * 32 if not first else digest)
        for seqno in range(first + 1, last + 1):
            builder.add(1, seqno, b"other" if seqno == 5 and first else b"")
        digest = builder.digest
        unit, data = builder.encode()
        rig.place.put_new(str(unit.header.name), data)
    there = held(rig)
    units = there.units_from(Seqno(0), Seqno(8))
    with pytest.raises(CorruptionError, match="commit 5: other commits"):
        list(replay_units(rig.place, rig.store_id, units, Seqno(0), Seqno(8), there))
    assert len(list(breaks(rig.place, there, units))) == 1
    assert not status_of(rig.place).ok


def test_a_restore_does_without_units_before_the_base_that_do_not_connect() -> None:
    """Only a consumer is lost, and not the store."""
    rig, _ = two_chains()
    name = next(name for name in held(rig).units if (name.first, name.last) == (3, 19))
    rig.place.delete(str(name))
    line = held(rig).line
    for first, last in ((3, 12), (12, 19)):
        builder = UnitBuilder(rig.store_id, line, Seqno(first), bytes([first]) * 32)
        for seqno in range(first, last):
            builder.add(1, seqno, b"of another history")
        unit, data = builder.encode()
        rig.place.put_new(str(unit.header.name), data)
    assert restored(rig.other, 24) == rig.writer.model[Seqno(24)]
