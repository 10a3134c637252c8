"""lmdb (py-lmdb), durable with sync=True; sync=False at "os".

Choices, and where they are advised (lmdb.readthedocs.io, "Environment class" and "writemap mode"):

- map_size far above need: no penalty on 64-bit. max_spare_txns and meminit=False save work in each transaction.
- writemap=True at "commit": "improves performance"; the file is flushed all the same.
- writemap=False at "os": with a writable map and no sync, the documentation says the system has no hint
  when to write, and a crash can corrupt; without it, integrity holds where the file system keeps the order.
- getmulti, putmulti and append for many keys at once (the cursor's documentation).
- Reads: one read transaction where no thread writes, values as bytes (buffers=False). One for each get elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

from bench.data import Pair
from bench.peers.base import How, NotOffered, Peer, bump, require

__all__ = ["Lmdb"]


class Lmdb(Peer):
    """An environment."""

    name = "lmdb"

    @classmethod
    def version(cls) -> str:
        lmdb = require("lmdb")
        return f"py-lmdb {lmdb.__version__}, LMDB {'.'.join(map(str, lmdb.version()))}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        os.makedirs(path, exist_ok=True)
        durable = how.durability == "commit"
        self.settings = {
            "sync": str(durable),
            "writemap": str(durable),
            "meminit": "False",
            "map_size": "64 GiB",
            "max_spare_txns": "1",
            "cache": "the operating system's",
        }
        self._env: Any = require("lmdb").open(
            path, map_size=64 << 30, sync=durable, writemap=durable, meminit=False, max_spare_txns=1
        )
        self._view: Any = None

    def close(self) -> None:
        if self._view is not None:
            self._view.abort()
        self._env.close()

    def _reading(self) -> Any:
        if self._view is None:
            self._view = self._env.begin()
        return self._view

    def putter(self) -> Callable[[bytes, bytes], object]:
        begin = self._env.begin

        def put(key: bytes, value: bytes) -> None:
            with begin(write=True) as txn:
                txn.put(key, value)

        return put

    def writer(self) -> Callable[[list[Pair]], object]:
        begin = self._env.begin

        def write(pairs: list[Pair]) -> None:
            with begin(write=True) as txn:
                txn.cursor().putmulti(pairs)

        return write

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        with self._env.begin(write=True) as txn:
            txn.cursor().putmulti(pairs, append=ascending)
        self._env.sync(True)

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        if stable:
            return cast(Callable[[bytes], bytes | None], self._reading().get)
        begin = self._env.begin

        def get(key: bytes) -> bytes | None:
            with begin() as txn:
                return cast("bytes | None", txn.get(key))

        return get

    def many_getter(self) -> Callable[[list[bytes]], object]:
        cursor = self._reading().cursor()
        return cast(Callable[[list[bytes]], object], cursor.getmulti)

    def txn_getter(self) -> Callable[[list[bytes]], object]:
        begin = self._env.begin

        def get_all(keys: list[bytes]) -> None:
            with begin() as txn:
                get = txn.get
                for key in keys:
                    get(key)

        return get_all

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        cursor = self._reading().cursor()
        if not reverse:
            return cast(Iterator[Pair], iter(cursor))
        cursor.last()
        return cast(Iterator[Pair], cursor.iterprev())

    def scanner(self) -> Callable[[bytes, int], list[Pair]]:
        begin = self._env.begin

        def scan(start: bytes, count: int) -> list[Pair]:
            with begin() as txn:
                cursor = txn.cursor()
                cursor.set_range(start)
                return list(islice(cursor, count))

        return scan

    def incrementer(self) -> Callable[[bytes], object]:
        begin = self._env.begin

        def increment(key: bytes) -> None:
            with begin(write=True) as txn:
                txn.put(key, bump(txn.get(key)))

        return increment

    def tail_is_logged(self) -> None:
        raise NotOffered("copy-on-write without a log: nothing to replay")
