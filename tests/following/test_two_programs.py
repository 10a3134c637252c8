"""A writer and a follower take turns at file operations, on the simulated disk: every answer is a durable moment."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from itertools import combinations, product
from typing import Any

import pytest
from following_fixtures import look_at_no_checksum
from recorded_programs import (
    KEYS,
    PROGRAMS,
    at_random,
    checkpoints,
    one_checkpoint,
    ranges,
    recorded,
    step_by_step,
    turns,
)
from two_programs import PATH, Follow, Recorded, World

import kvwal
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log import encode_put
from kvwal.log.record import encode_record
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader, decode_header
from kvwal.testing import SimulatedDisk


def session(world: World) -> None:
    """What a follower does in an exhaustive run: attach, read, detach, with a moment that it holds."""
    follow = Follow(world)
    held = follow.snapshot()
    next(held)
    follow.scan()
    follow.refresh()
    next(held)
    follow.get()
    held.close()
    follow.close()


def _alone(program: Recorded) -> int:
    """How many operations a follower does that is alone."""
    world = World(program)
    world.advance(program.begin)
    session(world)
    return world.looked


def _interrupted_once(program: Recorded, start: int, at: int, count: int) -> None:
    world = World(program, lambda n: count if n == at else 0)
    world.advance(start)
    session(world)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_follower_alone_sees_the_last_durable_commit_of_every_instant(program: Callable[[Recorded], None]) -> None:
    writer = recorded(program)
    world = World(writer)
    world.advance(writer.begin)
    while world.done < len(writer.steps):
        session(world)
        world.advance(1)
    session(world)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_follower_that_looks_at_every_instant_sees_durable_moments(program: Callable[[Recorded], None]) -> None:
    step_by_step(recorded(program))


def test_what_is_recorded_is_done_again_as_it_was() -> None:
    for program in PROGRAMS:
        writer = recorded(program)
        world = World(writer)
        world.advance(len(writer.steps))
        for name in writer.disk.open_directory("/store").names():
            if name != "lock":
                assert world.disk.read(f"/store/{name}") == writer.disk.read(f"/store/{name}"), name


@pytest.mark.parametrize("program", PROGRAMS)
def test_any_turns_of_both_give_durable_moments(program: Callable[[Recorded], None], rng: random.Random) -> None:
    at_random(recorded(program), rng, 60)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_any_turns_of_both_give_durable_moments_many_times(
    program: Callable[[Recorded], None], rng: random.Random
) -> None:
    """The long run is that of `tests/recorded_programs.py`."""
    at_random(recorded(program), rng, 2000)


@pytest.mark.parametrize("program", [checkpoints, ranges])
def test_that_a_page_was_written_over_is_seen_without_its_checksum(
    program: Callable[[Recorded], None], rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = recorded(program)
    look_at_no_checksum(monkeypatch)
    at_random(writer, rng, 100)


@pytest.mark.parametrize(("start", "step"), [(0, 7)])
def test_one_checkpoint_whole_with_one_turn_anywhere(start: int, step: int) -> None:
    _exhaust(recorded(one_checkpoint), range(start, 1 << 20, step))


@pytest.mark.long
@pytest.mark.slow
def test_one_checkpoint_whole_with_one_turn_everywhere() -> None:
    _exhaust(recorded(one_checkpoint), range(1 << 20))


def brief_session(world: World) -> None:
    """Attach, read, detach."""
    follow = Follow(world)
    follow.scan()
    follow.close()


def _three_turns(befores: range, step: int) -> None:
    """Before it attaches, and twice while it attaches, reads and detaches, the writer does some operations."""
    writer = recorded(one_checkpoint)
    steps = range(len(writer.steps) - writer.begin + 1)
    world = World(writer)
    world.advance(writer.begin)
    brief_session(world)
    # It does some more when it has to begin again.
    places = range(world.looked + 10)
    number = 0
    for before, first, second in product(befores, steps[1:], steps[1:]):
        if before + first + second > steps[-1]:
            continue
        for at, then in combinations(places, 2):
            number += 1
            if number % step:
                continue
            plan = {at: first, then: second}
            world = World(writer, lambda n, plan=plan: plan.get(n, 0))  # type: ignore[misc]  # bound in each round
            world.advance(writer.begin + before)
            try:
                brief_session(world)
            except BaseException as error:
                error.add_note(f"{before} operations before, then {plan}")
                raise
    assert number


def test_one_checkpoint_with_some_turns_of_the_writer() -> None:
    _three_turns(range(99), 331)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("before", range(11))
def test_one_checkpoint_with_any_three_turns_of_the_writer(before: int) -> None:
    """Each number of operations at each place: all of them together are each way in which the two can alternate so."""
    _three_turns(range(before, before + 1), 1)


def _exhaust(writer: Recorded, chosen: range) -> None:
    """Every instant of the writer to attach at, and every operation of the follower before which the writer does any
    number of operations: those with the numbers that are chosen.
    """
    number = 0
    operations = _alone(writer) + 40
    for start in range(writer.begin, len(writer.steps)):
        for at in range(operations):
            for count in range(1, len(writer.steps) - start + 1):
                if number in chosen:
                    _interrupted_once(writer, start, at, count)
                number += 1


def test_a_follower_of_a_store_without_commits_sees_none() -> None:
    writer = recorded(one_checkpoint)
    world = World(writer)
    while not world.disk.kind("/store/data"):
        with pytest.raises(kvwal.StoreNotFoundError):
            world.follow()
        world.advance(1)
    with world.follow() as follower:
        assert (follower.seqno, dict(follower)) == (0, {})


def erasing(writer: Recorded) -> None:
    """A store that is erased, and one of other commits in its place."""
    with writer.open():
        writer.put(*((key, b"0") for key in KEYS))
        writer.put((KEYS[0], b"1"))
    writer.begin = len(writer.steps)
    writer.states = [{}]
    with writer.open("n"):
        for n in range(4):
            writer.put((KEYS[n], b"new"))


def test_a_store_that_is_erased_is_said_to_be_gone_and_what_was_seen_stays() -> None:
    writer = recorded(erasing)
    old = dict.fromkeys(KEYS, b"0") | {KEYS[0]: b"1"}
    told = 0
    for start in range(writer.begin, len(writer.steps)):
        for count in range(1, len(writer.steps) - start):
            world = World(writer)
            world.advance(start)
            try:
                follower = world.follow()
            except kvwal.StoreNotFoundError:
                # It counts as erased.
                break
            with follower:
                seen = dict(follower)
                is_old = seen == old
                assert is_old or seen in writer.states
                world.advance(count)
                try:
                    follower.refresh()
                except kvwal.StoreRemovedError:
                    assert is_old
                    told += 1
                    assert dict(follower) == seen
                else:
                    assert not is_old or world.done < len(writer.steps) - 8, "it was told nothing"
    assert told


def test_a_store_that_is_erased_meanwhile_is_one_or_the_other_or_gone(rng: random.Random) -> None:
    writer = recorded(erasing)
    old = dict.fromkeys(KEYS, b"0") | {KEYS[0]: b"1"}
    for _ in range(200):
        draw = random.Random(rng.getrandbits(64))
        world = World(writer, turns(draw, 0.2, 9))
        world.advance(draw.randint(writer.begin, len(writer.steps)))
        with suppress(kvwal.StoreNotFoundError, kvwal.StoreRemovedError), world.follow() as follower:
            while world.done < len(writer.steps):
                assert dict(follower) in ([old, *writer.states])
                follower.refresh()


def test_what_a_recovery_wrote_again_is_not_read_where_it_was_superseded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the older segment has there may come back as something else, if a flush of it had failed."""
    monkeypatch.setattr("kvwal.log.carry._WHOLE_BYTES", 0)
    disk = SimulatedDisk()
    disk.make_directory("/store")
    options: dict[str, Any] = {"files": disk, "background": False}
    db = kvwal.open("/store", **options)
    with kvwal.follow("/store", files=disk) as live:
        feed = live.changes(follow=True, timeout_s=0)
        db.put(b"key", b"first")
        db.put(b"key", b"second", durability="os")
        disk_before = disk.read(f"/store/{segment_name(1)}")
        # Both read on in the segment from here.
        assert live.refresh() == 1
        assert [change.value for change in feed] == [b"first"]
        db.engine.abandon()
        with kvwal.open("/store", **options) as db:
            page = disk_before[:HEADER_PAGE_BYTES]
            header = decode_header(page, 1, None)
            assert isinstance(header, SegmentHeader)
            first = 40 + len(encode_put(b"key", b"first"))
            offset = HEADER_PAGE_BYTES + first
            other = encode_put(b"key", b"wrong!")
            record = encode_record(header.marker, header.salt + offset, 1, Seqno(2), Seqno(0), 1 << 50, other)
            assert len(record) == 40 + len(encode_put(b"key", b"second"))
            disk.damage(f"/store/{segment_name(1)}", offset, record)
            db.put(b"next", b"")
            db.put(b"next", b"")
            assert live.refresh() == 3
            assert live[b"key"] == b"second"
            assert [change.value for change in feed] == [b"second", b""]


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_power_cut_takes_back_what_a_follower_has_shown(program: Callable[[Recorded], None]) -> None:
    writer = recorded(program)
    world = World(writer)
    world.advance(writer.begin)
    follow = Follow(world)
    while world.done < len(writer.steps):
        world.advance(1)
        follow.refresh()
        with kvwal.open(PATH, files=world.disk.crash(0), background=False) as after:
            assert after.last_seqno >= follow._seqno
            assert dict(after) == writer.states[after.last_seqno]
    follow.end()
