"""Proof of a log: what verify names, and what it does not call damage."""

from __future__ import annotations

import errno
import struct
from random import Random

import pytest
from crc32c import crc32c
from key_log import KeyLog
from log_rig import STORE_ID, LogRig, entry, simulated_disk

from kvwal.errors import CorruptionError, RefusedError, SystemCallError
from kvwal.files.names import index_name, keys_name, segment_name
from kvwal.keys import Seqno
from kvwal.log import LogPosition
from kvwal.log.index import INDEX_STRIDE_BYTES, Index
from kvwal.log.keys import CRC, HASH_BYTES, MARK_BYTES
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


# -- key indexes -------------------------------------------------------------------------------


@pytest.fixture
def indexed(rng: Random) -> KeyLog:
    log = KeyLog(rng)
    log.fill(4)
    log.make_indexes()
    assert log.rig.verify() == []
    return log


def test_a_byte_of_a_key_index_that_is_not_as_it_was_written_is_derived_damage(indexed: KeyLog) -> None:
    for first in indexed.rig.segments()[:-1]:
        name = f"/log/{keys_name(first)}"
        data = indexed.disk.read(name)
        for at in {*range(0, 90, 7), *indexed.rng.sample(range(len(data)), 12), len(data) - 1}:
            indexed.disk.flip(name, at)
            found = indexed.rig.verify()
            assert [(finding.file, finding.is_derived) for finding in found] == [(keys_name(first), True)], at
            assert "made again when it is needed" in found[0].reason
            indexed.disk.flip(name, at)
    assert indexed.rig.verify() == []


def test_a_key_index_that_is_cut_short_or_of_another_segment_is_derived_damage(indexed: KeyLog) -> None:
    first, second = indexed.rig.segments()[:2]
    whole, other = (indexed.disk.read(f"/log/{keys_name(each)}") for each in (first, second))
    for data in (b"", whole[:50], whole[:-1], whole + b"x", other):
        write(indexed.disk, keys_name(first), data)
        assert [finding.is_derived for finding in indexed.rig.verify()] == [True]
    # As after a reopening.
    indexed.history.forget(first)
    indexed.history.last(0, b"never", Seqno(0), Seqno(second - 1))
    assert indexed.rig.verify() == []
    assert indexed.disk.read(f"/log/{keys_name(first)}") == whole


def test_a_key_index_that_verifies_and_lies_is_a_problem(indexed: KeyLog) -> None:
    """It would be believed: what it does not name is not found in the past."""
    # Of the first segment that has a row: the commits of one may have deleted ranges alone.
    indexes = [(first, indexed.disk.read(f"/log/{keys_name(first)}")) for first in indexed.rig.segments()[:-1]]
    first, data = next((first, data) for first, data in indexes if struct.unpack_from("<I", data, 40)[0])
    write(indexed.disk, keys_name(first), lying(data))
    [found] = indexed.rig.verify()
    assert (found.file, found.is_derived) == (keys_name(first), False)
    assert "remove it" in found.reason


def test_what_is_left_without_a_key_index_is_not_missed(indexed: KeyLog) -> None:
    name = keys_name(indexed.rig.segments()[0])
    indexed.disk.open_directory("/log").unlink(name)
    assert indexed.rig.verify() == []


def test_a_damaged_segment_says_nothing_of_its_key_index(indexed: KeyLog) -> None:
    first = indexed.rig.segments()[0]
    name = f"/log/{segment_name(first)}"
    # In the first record, behind the header: the second may be beyond the end of a short segment.
    indexed.disk.flip(name, 4126)
    assert [finding.file for finding in indexed.rig.verify()] == [segment_name(first)]


def test_a_key_index_without_marks_is_no_problem_while_it_tells_the_truth(indexed: KeyLog) -> None:
    for first in indexed.rig.segments()[:-1]:
        data = indexed.disk.read(f"/log/{keys_name(first)}")
        k, t, n = (struct.unpack_from("<I", data, at)[0] for at in (44, 48, 40))
        marks_at = 72 + 8 * t + 8 * -(-n // 256) + (HASH_BYTES + 4) * -(-k // 256)
        head_end = len(data) - 12 * n - 10 * k - CRC.size
        head = data[:68] + bytes(4) + data[72:marks_at] + data[marks_at + MARK_BYTES * k : head_end]
        write(indexed.disk, keys_name(first), head + CRC.pack(crc32c(head)) + data[head_end + CRC.size :])
    assert indexed.rig.verify() == []


def lying(data: bytes) -> bytes:
    """A key index with another offset in one row, and all checksums right."""
    n, k = struct.unpack_from("<II", data, 40)
    t, ranges, fences = (struct.unpack_from(f"<{kind}", data, at)[0] for kind, at in (("I", 48), ("Q", 56), ("I", 64)))
    blocks = 72 + 8 * t
    head_end = blocks + 8 * -(-n // 256) + (HASH_BYTES + 4) * -(-k // 256) + MARK_BYTES * k + fences + ranges
    changed = bytearray(data)
    order = head_end + CRC.size
    changed[order + 4] ^= 1
    struct.pack_into("<I", changed, blocks + 4, crc32c(changed[order : order + 12 * min(n, 256)]))
    struct.pack_into("<I", changed, head_end, crc32c(changed[:head_end]))
    return bytes(changed)


def write(disk: SimulatedDisk, name: str, data: bytes) -> None:
    file = disk.open_directory("/log").open(name, write=True)
    file.truncate(0)
    file.pwrite(data, 0)
    file.close()
