"""Proof of a log: what verify names, and what it does not call damage."""

from __future__ import annotations

import errno

import pytest
from log_rig import STORE_ID, LogRig, entry, simulated_disk

from kvwal.errors import CorruptionError, RefusedError, SystemCallError
from kvwal.files.names import index_name, segment_name
from kvwal.keys import Seqno
from kvwal.log import LogPosition
from kvwal.log.index import INDEX_STRIDE_BYTES, Index
from kvwal.log.segment import decode_header
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


def test_verify_finds_nothing_in_a_sound_log(long: LogRig):
    assert long.verify() == []


def test_verify_names_every_damage_and_goes_on(rig: LogRig):
    rig.made(50)
    second, third = rig.segments()[1:3]
    places = [rig.flip_commit(3), rig.flip_commit(third + 1)]
    rig.flip(segment_name(second), 50)
    found = rig.verify()
    assert {(d.file, d.offset) for d in found} == {
        *places,
        (segment_name(second), 0),
    }


def test_verify_sees_an_index_that_lies(rig: LogRig):
    rig.made(30)
    header = decode_header(rig.read(segment_name(1))[:4096], 1, STORE_ID)
    lie = Index()
    lie.add(1, 1, 4097)
    file = rig.directory.open(index_name(1), create=True)
    file.pwrite(lie.encode(header), 0)
    assert [d.file for d in rig.verify()] == [index_name(1)]


def test_verify_does_not_call_a_torn_index_damage(long: LogRig):
    name = next(index_name(n) for n in long.segments() if index_name(n) in long.names())
    long.flip(name, 50)
    assert long.verify() == []


def test_verify_names_missing_segments(rig: LogRig):
    rig.made(50)
    rig.remove(segment_name(rig.segments()[1]))
    rig.remove(segment_name(rig.segments()[-1]))
    assert len({d.file for d in rig.verify()}) == 2


def test_verify_sees_a_damaged_watermark_record(rig: LogRig):
    log = rig.create()
    rig.fill(log, 2)
    offset = 4096 + log.tail_bytes
    log.mark_idle()
    rig.fill(log, 2)
    log.abandon()
    rig.flip(segment_name(1), offset + 30)
    assert [d.offset for d in rig.verify()] == [offset]


def test_verify_reports_what_cannot_be_read(rig: LogRig, disk: SimulatedDisk):
    rig.made(30)
    disk.fail("read", nth=4, error=errno.EIO)
    found = rig.verify()
    assert len(found) == 1
    assert "cannot be read" in found[0].reason


def test_verify_does_not_call_a_torn_tail_damage(rig: LogRig):
    rig.made(5)
    rig.flip_commit(5)
    assert rig.verify() == []


def test_a_commit_whose_body_is_nonsense_is_damage(rig: LogRig):
    log = rig.create()
    rig.fill(log, 1)
    log.append([b"nonsense"])
    log.close()
    place = rig.offset(2)
    assert [(d.file, d.offset) for d in rig.verify()] == [place]
    with pytest.raises(CorruptionError, match="columns"):
        rig.replay()


def test_files_that_cannot_be_opened_are_damage_for_verify_and_salvage_only(rig: LogRig, disk: SimulatedDisk):
    rig.made(30)
    first, second, third = rig.segments()
    name = segment_name(second)
    disk.fail("open", error=errno.EIO, path=f"*{name}", forever=True)
    assert [d.file for d in rig.verify()] == [name]
    records, damage = rig.saved()
    assert records == [*range(first, second), *range(third, 31)]
    assert name in {d.file for d in damage}
    assert [(s.first_seqno, s.created_us > 0) for s in rig.reader().segments()] == [
        (first, True),
        (second, False),
        (third, True),
    ]
    with pytest.raises(SystemCallError, match="device"):
        rig.replay()
    assert rig.replay(after=third - 1)[1].last_seqno == 30


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_files_that_the_system_refuses_to_open_are_no_damage(rig: LogRig, disk: SimulatedDisk, code: int):
    rig.made(30)
    disk.fail("open", error=code, path=f"*{segment_name(rig.segments()[1])}", forever=True)
    for read in (rig.verify, rig.saved, rig.replay):
        with pytest.raises(RefusedError):
            read()
