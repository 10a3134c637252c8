"""A put alone into a table takes a short way, as one into table 0 does: it does the same as the general way."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from group_fixtures import as_one_group
from log_rig import LogRig, simulated_disk
from store_fixtures import TINY, check_store, interrupted_at, problems_of

import kvwal
from kvwal.batch import WriteBatch
from kvwal.codecs import value_codec
from kvwal.engine.publish import Publisher
from kvwal.errors import TableNotFoundError
from kvwal.features import KEYSPACES
from kvwal.log import encode_intents, encode_put
from kvwal.log.intents import TABLES
from kvwal.log.record import COMMIT
from kvwal.testing import SimulatedDisk


def opened(disk: SimulatedDisk | None = None, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk or SimulatedDisk(), background=False, durability="os", **options)


def test_its_record_is_that_of_a_batch() -> None:
    for table in (1, 15, 16, (1 << 31) - 1, 1 << 31):
        batch = WriteBatch()
        batch.table(table).put(b"key", b"value")
        general, short = encode_intents(batch), encode_put(b"key", b"value", table)
        # Of a table each is a `Body`.
        assert (b"".join(general), general.bits) == (b"".join(short), short.bits)  # type: ignore[attr-defined]


@pytest.mark.parametrize("follows", [False, True])
def test_the_log_reads_it_back_and_says_that_a_reader_must_know_tables(follows: bool) -> None:
    disk = SimulatedDisk()
    with opened(disk, **{**TINY, "keep_history_bytes": 1 << 20}) as db:
        table = db.table("t", str, int)
        table["first"] = 0
        after = db.last_seqno
        if follows:
            feed = db.changes(after, follow=True)
        for number in range(200):
            table.put(str(number % 50), number)
        db.sync()
        assert db.engine._log.required & KEYSPACES
        if follows:
            told = [next(feed) for _ in range(200)]
            feed.close()
        else:
            told = list(db.changes(after))
        encode = value_codec(int).encode
        assert [(change.table, change.key, change.value) for change in told] == [
            (table.id, str(number % 50).encode(), encode(number)) for number in range(200)
        ]
        assert problems_of(db) == []
        db.engine.abandon()
    with opened(disk, **{**TINY, "keep_history_bytes": 1 << 20}) as db:
        assert dict(db.table("t", str, int)) == {
            "first": 0,
            **{str(number % 50): number for number in range(150, 200)},
        }
        assert problems_of(db) == []


def test_the_next_segment_says_so_when_nothing_said_it_before() -> None:
    rig = LogRig(simulated_disk(), "/log")
    log = rig.create()
    log.append_put(b"k", b"v")
    assert log.required == 0
    log.append_put(b"k", b"v", 16)
    assert log.required == KEYSPACES
    log.append([encode_put(b"k", b"v", 16)])
    log.sync()
    log.abandon()
    one, first, second = rig.salvage()[0]
    body = b"".join(encode_put(b"k", b"v", 16))  # type: ignore[arg-type]  # of a table it is in chunks
    assert [record.kind for record in (one, first, second)] == [COMMIT, COMMIT | TABLES, COMMIT | TABLES]
    assert first.body == second.body == body


def test_what_it_would_pass_over_is_seen_to_once_the_reader_is_gone() -> None:
    with opened() as db:
        table = db.table("t", str, int)
        table["a"] = 1
        part = db.engine.state.version.memtable.parts.of(table.id or 0)
        with db.snapshot() as snapshot:
            table["a"] = 2
            assert part.older
            assert table.within(snapshot)["a"] == 1
        # From here on table 0 has nothing to see to.
        db[b"k"] = b""
        assert db.engine.state.plain
        table["b"] = 3
        assert not part.older
        check_store(db)


def test_a_count_learns_of_a_key_that_is_there_again() -> None:
    with opened() as db:
        table = db.table("t", str, int)
        table.update({"a": 1, "b": 2})
        del table["a"]
        assert len(table) == 1
        db[b"k"] = b""
        assert db.engine.state.plain
        table["a"] = 3
        assert len(table) == 2
        check_store(db)


@pytest.mark.parametrize("seed", range(20))
def test_it_leaves_what_the_general_way_leaves(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With readers, deleted ranges, counts and checkpoints between."""
    rng = Random(seed)
    allowed = rng.sample(range(7), 1 + seed % 7)
    stores = [opened(), opened()]
    tables = [db.table("t", str, int) for db in stores]
    snapshots: list[list[kvwal.Snapshot]] = [[], []]
    short = Publisher._publish_put_into

    def general(self: Publisher, table: int, seqno: Any, key: bytes, value: bytes, size: int) -> None:
        if self is stores[0].engine.queue._publisher:
            short(self, table, seqno, key, value, size)
            return
        batch = WriteBatch()
        batch.table(table).put(key, value)
        self.publish(seqno, batch, len(key) + len(value))

    monkeypatch.setattr(Publisher, "_publish_put_into", general)
    for number in range(120):
        step, key = rng.choice([*allowed, *range(7, 20)]), str(rng.randrange(8))
        for db, table, held in zip(stores, tables, snapshots, strict=True):
            if step == 0:
                held.append(db.snapshot())
            elif step == 1 and held:
                held.pop(0).close()
            elif step == 2:
                table.delete_range(key, None)
            elif step == 3:
                table.delete(key)
            elif step == 4:
                len(table)
            elif step == 5 and number % 3 == 0:
                db.checkpoint()
            elif step == 6:
                db.put(key.encode(), b"")
            else:
                table.put(key, number)
        if number % 40 == 0:
            assert dict(tables[0]) == dict(tables[1])
            assert stores[0].last_seqno == stores[1].last_seqno
        for one, other in zip(*snapshots, strict=True):
            assert list(tables[0].within(one).items()) == list(tables[1].within(other).items())
    states = [db.engine.state for db in stores]
    memtables = [state.version.memtable for state in states]
    parts = [dict(memtable.parts.written()) for memtable in memtables]
    assert parts[0].keys() == parts[1].keys()
    for one, other in [(memtables[0], memtables[1]), *((parts[0][table], parts[1][table]) for table in parts[0])]:
        for name in ("latest", "bytes_used", "last_seqno", "_written_at"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.older._by_key == other.older._by_key
    assert len(states[0].cache.rows) == len(states[1].cache.rows)
    assert states[0].cache.bytes_used == states[1].cache.bytes_used
    for db, held in zip(stores, snapshots, strict=True):
        for snapshot in held:
            snapshot.close()
        check_store(db)
        db.close()


@pytest.mark.parametrize("with_reader", [False, True])
def test_an_interruption_anywhere_leaves_it_written_with_a_note_or_not(with_reader: bool) -> None:
    step, interrupted = 0, True
    while interrupted:
        step += 1
        with opened() as db:
            table = db.table("t", str, int)
            table["a"] = 1
            reader = db.snapshot() if with_reader else None
            found = interrupted_at(step, lambda: table.put("n", 5))
            interrupted = found is not None
            written = not interrupted or "was written" in str(getattr(found, "__notes__", ""))
            # As it returns, behind the short way, no note is left to make.
            assert dict(table) in ([] if written else [{"a": 1}]) + [{"a": 1, "n": 5}], step
            table["after"] = 2
            assert table["after"] == 2
            if reader is not None:
                assert dict(table.within(reader)) == {"a": 1}
                reader.close()
            check_store(db)
            assert problems_of(db) == []
    assert step > 20


def test_one_that_went_by_old_names_is_refused_and_goes_by_name() -> None:
    with opened() as db:
        table, same = db.table("t", str, int), db.table("t", str, int)
        table["a"] = 1
        engine, first = db.engine, table.id
        found = table._stored.to_write()
        assert found is not None
        db.drop_table("t")
        with pytest.raises(TableNotFoundError):
            engine.queue.put(b"a", b"1", False, first, found.names)  # type: ignore[arg-type]  # the table is there
        check_store(db)
        same["b"] = 2
        assert same.id != first
        assert dict(table) == {"b": 2}
        db.rename_table("t", "u")
        table["c"] = 3
        assert (dict(table), dict(db.table("u", str, int))) == ({"c": 3}, {"b": 2})


def test_one_behind_a_drop_in_its_group_goes_to_the_new_table() -> None:
    with opened() as db:
        table = db.table("t", str, int)
        table["a"] = 1
        first = table.id
        as_one_group(
            db,
            [
                lambda: table.put("b", 2),
                lambda: table.put("c", 3),
                lambda: db.drop_table("t"),
                lambda: table.put("d", 4),
                lambda: db.put(b"k", b"v"),
                lambda: table.put("e", 5),
            ],
        )
        assert dict(table) == {"d": 4, "e": 5}
        assert table.id != first
        assert db[b"k"] == b"v"
        check_store(db)
        assert problems_of(db) == []


def test_on_a_full_disk_it_is_refused_and_goes_on_once_there_is_space() -> None:
    disk = SimulatedDisk()
    with opened(disk) as db:
        table = db.table("t", str, bytes)
        table["a"] = b"1"
        disk.capacity = disk.used_bytes() + 100_000
        for _ in range(2):
            with pytest.raises(kvwal.DiskFullError):
                table["big"] = bytes(3_000_000)
        assert dict(table) == {"a": b"1"}
        disk.capacity = None
        table["big"] = bytes(3_000_000)
        assert set(table) == {"a", "big"}
        check_store(db)
