"""Searching the log by seqno and by time."""

from __future__ import annotations

import pytest
from log_rig import LogRig, body, entry, simulated_disk

from kvwal.files.names import index_name
from kvwal.keys import Seqno
from kvwal.log import LogPosition
from kvwal.log.index import INDEX_STRIDE_BYTES
from kvwal.testing import SimulatedDisk


@pytest.fixture
def disk() -> SimulatedDisk:
    return simulated_disk()


@pytest.fixture
def rig(disk: SimulatedDisk) -> LogRig:
    return LogRig(disk, "/log")


@pytest.fixture
def long(rig: LogRig, disk: SimulatedDisk) -> LogRig:
    """Some segments with several index entries each; commit n was made at a second after commit n - 1."""
    log = rig.create(segment_bytes=3 * INDEX_STRIDE_BYTES, time_us=disk.clock_us)
    for n in range(1, 301):
        disk.jump_clock(1_000_000)
        log.append_put(*entry(n, 1500))
    log.sync()
    log.mark_idle()
    log.abandon()
    return rig


def times(rig: LogRig) -> dict[int, tuple[int, LogPosition]]:
    return {r.seqno: (r.time_us, r.position) for r in rig.reader().replay(Seqno(0), Seqno(0))}


def test_seek_finds_every_commit(long: LogRig):
    known = times(long)
    assert len(long.segments()) == 3
    seek = long.seek()
    for seqno in [*range(1, 301, 7), 300, 299, 1]:
        assert seek.seek(Seqno(seqno)) == known[seqno][1]
    for seqno in (0, 301):
        with pytest.raises(ValueError, match=str(seqno)):
            seek.seek(Seqno(seqno))


def test_seek_time_finds_the_first_commit_after(long: LogRig):
    known = times(long)
    seek = long.seek()
    for seqno in [1, 2, 100, 101, 102, 115, 116, 117, 118, 119, 120, 121, 299]:
        time_us = known[seqno][0]
        assert seek.seek_time(time_us) == known[seqno + 1][1]
        assert seek.seqno_at(time_us) == seqno
        assert seek.seqno_at(time_us - 1) == seqno - 1
        assert seek.seek_time(time_us - 1) == known[seqno][1]
    assert seek.seqno_at(0) == 0
    assert seek.seqno_at(1 << 60) == 300
    assert seek.seek_time(1 << 60) == LogPosition(
        known[300][1].segment, known[300][1].offset + 40 + len(body(300, 1500))
    )


def test_a_time_between_two_segments_leads_to_the_younger(long: LogRig):
    known = times(long)
    for segment in long.reader().segments()[1:]:
        before = known[segment.first_seqno - 1][0]
        assert before < segment.created_us - 1
        assert long.seek().seek_time(segment.created_us - 1) == LogPosition(segment.first_seqno, 4096)
        assert long.seek().seqno_at(before) == segment.first_seqno - 1


@pytest.mark.parametrize("damage", ["missing", "flipped", "of another segment", "unreadable"])
def test_a_missing_or_damaged_index_only_costs_time(long: LogRig, disk: SimulatedDisk, damage: str):
    known = times(long)
    name = index_name(1)
    if damage == "missing":
        long.remove(name)
    elif damage == "flipped":
        long.flip(name, 40)
    elif damage == "of another segment":
        long.directory.rename(index_name(long.segments()[1]), name)
    else:
        disk.fail("read", path=f"*{name}", forever=True)
    seek = long.seek()
    for _ in range(2):
        assert [seek.seek(Seqno(s)) for s in (1, 50, 90)] == [known[s][1] for s in (1, 50, 90)]


def test_an_index_grows_as_it_is_used(long: LogRig, disk: SimulatedDisk):
    long.remove(index_name(1))
    seek = long.seek()
    disk.trace = []
    seek.seek(Seqno(100))
    first = len(disk.trace)
    position = seek.seek(Seqno(101))
    assert position.segment == 1
    index = seek._indexes[1][1]
    assert len(index.offsets) == 3
    assert first
