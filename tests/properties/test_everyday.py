"""The life of a process: transactions that grow too large or stay open too long, and signals at any moment.

Signals come in processes of their own, since a handler that never returns would take the test run with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_fixtures import check_store

import kvwal
import kvwal.db.transaction
import kvwal.engine.occ
from kvwal.engine.occ import History, ReadSet
from kvwal.errors import TransactionTooLargeError
from kvwal.keys import KeyRange, Seqno
from kvwal.testing import SimulatedDisk

KEYS = [b"", b"\0", *(b"k%d" % number for number in range(10)), b"\xff"]


def opened(**options: Any) -> kvwal.Store:
    options = {"background": False, "durability": "os", **options}
    return kvwal.open("/kv", files=SimulatedDisk(), **options)


# -- the history of conflicts ---------------------------------------------------------------------


def bounds_of(random: Random) -> KeyRange:
    while True:
        bounds = KeyRange(random.choice(KEYS), random.choice([None, *KEYS]))
        if not bounds.is_empty():
            return bounds


@pytest.mark.parametrize("recent_keys", [1, 3, 4096])
@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_a_packed_history_conflicts_exactly_where_the_plain_rule_does(recent_keys: int, random: Random) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvwal.engine.occ, "_RECENT_KEYS", recent_keys)
        history = History()
        seqno = random.randrange(5)
        history.begin(Seqno(seqno))
        began = seqno
        commits: list[tuple[int, set[bytes], list[KeyRange]]] = []
        #: Moments of the transactions that are open.
        open_at = [seqno]
        for _ in range(random.randrange(30)):
            seqno += 1
            keys = {random.choice(KEYS) for _ in range(random.randrange(4))}
            ranges = [bounds_of(random) for _ in range(random.choice([0, 0, 0, 1, 2]))]
            for _ in range(random.choice([1, 1, 2])):
                # Recording it again, after an interruption, is harmless.
                history.record(Seqno(seqno), keys, ranges, Seqno(min(open_at)))
            commits.append((seqno, keys, ranges))
            if random.randrange(2):
                open_at.append(seqno)
            if len(open_at) > 1 and not random.randrange(3):
                open_at.pop(random.randrange(len(open_at)))
            since = random.choice(open_at)
            read = {random.choice(KEYS) for _ in range(random.randrange(3))}
            read_ranges = [bounds_of(random) for _ in range(random.choice([0, 0, 1]))]
            expected = any(
                at > since
                and (
                    written & read
                    or any(bounds.contains(key) for bounds in deleted for key in read)
                    or any(bounds.contains(key) for bounds in read_ranges for key in written)
                    or any(bounds.overlaps(other) for bounds in read_ranges for other in deleted)
                )
                for at, written, deleted in commits
            )
            found = history.conflict(ReadSet(Seqno(since), read, read_ranges))
            assert (found is not None) == expected, (since, read, read_ranges)
            if found is not None:
                assert since < found.seqno <= seqno
        assert history.conflict(ReadSet(Seqno(began - 1), [b"k1"], [])) is not None


@pytest.mark.parametrize("what", ["keys", "ranges", "both"])
def test_a_history_stays_within_its_bytes_and_what_it_forgot_conflicts(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(kvwal.engine.occ, "_RECENT_KEYS", 16)
    history = History(max_bytes=20_000)
    history.begin(Seqno(1))
    for number in range(2, 4000):
        keys = [b"%06d" % number] if what != "ranges" else []
        ranges = [KeyRange(b"r%06d" % number, b"r%06d!" % number)] if what != "keys" else []
        history.record(Seqno(number), keys, ranges, Seqno(1))
        assert history.bytes_used <= 20_000 + 16 * 400
    # It has nothing to do with what was written, but nothing is known of so long ago.
    assert history.conflict(ReadSet(Seqno(1), [b"other"], [])) is not None
    assert history.conflict(ReadSet(Seqno(3999), [b"other"], [])) is None
    assert history.floor > 1
    if what == "keys":
        assert history.conflict(ReadSet(Seqno(3990), [b"003995"], [])) is not None
        assert history.conflict(ReadSet(Seqno(3990), [b"003985"], [])) is None


def test_a_key_that_is_written_over_and_over_takes_the_memory_of_one() -> None:
    history = History(max_bytes=20_000)
    history.begin(Seqno(1))
    for number in range(2, 2000):
        history.record(Seqno(number), [b"hot"], [], Seqno(1))
    assert history.bytes_used < 20_000
    assert history.conflict(ReadSet(Seqno(1), [b"cold"], [])) is None
    assert history.conflict(ReadSet(Seqno(1), [b"hot"], [])) is not None


def test_a_transaction_beyond_the_history_conflicts_and_may_run_again() -> None:
    with opened() as db:
        db.engine.reads.moments.history.max_bytes = 50_000
        txn = db.transaction()
        txn.get(b"untouched")
        txn[b"result"] = b"1"
        for number in range(5000):
            db[b"%06d" % number] = b""
        with pytest.raises(kvwal.ConflictError):
            txn.commit()
        assert b"result" not in db
        with db.transaction() as again:
            again.get(b"untouched")
            again[b"result"] = b"2"
        assert db[b"result"] == b"2"


# -- limits in bytes ------------------------------------------------------------------------------


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kvwal.db.part, "MAX_TRANSACTION_BYTES", 20_000)
    return 20_000


def put_much(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        txn[b"new%06d" % number] = b"x" * 10


def put_one_large(txn: kvwal.Transaction) -> None:
    txn[b"new"] = b"x" * 30_000


def delete_much(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        txn.delete(b"new%06d" % number)


def delete_ranges(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        txn.delete_range(b"new%06d" % number, b"new%06d!" % number)


def get_much(txn: kvwal.Transaction) -> None:
    txn[b"new"] = b"1"
    for number in range(1000):
        txn.get(b"%06d" % number)


def get_items(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        assert txn[b"%06d" % number] == b"old"


def get_many(txn: kvwal.Transaction) -> None:
    txn.get_many([b"%06d" % number for number in range(1000)])


def get_what_is_not_there(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        txn.get(b"nothing%06d" % number)


def scan_much(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        list(txn.scan(b"%06d" % number, limit=1))


def count_much(txn: kvwal.Transaction) -> None:
    for number in range(1000):
        len(txn.keys(b"%06d" % number))


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize(
    "use",
    [
        put_much, put_one_large, delete_much, delete_ranges, get_much, get_items, get_many, get_what_is_not_there,
        scan_much, count_much,
    ],
)  # fmt: skip
def test_a_transaction_beyond_its_bytes_is_refused_and_writes_nothing(use: Callable[[kvwal.Transaction], None]) -> None:
    with opened() as db:
        db.update({b"%06d" % number: b"old" for number in range(1000)})
        db.checkpoint()
        before = dict(db)
        seqno = db.last_seqno
        with pytest.raises(TransactionTooLargeError) as caught, db.transaction() as txn:
            use(txn)
        assert caught.value.limit == 20_000
        assert not txn.is_open
        assert dict(db) == before
        assert db.last_seqno == seqno
        assert [pin for pin in db.pins() if pin.thread_name] == []
        check_store(db)


@pytest.mark.usefixtures("small_limit")
def test_a_transaction_that_was_refused_can_be_aborted_or_committed_without_what_was_refused() -> None:
    with opened() as db:
        txn = db.transaction()
        txn[b"a"] = b"1"
        with pytest.raises(TransactionTooLargeError):
            txn[b"b"] = b"x" * 30_000
        txn.abort()
        assert dict(db) == {}
        txn = db.transaction()
        txn[b"a"] = b"1"
        with pytest.raises(TransactionTooLargeError):
            txn[b"b"] = b"x" * 30_000
        txn.commit()
        assert dict(db) == {b"a": b"1"}


@pytest.mark.usefixtures("small_limit")
def test_a_snapshot_and_a_read_only_transaction_need_not_remember_what_they_read() -> None:
    with opened() as db:
        db.update({b"%06d" % number: b"old" for number in range(1000)})
        with db.snapshot() as snapshot:
            for number in range(1000):
                assert snapshot[b"%06d" % number] == b"old"
        with db.transaction(read_only=True) as txn:
            for number in range(1000):
                assert txn[b"%06d" % number] == b"old"


@pytest.mark.usefixtures("small_limit")
def test_a_long_scan_in_a_transaction_is_one_range() -> None:
    with opened() as db:
        db.update({b"%06d" % number: b"old" for number in range(1000)})
        with db.transaction() as txn:
            assert len(list(txn.scan())) == 1000
            txn[b"n"] = b"1"
        assert db[b"n"] == b"1"


# -- signals --------------------------------------------------------------------------------------

PRELUDE = """
    import os, random, signal, sys, time, logging, traceback
    import kvwal
    from kvwal.errors import ReentrancyError
    logging.getLogger("kvwal").setLevel(logging.CRITICAL)
    import atexit
    # Else a signal that comes after the handlers are gone would end the process, and hide what failed.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
    path, what, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    small = dict(memtable_bytes=64 << 10, segment_bytes=64 << 10, checkpoint_log_bytes=1 << 18)
    db = kvwal.open(path, durability=os.environ.get("DURABILITY", "os"), **small)

    def transact(n):
        with db.transaction() as txn:
            txn[b"t"] = txn.get(b"t", b"") [:50] + b"x"
            txn[b"k%05d" % (n % 500)] = b"%d" % n

    def do(what, n):
        if what == "put":
            db[b"k%05d" % (n % 500)] = b"%d" % n
        elif what == "get":
            db.get(b"k%05d" % (n % 500))
            db.get(b"absent%d" % n)
        elif what == "scan":
            list(db.scan(limit=500))
            list(db.scan(b"k00100", limit=3, reverse=True))
        elif what == "commit":
            with db.batch() as batch:
                batch.put(b"b%05d" % (n % 500), b"x")
                batch.delete_range(b"b%05d" % (n % 77), b"b%05d" % (n % 77 + 3))
        elif what == "transaction":
            transact(n)
        elif what == "checkpoint":
            db[b"k%05d" % (n % 500)] = b"%d" % n
            db.checkpoint()
        elif what == "len":
            db[b"k%05d" % (n % 500)] = b"%d" % n
            len(db), len(db.keys(b"k00100", b"k00300"))
        elif what == "snapshot":
            with db.snapshot() as snapshot:
                snapshot.get(b"k00001"), snapshot.first(), len(snapshot)
        elif what == "stats":
            db.stats(), db.pins()
        elif what == "operation":
            db.add(b"n", 1), db.pop(b"k%05d" % (n % 500), None), db.put_if_absent(b"p%05d" % (n % 50), b"")
        elif what == "verify":
            db.verify()
        elif what == "sync":
            db.sync()
        elif what == "compact":
            db.compact()
        elif what == "history":
            after = max(0, db.last_seqno - 20)
            try:
                got = [record.seqno for _, record in zip(range(20), db.history(after))]
                assert got == list(range(after + 1, after + 1 + len(got))), (after, got)
            except kvwal.FeedGap as gap:
                # A checkpoint has removed that log. A gap is told, never skipped.
                assert gap.asked == after < gap.oldest - 1, (after, gap)

    ALL = ["put", "get", "scan", "commit", "transaction", "len", "snapshot", "stats", "operation", "sync"]
    RARE = ["checkpoint", "verify", "compact", "history"] if what.startswith("all") else ["history"]
"""

#: What a test run prints to fail it: where each thread stands.
HANGS = """
    import faulthandler
    faulthandler.dump_traceback_later({after}, exit=True)
"""


def run_child(body: str, path: Path, what: str, seconds: float, **environment: str) -> subprocess.Popen[str]:
    # One block after the other, each with an indentation of its own.
    code = "".join(textwrap.dedent(part) for part in (HANGS.format(after=seconds + 40), PRELUDE, body))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), what, str(seconds)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


TERMINATED = """
    def handler(number, frame):
        db.close()
        sys.exit(0)

    signal.signal(signal.SIGTERM, handler)
    print("ready", flush=True)
    n = 0
    while True:
        n += 1
        do(what, n)
"""


def terminate_once(path: Path, what: str, delay_s: float, durability: str) -> None:
    child = run_child(TERMINATED, path, what, 20, DURABILITY=durability)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.communicate()
    time.sleep(delay_s)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=70)
    assert child.returncode == 0, (what, delay_s, out, err)
    with kvwal.open(path, "w") as db:
        assert db.verify().ok


@pytest.mark.parametrize("what", ["put", "scan", "commit", "checkpoint"])
def test_a_handler_of_sigterm_that_closes_and_exits_ends_the_process(tmp_path: Path, rng: Random, what: str) -> None:
    for durability in ("commit", "os"):
        terminate_once(tmp_path / durability, what, rng.uniform(0.01, 0.1), durability)


@pytest.mark.slow
def test_many_processes_are_ended_by_a_handler_of_sigterm(tmp_path: Path, rng: Random) -> None:
    works = ["put", "scan", "commit", "checkpoint", "transaction", "len", "snapshot", "operation", "verify", "compact"]
    end = time.monotonic() + 20
    number = 0
    while time.monotonic() < end:
        what = works[number % len(works)]
        terminate_once(tmp_path / str(number % 40), what, rng.uniform(0, 0.06), rng.choice(["commit", "os"]))
        number += 1
    assert number > 10


# Any call of the store in a handler, while the main thread makes any call.
NESTED = """
    CALLS = ["get", "put", "scan", "len", "snapshot", "transaction", "checkpoint", "stats", "pop", "sync"]
    acknowledged = {}
    refused = nested = 0
    chosen = random.Random(int(what.rpartition(":")[2]))
    inside = False

    def handler(number, frame):
        # The handler writes keys of its own, each value once: what it was told is what must be there.
        global refused, nested, inside
        if inside:
            return
        inside = True
        name = chosen.choice(CALLS)
        key = b"h%06d" % nested
        nested += 1
        try:
            if name == "put":
                db[key] = key
                acknowledged[key] = key
            elif name == "transaction":
                with db.transaction() as txn:
                    txn[key] = key
                    txn.get(b"k00001")
                acknowledged[key] = key
            elif name == "pop":
                db.pop(b"nothing", None)
            else:
                do(name, 1) if name != "len" else len(db)
        except ReentrancyError:
            refused += 1
            acknowledged.setdefault(key, None)
        except kvwal.ConflictError:
            acknowledged.setdefault(key, None)
        finally:
            inside = False

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    end = time.monotonic() + seconds
    n = 0
    main = {}
    while time.monotonic() < end:
        n += 1
        work = chosen.choice(ALL + (RARE if n % 5 == 0 else []))
        try:
            if work == "put":
                key = b"m%06d" % n
                db[key] = key
                main[key] = key
            else:
                do(work, n)
        except kvwal.ConflictError:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    for key, value in {**acknowledged, **main}.items():
        assert db.get(key) == value, (key, value, db.get(key))
    assert len(db) == sum(1 for _ in db.scan())
    assert set(db.keys(prefix=b"h")) == {key for key, value in acknowledged.items() if value}
    db.checkpoint()
    report = db.verify()
    assert report.ok, report
    assert not [pin for pin in db.pins() if pin.thread_name]
    db.close()
    again = kvwal.open(path)
    for key, value in {**acknowledged, **main}.items():
        assert again.get(key) == value, key
    assert nested > 20 * seconds, nested
    print("nested", nested, "refused", refused, "calls", n)
"""

# The handler raises: an interruption. Each put says by its note whether it was written.
INTERRUPTED = """
    class Interruption(KeyboardInterrupt): pass

    chosen = random.Random(int(what.rpartition(":")[2]))
    armed = False
    raised = 0

    def handler(number, frame):
        global raised
        if armed:
            raised += 1
            raise Interruption

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.0101)
    end = time.monotonic() + seconds
    expected = {}
    unsure = set()
    places = {}
    last = None
    n = 0
    while time.monotonic() < end:
        n += 1
        work = chosen.choice(["own"] * 6 + ALL + (RARE if n % 5 == 0 else []))
        key = b"m%06d" % n
        done = False
        try:
            try:
                armed = True
                if work == "own":
                    db[key] = key
                    done = True
                else:
                    do(work, n)
                armed = False
            finally:
                armed = False
        except Interruption as error:
            last = places[key] = (work, traceback.format_exception(error))
            if work == "own":
                notes = []
                # Interrupted twice, the first one may have the note.
                each = error
                while each is not None:
                    notes += getattr(each, "__notes__", [])
                    each = each.__context__
                done = done or any("was written" in note for note in notes)
                if not done and not notes:
                    # Raised before the put began or after it returned: only where the call itself was left, its note
                    # speaks. What is there is what it says.
                    trace = error.__traceback__
                    names = []
                    while trace is not None:
                        names.append(trace.tb_frame.f_code.co_filename)
                        trace = trace.tb_next
                    if not any("kvwal" in name for name in names):
                        unsure.add(key)
        except kvwal.ConflictError:
            pass
        except ReentrancyError:
            # No call is nested here: a lock was kept.
            print("after", *last, sep="\\n", file=sys.stderr)
            raise
        if work == "own" and key not in unsure:
            expected[key] = key if done else None
    signal.setitimer(signal.ITIMER_REAL, 0)
    for key, value in expected.items():
        assert db.get(key) == value, (key, value, db.get(key), *places[key])
    db[b"after"] = b"1"
    assert len(db) == sum(1 for _ in db.scan())
    db.checkpoint()
    report = db.verify()
    assert report.ok, report
    import gc
    gc.collect()
    assert not [pin for pin in db.pins() if pin.thread_name]
    db.close()
    again = kvwal.open(path)
    for key, value in expected.items():
        assert again.get(key) == value, key
    assert raised > 5 * seconds, raised
    print("raised", raised, "unsure", len(unsure), "calls", n)
"""


def check_child(body: str, path: Path, seed: int, seconds: float, durability: str, works: str = "all") -> None:
    child = run_child(body, path, f"{works}:{seed}", seconds, DURABILITY=durability)
    out, err = child.communicate(timeout=seconds + 100)
    assert child.returncode == 0, (seed, out, err)


@pytest.mark.parametrize("durability", ["commit", "os"])
def test_a_handler_that_calls_the_store_is_answered_or_refused(tmp_path: Path, seed: int, durability: str) -> None:
    check_child(NESTED, tmp_path / "s", seed, 1.0, durability)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_handlers_that_call_the_store_for_some_seconds(tmp_path: Path, seed: int, number: int) -> None:
    check_child(NESTED, tmp_path / "s", seed, 5.0, ["commit", "os"][number % 2])


@pytest.mark.parametrize("durability", ["commit", "os"])
@pytest.mark.parametrize("works", ["commits", "all"])
def test_a_handler_that_raises_poisons_nothing_and_each_put_is_as_its_note_says(
    tmp_path: Path, seed: int, durability: str, works: str
) -> None:
    """`all`: checkpoints as well."""
    check_child(INTERRUPTED, tmp_path / "s", seed, 1.0, durability, works)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_handlers_that_raise_for_some_seconds(tmp_path: Path, seed: int, number: int) -> None:
    check_child(INTERRUPTED, tmp_path / "s", seed, 5.0, ["commit", "os"][number % 2], ["commits", "all"][number // 2])
