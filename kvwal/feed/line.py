"""Positions on the line of a store, and seqnos of positions that users hand in."""

from __future__ import annotations

from datetime import datetime
from typing import TypeVar

from kvwal.engine.engine import Engine
from kvwal.engine.lines import fork_of
from kvwal.errors import FeedGap, SnapshotTooOld
from kvwal.keys import Seqno, as_int
from kvwal.positions import Position
from kvwal.times import us_of

__all__ = ["durable_now", "moment_of", "position_at", "seqno_of"]

_E = TypeVar("_E", FeedGap, SnapshotTooOld)


def durable_now(engine: Engine) -> Seqno:
    """The last commit that is durable, and seen by reads."""
    return min(engine.upkeep.durable_seqno, engine.state.seqno)


def position_at(engine: Engine, seqno: Seqno) -> Position:
    """The position of a commit of this store, which is durable."""
    return Position(engine.upkeep.consumers.line, seqno)


def seqno_of(engine: Engine, name: str, value: int, error: type[_E] = FeedGap) -> Seqno:  # type: ignore[assignment]
    """The commit that the argument `name` is: a seqno of this store, or a position, which must be on its line.

    So is one on a line that this came from, up to where it left that. TypeError or ValueError for what is neither; the
    error for a position on another line.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is a seqno or a position, not str; Position.parse reads one that was printed")
    seqno = Seqno(as_int(name, value, 0))
    if isinstance(value, Position) and value.line != (own := engine.upkeep.consumers.line):
        engine.state.refuse_if_gone()
        forked_at = fork_of(engine.reads, own, value.line)
        if forked_at is None or seqno > forked_at:
            newest = durable_now(engine)
            # Of a store that is gone this says so.
            with engine.upkeep.read(None, newest, "changes") as kept:
                raise error(value, Seqno(kept.position + 1), newest, forked_at=forked_at or 0)
    return seqno


def moment_of(engine: Engine, name: str, at: int | datetime) -> Seqno | datetime:
    """The moment that the argument `name` is: a time, or as `seqno_of`. SnapshotTooOld for one on another line."""
    if isinstance(at, datetime):
        us_of(name, at)
        return at
    if not hasattr(at, "__index__") or isinstance(at, bool):
        raise TypeError(f"{name} is a seqno, a position or a datetime, not {type(at).__name__}")
    return seqno_of(engine, name, at, SnapshotTooOld)
