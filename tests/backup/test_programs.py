"""Random programs with backups in between: each is restored, and is what the store was at its moment."""

from __future__ import annotations

import pytest
from backup_fixtures import Lived, check_destination, objects, restored
from store_fixtures import problems_of

from kvwal.backup.making import BackupReport, backup
from kvwal.backup.port import DirectoryDestination


def program(seed: int, rounds: int, commits: int) -> tuple[Lived, list[BackupReport]]:
    lived = Lived(seed)
    reports: list[BackupReport] = []
    for _ in range(rounds):
        lived.live(lived.random.randrange(1, commits))
        kind = "full" if lived.random.random() < 0.15 else "auto"
        history = lived.random.random() < 0.2
        reports.append(backup(lived.db.engine, lived.destination, base=kind, history=history))
        assert reports[-1].position == lived.db.position
    check_destination(lived.destination)
    return lived, reports


def check_moments(lived: Lived, reports: list[BackupReport], moments: int) -> None:
    for n in range(moments):
        report = lived.random.choice(reports)
        seqno = lived.random.randint(report.oldest, int(report.position))
        with restored(lived, seqno, f"/r{n}") as db:
            assert problems_of(db) == []
            assert db.last_seqno == seqno + 1


@pytest.mark.parametrize("seed", range(3))
def test_each_backup_restores_to_the_state_of_its_moments(seed: int) -> None:
    lived, reports = program(seed, 6, 40)
    check_moments(lived, reports, 4)
    with restored(lived) as db:
        # It goes on, and is backed up on a line of its own, from which it is restored as well.
        line = db.position.line
        db.put(b"new", b"1")
        report = backup(db.engine, lived.destination)
        assert report.position.line == line != reports[0].position.line


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_the_same_of_more_and_longer_programs(seed: int) -> None:
    lived, reports = program(seed, 15, 80)
    check_moments(lived, reports, 10)


def test_with_history_each_moment_of_the_window_is_restored() -> None:
    lived = Lived(5)
    lived.live(120)
    oldest = lived.db.window.oldest
    report = backup(lived.db.engine, lived.destination, history=True)
    assert report.oldest <= oldest
    assert report.position == lived.db.position
    for n, seqno in enumerate(range(oldest, int(report.position) + 1, 7)):
        restored(lived, seqno, f"/r{n}").close()


def test_an_idle_store_is_backed_up_once_and_gives_the_same_bytes_again() -> None:
    lived = Lived(7)
    lived.live(60)
    first = backup(lived.db.engine, lived.destination)
    assert first.made
    assert backup(lived.db.engine, lived.destination).made == ()
    other = DirectoryDestination("/b2", files=lived.disk)
    backup(lived.db.engine, other)
    assert objects(other) == objects(lived.destination)
    lived.reopen()
    assert backup(lived.db.engine, lived.destination).made == ()


def test_compacting_an_idle_store_makes_nothing_new() -> None:
    lived = Lived(8)
    lived.live(60)
    lived.db.checkpoint()
    backup(lived.db.engine, lived.destination)
    lived.db.compact()
    lived.db.compact()
    assert backup(lived.db.engine, lived.destination).made == ()
    lived.live(10)
    lived.db.checkpoint()
    backup(lived.db.engine, lived.destination)
    restored(lived).close()
