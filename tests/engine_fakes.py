"""Stand-ins for pages and log, for tests of the commit pipeline alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvwal.keys import Seqno
from kvwal.log import decode_intents, encode_put


class FakeTree:
    """An empty generation."""

    height = 0

    def __init__(self, generation: int = 1) -> None:
        self.meta = FakeMeta(generation)

    def get(self, key: bytes) -> bytes | None:
        return None

    def chunks(self, start: object, stop: object, *, reverse: bool) -> Iterator[Any]:
        return iter(())

    def count(self, start: object = None, stop: object = None) -> int:
        return 0


class FakeMeta:
    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.seqno = Seqno(0)


class FakePages:
    meta = FakeMeta(1)

    def tree(self, meta: object = None) -> FakeTree:
        return FakeTree()

    def pin(self, generation: int) -> None: ...

    def unpin(self, generation: int) -> None: ...

    def resize_cache(self, cache_bytes: int) -> None: ...


class FakeLog:
    """A log in memory that counts flushes and can be told to fail."""

    def __init__(self) -> None:
        self.last_seqno = Seqno(0)
        self.durable_seqno = Seqno(0)
        self.bodies: list[bytes] = []
        self.groups: list[int] = []
        self.syncs = 0
        self.fail_append: list[BaseException] = []
        self.fail_sync: list[BaseException] = []
        self.on_sync: Callable[[], None] = lambda: None
        self.on_append: Callable[[], None] = lambda: None

    def append_put(self, key: bytes, value: bytes) -> Seqno:
        return self.append((encode_put(key, value),))

    def append(self, bodies: Sequence[Any], *, small: bool = False) -> Seqno:
        if self.fail_append and not small:
            raise self.fail_append.pop()
        new = [body if isinstance(body, bytes) else b"".join(body) for body in bodies]
        self.bodies, self.last_seqno = self.bodies + new, Seqno(self.last_seqno + len(new))
        self.groups.append(len(new))
        self.on_append()
        return self.last_seqno

    def sync(self) -> None:
        if self.fail_sync:
            raise self.fail_sync.pop()
        self.syncs += 1
        self.on_sync()
        self.durable_seqno = self.last_seqno

    def content(self) -> dict[bytes, bytes]:
        state: dict[bytes, bytes | None] = {}
        for body in self.bodies:
            state.update(decode_intents(body).writes)
        return {key: value for key, value in state.items() if value is not None}
