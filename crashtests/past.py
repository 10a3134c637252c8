"""Part 7: the past against a plain model: the feed, the list of commits, the versions of keys, consumers, moments.

A program has 50 to 500 commits over two tables: puts, deletes, ranges, batches and transactions, with checkpoints,
reopenings, kills and power cuts among them, and consumers that read, acknowledge and project in between. The window is
of everything, of a little, or of nothing. Now and then, and at the end, all that the store tells of its past is
compared with the model (`past_model.py`):

- `changes` from every position, with every filter; `FeedGap` before the oldest, and behind the newest;
- `commits`, also by pairs, by time and to an end; `versions` of every key, whole and in part, in both directions;
- the batches of consumers, without a gap, across everything that ends a process; a projection, exactly once;
- a feed that goes on all the time; a bootstrap and what came since; what was before each change;
- `snapshot(at=)` of every moment of the window, by seqno and by time; `diff` between moments; keys that were reverted.

A program that fails is made smaller, by leaving out steps, before it is reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from random import Random
from typing import Any, Final
from unittest.mock import patch

import kvwal
import kvwal.feed.owned
from crashtests.console import Result
from crashtests.explorer import Tally
from crashtests.past_model import KEYS, OTHER_TABLE, PROJECTS
from crashtests.past_session import Past
from crashtests.session import Program, Step
from crashtests.workers import Run, Share, beginning, spread

_SIZES: Final = (0, 5, 5, 40, 40, 300, 1200)
_KEEP_ALL: Final = {"keep_history_s": 1e9, "keep_history_bytes": 1 << 40}
_BATCH_CHANGES: Final = 12
_SHRINK_TRIES: Final = 400


# -- programs ----------------------------------------------------------------------------------


def some_write(random: Random, *, to_end: bool) -> list[Any]:
    what = random.choice(("put", "put", "put", "put", "del", "del", "range"))
    stops = [None, *range(len(KEYS))] if to_end else range(len(KEYS))
    return [what, random.randrange(len(KEYS)), random.choice(_SIZES if what == "put" else stops)]


def some_step(random: Random, *, projects: bool) -> Step:
    """Mostly a commit."""
    weights = {"one": 40, "batch": 18, "txn": 14, "revert": 3, "read": 14, "upkeep": 8, "end": 3, "look": 1}
    match random.choices(list(weights), list(weights.values()))[0]:
        case "one":
            return ["one", *some_write(random, to_end=not projects), random.choice(("", "", "why", "weak"))]
        case "batch" | "txn" as kind:
            tables = (0, 0, OTHER_TABLE) if kind == "batch" else (0,)
            writes = [
                [table, *some_write(random, to_end=bool(table) or not projects)]
                for table in random.choices(tables, k=random.choice((1, 2, 3, 3, 20)))
            ]
            return [kind, writes, random.choice(("", "", "why"))]
        case "revert":
            return ["revert", random.choice((0, OTHER_TABLE)), random.randrange(len(KEYS)), random.random()]
        case "read":
            most = random.randrange(1, 9)
            consume = ["consume", random.randrange(PROJECTS), most, random.choice((None, *range(most)))]
            return random.choice((consume, consume, ["live", most], ["base"], ["project"] if projects else consume))
        case "upkeep":
            return [random.choice(("sync", "checkpoint", "checkpoint", "prepare", "idle"))]
        case "end":
            return random.choice((["reopen"], ["kill"], ["cut", random.getrandbits(30)], ["read-only"]))
        case _:
            return ["look", random.getrandbits(30)]


def a_program(random: Random) -> tuple[dict[str, Any], Program]:
    """Options of `kvwal.open` beside the smallest sizes, and a program of 50 to 500 commits."""
    commits = round(50 * 10 ** random.random())
    options = {"durability": random.choice(("commit", "commit", "os"))}
    some = {"keep_history_bytes": random.randrange(1 << 17)}
    options |= random.choice((_KEEP_ALL, _KEEP_ALL, {"keep_history_s": 0}, some))
    options["history_base_bytes"] = random.choice((0, 20 << 10, 16 << 20))
    projects = random.random() < 0.5
    program: Program = []
    while commits:
        step = some_step(random, projects=projects)
        commits -= step[0] in ("one", "batch", "txn", "revert")
        program.append(step)
    return options, program


# -- the part ----------------------------------------------------------------------------------


def play(options: dict[str, Any], program: Program, seed: int = 0) -> int:
    """Run one program. Returns how often something was compared; raises `Violation`, or what the store raises."""
    with patch.object(kvwal.feed.owned, "_BATCH_CHANGES", _BATCH_CHANGES):
        past = Past(options, seed)
        past.run(program)
    return past.compared


def shrink(program: Program, fails: Callable[[Program], bool], tries: int = _SHRINK_TRIES) -> Program:
    """A part of the program that still fails: steps are left out, many at once and then fewer, while it does."""
    size = max(1, len(program) // 2)
    while tries > 0:
        start, smaller = 0, False
        while start < len(program) and tries > 0:
            rest = program[:start] + program[start + size :]
            tries -= 1
            if rest and fails(rest):
                program, smaller = rest, True
            else:
                start += size
        if size == 1 and not smaller:
            break
        size = max(1, size // 2)
    return program


def drawn(seed: int, number: int) -> tuple[dict[str, Any], Program]:
    """Program `number` of a seed."""
    return a_program(Random(f"past {seed} {number}"))


def work(share: Share) -> Iterator[Tally]:
    run = share.run
    for number in share.mine(beginning(run.first, count, str)):
        if share.over():
            return
        options, program = drawn(run.seed, number)
        tally = Tally(states=1)
        tally.faults = sum(step[0] in ("kill", "cut") for step in program)
        error = error_of(options, program)
        if error is not None:
            kind = type(error)
            smallest = shrink(program, lambda rest, options=options, kind=kind: type(error_of(options, rest)) is kind)
            text = f"{kind.__name__}: {error_of(options, smallest)} {json.dumps(options)} {json.dumps(smallest)}"
            tally.violations.append((text, f"--seed {run.seed} --case {number}"))
        yield tally


def error_of(options: dict[str, Any], program: Program) -> Exception | None:
    """What a program fails with."""
    try:
        play(options, program)
    except Exception as error:  # noqa: BLE001  # every exception is a violation
        return error
    return None


def run(run: Run) -> Result:
    """Run the part."""
    return spread("past", work, run)


def replay(text: str, run: Run) -> int:
    """Run one program with its traceback."""
    play(*drawn(run.seed, int(text)))
    print("nothing is wrong")
    return 0
