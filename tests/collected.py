"""The collector, run at each place of a call, with a finalizer that does something."""

from __future__ import annotations

import gc
from collections.abc import Callable

__all__ = ["collected_everywhere"]


class _Finalized:
    """Does something when the collector finds it."""

    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        # Only the collector finds it.
        self.own = self

    def __del__(self) -> None:
        self.do()


def collected_everywhere(prepare: Callable[[], Callable[[], object]], call: Callable[[], object], most: int) -> int:
    """Make the call, the collector run in it at one object after the other, up to this number. How often it did.

    `prepare` is called before each, and returns what the finalizer is to do.
    """
    before, done = gc.get_threshold(), 0

    def did(do: Callable[[], object]) -> None:
        nonlocal done
        done += in_call
        do()

    for objects in range(1, most):
        in_call = False
        gc.collect()
        gc.disable()
        try:
            do = prepare()
            _Finalized(lambda do=do: did(do))  # type: ignore[misc]  # mypy infers no lambda with a default
            gc.set_threshold(gc.get_count()[0] + objects, *before[1:])
            gc.enable()
            in_call = True
            call()
        finally:
            in_call = False
            gc.set_threshold(*before)
            gc.enable()
    gc.collect()
    return done
