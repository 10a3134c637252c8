"""Pins: which generations must stay readable beside the two newest.

A reader pins the generation it reads. A checkpoint asks which generations are needed, and from that moment on none can
be pinned that is not among them: its pages may be written over.
"""

from __future__ import annotations

from collections.abc import Collection

from kvwal.locks import locked, new_lock

__all__ = ["Pins"]


class Pins:
    """Counted pins. Thread-safe."""

    def __init__(self, generations: Collection[int]) -> None:
        #: Guards what is below; held for moments only.
        self.lock = new_lock()
        self._counts: dict[int, int] = {}
        self._kept = frozenset(generations)

    @locked
    def pin(self, generation: int) -> None:
        """Keep a generation. ValueError if it is neither kept nor pinned already."""
        if generation not in self._kept and generation not in self._counts:
            raise ValueError(f"generation {generation} is no longer kept")
        self._counts[generation] = self._counts.get(generation, 0) + 1

    @locked
    def unpin(self, generation: int) -> None:
        """Take back one `pin`."""
        # Set or deleted, by one step: taken out first and put back, an interruption in between would lose it.
        count = self._counts[generation] - 1
        if count:
            self._counts[generation] = count
        else:
            del self._counts[generation]

    @locked
    def counts(self) -> dict[int, int]:
        """How often each generation is pinned."""
        return dict(self._counts)

    @locked
    def keep_only(self, generations: Collection[int]) -> set[int]:
        """Let only these, and those that are pinned, be pinned from now on; returns them."""
        self._kept = frozenset(generations)
        return {*generations, *self._counts}
