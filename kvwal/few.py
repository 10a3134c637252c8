"""Short ranges that lie in memory: a few pairs at once, where `scan` merges levels step by step.

They are the tuples that decoded leaves keep (`kvwal.pages.page.pairs_in_leaf`): to hand out one that is there costs a
third of making one from a key and a value, most of it waiting for memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Final, TypeAlias

from kvwal.memtable import Value
from kvwal.scan import Chunk

__all__ = ["Pairs", "chunks_in", "overlaid"]

Pairs: TypeAlias = list[tuple[bytes, bytes]]

#: So many times fewer keys than pairs are put in one by one, more by way of a dict.
_SPARSE: Final = 8


def chunks_in(pairs: Pairs) -> Iterator[Chunk]:
    """The pairs as chunks."""
    return iter([([key for key, _ in pairs], [value for _, value in pairs])] if pairs else ())


def overlaid(
    pairs: Pairs, keys: list[bytes], values: dict[bytes, Value], most: int, *, ended: bool, reverse: bool
) -> Pairs | None:
    """Keys of a newer table over pairs of an older one; None if that does not make `most` pairs for certain.

    Args:
        pairs: in the direction of the range. May be changed.
        keys: likewise; all of them only if they are `most` or fewer.
        ended: whether the pairs are the whole range.
    """
    # Beyond the last key of a source that was cut nothing is known of it.
    cut_newer = len(keys) > most
    if not ended and (keys[0] < pairs[-1][0] if reverse else keys[0] > pairs[-1][0]):
        # The usual case of a table with few keys: none of them is within these pairs.
        return pairs
    if reverse:
        pairs.reverse()
        keys.reverse()
        begins = [edge for edge, is_cut in ((pairs[:1], not ended), ([(keys[0],)], cut_newer)) if is_cut]
        if begins:
            begin = max(edge[0][0] for edge in begins)
            del keys[: bisect_left(keys, begin)], pairs[: bisect_left(pairs, (begin,))]
    else:
        ends = [edge for edge, is_cut in ((pairs[-1:], not ended), ([(keys[-1],)], cut_newer)) if is_cut]
        if ends:
            end = min(edge[0][0] for edge in ends)
            del keys[bisect_right(keys, end) :], pairs[bisect_left(pairs, (end + b"\0",)) :]
    pairs = _updated(pairs, keys, values)
    if (cut_newer or not ended) and len(pairs) < most:
        return None
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
