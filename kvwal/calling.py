"""What came back from a function of the user: whether all of it was run."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isasyncgen, isawaitable, iscoroutine, isgenerator

__all__ = ["refuse_plain", "refuse_unrun"]


def refuse_unrun(result: object, *, is_used: bool = True) -> None:
    """TypeError if the function only made what is still to be awaited, so that nothing of it was run.

    The same for a generator where the result is not used.
    """
    if result is None:
        return  # Hot: most often.
    if isawaitable(result) or isasyncgen(result):
        advice = "nothing here awaits it: give a function without async, or use kvwal.aio"
    elif isgenerator(result) and not is_used:
        advice = "nothing here goes through it: give a function without yield"
    else:
        return
    if iscoroutine(result):
        # Else it would warn that it was never awaited.
        result.close()
    kind = type(result).__name__
    raise TypeError(f"{getattr(result, '__qualname__', 'the function')} gave a {kind}, and {advice}")


def refuse_plain(function: Callable[..., object], result: object) -> None:
    """TypeError if what a function of a task returned cannot be awaited."""
    if not isawaitable(result):
        name = getattr(function, "__qualname__", repr(function))
        raise TypeError(f"{name} gave {type(result).__name__}, which cannot be awaited: make it `async def`")
