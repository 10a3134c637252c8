"""Stores, snapshots and transactions as Python objects: never copied, pickled or inherited from; over when closed."""

from __future__ import annotations

import asyncio
import collections.abc
import copy
import functools
import gc
import inspect
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aio_fixtures import run
from store_fixtures import run_threads

import kvwal
import kvwal.aio
import kvwal.compat.dbm
import kvwal.compat.shelve
import kvwal.events
import kvwal.eventsourcing
from kvwal import ClosedError, ReadOnlyError, Store, WriteBatch
from kvwal.aio import AsyncSnapshot, AsyncStore, AsyncTransaction
from kvwal.db.handle import Uncopied

WAYS = [copy.copy, copy.deepcopy, *(lambda handle, p=p: pickle.dumps(handle, p) for p in range(6))]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Store]:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as store:
        store[b"k"] = b"v"
        yield store


def assert_not_copied(handle: Any) -> None:
    for way in WAYS:
        with pytest.raises(TypeError, match=f"a {type(handle).__name__} can be neither copied nor pickled: share"):
            way(handle)
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy({"of the application": [handle]})


def test_a_copy_of_a_handle_is_refused_and_the_handle_goes_on(db: Store, tmp_path: Path) -> None:
    for handle in (db, db.snapshot(), db.transaction(), db.transaction(read_only=True)):
        assert_not_copied(handle)
        gc.collect()
        assert handle[b"k"] == b"v"
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            copy.deepcopy(handle.items())
    assert pickle.loads(pickle.dumps(dict(db))) == {b"k": b"v"}


def test_a_copy_of_an_asyncio_handle_is_refused_and_the_handle_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        async with kvwal.aio.open(tmp_path / "b.kv") as store:
            await store.put(b"k", b"v")
            for handle in (store, store.snapshot(), store.transaction()):
                assert_not_copied(handle)
                assert await handle.get(b"k") == b"v"

    run(main())


def test_a_copy_of_what_is_to_be_closed_is_refused_and_it_goes_on(
    db: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraised: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraised.append)
    for number in range(200):
        db[b"%03d" % number] = b"x" * 2000
    db.sync()
    cursor = db.cursor()
    cursor.first()
    versions = db.versions(b"k")
    changes, consumer = db.changes(0), db.consumer("mailer", start=0)
    base, archive = db.bootstrap(), kvwal.archive(db, tmp_path / "archive")
    bytes_of = kvwal.compat.dbm.open(tmp_path / "d", "n")
    shelf = kvwal.compat.shelve.open(tmp_path / "e", "n")
    users = db.table("users", str, str)
    users["a"] = "b"
    things = [cursor, versions, changes, consumer, base, archive, bytes_of, shelf, users, users.cursor()]
    for thing in things:
        assert_not_copied(thing)
    gc.collect()
    assert cursor.next()
    assert next(versions).value == b"v"
    assert len(list(changes)) >= 201
    assert next(consumer).changes
    assert base.snapshot[b"k"] == b"v"
    assert archive.flush()
    bytes_of[b"k"], shelf["k"] = b"v", 1
    for thing in (shelf, bytes_of, archive, base, consumer, changes, versions, cursor):
        thing.close()
    assert unraised == []


def test_a_copy_of_what_a_task_is_to_close_is_refused_and_it_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        opening = kvwal.aio.open(tmp_path / "b.kv")
        assert_not_copied(opening)
        async with opening as store:
            await store.put(b"k", b"v")
            reading = store.consumer("mailer", start=0)
            async with store.changes(0) as changes, store.bootstrap() as base, reading as consumer:
                scan, cursor = store.scan(), store.cursor()
                for thing in (changes, base, consumer, scan, cursor):
                    assert_not_copied(thing)
                gc.collect()
                assert (await anext(changes)).key == b"k"
                assert [pair async for pair in scan] == [(b"k", b"v")]
                assert await cursor.first()
                assert await base.snapshot.get(b"k") == b"v"
                assert (await anext(consumer)).changes
                await cursor.close()

    run(main())


PUBLIC = [kvwal, kvwal.aio, kvwal.compat.dbm, kvwal.compat.shelve, kvwal.eventsourcing, kvwal.events]
# What has nothing to close: it leaves a block, or is of the library and holds what is refused.
CLOSES_NOTHING = {"OwnCommits", "KvwalFactory", "BsdDbShelf", "Shelf"}


def test_no_public_class_with_something_to_close_can_be_copied() -> None:
    found = {value for module in PUBLIC for value in vars(module).values() if inspect.isclass(value)}
    ends = ("close", "aclose", "__exit__", "__aexit__", "__del__")
    closing = {kind for kind in found if any(hasattr(kind, end) for end in ends)}
    assert closing >= {kvwal.Changes, kvwal.Archive, kvwal.KeyVersions, kvwal.Cursor, kvwal.Store, kvwal.aio.Scan}
    assert {kind.__name__ for kind in closing if not issubclass(kind, Uncopied)} == CLOSES_NOTHING


@pytest.mark.parametrize("base", [kvwal.Store, kvwal.Snapshot, kvwal.Transaction, AsyncStore])
def test_a_subclass_is_refused_where_it_is_defined(base: type) -> None:
    with pytest.raises(TypeError, match=f"{base.__name__} cannot be inherited from"):
        type("Mine", (base,), {"__module__": "application"})


def test_a_handle_can_be_referred_to_weakly_and_is_no_key_as_a_dict_is_none(db: Store) -> None:
    for make in (lambda: db, db.snapshot, db.transaction):
        handle = make()
        reference = weakref.ref(handle)
        assert reference() is handle
        with pytest.raises(TypeError, match="unhashable"):
            hash(handle)
    del handle
    gc.collect()
    assert reference() is None


def test_a_handle_that_is_over_cannot_be_entered_again(db: Store) -> None:
    for make in (db.snapshot, db.transaction):
        handle = make()
        with handle:
            assert handle[b"k"] == b"v"
        with pytest.raises(ClosedError), handle:
            pytest.fail("it was entered")
    with db:
        assert db[b"k"] == b"v"
    with pytest.raises(ClosedError, match="closed"), db:
        pytest.fail("it was entered")
    db.close()


def test_a_store_entered_twice_is_closed_by_the_first_exit_as_a_file_is(db: Store) -> None:
    with db:
        with db:
            db[b"k"] = b"w"
        with pytest.raises(ClosedError):
            db.get(b"k")


def test_an_asyncio_handle_that_is_over_cannot_be_entered_again(tmp_path: Path) -> None:
    async def main() -> None:
        store = await kvwal.aio.open(tmp_path / "b.kv")
        handles: list[Any] = [store.snapshot(), store.transaction(), store]
        for handle in handles:
            async with handle:
                assert await handle.get(b"k") is None
            with pytest.raises(ClosedError):
                async with handle:
                    pytest.fail("it was entered")

    run(main())


# What is given for a parameter of this name; anything else is given a key.
ARGUMENTS: dict[str, Any] = {
    "a": 0,
    "default": b"d",
    "delta": 1,
    "expire_s": 1,
    "function": lambda *_: None,
    "keys": [b"k"],
    "n": 0,
    "name": "mailer",
    "new": "other",
    "table": 16,
    "to": 0,
    "other": {b"k": b"v"},
    "value": b"v",
}
SPECIAL = ["bool", "contains", "delitem", "eq", "getitem", "iter", "len", "reversed", "setitem"]
# Harmless when it is over, or tried with the writes that are only collected; all else raises.
QUIET: dict[type, list[str]] = {
    Store: ["close"],
    kvwal.Snapshot: ["close"],
    kvwal.Transaction: ["abort", "commit", "request"],
    AsyncStore: ["close"],
    AsyncSnapshot: ["close"],
    AsyncTransaction: ["abort", "commit"],
}
# Only collected, until the commit says that the store is closed.
COLLECTED = ["__setitem__", "clear", "delete", "delete_range", "put", "put_stamped", "update"]


def ways_to_use(kind: type) -> list[str]:
    names = [name for name in dir(kind) if not name.startswith("_") and name not in QUIET[kind]]
    if issubclass(kind, collections.abc.Mapping):
        names += [f"__{name}__" for name in SPECIAL if hasattr(kind, f"__{name}__")]
    return [name for name in names if callable(inspect.getattr_static(kind, name))]


def call(handle: Any, name: str) -> Any:
    method = getattr(handle, name)
    arguments: list[Any] = []
    named: dict[str, Any] = {}
    for parameter in inspect.signature(method).parameters.values():
        if parameter.name == "batch":
            batch = WriteBatch()
            batch.put(b"k", b"v")
            arguments.append(batch)
        elif parameter.default is parameter.empty and parameter.kind in (0, 1):
            arguments.append(ARGUMENTS.get(parameter.name, b"k"))
        elif parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY:
            named[parameter.name] = ARGUMENTS[parameter.name]
    return method(*([{b"k": b"v"}] if name == "update" else arguments), **named)


def use(handle: Any, name: str) -> None:
    """Call the method, and use what it returns."""
    result = call(handle, name)
    if inspect.isfunction(result):
        result()
    elif name == "batch":
        with result as batch:
            batch.put(b"k", b"v")
    elif isinstance(result, kvwal.Cursor):
        result.first()
    elif isinstance(result, collections.abc.Iterable):
        list(result)


async def use_in_a_task(handle: Any, name: str) -> None:
    result = call(handle, name)
    if inspect.isawaitable(result):
        result = await result
    if inspect.isfunction(result):
        await result()
    elif name == "batch":
        async with result as batch:
            batch.put(b"k", b"v")
    elif isinstance(result, kvwal.aio.AsyncCursor):
        await result.first()
    elif isinstance(result, collections.abc.AsyncIterable):
        assert [each async for each in result]


def test_every_use_of_what_another_thread_closed_says_that_it_is_closed(db: Store) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: db,
        db.snapshot,
        db.transaction,
        functools.partial(db.transaction, read_only=True),
    ]
    # One for each use, since a use may end it.
    tried = [(make(), name) for make in makers for name in ways_to_use(type(make()))]
    run_threads(db.close)
    assert len(tried) > 100
    for handle, name in tried:
        collected = isinstance(handle, kvwal.Transaction) and name in COLLECTED
        try:
            use(handle, name)
            if collected:
                handle.commit()
        except ClosedError as error:
            assert "closed" in str(error) or "over" in str(error)
        except ReadOnlyError:
            assert isinstance(handle, kvwal.Transaction)
        else:
            pytest.fail(f"{type(handle).__name__}.{name} did not say that it is closed")
    assert db.closed
    assert (db.read_only, db.last_seqno) == (False, 1)
    assert "closed" in repr(db)


@pytest.mark.parametrize("beneath", [False, True])
def test_every_use_of_what_was_closed_says_so_in_a_task(tmp_path: Path, beneath: bool) -> None:
    async def main() -> None:
        store = await kvwal.aio.open(tmp_path / "b.kv")
        await store.put(b"k", b"v")
        makers: list[Callable[[], Any]] = [lambda: store, store.snapshot, store.transaction]
        tried = [(make(), name) for make in makers for name in ways_to_use(type(make()))]
        if beneath:
            await asyncio.to_thread(store.store.close)
        else:
            await store.close()
        assert len(tried) > 50
        for handle, name in tried:
            with pytest.raises(ClosedError):
                await use_in_a_task(handle, name)
                if isinstance(handle, AsyncTransaction) and name in COLLECTED:
                    await handle.commit()
                pytest.fail(f"{type(handle).__name__}.{name} did not say that it is closed")

    run(main())


def test_a_read_that_meets_a_close_answers_rightly_or_says_that_it_is_closed(tmp_path: Path) -> None:
    expected = {b"%03d" % number: b"%d" % number * 20 for number in range(300)}
    with kvwal.open(tmp_path / "a.kv") as db:
        db.update(expected)
    for _ in range(10):
        db = kvwal.open(tmp_path / "a.kv", "w", cache_bytes=256 << 10)

        def read(db: Store = db) -> int:
            rounds = 0
            with pytest.raises(ClosedError):
                while True:
                    for key, value in expected.items():
                        assert db[key] == value
                    assert dict(db) == expected
                    rounds += 1
            return rounds

        def close(db: Store = db) -> None:
            for key in expected:
                assert db[key] == expected[key]
            db.close()

        run_threads(read, read, close)


def test_a_scan_that_meets_a_close_gives_the_pairs_of_its_moment_or_says_that_it_is_closed(db: Store) -> None:
    expected = {b"%05d" % number: b"x" * 50 for number in range(5000)} | {b"k": b"v"}
    db.update(expected)
    short, long, reverse = db.scan(prefix=b"k"), db.scan(), db.scan(reverse=True)
    first, last = next(long), next(reverse)
    db.close()
    assert list(short) == [(b"k", b"v")]
    found = [first]
    with pytest.raises(ClosedError):
        found += long
    assert found == sorted(expected.items())[: len(found)]
    with pytest.raises(ClosedError):
        list(reverse)
    assert last == (b"k", b"v")
