"""The key of a rank: the one that has a given number of keys before it."""

from __future__ import annotations

from collections.abc import Callable

from kvwal.engine.version import Version

__all__ = ["key_at"]


def key_at(version: Version, rank: int, before: Callable[[bytes], int]) -> bytes:
    """The key that has `rank` keys before it at a moment of a version. O(log^2 n).

    It is the last of all keys that were ever here, gone or not, that has at most `rank` before it.

    Args:
        rank: there is such a key.
        before: how many keys there are before a key at that moment.
    """
    found: bytes | None = None
    tables = [version.memtable] if version.frozen is None else [version.memtable, version.frozen]
    for middle in (version.tree.middle, *(table.order.middle for table in tables)):
        low: bytes | None = None
        high: bytes | None = None
        while (key := middle(low, high)) is not None:
            if before(key) <= rank:
                low = key
            else:
                high = key
        if low is not None and (found is None or low > found):
            found = low
    assert found is not None, "there is no such key"
    return found
