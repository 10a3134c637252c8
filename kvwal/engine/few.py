"""Short ranges that lie in memory: a few pairs at once, where `scan` merges levels step by step.

They are the tuples that decoded leaves keep (`kvwal.pages.page.pairs_in_leaf`): to hand out one that is there costs a
third of making one from a key and a value, most of it waiting for memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, TypeAlias

from kvwal.engine.memtable import Value
from kvwal.engine.merge import Chunk

__all__ = ["Pairs", "chunks_in", "overlaid"]

Pairs: TypeAlias = list[tuple[bytes, bytes]]

#: So many times fewer keys than pairs are put in one by one, more by way of a dict.
_SPARSE: Final = 8


def chunks_in(pairs: Pairs) -> Iterator[Chunk]:
    """The pairs as chunks."""
    return iter([([key for key, _ in pairs], [value for _, value in pairs])] if pairs else ())


def overlaid(pairs: Pairs, keys: list[bytes], values: dict[bytes, Value], *, cut: bool, reverse: bool) -> Pairs:
    """Keys of a newer table over the pairs of an older one, in the direction of the range.

    Args:
        pairs, keys: in that direction. May be changed.
        cut: there are more keys, of which nothing is known. Pairs beyond those that are known are left out.
    """
    if reverse:
        pairs.reverse()
        keys.reverse()
        if cut:
            del pairs[: bisect_left(pairs, (keys[0],))]
    elif cut:
        del pairs[bisect_left(pairs, (keys[-1] + b"\0",)) :]
    pairs = _updated(pairs, keys, values)
    if reverse:
        pairs.reverse()
    return pairs


def _updated(pairs: Pairs, keys: list[bytes], values: dict[bytes, Value]) -> Pairs:
    """Both in one sorted run, without what is deleted."""
    if len(keys) * _SPARSE > len(pairs):
        entries: dict[bytes, Value] = dict(pairs)
        entries.update((key, values[key]) for key in keys)
        return [(key, value) for key in sorted(entries) if (value := entries[key]) is not None]
    for key in keys:
        value = values[key]
        # A tuple of the key alone comes right before its pair.
        at = bisect_left(pairs, (key,))
        there = at < len(pairs) and pairs[at][0] == key
        if value is not None:
            pairs[at : at + there] = [(key, value)]
        elif there:
            del pairs[at]
    return pairs
