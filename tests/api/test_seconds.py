"""Every argument that is a number of seconds is checked in the same way, and any number from 0 on is taken."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import kvwal
import kvwal.aio
from kvwal.testing import SimulatedDisk

# No thread is asked to wait for these: nothing that is asked for here waits with them.
LONG = (math.inf, 1e300, 10**400, Fraction(10**400))
WRONG: list[tuple[Any, type[Exception]]] = [
    (-1, ValueError),
    (math.nan, ValueError),
    (-math.inf, ValueError),
    (-(10**400), ValueError),
    (True, TypeError),
    ("x", TypeError),
    (1j, TypeError),
    (b"1", TypeError),
]
# Times that are no argument of a user, and `expire_s`, which has rules of its own (tests/expiry).
ELSEWHERE = {"ArchiveStatus", "ConsumerInfo", "RestoreReport", "StaleError"}


class Rig:
    """A store with all that can be asked for with seconds."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "kv"
        self.db: Any = kvwal.open(self.path, background=False)
        self.db[b"a"] = b"1"
        self.follower: Any = kvwal.follow(self.path, pin=False)
        self.place = tmp_path / "b"
        self.archive: Any = kvwal.archive(self.db, self.place)
        self.index: Any = self.db.table("t").index("by", key=len, codec=int)
        self.index.wait(10)
        self.feed: Any = self.db.changes(0, follow=True)
        self.bootstrap: Any = self.db.bootstrap()

    def close(self) -> None:
        self.feed.close()
        self.bootstrap.close()
        self.archive.close()
        self.follower.close()
        self.db.close()

    def option(self, name: str) -> Callable[[Any], object]:
        def opened(seconds: Any) -> None:
            kvwal.open("/kv", files=SimulatedDisk(), background=False, **{name: seconds}).close()

        return opened

    def consumer(self, name: str) -> Callable[[Any], object]:
        return lambda seconds: self.db.consumer("c", **{name: seconds}).close()

    def changes(self, of: Any, name: str) -> Callable[[Any], object]:
        return lambda seconds: of.changes(follow=False, **{name: seconds}).close()

    def project(self, seconds: Any) -> None:
        self.db[b"a"] = b"2"
        with self.db.consumer("p", start="oldest") as consumer:

            def end(txn: Any, changes: Any) -> None:
                consumer.close()

            with pytest.raises(kvwal.ClosedError):
                consumer.project(end, timeout_s=seconds)

    def calls(self) -> dict[str, Callable[[Any], object]]:
        options = ("sync_delay_s", "checkpoint_interval_s", "keep_history_s", "hold_s")
        asked = ("max_lag_s", "ack_interval_s", "timeout_s", "heartbeat_s")
        feeds = {"Store": self.db, "Follower": self.follower, "Bootstrap": self.bootstrap}
        return {
            "Archive.flush timeout_s": self.archive.flush,
            "Archive.close timeout_s": self.archive.close,
            "Changes.wait timeout_s": self.feed.wait,
            "Consumer.project timeout_s": self.project,
            "Follower.wait timeout_s": lambda seconds: self.follower.wait(1, seconds),
            "Index.wait timeout_s": self.index.wait,
            "Keep pitr_s": kvwal.Keep,
            "follow max_lag_s": lambda seconds: kvwal.follow(self.path, pin=False, max_lag_s=seconds).close(),
            **{f"{how} {name}": self.option(name) for name in options for how in ("open", "shared")},
            **{f"Store.consumer {name}": self.consumer(name) for name in asked},
            **{
                f"{kind}.changes {name}": self.changes(of, name)
                for kind, of in feeds.items()
                for name in ("timeout_s", "heartbeat_s")
            },
            "archive rpo_s": lambda seconds: kvwal.archive(self.db, self.place, rpo_s=seconds),
        }


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.close()


def arguments_of(module: Any) -> Iterator[str]:
    """Each argument of what a module offers whose name says that it is seconds."""
    for name in module.__all__:
        offered = getattr(module, name)
        members = inspect.getmembers(offered, callable) if inspect.isclass(offered) else []
        for label, each in chain([(name, offered)], ((f"{name}.{n}", m) for n, m in members if n[0] != "_")):
            if callable(each) and label not in ELSEWHERE:
                found = _parameters(each)
                yield from (f"{label} {each}" for each in found if each.endswith("_s") and each != "expire_s")


def _parameters(call: Callable[..., object]) -> list[str]:
    try:
        return list(inspect.signature(call).parameters)
    except (TypeError, ValueError):
        return []


def test_each_argument_that_is_seconds_is_tried_here(rig: Rig) -> None:
    assert set(arguments_of(kvwal)) == set(rig.calls())
    # What tasks call is asked for with the same ones.
    ours = {name.removeprefix("Async") for name in arguments_of(kvwal.aio)}
    assert ours <= set(rig.calls())


def test_what_is_no_number_of_seconds_is_refused_everywhere(rig: Rig) -> None:
    calls = rig.calls()
    # It is last: what is refused has ended nothing.
    for name in sorted(calls, key=lambda name: name.startswith("Archive.close")):
        for wrong, error in WRONG:
            with pytest.raises(error, match=rf"^{name.split()[1]} is "):
                calls[name](wrong)
    assert rig.archive.flush(20)


def test_any_number_of_seconds_is_taken_however_many(rig: Rig) -> None:
    calls = rig.calls()
    # A day is the most.
    del calls["archive rpo_s"]
    for name in sorted(calls, key=lambda name: name.startswith("Archive.close")):
        for seconds in LONG:
            calls[name](seconds)


def test_tasks_are_refused_the_same_and_given_the_same(tmp_path: Path) -> None:
    async def body() -> None:
        with kvwal.open(tmp_path / "kv") as made:
            made[b"a"] = b"1"
            made.table("t").index("by", key=len, codec=int).wait(10)
        opened = kvwal.aio.open(tmp_path / "kv"), kvwal.aio.follow(tmp_path / "kv")
        async with opened[0] as db, opened[1] as follower, db.bootstrap() as base:
            index = await db.table("t").index("by", key=len, codec=int)
            waits: dict[str, Callable[[Any], Awaitable[object]]] = {
                "wait": lambda seconds: follower.wait(1, seconds),
                "index": index.wait,
            }
            feeds = (db, base, follower)
            for wrong, error in WRONG:
                for wait in waits.values():
                    with pytest.raises(error, match="^timeout_s is "):
                        await wait(wrong)
                for feed in feeds:
                    for name in ("timeout_s", "heartbeat_s"):
                        with pytest.raises(error, match=f"^{name} is "):
                            feed.changes(follow=True, **{name: wrong})
            for seconds in LONG:
                for wait in waits.values():
                    assert await wait(seconds)
                for name in ("timeout_s", "heartbeat_s"):
                    async with db.changes(0, follow=True, **{name: seconds}) as changes:
                        assert (await anext(changes)).key == b"a"
                        # It is given up while it waits.
                        waiting = asyncio.ensure_future(anext(changes))
                        await asyncio.sleep(0)
                        waiting.cancel()

    asyncio.run(body())
