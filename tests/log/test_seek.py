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


N = 600


@pytest.fixture
def long(rig: LogRig, disk: SimulatedDisk) -> LogRig:
    """Some segments with several index entries each; commit n was made at a second after commit n - 1."""
    log = rig.create(segment_bytes=8 * INDEX_STRIDE_BYTES, time_us=disk.clock_us)
    for n in range(1, N + 1):
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
    assert len(long.segments()) == 5
    seek = long.seek()
    for seqno in [*range(1, N + 1, 7), N, N - 1, 1]:
        assert seek.seek(Seqno(seqno)) == known[seqno][1]
    for seqno in (0, N + 1):
        with pytest.raises(ValueError, match=str(seqno)):
            seek.seek(Seqno(seqno))


def test_seek_time_finds_the_first_commit_after(long: LogRig):
    known = times(long)
    seek = long.seek()
    for seqno in [1, 2, *range(36, 44), *range(76, 84), 100, *range(156, 164), N - 1]:
        time_us = known[seqno][0]
        assert seek.seek_time(time_us) == known[seqno + 1][1]
        assert seek.seqno_at(time_us) == seqno
        assert seek.seqno_at(time_us - 1) == seqno - 1
        assert seek.seek_time(time_us - 1) == known[seqno][1]
    assert seek.seqno_at(0) == 0
    assert seek.seqno_at(1 << 60) == N
    assert seek.seek_time(1 << 60) == LogPosition(
        known[N][1].segment, known[N][1].offset + 40 + len(body(N, 1500))
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
    first, second = (n for n in long.segments() if index_name(n) in long.names())
    name = index_name(first)
    if damage == "missing":
        long.remove(name)
    elif damage == "flipped":
        long.flip(name, 40)
    elif damage == "of another segment":
        long.directory.rename(index_name(second), name)
    else:
        disk.fail("read", path=f"*{name}", forever=True)
    seek = long.seek()
    for _ in range(2):
        some = (1, first, first + 1, first + 50, first + 70, second - 1, second, N)
        assert [seek.seek(Seqno(s)) for s in some] == [known[s][1] for s in some]


def test_an_index_grows_as_it_is_used(long: LogRig, disk: SimulatedDisk):
    *_, first = (n for n in long.segments() if index_name(n) in long.names())
    long.remove(index_name(first))
    seek = long.seek()
    assert seek.seek(Seqno(first + 70)).segment == first
    [(_, index)] = seek._indexes.values()
    assert [first < seqno < first + 70 for seqno in index.seqnos] == [True] * len(index.seqnos)
    assert index.seqnos
    disk.trace = []
    assert seek.seek(Seqno(first + 71)).segment == first
    assert min(op.offset for op in disk.trace if op.name == "pread" and op.offset) == index.offsets[-1]
