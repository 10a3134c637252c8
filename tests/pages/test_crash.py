"""Power cuts at every operation of a page file's life, and faults before them, on the simulated disk."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from pages_fixtures import STORE_ID, Updates, applied, columns, contents

from kvwal.errors import EnvironmentFailure
from kvwal.keys import KeyRange, Seqno
from kvwal.pages import PageFile, check, create_page_file
from kvwal.testing import SimulatedDisk, crash_every
from kvwal.testing.faults import Effect

EFFECTS: tuple[Effect, ...] = ("none", "part", "all")
Step = tuple[Updates, list[KeyRange]]
History = dict[int, dict[bytes, bytes]]


def opened(disk: SimulatedDisk) -> PageFile:
    return PageFile(disk.open_directory("/kv"), cache_bytes=1 << 20, writable=True)


def steps(rng: random.Random, count: int) -> list[Step]:
    """Growth, rewriting, large values and a shrink, in few pages: every write of every one is cut."""
    made: list[Step] = []
    for step in range(count):
        updates: Updates = {
            b"%03d" % rng.randrange(120): None if rng.random() < 0.2 else b"%d" % step * rng.choice([1, 90])
            for _ in range(rng.choice([0, 5, 100]))
        }
        if rng.random() < 0.4:
            updates[b"large%d" % rng.randrange(3)] = bytes([step]) * rng.choice([3000, 9000])
        ranges: list[KeyRange] = [KeyRange(b"050", None)] if step % 4 == 3 else []
        made.append((updates, ranges))
    return made


def run(pages: PageFile, step: Step, model: dict[bytes, bytes]) -> dict[bytes, bytes]:
    updates, ranges = step
    pages.checkpoint(columns(sorted(updates.items())), ranges, seqno=Seqno(pages.meta.seqno + 1), time_us=1)
    return applied(model, updates, ranges)


def verify(disk: SimulatedDisk, at_least: int, history: History, *, go_on: bool = True) -> None:
    """What is found is a generation that was made, whole, and not older than what was acknowledged."""
    pages = opened(disk)
    generation = pages.meta.generation
    assert generation >= at_least
    assert contents(pages.tree()) == history[generation]
    if pages.older is not None:
        assert contents(pages.tree(pages.older)) == history[generation - 1]
    assert list(check(pages)) == []
    if go_on:
        model = history[generation]
        for step in steps(random.Random(generation), 2):
            model = run(pages, step, model)
            assert contents(pages.tree()) == model
            assert list(check(pages)) == []
    pages.close()


@pytest.mark.parametrize("number", range(3))
def test_power_cut_anywhere_leaves_a_whole_generation(number: int) -> None:
    history: History = {1: {}, 0: {}}
    plan = steps(random.Random(number), 9)

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        model: dict[bytes, bytes] = {}
        for step in plan:
            history[pages.meta.generation + 1] = applied(model, *step)
            model = run(pages, step, model)
            acknowledged.append(pages.meta.generation)
            if len(acknowledged) % 4 == 0:
                pages.close()
                pages = opened(disk)

    disk = SimulatedDisk(seed=number)
    disk.make_directory("/kv")
    disk.open_directory("/").sync()
    create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
    report = crash_every(
        program,
        lambda found, acknowledged: verify(found, acknowledged[-1] if acknowledged else 1, history),
        seed=number,
        states_per_point=6,
        disk=disk,
    )
    assert report.points > 30


def test_power_cut_during_create_leaves_a_whole_file_or_none() -> None:
    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
        acknowledged.append(1)

    def found(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        if disk.kind("/kv/data") is None:
            assert not acknowledged
            create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
        verify(disk, 1, {0: {}, 1: {}})

    disk = SimulatedDisk()
    disk.make_directory("/kv")
    disk.open_directory("/").sync()
    crash_every(program, found, disk=disk)


@pytest.mark.parametrize("nth", range(1, 12))
@pytest.mark.parametrize("operation", ["datasync", "sync", "pwrite"])
def test_power_cut_after_a_failed_sync_or_write_and_a_reopen_loses_nothing(operation: str, nth: int) -> None:
    """The reopened file goes by the page cache, which shows what the disk never got."""
    rng = random.Random(nth)
    history: History = {0: {}, 1: {}}
    disk = SimulatedDisk(seed=nth)
    disk.make_directory("/kv")
    disk.open_directory("/").sync()
    create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
    pages = opened(disk)
    model: dict[bytes, bytes] = {}
    plan = steps(rng, 12)
    for step in plan[:4]:
        model = run(pages, step, model)
        history[pages.meta.generation] = model
        history.setdefault(pages.meta.generation - 1, {})
    disk.fail(operation, nth, errno.EIO, effect=rng.choice(EFFECTS))
    try:
        for step in plan[4:8]:
            history[pages.meta.generation + 1] = applied(model, *step)
            model = run(pages, step, model)
    except (OSError, EnvironmentFailure):
        pages.close()
        pages = opened(disk)
        model = history[pages.meta.generation]

    disk.heal()

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        nonlocal model
        for step in plan[8:]:
            history[pages.meta.generation + 1] = applied(model, *step)
            model = run(pages, step, model)
            acknowledged.append(pages.meta.generation)

    # Whatever failed was not acknowledged, and the generation before it was.
    least = max(2, pages.meta.generation - 1)
    crash_every(
        program,
        lambda found, acknowledged: verify(found, acknowledged[-1] if acknowledged else least, history, go_on=False),
        seed=nth,
        states_per_point=4,
        disk=disk,
    )


def test_power_cut_between_the_parts_of_a_checkpoint_leaves_what_replay_makes_whole() -> None:
    """Each part is a generation with the old seqno, which says through which commit the log has to be replayed."""
    parts = 4
    batches = [{b"%03d" % (7 * key % 300): b"%d" % step * 40 for key in range(step, 300)} for step in range(4)]
    batches[2].update({b"%03d" % key: bytes(5000) for key in range(0, 300, 60)})
    gone = [[], [KeyRange(b"100", b"150")], [], [KeyRange(b"", None)]]
    models: list[dict[bytes, bytes]] = [{}]
    for batch, ranges in zip(batches, gone, strict=True):
        models.append(applied(models[-1], dict(batch), ranges))

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        for number, (batch, ranges) in enumerate(zip(batches, gone, strict=True), 1):
            keys = sorted(batch)
            for part in range(parts):
                some = keys[part * len(keys) // parts : (part + 1) * len(keys) // parts]
                last = part == parts - 1
                pages.checkpoint(
                    [(some, [batch[key] for key in some])],
                    ranges if part == 0 else (),
                    seqno=Seqno(number if last else number - 1),
                    time_us=number,
                    replay_through=Seqno(number),
                )
            acknowledged.append(number)
            assert contents(pages.tree()) == models[number]

    def found(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        meta, older = pages.meta, pages.older
        assert meta.seqno >= (acknowledged[-1] if acknowledged else 0)
        assert list(check(pages)) == []
        for each in filter(None, (meta, older)):
            replayed = contents(pages.tree(each))
            for number in range(each.seqno, each.replay_through):
                replayed = applied(replayed, dict(batches[number]), gone[number])
            assert replayed == models[each.replay_through]
        # An engine that goes on has to go beyond that commit; until it did, the meta repeats what it asks for.
        pages.checkpoint([], seqno=meta.seqno, time_us=1)
        assert pages.meta.replay_through == meta.replay_through
        pages.close()

    disk = SimulatedDisk(seed=5)
    disk.make_directory("/kv")
    disk.open_directory("/").sync()
    create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
    report = crash_every(program, found, seed=5, states_per_point=4, disk=disk)
    assert report.points > 60
