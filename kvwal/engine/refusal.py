"""What stands in for the log of a store that takes no commits: closed, read-only, forked or poisoned.

The commit path thus needs no check of its own for any of these: it meets this where the log was. The errors that say
so are made here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from kvwal.errors import ClosedError, DiskFullError, ForkedError, PoisonedError, ReadOnlyError
from kvwal.files import Buffer
from kvwal.keys import Seqno

__all__ = ["Refusal", "closed_error", "forked_error", "poisoned_error", "read_only_error", "stalled_error"]


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


def read_only_error() -> ReadOnlyError:
    """Of a store opened with flag "r"."""
    return ReadOnlyError('the store was opened with flag "r"; open it with "w" or "c" to write')


def closed_error() -> ClosedError:
    """Of a store that was closed."""
    return ClosedError("the store is closed; open it again with kvwal.open")


def forked_error() -> ForkedError:
    """Of a store in a child that has only inherited it."""
    return ForkedError("the store was opened before the fork; open it again in the child, after the parent closed it")


def poisoned_error(cause: BaseException) -> PoisonedError:
    """Of a store whose disk has failed: what it was, and what to do now."""
    error = PoisonedError(
        f"an earlier write or flush failed ({cause}), so what is on disk is unknown; reads go on; close the store and "
        "open it again: recovery keeps every acknowledged commit"
    )
    error.__cause__ = cause
    return error


def stalled_error(cause: BaseException) -> Exception:
    """Of a commit that waits for a checkpoint which cannot be made."""
    if isinstance(cause, PoisonedError):
        return cause
    if isinstance(cause, DiskFullError):
        return DiskFullError(
            "the disk is full, so commits cannot move from memory to the pages; free some space and go on"
        )
    return poisoned_error(cause)
