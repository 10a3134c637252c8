"""`python -m bench.recorders`: kvwal's persistence module for the library `eventsourcing`, beside its SQLite module.

Both at their defaults, which is that a commit is on disk when it returns. `pip install eventsourcing`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Final
from uuid import UUID

from bench.data import values
from bench.parts import Line, Part, Setting, Size, fresh, in_turns, ratios, run_parts, spread
from bench.peers.base import require
from bench.results import Figure

__all__ = ["main"]

_STATE_BYTES: Final = 200
_TOPIC: Final = "shop.orders:Order.ItemAdded"
_MODULES: Final = {
    "kvwal": ("kvwal.eventsourcing", "KVWAL_PATH"),
    "SQLite": ("eventsourcing.sqlite", "SQLITE_DBNAME"),
}
# Events of one aggregate.
_VERSIONS: Final = 20
_AN_AGGREGATE: Final = f"an aggregate of {_VERSIONS} events"
_PAGE: Final = 100


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    return run_parts("python -m bench.recorders", __doc__, _PARTS, _SIZES, arguments)


def _threads(setting: Setting) -> list[Line]:
    return _compared(setting, partial(_insert, setting.sizes.threads, setting.sizes.events), "an event", 2)


def _one(setting: Setting) -> list[Line]:
    return _compared(setting, partial(_insert, 1, setting.sizes.events // 4), "an event", None)


def _notifications(setting: Setting) -> list[Line]:
    return _compared(setting, partial(_select_notifications, setting.sizes.log), "a notification", None)


def _aggregates(setting: Setting) -> list[Line]:
    return _compared(setting, partial(_select_events, setting.sizes.log, 1), _AN_AGGREGATE, None)


def _again(setting: Setting) -> list[Line]:
    return _compared(setting, partial(_select_events, setting.sizes.log, 2), _AN_AGGREGATE, None)


_PARTS: Final = {
    "threads": Part("one durable event a commit, by several threads", _threads),
    "one": Part("one durable event a commit, by one thread", _one),
    "log": Part(f"all notifications, {_PAGE} at a time", _notifications),
    "aggregates": Part("the events of one aggregate after the other", _aggregates),
    "again": Part("the same once more, by the same recorder", _again),
}
_SIZES: Final = {
    "threads": Size(8, 8, "threads that insert"),
    "events": Size(20_000, 2_000, "events that they insert"),
    "log": Size(100_000, 10_000, "events that are read"),
}


def _compared(setting: Setting, measure: Callable[[str, Path], float], of_what: str, aim: float | None) -> list[Line]:
    require("eventsourcing")
    turns = iter(range(1 << 20))

    def one(name: str) -> float:
        path = setting.directory / f"{name}-{next(turns)}"
        return fresh(measure, name, path)

    found = in_turns({name: partial(one, name) for name in _MODULES}, setting)
    costs = {name: Figure(tuple(each * 1e6 for each in seconds)) for name, seconds in found.items()}
    lines = [Line(f"{name}, {of_what}", spread(cost, " us")) for name, cost in costs.items()]
    ratio = ratios(found["SQLite"], found["kvwal"])
    wanted = "" if aim is None else f"at least {aim:g}x"
    return [*lines, Line("SQLite / kvwal", spread(ratio), wanted, None if aim is None else ratio.median >= aim)]


def _recorder(name: str, path: Path) -> tuple[Any, Any]:
    module, variable = _MODULES[name]
    factories = require("eventsourcing.persistence").InfrastructureFactory
    factory = factories.construct({"PERSISTENCE_MODULE": module, variable: str(path)})
    return factory, factory.application_recorder()


def _events(first: int, count: int, aggregates: int) -> list[Any]:
    """Events from a number on, as they come: of each aggregate one, and so on."""
    stored = require("eventsourcing.persistence").StoredEvent
    pool = values(_STATE_BYTES)
    return [
        stored(_aggregate(n % aggregates), n // aggregates + 1, _TOPIC, pool[n % len(pool)])
        for n in range(first, first + count)
    ]


def _aggregate(number: int) -> UUID:
    # Far from the one before, as UUIDs are.
    return UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128))


def _insert(threads: int, count: int, name: str, path: Path) -> float:
    """Seconds for one event, by the clock."""
    factory, recorder = _recorder(name, path)
    share = count // threads
    ready = threading.Barrier(threads + 1)

    def insert(events: list[Any]) -> None:
        ready.wait()
        for event in events:
            recorder.insert_events([event])

    workers = [threading.Thread(target=insert, args=(_events(n * share, share, count),)) for n in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    began_s = perf_counter()
    for worker in workers:
        worker.join()
    spent_s = perf_counter() - began_s
    assert recorder.max_notification_id() == threads * share
    factory.close()
    return spent_s / (threads * share)


def _filled(count: int, name: str, path: Path) -> tuple[Any, Any]:
    factory, recorder = _recorder(name, path)
    for first in range(0, count, 1000):
        recorder.insert_events(_events(first, min(1000, count - first), count // _VERSIONS))
    factory.close()
    return _recorder(name, path)


def _select_notifications(count: int, name: str, path: Path) -> float:
    """Seconds for one of them."""
    factory, recorder = _filled(count, name, path)
    read = 0
    began_s = perf_counter()
    while found := recorder.select_notifications(read, _PAGE, inclusive_of_start=False):
        read = found[-1].id
    spent_s = perf_counter() - began_s
    assert read == count
    factory.close()
    return spent_s / count


def _select_events(count: int, times: int, name: str, path: Path) -> float:
    """Seconds for one aggregate, when all are read for the last time."""
    factory, recorder = _filled(count, name, path)
    aggregates = [_aggregate(number) for number in range(count // _VERSIONS)]
    spent_s = 0.0
    for _ in range(times):
        began_s = perf_counter()
        for each in aggregates:
            assert len(recorder.select_events(each)) == _VERSIONS
        spent_s = perf_counter() - began_s
    factory.close()
    return spent_s / len(aggregates)


if __name__ == "__main__":
    sys.exit(main())
