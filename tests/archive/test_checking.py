"""Status, gaps and verify say what is there, remember what was proved, and are right about what is not."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from archive_fixtures import OPTIONS, Writer, archiver_of, held_of, make_base
from click.testing import CliRunner
from crc32c import crc32c

import kvwal
from kvwal.backup import state
from kvwal.backup.chain import list_confirmed
from kvwal.backup.checking import accept_gap, lost_gaps, status_of, verify
from kvwal.backup.keeping import Keep, Merging, plan_pruning, prune
from kvwal.backup.making import backup
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.units import UnitBuilder, decode_unit
from kvwal.cli.app import app
from kvwal.errors import BackupDestinationError, RefusedError
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk


class Rig:
    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.db: Any = kvwal.open("/kv", files=self.disk, **OPTIONS)
        self.writer = Writer(self.db)
        self.place: Any = DirectoryDestination("/b", files=self.disk)
        self.archiver = archiver_of(self.db, self.place)
        self.now_s = 0.0
        self.read: list[str] = []

    def live(self, units: int) -> None:
        for _ in range(units):
            self.writer.some(2)
            self.archiver.step(now=True)

    @property
    def held(self) -> Any:
        return held_of(self.db, self.place)

    def verify(self, **options: Any) -> Any:
        rig = self

        class Seen(DirectoryDestination):
            def get(self, name: str, **where: Any) -> bytes:
                rig.read.append(name)
                rig.now_s += 1
                return super().get(name, **where)

        self.read.clear()
        place = Seen("/b", files=self.disk)
        return verify(place, now_us=self.disk.now_us, monotonic_s=lambda: self.now_s, **options)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.live(6)
    return rig


def test_status_tells_moments_mark_and_what_is_not_verified(rig: Rig) -> None:
    status = status_of(rig.place)
    (line,) = status.lines
    assert (line.moments, line.gaps, line.bases, line.units) == (((0, 12),), (), 1, len(rig.held.units))
    assert status.mark == (line.line, 12)
    assert (status.epoch, status.unverified, status.verified_time, status.ok) == (1, 1 + line.units, None, True)
    assert line.oldest_time is not None
    assert rig.verify().ok
    status = status_of(rig.place)
    assert status.unverified == 0
    assert status.verified_time is not None


def test_a_destination_without_a_backup_says_so() -> None:
    place = DirectoryDestination("/none", files=SimulatedDisk())
    for call in (status_of, lambda place: accept_gap(place, Seqno(1), Seqno(2), "x", 0)):
        with pytest.raises(BackupDestinationError, match="no backup"):
            call(place)
    state.claim(place, bytes(16))
    assert not status_of(place).ok


def test_what_was_proved_is_not_read_again_unless_that_is_asked_for(rig: Rig) -> None:
    first = rig.verify()
    assert (first.checked, first.skipped, first.left) == (len(rig.held.sizes), 0, 0)
    assert rig.verify(since_last=True).checked == 0
    assert not [name for name in rig.read if "/unit/" in name or "/base/" in name]
    rig.live(2)
    again = rig.verify(since_last=True)
    assert (again.checked, again.skipped) == (2, first.checked)
    assert rig.verify().checked == first.checked + 2
    deep = rig.verify(since_last=True, deep=True)
    assert deep.ok
    assert rig.verify(since_last=True, deep=True).checked == len(rig.held.bases)


def test_with_a_budget_what_was_proved_longest_ago_comes_first(rig: Rig) -> None:
    seen: set[str] = set()
    turns = 0
    while len(seen) < len(rig.held.sizes):
        report = rig.verify(budget_s=4)
        assert report.ok
        seen |= {name for name in rig.read if name in rig.held.sizes}
        turns += 1
        assert turns < 20
    assert turns > 1


@pytest.mark.parametrize("deep", [False, True])
def test_damage_is_named_and_forgotten_when_it_is_gone(rig: Rig, deep: bool) -> None:
    assert rig.verify(deep=deep).ok
    for name in (str(rig.held.units[2]), str(rig.held.bases[0])):
        path = f"/b/{name}"
        rig.disk.flip(path, 220)
        report = rig.verify(deep=deep)
        assert not report.ok
        assert {problem.file for problem in report.problems} == {name}
        status = status_of(rig.place)
        assert (status.unverified, status.ok) == (1, False)
        assert [problem.file for problem in status.problems] == [name]
        assert "(verify found that at " in status.problems[0].reason
        # It is told until it is seen that it is mended.
        rig.disk.flip(path, 220)
        assert not status_of(rig.place).ok
        assert rig.verify(deep=deep).ok
        assert status_of(rig.place).ok


def test_moments_that_need_what_is_damaged_are_not_shown(rig: Rig) -> None:
    unit, base = rig.held.units[2], rig.held.bases[0]
    rig.disk.flip(f"/b/{unit}", 220)
    assert not rig.verify().ok
    (line,) = status_of(rig.place).lines
    assert (line.moments, line.units) == (((0, unit.first),), len(rig.held.units))
    rig.disk.flip(f"/b/{base}", 220)
    assert not rig.verify().ok
    status = status_of(rig.place)
    assert status.lines[0].moments == ()
    assert [problem.file for problem in status.problems] == [str(base), str(unit)]
    # It is gone, and so is what was known of it.
    rig.place.delete(str(unit))
    assert [problem.file for problem in status_of(rig.place).problems] == [str(base)]
    rig.verify()
    assert str(unit) not in state.read(rig.place, state.VERIFIED)[1]["damaged"]


def test_a_deep_check_that_damage_ends_forgets_nothing_behind_it(rig: Rig) -> None:
    old, members = state.read(rig.place, state.MARK)
    rig.place.swap(state.MARK, old, state.dump({**members, "digest": "00" * 32}))
    rig.verify(deep=True)
    # The mark is compared with what this one has.
    name = str(rig.held.units[-1])
    data = rig.place.get(name)
    rig.place.delete(name)
    rig.place.put_new(name, data[:-1])
    rig.verify(deep=True)
    rig.place.delete(name)
    rig.place.put_new(name, data)
    assert rig.verify().ok
    assert [problem.file for problem in status_of(rig.place).problems] == [state.MARK]


@pytest.mark.parametrize(
    ("unit", "look", "error"),
    [
        # Proved alone, and damaged when it is replayed; or merged by an archiver meanwhile, before it is replayed, or
        # before the mark is compared with it.
        (1, 2, kvwal.CorruptionError("unit", None, "damaged meanwhile")),
        (1, 2, kvwal.ObjectMissing("unit", "/b")),
        (-1, 3, kvwal.ObjectMissing("unit", "/b")),
    ],
)
def test_a_deep_check_that_does_not_come_to_its_end_forgets_nothing(
    rig: Rig, unit: int, look: int, error: Exception
) -> None:
    known = str(rig.held.units[3])
    damage = {known: [5, True, None, "does not follow"]}
    state.change(rig.place, state.VERIFIED, lambda members: {**members, "damaged": damage})
    name, looks = str(rig.held.units[unit]), 0

    class Failing(DirectoryDestination):
        def get(self, asked: str, **where: Any) -> bytes:
            nonlocal looks
            looks += asked == name
            if asked == name and looks == look:
                raise error
            return super().get(asked, **where)

    verify(Failing("/b", files=rig.disk), deep=True, now_us=rig.disk.now_us, monotonic_s=lambda: 0.0)
    assert looks >= look
    assert known in [problem.file for problem in status_of(rig.place).problems]
    assert rig.verify(deep=True).ok
    assert known not in [problem.file for problem in status_of(rig.place).problems]


def test_an_object_of_a_newer_version_is_named_once_by_a_deep_check(rig: Rig) -> None:
    name = str(rig.held.units[1])
    data = bytearray(rig.place.get(name))
    data[8] = 9
    data[252:256] = crc32c(bytes(data[:252])).to_bytes(4, "little")
    rig.place.delete(name)
    rig.place.put_new(name, bytes(data))
    assert [problem.file for problem in rig.verify(deep=True).problems] == [name]


@pytest.mark.parametrize("bad", [None, "text", 5, {}, [None], ["text"], [{}], [{"line": 5, "first": "a", "last": 1}]])
def test_gaps_of_another_form_are_none(rig: Rig, bad: object) -> None:
    """Whatever has the right checksum: it may be of a program that does it wrong."""
    lost = rig.held.units[3]
    rig.db.checkpoint()
    make_base(rig.db.engine, rig.place, lambda: None)
    rig.place.delete(str(lost))
    state.change(rig.place, state.GAPS, lambda members: {"lost": bad, "accepted": bad})
    for found in (status_of(rig.place), rig.verify(deep=True)):
        assert not found.ok
    state.record_gap(rig.place, rig.held.line, 1, 2, 5)
    accept_gap(rig.place, Seqno(lost.first + 1), Seqno(11), "lost disk", 5)
    assert status_of(rig.place).ok


def flip_state(rig: Rig | Nightly, name: str) -> None:
    """Flip a bit in the newest version of an object of `state/`, in the first digit of its checksum."""
    directory, leaf = rig.disk.open_directory("/b/state"), name.removeprefix("state/")
    newest = max(each for each in directory.names() if each.startswith(leaf + "~"))
    directory.close()
    rig.disk.flip(f"/b/state/{newest}", len(b'{"crc":'))


def test_a_damaged_state_object_is_told_by_status_and_verify_and_ends_no_archive(rig: Rig) -> None:
    line = rig.held.line
    lost = rig.held.units[3]
    rig.db.checkpoint()
    make_base(rig.db.engine, rig.place, lambda: None)
    rig.place.delete(str(lost))
    gap = Seqno(lost.first + 1), Seqno(11)
    accept_gap(rig.place, *gap, "lost disk", 5)
    state.change(rig.place, state.KEPT, lambda members: {line.hex(): 0})
    assert rig.verify().ok
    # Without a mark an archive puts anew what the log has.
    for name in (state.GAPS, state.KEPT, state.BEGAN, state.VERIFIED, state.MARK):
        flip_state(rig, name)
        for deep in (False, True):
            found = rig.verify(deep=deep)
            # What can be found anew is there again.
            assert [problem.file for problem in found.problems] == [name] * (name != state.VERIFIED or not deep)
        if name == state.VERIFIED:
            flip_state(rig, name)
        status = status_of(rig.place)
        assert [problem.file for problem in status.problems] == [name]
        assert not status.ok
        # Of gaps that are accepted nothing is known without the object.
        assert [each.state for each in status.lines[0].gaps] == ["lost" if name == state.GAPS else "accepted"]
        rig.archiver.close()
        rig.archiver = archiver_of(rig.db, rig.place)
        rig.live(1)
        assert rig.archiver.mark == rig.db.last_seqno
        if name in (state.GAPS, state.KEPT, state.BEGAN):
            with pytest.raises(kvwal.CorruptionError, match=f"{name}: .*Bring it back from a copy.* or remove it"):
                state.change(rig.place, name, lambda members: members)
            rig.place.delete(name)
            if name == state.GAPS:
                accept_gap(rig.place, *gap, "lost disk", 5)
        if name == state.VERIFIED:
            with pytest.raises(kvwal.CorruptionError, match="kvwal archive verify finds again"):
                plan_pruning(rig.place, rig.held, Keep(), rig.disk.now_us())
            rig.verify()
        assert rig.verify().ok
        assert status_of(rig.place).ok


def test_of_what_was_pruned_the_version_before_a_damaged_one_counts(rig: Rig) -> None:
    before = state.change(rig.place, state.KEPT, lambda members: {**members, "a": 1})
    state.change(rig.place, state.KEPT, lambda members: {**members, "b": 1})
    flip_state(rig, state.KEPT)
    assert state.read(rig.place, state.KEPT)[1] == before
    assert [problem.file for problem in rig.verify().problems] == [state.KEPT]
    state.change(rig.place, state.KEPT, lambda members: {**members, "c": 1})
    assert state.read(rig.place, state.KEPT)[1] == {**before, "c": 1}
    assert rig.verify().ok


@pytest.mark.parametrize("name", [state.GAPS, state.BEGAN])
def test_what_the_version_before_a_damaged_one_lacks_is_not_forgotten(rig: Rig, name: str) -> None:
    for key in ("a", "b"):
        state.change(rig.place, name, lambda members, key=key: {**members, key: 1})
    flip_state(rig, name)
    damaged = rig.place.get(name)
    with pytest.raises(kvwal.CorruptionError, match=f"{name}: .*Bring it back from a copy"):
        state.change(rig.place, name, lambda members: members)
    state.record_beginning(rig.place, bytes(8), Seqno(5))
    assert state.began_at(rig.place, bytes(8)) == (0 if name == state.BEGAN else 5)
    assert rig.place.get(name) == damaged


def test_each_gap_stays_lost_while_what_was_said_of_gaps_is_damaged() -> None:
    """Of two that archivers passed over the newest version names both, and the one before it one."""
    nightly = Nightly(keep_history_bytes=0)
    for _ in range(3):
        archiver = archiver_of(nightly.db, nightly.place)
        for _ in range(2):
            archiver.step(now=True)
            nightly.db[b"more"] = b""
        archiver.step(now=True)
        archiver.close()
        nightly.night(3, 2)
        nightly.night(3, 2)
    gaps = nightly.gaps()
    assert len(gaps) >= 2
    assert len(state.gaps_in(state.read(nightly.place, state.GAPS)[1], "lost")) >= 2
    flip_state(nightly, state.GAPS)
    with pytest.raises(kvwal.CorruptionError, match="accept again the gaps"):
        accept_gap(nightly.place, *gaps[0], "lost disk", 5)
    named = {(gap.first, gap.last) for gap in status_of(nightly.place).lines[0].gaps if gap.state == "lost"}
    assert set(gaps) <= named


def test_pruning_deletes_nothing_where_what_it_is_to_remember_is_damaged(rig: Rig) -> None:
    state.change(rig.place, state.KEPT, lambda members: {rig.held.line.hex(): 0})
    flip_state(rig, state.KEPT)
    rig.db.checkpoint()
    make_base(rig.db.engine, rig.place, lambda: None)
    rig.disk.pass_time(100)
    rig.live(1)
    planned = plan_pruning(rig.place, rig.held, Keep(1, 0, 0), rig.disk.now_us())
    assert planned.delete
    before = sorted(rig.place.list_after(""))
    with pytest.raises(kvwal.CorruptionError, match="state/kept"):
        prune(rig.place, planned)
    assert sorted(rig.place.list_after("")) == before


@pytest.mark.parametrize("line", ["x", "", "ab cd", 5, None])
def test_a_mark_of_another_form_is_told_as_none(rig: Rig, line: object) -> None:
    state.change(rig.place, state.MARK, lambda members: {**members, "line": line})
    assert status_of(rig.place).mark is None


def test_a_damaged_header_does_not_keep_the_status_from_being_told(rig: Rig) -> None:
    last = rig.held.units[-1]
    rig.disk.flip(f"/b/{last}", 100)
    status = status_of(rig.place)
    assert [problem.file for problem in status.problems] == [str(last)]
    assert (status.ok, status.lines[0].moments, status.lines[0].newest_time) == (False, ((0, last.first),), None)


def test_where_nothing_may_be_written_verify_proves_and_says_that_it_cannot_remember(rig: Rig) -> None:
    rig.disk.fail("change", error=errno.EROFS, forever=True, path="/b/*")
    report = rig.verify(deep=True)
    assert report.ok
    assert report.checked == len(rig.held.sizes)
    assert "read-only" in str(report.unsaved)
    rig.disk.heal()
    assert rig.verify().unsaved is None


def test_units_that_do_not_belong_together_are_found(rig: Rig) -> None:
    """Each is valid by itself."""
    name = str(rig.held.units[3])
    unit = decode_unit(name, rig.place.get(name))
    builder = UnitBuilder(unit.header.store_id, unit.header.line, unit.header.first, b"\1" * 32)
    for commit in unit.commits():
        builder.add(commit.kind, commit.time_us, commit.body)
    rig.place.delete(name)
    rig.place.put_new(name, builder.encode()[1])
    following = str(rig.held.units[4])
    assert [problem.file for problem in rig.verify().problems] == [name, following]
    status = status_of(rig.place)
    assert ([problem.file for problem in status.problems], status.ok) == ([name, following], False)
    report = rig.verify(deep=True)
    assert [problem.file for problem in report.problems] == [name]
    assert "other commits" in report.problems[0].reason


def test_a_base_without_what_it_builds_on_is_a_problem_unless_it_is_to_go(rig: Rig) -> None:
    rig.db.checkpoint()
    make_base(rig.db.engine, rig.place, lambda: None)
    first, second = rig.held.bases
    assert second.parent == first.generation
    rig.place.delete(str(first))
    status = status_of(rig.place)
    assert [(each.file, each.reason) for each in status.problems] == [
        (str(second), "a base that it builds on is missing")
    ]
    assert not status.ok
    for options in ({}, {"deep": True}, {"since_last": True}, {"budget_s": 0}):
        found = rig.verify(**options)
        assert found.problems == status.problems
        assert not found.ok
    # Thinning says first from where on all stays. One that is cut off leaves what it had still to delete.
    state.change(rig.place, state.KEPT, lambda members: {rig.held.line.hex(): second.seqno + 1})
    assert status_of(rig.place).problems == rig.verify().problems == ()


def test_a_deep_check_compares_the_mark(rig: Rig) -> None:
    old, members = state.read(rig.place, state.MARK)
    assert rig.verify(deep=True).ok
    rig.place.swap(state.MARK, old, state.dump({**members, "digest": "00" * 32}))
    report = rig.verify(deep=True)
    assert [problem.file for problem in report.problems] == [state.MARK]
    # A check that does not look there does not forget it.
    assert rig.verify().ok
    assert [problem.file for problem in status_of(rig.place).problems] == [state.MARK]
    _, changed = state.read(rig.place, state.MARK)
    old, _ = state.read(rig.place, state.MARK)
    rig.place.swap(state.MARK, old, state.dump({**changed, "digest": members["digest"]}))
    assert rig.verify(deep=True).ok
    assert status_of(rig.place).ok


def test_a_gap_is_a_problem_until_it_is_accepted_for_a_reason(rig: Rig) -> None:
    rig.db.checkpoint()
    make_base(rig.db.engine, rig.place, lambda: None)
    lost = rig.held.units[3]
    rig.place.delete(str(lost))
    gap = (lost.first + 1, 11)
    for found in (status_of(rig.place), rig.verify()):
        assert not found.ok
    (line,) = status_of(rig.place).lines
    assert [tuple(each) for each in line.gaps] == [(*gap, "lost", "objects are missing")]
    for wrong in ((gap[0], gap[1] + 1), (1, 2)):
        with pytest.raises(ValueError, match=rf"no gap; there are: {gap[0]}\.\.{gap[1]}"):
            accept_gap(rig.place, Seqno(wrong[0]), Seqno(wrong[1]), "lost disk", 5)
    with pytest.raises(ValueError, match="reason"):
        accept_gap(rig.place, Seqno(gap[0]), Seqno(gap[1]), " ", 5)
    assert not status_of(rig.place).ok
    accept_gap(rig.place, Seqno(gap[0]), Seqno(gap[1]), "lost disk", 5)
    (line,) = status_of(rig.place).lines
    assert [tuple(each) for each in line.gaps] == [(*gap, "accepted", "lost disk")]
    assert status_of(rig.place).ok
    assert rig.verify().ok
    # It says nothing of a greater one.
    rig.place.delete(str(rig.held.units[2]))
    assert not status_of(rig.place).ok


class Nightly:
    """A store that is backed up now and then, with checkpoints between, so that backups lack commits between them."""

    def __init__(self, **options: Any) -> None:
        self.disk = SimulatedDisk()
        self.db: Any = kvwal.open("/kv", files=self.disk, **{**OPTIONS, **options})
        self.place = DirectoryDestination("/b", files=self.disk)

    def night(self, commits: int, behind: int = 0) -> None:
        for i in range(commits):
            self.db[b"%d" % i] = bytes(100_000)
        self.db.checkpoint()
        for i in range(behind):
            self.db[b"%d" % i] = b"behind"
        self.db.backup(self.place)

    def gaps(self) -> Any:
        found = verify(self.place, now_us=self.disk.now_us, monotonic_s=lambda: 0.0)
        status = status_of(self.place)
        (line,) = status.lines
        assert found.problems == status.problems == ()
        assert status.ok == found.ok == (not found.gaps)
        assert line.gaps == found.gaps
        return [(gap.first, gap.last) for gap in line.gaps]


@pytest.mark.parametrize("behind", [0, 2])
def test_what_no_backup_had_is_no_gap(behind: int) -> None:
    nightly = Nightly(keep_history_bytes=0)
    for _ in range(3):
        nightly.night(3, behind)
    held = held_of(nightly.db, nightly.place)
    assert len(held.stretches()) == 3, "there are moments that cannot be restored"
    assert nightly.gaps() == []
    (line,) = status_of(nightly.place).lines
    [commit] = nightly.db.commits(nightly.db.last_seqno - 1)
    assert line.newest_time == commit.time
    for gap in held.gaps():
        with pytest.raises(ValueError, match="is no gap; there are: none"):
            accept_gap(nightly.place, gap.first, gap.last, "lost disk", 5)
    # An archive answers neither for what there was before the first one began, nor for what comes after it has ended.
    archiver = archiver_of(nightly.db, nightly.place)
    archiver.step(now=True)
    nightly.db[b"more"] = b""
    archiver.step(now=True)
    archiver.close()
    gaps = held_of(nightly.db, nightly.place).gaps()
    assert nightly.gaps() == []
    nightly.night(3, behind)
    assert len(held_of(nightly.db, nightly.place).gaps()) == len(gaps) + 1
    assert nightly.gaps() == []
    # But the next one for what it passes over.
    for _ in range(2):
        nightly.night(3, behind)
    archiver = archiver_of(nightly.db, nightly.place)
    archiver.step(now=True)
    archiver.close()
    passed = held_of(nightly.db, nightly.place).gaps()[len(gaps) :]
    assert passed
    assert nightly.gaps() == [tuple(gap) for gap in passed]
    # What was recorded stays, also where nothing says where the first one began, as in a destination of before.
    nightly.place.delete(state.BEGAN)
    assert nightly.gaps() == [tuple(gap) for gap in passed]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_an_archive_that_was_there_before_is_not_begun_where_the_next_one_goes_on(is_damaged: bool) -> None:
    """Its mark is gone or damaged, and nothing says where it began: what it had, and is lost, stays a gap."""
    nightly = Nightly(keep_history_bytes=0)
    archiver = archiver_of(nightly.db, nightly.place)
    for _ in range(3):
        nightly.db[b"more"] = b""
        archiver.step(now=True)
    for _ in range(3):
        nightly.night(3)
        archiver.step(now=True)
    archiver.close()
    units = [unit for unit in held_of(nightly.db, nightly.place).units if unit.first]
    # Of a lost mark a unit is left that tells of an archiver.
    for unit in units if is_damaged else units[1:]:
        nightly.place.delete(str(unit))
    nightly.db.checkpoint()
    nightly.db.backup(nightly.place)
    # The log still has those of the last one.
    *gaps, _ = nightly.gaps()
    assert len(gaps) == 2
    nightly.place.delete(state.BEGAN)
    if is_damaged:
        flip_state(nightly, state.MARK)
    else:
        nightly.place.delete(state.MARK)

    def fail(*_: object) -> None:
        raise OSError("it is gone")

    # Also where the first try ends behind its claim.
    archiver = archiver_of(nightly.db, nightly.place)
    archiver._claim.move = fail
    with pytest.raises(OSError, match="it is gone"):
        archiver.step(now=True)
    archiver.close()
    archiver = archiver_of(nightly.db, nightly.place)
    archiver.step(now=True)
    assert list(archiver.gaps) == gaps
    archiver.close()
    assert nightly.gaps() == gaps
    assert state.began_at(nightly.place, held_of(nightly.db, nightly.place).line) == 0


def test_what_a_backup_had_is_a_gap_where_units_tell_of_it() -> None:
    nightly = Nightly(keep_history_bytes=1 << 24)
    nightly.night(2)
    for i in range(4):
        nightly.db.put(b"large", bytes(9 << 20 if i % 2 else 9))
    nightly.db.backup(nightly.place, history=True)
    nightly.night(3)
    units = [unit for unit in held_of(nightly.db, nightly.place).units if unit.last > 2]
    assert len(units) >= 2
    assert nightly.gaps() == []
    nightly.place.delete(str(units[0]))
    [gap] = nightly.gaps()
    assert gap[0] == units[0].first + 1
    assert gap[1] >= units[0].last


@pytest.mark.parametrize("is_deep", [False, True])
@pytest.mark.parametrize(("gone", "first"), [((-1,), 11), ((-1, 2), 5), ((2,), 5), (range(6), 1)])
def test_an_end_that_is_lost_is_a_gap_up_to_what_was_there(
    rig: Rig, gone: Sequence[int], first: int, is_deep: bool
) -> None:
    """Units behind a hole tell of it, and where these are gone, the mark does."""
    for unit in [rig.held.units[i] for i in gone]:
        rig.place.delete(str(unit))
    status, found = status_of(rig.place), rig.verify(deep=is_deep)
    assert status.lines[0].moments == ((0, first - 1),)
    assert status.lines[0].gaps == found.gaps == ((first, 12, "lost", "objects are missing"),)
    assert not status.ok
    assert not found.ok
    assert found.problems == ()
    accept_gap(rig.place, Seqno(first), Seqno(12), "the disk was cut off", 5)
    assert status_of(rig.place).ok
    assert rig.verify(deep=is_deep).ok


@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("is_deep", [False, True])
def test_an_end_that_is_lost_with_its_mark_is_a_gap_if_it_was_proved(rig: Rig, has_base: bool, is_deep: bool) -> None:
    """And stays one, until it is accepted: what is forgotten of an object that is gone tells no more of it."""
    assert rig.verify().ok
    if has_base:
        rig.db.checkpoint()
        rig.db.backup(rig.place)
    rig.place.delete(state.MARK)
    rig.place.delete(str(rig.held.units[-1]))
    expected = ((11, 11 if has_base else 12, "lost", "objects are missing"),)
    assert status_of(rig.place).lines[0].gaps == expected
    for _ in range(2):
        assert rig.verify(deep=is_deep).gaps == expected
        assert status_of(rig.place).lines[0].gaps == expected
        assert not status_of(rig.place).ok
    accept_gap(rig.place, Seqno(11), Seqno(expected[0][1]), "the disk was cut off", 5)
    assert status_of(rig.place).ok
    assert rig.verify(deep=is_deep).ok


def test_what_was_proved_and_then_merged_or_thinned_is_no_gap(rig: Rig) -> None:
    rig.disk.pass_time(4000)
    rig.live(3)
    assert rig.verify().ok
    rig.place.delete(state.MARK)
    merging = Merging(rig.place, rig.archiver._store_id, rig.held.line)
    before = len(rig.held.units)
    while merging.step(Seqno(18)):
        pass
    assert len(rig.held.units) < before
    assert status_of(rig.place).ok
    assert rig.verify().ok
    rig.db.checkpoint()
    rig.db.backup(rig.place)
    prune(rig.place, plan_pruning(rig.place, rig.held, Keep(0, 0, 0), rig.disk.now_us()))
    assert status_of(rig.place).ok
    assert rig.verify().ok


def test_what_backups_have_lost_is_told_when_an_archive_is_begun_there() -> None:
    nightly = Nightly(keep_history_bytes=1 << 24)
    nightly.night(2)
    nightly.db.put(b"large", bytes(9 << 20))
    nightly.db.put(b"large", bytes(9 << 20))
    nightly.db.backup(nightly.place, history=True)
    units = held_of(nightly.db, nightly.place).units
    nightly.place.delete(str(units[-2]))
    assert nightly.gaps() == [(3, 4)]
    # Until the log has these commits no longer.
    for _ in range(4):
        nightly.db.put(b"large", bytes(9 << 20))
        nightly.db.checkpoint()
    archiver = archiver_of(nightly.db, nightly.place)
    archiver.step(now=True)
    archiver.close()
    [gap] = held_of(nightly.db, nightly.place).gaps()
    assert gap.first == 3
    *_, entry = state.read(nightly.place, state.GAPS)[1]["lost"]
    assert (entry["first"], entry["last"], entry["reason"]) == (*gap, "objects are missing")
    assert nightly.gaps() == [tuple(gap)]


def test_a_line_of_which_only_the_mark_is_left_is_lost(rig: Rig) -> None:
    line = rig.held.line
    for name in rig.held.sizes:
        rig.place.delete(name)
    (found,) = status_of(rig.place).lines
    assert (found.line, found.moments, found.bases, found.units) == (line, (), 0, 0)
    assert found.gaps == rig.verify().gaps == ((0, 12, "lost", "objects are missing"),)


def test_an_end_that_is_lost_is_ended_by_a_base_when_the_archive_goes_on(rig: Rig) -> None:
    rig.place.delete(str(rig.held.units[-1]))
    rig.db.checkpoint()
    rig.archiver.close()
    rig.archiver = archiver_of(rig.db, rig.place)
    rig.live(2)
    assert status_of(rig.place).lines[0].moments[-1] == (12, 16)
    assert status_of(rig.place).lines[0].gaps == ((11, 11, "lost", "objects are missing"),)
    assert rig.archiver.gaps == ((11, 11),)


class Busy(DirectoryDestination):
    """Something happens before the mark is read, and before each directory of names is."""

    meanwhile: Callable[[], object] = staticmethod(lambda: None)

    def get(self, name: str, **where: Any) -> bytes:
        if name == state.MARK:
            self.meanwhile()
        return super().get(name, **where)

    def list_after(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        before = ""
        for name, size in super().list_after(prefix, after):
            if name.rpartition("/")[0] != before:
                before = name.rpartition("/")[0]
                self.meanwhile()
            yield name, size


@pytest.mark.parametrize("seed", range(12))
def test_an_archive_that_goes_on_is_never_said_to_have_lost_something(rig: Rig, seed: int) -> None:
    """Units are put and merged, bases made and old objects deleted, while a reader looks."""
    draw = Random(seed)
    place = Busy("/b", files=rig.disk)
    merging = Merging(rig.place, rig.db.engine.state.version.tree.meta.store_id, rig.held.line)

    def live() -> None:
        for _ in range(draw.randrange(4)):
            rig.live(1)
            rig.disk.pass_time(draw.choice([1, 20, 40]))
            what = draw.randrange(4)
            if what == 0:
                rig.db.checkpoint()
                make_base(rig.db.engine, rig.place, lambda: None)
            elif what == 1:
                prune(rig.place, plan_pruning(rig.place, rig.held, Keep(pitr_s=300), rig.disk.clock_us))
            while what > 1 and rig.archiver.mark is not None and merging.step(rig.archiver.mark):
                pass

    for _ in range(6):
        live()
        place.meanwhile = live
        status = status_of(place)
        assert [gap for line in status.lines for gap in line.gaps] == []
        mark = rig.archiver.mark
        assert lost_gaps(place, list_confirmed(place, rig.held.line, mark), mark) == ()
        found = verify(place, deep=draw.random() < 0.5, now_us=rig.disk.now_us, monotonic_s=lambda: 0.0)
        assert found.gaps == ()
        place.meanwhile = lambda: None


def test_what_was_thinned_is_no_gap(rig: Rig) -> None:
    for _ in range(4):
        rig.disk.pass_time(86400)
        rig.live(3)
        rig.db.checkpoint()
        make_base(rig.db.engine, rig.place, lambda: None)
    prune(rig.place, plan_pruning(rig.place, rig.held, Keep(pitr_s=3600), rig.disk.clock_us))
    assert len(rig.held.gaps()) > 1
    status = status_of(rig.place)
    assert status.ok
    assert status.lines[0].thinned_before > 0
    assert rig.verify(deep=True).ok


def test_objects_that_go_while_they_are_verified_are_no_problem(rig: Rig) -> None:
    base, *_ = rig.held.bases
    rig.db.checkpoint()
    # It builds on none: thinning leaves what is built on.
    backup(rig.db.engine, rig.place, base="full")

    class Going(DirectoryDestination):
        def get(self, name: str, **where: Any) -> bytes:
            for each in rig.held.units[:2]:
                rig.place.delete(str(each))
            rig.place.delete(str(base))
            return super().get(name, **where)

    report = verify(Going("/b", files=rig.disk), deep=True, now_us=rig.disk.now_us, monotonic_s=lambda: 0.0)
    assert report.problems == ()


# -- the command line ------------------------------------------------------------------------------


@pytest.fixture
def dest(tmp_path: Path) -> Path:
    with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, tmp_path / "b") as archive:
        for i in range(6):
            db[b"k"] = b"%d" % i
            assert archive.flush(20)
    return tmp_path / "b"


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result


def test_archive_status_is_plain_in_a_pipe_and_json_if_asked_for(dest: Path) -> None:
    lines = dict(line.split("\t") for line in run("archive", "status", dest).stdout.splitlines())
    assert any(name.endswith(".moments") and value == "0..6" for name, value in lines.items())
    assert lines["epoch"] == "1"
    for name, value in lines.items():
        if name.endswith((".oldest", ".newest")):
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", value)
    found = json.loads(run("archive", "status", dest, "--json").stdout)
    assert (found["ok"], found["lines"][0]["moments"]) == (True, [{"first": 0, "last": 6}])
    # One in the middle.
    sorted(dest.glob("*/unit/0/*"))[2].unlink()
    said = json.loads(run("archive", "status", dest, "--json", code=3).stdout)
    assert said["lines"][0]["gaps"]
    for gap in said["lines"][0]["gaps"]:
        assert set(gap) == {"first", "last", "state", "reason"}


def test_archive_verify_remembers(dest: Path) -> None:
    assert "everything holds" in run("archive", "verify", dest, "--deep").stdout
    assert run("archive", "verify", dest, "--since-last").stdout.startswith("0 objects proved")
    assert json.loads(run("archive", "verify", dest, "--json").stdout)["problems"] == []
    unit = max(dest.glob("*/unit/0/*"))
    unit.write_bytes(unit.read_bytes()[:-1])
    assert unit.name in run("archive", "verify", dest, "--quiet", code=3).stderr
    assert unit.name in run("archive", "status", dest, code=3).stderr


def test_archive_verify_says_where_it_cannot_remember(dest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise RefusedError(errno.EROFS, "the file system is read-only", "state")

    monkeypatch.setattr(state, "change", refused)
    result = run("archive", "verify", dest)
    assert "everything holds" in result.stdout
    assert f"cannot be remembered in {dest} (the file system is read-only)" in result.stderr


def test_archive_plan_names_what_a_restore_reads(dest: Path) -> None:
    names = [line.split("\t")[0] for line in run("archive", "plan", dest, "--at", 5).stdout.splitlines()]
    assert len([name for name in names if "/base/" in name]) == 1
    assert all((dest / name).exists() for name in names)
    assert json.loads(run("archive", "plan", dest, "--json").stdout)["at"] == 6
    assert "does not have the moment" in run("archive", "plan", dest, "--at", 50, code=2).stderr


def test_archive_prune_says_what_goes_before_it_goes(dest: Path) -> None:
    arguments = ("archive", "prune", dest, "--pitr-days", 0, "--daily", 0, "--monthly", 0)
    before = sorted(dest.rglob("*"))
    assert "nothing was done" in run(*arguments, "--dry-run").stderr
    assert sorted(dest.rglob("*")) == before
    run(*arguments)
    run("archive", "status", dest)
    run("archive", "prune", dest, "--daily", -1, code=2)


def test_archive_accept_gap_makes_status_green_again(dest: Path, tmp_path: Path) -> None:
    unit = sorted(dest.glob("*/unit/0/*"))[3]
    unit.unlink()
    with kvwal.open(tmp_path / "kv") as db:
        db.checkpoint()
    with kvwal.open(tmp_path / "kv") as db, kvwal.archive(db, dest) as archive:
        assert archive.flush(20)
    result = run("archive", "status", dest, code=3)
    gap = result.stdout.split(".gaps\t")[1].split()[0]
    assert gap in result.stderr
    run("archive", "verify", dest, code=3)
    run("archive", "accept-gap", dest, "1..2", "--reason", "x", code=2)
    run("archive", "accept-gap", dest, "nonsense", "--reason", "x", code=2)
    run("archive", "accept-gap", dest, gap, "--reason", "the disk was changed")
    assert "accepted" in run("archive", "status", dest).stdout
    run("archive", "verify", dest)


def test_the_commands_fail_with_the_right_code(tmp_path: Path) -> None:
    for command in ("status", "verify", "plan", "prune"):
        run("archive", command, tmp_path / "none", code=5)
        run("archive", command, tmp_path, code=5)
