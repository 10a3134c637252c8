"""Times as users give them."""

from __future__ import annotations

from datetime import datetime, timedelta

from kvwal.engine.upkeep import EPOCH

__all__ = ["microseconds"]


def microseconds(name: str, moment: datetime) -> int:
    """As commits count them. TypeError or ValueError for what is no time, or has no time zone."""
    if not isinstance(moment, datetime):
        raise TypeError(f"{name} is a datetime, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise ValueError(f"{name} is {moment}, which has no time zone; datetime.now(UTC) for one has")
    return (moment - EPOCH) // timedelta(microseconds=1)
