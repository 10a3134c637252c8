"""One measurement: what the parent asks of a child, and what the child answers."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from time import perf_counter
from typing import Any, TypeVar

from bench.data import Distribution, Pair, indexes, pairs, sorted_keys, values
from bench.peers import PEERS, How, Peer

__all__ = ["Job", "Measured", "Task", "chunks_of", "data_set", "measured_loop", "opened", "settle"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        task: a name in `bench.tasks.TASKS`.
        path: the store's directory; empty, or a data set, as the case says.
        keys: how many keys the data set holds, or is to hold.
        seconds: how long the measured loop runs. Where the work is fixed it is ignored.
        options: what only this task understands.
    """

    peer: str
    task: str
    path: str
    keys: int
    seconds: float
    how: How = field(default_factory=How)
    distribution: Distribution = "uniform"
    seed: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the child's standard input."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """The inverse of `as_json`."""
        return cls(**{**data, "how": How(**data["how"])})

    def numbers(self, count: int, *, seed: int = 0) -> list[int]:
        """Numbers of keys of the data set, drawn from the job's distribution."""
        return indexes(count, self.keys, self.distribution, self.seed * 1000 + seed)

    def pairs(self, count: int, *, seed: int = 0) -> list[Pair]:
        """Pairs to put over the data set."""
        return pairs(self.numbers(count, seed=seed), self.how.value_bytes, seed=self.seed * 1000 + seed)


@dataclass
class Measured:
    """The answer. `cost` is in the unit of the case; less is better."""

    cost: float
    ops: int = 0
    seconds: float = 0.0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


Task = Callable[[Job], Measured]


@contextmanager
def opened(job: Job) -> Iterator[Peer]:
    """The job's store. It is closed cleanly, which is never part of a measured time."""
    peer = PEERS[job.peer](job.path, job.how)
    try:
        if job.how.filled and not peer.persistent:
            peer.load(data_set(job), ascending=True)
        yield peer
    finally:
        peer.close()


def data_set(job: Job) -> Iterator[Pair]:
    """The pairs of the data set, in key order."""
    pool = values(job.how.value_bytes)
    return ((key, pool[n % len(pool)]) for n, key in enumerate(sorted_keys(job.keys)))


def settle() -> None:
    """Collect now, and take what the harness holds out of later collections. The collector stays on."""
    gc.collect()
    gc.freeze()


def chunks_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """The items in pieces of `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def measured_loop(
    body: Callable[[Any], object], chunks: list[Any], seconds: float, *, per_chunk: int, warm: int = 1
) -> Measured:
    """Call `body` with chunk after chunk, over and over, until its calls took `seconds`.

    `body` is the measured loop: it runs over one chunk and must be the same code for every peer.
    Microseconds for each of `per_chunk` operations are the cost.
    """
    for chunk in chunks[:warm]:
        body(chunk)
    settle()
    spent, rounds = 0.0, 0
    # After the warm-up it goes on behind what has been seen already.
    ahead = chunks[warm:] + chunks[:warm] if warm < len(chunks) else chunks
    for chunk in cycle(ahead):
        begun = perf_counter()
        body(chunk)
        spent += perf_counter() - begun
        rounds += 1
        if spent >= seconds and rounds >= 2:
            break
    ops = rounds * per_chunk
    return Measured(spent / ops * 1e6, ops, spent)
