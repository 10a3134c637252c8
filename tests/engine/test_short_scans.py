"""Short ranges that lie in memory are read at once: the same answers as the long way gives."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from pages_fixtures import Scratch

import kvwal
from kvwal.engine.key_order import KeyOrder
from kvwal.engine.reads import Reads
from kvwal.engine.version import Version


def key(number: int) -> bytes:
    return b"%06d" % number


def some_bounds(rng: random.Random, keys: int) -> tuple[bytes | None, bytes | None]:
    start = rng.randrange(-5, keys + 5)
    width = rng.choice([0, 1, 3, 40, 200, keys])
    first = None if start < 0 else key(start) + rng.choice([b"", b"\0"])
    return first, rng.choice([None, key(max(0, start) + width), key(max(0, start - width))])


def test_cached_pairs_are_the_beginning_of_chunks(tmp_path: Path, rng: random.Random) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=8 << 20)
    # Large separators, so that there are three levels, and the edges of inner nodes are met.
    head = b"k" * 150
    model = {head + key(number): b"v" * 90 for number in range(6000)}
    scratch.checkpoint(model)
    tree = scratch.pages.tree()
    assert tree.height == 3
    assert tree.cached_pairs(None, None, 1, reverse=False) is None, "nothing was scanned yet"
    everything = dict(pair for keys, values in tree.chunks() for pair in zip(keys, values, strict=True))
    assert everything == model
    answered = 0
    for _ in range(2000):
        start, stop = (None if bound is None else head + bound for bound in some_bounds(rng, 6000))
        reverse = rng.random() < 0.5
        most = rng.choice([1, 2, 30, 100, 10_000])
        found = tree.cached_pairs(start, stop, most, reverse=reverse)
        if found is None:
            continue
        answered += 1
        pairs, ended = found
        wanted = [
            pair
            for keys, values in tree.chunks(start, stop, reverse=reverse)
            for pair in zip(keys, values, strict=True)
        ]
        assert pairs == wanted[:most]
        assert ended <= (len(pairs) == len(wanted))
        assert ended or len(pairs) == most
    assert answered > 500
    assert dict(pair for keys, values in tree.chunks() for pair in zip(keys, values, strict=True)) == model
    scratch.pages.close()


def test_leaves_of_few_entries_come_together(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=8 << 20)
    model = {key(number): b"%04d" % number * 250 for number in range(700)}
    # Values with an extent of their own do not wait for others.
    model[key(350)] = b"long" * 5000
    scratch.checkpoint(model)
    tree = scratch.pages.tree()
    for _ in range(2):
        for reverse in (False, True):
            chunks = list(tree.chunks(reverse=reverse))
            sizes = [len(keys) for keys, _ in chunks]
            assert sizes[0] < 10, "the first comes at once"
            assert sum(size >= 64 for size in sizes) >= 5
            assert len(sizes) < 45
            pairs = [pair for chunk in chunks for pair in zip(*chunk, strict=True)]
            assert pairs == sorted(model.items(), reverse=reverse)
    scratch.pages.close()


def test_pairs_that_were_handed_out_once_are_not_made_again(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", background=False) as db:
        db.update({key(number): b"old" for number in range(500)})
        db.checkpoint()
        list(db.scan())
        first, second = (list(db.scan(key(5), limit=100)) for _ in range(2))
        assert first == [(key(number), b"old") for number in range(5, 105)]
        assert all(one is other for one, other in zip(first, second, strict=True))


def test_leaves_that_gets_brought_in_stay_decoded_after_a_scan(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=1 << 20)
    model = {key(number): b"%04d" % number * 250 for number in range(400)}
    scratch.checkpoint(model)
    tree = scratch.pages.tree()
    for one, value in model.items():
        assert tree.get(one) == value
    assert 400_000 < scratch.pages.pager.cache.used_bytes() < 1 << 19, "the younger half of the cache is almost full"
    for _ in range(2):
        assert sum(len(keys) for keys, _ in tree.chunks()) == 400
    kept = [tree.cached_pairs(one, None, 1, reverse=False) is not None for one in model]
    assert sum(kept) > 360
    assert scratch.pages.pager.cache.used_bytes() <= 1 << 20
    misses = scratch.pages.pager.cache.misses
    for one, value in model.items():
        assert tree.get(one) == value
    assert scratch.pages.pager.cache.misses == misses
    scratch.pages.close()


def test_a_decoded_leaf_is_merged_and_searched_like_a_raw_one(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path), cache_bytes=8 << 20)
    model = {key(number): b"%d" % number for number in range(3000)}
    scratch.checkpoint(model)
    for round_number in range(3):
        tree = scratch.pages.tree()
        assert dict(pair for keys, values in tree.chunks() for pair in zip(keys, values, strict=True)) == model
        assert tree.cached_pairs(key(100), key(110), 50, reverse=False) is not None
        for number in range(0, 3010, 7):
            assert tree.get(key(number)) == model.get(key(number))
        assert tree.count(key(10), key(2000)) == sum(key(10) <= one < key(2000) for one in model)
        changes: dict[bytes, bytes | None] = {key(number): b"x" for number in range(round_number, 3000, 11)}
        changes |= {key(number): None for number in range(round_number + 1, 3000, 13)}
        scratch.checkpoint(changes)
        for changed, value in changes.items():
            if value is None:
                model.pop(changed, None)
            else:
                model[changed] = value
        # The old generation is still whole: nothing that the cache shares was changed.
        assert tree.get(key(round_number)) != b"x"
    scratch.pages.close()


@pytest.fixture
def reads_at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `Reads.cached_range` answered: True where the long way was not taken."""
    answers: list[bool] = []
    original = Reads.cached_range

    def cached_range(self: Reads, *bounds: Any, **options: Any) -> Any:
        found = original(self, *bounds, **options)
        answers.append(found is not None)
        return found

    monkeypatch.setattr(Reads, "cached_range", cached_range)
    return answers


def test_short_scans_see_what_is_there(tmp_path: Path, rng: random.Random, reads_at_once: list[bool]) -> None:
    with kvwal.open(tmp_path / "db", background=False) as db:
        model = {key(number): b"old" for number in range(0, 4000, 2)}
        db.update(model)
        db.checkpoint()
        list(db.scan())
        for round_number in range(6):
            for _ in range(150):
                number = rng.randrange(4000)
                if rng.random() < 0.4:
                    db.delete(key(number))
                    model.pop(key(number), None)
                else:
                    db.put(key(number), model.setdefault(key(number), b"new%d" % round_number))
            order = sorted(model)
            for reader in (db, db.snapshot(), db.transaction(), db.transaction(read_only=True)):
                for _ in range(60):
                    start, stop = some_bounds(rng, 4000)
                    reverse = rng.random() < 0.5
                    limit = rng.choice([None, 0, 1, 5, 100, 256, 300])
                    within = [k for k in order if (start is None or k >= start) and (stop is None or k < stop)]
                    if reverse:
                        within.reverse()
                    wanted = [(k, model[k]) for k in within[:limit]]
                    assert list(reader.scan(start, stop, reverse=reverse, limit=limit)) == wanted
                    assert list(reader.keys(start, stop, reverse=reverse, limit=limit)) == [k for k, _ in wanted]
                if reader is not db:
                    (reader.close if isinstance(reader, kvwal.Snapshot) else reader.abort)()
    assert reads_at_once.count(True) > 1000
    assert reads_at_once.count(False) > 100


def test_a_snapshot_scans_its_own_moment(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", background=False) as db:
        db.update({key(number): b"old" for number in range(50)})
        with db.snapshot() as snapshot, db.transaction() as txn:
            assert len(list(snapshot.scan(limit=10))) == 10
            db[key(3)] = b"new"
            del db[key(4)]
            db[key(3) + b"0"] = b"added"
            for reader in (snapshot, txn):
                assert list(reader.scan(limit=10)) == [(key(number), b"old") for number in range(10)]
        assert list(db.scan(limit=4)) == [*[(key(n), b"old") for n in range(3)], (key(3), b"new")]


def test_a_commit_between_the_keys_and_their_values_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_at_once: list[bool]
) -> None:
    """Keys are looked for without the lock; what is published before the lock is held must not be missed."""
    with kvwal.open(tmp_path / "db", background=False) as db:
        db.update({key(number): b"old" for number in range(0, 20, 2)})
        original = KeyOrder.between

        def between(self: KeyOrder, *bounds: Any, **options: Any) -> list[bytes]:
            found = original(self, *bounds, **options)
            monkeypatch.setattr(KeyOrder, "between", original)
            db.update({key(3): b"new", key(4): b"new"})
            return found

        monkeypatch.setattr(KeyOrder, "between", between)
        found = list(db.scan(key(2), limit=3))
        assert reads_at_once == [False]
        assert found == [(key(2), b"old"), (key(3), b"new"), (key(4), b"new")]


def test_a_range_delete_hides_what_lies_in_the_pages(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", background=False) as db:
        db.update({key(number): b"old" for number in range(50)})
        db.checkpoint()
        list(db.scan())
        assert [k for k, _ in db.scan(key(4), limit=3)] == [key(4), key(5), key(6)]
        db.delete_range(key(5), key(10))
        assert [k for k, _ in db.scan(key(4), limit=3)] == [key(4), key(10), key(11)]


def test_rows_take_of_the_cache_only_what_they_need(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "db", background=False, cache_bytes=1 << 20) as db:
        pages = db.engine._pages
        roomy = pages.pager.cache.limit_bytes
        db.update({key(number): b"v" * 100 for number in range(20_000)})
        assert db.stats().row_bytes + pages.pager.cache.limit_bytes <= 1 << 20
        for number in range(20_000):
            db.get(key(number))
        assert pages.pager.cache.limit_bytes < roomy
        assert db.stats().row_bytes + pages.pager.cache.limit_bytes <= 1 << 20
        db.checkpoint()
        for _ in range(2):
            assert len(list(db.scan())) == 20_000
        assert db.stats().row_bytes + pages.pager.cache.used_bytes() <= 1 << 20


@pytest.mark.parametrize("what", ["a range is deleted", "the version is replaced"])
def test_what_comes_between_the_pairs_and_the_answer_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads_at_once: list[bool], what: str
) -> None:
    """The pages of a former version may be written over from then on, though no commit came."""
    with kvwal.open(tmp_path / "db", background=False) as db:
        db.update({key(number): b"old" for number in range(20)})
        db.checkpoint()
        list(db.scan())
        original = Version.cached_range

        def cached_range(self: Version, *bounds: Any, **options: Any) -> Any:
            found = original(self, *bounds, **options)
            monkeypatch.setattr(Version, "cached_range", original)
            if what == "a range is deleted":
                db.delete_range(key(3), key(6))
            else:
                db.engine._succession.install(self.tree)
            return found

        monkeypatch.setattr(Version, "cached_range", cached_range)
        reads_at_once.clear()
        left = [2, 6, 7] if what == "a range is deleted" else [2, 3, 4]
        assert [k for k, _ in db.scan(key(2), limit=3)] == list(map(key, left))
        assert reads_at_once == [False]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_begins_behind_what_was_taken_off_a_queue(
    tmp_path: Path, reverse: bool, reads_at_once: list[bool]
) -> None:
    """And before what was put there since: a gap is cut by what is put into it."""
    with kvwal.open(tmp_path / "db", background=False) as db:
        db.update({key(number): b"v" for number in range(1000)})
        for _ in range(300):
            db.popitem(last=reverse)
        # This one met the deleted keys, and says so; those after it begin behind them.
        step = -1 if reverse else 1
        ends = [key(number) for number in range(1000)][::step][300:310]
        for _ in range(2):
            assert [k for k, _ in db.scan(limit=10, reverse=reverse)] == ends
        for number in (5, 150, 299):
            put = key(999 - number) if reverse else key(number)
            db[put] = b"again"
            assert [k for k, _ in db.scan(limit=2, reverse=reverse)] == sorted([put, *ends], reverse=reverse)[:2]
            assert db.popitem(last=reverse) == (put, b"again")
        snapshot = db.snapshot()
        within = [key(999 - 100) if reverse else key(100), ends[0]]
        db[within[0]] = b"later"
        assert [k for k, _ in db.scan(limit=2, reverse=reverse)] == within
        assert [k for k, _ in snapshot.scan(limit=10, reverse=reverse)] == ends
        with db.transaction() as txn:
            assert [k for k, _ in txn.scan(limit=2, reverse=reverse)] == within
        db.checkpoint()
        assert [k for k, _ in db.scan(limit=2, reverse=reverse)] == within
        snapshot.close()
