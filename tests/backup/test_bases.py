"""The format of a base, and what becomes of bytes that are none."""

from __future__ import annotations

import asyncio
import hashlib
import struct
import tracemalloc
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from backup_fixtures import Lived, objects, restored
from crc32c import crc32c

import kvwal
import kvwal.aio
from kvwal.backup.bases import CRC, HEADER, check_base, read_header, read_table
from kvwal.backup.making import backup
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.reach import Reach, Table, walked
from kvwal.pages.meta import encode_meta
from kvwal.pages.pager import Pager
from kvwal.testing import SimulatedDisk


def a_base() -> tuple[Lived, str, bytes]:
    lived = Lived(1)
    lived.live(40)
    lived.db.checkpoint()
    name = backup(lived.db.engine, lived.destination).base
    return lived, name, lived.destination.get(name)


def changed(data: bytes, offset: int, new: bytes) -> bytes:
    """Other bytes in the header, and its checksum right."""
    data = data[:offset] + new + data[offset + len(new) :]
    return data[: HEADER.size] + CRC.pack(crc32c(data[: HEADER.size])) + data[4096:]


def put(lived: Lived, name: str, data: bytes) -> DirectoryDestination:
    disk = SimulatedDisk()
    destination = DirectoryDestination("/b", files=disk)
    for each, found in objects(lived.destination).items():
        destination.put_new(each, data if each == name else found)
    return destination


def test_the_layout_of_a_base() -> None:
    lived, _, data = a_base()
    meta = lived.db.engine.state.version.tree.meta
    magic, version, size, rows, required, optional, store_id, line, generation, parent, parent_seqno, seqno = (
        struct.unpack_from("<8sHHIQQ16s8sQQQQ", data)
    )
    assert (magic, version, size, optional, parent, parent_seqno) == (b"kvwbase1", 1, 4096, 0, 0, 0)
    assert (store_id, line, generation, seqno) == (meta.store_id, meta.line, meta.generation, meta.seqno)
    assert struct.unpack_from("<Q", data, 96)[0] == len(data)
    table = data[4096 : 4096 + 16 * rows]
    assert data[104:136] == hashlib.sha256(table).digest()
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    # Each extent is what the page file has there, in the order of its pages.
    extents = sorted(struct.iter_unpack("<IIII", table))
    raw, at = lived.disk.read("/s/data"), 4096 + len(table)
    for page, length, crc, below in extents:
        assert crc32c(data[at : at + length], page) == crc
        assert data[at : at + length] == raw[page * 4096 : page * 4096 + length]
        assert 1 <= below <= rows
        at += -(-length // 4096) * 4096
    assert at == len(data) - 32
    # The root of table 0 comes first, and what is below it follows.
    first = next(struct.iter_unpack("<IIII", table))
    assert first[0] == struct.unpack_from("<I", meta.root)[0]
    assert not required & 1 << 6


@pytest.mark.parametrize(
    ("offset", "new", "error"),
    [
        (8, struct.pack("<H", 2), kvwal.FormatError),
        (16, struct.pack("<Q", 1 << 40), kvwal.FormatError),
        (700, b"\1", kvwal.FormatError),
        (32, b"another store id", kvwal.CorruptionError),
        (48, b"a line  ", kvwal.CorruptionError),
        (56, struct.pack("<Q", 99), kvwal.CorruptionError),
        (64, struct.pack("<Q", 1), kvwal.CorruptionError),
        (88, struct.pack("<Q", 9), kvwal.CorruptionError),
        (12, struct.pack("<I", 1), kvwal.CorruptionError),
        (12, struct.pack("<I", 0xFFFFFFFF), kvwal.CorruptionError),
        (96, struct.pack("<Q", 5000), kvwal.CorruptionError),
        (104, bytes(32), kvwal.CorruptionError),
        (140, b"\xff\xff", kvwal.CorruptionError),
    ],
)
def test_a_header_that_says_something_else_is_refused(offset: int, new: bytes, error: type[kvwal.Error]) -> None:
    lived, name, data = a_base()
    destination = put(lived, name, changed(data, offset, new))
    with pytest.raises(error) as caught:
        check_base(destination, name)
    assert name in str(caught.value)


def test_a_header_that_leaves_no_space_for_its_table_is_refused(tmp_path: Path) -> None:
    lived, name, data = a_base()
    least = 4096 + 16 * read_header(lived.destination, name).rows + 32
    # On a disk of the system, which reads nothing before the beginning of a file.
    for n, size in enumerate((0, 31, 4096, least - 1)):
        destination = DirectoryDestination(str(tmp_path / str(n)))
        destination.put_new(name, changed(data, 96, struct.pack("<Q", size)))
        with pytest.raises(kvwal.CorruptionError, match="its size is less") as caught:
            check_base(destination, name)
        assert caught.value.file == name


def test_a_restored_store_has_only_pages_that_its_bases_have() -> None:
    lived, name, data = a_base()
    meta = read_header(lived.destination, name).meta
    # Damage, or the free end of what was a large store.
    said = changed(data, 136, encode_meta(replace(meta, page_count=1 << 14)))[:-32]
    destination = put(lived, name, said + hashlib.sha256(said).digest())
    check_base(destination, name)
    report = kvwal.restore(destination, "/r", files=lived.disk)
    assert len(lived.disk.read("/r/data")) <= (meta.page_count + 1) * 4096
    with kvwal.open("/r", files=lived.disk, background=False) as db:
        lived.check(db, report.restored)
        assert db.verify().ok
        db.put(b"more", bytes(9000))
        db.checkpoint()
        assert db.verify().ok


@pytest.mark.parametrize("size", [0, 10, 4095, 4096, 4200, -33, -1])
def test_a_base_that_is_cut_short_is_refused(size: int) -> None:
    lived, name, data = a_base()
    destination = put(lived, name, data[:size])
    with pytest.raises(kvwal.CorruptionError, match=name):
        check_base(destination, name)


def test_a_table_with_extents_that_cannot_be_there_is_refused() -> None:
    lived, name, data = a_base()
    rows = read_header(lived.destination, name).rows
    table = array("I", data[4096 : 4096 + 16 * rows])
    bad = []
    for page in (1, 1 << 31):
        bad.append(array("I", table))
        bad[-1][0] = page
    # Two in one place.
    bad.append(array("I", table))
    bad[-1][4:8] = bad[-1][0:4]
    for each in bad:
        raw = each.tobytes()
        made = changed(data, 104, hashlib.sha256(raw).digest())
        destination = put(lived, name, made[:4096] + raw + made[4096 + len(raw) :])
        header = read_header(destination, name)
        with pytest.raises(kvwal.CorruptionError, match="cannot be there"):
            read_table(destination, name, header)


def test_what_is_kept_of_a_parent_must_be_there() -> None:
    parent = Table()
    parent.add(2, 8192, 7)
    reach = Reach(parent)
    assert len(reach) == 1
    assert reach.find(2, 8192, 7) is None
    reach.index(4)
    assert reach.find(2, 8192, 7) == (0, 1)
    assert reach.find(2, 4096, 7) is None
    assert reach.find(2, 8192, 8) is None
    assert reach.find(3, 8192, 7) is None
    assert reach.find(1 << 31, 8192, 7) is None
    for at, count in ((0, 2), (1, 1), (0, 0), (1 << 31, 1)):
        with pytest.raises(ValueError, match="parent"):
            Reach(Table(array("I", [0, at, count, 0])), reach)
    with pytest.raises(ValueError, match="parent"):
        Reach(Table(array("I", [0, 0, 1, 0])))
    # What the parent reaches once, is reached at most once.
    assert len(Reach(Table(array("I", [0, 0, 1, 0, 3, 4096, 7, 1])), reach)) == 2
    with pytest.raises(ValueError, match="parent"):
        Reach(Table(array("I", 2 * [0, 0, 1, 0])), reach)
    # One that says of itself that more is below than there is, is not taken.
    wrong = Reach(Table(array("I", [2, 8192, 7, 5])))
    wrong.index(3)
    assert wrong.find(2, 8192, 7) is None


def test_what_a_base_names_beyond_the_pages_of_the_store_takes_no_memory() -> None:
    lived, _, _ = a_base()
    meta = lived.db.engine.state.version.tree.meta
    far = Reach(Table(array("I", [1 << 24, 4096, 7, 1])))
    file = lived.disk.open_directory("/s").open("data")
    tracemalloc.start()
    assert len(walked(Pager(file, 0), meta, far, lambda: None)) > 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_the_same_for_tasks(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            await db.put(b"k", b"v")
            told: list[tuple[int, int]] = []
            report = await db.backup(tmp_path / "b", history=True, progress=lambda *each: told.append(each))
            assert report.position == db.position
            assert (await db.backup(tmp_path / "b", base="full")).made == ()

    asyncio.run(main())
    kvwal.restore(tmp_path / "b", tmp_path / "r")
    with kvwal.open(tmp_path / "r") as db:
        assert dict(db.items()) == {b"k": b"v"}


def test_an_empty_store_is_backed_up_and_restored() -> None:
    lived = Lived(2)
    assert backup(lived.db.engine, lived.destination).pages == 0
    restored(lived).close()
