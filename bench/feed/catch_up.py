"""Reading every change from the first on, from the files; each of a key of 16 bytes and a value of 100 bytes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import kvwal
from bench.data import key, values
from bench.feed import nats
from bench.history.filling import index_keys
from bench.parts import Line, Setting, fresh, in_turns, ratios, spread
from bench.peers.base import require
from bench.results import Figure

__all__ = ["catch_up"]

_VALUE_BYTES: Final = 100
# The fastest of 10, 100, 1,000 and 5,000 notifications, and of 100, 500, 1,000 and 5,000 messages.
_PAGE: Final = 100
_BATCH: Final = 5000


def catch_up(setting: Setting) -> list[Line]:
    """kvwal's feed against a JetStream consumer and the recorder of `eventsourcing`, in turns."""
    count = setting.sizes.changes
    sides: dict[str, tuple[Callable[..., None], Callable[..., float]]] = {"kvwal": (_fill_kvwal, _read_kvwal)}
    lines = []
    why_not = nats.missing()
    if why_not is None:
        sides["NATS JetStream"] = _fill_nats, _read_nats
    else:
        lines.append(Line(why_not, "-"))
    try:
        require("eventsourcing")
        sides["eventsourcing"] = _fill_recorder, _read_recorder
    except ImportError:
        lines.append(Line("eventsourcing is left out: pip install eventsourcing", "-"))
    for name, (fill, _) in sides.items():
        setting.say(f"filling {name} with {count:,} changes")
        fresh(fill, setting.directory / name, count)
    measures = {name: partial(fresh, read, setting.directory / name, count) for name, (_, read) in sides.items()}
    found = in_turns(measures, setting)
    for name, seconds in found.items():
        costs = Figure(tuple(each / count * 1e6 for each in seconds))
        lines.append(Line(f"{name}, a change", spread(costs, " us")))
    for name in list(found)[1:]:
        ratio = ratios(found[name], found["kvwal"])
        lines.append(Line(f"{name} / kvwal", spread(ratio), "at least 3x", ratio.median >= 3))
    return lines


def _fill_kvwal(path: Path, count: int) -> None:
    pool = values(_VALUE_BYTES)
    with kvwal.open(path, durability="os", keep_history_bytes=1 << 40) as db:
        for number in range(count):
            db.put(key(number), pool[number % len(pool)])
        # As after a pause: the background thread has made the key indexes, and rests.
        index_keys(db)


def _read_kvwal(path: Path, count: int) -> float:
    read = 0
    with kvwal.open(path, keep_history_bytes=1 << 40) as db:
        began_s = perf_counter()
        with db.changes(0) as changes:
            for change in changes:
                read += len(change.value or b"")
        spent_s = perf_counter() - began_s
    assert read == count * _VALUE_BYTES
    return spent_s


def _fill_nats(path: Path, count: int) -> None:
    async def fill(address: str) -> None:
        pool = values(_VALUE_BYTES)
        async with nats.connected(address) as (_, stream):
            for first in range(0, count, 1000):
                numbers = range(first, min(first + 1000, count))
                sent = [await stream.publish_async(nats.STREAM, key(n) + pool[n % len(pool)]) for n in numbers]
                await asyncio.gather(*sent)

    with nats.server(path, durable=False) as address:
        asyncio.run(fill(address))


def _read_nats(path: Path, count: int) -> float:
    async def read_all(address: str) -> float:
        api = require("nats.js.api")
        wanted = api.ConsumerConfig(ack_policy=api.AckPolicy.NONE, deliver_policy=api.DeliverPolicy.ALL)
        read = 0
        async with nats.connected(address) as (_, stream):
            consumer = await stream.pull_subscribe(nats.STREAM, config=wanted)
            began_s = perf_counter()
            left = count
            while left:
                messages = await consumer.fetch(min(_BATCH, left), timeout=60)
                for message in messages:
                    read += len(message.data)
                left -= len(messages)
            spent_s = perf_counter() - began_s
        assert read == count * (16 + _VALUE_BYTES)
        return spent_s

    with nats.server(path, durable=False) as address:
        return asyncio.run(read_all(address))


def _recorder(path: Path) -> tuple[Any, Any]:
    sqlite = require("eventsourcing.sqlite")
    store = sqlite.SQLiteDatastore(str(path / "events.db"), originator_id_type="text")
    return store, sqlite.SQLiteApplicationRecorder(store)


def _fill_recorder(path: Path, count: int) -> None:
    os.makedirs(path)
    stored = require("eventsourcing.persistence").StoredEvent
    pool = values(_VALUE_BYTES)
    store, recorder = _recorder(path)
    recorder.create_table()
    for first in range(0, count, 1000):
        numbers = range(first, min(first + 1000, count))
        recorder.insert_events([stored(key(n).decode(), 1, "put", pool[n % len(pool)]) for n in numbers])
    store.close()


def _read_recorder(path: Path, count: int) -> float:
    read, last = 0, None
    store, recorder = _recorder(path)
    began_s = perf_counter()
    while notifications := recorder.select_notifications(last, _PAGE, inclusive_of_start=False):
        for notification in notifications:
            read += len(notification.state)
        last = notifications[-1].id
    spent_s = perf_counter() - began_s
    store.close()
    assert read == count * _VALUE_BYTES
    return spent_s
