"""How long a feed waits for a change, and what it gives instead: a heartbeat now and then, and at last an end."""

from __future__ import annotations

import time

from kvwal.keys import as_seconds

__all__ = ["Quiet"]


class Quiet:
    """The time in which no change came. For one thread at a time.

    Rules: `begin` when a call begins to wait; `end` when a change was found. In between, when `left_s` is down to 0,
    the call gives a heartbeat, or ends if `is_over`.
    """

    __slots__ = ("_beat_s", "_heartbeat_s", "_since_s", "_timeout_s")

    def __init__(self, timeout_s: float | None, heartbeat_s: float | None = None) -> None:
        """TypeError or ValueError for times that cannot be. `timeout_s`: since the last change. None: never."""
        self._timeout_s = None if timeout_s is None else as_seconds("timeout_s", timeout_s)
        self._heartbeat_s = None if heartbeat_s is None else as_seconds("heartbeat_s", heartbeat_s)
        if self._heartbeat_s == 0:
            raise ValueError(f"heartbeat_s is {heartbeat_s}; it is more than 0")
        # Since when there was no change; None: none was waited for since the last one.
        self._since_s: float | None = None
        self._beat_s = 0.0

    def begin(self) -> None:
        """A call begins to wait."""
        self._beat_s = time.monotonic()
        if self._since_s is None:
            self._since_s = self._beat_s

    def end(self) -> None:
        """There is a change."""
        self._since_s = None

    def left_s(self, most_s: float) -> float:
        """How long it is to wait on; at most so long, and 0 or less when it has waited enough."""
        now_s = time.monotonic()
        if self._heartbeat_s is not None:
            most_s = min(most_s, self._beat_s + self._heartbeat_s - now_s)
        if self._timeout_s is not None and self._since_s is not None:
            most_s = min(most_s, self._since_s + self._timeout_s - now_s)
        return most_s

    def is_over(self) -> bool:
        """Whether it has waited for `timeout_s`, and not only for a heartbeat. The time begins anew then."""
        # As in `left_s`: what is down to 0 there is down to 0 here.
        if self._timeout_s is None or self._since_s is None or self._since_s + self._timeout_s - time.monotonic() > 0:
            return False
        self._since_s = None
        return True
