"""Replaying a log into memtables: into one, or into a new one behind each segment, which is the same together."""

from __future__ import annotations

from random import Random

import kvwal
from kvwal.engine.memtable import Memtable
from kvwal.engine.recovery import replay
from kvwal.keys import Seqno
from kvwal.log import LogReader
from kvwal.testing import SimulatedDisk


def logged() -> LogReader:
    """A log of many segments: puts, alone and many in a row, batches, deletes, ranges, another table."""
    disk, draw = SimulatedDisk(), Random(6)
    with kvwal.open("/s", files=disk, background=False, segment_bytes=16 << 10, checkpoint_log_bytes=1 << 30) as db:
        table = db.table("t", bytes, bytes)
        for n in range(600):
            key = b"%03d" % draw.randrange(200)
            match draw.randrange(14):
                case 0:
                    db.delete(key)
                case 1:
                    db.delete_range(key, b"%03d" % (int(key) + 9))
                case 2:
                    table[key] = b"%d" % n
                case 3:
                    db.update({b"%03d" % draw.randrange(200): draw.randbytes(40) for _ in range(9)})
                case 4:
                    db.put(key, draw.randbytes(900), expire_s=1e9)
                case _:
                    db[key] = draw.randbytes(200)
        db.engine.abandon()
    return LogReader(disk.open_directory("/s"), None)


def told(memtable: Memtable) -> object:
    """What it says of every key, in table 0 and in each other one."""
    keys = [b"%03d" % n for n in range(200)]
    others = [(number, [part.get(key) for key in keys], len(part)) for number, part in memtable.parts.written()]
    return [memtable.get(key) for key in keys], others, len(memtable), memtable.last_seqno


def test_a_memtable_behind_each_segment_has_the_commits_of_that_segment() -> None:
    reader = logged()
    first = Seqno(7)
    memtables: list[Memtable] = []
    times: list[int] = []

    def go_on_in(memtable: Memtable, time_us: int) -> Memtable:
        memtables.append(memtable)
        times.append(time_us)
        return Memtable(memtable.last_seqno)

    commits, size, end = replay(reader, first, Memtable(first), first, go_on_in)
    firsts = [segment.first_seqno for segment in reader.segments()]
    ends = [*(each - 1 for each in firsts[1:]), end.last_seqno]
    assert [memtable.last_seqno for memtable in memtables] == ends
    assert len(memtables) > 5
    before = first
    for memtable, time_us in zip(memtables, times, strict=True):
        slow = Memtable(before)
        slow_time_us = 0
        for record in reader.replay(before, before):
            if record.seqno <= memtable.last_seqno:
                batch = record.batch()
                slow.write(record.seqno, batch.writes, record.size, batch.ranges, batch.parts())
                slow.last_seqno, slow_time_us = record.seqno, record.time_us
        assert told(memtable) == told(slow)
        assert time_us == slow_time_us
        before = memtable.last_seqno
    whole = Memtable(first)
    assert replay(reader, first, whole, first)[:2] == (commits, size)
    assert commits == end.last_seqno - first
    assert whole.bytes_used == sum(memtable.bytes_used for memtable in memtables)


def test_one_that_is_not_full_goes_on() -> None:
    reader = logged()
    asked: list[int] = []

    def go_on_in(memtable: Memtable, time_us: int) -> Memtable:
        asked.append(memtable.bytes_used)
        return memtable

    memtable, whole = Memtable(Seqno(0)), Memtable(Seqno(0))
    found = replay(reader, Seqno(0), memtable, Seqno(0), go_on_in)
    assert found[:2] == replay(reader, Seqno(0), whole, Seqno(0))[:2]
    whole.last_seqno = memtable.last_seqno
    assert told(memtable) == told(whole)
    assert asked == sorted(asked)
    assert asked[-1] == memtable.bytes_used == whole.bytes_used
