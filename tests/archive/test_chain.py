"""What a destination holds gives exactly the moments that bases and units lead to, and what is missing has a name."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kvwal.backup import state, units
from kvwal.backup.chain import Gap, held_lines, list_held, seqno_at, time_bounds
from kvwal.backup.names import BaseName, UnitName
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.replaying import replay_units
from kvwal.backup.units import UnitBuilder, UnitCommit, line_digest
from kvwal.errors import BackupDestinationError, CorruptionError, FormatError, SnapshotTooOld
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk

STORE, LINE, OTHER = bytes(16), b"\x01" * 8, b"\x02" * 8
NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
NOON_US = int(NOON.timestamp()) * 1_000_000


def commit(seqno: int, body: bytes | None = None) -> UnitCommit:
    """Each is a second after the one before."""
    return UnitCommit(1, Seqno(seqno), NOON_US + seqno * 1_000_000, b"%d" % seqno if body is None else body)


class Place:
    """A destination into which a test puts what it likes."""

    def __init__(self) -> None:
        self.there = DirectoryDestination("/b", files=SimulatedDisk())

    def unit(
        self, first: int, last: int, level: int = 0, revision: int = 0, body: bytes | None = None, store: bytes = STORE
    ) -> None:
        builder = UnitBuilder(store, LINE, Seqno(0), line_digest(store, LINE))
        for seqno in range(1, first + 1):
            builder.add(1, commit(seqno).time_us, commit(seqno).body)
        builder = UnitBuilder(store, LINE, Seqno(first), builder.digest)
        for seqno in range(first + 1, last + 1):
            made = commit(seqno, body)
            builder.add(made.kind, made.time_us, made.body)
        unit, data = builder.encode(level=level, revision=revision)
        self.there.put_new(str(unit.header.name), data)

    def base(self, seqno: int, generation: int, parent: int = 0) -> None:
        self.there.put_new(str(BaseName(LINE, Seqno(seqno), generation, parent)), b"base")

    def held(self) -> Any:
        return list_held(self.there, LINE)


@pytest.fixture
def place() -> Place:
    return Place()


def test_without_a_base_there_is_no_moment(place: Place) -> None:
    place.unit(0, 5)
    held = place.held()
    assert (held.stretches(), held.gaps(), held.newest()) == ([], [], None)
    with pytest.raises(BackupDestinationError, match="no whole base"):
        held.plan(3)


def test_a_moment_is_its_base_and_the_units_behind_it(place: Place) -> None:
    place.base(3, 1)
    place.base(9, 4, 1)
    for first in range(0, 15, 5):
        place.unit(first, first + 5)
    held = place.held()
    assert held.stretches() == [(3, 15)]
    assert held.gaps() == []
    plan = held.plan(3)
    assert ([base.seqno for base in plan.bases], plan.units, plan.after) == ([3], (), 3)
    plan = held.plan(8)
    assert ([base.seqno for base in plan.bases], [(u.first, u.last) for u in plan.units]) == ([3], [(0, 5), (5, 10)])
    plan = held.plan(12)
    assert [base.seqno for base in plan.bases] == [3, 9]
    assert [(u.first, u.last) for u in plan.units] == [(5, 10), (10, 15)]
    assert plan.bytes == sum(held.sizes[str(name)] for name in (*plan.bases, *plan.units))
    for at in (2, 16):
        with pytest.raises(SnapshotTooOld) as caught:
            held.plan(at)
        assert (caught.value.asked, caught.value.oldest, caught.value.newest) == (at, 3, 15)
    # A base that was cut within a checkpoint in parts needs the units from before.
    assert [u.first for u in held.plan(10, begins=lambda base: Seqno(base.seqno - 6)).units] == [0, 5]


def test_a_gap_has_a_name_and_moments_on_both_sides(place: Place) -> None:
    place.base(0, 1)
    place.unit(0, 5)
    place.unit(7, 12)
    place.base(10, 5)
    held = place.held()
    assert held.stretches() == [(0, 5), (10, 12)]
    assert held.gaps() == [Gap(Seqno(6), Seqno(9))]
    assert str(held.gaps()[0]) == "6..9"
    for at in (6, 9):
        with pytest.raises(SnapshotTooOld, match="5 and 10") as caught:
            held.plan(at)
        assert caught.value.nearest == (5, 10)
    assert held.plan(12).after == 10


def test_a_first_unit_that_is_missing_is_seen_and_so_is_a_parent_that_is(place: Place) -> None:
    """Litestream #224, #535, #805; sqld #766."""
    place.base(4, 1)
    place.unit(5, 9)
    place.base(12, 8, 3)
    held = place.held()
    assert held.stretches() == [(4, 4)]
    assert held.lineage(held.bases[1]) is None
    with pytest.raises(SnapshotTooOld):
        held.plan(9)
    with pytest.raises(SnapshotTooOld):
        held.plan(12)


def test_of_two_bases_of_one_generation_the_parent_is_one_of_no_later_commit(place: Place) -> None:
    """Recovery set the store back by a generation, and wrote the next one in parts, behind which a base was made."""
    place.base(30, 4)
    place.base(40, 5, 4)
    place.base(35, 5)
    place.base(38, 6, 5)
    place.base(50, 7, 6)
    held = place.held()
    assert [base.seqno for base in held.plan(50).bases] == [35, 38, 50]
    assert [base.seqno for base in held.plan(40).bases] == [30, 40]
    place.there.delete(str(held.bases[1]))
    assert [tuple(each) for each in place.held().stretches()] == [(30, 30), (40, 40)]


def test_a_base_right_behind_the_units_leaves_no_gap(place: Place) -> None:
    place.base(0, 1)
    place.unit(0, 5)
    place.base(6, 2)
    place.unit(6, 8)
    assert place.held().stretches() == [(0, 8)]
    assert place.held().gaps() == []


def test_of_units_that_overlap_the_fewest_are_taken(place: Place) -> None:
    place.base(0, 1)
    for first in range(12):
        place.unit(first, first + 1)
    place.unit(0, 6, level=1)
    place.unit(4, 9, level=1)
    place.unit(0, 8, level=2)
    assert [(u.first, u.last) for u in place.held().units_from(0, 12)] == [(0, 8), (4, 9), (9, 10), (10, 11), (11, 12)]


def test_the_newest_revision_counts(place: Place) -> None:
    place.base(0, 1)
    place.unit(0, 3)
    place.unit(0, 3, revision=2, body=b"redacted")
    place.unit(0, 3, revision=1)
    plan = place.held().plan(3)
    assert [u.revision for u in plan.units] == [2]
    assert next(replay_units(place.there, STORE, plan.units, Seqno(0), Seqno(3))).bodies[0] == b"redacted"


@pytest.mark.parametrize("at_once", [1, 2, 3, 1024])
def test_replay_gives_each_commit_once_through_units_of_any_cut(
    place: Place, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "_RUN", at_once)
    draw = random.Random(4)
    place.base(0, 1)
    for _ in range(60):
        first = draw.randrange(40)
        place.unit(first, min(40, first + draw.randint(1, 9)), level=draw.randrange(4))
    place.unit(0, 1)
    held = place.held()
    for _ in range(50):
        after = Seqno(draw.randrange(held.reach(Seqno(0))))
        until = Seqno(draw.randint(after, held.reach(Seqno(0))))
        runs = list(replay_units(place.there, STORE, held.units_from(after, until), after, until))
        assert all(0 < len(run) <= at_once for run in runs)
        assert [commit for run in runs for commit in run] == [commit(seqno) for seqno in range(after + 1, until + 1)]


def test_replay_refuses_units_that_do_not_follow_each_other(place: Place) -> None:
    place.unit(0, 5)
    place.unit(5, 9, body=b"of another history")
    place.unit(9, 12)
    place.unit(3, 8, level=1, body=b"of another history")
    names = [UnitName(LINE, 0, Seqno(a), Seqno(b)) for a, b in ((0, 5), (5, 9), (9, 12))]
    with pytest.raises(CorruptionError, match="other commits"):
        list(replay_units(place.there, STORE, names, Seqno(0), Seqno(12)))
    with pytest.raises(CorruptionError, match="other commits"):
        list(replay_units(place.there, STORE, [names[0], UnitName(LINE, 1, Seqno(3), Seqno(8))], Seqno(0), Seqno(8)))
    with pytest.raises(CorruptionError, match="6 to 9 before it are missing"):
        list(replay_units(place.there, STORE, [names[0], names[2]], Seqno(0), Seqno(12)))
    with pytest.raises(CorruptionError, match="6 to 8 are missing"):
        list(replay_units(place.there, STORE, names[:1], Seqno(0), Seqno(8)))
    with pytest.raises(CorruptionError, match="another store"):
        list(replay_units(place.there, bytes(15) + b"\1", names, Seqno(0), Seqno(5)))


def test_a_time_is_that_of_commits_whatever_the_objects_say(place: Place) -> None:
    """Litestream #771, #1038, #1056: times of files decided, and moments vanished when files were merged or copied."""
    place.base(0, 1)
    for first in range(0, 20, 2):
        place.unit(first, first + 2)
    place.unit(0, 8, level=1)
    place.unit(8, 20, level=1)
    for name, _ in list(place.there.list_after(LINE.hex())):
        if "/unit/0/" in name and ("2-" in name or "9" in name or "8-" in name):
            place.there.delete(name)
    held = place.held()
    for seqno in range(1, 21):
        for more_s in (0, 0.5, 0.999999):
            assert seqno_at(place.there, held, NOON + timedelta(seconds=seqno + more_s)) == seqno
    assert seqno_at(place.there, held, NOON + timedelta(days=900)) == 20
    with pytest.raises(SnapshotTooOld):
        seqno_at(place.there, held, NOON + timedelta(seconds=0.5))
    with pytest.raises(ValueError, match="time zone"):
        seqno_at(place.there, held, datetime(2030, 1, 1))  # noqa: DTZ001
    assert time_bounds(place.there, held) == (NOON + timedelta(seconds=1), NOON + timedelta(seconds=20))


def test_a_time_within_a_gap_is_refused_since_it_cannot_be_told(place: Place) -> None:
    place.base(0, 1)
    place.unit(0, 5)
    place.base(10, 2)
    place.unit(10, 12)
    held = place.held()
    assert seqno_at(place.there, held, NOON + timedelta(seconds=4.5)) == 4
    assert seqno_at(place.there, held, NOON + timedelta(seconds=11)) == 11
    for second in (5.0, 8.0, 10.9):
        with pytest.raises(SnapshotTooOld) as caught:
            seqno_at(place.there, held, NOON + timedelta(seconds=second))
        assert caught.value.nearest == (5, 10)


def test_units_whose_times_do_not_ascend_are_damage_that_is_named(place: Place) -> None:
    place.base(0, 1)
    place.unit(0, 10)
    builder = UnitBuilder(STORE, LINE, Seqno(4), bytes(32))
    for seqno in (5, 6):
        builder.add(1, 1000, b"%d" % seqno)
    made, data = builder.encode()
    place.there.put_new(str(made.header.name), data)
    with pytest.raises(CorruptionError, match="later than") as caught:
        seqno_at(place.there, place.held(), datetime(1970, 1, 2, tzinfo=UTC))
    assert caught.value.file == str(place.held().units[0])


def test_lines_are_found_among_all_else(place: Place) -> None:
    assert held_lines(place.there) == []
    assert time_bounds(place.there, place.held()) is None
    place.base(0, 1)
    place.there.put_new(str(UnitName(OTHER, 0, Seqno(0), Seqno(1))), b"")
    place.there.put_new("lines/" + OTHER.hex(), b"")
    place.there.put_new("0000000000000000/readme", b"")
    place.there.put_new("readme", b"")
    place.there.put_new("zz/unit", b"")
    assert sorted(held_lines(place.there)) == [LINE, OTHER]


def model_of_stretches(bases: list[tuple[int, int, int]], units: list[tuple[int, int]]) -> set[int]:
    """All moments that can be restored, by following every unit from every base."""
    seqnos = {generation: seqno for seqno, generation, _ in bases}
    parents = {generation: parent for _, generation, parent in bases}
    found: set[int] = set()
    for seqno, generation, _ in bases:
        at = generation
        # Nothing is built on a base of later commits.
        while parents[at] and seqnos.get(parents[at], 99) <= seqnos[at]:
            at = parents[at]
        if parents[at]:
            continue
        moments = {seqno}
        for _ in units:
            for first, last in units:
                if first in moments or any(first < m <= last for m in moments):
                    low = min(m for m in moments if m >= first)
                    moments |= set(range(low, last + 1))
        found |= moments
    return found


@pytest.mark.parametrize("seed", range(40))
def test_stretches_plans_and_gaps_are_those_of_a_model(seed: int) -> None:
    draw = random.Random(seed)
    bases: list[tuple[int, int, int]] = []
    for generation in range(1, draw.randint(2, 6)):
        # Of a parent that may be missing.
        parent = draw.choice([0, draw.randrange(generation)])
        bases.append((draw.randrange(25), generation, parent))
    bases = [base for base in bases if draw.random() < 0.8]
    units = []
    for _ in range(draw.randrange(9)):
        first = draw.randrange(25)
        units.append((first, first + draw.randint(1, 8)))
    place = Place()
    for base in bases:
        place.base(*base)
    for first, last in units:
        place.there.put_new(str(UnitName(LINE, draw.randrange(4), Seqno(first), Seqno(last))), b"")
    held = place.held()
    expected = model_of_stretches(bases, units)
    assert {m for s in held.stretches() for m in range(s.first, s.last + 1)} == expected
    missing = {m for gap in held.gaps() for m in range(gap.first, gap.last + 1)}
    end = max([*expected, *(last for _, last in units)]) if expected else 0
    assert missing == (set(range(min(expected), end + 1)) - expected if expected else set())
    for mark in range(40) if expected else ():
        marked = {m for gap in held.gaps(Seqno(mark)) for m in range(gap.first, gap.last + 1)}
        assert marked == set(range(min(expected), max(end, mark) + 1)) - expected
    for at in range(35):
        if at not in expected:
            with pytest.raises((SnapshotTooOld, BackupDestinationError)):
                held.plan(Seqno(at))
            continue
        plan = held.plan(Seqno(at))
        reached = plan.after
        for unit in plan.units:
            assert unit.first <= reached < unit.last
            reached = unit.last
        assert reached >= at
        assert plan.bases[0].parent == 0


# -- small objects ---------------------------------------------------------------------------------


def test_a_destination_is_of_one_store(place: Place) -> None:
    with pytest.raises(BackupDestinationError, match="holds no backup"):
        state.identity_of(place.there)
    state.claim(place.there, STORE)
    state.claim(place.there, STORE)
    assert state.identity_of(place.there) == STORE
    with pytest.raises(BackupDestinationError, match="each needs its own"):
        state.claim(place.there, bytes(15) + b"\1")


def test_small_objects_are_changed_without_losing_what_others_wrote(place: Place) -> None:
    assert state.read(place.there, state.GAPS) == (None, {})
    state.change(place.there, state.GAPS, lambda members: {**members, "a": 1})
    state.change(place.there, state.GAPS, lambda members: {**members, "b": 2})
    assert state.read(place.there, state.GAPS)[1] == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff",
        b"{}",
        b'{"crc":1,"v":1}',
        b'{"crc":"x","v":1}',
        b"[" * 100_000,
        state.dump({"a": 1})[:-1],
        state.dump({"a": 1}).replace(b'"a":1', b'"a":2'),
    ],
)
def test_a_small_object_that_is_damaged_is_named(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="state/x"):
        state.load("state/x", data)


def test_a_small_object_of_a_newer_version_is_refused(place: Place) -> None:
    newer = state._json({"v": 2, "crc": state.crc32c(state._json({"v": 2}))})
    with pytest.raises(FormatError):
        state.load("state/x", newer)
    place.there.put_new("kvwal-archive", state.dump({"store": STORE.hex(), "required": 4, "optional": 0}))
    with pytest.raises(FormatError, match=r"features \[2\]"):
        state.identity_of(place.there)
    for members in ({}, {"store": STORE.hex()}, {"store": "0", "required": 0}, {"store": 5, "required": 0}):
        other = Place()
        other.there.put_new("kvwal-archive", state.dump(members))
        with pytest.raises(CorruptionError, match="kvwal-archive"):
            state.identity_of(other.there)
