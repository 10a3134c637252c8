"""Threads write; subscribers follow; one of them rests for a while, so that it has to catch up from the log."""

from __future__ import annotations

import threading
from time import perf_counter, sleep

import kvwal
from bench.data import key
from bench.memory import memory_mib
from bench.parts import Line, Setting, Wrong

__all__ = ["many"]


def many(setting: Setting) -> list[Line]:
    """Whether each subscriber is told of each commit once, in order. Wrong if one is not."""
    sizes = setting.sizes
    commits = sizes.commits
    told = [0] * sizes.subscribers
    wrong: list[str] = []
    # A subscriber that is behind holds the log, whatever the window is.
    with kvwal.open(setting.directory / "store", durability="interval", sync_delay_s=0.01) as db:

        def subscribe(number: int) -> None:
            with db.changes(0, follow=True, timeout_s=60) as changes:
                for expected, change in enumerate(changes, 1):
                    if change.seqno != expected:
                        wrong.append(f"subscriber {number} was told of {change.seqno} and not of {expected}")
                        return
                    told[number] = expected
                    if not number and expected == commits // 4:
                        while db.last_seqno < min(expected + sizes.rest, commits):
                            sleep(0.01)
                    if expected == commits:
                        return
            wrong.append(f"subscriber {number} waited in vain behind {told[number]}")

        def write(number: int) -> None:
            for each in range(number, commits, sizes.writers):
                db.put(key(each % 100_000), bytes(100))
                if not each % 64:
                    # As fast as the slowest of those that do not rest, or they would measure a disk.
                    while db.last_seqno - min(told[1:] or [each]) > 50_000 and not wrong:
                        sleep(0.001)

        began_s = perf_counter()
        threads = [threading.Thread(target=subscribe, args=(number,)) for number in range(sizes.subscribers)]
        threads += [threading.Thread(target=write, args=(number,)) for number in range(sizes.writers)]
        for thread in threads:
            thread.start()
        largest = first = 0
        while any(thread.is_alive() for thread in threads):
            sleep(0.2)
            setting.say(f"commit {db.last_seqno:,} of {commits:,}; the slowest subscriber is at {min(told):,}")
            used = memory_mib()
            largest = max(largest, used)
            if not first and db.last_seqno > commits // 10:
                first = used
        seconds = perf_counter() - began_s
    if wrong:
        raise Wrong("; ".join(wrong))
    what = f"{commits:,} commits, {sizes.writers} writers, {sizes.subscribers} subscribers"
    return [
        Line(what, f"{seconds:,.1f} s"),
        Line("memory after a tenth of the commits", f"{first} MiB"),
        Line("memory at most", f"{largest} MiB", "flat"),
    ]
