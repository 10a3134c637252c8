"""Stores with a past."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, Final

import kvwal
from bench.data import KEY_BYTES, Pair, key, values

__all__ = ["KEEP", "MIB", "SEGMENT_BYTES", "VALUE_BYTES", "changes", "grow", "index_keys", "load", "unchanged"]

MIB: Final = 1 << 20
SEGMENT_BYTES: Final = 16 * MIB
VALUE_BYTES: Final = 100
# What one put takes in the log.
_COMMIT_BYTES: Final = 51 + KEY_BYTES + VALUE_BYTES
#: Nothing goes, and no base is made of its own accord.
KEEP: Final[Any] = {"keep_history_bytes": 1 << 40, "history_base_bytes": 1 << 40, "durability": "os"}


def changes(count: int, keys: int, seed: int) -> list[Pair]:
    """Puts of random keys, but of none whose number is a multiple of ten: those stay as they were loaded."""
    random = Random(seed)
    pool = values(VALUE_BYTES, seed)
    return [(key(random.randrange(keys // 10) * 10 + 1 + n % 9), pool[n % len(pool)]) for n in range(count)]


def unchanged(keys: int) -> set[bytes]:
    """The keys that are as they were loaded."""
    return {key(number) for number in range(0, keys, 10)}


def load(path: Path, keys: int) -> None:
    """Make a store with so many keys in its pages, which are the only base."""
    # Of small segments most go, and with them the beginning, which would be a base as well.
    with kvwal.open(path, **{**KEEP, "keep_history_s": 0}, segment_bytes=MIB) as db:
        for first in range(0, keys, 1000):
            random = Random(first)
            some = range(first, min(first + 1000, keys))
            db.update({key(number): random.randbytes(VALUE_BYTES) for number in some})
        for _ in range(2):
            # The log that the checkpoint before needs stays.
            db.checkpoint()
            db[key(0)] = db[key(0)]
    # An open makes the first base.
    with kvwal.open(path, **KEEP) as db:
        window = db.window
        assert (window.bases, window.oldest) == (1, db.last_seqno)


def grow(db: kvwal.Store, keys: int, log_bytes: int, say: Callable[[str], None], seed: int = 1) -> int:
    """Commit puts of random keys, one by one, until the log has grown by so much; how many they were."""
    count = -(-log_bytes // _COMMIT_BYTES)
    done = 0
    while done < count:
        say(f"{done * _COMMIT_BYTES // MIB:,} of {log_bytes // MIB:,} MiB of log")
        for name, value in changes(min(10_000, count - done), keys, seed * 1000 + done):
            db.put(name, value)
        done += 10_000
    return count


def index_keys(db: kvwal.Store) -> None:
    """Have every segment that is sealed get its key index."""
    assert not list(db.versions(b"no such key"))
