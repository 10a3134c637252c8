"""What a running process says of itself to others that ask: figures, pins, consumers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvwal.engine.engine import Engine
from kvwal.errors import Error
from kvwal.feed.lag import consumers
from kvwal.feed.line import position_at
from kvwal.feed.pins import pins
from kvwal.files import process_id, program_name

__all__ = ["describe"]

_VERSION = 1


def describe(engine: Engine) -> dict[str, Any]:
    """The status of an open store, as plain values. Raises as its parts do, once the store is closed."""
    stats = engine.upkeep.stats()
    return {
        "version": _VERSION,
        "pid": process_id(),
        "program": program_name(),
        "wall_us": engine.reads.moments.wall_us(),
        "refuses": _refusal(engine),
        "entries": engine.reads.count(),
        # Of the moment that the figures are of: commits are made meanwhile.
        "position": str(position_at(engine, stats.last_seqno)),
        "stats": stats.as_dict(),
        "pins": [asdict(pin) for pin in pins(engine)],
        "consumers": [
            {
                "name": info.name,
                "state": info.state,
                "position": str(info.position),
                "scanned": info.scanned,
                "lag_commits": info.lag_commits,
                "lag_bytes": info.lag_bytes,
                "lag_s": info.lag_s,
                "held_bytes": info.held_bytes,
                "owner": info.owner,
                "last_poll_s": info.last_poll_s,
                "parked": len(info.parked),
                "last_error": info.last_error,
            }
            for info in consumers(engine)
        ],
        "recovery": asdict(engine.upkeep.recovery),
    }


def _refusal(engine: Engine) -> str:
    """Why commits are refused; empty if they are not."""
    try:
        engine.queue.refuse_if_ended()
    except Error as error:
        return str(error)
    return ""
