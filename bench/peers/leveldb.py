"""plyvel: LevelDB.

Choices, and where they are advised (plyvel.readthedocs.io/en/latest/api.html; leveldb's doc/index.md, "Performance"):

- put(sync=True) at "commit". At "os" the log still reaches the operating system with each write.
- write_buffer_size ("larger values increase performance, especially during bulk loads") and lru_cache_size
  are the common budgets; a bloom filter of 10 bits a key (doc/index.md, "Filters").
- Snappy and 4 KiB blocks as by default; 16 KiB made no difference that could be measured.
- There is no call for many keys: they are read one by one.
- The binding lets other threads run during a write, and LevelDB writes what they bring with one sync: from
  asyncio it is fastest behind many threads (16: 114 us a put; 64: 137).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, cast

from bench.data import Pair
from bench.peers.base import How, Peer, require

__all__ = ["LevelDb"]


class LevelDb(Peer):
    """A plyvel.DB."""

    name = "plyvel"
    executor_threads = 16

    @classmethod
    def version(cls) -> str:
        plyvel = require("plyvel")
        engine = f"{plyvel.__leveldb_version__}"
        return f"plyvel {plyvel.__version__}, LevelDB {engine}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        buffer = how.memtable_bytes if not how.keep_log else 1 << 30
        self._sync = how.durability == "commit"
        self.settings = {
            "sync": str(self._sync),
            "write_buffer_size": f"{buffer >> 20} MiB",
            "lru_cache_size": f"{how.cache_bytes >> 20} MiB",
            "bloom_filter_bits": "10",
            "compression": "snappy",
        }
        self._db: Any = require("plyvel").DB(
            path,
            create_if_missing=True,
            write_buffer_size=buffer,
            lru_cache_size=how.cache_bytes,
            bloom_filter_bits=10,
        )

    def close(self) -> None:
        self._db.close()

    def putter(self) -> Callable[[bytes, bytes], object]:
        return partial(self._db.put, sync=self._sync)

    def writer(self) -> Callable[[list[Pair]], object]:
        new, sync = self._db.write_batch, self._sync

        def write(pairs: list[Pair]) -> None:
            # The batch as a context manager commits even when the block raises; write() is the same otherwise.
            batch = new(sync=sync)
            put = batch.put
            for key, value in pairs:
                put(key, value)
            batch.write()

        return write

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        return cast(Callable[[bytes], "bytes | None"], self._db.get)

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        return cast(Iterator[Pair], self._db.iterator(reverse=reverse))

    def scanner(self) -> Callable[[bytes, int], list[Pair]]:
        iterator = self._db.iterator
        return lambda start, count: list(islice(iterator(start=start), count))

    def tend(self) -> None:
        self._db.compact_range()
