"""rocksdict: RocksDB, in raw mode (bytes only).

Choices, and where they are advised (github.com/facebook/rocksdb/wiki/Setup-Options-and-Basic-Tuning,
"Block Cache Size", "Bloom Filters", "Other General Options"; rocksdict's README and docs):

- WriteOptions.sync=True at "commit". At "os" the log still reaches the operating system with each write.
- write_buffer_size and the block cache are the common budgets; bloom filter of 10 bits; index and filter
  blocks in the cache, those of level 0 pinned; bytes_per_sync 1 MiB; background jobs = cores.
- block_size 4 KiB, not the 16 KiB the wiki starts from: measured here 4.4 us for a hot get instead of 6.6.
- lz4, as the wiki suggests; the values are incompressible, so nothing is gained or lost by it.
- Many keys at once: `db[[...]]`. Bulk load in key order: SstFileWriter and ingest (rocksdict's examples).
- The binding does not let other threads run during a write, so threads cannot share a sync.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, cast

from bench.data import KEY_BYTES, Pair
from bench.peers.base import How, Peer, chunked, require

__all__ = ["Rocks"]

_TABLE_BYTES = 32 << 20


class Rocks(Peer):
    """An Rdict."""

    name = "rocksdict"

    @classmethod
    def version(cls) -> str:
        from importlib.metadata import version

        require("rocksdict")
        return f"rocksdict {version('rocksdict')}"

    def __init__(self, path: str, how: How) -> None:
        super().__init__(path, how)
        self._rocksdict: Any = require("rocksdict")
        self.settings = {
            "raw_mode": "True",
            "sync": str(how.durability == "commit"),
            "write_buffer_size": f"{how.memtable_bytes >> 20} MiB",
            "block_cache": f"{how.cache_bytes >> 20} MiB",
            "block_size": "4 KiB",
            "bloom_filter": "10 bits",
            "cache_index_and_filter_blocks": "True, level 0 pinned",
            "bytes_per_sync": "1 MiB",
            "compression": "lz4",
        }
        # Without `column_families`, an existing store is opened with the options of its file, and a block cache
        # of 8 MiB whatever was asked for.
        options = self._options()
        self._db: Any = self._rocksdict.Rdict(path, options, column_families={"default": options})
        cache = self._db.property_int_value("rocksdb.block-cache-capacity")
        assert cache == how.cache_bytes, f"the block cache has {cache} bytes"
        write = self._rocksdict.WriteOptions()
        write.sync = how.durability == "commit"
        self._db.set_write_options(write)

    def _options(self) -> Any:
        rocksdict, how = self._rocksdict, self.how
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_max_background_jobs(max(2, os.cpu_count() or 2))
        options.set_write_buffer_size(how.memtable_bytes if not how.keep_log else 1 << 30)
        options.set_bytes_per_sync(1 << 20)
        options.set_level_compaction_dynamic_level_bytes(True)
        options.set_compression_type(rocksdict.DBCompressionType.lz4())
        table = rocksdict.BlockBasedOptions()
        table.set_block_size(4096)
        table.set_block_cache(rocksdict.Cache(how.cache_bytes))
        table.set_bloom_filter(10, False)
        table.set_cache_index_and_filter_blocks(True)
        table.set_pin_l0_filter_and_index_blocks_in_cache(True)
        table.set_format_version(5)
        options.set_block_based_table_factory(table)
        return options

    def close(self) -> None:
        self._db.close()

    def putter(self) -> Callable[[bytes, bytes], object]:
        return cast(Callable[[bytes, bytes], object], self._db.put)

    def writer(self) -> Callable[[list[Pair]], object]:
        new, commit = self._rocksdict.WriteBatch, self._db.write

        def write(pairs: list[Pair]) -> None:
            batch = new(raw_mode=True)
            put = batch.put
            for key, value in pairs:
                put(key, value)
            commit(batch)

        return write

    def load(self, pairs: Iterable[Pair], *, ascending: bool) -> None:
        if not ascending:
            return super().load(pairs, ascending=False)
        # Several tables: the filter of a single large one does not fit in a shard of the block cache.
        per_table = max(1, _TABLE_BYTES // (KEY_BYTES + self.how.value_bytes))
        tables: list[str] = []
        for some in chunked(pairs, per_table):
            tables.append(f"{self.path}.{len(tables)}.sst")
            sst = self._rocksdict.SstFileWriter(options=self._options())
            sst.open(tables[-1])
            for key, value in some:
                sst[key] = value
            sst.finish()
        options = self._rocksdict.IngestExternalFileOptions()
        options.set_move_files(True)
        self._db.ingest_external_file(tables, options)
        return None

    def getter(self, *, stable: bool) -> Callable[[bytes], bytes | None]:
        return cast(Callable[[bytes], "bytes | None"], self._db.get)

    def many_getter(self) -> Callable[[list[bytes]], object]:
        return cast(Callable[[list[bytes]], object], self._db.get)

    def scan(self, *, reverse: bool = False) -> Iterator[Pair]:
        return cast(Iterator[Pair], self._db.items(backwards=reverse))

    def scanner(self) -> Callable[[bytes, int], list[Pair]]:
        items = self._db.items
        return lambda start, count: list(islice(items(from_key=start), count))

    def tend(self) -> None:
        self._db.flush()
        self._db.compact_range(None, None)
