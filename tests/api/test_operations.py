"""The methods that depend on what is there: one table of what each does, for `Store` and for `AsyncStore`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aio_fixtures import run
from hypothesis import given, settings
from hypothesis import strategies as st

import kvwal
import kvwal.aio
from kvwal.testing import SimulatedDisk

LARGEST = (1 << 63) - 1


class Awaited:
    """An `AsyncStore` with the methods of a `Store`: each call runs the loop until it is done."""

    def __init__(self, runner: asyncio.Runner, db: Any) -> None:
        self._runner = runner
        self._db = db

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            async def awaited() -> Any:
                return await getattr(self._db, name)(*args, **kwargs)

            return self._runner.run(awaited())

        return call


@pytest.fixture(params=["Store", "AsyncStore"])
def db(request: pytest.FixtureRequest) -> Iterator[Any]:
    disk = SimulatedDisk()
    if request.param == "Store":
        with kvwal.open("/kv", files=disk, background=False) as store:
            yield store
        return
    with asyncio.Runner(debug=True) as runner:

        async def begin() -> Any:
            return await kvwal.aio.open("/kv", files=disk, background=False)

        store = Awaited(runner, runner.run(begin()))
        yield store
        store.close()


def counter(number: int) -> bytes:
    return number.to_bytes(8, "little", signed=True)


# -- add ------------------------------------------------------------------------------------------


def test_add_counts_from_nought_and_returns_the_sum(db: Any) -> None:
    assert db.add(b"n", 5) == 5
    assert db.add(b"n", -7) == -2
    assert db.add(b"n", 0) == -2
    assert db.get(b"n") == counter(-2)


def test_add_of_nought_to_what_is_not_there_makes_a_counter(db: Any) -> None:
    assert db.add(b"n", 0) == 0
    assert db.get(b"n") == counter(0)


@pytest.mark.parametrize("value", [b"", b"1", b"\0" * 7, b"\0" * 9])
def test_add_to_what_is_no_counter_is_a_type_error_and_changes_nothing(db: Any, value: bytes) -> None:
    db.put(b"n", value)
    with pytest.raises(TypeError):
        db.add(b"n", 1)
    assert db.get(b"n") == value


@pytest.mark.parametrize(("there", "delta"), [(LARGEST, 1), (-LARGEST - 1, -1), (1, LARGEST)])
def test_add_beyond_64_bits_is_an_overflow_error_and_changes_nothing(db: Any, there: int, delta: int) -> None:
    db.put(b"n", counter(there))
    with pytest.raises(OverflowError):
        db.add(b"n", delta)
    assert db.get(b"n") == counter(there)
    # The store goes on.
    assert db.add(b"m", 1) == 1


@pytest.mark.parametrize("delta", [LARGEST, -LARGEST - 1])
def test_add_reaches_both_ends_of_64_bits(db: Any, delta: int) -> None:
    assert db.add(b"n", delta) == delta


@pytest.mark.parametrize(
    ("delta", "error"),
    [(1.0, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError), (1 << 63, ValueError)],
)
def test_add_of_what_is_no_number_of_64_bits_is_refused(db: Any, delta: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        db.add(b"n", delta)
    assert db.get(b"n") is None


# -- put_if_absent, setdefault, compare_and_set ---------------------------------------------------


def test_put_if_absent_sets_once(db: Any) -> None:
    assert db.put_if_absent(b"k", b"") is True
    assert db.put_if_absent(b"k", b"2") is False
    assert db.get(b"k") == b""
    db.delete(b"k")
    assert db.put_if_absent(b"k", bytearray(b"3")) is True
    assert db.get(b"k") == b"3"


def test_setdefault_returns_what_is_there(db: Any) -> None:
    assert db.setdefault(b"k", b"1") == b"1"
    assert db.setdefault(b"k", b"2") == b"1"
    assert db.setdefault(b"empty", b"") == b""


def test_setdefault_without_a_value_is_refused_only_where_one_is_needed(db: Any) -> None:
    db.put(b"k", b"1")
    if isinstance(db, kvwal.Store):
        assert db.setdefault(b"k") == b"1"
        with pytest.raises(TypeError):
            db.setdefault(b"new")
    with pytest.raises(TypeError):
        db.setdefault(b"new", None)
    assert db.get(b"new") is None


def test_compare_and_set_is_a_put_a_change_or_a_delete(db: Any) -> None:
    assert db.compare_and_set(b"k", b"1", b"2") is False
    assert db.get(b"k") is None
    assert db.compare_and_set(b"k", None, b"1") is True
    assert db.compare_and_set(b"k", None, b"2") is False
    assert db.compare_and_set(b"k", b"1", b"2") is True
    assert db.compare_and_set(b"k", b"1", None) is False
    assert db.get(b"k") == b"2"
    assert db.compare_and_set(b"k", b"2", None) is True
    assert db.get(b"k") is None
    assert db.compare_and_set(b"k", None, None) is True


def test_compare_and_set_of_equal_bytes_of_another_kind_succeeds(db: Any) -> None:
    db.put(b"k", b"1")
    assert db.compare_and_set(bytearray(b"k"), bytearray(b"1"), memoryview(b"1")) is True
    assert db.get(b"k") == b"1"


def test_an_empty_value_is_not_the_same_as_none(db: Any) -> None:
    db.put(b"k", b"")
    assert db.compare_and_set(b"k", None, b"x") is False
    assert db.compare_and_set(b"k", b"", b"x") is True


# -- pop, __delitem__ -----------------------------------------------------------------------------


def test_pop_returns_the_value_the_default_or_a_key_error(db: Any) -> None:
    db.put(b"k", b"")
    assert db.pop(b"k") == b""
    with pytest.raises(KeyError) as caught:
        db.pop(b"k")
    assert caught.value.args == (b"k",)
    assert db.pop(b"k", None) is None
    assert db.pop(b"k", 5) == 5
    with pytest.raises(TypeError):
        db.pop(b"k", 1, 2)


def test_del_of_a_missing_key_is_a_key_error() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        db[b"k"] = b""
        del db[bytearray(b"k")]  # type: ignore[arg-type]
        with pytest.raises(KeyError) as caught:
            del db[b"k"]
        assert caught.value.args == (b"k",)
        with pytest.raises(TypeError):
            del db["k"]  # type: ignore[arg-type]


# -- popitem --------------------------------------------------------------------------------------


def test_popitem_takes_the_last_pair_or_the_first(db: Any) -> None:
    db.update({b"%d" % number: b"v%d" % number for number in range(4)})
    assert db.popitem() == (b"3", b"v3")
    assert db.popitem(last=False) == (b"0", b"v0")
    assert db.popitem() == (b"2", b"v2")
    assert db.popitem(last=False) == (b"1", b"v1")
    for last in (True, False):
        with pytest.raises(KeyError):
            db.popitem(last=last)


def test_popitem_of_a_range_leaves_what_lies_outside(db: Any) -> None:
    db.update(dict.fromkeys([b"a", b"b", b"c", b"d"], b""))
    assert db.popitem(b"b", b"d") == (b"c", b"")
    assert db.popitem(b"b", b"d", last=False) == (b"b", b"")
    for start, stop in [(b"b", b"d"), (b"d", b"b"), (b"b", b"b"), (b"e", None), (None, b"a")]:
        with pytest.raises(KeyError):
            db.popitem(start, stop)
        with pytest.raises(KeyError):
            db.popitem(start, stop, last=False)
    assert db.popitem(None, b"b") == (b"a", b"")
    assert db.popitem(b"b", None) == (b"d", b"")


def test_popitem_passes_what_was_deleted_in_ranges_and_one_by_one(db: Any) -> None:
    db.update({b"%03d" % number: b"%d" % number for number in range(200)})
    db.checkpoint()
    db.delete_range(None, b"050")
    db.delete_range(b"150", None)
    for number in range(50, 140):
        db.delete(b"%03d" % number)
    assert db.popitem(last=False) == (b"140", b"140")
    assert db.popitem() == (b"149", b"149")


# -- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["commit", "interval", "os"])
def test_each_takes_a_durability_and_refuses_an_unknown_one(db: Any, durability: str) -> None:
    assert db.add(b"n", 1, durability=durability) == 1
    assert db.put_if_absent(b"k", b"1", durability=durability)
    assert db.compare_and_set(b"k", b"1", b"2", durability=durability)
    db.update({b"u": b"1"}, durability=durability)
    for call in (
        lambda: db.add(b"n", 1, durability="never"),
        lambda: db.put_if_absent(b"new", b"1", durability="never"),
        lambda: db.compare_and_set(b"k", b"2", b"3", durability="never"),
        lambda: db.update({b"u": b"2"}, durability="never"),
    ):
        with pytest.raises(ValueError):
            call()
    assert db.get(b"u") == b"1"
    assert (db.add(b"n", 0), db.get(b"k"), db.get(b"new")) == (1, b"2", None)


def test_each_refuses_keys_and_values_that_cannot_be_stored(db: Any) -> None:
    for call in (
        lambda: db.add("n", 1),
        lambda: db.put_if_absent("k", b"1"),
        lambda: db.put_if_absent(b"k", "1"),
        lambda: db.compare_and_set(b"k", "1", b"2"),
        lambda: db.compare_and_set(b"k", None, 5),
        lambda: db.setdefault("k", b"1"),
        lambda: db.pop("k"),
        lambda: db.popitem("k"),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError):
        db.put_if_absent(b"x" * 65_536, b"")
    assert db.get(b"k") is None


def test_each_is_refused_when_the_store_is_closed() -> None:
    db = kvwal.open("/kv", files=SimulatedDisk(), background=False)
    db[b"k"] = b"1"
    db.close()
    for call in (
        lambda: db.add(b"n", 1),
        lambda: db.put_if_absent(b"k", b"1"),
        lambda: db.compare_and_set(b"k", b"1", b"2"),
        lambda: db.setdefault(b"k", b"1"),
        lambda: db.pop(b"k"),
        lambda: db.popitem(),
        lambda: db.__delitem__(b"k"),
    ):
        with pytest.raises(kvwal.ClosedError):
            call()


def test_each_is_refused_by_a_store_that_is_read_only(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "s") as db:
        db[b"k"] = b"1"
    with kvwal.open(tmp_path / "s", "r") as db:
        for call in (
            lambda: db.add(b"n", 1),
            lambda: db.put_if_absent(b"new", b"1"),
            lambda: db.compare_and_set(b"k", b"1", b"2"),
            lambda: db.pop(b"k"),
            lambda: db.popitem(),
            lambda: db.__delitem__(b"k"),
        ):
            with pytest.raises(kvwal.ReadOnlyError):
                call()
        assert dict(db) == {b"k": b"1"}


def test_what_they_did_is_there_after_a_crash() -> None:
    disk = SimulatedDisk()
    db = kvwal.open("/kv", files=disk, background=False)
    db.add(b"n", 3)
    db.put_if_absent(b"a", b"1")
    db.compare_and_set(b"a", b"1", b"2")
    db.setdefault(b"b", b"3")
    db[b"c"] = b"4"
    db.pop(b"c")
    db[b"z"] = b"5"
    db.popitem()
    found = disk.crash()
    db.close()
    with kvwal.open("/kv", files=found, background=False) as db:
        assert dict(db) == {b"n": counter(3), b"a": b"2", b"b": b"3"}


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_random_programs_of_a_task_agree_with_a_model(random: Random) -> None:
    """Tasks at once are in test_fairness.py: their order is theirs, since some wait for a page first."""
    keys = [b"a", b"b", b"c"]

    async def main() -> None:
        async with kvwal.aio.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
            model: dict[bytes, bytes] = {}
            for number in range(25):
                key, value, kind = random.choice(keys), b"%d" % number, random.randrange(8)
                if kind == 0:
                    assert await db.put_if_absent(key, value) == (key not in model)
                    model.setdefault(key, value)
                elif kind == 1:
                    wanted = random.choice([None, model.get(key)])
                    assert await db.compare_and_set(key, wanted, value) == (model.get(key) == wanted)
                    if model.get(key) == wanted:
                        model[key] = value
                elif kind == 2:
                    assert await db.pop(key, None) == model.pop(key, None)
                elif kind == 3:
                    await db.delete_range(key, key + b"\0")
                    model.pop(key, None)
                elif kind == 4 and model:
                    last = bool(random.randrange(2))
                    edge = max(model) if last else min(model)
                    assert await db.popitem(last=last) == (edge, model.pop(edge))
                elif kind == 5:
                    assert await db.setdefault(key, value) == model.setdefault(key, value)
                elif kind == 6:
                    await db.checkpoint()
                else:
                    await db.put(key, value)
                    model[key] = value
                assert {key: value async for key, value in db.scan()} == model

    run(main())
