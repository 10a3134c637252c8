"""Whatever is cut, and whenever: every commit at or below the mark can be restored, and the archive goes on.

The store and its archive are on one simulated disk, in one program, so a cut meets both at the same instant. `WHICH`
says whose pending writes are then lost: of both, of the store alone, or of the destination alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from archive_fixtures import OPTIONS, Model, Program, Writer, archiver_of, check_all, restored

import kvwal
from kvwal.backup.chain import list_held
from kvwal.backup.keeping import Keep
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.state import identity_of
from kvwal.keys import Seqno
from kvwal.testing import Operation, SimulatedDisk, crash_every

WHICH: dict[str, Callable[[Any], Callable[[Any], bool]]] = {
    "store": lambda coin: lambda piece: piece.path.startswith("/b") or coin.random() < 0.5,
    "destination": lambda coin: lambda piece: not piece.path.startswith("/b") or coin.random() < 0.5,
    "both": lambda coin: lambda piece: coin.random() < 0.5,
}


def cut(seed: int, which: str, turns: int, every: int) -> int:
    """Cut at each `every`-th operation; returns how often."""
    program, disk, coin = Program(seed, turns), SimulatedDisk(seed=seed), random.Random(seed)
    acknowledged: list[Any] = []
    seen = cuts = 0

    def watch(operation: Operation) -> None:
        nonlocal seen, cuts
        seen += 1
        if seen % every == 0:
            cuts += 1
            program.check(disk.crash(WHICH[which](coin)), acknowledged.copy())

    disk.watcher = watch
    program(disk, acknowledged)
    return cuts


@pytest.mark.parametrize("which", WHICH)
def test_a_power_cut_of_store_or_destination_or_both(which: str) -> None:
    assert cut(seed=3, which=which, turns=36, every=9) > 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", WHICH)
def test_power_cuts_of_many_programs(which: str, seed: int) -> None:
    assert cut(seed=seed, which=which, turns=60, every=3) > 50


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_power_cut_at_every_operation(seed: int) -> None:
    program = Program(seed, turns=16)
    report = crash_every(program, program.check, seed=seed, states_per_point=4)
    assert report.points > 80


@pytest.mark.parametrize("every", [pytest.param(31), pytest.param(3, marks=pytest.mark.slow)])
def test_a_writer_and_an_archiver_that_are_killed_leave_all_that_was_marked(every: int) -> None:
    program, disk = Program(7, 20), SimulatedDisk(seed=7)
    acknowledged: list[Any] = []

    def watch(operation: Operation) -> None:
        if operation.number % every == 0:
            program.check(disk.copy(), acknowledged.copy())

    disk.watcher = watch
    program(disk, acknowledged)


@pytest.mark.parametrize("every", [pytest.param(29), pytest.param(3, marks=pytest.mark.slow)])
def test_a_call_that_fails_for_good_and_then_a_power_cut(every: int) -> None:
    """The destination's disk fails from some operation on; then the power is cut, and all disks are well again."""
    counted, program = SimulatedDisk(seed=11), Program(11, 16)
    program(counted, [])
    for nth in range(1, counted.operations, every):
        disk, program, acknowledged = SimulatedDisk(seed=11), Program(11, 16), []
        fault = disk.fail("any", nth, forever=True, path="/b*", effect="part" if nth % 2 else "none")
        try:
            program(disk, acknowledged)
        except (OSError, kvwal.Error):
            pass
        if not fault.struck:
            break
        program.check(disk.crash(random.Random(nth)), acknowledged)


def live(commits: int, seed: int = 1) -> tuple[SimulatedDisk, Any, Model]:
    """A store of some commits, archived, merged at random, with bases between."""
    draw, disk = random.Random(seed), SimulatedDisk(seed=seed)
    place = DirectoryDestination("/b", files=disk)
    db: Any = kvwal.open("/kv", files=disk, **OPTIONS)
    writer = Writer(db)
    now_s = [0.0]
    more = {"base_bytes": 40 * commits, "keep": Keep(), "monotonic_s": lambda: now_s[0], "codec": "none"}
    archiver = archiver_of(db, place, **more)
    while db.last_seqno < commits:
        writer.some(min(draw.randint(1, 8), commits - db.last_seqno))
        disk.pass_time(draw.choice([0.1, 3, 40]))
        now_s[0] += draw.choice([1, 1, 1, 31])
        if draw.random() < 0.03:
            db.checkpoint()
        archiver.step(now=True)
    db.close()
    return disk, place, writer.model


def test_every_moment_of_a_store_is_restored_by_restore() -> None:
    disk, _, model = live(60)
    for at in range(0, 61, 4):
        assert restored(disk, at, f"/r{at}") == model[Seqno(at)]


@pytest.mark.slow
def test_every_moment_of_ten_thousand_commits() -> None:
    disk, place, model = live(10_000)
    names = {name.partition("/")[0] for name, _ in place.list_after("") if "/unit/" in name}
    (line,) = (bytes.fromhex(name) for name in names)
    held = list_held(place, line)
    assert {unit.level for unit in held.units} >= {0, 1, 2, 3}
    assert len(held.bases) > 2
    check_all(held, place, identity_of(place), model, 0, 10_000)
    for at in random.Random(4).sample(range(10_001), 100):
        assert restored(disk, at, f"/r{at}") == model[Seqno(at)]
