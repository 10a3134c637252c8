"""Fairness of `run` among tasks: who holds a ticket, and who lets the holder pass."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aio_fixtures import run

import kvwal.aio
from kvwal.aio.fairness import Tickets
from kvwal.api.fairness import FREE_ATTEMPTS
from kvwal.testing import SimulatedDisk


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

        first = tickets.call()
        await first.begin(FREE_ATTEMPTS + 1)
        await start("free", 1)
        await start("second holder", FREE_ATTEMPTS + 1)
        assert begun == ["free"]
        await first.begin(FREE_ATTEMPTS + 2)
        await start("polite", 1)
        assert begun == ["free"]
        first.__exit__(None, None, None)
        done.set()
        await asyncio.gather(*tasks)
        assert begun == ["free", "second holder", "polite"]
        assert not tickets.is_urgent
        assert tickets.first() is None

    asyncio.run(main())


def test_a_call_within_a_holder_goes_by_its_ticket_also_in_a_task_that_it_made() -> None:
    async def inner(tickets: Tickets, attempt: int) -> bool:
        with tickets.call() as call:
            await call.begin(attempt)
            return call.has_ticket

    async def main() -> None:
        tickets = Tickets()
        with tickets.call() as outer:
            await outer.begin(FREE_ATTEMPTS + 1)
            await outer.begin(FREE_ATTEMPTS + 2)
            began = time.monotonic()
            assert not await inner(tickets, 1)
            assert not await inner(tickets, FREE_ATTEMPTS + 1)
            assert not await asyncio.create_task(inner(tickets, FREE_ATTEMPTS + 1))
            assert time.monotonic() - began < 0.9
            # A task that outlives the call is one as any other.
            over = asyncio.Event()

            async def later() -> bool:
                await over.wait()
                return await inner(tickets, FREE_ATTEMPTS + 1)

            task = asyncio.create_task(later())
        over.set()
        assert await task
        assert tickets.first() is None

    asyncio.run(main())


@pytest.mark.parametrize("attempt", [1, FREE_ATTEMPTS + 1])
def test_no_call_waits_for_a_stuck_holder_without_limit(monkeypatch: pytest.MonkeyPatch, attempt: int) -> None:
    monkeypatch.setattr("kvwal.aio.fairness.PATIENCE_S", 0.01)

    async def other(tickets: Tickets) -> None:
        with tickets.call() as call:
            await call.begin(attempt)

    async def main() -> None:
        tickets = Tickets()
        task = None
        asked = asyncio.Event()

        async def asked_for() -> None:
            await asked.wait()
            await other(tickets)

        task = asyncio.create_task(asked_for())  # made outside of the call, which waits for it
        with tickets.call() as holder:
            await holder.begin(FREE_ATTEMPTS + 1)
            await holder.begin(FREE_ATTEMPTS + 2)
            asked.set()
            async with asyncio.timeout(10):
                await task
        assert tickets.first() is None

    asyncio.run(main())


def test_a_cancelled_wait_for_a_ticket_leaves_the_line() -> None:
    async def main() -> None:
        tickets = Tickets()

        async def wait(attempt: int) -> None:
            with tickets.call() as call:
                await call.begin(attempt)

        tasks = [asyncio.create_task(wait(attempt)) for attempt in (1, FREE_ATTEMPTS + 1)]
        with tickets.call() as holder:
            await holder.begin(FREE_ATTEMPTS + 1)
            await holder.begin(FREE_ATTEMPTS + 2)
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(each) for each in results] == [asyncio.CancelledError] * 2
            assert tickets.first() is holder
        assert tickets.first() is None

    asyncio.run(main())


@pytest.mark.parametrize("in_a_task", [False, True])
def test_run_within_run_ends_after_many_lost_attempts(in_a_task: bool) -> None:
    """The outer call loses by what others write; the inner one conflicts with nothing."""

    async def main() -> tuple[int, float]:
        attempts = 0
        async with kvwal.aio.open("/kv", files=SimulatedDisk(), durability="os") as db:

            async def audit(txn: Any) -> None:
                txn.put(b"audit", b"seen")

            async def outer(txn: Any) -> None:
                nonlocal attempts
                attempts += 1
                await txn.get(b"n")
                await (asyncio.create_task(db.run(audit)) if in_a_task else db.run(audit))
                if attempts < 9:
                    await db.put(b"n", b"%d" % attempts)
                txn.put(b"copy", b"")

            began = time.monotonic()
            async with asyncio.timeout(20):
                await db.run(outer)
                await db.run(audit)
            return attempts, time.monotonic() - began

    attempts, took_s = run(main())
    assert attempts == 9
    assert took_s < 3
