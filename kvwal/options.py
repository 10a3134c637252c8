"""What can be set when a store is opened, with the limits of each setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from kvwal.files import Files, system_files

__all__ = ["RESERVE_BYTES", "Durability", "Flag", "Options", "wants_sync"]

Durability: TypeAlias = Literal["commit", "interval", "os"]
Flag: TypeAlias = Literal["r", "w", "c", "n"]

# Held back on disk so that deletes, and the checkpoint that frees their pages, work on a full disk.
RESERVE_BYTES: Final = 4 << 20

MIN_SEGMENT_BYTES: Final = 16 << 10
MAX_SEGMENT_BYTES: Final = 1 << 30


def wants_sync(durability: str) -> bool:
    """Whether a commit at this durability returns only after a flush. ValueError for an unknown name."""
    if durability not in get_args(Durability):
        raise ValueError(f'durability is one of "commit", "interval" and "os", not {durability!r}')
    return durability == "commit"


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of an open store. Sizes in bytes, times in seconds. Not stored: each open may choose anew."""

    durability: Durability = "commit"
    #: Longest time a commit at durability "interval" stays unflushed.
    sync_delay_s: float = 0.1
    #: Memory for pages and rows of the data file.
    cache_bytes: int = 64 << 20
    #: A checkpoint starts when the memtable holds this much; at twice as much, writers wait for it.
    memtable_bytes: int = 64 << 20
    #: The log moves on to a new segment at this size.
    segment_bytes: int = 16 << 20
    #: A checkpoint starts when this much log was written since the last one.
    checkpoint_log_bytes: int = 64 << 20
    #: A checkpoint starts when the oldest commit not yet in the pages is this old.
    checkpoint_interval_s: float = 300.0
    #: Log kept beyond what recovery needs: at least these bytes, and what is younger than these seconds.
    retain_log_bytes: int = 0
    retain_log_s: float = 0.0
    #: How segments are preallocated: by the file system, or by writing zeros.
    preallocate: Literal["allocate", "zeros"] = "allocate"
    #: False: no thread is started; checkpoints run inside the commit that makes them due.
    background: bool = True
    #: Permissions of new files; a new directory gets the x bits beside them.
    mode: int = 0o600
    files: Files = field(default_factory=system_files)

    def __post_init__(self) -> None:
        wants_sync(self.durability)
        _check_int("cache_bytes", self.cache_bytes, 256 << 10)
        _check_int("memtable_bytes", self.memtable_bytes, 16 << 10)
        _check_int("segment_bytes", self.segment_bytes, MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES)
        _check_int("checkpoint_log_bytes", self.checkpoint_log_bytes, 4 << 10)
        _check_int("retain_log_bytes", self.retain_log_bytes, 0)
        _check_int("mode", self.mode, 0, 0o7777)
        _check_number("sync_delay_s", self.sync_delay_s)
        _check_number("checkpoint_interval_s", self.checkpoint_interval_s)
        _check_number("retain_log_s", self.retain_log_s)
        if self.preallocate not in ("allocate", "zeros"):
            raise ValueError(f'preallocate is "allocate" or "zeros", not {self.preallocate!r}')
        if not isinstance(self.background, bool):
            raise TypeError("background is True or False")

    @property
    def directory_mode(self) -> int:
        """The files' mode with the right to enter wherever there is the right to read."""
        return self.mode | (self.mode & 0o444) >> 2


def _check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is an int, not {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} is {value}; it is at least {least}" + (f" and at most {most}" if most else ""))


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is a number of seconds, not {type(value).__name__}")
    if not value >= 0:
        raise ValueError(f"{name} is {value}; it is at least 0")


