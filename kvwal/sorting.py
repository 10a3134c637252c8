"""Sorting many keys while other threads run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Final

__all__ = ["sorted_in_steps"]

# This many keys are sorted in half a millisecond, during which no other thread has the interpreter.
_STEP: Final = 1024
# Eight keys in each step, but at most 4,096 keys, say where the steps part.
_SAMPLES: Final = 8
_MOST_SAMPLES: Final = 4096
# Keys of the sample that are sorted in a step.
_SORTED: Final = 256


def sorted_in_steps(keys: Collection[bytes], step_keys: int = _STEP) -> Iterator[list[bytes]]:
    """The keys in order, in lists of about `step_keys`: `sorted` of a million would stop other threads for a second.

    Each list, and each empty one among them, ends a step. Keys are dealt out between bounds that a sample gives, and
    then each list is sorted; in all that takes no longer.
    """
    every = max(step_keys // _SAMPLES, len(keys) // _MOST_SAMPLES)
    sample: list[bytes] = []
    for part in _parts(keys, every):
        # Not always the same place: keys may come from a few sources in turn.
        sample.append(part[37 * len(sample) % len(part)])
        if not len(sample) % _SAMPLES:
            yield []
    for i in range(0, len(sample), _SORTED):
        sample[i : i + _SORTED] = sorted(sample[i : i + _SORTED])
        yield []
    # It only merges those.
    sample.sort()
    yield []
    per_step = max(1, step_keys // every)
    bounds = sample[per_step::per_step]
    steps: list[list[bytes]] = [[] for _ in range(len(bounds) + 1)]
    put_into = [step.append for step in steps]
    for part in _parts(keys, every):
        for key in part:
            put_into[bisect_right(bounds, key)](key)
        yield []
    # What is done with goes at once: to free it all would be a long step.
    put_into.clear()
    steps.reverse()
    while steps:
        step = steps.pop()
        step.sort()
        yield step


def _parts(keys: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    rest = iter(keys)
    while part := list(islice(rest, size)):
        yield part
