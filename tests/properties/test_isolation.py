"""Isolation: Hermitage's anomalies, each tried by name, and histories of many threads, searched by `crashtests.cycles`.

T1, T2 and T3 are transactions that overlap as the test writes them down. The names are those of
github.com/ept/hermitage: G0 and G1 from Adya's thesis, OTV and PMP from the same and from Bailis, P4 from Berenson.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_fixtures import TINY, run_threads

import kvwal
from crashtests.cycles import Observed, decode, encode, find
from kvwal import ConflictError, Store, Transaction


@pytest.fixture(params=["in the memtable", "in the pages", "frozen"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A store with 1: 10 and 2: 20, held in each of the places where a value can be."""
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as store:
        store.update({b"1": b"10", b"2": b"20"})
        if request.param == "in the pages":
            store.checkpoint()
        elif request.param == "frozen":
            store.engine._succession.freeze()
        yield store


def commits(txn: Transaction) -> bool:
    """Commit; whether it was possible."""
    try:
        txn.commit()
    except ConflictError:
        return False
    return True


def state(db: Store) -> dict[bytes, bytes]:
    return dict(db.items())


# -- Hermitage ------------------------------------------------------------------------------------


def test_g0_write_cycles_are_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    t1[b"1"] = b"11"
    t2[b"1"] = b"12"
    t1[b"2"] = b"21"
    t1.commit()
    assert state(db) == {b"1": b"11", b"2": b"21"}
    t2[b"2"] = b"22"
    t2.commit()
    assert state(db) == {b"1": b"12", b"2": b"22"}, "blind writes take effect as a whole, in the order of the commits"


def test_g1a_aborted_reads_are_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    t1[b"1"] = b"101"
    assert t2[b"1"] == b"10"
    assert dict(t2.items()) == {b"1": b"10", b"2": b"20"}
    t1.abort()
    assert t2[b"1"] == b"10"
    t2[b"3"] = b"30"
    assert commits(t2), "an aborted transaction conflicts with no other"
    assert db[b"1"] == b"10"


def test_g1b_intermediate_reads_are_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    t1[b"1"] = b"101"
    assert t2[b"1"] == b"10"
    t1[b"1"] = b"11"
    t1.commit()
    assert t2[b"1"] == b"10"
    assert db[b"1"] == b"11"


def test_g1c_circular_information_flow_is_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    t1[b"1"] = b"11"
    t2[b"2"] = b"22"
    assert t1[b"2"] == b"20"
    assert t2[b"1"] == b"10"
    assert commits(t1)
    assert not commits(t2), "each would have to come before the other"


def test_otv_observed_transactions_do_not_vanish(db: Store) -> None:
    t1, t2, t3 = db.transaction(), db.transaction(), db.transaction()
    t1[b"1"] = b"11"
    t1[b"2"] = b"19"
    t2[b"1"] = b"12"
    t1.commit()
    assert t3[b"1"] == b"10"
    t2[b"2"] = b"18"
    t2.commit()
    assert t3[b"2"] == b"20"
    assert t3[b"1"] == b"10"
    late = db.transaction()
    assert (late[b"1"], late[b"2"]) == (b"12", b"18")


def test_pmp_a_predicate_reads_the_same_twice(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()

    def thirties() -> list[tuple[bytes, bytes]]:
        return [pair for pair in t1.items() if pair[1] == b"30"]

    assert thirties() == []
    t2[b"3"] = b"30"
    t2.commit()
    assert thirties() == []
    t1[b"sum"] = b"0"
    assert not commits(t1), "the range it read has a new member"


def test_pmp_write_a_predicate_that_writes_sees_no_half_of_another(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    for key, value in t1.items():
        t1[key] = b"%d" % (int(value) + 10)
    for key, value in t2.items():
        if value == b"20":
            del t2[key]
    assert commits(t1)
    assert not commits(t2)
    assert state(db) == {b"1": b"20", b"2": b"30"}


def test_p4_lost_updates_are_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    seen = t1[b"1"], t2[b"1"]
    assert seen == (b"10", b"10")
    t1[b"1"] = b"11"
    t2[b"1"] = b"11"
    assert commits(t1)
    assert not commits(t2)


def test_g_single_read_skew_is_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    assert t1[b"1"] == b"10"
    t2[b"1"] = b"12"
    t2[b"2"] = b"18"
    t2.commit()
    assert t1[b"2"] == b"20", "both reads are of one moment"


def test_g_single_dependencies_through_predicates_are_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    assert all(int(value) % 5 == 0 for value in t1.values())
    t2[b"1"] = b"12"
    t2.commit()
    assert [value for value in t1.values() if int(value) % 3 == 0] == []


def test_g_single_write_predicate_is_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    assert t1[b"1"] == b"10"
    t2.update({b"1": b"12", b"2": b"18"})
    t2.commit()
    for key in [key for key, value in t1.items() if value == b"20"]:
        del t1[key]
    assert not commits(t1)
    assert state(db) == {b"1": b"12", b"2": b"18"}


def test_g2_item_write_skew_is_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    for txn in (t1, t2):
        assert txn.get_many([b"1", b"2"]) == [b"10", b"20"]
    t1[b"1"] = b"11"
    t2[b"2"] = b"21"
    assert commits(t1)
    assert not commits(t2)


def test_g2_anti_dependency_cycles_through_predicates_are_prevented(db: Store) -> None:
    t1, t2 = db.transaction(), db.transaction()
    for txn in (t1, t2):
        assert [value for value in txn.values() if int(value) % 3 == 0] == []
    t1[b"3"] = b"30"
    t2[b"4"] = b"42"
    assert commits(t1)
    assert not commits(t2)


def test_g2_a_cycle_of_two_edges_and_a_reader_is_prevented(db: Store) -> None:
    """Fekete's read-only anomaly: the reader sees T2 and not T1, so T1 may no longer come before T2."""
    t1 = db.transaction()
    assert t1.get_many([b"1", b"2"]) == [b"10", b"20"]
    t2 = db.transaction()
    t2[b"2"] = b"%d" % (int(t2[b"2"]) + 5)
    assert commits(t2)
    reader = db.transaction(read_only=True)
    assert dict(reader.items()) == {b"1": b"10", b"2": b"25"}
    reader.commit()
    t1[b"1"] = b"0"
    assert not commits(t1)


# -- phantoms, by every way to read a range -------------------------------------------------------

READS: dict[str, Callable[[Transaction], object]] = {
    "scan": lambda txn: list(txn.scan(b"d", b"h")),
    "scan backwards": lambda txn: list(txn.scan(b"d", b"h", reverse=True)),
    "prefix": lambda txn: list(txn.scan(prefix=b"f")),
    "keys": lambda txn: list(txn.keys(b"d", b"h")),
    "values": lambda txn: list(txn.values(b"d", b"h")),
    "count of a range": lambda txn: len(txn.keys(b"d", b"h")),
    "len": len,
    "bool": bool,
    "first": lambda txn: txn.first(b"d"),
    "last": lambda txn: txn.last(None, b"h"),
    "limit": lambda txn: list(txn.scan(b"d", limit=1)),
    "limit backwards": lambda txn: list(txn.scan(None, b"h", reverse=True, limit=1)),
    "keys with a limit": lambda txn: list(txn.keys(b"d", limit=1)),
    "count up to a limit": lambda txn: len(txn.keys(None, b"h", reverse=True, limit=1)),
    "missing key": lambda txn: txn.get(b"f"),
    "contains": lambda txn: b"f" in txn,
    "contains in a view": lambda txn: b"f" in txn.keys(b"d", b"h"),
    "setdefault": lambda txn: txn.setdefault(b"f", b"mine"),
    "pop": lambda txn: txn.pop(b"f", None),
    "popitem": lambda txn: txn.popitem() if txn else None,
    "iterate": lambda txn: [key for key in txn],  # noqa: C416 - the loop itself
    "reversed": lambda txn: list(reversed(txn)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_phantom_put_into_what_was_read_is_a_conflict(tmp_path: Path, read: Callable[[Transaction], object]) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as db:
        txn = db.transaction()
        read(txn)
        db[b"f"] = b"phantom"
        txn[b"z"] = b"z"
        assert not commits(txn)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_deletion_of_what_was_read_is_a_conflict(tmp_path: Path, read: Callable[[Transaction], object]) -> None:
    for by_range in (False, True):
        with kvwal.open(tmp_path / f"{by_range}.kv", durability="os", background=False) as db:
            db[b"f"] = b"there"
            txn = db.transaction()
            read(txn)
            if by_range:
                db.delete_range(b"e", b"g")
            else:
                db.delete(b"f")
            txn[b"y"] = b"y"
            assert not commits(txn)


def test_a_limit_reads_only_as_far_as_it_came(db: Store) -> None:
    db.update({b"%d" % number: b"" for number in range(3, 9)})
    txn = db.transaction()
    assert [key for key, _ in txn.scan(limit=2)] == [b"1", b"2"]
    assert [key for key, _ in txn.scan(reverse=True, limit=2)] == [b"8", b"7"]
    assert list(txn.keys(limit=2)) == [b"1", b"2"]
    assert list(txn.values(limit=2, reverse=True)) == [b"", b""]
    assert (len(txn.items(limit=3)), list(txn.items(b"7", limit=3))) == (3, [(b"7", b""), (b"8", b"")])
    db[b"5"] = b"between what was read"
    txn[b"x"] = b""
    assert commits(txn), "what lies beyond the limit was not read"


def test_a_limit_conflicts_in_a_gap_that_it_skipped_over(db: Store) -> None:
    for phantom, reverse in ((b"1x", False), (b"1x", True), (b"0", False), (b"3", True)):
        txn = db.transaction()
        list(txn.scan(limit=2, reverse=reverse))
        db[phantom] = b""
        txn[b"z"] = b""
        assert not commits(txn), (phantom, reverse)
        db.delete(phantom)


def test_an_iterator_left_early_reads_no_further_than_a_chunk(db: Store) -> None:
    db.update({b"m%05d" % number: b"" for number in range(5000)})
    txn = db.transaction()
    assert next(txn.scan())[0] == b"1"
    db[b"m04999x"] = b"far behind"
    txn[b"z"] = b""
    assert commits(txn)


def test_what_a_transaction_hides_itself_is_read_all_the_same(db: Store) -> None:
    """Its own deletes empty the range; what others do below them still changes what it would have seen."""
    txn = db.transaction()
    txn.delete_range(b"1", b"2")
    assert txn.first() == (b"2", b"20")
    db[b"0"] = b"in front of it"
    assert not commits(txn)


def test_own_writes_need_no_validation(db: Store) -> None:
    txn = db.transaction()
    txn[b"1"] = b"mine"
    assert txn[b"1"] == b"mine"
    db[b"1"] = b"theirs"
    assert commits(txn), "it never read what others had written there"
    assert db[b"1"] == b"mine"


def test_blind_writes_never_conflict(db: Store) -> None:
    txn = db.transaction()
    txn[b"1"] = b"mine"
    txn.delete(b"2")
    txn.delete_range(b"5", b"6")
    db.update({b"1": b"theirs", b"2": b"theirs", b"5": b"theirs"})
    assert commits(txn)
    assert state(db) == {b"1": b"mine"}


def test_a_read_only_transaction_never_conflicts_and_sees_one_moment(db: Store) -> None:
    with db.transaction(read_only=True) as txn:
        before = dict(txn.items())
        db.clear()
        db.checkpoint() if db.engine.state.version.frozen is None else None
        assert dict(txn.items()) == before
        assert txn[b"1"] == b"10"
        with pytest.raises(kvwal.ReadOnlyError):
            txn[b"1"] = b""


def test_a_transaction_conflicts_although_the_key_was_put_back(db: Store) -> None:
    """ABA: the value is the same again, but a commit in between saw another; being strict is right."""
    txn = db.transaction()
    assert txn[b"1"] == b"10"
    db[b"1"] = b"11"
    db[b"1"] = b"10"
    txn[b"2"] = b""
    assert not commits(txn)


def test_a_transaction_open_too_long_conflicts_rather_than_guesses(db: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.engine.occ._RECENT_KEYS", 4)
    db.engine.reads.moments.history.max_bytes = 100
    txn = db.transaction()
    assert txn[b"1"] == b"10"
    for number in range(20):
        db[b"other%d" % number] = b""
    txn[b"2"] = b""
    with pytest.raises(ConflictError, match="open too long"):
        txn.commit()


def test_conflicts_name_the_key_and_the_commit(db: Store) -> None:
    txn = db.transaction()
    txn[b"2"] = txn[b"1"]
    seqno = db.put(b"1", b"11")
    with pytest.raises(ConflictError) as caught:
        txn.commit()
    assert caught.value.key == b"1"
    assert caught.value.seqno == seqno


# -- threads --------------------------------------------------------------------------------------



@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads change places every few bytecodes, so that a gap between two of them is met."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switching_often")
@pytest.mark.parametrize("durability", ["commit", "os"])
def test_histories_of_many_threads_are_strictly_serializable(tmp_path: Path, durability: str, seed: int) -> None:
    keys = [b"list%d" % number for number in range(5)]
    history: list[Observed] = []
    numbers, clock = itertools.count(1), itertools.count(1)
    with kvwal.open(tmp_path / "a.kv", durability=durability, **TINY) as db:

        def client(index: int) -> None:
            rng = random.Random(f"{seed} {index}")
            for _ in range(60 if durability == "commit" else 150):
                seen = Observed(next(numbers), next(clock))
                history.append(seen)
                read_only = rng.random() < 0.3
                try:
                    with db.transaction(read_only=read_only) as txn:
                        if rng.random() < 0.3:
                            found = dict(txn.scan(prefix=b"list"))
                            reads = {key: decode(found.get(key)) for key in keys}
                        else:
                            reads = {key: decode(txn.get(key)) for key in rng.sample(keys, 2)}
                        for key, elements in reads.items():
                            seen.read(key, elements)
                        if not read_only:
                            for key in rng.sample(sorted(reads), rng.randint(1, 2)):
                                txn[key] = encode((*reads[key], seen.append(key)))
                except ConflictError:
                    seen.outcome = "failed"
                else:
                    seen.outcome, seen.seqno = "ok", txn.commit_seqno
                seen.ended = next(clock)

        run_threads(*(lambda index=index: client(index) for index in range(4)))
        final = {key: decode(db.get(key)) for key in keys}
    assert sum(seen.outcome == "ok" and bool(seen.appends) for seen in history) > 20, "hardly anything was committed"
    assert find(final, history) == []


@pytest.mark.usefixtures("switching_often")
def test_counters_of_many_threads_lose_nothing(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", **TINY) as db:

        @db.transactional
        def increment(txn: Transaction, key: bytes) -> None:
            txn[key] = b"%d" % (int(txn.get(key, b"0")) + 1)

        def client() -> None:
            for number in range(200):
                increment(b"c%d" % (number % 2))

        run_threads(*[client] * 4)
        assert state(db) == {b"c0": b"400", b"c1": b"400"}


@pytest.mark.usefixtures("switching_often")
def test_readers_see_whole_commits_and_never_go_back(tmp_path: Path) -> None:
    """A writer sets four keys to the same number, again and again; readers by every way see four equal numbers."""
    keys = [b"a", b"g", b"m", b"t"]
    with kvwal.open(tmp_path / "a.kv", durability="os", **TINY) as db:
        db.update(dict.fromkeys(keys, b"0"))
        over = threading.Event()

        def write() -> None:
            try:
                for number in range(1, 3000):
                    if number % 5:
                        db.update(dict.fromkeys(keys, b"%d" % number))
                    else:
                        with db.batch() as batch:
                            batch.delete_range()
                            batch.update(dict.fromkeys(keys, b"%d" % number))
            finally:
                over.set()

        def read(way: Callable[[], list[bytes | None]]) -> Callable[[], None]:
            def loop() -> None:
                last = 0
                while not over.is_set():
                    values = way()
                    assert len(values) == 4, values
                    assert len(set(values)) == 1, values
                    assert values[0] is not None
                    assert int(values[0]) >= last, "time went back"
                    last = int(values[0])

            return loop

        def in_transaction() -> list[bytes | None]:
            with db.transaction() as txn:
                return [txn.get(key) for key in keys]

        def in_snapshot() -> list[bytes | None]:
            with db.snapshot() as snapshot:
                assert len(snapshot) == 4
                return [value for _, value in snapshot.scan(reverse=True)]

        run_threads(
            write,
            read(lambda: db.get_many(keys)),
            read(lambda: list(db.values())),
            read(in_transaction),
            read(in_snapshot),
        )


@pytest.mark.usefixtures("switching_often")
def test_reads_of_one_key_never_go_back(tmp_path: Path) -> None:
    """Across freezes and settles, while other readers pull old values out of the pages into the rows."""
    with kvwal.open(tmp_path / "a.kv", durability="os", **TINY) as db:
        over = threading.Event()

        def write() -> None:
            try:
                for number in range(4000):
                    db[b"n"] = b"%d" % number
                    db[b"fill%d" % (number % 200)] = b"x" * 100
            finally:
                over.set()

        def read() -> None:
            last = 0
            while not over.is_set():
                value = db.get(b"n")
                number = int(value) if value else 0
                assert number >= last
                last = number

        run_threads(write, read, read)
