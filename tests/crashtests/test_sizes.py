"""The part with the sizes that users have: it draws what it claims, and a small pass of it finds nothing."""

from itertools import islice
from random import Random

import pytest

import kvwal
from crashtests import sizes
from crashtests.explorer import Case, Explorer, Limits, Tally
from crashtests.history import Violation
from crashtests.mutations import MUTANTS, applied


def test_every_size_is_drawn_at_any_magnitude_and_the_defaults_among_them():
    drawn = [sizes.some_sizes(Random(seed)) for seed in range(400)]
    assert 40 <= drawn.count(sizes.defaults()) <= 100
    for name, (least, doublings) in sizes.SIZES.items():
        values = {options[name] for options in drawn}
        assert min(values) >= least
        assert {value.bit_length() for value in values} >= {(least << n).bit_length() for n in range(doublings)}


def test_the_defaults_are_those_of_a_store_that_is_opened_without_any(tmp_path):
    assert set(sizes.defaults()) == set(sizes.SIZES)
    with kvwal.open(tmp_path / "a.kv", **sizes.defaults()) as db:
        db[b"a"] = b"1"


def test_the_same_seed_makes_the_same_programs():
    assert list(islice(sizes.items(1), 8)) == list(islice(sizes.items(1), 8))
    assert list(islice(sizes.items(1), 8))[2:] != list(islice(sizes.items(2), 8))[2:]


def test_some_programs_stand_some_cuts():
    limits = Limits(choices=2, depth=1)
    for seed, options, program in islice(sizes.items(seed=1), len(sizes.NAMED), len(sizes.NAMED) + 1):
        tally = Tally()
        Explorer(limits, tally, seed=seed, options=options).explore(program)
        assert tally.violations == []
        assert tally.states > 10


def test_the_first_program_needs_the_second_entry_of_an_index():
    seed, options, program = next(sizes.items(seed=1))
    case = Case(program, seed, options, [])
    Explorer(Limits(), Tally()).replay(case)
    mutant = next(mutant for mutant in MUTANTS if mutant.part == "sizes")
    with applied(mutant), pytest.raises(Violation, match="missing"):
        Explorer(Limits(), Tally()).replay(case)
