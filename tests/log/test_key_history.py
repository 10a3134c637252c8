"""The newest change of a key in a stretch of log: against a model, with indexes that are there, damaged or not."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from key_log import KEYS, LONG, TABLES, KeyLog

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError
from kvwal.files.names import keys_name
from kvwal.keys import Seqno
from kvwal.log import KeyHistory
from kvwal.log import keys as log_keys


def plain(history: KeyHistory, table: int, key: bytes, after: int, until: int) -> tuple[int, str, bytes | None] | None:
    found = history.last(table, key, Seqno(after), Seqno(until))
    return None if found is None else (found.record.seqno, found.kind, found.value)


def agree(log: KeyLog, history: KeyHistory, step: int = 1) -> None:
    """In every stretch of the log whose ends are multiples of the step, or the last commit."""
    n = len(log.commits)
    ends = [*range(0, n, step), n]
    keys = [*log.keys, b"never", b"a\0\0"]
    for after in ends:
        for until in ends:
            table, key = log.rng.choice(TABLES), log.rng.choice(keys)
            assert plain(history, table, key, after, until) == log.last(table, key, after, until), (table, key)
    for table in TABLES:
        for key in keys:
            assert plain(history, table, key, 0, n) == log.last(table, key, 0, n)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("number", range(6))
def test_the_newest_change_of_a_key_is_that_of_the_model(indexed: bool, number: int, rng: Random) -> None:
    log = KeyLog(rng, [*KEYS, LONG] if number == 0 else KEYS)
    log.fill(1 + number)
    if indexed:
        log.make_indexes()
        assert len(log.index_files()) == len(log.rig.segments()) - 1
    agree(log, log.history)
    log.commit()
    agree(log, log.history, step=3)
    log.fill(3 + number)
    agree(log, log.history, step=3)


def test_a_log_that_is_only_read_is_asked_with_and_without_indexes(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(4)
    before = log.rig.names()
    agree(log, log.read_only(), step=5)
    assert log.rig.names() == before
    log.make_indexes()
    agree(log, log.read_only(), step=5)
    assert len(log.index_files()) == len(log.rig.segments()) - 1


def test_a_log_that_is_only_read_is_read_once(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(4)
    history, n = log.read_only(), len(log.commits)
    log.disk.trace = []
    # What is in no segment asks all of them, which the others need not.
    for key in [*KEYS, b"never"]:
        plain(history, 0, key, 0, n)
    log.disk.trace.clear()
    for key in [*KEYS, b"never"]:
        plain(history, 0, key, 0, n)
    assert len(log.disk.trace) <= 2 * len(KEYS)


@pytest.mark.parametrize("digest", [b"123456", b"\xff" * 6])
def test_keys_of_one_hash_are_told_apart(digest: bytes, rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_keys, "blake2b", lambda data, digest_size: _Digest(digest))
    log = KeyLog(rng)
    log.fill(3)
    log.make_indexes()
    agree(log, log.history, step=2)


def test_keys_of_two_hashes_are_told_apart(rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_keys, "blake2b", lambda data, digest_size: _Digest(bytes(5) + bytes([len(data) % 2])))
    log = KeyLog(rng, segment_bytes=1 << 17)
    batch = WriteBatch()
    for number in range(700):
        batch.put(b"k%d" % number, b"")
    log.append(batch)
    log.fill(2)
    log.make_indexes()
    for number in range(0, 700, 50):
        key = b"k%d" % number
        assert plain(log.history, 0, key, 0, 1) == (1, "put", b"")
    agree(log, log.history, step=50)


class _Digest:
    def __init__(self, digest: bytes) -> None:
        self._digest = digest

    def digest(self) -> bytes:
        return self._digest


def test_a_range_is_found_behind_a_newer_change_of_another_key_of_the_same_hash(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_keys, "blake2b", lambda data, digest_size: _Digest(bytes(6)))
    log = KeyLog(rng, segment_bytes=1 << 14)
    for change in ("range", "other"):
        batch = WriteBatch()
        if change == "range":
            batch.delete_range(b"a", b"b")
        else:
            batch.put(b"other", b"1")
        log.append(batch)
    n = len(log.commits)
    log.fill(len(log.log.segments()))
    log.make_indexes()
    assert plain(log.history, 0, b"aa", 0, n) == log.last(0, b"aa", 0, n) == (1, "range", None)


def test_every_flipped_byte_of_an_index_is_noticed(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(1)
    log.make_indexes()
    name = keys_name(log.rig.segments()[0])
    until = log.rig.segments()[1] - 1
    good = log.rig.read(name)
    for at in range(len(good)):
        log.rig.flip(name, at, rng.randrange(1, 256))
        history = log.read_only()
        for table in TABLES:
            for key in KEYS:
                assert plain(history, table, key, 0, until) == log.last(table, key, 0, until)
        log.rig.overwrite(name, 0, good)


def test_an_index_that_is_damaged_is_made_again(rng: Random) -> None:
    log = KeyLog(rng)
    while len(log.log.segments()) <= 3:
        log.append(_put(rng.choice(KEYS), bytes(100)))
    log.make_indexes()
    good = {name: log.rig.read(name) for name in log.index_files()}
    # The heads are known; the rows are not.
    plain(log.history, 0, b"never", 0, len(log.commits))
    log.history._keys.files.blocks.clear()
    for name, data in good.items():
        log.rig.overwrite(name, len(data) - 40, bytes(40))
    # A key that a segment has leads to its blocks.
    for after, until in log.parts(0, log.rig.segments()[-1] - 1):
        for key in KEYS:
            assert plain(log.history, 0, key, after, until) == log.last(0, key, after, until)
    assert {name: log.rig.read(name) for name in log.index_files()} == good


def test_a_record_that_is_damaged_is_said_with_its_place(rng: Random) -> None:
    log = KeyLog(rng)
    log.append(_put(b"rare", b"1", 20))
    log.fill(3)
    log.append(_put(b"rare", b"2", 20))
    log.make_indexes()
    n = len(log.commits)
    name, offset = log.rig.flip_commit(1)
    assert plain(log.history, 20, b"rare", 0, n) == (n, "put", b"2")
    for history in (log.history, log.read_only(), log.read_only()):
        with pytest.raises(CorruptionError) as failure:
            history.last(20, b"rare", Seqno(0), Seqno(n - 1))
        assert (failure.value.file, failure.value.offset) == (name, offset)
    # One that was read from the newest segment before.
    plain(log.history, 20, b"rare", n - 1, n)
    name, offset = log.rig.flip_commit(n)
    with pytest.raises(CorruptionError) as failure:
        log.history.last(20, b"rare", Seqno(n - 1), Seqno(n))
    assert (failure.value.file, failure.value.offset) == (name, offset)


def _put(key: bytes, value: bytes, table: int = 0) -> WriteBatch:
    batch = WriteBatch()
    (batch.table(table) if table else batch).put(key, value)
    return batch


def test_it_costs_two_blocks_and_a_record_and_nothing_of_a_segment_without_the_key(rng: Random) -> None:
    log = KeyLog(rng, segment_bytes=1 << 17)
    log.append(_put(b"rare", b"1"))
    while len(log.log.segments()) < 4:
        log.append(_put(b"%d" % len(log.commits), bytes(60)))
    log.make_indexes()
    segments = log.rig.segments()
    until = segments[-1] - 1
    assert plain(log.history, 0, b"rare", 0, until) == (1, "put", b"1")
    for _ in range(2):
        log.history._keys.files.blocks.clear()
        log.disk.trace = []
        assert plain(log.history, 0, b"rare", 0, until) == (1, "put", b"1")
        names = [operation.name for operation in log.disk.trace]
        assert names == ["pread"] * 3


def test_a_hot_key_costs_no_more_than_its_ends_and_a_search_between(rng: Random) -> None:
    log = KeyLog(rng, segment_bytes=1 << 20)
    for number in range(9000):
        log.append(_put(b"hot" if number % 4 else b"%d" % number, b""))
    first = log.rig.segments()[-1]
    while log.rig.segments()[-1] == first:
        log.append(_put(b"other", bytes(5000)))
    log.make_indexes()
    until = len(log.commits)
    asked: list[Any] = [(0, until), (3000, 6000), (first + 1, first + 3)]
    for after, end in asked:
        log.history._keys.files.blocks.clear()
        expected = log.last(0, b"hot", after, min(end, 9000))
        plain(log.history, 0, b"never", after, end)
        log.disk.trace = []
        assert plain(log.history, 0, b"hot", after, end) == expected
        assert len(log.disk.trace) <= 20 * len(log.rig.segments())


def test_a_table_that_a_reader_has_is_not_freed_with_the_index_made_of_it(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(1)
    log.append(_put(log.keys[0], b"1"))
    keys = log.history._keys
    last = len(log.commits)
    _, table = keys.known(keys.span(log.rig.segments()[-1], last))
    found = {key: list(table.rows(0, key, 0, last, reverse=False)) for key in log.keys}
    assert any(found.values())
    log.fill(len(log.rig.segments()) + 1)
    log.make_indexes()
    assert log.index_files()
    assert found == {key: list(table.rows(0, key, 0, last, reverse=False)) for key in log.keys}
