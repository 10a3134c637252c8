"""Who holds what of a store's past, how much that is, and since when."""

from __future__ import annotations

from kvwal.engine.engine import Engine
from kvwal.engine.stats import Pin
from kvwal.feed.lag import consumers

__all__ = ["pins"]


def pins(engine: Engine) -> list[Pin]:
    """See `Store.pins`."""
    held = engine.upkeep.past.pins()
    since_us = {row.name: row.created_us for row in engine.upkeep.consumers.rows()}
    for info in consumers(engine):
        if info.name in since_us:
            held.append(Pin("consumer", info.position.seqno, since_us[info.name], info.held_bytes, name=info.name))
    return held
