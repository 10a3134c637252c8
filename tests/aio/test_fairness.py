"""Fairness of `run` among tasks: who holds a ticket, and who lets the holder pass."""

from __future__ import annotations

import asyncio

from kvwal.aio.fairness import Tickets
from kvwal.api.fairness import FREE_ATTEMPTS


def test_holders_go_one_at_a_time_and_others_wait_only_for_one_that_lost_again() -> None:
    begun: list[str] = []

    async def attempt(name: str, tickets: Tickets, number: int, done: asyncio.Event) -> None:
        with tickets.call() as call:
            await call.begin(number)
            begun.append(name)
            await done.wait()

    async def main() -> None:
        tickets, done = Tickets(), asyncio.Event()
        tasks = []

        async def start(name: str, number: int) -> None:
            tasks.append(asyncio.create_task(attempt(name, tickets, number, done)))
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        with tickets.call() as first:
            await first.begin(FREE_ATTEMPTS + 1)
            await start("free", 1)
            await start("second holder", FREE_ATTEMPTS + 1)
            assert begun == ["free"]
            await first.begin(FREE_ATTEMPTS + 2)
            await start("polite", 1)
            assert begun == ["free"]
        done.set()
        await asyncio.gather(*tasks)
        assert begun == ["free", "second holder", "polite"]
        assert not tickets.is_urgent
        assert not tickets.lock.locked()

    asyncio.run(main())
