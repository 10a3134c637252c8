"""How many keys there are, without walking them.

The tree knows the count of every subtree. A memtable above it changes that count by its live keys,
less those that exist below it already, less what its masks hide. Whether a key exists below needs
one lookup, and blind puts must not pay for it, so it is made when somebody asks for the count. What
was compared is remembered in the memtable, so each written key is looked up at most once: asking
again costs only what was written since.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvwal.engine.memtable import MISSING, Memtable, Missing, Value
from kvwal.keys import KeyRange, Seqno, disjoint, in_any
from kvwal.pages import Tree

__all__ = ["Layer", "count_all"]


class Layer:
    """A memtable at one moment, as far as counting needs it."""

    __slots__ = ("keys", "live", "masks", "memtable", "seqno")

    def __init__(self, memtable: Memtable, keys: int, live: int, masks: list[KeyRange], seqno: Seqno | None) -> None:
        self.memtable = memtable
        self.keys = keys
        self.live = live
        self.masks = masks
        self.seqno = seqno

    @classmethod
    def of(cls, memtable: Memtable, seqno: Seqno | None = None) -> Layer:
        """The table now, or as of an older seqno. Requires: Present.lock, or a frozen table."""
        keys = len(memtable.latest)
        if seqno is None:
            return cls(
                memtable, keys, keys - memtable.tombstones, disjoint(memtable.masks_at(memtable.last_seqno)), None
            )
        found = [memtable.get_at(key, seqno) for key in memtable.latest]
        live = sum(isinstance(value, bytes) for value in found)
        return cls(memtable, keys, live, disjoint(memtable.masks_at(seqno)), seqno)

    def get(self, key: bytes) -> Value | Missing:
        """What this layer says of a key. Requires: Present.lock if it is of an older seqno."""
        return self.memtable.get(key) if self.seqno is None else self.memtable.get_at(key, self.seqno)


def count_all(tree: Tree, layers: Sequence[Layer]) -> int:
    """Keys in the tree under the layers, newest first."""
    if not layers:
        return tree.count()
    layer, older = layers[0], layers[1:]
    memtable = layer.memtable
    if not layer.masks and layer.seqno is None:
        # No other thread can spoil this: the pair is replaced whole, and either is right.
        compared, existed = memtable.compared
        if compared < layer.keys:
            new = memtable.keys_added(compared, layer.keys)
            existed += _existing(tree, older, new)
            memtable.compared = (layer.keys, existed)
        elif compared > layer.keys:
            existed = _existing(tree, older, memtable.keys_added(0, layer.keys))
        return count_all(tree, older) + layer.live - existed
    keys = [
        key
        for key in memtable.keys_added(0, layer.keys)
        if not in_any(key, layer.masks)
        and (layer.seqno is None or memtable.get_at(key, layer.seqno) is not MISSING)
    ]
    hidden = sum(_count_between(tree, older, mask) for mask in layer.masks)
    return count_all(tree, older) + layer.live - _existing(tree, older, keys) - hidden


def _count_between(tree: Tree, layers: Sequence[Layer], bounds: KeyRange) -> int:
    """Keys of the layers and the tree inside the range. Requires: frozen layers."""
    if not layers:
        return tree.count(*bounds)
    layer, older = layers[0], layers[1:]
    inside = [key for key in layer.memtable.latest if bounds.contains(key)]
    live = sum(layer.memtable.latest[key] is not None for key in inside)
    masks = [mask for clipped in layer.masks if (mask := clipped.clip(bounds)) is not None]
    open_keys = [key for key in inside if not in_any(key, masks)]
    hidden = sum(_count_between(tree, older, mask) for mask in masks)
    return _count_between(tree, older, bounds) + live - _existing(tree, older, open_keys) - hidden


def _existing(tree: Tree, layers: Sequence[Layer], keys: list[bytes]) -> int:
    """How many of the keys the layers and the tree have."""
    if not layers and not tree.count():
        return 0
    count = 0
    # In order, so that neighbours find their leaf in the page cache.
    for key in sorted(keys):
        found: Value | Missing = MISSING
        for layer in layers:
            found = layer.get(key)
            if found is not MISSING:
                break
        if isinstance(found, Missing):
            found = tree.get(key)
        count += found is not None
    return count
