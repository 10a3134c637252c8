"""Short ranges that lie in memory: a few entries at once, where `scan` merges levels step by step.

They come as *parts* of decoded leaves: nothing is copied before it is known what is wanted of them, keys, values or
pairs. A leaf keeps the pairs that were once asked for: to hand out a tuple that is there costs a third of making one
from a key and a value, most of it waiting for memory.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from sys import maxsize
from typing import Any

from kvwal.memtable import Value
from kvwal.pages.page import Leaf, pairs_in_leaf
from kvwal.pages.tree import Part
from kvwal.pages.updates import merged as updated
from kvwal.scan import Chunk

__all__ = ["Few", "overlaid"]


class Few:
    """Entries of a range, from one moment. Never changes."""

    __slots__ = ("_parts", "_reverse", "_wanted")

    def __init__(self, parts: Sequence[Part], wanted: int | None, *, reverse: bool) -> None:
        """Prepare.

        Args:
            parts: in the direction of the range; they may hold more than is wanted.
            wanted: how many entries, from the beginning; None for all.
        """
        self._parts = parts
        self._wanted = maxsize if wanted is None else wanted
        self._reverse = reverse

    def chunks(self) -> Iterator[Chunk]:
        """Keys and values."""
        keys: list[bytes] = []
        values: list[bytes] = []
        for leaf, low, high in self._cut():
            keys += self._turned(leaf[0][low:high])
            values += self._turned(leaf[1][low:high])
        return iter([(keys, values)] if keys else [])

    def pairs(self) -> Iterator[tuple[bytes, bytes]]:
        """Pairs of key and value."""
        pairs: list[tuple[bytes, bytes]] = []
        for leaf, low, high in self._cut():
            pairs += self._turned(pairs_in_leaf(leaf)[low:high])
        return iter(pairs)

    def _cut(self) -> Iterator[Part]:
        """The parts, without what is more than wanted."""
        left = self._wanted
        for leaf, low, high in self._parts:
            if high - low >= left:
                yield (leaf, high - left, high) if self._reverse else (leaf, low, low + left)
                return
            left -= high - low
            yield leaf, low, high

    def _turned(self, column: list[Any]) -> list[Any]:
        if self._reverse:
            column.reverse()
        return column


def overlaid(
    parts: Sequence[Part], keys: list[bytes], values: dict[bytes, Value], most: int, *, ended: bool, reverse: bool
) -> Sequence[Part] | None:
    """Keys of a newer table over parts of an older one; None if that does not make `most` entries for certain.

    Args:
        keys: in the direction of the range; all of them only if they are `most` or fewer.
        ended: whether the parts are the whole range.
    """
    # Beyond the last key of a source that was cut nothing is known of it.
    cut_newer = len(keys) > most
    if not ended:
        leaf, low, high = parts[-1]
        if (keys[0] < leaf[0][low]) if reverse else (keys[0] > leaf[0][high - 1]):
            # The usual case of a table with few keys: none of them is within these parts.
            return parts
    order: list[bytes] = []
    found: list[bytes] = []
    for leaf, low, high in reversed(parts) if reverse else parts:
        order += leaf[0][low:high]
        found += leaf[1][low:high]
    if reverse:
        keys.reverse()
        begins = [edge for edge, is_cut in ((order[:1], not ended), (keys[:1], cut_newer)) if is_cut]
        if begins:
            (begin,) = max(begins)
            keys = keys[bisect_left(keys, begin) :]
            at = bisect_left(order, begin)
            order, found = order[at:], found[at:]
    else:
        ends = [edge for edge, is_cut in ((order[-1:], not ended), (keys[-1:], cut_newer)) if is_cut]
        if ends:
            (end,) = min(ends)
            keys = keys[: bisect_right(keys, end)]
            at = bisect_right(order, end)
            order, found = order[:at], found[:at]
    if keys:
        order, found = updated(order, found, keys, [values[key] for key in keys])
    if (cut_newer or not ended) and len(order) < most:
        return None
    made: Leaf = (order, found, 0, [])
    return [(made, 0, len(order))] if order else []
