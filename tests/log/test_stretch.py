"""What a stretch of the log changed, in key order: against a model, with indexes that are there, damaged or not."""

from __future__ import annotations

import gc
from itertools import islice
from random import Random
from typing import Any

import pytest
from key_log import KEYS, LONG, TABLES, KeyLog
from store_fixtures import interrupted_at, run_threads

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError
from kvwal.files.names import keys_name
from kvwal.keys import Seqno
from kvwal.log import KeyHistory, kept, key_table, segment_keys, stretch
from kvwal.log.fetch import fetch
from kvwal.log.keys import DamagedIndex

BOUNDS: list[tuple[bytes | None, bytes | None]]
BOUNDS = [(None, None), (b"", b""), (b"b", b"a"), (b"a\0\0", None), (b"b", b"b\0")]


def flat(chunks: Any) -> list[tuple[bytes, bytes | None]]:
    return [pair for chunk in chunks for pair in zip(*chunk, strict=True)]


def pairs(history: KeyHistory, table: int, after: int, until: int, bounds: Any, *, reverse: bool) -> Any:
    """Of each stretch its ranges and its pairs; the chunks are well formed."""
    found = []
    for each in history.stretches(table, Seqno(after), Seqno(until)):
        chunks = list(each.chunks(*bounds, reverse=reverse))
        assert all(0 < len(keys) == len(values) <= stretch._CHUNK_KEYS for keys, values in chunks)
        assert not chunks or len(chunks[0][0]) <= 4
        found.append((each.ranges, flat(chunks)))
    return found


def agree(log: KeyLog, history: KeyHistory, step: int = 1) -> None:
    """In every stretch of the log whose ends are multiples of the step, or the last commit."""
    n = len(log.commits)
    ends = [*range(0, n, step), n]
    for after in ends:
        for until in ends:
            table, reverse = log.rng.choice(TABLES), log.rng.random() < 0.5
            low, high = log.rng.choice([*log.keys, None]), log.rng.choice([*log.keys, None])
            check(log, history, table, after, until, log.rng.choice([*BOUNDS, (low, high), (low, high)]), reverse)
    for table in TABLES:
        for reverse in (True, False):
            for bounds in BOUNDS:
                check(log, history, table, 0, n, bounds, reverse)


def check(log: KeyLog, history: KeyHistory, table: int, after: int, until: int, bounds: Any, reverse: bool) -> None:
    expected = [
        (log.ranges(table, *part), log.pairs(table, *part, bounds, reverse=reverse))
        for part in log.parts(after, until)
    ]
    assert pairs(history, table, after, until, bounds, reverse=reverse) == expected, (table, after, until, bounds)


@pytest.mark.parametrize("way", ["one by one", "loaded", "alike"])
@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("number", range(4))
def test_what_a_stretch_changed_is_what_the_model_says(
    indexed: bool, way: str, number: int, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "one by one":
        small(monkeypatch, alike=way == "alike")
    log = KeyLog(rng, [*KEYS, LONG] if number == 0 else KEYS)
    log.fill(1 + number)
    if indexed:
        log.make_indexes()
    agree(log, log.history)
    log.commit()
    agree(log, log.history, step=3)
    log.fill(3 + number)
    agree(log, log.history, step=3)


def small(monkeypatch: pytest.MonkeyPatch, *, alike: bool = False) -> None:
    """Let small stretches be read as large ones are: in many chunks, and with the segment in memory."""
    monkeypatch.setattr(stretch, "_ALIKE_KEYS", 1 if alike else 1000)
    monkeypatch.setattr(stretch, "_FIRST_KEYS", 1)
    monkeypatch.setattr(stretch, "_CHUNK_KEYS", 2)
    monkeypatch.setattr(stretch, "_RECORD_COST_BYTES", 1 << 20)
    # Else most are read commit by commit.
    monkeypatch.setattr(key_table, "_SHORT_COMMITS", 0)


@pytest.mark.parametrize("loaded", [True, False])
def test_many_keys_come_in_chunks_that_are_small_at_first(
    loaded: bool, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loaded:
        monkeypatch.setattr(kept, "MOST_LOADED_BYTES", 0)
    log = KeyLog(rng, [b"%04d" % number for number in range(1000)], segment_bytes=1 << 18)
    while len(log.log.segments()) < 3 or len(log.commits) < 3000:
        log.commit(most=30)
    log.make_indexes()
    n = len(log.commits)
    for _ in range(20):
        after, until = sorted(rng.choices(range(n + 1), k=2))
        low, high = rng.choice([*log.keys, None]), rng.choice([*log.keys, None])
        check(log, log.history, rng.choice(TABLES), after, until, (low, high), rng.random() < 0.5)
    sizes = [
        [len(keys) for keys, _ in each.chunks(None, None, reverse=True)]
        for each in log.history.stretches(0, Seqno(0), Seqno(n))
    ]
    assert [4, 8, 16, 32, 64, 128, 256] in [each[:7] for each in sizes]


def test_a_log_that_is_only_read_is_asked_with_and_without_indexes(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(4)
    agree(log, log.read_only(), step=5)
    log.make_indexes()
    agree(log, log.read_only(), step=5)


def test_keys_of_one_hash_are_told_apart(rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "hashes_of", lambda table, keys: [bytes(5) + bytes([len(key) % 2]) for key in keys])
    log = KeyLog(rng)
    log.fill(3)
    log.make_indexes()
    agree(log, log.history, step=3)


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
            check(log, history, table, 0, until, (None, None), rng.random() < 0.5)
        log.rig.overwrite(name, 0, good)


def test_an_index_that_is_damaged_under_way_is_read_around(rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    log = KeyLog(rng, [b"%04d" % number for number in range(600)], segment_bytes=1 << 17)
    while len(log.log.segments()) < 2 or len(log.commits) < 2000:
        log.commit(most=20)
    log.make_indexes()
    sealed = log.log.segments()[0]
    until = log.log.segments()[1].first_seqno - 1
    name = keys_name(sealed.first_seqno)
    good = log.rig.read(name)
    for reverse in (True, False):
        expected = log.pairs(0, 0, until, (b"0100", None), reverse=reverse)
        for taken in (0, 1, 7):
            [of_segment] = log.history.stretches(0, Seqno(0), Seqno(until))
            chunks = of_segment.chunks(b"0100", None, reverse=reverse)
            found = list(islice(chunks, taken))
            log.history._keys.files.blocks.clear()
            log.rig.overwrite(name, len(good) // 3, bytes(len(good) - len(good) // 3))
            found += chunks
            assert flat(found) == expected
            # Later on it may have all that it needs.
            assert taken or log.rig.read(name) == good
            log.rig.overwrite(name, 0, good)


def test_a_record_that_is_damaged_is_said_with_its_place(rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    log = KeyLog(rng, segment_bytes=1 << 14)
    for number in range(60):
        log.append(_put(b"%04d" % number, bytes(50)))
    while len(log.rig.segments()) == 1:
        log.append(_put(b"filler", bytes(500)))
    log.make_indexes()
    until = log.rig.segments()[1] - 1
    for way in ("one by one", "loaded", "alike"):
        if way != "one by one":
            small(monkeypatch, alike=way == "alike")
        name, offset = log.rig.flip_commit(51)
        for history in (log.history, log.read_only()):
            [of_segment] = history.stretches(0, Seqno(0), Seqno(until))
            chunks = of_segment.chunks(b"0000", b"0060", reverse=False)
            with pytest.raises(CorruptionError) as failure:
                list(chunks)
            assert (failure.value.file, failure.value.offset) == (name, offset)
            # What does not need it is handed out.
            expected = [(b"%04d" % number, bytes(50)) for number in range(10)]
            assert flat(of_segment.chunks(b"0000", b"0010", reverse=False)) == expected
        log.rig.flip(name, offset + 45)


@pytest.mark.parametrize("table", [0, 16])
def test_every_changed_byte_of_a_record_is_noticed_however_it_is_read(
    table: int, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = KeyLog(rng, segment_bytes=1 << 14)
    for number in range(40):
        log.append(_put(b"%04d" % number, b"value", table))
    while len(log.rig.segments()) == 1:
        log.append(_put(b"filler", bytes(500), 20))
    log.make_indexes()
    until = log.rig.segments()[1] - 1
    name, offset = log.rig.offset(31)
    end = log.rig.offset(32)[1]
    for way in ("one by one", "loaded", "alike"):
        if way != "one by one":
            small(monkeypatch, alike=way == "alike")
        [whole] = log.history.stretches(table, Seqno(0), Seqno(until))
        assert flat(whole.chunks(None, None, reverse=False)) == [(b"%04d" % number, b"value") for number in range(40)]
        for at in range(offset, end):
            log.rig.flip(name, at, 0x20)
            with pytest.raises(CorruptionError) as failure:
                list(whole.chunks(None, None, reverse=False))
            assert failure.value.offset == offset
            log.rig.flip(name, at, 0x20)


def test_what_a_window_does_not_have_costs_no_read_of_the_log(rng: Random) -> None:
    log = KeyLog(rng, segment_bytes=1 << 17)
    # A new segment that is large.
    while log.log.segments()[-1].size < 1 << 17:
        log.append(_put(b"filler", bytes(5000), 20))
    before = len(log.commits)
    for number in range(500):
        log.append(_put(b"%04d" % (number * 7 % 500), b""))
    for _ in range(300):
        log.append(_put(b"0100", b"hot"))
    until = log.append(_put(b"0200", b""))
    newest = log.rig.segments()[-1]
    while log.rig.segments()[-1] == newest:
        log.append(_put(b"filler", bytes(5000), 20))
    log.make_indexes()
    [whole] = log.history.stretches(0, Seqno(before), until)
    assert len(flat(whole.chunks(None, None, reverse=False))) == 500
    [late] = log.history.stretches(0, Seqno(before + 500), until)
    for reverse in (False, True):
        log.disk.trace = []
        assert sorted(flat(late.chunks(None, None, reverse=reverse))) == [(b"0100", b"hot"), (b"0200", b"")]
        assert [operation.name for operation in log.disk.trace] == ["pread"] * 2


def test_a_batch_is_read_once(rng: Random) -> None:
    log = KeyLog(rng, segment_bytes=1 << 17)
    batch = WriteBatch()
    for number in range(1000):
        batch.put(b"%04d" % number, b"%d" % number)
    log.append(batch)
    log.fill(1)
    log.make_indexes()
    until = log.rig.segments()[1] - 1
    [of_segment] = log.history.stretches(0, Seqno(0), Seqno(until))
    log.disk.trace = []
    check(log, log.history, 0, 0, until, (b"0100", b"0900"), False)
    offset = log.rig.offset(1)[1]
    assert sum(operation.name == "pread" and operation.offset == offset for operation in log.disk.trace) <= 2
    assert of_segment.ranges == log.ranges(0, 0, until)


@pytest.mark.parametrize("loaded", [True, False])
def test_interleaved_batches_are_read_once_or_once_a_chunk(
    loaded: bool, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key of a chunk is of another batch; there was a scan that read a batch for each of its keys."""
    n, chunk = 20, 64
    monkeypatch.setattr(stretch, "_CHUNK_KEYS", chunk)
    monkeypatch.setattr(segment_keys, "_MOST_FETCHED_BYTES", 0)
    if not loaded:
        monkeypatch.setattr(kept, "MOST_LOADED_BYTES", 0)
    keys = [b"%05d" % number for number in range(4000)]
    log = KeyLog(rng, segment_bytes=1 << 18)
    rng.shuffle(keys)
    for i in range(n):
        batch = WriteBatch()
        for key in keys[i::n]:
            batch.put(key, key)
        batch.delete(b"%05d!" % i)
        log.append(batch)
    log.fill(1)
    log.make_indexes()
    read: list[int] = []

    def fetched(file: Any, found: Any, seqno: int, offset: int) -> Any:
        read.append(seqno)
        return fetch(file, found, seqno, offset)

    monkeypatch.setattr(segment_keys, "fetch", fetched)
    check(log, log.history, 0, 0, log.rig.segments()[1] - 1, (b"00000", None), False)
    if loaded:
        # The first chunks, of 4 to 64 keys, were read before the segment was in memory.
        assert sum(seqno <= n for seqno in read) <= 6 * n
    else:
        assert sum(seqno <= n for seqno in read) <= n * (-(-4000 // chunk) + 5) < 4000


def test_a_commit_that_is_not_the_one_that_the_index_names_is_not_taken_for_it(rng: Random) -> None:
    log = KeyLog(rng)
    batch = WriteBatch()
    batch.put(b"a", b"1")
    batch.put(b"b", b"2")
    log.append(batch)
    log.fill(1)
    keys = log.history._keys
    found, _ = keys.known(keys.span(Seqno(1), 1))
    offset = log.rig.offset(1)[1]
    loaded = keys.files.load(found.name, found.limit, 1)
    assert loaded is not None
    for _ in range(2):
        assert keys.cut(found, 1, offset, loaded).intent(loaded.data, offset + 40, 0, 1) == (b"b", b"2")
        assert keys.fetched(found, 1, offset).intent(0, 0) == (b"a", b"1")
        with pytest.raises(DamagedIndex):
            keys.cut(found, 2, offset, loaded)
        with pytest.raises(DamagedIndex):
            keys.fetched(found, 2, offset)


def test_whole_segments_are_in_memory_only_while_they_are_read_and_within_a_bound(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = KeyLog(rng, [b"%04d" % number for number in range(3000)], segment_bytes=1 << 18)
    while len(log.log.segments()) < 8 or log.log.segments()[-4].first_seqno < log.log.segments()[-5].first_seqno + 1200:
        log.append(_put(rng.choice(log.keys), b""))
    log.make_indexes()
    sizes = [segment.size for segment in log.log.segments()[-5:-1]]
    monkeypatch.setattr(stretch, "_CHUNK_KEYS", 256)
    monkeypatch.setattr(kept, "MOST_LOADED_BYTES", sum(sizes[:3]))
    files = log.history._keys.files

    def in_memory() -> int:
        gc.collect()
        return sum(len(each.data) for weak in files._loaded.values() if (each := weak()) is not None)

    after, until = log.log.segments()[-5].first_seqno - 1, log.log.segments()[-1].first_seqno - 1
    expected = [log.pairs(0, *part, (None, None), reverse=False) for part in log.parts(after, until)]
    asked = log.history.stretches(0, Seqno(after), Seqno(until))
    iterators = [each.chunks(None, None, reverse=False) for each in asked]
    found = [[next(iterator) for _ in range(8)] for iterator in iterators]
    assert 0 < in_memory() <= kept.MOST_LOADED_BYTES
    for chunks, iterator in zip(found, iterators, strict=True):
        chunks += iterator
    assert list(map(flat, found)) == expected
    assert in_memory() == 0
    iterators = [each.chunks(None, None, reverse=True) for each in asked]
    for iterator in iterators:
        list(islice(iterator, 8))
    assert in_memory() > 0
    del iterator, iterators
    assert in_memory() == 0


def test_the_newest_segment_grows_and_is_sealed_and_others_go_under_way(rng: Random) -> None:
    log = KeyLog(rng, [b"%04d" % number for number in range(200)], segment_bytes=1 << 15)
    log.fill(3)
    n = len(log.commits)
    first = log.log.segments()[-2].first_seqno
    hold = log.log.retention.hold("test", Seqno(first - 1), log.log.segments(), log.log.last_seqno, 0)
    while len(log.commits) < n + 150:
        log.commit()
    n = len(log.commits)
    parts = log.parts(first - 1, n)
    found: list[Any] = []
    iterators = []
    for part in log.history.stretches(0, Seqno(first - 1), Seqno(n)):
        iterators.append(part.chunks(None, None, reverse=False))
        # None where a segment has nothing of this table.
        found.append(list(islice(iterators[-1], 1)))
    asked = log.history.stretches(0, Seqno(first - 1), Seqno(n))
    log.fill(len(log.log.segments()) + 2)
    log.log.sync()
    assert log.log.retire(Seqno(len(log.commits)))
    assert log.log.segments()[0].first_seqno == first
    expected = [log.pairs(0, *part, (None, None), reverse=False) for part in parts]
    for chunks, iterator in zip(found, iterators, strict=True):
        chunks += iterator
    assert list(map(flat, found)) == expected
    # Also those that were not begun.
    later = [list(each.chunks(None, None, reverse=False)) for each in asked]
    assert list(map(flat, later)) == expected
    assert [each.ranges for each in asked] == [log.ranges(0, *part) for part in parts]
    hold.release()


def test_a_newest_segment_in_memory_is_read_again_when_it_has_grown(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    log = KeyLog(rng, [b"%04d" % number for number in range(50)], segment_bytes=1 << 15)
    while log.log.segments()[-1].size < 1 << 15:
        log.append(_put(b"filler", bytes(5000), 20))
    held = []
    for _ in range(5):
        for number in range(20):
            log.append(_put(b"%04d" % number, b"%d" % len(log.commits)))
        n = len(log.commits)
        part = log.history.stretches(0, Seqno(n - 20), Seqno(n))[-1]
        check(log, log.history, 0, n - 20, n, (None, None), False)
        # As long as this one is under way, the segment stays in memory.
        held.append(part.chunks(None, None, reverse=False))
        list(islice(held[-1], 5))
    assert len(log.history._keys.files._loaded) == 1


def test_a_segment_that_no_index_can_hold_is_read_instead(rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "_OFFSET_STOP", 4096)
    log = KeyLog(rng)
    log.fill(4)
    log.make_indexes()
    assert not log.index_files()
    agree(log, log.history, step=4)
    assert not log.index_files()


def test_threads_ask_while_the_log_grows(rng: Random) -> None:
    log = KeyLog(rng, [b"%04d" % number for number in range(40)], segment_bytes=1 << 14)
    log.fill(2)
    ended: list[None] = []

    def write() -> None:
        for _ in range(1500):
            log.commit()
        ended.append(None)

    def ask() -> None:
        random = Random(1)
        while not ended:
            until = log.log.last_seqno
            after = Seqno(max(until - 300, 0))
            key = random.choice(log.keys)
            found = log.history.last(0, key, after, until)
            expected = log.last(0, key, after, until)
            assert (found and (found.record.seqno, found.kind, found.value)) == expected
            pairs = {}
            for each in log.history.stretches(0, after, until):
                for bounds in each.ranges:
                    pairs.update((key, None) for key in pairs if bounds.contains(key))
                pairs.update(flat(each.chunks(None, None, reverse=random.random() < 0.5)))
            assert pairs == dict(log.pairs(0, after, until, (None, None), reverse=False))

    run_threads(write, ask, ask)


def test_an_interruption_anywhere_leaves_the_next_question_right(rng: Random) -> None:
    log = KeyLog(rng)
    log.fill(2)
    n = len(log.commits)
    history = log.history
    step = 1
    while True:
        for name in log.index_files():
            log.disk.remove(f"/log/{name}")
        history._keys._indexes.clear()
        history.close()

        def ask() -> None:
            pairs(history, 0, 1, n, (b"a", None), reverse=False)
            history.last(0, b"never", Seqno(0), Seqno(n))

        if interrupted_at(step, ask) is None:
            break
        check(log, history, 0, 1, n, (b"a", None), False)
        step = step + 1 if step < 200 else int(step * 1.07)
    assert step > 200


def _put(key: bytes, value: bytes, table: int = 0) -> WriteBatch:
    batch = WriteBatch()
    (batch.table(table) if table else batch).put(key, value)
    return batch
