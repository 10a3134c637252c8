"""The format of the key index: what is written is found, and no byte that was changed is believed."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from wrapped_files import Wrapped, WrappedFiles

from kvwal.batch import WriteBatch
from kvwal.files import system_files
from kvwal.files.names import keys_name
from kvwal.keys import KeyRange, Seqno
from kvwal.log import Record, columns, key_table
from kvwal.log.intents import encode_intents, encode_put
from kvwal.log.kept import KeptFiles
from kvwal.log.key_table import KeyTable
from kvwal.log.keys import BLOCK_ROWS, RANGE, DamagedIndex, KeyIndex, hash_of
from kvwal.log.ranges import Range
from kvwal.log.reader import start_of
from kvwal.log.record import encode_record
from kvwal.log.segment import SegmentHeader
from kvwal.log.walk import walk, walk_parts
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


def index_of(disk: SimulatedDisk, last: int, header: SegmentHeader = HEADER) -> KeyIndex | None:
    return KeyIndex.load(KeptFiles(disk.open_directory("/log")), header, last)


def loaded(disk: SimulatedDisk, last: int) -> KeyIndex:
    index = index_of(disk, last)
    assert index is not None
    return index


def small() -> KeyTable:
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.delete(b"b")
    batch.delete_range(b"c", b"d")
    batch.table(16).delete_range(b"e")
    return table_of([record(10, 4096, encode_put(b"a", b"0")), record(11, 5000, batch)])


def test_the_bytes_are_as_the_format_says() -> None:
    _, data = written(small(), 11)
    hashes = {key: blake2b(bytes(4) + key, digest_size=6).digest() for key in (b"a", b"b")}
    begins = 1 << 31
    order = struct.pack("<9I", begins, 4096, 0, 1, 5000, 2, begins | 1, 5000, 3)
    hash_rows = sorted([hashes[b"a"] + struct.pack(">I", 0), hashes[b"b"] + struct.pack(">I", 2)])
    block = b"".join(hash_rows)
    ranges = struct.pack("<IQIHHB", 1, 5000, 0, 1, 1, 0) + b"cd" + struct.pack("<IQIHHB", 1, 5000, 16, 1, 0, 1) + b"e"
    identity = 0x01020304, 0x0A0B0C0D, 0, 10, 11
    head = struct.pack("<8sHHIIIQQIIIIQII", b"kvwalkey", 1, 0, *identity, 3, 2, 1, 2, len(ranges), 2, 4)
    head += struct.pack("<II", 0, 3) + struct.pack("<II", 0, crc32c(order))
    head += hash_rows[0][:6] + struct.pack("<I", crc32c(block))
    head += hash_rows[0][2:4] + hash_rows[1][2:4] + b"\1a" + ranges
    assert data == head + struct.pack("<I", crc32c(head)) + order + block
    assert (len(order) + len(block) + 4) / 3 <= 24


def test_an_index_says_what_was_put_into_it() -> None:
    disk, _ = written(small(), 11)
    index = loaded(disk, 11)
    assert list(index.rows(0, b"a", 0, 11, reverse=False)) == [(10, 4096, 0), (11, 5000, 2)]
    assert list(index.rows(0, b"a", 10, 11, reverse=False)) == [(11, 5000, 2)]
    assert list(index.rows(0, b"b", 0, 11, reverse=True)) == [(11, 5000, 3)]
    assert list(index.rows(16, b"a", 0, 11, reverse=True)) == []
    assert index.newest(0, b"a", hash_of(0, b"a"), 0, 11) == [(11, 5000, 2)]
    assert index.newest(0, b"a", hash_of(0, b"a"), 0, 10) == [(10, 4096, 0)]
    assert index.newest(0, b"b", hash_of(0, b"b"), 0, 10) == []
    assert index.ranges == [
        Range(11, 5000, 0, KeyRange(b"c", b"d")),
        Range(11, 5000, 16, KeyRange(b"e", None)),
    ]


@pytest.mark.parametrize("n", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 5 * BLOCK_ROWS])
@pytest.mark.parametrize("hot", [b"hot", b"", b"1", b"5" * 9])
def test_one_key_may_fill_any_number_of_blocks(n: int, hot: bytes) -> None:
    rows = [record(10 + i, 4096 + 100 * i, encode_put(hot if i % 2 else b"-%d" % i, b"")) for i in range(2 * n)]
    table = table_of(rows)
    last = 10 + 2 * n
    disk, _ = written(table, last)
    expected = [(10 + i, 4096 + 100 * i, 0) for i in range(1, 2 * n, 2)]
    index = loaded(disk, last)
    for after, until in [(0, last), (0, 11), (11, 13), (9 + n, 10 + n), (10 + n, last), (0, 5), (last, 3)]:
        part = [place for place in expected if after < place[0] <= until]
        for known in (index, table):
            assert list(known.rows(0, hot, after, until, reverse=False)) == part
            assert list(known.rows(0, hot, after, until, reverse=True)) == part[::-1]
            assert known.newest(0, hot, hash_of(0, hot), after, until) == part[-1:]


def test_a_look_up_reads_the_head_and_two_blocks() -> None:
    n = 20 * BLOCK_ROWS
    table = table_of([record(10 + i, 4096 + 100 * i, encode_put(b"%d" % i, b"")) for i in range(n)])
    disk, data = written(table, 10 + n)
    disk.trace = []
    for i in range(0, n, 97):
        disk.trace.clear()
        assert list(loaded(disk, 10 + n).rows(0, b"%d" % i, 0, 10 + n, reverse=True)) == [(10 + i, 4096 + 100 * i, 0)]
        reads = [operation.size for operation in disk.trace if operation.name == "pread"]
        assert len(reads) <= 4
        assert sum(reads) < len(data) / 3
    disk.trace.clear()
    assert list(loaded(disk, 10 + n).rows(0, b"not there", 0, 10 + n, reverse=True)) == []
    assert sum(operation.name == "pread" for operation in disk.trace) == 2


@given(st.lists(st.integers(0, 300), max_size=1000))
def test_a_large_bucket_is_put_in_order_piece_by_piece_and_as_at_once(numbers: list[int]) -> None:
    rows = [n.to_bytes(10, "big") for n in numbers * 3]
    assert list(key_table._in_order(b"".join(rows))) == sorted(rows)


@pytest.mark.parametrize("prefix", [b"", b"p" * 63, b"p" * 64, b"p" * 100])
@pytest.mark.parametrize("n", [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, 3 * BLOCK_ROWS + 5])
def test_keys_are_found_in_order_however_they_lie_in_blocks(n: int, prefix: bytes, rng: Random) -> None:
    batches = [WriteBatch() for _ in range(20)]
    numbers: dict[tuple[int, int], bytes] = {}
    for batch in batches:
        for _ in range(n // 20 + 1 if n else 0):
            for table in (0, 16, 17):
                key = rng.choice([prefix, b""]) + b"%03d" % rng.choice([*range(900), 7, 7, 7])
                (batch.table(table) if table else batch).put(key, b"")
    for number, batch in enumerate(batches):
        keys = [key for part in (batch, *(part for _, part in batch.parts())) for key in part.writes]
        numbers |= {(10 + number, i): key for i, key in enumerate(keys)}
    table_of_all = table_of([record(10 + i, 4096 + i, batch) for i, batch in enumerate(batches) if len(batch)])
    disk, _ = written(table_of_all, 29)
    index = loaded(disk, 29)
    ends = [None, b"", b"000", b"007", b"007\0", b"500", prefix, prefix + b"007", prefix + b"9", b"q"]
    for start in ends:
        for stop in ends:
            for after, until in ((0, 29), (12, 20)):
                for table in (0, 16, 17, 18):
                    asked: Any = (table, (start, stop), after, until, lambda spot: numbers[spot[0], spot[2]])
                    expected = [spot for spots in table_of_all.spots(*asked, reverse=False)[1] for spot in spots]
                    found = [spot for spots in index.spots(*asked, reverse=False)[1] for spot in spots]
                    assert found == expected, (start, stop)
                    found = [spot for spots in index.spots(*asked, reverse=True)[1] for spot in spots]
                    assert found == expected[::-1]


def test_making_an_index_stops_often() -> None:
    batch = WriteBatch()
    for i in range(2000):
        batch.put(b"%d" % i, b"")
    alone = [record(10 + i, 4096 + 100 * i, encode_put(b"hot", b"")) for i in range(1000)]
    table = KeyTable(HEADER)
    assert sum(1 for _ in table.extend([*alone, record(1010, 1 << 20, batch)])) >= 3000 // 32
    assert sum(1 for _ in table.encode(HEADER, 1010)) >= 2 * (3000 // BLOCK_ROWS)


@pytest.mark.parametrize("tables", [[0], [0, 16, 17]])
def test_a_step_takes_a_part_of_the_operations_of_a_commit(tables: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = WriteBatch()
    for i in range(10_000):
        table = tables[i % len(tables)]
        part = batch.table(table) if table else batch
        part.put(b"%d" % i, b"")
        if i < 3000:
            part.delete_range(b"%d:" % i, b"%d;" % i)
    done = [0]

    def count(owner: Any, name: str, of_call: Any) -> None:
        real = getattr(owner, name)

        def counted(*args: Any) -> Any:
            done[0] += of_call(*args)
            return real(*args)

        monkeypatch.setattr(owner, name, counted)

    count(columns, "_cut", lambda body, start, lengths: len(lengths))
    count(key_table._Keys, "add", lambda self, keys, changes: len(keys))
    count(key_table, "Range", lambda *fields: 1)

    def check(steps: Iterable[object]) -> int:
        total = 0
        for _ in steps:
            assert done[0] <= 512
            total += done[0]
            done[0] = 0
        return total

    table = KeyTable(HEADER)
    # Each key is cut out and added, each start and stop of a range is cut out, and a range is made of them.
    assert check(table.extend([record(10, 4096, batch)])) == 2 * 10_000 + 3 * 3000
    monkeypatch.setattr(key_table, "RANGE", SimpleNamespace(pack=RANGE.pack))
    count(key_table.RANGE, "pack", lambda *fields: 1)
    assert check(table.encode(HEADER, 10)) == 3000
    left = len(table.ranges)
    for _ in table.freed():
        assert left - len(table.ranges) <= 512
        left = len(table.ranges)
    assert left == 0


def test_what_does_not_fit_into_rows_is_not_written() -> None:
    table = table_of([record(10, (1 << 32) - 1, encode_put(b"a", b""))])
    assert table.fits()
    table = table_of([record(10, 4096, encode_put(b"a", b"")), record(11, 1 << 32, encode_put(b"a", b""))])
    assert not table.fits()
    assert list(table.rows(0, b"a", 10, 11, reverse=False)) == [(11, 1 << 32, 0)]
    many = KeyTable(HEADER)
    many._offsets = range(1 << 31)  # type: ignore[assignment]
    assert many.fits()
    many._offsets = range((1 << 31) + 1)  # type: ignore[assignment]
    assert not many.fits()


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
            index = index_of(disk, 12)
            if index is None:
                continue
            # The head holds, so one of the blocks does not.
            assert len(changed) == len(data)
            with pytest.raises(DamagedIndex):
                list(index.rows(0, b"k0", 0, 12, reverse=False))


@pytest.mark.parametrize(
    "other",
    [HEADER._replace(salt=1), HEADER._replace(marker=2), HEADER._replace(first_seqno=Seqno(10), salt=9)],
)
def test_an_index_of_another_segment_of_the_same_name_is_none(other: SegmentHeader) -> None:
    disk, _ = written(small(), 11)
    assert index_of(disk, 11) is not None
    assert index_of(disk, 11, other) is None
    assert index_of(disk, 12) is None


def test_a_newer_version_is_no_index_and_neither_are_parts_that_are_not_filled() -> None:
    _, data = written(small(), 11)
    head = len(data) - 3 * 12 - 2 * 10 - 4
    for change in (
        lambda raw: raw[:8] + b"\x02\0" + raw[10:],
        lambda raw: raw[:68] + bytes(4) + raw[72:],
        lambda raw: raw[:64] + struct.pack("<II", 4, 2) + raw[72:],
        lambda raw: raw[:76] + struct.pack("<I", 2) + raw[80:],
        lambda raw: raw[:52] + struct.pack("<IQI", 2, 100, 1) + raw[68:],
        lambda raw: raw[:52] + struct.pack("<I", 3) + raw[56:],
        lambda raw: raw[:52] + struct.pack("<I", 1) + raw[56:],
    ):
        raw = change(data[:head])
        changed = raw + struct.pack("<I", crc32c(raw)) + data[head + 4 :]
        disk = SimulatedDisk()
        disk.make_directory("/log")
        file = disk.open_directory("/log").open(keys_name(10), create=True)
        file.pwrite(changed, 0)
        file.close()
        assert index_of(disk, 11) is None


def test_a_table_of_runs_is_that_of_their_records() -> None:
    rng = Random(7)
    segment = bytearray(4096)
    for seqno in range(10, 1010):
        # Some keys again and again, some within one run.
        body = encode_put(b"%03d" % rng.choice([rng.randrange(1000), rng.randrange(9)]), b"v")
        segment += encode_record(HEADER.marker, HEADER.salt + len(segment), 1, seqno, 9, 0, body)
    disk = SimulatedDisk()
    disk.make_directory("/log")
    file = disk.open_directory("/log").open("segment", create=True)
    file.pwrite(bytes(segment), 0)
    by_runs, by_records = KeyTable(HEADER), KeyTable(HEADER)
    steps = sum(1 for _ in by_runs.extend(walk_parts(file, HEADER, len(segment), start_of(HEADER))))
    assert steps < 50
    for _ in by_records.extend(walk(file, HEADER, len(segment), start_of(HEADER))):
        pass
    assert written(by_runs, 1009)[1] == written(by_records, 1009)[1]
    for number in range(1000):
        for reverse in (False, True):
            asked = 0, b"%03d" % number, rng.randrange(1009), rng.randrange(1009)
            assert list(by_runs.rows(*asked, reverse=reverse)) == list(by_records.rows(*asked, reverse=reverse))


def test_a_table_that_is_freed_is_empty() -> None:
    table = small()
    assert table.size() > 0
    assert sum(1 for _ in table.freed()) > 1
    assert list(table.rows(0, b"a", 9, 11, reverse=False)) == []


@pytest.mark.parametrize("n", [1, BLOCK_ROWS, 20 * BLOCK_ROWS])
def test_a_key_is_missed_nowhere_and_most_that_are_not_there_are_told_without_a_read(n: int) -> None:
    disk, _ = written(table_of([record(10 + i, 4096, encode_put(b"%d" % i, b"")) for i in range(n)]), 9 + n)
    index = loaded(disk, 9 + n)
    disk.trace = []
    assert all(index.may_have(hash_of(0, b"%d" % i)) for i in range(n))
    assert sum(index.may_have(hash_of(0, b"-%d" % i)) for i in range(1000)) < 20
    assert not disk.trace


def test_keys_of_one_hash_that_fill_blocks_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "hashes_of", lambda table, keys: [b"\x00\x01\x02\x03\x04\x05"] * len(keys))
    n = 3 * BLOCK_ROWS
    disk, _ = written(table_of([record(10 + i, 4096, encode_put(b"%d" % i, b"")) for i in range(n)]), 9 + n)
    index = loaded(disk, 9 + n)
    assert index.may_have(b"\x00\x01\x02\x03\x04\x05")
    assert not index.may_have(b"\x00\x01\x02\x04\x04\x05")


def test_an_index_that_was_written_without_marks_is_read() -> None:
    _, data = written(small(), 11)
    marks_at = 72 + 8 + 8 + 10
    head = data[:68] + bytes(4) + data[72:marks_at] + data[marks_at + 4 : len(data) - 3 * 12 - 2 * 10 - 4]
    former = head + struct.pack("<I", crc32c(head)) + data[-3 * 12 - 2 * 10 :]
    assert b"".join(small().encode(HEADER, 11, with_marks=False)) == former
    disk = SimulatedDisk()
    disk.make_directory("/log")
    file = disk.open_directory("/log").open(keys_name(10), create=True)
    file.pwrite(former, 0)
    file.close()
    index = loaded(disk, 11)
    index.check()
    assert (index.has_marks, loaded(written(small(), 11)[0], 11).has_marks) == (False, True)
    assert index.may_have(hash_of(0, b"never"))
    assert list(index.rows(0, b"a", 0, 11, reverse=False)) == [(10, 4096, 0), (11, 5000, 2)]
    assert index.newest(0, b"b", hash_of(0, b"b"), 0, 11) == [(11, 5000, 3)]


def test_of_a_long_file_no_more_is_read_than_the_head_of_an_index_may_have(tmp_path: Path) -> None:
    """It announces ranges of 64 GiB, and has that size."""
    path = tmp_path / keys_name(10)
    identity = 0x01020304, 0x0A0B0C0D, 0, 10, 11
    head = struct.pack("<8sHHIIIQQIIIIQII", b"kvwalkey", 1, 0, *identity, 0, 0, 0, 1, 64 << 30, 0, 0)
    path.write_bytes(head)
    os.truncate(path, len(head) + (64 << 30) + 4)
    read = []

    class Counted(Wrapped):
        def pread(self, size: int, offset: int) -> bytes:
            read.append(size)
            assert size <= 32 * HEADER.capacity
            return bytes(self.there.pread(size, offset))

    directory: Any = WrappedFiles(system_files(), Counted).open_directory(str(tmp_path))
    assert KeyIndex.load(KeptFiles(directory), HEADER, 11) is None
    assert read == [16 << 10]
