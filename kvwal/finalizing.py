"""Finalizers that are called while the interpreter ends.

Then the names of modules are None, in the order in which modules go. A finalizer that uses one fails, and Python prints
that. The system lets go of what it would have let go of: files, and the locks on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

__all__ = ["quiet_at_exit"]

_T = TypeVar("_T")


def quiet_at_exit(finalizer: Callable[[_T], None]) -> Callable[[_T], None]:
    """The same `__del__`, which fails in silence once the interpreter ends. For each one of kvwal."""
    # Held here: the names of this module are gone by then, too.
    is_finalizing = sys.is_finalizing

    @wraps(finalizer)
    def quiet(self: _T) -> None:
        try:
            finalizer(self)
        except Exception:  # whatever a name that is None leads to
            if not is_finalizing():
                raise

    return quiet
