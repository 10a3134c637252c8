"""Where an archiver goes on: nothing that the log still has is passed over, and what is passed over has a name."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from archive_fixtures import Destination, Rig, held_of, make_base

from kvwal.backup import state
from kvwal.backup.adopting import adopt
from kvwal.backup.bases import encode_base
from kvwal.backup.keeping import Keep
from kvwal.backup.names import BaseName
from kvwal.backup.reach import Reach, walked
from kvwal.backup.units import UnitBuilder
from kvwal.errors import ArchiveDiverged, CorruptionError, NotInBackup
from kvwal.keys import Seqno
from kvwal.log import sealed_beyond


def archived(**options: Any) -> Rig:
    """With ten commits, all of them archived, and no archiver any more."""
    rig = Rig(**options)
    rig.writer.some(10)
    archiver = rig.archiver()
    archiver.step(now=True)
    archiver.close()
    return rig


def test_a_base_beyond_the_mark_is_not_gone_on_from_while_the_log_has_what_is_between() -> None:
    rig = archived(keep_history_bytes=1 << 20, keep_history_s=1e9)
    rig.writer.some(10)
    rig.db.checkpoint()
    rig.db.backup(rig.place)
    assert [str(gap) for gap in held_of(rig.db, rig.place).gaps()] == ["11..19"]
    rig.writer.some(1)
    archiver = rig.archiver()
    archiver.step(now=True)
    assert archiver.mark == 21
    assert held_of(rig.db, rig.place).gaps() == []
    rig.check(0, 21)
    assert state.read(rig.place, state.GAPS)[1] == {}


@pytest.mark.parametrize("has_mark", [True, False])
def test_each_gap_that_is_passed_over_is_recorded_once(has_mark: bool) -> None:
    rig = archived()
    for _ in range(2):
        for _ in range(3):
            rig.writer.some(30, size=1500)
            rig.db.checkpoint()
        rig.db.backup(rig.place)
    held = held_of(rig.db, rig.place)
    gaps = [(gap.first, gap.last) for gap in held.gaps()]
    assert len(gaps) == 2
    for _ in range(2):
        if not has_mark:
            rig.place.delete(state.MARK)
        archiver = rig.archiver()
        archiver.step(now=True)
        archiver.close()
    assert archiver.bases == 0
    assert archiver.mark == rig.db.last_seqno
    assert [(gap["first"], gap["last"]) for gap in state.read(rig.place, state.GAPS)[1]["lost"]] == gaps


def test_commits_and_checkpoints_while_the_first_base_is_made() -> None:
    rig = Rig()
    rig.writer.some(5)

    def make(*arguments: Any) -> None:
        make_base(*arguments)
        for _ in range(3):
            rig.writer.some(40, size=1000)
            rig.db.checkpoint()

    archiver = rig.archiver(make_base=make)
    archiver.step(now=True)
    assert archiver.mark == 125
    assert (archiver.bases, held_of(rig.db, rig.place).gaps()) == (1, [])
    rig.check(5, 125)


def test_a_base_of_a_checkpoint_in_parts_without_its_units_is_not_gone_on_from() -> None:
    rig = archived()
    rig.writer.some(10)
    rig.db.checkpoint()
    held = held_of(rig.db, rig.place)
    for name in (*held.bases, *held.units):
        rig.place.delete(str(name))
    with rig.db.engine.upkeep.past.generation() as (meta, pager):
        meta = replace(meta, generation=meta.generation - 1, seqno=Seqno(meta.replay_through - 2))
        table = walked(pager, meta, Reach(), lambda: None)
        name = BaseName(meta.line, meta.replay_through, meta.generation, 0)
        rig.place.put_new(str(name), b"".join(encode_base(pager, meta, None, table, table.new(), bytes(32))))
    held = held_of(rig.db, rig.place)
    assert held.newest() == 20
    with pytest.raises(NotInBackup):
        adopt(rig.place, rig.store_id, held, None, Seqno(20))
    rig.writer.some(1)
    rig.db.checkpoint()
    archiver = rig.archiver()
    archiver.step(now=True)
    assert (archiver.mark, archiver.bases) == (21, 1)
    rig.check(21, 21)


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("has_log", [False, True])
def test_damage_of_the_newest_unit_does_not_end_the_archive(has_log: bool, is_idle: bool) -> None:
    rig = archived(**({"keep_history_bytes": 1 << 20, "keep_history_s": 1e9} if has_log else {}))
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(5)
    archiver.step(now=True)
    archiver.close()
    (name,) = (str(unit) for unit in held_of(rig.db, rig.place).units if unit.last == 15)
    for _ in range(0 if has_log else 3):
        rig.writer.some(30, size=1500)
        rig.db.checkpoint()
    rig.other.flip(f"/b/{name}", 300)
    if not is_idle:
        rig.writer.some(2)
    archiver = rig.archiver()
    with suppress(CorruptionError):
        archiver.step(now=True)
    archiver.step(now=True)
    assert archiver.mark == rig.db.last_seqno
    rig.check(0 if has_log else rig.db.last_seqno, rig.db.last_seqno)


class Failing(Destination):
    """One whose disk is gone as soon as a base is put."""

    error: Exception | None = OSError("it is gone")

    def put_new(self, name: str, data: Any) -> bool:
        if "/base/" in name and self.error is not None:
            raise self.error
        return bool(self.there.put_new(name, data))


def held_from(rig: Rig) -> list[Seqno | None]:
    return [pin.seqno for pin in rig.db.pins() if pin.purpose == "archive"]


@pytest.mark.parametrize("stalls", [False, True])
def test_a_try_to_begin_that_fails_leaves_no_hold_of_its_own(stalls: bool) -> None:
    rig = archived()
    archiver = rig.archiver(stalls=stalls)
    assert len(held_from(rig)) == 1
    archiver._destination = archiver._claim._destination = Failing(rig.place)
    with pytest.raises(OSError, match="it is gone") as caught:
        archiver.step()
    # The error, which refers to what it came through, is still there.
    assert len(held_from(rig)) == 1, caught
    archiver.close()
    assert held_from(rig) == []


@pytest.mark.parametrize("stalls", [False, True])
def test_log_is_held_for_one_that_begins_while_the_destination_is_away(stalls: bool) -> None:
    rig = archived()
    rig.writer.some(5)
    archiver = rig.archiver(stalls=stalls)
    archiver._destination = archiver._claim._destination = place = Failing(rig.place)
    for _ in range(3):
        with pytest.raises(OSError, match="it is gone"):
            archiver.step(now=True)
        rig.writer.some(30, size=1500)
        rig.db.checkpoint()
    place.error = None
    archiver.step(now=True)
    assert (archiver.mark, archiver.gaps, held_from(rig)) == (105, (), [105])
    rig.check(10, 105)


def test_what_is_held_before_it_has_begun_has_a_limit_whatever_the_log_has() -> None:
    """All that comes up to the limit, and of what there was as much."""
    most = 60_000
    rig = archived(keep_history_bytes=1 << 20, keep_history_s=1e9)
    for _ in range(6):
        rig.writer.some(30, size=1500)
        rig.db.checkpoint()
    consumers = rig.db.engine.upkeep.consumers

    def beyond(after: Any) -> int:
        return sealed_beyond(consumers.segments(), after)

    assert beyond(0) > 2 * most
    archiver = rig.archiver(max_behind_bytes=most)
    (begin,) = held_from(rig)
    assert begin is not None
    before = beyond(begin)
    assert most - (32 << 10) < before <= most
    while held_from(rig):
        assert beyond(begin) - before <= most
        rig.writer.some(1, size=1500)
    assert beyond(begin) - before > most
    # It begins all the same, and holds from there on.
    archiver.step(now=True)
    assert held_from(rig) == [archiver.mark]
    assert archiver.gaps == ()


@pytest.mark.parametrize("is_other", [False, True])
def test_a_unit_of_a_backup_with_the_same_commits_is_no_other_history(is_other: bool) -> None:
    rig = archived()
    archiver = rig.archiver()
    archiver.step(now=True)
    rig.writer.some(2)
    line = held_of(rig.db, rig.place).line
    builder = UnitBuilder(rig.store_id, line, Seqno(10), b"\1" * 32)
    with rig.db.engine.upkeep.read(Seqno(10), Seqno(12), "test") as records:
        for record in records:
            builder.add(record.kind, record.time_us, b"other" if is_other else record.body)
    unit, data = builder.encode()
    rig.place.put_new(str(unit.header.name), data)
    if is_other:
        with pytest.raises(ArchiveDiverged):
            archiver.step(now=True)
        return
    archiver.step(now=True)
    rig.writer.some(2)
    archiver.step(now=True)
    assert archiver.mark == 14
    assert [name.revision for name in held_of(rig.db, rig.place).units] == [0, 1, 0]
    rig.check(0, 14)


def test_a_base_comes_though_no_program_runs_long_enough_for_one() -> None:
    rig = Rig()
    for each in range(12):
        archiver = rig.archiver(base_bytes=3000, codec="none")
        archiver.step()
        rig.writer.some(20)
        rig.db.checkpoint()
        archiver.step(now=True)
        assert archiver.bases == (1 if each in (0, 2, 5, 8, 11) else 0), each
        archiver.close()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_base_comes_after_a_day_though_no_program_runs_for_one(is_damaged: bool) -> None:
    rig = Rig()

    def run_for_a_moment() -> int:
        archiver = rig.archiver()
        archiver.step()
        rig.writer.some(1)
        rig.db.checkpoint()
        archiver.step(now=True)
        archiver.close()
        assert archiver.mark == rig.db.last_seqno
        rig.disk.pass_time(0.3 * 86400)
        return len(held_of(rig.db, rig.place).bases)

    assert [run_for_a_moment() for _ in range(3)] == [1, 1, 1]
    if is_damaged:
        rig.other.flip(f"/b/{held_of(rig.db, rig.place).units[0]}", 30)
        assert run_for_a_moment() == 2, "the newest moments do without it"
        rig.check(rig.db.last_seqno, rig.db.last_seqno)
    else:
        assert [run_for_a_moment() for _ in range(5)] == [1, 2, 2, 2, 2]


def test_what_is_older_goes_though_no_program_runs_for_an_hour() -> None:
    rig = Rig()
    for _ in range(8):
        archiver = rig.archiver(keep=Keep(pitr_s=3600, daily=0, monthly=0), base_bytes=1)
        while archiver.step(now=True) == 0.0:
            pass
        for _ in range(5):
            rig.writer.some(1)
            rig.disk.pass_time(400)
            rig.clock.now_s += 1
            rig.db.checkpoint()
            archiver.step(now=True)
        archiver.close()
    held = held_of(rig.db, rig.place)
    assert held.stretches()[0].first > 20
    assert len(held.units) < 20
    rig.check(held.stretches()[0].first, 40)


def test_what_has_begun_is_told_before_it_tidies_up() -> None:
    rig = archived()
    archiver = rig.archiver(keep=Keep())
    archiver._merging.step = lambda *_, **__: pytest.fail("it tidies up")
    assert archiver.step(now=True) == 0.0
    assert archiver.mark == 10
