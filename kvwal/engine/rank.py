"""The key of a rank: the one that has a given number of keys before it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice

from kvwal.engine.past_version import PastVersion
from kvwal.engine.version import Version
from kvwal.keys import Seqno

__all__ = ["key_at"]


def key_at(version: Version, rank: int, seqno: Seqno, before: Callable[[bytes], int]) -> bytes:
    """The key that has `rank` keys before it in a version, as of `seqno`. O(log^2 n); of a past version O(rank).

    It is the last of all keys that were ever here, gone or not, that has at most `rank` before it.

    Args:
        rank: there is such a key.
        before: how many keys there are before a key, as of `seqno`.
    """
    if isinstance(version, PastVersion):
        # To count takes a walk there.
        keys = chain.from_iterable(keys for keys, _ in version.chunks(seqno, None, None, reverse=False))
        return next(islice(keys, rank, None))
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
