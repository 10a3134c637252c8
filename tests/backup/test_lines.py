"""The rows of lines in a store, and their objects in a destination."""

from __future__ import annotations

import json
from typing import Any

import pytest

import kvwal
from kvwal.backup.lines import Origin, ancestry, tell_line
from kvwal.backup.port import DirectoryDestination
from kvwal.engine.lines import LineRow, decode_line, encode_line, fork_of
from kvwal.testing import SimulatedDisk


def test_the_row_of_a_line() -> None:
    row = LineRow(b"12345678", b"87654321", kvwal.Seqno(9), "restore", 77)
    key, value = encode_line(row)
    assert decode_line(key, value) == row
    assert json.loads(value) == {"fork": 9, "parent": "ODc2NTQzMjE=", "v": 1, "wall_us": 77, "why": "restore"}
    assert decode_line(key, b'{"v":2}') is None
    known = row._replace(digest=bytes(range(32)))
    key, long_value = encode_line(known)
    assert decode_line(key, long_value) == known
    assert json.loads(long_value)["digest"] == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    for wrong in (None, 5, "", "AAEC", "A" * 44, "!" * 44, [1] * 32):
        members = {**json.loads(long_value), "digest": wrong}
        with pytest.raises(kvwal.CorruptionError, match="line"):
            decode_line(key, json.dumps(members).encode())
    for bad in (b"", b"{}", b"[]", value[:-3], value.replace(b":9", b":-1"), value.replace(b"ODc2", b"OD!2"), b"\xff"):
        with pytest.raises(kvwal.CorruptionError, match="line"):
            decode_line(key, bad)


def test_a_restore_that_went_back_behind_the_fork_before_has_only_that_in_common() -> None:
    first, second, third = b"line one", b"line two", b"line thr"
    rows = dict(
        encode_line(LineRow(line, parent, kvwal.Seqno(fork), "restore", 0))
        for line, parent, fork in ((second, first, 20), (third, second, 10))
    )

    class Rows:
        def read(self, key: bytes, *, table: int) -> bytes | None:
            assert table == 1
            return rows.get(key)

    reads: Any = Rows()
    assert [fork_of(reads, third, line) for line in (first, second, third)] == [10, 10, None]
    assert [fork_of(reads, second, line) for line in (first, third)] == [20, None]
    destination = DirectoryDestination("/b", files=SimulatedDisk())
    tell_line(destination, second, Origin(first, kvwal.Seqno(20)))
    tell_line(destination, third, Origin(second, kvwal.Seqno(10)))
    assert list(ancestry(destination, third)) == [(third, None), (second, 10), (first, 10)]
