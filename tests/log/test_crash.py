"""The power may be cut before every operation, also during recovery, and two and three cuts deep."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_rig import LogRig, body, entry, simulated_disk

from kvwal.keys import Seqno
from kvwal.log import LogEnd, read_kept
from kvwal.log.segment import list_segments
from kvwal.testing import SimulatedDisk, crash_every


@pytest.fixture(params=["whole", "tail"], autouse=True)
def rewritten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How much of the newest segment a recovery writes again."""
    if request.param == "tail":
        monkeypatch.setattr("kvwal.log.carry._WHOLE_BYTES", -1)
    return request.param


def recovered(disk: SimulatedDisk, acknowledged: list[Any]) -> LogEnd | None:
    """What is found is a prefix that holds everything acknowledged; recovery makes it durable and stays with it."""
    rig = LogRig(disk, "/log")
    if not list_segments(disk.open_directory("/log")):
        assert not acknowledged
        return None
    seqnos, end = rig.replay()
    assert len(seqnos) >= max(acknowledged, default=0)
    log = rig.resume(end)
    assert (log.last_seqno, log.durable_seqno) == (len(seqnos), len(seqnos))
    log.abandon()
    # What was served is durable: a second cut takes nothing of it, and it is found the same.
    for survivors in (0, -1):
        again = LogRig(disk.crash(survivors), "/log")
        assert again.replay()[0] == seqnos
    assert rig.replay()[0] == seqnos
    assert rig.verify() == []
    return end


def recovered_and_used(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
    """And work goes on after it."""
    if recovered(disk, acknowledged) is None:
        return
    rig = LogRig(disk, "/log")
    log = rig.resume()
    last = log.last_seqno
    rig.fill(log, 3)
    log.abandon()
    found = LogRig(disk.crash(0), "/log")
    assert len(found.replay()[0]) == last + 3


def commits(rig: LogRig, log: Any, acknowledged: list[Any], n: int, sync_every: int = 1) -> None:
    for _ in range(n):
        seqno = log.append_put(*entry(log.last_seqno + 1))
        if seqno % sync_every == 0:
            log.sync()
            acknowledged.append(seqno)


@pytest.mark.parametrize("preallocate", ["allocate", "zeros"])
@pytest.mark.parametrize("spare", [True, False])
def test_a_cut_anywhere_while_creating_and_rolling(preallocate: str, spare: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvwal.log.segments._LEAST_SPARE_BYTES", 0)
    spares = []

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        rig = LogRig(disk, "/log")
        log = rig.create(preallocate=preallocate)
        for _ in range(4):
            commits(rig, log, acknowledged, 7, sync_every=2)
            if spare:
                log.prepare_next()
                spares.append(log._maker._spare is not None)
            log.mark_idle()

    report = crash_every(program, recovered_and_used, states_per_point=8, disk=simulated_disk())
    assert report.points > 60
    assert any(spares) == spare


def test_a_cut_anywhere_while_groups_are_appended_unsynced():
    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        log = LogRig(disk, "/log").create(segment_bytes=20_000)
        for i in range(6):
            log.append([body(log.last_seqno + 1 + j, 300 * j) for j in range(4)])
            if i % 3 == 2:
                log.sync()
                acknowledged.append(log.last_seqno)

    crash_every(program, recovered_and_used, states_per_point=40, disk=simulated_disk())


def test_a_cut_anywhere_while_closing_and_opening_again():
    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        rig = LogRig(disk, "/log")
        for n in (0, 3, 0, 15, 2):
            log = rig.resume() if list_segments(disk.open_directory("/log")) else rig.create()
            commits(rig, log, acknowledged, n, sync_every=2)
            log.close()
            if n:
                acknowledged.append(log.last_seqno)

    crash_every(program, recovered_and_used, states_per_point=12, disk=simulated_disk())


def test_a_cut_anywhere_while_retiring():
    start = simulated_disk()
    rig = LogRig(start, "/log")
    log = rig.create()
    rig.fill(log, 60)
    log.close()

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        log = LogRig(disk, "/log").resume()
        log.retire(Seqno(55))

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        rig = LogRig(disk, "/log")
        assert rig.replay(after=54, floor=54)[1].last_seqno == 60
        # Never a hole: what is left begins somewhere and goes on from there.
        first = rig.segments()[0]
        assert [r.seqno for r in read_kept(rig.reader(), None, Seqno(60))] == list(range(first, 61))

    crash_every(program, check, states_per_point=32, disk=start)


def torn(seed: int) -> SimulatedDisk:
    """A disk on which the power was cut with commits unsynced, some of them on the medium."""
    from random import Random

    disk = simulated_disk()
    rig = LogRig(disk, "/log")
    log = rig.create()
    rig.fill(log, 17)
    for _ in range(5):
        log.append_put(*entry(log.last_seqno + 1))
    return disk.crash(Random(seed))


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_anywhere_during_recovery_and_during_the_recovery_from_that(seed: int):
    found = torn(seed)
    expected, _ = LogRig(found.copy(), "/log").replay()
    assert 17 <= len(expected) <= 22

    def recover(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        LogRig(disk, "/log").resume()
        acknowledged.append(len(expected))

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        assert LogRig(disk, "/log").replay()[0] == expected
        crash_every(recover, check_deeper, states_per_point=3, disk=disk.copy())

    def check_deeper(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        assert LogRig(disk, "/log").replay()[0] == expected
        recovered_and_used(disk, acknowledged)

    crash_every(recover, check, states_per_point=4, disk=found.copy())


def test_a_killed_process_loses_nothing_wherever_it_is_killed():
    """The page cache survives; what recovery serves must then survive a power cut, too."""
    operation = 0
    while True:
        operation += 1
        disk = simulated_disk()
        rig = LogRig(disk, "/log")

        class Killed(BaseException):
            pass

        def watch(op: Any, at: int = operation, disk: SimulatedDisk = disk, killed: type = Killed) -> None:
            if op.number >= at + 2:
                disk.watcher = None
                raise killed

        disk.watcher = watch
        appended = 0
        over = False
        try:
            log = rig.create()
            for n in range(30):
                log.append_put(*entry(n + 1))
                appended = n + 1
                if n % 4 == 0:
                    log.sync()
            over = True
        except Killed:
            pass
        disk.watcher = None
        disk.kill()
        if list_segments(disk.open_directory("/log")):
            end = recovered(disk, [appended])
            assert end is not None
            assert end.last_seqno <= appended + 1
        if over:
            break


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.integers(0, 1 << 30)), min_size=1, max_size=6))
def test_life_after_life_with_a_cut_at_the_end_of_each(lives: list[tuple[int, bool, int]]):
    """Every life appends, syncs or not, and ends in a power cut that keeps a random part of what was pending."""
    from random import Random

    disk = simulated_disk()
    LogRig(disk, "/log").create().abandon()
    durable = 0
    history: list[int] = []
    for n, sync, seed in lives:
        rig = LogRig(disk, "/log")
        seqnos, end = rig.replay()
        assert len(seqnos) >= durable
        assert seqnos[: len(history)] == history[: len(seqnos)]
        log = rig.resume(end)
        durable = len(seqnos)
        for i in range(n):
            log.append_put(*entry(log.last_seqno + 1, 10 + 37 * i))
        if sync:
            log.sync()
            durable = int(log.last_seqno)
        history = list(range(1, int(log.last_seqno) + 1))
        disk = disk.crash(Random(seed))
    recovered_and_used(disk, [durable])
