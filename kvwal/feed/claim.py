"""How a consumer gets an owner and a row, and how it is removed.

Rules:
- One owner at a time in a process: the one that `Consumers.owners` names. Taking over raises the epoch of the row.
- A new row, and the hold that goes with it, are there before anything is handed out.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import datetime

from kvwal.batch import WriteBatch
from kvwal.engine.consumers import ConsumerRow, Consumers, Owner, RowChange
from kvwal.engine.engine import Engine
from kvwal.engine.parked import SYSTEM_TABLE, parked_prefix
from kvwal.engine.request import CommitRequest
from kvwal.engine.state import UnlessGone
from kvwal.errors import ConsumerExistsError, FeedGap, LockedError
from kvwal.feed.asked import Asked, as_consumer_name
from kvwal.feed.line import seqno_of
from kvwal.files import process_id
from kvwal.keys import prefix_stop
from kvwal.log import Hold, Limits
from kvwal.times import us_of

__all__ = ["begin", "claim", "release", "remove_consumer"]


def claim(engine: Engine, asked: Asked, token: Owner) -> Owner | None:
    """Become the owner. Returns the one until now. LockedError if it is not to be taken over."""
    owners = engine.upkeep.consumers.owners
    owner = owners.setdefault(asked.name, token)
    if owner is token:
        return None
    if not asked.steal:
        raise _in_use(engine, asked.name, owner)
    owners[asked.name] = token
    return owner


def release(consumers: Consumers, name: str, token: Owner, to: Owner | None = None) -> None:
    """Be the owner no more; `to`: give it back."""
    owners = consumers.owners
    if owners.get(name) is token:
        if to is not None:
            owners[name] = to
        else:
            owners.pop(name, None)


def begin(engine: Engine, asked: Asked, *, taken: bool) -> ConsumerRow:
    """The row as it is from here on, and its hold. Raises as `Store.consumer`. `taken`: from another owner."""
    with UnlessGone(engine.state):
        return _found(engine, asked, taken=taken) or _created(engine, asked)


def _found(engine: Engine, asked: Asked, *, taken: bool) -> ConsumerRow | None:
    """That of a consumer that is there; None if there is none."""
    filter_hash = asked.filter.digest()

    def change(old: ConsumerRow | None) -> ConsumerRow | None:
        if old is None:
            return None
        if old.filter_hash != filter_hash and not asked.replace:
            raise ConsumerExistsError(asked.name)
        return replace(old, epoch=old.epoch + taken, limits=asked.limits_over(old.limits), filter_hash=filter_hash)

    consumers = engine.upkeep.consumers
    row = consumers.row(asked.name)
    if row is None or (change(row) == row and not taken):
        return row
    # Asked of the leader, since the owner before may be committing.
    operation = RowChange(asked.name, change)
    engine.commit(CommitRequest(sync=True, operation=operation))
    if operation.row is not None and operation.row.limits != row.limits:
        # If it is lost, it stays so.
        with suppress(FeedGap):
            hold = consumers.begin_hold(asked.name, operation.row.position, operation.row.limits)
            consumers.keep_hold(asked.name, hold)
    return operation.row


def _created(engine: Engine, asked: Asked) -> ConsumerRow:
    """A new one, stored before anything is handed out."""
    consumers = engine.upkeep.consumers
    limits = asked.limits_over(consumers.default_limits())
    hold = _hold_from(engine, asked, limits)
    now_us = engine.reads.moments.clock.now_us()
    row = ConsumerRow(asked.name, consumers.line, hold.after, 1, now_us, limits, asked.filter.digest())
    request = CommitRequest(sync=True, operation=RowChange(asked.name, lambda old: row))
    try:
        # Durability: flushed, and with it the commit that the position names.
        engine.commit(request)
    finally:
        if request.seqno:
            consumers.keep_hold(asked.name, hold)
    return row


def _in_use(engine: Engine, name: str, owner: Owner) -> LockedError:
    return LockedError(engine.upkeep.directory.path, process_id(), True, consumer=name, thread=owner.thread)


def _hold_from(engine: Engine, asked: Asked, limits: Limits) -> Hold:
    """A hold on what a new one begins with. FeedGap if that is not kept."""
    name, start, begin_hold = asked.name, asked.start, engine.upkeep.consumers.begin_hold
    if isinstance(start, datetime):
        since_us = us_of("start", start)
        # What was committed before that time is not to be told because it is flushed later.
        engine.upkeep.sync()
        # It holds what it reads.
        with engine.upkeep.read(start, None, name) as records:
            earlier = records.position
            for record in records:
                if record.time_us >= since_us:
                    break
                earlier = record.seqno
            return begin_hold(name, earlier, limits)
    if start == "oldest":
        return begin_hold(name, None, limits)
    if start != "now":
        return begin_hold(name, seqno_of(engine, "start", start), limits)
    while True:
        # FeedGap: two checkpoints came in between.
        with suppress(FeedGap):
            return begin_hold(name, engine.state.seqno, limits)


def remove_consumer(engine: Engine, name: str) -> bool:
    """Forget a consumer and its position. False if there is none; LockedError; TypeError or ValueError."""
    as_consumer_name(name)
    consumers = engine.upkeep.consumers
    consumers.log()
    owner = consumers.owners.get(name)
    if owner is not None:
        raise _in_use(engine, name, owner)
    if consumers.row(name) is None:
        return False
    rows = WriteBatch()
    prefix = parked_prefix(name)
    rows.table(SYSTEM_TABLE).delete_range(prefix, prefix_stop(prefix))
    request = CommitRequest(sync=True, operation=RowChange(name, lambda row: None, rows))
    try:
        engine.commit(request)
    finally:
        if request.seqno:
            consumers.keep_hold(name, None)
            consumers.parked.hold(name, (), Limits(None, None))
    return bool(request.seqno)
