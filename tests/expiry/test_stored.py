"""What is on disk of values that expire: bytes, what is refused, and what `verify` and `salvage` say of it."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from click.testing import CliRunner
from store_fixtures import TINY, commit_rows, problems_of

import kvwal
from kvwal.__main__ import whole_app
from kvwal.engine.expiry import queue_row
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import EncodedBatch
from kvwal.errors import CodecError
from kvwal.expiring import Expiring
from kvwal.features import EXPIRY
from kvwal.keys import SYSTEM_TABLE
from kvwal.log.columns import Columns, decode_intents, pieces
from kvwal.log.intents import TABLES, encode_intents
from kvwal.pages.node import (
    EXPIRING_LEAF,
    HAS_EXPIRING,
    OVERFLOW_REF,
    PAGE_SIZE,
    POINTER,
    ExpiringRef,
    OverflowRef,
    decode_leaf,
    encode_leaf,
    find_in_leaf,
    node_fault,
)
from kvwal.pages.writer import TreeBuilder
from kvwal.testing import SimulatedDisk

VALUE = Expiring.of(b"v", 7)


def test_a_value_that_expires_begins_with_its_time() -> None:
    assert bytes(VALUE) == b"\x07\0\0\0\0\0\0\0v"
    assert (VALUE.expires_us, VALUE.value, type(VALUE.value)) == (7, b"v", bytes)


def test_a_put_with_expiry_has_these_bytes_and_comes_with_its_row() -> None:
    batch = kvwal.WriteBatch()
    batch.put_until(b"k", b"v", 7)
    encoded = EncodedBatch(batch)
    (body,) = encoded.body
    row = b"\x08" + (7).to_bytes(8, "big") + bytes(4) + b"k"
    lengths = struct.pack("<2H2I2I", 1, len(row), 9, 0, 0, 1)
    assert bytes(body) == b"\x02\0\0\0\x05\x01" + lengths + b"k" + row + bytes(VALUE)
    assert encoded.body.bits == TABLES
    assert encoded.body.features & EXPIRY
    read = decode_intents(bytes(body), TABLES)
    assert read.writes == {b"k": VALUE}
    assert type(read.writes[b"k"]) is Expiring
    assert read.table(SYSTEM_TABLE).writes == {row: b""}
    # What was read is encoded as it was.
    assert b"".join(map(bytes, encode_intents(read))) == bytes(body)
    assert batch.others is None, "the batch of the caller was changed"


def body_of(ops: bytes, keys: list[bytes], values: list[bytes], tables: list[int]) -> bytes:
    n = len(ops)
    lengths = struct.pack(f"<{n}H{n}I{n}I", *map(len, keys), *map(len, values), *tables)
    return struct.pack("<I", n) + ops + lengths + b"".join(keys) + b"".join(values)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (body_of(b"\x05\x01", [b"k", b"r"], [bytes(8), b""], [0, 16]), "does not queue it"),
        (body_of(b"\x05\x01", [b"k", b"r"], [bytes(7), b""], [0, 1]), "has no time"),
    ],
)
def test_a_put_with_expiry_that_breaks_a_condition_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Columns(body, TABLES)
    with pytest.raises(ValueError, match=reason):
        list(pieces(body, TABLES, 1))


def test_the_limit_of_a_value_holds_without_its_time() -> None:
    limit = 1 << 30
    head = struct.pack("<I2s2H2I2I", 2, b"\x05\x01", 0, 0, limit + 9, 0, 0, 1)
    with pytest.raises(ValueError, match="longer than the limit"):
        Columns(head, TABLES)
    head = struct.pack("<I2s2H2I2I", 2, b"\x05\x01", 0, 0, limit + 8, 0, 0, 1)
    with pytest.raises(ValueError, match="do not fill"):
        Columns(head, TABLES)


def test_a_leaf_with_values_that_expire_has_these_bytes() -> None:
    ref = ExpiringRef(OVERFLOW_REF.pack(9, 1, 5000, 6))
    keys, values = [b"a", b"b", b"c"], [b"x", VALUE, ref]
    raw = encode_leaf(keys, values, -1, -1, [2], 3, [1, 2])
    assert raw[0] == EXPIRING_LEAF
    assert node_fault(raw, 0) is None
    assert node_fault(raw, 1) is not None
    assert raw.endswith(struct.pack("<I", 2) + struct.pack("<3I", 2, 1, 2))
    assert decode_leaf(raw.ljust(4096, b"\0")) == (tuple(keys), tuple(values))
    for found in (decode_leaf(raw)[1], [find_in_leaf(raw, key) for key in keys]):
        assert [type(value) for value in found] == [bytes, Expiring, ExpiringRef]
    plain = encode_leaf(keys[:1], values[:1], -1, -1, [], 3)
    assert plain[0] == 1
    assert find_in_leaf(plain, b"a") == b"x"
    assert isinstance(ref, OverflowRef)


# -- a whole store -----------------------------------------------------------------------------


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


def opened(disk: SimulatedDisk) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, **TINY)


def test_the_feature_is_set_from_the_first_use_on_and_stays(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        db[b"k"] = b"v"
        db.checkpoint()
        assert not db.engine._pages.meta.required & EXPIRY
        db.put(b"e", b"v", expire_s=1)
        assert db.engine._log is not None
        assert db.engine._log.required & EXPIRY
        db.checkpoint()
        assert db.engine._pages.meta.required & EXPIRY
    with opened(disk) as db:
        assert db.engine.reads.moments.clock.in_use
        db.put(b"f", b"v", expire_s=1)
    with opened(disk) as db:
        # Known from the log alone, as well.
        assert db.engine.reads.moments.clock.in_use
        assert db.expires(b"f") is not None


def test_a_version_that_does_not_know_the_feature_is_told_by_the_first_meta_with_such_a_leaf(
    disk: SimulatedDisk,
) -> None:
    """Also where the log no longer says so: what is compacted, or kept in a table of its own."""
    with opened(disk) as db:
        table = db.table("t", bytes, bytes)
        table.put(b"k", b"v", expire_s=1000)
        db.checkpoint()
        db.compact()
        assert db.engine._pages.meta.required & EXPIRY


def test_the_feature_stays_as_long_as_the_log_needs_it(disk: SimulatedDisk) -> None:
    """No leaf has it, and the segment was made before."""
    db = opened(disk)
    db.table("t", bytes, bytes).put(b"k", b"v", expire_s=1000)
    db.table("t", bytes, bytes).delete(b"k")
    disk.kill()
    with opened(disk) as db:
        db.checkpoint()
        assert db.engine._pages.meta.required & EXPIRY


def test_what_expires_is_known_from_the_log_of_a_table_alone(disk: SimulatedDisk) -> None:
    db = opened(disk)
    db.table("t", bytes, bytes).put(b"k", b"v", expire_s=1)
    disk.kill()
    with opened(disk) as db:
        assert db.engine.reads.moments.clock.in_use
        disk.pass_time(1)
        assert db.engine.expirer.remove()


def test_a_frozen_memtable_is_judged_and_combined(disk: SimulatedDisk) -> None:
    """As while a checkpoint is under way, or has met a full disk."""
    with opened(disk) as db:
        db.put(b"k", b"v", expire_s=1)
        db[b"other"] = b"v"
        db.engine._succession.freeze()
        disk.pass_time(1)
        assert (list(db), len(db), db.get(b"k")) == ([b"other"], 1, None)
        del db[b"other"]
        db.engine.queue.run(db.engine._succession.combine)
        assert (list(db), len(db), db.first()) == ([], 0, None)
        db.checkpoint()
        assert (list(db), len(db)) == ([], 0)
        assert problems_of(db) == []


class Pages:
    """Takes nodes, and writes none."""

    generation = 1

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def node(self, data: bytes, flags: int, count: int) -> bytes:
        self.sizes.append(len(data))
        return POINTER.pack(9, 1, 2, flags, count)

    def flush(self) -> None:
        pass


def test_a_leaf_that_is_just_full_takes_no_third_page() -> None:
    for spare in range(40):
        pages = Pages()
        builder = TreeBuilder(pages, lambda: None)  # type: ignore[arg-type]  # it wants no more of them
        keys = [b"%03d" % i + b"k" * (i % 2) for i in range(60)]
        values: list[bytes] = [Expiring.of(b"v" * (118 + i % 2), 7) for i in range(60)]
        values[-1] = Expiring.of(b"v" * (118 + spare), 7)
        builder.push(keys, values, HAS_EXPIRING)
        builder.finish()
        assert max(pages.sizes) <= 2 * PAGE_SIZE


def unqueue(db: kvwal.Store, key: bytes) -> None:
    """Break the rule that what expires is queued."""
    batch = kvwal.WriteBatch()
    for row in db.engine.expirer.rows():
        if row.key == key:
            batch.table(SYSTEM_TABLE).delete(queue_row(*row)[0])
    db.engine.commit(CommitRequest(EncodedBatch(batch), sync=True))


def test_verify_names_what_expires_and_is_not_queued(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        db.put(b"k", b"v", expire_s=10)
        db.put(b"l", b"v", expire_s=10)
        db.checkpoint()
        assert problems_of(db) == []
        unqueue(db, b"k")
        db.checkpoint()
        (problem,) = problems_of(db)
        assert "b'k' of table 0 expires, and is not queued" in problem


def test_verify_names_a_commit_and_a_row_that_break_the_rules(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        db.checkpoint()
        batch = kvwal.WriteBatch()
        # As what was read of a log is: it is not queued anew.
        batch.writes[b"k"] = VALUE
        batch.queue = {}
        batch.table(SYSTEM_TABLE).put(b"\x08short", b"")
        db.engine.commit(CommitRequest(EncodedBatch(batch), sync=True))
        assert any("expires, and is not queued" in problem for problem in problems_of(db))
        db.checkpoint()
        assert any("of the expiry queue is not valid" in problem for problem in problems_of(db))


def test_salvage_keeps_times_and_queue(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        db.put(b"tree", b"v" * 3000, expire_s=100)
        db.table("t", bytes, bytes).put(b"typed", b"v", expire_s=100)
        db.checkpoint()
        db.put(b"log", b"v", expire_s=100)
        db.put(b"gone", b"v", expire_s=1)
        ends = {key: db.expires(key) for key in (b"tree", b"log")}
    disk.pass_time(1)
    kvwal.salvage("/kv", "/saved", files=disk)
    with kvwal.open("/saved", files=disk, background=False) as db:
        assert {key: db.expires(key) for key in (b"tree", b"log")} == ends
        assert list(db) == [b"log", b"tree"]
        assert list(db.table("t", bytes, bytes)) == [b"typed"]
        assert problems_of(db) == []
        disk.pass_time(100)
        assert list(db) == []
        while db.engine.expirer.remove():
            pass
        db.checkpoint()
        assert db.stats().expiry_rows == 0
        assert problems_of(db) == []


def test_a_table_remembers_its_default_and_takes_another_one_over(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        users = db.table("users", str, str, expire_s=10)
        users["a"] = "1"
        db.rename_table("users", "people")
    with opened(disk) as db:
        people = db.table("people", str, str)
        people["b"] = "2"
        first, second = people.expires("a"), people.expires("b")
        assert first is not None
        assert second is not None
        assert first < second
        longer = db.table("people", str, str, expire_s=1000)
        assert longer.expires("a") == first
        longer["c"] = "3"
        people["d"] = "4"
        assert people.expires("d") is not None
        assert people.expires("d") > people.expires("c") > second
        forever = db.table("people", str, str, expire_s=float("inf"))
        forever["e"] = "5"
        people.update({"f": "6"})
        assert people.expires("e") is people.expires("f") is None
    with pytest.raises(ValueError, match="0 seconds"):
        opened(disk).table("people", str, str, expire_s=0)


@pytest.mark.parametrize("wrong", [b'"x"', b"-1", b"1.5", b"true", b"%d" % (1 << 63)])
def test_a_default_expiry_that_is_none_is_damage(disk: SimulatedDisk, wrong: bytes) -> None:
    with opened(disk) as db:
        users = db.table("users", str, str)
        users["a"] = "1"
        row = b'{"expire_us":%b,"id":16,"key":["str",1],"v":1,"value":["str",1]}' % wrong
        batch = kvwal.WriteBatch()
        batch.table(SYSTEM_TABLE).put(b"\x01users", row)
        commit_rows(db, batch)
        with pytest.raises(kvwal.CorruptionError):
            db.table("users", str, str)


def test_values_that_cannot_be_decoded_expire_as_well(disk: SimulatedDisk) -> None:
    with opened(disk) as db:
        db.table("t", str, bytes).put("k", b"\xff", expire_s=1)
        db.drop_table("t")
        numbers = db.table("n", str, int)
        with pytest.raises((TypeError, CodecError)):
            numbers.put("k", "x", expire_s=1)  # type: ignore[arg-type]  # it is refused


# -- the command line --------------------------------------------------------------------------


def run(*arguments: str, stdin: bytes | None = None, expect: int = 0) -> str:
    result = CliRunner().invoke(whole_app(), list(arguments), input=stdin)
    assert result.exit_code == expect, (result.output, result.exception)
    return result.output


def test_the_commands_put_show_dump_and_load_what_expires(tmp_path: Any) -> None:
    path, copy = str(tmp_path / "kv"), str(tmp_path / "copy")
    run("put", path, "k", "v", "--expire", "1000")
    run("put", path, "stays", "w")
    with kvwal.open(path) as db:
        ends = db.expires(b"k")
        db.table("t", str, str)["a"] = "1"
    run("put", path, "b", "2", "--table", "t", "--expire", "1000")
    assert run("get", path, "k") == "v"
    assert '"expires_us"' in run("log", path, "--json")
    assert ", until " in run("log", path)
    assert '"expiry_rows": 2' in run("stats", path, "--json").replace('":', '": ').replace(":  ", ": ")
    lines = run("dump", path)
    assert lines.count("expires_us") == 2
    run("load", copy, stdin=lines.encode())
    with kvwal.open(copy) as db:
        assert db.table("t", str, str).expires("a") is None
        assert db.table("t", str, str).expires("b") is not None
        assert (db.expires(b"k"), db.expires(b"stays"), dict(db.scan())) == (ends, None, {b"k": b"v", b"stays": b"w"})
    for wrong in ("0", "-1", "nan", "inf"):
        said = run("put", path, "k", "v", "--expire", wrong, expect=2)
        assert f"{float(wrong)} is no finite number of seconds above 0" in " ".join(said.split())
        with kvwal.open(path) as db, pytest.raises(ValueError, match="seconds"):
            db.put(b"k", b"v", expire_s=float(wrong))
    run("put", path, "long", "v", "--expire", "1e300")
    with kvwal.open(path) as db:
        db.put(b"as long", b"v", expire_s=1e300)
        assert db.expires(b"long") == db.expires(b"as long")
    run("load", copy, stdin=b'{"key":"k","value":"v","expires_us":-1}', expect=7)
