"""A time gives the commit that was the last one at that time, or none."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from archive_fixtures import archiver_of

import kvwal
from kvwal.backup import state
from kvwal.backup.chain import list_held
from kvwal.backup.checking import accept_gap
from kvwal.backup.choosing import advice, choose
from kvwal.backup.keeping import Merging
from kvwal.backup.names import UnitName, line_name
from kvwal.backup.port import DirectoryDestination
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk
from kvwal.times import time_of

OPTIONS: dict[str, Any] = {"background": False, "keep_history_bytes": 1 << 20}


class Two:
    """A line that was left at commit 11, the line that came from there, and their backups."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk(seed=1)
        self.place = DirectoryDestination("/b", files=self.disk)
        #: By time, the commit that was the last one of the newest line's history.
        self.times: list[tuple[int, int]] = []
        db = kvwal.open("/s", files=self.disk, **OPTIONS)
        self._live(db, 18)
        db.close()
        self.times = [each for each in self.times if each[1] <= 11]
        self.disk.pass_time(5)
        kvwal.restore(self.place, "/r", at=11, files=self.disk)
        db = kvwal.open("/r", files=self.disk, **OPTIONS)
        # That which says where the line came from.
        self.times += [(commit.time_us, commit.seqno) for commit in db.history() if commit.seqno == 12]
        self._live(db, 8)
        db.close()
        self.objects = {name: self.place.get(name) for name, _ in self.place.list_after("")}

    def _live(self, db: Any, commits: int) -> None:
        for i in range(commits):
            self.disk.pass_time(2)
            db.put(b"k", b"%d" % i)
            self.times += [(commit.time_us, commit.seqno) for commit in db.history() if commit.seqno == db.last_seqno]
            if i % 5 == 4:
                db.backup(self.place)
                db.checkpoint()
            if i % 2:
                db.backup(self.place)

    def check(self, kept: set[str]) -> tuple[int, int]:
        """How many times gave a commit, and of how many."""
        disk = SimulatedDisk()
        place = DirectoryDestination("/b", files=disk)
        for name in kept:
            place.put_new(name, self.objects[name])
        count = asked = 0
        for (at_us, seqno), following in zip(self.times, [*self.times[1:], None], strict=True):
            for us in {at_us, at_us + 1, at_us + 1_500_000, at_us + 7_000_000, at_us + 13_000_000}:
                if following is not None and us >= following[0]:
                    continue
                asked += 1
                try:
                    found = choose(place, time_of(us)).plan.at
                except (kvwal.NotInBackup, kvwal.BackupDestinationError):
                    continue
                assert found == seqno
                count += 1
        return count, asked


@pytest.fixture(scope="module")
def two() -> Two:
    return Two()


def test_with_all_objects_every_time_is_there(two: Two) -> None:
    given, asked = two.check(set(two.objects))
    assert given == asked > 2 * len(two.times)


def test_a_line_that_goes_on_from_another_makes_one_stretch_of_moments_with_it(two: Two) -> None:
    place = DirectoryDestination("/b", files=two.disk)
    with pytest.raises(kvwal.NotInBackup) as caught:
        choose(place, 99)
    assert caught.value.stretches == ((caught.value.oldest, caught.value.newest),)
    assert caught.value.oldest <= 11 < caught.value.newest


def test_whatever_objects_are_missing_no_time_gives_another_commit(two: Two) -> None:
    draw, given = Random(3), 0
    names = [name for name in two.objects if "/base/" in name or "/unit/" in name]
    newest = max((name for name in names if "/unit/" in name), key=lambda name: name.rpartition("-")[2])
    for _ in range(14):
        gone = set(draw.sample(names, draw.randint(1, len(names) // 2)))
        # The newest commit says which line is asked for.
        given += two.check(set(two.objects) - gone | {newest})[0]
    assert given > 20


def test_a_time_in_a_gap_is_refused_with_the_moments_beside_it() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    with kvwal.open("/s", files=disk, background=False, keep_history_s=0, keep_history_bytes=0) as db:
        for i in range(30):
            disk.pass_time(2)
            db.put(b"k", b"%d" % i)
            if i == 9:
                db.checkpoint()
            if i in (9, 14):
                db.backup(place)
            if i == 17:
                middle = disk.clock_us
        db.checkpoint()
        db.backup(place)
    with pytest.raises(kvwal.NotInBackup) as caught:
        kvwal.restore(place, "/none", at=time_of(middle), files=disk)
    assert caught.value.nearest == (15, 30)
    before, after = caught.value.nearest_times
    assert before is not None
    assert after is not None
    assert before < time_of(middle) < after
    for time, seqno in ((before, 15), (after, 30)):
        assert time.isoformat() in str(caught.value)
        assert choose(place, seqno).plan.at == seqno
    (unit,) = (name for name, _ in place.list_after("") if "/unit/" in name and f"{10:020}-" in name)
    assert "(there are those of commits 10 to 10)" in advice(place, 15, unit)
    said = f"the nearest ones are those of commit 15 ({before.isoformat()}) and 30 ({after.isoformat()})"
    assert f"it has those of commits 10 to 15, 30; {said}" in str(caught.value)


def archived_twice(disk: SimulatedDisk, place: DirectoryDestination) -> UnitName:
    """Have an archive of twenty commits, the mark at the last one. Returns the last unit, of ten commits."""
    with kvwal.open("/s", files=disk, **OPTIONS) as db:
        archiver = archiver_of(db, place)
        archiver.step()
        for _ in range(2):
            for _ in range(10):
                disk.pass_time(2)
                db.put(b"k", b"v")
            archiver.step(now=True)
        archiver.close()
        return list_held(place, db.position.line).units[-1]


def test_a_time_behind_the_newest_moment_is_refused_where_the_mark_tells_of_commits_that_are_lost() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    unit = archived_twice(disk, place)
    middle = disk.clock_us - 1_000_000
    assert choose(place, time_of(middle)).plan.at == 19
    place.delete(str(unit))
    for us in (middle, disk.clock_us):
        with pytest.raises(kvwal.NotInBackup) as caught:
            choose(place, time_of(us))
        assert caught.value.nearest == (10, None)
    assert choose(place, time_of(middle - 20_000_000)).plan.at == 9
    # What is marked may be damaged, as the status says.
    place.delete(state.MARK)
    place.put_new(state.MARK, b"{}")
    assert choose(place, time_of(middle)).plan.at == 10


@pytest.mark.parametrize("is_last", [False, True])
def test_the_latest_moment_is_refused_where_it_is_lost_until_that_is_accepted(is_last: bool) -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    unit = archived_twice(disk, place)
    assert choose(place, "latest").plan.at == 20
    with kvwal.open("/s", files=disk, **OPTIONS) as db:
        db.put(b"k", b"behind")
        db.backup(place)
    if is_last:
        # The mark alone tells of the commits up to 20.
        for other in list_held(place, unit.line).units:
            if other.last > 20:
                place.delete(str(other))
    place.delete(str(unit))
    last = 20 if is_last else 21
    for dry_run in (True, False):
        said = f"commits 11 to {last} are missing.* accept the loss .*, or ask for 10 by its number"
        with pytest.raises(kvwal.NotInBackup, match=said) as got:
            kvwal.restore(place, "/none", files=disk, dry_run=dry_run)
        assert (got.value.asked, got.value.lost, got.value.nearest) == (last, (11, last), (10, None))
    assert choose(place, 10).plan.at == 10
    # Pruning had gone further than what is left.
    state.change(place, state.KEPT, lambda members: {unit.line.hex(): 15})
    with pytest.raises(kvwal.NotInBackup):
        choose(place, "latest")
    accept_gap(place, Seqno(15), Seqno(last), "the disk was full; ops", 0)
    assert kvwal.restore(place, "/r", files=disk).restored == 10


def test_the_latest_moment_is_refused_where_a_base_that_later_ones_build_on_is_lost() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    with kvwal.open("/s", files=disk, background=False, keep_history_s=0, keep_history_bytes=0) as db:
        bases: tuple[Any, ...] = ("full", "full", "auto")
        for kind in bases:
            with db.batch() as batch:
                for i in range(5 if kind == "auto" else 300):
                    batch.put(b"%d" % i, kind.encode() * 100)
            db.checkpoint()
            db.backup(place, base=kind)
    bases = list_held(place, db.position.line).bases
    assert [bool(base.parent) for base in bases] == [False, False, True]
    place.delete(str(bases[1]))
    with pytest.raises(kvwal.NotInBackup) as caught:
        choose(place, "latest")
    assert caught.value.lost == (2, 3)
    # A base alone tells of no gap, so there is none to accept.
    with pytest.raises(ValueError, match="there are: none"):
        accept_gap(place, Seqno(2), Seqno(3), "lost disk", 0)
    assert str(caught.value).endswith("it has the moments of commits 1; ask for 1 by its number")
    assert choose(place, 1).plan.at == 1
    # What is left of a line that came from another one counts as well.
    kvwal.restore(place, "/r", at=1, files=disk)
    with kvwal.open("/r", files=disk, background=False, keep_history_s=0, keep_history_bytes=0) as db:
        db.checkpoint()
        db.backup(place)
        db.put(b"k", b"v")
        db.backup(place)
    assert choose(place, "latest").plan.at == 3
    for base in list_held(place, db.position.line).bases:
        place.delete(str(base))
    with pytest.raises(kvwal.NotInBackup) as caught:
        choose(place, "latest")
    assert caught.value.lost == (2, 3)


def test_a_line_of_which_the_mark_alone_is_left_is_not_restored_as_the_one_that_it_came_from() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    archived_twice(disk, place)
    kvwal.restore(place, "/r", at=15, files=disk)
    with kvwal.open("/r", files=disk, **OPTIONS) as db:
        archiver = archiver_of(db, place)
        archiver.step(now=True)
        archiver.close()
    held = list_held(place, db.position.line)
    for name in held.sizes:
        place.delete(name)
    with pytest.raises(kvwal.NotInBackup) as caught:
        choose(place, "latest")
    # What the two have in common is still there.
    assert caught.value.lost == (16, 16)
    assert choose(place, 20).plan.at == 20
    # The whole of what is marked is lost where nothing says whence the line came.
    whence = line_name(held.line)
    for damaged in (b"{}", None):
        place.delete(whence)
        if damaged is not None:
            place.put_new(whence, damaged)
        with pytest.raises(kvwal.NotInBackup) as caught:
            choose(place, "latest")
        assert caught.value.lost == (0, 16)


def test_the_latest_moment_is_not_that_of_a_copy_where_the_end_of_the_archived_line_is_lost() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    db = kvwal.open("/s", files=disk, **OPTIONS)
    archiver = archiver_of(db, place)

    def live() -> int:
        disk.pass_time(2)
        for _ in range(10):
            disk.pass_time(1)
            db.put(b"k", b"v")
        archiver.step(now=True)
        return disk.clock_us

    early = live() - 3_000_000
    kvwal.restore(place, "/r", files=disk)
    with kvwal.open("/r", files=disk, **OPTIONS) as copy:
        disk.pass_time(2)
        copy.put(b"k", b"of the copy")
        copy.backup(place)
    of_copy = disk.clock_us
    live()
    archiver.close()
    db.close()
    line = db.position.line
    assert (choose(place, "latest").line, choose(place, "latest").plan.at) == (line, 20)
    place.delete(str(list_held(place, line).units[-1]))
    with pytest.raises(kvwal.NotInBackup) as caught:
        choose(place, "latest")
    assert (caught.value.asked, caught.value.lost, caught.value.nearest) == (20, (11, 20), (12, None))
    assert "accept the loss" in str(caught.value)
    for us in (of_copy, disk.clock_us):
        with pytest.raises(kvwal.NotInBackup):
            choose(place, time_of(us))
    # Both lines have the commits up to 10.
    assert 0 < choose(place, time_of(early)).plan.at < 10
    assert choose(place, 12).line == copy.position.line
    accept_gap(place, Seqno(11), Seqno(20), "the copy goes on; ops", 0)
    for at in ("latest", time_of(disk.clock_us)):
        assert (choose(place, at).line, choose(place, at).plan.at) == (copy.position.line, 12)


def test_the_latest_moment_beside_an_archive_that_puts_and_merges_units_is_not_said_to_be_lost() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    with kvwal.open("/s", files=disk, **OPTIONS) as db:
        archiver = archiver_of(db, place, keep=kvwal.Keep())
        merging = Merging(place, db.engine.state.version.tree.meta.store_id, db.position.line)

        def live() -> None:
            for _ in range(3):
                disk.pass_time(11)
                db.put(b"k", b"v")
                archiver.step(now=True)
            merging.step(archiver.mark)

        class Busy(DirectoryDestination):
            def list_after(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
                for i, each in enumerate(super().list_after(prefix, after)):
                    if i % 3 == 1:
                        live()
                    yield each

        live()
        for _ in range(20):
            before = db.last_seqno
            assert choose(Busy("/b", files=disk), "latest").plan.at >= before
        archiver.close()


def test_a_mark_behind_the_fork_of_a_line_does_not_keep_a_time_from_it() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    archived_twice(disk, place)
    kvwal.restore(place, "/r", at=15, files=disk)
    with kvwal.open("/r", files=disk, **OPTIONS) as db:
        disk.pass_time(2)
        db.put(b"k", b"v")
        db.backup(place)
    disk.pass_time(2)
    assert choose(place, time_of(disk.clock_us)).plan.at == db.last_seqno == 17


def test_latest_is_the_newest_commit_also_where_its_line_begins_with_an_older_base() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    options: dict[str, Any] = {**OPTIONS, "keep_history_s": 0, "keep_history_bytes": 0}
    with kvwal.open("/s", files=disk, **options) as db:
        for i in range(15):
            db.put(b"k", b"%d" % i)
            if i == 9:
                db.checkpoint()
                db.backup(place)
        db.backup(place)
        kvwal.restore(place, "/r", files=disk)
        db.checkpoint()
        db.backup(place)
        (unit,) = list_held(place, db.position.line).units
    disk.pass_time(5)
    with kvwal.open("/r", files=disk, **options) as db:
        db.put(b"k", b"new")
        db.backup(place)
    place.delete(str(unit))
    assert choose(place, "latest").plan.at == db.last_seqno == 17
    assert choose(place, 15).plan.at == 15
