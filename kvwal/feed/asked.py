"""What a consumer is asked for with."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import datetime
from typing import Final, Literal, TypeAlias

from kvwal.engine.tables import as_table_name
from kvwal.feed.change import Filter, Prefixes
from kvwal.feed.quiet import Quiet
from kvwal.keys import as_int, as_seconds
from kvwal.log import Limits
from kvwal.times import us_of

__all__ = ["Asked", "Start", "as_consumer_name"]

Start: TypeAlias = Literal["now", "oldest"] | int | datetime
"""Where a new consumer begins: with what comes, with what the log has, after a commit or position, or at a time."""

# Of a limit.
_MOST: Final = 1 << 62


def as_consumer_name(name: str) -> str:
    """The name, if a consumer may have it. TypeError, ValueError."""
    return as_table_name(name, "a consumer's name")


class Asked:
    """What a consumer was asked for with, checked: the arguments of `Store.consumer`."""

    def __init__(
        self,
        name: str,
        prefix: Prefixes,
        tables: Iterable[int] | None,
        *,
        start: Start,
        max_lag_bytes: int | Literal["default"] | None,
        max_lag_s: float | Literal["default"] | None,
        own: bool,
        replace: bool,
        steal: bool,
        on_error: Literal["stop", "park"],
        ack_interval_s: float,
        timeout_s: float | None,
        heartbeat_s: float | None,
    ) -> None:
        """TypeError or ValueError for what cannot be."""
        self.name = as_consumer_name(name)
        self.quiet = Quiet(timeout_s, heartbeat_s)
        self.filter = Filter(prefix, tables)
        self.start: Start
        if isinstance(start, datetime):
            us_of("start", start)
            self.start = start
        elif start == "now" or start == "oldest":
            self.start = start
        else:
            try:
                as_int("start", start, 0)
            except TypeError:
                text = f'start is "now", "oldest", a seqno, a position or a datetime, not {start!r}'
                raise TypeError(text) from None
            # Whether a position is on the line is said where the store is at hand.
            self.start = start
        # "default" leaves a limit as it is.
        self._max_bytes = max_lag_bytes
        if max_lag_bytes is not None and max_lag_bytes != "default":
            self._max_bytes = as_int("max_lag_bytes", max_lag_bytes, 0, _MOST)
        self._max_us: int | Literal["default"] | None = None
        if max_lag_s == "default":
            self._max_us = max_lag_s
        elif max_lag_s is not None:
            self._max_us = int(min(as_seconds("max_lag_s", max_lag_s) * 1e6, _MOST))
        self.own = own
        self.replace = replace
        self.steal = steal
        if on_error not in ("stop", "park"):
            raise ValueError(f'on_error is {on_error!r}; it is "stop" or "park"')
        self.parks = on_error == "park"
        self.ack_interval_s = as_seconds("ack_interval_s", ack_interval_s)
        self.thread = threading.current_thread().name

    def limits_over(self, limits: Limits) -> Limits:
        """The limits with those that are asked for."""
        return Limits(
            limits.max_bytes if self._max_bytes == "default" else self._max_bytes,
            limits.max_us if self._max_us == "default" else self._max_us,
        )
