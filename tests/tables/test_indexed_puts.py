"""A put alone into a table with indexes takes a short way: it does the same as the general way, which others take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from random import Random
from typing import Any

import pytest
from group_fixtures import as_one_group
from log_rig import LogRig, simulated_disk
from store_fixtures import check_store, interrupted_at, problems_of, run_threads

import kvwal
from kvwal import codecs
from kvwal.engine.indexes import FIRST_DERIVED_ID, prepared
from kvwal.engine.operations import Update
from kvwal.engine.publish import Publisher
from kvwal.engine.request import CommitRequest
from kvwal.errors import IndexesChangedError
from kvwal.features import KEYSPACES
from kvwal.log import encode_writes
from kvwal.log.columns import decode_intents
from kvwal.log.intents import TABLES
from kvwal.log.record import COMMIT
from kvwal.testing import SimulatedDisk

NAMES = [f"{letter}{number}" for letter in "a\0" for number in range(5)]
CITIES = ("", "Oslo", "Oslo\0", "Rom", "R")
KEPT = {"keep_history_bytes": 8 << 20, "segment_bytes": 256 << 10}


def opened(disk: SimulatedDisk | None = None, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk or SimulatedDisk(), background=False, durability="os", **options)


def users_of(db: kvwal.Store) -> kvwal.Table[str, Any]:
    return db.table("users", str, codecs.json())


def city_of(user: dict[str, Any]) -> Any:
    return user.get("city")


def by_city_of(users: kvwal.Table[str, Any]) -> kvwal.Index[str, str, Any]:
    return users.index("by_city", key=city_of, codec=str)


def by_tag_of(users: kvwal.Table[str, Any]) -> kvwal.Index[int, str, Any]:
    return users.index("by_tag", key=lambda user: user.get("tags", ()), codec=int, many=True)


def drawn_user(rng: Random) -> dict[str, Any]:
    user: dict[str, Any] = {"n": rng.randrange(3)}
    if rng.random() < 0.8:
        user["city"] = rng.choice(CITIES)
    if rng.random() < 0.5:
        user["tags"] = [rng.randrange(-3, 4) for _ in range(rng.randrange(4))]
    if rng.random() < 0.1:
        # An index key of another type: the codec refuses it.
        user["city"] = 5
    if rng.random() < 0.05:
        user["n"] = "x" * 70_000
    return user


def rows_of(db: kvwal.Store) -> dict[int, list[tuple[bytes, bytes]]]:
    """All tables, those of indexes too."""
    reads, found = db.engine.reads, {}
    for table in (0, 1, *range(16, 20), *range(FIRST_DERIVED_ID, FIRST_DERIVED_ID + 80)):
        reader = reads.moments.reader("test")
        chunks = reads.chunks(reader, None, None, reverse=False, table=table)
        pairs = list(chain.from_iterable(zip(keys, values, strict=True) for keys, values in chunks))
        if pairs:
            found[table] = pairs
    return found


def records_of(db: kvwal.Store) -> list[tuple[int, int, bytes]]:
    log = db.engine._log
    assert log is not None
    with log.read(0) as cursor:  # type: ignore[arg-type]  # a seqno
        return [(record.seqno, record.kind, bytes(record.body)) for record in cursor]


def check_same_memory(db: kvwal.Store, other: kvwal.Store) -> None:
    states = [each.engine.state for each in (db, other)]
    memtables = [state.version.memtable for state in states]
    parts = [dict(memtable.parts.written()) for memtable in memtables]
    assert parts[0].keys() == parts[1].keys()
    for one, two in [(memtables[0], memtables[1]), *((parts[0][table], parts[1][table]) for table in parts[0])]:
        for name in ("latest", "bytes_used", "last_seqno", "_written_at", "_has_deletes", "has_expiring"):
            assert getattr(one, name) == getattr(two, name), name
        assert list(one.latest) == list(two.latest)
        assert one.older._by_key == two.older._by_key
    assert len(states[0].cache.rows) == len(states[1].cache.rows)
    assert states[0].cache.bytes_used == states[1].cache.bytes_used


class Side:
    """One of two stores that run the same program: one takes the short way, where that is open."""

    def __init__(self) -> None:
        self.disk = SimulatedDisk()
        self.snapshots: list[kvwal.Snapshot] = []
        self.open()

    def open(self) -> None:
        self.db = opened(self.disk, **KEPT)
        self.indexes = self.db.engine.tables.indexes
        # What is to be built waits for `build`.
        self.indexes.wake = lambda: None
        self.users = users_of(self.db)
        by_city_of(self.users)
        by_tag_of(self.users)

    def reopen(self) -> None:
        for snapshot in self.snapshots:
            snapshot.close()
        self.snapshots = []
        self.db.close()
        self.open()

    def declare_again(self, name: str) -> None:
        self.users.drop_index(name)
        (by_city_of if name == "by_city" else by_tag_of)(self.users)

    def build(self, steps: int) -> None:
        for _ in islice(self.indexes.steps(), steps):
            pass

    def transaction(self, pairs: dict[str, Any]) -> None:
        with self.db.transaction() as txn:
            users = self.users.within(txn)
            for name, user in pairs.items():
                users.get(name)
                users[name] = user

    def heard(self, name: str, user: Any) -> None:
        with self.db.own_commits() as own:
            self.users.put(name, user)
        assert own.last == self.db.last_seqno

    def other_name(self, name: str, user: Any) -> None:
        self.db.rename_table("users", "others")
        try:
            self.db.table("others", str, codecs.json())[name] = user
        finally:
            self.db.rename_table("others", "users")

    def release(self) -> None:
        if self.snapshots:
            self.snapshots.pop(0).close()


def drawn_step(rng: Random, common: bool) -> Callable[[Side], object]:
    """A step with all its arguments, to be taken by both."""
    name, user = rng.choice(NAMES), drawn_user(rng)
    if common:
        return lambda side: side.users.put(name, user)
    start, stop = sorted(rng.sample(NAMES, 2))
    pairs = {each: drawn_user(rng) for each in rng.sample(NAMES, 3)}
    index, steps = rng.choice(["by_city", "by_tag"]), rng.randrange(4)
    durable = rng.random() < 0.5
    steps_of: list[Callable[[Side], object]] = [
        lambda side: side.users.delete(name),
        lambda side: side.users.delete_range(start, stop),
        lambda side: side.users.update(pairs),
        lambda side: side.transaction(pairs),
        lambda side: side.users.put(name, user, expire_s=1e6),
        lambda side: side.users.put(name, user, meta={"by": "test"}),
        lambda side: side.users.put(name, user, durability="commit"),
        lambda side: side.snapshots.append(side.db.snapshot()),
        lambda side: side.release(),
        lambda side: len(side.users),
        lambda side: side.heard(name, user),
        lambda side: side.other_name(name, user),
        lambda side: side.declare_again(index),
        lambda side: side.build(steps),
        lambda side: side.db.put(name.encode(), b""),
        lambda side: side.db.checkpoint() if durable else None,
        lambda side: side.reopen() if durable else None,
        lambda side: side.users.clear() if durable else None,
    ]
    return rng.choice(steps_of)


def outcome(step: Callable[[Side], object], side: Side) -> object:
    try:
        result = step(side)
    except (TypeError, ValueError) as error:
        return repr(error)
    return result if isinstance(result, int) else None


def run(seed: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """Run a random program on both, and return how often a put took which way."""
    rng = Random(seed)
    monkeypatch.setattr("kvwal.engine.indexing._STEP_KEYS", 3)
    taken = Counter[bool]()
    sides = [Side(), Side()]

    def prepared_there(*args: Any) -> Any:
        return prepared(*args) if args[-1] is sides[0].db.engine.reads else None

    publish = Publisher.publish_writes

    def publish_writes(self: Publisher, *args: Any) -> None:
        taken[self._state.plain] += 1
        publish(self, *args)

    monkeypatch.setattr("kvwal.tables.stored.prepared", prepared_there)
    monkeypatch.setattr(Publisher, "publish_writes", publish_writes)
    share = rng.choice([0.5, 0.9, 0.98])
    for number in range(steps):
        step = drawn_step(rng, rng.random() < share)
        one, other = (outcome(step, side) for side in sides)
        assert one == other
        if number % 20 == 0:
            assert rows_of(sides[0].db) == rows_of(sides[1].db)
            for each in zip(*(side.snapshots for side in sides), strict=True):
                then = [list(side.users.within(at).items()) for side, at in zip(sides, each, strict=True)]
                assert then[0] == then[1]
    check_same_memory(sides[0].db, sides[1].db)
    assert records_of(sides[0].db) == records_of(sides[1].db)
    for side in sides:
        side.build(1000)
        check_store(side.db)
        assert problems_of(side.db) == []
        side.reopen()
        users = dict(side.users)
        found = [entry[:2] for entry in by_city_of(side.users).scan()]
        assert found == sorted((user["city"], name) for name, user in users.items() if "city" in user)
        side.db.close()
    return taken


@pytest.mark.parametrize("number", range(4))
def test_it_leaves_what_the_general_way_leaves(seed: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, entries, memory and records, with all that may come between."""
    run(f"{seed} {number}", 150, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_it_leaves_what_the_general_way_leaves_many_times(
    seed: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(f"slow {seed} {number}", 500, monkeypatch)


def test_the_programs_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With readers and without them, so that they say something of it."""
    taken = run("ways", 300, monkeypatch)
    assert min(taken[True], taken[False]) > 20


# -- what may come between the preparing and the commit ------------------------------------------


def check_index(users: kvwal.Table[str, Any], by_city: kvwal.Index[str, str, Any]) -> None:
    found = [entry[:2] for entry in by_city.scan()]
    assert found == sorted((user["city"], name) for name, user in users.items())


def before_the_commit(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something once when a put is prepared, and before it takes the lead."""
    left = [act]

    def prepare(*args: Any) -> Any:
        made = prepared(*args)
        if left:
            left.pop()()
        return made

    monkeypatch.setattr("kvwal.tables.stored.prepared", prepare)


@pytest.mark.parametrize("city", ["Rom", "Oslo"])
def test_another_put_of_the_key_that_comes_between_has_its_entries_removed(
    city: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened() as db:
        users = users_of(db)
        by_city = by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        before_the_commit(monkeypatch, lambda: users.put("ada", {"city": "Paris"}))
        # The lead is given back, and not taken away as one that an interruption has left behind.
        with monkeypatch.context() as patch:
            patch.setattr(db.engine.queue, "refuse_reentry", pytest.fail)
            users["ada"] = {"city": city}
        assert [entry[:2] for entry in by_city.scan()] == [(city, "ada")]
        check_store(db)
        assert problems_of(db) == []


def test_an_index_that_is_declared_between_has_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as db:
        users = users_of(db)
        by_city = by_city_of(users)
        before_the_commit(monkeypatch, lambda: by_tag_of(users))
        users["ada"] = {"city": "Oslo", "tags": [1, 2, 1]}
        assert [entry[:2] for entry in by_tag_of(users).scan()] == [(1, "ada"), (2, "ada")]
        check_index(users, by_city)
        assert problems_of(db) == []


def test_an_index_that_is_dropped_between_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as db:
        users = users_of(db)
        by_city_of(users)
        before_the_commit(monkeypatch, lambda: users.drop_index("by_city"))
        users["ada"] = {"city": "Oslo"}
        assert rows_of(db).keys() == {1, users.id}
        assert problems_of(db) == []


@pytest.mark.parametrize("how", ["drop", "rename"])
def test_one_behind_what_takes_the_name_away_in_its_group_goes_to_the_new_table(how: str) -> None:
    with opened() as db:
        users = users_of(db)
        by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        first = users.id
        away = {"drop": lambda: db.drop_table("users"), "rename": lambda: db.rename_table("users", "others")}
        calls = [away[how], lambda: users.put("bob", {"city": "Rom"})]
        assert isinstance(as_one_group(db, calls)[1], int)
        assert dict(users) == {"bob": {"city": "Rom"}}
        assert users.id != first
        check_store(db)
        assert problems_of(db) == []


def test_threads_that_put_the_same_keys_leave_an_exact_index(seed: int) -> None:
    with opened() as db:
        users = users_of(db)
        by_city = by_city_of(users)

        def work(number: int) -> None:
            rng = Random(f"{seed} {number}")
            for _ in range(150):
                users[rng.choice(NAMES)] = {"city": rng.choice(CITIES)}

        run_threads(*(partial(work, number) for number in range(4)))
        check_index(users, by_city)
        check_store(db)
        assert problems_of(db) == []


@pytest.mark.parametrize("with_reader", [False, True])
@pytest.mark.parametrize("city", ["Oslo", "Rom"])
def test_an_interruption_anywhere_leaves_it_written_with_a_note_or_not(city: str, with_reader: bool) -> None:
    step, interrupted = 0, True
    while interrupted:
        step += 1
        with opened() as db:
            users = users_of(db)
            by_city = by_city_of(users)
            users["ada"] = {"city": "Oslo"}
            reader = db.snapshot() if with_reader else None
            found = interrupted_at(step, lambda: users.put("ada", {"city": city, "n": 1}))
            interrupted = found is not None
            written = not interrupted or "was written" in str(getattr(found, "__notes__", ""))
            old, new = {"city": "Oslo"}, {"city": city, "n": 1}
            assert users["ada"] in ([new] if written else [old, new]), step
            check_index(users, by_city)
            users["zoe"] = {"city": "Oslo"}
            check_index(users, by_city)
            if reader is not None:
                assert dict(users.within(reader)) == {"ada": old}
                reader.close()
            check_store(db)
            assert problems_of(db) == []
    assert step > 60


def test_on_a_full_disk_it_is_tried_again_with_what_is_right_then(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimulatedDisk()
    with opened(disk, segment_bytes=64 << 10) as db:
        users = users_of(db)
        by_city = by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        disk.capacity = disk.used_bytes()

        def free_space() -> bool:
            disk.capacity = None
            with db.batch() as batch:
                users.within(batch)["ada"] = {"city": "between"}
            return True

        pressure = db.engine.pressure
        monkeypatch.setattr(pressure, "free_space", lambda: False)
        monkeypatch.setattr(pressure, "relieve", lambda **_: None)
        with pytest.raises(kvwal.DiskFullError):
            for number in range(100):
                users["ada"] = {"city": f"c{number}", "n": "x" * 5_000}
        check_index(users, by_city)
        monkeypatch.setattr(pressure, "free_space", free_space)
        users["ada"] = {"city": "Rom", "n": "x" * 5_000}
        assert disk.capacity is None
        assert [entry[:2] for entry in by_city.scan()] == [("Rom", "ada")]
        check_store(db)
        assert problems_of(db) == []


# -- its record, and how it becomes visible -------------------------------------------------------

WRITES: list[tuple[int, bytes, bytes | None]] = [(16, b"k", b"v"), (1 << 31, b"old", None), (1 << 31, b"new", b"")]


def test_what_is_too_large_for_one_chunk_goes_the_general_way() -> None:
    assert encode_writes(WRITES) is not None
    assert encode_writes([*WRITES, ((1 << 31) + 1, b"k", bytes(70_000))]) is None
    with opened() as db:
        users = users_of(db)
        by_city = by_city_of(users)
        users["ada"] = {"city": "Oslo", "n": "x" * 70_000}
        check_index(users, by_city)


def test_the_next_segment_says_that_a_reader_must_know_tables() -> None:
    rig = LogRig(simulated_disk(), "/log")
    log = rig.create()
    whole = encode_writes(WRITES)
    assert whole is not None
    # The first goes the way of all others, since a segment is to be begun.
    log.append_put(b"", b"")
    assert log.required == 0
    log.append_put(b"k", b"v", 16, whole)
    assert log.required == KEYSPACES
    log.append_put(b"k", b"v", 16, whole)
    log.sync()
    log.abandon()
    _, *records = rig.salvage()[0]
    assert [(record.kind, record.body) for record in records] == [(COMMIT | TABLES, whole)] * 2
    batch = decode_intents(whole, TABLES)
    assert [(table, part.writes) for table, part in batch.parts()] == [
        (16, {b"k": b"v"}),
        (1 << 31, {b"old": None, b"new": b""}),
    ]


def test_tables_ascend_in_its_record_also_where_the_row_of_the_table_has_indexes_in_another_order() -> None:
    disk = SimulatedDisk()
    with opened(disk, **KEPT) as db:
        users = users_of(db)
        by_city, _ = by_city_of(users), by_tag_of(users)
        users["ada"] = {"city": "Oslo", "tags": [1]}
        names, table = db.engine.state.cache.names, users.id
        assert table is not None
        found = names.indexed[table]
        names.indexed = {table: found._replace(indexes=found.indexes[::-1])}
        users["ada"] = {"city": "Rom", "tags": [2]}
        db.sync()
        assert [change.key for change in db.changes(db.last_seqno - 1)] == [b"ada"]
        check_index(users, by_city)
    with opened(disk, **KEPT) as db:
        assert users_of(db)["ada"] == {"city": "Rom", "tags": [2]}
        assert problems_of(db) == []


def test_a_feed_that_follows_is_told_of_it() -> None:
    with opened() as db:
        users = users_of(db)
        by_city_of(users)
        with db.changes(db.last_seqno, follow=True) as feed:
            for number in range(50):
                users["ada"] = {"city": f"c{number}"}
                db.sync()
                assert users.of(next(feed)) == ("ada", {"city": f"c{number}"})


def test_it_says_its_seqno_before_its_values_and_all_rows_change_at_once() -> None:
    with opened() as db:
        users = users_of(db)
        by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        state = db.engine.state
        memtable = state.version.memtable
        seen: list[tuple[object, ...]] = []

        class Rows(dict[Any, Any]):
            def update(self, *values: Any) -> None:
                seen.append(("rows", len(values[0]), state.horizon, state.seqno))
                super().update(*values)

        class Latest(dict[bytes, bytes | None]):
            def __init__(self, part: Any) -> None:
                super().__init__(part.latest)
                self._part = part

            def __setitem__(self, key: bytes, value: bytes | None) -> None:
                deletes = value is not None or self._part._has_deletes
                seen.append(("value", self._part.last_seqno, memtable.last_seqno, state.seqno, deletes))
                super().__setitem__(key, value)

        state.cache.rows = Rows(state.cache.rows)
        for _, part in memtable.parts.written():
            part.latest = Latest(part)
        assert state.plain
        last = int(users.put("ada", {"city": "Rom"}))
        values = [("value", last, last, last - 1, True)] * 4
        assert seen == [("rows", 4, last, last - 1), *values]


def test_what_an_operation_puts_into_a_table_with_indexes_is_not_written_without_them() -> None:
    """It was made when the table had none."""
    with opened() as db:
        users = users_of(db)
        by_city = by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        [table] = db.engine.state.cache.names.indexed
        put = Update(b"bob", lambda old: b'{"city":"Rom"}', table=table)
        with pytest.raises(IndexesChangedError):
            db.engine.queue.commit(CommitRequest(sync=False, operation=put))
        assert [*users] == ["ada"]
        assert not by_city.get("Rom")
        check_store(db)


def test_a_commit_that_was_left_half_visible_is_finished_first() -> None:
    with opened() as db:
        users = users_of(db)
        by_city_of(users)
        users["ada"] = {"city": "Oslo"}
        state = db.engine.state
        finished: list[int] = []
        state.unfinished = (lambda: finished.append(state.seqno)), ()
        last = users.put("ada", {"city": "Rom"})
        assert finished == [last - 1]
        check_store(db)


@pytest.mark.parametrize("with_reader", [False, True])
def test_a_reader_that_comes_while_it_is_half_published_sees_all_of_it_or_nothing(with_reader: bool) -> None:
    """Another thread may register between the interruption and the second time: the lock is free then."""
    for step in range(1, 1000):
        with opened() as db:
            users = users_of(db)
            by_city = by_city_of(users)
            users["ada"] = {"city": "Oslo"}
            engine, table = db.engine, users.id
            assert table is not None
            reader = db.snapshot() if with_reader else None
            new = codecs.json().encode({"city": "Rom"})
            keys = engine.tables.indexes.keys_of(table, {b"ada": new})
            assert keys is not None
            put = prepared(table, b"ada", new, keys, None, engine.state.cache, engine.reads)
            assert put is not None
            last = engine.queue._log.append_put(b"ada", new, table, put.whole)
            publish = partial(engine.queue._publisher.publish_writes, last, put)
            interrupted = interrupted_at(step, publish) is not None
            late = db.snapshot()
            if interrupted and engine.state.seqno < last:
                publish()
            city = "Oslo" if late.seqno < last else "Rom"
            assert users.within(late)["ada"] == {"city": city}, step
            assert [entry[:2] for entry in by_city.within(late).scan()] == [(city, "ada")], step
            assert [entry[:2] for entry in by_city.scan()] == [("Rom", "ada")], step
            for each in (reader, late):
                if each is not None:
                    each.close()
            check_store(db)
            assert problems_of(db) == []
        if not interrupted:
            return
    raise AssertionError("publishing has no end")


def test_memory_beyond_its_budget_is_seen_to() -> None:
    with opened() as db:
        users = users_of(db)
        by_city_of(users)
        state, publisher = db.engine.state, db.engine.queue._publisher
        users["ada"] = {"city": "Oslo"}
        state.cache.budget = state.cache._budget_bytes = 0
        users["ada"] = {"city": "Rom"}
        assert not state.cache.rows
        assert not db.engine.pressure.is_on
        publisher._memtable_bytes = 0
        users["ada"] = {"city": "Oslo"}
        assert db.engine.pressure.is_on
