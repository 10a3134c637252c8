"""The past against a plain model, by a few programs of the part `past` of the crash tests; and that it finds defects.

`python -m crashtests --part past` runs thousands of them.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from crashtests import past
from crashtests.console import Progress
from crashtests.history import Violation
from crashtests.mutations import MUTANTS, Mutant, applied
from crashtests.past_model import KEYS, Model, Written
from crashtests.workers import Run


@pytest.mark.parametrize("number", range(12))
def test_what_the_store_tells_of_its_past_is_what_the_model_says(seed: int, number: int) -> None:
    short = (each for i in count() if len((each := past.drawn(seed, i))[1]) < 160)
    options, program = next(short)
    assert past.play(options, program) > 50, number


def test_the_same_seed_draws_the_same_programs_of_50_to_500_commits() -> None:
    sizes = []
    for number in range(60):
        options, program = past.drawn(1, number)
        assert (options, program) == past.drawn(1, number)
        sizes.append(sum(step[0] in ("one", "batch", "txn", "revert") for step in program))
        # What is drawn is what its tests need: one range to the end would delete the projection's row.
        projects = ["project"] in program
        writes = [write for step in program if step[0] in ("batch", "txn") for write in step[1] if write[0] == 0]
        writes += [[0, *step[1:]] for step in program if step[0] == "one"]
        assert not (projects and any(write[1] == "range" and write[3] is None for write in writes))
    assert min(sizes) < 70
    assert 400 < max(sizes) <= 500


@pytest.mark.parametrize("mutant", [each for each in MUTANTS if each.part == "past"], ids=lambda mutant: mutant.name)
def test_a_defect_is_found_within_thirty_programs(mutant: Mutant) -> None:
    def try_all() -> None:
        for number in range(30):
            past.play(*past.drawn(1, number))

    with applied(mutant), pytest.raises(Violation):
        try_all()


def test_a_violation_is_reported_with_a_small_program_that_shows_it() -> None:
    mutant = next(each for each in MUTANTS if each.name == "a deleted range is no version of its keys")
    options, program = past.drawn(1, 0)
    with applied(mutant):
        smallest = past.shrink(program, lambda rest: type(past.error_of(options, rest)) is Violation)
        assert len(smallest) <= 3 < len(program)
        with pytest.raises(Violation):
            past.play(options, smallest)
    past.play(options, smallest)


def test_shrinking_ends_after_as_many_tries_as_it_has() -> None:
    tried: list[Any] = []

    def fails(rest: Any) -> bool:
        tried.append(rest)
        return [7] in rest and [70] in rest

    program = [[number] for number in range(100)]
    assert past.shrink(program, fails) == [[7], [70]]
    tried.clear()
    assert len(past.shrink(program, fails, tries=5)) > 2
    assert len(tried) == 5


def test_a_program_can_be_run_again_by_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(1, 0.0, 1.0, 1, Progress(quiet=True))
    assert past.replay("10", run) == 0
    assert capsys.readouterr().out == "nothing is wrong\n"


# -- the model ---------------------------------------------------------------------------------


def test_the_model_tells_ranges_first_and_cuts_them_to_prefixes() -> None:
    written = Written({})
    written.put(0, b"a", b"1")
    written.delete_range(0, b"", b"b")
    written.delete_range(0, b"x", b"x")
    written.put(0, b"a1", b"2")
    written.put(16, b"a", None)
    assert written.told(b"", None) == [
        (0, "delete_range", b"", b"b", None),
        (0, "put", b"a1", None, b"2"),
        (16, "delete", b"a", None, None),
    ]
    assert written.told([b"a", b"a1"], [0]) == [(0, "delete_range", b"a", b"b", None), (0, "put", b"a1", None, b"2")]
    assert written.told(b"\xff", None) == []
    assert written.of_key(0, b"a") == ("range", None)
    assert written.of_key(0, b"a1") == ("put", b"2")
    assert written.of_key(16, b"b") is None


def test_the_model_has_the_state_of_each_commit() -> None:
    model = Model()
    for value in (b"1", b"2"):
        written = Written({})
        written.put(0, b"a", value)
        model.add(written)
    model.add_own(3)
    deleted = Written({})
    deleted.delete_range(0, b"", None)
    model.add(deleted)
    states = [(seqno, state.copy()) for seqno, state in model.states()]
    assert states == [(0, {}), (1, {(0, b"a"): b"1"}), (2, {(0, b"a"): b"2"}), (3, {(0, b"a"): b"2"}), (4, {})]
    model.cut(1)
    assert (model.state, model.last) == ({(0, b"a"): b"1"}, 1)
    assert sorted(KEYS) == KEYS
