"""A store for commands that read: also beside the process that has it open."""

from __future__ import annotations

import kvwal

__all__ = ["opened"]


def opened(path: str, *, follow: bool = False) -> kvwal.Store | kvwal.Follower:
    """The store, for reading; followed where another process has it open, or if that is asked for."""
    if not follow:
        try:
            return kvwal.open(path, "r")
        except kvwal.LockedError:
            pass
    return kvwal.follow(path)
