"""Tables beside the default one: a commit over several is atomic, recovers, checkpoints, counts, verifies, salvages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pages_fixtures import table_ids
from store_fixtures import check_store, commit_rows, problems_of, readers_in, run_threads

import kvwal
from kvwal.batch import WriteBatch
from kvwal.engine.memtable import ENTRY_OVERHEAD_BYTES, deletes_something
from kvwal.engine.readers import Reader
from kvwal.engine.tables import NEXT_IDS_KEY, CodecName, TableRow, encode_ids, encode_row
from kvwal.features import KEYSPACES
from kvwal.keys import KeyRange
from kvwal.log.intents import is_of_users
from kvwal.testing import SimulatedDisk
from kvwal.testing.cuts import crash_every

TABLES = [0, 1, 16, 17, (1 << 32) - 1]
KEYS = [b"", b"\0", *(b"%02d" % number for number in range(20)), b"\xff"]

BYTES = CodecName("bytes", 1)

Model = dict[int, dict[bytes, bytes]]


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{"background": False, "durability": "os", **options})


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with opened(SimulatedDisk()) as store:
        yield store


def part_of(batch: WriteBatch, table: int) -> WriteBatch:
    return batch.table(table) if table else batch


def scanned(db: kvwal.Store, reader: Reader, table: int, *, reverse: bool = False) -> list[tuple[bytes, bytes]]:
    chunks = db.engine.reads.chunks(reader.again("scan"), None, None, reverse=reverse, table=table)
    return [pair for keys, values in chunks for pair in zip(keys, values, strict=True)]


def content(db: kvwal.Store, reader: Reader | None = None) -> Model:
    """Every table at a moment, by every way of reading."""
    own = reader is None
    if reader is None:
        reader = db.engine.reads.moments.reader("test")
    found: Model = {}
    for table in TABLES:
        pairs = scanned(db, reader, table)
        assert scanned(db, reader, table, reverse=True) == pairs[::-1]
        found[table] = dict(pairs)
        assert {key: db.engine.reads.read_at(reader, key, table=table) for key in KEYS} == {
            key: found[table].get(key) for key in KEYS
        }
        for start, stop in ((None, None), (b"03", None), (None, b"15"), (b"03", b"15"), (b"\0", b"\xff")):
            expected = sum((start or b"") <= key and (stop is None or key < stop) for key in found[table])
            assert db.engine.reads.count_at(reader, start, stop, table=table) == expected
            if own:
                assert db.engine.reads.count(start, stop, table=table) == expected
    if own:
        reader.release()
    return found


def random_batch(random: Random, model: Model) -> WriteBatch:
    """A batch over some tables; the model is brought up to date."""
    batch = WriteBatch()
    for table in random.sample(TABLES, random.choice([1, 1, 2, 3, 5])):
        part, live = part_of(batch, table), model[table]
        for _ in range(random.choice([0, 1, 1, 2])):
            low, high = random.choice(KEYS), random.choice([None, *KEYS])
            if random.random() < 0.3:
                part.delete_range(low, high)
                for key in [key for key in live if KeyRange(low, high).contains(key)]:
                    del live[key]
        for _ in range(random.randrange(6)):
            key = random.choice(KEYS)
            if random.random() < 0.3:
                part.delete(key)
                live.pop(key, None)
            else:
                live[key] = random.randbytes(random.choice([0, 1, 20, 3000]))
                part.put(key, live[key])
    return batch


def copied(model: Model) -> Model:
    return {table: dict(live) for table, live in model.items()}


@pytest.mark.parametrize("number", range(8))
def test_every_moment_of_every_table_is_as_in_a_model(rng: Random, number: int) -> None:
    disk = SimulatedDisk(seed=number)
    db = opened(disk, segment_bytes=1 << 16)
    model: Model = {table: {} for table in TABLES}
    readers: list[tuple[Reader, Model]] = []
    for _ in range(120):
        rare = ["hold", "hold", "let go", "freeze", "freeze", "combine", "checkpoint", "reopen", "crash", "look"]
        step = rng.choice(["commit"] * 8 + rare)
        state = db.engine.state
        if step == "commit":
            commit_rows(db, random_batch(rng, model))
        elif step == "hold":
            readers.append((db.engine.reads.moments.reader("test"), copied(model)))
        elif step == "let go" and readers:
            readers.pop(rng.randrange(len(readers)))[0].release()
        elif step == "freeze" and state.version.frozen is None:
            db.engine._succession.freeze()
        elif step == "combine" and state.version.frozen is not None:
            db.engine.queue.run(db.engine._succession.combine)
            assert content(db) == model
        elif step == "checkpoint":
            db.checkpoint()
            assert problems_of(db) == []
        elif step == "look":
            assert content(db) == model
            for reader, then in readers:
                assert content(db, reader) == then
        elif step in ("reopen", "crash"):
            for reader, _ in readers:
                reader.release()
            readers = []
            if step == "crash":
                db.sync()
                disk = disk.crash()
                db.close()
            else:
                db.close()
            db = opened(disk, segment_bytes=1 << 16)
            assert content(db) == model
        check_store(db)
    assert content(db) == model
    for reader, then in readers:
        assert content(db, reader) == then
        reader.release()
    db.checkpoint()
    assert content(db) == model
    assert problems_of(db) == []
    assert not readers_in(db.pins())
    db.close()


def test_a_power_cut_anywhere_leaves_each_commit_in_all_of_its_tables_or_in_none() -> None:
    def write(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk, durability="commit") as db:
            for number in range(8):
                batch = WriteBatch()
                for table in (0, 16, 17):
                    part = part_of(batch, table)
                    part.put(b"%d" % number, bytes(500))
                    if number == 5:
                        part.delete_range(b"0", b"3")
                db.commit(batch)
                acknowledged.append(number)
                if number in (2, 6):
                    db.checkpoint()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with opened(disk) as db:
            found = content(db)
            assert found[0] == found[16] == found[17]
            expected = set(acknowledged)
            if 5 in expected:
                expected -= {0, 1, 2}
            there = set(map(int, found[0]))
            # The one that was under way may be there.
            assert expected <= there or len(acknowledged) == 5
            assert there <= set(range(len(acknowledged) + 1))
            assert problems_of(db) == []
            db.checkpoint()
            assert content(db) == found
            assert problems_of(db) == []

    report = crash_every(write, check, states_per_point=4)
    assert report.states > 50


def test_readers_of_several_tables_see_each_commit_whole(db: kvwal.Store) -> None:
    ends: list[int] = []
    reads = db.engine.reads

    def write() -> None:
        for number in range(400):
            batch = WriteBatch()
            for table in (0, 16, 17):
                part_of(batch, table).put(b"k", b"%d" % number)
                part_of(batch, table).put(b"%d" % number, b"")
            db.commit(batch)
            if number % 100 == 50:
                db.checkpoint()
        ends.append(1)

    def read() -> None:
        while not ends:
            with_reader = reads.moments.reader("test")
            values = {reads.read_at(with_reader, b"k", table=table) for table in (17, 0, 16)}
            assert len(values) == 1
            numbers = {reads.count_at(with_reader, b"0", b":", table=table) for table in (0, 16, 17)}
            assert numbers == {0 if values == {None} else int(values.pop() or b"0") + 1}
            with_reader.release()
            # Without a moment in common, one that is read later is not older.
            first = reads.count(table=16)
            assert reads.count(table=17) >= first

    run_threads(write, read, read)


def test_memtables_that_are_combined_among_threads_show_whole_commits() -> None:
    ends: list[int] = []
    with opened(SimulatedDisk(), background=True) as db:
        state, engine = db.engine.state, db.engine
        checkpointer = engine._checkpointer
        assert checkpointer is not None

        def write() -> None:
            for number in range(500):
                batch = WriteBatch()
                for table in (0, 16):
                    part_of(batch, table).put(b"%03d" % number, b"%d" % number)
                    part_of(batch, table).put(b"last", b"%d" % number)
                    if number % 7 == 0:
                        part_of(batch, table).delete_range(b"%03d" % (number // 2), b"%03d" % (number // 2 + 5))
                db.commit(batch)
            ends.append(1)

        def combine() -> None:
            def step() -> None:
                if state.version.frozen is None:
                    db.engine._succession.freeze()
                elif deletes_something(state.version.memtable):
                    engine.queue.run(engine._succession.combine)

            while not ends:
                checkpointer.while_idle(step)
                if not state.seqno % 50:
                    db.checkpoint()

        def read() -> None:
            while not ends:
                reader = db.engine.reads.moments.reader("test")
                assert engine.reads.read_at(reader, b"last") == engine.reads.read_at(reader, b"last", table=16)
                assert scanned(db, reader, 0) == scanned(db, reader, 16)
                assert db.engine.reads.count_at(reader, None, None) == len(scanned(db, reader, 0))
                reader.release()

        run_threads(write, combine, read)
        assert content(db)[0] == content(db)[16]
        db.checkpoint()
        assert problems_of(db) == []


@pytest.mark.parametrize(("full", "dead"), [(16, 0), (0, 16)])
def test_what_a_scan_passes_over_in_one_table_is_there_in_another(db: kvwal.Store, full: int, dead: int) -> None:
    """A scan that met many tombstones is remembered, so that the next one begins behind them."""
    keys = [b"%04d" % number for number in range(2000)]
    batch = WriteBatch()
    for table in (full, dead):
        part_of(batch, table).update(dict.fromkeys(keys, b"x"))
    db.commit(batch)
    db.checkpoint()
    batch = WriteBatch()
    for key in keys:
        part_of(batch, dead).delete(key)
    db.commit(batch)
    reader = db.engine.reads.moments.reader("test")
    for _ in range(3):
        assert scanned(db, reader, dead) == []
        assert len(scanned(db, reader, full)) == len(keys)
    reader.release()


def test_all_memtables_of_a_store_have_one_lock_for_the_order_of_their_keys(db: kvwal.Store) -> None:
    """So a thread that is in a section of it is known, whichever version it scans: see `CommitQueue.refuse_reentry`."""
    state = db.engine.state
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.table(16).put(b"a", b"1")
    db.commit(batch)
    db.engine._succession.freeze()
    batch.table(17).delete_range()
    db.commit(batch)
    content(db)
    for combined in (False, True):
        if combined:
            db.engine.queue.run(db.engine._succession.combine)
        for memtable in (state.version.memtable, state.version.frozen):
            assert memtable is not None
            for each in (memtable, *(part for _, part in memtable.parts.written())):
                assert each.order.lock is state.locks()[1]


def test_a_table_is_deleted_and_made_again(db: kvwal.Store) -> None:
    for _ in range(3):
        batch = WriteBatch()
        batch.table(16).update({key: b"1" for key in KEYS})
        db.commit(batch)
        db.checkpoint()
        assert table_ids(db.engine._pages) == [16]
        batch = WriteBatch()
        batch.table(16).delete_range()
        db.commit(batch)
        assert content(db)[16] == {}
        db.checkpoint()
        assert table_ids(db.engine._pages) == []
        assert problems_of(db) == []


def test_the_default_table_pays_nothing_for_others(db: kvwal.Store) -> None:
    """Without other tables: no catalogue, no feature that a reader must know, no part."""
    db.update({b"a": b"1"})
    db.checkpoint()
    meta = db.engine._pages.meta
    assert (meta.catalogue_height, meta.required) == (0, 0)
    assert db.engine.state.version.memtable.parts._made == {}
    batch = WriteBatch()
    batch.table(16)
    batch.put(b"b", b"1")
    db.commit(batch)
    assert db.engine.state.version.memtable.parts._made == {}
    batch.table(16).put(b"b", b"1")
    db.commit(batch)
    db.checkpoint()
    assert db.engine._pages.meta.required == KEYSPACES
    with pytest.raises(KeyError):
        db[b"c"]
    assert dict(db) == {b"a": b"1", b"b": b"1"}


def test_the_meta_says_that_the_kept_log_has_tables_although_the_pages_have_none(db: kvwal.Store) -> None:
    batch = WriteBatch()
    batch.table(16).put(b"a", b"1")
    db.commit(batch)
    batch.table(16).delete_range()
    db.commit(batch)
    db.checkpoint()
    meta = db.engine._pages.meta
    assert (meta.catalogue_height, meta.required) == (0, KEYSPACES)


def test_two_memtables_are_combined_while_no_commit_is_under_way(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, succession, checkpointer = db.engine.state, db.engine._succession, db.engine._checkpointer
    assert checkpointer is not None
    combine, led = succession.combine, []

    def noted() -> None:
        led.append(db.engine.queue.lock._is_owned())
        combine()

    monkeypatch.setattr(succession, "combine", noted)
    db.update({key: bytes(1000) for key in KEYS})
    assert not checkpointer._combine()
    frozen = succession.freeze()
    assert frozen is not None
    before = frozen.bytes_used
    assert not checkpointer._combine()
    db[b"more"] = b"1"
    assert not checkpointer._combine(), "nothing was deleted"
    db.delete_range(b"05", None)
    assert checkpointer._combine()
    assert led == [True]
    combined = state.version.frozen
    assert combined is not None
    assert combined.bytes_used < before
    assert combined.bytes_used > 5 * 1000 + len(combined) * ENTRY_OVERHEAD_BYTES
    assert not state.version.memtable
    db.checkpoint()
    assert problems_of(db) == []


def test_what_other_tables_take_of_memory_counts(db: kvwal.Store) -> None:
    memtable = db.engine.state.version.memtable
    batch = WriteBatch()
    batch.table(16).update({b"%03d" % number: bytes(1000) for number in range(100)})
    rows = db.stats().row_bytes
    db.commit(batch)
    # The overhead of an entry among it.
    assert memtable.bytes_used >= 100 * (1003 + ENTRY_OVERHEAD_BYTES)
    assert db.stats().memtable_keys == 100
    assert db.stats().row_bytes - rows >= 100 * (1003 + ENTRY_OVERHEAD_BYTES)
    with opened(SimulatedDisk(), memtable_bytes=1 << 16) as small:
        for _ in range(5):
            small.commit(batch)
        # A checkpoint came by itself.
        assert small.stats().generation > 1


def test_limits_hold_for_all_tables_together(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.engine.writes.MAX_BATCH_BYTES", 1000)
    batch = WriteBatch()
    batch.put(b"a", bytes(600))
    batch.table(16).put(b"a", bytes(600))
    with pytest.raises(ValueError, match="the limit is 1000"):
        db.commit(batch)
    assert db.last_seqno == 0


def test_on_a_full_disk_a_commit_that_puts_into_any_table_is_refused_and_one_that_only_deletes_is_not() -> None:
    disk = SimulatedDisk(capacity=12 << 20)
    with opened(disk, segment_bytes=1 << 20) as db:
        number = 0
        with pytest.raises(kvwal.DiskFullError):
            while True:
                batch = WriteBatch()
                batch.table(16).put(b"%06d" % number, bytes(20_000))
                db.commit(batch)
                number += 1
        assert number > 50
        assert db.engine.reads.count(table=16) == number
        while number:
            number -= 1
            batch = WriteBatch()
            batch.table(16).delete(b"%06d" % number)
            batch.delete(b"x")
            db.commit(batch)
        assert db.engine.reads.count(table=16) == 0
        batch = WriteBatch()
        batch.table(16).put(b"again", bytes(20_000))
        db.commit(batch)
        assert problems_of(db) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({b"a": b"2"}, "key b'a' of table 16 is not what the log says"),
        ({b"a": None}, "key b'a' of table 16 is not what the log says"),
        ({b"c": b"3"}, "key b'c' of table 16 was deleted with its range"),
    ],
)
def test_verify_holds_the_log_against_every_table(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch, wrong: dict[bytes, Any], said: str
) -> None:
    batch = WriteBatch()
    batch.table(16).delete_range(b"b")
    batch.table(16).put(b"a", b"1")
    batch.table(17).put(b"a", b"2")
    db.commit(batch)
    # A merge that goes wrong, and leaves pages that verify by themselves.
    with monkeypatch.context() as patch:
        patch.setattr("kvwal.engine.checkpoint._updates", lambda *_: [(list(wrong), list(wrong.values()))])
        db.checkpoint()
    findings = [problem.reason for problem in db.verify().problems]
    assert any(said in reason for reason in findings), findings


# -- salvage --------------------------------------------------------------------------------------


def saved(path: Path) -> Model:
    with kvwal.open(path, background=False, durability="os") as db:
        assert problems_of(db) == []
        return content(db)


def build(path: Path, rng: Random) -> Model:
    model: Model = {table: {} for table in TABLES}
    with kvwal.open(path, background=False, durability="os") as db:
        for number in range(60):
            commit_rows(db, random_batch(rng, model))
            if number == 40:
                db.checkpoint()
        # As of a store that made the tables: one without a row would be given one.
        rows = WriteBatch()
        for table in (16, 17):
            rows.table(1).put(b"\x01%d" % table, encode_row(TableRow(str(table), table, BYTES, BYTES)))
        rows.table(1).put(NEXT_IDS_KEY, encode_ids(18, (1 << 32) - 2))
        commit_rows(db, rows)
        model[1].update((key, value) for key, value in rows.table(1).writes.items() if value is not None)
    return model


def test_salvage_saves_every_table(tmp_path: Path, rng: Random) -> None:
    model = build(tmp_path / "a.kv", rng)
    report = kvwal.salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    assert report.complete, report
    assert report.saved_keys == sum(len(keys) for table, keys in model.items() if is_of_users(table))
    assert saved(tmp_path / "b.kv") == model


def test_salvage_without_the_pages_saves_every_table_from_the_log(tmp_path: Path, rng: Random) -> None:
    model = build(tmp_path / "a.kv", rng)
    (tmp_path / "a.kv" / "data").unlink()
    report = kvwal.salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    assert not report.complete
    assert saved(tmp_path / "b.kv") == model


def test_salvage_fills_from_the_log_what_damaged_pages_of_a_table_no_longer_have(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, background=False, durability="os", keep_history_bytes=1 << 30) as db:
        batch = WriteBatch()
        batch.table(16).update({b"%04d" % number: b"x" * 300 for number in range(400)})
        batch.table(17).update({b"%04d" % number: b"y" * 300 for number in range(400)})
        db.commit(batch)
        db.checkpoint()
        db.checkpoint()
        meta = db.engine._pages.meta
        spoiled = next(chain.from_iterable(zip(k, v, strict=True) for k, v in db.engine._pages.tree(meta, 16).chunks()))
    raw = bytearray((path / "data").read_bytes())
    at = raw.rindex(spoiled[1])
    raw[at] ^= 1
    (path / "data").write_bytes(raw)
    report = kvwal.salvage(path, tmp_path / "b.kv")
    assert not report.complete
    found = saved_all(tmp_path / "b.kv", (16, 17))
    assert found[16] == {b"%04d" % number: b"x" * 300 for number in range(400)}
    assert found[17] == {b"%04d" % number: b"y" * 300 for number in range(400)}


def saved_all(path: Path, tables: tuple[int, ...]) -> Model:
    with kvwal.open(path, background=False) as db:
        reader = db.engine.reads.moments.reader("test")
        found = {table: dict(scanned(db, reader, table)) for table in tables}
        reader.release()
        return found
