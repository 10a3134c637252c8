"""Walking and searching the records of a segment."""

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.keys import Seqno
from kvwal.log.columns import decode_intents
from kvwal.log.intents import EXTENDED, SYSTEM, TABLES, encode_put
from kvwal.log.record import CLOSED, COMMIT, PAUSED, WATERMARK, Record, encode_record
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader
from kvwal.log.walk import Place, Puts, Stop, closed_record, last_written, search, walk, without_zeros

ID = bytes(range(16))
HEADER = SegmentHeader(ID, Seqno(7), 1000, 0x01020304, 0x0A0B0C0D, 1 << 30, Seqno(3))


class Memory:
    """A file of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def pread(self, size: int, offset: int) -> bytes:
        return self.data[offset : offset + size]


def records(*bodies: bytes, first: int = 7, start: int = HEADER_PAGE_BYTES) -> bytes:
    data = b""
    for i, body in enumerate(bodies):
        data += encode_record(HEADER.marker, HEADER.salt + start + len(data), COMMIT, first + i, 6, 1000 + i, body)
    return data


def walked(data: bytes, **options: Any) -> tuple[list[Record], Place]:
    cursor = Place(HEADER_PAGE_BYTES, 6, 6, 0)
    return list(
        walk(Memory(bytes(HEADER_PAGE_BYTES) + data), HEADER, HEADER_PAGE_BYTES + len(data), cursor, **options)
    ), cursor


# -- walking -----------------------------------------------------------------------------------


def test_a_walk_yields_the_commits_and_stops_at_the_end():
    found, cursor = walked(records(b"a", b"bb", b""))
    assert [(r.seqno, r.body, r.time_us) for r in found] == [(7, b"a", 1000), (8, b"bb", 1001), (9, b"", 1002)]
    assert (cursor.stop, cursor.last_seqno, cursor.time_us) == (Stop.END, 9, 1002)
    assert [r.position for r in found] == [(7, 4096), (7, 4137), (7, 4179)]
    assert sum(r.size for r in found) == cursor.offset - HEADER_PAGE_BYTES


def test_a_walk_skips_what_is_not_asked_for_and_stops_where_it_is_told():
    found, cursor = walked(records(*[b"x"] * 9), after=9, until=12)
    assert [r.seqno for r in found] == [10, 11, 12]
    assert cursor.stop is Stop.REACHED
    assert walked(records(b"x"), until=6)[1].stop is Stop.REACHED


TWO = struct.pack("<I2s2H2I", 2, b"\1\1", 1, 1, 1, 1) + b"ab" + b"BB"
OTHER = struct.pack("<I2s2H2I", 2, b"\1\2", 1, 1, 1, 0) + b"ab" + b"B"


def test_single_puts_are_left_in_their_turn_and_the_rest_is_handed_out():
    data = records(encode_put(b"a", b"1"), encode_put(b"b", b"1"), OTHER, TWO, encode_put(b"a", b"2"), b"?")
    puts = Puts({})
    cursor = Place(HEADER_PAGE_BYTES, 6, 6, 0)
    file = Memory(bytes(HEADER_PAGE_BYTES) + data)
    seen = []
    for record in walk(file, HEADER, len(file.data), cursor, after=7, puts=puts):
        seen.append((record.seqno, record.body, dict(puts.content)))
    assert seen == [(9, OTHER, {b"b": b"1"}), (12, b"?", {b"b": b"B", b"a": b"2"})]
    assert puts.size == 2 * (40 + 11 + 2) + 40 + len(TWO)
    assert (cursor.stop, cursor.last_seqno) == (Stop.END, 12)


@given(st.data())
def test_a_walk_that_leaves_puts_sees_what_one_that_does_not_sees(data: st.DataObject):
    bodies = data.draw(
        st.lists(st.builds(encode_put, st.binary(max_size=3), st.binary(max_size=9)) | st.sampled_from([TWO, OTHER]))
    )
    raw = bytearray(records(*bodies))
    if raw and data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    plain, cursor = walked(bytes(raw))
    puts = Puts({})
    found, other = walked(bytes(raw), puts=puts)
    for name in Place.__slots__:
        assert getattr(cursor, name) == getattr(other, name), name
    assert [r.seqno for r in found] == [r.seqno for r in plain if r.body == OTHER]
    assert sum(r.size for r in found) + puts.size == sum(r.size for r in plain)
    expected: dict[bytes, bytes | None] = {}
    for record in plain:
        if record.body != OTHER:
            expected.update(decode_intents(record.body).writes)
    assert puts.content == expected


@given(
    st.lists(
        st.sampled_from([0, 1, 1000, 40_000, 1 << 19, (1 << 20) - 41, 1 << 20, (1 << 20) + 1, 3 << 20]), max_size=6
    )
)
def test_records_of_every_size_cross_the_borders_of_chunks(sizes: list[int]):
    bodies = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    found, cursor = walked(records(*bodies))
    assert [r.body for r in found] == bodies
    assert cursor.stop is Stop.END


def test_zeros_behind_the_records_are_not_a_record():
    _, cursor = walked(records(b"a") + bytes(5000))
    assert (cursor.stop, cursor.last_seqno, cursor.offset) == (Stop.INVALID, 7, 4137)


@pytest.mark.parametrize("size", range(41))
def test_a_record_cut_off_anywhere_is_no_record(size: int):
    _, cursor = walked(records(b"a") + records(b"b", first=8, start=4137)[:size])
    assert (cursor.last_seqno, cursor.offset) == (7, 4137)
    assert cursor.stop is (Stop.CUT if size else Stop.END)


def test_a_commit_out_of_order_is_disorder():
    assert walked(records(b"a") + records(b"b", first=9, start=4137))[1].stop is Stop.DISORDER
    assert walked(records(b"a") + records(b"b", first=7, start=4137))[1].stop is Stop.DISORDER


@pytest.mark.parametrize(
    ("kind", "seqno", "watermark"), [(WATERMARK, 8, 7), (WATERMARK, 7, 8), (COMMIT, 8, 8), (CLOSED, 6, 6)]
)
def test_a_record_that_contradicts_the_log_is_disorder(kind: int, seqno: int, watermark: int):
    data = records(b"a") + encode_record(HEADER.marker, HEADER.salt + 4137, kind, seqno, watermark, 0)
    assert walked(data)[1].stop is Stop.DISORDER


def test_a_commit_with_bits_is_handed_out_and_never_taken_for_one_put():
    bits = [EXTENDED, TABLES, TABLES | SYSTEM]
    data = b""
    for i, some in enumerate(bits):
        seed = HEADER.salt + HEADER_PAGE_BYTES + len(data)
        data += encode_record(HEADER.marker, seed, COMMIT | some, 7 + i, 6, 0, encode_put(b"k", b"v"))
    puts = Puts({})
    found, cursor = walked(data, puts=puts)
    assert [(r.seqno, r.kind) for r in found] == [(7 + i, COMMIT | some) for i, some in enumerate(bits)]
    assert (puts.content, cursor.last_seqno) == ({}, 9)
    memory = Memory(bytes(HEADER_PAGE_BYTES) + data)
    assert all(f.is_commit for f in search(memory, HEADER, HEADER_PAGE_BYTES, len(memory.data)))


def test_an_unknown_kind_or_bit_is_not_skipped():
    for kind in (0, 5, COMMIT | SYSTEM, COMMIT | 1 << 11, WATERMARK | EXTENDED):
        data = encode_record(HEADER.marker, HEADER.salt + 4096, kind, 7, 6, 0)
        assert walked(data)[1].stop is Stop.UNKNOWN


def test_a_closed_record_ends_the_walk():
    data = records(b"a") + encode_record(HEADER.marker, HEADER.salt + 4137, CLOSED, 7, 7, 0)
    _, cursor = walked(data + b"junk")
    assert (cursor.stop, cursor.watermark, cursor.offset) == (Stop.CLOSED, 7, 4177)


def test_a_paused_record_is_passed_and_told_only_if_nothing_lies_behind_it():
    paused = encode_record(HEADER.marker, HEADER.salt + 4137, PAUSED, 7, 7, 0)
    found, place = walked(records(b"a") + paused)
    assert ([r.seqno for r in found], place.stop, place.offset, place.paused) == ([7], Stop.END, 4177, 4177)
    found, place = walked(records(b"a") + paused + records(b"b", first=8, start=4177))
    assert ([r.seqno for r in found], place.stop, place.offset, place.paused) == ([7, 8], Stop.END, 4218, 4177)
    for seqno, watermark in ((8, 7), (6, 6), (7, 8)):
        wrong = encode_record(HEADER.marker, HEADER.salt + 4137, PAUSED, seqno, watermark, 0)
        assert walked(records(b"a") + wrong)[1].stop is Stop.DISORDER


# -- searching ---------------------------------------------------------------------------------


@given(st.integers(0, 60), st.sampled_from([0, 1, 4, 50, (1 << 20) - 44, (1 << 20) - 3, 1 << 20]))
def test_a_record_is_found_behind_any_damage(damage: int, zeros: int):
    junk = HEADER.marker.to_bytes(4, "little") * (damage // 4) + b"\x0d" * (damage % 4) + bytes(zeros)
    data = junk + records(b"a", b"", b"c", start=HEADER_PAGE_BYTES + len(junk))
    memory = Memory(bytes(HEADER_PAGE_BYTES) + data)
    found = list(search(memory, HEADER, HEADER_PAGE_BYTES, len(memory.data)))
    assert [f.seqno for f in found] == [7, 8, 9]
    assert found[-1].end == len(memory.data)


def test_a_stale_record_of_another_segment_or_place_is_not_found():
    elsewhere = records(b"a", start=HEADER_PAGE_BYTES + 1)
    foreign = encode_record(HEADER.marker, HEADER.salt + 1 + HEADER_PAGE_BYTES + len(elsewhere), COMMIT, 7, 6, 0, b"a")
    memory = Memory(bytes(HEADER_PAGE_BYTES) + elsewhere + foreign)
    assert list(search(memory, HEADER, HEADER_PAGE_BYTES, len(memory.data))) == []


@given(st.integers(0, 3 << 20), st.integers(0, 3 << 20))
def test_the_last_written_byte_is_found(at: int, beyond: int):
    memory = Memory(bytes(at) + b"x" + bytes(beyond))
    assert last_written(memory, 0, len(memory.data)) == at + 1
    assert last_written(memory, at + 1, len(memory.data)) == at + 1


def test_a_closed_record_is_one_at_the_very_end():
    closed = encode_record(HEADER.marker, HEADER.salt + 4137, CLOSED, 7, 7, 5)
    raw = bytes(HEADER_PAGE_BYTES) + records(b"a") + closed
    found = closed_record(Memory(raw), HEADER, len(raw))
    assert found == (4137, 4177, CLOSED, 7, 7, 5)
    assert closed_record(Memory(raw + b"\0"), HEADER, len(raw) + 1) is None
    assert closed_record(Memory(raw), HEADER, len(raw) + 1) is None
    assert closed_record(Memory(raw[:-1]), HEADER, len(raw) - 1) is None
    other = HEADER._replace(marker=HEADER.marker + 1)
    assert closed_record(Memory(raw), other, len(raw)) is None
    for size in (0, 100, HEADER_PAGE_BYTES, HEADER_PAGE_BYTES + 39):
        assert closed_record(Memory(bytes(size)), HEADER, size) is None
    mark = encode_record(HEADER.marker, HEADER.salt + 4137, WATERMARK, 7, 7, 5)
    assert closed_record(Memory(raw[:4137] + mark), HEADER, len(raw)) is None


@given(st.binary(max_size=40), st.integers(0, 5000), st.binary(max_size=40), st.integers(0, 5000))
def test_what_zeros_follow_ends_where_its_last_byte_does(begin: bytes, inside: int, end: bytes, behind: int) -> None:
    data = begin + bytes(inside) + end + bytes(behind)
    assert without_zeros(data) == len(data.rstrip(b"\0"))
