"""Who made a commit and why: what is said with a commit comes back, whatever comes between."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import TINY, commit_rows, problems_of, run_threads

import kvwal
from kvwal import ClosedError, CorruptionError, FeedGap, FormatError, ReadOnlyError
from kvwal.batch import WriteBatch
from kvwal.engine.commit import CommitQueue
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import EncodedBatch
from kvwal.features import EXTENSIONS
from kvwal.files.names import segment_name
from kvwal.log import Record
from kvwal.log.columns import Columns
from kvwal.log.intents import EXTENDED, Body, encode_put
from kvwal.testing import SimulatedDisk

TELLER = {"by": "teller", "why": "a deposit"}


def opened(disk: SimulatedDisk, **options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, **{**TINY, "background": False, "keep_history_bytes": 0, **options})


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with opened(SimulatedDisk()) as store:
        yield store


def commit(db: kvwal.Store, way: str, meta: dict[str, str] | None, size: int) -> int:
    """One commit that says `meta`; returns how many keys and ranges it changes."""
    value = b"v" * size
    match way:
        case "put":
            db.put(b"k", value, meta=meta)
        case "delete":
            db.delete(b"k", meta=meta)
        case "delete_range":
            db.delete_range(b"a", b"z", meta=meta)
        case "commit":
            batch = WriteBatch()
            batch.delete_range(b"x", b"y")
            batch.put(b"x", value)
            batch.table(16).put(b"x", value)
            batch.table(1).put(b"x", b"the store's own")
            commit_rows(db, batch, meta=meta)
            return 3
        case "batch":
            with db.batch(meta=meta) as batch:
                batch.put(b"a", value)
                batch.delete(b"b")
            return 2
        case "update":
            db.update({b"%d" % n: value for n in range(5)}, meta=meta)
            return 5
        case "transaction":
            with db.transaction(meta=meta) as txn:
                txn.put(b"k", value)
        case "later":
            with db.transaction(meta={"replaced": "later"}) as txn:
                txn.put(b"k", value)
                txn.delete(b"l")
                assert txn.meta == {"replaced": "later"}
                txn.meta = meta  # type: ignore[assignment]  # the setter takes more
                assert txn.meta == (meta or {})
            return 2
        case "run":
            db.run(lambda txn: txn.put(b"k", value), meta=meta)
        case "add":
            db.add(b"count", 1, meta=meta)
        case "put_if_absent":
            assert db.put_if_absent(b"new %d" % db.last_seqno, value, meta=meta)
        case "compare_and_set":
            assert db.compare_and_set(b"k", db.get(b"k"), value + b"%d" % db.last_seqno, meta=meta)
    return 1


WAYS = ["put", "delete", "delete_range", "commit", "batch", "update", "transaction", "later", "run"]
OPERATIONS = ["add", "put_if_absent", "compare_and_set"]
texts = st.text(max_size=12)
steps = st.one_of(
    st.tuples(
        st.just("commit"),
        st.sampled_from(WAYS + OPERATIONS),
        st.none() | st.dictionaries(texts, texts, max_size=3) | st.just(TELLER),
        st.sampled_from([0, 20, 3000]),
    ),
    st.sampled_from([("sync",), ("checkpoint",), ("reopen",), ("crash",), ("system",)]),
)


@settings(max_examples=150)
@given(st.lists(steps, max_size=30), st.sampled_from(["commit", "os"]), st.integers(0, 1 << 32))
def test_what_a_commit_says_of_itself_is_there_as_long_as_the_commit(
    program: list[Any], durability: Any, seed: int
) -> None:
    disk = SimulatedDisk(seed=seed)
    options = {"durability": durability, "keep_history_bytes": 1 << 30}
    db = opened(disk, **options)
    # What each commit says, and how much it changes; None: it is the store's own.
    model: list[tuple[dict[str, str], int] | None] = []

    def look() -> None:
        found = [(one.seqno, one.meta, one.changes) for one in db.commits(0)]
        assert found == [(i + 1, *said) for i, said in enumerate(model[: db.durable_seqno]) if said is not None]

    for step in program:
        if step[0] == "commit":
            _, way, meta, size = step
            model.append((meta or {}, commit(db, way, meta, size)))
            assert db.last_seqno == len(model)
        elif step[0] == "system":
            batch = WriteBatch()
            batch.table(1).put(b"a", b"the store's own")
            commit_rows(db, batch, meta=TELLER)
            model.append(None)
        elif step[0] in ("reopen", "crash"):
            if step[0] == "crash":
                crashed = disk.crash(Random(seed))
                db.close()
                disk = crashed
            else:
                db.close()
            db = opened(disk, **options)
            del model[db.last_seqno :]
        else:
            getattr(db, step[0])()
        look()
    db.sync()
    look()
    told = {change.seqno: (change.meta, 0) for change in db.changes(0)}
    for change in db.changes(0):
        told[change.seqno] = (change.meta, told[change.seqno][1] + 1)
    assert told == {i + 1: said for i, said in enumerate(model) if said is not None}
    assert [one.seqno for one in db.commits(meta=TELLER)] == [
        i + 1 for i, said in enumerate(model) if said is not None and said[0] == TELLER
    ]
    assert problems_of(db) == []
    db.close()


def test_a_commit_has_its_time_and_its_size(db: kvwal.Store) -> None:
    db.put(b"k", b"v" * 100)
    db.put(b"k", b"v" * 100, meta=TELLER)
    plain, said = db.commits()
    records = list(db.history(0))
    assert [one.time_us for one in (plain, said)] == [record.time_us for record in records]
    assert plain.time == datetime.fromtimestamp(plain.time_us // 1_000_000, UTC).replace(
        microsecond=plain.time_us % 1_000_000
    )
    assert (plain.meta, said.meta) == ({}, TELLER)
    # 40 and 11 around the key and the value; the block: 2, the item 3, each pair 4.
    assert plain.bytes == 40 + 11 + 101
    assert said.bytes == plain.bytes + 2 + 3 + 4 + len("by" "teller") + 4 + len("why" "a deposit")


# -- which commits -----------------------------------------------------------------------------


def test_commits_are_found_by_seqno_time_and_pairs() -> None:
    disk = SimulatedDisk()
    with opened(disk, keep_history_bytes=1 << 30) as db:
        for number in range(60):
            disk.jump_clock(10_000_000)
            db.put(b"k", bytes(1500), meta={"by": "teller" if number % 3 else "auditor", "number": str(number)})
        times = [one.time for one in db.commits(0)]
        assert len(db.engine.upkeep._segments()) > 3

        def numbers(**how: Any) -> list[int]:
            return [int(one.meta["number"]) for one in db.commits(**how)]

        for i, time in enumerate(times):
            for delta in (-1, 0, 1):
                moment = time + delta * timedelta(microseconds=1)
                assert numbers(since=moment) == list(range(i + (delta == 1), 60))
                assert numbers(until=moment) == list(range(i + (delta >= 0)))
            assert numbers(after=i) == list(range(i, 60))
            assert numbers(until=i) == list(range(i))
        assert numbers(after=10, until=20) == list(range(10, 20))
        assert numbers(after=10, since=times[5], until=times[20]) == list(range(10, 21))
        assert numbers(after=3, since=times[40]) == list(range(40, 60))
        assert numbers(until=1000, meta={"by": "auditor"}) == list(range(0, 60, 3))
        assert numbers(meta={"by": "auditor", "number": "4"}) == []
        assert numbers(meta={"number": "4", "by": "teller"}) == [4]
        assert numbers(meta={"by": ""}) == numbers(meta={"bye": "teller"}) == []
        assert numbers(meta={}) == list(range(60))
        assert numbers(since=datetime(1, 1, 1, tzinfo=UTC)) == list(range(60))
        assert numbers(since=datetime.max.replace(tzinfo=UTC)) == []
        assert numbers(until=datetime(1, 1, 1, tzinfo=UTC)) == []
        berlin = times[30].astimezone(tz=None)
        assert numbers(since=berlin, until=berlin) == [30]
        assert [hold.name for hold in db.engine._log.holds()] == ["window"]  # type: ignore[union-attr]


def test_since_passes_over_the_segments_before_it(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with db.bootstrap():
        for number in range(60):
            db.put(b"k", bytes(1500), meta={"number": str(number)})
        moment = list(db.commits(0))[50].time
        cursor = db.engine.upkeep.read
        begun: list[int] = []

        def noted(*arguments: Any) -> Any:
            found = cursor(*arguments)
            begun.append(found.position)
            return found

        monkeypatch.setattr(db.engine.upkeep, "read", noted)
        assert [int(one.meta["number"]) for one in db.commits(since=moment)] == list(range(50, 60))
        assert begun[0] == 0
        assert 50 - 12 < begun[-1] <= 50


def test_no_value_is_cut_out_and_of_what_is_not_wanted_no_key(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(db, "put", TELLER, 20)
    commit(db, "commit", None, 20)
    commit(db, "update", {"by": "auditor"}, 20)

    def refuse(*_: Any) -> Any:
        pytest.fail("what is not asked for was cut out")

    monkeypatch.setattr(Columns, "values", refuse)
    monkeypatch.setattr(Columns, "values_of", refuse)
    monkeypatch.setattr(Record, "batch", refuse)
    assert [one.changes for one in db.commits()] == [1, 3, 5]
    monkeypatch.setattr(Record, "columns", refuse)
    monkeypatch.setattr("kvwal.feed.commits.decode_put_key", refuse)
    assert list(db.commits(meta={"by": "clerk"})) == []


def test_commits_that_are_gone_are_said_at_the_call() -> None:
    disk = SimulatedDisk()
    with opened(disk) as db:
        times = []
        for number in range(40):
            disk.jump_clock(1_000_000)
            db.put(b"k", bytes(1500))
            times.append(next(db.commits(number)).time)
            if number % 10 == 9:
                db.checkpoint()
        kept = [one.seqno for one in db.commits()]
        assert 1 < kept[0] < 40
        with pytest.raises(FeedGap) as gap:
            db.commits(0)
        assert (gap.value.asked, gap.value.oldest, gap.value.newest) == (0, kept[0], 40)
        for moment in (times[0], times[kept[0] - 2]):
            with pytest.raises(FeedGap, match="not all changes after") as gap:
                db.commits(since=moment)
            assert (gap.value.asked, gap.value.oldest, gap.value.newest) == (moment, kept[0], 40)
        assert [one.seqno for one in db.commits(since=times[kept[0]])] == kept[1:]
        assert [one.seqno for one in db.commits(kept[0], since=times[0])] == kept[1:]
        with pytest.raises(FeedGap, match="there is no commit 41"):
            db.commits(41)
        assert [hold.name for hold in db.engine._log.holds()] == []  # type: ignore[union-attr]


def test_commits_of_one_instant_stay_together() -> None:
    """A store opened under a clock that was set back gives all of them one time, and the segments too."""
    disk = SimulatedDisk()
    with opened(disk) as db:
        db.put(b"k", b"")
    disk.jump_clock(-1_000_000_000)
    with opened(disk) as db:
        with db.bootstrap():
            for _ in range(30):
                db.put(b"k", bytes(1500))
            [moment] = {one.time for one in db.commits()}
            assert len(db.engine.upkeep._segments()) > 2
            assert len(list(db.commits(since=moment))) == len(list(db.commits(until=moment))) == 31
        for _ in range(2):
            db.put(b"k", bytes(1500))
            db.checkpoint()
        assert next(db.commits()).seqno > 2
        with pytest.raises(FeedGap):
            db.commits(since=moment)
        assert list(db.commits(since=moment + timedelta(microseconds=1))) == []


def test_what_is_asked_wrongly_is_said_at_the_call(db: kvwal.Store) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"after": -1}, ValueError),
        ({"after": "1"}, TypeError),
        ({"until": -1}, ValueError),
        ({"until": "today"}, TypeError),
        ({"since": 5}, TypeError),
        ({"since": datetime(2026, 1, 1)}, ValueError),  # noqa: DTZ001  # which is what is refused
        ({"until": datetime(2026, 1, 1)}, ValueError),  # noqa: DTZ001
        ({"meta": {"by": 1}}, TypeError),
        ({"meta": {"by": "x" * 5000}}, ValueError),
    ]
    for arguments, error in wrong:
        with pytest.raises(error):
            db.commits(**arguments)


def test_a_listing_is_of_what_is_durable_at_the_call_and_ends_with_the_store() -> None:
    disk = SimulatedDisk()
    db = opened(disk, durability="os")
    db.put(b"a", b"1", meta=TELLER)
    assert list(db.commits()) == []
    db.sync()
    listing = db.commits()
    db.put(b"b", b"1")
    db.sync()
    assert [one.seqno for one in listing] == [1]
    listing, unread = db.commits(), db.commits()
    next(listing)
    db.close()
    for each in (listing, unread, None):
        with pytest.raises(ClosedError):
            next(db.commits() if each is None else each)
    with opened(disk) as db:
        db.close()
    with kvwal.open("/kv", "r", files=disk) as db:
        assert [(one.seqno, one.meta) for one in db.commits(since=datetime(2000, 1, 1, tzinfo=UTC))] == [
            (1, TELLER),
            (2, {}),
        ]
        with pytest.raises(ReadOnlyError):
            db.put(b"a", b"1", meta=TELLER)


def test_each_of_many_threads_finds_its_own_commits(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", durability="os", **TINY) as db:

        def write(name: str) -> None:
            for number in range(200):
                if number % 3:
                    db.put(name.encode(), b"%d" % number, meta={"by": name, "number": str(number)})
                else:
                    db.put(name.encode(), b"%d" % number)

        with db.bootstrap():
            run_threads(*(lambda name=name: write(name) for name in ("teller", "auditor", "clerk")))
            db.sync()
            for name in ("teller", "auditor", "clerk"):
                found = [int(one.meta["number"]) for one in db.commits(0, meta={"by": name})]
                assert found == [number for number in range(200) if number % 3]
            assert sum(not one.meta for one in db.commits(0)) == 3 * 67


# -- limits, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS + OPERATIONS)
def test_pairs_up_to_the_limit_are_kept_and_beyond_it_nothing_is_written(db: kvwal.Store, way: str) -> None:
    db[b"k"] = b"before"
    most = {"by": "x" * (4096 - 6)}
    commit(db, way, most, 1)
    assert next(db.commits(1)).meta == most
    for refused, error in (({"by": "x" * (4096 - 5)}, ValueError), ({"by": 1}, TypeError), ([("by", "me")], TypeError)):
        before = dict(db)
        with pytest.raises(error, match="meta"):
            commit(db, way, refused, 1)  # type: ignore[arg-type]
        assert (db.last_seqno, dict(db)) == (2, before)


def test_a_transaction_that_wrote_nothing_or_is_over_or_reads_only_says_nothing(db: kvwal.Store) -> None:
    with db.transaction(meta=TELLER) as txn:
        pass
    assert (txn.commit_seqno, db.last_seqno) == (None, 0)
    with pytest.raises(ClosedError):
        txn.meta = {}
    with db.transaction(read_only=True) as txn, pytest.raises(ReadOnlyError):
        txn.meta = TELLER
    with pytest.raises(ValueError, match="limit"), db.transaction() as txn:
        txn[b"k"] = b"v"
        txn.meta = {"by": "x" * 5000}
    assert db.commit(WriteBatch(), meta=TELLER) == 0
    assert list(db.commits()) == []


def test_pairs_that_change_after_the_call_are_kept_as_they_were(db: kvwal.Store) -> None:
    said = dict(TELLER)
    with db.batch(meta=said) as batch, db.transaction(meta=said) as txn:
        said["by"] = "thief"
        batch[b"a"] = txn[b"b"] = b"1"
    assert [one.meta for one in db.commits()] == [TELLER, TELLER]


def test_a_put_that_says_nothing_takes_the_way_of_a_put_alone(db: kvwal.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs no batch, no request and no group, and its record has no byte more."""
    puts: list[bytes] = []
    put = db.engine._log.append_put  # type: ignore[union-attr]
    monkeypatch.setattr(db.engine._log, "append_put", lambda *args: puts.append(args[0]) or put(*args))
    monkeypatch.setattr(CommitQueue, "commit", lambda *_: pytest.fail("it was queued"))
    db.put(b"a", b"1")
    db.put(b"b", b"1", meta=None)
    db[b"c"] = b"1"
    monkeypatch.undo()
    assert puts == [b"a", b"b", b"c"]
    with db.transaction() as txn:
        txn[b"d"] = b"1"
    db.put(b"e", b"1", meta={})
    assert {(record.kind, record.size) for record in db.history(0)} == {(1, 40 + 11 + 2)}


# -- on disk -----------------------------------------------------------------------------------


def test_a_store_that_never_said_anything_needs_no_feature(db: kvwal.Store) -> None:
    db[b"a"] = b"1"
    db.checkpoint()
    assert db.engine._pages.meta.required == 0


@pytest.mark.parametrize("end", ["none", "reopen", "crash"])
def test_the_meta_of_the_pages_says_that_the_log_has_pairs(end: str) -> None:
    disk = SimulatedDisk()
    db = opened(disk)
    db[b"a"] = b"1"
    db.put(b"a", b"2", meta=TELLER)
    if end != "none":
        crashed = disk.crash(0)
        db.close()
        db = opened(disk if end == "reopen" else crashed)
    db.checkpoint()
    db[b"a"] = b"3"
    db.checkpoint()
    assert db.engine._pages.meta.required == EXTENSIONS
    db.close()


def item(kind: int, content: bytes) -> bytes:
    return struct.pack("<BH", kind, len(content)) + content


def block(*items: bytes) -> bytes:
    return struct.pack("<H", sum(map(len, items))) + b"".join(items)


def commit_forged(db: kvwal.Store, extension: bytes) -> None:
    """Commit a put whose record verifies and has this extension block."""
    batch = WriteBatch()
    batch.put(b"forged", b"1")
    writes = EncodedBatch(batch)
    writes.body = Body(EXTENDED, [extension + encode_put(b"forged", b"1")])
    db.engine.commit(CommitRequest(writes, sync=True))


@pytest.mark.parametrize(
    ("extension", "error", "reason"),
    [
        (block(item(1, b"\1\0\1\0k")), CorruptionError, "cut short"),
        (block(item(1, b"\1")), CorruptionError, "cut short"),
        (block(item(1, b"")), CorruptionError, "too short"),
        (block(item(1, bytes(4097))), CorruptionError, "too long"),
        (block(item(1, b"\1\0\0\0\xff")), CorruptionError, "utf-8"),
        (block(item(1, b"\0\0\1\0\xc3")), CorruptionError, "utf-8"),
        (block(item(1, b"\1\0\0\0b" + b"\1\0\0\0a")), CorruptionError, "out of order"),
        (block(item(1, b"\1\0\0\0a" * 2)), CorruptionError, "out of order"),
        (block(item(3, b"t"), item(1, b"\1\0\0\0a")), CorruptionError, "out of order"),
        (block(item(1, b"\1\0\0\0a"), b"\0"), CorruptionError, "do not fill"),
        (b"\xff\xff", CorruptionError, "do not fill"),
        (block(item(9, b"x")), FormatError, "item of type 9"),
        (block(item(1, b"\1\0\0\0a"), item(127, b"")), FormatError, "item of type 127"),
    ],
)
def test_a_block_that_is_damaged_or_newer_is_a_specific_error(
    db: kvwal.Store, extension: bytes, error: type[Exception], reason: str
) -> None:
    db.put(b"a", b"1", meta=TELLER)
    commit_forged(db, extension)
    db.put(b"c", b"1")
    listing = db.commits()
    assert next(listing).meta == TELLER
    with pytest.raises(error, match=reason) as caught:
        next(listing)
    assert segment_name(1) in str(caught.value)
    assert "at byte" in str(caught.value)
    with pytest.raises(error, match=reason):
        list(db.commits(meta={"by": "another"}))
    with pytest.raises(error, match=reason):
        list(db.changes())
    assert [one.seqno for one in db.commits(2)] == [3]
    report = db.verify()
    assert not report.ok
    assert reason in str(report.problems)


def test_an_item_from_128_on_is_passed_over(db: kvwal.Store) -> None:
    commit_forged(db, block(item(1, b"\2\0\1\0byx"), item(128, b"later"), item(255, b"")))
    assert [one.meta for one in db.commits()] == [{"by": "x"}]
    assert db.verify().ok


def test_a_flipped_bit_of_the_pairs_is_found(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", background=False, keep_history_bytes=1 << 20) as db:
        db.put(b"a", b"1", meta=TELLER)
        db.checkpoint()
        db.put(b"b", b"1")
        db.checkpoint()
    log = tmp_path / "db" / segment_name(1)
    data = bytearray(log.read_bytes())
    data[data.index(b"teller")] ^= 1
    log.write_bytes(data)
    with pytest.raises(CorruptionError), kvwal.open(tmp_path / "db", background=False) as db:
        list(db.commits(0))
