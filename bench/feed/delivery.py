"""How long it takes from a durable commit to a subscriber's thread, while commits come at a steady rate.

From the call: from just before the put. From the acknowledgement: from when the put returned, so that it is negative
where the subscriber was told before the writer's thread went on. The commits of several subscribers count for each.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from array import array
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, Final, NamedTuple

import kvwal
from bench.data import key, values
from bench.feed import nats
from bench.parts import Line, Setting, fresh, in_turns, ratios, spread
from bench.show import number

__all__ = ["delivery"]

_VALUE_BYTES: Final = 100
_FILLING: Final = 40
# Not counted: the first flushes of a new file take longer.
_WARMING: Final = 200
# Says how quiet the machine is.
_BARE: Final = "no store, a write and a flush"
_MOST_MS: Final = {"1 subscriber": 1, "10 subscribers": 5}
_PARTS: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}


class _Times(NamedTuple):
    """Percentiles in milliseconds: of the commits themselves, and of deliveries."""

    commit: Sequence[float]
    from_ack: Sequence[float]
    from_call: Sequence[float]


def delivery(setting: Setting) -> list[Line]:
    """kvwal with none, one and ten subscribers; NATS with one and ten."""
    directory, sizes = setting.directory, setting.sizes
    measures = {
        name: partial(fresh, _of_kvwal, directory / "kvwal", count, sizes)
        for name, count in (("no subscriber", 0), ("1 subscriber", 1), ("10 subscribers", 10))
    }
    measures[_BARE] = partial(fresh, _of_file, directory / "bare", sizes)
    lines = [Line("eventsourcing is left out: its SQLite recorder has no subscriptions", "-")]
    why_not = nats.missing()
    if why_not is None:
        for name, count in (("NATS, 1 subscriber", 1), ("NATS, 10 subscribers", 10)):
            measures[name] = partial(fresh, _of_nats, directory / "NATS", count, sizes)
    else:
        lines.append(Line(why_not, "-"))
    found = in_turns(measures, setting)
    none = [times.commit[1] for times in found["no subscriber"]]
    for name, rounds in found.items():
        lines.append(Line(f"{name}: the commit", _shown([times.commit for times in rounds])))
        if name in ("no subscriber", _BARE):
            continue
        late_ms = median(times.from_ack[1] for times in rounds)
        most_ms = _MOST_MS.get(name)
        aim, met = ("", None) if most_ms is None else (f"p99 at most {most_ms} ms", late_ms <= most_ms)
        lines.append(Line(f"{name}: from the acknowledgement", _shown([each.from_ack for each in rounds]), aim, met))
        lines.append(Line(f"{name}: from the call", _shown([each.from_call for each in rounds])))
        if most_ms is not None:
            ratio = ratios([times.commit[1] for times in rounds], none)
            met = ratio.median <= 1.1
            lines.append(Line(f"{name}: the commit's p99 / that with none", spread(ratio), "at most 1.1x", met))
    return lines


def _shown(rounds: Sequence[Sequence[float]]) -> str:
    """The median of the rounds of each percentile."""
    middles = [median(each) for each in zip(*rounds, strict=True)]
    return ", ".join(f"{name} {_number(value)}" for name, value in zip(_PARTS, middles, strict=True)) + " ms"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 0 else number(value)


def _of_kvwal(path: Path, subscribers: int, sizes: Any) -> _Times:
    told = [array("d", bytes(8 * sizes.deliveries)) for _ in range(subscribers)]
    with kvwal.open(path, "n") as db:
        # The first files of a log are small, and grow up to 16 MiB.
        for _ in range(_FILLING):
            db.put(b"filling", bytes(1 << 20), durability="os")
        db.sync()
        before = db.last_seqno

        def subscribe(times: array[float]) -> None:
            with db.changes(before, follow=True, timeout_s=60) as changes:
                for change in changes:
                    number = change.seqno - before
                    times[number - 1] = perf_counter()
                    if number == len(times):
                        return

        threads = [threading.Thread(target=subscribe, args=(times,)) for times in told]
        for thread in threads:
            thread.start()
        calls, acks = array("d"), array("d")
        pool = values(_VALUE_BYTES)
        began_s = perf_counter()
        for n in range(sizes.deliveries):
            _sleep_until(began_s + n / sizes.rate)
            calls.append(perf_counter())
            db.put(key(n), pool[n % len(pool)])
            acks.append(perf_counter())
        for thread in threads:
            thread.join()
    return _times(calls, acks, told)


def _of_file(path: Path, sizes: Any) -> _Times:
    calls, acks = array("d"), array("d")
    record = bytes(200)
    with path.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(record) * sizes.deliveries)
        os.fsync(file.fileno())
        began_s = perf_counter()
        for n in range(sizes.deliveries):
            _sleep_until(began_s + n / sizes.rate)
            calls.append(perf_counter())
            os.pwrite(file.fileno(), record, n * len(record))
            os.fdatasync(file.fileno())
            acks.append(perf_counter())
    return _times(calls, acks, [])


def _of_nats(path: Path, subscribers: int, sizes: Any) -> _Times:
    """Publisher and subscribers in two threads, each with a loop and a connection of its own."""
    told = [array("d") for _ in range(subscribers)]
    calls, acks = array("d"), array("d")
    listening = threading.Event()

    async def subscribe(address: str) -> None:
        done = asyncio.Event()

        def take(times: array[float]) -> Callable[[Any], Awaitable[None]]:
            async def taken(_: Any) -> None:
                times.append(perf_counter())
                if all(len(each) == sizes.deliveries for each in told):
                    done.set()

            return taken

        async with nats.connected(address) as (connection, stream):
            for times in told:
                await stream.subscribe(nats.STREAM, cb=take(times), ordered_consumer=True)
            await connection.flush()
            listening.set()
            await done.wait()

    async def publish(address: str) -> None:
        pool = values(_VALUE_BYTES)
        async with nats.connected(address) as (_, stream):
            began_s = perf_counter()
            for n in range(sizes.deliveries):
                _sleep_until(began_s + n / sizes.rate)
                calls.append(perf_counter())
                await stream.publish(nats.STREAM, key(n) + pool[n % len(pool)])
                acks.append(perf_counter())

    shutil.rmtree(path, ignore_errors=True)
    with nats.server(path, durable=True) as address:
        thread = threading.Thread(target=lambda: asyncio.run(subscribe(address)))
        thread.start()
        listening.wait(60)
        asyncio.run(publish(address))
        thread.join()
    return _times(calls, acks, told)


def _sleep_until(at_s: float) -> None:
    left_s = at_s - perf_counter()
    if left_s > 0:
        sleep(left_s)


def _times(calls: Sequence[float], acks: Sequence[float], told: Sequence[Sequence[float]]) -> _Times:
    counted = range(min(_WARMING, len(calls) // 10), len(calls))
    return _Times(
        _percentiles([acks[n] - calls[n] for n in counted]),
        _percentiles([times[n] - acks[n] for times in told for n in counted]),
        _percentiles([times[n] - calls[n] for times in told for n in counted]),
    )


def _percentiles(seconds: list[float]) -> Sequence[float]:
    ordered = sorted(seconds)
    return [ordered[int(part * (len(ordered) - 1))] * 1e3 for part in _PARTS.values()] if ordered else []
