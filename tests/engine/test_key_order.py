"""The order of a memtable's keys, which is made while keys come."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from store_fixtures import interrupted_at

from kvwal.engine.key_order import KeyOrder
from kvwal.locks import new_lock


def made() -> tuple[dict[bytes, bytes | None], KeyOrder]:
    latest: dict[bytes, bytes | None] = {}
    return latest, KeyOrder(latest, new_lock())


def test_ordered_keys_stay_right_while_keys_come_between_scans() -> None:
    latest, order = made()
    for key in [b"m", b"c", b"x", b"a", b"m", b"n"]:
        latest[key] = b""
        order._check()
    assert order.between(b"b", b"n", after=None, reverse=False, most=9) == [b"c", b"m"]
    assert order.between(None, None, after=b"m", reverse=False, most=1) == [b"n"]
    assert order.between(None, None, after=b"m", reverse=True, most=9) == [b"c", b"a"]
    assert order.between(b"c", b"x", after=None, reverse=True, most=9) == [b"n", b"m", b"c"]


def test_keys_are_numbered_as_they_come() -> None:
    latest, order = made()
    latest.update({b"m": b"", b"c": b"", b"a": b""})
    latest.update({b"m": b"2", b"b": None})
    assert order.added(0, 9) == [b"m", b"c", b"a", b"b"]
    assert order.added(1, 3) == [b"c", b"a"]
    assert order.added(3, 4) == [b"b"]
    assert order.added(4, 4) == []


def test_the_keys_that_came_last_are_found_from_the_end() -> None:
    """A count asks for those since the last one, and there may be a million before."""
    walked = 0

    class Counting(dict[bytes, bytes | None]):
        def __reversed__(self) -> Any:
            nonlocal walked
            for key in super().__reversed__():
                walked += 1
                yield key

        def __iter__(self) -> Any:
            raise AssertionError("walked from the front")

    latest = Counting({b"%d" % number: b"" for number in range(1000)})
    order = KeyOrder(latest, new_lock())
    assert order.added(990, 1000) == [b"%d" % number for number in range(990, 1000)]
    assert order.added(980, 990) == [b"%d" % number for number in range(980, 990)]
    assert walked < 40


@pytest.mark.parametrize("more", [5, 60], ids=["few", "many"])
@pytest.mark.parametrize("first", [0, 100])
def test_an_interruption_anywhere_while_keys_are_put_in_order_loses_none(first: int, more: int) -> None:
    """Interrupted in the midst of it, the order had lost keys, or had them twice, and so had the next checkpoint."""
    for step in range(1, 2000):
        latest, order = made()
        latest.update((b"%03d" % n, b"v") for n in range(0, 2 * first, 2))
        order._check()
        latest.update((b"%03d" % n, b"v") for n in range(1, 2 * more, 2))
        scan = partial(order.between, None, None, after=None, reverse=False, most=1)
        interrupted = interrupted_at(step, scan) is not None
        order._check()
        assert (
            order.between(b"001", b"004", after=None, reverse=False, most=9)
            == sorted(latest)[bool(first) : 2 + bool(first) * 2]
        )
        assert not order.lock._is_owned(), step
        if not interrupted:
            return
    raise AssertionError("putting in order has no end")
