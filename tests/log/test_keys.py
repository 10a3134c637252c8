"""The format of the key index: what is written is found, and no byte that was changed is believed."""

from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import WriteBatch
from kvwal.files.names import keys_name
from kvwal.keys import KeyRange, Seqno
from kvwal.log import Record, keys
from kvwal.log.intents import encode_intents, encode_put
from kvwal.log.keys import BLOCK_ROWS, DamagedIndex, KeyIndex, KeyTable, Range, hash_of
from kvwal.log.segment import SegmentHeader
from kvwal.testing import SimulatedDisk

HEADER = SegmentHeader(b"i" * 16, Seqno(10), 0, 0x01020304, 0x0A0B0C0D, 1 << 20, Seqno(1))


def record(seqno: int, offset: int, batch: WriteBatch | bytes) -> Record:
    chunks = [batch] if isinstance(batch, bytes) else encode_intents(batch)
    body = b"".join(chunks)
    return Record(1 | getattr(chunks, "bits", 0), Seqno(seqno), Seqno(0), 0, HEADER.first_seqno, offset, body)


def table_of(records: list[Record]) -> KeyTable:
    table = KeyTable(HEADER)
    for _ in table.extend(records):
        pass
    return table


def written(table: KeyTable, last: int) -> tuple[SimulatedDisk, bytes]:
    disk = SimulatedDisk()
    disk.make_directory("/log")
    data = b"".join(table.encode(HEADER, last))
    file = disk.open_directory("/log").open(keys_name(10), create=True)
    file.pwrite(data, 0)
    file.close()
    return disk, data


def found(disk: SimulatedDisk, digest: bytes, after: int, until: int, *, reverse: bool) -> list[tuple[int, int]]:
    directory = disk.open_directory("/log")
    index = KeyIndex.load(directory, HEADER, until)
    assert index is not None
    return list(index.rows(directory, digest, after, until, reverse=reverse))


def small() -> KeyTable:
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.delete(b"b")
    batch.delete_range(b"c", b"d")
    batch.table(16).delete_range(b"e")
    return table_of([record(10, 4096, encode_put(b"a", b"0")), record(11, 5000, batch)])


def test_the_bytes_are_as_the_format_says() -> None:
    _, data = written(small(), 11)
    a = blake2b(bytes(4) + b"a", digest_size=8).digest()
    b = blake2b(bytes(4) + b"b", digest_size=8).digest()
    rows = sorted(
        [a + struct.pack(">IQ", 0, 4096), a + struct.pack(">IQ", 1, 5000), b + struct.pack(">IQ", 1, 5000)]
    )
    block = b"".join(rows)
    ranges = struct.pack("<IQIHHB", 1, 5000, 0, 1, 1, 0) + b"cd" + struct.pack("<IQIHHB", 1, 5000, 16, 1, 0, 1) + b"e"
    head = struct.pack(
        "<8sHHIIIQQIIQ", b"kvwalkey", 1, 0, 0x01020304, 0x0A0B0C0D, 0, 10, 11, 3, 2, len(ranges)
    ) + (rows[0] + struct.pack("<I", crc32c(block)) + ranges)
    assert data == head + struct.pack("<I", crc32c(head)) + block
    assert len(block) / 3 <= 24


def test_an_index_says_what_was_put_into_it() -> None:
    disk, _ = written(small(), 11)
    assert found(disk, hash_of(0, b"a"), 0, 11, reverse=False) == [(10, 4096), (11, 5000)]
    assert found(disk, hash_of(0, b"a"), 10, 11, reverse=False) == [(11, 5000)]
    assert found(disk, hash_of(0, b"b"), 0, 11, reverse=True) == [(11, 5000)]
    assert found(disk, hash_of(16, b"a"), 0, 11, reverse=True) == []
    index = KeyIndex.load(disk.open_directory("/log"), HEADER, 11)
    assert index is not None
    assert index.ranges == [
        Range(11, 5000, 0, KeyRange(b"c", b"d")),
        Range(11, 5000, 16, KeyRange(b"e", None)),
    ]


@pytest.mark.parametrize("n", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 5 * BLOCK_ROWS])
def test_one_key_may_fill_any_number_of_blocks(n: int) -> None:
    rows = [record(10 + i, 4096 + 100 * i, encode_put(b"hot" if i % 2 else b"%d" % i, b"")) for i in range(2 * n)]
    table = table_of(rows)
    disk, _ = written(table, 10 + 2 * n)
    expected = [(10 + i, 4096 + 100 * i) for i in range(1, 2 * n, 2)]
    digest = hash_of(0, b"hot")
    assert found(disk, digest, 0, 10 + 2 * n, reverse=False) == expected
    assert found(disk, digest, 0, 10 + 2 * n, reverse=True) == expected[::-1]
    assert list(table.rows(digest, 0, 10 + 2 * n, reverse=True)) == expected[::-1]
    directory = disk.open_directory("/log")
    index = KeyIndex.load(directory, HEADER, 10 + 2 * n)
    assert index is not None
    for after, until in [(0, 11), (11, 13), (9 + n, 10 + n), (10 + n, 10 + 2 * n)]:
        part = [place for place in expected if after < place[0] <= until]
        assert list(index.rows(directory, digest, after, until, reverse=False)) == part
        assert list(index.rows(directory, digest, after, until, reverse=True)) == part[::-1]


def test_a_look_up_reads_the_head_and_one_block() -> None:
    table = table_of([record(10 + i, 4096 + 100 * i, encode_put(b"%d" % i, b"")) for i in range(20 * BLOCK_ROWS)])
    disk, data = written(table, 10 + 20 * BLOCK_ROWS)
    disk.trace = []
    for i in range(0, 20 * BLOCK_ROWS, 97):
        disk.trace.clear()
        assert found(disk, hash_of(0, b"%d" % i), 0, 10 + 20 * BLOCK_ROWS, reverse=True) == [(10 + i, 4096 + 100 * i)]
        reads = [operation.size for operation in disk.trace if operation.name == "pread"]
        assert len(reads) == 2
        assert sum(reads) < len(data) / 3


@given(st.lists(st.integers(0, 300), max_size=1000))
def test_a_large_bucket_is_put_in_order_piece_by_piece_and_as_at_once(numbers: list[int]) -> None:
    rows = [n.to_bytes(20, "big") for n in numbers * 3]
    assert list(keys._in_order(rows)) == sorted(rows)


def test_making_an_index_stops_often() -> None:
    batch = WriteBatch()
    for i in range(2000):
        batch.put(b"%d" % i, b"")
    alone = [record(10 + i, 4096 + 100 * i, encode_put(b"hot", b"")) for i in range(1000)]
    table = KeyTable(HEADER)
    assert sum(1 for _ in table.extend([*alone, record(1010, 1 << 20, batch)])) >= 3000 // 32
    assert sum(1 for _ in table.encode(HEADER, 1010)) >= 2 * (3000 // BLOCK_ROWS)


def test_no_changed_byte_is_believed() -> None:
    table = table_of([record(10 + i, 4096 + 100 * i, encode_put(b"k%d" % (i % 7), b"")) for i in range(3)])
    table.ranges.append(Range(12, 4296, 0, KeyRange(b"a", b"b")))
    _, data = written(table, 12)
    for at in range(len(data)):
        for changed in (data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :], data[:at]):
            disk = SimulatedDisk()
            disk.make_directory("/log")
            directory = disk.open_directory("/log")
            file = directory.open(keys_name(10), create=True)
            file.pwrite(changed, 0)
            file.close()
            index = KeyIndex.load(directory, HEADER, 12)
            if index is None:
                continue
            # The head holds, so the block does not.
            assert len(changed) == len(data)
            with pytest.raises(DamagedIndex):
                list(index.rows(directory, hash_of(0, b"k0"), 0, 12, reverse=False))


@pytest.mark.parametrize(
    "other",
    [HEADER._replace(salt=1), HEADER._replace(marker=2), HEADER._replace(first_seqno=Seqno(10), salt=9)],
)
def test_an_index_of_another_segment_of_the_same_name_is_none(other: SegmentHeader) -> None:
    disk, _ = written(small(), 11)
    assert KeyIndex.load(disk.open_directory("/log"), HEADER, 11) is not None
    assert KeyIndex.load(disk.open_directory("/log"), other, 11) is None
    assert KeyIndex.load(disk.open_directory("/log"), HEADER, 12) is None


def test_a_newer_version_is_no_index_and_neither_are_ranges_that_do_not_fill_their_part() -> None:
    _, data = written(small(), 11)
    head = len(data) - 3 * 20 - 4
    for change in (
        lambda raw: raw[:8] + b"\x02\0" + raw[10:],
        lambda raw: raw[:44] + struct.pack("<I", 3) + raw[48:],
        lambda raw: raw[:44] + struct.pack("<I", 1) + raw[48:],
    ):
        raw = change(data[:head])
        changed = raw + struct.pack("<I", crc32c(raw)) + data[head + 4 :]
        disk = SimulatedDisk()
        disk.make_directory("/log")
        file = disk.open_directory("/log").open(keys_name(10), create=True)
        file.pwrite(changed, 0)
        file.close()
        assert KeyIndex.load(disk.open_directory("/log"), HEADER, 11) is None
