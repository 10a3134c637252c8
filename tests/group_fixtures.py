"""Calls whose commits are members of one group, in a known order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from store_fixtures import wait_until

import kvwal

__all__ = ["Call", "as_one_group", "in_order"]

DEADLINE_S = 30

Call = Callable[[], Any]


def as_one_group(db: kvwal.Store, calls: Sequence[Call]) -> list[Any]:
    """What each call returned or raised, when all are members of one group, in this order."""
    return [result for _, result in sorted(in_order(db, calls), key=lambda each: each[0])]


def in_order(db: kvwal.Store, calls: Sequence[Call]) -> list[tuple[int, Any]]:
    """The same, with the number of each: first those that ended without a commit, as a read does."""
    queue = db.engine.queue
    leads, over = threading.Event(), threading.Event()
    results: dict[int, Any] = {}

    def lead() -> None:
        queue.run(lambda: (leads.set(), over.wait(DEADLINE_S)))

    def call(number: int) -> None:
        try:
            results[number] = calls[number]()
        except (kvwal.Error, LookupError) as error:
            results[number] = error

    threads = [threading.Thread(target=lead)]
    threads[0].start()
    assert leads.wait(DEADLINE_S)
    for number in range(len(calls)):
        threads.append(threading.Thread(target=call, args=(number,)))
        threads[-1].start()
        wait_until(lambda number=number: len(queue._queue) + len(results) == number + 2)
    early = list(results)
    over.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    return [(number, results[number]) for number in [*early, *sorted(results.keys() - set(early))]]
