"""A power cut before each operation of the disk: nothing that expired comes back, nothing is lost before its time."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from store_fixtures import TINY, problems_of

import kvwal
from kvwal.testing import SimulatedDisk
from kvwal.testing.cuts import crash_every

# Whole seconds and a half, so that the clock's own steps of a microsecond do not matter.
LASTS_S = [None, 0.5, 2.5, 1000.5]


def opened(disk: SimulatedDisk) -> kvwal.Store:
    return kvwal.open("/kv", files=disk, background=False, **TINY)


def ends_us(disk: SimulatedDisk, lasts_s: float | None) -> float:
    return float("inf") if lasts_s is None else disk.clock_us + lasts_s * 1e6


def check_against(disk: SimulatedDisk, possible: list[dict[bytes, tuple[bytes, float]]]) -> None:
    """The store holds one of these states, without what has expired."""
    expected = [
        {key: value for key, (value, end_us) in state.items() if disk.clock_us < end_us} for state in possible
    ]
    db = opened(disk)
    found = dict(db.scan())
    assert found in expected
    assert (len(db), list(db), [db.get(key) for key in found]) == (len(found), list(found), list(found.values()))
    assert problems_of(db) == []
    # What is left to be removed goes, and nothing else.
    while db.engine.expirer.remove():
        pass
    assert dict(db.scan()) == found
    db.checkpoint()
    assert dict(db.scan()) == found
    assert db.engine.reads.count() == len(found) == db.stats().tree_keys
    assert problems_of(db) == []
    db.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_power_cut_brings_nothing_back_and_loses_nothing_early(seed: int) -> None:
    random = Random(seed)
    # By commit: what there is, and until when.
    states: list[dict[bytes, tuple[bytes, float]]] = [{}]

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        db = opened(disk)
        for step in range(30):
            state = dict(states[-1])
            what = random.choice([*["put"] * 5, "set", "batch", "del", *["time", "remove"] * 2, "checkpoint"])
            key, value = b"k%d" % random.randrange(6), b"%d/" % step * random.choice([1, 20, 1200])
            lasts_s = random.choice(LASTS_S)
            if what == "time":
                disk.pass_time(random.choice([1, 3]))
            elif what == "checkpoint":
                db.checkpoint()
            elif what == "remove":
                # It changes nothing that is seen.
                while db.engine.expirer.remove():
                    pass
            else:
                if what == "put":
                    state[key] = value, ends_us(disk, lasts_s)
                elif what == "set" and key in db:
                    state[key] = state[key][0], ends_us(disk, lasts_s)
                elif what == "batch":
                    for n in range(4):
                        state[b"k%d" % n] = value, ends_us(disk, LASTS_S[n])
                else:
                    state.pop(key, None)
                states.append(state)
                if what == "put":
                    db.put(key, value, expire_s=lasts_s)
                elif what == "set":
                    db.touch(key, expire_s=lasts_s)
                elif what == "batch":
                    with db.batch() as batch:
                        for n in range(4):
                            batch.put(b"k%d" % n, value, expire_s=LASTS_S[n])
                else:
                    db.delete(key)
                acknowledged.append(len(states) - 1)
        db.close()

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        last = acknowledged[-1] if acknowledged else 0
        check_against(disk, states[last : last + 2])

    disk = SimulatedDisk(seed=seed)
    opened(disk).close()
    report = crash_every(program, check, seed=seed, states_per_point=2, disk=disk)
    assert report.points > 40


def test_a_killed_process_loses_nothing_early() -> None:
    disk = SimulatedDisk()
    db = opened(disk)
    db.put(b"short", b"v", expire_s=1.5)
    db.put(b"long", b"v", expire_s=100)
    disk.kill()
    db = opened(disk)
    assert list(db) == [b"long", b"short"]
    disk.pass_time(2)
    db.checkpoint()
    disk.kill()
    db = opened(disk)
    assert list(db) == [b"long"]
    assert problems_of(db) == []
