"""Every name of a store is known; whatever else lies in its directory is foreign, however much it looks like one."""

from __future__ import annotations

import pytest

from kvwal.files import names

N = "00000000000000000007"


@pytest.mark.parametrize(
    ("name", "known", "erasable", "temporary"),
    [
        ("data", True, True, False),
        ("poisoned", True, True, False),
        (f"{N}.log", True, True, False),
        (f"{N}.idx", True, True, False),
        (f"{N}.keys", True, True, False),
        ("data.tmp", True, True, True),
        ("salvaging", True, True, False),
        ("spare.tmp", True, True, True),
        (f"{N}.log.tmp", True, True, True),
        (f"{N}.idx.tmp", True, True, True),
        (f"{N}.keys.tmp", True, True, True),
        ("erasing.tmp", True, True, True),
        ("reserve.tmp", True, True, True),
        # What every store has, or what a later version has there.
        ("lock", True, False, False),
        ("reserve", True, False, False),
        ("erasing", True, False, False),
        ("readers", True, False, False),
        ("engine", True, False, False),
        ("engine.sock", True, False, False),
        # Foreign.
        ("notes.tmp", False, False, False),
        (".tmp", False, False, False),
        (f"{N}.tmp", False, False, False),
        (f"{N}.txt", False, False, False),
        (f"{N}.log.bak", False, False, False),
        (f"{N}.log.tmp.tmp", False, False, False),
        (f"{N}.log\n", False, False, False),
        (f"x{N}.log", False, False, False),
        (f"0{N}.log", False, False, False),
        ("7.log", False, False, False),
        ("٠" * 20 + ".log", False, False, False),
        ("data2", False, False, False),
        ("DATA", False, False, False),
        ("", False, False, False),
    ],
)
def test_each_name_is_what_the_table_in_the_format_says(
    name: str, known: bool, erasable: bool, temporary: bool
) -> None:
    assert names.is_known(name) is known
    assert names.is_erasable(name) is erasable
    assert names.is_temporary(name) is temporary


@pytest.mark.parametrize("number", [1, 7, 10**19, 2**63 - 1])
def test_numbers_are_read_back_from_the_names_that_are_made_of_them(number: int) -> None:
    assert names.numbers(names.segment_name(number)) == (number, "log")
    assert names.numbers(names.index_name(number)) == (number, "idx")
    assert names.is_temporary(names.temporary_name(names.segment_name(number)))
