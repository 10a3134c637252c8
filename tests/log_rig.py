"""A log in a directory, on whatever files, with hands to damage it: what the tests of the log share."""

from __future__ import annotations

import itertools
from typing import Any

from kvwal.batch import WriteBatch
from kvwal.errors import Finding
from kvwal.files import Directory, Files
from kvwal.keys import Seqno
from kvwal.log import (
    Chain,
    LogEnd,
    LogIdentity,
    LogOptions,
    LogReader,
    Record,
    Seek,
    SegmentLog,
    encode_put,
    salvage_log,
    verify_log,
)
from kvwal.log.segment import list_segments
from kvwal.testing import SimulatedDisk

STORE_ID = b"store-id-16bytes"
IDENTITY = LogIdentity(STORE_ID, b"the line", 7)
SEGMENT_BYTES = 4096 + 1000
#: At the sizes of a store that was told nothing.
FIRST_SEGMENT_BYTES = LogOptions().first_segment_bytes


def log_options(options: dict[str, Any]) -> LogOptions:
    """Small segments, unless told otherwise."""
    return LogOptions(**({"segment_bytes": SEGMENT_BYTES} | options))


def entry(n: int, size: int = 20) -> tuple[bytes, bytes]:
    """What the commit with seqno n puts, telling what it is."""
    return b"key%d" % n, (b"value%d." % n * size)[:size]


def body(n: int, size: int = 20) -> bytes:
    """The body of the commit with seqno n."""
    return encode_put(*entry(n, size))


def simulated_disk() -> SimulatedDisk:
    """A disk with the durable directory /log."""
    disk = SimulatedDisk()
    disk.make_directory("/log")
    disk.open_directory("/log").sync_parent()
    return disk


class LogRig:
    """One log, written and read again and again."""

    def __init__(self, files: Files, directory: str) -> None:
        self.files = files
        self._path = directory

    @property
    def directory(self) -> Directory:
        """Opened each time, since a killed process leaves no handle."""
        return self.files.open_directory(self._path)

    # -- writing ------------------------------------------------------------------------------

    def create(self, *, time_us: int = 1000, **options: Any) -> SegmentLog:
        return SegmentLog.create(self.files, self.directory, IDENTITY, log_options(options), time_us=time_us)

    def resume(self, end: LogEnd | None = None, *, identity: LogIdentity | None = None, **options: Any) -> SegmentLog:
        if end is None:
            _, end = self.replay()
        return SegmentLog.resume(
            self.files, self.directory, identity or IDENTITY, log_options(options), end, self.reader()
        )

    def fill(self, log: SegmentLog, n: int, *, sync_every: int = 1, size: int = 20) -> None:
        """Append n commits."""
        for i in range(1, n + 1):
            seqno = log.append_put(*entry(log.last_seqno + 1, size))
            assert seqno == log.last_seqno
            if i % sync_every == 0:
                log.sync()

    def grown(self, **options: Any) -> SegmentLog:
        """A log whose newest segment is large, and has more space left than a close leaves unused."""
        log = self.create(**{"segment_bytes": 1 << 20} | options)
        while log.segments()[-1].size < 4 * FIRST_SEGMENT_BYTES:
            self.fill(log, 1, size=5000)
        return log

    def made(self, n: int, *, sync_every: int = 1, **options: Any) -> LogRig:
        """A log of n commits whose writer was killed."""
        log = self.create(**options)
        self.fill(log, n, sync_every=sync_every)
        log.abandon()
        return self

    # -- reading ------------------------------------------------------------------------------

    def reader(self) -> LogReader:
        return LogReader(self.directory, STORE_ID)

    def replay(self, after: int = 0, floor: int = 0) -> tuple[list[int], LogEnd]:
        """The seqnos that recovery finds, each with the right content, and the end."""
        replay = self.reader().replay(Seqno(after), Seqno(floor))
        seqnos = []
        for record in replay:
            check_content(record.batch(), record.seqno)
            seqnos.append(int(record.seqno))
        assert seqnos == list(range(after + 1, after + 1 + len(seqnos)))
        return seqnos, replay.end

    def chain(self) -> Chain:
        return Chain(self.directory, STORE_ID)

    def seek(self) -> Seek:
        return Seek(self.chain())

    def verify(self) -> list[Finding]:
        return verify_log(self.chain())

    def salvage(self) -> tuple[list[Record], list[Finding]]:
        """The commits that are saved, and what is said of the rest."""
        found = list(salvage_log(self.chain()))
        return [one for one in found if isinstance(one, Record)], [one for one in found if isinstance(one, Finding)]

    def saved(self) -> tuple[list[int], list[Finding]]:
        """The seqnos of the commits that are saved, and what is said of the rest."""
        records, findings = self.salvage()
        return [int(record.seqno) for record in records], findings

    def names(self) -> list[str]:
        return sorted(self.directory.names())

    def segments(self) -> list[int]:
        return [int(s) for s in list_segments(self.directory)]

    def offset(self, seqno: int) -> tuple[str, int]:
        position = self.seek().seek(Seqno(seqno))
        return position.file, position.offset

    # -- damage -------------------------------------------------------------------------------

    def path(self, name: str) -> str:
        return f"{self._path}/{name}"

    def read(self, name: str) -> bytes:
        file = self.directory.open(name)
        try:
            return file.pread(file.size(), 0)
        finally:
            file.close()

    def overwrite(self, name: str, offset: int, data: bytes) -> None:
        file = self.directory.open(name, write=True)
        file.pwrite(data, offset)
        file.sync()
        file.close()

    def flip(self, name: str, offset: int, mask: int = 0xFF) -> None:
        self.overwrite(name, offset, bytes((self.read(name)[offset] ^ mask,)))

    def flip_commit(self, seqno: int, at: int = 45) -> tuple[str, int]:
        """Damage a byte inside a commit; returns where the commit begins."""
        name, offset = self.offset(seqno)
        self.flip(name, offset + at)
        return name, offset

    def cut(self, name: str, size: int) -> None:
        file = self.directory.open(name, write=True)
        file.truncate(size)
        file.sync()
        file.close()

    def remove(self, name: str) -> None:
        self.directory.unlink(name)
        self.directory.sync()

    def snapshot(self) -> dict[str, bytes]:
        return {name: self.read(name) for name in self.names()}

    def restore(self, content: dict[str, bytes]) -> None:
        for name in self.names():
            self.remove(name)
        for name, data in content.items():
            file = self.directory.open(name, create=True)
            file.pwrite(data, 0)
            file.sync()
            file.close()
        self.directory.sync()


def check_content(batch: WriteBatch, seqno: int) -> None:
    """The commit with seqno n wrote key n, and nothing else, with its own value."""
    [(key, value)] = batch.writes.items()
    assert key == b"key%d" % seqno
    assert value is not None
    expected = b"value%d." % seqno
    assert all(a == b for a, b in zip(value, itertools.cycle(expected), strict=False))
