"""What the writer of two programs does, and turns of both at random.

`python tests/recorded_programs.py RUNS SEED MINUTES` is the long run: that number of runs, or as many as the
minutes of one core give.
"""

from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import cycle

from two_programs import Follow, Recorded, World

KEYS = [b"key%d" % n for n in range(6)]


def one_checkpoint(writer: Recorded) -> None:
    """A checkpoint between commits; the pages that the first ones took are used again."""
    with writer.open() as db:
        for n in range(3):
            writer.put(*((key, b"%d first" % n) for key in KEYS))
            db.checkpoint()
        writer.put((KEYS[0], b"before"))
        writer.begin = len(writer.steps)
        writer.put((KEYS[1], b"just before"))
        db.checkpoint()
        writer.put((KEYS[2], b"after"), (KEYS[3], None))


def checkpoints(writer: Recorded) -> None:
    """One checkpoint after each commit: pages are used again as fast as that is possible."""
    with writer.open() as db:
        writer.put(*((key, b"0" * 900) for key in KEYS))
        db.checkpoint()
        writer.begin = len(writer.steps)
        for n in range(8):
            writer.put(*((key, b"%d" % n * 900) for key in KEYS[n % 3 :]), (KEYS[n % 2], None))
            db.checkpoint()


def restarts(writer: Recorded) -> None:
    """Clean ends, and processes that die with commits that are not on disk for sure."""
    db = writer.open()
    writer.put(*((key, b"0") for key in KEYS))
    writer.begin = len(writer.steps)
    db.close()
    for n in range(4):
        db = writer.open()
        writer.put((KEYS[0], b"%d durable" % n))
        writer.put((KEYS[1], b"%d not yet" % n), durability="os")
        writer.put((KEYS[2], b"%d nor this" % n), durability="os")
        if n == 2:
            db.checkpoint()
        if n % 2:
            db.close()
        else:
            writer.disk.kill()
            db.engine.abandon()


def refusals(writer: Recorded) -> None:
    """The disk is full: records that are written whole, and refused; other commits get their seqnos."""
    with writer.open():
        writer.put(*((key, b"0") for key in KEYS))
        writer.begin = len(writer.steps)
        for n in range(4):
            writer.disk.fail("pwrite", error=errno.ENOSPC, path="*.log*", effect="all", forever=True)
            writer.put((KEYS[n], b"refused, and longer than what comes in its place"[n * 9 :]))
            writer.disk.heal()
            writer.put((KEYS[n + 1], b"instead"))
            writer.put((KEYS[n], b"and %d" % n))


def rolls(writer: Recorded) -> None:
    """New segments, and old ones that are retired."""
    with writer.open(checkpoint_log_bytes=16 << 10) as db:
        writer.put(*((key, b"0") for key in KEYS))
        writer.begin = len(writer.steps)
        for n in range(9):
            writer.put((KEYS[n % 6], b"%d" % n * 6000))
            if n % 3 == 2:
                db.checkpoint()


def ranges(writer: Recorded) -> None:
    """Ranges that are deleted, and large values."""
    with writer.open() as db:
        writer.put(*((key, b"0") for key in KEYS))
        writer.begin = len(writer.steps)
        for n in range(4):
            writer.states.append({key: value for key, value in writer.states[-1].items() if key >= KEYS[3]})
            db.delete_range(None, KEYS[3])
            writer.put((KEYS[n], b"%d" % n * 5000))
            if n % 2:
                db.checkpoint()


PROGRAMS: list[Callable[[Recorded], None]] = [one_checkpoint, checkpoints, restarts, refusals, rolls, ranges]


@cache
def recorded(program: Callable[[Recorded], None]) -> Recorded:
    """What the program did, recorded once."""
    return Recorded(program)


def turns(draw: random.Random, often: float, most: int) -> Callable[[int], int]:
    """How many operations the writer does before each one of the follower: `often` some, and at most `most`."""
    return lambda n: (draw.random() < often) * draw.randint(1, most)


def at_random(writer: Recorded, rng: random.Random, runs: int) -> None:
    """Runs in which the follower does this and that, and each answer of it is checked."""
    for _ in range(runs):
        seed = rng.getrandbits(64)
        draw = random.Random(seed)
        often, most = draw.choice(((0.02, 200), (0.1, 40), (0.3, 8), (0.9, 3)))
        world = World(writer, turns(draw, often, most))
        world.advance(draw.randint(writer.begin, len(writer.steps)))
        try:
            follow = Follow(world)
            held = [follow.snapshot()]
            next(held[0])
            for _ in range(draw.randint(1, 12)):
                draw.choice((follow.scan, follow.get, follow.refresh, follow.count))()
                next(draw.choice(held))
                if draw.random() < 0.2:
                    held.append(follow.snapshot())
                    next(held[-1])
            follow.end()
        except BaseException as error:
            error.add_note(f"the seed of this run is {seed}")
            raise


def step_by_step(writer: Recorded) -> None:
    """A follower that looks after each operation of the writer."""
    world = World(writer)
    world.advance(writer.begin)
    follow = Follow(world)
    while world.done < len(writer.steps):
        world.advance(1)
        follow.refresh()
        follow.scan()
    follow.end()


def long_run(runs: int, seed: int, minutes: float) -> None:
    """All programs in turns."""
    rng = random.Random(seed)
    done = 0
    with suppress(KeyboardInterrupt):
        for program in cycle(PROGRAMS):
            if done >= runs or time.process_time() >= 60 * minutes:
                break
            at_random(recorded(program), rng, 50)
            done += 50
    print(f"seed {seed}: {done} runs of {len(PROGRAMS)} programs, {time.process_time():.0f} s, no violation")


if __name__ == "__main__":
    long_run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
