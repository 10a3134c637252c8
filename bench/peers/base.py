"""What the benchmark asks of a store, and what it may answer.

Rules for an adapter:

- It hands out the fastest documented call, as bare as it can: a bound method where the peer's own
  signature fits, a closure of one line where it does not. The measuring loop is the same for all.
- What a peer does not offer raises `NotOffered` with the reason, which the table then shows. It is
  never emulated by something its users would not write.
- `settings` says everything that departs from the peer's defaults. Each choice cites where it is advised.
- Durability means the same for all. "commit": what was acknowledged survives a power cut. "os": it
  survives a killed process; a power cut may take the newest commits but leaves a consistent store.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bench.data import Pair

__all__ = ["Durability", "How", "Kind", "NotOffered", "Peer", "bump", "chunked", "require"]

Durability = Literal["commit", "os"]
Kind = Literal["kvwal", "peer", "limit"]


class NotOffered(Exception):
    """The peer has no such operation."""


@dataclass(frozen=True)
class How:
    """How a store is opened for one measurement. Every peer gets the same budgets.

    Attributes:
        threads: how many threads will call it.
        tended: `tend` runs in another thread meanwhile.
        keep_log: nothing may be checkpointed or flushed away, so that a crash leaves all of it to replay.
        asyncio: only `session` will be used.
        filled: the store is to hold the data set when the measurement begins.
    """

    durability: Durability = "commit"
    value_bytes: int = 100
    cache_bytes: int = 64 << 20
    memtable_bytes: int = 64 << 20
    threads: int = 1
    tended: bool = False
    keep_log: bool = False
    asyncio: bool = False
    filled: bool = False

    @property
    def alone(self) -> bool:
        """Whether one connection by one thread at a time is enough."""
        return not self.tended


class Peer(ABC):
    """A store, open."""

    name: ClassVar[str]
    kind: ClassVar[Kind] = "peer"
    #: Threads behind which the peer is fastest from asyncio: many only where it commits in groups.
    executor_threads: ClassVar[int] = 1
    #: Whether a data set on disk can be opened; else the child fills the store before it measures.
    persistent: ClassVar[bool] = True

    def __init__(self, path: str, how: How) -> None:
        self.path = path
        self.how = how
        self.settings: dict[str, str] = {}

    @classmethod
    @abstractmethod
    def version(cls) -> str:
        """Version of the binding and of the engine. ImportError if it is not installed."""

    @abstractmethod
    def close(self) -> None:
        """Close cleanly."""

    # Writing. Each call is durable to `how.durability` when it returns.

    def putter(self) -> Callable[[bytes, bytes], object]:
        """The call that puts one pair. Asked for once by each thread, in that thread."""
        raise NotOffered("no single put")

    def writer(self) -> Callable[[list[Pair]], object]:
        """The call that puts many pairs atomically."""
        raise NotOffered("no atomic batches")

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        """Put very many pairs the way the peer advises; durable when it returns. Need not be atomic."""
        write = self.writer()
        for some in chunked(pairs, 10_000):
            write(some)

    # Reading.

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        """The call that reads one key. `stable`: no thread writes meanwhile, so one view of the store may serve all."""
        raise NotOffered("no get")

    def many_getter(self) -> Callable[[list[bytes]], object]:
        """The call that reads many keys at once."""
        get = self.getter(stable=True)
        return lambda keys: [get(key) for key in keys]

    def txn_getter(self) -> Callable[[list[bytes]], object]:
        """The call that reads the keys one by one inside one transaction of its own."""
        raise NotOffered("no transactions")

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        """Every pair, in key order."""
        raise NotOffered("no ordered scan")

    def scanner(self) -> Callable[[bytes, int], list[Pair]]:
        """The call that lists a number of pairs from a key on."""
        raise NotOffered("no ordered scan")

    # Reading and writing.

    def incrementer(self) -> Callable[[bytes], object]:
        """The call that applies `bump` to a key in a serializable transaction, retried until it commits."""
        raise NotOffered("no transactions")

    def tend(self) -> None:
        """Do now what the peer does in the background: checkpoint, or flush and compact."""
        raise NotOffered("has no background work")

    def tail_is_logged(self) -> None:  # noqa: B027 - most peers log
        """NotOffered where nothing is replayed after a crash, so that recovery has no cost to measure."""

    def executor_note(self) -> str:
        """What the asyncio measurement ran."""
        return f"run_in_executor, {self.executor_threads} thread(s)"

    def session(self) -> AbstractAsyncContextManager[Callable[[bytes, bytes], Awaitable[object]]]:
        """For asyncio: a put to be awaited."""
        return self._behind_executor()

    @asynccontextmanager
    async def _behind_executor(self) -> AsyncIterator[Callable[[bytes, bytes], Awaitable[object]]]:
        import asyncio

        loop = asyncio.get_running_loop()
        run = loop.run_in_executor
        put = self.putter()
        with ThreadPoolExecutor(self.executor_threads) as pool:

            def put_later(key: bytes, value: bytes) -> Awaitable[object]:
                return run(pool, put, key, value)

            yield put_later


def require(module: str) -> Any:
    """Import an optional peer. Untyped on purpose: the benchmark type-checks whether it is there or not."""
    return importlib.import_module(module)


def bump(value: bytes | None) -> bytes:
    """The change a read-modify-write makes: the first eight bytes are a counter."""
    assert value is not None
    counter = (int.from_bytes(value[:8], "big") + 1) & 0xFFFFFFFFFFFFFFFF
    return counter.to_bytes(8, "big") + value[8:]


def chunked(items: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    """The items in lists of up to `size`."""
    some: list[Pair] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
