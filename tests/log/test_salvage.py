"""Salvage of a log: what verifies, whatever lies between."""

from __future__ import annotations

import errno

import pytest
from log_rig import STORE_ID, LogRig, simulated_disk
from wrapped_files import Wrapped, WrappedFiles

from kvwal.files.names import segment_name
from kvwal.log.segment import HEADER_BYTES, SLOT_OFFSET, SegmentHeader, decode_header, encode_header
from kvwal.testing import SimulatedDisk


@pytest.fixture
def disk() -> SimulatedDisk:
    return simulated_disk()


@pytest.fixture
def rig(disk: SimulatedDisk) -> LogRig:
    return LogRig(disk, "/log")


def test_salvage_of_a_sound_log_is_everything(rig: LogRig):
    rig.made(50)
    assert rig.saved() == (list(range(1, 51)), [])


def test_salvage_saves_what_verifies_around_the_damage(rig: LogRig):
    rig.made(50)
    places = [rig.flip_commit(s) for s in (50, 20, 4, 3)][::-1]
    records, damage = rig.saved()
    assert records == [n for n in range(1, 50) if n not in (3, 4, 20)]
    assert [(d.file, d.offset) for d in damage] == [places[0], places[2], places[3]]
    assert "commits 3 to 4 are missing" in damage[0].reason


def test_salvage_goes_on_behind_missing_and_unreadable_segments(rig: LogRig, disk: SimulatedDisk):
    rig.made(60)
    firsts = rig.segments()
    rig.remove(segment_name(firsts[1]))
    rig.flip(segment_name(firsts[2]), 3)
    records, damage = rig.saved()
    assert records == [*range(1, firsts[1]), *range(firsts[3], 61)]
    # The missing one is told by the gap behind its predecessor, the other by its header.
    assert [d.file for d in damage] == [segment_name(firsts[i]) for i in (0, 2)]
    assert damage[1].reason.endswith(f"; commits {firsts[2]} to {firsts[3] - 1} are missing")


def test_salvage_takes_unreadable_blocks_for_damage(disk: SimulatedDisk):
    rig = LogRig(disk, "/log")
    log = rig.create(segment_bytes=1 << 16)
    rig.fill(log, 40, size=1000)
    log.abandon()

    class Scratched(Wrapped):
        def pread(self, size, offset):
            if offset < 20_000 < offset + size:
                raise OSError(errno.EIO, "bad sector")
            return self.there.pread(size, offset)

    scratched = LogRig(WrappedFiles(disk, Scratched), "/log")
    with pytest.raises(OSError, match="bad sector"):
        scratched.replay()
    records, damage = scratched.saved()
    assert 33 <= len(records) < 40
    assert {d.reason for d in damage if d.offset == 4096 * 4 or "cannot" in d.reason} >= {"cannot be read"}


def test_salvage_does_not_revive_what_was_superseded(rig: LogRig):
    log = rig.create()
    rig.fill(log, 9, sync_every=100)
    log.abandon()
    rig.flip_commit(3)
    rig.resume().close()
    assert rig.saved() == ([1, 2], [])


def test_salvage_says_that_the_newest_segment_is_missing(rig: LogRig):
    rig.made(30)
    *_, before, newest = rig.segments()
    rig.remove(segment_name(newest))
    records, findings = rig.saved()
    assert records == list(range(1, newest))
    [finding] = findings
    assert (finding.file, finding.offset) == (segment_name(newest), None)
    assert f"commits from {newest}" in finding.reason
    # Nothing says so any more if the slot was damaged as well, but that is said.
    rig.flip(segment_name(before), SLOT_OFFSET + 8)
    assert [(f.file, f.offset) for f in rig.saved()[1]] == [(segment_name(before), SLOT_OFFSET)]


def test_salvage_takes_the_last_commit_before_every_damage(rig: LogRig):
    rig.made(30)
    for seqno in range(2, 31):
        content = rig.snapshot()
        rig.flip_commit(seqno)
        records, findings = rig.saved()
        assert records == [n for n in range(1, 31) if n != seqno]
        assert bool(findings)
        rig.restore(content)


def test_salvage_says_which_feature_it_does_not_know(rig: LogRig):
    rig.made(3)
    header = decode_header(rig.read(segment_name(1))[:4096], 1, STORE_ID)
    assert isinstance(header, SegmentHeader)
    rig.overwrite(segment_name(1), 0, encode_header(header._replace(required=1 << 5))[:HEADER_BYTES])
    records, [finding] = rig.saved()
    assert records == []
    assert "required features 5" in finding.reason
