"""Searching, verifying and salvaging, also while a writer is at work."""

from __future__ import annotations

import errno
import threading

import pytest
from log_rig import STORE_ID, LogRig, body, entry, simulated_disk
from wrapped_files import WrappedFiles

from kvwal.errors import CorruptionError
from kvwal.files import system_files
from kvwal.keys import Seqno
from kvwal.log import Damage, LogPosition, Record
from kvwal.log.index import INDEX_STRIDE_BYTES, Index, index_name
from kvwal.log.record import segment_name
from kvwal.log.segment import decode_header
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
    return {r.seqno: (r.time_us, r.position) for r in rig.reader().records(Seqno(0), Seqno(0))}


# -- search ------------------------------------------------------------------------------------


def test_seek_finds_every_commit(long: LogRig):
    known = times(long)
    assert len(long.segments()) == 3
    reader = long.reader()
    for seqno in [*range(1, 301, 7), 300, 299, 1]:
        assert reader.seek(Seqno(seqno)) == known[seqno][1]
    for seqno in (0, 301):
        with pytest.raises(ValueError, match=str(seqno)):
            reader.seek(Seqno(seqno))


def test_seek_time_finds_the_first_commit_after(long: LogRig):
    known = times(long)
    reader = long.reader()
    for seqno in [1, 2, 100, 101, 102, 115, 116, 117, 118, 119, 120, 121, 299]:
        time_us = known[seqno][0]
        assert reader.seek_time(time_us) == known[seqno + 1][1]
        assert reader.seqno_at(time_us) == seqno
        assert reader.seqno_at(time_us - 1) == seqno - 1
        assert reader.seek_time(time_us - 1) == known[seqno][1]
    assert reader.seqno_at(0) == 0
    assert reader.seqno_at(1 << 60) == 300
    assert reader.seek_time(1 << 60) == LogPosition(
        known[300][1].segment, known[300][1].offset + 40 + len(body(300, 1500))
    )


def test_a_time_between_two_segments_leads_to_the_younger(long: LogRig):
    known = times(long)
    for segment in long.reader().segments()[1:]:
        before = known[segment.first_seqno - 1][0]
        assert before < segment.created_us - 1
        assert long.reader().seek_time(segment.created_us - 1) == LogPosition(segment.first_seqno, 4096)
        assert long.reader().seqno_at(before) == segment.first_seqno - 1


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
    reader = long.reader()
    for _ in range(2):
        assert [reader.seek(Seqno(s)) for s in (1, 50, 90)] == [known[s][1] for s in (1, 50, 90)]


def test_an_index_grows_as_it_is_used(long: LogRig, disk: SimulatedDisk):
    long.remove(index_name(1))
    reader = long.reader()
    disk.trace = []
    reader.seek(Seqno(100))
    first = len(disk.trace)
    position = reader.seek(Seqno(101))
    assert position.segment == 1
    index = reader._indexes[1][1]
    assert len(index.offsets) == 3
    assert first


def test_replay_begins_at_the_index_and_not_at_the_segments_start(long: LogRig, disk: SimulatedDisk):
    # What is damaged before the place where replay begins does not matter to it.
    long.flip_commit(20)
    assert long.replay(after=60, floor=60)[0] == list(range(61, 301))


def test_replay_of_nothing_begins_at_the_clean_close(rig: LogRig):
    log = rig.create()
    rig.fill(log, 9)
    log.close()
    whole = rig.replay(after=8, floor=8)[1]
    name, _ = rig.flip_commit(9)
    # Nothing before the end is asked for, so nothing is read of it.
    found, end = rig.replay(after=9, floor=9)
    assert (found, end) == ([], whole)
    with pytest.raises(CorruptionError):
        rig.replay(after=8, floor=8)
    # A close that is damaged, or is not where the replay would begin, tells nothing: then the commits do.
    size = len(rig.read(name))
    with pytest.raises(CorruptionError):
        rig.replay(after=9, floor=10)
    for at in range(size - 40, size):
        rig.flip(name, at)
        with pytest.raises(CorruptionError):
            rig.replay(after=9, floor=9)
        rig.flip(name, at)
    rig.cut(name, size - 1)
    with pytest.raises(CorruptionError):
        rig.replay(after=9, floor=9)


def test_a_closed_segment_before_a_later_one_is_read(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.close()
    log = rig.resume()
    rig.fill(log, 3)
    log.close()
    for after in range(7):
        found, end = rig.replay(after=after, floor=after)
        assert found == list(range(after + 1, 7))
        assert (end.row, end.last_seqno, end.cut_bytes) == (TailRow.CLOSED, 6, 0)


def test_history_begins_where_the_log_does(rig: LogRig):
    log = rig.create()
    rig.fill(log, 60)
    log.retire(Seqno(30))
    first = rig.segments()[0]
    assert first > 1
    reader = rig.reader()
    assert [r.seqno for r in reader.history(Seqno(0), Seqno(50))] == list(range(first, 51))
    assert [r.seqno for r in reader.history(Seqno(40), Seqno(60))] == list(range(41, 61))
    assert list(reader.history(Seqno(60), Seqno(60))) == []
    with pytest.raises(CorruptionError):
        list(reader.history(Seqno(40), Seqno(61)))


def test_segments_tell_what_there_is(rig: LogRig):
    log = rig.create()
    rig.fill(log, 40)
    assert rig.reader().segments() == log.segments()
    assert [s.sealed for s in log.segments()] == [True, True, True, False]
    log.close()
    assert [s.sealed for s in rig.reader().segments()] == [True] * 4
    rig.flip(segment_name(1), 40)
    assert rig.reader().segments()[0].created_us == 0


# -- verify ------------------------------------------------------------------------------------


def test_verify_finds_nothing_in_a_sound_log(long: LogRig):
    assert list(long.reader().verify()) == []


def test_verify_names_every_damage_and_goes_on(rig: LogRig):
    rig.made(50)
    second, third = rig.segments()[1:3]
    places = [rig.flip_commit(3), rig.flip_commit(third + 1)]
    rig.flip(segment_name(second), 50)
    found = list(rig.reader().verify())
    assert {(d.file, d.offset) for d in found} == {
        *places,
        (segment_name(second), 0),
    }


def test_verify_sees_an_index_that_lies(rig: LogRig):
    rig.made(30)
    header = decode_header(rig.read(segment_name(1))[:4096], 1, STORE_ID)
    lie = Index()
    lie.add(1, 1, 4097)
    rig.remove(index_name(1))
    file = rig.directory.open(index_name(1), create=True)
    file.pwrite(lie.encode(header), 0)
    assert [d.file for d in rig.reader().verify()] == [index_name(1)]


def test_verify_does_not_call_a_torn_index_damage(rig: LogRig):
    rig.made(30)
    rig.flip(index_name(1), 50)
    assert list(rig.reader().verify()) == []


def test_verify_names_missing_segments(rig: LogRig):
    rig.made(50)
    rig.remove(segment_name(rig.segments()[1]))
    rig.remove(segment_name(rig.segments()[-1]))
    assert len({d.file for d in rig.reader().verify()}) == 2


def test_verify_sees_a_damaged_watermark_record(rig: LogRig):
    log = rig.create()
    rig.fill(log, 2)
    offset = 4096 + log.tail_bytes
    log.mark_idle()
    rig.fill(log, 2)
    log.abandon()
    rig.flip(segment_name(1), offset + 30)
    assert [d.offset for d in rig.reader().verify()] == [offset]


def test_verify_reports_what_cannot_be_read(rig: LogRig, disk: SimulatedDisk):
    rig.made(30)
    disk.fail("read", nth=4, error=errno.EIO)
    found = list(rig.reader().verify())
    assert len(found) == 1
    assert "cannot be read" in found[0].reason


def test_verify_does_not_call_a_torn_tail_damage(rig: LogRig):
    rig.made(5)
    rig.flip_commit(5)
    assert list(rig.reader().verify()) == []


def test_a_commit_whose_body_is_nonsense_is_damage(rig: LogRig):
    log = rig.create()
    rig.fill(log, 1)
    log.append([b"nonsense"])
    log.close()
    place = rig.offset(2)
    assert [(d.file, d.offset) for d in rig.reader().verify()] == [place]
    with pytest.raises(CorruptionError, match="columns"):
        rig.replay()


def test_files_that_cannot_be_opened_are_damage_for_verify_and_salvage_only(rig: LogRig, disk: SimulatedDisk):
    rig.made(30)
    first, second, third = rig.segments()
    name = segment_name(second)
    disk.fail("open", error=errno.EACCES, path=f"*{name}", forever=True)
    assert [d.file for d in rig.reader().verify()] == [name]
    records, damage = saved(rig)
    assert records == [*range(first, second), *range(third, 31)]
    assert name in {d.file for d in damage}
    assert [(s.first_seqno, s.created_us > 0) for s in rig.reader().segments()] == [
        (first, True),
        (second, False),
        (third, True),
    ]
    with pytest.raises(PermissionError):
        rig.replay()
    assert rig.replay(after=third - 1)[1].last_seqno == 30


# -- salvage -----------------------------------------------------------------------------------


def saved(rig: LogRig) -> tuple[list[int], list[Damage]]:
    records: list[int] = []
    damage: list[Damage] = []
    for found in rig.reader().salvage():
        if isinstance(found, Record):
            records.append(found.seqno)
        else:
            damage.append(found)
    return records, damage


def test_salvage_of_a_sound_log_is_everything(rig: LogRig):
    rig.made(50)
    assert saved(rig) == (list(range(1, 51)), [])


def test_salvage_saves_what_verifies_around_the_damage(rig: LogRig):
    rig.made(50)
    places = [rig.flip_commit(s) for s in (50, 20, 4, 3)][::-1]
    records, damage = saved(rig)
    assert records == [n for n in range(1, 50) if n not in (3, 4, 20)]
    assert [(d.file, d.offset) for d in damage] == [places[0], places[2], places[3]]
    assert "commits 3 to 4 are missing" in damage[0].reason


def test_salvage_goes_on_behind_missing_and_unreadable_segments(rig: LogRig, disk: SimulatedDisk):
    rig.made(60)
    firsts = rig.segments()
    rig.remove(segment_name(firsts[1]))
    rig.flip(segment_name(firsts[2]), 3)
    records, damage = saved(rig)
    assert records == [*range(1, firsts[1]), *range(firsts[3], 61)]
    # The missing one is told by the gap behind its predecessor, the other by its header and by the gap behind it.
    assert [d.file for d in damage] == [segment_name(firsts[i]) for i in (0, 2, 3)]


def test_salvage_takes_unreadable_blocks_for_damage(disk: SimulatedDisk):
    rig = LogRig(disk, "/log")
    log = rig.create(segment_bytes=1 << 16)
    rig.fill(log, 40, size=1000)
    log.abandon()

    class Scratched:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def pread(self, size, offset):
            if offset < 20_000 < offset + size:
                raise OSError(errno.EIO, "bad sector")
            return self.file.pread(size, offset)

    scratched = LogRig(WrappedFiles(disk, lambda file, name: Scratched(file)), "/log")
    with pytest.raises(OSError, match="bad sector"):
        scratched.replay()
    records, damage = saved(scratched)
    assert 33 <= len(records) < 40
    assert {d.reason for d in damage if d.offset == 4096 * 4 or "cannot" in d.reason} >= {"cannot be read"}


def test_salvage_does_not_revive_what_was_superseded(rig: LogRig):
    log = rig.create()
    rig.fill(log, 9, sync_every=100)
    log.abandon()
    rig.flip_commit(3)
    rig.resume().close()
    assert saved(rig) == ([1, 2], [])


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
                seqnos = [r.seqno for r in reader.history(Seqno(after), until)]
                assert seqnos == list(range(after + 1, until + 1))
                for record in reader.records(Seqno(until), until):
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
