"""The writer: appends, rolls, retirement, beginning and ending."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_rig import SEGMENT_BYTES, STORE_ID, LogRig, body, entry, simulated_disk

from kvwal.batch import WriteBatch
from kvwal.errors import ClosedError, CorruptionError, StoreExistsError
from kvwal.features import EXTENSIONS, KEYSPACES
from kvwal.files import system_files
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log import LogWriter, TailRow, encode_intents
from kvwal.log.segment import SLOT_OFFSET, SegmentHeader, decode_header
from kvwal.testing import Operation, SimulatedDisk

RECORD_BYTES = 40 + len(body(1))


@pytest.fixture
def disk() -> SimulatedDisk:
    return simulated_disk()


@pytest.fixture
def rig(disk: SimulatedDisk) -> LogRig:
    return LogRig(disk, "/log")


# -- appending ---------------------------------------------------------------------------------


def test_append_put_and_append_write_the_same_kind_of_record(rig: LogRig):
    log = rig.create()
    assert log.append_put(*entry(1)) == 1
    assert log.append([body(2), [body(3)], [body(4)[:9], body(4)[9:]]]) == 4
    assert (log.last_seqno, log.durable_seqno) == (4, 0)
    log.sync()
    assert log.durable_seqno == 4
    log.abandon()
    assert rig.replay()[0] == [1, 2, 3, 4]


def test_commits_of_several_tables_and_with_an_extension_are_read_back_and_carried(rig: LogRig):
    batch = WriteBatch()
    batch.put(b"k", b"v")
    batch.table(16).put(b"k", b"other")
    system = WriteBatch()
    system.table(1).put(b"name", b"16")
    log = rig.create()
    log.append([encode_intents(batch, {3: b"trace"}), encode_intents(system), body(3)])
    for _ in range(2):
        log.abandon()
        replay = rig.reader().replay(Seqno(0), Seqno(0))
        first, second, third = replay
        assert first.batch().table(16).writes == {b"k": b"other"}
        assert (first.batch().writes, first.extension()) == ({b"k": b"v"}, {3: b"trace"})
        assert [r.is_system for r in (first, second, third)] == [False, True, False]
        assert second.batch().table(1).writes == {b"name": b"16"}
        log = rig.resume(replay.end)
    log.close()


def test_a_segment_says_which_features_were_in_use_when_it_was_made(rig: LogRig):
    def required() -> list[int]:
        headers = [decode_header(rig.read(segment_name(n))[:4096], n, STORE_ID) for n in rig.segments()]
        return [header.required for header in headers if isinstance(header, SegmentHeader)]

    batch = WriteBatch()
    batch.table(16).put(b"k", b"v")
    log = rig.create()
    log.append([encode_intents(WriteBatch(), {3: b"trace"})])
    log.append([body(2, 800)])
    log.append([encode_intents(batch)])
    assert required() == [0, EXTENSIONS]
    log.append([body(4, 900)])
    log.close()
    replay = rig.reader().replay(Seqno(4), Seqno(4))
    assert list(replay) == []
    log = rig.resume(replay.end)
    log.append([body(5, 900)])
    assert required() == [0, EXTENSIONS, EXTENSIONS | KEYSPACES, EXTENSIONS | KEYSPACES]
    log.abandon()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 2000).map(lambda size: ("one", [size])),
            st.lists(st.sampled_from([0, 5, 300, 40_000, 140_000]), min_size=1, max_size=5).map(lambda s: ("many", s)),
            st.just(("sync", [])),
            st.just(("mark", [])),
            st.just(("prepare", [])),
        ),
        max_size=30,
    ),
    st.sampled_from([SEGMENT_BYTES, 1 << 16]),
    st.sampled_from(["allocate", "zeros"]),
    st.sampled_from(["close", "abandon"]),
)
def test_whatever_is_appended_is_read_back(
    steps: list[tuple[str, list[int]]], segment_bytes: int, preallocate: str, end: str
):
    disk = simulated_disk()
    rig = LogRig(disk, "/log")
    log = rig.create(segment_bytes=segment_bytes, preallocate=preallocate)
    n = 0
    for step, sizes in steps:
        if step == "one":
            log.append_put(*entry(n + 1, sizes[0]))
        elif step == "many":
            log.append([[body(n + 1 + i, size)] for i, size in enumerate(sizes)])
        elif step == "sync":
            log.sync()
        elif step == "mark":
            log.mark_idle()
        else:
            log.prepare_next()
        n += len(sizes)
        assert log.last_seqno == n
    getattr(log, end)()
    seqnos, found = rig.replay()
    assert seqnos == list(range(1, n + 1))
    assert found.row is (TailRow.CLOSED if end == "close" else TailRow.CLEAN_END)
    assert rig.verify() == []
    assert rig.saved() == (seqnos, [])
    for seqno in seqnos[:: max(1, n // 5)]:
        assert rig.seek().seek(Seqno(seqno)).segment <= seqno


def test_large_values_are_written_without_being_joined(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    large = b"x" * 200_000
    disk.trace = []
    log.append([[b"abc", large, b"def"]])
    writes = [op.size for op in disk.trace if op.name == "pwrite"]
    assert writes == [43, 200_000, 3]


def test_a_group_is_one_write(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    disk.trace = []
    log.append([body(i) for i in range(50)])
    assert [op.name for op in disk.trace] == ["pwrite"]


def test_a_record_larger_than_a_segment_gets_one_of_its_own_size(rig: LogRig):
    log = rig.create()
    log.append([body(1)])
    log.append([body(2, 30_000)])
    assert [s.size for s in log.segments()] == [SEGMENT_BYTES, 4096 + len(body(2, 30_000)) + 80]
    log.append([body(3)])
    log.abandon()
    assert rig.replay()[0] == [1, 2, 3]
    assert rig.segments() == [1, 2, 3]


def test_a_group_that_does_not_fit_rolls_as_a_whole(rig: LogRig):
    log = rig.create()
    rig.fill(log, 10)
    log.append([body(11 + i) for i in range(30)])
    assert [s.first_seqno for s in log.segments()] == [1, 11]
    log.abandon()
    assert len(rig.replay()[0]) == 40


def test_times_never_decrease(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(time_us=disk.clock_us)
    times = []
    for i in range(40):
        disk.jump_clock(-1_000_000 if i % 3 else 500_000)
        log.append_put(*entry(i + 1))
        times.append(log.last_time_us)
    log.sync()
    log.abandon()
    assert times == sorted(times)
    assert [r.time_us for r in rig.reader().replay(Seqno(0), Seqno(0))] == times
    assert rig.replay()[1].last_time_us == times[-1]


def test_a_clock_that_steps_back_at_a_roll_makes_no_record_older_than_its_segment(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(time_us=disk.clock_us)

    def watch(operation: Operation) -> None:
        disk.jump_clock(1_000_000 if operation.name == "datasync" else -1_500_000)

    disk.watcher = watch
    rig.fill(log, 50)
    disk.watcher = None
    log.abandon()
    for record in rig.reader().replay(Seqno(0), Seqno(0)):
        created = next(s.created_us for s in rig.reader().segments() if s.first_seqno == record.segment)
        assert record.time_us >= created
    for seqno in (1, 20, 50):
        assert rig.seek().seqno_at(0) == 0
        position = rig.seek().seek(Seqno(seqno))
        assert position.offset >= 4096


def test_a_header_has_the_raw_wall_clock_beside_the_ascending_time(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(time_us=disk.clock_us)
    log.append_put(*entry(1))
    disk.jump_clock(-3600_000_000)
    rig.fill(log, 20)
    first, second = (decode_header(rig.read(segment_name(n))[:4096], n, STORE_ID) for n in rig.segments())
    assert isinstance(first, SegmentHeader)
    assert isinstance(second, SegmentHeader)
    assert second.created_us >= first.created_us
    assert second.wall_us < first.wall_us - 3500_000_000


def test_tail_bytes_counts_what_was_appended(rig: LogRig):
    log = rig.create()
    assert log.tail_bytes == 0
    total = 0
    for i in range(40):
        log.append_put(*entry(i + 1))
        total += 40 + len(body(i + 1))
        assert log.tail_bytes == total
    log.abandon()
    log = rig.resume()
    assert log.tail_bytes == 0
    log.append_put(*entry(41))
    assert log.tail_bytes == 40 + len(body(41))


def test_mark_idle_writes_only_what_is_news(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    disk.trace = []
    log.mark_idle()
    assert disk.trace == []
    rig.fill(log, 2)
    disk.trace = []
    log.mark_idle()
    log.mark_idle()
    assert [op.name for op in disk.trace] == ["pwrite"]
    log.append_put(*entry(3))
    log.mark_idle()
    log.sync()
    log.mark_idle()
    log.abandon()
    _, end = rig.replay()
    assert (end.last_seqno, end.watermark) == (3, 3)


def test_a_segment_full_of_marks_has_room_for_the_clean_close(rig: LogRig):
    log = rig.create()
    for i in range(60):
        rig.fill(log, 1)
        log.mark_idle()
        if i % 7 == 0:
            log.close()
            log = rig.resume()
    log.close()
    assert rig.replay()[1].row is TailRow.CLOSED
    assert len(rig.replay()[0]) == 60


# -- the order of a roll -----------------------------------------------------------------------


def names(trace: list[Operation]) -> list[str]:
    return [f"{op.name} {op.path.removeprefix('/log').lstrip('/')}".strip() for op in trace if op.name != "pread"]


def test_a_roll_takes_its_steps_in_order(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 11)
    log.append_put(*entry(12))
    disk.trace = []
    log.append([body(13, 500)])
    assert names(disk.trace) == [
        "datasync 00000000000000000001.log.tmp",  # the name it was opened by
        "create 00000000000000000013.log.tmp",
        "allocate 00000000000000000013.log.tmp",
        "pwrite 00000000000000000013.log.tmp",
        "sync 00000000000000000013.log.tmp",
        "rename 00000000000000000013.log",
        "sync_directory",
        "open 00000000000000000001.log",
        "pwrite 00000000000000000001.log",
        "datasync 00000000000000000001.log",
        "create 00000000000000000001.idx.tmp",
        "pwrite 00000000000000000001.idx.tmp",
        "rename 00000000000000000001.idx",
        "pwrite 00000000000000000013.log.tmp",
    ]


def test_a_prepared_segment_leaves_little_to_the_roll(disk: SimulatedDisk, rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.prepare_next()
    assert "spare.tmp" not in rig.names(), "too early"
    rig.fill(log, 9)
    log.prepare_next()
    log.prepare_next()
    assert len(rig.read("spare.tmp")) == SEGMENT_BYTES
    disk.trace = []
    log.append([body(13, 500)])
    assert names(disk.trace)[:4] == [
        "pwrite spare.tmp",
        "datasync spare.tmp",
        "rename 00000000000000000013.log",
        "sync_directory",
    ]
    rig.fill(log, 30)
    log.abandon()
    assert rig.replay()[0] == list(range(1, 44))


def test_preparing_from_another_thread_while_segments_roll(tmp_path_factory: pytest.TempPathFactory):
    rig = LogRig(system_files(), str(tmp_path_factory.mktemp("log")))
    log = rig.create()
    over = threading.Event()

    def prepare() -> None:
        while not over.is_set():
            log.prepare_next()

    thread = threading.Thread(target=prepare)
    thread.start()
    rig.fill(log, 600, sync_every=50)
    log.close()
    over.set()
    thread.join()
    assert len(rig.replay()[0]) == 600
    log.prepare_next()
    assert not [name for name in rig.names() if name.endswith(".tmp")]


# -- retirement --------------------------------------------------------------------------------


def many(rig: LogRig) -> tuple[LogWriter, list[int]]:
    log = rig.create()
    rig.fill(log, 60)
    return log, [s.first_seqno for s in log.segments()]


def test_retire_removes_whole_old_segments_and_never_the_newest(rig: LogRig):
    log, firsts = many(rig)
    assert log.retire(Seqno(firsts[1] - 1)) == []
    assert log.retire(Seqno(firsts[1])) == [1]
    assert log.retire(Seqno(firsts[3] + 1)) == firsts[1:3]
    assert log.retire(Seqno(1000)) == firsts[3:-1]
    assert rig.segments() == firsts[-1:] == [s.first_seqno for s in log.segments()]
    assert [name for name in rig.names() if name.endswith(".idx")] == []
    rig.fill(log, 5)
    log.close()
    assert rig.replay(after=60)[1].last_seqno == 65


def test_retire_goes_from_the_oldest_and_flushes_after_each(disk: SimulatedDisk, rig: LogRig):
    log, firsts = many(rig)
    disk.trace = []
    log.retire(Seqno(firsts[2]))
    assert names(disk.trace) == [
        f"unlink {segment_name(firsts[0])}",
        f"unlink {firsts[0]:020d}.idx",
        "sync_directory",
        f"unlink {segment_name(firsts[1])}",
        f"unlink {firsts[1]:020d}.idx",
        "sync_directory",
    ]


def test_retire_keeps_as_many_bytes_as_it_is_told(rig: LogRig):
    log, firsts = many(rig)
    assert log.retire(Seqno(1000), keep_bytes=100 * SEGMENT_BYTES) == []
    assert log.retire(Seqno(1000), keep_bytes=2 * SEGMENT_BYTES) == firsts[:-3]
    assert log.retire(Seqno(1000), keep_bytes=2 * SEGMENT_BYTES - 1) == firsts[-3:-2]


def test_retire_keeps_what_is_young_enough(rig: LogRig):
    log, firsts = many(rig)
    created = {s.first_seqno: s.created_us for s in log.segments()}
    assert log.retire(Seqno(1000), keep_after_us=1) == []
    assert log.retire(Seqno(1000), keep_after_us=created[firsts[2]] + 1) == firsts[:2]
    assert log.retire(Seqno(1000), keep_after_us=created[firsts[-1]] + 1) == firsts[2:-1]


# -- beginning and ending ----------------------------------------------------------------------


def test_create_refuses_a_directory_with_a_log(rig: LogRig):
    rig.made(3)
    before = rig.snapshot()
    with pytest.raises(StoreExistsError):
        rig.create()
    assert rig.snapshot() == before


def test_create_removes_what_a_crashed_create_left(rig: LogRig):
    rig.directory.open("00000000000000000001.log.tmp", create=True).close()
    rig.directory.open("00000000000000000005.idx", create=True).close()
    rig.create().abandon()
    assert rig.names() == [segment_name(1)]
    assert rig.replay()[0] == []


def test_closing_truncates_to_the_records_and_writes_an_index(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.close()
    log.close()
    assert len(rig.read(segment_name(1))) == 4096 + sum(40 + len(body(i)) for i in (1, 2, 3)) + 40
    assert rig.names() == ["00000000000000000001.idx", segment_name(1)]
    with pytest.raises(ClosedError):
        log.append_put(*entry(4))
    with pytest.raises(ClosedError):
        log.sync()


def test_the_closed_record_claims_nothing_that_is_not_on_disk(disk: SimulatedDisk, rig: LogRig):
    """Closing flushes first: else a cut could keep the closed record and lose the commits it calls durable."""
    log = rig.create()
    rig.fill(log, 8, sync_every=100)
    cuts = []
    disk.watcher = lambda operation: cuts.extend(disk.crash(mask) for mask in (0, -1, 5, 10))
    log.close()
    disk.watcher = None
    for found in cuts:
        seqnos, end = LogRig(found, "/log").replay()
        assert end.last_seqno >= end.watermark
        assert seqnos == list(range(1, len(seqnos) + 1))


def test_a_clean_end_makes_no_segment_until_something_is_appended(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.close()
    before = rig.snapshot()
    for _ in range(3):
        log = rig.resume()
        log.mark_idle()
        log.sync()
        log.prepare_next()
        log.close()
        assert rig.snapshot() == before
    log = rig.resume()
    rig.fill(log, 1)
    assert rig.segments() == [1, 4]


def test_an_empty_segment_is_replaced_under_its_name(rig: LogRig):
    rig.create().close()
    log = rig.resume()
    rig.fill(log, 30)
    log.close()
    log = rig.resume()
    rig.fill(log, 1)
    log.abandon()
    log = rig.resume()  # carries commit 31
    log.close()
    for first in rig.segments():
        header = decode_header(rig.read(segment_name(first))[:4096], first, STORE_ID)
        assert isinstance(header, SegmentHeader)
        assert header.previous < first
    assert len(rig.replay()[0]) == 31


def test_the_carried_tail_is_protected_like_what_was_acknowledged(rig: LogRig):
    rig.made(5, sync_every=100)
    rig.resume().abandon()
    for seqno in range(1, 6):
        content = rig.snapshot()
        rig.flip_commit(seqno)
        with pytest.raises(Exception, match="damaged"):
            rig.replay()
        rig.restore(content)


def test_resume_writes_the_slot_that_a_crash_prevented(rig: LogRig):
    rig.made(30)
    name = segment_name(rig.segments()[-2])
    slot = rig.read(name)[SLOT_OFFSET : SLOT_OFFSET + 20]
    rig.overwrite(name, SLOT_OFFSET, bytes(20))
    rig.resume().abandon()
    assert rig.read(name)[SLOT_OFFSET : SLOT_OFFSET + 20] == slot


def test_a_gap_in_the_history_stays_visible_after_work_went_on(rig: LogRig):
    rig.made(60)
    firsts = rig.segments()
    rig.remove(segment_name(firsts[-2]))
    after = firsts[-1] - 1
    for _ in range(2):
        # The checkpoint covers the gap, so the store opens; and recovery replaces the newest segment.
        end = rig.replay(after=after, floor=after)[1]
        rig.resume(end).abandon()
        with pytest.raises(CorruptionError, match="missing"):
            rig.replay()


def test_a_large_tail_is_carried(rig: LogRig):
    log = rig.create(segment_bytes=8 << 20)
    rig.fill(log, 30, sync_every=100, size=100_000)
    log.abandon()
    log = rig.resume()
    assert (log.last_seqno, log.durable_seqno) == (30, 30)
    rig.fill(log, 1)
    log.close()
    assert len(rig.replay()[0]) == 31
    assert rig.replay()[1].row is TailRow.CLOSED


def test_zeros_preallocate_as_many_bytes(rig: LogRig):
    log = rig.create(preallocate="zeros")
    rig.fill(log, 30)
    assert {s.size for s in log.segments()} == {SEGMENT_BYTES}
    assert all(len(rig.read(s.name)) == SEGMENT_BYTES for s in log.segments())
