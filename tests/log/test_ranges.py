"""The deleted ranges of a segment: against a model, and while they become more."""

from __future__ import annotations

from random import Random

import pytest

from kvwal.keys import KeyRange
from kvwal.log import ranges
from kvwal.log.ranges import Range, Ranges, newest_at

TABLES = [0, 16]


def some(rng: Random, seqno: int, table: int) -> Range:
    start, stop = sorted(rng.choices(range(40), k=2))
    bounds = KeyRange(b"%02d" % start if start else b"", b"%02d" % stop if stop < 38 else None)
    return Range(seqno, 100 * seqno, table, bounds)


def check(rng: Random, found: Ranges, model: list[Range], table: int, after: int, until: int) -> None:
    between = [each for each in model if each.table == table and after < each.seqno <= until]
    assert found.between(table, after, until) == between
    covers = found.covers(table, after, until)
    assert all(cover[0][0] == b"" and cover == sorted(cover) for cover in covers)
    for key in [b"", *(b"%02d" % number for number in rng.sample(range(40), 4))]:
        with_key = [each for each in reversed(between) if each.bounds.contains(key)]
        assert list(found.with_key(table, key, after, until)) == with_key
        # Newest first: the first that says something says what is true.
        said = [newest_at(cover, key) for cover in covers]
        assert next(filter(None, said), 0) == max(said, default=0) == (with_key[0].seqno if with_key else 0)


@pytest.mark.parametrize("width", [2, 3, 32])
def test_ranges_are_those_of_the_model(width: int, rng: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "_WIDTH", width)
    found, model, seqno = Ranges(), list[Range](), 10
    for step in range(400):
        # Several may be of one commit.
        seqno += rng.randrange(3)
        each = some(rng, seqno, rng.choice(TABLES))
        found.append(each)
        model.append(each)
        assert found == model
        if step % 5 == 0:
            after, until = sorted(rng.choices(range(8, seqno + 3), k=2))
            check(rng, found, model, rng.choice([*TABLES, 17]), after, until)
            check(rng, found, model, 0, 0, seqno)
    for table in TABLES:
        for after in range(8, seqno, 31):
            for until in range(8, seqno, 29):
                check(rng, Ranges(model), model, table, after, until)


def test_not_many_covers_are_between_two_commits_and_each_is_made_once(
    rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    real = ranges._cover_of

    def counted(of: list[Range]) -> list[tuple[bytes, int]]:
        nonlocal made
        made += len(of)
        return real(of)

    monkeypatch.setattr(ranges, "_cover_of", counted)
    n = 3000
    found = Ranges(some(rng, seqno, 0) for seqno in range(1, n + 1))
    for until in range(n + 1):
        assert len(found.covers(0, 0, until)) <= 2 + 2 * 31
        list(found.with_key(0, b"xx", 0, until))
    # Each in a cover of each size, and in those that are of less than a block.
    assert made <= n * (2 + 31)
