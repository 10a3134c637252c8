"""However large a file is that has the name of an object, no more of it is read than the object can have."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

import kvwal
from kvwal.backup import state
from kvwal.backup.fetching import FIRST_BYTES, fetch_header, fetch_stored, fetch_unit
from kvwal.backup.lines import line_name, origin_of
from kvwal.backup.names import IDENTITY, UnitName
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.units import HEADER_BYTES, UnitCommit, encode_unit, line_digest
from kvwal.errors import CorruptionError
from kvwal.keys import Seqno

STORE, LINE = bytes(range(16)), b"\xaa" * 8
NAME = UnitName(LINE, 0, Seqno(0), Seqno(1), 0)
# More than any memory; a file system keeps it as a hole.
HUGE = 1 << 41


class Counting(DirectoryDestination):
    """Counts the requests, and the bytes that came."""

    requests = came = 0

    def get(self, name: str, **where: Any) -> bytes:
        data = super().get(name, **where)
        self.requests, self.came = self.requests + 1, self.came + len(data)
        return data


@pytest.fixture
def place(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


def unit_of(size: int) -> bytes:
    commit = UnitCommit(1, Seqno(1), 1000, random.Random(size).randbytes(size))
    return encode_unit(STORE, LINE, Seqno(0), line_digest(STORE, LINE), [commit])


def grow(place: DirectoryDestination, name: str) -> None:
    (path,) = [each for each in Path(place.path).rglob("*") if f"/{each.name}".startswith(f"/{name.split('/')[-1]}")]
    os.truncate(path, HUGE)


def test_a_unit_of_usual_size_comes_by_one_request(place: Counting) -> None:
    data = unit_of(FIRST_BYTES - 1000)
    place.put_new(str(NAME), data)
    assert fetch_stored(place, NAME) == data
    assert place.requests == 1
    assert fetch_unit(place, str(NAME)).header == fetch_header(place, NAME)
    assert place.came == 2 * len(data) + HEADER_BYTES


@pytest.mark.parametrize("size", [FIRST_BYTES - 300, FIRST_BYTES - 256, FIRST_BYTES, 20 << 20])
def test_a_large_one_comes_whole(place: Counting, size: int) -> None:
    data = unit_of(size)
    place.put_new(str(NAME), data)
    assert fetch_stored(place, NAME) == data
    assert place.requests <= 2
    (commit,) = fetch_unit(place, NAME).commits()
    assert len(commit.body) == size


def test_another_file_in_its_place_is_not_read_whole(place: Counting) -> None:
    place.put_new(str(NAME), b"x" * 1000)
    grow(place, str(NAME))
    with pytest.raises(CorruptionError, match="is no unit"):
        fetch_unit(place, NAME)
    assert place.came <= FIRST_BYTES


@pytest.mark.parametrize("size", [100, 12 << 20])
def test_what_is_behind_its_end_is_not_read(place: Counting, size: int) -> None:
    data = unit_of(size)
    place.put_new(str(NAME), data)
    grow(place, str(NAME))
    with pytest.raises(CorruptionError, match="behind its header, instead of"):
        fetch_unit(place, NAME)
    assert place.came <= max(len(data) + 1, FIRST_BYTES)


def test_a_header_that_promises_more_than_a_body_takes_is_damage(place: Counting) -> None:
    data = unit_of(100)
    data = data[:184] + struct.pack("<Q", HUGE) + data[192:]
    place.put_new(str(NAME), data[:252] + struct.pack("<I", crc32c(data[:252])) + data[256:])
    grow(place, str(NAME))
    with pytest.raises(CorruptionError, match="would be stored in 2199023255552 bytes"):
        fetch_unit(place, NAME)
    assert place.came <= FIRST_BYTES


def test_small_objects_have_a_limit(place: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_MOST_BYTES", 1 << 16)
    place.put_new(IDENTITY, state.dump({"store": STORE.hex(), "required": 0, "optional": 0}))
    place.put_new(line_name(LINE), state.dump({"parent": "bb" * 8, "fork": 1}))
    assert place.swap(state.MARK, None, state.dump({"epoch": 1}))
    assert (origin_of(place, LINE), state.read(place, state.MARK)[1]["epoch"]) is not None
    for name, read in (
        (IDENTITY, lambda: state.identity_of(place)),
        (line_name(LINE), lambda: origin_of(place, LINE)),
        (state.MARK, lambda: state.read(place, state.MARK)),
    ):
        read()
        grow(place, name)
        place.came = 0
        with pytest.raises(CorruptionError, match="has more than 65536 bytes"):
            read()
        assert place.came == (1 << 16) + 1
    assert not place.swap(state.MARK, state.dump({"epoch": 1}), b"")


def test_a_backup_of_which_a_unit_is_such_a_file_is_refused_by_its_name(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv", background=False) as db:
        db.backup(tmp_path / "b")
        db.put(b"k", b"v")
        db.backup(tmp_path / "b")
    *_, unit = sorted(each for each in (tmp_path / "b").rglob("*") if "/unit/" in str(each) and each.is_file())
    os.truncate(unit, HUGE)
    with pytest.raises(CorruptionError, match=unit.name):
        kvwal.restore(tmp_path / "b", tmp_path / "r")
    assert not (tmp_path / "r").exists()
