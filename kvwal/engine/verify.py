"""The proof that what is on disk is what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvwal.batch import WriteBatch
from kvwal.engine.expiry import decode_queue_row, due_rows, queue_row
from kvwal.engine.range_map import RangeMap
from kvwal.errors import CorruptionError, Finding
from kvwal.expiring import Expiring
from kvwal.files import Files
from kvwal.files.names import DATA
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno
from kvwal.log import LogReader, Record, verify_log
from kvwal.pages import PageFile, Tree, check
from kvwal.pages.catalogue import roots

__all__ = ["VerifyReport", "verify_parts"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `Store.verify` proved.

    Attributes:
        problems: everything that is wrong; empty if all is well. What is derived is not among them.
        pages: pages of the page file accounted for. records: log records read.
        compared: keys of which the log's word was held against the pages'.
        seconds: how long it took.
        derived: what is damaged and will be made again, such as a key index that a crash has torn. Nothing is lost.
    """

    problems: tuple[Finding, ...]
    pages: int
    records: int
    compared: int
    seconds: float
    derived: tuple[Finding, ...] = ()

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
    in_log = verify_log(reader.chain)
    problems += [finding for finding in in_log if not finding.is_derived]
    records = 0
    compared = 0
    if not problems:
        try:
            records, compared, different = _log_against_pages(pages, reader)
            problems += different
            problems += _queue_against_pages(pages)
        except CorruptionError as error:
            problems.append(Finding(error.file, error.offset, error.reason))
    derived = tuple(finding for finding in in_log if finding.is_derived)
    return VerifyReport(
        tuple(problems), pages.meta.page_count, records, compared, files.monotonic_s() - started_s, derived
    )


class _Word:
    """What a stretch of the log says last of the keys of one table."""

    def __init__(self) -> None:
        self.newest: dict[bytes, tuple[bytes | None, Seqno]] = {}
        self.deleted = RangeMap()

    def add(self, seqno: Seqno, batch: WriteBatch) -> None:
        for bounds in batch.ranges:
            self.deleted.add(seqno, KeyRange(*bounds), copy=False)
        self.newest.update((key, (value, seqno)) for key, value in batch.writes.items())

    def against(self, tree: Tree, of_table: str) -> Iterator[Finding]:
        cover = self.deleted.newest
        for key, (value, seqno) in sorted(self.newest.items()):
            found, said = tree.get(key), None if cover.at(key) > seqno else value
            if found != said or type(found) is not type(said):
                differs = f"is not what the log says it is at seqno {tree.meta.seqno}"
                yield Finding(DATA, None, f"key {key[:64]!r}{of_table} {differs}")
        for start, stop in cover.ranges():
            for keys, _ in tree.chunks(start, stop, reverse=False):
                for key in keys:
                    if key not in self.newest:
                        yield Finding(DATA, None, f"key {key[:64]!r}{of_table} was deleted with its range")


def _log_against_pages(pages: PageFile, reader: LogReader) -> tuple[int, int, list[Finding]]:
    """The older generation, plus the log up to the newer one, must be the newer one, for every key the log names."""
    # The log is kept back to the one before as long as that can be read.
    meta, *older = pages.readable()
    words: dict[int, _Word] = {}
    records = 0
    different: list[Finding] = []
    for record in reader.replay(after=(older or [meta])[0].seqno, floor=meta.seqno):
        records += 1
        batch = record.batch()
        different += _unqueued(record, batch)
        if record.seqno > meta.seqno:
            # Not in the pages yet. It was read, and its checksum holds.
            continue
        for table, part in ((0, batch), *batch.parts()):
            words.setdefault(table, _Word()).add(record.seqno, part)
    different += [
        finding
        for table, word in sorted(words.items())
        for finding in word.against(pages.tree(meta, table), f" of table {table}" if table else "")
    ]
    return records, sum(len(word.newest) for word in words.values()), different


def _unqueued(record: Record, batch: WriteBatch) -> Iterator[Finding]:
    """What a commit puts that expires, without its row of the expiry queue."""
    if not batch.sets_expiry():
        return
    rows = batch.table(SYSTEM_TABLE).writes
    for table, part in ((0, batch), *batch.parts()):
        for key, value in part.writes.items():
            if type(value) is Expiring and rows.get(queue_row(value.expires_us, table, key)[0]) is None:
                what = f"key {key[:64]!r} of table {table} expires, and is not queued"
                yield Finding(record.position.file, record.offset, what)


def _queue_against_pages(pages: PageFile) -> Iterator[Finding]:
    """Each row of the expiry queue is valid, and each entry that expires has one. A row without an entry is right."""
    meta = pages.meta
    queue = pages.tree(meta, SYSTEM_TABLE)
    for keys, values in queue.chunks(*due_rows(0, None)):
        for key, value in zip(keys, values, strict=True):
            try:
                decode_queue_row(key, value)
            except CorruptionError as error:
                yield Finding(error.file, error.offset, error.reason)
    for table, _ in roots(pages.pager, meta):
        tree = pages.tree(meta, table)
        for keys, values in tree.chunks() if tree.has_expiring else ():
            for key, value in zip(keys, values, strict=True):
                if type(value) is Expiring and queue.get(queue_row(value.expires_us, table, key)[0]) is None:
                    yield Finding(DATA, None, f"key {key[:64]!r} of table {table} expires, and is not queued")
