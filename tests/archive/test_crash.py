"""Whatever is cut, and whenever: every commit at or below the mark can be restored, and the archive goes on.

The store and its archive are on one simulated disk, in one program, so a cut meets both at the same instant. `WHICH`
says whose pending writes are then lost: of both, of the store alone, or of the destination alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from archive_fixtures import Program

import kvwal
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
