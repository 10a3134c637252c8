"""Feeds, lists of commits and consumers of tables by their names, ids, and by what stands for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from aio_fixtures import opened, run

import kvwal
from kvwal.errors import ConsumerExistsError, TableNotFoundError
from kvwal.testing import SimulatedDisk


def fill(db: kvwal.Store) -> tuple[Any, Any]:
    users, orders = db.table("users", str, int), db.table("orders", str, int)
    users["a"] = 1
    orders["b"] = 2
    db[b"c"] = b"3"
    with db.batch() as batch:
        users.within(batch)["d"] = 4
        orders.within(batch)["e"] = 5
        batch[b"f"] = b"6"
    return users, orders


def test_a_table_into_which_nothing_was_put_is_refused_with_how_it_comes_to_be() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        users = db.table("users", str, int)
        for ask in db.changes, db.commits, partial(db.consumer, "mailer"):
            with pytest.raises(TableNotFoundError, match="'users': one comes to be with the first commit that"):
                ask(tables=[users])
        users.within(kvwal.WriteBatch())
        with db.consumer("mailer", tables=[users], timeout_s=0) as mailer:
            users["ada"] = 1
            assert [users.of(change) for change in next(mailer).changes] == [("ada", 1)]


@pytest.mark.parametrize("tables", [b"x", bytearray(b"x"), memoryview(b"x"), 1.5, object()])
def test_what_is_no_table_is_refused_by_the_name_of_the_argument(tables: Any) -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        for ask in db.changes, db.commits, partial(db.consumer, "mailer"):
            text = f"tables is an id, a name .*, not {type(tables).__name__}"
            with pytest.raises(TypeError, match=text):
                ask(tables=tables)
        # `as_int` says it of one of several.
        with pytest.raises(TypeError, match="a table is an int, not bytes"):
            db.changes(tables=[b"x"])  # type: ignore[list-item]  # that is what is wrong


@pytest.mark.parametrize("prefix", [5, 1.5, None, object()])
def test_what_is_no_prefix_is_refused_by_the_name_of_the_argument(prefix: Any) -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        for ask in db.changes, partial(db.consumer, "mailer"):
            with pytest.raises(TypeError, match=f"prefix is bytes-like, .*, not {type(prefix).__name__}"):
                ask(prefix=prefix)


CHOICES: list[tuple[Any, list[bytes]]] = [
    (lambda users, orders: None, [b"a", b"b", b"c", b"f", b"d", b"e"]),
    (lambda users, orders: "users", [b"a", b"d"]),
    (lambda users, orders: ["users"], [b"a", b"d"]),
    (lambda users, orders: users, [b"a", b"d"]),
    (lambda users, orders: [users], [b"a", b"d"]),
    (lambda users, orders: 16, [b"a", b"d"]),
    (lambda users, orders: 0, [b"c", b"f"]),
    (lambda users, orders: [orders, "users"], [b"a", b"b", b"d", b"e"]),
    (lambda users, orders: (0, "users", orders), [b"a", b"b", b"c", b"f", b"d", b"e"]),
    (lambda users, orders: [], []),
]


@pytest.mark.parametrize(("choose", "keys"), CHOICES)
def test_a_table_is_chosen_by_id_by_name_or_by_what_stands_for_it(choose: Any, keys: list[bytes]) -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        chosen = choose(*fill(db))
        assert [change.key for change in db.changes(0, tables=chosen)] == keys
        counts = {1: [b"a"], 2: [b"b"], 3: [b"c"], 4: [b"d", b"e", b"f"]}
        expected = [(seqno, len({*own} & {*keys})) for seqno, own in counts.items() if {*own} & {*keys}]
        assert [(commit.seqno, commit.changes) for commit in db.commits(tables=chosen)] == expected
        with db.consumer("c", tables=chosen, start="oldest", timeout_s=0) as consumer:
            assert [change.key for change in next(consumer).changes] == keys
        with db.bootstrap() as base:
            fill(db)
            assert [change.key for change in base.changes(tables=chosen)] == keys


@pytest.mark.parametrize(("choose", "keys"), CHOICES)
def test_tasks_choose_alike(choose: Any, keys: list[bytes]) -> None:
    async def main() -> None:
        async with opened(keep_history_bytes=1 << 20) as db:
            fill(db.store)
            chosen = choose(db.table("users", str, int), db.table("orders", str, int))
            async with db.changes(0, tables=chosen) as changes:
                assert [change.key async for change in changes] == keys
            assert [commit.changes async for commit in db.commits(tables=chosen)] == [
                commit.changes for commit in db.store.commits(tables=choose("users", "orders"))
            ]
            async with db.consumer("c", tables=chosen, start="oldest", timeout_s=0) as consumer:
                assert [change.key for change in (await anext(consumer)).changes] == keys
            async with db.bootstrap() as base:
                fill(db.store)
                async with base.changes(tables=chosen) as changes:
                    assert [change.key async for change in changes] == keys

    run(main())


def test_what_is_no_table_is_refused_at_the_call() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        users, _ = fill(db)
        other = db.table("others", str, int)
        for chosen, error in (
            ("others", TableNotFoundError),
            (["users", other], TableNotFoundError),
            (db.sub(b"x"), ValueError),
            (1, ValueError),
            ("", ValueError),
            ([b"users"], TypeError),
            (1.5, TypeError),
        ):
            for call in (db.changes, db.commits, lambda *, tables: db.consumer("c", tables=tables)):
                with pytest.raises(error):
                    call(tables=chosen)  # type: ignore[operator]
        assert db.consumers() == []
        with db.consumer("c", tables="users"):
            pass
        db.rename_table("users", "people")
        with pytest.raises(TableNotFoundError):
            db.changes(tables=users)
        with db.consumer("c", tables="people"):
            pass  # It is the same table.
        db.drop_table("people")
        db.table("people", str, int)["a"] = 1
        with pytest.raises(ConsumerExistsError):
            db.consumer("c", tables="people")
