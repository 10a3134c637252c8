"""A name comes to mean another table while it is read: what is found is of the one, or of the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from following_fixtures import PATH, Primary
from store_fixtures import check_store

import kvwal
import kvwal.aio
from kvwal.engine.publish import Publisher
from kvwal.engine.tables import Tables
from kvwal.tables.stored import StoredTable
from kvwal.testing import SimulatedDisk

#: What each read gives of the first table of the name, and of the second; the first one, renamed, gets `junk` then.
READS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "get": (lambda t: t.get("k1"), "first", "second"),
    "in": (lambda t: "k9" in t, False, False),
    "get_many": (lambda t: t.get_many(["k1", "k9"]), ["first", None], ["second", None]),
    "len": (len, 3, 2),
    "count": (lambda t: t.count("k1"), 3, 2),
    "key_at": (lambda t: t.raw()._key_at(2), b"k3", None),
    "rank": (lambda t: t.rank("k8"), 3, 2),
    "first": (lambda t: t.first(), ("k1", "first"), ("k1", "second")),
    "scan": (lambda t: list(t.scan("k0", limit=1)), [("k1", "first")], [("k1", "second")]),
    "items": (lambda t: sum(1 for _ in t.items()), 3, 2),
    "expires": (lambda t: t.expires("k1"), None, None),
}


def _fill(db: kvwal.Store, name: str, keys: int, value: str) -> None:
    db.table(name, str, str).update({f"k{n}": value for n in range(1, keys + 1)})


def _swap(db: kvwal.Store) -> None:
    """The name means the second table; it never had `junk`, nor nine keys."""
    db.rename_table("prices", "scratch")
    _fill(db, "prices", 2, "second")
    _fill(db, "scratch", 9, "junk")


@pytest.fixture
def db() -> Iterator[kvwal.Store]:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as store:
        _fill(store, "prices", 3, "first")
        yield store
        check_store(store)


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("is_hot", [False, True])
@pytest.mark.parametrize("name", READS)
def test_a_read_of_a_store_that_another_thread_renames_a_table_of(
    db: kvwal.Store, name: str, is_hot: bool, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the `nth` look-up of the name and what it is for."""
    read, first, second = READS[name]
    prices = db.table("prices", str, str)
    assert read(prices) == first
    if not is_hot:
        db.checkpoint()
        db.engine.state.cache.clear()
    looked_up, asked = StoredTable.id, 0

    def raced(self: StoredTable, **how: bool) -> int | None:
        nonlocal asked
        found = looked_up(self, **how)
        if self is prices.raw():
            asked += 1
            if asked == nth:
                _swap(db)
        return found

    monkeypatch.setattr(StoredTable, "id", raced)
    assert read(prices) == (second if asked >= nth else first)


@pytest.mark.parametrize("of", ["table", "bytes"])
def test_a_hot_get_that_another_thread_renames_a_table_of(db: kvwal.Store, of: str) -> None:
    prices = db.table("prices", str, str)
    assert prices["k1"] == "first"
    cache, swaps = db.engine.state.cache, [_swap]

    class Rows(dict[Any, Any]):
        def __getitem__(self, row: Any) -> Any:
            if swaps:
                swaps.pop()(db)
            return super().__getitem__(row)

    cache.rows = Rows(cache.rows)
    assert (prices["k1"] if of == "table" else prices.raw()[prices._encode("k1")]) in ("second", b"second")


def test_a_name_that_is_looked_up_while_a_rename_is_published(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names have changed, and the row of the name has not yet: what is found is not kept."""
    prices, noted = db.table("prices", str, str), Publisher._note_names
    assert prices.id is not None

    def slow(self: Publisher, part: Any) -> None:
        noted(self, part)
        other = threading.Thread(target=lambda: prices.id)
        other.start()
        other.join(10)

    monkeypatch.setattr(Publisher, "_note_names", slow)
    db.rename_table("prices", "scratch")
    assert prices.id is None
    prices["k1"] = "second"
    assert db.table("scratch", str, str)["k1"] == "first"


def _gone(primary: Primary) -> None:
    """The pages that a follower reads are written over."""
    for n in range(3):
        primary.db.put(b"%d" % n, b"")
        primary.db.checkpoint()


@pytest.mark.parametrize("name", READS)
def test_a_read_of_a_follower_that_moves_it(name: str) -> None:
    read, first, second = READS[name]
    primary = Primary()
    _fill(primary.db, "prices", 3, "first")
    primary.db.checkpoint()
    with primary.follow() as live, primary.follow() as other:
        prices = live.table("prices", str, str)
        assert read(other.table("prices", str, str)) == first
        assert prices.id is not None
        _swap(primary.db)
        _gone(primary)
        assert read(prices) == second
    primary.db.close()


def _tables(store: Any) -> list[tuple[str, int]]:
    return [(each.name, each.keys) for each in store.tables()]


def test_the_tables_of_a_store_that_is_written_are_of_one_moment(
    db: kvwal.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(db, "others", 4, "first")
    looked_up, swaps = Tables.rows, [_swap]

    def raced(self: Tables, reader: Any) -> Any:
        rows = looked_up(self, reader)
        if swaps:
            swaps.pop()(db)
        return rows

    monkeypatch.setattr(Tables, "rows", raced)
    assert _tables(db) == [("others", 4), ("prices", 3)]
    assert _tables(db) == [("others", 4), ("prices", 2), ("scratch", 9)]


def test_a_read_of_a_follower_for_tasks_that_moves_it() -> None:
    primary = Primary()
    _fill(primary.db, "prices", 3, "first")
    primary.db.checkpoint()

    async def main() -> None:
        async with kvwal.aio.follow(PATH, pin=False, files=primary.disk) as live:
            prices = live.table("prices", str, str)
            assert await prices.id() is not None
            _swap(primary.db)
            _gone(primary)
            assert await prices.get("k1") == "second"

    asyncio.run(main())
    primary.db.close()
