"""Values of former versions become those of the newest, whatever else happens meanwhile, and wherever it is stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from store_fixtures import check_store, commit_rows, run_threads

import kvwal
import kvwal.aio
from kvwal import codecs
from kvwal.batch import WriteBatch
from kvwal.engine.migration import MigrationRow, decode_migration, encode_migration, migration_key
from kvwal.errors import FormatError, IndexNotReadyError, ReadOnlyError, TableCodecError, TableNotFoundError
from kvwal.tables import migration as module
from kvwal.tables.index import Index, IndexSpec
from kvwal.tables.migration import Migration
from kvwal.testing import SimulatedDisk, crash_every

ONE = codecs.versioned(codecs.json(), version=1)
TWO = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda old: [*old, "two"]})
THREE = codecs.versioned(
    codecs.json(), version=3, upcasters={1: lambda old: [*old, "two"], 2: lambda old: [*old, "three"]}
)


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=disk, background=False) as store:
        yield store
        check_store(store)


def filled(db: kvwal.Store, count: int = 10) -> kvwal.Table[int, Any]:
    """A table with values of version 1, and some of version 2."""
    db.table("t", int, ONE).update({n: [n] for n in range(count)})
    two = db.table("t", int, TWO)
    two.update({n: [n, "two"] for n in range(0, count, 3)})
    return db.table("t", int, THREE)


def versions_of(table: kvwal.Table[Any, Any]) -> set[int]:
    return {value[0] for value in table.raw().values()}


def row_of(db: kvwal.Store, table: int) -> bytes | None:
    return db.engine.reads.read(migration_key(table), table=1)


def test_all_values_are_rewritten_in_bounded_commits_that_say_why(db: kvwal.Store) -> None:
    table = filled(db)
    assert table.id is not None
    before, expected = db.last_seqno, dict(table)
    seen: list[tuple[int, int]] = []
    report = table.migrate(batch=3, progress=lambda done, total: seen.append((done, total)), meta={"by": "release 3"})
    assert dict(table) == expected
    assert versions_of(table) == {3}
    assert (report.examined, report.rewritten, report.unreadable) == (10, 10, 0)
    assert report.versions == {1: 6, 2: 4}
    assert not report.resumed
    assert seen == [(0, 10), (3, 10), (6, 10), (9, 10), (10, 10)]
    assert row_of(db, table.id) is None
    commits = list(db.commits(before))
    assert [(commit.cause, commit.meta, commit.changes) for commit in commits] == [
        ("migrate", {"by": "release 3"}, count) for count in (3, 3, 3, 1)
    ]
    assert {change.cause for change in db.changes(before)} == {"migrate"}
    assert {change.cause for change in db.changes(0) if change.seqno <= before} == {None}
    assert [version.cause for version in table.versions(1)] == ["migrate", None]
    assert [version.cause for version in db.versions(codecs.key_codec(int).encode(1), table=table.id)] == [
        "migrate",
        None,
    ]


def test_what_is_new_already_is_not_written_again(db: kvwal.Store) -> None:
    table = filled(db)
    table.migrate()
    before = db.last_seqno
    report = table.migrate()
    assert (report.examined, report.rewritten, report.versions) == (10, 0, {3: 10})
    assert db.last_seqno == before


def test_a_commit_has_a_bounded_number_of_bytes(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(db)
    before = db.last_seqno
    monkeypatch.setattr(module, "_BATCH_BYTES", 30)
    table.migrate()
    assert max(commit.changes for commit in db.commits(before)) < 4
    assert versions_of(table) == {3}


def test_a_stretch_with_little_to_do_is_left_too(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(db, 20)
    table.migrate()
    one = codecs.key_codec(int)
    assert table.id is not None
    with db.batch() as batch:
        batch.table(table.id).put(one.encode(0), b"\1[0]")
        batch.table(table.id).put(one.encode(19), b"\1[19]")
    monkeypatch.setattr(module, "_STRETCH_KEYS", 6)
    going = Migration(db.engine, table._spec)
    before = db.last_seqno
    nexts = []
    while going.step():
        nexts.append(decode_migration(row_of(db, table.id) or b"").next)
    assert nexts == [one.encode(6), one.encode(12), one.encode(18)]
    assert [commit.changes for commit in db.commits(before)] == [1, 1], "what only moves on is no user's commit"
    assert row_of(db, table.id) is None
    assert versions_of(table) == {3}


def test_a_dry_run_writes_nothing_and_says_what_would_be_done(db: kvwal.Store, disk: SimulatedDisk) -> None:
    table = filled(db)
    before = db.last_seqno
    report = table.migrate(dry_run=True, batch=4)
    assert (report.examined, report.rewritten, report.versions) == (10, 10, {1: 6, 2: 4})
    assert db.last_seqno == before
    assert versions_of(table) == {1, 2}
    db.close()
    with kvwal.open("/kv", "r", files=disk) as reader:
        table = reader.table("t", int, THREE)
        assert table.migrate(dry_run=True) == report
        with pytest.raises(ReadOnlyError, match="dry run"):
            table.migrate()


def test_it_goes_on_where_it_was_left(db: kvwal.Store) -> None:
    table = filled(db)
    going = Migration(db.engine, table._spec, batch=4)
    assert going.step()
    assert going.step()
    before = db.last_seqno
    report = table.migrate(batch=4)
    assert [commit.changes for commit in db.commits(before)] == [4, 2]
    assert report.resumed
    assert (report.examined, report.rewritten) == (10, 10)
    assert versions_of(table) == {3}


def test_a_newer_version_begins_anew(db: kvwal.Store) -> None:
    table = filled(db)
    going = Migration(db.engine, table._spec, batch=4)
    assert going.step()
    assert going.step()
    four = codecs.versioned(
        codecs.json(),
        version=4,
        upcasters={n: lambda old, n=n: [*old, ("two", "three", "four")[n - 1]] for n in (1, 2, 3)},
    )
    newer = db.table("t", int, four)
    read = going._read

    def and_then_another_begins(start: bytes) -> Any:
        stretch = read(start)
        assert Migration(db.engine, newer._spec).step()
        return stretch

    going._read = and_then_another_begins  # type: ignore[method-assign]  # put in its place
    with pytest.raises(TableCodecError):
        going.step()
    going._read = read  # type: ignore[method-assign]  # put back
    with pytest.raises(TableCodecError):
        going.step()
    report = newer.migrate()
    assert not report.resumed
    assert (report.rewritten, versions_of(newer)) == (10, {4})


def test_what_was_changed_meanwhile_is_not_overwritten(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    table = filled(db)
    going = Migration(db.engine, table._spec, batch=6)
    assert going.step()
    read = going._read
    key = codecs.key_codec(int).encode
    assert table.id is not None

    def and_then_others_write(start: bytes) -> Any:
        stretch = read(start)
        monkeypatch.setattr(going, "_read", read)
        assert table.id is not None
        table[1] = ["mine"]
        del table[2]
        with db.batch() as batch:
            batch.table(table.id).put(key(4), b"\1[44]")
        return stretch

    monkeypatch.setattr(going, "_read", and_then_others_write)
    assert going.step()
    row = decode_migration(row_of(db, table.id) or b"")
    assert row is not None
    assert (row.next, row.examined, row.rewritten) == (b"", 0, 3)
    assert going.report.examined == 0
    while going.step():
        pass
    assert (table[1], table[4]) == (["mine"], [44, "two", "three"])
    assert 2 not in table
    assert versions_of(table) == {3}
    assert (going.report.examined, going.report.rewritten) == (9, 8)


def test_no_former_version_is_written_behind_it(db: kvwal.Store) -> None:
    table = filled(db)
    old, two = db.table("t", int, TWO), TWO
    old[0] = [0, "two"]
    going = Migration(db.engine, table._spec, batch=2)
    assert going.step()
    with pytest.raises(TableCodecError):
        old[0] = [1, "two"]
    with pytest.raises(TableCodecError):
        db.table("t", int, two)
    while going.step():
        pass
    assert versions_of(table) == {3}


def test_a_value_that_cannot_be_brought_up_stays_and_is_counted(db: kvwal.Store) -> None:
    table = filled(db)
    assert table.id is not None
    key = codecs.key_codec(int).encode
    with db.batch() as batch:
        batch.table(table.id).put(key(2), b"\x01{")
        batch.table(table.id).put(key(5), b"\x09[]")
        batch.table(table.id).put(key(6), b"\x011")
    report = table.migrate(batch=2)
    assert (report.examined, report.rewritten, report.unreadable) == (10, 7, 3)
    assert report.first_unreadable is not None
    assert report.first_unreadable[0] == key(2)
    assert table.raw()[key(5)] == b"\x09[]"
    assert table.raw()[key(2)] == b"\x01{"


@pytest.mark.parametrize("what", ["drop", "rename"])
def test_a_table_that_goes_meanwhile_ends_it(db: kvwal.Store, what: str) -> None:
    table = filled(db)
    table_id = table.id
    assert table_id is not None
    going = Migration(db.engine, table._spec, batch=4)
    assert going.step()
    assert going.step()
    if what == "drop":
        db.drop_table("t")
        db.table("t", int, THREE)[1] = ["new"]
    else:
        db.rename_table("t", "u")
    before = db.last_seqno
    with pytest.raises(TableNotFoundError):
        going.step()
    assert db.last_seqno == before
    if what == "drop":
        assert row_of(db, table_id) is None
    else:
        assert db.table("u", int, THREE).migrate(batch=4).resumed


def test_what_cannot_be_migrated_says_why(db: kvwal.Store) -> None:
    with pytest.raises(TypeError, match=r"json .*codecs\.versioned"):
        db.table("plain", str, codecs.json()).migrate()
    with pytest.raises(TypeError, match="remembers no codec"):
        db.sub(b"x", str, ONE).migrate()
    with pytest.raises(TableNotFoundError):
        db.table("none", str, ONE).migrate()
    assert db.tables() == []
    filled(db)
    for batch in (0, 100_001):
        with pytest.raises(ValueError, match="batch"):
            db.table("t", int, THREE).migrate(batch=batch)


def test_writers_beside_it_lose_nothing(tmp_path: Any) -> None:
    with kvwal.open(str(tmp_path / "kv"), durability="os") as db:
        table = filled(db, 400)
        table[0] = [0, "two", "three"]
        marks: list[list[int]] = [[], []]

        def write(number: int) -> None:
            random = Random(number)
            for _ in range(600):
                key = random.randrange(400)
                value = table[key]
                if table.compare_and_set(key, value, [*value, "mark"]):
                    marks[number].append(key)

        def migrate() -> None:
            for _ in range(3):
                table.migrate(batch=7)

        run_threads(lambda: write(0), lambda: write(1), migrate)
        made = [*marks[0], *marks[1]]
        assert dict(table) == {n: [n, "two", "three"] + ["mark"] * made.count(n) for n in range(400)}
        assert versions_of(table) == {3}
        check_store(db)


def test_wherever_power_is_cut_it_goes_on() -> None:
    expected = {n: [n, "two", "three"] for n in range(12)}

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with kvwal.open("/kv", files=disk, background=False) as db:
            table = filled(db, 12)
            db.checkpoint()
            acknowledged.append("filled")
            table.migrate(batch=3)
            acknowledged.append("migrated")

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        with kvwal.open("/kv", "c", files=disk, background=False) as db:
            check_store(db)
            if "filled" not in acknowledged:
                return
            table = db.table("t", int, THREE)
            assert dict(table) == expected
            if "migrated" in acknowledged:
                assert versions_of(table) == {3}
            stored = None if table.id is None else row_of(db, table.id)
            if stored is not None:
                row = decode_migration(stored)
                assert row is not None
                assert {value[0] for _, value in table.raw().scan(stop=row.next)} <= {3}
            table.migrate(batch=3)
            assert versions_of(table) == {3}
            assert dict(table) == expected

    report = crash_every(program, check, states_per_point=3)
    assert report.points > 20


# -- the row --------------------------------------------------------------------------------------

ROW = MigrationRow("versioned(json)", 1, 3, b"\xffkey", 10, 7, 1)


def test_golden_bytes_of_a_row() -> None:
    assert migration_key(16) == b"\x0c\x00\x00\x00\x10"
    assert encode_migration(ROW) == (
        b'{"examined":10,"from":["versioned(json)",1],"next":"/2tleQ==","rewritten":7,"to":["versioned(json)",3],'
        b'"unreadable":1,"v":1}'
    )
    assert decode_migration(encode_migration(ROW)) == ROW


@pytest.mark.parametrize(
    "changed",
    [
        {"next": "?"},
        {"next": 3},
        {"from": [1, 1]},
        {"from": ["c"]},
        {"to": ["c", "3"]},
        {"examined": -1},
        {"rewritten": True},
        {"unreadable": None},
        {"v": "1"},
        {"v": 0},
        {"next": "A" * 87384},
    ],
)
def test_a_row_that_is_not_valid_is_as_none(db: kvwal.Store, changed: dict[str, Any]) -> None:
    data = json.dumps({**json.loads(encode_migration(ROW)), **changed}).encode()
    assert decode_migration(data) is None
    for other in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000):
        assert decode_migration(other) is None
    table = filled(db)
    assert table.id is not None
    batch = WriteBatch()
    batch.table(1).put(migration_key(table.id), data)
    commit_rows(db, batch)
    assert table.migrate().rewritten == 10
    assert row_of(db, table.id) is None


def test_a_row_of_a_newer_version_is_left_alone(db: kvwal.Store) -> None:
    table = filled(db)
    assert table.id is not None
    data = json.dumps({**json.loads(encode_migration(ROW)), "v": 2}).encode()
    batch = WriteBatch()
    batch.table(1).put(migration_key(table.id), data)
    commit_rows(db, batch)
    with pytest.raises(FormatError, match="version 2"):
        table.migrate()
    assert row_of(db, table.id) == data


@pytest.mark.parametrize("built", [True, False])
def test_an_index_keeps_its_entries_and_need_not_be_declared(disk: SimulatedDisk, built: bool) -> None:
    with kvwal.open("/kv", files=disk, background=False) as db:
        db.table("t", int, ONE).update({n: [n % 4] for n in range(300)})
        index = db.table("t", int, ONE).index("by_rest", key=lambda value: value[0], codec=int)
        if built:
            index.wait()
    with kvwal.open("/kv", files=disk, background=False) as db:
        table = db.table("t", int, THREE)
        assert table.migrate(batch=7).rewritten == 300
        assert db.verify().ok
        assert versions_of(table) == {3}
        index = table.index("by_rest", key=lambda value: value[0], codec=int)
        index.wait()
        found = {rest: [key for key, _ in index.get(rest)] for rest in range(4)}
        assert found == {rest: list(range(rest, 300, 4)) for rest in range(4)}
        assert db.verify().ok
        check_store(db)


def test_an_index_is_built_anew_when_values_get_a_newer_version(db: kvwal.Store) -> None:
    one = codecs.versioned(codecs.json(), version=1)
    two = codecs.versioned(codecs.json(), version=2, upcasters={1: lambda old: {**old, "country": "UK"}})
    people = db.table("people", str, one)
    by = {"key": lambda value: value.get("country"), "codec": str}
    people.index("by_country", **by).wait()
    people["ada"] = {}
    newer = db.table("people", str, two)
    index = newer.index("by_country", **by)
    index.wait()
    assert index.get("UK") == [("ada", {"country": "UK"})]
    newer.migrate()
    assert index.get("UK") == [("ada", {"country": "UK"})]
    assert db.verify().ok


def test_one_that_goes_on_finds_what_came_behind_it(db: kvwal.Store) -> None:
    table = filled(db, 50)
    going = Migration(db.engine, table._spec, batch=10)
    while going.step():
        if going.report.rewritten >= 20:
            break
    encode = codecs.key_codec(int).encode
    old = table.raw()[encode(47)]
    assert old[0] == 1
    batch = WriteBatch()
    batch.table(table.id or 0).put(encode(3), old)
    db.commit(batch)
    assert versions_of(table) == {1, 2, 3}
    assert table.migrate(batch=10).resumed
    assert versions_of(table) == {3}
    assert row_of(db, table.id or 0) is None


@pytest.mark.parametrize("call", [1, 2, 128, 129, 200, 300])
@pytest.mark.parametrize("built", [True, False])
def test_an_index_that_is_being_built_gets_what_is_migrated_meanwhile(db: kvwal.Store, built: bool, call: int) -> None:
    one = db.table("t", int, ONE)
    one.update({n: [n] for n in range(300)})
    if built:
        one.index("by_length", key=len, codec=int).wait()
    table = db.table("t", int, THREE)
    calls = 0

    def length(value: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == call:
            assert table.migrate(batch=70).rewritten == 300
        return len(value)

    index = table.index("by_length", key=length, codec=int)
    index.wait()
    assert calls > call
    assert [*index.keys()] == [(3, key) for key in table]
    assert db.verify().ok


@pytest.mark.parametrize("built", [True, False])
def test_writers_a_migration_and_a_build_at_once_leave_an_index_right(tmp_path: Any, built: bool) -> None:
    with kvwal.open(str(tmp_path / "kv"), durability="os") as db:
        one = db.table("t", int, ONE)
        one.update({n: [n] for n in range(2000)})
        if built:
            one.index("by_last", key=lambda value: str(value[-1]), codec=str).wait()
        table = db.table("t", int, THREE)
        index = table.index("by_last", key=lambda value: str(value[-1]), codec=str)

        def write() -> None:
            random = Random(1)
            for _ in range(300):
                key = random.randrange(2000)
                table[key] = [*table[key], random.randrange(4)]
                table.touch(random.randrange(2000), expire_s=3600)

        run_threads(write, lambda: table.migrate(batch=50))
        index.wait()
        assert list(index.keys()) == sorted((str(value[-1]), key) for key, value in table.items())
        assert db.verify().ok
        check_store(db)


def test_a_key_that_is_written_at_each_step_does_not_hold_a_build_up(db: kvwal.Store) -> None:
    table = db.table("t", int, codecs.json())
    table.update({n: [] for n in range(300)})
    writing = False

    def length(value: Any) -> int:
        nonlocal writing
        if not writing:
            writing = True
            for n in (0, 128):
                table[n] = [*table[n], "more"]
                table.touch(n, expire_s=60)
            writing = False
        return len(value)

    index = table.index("by_length", key=length, codec=int)
    index.wait()
    assert [entry.key for entry in index.scan()] == [*sorted(set(range(300)) - {0, 128}), 0, 128]
    assert db.verify().ok


def test_a_build_that_ends_as_it_is_begun_anew_goes_on(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = db.table("t", int, ONE)
    one.update({n: [n] for n in range(10)})
    indexes = db.engine.tables.indexes
    indexes.wake = lambda: None
    one.index("by_length", key=len, codec=int)
    some_pairs, begun = indexes._some_pairs, []

    def and_then_another_begins(index: int, table: int) -> Any:
        found = some_pairs(index, table)
        if found[0] is None and not begun:
            begun.append(db.table("t", int, THREE).index("by_length", key=len, codec=int))
        return found

    monkeypatch.setattr(indexes, "_some_pairs", and_then_another_begins)
    assert len(list(indexes.steps())) == 5
    assert list(begun[0].keys()) == [(3, n) for n in range(10)]


def test_a_build_that_is_begun_anew_meanwhile_keeps_nothing_of_the_former_function(db: kvwal.Store) -> None:
    one = db.table("t", int, ONE)
    one.update({n: [n] for n in range(10)})
    indexes = db.engine.tables.indexes
    indexes.wake = lambda: None
    begun: list[kvwal.Index[int, int, Any]] = []

    def length(value: Any) -> int:
        if not begun:
            begun.append(db.table("t", int, THREE).index("by_length", key=len, codec=int))
        return len(value)

    one.index("by_length", key=length, codec=int)
    for _ in indexes.steps():
        pass
    assert list(begun[0].keys()) == [(3, n) for n in range(10)]


def test_a_function_for_former_values_does_not_build_an_index_of_newer_ones(db: kvwal.Store) -> None:
    one = db.table("t", int, ONE)
    one.update({n: [n] for n in range(10)})
    one.index("by_length", key=len, codec=int).wait()
    table = db.table("t", int, THREE)
    going = Migration(db.engine, table._spec)
    assert going.step()
    # As by the thread that was just building it by the former version.
    db.engine.tables.indexes.build("t", "by_length")
    index: Index[int, int, Any] = Index(db.engine, IndexSpec(table._spec, "by_length", len, int, False), db)
    with pytest.raises(IndexNotReadyError) as raised:
        index.count()
    assert isinstance(raised.value.__cause__, TableCodecError)
    index = table.index("by_length", key=len, codec=int)
    assert list(index.keys()) == [(3, n) for n in range(10)]
    while going.step():
        pass
    assert list(index.keys()) == [(3, n) for n in range(10)]


@pytest.mark.parametrize("mended", [True, False])
def test_a_function_that_fails_as_another_is_declared_fails_for_itself_alone(db: kvwal.Store, mended: bool) -> None:
    table = db.table("t", int, codecs.json())
    table.update({n: [n] for n in range(10)})
    indexes = db.engine.tables.indexes
    indexes.wake = lambda: None

    def fails(value: Any) -> int:
        if mended:
            table.index("by_length", key=len, codec=int)
        raise RuntimeError("at fault")

    index = table.index("by_length", key=fails, codec=int)
    for _ in indexes.steps():
        pass
    if mended:
        assert index.count() == 10
    else:
        with pytest.raises(IndexNotReadyError) as raised:
            index.count()
        assert isinstance(raised.value.__cause__, RuntimeError)
        table.index("by_length", key=len, codec=int)
        assert len(list(indexes.steps())) == 2
    assert index.count() == 10
