"""`stats` tells of the archives of a running store: that there is a gap, and from where to where."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from archive_fixtures import Destination, Rig, held_of
from click.testing import CliRunner

import kvwal
from kvwal.backup.archive import Archive, _Worker
from kvwal.backup.chain import Gap
from kvwal.backup.checking import accept_gap
from kvwal.cli.app import app
from kvwal.engine.archives import ArchiveStatus
from kvwal.feed.status import describe
from kvwal.positions import Seqno


@pytest.fixture
def rig() -> Rig:
    return Rig()


class Stepped(_Worker):
    """A worker that a test steps."""

    def __init__(self, archiver: Any, destination: Any) -> None:
        super().__init__(archiver, destination)
        self.thread = threading.Thread(target=lambda: None)


def archive_of(rig: Rig, archiver: Any) -> Archive:
    return Archive(rig.db.engine, Stepped(archiver, rig.place))


def fall_behind(rig: Rig, archiver: Any) -> None:
    """Until the log has let go of commit 6 and others."""
    archiver.step()
    rig.writer.some(5)
    archiver.step(now=True)
    for _ in range(4):
        rig.writer.some(40, size=1500)
        rig.db.checkpoint()


def one(rig: Rig) -> ArchiveStatus:
    (status,) = rig.db.stats().archives
    return status


def test_a_gap_is_in_stats_while_the_destination_fails_and_when_it_is_recorded(rig: Rig) -> None:
    archiver = rig.archiver(max_behind_bytes=30_000)
    archive = archive_of(rig, archiver)
    assert one(rig) == archive.status()
    fall_behind(rig, archiver)
    oldest = rig.db.engine.upkeep.consumers.segments()[0].first_seqno
    assert oldest > 7
    assert one(rig).gaps == ((6, oldest - 1),), "nothing was put since"
    rig.writer.some(3)
    archiver.step()
    archiver.step(now=True)
    status = one(rig)
    assert (status.gaps, status.mark, status.behind_commits) == (((6, 164),), 168, 0)
    assert status.destination == "DirectoryDestination('/b')"
    archive.close()
    assert rig.db.stats().archives == ()


@pytest.mark.parametrize(("gone", "left"), [((-1,), 10), ((-1, 2), 4)])
@pytest.mark.parametrize("keep", [None, kvwal.Keep()])
def test_an_end_that_is_lost_is_named_by_a_running_archive_and_ended_by_a_base(
    rig: Rig, keep: kvwal.Keep | None, gone: tuple[int, ...], left: int
) -> None:
    archiver = rig.archiver(keep=keep)
    archive = archive_of(rig, archiver)
    for _ in range(6):
        rig.writer.some(2)
        archiver.step(now=True)
    units = held_of(rig.db, rig.place).units
    for i in gone:
        rig.place.delete(str(units[i]))
    rig.db.checkpoint()
    rig.clock.now_s += 31 if keep else 3601
    assert archiver.step() == 0.0
    assert one(rig).gaps == ((left + 1, 12),)
    archiver.step()
    assert held_of(rig.db, rig.place).lost_end(archiver.mark) is None
    assert one(rig).gaps == ((left + 1, 11),)
    rig.writer.some(2)
    archiver.step(now=True)
    rig.check(12, 14)
    archive.close()


def test_a_gap_that_the_destination_has_is_told_by_the_next_process_until_it_is_accepted(rig: Rig) -> None:
    archiver = rig.archiver(max_behind_bytes=30_000)
    fall_behind(rig, archiver)
    rig.writer.some(3)
    archiver.step()
    archiver.close()
    rig.reopen()
    archiver = rig.archiver()
    archive = archive_of(rig, archiver)
    assert one(rig).gaps == (), "it has not looked yet"
    archiver.step()
    assert one(rig).gaps == ((6, 164),)
    accept_gap(rig.place, *one(rig).gaps[0], "the disk was changed", 5)
    archiver.step()
    assert one(rig).gaps == ((6, 164),), "it does not ask at each step"
    rig.clock.now_s += 31
    archiver.step()
    assert one(rig).gaps == ()
    archive.close()


def test_what_is_archived_meanwhile_is_not_taken_for_a_gap(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log goes as soon as the mark has moved, also while another thread asks."""
    archiver = rig.archiver()
    archive = archive_of(rig, archiver)
    archiver.step()
    rig.writer.some(5)
    consumers = rig.db.engine.upkeep.consumers
    segments = consumers.segments

    def after_more() -> Any:
        for _ in range(2):
            rig.writer.some(80, size=1500)
            archiver.step(now=True)
            rig.db.checkpoint()
        return segments()

    monkeypatch.setattr(consumers, "segments", after_more)
    assert archive.status().gaps == ()
    assert segments()[0].first_seqno > 6
    archive.close()


def test_an_archive_that_another_one_goes_on_with_has_no_gap_of_its_own(rig: Rig) -> None:
    archiver = rig.archiver(max_behind_bytes=30_000)
    archive = archive_of(rig, archiver)
    fall_behind(rig, archiver)
    assert one(rig).gaps
    archive._worker.told = type(archive._worker.told)("superseded")
    assert one(rig).gaps == ()
    archive.close()


def test_an_archive_that_is_forgotten_is_told_of_no_more(rig: Rig) -> None:
    archive = archive_of(rig, rig.archiver())
    assert len(rig.db.stats().archives) == 1
    del archive
    gc.collect()
    assert rig.db.stats().archives == ()


def test_a_failure_to_look_at_gaps_is_told_and_units_go_on(rig: Rig) -> None:
    archiver = rig.archiver(max_behind_bytes=30_000)
    archive = archive_of(rig, archiver)
    fall_behind(rig, archiver)
    archiver.step()
    destination = Destination(rig.place)

    def fail(*arguments: Any) -> Any:
        raise OSError("403")

    destination.list_after = fail  # type: ignore[attr-defined]  # beside the method that it hands on
    archiver._destination = archiver._claim._destination = destination
    rig.clock.now_s += 31
    rig.writer.some(1)
    archiver.step(now=True)
    status = one(rig)
    assert (status.mark, status.gaps) == (rig.db.last_seqno, ((6, 164),))
    assert "403" in (status.error or "")
    archive.close()


def test_what_other_processes_are_told_are_plain_values(rig: Rig) -> None:
    archiver = rig.archiver(max_behind_bytes=30_000)
    archive = archive_of(rig, archiver)
    fall_behind(rig, archiver)
    archiver.step()
    (said,) = json.loads(json.dumps(describe(rig.db.engine)))["stats"]["archives"]
    assert said["gaps"] == [[6, 164]]
    assert said["mark"] == str(rig.db.position)
    archive.close()


def test_the_command_names_the_gap_of_a_running_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Looked for by the thread whenever it does: what is put into the archiver itself might be found anew at once.
    monkeypatch.setattr("kvwal.backup.archiver.lost_gaps", lambda *_: (Gap(Seqno(1), Seqno(299)),))
    path = str(tmp_path / "kv")
    with kvwal.open(path) as db, kvwal.archive(db, tmp_path / "b") as archive:
        db[b"a"] = b"1"
        assert archive.flush(20)
        found = CliRunner().invoke(app, ["stats", path])
        assert "archive.0.gaps\t1..299\n" in found.stdout
        assert f"archive.0.mark\t{db.position}\n" in found.stdout
        assert "has a gap: commits 1..299 cannot be restored" in found.stderr
        found = CliRunner().invoke(app, ["stats", path, "--json"])
        assert json.loads(found.stdout)["archives"][0]["gaps"] == [{"first": 1, "last": 299}]
        assert "commits 1..299" in found.stderr
