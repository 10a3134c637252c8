"""The sparse index of a segment."""

import os
from pathlib import Path

import pytest
from wrapped_files import Wrapped, WrappedFiles

from kvwal.files import system_files
from kvwal.files.names import index_name
from kvwal.keys import Seqno
from kvwal.log.index import CRC, HEADER_BYTES, Index, load_index
from kvwal.log.record import RECORD_HEADER_BYTES
from kvwal.log.segment import SegmentHeader

ID = bytes(range(16))
HEADER = SegmentHeader(ID, Seqno(7), 1000, 0x01020304, 0x0A0B0C0D, 1 << 30, Seqno(3))


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


@pytest.mark.parametrize("begins", [b"", index().encode(HEADER), index().encode(HEADER)[:20] + b"\xff\xff\xff\xff"])
def test_of_a_long_file_no_more_is_read_than_an_index_of_the_segment_has(tmp_path: Path, begins: bytes):
    path = tmp_path / index_name(HEADER.first_seqno)
    path.write_bytes(begins)
    # The last one announces its size. It takes no space.
    os.truncate(path, HEADER_BYTES + 24 * 0xFFFFFFFF + CRC.size)
    read = []

    class Counted(Wrapped):
        def pread(self, size: int, offset: int) -> bytes:
            read.append(size)
            assert size <= 100
            return self.there.pread(size, offset)

    directory = WrappedFiles(system_files(), Counted).open_directory(str(tmp_path))
    assert load_index(directory, HEADER) is None
    assert read == [HEADER_BYTES]
    path.write_bytes(index().encode(HEADER))
    assert load_index(directory, HEADER) == index()


def test_an_index_has_no_more_entries_than_its_segment_has_space_for():
    data = index().encode(HEADER)
    assert Index.decode(data, HEADER._replace(capacity=2 * RECORD_HEADER_BYTES + 1)) == index()
    assert Index.decode(data, HEADER._replace(capacity=2 * RECORD_HEADER_BYTES)) is None
