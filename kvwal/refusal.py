"""What stands in for the log of a store that takes no commits: closed, read-only, forked or poisoned.

The commit path thus needs no check of its own for any of these: it meets this where the log was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from kvwal.batch import Seqno
from kvwal.files import Buffer

__all__ = ["Refusal"]


class Refusal:
    """A log that answers every call with the error that `reason` makes."""

    __slots__ = ("_reason", "durable_seqno", "last_seqno")

    def __init__(self, reason: Callable[[], Exception], seqno: Seqno) -> None:
        self._reason = reason
        self.last_seqno = seqno
        self.durable_seqno = seqno

    def append(self, bodies: Sequence[bytes | list[Buffer]], *, small: bool = False) -> NoReturn:
        """Refuse."""
        raise self._reason()

    def append_put(self, key: bytes, value: bytes) -> NoReturn:
        """Refuse."""
        raise self._reason()

    def sync(self) -> NoReturn:
        """Refuse."""
        raise self._reason()
