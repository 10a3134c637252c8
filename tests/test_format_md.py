"""docs/format.md is enough to read a store: a reader that knows nothing else finds what kvwal wrote.

The layouts are taken from the document's tables, and nothing of `kvwal.log` or `kvwal.pages` is used.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c

import kvwal

FORMAT = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
PAGE = 4096


@cache
def layout(title: str) -> tuple[list[tuple[int, int, str, bool]], int]:
    """Offset, size, name and whether it is a number, of each field of the first table below a heading; its size."""
    text = FORMAT.split(f"\n### {title}\n")[1].split("\n### ")[0]
    table = re.search(r"<!-- .* -->\n((?:\|.*\n)+)", text)
    assert table is not None
    fields = []
    for line in table[1].splitlines()[2:]:
        at, kind, name, _ = (cell.strip() for cell in line.strip("|").split("|", 3))
        size = SIZES.get(kind) or int(kind.split()[0])
        fields.append((int(at), size, name, kind in SIZES))
    return fields, fields[-1][0] + fields[-1][1]


def read(title: str, data: bytes, at: int = 0) -> dict[str, Any]:
    """The fields of a structure; of a name that occurs several times (a free list's page, crc, length), a list."""
    found: dict[str, Any] = {}
    for offset, size, name, is_number in layout(title)[0]:
        raw = data[at + offset : at + offset + size]
        value = int.from_bytes(raw, "little") if is_number else raw
        if name in found:
            found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), value]
        else:
            found[name] = value
    return found


# The pages.


class Pages:
    """The page file, read by the document."""

    def __init__(self, path: Path) -> None:
        self.data = (path / "data").read_bytes()
        slots = [read("Meta", self.data, slot * PAGE) for slot in (0, 1) if self._is_valid(slot)]
        self.meta = max(slots, key=lambda meta: meta["generation"])

    def _is_valid(self, slot: int) -> bool:
        raw = self.data[slot * PAGE : (slot + 1) * PAGE]
        size = int.from_bytes(raw[10:12], "little")
        meta = read("Meta", raw)
        return (
            meta["magic"] == b"kvwpages" and meta["crc"] == crc32c(raw[: size - 4]) and meta["generation"] % 2 == slot
        )

    def entries(self, pointer: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Every key and value below a pointer."""
        to = read("Pointer", pointer)
        if not to["page"]:
            return
        raw = self.data[to["page"] * PAGE : (to["page"] + to["pages"]) * PAGE]
        assert crc32c(raw, to["page"]) == to["crc"]
        node = read("Node", raw)
        at = layout("Node")[1]
        n_keys = node["n"] if node["kind"] == 1 else node["n"] - 1
        keys, at = self._column(raw, node["key column"], at, node["keys"], node["values"], n_keys)
        values, at = self._column(raw, node["value column"], at, node["values"], node["end"], node["n"])
        references = struct.unpack_from(f"<{node['m']}I", raw, node["end"])
        assert not raw[node["end"] + 4 * node["m"] :].strip(b"\0")
        count = 0
        if node["kind"] == 2:
            for number, child in enumerate(values):
                for key, value in self.entries(child):
                    assert number == 0 or keys[number - 1] <= key
                    assert number == n_keys or key < keys[number]
                    yield key, value
                    count += 1
        else:
            for number, (key, value) in enumerate(zip(keys, values, strict=True)):
                yield key, self._overflow(value) if number in references else value
                count += 1
        assert count == to["count"]

    @staticmethod
    def _column(raw: bytes, width: int, at: int, begin: int, end: int, n: int) -> tuple[list[bytes], int]:
        if width:
            bounds = struct.unpack_from(f"<{n + 1}{'H' if width == 2 else 'I'}", raw, at)
            at += (n + 1) * width
        else:
            bounds = tuple(range(begin, end + 1, (end - begin) // n)) if n and end > begin else (begin,) * (n + 1)
        return [raw[a:b] for a, b in pairwise(bounds)], at

    def _overflow(self, reference: bytes) -> bytes:
        to = read("Overflow reference", reference)
        value = self.data[to["page"] * PAGE : to["page"] * PAGE + to["length"]]
        assert crc32c(value, to["page"]) == to["crc"]
        return value

    def free(self) -> list[tuple[int, int]]:
        """The extents of the free list."""
        page, crc, pages = self.meta["free list"]
        if not page:
            return []
        raw = self.data[page * PAGE : (page + pages) * PAGE]
        assert crc32c(raw, page) == crc
        (groups,) = struct.unpack_from("<I", raw)
        n = sum(struct.unpack_from("<QI", raw, 4 + 12 * group)[1] for group in range(groups))
        at = 4 + 12 * groups
        numbers = struct.unpack_from(f"<{2 * n}I", raw, at)
        return list(zip(numbers[:n], numbers[n:], strict=True))


# The log.


def commits(path: Path) -> Iterator[tuple[dict[str, Any], list[tuple[int, int, bytes, bytes]]]]:
    """Every commit in the log: its record's header, and its intents as operation, table, key, value."""
    last = None
    for file in sorted(path.glob("*.log")):
        raw = file.read_bytes()
        header = read("Segment", raw)
        last = header["first seqno"] - 1 if last is None else last
        assert header["magic"] == b"kvwallog"
        assert header["crc"] == crc32c(raw[: header["size"] - 4])
        assert file.name == f"{header['first seqno']:020d}.log"
        at = PAGE
        while raw[at : at + 4] == header["marker"].to_bytes(4, "little"):
            record = read("Record", raw, at)
            body_at = at + layout("Record")[1]
            end = body_at + record["body length"]
            if record["crc"] != crc32c(raw[at + 8 : end], (header["salt"] + at) % (1 << 32)):
                break
            if record["kind"] & 0xFF == 1 and record["seqno"] > last:
                last += 1
                assert record["seqno"] == last
                yield record, intents(raw[body_at:end], record["kind"])
            at = end


def intents(body: bytes, kind: int) -> list[tuple[int, int, bytes, bytes]]:
    at = 2 + int.from_bytes(body[:2], "little") if kind & 1 << 8 else 0
    (n,) = struct.unpack_from("<I", body, at)
    columns = f"<{n}B{n}H{n}I" + (f"{n}I" if kind & 1 << 9 else "")
    numbers = struct.unpack_from(columns, body, at + 4)
    operations, key_lengths, value_lengths = numbers[:n], numbers[n : 2 * n], numbers[2 * n : 3 * n]
    tables = numbers[3 * n :] or (0,) * n
    at += 4 + struct.calcsize(columns)
    cuts = list(accumulate((*key_lengths, *value_lengths), initial=at))
    assert cuts[-1] == len(body)
    items = [body[a:b] for a, b in pairwise(cuts)]
    return list(zip(operations, tables, items[:n], items[n:], strict=True))


# What kvwal wrote.


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[bytes, bytes]]:
    """A store with a tree of two levels, large values, a free list, and commits that are in the log alone."""
    path = tmp_path / "read.kv"
    with kvwal.open(str(path), segment_bytes=1 << 16, background=False) as db:
        for number in range(300):
            db[b"key:%05d" % number] = b"value " * (number % 90)
        db[b"large"] = bytes(range(256)) * 100
        db.checkpoint()
        db.delete_range(b"key:00100", b"key:00150")
        db[b""] = b""
        db.checkpoint()
        db[b"wide" * 50] = b"x" * 2000
        with db.batch() as batch:
            batch.delete_range(b"key:00290", None)
            batch.put(b"key:00299", b"again")
            batch.delete(b"key:00000")
        content = dict(db.scan())
        assert db.verify().ok
    return path, content


def test_the_tree_and_the_log_behind_it_give_what_was_written(written: tuple[Path, dict[bytes, bytes]]) -> None:
    path, content = written
    pages = Pages(path)
    found = dict(pages.entries(pages.meta["root"]))
    for record, changes in commits(path):
        assert record["watermark"] < record["seqno"]
        if record["seqno"] <= pages.meta["seqno"]:
            continue
        for operation, table, key, value in changes:
            assert table == 0
            if operation == 1:
                found[key] = value
            elif operation == 2:
                found.pop(key, None)
            else:
                stop = value if operation == 3 else None
                found = {k: v for k, v in found.items() if not (key <= k and (stop is None or k < stop))}
    assert found == content


def test_the_meta_says_from_where_on_the_log_is_needed(written: tuple[Path, dict[bytes, bytes]]) -> None:
    path, _ = written
    pages = Pages(path)
    assert pages.meta["page size"] == PAGE
    assert pages.meta["replay through"] >= pages.meta["seqno"]
    assert not any(pages.meta["-"][1])
    assert len(pages.data) >= pages.meta["page count"] * PAGE
    ends = [record["seqno"] for record, _ in commits(path)]
    assert ends[0] <= pages.meta["seqno"] + 1 <= ends[-1] + 1


def test_the_free_list_names_every_page_that_the_tree_does_not_reach(written: tuple[Path, dict[bytes, bytes]]) -> None:
    path, _ = written
    pages = Pages(path)
    reached = [0, 1]

    def walk(pointer: bytes) -> None:
        to = read("Pointer", pointer)
        if not to["page"]:
            return
        reached.extend(range(to["page"], to["page"] + to["pages"]))
        raw = pages.data[to["page"] * PAGE : (to["page"] + to["pages"]) * PAGE]
        node = read("Node", raw)
        values = [raw[at : at + 20] for at in range(node["values"], node["end"], 20)]
        if node["kind"] == 2:
            for child in values:
                walk(child)
        elif node["m"]:
            keys_bounds = (node["n"] + 1) * node["key column"]
            at = layout("Node")[1] + keys_bounds
            cells, _ = pages._column(raw, node["value column"], at, node["values"], node["end"], node["n"])
            for number in struct.unpack_from(f"<{node['m']}I", raw, node["end"]):
                large = read("Overflow reference", cells[number])
                reached.extend(range(large["page"], large["page"] + -(-large["length"] // PAGE)))

    walk(pages.meta["root"])
    page, _, length = pages.meta["free list"]
    reached.extend(range(page, page + length) if page else ())
    free = [number for first, count in pages.free() for number in range(first, first + count)]
    assert sorted(reached + free) == list(range(pages.meta["page count"]))
