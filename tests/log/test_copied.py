"""A log that is made of the commits of another one."""

from __future__ import annotations

import random

import pytest

from kvwal.errors import InternalError
from kvwal.features import EXTENSIONS, KEYSPACES
from kvwal.keys import Seqno
from kvwal.log import LogIdentity, LogOptions, LogReader
from kvwal.log.commits import Commit, Commits
from kvwal.log.copied import CopiedLog
from kvwal.log.intents import EXTENDED, TABLES
from kvwal.log.record import COMMIT
from kvwal.testing import SimulatedDisk

STORE, LINE = bytes(16), b"line one"


def copied(after: int, segment_bytes: int = 4096) -> tuple[CopiedLog, SimulatedDisk]:
    disk = SimulatedDisk()
    disk.make_directory("/s")
    directory = disk.open_directory("/s")
    directory.sync_parent()
    identity, options = LogIdentity(STORE, LINE, 1), LogOptions(segment_bytes, True, 0o600)
    return CopiedLog(disk, directory, identity, options, Seqno(after), 5, 0), disk


def some_commits(first: int, count: int) -> list[Commit]:
    draw = random.Random(first)
    return [(COMMIT, Seqno(first + n), 1000 + n // 3, draw.randbytes(draw.randint(0, 900))) for n in range(count)]


def read(disk: SimulatedDisk, after: int) -> list[Commit]:
    reader = LogReader(disk.open_directory("/s"), STORE)
    return [(each.kind, each.seqno, each.time_us, each.body) for each in reader.replay(Seqno(after), Seqno(after))]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_it_has_the_commits_that_were_added_however_many_at_once(at_once: int) -> None:
    commits = some_commits(42, 100)
    log, disk = copied(41)
    for begin in range(0, 100, at_once):
        log.add(Commits.of(commits[begin : begin + at_once]))
    log.close()
    assert read(disk, 41) == commits
    segments = LogReader(disk.open_directory("/s"), STORE).segments()
    # A segment ends with the first commit that fills it.
    assert 8 < len(segments) < 14
    assert all(segment.size >= 4096 for segment in segments[:-1])
    reader = LogReader(disk.crash(0).open_directory("/s"), STORE)
    assert len(list(reader.replay(Seqno(41), Seqno(41)))) == 100, "a power cut takes nothing"


@pytest.mark.parametrize("bad", [[40], [42], [41, 43], [41, 42, 44], [41, 41]])
def test_commits_that_do_not_follow_are_refused(bad: list[int]) -> None:
    log, _ = copied(40)
    with pytest.raises(InternalError, match="follow"):
        log.add(Commits.of((COMMIT, Seqno(each), 1000, b"") for each in bad))


def test_one_without_commits_goes_on_behind_those_it_does_not_have() -> None:
    log, disk = copied(40)
    log.close()
    assert read(disk, 40) == []


@pytest.mark.parametrize(
    ("kind", "features"), [(COMMIT, 0), (COMMIT | TABLES, KEYSPACES), (COMMIT | EXTENDED, EXTENSIONS)]
)
def test_its_segments_say_what_a_reader_of_their_commits_must_know(kind: int, features: int) -> None:
    log, disk = copied(0)
    log.add(Commits.of([(COMMIT, Seqno(1), 1000, b""), (kind, Seqno(2), 1000, b"")]))
    log.close()
    _, (found,) = LogReader(disk.open_directory("/s"), STORE).chain.beyond(Seqno(1))
    assert found.known.required == features
