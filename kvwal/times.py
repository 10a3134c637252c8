"""Times of commits: microseconds since 1970 UTC inside of the package, aware datetimes outside."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["time_of", "us_of"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_US: Final = timedelta(microseconds=1)
_LAST_US: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _US


def time_of(time_us: int) -> datetime:
    """The time, in UTC; at most the last one that a datetime has."""
    return _EPOCH + min(time_us, _LAST_US) * _US


def us_of(name: str, moment: datetime) -> int:
    """Microseconds of an argument. TypeError if it is no datetime, ValueError if it has no time zone."""
    if not isinstance(moment, datetime):
        raise TypeError(f"{name} is a datetime, not {type(moment).__name__}")
    if moment.tzinfo is None:
        raise ValueError(f"{name} is {moment}, which has no time zone; datetime.now(UTC) for one has")
    return (moment - _EPOCH) // _US
