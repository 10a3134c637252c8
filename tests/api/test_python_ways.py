"""What Python programs do with any object: hints, mocks, patterns, process pools, numbers of other kinds."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
import typing
from collections.abc import Iterator, MutableMapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from aio_fixtures import run

import kvwal
import kvwal.aio
from kvwal import Store, WriteBatch

ENTRIES = {b"k%d" % number: b"v%d" % number for number in range(5)}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Store]:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as store:
        store.update(ENTRIES)
        yield store


def public_functions() -> Iterator[Any]:
    for module in (kvwal, kvwal.aio):
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found):
                yield found
            elif inspect.isclass(found):
                yield from (each for _, each in inspect.getmembers(found, inspect.isfunction))


def test_the_hints_of_every_public_function_can_be_resolved() -> None:
    """As libraries do that check or convert arguments by them. Names that only a checker knows would not be found."""
    functions = [each for each in public_functions() if each.__doc__ and each.__module__.startswith("kvwal.")]
    assert kvwal.open in functions
    assert len(functions) > 100
    for function in functions:
        assert "return" in typing.get_type_hints(function), function
    annotations = {name: each.annotation for name, each in inspect.signature(kvwal.open).parameters.items()}
    assert annotations["cache_bytes"] is int
    assert annotations["durability"] == typing.Literal["commit", "interval", "os"]


def test_a_store_is_a_mapping_to_mocks_and_patterns_and_comparisons(db: Store) -> None:
    double = mock.create_autospec(db, instance=True)
    double.get.return_value = b"double"
    assert double.get(b"k") == b"double"
    with pytest.raises(TypeError):
        double.put(b"k")
    assert isinstance(db, MutableMapping)
    match db:
        case {b"missing": _}:
            pytest.fail("it is not there")
        case {b"k1": value}:
            assert value == b"v1"
        case _:
            pytest.fail("it is there")
    assert db == ENTRIES
    with db.snapshot() as snapshot:
        assert snapshot == db
        assert {**snapshot} == dict(db) == ENTRIES


def test_what_a_store_says_of_itself_can_be_copied_and_pickled(db: Store) -> None:
    with db.snapshot():
        facts = [db.stats(), db.recovery, db.verify(), db.window, *db.pins()]
        assert len(facts) == 6, "the window is a pin too"
        for fact in facts:
            assert copy.copy(fact) == copy.deepcopy(fact) == pickle.loads(pickle.dumps(fact)) == fact
    for record in db.history():
        again = pickle.loads(pickle.dumps(record))
        assert (again.seqno, again.batch().writes) == (record.seqno, record.batch().writes)


def test_a_store_that_is_sent_to_a_process_pool_is_refused_and_its_path_is_not(db: Store) -> None:
    path = db.path
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(TypeError, match=r"keep the path, and open the store by kvwal.shared\(path\)"):
            pool.submit(len, db).result()
        program = f"import kvwal\nkvwal.open({path!r}, 'w')"
        with pytest.raises(kvwal.LockedError) as caught:
            pool.submit(exec, program).result()
        assert caught.value.path == path
        db.close()
        assert pool.submit(exec, program + ".close()").result() is None


class Integer:
    """What NumPy's integers are to Python."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


def test_a_limit_is_any_integer_and_no_bool(db: Store) -> None:
    two: Any = Integer(2)
    assert len(list(db.scan(limit=two))) == len(db.keys(limit=two)) == len(list(db.values(limit=two))) == 2
    with db.transaction() as txn, db.snapshot() as snapshot:
        assert len(list(txn.items(limit=two))) == len(list(snapshot.scan(limit=two))) == 2
    for wrong in (True, False, 2.0, "2"):
        with pytest.raises(TypeError, match="limit"):
            db.scan(limit=wrong)
    with pytest.raises(ValueError, match="limit is -1; it is at least 0"):
        db.scan(limit=-1)


def test_a_buffer_that_is_not_of_bytes_is_refused_by_every_way_to_write(db: Store) -> None:
    from array import array

    numbers: Any = array("q", [1, 2])
    pointers: Any = memoryview(bytes(16)).cast("P")
    for wrong in (numbers, pointers):
        for way in (
            lambda wrong=wrong: db.put(b"k0", wrong),
            lambda wrong=wrong: db.put(wrong, b"v"),
            lambda wrong=wrong: db.update({b"k0": wrong}),
            lambda wrong=wrong: db.setdefault(b"new", wrong),
            lambda wrong=wrong: db.get(wrong),
            lambda wrong=wrong: db.delete(wrong),
            lambda wrong=wrong: list(db.scan(wrong)),
        ):
            with pytest.raises(TypeError, match="tobytes"):
                way()
    assert dict(db) == ENTRIES
    rows: Any = memoryview(b"abcdef").cast("B", (2, 3))
    db[b"k0"] = rows
    db[b"k1"] = memoryview(b"a-b-c")[::2]
    assert (db[b"k0"], db[b"k1"]) == (b"abcdef", b"abc")


def test_a_key_may_be_a_view_that_has_no_hash(db: Store) -> None:
    """The way over cached values takes the key's hash, which a view that may be written to refuses by ValueError."""
    for key in (memoryview(bytearray(b"k1")), bytearray(b"k1"), memoryview(b"k1")):
        assert db.get(key) == db[key] == b"v1"
        assert key in db
        assert db.get_many([key, b"k2"]) == [b"v1", b"v2"]
        with db.transaction() as txn, db.snapshot() as snapshot:
            assert txn.get(key) == snapshot.get(key) == txn[key] == b"v1"
            assert txn.get_many([key]) == snapshot.get_many([key]) == [b"v1"]
        assert db.pop(key) == b"v1"
        db[key] = b"v1"
    assert dict(db) == ENTRIES


def test_an_asyncio_key_may_be_a_view_that_has_no_hash(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "b.kv") as store:
            key = memoryview(bytearray(b"k1"))
            await store.put(key, memoryview(bytearray(b"v1")))
            assert await store.get(key) == b"v1"
            assert await store.get_many([key]) == [b"v1"]
            async with store.transaction() as txn:
                assert await txn.get(key) == b"v1"

    run(main())


class HasKeys:
    """What `dict.update` takes for a mapping: a database of `dbm.gnu`, for one, is no `Mapping`."""

    def keys(self) -> list[bytes]:
        return [b"k1", b"new"]

    def __getitem__(self, key: Any, /) -> bytes:
        return key.upper()


UPDATES: list[Any] = [{b"k1": b"1"}, [(b"k1", b"1")], iter([[b"k1", b"1"]]), zip([b"k1"], [b"1"], strict=True)]


def test_a_default_of_pop_may_be_named_as_that_of_every_mapping(db: Store) -> None:
    table = db.table("t", str, int)
    for mapping, key in ((db, b"none"), (table, "none"), (db.transaction(), b"none")):
        assert mapping.pop(key, 7) == mapping.pop(key, default=7) == 7
        assert mapping.pop(key, None) is mapping.pop(key, default=None) is None
        with pytest.raises(KeyError):
            mapping.pop(key)
        with pytest.raises(TypeError):
            mapping.pop(key, 1, 2)
    assert db.pop(b"k0", default=7) == b"v0"


def test_an_asyncio_default_of_pop_may_be_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "s") as db:
            table = db.table("t", str, int)
            assert await db.pop(b"none", default=7) == await table.pop("none", default=7) == 7
            assert await db.pop(b"none", None) is await table.pop("none", None) is None
            with pytest.raises(KeyError):
                await db.pop(b"none")

    run(main())


def test_update_of_a_table_takes_what_dict_takes(db: Store) -> None:
    class OfTable:
        def keys(self) -> list[str]:
            return ["a", "b"]

        def __getitem__(self, key: str) -> int:
            return ord(key)

    table = db.table("t", str, int)
    with db.batch() as batch, db.transaction() as txn:
        for update in (table.update, table.within(batch).update, table.within(txn).update):
            update(typing.cast("Any", OfTable()))
        assert dict(table.within(txn)) == {"a": 97, "b": 98}
        txn.abort()
        assert len(batch) == 2
    assert dict(table) == {"a": 97, "b": 98}


def test_update_takes_what_dict_takes(db: Store) -> None:
    for way in (db.update, db.transaction().update, WriteBatch().update):
        for other in (HasKeys(), *UPDATES):
            way(other)
        way()
        for wrong, error in ((5, TypeError), ([(b"k1",)], ValueError), ([b"k1"], TypeError), ({"k1": b""}, TypeError)):
            with pytest.raises(error):
                way(wrong)
        with pytest.raises(TypeError, match=r"no keyword argument 'k1', since keys are bytes; use update\(\{b'k1'"):
            way(k1=b"1")
    assert dict(db) == {**ENTRIES, b"k1": b"1"} | {b"new": b"NEW"}
    with db.transaction() as txn:
        txn.update(HasKeys())
        with pytest.raises(TypeError):
            txn.update([(b"k2", b"2"), (b"k3", 3)])
    assert (db[b"k1"], db[b"k2"]) == (b"K1", b"v2")


def test_an_update_may_be_durable_where_the_store_does_not_wait_for_that(db: Store) -> None:
    db.update({b"k1": b""})
    assert db.durable_seqno < db.last_seqno
    db.update({b"k1": b""}, durability="commit")
    assert db.durable_seqno == db.last_seqno

    async def main() -> None:
        tasks = kvwal.aio.AsyncStore(db)
        await tasks.update({b"k2": b""})
        assert tasks.durable_seqno < tasks.last_seqno
        await tasks.update({b"k2": b""}, durability="commit")
        assert tasks.durable_seqno == tasks.last_seqno
        await tasks.close()

    run(main())


def test_an_asyncio_update_takes_what_dict_takes(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "b.kv") as store:
            await store.update(HasKeys())
            async with store.transaction() as txn:
                txn.update([(b"k2", b"2")])
                with pytest.raises(TypeError, match="no keyword argument"):
                    txn.update(k1=b"1")  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="no keyword argument"):
                await store.update(k1=b"1")  # type: ignore[arg-type]
            assert [pair async for pair in store.scan()] == [(b"k1", b"K1"), (b"k2", b"2"), (b"new", b"NEW")]

    run(main())


@pytest.mark.filterwarnings("error::BytesWarning")
def test_what_can_be_no_key_or_value_is_not_in_a_store(db: Store) -> None:
    wrongs: list[Any] = ["k1", 5, None, ("k1",), memoryview(b"k1abcdefgh"[:8]).cast("I"), b"k" * 70_000]
    with db.snapshot() as snapshot, db.transaction() as txn:
        for reading in (db, snapshot, txn):
            for wrong in wrongs:
                assert wrong not in reading
                for limit in (None, 3):
                    assert wrong not in reading.keys(limit=limit)
                    assert (wrong, b"v1") not in reading.items(limit=limit)
                assert (b"k1", "v1") not in reading.items()
            for wrong in wrongs[:-1]:
                assert wrong not in reading.values()
                with pytest.raises(TypeError):
                    reading.get(wrong)
            assert reading.keys() & {"k1", b"k1", 5} == {b"k1"}
            for limit in (None, 3):
                assert bytearray(b"k1") in reading.keys(limit=limit)
                assert (memoryview(b"k1"), bytearray(b"v1")) in reading.items(limit=limit)
                assert (b"k1", b"v2") not in reading.items(limit=limit)
        assert txn != {"k1": b"v1"}


def test_what_can_be_no_key_is_not_in_an_asyncio_store(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "b.kv") as store:
            await store.put(b"k1", b"v1")
            assert not await store.contains("k1")
            assert await store.contains(bytearray(b"k1"))

    run(main())


def test_the_end_of_all_keys_is_no_start_of_a_scan(db: Store) -> None:
    """It was None, which as a start is the first key: a program that went on behind a prefix began again."""
    db[b"\xff\xff1"] = b""
    keys = sorted(db)
    end = kvwal.prefix_stop(b"\xff\xff")
    assert end is kvwal.END is copy.deepcopy(end) is pickle.loads(pickle.dumps(end))
    assert repr(end) == "kvwal.END"
    with db.snapshot() as snapshot, db.transaction() as txn:
        for reading in (db, snapshot, txn):
            for reverse in (False, True):
                assert not list(reading.scan(end, reverse=reverse))
                assert not list(reading.keys(end, prefix=b"k", reverse=reverse))
            assert not len(reading.keys(end))
            assert reading.first(end) is reading.last(end, end) is None
            assert (reading.count(end), reading.count(b"k3", end)) == (0, 3)
            for position in (0, -1):
                with pytest.raises(IndexError):
                    reading.key_at(position, end)
            assert (reading.key_at(0, b"k3", end), reading.key_at(-1, b"k3", end)) == (b"k3", b"\xff\xff1")
            assert list(reading.keys(b"k3", end)) == list(reading.keys(b"k3")) == keys[3:]
            assert list(reading.keys(kvwal.prefix_stop(b"k"))) == [b"\xff\xff1"]
        txn.delete_range(end)
        txn.delete_range(b"k4", end)
        assert len(txn) == 4
        txn.abort()
    with pytest.raises(KeyError):
        db.popitem(end)
    db.delete_range(end)
    assert sorted(db) == keys
    assert db.popitem(b"k4", end) == (b"\xff\xff1", b"")
    db.delete_range(b"k1", end)
    assert sorted(db) == [b"k0"]


def test_the_end_of_all_keys_is_no_start_of_an_asyncio_scan(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "b.kv") as store:
            await store.update(ENTRIES)
            assert not [key async for key in store.keys(kvwal.END)]
            assert len([key async for key in store.keys(b"k3", kvwal.END)]) == 2
            with pytest.raises(KeyError):
                await store.popitem(kvwal.END)
            await store.delete_range(kvwal.END)
            async with store.transaction() as txn:
                txn.delete_range(kvwal.END)
            assert await store.count() == 5
            await store.delete_range(b"k1", kvwal.END)
            assert await store.count() == 1

    run(main())
