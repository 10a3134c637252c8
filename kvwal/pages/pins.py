"""Pins: which generations must stay readable beside the two newest.

A reader pins the generation it reads. A checkpoint asks which generations are needed, and from that moment on none can
be pinned that is not among them: its pages may be written over.

No lock: each step that changes something is one C call. So `State.lock`, under which versions are pinned, waits for
none. What a holder pins is one entry, said anew each time, so an interruption leaves nothing pinned for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from itertools import chain

__all__ = ["Pins"]


class Pins:
    """What each holder pins. Thread-safe for different holders."""

    def __init__(self, generations: Collection[int]) -> None:
        self._held: dict[object, frozenset[int]] = {}
        self._kept = frozenset(generations)

    def hold(self, holder: object, generations: Collection[int]) -> None:
        """Pin these, and no others of those that this holder held. ValueError if one is neither kept nor pinned."""
        before = self._held.get(holder, frozenset())
        # First pinned, then checked: `keep_only` goes the other way round, so one of the two sees the other.
        self._held[holder] = frozenset({*generations, *before})
        for generation in {*generations} - self._kept - before:
            if self.counts()[generation] == 1:
                self._let_go(holder, before)
                raise ValueError(f"generation {generation} is no longer kept")
        self._let_go(holder, frozenset(generations))

    def _let_go(self, holder: object, rest: frozenset[int]) -> None:
        if rest:
            self._held[holder] = rest
        else:
            self._held.pop(holder, None)

    def keeps(self, holder: object, generation: int) -> bool:
        """Whether this holder may pin that generation: it is kept, or it holds it already."""
        return generation in self._kept or generation in self._held.get(holder, ())

    def kept(self, holder: object) -> frozenset[int]:
        """The generations that this holder may pin."""
        return self._kept | self._held.get(holder, frozenset())

    def counts(self) -> dict[int, int]:
        """How many hold each generation."""
        return dict(Counter(chain(*list(self._held.values()))))

    def keep_only(self, generations: Collection[int], bases: Collection[int] = ()) -> set[int]:
        """Let only these, the bases and those that are pinned be pinned from now on.

        Returns those that the free list has to keep: bases are kept by dead lists.
        """
        self._kept = frozenset((*generations, *bases))
        return {*generations, *self.counts()}
