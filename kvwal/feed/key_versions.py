"""The versions of one key that the log still has: what each commit made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from kvwal.db.handle import Closing
from kvwal.engine.engine import Engine
from kvwal.engine.state import UnlessGone
from kvwal.errors import closed
from kvwal.expiring import plain
from kvwal.keys import Seqno
from kvwal.log.extension import cause_of
from kvwal.log.intents import is_of_users
from kvwal.log.key_history import KeyCursor, KeyRecord, Kind
from kvwal.times import time_of

__all__ = ["KeyVersion", "KeyVersions"]


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """What one commit made of a key.

    Attributes:
        seqno: of the commit.
        time_us: of the commit, microseconds since 1970 UTC.
        meta: what the user said about the commit; empty if nothing. Do not change it.
        kind: "put"; "delete"; "expire", if it was removed because it had expired; or "range", if the key was in a range
            that was deleted.
        value: of a put. None of the other kinds: then the key was gone.
        cause: why the store itself made the commit, as "migrate"; None if a user did.
    """

    seqno: Seqno
    time_us: int
    meta: Mapping[str, str] = field(hash=False)
    kind: Kind
    value: bytes | None
    cause: str | None = None

    @property
    def time(self) -> datetime:
        """Of the commit, in UTC."""
        return time_of(self.time_us)


class KeyVersions(Iterator[KeyVersion], Closing):
    """The versions of one key, one after the other. Made by `Store.versions`.

    For one thread at a time. The log that it reads is held until it is exhausted, closed or collected. An error closes
    it. It raises ClosedError when it or the store was closed, and what reading the log raises.
    """

    __slots__ = ("__weakref__", "_cursor", "_engine", "_left", "_owner")

    def __init__(
        self,
        engine: Engine,
        key: bytes,
        *,
        table: int,
        since: Seqno | None,
        until: Seqno | None,
        reverse: bool,
        limit: int | None,
        owner: object = None,
    ) -> None:
        self._cursor: KeyCursor | None = None
        if not is_of_users(table):
            raise ValueError(f"table {table} is the store's own; its keys have no versions to be read")
        self._engine = engine
        self._left = limit
        # The store, which is not collected while it is read.
        self._owner = owner
        self._cursor = engine.upkeep.past.versions(table, key, since, until, reverse=reverse)

    def __iter__(self) -> KeyVersions:
        return self

    def __next__(self) -> KeyVersion:
        self._engine.state.refuse_if_gone()
        if self._left == 0:
            self.close()
            raise StopIteration
        cursor = self._cursor
        if cursor is None:
            raise closed("iterator")
        try:
            with UnlessGone(self._engine.state):
                version = _version(next(cursor))
        except StopIteration:
            self._left = 0
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        if self._left is not None:
            self._left -= 1
        return version

    def close(self) -> None:
        """Let go of the log that it holds. Idempotent."""
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            cursor.close()


def _version(found: KeyRecord) -> KeyVersion:
    record = found.record
    cause = cause_of(record.extension())
    return KeyVersion(record.seqno, record.time_us, record.meta(), found.kind, plain(found.value), cause)
