"""Stretches without a live key: what is skipped holds none, and the head of a queue stays near."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sortedcontainers import SortedDict

import kvwal
import kvwal.engine.gaps
from kvwal.batch import WriteBatch
from kvwal.engine.gaps import _MOST_TABLES, Gaps, TableGaps
from kvwal.engine.key_order import KeyOrder
from kvwal.keys import KeyRange, Seqno
from kvwal.testing import SimulatedDisk

KEYS = [b"", b"\0", *(b"k%02d" % n for n in range(6)), b"\xff"]
ENDS = [None, *KEYS[1:], b"b", b"k05\0", b"\xff\xff"]


class Model:
    """Live keys at each moment, and gaps that scans of these moments propose, as the state uses them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.gaps = Gaps()
        self.moments: list[set[bytes]] = [set()]

    @property
    def now(self) -> int:
        return len(self.moments) - 1

    @property
    def live(self) -> set[bytes]:
        return self.moments[-1]

    def put(self, keys: list[bytes]) -> None:
        self.moments.append(self.live | set(keys))
        if self.gaps.active:
            self.gaps.written(Seqno(self.now), keys)

    def delete(self, keys: list[bytes]) -> None:
        self.moments.append(self.live - set(keys))
        # A tombstone is a write as well.
        if self.gaps.active:
            self.gaps.written(Seqno(self.now), keys)

    def propose(self) -> None:
        """A scan of a recent moment passed dead keys; it began at one end, or where a gap ended."""
        seqno = max(0, self.now - self.random.choice([0, 0, 0, 1, 2, 5]))
        start, stop = self.random.choice(ENDS), self.random.choice(ENDS)
        reverse = bool(self.random.randrange(2))
        if seqno == self.now:
            start, stop = self.gaps.skip(start, stop, reverse=reverse)
        met = sorted(k for k in self.moments[seqno] if (start or b"") <= k and (stop is None or k < stop))
        if reverse:
            gap = KeyRange(met[-1] + b"\0" if met else start or b"", stop)
        else:
            gap = KeyRange(start or b"", met[0] if met else stop)
        self.gaps.propose(gap, Seqno(seqno), Seqno(self.now))

    def check(self) -> None:
        gaps = self.gaps._gaps
        assert gaps == sorted(gaps)
        for gap, following in itertools.pairwise(gaps):
            assert gap.stop is not None
            assert gap.stop < following.start
        for gap in gaps:
            assert not any(gap.contains(key) for key in self.live), gap
        for start in ENDS:
            for stop in ENDS:
                for reverse in (False, True):
                    self.check_skip(start, stop, reverse)

    def check_skip(self, start: bytes | None, stop: bytes | None, reverse: bool) -> None:
        low, high = self.gaps.skip(start, stop, reverse=reverse)
        before = [key for key in self.live if (start or b"") <= key and (stop is None or key < stop)]
        after = [key for key in self.live if (low or b"") <= key and (high is None or key < high)]
        assert sorted(before) == sorted(after), (start, stop, reverse, low, high)
        if not KeyRange(start or b"", stop).is_empty():
            # It only narrows.
            assert (low or b"") >= (start or b"")
            assert stop is None or (high is not None and high <= stop)


@pytest.mark.parametrize(("recent", "most"), [(4096, 256), (3, 2)])
@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_a_skip_never_passes_over_a_live_key(recent: int, most: int, random: Random) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvwal.engine.gaps, "_RECENT_PUTS", recent)
        patch.setattr(kvwal.engine.gaps, "_MOST_GAPS", most)
        model = Model(random)
        for _ in range(random.randrange(30)):
            kind = random.randrange(6)
            keys = [random.choice(KEYS) for _ in range(random.randrange(1, 4))]
            if kind < 2:
                model.put(keys)
            elif kind == 2:
                model.delete(keys)
            elif kind == 3 and not random.randrange(6):
                model.gaps.clear()
            else:
                model.propose()
            model.check()


def test_the_number_of_gaps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvwal.engine.gaps, "_MOST_GAPS", 100)
    gaps = Gaps()
    for number in range(300):
        gaps.propose(KeyRange(b"%06d" % (2 * number), b"%06d" % (2 * number + 1)), Seqno(1), Seqno(1))
        assert len(gaps._gaps) == min(number + 1, 100)
    gaps.propose(KeyRange(b"a", b"z"), Seqno(1), Seqno(1))
    for number in range(300):
        gaps.written(Seqno(2 + number), [b"b%06d" % number])
        assert len(gaps._gaps) <= 101


def test_a_gap_with_a_long_bound_is_not_remembered() -> None:
    gaps = Gaps()
    gaps.propose(KeyRange(b"a", b"b" * 513), Seqno(1), Seqno(1))
    assert gaps._gaps == []
    gaps.propose(KeyRange(b"a", b"c"), Seqno(1), Seqno(1))
    gaps.written(Seqno(2), [b"b" * 513])
    assert gaps._gaps == []


def test_hundreds_of_queues_have_a_gap_each(passed: Callable[[], int]) -> None:
    """Consumers that take turns would each push out the gap of another."""
    queues, taken = 400, 80
    db = opened()
    db.update({b"%04d:%04d" % (queue, number): b"" for queue in range(queues) for number in range(taken + 5)})
    for queue in range(queues):
        for number in range(taken):
            db.delete(b"%04d:%04d" % (queue, number))
        assert db.first(prefix=b"%04d:" % queue) == (b"%04d:%04d" % (queue, taken), b"")
    passed()
    for queue in range(queues):
        assert db.first(prefix=b"%04d:" % queue) == (b"%04d:%04d" % (queue, taken), b"")
    assert passed() <= 4 * queues
    db.close()


def test_a_put_in_the_middle_of_a_gap_cuts_it_in_two() -> None:
    gaps = Gaps()
    gaps.propose(KeyRange(b"a", b"z"), Seqno(1), Seqno(1))
    gaps.written(Seqno(2), [b"m"])
    assert gaps._gaps == [KeyRange(b"a", b"m"), KeyRange(b"m\0", b"z")]
    assert gaps.skip(b"b", None, reverse=False) == (b"m", None)
    assert gaps.skip(b"b", b"y", reverse=True) == (b"b", b"m\0")


# -- queues, through a store ----------------------------------------------------------------------


def opened(**options: Any) -> kvwal.Store:
    return kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os", **options)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many keys of memtables the scans have passed since it was last asked."""
    count = 0
    between = KeyOrder.between

    def counted(self: KeyOrder, *args: Any, **kwargs: Any) -> list[bytes]:
        nonlocal count
        keys = between(self, *args, **kwargs)
        count += len(keys)
        return keys

    monkeypatch.setattr(KeyOrder, "between", counted)

    def since_last() -> int:
        nonlocal count
        found, count = count, 0
        return found

    return since_last


def take_first(db: kvwal.Store, prefix: bytes) -> bytes | None:
    found = db.first(prefix=prefix)
    if found is None:
        return None
    del db[found[0]]
    return found[0]


def take_last(db: kvwal.Store, prefix: bytes) -> bytes | None:
    found = db.last(prefix=prefix)
    if found is None:
        return None
    db.delete(found[0])
    return found[0]


def take_scanned(db: kvwal.Store, prefix: bytes) -> bytes | None:
    for key, _ in db.scan(prefix=prefix, limit=1):
        db.delete(key)
        return key
    return None


def pop_first(db: kvwal.Store, prefix: bytes) -> bytes | None:
    try:
        return db.popitem(prefix, prefix + b"\xff", last=False)[0]
    except KeyError:
        return None


def pop_last(db: kvwal.Store, prefix: bytes) -> bytes | None:
    try:
        return db.popitem(prefix, prefix + b"\xff")[0]
    except KeyError:
        return None


def take_in_transaction(db: kvwal.Store, prefix: bytes) -> bytes | None:
    with db.transaction() as txn:
        found = txn.first(prefix=prefix)
        if found is None:
            return None
        txn.delete(found[0])
        return found[0]


TAKES: dict[str, tuple[Callable[[kvwal.Store, bytes], bytes | None], int]] = {
    "first": (take_first, 0),
    "last": (take_last, -1),
    "scan": (take_scanned, 0),
    "popitem_first": (pop_first, 0),
    "popitem_last": (pop_last, -1),
    "transaction": (take_in_transaction, 0),
}


@given(st.data())
def test_queues_under_several_prefixes_agree_with_a_model(data: st.DataObject) -> None:
    random: Random = data.draw(st.randoms(use_true_random=False))
    with pytest.MonkeyPatch.context() as patch:
        # So that gaps are proposed from the second tombstone on.
        patch.setattr("kvwal.engine.reads.WORTHWHILE", random.choice([1, 2, 64]))
        patch.setattr(kvwal.engine.gaps, "_RECENT_PUTS", random.choice([2, 4096]))
        with opened() as db:
            model: SortedDict[bytes, bytes] = SortedDict()
            prefixes = [b"q", b"r", b"s"]
            number = 0
            for _ in range(60):
                prefix = random.choice(prefixes)
                kind = random.randrange(10)
                if kind < 3:
                    number += 1
                    # In order, or with a priority, which may lie anywhere.
                    place = number if random.randrange(3) else random.randrange(1000)
                    db[prefix + b"%05d" % place] = model[prefix + b"%05d" % place] = b"%d" % number
                elif kind == 3 and not random.randrange(5):
                    db.checkpoint()
                elif kind == 4:
                    limit = random.choice([1, 2, 100])
                    reverse = bool(random.randrange(2))
                    keys = [key for key in model if key.startswith(prefix)]
                    expected = (keys[::-1] if reverse else keys)[:limit]
                    assert list(db.keys(prefix=prefix, reverse=reverse, limit=limit)) == expected
                elif kind == 5 and not random.randrange(4):
                    low, high = prefix + b"%05d" % random.randrange(1000), prefix + b"%05d" % random.randrange(1000)
                    db.delete_range(low, high)
                    for key in [key for key in model if low <= key < high]:
                        del model[key]
                else:
                    take, edge = TAKES[random.choice(sorted(TAKES))]
                    keys = [key for key in model if key.startswith(prefix)]
                    expected_key = keys[edge] if keys else None
                    assert take(db, prefix) == expected_key
                    if expected_key is not None:
                        del model[expected_key]
            assert list(db.items()) == list(model.items())
            assert len(db) == len(model)


def steps_of_a_queue(
    db: kvwal.Store,
    passed: Callable[[], int],
    take: Callable[[kvwal.Store, bytes], bytes | None],
    edge: int,
    items: int,
) -> list[int]:
    """Keys passed at each step of a queue that is never empty, and never long."""
    seen = []
    for number in range(20):
        db[b"q%08d" % number] = b"x"
    passed()
    for number in range(items):
        # At the end that it is not taken from; a stack grows where it shrinks.
        assert take(db, b"q") is not None
        db[b"q%08d" % (20 + number)] = b"x"
        seen.append(passed())
    return seen


@pytest.mark.parametrize("name", sorted(set(TAKES) - {"transaction"}))
def test_a_step_of_a_queue_passes_as_few_keys_after_thousands_of_items(name: str, passed: Callable[[], int]) -> None:
    with opened() as db:
        seen = steps_of_a_queue(db, passed, *TAKES[name], 3000)
    # A proposal is due after 64 tombstones, and a chunk has twice as many keys as the one before.
    assert max(seen) <= 600
    assert sum(seen[-1000:]) <= 150 * 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TAKES) - {"transaction"}))
def test_a_step_of_a_queue_passes_as_few_keys_after_twenty_thousand_items(name: str, passed: Callable[[], int]) -> None:
    with opened() as db:
        seen = steps_of_a_queue(db, passed, *TAKES[name], 20_000)
    assert max(seen) <= 600
    assert sum(seen[-1000:]) <= 150 * 1000


def test_a_step_of_a_queue_in_transactions_passes_as_few_keys_after_thousands_of_items(
    passed: Callable[[], int],
) -> None:
    with opened() as db:
        seen = steps_of_a_queue(db, passed, *TAKES["transaction"], 3000)
    assert max(seen) <= 600
    assert sum(seen[-1000:]) <= 150 * 1000


def test_a_step_of_several_queues_passes_few_keys(passed: Callable[[], int]) -> None:
    """Workers that take from queues in turn, where each queue has a gap of its own."""
    with opened() as db:
        prefixes = [b"%c" % letter for letter in b"abcdefgh"]
        for prefix in prefixes:
            for number in range(10):
                db[prefix + b"%08d" % number] = b"x"
        seen = []
        passed()
        for number in range(500):
            for prefix in prefixes:
                assert pop_first(db, prefix) == prefix + b"%08d" % number
                db[prefix + b"%08d" % (number + 10)] = b"x"
                seen.append(passed())
    assert max(seen) <= 600
    assert sum(seen[-1000:]) <= 150 * 1000


def test_an_empty_queue_that_was_long_is_found_empty_at_once(passed: Callable[[], int]) -> None:
    with opened() as db:
        for number in range(2000):
            db[b"q%08d" % number] = b"x"
        for number in range(2000):
            db.delete(b"q%08d" % number)
        assert db.first(prefix=b"q") is None
        passed()
        for _ in range(10):
            assert db.first(prefix=b"q") is None
            assert db.last(prefix=b"q") is None
            assert not db
        assert passed() <= 10_000


def test_a_priority_queue_finds_a_put_before_the_gap(passed: Callable[[], int], rng: Random) -> None:
    with opened() as db:
        model: SortedDict[bytes, bytes] = SortedDict()
        for number in range(3000):
            key = b"q%08d" % rng.randrange(10**8)
            db[key] = model[key] = b"%d" % number
            if number > 10:
                assert db.popitem(last=False) == model.popitem(0)
            if number % 7 == 0:
                assert db.last() == model.peekitem(-1)
        assert list(db.items()) == list(model.items())


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("way", ["popitem", "first and delete", "scan of an index"])
def test_a_step_of_a_queue_in_a_table_passes_as_few_keys_after_thousands_of_items(
    way: str, last: bool, passed: Callable[[], int]
) -> None:
    with opened() as db:
        queue = db.table("queue", int, bytes)
        index = queue.index("all", key=lambda value: value[:1], codec=bytes) if way == "scan of an index" else None
        edge = -1 if last else 0
        model = SortedDict({number: b"x" for number in range(20)})
        queue.update(model)
        seen = []
        passed()
        for number in range(20, 2020):
            if way == "popitem":
                assert queue.popitem(last=last) == model.popitem(edge)
            else:
                if index is not None:
                    _, key = next(iter(index.keys(equal=b"x", reverse=last, limit=1)))
                else:
                    pair = queue.last() if last else queue.first()
                    assert pair is not None
                    key = pair[0]
                assert key == model.popitem(edge)[0]
                queue.delete(key)
            # At the end that it is not taken from; a stack grows where it shrinks.
            queue[number] = model[number] = b"x"
            seen.append(passed())
        assert sum(seen[-500:]) <= 2 * sum(seen[500:1000])
        assert list(queue.items()) == list(model.items())
        assert db.verify().ok


def test_gaps_of_tables_are_kept_apart_and_end_with_a_checkpoint() -> None:
    gaps = TableGaps()
    for table in range(_MOST_TABLES + 2):
        for _ in range(2):
            gaps.propose(table, KeyRange(b"a", b"m"), Seqno(5), Seqno(5))
    assert gaps.active
    having = [n for n in range(_MOST_TABLES + 2) if gaps.skip(n, b"a", None, reverse=False) == (b"m", None)]
    assert len(having) == _MOST_TABLES
    assert {0, 3, _MOST_TABLES + 1} < set(having)
    part = WriteBatch()
    part.put(b"c", b"v")
    gaps.written(Seqno(6), [], [(3, part)])
    assert gaps.skip(3, b"a", None, reverse=False) == (b"c", None)
    assert gaps.skip(0, b"a", None, reverse=False) == (b"m", None)
    gaps.written(Seqno(7), [b"b"], [])
    assert gaps.skip(0, b"a", None, reverse=False) == (b"b", None)
    assert gaps.skip(3, b"a", None, reverse=False) == (b"c", None)
    gaps.clear()
    assert not gaps.active
    assert gaps.skip(3, b"a", None, reverse=False) == (b"a", None)


def test_more_tables_that_are_queues_than_have_gaps_at_a_time_take_turns(passed: Callable[[], int]) -> None:
    taken, rounds = 100, 8
    with opened() as db:
        queues = [db.table(f"{n}", int, bytes) for n in range(_MOST_TABLES + 2)]
        for queue in queues:
            queue.update({n: b"" for n in range(taken + rounds + 1)})
            for n in range(taken):
                queue.delete(n)
        for queue in queues:
            assert queue.first() == (taken, b"")
        # The last one alone, and then all of them.
        passed()
        for _ in range(rounds):
            assert queues[-1].first() == (taken, b"")
        assert passed() <= 4 * rounds
        for n in range(rounds):
            for queue in queues:
                assert queue.popitem(last=False) == (taken + n, b"")
        assert passed() <= rounds * len(queues) * taken // 4


def test_a_table_that_has_gaps_again_has_none_where_something_was_put_meanwhile() -> None:
    gaps = TableGaps()
    for table in range(_MOST_TABLES):
        gaps.propose(table, KeyRange(b"a", b"m"), Seqno(5), Seqno(5))
    table = _MOST_TABLES
    while gaps.skip(3, b"a", None, reverse=False) != (b"a", None):
        gaps.propose(table, KeyRange(b"a", b"m"), Seqno(5), Seqno(5))
        table += 1
    part = WriteBatch()
    part.put(b"c", b"v")
    gaps.written(Seqno(6), [], [(3, part)])
    # By a scan that began before.
    gaps.propose(3, KeyRange(b"a", b"m"), Seqno(5), Seqno(6))
    assert gaps.skip(3, b"a", None, reverse=False) == (b"a", None)
    gaps.propose(3, KeyRange(b"d", b"m"), Seqno(6), Seqno(6))
    assert gaps.skip(3, b"d", None, reverse=False) == (b"m", None)


KINDS = ["put", "put", "expire", "delete", "pop", "pop", "time", "remove", "checkpoint", "clear"]


@pytest.mark.parametrize("seed", range(4))
def test_tables_with_gaps_are_dicts_with_times(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts of tables, entries of an index, and rows of what expires are told to the gaps of each."""
    monkeypatch.setattr("kvwal.engine.reads.WORTHWHILE", 1)
    draw, disk = Random(seed), SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False, durability="os") as db:
        tables = [db.table(name, int, bytes) for name in ("a", "b")]
        indexes = [table.index("i", key=lambda value: value[:1], codec=bytes) for table in tables]
        models: list[dict[int, tuple[bytes, float]]] = [{}, {}]
        now_s = 0.0
        for _ in range(500):
            which = draw.randrange(2)
            table, index, model = tables[which], indexes[which], models[which]
            key, value = draw.randrange(30), draw.choice(b"xyz").to_bytes() * 3
            kind = draw.choice(KINDS)
            if kind == "put":
                table[key], model[key] = value, (value, inf)
            elif kind == "expire":
                lasts_s = draw.choice([1.0, 3.0])
                table.put(key, value, expire_s=lasts_s)
                model[key] = value, now_s + lasts_s
            elif kind == "delete":
                table.delete(key)
                model.pop(key, None)
            elif kind == "pop" and model:
                last = draw.random() < 0.5
                edge = max(model) if last else min(model)
                assert table.popitem(last=last) == (edge, model.pop(edge)[0])
            elif kind == "time":
                disk.pass_time(0.75)
                now_s += 0.75
                for each in models:
                    for gone in [key for key, (_, at_s) in each.items() if at_s <= now_s]:
                        del each[gone]
            elif kind == "remove":
                while db.engine.expirer.remove():
                    pass
                expiring = sum(at_s < inf for each in models for _, at_s in each.values())
                assert len(list(db.engine.expirer.rows())) >= expiring
            elif kind == "checkpoint" and draw.random() < 0.2:
                db.checkpoint()
            elif kind == "clear" and draw.random() < 0.2:
                table.clear()
                model.clear()
            pairs = [(key, value) for key, (value, _) in sorted(model.items())]
            assert list(table.items()) == pairs
            assert len(table) == len(pairs)
            assert (table.first(), table.last()) == ((pairs[0], pairs[-1]) if pairs else (None, None))
            assert list(index.keys()) == sorted((value[:1], key) for key, value in pairs)
            assert index.count() == len(pairs)
        assert db.verify().ok
