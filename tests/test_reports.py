"""A test that fails says how, within its time."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import engine


def runs_until_reported() -> int:
    """How often a failing test runs until its smallest example is reported."""
    runs = 0

    @hypothesis.seed(1)
    @settings(database=None, phases=[Phase.generate, Phase.shrink])
    @hypothesis.given(st.lists(st.integers(), min_size=1))
    def fails(numbers: list[int]) -> None:
        nonlocal runs
        runs += 1
        assert sum(numbers) < 1000

    with pytest.raises(AssertionError):
        fails()
    return runs


def test_the_search_for_a_smaller_example_ends_long_before_the_limit_of_a_test(pytestconfig: pytest.Config) -> None:
    assert float(pytestconfig.getini("timeout")) >= engine.MAX_SHRINKING_SECONDS * 4


def test_it_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    to_the_end = runs_until_reported()
    monkeypatch.setattr(engine, "MAX_SHRINKING_SECONDS", -1)
    assert runs_until_reported() < to_the_end / 2
