"""The durable commits of users' tables in their order: who made them and why, and how much each changed.

Invariant: no value is cut out of a record, and of a commit that is not wanted no key either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from kvwal.engine.engine import Engine
from kvwal.engine.state import UnlessGone
from kvwal.feed.change import Filter
from kvwal.feed.line import durable_now
from kvwal.keys import Seqno
from kvwal.log import Record, SegmentCursor, extension_of, meta_of
from kvwal.log.columns import decode_put_key
from kvwal.log.extension import cause_of
from kvwal.log.record import COMMIT, is_system
from kvwal.times import time_of, us_of

__all__ = ["Commit", "commits"]


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit, without what it wrote.

    Attributes:
        seqno: its number.
        time_us: when it was made, microseconds since 1970 UTC; never less than that of the commit before.
        meta: what the user said about it; empty if nothing. Do not change it.
        changes: how many keys and ranges of the tables it wrote: what `Store.changes` tells of it.
        bytes: what it takes in the log.
        cause: why the store itself made it, as "migrate"; None if a user did.
    """

    seqno: Seqno
    time_us: int
    meta: Mapping[str, str] = field(hash=False)
    changes: int
    bytes: int
    cause: str | None = None

    @property
    def time(self) -> datetime:
        """When it was made."""
        return time_of(self.time_us)


def commits(
    engine: Engine,
    after: Seqno | None,
    *,
    since: datetime | None = None,
    until: Seqno | datetime | None = None,
    meta: Mapping[str, str] | None = None,
    wanted: Filter,
    owner: object = None,
) -> Iterator[Commit]:
    """See `Store.commits`, which has checked `after`, and `until` if it is a seqno. `wanted` knows the tables."""
    pairs = meta_of(extension_of(meta))
    since_us = 0 if since is None else us_of("since", since)
    until_us = None
    last = durable_now(engine)
    if isinstance(until, datetime):
        until_us = us_of("until", until)
    elif until is not None:
        last = min(last, until)
    cursor = engine.upkeep.read(since if after is None else after, last, "commits")
    return _listed(engine, cursor, since_us, until_us, pairs, wanted, owner)


def _listed(
    engine: Engine,
    cursor: SegmentCursor,
    since_us: int,
    until_us: int | None,
    pairs: Mapping[str, str],
    wanted: Filter,
    owner: object,
) -> Iterator[Commit]:
    """`owner`: the store, which is not collected while it is read."""
    with cursor, UnlessGone(engine.state):
        for record in cursor:
            engine.state.refuse_if_gone()
            if until_us is not None and record.time_us > until_us:
                return
            if record.time_us >= since_us:
                commit = _commit(record, pairs, wanted)
                if commit is not None:
                    yield commit
    del owner


def _commit(record: Record, pairs: Mapping[str, str], wanted: Filter) -> Commit | None:
    """The commit; None if it changed none of the tables, or lacks a pair that is wanted. Raises as `Record.batch`."""
    if is_system(record):
        return None
    meta = record.meta()
    if pairs and not pairs.items() <= meta.items():
        return None
    changes = int(wanted.has_table(0))
    if record.kind != COMMIT or decode_put_key(record.body) is None:
        columns = record.columns()
        changes *= len(columns.ops)
        if columns.tables is not None:
            changes = sum(map(wanted.has_table, columns.tables))
    if not changes:
        return None
    return Commit(record.seqno, record.time_us, meta, changes, record.size, cause_of(record.extension()))
