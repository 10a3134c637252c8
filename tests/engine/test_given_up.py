"""What readers of former moments may hold is bounded: the oldest are given up, and say so at their next read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_fixtures import readers_in

import kvwal
from kvwal import ConflictError, SnapshotTooOld
from kvwal.engine.occ import History
from kvwal.engine.version import Version
from kvwal.testing import SimulatedDisk

# Less than one reader of a former moment holds here, and as much as a few of them.
LIMIT = 50_000
MANY = 400_000


def key(number: int) -> bytes:
    return b"%04d" % number


def opened(most: int, **options: Any) -> kvwal.Store:
    return kvwal.open(
        "/kv", files=SimulatedDisk(), background=False, durability="os", max_snapshot_bytes=most, **options
    )


def age(db: kvwal.Store, generations: int = 1) -> None:
    """Write over all there is, so that what is older holds as much as it can."""
    for _ in range(generations):
        db.update({key(number): b"%d" % db.last_seqno * 20 for number in range(200)})
        db.checkpoint()


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with opened(LIMIT) as store:
        age(store)
        yield store


READS: dict[str, Callable[[Any], object]] = {
    "get": lambda reader: reader.get(key(3)),
    "get_many": lambda reader: reader.get_many([key(3), key(4)]),
    "in": lambda reader: key(3) in reader,
    "scan": lambda reader: list(reader.scan()),
    "short scan": lambda reader: list(reader.scan(limit=3)),
    "in reverse": lambda reader: reader.last(),
    "len": len,
}


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("kind", ["snapshot", "transaction", "read-only transaction"])
def test_the_oldest_reader_is_given_up_and_says_so(db: kvwal.Store, kind: str, name: str) -> None:
    make = {
        "snapshot": db.snapshot,
        "transaction": db.transaction,
        "read-only transaction": lambda: db.transaction(read_only=True),
    }[kind]
    reader: Any = make()
    seqno = reader.seqno
    while readers_in(db.pins()):
        age(db)
        assert db.last_seqno < 50
    with pytest.raises(SnapshotTooOld, match="max_snapshot_bytes") as caught:
        READS[name](reader)
    assert (caught.value.asked, caught.value.limit_bytes) == (seqno, LIMIT)
    # The next one is refused as well, with an error of its own.
    with pytest.raises(SnapshotTooOld) as again:
        READS[name](reader)
    assert again.value is not caught.value
    (reader.close if isinstance(reader, kvwal.Snapshot) else reader.abort)()


def test_what_is_held_stays_below_the_limit_and_the_youngest_stay() -> None:
    db = opened(MANY)
    age(db)
    model, snapshots = [], []
    for _ in range(20):
        model.append(dict(db))
        snapshots.append(db.snapshot())
        age(db)
        succession = db.engine._succession
        assert succession._held_bytes(succession._former) <= MANY
    held = {pin.seqno for pin in readers_in(db.pins())}
    given_up = [snapshot for snapshot in snapshots if snapshot.seqno not in held]
    assert given_up == snapshots[: len(given_up)], "the oldest first"
    assert 10 < len(given_up) < 20
    for snapshot, expected in zip(snapshots[len(given_up) :], model[len(given_up) :], strict=True):
        assert dict(snapshot) == expected
    pages = db.engine._pages
    for snapshot in snapshots:
        snapshot.close()
    age(db, 3)
    assert pages.pins.counts() == {pages.meta.generation: 1}
    db.close()


def test_with_no_limit_to_speak_of_nothing_is_given_up() -> None:
    with opened(1 << 30) as db:
        age(db)
        snapshot = db.snapshot()
        expected = dict(db)
        age(db, 12)
        assert dict(snapshot) == expected
        snapshot.close()


def test_a_reader_of_now_is_never_given_up() -> None:
    with opened(0) as db:
        age(db)
        before = db.snapshot()
        db[b"k"] = b"v"
        now = db.snapshot()
        db.checkpoint()
        after = db.snapshot()
        for snapshot in (before, now):
            with pytest.raises(SnapshotTooOld):
                snapshot.get(b"k")
        assert after[b"k"] == b"v"
        for snapshot in (before, now, after):
            snapshot.close()


def test_a_scan_that_is_under_way_says_so_at_its_next_chunk(db: kvwal.Store) -> None:
    db.update({key(number): b"v" for number in range(2000)})
    with db.snapshot() as snapshot:
        scan = iter(snapshot.scan())
        assert next(scan)[0] == key(0)
        age(db, 12)
        with pytest.raises(SnapshotTooOld):
            list(scan)


@pytest.mark.parametrize("found", ["a value", "an error"])
def test_what_is_read_while_its_moment_is_given_up_is_not_told(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """Its pages may have been written over meanwhile: what was found may be of no moment, or not verify."""
    original = Version.get

    def get(self: Version, *args: Any, **kwargs: Any) -> Any:
        value = original(self, *args, **kwargs)
        monkeypatch.setattr(Version, "get", original)
        age(db, 12)
        if found == "an error":
            raise kvwal.CorruptionError("data", 0, "written over")
        return value

    with db.snapshot() as snapshot:
        db[key(3)] = b"new"
        monkeypatch.setattr(Version, "get", get)
        with pytest.raises(SnapshotTooOld):
            snapshot.get(key(3))


@pytest.mark.parametrize("found", ["a chunk", "an error"])
def test_the_first_chunk_of_a_scan_that_is_given_up_meanwhile_is_not_told(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    original = Version.chunks

    def chunks(self: Version, *args: Any, **kwargs: Any) -> Iterator[Any]:
        monkeypatch.setattr(Version, "chunks", original)
        found_chunks = list(original(self, *args, **kwargs))
        age(db, 12)
        if found == "an error":
            raise kvwal.CorruptionError("data", 0, "written over")
        yield from found_chunks

    with db.snapshot() as snapshot:
        db[key(3)] = b"new"
        monkeypatch.setattr(Version, "chunks", chunks)
        with pytest.raises(SnapshotTooOld):
            next(iter(snapshot.scan()))


def test_readers_that_have_left_hold_nothing() -> None:
    with opened(1 << 30) as db:
        snapshot = db.snapshot()
        age(db)
        snapshot.close()
        assert not db.engine._succession.bound_readers(0)


def test_pages_count_that_only_former_moments_need(db: kvwal.Store) -> None:
    def rewrite() -> None:
        db.update({key(number): b"%d" % db.last_seqno * 300 for number in range(200)})
        db.checkpoint()

    rewrite()
    engine = db.engine
    space, generation = engine._pages.space, engine._pages.meta.generation
    with db.snapshot() as snapshot:
        # So its memtable is small.
        db[key(0)] = b"v"
        db.checkpoint()
        rewrite()
        # The generation before needs them too.
        assert len(snapshot) == 200
        db[key(0)] = b"v"
        db.checkpoint()
        assert space.held_bytes(engine._pages.meta, {generation}) > LIMIT
        with pytest.raises(SnapshotTooOld):
            len(snapshot)


def test_what_now_needs_as_well_does_not_count(db: kvwal.Store) -> None:
    engine = db.engine
    db.update({key(number): bytes(500) for number in range(200)})
    snapshot = db.snapshot()
    before = engine._pages.meta
    engine._succession.install(engine.state.version.tree)
    assert engine._succession._former == [snapshot.reader.version]
    # The memtable is still that of now, and so are the pages; or they are those of the generation before.
    assert engine._succession._held_bytes(engine._succession._former) == 0
    db.checkpoint()
    assert engine._pages.older == before
    assert engine._pages.space.held_bytes(engine._pages.meta, {before.generation}) == 0
    snapshot.close()


def test_a_transaction_that_was_given_up_conflicts_and_is_run_again(db: kvwal.Store) -> None:
    txn = db.transaction()
    assert txn[key(3)] is not None
    txn[b"result"] = b"1"
    age(db, 12)
    with pytest.raises(ConflictError):
        txn.commit()
    tries = 0

    def work(txn: kvwal.Transaction) -> None:
        nonlocal tries
        tries += 1
        assert txn[key(3)] is not None
        if tries == 1:
            age(db, 12)
        txn[b"result"] = b"%d" % tries

    db.run(work)
    assert (tries, db[b"result"]) == (2, b"2")


def test_a_transaction_that_is_given_up_while_it_is_validated_conflicts(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on the history is no longer kept for it: what was found out from it says nothing."""
    original = History._conflict
    txn = db.transaction()
    assert txn[key(3)] is not None
    txn[b"result"] = b"1"

    def conflict(self: History, *args: Any) -> Any:
        found = original(self, *args)
        reader = txn._open.reader
        assert reader is not None
        reader.give_up(SnapshotTooOld(1, 2, 3))
        return found

    monkeypatch.setattr(History, "_conflict", conflict)
    with pytest.raises(ConflictError, match="given up"):
        txn.commit()
    assert b"result" not in db


@given(st.randoms(use_true_random=False))
def test_a_reader_shows_its_moment_or_says_that_it_is_too_old(random: Random) -> None:
    db = opened(random.choice([0, 50_000, 300_000]), memtable_bytes=16 << 10)
    model: dict[bytes, bytes] = {}
    held: list[tuple[kvwal.Snapshot, dict[bytes, bytes]]] = []
    for _ in range(random.randrange(40)):
        kind = random.randrange(5)
        if kind < 2:
            changes = {key(random.randrange(100)): bytes(random.randrange(400)) for _ in range(random.randrange(1, 60))}
            db.update(changes)
            model.update(changes)
        elif kind == 2:
            db.checkpoint()
        elif kind == 3:
            held.append((db.snapshot(), dict(model)))
        elif held:
            snapshot, expected = random.choice(held)
            try:
                assert dict(snapshot) == expected
                assert len(snapshot) == len(expected)
            except SnapshotTooOld:
                assert snapshot.reader not in db.engine.reads.moments.readers.all()
    for snapshot, _ in held:
        snapshot.close()
    assert dict(db) == model
    db.close()


def test_the_limit_is_an_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_snapshot_bytes"):
        kvwal.open(tmp_path / "db", max_snapshot_bytes=-1)
