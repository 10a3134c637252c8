"""Commits that a consumer has set aside because its function fails for them: a row of table 1 for each.

The key is the kind 4, the length of the consumer's name (u8), the name, and the seqno (u64, big-endian). The row,
little-endian:

| at | type | field |
|---|---|---|
| 0 | u8 | version, 1 |
| 1 | u8 | zero |
| 2 | u16 | bytes of the error |
| 4 | u32 | attempts |
| 8 | u64 | set aside, wall clock in us |
| 16 | - | the last error, UTF-8 |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from kvwal.engine.reads import Reads
from kvwal.engine.recovery import Recovered
from kvwal.errors import CorruptionError, FeedGap, FormatError
from kvwal.files.names import DATA
from kvwal.keys import SYSTEM_TABLE, KeyRange, Seqno
from kvwal.log import Hold, Limits

__all__ = [
    "MAX_ERROR_BYTES",
    "SYSTEM_TABLE",
    "Parked",
    "ParkedCommits",
    "decode_parked",
    "encode_parked",
    "error_bytes",
    "keep",
    "parked_key",
    "parked_prefix",
]

# On disk: never change.
_KIND: Final = b"\x04"
_VERSION: Final = 1
_PARKED = struct.Struct("<BBHIQ")
assert _PARKED.size == 16
_SEQNO_BYTES: Final = 8

MAX_ERROR_BYTES: Final = 1000
_MOST_ATTEMPTS: Final = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Parked:
    """A commit whose changes are set aside.

    Attributes:
        seqno: of the commit.
        error: what the function raised last.
        attempts: how often it was tried.
        since_us: when it was set aside, microseconds since 1970 UTC.
    """

    seqno: Seqno
    error: str
    attempts: int
    since_us: int


class ParkedCommits:
    """What the consumers of one open store have set aside, and their holds on that. Thread-safe."""

    def __init__(self, recovered: Recovered, reads: Reads) -> None:
        self._state = recovered.state
        self._log = recovered.log
        self._reads = reads
        self._holds: dict[str, Hold] = {}

    def of(self, name: str) -> list[Parked]:
        """What a consumer has set aside, oldest first. A row of a newer version is left out."""
        found: list[Parked] = []
        self._state.refuse_if_gone()
        reads, bounds = self._reads, KeyRange.of_prefix(parked_prefix(name))
        for keys, values in reads.moments.now.begun(
            lambda: reads.chunks(reads.moments.reader("consumers"), *bounds, reverse=False, table=SYSTEM_TABLE)
        ):
            for key, value in zip(keys, values, strict=True):
                with suppress(FormatError):
                    found.append(decode_parked(key, value))
        return found

    def hold(self, name: str, parked: Sequence[Parked], limits: Limits) -> None:
        """From here on hold these commits of a consumer, and no others; without effect if the oldest is gone."""
        hold, log = None, self._log
        if parked and log is not None:
            after, now = Seqno(parked[0].seqno - 1), log.last_seqno
            with suppress(FeedGap):
                hold = log.retention.hold(f"{name} (parked)", after, log.segments(), now, log.last_time_us, limits)
        keep(self._holds, name, hold)


def keep(holds: dict[str, Hold], name: str, hold: Hold | None) -> None:
    """From here on this is the hold of that name, in place of one that it may have; None: there is none."""
    old = holds.get(name)
    if hold is not None:
        holds[name] = hold
    else:
        holds.pop(name, None)
    if old is not None and old is not hold:
        old.release()


def error_bytes(error: str) -> bytes:
    """As it is stored: one that is too long is cut."""
    return error.encode(errors="replace")[:MAX_ERROR_BYTES].decode(errors="ignore").encode()


def parked_prefix(name: str) -> bytes:
    """What the keys of all rows of a consumer begin with."""
    encoded = name.encode()
    return _KIND + bytes([len(encoded)]) + encoded


def parked_key(name: str, seqno: Seqno) -> bytes:
    """The key of one row."""
    return parked_prefix(name) + seqno.to_bytes(_SEQNO_BYTES, "big")


def encode_parked(parked: Parked) -> bytes:
    """The row as bytes."""
    error = error_bytes(parked.error)
    attempts = min(parked.attempts, _MOST_ATTEMPTS)
    return _PARKED.pack(_VERSION, 0, len(error), attempts, parked.since_us) + error


def decode_parked(key: bytes, value: bytes) -> Parked:
    """What `encode_parked` was given. CorruptionError for bytes that are none, FormatError for a newer version's.

    Requires: the key begins with a prefix of `parked_prefix`.
    """
    if value[:1] > bytes([_VERSION]):
        raise FormatError(f"a parked commit, {key!r}, is of version {value[0]}, which this kvwal does not know")
    if len(value) < _PARKED.size or value[0] != _VERSION or len(key) != 2 + key[1] + _SEQNO_BYTES:
        raise _damaged(key, "is cut short")
    _, zero, size, attempts, since_us = _PARKED.unpack_from(value)
    if zero or size > MAX_ERROR_BYTES or len(value) != _PARKED.size + size:
        raise _damaged(key, "does not have the length that it says")
    try:
        error = value[_PARKED.size :].decode()
    except UnicodeDecodeError:
        raise _damaged(key, "is not UTF-8") from None
    return Parked(Seqno(int.from_bytes(key[-_SEQNO_BYTES:], "big")), error, attempts, since_us)


def _damaged(key: bytes, reason: str) -> CorruptionError:
    return CorruptionError(DATA, None, f"the row of the parked commit {key!r} {reason}")
