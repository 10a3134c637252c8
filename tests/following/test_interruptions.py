"""A signal handler that raises anywhere in what a follower does loses nothing: the next call goes on."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from store_fixtures import interrupted_at

import kvwal
from kvwal.testing import SimulatedDisk


class Beside:
    """A writer, and a follower that is behind by commits, by a checkpoint, or by several."""

    def __init__(self, checkpoints: int) -> None:
        self.disk = SimulatedDisk()
        self.disk.make_directory("/store")
        self.db = kvwal.open("/store", files=self.disk, background=False)
        self.db.update({b"%02d" % n: b"0" for n in range(20)})
        self.db.table("users", str, int)["ada"] = 1
        self.db.checkpoint()
        self.live = kvwal.follow("/store", files=self.disk)
        for n in range(max(checkpoints, 1)):
            self.db.put(b"05", b"%d" % n)
            self.db.delete_range(b"10", b"12")
            self.db.table("users", str, int)["bob"] = n
            if checkpoints:
                self.db.checkpoint()
        self.db.put(b"06", b"last")
        self.db.put(b"07", b"not shown yet")

    def check(self) -> None:
        """It goes on to the last commit but one, and nothing is missing."""
        assert self.live.refresh() == self.db.last_seqno - 1
        assert dict(self.live) == dict(self.db) | {b"07": b"0"}
        assert len(self.live) == len(self.db)
        assert dict(self.live.table("users", str, int)) == dict(self.db.table("users", str, int))
        self.live.close()
        self.db.close()


ACTIONS: dict[str, Callable[[kvwal.Follower], object]] = {
    "refresh": lambda live: live.refresh(),
    "wait": lambda live: live.wait(live.seqno + 1, 5),
    "lag": lambda live: live.lag(),
    "get": lambda live: live.get(b"05"),
    "scan": lambda live: list(live.scan()),
    "count": lambda live: len(live),
}


def _every(action: Callable[[kvwal.Follower], object], checkpoints: int, first: int, stride: int) -> None:
    for step in itertools.count(first, stride):
        beside = Beside(checkpoints)
        if interrupted_at(step, lambda: action(beside.live)) is None:
            beside.check()
            assert step > first
            return
        beside.check()


@pytest.mark.parametrize("checkpoints", [0, 1, 3])
@pytest.mark.parametrize("name", ["refresh", "get"])
def test_what_a_follower_does_may_be_interrupted_at_many_places(name: str, checkpoints: int) -> None:
    _every(ACTIONS[name], checkpoints, 1 + checkpoints, 41)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [0, 1, 3])
@pytest.mark.parametrize("name", ACTIONS)
def test_what_a_follower_does_may_be_interrupted_anywhere(name: str, checkpoints: int) -> None:
    _every(ACTIONS[name], checkpoints, 1, 5)


def test_following_may_be_interrupted_while_it_begins() -> None:
    beside = Beside(1)
    handles = _handles(beside.disk)
    found: list[kvwal.Follower] = []
    for step in itertools.count(1, 37):
        ended = interrupted_at(step, lambda: found.append(kvwal.follow("/store", files=beside.disk))) is None
        while found:
            found.pop().close()
        with suppress(ResourceWarning):
            gc.collect()
        if ended:
            break
    assert step > 1000
    # Where it comes between the opening of a file and the handler that closes it, that file stays open.
    assert _handles(beside.disk) - handles < 5
    beside.check()


def _handles(disk: SimulatedDisk) -> int:
    directory: Any = disk.open_directory("/store")
    return sum(getattr(node, "handles", 0) for node in directory._node.entries.values())
