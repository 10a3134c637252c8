"""Indexes against a model: after any program of writes an index is {key of the function: keys of the table}."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, cast

import pytest
from store_fixtures import TINY, check_store, problems_of

import kvwal
from kvwal import codecs
from kvwal.testing import SimulatedDisk

Model = dict[str, dict[str, Any]]
SMALL = {**TINY, "keep_history_bytes": 1 << 20}

# Some have a zero, some are prefixes of others.
CITIES = ("", "Oslo", "Oslo\0", "Oslo\0\0a", "Rom", "R", "\xff", "a" * 300)
NAMES = [f"{letter}{number}" for letter in "ab\0" for number in range(12)]


def city_of(user: dict[str, Any]) -> str | None:
    return cast("str | None", user.get("city"))


def tags_of(user: dict[str, Any]) -> list[int]:
    return cast("list[int]", user.get("tags", []))


def drawn_user(rng: Random) -> dict[str, Any]:
    user: dict[str, Any] = {"n": rng.randrange(3)}
    if rng.random() < 0.8:
        user["city"] = rng.choice(CITIES)
    if rng.random() < 0.5:
        user["tags"] = [rng.randrange(-3, 4) for _ in range(rng.randrange(4))]
    return user


def open_store(disk: SimulatedDisk) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, **SMALL)


def table_of(db: kvwal.Store) -> kvwal.Table[str, Any]:
    return db.table("users", str, codecs.json())


def declare(users: kvwal.Table[str, Any]) -> tuple[kvwal.Index[str, str, Any], kvwal.Index[int, str, Any]]:
    by_city = users.index("by_city", key=city_of, codec=str)
    by_tag = users.index("by_tag", key=tags_of, codec=int, many=True)
    return by_city, by_tag


def expected_cities(model: Model) -> list[tuple[str, str, dict[str, Any]]]:
    return sorted(((user["city"], name, user) for name, user in model.items() if "city" in user), key=lambda e: e[:2])


def expected_tags(model: Model) -> list[tuple[int, str, dict[str, Any]]]:
    found = [(tag, name, user) for name, user in model.items() for tag in set(tags_of(user))]
    return sorted(found, key=lambda entry: entry[:2])


def check_index(index: Any, expected: list[Any], rng: Random) -> None:
    """Scans of all, and of a part, are what the model says."""
    assert list(index.scan()) == expected
    assert list(index.scan(reverse=True)) == expected[::-1]
    assert list(index.keys(limit=3)) == [entry[:2] for entry in expected[:3]]
    assert index.count() == len(expected)
    if expected:
        start, stop = sorted((rng.choice(expected)[0], rng.choice(expected)[0]))
        within = [entry for entry in expected if start <= entry[0] < stop]
        assert list(index.scan(start, stop)) == within
        assert list(index.scan(start, stop, reverse=True, limit=2)) == within[::-1][:2]
        assert index.count(start, stop) == len(within)
        same = [entry for entry in expected if entry[0] == start]
        assert index.get(start) == [entry[1:] for entry in same]
        assert index.count(equal=start) == len(same)


def check_all(users: Any, by_city: Any, by_tag: Any, model: Model, rng: Random) -> None:
    assert dict(users.items()) == model
    check_index(by_city, expected_cities(model), rng)
    check_index(by_tag, expected_tags(model), rng)


# -- one write each: changes table and model alike ----------------------------------------------


def put(users: Any, model: Model, rng: Random) -> None:
    name, user = rng.choice(NAMES), drawn_user(rng)
    users.put(name, user)
    model[name] = user


def delete(users: Any, model: Model, rng: Random) -> None:
    name = rng.choice(NAMES)
    users.delete(name)
    model.pop(name, None)


def delete_range(users: Any, model: Model, rng: Random) -> None:
    start, stop = sorted(rng.sample(NAMES, 2))
    users.delete_range(start, stop)
    for name in [name for name in model if start <= name < stop]:
        del model[name]


def clear(users: Any, model: Model, rng: Random) -> None:
    if rng.random() < 0.3:
        users.clear()
        model.clear()


def update(users: Any, model: Model, rng: Random) -> None:
    some = {name: drawn_user(rng) for name in rng.sample(NAMES, 8)}
    users.update(some)
    model.update(some)


def pop(users: Any, model: Model, rng: Random) -> None:
    name = rng.choice(NAMES)
    assert users.pop(name, None) == model.pop(name, None)


def popitem(users: Any, model: Model, rng: Random) -> None:
    if model:
        last = rng.random() < 0.5
        name = (max if last else min)(model)
        assert users.popitem(last=last) == (name, model.pop(name))


def setdefault(users: Any, model: Model, rng: Random) -> None:
    name, user = rng.choice(NAMES), drawn_user(rng)
    assert users.setdefault(name, user) == model.setdefault(name, user)


def put_if_absent(users: Any, model: Model, rng: Random) -> None:
    name, user = rng.choice(NAMES), drawn_user(rng)
    assert users.put_if_absent(name, user) == (name not in model)
    model.setdefault(name, user)


def compare_and_set(users: Any, model: Model, rng: Random) -> None:
    name = rng.choice(NAMES)
    new = drawn_user(rng) if rng.random() < 0.7 else None
    assert users.compare_and_set(name, model.get(name), new)
    if new is None:
        model.pop(name, None)
    else:
        model[name] = new


ALONE = (put, put, delete, delete_range, clear, update, pop, popitem, setdefault, put_if_absent, compare_and_set)
WITHIN_TRANSACTION = (put, put, delete, delete_range, clear, update, pop, setdefault)
WITHIN_BATCH = (put, put, delete, delete_range, update)


class Program:
    """Writes of all ways, a reopen now and then, and what each moment was."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.disk = SimulatedDisk()
        self.model: Model = {}
        self.moments: dict[int, Model] = {}
        self.open()

    def open(self) -> None:
        self.db = open_store(self.disk)
        self.users = table_of(self.db)
        self.by_city, self.by_tag = declare(self.users)

    def reopen(self) -> None:
        self.db.close()
        self.open()

    def alone(self) -> None:
        self.rng.choice(ALONE)(self.users, self.model, self.rng)

    def transaction(self) -> None:
        rng, before = self.rng, dict(self.model)
        with self.db.transaction() as txn:
            users = self.users.within(txn)
            for _ in range(rng.randrange(1, 5)):
                rng.choice(WITHIN_TRANSACTION)(users, self.model, rng)
                check_all(users, self.by_city.within(txn), self.by_tag.within(txn), self.model, rng)
            if rng.random() < 0.2:
                txn.abort()
                self.model = before

    def batch(self) -> None:
        with self.db.batch() as batch:
            users = self.users.within(batch)
            for _ in range(self.rng.randrange(1, 5)):
                self.rng.choice(WITHIN_BATCH)(users, self.model, self.rng)

    def revert(self) -> None:
        if self.moments:
            seqno = self.rng.choice(list(self.moments))
            name = self.rng.choice(NAMES)
            self.users.revert(name, to=seqno)
            old = self.moments[seqno].get(name)
            if old is None:
                self.model.pop(name, None)
            else:
                self.model[name] = old

    def build_again(self) -> None:
        """An index of a table that has keys."""
        self.users.drop_index("by_city")
        self.by_city, _ = declare(self.users)

    def rename(self) -> None:
        self.db.rename_table("users", "others")
        others = self.db.table("others", str, codecs.json())
        others.update(drawn := {self.rng.choice(NAMES): drawn_user(self.rng)})
        self.model.update(drawn)
        self.db.rename_table("others", "users")

    def checkpoint(self) -> None:
        self.db.checkpoint()

    def past(self) -> None:
        if self.moments:
            seqno = self.rng.choice(list(self.moments))
            with self.db.snapshot(at=seqno) as then:
                check_all(
                    self.users.within(then),
                    self.by_city.within(then),
                    self.by_tag.within(then),
                    self.moments[seqno],
                    self.rng,
                )

    def run(self, steps: int) -> None:
        rng = self.rng
        choices: list[Callable[[], None]] = [self.alone, self.transaction, self.batch, self.revert, self.past]
        seldom: list[Callable[[], None]] = [self.reopen, self.build_again, self.rename, self.checkpoint]
        for _ in range(steps):
            step = rng.choice(choices if rng.random() < 0.93 else seldom)
            step()
            if step == self.build_again:
                # Before, there was no such index.
                self.moments = {}
            check_all(self.users, self.by_city, self.by_tag, self.model, rng)
            self.moments[self.db.last_seqno] = dict(self.model)
        check_store(self.db)
        assert problems_of(self.db) == []
        self.reopen()
        check_all(self.users, self.by_city, self.by_tag, self.model, rng)
        self.db.close()


@pytest.mark.parametrize("number", range(4))
def test_an_index_is_what_its_function_says_after_any_program_of_writes(seed: int, number: int) -> None:
    Program(Random(f"{seed} {number}")).run(120)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_an_index_is_what_its_function_says_after_many_programs_of_writes(seed: int, number: int) -> None:
    Program(Random(f"slow {seed} {number}")).run(400)


@pytest.mark.parametrize("number", range(3))
def test_deleted_ranges_of_many_keys_are_passed_over_and_removed_later(
    seed: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of two keys nearly every range leaves its entries behind, until a checkpoint removes them."""
    monkeypatch.setattr("kvwal.engine.indexes._MAX_EXACT_KEYS", 2)
    monkeypatch.setattr("kvwal.engine.indexing._STALE_STEP_KEYS", 5)
    Program(Random(f"stale {seed} {number}")).run(120)
