"""The header page of a segment, and its slot."""

import struct

import pytest
from crc32c import crc32c

from kvwal.features import EXTENSIONS, KNOWN_REQUIRED
from kvwal.keys import Seqno
from kvwal.log.segment import (
    HEADER_BYTES,
    HEADER_PAGE_BYTES,
    SLOT_OFFSET,
    HeaderFault,
    SegmentHeader,
    Slot,
    decode_header,
    decode_slot,
    encode_header,
    encode_slot,
    list_segments,
    new_marker,
    newer_features,
    newest_segment,
)
from kvwal.testing import SimulatedDisk

ID = bytes(range(16))
HEADER = SegmentHeader(
    ID, Seqno(7), 1000, 0x01020304, 0x0A0B0C0D, 1 << 30, Seqno(3), EXTENSIONS, 0, b"line....", 9, 2000
)


# -- header page and slot ----------------------------------------------------------------------


def test_golden_bytes_of_a_header():
    page = encode_header(HEADER)
    assert page[:HEADER_BYTES] == (
        b"kvwallog"
        + bytes.fromhex("0100 0001 00000000")
        + ID
        + bytes.fromhex("0700000000000000 e803000000000000 04030201 0d0c0b0a 0000004000000000 0300000000000000")
        + bytes.fromhex("0400000000000000 0000000000000000")
        + b"line...."
        + bytes.fromhex("0900000000000000 d007000000000000")
        + bytes(140)
        + bytes.fromhex("e1ad079d")
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


def forged(at: int, data: bytes, *, header: SegmentHeader = HEADER, size: int = HEADER_BYTES) -> bytes:
    """A header page with these bytes in it and a right CRC, as another version might have written it."""
    page = bytearray(encode_header(header))
    page[at : at + len(data)] = data
    page[size - 4 : size] = crc32c(bytes(page[: size - 4])).to_bytes(4, "little")
    return bytes(page)


def test_a_newer_version_is_told_from_damage_whatever_the_size_of_its_header():
    for size in (128, 256, 512):
        assert decode_header(forged(8, struct.pack("<HH", 2, size), size=size), 7, ID) is HeaderFault.NEWER
    assert decode_header(forged(8, struct.pack("<HH", 1, 260), size=260), 7, ID) is HeaderFault.NEWER


def test_a_form_that_is_not_known_is_newer():
    assert decode_header(forged(12, b"\1"), 7, ID) is HeaderFault.NEWER


@pytest.mark.parametrize("bit", range(64))
def test_a_required_feature_that_is_not_known_is_newer_and_an_optional_one_is_kept(bit: int):
    required = HEADER._replace(required=1 << bit)
    if KNOWN_REQUIRED >> bit & 1:
        assert decode_header(encode_header(required), 7, ID) == required
    else:
        assert decode_header(encode_header(required), 7, ID) is HeaderFault.NEWER
        assert newer_features(encode_header(required)) == f" (required features {bit})"
    optional = HEADER._replace(optional=1 << bit)
    assert decode_header(encode_header(optional), 7, ID) == optional


@pytest.mark.parametrize("at", [112, 120, 175, 176, 216, 251])
def test_a_field_that_is_not_built_yet_is_newer_unless_an_optional_feature_may_have_it(at: int):
    assert decode_header(forged(at, b"\1"), 7, ID) is HeaderFault.NEWER
    optional = HEADER._replace(optional=1 << 40)
    assert decode_header(forged(at, b"\1", header=optional), 7, ID) == optional


def test_a_newer_version_has_no_features_that_could_be_named():
    for size in (128, 256):
        assert newer_features(forged(8, struct.pack("<HH", 2, size), size=size)) == ""
    assert newer_features(encode_header(HEADER)) == ""


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


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seqnos", [(), (1,), (1, 9, 10, 99, 10**19)])
@pytest.mark.parametrize("others", [(), ("z.log", "data", f"{100:020}.log.tmp", "9" * 19 + ".log")])
def test_the_newest_segment_is_the_last_one_of_all_whatever_else_is_there(
    seqnos: tuple[int, ...], others: tuple[str, ...]
) -> None:
    disk = SimulatedDisk()
    disk.make_directory("/log")
    directory = disk.open_directory("/log")
    for name in (*(f"{seqno:020}.{kind}" for seqno in seqnos for kind in ("log", "keys", "idx")), *others):
        directory.open(name, create=True).close()
    assert list_segments(directory) == list(seqnos)
    assert newest_segment(directory) == list(seqnos[-1:])
