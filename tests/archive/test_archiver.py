"""Step by step: what the archiver puts, when its mark moves, and where it goes on."""

from __future__ import annotations

import pytest
from archive_fixtures import Rig, check_all, held_of, kill_before

from kvwal.backup.archiver import Archiver
from kvwal.backup.chain import list_held
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.units import UnitBuilder, line_digest
from kvwal.errors import ArchiveDiverged, CorruptionError
from kvwal.keys import Seqno


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_commit_waits_at_most_so_long_and_not_at_all_if_that_is_asked_for(rig: Rig) -> None:
    archiver = rig.archiver(rpo_s=5.0)
    assert archiver.step() is None
    assert (archiver.mark, archiver.epoch, archiver.bases) == (0, 1, 1)
    rig.writer.some(3)
    assert archiver.step() == 5.0
    rig.clock.now_s += 4
    rig.writer.some(2)
    assert archiver.step() == 1.0
    assert archiver.mark == 0
    rig.clock.now_s += 1
    assert archiver.step() is None
    assert archiver.mark == 5
    assert rig.units() == [(0, 5)]
    rig.writer.some(1)
    archiver.step(now=True)
    assert rig.units() == [(0, 5), (5, 6)]
    rig.check(0, 6)


def test_a_unit_is_cut_at_its_size(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.backup.archiver.UNIT_BYTES", 400)
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(40)
    archiver.step(now=True)
    assert archiver.mark == 40
    assert len(rig.units()) > 3
    assert archiver.units == len(rig.units())
    rig.check(0, 40)


def test_only_what_is_durable_is_archived() -> None:
    rig = Rig(durability="os")
    archiver = rig.archiver()
    rig.writer.some(5)
    archiver.step(now=True)
    assert archiver.mark == 0
    rig.db.sync()
    archiver.step(now=True)
    assert archiver.mark == 5


def test_the_log_beyond_the_mark_is_held_and_shown(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    for _ in range(4):
        rig.writer.some(40, size=1000)
        rig.db.checkpoint()
    (pin,) = [pin for pin in rig.db.pins() if pin.purpose == "archive"]
    assert pin.seqno == 0
    assert pin.held_bytes > 60_000
    archiver.step(now=True)
    assert held_from(rig) == [160]
    rig.check(0, 160)
    archiver.close()
    assert held_from(rig) == []


def held_from(rig: Rig) -> list[Seqno | None]:
    return [pin.seqno for pin in rig.db.pins() if pin.purpose == "archive"]


def test_each_unit_lets_go_of_its_own_commits_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.backup.archiver.UNIT_BYTES", 400)
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(40)
    rig.other.fail("rename", 3)
    with pytest.raises(OSError):
        archiver.step(now=True)
    assert 0 < archiver.mark < 40
    assert held_from(rig) == [archiver.mark]
    for _ in range(3):
        rig.writer.some(40, size=1000)
        rig.db.checkpoint()
    archiver.step(now=True)
    assert held_of(rig.db, rig.place).gaps() == []
    rig.check(0, 160)


def test_what_was_committed_without_it_is_held_when_it_begins(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    archiver.close()
    rig.writer.some(10)
    archiver = rig.archiver()
    archiver.step()
    assert (archiver.mark, held_from(rig)) == (0, [0])
    for _ in range(3):
        rig.writer.some(40, size=1000)
        rig.db.checkpoint()
    archiver.step(now=True)
    assert held_of(rig.db, rig.place).gaps() == []
    rig.check(0, 130)


def test_it_goes_on_after_a_restart_where_the_destination_ends(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(5)
    archiver.step(now=True)
    archiver.close()
    rig.writer.some(4)
    rig.reopen()
    rig.writer.some(3)
    archiver = rig.archiver()
    archiver.step(now=True)
    assert (archiver.mark, archiver.epoch, archiver.bases) == (12, 2, 0)
    assert rig.units() == [(0, 5), (5, 12)]
    rig.check(0, 12)


def killed_before_its_mark(rig: Rig) -> Archiver:
    """An archiver that has put a unit of five commits, and not said so."""
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(5)
    archiver._claim.move = lambda seqno, digest: (_ for _ in ()).throw(OSError("killed"))
    with pytest.raises(OSError, match="killed"):
        archiver.step(now=True)
    return archiver


def test_a_unit_whose_mark_was_not_written_is_adopted_after_it_was_read(rig: Rig) -> None:
    archiver = killed_before_its_mark(rig)
    assert archiver.mark == 0
    archiver.close()
    rig.writer.some(2)
    again = rig.archiver()
    again.step()
    assert again.mark == 5
    again.step(now=True)
    assert rig.units() == [(0, 5), (5, 7)]
    rig.check(0, 7)


def test_what_a_killed_archiver_has_left_is_made_durable_before_it_is_relied_on() -> None:
    """It is listed and read, and gone with the power, as long as no one has flushed its directory."""
    for nth in range(1, 99):
        rig = Rig()

        def program(rig: Rig = rig) -> None:
            archiver = rig.archiver()
            archiver.step()
            rig.writer.some(2)
            archiver.step(now=True)

        if not kill_before(rig.other, nth, program):
            break
        rig.place = DirectoryDestination("/b", files=rig.other)
        rig.writer.some(1)
        archiver = rig.archiver()
        archiver.step()
        line = rig.db.engine.upkeep.consumers.line
        for _ in range(2):
            found = DirectoryDestination("/b", files=rig.other.crash())
            held = list_held(found, line)
            first = held.stretches()[0].first
            check_all(held, found, rig.store_id, rig.writer.model, first, archiver.mark)
            archiver.step(now=True)
    assert nth > 20


def test_a_unit_beyond_the_mark_that_is_damaged_is_put_anew(rig: Rig) -> None:
    archiver = killed_before_its_mark(rig)
    archiver.close()
    name = str(held_of(rig.db, rig.place).units[0])
    rig.other.flip(f"/b/{name}", 300)
    again = rig.archiver()
    with pytest.raises(CorruptionError, match="unit/0"):
        again.step()
    again.step(now=True)
    assert again.mark == 5
    rig.check(0, 5)


def test_a_unit_of_another_history_that_came_meanwhile_is_not_taken_for_its_own(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(3)
    line = rig.db.engine.upkeep.consumers.line
    builder = UnitBuilder(rig.store_id, line, Seqno(0), line_digest(rig.store_id, line))
    for _ in range(3):
        builder.add(1, 5, b"")
    unit, data = builder.encode()
    rig.place.put_new(str(unit.header.name), data)
    with pytest.raises(ArchiveDiverged):
        archiver.step(now=True)
    assert archiver.mark == 0
    assert rig.place.get(str(unit.header.name)) == data
