"""Segment files: the header page, the slot, and walking and searching records in them."""

import struct
from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import Seqno
from kvwal.log.index import Index
from kvwal.log.record import CLOSED, COMMIT, WATERMARK, Record, decode_intents, encode_put, encode_record
from kvwal.log.segment import (
    HEADER_BYTES,
    HEADER_PAGE_BYTES,
    SLOT_OFFSET,
    Cursor,
    HeaderFault,
    Puts,
    SegmentHeader,
    Slot,
    Stop,
    closed_record,
    decode_header,
    decode_slot,
    encode_header,
    encode_slot,
    last_written,
    new_marker,
    search,
    walk,
)

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


def walked(data: bytes, **options: Any) -> tuple[list[Record], Cursor]:
    cursor = Cursor(HEADER_PAGE_BYTES, 6, 6, 0)
    return list(
        walk(Memory(bytes(HEADER_PAGE_BYTES) + data), HEADER, HEADER_PAGE_BYTES + len(data), cursor, **options)
    ), cursor


# -- header page and slot ----------------------------------------------------------------------


def test_golden_bytes_of_a_header():
    page = encode_header(HEADER)
    assert page[:HEADER_BYTES] == (
        b"kvwallog"
        + bytes.fromhex("0100 4c00 00000000")
        + ID
        + bytes.fromhex(
            "0700000000000000 e803000000000000 04030201 0d0c0b0a 0000004000000000 0300000000000000 73aaeffe"
        )
    )
    assert page[HEADER_BYTES:] == bytes(HEADER_PAGE_BYTES - HEADER_BYTES)


def test_golden_bytes_of_a_slot():
    assert encode_slot(5, 9) == b"kvwalnxt" + bytes.fromhex("0900000000000000 d50c68a9")


def test_a_header_comes_back_equal():
    assert decode_header(encode_header(HEADER), 7, ID) == HEADER
    assert decode_header(encode_header(HEADER), 7, None) == HEADER


@pytest.mark.parametrize("offset", range(HEADER_BYTES))
def test_a_flipped_byte_of_the_header_is_damage(offset: int):
    page = bytearray(encode_header(HEADER))
    page[offset] ^= 0x10
    assert decode_header(bytes(page), 7, ID) is HeaderFault.DAMAGED


def test_a_short_page_is_damage():
    assert decode_header(encode_header(HEADER)[:-1], 7, ID) is HeaderFault.DAMAGED


def test_a_newer_version_is_told_from_damage_even_if_its_header_is_longer():
    page = bytearray(encode_header(HEADER))
    page[8:12] = b"\2\0\x80\0"
    page[124:128] = crc32c(bytes(page[:124])).to_bytes(4, "little")
    assert decode_header(bytes(page), 7, ID) is HeaderFault.NEWER


def test_another_store_and_another_name_are_told_apart():
    assert decode_header(encode_header(HEADER), 7, b"x" * 16) is HeaderFault.FOREIGN
    assert decode_header(encode_header(HEADER), 8, ID) is HeaderFault.MISPLACED


def test_a_slot_is_empty_valid_or_damaged():
    page = bytearray(encode_header(HEADER))
    assert decode_slot(bytes(page), HEADER.salt) == Slot(None, damaged=False)
    page[SLOT_OFFSET : SLOT_OFFSET + 20] = encode_slot(HEADER.salt, 9)
    assert decode_slot(bytes(page), HEADER.salt) == Slot(Seqno(9), damaged=False)
    assert decode_slot(bytes(page), HEADER.salt + 1) == Slot(None, damaged=True)
    for offset in range(SLOT_OFFSET, SLOT_OFFSET + 20):
        torn = page.copy()
        torn[offset] ^= 1
        assert decode_slot(bytes(torn), HEADER.salt) == Slot(None, damaged=True)


def test_no_byte_of_a_marker_is_zero():
    for random in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xfe\0\x01\xff"):
        assert 0 not in new_marker(random).to_bytes(4, "little")


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


def test_single_puts_are_left_in_their_turn_and_the_rest_is_handed_out():
    data = records(encode_put(b"a", b"1"), encode_put(b"b", b"1"), TWO, encode_put(b"a", b"2"), b"?")
    puts = Puts({})
    cursor = Cursor(HEADER_PAGE_BYTES, 6, 6, 0)
    file = Memory(bytes(HEADER_PAGE_BYTES) + data)
    seen = []
    for record in walk(file, HEADER, len(file.data), cursor, after=7, puts=puts):
        seen.append((record.seqno, record.body, dict(puts.content)))
    assert seen == [(9, TWO, {b"b": b"1"}), (11, b"?", {b"b": b"1", b"a": b"2"})]
    assert puts.size == 2 * (40 + 11 + 2)
    assert (cursor.stop, cursor.last_seqno) == (Stop.END, 11)


@given(st.data())
def test_a_walk_that_leaves_puts_sees_what_one_that_does_not_sees(data: st.DataObject):
    bodies = data.draw(st.lists(st.builds(encode_put, st.binary(max_size=3), st.binary(max_size=9)) | st.just(TWO)))
    raw = bytearray(records(*bodies))
    if raw and data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    plain, cursor = walked(bytes(raw))
    puts = Puts({})
    found, other = walked(bytes(raw), puts=puts)
    for name in Cursor.__slots__:
        assert getattr(cursor, name) == getattr(other, name), name
    assert [r.seqno for r in found] == [r.seqno for r in plain if r.body == TWO]
    assert sum(r.size for r in found) + puts.size == sum(r.size for r in plain)
    expected: dict[bytes, bytes | None] = {}
    for record in plain:
        if record.body != TWO:
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


def test_an_unknown_kind_or_flag_is_not_skipped():
    for kind in (0, 4, 0x0101):
        data = encode_record(HEADER.marker, HEADER.salt + 4096, kind, 7, 6, 0)
        assert walked(data)[1].stop is Stop.UNKNOWN


def test_a_closed_record_ends_the_walk():
    data = records(b"a") + encode_record(HEADER.marker, HEADER.salt + 4137, CLOSED, 7, 7, 0)
    _, cursor = walked(data + b"junk")
    assert (cursor.stop, cursor.watermark, cursor.offset) == (Stop.CLOSED, 7, 4177)


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


# -- index -------------------------------------------------------------------------------------


def index() -> Index:
    index = Index()
    index.add(7, 1000, 4096)
    index.add(20, 1010, 70_000)
    return index


def test_golden_bytes_of_an_index():
    assert index().encode(HEADER) == (
        b"kvwalidx"
        + bytes.fromhex("0100 0000 04030201 0d0c0b0a 02000000 0700000000000000")
        + bytes.fromhex("0700000000000000 1400000000000000 e803000000000000 f203000000000000")
        + bytes.fromhex("0010000000000000 7011010000000000 da30f63c")
    )


def test_an_index_comes_back_and_finds():
    again = Index.decode(index().encode(HEADER), HEADER)
    assert again == index()
    assert [again.at_or_before(s) and again.at_or_before(s).offset for s in (6, 7, 19, 20, 99)] == [
        None,
        4096,
        4096,
        70_000,
        70_000,
    ]
    assert [again.made_by(t) and again.made_by(t).seqno for t in (999, 1000, 1009, 1010)] == [None, 7, 7, 20]


def test_a_damaged_or_foreign_index_is_none():
    data = index().encode(HEADER)
    for offset in range(len(data)):
        torn = bytearray(data)
        torn[offset] ^= 1
        assert Index.decode(bytes(torn), HEADER) is None
    assert Index.decode(data[:-1], HEADER) is None
    assert Index.decode(b"", HEADER) is None
    assert Index.decode(data, HEADER._replace(salt=1)) is None
    assert Index.decode(data, HEADER._replace(marker=1)) is None
    assert Index.decode(data, HEADER._replace(first_seqno=Seqno(8))) is None


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
