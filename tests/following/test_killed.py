"""Followers that are killed: what they held is back within two checkpoints, whatever they were in the middle of."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from following_fixtures import WRITES, fill, held, pages

import kvwal

ROOT = Path(__file__).parent.parent.parent
_TOGETHER = 10

# Forks followers, and kills each at a moment of its own, from before it has begun to the middle of its scans. It says
# how each of them has ended, once all have.
NEST = """
    import os, random, signal, sys, time
    import kvwal

    def follow(path, draw, begun):
        with kvwal.follow(path, cache_bytes=256 << 10, name="reader") as live:
            os.write(begun, b".")
            while True:
                with live.snapshot() as then:
                    try:
                        pairs = dict(then.items() if draw.random() < 0.5 else live.items())
                    except kvwal.SnapshotTooOld:
                        continue
                    if len(set(pairs.values())) != 1 or len(pairs) != 300:
                        return
                live.refresh()

    for line in sys.stdin:
        path, count, waits, longest_s, seed = line.rstrip().rsplit(" ", 4)
        draw, pids = random.Random(int(seed)), []
        told, begun = os.pipe()
        for n in range(int(count)):
            pids.append(os.fork())
            if not pids[-1]:
                try:
                    follow(path, draw, begun)
                finally:
                    os._exit(1)
            draw.random()
        for _ in pids if waits == "True" else []:
            os.read(told, 1)
        os.close(told)
        os.close(begun)
        for pid in draw.sample(pids, len(pids)):
            time.sleep(draw.random() * float(longest_s))
            os.kill(pid, signal.SIGKILL)
        print(*[os.waitpid(pid, 0)[1] for pid in pids], flush=True)
"""


def killed(path: str, rng: random.Random, rounds: int) -> int:
    """Kill some at a time; returns how many pins there were while the writer looked."""
    nest = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(NEST)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert nest.stdin is not None
    assert nest.stdout is not None
    pins: set[tuple[int, int | None]] = set()
    most = 0
    with nest, kvwal.open(path, **WRITES) as db:
        for n in range(6):
            fill(db, b"%d" % n)
        before, log_before = pages(db), db.stats().log_segments
        for number in range(rounds):
            # By turns all of them have begun, or any of them.
            waits, longest_s = [(True, 0.1), (False, 0.002), (False, 0.02)][number % 3]
            nest.stdin.write(f"{path} {_TOGETHER} {waits} {longest_s} {rng.getrandbits(32)}\n".encode())
            while not select.select([nest.stdout], [], [], 0)[0]:
                fill(db, b"%d" % rng.randrange(10))
                pins |= {(pin.pid, pin.generation) for pin in held(db)}
                most = max(most, pages(db))
            # Nothing else has ended any of them: none was shown what never was.
            assert nest.stdout.readline().split() == [b"9"] * _TOGETHER
            for n in range(2):
                fill(db, b"%d" % n)
            assert os.listdir(f"{path}/readers") == []
            assert held(db) == []
            assert pages(db) <= before
            assert db.stats().log_segments <= log_before
        nest.stdin.close()
        assert most > before * 1.2, "they held nothing"
    return len(pins)


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no such signals")
def test_followers_that_are_killed_leave_nothing(path: str, rng: random.Random) -> None:
    assert killed(path, rng, 5)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="that system has no such signals")
def test_followers_that_are_killed_a_thousand_times_leave_nothing(path: str, rng: random.Random) -> None:
    assert killed(path, rng, 1000 // _TOGETHER) > 100
