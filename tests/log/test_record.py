"""Records survive the way to bytes and back, and nothing else passes for them."""

import struct

import pytest
from crc32c import crc32c

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError, FormatError
from kvwal.log.intents import EXTENDED, SYSTEM, TABLES, Body, encode_intents
from kvwal.log.record import (
    CLOSED,
    COMMIT,
    PAUSED,
    RECORD_HEADER_BYTES,
    WATERMARK,
    Record,
    encode_record,
    is_commit,
    is_system,
)


def test_golden_bytes_of_a_record():
    data = encode_record(0x01020304, 0x11111111, COMMIT, 7, 5, 1_700_000_000_000_000, b"body")
    assert data == bytes.fromhex(
        "04030201"  # marker
        "7aa6aaa6"  # CRC-32C of all that follows, seeded with 0x11111111
        "04000000"  # body length
        "01000000"  # kind and flags
        "0700000000000000"  # seqno
        "0500000000000000"  # watermark
        "00401e18240a0600"  # time
        "626f6479"
    )
    assert len(encode_record(1, 0, WATERMARK, 1, 1, 1)) == RECORD_HEADER_BYTES


def test_a_record_whose_body_does_not_decode_names_its_place():
    record = Record(COMMIT, 3, 2, 0, 1, 5000, b"?")
    with pytest.raises(CorruptionError) as caught:
        record.batch()
    assert (caught.value.file, caught.value.offset) == ("00000000000000000001.log", 5000)


@pytest.mark.parametrize("offset", range(4, 44))
def test_every_byte_of_a_record_but_the_marker_is_under_its_crc(offset: int):
    data = bytearray(encode_record(9, 77, COMMIT, 1, 0, 5, b"body"))
    data[offset] ^= 1
    assert crc32c(bytes(data[8:]), 77) != struct.unpack_from("<I", data, 4)[0]


def test_a_record_does_not_verify_at_another_place():
    here, there = (encode_record(9, seed, COMMIT, 1, 0, 5, b"body") for seed in (4096, 4136))
    assert here[4:8] != there[4:8]
    assert here[8:] == there[8:]


def test_a_commit_is_known_by_its_kind_and_bits():
    plain = [COMMIT, COMMIT | EXTENDED, COMMIT | TABLES, COMMIT | TABLES | SYSTEM, COMMIT | EXTENDED | TABLES | SYSTEM]
    assert [is_commit(kind) for kind in plain] == [True] * 5
    assert [is_commit(kind) for kind in (WATERMARK, CLOSED, PAUSED)] == [False] * 3
    unknown = [0, 5, 255, COMMIT | SYSTEM, WATERMARK | EXTENDED, CLOSED | TABLES, PAUSED | EXTENDED]
    assert {is_commit(kind) for kind in unknown + [COMMIT | 1 << bit for bit in range(11, 32)]} == {None}


def test_a_record_hands_out_its_tables_and_its_extension():
    batch = WriteBatch()
    batch.table(1).put(b"k", b"v")
    body = encode_intents(batch, {5: b"me"})
    assert isinstance(body, Body)
    record = Record(COMMIT | body.bits, 3, 2, 0, 1, 5000, b"".join(body))
    again = record.batch()
    assert again.others is not None
    assert (again.writes, again.others[1].writes) == ({}, {b"k": b"v"})
    assert record.extension() == {5: b"me"}
    assert is_system(record)
    plain = Record(COMMIT, 3, 2, 0, 1, 5000, b"\0\0\0\0")
    assert (plain.extension(), is_system(plain)) == ({}, False)


def test_a_record_of_a_newer_format_is_no_corruption():
    record = Record(COMMIT, 3, 2, 0, 1, 5000, struct.pack("<IBHI", 1, 6, 0, 0))
    with pytest.raises(FormatError, match=r"0001\.log at byte 5000: .*unknown operation"):
        record.batch()
    record = Record(COMMIT | EXTENDED, 3, 2, 0, 1, 5000, b"\3\0\x09\0\0")
    for ask in (record.batch, record.extension):
        with pytest.raises(FormatError, match="item of type 9"):
            ask()
    record = Record(COMMIT | EXTENDED, 3, 2, 0, 1, 5000, b"\3\0")
    with pytest.raises(CorruptionError):
        record.extension()
