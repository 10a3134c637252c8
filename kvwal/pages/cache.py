"""The page cache: verified nodes and short overflow values in memory, by where they lie and what their crc is.

- The cache is two dicts, young and old: a miss and a hit in old go into young, and when young has taken half the
  budget it becomes old and the old one is dropped.
- There is no lock. Each step is one operation of a dict, which is atomic, and a reader that still looks into a
  dict that was just dropped finds there what is true. Threads that keep nodes at the same time, or one that is
  interrupted, can only make the count of bytes wrong, by a node; it begins at 0 whenever young becomes old.
- Once the cache is full, a leaf comes in when it is read again within as many other leaves as the
  cache may hold. Leaves that are read once leave those alone that are read often; and to keep a leaf
  costs more than to read it (fresh memory has to be mapped): a seventh of a get anywhere among 3 million keys.
- Leaves are cached as the bytes read, or decoded where a scan found space for that (`keep_decoded`);
  inner nodes decoded (separators as a tuple for bisect, pointers packed), short overflow values as
  they are.

Invariant: what is cached is never changed, since all readers share it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Final

from kvwal.pages.node import PAGE_SIZE, Inner, Leaf

__all__ = ["Cache", "NotCached"]

# What an entry costs beside the node: its key (36 bytes) and its share of a dict that may be a
# third full (24 bytes an entry, up to 4 an index, each times 4 at worst).
_ENTRY_COST: Final = 36 + 112
#: Object header of bytes, and what the allocator rounds up.
_BYTES_COST: Final = 33 + 8
#: tuple, list, generation
_INNER_COST: Final = 64 + 72 + 32
#: tuple; for each column one; for each pair, whether it is made yet or not, a tuple and its place
_LEAF_COST: Final = 64
_COLUMN_COST: Final = 72
_PAIR_COST: Final = 64 + 8


class NotCached(Exception):  # not an error: the answer needs a page that is not in memory
    """Only a read of the file can tell. Users never see it."""


class Cache:
    """Nodes by address (`node.ADDRESS`). All methods are thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        #: address -> leaf bytes, `Leaf`, `Inner` or overflow value.
        self.young: dict[int, Any] = {}
        self.old: dict[int, Any] = {}
        self._young_bytes = 0
        self._old_bytes = 0
        # Leaves that were read and not kept.
        self._once: set[int] = set()
        self.hits = 0
        self.misses = 0

    def get(self, address: int) -> Any | None:
        """What is cached there, without counting or keeping it."""
        found = self.young.get(address)
        return self.old.get(address) if found is None else found

    def admits(self, address: int) -> bool:
        """Whether a leaf that was just read should be kept: there is space, or it was read before not long ago."""
        if not self._old_bytes:
            return True
        once = self._once
        if address in once:
            once.discard(address)
            return True
        if len(once) > self.limit_bytes // (2 * PAGE_SIZE):
            self._once = once = set()
        once.add(address)
        return False

    def keep(self, address: int, node: bytes | Leaf | Inner) -> None:
        """Keep a node, or an overflow value that is not too large, among the young."""
        cost = _ENTRY_COST + _BYTES_COST + len(node) if type(node) is bytes else _cost(node)
        half = self.limit_bytes >> 1
        if cost > half or address in self.young:
            return
        if self._young_bytes + cost > half:
            self.old, self.young = self.young, {}
            self._old_bytes, self._young_bytes = self._young_bytes, 0
        elif self.old.pop(address, None) is not None:
            self._old_bytes -= cost
        self.young[address] = node
        self._young_bytes += cost

    def keep_decoded(self, address: int, leaf: Leaf) -> None:
        """Keep a leaf decoded if there is space for it, where it is the first to go: no scan empties the cache."""
        half = self.limit_bytes >> 1
        least = len(leaf[0]) * 2 * _BYTES_COST
        if self._old_bytes + least > half and address not in self.young:
            return
        more = cost = _cost(leaf)
        if (raw := self.young.get(address)) is not None:
            more = cost - _cost(raw)
            # Not more than three quarters: what is young should stay a while.
            if self._young_bytes + more <= half - (half >> 2):
                self.young[address] = leaf
                self._young_bytes += more
            elif self._old_bytes + cost <= half:
                # In this order, because a reader must find the one or the other.
                self.old[address] = leaf
                self._old_bytes += cost
                self.young.pop(address, None)
                self._young_bytes -= cost - more
            return
        if (raw := self.old.get(address)) is not None:
            more = cost - _cost(raw)
        if self._old_bytes + more <= half:
            self.old[address] = leaf
            self._old_bytes += more

    def resize(self, limit_bytes: int) -> None:
        """Change the budget. By little: what is too much now goes when the next node comes in. To 0: all goes."""
        self.limit_bytes = limit_bytes
        if self._young_bytes + self._old_bytes > limit_bytes:
            self.old = {}
            self._old_bytes = 0
        if not limit_bytes:
            self.young = {}
            self._young_bytes = 0

    def forget(self, addresses: Iterable[int], places: Sequence[int] = ()) -> None:
        """Drop what is cached under these, and what lies in these extents: their pages may be written from now on.

        Args:
            places: `page << 32 | pages`, ascending and disjoint: for extents whose nodes are not known.
        """
        for cached in (self.young, self.old) if places else ():
            addresses = [*addresses, *(address for address in list(cached) if _lies_in(places, address))]
        for address in addresses:
            node = self.young.pop(address, None)
            if node is not None:
                self._young_bytes -= _cost(node)
            node = self.old.pop(address, None)
            if node is not None:
                self._old_bytes -= _cost(node)

    def used_bytes(self) -> int:
        """Memory taken, objects included."""
        return self._young_bytes + self._old_bytes


def _lies_in(places: Sequence[int], address: int) -> bool:
    page = address & 0xFFFF_FFFF
    at = bisect_right(places, page << 32 | 0xFFFF_FFFF) - 1
    return at >= 0 and page < (places[at] >> 32) + (places[at] & 0xFFFF_FFFF)


def _cost(node: bytes | Leaf | Inner) -> int:
    if type(node) is tuple:
        if isinstance(node[1], tuple):
            keys, values, _, _ = node
            columns = 3 * _COLUMN_COST + len(keys) * (2 * (_BYTES_COST + 8) + _PAIR_COST)
            return _ENTRY_COST + _LEAF_COST + columns + sum(map(len, keys)) + sum(map(len, values))
        separators, pointers, _ = node
        return (
            _ENTRY_COST
            + _INNER_COST
            + _BYTES_COST
            + len(pointers)
            + len(separators) * (_BYTES_COST + 8)
            + sum(map(len, separators))
        )
    return _ENTRY_COST + _BYTES_COST + len(node)
