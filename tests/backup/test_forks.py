"""A line names the commit behind which it left another, and is refused where that is another commit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from archive_fixtures import OPTIONS, archiver_of
from click.testing import CliRunner

import kvwal
from kvwal.backup import making, state
from kvwal.backup.chain import digest_after, list_held
from kvwal.backup.checking import status_of, verify
from kvwal.backup.lines import Origin, origin_of, tell_line
from kvwal.backup.names import line_name
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.units import decode_header, line_digest, lone_digest
from kvwal.cli.app import app
from kvwal.engine.lines import parent_of
from kvwal.errors import CorruptionError, ForkDiverged
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk

FORK = 10


def digest_of(db: Any, seqno: int) -> bytes:
    """That of a commit of the log, computed from what the log says."""
    with db.engine.upkeep.read(Seqno(seqno - 1), Seqno(seqno), "test") as records:
        (record,) = records
        return lone_digest(record.kind, record.time_us, record.body)


class Two:
    """A store and a copy of it that went on by itself, in `/b` and `/c`; and one that was restored from `/b`."""

    def __init__(self, at: int = FORK, *, also_to_c: bool = False) -> None:
        self.disk = SimulatedDisk(seed=3)
        self.b, self.c = (DirectoryDestination(name, files=self.disk) for name in ("/b", "/c"))
        with kvwal.open("/s", files=self.disk, **OPTIONS) as db:
            self.line = db.position.line
            for i in range(5):
                db[b"k%d" % i] = b"both"
            db.backup(self.b, history=True)
            self.copy = self.disk.crash(-1)
            for i in range(10):
                db[b"k%d" % i] = b"store"
                if also_to_c and i == 2:
                    db.backup(self.b)
                    db.checkpoint()
                    db.backup(self.c, base="full")
            db.backup(self.b, history=True)
            if also_to_c:
                db.backup(self.c)
            self.digest = digest_of(db, at)
        kvwal.restore(self.b, "/r", at=at, files=self.disk)
        self.restored = kvwal.open("/r", files=self.disk, **OPTIONS)
        self.restored[b"new"] = b"1"
        self.own = self.restored.position.line

    def copy_to_c(self) -> None:
        with kvwal.open("/s", files=self.copy, **OPTIONS) as db:
            self.copy.pass_time(1)
            for i in range(10):
                db[b"k%d" % i] = b"copy"
            db.backup(self.c, history=True)

    def row(self) -> Any:
        return parent_of(self.restored.engine.reads, self.own)


@pytest.fixture
def two() -> Two:
    return Two()


def everything(place: Any) -> dict[str, bytes]:
    return {name: place.get(name) for name, _ in place.list_after("")}


@pytest.mark.parametrize("at", [3, FORK, 15])
def test_a_restored_store_knows_the_digest_of_the_commit_before_its_line(at: int) -> None:
    two = Two(at)
    assert two.row().digest == two.digest
    assert two.row().fork == at


def test_it_knows_it_from_a_base_alone() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    with kvwal.open("/s", files=disk, **OPTIONS) as db:
        db[b"a"] = b"1"
        db.checkpoint()
        digest = digest_of(db, 1)
        assert [name for name in db.backup(place).made if "/unit/" in name] == []
    kvwal.restore(place, "/r", files=disk)
    with kvwal.open("/r", files=disk, **OPTIONS) as db:
        row = parent_of(db.engine.reads, db.position.line)
        assert row is not None
        assert row.digest == digest


def test_it_does_not_know_it_where_no_object_has_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    monkeypatch.setattr(making._Backup, "_digest_of", lambda self, seqno: bytes(32))
    with kvwal.open("/s", files=disk, **OPTIONS) as db:
        db[b"a"] = b"1"
        db.checkpoint()
        db.backup(place)
    kvwal.restore(place, "/r", files=disk)
    with kvwal.open("/r", files=disk, **OPTIONS) as db:
        row = parent_of(db.engine.reads, db.position.line)
        assert row is not None
        assert row.digest is None
        db.backup(place)
        origin = origin_of(place, db.position.line)
    assert origin == Origin(row.parent, Seqno(1), None)
    assert verify(place, now_us=disk.now_us, monotonic_s=disk.monotonic_s).ok


def test_the_first_unit_of_the_line_names_the_commit_before_it(two: Two) -> None:
    two.restored.backup(two.c)
    assert origin_of(two.c, two.own) == Origin(two.line, Seqno(FORK), two.digest)
    held = list_held(two.c, two.own)
    name = str(held.units[0])
    store_id = two.restored.engine.state.version.tree.meta.store_id
    before = decode_header(name, two.c.get(name)).before
    assert before == line_digest(store_id, two.own, two.digest)
    assert before != line_digest(store_id, two.own)


def test_where_the_other_line_is_the_same_it_is_welcome() -> None:
    """Also where the chain of units began at another commit: then its digests are others."""
    two = Two(also_to_c=True)
    store_id = two.restored.engine.state.version.tree.meta.store_id
    chains = [digest_after(place, store_id, list_held(place, two.line), Seqno(FORK)) for place in (two.b, two.c)]
    assert len({*chains, line_digest(store_id, two.line)}) == 3
    two.disk.pass_time(1)
    two.restored[b"new"] = b"2"
    two.restored.checkpoint()
    for place in (two.b, two.c):
        two.restored.backup(place)
        assert kvwal.restore(place, "/n", dry_run=True, files=two.disk).restored == two.restored.position
        report = verify(place, deep=True, now_us=two.disk.now_us, monotonic_s=two.disk.monotonic_s)
        assert report.problems == ()
        assert status_of(place).problems == ()
    assert kvwal.restore(two.b, "/x", at=FORK - 2, files=two.disk).restored.line == two.line


def test_a_backup_and_an_archive_are_refused_where_it_is_another_history(two: Two) -> None:
    two.copy_to_c()
    before = everything(two.c)
    text = f"line {two.own.hex()} left line {two.line.hex()} behind commit 10"
    with pytest.raises(ForkDiverged, match=text) as caught:
        two.restored.backup(two.c)
    error = caught.value
    assert (error.line, error.parent, error.fork, error.at_seqno) == (two.own, two.line, FORK, FORK - 1)
    archiver = archiver_of(two.restored, two.c)
    with pytest.raises(ForkDiverged):
        archiver.step()
    assert everything(two.c) == before
    with kvwal.archive(two.restored, two.c) as archive:
        while archive.status().state == "starting":
            archive.flush(0.01)
        assert archive.status().state == "diverged"
    assert everything(two.c) == before


def test_a_restore_does_not_go_back_to_another_history_and_checks_tell_of_it(two: Two) -> None:
    # Else the moments before the fork are in what the line has itself.
    two.restored.checkpoint()
    two.restored.backup(two.c)
    two.copy_to_c()
    two.disk.pass_time(10)
    two.restored[b"new"] = b"2"
    two.restored.backup(two.c)
    newest = two.restored.position
    with pytest.raises(ForkDiverged):
        kvwal.restore(two.c, "/x", at=kvwal.Position(two.own, 7), files=two.disk)
    assert two.disk.kind("/x") is None
    # What needs nothing of the other line can be restored, and so can the other line.
    assert kvwal.restore(two.c, "/y", at=newest, files=two.disk).restored == newest
    assert kvwal.restore(two.c, "/z", at=kvwal.Position(two.line, 7), files=two.disk).restored == 7
    status = status_of(two.c)
    assert [problem.file for problem in status.problems] == [line_name(two.own)]
    assert not status.ok
    for deep in (False, True):
        report = verify(two.c, deep=deep, now_us=two.disk.now_us, monotonic_s=two.disk.monotonic_s)
        assert [problem.file for problem in report.problems] == [line_name(two.own)]


def test_two_restores_deep_it_is_the_oldest_fork_that_counts(two: Two) -> None:
    two.restored.checkpoint()
    two.restored.backup(two.b)
    kvwal.restore(two.b, "/q", at=kvwal.Position(two.own, 4), files=two.disk)
    with kvwal.open("/q", files=two.disk, **OPTIONS) as db:
        db.checkpoint()
        db.backup(two.b)
        own = db.position.line
    found = kvwal.restore(two.b, "/x", at=kvwal.Position(own, 3), files=two.disk)
    assert found.restored == kvwal.Position(two.line, 3)


def test_a_destination_that_says_something_else_of_the_line_is_refused(two: Two) -> None:
    tell_line(two.c, two.own, Origin(two.line, Seqno(FORK), bytes(32)))
    before = everything(two.c)
    with pytest.raises(ForkDiverged):
        two.restored.backup(two.c)
    assert everything(two.c).keys() - before.keys() <= {"kvwal-archive"}


def test_what_is_damaged_is_said_again_by_the_store_that_knows_it(two: Two) -> None:
    two.c.put_new(line_name(two.own), b"{}")
    two.restored.backup(two.c)
    assert origin_of(two.c, two.own) == Origin(two.line, Seqno(FORK), two.digest)


def test_a_first_unit_that_names_another_commit_is_found(two: Two) -> None:
    two.restored.backup(two.c)
    two.c.delete(line_name(two.own))
    tell_line(two.c, two.own, Origin(two.line, Seqno(99), bytes(32)))
    (problem,) = status_of(two.c).problems
    assert (problem.file, problem.offset) == (str(list_held(two.c, two.own).units[0]), 104)
    state.change(two.c, state.KEPT, lambda members: {**members, two.own.hex(): 12})
    assert status_of(two.c).problems == (), "what is the first one now need not have been it"


def test_a_line_that_has_another_commit_at_its_fork_itself_is_found(two: Two) -> None:
    two.restored.backup(two.c)
    two.c.delete(line_name(two.own))
    tell_line(two.c, two.own, Origin(two.line, Seqno(FORK + 1), bytes(32)))
    assert line_name(two.own) in {problem.file for problem in status_of(two.c).problems}


@pytest.mark.parametrize("digest", [None, 5, "", "zz" * 32, "00" * 31, "00" * 33, ["00"] * 32])
def test_a_digest_of_another_form_is_damage(two: Two, digest: object) -> None:
    name = line_name(b"a line..")
    two.c.put_new(name, state.dump({"parent": two.line.hex(), "fork": 3, "digest": digest}))
    with pytest.raises(CorruptionError, match="whence"):
        origin_of(two.c, b"a line..")


def test_the_command_says_so(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db[b"a"] = b"1"
        db.backup(tmp_path / "b")
    kvwal.restore(tmp_path / "b", tmp_path / "r")
    with kvwal.open(tmp_path / "r") as db:
        db.backup(tmp_path / "b")
        place, line = DirectoryDestination(tmp_path / "b"), db.position.line
    assert CliRunner().invoke(app, ["archive", "verify", str(tmp_path / "b")]).exit_code == 0
    origin = origin_of(place, line)
    assert origin is not None
    place.delete(line_name(line))
    tell_line(place, line, origin._replace(digest=bytes(32)))
    found = CliRunner().invoke(app, ["archive", "status", str(tmp_path / "b")])
    assert found.exit_code == 3
    assert "behind commit 1, and in the destination that is another commit" in found.stderr
