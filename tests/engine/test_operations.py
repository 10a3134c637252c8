"""Operations that the commit leader evaluates: each sees the members of its group before it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvwal
from kvwal.batch import WriteBatch
from kvwal.engine.operations import Pending, PopEdge, Update, decode_counter, encode_counter
from kvwal.engine.request import CommitRequest
from kvwal.engine.writes import EncodedBatch, LonePut, as_lone_put
from kvwal.errors import DiskFullError
from kvwal.keys import KeyRange
from kvwal.testing import SimulatedDisk

KEYS = [b"%02d" % number for number in range(10)]


def opened() -> kvwal.Store:
    return kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os")


@pytest.mark.parametrize("number", [0, 1, -1, 255, 256, -(1 << 63), (1 << 63) - 1])
def test_a_counter_is_eight_bytes_little_endian_and_signed(number: int) -> None:
    value = encode_counter(number)
    assert value == number.to_bytes(8, "little", signed=True)
    assert decode_counter(value) == number


def test_no_value_counts_as_nought_and_other_lengths_are_refused() -> None:
    assert decode_counter(None) == 0
    for size in (0, 1, 7, 9):
        with pytest.raises(TypeError):
            decode_counter(b"\0" * size)
    for number in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError):
            encode_counter(number)


class Member:
    """One request of a group, and what it does to a model."""

    def __init__(self, request: CommitRequest, effect: Callable[[dict[bytes, bytes]], None]) -> None:
        self.request = request
        self.effect = effect


def append(suffix: bytes) -> Callable[[bytes | None], bytes | None]:
    return lambda old: (old or b"") + suffix


def member_of(random: Random, number: int) -> Member:
    key, kind = random.choice(KEYS), random.randrange(6)
    value = b"%d" % number
    if kind == 0:
        return Member(CommitRequest(LonePut(key, value), sync=False), lambda data: data.update({key: value}))
    if kind == 1:
        batch = WriteBatch()
        changed: list[Any] = []
        for _ in range(random.randrange(1, 4)):
            if random.randrange(2):
                bounds = KeyRange(random.choice(KEYS), random.choice([None, *KEYS]))
                batch.delete_range(*bounds)
                changed.append(bounds)
            else:
                other = random.choice(KEYS)
                batch.writes[other] = random.choice([None, value])
                changed.append((other, batch.writes[other]))

        def apply(data: dict[bytes, bytes]) -> None:
            for change in changed:
                if isinstance(change, KeyRange):
                    for covered in [k for k in data if change.contains(k)]:
                        del data[covered]
                elif change[1] is None:
                    data.pop(change[0], None)
                else:
                    data[change[0]] = change[1]

        return Member(CommitRequest(EncodedBatch(batch), sync=False), apply)
    if kind < 4:
        reverse = bool(random.randrange(2))
        low, high = random.choice([b"", *KEYS]), random.choice([None, *KEYS])
        pop = PopEdge(KeyRange(low, high), reverse=reverse)

        def take(data: dict[bytes, bytes]) -> None:
            found = sorted(k for k in data if low <= k and (high is None or k < high))
            if not found:
                assert pop.pair is None
                return
            edge = found[-1 if reverse else 0]
            assert pop.pair == (edge, data.pop(edge))

        return Member(CommitRequest(sync=False, operation=pop), take)
    functions: list[Callable[[bytes | None], bytes | None]] = [append(value), lambda old: None, lambda old: old]
    function = random.choice(functions)
    update = Update(key, function)

    def change_it(data: dict[bytes, bytes]) -> None:
        assert update.old == data.get(key)
        new = function(data.get(key))
        assert update.new == new
        if new is None:
            data.pop(key, None)
        else:
            data[key] = new

    return Member(CommitRequest(sync=False, operation=update), change_it)


@given(st.randoms(use_true_random=False))
def test_a_group_of_operations_and_writes_has_the_effect_of_one_after_the_other(random: Random) -> None:
    with opened() as db:
        data: dict[bytes, bytes] = {}
        for number in range(random.randrange(12)):
            key = random.choice(KEYS)
            db[key] = data[key] = b"before%d" % number
        if random.randrange(2):
            db.checkpoint()
        for _ in range(3):
            if not random.randrange(4):
                bounds = KeyRange(*sorted(random.sample(KEYS, 2)))
                db.delete_range(*bounds)
                data = {k: v for k, v in data.items() if not bounds.contains(k)}
            members = [member_of(random, number) for number in range(random.randrange(1, 9))]
            db.engine.queue.submit([member.request for member in members])
            for member in members:
                assert member.request.error is None
                member.effect(data)
            assert dict(db.scan()) == data
            assert [db.get(key) for key in KEYS] == [data.get(key) for key in KEYS]
            assert len(db) == len(data)


def test_what_changes_nothing_makes_no_commit() -> None:
    with opened() as db:
        db[b"a"] = b"1"
        for call in (
            lambda: db.setdefault(b"a", b"2"),
            lambda: db.put_if_absent(b"a", b"2"),
            lambda: db.compare_and_set(b"a", b"other", b"2"),
            lambda: db.pop(b"b", None),
        ):
            call()
            assert db.last_seqno == 1
        with pytest.raises(KeyError):
            del db[b"b"]
        with pytest.raises(KeyError):
            db.popitem(b"b")
        assert db.last_seqno == 1


def test_a_member_that_is_refused_leaves_the_others_of_its_group() -> None:
    with opened() as db:
        db[b"no counter"] = b"123"
        operations = [
            Update(b"no counter", lambda old: encode_counter(decode_counter(old) + 1)),
            Update(b"counter", lambda old: encode_counter(decode_counter(old) + 1)),
            Update(b"counter", lambda old: encode_counter(decode_counter(old) + (1 << 63) - 1)),
            Update(b"counter", lambda old: encode_counter(decode_counter(old) + 1)),
        ]
        requests = [CommitRequest(sync=False, operation=each) for each in operations]
        db.engine.queue.submit(requests)
        assert [type(request.error) for request in requests] == [TypeError, type(None), OverflowError, type(None)]
        assert decode_counter(db[b"counter"]) == 2
        assert db[b"no counter"] == b"123"
        assert db.last_seqno == 3


def test_an_operation_that_met_a_full_disk_is_evaluated_anew_when_it_is_tried_again() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False, durability="os") as db:
        db[b"n"] = b"before"
        request = CommitRequest(sync=False, operation=Update(b"n", append(bytes(200_000))))
        disk.capacity = disk.used_bytes() + 100_000
        with pytest.raises(DiskFullError):
            db.engine.queue.commit(request)
        disk.capacity = None
        db[b"n"] = b"since"
        request.renew()
        db.engine.queue.commit(request)
        assert db[b"n"] == b"since" + bytes(200_000)


def test_what_one_operation_puts_is_logged_and_published_as_one_put() -> None:
    """Of the default table and of others; what says more of its key is not."""
    batch = WriteBatch()
    batch.writes[b"k"] = b"v"
    found = as_lone_put(batch)
    assert found is not None
    assert (found.table, found.key, found.value) == (0, b"k", b"v")
    of_a_table = WriteBatch()
    of_a_table.table(16).put_until(b"k", b"v", None)
    found = as_lone_put(of_a_table)
    assert found is not None
    assert (found.table, found.key, found.value) == (16, b"k", b"v")
    others: list[Callable[[WriteBatch], object]] = [
        lambda batch: None,
        lambda batch: batch.writes.update({b"k": None}),
        lambda batch: batch.writes.update({b"k": b"", b"l": b""}),
        lambda batch: (batch.delete_range(b"a", b"b"), batch.writes.update({b"k": b""})),
        lambda batch: batch.put_until(b"k", b"", 7),
        lambda batch: batch.put_until(b"k", b"", None, 7),
        lambda batch: batch.put_stamped(b"k", b""),
    ]
    for table in (0, 16):
        for fill in others:
            batch = WriteBatch()
            fill(batch.part(table))
            assert as_lone_put(batch) is None
    for table in (1, 15, 1 << 31):
        batch = WriteBatch()
        batch.table(table).writes[b"k"] = b"v"
        assert as_lone_put(batch) is None
    batch.table(16).writes[b"k"] = b"v"
    assert as_lone_put(batch) is None
    two = WriteBatch()
    two.writes[b"k"] = two.table(16).writes[b"k"] = b"v"
    assert as_lone_put(two) is None
    indexed = WriteBatch()
    indexed.table(16).writes[b"k"] = b"v"
    indexed.table(16).index_keys = {}
    assert as_lone_put(indexed) is None


def test_pending_writes_hide_what_the_store_has() -> None:
    with opened() as db:
        db.update(dict.fromkeys(KEYS, b"old"))
        pending = Pending(db.engine.reads)
        batch = WriteBatch()
        batch.delete_range(b"00", b"05")
        batch.put(b"03", b"new")
        pending.write(batch)
        later = WriteBatch()
        later.delete_range(b"03", b"04")
        later.delete(b"09")
        pending.write(later)
        assert [pending.get(key) for key in KEYS] == [None] * 5 + [b"old"] * 4 + [None]
        assert pending.edge(None, None, reverse=False) == (b"05", b"old")
        assert pending.edge(None, None, reverse=True) == (b"08", b"old")
        assert pending.edge(b"00", b"05", reverse=True) is None
        latest = WriteBatch()
        latest.writes.update({b"06": None, b"07": b"newer", b"075": b"new"})
        pending.write(latest)
        assert pending.first_pairs(b"04", None, most=2) == [(b"05", b"old"), (b"07", b"newer")]
        assert pending.first_pairs(b"06", b"08", most=9) == [(b"07", b"newer"), (b"075", b"new")]


def test_a_group_that_pops_hundreds_of_items_takes_each_once() -> None:
    """More than the few pairs that the leader asks for at first."""
    with opened() as db:
        db.update({b"%04d" % number: b"%d" % number for number in range(300)})
        for reverse in (False, True):
            pops = [PopEdge(KeyRange(b"", None), reverse=reverse) for _ in range(140)]
            db.engine.queue.submit([CommitRequest(sync=False, operation=pop) for pop in pops])
            taken = [int(pop.pair[1]) for pop in pops if pop.pair is not None]
            assert taken == (list(range(299, 159, -1)) if reverse else list(range(140)))
        assert len(db) == 20


def test_the_log_of_operations_holds_plain_puts_and_deletes() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk, background=False) as db:
        assert db.add(b"n", 5) == 5
        assert db.add(b"n", -7) == -2
        assert db.put_if_absent(b"a", b"1")
        assert db.pop(b"a") == b"1"
        db[b"b"] = b"2"
        assert db.popitem() == (b"n", encode_counter(-2))
        changes = [dict(record.batch().writes) for record in db.history()]
        assert changes == [
            {b"n": encode_counter(5)}, {b"n": encode_counter(-2)}, {b"a": b"1"}, {b"a": None}, {b"b": b"2"},
            {b"n": None},
        ]  # fmt: skip
    with kvwal.open("/kv", files=disk, background=False) as db:
        assert dict(db) == {b"b": b"2"}
