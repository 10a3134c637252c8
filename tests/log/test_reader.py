"""Replay and history, also while a writer is at work."""

from __future__ import annotations

import threading

import pytest
from log_rig import LogRig, entry, simulated_disk

from kvwal.errors import CorruptionError
from kvwal.files import system_files
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log import LogPosition
from kvwal.log.index import INDEX_STRIDE_BYTES
from kvwal.log.segment import SegmentHeader
from kvwal.log.tail import TailRow
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


def test_replay_begins_at_the_index_and_not_at_the_segments_start(long: LogRig, disk: SimulatedDisk):
    # What is damaged before the place where replay begins does not matter to it.
    long.flip_commit(20)
    assert long.replay(after=60, floor=60)[0] == list(range(61, 301))


def test_replay_of_nothing_begins_at_the_clean_close(rig: LogRig):
    log = rig.grown()
    log.close()
    last = int(log.last_seqno)
    whole = rig.replay(after=last - 1, floor=last - 1)[1]
    name, _ = rig.flip_commit(last)
    # Nothing before the end is asked for, so nothing is read of it.
    found, end = rig.replay(after=last, floor=last)
    assert (found, end) == ([], whole)
    with pytest.raises(CorruptionError):
        rig.replay(after=last - 1, floor=last - 1)
    # A close that is damaged, or is not where the replay would begin, tells nothing: then the commits do.
    size = len(rig.read(name))
    with pytest.raises(CorruptionError):
        rig.replay(after=last, floor=last + 1)
    for at in range(size - 40, size):
        rig.flip(name, at)
        with pytest.raises(CorruptionError):
            rig.replay(after=last, floor=last)
        rig.flip(name, at)
    rig.cut(name, size - 1)
    with pytest.raises(CorruptionError):
        rig.replay(after=last, floor=last)


def test_a_closed_segment_before_a_later_one_is_read(rig: LogRig):
    log = rig.grown()
    log.close()
    last = int(log.last_seqno)
    log = rig.resume()
    rig.fill(log, 3)
    log.close()
    assert rig.segments()[-1] == last + 1
    for after in range(last - 3, last + 4):
        found, end = rig.replay(after=after, floor=after)
        assert found == list(range(after + 1, last + 4))
        assert (end.row, end.last_seqno, end.cut_bytes) == (TailRow.CLOSED, last + 3, 0)


def test_segments_tell_what_there_is(rig: LogRig):
    log = rig.create()
    rig.fill(log, 40)
    assert rig.reader().segments() == log.segments()
    assert [s.sealed for s in log.segments()] == [True, True, True, False]
    rig.flip(segment_name(1), 40)
    assert (rig.reader().segments()[0].created_us, rig.reader().segments()[0].wall_us) == (0, 0)
    log.abandon()


def test_a_segment_that_was_shortened_by_a_clean_close_is_sealed(rig: LogRig):
    log = rig.grown()
    assert not rig.reader().segments()[-1].sealed
    log.close()
    assert rig.reader().segments()[-1].sealed


# -- while a writer is at work -----------------------------------------------------------------


def test_reading_while_a_writer_appends_rolls_and_retires(tmp_path_factory: pytest.TempPathFactory):
    rig = LogRig(system_files(), str(tmp_path_factory.mktemp("log")))
    log = rig.create(segment_bytes=20_000)
    over = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        reader = rig.reader()
        try:
            while not over.is_set():
                after = max(0, log.durable_seqno - 100)
                until = log.durable_seqno
                seqnos = [r.seqno for r in log.read(Seqno(after), until=until)]
                assert seqnos == list(range(after + 1, until + 1))
                for record in reader.replay(Seqno(until), until):
                    record.batch()
        except BaseException as error:  # noqa: BLE001  # handed to the main thread
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for n in range(1, 4001):
        log.append_put(*entry(n, 50))
        if n % 5 == 0:
            log.sync()
        if n % 500 == 0:
            log.retire(Seqno(max(1, n - 2000)))
    over.set()
    thread.join()
    log.close()
    assert failures == []


def test_the_segment_before_the_one_that_follows_is_not_asked() -> None:
    rig = LogRig(simulated_disk(), "/log")
    log = rig.create()
    rig.fill(log, 60)
    second, third = (segment.first_seqno for segment in log.segments()[1:3])
    log.close()
    rig.flip(segment_name(second), 40)
    _, found = rig.reader().chain.beyond(third - 1)
    assert found[0].first_seqno == third
    assert all(isinstance(each.header, SegmentHeader) for each in found)
