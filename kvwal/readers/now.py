"""The control page `readers/now`: what the writer says of itself while a follower has a pin.

    at   type   field
     0   8 B    magic "kvwalnow"
     8   u16    version, 1
    10   u16    size, 88
    12   u32    flags, zero
    16   16 B   store id
    32   8 B    line
    40   u64    session
    48   u64    durable seqno
    56   u64    generation, the newest
    64   u64    heartbeat, in ns, when this was written: CLOCK_BOOTTIME on Linux, else CLOCK_MONOTONIC
    72   u64    segment: the newest, by its first seqno, or 0; the durable commit is in it, or in one before it
    80   u32    salt of this segment, or 0
    84   u32    CRC-32C of the bytes before

It is written in place, by one write of all bytes, and not flushed. A reader takes it if it verifies and its heartbeat
is young, and if the log has the commit. So it takes nothing that a writer said that is gone for long, or whose files
are; and what a living one says is true for good: a commit that was on disk stays there. On disk: never change.
"""

from __future__ import annotations

from contextlib import suppress
from struct import Struct
from typing import Final, NamedTuple

from crc32c import crc32c

from kvwal.files import Directory, File, Files, inside
from kvwal.files.names import NOW, READERS
from kvwal.finalizing import quiet_at_exit

__all__ = ["HEARTBEAT_S", "NOW_BYTES", "NowPage", "NowReader", "Said", "decode_now", "encode_now"]

PAGE: Final = Struct("<8sHHI16s8sQQQQQI")
CRC: Final = Struct("<I")
NOW_BYTES: Final = PAGE.size + CRC.size
assert NOW_BYTES == 88, "the size of the control page"

_MAGIC: Final = b"kvwalnow"
_VERSION: Final = 1
#: The writer says something at least this often.
HEARTBEAT_S: Final = 1.0
# What it said is believed for so long.
_YOUNG_S: Final = 2 * HEARTBEAT_S


class Said(NamedTuple):
    """What a writer said: which store it is, which commits are on disk and where, when it said so (monotonic clock)."""

    store_id: bytes
    line: bytes
    session: int
    durable: int
    generation: int
    heartbeat_ns: int
    segment: int
    salt: int


def encode_now(said: Said) -> bytes:
    """The bytes of the page."""
    raw = PAGE.pack(_MAGIC, _VERSION, NOW_BYTES, 0, *said)
    return raw + CRC.pack(crc32c(raw))


def decode_now(raw: bytes) -> Said | None:
    """What the page says; None if it is torn, or none that this version knows."""
    if len(raw) != NOW_BYTES or CRC.unpack_from(raw, PAGE.size)[0] != crc32c(raw[: PAGE.size]):
        return None
    magic, version, size, flags, *said = PAGE.unpack_from(raw)
    if (magic, version, size, flags) != (_MAGIC, _VERSION, NOW_BYTES, 0):
        return None
    return Said(*said)


class _Open:
    """The file of the page, which is closed when the last thread that may write it has let go of this."""

    __slots__ = ("file",)

    def __init__(self, file: File) -> None:
        self.file = file

    @quiet_at_exit
    def __del__(self) -> None:
        with suppress(OSError):
            self.file.close()


class NowPage:
    """The page as its writer has it. One caller at a time of `begin` and `end`; `write` from any thread."""

    def __init__(
        self, files: Files, directory: Directory, store_id: bytes, line: bytes, session: int, mode: int
    ) -> None:
        self._now_s = files.monotonic_s
        self._directory = directory
        self._identity = store_id, line, session
        self._mode = mode
        self._open: _Open | None = None

    @property
    def is_open(self) -> bool:
        """Whether it is written."""
        return self._open is not None

    def begin(self) -> None:
        """Make the page, or take over what a killed writer left. OSError if that cannot be done."""
        readers = inside(self._directory, READERS)
        try:
            try:
                self._open = _Open(readers.open(NOW, write=True))
            except FileNotFoundError:
                self._open = _Open(readers.open(NOW, create=True, mode=self._mode))
        finally:
            readers.close()

    def write(self, durable: int, generation: int, segment: int, salt: int) -> None:
        """Say this, with a heartbeat. `segment`: looked at after `durable`. OSError if it cannot be written."""
        # Held until it is written, so that no other thread closes the file under it.
        held = self._open
        if held is not None:
            said = Said(*self._identity, durable, generation, int(self._now_s() * 1e9), segment, salt)
            held.file.pwrite(encode_now(said), 0)

    def end(self) -> None:
        """Say nothing any more. Idempotent."""
        if not self.close():
            return
        try:
            readers = inside(self._directory, READERS)
            try:
                readers.unlink(NOW)
            finally:
                readers.close()
        except OSError:
            # What is left there grows old.
            return

    def close(self) -> bool:
        """Let go of the file, which grows old. Whether it was open. Takes no lock, so that a finalizer may call it."""
        held, self._open = self._open, None
        return held is not None


class NowReader:
    """The page as a follower reads it. One thread at a time."""

    def __init__(self, files: Files, directory: Directory, store_id: bytes, line: bytes) -> None:
        self._now_s = files.monotonic_s
        self._directory = directory
        self._identity = store_id, line
        self._file: File | None = None
        # When that was said which is not true.
        self._false_ns: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether the writer said something when that was looked at last."""
        return self._file is not None

    def look(self) -> Said | None:
        """What the writer says, if there is one and it said so just now. One system call as a rule."""
        try:
            if self._file is None:
                self._file = self._open()
            said = decode_now(self._file.pread(NOW_BYTES, 0))
        except OSError:
            if self._directory.inherited:
                raise
            self.close()
            return None
        if said is not None and said[:2] == self._identity and said.heartbeat_ns != self._false_ns:
            if 0 <= self._now_s() - said.heartbeat_ns / 1e9 < _YOUNG_S:
                return said
        # A new writer may have made another file.
        self.close()
        return None

    def disbelieve(self, said: Said) -> None:
        """Take this no more: it is of files that are gone. A writer that lives says the next thing at another time."""
        self._false_ns = said.heartbeat_ns

    def _open(self) -> File:
        readers = inside(self._directory, READERS)
        try:
            return readers.open(NOW)
        finally:
            readers.close()

    def close(self) -> None:
        """Let go of the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()
