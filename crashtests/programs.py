"""The programs that are cut: fixed small ones for the exhaustive part, and Hypothesis' for the random one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Final

from hypothesis import strategies as st

from crashtests.session import Program

#: Named programs, each about one thing that can go wrong. (options, steps)
NAMED: Final[dict[str, tuple[dict[str, Any], Program]]] = {
    "first put": ({}, [["put", 1, 100]]),
    "transactions among others": (
        {},
        [
            ["batch", [[1, 20], [2, 20], [3, 20]]],
            *[["begin", 0], ["get", 0, 1], ["put", 1, 30], ["set", 0, 9, 5], ["commit", 0]],
            *[["begin", 0], ["get", 0, 2], ["put", 2, 30], ["get", 0, 2], ["abort", 0]],
            *[["begin", 1], ["scan", 1, 4, 8], ["put", 5, 30], ["set", 1, 9, 5], ["commit", 1]],
            *[["begin", 2], ["scan", 2, 1, 3], ["range", 2, 3], ["set", 2, 9, 5], ["commit", 2]],
            *[["begin", 2], ["get", 2, 1], ["put", 7, 30], ["set", 2, 9, 5], ["commit", 2]],
        ],
    ),
    "snapshots of large values": (
        {},
        [
            ["batch", [[n, 4000] for n in range(3)]],
            *[["checkpoint"], ["pin", 0], ["put", 0, 4100], ["checkpoint"], ["put", 1, 4200], ["checkpoint"]],
            *[["put", 2, 4300], ["checkpoint"], ["put", 0, 4400], ["checkpoint"], ["pinned", 0]],
        ],
    ),
    "tombstones among many": (
        {},
        [["batch", [[n, 10] for n in range(60)]], ["checkpoint"], ["del", 30], ["checkpoint"], ["look"]],
    ),
    "three puts": ({}, [["put", 1, 100], ["put", 2, 400], ["put", 1, 20]]),
    "puts across sectors": ({}, [["put", 1, 450], ["put", 2, 450], ["put", 3, 1100]]),
    "a tail that no flush covered": (
        {},
        [["put", 1, 60], ["weak", 2, 60], ["weak", 3, 460], ["weak", 4, 60], ["put", 5, 60]],
    ),
    "unsynced only": ({"durability": "os"}, [["put", n, 150] for n in range(6)] + [["sync"], ["put", 7, 700]]),
    "batches": ({}, [["batch", [[n, 90] for n in range(12)]], ["batch", [[n, None] for n in range(0, 12, 2)]]]),
    "a large value": ({}, [["put", 1, 9000], ["put", 2, 30], ["checkpoint"], ["put", 1, 5000], ["checkpoint"]]),
    "checkpoints": (
        {},
        [["put", 1, 100], ["checkpoint"], ["put", 2, 100], ["checkpoint"], ["put", 1, 50], ["checkpoint"]],
    ),
    "tombstones": (
        {},
        [
            ["batch", [[n, 40] for n in range(20)]],
            ["checkpoint"],
            ["del", 3],
            ["range", 5, 9],
            ["checkpoint"],
            ["checkpoint"],
        ],
    ),
    "pages reused": (
        {},
        [["batch", [[n, 300] for n in range(40)]], ["checkpoint"]]
        + [step for n in range(5) for step in (["put", n * 7, 310 + n], ["checkpoint"])],
    ),
    "rotation": ({}, [["put", n % 5, 3500] for n in range(9)]),
    "rotation with a checkpoint": (
        {},
        [["put", n % 5, 3500] for n in range(5)]
        + [["checkpoint"], ["put", 8, 3500], ["put", 9, 3500], ["checkpoint"], ["put", 1, 50]],
    ),
    "many segments retired at once": (
        {"memtable_bytes": 1 << 20},
        [["put", n, 7000] for n in range(6)] + [["checkpoint"], ["put", 8, 50], ["checkpoint"], ["put", 1, 50]],
    ),
    "rotation prepared ahead": (
        {},
        [["prepare"], *[["put", n % 5, 3500] for n in range(5)], ["prepare"], ["put", 7, 900]],
    ),
    "rotation unsynced": ({}, [["weak", n % 5, 3500] for n in range(8)] + [["put", 9, 30]]),
    "a record larger than a segment": ({}, [["put", 1, 30000], ["put", 2, 30], ["weak", 3, 20000], ["put", 4, 30]]),
    "closed large, and on": (
        # Segments that are large enough to be shortened by a close, and then one that is gone on with.
        {"segment_bytes": 128 << 10, "memtable_bytes": 1 << 20},
        [["put", n, 25000] for n in range(4)]
        + [["reopen"], ["put", 1, 50], ["reopen"], ["weak", 2, 50], ["put", 3, 50]],
    ),
    "killed large, and on": (
        {"segment_bytes": 128 << 10, "memtable_bytes": 1 << 20},
        [*[["put", n, 25000] for n in range(4)], ["kill"], ["weak", 1, 50], ["kill"], ["put", 2, 50]],
    ),
    "segments of the usual size": (
        {"segment_bytes": 16 << 20, "memtable_bytes": 1 << 20},
        [["put", 1, 50], ["put", 2, 70_000], ["reopen"], ["put", 3, 50], ["weak", 4, 40_000], ["kill"], ["put", 5, 50]],
    ),
    "reopened": ({}, [["put", 1, 50], ["reopen"], ["put", 2, 50], ["reopen"], ["reopen"], ["put", 3, 50]]),
    "killed": (
        {},
        [["put", 1, 50], ["weak", 2, 50], ["kill"], ["put", 3, 50], ["weak", 4, 800], ["kill"], ["weak", 5, 10]],
    ),
    "cut and on": (
        {},
        [["put", 1, 50], ["weak", 2, 600], ["cut", 1], ["put", 3, 50], ["weak", 4, 600], ["cut", 2], ["put", 5, 50]],
    ),
    "killed after a checkpoint": (
        {},
        [["put", 1, 50], ["checkpoint"], ["weak", 2, 50], ["kill"], ["checkpoint"], ["put", 3, 50]],
    ),
    "idle": ({}, [["put", 1, 50], ["idle"], ["put", 2, 50], ["idle"], ["idle"], ["weak", 3, 50], ["put", 4, 50]]),
    "transactions": (
        {},
        [["put", 1, 50], ["put", 2, 50], ["move", 1, 2], ["begin", 0], ["get", 0, 1], ["set", 0, 3, 70], ["commit", 0]],
    ),
    "a snapshot across checkpoints": (
        {},
        [
            ["batch", [[n, 200] for n in range(20)]],
            ["checkpoint"],
            ["pin", 0],
            ["range", 0, 10],
            ["checkpoint"],
            ["put", 1, 200],
            ["checkpoint"],
            ["pinned", 0],
            ["unpin", 0],
            ["put", 2, 90],
            ["checkpoint"],
        ],
    ),
    "a window that moves under a past moment": (
        {"keep_history_bytes": 40 << 10},
        [
            *[step for n in range(4) for step in (["put", n % 3, 6000], ["weak", 4, 6000], ["checkpoint"])],
            *[["past", 0, 5], ["look"]],
            *[step for n in range(8) for step in (["put", n % 3, 6000], ["weak", 4, 6000], ["checkpoint"])],
            *[["pinned", 0], ["unpin", 0], ["put", 1, 90], ["checkpoint"], ["look"], ["verify"]],
        ],
    ),
    "several tables": (
        {},
        [
            ["tables", [[0, 1, 50], [16, 1, 50], [17, 1, 3000]]],
            ["put", 2, 50],
            ["checkpoint"],
            ["tables", [[16, 1, None], [17, None, None], [17, 3, 900]]],
            ["weak", 3, 50],
            ["tables", [[0, 1, None], [16, 2, 6000]]],
            ["checkpoint"],
            ["look"],
            ["tables", [[16, None, None], [17, None, None]]],
            ["checkpoint"],
            ["tables", [[16, 4, 80]]],
            ["look"],
        ],
    ),
    "commits that say who made them": (
        {},
        [
            *[["said", 1, 50], ["put", 2, 50], ["weak", 3, 50], ["said", 4, 460], ["checkpoint"], ["look"]],
            *[["said", 1, 6000], ["weak", 2, 50], ["kill"], ["said", 3, 50], ["checkpoint"], ["look"]],
            *[["said", 5, 3000], ["said", 1, 20], ["reopen"], ["said", 6, 9000], ["checkpoint"], ["look"]],
        ],
    ),
    "a projection": (
        {},
        [
            *[["project"], ["put", 1, 50], ["put", 1, 460], ["project"], ["batch", [[2, 50], [1, None]]]],
            *[["checkpoint"], ["weak", 3, 50], ["project"], ["range", 1, 3], ["del", 9], ["project"]],
            *[["tables", [[16, 1, 50]]], ["project"], ["kill"], ["put", 4, 50], ["project"], ["look"], ["reopen"]],
            *[["put", 1, 20], ["project"]],
        ],
    ),
    "a projection of what is flushed late": (
        {"durability": "os"},
        [
            *[["put", 1, 50], ["project"], ["put", 2, 50], ["take", 0], ["project"], ["put", 3, 600], ["take", 0]],
            *[["ack", 0], ["sync"], ["project"], ["take", 0], ["put", 4, 50], ["cut", 1], ["on"], ["put", 1, 50]],
        ],
    ),
    "acknowledgements": (
        {},
        [
            *[["take", 0], ["put", 1, 50], ["take", 0], ["ack", 0], ["weak", 2, 50], ["take", 0], ["put", 3, 50]],
            *[["take", 0], ["ack", 0], ["take", 0], ["kill"], ["take", 0], ["put", 4, 50], ["take", 0], ["ack", 0]],
        ],
    ),
    "acknowledgements that are written late": (
        {},
        [
            *[["take", 1], ["put", 1, 50], ["take", 1], ["ack", 1]],
            *[["put", n % 5, 3500] for n in range(9)],
            *[["take", 1], ["ack", 1], ["checkpoint"], ["put", 1, 50], ["checkpoint"], ["put", 2, 50], ["cut", 0]],
            *[["on"], ["put", 3, 50], ["take", 1], ["ack", 1], ["reopen"], ["checkpoint"], ["checkpoint"], ["on"]],
        ],
    ),
    "zeros": ({"preallocate": "zeros"}, [["put", n % 5, 3500] for n in range(6)] + [["checkpoint"], ["put", 1, 10]]),
    "everything deleted": (
        {},
        [
            ["batch", [[n, 500] for n in range(30)]],
            ["checkpoint"],
            ["range", 0, 99],
            ["checkpoint"],
            ["put", 1, 1],
            ["checkpoint"],
        ],
    ),
    "a clock that steps back": (
        {},
        [["put", 1, 50], ["clock", -86400], ["put", 2, 50], ["checkpoint"], ["reopen"], ["put", 3, 50]],
    ),
    "one operation each": ({}, []),
}

_SMALL_STEPS: Final[tuple[Program, ...]] = (
    [["put", 1, 80]],
    [["put", 2, 600]],
    [["weak", 1, 90]],
    [["weak", 3, 1500]],
    [["put", 4, 3900]],
    [["said", 6, 40]],
    [["del", 1]],
    [["range", 1, 3]],
    [["batch", [[1, 30], [2, 30], [5, None]]]],
    [["tables", [[0, 1, 30], [16, 1, 30], [17, 2, None]]]],
    [["checkpoint"]],
    [["project"]],
    [["sync"]],
    [["idle"]],
    [["prepare"]],
    [["reopen"]],
    [["kill"]],
    [["cut", 0]],
)


def small_programs(length: int) -> Iterator[Program]:
    """Every program of `length` of the small steps: three operations suffice for most bugs (CrashMonkey)."""
    if length == 0:
        yield []
        return
    for shorter in small_programs(length - 1):
        for step in _SMALL_STEPS:
            yield [*shorter, *step]


def _writes_to_tables(
    random: Random, keys: int, size: Callable[[], int]
) -> list[list[int | None]]:
    writes: list[list[int | None]] = []
    for _ in range(random.randrange(1, 6)):
        table = random.choice((0, 16, 16, 17))
        if random.random() < 0.1 and table:
            writes.append([table, None, None])
        else:
            writes.append([table, random.randrange(keys), size() if random.random() < 0.8 else None])
    return writes


def long_program(random: Random, length: int) -> Program:
    """A program of many steps, for volume."""
    keys = random.choice((6, 20, 60))
    sizes = (5, 60, 100, 400, 700, 2500, 6000)
    weights = (4, 8, 8, 4, 2, 1, 1)

    def size() -> int:
        return random.choices(sizes, weights)[0] + random.randrange(20)

    program: Program = []
    consuming = random.random() < 0.4
    for _ in range(length):
        if consuming and random.random() < 0.15:
            program.append(random.choice((["project"], ["take", 0], ["ack", 0], ["take", 1], ["ack", 1])))
        roll = random.random()
        key = random.randrange(keys)
        if roll < 0.27:
            program.append(["put", key, size()])
        elif roll < 0.32:
            program.append(["said", key, size()])
        elif roll < 0.50:
            program.append(["weak", key, size()])
        elif roll < 0.58:
            program.append(["del", key])
        elif roll < 0.61:
            program.append(["tables", _writes_to_tables(random, keys, size)])
        elif roll < 0.68:
            writes = {
                random.randrange(keys): size() if random.random() < 0.8 else None for _ in range(random.randrange(1, 9))
            }
            program.append(["batch", [[k, v] for k, v in writes.items()]])
        elif roll < 0.71:
            program.append(["range", key, key + random.randrange(1, 8)])
        elif roll < 0.76:
            program.append(["move", key, random.randrange(keys)])
        elif roll < 0.86:
            program.append(["checkpoint"])
        elif roll < 0.88:
            program.append([random.choice(("sync", "idle", "prepare"))])
        elif roll < 0.91:
            program.append(["reopen"])
        elif roll < 0.93:
            program.append(["kill"])
        elif roll < 0.95:
            program.append(["cut", random.getrandbits(8)])
        elif roll < 0.98:
            step = random.choice(("pin", "pinned", "unpin", "past"))
            program.append([step, random.randrange(2), *([random.randrange(40)] if step == "past" else [])])
        else:
            program.append(["clock", random.choice((-3600, 3600))])
    return program


_KEYS = st.integers(0, 11)
_SIZES = st.sampled_from([0, 3, 60, 100, 460, 700, 2100, 6000])
_CLIENTS = st.integers(0, 2)
_STEPS = st.one_of(
    st.tuples(st.just("put"), _KEYS, _SIZES),
    st.tuples(st.just("weak"), _KEYS, _SIZES),
    st.tuples(st.just("said"), _KEYS, _SIZES),
    st.tuples(st.just("del"), _KEYS),
    st.tuples(st.just("range"), _KEYS, _KEYS),
    st.tuples(st.just("batch"), st.lists(st.tuples(_KEYS, st.none() | _SIZES), max_size=6, unique_by=lambda w: w[0])),
    st.tuples(st.just("move"), _KEYS, _KEYS),
    st.tuples(st.sampled_from(["sync", "checkpoint", "checkpoint", "idle", "prepare", "reopen", "kill", "verify"])),
    st.tuples(st.just("cut"), st.integers(0, 7)),
    st.tuples(st.sampled_from(["begin", "commit", "abort", "pin", "pinned", "unpin"]), _CLIENTS),
    st.tuples(st.just("past"), _CLIENTS, st.integers(0, 20)),
    st.tuples(st.just("get"), _CLIENTS, _KEYS),
    st.tuples(st.just("scan"), _CLIENTS, _KEYS, _KEYS),
    st.tuples(st.just("set"), _CLIENTS, _KEYS, st.none() | _SIZES),
    st.tuples(st.just("clock"), st.sampled_from([-100, 100])),
)

_CONSUMING = st.one_of(
    _STEPS, st.tuples(st.just("project")), st.tuples(st.sampled_from(["take", "ack"]), st.integers(0, 1))
)


def _programs(steps: st.SearchStrategy[tuple[Any, ...]]) -> st.SearchStrategy[Program]:
    return st.lists(
        steps.map(lambda step: [list(x) if isinstance(x, tuple) else x for x in step]), min_size=1, max_size=30
    )


#: What several logical clients do, one step after the other. JSON lists, so that a case can be written down. Without
#: consumers too, since what they hold of the log is not retired.
PROGRAMS = _programs(_STEPS) | _programs(_CONSUMING)
