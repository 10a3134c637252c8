"""Every row of the two tables that decide where a log ends, on the real file system and on the simulated disk.

The rig appends one synced commit at a time unless a test says otherwise, so the watermark of commit n is n - 1.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from crc32c import crc32c
from log_rig import FIRST_SEGMENT_BYTES, SEGMENT_BYTES, STORE_ID, LogRig, body, simulated_disk

from kvwal.errors import CorruptionError, Error, FormatError
from kvwal.files import system_files
from kvwal.files.names import segment_name
from kvwal.log import TailRow
from kvwal.log.record import CLOSED, COMMIT, WATERMARK, encode_record
from kvwal.log.segment import HEADER_BYTES, SLOT_OFFSET, HeaderFault, SegmentHeader, Slot, decode_header, encode_header
from kvwal.log.tail import LINK_TABLE, TAIL_TABLE, Link, Tail, Verdict, describe, judge
from kvwal.log.walk import Stop

FIRST = segment_name(1)


@pytest.fixture(params=["real", "simulated"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LogRig]:
    if request.param == "real":
        return LogRig(system_files(), str(tmp_path_factory.mktemp("log")))
    return LogRig(simulated_disk(), "/log")


@pytest.fixture(params=["whole", "tail"], autouse=True)
def rewritten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How much of the newest segment a recovery writes again."""
    if request.param == "tail":
        monkeypatch.setattr("kvwal.log.carry._WHOLE_BYTES", -1)
    return request.param


def refused(rig: LogRig, row: TailRow, kind: type[Error] = CorruptionError, **options: int) -> Error:
    """Replay is refused, twice, with the words of this row."""
    before = rig.snapshot()
    with pytest.raises(kind) as caught:
        rig.replay(**options)
    with pytest.raises(kind):
        rig.replay(**options)
    words = describe(row).split("{")[0].split(" commit")[0]
    assert words in str(caught.value)
    assert rig.snapshot() == before
    return caught.value


def ended(rig: LogRig, row: TailRow, last: int, watermark: int, *, cut: bool, **options: int) -> None:
    """Replay ends so; and so does resuming, however often."""
    seqnos, end = rig.replay(**options)
    assert (end.row, end.last_seqno, end.watermark) == (row, last, watermark)
    assert len(seqnos) == last - options.get("after", 0)
    assert bool(end.cut_bytes) == cut
    for _ in range(3):
        log = rig.resume(end)
        assert (log.last_seqno, log.durable_seqno) == (last, last)
        log.abandon()
        seqnos, end = rig.replay(**options)
        assert (end.last_seqno, end.watermark, end.cut_bytes) == (last, last, 0)
    log = rig.resume()
    rig.fill(log, 3)
    log.close()
    assert rig.replay(**options)[1].last_seqno == last + 3


# -- rows of the tail --------------------------------------------------------------------------


def test_clean_end_when_nothing_was_being_written(rig: LogRig):
    rig.made(3)
    # Nothing says that the last commit was synced: it is written again.
    ended(rig, TailRow.CLEAN_END, 3, 2, cut=False)


def test_clean_end_of_an_empty_log(rig: LogRig):
    ended(rig.made(0), TailRow.CLEAN_END, 0, 0, cut=False)


def test_clean_end_after_an_idle_mark_needs_no_new_segment(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.mark_idle()
    log.abandon()
    _, end = rig.replay()
    assert (end.row, end.watermark, end.clean) == (TailRow.CLEAN_END, 3, True)
    rig.resume(end).abandon()
    assert rig.segments() == [1]


def test_closed_cleanly_and_left_open_for_the_next_writer(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    log.close()
    assert len(rig.read(FIRST)) == SEGMENT_BYTES
    ended(rig, TailRow.CLOSED, 3, 3, cut=False)
    assert rig.segments() == [1]


def test_closed_cleanly_and_shortened(rig: LogRig):
    log = rig.grown()
    log.close()
    last = int(log.last_seqno)
    newest = log.segments()[-1]
    assert len(rig.read(newest.name)) < newest.size - FIRST_SEGMENT_BYTES
    ended(rig, TailRow.CLOSED, last, last, cut=False)


def test_closed_cleanly_but_not_yet_cut_to_size(rig: LogRig):
    log = rig.grown()
    log.close()
    last = int(log.last_seqno)
    newest = log.segments()[-1]
    rig.overwrite(newest.name, newest.size - 1, b"\0")
    ended(rig, TailRow.CLOSED, last, last, cut=False)


@pytest.mark.parametrize("cut", [1, 39, 40, 41, 100])
def test_a_log_that_goes_on_behind_a_clean_close_ends_as_any_other(rig: LogRig, cut: int):
    log = rig.create()
    rig.fill(log, 3)
    log.close()
    log = rig.resume()
    rig.fill(log, 2)
    log.abandon()
    assert rig.replay()[1].row is TailRow.CLEAN_END
    # What a close has said stays said: commits before it are acknowledged, and the file is not shorter than it was.
    content = rig.snapshot()
    rig.flip_commit(3)
    refused(rig, TailRow.DAMAGE_BELOW_WATERMARK)
    rig.restore(content)
    rig.flip_commit(5)
    assert rig.replay()[1].row is TailRow.TORN_TAIL
    rig.restore(content)
    # Cut off where the close ends it is not a segment that a close has shortened.
    offset = rig.offset(4)[1]
    rig.cut(FIRST, offset)
    refused(rig, TailRow.TRUNCATED_SEGMENT)
    rig.cut(FIRST, offset - cut)
    refused(rig, TailRow.TRUNCATED_SEGMENT)


def test_a_damaged_pause_is_a_damaged_watermark_record(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    offset = 4096 + log.tail_bytes
    log.close()
    content = rig.snapshot()
    rig.flip(FIRST, offset + 20)
    # Nothing lies behind it: commit 3 may be on disk or not, and is written again.
    assert (rig.replay()[1].row, rig.replay()[1].watermark) == (TailRow.TORN_TAIL, 2)
    rig.restore(content)
    log = rig.resume()
    rig.fill(log, 1)
    log.abandon()
    rig.flip(FIRST, offset + 20)
    ended(rig, TailRow.CLEAN_END, 4, 3, cut=False)


def test_continued_in_the_next_segment(rig: LogRig):
    rig.made(30)
    assert len(rig.segments()) == 3
    ended(rig, TailRow.CLEAN_END, 30, 29, cut=False)


def test_a_rewritten_tail_takes_the_place_of_a_segment_that_holds_little(rig: LogRig, rewritten: str):
    rig.made(10, segment_bytes=1 << 20)
    for _ in range(3):
        rig.resume(segment_bytes=1 << 20).abandon()
        rig.resume(segment_bytes=1 << 20).close()
        log = rig.resume(segment_bytes=1 << 20)
        rig.fill(log, 1)
        log.abandon()
    assert rig.segments() == ([1] if rewritten == "whole" else [1, 10, 11, 12])


def test_superseded_garbage_in_a_middle_segment_is_ignored(rig: LogRig, rewritten: str):
    rig.made(10)
    _, end = rig.replay()
    log = rig.resume(end)  # Commit 10 is written again: what segment 1 holds of it is superseded.
    log.abandon()
    if rewritten == "whole":
        return
    assert rig.segments() == [1, 10]
    data = rig.read(FIRST)
    offset = rig.seek().seek(9).offset + 40 + len(body(9))
    rig.overwrite(FIRST, offset, b"garbage" * 20)
    assert rig.read(FIRST) != data
    ended(rig, TailRow.CLEAN_END, 10, 10, cut=False)


def test_superseded_commits_behind_the_seam_do_not_come_back(rig: LogRig):
    log = rig.create()
    rig.fill(log, 10, sync_every=100)
    log.abandon()
    rig.flip_commit(3)
    _, end = rig.replay()
    assert (end.row, end.last_seqno) == (TailRow.UNSYNCED_HOLE, 2)
    rig.resume(end).abandon()
    # The damage heals (a read that went wrong): commits 3 to 10 verify again, and stay given up.
    rig.flip(FIRST, 4096 + 2 * (40 + len(body(1))) + 45)
    assert rig.replay()[0] == [1, 2]


def test_torn_tail_is_cut(rig: LogRig):
    rig.made(5)
    rig.flip_commit(5)
    ended(rig, TailRow.TORN_TAIL, 4, 3, cut=True)


def test_torn_tail_of_the_first_write_ever(rig: LogRig):
    rig.made(1)
    rig.flip_commit(1)
    ended(rig, TailRow.TORN_TAIL, 0, 0, cut=True)


@pytest.mark.parametrize("kept", [1, 4, 8, 39, 40, 41])
def test_torn_tail_wherever_it_is_torn(rig: LogRig, kept: int):
    rig.made(5)
    name, offset = rig.offset(5)
    rig.overwrite(name, offset + kept, bytes(40 + len(body(5)) - kept))
    ended(rig, TailRow.TORN_TAIL, 4, 3, cut=True)


def test_torn_tail_whose_length_points_beyond_the_segment(rig: LogRig):
    rig.made(5)
    name, offset = rig.offset(5)
    rig.overwrite(name, offset + 8, b"\xff\xff\xff\xff")
    ended(rig, TailRow.TORN_TAIL, 4, 3, cut=True)


def test_unsynced_hole_followed_by_younger_unsynced_records_is_cut(rig: LogRig):
    rig.made(9, sync_every=100)
    rig.flip_commit(4)
    ended(rig, TailRow.UNSYNCED_HOLE, 3, 0, cut=True)


def test_unsynced_hole_of_zeros(rig: LogRig):
    rig.made(9, sync_every=100)
    name, offset = rig.offset(4)
    rig.overwrite(name, offset, bytes(40 + len(body(4))))
    ended(rig, TailRow.UNSYNCED_HOLE, 3, 0, cut=True)


def test_zero_hole_with_pieces_behind_it(rig: LogRig):
    rig.made(5, sync_every=100)
    name, offset = rig.offset(5)
    rig.overwrite(name, offset, bytes(50))
    ended(rig, TailRow.ZERO_HOLE, 4, 0, cut=True)


def test_damage_below_the_watermark_is_corruption(rig: LogRig):
    rig.made(9)
    name, offset = rig.flip_commit(4)
    error = refused(rig, TailRow.DAMAGE_BELOW_WATERMARK)
    assert (error.file, error.offset) == (name, offset)


def test_damage_below_the_watermark_of_the_very_next_record(rig: LogRig):
    log = rig.create()
    rig.fill(log, 4)
    log.mark_idle()
    log.abandon()
    rig.flip_commit(4)
    refused(rig, TailRow.DAMAGE_BELOW_WATERMARK)


def test_damage_below_the_watermark_that_only_the_meta_knows(rig: LogRig):
    rig.made(4)
    rig.flip_commit(4)
    assert rig.replay(after=3, floor=3)[0] == []
    refused(rig, TailRow.DAMAGE_BELOW_WATERMARK, after=3, floor=4)


def test_zeros_below_the_watermark_are_corruption_too(rig: LogRig):
    rig.made(9)
    name, offset = rig.offset(4)
    rig.overwrite(name, offset, bytes(40 + len(body(4))))
    refused(rig, TailRow.DAMAGE_BELOW_WATERMARK)


def test_a_damaged_length_does_not_hide_the_records_behind_it(rig: LogRig):
    rig.made(9)
    name, offset = rig.offset(4)
    rig.overwrite(name, offset + 8, b"\xff\x01")
    refused(rig, TailRow.DAMAGE_BELOW_WATERMARK)


def test_a_lost_tail_below_the_watermark_of_the_meta_is_corruption(rig: LogRig):
    rig.made(4)
    name, offset = rig.offset(3)
    rig.overwrite(name, offset, bytes(500))
    refused(rig, TailRow.DAMAGE_BELOW_WATERMARK, floor=4)
    assert rig.replay(floor=2)[1].row is TailRow.CLEAN_END


def test_damage_before_a_later_segment_is_corruption_even_unsynced(rig: LogRig):
    rig.made(30, sync_every=100)
    name, offset = rig.flip_commit(4)
    error = refused(rig, TailRow.DAMAGE_BEFORE_LATER_SEGMENT)
    assert (error.file, error.offset) == (name, offset)


def test_damage_to_the_last_commit_before_a_later_segment(rig: LogRig):
    rig.made(30)
    rig.flip_commit(rig.segments()[1] - 1)
    refused(rig, TailRow.DAMAGE_BEFORE_LATER_SEGMENT)


def test_damage_in_segments_that_the_checkpoint_covers_does_not_matter(rig: LogRig):
    rig.made(30)
    rig.flip_commit(4)
    assert rig.replay(after=20, floor=20)[0] == list(range(21, 31))


def test_damaged_watermark_record_costs_nothing(rig: LogRig):
    log = rig.create()
    rig.fill(log, 3)
    offset = 4096 + log.tail_bytes
    log.mark_idle()
    rig.fill(log, 1)
    log.abandon()
    rig.flip(FIRST, offset + 20)
    ended(rig, TailRow.CLEAN_END, 4, 3, cut=False)


def test_truncated_segment_is_corruption(rig: LogRig):
    rig.made(5)
    name, offset = rig.offset(5)
    for size in (offset, offset + 1, offset + 41, len(rig.read(name)) - 1):
        content = rig.snapshot()
        rig.cut(name, size)
        refused(rig, TailRow.TRUNCATED_SEGMENT)
        rig.restore(content)


def test_truncated_closed_segment_is_corruption(rig: LogRig):
    log = rig.grown()
    log.close()
    name = log.segments()[-1].name
    size = len(rig.read(name))
    for cut in (1, 39, 40, 41, 100):
        content = rig.snapshot()
        rig.cut(name, size - cut)
        refused(rig, TailRow.TRUNCATED_SEGMENT)
        rig.restore(content)


def test_truncated_before_a_later_segment_is_corruption(rig: LogRig):
    rig.made(30)
    name, offset = rig.offset(4)
    for size in (offset, offset + 1, offset + 41):
        content = rig.snapshot()
        rig.cut(name, size)
        refused(rig, TailRow.TRUNCATED_BEFORE_LATER_SEGMENT)
        rig.restore(content)


def test_truncated_into_the_header_is_corruption(rig: LogRig):
    rig.made(5)
    for size in (0, 75, 4095):
        content = rig.snapshot()
        rig.cut(FIRST, size)
        refused(rig, TailRow.BAD_HEADER)
        rig.restore(content)


def forged(rig: LogRig, kind: int, seqno: int, watermark: int) -> None:
    """Append a record with a right CRC to segment 1, as a program other than this one might have."""
    _, end = rig.replay()
    header = decode_header(rig.read(FIRST)[:4096], 1, STORE_ID)
    assert isinstance(header, SegmentHeader)
    seed = header.salt + end.position.offset
    rig.overwrite(FIRST, end.position.offset, encode_record(header.marker, seed, kind, seqno, watermark, 2000))


def test_records_out_of_order_are_corruption(rig: LogRig):
    rig.made(5)
    forged(rig, COMMIT, 7, 5)
    refused(rig, TailRow.DISORDER)


def test_unknown_kind_of_record_is_a_newer_format(rig: LogRig):
    rig.made(5)
    forged(rig, 5, 6, 5)
    refused(rig, TailRow.UNKNOWN_RECORD, FormatError)


# -- rows of the links -------------------------------------------------------------------------


def test_missing_middle_segment_is_corruption(rig: LogRig):
    rig.made(50)
    _, second, *_ = rig.segments()
    rig.remove(segment_name(second))
    error = refused(rig, TailRow.MISSING_MIDDLE_SEGMENT)
    assert (error.file, error.offset) == (segment_name(second), None)


def test_missing_middle_segment_is_seen_by_its_successor_alone(rig: LogRig):
    rig.made(50)
    _, second, *_ = rig.segments()
    rig.remove(segment_name(second))
    rig.overwrite(FIRST, SLOT_OFFSET, bytes(20))
    error = refused(rig, TailRow.MISSING_MIDDLE_SEGMENT)
    assert error.file == segment_name(second)


def test_missing_newest_segment_is_corruption(rig: LogRig):
    rig.made(30)
    newest = rig.segments()[-1]
    rig.remove(segment_name(newest))
    error = refused(rig, TailRow.MISSING_NEWEST_SEGMENT)
    assert (error.file, error.offset) == (segment_name(newest), None)


def test_missing_oldest_segment_is_corruption_if_it_is_needed(rig: LogRig):
    rig.made(30)
    rig.remove(FIRST)
    second = rig.segments()[0]
    assert refused(rig, TailRow.MISSING_OLDEST_SEGMENT, after=second - 2).file == FIRST
    assert rig.replay(after=second - 1)[1].last_seqno == 30


def test_a_log_without_segments_is_corruption(rig: LogRig):
    rig.made(3)
    rig.remove(FIRST)
    with pytest.raises(CorruptionError, match="no segments"):
        rig.replay()


def test_linked_although_the_slot_was_not_written_yet(rig: LogRig):
    rig.made(30)
    for name in map(segment_name, rig.segments()[:-1]):
        rig.overwrite(name, SLOT_OFFSET, bytes(20))
    assert rig.replay()[1].last_seqno == 30
    rig.resume().abandon()
    # The writer has written the last one, so that the newest segment cannot get lost unseen.
    newest = rig.segments()[-1]
    rig.remove(segment_name(newest))
    with pytest.raises(CorruptionError):
        rig.replay()


def test_linked_although_the_slot_is_torn(rig: LogRig):
    rig.made(30)
    rig.overwrite(FIRST, SLOT_OFFSET + 9, bytes(11))
    ended(rig, TailRow.CLEAN_END, 30, 29, cut=False)


def test_bad_successor_slot_without_a_successor_is_corruption(rig: LogRig):
    rig.made(3)
    rig.flip(FIRST, SLOT_OFFSET + 3)
    assert refused(rig, TailRow.BAD_SUCCESSOR).offset == SLOT_OFFSET


def test_foreign_segment_is_refused(rig: LogRig):
    rig.made(3)
    header = decode_header(rig.read(FIRST)[:4096], 1, STORE_ID)
    assert isinstance(header, SegmentHeader)
    rig.overwrite(FIRST, 0, encode_header(header._replace(store_id=b"another-store..."))[:HEADER_BYTES])
    refused(rig, TailRow.FOREIGN_SEGMENT, FormatError)


def test_a_feature_that_is_not_known_is_refused_and_named(rig: LogRig):
    rig.made(3)
    header = decode_header(rig.read(FIRST)[:4096], 1, STORE_ID)
    assert isinstance(header, SegmentHeader)
    rig.overwrite(FIRST, 0, encode_header(header._replace(required=1 << 63 | 1 << 4))[:HEADER_BYTES])
    assert "(required features 4, 63)" in str(refused(rig, TailRow.UNKNOWN_VERSION, FormatError))
    rig.overwrite(FIRST, 0, encode_header(header._replace(optional=1 << 63))[:HEADER_BYTES])
    assert rig.replay()[0] == [1, 2, 3]


def test_unknown_version_is_refused(rig: LogRig):
    rig.made(3)
    page = bytearray(rig.read(FIRST)[:4096])
    page[8] = 2
    page[HEADER_BYTES - 4 : HEADER_BYTES] = crc32c(bytes(page[: HEADER_BYTES - 4])).to_bytes(4, "little")
    rig.overwrite(FIRST, 0, bytes(page))
    refused(rig, TailRow.UNKNOWN_VERSION, FormatError)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_bad_header_is_corruption(rig: LogRig, which: int):
    rig.made(30)
    name = segment_name(rig.segments()[which])
    rig.flip(name, 40)
    assert refused(rig, TailRow.BAD_HEADER).file == name


def test_misplaced_segment_is_corruption(rig: LogRig):
    rig.made(3)
    rig.directory.rename(FIRST, segment_name(2))
    refused(rig, TailRow.MISPLACED_SEGMENT, after=1)


# -- what is no row ----------------------------------------------------------------------------


def test_a_read_error_propagates_and_is_never_an_end():
    disk = simulated_disk()
    rig = LogRig(disk, "/log").made(30)
    disk.trace = []
    rig.replay()
    reads = sum(op.name == "pread" for op in disk.trace)
    assert reads > 5
    for nth in range(1, reads + 1):
        disk.fail("read", nth=nth, error=errno.EIO)
        with pytest.raises(OSError, match="EIO"):
            rig.replay()
        disk.heal()


def test_other_files_in_the_directory_are_no_segments(rig: LogRig):
    rig.made(3)
    for name in ("data", "lock", "1.log", "0000000000000000000x.log", "00000000000000000009.log.tmp"):
        rig.directory.open(name, create=True).close()
    assert rig.replay()[1].last_seqno == 3
    rig.resume().abandon()
    assert "00000000000000000009.log.tmp" not in rig.names()


def test_the_reader_writes_nothing(rig: LogRig):
    rig.made(30)
    rig.directory.open("spare.tmp", create=True).close()
    before = rig.snapshot()
    rig.replay()
    rig.salvage()
    rig.verify()
    rig.seek().seek(9)
    rig.seek().seek_time(9)
    assert rig.snapshot() == before


# -- the tables themselves ---------------------------------------------------------------------


def test_every_row_is_in_one_table_and_has_a_sentence():
    rows = [row for row, _, _ in (*LINK_TABLE, *TAIL_TABLE)]
    assert sorted(row.name for row in rows) == sorted(row.name for row in TailRow)
    for row in TailRow:
        assert describe(row, Tail(Stop.END, 1, 2))


@pytest.mark.parametrize(
    ("evidence", "row", "verdict"),
    [
        (Link(1, fault=HeaderFault.NEWER), TailRow.UNKNOWN_VERSION, Verdict.FORMAT),
        (Link(1, fault=HeaderFault.FOREIGN), TailRow.FOREIGN_SEGMENT, Verdict.FORMAT),
        (Link(1, fault=HeaderFault.DAMAGED), TailRow.BAD_HEADER, Verdict.CORRUPT),
        (Link(1, fault=HeaderFault.MISPLACED), TailRow.MISPLACED_SEGMENT, Verdict.CORRUPT),
        (Link(9, reaches=False), TailRow.MISSING_OLDEST_SEGMENT, Verdict.CORRUPT),
        (Link(1, slot=Slot(5, False), next=9, next_previous=5), TailRow.MISSING_MIDDLE_SEGMENT, Verdict.CORRUPT),
        (Link(1, slot=Slot(9, False), next=9, next_previous=5), TailRow.MISSING_MIDDLE_SEGMENT, Verdict.CORRUPT),
        (Link(1, next=9, next_previous=5), TailRow.MISSING_MIDDLE_SEGMENT, Verdict.CORRUPT),
        (Link(1, slot=Slot(9, False), next=9, next_previous=1), TailRow.LINKED, Verdict.CONTINUE),
        (Link(1, slot=Slot(None, True), next=9, next_previous=1), TailRow.LINKED, Verdict.CONTINUE),
        (Link(1, slot=Slot(9, False)), TailRow.MISSING_NEWEST_SEGMENT, Verdict.CORRUPT),
        (Link(1, slot=Slot(None, True)), TailRow.BAD_SUCCESSOR, Verdict.CORRUPT),
        (Link(1), TailRow.NEWEST, Verdict.END),
        (Tail(Stop.REACHED, 8, 0, next=9), TailRow.CONTINUED, Verdict.CONTINUE),
        (Tail(Stop.UNKNOWN, 8, 8), TailRow.UNKNOWN_RECORD, Verdict.FORMAT),
        (Tail(Stop.DISORDER, 8, 8), TailRow.DISORDER, Verdict.CORRUPT),
        (Tail(Stop.INVALID, 8, 9, later=True, resumes=True, written=9), TailRow.DAMAGED_MARK, Verdict.CONTINUE),
        (Tail(Stop.END, 7, 0, short=True, next=9), TailRow.TRUNCATED_BEFORE_LATER_SEGMENT, Verdict.CORRUPT),
        (Tail(Stop.INVALID, 7, 0, next=9), TailRow.DAMAGE_BEFORE_LATER_SEGMENT, Verdict.CORRUPT),
        (Tail(Stop.CLOSED, 7, 0, next=9), TailRow.DAMAGE_BEFORE_LATER_SEGMENT, Verdict.CORRUPT),
        (Tail(Stop.INVALID, 7, 8), TailRow.DAMAGE_BELOW_WATERMARK, Verdict.CORRUPT),
        (Tail(Stop.CLOSED, 7, 8), TailRow.DAMAGE_BELOW_WATERMARK, Verdict.CORRUPT),
        (Tail(Stop.CLOSED, 8, 8, short=True), TailRow.CLOSED, Verdict.END),
        (Tail(Stop.END, 8, 8, short=True), TailRow.TRUNCATED_SEGMENT, Verdict.CORRUPT),
        (Tail(Stop.INVALID, 8, 8), TailRow.CLEAN_END, Verdict.END),
        (Tail(Stop.END, 8, 8), TailRow.CLEAN_END, Verdict.END),
        (Tail(Stop.INVALID, 8, 8, later=True, zeros=5, written=9), TailRow.UNSYNCED_HOLE, Verdict.END),
        (Tail(Stop.INVALID, 8, 8, zeros=5, written=9), TailRow.ZERO_HOLE, Verdict.END),
        (Tail(Stop.INVALID, 8, 8, written=9), TailRow.TORN_TAIL, Verdict.END),
        (Tail(Stop.CUT, 8, 8, written=9), TailRow.TORN_TAIL, Verdict.END),
    ],
)
def test_evidence_meets_its_row(evidence: Link | Tail, row: TailRow, verdict: Verdict):
    assert judge(evidence) == (row, verdict)


def test_kinds_are_what_the_format_says():
    assert (COMMIT, WATERMARK, CLOSED) == (1, 2, 3)
