"""Pins: which generations must stay readable beside the two newest.

A reader pins the generation it reads. A checkpoint asks which generations are needed, and from that moment on none can
be pinned that is not among them: its pages may be written over.

No lock: each step that changes something is one C call. So `State.lock`, under which versions are pinned, waits for
none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import chain

__all__ = ["Pins"]


class Pins:
    """Counted pins. Thread-safe."""

    def __init__(self, generations: Collection[int]) -> None:
        # A generation is here once for each time that it is pinned.
        self._pinned: list[int] = []
        # By holder: what it holds, all at once.
        self._held: dict[object, frozenset[int]] = {}
        self._kept = frozenset(generations)

    def pin(self, generation: int) -> None:
        """Keep a generation. ValueError if it is neither kept nor pinned already."""
        # First pinned, then checked: `keep_only` goes the other way round, so one of the two sees the other.
        self._pinned.append(generation)
        if generation not in self._kept and self.counts()[generation] == 1:
            self._pinned.remove(generation)
            raise ValueError(f"generation {generation} is no longer kept")

    def unpin(self, generation: int) -> None:
        """Take back one `pin`."""
        self._pinned.remove(generation)

    def hold(self, holder: object, generations: Collection[int]) -> None:
        """Pin these, and no others of those that this holder held. ValueError if one is neither kept nor pinned."""
        before = self._held.get(holder, frozenset())
        # First pinned, then checked, as in `pin`.
        self._held[holder] = frozenset({*generations, *before})
        for generation in {*generations} - self._kept - before:
            if self.counts()[generation] == 1:
                self._held[holder] = before
                raise ValueError(f"generation {generation} is no longer kept")
        self._held[holder] = frozenset(generations)

    def counts(self) -> dict[int, int]:
        """How often each generation is pinned."""
        return dict(Counter(chain(list(self._pinned), *list(self._held.values()))))

    def keep_only(self, generations: Collection[int]) -> set[int]:
        """Let only these, and those that are pinned, be pinned from now on; returns them."""
        self._kept = frozenset(generations)
        return {*generations, *self.counts()}
