"""How far consumers are behind, and what they hold."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Literal

from kvwal.engine.consumers import ConsumerRow
from kvwal.engine.engine import Engine
from kvwal.engine.parked import Parked
from kvwal.engine.state import UnlessGone
from kvwal.errors import FeedGap
from kvwal.keys import Seqno
from kvwal.log.record import is_system
from kvwal.positions import Position

__all__ = ["ConsumerInfo", "consumers"]

# Of these commits each is looked at; of what is beyond them the store's own are counted too.
_EXACT: Final = 1000


@dataclass(frozen=True, slots=True)
class ConsumerInfo:
    """A consumer, as `Store.consumers` lists it.

    Attributes:
        name: of the consumer.
        state: "active" while it is in use, "stopped" while it is not, "lost" when commits beyond its position are gone
            or may go.
        position: the last commit that was handled, as it is stored.
        scanned: the last commit that was looked at; of one that is not in use its position.
        lag_commits: durable commits of users beyond `scanned`, whether they match or not; beyond 1,000 the store's own
            are counted too.
        lag_bytes: what these take in the log. lag_s: age of the first of them in seconds. None if it is lost.
        held_bytes: bytes of log that recovery does not need, and that are kept for it; perhaps for others too.
        owner: name of the thread that asked for it; None if it is not in use.
        last_error: why it stopped; empty after a success.
        parked: the commits that it has set aside, oldest first.
        last_poll_s: how many seconds ago the owner asked for commits; None if it is not in use.
    """

    name: str
    state: Literal["active", "stopped", "lost"]
    position: Position
    scanned: Seqno
    lag_commits: int
    lag_bytes: int | None
    lag_s: float | None
    held_bytes: int
    owner: str | None
    last_error: str
    parked: tuple[Parked, ...] = ()
    last_poll_s: float | None = field(default=None, compare=False)


def consumers(engine: Engine) -> list[ConsumerInfo]:
    """The consumers of a store, by name."""
    with UnlessGone(engine.state):
        return [_info(engine, row) for row in engine.upkeep.consumers.rows()]


def _info(engine: Engine, row: ConsumerRow) -> ConsumerInfo:
    registry, upkeep = engine.upkeep.consumers, engine.upkeep
    owner = registry.owners.get(row.name)
    scanned = row.position if owner is None else max(row.position, owner.scanned)
    newest = min(upkeep.durable_seqno, engine.state.seqno)
    parked = tuple(registry.parked.of(row.name))
    lag: tuple[int, int | None, float | None] = (max(0, newest - scanned), None, None)
    held_from = Seqno(parked[0].seqno - 1) if parked else row.position
    is_lost = not upkeep.is_read_only and registry.hold(row.name) is None
    if not is_lost:
        try:
            lag = _lag(engine, scanned, newest)
        except FeedGap:
            is_lost = True
    return ConsumerInfo(
        row.name,
        "lost" if is_lost else "stopped" if owner is None else "active",
        Position(row.line, row.position),
        scanned,
        *lag,
        0 if is_lost and not parked else registry.held_bytes(held_from),
        None if owner is None else owner.thread,
        row.last_error,
        parked,
        None if owner is None else time.monotonic() - owner.polled_s,
    )


def _lag(engine: Engine, at: Seqno, newest: Seqno) -> tuple[int, int, float]:
    """Commits of users in (at, newest], their bytes, and the age of the first one in seconds."""
    upkeep = engine.upkeep
    commits = size = 0
    since_us: int | None = None
    record = None
    with upkeep.read(at, max(at, newest), "consumers") as records:
        for record in islice(records, _EXACT):
            if not is_system(record):
                commits += 1
                size += record.size
                since_us = record.time_us if since_us is None else since_us
    if record is not None and record.seqno < newest:
        commits += newest - record.seqno
        with upkeep.read(Seqno(newest - 1), newest, "consumers") as records:
            last = next(records)
        begin, end = record.position, last.position
        size += end.offset + last.size - (begin.offset + record.size)
        segments = upkeep.consumers.segments()
        size += sum(info.size for info in segments if begin.segment <= info.first_seqno < end.segment)
        since_us = record.time_us if since_us is None else since_us
    age_s = 0.0 if since_us is None else max(0.0, (engine.reads.moments.clock.now_us() - since_us) / 1e6)
    return commits, size, age_s
