"""Looking at an open store: figures, pins, and the proof that what is on disk is what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from kvwal.engine.present import Present, View
from kvwal.errors import CorruptionError, Finding
from kvwal.files import Files
from kvwal.keys import Seqno
from kvwal.log import LogReader, LogWriter, verify_log
from kvwal.pages import PageFile, check

__all__ = ["Pin", "Stats", "VerifyReport", "verify_parts"]


@dataclass(frozen=True, slots=True)
class Pin:
    """Somebody who holds an old moment of the store.

    Attributes:
        purpose: "snapshot", "transaction", "scan" or "count".
        seqno: the moment: the last commit it sees.
        since_us: when it began, microseconds since 1970 UTC.
        generation: the generation of pages that may not be reused because of it.
        thread_name: the thread that began it.
    """

    purpose: str
    seqno: Seqno
    since_us: int
    generation: int
    thread_name: str

    @classmethod
    def of(cls, view: View) -> Pin:
        """What a registered view pins."""
        return cls(view.purpose, view.seqno, view.since_us, view.levels.tree.meta.generation, view.thread.name)


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of an open store. Sizes in bytes.

    Attributes:
        last_seqno: the last visible commit. durable_seqno: the last one known to be on disk.
        checkpoint_seqno: the last one in the pages. generation: the number of that checkpoint.
        checkpoint_time_us: when it was made, microseconds since 1970 UTC.
        memtable_keys, memtable_bytes: what is newer than the checkpoint (the bytes are an estimate of memory).
        frozen_keys: what a checkpoint under way is bringing into the pages.
        log_segments, log_bytes: files of the log, and their size.
        data_bytes, pages_total, pages_free: the page file, and its pages of `page_bytes`.
        tree_keys, tree_height: the tree of the last checkpoint.
        cache_bytes, cache_hits, cache_misses: the page cache. row_bytes: the rows in front of it.
        readers: snapshots, transactions and scans that are open.
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

    @classmethod
    def of(cls, present: Present, pages: PageFile, log: LogWriter | None, reader: LogReader) -> Stats:
        """Collect the figures."""
        levels = present.levels
        meta = pages.meta
        segments = log.segments() if log is not None else reader.segments()
        of_pages = pages.stats()
        return cls(
            last_seqno=present.seqno,
            durable_seqno=log.durable_seqno if log is not None else present.seqno,
            checkpoint_seqno=meta.seqno,
            generation=meta.generation,
            checkpoint_time_us=meta.time_us,
            memtable_keys=len(levels.memtable),
            memtable_bytes=levels.memtable.bytes_used,
            frozen_keys=len(levels.frozen) if levels.frozen is not None else 0,
            log_segments=len(segments),
            log_bytes=sum(segment.size for segment in segments),
            data_bytes=of_pages.file_bytes,
            pages_total=of_pages.pages,
            pages_free=of_pages.free_pages,
            page_bytes=meta.page_size,
            tree_keys=levels.tree.count(),
            tree_height=levels.tree.height,
            cache_bytes=of_pages.cache_bytes,
            cache_hits=of_pages.hits,
            cache_misses=of_pages.misses,
            row_bytes=present.row_bytes,
            readers=len(present.views()),
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `Store.verify` proved.

    Attributes:
        problems: everything that is wrong; empty if all is well.
        pages: pages of the page file accounted for. records: log records read.
        compared: keys of which the log's word was held against the pages'.
        seconds: how long it took.
    """

    problems: tuple[Finding, ...]
    pages: int
    records: int
    compared: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_parts(
    pages: PageFile, reader: LogReader, files: Files, progress: Callable[[int, int], None] | None
) -> VerifyReport:
    """Prove pages, log, and the one against the other. Requires: no checkpoint runs meanwhile."""
    started_s = files.monotonic_s()
    problems = [Finding(p.file, p.offset, p.reason) for p in check(pages, progress=progress)]
    problems += verify_log(reader.chain)
    records = 0
    compared = 0
    if not problems:
        try:
            records, compared, different = _log_against_pages(pages, reader)
            problems += different
        except CorruptionError as error:
            problems.append(error.finding)
    return VerifyReport(
        tuple(problems), pages.stats().pages, records, compared, files.monotonic_s() - started_s
    )


def _log_against_pages(pages: PageFile, reader: LogReader) -> tuple[int, int, list[Finding]]:
    """The older generation, plus the log up to the newer one, must be the newer one, for every key the log names."""
    meta, older = pages.meta, pages.older
    newest: dict[bytes, bytes | None] = {}
    ranges = []
    records = 0
    for record in reader.replay(after=meta.seqno if older is None else older.seqno, floor=meta.seqno):
        records += 1
        if record.seqno > meta.seqno:
            # Not in the pages yet. It was read, and its checksum holds.
            continue
        batch = record.batch()
        for bounds in batch.ranges:
            ranges.append(bounds)
            for key in [key for key in newest if bounds.contains(key)]:
                newest[key] = None
        newest.update(batch.writes)
    tree = pages.tree(meta)
    different = [
        Finding("data", None, f"key {key[:64]!r} is not what the log says it is at seqno {meta.seqno}")
        for key, value in sorted(newest.items())
        if tree.get(key) != value
    ]
    for start, stop in ranges:
        for keys, _ in tree.chunks(start, stop, reverse=False):
            for key in keys:
                if key not in newest:
                    different.append(Finding("data", None, f"key {key[:64]!r} was deleted with its range"))
    return records, len(newest), different
