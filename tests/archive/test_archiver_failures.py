"""What goes wrong between an archiver and its destination, and what of it is noticed, tried again, or recorded."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from archive_fixtures import OPTIONS, Destination, Gated, Rig, Writer, check_all, held_of

import kvwal
from kvwal.backup import state
from kvwal.backup.archive import make_base
from kvwal.backup.chain import list_held
from kvwal.backup.claims import Superseded
from kvwal.backup.keeping import Keep
from kvwal.backup.names import IDENTITY, parse_name
from kvwal.backup.port import DirectoryDestination
from kvwal.errors import ArchiveDiverged, BackupDestinationError, CorruptionError, SystemCallError
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_the_mark_stays_until_what_comes_back_is_what_was_put(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(5)
    for answer in (lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""):

        class Wrong(Destination):
            def get(self, name: str, **where: Any) -> bytes:
                data = self.there.get(name, **where)
                return answer(data) if "/unit/" in name else data

        archiver._destination = archiver._claim._destination = Wrong(rig.place)
        with pytest.raises(CorruptionError, match="came back"):
            archiver.step(now=True)
        assert archiver.mark == 0
        assert [pin.seqno for pin in rig.db.pins() if pin.purpose == "archive"] == [0]
    archiver._destination = archiver._claim._destination = rig.place
    archiver.step(now=True)
    assert archiver.mark == 5
    rig.check(0, 5)


def test_a_base_that_comes_back_damaged_is_not_relied_on_and_is_made_again(rig: Rig) -> None:
    class Damaging(Destination):
        left = 1

        def put_new(self, name: str, data: Any) -> bool:
            made: bool = self.there.put_new(name, data)
            if made and "/base/" in name and self.left:
                self.left -= 1
                rig.other.flip(f"/b/{name}", 5000)
            return made

    rig.writer.some(3)
    rig.db.checkpoint()
    archiver = rig.archiver()
    archiver._destination = archiver._claim._destination = Damaging(rig.place)
    with pytest.raises(CorruptionError, match="/base/"):
        archiver.step()
    assert archiver.mark is None
    archiver.step()
    assert archiver.mark == 3
    assert kvwal.restore(rig.place, "/r", files=rig.disk).position


@pytest.mark.parametrize("fault", ["put lost", "put answer lost", "swap lost", "swap answer lost", "get lost"])
def test_lost_requests_and_lost_answers_cost_another_try_and_nothing_else(rig: Rig, fault: str) -> None:
    what, _, lost = fault.partition(" ")
    method = {"put": "put_new", "swap": "swap", "get": "get"}[what]

    class Losing(Destination):
        left = 2

        def __getattr__(self, name: str) -> Any:
            call = getattr(self.there, name)
            if name != method:
                return call

            def lossy(*arguments: Any, **more: Any) -> Any:
                self.left -= 1
                if self.left >= 0 and lost == "lost":
                    raise TimeoutError("no answer")
                answer = call(*arguments, **more)
                if self.left >= 0:
                    raise TimeoutError("no answer")
                return answer

            return lossy

    archiver = rig.archiver()
    archiver.step()
    for _ in range(3):
        rig.writer.some(5)
        archiver._destination = archiver._claim._destination = Losing(rig.place)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                archiver.step(now=True)
        archiver.step(now=True)
        assert archiver.mark == rig.db.last_seqno
    rig.check(0, 15)
    assert archiver.epoch == 1


def test_of_two_archivers_the_second_one_goes_on_and_the_first_one_ends(rig: Rig) -> None:
    first, second = rig.archiver(), rig.archiver()
    first.step()
    rig.writer.some(3)
    first.step(now=True)
    second.step()
    assert (first.epoch, second.epoch) == (1, 2)
    rig.writer.some(3)
    with pytest.raises(Superseded):
        first.step(now=True)
    assert first.mark == 3
    second.step(now=True)
    rig.writer.some(1)
    with pytest.raises(Superseded):
        first.step(now=True)
    second.step(now=True)
    assert second.mark == 7
    rig.check(0, 7)


class Deaf(Destination):
    """One that swaps, and whose answers are lost."""

    def swap(self, *arguments: Any) -> bool:
        self.there.swap(*arguments)
        raise TimeoutError("no answer")


@pytest.mark.parametrize("keep", [Keep(pitr_s=0, daily=0, monthly=0), None])
def test_one_that_was_superseded_while_its_store_is_idle_deletes_nothing(rig: Rig, keep: Keep | None) -> None:
    first = rig.archiver(keep=keep)
    first.step()
    for _ in range(3):
        rig.writer.some(3)
        rig.disk.pass_time(100)
        rig.db.checkpoint()
        rig.db.backup(rig.place)
        first.step(now=True)
    rig.archiver(keep=Keep()).step()
    before = sorted(rig.place.list_after(""))
    rig.clock.now_s += 3601
    with pytest.raises(Superseded):
        first.step()
    assert sorted(rig.place.list_after("")) == before


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("damaged", [None, b"{", b'{"crc":1,"v":1}'])
def test_a_mark_that_is_lost_or_damaged_is_put_anew(rig: Rig, is_idle: bool, damaged: bytes | None) -> None:
    def lose() -> None:
        if damaged is None:
            rig.place.delete(state.MARK)
        else:
            assert rig.place.swap(state.MARK, rig.place.get(state.MARK), damaged)

    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(3)
    archiver.step(now=True)
    for _ in range(2):
        lose()
        if not is_idle:
            rig.writer.some(3)
        rig.clock.now_s += 31
        archiver.step(now=True)
        assert archiver.trouble is None
        assert archiver.mark == rig.db.last_seqno
        members = state.read(rig.place, state.MARK)[1]
        assert (members["epoch"], members["seqno"]) == (1, rig.db.last_seqno)
    lose()
    archiver._hold.release()
    rig.writer.some(1)
    archiver.step(now=True)
    assert (archiver.epoch, archiver.mark) == (1, rig.db.last_seqno)
    rig.check(0, rig.db.last_seqno)
    lose()
    again = rig.archiver()
    again.step()
    # A damaged one may have been of the claim behind the one that is known.
    assert (again.epoch, again.mark) == (2 if damaged is None else 3, rig.db.last_seqno)


@pytest.mark.parametrize("is_idle", [False, True])
@pytest.mark.parametrize("keep", [Keep(), None])
@pytest.mark.parametrize("damaged", [None, b"{"])
def test_what_says_of_which_store_it_is_is_put_anew(
    rig: Rig, is_idle: bool, keep: Keep | None, damaged: bytes | None
) -> None:
    archiver = rig.archiver(keep=keep)
    archiver.step()
    rig.writer.some(3)
    archiver.step(now=True)
    said = rig.place.get(IDENTITY)
    rig.place.delete(IDENTITY)
    if damaged is not None:
        rig.place.put_new(IDENTITY, damaged)
    if not is_idle:
        rig.writer.some(3)
    rig.clock.now_s += 31
    archiver.step(now=True)
    assert archiver.trouble is None
    assert rig.place.get(IDENTITY) == said
    # That of another store is none that is lost.
    rig.place.delete(IDENTITY)
    state.claim(rig.place, bytes(16))
    rig.clock.now_s += 31
    archiver.step(now=True)
    assert "each needs its own" in str(archiver.trouble)


def test_answers_that_are_lost_supersede_no_one(rig: Rig) -> None:
    """The mark is moved, the archiver has to find where to go on, and hears nothing of what it swaps."""
    archiver = rig.archiver()
    archiver.step()
    for _ in range(2):
        rig.writer.some(3)
        archiver._destination = archiver._claim._destination = Deaf(rig.place)
        for _ in range(2):
            with suppress(TimeoutError):
                archiver.step(now=True)
            if archiver._hold is not None:
                archiver._hold.release()
        archiver._destination = archiver._claim._destination = rig.place
        archiver.step(now=True)
    assert (archiver.epoch, archiver.mark) == (1, 6)
    rig.check(0, 6)


@pytest.mark.parametrize("claims", [1, 2])
def test_of_two_archivers_the_first_one_ends_also_where_the_mark_was_lost(rig: Rig, claims: int) -> None:
    """A claim behind a lost mark has a greater number than those whose units are there."""
    for _ in range(claims):
        first = rig.archiver()
        first.step()
        rig.writer.some(3)
        first.step(now=True)
    rig.place.delete(state.MARK)
    second = rig.archiver()
    second.step()
    assert (first.epoch, second.epoch) == (claims, claims + 1)
    rig.writer.some(3)
    with pytest.raises(Superseded):
        first.step(now=True)
    second.step(now=True)
    rig.check(0, rig.db.last_seqno)


@pytest.mark.parametrize("is_whole", [False, True], ids=["all versions", "the newest one"])
@pytest.mark.parametrize("is_damaged", [False, True])
def test_of_archivers_that_never_put_a_unit_only_the_last_one_goes_on_where_the_mark_was_lost_or_damaged(
    rig: Rig, is_damaged: bool, is_whole: bool
) -> None:
    """No unit tells which number the claim before had, and where all versions of the mark are damaged nothing does."""
    first = rig.archiver()
    first.step()
    rig.writer.some(3)
    first.step(now=True)
    first.close()
    archivers: list[Any] = []
    flipped: set[str] = set()
    for _ in range(3):
        archivers.append(rig.archiver())
        archivers[-1].step(now=True)
        if not is_damaged:
            rig.place.delete(state.MARK)
            continue
        directory = rig.other.open_directory("/b/state")
        marks = sorted(each for each in directory.names() if each.startswith("mark~"))
        directory.close()
        for each in marks[-1:] if is_whole else marks:
            # Each once: what was flipped before is not to be whole again.
            if each not in flipped:
                rig.other.flip(f"/b/state/{each}", len(b'{"'))
                flipped.add(each)
    last = rig.archiver()
    last.step(now=True)
    if is_damaged and is_whole:
        assert last.epoch > max(each.epoch for each in archivers)
    for _ in range(2):
        rig.writer.some(3)
        rig.clock.now_s += 31
        last.step(now=True)
        for each in archivers:
            with pytest.raises(Superseded):
                each.step(now=True)
    assert last.mark == rig.db.last_seqno
    rig.check(0, rig.db.last_seqno)


def test_another_store_is_refused(rig: Rig) -> None:
    other = Rig()
    other.disk = SimulatedDisk(seed=9)
    other.db = kvwal.open("/other", files=other.disk, **OPTIONS)
    rig.archiver().step()
    other.place = rig.place
    archiver = other.archiver()
    with pytest.raises(BackupDestinationError, match="each needs its own"):
        archiver.step()
    assert archiver.mark is None


def copy_of(rig: Rig) -> Rig:
    """The same store on a copy of the disk, as it was when the power was cut; the archive is the same."""
    other = Rig()
    other.disk = rig.disk.crash(-1)
    other.db = kvwal.open("/kv", files=other.disk, **OPTIONS)
    other.writer = Writer(other.db, dict(rig.writer.model))
    other.other, other.place, other.clock = rig.other, rig.place, rig.clock
    return other


def test_a_copy_that_went_on_by_itself_is_refused_whatever_is_newer(rig: Rig) -> None:
    """libsql#687: a stale disk overwrote the newer archive."""
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(10)
    archiver.step(now=True)
    copy = copy_of(rig)
    rig.writer.some(5)
    archiver.step(now=True)
    before = sorted(rig.place.list_after(""))
    # Older than the archive.
    with pytest.raises(ArchiveDiverged) as caught:
        copy.archiver().step()
    assert caught.value.at_seqno == 10
    # As long, and longer, and other commits.
    for more in (2, 3, 40):
        for _ in range(more):
            copy.writer.put(b"other", b"%d" % more)
        with pytest.raises(ArchiveDiverged) as caught:
            copy.archiver().step()
        assert caught.value.at_seqno == 10
    after = sorted(rig.place.list_after(""))
    assert after == before
    # The one that is archived goes on: no claim was made.
    rig.writer.some(1)
    archiver.step(now=True)
    rig.check(0, 16)


def test_a_copy_is_refused_too_if_the_other_one_archives_while_it_claims(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(10)
    archiver.step(now=True)
    copy = copy_of(rig)
    copy.writer.put(b"other", b"1")
    mine = copy.archiver()
    take = mine._claim.take

    def late() -> Any:
        rig.writer.some(1)
        archiver.step(now=True)
        return take()

    mine._claim.take = late  # type: ignore[method-assign]  # in the middle of a step
    with pytest.raises(ArchiveDiverged):
        mine.step()
    assert mine.mark is None


def test_a_hold_that_is_dropped_leaves_a_gap_that_is_recorded_and_a_new_base_ends_it(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    archiver = rig.archiver(max_behind_bytes=30_000)
    archiver.step()
    rig.writer.some(5)
    archiver.step(now=True)
    for _ in range(4):
        rig.writer.some(40, size=1500)
        rig.db.checkpoint()
    assert not [pin for pin in rig.db.pins() if pin.purpose == "archive"]
    rig.writer.some(3)
    caplog.clear()
    archiver.step()
    archiver.step(now=True)
    held = held_of(rig.db, rig.place)
    assert [str(gap) for gap in held.gaps()] == ["6..164"]
    assert archiver.mark == 168
    assert "commits 6..164 cannot be restored" in caplog.text
    lost = state.read(rig.place, state.GAPS)[1]["lost"]
    assert [(gap["first"], gap["last"]) for gap in lost] == [(6, 164)]
    rig.check(0, 5)
    rig.check(165, 168)
    with pytest.raises(kvwal.SnapshotTooOld):
        held.plan(100)


def test_on_a_full_disk_consumers_go_first_and_the_archive_before_a_commit_is_refused(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """DECISIONS 10: laziest consumer, window, archive; and only then DiskFullError."""
    archiver = rig.archiver()
    archiver.step()
    consumer = rig.db.consumer("lazy", start="oldest", max_lag_bytes=1 << 30)
    rig.writer.model |= {Seqno(seqno): {} for seqno in range(rig.db.last_seqno + 1)}
    rig.writer.some(60, size=2000)
    rig.db.checkpoint()
    rig.db.checkpoint()
    rig.disk.capacity = rig.disk.used_bytes() + (1 << 20)
    archiver.step(now=True)
    for _ in range(3000):
        rig.writer.some(1, size=2000)
        if rig.db.last_seqno % 40 == 0:
            rig.db.checkpoint()
        if "the archive gets a gap" in caplog.text:
            break
    assert 0 < caplog.text.index("'lazy' is lost") < caplog.text.index("the archive gets a gap")
    consumer.close()
    rig.disk.capacity = None
    archiver.step()
    archiver.step(now=True)
    assert archiver.mark == rig.db.last_seqno
    rig.check(held_of(rig.db, rig.place).stretches()[-1].first, archiver.mark)


@pytest.mark.parametrize("stalls", [False, True])
def test_a_disk_that_is_away_while_the_store_is_idle_costs_no_commit(rig: Rig, tmp_path: Path, stalls: bool) -> None:
    """What tidies up sees no object, and is not to take all for lost."""
    (tmp_path / "mount").mkdir()
    rig.place = DirectoryDestination(tmp_path / "mount" / "b")
    archiver = rig.archiver(keep=Keep(), stalls=stalls)
    rig.writer.some(5)
    archiver.step(now=True)
    (tmp_path / "mount").rename(tmp_path / "away")
    rig.clock.now_s += 31
    archiver.step()
    assert "not there any more" in str(archiver.trouble)
    assert archiver.gaps == ()
    for _ in range(3):
        rig.writer.some(30, size=1500)
        rig.db.checkpoint()
        with pytest.raises(BackupDestinationError):
            archiver.step(now=True)
    (tmp_path / "away").rename(tmp_path / "mount")
    archiver.step(now=True)
    assert (archiver.mark, archiver.gaps) == (95, ())
    rig.check(5, 95)


@pytest.mark.parametrize("stalls", [False, True])
def test_log_stays_held_until_it_is_known_where_to_go_on(rig: Rig, stalls: bool) -> None:
    """A destination that lists nothing for a while, and then fails for a while, has lost nothing."""
    place = Gated(rig.place)
    archiver = rig.archiver(keep=Keep(), stalls=stalls, max_behind_bytes=180_000)
    rig.writer.some(5)
    archiver.step(now=True)
    archiver._destination = archiver._claim._destination = archiver._merging._destination = place
    place.lists = False
    rig.clock.now_s += 31
    archiver.step()
    assert [str(gap) for gap in archiver.gaps] == ["0..5"]
    place.lists, place.error = True, OSError("it is gone")
    for _ in range(3):
        with pytest.raises(OSError, match="it is gone"):
            archiver.step(now=True)
        rig.writer.some(30, size=1500)
        rig.db.checkpoint()
        assert [pin.seqno for pin in rig.db.pins() if pin.purpose == "archive"] == [5]
    assert not archiver.is_behind()
    if stalls:
        rig.writer.some(200, size=1500)
        assert archiver.is_behind(), "what is held counts from the mark on"
    place.error = None
    archiver.step(now=True)
    assert (archiver.mark, archiver.gaps) == (rig.db.last_seqno, ())
    assert [pin.seqno for pin in rig.db.pins() if pin.purpose == "archive"] == [archiver.mark]
    rig.check(5, archiver.mark)


def test_a_hold_that_is_dropped_while_the_log_is_still_there_leaves_no_gap(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(5)
    archiver._hold.release()
    archiver.step(now=True)
    archiver.step(now=True)
    assert archiver.mark == 5
    assert held_of(rig.db, rig.place).gaps() == []
    rig.check(0, 5)


def test_what_was_deleted_from_the_destination_is_a_gap_and_a_base_ends_it(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    for _ in range(3):
        rig.writer.some(5)
        archiver.step(now=True)
    archiver.close()
    rig.db.checkpoint()
    rig.place.delete(str(held_of(rig.db, rig.place).units[1]))
    again = rig.archiver()
    again.step()
    assert again.bases == 1
    assert [str(gap) for gap in held_of(rig.db, rig.place).gaps()] == ["6..14"]
    rig.writer.some(3)
    again.step(now=True)
    rig.check(15, 18)


def test_bases_come_as_units_grow_and_units_go_on_meanwhile(rig: Rig) -> None:
    def slow(engine: Any, destination: Any, tick: Any) -> None:
        rig.writer.some(3)
        rig.clock.now_s += 2
        before = archiver.mark
        tick()
        rig.clock.now_s += 2
        tick()
        assert before is None or archiver.mark == before + 3
        make_base(engine, destination, lambda: None)

    archiver = rig.archiver(base_bytes=3000, make_base=slow, codec="none")
    archiver.step()
    for _ in range(6):
        rig.writer.some(20)
        rig.db.checkpoint()
        archiver.step(now=True)
    assert archiver.bases > 2
    held = held_of(rig.db, rig.place)
    assert len(held.bases) > 2
    assert held.gaps() == []
    rig.check(0, archiver.mark)


def test_a_base_is_made_after_a_day_if_something_was_committed(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    for day in range(3):
        rig.clock.now_s += 86401
        archiver.step()
        assert archiver.bases == 1 + day
        rig.writer.some(1)
        archiver.step(now=True)
        assert archiver.bases == 2 + day


def test_ids_never_begin_again_after_a_clean_close_or_a_crash(rig: Rig) -> None:
    """litestream#781: after a restore ids began at 0, and nothing was saved until they were beyond the old ones."""
    for _ in range(4):
        archiver = rig.archiver()
        archiver.step()
        rig.writer.some(5)
        archiver.step(now=True)
        rig.reopen()
    assert rig.units() == [(0, 5), (5, 10), (10, 15), (15, 20)]
    rig.check(0, 20)


@pytest.mark.parametrize("every", [pytest.param(16), pytest.param(1, marks=pytest.mark.slow)])
def test_failing_calls_of_the_destination_change_nothing_but_time(every: int) -> None:
    """Each operation of the destination's disk fails once, before or after it is done: no moment is ever missing."""
    counted = Rig()
    archiver = counted.archiver()
    archiver.step()
    counted.writer.some(3)
    archiver.step(now=True)
    for nth in range(1, counted.other.operations + 1, every):
        for effect in ("none", "all"):
            rig = Rig()
            archiver = rig.archiver()
            rig.other.fail("any", nth, error=errno.EIO, effect=effect)
            failures = 0
            for turn in range(12):
                if turn in (2, 5):
                    rig.writer.some(3)
                try:
                    archiver.step(now=True)
                except (SystemCallError, BackupDestinationError):
                    failures += 1
                if archiver.mark is not None:
                    for disk in (rig.other.copy(), rig.other.crash()):
                        found = DirectoryDestination("/b", files=disk)
                        held = list_held(found, rig.db.engine.upkeep.consumers.line)
                        check_all(held, found, rig.store_id, rig.writer.model, 0, archiver.mark)
            assert failures <= 1
            assert archiver.mark == 6


def test_foreign_and_hostile_names_in_the_destination_do_no_harm(rig: Rig) -> None:
    archiver = rig.archiver()
    archiver.step()
    rig.writer.some(3)
    archiver.step(now=True)
    archiver.close()
    line = rig.db.engine.upkeep.consumers.line.hex()
    rig.place.put_new(f"{line}/unit/0/notes", b"x")
    rig.place.put_new(f"{line}/readme", b"x")
    rig.place.put_new("ffffffffffffffff/unit/0/00000000000000000000-00000000000000000009.r0", b"x")
    again = rig.archiver()
    again.step()
    assert again.mark == 3
    again.close()
    far = f"{line}/unit/0/00000000000000000003-09999999999999999999.r0"
    assert parse_name(far) is not None
    rig.place.put_new(far, b"x")
    again = rig.archiver()
    with pytest.raises(CorruptionError, match=far):
        again.step()
    again.step()
    assert again.mark == 3, "beyond the mark nothing relies on it, so it was deleted"
    far = f"{line}/base/09999999999999999999-00000000000000000007-00000000000000000000.r0"
    rig.place.put_new(far, b"x")
    with pytest.raises(ArchiveDiverged):
        rig.archiver().step()
    rig.place.delete(far)
    for mark in (b"", b"{}"):
        rig.place.delete(state.MARK)
        rig.place.swap(state.MARK, None, mark)
        again = rig.archiver()
        again.step()
        assert again.mark == 3
        again.close()
    for mark in (state.dump({"epoch": "x"}), state.dump({"epoch": -1}), state.dump({"epoch": 1 << 70})):
        rig.place.delete(state.MARK)
        rig.place.swap(state.MARK, None, mark)
        with pytest.raises(CorruptionError, match="state/mark"):
            rig.archiver().step()
