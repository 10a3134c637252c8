"""Sorting in steps: in order, and no step is long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.sorting import sorted_in_steps


class Counted(list[bytes]):
    """Keys that count how many of them were taken."""

    seen = 0

    def __iter__(self) -> Iterator[bytes]:
        for key in super().__iter__():
            self.seen += 1
            yield key


@given(st.lists(st.binary(max_size=4), unique=True))
def test_keys_sorted_in_steps_are_sorted(keys: list[bytes]) -> None:
    assert [key for step in sorted_in_steps(keys) for key in step] == sorted(keys)


@pytest.mark.parametrize(
    "order",
    [
        lambda number: number,
        lambda number: -number,
        lambda number: number * 7919 % 30_011,
        # From sources that take turns.
        lambda number: number % 128 * 1000 + number // 128,
        lambda number: number % 3 * 20_000 + number // 3,
    ],
    ids=["ascending", "descending", "scattered", "128 sources", "3 sources"],
)
def test_no_step_of_sorting_is_long(order: Any) -> None:
    """No other thread runs during a step, so that none takes many keys, also of those that lead to the first list."""
    keys = Counted(b"%08d" % (order(number) + 40_000) for number in range(30_000))
    found: list[bytes] = []
    seen = 0
    for step in sorted_in_steps(keys):
        assert len(step) < 4096
        assert keys.seen - seen <= 1024
        seen = keys.seen
        found += step
    assert found == sorted(keys)
