"""Figures of an open store, and who holds what of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvwal.engine.archives import ArchiveStatus
from kvwal.engine.readers import Readers
from kvwal.engine.state import State
from kvwal.keys import Seqno
from kvwal.locks import refused_calls
from kvwal.log import LogReader, SegmentLog
from kvwal.pages import PageFile

__all__ = ["Pin", "Stats"]


@dataclass(frozen=True, slots=True)
class Pin:
    """What holds an old moment of the store: pages, memory, or log.

    Attributes:
        purpose: of a reader "snapshot", "transaction", "scan", "count", "diff" or "changes"; "window"; "consumer";
            "follower"; of another hold on the log what it is for, such as "changes", "bootstrap" or "archive".
        seqno: the moment: the last commit that it sees. It holds the log beyond that, unless it is a reader.
        since_us: when it began, microseconds since 1970 UTC.
        held_bytes: what could go without it, if nothing else held it.
        name: of a consumer, or a follower.
        generation: the generation of pages that may not be reused because of it; 0 if it is no reader.
        thread_name: the thread that began it, if it is a reader.
        pid: the process of a follower, as far as the system tells; 0 of others.
    """

    purpose: str
    seqno: Seqno
    since_us: int
    held_bytes: int
    name: str = ""
    generation: int = 0
    thread_name: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of an open store. Sizes in bytes.

    Attributes:
        last_seqno: the last visible commit. durable_seqno: the last one known to be on disk.
        checkpoint_seqno: the last one in the pages. generation: the number of that checkpoint.
        checkpoint_time_us: when that commit was made, microseconds since 1970 UTC.
        memtable_keys, memtable_bytes: what is newer than the checkpoint (the bytes are an estimate of memory).
        frozen_keys: what a checkpoint under way is bringing into the pages.
        log_segments, log_bytes: segments of the log, and their size with that of their indexes.
        data_bytes, pages_total, pages_free: the page file, and its pages of `page_bytes`.
        tree_keys, tree_height: the tree of the last checkpoint.
        cache_bytes, cache_hits, cache_misses: the page cache. row_bytes: the row cache in front of it.
        readers: snapshots, transactions and scans that are open.
        expiry_rows: what the expiry queue has: one for each entry that expires, and for some that were replaced.
        next_expiry_us: when the first of them is due, microseconds since 1970 UTC; 0 if there is none.
        refused_calls: calls of this process that were refused because they came from within another call of a store.
        archives: how each archive of it that this process keeps is doing, gaps included; none if it keeps none.
    """

    last_seqno: Seqno
    durable_seqno: Seqno
    checkpoint_seqno: Seqno
    generation: int
    checkpoint_time_us: int
    memtable_keys: int
    memtable_bytes: int
    frozen_keys: int
    log_segments: int
    log_bytes: int
    data_bytes: int
    pages_total: int
    pages_free: int
    page_bytes: int
    tree_keys: int
    tree_height: int
    cache_bytes: int
    cache_hits: int
    cache_misses: int
    row_bytes: int
    readers: int
    expiry_rows: int
    next_expiry_us: int
    refused_calls: int
    archives: tuple[ArchiveStatus, ...]

    @classmethod
    def of(
        cls,
        state: State,
        readers: Readers,
        pages: PageFile,
        log: SegmentLog | None,
        log_reader: LogReader,
        expiry: tuple[int, int],
        archives: tuple[ArchiveStatus, ...],
    ) -> Stats:
        """Collect the figures. `expiry`: `Expirer.waiting`."""
        version = state.version
        meta = pages.meta
        segments = (log_reader if log is None else log).segments(with_indexes=True)
        node_cache = pages.pager.cache
        return cls(
            last_seqno=state.seqno,
            durable_seqno=log.durable_seqno if log is not None else state.seqno,
            checkpoint_seqno=meta.seqno,
            generation=meta.generation,
            checkpoint_time_us=meta.time_us,
            memtable_keys=len(version.memtable),
            memtable_bytes=version.memtable.bytes_used,
            frozen_keys=len(version.frozen) if version.frozen is not None else 0,
            log_segments=len(segments),
            log_bytes=sum(segment.size for segment in segments),
            data_bytes=pages.space.file_bytes(),
            pages_total=meta.page_count,
            pages_free=pages.space.free_pages(),
            page_bytes=meta.page_size,
            tree_keys=version.tree.count(),
            tree_height=version.tree.height,
            cache_bytes=node_cache.used_bytes(),
            cache_hits=node_cache.hits,
            cache_misses=node_cache.misses,
            row_bytes=state.cache.bytes_used,
            readers=len(readers),
            expiry_rows=expiry[0],
            next_expiry_us=expiry[1],
            refused_calls=refused_calls(),
            archives=archives,
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures by name, as plain values."""
        figures = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**figures, "archives": [archive.as_dict() for archive in self.archives]}
