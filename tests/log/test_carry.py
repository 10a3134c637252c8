"""Commits that are written into a segment in stretches: the bytes and index entries that each has alone."""

from __future__ import annotations

import random

import pytest

from kvwal.keys import Seqno
from kvwal.log.carry import write_records
from kvwal.log.commits import Commit, Commits
from kvwal.log.index import Index
from kvwal.log.intents import TABLES
from kvwal.log.record import COMMIT, WATERMARK, encode_record
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader
from kvwal.testing import SimulatedDisk


@pytest.mark.parametrize("salt", [0, 12345, 0xFFFFFFFF - 70_000])
@pytest.mark.parametrize(("watermark", "most"), [(0, 3000), (50, 3000), (99, 60_000), (150, 3000), (500, 3000)])
def test_each_record_is_as_it_is_alone(watermark: int, most: int, salt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.log.carry.WRITE_BYTES", 100_000)
    draw = random.Random(watermark + salt)
    commits: list[Commit] = [
        (COMMIT | draw.choice([0, TABLES]), Seqno(100 + n), 1000 + n // 3, draw.randbytes(draw.randint(0, most)))
        for n in range(150)
    ]
    stretches, begin = [], 0
    while begin < len(commits):
        size = draw.randint(1, 40)
        stretches.append(Commits.of(commits[begin : begin + size]))
        begin += size
    disk = SimulatedDisk()
    disk.make_directory("/s")
    file = disk.open_directory("/s").open("f", create=True)
    disk.trace = []
    found = Index()
    segment = SegmentHeader(bytes(16), Seqno(100), 1000, salt, 0x0A0B0C0D, 1 << 20, Seqno(0))
    end, last = write_records(file, segment, found, stretches, Seqno(99), Seqno(watermark), 5)
    assert max(each.size for each in disk.trace) < 200_000 + 2 * most, "it is written in small pieces"
    disk.trace = None
    expected, entries, offset = b"", Index(), HEADER_PAGE_BYTES
    for kind, seqno, time_us, body in commits:
        if offset >= entries.next_offset:
            entries.add(seqno, time_us, offset)
        mark = Seqno(min(watermark, seqno - 1))
        expected += encode_record(segment.marker, salt + offset, kind, seqno, mark, time_us, body)
        offset = HEADER_PAGE_BYTES + len(expected)
    expected += encode_record(segment.marker, salt + offset, WATERMARK, Seqno(249), Seqno(249), commits[-1][2])
    assert (end, last) == (HEADER_PAGE_BYTES + len(expected), 249)
    assert file.pread(1 << 24, HEADER_PAGE_BYTES) == expected
    assert found == entries
    assert len(entries.offsets) > 2
