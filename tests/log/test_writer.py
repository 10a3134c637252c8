"""The writer: appends, rolls, retirement, beginning and ending."""

from __future__ import annotations

import os
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_rig import FIRST_SEGMENT_BYTES, SEGMENT_BYTES, STORE_ID, LogRig, body, entry, simulated_disk

from kvwal.batch import WriteBatch
from kvwal.errors import ClosedError, CorruptionError, StoreExistsError
from kvwal.features import EXTENSIONS, KEYSPACES
from kvwal.files import system_files
from kvwal.files.names import index_name, segment_name
from kvwal.keys import Seqno
from kvwal.log import LogIdentity, SegmentLog, TailRow, encode_intents, replay_count
from kvwal.log.index import INDEX_STRIDE_BYTES, load_index
from kvwal.log.record import is_system
from kvwal.log.segment import SLOT_OFFSET, SegmentHeader, decode_header
from kvwal.log.walk import Puts
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


def test_commits_of_several_tables_and_with_an_extension_are_read_back_and_rewritten(rig: LogRig):
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
        assert [is_system(r) for r in (first, second, third)] == [False, True, False]
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


@pytest.mark.parametrize("flushed", [True, False])
def test_after_a_crash_segments_say_which_features_were_in_use_before(rig: LogRig, flushed: bool):
    """Although the newest header was made before that."""
    batch = WriteBatch()
    batch.table(16).put(b"k", b"v")
    log = rig.create()
    log.append([body(1), encode_intents(WriteBatch(), {3: b"trace"}), encode_intents(batch)])
    if flushed:
        log.sync()
        log.mark_idle()
    log.abandon()
    for after in (Seqno(0), Seqno(1)):
        replay = rig.reader().replay(after, Seqno(0), Puts({}))
        list(replay)
        assert (replay.end.header.required, replay.end.required) == (0, EXTENSIONS | KEYSPACES)
    log = rig.resume(replay.end)
    log.append([body(4, 900)])
    newest = rig.segments()[-1]
    header = decode_header(rig.read(segment_name(newest))[:4096], newest, STORE_ID)
    assert isinstance(header, SegmentHeader)
    assert header.required == EXTENSIONS | KEYSPACES
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
    st.sampled_from([SEGMENT_BYTES, 1 << 16, 16 << 20]) | st.integers(SEGMENT_BYTES, 1 << 22),
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
    large = b"x" * 40_000
    disk.trace = []
    log.append([[b"abc", large, b"def"]])
    writes = [op.size for op in disk.trace if op.name == "pwrite"]
    assert writes == [43, 40_000, 3]


def test_a_group_is_one_write(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    disk.trace = []
    log.append([body(i) for i in range(50)])
    assert [op.name for op in disk.trace] == ["pwrite"]


def test_a_record_larger_than_a_segment_gets_one_of_its_own_size(rig: LogRig):
    log = rig.create()
    log.append([body(1)])
    log.append([body(2, 30_000)])
    assert [s.size for s in log.segments()] == [SEGMENT_BYTES, 4096 + len(body(2, 30_000)) + 120]
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


def test_a_segment_full_of_marks_has_space_for_the_clean_close(rig: LogRig):
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
        "pwrite 00000000000000000001.log.tmp",
        "datasync 00000000000000000001.log.tmp",
        "pwrite 00000000000000000013.log.tmp",
    ]


def test_a_roll_writes_the_index_of_a_segment_that_has_entries_and_gives_back_what_it_does_not_use(
    disk: SimulatedDisk, rig: LogRig
):
    log = rig.grown()
    first = log.segments()[-1].first_seqno
    rig.fill(log, 1, size=INDEX_STRIDE_BYTES)
    rig.fill(log, 1)
    end = log._offset
    disk.trace = []
    log.append([body(int(log.last_seqno) + 1, 1_000_000)])
    assert names(disk.trace)[-7:] == [
        f"create {first:020d}.idx.tmp",
        f"pwrite {first:020d}.idx.tmp",
        f"rename {first:020d}.idx",
        f"open {segment_name(first)}",
        f"truncate {segment_name(first)}",
        f"pwrite {log.last_seqno:020d}.log.tmp",
        f"pwrite {log.last_seqno:020d}.log.tmp",
    ]
    assert len(rig.read(segment_name(first))) == end == log.segments()[-2].size
    last = int(log.last_seqno)
    log.abandon()
    assert len(rig.replay()[0]) == last
    assert rig.verify() == []


@pytest.fixture
def spares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of every size get a spare."""
    monkeypatch.setattr("kvwal.log.segments._LEAST_SPARE_BYTES", 0)


@pytest.mark.usefixtures("spares")
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


@pytest.mark.usefixtures("spares")
def test_a_record_larger_than_the_prepared_segment_gets_one_of_its_own_and_leaves_the_spare(rig: LogRig):
    log = rig.create()
    rig.fill(log, 12)
    log.prepare_next()
    assert "spare.tmp" in rig.names()
    log.append([body(13, 30_000)])
    assert log.segments()[-1].size == 4096 + 40 + len(body(13, 30_000)) + 80
    assert "spare.tmp" in rig.names()
    rig.fill(log, 1)
    assert [s.size for s in log.segments()] == [SEGMENT_BYTES, 4096 + 40 + len(body(13, 30_000)) + 80, SEGMENT_BYTES]
    assert "spare.tmp" not in rig.names()
    log.abandon()
    assert rig.replay()[0] == list(range(1, 15))


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are POSIX")
@pytest.mark.usefixtures("spares")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444 | 0o200])
def test_every_file_has_the_permissions_asked_for_after_rolls_and_recoveries(
    tmp_path_factory: pytest.TempPathFactory, mode: int
):
    path = tmp_path_factory.mktemp("log")
    rig = LogRig(system_files(), str(path))
    umask = os.umask(0)
    try:
        log = rig.create(segment_bytes=1 << 20, mode=mode)
        for n in range(40):
            rig.fill(log, 1, size=20_000)
            if n % 3 == 0:
                log.prepare_next()
        log.append([body(41, 2_000_000)])
        log.abandon()
        rig.resume(segment_bytes=1 << 20, mode=mode).close()
        assert len(rig.segments()) > 4
        assert any(name.endswith(".idx") for name in rig.names())
        assert {name: (path / name).stat().st_mode & 0o7777 for name in rig.names()} == dict.fromkeys(rig.names(), mode)
    finally:
        os.umask(umask)


def test_a_small_log_has_no_spare(rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    for _ in range(150):
        rig.fill(log, 1, size=5000)
        log.prepare_next()
        assert "spare.tmp" not in rig.names()
    while "spare.tmp" not in rig.names():
        rig.fill(log, 1, size=5000)
        log.prepare_next()
    assert len(rig.read("spare.tmp")) == log._planned_bytes() == 1 << 20
    log.give_back()
    assert "spare.tmp" not in rig.names()


@pytest.mark.usefixtures("spares")
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


def many(rig: LogRig) -> tuple[SegmentLog, list[int]]:
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
        f"unlink {firsts[0]:020d}.keys",
        "sync_directory",
        f"unlink {segment_name(firsts[1])}",
        f"unlink {firsts[1]:020d}.idx",
        f"unlink {firsts[1]:020d}.keys",
        "sync_directory",
    ]


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
    rig.directory.open("00000000000000000005.keys", create=True).close()
    rig.directory.open("00000000000000000005.keys.tmp", create=True).close()
    rig.create().abandon()
    assert rig.names() == [segment_name(1)]
    assert rig.replay()[0] == []


def test_closing_a_large_segment_truncates_it_to_the_records_and_writes_an_index(rig: LogRig):
    log = rig.grown()
    rig.fill(log, 1, size=INDEX_STRIDE_BYTES)
    rig.fill(log, 1)
    end = log._offset
    newest = log.segments()[-1]
    log.close()
    log.close()
    assert len(rig.read(newest.name)) == end + 40
    assert index_name(newest.first_seqno) in rig.names()
    with pytest.raises(ClosedError):
        log.append_put(*entry(4))
    with pytest.raises(ClosedError):
        log.sync()


def test_closing_leaves_a_segment_of_which_little_is_unused_as_it_is(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    rig.fill(log, 3)
    disk.trace = []
    log.close()
    # One record, not flushed: what it says is on disk already.
    assert [(op.name, op.size) for op in disk.trace] == [("pwrite", 40)]
    assert len(rig.read(segment_name(1))) == FIRST_SEGMENT_BYTES
    assert rig.names() == [segment_name(1)]


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


def test_after_a_clean_end_the_log_goes_on_in_its_segment(disk: SimulatedDisk, rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    rig.fill(log, 3)
    log.close()
    before = rig.snapshot()
    for _ in range(3):
        log = rig.resume(segment_bytes=1 << 20)
        log.mark_idle()
        log.sync()
        log.prepare_next()
        log.close()
        assert rig.snapshot() == before
    end = rig.replay()[1]
    disk.trace = []
    log = rig.resume(end, segment_bytes=1 << 20)
    rig.fill(log, 1)
    log.close()
    # The one flush is that of the commit.
    assert [op.name for op in disk.trace if op.name in ("sync", "datasync", "sync_directory")] == ["datasync"]
    assert [op.name for op in disk.trace if op.name in ("create", "rename", "truncate", "allocate")] == []
    assert rig.segments() == [1]
    assert rig.replay()[0] == [1, 2, 3, 4]


def test_opening_writing_and_closing_again_and_again_makes_no_files(rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    log.close()
    for n in range(200):
        log = rig.resume(segment_bytes=1 << 20)
        assert log.tail_bytes == 0
        rig.fill(log, 1)
        assert log.last_seqno == n + 1
        log.close()
    assert rig.names() == [segment_name(1)]
    assert len(rig.replay()[0]) == 200
    assert rig.verify() == []


def test_killing_a_writer_again_and_again_makes_no_files(rig: LogRig):
    rig.create(segment_bytes=1 << 20).abandon()
    for n in range(200):
        log = rig.resume(segment_bytes=1 << 20)
        rig.fill(log, 1)
        assert log.last_seqno == n + 1
        log.abandon()
    assert rig.names() == [segment_name(1)]
    assert len(rig.replay()[0]) == 200


def test_killing_a_writer_of_much_again_and_again_takes_space_in_proportion(rig: LogRig):
    options = {"segment_bytes": 1 << 20}
    log = rig.create(**options)
    for _ in range(12):
        rig.fill(log, 8, size=20_000)
        log.abandon()
        log = rig.resume(**options)
    log.abandon()
    data = 12 * 8 * 20_000
    assert sum(len(rig.read(name)) for name in rig.names()) < 1.2 * data + (1 << 20)
    assert len(rig.segments()) <= 2 * 12
    assert len(rig.replay()[0]) == 12 * 8


def test_an_index_that_a_clean_close_left_is_gone_on_with(rig: LogRig):
    """The index of a segment that goes on has the entries of all who wrote to it, and leads to the right commits."""
    options = {"segment_bytes": 1 << 20}
    log = rig.create(**options)
    while log.segments()[-1].size < 8 * FIRST_SEGMENT_BYTES:
        rig.fill(log, 1, size=1000)
    while log._usable_end - log._offset > FIRST_SEGMENT_BYTES - 1000:
        rig.fill(log, 1, size=1000)
    first = int(log.last_seqno)
    newest = log.segments()[-1].first_seqno
    log.close()
    for _ in range(25):
        log = rig.resume(**options)
        rig.fill(log, 2, size=1000)
        log.close()
    assert rig.segments()[-1] == newest
    header = decode_header(rig.read(segment_name(newest))[:4096], newest, STORE_ID)
    assert isinstance(header, SegmentHeader)
    index = load_index(rig.directory, header)
    assert index is not None
    assert len(index.offsets) == (len(rig.read(segment_name(newest))) - 4096) // INDEX_STRIDE_BYTES
    last = len(rig.replay()[0])
    assert last == first + 25 * 2
    assert rig.verify() == []
    for after in (newest - 2, newest - 1, newest, *range(newest + 1, last, 47), last - 1, last):
        assert rig.replay(after=after, floor=after)[0] == list(range(after + 1, last + 1))


def test_without_its_index_a_longer_segment_is_left_and_the_next_one_begun(rig: LogRig):
    options = {"segment_bytes": 1 << 20}
    log = rig.create(**options)
    rig.fill(log, 250, size=1000)
    while log._usable_end - log._offset > FIRST_SEGMENT_BYTES // 2 or not log._index.offsets:
        rig.fill(log, 1, size=1000)
    last = int(log.last_seqno)
    log.close()
    newest = rig.segments()[-1]
    rig.remove(index_name(newest))
    log = rig.resume(**options)
    rig.fill(log, 1)
    log.close()
    assert rig.segments()[-2:] == [newest, last + 1]
    assert len(rig.replay()[0]) == last + 1


def test_a_log_of_another_line_begins_a_segment_of_its_own(rig: LogRig):
    log = rig.create(segment_bytes=1 << 20)
    rig.fill(log, 3)
    log.close()
    log = rig.resume(segment_bytes=1 << 20, identity=LogIdentity(STORE_ID, b"restored", 9))
    rig.fill(log, 1)
    log.close()
    headers = [decode_header(rig.read(segment_name(n))[:4096], n, STORE_ID) for n in rig.segments()]
    made_by = [(header.line, header.session) for header in headers if isinstance(header, SegmentHeader)]
    assert made_by == [(b"the line", 7), (b"restored", 9)]
    assert rig.replay()[0] == [1, 2, 3, 4]


def test_an_idle_log_gives_back_what_it_does_not_use(rig: LogRig):
    log = rig.create(segment_bytes=16 << 20)
    while log.segments()[-1].size < 4 << 20:
        rig.fill(log, 1, size=100_000)
    rig.fill(log, 1)
    used = log.tail_bytes
    log.give_back()
    assert [s.size for s in log.segments()[-1:]] == [FIRST_SEGMENT_BYTES]
    assert sum(len(rig.read(name)) for name in rig.names()) < 1.05 * used + (1 << 20)
    before = rig.snapshot()
    log.give_back()
    assert rig.snapshot() == before
    rig.fill(log, 3)
    last = int(log.last_seqno)
    log.close()
    assert len(rig.replay()[0]) == last


def test_segments_grow_with_the_log_that_is_kept_and_shrink_with_it(rig: LogRig):
    log = rig.create(segment_bytes=4 << 20)
    sizes = []
    while log.segments()[-1].size < 4 << 20:
        rig.fill(log, 1, size=30_000)
        if log.segments()[-1].size not in sizes:
            sizes.append(log.segments()[-1].size)
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (FIRST_SEGMENT_BYTES, 4 << 20)
    log.retire(log.last_seqno)
    assert len(log.segments()) == 1
    newest = log.segments()[-1]
    while log.segments()[-1] == newest:
        rig.fill(log, 1, size=30_000)
    log.retire(log.last_seqno)
    rig.fill(log, 1, size=30_000)
    assert log.segments()[-1].size > 3 << 20
    log.give_back()
    log.retire(Seqno(log.last_seqno + 1))
    assert [s.size for s in log.segments()] == [FIRST_SEGMENT_BYTES]


def test_replay_count_says_how_many_a_replay_would_read(rig: LogRig):
    log = rig.create()
    rig.fill(log, 60)
    firsts = [s.first_seqno for s in log.segments()]
    afters = (0, firsts[1] - 2, firsts[1] - 1, firsts[2] - 2, 60)
    assert [replay_count(log.segments(), Seqno(after)) for after in afters] == [
        len(firsts),
        len(firsts),
        len(firsts) - 1,
        len(firsts) - 1,
        1,
    ]


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


def test_the_rewritten_tail_is_protected_like_what_was_acknowledged(rig: LogRig):
    rig.made(5, sync_every=100)
    rig.resume().abandon()
    for seqno in range(1, 6):
        content = rig.snapshot()
        rig.flip_commit(seqno)
        with pytest.raises(Exception, match="damaged"):
            rig.replay()
        rig.restore(content)


@pytest.mark.parametrize("carries", [True, False])
def test_resume_writes_the_slot_that_a_crash_prevented(rig: LogRig, carries: bool):
    log = rig.create()
    rig.fill(log, 30)
    if not carries:
        log.mark_idle()
    log.abandon()
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


def test_a_large_tail_is_rewritten(rig: LogRig):
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


@pytest.mark.parametrize("size", [*range(11_900, 12_100), 30_000])
def test_there_is_space_for_an_idle_mark_behind_any_commit(disk: SimulatedDisk, rig: LogRig, size: int) -> None:
    """Else a commit that fills its segment could be damaged without a trace."""
    log = rig.create()
    log.append([body(1, size)])
    log.sync()
    log.mark_idle()
    log.abandon()
    rig.flip_commit(1)
    with pytest.raises(CorruptionError):
        rig.replay()


def test_where_the_log_is_durable_to_is_in_no_segment_that_comes_later():
    """Another thread may roll, and flush, between the two looks: so the segment is looked at last."""
    looked: list[str] = []

    class Rolling:
        """A log that is looked at."""

        durable_seqno = Seqno(7)
        _header = None

        def __getattribute__(self, name: str) -> object:
            looked.append(name)
            return super().__getattribute__(name)

    assert SegmentLog.durable_end.fget(Rolling()) == (7, 0, 0)
    assert looked == ["durable_seqno", "_header"]
