"""No flipped byte of a log is ever answered with wrong records, or with silently fewer than were acknowledged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from log_rig import LogRig, check_content, simulated_disk

from kvwal.errors import CorruptionError, FormatError
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk

HOW = ["killed", "idle", "closed", "rewritten", "unsynced"]


def small_log(how: str) -> tuple[LogRig, SimulatedDisk, int]:
    """Two segments with a few commits; returns how many of them were acknowledged and are protected by a watermark."""
    disk = simulated_disk()
    rig = LogRig(disk, "/log")
    log = rig.create(segment_bytes=4096 + 350)
    rig.fill(log, 7, sync_every=100 if how == "unsynced" else 1)
    protected = {"killed": 6, "idle": 7, "closed": 7, "rewritten": 7, "unsynced": 4}[how]
    if how == "idle":
        log.mark_idle()
    if how == "closed":
        log.close()
    else:
        log.abandon()
    if how == "rewritten":
        rig.resume(segment_bytes=4096 + 350).abandon()
    assert len(rig.segments()) >= 2
    return rig, disk, protected


def answer(rig: LogRig) -> tuple[list[int], str]:
    """What replay finds, or the file it refuses."""
    try:
        seqnos, _ = rig.replay()
    except CorruptionError as error:
        return [], error.file
    except FormatError as error:
        return [], str(error).split(" ")[0].rstrip(":")
    return seqnos, ""


def places(rig: LogRig) -> Iterator[tuple[str, int]]:
    """Every byte that means something, and some that do not."""
    for name in rig.names():
        data = rig.read(name)
        for offset, byte in enumerate(data):
            if byte or offset < 80 or 2048 <= offset < 2070 or offset % 61 == 0:
                yield name, offset


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_answered_with_the_truth(how: str, mask: int):
    rig, disk, protected = small_log(how)
    tried = 0
    for name, offset in places(rig):
        byte = rig.read(name)[offset]
        disk.damage(f"/log/{name}", offset, bytes((byte ^ mask,)))
        seqnos, refused = answer(rig)
        # The contents were checked by the rig.
        assert refused or len(seqnos) >= protected, (name, offset)
        disk.damage(f"/log/{name}", offset, bytes((byte,)))
        tried += 1
    assert tried > 500
    assert rig.replay()[0] == [1, 2, 3, 4, 5, 6, 7]


def test_every_flipped_byte_leaves_salvage_and_search_with_right_answers():
    rig, disk, _ = small_log("closed")
    for name, offset in places(rig):
        byte = rig.read(name)[offset]
        disk.damage(f"/log/{name}", offset, bytes((byte ^ 0x10,)))
        saved, _ = rig.salvage()
        for record in saved:
            check_content(record.batch(), record.seqno)
        seqnos = [record.seqno for record in saved]
        assert seqnos == sorted(set(seqnos))
        assert len(seqnos) >= 6 or offset < 4096, (name, offset)
        for seqno in (1, 4, 7):
            try:
                position = rig.seek().seek(Seqno(seqno))
            except (CorruptionError, FormatError, ValueError):
                continue
            assert position.offset >= 4096
        disk.damage(f"/log/{name}", offset, bytes((byte,)))


@pytest.mark.parametrize("how", HOW)
def test_a_missing_file_is_never_silent(how: str):
    rig, _, protected = small_log(how)
    for name in rig.names():
        content = rig.snapshot()
        rig.remove(name)
        seqnos, refused = answer(rig)
        assert refused == name if name.endswith(".log") else len(seqnos) >= protected
        rig.restore(content)


@pytest.mark.parametrize("how", HOW)
def test_a_file_cut_short_anywhere_is_never_silent(how: str):
    rig, _, _ = small_log(how)
    content = rig.snapshot()
    for name, data in content.items():
        for size in range(0, len(data), 13):
            rig.cut(name, size)
            seqnos, refused = answer(rig)
            assert refused == name or len(seqnos) == 7
            rig.restore(content)


@pytest.mark.parametrize("by", [None, 512, 40, -4096])
def test_a_write_that_the_disk_lost_or_put_elsewhere_is_never_silent(by: int | None):
    """Every write of a life, one at a time. Only the very last commit may be missing: nothing says it was there."""
    nth = 0
    while True:
        nth += 1
        disk = simulated_disk()
        rig = LogRig(disk, "/log")
        fault = disk.lose_write(nth) if by is None else disk.misdirect_write(nth, by=by)
        log = rig.create(segment_bytes=4096 + 500)
        rig.fill(log, 20)
        log.abandon()
        disk.heal()
        seqnos, refused = answer(LogRig(disk.crash(0), "/log"))
        assert refused or len(seqnos) >= 19
        if not fault.struck:
            assert len(seqnos) == 20
            break
    assert nth > 20


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_write_that_the_disk_lost_while_a_tail_was_rewritten_is_never_silent(nth: int):
    disk = simulated_disk()
    rig = LogRig(disk, "/log").made(7, sync_every=100)
    disk.lose_write(nth, path="*.tmp")
    rig.resume().abandon()
    seqnos, refused = answer(LogRig(disk.crash(0), "/log"))
    assert refused or len(seqnos) == 7
